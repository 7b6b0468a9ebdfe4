"""Slow and obvious twins of the kernels: dictionaries for the book, and for each feature its definition over the whole list of events.

:class:`Book` keeps orders and levels in dictionaries. :class:`Tape` notes what happened at every event; :func:`features` then
computes one row from its first i + 1 entries, each value by a loop over history. No state is carried, nothing is shared with the kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from catalog.events import Instrument, session_bounds

NAN = math.nan
INT64_MAX = 2**63 - 1
UNDEFINED = (INT64_MAX, -(2**63))


class Book:
    """One side is a dictionary price -> [size, orders]; an L3 book also knows its orders by id."""

    def __init__(self, feed: int = 3) -> None:
        self.feed = feed
        self.clear()

    def clear(self) -> None:
        self.orders: dict[int, tuple[int, int, int]] = {}
        self.levels: dict[int, dict[int, list[int]]] = {1: {}, -1: {}}

    def apply(self, action: str, side: int, price: int, size: int, order_id: int, flags: int) -> tuple[dict[int, int], dict[int, int]]:
        """Apply an event; returns the sizes it added and took away, by side."""
        added, removed = {1: 0, -1: 0}, {1: 0, -1: 0}
        if action == "R":
            self.clear()
        if action not in "ACM":
            return added, removed
        feed = 1 if flags & 64 else 2 if flags & 16 else 3
        if feed != self.feed:
            self.clear()
            self.feed = feed
        nothing = size <= 0 or price in UNDEFINED
        if feed == 3:
            self._order(action, side, price, size, order_id, nothing, added, removed)
        elif side != 0:
            levels = self.levels[side]
            if feed == 1:
                levels.clear()
                if not nothing and action != "C":
                    levels[price] = [size, 0]
            else:
                old = levels.pop(price, [0, 0])[0]
                if not nothing and action != "C":
                    levels[price] = [size, 0]
                new = levels.get(price, [0, 0])[0]
                added[side], removed[side] = max(new - old, 0), max(old - new, 0)
        return added, removed

    def _order(self, action, side, price, size, order_id, nothing, added, removed):  # type: ignore[no-untyped-def]
        before = self.orders.get(order_id)
        if before is None:
            if action == "C" or nothing or side == 0:
                return
            after = (side, price, size)
        elif action == "C":
            left = 0 if size <= 0 else max(before[2] - size, 0)
            after = (before[0], before[1], left) if left else None
        elif nothing:
            after = None
        else:
            after = (side or before[0], price, size)
        if before:
            del self.orders[order_id]
        if after:
            self.orders[order_id] = after
        if before and after and before[:2] == after[:2]:
            change = after[2] - before[2]
            added[after[0]], removed[after[0]] = max(change, 0), max(-change, 0)
        else:
            if before:
                removed[before[0]] = before[2]
            if after:
                added[after[0]] = after[2]
        self.levels = {1: {}, -1: {}}
        for s, p, q in self.orders.values():
            level = self.levels[s].setdefault(p, [0, 0])
            level[0] += q
            level[1] += 1

    def side(self, side: int, levels: int = 10) -> list[tuple[int, int, int]]:
        """(price, size, orders) from the best on; sizes are sums modulo 2**64, and what exceeds an int64 reads as its maximum."""
        best = sorted(self.levels[side], reverse=side > 0)[:levels]
        return [(p, min(self.levels[side][p][0] % 2**64, INT64_MAX), self.levels[side][p][1]) for p in best]


@dataclass
class Moment:
    """What one event was, and the book after it."""

    t: int  # running maximum of ts_init
    ts_event: int
    action: str
    side: int
    price: int
    size: int
    snapshot: bool
    bids: list[tuple[int, int, int]]
    asks: list[tuple[int, int, int]]
    feed: int
    added: dict[int, int]
    removed: dict[int, int]
    cancelled: dict[int, float] = field(default_factory=dict)
    before: tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]] = field(default_factory=lambda: ([], []))

    @property
    def two_sided(self) -> bool:
        return bool(self.bids and self.asks)

    @property
    def sound(self) -> bool:
        return self.two_sided and float(self.asks[0][0]) >= float(self.bids[0][0])

    @property
    def mid(self) -> float:
        return (float(self.bids[0][0]) + float(self.asks[0][0])) / 2 if self.two_sided else NAN

    @property
    def trade(self) -> bool:
        return self.action == "T" and self.size > 0


class Tape:
    """The moments of one instrument's events, and which of their books are settled."""

    def __init__(self, events, instrument: Instrument) -> None:  # type: ignore[no-untyped-def]
        self.instrument, self.tick = instrument, float(max(instrument.tick, 1))
        book = Book(instrument.level)
        self.moments: list[Moment] = []
        owed: tuple[int, int, float] = (-INT64_MAX, 0, 0.0)
        sides: tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]] = ([], [])
        for e in events:
            action, side, size, flags = chr(e["action"]), int(e["side"]), int(e["size"]), int(e["flags"])
            added, removed = book.apply(action, side, int(e["price"]), size, int(e["order_id"]), flags)
            before, sides = sides, (book.side(1), book.side(-1))
            t = max(int(e["ts_init"]), self.moments[-1].t) if self.moments else int(e["ts_init"])
            snapshot = bool(flags & 32) and action != "T"
            m = Moment(t, int(e["ts_event"]), action, side, int(e["price"]), size, snapshot, *sides, book.feed, added, removed)
            m.before = before
            if m.trade and side:  # the passive side now owes this much, to be taken away without being a cancel
                if owed[:2] != (m.ts_event, -side):
                    owed = (m.ts_event, -side, 0.0)
                owed = (*owed[:2], owed[2] + float(size))
            for s in (1, -1):
                v = float(removed[s])
                if v and not m.snapshot and owed[:2] == (m.ts_event, s):
                    paid = min(v, owed[2])
                    owed, v = (*owed[:2], owed[2] - paid), v - paid
                m.cancelled[s] = 0.0 if m.snapshot else v
            self.moments.append(m)
        self.stamps = [int(e["ts_init"]) for e in events]
        stamps = [m.ts_event for m in self.moments]
        self.start: list[int] = []  # of each moment, the first moment of the same venue event
        for j, stamp in enumerate(stamps):
            self.start.append(self.start[-1] if j and stamp == stamps[j - 1] else j)
        self.ends = [  # the last moments of venue events that changed the best ten levels: there the book is settled
            j
            for j in range(len(stamps) - 1)
            if stamps[j] != stamps[j + 1] and any((m.bids, m.asks) != m.before for m in self.moments[self.start[j] : j + 1])
        ]


def ratio(a: float, b: float) -> float:
    return (a - b) / (a + b) if a + b > 0 else NAN


def queue(levels: list[tuple[int, int, int]], m: int) -> float:
    return float(levels[m][1]) if m < len(levels) else 0.0


def level_flow(old: Moment, new: Moment, m: int) -> float:
    """Order flow at level m between two books: Cont, Kukanov & Stoikov 2014 (m = 0), Xu, Gould & Howison 2018."""
    total = 0.0
    for sign, was, now in ((1, old.bids, new.bids), (-1, old.asks, new.asks)):
        worst = -math.inf
        p0 = sign * float(was[m][0]) if m < len(was) else worst
        p1 = sign * float(now[m][0]) if m < len(now) else worst
        if p1 > p0:
            total += sign * queue(now, m)
        elif p1 < p0:
            total -= sign * queue(was, m)
        else:
            total += sign * (queue(now, m) - queue(was, m))
    return total


def features(tape: Tape, i: int) -> dict[str, float]:
    """Every feature after event i, by its definition."""
    past = tape.moments[: i + 1]
    now, tick = past[-1], tape.tick
    deep, orders = now.feed >= 2, now.feed >= 3
    ends = [j for j in tape.ends if j < i]
    settled = [past[j] for j in ends]
    sound = [m for m in settled if m.sound]
    x: dict[str, float] = {}

    # --- book shape
    two = now.two_sided
    b, a = (queue(now.bids, 0), queue(now.asks, 0))
    x["mid"] = now.mid * 1e-9
    x["spread"] = spread = (float(now.asks[0][0]) - float(now.bids[0][0])) / tick if two else NAN
    bins = [max(0, min(127, math.floor((float(m.asks[0][0]) - float(m.bids[0][0])) / tick + 0.5))) for m in sound][-1024:]
    x["spread_percentile"] = NAN
    if two and bins:
        mine = max(0, min(127, math.floor(spread + 0.5)))
        x["spread_percentile"] = (sum(s < mine for s in bins) + 0.5 * sum(s == mine for s in bins)) / len(bins)
    for m in range(5):
        there = two and len(now.bids) > m and len(now.asks) > m and (deep or m == 0)
        x[f"imbalance_{m + 1}"] = ratio(queue(now.bids, m), queue(now.asks, m)) if there else NAN
    for n in (5, 10):
        total = [sum(float(q) for _, q, _ in side[:n]) for side in (now.bids, now.asks)]
        x[f"imbalance_top{n}"] = ratio(*total) if two and deep else NAN
    for name, side in (("bid", now.bids), ("ask", now.asks)):
        terms = []
        for k in range(1, min(len(side), 5)):
            distance = abs(float(side[k][0]) - float(side[k - 1][0])) / tick
            base = sum(float(q) for _, q, _ in side[:k]) * distance
            terms.append(float(side[k][1]) / base if base > 0 else 0.0)
        x[f"slope_{name}"] = sum(terms) / len(terms) if terms and deep else NAN
        x[f"gap_{name}"] = abs(float(side[0][0]) - float(side[1][0])) / tick if len(side) > 1 and deep else NAN
        x[f"orders_{name}"] = float(side[0][2]) if side and orders else NAN
        mean = fading([(queue(m.bids, 0) + queue(m.asks, 0)) / 2 for m in sound], 64)
        x[f"queue_{name}"] = queue(side, 0) / (queue(side, 0) + mean) if two and queue(side, 0) + mean > 0 else NAN
    x["order_imbalance"] = ratio(float(now.bids[0][2]), float(now.asks[0][2])) if two and orders else NAN
    x["weighted_mid"] = (float(now.bids[0][0]) * a + float(now.asks[0][0]) * b) / (a + b) / tick - now.mid / tick if two and a + b else NAN
    x["microprice"] = microprice(settled, now, tick)

    # --- order flow
    flows: list[tuple[int, list[float]]] = []  # the moment at which each counts, and its five levels
    for k, j in enumerate([*ends, i]):
        last = past[ends[k - 1]] if k else None
        restored = any(m.snapshot and m.action != "T" for m in past[tape.start[j] : j + 1])
        if last and last.sound and past[j].sound and not restored:
            flows.append((j, [level_flow(last, past[j], m) for m in range(5 if deep else 1)]))
    depth1 = fading([(queue(m.bids, 0) + queue(m.asks, 0)) / 2 for m in sound], 64)
    depth5 = fading([sum(queue(s, m) for m in range(5) for s in (b.bids, b.asks)) / 10 for b in sound], 64)

    def clock(values: list[tuple[int, float]], half_life: float) -> float:
        return math.fsum(v * 0.5 ** ((now.t - past[j].t) / 1e9 / half_life) for j, v in values)

    def counted(values: list[tuple[int, float]], half_life: float) -> float:
        """Decay by events that are no snapshot."""
        ages = [0] * (i + 1)
        for j in range(i - 1, -1, -1):
            ages[j] = ages[j + 1] + (not past[j + 1].snapshot)
        return math.fsum(v * 0.5 ** (ages[j] / half_life) for j, v in values)

    first = [(j, f[0]) for j, f in flows]
    for m in range(5):
        scale = depth1 if m == 0 else depth5
        x[f"ofi_{m + 1}"] = clock([(j, f[m]) for j, f in flows], 1) / scale if deep or m == 0 else NAN
    x["ofi_fast"] = clock(first, 0.125) / depth1
    x["ofi_slow"] = clock(first, 64) / depth1
    x["ofi_events"] = counted(first, 64) / depth1

    # --- trades, additions and cancels
    trades = [(j, m) for j, m in enumerate(past) if m.trade]
    signed = [(j, m) for j, m in trades if m.side]
    buys = [(j, float(m.size)) for j, m in signed if m.side > 0]
    sells = [(j, float(m.size)) for j, m in signed if m.side < 0]
    for h in (1, 8, 64):
        at = signed[-1][0] if signed else 0  # the ratio does not change between trades
        bought, sold = (sum(v * 0.5 ** ((past[at].t - past[j].t) / 1e9 / h) for j, v in side) for side in (buys, sells))
        x[f"trade_imbalance_{h}s"] = ratio(bought, sold)
    adds = [(j, 1.0) for j, m in enumerate(past) if any(m.added.values()) and not m.snapshot]
    cancels = [(j, 1.0) for j, m in enumerate(past) if any(m.cancelled.values())]
    weight = counted([(j, 1.0) for j, m in enumerate(past) if not m.snapshot], 64)
    for name, hits, needs in (("buy", buys, 1), ("sell", sells, 1), ("add", adds, 2), ("cancel", cancels, 2)):
        hits = [(j, 1.0) for j, _ in hits]
        x[f"rate_{name}"] = clock(hits, 8) * math.log(2) / 8 if now.feed >= needs else NAN
        x[f"share_{name}"] = counted(hits, 64) / weight if now.feed >= needs and weight else NAN
    for name, amounts in (("add", [{} if m.snapshot else m.added for m in past]), ("cancel", [m.cancelled for m in past])):
        hits_by_side = [[(j, float(v.get(s, 0))) for j, v in enumerate(amounts) if v.get(s, 0)] for s in (1, -1)]
        at = max((j for side in hits_by_side for j, _ in side), default=0)
        bid, ask = (sum(v * 0.5 ** ((past[at].t - past[j].t) / 1e9) for j, v in side) for side in hits_by_side)
        x[f"{name}_imbalance"] = ratio(bid, ask) if deep else NAN
    volumes = [(j, float(m.size)) for j, m in trades]
    fast, slow = clock(volumes, 1), clock(volumes, 64) / 64
    x["volume_ratio"] = fast / (fast + slow) if fast + slow > 0 else NAN
    through = [
        (j, 1.0)
        for j, m in signed
        if (m.side > 0 and m.before[1] and float(m.price) > float(m.before[1][0][0]))
        or (m.side < 0 and m.before[0] and float(m.price) < float(m.before[0][0][0]))
    ]
    x["trade_through"] = clock(through, 8)

    # --- toxicity and impact
    x["vpin"] = vpin([(m.side, float(m.size)) for _, m in signed])
    x |= impact(tape, i, [j for j, _ in signed])

    # --- price
    mids = [m.mid for m in sound]
    for n in (16, 128):
        x[f"return_{n}e"] = (now.mid - mids[-n]) / tick if two and len(mids) >= n else NAN
    for h in (1, 8, 64):
        edge = (now.t // 125_000_000 - 8 * h + 1) * 125_000_000  # the end of the grid cell h seconds back
        began = [m for m in past if m.t < edge]
        x[f"return_{h}s"] = (now.mid - settled_mid(tape, i, len(began))) / tick if two and began else NAN
    moves: list[tuple[int, float]] = []
    last_mid = NAN
    for j in ends:
        if past[j].sound:
            r = (past[j].mid - last_mid) / tick
            if r != 0 and not math.isnan(r):
                moves.append((j, r))
            last_mid = past[j].mid
    for h in (8, 64):
        x[f"volatility_{h}s"] = math.sqrt(clock([(j, r * r) for j, r in moves], h) * math.log(2) / h)
    bounce = [(j, r * r + 2 * r * (moves[k - 1][1] if k else 0.0)) for k, (j, r) in enumerate(moves)]
    x["volatility_robust"] = math.sqrt(max(clock(bounce, 8), 0.0) * math.log(2) / 8)
    at = moves[-1][0] if moves else 0
    up, down = (sum(r * r * 0.5 ** ((past[at].t - past[j].t) / 1e9 / 64) for j, r in moves if r * s > 0) for s in (1, -1))
    x["signed_jump"] = ratio(up, down)
    opens, since = session(tape, i)
    inside = [past[j].mid for j in ends if past[j].sound and j + 1 >= since]
    x["high_distance"] = (max([*inside, now.mid]) - now.mid) / tick if two else NAN
    x["low_distance"] = (now.mid - min([*inside, now.mid])) / tick if two else NAN

    # --- time
    x["seconds_since_open"] = (now.t - opens) * 1e-9
    x["time_since_trade"] = (now.t - trades[-1][1].t) * 1e-9 if trades else NAN
    events = [(j, 1.0) for j, m in enumerate(past) if not m.snapshot]
    fast, slow = clock(events, 1), clock(events, 64) / 64
    x["intensity"] = fast * math.log(2)
    x["intensity_ratio"] = fast / (fast + slow) if fast + slow > 0 else NAN
    return x


def fading(values: list[float], half_life: float) -> float:
    """Weighted mean, the newest value with weight 1."""
    if not values:
        return NAN
    weights = [0.5 ** (k / half_life) for k in range(len(values) - 1, -1, -1)]
    return math.fsum(w * v for w, v in zip(weights, values)) / math.fsum(weights)


def settled_mid(tape: Tape, i: int, n: int) -> float:
    """The mid of the last sound book that had settled when event number n (or a later one that is here) came."""
    known = [tape.moments[j].mid for j in tape.ends if j < i and j + 1 <= n and tape.moments[j].sound]
    return known[-1] if known else NAN


def session(tape: Tape, i: int) -> tuple[int, int]:
    """(open of the session of event i, number of the first event since the last open or close)."""
    opens, until, since = 0, -INT64_MAX, 0
    for j, e in enumerate(tape.stamps[: i + 1]):
        if e > until:
            opens, closes = session_bounds(tape.instrument.session, e)
            until = (opens if e < opens else closes) - 1
            since = j
    return opens, since


def vpin(trades: list[tuple[int, float]]) -> float:
    """Easley, Lopez de Prado & O'Hara 2012: 50 buckets of 32 mean trade sizes each, filled in turn, a trade running over where it must."""
    buckets: list[tuple[float, float]] = []
    bought = sold = capacity = 0.0
    for n, (side, volume) in enumerate(trades):
        weights = [0.5 ** (k / 256) for k in range(n, -1, -1)]
        size = 32 * math.fsum(w * v for w, (_, v) in zip(weights, trades)) / math.fsum(weights)
        capacity = capacity or size
        left = volume
        while left >= (room := capacity - (bought + sold)):
            bought, sold = bought + room * (side > 0), sold + room * (side < 0)
            left -= room
            buckets.append((abs(bought - sold), capacity))
            bought, sold, capacity = 0.0, 0.0, size
        bought, sold = bought + left * (side > 0), sold + left * (side < 0)
    latest = buckets[-50:]
    return sum(v for v, _ in latest) / sum(v for _, v in latest) if latest else NAN


def impact(tape: Tape, i: int, signed: list[int]) -> dict[str, float]:
    """Kyle's lambda with its standard error, and Amihud's ratio, over the latest 128 full groups of 8 trades that another has followed."""
    groups = []
    for k in range(0, len(signed) - 8, 8):
        members = [tape.moments[j] for j in signed[k : k + 8]]
        move = settled_mid(tape, i + 1, signed[k + 8]) - settled_mid(tape, i + 1, signed[k])
        if not math.isnan(move):
            groups.append((move / tape.tick, sum(m.side * float(m.size) for m in members), sum(float(m.size) for m in members)))
    groups = groups[-128:]
    n = len(groups)
    if n < 8:
        return {"kyle_lambda": NAN, "kyle_lambda_se": NAN, "amihud": NAN}
    y, x, v = ([g[c] for g in groups] for c in range(3))
    trade = sum(v) / (8 * n)
    mx, my = math.fsum(x) / n, math.fsum(y) / n
    sxx = math.fsum((q - mx) ** 2 for q in x)
    slope = math.fsum((q - mx) * (p - my) for p, q in zip(y, x)) / sxx if sxx else NAN
    residuals = math.fsum((p - my - slope * (q - mx)) ** 2 for p, q in zip(y, x))
    return {
        "kyle_lambda": slope * trade,
        "kyle_lambda_se": math.sqrt(residuals / (n - 2) / sxx) * trade if sxx else NAN,
        "amihud": sum(abs(p) / w for p, w in zip(y, v)) / n * trade,
    }


def quote_state(m: Moment, tick: float) -> tuple[tuple[int, int], int] | None:
    """((bucket of |imbalance|, spread up to 3), sign of the imbalance) of a quote that is neither crossed nor locked."""
    if not m.two_sided or float(m.asks[0][0]) <= float(m.bids[0][0]):
        return None
    imbalance = ratio(queue(m.bids, 0), queue(m.asks, 0))
    if math.isnan(imbalance):
        return None
    spread = (float(m.asks[0][0]) - float(m.bids[0][0])) / tick
    return (min(int(5 * abs(imbalance)), 4), max(1, int(min(spread, 3) + 0.5))), (imbalance > 0) - (imbalance < 0)


def microprice(settled: list[Moment], now: Moment, tick: float) -> float:
    """Stoikov 2018 by asynchronous value iteration: visit the quote changes in order, solve the row of the state just left."""
    visits: dict[object, float] = {}
    rewards: dict[object, float] = {}
    moves: dict[tuple[object, object], float] = {}
    value: dict[object, float] = {}
    last: tuple[Moment, tuple[tuple[int, int], int]] | None = None
    for m in settled:
        state = quote_state(m, tick)
        if last and state and (last[1] != state or last[0].mid != m.mid):
            (c, was), (d, sign) = last[1], state
            visits[c] = visits.get(c, 0) + 1
            rewards[c] = rewards.get(c, 0.0) + was * max(-100.0, min(100.0, (m.mid - last[0].mid) / tick))
            moves[c, d] = moves.get((c, d), 0.0) + was * sign
            value[c] = (rewards[c] + sum(v * value.get(y, 0.0) for (x, y), v in moves.items() if x == c)) / (visits[c] + 10)
        last = (m, state) if state else None
    here = quote_state(now, tick)
    return here[1] * value.get(here[0], 0.0) if here else NAN
