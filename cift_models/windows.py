"""Where decisions fall in a stream, what a member sees and answers, and the tick, second and minute windows over feature rows.

A batch closes at its 100th event or at its first event 10 ms (`ts_init`) or more after the one that opened it; each close is a
decision. Everything here carries its state, so a stream cut into pieces gives what the whole gives, and nothing looks ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

BATCH_EVENTS: Final = 100
BATCH_NS: Final = 10_000_000
SECOND: Final = 1_000_000_000
HORIZONS_NS: Final = (500_000_000, SECOND, 5 * SECOND, 30 * SECOND)
TICKS, SECONDS, MINUTES = 64, 32, 16  # steps of the three windows


class Block(NamedTuple):
    """A piece of the stream as every member gets it."""

    events: NDArray[np.void]  # EVENT (n,), several instruments, canonical order
    rows: NDArray[np.float64]  # (n, F), the columns of features.NAMES
    closes: NDArray[np.int64]  # (m,) ascending indices of the events at which a vote is asked for: each closes a batch
    batches: NDArray[np.int64] | None = None  # (b,) of all events that close a batch, where votes are asked for at some of them alone


class Votes(NamedTuple):
    """A member's answer at the m closes of a block, H horizons (:data:`HORIZONS_NS`)."""

    proba: NDArray[np.float64]  # (m, H, 3): down, flat, up; NaN abstains
    magnitude: NDArray[np.float64]  # (m, H): expected absolute move in ticks; NaN is none


def new_batches(instruments: int) -> NDArray[np.int64]:
    """The state of :func:`closes` with every batch empty, int64 (instruments, 2): events so far, ts_init of the first."""
    return np.zeros((instruments, 2), np.int64)


@njit(cache=True)
def _closes(state: Any, ts: Any, instrument: Any, out: Any) -> Any:
    m = 0
    for i in range(len(ts)):
        k = instrument[i]
        if k >= len(state):
            raise IndexError("an event of an instrument that is not in the table")
        if state[k, 0] == 0:
            state[k, 1] = ts[i]
        state[k, 0] += 1
        if state[k, 0] == BATCH_EVENTS or ts[i] - state[k, 1] >= BATCH_NS:
            state[k, 0] = 0
            out[m] = i
            m += 1
    return m


def closes(state: NDArray[np.int64], events: NDArray[np.void]) -> NDArray[np.int64]:
    """Indices (m,), ascending, of the events that close a batch of their own instrument; `state` is advanced in place.

    Raises IndexError for an instrument that `state` has no row for.
    """
    out = np.empty(len(events), np.int64)
    return out[: _closes(state, events["ts_init"], events["instrument"], out)]


class Views(NamedTuple):
    """What m decisions may look at: windows with the newest step last, in float32, and the ts_init (ns) of each step's row.

    A step that the history does not reach has ts 0 and NaN values.
    """

    tick: NDArray[np.float32]  # (m, TICKS, C): the rows at the latest decisions, this one included
    second: NDArray[np.float32]  # (m, SECONDS, C): the last rows before the latest whole seconds
    minute: NDArray[np.float32]  # (m, MINUTES, C): the last rows before the latest whole minutes
    tick_ts: NDArray[np.int64]  # (m, TICKS)
    second_ts: NDArray[np.int64]  # (m, SECONDS)
    minute_ts: NDArray[np.int64]  # (m, MINUTES)

    @property
    def masks(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
        """True where a step holds a row, (m, TICKS), (m, SECONDS), (m, MINUTES)."""
        return self.tick_ts != 0, self.second_ts != 0, self.minute_ts != 0


@njit(cache=True)
def _put(ring: Any, stamps: Any, at: Any, row: Any, stamp: Any) -> None:
    ring[at % len(ring)] = row
    stamps[at % len(ring)] = stamp


@njit(cache=True)
def _take(ring: Any, stamps: Any, at: Any, out: Any, out_ts: Any) -> None:
    n = len(ring)
    for j in range(n):
        out[j] = ring[(at + j) % n]
        out_ts[j] = stamps[(at + j) % n]


@njit(cache=True)
def _push(ts: Any, inst: Any, rows: Any, columns: Any, closes: Any, wanted: Any, rings: Any, marks: Any, at: Any, last: Any, last_ts: Any,
          out: Any) -> Any:
    c = m = 0
    for i in range(len(ts)):
        k, t = inst[i], ts[i]
        if k >= len(last):
            raise IndexError("an event of an instrument that is not in the table")
        for w, width in ((1, SECOND), (2, 60 * SECOND)):
            cell = t // width
            if last_ts[k] == 0:
                at[k, w] = cell
            elif cell > at[k, w]:
                n = rings[w].shape[1]
                for x in range(max(at[k, w], cell - n), cell):
                    _put(rings[w][k], marks[w][k], x, last[k], last_ts[k])
                at[k, w] = cell
        for j in range(len(columns)):
            last[k, j] = rows[i, columns[j]]
        last_ts[k] = t
        if c < len(closes) and closes[c] == i:
            _put(rings[0][k], marks[0][k], at[k, 0], last[k], t)
            at[k, 0] += 1
            if wanted[c]:
                for w in range(3):
                    _take(rings[w][k], marks[w][k], at[k, w], out[0][w][m], out[1][w][m])
                m += 1
            c += 1
    return m


class History:
    """The windows of some instruments over chosen columns of the feature rows: rings of fixed size, advanced block by block."""

    def __init__(self, instruments: int, columns: Sequence[int]) -> None:
        self.columns = np.asarray(columns, np.int64)
        shape = [(instruments, n, len(columns)) for n in (TICKS, SECONDS, MINUTES)]
        self._rings = tuple(np.full(s, np.nan, np.float32) for s in shape)
        self._marks = tuple(np.zeros(s[:2], np.int64) for s in shape)
        self._at = np.zeros((instruments, 3), np.int64)
        self._last = np.full((instruments, len(columns)), np.nan, np.float32)
        self._last_ts = np.zeros(instruments, np.int64)

    def push(self, block: Block, wanted: NDArray[np.bool_] | None = None) -> Views:
        """Advance over the block; the windows at its closes, or at those of them that are `wanted` (m,), in order.

        Steps of the tick windows are all the batches of the block. Raises IndexError for an instrument or a column that is not there.
        """
        if (batches := block.batches) is not None:
            asked = block.closes if wanted is None else block.closes[wanted]
            block, wanted = Block(block.events, block.rows, batches), np.isin(batches, asked)
        n = max(self.columns, default=-1)
        if n >= block.rows.shape[1]:
            raise IndexError(f"column {n} is wanted, the rows have {block.rows.shape[1]}")
        wanted = np.ones(len(block.closes), np.bool_) if wanted is None else wanted
        m, c = int(wanted.sum()), len(self.columns)
        steps = (TICKS, SECONDS, MINUTES)
        views = Views(*(np.empty((m, n, c), np.float32) for n in steps), *(np.empty((m, n), np.int64) for n in steps))  # type: ignore[arg-type]
        e = block.events
        _push(
            np.ascontiguousarray(e["ts_init"]), np.ascontiguousarray(e["instrument"]), block.rows, self.columns, block.closes, wanted,
            self._rings, self._marks, self._at, self._last, self._last_ts, (views[:3], views[3:]),
        )
        return views
