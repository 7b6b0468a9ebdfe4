"""What the venue's instrument ids of a DBN file mean, and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Span:
    """From `start` to `end` (ns UTC, half open) the venue's instrument id `number` meant `symbol`."""

    number: int
    symbol: str
    start: int = -(2**63)
    end: int = 2**63 - 1


class Numbers:
    """What the venue's instrument ids mean, at which time; extended while a file is read."""

    def __init__(self, spans: list[Span]) -> None:
        self._spans = list(spans)
        self._index: dict[tuple[str, int], int] = {}  # a continuous symbol is another instrument after its roll
        self._arrays: tuple[Array, Array, Array, Array] | None = None

    def learn(self, spans: list[Span]) -> None:
        """Mappings found within the stream hold from there on."""
        for s in spans:
            if s not in self._spans:
                self._spans = [o for o in self._spans if o.number != s.number] + [s]
                self._arrays = None

    def symbols(self, number: int) -> list[str]:
        """The symbols of an instrument id; its own digits where it has none."""
        found = sorted({s.symbol for s in self._spans if s.number == number})
        if not found:
            self.learn([Span(number, str(number))])
        return found or [str(number)]

    def at(self, number: int, ts: int) -> list[str]:
        """The symbol of an instrument id at a time."""
        return sorted({s.symbol for s in self._spans if s.number == number and s.start <= ts < s.end}) or self.symbols(number)

    def assign(self, symbol: str, number: int, index: int) -> None:
        """`index` into the instrument table for `symbol` where it is `number`; -2: pass its records over."""
        self._index[symbol, number] = index
        self._arrays = None

    def arrays(self) -> tuple[Array, Array, Array, Array]:
        """(ids, starts, ends, indices), sorted; -1 where no index was assigned."""
        if self._arrays is None:
            spans = sorted(self._spans, key=lambda s: (s.number, s.start))
            columns = zip(*((s.number, s.start, s.end, self._index.get((s.symbol, s.number), -1)) for s in spans)) if spans else ([],) * 4
            numbers, starts, ends, indices = (np.array(c, np.int64) for c in columns)
            self._arrays = numbers, starts, ends, indices
        return self._arrays
