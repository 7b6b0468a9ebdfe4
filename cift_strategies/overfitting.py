"""How much of the best of many trials is luck: the probability of backtest overfitting.

Takes the returns of all trials over the same periods, gives numbers and what their figures are drawn from.
"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

type F64 = NDArray[np.float64]


def sharpe(returns: F64) -> F64:
    """Mean over standard deviation (ddof 1) of each column of `returns` (T, N), a period; 0 where nothing varies."""
    return _ratio(returns.sum(axis=0), (returns**2).sum(axis=0), len(returns))


def _ratio(total: F64, squares: F64, n: int) -> F64:
    mean = total / n
    variance = (squares - n * mean**2) / max(1, n - 1)
    ok = variance > 1e-12 * np.maximum(squares / n, 1e-300)
    return np.where(ok, mean / np.sqrt(np.where(ok, variance, 1.0)), 0.0)


class Overfitting(NamedTuple):
    """`pbo`: how often the trial that was best in one half of the periods is below the median in the other. One entry of the arrays for
    each of the C(S, S/2) halves: `logit` of the best trial's relative rank in the other half, its Sharpe ratio in both."""

    pbo: float
    logit: F64
    inside: F64
    outside: F64

    @property
    def loss(self) -> float:
        """How often the best trial of one half loses in the other."""
        return float((self.outside < 0).mean())


def pbo(returns: F64, blocks: int = 16) -> Overfitting | None:
    """Combinatorially symmetric cross-validation of `returns` (T, N) cut into `blocks` (even) of equal length.

    Bailey, Borwein, Lopez de Prado, Zhu (2017), section 3: omega = rank / (N + 1) of the best trial of each half in the other, logit =
    ln(omega / (1 - omega)), PBO = share of logit <= 0. None for fewer than two trials or than 2 periods a block. Raises ValueError for an
    odd number of blocks.
    """
    if blocks < 2 or blocks % 2:
        raise ValueError(f"{blocks} blocks have no two halves")
    each, n = len(returns) // blocks, returns.shape[1]
    if each < 2 or n < 2:
        return None
    cut = returns[: each * blocks].reshape(blocks, each, n)
    total, squares = cut.sum(axis=1), (cut**2).sum(axis=1)
    halves = list(combinations(range(blocks), blocks // 2))
    logit, inside, outside = (np.empty(len(halves)) for _ in range(3))
    for i, half in enumerate(halves):
        a = np.array(half)
        b = np.setdiff1d(np.arange(blocks), a)
        here, there = (_ratio(total[x].sum(axis=0), squares[x].sum(axis=0), each * len(x)) for x in (a, b))
        best = int(here.argmax())
        omega = rankdata(there)[best] / (n + 1)
        logit[i], inside[i], outside[i] = np.log(omega / (1 - omega)), here[best], there[best]
    return Overfitting(float((logit <= 0).mean()), logit, inside, outside)
