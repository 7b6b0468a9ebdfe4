"""The numba kernel behind :mod:`cift_models.features`: the layout of the state and what one event does to it.

The state is one int64 array, read as float64 where it holds floats. :func:`_step` settles the book if the venue's event is over, lets
time pass, takes the event and writes a row. An event costs one exponential: the decays of 8, 1 and 1/8 s are powers of that of 64 s. What
each event goes through is inlined, as in :mod:`catalog.book`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
from numba import njit

import catalog.book
import catalog.events
import cift_models.feature_table
from catalog.book import ADDED, BASE, CAP, EVENTS, FAR, FEED, HEAD, LEVELS, MAX, REMOVED, TOUCH, UNTIL, Array, applied, room
from catalog.events import F_SNAPSHOT, TRADE
from cift_models.feature_table import FEATURES, NAMES

F: Final = len(NAMES)
C: Final[Any] = ModuleType("columns")  # of the rows, by name: numba reads a module's attributes as constants
C.__dict__.update(zip(NAMES, range(F)))
NEEDS: Final = tuple(f.needs for f in FEATURES)
BLANK: Final = (  # columns that need two sides
    C.mid, C.spread, C.spread_percentile, C.imbalance_1, C.imbalance_2, C.imbalance_3, C.imbalance_4, C.imbalance_5,
    C.imbalance_top5, C.imbalance_top10, C.queue_bid, C.queue_ask, C.order_imbalance, C.weighted_mid, C.microprice,
    C.return_16e, C.return_128e, C.return_1s, C.return_8s, C.return_64s, C.high_distance, C.low_distance,
)  # fmt: skip

BUCKETS, BUCKET_TRADES = 50, 32  # VPIN
GROUPS, GROUP_TRADES, GROUPS_LEAST = 128, 8, 8  # Kyle's lambda, Amihud
RANKS, BINS = 1024, 128  # spread percentile
MIDS = 128  # ring of mids by event
CELLS, CELL_NS = 512, 125_000_000  # ring of mids by clock
STATES, PRIOR, JUMP = 15, 10.0, 100.0  # micro-price
NS: Final = 1e-9
LATEST: Final = 1 << 62  # ns, the year 2116; stamps outside 0..LATEST count as these
LN2: Final = math.log(2.0)
BY_EVENT: Final = 0.5 ** (1 / 64)
BY_TRADE: Final = 0.5 ** (1 / 256)

_SLOTS: Final = {
    # integers
    "now": 1, "stamp": 1, "feed": 1, "open": 1, "until": 1, "trade_ts": 1, "owed_ts": 1, "owed_side": 1, "cell": 1, "cell_end": 1,
    "dirty": 1, "restored": 1, "two": 1, "sound": 1, "was_sound": 1,  # best level touched since the settled book; two sides, not crossed
    "changed": 1, "fresh": 1,  # whether _now and _flows have work
    "mids_n": 1, "ranks_n": 1, "group_n": 1, "groups_n": 1, "buckets_n": 1,
    "quote": 1, "quote_sign": 1, "was_quote": 1, "was_sign": 1, "ranks": RANKS, "bins": BINS,
    # floats
    "tick": 1, "mid": 1, "settled_mid": 1, "move": 1, "high": 1, "low": 1, "owed": 1, "spread": 1, "was_mid": 1,
    "sum1": 1, "weight1": 1, "depth1": 1, "sum5": 1, "weight5": 1, "depth5": 1,  # mean sizes over settled books
    "weight": 1, "shares": 4, "ofi_events": 1,  # by event
    "ofi_fast": 1,  # half-life 1/8 s
    "ofi": 5, "volume_1": 1, "events_1": 1, "added": 2, "cancelled": 2, "bought_1": 2,  # 1 s
    "rates": 4, "through": 1, "squares": 1, "robust": 1, "bought_8": 2,  # 8 s
    "ofi_slow": 1, "volume_64": 1, "events_64": 1, "up": 1, "down": 1, "bought_64": 2,  # 64 s
    "end": 0,
    "trade_size": 1, "trade_weight": 1, "bucket": 2, "bucket_size": 1, "buckets": 2 * BUCKETS,
    "group_mid": 1, "group_flow": 1, "group_volume": 1, "groups": 3 * GROUPS,
    "mids": MIDS, "cells": CELLS,
    "micro_n": STATES, "micro_r": STATES, "micro_g": STATES, "micro_d": STATES * STATES,
    "five": 2, "ten": 2, "keys": 10, "sizes": 10,  # sums of the best five and ten of each side, the best five
    "settled_keys": 10, "settled_sizes": 10, "flow": 5,  # those of the settled book, and the order flow since by level
    "row": F,
}  # fmt: skip
_AT: Final = np.cumsum([HEAD, *_SLOTS.values()]).tolist()
S: Final[Any] = ModuleType("slots")  # of the state, by name: its first word
S.__dict__.update(zip(_SLOTS, _AT[:-1]))
WORDS: Final = _AT[-1] - HEAD


@njit(error_model="numpy", inline="always")
def _clock(s: Array, f: Array, t: Any) -> None:
    """Bring everything that decays by clock time to `t`, and note the mid at the end of the grid cells that are over."""
    t = min(max(t, 0), LATEST)
    if s[EVENTS] == 0:
        s[S.now], s[S.fresh] = t, 1
        s[S.cell] = t // CELL_NS
        s[S.cell_end] = (s[S.cell] + 1) * CELL_NS
        return
    if t <= s[S.now]:
        return
    x = math.exp((t - s[S.now]) * (-LN2 * NS / 64))
    s[S.now], s[S.fresh] = t, 1
    for j in range(S.ofi_slow, S.end):
        f[j] *= x
    x *= x
    x *= x
    x *= x
    for j in range(S.rates, S.ofi_slow):
        f[j] *= x
    x *= x
    x *= x
    x *= x
    for j in range(S.ofi, S.rates):
        f[j] *= x
    x *= x
    x *= x
    f[S.ofi_fast] *= x * x
    if t >= s[S.cell_end]:
        cell = t // CELL_NS
        s[S.cell_end] = (cell + 1) * CELL_NS
        for c in range(max(s[S.cell], cell - CELLS), cell):
            f[S.cells + (c & (CELLS - 1))] = f[S.settled_mid]
        s[S.cell], s[S.changed] = cell, 1


@njit(error_model="numpy")
def _vpin(s: Array, f: Array, k: Any, v: Any) -> None:
    """Fill volume buckets with a trade of `v`, aggressor `k` (0 buys), and sum the latest full ones (Easley et al. 2012)."""
    size = BUCKET_TRADES * f[S.trade_size] / f[S.trade_weight]
    if f[S.bucket_size] == 0.0:
        f[S.bucket_size] = size
    need = f[S.bucket_size] - (f[S.bucket] + f[S.bucket + 1])
    full = 0
    while v >= need:
        f[S.bucket + k] += need
        v -= need
        b = S.buckets + 2 * (s[S.buckets_n] % BUCKETS)
        f[b] = abs(f[S.bucket] - f[S.bucket + 1])
        f[b + 1] = f[S.bucket_size]
        s[S.buckets_n] += 1
        f[S.bucket] = f[S.bucket + 1] = 0.0
        f[S.bucket_size] = need = size
        full += 1
        if full > BUCKETS:
            v %= size  # all buckets in the window are equal by now
    f[S.bucket + k] += v
    if full:
        imbalance = volume = 0.0
        for j in range(min(s[S.buckets_n], BUCKETS)):
            imbalance += f[S.buckets + 2 * j]
            volume += f[S.buckets + 2 * j + 1]
        f[S.row + C.vpin] = min(imbalance / volume, 1.0)


@njit(error_model="numpy")
def _impact(s: Array, f: Array) -> None:
    """Close a group of trades at the settled mid; regress mid change (ticks) on signed volume over the groups."""
    move = f[S.settled_mid] - f[S.group_mid]
    if move == move:
        g = S.groups + 3 * (s[S.groups_n] % GROUPS)
        f[g], f[g + 1], f[g + 2] = move, f[S.group_flow], f[S.group_volume]
        s[S.groups_n] += 1
    n = min(s[S.groups_n], GROUPS)
    s[S.group_n] = 0
    f[S.group_flow] = f[S.group_volume] = 0.0
    if n < GROUPS_LEAST:
        return
    x = y = v = illiquidity = 0.0
    for g in range(S.groups, S.groups + 3 * n, 3):
        y += f[g]
        x += f[g + 1]
        v += f[g + 2]
        illiquidity += abs(f[g]) / f[g + 2]
    x, y = x / n, y / n
    xx = xy = 0.0
    for g in range(S.groups, S.groups + 3 * n, 3):
        xx += (f[g + 1] - x) * (f[g + 1] - x)
        xy += (f[g + 1] - x) * (f[g] - y)
    trade = v / (n * GROUP_TRADES)
    f[S.row + C.amihud] = illiquidity / n * trade
    f[S.row + C.kyle_lambda] = f[S.row + C.kyle_lambda_se] = np.nan
    if xx > 0.0:
        slope = xy / xx
        residual = 0.0
        for g in range(S.groups, S.groups + 3 * n, 3):
            e = f[g] - y - slope * (f[g + 1] - x)
            residual += e * e
        f[S.row + C.kyle_lambda] = slope * trade
        f[S.row + C.kyle_lambda_se] = math.sqrt(residual / (n - 2) / xx) * trade


@njit(error_model="numpy", inline="always")
def _trade(s: Array, f: Array, ts_event: Any, side: Any, price: Any, v: Any) -> None:
    """A trade of size `v` > 0 with aggressor `side`; the book has not followed yet."""
    f[S.volume_1] += v
    f[S.volume_64] += v
    s[S.trade_ts], s[S.fresh] = s[S.now], 1
    if side == 0:
        return
    k, sign = (0, 1.0) if side > 0 else (1, -1.0)
    if s[S.owed_ts] != ts_event or s[S.owed_side] != 1 - k:
        s[S.owed_ts], s[S.owed_side] = ts_event, 1 - k
        f[S.owed] = 0.0
    f[S.owed] += v
    f[S.rates + k] += 1.0
    f[S.shares + k] += 1.0
    if s[LEVELS + 1 - k] and -sign * np.float64(price) < f[S.keys + 5 * (1 - k)]:
        f[S.through] += 1.0
    for bought, column in ((S.bought_1, C.trade_imbalance_1s), (S.bought_8, C.trade_imbalance_8s), (S.bought_64, C.trade_imbalance_64s)):
        f[bought + k] += v
        f[S.row + column] = (f[bought] - f[bought + 1]) / (f[bought] + f[bought + 1])
    f[S.trade_size] = f[S.trade_size] * BY_TRADE + v
    f[S.trade_weight] = f[S.trade_weight] * BY_TRADE + 1.0
    _vpin(s, f, k, v)
    if s[S.group_n] == GROUP_TRADES:
        _impact(s, f)
    if s[S.group_n] == 0:
        f[S.group_mid] = f[S.settled_mid]
    s[S.group_n] += 1
    f[S.group_flow] += sign * v
    f[S.group_volume] += v


@njit(error_model="numpy", inline="always")
def _orders(s: Array, f: Array, ts_event: Any) -> None:
    """Count what the event added to the book, and what it took away other than for a trade."""
    for k in range(2):
        if s[ADDED + k]:
            f[S.rates + 2] += 1.0
            f[S.shares + 2] += 1.0
            f[S.added + k] += np.float64(s[ADDED + k])
            f[S.row + C.add_imbalance] = (f[S.added] - f[S.added + 1]) / (f[S.added] + f[S.added + 1])
        if s[REMOVED + k]:
            v = np.float64(s[REMOVED + k])
            if s[S.owed_ts] == ts_event and s[S.owed_side] == k:
                paid = min(v, f[S.owed])
                f[S.owed] -= paid
                v -= paid
            if v > 0.0:
                f[S.rates + 3] += 1.0
                f[S.shares + 3] += 1.0
                f[S.cancelled + k] += v
                f[S.row + C.cancel_imbalance] = (f[S.cancelled] - f[S.cancelled + 1]) / (f[S.cancelled] + f[S.cancelled + 1])


@njit(error_model="numpy", inline="always")
def _size(x: Any) -> Any:
    return np.float64(x if x >= 0 else MAX)


@njit(error_model="numpy", inline="always")
def _balance(b: Any, a: Any) -> Any:
    return (b - a) / (b + a) if b + a > 0.0 else np.nan


@njit(error_model="numpy", inline="always")
def _side(s: Array, f: Array, k: Any, touch: Any, end: Any) -> None:
    """Refresh what is kept of side `k`, whose levels from `touch` to before `end` have changed."""
    n = s[LEVELS + k]
    best = s[BASE] + 3 * (k * s[CAP] + n - 1)
    key, size = S.keys + 5 * k, S.sizes + 5 * k
    for m in range(touch, end):
        f[key + m], f[size + m] = -np.inf, 0.0
        if m < n:
            f[key + m], f[size + m] = np.float64(s[best - 3 * m]), _size(s[best - 3 * m + 1])
    if s[FEED] == 3 and touch == 0:
        f[S.row + C.orders_bid + k] = np.float64(s[best + 2]) if n else np.nan
    if s[FEED] == 1:
        return
    ten = five = f[size] + f[size + 1] + f[size + 2] + f[size + 3] + f[size + 4]
    for m in range(5, min(n, 10)):
        ten += _size(s[best - 3 * m + 1])
    f[S.five + k], f[S.ten + k] = five, ten
    if touch > 4:
        return
    slope = gap = np.nan
    if n > 1:
        gap = (f[key] - f[key + 1]) / f[S.tick]
        slope = total = 0.0
        for m in range(1, min(n, 5)):
            total += f[size + m - 1]
            base = total * (f[key + m - 1] - f[key + m])
            slope += f[size + m] / base if base > 0.0 else 0.0
        slope *= f[S.tick] / (min(n, 5) - 1)
    f[S.row + C.slope_bid + k] = slope
    f[S.row + C.gap_bid + k] = gap


@njit(error_model="numpy", inline="always")
def _flow(s: Array, f: Array, start: Any, end: Any) -> None:
    """Order flow at levels `start` to before `end` since the settled book: what bids gained less what asks did (Xu et al. 2018)."""
    for m in range(start, end):
        e = 0.0
        for k in range(2):
            j = 5 * k + m
            new, old = f[S.keys + j], f[S.settled_keys + j]
            gain = (f[S.sizes + j] if new >= old else 0.0) - (f[S.settled_sizes + j] if new <= old else 0.0)
            e += gain if k == 0 else -gain
        f[S.flow + m] = e


@njit(error_model="numpy", inline="always")
def _learn(s: Array, f: Array) -> None:
    """Learn the micro-price (Stoikov 2018) from the change between two settled quotes.

    The limit of the expected mid solves G(x) = E[mid move + G(next)] over the states of the quote. By symmetry of bid and ask a
    state is (|imbalance|, spread) with a sign; a change from state c to d adds to n(c), its signed move to r(c), and the product of
    signs to D(c, d); then row c of G = (r + D G) / (n + PRIOR) is solved again.
    """
    c, d, was, sign = s[S.was_quote], s[S.quote], s[S.was_sign], s[S.quote_sign]
    if c >= 0 and d >= 0 and (c != d or was != sign or f[S.was_mid] != f[S.mid]):
        f[S.micro_n + c] += 1.0
        f[S.micro_r + c] += was * min(max(f[S.mid] - f[S.was_mid], -JUMP), JUMP)
        f[S.micro_d + STATES * c + d] += was * sign
        g = f[S.micro_r + c]
        for j in range(STATES):
            g += f[S.micro_d + STATES * c + j] * f[S.micro_g + j]
        f[S.micro_g + c] = g / (f[S.micro_n + c] + PRIOR)
    s[S.was_quote], s[S.was_sign] = d, sign
    f[S.was_mid] = f[S.mid]


@njit(error_model="numpy", inline="always")
def _settle(s: Array, f: Array) -> None:
    """The venue's event is over: if the best ten levels changed, the book goes into all that rolls and decays.

    A book without two sides, or crossed, does not, but flow starts anew behind it.
    """
    s[S.restored] = 0
    if s[S.dirty] > 9:
        return
    f[S.ofi_fast] += f[S.flow]
    f[S.ofi_slow] += f[S.flow]
    f[S.ofi_events] += f[S.flow]
    for m in range(5):
        f[S.ofi + m] += f[S.flow + m]
        f[S.flow + m] = 0.0
    for j in range(20):
        f[S.settled_keys + j] = f[S.keys + j]
    s[S.dirty], s[S.changed], s[S.fresh], s[S.was_sound] = FAR, 1, 1, s[S.sound]
    if not s[S.sound]:
        s[S.was_quote] = -1
        return
    mid = f[S.mid]
    r = mid - f[S.settled_mid]
    if r > 0.0 or r < 0.0:
        f[S.squares] += r * r
        f[S.robust] += r * r + 2.0 * r * f[S.move]
        f[S.up if r > 0.0 else S.down] += r * r
        f[S.row + C.signed_jump] = (f[S.up] - f[S.down]) / (f[S.up] + f[S.down])
        f[S.move] = r
    f[S.settled_mid] = mid
    _learn(s, f)
    f[S.sum1] = f[S.sum1] * BY_EVENT + (f[S.sizes] + f[S.sizes + 5]) * 0.5
    f[S.weight1] = f[S.weight1] * BY_EVENT + 1.0
    f[S.depth1] = f[S.sum1] / f[S.weight1]
    if s[FEED] > 1:
        f[S.sum5] = f[S.sum5] * BY_EVENT + (f[S.five] + f[S.five + 1]) * 0.1
        f[S.weight5] = f[S.weight5] * BY_EVENT + 1.0
        f[S.depth5] = f[S.sum5] / f[S.weight5]
    n, x = s[S.ranks_n], _bin(f[S.spread])
    at = S.ranks + (n & (RANKS - 1))
    if n >= RANKS:
        s[S.bins + s[at]] -= 1
    s[at] = x
    s[S.bins + x] += 1
    s[S.ranks_n] = n + 1
    f[S.mids + (s[S.mids_n] & (MIDS - 1))] = mid
    s[S.mids_n] += 1
    f[S.high] = max(f[S.high], mid)
    f[S.low] = min(f[S.low], mid)


@njit(error_model="numpy", inline="always")
def _bin(spread: Any) -> Any:
    return np.int64(min(max(spread + 0.5, 0.0), BINS - 1.0))


@njit(error_model="numpy", inline="always")
def _top(s: Array, f: Array) -> None:
    """The columns of the best bid and ask, one of which has changed."""
    row = S.row
    bid, ask, b, a = f[S.keys], -f[S.keys + 5], f[S.sizes], f[S.sizes + 5]
    spread, imbalance = (ask - bid) / f[S.tick], _balance(b, a)
    mid = (bid + ask) * 0.5
    f[S.mid], f[S.spread] = mid / f[S.tick], spread  # exact where prices are whole ticks
    s[S.sound], s[S.changed] = spread >= 0.0, 1
    s[S.quote], s[S.quote_sign] = -1, (1 if b > a else 0) - (1 if b < a else 0)
    if spread > 0.0 and b + a > 0.0:
        s[S.quote] = 3 * min(int(abs(imbalance) * 5), 4) + max(int(min(spread, 3.0) + 0.5), 1) - 1
    f[row + C.mid] = mid * NS
    f[row + C.spread] = spread
    f[row + C.imbalance_1] = imbalance
    f[row + C.weighted_mid] = imbalance * spread * 0.5
    if s[FEED] == 3:
        f[row + C.order_imbalance] = _balance(f[row + C.orders_bid], f[row + C.orders_ask])


@njit(error_model="numpy", inline="always")
def _book(s: Array, f: Array, u: Array, e: Any, flow: Any) -> None:
    """Apply the event to the book and bring up to date what follows from its levels."""
    applied(s, u, e["action"], e["side"], e["price"], e["size"], e["order_id"], e["flags"])
    row = S.row
    if s[FEED] != s[S.feed]:
        s[S.feed] = s[FEED]
        for j in range(F):
            if NEEDS[j] > s[FEED]:
                f[row + j] = np.nan
    if flow:
        _orders(s, f, e["ts_event"])
    else:
        s[S.restored] = s[S.fresh] = 1
        for m in range(5):
            f[S.flow + m] = 0.0
    touch = min(s[TOUCH], s[TOUCH + 1])
    if touch > 9:
        return
    s[S.fresh] = 1
    end, deep, was = touch, s[FEED] > 1, s[S.sound]
    for k in range(2):
        at = s[TOUCH + k]
        if at < 10:
            till = min(s[UNTIL + k], 5 if deep else 1)
            _side(s, f, k, at, till)
            end = max(end, till)
    s[S.dirty] = min(s[S.dirty], touch)
    if s[LEVELS] == 0 or s[LEVELS + 1] == 0:
        s[S.sound] = s[S.two] = 0
        for c in BLANK:
            f[row + c] = np.nan
    else:
        if s[S.two] == 0:
            s[S.two], touch, end = 1, 0, 5 if deep else 1
        if touch == 0:
            _top(s, f)
        if deep:
            levels = min(s[LEVELS], s[LEVELS + 1])
            for m in range(max(touch, 1), end):
                f[row + C.imbalance_1 + m] = _balance(f[S.sizes + m], f[S.sizes + 5 + m]) if m < levels else np.nan
            f[row + C.imbalance_top5] = _balance(f[S.five], f[S.five + 1])
            f[row + C.imbalance_top10] = _balance(f[S.ten], f[S.ten + 1])
    if s[S.restored] or not s[S.sound] or not s[S.was_sound]:
        for m in range(5):
            f[S.flow + m] = 0.0
        return
    if not was:
        touch, end = s[S.dirty], 5 if deep else 1
    _flow(s, f, touch, end)


@njit(error_model="numpy", inline="always")
def _now(s: Array, f: Array) -> None:
    """The columns that compare the present quote with settled books."""
    row, mid, d = S.row, f[S.mid], f[S.depth1]
    s[S.changed] = 0
    f[row + C.queue_bid] = f[S.sizes] / (f[S.sizes] + d)
    f[row + C.queue_ask] = f[S.sizes + 5] / (f[S.sizes + 5] + d)
    f[row + C.microprice] = s[S.quote_sign] * f[S.micro_g + s[S.quote]] if s[S.quote] >= 0 else np.nan
    n = min(s[S.ranks_n], RANKS)
    if n:
        below, x = 0, _bin(f[S.spread])
        for j in range(x):
            below += s[S.bins + j]
        f[row + C.spread_percentile] = (below + 0.5 * s[S.bins + x]) / n
    m, c = s[S.mids_n], s[S.cell]
    f[row + C.return_16e] = mid - f[S.mids + ((m - 16) & (MIDS - 1))]
    f[row + C.return_128e] = mid - f[S.mids + (m & (MIDS - 1))]
    f[row + C.return_1s] = mid - f[S.cells + ((c - 8) & (CELLS - 1))]
    f[row + C.return_8s] = mid - f[S.cells + ((c - 64) & (CELLS - 1))]
    f[row + C.return_64s] = mid - f[S.cells + (c & (CELLS - 1))]
    f[row + C.high_distance] = max(f[S.high], mid) - mid
    f[row + C.low_distance] = mid - min(f[S.low], mid)


@njit(error_model="numpy", inline="always")
def _flows(s: Array, f: Array) -> None:
    """The columns that stand still while neither time passes nor trades nor the best levels change."""
    row, deep = S.row, s[FEED] > 1
    s[S.fresh] = 0
    depths = 1.0 / f[S.depth1]
    f[row + C.ofi_1] = (f[S.ofi] + f[S.flow]) * depths
    f[row + C.ofi_fast] = (f[S.ofi_fast] + f[S.flow]) * depths
    f[row + C.ofi_slow] = (f[S.ofi_slow] + f[S.flow]) * depths
    if deep:
        depths = 1.0 / f[S.depth5]
        for m in range(1, 5):
            f[row + C.ofi_1 + m] = (f[S.ofi + m] + f[S.flow + m]) * depths
    fast, slow = f[S.volume_1], f[S.volume_64] * (1 / 64)
    if fast + slow > 0.0:
        f[row + C.volume_ratio] = fast / (fast + slow)
    f[row + C.rate_buy] = f[S.rates] * (LN2 / 8)
    f[row + C.rate_sell] = f[S.rates + 1] * (LN2 / 8)
    f[row + C.trade_through] = f[S.through]
    f[row + C.volatility_8s] = math.sqrt(f[S.squares] * (LN2 / 8))
    f[row + C.volatility_64s] = math.sqrt((f[S.up] + f[S.down]) * (LN2 / 64))
    f[row + C.volatility_robust] = math.sqrt(max(f[S.robust], 0.0) * (LN2 / 8))
    f[row + C.seconds_since_open] = np.float64(s[S.now] - s[S.open]) * NS
    if s[S.trade_ts] != -MAX:
        f[row + C.time_since_trade] = np.float64(s[S.now] - s[S.trade_ts]) * NS


@njit(error_model="numpy", inline="always")
def _step(s: Array, f: Array, u: Array, events: Array, j: Any, out: Array, i: Any) -> None:
    e = events[j]
    if e["ts_event"] != s[S.stamp]:
        _settle(s, f)
        s[S.stamp] = e["ts_event"]
    _clock(s, f, e["ts_init"])
    flow = e["action"] == TRADE or (e["flags"] & F_SNAPSHOT) == 0  # no flag of a trade may count: live trades carry none
    if flow:
        f[S.events_1] += 1.0
        f[S.events_64] += 1.0
        for c in range(S.weight, S.ofi_fast):
            f[c] *= BY_EVENT
        f[S.weight] += 1.0
    if e["action"] != TRADE:
        _book(s, f, u, e, flow)
    elif e["size"] > 0:
        _trade(s, f, e["ts_event"], e["side"], e["price"], np.float64(e["size"]))
    s[EVENTS] += 1
    if s[S.changed] and s[S.two]:
        _now(s, f)
    if s[S.fresh]:
        _flows(s, f)
    for c in range(F):
        out[i, c] = f[S.row + c]
    out[i, C.ofi_events] = (f[S.ofi_events] + f[S.flow]) / f[S.depth1]
    if s[FEED] > 1:
        out[i, C.rate_add] = f[S.rates + 2] * (LN2 / 8)
        out[i, C.rate_cancel] = f[S.rates + 3] * (LN2 / 8)
    if f[S.weight] > 0.0:
        share = 1.0 / f[S.weight]
        for m in range(4 if s[FEED] > 1 else 2):
            out[i, C.share_buy + m] = f[S.shares + m] * share
    fast, slow = f[S.events_1], f[S.events_64] * (1 / 64)
    out[i, C.intensity] = fast * LN2
    if fast + slow > 0.0:
        out[i, C.intensity_ratio] = fast / (fast + slow)


def _compiled(source: int) -> tuple[Callable[..., int], Callable[..., None]]:
    @njit(cache=True, error_model="numpy")
    def run(s, events, rows, start, stop, out):  # type: ignore[no-untyped-def]
        """Take the events at rows[start:stop] and fill the same rows of `out`; returns where room or session ends, or `stop`."""
        if out.shape[1] != F or len(out) < len(events):
            raise ValueError("out must have a row for each event and a column for each feature")
        f, u = s.view(np.float64), s.view(np.uint64)
        for i in range(start, stop if source else 0):
            j = rows[i]
            if not room(s) or events[j]["ts_init"] > s[S.until]:
                return i
            _step(s, f, u, events, j, out, j)
        return stop

    @njit(cache=True, error_model="numpy")
    def step(state, events, i, out):  # type: ignore[no-untyped-def]
        """Advance `state` (the words of a State) by `events[i]` and write row `out[i]`.

        It neither makes room for orders (MemoryError where there is none) nor opens sessions: State.advance does.
        """
        if source and not room(state):
            raise MemoryError("no room for another order: State.advance makes it")
        _step(state, state.view(np.float64), state.view(np.uint64), events, i, out, i)

    return run, step


# numba keeps these two on disk under a key made of this file and of what they close over, so that has to tell apart versions of all
# that they take in from elsewhere; the kernels above are not kept on their own.
_SOURCES: Final = *(Path(str(m.__file__)) for m in (catalog.book, catalog.events, cift_models.feature_table)), Path(__file__)
SOURCE: Final = zlib.crc32(b"".join(p.read_bytes() for p in _SOURCES)) | 1
run, step = _compiled(SOURCE)
