"""Importing Databento files: what the market said arrives in Nautilus, in its order; nothing half-written is taken for whole."""

from __future__ import annotations

import datetime as dt
import errno
import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import databento_dbn as d
import numpy as np
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from catalog import importer
from catalog.book import depth
from catalog.databento import import_dbn
from catalog.dbn import MBO
from catalog.errors import InputError
from catalog.events import ADD, CANCEL, EVENT, F_LAST, MODIFY, TRADE, read_catalog, read_dbn

ES = "databento/esh4-glbx-mdp3-20231225.mbo.dbn.zst"
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs/instruments/esh4.toml"
DAY = int(np.datetime64("2024-01-02", "ns").astype(np.int64))


# --- DBN files of one's own -----------------------------------------------------------------------------------------------------------


def mbo(*items):
    """MBO records of (ts_recv after DAY, action, side, price in cents, size, order id, flags[, instrument id])."""
    out = np.zeros(len(items), MBO)
    for n, (ts, action, side, cents, size, order, flags, *number) in enumerate(items):
        what = order, cents * 10**7, size, flags, 0, ord(action), ord(side)
        out[n] = (14, 0xA0, 2, number[0] if number else 1, DAY + ts, *what, DAY + ts, 0, n + 1)
    return out


def head(symbols, schema=d.Schema.MBO, start=DAY, version=3):
    days = [SimpleNamespace(start_date=dt.date(2024, 1, 1), end_date=dt.date(2025, 1, 1), symbol=str(n)) for n in symbols.values()]
    mappings = [SimpleNamespace(raw_symbol=s, intervals=[day]) for s, day in zip(symbols, days)]
    return d.Metadata(
        "XNAS.ITCH", start, d.SType.RAW_SYMBOL, d.SType.INSTRUMENT_ID, schema, symbols=list(symbols), mappings=mappings, version=version
    ).encode()


def define(path, symbols, tick=10**7):
    kinds = d.InstrumentClass.STOCK, d.SecurityUpdateAction.ADD
    made = [d.InstrumentDefMsg(2, n, DAY, DAY, tick, 10**9, s, "", "", *kinds, exchange="XNAS", currency="USD") for s, n in symbols.items()]
    path.write_bytes(zstandard.compress(head(symbols, d.Schema.DEFINITION) + b"".join(map(bytes, made))))


def write(folder, records, symbols=None, name="x", zipped=True, tick=10**7, start=DAY, version=3):
    """x.mbo.dbn[.zst] with its definition file beside it."""
    symbols = symbols or {"AAA": 1}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.mbo.dbn{'.zst' if zipped else ''}"
    content = head(symbols, start=start, version=version) + records.tobytes()
    path.write_bytes(zstandard.compress(content) if zipped else content)
    define(folder / path.name.replace(".mbo.", ".definition."), symbols, tick)
    return path


def events_of(root, **kw):
    instruments, blocks = read_catalog(root, **kw)
    return instruments, np.concatenate(list(blocks))


def brief(events):
    return [(int(e["ts_init"]) - DAY, chr(e["action"]), int(e["size"]) // 10**9, int(e["order_id"]), int(e["flags"])) for e in events]


SESSION = mbo(
    (0, "R", "N", 0, 0, 0, 8),
    (10, "A", "B", 1000, 100, 1, 128),
    (20, "A", "A", 1002, 300, 2, 128),
    (30, "T", "B", 1002, 100, 0, 0),
    (30, "F", "A", 1002, 100, 2, 0),
    (30, "C", "A", 1002, 100, 2, 128),
    (40, "M", "B", 1001, 50, 1, 128),
    (50, "C", "A", 1002, 200, 2, 128),
)


# --- the real session -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def es(data, tmp_path_factory):
    return import_dbn([data / ES], tmp_path_factory.mktemp("es") / "catalog", EXAMPLE)


def test_the_es_session_is_imported_with_its_facts(es):
    assert es.counts == {"order_book_deltas": 59_448, "trades": 2_973}
    assert (es.moved_trades, es.quality["crossed"], es.quality["partial_cancel"]) == (97, 891, 0)
    assert not es.quality["unknown_cancel"] and not es.quality["unknown_modify"]
    assert [i.id for i in es.instruments] == ["ESH4.GLBX"] and es.instruments[0].fee_per_unit == 1.25
    note = json.loads((es.root / "cift.json").read_text())
    assert note["counts"] == es.counts and len(next(iter(note["sources"].values()))) == 64


def test_what_is_imported_is_what_was_in_the_file(es, data):
    events, _ = read_dbn(data / ES)
    instruments, stored = events_of(es.root)
    assert instruments == list(es.instruments)
    expected = events.copy()
    trades = expected["action"] == TRADE
    for field in ("order_id", "sequence", "flags"):
        expected[field][trades] = 0
    cut = np.flatnonzero(stored["flags"] != expected["flags"])
    assert len(cut) == es.closed == 2, "two venue events span two stamps"
    expected["flags"][cut] |= F_LAST
    assert np.array_equal(stored, expected)


def test_no_venue_event_spans_two_stamps_after_the_import(es):
    _, events = events_of(es.root)
    deltas = events[events["action"] != TRADE]
    assert np.all((deltas["flags"][:-1] & F_LAST > 0) | (np.diff(deltas["ts_init"]) == 0))
    assert deltas["flags"][-1] & F_LAST


def test_the_files_have_the_schema_of_nautilus(es, data):
    for kind in ("order_book_deltas", "trades"):
        (ours,) = (es.root / "data" / kind / "ESH4.GLBX").glob("*.parquet")
        theirs = next((data / "catalogs/binance-2024-08-08/data" / kind / "BTCUSDT.BINANCE").glob("*.parquet"))
        a, b = pq.read_schema(ours), pq.read_schema(theirs)
        assert a.remove_metadata().equals(b.remove_metadata())
        assert set(a.metadata) == set(b.metadata)
        assert (a.metadata[b"instrument_id"], a.metadata[b"price_precision"], a.metadata[b"size_precision"]) == (b"ESH4.GLBX", b"2", b"0")


RECORDER = """
import json, sys
from nautilus_trader.backtest import BacktestDataConfig, BacktestEngineConfig, BacktestNode, BacktestRunConfig, BacktestVenueConfig
from nautilus_trader.common import LoggerConfig, LogLevel
from nautilus_trader.execution import FixedFeeModel
from nautilus_trader.model import BookType, Currency, InstrumentId, Money, NautilusDataType
from nautilus_trader.trading import Strategy
root, name = sys.argv[1:3]
iid = InstrumentId.from_str(name)
CODE = {1: 65, 2: 77, 3: 67, 4: 82}
class Recorder(Strategy):
    def __init__(self):
        super().__init__()
        self.rows, self.spans, self.asks = [], 0, []
    def on_start(self):
        self.subscribe_book_deltas(iid, book_type=BookType.L3_MBO, managed=True)
        self.subscribe_trades(iid)
    def on_book_deltas(self, group):
        self.spans += len({d.ts_init for d in group.deltas}) > 1
        if len(sys.argv) > 4:
            self.asks = [[len(level.get_orders()), level.size()] for level in self.cache.order_book(iid).asks()]
        for d in group.deltas:
            o = d.order
            price, size = round(o.price.as_double() * 1e9), round(o.size.as_double() * 1e9)
            self.rows.append((d.ts_event, d.ts_init, price, size, o.order_id, d.sequence, CODE[int(d.action)], d.flags))
    def on_trade(self, t):
        self.rows.append((t.ts_event, t.ts_init, round(t.price.as_double() * 1e9), round(t.size.as_double() * 1e9), 0, 0, 84, 0))
data = [BacktestDataConfig(t, root, instrument_ids=[iid]) for t in (NautilusDataType.TradeTick, NautilusDataType.OrderBookDelta)]
venue = BacktestVenueConfig(name=str(iid.venue), oms_type="NETTING", account_type="MARGIN", starting_balances=["1000000 USD"],
                            book_type="L3_MBO", fee_model=FixedFeeModel(Money(0, Currency.from_str("USD"))))
config = BacktestRunConfig(venues=[venue], data=data, engine=BacktestEngineConfig(logging=LoggerConfig(stdout_level=LogLevel.ERROR)),
                           raise_exception=True, dispose_on_completion=False)
node = BacktestNode([config]); node.build(); s = Recorder(); node.add_strategy(config.id, s); node.run()
json.dump({"rows": s.rows, "spans": s.spans, "asks": s.asks}, open(sys.argv[3], "w"))
"""


def recorded(root, instrument, folder, *book):
    """What a Nautilus backtest delivers to a strategy, in a process of its own."""
    out = folder / "recorded.json"
    done = subprocess.run([sys.executable, "-c", RECORDER, str(root), instrument, str(out), *book], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ERROR" not in done.stdout + done.stderr, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(out.read_text())


def test_a_nautilus_backtest_delivers_exactly_the_rows_that_our_reader_gives(es, tmp_path):
    got = recorded(es.root, "ESH4.GLBX", tmp_path)
    _, events = events_of(es.root)
    fields = ("ts_event", "ts_init", "price", "size", "order_id", "sequence", "action", "flags")
    assert got["rows"] == [list(r) for r in zip(*(events[f].tolist() for f in fields))]
    assert got["spans"] == 0


def test_nautilus_sees_the_instrument_as_it_was_described(es):
    from nautilus_trader.persistence import ParquetDataCatalog

    (i,) = ParquetDataCatalog(str(es.root)).instruments()
    assert (str(i.id), str(i.price_increment), str(i.multiplier), i.price_precision) == ("ESH4.GLBX", "0.25", "50", 2)
    assert i.info["cift"]["session"] == "17:00-16:00 America/Chicago"


def test_definitions_beside_the_data_give_expiry_and_multiplier(data, tmp_path):
    from nautilus_trader.persistence import ParquetDataCatalog

    info = import_dbn([data / "databento/esm4-glbx-mdp3-20240508.mbo.dbn.zst"], tmp_path / "c")
    assert info.counts == {"order_book_deltas": 13_786, "trades": 5}
    (i,) = ParquetDataCatalog(str(info.root)).instruments()
    assert info.instruments[0].session == "17:00-16:00 America/Chicago", "of its dataset"
    assert (i.expiration_ns, str(i.multiplier), i.exchange, i.underlying) == (1718976600000000000, "50", "XCME", "ES")


def test_fees_of_ones_own_go_with_the_definition_beside_the_data(data, tmp_path):
    from nautilus_trader.persistence import ParquetDataCatalog

    (tmp_path / "fees.toml").write_text('[[instrument]]\nsymbol = "ESM4"\nvenue = "GLBX"\nfee_per_unit = 0.85')
    info = import_dbn([data / "databento/esm4-glbx-mdp3-20240508.mbo.dbn.zst"], tmp_path / "c", tmp_path / "fees.toml")
    (i,), (n,) = info.instruments, ParquetDataCatalog(str(info.root)).instruments()
    assert (i.fee_per_unit, i.multiplier, i.session) == (0.85, 50.0, "17:00-16:00 America/Chicago")
    assert (n.expiration_ns, n.underlying) == (1718976600000000000, "ES")


# --- what Nautilus's book must be told --------------------------------------------------------------------------------------------------


def test_a_cancel_of_a_part_becomes_an_update_to_what_is_left(tmp_path):
    info = import_dbn([write(tmp_path, SESSION)], tmp_path / "c")
    assert info.quality["partial_cancel"] == 1
    _, events = events_of(info.root)
    assert brief(events) == [
        (0, "R", 0, 0, 136),
        (10, "A", 100, 1, 128),
        (20, "A", 300, 2, 128),
        (30, "T", 100, 0, 0),
        (30, "M", 200, 2, 128),
        (40, "M", 50, 1, 128),
        (50, "C", 200, 2, 128),
    ]
    raw, _ = read_dbn(tmp_path / "x.mbo.dbn.zst")
    assert brief(raw)[4] == (30, "C", 100, 2, 128), "the file itself is read as published"


def test_after_a_cancel_of_a_part_nautilus_keeps_the_rest_of_the_order(tmp_path):
    info = import_dbn([write(tmp_path, SESSION[:-1])], tmp_path / "c")
    assert recorded(info.root, "AAA.XNAS", tmp_path, "book")["asks"] == [[1, 200.0]]


actions = st.sampled_from("AACCMT")
cents, size, order, flags = st.integers(990, 1010), st.integers(0, 5), st.integers(1, 6), st.sampled_from([0, 128])
step = st.integers(0, 2), actions, st.sampled_from("ABN"), cents, size, order, flags
market = st.lists(st.tuples(*step), min_size=1, max_size=60)


@settings(deadline=None, max_examples=60)
@given(market)
def test_the_book_after_the_import_is_the_book_of_the_file_at_every_step(tmp_path_factory, steps):
    """Whatever is in the file: the levels that a book reaches on the stored events are those it reaches on the published ones, even when
    it knows no cancel of a part. Rows that cannot exist (no size) change nothing."""
    folder = tmp_path_factory.mktemp("market")
    records, ts = [(0, "A", "B", 1000, 1, 9, 128)], 0
    for gap, *rest in steps:
        ts += gap
        records.append((ts, *rest))
    file = write(folder, mbo(*records))
    raw, _ = read_dbn(file)
    info = import_dbn([file], folder / "c")
    _, stored = events_of(info.root)
    published, written = whole_book(raw, partial=True), whole_book(stored, partial=False)
    at = {int(e["sequence"]): n for n, e in enumerate(stored) if e["action"] != TRADE}
    for n, e in enumerate(raw):
        if e["action"] != TRADE and int(e["sequence"]) in at:
            assert published[n] == written[at[int(e["sequence"])]]
    assert published[-1] == written[-1]


def whole_book(events, partial):
    """Slow twin: {id: (side, price, size)} after each event; without `partial` a C removes the order, as Nautilus does."""
    orders, out = {}, []
    for e in events:
        key, side, price, size = int(e["order_id"]), int(e["side"]), int(e["price"]), int(e["size"])
        if e["action"] in (ADD, MODIFY):
            side = side or orders.pop(key, (0,))[0]
            orders.pop(key, None)
            if size > 0 and side:
                orders[key] = side, price, size
        elif e["action"] == CANCEL and key in orders:
            left = orders[key][2] - size if partial and size else 0
            if left > 0:
                orders[key] = (*orders[key][:2], left)
            else:
                del orders[key]
        out.append(dict(orders))
    return out


def test_a_group_without_an_end_is_ended_where_its_stamp_ends(tmp_path):
    records = mbo(
        (10, "A", "B", 1000, 1, 1, 0), (10, "A", "B", 999, 1, 2, 0), (11, "A", "B", 998, 1, 3, 0), (11, "T", "B", 1000, 1, 0, 0),
        (11, "A", "B", 997, 1, 4, 0),
    )  # fmt: skip
    info = import_dbn([write(tmp_path, records)], tmp_path / "c")
    _, events = events_of(info.root)
    assert brief(events) == [(10, "A", 1, 1, 0), (10, "A", 1, 2, 128), (11, "A", 1, 3, 128), (12, "T", 1, 0, 0), (12, "A", 1, 4, 128)]
    assert (info.closed, info.moved, info.moved_trades) == (3, 2, 1)


def test_rows_that_no_book_can_hold_are_left_out_and_counted(tmp_path):
    none = (1, "A", "B", 1000, 0, 1, 128), (2, "A", "N", 1000, 5, 2, 128), (3, "T", "B", 1000, 0, 0, 0)
    records = mbo(*none, (4, "A", "B", 1000, 5, 3, 128))
    info = import_dbn([write(tmp_path, records)], tmp_path / "c")
    assert (info.quality["zero_size"], info.quality["no_side"]) == (2, 1)
    assert brief(events_of(info.root)[1]) == [(4, "A", 5, 3, 128)]
    assert info.first["no_side"][:2] == (1, DAY + 2)


def test_a_midpoint_trade_is_written_on_the_tick_and_counted(tmp_path):
    records = mbo((1, "A", "B", 1000, 5, 1, 128), (2, "T", "B", 1000, 5, 0, 128))
    records["price"][1] += 5 * 10**6
    info = import_dbn([write(tmp_path, records)], tmp_path / "c")
    assert info.quality["trade_off_tick"] == 1 and info.first["trade_off_tick"][:2] == (1, DAY + 2)
    assert events_of(info.root)[1]["price"][1] == 1001 * 10**7


# --- several files, symbols, days -------------------------------------------------------------------------------------------------------


def test_two_days_and_two_symbols_become_one_catalog_whatever_the_order_of_the_files(tmp_path):
    symbols = {"AAA": 1, "BBB": 2}
    both = np.concatenate([SESSION, SESSION])
    both["instrument_id"][8:] = 2
    first = write(tmp_path, both[np.argsort(both["ts_recv"], kind="stable")], symbols, "day1")
    second = both.copy()
    second["ts_recv"] += 10**9
    second["instrument_id"] = 3 - second["instrument_id"]  # ids of another day
    second = write(tmp_path, second[np.argsort(second["ts_recv"], kind="stable")], {"AAA": 2, "BBB": 1}, "day2", start=DAY + 10**9)
    a = import_dbn([second, first], tmp_path / "a")
    b = import_dbn([tmp_path], tmp_path / "b")
    assert a.counts == b.counts == {"order_book_deltas": 24, "trades": 4}
    assert np.array_equal(events_of(a.root)[1], events_of(b.root)[1])
    (only,), events = events_of(import_dbn([first, second], tmp_path / "c", symbols=["BBB"]).root)
    assert only.id == "BBB.XNAS" and len(events) == 14
    instruments, everything = events_of(a.root)
    assert [i.id for i in instruments] == ["AAA.XNAS", "BBB.XNAS"]
    assert np.array_equal(everything[everything["instrument"] == 1]["ts_init"], events["ts_init"])


def test_files_that_overlap_in_time_are_refused(tmp_path):
    a, b = write(tmp_path, SESSION, name="a"), write(tmp_path, SESSION[2:], name="b")
    with pytest.raises(InputError, match=r"b\.mbo.*but the file before it ends.*overlap"):
        import_dbn([a, b], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def later(records, seconds):
    out = records.copy()
    for stamp in ("ts_recv", "ts_event"):
        out[stamp] += np.uint64(seconds * 10**9)
    return out


def test_files_of_every_version_become_one_catalog_in_order_of_their_events(tmp_path):
    """Neither their names, nor the order in which they are given, nor what their metadata says of their beginning matters."""
    files = [write(tmp_path, later(SESSION, v), name=f"n{9 - v}", version=v, start=DAY + (9 - v) * 10**9) for v in (1, 2, 3)]
    a, b = (import_dbn(f, tmp_path / name) for f, name in ((files, "a"), (files[::-1] + files[:1], "b")))
    assert a.counts == b.counts == {"order_book_deltas": 18, "trades": 3}
    events = events_of(a.root)[1]
    assert np.array_equal(events, events_of(b.root)[1]) and np.all(np.diff(events["ts_init"]) >= 0)


def test_a_copy_under_another_name_is_not_read_twice(tmp_path):
    a = write(tmp_path, SESSION, name="a")
    (tmp_path / "b.mbo.dbn.zst").write_bytes(a.read_bytes())
    with pytest.raises(InputError, match=r"b\.mbo.*overlap"):
        import_dbn([a, tmp_path / "b.mbo.dbn.zst"], tmp_path / "c")


def test_the_snapshot_of_a_further_day_takes_the_place_of_what_was_there(tmp_path):
    """Order 1 went while nobody recorded: it must not rest in the book for ever."""
    evening = mbo((10, "A", "B", 1000, 100, 1, 128), (20, "A", "A", 1002, 300, 2, 128))
    snapshot = mbo((0, "A", "A", 1002, 300, 2, 32), (0, "A", "B", 990, 7, 3, 32 | 128), (5, "A", "B", 991, 1, 4, 128))
    files = [write(tmp_path, evening, name="a"), write(tmp_path, later(snapshot, 86_400), name="b")]
    info = import_dbn(files, tmp_path / "c")
    events = events_of(info.root)[1]
    assert "".join(map(chr, events["action"])) == "AARAAA" and not info.quality["duplicate_add"]
    assert depth(events, 2)[-1]["bid_px"].tolist() == [991 * 10**7, 990 * 10**7]
    assert events["ts_init"][2] == events["ts_init"][3], "at the stamp of the snapshot"


def test_an_instrument_id_without_a_symbol_is_named_by_its_definition(tmp_path):
    file = write(tmp_path, SESSION)
    file.write_bytes(zstandard.compress(head({}) + SESSION.tobytes()))
    assert [i.id for i in import_dbn([file], tmp_path / "c").instruments] == ["AAA.XNAS"] == [i.id for i in read_dbn(file)[1]]


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_version_plain_or_zipped_gives_the_same_events(tmp_path, version, zipped):
    one = write(tmp_path / "one", SESSION, zipped=zipped, version=version)
    two = write(tmp_path / "two", SESSION)
    assert np.array_equal(read_dbn(one)[0], read_dbn(two)[0])


def test_a_range_is_kept_inclusively_and_an_empty_one_is_refused(tmp_path):
    file = write(tmp_path, SESSION)
    info = import_dbn([file], tmp_path / "c", start=DAY + 10, end=DAY + 20)
    assert brief(events_of(info.root)[1]) == [(10, "A", 100, 1, 128), (20, "A", 300, 2, 128)]
    for start, end, message in ((5, 4, "the range is empty"), (DAY + 11, DAY + 19, "no order or trade lies between")):
        with pytest.raises(InputError, match=message):
            import_dbn([file], tmp_path / "e", start=start, end=end)


def test_symbol_mappings_within_a_stream_name_its_instruments(tmp_path):
    define(tmp_path / "x.definition.dbn.zst", {"AAA": 1})
    mapping = bytearray(176)
    mapping[0:2], mapping[4:8] = (44, 0x16), (1).to_bytes(4, "little")
    mapping[17 : 17 + 3] = mapping[89 : 89 + 3] = b"AAA"
    live = d.Metadata("XNAS.ITCH", DAY, None, d.SType.INSTRUMENT_ID, None, version=3).encode()
    (tmp_path / "x.mbo.dbn.zst").write_bytes(zstandard.compress(live + bytes(mapping) + SESSION.tobytes()))
    assert [i.id for i in import_dbn([tmp_path / "x.mbo.dbn.zst"], tmp_path / "c").instruments] == ["AAA.XNAS"]


# --- found again, and never taken for whole ---------------------------------------------------------------------------------------------


def test_the_same_import_is_found_again_and_another_is_not_taken_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importer, "STORE", tmp_path / "store")
    file = write(tmp_path, SESSION)
    first, again = import_dbn([file]), import_dbn([file])
    assert (first.reused, again.reused) == (False, True)
    assert first.root == again.root and first.root.parent == tmp_path / "store" and first.root.name.startswith("x-")
    assert (again.counts, again.quality, again.instruments) == (first.counts, first.quality, first.instruments)
    assert import_dbn([file], start=DAY + 5).root != first.root
    write(tmp_path, SESSION[:-1])
    assert import_dbn([file]).root != first.root, "another content"
    define(tmp_path / "x.definition.dbn.zst", {"AAA": 1}, tick=5 * 10**6)
    assert not import_dbn([file]).reused, "another definition"


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    file = write(tmp_path, SESSION)
    out = tmp_path / "mine"
    out.mkdir()
    assert import_dbn([file], out).root == out, "an empty folder may be filled"
    with pytest.raises(InputError, match="holds another import"):
        import_dbn([file], out, end=DAY + 20)
    other = tmp_path / "diary"
    other.mkdir()
    (other / "note.txt").write_text("dear diary")
    with pytest.raises(InputError, match="holds something else"):
        import_dbn([file], other)
    assert [p.name for p in other.iterdir()] == ["note.txt"]


def run(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)


KILLED = """
import os, signal, sys
from catalog import databento, importer, writer
def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)
place = sys.argv[4]
if place == "rows": writer.Writer.flush = die
elif place == "rename": importer.Path.rename = lambda self, to: die() if ".partial-" in self.name else os.rename(self, to) or to
databento.import_dbn([sys.argv[1]], sys.argv[2], sys.argv[3])
"""


@pytest.mark.parametrize("place", ["rows", "rename"])
def test_an_import_that_is_killed_leaves_nothing_that_is_taken_for_whole(es, data, tmp_path, place):
    out = tmp_path / "store/c"
    done = run(KILLED, data / ES, out, EXAMPLE, place)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists() and len(list(out.parent.iterdir())) == 1, "the unfinished folder is beside it"
    info = import_dbn([data / ES], out, EXAMPLE)
    assert info.counts == es.counts and not info.reused
    assert [p.name for p in out.parent.iterdir()] == ["c"], "and goes with the next import"


FULL = """
import resource, sys
from catalog.databento import import_dbn
from catalog.errors import exit_code
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]),) * 2)
raise SystemExit(exit_code(lambda: import_dbn([sys.argv[1]], sys.argv[2], sys.argv[3])))
"""


def test_a_disk_that_is_full_is_said_in_one_line_and_leaves_nothing(es, data, tmp_path):
    out = tmp_path / "store/c"
    done = run(FULL, data / ES, out, EXAMPLE, 20_000)
    assert done.returncode == 2, done.stderr
    assert "the disk is full while writing" in done.stderr and "Traceback" not in done.stderr
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("place", ["Writer.flush", "_write_instruments", "json.dump", "os.fsync"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_whatever_write_fails_is_the_users_to_mend_and_leaves_nothing(tmp_path, monkeypatch, place, error):
    def fail(*_, **__):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(f"catalog.importer.{place}", fail)
    with pytest.raises(InputError, match="disk is full" if error != errno.EACCES else "change its rights"):
        import_dbn([write(tmp_path, SESSION)], tmp_path / "store/c")
    assert list((tmp_path / "store").iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(importer, "_write_instruments", interrupt)
    file = write(tmp_path, SESSION)
    with pytest.raises(KeyboardInterrupt):
        import_dbn([file], tmp_path / "store/c")
    assert list((tmp_path / "store").iterdir()) == []


# --- bad input ------------------------------------------------------------------------------------------------------------------------


def test_a_missing_definition_is_answered_with_the_toml_to_write(data, tmp_path):
    with pytest.raises(InputError, match="no definition of ESH4") as caught:
        import_dbn([data / ES], tmp_path / "c")
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    (table,) = tomllib.loads(lines[1])["instrument"]
    assert (table["symbol"], table["venue"], table["kind"], table["tick"]) == ("ESH4", "GLBX", "future", "0.25")
    (tmp_path / "i.toml").write_text(lines[1])
    assert import_dbn([data / ES], tmp_path / "c", tmp_path / "i.toml").counts["trades"] == 2_973


def test_a_wrong_tick_is_refused_with_record_price_and_tick(data, tmp_path):
    (tmp_path / "i.toml").write_text(EXAMPLE.read_text().replace('"0.25"', '"0.5"'))
    with pytest.raises(InputError, match=r"record 4 \(.*the price 4798\.75 of ESH4\.GLBX is no multiple of its tick 0\.5"):
        import_dbn([data / ES], tmp_path / "c", tmp_path / "i.toml")
    assert not list(tmp_path.glob(".c*"))


def test_unknown_symbols_are_refused_with_those_that_are_there(tmp_path):
    with pytest.raises(InputError, match="no file holds NOPE; they hold AAA"):
        import_dbn([write(tmp_path, SESSION)], tmp_path / "c", symbols=["AAA", "NOPE"])


def test_files_that_are_no_mbo_are_refused_in_one_line(data, tmp_path):
    csv, empty = tmp_path / "csv.dbn", tmp_path / "empty.dbn.zst"
    csv.write_text("a,b,c\n")
    empty.write_bytes(b"")
    zipped = tmp_path / "z.dbn.zst"
    zipped.write_bytes(zstandard.compress(b"a,b,c\n" * 10))
    cut = tmp_path / "cut.dbn.zst"
    cut.write_bytes((data / ES).read_bytes()[:500_000])
    header = tmp_path / "header.dbn"
    header.write_bytes(head({"AAA": 1}))
    new = tmp_path / "new.dbn"
    new.write_bytes(b"DBN\x09" + head({"AAA": 1})[4:])
    within = tmp_path / "within.dbn"
    flat = SESSION.copy()
    flat["price"] = 10**12
    within.write_bytes(head({"ESH4": 1}) + flat.tobytes()[:-3])
    folder = tmp_path / "folder"
    folder.mkdir()
    for path, message in (
        (tmp_path / "no.dbn", "cannot read .*no such file"),
        (csv, "is no DBN file"),
        (zipped, "holds no DBN"),
        (empty, "is empty"),
        (cut, "is cut short: its zstd frame"),
        (header, "holds no records"),
        (new, "DBN version 9"),
        (within, "cut short within record 7"),
        (folder, r"holds no \*\.dbn"),
        (data / "databento/esm4-glbx-mdp3-20240508.definition.dbn.zst", "holds definition records and no market data"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            import_dbn([path], tmp_path / "c", EXAMPLE)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "c").exists() and not list(tmp_path.glob(".c*"))


def test_definitions_of_every_class_are_read_or_passed_over(data):
    from catalog.dbn import read_definitions

    found = {f.name: read_definitions(f) for f in sorted((data / "databento").rglob("*definition*"))}
    assert {d_.symbol: (d_.instrument.kind, d_.instrument.tick) for ds in found.values() for d_ in ds} == {
        "ESM4": ("future", 250_000_000), "ESU4": ("future", 250_000_000), "NQU4": ("future", 250_000_000), "ESU6": ("future", 250_000_000),
        "MSFT": ("equity", 10_000_000),
    }  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_damaged_file_is_refused_or_read_never_worse(tmp_path_factory, data):
    """Truncations and flipped bits: an InputError that names the file, or events. Within zstd with a checksum, only the right ones."""
    folder = tmp_path_factory.mktemp("damaged")
    content = head({"AAA": 1}) + SESSION.tobytes()
    zipped = data.draw(st.booleans())
    whole = zstandard.ZstdCompressor(write_checksum=True).compress(content) if zipped else content
    damaged = bytearray(whole)
    if data.draw(st.booleans()):
        damaged = damaged[: data.draw(st.integers(0, len(damaged) - 1))]
    else:
        for at in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=3)):
            damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    file = folder / "x.mbo.dbn"
    file.write_bytes(whole)
    expected, _ = read_dbn(file)
    file.write_bytes(damaged)
    try:
        events, _ = read_dbn(file)
    except InputError as e:
        assert str(file) in str(e)  # noqa: PT017
    else:
        assert events.dtype == EVENT
        if zipped:
            assert np.array_equal(events, expected)


# --- memory ---------------------------------------------------------------------------------------------------------------------------

PEAK = """
import sys
import numpy as np
from catalog.databento import import_dbn
from catalog.events import read_catalog
info = import_dbn([sys.argv[1]], sys.argv[2])
n = sum(len(b) for b in read_catalog(sys.argv[2])[1])
print(n, next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def flow(n):
    """n records of one instrument: orders come and go, about 600 live."""
    i = np.arange(n)
    out = np.zeros(n, MBO)
    out["length"], out["rtype"], out["publisher_id"], out["instrument_id"] = 14, 0xA0, 2, 1
    out["ts_event"] = out["ts_recv"] = DAY + i * 1000
    adds = i % 2 == 0
    order = np.where(adds, i // 2, np.maximum(i // 2 - 300, 0)) + 1
    out["order_id"], out["side"] = order, np.where(order % 2, ord("B"), ord("A"))
    out["price"] = (10_000 + np.where(order % 2, -1, 1) * (1 + order * 7919 % 50)) * 10**7
    out["size"], out["flags"], out["sequence"] = 100, F_LAST, i
    out["action"] = np.where(adds, ADD, CANCEL)
    return out


@pytest.mark.slow
def test_ten_times_the_data_take_the_same_memory(tmp_path):
    peak = {}
    for n in (150_000, 1_500_000):
        file = write(tmp_path / str(n), flow(n))
        done = run(PEAK, file, tmp_path / str(n) / "c")
        assert done.returncode == 0, done.stderr
        read, peak[n] = map(int, done.stdout.split())
        assert read == n
    assert peak[1_500_000] < 1.2 * peak[150_000], peak


SLOW = """
import sys, time
from catalog import importer, quality
from catalog.databento import import_dbn
from catalog.errors import exit_code
update = quality.Checker.update
def slow(self, *a, **k):
    update(self, *a, **k)
    print("reading", flush=True)
    time.sleep(60)
quality.Checker.update = slow
raise SystemExit(exit_code(lambda: import_dbn([sys.argv[1]], sys.argv[2], sys.argv[3])))
"""


def test_ctrl_c_within_an_import_ends_with_130_and_leaves_nothing(data, tmp_path):
    """A real SIGINT to a real process, in the middle of its work."""
    out = tmp_path / "store/c"
    arguments = [sys.executable, "-c", SLOW, str(data / ES), str(out), str(EXAMPLE)]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert list(out.parent.iterdir()) == []


def test_an_unknown_symbol_is_noticed_before_anything_is_read(tmp_path, monkeypatch):
    file = write(tmp_path, SESSION)
    monkeypatch.setattr(importer._Import, "read", lambda *_: pytest.fail("read"))
    with pytest.raises(InputError, match="no file holds NOPE; they hold AAA"):
        import_dbn([file], tmp_path / "c", symbols=["NOPE"])


def test_everything_is_on_the_disk_before_the_catalog_gets_its_name(tmp_path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(importer.os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")) or real(handle))
    root = import_dbn([write(tmp_path, SESSION)], tmp_path / "c").root
    names = {Path(p).name for p in synced if ".c.partial-" in p}
    assert {p.name for p in root.rglob("*")} <= names
