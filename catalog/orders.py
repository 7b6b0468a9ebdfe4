"""Databento's MBO records -> EVENT rows: what :mod:`catalog.levels` does for levels, for individual orders."""

from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np
from numpy.typing import NDArray

from catalog.definitions import UNDEFINED_PRICE, UNDEFINED_TIME
from catalog.events import SCALE

Array = NDArray[Any]

MBO: Final = np.dtype(
    [
        ("length", "u1"),
        ("rtype", "u1"),
        ("publisher_id", "<u2"),
        ("instrument_id", "<u4"),
        ("ts_event", "<u8"),
        ("order_id", "<u8"),
        ("price", "<i8"),
        ("size", "<u4"),
        ("flags", "u1"),
        ("channel_id", "u1"),
        ("action", "u1"),
        ("side", "u1"),
        ("ts_recv", "<u8"),
        ("ts_in_delta", "<i4"),
        ("sequence", "<u4"),
    ]
)


@numba.njit(cache=True)
def convert(records: Array, numbers: Array, starts: Array, ends: Array, indices: Array, out: Array, where: Array) -> tuple[Any, Any, Any]:
    """MBO records -> EVENT rows; `where` gets the row of each. Records of an index -2 are passed over.

    Returns (rows, -1, 0) or (rows, record, why): 1 unknown action, 2 unknown side, 3 no time, 4 instrument id without an index.
    """
    n = 0
    last: Any = -1
    last_number: Any = -1
    none = np.uint64(UNDEFINED_TIME)
    limit = np.uint64(UNDEFINED_PRICE)
    for i in range(records.shape[0]):
        r = records[i]
        action = r["action"]
        if action == 70 or action == 78:  # F and N change nothing
            continue
        if not (action == 65 or action == 67 or action == 77 or action == 84 or action == 82):
            return n, i, 1
        side = r["side"]
        if not (side == 66 or side == 65 or side == 78):
            return n, i, 2
        recv, event = r["ts_recv"], r["ts_event"]
        if recv == none:
            recv = event
        if event == none:
            event = recv
        if recv > limit or event > limit:
            return n, i, 3
        number = np.int64(r["instrument_id"])
        if number != last_number or last < 0 or np.int64(recv) >= ends[last] or np.int64(recv) < starts[last]:
            last_number = number
            last = np.searchsorted(numbers, number)
            if last == numbers.shape[0] or numbers[last] != number:
                return n, i, 4
            while last + 1 < numbers.shape[0] and numbers[last + 1] == number and np.int64(recv) >= ends[last]:
                last += 1
        index = indices[last]
        if index == -2:
            continue
        if index < 0:
            return n, i, 4
        e = out[n]
        e["ts_event"] = event
        e["ts_init"] = recv
        e["price"] = 0 if action == 82 else r["price"]
        e["size"] = np.int64(r["size"]) * SCALE
        e["order_id"] = r["order_id"]
        e["sequence"] = r["sequence"]
        e["action"] = action
        e["side"] = 1 if side == 66 else (-1 if side == 65 else 0)
        e["flags"] = r["flags"]
        e["instrument"] = index
        where[n] = i
        n += 1
    return n, -1, 0
