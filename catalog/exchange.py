"""A limit order book exchange with price-time priority that writes what Nasdaq's feed would publish, as DBN MBO records.

Takes the arrivals of one session (who acts when, on which side, and where each instrument's efficient price is), matches
them and gives one 56-byte MBO record per published message: A, C, M, and for each execution T, F and a C of the executed
size. :mod:`catalog.synthetic` decides the arrivals; this module is the venue, and the makers who keep its quotes.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

MBO: Final = np.dtype(
    [
        ("length", "u1"),  # of the record in units of 4 bytes
        ("rtype", "u1"),
        ("publisher_id", "<u2"),
        ("instrument_id", "<u4"),
        ("ts_event", "<u8"),  # ns UTC, matching engine
        ("order_id", "<u8"),
        ("price", "<i8"),  # 1e-9 units
        ("size", "<u4"),
        ("flags", "u1"),
        ("channel_id", "u1"),
        ("action", "u1"),
        ("side", "u1"),
        ("ts_recv", "<u8"),  # ns UTC, capture
        ("ts_in_delta", "<i4"),  # on this dataset: ts_recv - ts_event
        ("sequence", "<u4"),
    ]
)  # https://databento.com/docs/schemas/mbo
UNDEF_PRICE: Final = 2**63 - 1
LEVELS: Final = 8_192  # price grid of one session, in ticks; its middle is the opening price
ORDERS: Final = 1_024  # live orders of one side at most
SLACK: Final = 8_192  # records that one arrival may write beyond the target
BUY, SELL, ADD_BID, ADD_ASK, CANCEL_BID, CANCEL_ASK, MAKER, STEP_UP, STEP_DOWN = range(9)  # kinds of arrival; even kinds act on the bid

_A, _C, _F, _M, _R, _T = (np.int64(ord(c)) for c in "ACFMRT")  # numpy integers, so that a kernel is compiled once for all of them
_BID, _ASK, _NONE, _LAST, _NO = (np.int64(n) for n in (ord("B"), ord("A"), ord("N"), 128, 0))
_ALONE, _SHARED = np.int64(1), np.int64(0)  # whether an order holds a level of the null market
TS, RECV, ID, PRICE, SIZE, WHOSE, ACTION, SIDE, FLAGS, SEQUENCE, MID2, SPREAD = range(12)  # columns of `Exchange.out`
_PRICE, _SIZE, _SIDE, _WHOSE, _AFTER, _BEFORE, _PLACE, _BASE, _ORDER_ID = range(9)  # columns of `Exchange.orders`
_BEST, _LIVES, _LIVE = range(3)  # places in `Exchange.sides`
_HEAD, _TAIL = range(2)  # places in `Exchange.queues`
_N, _ID, _SEQ, _FREE, _NOW, _RECV = range(6)  # places in `Exchange.counters`


class Exchange(NamedTuple):
    """The state of the venue. I instruments, sides 0 bid and 1 ask; prices are levels of the session's grid; -1 is no order."""

    out: NDArray[np.int64]  # (capacity, 12) what was published, columns TS to SPREAD
    orders: NDArray[np.int64]  # (slots, 9) price, size, side, instrument, next and former of the queue, place in `sides`, base, id
    queues: NDArray[np.int64]  # (I, 2, LEVELS, 2) oldest and newest order of a level
    sides: NDArray[np.int64]  # (I, 2, 2 + ORDERS) best price (-1: empty), live orders, their slots in no order
    free: NDArray[np.int64]  # unused slots
    counters: NDArray[np.int64]  # records written, last order id, last sequence, free slots, newest ts_event, newest ts_recv
    random: NDArray[np.uint64]  # (1,) state of the generator


def new_exchange(instruments: int, capacity: int, seed: int) -> Exchange:
    """An exchange with empty books and room for `capacity` records."""
    slots, room = instruments * 2 * ORDERS, capacity + SLACK
    sides = np.zeros((instruments, 2, _LIVE + ORDERS), np.int64)
    sides[:, :, _BEST] = -1
    return Exchange(
        np.zeros((room, SPREAD + 1), np.int64),
        np.zeros((slots, _ORDER_ID + 1), np.int64),
        np.full((instruments, 2, LEVELS, 2), -1),
        sides,
        np.arange(slots)[::-1].copy(),
        np.array([0, 0, 0, slots, 0, 0]),
        np.array([seed], np.uint64),
    )


def records(x: Exchange, instrument_ids: NDArray[np.int64], origins: NDArray[np.int64], tick: int) -> NDArray[np.void]:
    """What `x` has published as MBO records (n,); `origins` (I,) are the prices of level 0 and `tick` the grid's step, 1e-9 units."""
    out = x.out[: x.counters[_N]]
    r = np.zeros(len(out), MBO)
    r["length"], r["rtype"], r["publisher_id"] = MBO.itemsize // 4, 160, 2
    for name, column in (("ts_event", TS), ("ts_recv", RECV), ("order_id", ID), ("size", SIZE), ("flags", FLAGS), ("action", ACTION)):
        r[name] = out[:, column]
    r["side"], r["sequence"], r["ts_in_delta"] = out[:, SIDE], out[:, SEQUENCE], out[:, RECV] - out[:, TS]
    r["instrument_id"] = instrument_ids[out[:, WHOSE]]
    r["price"] = np.where(out[:, ACTION] == _R, UNDEF_PRICE, origins[out[:, WHOSE]] + out[:, PRICE] * tick)
    return r


# for functions that only kernels call; the stubs lack the two options
_inner = njit(cache=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)  # type: ignore[call-overload]


@_inner
def _uniform(x: Exchange) -> float:
    """Next of SplitMix64 (Steele, Lea, Flood 2014) in (0, 1)."""
    x.random[0] += np.uint64(0x9E3779B97F4A7C15)
    z = x.random[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (float((z ^ (z >> np.uint64(31))) >> np.uint64(11)) + 0.5) * 2.0**-53


@_inner
def _geometric(x: Exchange, p: float) -> int:
    return int(np.log(_uniform(x)) / np.log(1.0 - p))


@_inner
def _shares(x: Exchange) -> int:
    """Round lots mostly, some odd ones."""
    if _uniform(x) < 0.25:
        return 1 + int(99 * _uniform(x))
    return 100 * (1 + min(_geometric(x, 0.5), 19))


@_inner
def _now(x: Exchange, t: int) -> None:
    """A new message of the venue at `t` or just after the last one; it reaches the capture server 15 us later or more."""
    c = x.counters
    c[_NOW] = max(t, c[_NOW] + 1)
    c[_RECV] = max(c[_NOW] + 15_000 - int(9_000 * np.log(_uniform(x))), c[_RECV])


@_inner
def _publish(x: Exchange, i: int, action: int, side: int, price: int, size: int, order_id: int) -> None:
    n, c = x.counters[_N], x.counters
    row, bid, ask = x.out[n], x.sides[i, 0, _BEST], x.sides[i, 1, _BEST]
    if action != _F and (action != _C or x.out[n - 1, ACTION] != _F):
        c[_SEQ] += 1  # T, F and C of one execution share the venue's message
    row[TS], row[RECV], row[ID], row[PRICE], row[SIZE], row[WHOSE] = c[_NOW], c[_RECV], order_id, price, size, i
    row[ACTION], row[SIDE], row[FLAGS], row[SEQUENCE] = action, side, _NO if action in (_T, _F) else _LAST, c[_SEQ]
    row[MID2], row[SPREAD] = (bid + ask, ask - bid) if bid >= 0 and ask >= 0 else (-1, -1)
    c[_N] = n + 1


@_inner
def _join(x: Exchange, o: int, price: int) -> None:
    """Order `o` goes to the end of the queue at `price`."""
    i, s = x.orders[o, _WHOSE], x.orders[o, _SIDE]
    last = x.queues[i, s, price, _TAIL]
    x.orders[o, _PRICE], x.orders[o, _BEFORE], x.orders[o, _AFTER] = price, last, -1
    if last < 0:
        x.queues[i, s, price, _HEAD] = o
    else:
        x.orders[last, _AFTER] = o
    x.queues[i, s, price, _TAIL] = o
    if x.sides[i, s, _BEST] < 0 or (price - x.sides[i, s, _BEST]) * (1 - 2 * s) > 0:
        x.sides[i, s, _BEST] = price


@_inner
def _leave(x: Exchange, o: int) -> None:
    """Order `o` leaves its queue; the best price falls back where the level is now empty."""
    i, s, price = x.orders[o, _WHOSE], x.orders[o, _SIDE], x.orders[o, _PRICE]
    before, after = x.orders[o, _BEFORE], x.orders[o, _AFTER]
    if before < 0:
        x.queues[i, s, price, _HEAD] = after
    else:
        x.orders[before, _AFTER] = after
    if after < 0:
        x.queues[i, s, price, _TAIL] = before
    else:
        x.orders[after, _BEFORE] = before
    step = 2 * s - 1
    while 0 <= x.sides[i, s, _BEST] < LEVELS and x.queues[i, s, x.sides[i, s, _BEST], _HEAD] < 0:
        x.sides[i, s, _BEST] += step
    if x.sides[i, s, _BEST] >= LEVELS:
        x.sides[i, s, _BEST] = -1


@_inner
def _rest(x: Exchange, i: int, s: int, price: int, size: int, base: int) -> None:
    """A new order of `size` joins the book: A. Ignored where the side is full or the price is off the grid."""
    if x.sides[i, s, _LIVES] == ORDERS or not 0 <= price < LEVELS:
        return
    x.counters[_FREE] -= 1
    o = x.free[x.counters[_FREE]]
    x.counters[_ID] += 1
    order = x.orders[o]
    order[_ORDER_ID], order[_SIZE], order[_SIDE], order[_WHOSE], order[_BASE] = x.counters[_ID], size, s, i, base
    x.sides[i, s, _LIVE + x.sides[i, s, _LIVES]] = o
    x.orders[o, _PLACE] = x.sides[i, s, _LIVES]
    x.sides[i, s, _LIVES] += 1
    _join(x, o, price)
    _publish(x, i, _A, _ASK if s else _BID, price, size, x.orders[o, _ORDER_ID])


@_inner
def _reduce(x: Exchange, o: int, size: int) -> None:
    """C: `size` shares of order `o` are gone, executed or cancelled; the rest keeps its place in the queue."""
    i, s, price = x.orders[o, _WHOSE], x.orders[o, _SIDE], x.orders[o, _PRICE]
    x.orders[o, _SIZE] -= size
    if x.orders[o, _SIZE] == 0:
        _leave(x, o)
        x.sides[i, s, _LIVES] -= 1
        moved = x.sides[i, s, _LIVE + x.sides[i, s, _LIVES]]
        x.sides[i, s, _LIVE + x.orders[o, _PLACE]] = moved
        x.orders[moved, _PLACE] = x.orders[o, _PLACE]
        x.free[x.counters[_FREE]] = o
        x.counters[_FREE] += 1
    _publish(x, i, _C, _ASK if s else _BID, price, size, x.orders[o, _ORDER_ID])


@_inner
def _replace(x: Exchange, o: int, price: int, size: int) -> None:
    """M: a new price or a larger size loses the order's place in the queue."""
    if price != x.orders[o, _PRICE] or size > x.orders[o, _SIZE]:
        _leave(x, o)
        _join(x, o, price)
    x.orders[o, _SIZE] = size
    _publish(x, x.orders[o, _WHOSE], _M, _ASK if x.orders[o, _SIDE] else _BID, price, size, x.orders[o, _ORDER_ID])


@_inner
def _take(x: Exchange, i: int, s: int, limit: int, size: int) -> int:
    """A buyer (s 0) or seller (s 1) takes what rests on the other side up to `limit`; T, F and C per resting order.

    Gives the size left over. The last orders of a side are spared, so that no book empties.
    """
    while size > 0 and x.sides[i, 1 - s, _LIVES] > 2 and (limit - x.sides[i, 1 - s, _BEST]) * (1 - 2 * s) >= 0:
        o = x.queues[i, 1 - s, x.sides[i, 1 - s, _BEST], _HEAD]
        filled = min(size, x.orders[o, _SIZE])
        _publish(x, i, _T, _ASK if s else _BID, x.orders[o, _PRICE], filled, _NO)
        _publish(x, i, _F, _BID if s else _ASK, x.orders[o, _PRICE], filled, x.orders[o, _ORDER_ID])
        _reduce(x, o, filled)
        size -= filled
    return size


@_inner
def _quote(s: int, v: float, half: float) -> int:
    """The best price at which side `s` can quote `half` ticks away from the efficient price `v`."""
    return int(np.ceil(v + half)) if s else int(np.floor(v - half))


@_inner
def _maker(x: Exchange, i: int, v: float, half: float, stale: float, picked: float, t: int) -> None:
    """The makers look at the efficient price `v`.

    Quotes nearer to it than `stale` ticks go (picked off by informed traders with probability `picked`), then each side is
    brought back to the price `half` ticks or a little more from it.
    """
    for s in range(2):
        sign = 1 - 2 * s
        while (v - x.sides[i, s, _BEST]) * sign < stale and x.sides[i, s, _LIVES] > 2:
            price = x.sides[i, s, _BEST]
            _now(x, t)
            if _uniform(x) < picked:
                _take(x, i, 1 - s, price, np.int64(1 << 30))
            o = x.queues[i, s, price, _HEAD]
            while o >= 0 and x.sides[i, s, _LIVES] > 2:
                after = x.orders[o, _AFTER]
                _now(x, t + 500 + int(4_000 * _uniform(x)))
                if _uniform(x) < 0.25:
                    _replace(x, o, min(max(_quote(s, v, half) - sign * _geometric(x, 0.4), 0), LEVELS - 1), x.orders[o, _SIZE])
                else:
                    _reduce(x, o, x.orders[o, _SIZE])
                o = after
            if x.sides[i, s, _BEST] == price:
                break
    for s in range(2):
        sign, other = 1 - 2 * s, x.sides[i, 1 - s, _BEST]
        price = _quote(s, v, half)
        price = max(price, other + 1) if s else min(price, other - 1)
        if (price - x.sides[i, s, _BEST]) * sign > 0:
            for _ in range(1 + _geometric(x, 0.5)):
                _now(x, t + 500 + int(4_000 * _uniform(x)))
                _rest(x, i, s, price, _shares(x), _SHARED)


@_inner
def _cancel(x: Exchange, i: int, s: int, o: int, v: float, half: float) -> None:
    """The owner of order `o` thinks again: all of it goes, a part, or it moves."""
    sign, u = 1 - 2 * s, _uniform(x)
    if u < 0.75 or x.orders[o, _SIZE] == 1:
        _reduce(x, o, x.orders[o, _SIZE])
    elif u < 0.85:
        _reduce(x, o, 1 + int((x.orders[o, _SIZE] - 1) * _uniform(x)))
    elif u < 0.90:
        _replace(x, o, x.orders[o, _PRICE], 1 + int(1.5 * x.orders[o, _SIZE] * _uniform(x)))
    else:
        price, other = _quote(s, v, half) - sign * _geometric(x, 0.3), x.sides[i, 1 - s, _BEST]
        _replace(x, o, min(max(price, other + 1 if s else 0), LEVELS - 1 if s else other - 1), x.orders[o, _SIZE])


@_inner
def _act(x: Exchange, i: int, kind: int, v: float, half: float, depth: int) -> None:
    """One trader's arrival: take, add or cancel, placed by where the efficient price lies between the quotes."""
    s = kind & 1
    sign = 1 - 2 * s
    if kind <= SELL:
        limit = x.sides[i, 1 - s, _BEST] + sign * (1 if _uniform(x) < 0.1 else 0)
        left = _take(x, i, s, limit, _shares(x))
        if left and _uniform(x) < 0.3 and (x.sides[i, 1 - s, _BEST] - limit) * sign > 0:
            _rest(x, i, s, limit, left, _SHARED)
        return
    lean = min(max(sign * (v - 0.5 * (x.sides[i, 0, _BEST] + x.sides[i, 1, _BEST])), -1.0), 1.0)
    crowd = x.sides[i, s, _LIVES] / depth
    add = kind <= ADD_ASK
    if _uniform(x) < 0.4 * (crowd - 1.0 if add else 1.0 - crowd):
        add = not add
    if add:
        other = x.sides[i, 1 - s, _BEST]
        price = _quote(s, v, half)
        price = max(price, other + 1) if s else min(price, other - 1)
        if _uniform(x) > 0.3 + 0.25 * lean:
            price -= sign * (1 + _geometric(x, 0.22))
        _rest(x, i, s, price, _shares(x), _SHARED)
    elif x.sides[i, s, _LIVES] > 3:
        o = x.sides[i, s, _LIVE + int(x.sides[i, s, _LIVES] * _uniform(x))]
        if _uniform(x) < -0.5 * lean:
            o = x.queues[i, s, x.sides[i, s, _BEST], _TAIL]
        _cancel(x, i, s, o, v, half)


@_inner
def _act_null(x: Exchange, i: int, kind: int) -> None:
    """One arrival of the null market: trades and cancels never move the touch, sizes never tell of a move."""
    s = kind & 1
    sign = 1 - 2 * s
    if kind <= SELL:
        o = x.queues[i, 1 - s, x.sides[i, 1 - s, _BEST], _HEAD]
        if x.orders[o, _SIZE] > 1:
            _take(x, i, s, x.orders[o, _PRICE], min(_shares(x), x.orders[o, _SIZE] - 1))
        return
    if kind <= ADD_ASK and _uniform(x) < 0.6:
        _rest(x, i, s, x.sides[i, s, _BEST] - sign * (4 + _geometric(x, 0.3)), _shares(x), _SHARED)
        return
    o = x.sides[i, s, _LIVE + int(x.sides[i, s, _LIVES] * _uniform(x))]
    if x.orders[o, _BASE] == 0:
        _reduce(x, o, x.orders[o, _SIZE])
    else:
        if _uniform(x) < 0.5:
            o = x.queues[i, s, x.sides[i, s, _BEST], _HEAD]
        _replace(x, o, x.orders[o, _PRICE], 3 * _shares(x))


@_inner
def _step(x: Exchange, i: int, up: bool, t: int) -> None:
    """The null market's mid moves half a tick at one record: a level of one order goes, or one comes inside the spread."""
    grow = x.sides[i, 1, _BEST] - x.sides[i, 0, _BEST] == 1
    s = 1 if up == grow else 0
    sign = 1 - 2 * s
    if grow:
        o = x.queues[i, s, x.sides[i, s, _BEST], _HEAD]
        _reduce(x, o, x.orders[o, _SIZE])
        _now(x, t)
        _rest(x, i, s, x.sides[i, s, _BEST] - sign * 11, 3 * _shares(x), _ALONE)
        k = 0
        while k < x.sides[i, s, _LIVES]:  # whatever shares a level near the touch goes, so that one order holds it
            o = x.sides[i, s, _LIVE + k]
            if x.orders[o, _BASE] == 0 and (x.sides[i, s, _BEST] - x.orders[o, _PRICE]) * sign < 4:
                _now(x, t)
                _reduce(x, o, x.orders[o, _SIZE])
            else:
                k += 1
    else:
        far = x.sides[i, s, _BEST] - sign * 11
        _rest(x, i, s, x.sides[i, s, _BEST] + sign, 3 * _shares(x), _ALONE)
        o = x.queues[i, s, far, _HEAD]
        while o >= 0:
            after = x.orders[o, _AFTER]
            if x.orders[o, _BASE] == 1:
                _now(x, t)
                _reduce(x, o, x.orders[o, _SIZE])
            o = after


@njit(cache=True, error_model="numpy")
def run_session(
    x: Exchange,
    start: int,
    ts: NDArray[np.int64],
    kind: NDArray[np.int64],
    instrument: NDArray[np.int64],
    value: NDArray[np.float64],
    regime: NDArray[np.int64],
    half: NDArray[np.float64],
    stale: NDArray[np.float64],
    depth: NDArray[np.int64],
    picked: float,
    null: bool,
    target: int,
) -> int:
    """Open the books at `start` (R, then orders on ten levels), then work through the arrivals until `target` records are written.

    ts, kind, instrument, value, regime: (n,) arrivals in time order (ns; BUY to STEP_DOWN; index; efficient price in levels; index
    into the next three). half, stale (ticks) and depth (orders of a side): per regime. Gives the arrivals that were used.
    """
    for i in range(len(x.sides)):
        _now(x, start)
        _publish(x, i, _R, _NONE, _NO, _NO, _NO)
        for k in range(12):
            for s in range(2):
                first = LEVELS // 2 + (1 if s else 0)
                for _ in range(1 if null else 1 + _geometric(x, 0.4)):
                    _now(x, start + 1_000)
                    _rest(x, i, s, first - (1 - 2 * s) * k, 3 * _shares(x) if null else _shares(x), _ALONE if null else _SHARED)
    for n in range(len(ts)):
        if x.counters[_N] >= target:
            return n
        who, what, r = int(instrument[n]), int(kind[n]), int(regime[n])
        _now(x, ts[n])
        if what == MAKER:
            _maker(x, who, value[n], half[r], stale[r], picked, ts[n])
        elif what > MAKER:
            _step(x, who, what == STEP_UP, ts[n])
        elif null:
            _act_null(x, who, what)
        else:
            _act(x, who, what, value[n], half[r], depth[r])
    return len(ts)
