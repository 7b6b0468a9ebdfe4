"""The engine: however the stream is cut, the same decisions; a member that fails abstains and the rest decide."""

from __future__ import annotations

import itertools
import logging
import shutil
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from catalog.errors import InputError
from catalog.events import ADD, EVENT, F_LAST, F_TOB, SCALE, Instrument
from cift_models.ensemble import MEMBERS, Ensemble
from cift_models.features import NAMES
from cift_models.inference import DEFAULT_LATENCY, Engine, measure_latency, stream
from cift_models.labels import DOWN, FLAT, UP, H
from cift_models.train import Config, train
from cift_models.windows import Block, Votes

TICK = SCALE // 100
START = 1_709_303_400 * SCALE
INSTRUMENTS = [Instrument(f"{k}.X", TICK, SCALE, 1.0, "USD", kind="equity", level=1) for k in "AB"]


def quotes(seed: int = 0, updates: int = 20_000, signal: float = 1.0, gap_ms: float = 25.0) -> np.ndarray:
    """A level-1 stream of two instruments. The mid goes to the side of the larger queue while the spread is narrow, away from it
    while it is wide; with `signal` 0 it is a null market."""
    rng = np.random.default_rng(seed)
    ts = START + np.cumsum(rng.exponential(gap_ms * 1e6, updates)).astype(np.int64)
    inst = rng.integers(0, 2, updates)
    e = np.zeros(2 * updates, EVENT)
    for k in range(2):
        mine = np.flatnonzero(inst == k)
        drive = np.repeat(rng.normal(size=len(mine) // 12 + 1), 12)[: len(mine)]
        wide = np.repeat(rng.random(len(mine) // 40 + 1) < 0.5, 40)[: len(mine)]
        busy = np.repeat(rng.random(len(mine) // 600 + 1) < 0.5, 600)[: len(mine)]
        up = 1 / (1 + np.exp(-3 * signal * drive * np.where(wide, -1, 1)))
        step = np.where(rng.random(len(mine)) < np.where(busy, 0.4, 0.15), np.where(rng.random(len(mine)) < up, 1, -1), 0)
        price = (10_000 + 500 * k + np.concatenate([[0], np.cumsum(step)[:-1]])) * TICK
        tilt = np.clip(0.5 + 0.2 * drive + 0.1 * rng.normal(size=len(mine)), 0.05, 0.95)
        for side, at in ((1, 2 * mine), (-1, 2 * mine + 1)):
            e["ts_event"][at] = e["ts_init"][at] = ts[mine]
            e["price"][at] = price - side * TICK * (1 + wide)
            e["size"][at] = (1 + np.round(100 * (tilt if side == 1 else 1 - tilt))).astype(np.int64) * SCALE
            e["side"][at], e["action"][at], e["instrument"][at] = side, ADD, k
            e["flags"][at] = F_TOB | (F_LAST if side == -1 else 0)
    return e


def source(events):
    return lambda: (INSTRUMENTS, iter(np.array_split(events, max(1, len(events) // 9_000))))


@lru_cache(maxsize=4)
def blocks(seed: int = 1, updates: int = 6_000) -> tuple[Block, ...]:
    return tuple(stream(INSTRUMENTS, source(quotes(seed, updates))()[1]))


def join(parts) -> Block:
    start = np.cumsum([0, *(len(p.events) for p in parts)])
    closes = np.concatenate([p.closes + s for p, s in zip(parts, start)])
    return Block(np.concatenate([p.events for p in parts]), np.concatenate([p.rows for p in parts]), closes)


def pieces(block: Block, cuts):
    edges = sorted({0, *map(int, cuts), len(block.events)})
    for a, b in itertools.pairwise(edges):
        inside = (block.closes >= a) & (block.closes < b)
        yield Block(block.events[a:b], block.rows[a:b], block.closes[inside] - a)


def run(engine, parts):
    return [np.concatenate(f) for f in zip(*(engine.predict(p) for p in parts))]


def same(a, b):
    return all(x is y if x is None else np.array_equal(x, y, equal_nan=x.dtype.kind == "f") for x, y in zip(a, b))


TRAINED: list[Path] = []  # once for all test modules that import the fixture


@pytest.fixture(scope="session")
def artifact(tmp_path_factory) -> Path:
    """Trained on the planted market."""
    if not TRAINED:
        out = tmp_path_factory.mktemp("models") / "artifact"
        TRAINED.append(train(source(quotes()), out=out, members=["hmm", "fusion"], config=Config(cap=20_000)))
    return TRAINED[0]


@pytest.fixture
def engine(artifact):
    e = Engine.load(artifact, INSTRUMENTS)
    e._learn_from = 0
    return e


@pytest.mark.parametrize("seed", range(3))
def test_cut_anywhere_the_decisions_are_the_same_to_the_last_bit(engine, seed):
    whole = join(blocks())
    rng = np.random.default_rng(seed)
    first = run(engine, [whole])
    weights = engine.learned.weights.copy()
    assert (first[5] != 0).any() and np.isfinite(first[2]).any()
    engine.reset()
    cuts = rng.integers(0, len(whole.events), 30)
    assert same(first, run(engine, pieces(whole, cuts))) and np.array_equal(weights, engine.learned.weights)


def test_batch_by_batch_as_live_the_decisions_are_those_of_the_block(engine):
    whole = next(pieces(join(blocks()), [4_000]))
    first = run(engine, [whole])
    engine.reset()
    assert same(first, run(engine, pieces(whole, whole.closes + 1)))


def test_the_weights_learn_along_the_stream_and_the_account_is_exported(engine):
    run(engine, blocks())
    account = engine.regret()
    assert np.array(account["rounds"]).sum() > 1_000
    assert (np.array(account["regret"]) <= np.array(account["bound"]) + 1e-9).all()
    assert not np.array_equal(engine.learned.weights, engine.ensemble.weights)


def test_decisions_of_the_training_range_teach_nothing(artifact):
    engine = Engine.load(artifact, INSTRUMENTS)
    run(engine, stream(INSTRUMENTS, source(quotes())()[1]))
    assert not engine.learned.rounds.any()


def test_no_outcome_is_taken_across_a_halt_that_is_told_as_it_happens(artifact):
    """A halt after the first block: what is learnt of either side is what an engine learns that knew of the halt beforehand."""
    whole = join(blocks())
    middle = len(whole.events) // 2
    parts = list(pieces(whole, [middle]))
    stamps = parts[0].events["ts_init"][-1] + 1, whole.events["ts_init"][middle] + 5 * 10**9
    known = [replace(i, pauses=((int(stamps[0]), int(stamps[1])),)) for i in INSTRUMENTS]
    told, before, never = (Engine.load(artifact, x) for x in (INSTRUMENTS, known, INSTRUMENTS))
    for e in (told, before, never):
        e._learn_from = 0
    first = told.predict(parts[0])
    for k in range(len(INSTRUMENTS)):
        told.trading(k, int(stamps[0]), False)
        told.trading(k, int(stamps[1]), True)
    got = [np.concatenate(f) for f in zip(first, told.predict(parts[1]))]
    assert same(got, run(before, parts)) and np.array_equal(told.learned.weights, before.learned.weights)
    run(never, parts)
    assert not np.array_equal(told.learned.weights, never.learned.weights)


def test_the_future_changes_no_past_decision(engine):
    whole = join(blocks())
    cut = len(whole.events) // 2
    other = whole.rows.copy()
    other[cut:] = np.roll(other[cut:], 7, axis=0)
    past = whole.closes < cut
    a = run(engine, [whole])
    engine.reset()
    b = run(engine, [whole._replace(rows=other)])
    assert same([f[past] for f in a], [f[past] for f in b]) and not same(a, b)


def test_a_stream_resumed_from_its_saved_state_goes_on_unchanged(engine):
    parts = list(pieces(join(blocks()), [3_000, 6_000]))
    engine.predict(parts[0])
    saved = engine.state()
    first = run(engine, parts[1:])
    engine.resume(saved)
    assert same(first, run(engine, parts[1:]))


class Failing:
    """A member that breaks in a way of its own after some blocks."""

    name = "breaks"

    def __init__(self, how: str) -> None:
        self.how = how

    def new_state(self):
        return None

    def predict(self, block, state):
        m = len(block.closes)
        votes = Votes(np.tile([0.2, 0.3, 0.5], (m, H, 1)), np.ones((m, H)))
        if self.how == "raises":
            raise RuntimeError("out of memory")
        if self.how == "shape":
            return Votes(votes.proba[:, :1], votes.magnitude)
        votes.proba[:, 0] = WRONG[self.how]
        return votes


WRONG = {"NaN": [np.nan, 0.5, 0.5], "infinite": [np.inf, 0, 0], "sum": [0.5, 0.5, 0.5], "negative": [-0.5, 0.5, 1.0], "abstains": np.nan}


def engine_of(members, **more):
    names = (*MEMBERS, *(m.name for m in members if m.name not in MEMBERS))
    ensemble = Ensemble.even(names, np.full((2, H), 0.25), np.full(H, 0.01))
    return Engine(INSTRUMENTS, ["A.X", "B.X"], NAMES, members, ensemble, **more)


@pytest.mark.parametrize("how", ["raises", "shape", "NaN", "infinite", "sum", "negative"])
def test_a_member_that_fails_abstains_is_counted_and_logged_once(engine, how, caplog):
    good = [m for _, m in engine._present]
    with caplog.at_level(logging.WARNING):
        broken, sound = engine_of([*good, Failing(how)]), engine_of(good)
        a, b = run(broken, blocks()), run(sound, blocks())
    assert broken.failures["breaks"] >= len(a[0]) and broken.failures["fusion"] == 0
    assert len([r for r in caplog.records if "breaks abstains" in r.message]) == 1
    first = slice(None) if how in ("raises", "shape") else slice(0, 1)
    assert np.allclose(a[2][:, first], b[2][:, first], atol=1e-12, equal_nan=True), "the rest decide as if it were not there"


def test_an_abstention_is_no_failure():
    engine = engine_of([Failing("abstains")])
    got = run(engine, blocks())
    assert engine.failures["breaks"] == 0
    assert np.isnan(got[2][:, 0]).all() and np.isfinite(got[2][:, 1]).all()


def test_predictions_tell_instrument_time_regime_and_every_vote(engine):
    whole = join(blocks())
    p = engine.predict(whole)
    assert np.array_equal(p.ts, whole.events["ts_init"][whole.closes])
    assert np.array_equal(p.instrument, whole.events["instrument"][whole.closes])
    assert p.votes.shape == (len(p.ts), 5, H, 3) and p.votes.dtype == np.float32
    voted = np.isfinite(p.votes[:, :, 0, 0]).mean(axis=0)
    assert dict(zip(engine.members, voted > 0.5)) == {"hawkes": False, "transformer": False, "hmm": True, "gnn": False, "fusion": True}
    assert set(np.unique(p.regime)) <= set(range(-1, 5)) and (p.regime >= 0).mean() > 0.9
    ok = np.isfinite(p.proba[..., 0])
    assert np.allclose(p.proba[ok].sum(axis=1), 1)
    assert set(np.unique(p.direction)) <= {-1, 0, 1} and (DOWN, FLAT, UP) == (0, 1, 2)


def test_it_sees_what_was_planted_and_nothing_in_a_null_market(engine):
    for seed, signal, least in ((1, 1.0, 0.1), (2, 0.0, -0.15)):
        block = join(list(stream(INSTRUMENTS, source(quotes(seed, 6_000, signal))()[1])))
        engine.reset()
        p = engine.predict(block)
        lead = p.proba[:, 0, UP] - p.proba[:, 0, DOWN]
        mid, later = block.rows[block.closes, 0], np.full(len(p.ts), np.nan)
        for k in range(2):
            mine = np.flatnonzero(p.instrument == k)
            at = np.searchsorted(p.ts[mine], p.ts[mine] + SCALE // 2) - 1
            later[mine] = mid[mine][at] - mid[mine]
        ok = np.isfinite(lead) & np.isfinite(later)
        correlation = np.corrcoef(lead[ok], later[ok])[0, 1]
        assert correlation > least
        assert signal or abs(correlation) < 0.1


def test_instruments_in_another_order_or_fewer_get_the_same_predictions(artifact):
    whole = join(blocks())
    first = run(Engine.load(artifact, INSTRUMENTS), [whole])
    swapped = whole.events.copy()
    swapped["instrument"] = 1 - swapped["instrument"]
    second = run(Engine.load(artifact, INSTRUMENTS[::-1]), [whole._replace(events=swapped)])
    assert np.array_equal(second[1], 1 - first[1])
    assert same([f for i, f in enumerate(first) if i != 1], [f for i, f in enumerate(second) if i != 1])
    stranger = Instrument("C.X", TICK, SCALE, 1.0, "USD")
    with pytest.raises(InputError, match=r"not trained on C\.X"):
        Engine.load(artifact, [INSTRUMENTS[0], stranger])


def test_one_instrument_alone_works(artifact):
    events = quotes(3, 3_000)
    alone = events[events["instrument"] == 1]
    alone["instrument"] = 0
    p = run(Engine.load(artifact, INSTRUMENTS[1:]), stream(INSTRUMENTS[1:], [alone]))
    assert (p[1] == 0).all() and np.isfinite(p[2][:, 0]).mean() > 0.9


def test_a_block_without_a_close_and_an_empty_block_advance_the_stream(engine):
    whole = next(pieces(join(blocks()), [2_000]))
    first = run(engine, [whole])
    engine.reset()
    parts = [Block(whole.events[:0], whole.rows[:0], np.empty(0, np.int64)), *pieces(whole, range(0, 2_000, 1))]
    assert same(first, run(engine, parts))


def test_latency_is_a_distribution_that_repeats_and_is_measured_on_request(engine):
    assert engine.latency == DEFAULT_LATENCY
    draws = [engine.latency.at(u) for u in np.linspace(0, 1, 101)]
    assert draws == sorted(draws) and draws[0] == DEFAULT_LATENCY.ns[0] and draws[-1] == DEFAULT_LATENCY.ns[-1]
    measured = measure_latency(engine, blocks(), most=200)
    assert measured.source == "measured" and list(measured.ns) == sorted(measured.ns) and measured.ns[0] > 0


def test_recommendations_come_from_decisions(engine):
    p = engine.predict(join(blocks()))
    decided = np.flatnonzero((p.direction != 0).any(axis=1) & (p.regime != 4))
    i = decided[np.argmax(np.nanmax(p.magnitude[decided], axis=1))]
    r = engine.recommend(p, i, spread=0.0)
    assert r.direction in (-1, 0, 1) and 0 <= r.size <= 1
    assert r.direction == 0 or r.direction == p.direction[i, r.horizon]
    assert engine.recommend(p, i, spread=1e9).direction == 0


@pytest.fixture(scope="module")
def another(tmp_path_factory) -> Path:
    """Trained on a later stretch of the same market, with the same members."""
    out = tmp_path_factory.mktemp("models") / "another"
    return train(source(quotes(7)), out=out, members=["hmm", "fusion"], config=Config(cap=20_000))


def test_between_two_batches_an_artifact_takes_the_place_of_another_and_no_batch_is_lost(artifact, another):
    parts = list(pieces(join(blocks()), [3_000, 6_000]))
    engine, new = Engine.load(artifact, INSTRUMENTS), Engine.load(another, INSTRUMENTS)
    first = engine.predict(parts[0])
    under_way = engine._labeller
    assert engine.swap(another) == {"hmm": "kept", "fusion": "kept"}
    assert engine.model_version == new.model_version and engine._labeller is under_way
    second = engine.predict(parts[1])
    new.predict(parts[0])
    assert len(first.ts) + len(second.ts) == sum(len(p.closes) for p in parts[:2])
    fusion = engine.members.index("fusion")
    assert np.array_equal(second.votes[:, fusion], new.predict(parts[1]).votes[:, fusion], equal_nan=True), "the new one votes"
    hmm = engine.members.index("hmm")
    assert np.isfinite(second.votes[0, hmm, 0]).all(), "its memory of the seconds before is kept"


def test_swapping_to_the_same_artifact_changes_nothing_but_what_the_weights_have_learnt(artifact):
    parts = list(pieces(join(blocks()), [3_000, 6_000]))
    engine = Engine.load(artifact, INSTRUMENTS)
    whole = run(engine, parts)
    engine.reset()
    got = [engine.predict(parts[0])]
    engine.swap(artifact)
    got += [engine.predict(p) for p in parts[1:]]
    assert same(whole, [np.concatenate(f) for f in zip(*got)])


def test_a_damaged_or_foreign_artifact_is_refused_and_the_old_one_goes_on(artifact, another, tmp_path):
    parts = list(pieces(join(blocks()), [3_000]))
    engine, twin = Engine.load(artifact, INSTRUMENTS), Engine.load(artifact, INSTRUMENTS)
    engine.predict(parts[0])
    twin.predict(parts[0])
    bad = tmp_path / "bad"
    shutil.copytree(another, bad)
    (bad / "hmm.npz").write_bytes((bad / "hmm.npz").read_bytes()[:-1] + b"x")
    for path, said in ((bad, r"hmm\.npz was changed"), (tmp_path / "none", "is missing")):
        with pytest.raises(InputError, match=said):
            engine.swap(path)
    assert engine.model_version == twin.model_version and same(engine.predict(parts[1]), twin.predict(parts[1]))


def test_a_member_that_was_not_there_before_begins_anew(artifact, tmp_path):
    out = train(source(quotes(updates=8_000)), out=tmp_path / "one", members=["fusion"], config=Config(cap=20_000))
    engine = Engine.load(out, INSTRUMENTS)
    parts = list(pieces(join(blocks()), [3_000]))
    engine.predict(parts[0])
    assert engine.swap(artifact) == {"hmm": "fresh", "fusion": "kept"}
    assert np.isfinite(engine.predict(parts[1]).proba[:, 0]).all()


class Slow(Failing):
    """Thinks for as long as it is told, by the engine's own clock."""

    name = "slow"

    def __init__(self, clock) -> None:
        super().__init__("late")
        self.clock = clock

    def predict(self, block, state):
        self.clock[0] += 3_000_000 * len(block.closes)
        return Votes(np.tile([0.2, 0.3, 0.5], (len(block.closes), H, 1)), np.ones((len(block.closes), H)))


def test_a_member_that_is_late_abstains_is_counted_and_logged_once_and_only_where_a_budget_is_set(monkeypatch, caplog):
    clock = [0]
    monkeypatch.setattr("cift_models.inference.time.perf_counter_ns", lambda: clock[0])
    unhurried, hurried = engine_of([Slow(clock)]), engine_of([Slow(clock)], budget_ns=2_000_000)
    with caplog.at_level(logging.WARNING):
        a, b = run(unhurried, blocks()), run(hurried, blocks())
    assert np.isfinite(a[2]).all() and unhurried.late["slow"] == 0
    assert np.isnan(b[2]).all() and hurried.late["slow"] == len(b[0]) and hurried.failures["slow"] == 0
    assert len([r for r in caplog.records if "slow abstains: 3.0 ms" in r.message]) == 1
    patient = engine_of([Slow(clock)], budget_ns=3_000_000)
    assert same(run(patient, blocks()), a)
    with pytest.raises(InputError, match="positive"):
        engine_of([Slow(clock)], budget_ns=0)
