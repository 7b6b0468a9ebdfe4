"""The check-list: every member that is there against every check. One that cannot learn from so little says so and is passed over."""

from __future__ import annotations

import itertools
import sys
from functools import lru_cache

import numpy as np
import pytest
from test_inference import INSTRUMENTS, join, pieces, quotes, source

from catalog.errors import InputError
from catalog.events import F_LAST, TRADE
from cift_models.ensemble import available, member_class
from cift_models.features import NAMES
from cift_models.inference import stream
from cift_models.labels import H, Split
from cift_models.train import gather, study
from cift_models.windows import Block

UPDATES, CAP = 5_000, 1_500
GATED = ("gnn",)  # abstains at every horizon where it does not beat LASSO out of sample, as it may on so little data
QUICK = {"transformer": {"epochs": 2}, "gnn": {"steps": 120}}  # how well they learn is their own tests' affair


def market(seed, updates=UPDATES) -> np.ndarray:
    """The planted quotes, slower, and a trade after every third of them on the side that the larger queue is on."""
    e = quotes(seed, updates, gap_ms=110.0)
    trades = e[5::6].copy()
    bid, ask = e[4::6]["size"], trades["size"]
    trades["action"], trades["flags"] = TRADE, F_LAST
    trades["side"] = np.where(bid[: len(trades)] > ask, 1, -1)
    trades["ts_event"] = trades["ts_init"] = trades["ts_init"] + 1_000_000
    both = np.concatenate([e, trades])
    return both[np.argsort(both["ts_init"], kind="stable")]


@lru_cache(maxsize=1)
def gathered():
    return gather(source(market(0)), available(), CAP)


def learn(name, alone=False, one_class=False, seed=0):
    """The member fitted on a small planted market, or as much of one as is asked for."""
    cls = member_class(available()[name])
    if alone:
        events = market(0)
        events = events[events["instrument"] == 0]
        found = gather(lambda: (INSTRUMENTS[:1], iter([events])), {name: available()[name]}, CAP)
    else:
        found = gathered()
    ts = found.table.ts
    split = Split(int(ts[0]), int(ts[len(ts) * 6 // 10]), int(ts[len(ts) * 8 // 10]), int(ts[-1]) + 1)
    what, _ = study(found, split, seed)
    if one_class:
        what = what._replace(table=what.table._replace(move=np.where(np.isfinite(what.table.move), 0.0, np.nan)))
    if name not in QUICK:
        return cls.fit(what, found.own[name])
    return cls.fit(what, found.own[name], sys.modules[cls.__module__].Config(**QUICK[name]))


@lru_cache(maxsize=8)
def fitted(name):
    return learn(name)


def member(name, **how):
    try:
        return learn(name, **how) if how else fitted(name)
    except InputError as e:
        pytest.skip(f"{name} is left out: {e}")


@lru_cache(maxsize=1)
def unseen() -> Block:
    return next(pieces(join(list(stream(INSTRUMENTS, source(market(1, 1_500))()[1]))), [3_000]))


def votes(m, parts):
    state, got = m.new_state(), []
    for p in parts:
        v = m.predict(p, state)
        got.append((np.array(v.proba), np.array(v.magnitude)))
    proba, magnitude = (np.concatenate(f) for f in zip(*got))
    assert proba.shape == (*magnitude.shape, 3) and magnitude.shape[1] == H
    return proba, magnitude


def equal(a, b):
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b))


def sound(proba, magnitude):
    """Probabilities that sum to 1, or NaN throughout; sizes that are not negative, or NaN."""
    known = np.isfinite(proba).all(axis=2)
    assert (np.isnan(proba).all(axis=2) | known).all()
    assert np.allclose(proba[known].sum(axis=1), 1, atol=1e-6) and (proba[known] >= 0).all()
    assert ((magnitude >= 0) | np.isnan(magnitude)).all() and not np.isinf(magnitude).any()
    return known


def votes_are_probabilities(name, tmp_path):
    known = sound(*votes(member(name), [unseen()]))
    shut = name in GATED and not member(name).votes.any()
    assert known.any() != shut, "it has something to say, unless it has not earned a vote at any horizon"


def deterministic_for_a_seed(name, tmp_path):
    first = votes(member(name), [unseen()])
    assert equal(first, votes(learn(name), [unseen()])) and equal(first, votes(member(name), [unseen()]))


def pieces_equal_the_whole(name, tmp_path):
    m, block = member(name), unseen()
    whole = votes(m, [block])
    rng = np.random.default_rng(5)
    assert equal(whole, votes(m, pieces(block, rng.integers(0, len(block.events), 12))))
    few = next(pieces(block, [1_200]))
    assert equal([f[: len(few.closes)] for f in whole], votes(m, pieces(few, few.closes + 1))), "batch by batch, as live"


def what_is_not_asked_changes_no_vote(name, tmp_path):
    m, block = member(name), unseen()
    asked = np.random.default_rng(7).random(len(block.closes)) < 0.2
    whole, some = votes(m, [block]), block._replace(closes=block.closes[asked], batches=block.closes)
    assert equal([f[asked] for f in whole], votes(m, [some]))


def the_future_changes_no_past_vote(name, tmp_path):
    m, block = member(name), unseen()
    cut = len(block.events) // 2
    events, rows = block.events.copy(), block.rows.copy()
    rows[cut:] = np.roll(rows[cut:], 5, axis=0) * 1.5
    events["size"][cut:], events["price"][cut:] = events["size"][cut:][::-1], events["price"][cut:][::-1]
    past = block.closes < cut
    a, b = votes(m, [block]), votes(m, [Block(events, rows, block.closes)])
    assert equal([f[past] for f in a], [f[past] for f in b])


def nan_and_infinite_rows_are_survived(name, tmp_path):
    m, block, rng = member(name), unseen(), np.random.default_rng(6)
    for fill, share in ((np.nan, 0.2), (np.inf, 0.2), (-np.inf, 0.2), (np.nan, 1.0), (1e300, 0.1)):
        rows = block.rows.copy()
        rows[rng.random(rows.shape) < share] = fill
        with np.errstate(all="ignore"):
            sound(*votes(m, [block._replace(rows=rows)]))


def saved_and_loaded_it_votes_the_same(name, tmp_path):
    m = member(name)
    m.save(tmp_path)
    files = sorted(f.name for f in tmp_path.iterdir())
    assert files and all(f.startswith(name) and not f.endswith((".pkl", ".pt", ".pickle")) for f in files)
    assert equal(votes(m, [unseen()]), votes(type(m).load(tmp_path, NAMES), [unseen()]))


def the_block_is_left_as_it_was(name, tmp_path):
    m, block = member(name), unseen()
    events, rows, closes = (a.copy() for a in block[:3])
    votes(m, [block])
    assert events.tobytes() == block.events.tobytes() and rows.tobytes() == block.rows.tobytes() and np.array_equal(closes, block.closes)


def an_empty_block_changes_nothing(name, tmp_path):
    m, block = member(name), unseen()
    empty = Block(block.events[:0], block.rows[:0], np.empty(0, np.int64))
    parts = list(pieces(block, [1_000]))
    assert equal(votes(m, parts), votes(m, [empty, parts[0], empty, parts[1]]))


def one_class_alone_is_no_accident(name, tmp_path):
    sound(*votes(member(name, one_class=True), [unseen()]))


def one_instrument_alone_works(name, tmp_path):
    m = member(name, alone=True)
    block = unseen()
    mine = np.flatnonzero(block.events["instrument"] == 0)
    closes = np.flatnonzero(np.isin(mine, block.closes))
    sound(*votes(m, [Block(block.events[mine], block.rows[mine], closes)]))


CHECKS = [
    votes_are_probabilities, deterministic_for_a_seed, pieces_equal_the_whole, what_is_not_asked_changes_no_vote,
    the_future_changes_no_past_vote, nan_and_infinite_rows_are_survived, saved_and_loaded_it_votes_the_same,
    the_block_is_left_as_it_was, an_empty_block_changes_nothing, one_class_alone_is_no_accident, one_instrument_alone_works,
]  # fmt: skip


@pytest.mark.parametrize(("name", "check"), list(itertools.product(available(), CHECKS)), ids=lambda v: getattr(v, "__name__", v))
def test_member(name, check, tmp_path):
    check(name, tmp_path)
