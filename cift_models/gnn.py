"""Cross-asset graph: what the other instruments have just done says where this one goes.

Nodes are instruments. A temporal convolution reads the last 16 cells of 50 ms of each; two graph attention layers (GATv2: Brody, Alon and
Yahav 2022) pass that along edges drawn from rolling correlation and Hayashi-Yoshida lead-lag (`leadlag.py`); heads tell direction and
size of each node's move, and for each edge the correlation and the leader to come. torch and torch-geometric train; numba serves, one
decision at a time in single precision, so any cut of the stream gives the same bits. The graph has to earn its vote: out of sample it
must beat a LASSO on the lagged flows and returns of all instruments, horizon by horizon, or it abstains there.
"""

from __future__ import annotations

import copy
import json
import math
import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from catalog.errors import InputError
from catalog.events import SCALE, TRADE, Instrument
from cift_models.labels import F64, I64, LABELS, H, Labeller, Study, Table, Thinned
from cift_models.leadlag import SIGNIFICANT, Graph, Links, end_cell, end_round, end_silence, forget, new_links, see_tick, together
from cift_models.windows import HORIZONS_NS, Block, Votes

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
ODD: Final = (  # what changes its sign when all prices are turned upside down
    "return", "ofi", "trades", "imbalance_1", "microprice", "ofi_fast", "ofi_1", "ofi_slow", "trade_imbalance_1s", "trade_imbalance_8s",
    "trade_imbalance_64s", "return_1s", "return_8s", "return since the last cell",
)  # fmt: skip
EDGE: Final = ("correlation", "lead-lag correlation", "lead", "self")
LINKED: Final = 2.0  # standard errors of rolling correlation from which on there is an edge
PAST: Final = 8  # cells of lag at which the lead-lag head's target looks
CLIP: Final = 5.0  # standard deviations
SLOPE: Final = np.float32(0.2)  # of the leaky rectifiers
SPACING_NS: Final = 100_000_000  # decisions of an instrument that are learnt from lie so far apart
SNAPSHOT_CELLS: Final = 200  # cells between the graphs from which the edge heads learn
MEMORY: Final = 64 << 20  # bytes of gathered inputs
FLOWS: Final = 12  # of the columns that :func:`lagged` gives of an instrument: returns, order flow and trades; the rest is how it stands
RIVALS: Final = ("lasso", "frequencies", "without edges", "lasso on all")  # to be beaten the first three, not to lose to the last


@dataclass(frozen=True, slots=True)
class Config:
    width: int = 24  # of a node's embedding
    filters: int = 16  # of the temporal convolution
    heads: int = 2  # of each attention layer
    steps: int = 480
    every: int = 40  # steps between looks at the validation loss
    patience: int = 4  # looks without a better one
    batch: int = 256
    rate: float = 8e-3
    decay: float = 1e-3
    average: float = 0.98  # the net that is kept is the moving average of those along the way
    worth: float = 1_000.0  # a horizon with n independent labels weighs n / (n + worth)
    max_rows: int = 24_000  # decisions that the net learns from
    validate: float = 0.2  # last share of the fit slice: early stopping, shrinkage, the LASSO's penalty
    least_rows: int = 400
    level: float = 0.05  # of the one-sided test against both rivals, over all horizons together


class State(NamedTuple):
    """What N instruments carry along the stream. The last four arrays follow from the others and are kept for a cell of time."""

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


def new_state(n: int, width: int = 0) -> State:
    nan = np.full(n, np.nan)
    return State(
        np.array([-1, -1, 0]), np.zeros(n, np.int64), nan, nan.copy(), np.full((n, len(COLUMNS)), np.nan), np.zeros((n, 2)),
        np.zeros(n, np.int64), np.zeros((n, T, len(CELL)), np.float32), new_links(n), np.zeros((2, n, n)),
        np.zeros((n, n, len(EDGE)), np.float32), np.zeros((n, n), np.bool_), np.zeros((n, width), np.float32),
        np.zeros((2, n, n, width), np.float32),
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
def _advance(s, ts, moves):  # type: ignore[no-untyped-def]
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
def _absorb(s, ts, k, mid, row, columns, action, side, size):  # type: ignore[no-untyped-def]
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
def _draw(s):  # type: ignore[no-untyped-def]
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
def _now(s, ts, out):  # type: ignore[no-untyped-def]
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
        _advance(s, ts[i], moves)
        if newest[0] < 0:
            newest[0] = s.clock[0]
        if s.clock[0] // SNAPSHOT_CELLS > newest[0] // SNAPSHOT_CELLS:
            _draw(s)
            _now(s, ts[i], snaps[1][o])
            for a in range(T):
                snaps[0][o, :, a] = s.history[:, (s.clock[0] + a) % T]
            snaps[2][o], snaps[3][o], snaps[4][o] = s.edges, s.linked, s.window
            snap_ts[o, 0], snap_ts[o, 1] = ts[i], s.clock[0] - newest[0]
            s.window[:] = 0.0
            newest[0] = s.clock[0]
            o += 1
        _absorb(s, ts[i], k, mid[i] / tick[k], rows[i], columns, action[i], side[i], size[i])
        if c < len(closes) and closes[c] == i:
            _draw(s)
            _now(s, ts[i], now[c])
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
        self._columns, self._mid = _places(names), list(names).index("mid")
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


def _places(names: Sequence[str]) -> I64:
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


class Weights(NamedTuple):
    """The net in single precision, every matrix (from, to). D wide, F filters, Q heads; layers of attention along the first axis."""

    conv_1: F32  # (2, CELL, F) two cells into one, the older first
    conv: F32  # (3, 2, F, F)
    conv_b: F32  # (4, F)
    take: F32  # (F, D)
    now: F32  # (NOW, D)
    node: F32  # (N, D)
    source: F32  # (2, D, D)
    source_b: F32  # (2, D)
    target: F32  # (2, D, D)
    target_b: F32  # (2, D)
    edge: F32  # (2, EDGE, D)
    attend: F32  # (2, Q, D / Q)
    message_b: F32  # (2, D)
    head: F32  # (D, 4 H): logits by horizon, then log sizes
    head_b: F32  # (N, 4 H), the log class frequencies in it
    pair: F32  # (D,) correlation head: tanh of sum pair_d y_id y_jd + pair_e . edge[:2] + pair_b
    pair_e: F32  # (2,)
    pair_b: F32  # (1,)
    lead: F32  # (D,) lead-lag head: tanh of lead . (y_j - y_i) + lead_e edge[2]
    lead_e: F32  # (1,)


@njit(cache=True, nogil=True, inline="always")
def _leaky(x):  # type: ignore[no-untyped-def]
    return x if x > 0 else x * SLOPE


@njit(cache=True, nogil=True)
def _add(x, w, out):  # type: ignore[no-untyped-def]
    """out += x w, the terms in order: every row of any block gets the same bits."""
    for c in range(len(x)):
        v = x[c]
        for o in range(len(out)):
            out[o] += v * w[c, o]


@njit(cache=True, nogil=True)
def _standard(x, centre, spread, out):  # type: ignore[no-untyped-def]
    for c in range(len(out)):
        v = (x[c] - centre[c]) / spread[c]
        out[c] = np.float32(min(max(v, -CLIP), CLIP) if v == v else 0.0)


@njit(cache=True, nogil=True)
def _embed(w, scales, history, first, base):  # type: ignore[no-untyped-def]
    """Temporal convolution over `history` (N, T, CELL), a ring that begins at `first`: into `base` (N, D)."""
    cells, layer = np.empty((T, history.shape[2]), np.float32), np.empty((T // 2, w.conv_b.shape[1]), np.float32)
    for k in range(len(history)):
        for a in range(T):
            _standard(history[k, (first + a) % T], scales.cell[0, k], scales.cell[1, k], cells[a])
        for a in range(T // 2):
            layer[a] = w.conv_b[0]
            _add(cells[2 * a], w.conv_1[0], layer[a])
            _add(cells[2 * a + 1], w.conv_1[1], layer[a])
            for f in range(layer.shape[1]):
                layer[a, f] = _leaky(layer[a, f])
        steps, spare = T // 4, np.empty(layer.shape[1], np.float32)
        for d in range(3):
            for a in range(steps):
                spare[:] = w.conv_b[1 + d]
                _add(layer[2 * a], w.conv[d, 0], spare)
                _add(layer[2 * a + 1], w.conv[d, 1], spare)
                for f in range(len(spare)):
                    layer[a, f] = _leaky(spare[f])
            steps //= 2
        base[k] = w.node[k]
        _add(layer[0], w.take, base[k])


@njit(cache=True, nogil=True)
def _edges(w, edges, along):  # type: ignore[no-untyped-def]
    for layer in range(2):
        for i in range(len(edges)):
            for j in range(len(edges)):
                along[layer, i, j] = np.float32(0.0)
                _add(edges[i, j], w.edge[layer], along[layer, i, j])


@njit(cache=True, nogil=True)
def _attention(w, layer, i, x, sources, along, linked, score, out):  # type: ignore[no-untyped-def]
    """Into node i (Brody et al. 2022, eq. 7): out (D,) = leaky(x_i + b + sum_j softmax_j(a . leaky(S x_j + T x_i + E e_ij)) S x_j)."""
    n, d = sources.shape
    heads = w.attend.shape[1]
    each = d // heads
    mine = score[n]
    mine[:d] = w.target_b[layer]
    _add(x[i], w.target[layer], mine[:d])
    for o in range(d):
        out[o] = x[i, o] + w.message_b[layer, o]
    for q in range(heads):
        top = np.float32(-np.inf)
        for j in range(n):
            if linked[i, j]:
                s = np.float32(0.0)
                for o in range(q * each, (q + 1) * each):
                    s += w.attend[layer, q, o - q * each] * _leaky(sources[j, o] + mine[o] + along[layer, i, j, o])
                score[j, q] = s
                top = max(top, s)
        total = np.float32(0.0)
        for j in range(n):
            if linked[i, j]:
                score[j, q] = np.exp(score[j, q] - top)
                total += score[j, q]
        for j in range(n):
            if linked[i, j]:
                share = score[j, q] / total
                for o in range(q * each, (q + 1) * each):
                    out[o] += share * sources[j, o]
    for o in range(d):
        out[o] = _leaky(out[o])


@njit(cache=True, nogil=True)
def _answer(w, scales, k, now, base, along, linked, work, out):  # type: ignore[no-untyped-def]
    """Node k's embedding into `work[4][k]` (D,) and its 4 H raw outputs into `out`, from `now` (N, NOW) and what the cell's end left."""
    x, sources, middle, score, last, standard = work
    n = len(base)
    for j in range(n):
        _standard(now[j], scales.now[0, j], scales.now[1, j], standard)
        x[j] = base[j]
        _add(standard, w.now, x[j])
        for o in range(x.shape[1]):
            x[j, o] = _leaky(x[j, o])
        sources[j] = w.source_b[0]
        _add(x[j], w.source[0], sources[j])
    for j in range(n):
        if linked[k, j]:
            _attention(w, 0, j, x, sources, along, linked, score, middle[j])
    for j in range(n):
        if linked[k, j]:
            sources[j] = w.source_b[1]
            _add(middle[j], w.source[1], sources[j])
    _attention(w, 1, k, middle, sources, along, linked, score, last[k])
    out[:] = w.head_b[k]
    _add(last[k], w.head, out)


@njit(cache=True, nogil=True)
def _work(w):  # type: ignore[no-untyped-def]
    n, d = w.node.shape
    f32 = np.float32
    return (
        np.empty((n, d), f32), np.empty((n, d), f32), np.empty((n, d), f32), np.empty((n + 1, d), f32), np.empty((n, d), f32),
        np.empty(w.now.shape[0], f32),
    )  # fmt: skip


@njit(cache=True, nogil=True)
def _outputs(w, scales, history, now, edges, linked, inst, out):  # type: ignore[no-untyped-def]
    """`out` (m, 4 H) of the nodes `inst` (m,) of gathered inputs."""
    work, (n, d) = _work(w), w.node.shape
    base, along = np.empty((n, d), np.float32), np.empty((2, n, n, d), np.float32)
    for r in range(len(inst)):
        _embed(w, scales, history[r], 0, base)
        _edges(w, edges[r], along)
        _answer(w, scales, inst[r], now[r], base, along, linked[r], work, out[r])


@njit(cache=True, nogil=True)
def _remember(w, scales, s):  # type: ignore[no-untyped-def]
    """Once for each cell of time: edges and what the convolution makes of the history."""
    if s.clock[1] != s.clock[0]:
        s.clock[1] = s.clock[0]
        _draw(s)
        _embed(w, scales, s.history, s.clock[0] % T, s.base)
        _edges(w, s.edges, s.along)


@njit(cache=True, nogil=True)
def _vote(out, h, size, proba):  # type: ignore[no-untyped-def]
    top = max(out[3 * h], out[3 * h + 1], out[3 * h + 2])
    total = 0.0
    for c in range(3):
        proba[c] = math.exp(np.float64(out[3 * h + c] - top))
        total += proba[c]
    for c in range(3):
        proba[c] /= total
    return size * math.exp(np.float64(min(max(out[3 * H + h], np.float32(-3.0)), np.float32(3.0))))


@njit(cache=True, nogil=True)
def _serve(  # type: ignore[no-untyped-def]
    ts, inst, mid, rows, columns, tick, action, side, size, closes, w, scales, votes, sizes, s, proba, magnitude
):  # fmt: skip
    n = len(tick)
    moves, now, out, work, c = np.empty(n), np.empty((n, len(NOW))), np.empty(4 * H, np.float32), _work(w), 0
    for i in range(len(ts)):
        k = inst[i]
        _advance(s, ts[i], moves)
        _absorb(s, ts[i], k, mid[i] / tick[k], rows[i], columns, action[i], side[i], size[i])
        if c == len(closes) or closes[c] != i:
            continue
        proba[c] = np.nan
        magnitude[c] = np.nan
        some, others = False, 0
        for h in range(H):
            some |= votes[k, h]
        for j in range(n):
            others += 1 if s.mid[j] == s.mid[j] else 0
        if some and others > 1 and s.mid[k] == s.mid[k]:
            _remember(w, scales, s)
            _now(s, ts[i], now)
            _answer(w, scales, k, now, s.base, s.along, s.linked, work, out)
            for h in range(H):
                if votes[k, h]:
                    magnitude[c, h] = _vote(out, h, sizes[k, h], proba[c, h])
        c += 1


def torch_net(n: int, config: Config) -> Any:
    """The same net as a torch module with torch-geometric's GATv2Conv: the one that is trained, and the twin of the serving code.

    `forward(history, now, edges, linked)`: standardised float32 tensors shaped as :class:`Inputs`; gives (y (m, N, D), out (m, N, 4 H)
    without the class frequencies). `pairs(y, edges)`: (correlation, lead) heads, (m, N, N) each.
    """
    import torch
    from torch import nn
    from torch_geometric.nn import GATv2Conv

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            d, f = config.width, config.filters
            self.convs = nn.ModuleList([nn.Linear(2 * (len(CELL) if a == 0 else f), f) for a in range(4)])  # two steps become one
            self.take, self.now = nn.Linear(f, d), nn.Linear(len(NOW), d, bias=False)
            self.node = nn.Parameter(torch.zeros(n, d))
            self.attention = nn.ModuleList(
                [
                    GATv2Conv(d, d // config.heads, config.heads, edge_dim=len(EDGE), add_self_loops=False, negative_slope=float(SLOPE))
                    for _ in range(2)
                ]
            )
            self.head = nn.Linear(d, 4 * H)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
            self.pair, self.pair_e, self.pair_b = (nn.Parameter(torch.zeros(size)) for size in (d, 2, 1))
            self.lead, self.lead_e = (nn.Parameter(torch.zeros(size)) for size in (d, 1))

        def forward(self, history: Any, now: Any, edges: Any, linked: Any) -> Any:
            leaky, m = nn.functional.leaky_relu, len(history)
            x = history
            for conv in self.convs:
                x = leaky(conv(x.reshape(m, n, x.shape[2] // 2, -1)), float(SLOPE))
            y = leaky(self.take(x[:, :, 0]) + self.node + self.now(now), float(SLOPE)).flatten(0, 1)
            b, i, j = linked.nonzero(as_tuple=True)
            index, attributes = torch.stack([b * n + j, b * n + i]), edges[b, i, j]
            for attention in self.attention:
                y = leaky(y + attention(y, index, attributes), float(SLOPE))
            y = y.view(m, n, -1)
            return y, self.head(y)

        def pairs(self, y: Any, edges: Any) -> Any:
            together = torch.einsum("bid,bjd,d->bij", y, y, self.pair) + edges[..., :2] @ self.pair_e + self.pair_b
            return together.tanh(), ((y @ self.lead)[:, None, :] - (y @ self.lead)[:, :, None] + edges[..., 2] * self.lead_e).tanh()

    return Net()


def _weights(net: Any, prior: F32) -> Weights:
    def a(t: Any) -> F32:
        return np.ascontiguousarray(t.detach().numpy().astype(np.float32))

    def pairs(layer: Any) -> F32:
        return a(layer.weight.T).reshape(2, -1, layer.out_features)

    convs = net.convs
    def both(name: str) -> F32:
        return np.stack([a(operator.attrgetter(name)(g)) for g in net.attention])

    return Weights(
        pairs(convs[0]), np.stack([pairs(c) for c in convs[1:]]), np.stack([a(c.bias) for c in convs]),
        a(net.take.weight.T), a(net.now.weight.T), a(net.node + net.take.bias), both("lin_l.weight.T"), both("lin_l.bias"),
        both("lin_r.weight.T"), both("lin_r.bias"), both("lin_edge.weight.T"), both("att")[:, 0], both("bias"), a(net.head.weight.T),
        a(net.head.bias) + prior, a(net.pair), a(net.pair_e), a(net.pair_b), a(net.lead), a(net.lead_e),
    )  # fmt: skip


class Sample(NamedTuple):
    """Decisions to learn from: inputs, node (m,), class (m, H) -1 where there is none, |move| over its mean (m, H)."""

    x: Inputs
    node: I64
    y: NDArray[np.int8]
    size: F64


class Task(NamedTuple):
    """What the net learns from: decisions to fit, later ones to stop by, `graphs` and what came after each (p, 2, N, N); the log class
    frequencies `prior` (N, 4 H), the weight of each horizon (H,)."""

    fit: Sample
    check: Sample
    graphs: Inputs
    came: F64
    scales: Scales
    prior: F32
    weight: F64


def train(task: Task, config: Config, seed: int) -> Weights:
    """Fit the net, stop by the log-loss on `check`, and shrink each horizon towards the class frequencies as `check` likes best.

    Every other graph is shown mirrored: all prices upside down, up and down exchanged. Deterministic for a seed.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums of another number of threads round otherwise
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _descend(torch, task, config, np.random.default_rng(seed))
    finally:
        torch.set_num_threads(threads)


def _descend(torch: Any, task: Task, config: Config, rng: np.random.Generator) -> Weights:
    fit, check, n = task.fit, task.check, len(task.prior)
    net, kept = torch_net(n, config), torch_net(n, config)
    kept.load_state_dict(net.state_dict())
    adam = torch.optim.AdamW(net.parameters(), config.rate, weight_decay=config.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, config.rate, total_steps=config.steps)
    odd = [torch.tensor([float(c in ODD) for c in columns]) for columns in (CELL, NOW)]
    upright = task.prior[:, : 3 * H].reshape(n, H, 3)
    offset = torch.from_numpy(np.stack([upright, upright[:, :, ::-1]]))
    weight = torch.from_numpy(task.weight.astype(np.float32))

    def tensors(x: Inputs) -> list[Any]:
        return [torch.from_numpy(np.ascontiguousarray(a)) for a in (*task.scales.apply(x), x.edges, x.linked)]

    def losses(out: Any, sample: Sample, rows: Any, mirrored: NDArray[np.bool_]) -> tuple[Any, Any]:
        node, y = sample.node[rows], sample.y[rows].astype(np.int64)
        y = torch.from_numpy(np.where(mirrored[:, None] & (y >= 0), 2 - y, y).flatten())
        out, known = out[np.arange(len(node)), node], y >= 0
        logits = (out[:, : 3 * H].view(-1, H, 3) + offset[mirrored.astype(np.int64), node]).view(-1, 3)
        w = weight.repeat(len(node))[known]
        total = w.sum().clamp(min=1e-9)
        m = out[:, 3 * H :].clamp(-3, 3).flatten()[known]
        size = torch.from_numpy(sample.size[rows].astype(np.float32)).flatten()[known]
        cross = torch.nn.functional.cross_entropy(logits[known], y[known], reduction="none")
        return (w * cross).sum() / total, (w * (size * (-m).exp() + m)).sum() / total

    x_fit, x_check, x_graphs = tensors(fit.x), tensors(check.x), tensors(task.graphs)
    came = torch.from_numpy(task.came.astype(np.float32))
    best, best_loss, stale = {k: v.clone() for k, v in kept.state_dict().items()}, math.inf, 0
    order = rng.permutation(len(fit.node))
    for step in range(1, config.steps + 1):
        while len(order) < config.batch:
            order = np.concatenate([order, rng.permutation(len(fit.node))])
        rows, order = order[: config.batch], order[config.batch :]
        mirrored, some = rng.random(len(rows)) < 0.5, rng.integers(0, max(1, len(came)), min(32, len(came)))
        sign = torch.from_numpy(np.append(np.where(mirrored, -2.0, 0.0), np.zeros(len(some))).astype(np.float32))[:, None, None]
        x = [torch.cat([a[rows], b[some]]) for a, b in zip(x_fit, x_graphs)]
        y, out = net(x[0] * (1 + sign[..., None] * odd[0]), x[1] * (1 + sign * odd[1]), *x[2:])
        loss, size = losses(out, fit, rows, mirrored)
        loss = loss + 0.1 * size
        error = torch.stack(net.pairs(y[len(rows) :], x[2][len(rows) :]), 1) - came[some]
        known = ~(torch.isnan(error) | torch.eye(n, dtype=torch.bool))
        if known.any():
            loss = loss + 0.1 * (error[known] ** 2).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adam.step()
        schedule.step()
        with torch.no_grad():
            for old, new in zip(kept.parameters(), net.parameters()):
                old.lerp_(new, 1 - min(config.average, step / (step + 10)))
        if step % config.every and step < config.steps:
            continue
        with torch.no_grad():
            loss = float(losses(kept(*x_check)[1], check, slice(None), np.zeros(len(check.node), np.bool_))[0])
        if loss < best_loss - 1e-5:
            best, best_loss, stale = {k: v.clone() for k, v in kept.state_dict().items()}, loss, 0
        elif (stale := stale + 1) >= config.patience:
            break
    kept.load_state_dict(best)
    weights = _weights(kept, task.prior)
    return _shrunk(weights, task.prior, _all_outputs(weights, task.scales, check.x, check.node), check)


def _all_outputs(w: Weights, scales: Scales, x: Inputs, node: I64) -> F32:
    out = np.empty((len(node), 4 * H), np.float32)
    _outputs(w, scales, *x, node, out)
    return out


def _shrunk(w: Weights, prior: F32, out: F32, check: Sample) -> Weights:
    """Each horizon's log-odds times the factor in [0, 1.2] with which `check` is likeliest; 0 leaves the class frequencies."""
    head, head_b = w.head.copy(), w.head_b.copy()
    for h in range(H):
        at, known = slice(3 * h, 3 * h + 3), check.y[:, h] >= 0
        base, y = prior[check.node[known], at], check.y[known, h]
        tilt = out[known, at] - base
        factor = min(np.arange(0, 1.25, 0.1), key=lambda f: float(_loss(_softmax(base + f * tilt), y).mean()) if len(y) else f)
        head[:, at] *= np.float32(factor)
        head_b[:, at] = prior[:, at] + np.float32(factor) * (head_b[:, at] - prior[:, at])
    return w._replace(head=head, head_b=head_b)


def _softmax(z: NDArray[Any]) -> F64:
    e = np.exp(z - z.max(axis=1, keepdims=True), dtype=np.float64)
    return e / e.sum(axis=1, keepdims=True)


def _rates(y: NDArray[np.int8]) -> F64:
    """Class frequencies, with a tenth of a decision of each class on top: none is impossible."""
    return (np.bincount(y, minlength=3).astype(np.float64) + 0.1) / (len(y) + 0.3)


def _loss(p: F64, y: NDArray[np.int8]) -> F64:
    return -np.log(np.maximum(p[np.arange(len(y)), y], 1e-6))


def lagged(history: F32, now: F32) -> F64:
    """What the LASSO sees of every instrument, from standardised inputs: returns, order flow and trades summed over 1, 2, 4 and 8 cells
    back from the decision, one after the other (FLOWS columns), then all of `now`; (m, N x 27)."""
    bins = [history[:, :, a:b, :3].sum(axis=2) for a, b in ((T - 1, T), (T - 3, T - 1), (T - 7, T - 3), (T - 15, T - 7))]
    return np.concatenate([*bins, now], axis=2).reshape(len(now), -1).astype(np.float64)


def lasso(x: F64, y: NDArray[np.int8], x_check: F64, y_check: NDArray[np.int8], x_test: F64) -> F64:
    """P(down, flat, up) (k, 3) of `x_test` by l1-penalised multinomial regression (Tibshirani 1996) of y (m,) on x (m, K).

    The penalty runs down from the one at which all slopes vanish, as long as the loss on `x_check`, `y_check` falls.
    """
    from sklearn.linear_model import LogisticRegression

    classes, n = np.unique(y), len(y)
    rates = _rates(y)
    answer = np.tile(rates, (len(x_test), 1))
    if len(classes) < 2 or not len(y_check):
        return answer
    centre, spread = x.mean(axis=0), x.std(axis=0)
    spread[~(spread > 1e-9)] = np.inf
    x, x_check, x_test = ((a - centre) / spread for a in (x, x_check, x_test))
    least = float(_loss(np.tile(rates, (len(y_check), 1)), y_check).mean())
    top = float(np.abs(x.T @ (np.eye(3)[y] - rates)).max()) / n
    for share in (0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05, 0.02):
        if not top > 0:
            break
        model = LogisticRegression(l1_ratio=1.0, solver="saga", C=1 / (share * top * n), tol=1e-2, max_iter=200, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(x, y)
        p_check, p = (np.zeros((len(a), 3)) for a in (x_check, x_test))
        p_check[:, model.classes_], p[:, model.classes_] = model.predict_proba(x_check), model.predict_proba(x_test)
        loss = float(_loss(p_check, y_check).mean())
        if loss > least + 1e-3:
            break
        if loss < least:
            least, answer = loss, p
    return answer


class Gnn:
    """The member. `votes` (I, H): where it votes, for it has earned it; `sizes` (I, H) mean |move|, ticks; `tick` (I,) price units.

    `comparison`: what it was measured by, out of sample; :meth:`report` says it in words.
    """

    name = "gnn"

    def __init__(
        self, names: Sequence[str], ids: Sequence[str], multiplier: F64, tick: F64, weights: Weights, scales: Scales,
        votes: NDArray[np.bool_], sizes: F64, comparison: dict[str, Any],
    ) -> None:  # fmt: skip
        self.ids, self.multiplier, self.tick, self.weights, self.scales = tuple(ids), multiplier, tick, weights, scales
        self.votes, self.sizes, self.comparison = votes, sizes, comparison
        self._columns, self._mid = _places(names), list(names).index("mid")

    @staticmethod
    def gatherer(instruments: Sequence[Instrument], names: Sequence[str]) -> Gatherer:
        return Gatherer(instruments, names)

    @classmethod
    def fit(cls, study: Study, gathered: Gatherer, config: Config | None = None) -> Self:
        """The net on the fit slice, its comparison with the LASSO and with class frequencies on the calibration slice.

        Deterministic for `study.seed`. Raises InputError with a single instrument, or where too few decisions of two of them have labels.
        """
        config, n = config or Config(), len(study.instruments)
        if n < 2:
            raise InputError("a cross-asset graph needs two instruments, there is one: it abstains; name more to have it vote")
        table, x = gathered.decisions()
        own = study._replace(table=table)
        classes = np.full((len(table.ts), H), -1, np.int8)
        tested = np.full((len(table.ts), H), -1, np.int8)
        for h in study.usable:
            y = own.classes(h)
            for to, rows in ((classes, own.fit_rows(h)), (tested, own.calibration_rows(h))):
                to[rows, h] = y[rows]
        rows = np.flatnonzero((classes >= 0).any(axis=1))
        active = np.bincount(table.instrument[rows], minlength=n)
        if len(rows) < config.least_rows or (active > 0).sum() < 2:
            raise InputError(
                f"a cross-asset graph needs {config.least_rows} decisions (0.1 s apart) with labels, of two instruments, in the fit slice; "
                f"there are {len(rows)} of {(active > 0).sum()}: give a longer range"
            )
        cut = int(table.ts[rows[int(len(rows) * (1 - config.validate))]])
        early = np.where(table.known_at <= cut, classes, -1)
        late = np.where(table.ts[:, None] >= cut, classes, -1)
        sizes = np.ones((n, H))
        prior = np.zeros((n, 4 * H), np.float32)
        for k in range(n):
            for h in range(H):
                mine = (table.instrument == k) & (early[:, h] >= 0)
                moved = np.abs(table.move[mine, h])
                sizes[k, h] = moved.mean() if moved.any() else 1.0
                prior[k, 3 * h : 3 * h + 3] = np.log(_rates(early[mine, h]))
        scales = Scales.fit(x.where(rows))

        def sample(y: NDArray[np.int8], most: int) -> Sample:
            some = np.flatnonzero((y >= 0).any(axis=1))
            some = some[:: max(1, -(-len(some) // most))]
            size = np.nan_to_num(np.abs(table.move[some]) / sizes[table.instrument[some]])
            return Sample(x.where(some), table.instrument[some], y[some], size)

        fit, check, test = sample(early, config.max_rows), sample(late, config.max_rows // 3), sample(tested, len(table.ts))
        n_eff = np.array([own.independent(np.flatnonzero(early[:, h] >= 0), h) for h in range(H)], np.float64)
        task = Task(fit, check, *gathered.graphs(study.split.start, cut), scales, prior, n_eff / (n_eff + config.worth))
        weights = train(task, config, study.seed)
        ids, multiplier = [i.id for i in study.instruments], np.array([i.multiplier for i in study.instruments])
        tick = np.array([i.tick / SCALE for i in study.instruments])
        me = cls(study.names, ids, multiplier, tick, weights, scales, np.zeros((n, H), np.bool_), sizes, {})
        at = np.flatnonzero((tested >= 0).any(axis=1))
        me._compare(study, fit, check, test, table.ts[at], config)
        later = gathered.graphs(study.split.calibrate, study.split.weigh)
        me.comparison["edges"] = me._edge_scores(*later)
        return me

    def _compare(self, study: Study, fit: Sample, check: Sample, test: Sample, ts: I64, config: Config) -> None:
        """Fill `comparison` and `votes`. A horizon votes where over all instruments together (block bootstrap) its gain lies above zero
        against the LASSO on lagged flows and returns, against class frequencies and against itself with all edges cut, and not below zero
        against a LASSO that is given every input of the graph; of its instruments those vote that gain in the mean."""
        from cift_models.validate import block_bootstrap

        out = _all_outputs(self.weights, self.scales, test.x, test.node)
        alone = test.x._replace(linked=np.broadcast_to(np.eye(len(self.ids), dtype=np.bool_), test.x.linked.shape))
        cut = _all_outputs(self.weights, self.scales, alone, test.node)
        views = [lagged(*self.scales.apply(s.x)) for s in (fit, check, test)]
        flows = np.tile(np.arange(views[0].shape[1] // len(self.ids)) < FLOWS, len(self.ids))
        level = 1 - 2 * config.level / max(1, len(study.usable))
        table: list[dict[str, Any]] = []
        for h in study.usable:
            known = np.flatnonzero(test.y[:, h] >= 0)
            if not len(known):
                continue
            y, node = test.y[known, h], test.node[known]
            rivals = {name: np.empty((len(known), 3)) for name in RIVALS}
            for k in np.unique(node):
                a, b, c = (np.flatnonzero((s.node == k) & (s.y[:, h] >= 0)) for s in (fit, check, test))
                for name, columns in (("lasso", flows), ("lasso on all", slice(None))):
                    x = [v[i][:, columns] for v, i in zip(views, (a, b, c))]
                    rivals[name][node == k] = lasso(x[0], fit.y[a, h], x[1], check.y[b, h], x[2])
                rivals["frequencies"][node == k] = _rates(fit.y[a, h])
            ours = _loss(_softmax(out[known, 3 * h : 3 * h + 3]), y)
            rivals["without edges"] = _softmax(cut[known, 3 * h : 3 * h + 3])
            losses = {"gnn": _mean(ours)}
            row: dict[str, Any] = {"horizon": LABELS[h], "n": len(y), "log_loss": losses, "gain": {}}
            table.append(row)
            mean, bounds, gains = np.zeros((len(rivals), len(self.ids))), [], row["gain"]
            for r, (name, p) in enumerate(rivals.items()):
                gain = _loss(p, y) - ours
                interval = block_bootstrap(gain, ts[known], 2 * HORIZONS_NS[h], study.seed, level=level)
                losses[name] = _mean(_loss(p, y))
                gains[name] = {"mean": _mean(gain), "interval": [None if np.isnan(v) else v for v in interval]}
                mean[r] = np.bincount(node, weights=gain, minlength=len(self.ids))
                bounds.append(interval)
            earned = len(np.unique(y)) > 1 and all(b.low > 0 for b in bounds[:3]) and bounds[3].high > 0
            self.votes[:, h] = earned & (mean[:2] > 0).all(axis=0)
            row["votes"] = [id_ for id_, v in zip(self.ids, self.votes[:, h]) if v]
        self.comparison = {"level": level, "horizons": table}

    def _edge_scores(self, x: Inputs, target: F64) -> dict[str, Any]:
        """Mean squared errors on the snapshots of the calibration slice: of the heads, of rolling correlation as it stands, of zero."""
        heads = np.array([self._pair_heads(*x.where(r)) for r in range(len(target))]).reshape(target.shape)
        known = np.isfinite(target) & ~np.eye(target.shape[2], dtype=np.bool_)
        out: dict[str, Any] = {"snapshots": len(target)}
        rolling: list[Any] = [x.edges[..., 0], np.zeros(target[:, 1].shape)]
        for q, (name, still) in enumerate(zip(("correlation", "lead"), rolling)):
            k = known[:, q]
            if k.any():
                true = target[:, q][k]
                out[name] = {
                    "gnn": _mean((heads[:, q][k] - true) ** 2), "rolling": _mean((still[k] - true) ** 2), "zero": _mean(true**2),
                    "sign": _mean((np.sign(heads[:, q][k]) == np.sign(true))[true != 0]),
                }  # fmt: skip
        return out

    def _pair_heads(self, history: F32, now: F32, edges: F32, linked: NDArray[np.bool_]) -> F64:
        """(2, N, N): the correlation and the lead (> 0: j of i) to come, of one graph as gathered."""
        w, n = self.weights, len(self.ids)
        work, base = _work(w), np.empty((n, w.node.shape[1]), np.float32)
        along, out, y = np.empty((2, n, n, w.node.shape[1]), np.float32), np.empty(4 * H, np.float32), np.empty((n, w.node.shape[1]))
        _embed(w, self.scales, history, 0, base)
        _edges(w, edges, along)
        for k in range(n):
            _answer(w, self.scales, k, now, base, along, linked, work, out)
            y[k] = work[4][k]
        lead = y @ w.lead
        both = np.einsum("id,jd,d->ij", y, y, w.pair) + edges[..., :2] @ w.pair_e + w.pair_b
        return np.tanh(np.stack([both, lead[None, :] - lead[:, None] + edges[..., 2] * w.lead_e]))

    def new_state(self) -> State:
        return new_state(len(self.tick), self.weights.node.shape[1])

    def predict(self, block: Block, state: State) -> Votes:
        """Votes at each close, `state` advanced in place. NaN where the horizon has not earned its vote for the instrument, before the
        instrument has a mid, and while it is the only one with a mid."""
        e, m = block.events, len(block.closes)
        rows = np.ascontiguousarray(block.rows, np.float64)
        votes = Votes(np.empty((m, H, 3)), np.empty((m, H)))
        _serve(
            np.ascontiguousarray(e["ts_init"]), e["instrument"].astype(np.int64), np.ascontiguousarray(rows[:, self._mid]), rows,
            self._columns, self.tick, np.ascontiguousarray(e["action"]), np.ascontiguousarray(e["side"]), e["size"] / SCALE,
            np.asarray(block.closes, np.int64), self.weights, self.scales, self.votes, self.sizes, state, *votes,
        )  # fmt: skip
        return votes

    def graph(self, state: State) -> Graph:
        """How the instruments hang together as of the newest event: for :func:`leadlag.hedge`, :func:`leadlag.contagion` and the eye."""
        n, s = len(self.ids), state
        unit, lead = self.tick * self.multiplier, s.links.lead
        both = np.array([[together(s.links, i, j)[0] if i != j else 1.0 for j in range(n)] for i in range(n)])
        with np.errstate(divide="ignore", invalid="ignore"):
            beta = np.nan_to_num(lead[..., 3] / lead[..., 4]) * unit[:, None] / unit[None, :]
        _draw(s)
        s.clock[1] = -1
        now = np.empty((n, len(NOW)))
        _now(s, s.clock[2], now)
        history = np.roll(s.history, -int(s.clock[0] % T), axis=1)
        ahead, leads = self._pair_heads(history, now.astype(np.float32), s.edges, s.linked)
        return Graph(self.ids, both, lead[..., 0].copy(), lead[..., 1].astype(np.int64), lead[..., 2].copy(), beta, ahead, leads)

    def impulse(self, state: State, node: int, ticks: float) -> F64:
        """(N, H): by how many ticks the expected move of every instrument changes if the mid of `node` were `ticks` higher now.

        The net's own answer, P(up) - P(down) times the expected |move|, with and without the shock; all horizons, earned or not.
        """
        n, w, answers = len(self.ids), self.weights, []
        for shock in (0.0, ticks):
            s = copy.deepcopy(state)
            s.mid[node] += shock
            s.clock[1] = -1
            _remember(w, self.scales, s)
            now, work, out = np.empty((n, len(NOW))), _work(w), np.empty(4 * H, np.float32)
            _now(s, s.clock[2], now)
            expected = np.zeros((n, H))
            for k in range(n):
                _answer(w, self.scales, k, now, s.base, s.along, s.linked, work, out)
                for h in range(H):
                    p = np.empty(3)
                    size = _vote(out, h, self.sizes[k, h], p)
                    expected[k, h] = (p[2] - p[0]) * size
            answers.append(expected)
        return answers[1] - answers[0]

    def report(self) -> list[str]:
        """The comparison in lines of text: where the graph votes, and why it does not elsewhere."""
        lines = []
        for row in self.comparison["horizons"]:
            gain, losses = row["gain"], ", ".join(f"{name} {loss:.4f}" for name, loss in row["log_loss"].items())
            low = {name: gain[name]["interval"][0] for name in RIVALS[:3]}
            beaten = [f"{name} ({v:+.4f})" for name, v in low.items() if v is not None and v <= 0]
            if row["votes"]:
                verdict = f"votes for {', '.join(row['votes'])}"
            elif None in low.values():
                verdict = f"abstains: {row['n']} labels of the calibration slice span too little time to tell"
            elif beaten:
                verdict = f"abstains: no gain beyond noise over {', '.join(beaten)}"
            else:
                verdict = "abstains: a LASSO on all of its inputs does better"
            lines.append(f"gnn {row['horizon']}: log-loss {losses}; {verdict}")
        return lines

    def save(self, folder: Path) -> None:
        from safetensors.numpy import save_file

        parts = {"multiplier": self.multiplier, "tick": self.tick, "votes": self.votes, "sizes": self.sizes}
        parts |= {f"scales.{k}": v for k, v in self.scales._asdict().items()} | {f"net.{k}": v for k, v in self.weights._asdict().items()}
        save_file({k: np.ascontiguousarray(v) for k, v in parts.items()}, folder / "gnn.safetensors")
        (folder / "gnn.json").write_text(json.dumps({"ids": self.ids, "comparison": self.comparison}, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, folder: Path, names: Sequence[str]) -> Self:
        """Raises InputError, naming the file, where one is absent or not what :meth:`save` writes."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = folder / "gnn.safetensors"
        try:
            told, z = json.loads((folder / "gnn.json").read_text()), load_file(path)
            weights = Weights(*(z[f"net.{f}"] for f in Weights._fields))
            scales = Scales(z["scales.cell"], z["scales.now"])
            rest = z["votes"], z["sizes"], told["comparison"]
            return cls(names, told["ids"], z["multiplier"], z["tick"], weights, scales, *rest)
        except (OSError, ValueError, KeyError, SafetensorError) as e:
            raise InputError(f"{path} or gnn.json beside it is no graph of this version ({e}): train again") from e


def _mean(v: NDArray[Any]) -> float | None:
    return float(v.mean()) if len(v) else None

