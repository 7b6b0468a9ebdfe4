"""Targets: how far the mid moves, each with the time at which that is known.

Takes blocks of the stream with the mid after every event, gives :class:`Outcomes` as they become known; the
:class:`Table` of decision rows joins them for fitting. Anchored at the current mid, never at a smoothed one: smoothing lets
the past predict the label. Also here: classes and their thresholds, purging by known time, the effective number of
labels and the leak gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from catalog.asof import Lookup
from catalog.events import SCALE, Instrument, session_bounds
from cift_models.windows import HORIZONS_NS

COUNTS: Final = (10, 50, 100)  # events of the instrument
LABELS: Final = ("500ms", "1s", "5s", "30s", "10 events", "50 events", "100 events")
H: Final = len(HORIZONS_NS)  # the first H labels are the horizons that members predict
NEVER: Final = np.iinfo(np.int64).max
DOWN, FLAT, UP = 0, 1, 2

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
I8 = NDArray[np.int8]
Mask = NDArray[np.bool_]


class LeakError(AssertionError):
    """A label is predicted by its own past: it leaks."""


class Outcomes(NamedTuple):
    """Labels that became known, in the order in which they did; each array (o,).

    (`instrument`, `serial`) name the decision: the serial-th of that instrument, from 0. `move` is in ticks, NaN where the label
    does not exist (no two-sided book, or the market did not trade all the time between). `at` is the index in the block of the first event
    after which it may be used; `known_at` (ns) the same instant on the clock.
    """

    instrument: I64
    serial: I64
    label: I64
    move: F64
    known_at: I64
    at: I64


@njit(cache=True, nogil=True)
def _advance(  # type: ignore[no-untyped-def]
    ts, inst, mid, closes, lo, hi, tick, horizons, counts, r_ts, r_mid, r_ord, r_lo, r_hi, tail, head, last, count,
    o_inst, o_serial, o_label, o_move, o_known, o_at,
):  # fmt: skip
    """One pass over a block (see :class:`Labeller`); returns the number of outcomes written."""
    size, n_h, o, c = r_ts.shape[1], len(horizons), 0, 0
    for i in range(len(ts)):
        k, t = inst[i], ts[i]
        for j in range(n_h):
            while head[k, j] < tail[k]:
                s = head[k, j] % size
                end = r_ts[k, s] + horizons[j]
                if end >= t:
                    break
                inside = r_lo[k, s] <= r_ts[k, s] and end <= r_hi[k, s]
                o_inst[o], o_serial[o], o_label[o], o_known[o], o_at[o] = k, head[k, j], j, end + 1, i
                o_move[o] = np.rint((last[k] - r_mid[k, s]) / tick[k] * 1e4) / 1e4 if inside else np.nan
                head[k, j] += 1
                o += 1
        last[k] = mid[i]
        count[k] += 1
        for j in range(len(counts)):
            while head[k, n_h + j] < tail[k]:
                s = head[k, n_h + j] % size
                if r_ord[k, s] + counts[j] > count[k]:
                    break
                inside = r_lo[k, s] <= r_ts[k, s] and t <= r_hi[k, s]
                o_inst[o], o_serial[o], o_label[o], o_known[o], o_at[o] = k, head[k, n_h + j], n_h + j, t, i
                o_move[o] = np.rint((mid[i] - r_mid[k, s]) / tick[k] * 1e4) / 1e4 if inside else np.nan
                head[k, n_h + j] += 1
                o += 1
        if c < len(closes) and closes[c] == i:
            s = tail[k] % size
            r_ts[k, s], r_mid[k, s], r_ord[k, s], r_lo[k, s], r_hi[k, s] = t, mid[i], count[k], lo[c], hi[c]
            tail[k] += 1
            c += 1
    return o


class Labeller:
    """Streams blocks, gives outcomes; memory is bounded by the decisions of the longest horizon.

    A clock label of a decision at t ends at t + h: the mid after the instrument's last event with ts_init <= t + h. It is given
    out at the instrument's next event, and `known_at` = t + h + 1 ns, the first instant at which no event of t + h can come any
    more. A label over n events ends at the instrument's n-th event after the decision and is known at that event. No label
    reaches the close of a session, a halt, auction or close, a roll or an expiry (`Instrument.pauses`, and what :meth:`pause` is told),
    nor the end of the data; a decision within one has none. Any cut of the stream into blocks gives the same outcomes.
    """

    def __init__(
        self, instruments: Sequence[Instrument], horizons_ns: Sequence[int] = HORIZONS_NS, counts: Sequence[int] = COUNTS, room: int = 1024
    ) -> None:
        n, labels = len(instruments), len(horizons_ns) + len(counts)
        self._tick = np.array([i.tick / SCALE for i in instruments], np.float64)
        self._sessions, self._pauses = [i.session for i in instruments], [sorted(i.pauses) for i in instruments]
        self._bounds: list[tuple[int, int]] = [(0, -1)] * n
        self._horizons, self._counts = np.array(horizons_ns, np.int64), np.array(counts, np.int64)
        self._ring = [np.zeros((n, room), d) for d in (np.int64, np.float64, np.int64, np.int64, np.int64)]
        self.tail, self._head = np.zeros(n, np.int64), np.zeros((n, labels), np.int64)
        self._last, self._count = np.full(n, np.nan), np.zeros(n, np.int64)
        self._newest = np.iinfo(np.int64).min

    @property
    def room(self) -> int:
        """Decisions of one instrument that may wait at once; grows as needed, a power of two."""
        return int(self._ring[0].shape[1])

    def _reserve(self, new: I64) -> None:
        need = int((self.tail - self._head.min(axis=1) + new).max(initial=0))
        if need <= self.room:
            return
        old, size = self.room, 1 << (need - 1).bit_length()
        for a, ring in enumerate(self._ring):
            bigger = np.zeros((len(ring), size), ring.dtype)
            for k in range(len(ring)):
                waiting = np.arange(self._head[k].min(), self.tail[k])
                bigger[k, waiting % size] = ring[k, waiting % old]
            self._ring[a] = bigger

    def pause(self, instrument: int, ts: int) -> None:
        """From `ts` (ns) on the market does not trade. Told as it happens, before events at or after `ts`, as `Instrument.pauses` would."""
        mine = self._pauses[instrument] = [p for p in self._pauses[instrument] if p[1] > self._newest]
        if not mine or mine[-1][1] <= ts:
            mine.append((ts, NEVER))
        hi = self._ring[4][instrument]
        waiting = np.arange(self._head[instrument].min(), self.tail[instrument]) % self.room
        hi[waiting] = np.minimum(hi[waiting], ts - 1)

    def resume(self, instrument: int, ts: int) -> None:
        """The market trades again from `ts` (ns) on; at the `ts` of its pause, the pause was a roll."""
        mine = self._pauses[instrument]
        if mine and mine[-1][1] == NEVER:
            mine[-1] = (mine[-1][0], ts)

    def _session(self, ts: I64, inst: I64) -> tuple[I64, I64]:
        """Within which times (ns, both inclusive) the labels of each decision must lie: an empty span where it has none."""
        lo, hi = np.full(len(ts), np.iinfo(np.int64).min), np.full(len(ts), NEVER)
        for k, pauses in enumerate(self._pauses):
            if not pauses or not len(mine := np.flatnonzero(inst == k)):
                continue
            begin, end = np.array(pauses, np.int64).T
            n = np.searchsorted(begin, ts[mine], "right")  # pauses that have begun
            until = np.append(np.iinfo(np.int64).min, np.maximum.accumulate(end))[n]
            hi[mine] = np.where(until > ts[mine], ts[mine] - 1, np.append(begin, np.int64(NEVER))[n] - 1)
        for k, session in enumerate(self._sessions):
            if session is None or not len(mine := np.flatnonzero(inst == k)):
                continue
            t, a = ts[mine], 0
            while a < len(t):
                begin, end = self._bounds[k]
                if not begin <= t[a] < end:
                    begin, end = self._bounds[k] = session_bounds(session, int(t[a]))
                b = max(a + 1, int(np.searchsorted(t, end)))
                lo[mine[a:b]], hi[mine[a:b]] = begin, np.minimum(hi[mine[a:b]], end - 1)
                a = b
        return lo, hi

    def push(self, events: NDArray[np.void], mid: F64, closes: I64) -> Outcomes:
        """Advance by one block: `events` EVENT (n,), `mid` (n,) price after each event, `closes` (m,) indices of decisions."""
        ts, inst = np.ascontiguousarray(events["ts_init"]), events["instrument"].astype(np.int64)
        new = np.bincount(inst[closes], minlength=len(self.tail))
        self._reserve(new)
        bound = int((self.tail[:, None] - self._head).sum() + new.sum() * self._head.shape[1])
        out: list[NDArray[Any]] = [np.empty(bound, d) for d in (np.int64, np.int64, np.int64, np.float64, np.int64, np.int64)]
        lo, hi = self._session(ts[closes], inst[closes])
        n = _advance(  # type: ignore[call-arg]
            ts, inst, np.ascontiguousarray(mid, np.float64), closes, lo, hi, self._tick, self._horizons, self._counts, *self._ring,
            self.tail, self._head, self._last, self._count, *out,
        )  # fmt: skip
        if len(ts):
            self._newest = int(ts[-1])
        return Outcomes(*(a[:n] for a in out))

    def finish(self) -> Outcomes:
        """The data has ended: clock labels that end at or before its newest event; the others never become known."""
        none = np.empty(0, np.int64)
        found: list[tuple[int, int, int, float, int, int]] = []
        ts, mid, _, lo, hi = self._ring
        for k in range(len(self.tail)):
            for j, h in enumerate(self._horizons):
                serial = np.arange(self._head[k, j], self.tail[k])
                s = serial % self.room
                end = ts[k, s] + h
                move = np.rint((self._last[k] - mid[k, s]) / self._tick[k] * 1e4) / 1e4
                move[(lo[k, s] > ts[k, s]) | (end > hi[k, s])] = np.nan
                found += [(k, int(a), j, m, e + 1, 0) for a, m, e in zip(serial, move, end) if e <= self._newest]
        self._head[:] = self.tail[:, None]
        if not found:
            return Outcomes(none, none, none, np.empty(0), none, none)
        found.sort(key=lambda f: f[4])
        kk, ss, ll, mm, tt, aa = zip(*found)
        i64 = np.int64
        return Outcomes(np.array(kk, i64), np.array(ss, i64), np.array(ll, i64), np.array(mm), np.array(tt, i64), np.array(aa, i64))


class Thresholds(NamedTuple):
    """What counts as a move, ticks, from the training range: `balanced` (I, L) leaves a third flat; `spread` (I,) is the median spread."""

    balanced: F64
    spread: F64


class Split(NamedTuple):
    """One fold by time (ns): members fit before `calibrate`, calibrate before `weigh`; weights are learnt before `end`; tested after."""

    start: int
    calibrate: int
    weigh: int
    end: int
    embargo: int = 0


class Table(NamedTuple):
    """Decision rows, oldest first: `rows` (n, F) float32 features, `spread` in ticks, `move` (n, L) ticks, `known_at` (n, L) ns."""

    ts: I64
    instrument: I64
    rows: NDArray[np.float32]
    spread: F64
    move: F64
    known_at: I64

    def where(self, mask: Mask | I64) -> Table:
        columns: list[NDArray[Any]] = [a[mask] for a in self]
        return Table(*columns)


class Study(NamedTuple):
    """What a member learns from.

    `names` are the columns of `table.rows`, `inputs` those that models may use; `usable` the horizons with labels enough to learn.
    `altdata` tells what was known of the instruments at any time, where a table of alternative data was given.
    """

    instruments: tuple[Instrument, ...]
    names: tuple[str, ...]
    inputs: tuple[str, ...]
    table: Table
    split: Split
    thresholds: Thresholds
    usable: tuple[int, ...]
    seed: int
    altdata: Lookup | None = None

    def classes(self, label: int) -> I8:
        """(n,) 0 down, 1 flat, 2 up by the balanced threshold, -1 where there is no label."""
        return classify(self.table.move[:, label], self.thresholds.balanced[self.table.instrument, label])

    def fit_rows(self, label: int) -> I64:
        """Decisions of the fit slice whose label is known before the calibration slice begins."""
        return np.flatnonzero(within(self.table, label, self.split.start, self.split.calibrate, self.split.embargo))

    def calibration_rows(self, label: int) -> I64:
        """Decisions of the calibration slice whose label is known before the weight slice begins."""
        return np.flatnonzero(within(self.table, label, self.split.calibrate, self.split.weigh, self.split.embargo))

    def independent(self, rows: I64, label: int) -> int:
        """How many independent labels these decisions hold, over all instruments; see :func:`effective`."""
        t = self.table
        mine = (rows[t.instrument[rows] == k] for k in range(len(self.instruments)))
        return sum(effective(t.ts[r], t.known_at[r, label]) for r in mine)


class Thinned:
    """Decision rows with their labels out of an endless stream, evenly thinned so that no more than `cap` are held.

    Every step-th decision of each instrument is kept; where they would exceed `cap`, step doubles. `columns` are further
    values of a decision: name -> (shape, dtype).
    """

    def __init__(self, instruments: int, labels: int, cap: int, **columns: tuple[tuple[int, ...], type]) -> None:
        self.step, self._used, self._cap, self._serial = 1, 0, cap, np.zeros(instruments, np.int64)
        kinds: dict[str, tuple[tuple[int, ...], type]] = {
            "ts": ((), np.int64), "instrument": ((), np.int64), "serial": ((), np.int64), "move": ((labels,), np.float64),
            "known_at": ((labels,), np.int64), **columns,
        }  # fmt: skip
        self._data: dict[str, NDArray[Any]] = {name: np.empty((cap, *shape), kind) for name, (shape, kind) in kinds.items()}
        self._place = [np.empty(0, np.int64) for _ in range(instruments)]  # row of decision (base + i) * step, -1: not held
        self._base = [0] * instruments

    def push(self, ts: I64, instrument: I64, outcomes: Outcomes, wanted: Mask | None = None, **columns: NDArray[Any]) -> None:
        """Add m decisions (those `wanted`) and then what became known; both as the labeller numbers them."""
        serial = np.empty(len(ts), np.int64)
        for k in np.unique(instrument):
            mine = np.flatnonzero(instrument == k)
            serial[mine] = self._serial[k] + np.arange(len(mine))
            self._serial[k] += len(mine)
        take = serial % self.step == 0
        while self._used + np.count_nonzero(take if wanted is None else take & wanted) > self._cap:
            self.step *= 2
            kept = np.flatnonzero(self._data["serial"][: self._used] % self.step == 0)
            for a in self._data.values():
                a[: len(kept)] = a[kept]
            self._used = len(kept)
            self._place = [p[b & 1 :: 2] for p, b in zip(self._place, self._base)]
            self._base = [(b + 1) // 2 for b in self._base]
            at = np.full(int(kept.max(initial=-1)) + 1, -1)
            at[kept] = np.arange(len(kept))
            self._place = [np.where(p >= 0, at[p], -1) if len(at) else p for p in self._place]
            take &= serial % self.step == 0
        rows = np.flatnonzero(take)
        held = np.ones(len(rows), np.bool_) if wanted is None else wanted[rows]
        at = np.where(held, self._used + np.cumsum(held) - 1, -1)
        for k in np.unique(instrument):
            mine = at[instrument[rows] == k]
            if not len(self._place[k]) and (mine < 0).all():
                self._base[k] = -(-int(self._serial[k]) // self.step)
            else:
                self._place[k] = np.concatenate([self._place[k], mine])
        rows, new = rows[held], slice(self._used, self._used + int(held.sum()))
        for name, values in {"ts": ts, "instrument": instrument, "serial": serial, **columns}.items():
            self._data[name][new] = values[rows]
        self._data["move"][new], self._data["known_at"][new] = np.nan, NEVER
        self._used = new.stop
        self.learn(outcomes)

    def learn(self, outcomes: Outcomes) -> None:
        """Enter labels that became known into their rows."""
        o = outcomes
        sel = o.serial % self.step == 0
        for k in np.unique(o.instrument[sel]):
            mine = np.flatnonzero(sel & (o.instrument == k))
            at = o.serial[mine] // self.step - self._base[k]
            mine, at = mine[at >= 0], at[at >= 0]
            row = self._place[k][at]
            mine, row = mine[row >= 0], row[row >= 0]
            self._data["move"][row, o.label[mine]] = o.move[mine]
            self._data["known_at"][row, o.label[mine]] = o.known_at[mine]

    def result(self) -> dict[str, NDArray[Any]]:
        """The rows held, in the order of the stream."""
        return {name: a[: self._used] for name, a in self._data.items()}


def within(table: Table, label: int, start: int, end: int, embargo: int = 0) -> Mask:
    """Decisions in [start, end) with this label, purged: it is known `embargo` ns before `end` or earlier (Lopez de Prado 2018, 7.4)."""
    return (
        np.isfinite(table.move[:, label])
        & (table.ts >= start)
        & (table.ts < end)
        & purged(table.known_at[:, label], end, embargo)
    )  # fmt: skip


def purged(known_at: I64, start: int, embargo: int = 0) -> Mask:
    """Which labels may serve a slice that begins at `start` (ns): those known `embargo` ns before it."""
    return known_at <= start - embargo


def walk_forward(ts: I64, folds: int = 1, shares: tuple[float, float, float] = (0.6, 0.2, 0.2), embargo: int = 0) -> list[Split]:
    """Expanding folds over the decisions `ts` (n,): fold f trains on the first (f + 1) of `folds` equal parts.

    `shares` of fit, calibration and weights within each. The last fold trains on everything: its models are the ones kept.
    """
    ends = [int(ts[min(len(ts) - 1, len(ts) * (f + 1) // folds)]) for f in range(folds - 1)] + [int(ts[-1]) + 1]
    out = []
    for end in ends:
        part = ts[: np.searchsorted(ts, end)]
        cut = [int(part[min(len(part) - 1, int(len(part) * s))]) for s in (shares[0], shares[0] + shares[1])]
        out.append(Split(int(ts[0]), cut[0], cut[1], end, embargo))
    return out


def balanced_threshold(move: F64) -> float:
    """Half-way between two observed sizes of moves so that the share of flat is nearest to a third; a quarter tick where nothing moves."""
    size, n = np.unique(np.abs(move[np.isfinite(move)]), return_counts=True)
    if not len(size) or size[-1] == 0.0:
        return 0.25
    edges = np.append(size[0] / 2, (size[:-1] + size[1:]) / 2)  # below the smallest, then between neighbours; never above the largest
    flat = np.append(0, np.cumsum(n)[:-1]) / n.sum()
    usable = edges > 0
    return float(edges[usable][np.argmin(np.abs(flat[usable] - 1 / 3))])


def fit_thresholds(table: Table, instruments: int, mask: Mask) -> Thresholds:
    """Thresholds of every instrument and label from the rows of the training range that `mask` picks."""
    labels = table.move.shape[1]
    balanced, spread = np.full((instruments, labels), 0.25), np.ones(instruments)
    for k in range(instruments):
        mine = mask & (table.instrument == k)
        if mine.any():
            balanced[k] = [balanced_threshold(table.move[mine, j]) for j in range(labels)]
            known = table.spread[mine & np.isfinite(table.spread)]
            spread[k] = np.median(known) if len(known) else 1.0
    return Thresholds(balanced, spread)


def classify(move: F64, threshold: F64 | float) -> I8:
    """0 down, 1 flat, 2 up; flat where |move| <= threshold; -1 where there is no move."""
    out = (FLAT + (move > threshold).astype(np.int8) - (move < -np.asarray(threshold)).astype(np.int8)).astype(np.int8)
    out[~np.isfinite(move)] = -1
    return out


def pays(move: F64, spread: F64 | float) -> Mask:
    """Does the move pay for crossing the spread, in at one side and out at the other? Both in ticks."""
    return np.abs(move) > spread


@njit(cache=True, nogil=True)
def _disjoint(ts, known_at):  # type: ignore[no-untyped-def]
    n, free = 0, np.iinfo(np.int64).min
    for i in range(len(ts)):
        if ts[i] >= free:
            n += 1
            free = known_at[i]
    return n


def effective(ts: I64, known_at: I64) -> int:
    """How many labels of one instrument do not overlap: the first, then each that starts once the one before is known."""
    return int(_disjoint(ts, known_at))


@njit(cache=True, nogil=True)
def _last_known(ts, known_at, y, out):  # type: ignore[no-untyped-def]
    j, newest = 0, -1
    for i in range(len(ts)):
        while j < i and known_at[j] <= ts[i]:
            newest = y[j] if y[j] >= 0 else newest
            j += 1
        out[i] = newest


def last_known(ts: I64, known_at: I64, y: I8) -> I8:
    """Persistence: for each decision of one instrument the class of the newest label known by then, -1 before the first."""
    out = np.full(len(ts), -1, np.int8)
    _last_known(ts, np.where(y < 0, np.int64(0), known_at), y, out)
    return out


def macro_f1(truth: I8, guess: I8) -> float:
    """Mean of the three classes' F1; a class that is neither there nor guessed is left out."""
    scores = []
    for c in (DOWN, FLAT, UP):
        hit = np.count_nonzero((truth == c) & (guess == c))
        all_ = np.count_nonzero(truth == c) + np.count_nonzero(guess == c)
        if all_:
            scores.append(2 * hit / all_)
    return float(np.mean(scores)) if scores else float("nan")


def leak_gate(truth: I8, persistence: I8, model: I8, points: float = 3.0) -> float:
    """How many points of macro-F1 the model is ahead of persistence of the same label, on rows that have all three.

    Raises LeakError below `points`. For planted markets, where the model's skill is known to be there; on real data report the figure.
    """
    both = (truth >= 0) & (persistence >= 0) & (model >= 0)
    gap = 100 * (macro_f1(truth[both], model[both]) - macro_f1(truth[both], persistence[both]))
    if not gap >= points:
        raise LeakError(f"persistence predicts the label within {gap:.1f} points of macro-F1 of the model: it leaks, or nothing was learnt")
    return gap
