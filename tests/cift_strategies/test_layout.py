"""Reading a message at once gives what reading its attributes gives, and is given up where it would not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nautilus_trader.model import BookAction, BookOrder, InstrumentId, OrderBookDelta, OrderBookDeltas, OrderSide, Price, Quantity
from tapes import SHARE
from translator import Translator

from catalog.events import EVENT
from cift_strategies import layout
from cift_strategies.translate import UNIT

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
    min_size=1, max_size=40,
)  # fmt: skip


def test_this_wheel_can_be_read_at_once() -> None:
    assert layout.find(UNIT) is not None


@settings(max_examples=150, deadline=None)
@given(DELTAS)
def test_both_ways_of_reading_agree(deltas: list[OrderBookDelta]) -> None:
    message, rows = OrderBookDeltas(ID, deltas), np.empty(len(deltas), EVENT)
    assert layout.read(layout.find(UNIT), layout.id_words([ID]), id(message), rows, 0) == (len(deltas), 0)
    assert rows.tobytes() == Translator([SHARE]).deltas(message).tobytes()


def test_a_stranger_and_a_message_that_does_not_fit_leave_nothing_behind() -> None:
    message = OrderBookDeltas(ID, [delta(BookAction.ADD, OrderSide.BUY, UNIT, UNIT, 1, 0, 0, 0)] * 5)
    rows = np.zeros(8, EVENT)
    others = layout.id_words([InstrumentId.from_str("OTHER.XTST")])
    assert layout.read(layout.find(UNIT), others, id(message), rows, 0) == (5, -1)
    assert layout.read(layout.find(UNIT), layout.id_words([ID]), id(message), rows, 4) == (5, 0)
    assert not rows.view(np.uint8).any()


def test_a_layout_that_reads_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = layout.read

    def wrong(plan: Any, ids: Any, message: int, out: Any, first: int) -> Any:
        got = right(plan, ids, message, out, first)
        out["sequence"][-1] ^= np.uint64(1)
        return got

    monkeypatch.setattr(layout, "read", wrong)
    layout.find.cache_clear()
    try:
        assert layout.find(UNIT) is None
    finally:
        layout.find.cache_clear()


def test_objects_that_are_too_large_are_not_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_LARGEST", 8)
    layout.find.cache_clear()
    try:
        assert layout.find(UNIT) is None
    finally:
        layout.find.cache_clear()
