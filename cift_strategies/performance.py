"""Statistics of a finished run: drawdown, costs, mark-outs, calibration, deflated Sharpe ratio.

Takes plain numpy columns (fills, decisions, mid path), gives numbers and curves that the report draws and a test can recompute.
Times are int64 ns, prices and money float64 in currency units, sides +1 buy and -1 sell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtrit

from catalog.events import PAUSE_NS

F = NDArray[np.float64]
I64 = NDArray[np.int64]

EULER: Final = 0.5772156649015329


class MidPath(NamedTuple):
    """The mid price of one instrument as it was seen: `ts` ascending (n,) ns and `mid` (n,) currency units."""

    ts: I64
    mid: F

    def at(self, ts: I64) -> F:
        """The last finite mid known at each of `ts`; NaN before the first and after the last one."""
        known = np.isfinite(self.mid)
        times, mids = self.ts[known], self.mid[known]
        if not len(times):
            return np.full(len(ts), np.nan)
        i = np.searchsorted(times, ts, side="right") - 1
        return np.where((i >= 0) & (ts <= times[-1]), mids[np.maximum(i, 0)], np.nan)


@dataclass(frozen=True, slots=True)
class Fills:
    """Executions in time order, one array entry each. `fee` is paid (negative: a rebate)."""

    ts: I64
    instrument: NDArray[np.object_]
    role: NDArray[np.object_]  # entry, stop, target, exit
    side: NDArray[np.int8]
    price: F
    size: F
    fee: F
    mid: F  # when it was filled
    decided: F  # the mid when the entry of its trade was decided
    tick: F  # price units
    tick_value: F  # currency per tick and 1.0 of size

    def __len__(self) -> int:
        return len(self.ts)

    def of(self, instrument: str) -> Fills:
        """The fills of one instrument."""
        return self.where(self.instrument == instrument)

    def where(self, keep: NDArray[np.bool_]) -> Fills:
        return Fills(*(getattr(self, name)[keep] for name in self.__slots__))

    @property
    def per_tick(self) -> F:
        """What one tick on each fill amounts to, in currency. (n,)"""
        return self.size * self.tick_value

    @property
    def from_mid(self) -> F:
        """Ticks paid against the mid of the moment, positive: worse than the mid. (n,)"""
        return np.asarray(self.side * (self.price - self.mid) / self.tick)

    @property
    def slippage(self) -> F:
        """Ticks paid: entries against the mid when they were decided, exits against the mid of the moment. (n,)"""
        entry = self.role == "entry"
        return np.asarray(self.side * (self.price - np.where(entry, self.decided, self.mid)) / self.tick)


def drawdown(curve: F) -> F:
    """How far `curve` (n,) stands below its best so far, zero included as the start; all values <= 0."""
    return np.asarray(curve - np.maximum.accumulate(np.maximum(curve, 0.0))) if len(curve) else np.zeros(0)


class Costs(NamedTuple):
    """What trading cost. Money in currency; `units` is what one tick of cost on every unit entered, there and back, amounts to."""

    at_mid: float  # PnL had every fill been at the mid of its moment, free
    spread: float  # paid against those mids
    fees: float
    units: float

    @property
    def net(self) -> float:
        return self.at_mid - self.paid

    @property
    def paid(self) -> float:
        return self.spread + self.fees

    @property
    def paid_ticks(self) -> float:
        """Cost per unit, there and back, in ticks; NaN without fills."""
        return self.paid / self.units if self.units > 0 else float("nan")

    @property
    def break_even_ticks(self) -> float:
        """Cost per unit, there and back, in ticks, at which the PnL is zero; NaN without fills."""
        return self.at_mid / self.units if self.units > 0 else float("nan")

    def scaled(self, multiples: F) -> F:
        """Net PnL with all costs times each of `multiples` (n,)."""
        return np.asarray(self.at_mid - multiples * self.paid)

    def fees_scaled(self, multiples: F) -> F:
        """Net PnL at the prices got, with fees alone times each of `multiples` (n,)."""
        return np.asarray(self.at_mid - self.spread - multiples * self.fees)

    def fixed(self, ticks: F) -> F:
        """Net PnL when every unit costs each of `ticks` (n,) there and back, nothing else."""
        return np.asarray(self.at_mid - ticks * self.units)


def costs(fills: Fills, final: float) -> Costs:
    """Split a net PnL of `final` (currency) into what the mids gave and what was paid. Fills without a mid count as filled at it."""
    spread, fees = float(np.nansum(fills.from_mid * fills.per_tick)), float(fills.fee.sum())
    return Costs(final + spread + fees, spread, fees, float(fills.per_tick[fills.role == "entry"].sum()))


def markouts(path: MidPath, ts: I64, direction: NDArray[np.int8], delays: I64, tick: float) -> F:
    """Signed mid move in ticks from each decision (n,) to each of `delays` (d,) ns later: (n, d), NaN where the path has ended."""
    start = path.at(ts)
    moves = np.stack([path.at(ts + d) - start for d in delays], axis=1) if len(delays) else np.zeros((len(ts), 0))
    return np.asarray(direction[:, None] * moves / tick)


def block_mean(values: F, ts: I64, blocks: int = 30, level: float = 0.95) -> tuple[F, F, F]:
    """Mean of each column of `values` (n, d) and its interval from `blocks` equal spans of time (batch means, Student's t).

    Overlapping decisions are not independent; whole spans of time nearly are. Of a time without any, a night say, no more than PAUSE_NS
    counts. NaN are left out; fewer than 3 filled spans: interval NaN.
    """
    d = values.shape[1]
    mean, half = np.full(d, np.nan), np.full(d, np.nan)
    if not len(ts):
        return mean, mean, mean
    order = np.argsort(ts, kind="stable")
    time = np.empty(len(ts), np.int64)
    time[order] = np.cumsum(np.minimum(np.diff(ts[order], prepend=ts[order[:1]]), PAUSE_NS))
    block = time * blocks // (int(time.max()) + 1)
    for j in range(d):
        ok = np.isfinite(values[:, j])
        n = np.bincount(block[ok], minlength=blocks).astype(float)
        if not n.sum():
            continue
        total = np.bincount(block[ok], weights=values[ok, j], minlength=blocks)
        mean[j] = total.sum() / n.sum()
        k = int((n > 0).sum())
        if k >= 3:
            spread = float(np.sum((total - mean[j] * n) ** 2)) * k / (k - 1)
            half[j] = stdtrit(k - 1, 0.5 + level / 2) * np.sqrt(spread) / n.sum()
    return mean, mean - half, mean + half


class Reliability(NamedTuple):
    """Forecast probability against frequency: mean `forecast`, `frequency`, `number` per filled bin, and the expected calibration error."""

    forecast: F
    frequency: F
    number: I64
    ece: float


def reliability(proba: F, happened: NDArray[np.bool_], bins: int = 15) -> Reliability:
    """Reliability diagram of `proba` (n,) in [0, 1] for an event that `happened` (n,) or not, in `bins` of equal width.

    ECE = sum over bins of share times |frequency - forecast| (Naeini, Cooper, Hauskrecht 2015, equation 3).
    """
    ok = np.isfinite(proba)
    p, y = proba[ok], happened[ok].astype(float)
    if not len(p):
        return Reliability(np.zeros(0), np.zeros(0), np.zeros(0, np.int64), float("nan"))
    b = np.clip((p * bins).astype(int), 0, bins - 1)
    n = np.bincount(b, minlength=bins)
    full = n > 0
    forecast = np.bincount(b, weights=p, minlength=bins)[full] / n[full]
    frequency = np.bincount(b, weights=y, minlength=bins)[full] / n[full]
    return Reliability(forecast, frequency, n[full], float(np.sum(n[full] * np.abs(forecast - frequency)) / len(p)))


class Sharpe(NamedTuple):
    """A Sharpe ratio per observation and what is left of it after the number of trials, length and shape of the sample are counted in."""

    ratio: float
    observations: int
    skew: float
    kurtosis: float  # 3 for a normal distribution
    trials: int
    expected_best: float  # the best ratio that so many trials without skill are expected to show
    deflated: float  # probability that the true ratio is above zero, given the above
    probabilistic: float = float("nan")  # the same as if this had been the only trial
    error: float = float("nan")  # standard error of the ratio, skew and kurtosis counted in (Mertens 2002)
    error_normal: float = float("nan")  # were the returns normal (Lo 2002, equation 9)
    least: float = float("nan")  # observations after which the probabilistic ratio would reach 0.95; NaN where it never would

    @property
    def defined(self) -> bool:
        return bool(np.isfinite(self.deflated))


def sharpe_error(ratio: float, n: int, g3: float = 0.0, g4: float = 3.0) -> float:
    """Standard error of a Sharpe ratio per observation, from `n` independent ones of skew `g3` and kurtosis `g4`.

    sqrt((1 - g3 SR + (g4 - 1) / 4 SR^2) / (n - 1)) (Mertens 2002; Bailey and Lopez de Prado 2012, equation 8); with the skew and
    kurtosis of the normal distribution Lo's (2002), sqrt((1 + SR^2 / 2) / (n - 1)). NaN where the variance would be negative.
    """
    scale = 1 - g3 * ratio + (g4 - 1) / 4 * ratio**2
    return float(np.sqrt(scale / (n - 1))) if n > 1 and scale > 0 else float("nan")


def probabilistic_sharpe(ratio: float, n: int, g3: float = 0.0, g4: float = 3.0, benchmark: float = 0.0) -> float:
    """P(true ratio > `benchmark`) (Bailey and Lopez de Prado 2012, equation 9); the ratios per observation. NaN without an error."""
    return float(ndtr((ratio - benchmark) / sharpe_error(ratio, n, g3, g4)))


def deflated_sharpe(
    returns: F, trials: int = 1, trial_ratios: Sequence[float] = (), trial_variance: float | None = None
) -> Sharpe:
    """Deflated Sharpe ratio of `returns` (n,) after `trials` strategies were tried.

    Bailey and Lopez de Prado (2014), equations 1 and 2: the ratio is compared with the best expected of N unskilled trials,
    sqrt(V) ((1 - g) z(1 - 1/N) + g z(1 - 1/(N e))), and its standard error allows for skew and kurtosis. V is the variance of
    `trial_ratios` where two or more are given, else `trial_variance`, else that of an unskilled ratio, 1 / (n - 1); ratios of trials are
    per observation, as here. One trial: the probabilistic Sharpe ratio. NaN where fewer than 3 returns or no variance.
    """
    r = returns[np.isfinite(returns)]
    n, nan = len(r), float("nan")
    trials = max(int(trials), len(trial_ratios), 1)
    sd = float(r.std(ddof=1)) if n > 2 else 0.0
    if not sd > 1e-12 * float(np.abs(r).max(initial=0.0)):
        return Sharpe(nan, n, nan, nan, trials, nan, nan)
    z = (r - r.mean()) / r.std()
    ratio, g3, g4 = float(r.mean()) / sd, float((z**3).mean()), float((z**4).mean())
    variance = 1.0 / (n - 1) if trial_variance is None else trial_variance
    if len(trial_ratios) > 1:
        variance = float(np.var(trial_ratios, ddof=1))
    best = 0.0
    if trials > 1:
        best = np.sqrt(variance) * ((1 - EULER) * ndtri(1 - 1 / trials) + EULER * ndtri(1 - 1 / (trials * np.e)))
    error = sharpe_error(ratio, n, g3, g4)
    least = 1 + (n - 1) * (ndtri(0.95) * error / ratio) ** 2 if ratio > 0 else nan
    deflated, alone = (probabilistic_sharpe(ratio, n, g3, g4, b) for b in (best, 0.0))
    return Sharpe(ratio, n, g3, g4, trials, float(best), deflated, alone, error, sharpe_error(ratio, n), float(least))


STEPS_NS: Final = {
    "second": 10**9,
    "10 seconds": 10 * 10**9,
    "minute": 60 * 10**9,
    "5 minutes": 300 * 10**9,
    "hour": 3600 * 10**9,
    "day": 86400 * 10**9,
}


def step_of(start: int, end: int, at_most: int = 1000) -> tuple[str, int]:
    """The finest step (name, ns) of the clock by which [start, end] gives no more than `at_most` returns."""
    for name, ns in STEPS_NS.items():
        if (end - start) // ns <= at_most:
            return name, ns
    return "day", STEPS_NS["day"]


def changes(ts: I64, value: F, start: int, end: int) -> tuple[str, F]:
    """Name of the step of :func:`step_of`, and the moves in each step of [start, end] of a curve that is zero before its first `ts`."""
    name, step = step_of(start, end)
    return name, np.diff(np.r_[0.0, value][np.searchsorted(ts, np.arange(start, end + 1, step), side="right")])


def thin(ts: I64, value: F, points: int = 2000) -> tuple[I64, F]:
    """At most `points` of a path, the lowest and the highest of each stretch of equal time, so that extremes stay visible."""
    ok = np.isfinite(value)
    ts, value = ts[ok], value[ok]
    if len(ts) <= points:
        return ts, value
    buckets = max((points - 2) // 2, 1)
    b = np.minimum((ts - ts[0]) * buckets // (ts[-1] - ts[0] + 1), buckets - 1)
    order = np.lexsort((value, b))
    first = np.flatnonzero(np.r_[True, np.diff(b[order]) > 0])
    last = np.r_[first[1:] - 1, len(b) - 1]
    keep = np.unique(np.r_[0, order[first], order[last], len(ts) - 1])
    return ts[keep], value[keep]
