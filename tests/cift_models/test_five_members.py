"""All five members together, on a planted market and on the Binance recording: one code for history and live, faults of one at a time,
and other models put in their place."""

from __future__ import annotations

import copy
import logging
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from test_ensemble import pool_of
from test_inference import INSTRUMENTS, pieces, run, same
from test_members import QUICK, fitted, unseen

from catalog.events import SCALE, read_catalog
from cift_models import artifacts
from cift_models.ensemble import MEMBERS, Ensemble, R, member_class
from cift_models.features import NAMES
from cift_models.inference import DEFAULT_LATENCY, Engine, stream
from cift_models.labels import H, walk_forward
from cift_models.pooling import Pool
from cift_models.train import gather, study
from cift_models.windows import HORIZONS_NS, Block, Votes

FIVE = tuple(MEMBERS)


def speaking(members):
    """The graph votes although it has not earned it on so little data: here the machinery is tested, not the skill."""
    members = [copy.copy(m) for m in members]  # the other tests' graph goes on abstaining
    for m in members:
        if m.name == "gnn":
            m.votes = np.ones_like(m.votes)
    return members


def ensemble(instruments: int, names=FIVE) -> Ensemble:
    """One with a pool that gives each member a weight of its own."""
    pool = pool_of(0, len(names), instruments)
    return Ensemble(names, np.full((instruments, H), 0.3), np.full((R + 1, H, len(names)), 0.2), np.zeros(H), np.full(H, 0.05), pool=pool)


def planted():
    return list(INSTRUMENTS), speaking([fitted(n) for n in FIVE]), unseen()


@lru_cache(maxsize=1)
def recorded(root: Path):
    """Fitted in haste on the first 80 s of the Binance recording; the block is what comes after."""
    instruments = read_catalog(root)[0]
    first = int(next(iter(read_catalog(root)[1]))["ts_init"][0])
    found = gather(lambda: (instruments, read_catalog(root, None, None, first + 80 * SCALE)[1]), MEMBERS, 8_000)
    (split,) = walk_forward(found.table.ts, 1, (0.6, 0.2, 0.2))
    what, _ = study(found, split, 0)
    members = []
    for name, path in MEMBERS.items():
        cls = member_class(path)
        quick = {**QUICK, "hmm": {"min_seconds": 100}}
        config = [sys.modules[cls.__module__].Config(**quick[name])] if name in quick else []
        members.append(cls.fit(what, found.own[name], *config))
    parts = list(stream(instruments, read_catalog(root, None, first + 80 * SCALE, first + 84 * SCALE)[1]))
    return instruments, speaking(members), parts[0]


@pytest.fixture(params=["planted", "recorded"])
def market(request):
    """(instruments, the five members, a block that none was fitted on)."""
    if request.param == "planted":
        return planted()
    return recorded(request.getfixturevalue("data") / "catalogs" / "binance-2024-08-08")


def engine_of(instruments, members, **more) -> Engine:
    return Engine(instruments, [i.id for i in instruments], NAMES, members, ensemble(len(instruments)), **more)


def test_all_five_vote_and_history_in_one_block_decides_as_live_batches_do(market):
    """Batch by batch as live; several batches of several instruments in a block, as when serving is behind; one event at a time."""
    instruments, members, block = market
    engine = engine_of(instruments, members)
    whole = run(engine, [block])
    voted = np.isfinite(whole[7][:, :, 0, 0]).mean(axis=0)
    assert len(whole[0]) > 60 and (voted > 0.5).all() and (whole[5] != 0).any()
    learnt = engine.learned.weights.copy(), engine.learned.between.copy()
    rng = np.random.default_rng(0)
    some = block.closes[np.sort(rng.choice(len(block.closes), len(block.closes) // 4, replace=False))] + 1
    for cuts in (block.closes + 1, some, rng.integers(0, len(block.events), 30), np.arange(min(500, len(block.events)))):
        engine.reset()
        assert same(whole, run(engine, pieces(block, cuts)))
        assert np.array_equal(learnt[0], engine.learned.weights) and np.array_equal(learnt[1], engine.learned.between)
    assert len({tuple(p.events["instrument"][p.closes]) for p in pieces(block, some)} - {()}) > 3


def broken(member, how: str, clock: list[int]):
    """The member with its `predict` spoilt, everything else its own."""

    class Broken(type(member)):
        def predict(self, block: Block, state) -> Votes:
            votes = super().predict(block, state)
            if how == "raises":
                raise RuntimeError("gone")
            if how == "is late":
                clock[0] += 3_000_000 * max(1, len(block.closes))
            if how == "NaN":
                votes.proba[:, :, 0] = np.nan
                votes.proba[:, :, 1:] = 0.5
            return votes

    spoilt = object.__new__(Broken)
    spoilt.__dict__.update(member.__dict__)
    return spoilt


@pytest.mark.parametrize("how", ["raises", "NaN", "is late"])
@pytest.mark.parametrize("name", FIVE)
def test_each_of_the_five_may_fail_and_the_other_four_decide(name, how, monkeypatch, caplog):
    instruments, members, block = planted()
    clock = [0]
    monkeypatch.setattr("cift_models.inference.time.perf_counter_ns", lambda: clock[0])
    parts = list(pieces(block, block.closes[[40, 41, 80]] + 1))[:3]
    rest = engine_of(instruments, [m for m in members if m.name != name])
    want = run(rest, parts)
    with caplog.at_level(logging.WARNING):
        engine = engine_of(instruments, [broken(m, how, clock) if m.name == name else m for m in members], budget_ns=2_000_000)
        got = run(engine, parts)
    assert np.isnan(got[7][:, FIVE.index(name)]).all() and len(got[0]) == len(want[0])
    if (name, how) == ("hmm", "NaN"):  # it still tells of regimes
        assert np.isfinite(got[2][..., 0]).any() and (got[6] >= 0).any()
    else:
        assert same(got, want)
    counted = engine.late if how == "is late" else engine.failures
    assert counted[name] >= len(got[0]) and not any(v for k, v in (engine.late | engine.failures).items() if k != name)
    assert len([r for r in caplog.records if f"{name} abstains" in r.getMessage()]) == 1


def saved(out: Path, members, pool: Pool | None) -> Path:
    """An artifact of these members."""
    e = ensemble(len(INSTRUMENTS))
    e.pool = pool
    manifest = {
        "features": list(NAMES), "instruments": [i.id for i in INSTRUMENTS], "horizons_ns": list(HORIZONS_NS), "seed": 0,
        "members": dict(MEMBERS), "latency": dict(zip(("source", "q", "ns"), DEFAULT_LATENCY)), "folds": [],
        "range": {"start": 0, "end": 0, "decisions": 0},
    }  # fmt: skip

    def save(folder: Path) -> None:
        for m in members:
            m.save(folder)
        e.save(folder)

    return artifacts.write(out, manifest, save).path


def test_all_five_are_swapped_between_two_batches_and_none_is_lost(tmp_path):
    _, members, block = planted()
    one, two = saved(tmp_path / "one", members, pool_of(0, 5)), saved(tmp_path / "two", members, pool_of(7, 5))
    parts = list(pieces(block, block.closes[[50, 120]] + 1))
    engine, same_again = Engine.load(one, INSTRUMENTS), Engine.load(one, INSTRUMENTS)
    whole = [same_again.predict(p) for p in parts]
    first = engine.predict(parts[0])
    assert engine.swap(one) == dict.fromkeys(FIVE, "kept")
    second = engine.predict(parts[1])
    assert same(second.votes, whole[1].votes) and len(first.ts) + len(second.ts) == len(whole[0].ts) + len(whole[1].ts)
    assert engine.swap(two) == dict.fromkeys(FIVE, "kept")
    third = engine.predict(parts[2])
    assert same(third.votes, whole[2].votes), "the members are the same, and so are their memories"
    assert not np.array_equal(third.proba, whole[2].proba, equal_nan=True), "the pool is another"
