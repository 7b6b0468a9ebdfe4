"""Better, or lucky: tests of one forecast against another on losses whose labels overlap.

Takes losses of decisions along a stream, gives p values: Diebold-Mariano for two forecasts, the model confidence set for several, Holm's
adjustment for many hypotheses at once, and whether the agreement of members is worth more than confidence alone. Decisions come at
irregular times, so all tests work on sums over stretches of time, at least a horizon long: labels of one overlap with the next at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from catalog.events import PAUSE_NS
from cift_models.labels import F64, I64

ALPHA: Final = 0.025  # one-sided: what a 95 % interval leaves on either side
LEAST: Final = 20  # stretches of time below which nothing is tested
MOST: Final = 2_000


class MeanTest(NamedTuple):
    """Of a mean above zero: `t` statistic, one-sided `p`, both NaN where there is too little to test; over `stretches` of time."""

    mean: float
    t: float
    p: float
    stretches: int


def stretches(ts: I64, width_ns: int, most: int) -> I64:
    """The stretch of time (n,) that holds each decision, from 0 and without a number left out; `ts` (n,) ascending, n >= 1, ns.

    They are `width_ns` long, or as long as it takes for `most` + 1 to hold everything. A pause in trading (a night, a weekend) counts for
    one `width_ns`: by the calendar three days would be three of 200 stretches.
    """
    step = np.diff(ts, prepend=ts[:1])
    time = np.cumsum(np.where(step > PAUSE_NS, np.minimum(step, width_ns), step))
    width = max(int(width_ns), -(-(int(time[-1]) + 1) // most))
    return np.unique(time // width, return_inverse=True)[1]


def stretched(values: F64, ts: I64, width_ns: int, most: int = MOST) -> tuple[F64, F64]:
    """Sums (T, ...) of `values` (n, ...) over :func:`stretches`, T <= `most` + 1, and how many decisions each holds (T,)."""
    group = stretches(ts, width_ns, most)
    start = np.searchsorted(group, np.arange(int(group[-1]) + 1))
    return np.add.reduceat(values, start, axis=0), np.diff(np.append(start, len(ts))).astype(np.float64)


def mean_test(d: F64, ts: I64, horizon_ns: int) -> MeanTest:
    """Diebold and Mariano (1995): is the mean of `d` (n,), at ascending `ts` (ns), above zero?

    The variance is Newey and West's (1987) of the sums over stretches of time, with the correction and Student's t of Harvey, Leybourne
    and Newbold (1997, eqs. 8-9) for forecasts of h = 2 stretches ahead: labels end within the next one.
    """
    from scipy.stats import t as student

    nan = float("nan")
    if len(d) < 2:
        return MeanTest(float(d.mean()) if len(d) else nan, nan, nan, len(d))
    sums, count = stretched(d, ts, horizon_ns)
    size, n, h = len(sums), float(count.sum()), 2
    mean = float(sums.sum() / n)
    if size < LEAST:
        return MeanTest(mean, nan, nan, size)
    e = sums - mean * count
    lags = max(h - 1, int(4 * (size / 100) ** (2 / 9)))
    spread = e @ e + 2 * sum((1 - j / (lags + 1)) * (e[j:] @ e[:-j]) for j in range(1, lags + 1))
    if not spread > 1e-24 * max(1.0, float(sums @ sums)):  # the same difference all along
        return MeanTest(mean, 0.0 if mean == 0 else float(np.sign(mean)) * float("inf"), 1.0 if mean <= 0 else 0.0, size)
    t = mean * n / float(np.sqrt(spread)) * float(np.sqrt((size + 1 - 2 * h + h * (h - 1) / size) / size))
    return MeanTest(mean, t, float(student.sf(t, size - 1)), size)


def holm(p: Sequence[float] | F64) -> F64:
    """Adjusted p values (Holm 1979) of all hypotheses together; NaN is a hypothesis that was not tested and counts as 1."""
    p = np.nan_to_num(np.asarray(p, np.float64), nan=1.0)
    order, out = np.argsort(p, kind="stable"), np.empty(len(p))
    out[order] = np.minimum(1.0, np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]))
    return out


def confidence_set(
    losses: F64, ts: I64, horizon_ns: int, names: Sequence[str], size: float = 0.1, seed: int = 0, resamples: int = 500
) -> dict[str, Any]:
    """The models that may be the best: all that the data do not tell from it at level `size` (Hansen, Lunde and Nason 2011, range test).

    `losses` (n, k) of the same decisions at ascending `ts`. Circular blocks of stretches of time are drawn. Returns `p` by name and
    `included`; both empty where there is too little to test. Models with the same losses stand and fall together.
    """
    if len(ts) < 2 or losses.shape[1] < 2:
        return {"size": size, "p": {}, "included": []}
    sums, _ = stretched(losses, ts, horizon_ns, 400)
    if len(sums) < LEAST:
        return {"size": size, "p": {}, "included": []}
    means, which = np.unique(sums * (len(sums) / len(ts)), axis=1, return_inverse=True)
    if means.shape[1] == 1:
        p = np.ones(1)
    else:
        from arch.bootstrap import MCS  # heavy, and only scoring needs it

        found = MCS(means, size, resamples, max(2, round(len(means) ** (1 / 3))), "R", "cbb", seed=seed)
        found.compute()
        p = found.pvalues["Pvalue"].sort_index().to_numpy()
    by_name = {name: float(p[j]) for name, j in zip(names, which.ravel())}
    return {"size": size, "p": by_name, "included": [name for name, v in by_name.items() if v > size]}


def agreement(proba: F64, direction: NDArray[np.int8], move: F64, spread: F64, ts: I64, horizon_ns: int) -> dict[str, Any]:
    """Do decisions that members agree upon pay more than the same number of the most confident ones, agreed upon or not?

    `proba` (n, 3), `direction` (n,) as decided, `move` and `spread` (n,) in ticks. Returns the cover, mean signed move less spread and
    hit rate of either, and the test of their difference (ticks a decision); only cover 0 where nothing was decided.
    """
    acted = (direction != 0) & np.isfinite(move) & np.isfinite(spread)
    m = int(acted.sum())
    out: dict[str, Any] = {"cover": m / max(1, len(ts))}
    if not m:
        return out
    side = np.where(proba[:, 2] >= proba[:, 0], 1.0, -1.0)
    confidence = np.where(np.isfinite(move) & np.isfinite(spread), np.maximum(proba[:, 0], proba[:, 2]), -np.inf)
    plain = np.zeros(len(ts), np.bool_)
    plain[np.argsort(-confidence, kind="stable")[:m]] = True
    gains = {"rule": np.where(acted, direction * move - spread, 0.0), "plain": np.where(plain, side * move - spread, 0.0)}
    for name, chosen, d in (("rule", acted, direction), ("plain", plain, side)):
        moved = chosen & (move != 0)
        hits = float((d * move > 0)[moved].mean()) if moved.any() else float("nan")
        out[name] = {"net_ticks": float(gains[name].sum() / m), "hit_rate": hits}
    test = mean_test((gains["rule"] - gains["plain"]) * (len(ts) / m), ts, horizon_ns)
    return {**out, "common": float((acted & plain).sum() / m), "difference": test.mean, "t": test.t, "p": test.p}
