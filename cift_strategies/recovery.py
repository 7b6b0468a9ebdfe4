"""An account goes on after its process has died: from the journal into a strategy that has not started yet, then into the market.

:meth:`Recovery.restore` replays fills and marks through the same ledger, so that positions, PnL and fees are equal to the last bit.
:meth:`Recovery.begin` reports what the venue has forgotten as cancelled. :meth:`Recovery.go_on` waits for an instrument's first prices,
tells a simulated venue the position that it no longer knows, and sends stop and target again. Nothing is sent twice: whatever was sent
has its client order id in the journal, and what the venue still has is left as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Literal

from nautilus_trader.model import ClientOrderId, OrderSide, TimeInForce

from catalog.errors import InputError
from catalog.events import SCALE
from cift_models.features import NAMES
from cift_strategies.journal import Journal, Past
from cift_strategies.translate import UNIT

if TYPE_CHECKING:
    from cift_strategies.strategy import EnsembleStrategy, Trade

MID: Final = NAMES.index("mid")
ENDED: Final = frozenset({"OrderFilled", "OrderCanceled", "OrderRejected", "OrderDenied", "OrderExpired"})
FORGOTTEN: Final = "the venue no longer has it after a restart"


class Recovery:
    """What `journal` holds, put into `strategy`. `simulated`: the venue forgets positions and orders with its process. `resting`: what
    becomes of forgotten orders: "resend" sends stops, targets and entries that still may rest, "cancel" leaves positions at the market.

    Raises InputError where the journal contradicts itself or knows instruments in a position that are not traded now.
    """

    def __init__(
        self, strategy: EnsembleStrategy, journal: Journal, simulated: bool, resting: Literal["resend", "cancel"] = "resend",
        say: Callable[[str], object] = lambda _: None,
    ) -> None:  # fmt: skip
        self.strategy, self.journal, self.simulated, self.resting, self._say = strategy, journal, simulated, resting, say
        self.waits: set[int] = set()  # instruments whose position is not yet under the strategy's care again
        self.restored = 0  # points of the equity curve that are of before
        self._seeds: dict[int, ClientOrderId] = {}
        self._again: dict[int, int] = {}  # instrument -> when the next seed may be sent, ns
        self._unsent: list[tuple[int, Trade]] = []  # entries that nothing came of
        self._past: Past = journal.past()
        self._index = {x.id: k for k, x in enumerate(strategy.terms.instruments)}

    # --- before the node runs ---------------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Ledger, trades, fills, closed positions, equity and running numbers as they were."""
        s, past = self.strategy, self._past
        trades = self._trades()
        for seq, kind, row, *raw in past.steps:
            name = row[1]
            if name not in self._index:
                raise InputError(f"{self.journal.path} has traded {name}, which is not traded now: add it, or choose another --state")
            k = self._index[name]
            x, position = s.terms.instruments[k], s.ledger.positions[k]
            if kind == "fill":
                position.fill(row[5], raw[0], row[6], row[8], x.multiplier)
                s.fills.append(row)
                if (trade := trades.get(row[3])) is not None:
                    trade.filled(row[4], row[5] * raw[0], row[6], row[8], row[0], position.size)
            else:
                ts, _, mid, pnl, *told = row
                s.equity.append((ts, x.currency, s.ledger.mark(k, mid, ts)))
                if told != [position.size, position.average, position.realised, position.fees] or s.equity[-1][2] != pnl:
                    raise InputError(
                        f"{self.journal.path} contradicts itself at mark {seq} of {name}: its fills do not make that position; "
                        "were multiplier or currency changed? Choose another --state"
                    )
        self.restored = len(s.equity)
        s.positions += [tuple(row) for _, _, row in past.closed if row is not None]
        over, killed = {t for t, _, _ in past.closed}, past.switch[0] == "killed"
        exits = {trade for _, trade, role, *_ in past.sent if role == "exit"}
        for number, trade in trades.items():
            if number not in over:
                k = trade.signal.instrument
                if trade.units_in:
                    trade.leaving = "killed" if killed else "restart" if number in exits else ""
                    s.trades[k] = trade
                    self.waits.add(k)
                else:
                    self._unsent.append((k, trade))
        s.signals = 1 + max((n for n, *_ in past.signals), default=-1)
        s.numbers = 1 + max((n for n, *_ in past.sent), default=-1)
        s.decisions["entered"] = len(past.signals)
        s.order_types.update(past.counts)
        if killed:
            s.halt("killed", "kill switch")
        elif past.switch[0] == "paused":
            s.halt("paused", "paused")

    @property
    def idle(self) -> bool:
        """Whether nothing is under way: no position, and no entry that may rest at the venue."""
        return not self.waits and not self._unsent

    @property
    def switch(self) -> tuple[str, str]:
        """The node's state when it was last told one by hand, and why."""
        return self._past.switch

    def told(self) -> str:
        """One line for the user."""
        s = self.strategy
        pnl = ", ".join(f"{s.ledger.pnl(c):+.2f} {c}" for c in s.ledger.currencies)
        return f"the account goes on: {s.ledger.told() or 'flat'}; PnL {pnl}; {len(s.fills)} fills"

    def _trades(self) -> dict[int, Trade]:
        from cift_strategies.strategy import Trade

        found = {}
        for number, signal, name, mid in self._past.signals:
            if name in self._index:
                until = self._past.renewals.get(number, signal.ts + signal.horizon_ns)
                found[number] = Trade(number, replace(signal, instrument=self._index[name]), mid, {}, until)
        return found

    # --- once the node runs -----------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Give each order of the past its end, if the venue no longer has it; close what is over."""
        s, past, now = self.strategy, self._past, self.strategy.now()
        for _ in range(s.numbers):
            s.order_factory.generate_client_order_id()  # they carry a count: none is used twice, whatever the clock says
        gone, missing, open_ = 0, [], {t.number: t for t in [*s.trades, *(t for _, t in self._unsent)] if t is not None}
        for number, trade, role, own, name in past.sent:
            id_ = ClientOrderId(own)
            events = past.told.get(own, [])
            if name not in self._index:
                continue
            ended = bool(events) and events[-1] in ENDED
            if (order := s.cache.order(id_)) is not None:
                k = self._index[name]
                s.orders[id_] = (k, role, number)
                if trade in open_:
                    open_[trade].ids[role] = id_
                missing += [(e.ts_event, number, k, role, trade, e, n) for e, n in _unknown(order, past.filled.get(own, {}))]
                if s.cache.is_order_closed(id_) and not ended and (last := type(order.last_event).__name__) != "OrderFilled":
                    s.order_types[last] += 1
                    self.journal.order(number, role, trade, order.last_event, now)
                elif not s.cache.is_order_closed(id_) and role == "entry" and trade in open_:
                    s.trades[k] = open_[trade]
                    self.waits.add(k)
            elif not ended:
                gone += 1
                s.order_types["OrderCanceled"] += 1
                self.journal.cancelled(number, role, trade, own, now, FORGOTTEN if events else "it was never sent")
        for _, number, k, role, trade, event, size in sorted(missing, key=lambda m: m[:2]):
            if trade in open_:
                s.trades[k] = open_[trade]
                self.waits.add(k)
            s.order_types["OrderFilled"] += 1
            s._filled(k, role, number, event, size)
        self._unsent = [(k, t) for k, t in self._unsent if s.trades[k] is not t]
        if gone:
            self._say(f"{gone} orders of before the restart are gone: reported cancelled")
        if missing:
            self._say(f"{len(missing)} fills were made while nobody was here: they are ours now")
        for k, held in enumerate(list(s.trades)):
            if held is not None and not s.ledger.positions[k].size and not s._working(held, "entry"):
                self.waits.discard(k)
                s._close(k, held)
        for k in range(len(s.ids)) if not self.simulated else ():
            if why := s.compare(k):
                self._say(f"no entries: {why}")
        again = []
        for k, entry in self._unsent:
            submitted = any(past.told.get(own) for _, t, role, own, _ in past.sent if t == entry.number and role == "entry")
            self.journal.closed(entry.number, now, "lost at a restart" if submitted else "not sent", None)
            if self.resting == "resend" and entry.signal.entry != "cross" and s.trades[k] is None:
                again.append((k, entry))
        self._unsent = again
        self.waits |= {k for k, _ in again}

    def ready(self, k: int) -> bool:
        """Whether there is something to do about instrument `k` now: it has prices, for a seed those too without which the node denies
        orders at the market; and no seed is under way or to be waited with."""
        s, vector, seed, id_ = self.strategy, self.strategy.last[k], self._seeds.get(k), self.strategy.ids[k]
        if vector is None or not math.isfinite(vector.mid):
            return False
        if self.simulated and not (s.cache.has_quote_ticks(id_) or s.cache.has_trade_ticks(id_)):
            return False
        if seed is None or s.trades[k] is None:
            return True
        return bool(s.cache.is_order_closed(seed)) and (s.now() >= self._again[k] or not self._lacks(k))

    def _lacks(self, k: int) -> int:
        """What of our position of instrument `k` the venue does not hold."""
        return self.strategy.ledger.positions[k].size - self.strategy.held(k)

    def go_on(self, k: int) -> None:
        """Instrument `k` is :meth:`ready`: see to its position, or to the entry that was to rest."""
        s, trade, vector = self.strategy, self.strategy.trades[k], self.strategy.last[k]
        assert vector is not None
        if trade is None:
            self.waits.discard(k)
            for signal in [t.signal for j, t in self._unsent if j == k]:
                size = min(signal.size, s.ledger.most(k, vector.mid))  # prices have moved meanwhile
                if size and 0 <= s.now() - signal.ts < s.settings.entry_wait_ms * 1e6 and not s.halts:
                    s.enter(replace(signal, ts=s.now(), size=size))
            return
        if (lacks := self._lacks(k)) and self.simulated:
            self._seed(k, trade, lacks)
            return
        self.waits.discard(k)
        if s._working(trade, "entry"):
            s.alert(trade.signal.ts + int(s.settings.entry_wait_ms * 1e6), "wait", k, trade)
        if s.ledger.positions[k].size:
            self._protect(k, trade)
        else:
            s.alert(trade.until, "horizon", k, trade)

    def _seed(self, k: int, trade: Trade, lacks: int) -> None:
        """An order that gives a simulated venue back the position it has forgotten: its fill is no trade of the account's."""
        s, x = self.strategy, self.strategy.terms.instruments[k]
        self._again[k] = s.now() + SCALE  # it has features before the venue has a price
        order = s.order_factory.market(s.ids[k], OrderSide.BUY if lacks > 0 else OrderSide.SELL, s._quantity(x, abs(lacks)))
        self._seeds[k] = order.client_order_id
        s.send(k, trade, "seed", order)
        s._wake()

    def _protect(self, k: int, trade: Trade) -> None:
        """Stop, target and time of a position that is held again."""
        s, x, signal, now = self.strategy, self.strategy.terms.instruments[k], trade.signal, self.strategy.now()
        trade.ids.pop("seed", None)
        trade.attempts = 0
        trade.until = min(trade.until, now + signal.horizon_ns)  # a replay may have begun anew
        lost = [role for role in ("stop", "target") if not s._working(trade, role)]
        if trade.leaving or trade.until <= now or (lost and self.resting == "cancel"):
            why = trade.leaving or ("horizon" if trade.until <= now else "unprotected")
            trade.leaving = ""
            s.leave(k, why)
            return
        size = s.ledger.positions[k].size
        side, quantity = OrderSide.SELL if size > 0 else OrderSide.BUY, s._quantity(x, abs(size))
        for role in lost:
            if role == "stop":
                order = s.order_factory.stop_market(s.ids[k], side, quantity, s._price(x, signal.stop), reduce_only=True)
            else:
                price = s._price(x, signal.target)
                order = s.order_factory.limit(s.ids[k], side, quantity, price, TimeInForce.GTC, reduce_only=True)
            s.send(k, trade, role, order, getattr(signal, role))
        s._wake()
        s.alert(trade.until, "horizon", k, trade)


def _unknown(order: Any, known: dict[str, int]) -> list[tuple[Any, int]]:
    """Fills of a venue's order that are not `known` (trade_id -> size), each with what of it is not: a node that was not told of single
    fills makes one of them all."""
    left, found = order.filled_qty.raw // UNIT - sum(known.values()), []
    for event in order.events():
        if type(event).__name__ == "OrderFilled" and str(event.trade_id) not in known and left > 0:
            size = min(left, event.last_qty.raw // UNIT)
            found.append((event, size))
            left -= size
    return found


def recover(
    strategy: EnsembleStrategy, journal: Journal, simulated: bool, resting: Literal["resend", "cancel"] = "resend",
    say: Callable[[str], Any] = lambda _: None,
) -> Recovery | None:  # fmt: skip
    """Put the account of `journal` into `strategy`, where it goes on; None where it is a new one."""
    if not journal.goes_on:
        return None
    strategy.recovery = found = Recovery(strategy, journal, simulated, resting, say)
    found.restore()
    say(found.told())
    return found
