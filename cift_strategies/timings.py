"""How long each stage takes, over the whole session: a histogram of fixed size, cheap enough for every event, with quantiles within 1 %.

Buckets as of HdrHistogram (G. Tene, 2012): every power of two is cut into 64 equal parts, so that a bucket is at most 1/64 of its values
wide; a quantile is the middle of its bucket, which is off by at most 1/128 (0.8 %).
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, Final

import numpy as np

BOUNDS_MS: Final = (*(m * 10.0**e for e in range(-2, 4) for m in (1, 2, 5)), 1e4)  # upper bounds of the buckets told, 10 us to 10 s
PARTS: Final = 64  # of a power of two
BITS: Final = 6
SIZE: Final = (64 - BITS) * PARTS
QUANTILES: Final = (("p50", 0.5), ("p99", 0.99), ("p999", 0.999))


class Histogram:
    """Of integers from 0 to 2**62; `count`, `sum`, `most`."""

    __slots__ = ("_at", "_buckets", "count", "most", "sum")

    def __init__(self) -> None:
        self.count = self.sum = self.most = 0
        self._buckets = np.zeros(SIZE, np.int64)
        self._at = memoryview(self._buckets)  # the same, quicker to count in

    def add(self, value: int) -> None:
        """Negative values count as 0."""
        if value < 0:
            value = 0
        shift = value.bit_length() - BITS - 1
        self._at[value if shift < 0 else (shift << BITS) + (value >> shift)] += 1
        self.count += 1
        self.sum += value
        if value > self.most:
            self.most = value

    def quantiles(self, *q: float) -> list[float]:
        """The least values that at least the shares `q` of all do not exceed, each within 1/128 of itself; NaN without any value."""
        if not self.count:
            return [float("nan")] * len(q)
        sums = np.cumsum(self._buckets)
        places = np.searchsorted(sums, np.ceil(np.asarray(q) * self.count).clip(1, self.count))
        return [min(_middle(int(i)), float(self.most)) for i in places]

    def told(self) -> dict[str, Any]:
        """p50, p99, p999 and max, None without any value."""
        if not self.count:
            return {"count": 0, **{name: None for name, _ in QUANTILES}, "max": None}
        found = self.quantiles(*(q for _, q in QUANTILES))
        return {"count": self.count, **{name: v for (name, _), v in zip(QUANTILES, found)}, "max": self.most}


def _middle(bucket: int) -> float:
    if bucket < 2 * PARTS:
        return float(bucket)
    shift = (bucket >> BITS) - 1
    return float(((PARTS + (bucket & (PARTS - 1))) << shift) + ((1 << shift) - 1) / 2)


class Timing:
    """One stage's durations in ns; `count`, `sum_ns`, and what :meth:`told` gives. It takes the same memory however many there are."""

    __slots__ = ("_buckets", "_fine")

    def __init__(self) -> None:
        self._buckets = [0] * (len(BOUNDS_MS) + 1)
        self._fine = Histogram()

    @property
    def count(self) -> int:
        return self._fine.count

    @property
    def sum_ns(self) -> int:
        return self._fine.sum

    def add(self, ns: int) -> None:
        self._buckets[bisect_left(_BOUNDS_NS, ns)] += 1
        self._fine.add(ns)

    def told(self, stage: str) -> dict[str, Any]:
        """As `server.schemas.Stage`: cumulative buckets by BOUNDS_MS; p50, p99, p99.9 within 1 % and max of all, None without any."""
        cumulative, total = [], 0
        for n in self._buckets[:-1]:
            total += n
            cumulative.append(total)
        told = {f"{k}_ms": None if v is None else v / 1e6 for k, v in self._fine.told().items() if k != "count"}
        return {"stage": stage, "count": self.count, "sum_ms": self.sum_ns / 1e6, **told, "buckets": cumulative}


_BOUNDS_NS: Final = [round(b * 1e6) for b in BOUNDS_MS]
