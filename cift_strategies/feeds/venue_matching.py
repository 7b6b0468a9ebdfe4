"""A test venue's matching: its accounts' orders against the market that it is shown, by price and time, behind the displayed queue.

Takes EVENT rows and commands; gives :class:`Report`s, each with the whole order after it, so that the reports alone make the books again.
An order that rests is filled when trades have gone through what was displayed before it, or when the market trades or quotes through its
price; one that crosses takes what is displayed. The market does not notice us. Sizes and prices are ints in 1e-9 units, times ns of the
wall.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal

from nautilus_trader.model import Currency

from catalog.errors import InputError
from catalog.events import F_LAST, F_SNAPSHOT, SCALE, TRADE, Instrument
from cift_strategies.feeds.venue_books import Book

type Status = Literal["held", "accepted", "rejected", "canceled", "filled"]
KINDS: Final = ("market", "limit", "stop")
LIVES: Final = ("gtc", "ioc", "fok")
ENDED: Final = frozenset({"rejected", "canceled", "filled"})


@dataclass(slots=True)
class Order:
    """As it is told on the line. `held`: a child whose parent has not filled, or an order before there is a market; `linked`: its siblings,
    of which one's end ends the other."""

    client: str  # the client's id; one without is named by the venue
    instrument: str
    side: int
    kind: str
    size: int
    price: int | None = None
    trigger: int | None = None
    life: str = "gtc"
    post_only: bool = False
    reduce_only: bool = False
    parent: str | None = None
    linked: tuple[str, ...] = ()
    venue: str = ""  # the venue's id
    status: Status = "accepted"
    filled: int = 0
    paid: float = 0.0  # price x units
    accepted: int = 0
    last: int = 0
    triggered: bool = False

    @property
    def left(self) -> int:
        return self.size - self.filled

    @property
    def open(self) -> bool:
        return self.status not in ENDED

    @property
    def works(self) -> bool:
        return self.status == "accepted"

    @classmethod
    def parse(cls, told: Any) -> Order:
        """From a line's table. Raises InputError."""
        try:
            order = cls(**{**told, "linked": tuple(told.get("linked", ()))})
            ints = [order.side, order.size, *(v for v in (order.price, order.trigger) if v is not None)]
            if not all(type(v) is int for v in ints) or not isinstance(order.client, str) or not isinstance(order.instrument, str):
                raise TypeError("side, size, price and trigger are whole numbers, ids are texts")
        except (TypeError, AttributeError) as e:
            raise InputError(f"no order: {e}") from None
        return replace(order, venue="", status="accepted", filled=0, paid=0.0, accepted=0, last=0, triggered=False)


@dataclass(frozen=True, slots=True)
class Fill:
    id: str
    size: int
    price: int
    fee: float
    maker: bool


@dataclass(frozen=True, slots=True)
class Report:
    """`kind`: held, accepted, rejected, canceled, updated, triggered, filled, cancel_rejected, modify_rejected."""

    seq: int
    ts: int
    kind: str
    order: Order
    fill: Fill | None = None
    reason: str = ""

    def told(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def parse(cls, told: dict[str, Any]) -> Report:
        order = Order(**{**told["order"], "linked": tuple(told["order"]["linked"])})
        return cls(**{**told, "order": order, "fill": None if told["fill"] is None else Fill(**told["fill"])})


@dataclass(slots=True)
class _Place:
    """Where an order of ours rests."""

    ahead: int
    before: dict[int, None] = field(default_factory=dict)


class Matching:
    """One account on `instruments`. `tell` gets every report; `reports`: those of before, from which the books are made again.

    Raises InputError where these are of other instruments.
    """

    def __init__(
        self, instruments: Sequence[Instrument], tell: Callable[[Report], object], reports: Iterable[Report] = (),
        clock: Callable[[], int] = time.time_ns,
    ) -> None:  # fmt: skip
        self.instruments = {x.id: x for x in instruments}
        self.ids = [x.id for x in instruments]
        self.books = {x.id: Book() for x in instruments}
        self.orders: dict[str, Order] = {}  # by the venue's id
        self.known: dict[str, str] = {}  # the client's id -> the venue's
        self.positions = dict.fromkeys(self.ids, 0)
        self.cash: dict[str, float] = {x.currency: 0.0 for x in instruments}  # earned and paid, fees included
        self.fills: list[Report] = []
        self.seq, self.newest = 0, 0
        self._working: dict[str, dict[str, Order]] = {x: {} for x in self.ids}
        self._places: dict[str, _Place] = {}
        self._tell, self._clock, self._numbers, self._trades = tell, clock, 0, 0
        for report in reports:
            self._again(report)

    def _again(self, report: Report) -> None:
        o = report.order
        if o.instrument not in self.instruments:
            raise InputError(f"the books hold {o.instrument}, which is not traded here: name it, or begin other books")
        self.seq = report.seq
        if o.venue:
            self.orders[o.venue] = o = replace(o)
            self.known[o.client] = o.venue
            self._numbers = max(self._numbers, int(o.venue.removeprefix("V-")))
            self._keep(o)
        if report.fill is not None:
            self._count(o, report.fill)
            self.fills.append(report)
            self._trades += 1

    def _keep(self, o: Order) -> None:
        if o.open:
            self._working[o.instrument][o.venue] = o
        else:
            self._working[o.instrument].pop(o.venue, None)
            self._places.pop(o.venue, None)

    def _count(self, o: Order, f: Fill) -> None:
        x = self.instruments[o.instrument]
        self.positions[o.instrument] += o.side * f.size
        self.cash[x.currency] -= o.side * f.size / SCALE * f.price / SCALE * x.multiplier + f.fee

    def _report(self, kind: str, o: Order, fill: Fill | None = None, reason: str = "") -> None:
        self.seq += 1
        o.last = self._clock()
        report = Report(self.seq, o.last, kind, replace(o), fill, reason)
        if fill is not None:
            self.fills.append(report)
        self._keep(o)
        self._tell(report)

    # --- commands ---------------------------------------------------------------------------------------------------------------------

    def submit(self, orders: Sequence[Order], reject: str = "") -> None:
        """Take orders that belong together. Raises InputError, and takes none, where an id is known already (nothing is done twice) or an
        instrument is not traded here."""
        for o in orders:
            if o.instrument not in self.instruments:
                raise InputError(f"{o.instrument} is not traded here")
            if o.client and o.client in self.known:
                raise InputError(f"order {o.client} is known already")
        for o in orders:
            self._numbers += 1
            o.venue, o.accepted = f"V-{self._numbers}", self._clock()
            o.client = o.client or f"EXTERNAL-{o.venue}"
            self.orders[o.venue], self.known[o.client] = o, o.venue
        for o in orders:
            parent = None if o.parent is None else self._named(o.parent)
            if wrong := reject or self._wrong(o, parent):
                self._end(o, "rejected", wrong)
            elif o.status == "accepted" and parent is not None and not parent.filled:
                if parent.open:
                    self._hold(o)
                else:
                    self._end(o, "rejected", f"its parent {parent.client} is {parent.status}")
            elif o.open and not any(self.books[o.instrument].levels.values()):
                self._hold(o)  # until there is a market
            elif o.open:
                self._accept(o)

    def _hold(self, o: Order) -> None:
        o.status = "held"
        self._report("held", o)

    def cancel(self, name: str, races: bool = False) -> None:
        """Cancel the order of that client's or venue's id; `races`: it is filled before that. KeyError where nobody knows it."""
        o = self._named(name)
        if o is None:
            raise KeyError(name)
        if races and o.works:
            self._fill_at_once(o)
        if o.open:
            self._end(o, "canceled", "by request")
        else:
            self._report("cancel_rejected", o, None, f"it is {o.status}")

    def modify(self, name: str, size: int | None, price: int | None, trigger: int | None) -> None:
        """Change an order; unless only its size shrinks, it goes to the end of its queue. KeyError where nobody knows it."""
        o = self._named(name)
        if o is None:
            raise KeyError(name)
        new = replace(o, size=size or o.size, price=price or o.price, trigger=trigger or o.trigger)
        wrong = f"it is {o.status}" if not o.open else "it has filled more" if new.size <= o.filled else self._wrong(new, None)
        if wrong:
            self._report("modify_rejected", o, None, wrong)
            return
        keeps = new.price == o.price and new.size <= o.size
        o.size, o.price, o.trigger = new.size, new.price, new.trigger
        if not keeps:
            self._places.pop(o.venue, None)
        self._report("updated", o)
        if o.works and not keeps:
            self._match(o)

    def _named(self, name: str) -> Order | None:
        return self.orders.get(self.known.get(name, name))

    def _wrong(self, o: Order, parent: Order | None) -> str:
        """Why an order cannot be taken, or nothing."""
        x = self.instruments[o.instrument]
        if o.side not in (1, -1) or o.kind not in KINDS or o.life not in LIVES:
            return f"this venue takes {', '.join(KINDS)} orders of either side, {', '.join(LIVES)}"
        if o.size <= 0 or o.size % x.lot:
            return f"size {o.size / SCALE:g} is no multiple of the lot {x.lot / SCALE:g}"
        if (o.price is None) == (o.kind == "limit") or (o.trigger is None) == (o.kind == "stop"):
            return "a limit order has a price, a stop order a trigger, a market order neither"
        if any(p is not None and (p <= 0 or p % x.tick) for p in (o.price, o.trigger)):
            return f"prices are multiples of the tick {x.tick / SCALE:g}"
        if o.parent is not None and parent is None:
            return f"its parent {o.parent} is not known"
        if o.reduce_only and o.parent is None and not self._reducible(o):
            return "reduce-only, and there is nothing to reduce"
        return ""

    def _reducible(self, o: Order) -> int:
        return max(0, -o.side * self.positions[o.instrument])

    def _accept(self, o: Order) -> None:
        book = self.books[o.instrument]
        if o.kind == "limit" and o.post_only and o.price is not None and book.crosses(o.side, o.price):
            self._end(o, "rejected", "post-only, and it would cross")
            return
        o.status = "accepted"
        self._report("accepted", o)
        self._match(o)

    # --- matching ---------------------------------------------------------------------------------------------------------------------

    def _match(self, o: Order) -> None:
        """Fill what crosses; rest, or end, with what is left."""
        book = self.books[o.instrument]
        if o.kind == "stop" and not o.triggered:
            assert o.trigger is not None
            best = book.best(-o.side)
            if best is None or (best - o.trigger) * o.side < 0:
                return
            o.triggered = True
        crossing = book.crossing(o.side, o.price)
        if o.life == "fok" and sum(n for _, n in crossing) < o.left:
            self._end(o, "canceled", "it could not be filled whole")
            return
        for price, size in crossing:
            if o.works:
                self._fill(o, min(size, o.left), price, False)
        if o.works and (o.kind != "limit" or o.life != "gtc"):
            self._end(o, "canceled", "nothing more to be had")
        elif o.works and o.venue not in self._places:
            assert o.price is not None
            self._places[o.venue] = _Place(book.shown(o.side, o.price), book.queue(o.side, o.price))

    def _fill(self, o: Order, size: int, price: int, maker: bool) -> None:
        if o.reduce_only:
            size = min(size, self._reducible(o))
            if not size:
                self._end(o, "canceled", "reduce-only, and there is nothing to reduce")
                return
        x = self.instruments[o.instrument]
        units, at = size / SCALE, price / SCALE
        self._trades += 1
        owed = (x.maker_fee if maker else x.taker_fee) * units * at * x.multiplier + x.fee_per_unit * units
        fee = round(owed, Currency.from_str(x.currency).precision)
        fill = Fill(f"T-{self._trades}", size, price, fee, maker)
        o.filled += size
        o.paid += at * units
        o.status = "filled" if not o.left else o.status
        if not maker:
            self.books[o.instrument].take(o.side, price, size)
        self._count(o, fill)
        self._report("filled", o, fill)
        self._follow(o)

    def _fill_at_once(self, o: Order) -> None:
        """Somebody whom nobody sees trades with the whole order: at its price, or at the touch."""
        price = o.price or self.books[o.instrument].best(-o.side) or o.trigger
        if price is not None:
            self._fill(o, o.left, price, o.kind == "limit")

    def _end(self, o: Order, status: Status, reason: str) -> None:
        o.status = status
        self._report(status, o, None, reason)
        self._follow(o)

    def _follow(self, o: Order) -> None:
        """What a fill or an end of an order means for its children and siblings."""
        for child in [c for c in self._working.get(o.instrument, {}).values() if c.parent == o.client]:
            if o.filled and child.open:
                grown, child.size = child.size != o.filled, o.filled
                if child.status == "held":
                    self._accept(child)
                elif grown:
                    self._report("updated", child)
            elif not o.open and child.open:
                self._end(child, "canceled", f"its parent {o.client} is {o.status}")
        for name in o.linked:
            other = self._named(name)
            if other is None or not other.open or other.parent != o.parent:
                continue
            if not o.open:
                self._end(other, "canceled", f"its sibling {o.client} is {o.status}")
            elif o.filled and other.left > o.left:
                other.size = other.filled + o.left
                self._report("updated", other)

    # --- the market -------------------------------------------------------------------------------------------------------------------

    def event(self, k: int, action: int, side: int, price: int, size: int, order_id: int, flags: int) -> None:
        """One EVENT row of instrument `k`."""
        name = self.ids[k]
        book, ours = self.books[name], self._working[name]
        if action == TRADE:
            if ours:
                self._traded(name, side, price, size)
            return
        changed = book.apply(action, side, price, size, order_id, flags)
        if not flags & F_LAST:
            if ours and changed is not None and not book.rebuilding:
                self._shorter(name, changed)
            return
        if book.rebuilding:
            book.rebuilding = bool(flags & F_SNAPSHOT) and not (book.levels[1] or book.levels[-1])
            if not book.rebuilding:
                self._anew(name)
        elif ours and changed is not None:
            self._shorter(name, changed)
        if ours:
            self._look(name)

    def _resting(self, name: str) -> list[tuple[Order, _Place]]:
        return [(o, self._places[v]) for v, o in self._working[name].items() if v in self._places]

    def _shorter(self, name: str, changed: tuple[int, int]) -> None:
        for o, place in self._resting(name):
            if (o.side, o.price) == changed:
                place.ahead = min(place.ahead, self.books[name].ahead(*changed, place.before))

    def _anew(self, name: str) -> None:
        """The book was cleared and is whole again: who was before us is only known by how much that was."""
        for o, place in self._resting(name):
            assert o.price is not None
            place.before = self.books[name].queue(o.side, o.price, place.ahead)
            place.ahead = min(place.ahead, self.books[name].ahead(o.side, o.price, place.before))

    def _traded(self, name: str, aggressor: int, price: int, size: int) -> None:
        left = {1: size, -1: size}
        for o, place in self._resting(name):
            if o.price is None or not o.works or aggressor == o.side:
                continue
            beyond = (o.price - price) * o.side  # > 0: the market has traded through our price
            if beyond < 0:
                continue
            if not beyond:
                mine, place.ahead = max(0, size - place.ahead), max(0, place.ahead - size)
            else:
                mine, place.ahead = size, 0
            if (mine := min(mine, left[o.side], o.left)) > 0:
                left[o.side] -= mine
                self._fill(o, mine, o.price, True)

    def _look(self, name: str) -> None:
        """At the end of an event: stops that are due, resting orders that the market has come through."""
        book = self.books[name]
        for o in list(self._working[name].values()):
            if o.status == "held" and o.parent is None and any(book.levels.values()):
                self._accept(o)
            if not o.works:
                continue
            if o.kind == "stop" or o.venue not in self._places:  # of before a restart: it goes to the end of its queue
                self._match(o)
            elif o.price is not None and book.crosses(o.side, o.price):
                for price, size in book.crossing(o.side, o.price):
                    if o.works:
                        mine = min(size, o.left)
                        book.take(o.side, price, mine)
                        self._fill(o, mine, o.price, True)

    # --- what is asked of it ----------------------------------------------------------------------------------------------------------

    def equity(self, capital: float) -> dict[str, float]:
        """By currency: `capital`, what was earned and paid, and positions at mid or what the last fill paid."""
        found = {c: capital + cash for c, cash in self.cash.items()}
        for name, size in self.positions.items():
            if size:
                x, (bid, ask) = self.instruments[name], self.books[name].told()
                last = next(r.fill.price / SCALE for r in reversed(self.fills) if r.fill is not None and r.order.instrument == name)
                mid = last if bid is None or ask is None else (bid + ask) / 2
                found[x.currency] += size / SCALE * mid * x.multiplier
        return found

    def status(self) -> dict[str, Any]:
        """Everything: orders, fills, positions (1e-9 units), cash by currency, the newest report that is in it; best bids and asks, and the
        newest stamp of the market."""
        return {
            "seq": self.seq, "ts": self._clock(), "orders": [asdict(o) for o in self.orders.values()],
            "fills": [r.told() for r in self.fills], "positions": self.positions, "cash": self.cash,
            "market": {name: book.told() for name, book in self.books.items()}, "newest": self.newest,
        }  # fmt: skip
