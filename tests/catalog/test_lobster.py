"""Importing LOBSTER days: with a book for every message its levels, otherwise the orders of the messages."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from test_databento import events_of

from catalog.book import depth
from catalog.errors import InputError
from catalog.events import F_MBP, F_TOB, SCALE, TRADE, trading_state
from catalog.lobster import import_lobster, read_levels
from catalog.status import AUCTION, HALTED, OPEN

AMZN = "lobster/AMZN_2012-06-21_34200000_57600000_message_1.csv.zst"
NEW_YORK = int(np.datetime64("2012-06-21T04:00", "ns").astype(np.int64))


def table(path):
    with pa.input_stream(str(path), compression="zstd" if path.suffix == ".zst" else None) as f:
        return np.loadtxt(f.read().decode().splitlines(), np.float64, delimiter=",")


def test_the_catalog_of_a_day_has_its_best_quotes_after_every_message(data, tmp_path):
    info = import_lobster([data / AMZN], tmp_path / "c")
    assert info.counts == {"order_book_deltas": 0, "trades": 8_974 + 2_445, "quotes": 55_071}
    assert not info.quality["crossed"] and info.instruments[0].level == 1
    _, events = events_of(info.root)
    published = table(data / AMZN.replace("message", "orderbook")).astype(np.int64)
    changed = np.append(True, np.any(np.diff(published, axis=0) != 0, axis=1))
    quotes = events[events["action"] != TRADE]
    columns = quotes["price"][1::2] // 100_000, quotes["size"][1::2] // SCALE, quotes["price"][::2] // 100_000, quotes["size"][::2] // SCALE
    assert np.array_equal(np.stack(columns, 1), published[changed])
    messages = table(data / AMZN)
    stamps = NEW_YORK + np.rint(messages[changed, 0] * 1e6).astype(np.int64) * 1000
    assert np.abs(quotes["ts_event"][::2] - stamps).max() <= 500
    assert np.all(quotes["flags"] & F_TOB)


def test_ten_levels_follow_the_published_book_row_by_row(data):
    message, book = data / "lobster/AAPL_head_message_10.csv", data / "lobster/AAPL_head_orderbook_10.csv"
    events = read_levels(message, book, "AAPL", "2012-06-21")
    assert np.all(events["flags"][np.isin(events["action"], list(b"ACM"))] & F_MBP)
    shown, published = depth(events, 10), table(book).astype(np.int64).reshape(-1, 10, 4)
    last = {int(s): n for n, s in enumerate(events["sequence"])}
    rows, at = 0, 0
    for n, (expected) in enumerate(published):
        at = last.get(n + 1, at)
        rows += n > 0
        ours = [shown[name][at] // unit for name, unit in (("ask_px", 100_000), ("ask_sz", SCALE), ("bid_px", 100_000), ("bid_sz", SCALE))]
        assert np.array_equal(np.stack(ours, 1), expected)
    assert rows == 998


def day(folder, messages, book=None, symbol="AAA"):
    path = folder / f"{symbol}_2012-06-21_34200000_57600000_message_2.csv"
    path.write_text("\n".join(messages) + "\n")
    if book is not None:
        (folder / path.name.replace("message", "orderbook")).write_text("\n".join(book) + "\n")
    return path


MESSAGES = [
    "34200.000000001,1,7,100,1000000,1",
    "34200.000000002,1,8,50,1000200,-1",
    "34200.000000003,4,8,20,1000200,-1",
    "34201,7,0,0,-1,-1",
    "34202,7,0,0,0,-1",
    "34203,7,0,0,1,-1",
    "34204,5,0,10,1000100,1",
    "34204,3,7,100,1000000,1",
]


def test_without_a_book_the_orders_of_the_messages_are_imported_and_halts_are_kept(tmp_path):
    info = import_lobster([day(tmp_path, MESSAGES)], tmp_path / "c")
    _, events = events_of(info.root)
    rows = [(chr(e["action"]), int(e["side"]), int(e["price"]) // 10**7, int(e["size"]) // SCALE, int(e["order_id"])) for e in events]
    assert rows == [
        ("A", 1, 10_000, 100, 7), ("A", -1, 10_002, 50, 8), ("T", 1, 10_002, 20, 0), ("M", -1, 10_002, 30, 8), ("T", -1, 10_001, 10, 0),
        ("C", 1, 10_000, 100, 7),
    ]  # fmt: skip
    assert int(events["ts_event"][0]) == NEW_YORK + 34_200 * SCALE + 1, "summer time in New York"
    when, state = trading_state(info.root, "AAA.XNAS")
    assert list(state) == [HALTED, AUCTION, OPEN] and list((when - NEW_YORK) // SCALE) == [34_201, 34_202, 34_203]
    assert import_lobster([tmp_path / day(tmp_path, MESSAGES).name], tmp_path / "c").reused


def test_no_order_outlives_its_day(tmp_path):
    days = [day(tmp_path, MESSAGES[:3], symbol="AAA"), tmp_path / day(tmp_path, MESSAGES).name.replace("06-21", "06-22")]
    days[1].write_text("34200.5,1,9,70,999900,1\n")
    _, events = events_of(import_lobster(days, tmp_path / "c").root)
    assert "".join(map(chr, events["action"]))[-2:] == "RA"
    assert (depth(events, 2)[-1]["bid_px"] // 10**7).tolist() == [9_999, 0]


def test_a_book_of_one_row_seeds_the_orders(tmp_path):
    messages = [MESSAGES[0], "34200.5,3,3,40,999900,1", "34200.6,4,4,5,1000500,-1"]
    info = import_lobster([day(tmp_path, messages, ["1000500,30,1000000,100,9999999999,0,999900,40"])], tmp_path / "c")
    _, events = events_of(info.root)
    assert "".join(map(chr, events["action"])) == "RAAACTM"
    assert not info.quality["unknown_cancel"]
    after = depth(events, 2)[-1]
    assert (after["bid_px"] // 10**7).tolist() == [10_000, 0] and (after["ask_sz"] // SCALE).tolist() == [25, 0]


def test_two_symbols_become_one_catalog(tmp_path):
    info = import_lobster([day(tmp_path, MESSAGES), day(tmp_path, MESSAGES, symbol="BBB")], tmp_path / "c")
    assert {i.id for i in info.instruments} == {"AAA.XNAS", "BBB.XNAS"} and info.counts["trades"] == 4
    assert json.loads((info.root / "cift.json").read_text())["schema"] == "lobster"


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent_2012-06-21_1_2_message_1.csv", "does not tell symbol"), ("AAA_2012-06-22_1_2_message_1.csv", "does not exist"),
     ("x.dbn", "is no LOBSTER file"), ("AAA_2012-06-22_1_2_orderbook_1.csv", "order books alone")],
)  # fmt: skip
def test_what_is_no_day_is_refused_in_one_line(tmp_path, name, message):
    with pytest.raises(InputError, match=message) as caught:
        import_lobster([tmp_path / name], tmp_path / "c")
    assert name in str(caught.value) and "\n" not in str(caught.value)
