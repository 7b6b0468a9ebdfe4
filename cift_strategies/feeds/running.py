"""Returns and volatility of one price as it comes: mean and variance of all, and with recent returns counting more.

Takes (time, price) pairs in the order in which they are known; :class:`Returns` holds a few numbers, whatever the length of the stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

SECOND: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Summary:
    """What is known now; NaN where there is too little. Returns are logarithmic, of one interval."""

    count: int  # returns
    last: float  # price
    latest: float  # the newest whole interval's return
    mean: float
    std: float
    volatility: float  # exponentially weighted, per sqrt(second)


class Returns:
    """Log returns of the last price in each interval of `every_s`, intervals without a price being returns of 0.

    Mean and variance: Welford (1962), runs of zeros at once by Chan, Golub and LeVeque (1983). Volatility: exponentially weighted second
    moment, half of the weight within `half_life_s` (RiskMetrics, 1996), begun with the first return. A price after more than `pause_s`
    without any (another session) begins a new stretch: what moved in between is no return.
    """

    __slots__ = ("_cell", "_decay", "_every", "_m2", "_moment", "_pause", "_sampled", "count", "last", "latest", "mean")

    def __init__(self, every_s: float = 1.0, half_life_s: float = 60.0, pause_s: float = 300.0) -> None:
        if not 0 < every_s <= pause_s or not half_life_s > 0:
            raise ValueError("the interval must be above 0 and not beyond the pause, the half-life above 0")
        self._every, self._pause = round(every_s * SECOND), round(pause_s * SECOND)
        self._decay = 0.5 ** (every_s / half_life_s)
        self._cell, self._sampled = 0, math.nan  # interval of the newest price; price at the end of the one before
        self.count, self.mean, self._m2, self._moment = 0, 0.0, 0.0, math.nan
        self.last = self.latest = math.nan

    def update(self, ts: int, price: float) -> None:
        """`price` holds from `ts` (ns) on; one that is not above 0 says nothing, one that comes late counts for the present interval."""
        if not 0.0 < price < math.inf:
            return
        cell = ts // self._every
        if math.isnan(self.last):
            self._cell = cell
        elif cell > self._cell:
            self._close(cell - self._cell)
            self._cell = cell
        self.last = price

    def _close(self, intervals: int) -> None:
        if not math.isnan(self._sampled):
            self._add(math.log(self.last / self._sampled))
        self._sampled = self.last
        if intervals * self._every > self._pause:
            self._sampled = math.nan
        elif intervals > 1:
            self._zeros(intervals - 1)

    def _add(self, r: float) -> None:
        self.count += 1
        delta = r - self.mean
        self.mean += delta / self.count
        self._m2 += delta * (r - self.mean)
        self._moment = r * r if self.count == 1 else self._decay * self._moment + (1.0 - self._decay) * r * r
        self.latest = r

    def _zeros(self, n: int) -> None:
        total = self.count + n
        self._m2 += self.mean * self.mean * self.count * n / total
        self.mean *= self.count / total
        self._moment = self._moment * self._decay**n if self.count else 0.0
        self.count, self.latest = total, 0.0

    @property
    def std(self) -> float:
        return math.sqrt(self._m2 / (self.count - 1)) if self.count > 1 else math.nan

    @property
    def volatility(self) -> float:
        """Per sqrt(second)."""
        return math.sqrt(self._moment / (self._every / SECOND)) if self.count else math.nan

    def summary(self) -> Summary:
        mean = self.mean if self.count else math.nan
        return Summary(self.count, self.last, self.latest, mean, self.std, self.volatility)
