"""Where an OrderBookDelta keeps its fields, so that many are read at once instead of attribute by attribute.

Reading ten attributes of a delta makes ten Python objects and takes three quarters of a microsecond, more than the features do. Its memory
is one plain record, so :func:`find` learns where each field lies from deltas with known values, then checks what it reads against the
attributes of some hundreds of others; whenever anything differs, it gives None and the translator reads attributes. Only memory
of objects that are held is read, never past their size, never written.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
from nautilus_trader.model import BookAction, BookOrder, InstrumentId, OrderBookDelta, OrderSide, Price, Quantity
from numba import carray, njit, types  # type: ignore[attr-defined]
from numba.core import cgutils, config
from numba.extending import intrinsic
from numpy.typing import NDArray

from catalog.events import ADD, CANCEL, CLEAR, EVENT, F_MBP, MODIFY

FIELDS: Final = {  # and their bytes; a 128-bit integer is two words, the low one first
    "price": 16, "size": 16, "order_id": 8, "sequence": 8, "ts_event": 8, "ts_init": 8, "side": 1, "action": 1, "flags": 1,
}  # fmt: skip
_ACTIONS: Final = (BookAction.ADD, BookAction.UPDATE, BookAction.DELETE, BookAction.CLEAR)
_SIDES: Final = (OrderSide.BUY, OrderSide.SELL, OrderSide.NO_ORDER_SIDE)
_LARGEST: Final = 4_096  # bytes of an object that is looked at
_ID: Final = InstrumentId.from_str("LAYOUT.CHECK")


@dataclass(frozen=True, slots=True)
class Layout:
    """`offsets` (9,) of FIELDS in every delta; `action` and `side` (256,) turn its codes into those of EVENT."""

    offsets: NDArray[np.int64]
    action: NDArray[np.uint8]
    side: NDArray[np.int8]

    def read(self, deltas: Sequence[OrderBookDelta], instrument: int, unit: int, out: NDArray[Any]) -> None:
        """Fill `out` EVENT (n,) from the `deltas`; `unit`: raw price units in one of EVENT."""
        _fill(np.fromiter(map(id, deltas), np.int64, len(deltas)), self.offsets, self.action, self.side, instrument, unit, out)


@intrinsic
def _pointer(_context: Any, address: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@njit(cache=True)
def _divided(low: Any, high: Any, unit: Any) -> Any:
    """A 128-bit integer [low, high] // unit as int64; unit < 2**32."""
    if high == 0 and low < np.uint64(1 << 63):
        return np.int64(low) // unit
    negative = high >> np.uint64(63) != 0
    if negative:
        low = ~low + np.uint64(1)
        high = ~high + np.uint64(1 if low == 0 else 0)
    d, mask, rest, quotient = np.uint64(unit), np.uint64(0xFFFFFFFF), np.uint64(0), np.uint64(0)
    for part in (high >> np.uint64(32), high & mask, low >> np.uint64(32), low & mask):
        rest = (rest << np.uint64(32)) | part
        quotient = (quotient << np.uint64(32)) | (rest // d)
        rest %= d
    return -np.int64(quotient) - np.int64(1 if rest else 0) if negative else np.int64(quotient)


@njit(cache=True)
def _fill(addresses: Any, offsets: Any, action: Any, side: Any, instrument: Any, unit: Any, out: Any) -> None:
    price, size, order_id, sequence, ts_event, ts_init = offsets[0], offsets[1], offsets[2], offsets[3], offsets[4], offsets[5]
    for i in range(len(addresses)):
        at, e = addresses[i], out[i]
        words, codes = carray(_pointer(at), _LARGEST // 8, np.uint64), carray(_pointer(at), _LARGEST, np.uint8)  # type: ignore[call-arg]
        what, flags = action[codes[offsets[7]]], codes[offsets[8]]
        e["ts_event"] = np.int64(words[ts_event >> 3])
        e["ts_init"] = np.int64(words[ts_init >> 3])
        e["price"] = _divided(words[price >> 3], words[(price >> 3) + 1], unit)
        e["size"] = _divided(words[size >> 3], words[(size >> 3) + 1], unit)
        e["order_id"] = words[order_id >> 3]
        e["sequence"] = words[sequence >> 3]
        e["action"] = what
        e["side"] = side[codes[offsets[6]]]
        e["flags"] = flags | F_MBP if words[order_id >> 3] == 0 and what != CLEAR else flags
        e["instrument"] = instrument


def _delta(
    price: int = 0, size: int = 0, order_id: int = 0, sequence: int = 0, ts_event: int = 0, ts_init: int = 0,
    side: OrderSide | None = OrderSide.BUY, action: BookAction = BookAction.ADD, flags: int = 0,
) -> OrderBookDelta:  # fmt: skip
    order = BookOrder(side, Price.from_raw(price, 9), Quantity.from_raw(size, 9), order_id)
    return OrderBookDelta(_ID, action, order, flags, sequence, ts_event, ts_init)


@cache
def find(unit: int) -> Layout | None:
    """The layout of this process's deltas, learnt and checked; None where it cannot be relied upon."""
    total = OrderBookDelta.__basicsize__
    locked = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()
    if not locked or getattr(config, "DISABLE_JIT", False) or total > _LARGEST:
        return None

    def memory(delta: OrderBookDelta) -> bytes:
        return ctypes.string_at(id(delta), total)

    values = {name: 0x11 * (n + 1) * 0x01020304050607 // 0x11 for n, name in enumerate(FIELDS) if FIELDS[name] > 1}
    known: dict[str, Any] = {name: v // unit * unit for name, v in values.items()}
    base = memory(_delta(**known))
    offsets = {}
    for name, value in known.items():
        packed = struct.pack("<Q", value) + bytes(FIELDS[name] - 8)
        found = [i for i in range(object.__basicsize__, total - len(packed) + 1) if base.startswith(packed, i)]
        if len(found) != 1:
            return None
        offsets[name] = found[0]
    for name, other in (("side", OrderSide.SELL), ("action", BookAction.UPDATE), ("flags", 0x5A)):
        changed = memory(_delta(**(known | {name: other})))
        moved = [i for i in range(object.__basicsize__, total) if base[i] != changed[i]]
        if len(moved) != 1:
            return None
        offsets[name] = moved[0]
    if any(offsets[name] % 8 for name in known):
        return None
    action, side = np.zeros(256, np.uint8), np.zeros(256, np.int8)
    for one, code in zip(_ACTIONS, (ADD, MODIFY, CANCEL, CLEAR)):
        action[memory(_delta(**(known | {"action": one})))[offsets["action"]]] = code
    for two, sign in zip(_SIDES, (1, -1, 0)):
        side[memory(_delta(**(known | {"side": two})))[offsets["side"]]] = sign
    layout = Layout(np.array([offsets[name] for name in FIELDS]), action, side)
    return layout if _holds(layout, unit) else None


def _holds(layout: Layout, unit: int) -> bool:
    """Does it read what the attributes say, over all codes and the ends of every range?"""
    from cift_strategies.translate import pack

    rng, made = np.random.default_rng(0), [OrderBookDelta.clear(_ID, 1, 2, 3)]
    edges = (0, 1, 2**31, 2**53 + 1, 2**60 + 7)
    for n, (action, side) in enumerate(itertools.product(_ACTIONS * 8, _SIDES)):
        price, size = (int(rng.integers(1, 2**53)) if n % 3 else edges[n % 5] // 128 + 1 for _ in range(2))
        order_id, sequence = (int(v) for v in rng.integers(0, 2**63, 2)) if n % 2 else (2**64 - 1, 0)
        event, init, flags = (int(v) for v in rng.integers(0, (2**62, 2**62, 256)))
        signed = -price if n % 7 == 0 else price
        made.append(_delta(signed * unit, size * unit, order_id, sequence, event, init, side, action, flags))
    got, want = np.empty(len(made), EVENT), np.empty(len(made), EVENT)
    layout.read(made, 3, unit, got)
    pack(made, 3, memoryview(want.view(np.uint8)).cast("B"), 0)
    return got.tobytes() == want.tobytes()
