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

from catalog.events import ADD, CANCEL, CLEAR, EVENT, F_LAST, F_MBP, F_TOB, MODIFY, TRADE, Instrument, move

UNIT: Final = 10 ** (FIXED_PRECISION - 9)  # raw units of Nautilus in one of EVENT
ROWS: Final = 16_384  # of a block
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
        price, amount = order.price.raw // unit, order.size.raw // unit
        if action == CLEAR:  # a live client may give it the price that stands for none
            price = amount = 0
        elif order_id == 0:
            flags |= F_MBP
        write(
            into, at, d.ts_event, d.ts_init, price, amount,
            order_id, d.sequence, action, side_of[order.side], flags, instrument,
        )  # fmt: skip
        at += size


def pack_trade(tick: TradeTick, instrument: int, into: memoryview, first: int) -> None:
    """Write the EVENT row of a trade as row `first`."""
    _ROW.pack_into(
        into, first * _ROW.size, tick.ts_event, tick.ts_init, tick.price.raw // UNIT, tick.size.raw // UNIT,
        0, 0, TRADE, _AGGRESSOR[tick.aggressor_side], 0, instrument,
    )  # fmt: skip


def pack_quote(tick: QuoteTick, instrument: int, into: memoryview, first: int) -> None:
    """Write the two EVENT rows of a quote from row `first` on."""
    at = first * _ROW.size
    for price, size, side, flags in ((tick.bid_price, tick.bid_size, 1, F_TOB), (tick.ask_price, tick.ask_size, -1, F_TOB | F_LAST)):
        amount = size.raw // UNIT
        action = ADD if amount else CANCEL
        _ROW.pack_into(into, at, tick.ts_event, tick.ts_init, price.raw // UNIT, amount, 0, 0, action, side, flags, instrument)
        at += _ROW.size


def audit(deltas: Sequence[OrderBookDelta], instrument: int, rows: NDArray[Any], restamped: bool = False) -> None:
    """Raise AssertionError unless `rows`, read from memory, are what the attributes of the `deltas` say."""
    again = np.empty(len(deltas), EVENT)
    pack(deltas, instrument, memoryview(again.view(np.uint8)).cast("B"), 0)
    if restamped:
        again["ts_init"] = rows["ts_init"]
    if again.tobytes() != rows.tobytes():
        raise AssertionError("the memory of order book deltas does not say what their attributes say")


class Translator:
    """Translates the records of `instruments`; `index` maps their Nautilus ids to rows of that table.

    `restamp`: for a client that stamps `ts_init` at receipt and gives the capture time as `ts_event` (Nautilus's of Databento):
    `ts_init` becomes the latter, moved as an import moves it, so that rows are those of history.
    """

    def __init__(self, instruments: Sequence[Instrument], restamp: bool = False) -> None:
        lowest = np.full(len(instruments), np.iinfo(np.int64).min)
        self._stamps = (lowest, lowest.copy()) if restamp else None
        self.index: dict[InstrumentId, int] = {InstrumentId.from_str(x.id): n for n, x in enumerate(instruments)}
        self._renew(ROWS)

    def _renew(self, rows: int) -> None:
        self._block: NDArray[Any] = np.empty(rows, EVENT)
        self._bytes = memoryview(self._block.view(np.uint8)).cast("B")
        self._used = 0

    def _room(self, n: int) -> tuple[memoryview, int]:
        if self._used + n > len(self._block):
            self._renew(max(ROWS, n))
        self._used += n
        return self._bytes, self._used - n

    def _newest(self, n: int) -> NDArray[Any]:
        rows = self._block[self._used - n : self._used]
        if self._stamps is not None:
            rows["ts_init"] = rows["ts_event"]
            move(rows, *self._stamps)
        return rows

    def deltas(self, message: OrderBookDeltas) -> NDArray[Any]:
        """EVENT (n,), one row per delta in the message's order; order id 0 sets F_MBP, as a level feed has no ids."""
        found = message.deltas
        pack(found, self.index[message.instrument_id], *self._room(len(found)))
        return self._newest(len(found))

    def trade(self, tick: TradeTick) -> NDArray[Any]:
        """EVENT (1,): T with the aggressor's side; order id, sequence and flags are 0, which a TradeTick does not carry."""
        pack_trade(tick, self.index[tick.instrument_id], *self._room(1))
        return self._newest(1)

    def quote(self, tick: QuoteTick) -> NDArray[Any]:
        """EVENT (2,): the best bid, then the best ask with F_LAST; A with F_TOB, or C where the size is 0."""
        pack_quote(tick, self.index[tick.instrument_id], *self._room(2))
        return self._newest(2)
