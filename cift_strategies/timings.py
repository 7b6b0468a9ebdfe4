"""How long each stage takes: a running histogram and the newest values for quantiles, cheap enough for every event."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, Final

import numpy as np

RECENT: Final = 1_024  # values that quantiles are of
BOUNDS_MS: Final = (*(m * 10.0**e for e in range(-2, 4) for m in (1, 2, 5)), 1e4)  # upper bounds of the buckets, 10 us to 10 s
_BOUNDS_NS: Final = [round(b * 1e6) for b in BOUNDS_MS]


class Timing:
    """One stage's durations in ns; `count`, `sum_ns`, and what :meth:`told` gives."""

    __slots__ = ("_buckets", "_recent", "count", "sum_ns")

    def __init__(self) -> None:
        self.count = self.sum_ns = 0
        self._buckets = [0] * (len(BOUNDS_MS) + 1)
        self._recent = np.zeros(RECENT, np.int64)

    def add(self, ns: int) -> None:
        self._recent[self.count % RECENT] = ns
        self._buckets[bisect_left(_BOUNDS_NS, ns)] += 1
        self.count += 1
        self.sum_ns += ns

    def told(self, stage: str) -> dict[str, Any]:
        """As `server.schemas.Stage`: cumulative buckets by BOUNDS_MS; p50, p99 and max of the newest RECENT values, None without any."""
        cumulative, total = [], 0
        for n in self._buckets[:-1]:
            total += n
            cumulative.append(total)
        recent = self._recent[: min(self.count, RECENT)]
        p50, p99, most = (float(v) / 1e6 for v in np.quantile(recent, (0.5, 0.99, 1.0))) if len(recent) else (None, None, None)
        return {
            "stage": stage, "count": self.count, "sum_ms": self.sum_ns / 1e6, "p50_ms": p50, "p99_ms": p99, "max_ms": most,
            "buckets": cumulative,
        }  # fmt: skip
