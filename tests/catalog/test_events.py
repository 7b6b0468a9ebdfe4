"""The event array: canonical order, sessions, instrument files, and both readers on real and on damaged input."""

from __future__ import annotations

import datetime as dt
import shutil
from dataclasses import replace
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catalog import events as ev
from catalog.errors import InputError
from catalog.events import EVENT, F_LAST, F_MBP, F_TOB, canonical, read_catalog, read_dbn, read_instruments_toml, session_bounds

ES = "databento/esh4-glbx-mdp3-20231225.mbo.dbn.zst"
BINANCE = "catalogs/binance-2024-08-08"
EXAMPLE = Path(__file__).parents[2] / "docs/instruments/esh4.toml"


@pytest.fixture(scope="module")
def binance(data):
    instruments, blocks = read_catalog(data / BINANCE)
    return instruments, list(blocks)


def rows(*items):
    """EVENT rows of (ts_init, action, instrument), with the position as ts_event."""
    out = np.zeros(len(items), EVENT)
    for i, (ts, action, instrument) in enumerate(items):
        out[i]["ts_init"], out[i]["ts_event"], out[i]["action"], out[i]["instrument"] = ts, i, ord(action), instrument
    return out


# --- canonical order ------------------------------------------------------------------------------------------------------------------

streams = st.lists(st.tuples(st.integers(0, 6), st.sampled_from("ACMRT"), st.integers(0, 2)), max_size=40).map(lambda x: rows(*x))


def slow_canonical(events):
    """The same order, one row at a time: the stamp each row gets, then a sort on the pair that Nautilus delivers by."""
    newest, changed, out = {}, {}, []
    for n, e in enumerate(events):
        k, ts = int(e["instrument"]), int(e["ts_init"])
        ts = max(ts, newest.get(k, ts))
        if chr(e["action"]) == "T":
            ts += changed.get(k) == ts
        else:
            changed[k] = ts
        newest[k] = ts
        out.append((ts, chr(e["action"]) != "T", n))
    return [(n, ts) for ts, _, n in sorted(out)]


@settings(deadline=None)
@given(streams)
def test_canonical_order_is_that_of_a_slow_twin(events):
    out = canonical(events)
    assert [(int(e["ts_event"]), int(e["ts_init"])) for e in out] == slow_canonical(events)


@settings(deadline=None)
@given(streams)
def test_canonical_order_keeps_every_instruments_own_order_and_never_goes_back(events):
    out = canonical(events)
    assert np.all(np.diff(out["ts_init"]) >= 0)
    for k in range(3):
        assert list(out["ts_event"][out["instrument"] == k]) == list(events["ts_event"][events["instrument"] == k])
    assert np.all(out["ts_init"] >= events["ts_init"][out["ts_event"]])


@settings(deadline=None)
@given(streams, st.integers(0, 40))
def test_moving_a_stream_in_pieces_is_moving_it_whole(events, cut):
    whole, pieces = events.copy(), events.copy()
    state = [np.full(3, -(2**63)), np.full(3, -(2**63))]
    counts = np.array(ev.move(pieces[:cut], *state)) + ev.move(pieces[cut:], *state)
    assert tuple(counts) == ev.move(whole, np.full(3, -(2**63)), np.full(3, -(2**63)))
    assert np.array_equal(whole, pieces)


def test_a_trade_after_a_book_change_of_its_stamp_moves_one_nanosecond_and_what_follows_does_not_overtake_it():
    out = canonical(rows((5, "T", 0), (5, "A", 0), (5, "T", 0), (5, "C", 0), (9, "A", 0)))
    assert list(out["ts_init"]) == [5, 5, 6, 6, 9]
    assert [chr(a) for a in out["action"]] == list("TATCA")


# --- sessions -------------------------------------------------------------------------------------------------------------------------


def ns(text):
    return int(np.datetime64(text, "ns").astype(np.int64))


@pytest.mark.parametrize(
    ("session", "at", "opens", "closes"),
    [
        (None, "2024-05-08T13:00", "2024-05-08T00:00", "2024-05-09T00:00"),
        ("09:30-16:00 America/New_York", "2024-05-08T15:00", "2024-05-08T13:30", "2024-05-08T20:00"),
        ("09:30-16:00 America/New_York", "2024-05-08T13:30", "2024-05-08T13:30", "2024-05-08T20:00"),
        ("09:30-16:00 America/New_York", "2024-05-08T20:00", "2024-05-09T13:30", "2024-05-09T20:00"),  # at the close: the next
        ("17:00-16:00 America/Chicago", "2023-12-25T22:30", "2023-12-25T23:00", "2023-12-26T22:00"),  # pre-open
        ("17:00-16:00 America/Chicago", "2023-12-26T04:00", "2023-12-25T23:00", "2023-12-26T22:00"),  # past midnight
        ("17:00-16:00 America/Chicago", "2024-03-10T10:00", "2024-03-09T23:00", "2024-03-10T21:00"),  # clocks go forward: 22 h
        ("00:00-00:00 UTC", "2024-05-08T13:00", "2024-05-08T00:00", "2024-05-09T00:00"),
    ],
)
def test_a_session_is_found_in_local_time(session, at, opens, closes):
    assert session_bounds(session, ns(at)) == (ns(opens), ns(closes))


SESSIONS = ["17:00-16:00 America/Chicago", "09:30-16:00 America/New_York", "09:00-15:00 Asia/Tokyo", None]


@settings(deadline=None)
@given(st.integers(0, 2**62), st.sampled_from(SESSIONS))
def test_the_session_given_has_not_closed_and_opens_within_a_day(ts, session):
    a, b = session_bounds(session, ts)
    assert a < b and ts < b and a - ts <= 26 * 3600 * 10**9
    assert session_bounds(session, a) == (a, b)
    if session:
        assert dt.datetime.fromtimestamp(a // 10**9, ZoneInfo(session.split()[1])).strftime("%H:%M") == session[:5]


@pytest.mark.parametrize("session", ["9:30-16:00 America/New_York", "09:30-16:00", "09:30-25:00 UTC", "09:30-16:00 Mars/Olympus", ""])
def test_a_session_of_another_form_is_refused(session):
    with pytest.raises(InputError, match="09:30-16:00"):
        session_bounds(session, 0)


# --- instrument files -----------------------------------------------------------------------------------------------------------------


def test_the_example_file_describes_the_march_contract():
    (es,) = read_instruments_toml(EXAMPLE)
    assert (es.id, es.tick, es.lot, es.multiplier, es.currency) == ("ESH4.GLBX", 250_000_000, 10**9, 50.0, "USD")
    assert (es.session, es.fee_per_unit, es.kind, es.price_precision) == ("17:00-16:00 America/Chicago", 1.25, "future", 2)


GOOD = {"symbol": '"X"', "venue": '"V"', "kind": '"equity"', "tick": '"0.01"', "currency": '"USD"'}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tick": None}, "tick is missing"),
        ({"colour": '"red"'}, 'unknown key "colour"'),
        ({"tick": "0.01"}, "tick must be a text"),
        ({"tick": '"fine"'}, "is no number"),
        ({"tick": '"nan"'}, "is no number"),
        ({"tick": '"0.00000000001"'}, "more than 9 decimals"),
        ({"tick": '"-0.01"'}, "above 0"),
        ({"multiplier": '"50"'}, "multiplier must be a number"),
        ({"multiplier": "0.0"}, "above 0"),
        ({"multiplier": "true"}, "must be a number"),
        ({"taker_fee": "nan"}, "finite"),
        ({"kind": '"option"'}, "is none of future"),
        ({"session": '"always"'}, "09:30-16:00"),
    ],
)
def test_an_instrument_that_is_not_well_described_is_refused_by_file_table_and_key(tmp_path, change, message):
    table = {k: v for k, v in (GOOD | change).items() if v is not None}
    file = tmp_path / "x.toml"
    file.write_text("[[instrument]]\n" + "\n".join(f"{k} = {v}" for k, v in table.items()))
    with pytest.raises(InputError, match=message):
        read_instruments_toml(file)


def test_of_an_instrument_that_is_defined_only_what_differs_need_be_told(tmp_path):
    (es,) = read_instruments_toml(EXAMPLE)
    (tmp_path / "x.toml").write_text('[[instrument]]\nsymbol = "ESH4"\nvenue = "GLBX"\nfee_per_unit = 0.5')
    assert read_instruments_toml(tmp_path / "x.toml", [es]) == [replace(es, fee_per_unit=0.5)]
    (tmp_path / "y.toml").write_text('[[instrument]]\nsymbol = "ESH4"\nvenue = "GLBX"\nsession = ""\ntick = "0.5"')
    assert read_instruments_toml(tmp_path / "y.toml", [es]) == [replace(es, session=None, tick=500_000_000, price_precision=1)]
    with pytest.raises(InputError, match="kind is missing"):
        read_instruments_toml(tmp_path / "x.toml", [replace(es, id="ESM4.GLBX")])


@pytest.mark.parametrize("body", ["", "a = [", "other = 1", "instrument = 5", "[[instrument]]\nsymbol = 3"])
def test_a_file_that_is_no_instruments_file_is_refused(tmp_path, body):
    (tmp_path / "x.toml").write_text(body)
    with pytest.raises(InputError, match=r"x\.toml"):
        read_instruments_toml(tmp_path / "x.toml")
    with pytest.raises(InputError, match="cannot read"):
        read_instruments_toml(tmp_path / "absent.toml")


@settings(deadline=None)
@given(st.integers(-(10**15), 10**15))
def test_units_and_text_are_inverse(value):
    assert ev.units(ev.text(value)) == value
    assert value % 10 ** (9 - ev.decimals(value)) == 0


# --- DBN ------------------------------------------------------------------------------------------------------------------------------


def actions(events):
    return {chr(a): int((events["action"] == a).sum()) for a in np.unique(events["action"])}


def test_the_es_session_is_read_whole(data):
    events, (es,) = read_dbn(data / ES)
    assert actions(events) == {"A": 29_216, "C": 17_999, "M": 12_233, "T": 2_973}
    assert int((events["flags"] & ev.F_SNAPSHOT > 0).sum()) == 8_725
    assert int((events["flags"] & F_LAST > 0).sum()) == 47_022
    assert (es.id, es.tick, es.level) == ("ESH4.GLBX", 250_000_000, 3)
    assert ev.is_inferred(es)


def test_97_trades_of_the_es_session_follow_a_book_change_of_their_stamp(data):
    import databento

    raw = databento.DBNStore.from_file(data / ES).to_ndarray()
    raw = raw[raw["action"] != b"F"]
    events, _ = read_dbn(data / ES)
    assert np.array_equal(events["order_id"], raw["order_id"]), "the venue's order is kept"
    assert np.array_equal(events["ts_event"], raw["ts_event"].astype(np.int64))
    moved = events["ts_init"] != raw["ts_recv"].astype(np.int64)
    assert int((moved & (events["action"] == ev.TRADE)).sum()) == 97
    assert int((events["ts_init"] - raw["ts_recv"].astype(np.int64)).max()) < 100


def test_the_session_that_begins_with_a_clear_has_its_definition_beside_it(data):
    events, (es,) = read_dbn(data / "databento/esm4-glbx-mdp3-20240508.mbo.dbn.zst")
    assert actions(events) == {"A": 13_678, "C": 80, "M": 27, "R": 1, "T": 5}
    assert events[0]["action"] == ev.CLEAR and events[0]["price"] == 0
    assert (es.id, es.tick, es.multiplier, es.currency) == ("ESM4.GLBX", 250_000_000, 50.0, "USD")
    assert not ev.is_inferred(es)


def test_a_symbol_picks_one_instrument_and_an_unknown_one_is_refused(data):
    file = data / "databento/esm4-glbx-mdp3-20240508.mbo.dbn.zst"
    by_symbol, by_id = read_dbn(file, "ESM4"), read_dbn(file, "ESM4.GLBX")
    assert np.array_equal(by_symbol[0], by_id[0]) and by_symbol[1] == by_id[1]
    with pytest.raises(InputError, match=r"no events of NOPE; it holds ESM4"):
        read_dbn(file, "NOPE")


# --- catalogs -------------------------------------------------------------------------------------------------------------------------


def test_the_binance_catalog_is_read_whole(binance, data):
    instruments, blocks = binance
    assert [i.id for i in instruments] == ["BTCUSDT-PERP.BINANCE", "BTCUSDT.BINANCE", "ETHUSDT-PERP.BINANCE", "ETHUSDT.BINANCE"]
    assert [(i.tick, i.lot, i.level) for i in instruments][:2] == [(100_000_000, 1_000_000, 2), (10_000_000, 10_000, 2)]
    assert {i.kind for i in instruments} == {"crypto_perpetual", "currency_pair"} and {i.currency for i in instruments} == {"USDT"}
    events = np.concatenate(blocks)
    trades = events["action"] == ev.TRADE
    assert list(np.bincount(events["instrument"][~trades])) == [427_516, 273_955, 421_637, 263_927]
    assert list(np.bincount(events["instrument"][trades])) == [21_308, 19_903, 14_075, 14_515]
    assert ev.catalog_counts(data / BINANCE)["BTCUSDT.BINANCE"] == {"trades": 19_903, "order_book_deltas": 273_955}
    assert ev.catalog_range(data / BINANCE) == (int(events["ts_init"][0]), int(events["ts_init"][-1]))


def test_a_catalogs_blocks_are_small_and_in_canonical_order(binance):
    _, blocks = binance
    assert max(map(len, blocks)) <= 65_536
    events = np.concatenate(blocks)
    assert np.array_equal(events, canonical(events)), "no stamp had to be moved, and trades come first at equal stamps"
    same = np.flatnonzero((np.diff(events["ts_init"]) == 0) & (np.diff((events["action"] != ev.TRADE).astype(int)) == 0))
    assert np.all(events["instrument"][same + 1] >= events["instrument"][same])


def test_no_venue_event_of_the_binance_catalog_spans_two_stamps(binance):
    events = np.concatenate(binance[1])
    groups = 0
    for k in range(4):
        deltas = events[(events["instrument"] == k) & (events["action"] != ev.TRADE)]
        ends = deltas["flags"] & F_LAST > 0
        groups += int(ends.sum())
        assert np.all(ends[:-1] | (np.diff(deltas["ts_init"]) == 0))
    assert groups == 26_089


def test_level_updates_are_marked_and_trades_carry_no_flags(binance):
    events = np.concatenate(binance[1])
    change = np.isin(events["action"], list(b"ACM"))
    assert np.all(events["flags"][change] & F_MBP) and not np.any(events["flags"][~change] & F_MBP)
    trades = events[events["action"] == ev.TRADE]
    assert not trades["flags"].any() and not trades["sequence"].any() and set(np.unique(trades["side"])) == {-1, 1}


def test_what_is_read_is_what_nautilus_reads(binance, data):
    from nautilus_trader.persistence import ParquetDataCatalog

    instruments, blocks = binance
    events = np.concatenate(blocks)
    start, end = ev.catalog_range(data / BINANCE)[0], ev.catalog_range(data / BINANCE)[0] + 5 * 10**9
    catalog = ParquetDataCatalog(str((data / BINANCE).resolve()))
    for k, i in enumerate(instruments):
        mine = events[(events["instrument"] == k) & (events["ts_init"] <= end)]
        deltas = catalog.query_order_book_deltas([i.id], start=start, end=end)
        action = {1: "A", 2: "M", 3: "C", 4: "R"}
        theirs = [
            (d.ts_event, d.ts_init, round(d.order.price.as_double() * 1e9), round(d.order.size.as_double() * 1e9), action[int(d.action)])
            for d in deltas
        ]
        ours = mine[mine["action"] != ev.TRADE]
        assert len(theirs) > 100
        assert theirs == [(int(e["ts_event"]), int(e["ts_init"]), int(e["price"]), int(e["size"]), chr(e["action"])) for e in ours]
        assert [d.flags for d in deltas] == list(ours["flags"] & 0xEF)
        trades = catalog.query_trade_ticks([i.id], start=start, end=end)
        ours = mine[mine["action"] == ev.TRADE]
        assert [(t.ts_init, round(t.price.as_double() * 1e9)) for t in trades] == [(int(e["ts_init"]), int(e["price"])) for e in ours]
        assert [t.aggressor_side.name for t in trades] == [{1: "BUY", -1: "SELL"}[int(s)] for s in ours["side"]]


def test_a_range_is_inclusive_at_both_ends_and_keeps_the_order_asked_for(binance, data):
    instruments, blocks = binance
    events = np.concatenate(blocks)
    eth = events[events["instrument"] == 3]
    start, end = int(eth["ts_init"][100_000]), int(eth["ts_init"][150_000])
    (i,), part = read_catalog(data / BINANCE, ["ETHUSDT"], start, end)
    part = np.concatenate(list(part))
    expected = eth[(eth["ts_init"] >= start) & (eth["ts_init"] <= end)]
    expected["instrument"] = 0
    assert i == instruments[3] and np.array_equal(part, expected)
    two, part = read_catalog(data / BINANCE, ["ETHUSDT.BINANCE", "BTCUSDT.BINANCE"], start, end)
    assert [i.id for i in two] == ["ETHUSDT.BINANCE", "BTCUSDT.BINANCE"]
    part = np.concatenate(list(part))
    assert np.array_equal(part[part["instrument"] == 0]["price"], expected["price"])


@pytest.mark.parametrize(
    ("ids", "start", "end", "message"),
    [
        (["NOPE.BINANCE"], None, None, "NOPE.BINANCE is not there; it holds BTCUSDT-PERP.BINANCE"),
        ([], None, None, "no instrument was asked for"),
        (None, 5, 4, "the range is empty"),
        (None, 0, 10**18, "its data runs from 2024-08-08T23:54:14.152322667Z"),
    ],
)
def test_what_is_not_in_a_catalog_is_refused(data, ids, start, end, message):
    with pytest.raises(InputError, match=message):
        read_catalog(data / BINANCE, ids, start, end)


def test_a_folder_that_is_no_catalog_is_refused(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        read_catalog(tmp_path / "absent")
    with pytest.raises(InputError, match="is no catalog"):
        read_catalog(tmp_path)
    (tmp_path / "data/trades/X.Y").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no order book deltas"):
        read_catalog(tmp_path)


# --- a small catalog of each level, written by Nautilus -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three instruments: orders (L3), levels (L2) with a clear, quotes only (L1)."""
    from nautilus_trader import model as m
    from nautilus_trader.persistence import ParquetDataCatalog

    root = tmp_path_factory.mktemp("small")
    catalog = ParquetDataCatalog(str(root))
    ids = {name: m.InstrumentId.from_str(f"{name}.XNAS") for name in ("L3", "L2", "L1")}
    p, q = m.Price.from_str, m.Quantity.from_str
    usd, info = m.Currency.from_str("USD"), {"cift": {"fee_per_unit": 0.003}}
    catalog.write_instruments([m.Equity(i, m.Symbol(n), usd, 2, p("0.01"), 0, 0, info=info) for n, i in ids.items()])

    def delta(name, action, side, price, size, order_id, ts, flags=F_LAST):
        order = m.BookOrder(getattr(m.OrderSide, side), p(price), q(size), order_id)
        return m.OrderBookDelta(ids[name], getattr(m.BookAction, action), order, flags, 7, ts - 1, ts)

    catalog.write_order_book_deltas([delta("L3", "ADD", "BUY", "10.01", "3", 11, 5), delta("L3", "UPDATE", "SELL", "-10.02", "4", 12, 6)])
    clear = m.OrderBookDelta.clear(ids["L2"], 0, 1, 1)
    catalog.write_order_book_deltas([clear, *(delta("L2", a, "BUY", "9.99", "5", 0, ts) for a, ts in (("ADD", 5), ("DELETE", 9)))])
    quotes = (("1.00", "5", "6", 5), ("1.01", "7", "0", 6))
    catalog.write_quote_ticks([m.QuoteTick(ids["L1"], p(bid), p("1.02"), q(a), q(b), ts, ts) for bid, a, b, ts in quotes])
    side = m.AggressorSide
    catalog.write_trade_ticks(
        [m.TradeTick(ids["L1"], p("1.02"), q("1"), s, m.TradeId("9"), 5, 5) for s in (side.BUY, side.SELL, side.NO_AGGRESSOR)]
    )
    return root


def test_each_level_of_feed_becomes_events_of_its_own_kind(small):
    instruments, blocks = read_catalog(small)
    assert [(i.id, i.level, i.fee_per_unit) for i in instruments] == [("L1.XNAS", 1, 0.003), ("L2.XNAS", 2, 0.003), ("L3.XNAS", 3, 0.003)]
    events = np.concatenate(list(blocks))
    got = [(int(e["ts_init"]), instruments[e["instrument"]].id[:2], chr(e["action"]), int(e["side"]), int(e["flags"])) for e in events]
    assert got == [
        (1, "L2", "R", 0, 32),
        (5, "L1", "T", 1, 0),
        (5, "L1", "T", -1, 0),
        (5, "L1", "T", 0, 0),
        (5, "L1", "A", 1, F_TOB),
        (5, "L1", "A", -1, F_TOB | F_LAST),
        (5, "L2", "A", 1, F_LAST | F_MBP),
        (5, "L3", "A", 1, F_LAST),
        (6, "L1", "A", 1, F_TOB),
        (6, "L1", "C", -1, F_TOB | F_LAST),
        (6, "L3", "M", -1, F_LAST),
        (9, "L2", "C", 1, F_LAST | F_MBP),
    ]
    orders = events[events["instrument"] == 2]
    assert list(orders["price"]) == [10_010_000_000, -10_020_000_000] and list(orders["size"]) == [3 * 10**9, 4 * 10**9]
    assert list(orders["order_id"]) == [11, 12] and list(orders["sequence"]) == [7, 7] and list(orders["ts_event"]) == [4, 5]


def damaged(small, tmp_path, kind, change):
    """A copy of the small catalog in which one file was written again from a changed table."""
    root = tmp_path / "copy"
    shutil.copytree(small, root)
    (file,) = (root / "data" / kind / "L3.XNAS").glob("*.parquet") if kind != "quotes" else (root / "data/quotes/L1.XNAS").glob("*.parquet")
    pq.write_table(change(pq.read_table(file)), file)
    return root, file


def old_price(table):
    raw = pa.array([b"\0" * 16] * len(table), pa.binary(16))
    return table.set_column(table.schema.get_field_index("price"), "price", raw)


def backwards(table):
    return table.take(list(range(len(table)))[::-1])


def beyond_nine_decimals(table):
    tiny = pa.array([1] * len(table), pa.int64()).cast(pa.decimal128(38, 0))
    words = np.zeros((len(tiny), 2), np.int64)
    words[:, 0] = 1
    odd = pa.Array.from_buffers(pa.decimal128(38, 16), len(tiny), [None, pa.py_buffer(words)])
    return table.set_column(table.schema.get_field_index("size"), "size", odd)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (old_price, r"price.* is fixed_size_binary\[16\], not decimal128.*another NautilusTrader version"),
        (lambda t: t.drop_columns(["sequence"]), 'no column "sequence"'),
        (backwards, "ts_init runs backwards at"),
        (beyond_nine_decimals, "a size cannot be held"),
        (lambda t: t.set_column(0, "action", pa.array(["ADD", "BUILD"]).dictionary_encode()), '"BUILD" is none of ADD'),
    ],
)
def test_a_catalog_file_of_another_version_or_make_is_refused_by_name(small, tmp_path, change, message):
    root, file = damaged(small, tmp_path, "order_book_deltas", change)
    with pytest.raises(InputError, match=message) as caught:
        list(read_catalog(root)[1])
    assert str(file) in str(caught.value)


def test_folders_of_nautilus_1_and_data_without_a_definition_are_refused(small, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(small, root)
    shutil.rmtree(root / "data/equity/L3.XNAS")
    with pytest.raises(InputError, match=r"data of L3\.XNAS but no definition"):
        read_catalog(root)
    assert len(read_catalog(root, ["L1", "L2"])[0]) == 2
    (root / "data/quote_tick").mkdir()
    with pytest.raises(InputError, match=r"NautilusTrader 1\.x"):
        read_catalog(root)


@settings(deadline=None)
@given(st.data())
def test_a_damaged_parquet_file_is_refused_or_read_never_worse(small, tmp_path_factory, data):
    root = tmp_path_factory.mktemp("damaged") / "copy"
    shutil.copytree(small, root)
    file = data.draw(st.sampled_from(sorted(root.rglob("*.parquet"))))
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
            content[at] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    try:
        list(read_catalog(root)[1])
    except InputError as e:
        assert str(root) in str(e)  # noqa: PT017
