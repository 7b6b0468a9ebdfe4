"""Nautilus objects -> EVENT rows, bit-equal with what `catalog.events.read_catalog` reads of the same records.

The one translator, for backtests and live alike. Each row is packed at once into a block of memory that is written once, so
the views it hands out stay valid for as long as somebody holds them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from nautilus_trader.model import (
    FIXED_PRECISION,
    AggressorSide,
    BookAction,
    InstrumentId,
    OrderBookDelta,
    OrderBookDeltas,
    OrderSide,
    QuoteTick,
    TradeTick,
)
from numpy.typing import NDArray

from catalog.events import ADD, CANCEL, CLEAR, EVENT, F_LAST, F_MBP, F_TOB, MODIFY, TRADE, Instrument
from cift_strategies import layout

UNIT: Final = 10 ** (FIXED_PRECISION - 9)  # raw units of Nautilus in one of EVENT
ROWS: Final = 16_384  # of a block
WORTH: Final = 2  # deltas of a message from which on reading them at once is faster
AUDIT: Final = 1_024  # messages from one check of that reading to the next
_ROW: Final = struct.Struct("<qqqqQQBbBH")
_ACTION: Final = {BookAction.ADD: ADD, BookAction.UPDATE: MODIFY, BookAction.DELETE: CANCEL, BookAction.CLEAR: CLEAR}
_SIDE: Final = {OrderSide.BUY: 1, OrderSide.SELL: -1, OrderSide.NO_ORDER_SIDE: 0, None: 0}
_AGGRESSOR: Final = {AggressorSide.BUY: 1, AggressorSide.SELL: -1, AggressorSide.NO_AGGRESSOR: 0}

assert _ROW.size == EVENT.itemsize


def pack(deltas: Sequence[OrderBookDelta], instrument: int, into: memoryview, first: int) -> None:
    """Write EVENT rows of `deltas` into the bytes of an EVENT array from row `first` on, attribute by attribute."""
    write, size, action_of, side_of, unit = _ROW.pack_into, _ROW.size, _ACTION, _SIDE, UNIT
    at = first * size
    for d in deltas:
        order = d.order
        order_id, action, flags = order.order_id, action_of[d.action], d.flags
        if order_id == 0 and action != CLEAR:
            flags |= F_MBP
        write(
            into, at, d.ts_event, d.ts_init, order.price.raw // unit, order.size.raw // unit,
            order_id, d.sequence, action, side_of[order.side], flags, instrument,
        )  # fmt: skip
        at += size


class Translator:
    """Translates the records of `instruments`; `index` maps their Nautilus ids to rows of that table.

    `bulk`: read messages of many deltas at once where :mod:`cift_strategies.layout` finds that it can; the rows are the same, and
    every so often that is checked.
    """

    def __init__(self, instruments: Sequence[Instrument], bulk: bool = True) -> None:
        self._layout = layout.find(UNIT) if bulk else None
        self._read = 0
        self.index: dict[InstrumentId, int] = {InstrumentId.from_str(x.id): n for n, x in enumerate(instruments)}
        self._renew(ROWS)

    def _renew(self, rows: int) -> None:
        self._block: NDArray[Any] = np.empty(rows, EVENT)
        self._bytes = memoryview(self._block.view(np.uint8)).cast("B")
        self._used = 0

    def _room(self, n: int) -> int:
        if self._used + n > len(self._block):
            self._renew(max(ROWS, n))
        return self._used

    def deltas(self, message: OrderBookDeltas) -> NDArray[Any]:
        """EVENT (n,), one row per delta in the message's order; order id 0 sets F_MBP, as a level feed has no ids."""
        found, k = message.deltas, self.index[message.instrument_id]
        first = self._room(len(found))
        rows = self._block[first : first + len(found)]
        if self._layout is None or len(found) < WORTH:
            pack(found, k, self._bytes, first)
        else:
            self._layout.read(found, k, UNIT, rows)
            self._read += 1
            if self._read % AUDIT == 0:
                self._audit(found, k, rows)
        self._used = first + len(found)
        return rows

    def _audit(self, found: Sequence[OrderBookDelta], k: int, rows: NDArray[Any]) -> None:
        again = np.empty(len(found), EVENT)
        pack(found, k, memoryview(again.view(np.uint8)).cast("B"), 0)
        if again.tobytes() != rows.tobytes():
            raise AssertionError("the memory of order book deltas does not say what their attributes say")

    def trade(self, tick: TradeTick) -> NDArray[Any]:
        """EVENT (1,): T with the aggressor's side; order id, sequence and flags are 0, which a TradeTick does not carry."""
        first = self._room(1)
        _ROW.pack_into(
            self._bytes, first * _ROW.size, tick.ts_event, tick.ts_init, tick.price.raw // UNIT, tick.size.raw // UNIT,
            0, 0, TRADE, _AGGRESSOR[tick.aggressor_side], 0, self.index[tick.instrument_id],
        )  # fmt: skip
        self._used = first + 1
        return self._block[first : self._used]

    def quote(self, tick: QuoteTick) -> NDArray[Any]:
        """EVENT (2,): the best bid, then the best ask with F_LAST; A with F_TOB, or C where the size is 0."""
        first = self._room(2)
        k, at = self.index[tick.instrument_id], first * _ROW.size
        for price, size, side, flags in ((tick.bid_price, tick.bid_size, 1, F_TOB), (tick.ask_price, tick.ask_size, -1, F_TOB | F_LAST)):
            amount = size.raw // UNIT
            action = ADD if amount else CANCEL
            _ROW.pack_into(self._bytes, at, tick.ts_event, tick.ts_init, price.raw // UNIT, amount, 0, 0, action, side, flags, k)
            at += _ROW.size
        self._used = first + 2
        return self._block[first : self._used]
