"""From Nautilus's objects to feature vectors in one call of compiled code: read the message, advance book and features, close batches.

Takes OrderBookDeltas, TradeTick and QuoteTick, gives the :class:`FeatureVector` of each. Events and rows lie in blocks of memory that are
written once and used again only when nobody holds anything of them. The rows are those of `cift_models.features.replay` to the
last bit, however the deltas are grouped.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from time import time_ns
from typing import Any, Final

import numpy as np
from nautilus_trader.model import AggressorSide, InstrumentId, OrderBookDeltas, Price, Quantity, QuoteTick, TradeId, TradeTick
from numba import carray, njit  # type: ignore[attr-defined]
from numba.core import config

import cift_models.windows
from catalog.book import BASE, CAP, LEVELS
from catalog.events import EVENT, Instrument, move
from cift_models.feature_kernel import SOURCE, F, run
from cift_models.features import BLOCK, State, new_state
from cift_models.windows import new_batches
from cift_strategies import layout
from cift_strategies.messages import FeatureVector
from cift_strategies.translate import UNIT, audit, pack, pack_quote, pack_trade

type Array = np.ndarray[Any, Any]

ROWS: Final = 2_048  # of a block
AUDIT: Final = 1_024  # messages from one check of what was read at once to the next
_ORDER: Final = np.arange(BLOCK)
_closes: Final = cift_models.windows._closes
_new: Final = tuple.__new__

# What the kernel works on, by address: int64 words, from TABLE on two for each instrument, the address and number of its state's words
LAYOUT, IDS, INSTRUMENTS, EVENTS, OUT, ENDS, SIZE, USED, BATCHES, LAST, BOOK, ORDER, TABLE = range(13)


@njit(cache=True)
def _touch(book: Array) -> Any:
    """Sizes at the best bid and ask of a book of `catalog.book` (the last entry of each side); 0 where a side is empty."""
    base, asks, m, n = book[BASE], book[BASE] + 3 * book[CAP], book[LEVELS], book[LEVELS + 1]
    return book[base + 3 * m - 2] if m else 0, book[asks + 3 * n - 2] if n else 0


# Both are kept on disk under a key made of what they close over, as in `cift_models.feature_kernel`: a number, because a compiled function
# has another name in each process, and they would be compiled in each.
_SOURCE: Final = zlib.crc32(b"".join(Path(str(m.__file__)).read_bytes() for m in (cift_models.windows, layout)), SOURCE) | 1


def _advance(source: int) -> Callable[..., tuple[int, ...]]:
    @njit(cache=True, error_model="numpy")
    def advance(words, events, order, out, batches, ends, last, book):  # type: ignore[no-untyped-def]
        """Returns (events taken before the book needs room or the session ends, batches closed by all of the events)."""
        if source and len(last):
            for i in range(len(events)):
                events[i]["ts_init"] = events[i]["ts_event"]
            move(events, last, book)
        m = _closes(batches, events["ts_init"], events["instrument"], ends)
        return run(words, events, order, np.int64(0), min(len(events), len(order)), out), m

    return advance


advance = _advance(_SOURCE)


def _receive(source: int) -> Callable[..., tuple[int, ...]]:
    @njit(cache=True, error_model="numpy")
    def receive(desk, message, packed):  # type: ignore[no-untyped-def]
        """Take the message at an address or, if 0, the `packed` events that lie at the end of the block.

        Returns (events n, instrument, events taken, batches closed, index of the first that closes one, ts_init of the last,
        size at the best bid and ask if a batch closed); n of them or an instrument of -1: nothing taken.
        """
        assert source
        d = carray(layout.pointer(desk), TABLE, np.int64)  # type: ignore[call-arg]
        m, size, first, n = d[INSTRUMENTS], d[SIZE], d[USED], packed
        block = carray(layout.pointer(d[EVENTS]), size, EVENT)
        if message:
            plan = carray(layout.pointer(d[LAYOUT]), layout.WORDS, np.int64)
            n, k = layout.read(plan, carray(layout.pointer(d[IDS]), (m, 2), np.uint64), message, block, first)
            if k < 0 or first + n > size:
                return n, k, -1, 0, 0, 0, 0, 0
        else:
            k = np.int64(block[first]["instrument"])
        d[USED] = first + n
        table = carray(layout.pointer(desk), TABLE + 2 * m, np.int64)
        words = carray(layout.pointer(table[TABLE + 2 * k]), table[TABLE + 2 * k + 1], np.int64)
        out = carray(layout.pointer(d[OUT]), (size, F), np.float64)
        ends = carray(layout.pointer(d[ENDS]), size, np.int64)
        stamps = m if d[LAST] else 0
        last, book = carray(layout.pointer(d[LAST]), stamps, np.int64), carray(layout.pointer(d[BOOK]), stamps, np.int64)
        batches = carray(layout.pointer(d[BATCHES]), (m, 2), np.int64)
        order = carray(layout.pointer(d[ORDER]), BLOCK, np.int64)
        events = block[first : first + n]
        done, closed = advance(words, events, order, out[first : first + n], batches, ends, last, book)
        bid, ask = _touch(words) if closed else (0, 0)
        return n, k, done, closed, ends[0], events[n - 1]["ts_init"], bid, ask

    return receive


receive = _receive(_SOURCE)


class _Block:
    """Memory of `n` events and their rows."""

    __slots__ = ("bytes", "events", "rows")

    def __init__(self, n: int) -> None:
        self.events, self.rows = np.empty(n, EVENT), np.empty((n, F))
        self.bytes = memoryview(self.events.view(np.uint8)).cast("B")

    def references(self) -> tuple[int, int]:
        return sys.getrefcount(self.events), sys.getrefcount(self.rows)


_FREE: Final = _Block(1).references()


class Intake:
    """Books, features and open batches of `instruments`, advanced message by message.

    `index`: the row of each Nautilus id in that table. `bulk`: read messages at once where :mod:`cift_strategies.layout` finds that it
    can; the rows are the same, and every so often that is checked. `restamp`: for a client that stamps `ts_init` at receipt and gives the
    capture time as `ts_event` (Nautilus's of Databento): `ts_init` becomes the latter, moved as an import moves it, so that rows are those
    of history.
    """

    def __init__(self, instruments: Sequence[Instrument], restamp: bool = False, bulk: bool = True) -> None:
        self.instruments, ids = list(instruments), [InstrumentId.from_str(x.id) for x in instruments]
        self.index: dict[InstrumentId, int] = {x: n for n, x in enumerate(ids)}
        self._layout = layout.find(UNIT) if bulk else None
        self._ids = layout.id_words(ids)
        lowest = np.full(len(ids) if restamp else 0, np.iinfo(np.int64).min)
        self._stamps = lowest, lowest.copy()
        self._desk = np.zeros(TABLE + 2 * len(ids), np.int64)
        self._at, self._read, self._blocks = _address(self._desk), 0, [_Block(ROWS)]
        self._desk[[IDS, INSTRUMENTS, ORDER]] = _address(self._ids), len(ids), _address(_ORDER)
        if self._layout is not None:
            self._desk[LAYOUT] = _address(self._layout)
        if restamp:
            self._desk[[LAST, BOOK]] = [_address(x) for x in self._stamps]
        self._keep: Callable[[Array, Array, Array], object] | None = None
        self._kept = self._used = 0
        self._renew(ROWS)
        self.restore({k: new_state(x) for k, x in enumerate(instruments)}, new_batches(len(ids)))

    def restore(self, states: dict[int, State], batches: Array) -> None:
        """Go on from the states of all instruments and the open batches (:func:`cift_models.windows.new_batches`)."""
        self.states, self.batches = states, np.require(batches, np.int64, ["C", "W"])
        self._desk[BATCHES] = _address(self.batches)
        for k in states:
            self._place(k)

    def keep(self, keep: Callable[[Array, Array, Array], object]) -> None:
        """From now on `keep` gets every event once, in order: EVENT (n,), rows (n, F), and int64 (n,) when the message that ends with the
        event came (ns by the wall; 0 within a message). They are not written again while it holds them. See :meth:`hand_on`."""
        self._keep, self._kept = keep, self._used
        self._watch(len(self._events))

    def _watch(self, n: int) -> None:
        self._came = np.zeros(n, np.int64)
        self._clock = memoryview(self._came)

    def hand_on(self) -> None:
        """Give what :meth:`keep` was told of the events that it does not have yet; else it gets them when a block is full."""
        a, b = self._kept, self._used
        if self._keep is not None and b > a:
            self._kept = b
            self._keep(self._events[a:b], self._rows[a:b], self._came[a:b])

    def _place(self, k: int) -> None:
        words = self.states[k].words
        self._desk[TABLE + 2 * k : TABLE + 2 * k + 2] = _address(words), len(words)

    def _renew(self, n: int) -> None:
        """Go on in a block with room for `n` events: one that nobody holds anything of, else a new one."""
        if self._used:
            self.hand_on()
        free = [b for b in self._blocks if len(b.events) >= n and b.references() == _FREE]
        block = free[0] if free else _Block(max(ROWS, n))
        self._blocks = [b for b in self._blocks if b is not block][-3:] + [block]
        self._events, self._rows, self._bytes, self._used, self._kept = block.events, block.rows, block.bytes, 0, 0
        self._ends = np.empty(len(block.events), np.int64)
        if self._keep is not None:
            self._watch(len(block.events))
        self._desk[[EVENTS, OUT, ENDS, SIZE, USED]] = *map(_address, (self._events, self._rows, self._ends)), len(self._events), 0

    def deltas(self, message: OrderBookDeltas) -> FeatureVector:
        """The vector of a message of deltas. Raises KeyError for an instrument that is not in the table."""
        if self._layout is None:
            found, k = message.deltas, self.index[message.instrument_id]
            pack(found, k, *self._room(len(found)))
            return self._packed(len(found))
        got = receive(self._at, id(message), 0)
        if got[2] < 0:
            if got[1] < 0:
                raise KeyError(message.instrument_id)
            self._renew(got[0])
            got = receive(self._at, id(message), 0)
        self._read += 1
        if self._read % AUDIT == 0:
            audit(message.deltas, got[1], self._events[self._used : self._used + got[0]], bool(self._desk[LAST]))
        return self._vector(*got)

    def trade(self, tick: TradeTick) -> FeatureVector:
        pack_trade(tick, self.index[tick.instrument_id], *self._room(1))
        return self._packed(1)

    def quote(self, tick: QuoteTick) -> FeatureVector:
        """Two events, the best bid and the best ask."""
        pack_quote(tick, self.index[tick.instrument_id], *self._room(2))
        return self._packed(2)

    def _room(self, n: int) -> tuple[memoryview, int]:
        if self._used + n > len(self._events):
            self._renew(n)
        return self._bytes, self._used

    def _packed(self, n: int) -> FeatureVector:
        if not getattr(config, "DISABLE_JIT", False):
            return self._vector(*receive(self._at, 0, n))
        events, rows = self._events[self._used : self._used + n], self._rows[self._used : self._used + n]
        k = int(events["instrument"][0])
        done, m = advance(self.states[k].words, events, _ORDER, rows, self.batches, self._ends, *self._stamps)
        touch = _touch(self.states[k].words) if m else (0, 0)
        return self._vector(n, k, done, m, int(self._ends[0]), int(events["ts_init"][-1]), *map(int, touch))

    def _vector(self, n: int, k: int, done: int, closed: int, end: int, ts: int, bid: int, ask: int) -> FeatureVector:
        first = self._used
        self._used = stop = first + n
        if self._keep is not None:
            self._clock[stop - 1] = time_ns()
        if done < n:
            for at in range(first + done, stop, BLOCK):
                self.states[k].advance(self._events[at : min(at + BLOCK, stop)], self._rows[at : min(at + BLOCK, stop)])
            self._place(k)
            bid, ask = map(int, _touch(self.states[k].words)) if closed else (0, 0)
        if not closed:
            return _new(FeatureVector, (k, ts, self._events, self._rows, first, stop, (), (0, 0)))
        ends = (end,) if closed == 1 else tuple(self._ends[:closed].tolist())
        return _new(FeatureVector, (k, ts, self._events, self._rows, first, stop, ends, (bid, ask)))


def warm(instrument: Instrument) -> None:
    """Compile what a message needs, so that the first one does not wait for it."""
    tick = TradeTick(InstrumentId.from_str(instrument.id), Price(1, 0), Quantity(1, 0), AggressorSide.BUY, TradeId("1"), 1, 1)
    Intake([instrument]).trade(tick)


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])
