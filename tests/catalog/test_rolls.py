"""Many days and contracts: the roll follows the volume of the day before, and status records tell when a market trades."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import databento_dbn as d
import numpy as np
import pytest
import zstandard
from test_databento import events_of, mbo

from catalog import rolls, status
from catalog.databento import import_dbn
from catalog.errors import InputError
from catalog.events import read_catalog, read_dbn, session_bounds, trading_state
from catalog.status import AUCTION, CLOSED, HALTED, OPEN, STATUS, UNKNOWN, read_status

NS, HOUR = 10**9, 3_600 * 10**9
SESSION = "17:00-16:00 America/Chicago"
DAYS = [int(np.datetime64(f"2024-03-{day}T15:00", "ns").astype(np.int64)) for day in (11, 12, 13, 14)]
CONTRACTS = {"ESH4": (11, "2024-03-15"), "ESM4": (12, "2024-06-21")}


def meta(schema, start, symbols=CONTRACTS, stype=d.SType.RAW_SYMBOL):
    days = dt.date(2024, 3, 1), dt.date(2024, 4, 1)
    maps = [
        SimpleNamespace(raw_symbol=s, intervals=[SimpleNamespace(start_date=days[0], end_date=days[1], symbol=str(n))])
        for s, (n, _) in symbols.items()
    ]
    return d.Metadata(
        "GLBX.MDP3", start, stype, d.SType.INSTRUMENT_ID, schema, symbols=list(symbols), mappings=maps, version=3
    ).encode()  # fmt: skip


def define(path):
    made = []
    for symbol, (number, day) in CONTRACTS.items():
        expiry = int(np.datetime64(day, "ns").astype(np.int64))
        made.append(
            d.InstrumentDefMsg(1, number, DAYS[0], DAYS[0], 25 * 10**7, 10**9, symbol, "ES", "", d.InstrumentClass.FUTURE,
                               d.SecurityUpdateAction.ADD, exchange="XCME", currency="USD", expiration=expiry,
                               unit_of_measure_qty=50 * 10**9)
        )  # fmt: skip
    path.write_bytes(zstandard.compress(meta(d.Schema.DEFINITION, DAYS[0]) + b"".join(map(bytes, made))))


def session(folder, k, volumes):
    """One session of both contracts: a book, and trades of these volumes."""
    rows, at = [], DAYS[k]
    for (number, _), volume in zip(CONTRACTS.values(), volumes):
        order = 10 * number + k * 1000
        rows += [(0, "A", "B", 500_000, 5, order, 128, number), (1, "A", "A", 500_025, 5, order + 1, 128, number)]
        rows += [(2 + n, "T", "B", 500_025, 1, 0, 0, number) for n in range(volume)]
    records = mbo(*sorted(rows, key=lambda r: r[0]))
    base = records["ts_recv"].min()
    for field in ("ts_recv", "ts_event"):
        records[field] += np.uint64(at - int(base))
    path = folder / f"day{k}.mbo.dbn.zst"
    path.write_bytes(zstandard.compress(meta(d.Schema.MBO, at) + records.tobytes()))
    return path


def states(path, *items):
    """A status file of (ns, instrument id, action[, is_trading])."""
    out = np.zeros(len(items), STATUS)
    for n, (ts, number, action, *trading) in enumerate(items):
        head = bytes([STATUS.itemsize // 4, 0x12, 1, 0])
        out[n] = (head, number, ts - 5, ts, action, 1, 0, trading[0] if trading else "~", "~", "~", b"")
    path.write_bytes(zstandard.compress(meta(d.Schema.STATUS, items[0][0]) + out.tobytes()))
    return path


@pytest.fixture(scope="module")
def season(tmp_path_factory):
    """Four sessions: the June contract trades more from the second on."""
    folder = tmp_path_factory.mktemp("season")
    define(folder / "es.definition.dbn.zst")
    for k, volumes in enumerate([(9, 3), (4, 6), (2, 9), (8, 1)]):
        session(folder, k, volumes)
    opens = session_bounds(SESSION, DAYS[1])[0]
    noon = DAYS[1]
    states(folder / "es.status.dbn.zst", (opens - HOUR, 11, 1), (opens, 11, 7), (opens, 12, 7), (noon, 11, 8), (noon + 60 * NS, 11, 1),
           (noon + 90 * NS, 11, 14), (noon + 120 * NS, 11, 7), (noon + 5 * HOUR, 11, 12))  # fmt: skip
    return import_dbn([folder], folder / "c")


def test_the_contract_rolls_the_session_after_its_successor_traded_more_and_never_back(season):
    opens = [session_bounds(SESSION, t)[0] for t in DAYS]
    expected = [{"underlying": "ES", "from": "ESH4.GLBX", "to": "ESM4.GLBX", "ts": opens[2]}]
    assert rolls.schedule(season.root) == expected
    assert json.loads((season.root / "cift.json").read_text())["rolls"] == expected
    assert [i.id for i in season.instruments] == ["ESH4.GLBX", "ESM4.GLBX"], "the contracts stay apart"
    fronts = [rolls.front(season.root, "ES", t) for t in DAYS]
    assert fronts == ["ESH4.GLBX", "ESH4.GLBX", "ESM4.GLBX", "ESM4.GLBX"]
    with pytest.raises(InputError, match="no futures of NQ"):
        rolls.front(season.root, "NQ", DAYS[0])


def test_a_roll_knows_nothing_of_the_session_that_it_begins(tmp_path):
    """What trades on the day itself and after moves no roll of that day: the schedule of a prefix is the prefix of the schedule."""
    define(tmp_path / "es.definition.dbn.zst")
    volumes = [(9, 3), (4, 6), (9, 1), (1, 9)]
    files = [session(tmp_path, k, v) for k, v in enumerate(volumes)]
    whole = rolls.schedule(import_dbn([tmp_path / "es.definition.dbn.zst", *files], tmp_path / "all").root)
    for n in range(1, 4):
        some = rolls.schedule(import_dbn([tmp_path / "es.definition.dbn.zst", *files[:n]], tmp_path / f"c{n}").root)
        assert some == [r for r in whole if r["ts"] <= DAYS[n - 1]]


def test_a_catalog_made_elsewhere_rolls_the_same_way(season, tmp_path):
    """Without the importer's note, as Nautilus writes catalogs; its files may come later."""
    shutil.copytree(season.root / "data", tmp_path / "c" / "data")
    june = tmp_path / "c" / "data" / "trades" / "ESM4.GLBX"
    june.rename(tmp_path / "later")
    assert rolls.rolls(tmp_path / "c") == []
    (tmp_path / "later").rename(june)
    assert rolls.rolls(tmp_path / "c") == rolls.rolls(season.root) != []
    assert [i.pauses for i in read_catalog(tmp_path / "c")[0]] == [i.pauses for i in read_catalog(season.root)[0]]


def test_a_contract_is_behind_while_another_of_those_asked_for_is_the_one_to_trade(season, tmp_path):
    roll, march, june = rolls.rolls(season.root)[0]["ts"], "ESH4.GLBX", "ESM4.GLBX"
    assert rolls.behind(season.root, [march, june]) == {june: ((-(2**63), roll),), march: ((roll, 2**63 - 1),)}
    assert rolls.behind(season.root, [june]) == rolls.behind(season.root, []) == {}
    define(tmp_path / "es.definition.dbn.zst")
    calm = import_dbn([tmp_path / "es.definition.dbn.zst", session(tmp_path, 0, (9, 3))], tmp_path / "c").root
    assert rolls.behind(calm, [march, june]) == {june: ((-(2**63), 2**63 - 1),)}, "no roll yet: the nearest to expire"


def test_one_contract_alone_never_rolls(tmp_path):
    define(tmp_path / "es.definition.dbn.zst")
    file = session(tmp_path, 0, (3, 2))
    info = import_dbn([tmp_path / "es.definition.dbn.zst", file], tmp_path / "c", symbols=["ESM4"])
    assert rolls.schedule(info.root) == [] and rolls.front(info.root, "ES", DAYS[0]) == "ESM4.GLBX"


def test_the_state_of_a_market_is_a_step_function_of_time(season):
    steps = trading_state(season.root, "ESH4.GLBX")
    opens = session_bounds(SESSION, DAYS[1])[0]
    assert list(steps[1]) == [AUCTION, OPEN, HALTED, AUCTION, OPEN, CLOSED], "a short sale restriction changes no state"
    times = np.array([opens - 2 * HOUR, opens - HOUR, opens, DAYS[1] - 1, DAYS[1], DAYS[1] + 100 * NS, DAYS[1] + 120 * NS, DAYS[3]])
    assert list(status.at(steps, times)) == [UNKNOWN, AUCTION, OPEN, OPEN, HALTED, AUCTION, OPEN, CLOSED]
    assert list(trading_state(season.root, "ESM4.GLBX")[1]) == [OPEN]


def test_an_instrument_knows_when_no_label_may_run(season):
    """Its auctions, halts (a halt that becomes an auction is one pause) and closes, the roll away from it, and its expiry."""
    opens, noon, never = [session_bounds(SESSION, t)[0] for t in DAYS], DAYS[1], 2**63 - 1
    expiry = int(np.datetime64("2024-03-15", "ns").astype(np.int64))
    march, june = read_catalog(season.root)[0]
    assert march.pauses == (
        (opens[1] - HOUR, opens[1]), (noon, noon + 120 * NS), (noon + 5 * HOUR, never), (opens[2], opens[2]), (expiry, expiry)
    )  # fmt: skip
    assert june.pauses[0] == (opens[2], opens[2]) and len(june.pauses) == 2
    assert march == replace(march, pauses=()), "what is to come is no part of what an instrument is"
    (season.root / "cift.json").rename(season.root / "aside.json")
    (season.root / "cift.json").write_text('{"rolls": [{"ts": "soon"}]}')
    with pytest.raises(InputError, match=r"cift\.json is damaged"):
        read_catalog(season.root)
    (season.root / "aside.json").rename(season.root / "cift.json")


def test_a_close_to_come_is_known_as_the_calendar_is(season):
    steps, close = trading_state(season.root, "ESH4.GLBX"), DAYS[1] + 5 * HOUR
    assert [status.close_after(steps, t) for t in (0, DAYS[1], close - 1, close)] == [close, close, close, 2**63 - 1]


def test_a_market_without_status_records_is_of_unknown_state(data):
    steps = trading_state(data / "catalogs/binance-2024-08-08", "BTCUSDT.BINANCE")
    assert not len(steps[0]) and status.at(steps, np.array([0, 2**62])).tolist() == [UNKNOWN, UNKNOWN]


def test_of_the_states_before_a_range_the_last_is_kept(season, tmp_path):
    folder = season.root.parent
    info = import_dbn([folder], tmp_path / "c", start=DAYS[1], end=DAYS[1] + 90 * NS)
    when, state = trading_state(info.root, "ESH4.GLBX")
    opens = session_bounds(SESSION, DAYS[1])[0]
    assert list(state) == [HALTED, AUCTION] and list(when) == [DAYS[1], DAYS[1] + 60 * NS]
    later = import_dbn([folder], tmp_path / "d", start=DAYS[1] - 1, end=DAYS[1] + 90 * NS)
    assert trading_state(later.root, "ESH4.GLBX")[0][0] == opens


def test_real_status_records_tell_the_trading_day_of_es(data):
    found = read_status(data / "databento/schemas/test_data.status.dbn.zst")
    assert [(s.symbol, s.action, s.state) for s in found][:2] == [("ESH1", "TRADING", OPEN), ("ESH1", "PRE_OPEN", AUCTION)]


def test_an_action_none_is_told_by_whether_it_trades(tmp_path):
    file = states(tmp_path / "x.status.dbn.zst", (DAYS[0], 11, 0, "N"), (DAYS[0] + 1, 11, 0, "Y"), (DAYS[0] + 2, 11, 0))
    assert [s.state for s in read_status(file)] == [HALTED, OPEN]


def test_a_damaged_status_file_is_refused_by_record(tmp_path):
    file = states(tmp_path / "x.status.dbn.zst", (DAYS[0], 11, 7), (DAYS[0] + 1, 11, 99))
    with pytest.raises(InputError, match="damaged at record 1"):
        read_status(file)


def test_a_catalog_without_rolls_in_it_has_events_of_every_session(season):
    _, events = events_of(season.root)
    assert len({session_bounds(SESSION, int(t))[0] for t in events["ts_init"]}) == 4


def test_a_continuous_symbol_becomes_the_contracts_that_it_stood_for(tmp_path):
    """One file of ES.v.0 over a roll: the definitions tell that its instrument id was another contract before."""
    define(tmp_path / "es.definition.dbn.zst")
    roll = DAYS[2] // (24 * HOUR) * 24 * HOUR
    days = [dt.date(2024, 3, 1), dt.date(2024, 3, 13), dt.date(2024, 4, 1)]
    spans = [SimpleNamespace(start_date=a, end_date=b, symbol=str(n)) for a, b, n in zip(days, days[1:], (11, 12))]
    content = d.Metadata(
        "GLBX.MDP3", DAYS[0], d.SType.CONTINUOUS, d.SType.INSTRUMENT_ID, d.Schema.MBO, symbols=["ES.v.0"],
        mappings=[SimpleNamespace(raw_symbol="ES.v.0", intervals=spans)], version=3,
    ).encode()  # fmt: skip
    records = mbo(*((n, "A", "B", 500_000, 1, n + 1, 128, 11 + (n > 2)) for n in range(5)))
    records["ts_recv"] += np.uint64(roll - 3) - records["ts_recv"].min()
    (tmp_path / "es.mbo.dbn.zst").write_bytes(zstandard.compress(content + records.tobytes()))
    info = import_dbn([tmp_path / "es.mbo.dbn.zst"], tmp_path / "c")
    instruments, events = events_of(info.root)
    assert [i.id for i in instruments] == ["ESH4.GLBX", "ESM4.GLBX"] and np.bincount(events["instrument"]).tolist() == [3, 2]
    published, table = read_dbn(tmp_path / "es.mbo.dbn.zst")
    assert [i.id for i in table] == ["ESH4.GLBX", "ESM4.GLBX"] and np.array_equal(published, events)


def test_a_parent_symbol_brings_spreads_which_are_passed_over_by_name(tmp_path, capsys):
    """ES.FUT is every contract and every calendar spread between them."""
    everything = {s: n for s, (n, _) in CONTRACTS.items()} | {"ESH4-ESM4": 13}
    define(tmp_path / "es.definition.dbn.zst")
    spread = d.InstrumentDefMsg(1, 13, DAYS[0], DAYS[0], 5 * 10**7, 10**9, "ESH4-ESM4", "ES", "", d.InstrumentClass.FUTURE_SPREAD,
                                d.SecurityUpdateAction.ADD, exchange="XCME", currency="USD")  # fmt: skip
    raw = zstandard.ZstdDecompressor().decompress((tmp_path / "es.definition.dbn.zst").read_bytes(), 1 << 20)
    (tmp_path / "es.definition.dbn.zst").write_bytes(zstandard.compress(raw + bytes(spread)))
    records = mbo(*((n, "A", "B", 500_000, 1, n + 1, 128, 11 + n % 3) for n in range(9)))
    content = meta(d.Schema.MBO, DAYS[0], {s: (n, "") for s, n in everything.items()})
    (tmp_path / "es.mbo.dbn.zst").write_bytes(zstandard.compress(content + records.tobytes()))
    info = import_dbn([tmp_path / "es.mbo.dbn.zst"], tmp_path / "c")
    assert [i.id for i in info.instruments] == ["ESH4.GLBX", "ESM4.GLBX"] and info.counts["order_book_deltas"] == 6
    assert "spreads and options are not read, passed over: ESH4-ESM4" in capsys.readouterr().err
    with pytest.raises(InputError, match="ESH4-ESM4 is a spread or an option"):
        import_dbn([tmp_path / "es.mbo.dbn.zst"], tmp_path / "e", symbols=["ESH4-ESM4"])
