"""Which part of a catalog a backtest trains on, streams and trades: from metadata and stamps alone, in bounded memory."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from catalog.events import PAUSE_NS, Instrument
from catalog.parquet import DELTAS, QUOTES, Part, contents

NEVER: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Group:
    """A row group of one file: `rows` events between `first` and `last` (ns); a quote counts for two events."""

    path: Path
    index: int
    type: str
    id: str
    rows: int
    first: int
    last: int
    each: int


class Span:
    """The stamps of a catalog's events between `start` and `end` (ns, inclusive; None: all of it)."""

    def __init__(self, root: Path, instruments: Sequence[Instrument], start: int | None = None, end: int | None = None) -> None:
        self.instruments = list(instruments)
        self.start, self.end = -NEVER if start is None else start, NEVER if end is None else end
        deep = {x.id for x in instruments if x.level > 1}
        parts = [p for p in contents(root, [x.id for x in instruments]) if p.type != QUOTES or p.id not in deep]
        self.groups = [g for p in parts for g in _groups(p) if g.last >= self.start and g.first <= self.end]
        self.first = min((self._first(g) for g in self.groups), default=0)
        self.last = max((self._last(g) for g in self.groups), default=0)

    def _first(self, g: Group) -> int:
        if g.first >= self.start:
            return g.first
        ts = _stamps(g.path, g.index)
        return int(ts[np.searchsorted(ts, self.start)])

    def _last(self, g: Group) -> int:
        if g.last <= self.end:
            return g.last
        ts = _stamps(g.path, g.index)
        return int(ts[np.searchsorted(ts, self.end, "right") - 1])

    def count(self, until: int = NEVER) -> int:
        """Events with start <= ts_init <= min(until, end)."""
        return self._upto(min(until, self.end)) - self._upto(self.start - 1)

    def _upto(self, ts: int) -> int:
        total = 0
        for g in self.groups:
            if g.last <= ts:
                total += g.rows * g.each
            elif g.first <= ts:
                total += int(np.searchsorted(_stamps(g.path, g.index), ts, "right")) * g.each
        return total

    def split_at(self, fraction: float) -> int:
        """The first stamp (ns) by which `fraction` of the events have come."""
        wanted = fraction * self.count()
        low, high = self.first, self.last
        while low < high:
            middle = (low + high) // 2
            if self.count(middle) >= wanted:
                high = middle
            else:
                low = middle + 1
        return low

    def after(self, ts: int) -> int:
        """The first stamp after `ts`; the last of all where none is."""
        found = self.last
        for g in self.groups:
            if ts < g.first < found:
                found = g.first
            elif g.first <= ts < g.last:
                stamps = _stamps(g.path, g.index)
                found = min(found, int(stamps[np.searchsorted(stamps, ts, "right")]))
        return max(found, self.first)

    def hours(self) -> NDArray[np.int64]:
        """When the market traded (m, 2): [first, last] ns of each stretch in which no two events are further apart than PAUSE_NS."""
        found: list[tuple[int, int]] = []
        for g in self.groups:
            first, last = self._first(g), self._last(g)
            if last - first <= PAUSE_NS:
                found.append((first, last))
                continue
            ts = _stamps(g.path, g.index)
            ts = ts[(ts >= first) & (ts <= last)]
            cut = np.flatnonzero(np.diff(ts) > PAUSE_NS)
            found += zip(ts[np.r_[0, cut + 1]].tolist(), ts[np.r_[cut, len(ts) - 1]].tolist())
        joined: list[tuple[int, int]] = []
        for first, last in sorted(found):
            if joined and first - joined[-1][1] <= PAUSE_NS:
                joined[-1] = joined[-1][0], max(joined[-1][1], last)
            else:
                joined.append((first, last))
        return np.array(joined, np.int64).reshape(-1, 2)

    def ends(self) -> dict[int, int]:
        """Instrument index -> stamp of its last event."""
        index = {x.id: k for k, x in enumerate(self.instruments)}
        found: dict[int, int] = {}
        for g in self.groups:
            k = index[g.id]
            found[k] = max(found.get(k, 0), self._last(g))
        return found

    def fresh_start(self, before: int) -> int:
        """The last stamp, at or before `before`, from which every instrument's book starts empty or cleared; else the first of all.

        A book starts fresh at t when its first change at or after t is a clear, or is its first of all. Quotes carry the whole of
        their book and may start anywhere.
        """
        fresh: list[list[tuple[int, int]]] = []  # per instrument, (a, b]: a start within is fresh
        for x in self.instruments:
            mine = sorted((g for g in self.groups if g.id == x.id and g.type == DELTAS), key=lambda g: (g.first, g.last))
            if mine:
                fresh.append(_fresh(mine, self.start, before))
        candidates = sorted({b for spans in fresh for _, b in spans if b <= before}, reverse=True)
        for t in candidates:
            if all(_inside(spans, t) for spans in fresh):
                return max(t, self.first)
        return self.first


def _inside(spans: list[tuple[int, int]], t: int) -> bool:
    at = bisect_left(spans, t, key=lambda s: s[1])
    return at < len(spans) and spans[at][0] < t


def _fresh(groups: list[Group], start: int, before: int) -> list[tuple[int, int]]:
    previous = -NEVER
    found: list[tuple[int, int]] = []
    for g in groups:
        if g.first > before and found and found[-1][1] > before:
            break
        table = pq.ParquetFile(g.path, read_dictionary=["action"]).read_row_group(g.index, ["action", "ts_init"]).combine_chunks()
        ts = table.column("ts_init").cast(pa.int64()).to_numpy()
        action = table.column("action").chunk(0) if table.num_rows else None
        if action is None:
            continue
        words = action.dictionary.to_pylist()
        code = words.index("CLEAR") if "CLEAR" in words else -1
        clear = action.indices.to_numpy(zero_copy_only=False) == code
        inside = ts >= start
        ts, clear = ts[inside], clear[inside]
        if not len(ts):
            continue
        if previous == -NEVER:
            clear[0] = True
        for i in np.flatnonzero(clear):
            a, b = (int(ts[i - 1]) if i else previous), int(ts[i])
            if a < b:
                found.append((a, b))
        previous = int(ts[-1])
    return found


@lru_cache(maxsize=64)
def _stamps(path: Path, index: int) -> NDArray[np.int64]:
    found: NDArray[np.int64] = pq.ParquetFile(path).read_row_group(index, ["ts_init"]).column(0).cast(pa.int64()).to_numpy()
    return found


def _groups(part: Part) -> list[Group]:
    file = pq.ParquetFile(part.path)
    meta, column = file.metadata, file.schema_arrow.names.index("ts_init")
    found = []
    for i in range(meta.num_row_groups):
        group = meta.row_group(i)
        if group.num_rows:
            first, last = _bounds(group.column(column).statistics, part.path, i)
            found.append(Group(part.path, i, part.type, part.id, group.num_rows, first, last, 2 if part.type == QUOTES else 1))
    return found


def _bounds(statistics: Any, path: Path, index: int) -> tuple[int, int]:
    if statistics is not None and statistics.has_min_max:
        low, high = (pa.scalar(v, pa.timestamp("ns", "UTC")).value for v in (statistics.min, statistics.max))
        return int(low), int(high)
    stamps = _stamps(path, index)
    return int(stamps[0]), int(stamps[-1])
