"""Level, quote and trade schemas of Databento: what a record says is what the book holds, and what an import gives back."""

from __future__ import annotations

from pathlib import Path

import databento_dbn as d
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from test_databento import DAY, define, events_of, head

from catalog import book
from catalog.databento import import_dbn
from catalog.errors import InputError
from catalog.events import ADD, CANCEL, CLEAR, F_LAST, F_MBP, F_SNAPSHOT, F_TOB, MODIFY, TRADE, read_dbn
from catalog.levels import HEAD, LAYOUTS

NONE = 2**63 - 1
ESU4 = "databento/esu4-glbx-mdp3-20240701.mbp-1.dbn.zst"
PAIR = np.dtype([("bid", "<i8"), ("ask", "<i8"), ("bid_size", "<u4"), ("ask_size", "<u4"), ("counts", "<u4", (2,))])


def record(schema, n, ts, action, side, cents, size, bids=(), asks=(), flags=F_LAST, number=1):
    """One record: `bids`, `asks` are (cents, size) from the best on; ts is after DAY."""
    layout = LAYOUTS[schema]
    h = np.zeros(1, HEAD)
    h[0] = (layout.size // 4, layout.rtype, 2, number, DAY + ts, cents * 10**7, size, ord(action) if action else 0, ord(side), flags, 0,
            DAY + ts, 0, n + 1)  # fmt: skip
    pairs = np.zeros(layout.levels, PAIR)
    pairs["bid"] = pairs["ask"] = NONE
    for side_, levels in (("bid", bids), ("ask", asks)):
        for j, (price, amount) in enumerate(levels[: layout.levels]):
            pairs[side_][j], pairs[f"{side_}_size"][j] = price * 10**7, amount
    return h.tobytes() + pairs.tobytes()


def write(folder, schema, records, version=3, zipped=True, symbols=None):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"x.{schema}.dbn{'.zst' if zipped else ''}"
    content = head(symbols or {"AAA": 1}, d.Schema.from_str(schema), version=version) + b"".join(records)
    path.write_bytes(zstandard.compress(content) if zipped else content)
    define(folder / path.name.replace(f".{schema}.", ".definition."), symbols or {"AAA": 1})
    return path


def brief(events):
    """(ts, action, side, cents, size, flags) of each row."""
    return [
        (int(e["ts_init"]) - DAY, chr(e["action"]), int(e["side"]), int(e["price"]) // 10**7, int(e["size"]) // 10**9, int(e["flags"]))
        for e in events
    ]


def as_stored(events):
    """What of published rows a catalog carries: no sequence of trades and quotes, of their flags ours alone."""
    out = events.copy()
    plain = (out["action"] == TRADE) | (out["flags"] & F_TOB > 0)
    out["sequence"][plain] = 0
    out["flags"][plain] &= F_TOB | F_LAST
    out["flags"][out["action"] == TRADE] = 0
    return out


# --- real files -------------------------------------------------------------------------------------------------------------------------

READ = {
    "bbo-1m": "A" * 8, "bbo-1s": "A" * 8, "cbbo-1s": "AAAA", "cmbp-1": "AAAA", "mbo": "CC", "mbp-1": "AAAA", "mbp-10": "R" + "A" * 20 + "M",
    "tbbo": "AATAAT", "trades": "TT",
}  # fmt: skip
REFUSED = (
    "definition.equity", "definition.futures_contract", "definition.futures_spread", "definition.option", "definition.option_spread",
    "imbalance", "ohlcv-1d", "ohlcv-1h", "ohlcv-1m", "ohlcv-1s", "statistics", "status",
)  # fmt: skip


def test_each_schema_file_is_told_about_below(data):
    assert {f.name for f in (data / "databento/schemas").iterdir()} == {f"test_data.{s}.dbn.zst" for s in (*READ, *REFUSED)}


@pytest.mark.parametrize("schema", READ)
def test_a_schema_is_read(data, schema):
    events, (es,) = read_dbn(data / f"databento/schemas/test_data.{schema}.dbn.zst")
    assert "".join(map(chr, events["action"])) == READ[schema]
    assert (es.id, es.level) == ("ESH1.GLBX", {"mbo": 3, "mbp-10": 2}.get(schema, 1))
    assert np.all(np.diff(events["ts_init"]) >= 0)


@pytest.mark.parametrize("schema", REFUSED)
def test_a_schema_without_events_is_refused_in_one_line(data, tmp_path, schema):
    file = data / f"databento/schemas/test_data.{schema}.dbn.zst"
    for go in (read_dbn, lambda f: import_dbn([f], tmp_path / "c")):
        with pytest.raises(InputError, match=schema.split(".")[0]) as caught:
            go(file)
        assert str(file) in str(caught.value) and "mbp-1" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "c").exists()


@pytest.fixture(scope="module")
def esu4(data, tmp_path_factory):
    return import_dbn([data / ESU4], tmp_path_factory.mktemp("esu4") / "c")


def test_the_quotes_of_the_file_are_those_of_the_exchanges_own_reader(data):
    import databento

    raw = databento.DBNStore.from_file(data / ESU4).to_ndarray()
    assert len(raw) == 2_288
    events, (es,) = read_dbn(data / ESU4)
    assert (es.id, es.multiplier, es.level) == ("ESU4.GLBX", 50.0, 1)
    assert int((events["action"] == TRADE).sum()) == 120 == int((raw["action"] == b"T").sum())
    quotes = events[events["action"] != TRADE]
    pairs = np.stack([quotes["price"][::2], quotes["price"][1::2], quotes["size"][::2] // 10**9, quotes["size"][1::2] // 10**9], 1)
    told = np.stack([raw[f"{c}_00"].astype(np.int64) for c in ("bid_px", "ask_px", "bid_sz", "ask_sz")], 1)
    changed = np.append(True, np.any(np.diff(told, axis=0) != 0, axis=1))
    assert np.array_equal(pairs, told[changed])
    assert np.array_equal(quotes["ts_event"][::2], raw["ts_event"][changed].astype(np.int64))


def test_the_level_1_file_is_imported_as_quotes_and_trades_and_read_back(data, esu4):
    assert esu4.counts == {"order_book_deltas": 0, "trades": 120, "quotes": 2_168}
    assert not any(esu4.quality.values())
    events, table = read_dbn(data / ESU4)
    instruments, stored = events_of(esu4.root)
    assert instruments == table == list(esu4.instruments) and instruments[0].level == 1
    assert np.array_equal(stored, as_stored(events))


def test_nautilus_reads_the_quotes_that_were_imported(esu4):
    from nautilus_trader.persistence import ParquetDataCatalog

    quotes = ParquetDataCatalog(str(esu4.root)).query_quote_ticks(["ESU4.GLBX"])
    _, events = events_of(esu4.root)
    ours = events[events["action"] != TRADE]
    assert [(q.ts_init, round(q.bid_price.as_double() * 1e9), round(q.ask_size.as_double() * 1e9)) for q in quotes] == [
        (int(b["ts_init"]), int(b["price"]), int(a["size"])) for b, a in zip(ours[::2], ours[1::2])
    ]


# --- mbp-10 -------------------------------------------------------------------------------------------------------------------------------

L, S = F_MBP, F_MBP | F_SNAPSHOT


def test_levels_become_the_updates_by_which_they_differ(tmp_path):
    ten = [(1000 - k, 5) for k in range(10)]
    pushed = [(1001, 7), *ten[:9]]
    records = [
        record("mbp-10", 0, 0, "A", "B", 1000, 5, ten, [(1002, 3)]),
        record("mbp-10", 1, 10, "A", "B", 1001, 7, pushed, [(1002, 3)]),
        record("mbp-10", 2, 20, "T", "B", 1002, 1, pushed, [(1002, 3)], flags=0),
        record("mbp-10", 3, 20, "C", "A", 1002, 1, pushed, [(1002, 2)]),
        record("mbp-10", 4, 30, "C", "B", 1001, 7, ten, [(1002, 2)]),
        record("mbp-10", 5, 40, "R", "N", 0, 0),
    ]
    info = import_dbn([write(tmp_path, "mbp-10", records)], tmp_path / "c")
    (aaa,), events = events_of(info.root)
    assert aaa.level == 2
    rows = brief(events)
    assert rows[:2] == [(0, "R", 0, 0, 0, F_SNAPSHOT), (0, "A", 1, 1000, 5, S)] and rows[11] == (0, "A", -1, 1002, 3, S | F_LAST)
    assert rows[12:] == [
        (10, "C", 1, 991, 0, L),  # pushed out of the ten
        (10, "A", 1, 1001, 7, L | F_LAST),
        (20, "T", 1, 1002, 1, 0),
        (20, "M", -1, 1002, 2, L | F_LAST),
        (30, "C", 1, 1001, 0, L),
        (30, "A", 1, 991, 5, L | F_LAST),  # back
        (40, "R", 0, 0, 0, F_LAST),
    ]
    published, _ = read_dbn(tmp_path / "x.mbp-10.dbn.zst")
    assert np.array_equal(as_stored(published), events)


side_of = st.lists(st.integers(1, 30), max_size=10, unique=True)
tops = st.lists(st.tuples(side_of, side_of, st.integers(1, 4), st.sampled_from("ACMTR")), min_size=1, max_size=25)


@given(tops)
def test_after_each_record_the_book_holds_the_ten_levels_that_it_tells(tmp_path_factory, market):
    """Whatever ten levels follow each other: the book of our own, fed with the rows, has them after each record, and never another."""
    folder, records, expected = tmp_path_factory.mktemp("m"), [], []
    for n, (bids, asks, size, action) in enumerate(market):
        b = [] if action == "R" else [(1000 - p, size + p % 3) for p in sorted(bids)]
        a = [] if action == "R" else [(1000 + p, size + p % 2) for p in sorted(asks)]
        records.append(record("mbp-10", n, n, action, "B", 1000, 1, b, a))
        expected.append((b, a))
    events, _ = read_dbn(write(folder, "mbp-10", records))
    after = book.depth(events, 10)
    for n, (bids, asks) in enumerate(expected):
        mine = np.flatnonzero(events["sequence"] == n + 1)
        at = mine[-1] if len(mine) else at  # noqa: F821  # a record that changes nothing gives no row
        row = after[at]
        for side, levels in (("bid", bids), ("ask", asks)):
            held = [(int(p) // 10**7, int(s) // 10**9) for p, s in zip(row[f"{side}_px"], row[f"{side}_sz"]) if s]
            assert held == levels
    assert set(np.unique(events["action"])) <= {ADD, CANCEL, MODIFY, CLEAR, TRADE}


def test_no_row_crosses_a_book_that_the_records_do_not_cross(tmp_path):
    records = [
        record("mbp-10", 0, 0, "A", "B", 1000, 5, [(1000, 5), (999, 5)], [(1001, 5), (1002, 5)]),
        record("mbp-10", 1, 1, "M", "B", 1005, 5, [(1005, 5), (1003, 1)], [(1006, 5)]),
        record("mbp-10", 2, 2, "M", "A", 990, 5, [(989, 5)], [(990, 5), (1000, 4)]),
    ]
    events, _ = read_dbn(write(tmp_path, "mbp-10", records))
    after = book.depth(events, 1)
    two = (after["bid_sz"][:, 0] > 0) & (after["ask_sz"][:, 0] > 0)
    assert two.sum() >= 5 and np.all(after["bid_px"][two, 0] < after["ask_px"][two, 0])


# --- quotes and trades --------------------------------------------------------------------------------------------------------------------

Q, E = F_TOB, F_TOB | F_LAST


@pytest.mark.parametrize("schema", ["mbp-1", "cmbp-1"])
def test_a_quote_is_told_where_it_changed_and_a_trade_before_what_it_does(tmp_path, schema):
    records = [
        record(schema, 0, 0, "A", "B", 1000, 5, [(1000, 5)], [(1002, 3)]),
        record(schema, 1, 10, "T", "B", 1002, 2, [(1000, 5)], [(1002, 3)]),
        record(schema, 2, 10, "C", "A", 1002, 2, [(1000, 5)], [(1002, 1)]),
        record(schema, 3, 20, "C", "A", 1002, 1, [(1000, 5)], []),
        record(schema, 4, 30, "A", "A", 1003, 4, [(1000, 5)], [(1003, 4)]),
    ]
    file = write(tmp_path, schema, records)
    info = import_dbn([file], tmp_path / "c")
    events = events_of(info.root)[1]
    assert info.counts == {"order_book_deltas": 0, "trades": 1, "quotes": 4}
    assert brief(events) == [
        (0, "A", 1, 1000, 5, Q), (0, "A", -1, 1002, 3, E), (10, "T", 1, 1002, 2, 0), (10, "A", 1, 1000, 5, Q), (10, "A", -1, 1002, 1, E),
        (20, "A", 1, 1000, 5, Q), (20, "C", -1, 1002, 0, E), (30, "A", 1, 1000, 5, Q), (30, "A", -1, 1003, 4, E),
    ]  # fmt: skip
    assert np.array_equal(as_stored(read_dbn(file)[0]), events)


@pytest.mark.parametrize("schema", ["tbbo", "tcbbo"])
def test_the_quote_before_a_trade_comes_before_it(tmp_path, schema):
    records = [record(schema, n, n, "T", "A", 1000, 1, [(1000, 5 - n)], [(1002, 3)]) for n in range(3)]
    file = write(tmp_path, schema, records)
    events = events_of(import_dbn([file], tmp_path / "c").root)[1]
    assert "".join(map(chr, events["action"])) == "AATAATAAT"
    assert np.all(events["ts_init"][2::3] == events["ts_event"][2::3] + 1), "one nanosecond after their quote"
    assert np.array_equal(as_stored(read_dbn(file)[0]), events)


@pytest.mark.parametrize("schema", ["bbo-1s", "bbo-1m", "cbbo-1s", "cbbo-1m"])
def test_sampled_quotes_are_stamped_when_they_were_known_and_tell_no_trades(tmp_path, schema):
    records = [bytearray(record(schema, n, 10 * n, "", "N", 1000, 1, [(1000, 5 + n)], [(1002, 3)])) for n in range(2)]
    for r in records:
        r[8:16] = (2**64 - 1).to_bytes(8, "little")  # no trade yet
    info = import_dbn([write(tmp_path, schema, records)], tmp_path / "c")
    assert info.counts == {"order_book_deltas": 0, "trades": 0, "quotes": 2}
    assert list(events_of(info.root)[1]["ts_event"] - DAY) == [0, 0, 10, 10]


def test_trades_alone_are_a_catalog_of_trades(tmp_path):
    info = import_dbn([write(tmp_path, "trades", [record("trades", n, n, "T", "BAN"[n], 1000, 2) for n in range(3)])], tmp_path / "c")
    assert info.counts == {"order_book_deltas": 0, "trades": 3}
    assert [b[:5] for b in brief(events_of(info.root)[1])] == [(0, "T", 1, 1000, 2), (1, "T", -1, 1000, 2), (2, "T", 0, 1000, 2)]


@pytest.mark.parametrize("schema", ["mbp-10", "mbp-1", "trades"])
@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_version_plain_or_zipped_gives_the_same_events(tmp_path, schema, version, zipped):
    records = [record(schema, n, n, "T", "A", 1000, 1, [(1000, 5 - n)], [(1002, 3)]) for n in range(3)]
    one = write(tmp_path / "one", schema, records, version, zipped)
    assert np.array_equal(read_dbn(one)[0], read_dbn(write(tmp_path / "two", schema, records))[0])


def test_a_recording_without_a_schema_is_of_its_first_record(tmp_path):
    live = d.Metadata("XNAS.ITCH", DAY, None, d.SType.INSTRUMENT_ID, None, version=3).encode()
    mapping = bytearray(176)
    mapping[0:2], mapping[4:8], mapping[89:92] = (44, 0x16), (1).to_bytes(4, "little"), b"AAA"
    path = tmp_path / "x.dbn"
    path.write_bytes(live + bytes(mapping) + record("mbp-10", 0, 0, "A", "B", 1000, 5, [(1000, 5)], [(1002, 3)]))
    events, (aaa,) = read_dbn(path)
    assert (aaa.id, aaa.level, "".join(map(chr, events["action"]))) == ("AAA.XNAS", 2, "RAA")


# --- several files ------------------------------------------------------------------------------------------------------------------------


def test_two_symbols_keep_levels_of_their_own(tmp_path):
    records = [record("mbp-1", n, n, "A", "B", 1000, 1, [(1000 + n % 2, 5)], [(1003, 3)], number=1 + n % 2) for n in range(6)]
    info = import_dbn([write(tmp_path, "mbp-1", records, symbols={"AAA": 1, "BBB": 2})], tmp_path / "c")
    assert info.counts["quotes"] == 2, "nothing changes after the first of each"


def test_files_of_two_schemas_are_refused_and_name_themselves(tmp_path):
    a = write(tmp_path, "trades", [record("trades", 0, 0, "T", "B", 1000, 1)])
    b = write(tmp_path, "mbp-1", [record("mbp-1", 0, 0, "A", "B", 1000, 5, [(1000, 5)], [(1002, 3)])])
    with pytest.raises(InputError, match=r"several schemas.*x\.mbp-1.*x\.trades"):
        import_dbn([a, b], tmp_path / "c")


def test_what_a_folder_holds_besides_is_passed_over_by_name(data, tmp_path, capsys):
    write(tmp_path / "in", "mbp-1", [record("mbp-1", 0, 0, "A", "B", 1000, 5, [(1000, 5)], [(1002, 3)])])
    other = tmp_path / "in/y.ohlcv-1s.dbn.zst"
    other.write_bytes((data / "databento/schemas/test_data.ohlcv-1s.dbn.zst").read_bytes())
    assert import_dbn([tmp_path / "in"], tmp_path / "c").counts["quotes"] == 1
    assert f"{other} holds ohlcv-1s, which is not read: passed over" in capsys.readouterr().err


@pytest.mark.parametrize(("at", "value", "message"), [(28, 0x5A, "no known action"), (29, 0x5A, "no known side"), (39, 0xF0, "no time")])
def test_a_damaged_record_is_told_by_number(tmp_path, at, value, message):
    records = [bytearray(record("mbp-1", n, n, "A", "B", 1000, 5, [(1000 + n, 5)], [(1009, 3)])) for n in range(3)]
    records[2][at] = value
    file = write(tmp_path, "mbp-1", records)
    with pytest.raises(InputError, match=f"damaged at record 2: it has {message}") as caught:
        import_dbn([file], tmp_path / "c")
    assert str(Path(file)) in str(caught.value)
