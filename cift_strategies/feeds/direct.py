"""Our data client of Databento's live protocol: what a node receives from it are the rows that an import of the same records gives.

Takes records of a :class:`~.wire.Wire`; gives Nautilus order book deltas, trades, quotes and instruments. As :mod:`catalog.importer` does,
`ts_event` is the venue's stamp, `ts_init` the time of capture, moved so that the venue's order is kept; a cancel of a part of an order
becomes an update; unknown orders are counted. Every (re)connection asks for a snapshot of the book; a line that brings gaps or disorder is
taken for lost and made anew.
"""

from __future__ import annotations

import asyncio
import importlib
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from nautilus_trader.common import Logger
from nautilus_trader.config import DataClientConfig
from nautilus_trader.live import InstrumentResponse, RoutingConfig
from nautilus_trader.live.clients import DataClientFactory, MarketDataClient
from nautilus_trader.model import (
    FIXED_PRECISION,
    AggressorSide,
    BookAction,
    BookOrder,
    InstrumentId,
    InstrumentStatus,
    MarketStatusAction,
    OrderBookDelta,
    OrderBookDeltas,
    OrderSide,
    Price,
    Quantity,
    QuoteTick,
    TradeId,
    TradeTick,
)
from numpy.typing import NDArray

from catalog.dbn import MBO
from catalog.definitions import Definition, definition
from catalog.errors import InputError
from catalog.events import CLEAR, F_LAST, F_MBP, F_SNAPSHOT, F_TOB, TRADE, Instrument
from catalog.importer import nautilus_instrument
from catalog.status import ACTIONS
from cift_strategies.feeds.health import Health
from cift_strategies.feeds.rows import Rows
from cift_strategies.feeds.wire import BrokenError, RefusedError, Wire, connect

Array = NDArray[Any]
SETTLE_S: Final = 0.05  # a node makes its subscriptions one by one
PIECE: Final = 4_096  # records that become rows at once
STEP: Final = 512  # events handed on between two turns of the node's loop
TURN: Final = 16  # records that the node takes in a turn, as a rule
AHEAD: Final = 1_024  # events that may wait in the node before the line is read on
BEHIND: Final = 256  # events that wait in the node from which on changes of one book are told together
PATIENCE_S: Final = 2.0  # without progress, after which what waits in the node is taken for dropped
WAITS: Final = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds before the next try to connect
REFUSALS: Final = 3  # in a row, before the key is taken for wrong
NUMBERED: Final = 1_000  # records from which on it can be told whether the feed delivers every sequence number
GAP_SHARE: Final = 0.01  # a feed that skips more of its numbers numbers more than we are sent
MBO_TYPE, STATUS_TYPE, DEFINITION_TYPE, ERROR_TYPE, MAPPING_TYPE, SYSTEM_TYPE = 0xA0, 0x12, 0x13, 0x15, 0x16, 0x17
LEVELS: Final = {0x00: "trades", 0x01: "mbp-1", 0x0A: "mbp-10"}
UNIT: Final = 10 ** (FIXED_PRECISION - 9)
_ACTION: Final = {ord("A"): BookAction.ADD, ord("M"): BookAction.UPDATE, ord("C"): BookAction.DELETE, CLEAR: BookAction.CLEAR}
_SIDE: Final = {1: OrderSide.BUY, -1: OrderSide.SELL, 0: OrderSide.NO_ORDER_SIDE}
_AGGRESSOR: Final = {1: AggressorSide.BUY, -1: AggressorSide.SELL, 0: AggressorSide.NO_AGGRESSOR}
_dbn: Any = importlib.import_module("databento_dbn")


@dataclass(slots=True)
class Link:
    """What a runner may look at while the client works, and after it failed."""

    health: Health
    fault: InputError | None = None  # what the user has to mend
    said: deque[str] = field(default_factory=lambda: deque(maxlen=100))  # warnings, and messages of the gateway
    counts: Counter[str] = field(default_factory=Counter)  # records by kind, sessions, partial cancels, orders of snapshots
    taken: Callable[[], int] | None = None  # how many events the node has worked off, where somebody knows
    room: Callable[[], Awaitable[None]] | None = None  # waits for who works on what the node has worked off, where the line can wait
    ahead: int = 0  # most events that have waited in the node, where that is known

    def statistics(self) -> dict[str, Any]:
        return {**self.counts, "health": self.health.counts()}


class DirectConfig(DataClientConfig):
    """See :func:`cift_strategies.feeds.databento.client`, which makes it. The key is not in it."""

    def __new__(cls, **kw: Any) -> DirectConfig:
        return super().__new__(cls, routing=RoutingConfig(default=True))

    def __init__(self, *, instruments: Sequence[Instrument], dataset: str, host: str, port: int, health: Health) -> None:
        self.instruments, self.dataset, self.host, self.port = tuple(instruments), dataset, host, port
        self.link = Link(health)


class DirectFactory(DataClientFactory):
    """Makes the client; holds the key, so that it is in no configuration."""

    def __init__(self, key: str) -> None:
        self._key = key

    def create(self, *, name: str, config: Any, cache: Any, clock: Any) -> DirectClient:  # type: ignore[override]
        return DirectClient(self._key, name=name, config=config, cache=cache, clock=clock)


class DirectClient(MarketDataClient):
    """The data client; made by :class:`DirectFactory`."""

    config: DirectConfig

    def __init__(self, key: str, *, name: str, config: DirectConfig, cache: Any, clock: Any) -> None:
        super().__init__(name=name, config=config, cache=cache, clock=clock)
        self._key, self._link, self._log = key, config.link, Logger(name)
        self._symbols = [x.id.rsplit(".", 1)[0] for x in config.instruments]
        self._ids = [InstrumentId.from_str(x.id) for x in config.instruments]
        self._index = {i: k for k, i in enumerate(self._ids)}
        self._rows = Rows(config.instruments)
        self._pulse = [config.link.health.row(x.id) for x in config.instruments]
        self._wanted: dict[str, list[str]] = {}
        self._wire: Wire | None = None
        self._running = False
        self._begin = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._task: Any = None
        self._open: list[list[OrderBookDelta]] = [[] for _ in self._ids]
        self._stamps = [0] * len(self._ids)  # of the newest delta of each
        prices: list[dict[int, Price]] = [{} for _ in self._ids]
        sizes: list[dict[int, Quantity]] = [{} for _ in self._ids]
        self._places = list(zip(self._ids, prices, sizes, self._open))
        self._bids: dict[int, tuple[Price, Quantity]] = {}
        self._sequence, self._steps, self._skips = 0, 0, 0
        self._newest = 0
        self._unknown = 0
        self._priced: set[int] = set()  # instruments of which the node knows a price of this session
        self._given = 0  # events handed to the node, less those that were taken back

    # --- connection -------------------------------------------------------------------------------------------------------------------

    async def _connect(self) -> None:
        for x in self.config.instruments:
            self._handle_instrument(nautilus_instrument(Definition(x, x.id.rsplit(".", 1)[0])))
        self._wire = await self._try()
        self._task = self.create_task(self._run(), "databento")

    async def _disconnect(self) -> None:
        if self._wire is not None:
            self._wire.close()
        if self._task is not None:
            self._task.cancel()

    async def _try(self) -> Wire:
        """Connect; wait and try again where nobody answers. Raises InputError where the key is refused."""
        where, refused = f"{self.config.host}:{self.config.port}", 0
        for n in range(1_000_000):
            try:
                return await connect(self.config.host, self.config.port, self._key, self.config.dataset)
            except RefusedError as e:
                refused += 1
                why = str(e)
                if refused == REFUSALS:
                    self._link.fault = InputError(f"Databento refused the key or the dataset {self.config.dataset} ({why}): check both")
                    self._say(str(self._link.fault))
                    raise self._link.fault from None
            except (OSError, TimeoutError) as e:
                why = str(e) or type(e).__name__
            wait = WAITS[min(n, len(WAITS) - 1)]
            self._say(f"Databento's gateway at {where} cannot be reached ({why}): trying again in {wait:g} s")
            await asyncio.sleep(wait)
        raise AssertionError

    async def _run(self) -> None:
        await self._begin.wait()
        while True:
            assert self._wire is not None
            try:
                await self._session(self._wire)
            except (BrokenError, OSError) as e:
                self._say(f"the line to Databento is lost ({e}): connecting again")
            finally:
                self._running = False
                self._wire.close()
            for group in self._open:
                self._given -= len(group)
                group.clear()
            self._wire = await self._try()
            self._link.health.reconnected()

    async def _session(self, wire: Wire) -> None:
        self._link.counts["sessions"] += 1
        self._sequence, self._steps, self._skips, self._newest = 0, 0, 0, 0
        self._priced.clear()
        for schema, symbols in self._wanted.items():
            wire.subscribe(schema, symbols, snapshot=schema == "mbo")
        wire.start()
        self._running = True
        async for data, at in wire.pieces():
            await self._take(data, at)

    def _say(self, what: str) -> None:
        self._link.said.append(what)
        self._log.warning(what)

    # --- subscriptions ----------------------------------------------------------------------------------------------------------------

    def _want(self, schema: str, id_: InstrumentId) -> None:
        if id_ not in self._index:
            raise InputError(f"{id_} is none of the client's instruments")
        symbol = self._symbols[self._index[id_]]
        if symbol in (known := self._wanted.setdefault(schema, [])):
            return
        known.append(symbol)
        if self._running and self._wire is not None:
            self._wire.subscribe(schema, [symbol], snapshot=schema == "mbo")
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(SETTLE_S, self._begin.set)

    async def _subscribe_book_deltas(self, command: Any) -> None:
        level = self.config.instruments[self._index[command.instrument_id]].level if command.instrument_id in self._index else 3
        self._want("mbo" if level == 3 else "mbp-10", command.instrument_id)

    async def _subscribe_quotes(self, command: Any) -> None:
        self._want("mbp-1", command.instrument_id)

    async def _subscribe_trades(self, command: Any) -> None:
        k = self._index.get(command.instrument_id, -1)
        if k >= 0 and self.config.instruments[k].level > 0:
            return  # they come with the orders, levels or quotes
        self._want("trades", command.instrument_id)

    async def _subscribe_instrument(self, command: Any) -> None:
        self._want("definition", command.instrument_id)

    async def _subscribe_instrument_status(self, command: Any) -> None:
        self._want("status", command.instrument_id)

    async def _subscribe_instruments(self, command: Any) -> None:
        pass  # given at the start

    async def _unsubscribe_book_deltas(self, command: Any) -> None:
        pass  # the service knows no unsubscribing; the node passes over what nobody wants

    _unsubscribe_quotes = _unsubscribe_trades = _unsubscribe_instrument = _unsubscribe_instruments = _unsubscribe_book_deltas
    _unsubscribe_instrument_status = _unsubscribe_book_deltas

    async def _request_instrument(self, request: Any) -> None:
        x = self.config.instruments[self._index[request.instrument_id]]
        found = nautilus_instrument(Definition(x, x.id.rsplit(".", 1)[0]))
        now = self.clock.timestamp_ns()
        self._handle_response(InstrumentResponse(self.client_id, request.instrument_id, found, request.request_id, now))

    # --- records ----------------------------------------------------------------------------------------------------------------------

    async def _take(self, data: Array, at: Array) -> None:
        """Records in order, runs of one type at a time; the node gets its turns between."""
        types = data[at + 1]
        cuts = np.flatnonzero(np.diff(types)) + 1
        for a, b in zip([0, *cuts.tolist()], [*cuts.tolist(), len(at)]):
            for n in range(a, b, PIECE):
                m = min(b, n + PIECE)
                last = int(at[m]) if m < len(at) else len(data)
                await self._run_of(int(types[a]), data[int(at[n]) : last], m - n)

    async def _turns(self, handed: int) -> None:
        """Let the node work: until few enough events wait there, where we are told; else as long as `handed` messages take, as a rule."""
        if self._link.room is not None:
            await self._link.room()
        if (taken := self._link.taken) is None:
            for _ in range(1 + handed // TURN):
                await asyncio.sleep(0)
            return
        await asyncio.sleep(0)
        before, until = taken(), time.monotonic() + PATIENCE_S
        self._link.ahead = max(self._link.ahead, self._given - before)
        while self._given - before > AHEAD:
            await asyncio.sleep(0)
            if (now := taken()) != before:
                before, until = now, time.monotonic() + PATIENCE_S
            elif time.monotonic() > until:
                self._given = now

    async def _run_of(self, kind: int, data: Array, n: int) -> None:
        """Hand on `n` records of one type."""
        if kind == MBO_TYPE:
            mbo = np.ascontiguousarray(data).view(MBO)
            self._follow(mbo)
            await self._give(self._opened(self._rows.orders(mbo)))
        elif kind in LEVELS:
            await self._give(self._rows.levels(data.reshape(n, -1), LEVELS[kind]))
        else:
            decoder = _dbn.DBNDecoder(has_metadata=False, input_version=3, upgrade_policy=_dbn.VersionUpgradePolicy.AS_IS)
            for record in decoder.write_and_decode(data.tobytes()):
                self._told(kind, record)
            await self._turns(0)

    def _told(self, kind: int, record: Any) -> None:
        if kind == MAPPING_TYPE:
            if (symbol := str(record.stype_out_symbol)) in self._symbols:
                self._rows.learn(int(record.instrument_id), self._symbols.index(symbol))
        elif kind == DEFINITION_TYPE:
            found = definition(record, self.config.dataset)
            if found is not None and found.symbol in self._symbols:
                ours = self.config.instruments[self._symbols.index(found.symbol)]
                self._handle_instrument(nautilus_instrument(Definition(ours, found.symbol)))
        elif kind == STATUS_TYPE:
            if (k := self._rows.index(int(record.instrument_id))) >= 0 and int(record.action) in ACTIONS:
                action, trades = MarketStatusAction.from_str(ACTIONS[int(record.action)][0]), str(record.is_trading)
                when = int(record.ts_event), int(record.ts_recv)
                self._handle_data(InstrumentStatus(self._ids[k], action, *when, is_trading={"Y": True, "N": False}.get(trades)))
        elif kind == ERROR_TYPE:
            self._say(f"Databento: {record.err}")
            if "status" in str(record.err) and self._wanted.pop("status", []):
                self._say("this dataset tells nothing of halts and auctions")
            self._link.counts["errors"] += 1
        elif kind == SYSTEM_TYPE and str(record.code) not in ("SystemCode.HEARTBEAT", "heartbeat", "0"):
            self._link.said.append(str(record.msg))

    def _follow(self, mbo: Array) -> None:
        """Look for gaps and disorder of the line. Raises BrokenError: the book can only be had anew."""
        live = mbo[(mbo["flags"] & F_SNAPSHOT) == 0]
        if not len(live):
            return
        recv = live["ts_recv"].astype(np.int64)
        if recv[0] < self._newest or (np.diff(recv) < 0).any():
            self._lost("order", 0)
        self._newest = int(recv[-1])
        sequence = live["sequence"].astype(np.int64)
        steps = np.diff(sequence, prepend=self._sequence or sequence[0])
        jumps = steps[steps > 1]
        self._sequence = int(sequence[-1])
        if len(jumps) and self._steps > NUMBERED and self._skips <= GAP_SHARE * self._steps:
            self._lost("sequence", int(jumps.sum() - len(jumps)))
        self._steps, self._skips = self._steps + len(steps), self._skips + len(jumps)

    def _lost(self, why: str, missing: int) -> None:
        for k in self._pulse:
            self._link.health.gap(k, missing, why)
        what = {"order": "records came out of order", "sequence": f"{missing} records are missing", "book": "orders are not known"}
        raise BrokenError(what[why])

    def _opened(self, events: Array) -> Array:
        """Without the snapshots of books in which nothing has happened yet."""
        bare = F_SNAPSHOT | F_LAST
        opening = (events["action"] == CLEAR) & (events["flags"] & bare == bare)
        if not opening.any():
            return events
        return events[[not (o and self._rows.empty(int(k))) for o, k in zip(opening, events["instrument"])]]

    async def _give(self, events: Array) -> None:
        """EVENT rows, before they are finished, -> Nautilus objects -> the node, which gets its turns between."""
        if not len(events):
            await self._turns(0)
            return
        events = self._rows.finish(events)
        wall, health = self.clock.timestamp_ns(), self._link.health
        counts = np.bincount(events["instrument"], minlength=len(self._ids))
        came = np.flatnonzero(counts).tolist()
        for k in came:
            mine = events["instrument"] == k
            health.seen(self._pulse[k], int(events["ts_init"][mine][-1]), wall, int(counts[k]))
        self._link.counts["events"] += len(events)
        self._link.counts["partial_cancels"] = self._rows.count("partial_cancel")
        unknown = self._rows.count("unknown_cancel") + self._rows.count("unknown_modify")
        for n in range(0, len(events) or 1, STEP):
            step = events[n : n + STEP]
            made = self._objects(step, self._link.taken is not None and self._given - self._link.taken() > BEHIND)
            self._given += len(step)
            if n + STEP >= len(events):  # the books of `_rows` are those after the last event
                for k in came:
                    if k not in self._priced and not self._open[k]:
                        made += self._price(k, int(events["ts_event"][-1]), int(events["ts_init"][-1]))
            await self._turns(made)
        if unknown > self._unknown:
            self._unknown = unknown
            self._lost("book", 0)

    def _price(self, k: int, ts_event: int, ts_init: int) -> int:
        """Tell the node the best prices of a book that is whole again: from deltas alone it takes none before the first trade, and denies
        orders at the market. Once a session."""
        if self.config.instruments[k].level < 2:
            self._priced.add(k)  # its quotes say them
        elif (touch := self._rows.touch(k)) is not None:
            self._priced.add(k)
            x = self.config.instruments[k]
            bid, ask = (Price.from_raw(v * UNIT, x.price_precision) for v in touch[::2])
            bid_size, ask_size = (Quantity.from_raw(v * UNIT, x.size_precision) for v in touch[1::2])
            self._handle_data(QuoteTick(self._ids[k], bid, ask, bid_size, ask_size, ts_event, ts_init))
            return 1
        return 0

    def _objects(self, events: Array, behind: bool = False) -> int:
        """Give the node the messages of `events`, one for each change of a book; how many. Where it is `behind`, changes of one book that
        follow each other are one message: what the node does for each costs more than what it does for each of its events."""
        made, give, places, stamps, bids, last = 0, self._handle_data, self._places, self._stamps, self._bids, -1
        for ts_event, ts_init, price, size, order_id, sequence, action, side, flags, k in events.tolist():
            if last >= 0 and (k != last or action == TRADE):
                made += self._close(last)
                last = -1
            id_, prices, sizes, group = places[k]
            if (px := prices.get(price)) is None:
                px = prices[price] = Price.from_raw(price * UNIT, self.config.instruments[k].price_precision)
            if (sz := sizes.get(size)) is None:
                sz = sizes[size] = Quantity.from_raw(size * UNIT, self.config.instruments[k].size_precision)
            if action == TRADE:
                if group:
                    made += self._close(k)
                give(TradeTick(id_, px, sz, _AGGRESSOR[side], TradeId(str(sequence)), ts_event, ts_init))
                made += 1
            elif flags & F_TOB:  # the bid, then the ask
                if side > 0:
                    bids[k] = px, sz
                else:
                    (bid, bid_size), made = bids[k], made + 1
                    give(QuoteTick(id_, bid, px, bid_size, sz, ts_event, ts_init))
            else:
                if group and (not flags & F_LAST if k == last else stamps[k] != ts_init):
                    made += self._close(k)
                stamps[k], order = ts_init, BookOrder(_SIDE[side], px, sz, order_id)
                group.append(OrderBookDelta(id_, _ACTION[action], order, flags & ~F_MBP, sequence, ts_event, ts_init))
                last = -1
                if flags & F_LAST:
                    if behind:
                        last = k  # its group is whole, and may be gone on with
                    else:
                        made += self._close(k)
        return made + (self._close(last) if last >= 0 else 0)

    def _close(self, k: int) -> int:
        """Give the node the deltas of an instrument that wait, as one message."""
        id_, _, _, group = self._places[k]
        self._handle_data(OrderBookDeltas(id_, group))
        group.clear()
        return 1
