"""Polygon's messages, parsed: the same numbers as its history, every gap, duplicate and late record told, nothing else changed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catalog import events, tape
from catalog.polygon import nanos as history_nanos
from cift_strategies.feeds import polygon_wire
from cift_strategies.feeds.polygon_wire import BAR, DUPLICATE, GAP, LATE, LEVEL, QUOTE, ROW, TRADE, Listing, Wire, nanos, rounded, stamp

T0 = 1_790_000_000_000  # ms
STOCK = Listing(0, 4, 0)
PAIR = Listing(0, 2, 8, exchange=1)
MS = 1_000_000


def wire(market: str = "stocks", listing: Listing = STOCK, *symbols: str) -> Wire:
    w = Wire(market)
    for channel in polygon_wire.MARKETS[market].values():
        for symbol in symbols or ("AAPL",):
            w.add(channel, symbol, listing)
    return w


def told(w: Wire, *messages: dict[str, Any], at: int = 1) -> list[tuple[int, ...]]:
    w.frame(json.dumps(messages), at)
    rows, _ = w.take()
    return list(ROW.iter_unpack(rows))


def quote(q: int, **kw: Any) -> dict[str, Any]:
    return {"ev": "Q", "sym": "AAPL", "bp": 100.0, "bs": 3, "ap": 100.02, "as": 5, "t": T0 + q, "q": q, **kw}


def trade(q: int, **kw: Any) -> dict[str, Any]:
    return {"ev": "T", "sym": "AAPL", "i": str(q), "p": 100.01, "s": 50, "c": [], "t": T0 + q, "q": q, **kw}


def book(n: int, bids: Any, asks: Any, **kw: Any) -> dict[str, Any]:
    return {"ev": "XL2", "pair": "BTC-USD", "b": bids, "a": asks, "t": T0 + n, "x": 1, "r": T0 + n, **kw}


def test_the_letters_are_those_of_events() -> None:
    for name in ("ADD", "MODIFY", "CANCEL", "CLEAR", "F_LAST", "F_SNAPSHOT"):
        assert getattr(polygon_wire, name) == getattr(events, name)


def test_live_trades_have_the_aggressors_of_history(tmp_path: Path) -> None:
    """The same quotes and trades, as parts of history and as messages: sizes, prices and sides are equal, in auctions and ties as well."""
    rng = np.random.default_rng(11)
    n = 4_000
    t = np.sort(rng.integers(0, 1_500, n)) + T0  # several a millisecond
    is_trade = rng.random(n) < 0.4
    tick = 10_000 + np.cumsum(rng.integers(-1, 2, n))
    spread = rng.integers(0, 4, n) - (rng.random(n) < 0.05)  # locked and crossed ones too
    price = tick + rng.integers(-1, 3, n) + rng.choice([0, 0.5, 0.123456], n)
    codes = [([], [0], [14], [37], [9], [17], [2], [12, 52])[k] for k in rng.integers(0, 8, n)]
    size = rng.choice([0.5, 1, 7, 100, 250.25], n)
    messages, parts = [], {"quotes": [], "trades": []}
    for i in range(n):
        stamps = {"sip": int(t[i]) * MS, "participant": 0, "sequence": i + 1}
        if is_trade[i]:
            p, s = round(float(price[i]) / 100, 8), float(size[i])
            messages.append(trade(i + 1, t=int(t[i]), p=p, s=int(s) if s == int(s) else s, c=codes[i], i=f"id{i}"))
            more = {"price": p, "size": s, "exchange": 4, "trf": 0, "correction": 0, "conditions": codes[i], "id": f"id{i}"}
            parts["trades"].append(stamps | more)
        else:
            bid, ask = round(tick[i] / 100, 2), round((tick[i] + spread[i]) / 100, 2)
            messages.append(quote(i + 1, t=int(t[i]), bp=bid, ap=ask, bs=100, **{"as": 200}))
            parts["quotes"].append(stamps | {"bid": bid, "ask": ask, "bid_size": 100.0, "ask_size": 200.0})
    files = {}
    for kind, rows in parts.items():
        columns = {k: [r[k] for r in rows] for k in rows[0]}
        for k in ("price", "size", "bid", "ask", "bid_size", "ask_size"):
            if k in columns:
                columns[k] = history_nanos(columns[k])
        if "conditions" in columns:
            columns["conditions"] = pa.array(columns["conditions"], pa.list_(pa.int32()))
        files[kind] = [tmp_path / f"{kind}.parquet"]
        pq.write_table(pa.table(columns), files[kind][0])
    counts: Counter[str] = Counter()
    quotes = np.concatenate(list(tape.quotes(files["quotes"], counts)))
    expected = np.concatenate(list(tape.trades(files["trades"], counts, tape.quotes(files["quotes"], Counter()))))

    w = wire()
    found: list[tuple[int, ...]] = []
    for i in range(0, n, 37):
        found += told(w, *messages[i : i + 37])
    bought = [r for r in found if r[0] == TRADE]
    whole = expected[expected["size"] >= 1_000_000_000]
    assert len(bought) == len(whole) > 500 and set(whole["side"]) == {-1, 0, 1}
    assert [r[1] for r in bought] == whole["side"].tolist()
    assert [r[5] for r in bought] == (whole["size"] // 1_000_000_000 * 1_000_000_000).tolist()
    assert [r[4] for r in bought] == tape._rounded(whole["price"], 100_000, Counter()).tolist()
    assert [r[9] for r in bought] == whole["ts_init"].tolist()
    shown = [r for r in found if r[0] == QUOTE]
    assert [r[4:8] for r in shown] == [tuple(q) for q in quotes[["bid", "ask", "bid_size", "ask_size"]].tolist()]
    for ours, theirs in (("not trades", "not_trades"), ("locked quotes", "locked_quotes"), ("crossed quotes", "crossed_quotes")):
        assert w.counts[ours] == counts[theirs] > 0


def test_a_jump_of_the_numbers_is_a_gap() -> None:
    w = wire()
    rows = told(w, *(quote(q) for q in (1, 2, 3, 7, 8)))
    assert [(r[0], r[4] if r[0] == GAP else r[9]) for r in rows] == [
        *((QUOTE, (T0 + q) * MS) for q in (1, 2, 3)), (GAP, 3), *((QUOTE, (T0 + q) * MS) for q in (7, 8))
    ]  # fmt: skip


def test_numbers_that_have_holes_by_nature_are_no_gaps() -> None:
    """The service's numbers grow but need not be sequential: after a few jumps no more is made of it; trades have their own numbers."""
    w = wire()
    rows = told(w, *(quote(7 * q) for q in range(1, 2_000)))
    assert sum(r[0] == QUOTE for r in rows) == 1_999 and w.counts["gaps"] <= 4
    rows = told(w, *(trade(q) for q in range(1, 50)), trade(60))
    assert [r[4] for r in rows if r[0] == GAP] == [10]


def test_a_record_comes_once_and_a_state_is_not_turned_back() -> None:
    w = wire()
    rows = told(w, *(trade(q) for q in (1, 2, 4, 4, 3, 3, 5)), *(quote(q) for q in (1, 2, 4, 4, 3, 5)))
    assert [r[0] for r in rows] == [
        TRADE, TRADE, GAP, TRADE, DUPLICATE, LATE, TRADE, DUPLICATE, TRADE, QUOTE, QUOTE, GAP, QUOTE, DUPLICATE, LATE, QUOTE
    ]  # fmt: skip
    assert [r[9] // MS - T0 for r in rows if r[0] == TRADE] == [1, 2, 4, 3, 5]


def test_the_numbers_begin_again_with_a_session() -> None:
    w = wire()
    later = 17 * 3_600_000
    rows = told(w, *(quote(q) for q in range(900, 905)), quote(1, t=T0 + later), quote(2, t=T0 + later + 1), quote(2, t=T0 + later + 1))
    assert [r[0] for r in rows] == [QUOTE] * 7 + [DUPLICATE]


def test_round_lots_become_shares_before_the_change() -> None:
    w = wire()
    before, after = 1_762_145_999_999, 1_762_146_000_000  # the last ms of 2 November 2025 in New York and the first of the 3rd
    rows = told(w, quote(1, t=before), quote(2, t=after))
    assert [r[6] for r in rows] == [300_000_000_000, 3_000_000_000]


def test_stamps_are_milliseconds_or_nanoseconds() -> None:
    assert stamp(1_536_036_818_784) == stamp(1_536_036_818_784_000_000) == 1_536_036_818_784_000_000
    assert stamp(1_536_036_818_784_001) == 1_536_036_818_784_001_000
    for wrong in (0, -1, None, "1", 1.5):
        with pytest.raises(ValueError, match="no stamp"):
            stamp(wrong)


@given(st.one_of(st.integers(-(9 * 10**9), 9 * 10**9), st.decimals(0, 9 * 10**6, places=8).map(float), st.floats(0, 9e9)))
def test_numbers_are_those_of_history(x: float) -> None:
    assert nanos(x) == history_nanos([x])[0]


@given(st.integers(0, 2**62), st.sampled_from([1, 10, 100_000, 10**9]))
def test_rounding_is_that_of_history(v: int, unit: int) -> None:
    if v < 2**61:
        assert rounded(v, unit) == tape._rounded(np.array([v]), unit, Counter())[0]


sides = st.dictionaries(st.integers(1, 60), st.integers(1, 10**6), max_size=12)


@settings(max_examples=60)
@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=6))
def test_the_changes_of_a_book_make_the_book(books: list[tuple[dict[int, int], dict[int, int]]]) -> None:
    """However the levels change, empty sides included: told level by level, the last with F_LAST, nothing that did not change."""
    w = wire("crypto", PAIR, "BTC-USD")
    have: dict[int, dict[int, int]] = {1: {9: 9}, -1: {}}  # cleared by the first
    for n, (bids, asks) in enumerate(books):
        levels = [[[p / 100, s / 1e8] for p, s in side.items()] for side in (bids, asks)]
        rows = told(w, book(n, *levels))
        assert [bool(r[7] & events.F_LAST) for r in rows] == [False] * (len(rows) - 1) + [True] * bool(rows)
        for kind, side, _, _, price, size, action, flags, _, ts, _ in rows:
            assert kind == LEVEL and ts == (T0 + n) * MS and bool(flags & events.F_SNAPSHOT) == (n == 0)
            price, size = price // 10**7, size // 10
            if action == events.CLEAR:
                assert n == 0
                have = {1: {}, -1: {}}
            elif action == events.CANCEL:
                del have[side][price]
            else:
                assert (action == events.MODIFY) == (price in have[side]) and have[side].get(price) != size
                have[side][price] = size
        assert have == {1: bids, -1: asks}


def test_a_late_or_broken_book_changes_nothing() -> None:
    w = wire("crypto", PAIR, "BTC-USD")
    first = told(w, book(5, [[100, 1]], [[101, 1], [102, 0]]))
    assert [(r[1], r[4], r[6]) for r in first] == [(0, 0, events.CLEAR), (1, 100 * 10**9, events.ADD), (-1, 101 * 10**9, events.ADD)]
    broken = ([[99, 1], [98]], [[99, -1]], [["a", 1]], None, [[0, 1]], [[float("nan"), 1]], [[1e12, 1]])
    rows = told(w, book(4, [[99, 1]], [[101, 1]]), *(book(6, b, [[101, 1]]) for b in broken), book(7, [[100, 1]], [[101, 2]], x=23))
    assert [r[0] for r in rows] == [LATE]
    assert (w.counts["malformed messages"], w.counts["other exchanges"]) == (len(broken), 1)
    [last] = told(w, book(8, [[100, 1]], [[101, 2]]))
    assert (last[1], last[5], last[6]) == (-1, 2 * 10**9, events.MODIFY)
    assert told(w, book(9, [[100, 1]], [[101, 2]])) == [] and w.counts["unchanged books"] == 1
    told(w, book(10, [[102, 1]], [[101, 2]]))
    assert w.counts["crossed books"] == 1


def test_a_trade_of_a_pair_comes_once_an_exchange() -> None:
    w = wire("crypto", Listing(0, 2, 8), "BTC-USD")
    sent = {"ev": "XT", "pair": "BTC-USD", "p": 600.0, "s": 1, "c": [2], "i": 7, "x": 1, "t": T0, "r": T0}
    rows = told(w, sent, sent, {**sent, "x": 2}, {**sent, "i": 8, "t": T0 - 1})
    assert [r[0] for r in rows] == [TRADE, DUPLICATE, TRADE, LATE, TRADE]
    assert {r[1] for r in rows if r[0] == TRADE} == {1}


def test_the_first_bar_of_a_window_stands() -> None:
    w = wire()
    bar = {"ev": "AM", "sym": "AAPL", "v": 10.7, "o": 1.0, "h": 2.0, "l": 0.5, "c": 1.5, "s": T0, "e": T0 + 60_000}
    rows = told(w, bar, {**bar, "c": 1.6}, {**bar, "s": T0 + 60_000, "e": T0 + 120_000}, bar)
    assert [r[0] for r in rows] == [BAR, DUPLICATE, BAR, LATE]
    assert rows[0][3:9] == (60, 10**9, 2 * 10**9, 5 * 10**8, 15 * 10**8, 10 * 10**9)


def test_what_nobody_subscribed_to_is_left_out() -> None:
    w = wire()
    w.remove("Q", "AAPL")
    assert told(w, quote(1), quote(1, sym="MSFT"), {"ev": "LULD", "T": "AAPL", "h": 1.0, "l": 0.5, "t": T0}) == []
    assert (w.counts["not subscribed"], w.counts["unknown events"], w.counts["messages"]) == (2, 1, 3)
    w.add("Q", "AAPL", STOCK)
    assert len(told(w, quote(5))) == 1  # a new subscription, no gap
    w.frame(json.dumps([quote(6)]), (T0 + 10) * MS)
    assert w.lag_ns == 4 * MS
