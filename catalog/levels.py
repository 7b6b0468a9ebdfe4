"""Databento's records of price levels, best quotes and trades as EVENT rows: schemas mbp-10, mbp-1, cmbp-1, tbbo, tcbbo, bbo, cbbo, trades.

:data:`LAYOUTS` says of each schema what a record is and how it is read; :func:`convert` turns records into rows. A record tells the whole
state, EVENT rows tell changes: the former state of each instrument is carried from record to record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numba
import numpy as np
from numpy.typing import NDArray

from catalog.events import ADD, CANCEL, CLEAR, F_LAST, F_MBP, F_SNAPSHOT, F_TOB, MODIFY, SCALE, TRADE

Array = NDArray[Any]
_NONE: Final = 2**63 - 1  # Databento's undefined price

HEAD: Final = np.dtype(
    [
        ("length", "u1"),
        ("rtype", "u1"),
        ("publisher_id", "<u2"),
        ("instrument_id", "<u4"),
        ("ts_event", "<u8"),
        ("price", "<i8"),
        ("size", "<u4"),
        ("action", "u1"),  # none in bbo and cbbo
        ("side", "u1"),
        ("flags", "u1"),
        ("depth", "u1"),
        ("ts_recv", "<u8"),
        ("ts_in_delta", "<i4"),
        ("sequence", "<u4"),  # none in consolidated schemas
    ]
)
TRADES, QUOTES, QUOTES_BEFORE, SAMPLED, LEVELS = range(5)


@dataclass(frozen=True, slots=True)
class Layout:
    """Records of one schema: their `rtype`, `size` in bytes, number of `levels`, deepest feed `level`, and how they are read (`mode`)."""

    rtype: int
    size: int
    levels: int
    level: int
    mode: int


LAYOUTS: Final = {
    "mbp-10": Layout(0x0A, 368, 10, 2, LEVELS),
    "mbp-1": Layout(0x01, 80, 1, 1, QUOTES),
    "cmbp-1": Layout(0xB1, 80, 1, 1, QUOTES),
    "tbbo": Layout(0x01, 80, 1, 1, QUOTES_BEFORE),
    "tcbbo": Layout(0xC2, 80, 1, 1, QUOTES_BEFORE),
    "bbo-1s": Layout(0xC3, 80, 1, 1, SAMPLED),
    "bbo-1m": Layout(0xC4, 80, 1, 1, SAMPLED),
    "cbbo-1s": Layout(0xC0, 80, 1, 1, SAMPLED),
    "cbbo-1m": Layout(0xC1, 80, 1, 1, SAMPLED),
    "trades": Layout(0x00, 48, 0, 1, TRADES),
}
STATE: Final = 41  # words of an instrument: whether it was seen; price and size of ten bids, of ten asks, best first (size 0: none)


def room(layout: Layout) -> int:
    """The most rows that one record gives."""
    return 2 + 4 * layout.levels


def parts(layout: Layout, data: Array) -> tuple[Array, Array, Array]:
    """Records as bytes (n, size) -> heads (n,), prices int64 (n, levels, 2) and sizes int64 (n, levels, 2), bid then ask."""
    n, k = len(data), layout.levels
    heads = np.ascontiguousarray(data[:, : HEAD.itemsize]).view(HEAD)[:, 0]
    pairs = data[:, HEAD.itemsize : HEAD.itemsize + 32 * k].reshape(n, k, 32)
    prices = np.ascontiguousarray(pairs[:, :, :16]).view("<i8")
    sizes = np.ascontiguousarray(pairs[:, :, 16:24]).view("<u4").astype(np.int64)
    sizes[prices == _NONE] = 0
    return heads, prices, sizes


@numba.njit(cache=True)
def find(numbers: Array, starts: Array, ends: Array, number: Any, ts: Any) -> Any:
    """Position of the instrument id `number` at time `ts` in the sorted table; -1 when it is not there."""
    at = np.searchsorted(numbers, number)
    if at == numbers.shape[0] or numbers[at] != number:
        return -1
    while at + 1 < numbers.shape[0] and numbers[at + 1] == number and ts >= ends[at]:
        at += 1
    return at


@numba.njit(cache=True)
def unassigned(heads: Array, numbers: Array, starts: Array, ends: Array, indices: Array) -> Any:
    """The first record whose instrument id has no index; -1 when all have one."""
    for i in range(heads.shape[0]):
        ts = heads[i]["ts_recv"]
        if ts == np.uint64(0xFFFFFFFFFFFFFFFF):
            ts = heads[i]["ts_event"]
        at = find(numbers, starts, ends, np.int64(heads[i]["instrument_id"]), np.int64(ts))
        if at < 0 or indices[at] == -1:
            return i
    return -1


@numba.njit(cache=True)
def _put(out: Array, n: Any, r: Any, action: Any, side: Any, price: Any, size: Any, flags: Any, index: Any) -> Any:
    e = out[n]
    e["ts_event"] = r["ts_event"]
    e["ts_init"] = r["ts_recv"]
    e["price"] = price
    e["size"] = size * SCALE
    e["order_id"] = 0
    e["sequence"] = r["sequence"]
    e["action"] = action
    e["side"] = side
    e["flags"] = flags
    e["instrument"] = index
    return n + 1


@numba.njit(cache=True)
def _gone(s: Array, prices: Array, sizes: Array, i: Any, k: Any, r: Any, flags: Any, index: Any, out: Array, n: Any) -> Any:
    """A C for every former level of side `k` (0 bid, 1 ask) whose price is not among those of record `i`, best first."""
    for a in range(prices.shape[1]):
        if s[1 + 20 * k + 2 * a + 1] == 0:
            break
        here = False
        for b in range(prices.shape[1]):
            here = here or (sizes[i, b, k] > 0 and prices[i, b, k] == s[1 + 20 * k + 2 * a])
        if not here:
            n = _put(out, n, r, CANCEL, 1 - 2 * k, s[1 + 20 * k + 2 * a], 0, flags, index)
    return n


@numba.njit(cache=True)
def _come(s: Array, prices: Array, sizes: Array, i: Any, k: Any, r: Any, flags: Any, index: Any, out: Array, n: Any) -> Any:
    """An A for every new level of side `k`, an M for every changed one, best first; `s` gets the levels of record `i`."""
    levels, o = prices.shape[1], 1 + 20 * k
    for b in range(levels):
        if sizes[i, b, k] == 0:
            continue
        before: Any = 0
        for a in range(levels):
            if s[o + 2 * a + 1] > 0 and s[o + 2 * a] == prices[i, b, k]:
                before = s[o + 2 * a + 1]
        if before != sizes[i, b, k]:
            n = _put(out, n, r, MODIFY if before else ADD, 1 - 2 * k, prices[i, b, k], sizes[i, b, k], flags, index)
    m: Any = 0
    for b in range(levels):
        if sizes[i, b, k] > 0:
            s[o + 2 * m], s[o + 2 * m + 1] = prices[i, b, k], sizes[i, b, k]
            m += 1
    for b in range(m, levels):
        s[o + 2 * b + 1] = 0
    return n


@numba.njit(cache=True)
def _quote(s: Array, prices: Array, sizes: Array, i: Any, r: Any, flags: Any, index: Any, out: Array, n: Any) -> Any:
    """Two rows, bid then ask, where the best bid or offer differs from the former. A side that is gone is a C at its last price."""
    same = s[0] != 0
    for k in range(2):
        same = same and s[2 + 20 * k] == sizes[i, 0, k] and (sizes[i, 0, k] == 0 or s[1 + 20 * k] == prices[i, 0, k])
    if same:
        return n
    s[0] = 1
    for k in range(2):
        size = sizes[i, 0, k]
        if size > 0:
            s[1 + 20 * k] = prices[i, 0, k]
        s[2 + 20 * k] = size
        n = _put(out, n, r, ADD if size > 0 else CANCEL, 1 - 2 * k, s[1 + 20 * k], size, flags | F_LAST * k, index)
    return n


@numba.njit(cache=True)
def convert(
    heads: Array, prices: Array, sizes: Array, mode: Any, numbers: Array, starts: Array, ends: Array, indices: Array, states: Array,
    out: Array, where: Array,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Records -> EVENT rows in `out`; `where` gets the record of each. `states` int64 (instruments, STATE) is advanced; an instrument's
    first record in it gives the whole state, for mbp-10 after an R. `heads` changes: stamps that are missing are filled in.

    What leaves the ten levels of mbp-10 is taken out (C), also where it was only pushed out by a better one and may still rest at the
    venue: its size is no longer told. Where it comes back it is an A. C come before A and M, so that no row crosses a book that the
    record does not cross.
    Instruments of an index below 0 are passed over; :func:`unassigned` tells that none is unknown.

    Returns (rows, -1, 0) or (rows so far, record, why): 1 unknown action, 2 unknown side, 3 no time.
    """
    n: Any = 0
    for i in range(heads.shape[0]):
        r = heads[i]
        action, side = r["action"], r["side"]
        if mode == SAMPLED:
            action = 0
        elif not (action == 65 or action == 67 or action == 77 or action == 84 or action == 82 or action == 70 or action == 78):
            return n, i, 1
        if not (side == 66 or side == 65 or side == 78):
            return n, i, 2
        if r["ts_recv"] == np.uint64(0xFFFFFFFFFFFFFFFF):
            r["ts_recv"] = r["ts_event"]
        if mode == SAMPLED or r["ts_event"] == np.uint64(0xFFFFFFFFFFFFFFFF):
            r["ts_event"] = r["ts_recv"]
        if r["ts_recv"] > np.uint64(_NONE) or r["ts_event"] > np.uint64(_NONE):
            return n, i, 3
        at = find(numbers, starts, ends, np.int64(r["instrument_id"]), np.int64(r["ts_recv"]))
        index = indices[at]
        if index < 0:
            continue
        begin = n
        s = states[index]
        flags: Any = np.int64(r["flags"]) & (0xFF ^ F_MBP ^ F_TOB ^ F_LAST)
        last: Any = np.int64(r["flags"]) & F_LAST
        aggressor = 1 if side == 66 else (-1 if side == 65 else 0)
        if mode == QUOTES_BEFORE:
            n = _quote(s, prices, sizes, i, r, flags | F_TOB, index, out, n)
        if action == 84 and mode != SAMPLED:
            n = _put(out, n, r, TRADE, aggressor, r["price"], np.int64(r["size"]), flags if mode == LEVELS else flags | last, index)
        if mode in (QUOTES, SAMPLED):
            n = _quote(s, prices, sizes, i, r, flags | F_TOB, index, out, n)
        elif mode == LEVELS:
            if action == 82 or s[0] == 0:
                if s[0] == 0:
                    flags |= F_SNAPSHOT
                s[:] = 0
                s[0] = 1
                n = _put(out, n, r, CLEAR, 0, 0, 0, flags, index)
            n = _gone(s, prices, sizes, i, 0, r, flags | F_MBP, index, out, n)
            n = _gone(s, prices, sizes, i, 1, r, flags | F_MBP, index, out, n)
            n = _come(s, prices, sizes, i, 0, r, flags | F_MBP, index, out, n)
            n = _come(s, prices, sizes, i, 1, r, flags | F_MBP, index, out, n)
            if n > begin:
                out[n - 1]["flags"] = np.int64(out[n - 1]["flags"]) | last
        for j in range(begin, n):
            where[j] = i
    return n, -1, 0
