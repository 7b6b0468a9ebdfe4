"""Several sets of members along one pass of the stream: each learns and decides as if it were alone."""

from __future__ import annotations

import numpy as np
import pytest
from test_inference import INSTRUMENTS, START, blocks, join, quotes, same, source

from catalog.events import SCALE
from cift_models.ensemble import member_class
from cift_models.features import NAMES
from cift_models.labels import H, walk_forward
from cift_models.train import choose, gather, study
from cift_models.weigh import Shared, cut, weigh

EVENTS = quotes(7, 8_000, gap_ms=110.0)


@pytest.fixture(scope="module")
def fitted():
    """hmm and fusion of two seeds, fitted on the first half, and the split."""
    found = gather(source(EVENTS[:8_000]), choose(["hmm", "fusion"]), 4_000)
    split = walk_forward(found.table.ts)[0]
    what, _ = study(found, split, 0)
    members = [
        [member_class(path).fit(what._replace(seed=s), found.own[name]) for name, path in choose(["hmm", "fusion"]).items()] for s in (0, 1)
    ]
    return members, split, np.ascontiguousarray(what.thresholds.balanced[:, :H])


def run(sets, split, threshold, upto=None):
    return weigh(source(EVENTS), [i.id for i in INSTRUMENTS], NAMES, sets, split, threshold, np.full(H, 0.2), upto=upto)


def equal(a, b):
    assert a.keys() == b.keys()
    return all(np.array_equal(a[k], b[k], equal_nan=a[k].dtype.kind == "f") for k in a)


@pytest.mark.parametrize("upto", [START + 700 * SCALE, START + 10**6 * SCALE])
def test_each_set_gives_what_it_gives_alone(fitted, upto):
    (a, b), split, threshold = fitted
    sets = [a, b, a[1:], [a[0], b[1]], a]
    for together, alone in zip(run(sets, split, threshold, upto), (run([s], split, threshold, upto)[0] for s in sets)):
        assert equal(together.sample, alone.sample) and equal(together.after, alone.after)
        assert np.array_equal(together.ensemble.weights, alone.ensemble.weights)
        assert np.array_equal(together.ensemble.confident, alone.ensemble.confident) and together.regret == alone.regret
        assert len(together.after["ts"]) > 500 and (together.after["ts"] >= split.end).all() and (together.after["ts"] < upto).all()


def test_without_more_to_see_nothing_comes_after(fitted):
    (a, _), split, threshold = fitted
    (got,) = run([a], split, threshold)
    assert got.after is None and (got.sample["ts"] < split.end).all() and (got.sample["ts"] >= split.weigh).all()


def test_a_block_is_cut_between_two_events(fitted):
    block = join(blocks())
    at = int(block.events["ts_init"][4_321])
    a, b = cut(block, at)
    assert (a.events["ts_init"] < at).all() and (b.events["ts_init"] >= at).all() and len(a.closes) + len(b.closes) == len(block.closes)
    assert same(join([a, b]), block)


def test_a_shared_member_answers_once(fitted):
    (a, _), _, _ = fitted
    hmm, block = a[0], blocks()[0]
    shared = Shared(hmm)
    first = shared.predict(block, None)
    assert shared.predict(block, None) is first and np.array_equal(shared.regimes(None), hmm.regimes(shared._state), equal_nan=True)
    state = hmm.new_state()
    assert np.array_equal(first.proba, hmm.predict(block, state).proba, equal_nan=True) and not hasattr(Shared(a[1]), "regimes")
