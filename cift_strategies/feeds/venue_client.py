"""Nautilus's side of the test venue: an execution client over its line protocol.

:func:`client` takes the venue's address and the instruments; gives what a node is built with. Every report is handed on once, in the
venue's order; a line that is lost is made anew and begins after the newest report seen. What was on its way when the line was lost: cancels
and reduce-only orders are sent again (the venue does nothing twice), an order that would open something is rejected.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from nautilus_trader.common import Logger
from nautilus_trader.config import ExecutionClientConfig
from nautilus_trader.live import RoutingConfig
from nautilus_trader.live.clients import ExecutionClient, ExecutionClientFactory
from nautilus_trader.model import (
    AccountBalance,
    AccountId,
    AccountType,
    ClientOrderId,
    ContingencyType,
    Currency,
    ExecutionMassStatus,
    FillReport,
    InstrumentId,
    LiquiditySide,
    Money,
    OmsType,
    OrderSide,
    OrderStatus,
    OrderStatusReport,
    OrderType,
    PositionSide,
    PositionStatusReport,
    Price,
    Quantity,
    TimeInForce,
    TradeId,
    TriggerType,
    Venue,
    VenueOrderId,
)

from catalog.errors import InputError
from catalog.events import Instrument
from cift_strategies.feeds.databento import address
from cift_strategies.feeds.venue import DEMO_KEY, ENV_KEY, answer
from cift_strategies.feeds.venue_matching import Fill, Order, Report
from cift_strategies.system import Client
from cift_strategies.translate import UNIT

NAME: Final = "CIFTVENUE"
CONNECT_S: Final = 10.0
ANSWER_S: Final = 30.0
ANSWER: Final = 1 << 30  # bytes of a line of the venue at most: the whole history of an account is one
WAITS: Final = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # seconds before the next try to connect
_KIND: Final = {OrderType.MARKET: "market", OrderType.LIMIT: "limit", OrderType.STOP_MARKET: "stop"}
_LIFE: Final = {TimeInForce.GTC: "gtc", TimeInForce.IOC: "ioc", TimeInForce.FOK: "fok"}
_SIBLINGS: Final = (ContingencyType.OCO, ContingencyType.OUO)
_TYPES, _LIVES = {v: k for k, v in _KIND.items()}, {v: k for k, v in _LIFE.items()}
_STATUS: Final = {
    "held": OrderStatus.ACCEPTED, "accepted": OrderStatus.ACCEPTED, "rejected": OrderStatus.REJECTED, "canceled": OrderStatus.CANCELED,
    "filled": OrderStatus.FILLED,
}  # fmt: skip


@dataclass(slots=True)
class Link:
    """What a runner may look at while the client works. `lost` since the line is down, else empty."""

    lost: str = "not connected yet"
    fault: InputError | None = None
    counts: Counter[str] = field(default_factory=Counter)  # reports, duplicates, reconnects, resent, lost
    said: deque[str] = field(default_factory=lambda: deque(maxlen=100))


class VenueConfig(ExecutionClientConfig):
    """See :func:`client`, which makes it. The key is not in it."""

    def __new__(cls, **kw: Any) -> VenueConfig:
        return super().__new__(cls, routing=RoutingConfig(default=True))

    def __init__(self, *, instruments: Sequence[Instrument], host: str, port: int) -> None:
        self.instruments, self.host, self.port = tuple(instruments), host, port
        self.link = Link()


class VenueFactory(ExecutionClientFactory):
    """Makes the client; holds the key, so that it is in no configuration."""

    def __init__(self, key: str) -> None:
        self._key = key

    def create(self, *, name: str, config: Any, cache: Any, clock: Any, trader_id: Any) -> VenueClient:  # type: ignore[override]
        return VenueClient(self._key, name=name, config=config, cache=cache, clock=clock, trader_id=trader_id)


def client(instruments: Sequence[Instrument], venue: str, key: str | None = None) -> Client:
    """The execution client of the test venue at `venue` ("host:port"). `key`: None takes CIFT_VENUE_KEY, or the demo key."""
    host, port = address("", venue)
    made = key or os.environ.get(ENV_KEY) or DEMO_KEY
    return Client(NAME, VenueFactory(made), VenueConfig(instruments=instruments, host=host, port=port))


class VenueClient(ExecutionClient):
    """The execution client; made by :class:`VenueFactory`."""

    config: VenueConfig

    def __init__(self, key: str, *, name: str, config: VenueConfig, cache: Any, clock: Any, trader_id: Any) -> None:
        self._venues = {InstrumentId.from_str(x.id).venue for x in config.instruments}
        super().__init__(
            name=name, config=config, cache=cache, clock=clock, trader_id=trader_id, account_id=AccountId(f"{name}-001"),
            venue=InstrumentId.from_str(config.instruments[0].id).venue, account_type=AccountType.MARGIN, oms_type=OmsType.NETTING,
        )  # fmt: skip
        self._key, self._link, self._log = key, config.link, Logger(name)
        self._table = {x.id: x for x in config.instruments}
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._numbers, self._told, self._seen, self._reconciled = 0, 0, 0, False
        self._early: list[Report] = []  # told before the node has reconciled
        self._asked: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._groups: dict[int, list[Any]] = {}  # submitted together, of which nothing was heard yet
        self._cancels: dict[str, Any] = {}  # asked for, of which nothing was heard yet
        self._accounting = False

    def _handles_order_venue(self, venue: Venue | None) -> bool:
        return venue in self._venues

    # --- the line -------------------------------------------------------------------------------------------------------------------------

    async def _connect(self) -> None:
        self._told = self._seen = await self._login(None)
        self.create_task(self._run(), "venue")
        await self._tell_account()

    async def _disconnect(self) -> None:
        if self._writer is not None:
            self._writer.close()

    async def _login(self, seen: int | None) -> int:
        """Connect; wait and try again where nobody answers. The venue's newest report. Raises InputError where the key is refused."""
        where = f"{self.config.host}:{self.config.port}"
        for n in range(1_000_000):
            try:
                async with asyncio.timeout(CONNECT_S):
                    reader, writer = await asyncio.open_connection(self.config.host, self.config.port, limit=ANSWER)
                    greeting = json.loads(await reader.readuntil(b"\n"))
                    login = {"do": "login", "answer": answer(greeting["challenge"], self._key), "seen": seen}
                    writer.write(json.dumps(login).encode() + b"\n")
                    told = json.loads(await reader.readuntil(b"\n"))
                if "error" in told:
                    self._link.fault = InputError(f"the venue at {where} does not let us in: {told['error']}")
                    raise self._link.fault
                self._reader, self._writer, self._link.lost = reader, writer, ""
                return int(told["seq"])
            except (OSError, TimeoutError, asyncio.IncompleteReadError) as e:
                wait = WAITS[min(n, len(WAITS) - 1)]
                self._say(f"the venue at {where} cannot be reached ({e or type(e).__name__}): trying again in {wait:g} s")
                await asyncio.sleep(wait)
        raise AssertionError

    async def _run(self) -> None:
        while True:
            try:
                assert self._reader is not None
                while True:
                    self._take(json.loads(await self._reader.readuntil(b"\n")))
            except (OSError, asyncio.IncompleteReadError) as e:
                self._link.lost = f"the line to the venue is lost ({str(e) or type(e).__name__})"
                self._say(self._link.lost)
            assert self._writer is not None
            self._writer.close()
            for asked in self._asked.values():
                asked.cancel()
            self._asked.clear()
            newest = await self._login(self._told)
            self._link.counts["reconnects"] += 1
            await self._catch_up(newest)
            self._resume()

    async def _catch_up(self, newest: int) -> None:
        """Hear what was missed."""
        assert self._reader is not None
        while self._told < newest:
            try:
                self._take(json.loads(await self._reader.readuntil(b"\n")))
            except (OSError, asyncio.IncompleteReadError):
                return  # it is lost again

    def _resume(self) -> None:
        """What was on its way when the line was lost, and has not arrived."""
        if self._link.lost:
            return
        groups, self._groups = self._groups, {}
        for orders in groups.values():
            if all(o.is_reduce_only for o in orders):
                self._link.counts["resent"] += len(orders)
                self._submit(orders)
            else:
                for o in orders:
                    self._link.counts["lost"] += 1
                    self.generate_order_rejected(o, "the line was lost before it arrived", self.clock.timestamp_ns(), False)
        for name in list(self._cancels):
            self._link.counts["resent"] += 1
            self._send(do="cancel", order=name)

    def _send(self, **what: Any) -> None:
        assert self._writer is not None
        self._writer.write(json.dumps(what, separators=(",", ":")).encode() + b"\n")

    async def _ask(self, **what: Any) -> dict[str, Any]:
        """Send a command and wait for its answer. Raises OSError where the line is lost, or lost meanwhile."""
        if self._link.lost:
            raise ConnectionError(self._link.lost)
        self._numbers += 1
        found = self._asked[self._numbers] = asyncio.get_running_loop().create_future()
        self._send(id=self._numbers, **what)
        try:
            return await asyncio.wait_for(found, ANSWER_S)
        except (asyncio.CancelledError, TimeoutError) as e:
            if isinstance(e, asyncio.CancelledError) and not found.cancelled():
                raise
            raise ConnectionError("the venue has not answered") from None
        finally:
            self._asked.pop(self._numbers, None)

    def _say(self, what: str) -> None:
        self._link.said.append(what)
        self._log.warning(what)

    # --- what comes in --------------------------------------------------------------------------------------------------------------------

    def _take(self, told: dict[str, Any]) -> None:
        if "report" in told:
            report = Report.parse(told["report"])
            self._told = max(self._told, report.seq)
            if not self._reconciled:
                self._early.append(report)
            else:
                self._hear(report)
            return
        number = int(told.get("answer") or 0)
        if (asked := self._asked.get(number)) is not None and not asked.done():
            asked.set_result(told)
        group = self._groups.pop(number, None)
        if "error" in told:
            self._say(f"the venue: {told['error']}")
            for o in group or ():
                if "known already" not in told["error"]:
                    self.generate_order_rejected(o, told["error"], self.clock.timestamp_ns(), False)

    def _hear(self, report: Report) -> None:
        if report.seq <= self._seen:
            self._link.counts["duplicates"] += 1
            return
        self._seen = report.seq
        self._link.counts["reports"] += 1
        o = report.order
        for number, group in list(self._groups.items()):
            if any(str(x.client_order_id) == o.client for x in group):
                del self._groups[number]
        if report.kind in ("canceled", "cancel_rejected", "filled", "rejected") and (not o.open or report.kind == "cancel_rejected"):
            self._cancels.pop(o.client, None)
        order = self.cache.order(ClientOrderId(o.client))
        if order is None:
            self._handle_report(self._order_report(o, report.reason), [self._fill_report(report)] if report.fill else None)
        else:
            self._event(report, order)
        if report.fill is not None and not self._accounting:
            self._accounting = True
            self.create_task(self._tell_account(), "account")

    def _event(self, r: Report, order: Any) -> None:
        o, venue_id, ts = r.order, VenueOrderId(r.order.venue), r.ts
        match r.kind:
            case "accepted":
                if order.status in (OrderStatus.INITIALIZED, OrderStatus.SUBMITTED):
                    self.generate_order_accepted(order, venue_id, ts)
                if order.quantity.raw // UNIT != o.size:
                    self._updated(order, r)
            case "updated":
                self._updated(order, r)
            case "rejected":
                self.generate_order_rejected(order, r.reason, ts, r.reason.startswith("post-only"))
            case "canceled":
                self.generate_order_canceled(order, venue_id, ts)
            case "cancel_rejected":
                self.generate_order_cancel_rejected(order, venue_id, r.reason, ts)
            case "modify_rejected":
                self.generate_order_modify_rejected(order, venue_id, r.reason, ts)
            case "filled":
                assert r.fill is not None
                size, price, fee, side = self._filled(o, r.fill)
                self.generate_order_filled(order, venue_id, None, TradeId(r.fill.id), size, price, fee.currency, fee, side, ts)

    def _updated(self, order: Any, r: Report) -> None:
        o, x = r.order, self._table[r.order.instrument]
        price, trigger = (None if v is None else _price(x, v) for v in (o.price, o.trigger))
        self.generate_order_updated(order, VenueOrderId(o.venue), _quantity(x, o.size), price, trigger, None, r.ts)

    def _filled(self, o: Order, f: Fill) -> tuple[Quantity, Price, Money, LiquiditySide]:
        x = self._table[o.instrument]
        fee = Money(f.fee, Currency.from_str(x.currency))
        return _quantity(x, f.size), _price(x, f.price), fee, LiquiditySide.MAKER if f.maker else LiquiditySide.TAKER

    async def _tell_account(self) -> None:
        try:
            told = await self._ask(do="account")
        except OSError:
            return
        finally:
            self._accounting = False
        balances = []
        for name, equity in told["equity"].items():
            money = Money(equity, Currency.from_str(name))
            balances.append(AccountBalance(money, Money(0, money.currency), money))
        self.generate_account_state(balances, [], True, told["ts"])

    # --- commands -------------------------------------------------------------------------------------------------------------------------

    async def _submit_order(self, command: Any) -> None:
        self._submit([command.order])

    async def _submit_order_list(self, command: Any) -> None:
        found = [self.cache.order(i.client_order_id) for i in command.order_inits]
        self._submit(found)

    def _submit(self, orders: list[Any]) -> None:
        """Send orders that belong together; while the line is down, those that reduce wait for it, the others are rejected."""
        resent = [o for o in orders if o.status != OrderStatus.INITIALIZED]
        for o in orders:
            if o not in resent:
                self.generate_order_submitted(o)
        now = self.clock.timestamp_ns()
        wrong = next((w for o in orders if (w := _unknown(o))), "")
        if wrong or (self._link.lost and not all(o.is_reduce_only for o in orders)):
            for o in orders:
                self.generate_order_rejected(o, wrong or self._link.lost, now, False)
            return
        self._numbers += 1
        self._groups[self._numbers] = orders
        if not self._link.lost:
            self._send(do="submit", id=self._numbers, orders=[_line(o) for o in orders])

    async def _modify_order(self, command: Any) -> None:
        values = (("size", command.quantity), ("price", command.price), ("trigger", command.trigger_price))
        new = {n: v.raw // UNIT for n, v in values if v is not None}
        if self._link.lost:
            order = self.cache.order(command.client_order_id)
            self.generate_order_modify_rejected(order, command.venue_order_id, self._link.lost, self.clock.timestamp_ns())
            return
        self._send(do="modify", order=str(command.client_order_id), **new)

    async def _cancel_order(self, command: Any) -> None:
        name = str(command.client_order_id)
        self._cancels[name] = command
        if not self._link.lost:
            self._send(do="cancel", order=name)

    async def _cancel_all_orders(self, command: Any) -> None:
        for order in self.cache.orders_open(instrument_id=command.instrument_id):
            if command.order_side in (None, OrderSide.NO_ORDER_SIDE, order.side):
                name = str(order.client_order_id)
                self._cancels[name] = command
                if not self._link.lost:
                    self._send(do="cancel", order=name)

    async def _query_account(self, command: Any) -> None:
        await self._tell_account()

    async def _query_order(self, command: Any) -> None:
        if self._link.lost:
            return  # what was missed is told when it is back
        for o, fills in await self._orders():
            if o.client == str(command.client_order_id):
                self._handle_report(self._order_report(o), fills)

    # --- reconciliation -------------------------------------------------------------------------------------------------------------------

    async def _status(self) -> dict[str, Any]:
        return dict((await self._ask(do="status"))["status"])

    async def _orders(self) -> list[tuple[Order, list[FillReport]]]:
        told = await self._status()
        orders = [Order(**{**o, "linked": tuple(o["linked"])}) for o in told["orders"]]
        fills = defaultdict[str, list[FillReport]](list)
        for f in map(Report.parse, told["fills"]):
            fills[f.order.venue].append(self._fill_report(f))
        return [(o, fills[o.venue]) for o in orders]

    async def _generate_mass_status(self, lookback_mins: int | None) -> Any:
        """All orders, fills and positions that the venue has ever had of us, whatever the look-back: it is a short account."""
        told = await self._status()
        found = ExecutionMassStatus(self.client_id, self.account_id, self.venue, self.clock.timestamp_ns())  # type: ignore[arg-type]
        found.add_order_reports([self._order_report(Order(**{**o, "linked": tuple(o["linked"])})) for o in told["orders"]])
        found.add_fill_reports([self._fill_report(Report.parse(f)) for f in told["fills"]])
        found.add_position_reports(self._position_reports(told))
        self._seen = told["seq"]
        asyncio.get_running_loop().call_soon(self._release)
        return found

    def _release(self) -> None:
        """The node knows what there was: what has come since follows."""
        self._reconciled = True
        early, self._early = self._early, []
        for report in early:
            self._hear(report)

    async def _generate_order_status_report(self, command: Any) -> OrderStatusReport | None:
        for o, _ in await self._orders():
            if str(command.client_order_id) == o.client or str(command.venue_order_id) == o.venue:
                return self._order_report(o)
        return None

    async def _generate_order_status_reports(self, command: Any) -> list[OrderStatusReport]:
        found = [o for o, _ in await self._orders() if command.instrument_id is None or str(command.instrument_id) == o.instrument]
        return [self._order_report(o) for o in found if o.open or not command.open_only]

    async def _generate_fill_reports(self, command: Any) -> list[FillReport]:
        fills = [f for _, some in await self._orders() for f in some]
        fills = [f for f in fills if command.instrument_id in (None, f.instrument_id)]
        return [f for f in fills if command.venue_order_id in (None, f.venue_order_id)]

    async def _generate_position_status_reports(self, command: Any) -> list[PositionStatusReport]:
        return [r for r in self._position_reports(await self._status()) if command.instrument_id in (None, r.instrument_id)]

    def _position_reports(self, told: dict[str, Any]) -> list[PositionStatusReport]:
        now, found = self.clock.timestamp_ns(), []
        for name, size in told["positions"].items():
            side = PositionSide.LONG if size > 0 else PositionSide.SHORT if size < 0 else PositionSide.FLAT
            quantity = _quantity(self._table[name], abs(size))
            found.append(PositionStatusReport(self.account_id, InstrumentId.from_str(name), side, quantity, told["ts"], now))
        return found

    def _order_report(self, o: Order, reason: str = "") -> OrderStatusReport:
        x = self._table[o.instrument]
        status = OrderStatus.PARTIALLY_FILLED if o.open and o.filled else _STATUS[o.status]
        price, trigger = (None if v is None else _price(x, v) for v in (o.price, o.trigger))
        return OrderStatusReport(
            self.account_id, InstrumentId.from_str(o.instrument), VenueOrderId(o.venue), _side(o), _TYPES[o.kind], _LIVES[o.life], status,
            _quantity(x, o.size), _quantity(x, o.filled), o.accepted, o.last, self.clock.timestamp_ns(), ClientOrderId(o.client),
            price=price, trigger_price=trigger, trigger_type=None if trigger is None else TriggerType.BID_ASK, post_only=o.post_only,
            reduce_only=o.reduce_only, cancel_reason=reason or None,
        )  # fmt: skip

    def _fill_report(self, r: Report) -> FillReport:
        assert r.fill is not None
        size, price, fee, liquidity = self._filled(r.order, r.fill)
        return FillReport(
            self.account_id, InstrumentId.from_str(r.order.instrument), VenueOrderId(r.order.venue), TradeId(r.fill.id), _side(r.order),
            size, price, fee, liquidity, r.ts, self.clock.timestamp_ns(), ClientOrderId(r.order.client),
        )  # fmt: skip


def _price(x: Instrument, value: int) -> Price:
    return Price.from_raw(value * UNIT, x.price_precision)


def _quantity(x: Instrument, value: int) -> Quantity:
    return Quantity.from_raw(value * UNIT, x.size_precision)


def _side(o: Order) -> OrderSide:
    return OrderSide.BUY if o.side > 0 else OrderSide.SELL


def _unknown(order: Any) -> str:
    """Why the venue's language has no words for an order, or nothing."""
    if order.order_type not in _KIND:
        return f"the test venue knows no {order.order_type}"
    return "" if order.time_in_force in _LIFE else f"the test venue knows no {order.time_in_force}"


def _line(order: Any) -> dict[str, Any]:
    """A Nautilus order as the line tells it."""
    price, trigger = getattr(order, "price", None), getattr(order, "trigger_price", None)
    siblings = order.linked_order_ids if order.contingency_type in _SIBLINGS else ()
    return {
        "client": str(order.client_order_id), "instrument": str(order.instrument_id), "side": 1 if order.side == OrderSide.BUY else -1,
        "kind": _KIND[order.order_type], "size": order.quantity.raw // UNIT, "price": None if price is None else price.raw // UNIT,
        "trigger": None if trigger is None else trigger.raw // UNIT, "life": _LIFE[order.time_in_force],
        "post_only": bool(getattr(order, "is_post_only", False)), "reduce_only": bool(order.is_reduce_only),
        "parent": None if order.parent_order_id is None else str(order.parent_order_id), "linked": [str(i) for i in siblings or ()],
    }  # fmt: skip
