"""Both ends of a node that hears a recorded session once more: a data client that hands on what it is given, and in the venues' place
execution clients that answer nothing by themselves, but what they are told that the venues answered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from nautilus_trader.config import DataClientConfig, ExecutionClientConfig
from nautilus_trader.live import RoutingConfig
from nautilus_trader.live.clients import DataClientFactory, ExecutionClient, ExecutionClientFactory, MarketDataClient
from nautilus_trader.model import (
    AccountBalance,
    AccountId,
    AccountType,
    Currency,
    LiquiditySide,
    Money,
    OmsType,
    Price,
    Quantity,
    TradeId,
    Venue,
    VenueOrderId,
)

from cift_strategies.system import Client

FEED: Final = "RETOLD"
OURS: Final = ("OrderInitialized", "OrderPendingCancel", "OrderPendingUpdate", "OrderEmulated", "OrderReleased")  # the node's own


@dataclass(slots=True)
class Link:
    """Where the teller meets the node: `give` takes market data, `venues` (by name) take answers."""

    give: Callable[[Any], object] = lambda _message: None
    subscribed: int = 0  # subscriptions of market data
    venues: dict[str, RetoldVenue] = field(default_factory=dict)
    arrived: set[str] = field(default_factory=set)  # client order ids that the venues have got


def feed(link: Link) -> Client:
    return Client(FEED, _FeedFactory(), _FeedConfig(link=link))


def venue(link: Link, name: str, balances: Sequence[Money]) -> Client:
    """In the place of the venue `name`, whose account begins with `balances`."""
    return Client(name, _VenueFactory(), _VenueConfig(link=link, balances=balances))


class _FeedConfig(DataClientConfig):
    def __new__(cls, **_kw: Any) -> _FeedConfig:
        return super().__new__(cls, routing=RoutingConfig(default=True))

    def __init__(self, *, link: Link) -> None:
        self.link = link


class _FeedFactory(DataClientFactory):
    def create(self, *, name: str, config: Any, cache: Any, clock: Any) -> _Feed:  # type: ignore[override]
        return _Feed(name=name, config=config, cache=cache, clock=clock)


class _Feed(MarketDataClient):
    config: _FeedConfig

    def __init__(self, **kw: Any) -> None:
        super().__init__(**kw)
        self.config.link.give = self._handle_data

    async def _connect(self) -> None:
        pass

    async def _disconnect(self) -> None:
        pass

    async def _subscribe_book_deltas(self, command: Any) -> None:
        self.config.link.subscribed += 1

    async def _subscribe_quotes(self, command: Any) -> None:
        self.config.link.subscribed += 1

    async def _subscribe_trades(self, command: Any) -> None:
        self.config.link.subscribed += 1


class _VenueConfig(ExecutionClientConfig):
    def __new__(cls, **_kw: Any) -> _VenueConfig:
        return super().__new__(cls, routing=RoutingConfig())

    def __init__(self, *, link: Link, balances: Sequence[Money]) -> None:
        self.link, self.balances = link, tuple(balances)


class _VenueFactory(ExecutionClientFactory):
    def create(self, *, name: str, config: Any, cache: Any, clock: Any, trader_id: Any) -> RetoldVenue:  # type: ignore[override]
        return RetoldVenue(
            name=name, config=config, cache=cache, clock=clock, trader_id=trader_id, account_id=AccountId(f"{name}-001"), venue=Venue(name),
            account_type=AccountType.MARGIN, oms_type=OmsType.NETTING,
        )  # fmt: skip


class RetoldVenue(ExecutionClient):
    """An account whose orders hear :meth:`tell` alone."""

    config: _VenueConfig

    def __init__(self, **kw: Any) -> None:
        super().__init__(**kw)
        self.config.link.venues[str(self.venue)] = self
        self._fills = 0

    async def _connect(self) -> None:
        held = [AccountBalance(m, Money(0, m.currency), m) for m in self.config.balances]
        self.generate_account_state(held, [], False, self.clock.timestamp_ns())

    async def _disconnect(self) -> None:
        pass

    async def _submit_order(self, command: Any) -> None:
        self.config.link.arrived.add(str(command.order.client_order_id))

    async def _submit_order_list(self, command: Any) -> None:
        self.config.link.arrived.update(str(i.client_order_id) for i in command.order_inits)

    async def _modify_order(self, command: Any) -> None:
        pass

    async def _cancel_order(self, command: Any) -> None:
        pass

    async def _cancel_all_orders(self, command: Any) -> None:
        pass

    def tell(self, order: Any, what: Mapping[str, Any], currency: str) -> None:
        """`order` hears `what`, an order event as :class:`cift_strategies.recording.Witness` notes it, fills in `currency`."""
        ts, number, reason = what["stamp"], VenueOrderId(f"R-{order.client_order_id}"), what.get("reason", "")
        match what["event"]:
            case "OrderSubmitted":
                self.generate_order_submitted(order)
            case "OrderDenied":
                self.generate_order_denied(order, reason)
            case "OrderRejected":
                self.generate_order_rejected(order, reason, ts, False)
            case "OrderAccepted":
                self.generate_order_accepted(order, number, ts)
            case "OrderTriggered":
                self.generate_order_triggered(order, number, ts)
            case "OrderCanceled":
                self.generate_order_canceled(order, number, ts)
            case "OrderExpired":
                self.generate_order_expired(order, number, ts)
            case "OrderCancelRejected":
                self.generate_order_cancel_rejected(order, number, reason, ts)
            case "OrderModifyRejected":
                self.generate_order_modify_rejected(order, number, reason, ts)
            case "OrderUpdated":
                price, trigger = (None if what.get(n) is None else Price.from_str(what[n]) for n in ("price", "trigger_price"))
                self.generate_order_updated(order, number, Quantity.from_str(what["quantity"]), price, trigger, None, ts)
            case "OrderFilled":
                self._fills += 1
                fee = what.get("commission")
                self.generate_order_filled(
                    order, number, None, TradeId(str(self._fills)), Quantity.from_str(what["last_qty"]), Price.from_str(what["last_px"]),
                    Currency.from_str(currency), None if fee is None else Money.from_str(fee),
                    LiquiditySide.from_str(what["liquidity_side"]), ts,
                )  # fmt: skip
