"""What luck alone does to a result: trades in another order, stretches of time drawn again.

Takes the money of round trips, or of steps of the clock, gives distributions and intervals. Seeded: the same input gives the same figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import numpy as np

from cift_strategies.performance import F

DRAWS: Final = 2_000
MOST_CELLS: Final = 4_000_000  # numbers held at once


class Shuffled(NamedTuple):
    """The largest drawdown (positive) as it came, those of `draws` (sorted) other orders, and the share of orders as bad or worse."""

    actual: float
    draws: F
    worse: float


def deepest(paths: F) -> F:
    """Largest fall of each path (..., n) below its best so far, the start at zero included; >= 0."""
    if not paths.shape[-1]:
        return np.zeros(paths.shape[:-1])
    return np.asarray((np.maximum(np.maximum.accumulate(paths, axis=-1), 0.0) - paths).max(axis=-1))


def shuffled_drawdowns(net: F, draws: int = DRAWS, seed: int = 0) -> Shuffled:
    """Monte Carlo of trade order: the drawdown of the sum of `net` (n,), in its order and in `draws` random ones."""
    rng, found = np.random.default_rng(seed), np.zeros(draws)
    each = max(1, MOST_CELLS // max(1, len(net)))
    for a in range(0, draws, each):
        rows = np.tile(net, (min(each, draws - a), 1))
        found[a : a + each] = deepest(np.cumsum(rng.permuted(rows, axis=1), axis=1))
    actual = float(deepest(np.cumsum(net)))
    tolerance = 1e-9 * max(1.0, float(np.abs(net).sum()))
    return Shuffled(actual, np.sort(found), float((1 + (found >= actual - tolerance).sum()) / (1 + draws)))


def stationary_draws(n: int, block: float, draws: int, seed: int = 0) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Indices (draws, n) of a stationary bootstrap (Politis and Romano 1994): blocks of geometric length, `block` in the mean, that start
    anywhere and go round the end."""
    rng = np.random.default_rng(seed)
    new = rng.random((draws, n)) < 1 / block
    new[:, 0] = True
    start = rng.integers(0, n, (draws, n))
    at = np.maximum.accumulate(np.where(new, np.arange(n), 0), axis=1)
    return np.asarray((np.take_along_axis(start, at, axis=1) + np.arange(n) - at) % n, np.int64)


def bootstrap(
    values: F, statistics: Mapping[str, Callable[[F], F]], seed: int = 0, draws: int = DRAWS
) -> dict[str, tuple[float, float, float]]:
    """Each statistic of `values` (n,) with its 95 % percentile interval; a statistic takes (..., n) and gives (...).

    Blocks are n^(1/3) steps long in the mean, the order at which their error is least (Künsch 1989). NaN below 10 values.
    """
    n, nan = len(values), float("nan")
    if n < 10:
        return {name: (nan, nan, nan) for name in statistics}
    made: dict[str, list[F]] = {name: [] for name in statistics}
    each = max(1, MOST_CELLS // n)
    for a in range(0, draws, each):
        drawn = values[stationary_draws(n, max(1.0, n ** (1 / 3)), min(each, draws - a), seed + a)]
        for name, f in statistics.items():
            made[name].append(np.asarray(f(drawn)))
    out = {}
    for name, f in statistics.items():
        all_ = np.concatenate(made[name])
        low, high = np.nanquantile(all_, [0.025, 0.975]) if np.isfinite(all_).any() else (nan, nan)
        out[name] = (float(f(values)), float(low), float(high))
    return out


def ratio(values: F) -> F:
    """Sharpe ratio per observation of (..., n); NaN where nothing varies."""
    sd = values.std(axis=-1, ddof=1)
    return np.asarray(np.where(sd > 0, values.mean(axis=-1) / np.where(sd > 0, sd, 1.0), np.nan))


def gaining(values: F) -> F:
    """Share of (..., n) above zero, of those that are not zero; 0 where all are."""
    return np.asarray((values > 0).sum(axis=-1) / np.maximum((values != 0).sum(axis=-1), 1))
