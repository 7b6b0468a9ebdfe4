"""The event array that everything else reads, and its readers for DBN files and NautilusTrader Parquet catalogs.

Takes files, gives :data:`EVENT` arrays in canonical order beside the table of :class:`Instrument`. Reads with databento and
pyarrow; never imports nautilus_trader.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

SCALE: Final = 1_000_000_000  # prices and sizes are integers in units of 1e-9

EVENT: Final = np.dtype(
    [
        ("ts_event", np.int64),  # ns UTC, the venue's
        ("ts_init", np.int64),  # ns UTC, when it was known to us
        ("price", np.int64),  # 1e-9 units
        ("size", np.int64),  # 1e-9 units
        ("order_id", np.uint64),  # 0 where the venue has none
        ("sequence", np.uint64),  # 0 where unknown
        ("action", np.uint8),  # ASCII of A C M R T
        ("side", np.int8),  # +1 bid or buy aggressor, -1 ask or sell aggressor, 0 none
        ("flags", np.uint8),  # Databento's bits, below
        ("instrument", np.uint16),  # index into the instrument table
    ]
)

ADD: Final = ord("A")  # a new order; with F_MBP: the level now has this size; with F_TOB: the best level of this side is now this
CANCEL: Final = ord("C")  # reduces the order by `size` (0, or what is left or more: removes it); with F_MBP or F_TOB: removes the level
MODIFY: Final = ord("M")  # the order now has this price and size; with F_MBP and F_TOB as ADD
CLEAR: Final = ord("R")  # empties the book
TRADE: Final = ord("T")  # an execution; does not change the book

F_LAST: Final = 128  # last record of the venue's event
F_TOB: Final = 64  # an update of the best bid or offer (L1 feed), not an individual order
F_SNAPSHOT: Final = 32  # part of a snapshot
F_MBP: Final = 16  # an update of an aggregated price level (L2 feed), not an individual order
F_BAD_TS_RECV: Final = 8
F_MAYBE_BAD_BOOK: Final = 4


@dataclass(frozen=True, slots=True)
class Instrument:
    """One row of the instrument table; `EVENT["instrument"]` indexes the list of these."""

    id: str  # Nautilus instrument id, "ESH4.GLBX"
    tick: int  # price increment, 1e-9 units
    lot: int  # size increment, 1e-9 units
    multiplier: float  # currency per 1.0 of price and 1.0 of size
    currency: str  # of PnL and fees
    session: str | None = None  # "09:30-16:00 America/New_York"; None: trades around the clock
    price_precision: int = 2
    size_precision: int = 0
    kind: str = "future"  # future, equity, currency_pair, crypto_perpetual
    maker_fee: float = 0.0  # share of notional
    taker_fee: float = 0.0  # share of notional
    fee_per_unit: float = 0.0  # currency per 1.0 of size, on top
    level: int = 3  # deepest feed: 3 orders, 2 levels, 1 best bid and offer
