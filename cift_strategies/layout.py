"""Where an OrderBookDeltas keeps its fields, so that a message is read at once instead of attribute by attribute.

Making ten Python objects of each delta takes a microsecond, more than the features do. A message is plain records behind one pointer, so
:func:`find` learns where each field lies from messages with known values, then checks what it reads against the attributes of some
hundreds of deltas; whenever anything differs, it gives None and the translator reads attributes. Only memory of objects that
are held is read, never past their size, never written.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import numpy as np
from nautilus_trader.model import BookAction, BookOrder, InstrumentId, OrderBookDelta, OrderBookDeltas, OrderSide, Price, Quantity
from numba import carray, njit, types  # type: ignore[attr-defined]
from numba.core import cgutils, config
from numba.extending import intrinsic

from catalog.events import ADD, CANCEL, CLEAR, EVENT, F_MBP, MODIFY

type Array = np.ndarray[Any, Any]

FIELDS: Final = {  # of a delta and their bytes; a 128-bit integer is two words, the low one first
    "price": 16, "size": 16, "order_id": 8, "sequence": 8, "ts_event": 8, "ts_init": 8, "side": 1, "action": 1, "flags": 1,
}  # fmt: skip
_ACTIONS: Final = {BookAction.ADD: ADD, BookAction.UPDATE: MODIFY, BookAction.DELETE: CANCEL, BookAction.CLEAR: CLEAR}
_SIDES: Final = {OrderSide.BUY: 1, OrderSide.SELL: -1, OrderSide.NO_ORDER_SIDE: 0}
_LARGEST: Final = 4_096  # bytes of an object that is looked at
_HEAD: Final = object.__basicsize__  # bytes of an object that are Python's
_IDS: Final = [InstrumentId.from_str(x) for x in ("LAYOUT.CHECK", "LAYOUT.OTHER")]

# A layout is int64 (WORDS,): of a message the words, counted from its address, of its id (two), the pointer to its records and their
# number; the bytes of a record and the offsets of FIELDS in it; raw price units in one of EVENT; what the codes of actions and sides mean.
ID, RECORDS, LENGTH, STRIDE, UNIT, AT, ACTION, SIDE, WORDS = 0, 1, 2, 3, 4, 5, 16, 272, 528


@intrinsic
def pointer(_context: Any, address: Any) -> Any:
    """An address as a pointer that `carray` takes."""

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
def read(layout: Any, ids: Any, message: Any, out: Any, first: Any) -> Any:
    """Write the deltas of the message at an address to `out` EVENT from row `first` on, if they fit; returns (their number, instrument).

    `ids` uint64 (m, 2): :func:`id_words` of the table of instruments; the instrument is -1, and nothing written, if it is not in there.
    """
    head = carray(pointer(message), _LARGEST // 8, np.uint64)  # type: ignore[call-arg]
    symbol, venue, n, k = head[layout[ID]], head[layout[ID] + 1], np.int64(head[layout[LENGTH]]), -1
    for j in range(len(ids)):
        if ids[j, 0] == symbol and ids[j, 1] == venue:
            k = j
            break
    if k < 0 or first + n > len(out):
        return n, k
    record, stride, unit = np.int64(head[layout[RECORDS]]), layout[STRIDE], layout[UNIT]
    price, size, order_id, sequence = layout[AT] >> 3, layout[AT + 1] >> 3, layout[AT + 2] >> 3, layout[AT + 3] >> 3
    ts_event, ts_init = layout[AT + 4] >> 3, layout[AT + 5] >> 3
    for i in range(first, first + n):
        e = out[i]
        words, codes = carray(pointer(record), stride >> 3, np.uint64), carray(pointer(record), stride, np.uint8)
        what, flags, identity = layout[ACTION + codes[layout[AT + 7]]], codes[layout[AT + 8]], words[order_id]
        e["ts_event"] = np.int64(words[ts_event])
        e["ts_init"] = np.int64(words[ts_init])
        e["price"] = 0 if what == CLEAR else _divided(words[price], words[price + 1], unit)
        e["size"] = 0 if what == CLEAR else _divided(words[size], words[size + 1], unit)
        e["order_id"] = identity
        e["sequence"] = words[sequence]
        e["action"] = what
        e["side"] = layout[SIDE + codes[layout[AT + 6]]]
        e["flags"] = flags | F_MBP if identity == 0 and what != CLEAR else flags
        e["instrument"] = k
        record += stride
    return n, k


def id_words(ids: Sequence[InstrumentId]) -> Array:
    """What a message has of its instrument's id, uint64 (m, 2): addresses of texts that stay as long as the process lives."""
    return np.array([struct.unpack_from("<2Q", _memory(x), _HEAD) for x in ids], np.uint64).reshape(-1, 2)


def _memory(of: Any) -> bytes:
    return ctypes.string_at(id(of), type(of).__basicsize__)


def _delta(
    price: int = 0, size: int = 0, order_id: int = 0, sequence: int = 0, ts_event: int = 0, ts_init: int = 0,
    side: OrderSide | None = OrderSide.BUY, action: BookAction = BookAction.ADD, flags: int = 0,
    id_: InstrumentId = _IDS[0],
) -> OrderBookDelta:  # fmt: skip
    order = BookOrder(side, Price.from_raw(price, 9), Quantity.from_raw(size, 9), order_id)
    return OrderBookDelta(id_, action, order, flags, sequence, ts_event, ts_init)


class _Roomy(Sequence[OrderBookDelta]):
    """Says that it holds `room` deltas, so that the message made of it has room for more than there are."""

    def __init__(self, deltas: Sequence[OrderBookDelta], room: int) -> None:
        self.deltas, self.room = deltas, room

    def __len__(self) -> int:
        return self.room

    def __getitem__(self, i: Any) -> Any:
        return self.deltas[i]


@cache
def find(unit: int) -> Array | None:
    """The layout of this process's messages, learnt and checked; None where it cannot be relied upon. `unit`: raw units in one of EVENT."""
    locked = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()
    largest = max(kind.__basicsize__ for kind in (OrderBookDelta, OrderBookDeltas, InstrumentId))
    if not locked or getattr(config, "DISABLE_JIT", False) or largest > _LARGEST or InstrumentId.__basicsize__ < _HEAD + 16:
        return None
    values = {name: (n + 1) * 0x01020304050607 for n, name in enumerate(FIELDS) if FIELDS[name] > 1}
    known: dict[str, Any] = {name: v // unit * unit for name, v in values.items()}
    layout, base = np.zeros(WORDS, np.int64), _memory(_delta(**known))
    at = {name: _only(base, struct.pack("<Q", value) + bytes(FIELDS[name] - 8)) for name, value in known.items()}
    for name, other in (("side", OrderSide.SELL), ("action", BookAction.UPDATE), ("flags", 0x5A)):
        changed = _memory(_delta(**(known | {name: other})))
        moved = [i for i in range(_HEAD, len(base)) if base[i] != changed[i]]
        at[name] = moved[0] if len(moved) == 1 else -1
    same = [OrderBookDeltas(_IDS[0], _Roomy([_delta(**known)] * 3, 8)) for _ in range(8)]  # equal but for the pointer to their records
    seen = np.array([np.frombuffer(_memory(m), np.int64) for m in same])[:, _HEAD // 8 :]
    pointers = [i for i, column in enumerate(seen.T.tolist()) if len(set(column)) == len(same)]
    lengths = np.flatnonzero((seen == 3).all(0)).tolist()
    id_at = _only(_memory(same[0]), id_words(_IDS[:1]).tobytes())
    if min(*at.values(), id_at) < 0 or len(pointers) != 1 or len(lengths) != 1 or (seen != seen[0]).any(0).sum() != 1:
        return None
    stored, mark = ctypes.string_at(int(seen[0, pointers[0]]), 8 * sum(FIELDS.values())), struct.pack("<Q", known["sequence"])
    first = stored.find(mark)
    stride = stored.find(mark, first + 1) - first
    offsets = [at[name] - at["sequence"] + first for name in FIELDS]
    if first < 0 or not sum(FIELDS.values()) <= stride <= len(base) or min(offsets) < 0 or max(offsets) >= stride:
        return None
    if stride % 8 or id_at % 8 or any(offset % 8 for offset in offsets[: len(known)]):
        return None
    layout[[ID, RECORDS, LENGTH, STRIDE, UNIT]] = id_at // 8, pointers[0] + _HEAD // 8, lengths[0] + _HEAD // 8, stride, unit
    layout[AT : AT + len(offsets)] = offsets
    for start, name, codes in ((ACTION, "action", _ACTIONS), (SIDE, "side", _SIDES)):
        for one, code in codes.items():
            layout[start + _memory(_delta(**(known | {name: one})))[at[name]]] = code
    return layout if _holds(layout, unit) else None


def _only(memory: bytes, part: bytes) -> int:
    """Where `part` lies in an object's memory, or -1 if not at one place."""
    found = [i for i in range(_HEAD, len(memory) - len(part) + 1) if memory.startswith(part, i)]
    return found[0] if len(found) == 1 else -1


def _holds(layout: Array, unit: int) -> bool:
    """Does it read what the attributes say, over all codes, the ends of every range and messages of many lengths?"""
    from cift_strategies.translate import pack

    rng, ids = np.random.default_rng(0), id_words(_IDS)
    edges = (0, 1, 2**31, 2**53 + 1, 2**60 + 7)
    for k, id_ in enumerate(_IDS):
        made = [OrderBookDelta.clear(id_, 1, 2, 3)]
        for n, (action, side) in enumerate(itertools.product(list(_ACTIONS) * 8, _SIDES)):
            price, size = (int(rng.integers(1, 2**53)) if n % 3 else edges[n % 5] // 128 + 1 for _ in range(2))
            order_id, sequence = (int(v) for v in rng.integers(0, 2**63, 2)) if n % 2 else (2**64 - 1, 0)
            event, init, flags = (int(v) for v in rng.integers(0, (2**62, 2**62, 256)))
            signed = -price if n % 7 == 0 else price
            made.append(_delta(signed * unit, size * unit, order_id, sequence, event, init, side, action, flags, id_))
        for n in (1, 2, 3, 7, 50, len(made)):
            message, got, want = OrderBookDeltas(id_, _Roomy(made[-n:], n + 2 * k)), np.zeros(n + 1, EVENT), np.zeros(n + 1, EVENT)
            pack(made[-n:], k, memoryview(want.view(np.uint8)).cast("B"), 1)
            if read(layout, ids, id(message), got, 1) != (n, k) or got.tobytes() != want.tobytes():
                return False
            if read(layout, ids[1 - k : 2 - k], id(message), got, 1) != (n, -1) or read(layout, ids, id(message), got, 2) != (n, k):
                return False
            if got.tobytes() != want.tobytes():  # nothing is written where it does not fit
                return False
    return True
