"""The slow and obvious twin of the intake: messages become EVENT rows one by one, by their attributes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from nautilus_trader.model import InstrumentId, OrderBookDeltas, QuoteTick, TradeTick
from numpy.typing import NDArray

from catalog.events import EVENT, Instrument, move
from cift_strategies.translate import pack, pack_quote, pack_trade


class Translator:
    """EVENT rows of messages about `instruments`; `restamp`: see :class:`cift_strategies.intake.Intake`."""

    def __init__(self, instruments: Sequence[Instrument], restamp: bool = False) -> None:
        lowest = np.full(len(instruments), np.iinfo(np.int64).min)
        self._stamps = (lowest, lowest.copy()) if restamp else None
        self._index = {InstrumentId.from_str(x.id): n for n, x in enumerate(instruments)}

    def deltas(self, message: OrderBookDeltas) -> NDArray[Any]:
        return self._rows(pack, message.deltas, message, len(message.deltas))

    def trade(self, tick: TradeTick) -> NDArray[Any]:
        return self._rows(pack_trade, tick, tick, 1)

    def quote(self, tick: QuoteTick) -> NDArray[Any]:
        return self._rows(pack_quote, tick, tick, 2)

    def _rows(self, write: Any, what: Any, message: Any, n: int) -> NDArray[Any]:
        rows = np.empty(n, EVENT)
        write(what, self._index[message.instrument_id], memoryview(rows.view(np.uint8)).cast("B"), 0)
        if self._stamps is not None:
            rows["ts_init"] = rows["ts_event"]
            move(rows, *self._stamps)
        return rows
