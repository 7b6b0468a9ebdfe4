"""Live data from Polygon (now Massive): a Nautilus data client over its WebSocket, one reader process a cluster.

Takes symbols; :func:`client` gives what a node's builder wants. Q, T, A and AM of stocks and options, XQ, XT, XA, XAS and XL2 of crypto,
V, A and AM of indices become quotes, trades, bars, book deltas and index prices. Symbols come and go while it runs. The socket is read in
:mod:`cift_strategies.feeds.polygon_reader`, apart from the node; here rows become Nautilus objects, no faster than the node takes them.

Times. `ts_event` is the service's stamp (milliseconds), `ts_init` when the frame was received, moved forward by single nanoseconds so that
it grows with every record: sorted by it a recording has the order in which the node saw them.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from nautilus_trader.common import Logger
from nautilus_trader.config import DataClientConfig
from nautilus_trader.live import InstrumentResponse, RoutingConfig
from nautilus_trader.live.clients import DataClientFactory, MarketDataClient
from nautilus_trader.model import (
    FIXED_PRECISION,
    AggressorSide,
    Bar,
    BarType,
    BookAction,
    BookOrder,
    IndexPriceUpdate,
    InstrumentId,
    OrderBookDelta,
    OrderBookDeltas,
    OrderSide,
    Price,
    Quantity,
    QuoteTick,
    TradeId,
    TradeTick,
    Venue,
)
from polygon.rest import ENV_KEY  # type: ignore[import-untyped]
from polygon.websocket import Feed  # type: ignore[import-untyped]

from catalog.errors import InputError
from catalog.events import F_LAST, Instrument
from catalog.polygon import VENUE
from cift_strategies.feeds import polygon_instruments as listed
from cift_strategies.feeds.health import Health
from cift_strategies.feeds.polygon_cluster import Cluster
from cift_strategies.feeds.polygon_instruments import instruments as instruments
from cift_strategies.feeds.polygon_reader import Patience
from cift_strategies.feeds.polygon_wire import BAR, DUPLICATE, GAP, LATE, LEVEL, MARKETS, QUOTE, ROW, TRADE, VALUE, Listing

NAME: Final = "POLYGON"
ENV_FEED: Final = "POLYGON_FEED"  # another host that speaks the protocol: ws://127.0.0.1:8765
BACKLOG: Final = 64 << 20  # bytes of frames that may wait for a slow node
AHEAD: Final = 4_096  # records the node may be behind before the next are made
STEP: Final = 256  # records between two turns of the node
GLANCE_S: Final = 0.001  # between two looks whether it has caught up
UNSEEN_S: Final = 0.005  # for half of AHEAD, where that cannot be seen
PATIENCE_S: Final = 5.0  # with a node that does not show that it has caught up
_UNIT: Final = 10 ** (FIXED_PRECISION - 9)
_SIDE: Final = {1: OrderSide.BUY, -1: OrderSide.SELL, 0: OrderSide.NO_ORDER_SIDE}
_AGGRESSOR: Final = {1: AggressorSide.BUY, -1: AggressorSide.SELL, 0: AggressorSide.NO_AGGRESSOR}
_ACTION: Final = {ord("A"): BookAction.ADD, ord("M"): BookAction.UPDATE, ord("C"): BookAction.DELETE, ord("R"): BookAction.CLEAR}


@dataclass(slots=True)
class Link:
    """What a runner may look at while the client works, and after it failed."""

    health: Health
    fault: InputError | None = None  # what the user has to mend: a refused key, a plan that does not include a channel
    said: deque[str] = field(default_factory=lambda: deque(maxlen=100))  # its warnings and errors
    denied: list[str] = field(default_factory=list)  # what the service said about subscriptions it does not allow
    clusters: dict[str, dict[str, Any]] = field(default_factory=dict)  # market -> its reader's newest counts
    records: int = 0  # given to the node
    behind_ns: int = 0  # from the receipt of the newest record to its delivery
    waits: int = 0  # looks at the node while it was behind

    def statistics(self) -> dict[str, Any]:
        """messages, bytes, lag_ns (stamp to receipt), reconnects, dropped frames; by cluster and in all; what was left out, by reason."""
        kinds: Counter[str] = Counter()
        for c in self.clusters.values():
            kinds.update(c.get("kinds", {}))
        summed = ("bytes", "frames", "dropped_frames", "dropped_bytes", "reconnects")
        total = {n: sum(c.get(n, 0) for c in self.clusters.values()) for n in summed}
        return {
            "messages": kinds.pop("messages", 0), **total, "lag_ns": max((c.get("lag_ns", 0) for c in self.clusters.values()), default=0),
            "records": self.records, "behind_ns": self.behind_ns, "waits": self.waits, "kinds": dict(kinds),
            "denied": list(self.denied), "clusters": dict(self.clusters), "health": self.health.counts(),
        }  # fmt: skip


class PolygonConfig(DataClientConfig):
    """See :func:`client`, which makes it. The key is not in it."""

    def __new__(cls, **kw: Any) -> PolygonConfig:
        return super().__new__(cls, routing=kw.get("routing"))

    def __init__(
        self, *, symbols: Sequence[str], instruments: Sequence[Instrument], feed: str, exchange: int, backlog: int, patience: Patience,
        timeout_s: float, link: Link, routing: RoutingConfig | None = None,
    ) -> None:  # fmt: skip
        self.symbols, self.instruments, self.feed, self.exchange = tuple(symbols), tuple(instruments), feed, exchange
        self.backlog, self.patience, self.timeout_s, self.link = backlog, patience, timeout_s, link


class PolygonFactory(DataClientFactory):
    """Makes the client; holds the key, so that it is in no configuration."""

    def __init__(self, key: str) -> None:
        self._key = key

    def create(self, *, name: str, config: Any, cache: Any, clock: Any) -> PolygonClient:  # type: ignore[override]
        return PolygonClient(self._key, name=name, config=config, cache=cache, clock=clock)


def client(
    symbols: Sequence[str], key: str | None = None, *, instruments: Sequence[Instrument] | None = None, feed: str | None = None,
    exchange: int = listed.COINBASE, backlog: int = BACKLOG, patience: Patience | None = None, timeout_s: float = 20.0,
    health: Health | None = None, default: bool = True,
) -> tuple[PolygonFactory, PolygonConfig]:  # fmt: skip
    """(factory, config) for `LiveNode.builder(...).add_data_client(NAME, factory, config)`.

    `symbols`: as Polygon writes them; options (O:) and indices (I:) need no definition. `instruments`: those of the stocks and pairs among
    them, in order; asked of the REST API where None. `feed`: host of the WebSocket, `ws://` for one without TLS (default: the variable
    POLYGON_FEED, else the real-time feed). `exchange`: Polygon's number of the crypto exchange whose quotes, trades and books are taken;
    0: trades and quotes of all, then no books. `backlog`: bytes of frames that may wait. `timeout_s`: for the first connection.
    `default`: every instrument that no other client takes is asked of this one. `config.link` tells how it goes.

    Raises InputError: no key (argument or POLYGON_API_KEY), a symbol of no known form, or what :func:`instruments` raises.
    """
    key = (os.environ.get(ENV_KEY, "") if key is None else key).strip()
    if not key:
        raise InputError(f"no Polygon key: set the environment variable {ENV_KEY}")
    symbols = tuple(dict.fromkeys(symbols))
    traded = [s for s in symbols if listed.market(s) in ("stocks", "crypto")]
    known = listed.instruments(traded, key=key) if instruments is None else list(instruments)
    if [x.id for x in known] != [listed.id_of(s) for s in traded]:
        raise InputError(f"instruments {', '.join(x.id for x in known)} do not belong to the symbols {', '.join(traded)}, in their order")
    config = PolygonConfig(
        symbols=symbols, instruments=known, feed=(feed or os.environ.get(ENV_FEED) or str(Feed.RealTime.value)).rstrip("/"),
        exchange=exchange, backlog=backlog, patience=patience or Patience(), timeout_s=timeout_s,
        link=Link(health or Health([listed.id_of(s) for s in symbols])), routing=RoutingConfig(default=default),
    )  # fmt: skip
    return PolygonFactory(key), config


class PolygonClient(MarketDataClient):
    """The data client; made by :class:`PolygonFactory`."""

    config: PolygonConfig

    def __init__(self, key: str, *, name: str, config: PolygonConfig, cache: Any, clock: Any) -> None:
        super().__init__(name=name, config=config, cache=cache, clock=clock, venue=Venue(VENUE))
        self._key, self._link, self._log = key, config.link, Logger(name)
        self._defined = {x.id: x for x in config.instruments}
        self._symbols: dict[InstrumentId, str] = {}
        self._ids: list[InstrumentId] = []
        self._digits: list[tuple[int, int]] = []
        self._index: dict[InstrumentId, int] = {}
        self._bars: dict[tuple[int, int], BarType] = {}
        self._open: list[list[OrderBookDelta]] = []
        self._clusters: dict[str, Cluster] = {}
        self._pulse: list[int] = []  # rows of the health table
        self._ahead = 0  # records made since the last look
        self._newest = 0  # ts_init of the newest record made
        self._mark: tuple[str, InstrumentId, int] | None = None  # the newest record whose arrival can be seen in the cache
        self._half: tuple[str, InstrumentId, int] | None = None  # the last such of the half of AHEAD before
        self._pace = asyncio.Lock()
        for symbol in config.symbols:
            self._know(symbol)

    def _know(self, symbol: str) -> int:
        id_ = InstrumentId.from_str(listed.id_of(symbol))
        if id_ not in self._index:
            self._symbols[id_] = symbol
            self._index[id_] = len(self._ids)
            self._ids.append(id_)
            self._digits.append(listed.digits_of(symbol, self._defined.get(str(id_))))
            self._open.append([])
            self._pulse.append(self._link.health.row(str(id_)))
        return self._index[id_]

    # --- connection -------------------------------------------------------------------------------------------------------------------

    async def _connect(self) -> None:
        for symbol in self.config.symbols:
            self._handle_instrument(listed.nautilus_object(symbol, self._defined.get(listed.id_of(symbol))))
        wanted = [self._cluster(m) for m in dict.fromkeys(listed.market(s) for s in self.config.symbols)]
        try:
            await asyncio.wait_for(asyncio.gather(*(c.up.wait() for c in wanted)), self.config.timeout_s)
        except TimeoutError:
            late = next(c for c in wanted if not c.up.is_set())
            where = f"Polygon's {late.market} feed at {self.config.feed}"
            self._fail(f"{where} cannot be reached ({late.why}): check the network and try again")
        if self._link.fault is not None:
            await self._disconnect()
            raise self._link.fault

    async def _disconnect(self) -> None:
        clusters, self._clusters = list(self._clusters.values()), {}
        await asyncio.gather(*(c.close() for c in clusters))

    def _cluster(self, market: str) -> Cluster:
        if market not in self._clusters:
            c = self.config
            self._clusters[market] = cluster = Cluster(market, self._key, c.feed, c.backlog, c.patience, self)
            self.create_task(self._run(cluster), f"polygon-{market}")
        return self._clusters[market]

    async def _run(self, cluster: Cluster) -> None:
        try:
            await cluster.run()
        finally:
            await cluster.close()

    def _fail(self, why: str) -> None:
        if self._link.fault is None:
            self._link.fault = InputError(why)
        self._link.said.append(why)
        self._log.error(why)

    def note(self, cluster: Cluster, note: dict[str, Any]) -> None:
        """What a reader tells besides rows."""
        event, market, health = note["event"], cluster.market, self._link.health
        if event == "counts":
            self._link.clusters[market] = {k: v for k, v in note.items() if k != "event"}
            health.dropped = sum(c.get("dropped_frames", 0) for c in self._link.clusters.values())
        elif event == "connected":
            cluster.up.set()
            if note["time"] or cluster.crashes:
                health.reconnects += 1
                self._gap(market, "reconnect")
        elif event == "dropped":
            self._gap(market, "dropped")
            self._say(f"{note['frames']:,} frames of Polygon's {market} feed were dropped: the node is too slow for it")
        elif event == "lost":
            cluster.why = note["why"]
            self._say(f"Polygon's {market} feed is lost ({note['why']}): connecting again in {note['wait']:.1f} s")
        elif event == "refused":
            self._fail(f"Polygon refused the key in {ENV_KEY} ({note['why']}): set the key of an active account with WebSocket access")
            cluster.up.set()
        elif event == "crowded":
            cluster.why = "max_connections: the account's connections are all in use"
            self._say(
                f"Polygon allows this account no further connection to {market} (one a cluster): stop the other program that holds it; "
                f"asking again in {note['wait']:.0f} s"
            )
        elif event == "status" and note["status"] not in ("max_connections", "auth_failed", "auth_timeout"):
            if note["status"] in ("error", "not_authorized", "auth_required"):
                self._link.denied.append(note["message"])
                self._fail(f"Polygon does not allow a subscription ({note['message']}): use a plan that includes it, or leave it out")
            else:  # slow_consumer, force_disconnect: the line is lost next
                self._say(f"Polygon's {market} feed says {note['status']}: {note['message']}")

    def _gap(self, market: str, why: str) -> None:
        for id_, symbol in self._symbols.items():
            if listed.market(symbol) == market:
                self._link.health.gap(self._pulse[self._index[id_]], why=why)

    def _say(self, what: str) -> None:
        self._link.said.append(what)
        self._log.warning(what)

    # --- subscriptions ----------------------------------------------------------------------------------------------------------------

    async def _want(self, kind: str, id_: InstrumentId) -> None:
        try:
            await self._subscribe_to(kind, id_)
        except InputError as e:
            self._fail(str(e))
            raise

    async def _subscribe_to(self, kind: str, id_: InstrumentId) -> None:
        k, symbol = await self._found(id_)
        market = listed.market(symbol)
        if kind not in MARKETS[market]:
            raise InputError(f"Polygon has no {kind} of {symbol}: its {market} feed offers {', '.join(MARKETS[market])}")
        if kind == "book" and not self.config.exchange:
            raise InputError(f"the books of {symbol} differ from exchange to exchange: choose one (exchange=1 is Coinbase)")
        exchange = self.config.exchange if market == "crypto" else 0
        self._cluster(market).add(MARKETS[market][kind], listed.topic(symbol), Listing(k, *self._digits[k], exchange))

    async def _found(self, id_: InstrumentId) -> tuple[int, str]:
        """Row and symbol of an instrument; one that was not named before is asked of the REST API."""
        if id_ not in self._index:
            known = self.cache.instrument(id_)
            symbol = str(known.raw_symbol) if known is not None else str(id_.symbol)
            if listed.market(symbol) in ("stocks", "crypto"):
                [self._defined[str(id_)]] = await asyncio.to_thread(listed.instruments, [symbol], key=self._key)
            self._know(symbol)
            self._handle_instrument(listed.nautilus_object(symbol, self._defined.get(str(id_))))
        return self._index[id_], self._symbols[id_]

    def _leave(self, kind: str, id_: InstrumentId) -> None:
        if (symbol := self._symbols.get(id_)) is not None and (cluster := self._clusters.get(listed.market(symbol))) is not None:
            cluster.remove(MARKETS[listed.market(symbol)][kind], listed.topic(symbol))

    async def _subscribe_instruments(self, command: Any) -> None:
        pass  # given at the start

    async def _subscribe_instrument(self, command: Any) -> None:
        await self._found(command.instrument_id)

    async def _request_instrument(self, request: Any) -> None:
        await self._found(request.instrument_id)
        symbol = self._symbols[request.instrument_id]
        found = listed.nautilus_object(symbol, self._defined.get(str(request.instrument_id)))
        self._handle_response(
            InstrumentResponse(self.client_id, request.instrument_id, found, request.request_id, self.clock.timestamp_ns())
        )  # fmt: skip

    async def _subscribe_quotes(self, command: Any) -> None:
        await self._want("quotes", command.instrument_id)

    async def _subscribe_trades(self, command: Any) -> None:
        await self._want("trades", command.instrument_id)

    async def _subscribe_book_deltas(self, command: Any) -> None:
        await self._want("book", command.instrument_id)

    async def _subscribe_index_prices(self, command: Any) -> None:
        await self._want("values", command.instrument_id)

    async def _subscribe_bars(self, command: Any) -> None:
        seconds = _seconds(command.bar_type)
        id_ = command.bar_type.instrument_id
        await self._want(f"bars-{seconds}", id_)
        self._bars[self._index[id_], seconds] = command.bar_type

    async def _unsubscribe_quotes(self, command: Any) -> None:
        self._leave("quotes", command.instrument_id)

    async def _unsubscribe_trades(self, command: Any) -> None:
        self._leave("trades", command.instrument_id)

    async def _unsubscribe_book_deltas(self, command: Any) -> None:
        self._leave("book", command.instrument_id)

    async def _unsubscribe_index_prices(self, command: Any) -> None:
        self._leave("values", command.instrument_id)

    async def _unsubscribe_bars(self, command: Any) -> None:
        self._leave(f"bars-{_seconds(command.bar_type)}", command.bar_type.instrument_id)

    async def _unsubscribe_instruments(self, command: Any) -> None:
        pass

    async def _unsubscribe_instrument(self, command: Any) -> None:
        pass

    # --- records ----------------------------------------------------------------------------------------------------------------------

    async def rows(self, rows: bytes, ids: bytes) -> None:
        """Rows of a reader -> Nautilus objects -> the node, which is waited for when it falls behind."""
        names = iter(ids.decode().split("\n"))
        async with self._pace:
            for n in range(0, len(rows), STEP * ROW.size):
                self._give(rows[n : n + STEP * ROW.size], names)
                await self._wait()

    def _give(self, rows: bytes, names: Iterator[str]) -> None:
        give, symbols, digits, unit, newest = self._handle_data, self._ids, self._digits, _UNIT, self._newest
        count, last = [0] * len(symbols), [0] * len(symbols)
        received = 0
        for kind, side, k, aux, a, b, c, d, e, ts, received in ROW.iter_unpack(rows):
            if kind >= GAP:
                self._count(kind, k, a)
                continue
            if kind != LEVEL or not self._open[k]:  # the changes of one book are known at once
                newest = received if received > newest else newest + 1
            id_, (pd, sd) = symbols[k], digits[k]
            count[k] += 1
            last[k] = ts
            if kind == QUOTE:
                give(QuoteTick.from_raw(id_, a * unit, b * unit, pd, pd, c * unit, d * unit, sd, sd, ts, newest))
                self._mark = ("quote", id_, newest)
            elif kind == LEVEL:
                order = BookOrder(_SIDE[side], Price.from_raw(a * unit, pd), Quantity.from_raw(b * unit, sd), 0)
                self._open[k].append(OrderBookDelta(id_, _ACTION[c], order, d, 0, ts, newest))
                if d & F_LAST:
                    give(OrderBookDeltas(id_, self._open[k]))
                    self._open[k] = []
                    self._mark = ("book", id_, newest)
            elif kind == TRADE:
                give(TradeTick.from_raw(id_, a * unit, pd, b * unit, sd, _AGGRESSOR[side], TradeId(next(names)), ts, newest))
            elif kind == BAR:
                if (bar := self._bars.get((k, aux))) is not None:
                    first, high, low, final = (Price.from_raw(x * unit, pd) for x in (a, b, c, d))
                    give(Bar(bar, first, high, low, final, Quantity.from_raw(e * unit, sd), ts, newest))
            elif kind == VALUE:
                give(IndexPriceUpdate(id_, Price.from_raw(a * unit, pd), ts, newest))
        self._newest = newest
        if received:
            for k, n in enumerate(count):
                if n:
                    self._link.health.seen(self._pulse[k], last[k], received, n)
            self._ahead += (made := sum(count))
            self._link.records += made
            self._link.behind_ns = self.clock.timestamp_ns() - received

    def _count(self, kind: int, k: int, missing: int) -> None:
        pulse = self._link.health.pulses[self._pulse[k]]
        if kind == GAP:
            self._link.health.gap(self._pulse[k], missing)
        elif kind == LATE:
            pulse.late += 1
        elif kind == DUPLICATE:
            pulse.duplicates += 1

    async def _wait(self) -> None:
        """Let the node work, and wait while it is more than about :data:`AHEAD` records behind, as its own queue has no end.

        How far it is shows in its cache, where quotes and books lie. Trades leave no trace there: they are given time instead.
        """
        await asyncio.sleep(0)
        if self._ahead < AHEAD // 2:
            return
        half, self._half, self._mark, self._ahead = self._half, self._mark, None, 0
        if half is None:
            if self._half is None:
                await asyncio.sleep(UNSEEN_S)
            return
        loop = asyncio.get_running_loop()
        patience = loop.time() + PATIENCE_S
        while not self._arrived(*half) and loop.time() < patience:
            self._link.waits += 1
            await asyncio.sleep(GLANCE_S)

    def _arrived(self, kind: str, id_: InstrumentId, ts: int) -> bool:
        if kind == "quote":
            quote = self.cache.quote(id_)
            return quote is not None and quote.ts_init >= ts
        book = self.cache.order_book(id_)
        return book is None or book.ts_last >= ts


def _seconds(bar: BarType) -> int:
    spec = str(bar.spec)
    found = {"1-SECOND-LAST": 1, "1-MINUTE-LAST": 60}.get(spec)
    if found is None or not bar.is_externally_aggregated():
        raise InputError(f"Polygon streams bars of 1-SECOND-LAST-EXTERNAL and 1-MINUTE-LAST-EXTERNAL, not {bar}")
    return found
