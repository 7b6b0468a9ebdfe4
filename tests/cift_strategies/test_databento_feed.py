"""What a live node gets from Databento is what an import of the same records gives: rows, books, and the marks of what went wrong."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from live_feed import GUARD_S, listen, playing, statuses
from nautilus_trader.common import DataActor, DataActorConfig
from nautilus_trader.model import ActorId, InstrumentId

from catalog.book import depth
from catalog.errors import InputError
from catalog.events import CANCEL, F_LAST, F_SNAPSHOT, MODIFY, SCALE, TRADE, Instrument, read_dbn, read_instruments_toml
from catalog.synthetic import MarketFiles, make_market
from cift_models.features import NAMES, replay
from cift_strategies.faults import Faults
from cift_strategies.feeds import databento, direct
from cift_strategies.feeds.direct import AHEAD, STEP
from cift_strategies.feeds.gateway import DEMO_KEY
from cift_strategies.feeds.mischief import Fault
from cift_strategies.messages import Signal
from cift_strategies.risk import Limits
from cift_strategies.settings import Settings
from cift_strategies.strategy import Terms
from cift_strategies.system import assemble, live_node, sandbox

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> MarketFiles:
    return make_market(tmp_path_factory.mktemp("live") / "market", 11, sessions=1, events=24_000, instruments=2)


def halt_times(market: MarketFiles) -> list[int]:
    """When the market is halted, and when it opens again."""
    ts = read_dbn(market.mbo[0])[0]["ts_init"]
    return [int(ts[len(ts) // 3]), int(ts[len(ts) // 2])]


@pytest.fixture(scope="module")
def halting(market: MarketFiles, tmp_path_factory: pytest.TempPathFactory) -> MarketFiles:
    """The market with a status file beside it: halted for a while."""
    folder = tmp_path_factory.mktemp("halting")
    files = [Path(shutil.copy(p, folder)) for p in (market.mbo[0], market.definitions[0])]
    (folder / files[0].name.replace(".mbo.", ".status.")).write_bytes(statuses(files[0], halt_times(market)))
    return replace(market, root=folder, mbo=(files[0],), definitions=(files[1],))


def same(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return ((a == b) | (np.isnan(a) & np.isnan(b))).all(1)


def assert_rows_equal(heard: Any, events: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> None:
    got, live = heard.events, heard.rows
    for k in np.unique(events["instrument"]):
        mine, theirs = got["instrument"] == k, events["instrument"] == k
        for name in ("ts_event", "ts_init", "price", "side"):
            assert (got[name][mine] == events[name][theirs]).all()
        assert same(live[mine], rows[theirs]).all()


def test_features_of_a_live_session_equal_those_of_its_file_to_the_last_bit(market: MarketFiles) -> None:
    events, instruments = read_dbn(market.mbo[0])

    async def session() -> Any:
        async with playing(market.mbo) as gateway:
            return await listen(gateway, instruments, lambda h: h.n >= len(events))

    heard = asyncio.run(session())
    assert heard.n == len(events)
    assert_rows_equal(heard, events, replay(events, instruments))
    assert 0 < heard.link.ahead <= AHEAD + STEP  # the line is read no faster than the node works


def test_a_node_that_is_behind_gets_changes_of_one_book_together(market: MarketFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same events in the same order, over all instruments, and the same features, as where each comes by itself."""
    events, instruments = read_dbn(market.mbo[0])

    async def session() -> Any:
        async with playing(market.mbo) as gateway:
            return await listen(gateway, instruments, lambda h: h.n >= len(events))

    together = asyncio.run(session())
    monkeypatch.setattr(direct, "BEHIND", len(events))
    apart = asyncio.run(session())
    assert (together.events == apart.events).all() and same(together.rows, apart.rows).all()
    assert len(together.vectors) < 0.9 * len(apart.vectors)
    whole = [v for v in together.vectors if v.events["action"][-1] != TRADE]
    assert all(v.events["flags"][-1] & F_LAST for v in whole)


def test_the_line_is_read_on_when_there_is_room(market: MarketFiles) -> None:
    events, instruments = read_dbn(market.mbo[0])
    asked: list[int] = []

    async def room() -> None:
        asked.append(len(asked))

    def enough(heard: Any) -> bool:
        heard.link.room = room
        return bool(heard.n >= len(events))

    async def session() -> Any:
        async with playing(market.mbo) as gateway:
            return await listen(gateway, instruments, enough)

    assert asyncio.run(session()).n == len(events) and len(asked) >= (len(events) - 2 * AHEAD) // STEP > 10


def test_what_the_node_never_works_off_does_not_hold_up_the_line(market: MarketFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts nothing any more, as a node that drops what it is given: after a while without progress the client goes on."""
    events, instruments = read_dbn(market.mbo[0])
    monkeypatch.setattr(direct, "PATIENCE_S", 0.0)

    def enough(heard: Any) -> bool:
        heard.link.taken = lambda: 0
        return bool(heard.n >= len(events))

    async def session() -> Any:
        async with playing(market.mbo) as gateway:
            return await listen(gateway, instruments, enough)

    assert asyncio.run(session()).n == len(events) > 10 * AHEAD


class Markets(DataActor):
    """Keeps what is told of the trading state of its instruments."""

    def __new__(cls, *_args: Any) -> Markets:
        return super().__new__(cls)

    def __init__(self, instruments: Sequence[Instrument], enough: int) -> None:
        super().__init__(DataActorConfig(actor_id=ActorId("MARKETS")))
        self.ids, self.enough = [InstrumentId.from_str(x.id) for x in instruments], enough
        self.got, self.done = list[Any](), asyncio.Event()

    def on_start(self) -> None:
        for i in self.ids:
            self.subscribe_instrument_status(i)

    def on_instrument_status(self, status: Any) -> None:
        self.got.append(status)
        if len(self.got) == self.enough:
            self.done.set()


@pytest.mark.parametrize("reader", ["direct", "nautilus"])
def test_halts_and_openings_come_with_the_records(halting: MarketFiles, reader: Any) -> None:
    instruments = read_dbn(halting.mbo[0])[1]

    async def session() -> list[Any]:
        actor = Markets(instruments, 4)
        async with playing(halting.mbo) as gateway:
            await listen(gateway, instruments, lambda h: False, reader, actors=[actor], done=actor.done)
        return actor.got

    got = sorted((s.ts_event, str(s.instrument_id), s.action.name) for s in asyncio.run(session()))
    at = halt_times(halting)
    assert got == sorted((t, x.id, a) for x in instruments for t, a in zip(at, ("HALT", "TRADING")))


def test_a_dataset_that_tells_of_no_halts_is_read_without_them(halting: MarketFiles) -> None:
    events, instruments = read_dbn(halting.mbo[0])

    async def session() -> Any:
        actor = Markets(instruments, 1)
        async with playing(halting.mbo) as gateway:
            del gateway.tape._streams["status"]
            return await listen(gateway, instruments, lambda h: h.n >= len(events), actors=[actor])

    heard = asyncio.run(session())
    assert "this dataset tells nothing of halts and auctions" in heard.link.said and heard.link.counts["sessions"] == 2
    assert heard.n == len(events)


def test_a_partial_execution_leaves_the_rest_of_the_order(market: MarketFiles) -> None:
    events, instruments = read_dbn(market.mbo[0])
    sizes: dict[tuple[int, int], int] = {}
    partial = 0
    for e in events:
        key = int(e["instrument"]), int(e["order_id"])
        if e["action"] == CANCEL and e["size"] < sizes.get(key, 0):
            sizes[key] -= int(e["size"])
            partial += 1
        elif e["action"] != TRADE:
            sizes[key] = int(e["size"]) if e["action"] != CANCEL else 0
    assert partial > 100  # the market has them

    async def session() -> Any:
        async with playing(market.mbo) as gateway:
            return await listen(gateway, instruments, lambda h: h.n >= len(events))

    heard = asyncio.run(session())
    assert heard.link.counts["partial_cancels"] == partial
    live, order = heard.events, np.argsort(heard.events["instrument"], kind="stable")
    file = np.argsort(events["instrument"], kind="stable")
    changed = (live["action"][order] == MODIFY) & (events["action"][file] == CANCEL)
    assert int(changed.sum()) == partial  # what Nautilus's books, which know whole cancels only, can follow
    assert (depth(live)[order] == depth(events)[file]).all()


def test_es_session_is_equal_too(data: Path) -> None:
    file = data / "databento" / "esh4-glbx-mdp3-20231225.mbo.dbn.zst"
    events, _ = read_dbn(file)
    instruments = read_instruments_toml(ROOT / "docs" / "instruments" / "esh4.toml")

    async def session() -> Any:
        async with playing([file]) as gateway:
            return await listen(gateway, instruments, lambda h: h.n >= len(events))

    assert_rows_equal(asyncio.run(session()), events, replay(events, instruments))


@pytest.mark.parametrize("level", [2, 1])
def test_levels_and_quotes_equal_those_of_a_file_of_them(market: MarketFiles, level: int, tmp_path: Path) -> None:
    """MBP-10 and MBP-1, derived by the gateway; the twin is what its historical side gives, read as a file."""
    schema = {2: "mbp-10", 1: "mbp-1"}[level]
    path = tmp_path / f"x.{schema}.dbn.zst"

    def ask(gateway: Any) -> None:
        asked = {"dataset": gateway.tape.dataset, "schema": schema, "compression": "zstd", "start": "2025-03-10"}
        url = f"http://127.0.0.1:{gateway.http_port}/v0/timeseries.get_range"
        path.write_bytes(httpx.post(url, data=asked, auth=(DEMO_KEY, ""), timeout=60).raise_for_status().content)

    async def session() -> Any:
        async with playing(market.mbo) as gateway:
            await asyncio.to_thread(ask, gateway)
            events, instruments = read_dbn(path)
            known = {x.id: x for x in read_dbn(market.mbo[0])[1]}
            instruments = [replace(known[x.id], level=level) for x in instruments]
            return events, instruments, await listen(gateway, instruments, lambda h: h.last >= events["ts_init"].max())

    events, instruments, heard = asyncio.run(session())
    got = heard.events
    for k in range(len(instruments)):
        mine, theirs = got[got["instrument"] == k], events[events["instrument"] == k]
        assert len(mine) == len(theirs)
        for name in ("ts_event", "ts_init", "price", "size", "action", "side"):
            assert (mine[name] == theirs[name]).all(), name
        assert same(heard.rows[got["instrument"] == k], replay(events, instruments)[events["instrument"] == k]).all()


def whole_again(heard: Any, events: np.ndarray[Any, Any], instruments: Sequence[Instrument]) -> int:
    """The book after the last snapshot is that of the file, event by event, in prices, sizes and counts. Returns the events it saw."""
    got, seen = heard.events, 0
    truth, lived = depth(events, 10), depth(got, 10)
    now = [NAMES.index(n) for n in ("mid", "spread")]
    rows = replay(events, instruments)
    for k in range(len(instruments)):
        after = np.flatnonzero((got["instrument"] == k) & (got["flags"] & F_SNAPSHOT > 0))[-1]
        tail = np.flatnonzero(got["instrument"] == k)
        tail = tail[tail > after]
        mine = np.flatnonzero(events["instrument"] == k)[-len(tail) :]
        assert (got["ts_event"][tail] == events["ts_event"][mine]).all()
        assert (lived[tail] == truth[mine]).all()
        assert same(heard.rows[tail][:, now], rows[mine][:, now]).all()
        seen += len(tail)
    return seen


def test_a_start_in_mid_session_has_the_whole_book(market: MarketFiles) -> None:
    events, instruments = read_dbn(market.mbo[0])
    end = int(events["ts_init"].max())

    async def session() -> Any:
        async with playing(market.mbo) as gateway:
            gateway.go((gateway.tape.first + end) // 2, 1e-3)  # as good as standing still

            def enough(h: Any) -> bool:
                if h.n and gateway.clock.speed:
                    gateway.go(gateway.clock.now(), 0.0)
                return h.last >= end

            return await listen(gateway, instruments, enough)

    heard = asyncio.run(session())
    snapshot = heard.events["flags"] & F_SNAPSHOT > 0
    assert snapshot[: int(snapshot.sum())].all() and snapshot.sum() > 20  # first of all
    assert heard.link.health.counts()["reasons"] == {}
    assert 5_000 < whole_again(heard, events, instruments) < 15_000


class Silent:
    """Predicts nothing."""

    def predict(self, vector: Any) -> Any:
        return ()


def test_the_kill_switch_closes_at_the_market_before_a_trade_was_seen(market: MarketFiles) -> None:
    """In a market that stands still after a start in its midst: from a snapshot alone Nautilus takes no price, and denies such orders."""
    events, instruments = read_dbn(market.mbo[0])
    limits = Terms(tuple(instruments), Settings(), Limits(), faults=Faults())

    async def until(true: Callable[[], bool]) -> None:
        async with asyncio.timeout(GUARD_S):
            while not true():
                await asyncio.sleep(0.01)

    async def session() -> Any:
        async with playing(market.mbo) as gateway:
            gateway.go((gateway.tape.first + int(events["ts_init"].max())) // 2, 1e-3)
            feed = databento.client(instruments, gateway.tape.dataset, DEMO_KEY, live=f"127.0.0.1:{gateway.port}")
            system = assemble(limits, Silent())
            s = system.strategy
            node = live_node(system, [feed], sandbox(instruments, 1e6, 0, limits.faults), True)
            running = asyncio.ensure_future(node.run_async())
            try:
                await until(lambda: all(v is not None and np.isfinite(v.mid) for v in s.last))
                for k, x in enumerate(instruments):
                    at = round(s.last[k].mid * SCALE / x.tick) * x.tick
                    far = 10 * x.tick
                    s.enter(Signal(k, s.now(), s.now(), 1, 10 * SCALE, SCALE, 1.0, 0.0, 1.0, -1, at + far, at - 9 * far, at + 9 * far))
                await until(lambda: all(p.size for p in s.ledger.positions))
                s.halt("killed", "kill switch")
                s.flatten("killed")
                await until(lambda: s.flat or s.order_types["OrderDenied"] > 0)
                return dict(s.order_types), s.flat
            finally:
                node.handle().stop()
                await asyncio.wait((running,), timeout=GUARD_S)

    events_of_orders, flat = asyncio.run(session())
    limits.faults.reraise()
    assert flat and "OrderDenied" not in events_of_orders


def test_the_book_is_whole_again_after_the_line_was_lost(market: MarketFiles) -> None:
    events, instruments = read_dbn(market.mbo[0])

    async def session() -> Any:
        async with playing(market.mbo, faults=[Fault("drop", len(events) // 2, 400)]) as gateway:
            return await listen(gateway, instruments, lambda h: h.last >= events["ts_init"].max())

    heard = asyncio.run(session())
    assert heard.n - int((heard.events["flags"] & F_SNAPSHOT > 0).sum()) < len(events)  # some were missed, and that is known:
    assert heard.link.health.reconnects == 1
    assert heard.link.health.reasons == {"reconnect": len(instruments)}
    assert whole_again(heard, events, instruments) > 1_000


def test_a_wrong_key_is_told_in_one_line() -> None:
    x = Instrument("SHARE.XNAS", 10_000_000, 1_000_000_000, 1.0, "USD", kind="equity")
    with pytest.raises(InputError, match="DATABENTO_API_KEY"):
        databento.client([x], "XNAS.ITCH", "secret")
    with pytest.raises(InputError, match="host:port"):
        databento.client([x], "XNAS.ITCH", "db-" + "x" * 29, live="nowhere")


def test_gateways_of_datasets() -> None:
    assert databento.address("GLBX.MDP3") == ("glbx-mdp3.lsg.databento.com", 13_000)
    assert databento.address("XNAS.ITCH", "127.0.0.1:5") == ("127.0.0.1", 5)


def test_publishers_are_those_of_databento() -> None:
    table = {p["publisher_id"]: p for p in databento.publishers()}
    assert table[1]["dataset"] == "GLBX.MDP3" and table[1]["venue"] == "GLBX"
    assert table[2]["dataset"] == "XNAS.ITCH" and table[2]["venue"] == "XNAS"
