"""Whatever the line does, the node ends up with the book of the file, knows that something was missing, and says so."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import pytest
from live_feed import Heard, listen, playing
from test_databento_feed import whole_again
from test_gateway import Everything, opened, records_of, taken

from catalog.dbn import MBO_TYPE
from catalog.errors import InputError
from catalog.events import SCALE, read_dbn
from catalog.synthetic import MarketFiles, make_market
from cift_strategies.feeds.gateway import DEMO_KEY
from cift_strategies.feeds.mischief import KINDS, Fault
from cift_strategies.feeds.wire import BrokenError, RefusedError, connect


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> MarketFiles:
    return make_market(tmp_path_factory.mktemp("faults") / "market", 13, sessions=1, events=24_000, instruments=2)


FAST: Final = 60.0  # the market goes on while the client finds out


def after(market: MarketFiles, *faults: Fault, symbols: int = 2, **how: Any) -> tuple[Heard, np.ndarray[Any, Any], Any]:
    """What a node heard of the file through a gateway with these faults, until the file's last event."""
    events, instruments = read_dbn(market.mbo[0])
    events, instruments = events[events["instrument"] < symbols], instruments[:symbols]

    async def session() -> Heard:
        async with playing(market.mbo, faults=faults, **how) as gateway:
            return await listen(gateway, instruments, lambda h: h.last >= events["ts_init"].max())

    return asyncio.run(session()), events, instruments


def test_a_cut_line_is_made_anew(market: MarketFiles) -> None:
    heard, events, instruments = after(market, Fault("drop", 9_000, 300), Fault("drop", 5_000, 300))
    assert heard.link.health.reasons == {"reconnect": 2 * len(instruments)} and heard.link.counts["sessions"] == 3
    assert whole_again(heard, events, instruments) > 1_000


def test_missing_records_are_noticed_where_all_numbers_are_delivered(market: MarketFiles) -> None:
    heard, events, instruments = after(market, Fault("skip", 12_000, 1), speed=FAST)
    assert heard.link.health.reasons == {"sequence": len(instruments), "reconnect": len(instruments)}
    assert {p.missing for p in heard.link.health.pulses} == {1}
    assert whole_again(heard, events, instruments) > 1_000


def test_missing_records_are_noticed_by_orders_that_nobody_knows(market: MarketFiles) -> None:
    """Of one symbol of several not every number comes: then a book that does not fit its orders tells."""
    heard, events, instruments = after(market, Fault("skip", 6_000, 200), symbols=1, speed=FAST)
    assert heard.link.health.reasons["book"] >= 1 and "sequence" not in heard.link.health.reasons
    assert whole_again(heard, events, instruments) > 500


def test_records_out_of_order_are_noticed(market: MarketFiles) -> None:
    heard, events, instruments = after(market, Fault("reorder", 12_000, 50), speed=FAST)
    assert heard.link.health.reasons == {"order": len(instruments), "reconnect": len(instruments)}
    assert (np.diff(heard.events["ts_init"][heard.events["instrument"] == 0]) >= 0).all()  # none of them got through
    assert whole_again(heard, events, instruments) > 1_000


@pytest.mark.parametrize("amount", [1, 64, 5_000])
def test_garbage_is_taken_for_no_record(market: MarketFiles, amount: int) -> None:
    heard, events, instruments = after(market, Fault("garbage", 12_000, amount), speed=FAST)
    assert heard.link.health.reasons == {"reconnect": len(instruments)}
    assert any("what came is no record" in s for s in heard.link.said)
    assert whole_again(heard, events, instruments) > 1_000


def test_a_refused_key_is_tried_again_and_then_given_up(market: MarketFiles) -> None:
    heard, events, _ = after(market, Fault("refuse", 0, 2))
    assert heard.n == len(events) and sum("Authentication failed" in s for s in heard.link.said) == 2

    events, instruments = read_dbn(market.mbo[0])

    async def wrong() -> Any:
        async with playing(market.mbo) as gateway:
            return await listen(gateway, instruments, lambda h: True, key="db-" + "x" * 29)

    with pytest.raises(InputError, match="refused the key"):
        asyncio.run(wrong())


def test_a_stalled_feed_is_silent_within_two_seconds(market: MarketFiles) -> None:
    """The stall itself brings no error: the records come late, all of them. What tells is the age of the newest one."""
    events, instruments = read_dbn(market.mbo[0])
    seen: dict[str, Any] = {}

    async def session() -> Heard:
        async with playing(market.mbo, faults=[Fault("stall", 12_000, 4)]) as gateway:

            def enough(h: Heard) -> bool:
                health = h.link.health
                wall = max(p.wall for p in health.pulses)
                if "task" not in seen and h.n > 2_000:
                    seen["task"] = asyncio.ensure_future(watched(health, seen))
                seen["alive"] = health.quiet(wall)
                return h.last >= int(events["ts_init"].max())

            return await listen(gateway, instruments, enough)

    heard = asyncio.run(session())
    assert seen["quiet_after_s"] <= 2.0 and not seen["alive"]
    assert heard.n == len(events)


async def watched(health: Any, seen: dict[str, Any]) -> None:
    """Ask every 100 ms, as the node's watch does, until the feed is silent; by how old its newest record is then."""
    import time

    while not health.quiet(now := time.time_ns()):
        await asyncio.sleep(0.1)
    seen["quiet_after_s"] = (now - max(p.wall for p in health.pulses)) / SCALE


def test_nautilus_own_client_comes_back_too(market: MarketFiles) -> None:
    raw = records_of(market.mbo[0])
    instruments = read_dbn(market.mbo[0])[1]
    last = int(raw["ts_recv"][-1])

    async def session() -> tuple[Everything, Any]:
        async with playing(market.mbo, faults=[Fault("refuse"), Fault("drop", 9_000, 300)]) as gateway:
            done = asyncio.Event()
            actor = Everything([x.id for x in instruments], -1, done.set)
            actor.watch = lambda ts: done.set() if ts >= last else None
            await listen(gateway, instruments, lambda _: False, "nautilus", actors=[actor], done=done)
            return actor, gateway.counts

    actor, counts = asyncio.run(session())
    assert counts["refused"] == 1 and counts["sessions"] == 2
    told = sum(map(len, actor.deltas.values())) + sum(map(len, actor.trades.values()))
    assert len(raw) * 0.5 < told < (raw["action"] != ord("F")).sum()


def test_a_fault_can_be_asked_for_while_it_runs(market: MarketFiles) -> None:
    async def session() -> str:
        async with playing(market.mbo, speed=1e-3) as gateway:
            pieces = (await opened(gateway, ("mbo", ["KESTR"], {}))).pieces()
            await anext(pieces)
            url = f"http://127.0.0.1:{gateway.http_port}/fault"
            assert (await asyncio.to_thread(httpx.post, url, content="explode")).status_code == 422
            await asyncio.to_thread(httpx.post, url, content="drop@0:5")
            gateway.go(gateway.tape.first + 5 * SCALE, 1e-3)
            try:
                while True:
                    await anext(pieces)
            except BrokenError as e:
                return str(e)

    assert "closed the line" in asyncio.run(session())


@pytest.mark.parametrize("kind", ["skip", "reorder"])
def test_a_fault_takes_its_records_in_a_row_at_whatever_pace(market: MarketFiles, kind: str) -> None:
    raw = records_of(market.mbo[0])

    async def session() -> bytes:
        async with playing(market.mbo, speed=1_000.0, hold=False, faults=[Fault(kind, 1_000, 300)]) as gateway:
            wire = await opened(gateway, ("mbo", list(market.symbols), {}))
            got = b""
            with contextlib.suppress(BrokenError):  # its end
                async for data, at in wire.pieces():
                    got += b"".join(data[a : a + raw.itemsize].tobytes() for a in at if data[a + 1] == MBO_TYPE)
            return got

    middle = raw[:0] if kind == "skip" else raw[1_000:1_300][::-1]
    assert asyncio.run(session()) == np.concatenate([raw[:1_000], middle, raw[1_300:]]).tobytes()


def test_faults_are_written_in_one_way() -> None:
    assert Fault.parse("stall@5000:2.5") == Fault("stall", 5_000, 2.5)
    assert Fault.parse("refuse:2") == Fault("refuse", 0, 2)
    with pytest.raises(InputError, match=", ".join(KINDS)):
        Fault.parse("explode@1")


def test_a_refusal_passes(market: MarketFiles) -> None:
    async def session() -> None:
        async with playing(market.mbo, faults=[Fault("refuse", 0, 2)]) as gateway:
            for _ in range(2):
                with pytest.raises(RefusedError):
                    await connect("127.0.0.1", gateway.port, DEMO_KEY, gateway.tape.dataset)
            got = await taken(await opened(gateway, ("mbo", ["KESTR"], {})), lambda r: len(r) > 100)
            assert len(got) > 100

    asyncio.run(session())


def test_a_client_that_takes_nothing_is_let_go(market: MarketFiles, tmp_path: Path) -> None:
    """More waits for it than fits the line's buffers: after the gateway's patience the line is cut, and others are not held up."""

    async def session() -> tuple[int, int]:
        async with playing(market.mbo, patience_s=0.5) as gateway:
            symbols = list(market.symbols)
            stuck = await opened(gateway, *[(s, symbols, {}) for s in ("mbo", "mbp-10")])
            stuck._reader._transport.pause_reading()  # type: ignore[attr-defined]
            await gateway.clock.started.wait()
            got = await taken(await opened(gateway, ("mbo", symbols, {"start": 0})), lambda r: len(r) > 20_000)
            while len(gateway._sessions):
                await asyncio.sleep(0.05)
            stuck.close()
            return len(got), len(gateway._sessions)

    got, left = asyncio.run(session())
    assert got > 20_000 and left == 0
