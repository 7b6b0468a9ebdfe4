"""Nodes and edges of the cross-asset graph as the stream goes by: cells of 50 ms of each instrument, rolling correlation, lead-lag.

:class:`State` is what N instruments carry along; its kernels advance it event by event. :class:`Gatherer` keeps the graphs and labels that
`gnn_train.py` learns from, in bounded memory.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from catalog.events import SCALE, TRADE, Instrument
from cift_models.labels import F64, I64, H, Labeller, Table, Thinned
from cift_models.leadlag import SIGNIFICANT, Links, end_cell, end_round, end_silence, forget, new_links, see_tick, together
from cift_models.windows import HORIZONS_NS, Block

F32 = NDArray[np.float32]

CELL_NS: Final = 50_000_000
T: Final = 16  # cells of history
ROUND: Final = 20  # cells between rounds of lead-lag estimates
SILENCE_NS: Final = 60 * SCALE  # after a longer one a move is no return
CELL: Final = ("return", "ofi", "trades", "spread", "activity")
COLUMNS: Final = (
    "spread", "imbalance_1", "microprice", "ofi_fast", "ofi_1", "ofi_slow", "trade_imbalance_1s", "trade_imbalance_8s",
    "trade_imbalance_64s", "return_1s", "return_8s", "volatility_8s", "intensity",
)  # fmt: skip
NOW: Final = (*COLUMNS, "return since the last cell", "age")
EDGE: Final = ("correlation", "lead-lag correlation", "lead", "self")
LINKED: Final = 2.0  # standard errors of rolling correlation from which on there is an edge
PAST: Final = 8  # cells of lag at which the lead-lag head's target looks
CLIP: Final = 5.0  # standard deviations
SPACING_NS: Final = 100_000_000  # decisions of an instrument that are learnt from lie so far apart
SNAPSHOT_CELLS: Final = 200  # cells between the graphs from which the edge heads learn
MEMORY: Final = 64 << 20  # bytes of gathered inputs
BINS: Final = ((T - 1, T), (T - 3, T - 1), (T - 7, T - 3), (T - 15, T - 7))  # cells: the last one, the 2 before, 4, 8
FLOWS: Final = 3 * len(BINS)  # returns, order flow and trades of an instrument in each


class State(NamedTuple):
    """What N instruments carry along the stream. The last five arrays follow from the others and are kept for a cell of time."""

    clock: I64  # (3,) running cell (-1: none yet), cell of what is kept, newest ts
    last: I64  # (N,) ts of the last event, 0: none
    mid: F64  # (N,) ticks, NaN before the first
    was: F64  # (N,) mid at the end of the last cell
    raw: F64  # (N, COLUMNS) of the last row
    volume: F64  # (N, 2) bought and sold in the running cell
    events: I64  # (N,) in the running cell
    history: F32  # (N, T, CELL) ring by cell
    links: Links
    window: F64  # (2, N, N) products of simultaneous and of lagged moves since the last snapshot
    edges: F32  # (N, N, EDGE); [i, j] is j -> i
    linked: NDArray[np.bool_]  # (N, N)
    base: F32  # (N, D)
    along: F32  # (2, N, N, D) edge attributes as the two layers see them
    lags: F32  # (N, FLOWS)


def new_state(n: int, width: int = 0) -> State:
    nan = np.full(n, np.nan)
    return State(
        np.array([-1, -1, 0]), np.zeros(n, np.int64), nan, nan.copy(), np.full((n, len(COLUMNS)), np.nan), np.zeros((n, 2)),
        np.zeros(n, np.int64), np.zeros((n, T, len(CELL)), np.float32), new_links(n), np.zeros((2, n, n)),
        np.zeros((n, n, len(EDGE)), np.float32), np.zeros((n, n), np.bool_), np.zeros((n, width), np.float32),
        np.zeros((2, n, n, width), np.float32), np.zeros((n, FLOWS), np.float32),
    )  # fmt: skip


@njit(cache=True, nogil=True)
def _close_cell(s, moves):  # type: ignore[no-untyped-def]
    """The running cell is over for every instrument."""
    n, at = len(s.mid), s.clock[0] % T
    for k in range(n):
        h, r = s.history[k, at], s.mid[k] - s.was[k]
        moves[k] = r if r == r else 0.0
        s.was[k] = s.mid[k]
        flow, spread, traded = s.raw[k, 3], s.raw[k, 0], s.volume[k, 0] + s.volume[k, 1]
        h[0] = moves[k]
        h[1] = flow if s.events[k] > 0 and flow == flow else 0.0
        h[2] = (s.volume[k, 0] - s.volume[k, 1]) / traded if traded > 0.0 else 0.0
        h[3] = spread
        h[4] = math.log(1.0 + s.events[k])
        s.volume[k, 0], s.volume[k, 1], s.events[k] = 0.0, 0.0, 0
    end_cell(s.links, moves)
    for j in range(n):
        before = 0.0
        for a in range(1, PAST + 1):
            before += s.history[j, (at - a) % T, 0]
        for i in range(n):
            s.window[0, i, j] += moves[i] * moves[j]
            s.window[1, i, j] += moves[i] * before
    s.clock[0] += 1
    if s.clock[0] % ROUND == 0:
        end_round(s.links)


@njit(cache=True, nogil=True)
def advance(s, ts, moves):  # type: ignore[no-untyped-def]
    """Bring the clock to `ts`: cells that are over get closed, all instruments together."""
    cell = ts // CELL_NS
    s.clock[2] = ts
    if s.clock[0] < 0:
        s.clock[0] = cell
    if cell > s.clock[0]:
        _close_cell(s, moves)
        if cell - s.clock[0] > T:
            end_silence(s.links, cell - s.clock[0])
            for k in range(len(s.mid)):
                for a in range(T):
                    s.history[k, a] = 0.0
                    s.history[k, a, 3] = s.raw[k, 0]
            s.clock[0] = cell
        while s.clock[0] < cell:
            _close_cell(s, moves)


@njit(cache=True, nogil=True)
def absorb(s, ts, k, mid, row, columns, action, side, size):  # type: ignore[no-untyped-def]
    """An event of instrument k, after which its features are `row`; `mid` in ticks."""
    if s.last[k] > 0 and ts - s.last[k] > SILENCE_NS:
        s.was[k] = np.nan
        forget(s.links, k)
    s.last[k] = ts
    s.events[k] += 1
    if abs(mid) < 1e15 and mid != s.mid[k]:
        s.mid[k] = mid
        see_tick(s.links, k, ts, mid)
    for c in range(len(columns)):
        s.raw[k, c] = row[columns[c]] if columns[c] >= 0 else np.nan
    if action == TRADE and side != 0:
        s.volume[k, 0 if side > 0 else 1] += size


@njit(cache=True, nogil=True)
def draw(s):  # type: ignore[no-untyped-def]
    """The edges as of the last cell's end."""
    n = len(s.mid)
    for i in range(n):
        for j in range(n):
            e = s.edges[i, j]
            e[:] = 0.0
            if i == j:
                e[3] = 1.0
                s.linked[i, j] = True
                continue
            rho, z = together(s.links, i, j)
            lead = s.links.lead[i, j]
            led = abs(lead[2]) >= SIGNIFICANT
            e[0] = rho
            if led:
                e[1] = lead[0]
                e[2] = math.copysign(math.log(1.0 + abs(lead[1]) / 5e6) / 5.0, lead[1])
            s.linked[i, j] = (abs(z) > LINKED or led) and s.mid[i] == s.mid[i] and s.mid[j] == s.mid[j]


@njit(cache=True, nogil=True)
def now_at(s, ts, out):  # type: ignore[no-untyped-def]
    """What each node is at `ts` besides its cells: (N, NOW), NaN where unknown."""
    c = s.raw.shape[1]
    for k in range(len(s.mid)):
        for j in range(c):
            out[k, j] = s.raw[k, j]
        out[k, c] = s.mid[k] - s.was[k]
        out[k, c + 1] = math.log(1.0 + (ts - s.last[k]) / 1e6) if s.last[k] > 0 else np.nan


@njit(cache=True, nogil=True)
def _pick(ts, inst, closes, newest, out):  # type: ignore[no-untyped-def]
    m = 0
    for c in closes:
        if ts[c] - newest[inst[c]] >= SPACING_NS:
            newest[inst[c]] = ts[c]
            out[m] = c
            m += 1
    return m


@njit(cache=True, nogil=True)
def _gather(  # type: ignore[no-untyped-def]
    ts, inst, mid, rows, columns, tick, action, side, size, closes, s, newest, history, now, edges, linked, snaps, snap_ts
):  # fmt: skip
    """Inputs at `closes`; every SNAPSHOT_CELLS the same into `snaps`, with what has happened since the last. Returns their number."""
    moves, c, o = np.empty(len(tick)), 0, 0
    for i in range(len(ts)):
        k = inst[i]
        advance(s, ts[i], moves)
        if newest[0] < 0:
            newest[0] = s.clock[0]
        if s.clock[0] // SNAPSHOT_CELLS > newest[0] // SNAPSHOT_CELLS:
            draw(s)
            now_at(s, ts[i], snaps[1][o])
            for a in range(T):
                snaps[0][o, :, a] = s.history[:, (s.clock[0] + a) % T]
            snaps[2][o], snaps[3][o], snaps[4][o] = s.edges, s.linked, s.window
            snap_ts[o, 0], snap_ts[o, 1] = ts[i], s.clock[0] - newest[0]
            s.window[:] = 0.0
            newest[0] = s.clock[0]
            o += 1
        absorb(s, ts[i], k, mid[i] / tick[k], rows[i], columns, action[i], side[i], size[i])
        if c < len(closes) and closes[c] == i:
            draw(s)
            now_at(s, ts[i], now[c])
            for a in range(T):
                history[c, :, a] = s.history[:, (s.clock[0] + a) % T]
            edges[c], linked[c] = s.edges, s.linked
            c += 1
    return o


class Inputs(NamedTuple):
    """Of m graphs of N nodes, oldest cell first, as gathered: ticks and depths, NaN where unknown."""

    history: F32  # (m, N, T, CELL)
    now: F32  # (m, N, NOW)
    edges: F32  # (m, N, N, EDGE)
    linked: NDArray[np.bool_]  # (m, N, N)

    def where(self, rows: Any) -> Inputs:
        parts: list[Any] = [a[rows] for a in self]
        return Inputs(*parts)


def _shapes(n: int) -> dict[str, tuple[tuple[int, ...], type]]:
    kinds = (np.float32, np.float32, np.float32, np.bool_)
    shapes = ((n, T, len(CELL)), (n, len(NOW)), (n, n, len(EDGE)), (n, n))
    return dict(zip(Inputs._fields, zip(shapes, kinds)))


class Gatherer:
    """Inputs and labels of decisions of each instrument at least SPACING_NS apart, thinned evenly so that inputs fill MEMORY at most."""

    def __init__(self, instruments: Sequence[Instrument], names: Sequence[str], most: int = 48_000) -> None:
        n = len(instruments)
        self._kinds = _shapes(n)
        row = sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in self._kinds.values())
        self._tick = np.array([i.tick / SCALE for i in instruments])
        self._columns, self._mid = places(names), list(names).index("mid")
        self._state, self._picked, self._newest = new_state(n), np.full(n, -SPACING_NS), np.full(1, -1)
        self._labeller = Labeller(instruments, HORIZONS_NS, ())
        self._held = Thinned(n, H, max(64, min(most, MEMORY // row)), **self._kinds)
        self._pairs: list[tuple[Inputs, F64, int, int]] = []
        self._snap: tuple[Inputs, int] | None = None
        self._room, self._step, self._seen = max(64, min(2_000, MEMORY // (4 * row))), 1, 0

    def push(self, block: Block) -> None:
        e, n = block.events, len(self._tick)
        if not len(e):
            return
        ts, inst = np.ascontiguousarray(e["ts_init"]), e["instrument"].astype(np.int64)
        mid, picked = np.ascontiguousarray(block.rows[:, self._mid], np.float64), np.empty(len(block.closes), np.int64)
        picked = picked[: _pick(ts, inst, np.asarray(block.closes, np.int64), self._picked, picked)]
        room = min(len(ts), int(ts[-1] - ts[0]) // (CELL_NS * SNAPSHOT_CELLS) + 2)
        got, seen = self._blank(len(picked)), self._blank(room)
        window, stamps = np.zeros((room, 2, n, n)), np.zeros((room, 2), np.int64)
        o = _gather(
            ts, inst, mid, np.ascontiguousarray(block.rows, np.float64), self._columns, self._tick, np.ascontiguousarray(e["action"]),
            np.ascontiguousarray(e["side"]), e["size"] / SCALE, picked, self._state, self._newest, *got, (*seen, window), stamps,
        )  # fmt: skip
        self._held.push(ts[picked], inst[picked], self._labeller.push(e, mid, picked), **got._asdict())
        for r in range(o):
            self._follow(seen.where(r), window[r], int(stamps[r, 0]), int(stamps[r, 1]))

    def _blank(self, m: int) -> Inputs:
        parts: list[Any] = [np.zeros((m, *shape), kind) for shape, kind in self._kinds.values()]
        return Inputs(*parts)

    def _follow(self, snap: Inputs, window: F64, ts: int, cells: int) -> None:
        """Pair the snapshot before with what has happened since, where no silence lies between."""
        if self._snap is not None and cells < 2 * SNAPSHOT_CELLS:
            if self._seen % self._step == 0:
                self._pairs.append((self._snap[0], window.copy(), self._snap[1], ts))
            self._seen += 1
            if len(self._pairs) > self._room:
                self._pairs, self._step = self._pairs[::2], 2 * self._step
        self._snap = copy.deepcopy(snap), ts

    def decisions(self) -> tuple[Table, Inputs]:
        """The decisions held with what is known of their moves; the stream has ended."""
        self._held.learn(self._labeller.finish())
        z = self._held.result()
        blank = np.zeros((len(z["ts"]), 0), np.float32)
        table = Table(z["ts"], z["instrument"], blank, np.zeros(len(blank)), z["move"], z["known_at"])
        return table, Inputs(z["history"], z["now"], z["edges"], z["linked"])

    def graphs(self, start: int, end: int) -> tuple[Inputs, F64]:
        """Snapshots taken and followed up within [start, end] (ns): inputs of p, and (p, 2, N, N) what came over the next 10 s.

        That is the realised correlation, and its lead: correlation of i's moves with those of j in the 8 cells before, less the reverse, in
        [-1, 1], > 0 where j leads i. NaN where either did not move.
        """
        mine = [p for p in self._pairs if start <= p[2] and p[3] <= end]
        if not mine:
            return self._blank(0), np.zeros((0, 2, len(self._tick), len(self._tick)))
        window = np.stack([p[1] for p in mine])
        variance = np.diagonal(window[:, 0], axis1=1, axis2=2)
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = np.where((both := variance[:, :, None] * variance[:, None, :]) > 0, np.sqrt(both), np.nan)
            out = np.stack([window[:, 0] / scale, (window[:, 1] - window[:, 1].transpose(0, 2, 1)) / scale], axis=1)
        parts: list[Any] = [np.stack(a) for a in zip(*(p[0] for p in mine))]
        return Inputs(*parts), np.clip(out, -1.0, 1.0)


def places(names: Sequence[str]) -> I64:
    """Columns of the feature rows in the order of COLUMNS, -1 where the feed has none."""
    place = {name: i for i, name in enumerate(names)}
    return np.array([place.get(c, -1) for c in COLUMNS], np.int64)


class Scales(NamedTuple):
    """Means and standard deviations by instrument: `cell` (2, N, CELL), `now` (2, N, NOW)."""

    cell: F64
    now: F64

    @classmethod
    def fit(cls, x: Inputs) -> Self:
        with np.errstate(invalid="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a column that the feed does not have
            pairs = [
                [f(a, axis=axis, dtype=np.float64) for f in (np.nanmean, np.nanstd)] for a, axis in ((x.history, (0, 2)), (x.now, 0))
            ]
        for centre, spread in pairs:
            np.nan_to_num(centre, copy=False)
            spread[~(spread > 1e-9)] = 1.0
        return cls(np.stack(pairs[0]), np.stack(pairs[1]))

    def apply(self, x: Inputs) -> tuple[F32, F32]:
        """Standardised and clipped `history` and `now`; the unknown is average."""
        parts = ((x.history - self.cell[0][:, None]) / self.cell[1][:, None], (x.now - self.now[0]) / self.now[1])
        history, now = (np.clip(np.nan_to_num(p, nan=0.0), -CLIP, CLIP).astype(np.float32) for p in parts)
        return history, now
