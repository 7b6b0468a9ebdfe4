"""The local gateway speaks Databento's live protocol: databento's and Nautilus's clients take it for the service and get a file's bytes."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import databento
import databento_dbn as dbn
import httpx
import numpy as np
import pytest
import zstandard
from live_feed import listen, playing
from nautilus_trader.common import DataActor, DataActorConfig
from nautilus_trader.model import ActorId, BookType, ClientId, InstrumentId
from processes import started

from catalog.book import depth
from catalog.dbn import MBO, Dbn
from catalog.errors import InputError
from catalog.events import CLEAR, F_LAST, F_SNAPSHOT, SCALE, read_dbn, read_instruments_toml
from catalog.synthetic import MarketFiles, make_market
from cift_strategies.feeds import levels
from cift_strategies.feeds.gateway import DEMO_KEY, Gateway
from cift_strategies.feeds.wire import RefusedError, Wire, connect

ROOT = Path(__file__).resolve().parents[2]
DATASET = "XNAS.ITCH"


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> MarketFiles:
    return make_market(tmp_path_factory.mktemp("gateway") / "market", 12, sessions=2, events=24_000, instruments=2)


def records_of(*files: Path) -> np.ndarray[Any, Any]:
    return np.concatenate([rows.reshape(-1).view(MBO) for f in files for _, rows, _ in Dbn(f).records()])


async def taken(wire: Wire, enough: Callable[[list[Any]], bool]) -> list[Any]:
    """Decoded records until `enough` of them have come."""
    decoder, found = dbn.DBNDecoder(has_metadata=False, input_version=3), []
    async with asyncio.timeout(60):
        async for data, _ in wire.pieces():
            found += decoder.write_and_decode(data.tobytes())
            if enough(found):
                break
    wire.close()
    return found


def kinds(records: list[Any]) -> dict[str, int]:
    names = [type(r).__name__ for r in records]
    return {n: names.count(n) for n in dict.fromkeys(names)}


async def opened(gateway: Gateway, *asked: tuple[str, list[str], dict[str, Any]], heartbeat_s: int = 10) -> Wire:
    wire = await connect("127.0.0.1", gateway.port, DEMO_KEY, gateway.tape.dataset, heartbeat_s)
    for schema, symbols, how in asked:
        wire.subscribe(schema, symbols, **how)
    wire.start()
    return wire


# --- the very bytes -------------------------------------------------------------------------------------------------------------------


def heard_by_databento(gateway: Gateway, symbols: list[str], **how: Any) -> bytes:
    out = io.BytesIO()
    live = databento.Live(DEMO_KEY, gateway="127.0.0.1", port=gateway.port, **how)
    live.subscribe(gateway.tape.dataset, "mbo", symbols)
    live.add_stream(out)
    live.start()
    live.block_for_close(60)
    return out.getvalue()


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_databentos_client_receives_the_bytes_of_the_file(market: MarketFiles, compression: str) -> None:
    async def session() -> bytes:
        async with playing(market.mbo, hold=False) as gateway:
            return await asyncio.to_thread(heard_by_databento, gateway, list(market.symbols), compression=dbn.Compression(compression))

    assert orders_in(asyncio.run(session())) == records_of(*market.mbo).tobytes()


def test_databentos_client_receives_the_bytes_of_the_es_session(data: Path) -> None:
    file = data / "databento" / "esh4-glbx-mdp3-20231225.mbo.dbn.zst"

    async def session() -> bytes:
        async with playing([file], hold=False) as gateway:
            return await asyncio.to_thread(heard_by_databento, gateway, ["ESH4"])

    assert orders_in(asyncio.run(session())) == records_of(file).tobytes()


def orders_in(stream: bytes) -> bytes:
    """The MBO records of a DBN stream, as they are."""
    at, found = 8 + int.from_bytes(stream[4:8], "little"), []
    while at < len(stream):
        size = stream[at] * 4
        if stream[at + 1] == 0xA0:
            found.append(stream[at : at + size])
        at += size
    return b"".join(found)


class Everything(DataActor):
    """Takes deltas and trades as Nautilus's own client gives them."""

    def __new__(cls, *_args: Any) -> Everything:
        return super().__new__(cls)

    def __init__(self, ids: list[str], n: int, done: Callable[[], None]) -> None:
        super().__init__(DataActorConfig(actor_id=ActorId("EVERYTHING")))
        self.ids, self.n, self.ended = [InstrumentId.from_str(i) for i in ids], n, done
        self.deltas: dict[str, list[tuple[Any, ...]]] = {i: [] for i in ids}
        self.trades: dict[str, list[tuple[Any, ...]]] = {i: [] for i in ids}
        self.defined: list[Any] = []
        self.watch: Callable[[int], object] = lambda ts: None

    def on_start(self) -> None:
        for i in self.ids:
            self.request_instrument(i)
            self.subscribe_instrument(i)
            self.subscribe_book_deltas(i, BookType.L3_MBO)
            self.subscribe_trades(i, client_id=ClientId("COME-WITH-THE-ORDERS"))

    def on_instrument(self, instrument: Any) -> None:
        self.defined.append(instrument)

    def on_book_deltas(self, deltas: Any) -> None:
        for d in deltas.deltas:
            o = d.order
            price = 0 if int(d.action) == 4 else round(o.price.as_double() * SCALE)
            self.deltas[str(d.instrument_id)].append(
                ("AMCR"[int(d.action) - 1], price, o.size.as_double(), o.order_id, d.flags, d.sequence, d.ts_event)
            )
        self._more(len(deltas.deltas), deltas.ts_event)

    def on_trade(self, t: Any) -> None:
        self.trades[str(t.instrument_id)].append(
            (round(t.price.as_double() * SCALE), t.size.as_double(), int(str(t.trade_id)), t.ts_event)
        )
        self._more(1, t.ts_event)

    def _more(self, n: int, ts: int) -> None:
        self.n -= n
        self.watch(ts)
        if self.n == 0:
            self.ended()


@pytest.mark.parametrize("which", ["demo", "es"])
def test_nautilus_own_client_receives_what_the_file_says(market: MarketFiles, which: str, request: pytest.FixtureRequest) -> None:
    if which == "es":
        file = request.getfixturevalue("data") / "databento" / "esh4-glbx-mdp3-20231225.mbo.dbn.zst"
        instruments = read_instruments_toml(ROOT / "docs" / "instruments" / "esh4.toml")
    else:
        file = market.mbo[0]
        instruments = read_dbn(file)[1]
    raw = records_of(file)
    raw = raw[raw["action"] != ord("F")]
    numbers = {s.symbol: s.number for s in Dbn(file).spans}

    async def session() -> Everything:
        async with playing([file]) as gateway:
            done = asyncio.Event()
            actor = Everything([x.id for x in instruments], len(raw), done.set)
            await listen(gateway, instruments, lambda _: False, "nautilus", actors=[actor], done=done)
            return actor

    actor = asyncio.run(session())
    for x in instruments:
        mine = raw[raw["instrument_id"] == numbers[x.id.split(".")[0]]]
        book, trades = mine[mine["action"] != ord("T")], mine[mine["action"] == ord("T")]
        price = np.where(book["action"] == CLEAR, 0, book["price"])
        sequence = np.where(book["flags"] & F_SNAPSHOT, 0, book["sequence"])  # which Nautilus leaves out of a snapshot
        told = zip(map(chr, book["action"]), price, book["size"], book["order_id"], book["flags"], sequence, book["ts_recv"])
        assert actor.deltas[x.id] == list(told)
        assert actor.trades[x.id] == [(int(r["price"]), r["size"], r["sequence"], r["ts_recv"]) for r in trades]
    if which == "demo":
        assert {str(i.id) for i in actor.defined} == {x.id for x in instruments}


# --- who is let in --------------------------------------------------------------------------------------------------------------------


def test_only_who_knows_the_key_is_let_in(market: MarketFiles) -> None:
    async def session() -> None:
        async with playing(market.mbo) as gateway:
            (await connect("127.0.0.1", gateway.port, DEMO_KEY, DATASET)).close()
            other_secret, other_bucket = "db-" + "x" * 24 + DEMO_KEY[-5:], DEMO_KEY[:-5] + "xxxxx"
            for key in (other_secret, other_bucket):
                with pytest.raises(RefusedError, match=r"Authentication failed\."):
                    await connect("127.0.0.1", gateway.port, key, DATASET)
            digest = hashlib.sha256(f"c|{DEMO_KEY}".encode()).hexdigest()
            assert gateway.knows("c", f"{digest}-{DEMO_KEY[-5:]}") and not gateway.knows("c", f"{digest}-xxxxx")
            with pytest.raises(RefusedError, match=r"XNAS\.ITCH is"):
                await connect("127.0.0.1", gateway.port, DEMO_KEY, "GLBX.MDP3")
            assert gateway.counts["refused"] == 2

    asyncio.run(session())


def test_an_answer_cannot_be_used_twice(market: MarketFiles) -> None:
    async def session() -> tuple[bytes, bytes]:
        async with playing(market.mbo) as gateway:
            asked = []
            for _ in range(2):
                reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
                await reader.readline()
                asked.append(await reader.readline())
                writer.close()
            return asked[0], asked[1]

    first, second = asyncio.run(session())
    assert first.startswith(b"cram=") and first != second


def test_the_key_must_have_the_form_of_one(market: MarketFiles) -> None:
    with pytest.raises(InputError, match="32 characters"):
        Gateway(market.mbo, key="secret")


# --- what is asked for ----------------------------------------------------------------------------------------------------------------


def test_one_symbol_is_sent_alone_and_named(market: MarketFiles) -> None:
    raw = records_of(market.mbo[0])
    number = {s.symbol: s.number for s in Dbn(market.mbo[0]).spans}["MARLN"]
    mine = raw[raw["instrument_id"] == number]

    async def session() -> list[Any]:
        async with playing(market.mbo[:1]) as gateway:
            wire = await opened(gateway, ("mbo", ["MARLN"], {}))
            return await taken(wire, lambda r: kinds(r).get("MBOMsg") == len(mine))

    got = asyncio.run(session())
    mapping, ack = got[0], got[1]
    assert (mapping.instrument_id, mapping.stype_in_symbol, mapping.stype_out_symbol) == (number, "MARLN", "MARLN")
    assert ack.msg == "Subscription request 1 for mbo data succeeded"
    assert b"".join(bytes(r) for r in got[2:]) == mine.tobytes()


@pytest.mark.parametrize(("stype", "symbols"), [("instrument_id", "6001"), ("raw_symbol", "ALL_SYMBOLS")])
def test_symbols_may_be_numbers_or_all(market: MarketFiles, stype: str, symbols: str) -> None:
    def ask(gateway: Gateway) -> bytes:
        out = io.BytesIO()
        live = databento.Live(DEMO_KEY, gateway="127.0.0.1", port=gateway.port)
        live.subscribe(DATASET, "trades", symbols, stype_in=stype)
        live.add_stream(out)
        live.start()
        live.block_for_close(60)
        return out.getvalue()

    async def session() -> bytes:
        async with playing(market.mbo[:1], hold=False) as gateway:
            return await asyncio.to_thread(ask, gateway)

    store = databento.DBNStore.from_bytes(asyncio.run(session()))
    trades = [r for r in store if isinstance(r, dbn.TradeMsg)]
    raw = records_of(market.mbo[0])
    expected = raw[(raw["action"] == ord("T")) & ((raw["instrument_id"] == 6001) | (symbols == "ALL_SYMBOLS"))]
    assert [(t.instrument_id, t.price, t.size, t.sequence, t.ts_recv) for t in trades] == [
        (r["instrument_id"], r["price"], r["size"], r["sequence"], r["ts_recv"]) for r in expected
    ]


def test_what_is_not_there_is_told_by_an_error(market: MarketFiles) -> None:
    async def session() -> tuple[list[Any], list[Any], list[Any]]:
        async with playing(market.mbo[:1]) as gateway:
            wire = await opened(gateway, ("mbo", ["NOSUCH", "KESTR"], {}))
            symbol = await taken(wire, lambda r: "MBOMsg" in kinds(r))
            schema = await taken(await opened(gateway, ("ohlcv-1s", ["KESTR"], {})), lambda r: "ErrorMsg" in kinds(r))
            both = await taken(await opened(gateway, ("mbo", ["KESTR"], {"snapshot": True, "start": 5})), lambda r: "ErrorMsg" in kinds(r))
            return symbol, schema, both

    symbol, schema, both = asyncio.run(session())
    assert [r.err for r in symbol if isinstance(r, dbn.ErrorMsg)] == ["Failed to resolve symbols: NOSUCH"]
    assert schema[-1].err.startswith("Schema ohlcv-1s is not available; mbo, definition")
    assert "without a start" in both[-1].err


def test_a_start_in_the_past_is_replayed_from_there(market: MarketFiles) -> None:
    raw = records_of(market.mbo[0])
    start = int(raw["ts_recv"][len(raw) // 2])
    rest = raw[raw["ts_recv"] >= start]

    async def session() -> list[Any]:
        async with playing(market.mbo[:1]) as gateway:
            gateway.go(int(raw["ts_recv"][-10]), 1e-3)
            wire = await opened(gateway, ("mbo", list(market.symbols), {"start": start}))
            return await taken(wire, lambda r: any(isinstance(x, dbn.SystemMsg) and "replay" in x.msg for x in r))

    got = asyncio.run(session())
    told = np.frombuffer(b"".join(bytes(r) for r in got if isinstance(r, dbn.MBOMsg)), MBO)
    assert len(rest) - 10 <= len(told) <= len(rest)
    assert (told == rest[: len(told)]).all()
    assert got[-1].msg == "Finished mbo replay"


def test_a_snapshot_is_the_book_in_order_of_priority(market: MarketFiles) -> None:
    """Made anew from the file by hand: orders with what is left of them, each level's in the order in which they came to it."""
    raw = records_of(market.mbo[0])
    number, half = int(raw["instrument_id"][0]), len(raw) // 2
    queue: dict[int, list[Any]] = {}
    for r in raw[:half][raw["instrument_id"][:half] == number]:
        i, action = int(r["order_id"]), chr(r["action"])
        if action == "R":
            queue.clear()
        elif action == "A":
            queue[i] = [chr(r["side"]), int(r["price"]), int(r["size"]), int(r["sequence"])]
        elif action == "M":
            if queue[i][1] != int(r["price"]) or queue[i][2] < int(r["size"]):
                queue.pop(i)
                queue[i] = [chr(r["side"]), int(r["price"]), int(r["size"]), int(r["sequence"])]
            else:
                queue[i][2] = int(r["size"])
        elif action == "C":
            queue[i][2] -= int(r["size"])
            if not queue[i][2]:
                del queue[i]
    expected = sorted(queue.items(), key=lambda kv: (kv[1][0] != "B", kv[1][1] * (-1 if kv[1][0] == "B" else 1)))
    told = levels.snapshot(raw[:half].view(np.uint8).reshape(-1, 56), number, 77).view(MBO)[:, 0]
    assert chr(told[0]["action"]) == "R"
    assert [(int(r["order_id"]), [chr(r["side"]), int(r["price"]), int(r["size"]), int(r["sequence"])]) for r in told[1:]] == expected
    assert (told["flags"] & F_SNAPSHOT > 0).all() and (told["ts_recv"] == 77).all()
    assert [bool(f & F_LAST) for f in told["flags"]] == [False] * (len(told) - 1) + [True]


def test_derived_levels_are_those_of_the_book(market: MarketFiles) -> None:
    raw = records_of(market.mbo[0])
    mine = raw[raw["instrument_id"] == raw["instrument_id"][0]]
    events = levels.events_of(mine)
    book = depth(events, 10)
    for schema, n in (("mbp-10", 10), ("mbp-1", 1)):
        parts = list(levels.derive(mine.view(np.uint8).reshape(-1, 56), schema))
        rows = np.concatenate([r for _, r in parts])
        decoder = dbn.DBNDecoder(has_metadata=False, input_version=3)
        told = decoder.write_and_decode(b"".join(p.tobytes() for p, _ in parts))
        for r, at in zip(told, rows):
            now = book[at - 1] if r.action == "T" else book[at]  # a trade has not reached the book yet
            for k in range(n):
                for side in ("bid", "ask"):
                    px, sz, ct = (getattr(r.levels[k], f"{side}_{w}") for w in ("px", "sz", "ct"))
                    assert (px if sz else 0, sz * SCALE, ct) == tuple(int(now[f"{side}_{w}"][k]) for w in ("px", "sz", "ct"))
        missed = np.setdiff1d(np.arange(1, len(mine)), rows)
        best = np.stack([book[f"{s}_{w}"][:, :n] for s in ("bid", "ask") for w in ("px", "sz", "ct")])
        assert (best[:, missed] == best[:, missed - 1]).all()  # nothing that shows was left out
        assert np.isin(np.flatnonzero(mine["action"] == ord("T")), rows).all()


def test_sessions_of_two_days_follow_each_other(market: MarketFiles) -> None:
    raw = records_of(*market.mbo)

    async def session() -> list[Any]:
        async with playing(market.mbo) as gateway:
            wire = await opened(gateway, ("definition", ["ALL_SYMBOLS"], {}), ("mbo", list(market.symbols), {}))
            return await taken(wire, lambda r: kinds(r).get("MBOMsg", 0) >= len(raw))

    got = asyncio.run(session())
    assert b"".join(bytes(r) for r in got if isinstance(r, dbn.MBOMsg)) == raw.tobytes()
    names = [type(r).__name__ for r in got]
    days = [i for i, n in enumerate(names) if n == "InstrumentDefMsg"]
    assert len(days) == 4 and names.index("MBOMsg") > days[1]
    assert names[days[1] + 1 : days[2]].count("MBOMsg") == len(records_of(market.mbo[0]))


# --- time -----------------------------------------------------------------------------------------------------------------------------


def test_no_record_is_sent_before_its_time_has_come(market: MarketFiles) -> None:
    raw, speed = records_of(market.mbo[0]), 200.0
    due: list[tuple[int, int]] = []

    async def session() -> int:
        async with playing(market.mbo[:1], speed=speed) as gateway:
            wire = await opened(gateway, ("mbo", list(market.symbols), {}))
            decoder, n = dbn.DBNDecoder(has_metadata=False, input_version=3), 0
            async for data, _ in wire.pieces():
                came = time.time_ns()
                stamps = [r.ts_recv for r in decoder.write_and_decode(data.tobytes()) if isinstance(r, dbn.MBOMsg)]
                n += len(stamps)
                due.extend((came, t) for t in stamps)
                if n == len(raw):
                    break
            wire.close()
            return gateway.clock.wall_ns

    began = asyncio.run(session())
    first = int(raw["ts_recv"][0])
    assert all(came - began >= (ts - first) / speed for came, ts in due)
    assert len({came for came, _ in due}) > 20  # and they did not all wait for the last one


def test_every_client_of_many_gets_everything(market: MarketFiles) -> None:
    raw = records_of(market.mbo[0])

    async def one(gateway: Gateway) -> bytes:
        got = await taken(await opened(gateway, ("mbo", list(market.symbols), {})), lambda r: kinds(r).get("MBOMsg", 0) >= len(raw))
        return b"".join(bytes(r) for r in got if isinstance(r, dbn.MBOMsg))

    async def session() -> list[bytes]:
        async with playing(market.mbo[:1], clients=4) as gateway:
            return await asyncio.gather(*(one(gateway) for _ in range(4)))

    assert set(asyncio.run(session())) == {raw.tobytes()}


def test_records_carry_the_time_of_sending_where_it_is_asked_for(market: MarketFiles) -> None:
    async def session() -> bytes:
        async with playing(market.mbo[:1], hold=False) as gateway:
            return await asyncio.to_thread(heard_by_databento, gateway, ["KESTR"], ts_out=True)

    records = [r for r in databento.DBNStore.from_bytes(asyncio.run(session())) if isinstance(r, dbn.MBOMsg)]
    raw = records_of(market.mbo[0])
    assert len(records) == int((raw["instrument_id"] == 6001).sum())
    assert all(r.ts_out >= market_first for r, market_first in zip(records, [int(raw["ts_recv"][0])] * len(records)))


def test_a_line_without_records_has_heartbeats(market: MarketFiles) -> None:
    async def session() -> list[Any]:
        async with playing(market.mbo[:1]) as gateway:
            gateway.go(gateway.tape.last + SCALE, 1.0)  # the market is closed
            return await taken(await opened(gateway, ("mbo", ["KESTR"], {}), heartbeat_s=5), lambda r: r[-1].msg == "Heartbeat")

    assert asyncio.run(session())[-1].is_heartbeat()


@pytest.mark.parametrize("behaviour", ["warn", "skip"])
def test_a_slow_reader_is_warned_or_spared(market: MarketFiles, behaviour: str) -> None:
    """The clock is moved on by hand: for the gateway a client that has not taken what is due by now."""
    raw = records_of(market.mbo[0])

    async def session() -> list[Any]:
        async with playing(market.mbo[:1], speed=1e-3) as gateway:
            wire = await connect("127.0.0.1", gateway.port, DEMO_KEY, DATASET, slow_reader_behavior=behaviour)
            wire.subscribe("mbo", list(market.symbols))
            wire.start()
            await gateway.clock.started.wait()
            gateway.go(int(raw["ts_recv"][-1]) - SCALE, 1.0)
            said = [(dbn.SystemMsg, "msg", "Slow reading"), (dbn.ErrorMsg, "err", "reads too slowly")]

            def late(r: list[Any]) -> bool:
                return any(isinstance(x, kind) and text in getattr(x, name) for x in r for kind, name, text in said)

            return await taken(wire, lambda r: late(r) and "MBOMsg" in kinds(r))

    got = asyncio.run(session())
    errors = [r for r in got if isinstance(r, dbn.ErrorMsg)]
    if behaviour == "skip":
        assert errors and errors[0].err.startswith("Skipped ") and kinds(got)["MBOMsg"] < len(raw)
    else:
        assert any(isinstance(r, dbn.SystemMsg) and r.msg.startswith("Slow reading: ") for r in got) and not errors


# --- the historical side --------------------------------------------------------------------------------------------------------------


def test_historical_requests_are_answered_in_databentos_form(market: MarketFiles) -> None:
    def ask(gateway: Gateway) -> dict[str, Any]:
        base = f"http://127.0.0.1:{gateway.http_port}"
        with httpx.Client(base_url=base, auth=(DEMO_KEY, ""), timeout=30) as api:
            form = {"dataset": DATASET, "schema": "mbo", "symbols": "KESTR", "start": "2025-03-10", "end": "2025-03-11"}
            packed = api.post("/v0/timeseries.get_range", data=form | {"compression": "zstd"}).content
            return {
                "range": api.get("/v0/metadata.get_dataset_range", params={"dataset": DATASET}).json(),
                "records": zstandard.ZstdDecompressor().decompressobj().decompress(packed),
                "count": api.post("/v0/metadata.get_record_count", data=form).json(),
                "three": api.post("/v0/timeseries.get_range", data=form | {"limit": "3"}).content,
                "definitions": api.post("/v0/timeseries.get_range", data=form | {"schema": "definition"}).content,
                "unknown": api.post("/v0/timeseries.get_range", data=form | {"schema": "ohlcv-1d"}),
                "stranger": httpx.get(f"{base}/v0/metadata.list_datasets", auth=("db-" + "x" * 29, "")),
                "clock": httpx.get(f"{base}/clock").json(),
            }

    async def session() -> dict[str, Any]:
        async with playing(market.mbo) as gateway:
            return await asyncio.to_thread(ask, gateway)

    got = asyncio.run(session())
    raw = records_of(market.mbo[0])
    mine = raw[raw["instrument_id"] == 6001]
    assert got["records"].endswith(mine.tobytes()) and orders_in(got["records"]) == mine.tobytes()
    assert got["count"] == len(mine) and orders_in(got["three"]) == mine[:3].tobytes()
    store = databento.DBNStore.from_bytes(got["definitions"])
    assert [r.raw_symbol for r in store] == ["KESTR"] and store.mappings["KESTR"][0]["symbol"] == "6001"
    assert got["range"]["start"] < got["range"]["end"]
    assert got["unknown"].status_code == 422 and "ohlcv-1d is not available" in got["unknown"].json()["detail"]["message"]
    assert got["stranger"].status_code == 401
    assert not got["clock"]["started"]


# --- as a process ---------------------------------------------------------------------------------------------------------------------


def test_as_a_process_it_says_where_it_is_and_ends_when_told(market: MarketFiles) -> None:
    command = [sys.executable, "-m", "cift_strategies.feeds.gateway", "--dbn", *map(str, market.mbo), "--speed", "0"]
    environment = {k: v for k, v in os.environ.items() if k != "DATABENTO_API_KEY"}
    process = started(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    assert process.stdout is not None
    told = json.loads(process.stdout.readline())
    assert told["dataset"] == DATASET and told["symbols"] == ["KESTR", "MARLN"]
    assert (told["start"], told["end"]) == tuple(int(records_of(*market.mbo)["ts_recv"][i]) for i in (0, -1))
    assert httpx.get(f"{told['historical']}/clock").json()["speed"] == 0
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_files_that_cannot_be_played_are_refused_in_one_line(market: MarketFiles, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file holds market data"):
        Gateway(market.definitions)
    with pytest.raises(InputError, match="cannot read"):
        Gateway([tmp_path / "absent.mbo.dbn.zst"])
    cut = tmp_path / "cut.mbo.dbn.zst"
    cut.write_bytes(market.mbo[0].read_bytes()[:-1000])
    with pytest.raises(InputError, match="cut short"):
        Gateway([cut])
