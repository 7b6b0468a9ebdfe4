"""The meta-model: weights follow what members were right about, within their bound; decisions need agreement and confidence."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catalog.errors import InputError
from cift_models.ensemble import (
    MEMBERS,
    SOFT,
    Config,
    Ensemble,
    R,
    available,
    confidence_threshold,
    learning_rates,
    member_class,
    recommend,
    trust_in,
)  # fmt: skip
from cift_models.hmm import POSITION
from cift_models.labels import H, Outcomes
from cift_models.pooling import SHARP, Pool, pooled

N = 5
NONE = np.empty(0, np.int64)


def outcomes(rows) -> Outcomes:
    """From (instrument, serial, label, move, at)."""
    k, s, j, move, at = zip(*rows) if rows else ((),) * 5
    i = np.int64
    return Outcomes(np.array(k, i), np.array(s, i), np.array(j, i), np.array(move, float), np.zeros(len(rows), i), np.array(at, i))


def ensemble(n: int = N, eta: float = 1.0, share: float = 1e-3, confident: float = 0.0, instruments: int = 2, **config) -> Ensemble:
    e = Ensemble.even([f"m{a}" for a in range(n)], np.full((instruments, H), 1.0), np.full(H, eta), Config(share=share, **config))
    e.confident = np.full(H, confident)
    return e


def pool_of(seed: int, n: int = N, instruments: int = 2) -> Pool:
    rng = np.random.default_rng(seed)
    return Pool(rng.uniform(0, 1, (R + 1, H, n, 2)), 0.1 * rng.normal(size=(H, 3)), rng.dirichlet(np.full(3, 9.0), (instruments, H)))


def random_votes(rng, m, n=N, sleeping=0.2):
    votes = rng.dirichlet(np.ones(3), (m, n, H))
    votes[rng.random((m, n, H)) < sleeping] = np.nan
    return votes, np.where(np.isnan(votes[..., 0]), np.nan, rng.uniform(0, 3, (m, n, H)))


def soft(votes):
    return (votes + SOFT) / (1 + 3 * SOFT)


def naive(e: Ensemble, votes, sizes, regimes, inst, arriving):
    """Hedge with fixed share and sleeping experts in plain loops. `arriving[c]`: (decision, h, class) known before decision c."""
    w, votes = e.weights.copy(), soft(votes)
    proba, magnitude = np.full((len(votes), H, 3), np.nan), np.full((len(votes), H), np.nan)
    excess = np.zeros(w.shape)
    for c in range(len(votes) + 1):
        for d, h, y in arriving[c]:
            r = regimes[d] if regimes[d] >= 0 else R
            awake = [a for a in range(w.shape[2]) if not np.isnan(votes[d, a, h, 0])]
            if not awake:
                continue
            total = sum(w[r, h, a] for a in awake)
            mix = sum(w[r, h, a] * votes[d, a, h, y] for a in awake) / total
            new = {a: w[r, h, a] / total * votes[d, a, h, y] ** e.eta[h] for a in awake}
            scale = sum(new.values())
            for a in awake:
                excess[r, h, a] += np.log(votes[d, a, h, y]) - np.log(mix)
                share = e.config.share * e.eta[h]  # dealt out for each independent label
                w[r, h, a] = total * ((1 - share) * new[a] / scale + share / len(awake))
        if c == len(votes):
            return proba, magnitude, w, excess
        for h in range(H):
            r = regimes[c] if regimes[c] >= 0 else R
            awake = [a for a in range(w.shape[2]) if not np.isnan(votes[c, a, h, 0])]
            if awake:
                weight = np.array([w[r, h, a] for a in awake])
                proba[c, h] = weight @ votes[c, awake, h] / weight.sum()
                magnitude[c, h] = weight @ sizes[c, awake, h] / weight.sum()
    return None


def episode(seed: int, m: int = 60, sleeping: float = 0.2):
    """Decisions with outcomes that arrive up to ten decisions later."""
    rng = np.random.default_rng(seed)
    votes, sizes = random_votes(rng, m, sleeping=sleeping)
    inst, regimes = rng.integers(0, 2, m), rng.integers(-1, R, m)
    serial = np.array([np.count_nonzero(inst[:c] == inst[c]) for c in range(m)])
    arriving, rows = [[] for _ in range(m + 1)], []
    late = sorted((min(m, d + int(rng.integers(1, 10))), d, h) for d in range(m) for h in range(H))
    for c, d, h in late:
        move = float(rng.choice([-3.0, 0.0, 3.0]))
        arriving[c].append((d, h, int(np.sign(move)) + 1))
        rows.append((inst[d], serial[d], h, move, c * 10))
    return votes, sizes, inst, regimes, arriving, rows


def decide(e, learned, votes, sizes, regimes, inst, rows, room=64, since=0, mid=None):
    m = len(votes)
    mid = np.full(m, 100.0) if mid is None else mid
    return e.decide(np.arange(m), inst, mid, np.arange(m) * 10, votes.copy(), sizes, regimes, outcomes(rows), room, learned, since)


@pytest.mark.parametrize("eta", [1.0, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_mixture_weights_and_regret_equal_a_naive_hedge(seed, eta):
    votes, sizes, inst, regimes, arriving, rows = episode(seed)
    e = ensemble(eta=eta)
    learned = e.new_state(64)
    proba, magnitude, _, _ = decide(e, learned, votes, sizes, regimes, inst, rows)
    want = naive(e, votes, sizes, regimes, inst, arriving)
    assert np.allclose(proba, want[0], equal_nan=True) and np.allclose(magnitude, want[1], equal_nan=True)
    assert np.allclose(learned.weights, want[2])
    assert np.allclose(np.array(e.regret(learned)["regret"]), want[3])


@pytest.mark.parametrize("seed", range(3))
def test_mixture_and_pool_are_blended_as_their_outcomes_ask_for(seed):
    """In plain loops: three experts, Hedge with fixed share, each regime and horizon by itself."""
    votes, sizes, inst, regimes, arriving, rows = episode(seed)
    e, plain = ensemble(eta=0.4, share=0.01), ensemble(eta=0.4, share=0.01)
    e.pool = pool_of(seed)
    learned = e.new_state(64)
    proba = decide(e, learned, votes, sizes, regimes, inst, rows)[0]
    mix = decide(plain, plain.new_state(64), votes, sizes, regimes, inst, rows)[0]
    told, w = np.full((len(votes), H, 3), np.nan), np.full((R + 1, H, 3), 1 / 3)
    for c, h in itertools.product(range(len(votes)), range(H)):
        r = regimes[c] if regimes[c] >= 0 else R
        pooled(soft(votes[c, :, h]), e.pool.weight[r, h], e.pool.bias[h], e.pool.rate[inst[c], h], told[c, h])
    rate = e.pool.rate[inst]
    bold = rate * (told / rate) ** SHARP
    bold /= bold.sum(axis=2, keepdims=True)
    arrived_mix = arriving_mixture(plain, votes, regimes, arriving)
    for c in range(len(votes)):
        for d, h, y in arriving[c]:
            r = regimes[d] if regimes[d] >= 0 else R
            p = np.array([arrived_mix[d, h], told[d, h, y], bold[d, h, y]])
            if np.isfinite(p).all():
                moved = w[r, h] * p**0.4
                w[r, h] = (1 - 0.004) * moved / moved.sum() + 0.004 / 3
        for h in range(H):
            b = w[regimes[c] if regimes[c] >= 0 else R, h]
            assert np.allclose(proba[c, h], b[0] * mix[c, h] + b[1] * told[c, h] + b[2] * bold[c, h], equal_nan=True)
    assert not np.allclose(proba, mix, equal_nan=True)


def arriving_mixture(e: Ensemble, votes, regimes, arriving):
    """What the mixture, with the weights at the time the outcome arrives, gave to what happened: {(decision, h): probability}."""
    w, votes, out = e.weights.copy(), soft(votes), {}
    for events in arriving:
        for d, h, y in events:
            r = regimes[d] if regimes[d] >= 0 else R
            awake = np.isfinite(votes[d, :, h, 0])
            if not awake.any():
                out[d, h] = np.nan
                continue
            p, own = votes[d, awake, h, y], w[r, h, awake]
            out[d, h] = own @ p / own.sum()
            new = own * p ** e.eta[h]
            share = e.config.share * e.eta[h]
            w[r, h, awake] = own.sum() * ((1 - share) * new / new.sum() + share / awake.sum())
    return out


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), eta=st.floats(0.05, 1.0), share=st.floats(1e-6, 0.2), sleeping=st.floats(0, 0.9))
def test_regret_against_every_member_stays_within_its_bound(seed, eta, share, sleeping):
    votes, sizes, inst, _, _, rows = episode(seed, 80, sleeping)
    e = ensemble(eta=eta, share=share)
    e.pool = pool_of(seed)
    learned = e.new_state(128)
    decide(e, learned, votes, sizes, np.full(len(votes), seed % R), inst, rows, room=128)
    account = e.regret(learned)
    assert (np.array(account["regret"]) <= np.array(account["bound"]) + 1e-9).all()
    both = account["pool"]
    assert (np.array(both["regret"]) <= np.array(both["bound"]) + 1e-9).all() and np.any(both["regret"])
    assert np.allclose(learned.weights.sum(axis=2), 1) and (learned.weights > 0).all()
    json.dumps(account)


def test_the_weight_goes_to_the_member_that_is_right_and_follows_when_that_changes():
    m = 600
    votes = np.full((m, 3, H, 3), 1 / 3)
    votes[:, 0, :, :], votes[:, 1, :, :] = [0.1, 0.1, 0.8], [0.8, 0.1, 0.1]
    e = ensemble(3, eta=0.5, instruments=1)
    learned = e.new_state(1024)
    rows = [(0, c, h, 3.0 if c < m // 2 else -3.0, (c + 1) * 10) for c in range(m) for h in range(H)]
    first = rows[: m // 2 * H]
    decide(e, learned, votes[: m // 2], np.ones((m // 2, 3, H)), np.zeros(m // 2, np.int64), np.zeros(m // 2, np.int64), first, 1024)
    assert (learned.weights[0, :, 0] > 0.95).all()
    second = [(k, s, h, v, at - m // 2 * 10) for k, s, h, v, at in rows[m // 2 * H :]]
    decide(e, learned, votes[m // 2 :], np.ones((m // 2, 3, H)), np.zeros(m // 2, np.int64), np.zeros(m // 2, np.int64), second, 1024)
    assert (learned.weights[0, :, 1] > 0.95).all()
    assert np.allclose(learned.weights[1:], 1 / 3), "what was learnt in one regime says nothing of the others"


@pytest.mark.parametrize("overlap", [1, 10])
def test_labels_that_overlap_deal_out_as_much_weight_as_the_independent_ones_they_are_worth(overlap):
    """Two members that say the same keep their lead but for the fixed share: as much of it for 60 labels as for 600 in tens."""
    e, m = ensemble(2, eta=1 / overlap, share=0.01, instruments=1), 60 * overlap
    e.weights[:] = [0.9, 0.1]
    learned = e.new_state(1024)
    rows = [(0, c, h, 3.0, (c + 1) * 10) for c in range(m) for h in range(H)]
    same = np.full((m, 2, H, 3), 1 / 3)
    decide(e, learned, same, np.ones((m, 2, H)), np.zeros(m, np.int64), np.zeros(m, np.int64), rows, 1024)
    lead = learned.weights[0, :, 0] - learned.weights[0, :, 1]
    assert np.allclose(lead, 0.8 * (1 - 0.01 / overlap) ** m) and lead == pytest.approx(0.8 * np.exp(-0.6), rel=0.005)


def test_a_member_begins_with_hardly_any_weight_where_it_has_proven_nothing():
    class Told:
        name = "b"
        proven = np.array([True, False, True, False])

    e = Ensemble.even(("a", "b", "c"), np.ones((1, H)), np.ones(H), members=[Told()])
    assert np.allclose(e.weights[:, ::2], 1 / 3) and np.allclose(e.weights[:, 1::2], np.array([1, 0.01, 1]) / 2.01)
    Told.proven = np.zeros(H, np.bool_)
    alone = Ensemble.even(("b",), np.ones((1, H)), np.ones(H), members=[Told()])
    assert (alone.weights == 1).all(), "where nobody has, all are heard alike"


def test_a_sleeping_member_neither_counts_nor_pays():
    votes, sizes, inst, regimes, _, rows = episode(5, sleeping=0.0)
    votes[:, 3] = np.nan
    e = ensemble(share=0.01)
    learned = e.new_state()
    proba = decide(e, learned, votes, sizes, regimes, inst, rows)[0]
    assert np.allclose(learned.weights[:, :, 3], 1 / N)
    rest = ensemble(4, share=0.01)
    others = decide(rest, rest.new_state(), np.delete(votes, 3, axis=1), np.delete(sizes, 3, axis=1), regimes, inst, rows)[0]
    assert np.allclose(proba, others)


def test_an_outcome_counts_only_from_the_decision_at_which_it_is_known():
    votes, sizes, inst, regimes, _, rows = episode(6)
    e = ensemble()
    base = decide(e, e.new_state(), votes, sizes, regimes, inst, rows)[0]
    late = [r if r[4] <= 300 else (*r[:3], -r[3], r[4]) for r in rows]
    other = decide(e, e.new_state(), votes, sizes, regimes, inst, late)[0]
    assert np.array_equal(base[:31], other[:31], equal_nan=True)
    assert not np.array_equal(base[31:], other[31:], equal_nan=True)


def test_votes_given_in_sample_teach_nothing():
    votes, sizes, inst, regimes, _, rows = episode(7)
    e = ensemble()
    learned = e.new_state()
    decide(e, learned, votes, sizes, regimes, inst, rows, since=10_000)
    assert np.array_equal(learned.weights, e.weights) and not learned.rounds.any()


def one(e, per_member, mid=100.0):
    votes = np.array(per_member, float)[None, :, None, :].repeat(H, axis=2)
    learned = e.new_state()
    zero = np.zeros(1, np.int64)
    return decide(e, learned, votes, np.ones((1, len(per_member), H)), zero, zero, [], mid=np.array([mid]))


UP, DOWN, FLAT, SLEEPS = [0.2, 0.2, 0.6], [0.6, 0.2, 0.2], [0.34, 0.33, 0.33], [np.nan] * 3


@pytest.mark.parametrize(
    ("votes", "direction"),
    [
        ([UP, UP, UP, FLAT, FLAT], 1), ([UP, UP, FLAT, FLAT, FLAT], 0), ([UP, UP, UP, DOWN, DOWN], 1), ([DOWN] * 5, -1),
        ([UP, UP, SLEEPS, SLEEPS, FLAT], 1), ([UP, SLEEPS, SLEEPS, SLEEPS, FLAT], 1), ([UP, DOWN, SLEEPS, SLEEPS, SLEEPS], 0),
        ([UP, SLEEPS, SLEEPS, SLEEPS, SLEEPS], 1), ([SLEEPS] * 5, 0), ([UP, FLAT, FLAT, SLEEPS, SLEEPS], 0),
    ],
)  # fmt: skip
def test_three_of_five_have_to_agree_and_fewer_where_fewer_are_there(votes, direction):
    assert (one(ensemble(), votes)[3] == direction).all()


def test_without_confidence_or_without_a_two_sided_book_it_abstains():
    assert (one(ensemble(confident=0.59), [UP] * 5)[3] == 1).all()
    assert (one(ensemble(confident=0.61), [UP] * 5)[3] == 0).all()
    assert (one(ensemble(), [UP] * 5, mid=np.nan)[3] == 0).all()
    _, magnitude, confidence, _ = one(ensemble(), [SLEEPS] * 5)
    assert np.isnan(confidence).all() and np.isnan(magnitude).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1_000), cuts=st.lists(st.integers(0, 60), max_size=5))
def test_any_cut_gives_the_same_decisions(seed, cuts):
    votes, sizes, inst, regimes, _, rows = episode(seed)
    e = ensemble()
    e.pool = pool_of(seed)
    a, b = e.new_state(64), e.new_state(2)
    whole, pieces = decide(e, a, votes, sizes, regimes, inst, rows), []
    edges = [0, *sorted(cuts), 60]
    for n, (x, y) in enumerate(itertools.pairwise(edges)):
        last = n == len(edges) - 2
        now = [r for r in rows if x * 10 < r[4] <= (y - 1) * 10 or (r[4] == x * 10 and y > x) or (last and r[4] > (y - 1) * 10)]
        mine = [(k, s, h, v, at - x * 10) for k, s, h, v, at in now]
        rows = [r for r in rows if r not in now]
        pieces.append(decide_at(e, b, votes, sizes, regimes, inst, mine, x, y))
    for i in range(4):
        assert np.array_equal(whole[i], np.concatenate([p[i] for p in pieces]), equal_nan=True)
    assert np.array_equal(a.weights, b.weights) and np.array_equal(a.between, b.between) and np.ptp(a.between) > 0


def decide_at(e, learned, votes, sizes, regimes, inst, rows, x, y):
    room = 2 if y <= 2 else 64
    mid, closes = np.full(y - x, 100.0), np.arange(y - x) * 10
    return e.decide(np.arange(x, y), inst[x:y], mid, closes, votes[x:y].copy(), sizes[x:y], regimes[x:y], outcomes(rows), room, learned)


def test_learning_rates_count_overlapping_labels_once():
    ts = np.arange(1_000) * 100_000_000  # ten decisions a second
    ts[500:] += 10**15  # a night between
    horizons = (50_000_000, 1_000_000_000, 10_000_000_000)
    eta = learning_rates(ts, np.zeros(1_000, np.int64), horizons)
    assert eta == pytest.approx([1.0, 0.1, 0.01], rel=0.12)
    assert learning_rates(ts[::4], np.zeros(250, np.int64), horizons, 4)[1:] == pytest.approx([0.1, 0.01], rel=0.25)
    assert learning_rates(NONE, NONE, (1,)).tolist() == [1.0]


def test_trust_is_what_the_past_bears_out_and_no_more():
    rng = np.random.default_rng(3)
    expected = rng.normal(size=4_000)
    true = expected + rng.normal(scale=2.0, size=4_000)
    slope = np.polynomial.polynomial.polyfit(expected, true, [1])[1]
    error = np.sqrt(np.mean((true - slope * expected) ** 2) / (expected @ expected))
    assert trust_in(expected, true, 4_000) == pytest.approx(slope - error, abs=1e-9)
    assert trust_in(expected, true, 40) == pytest.approx(slope - 10 * error, abs=1e-9), "overlapping labels are worth fewer"
    assert trust_in(3 * expected, true, 4_000) == pytest.approx((slope - error) / 3, abs=1e-9), "boasting is discounted"
    assert trust_in(expected, -true, 4_000) == trust_in(expected, true, 1) == trust_in(0 * expected, true, 4_000) == 0.0
    assert trust_in(expected, 5 * true, 4_000) == 1.0
    gaps = np.where(rng.random(4_000) < 0.5, np.nan, true)
    assert 0 < trust_in(expected, gaps, 4_000) < trust_in(expected, true, 4_000) + 0.1


def test_a_horizon_that_is_not_trusted_expects_no_move():
    e = ensemble()
    e.trust = np.array([0.0, 0.5, 1.0, 1.0])
    plain = one(ensemble(), [UP] * 5)[1]
    np.testing.assert_array_equal(one(e, [UP] * 5)[1], plain * e.trust)


def test_the_confidence_threshold_keeps_the_decisions_that_paid():
    rng = np.random.default_rng(0)
    n = 20_000
    up = rng.uniform(0.35, 0.95, n)
    proba = np.stack([(1 - up) / 2, (1 - up) / 2, up], 1)
    move = np.where(up > 0.8, 3.0, 0.0) + rng.normal(size=n)
    threshold = confidence_threshold(proba, move, np.ones(n), 0.005)
    assert threshold == pytest.approx(0.8, abs=0.02)
    hopeless = confidence_threshold(proba, rng.normal(size=n), np.full(n, 5.0), 0.005)
    assert (up >= hopeless).mean() >= 0.005 and (up >= hopeless).mean() < 0.02
    assert confidence_threshold(proba[:0], move[:0], move[:0], 0.005) == 1.0


P = np.array([[0.2, 0.2, 0.6], [0.1, 0.1, 0.8], [0.3, 0.4, 0.3], [0.5, 0.3, 0.2]])


def test_a_recommendation_takes_the_horizon_that_gains_most():
    r = recommend(P, np.array([2.0, 10.0, 50.0, 5.0]), np.array([1, 1, 0, -1], np.int8), 0, spread=1.0)
    assert (r.direction, r.horizon, r.magnitude) == (1, 1, 10.0)
    assert r.target == pytest.approx(10 / 0.9) and r.stop == 10.0
    assert r.risk_reward == pytest.approx((10 / 0.9 - 1) / 11)
    p, risk, reward = 0.8 / 0.9, 11.0, 10 / 0.9 - 1
    assert r.size == pytest.approx(0.5 * (p - (1 - p) * risk / reward))


def test_a_move_that_does_not_pay_for_its_cost_is_not_recommended():
    r = recommend(P, np.full(4, 1.0), np.array([1, 1, 0, -1], np.int8), 0, spread=1.0, cost=0.5)
    assert r.direction == 0 and r.size == 0 and "pay" in r.reason
    assert recommend(P, np.full(4, 1.0), np.zeros(4, np.int8), 0, 1.0).reason == "no direction"


def test_the_regime_scales_the_position():
    sizes = [recommend(P, np.full(4, 10.0), np.array([0, 1, 0, 0], np.int8), r, 1.0).size for r in range(R)]
    assert np.allclose(sizes, sizes[0] * np.array(POSITION))
    assert recommend(P, np.full(4, 10.0), np.array([0, 1, 0, 0], np.int8), R - 1, 1.0).direction == 0
    assert recommend(P, np.full(4, 10.0), np.array([0, 1, 0, 0], np.int8), -1, 1.0).size == pytest.approx(sizes[0])


def test_saved_and_loaded_unchanged(tmp_path):
    e = ensemble(eta=0.25, confident=0.4, agree=0.5)
    e.weights = np.random.default_rng(0).dirichlet(np.ones(N), (R + 1, H))
    e.save(tmp_path)
    assert Ensemble.load(tmp_path).pool is None
    e.pool, e.between = pool_of(0), np.random.default_rng(1).dirichlet(np.ones(3), (R + 1, H))
    e.save(tmp_path)
    again = Ensemble.load(tmp_path)
    assert again.names == e.names and again.config == e.config
    assert again.pool is not None and all(np.array_equal(a, b) for a, b in zip(again.pool, e.pool))
    for name in ("threshold", "weights", "confident", "eta", "needs", "between"):
        assert np.array_equal(getattr(again, name), getattr(e, name))


def test_members_are_found_by_name_and_a_wrong_path_says_what_is_missing():
    assert list(MEMBERS) == ["hawkes", "transformer", "hmm", "gnn", "fusion"]
    assert {"hmm", "fusion"} <= set(available())
    assert member_class("cift_models.fusion:Fusion").name == "fusion"
    with pytest.raises(InputError, match=r"package\.module:Class"):
        member_class("cift_models.nothing:Member")
    with pytest.raises(InputError, match="lacks name, gatherer"):
        member_class("collections:OrderedDict")
