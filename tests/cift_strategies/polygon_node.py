"""A real node with the Polygon client, an actor that keeps what it gets, and records as the service writes them."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any

from nautilus_trader.common import DataActor, DataActorConfig, Environment, LoggerConfig, LogLevel
from nautilus_trader.live import LiveNode
from nautilus_trader.model import ActorId, TraderId
from polygon_server import KEY, WAIT, Server

from catalog.events import SCALE, Instrument
from cift_strategies.feeds import polygon
from cift_strategies.feeds.polygon_reader import Patience

AAPL = Instrument("AAPL.POLYGON", SCALE // 100, SCALE, 1.0, "USD", "09:30-16:00 America/New_York", 4, 0, "equity", level=1)
MSFT = Instrument("MSFT.POLYGON", SCALE // 100, SCALE, 1.0, "USD", "09:30-16:00 America/New_York", 4, 0, "equity", level=1)
BTC = Instrument("BTCUSD.POLYGON", SCALE // 100, 10, 1.0, "USD", None, 2, 8, "currency_pair", level=2)
QUICK = Patience(first=0.02, most=0.1, crowded=0.1, steady=10.0)
T0 = 1_790_000_000_000  # ms


def quote(n: int, symbol: str = "AAPL", **kw: Any) -> dict[str, Any]:
    return {
        "ev": "Q", "sym": symbol, "bx": 4, "bp": 100.0 + n % 50 / 100, "bs": 100 + n % 7, "ax": 7, "ap": 100.02 + n % 50 / 100, "as": 160,
        "c": 0, "i": [604], "t": T0 + n, "q": n, "z": 3, **kw,
    }  # fmt: skip


def trade(n: int, symbol: str = "AAPL", **kw: Any) -> dict[str, Any]:
    return {"ev": "T", "sym": symbol, "x": 4, "i": f"t{n}", "z": 3, "p": 100.01, "s": 50, "c": [0], "t": T0 + n, "q": n, **kw}


class Watcher(DataActor):
    """Subscribes what it is told, keeps what it gets; `until` waits for it in the test's own coroutine."""

    def __new__(cls, *_args: Any) -> Watcher:
        return super().__new__(cls)

    def __init__(self, start: Callable[[Watcher], None]) -> None:
        super().__init__(DataActorConfig(actor_id=ActorId("WATCHER")))
        self.start_with, self.got = start, list[Any]()
        self.on_one: Callable[[Any], None] = lambda _: None
        self.news = asyncio.Event()

    def on_start(self) -> None:
        self.start_with(self)

    def _got(self, what: Any) -> None:
        self.got.append(what)
        self.on_one(what)
        self.news.set()

    on_quote = on_trade = on_bar = on_book_deltas = on_index_price = on_instrument = _got

    def of(self, kind: str) -> list[Any]:
        return [x for x in self.got if type(x).__name__ == kind]


async def until(watcher: Watcher, true: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT):
        while not true():
            watcher.news.clear()
            try:
                await asyncio.wait_for(watcher.news.wait(), 0.05)
            except TimeoutError:
                continue


def live(
    server: Server, symbols: list[str], instruments: list[Instrument], start: Callable[[Watcher], None],
    body: Callable[[Watcher, polygon.Link], Any], **kw: Any,
) -> tuple[list[Any], polygon.Link]:
    """Run a node with the client and a watcher until `body` is through, or the node gives up; what the watcher got, and the link."""
    factory, config = polygon.client(symbols, kw.pop("key", KEY), instruments=instruments, feed=server.feed, **{"patience": QUICK, **kw})
    node = (
        LiveNode.builder("TEST", TraderId("TEST-001"), Environment.SANDBOX)
        .with_logging(LoggerConfig(stdout_level=LogLevel.OFF))
        .with_timeout_connection(60)
        .with_timeout_disconnection_secs(10)
        .with_delay_post_stop_secs(0)
        .with_reconciliation(False)
        .add_data_client(polygon.NAME, factory, config)
        .build()
    )

    watcher = Watcher(start)
    node.add_actor(watcher)
    asyncio.run(run(node, body(watcher, config.link)))
    del node
    gc.collect()  # one node at a time
    return watcher.got, config.link


async def run(node: LiveNode, body: Any) -> None:
    running, work = asyncio.ensure_future(node.run_async()), asyncio.ensure_future(body)
    try:
        await asyncio.wait((running, work), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
        work.cancel()
    finally:
        node.handle().stop()
        await asyncio.wait((running,), timeout=WAIT)
        if running.done():
            running.exception()  # a node whose client cannot connect says so here; the link says why


async def aside(work: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.to_thread(work, *args)
