"""Nautilus objects -> EVENT rows, bit-equal with what `catalog.events.read_catalog` reads of the same records.

The one translator, for backtests and live alike, by attributes. `intake.py` packs with it what it cannot read in one compiled call,
and audits with it what it can.
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
    OrderBookDelta,
    OrderSide,
    QuoteTick,
    TradeTick,
)
from numpy.typing import NDArray

from catalog.events import ADD, CANCEL, CLEAR, EVENT, F_LAST, F_MBP, F_TOB, MODIFY, TRADE

UNIT: Final = 10 ** (FIXED_PRECISION - 9)  # raw units of Nautilus in one of EVENT
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
