"""Reading deltas at once gives what reading their attributes gives, and is given up where it would not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nautilus_trader.model import BookAction, BookOrder, InstrumentId, OrderBookDelta, OrderBookDeltas, OrderSide, Price, Quantity
from tapes import SHARE

from cift_strategies import layout, translate
from cift_strategies.translate import AUDIT, UNIT, WORTH, Translator

ID = InstrumentId.from_str(SHARE.id)
LARGEST = 17_000_000_000  # of a price, in whole units
RAW = LARGEST * 10**9 * UNIT


def delta(action: BookAction, side: OrderSide, price: int, size: int, order_id: int, flags: int, sequence: int, ts: int) -> OrderBookDelta:
    order = BookOrder(side, Price.from_raw(price, 9), Quantity.from_raw(size, 9), order_id)
    return OrderBookDelta(ID, action, order, flags, sequence, ts, ts + 7)


DELTAS = st.lists(
    st.builds(
        delta,
        st.sampled_from([BookAction.ADD, BookAction.UPDATE, BookAction.DELETE, BookAction.CLEAR]),
        st.sampled_from([OrderSide.BUY, OrderSide.SELL, OrderSide.NO_ORDER_SIDE]),
        st.integers(-(2**63 - 1), 2**63 - 1).map(lambda v: v * UNIT).filter(lambda v: abs(v) <= RAW),
        st.integers(1, 2**63 - 1).map(lambda v: v * UNIT).filter(lambda v: v <= RAW),
        st.one_of(st.just(0), st.integers(0, 2**64 - 1)), st.integers(0, 255), st.integers(0, 2**64 - 1), st.integers(0, 2**62),
    ),
    min_size=WORTH, max_size=40,
)  # fmt: skip


def test_this_wheel_can_be_read_at_once() -> None:
    assert layout.find(UNIT) is not None


@settings(max_examples=150, deadline=None)
@given(DELTAS)
def test_both_ways_of_reading_agree(deltas: list[OrderBookDelta]) -> None:
    message = OrderBookDeltas(ID, deltas)
    at_once, one_by_one = (Translator([SHARE], bulk).deltas(message) for bulk in (True, False))
    assert at_once.tobytes() == one_by_one.tobytes()


def test_a_layout_that_reads_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = layout.Layout.read

    def wrong(self: layout.Layout, deltas: Any, instrument: int, unit: int, out: Any) -> None:
        right(self, deltas, instrument, unit, out)
        out["sequence"][-1] ^= np.uint64(1)

    monkeypatch.setattr(layout.Layout, "read", wrong)
    layout.find.cache_clear()
    try:
        assert layout.find(UNIT) is None
        deltas = [delta(BookAction.ADD, OrderSide.BUY, 5 * UNIT, 3 * UNIT, n, 0, n, n) for n in range(9)]
        assert Translator([SHARE]).deltas(OrderBookDeltas(ID, deltas))["sequence"].tolist() == list(range(9))
    finally:
        layout.find.cache_clear()


def test_objects_that_are_too_large_are_not_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_LARGEST", 8)
    layout.find.cache_clear()
    try:
        assert layout.find(UNIT) is None
    finally:
        layout.find.cache_clear()


def test_a_reading_that_goes_wrong_later_is_noticed() -> None:
    translator = Translator([SHARE])
    assert translator._layout is not None
    deltas = [delta(BookAction.ADD, OrderSide.BUY, 5 * UNIT, 3 * UNIT, 9, 0, n, n) for n in range(WORTH)]
    message = OrderBookDeltas(ID, deltas)
    for _ in range(AUDIT - 1):
        translator.deltas(message)
    moved = translator._layout.offsets.copy()
    moved[3] = moved[5]  # the sequence is now read where ts_init lies
    translator._layout = layout.Layout(moved, translator._layout.action, translator._layout.side)
    with pytest.raises(AssertionError, match="attributes"):
        translator.deltas(message)


def test_a_single_delta_is_read_by_its_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(translate, "pack", lambda deltas, *_: seen.append(len(deltas)))
    translator = Translator([SHARE])
    for n in (1, WORTH):
        translator.deltas(OrderBookDeltas(ID, [delta(BookAction.ADD, OrderSide.BUY, UNIT, UNIT, 1, 0, 0, 0)] * n))
    assert seen == [1]
