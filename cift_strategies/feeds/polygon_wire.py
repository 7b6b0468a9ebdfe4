"""Polygon's WebSocket messages -> rows of fixed width: parsing, order, duplicates, gaps, aggressors and the changes of level-2 books.

Takes frames as they came off the socket, gives packed rows (:data:`ROW`) and the trade ids beside them. Pure: no socket, no clock, no
Nautilus. What is no trade at the market, how sizes and prices are cut and how an aggressor is found is as in :mod:`catalog.tape`.

Order. `q` grows within a symbol and kind, with or without holes, as the service says. A jump is told as a gap while the symbol's numbers
have hardly had holes; of a symbol with many holes it says nothing. A number seen before is a duplicate; a smaller unseen one is late: a
late trade is delivered, it did happen; a late quote or book is not, as a newer one stands. Crypto has no numbers: trades are told apart by
their ids, quotes and books by their stamps.
"""

from __future__ import annotations

import json
import struct
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

from catalog.conditions import AUCTIONS, NOT_TRADES, SHARES_SINCE

ROW: Final = struct.Struct("<BbHI5q2q")  # kind, side, instrument, aux, five values, ts_event, time received (ns)
QUOTE, TRADE, LEVEL, BAR, VALUE, GAP, LATE, DUPLICATE = range(1, 9)
# QUOTE bid, ask, bid size, ask size | TRADE price, size | LEVEL price, size, action, flags | BAR open, high, low, close, volume; aux: its
# seconds | VALUE value | GAP records missing | LATE, DUPLICATE nothing. Prices and sizes in 1e-9 units.

MARKETS: Final[Mapping[str, Mapping[str, str]]] = {  # what a cluster offers: our name -> the service's channel
    "stocks": {"quotes": "Q", "trades": "T", "bars-1": "A", "bars-60": "AM"},
    "options": {"quotes": "Q", "trades": "T", "bars-1": "A", "bars-60": "AM"},
    "crypto": {"quotes": "XQ", "trades": "XT", "book": "XL2", "bars-1": "XAS", "bars-60": "XA"},
    "indices": {"values": "V", "bars-1": "A", "bars-60": "AM"},
}
NEW_SESSION_MS: Final = 3_600_000  # numbers that begin again after such a pause belong to another session
REMEMBERED: Final = 1_024  # numbers or ids of a symbol, to tell a duplicate from a late record
BILLION: Final = 1_000_000_000
ADD, MODIFY, CANCEL, CLEAR, F_LAST, F_SNAPSHOT = ord("A"), ord("M"), ord("C"), ord("R"), 128, 32  # as in catalog.events, without numba
LARGEST_INT: Final = 2**63 - 1
LARGEST: Final = 9.2e9  # what 64 bits hold in units of 1e-9
_VOID, _AUCTION = frozenset(NOT_TRADES), frozenset(AUCTIONS)


@dataclass(frozen=True, slots=True)
class Listing:
    """How the records of one symbol are told: its index in rows, decimals, the one exchange it is taken from (0: all), its round lot."""

    index: int
    price_digits: int
    size_digits: int
    exchange: int = 0
    lot: int = 100


class _Track:
    """One symbol in one channel."""

    __slots__ = ("asks", "bids", "dense", "index", "listing", "price_unit", "recent", "seq", "size_unit", "started", "ts")

    def __init__(self, listing: Listing) -> None:
        self.listing, self.index = listing, listing.index
        self.price_unit, self.size_unit = 10 ** (9 - listing.price_digits), 10 ** (9 - listing.size_digits)
        self.seq, self.ts, self.started = 0, 0, False
        self.dense = 0.8  # how surely the numbers have no holes by nature
        self.recent: deque[Any] = deque(maxlen=REMEMBERED)
        self.bids: dict[int, int] = {}
        self.asks: dict[int, int] = {}


class _Quoted:
    """The newest quote of a symbol and the newest with an earlier stamp, and the last change of its trade price."""

    __slots__ = ("ask", "before", "bid", "last", "tick", "ts")

    def __init__(self) -> None:
        self.ts, self.bid, self.ask = 0, 0, 0
        self.before = (0, 0, 0)
        self.last, self.tick = 0, 0

    def quote(self, ts: int, bid: int, ask: int) -> None:
        if ts > self.ts:
            self.before = (self.ts, self.bid, self.ask)
        self.ts, self.bid, self.ask = ts, bid, ask

    def side(self, ts: int, price: int, auction: bool) -> int:
        """Lee and Ready (1991), as `catalog.tape`: the newest quote before the trade's stamp, in the middle the last change of price."""
        if self.last and price != self.last:
            self.tick = 1 if price > self.last else -1
        self.last = price
        at, bid, ask = (self.ts, self.bid, self.ask) if self.ts < ts else self.before
        if not at or at >= ts or auction:
            return 0
        twice = 2 * price - bid - ask
        return self.tick if bid >= ask or twice == 0 else 1 if twice > 0 else -1


def nanos(x: Any) -> int:
    """A JSON number in units of 1e-9, exact for up to nine decimals, as `catalog.polygon.nanos`. Raises ValueError beyond 64 bits."""
    if type(x) is float:
        if -1e6 <= x <= 1e6:
            return round(x * 1e9)
        if not -LARGEST < x < LARGEST:
            raise ValueError("beyond what can be stored")
        return int((Decimal(repr(x)) * BILLION).to_integral_value())
    if type(x) is int and -LARGEST < x < LARGEST:
        return x * BILLION
    raise ValueError("no number")


def rounded(v: int, unit: int) -> int:
    """`v` to a multiple of `unit`, half to even."""
    whole, rest = divmod(v, unit)
    return (whole + (2 * rest > unit or (2 * rest == unit and whole & 1))) * unit


def stamp(t: Any) -> int:
    """A stamp of the service in ns: it sends milliseconds, on some feeds nanoseconds. Raises ValueError for anything else."""
    if type(t) is not int or t <= 0:
        raise ValueError("no stamp")
    return t * 1_000_000 if t < 10**14 else t * 1_000 if t < 10**17 else t


class Wire:
    """The messages of one cluster. `counts` grows; rows are taken away by the caller."""

    def __init__(self, market: str) -> None:
        self.market = market
        self.rows = bytearray()
        self.ids: list[str] = []
        self.counts: Counter[str] = Counter()
        self.lag_ns = 0  # of the newest message of the newest frame: from its stamp to its receipt
        self.tracks: dict[str, dict[str, _Track]] = {c: {} for c in MARKETS[market].values()}
        self._quoted: dict[str, _Quoted] = {}
        self._now = 0
        own: dict[str, Callable[[_Track, dict[str, Any]], None]] = {
            "Q": self._quote, "T": self._trade, "A": self._bar, "AM": self._bar, "V": self._value,
            "XQ": self._crypto_quote, "XT": self._crypto_trade, "XL2": self._book, "XA": self._bar, "XAS": self._bar,
        }  # fmt: skip
        self._of = {c: (own[c], tracks) for c, tracks in self.tracks.items()}
        self._symbol = "pair" if market == "crypto" else "sym"

    def add(self, channel: str, symbol: str, listing: Listing) -> None:
        self.tracks[channel][symbol] = _Track(listing)
        self._quoted.setdefault(symbol, _Quoted())

    def remove(self, channel: str, symbol: str) -> None:
        self.tracks[channel].pop(symbol, None)

    def take(self) -> tuple[bytes, bytes]:
        """(rows, ids of the trades among them, one a line) since the last time."""
        rows, ids = bytes(self.rows), "\n".join(self.ids).encode()
        self.rows.clear()
        self.ids.clear()
        return rows, ids

    def frame(self, data: bytes | str, received_ns: int) -> None:
        """Rows of one frame, an array of messages. What cannot be read is counted, by kind, and left out; the rest is delivered."""
        try:
            messages = json.loads(data)
        except (ValueError, RecursionError):
            self.counts["malformed frames"] += 1
            return
        if type(messages) is not list:
            messages = [messages]
        self._now = received_ns
        of, symbol, unread = self._of, self._symbol, 0
        for m in messages:
            try:
                own, tracks = of[m["ev"]]
                track = tracks.get(m[symbol] if symbol in m else m["T"])
                if track is None:
                    self.counts["not subscribed"] += 1
                else:
                    own(track, m)
            except (KeyError, TypeError, ValueError, OverflowError, IndexError, AttributeError, struct.error):
                unread += self._other(m)
        self.counts["messages"] += len(messages) - unread
        if messages and type(m) is dict and type(t := m.get("t")) is int and t > 0:
            self.lag_ns = received_ns - stamp(t)

    def _other(self, m: Any) -> int:
        """Whatever no handler has read; 1 where it is no message at all."""
        kind = m.get("ev") if type(m) is dict else None
        if kind == "status":
            self.counts["status messages"] += 1
        elif type(kind) is str and kind not in self._of:
            self.counts["unknown events"] += 1
        else:
            self.counts["malformed messages"] += 1
            return 1
        return 0

    def _mark(self, kind: int, track: _Track, missing: int = 0) -> None:
        self.rows += ROW.pack(kind, 0, track.index, 0, missing, 0, 0, 0, 0, 0, self._now)
        self.counts[("gaps", "late", "duplicates")[kind - GAP]] += 1

    def _new(self, track: _Track, seq: int, ms: int, standing: bool) -> bool:
        """Whether the record with this number is to be delivered; `standing`: it tells a state, so a late one is worth nothing."""
        step = seq - track.seq
        if step == 1:
            if track.dense < 1.0:
                track.dense += 0.02
        elif not track.started or (step <= 0 and ms - track.ts >= NEW_SESSION_MS):
            track.recent.clear()
        elif step > 1:
            if track.dense > 0.5:
                self._mark(GAP, track, step - 1)
            track.dense -= 0.1
        else:
            if seq in track.recent:
                self._mark(DUPLICATE, track)
                return False
            self._mark(LATE, track)
            if not standing:
                track.recent.append(seq)
            return not standing
        track.seq, track.ts, track.started = seq, ms, True
        track.recent.append(seq)
        return True

    def _price(self, v: int, track: _Track) -> int:
        if v % track.price_unit:
            self.counts["rounded prices"] += 1
            return rounded(v, track.price_unit)
        return v

    # --- stocks and options -----------------------------------------------------------------------------------------------------------

    def _quote(self, track: _Track, m: dict[str, Any]) -> None:
        ts = stamp(m["t"])
        bid, ask, bid_size, ask_size = nanos(m["bp"]), nanos(m["ap"]), nanos(m["bs"]), nanos(m["as"])
        if "q" in m and not self._new(track, m["q"], ts // 1_000_000, True):
            return
        if bid <= 0 or ask <= 0 or bid_size <= 0 or ask_size <= 0:
            self.counts["one-sided quotes"] += 1
            return
        if bid >= ask:
            self.counts["crossed quotes" if bid > ask else "locked quotes"] += 1
        self._quoted[m["sym"]].quote(ts, bid, ask)
        if ts < SHARES_SINCE and self.market == "stocks":
            bid_size, ask_size = bid_size * track.listing.lot, ask_size * track.listing.lot
        if bid % track.price_unit or ask % track.price_unit:
            bid, ask = self._price(bid, track), self._price(ask, track)
        unit = track.size_unit
        self.rows += ROW.pack(
            QUOTE, 0, track.index, 0, bid, ask, bid_size - bid_size % unit, ask_size - ask_size % unit, 0, ts, self._now
        )  # fmt: skip

    def _trade(self, track: _Track, m: dict[str, Any]) -> None:
        ts, price, size = stamp(m["t"]), nanos(m["p"]), nanos(m["s"])
        if "q" in m and not self._new(track, m["q"], ts // 1_000_000, False):
            return
        codes = m.get("c") or ()
        if type(codes) is int:
            codes = (codes,)
        auction = False
        if self.market == "stocks":
            if void := _VOID.intersection(codes):
                for code in void:
                    self.counts[f"condition {code}: {NOT_TRADES[code]}"] += 1
                self.counts["not trades"] += 1
                return
            auction = not _AUCTION.isdisjoint(codes)
        if price <= 0 or size <= 0:
            self.counts["bad trades"] += 1
            return
        side = self._quoted[m["sym"]].side(ts, price, auction)
        self._print(track, m.get("i"), price, size, side, ts)

    def _print(self, track: _Track, name: Any, price: int, size: int, side: int, ts: int) -> None:
        whole = size - size % track.size_unit
        if whole != size:
            self.counts["fractional sizes"] += 1
            if whole == 0:
                return
        self.ids.append(str(name).replace("\n", " ")[:36] if name else str(self.counts["messages"] + len(self.ids)))
        self.rows += ROW.pack(TRADE, side, track.index, 0, self._price(price, track), whole, 0, 0, 0, ts, self._now)

    def _bar(self, track: _Track, m: dict[str, Any]) -> None:
        ts = stamp(m["e"])
        if ts <= track.ts:
            self._mark(DUPLICATE if ts == track.ts else LATE, track)  # a revision: what was known first stands
            return
        track.ts = ts
        prices = [self._price(nanos(m[x]), track) for x in ("o", "h", "l", "c")]
        volume = nanos(m.get("v", 0))
        seconds = 60 if m["ev"] in ("AM", "XA") else 1
        self.rows += ROW.pack(BAR, 0, track.index, seconds, *prices, volume - volume % track.size_unit, ts, self._now)

    # --- indices ----------------------------------------------------------------------------------------------------------------------

    def _value(self, track: _Track, m: dict[str, Any]) -> None:
        ts, value = stamp(m["t"]), self._price(nanos(m["val"]), track)
        if ts < track.ts:
            self._mark(LATE, track)
            return
        track.ts = ts
        self.rows += ROW.pack(VALUE, 0, track.index, 0, value, 0, 0, 0, 0, ts, self._now)

    # --- crypto -----------------------------------------------------------------------------------------------------------------------

    def _elsewhere(self, track: _Track, m: dict[str, Any]) -> bool:
        if track.listing.exchange and m["x"] != track.listing.exchange:
            self.counts["other exchanges"] += 1
            return True
        return False

    def _crypto_quote(self, track: _Track, m: dict[str, Any]) -> None:
        if self._elsewhere(track, m):
            return
        ts = stamp(m["t"])
        bid, ask, bid_size, ask_size = nanos(m["bp"]), nanos(m["ap"]), nanos(m["bs"]), nanos(m["as"])
        if ts < track.ts:
            self._mark(LATE, track)
            return
        if ts == track.ts and (bid, ask, bid_size, ask_size) == track.recent[-1]:
            self._mark(DUPLICATE, track)
            return
        track.ts = ts
        track.recent.append((bid, ask, bid_size, ask_size))
        unit = track.size_unit
        bid_size, ask_size = bid_size - bid_size % unit, ask_size - ask_size % unit
        if bid <= 0 or ask <= 0 or bid_size <= 0 or ask_size <= 0:
            self.counts["one-sided quotes"] += 1
            return
        if bid >= ask:
            self.counts["crossed quotes" if bid > ask else "locked quotes"] += 1
        self.rows += ROW.pack(
            QUOTE, 0, track.index, 0, self._price(bid, track), self._price(ask, track), bid_size, ask_size, 0, ts, self._now
        )  # fmt: skip

    def _crypto_trade(self, track: _Track, m: dict[str, Any]) -> None:
        if self._elsewhere(track, m):
            return
        ts, price, size = stamp(m["t"]), nanos(m["p"]), nanos(m["s"])
        if price <= 0 or size <= 0:
            self.counts["bad trades"] += 1
            return
        if name := m.get("i"):
            if (m.get("x"), name) in track.recent:
                self._mark(DUPLICATE, track)
                return
            track.recent.append((m.get("x"), name))
        if ts < track.ts:
            self._mark(LATE, track)
        track.ts = max(ts, track.ts)
        codes = m.get("c") or ()
        if type(codes) is int:
            codes = (codes,)
        self._print(track, name, price, size, (2 in codes) - (1 in codes), ts)

    def _book(self, track: _Track, m: dict[str, Any]) -> None:
        """Each message is the whole book, up to 100 levels a side: the levels by which it differs from the one before are told."""
        if self._elsewhere(track, m):
            return
        ts = stamp(m["t"])
        bids, asks = self._side(track, m["b"]), self._side(track, m["a"])
        if ts < track.ts:
            self._mark(LATE, track)
            return
        track.ts = ts
        if bids and asks and max(bids) >= min(asks):
            self.counts["crossed books"] += 1
        flags = 0
        found: list[tuple[int, int, int, int]] = []  # side, price, size, action
        if not track.started:
            track.started, flags = True, F_SNAPSHOT
            found.append((0, 0, 0, CLEAR))
        for side, old, new in ((1, track.bids, bids), (-1, track.asks, asks)):
            found += [(side, p, 0, CANCEL) for p in old if p not in new]
        for side, old, new in ((1, track.bids, bids), (-1, track.asks, asks)):
            found += [(side, p, s, MODIFY if p in old else ADD) for p, s in new.items() if old.get(p) != s]
        track.bids, track.asks = bids, asks
        if not found:
            self.counts["unchanged books"] += 1
        k, last, now = track.index, len(found), self._now
        self.rows += b"".join(
            ROW.pack(LEVEL, side, k, 0, price, size, action, flags | F_LAST if n == last else flags, 0, ts, now)
            for n, (side, price, size, action) in enumerate(found, 1)
        )

    def _side(self, track: _Track, levels: Iterable[Any]) -> dict[int, int]:
        found: dict[int, int] = {}
        unit = track.size_unit
        for price, size in levels:
            p, s = self._price(nanos(price), track), nanos(size)
            if p <= 0 or s < 0:
                raise ValueError("no level")
            if s := s - s % unit:
                found[p] = min(found.get(p, 0) + s, LARGEST_INT)
        return found
