"""Calibration error and how much of it is luck: the error that a perfectly calibrated forecast would show on so few independent labels.

Takes probabilities (n, 3), classes (n,) and their times, gives the expected calibration error, what it would be by chance alone, the
probability of as large an error by chance, and the error with its sampling part taken out.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from cift_models.labels import F64, I8, I64
from cift_models.significance import stretches

BINS: Final = 15
BLOCKS: Final = 400  # of time, at most
DRAWS: Final = 500


class Calibration(NamedTuple):
    """`ece`: mean |p - frequency| over classes and equally filled bins. `expected`: its mean under perfect calibration on this sample.

    `p`: P(an error as large | perfectly calibrated). `debiased`: root mean square of p - frequency over bins, sampling variance
    subtracted, 0 where no more than that is seen. The last three are NaN with fewer than 8 blocks of independent labels.
    """

    ece: float
    expected: float
    p: float
    debiased: float


def worsening(
    proba: F64, before: F64, y: I8, ts: I64, horizon_ns: int, level: float, bins: int = BINS, seed: int = 0
) -> tuple[float, float, float]:
    """How much larger the calibration error of `proba` (n, 3) is than that of `before` on the same decisions: difference, and its interval.

    Blocks of time as in :func:`calibration` are drawn with replacement, the same for both, bins kept; NaN ends below 8 blocks.
    """
    block = _blocks(ts, horizon_ns)
    blocks = int(block[-1]) + 1
    own = [_gaps(p, y, block, bins)[1:] for p in (proba, before)]
    now, was = (float(w @ np.abs(s.sum(axis=1))) for w, s in own)
    if blocks < 8:
        return now - was, float("nan"), float("nan")
    times = np.random.default_rng(seed).multinomial(blocks, np.full(blocks, 1 / blocks), DRAWS).T.astype(np.float64)
    drawn = [w @ np.abs(s @ times) for w, s in own]
    low, high = np.quantile(drawn[0] - drawn[1], [(1 - level) / 2, (1 + level) / 2])
    return now - was, float(low), float(high)


def _blocks(ts: I64, horizon_ns: int) -> I64:
    return stretches(ts, 4 * horizon_ns, BLOCKS)


def calibration_error(proba: F64, y: I8, bins: int = BINS) -> float:
    """Expected calibration error (Naeini et al. 2015) over all three classes, in equally filled bins of the predicted probability."""
    means, weight, _ = _gaps(proba, y, np.zeros(len(y), np.int64), bins)
    return float(weight @ np.abs(means))


def _gaps(proba: F64, y: I8, block: I64, bins: int) -> tuple[F64, F64, F64]:
    """Of each class and bin (b,): mean of p - outcome, share of all rows, and the blocks' shares of that mean (b, blocks)."""
    means, weight, sums = [], [], []
    for c in range(3):
        gap = proba[:, c] - (y == c)
        for part in np.array_split(np.argsort(proba[:, c], kind="stable"), min(bins, len(y))):
            means.append(gap[part].mean())
            weight.append(len(part) / (3 * len(y)))
            sums.append(np.bincount(block[part], gap[part], int(block[-1]) + 1) / len(part))
    return np.array(means), np.array(weight), np.array(sums)


def calibration(proba: F64, y: I8, ts: I64, horizon_ns: int, bins: int = BINS, seed: int = 0) -> Calibration:
    """The calibration of `proba` (n, 3) for classes `y` (n,) at decisions `ts` (n,), ascending, whose labels span `horizon_ns`.

    Labels overlap, so residuals are summed over blocks of time of four horizons or more (400 at most), and the blocks' signs are drawn
    anew: the wild cluster bootstrap (Cameron, Gelbach, Miller 2008), the null imposed, keeps all dependence within a block, between bins
    and between classes. The error is that of Naeini et al. 2015; the debiased one that of Kumar, Liang, Ma 2019, with variances by blocks.
    """
    n, nan = len(y), float("nan")
    if not n:
        return Calibration(nan, nan, nan, nan)
    block = _blocks(ts, horizon_ns)
    blocks = int(block[-1]) + 1
    m, w, s = _gaps(proba, y, block, bins)
    ece = float(w @ np.abs(m))
    if blocks < 8:
        return Calibration(ece, nan, nan, nan)
    signs = np.random.default_rng(seed).choice(np.array([-1.0, 1.0]), (blocks, DRAWS))
    chance: F64 = w @ np.abs(s @ signs)
    excess = float(w @ (m**2 - (s**2).sum(axis=1)))
    return Calibration(ece, float(chance.mean()), float((1 + (chance >= ece).sum()) / (1 + DRAWS)), float(np.sqrt(max(excess, 0.0))))
