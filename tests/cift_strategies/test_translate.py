"""Nautilus objects and Parquet files of the same records become the same EVENT rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nautilus_trader.model import (
    AggressorSide,
    BookAction,
    BookOrder,
    InstrumentId,
    OrderBookDelta,
    OrderBookDeltas,
    OrderSide,
    Price,
    Quantity,
    QuoteTick,
    TradeId,
    TradeTick,
)
from tapes import SHARE
from translator import Translator

from catalog.events import F_LAST, F_MBP, F_TOB, SCALE, Instrument, read_catalog
from cift_strategies.stream import Span
from cift_strategies.translate import UNIT

ID = InstrumentId.from_str(SHARE.id)
U64 = st.integers(0, 2**64 - 1)
STAMP = st.integers(0, 2**62)


def delta(
    action: BookAction, side: OrderSide | None, price: int, size: int, order_id: int, flags: int, sequence: int, ts: int
) -> OrderBookDelta:
    order = BookOrder(side, Price.from_raw(price * UNIT, 9), Quantity.from_raw(size * UNIT, 9), order_id)
    return OrderBookDelta(ID, action, order, flags, sequence, ts, ts + 5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(
    st.sampled_from([(BookAction.ADD, "A"), (BookAction.UPDATE, "M"), (BookAction.DELETE, "C"), (BookAction.CLEAR, "R")]),
    st.sampled_from([(OrderSide.BUY, 1), (OrderSide.SELL, -1), (OrderSide.NO_ORDER_SIDE, 0)]),
    st.integers(-(2**53), 2**53), st.integers(1, 2**53), U64, st.integers(0, 255), U64, STAMP,
), min_size=1, max_size=8))  # fmt: skip
def test_every_field_of_a_delta_is_exact(rows: list[tuple[Any, ...]]) -> None:
    made = [delta(a, s, p, q, o, f, n, t) for (a, _), (s, _), p, q, o, f, n, t in rows]
    got = Translator([SHARE]).deltas(OrderBookDeltas(ID, made))
    for e, ((_, action), (_, side), price, size, order_id, flags, sequence, ts) in zip(got, rows, strict=True):
        level = F_MBP if order_id == 0 and action != "R" else 0
        price, size = (0, 0) if action == "R" else (price, size)
        assert tuple(e) == (ts, ts + 5, price, size, order_id, sequence, ord(action), side, flags | level, 0)


@pytest.mark.parametrize(("aggressor", "side"), [(AggressorSide.BUY, 1), (AggressorSide.SELL, -1), (AggressorSide.NO_AGGRESSOR, 0)])
def test_a_trade_carries_its_aggressor_and_nothing_of_the_venue(aggressor: AggressorSide, side: int) -> None:
    tick = TradeTick(ID, Price(100.01, 2), Quantity(7, 0), aggressor, TradeId("99"), 11, 12)
    (e,) = Translator([SHARE]).trade(tick)
    assert tuple(e) == (11, 12, 100_010_000_000, 7 * SCALE, 0, 0, ord("T"), side, 0, 0)


def test_a_quote_becomes_bid_then_ask_and_an_empty_side_is_taken_away() -> None:
    quote = QuoteTick(ID, Price(100.00, 2), Price(100.02, 2), Quantity(3, 0), Quantity(0, 0), 11, 12)
    bid, ask = Translator([SHARE]).quote(quote)
    assert tuple(bid) == (11, 12, 100 * SCALE, 3 * SCALE, 0, 0, ord("A"), 1, F_TOB, 0)
    assert tuple(ask) == (11, 12, 100_020_000_000, 0, 0, 0, ord("C"), -1, F_TOB | F_LAST, 0)


def test_objects_and_files_of_the_binance_recording_agree(data: Path) -> None:
    from nautilus_trader.persistence import ParquetDataCatalog

    root = data / "catalogs" / "binance-2024-08-08"
    instruments = read_catalog(root)[0]
    end = Span(root, instruments).first + 8 * SCALE
    events = np.concatenate(list(read_catalog(root, None, None, end)[1]))
    catalog, translator = ParquetDataCatalog(str(root.resolve())), Translator(instruments)
    for k, x in enumerate(instruments):
        deltas = [d for d in catalog.query_order_book_deltas([x.id], end=end) if d.ts_init <= end]
        trades = [t for t in catalog.query_trade_ticks([x.id], end=end) if t.ts_init <= end]
        of = events[events["instrument"] == k]
        got = translator.deltas(OrderBookDeltas(InstrumentId.from_str(x.id), deltas))
        assert got.tobytes() == of[of["action"] != ord("T")].tobytes()
        assert np.concatenate([translator.trade(t) for t in trades]).tobytes() == of[of["action"] == ord("T")].tobytes()


def test_an_instrument_that_is_not_in_the_table_is_an_error() -> None:
    other = Instrument("OTHER.XTST", 1, 1, 1.0, "USD")
    with pytest.raises(KeyError):
        Translator([other]).trade(TradeTick(ID, Price(1, 2), Quantity(1, 0), AggressorSide.BUY, TradeId("1"), 1, 1))
