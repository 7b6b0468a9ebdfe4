"""What a backtest takes, told before it begins: from the number of events and instruments.

Fitted to whole runs over ES, the demo and Binance: memory as it was, seconds from their CPU time and the wall time of the demo on two idle
cores; `pytest tests/bench/test_bench_estimate.py --benchmark-only -s` tells both. Runs with models that are there were not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from catalog.parquet import DELTAS, QUOTES, Part

START_S: Final = {True: 12.0, False: 5.0}  # of a backtest, with training and without: fitting, the report
EVENT_S: Final = {True: 1.3e-5, False: 1e-5}  # and per event
BASE_MEMORY: Final = 1_150 << 20  # bytes of its two processes, however many events there are
INSTRUMENT_MEMORY: Final = 140 << 20  # and per instrument, bytes


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a backtest of these `events` takes: `seconds` on two idle cores, kernels compiled; `memory` of its processes in bytes."""

    events: int
    seconds: float
    memory: int

    @property
    def told(self) -> str:
        """In words."""
        s = self.seconds
        span = f"{s:.0f} s" if s < 90 else f"{s / 60:.0f} min" if s < 5_400 else f"{s / 3600:.1f} h"
        return f"about {span} and {self.memory / 2**30:.1f} GB of memory"


def estimate(events: int, instruments: int, training: bool = True) -> Estimate:
    """Of a backtest that trains on the earlier part, or (`training` False) uses models that are there."""
    seconds = START_S[training] + EVENT_S[training] * events
    return Estimate(events, seconds, BASE_MEMORY + INSTRUMENT_MEMORY * instruments)


def count_events(parts: Sequence[Part]) -> int:
    """From metadata alone: a quote counts as two events, and not at all where its instrument has deltas."""
    deep = {p.id for p in parts if p.type == DELTAS}
    return sum(p.rows * (2 if p.type == QUOTES else 1) for p in parts if p.type != QUOTES or p.id not in deep)
