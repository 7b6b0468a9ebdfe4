"""Transformer: three encoders over the tick, second and minute windows of each instrument, joined by cross-timeframe attention.

Takes blocks of the stream; gives at each close, for every horizon, the probabilities of down, flat and up, the expected |move|, and the
expected imbalance of the best queues at the horizon. Inputs are stationary columns of the feature rows, scaled by the instrument and
normalised within the window by learned bilinear normalisation (BiN: Tran, Kanniainen, Gabbouj and Iosifidis 2021, "Data normalization for
bilinear structures in high-frequency financial time-series", eqs. 3-9). Steps know how long ago they were by Time2Vec (Kazemi et al. 2019)
of the logarithm of the gap. Each encoder is a pre-norm transformer (Vaswani et al. 2017; RMS norm: Zhang and Sennrich 2019) over patches
of two steps; the newest tick token asks all tokens of the three.

torch trains, and is imported for that alone. Serving is a numba kernel of its own which works decision by decision: no sum runs over
more than one decision and no library chooses an order of summation, so a decision is the same to the last bit however the stream is cut
into blocks. Second and minute windows, whose stamps count from the latest whole second and minute, are encoded once in each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from catalog.errors import InputError
from catalog.events import SCALE, Instrument
from catalog.progress import Steps
from cift_models.labels import F64, I8, I64, H, Labeller, Study, Table, Thinned
from cift_models.windows import MINUTES, SECOND, SECONDS, TICKS, Block, History, Views, Votes

if TYPE_CHECKING:
    from torch import Tensor

F32 = NDArray[np.float32]
Weights = dict[str, F32]

# the columns it looks at, and what each becomes when bid and ask change places: "-" its negative, "" itself, else another column
COLUMNS: Final[Mapping[str, str]] = {
    "spread": "", "imbalance_1": "-", "imbalance_2": "-", "imbalance_top5": "-", "queue_bid": "queue_ask", "queue_ask": "queue_bid",
    "microprice": "-", "ofi_1": "-", "ofi_2": "-", "ofi_fast": "-", "ofi_slow": "-", "ofi_events": "-", "trade_imbalance_1s": "-",
    "trade_imbalance_8s": "-", "trade_imbalance_64s": "-", "add_imbalance": "-", "cancel_imbalance": "-", "volume_ratio": "",
    "return_16e": "-", "return_128e": "-", "return_1s": "-", "return_8s": "-", "volatility_8s": "", "intensity_ratio": "",
}  # fmt: skip
AHEAD: Final = "imbalance_1"  # what the imbalance head foretells
FRAMES: Final = ("tick", "second", "minute")
STEPS: Final = (TICKS, SECONDS, MINUTES)
WIDTH_NS: Final = (1, SECOND, 60 * SECOND)
PATCH: Final = 2
WAVES: Final = 8  # sines of Time2Vec
EXTRA: Final = 2 + WAVES  # inputs of a token beside its columns: log gap, log gap within the patch, sines
OUT: Final = 5  # outputs of a horizon: three logits, magnitude, imbalance
PIECE: Final = 512  # decisions whose windows are held at once
BIN_EPS: Final = np.float32(1e-2)  # of a variance in scaled units: what hardly varies is not blown up
RMS_EPS: Final = np.float32(1e-6)
KNEE: Final = np.float32(5.0)  # scaled values z become z / (1 + |z| / KNEE), within +-KNEE
F16_MAX: Final = 6e4


@dataclass(frozen=True, slots=True)
class Config:
    """`cap` bounds memory: a window takes 5.9 kB. `checkpoint`: a folder; an interrupted training goes on from there, and ends alike."""

    cap: int = 12_000  # windows held for training, evenly thinned
    width: int = 32
    heads: int = 4
    hidden: int = 64
    layers: int = 1
    epochs: int = 6
    patience: int = 3  # epochs without a better calibration loss
    batch: int = 256
    rate: float = 3e-3  # AdamW's highest, after a tenth of the steps; then a cosine to nothing
    decay: float = 0.1
    dropout: float = 0.2  # of whole tokens in the encoders
    smoothing: float = 0.02  # of labels
    beside: float = 0.2  # weight of the magnitude and the imbalance loss
    mirror: bool = True  # in every epoch half of the windows are seen with bid and ask exchanged
    prior: float = 1.0  # belief that the scores tell nothing: their slope is N(0, 1 / prior)
    steady: float = 30.0  # belief that class shares stay: departures from them are N(0, 1 / steady)
    doubt: float = 1.0  # standard errors by which the slope is lowered; evidence counts independent labels of the calibration slice
    worth: float = 200.0  # a horizon with n independent labels weighs n / (n + worth)
    least: int = 200  # windows of the fit slice
    device: str = "auto"
    threads: int = 1  # more wait for one another where cores are busy
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads) or self.hidden % 2:
            raise InputError(f"width {self.width} must be a multiple of twice the heads ({self.heads}), and hidden {self.hidden} even")


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


def shapes(columns: int, instruments: int, c: Config) -> dict[str, tuple[int, ...]]:
    """The name and shape of every weight."""
    d, n, f = c.width, c.layers, c.hidden
    out: dict[str, tuple[int, ...]] = {}
    for name, s in zip(FRAMES, STEPS):
        bin_ = ((3,), (s,), (s,), (columns,), (columns,), (WAVES,), (WAVES,), (PATCH * columns + EXTRA, d), (s // PATCH, d))
        layer = ((n, d), (n, d, 3 * d), (n, d, d), (n, d), (n, d, f), (n, f), (n, f, d), (d,), (d,))
        out |= {f"{name}.{k}": v for k, v in zip(Encoder._fields, (*bin_, *layer))}
    ask = ((columns, d), (columns, d), (2, d), (instruments, d), (d,), (d, d), (d, d), (d, d), (d, d))
    tell = ((d,), (d, f), (f,), (f, d), (d,), (d, f), (f,), (f, OUT * H), (OUT * H,))
    return out | {f"join.{k}": v for k, v in zip(Join._fields, (*ask, *tell))}


def initial(columns: int, instruments: int, c: Config, seed: int) -> Weights:
    """Gaussian with variance 1 / inputs; the heads' last layer is zero, so training begins at even odds."""
    rng = np.random.default_rng(seed)
    w: Weights = {}
    for name, shape in shapes(columns, instruments, c).items():
        part = name.partition(".")[2]
        if part.startswith(("norm", "gain")):
            a = np.ones(shape)
        elif part == "mix":
            a = np.array([0.5, 0.25, 0.25])
        elif part == "omega":
            a = np.geomspace(1, 32, WAVES)
        elif part == "phi":
            a = rng.uniform(0, 2 * np.pi, shape)
        elif part.startswith("shift") or part.endswith("_b") or part == "out":
            a = np.zeros(shape)
        elif part in ("place", "frame", "who", "phase", "missing"):
            a = 0.1 * rng.normal(size=shape)
        else:
            a = rng.normal(size=shape) / np.sqrt(shape[-2]) * (0.5 if part in ("merge", "down") else 1.0)
        w[name] = np.ascontiguousarray(a, np.float32)
    return w


# serving


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
def _exp(x, power):  # type: ignore[no-untyped-def]
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
def _encode(x, stamps, until, e, heads, memory, counts, newest):  # type: ignore[no-untyped-def]
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
                _exp(scores[: counts[r] * count], power)
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
def _renew(ts, inst, width_ns, cells, place):  # type: ignore[no-untyped-def]
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
def _join(tick, second, minute, n_tick, n_second, n_minute, at_second, at_minute, newest, rows, ts, inst, w, heads, out):  # type: ignore[no-untyped-def]
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
            _exp(score[:n], power)
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
def _scale(rows, inst, index, centre, scale, out):  # type: ignore[no-untyped-def]
    """Columns `index` (C,) of rows (n, F), -1 where absent, in the instrument's units, within +-KNEE; NaN and infinity are missing."""
    for i in range(len(rows)):
        for c in range(len(index)):
            v = np.nan if index[c] < 0 else rows[i, index[c]]
            z = np.float32((v - centre[inst[i], c]) / scale[inst[i], c])
            out[i, c] = z / (_ONE + abs(z) / KNEE)


@njit(cache=True, nogil=True)
def _answer(raw, newest, inst, usable, slope, offset, size, proba, magnitude, imbalance):  # type: ignore[no-untyped-def]
    for r in range(len(raw)):
        some = False
        for c in range(newest.shape[1]):
            some |= newest[r, c] == newest[r, c]
        for h in range(len(usable)):
            if not (some and usable[h]):
                proba[r, h], magnitude[r, h], imbalance[r, h] = np.nan, np.nan, np.nan
                continue
            top, total = -np.inf, 0.0
            for y in range(3):
                proba[r, h, y] = slope[h] * raw[r, OUT * h + y] + offset[h, y]
                top = max(top, proba[r, h, y])
            for y in range(3):
                proba[r, h, y] = np.exp(proba[r, h, y] - top)
                total += proba[r, h, y]
            for y in range(3):
                proba[r, h, y] /= total
            v = np.float64(raw[r, OUT * h + 3])
            magnitude[r, h] = size[inst[r], h] * (max(v, 0.0) + np.log1p(np.exp(-abs(v))))
            imbalance[r, h] = np.tanh(np.float64(raw[r, OUT * h + 4]))


class State(NamedTuple):
    """What a stream carries: the windows; the second and minute memories of each instrument with the cell, ts // width, they belong to."""

    history: History
    cells: tuple[I64, I64]  # (I,)
    kept: tuple[F32, F32]  # (I, T, D)
    counts: tuple[I64, I64]  # (I,)
    imbalance: list[F64]  # (m, H) at the closes predicted last


class Transformer:
    """The member. `centre`, `scale` (I, C) of the columns; `slope` (H,), `offset` (H, 3): calibrated logits are slope * logits + offset;
    `size` (I, H) ticks that a magnitude of 1 stands for; `usable` (H,) horizons that were learnt."""

    name = "transformer"

    def __init__(
        self, names: Sequence[str], columns: Sequence[str], config: Config, weights: Weights, centre: F64, scale: F64,
        usable: NDArray[np.bool_], slope: F64, offset: F64, size: F64, losses: Sequence[tuple[float, float]] = (),
    ) -> None:  # fmt: skip
        self.columns, self.config, self.weights, self.losses = tuple(columns), config, weights, [(float(a), float(b)) for a, b in losses]
        self.centre, self.scale, self.usable, self.slope, self.offset, self.size = centre, scale, usable, slope, offset, size
        place = {name: i for i, name in enumerate(names)}
        self._index = np.array([place.get(c, -1) for c in self.columns], np.int64)
        self._encoders = tuple(_part(Encoder, f, weights) for f in FRAMES)
        self._join = _part(Join, "join", weights)

    @staticmethod
    def gatherer(instruments: Sequence[Instrument], names: Sequence[str], config: Config | None = None) -> Windows:
        return Windows(instruments, names, (config or Config()).cap)

    @classmethod
    def fit(cls, study: Study, gathered: Windows, config: Config | None = None) -> Self:
        """Weights on the fit slice, stopped early and calibrated on the calibration slice; on a CPU deterministic for `study.seed`.

        Raises InputError where fewer than `config.least` windows of the fit slice have a label.
        """
        config = config or Config()
        sample = gathered.sample()
        lessons = Lessons.of(study, sample, config)
        if len(lessons.fit) < config.least:
            raise InputError(f"{len(lessons.fit)} windows with labels before calibration, {config.least} are needed: give a longer range")
        data = Data(sample, *lessons.scalers(sample), gathered.columns)
        with _torch(config.threads):
            import torch

            weights, losses = _train(lessons, data, study.seed, config)
            raw = outputs({k: torch.from_numpy(v) for k, v in weights.items()}, data, lessons.calibration, config.heads, "cpu")
        slope, offset = np.zeros(H), np.log(lessons.rates)
        learnt = (weights, data.centre, data.scale, lessons.usable, slope, offset, lessons.size.copy(), losses)
        me = cls(study.names, data.columns, config, *learnt)
        me._calibrate(raw, lessons, sample["instrument"])
        return me

    def _calibrate(self, raw: F32, lessons: Lessons, instrument: I64) -> None:
        """Slope and offset of each horizon's logits by penalised likelihood, and the size of moves, on the calibration slice."""
        for h in np.flatnonzero(self.usable):
            there = lessons.y[lessons.calibration, h] >= 0
            rows = lessons.calibration[there]
            if not len(rows):
                continue
            z, y, n = raw[there, h].astype(np.float64), lessons.y[rows, h], lessons.worth[1, h]
            self.slope[h], self.offset[h] = fit_slope(z[:, :3], y, self.offset[h], n / len(rows), self.config)
            k = instrument[rows]
            moved, said = np.abs(lessons.move[rows, h]) / self.size[k, h], np.logaddexp(0, z[:, 3])
            self.size[:, h] *= (n * moved.mean() + 30) / (n * said.mean() + 30)

    def new_state(self) -> State:
        i, d = self.centre.shape[0], self.config.width
        kept = np.zeros((i, SECONDS // PATCH, d), np.float32), np.zeros((i, MINUTES // PATCH, d), np.float32)
        cells, counts = (np.full(i, -1), np.full(i, -1)), (np.zeros(i, np.int64), np.zeros(i, np.int64))
        return State(History(i, range(len(self.columns))), cells, kept, counts, [np.empty((0, H))])

    def predict(self, block: Block, state: State) -> Votes:
        """Votes at each close, `state` advanced in place; a decision whose newest row has none of the columns abstains."""
        e, closes, m = block.events, block.closes, len(block.closes)
        inst = e["instrument"].astype(np.int64)
        values: Any = np.empty((len(e), len(self.columns)), np.float32)
        _scale(block.rows, inst, self._index, self.centre, self.scale, values)
        votes, imbalance = Votes(np.empty((m, H, 3)), np.empty((m, H))), np.empty((m, H))
        for a, b, piece in _pieces(Block(e, values, closes)):
            v = state.history.push(piece)
            k = inst[closes[a:b]]
            raw = self.raw(v, k, state)
            own = self.usable, self.slope, self.offset, self.size
            _answer(raw, v.tick[:, -1], k, *own, votes.proba[a:b], votes.magnitude[a:b], imbalance[a:b])
        state.imbalance[0] = imbalance
        return votes

    def raw(self, views: Views, instrument: I64, state: State) -> F32:
        """Raw outputs (m, OUT H) at m successive decisions from their windows of scaled columns; the memories in `state` advance."""
        v, m, d = views, len(instrument), self.config.width
        ts, heads = np.ascontiguousarray(v.tick_ts[:, -1]), self.config.heads
        tick, n_tick, newest = np.empty((m, TICKS // PATCH, d), np.float32), np.empty(m, np.int64), np.empty((m, d), np.float32)
        _encode(v.tick, v.tick_ts, ts, self._encoders[0], heads, tick, n_tick, newest)
        memories, counts, places = [tick], [n_tick], []
        for f, (x, stamps) in enumerate(((v.second, v.second_ts), (v.minute, v.minute_ts))):
            width, place, i = WIDTH_NS[f + 1], np.empty(m, np.int64), len(state.cells[f])
            fresh, latest = _renew(ts, instrument, width, state.cells[f], place)
            memory = np.empty((i + len(fresh), *state.kept[f].shape[1:]), np.float32)
            count = np.empty(len(memory), np.int64)
            memory[:i], count[:i] = state.kept[f], state.counts[f]
            until = ts[fresh] // width * width
            none = np.empty((len(fresh), d), np.float32)
            _encode(x[fresh], stamps[fresh], until, self._encoders[f + 1], heads, memory[i:], count[i:], none)
            state.kept[f][:], state.counts[f][:] = memory[latest], count[latest]
            memories.append(memory)
            counts.append(count)
            places.append(place)
        out = np.empty((m, OUT * H), np.float32)
        seen: Any = (*memories, *counts, *places)
        _join(*seen, newest, np.ascontiguousarray(v.tick[:, -1]), ts, instrument, self._join, heads, out)  # type: ignore[call-arg]
        return out

    def imbalance(self, state: State) -> F64:
        """(m, H) expected imbalance_1 at the horizon, in [-1, 1], at the closes of the block predicted last; NaN where it abstains."""
        return state.imbalance[0]

    def parameters(self) -> int:
        return sum(a.size for a in self.weights.values())

    def save(self, folder: Path) -> None:
        from safetensors.numpy import save_file

        own = ("centre", "scale", "usable", "slope", "offset", "size")
        save_file(self.weights | {f"_{k}": np.ascontiguousarray(getattr(self, k)) for k in own}, folder / "transformer.safetensors")
        config = {k: v for k, v in dataclasses.asdict(self.config).items() if k != "checkpoint"}
        told = {"columns": self.columns, "config": config, "parameters": self.parameters(), "losses": self.losses}
        (folder / "transformer.json").write_text(json.dumps(told, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path, names: Sequence[str]) -> Self:
        from safetensors.numpy import load_file

        told = json.loads((folder / "transformer.json").read_text())
        w = load_file(folder / "transformer.safetensors")
        own = {k[1:]: w.pop(k) for k in [k for k in w if k.startswith("_")]}
        return cls(names, told["columns"], Config(**told["config"]), w, **own, losses=told["losses"])


def _pieces(block: Block) -> Iterator[tuple[int, int, Block]]:
    """The block in pieces of at most PIECE closes [a, b); together they hold every event."""
    m, begin = len(block.closes), 0
    for a in range(0, max(m, 1), PIECE):
        b = min(a + PIECE, m)
        end = len(block.events) if b == m else int(block.closes[b - 1]) + 1
        yield a, b, Block(block.events[begin:end], block.rows[begin:end], block.closes[a:b] - begin)
        begin = end


def fit_slope(z: F64, y: I8, offset: F64, weight: float, c: Config) -> tuple[float, F64]:
    """Slope a >= 0 and offset b of softmax(a z + b) for logits z (n, 3) and classes y (n,), each counted `weight`.

    Maximum a posteriori, where a is N(0, 1 / c.prior) and the departures of b from `offset`, at the mean logits, N(0, 1 / c.steady); then
    a is lowered by `c.doubt` of its standard errors. Without evidence that the logits tell anything the answer is `offset`.
    """
    from scipy.optimize import minimize

    middle, n, prior = z.mean(axis=0), np.arange(len(z)), np.array([c.prior, c.steady, c.steady, c.steady])
    z = z - middle

    def odds(x: F64) -> F64:
        s = x[0] * z + offset + x[1:]
        p = np.exp(s - s.max(axis=1, keepdims=True))
        return p / p.sum(axis=1, keepdims=True)

    def loss(x: F64) -> tuple[float, F64]:
        p = odds(x)
        value = -weight * np.log(np.maximum(p[n, y], 1e-300)).sum() + prior @ (x * x) / 2
        p[n, y] -= 1
        return float(value), weight * np.concatenate([[(p * z).sum()], p.sum(axis=0)]) + prior * x

    def least(low: float, high: float | None) -> F64:
        bounds = [(low, high)] + [(None, None)] * 3
        return minimize(loss, np.array([low, 0, 0, 0]), jac=True, method="L-BFGS-B", bounds=bounds).x

    x = least(0.0, None)
    p = odds(x)
    j = np.concatenate([z[:, :, None], np.broadcast_to(np.eye(3), (len(z), 3, 3))], 2)
    mean = np.einsum("ny,nyk->nk", p, j)
    curvature = weight * (np.einsum("ny,nyk,nyl->kl", p, j, j) - mean.T @ mean) + np.diag(prior)
    slope = max(0.0, float(x[0]) - c.doubt * float(np.sqrt(np.linalg.inv(curvature)[0, 0])))
    return slope, offset + least(slope, slope)[1:] - slope * middle


# learning

Sample = dict[str, NDArray[Any]]


class Windows:
    """Gathers windows with labels of their own while the stream passes, evenly thinned so that no more than `cap` are held.

    Labels are the moves over the horizons (ticks) and, H further on, the changes of AHEAD.
    """

    def __init__(self, instruments: Sequence[Instrument], names: Sequence[str], cap: int) -> None:
        self.columns = tuple(c for c in COLUMNS if c in names)
        if not self.columns:
            raise InputError(f"the transformer finds none of its columns among the features: it needs some of {', '.join(COLUMNS)}")
        n, c = len(instruments), len(self.columns)
        self._mid, self._ahead = list(names).index("mid"), list(names).index(AHEAD) if AHEAD in names else -1
        self._history = History(n, [list(names).index(c) for c in self.columns])
        self._labellers = (
            Labeller(instruments, counts=()), Labeller([dataclasses.replace(i, tick=SCALE) for i in instruments], counts=())
        )  # fmt: skip
        self._seen, self._step, self._cap = np.zeros(n, np.int64), 1, cap
        shapes: dict[str, tuple[tuple[int, ...], type]] = {"ahead": ((), np.float32)}
        for name, s in zip(FRAMES, STEPS):
            shapes |= {name: ((s, c), np.float16), f"{name}_gap": ((s,), np.float32)}
        self._held = Thinned(n, 2 * H, cap, **shapes)

    def push(self, block: Block) -> None:
        for _, _, piece in _pieces(block):
            self._push(piece)

    def _push(self, block: Block) -> None:
        e, at = block.events, block.closes
        ts, inst, m = e["ts_init"][at], e["instrument"][at].astype(np.int64), len(at)
        serial = np.empty(m, np.int64)
        for k in np.unique(inst):
            mine = np.flatnonzero(inst == k)
            serial[mine] = self._seen[k] + np.arange(len(mine))
            self._seen[k] += len(mine)
        while (-(-self._seen // self._step)).sum() > self._cap:
            self._step *= 2
        wanted = serial % self._step == 0
        with np.errstate(over="ignore", invalid="ignore"):
            columns = _flatten(self._history.push(block, wanted), ts[wanted])
        whole = {k: np.empty((m, *v.shape[1:]), v.dtype) for k, v in columns.items()}
        for name, v in columns.items():
            whole[name][wanted] = v
        mid = np.ascontiguousarray(block.rows[:, self._mid])
        ahead = np.ascontiguousarray(block.rows[:, self._ahead]) if self._ahead >= 0 else np.full(len(e), np.nan)
        moves, changes = (by.push(e, v, at) for by, v in zip(self._labellers, (mid, ahead)))
        self._held.push(ts, inst, moves, wanted, ahead=ahead[at].astype(np.float32), **whole)
        self._held.learn(changes._replace(label=changes.label + H))

    def sample(self) -> Sample:
        """What was gathered, the stream having ended: `ts`, `instrument`, `move`, `known_at` (n, 2 H), `ahead` (n,), for each timeframe
        raw values (n, S, C) float16, NaN missing, and `_gap` (n, S) seconds from the step to the end of the window, -1 absent."""
        moves, changes = (by.finish() for by in self._labellers)
        self._held.learn(moves)
        self._held.learn(changes._replace(label=changes.label + H))
        z = self._held.result()
        keep = z["serial"] % self._step == 0
        return z if keep.all() else {k: v[keep] for k, v in z.items()}


def _flatten(views: Views, ts: I64) -> Sample:
    out: Sample = {}
    for name, x, stamps, width in zip(FRAMES, views[:3], views[3:], WIDTH_NS):
        x = np.where(np.isfinite(x), x, np.nan)
        out[name] = np.clip(x, -F16_MAX, F16_MAX).astype(np.float16)
        out[f"{name}_gap"] = np.where(stamps != 0, ((ts // width * width)[:, None] - stamps) * 1e-9, -1).astype(np.float32)
    return out


class Lessons(NamedTuple):
    """What the windows teach: `y` (n, H) classes, -1 none; `move` (n, H) ticks; `later` (n, H) imbalance at the horizon, NaN none;
    `fit`, `calibration` rows; `worth` (2, H) independent labels of both; `size` (I, H) mean |move|; `rates` (H, 3) class shares."""

    y: I8
    move: F64
    later: F32
    fit: I64
    calibration: I64
    in_fit: NDArray[np.bool_]
    worth: F64
    size: F64
    rates: F64
    usable: NDArray[np.bool_]

    @classmethod
    def of(cls, study: Study, sample: Sample, config: Config) -> Self:
        n, i = len(sample["ts"]), len(study.instruments)
        empty = np.empty((n, 0), np.float32)
        own = study._replace(table=Table(sample["ts"], sample["instrument"], empty, np.zeros(n), sample["move"], sample["known_at"]))
        y, later = np.full((n, H), -1, np.int8), np.full((n, H), np.nan, np.float32)
        worth, size, rates, usable = np.zeros((2, H)), np.ones((i, H)), np.full((H, 3), 1 / 3), np.zeros(H, np.bool_)
        parts: tuple[list[I64], list[I64]] = ([], [])
        for h in study.usable:
            rows = own.fit_rows(h), own.calibration_rows(h)
            classes = own.classes(h)
            for part, r, to in zip(parts, rows, worth):
                y[r, h], to[h] = classes[r], own.independent(r, h)
                part.append(r)
            for r in (own.fit_rows(H + h), own.calibration_rows(H + h)):
                later[r, h] = np.clip(sample["ahead"][r] + sample["move"][r, H + h], -1, 1)
            moved = np.abs(sample["move"][rows[0], h])
            size[:, h] = moved.mean() if moved.any() else 1.0
            for k in range(i):
                mine = moved[sample["instrument"][rows[0]] == k]
                size[k, h] = mine.mean() if mine.any() else size[k, h]
            rates[h] = (np.bincount(y[np.concatenate(rows), h], minlength=3) + 1) / (sum(map(len, rows)) + 3)
            usable[h] = len(rows[0]) > 0
        fit, calibration = (np.unique(np.concatenate([*p, np.empty(0, np.int64)])) for p in parts)
        in_fit = (sample["ts"] >= study.split.start) & (sample["ts"] < study.split.calibrate)
        return cls(y, sample["move"][:, :H], later, fit, calibration, in_fit, worth, size, rates, usable)

    def scalers(self, sample: Sample) -> tuple[F64, F64]:
        """Centre and scale (I, C) of the newest rows in the fit slice: median and interquartile range / 1.349, 1 where nothing varies."""
        i, c = len(self.size), sample["tick"].shape[2]
        centre, scale = np.zeros((i, c)), np.ones((i, c))
        for k in range(i):
            x = sample["tick"][self.in_fit & (sample["instrument"] == k), -1].astype(np.float64)
            for j in range(c):
                v = x[np.isfinite(x[:, j]), j]
                if len(v):
                    low, centre[k, j], high = np.quantile(v, (0.25, 0.5, 0.75))
                    spread = (high - low) / 1.349 or v.std()
                    scale[k, j] = spread if spread > 1e-9 else 1.0
        return centre, scale


@contextlib.contextmanager
def _torch(threads: int) -> Iterator[None]:
    """torch with so many threads, deterministic, and its random numbers afterwards as before."""
    import torch

    before, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with torch.random.fork_rng():
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.set_num_threads(before)
            torch.use_deterministic_algorithms(strict)


class Batch(NamedTuple):
    """Windows as the network takes them: values (B, S, C), NaN missing, and gaps (B, S) s, -1 absent, of the three timeframes; `phase`
    (B, 2) of the running second and minute; `instrument` (B,)."""

    values: tuple[Tensor, ...]
    gaps: tuple[Tensor, ...]
    phase: Tensor
    instrument: Tensor


def network(w: Mapping[str, Tensor], batch: Batch, heads: int, dropout: float = 0.0) -> Tensor:
    """The same function as the kernel that serves, for learning: raw outputs (B, H, OUT)."""
    import torch
    import torch.nn.functional as F

    def rms(x: Tensor, gain: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + float(RMS_EPS)) * gain

    def split(x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)

    def drop(x: Tensor) -> Tensor:  # of tokens whole ones
        return x * F.dropout(x.new_ones(x.shape if x.ndim == 2 else (*x.shape[:2], 1)), dropout) if dropout else x

    j: Any = _part(Join, "join", w)
    memory, masks, newest = [], [], torch.empty(0)
    for f, (name, x, gap) in enumerate(zip(FRAMES, batch.values, batch.gaps)):
        e: Any = _part(Encoder, name, w)
        there = gap >= 0
        known = (~x.isnan()).float() * there.float()[..., None]
        z = x.nan_to_num(0.0) * known

        def normal(dim: int, z: Tensor = z, known: Tensor = known) -> Tensor:
            n = known.sum(dim, keepdim=True).clamp(min=1)
            d = (z - z.sum(dim, keepdim=True) / n) * known
            return d * torch.rsqrt((d * d).sum(dim, keepdim=True) / n + float(BIN_EPS))

        y = e.mix[0] * z + e.mix[1] * (normal(2) * e.gain_s[:, None] + e.shift_s[:, None]) + e.mix[2] * (normal(1) * e.gain_c + e.shift_c)
        valid = there[:, PATCH - 1 :: PATCH]
        old, new = gap[:, ::PATCH], gap[:, PATCH - 1 :: PATCH]
        ago = torch.log1p(1e3 * new.clamp(min=0)) / 8
        within = torch.where(old >= 0, torch.log1p(1e3 * (old - new).clamp(min=0)) / 8, 0.0)
        clock = torch.cat([torch.stack([ago, within], -1), torch.sin(ago[..., None] * e.omega + e.phi)], -1) * valid[..., None]
        h = drop(torch.cat([(y * known).unflatten(1, (-1, PATCH)).flatten(2), clock], -1) @ e.embed + e.place)
        seen = (valid | ~valid.any(1, keepdim=True))[:, None, None]
        for a in range(len(e.qkv)):
            q, k, v = (split(t) for t in (rms(h, e.norm_a[a]) @ e.qkv[a]).chunk(3, -1))
            h = h + drop(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2) @ e.merge[a])
            h = h + drop(F.relu(rms(h, e.norm_f[a]) @ e.up[a] + e.up_b[a])) @ e.down[a]
        newest = h[:, -1] if f == 0 else newest
        memory.append(rms(h, e.norm_m) + e.frame)
        masks.append(valid)
    m, seen = torch.cat(memory, 1), torch.cat(masks, 1)[:, None, None]
    row = batch.values[0][:, -1]
    gone = row.isnan()
    x = newest + torch.where(gone, 0.0, row) @ j.row + gone.float() @ j.missing + batch.phase @ j.phase + j.who[batch.instrument]
    q, k, v = split((rms(x, j.norm_q) @ j.q)[:, None]), split(m @ j.k), split(m @ j.v)
    x = x + drop(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(1) @ j.merge)
    x = x + drop(F.relu(rms(x, j.norm_f) @ j.up + j.up_b)) @ j.down
    return (drop(F.relu(rms(x, j.norm_o) @ j.head + j.head_b)) @ j.out + j.out_b).float().unflatten(-1, (H, OUT))


def _part(kind: Any, name: str, w: Mapping[str, Any]) -> Any:
    return kind(*(w[f"{name}.{k}"] for k in kind._fields))


class Mirror(NamedTuple):
    """Bid and ask exchanged: column c becomes sign[c] times column swap[c]."""

    swap: I64
    sign: F32

    @classmethod
    def of(cls, columns: Sequence[str]) -> Self:
        place = {c: i for i, c in enumerate(columns)}
        swap = [place.get(COLUMNS[c], i) for i, c in enumerate(columns)]
        return cls(np.array(swap), np.array([-1 if COLUMNS[c] == "-" else 1 for c in columns], np.float32))


class Data(NamedTuple):
    """A sample with all that turns rows of it into batches."""

    sample: Sample
    centre: F64
    scale: F64
    columns: tuple[str, ...]

    def batch(self, rows: I64, device: str, mirrored: NDArray[np.bool_] | None = None) -> Batch:
        import torch

        def to(a: NDArray[Any]) -> Tensor:
            return torch.from_numpy(a).to(device)

        s, k = self.sample, self.sample["instrument"][rows]
        centre, scale = (to(a[k].astype(np.float32))[:, None] for a in (self.centre, self.scale))
        values = []
        for name in FRAMES:
            raw = to(s[name][rows]).float()
            if mirrored is not None:
                swap, sign = (to(a) for a in Mirror.of(self.columns))
                raw = torch.where(to(mirrored)[:, None, None], raw[..., swap] * sign, raw)
            z = (raw - centre) / scale
            values.append(z / (1 + z.abs() / float(KNEE)))
        phase = np.stack([s["ts"][rows] % n / n for n in WIDTH_NS[1:]], 1).astype(np.float32)
        return Batch(tuple(values), tuple(to(s[f"{name}_gap"][rows]) for name in FRAMES), to(phase), to(k))


def outputs(w: Mapping[str, Tensor], data: Data, rows: I64, heads: int, device: str) -> F32:
    """Raw outputs (n, H, OUT) of the network on rows of a sample."""
    import torch

    out = np.empty((len(rows), H, OUT), np.float32)
    with torch.inference_mode():
        for a in range(0, len(rows), 512):
            out[a : a + 512] = network(w, data.batch(rows[a : a + 512], device), heads).cpu().numpy()
    return out


def _loss(out: Tensor, y: I8, moved: F64, later: F32, share: F64, config: Config) -> Tensor:
    """Sum over decisions and horizons of share (B, H) times: cross-entropy, and `beside` of it the deviance of an exponential |move|
    (least at its mean) and the squared error of the imbalance."""
    import torch
    import torch.nn.functional as F

    def to(a: NDArray[Any], dtype: Any = torch.float32) -> Tensor:
        return torch.from_numpy(a).to(out.device, dtype)

    told = to(y, torch.int64)
    logits = out[..., :3].flatten(0, 1)
    entropy = F.cross_entropy(logits, told.flatten(), ignore_index=-1, reduction="none", label_smoothing=config.smoothing)
    mean = F.softplus(out[..., 3]).clamp(min=1e-3)
    size = torch.where(told >= 0, to(np.nan_to_num(moved)) / mean + mean.log(), 0.0)
    ahead = torch.where(to(np.isfinite(later), torch.bool), (torch.tanh(out[..., 4]) - to(np.nan_to_num(later))) ** 2, 0.0)
    return (to(share) * (entropy.view_as(size) + config.beside * (size + ahead))).sum()


def _train(lessons: Lessons, data: Data, seed: int, config: Config) -> tuple[Weights, list[tuple[float, float]]]:
    """AdamW (Loshchilov and Hutter 2019) over the fit slice; the weights of the epoch with the least calibration loss, and both losses of
    each epoch. Every epoch begins with random numbers of its own, so one that was cut short is begun again and ends alike."""
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is there to train on: choose the device auto or cpu")
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    n, y = len(lessons.fit), lessons.y
    weigh = lessons.worth / (lessons.worth + config.worth)
    weigh /= np.maximum(weigh.sum(axis=1, keepdims=True), 1e-12)
    moved = np.abs(lessons.move) / lessons.size[data.sample["instrument"]]
    start = initial(len(data.columns), len(data.centre), config, seed)
    w = {k: torch.tensor(v, device=device, requires_grad=True) for k, v in start.items()}
    groups = [{"params": [w[k] for k in w if (w[k].ndim > 1) is plain], "weight_decay": config.decay * plain} for plain in (True, False)]
    optimiser = torch.optim.AdamW(groups, lr=config.rate)
    key = _key(lessons, data, seed, config, device)
    run = _resume(config.checkpoint, key, w, optimiser) or Run(0, 0, np.inf, [], start)
    total, micro = config.epochs * -(-n // config.batch), config.batch
    with Steps("transformer", config.epochs, "epochs") as steps:
        steps.advance(run.epoch)
        while run.epoch < config.epochs and run.epoch - run.best_epoch < config.patience:
            rng = np.random.default_rng([seed, run.epoch])
            torch.manual_seed(int(rng.integers(2**62)))
            order, sum_ = lessons.fit[rng.permutation(n)], 0.0
            for at in range(0, n, config.batch):
                rows = order[at : at + config.batch]
                flip = (rng.random(len(rows)) < 0.5) & config.mirror
                told = np.where((y[rows] >= 0) & flip[:, None], 2 - y[rows], y[rows]).astype(np.int8)
                later = np.where(flip[:, None], -lessons.later[rows], lessons.later[rows])
                known = (told >= 0).sum(axis=0)
                share = np.tile(weigh[0] / np.maximum(known, 1), (len(rows), 1))
                step = run.epoch * -(-n // config.batch) + at // config.batch
                for group in optimiser.param_groups:
                    group["lr"] = config.rate * min((step + 1) / (0.1 * total), 0.5 + 0.5 * np.cos(np.pi * step / total))
                while True:
                    try:
                        optimiser.zero_grad()
                        for part in (slice(a, a + micro) for a in range(0, len(rows), micro)):
                            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                                out = network(w, data.batch(rows[part], device, flip[part]), config.heads, config.dropout)
                            loss = _loss(out, told[part], moved[rows[part]], later[part], share[part], config)
                            loss.backward()  # type: ignore[no-untyped-call]
                            sum_ += float(loss.detach()) * len(rows) / n
                        break
                    except torch.OutOfMemoryError:
                        if micro <= 16:
                            raise
                        micro //= 2
                        print(f"transformer: the device is out of memory, training goes on with {micro} windows at once", file=sys.stderr)
                torch.nn.utils.clip_grad_norm_(list(w.values()), 1.0)
                optimiser.step()
            later_loss = _calibration_loss(outputs(w, data, lessons.calibration, config.heads, device), y[lessons.calibration], weigh[1])
            run = run.after(sum_, later_loss, w)
            _keep(config.checkpoint, key, run, w, optimiser)
            steps.advance()
    return run.best_weights, run.losses


def _calibration_loss(raw: F32, y: I8, weigh: F64) -> float:
    z = raw[..., :3].astype(np.float64)
    z -= z.max(axis=2, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(axis=2, keepdims=True))
    picked = np.take_along_axis(log_p, np.maximum(y, 0)[..., None].astype(np.int64), axis=2)[..., 0]
    known = y >= 0
    return float(-(weigh * np.where(known, picked, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)).sum())


class Run(NamedTuple):
    """Where training stands after `epoch` epochs; `losses` of the fit and the calibration slice in each."""

    epoch: int
    best_epoch: int
    best: float
    losses: list[tuple[float, float]]
    best_weights: Weights

    def after(self, fit: float, calibration: float, w: Mapping[str, Tensor]) -> Run:
        losses = [*self.losses, (fit, calibration)]
        if calibration < self.best or not self.losses:
            return Run(self.epoch + 1, self.epoch + 1, calibration, losses, {k: v.detach().cpu().numpy().copy() for k, v in w.items()})
        return self._replace(epoch=self.epoch + 1, losses=losses)


CHECKPOINT: Final = "transformer-checkpoint.safetensors"
MOMENTS: Final = ("exp_avg", "exp_avg_sq", "step")


def _key(lessons: Lessons, data: Data, seed: int, config: Config, device: str) -> str:
    """What a checkpoint belongs to: the same windows, labels, settings and seed."""
    told = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("checkpoint", "device")}
    digest = hashlib.sha256(json.dumps([told, device, seed, data.columns]).encode())
    for a in (*lessons, data.centre, data.scale, *(data.sample[k] for f in FRAMES for k in (f, f"{f}_gap"))):
        digest.update(np.ascontiguousarray(a).data)
    return digest.hexdigest()


def _keep(folder: Path | None, key: str, run: Run, w: Mapping[str, Tensor], optimiser: Any) -> None:
    """Write the checkpoint under another name and then into its place: one that is there is whole."""
    if folder is None:
        return
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{CHECKPOINT}.{os.getpid()}.part"
    tensors = {f"best.{k}": v for k, v in run.best_weights.items()}
    for k, v in w.items():
        for name, t in (("now", v), *((m, optimiser.state[v][m]) for m in MOMENTS)):
            tensors[f"{name}.{k}"] = t.detach().cpu().numpy()
    save_file(tensors, part, {"run": json.dumps([key, run.epoch, run.best_epoch, run.best, run.losses])})
    os.replace(part, folder / CHECKPOINT)


def _resume(folder: Path | None, key: str, w: Mapping[str, Tensor], optimiser: Any) -> Run | None:
    """Weights and optimiser as they stood, if the folder holds a checkpoint of this very training."""
    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import load_file

    if folder is None or not (folder / CHECKPOINT).is_file():
        return None
    try:
        with safe_open(folder / CHECKPOINT, "numpy") as f:
            found, epoch, best_epoch, best, losses = json.loads(f.metadata()["run"])
        if found != key:
            return None
        held = load_file(folder / CHECKPOINT)
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise InputError(f"{folder / CHECKPOINT} is damaged: remove it, training then begins anew") from None
    with torch.no_grad():
        for k, v in w.items():
            v.copy_(torch.from_numpy(held[f"now.{k}"]))
            optimiser.state[v] = {m: torch.from_numpy(held[f"{m}.{k}"]).to("cpu" if m == "step" else v.device) for m in MOMENTS}
    print(f"transformer: going on after epoch {epoch} from {folder / CHECKPOINT}", file=sys.stderr)
    return Run(epoch, best_epoch, best, [(a, b) for a, b in losses], {k: held[f"best.{k}"] for k in w})
