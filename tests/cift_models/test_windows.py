"""Batches close where they should, and windows hold the rows that were known, however the stream is cut."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catalog.events import EVENT
from cift_models.windows import BATCH_EVENTS, BATCH_NS, MINUTES, SECOND, SECONDS, TICKS, Block, History, closes, new_batches

START = 1_703_545_200_000_000_000


def stream(gaps, instruments):  # type: ignore[no-untyped-def]
    e = np.zeros(len(gaps), EVENT)
    e["ts_init"] = START + np.cumsum(np.asarray(gaps, np.int64))
    e["instrument"] = instruments
    return e


def closes_by_hand(events):  # type: ignore[no-untyped-def]
    found, open_batches = [], {}
    for i, (t, k) in enumerate(zip(events["ts_init"].tolist(), events["instrument"].tolist())):
        batch = open_batches.setdefault(k, [])
        batch.append(t)
        if len(batch) == 100 or t - batch[0] >= 10_000_000:
            found.append(i)
            open_batches[k] = []
    return found


gaps = st.sampled_from([0, 0, 1, 10**5, 10**6, BATCH_NS - 1, BATCH_NS, 10**9])
streams = st.lists(st.tuples(gaps, st.integers(0, 2)), min_size=1, max_size=400)


@settings(max_examples=60, deadline=None)
@given(streams, st.data())
def test_batches_close_at_their_100th_event_or_after_10_ms_in_any_pieces(rows, data):  # type: ignore[no-untyped-def]
    events = stream(*zip(*rows))
    cut = data.draw(st.integers(0, len(events)))
    state = new_batches(3)
    pieces = [closes(state, events[:cut]), closes(state, events[cut:]) + cut]
    assert np.concatenate(pieces).tolist() == closes_by_hand(events)


def test_the_closing_event_belongs_to_its_batch():
    assert closes(new_batches(1), stream([0] * 250, 0)).tolist() == [BATCH_EVENTS - 1, 2 * BATCH_EVENTS - 1]
    assert closes(new_batches(1), stream([0, BATCH_NS - 1, 1, BATCH_NS, BATCH_NS], 0)).tolist() == [2, 4]


def windows_by_hand(events, rows, decisions, i):  # type: ignore[no-untyped-def]
    """What the decision at event i may look at: (row index or None for each step) of ticks, seconds, minutes."""
    own = np.flatnonzero(events["instrument"][: i + 1] == events["instrument"][i])
    t = events["ts_init"]
    ticks = [d for d in decisions if d <= i and events["instrument"][d] == events["instrument"][i]][-TICKS:]
    found = [[None] * (TICKS - len(ticks)) + ticks]
    for width, n in ((SECOND, SECONDS), (60 * SECOND, MINUTES)):
        edges = [(t[i] // width - k) * width for k in range(n - 1, -1, -1)]
        found.append([max((j for j in own if t[j] < edge), default=None) for edge in edges])
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.data())
def test_windows_hold_the_last_decisions_and_the_last_rows_before_whole_seconds_and_minutes(seed, data):  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(seed)
    n = 300
    events = stream(rng.choice([10**6, 10**8, 10**9, 20 * 10**9, 200 * 10**9], n, p=[0.4, 0.3, 0.2, 0.08, 0.02]), rng.integers(0, 2, n))
    rows = rng.normal(size=(n, 5))
    rows[rng.random(rows.shape) < 0.1] = np.nan
    decisions = closes(new_batches(2), events)
    wanted = rng.random(len(decisions)) < 0.3
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, n), max_size=3))), n]
    history, views = History(2, [4, 0, 2]), []
    for a, b in pairwise(cuts):
        inside = (decisions >= a) & (decisions < b)
        views.append(history.push(Block(events[a:b], rows[a:b], decisions[inside] - a), wanted[inside]))
    values = [np.concatenate([v[c] for v in views]) for c in range(6)]
    masks = [np.concatenate([v.masks[c] for v in views]) for c in range(3)]
    assert len(values[0]) == wanted.sum()
    for m, i in enumerate(decisions[wanted]):
        for c, steps in enumerate(windows_by_hand(events, rows, decisions, i)):
            assert masks[c][m].tolist() == [j is not None for j in steps]
            for x, stamp, j in zip(values[c][m], values[3 + c][m], steps):
                if j is None:
                    assert np.isnan(x).all() and stamp == 0
                else:
                    assert np.array_equal(x, rows[j, [4, 0, 2]].astype(np.float32), equal_nan=True)
                    assert stamp == events["ts_init"][j] <= events["ts_init"][i]


def test_all_closes_are_wanted_unless_told_otherwise():
    events = stream([BATCH_NS] * 20, 0)
    decisions = closes(new_batches(1), events)
    views = History(1, [0]).push(Block(events, np.arange(20.0)[:, None], decisions))
    assert views.tick[:, -1, 0].tolist() == decisions.tolist()
    assert views.tick.dtype == np.float32 and views.minute.shape == (len(decisions), MINUTES, 1)


def test_no_decisions_no_windows():
    views = History(1, [0, 1]).push(Block(stream([1, 1], 0), np.zeros((2, 2)), np.zeros(0, np.int64)))
    assert [len(v) for v in views] == [0] * 6


def test_an_instrument_or_a_column_that_is_not_there_is_refused():
    with pytest.raises(IndexError, match="column 7"):
        History(1, [7]).push(Block(stream([BATCH_NS, BATCH_NS], 0), np.zeros((2, 2)), np.array([1])))
    with pytest.raises(IndexError, match="instrument"):
        History(1, [0]).push(Block(stream([BATCH_NS, BATCH_NS], 1), np.zeros((2, 2)), np.array([1])))
    with pytest.raises(IndexError, match="instrument"):
        closes(new_batches(1), stream([1], 1))
