"""Regimes: the filter is the exact posterior of the past alone, names follow what states emit, and nothing turns it into NaN."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catalog.errors import InputError
from catalog.events import EVENT, SCALE, Instrument
from cift_models.hmm import LONGEST_SILENCE, Hmm, Measures, share
from cift_models.hmm_chain import CLIP, REGIMES, Chain, Config, D, K, filter_all, fit_chain, name_states, smooth, viterbi
from cift_models.labels import LABELS, Split, Study, Table, Thresholds
from cift_models.windows import HORIZONS_NS, Block

NAMES = ("mid", "spread")


def chain(seed: int, k: int = 3, d: int = 2, sticky: float = 0.0) -> Chain:
    rng = np.random.default_rng(seed)
    moves = rng.dirichlet(np.ones(k), k) * (1 - sticky) + np.eye(k) * sticky
    return Chain(rng.dirichlet(np.ones(k)), moves, rng.normal(size=(k, d)) * 2, rng.uniform(0.2, 2, (k, d)))


def sample(c: Chain, n: int, seed: int):
    rng = np.random.default_rng(seed)
    state, x = np.empty(n, int), np.empty((n, c.mean.shape[1]))
    for t in range(n):
        state[t] = rng.choice(len(c.start), p=c.start if t == 0 else c.moves[state[t - 1]])
        x[t] = rng.normal(c.mean[state[t]], np.sqrt(c.var[state[t]]))
    return state, x


def enumerate_paths(c: Chain, x):
    """Every path of states with its joint density with x."""
    paths = np.array(list(itertools.product(range(len(c.start)), repeat=len(x))))
    density = np.exp(-0.5 * ((x[:, None] - c.mean) ** 2 / c.var + np.log(2 * np.pi * c.var)).sum(-1))
    p = c.start[paths[:, 0]] * density[0, paths[:, 0]]
    for t in range(1, len(x)):
        p = p * c.moves[paths[:, t - 1], paths[:, t]] * density[t, paths[:, t]]
    return paths, p


@pytest.mark.parametrize("seed", range(5))
def test_filter_smoother_and_best_path_equal_enumeration(seed):
    c = chain(seed)
    x = np.random.default_rng(seed + 50).normal(size=(6, 2)) * 2
    paths, p = enumerate_paths(c, x)
    out = np.empty((6, 3))
    assert filter_all(x, *c, out) == pytest.approx(np.log(p.sum()), abs=1e-10)
    assert viterbi(x, c).tolist() == paths[p.argmax()].tolist()
    for t in range(6):
        behind, q = enumerate_paths(c, x[: t + 1])
        for k in range(3):
            assert out[t, k] == pytest.approx(q[behind[:, t] == k].sum() / q.sum(), abs=1e-10)
            assert smooth(x, c)[t, k] == pytest.approx(p[paths[:, t] == k].sum() / p.sum(), abs=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_filter_equals_hmmlearn(seed):
    from hmmlearn.hmm import GaussianHMM

    c = chain(seed, k=5, d=4, sticky=0.9)
    _, x = sample(c, 400, seed)
    model = GaussianHMM(5, covariance_type="diag")
    model.startprob_, model.transmat_, model.means_, model.covars_ = c
    out = np.empty((400, 5))
    assert filter_all(x, *c, out) == pytest.approx(model.score(x), rel=1e-12, abs=1e-10)
    for t in (1, 10, 399):
        assert np.allclose(out[t - 1], model.predict_proba(x[:t])[-1], atol=1e-10)
    assert np.array_equal(viterbi(x, c), model.predict(x))
    assert np.allclose(smooth(x, c), model.predict_proba(x), atol=1e-9)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-8, 1.0, 1e8, 1e200]), zero=st.floats(0, 1),
    holes=st.floats(0, 1), floor=st.sampled_from([1e-300, 1e-12, 1.0]),
)  # fmt: skip
def test_the_filter_is_never_nan(seed, scale, zero, holes, floor):
    rng = np.random.default_rng(seed)
    c = chain(int(rng.integers(1_000)), 5, 4)
    moves = np.where(rng.random((5, 5)) < zero, 0.0, c.moves) + 1e-300 * np.eye(5)
    moves /= moves.sum(axis=1, keepdims=True)
    x = rng.normal(size=(30, 4)) * scale
    x[rng.random(x.shape) < holes] = np.nan
    x[rng.random(x.shape) < 0.05] = np.inf * rng.choice([-1, 1])
    out = np.empty((30, 5))
    filter_all(x, c.start, moves, c.mean * scale, np.maximum(c.var * floor, floor), out)
    assert np.isfinite(out).all() and np.allclose(out.sum(axis=1), 1)


def test_a_missing_measure_is_left_out_of_the_evidence():
    c = chain(1)
    x = np.array([[0.3, np.nan], [np.nan, np.nan], [1.0, -1.0]])
    only = Chain(c.start, c.moves, c.mean[:, :1], c.var[:, :1])
    out, first = np.empty((3, 3)), np.empty((1, 3))
    filter_all(x, *c, out)
    filter_all(x[:1, :1], *only, first)
    assert np.allclose(out[0], first[0])
    assert np.allclose(out[1], out[0] @ c.moves)


PLANTED = np.array([[0, -1.5, -1.5, -1], [2, 0.2, 0, 0], [-2, 0.2, 0, 0], [0, 1.5, 1.5, 0.5], [0, 4, 3, 4]], float)


def planted(seed: int, n: int = 6_000):
    moves = np.full((K, K), 0.01 / 4) + np.eye(K) * (0.99 - 0.01 / 4)
    return sample(Chain(np.full(K, 0.2), moves, PLANTED, np.full((K, D), 0.25)), n, seed)


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_regimes_are_found_and_named(seed):
    state, x = planted(seed)
    fitted = fit_chain(x, [3_000, 3_000], seed)
    out = np.empty((len(x), K))
    filter_all(x, *fitted, out)
    assert (out.argmax(axis=1) == state).mean() > 0.97
    assert np.allclose(fitted.mean, PLANTED, atol=0.5)  # a little towards the prototypes


def test_names_do_not_depend_on_the_order_of_states_nor_on_the_seed_of_a_refit():
    for order in itertools.permutations(range(K)):
        assert np.argsort(order)[np.arange(K)].tolist() == name_states(PLANTED[list(order)]).tolist()
    _, x = planted(2)
    a, b = fit_chain(x, [len(x)], 0), fit_chain(x[500:], [len(x) - 500], 9)
    assert np.allclose(a.mean, b.mean, atol=0.2)
    assert len(REGIMES) == K == 5


def test_a_refit_goes_on_from_the_chain_it_is_given_and_keeps_its_states():
    _, x = planted(3)
    first = fit_chain(x[:3_000], [3_000], 0)
    drifted = x[3_000:] + np.array([0.0, 0.3, 0.2, 0.0])
    again = fit_chain(drifted, [len(drifted)], 0, start=first)
    moved = (again.mean - first.mean).mean(axis=0)
    assert np.allclose(moved, [0.0, 0.25, 0.15, 0.0], atol=0.1), "the states have moved as the market has, a little held by what they were"
    assert (np.abs(again.mean[:, None] - first.mean).sum(axis=2).argmin(axis=1) == np.arange(K)).all(), "and each is still the same"
    before, after = np.empty((len(drifted), K)), np.empty((len(drifted), K))
    assert filter_all(drifted, *again, after) > filter_all(drifted, *first, before)
    mixed = fit_chain(drifted, [len(drifted)], 0, Config(mixtures=2), fit_chain(x[:3_000], [3_000], 0, Config(mixtures=2)))
    assert len(mixed.start) == 2 * K and filter_all(drifted, *mixed, np.empty((len(drifted), 2 * K))) > -np.inf


def odd_measures(seed: int):
    """Measures of a kind that the seed chooses: constant, jumping, spiked, missing, tiny, huge, trending or all of it by columns."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 130))
    kinds = [
        lambda: np.full(n, rng.normal()), lambda: rng.integers(0, 2, n).astype(float), lambda: CLIP * (np.arange(n) == rng.integers(0, n)),
        lambda: np.full(n, np.nan), lambda: 1e-12 * rng.normal(size=n), lambda: 1e6 * rng.normal(size=n), lambda: rng.normal(size=n),
        lambda: np.cumsum(rng.normal(size=n)), lambda: np.where(rng.random(n) < 0.3, np.nan, rng.standard_cauchy(n)),
        lambda: np.where(rng.random(n) < 0.1, np.inf * rng.choice([-1, 1], n), rng.normal(size=n)),
    ]  # fmt: skip
    chosen = rng.integers(0, len(kinds), D) if rng.random() < 0.5 else np.repeat(rng.integers(0, len(kinds)), D)
    return np.stack([kinds[i]() for i in chosen], axis=1), [n - n // 2, n // 2] if rng.random() < 0.5 else [n]


def fuzzed_fit(seed: int) -> None:
    """Whatever is measured, the chain that is fitted and its filter are sound."""
    x, lengths = odd_measures(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        c = fit_chain(x, lengths, seed, Config(starts=2, iterations=6, mixtures=2 if seed % 10 == 0 else 1))
    assert all(np.isfinite(a).all() for a in c) and (c.var > 0).all(), seed
    assert np.allclose(c.moves.sum(axis=1), 1) and np.allclose(c.start.sum(), 1), seed
    out = np.empty((len(x), len(c.start)))
    filter_all(x, *c, out)
    assert np.isfinite(out).all() and np.allclose(out.sum(axis=1), 1), seed


def test_three_hundred_fits_to_odd_measures_are_never_nan():
    for seed in range(300):
        fuzzed_fit(seed)


def market(seed: int, seconds: int = 900, instruments: int = 2, per_second: int = 12):
    """Calm and agitated halves of each minute; trade only now and then; one long silence; some rows one-sided."""
    rng = np.random.default_rng(seed)
    n = seconds * per_second
    ts = np.sort(rng.integers(0, seconds * SCALE, n)) + 1_709_303_400 * SCALE
    ts[n // 2 :] += (LONGEST_SILENCE + 30) * SCALE
    agitated = (ts // (30 * SCALE)) % 2 == 1
    events = np.zeros(n, EVENT)
    events["ts_init"], events["instrument"] = ts, rng.integers(0, instruments, n)
    steps = rng.integers(-1, 2, n) * np.where(agitated, 6, rng.random(n) < 0.1)
    mid = np.empty(n)
    for k in range(instruments):
        mine = events["instrument"] == k
        mid[mine] = 100 + np.cumsum(steps[mine]) * 0.01
    mid[rng.random(n) < 0.02] = np.nan
    rows = np.stack([mid, np.where(agitated, 3.0, 1.0)], 1)
    return Block(events, rows, np.flatnonzero(rng.random(n) < 0.2)), agitated


INSTRUMENTS = (Instrument("A.X", SCALE // 100, SCALE, 1.0, "USD"), Instrument("B.X", SCALE // 100, SCALE, 1.0, "USD"))


def study_of(block: Block, agitated) -> Study:
    c = block.closes
    ts, inst = block.events["ts_init"][c], block.events["instrument"][c].astype(np.int64)
    rng = np.random.default_rng(0)
    move = np.where(agitated[c, None], 5.0, 0.5) * rng.choice([-1.0, 1.0], (len(c), len(LABELS)))
    known = ts[:, None] + np.array([*HORIZONS_NS, 1, 1, 1]) + 1
    table = Table(ts, inst, block.rows[c].astype(np.float32), block.rows[c, 1], move, known)
    split = Split(int(ts[0]), int(ts[len(c) * 6 // 10]), int(ts[len(c) * 8 // 10]), int(ts[-1]) + 1)
    return Study(INSTRUMENTS, NAMES, ("spread",), table, split, Thresholds(np.full((2, len(LABELS)), 1.25), np.ones(2)), (0, 1, 2, 3), 0)


@pytest.fixture(scope="module")
def trained():
    block, agitated = market(0)
    study = study_of(block, agitated)
    gathered = Hmm.gatherer(INSTRUMENTS, NAMES)
    gathered.push(block)
    return Hmm.fit(study, gathered), block, agitated, study


def predictions(hmm, block, cuts=()):
    state, out = hmm.new_state(), []
    edges = [0, *sorted(cuts), len(block.events)]
    for a, b in itertools.pairwise(edges):
        c = block.closes[(block.closes >= a) & (block.closes < b)] - a
        v = hmm.predict(Block(block.events[a:b], block.rows[a:b], c), state)
        out.append((v.proba, v.magnitude, hmm.regimes(state)))
    return [np.concatenate(p) for p in zip(*out)]


def test_agitated_seconds_move_more_and_the_votes_say_so(trained):
    hmm, block, agitated, _ = trained
    proba, magnitude, regimes = predictions(hmm, block)
    late = block.events["ts_init"][block.closes] % (30 * SCALE) > 20 * SCALE
    now = agitated[block.closes]
    known = np.isfinite(proba[:, 0, 0])
    assert known.mean() > 0.98
    assert np.nanmedian(proba[late & now, 0, 1]) < 0.25 < 0.5 < np.nanmedian(proba[late & ~now, 0, 1])
    assert np.nanmedian(magnitude[late & now, 0]) > 2 * np.nanmedian(magnitude[late & ~now, 0])
    assert np.allclose(proba[known].sum(axis=2), 1) and np.allclose(regimes[known].sum(axis=1), 1)


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 900 * 12), max_size=6))
def test_any_cut_of_the_stream_gives_the_same_votes(trained, cuts):
    hmm, block, _, _ = trained
    for a, b in zip(predictions(hmm, block), predictions(hmm, block, cuts)):
        assert np.array_equal(a, b, equal_nan=True)


def test_the_future_changes_no_past_vote(trained):
    hmm, block, _, _ = trained
    cut = len(block.events) * 2 // 3
    rows = block.rows.copy()
    rows[cut:] = rows[cut:] * 3 + 1
    past = block.closes < cut
    for a, b in zip(predictions(hmm, block), predictions(hmm, block._replace(rows=rows))):
        assert np.array_equal(a[past], b[past], equal_nan=True)
        assert not np.array_equal(a[~past], b[~past], equal_nan=True)


def test_the_members_filter_is_the_filter_over_the_gathered_seconds(trained):
    hmm, block, _, _ = trained
    gathered = Measures(INSTRUMENTS, NAMES)
    for a in range(0, len(block.events), 777):
        gathered.push(Block(block.events[a : a + 777], block.rows[a : a + 777], np.empty(0, np.int64)))
    x, inst, end = gathered.seconds(np.iinfo(np.int64).max)
    mine = (inst == 0) & (end < block.events["ts_init"][len(block.events) // 2])  # up to the long silence
    z = np.clip((x[mine] - hmm.centre[0]) / hmm.scale[0], -CLIP, CLIP)
    out = np.empty((len(z), K))
    filter_all(z, *hmm.chain, out)
    regimes = predictions(hmm, block)[2]
    ts, k = block.events["ts_init"][block.closes], block.events["instrument"][block.closes]
    rows = np.flatnonzero((k == 0) & (ts > end[mine][0]) & (ts < end[mine][-1]))
    assert len(rows) > 100
    at = np.searchsorted(end[mine], ts[rows], side="right") - 1
    assert np.array_equal(regimes[rows], out[at])


def test_a_second_is_measured_when_it_has_ended_and_not_before(trained):
    _, block, _, _ = trained
    gathered = Measures(INSTRUMENTS, NAMES)
    gathered.push(block)
    x, inst, end = gathered.seconds(np.iinfo(np.int64).max)
    ts, k = block.events["ts_init"], block.events["instrument"]
    for i in (3, 40, 400):
        within = (k == inst[i]) & (ts >= end[i] - SCALE) & (ts < end[i])
        assert x[i, 2] == pytest.approx(np.log1p(np.count_nonzero(within)))
    widths = []
    for e in end[inst == 0][:100]:  # each second's last spread, decayed with a half-life of 5 s
        last = np.log(block.rows[(k == 0) & (ts < e), 1][-1])
        widths.append(widths[-1] + (1 - 2 ** (-1 / 5)) * (last - widths[-1]) if widths else last)
    assert np.allclose(x[inst == 0][:100, 3], widths)
    assert (np.diff(end[inst == 0]) >= SCALE).all()


def test_after_a_long_silence_the_regime_is_forgotten(trained):
    hmm, block, _, _ = trained
    proba = predictions(hmm, block)[0]
    first = np.searchsorted(block.closes, len(block.events) // 2)
    ts = block.events["ts_init"][block.closes]
    soon = (np.arange(len(ts)) >= first) & (ts // SCALE == ts[first] // SCALE)
    assert np.isnan(proba[soon]).all()


def test_the_votes_are_fitted_to_the_regimes_that_predict_sees(trained):
    """On both sides of the long silence, and not in the first second after it: P(class | regime) is that of the member's own stream."""
    hmm, block, _, study = trained
    seen, config = predictions(hmm, block)[2], Config()
    for k, h in itertools.product(range(2), study.usable):
        rows = np.concatenate([study.fit_rows(h), study.calibration_rows(h)])
        rows = rows[(study.table.instrument[rows] == k) & np.isfinite(seen[rows, 0])]
        y, worth = study.classes(h)[rows], study.independent(rows, h) / len(rows)
        rates = (np.bincount(y, minlength=3) / len(y) + 0.01) / 1.03
        weighed = worth * np.stack([seen[rows][y == c].sum(axis=0) for c in range(3)], axis=1) + config.pseudo * rates
        assert np.allclose(hmm.table[k, :, h], weighed / (worth * seen[rows].sum(axis=0)[:, None] + config.pseudo), atol=1e-12)


def test_votes_are_proven_where_they_beat_class_rates_on_later_decisions_and_nowhere_else(trained):
    """Agitation tells which moves pass the threshold; with outcomes drawn anew, or with too few of them, nothing is shown."""
    hmm, block, _, study = trained
    assert hmm.proven[:3].all() and "votes at 500ms, 1s, 5s" in "\n".join(hmm.report())
    gathered = Hmm.gatherer(INSTRUMENTS, NAMES)
    gathered.push(block)
    anew = np.random.default_rng(5).permutation(study.table.move)
    chance = Hmm.fit(study._replace(table=study.table._replace(move=anew)), gathered)
    assert chance.proven.sum() <= 1 and np.isfinite(chance.table[:, :, :2]).all(), "it votes all the same"
    few = study.split._replace(weigh=study.split.calibrate + 8 * SCALE)
    young = Hmm.fit(study._replace(split=few), gathered)
    assert not young.proven.any() and "begins with next to no weight at 500ms" in young.report()[-1]


def test_saved_and_loaded_unchanged(trained, tmp_path):
    hmm, block, _, _ = trained
    hmm.save(tmp_path)
    assert np.array_equal(Hmm.load(tmp_path, NAMES).proven, hmm.proven)
    for a, b in zip(predictions(hmm, block), predictions(Hmm.load(tmp_path, NAMES), block)):
        assert np.array_equal(a, b, equal_nan=True)


def test_the_same_seed_gives_the_same_chain(trained):
    hmm, block, _, study = trained
    gathered = Measures(INSTRUMENTS, NAMES)
    gathered.push(block)
    assert all(np.array_equal(a, b) for a, b in zip(Hmm.fit(study, gathered).chain, hmm.chain))


def test_too_few_seconds_are_refused_with_how_many_are_needed(trained):
    _, block, _, study = trained
    gathered = Measures(INSTRUMENTS, NAMES)
    gathered.push(Block(block.events[:500], block.rows[:500], np.empty(0, np.int64)))
    with pytest.raises(InputError, match="300 seconds"):
        Hmm.fit(study, gathered)


def test_shares_of_regimes_are_named():
    got = share(np.array([0, 0, 1, -1], np.int8))
    assert got["low_volatility"] == 0.5 and got["trending_up"] == 0.25 and sum(got.values()) == 0.75
