"""Labels: moves of the current mid, each known when it is known, never across a session or the end of the data."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catalog.events import EVENT, SCALE, Instrument, session_bounds
from cift_models.labels import (
    COUNTS,
    NEVER,
    Labeller,
    LeakError,
    Split,
    Table,
    Thinned,
    balanced_threshold,
    classify,
    effective,
    fit_thresholds,
    last_known,
    leak_gate,
    macro_f1,
    pays,
    purged,
    walk_forward,
    within,
)  # fmt: skip
from cift_models.windows import HORIZONS_NS

TICK = SCALE // 100
NEW_YORK = "09:30-16:00 America/New_York"
OPEN = 1_709_303_400 * SCALE  # Friday 1 March 2024, 09:30 in New York


def instrument(session: str | None = None, id_: str = "A.X", pauses: tuple[tuple[int, int], ...] = ()) -> Instrument:
    return Instrument(id_, TICK, SCALE, 1.0, "USD", session, pauses=pauses)


def market(seed: int, n: int = 400, instruments: int = 2, start: int = OPEN, gap_ns: int = 300_000_000):
    """Events of several instruments with a mid that walks in half ticks; some are one-sided, some share a stamp."""
    rng = np.random.default_rng(seed)
    events = np.zeros(n, EVENT)
    events["ts_init"] = start + np.cumsum(rng.integers(0, 3, n) * rng.integers(0, gap_ns, n))
    events["instrument"] = rng.integers(0, instruments, n)
    walk = 100 + np.cumsum(rng.integers(-2, 3, n)) * 0.005
    mid = np.where(rng.random(n) < 0.05, np.nan, walk + 10.0 * events["instrument"])
    return events, mid, np.flatnonzero(rng.random(n) < 0.4)


def brute_force(events, mid, closes, instruments):
    """(instrument, serial, label) -> (move in ticks, known_at), by looking through all events for every decision."""
    out, serial = {}, [0] * len(instruments)
    for c in closes:
        k, t = int(events["instrument"][c]), int(events["ts_init"][c])
        session = instruments[k].session
        begin, end = session_bounds(session, t) if session else (-NEVER, NEVER)

        def trades(until, begin=begin, end=end, t=t, k=k):
            return begin <= t and until < end and not any(a <= until and t < b for a, b in instruments[k].pauses)

        for j, h in enumerate(HORIZONS_NS):
            if t + h > events["ts_init"][-1]:
                continue
            at = max(i for i in range(len(events)) if events["instrument"][i] == k and events["ts_init"][i] <= t + h)
            out[k, serial[k], j] = (mid[at] - mid[c]) / 0.01 if trades(t + h) else math.nan, t + h + 1
        later = [i for i in range(c + 1, len(events)) if events["instrument"][i] == k]
        for j, n in enumerate(COUNTS):
            if len(later) >= n:
                at = later[n - 1]
                until = int(events["ts_init"][at])
                out[k, serial[k], len(HORIZONS_NS) + j] = (mid[at] - mid[c]) / 0.01 if trades(until) else math.nan, until
        serial[k] += 1
    return out


def run(labeller, events, mid, closes, cuts=()):
    edges = [0, *sorted(cuts), len(events)]
    got = []
    for a, b in itertools.pairwise(edges):
        inside = closes[(closes >= a) & (closes < b)] - a
        got.append((a, labeller.push(events[a:b], mid[a:b], inside)))
    got.append((len(events), labeller.finish()))
    return got


def as_dict(got):
    out = {}
    for _, o in got:
        for k, s, j, move, known in zip(o.instrument, o.serial, o.label, o.move, o.known_at):
            assert (int(k), int(s), int(j)) not in out, "an outcome is given out once"
            out[int(k), int(s), int(j)] = (float(move), int(known))
    return out


@pytest.mark.parametrize("session", [None, NEW_YORK])
@pytest.mark.parametrize("seed", range(6))
def test_labels_equal_a_search_through_all_events(seed, session):
    start = OPEN if seed % 2 else OPEN + int(6.5 * 3600 - 20) * SCALE  # half of the markets run over the close
    instruments = [instrument(session, "A.X"), instrument(None, "B.X")]
    events, mid, closes = market(seed, start=start)
    want, got = brute_force(events, mid, closes, instruments), as_dict(run(Labeller(instruments, room=4), events, mid, closes))
    assert want.keys() == got.keys()
    for key, (move, known) in want.items():
        assert got[key][1] == known
        assert got[key][0] == pytest.approx(move, abs=1e-4, nan_ok=True)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), cuts=st.lists(st.integers(0, 400), max_size=8))
def test_a_stream_in_pieces_gives_the_labels_of_the_whole(seed, cuts):
    instruments = [instrument(NEW_YORK, "A.X"), instrument(None, "B.X")]
    events, mid, closes = market(seed)
    whole, pieces = run(Labeller(instruments), events, mid, closes), run(Labeller(instruments, room=2), events, mid, closes, cuts)
    for f in whole[0][1]._fields:
        a, b = (np.concatenate([getattr(o, f) + (start if f == "at" else 0) for start, o in got[:-1]]) for got in (whole, pieces))
        assert np.array_equal(a, b, equal_nan=True)


def test_an_outcome_is_given_out_only_when_it_is_known():
    events, mid, closes = market(3)
    for a, o in run(Labeller([instrument(), instrument()]), events, mid, closes, cuts=(57, 201))[:-1]:
        assert (o.known_at <= events["ts_init"][a + o.at]).all()


def test_what_happens_later_changes_no_label_that_is_known():
    events, mid, closes = market(4)
    cut = 250
    changed = mid.copy()
    changed[cut:] += 5.0
    now = events["ts_init"][cut]
    before, after = (as_dict(run(Labeller([instrument(), instrument()]), events, m, closes)) for m in (mid, changed))
    known = {k for k, v in before.items() if v[1] <= now - 1}
    assert len(known) > 100
    assert all(np.array_equal(before[k], after[k], equal_nan=True) for k in known)
    assert any(not np.array_equal(before[k], after[k], equal_nan=True) for k in before if k not in known)


def test_a_label_ends_at_the_last_event_of_its_stamp():
    events = np.zeros(4, EVENT)
    events["ts_init"] = OPEN + np.array([0, 500_000_000, 500_000_000, 500_000_001])
    mid = np.array([100.0, 100.01, 100.03, 100.99])
    o = Labeller([instrument()]).push(events, mid, np.array([0]))
    first = np.flatnonzero(o.label == 0)
    assert o.move[first] == pytest.approx([3.0])
    assert o.known_at[first] == [OPEN + 500_000_001] and o.at[first] == [3]


def test_no_label_crosses_the_close_or_the_night():
    instruments = [instrument(NEW_YORK)]
    close = OPEN + int(6.5 * 3600) * SCALE
    events = np.zeros(3, EVENT)
    events["ts_init"] = [close - 2 * SCALE, close - SCALE, close + 20 * 3600 * SCALE]
    got = as_dict(run(Labeller(instruments), events, np.array([100.0, 100.01, 105.0]), np.array([0, 1])))
    assert got[0, 0, 1][0] == pytest.approx(1.0)
    assert math.isnan(got[0, 1, 1][0])  # ends at the close
    assert math.isnan(got[0, 0, 2][0]) and math.isnan(got[0, 0, 3][0])


def pauses_of(rng, events, n=6):
    """Halts, auctions and rolls (empty spans), some of which begin or end at the stamp of an event; one lasts to the end."""
    first, last = int(events["ts_init"][0]), int(events["ts_init"][-1])
    stamps = np.sort(np.concatenate([rng.integers(first, last, n), rng.choice(events["ts_init"], n)])).tolist()
    found = [(a, b) if rng.random() < 0.6 else (a, a) for a, b in zip(stamps[::2], stamps[1::2])]
    return tuple(found) + (((stamps[-1], NEVER),) if rng.random() < 0.3 else ())


@pytest.mark.parametrize("session", [None, NEW_YORK])
@pytest.mark.parametrize("seed", range(8))
def test_no_label_reaches_into_a_halt_an_auction_or_over_a_roll(seed, session):
    events, mid, closes = market(seed, start=OPEN + int(6.5 * 3600 - 40) * SCALE, gap_ns=400_000_000)
    rng = np.random.default_rng(seed)
    instruments = [instrument(session, "A.X", pauses_of(rng, events)), instrument(None, "B.X", pauses_of(rng, events))]
    want, got = brute_force(events, mid, closes, instruments), as_dict(run(Labeller(instruments, room=4), events, mid, closes))
    assert want.keys() == got.keys()
    for key, (move, known) in want.items():
        assert got[key] == pytest.approx((move, known), abs=1e-4, nan_ok=True)
    free = brute_force(events, mid, closes, [instrument(session, "A.X"), instrument(None, "B.X")])
    taken = [k for k in want if math.isnan(want[k][0]) and not math.isnan(free[k][0])]
    assert len(taken) > 50 and sum(not math.isnan(m) for m, _ in want.values()) > 20


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), cuts=st.lists(st.integers(1, 399), max_size=6))
def test_a_pause_that_is_told_as_it_happens_gives_the_labels_of_one_that_was_known_before(seed, cuts):
    """Live, where the venue tells of a halt when it comes, and over history, in whatever pieces, labels are the same."""
    events, mid, closes = market(seed)
    ts, told = events["ts_init"], pauses_of(np.random.default_rng(seed), events)
    instruments = [instrument(None, "A.X", told), instrument(None, "B.X")]
    want = as_dict(run(Labeller(instruments), events, mid, closes, cuts))
    labeller = Labeller([instrument(None, "A.X"), instrument(None, "B.X")], room=4)
    changes = [(when, ends) for span in told for ends, when in enumerate(span) if when < NEVER]
    edges = sorted({0, len(events), *cuts, *np.searchsorted(ts, [c[0] for c in changes]).tolist()})
    got = []
    for a, b in itertools.pairwise(edges):
        while changes and changes[0][0] <= ts[a]:
            when, ends = changes.pop(0)
            (labeller.resume if ends else labeller.pause)(0, when)
        inside = closes[(closes >= a) & (closes < b)] - a
        got.append((a, labeller.push(events[a:b], mid[a:b], inside)))
    got.append((len(events), labeller.finish()))
    found = as_dict(got)
    assert found.keys() == want.keys()
    assert all(np.array_equal(found[k], want[k], equal_nan=True) for k in want)


def test_a_halt_to_come_changes_no_label_that_is_known_before_it():
    events, mid, closes = market(5)
    halt = int(events["ts_init"][250])
    free, halted = (
        as_dict(run(Labeller([instrument(pauses=p), instrument(pauses=p)]), events, mid, closes)) for p in ((), ((halt, halt + SCALE),))
    )
    known = {k for k, v in free.items() if v[1] < halt}
    assert len(known) > 100 and all(np.array_equal(free[k], halted[k], equal_nan=True) for k in known)


def test_the_balanced_threshold_leaves_a_third_flat_where_the_grid_allows():
    rng = np.random.default_rng(0)
    move = rng.normal(size=30_000) * 10
    assert np.mean(np.abs(move) <= balanced_threshold(move)) == pytest.approx(1 / 3, abs=1e-3)
    assert balanced_threshold(np.array([0.0] * 90 + [0.5] * 5 + [-0.5] * 5)) == 0.25
    assert balanced_threshold(np.zeros(10)) == 0.25 and balanced_threshold(np.array([np.nan])) == 0.25
    always = np.array([1.0, -1.0, 1.0])
    assert 0 < balanced_threshold(always) < 1


def test_classes_and_the_price_of_the_spread():
    move = np.array([-2.0, -0.5, 0.0, 0.5, 2.0, np.nan])
    assert classify(move, 0.5).tolist() == [0, 1, 1, 1, 2, -1]
    assert pays(move, 1.0).tolist() == [True, False, False, False, True, False]


def table(ts, known_at, move=None, inst=None) -> Table:
    n = len(ts)
    move = np.ones(n) if move is None else move
    inst = np.zeros(n, np.int64) if inst is None else inst
    return Table(np.asarray(ts), inst, np.zeros((n, 1), np.float32), np.full(n, 2.0), move[:, None], np.asarray(known_at)[:, None])


def test_training_rows_are_purged_by_the_time_at_which_their_labels_are_known():
    t = table(np.arange(10) * 10, np.arange(10) * 10 + 25)
    assert np.flatnonzero(within(t, 0, 0, 60)).tolist() == [0, 1, 2, 3]
    assert np.flatnonzero(within(t, 0, 0, 60, embargo=10)).tolist() == [0, 1, 2]
    assert np.flatnonzero(within(t, 0, 60, 1000)).tolist() == [6, 7, 8, 9]
    assert purged(np.array([5, 6]), 5).tolist() == [True, False]


def test_thresholds_come_from_the_rows_that_are_given():
    t = table(np.arange(8), np.arange(8), np.array([1.0, 2, 3, 4, 1000, 1000, 1000, 1000]))
    assert fit_thresholds(t, 2, t.ts < 4).balanced[0, 0] < 4
    assert fit_thresholds(t, 2, t.ts < 4).balanced[1, 0] == 0.25
    assert fit_thresholds(t, 2, t.ts < 4).spread.tolist() == [2.0, 1.0]


def test_folds_walk_forward_and_the_last_one_uses_everything():
    ts = np.arange(1_000) * 7
    folds = walk_forward(ts, 3, (0.5, 0.25, 0.25))
    assert [f.end for f in folds] == sorted({f.end for f in folds}) and folds[-1].end == ts[-1] + 1
    for f in folds:
        assert f.start == 0 and f.start < f.calibrate < f.weigh < f.end
    assert folds[-1] == Split(0, 3500, 5250, 6994)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), min_size=1, max_size=40))
def test_effective_labels_are_the_most_that_do_not_overlap_when_all_last_equally(spans):
    ts = np.sort(np.array([s for s, _ in spans]))
    width = spans[0][1]
    best = np.zeros(len(ts) + 1, int)  # dynamic programme over intervals [t, t + width)
    for i in range(len(ts)):
        best[i + 1] = max(best[i], 1 + best[np.searchsorted(ts, ts[i] - width, side="right")])
    assert effective(ts, ts + width) == best[-1]


def test_persistence_is_the_newest_label_known_by_then():
    ts = np.array([0, 10, 20, 30, 40])
    known = np.array([15, 25, 20, 45, 55])
    y = np.array([2, 0, -1, 1, 1], np.int8)
    assert last_known(ts, known, y).tolist() == [-1, -1, 2, 0, 0]


def test_macro_f1_equals_scikit_learns():
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 3, 500).astype(np.int8), rng.integers(0, 3, 500).astype(np.int8)
    assert macro_f1(a, b) == pytest.approx(f1_score(a, b, average="macro"))


def test_the_leak_gate_stops_a_smoothed_label_and_passes_an_anchored_one():
    """Smoothing the mid over the horizon makes the label's own past predict it: the fault the gate is there for."""
    rng = np.random.default_rng(1)
    signal, noise = np.repeat(rng.normal(size=1_000), 20), rng.normal(size=20_000)
    move = signal + noise
    anchored = classify(move, 0.5)
    smoothed = classify(np.convolve(move, np.ones(60) / 60, "same") * 5, 0.5)
    model = classify(signal * 2, 0.5)
    lagged = np.roll(anchored, 40)
    assert leak_gate(anchored, lagged, model) > 3
    with pytest.raises(LeakError, match="leaks"):
        leak_gate(smoothed, np.roll(smoothed, 1), classify(np.convolve(signal, np.ones(60) / 60, "same") * 5, 0.5))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), cap=st.integers(5, 300), cuts=st.lists(st.integers(0, 400), max_size=6), since=st.integers(0, 100))
def test_thinned_rows_hold_their_own_labels_and_never_more_than_the_cap(seed, cap, cuts, since):
    instruments = [instrument(), instrument()]
    events, mid, closes = market(seed)
    truth = as_dict(run(Labeller(instruments), events, mid, closes))
    held, labeller = Thinned(2, 7, cap, index=((), np.int64)), Labeller(instruments)
    edges = [0, *sorted(cuts), len(events)]
    begin = events["ts_init"][closes][min(since, len(closes) - 1)]
    for a, b in itertools.pairwise(edges):
        c = closes[(closes >= a) & (closes < b)] - a
        at = events[a:b][c]
        known = labeller.push(events[a:b], mid[a:b], c)
        held.push(at["ts_init"], at["instrument"].astype(np.int64), known, at["ts_init"] >= begin, index=c + a)
    held.learn(labeller.finish())
    z = held.result()
    assert len(z["ts"]) <= cap
    assert len(z["ts"]) >= min(cap, np.count_nonzero(events["ts_init"][closes] >= begin)) // 2 - 2
    assert np.array_equal(z["ts"], events["ts_init"][z["index"]]) and (z["ts"] >= begin).all()
    for i in range(len(z["ts"])):
        for j in range(7):
            move, known = truth.get((int(z["instrument"][i]), int(z["serial"][i]), j), (math.nan, NEVER))
            assert z["known_at"][i, j] == known and np.array_equal(z["move"][i, j], move, equal_nan=True)
