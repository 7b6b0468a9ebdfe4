"""Databento's market records, as they come in, as the EVENT rows that an import of the same records gives.

Takes pieces of records of any size, keeps what carries over from one to the next: books, stamps, what the venue's instrument ids mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from catalog.book import BASE, CAP, LEVELS, LIVE
from catalog.definitions import UNDEFINED_TIME
from catalog.events import CLEAR, EVENT, SCALE, Instrument, move
from catalog.levels import LAYOUTS, STATE, convert, parts, room
from catalog.quality import NAMES, Checker

Array = NDArray[Any]
_KEPT: Final = np.isin(np.arange(256), list(b"ACMTR"))


class Rows:
    """Of `instruments`; `checker` counts what is wrong with them, :meth:`learn` tells the venue's id of one."""

    def __init__(self, instruments: Sequence[Instrument]) -> None:
        n = len(instruments)
        self.instruments = list(instruments)
        self.checker = Checker(self.instruments)
        self._numbers, self._index = np.empty(0, np.int64), np.empty(0, np.int64)  # the venue's, ascending, and ours
        lowest = np.full(n, np.iinfo(np.int64).min)
        self._last, self._book = lowest, lowest.copy()
        self._states = np.zeros((n, STATE), np.int64)

    def learn(self, number: int, k: int) -> None:
        """From now on the venue's `number` means instrument `k`."""
        others = self._numbers != number
        numbers, index = np.append(self._numbers[others], number), np.append(self._index[others], k)
        order = np.argsort(numbers)
        self._numbers, self._index = numbers[order], index[order]

    def index(self, number: int) -> int:
        """The instrument that the venue's `number` means; -1 where it is none of ours."""
        return int(self._of(np.array([number]))[0])

    def _of(self, numbers: Array) -> Array:
        """The instruments of the venue's numbers; -1 where they are none of ours."""
        if not len(self._numbers):
            return np.full(len(numbers), -1)
        at = np.minimum(np.searchsorted(self._numbers, numbers), len(self._numbers) - 1)
        return np.where(self._numbers[at] == numbers, self._index[at], -1)

    def orders(self, mbo: Array) -> Array:
        """Of MBO records (n,): EVENT (m,), F, N and unknown instruments left out, before :meth:`finish`."""
        mbo = mbo[_KEPT[mbo["action"]]]
        k = self._of(mbo["instrument_id"])
        if (k < 0).any():
            mbo, k = mbo[k >= 0], k[k >= 0]
        out = np.zeros(len(mbo), EVENT)
        for name in ("order_id", "sequence", "action", "flags"):
            out[name] = mbo[name]
        recv, event = mbo["ts_recv"], mbo["ts_event"]
        out["ts_init"] = np.where(recv == UNDEFINED_TIME, event, recv)
        out["ts_event"] = np.where(event == UNDEFINED_TIME, recv, event)
        out["price"] = np.where(mbo["action"] == CLEAR, 0, mbo["price"])
        out["size"] = mbo["size"].astype(np.int64) * SCALE
        out["side"] = np.where(mbo["side"] == ord("B"), 1, np.where(mbo["side"] == ord("A"), -1, 0))
        out["instrument"] = k
        return out

    def levels(self, records: Array, schema: str) -> Array:
        """Of records (n, size) of trades, mbp-1 or mbp-10: EVENT (m,)."""
        layout = LAYOUTS[schema]
        records = records[self._of(records[:, 4:8].view("<u4")[:, 0]) >= 0]
        heads, prices, sizes = parts(layout, records)
        ever = np.full(len(self._numbers), -(2**63)), np.full(len(self._numbers), 2**63 - 1)
        rows = len(heads) * room(layout)
        out, where = np.empty(rows, EVENT), np.empty(rows, np.int64)
        n, _, _ = convert(heads, prices, sizes, layout.mode, self._numbers, *ever, self._index, self._states, out, where)
        return out[:n]

    def finish(self, events: Array) -> Array:
        """Check, rewrite and move `events` (:mod:`catalog.quality`, :func:`catalog.events.move`); those that must not be are gone."""
        self.checker.update(events, rewrite=True)
        events = events[events["action"] != 0]
        move(events, self._last, self._book)
        return events

    def empty(self, k: int) -> bool:
        """Whether the book of an instrument is empty."""
        book = self.checker._books.get(k)
        return book is None or not book[LIVE]

    def touch(self, k: int) -> tuple[int, int, int, int] | None:
        """Best bid, its size, best ask, its size of an instrument, in units of EVENT; None where a side is empty."""
        book = self.checker._books.get(k)
        if book is None or not (book[LEVELS] and book[LEVELS + 1]):
            return None
        bid, ask = (int(book[BASE] + 3 * side * book[CAP] + 3 * (book[LEVELS + side] - 1)) for side in (0, 1))
        return int(book[bid]), int(book[bid + 1]), -int(book[ask]), int(book[ask + 1])

    def count(self, kind: str) -> int:
        """How often a kind of :data:`catalog.quality.KINDS` was seen."""
        at = NAMES.index(kind)
        return sum(int(counts[at]) for _, counts, _ in self.checker._state.values())
