"""The Transformer that serves: window normalisation, encoders and the cross-timeframe join in numba, one decision after the other.

No sum runs over more than one decision and no library chooses an order of summation, so a decision is the same to the last bit however
the stream is cut into blocks. :func:`transformer_train.network` is the same function in torch, for learning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from cift_models.windows import MINUTES, SECOND, SECONDS, TICKS

F32 = NDArray[np.float32]
Weights = dict[str, F32]
FRAMES: Final = ("tick", "second", "minute")
STEPS: Final = (TICKS, SECONDS, MINUTES)
WIDTH_NS: Final = (1, SECOND, 60 * SECOND)
PATCH: Final = 2
WAVES: Final = 8  # sines of Time2Vec
EXTRA: Final = 2 + WAVES  # inputs of a token beside its columns: log gap, log gap within the patch, sines
OUT: Final = 5  # outputs of a horizon: three logits, magnitude, imbalance
BIN_EPS: Final = np.float32(1e-2)  # of a variance in scaled units: what hardly varies is not blown up
RMS_EPS: Final = np.float32(1e-6)
KNEE: Final = np.float32(5.0)  # scaled values z become z / (1 + |z| / KNEE), within +-KNEE


class Encoder(NamedTuple):
    """Weights of one timeframe: C columns, S steps, T = S / 2 tokens of width D, L layers."""

    mix: F32  # (3,) shares of the scaled value, its feature-mode and its temporal-mode normalisation
    gain_s: F32  # (S,) feature mode: across the columns of a step
    shift_s: F32
    gain_c: F32  # (C,) temporal mode: along the steps of a column
    shift_c: F32
    omega: F32  # (WAVES,)
    phi: F32
    embed: F32  # (PATCH C + EXTRA, D)
    place: F32  # (T, D)
    norm_a: F32  # (L, D)
    qkv: F32  # (L, D, 3 D)
    merge: F32  # (L, D, D)
    norm_f: F32  # (L, D)
    up: F32  # (L, D, hidden)
    up_b: F32  # (L, hidden)
    down: F32  # (L, hidden, D)
    norm_m: F32  # (D,) tokens as the join sees them
    frame: F32  # (D,)


class Join(NamedTuple):
    """Weights of the cross-timeframe attention and the heads; I instruments."""

    row: F32  # (C, D) the newest row, straight
    missing: F32  # (C, D) what of it is missing
    phase: F32  # (2, D) how much of the running second and minute has passed
    who: F32  # (I, D)
    norm_q: F32  # (D,)
    q: F32  # (D, D)
    k: F32
    v: F32
    merge: F32
    norm_f: F32
    up: F32
    up_b: F32
    down: F32
    norm_o: F32
    head: F32  # (D, hidden)
    head_b: F32
    out: F32  # (hidden, OUT H)
    out_b: F32


def part(kind: Any, name: str, w: Mapping[str, Any]) -> Any:
    return kind(*(w[f"{name}.{k}"] for k in kind._fields))


@njit(cache=True, nogil=True)
def _mul(x, w, out):  # type: ignore[no-untyped-def]
    """out = x @ w, four tokens and two inputs at a time; (T, K) by (K, N), T a multiple of 4 and K of 2. Always in the same order."""
    n = w.shape[1]
    for t in range(0, x.shape[0], 4):
        for o in range(n):
            out[t, o] = out[t + 1, o] = out[t + 2, o] = out[t + 3, o] = np.float32(0)
        for i in range(0, x.shape[1], 2):
            a, b, c, d = x[t, i], x[t + 1, i], x[t + 2, i], x[t + 3, i]
            e, f, g, h = x[t, i + 1], x[t + 1, i + 1], x[t + 2, i + 1], x[t + 3, i + 1]
            for o in range(n):
                u, v = w[i, o], w[i + 1, o]
                out[t, o] = (out[t, o] + a * u) + e * v
                out[t + 1, o] = (out[t + 1, o] + b * u) + f * v
                out[t + 2, o] = (out[t + 2, o] + c * u) + g * v
                out[t + 3, o] = (out[t + 3, o] + d * u) + h * v


@njit(cache=True, nogil=True)
def _add(x, w, out):  # type: ignore[no-untyped-def]
    """out (N,) += x (K,) @ w (K, N)."""
    for i in range(len(x)):
        for o in range(len(out)):
            out[o] += x[i] * w[i, o]


_LOG2E, _MAGIC = np.float32(1.44269504), np.float32(12582912.0)
_LN2_HI, _LN2_LO = np.float32(0.693359375), np.float32(-2.12194440e-4)
_E2, _E3, _E4, _E5, _E6 = (np.float32(v) for v in (5.0000001201e-1, 1.6666665459e-1, 4.1665795894e-2, 8.3334519073e-3, 1.3981999507e-3))
_E7, _ONE, _LEAST = np.float32(1.9875691500e-4), np.float32(1), np.float32(-87)


@njit(cache=True, nogil=True)
def exp(x, power):  # type: ignore[no-untyped-def]
    """exp of x (n,) <= 0 in place, to 2 ulp (Cephes' expf); `power` (n,) int32 is scratch. Loops that a compiler turns into vectors."""
    for i in range(len(x)):
        v = max(x[i], _LEAST)
        r = (v * _LOG2E + _MAGIC) - _MAGIC  # nearest whole number
        power[i] = (np.int32(r) + 127) << 23
        f = (v - r * _LN2_HI) - r * _LN2_LO
        p = ((((_E7 * f + _E6) * f + _E5) * f + _E4) * f + _E3) * f + _E2
        x[i] = (p * f * f + f) + _ONE
    scale = power.view(np.float32)
    for i in range(len(x)):
        x[i] *= scale[i]


@njit(cache=True, nogil=True)
def _rms(x, gain, out):  # type: ignore[no-untyped-def]
    """out (D,) = gain * x / sqrt(mean x^2)."""
    s = np.float32(0)
    for i in range(len(x)):
        s += x[i] * x[i]
    f = _ONE / np.sqrt(s / np.float32(len(x)) + RMS_EPS)
    for i in range(len(x)):
        out[i] = x[i] * f * gain[i]


@njit(cache=True, nogil=True)
def _tokens(x, stamps, until, e, out):  # type: ignore[no-untyped-def]
    """Scaled values x (S, C), NaN missing, of steps at `stamps` (ns, 0 absent) -> normalised tokens `out` (T, PATCH C + EXTRA).

    Returns the first step that is there. Absent steps are not read.
    """
    steps, columns = x.shape
    first = 0
    while first < steps and stamps[first] == 0:
        first += 1
    for t in range(out.shape[0]):
        for o in range(out.shape[1]):
            out[t, o] = np.float32(0)
    n, mean, power = np.zeros(columns, np.float32), np.zeros(columns, np.float32), np.zeros(columns, np.float32)
    for s in range(first, steps):
        for c in range(columns):
            there = x[s, c] == x[s, c]
            n[c] += _ONE if there else np.float32(0)
            mean[c] += x[s, c] if there else np.float32(0)
    for c in range(columns):
        n[c] = max(n[c], _ONE)
        mean[c] /= n[c]
    for s in range(first, steps):
        for c in range(columns):
            d = x[s, c] - mean[c]
            power[c] += d * d if x[s, c] == x[s, c] else np.float32(0)
    for c in range(columns):
        power[c] = e.gain_c[c] / np.sqrt(power[c] / n[c] + BIN_EPS)
    for s in range(first, steps):
        m, v, k = np.float32(0), np.float32(0), np.float32(0)
        for c in range(columns):
            if x[s, c] == x[s, c]:
                m += x[s, c]
                k += _ONE
        k = max(k, _ONE)
        m /= k
        for c in range(columns):
            d = x[s, c] - m
            v += d * d if x[s, c] == x[s, c] else np.float32(0)
        f, shift, at = e.gain_s[s] / np.sqrt(v / k + BIN_EPS), e.shift_s[s], (s % PATCH) * columns
        for c in range(columns):
            y = e.mix[0] * x[s, c] + e.mix[1] * ((x[s, c] - m) * f + shift) + e.mix[2] * ((x[s, c] - mean[c]) * power[c] + e.shift_c[c])
            out[s // PATCH, at + c] = y if x[s, c] == x[s, c] else np.float32(0)
    at = PATCH * columns
    for t in range(first // PATCH, steps // PATCH):
        new, old = stamps[PATCH * t + PATCH - 1], stamps[PATCH * t]
        gap = np.float32(np.log1p((until - new) * 1e-6) / 8)
        out[t, at] = gap
        out[t, at + 1] = np.float32(np.log1p((new - old) * 1e-6) / 8) if old != 0 else np.float32(0)
        for i in range(WAVES):
            out[t, at + 2 + i] = np.sin(e.omega[i] * gap + e.phi[i])
    return first


@njit(cache=True, nogil=True)
def encode(x, stamps, until, e, heads, memory, counts, newest):  # type: ignore[no-untyped-def]
    """m windows, x (m, S, C) at stamps (m, S) seen at `until` (m,), through their encoder, one after the other.

    memory (m, T, D) gets the tokens that are there, as the join sees them; counts (m,) how many; newest (m, D) the last one itself.
    """
    count, width = e.place.shape
    hidden, size = e.up.shape[2], width // heads
    tokens, wide = np.empty((count, e.embed.shape[0]), np.float32), np.empty((count, hidden), np.float32)
    h, z, y = np.empty((count, width), np.float32), np.empty((count, width), np.float32), np.empty((count, width), np.float32)
    qkv, power = np.empty((count, 3 * width), np.float32), np.empty(count * count, np.int32)
    query, answer = np.empty((size, count), np.float32), np.empty((size, count), np.float32)
    scores, top, total = np.empty(count * count, np.float32), np.empty(count, np.float32), np.empty(count, np.float32)
    root = _ONE / np.sqrt(np.float32(size))
    for r in range(len(x)):
        first = _tokens(x[r], stamps[r], until[r], e, tokens) // PATCH
        counts[r] = count - first
        if first == count:
            continue
        score = scores[: counts[r] * count].reshape(counts[r], count)
        _mul(tokens, e.embed, h)
        for t in range(count):
            for o in range(width):
                h[t, o] += e.place[t, o]
        for a in range(len(e.qkv)):
            for t in range(count):
                _rms(h[t], e.norm_a[a], z[t])
            _mul(z, e.qkv[a], qkv)
            for b in range(heads):
                q, k, v = b * size, width + b * size, 2 * width + b * size
                for i in range(size):
                    for t in range(count):
                        query[i, t] = qkv[t, q + i] * root
                        answer[i, t] = np.float32(0)
                for t in range(count):
                    top[t], total[t] = np.float32(-np.inf), np.float32(0)
                for j in range(first, count):
                    row = score[j - first]
                    for t in range(count):
                        row[t] = np.float32(0)
                    for i in range(size):
                        w = qkv[j, k + i]
                        for t in range(count):
                            row[t] += w * query[i, t]
                    for t in range(count):
                        top[t] = max(top[t], row[t])
                for j in range(counts[r]):
                    for t in range(count):
                        score[j, t] -= top[t]
                exp(scores[: counts[r] * count], power)
                for j in range(first, count):
                    row = score[j - first]
                    for t in range(count):
                        total[t] += row[t]
                    for i in range(size):
                        w = qkv[j, v + i]
                        for t in range(count):
                            answer[i, t] += w * row[t]
                for i in range(size):
                    for t in range(count):
                        z[t, q + i] = answer[i, t] / total[t]
            _mul(z, e.merge[a], y)
            for t in range(count):
                for o in range(width):
                    h[t, o] += y[t, o]
                _rms(h[t], e.norm_f[a], z[t])
            _mul(z, e.up[a], wide)
            for t in range(count):
                for o in range(hidden):
                    wide[t, o] = max(wide[t, o] + e.up_b[a, o], np.float32(0))
            _mul(wide, e.down[a], y)
            for t in range(count):
                for o in range(width):
                    h[t, o] += y[t, o]
        for o in range(width):
            newest[r, o] = h[count - 1, o]
        for t in range(first, count):
            _rms(h[t], e.norm_m, z[t])
            for o in range(width):
                memory[r, t - first, o] = z[t, o] + e.frame[o]


@njit(cache=True, nogil=True)
def renew(ts, inst, width_ns, cells, place):  # type: ignore[no-untyped-def]
    """Which decisions open a new second or minute of their instrument: fresh (n,) of them; place (m,) where each finds its memory:
    I + i is the i-th fresh one, below I what the instrument brought along. `cells` (I,) advances."""
    fresh, latest, n = np.empty(len(ts), np.int64), np.arange(len(cells)), 0
    for r in range(len(ts)):
        k, cell = inst[r], ts[r] // width_ns
        if cells[k] != cell:
            cells[k], latest[k], fresh[n] = cell, len(cells) + n, r
            n += 1
        place[r] = latest[k]
    return fresh[:n], latest


@njit(cache=True, nogil=True)
def _append(memory, n, tokens, count):  # type: ignore[no-untyped-def]
    for j in range(count):
        for o in range(memory.shape[1]):
            memory[n + j, o] = tokens[j, o]
    return n + count


@njit(cache=True, nogil=True)
def _hidden(x, w, b, out):  # type: ignore[no-untyped-def]
    """out (N,) = max(0, x (K,) @ w (K, N) + b)."""
    for o in range(len(out)):
        out[o] = b[o]
    _add(x, w, out)
    for o in range(len(out)):
        out[o] = max(out[o], np.float32(0))


@njit(cache=True, nogil=True)
def join(tick, second, minute, n_tick, n_second, n_minute, at_second, at_minute, newest, rows, ts, inst, w, heads, out):  # type: ignore[no-untyped-def]
    """The newest tick token (m, D) of each decision, with the newest row (m, C), asks the memories of the three timeframes, (., T, D) with
    so many tokens each; raw outputs (m, OUT H)."""
    width = newest.shape[1]
    size = width // heads
    room = tick.shape[1] + second.shape[1] + minute.shape[1]
    memory, score, power = np.empty((room, width), np.float32), np.empty(room, np.float32), np.empty(room, np.int32)
    x, z, y = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    q, told, wide = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(len(w.up_b), np.float32)
    root = _ONE / np.sqrt(np.float32(size))
    for r in range(len(ts)):
        k, s, t = inst[r], at_second[r], at_minute[r]
        n = _append(memory, 0, tick[r], n_tick[r])
        n = _append(memory, n, second[s], n_second[s])
        n = _append(memory, n, minute[t], n_minute[t])
        past_s = np.float32((ts[r] % SECOND) / SECOND)
        past_m = np.float32((ts[r] % (60 * SECOND)) / (60 * SECOND))
        for o in range(width):
            x[o] = newest[r, o] + w.who[k, o] + past_s * w.phase[0, o] + past_m * w.phase[1, o]
        for c in range(rows.shape[1]):
            v, there = rows[r, c], rows[r, c] == rows[r, c]
            for o in range(width):
                x[o] += v * w.row[c, o] if there else w.missing[c, o]
        _rms(x, w.norm_q, z)
        for o in range(width):
            q[o], told[o] = np.float32(0), np.float32(0)
        _add(z, w.q, q)
        for b in range(heads):
            a = b * size
            for i in range(width):  # q . (k m) = (k' q) . m: keys are never made
                s = np.float32(0)
                for d in range(size):
                    s += w.k[i, a + d] * q[a + d]
                y[i] = s * root
            top = np.float32(-np.inf)
            for j in range(n):
                s = np.float32(0)
                for i in range(width):
                    s += memory[j, i] * y[i]
                score[j] = s
                top = max(top, s)
            for j in range(n):
                score[j] -= top
            exp(score[:n], power)
            total = np.float32(0)
            for i in range(width):
                y[i] = np.float32(0)
            for j in range(n):
                total += score[j]
                for i in range(width):
                    y[i] += score[j] * memory[j, i]
            for i in range(width):
                u = y[i] / total
                for d in range(size):
                    told[a + d] += u * w.v[i, a + d]
        _add(told, w.merge, x)
        _rms(x, w.norm_f, z)
        _hidden(z, w.up, w.up_b, wide)
        _add(wide, w.down, x)
        _rms(x, w.norm_o, z)
        _hidden(z, w.head, w.head_b, wide)
        for o in range(out.shape[1]):
            out[r, o] = w.out_b[o]
        _add(wide, w.out, out[r])


@njit(cache=True, nogil=True)
def scale_rows(rows, inst, index, centre, scale, out):  # type: ignore[no-untyped-def]
    """Columns `index` (C,) of rows (n, F), -1 where absent, in the instrument's units, within +-KNEE; NaN and infinity are missing."""
    for i in range(len(rows)):
        for c in range(len(index)):
            v = np.nan if index[c] < 0 else rows[i, index[c]]
            z = np.float32((v - centre[inst[i], c]) / scale[inst[i], c])
            out[i, c] = z / (_ONE + abs(z) / KNEE)


@njit(cache=True, nogil=True)
def answer(raw, x, columns, inst, usable, share, lines, constant, size, proba, magnitude, imbalance):  # type: ignore[no-untyped-def]
    """Logits are the lines of inputs (m, D), of which the newest row comes first, and `share` (H,) of the raw outputs (m, OUT H) on top."""
    for r in range(len(raw)):
        some = False
        for c in range(columns):
            some |= x[r, c] == x[r, c]
        for h in range(len(usable)):
            if not (some and usable[h]):
                proba[r, h], magnitude[r, h], imbalance[r, h] = np.nan, np.nan, np.nan
                continue
            top, total = -np.inf, 0.0
            for y in range(3):
                proba[r, h, y] = constant[inst[r], h, y] + share[h] * raw[r, OUT * h + y]
            for c in range(x.shape[1]):
                if x[r, c] == x[r, c]:
                    for y in range(3):
                        proba[r, h, y] += x[r, c] * lines[c, h, y]
            for y in range(3):
                top = max(top, proba[r, h, y])
            for y in range(3):
                proba[r, h, y] = np.exp(proba[r, h, y] - top)
                total += proba[r, h, y]
            for y in range(3):
                proba[r, h, y] /= total
            v = np.float64(raw[r, OUT * h + 3])
            magnitude[r, h] = size[inst[r], h] * (max(v, 0.0) + np.log1p(np.exp(-abs(v))))
            imbalance[r, h] = np.tanh(np.float64(raw[r, OUT * h + 4]))
