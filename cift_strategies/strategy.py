"""The strategy: predictions in, bracketed orders out. The only file that submits orders.

A prediction becomes an entry when its expected move pays for the spread and the fees of both ways. The entry is a limit order for
immediate execution, bounded by the price at which the move would still pay; a stop and a target go with it (one bracket); what is left is
closed at the horizon, before the session ends, and at once when a stop could not be placed. One position per instrument.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from nautilus_trader.model import (
    ClientOrderId,
    InstrumentId,
    OrderSide,
    OrderType,
    Price,
    Quantity,
    StrategyId,
    TimeInForce,
)
from nautilus_trader.trading import Strategy, StrategyConfig

from catalog import status
from catalog.events import SCALE, Instrument, session_bounds
from cift_strategies import entries
from cift_strategies.faults import Faults, guarded
from cift_strategies.journal import Journal, Sent
from cift_strategies.messages import FEATURES, PREDICTIONS, SIGNALS, FeatureVector, Prediction, Signal
from cift_strategies.pace import Clock, Pace, timed
from cift_strategies.risk import Ledger, Limits
from cift_strategies.settings import Settings
from cift_strategies.translate import UNIT

if TYPE_CHECKING:
    from cift_strategies.recovery import Recovery

MARK_EVERY_NS: Final = SCALE  # of open positions, for the equity curve
RETRY_NS: Final = 100_000_000  # before another attempt to leave a position
ATTEMPTS: Final = 50

type Alert = Literal["horizon", "wait", "again"]  # a position's time is up, a resting entry's is, a way out is tried again


@dataclass(frozen=True, slots=True)
class Terms:
    """What a runner tells the strategy about the run."""

    instruments: Sequence[Instrument]
    settings: Settings
    limits: Limits
    regimes: Sequence[str] = ()
    act_from: int = 0  # predictions made before this are not acted upon, ns
    ends: Mapping[int, int] = field(default_factory=dict)  # instrument -> when its data ends, where that is known, ns
    states: Mapping[int, tuple[Any, Any]] = field(default_factory=dict)  # instrument -> trading states as catalog.status reads them
    order_latency_ns: int = 0  # of a simulated venue: orders are woken at arrival; 0 where the venue answers by itself
    faults: Faults = field(default_factory=Faults)
    pace: Pace | None = None  # of a stream whose time is not the clock's
    journal: Journal | None = None  # gets signals and order events before they are acted upon
    behind: Mapping[int, Sequence[tuple[int, int]]] = field(default_factory=dict)  # instrument -> when it is not the front contract, ns


@dataclass(slots=True)
class Trade:
    """One entry and what became of it."""

    number: int
    signal: Signal
    decided_mid: float
    ids: dict[str, ClientOrderId]  # role -> order
    until: int = 0  # when it is closed, unless renewed, ns
    opened: int = 0
    peak: int = 0  # largest size, 1e-9 units
    bought: float = 0.0  # price x units, entry side
    sold: float = 0.0  # price x units, exits
    units_in: float = 0.0
    units_out: float = 0.0
    fees: float = 0.0
    crosses: bool = False  # its entry rested in vain, and is sent again across the spread if that still pays
    leaving: str = ""  # why it is being closed
    attempts: int = 0
    last_exit: str = ""  # role of the newest closing fill

    def filled(self, role: str, signed: int, price: float, fee: float, ts: int, position: int) -> None:
        """One fill of this trade, after which `position` is held; `signed` and `position` in 1e-9 units."""
        units = abs(signed) / SCALE
        self.fees += fee
        if role == "entry":
            self.opened = self.opened or ts
            self.bought += price * units
            self.units_in += units
            self.peak = max(self.peak, abs(position))
        else:
            self.sold += price * units
            self.units_out += units
            self.last_exit = role


@guarded
class EnsembleStrategy(Strategy):
    """Trades predictions. Override :meth:`decide` for rules of one's own: it gets every prediction, and what it returns is traded."""

    def __init_subclass__(cls) -> None:
        guarded(cls)

    def __new__(cls, *_args: Any) -> EnsembleStrategy:
        return super().__new__(cls)

    def __init__(self, terms: Terms) -> None:
        super().__init__(StrategyConfig(strategy_id=StrategyId("CIFT-001"), log_events=False, log_commands=False))
        self.terms, self.faults, self.settings = terms, terms.faults, terms.settings
        self.ledger = Ledger(terms.instruments, terms.limits)
        n = len(terms.instruments)
        self.ids = [InstrumentId.from_str(x.id) for x in terms.instruments]
        self.last: list[FeatureVector | None] = [None] * n
        self.touch = [0] * n  # the smaller of the sizes at the best bid and ask, 1e-9 units, at the last close of a batch
        self.newest: list[Prediction | None] = [None] * n
        self.trades: list[Trade | None] = [None] * n
        self._crossing: Settings | None = None
        self.hours: list[tuple[int, int]] = [(0, 0)] * n
        self.decisions: Counter[str] = Counter()
        self.reason = ""  # what became of the newest prediction: "entered", or why not
        self.market: dict[int, int] = {}  # instrument -> trading state, as the feed tells it; history has `terms.states`
        self.witness: Callable[[str, Any], object] | None = None  # is told of all that it decides upon and does, see recording.Witness
        self.halts: dict[str, str] = {}  # cause -> why there are no entries; exits go on
        self.orders: dict[ClientOrderId, tuple[int, str, int]] = {}  # -> trade, role, running number
        self.numbers = 0  # running number of the next order
        self.recovery: Recovery | None = None  # of an account that goes on
        self.order_types: Counter[str] = Counter()
        self.fills: list[tuple[Any, ...]] = []
        self.order_log: list[tuple[Any, ...]] = []  # rows of results.ORDERS
        self.positions: list[tuple[Any, ...]] = []
        self.equity: list[tuple[int, str, float]] = []
        self.signals = 0
        self.next_mark = 0  # when open positions are marked again, ns
        self._alerts = 0
        self._clock: Clock | None = None
        self._moment: int | None = None  # time of the turn that it is in, ns
        self._foreign = False  # whether the venue has orders or positions that are not ours
        self._digest = hashlib.sha256()

    @property
    def time(self) -> Clock:
        """The stream's clock. Asked for once: Nautilus does not lend it while it takes an order, and tells of the order meanwhile."""
        if self._clock is None:
            self._clock = timed(self.clock, self.terms.pace)
        return self._clock

    def now(self) -> int:
        """The stream's time, ns. It stands still within a turn: a prediction, an order event, an alert, a request to flatten."""
        return self.time.timestamp_ns() if self._moment is None else self._moment

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """All that is decided within has one time, so that a recording of the turns is a recording of the decisions."""
        if self._moment is not None:
            yield
            return
        self._moment = self.time.timestamp_ns()
        try:
            yield
        finally:
            self._moment = None

    # --- what is asked of it ----------------------------------------------------------------------------------------------------------

    def halt(self, cause: str, why: str) -> None:
        """No entries from now on, until :meth:`release` is told the same cause."""
        if self.witness is not None and self.halts.get(cause) != why:
            self.witness("halt", (cause, why))
        self.halts[cause] = why

    def release(self, cause: str) -> None:
        if self.halts.pop(cause, None) is not None and self.witness is not None:
            self.witness("release", cause)

    def trading(self, k: int, state: int, ts: int) -> None:
        """The feed says that from `ts` on the market of instrument `k` is in this state of catalog.status: exits wait for it to be open."""
        with self._turn():
            if self.witness is not None:
                self.witness("status", (k, state, ts))
            self.market[k] = state
            if self._trades(k) and (trade := self.trades[k]) is not None and trade.leaving:
                trade.attempts = 0
                self.leave(k, trade.leaving)

    def _trades(self, k: int) -> bool:
        return self.market.get(k, status.UNKNOWN) in _TRADES

    def flatten(self, reason: str) -> None:
        """Cancel all that works and close every position at the market."""
        with self._turn():
            if self.witness is not None:
                self.witness("flatten", reason)
            for k, trade in enumerate(self.trades):
                if trade is not None:
                    trade.attempts = 0
                    self.leave(k, reason)

    @property
    def flat(self) -> bool:
        """Whether nothing is held and nothing works."""
        return not any(self.trades) and not any(p.size for p in self.ledger.positions)

    # --- what comes in ----------------------------------------------------------------------------------------------------------------

    def on_start(self) -> None:
        if self.recovery is not None:
            with self._turn():
                if self.witness is not None:
                    self.witness("begin", None)
                self.recovery.begin()
        else:
            for k in range(len(self.ids)):
                self.compare(k)
        self.subscribe_topic(FEATURES, self.on_features, priority=1)  # the book before a prediction of the same moment, always
        self.subscribe_topic(PREDICTIONS, self.on_prediction)

    def on_features(self, message: object) -> None:
        vector = cast(FeatureVector, message)
        k = vector.instrument
        self.last[k] = vector
        if vector.closes:
            self.touch[k] = min(vector.touch)
        if vector.ts >= self.next_mark and self.trades[k] is not None:
            self.next_mark = vector.ts + MARK_EVERY_NS
            self._mark(k, vector.mid, vector.ts)
        if self.recovery is not None and k in self.recovery.waits and self.recovery.ready(k):
            self.recover(k)

    def recover(self, k: int) -> None:
        """See to what is left in instrument `k` of the time before a restart."""
        assert self.recovery is not None
        with self._turn():
            if self.witness is not None:
                self.witness("recover", k)
            self.recovery.go_on(k)

    def on_prediction(self, message: object) -> None:
        prediction = cast(Prediction, message)
        with self._turn():
            if self.witness is not None:
                self.witness("prediction", (prediction.instrument, prediction.ts, prediction.latency_ns))
            self.reason = ""
            self.newest[prediction.instrument] = prediction
            trade = self.trades[prediction.instrument]
            if trade is not None and not trade.leaving:
                self.renew(trade, prediction)
            signal = self.decide(prediction)
            if signal is not None:
                self.enter(signal)

    # --- deciding ---------------------------------------------------------------------------------------------------------------------

    def decide(self, p: Prediction) -> Signal | None:
        """The entry that `p` justifies, or None; every refusal is counted in `decisions` with its reason."""
        if p.ts < self.terms.act_from:
            return self._decline("before the split")
        if not any(p.direction):
            return self._decline("abstains")
        if self.trades[p.instrument] is not None:
            return self._decline("in a position")
        if self.halts:
            return self._decline(f"halted: {next(iter(self.halts.values()))}")
        k, now = p.instrument, self.now()
        vector = self.last[k]
        if vector is None or now - vector.ts > self.settings.stale_ms * 1e6:
            return self._decline("book is stale")
        mid, spread = vector.mid, vector.spread
        if not math.isfinite(mid):
            return self._decline("book has one side")
        if spread <= 0:
            return self._decline("book is crossed")
        if spread > self.settings.max_spread_ticks:
            return self._decline("spread too wide")
        told = self.terms.states.get(k)
        state = self.market.get(k, status.UNKNOWN) if told is None else int(status.at(told, now))
        if state not in _TRADES:
            return self._decline(f"market: {status.STATES[state]}")
        if any(a <= now < b for a, b in self.terms.behind.get(k, ())):
            return self._decline("not the front contract")
        if reason := self.ledger.halted(k, now):
            return self._decline(reason)
        return self._best(p, k, now, mid, spread)

    def _best(self, p: Prediction, k: int, now: int, mid: float, spread: float) -> Signal | None:
        x, s = self.terms.instruments[k], self.settings
        tick = x.tick / SCALE
        taker, maker = ((share * mid + x.fee_per_unit / x.multiplier) / tick for share in (x.taker_fee, x.maker_fee))
        best, at = -math.inf, -1
        reason = "abstains"
        for h, side in enumerate(p.direction):
            if not side or not p.confidence[h] >= s.min_confidence:
                continue
            expected = side * expected_ticks(p, h)
            if not self._open_for(k, now + p.horizons_ns[h]):
                reason = "session ends"
            elif expected > best:
                best, at = expected, h
        if at < 0:
            return self._decline(reason)
        entry = entries.best(entries.ways(best, spread, taker, maker, self._crossing or s), s.min_edge_ticks)
        if entry is None:
            return self._decline("move does not pay the costs")
        side, scale = p.direction[at], float(p.magnitude[at])
        half = round(spread * x.tick / 2)
        middle = round(mid * SCALE)
        limit = entries.price(entry.way, side, middle, half, x.tick, int(entry.edge - s.min_edge_ticks))
        touch = middle + side * half if entry.way == "cross" else limit
        far = middle - side * half  # where one would get out
        distance = max(math.ceil(s.stop_multiple * scale), s.min_stop_ticks + math.ceil(spread)) * x.tick
        stop = _on_tick(touch - side * distance, x.tick)
        target = _on_tick(touch + side * max(math.ceil(s.target_multiple * scale), 1) * x.tick, x.tick)
        regime = self.terms.regimes[p.regime] if 0 <= p.regime < len(self.terms.regimes) else "unknown"
        if self.terms.limits.regime_scale.get(regime, 1.0) == 0.0:
            return self._decline(f"regime {regime}")
        size = self.ledger.size(k, mid, abs(touch - stop) / SCALE, regime, self.touch[k] / SCALE)
        if size <= 0:
            return self._decline("size is zero")
        if side * (far - stop) <= 0 or stop <= 0:
            return self._decline("no room for a stop")
        return Signal(
            instrument=k, ts=now, predicted_at=p.ts, side=side, size=size, horizon_ns=p.horizons_ns[at], expected_ticks=best,
            cost_ticks=entry.cost, confidence=float(p.confidence[at]), regime=p.regime, limit=_on_tick(limit, x.tick), stop=stop,
            target=target, entry=entry.way,
        )  # fmt: skip

    def _decline(self, reason: str) -> Signal | None:
        self.decisions[reason] += 1
        self.reason = reason
        return None

    def _open_for(self, k: int, until: int) -> bool:
        """Whether instrument `k` trades from now until `until`, with `flat_before_close_s` to spare."""
        return until <= self._flat_at(k, self.now())

    def _flat_at(self, k: int, now: int) -> int:
        """When a position opened now has to be closed at the latest, ns; 0 outside the session."""
        margin = int(self.settings.flat_before_close_s * SCALE)
        end = self.terms.ends.get(k, 2**63 - 1)
        if k in self.terms.states:
            end = min(end, status.close_after(self.terms.states[k], now))
        session = self.terms.instruments[k].session
        if session is not None:
            if now >= self.hours[k][1]:
                self.hours[k] = session_bounds(session, now)
            opens, closes = self.hours[k]
            if now < opens:
                return 0
            end = min(end, closes)
        return end - margin

    # --- orders -----------------------------------------------------------------------------------------------------------------------

    def enter(self, signal: Signal) -> None:
        """Send the bracket of `signal`: entry (limit: immediate or cancel, or resting for `entry_wait_ms`), stop and target."""
        k, x = signal.instrument, self.terms.instruments[signal.instrument]
        if self.trades[k] is not None:
            self._decline("in a position")
            return
        vector = self.last[k]
        mid = math.nan if vector is None else vector.mid
        if reason := self.ledger.beyond(k, signal.size, mid):
            self._decline(reason)
            return
        crossing = signal.entry == "cross"
        orders = self.order_factory.bracket(
            self.ids[k], OrderSide.BUY if signal.side > 0 else OrderSide.SELL, self._quantity(x, signal.size),
            entry_order_type=OrderType.LIMIT, entry_price=self._price(x, signal.limit), entry_post_only=not crossing,
            time_in_force=TimeInForce.IOC if crossing else TimeInForce.GTC, tp_price=self._price(x, signal.target), tp_post_only=False,
            sl_trigger_price=self._price(x, signal.stop),
        )  # fmt: skip
        roles = ("entry", "stop", "target")
        ids = {role: order.client_order_id for role, order in zip(roles, orders)}
        if self.terms.journal is not None:
            prices, first = (signal.limit, signal.stop, signal.target), self.numbers
            sent = [
                Sent(first + n, role, str(ids[role]), -signal.side if n else signal.side, signal.size / SCALE, price / SCALE)
                for n, (role, price) in enumerate(zip(roles, prices))
            ]
            if not self.terms.journal.signal(self.signals, signal, x.id, mid, sent):
                self._decline("halted: journal")
                return
        trade = self.trades[k] = Trade(self.signals, signal, mid, ids, signal.ts + signal.horizon_ns)
        self.signals += 1
        for role, order in zip(roles, orders):
            self._register(order.client_order_id, k, role)
        self.ledger.entered(signal.ts)
        self.decisions["entered"] += 1
        self.reason = "entered"
        if self.witness is not None:
            self.witness("signal", signal)
        self.publish_message(SIGNALS, signal)
        self.submit_order_list(orders)
        self._wake()
        self.alert(trade.until, "horizon", k, trade)
        if not crossing:
            self.alert(signal.ts + int(self.settings.entry_wait_ms * 1e6), "wait", k, trade)

    def alert(self, ts: int, what: Alert, k: int, trade: Trade) -> None:
        """Look after `trade` at `ts`, see :meth:`due`."""
        self._at(ts, lambda _event: self.due(what, k, trade))

    def due(self, what: Alert, k: int, trade: Trade) -> None:
        """An alert of `trade` has its turn."""
        if self.trades[k] is not trade:
            return
        with self._turn():
            if self.witness is not None:
                self.witness("alert", (what, k, trade.signal.predicted_at))
            if what == "wait":
                self._waited(k, trade)
            elif what == "horizon":
                self._time_exit(k, trade)
            else:
                self.leave(k, trade.leaving)

    def _waited(self, k: int, trade: Trade) -> None:
        """A resting entry's time is up: what is not filled is cancelled, and where nothing is, it may be crossed for."""
        if not trade.leaving and self._working(trade, "entry"):
            trade.crosses = self.settings.then == "cross" and not trade.units_in
            if not self.cache.is_order_pending_cancel_local(trade.ids["entry"]):
                self.cancel_order(trade.ids["entry"])
                self._wake()

    def _cross(self, k: int, side: int) -> None:
        """Cross the spread where the newest prediction still pays for it on the same side."""
        p = self.newest[k]
        if p is None:
            return
        self._crossing = self.settings.model_copy(update={"entry": "cross"})
        try:
            signal = self.decide(p)
        finally:
            self._crossing = None
        if signal is not None and signal.side == side:
            self.enter(signal)

    def renew(self, trade: Trade, p: Prediction) -> None:
        """Keep the position for another horizon from now when `p` still expects `renew_ticks` along it: getting out and in again costs."""
        s, signal = self.settings, trade.signal
        if not s.renew or signal.horizon_ns not in p.horizons_ns:
            return
        if signal.side * expected_ticks(p, p.horizons_ns.index(signal.horizon_ns)) >= s.renew_ticks:
            now = self.now()
            until = min(now + signal.horizon_ns, signal.ts + int(s.max_hold_s * SCALE), self._flat_at(p.instrument, now))
            if until > trade.until:
                trade.until = until
                if self.terms.journal is not None:
                    self.terms.journal.renewed(trade.number, until)

    def leave(self, k: int, reason: str) -> None:
        """Cancel what rests in instrument `k` and close the position at the market."""
        trade = self.trades[k]
        if trade is None:
            return
        if trade.leaving and self._working(trade, "exit"):
            return
        trade.leaving = trade.leaving or reason
        for role in ("entry", "stop", "target"):
            if self._working(trade, role) and not self.cache.is_order_pending_cancel_local(trade.ids[role]):
                self.cancel_order(trade.ids[role])
        if self.recovery is not None and k in self.recovery.waits:
            return  # after a restart there is no market order before a first price
        size = self.ledger.positions[k].size
        if size and self._trades(k):
            trade.attempts += 1
            if trade.attempts > ATTEMPTS:
                self.decisions["could not be closed"] += 1
                return
            x = self.terms.instruments[k]
            order = self.order_factory.market(
                self.ids[k], OrderSide.SELL if size > 0 else OrderSide.BUY, self._quantity(x, abs(size)), reduce_only=True
            )
            self.send(k, trade, "exit", order)
        self._wake()

    def _time_exit(self, k: int, trade: Trade) -> None:
        if not trade.leaving:
            if trade.until > self.now():
                self.alert(trade.until, "horizon", k, trade)
            else:
                self.leave(k, "horizon")

    def _working(self, trade: Trade, role: str) -> bool:
        return role in trade.ids and not self.cache.is_order_closed(trade.ids[role])

    def send(self, k: int, trade: Trade, role: str, order: Any, price: int | None = None) -> None:
        """Submit one order of `trade`, written to the journal before; `price` its limit or trigger, 1e-9 units."""
        x, side = self.terms.instruments[k], 1 if order.side == OrderSide.BUY else -1
        if self.terms.journal is not None:
            at = None if price is None else price / SCALE
            one = Sent(self.numbers, role, str(order.client_order_id), side, order.quantity.as_double(), at)
            self.terms.journal.sent(trade.number, x.id, self.now(), one)
        trade.ids[role] = order.client_order_id
        self._register(order.client_order_id, k, role)
        self.submit_order(order)

    def _register(self, order_id: ClientOrderId, k: int, role: str) -> None:
        self.orders[order_id] = (k, role, self.numbers)
        self.numbers += 1

    def _wake(self) -> None:
        """A simulated venue looks at an order in flight at its next event; an alert at its arrival makes that exact."""
        if self.terms.order_latency_ns:
            self._at(self.now() + self.terms.order_latency_ns, lambda _event: None)

    def _at(self, ts: int, action: Callable[[Any], object]) -> None:
        self._alerts += 1
        self.time.set_time_alert_ns(f"cift-{self._alerts}", ts, callback=self.faults.guard(action))

    def stamp(self, ts: int) -> int:
        """A stamp of the engine's clock in the stream's time, ns."""
        return ts if self.terms.pace is None else self.terms.pace.stream(ts)

    def _price(self, x: Instrument, value: int) -> Price:
        return Price.from_raw(value * UNIT, x.price_precision)

    def _quantity(self, x: Instrument, value: int) -> Quantity:
        return Quantity.from_raw(value * UNIT, x.size_precision)

    # --- what became of them ----------------------------------------------------------------------------------------------------------

    def on_order_event(self, event: Any) -> None:
        with self._turn():
            self._heard(event)

    def _heard(self, event: Any) -> None:
        kind, order_id = type(event).__name__, event.client_order_id
        if order_id not in self.orders:  # somebody else's, or one of a venue that makes orders for us
            self._foreign = True
            return
        k, role, number = self.orders[order_id]
        self.order_types[kind] += 1
        self._note(kind, number, role, event)
        if self.witness is not None:
            self.witness("order", (kind, k, role, number, event))
        if self.terms.journal is not None and (kind != "OrderFilled" or role == "seed"):
            trade = self.trades[k]
            self.terms.journal.order(number, role, -1 if trade is None else trade.number, event, self.stamp(event.ts_event))
        if role == "seed":
            return
        vector, trade = self.last[k], self.trades[k]
        seen = (math.nan, math.nan) if vector is None else (vector.mid, vector.spread)
        told = (self.stamp(event.ts_event), self.terms.instruments[k].id, number, -1 if trade is None else trade.number, role)
        self.order_log.append((*told, kind.removeprefix("Order"), *seen))
        if kind == "OrderFilled":
            self._filled(k, role, number, event)
            if role in ("stop", "target") and (trade := self.trades[k]) is not None and self._working(trade, "entry"):
                self.cancel_order(trade.ids["entry"])  # a resting entry that was filled in part would fill again
        elif kind in ("OrderRejected", "OrderDenied") and role != "exit":
            self.decisions[f"{role} {'rejected' if kind == 'OrderRejected' else 'denied'}"] += 1
        if kind in _CLOSING:
            self._settle(k)

    def on_position_event(self, event: Any) -> None:
        if self._foreign:
            self.compare(self.ids.index(event.instrument_id))

    def held(self, k: int) -> int:
        """What the venue holds of instrument `k`, 1e-9 units."""
        return sum(p.quantity.raw // UNIT * (1 if p.is_long else -1) for p in self.cache.positions_open(instrument_id=self.ids[k]))

    def compare(self, k: int) -> str:
        """Halt entries while the venue holds something else of instrument `k` than our fills make; how they differ."""
        held, ours, cause = self.held(k), self.ledger.positions[k].size, f"venue {k}"
        if held == ours:
            self.release(cause)
            return ""
        self._foreign = True
        why = f"{self.terms.instruments[k].id}: the venue holds {held / SCALE:g}, the journal {ours / SCALE:g}"
        self.halt(cause, why)
        return why

    def _note(self, kind: str, number: int, role: str, event: Any) -> None:
        """Into the digest goes all that does not depend on the run: no ids, no wall clock."""
        parts = [kind, str(number), role, str(event.instrument_id), str(event.ts_event)]
        parts += [str(v) for name in _TOLD if (v := getattr(event, name, None)) is not None]
        self._digest.update(("|".join(parts) + "\n").encode())

    @property
    def digest(self) -> str:
        """SHA-256 over the ordered order events without run-dependent ids."""
        return self._digest.hexdigest()

    def _filled(self, k: int, role: str, number: int, event: Any, most: int | None = None) -> None:
        """`most`: what of the fill is not known yet, 1e-9 units; None: all of it."""
        x, trade = self.terms.instruments[k], self.trades[k]
        side = 1 if event.order_side == OrderSide.BUY else -1
        whole, price = event.last_qty.raw // UNIT, event.last_px.raw / UNIT / SCALE
        size = whole if most is None else min(whole, most)
        fee = event.commission.as_double() * (size / whole) if event.commission is not None else 0.0
        ts, units = self.stamp(event.ts_event), size / SCALE
        vector = self.last[k]
        mid = math.nan if vector is None else vector.mid
        decided, trade_number = (math.nan, -1) if trade is None else (trade.decided_mid, trade.number)
        maker = str(event.liquidity_side).rsplit(".", 1)[-1].lower()
        row = (
            ts, x.id, number, trade_number, role, side, price, units, fee, x.currency, maker, mid, decided, x.tick / SCALE * x.multiplier,
        )  # fmt: skip
        if self.terms.journal is not None and not self.terms.journal.fill(row, size, event):
            return
        self.fills.append(row)
        self.ledger.positions[k].fill(side, size, price, fee, x.multiplier)
        if trade is not None:
            trade.filled(role, side * size, price, fee, ts, self.ledger.positions[k].size)
        self._mark(k, mid, ts)

    def _settle(self, k: int) -> None:
        """After an order has ended: is the trade over, or is a position left without protection?"""
        trade = self.trades[k]
        if trade is None or self._working(trade, "entry"):
            return
        size = self.ledger.positions[k].size
        if size:
            if not self._working(trade, "exit") and (trade.leaving or not self._working(trade, "stop")):
                if trade.leaving:
                    self.alert(self.now() + RETRY_NS, "again", k, trade)
                else:
                    self.leave(k, "unprotected")
            return
        if any(self._working(trade, role) for role in ("stop", "target", "exit")):
            self.leave(k, trade.leaving or "closed")
            return
        self._close(k, trade)

    def _close(self, k: int, trade: Trade) -> None:
        self.trades[k] = None
        if not trade.units_in:
            self.decisions["entry not filled"] += 1
            if self.terms.journal is not None:
                self.terms.journal.closed(trade.number, self.now(), "entry not filled", None)
            if trade.crosses:
                self._cross(k, trade.signal.side)
            return
        x, s = self.terms.instruments[k], trade.signal
        gross = s.side * (trade.sold - trade.bought) * x.multiplier
        by = trade.leaving if trade.last_exit == "exit" else trade.last_exit
        self.positions.append((
            trade.number, x.id, trade.opened, self.now(), s.side, trade.units_in, trade.bought / trade.units_in,
            trade.sold / trade.units_out, gross, trade.fees, gross - trade.fees, x.currency, s.horizon_ns, s.regime, s.confidence,
            s.expected_ticks, s.cost_ticks, by,
        ))  # fmt: skip
        if self.terms.journal is not None:
            self.terms.journal.closed(trade.number, self.now(), by, self.positions[-1])
        self._mark(k, math.nan, self.now())

    def _mark(self, k: int, mid: float, ts: int) -> None:
        x, pnl = self.terms.instruments[k], self.ledger.mark(k, mid, ts)
        if self.terms.journal is not None:
            self.terms.journal.mark(ts, x.id, mid, pnl, self.ledger.positions[k])
        self.equity.append((ts, x.currency, pnl))


_TOLD: Final = ("order_side", "quantity", "price", "trigger_price", "last_qty", "last_px", "commission", "liquidity_side")
_TRADES: Final = (status.OPEN, status.UNKNOWN)
_CLOSING: Final = frozenset({"OrderFilled", "OrderCanceled", "OrderRejected", "OrderDenied", "OrderExpired"})


def expected_ticks(p: Prediction, h: int) -> float:
    """Expected mid move over horizon `h`, ticks: E|move| x (P(up) - P(down)) / (P(up) + P(down)); the sign is the side."""
    down, _, up = p.proba[h].tolist()
    return float(p.magnitude[h]) * (up - down) / (up + down) if up + down > 0 else 0.0


def _on_tick(value: int, tick: int) -> int:
    return round(value / tick) * tick
