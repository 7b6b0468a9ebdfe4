"""A log-linear pool of the members' votes: what each adds to the class rates, in log-odds, with a weight of its own in every regime.

Takes votes, outcomes and regimes of decisions that no member was fitted on; gives a :class:`Pool`, and its forecasts for each stretch of
time when it is fitted on the others. Where members know different things the pool is sharper than each of them, which no mean of
probabilities can be (Genest and Zidek 1986; Ranjan and Gneiting 2010); its constants calibrate what comes out. A vote says two things,
whether the price moves and which way, each with a weight of its own: of the first all members know much the same, activity and spread,
which must not be counted five times; of the second each knows something else.
"""

from __future__ import annotations

import itertools
from typing import Any, Final, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
SOFT: Final = 1e-4  # every vote is mixed with this much of the uniform one, so that no loss is infinite
STRETCHES: Final = 4  # of time, for forecasts of decisions that the pool was not fitted on
ROWS: Final = 40_000  # decisions of a horizon that a pool is fitted on
# beliefs before any label, as precisions: of a weight around equal shares, of a regime's weight around that of all, of a member's two
# weights around each other, of a constant around 0
EVEN: Final = 5.0
ALIKE: Final = 30.0
WHOLE: Final = 30.0
PLAIN: Final = 30.0
SHARP: Final = 1.5  # by how much a pool of careful members, each drawn towards class rates, is made bolder as a forecast of its own
BOTH: Final = ("mixture", "pool", "sharper pool")  # the forecasts between which the second Hedge chooses
RATES: Final = 100.0  # of class rates, in independent labels: an instrument's are those of all, and those even


class Pool(NamedTuple):
    """log P(y) = log rate_y + bias_y + sum over members awake of (weight_0 still e_y + weight_1 way s_y), normalised.

    N members, H horizons. With l_y = log p_y - log rate_y of a member's vote p: still = l_flat - (l_up + l_down) / 2, and way =
    (l_up - l_down) / 2; e is 1 at flat and else 0, s the sign of y. Were both weights the same, this would be weight times l_y.
    """

    weight: F64  # (R + 1, H, N, 2) >= 0, the last row for an unknown regime
    bias: F64  # (H, 3)
    rate: F64  # (I, H, 3) class rates of an instrument


@njit(cache=True, nogil=True)
def pooled(votes, weight, bias, rate, out):  # type: ignore[no-untyped-def]
    """The pool of votes (N, 3), softened, NaN asleep, by weights (N, 2) into `out` (3,); NaN where all are asleep."""
    awake, top, total = False, -np.inf, 0.0
    for y in range(3):
        out[y] = np.log(rate[y]) + bias[y]
    for a in range(len(votes)):
        if votes[a, 0] == votes[a, 0]:
            awake = True
            down, flat, up = np.log(votes[a, 0] / rate[0]), np.log(votes[a, 1] / rate[1]), np.log(votes[a, 2] / rate[2])
            way = weight[a, 1] * (up - down) / 2
            out[0] -= way
            out[1] += weight[a, 0] * (flat - (up + down) / 2)
            out[2] += way
    for y in range(3):
        top = max(top, out[y])
    for y in range(3):
        out[y] = np.exp(out[y] - top)
        total += out[y]
    for y in range(3):
        out[y] = out[y] / total if awake else np.nan


@njit(cache=True, nogil=True)
def sharpened(p, rate, out):  # type: ignore[no-untyped-def]
    """A pool's forecast p (3,) with :data:`SHARP` times its log-odds against the class rates (3,), into `out` (3,); NaN stays NaN."""
    total = 0.0
    for y in range(3):
        out[y] = rate[y] * (p[y] / rate[y]) ** SHARP
        total += out[y]
    for y in range(3):
        out[y] /= total


@njit(cache=True, nogil=True)
def pooled_all(votes, regime, instrument, weight, bias, rate, out):  # type: ignore[no-untyped-def]
    """:func:`pooled` of one horizon's decisions: votes (n, N, 3), weight (R + 1, N, 2), rate (I, 3), out (n, 3)."""
    for i in range(len(votes)):
        pooled(votes[i], weight[regime[i]], bias, rate[instrument[i]], out[i])


@njit(cache=True, nogil=True)
def settle(w, p, eta, share):  # type: ignore[no-untyped-def]
    """One Hedge update with fixed share (Herbster and Warmuth 1998) of the weights w (B,) of the forecasts in :data:`BOTH`, which gave
    what happened the probabilities p (B,); returns the loss of all together."""
    total, mean, after = 0.0, 0.0, 0.0
    for a in range(len(w)):
        total += w[a]
        mean += w[a] * p[a]
        w[a] *= p[a] ** eta
        after += w[a]
    for a in range(len(w)):
        w[a] = (1 - share) * w[a] / after + share / len(w)
    return -np.log(mean / total)


@njit(cache=True, nogil=True)
def blended(w, mix, pool, rate, sharp, out):  # type: ignore[no-untyped-def]
    """The forecasts of :data:`BOTH` with their weights w (B,), into `out` (3,); `sharp` (3,) gets the sharper pool."""
    sharpened(pool, rate, sharp)
    for y in range(3):
        out[y] = (w[0] * mix[y] + w[1] * pool[y] + w[2] * sharp[y]) / (w[0] + w[1] + w[2])


@njit(cache=True, nogil=True)
def _blend(ts, known_at, order, regime, y, mix, pool, rate, eta, share, w, out):  # type: ignore[no-untyped-def]
    p, sharp, o = np.empty(len(BOTH)), np.empty(3), 0
    for c in range(len(ts)):
        while o < len(order) and known_at[order[o]] <= ts[c]:
            i = order[o]
            if y[i] >= 0 and mix[i, 0] == mix[i, 0] and pool[i, 0] == pool[i, 0]:
                sharpened(pool[i], rate[i], sharp)
                p[0], p[1], p[2] = mix[i, y[i]], pool[i, y[i]], sharp[y[i]]
                settle(w[regime[i]], p, eta, share)
            o += 1
        if pool[c, 0] == pool[c, 0]:
            blended(w[regime[c]], mix[c], pool[c], rate[c], sharp, out[c])
        else:
            out[c] = mix[c]


def class_rates(y: NDArray[np.int8], instrument: I64, instruments: int, worth: float) -> F64:
    """(I, 3): class rates of each instrument, drawn towards those of all; the labels y (n,) in 0..2 count as `worth` independent ones."""
    own = np.stack([np.bincount(y[instrument == k], minlength=3) for k in range(instruments)]) * (worth / max(1, len(y)))
    all_ = own.sum(axis=0) + RATES / 3
    return (own + RATES * all_ / all_.sum()) / (own.sum(axis=1, keepdims=True) + RATES)


def fit_horizon(
    votes: F64, y: NDArray[np.int8], regime: I64, rate: F64, worth: float, regimes: int, first: F64 | None = None
) -> tuple[F64, F64]:
    """Weights (regimes, N, 2) and constants (3,) of one horizon, by penalised likelihood: the most probable under the beliefs above.

    `votes` (n, N, 3) softened, NaN asleep; `y` (n,); `regime` (n,), the last one unknown; `rate` (n, 3). The n labels overlap: together
    they count as `worth` independent ones. A member that is always asleep has weight 0. `first` (N,): shares before any label, > 0;
    None: even.
    """
    from scipy.optimize import minimize

    lean = np.nan_to_num(np.log(votes) - np.log(rate)[:, None])
    still, way = lean[..., 1] - (lean[..., 0] + lean[..., 2]) / 2, (lean[..., 2] - lean[..., 0]) / 2
    none = np.zeros_like(way)
    tilt = np.concatenate([np.stack([none, still, none], axis=2), np.stack([-way, none, way], axis=2)], axis=1)
    n, members, _ = tilt.shape
    awake = np.isfinite(votes[:, :, 0]).any(axis=0)
    even = awake * (np.ones(len(awake)) if first is None else first)
    awake, even = np.tile(awake, 2), np.tile(even / (even.sum() or 1.0), 2)
    scale, at = worth / max(1, n), np.arange(n)
    base = np.log(rate)

    def loss(x: F64) -> tuple[float, F64]:
        common, own, bias = x[:members], x[members:-3].reshape(regimes, members), x[-3:]
        z = base + bias + np.einsum("na,nay->ny", own[regime], tilt)
        z -= z.max(axis=1, keepdims=True)
        p = np.exp(z)
        total = p.sum(axis=1)
        value = scale * (np.log(total) - z[at, y]).sum()
        p /= total[:, None]
        p[at, y] -= 1
        g_own = np.zeros((regimes, members))
        np.add.at(g_own, regime, scale * np.einsum("ny,nay->na", p, tilt))
        apart, split = own - common, np.subtract(*common.reshape(2, -1))
        beliefs = (EVEN, common - even), (ALIKE, apart), (WHOLE, split), (PLAIN, bias)
        value += 0.5 * sum(belief * (off**2).sum() for belief, off in beliefs)
        g_common = EVEN * (common - even) - ALIKE * apart.sum(axis=0) + WHOLE * np.concatenate([split, -split])
        return float(value), np.concatenate([g_common, (g_own + ALIKE * apart).ravel(), scale * p.sum(axis=0) + PLAIN * bias])

    first = np.concatenate([np.tile(even, regimes + 1), np.zeros(3)])
    bounds = [(0.0, None if w else 0.0) for w in np.tile(awake, regimes + 1)] + [(None, None)] * 3
    x = minimize(loss, first, jac=True, method="L-BFGS-B", bounds=bounds).x
    return np.moveaxis(x[members:-3].reshape(regimes, 2, -1), 1, 2).copy(), x[-3:]


def soften(votes: NDArray[Any]) -> F64:
    return (votes.astype(np.float64) + SOFT) / (1 + 3 * SOFT)


def fit_pool(
    votes: NDArray[Any], y: NDArray[np.int8], regime: I64, ts: I64, known_at: I64, instrument: I64, worth: F64, instruments: int,
    regimes: int, first: F64 | None = None,
) -> tuple[Pool, F64]:  # fmt: skip
    """The pool of all decisions, and (n, H, 3) forecasts of each from a pool fitted on the other stretches of time.

    `votes` (n, N, H, 3), NaN asleep; `y` (n, H), -1 no label; `regime` (n,) in 0..regimes - 1; `worth` (H,) independent labels;
    `first` (H, N) as in :func:`fit_horizon`. A label that overlaps with one of a stretch, by `known_at` (n, H), teaches nothing
    about it.
    """
    n, members, h_n, _ = votes.shape
    pool = Pool(np.zeros((regimes, h_n, members, 2)), np.zeros((h_n, 3)), np.full((instruments, h_n, 3), 1 / 3))
    out = np.full((n, h_n, 3), np.nan)
    edges = ts[np.minimum(np.arange(STRETCHES + 1) * n // STRETCHES, n - 1)] if n else np.zeros(STRETCHES + 1, np.int64)
    edges[-1] += 1
    for h in range(h_n):
        p, known = soften(votes[:, :, h]), y[:, h] >= 0
        for a, b in [*itertools.pairwise(edges), (0, 0)]:
            mine = np.flatnonzero(known & (ts >= a) & (ts < b))
            until = known_at[mine, h].max(initial=b)
            rows = np.flatnonzero(known & ((known_at[:, h] <= a) | (ts >= until)) if b else known)
            share = worth[h] * len(rows) / max(1, known.sum())
            rate = class_rates(y[rows, h], instrument[rows], instruments, share)
            some = rows[:: max(1, -(-len(rows) // ROWS))]
            before = None if first is None else first[h]
            weight, bias = fit_horizon(p[some], y[some, h], regime[some], rate[instrument[some]], share, regimes, before)
            if b:
                mine = np.flatnonzero((ts >= a) & (ts < b))
                told = np.empty((len(mine), 3))
                pooled_all(p[mine], regime[mine], instrument[mine], weight, bias, rate, told)
                out[mine, h] = told
            else:
                pool.weight[:, h], pool.bias[h], pool.rate[:, h] = weight, bias, rate
    return pool, out


def blend(
    ts: I64, known_at: I64, regime: I64, y: NDArray[np.int8], mix: F64, pool: F64, rate: F64, eta: F64, share: float, regimes: int
) -> tuple[F64, F64]:
    """The forecasts of :data:`BOTH` along the stream: (n, H, 3) with the weights as they were then, and the last ones (R + 1, H, B).

    `mix`, `pool` and class rates `rate` (n, H, 3). Each outcome counts from the first decision at which it is known; all start with the
    same weight. `share` for an independent label.
    """
    n, h_n = y.shape
    weights, out = np.full((regimes, h_n, len(BOTH)), 1 / len(BOTH)), np.empty((n, h_n, 3))
    for h in range(h_n):
        order, w, told = np.argsort(known_at[:, h], kind="stable"), weights[:, h].copy(), np.empty((n, 3))
        held = [np.ascontiguousarray(a[:, h]) for a in (mix, pool, rate)]
        label = y[:, h].astype(np.int64)
        when, e = np.ascontiguousarray(known_at[:, h]), eta[h]
        _blend(ts, when, order, regime, label, held[0], held[1], held[2], e, share * e, w, told)
        weights[:, h], out[:, h] = w, told
    return out, weights
