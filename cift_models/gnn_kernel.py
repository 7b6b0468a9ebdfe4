"""The graph network that serves: temporal convolution, two GATv2 layers (Brody, Alon and Yahav 2022, eq. 7) and heads, in numba.

Works decision by decision in single precision, every sum in one order, so any cut of the stream gives the same bits.
:func:`gnn_train.torch_net` is its twin in torch-geometric.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
from numba import njit

from cift_models.gnn_stream import BINS, CLIP, F32, FLOWS, NOW, Inputs, Scales, T, absorb, advance, draw, now_at
from cift_models.labels import I64, H

SLOPE: Final = np.float32(0.2)  # of the leaky rectifiers


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
    wide: F32  # (N, N (FLOWS + NOW), 4 H) from what :func:`lagged` gives to the node's outputs
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
def embed(w, scales, history, first, base, lags):  # type: ignore[no-untyped-def]
    """Temporal convolution over `history` (N, T, CELL), a ring that begins at `first`: into `base` (N, D); sums over BINS into `lags`."""
    cells, layer = np.empty((T, history.shape[2]), np.float32), np.empty((T // 2, w.conv_b.shape[1]), np.float32)
    for k in range(len(history)):
        for a in range(T):
            _standard(history[k, (first + a) % T], scales.cell[0, k], scales.cell[1, k], cells[a])
        lags[k] = np.float32(0.0)
        for b in range(len(BINS)):
            for a in range(BINS[b][0], BINS[b][1]):
                for c in range(3):
                    lags[k, 3 * b + c] += cells[a, c]
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
def edges_along(w, edges, along):  # type: ignore[no-untyped-def]
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
def answer(w, scales, k, now, base, along, lags, linked, work, out):  # type: ignore[no-untyped-def]
    """Node k's embedding into `work[4][k]` (D,) and its 4 H raw outputs into `out`, from `now` (N, NOW) and what the cell's end left."""
    out[:] = w.head_b[k]
    each = FLOWS + len(now[0])
    x, sources, middle, score, last, standard = work
    n = len(base)
    for j in range(n):
        _standard(now[j], scales.now[0, j], scales.now[1, j], standard)
        _add(lags[j], w.wide[k, j * each : j * each + FLOWS], out)
        _add(standard, w.wide[k, j * each + FLOWS : (j + 1) * each], out)
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
    _add(last[k], w.head, out)


@njit(cache=True, nogil=True)
def work_room(w):  # type: ignore[no-untyped-def]
    n, d = w.node.shape
    f32 = np.float32
    return (
        np.empty((n, d), f32), np.empty((n, d), f32), np.empty((n, d), f32), np.empty((n + 1, d), f32), np.empty((n, d), f32),
        np.empty(w.now.shape[0], f32),
    )  # fmt: skip


@njit(cache=True, nogil=True)
def _outputs(w, scales, history, now, edges, linked, inst, out):  # type: ignore[no-untyped-def]
    """`out` (m, 4 H) of the nodes `inst` (m,) of gathered inputs."""
    work, (n, d) = work_room(w), w.node.shape
    base, along, lags = np.empty((n, d), np.float32), np.empty((2, n, n, d), np.float32), np.empty((n, FLOWS), np.float32)
    for r in range(len(inst)):
        embed(w, scales, history[r], 0, base, lags)
        edges_along(w, edges[r], along)
        answer(w, scales, inst[r], now[r], base, along, lags, linked[r], work, out[r])


@njit(cache=True, nogil=True)
def remember(w, scales, s):  # type: ignore[no-untyped-def]
    """Once for each cell of time: edges and what the convolution makes of the history."""
    if s.clock[1] != s.clock[0]:
        s.clock[1] = s.clock[0]
        draw(s)
        embed(w, scales, s.history, s.clock[0] % T, s.base, s.lags)
        edges_along(w, s.edges, s.along)


@njit(cache=True, nogil=True)
def vote(out, h, size, proba):  # type: ignore[no-untyped-def]
    top = max(out[3 * h], out[3 * h + 1], out[3 * h + 2])
    total = 0.0
    for c in range(3):
        proba[c] = math.exp(np.float64(out[3 * h + c] - top))
        total += proba[c]
    for c in range(3):
        proba[c] /= total
    return size * math.exp(np.float64(min(max(out[3 * H + h], np.float32(-3.0)), np.float32(3.0))))


@njit(cache=True, nogil=True)
def serve(  # type: ignore[no-untyped-def]
    ts, inst, mid, rows, columns, tick, action, side, size, closes, w, scales, votes, sizes, s, proba, magnitude
):  # fmt: skip
    n = len(tick)
    moves, now, out, work, c = np.empty(n), np.empty((n, len(NOW))), np.empty(4 * H, np.float32), work_room(w), 0
    for i in range(len(ts)):
        k = inst[i]
        advance(s, ts[i], moves)
        absorb(s, ts[i], k, mid[i] / tick[k], rows[i], columns, action[i], side[i], size[i])
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
            remember(w, scales, s)
            now_at(s, ts[i], now)
            answer(w, scales, k, now, s.base, s.along, s.lags, s.linked, work, out)
            for h in range(H):
                if votes[k, h]:
                    magnitude[c, h] = vote(out, h, sizes[k, h], proba[c, h])
        c += 1


def outputs(w: Weights, scales: Scales, x: Inputs, node: I64) -> F32:
    out = np.empty((len(node), 4 * H), np.float32)
    _outputs(w, scales, *x, node, out)
    return out
