"""What is known about the health of a feed: per instrument its newest stamp, gaps, silence; for the feed its reconnects and drops.

Pure counting, no clock of its own: whoever receives records tells `seen` and `gap` with the wall's time, whoever decides asks `silent`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

SILENT_NS: Final = 1_800_000_000  # asked every 100 ms, silence is noticed within 2 s


@dataclass(slots=True)
class Pulse:
    """Of one instrument; times in ns, 0 before the first record."""

    ts_stream: int = 0  # newest stamp of the stream
    wall: int = 0  # when that was received
    records: int = 0
    gaps: int = 0  # times that records are missing or may be
    missing: int = 0  # records known to be missing
    late: int = 0  # out of order
    duplicates: int = 0


class Health:
    """Of one feed. `instruments`: ids, or anything with an `id`; `began`: wall's time from which silence counts before the first record."""

    def __init__(self, instruments: Sequence[Any], *, silent_ns: int = SILENT_NS, began: int = 0) -> None:
        self.ids = [str(getattr(x, "id", x)) for x in instruments]
        self.pulses = [Pulse(wall=began) for _ in self.ids]
        self.silent_ns = silent_ns
        self.reconnects = self.dropped = 0
        self.reasons: dict[str, int] = {}  # of gaps

    def row(self, instrument_id: str) -> int:
        """The row of an instrument; it is added where it is new."""
        if instrument_id not in self.ids:
            self.ids.append(instrument_id)
            self.pulses.append(Pulse())
        return self.ids.index(instrument_id)

    def seen(self, k: int, ts_stream: int, wall_ns: int, n: int = 1) -> None:
        """`n` records of instrument `k` have come, the newest stamped `ts_stream`."""
        p = self.pulses[k]
        p.records += n
        p.ts_stream = max(p.ts_stream, ts_stream)
        p.wall = max(p.wall, wall_ns)

    def gap(self, k: int, missing: int = 0, why: str = "sequence") -> None:
        """Records of `k` are missing: `missing` of them where the number is known."""
        self.pulses[k].gaps += 1
        self.pulses[k].missing += missing
        self.reasons[why] = self.reasons.get(why, 0) + 1

    def reconnected(self, why: str = "reconnect") -> None:
        """The line was lost and is back: what was sent meanwhile is missing, of every instrument."""
        self.reconnects += 1
        for k in range(len(self.pulses)):
            self.gap(k, why=why)

    def silent(self, wall_ns: int) -> list[int]:
        """The instruments of which nothing has come for longer than `silent_ns`."""
        return [k for k, p in enumerate(self.pulses) if wall_ns - p.wall > self.silent_ns]

    def quiet(self, wall_ns: int) -> bool:
        """Whether nothing at all has come for longer than `silent_ns`: the feed is silent, not a market thin."""
        return bool(self.pulses) and wall_ns - max(p.wall for p in self.pulses) > self.silent_ns

    def counts(self) -> dict[str, Any]:
        """Plain numbers for status lines and metrics."""
        return {
            "reconnects": self.reconnects,
            "dropped": self.dropped,
            "reasons": dict(self.reasons),
            "instruments": {
                i: {n: getattr(p, n) for n in ("ts_stream", "records", "gaps", "missing", "late", "duplicates")}
                for i, p in zip(self.ids, self.pulses)
            },
        }
