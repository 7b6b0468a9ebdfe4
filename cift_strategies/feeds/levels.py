"""What an MBO stream says in other schemas: trades, MBP-1, TBBO, MBP-10, and the snapshot of a book.

Takes MBO records as they lie in a file, gives records of the other schema, made with our own book (:mod:`catalog.book`). Databento makes
theirs at the venue's pace from the same messages; ours follow the same rules: one record per trade with the book before it, and one per
change that shows within the levels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from catalog.book import BASE, BITS, CAP, EPOCH, by_instrument, depth
from catalog.dbn import MBO
from catalog.events import EVENT, F_LAST, F_SNAPSHOT, SCALE
from catalog.levels import HEAD, LAYOUTS

Array = NDArray[Any]
DERIVED: Final = ("trades", "mbp-1", "tbbo", "mbp-10")
BLOCK: Final = 65_536
F_BAD_TS_RECV: Final = 8
_NONE: Final = 2**63 - 1
_PAIR: Final = np.dtype([(f"{k}_{what}", t) for what, t in (("px", "<i8"), ("sz", "<u4"), ("ct", "<u4")) for k in ("bid", "ask")])
_SAME: Final = tuple(n for n in HEAD.names or () if n not in ("length", "rtype", "depth"))  # fields that MBO has too


def events_of(mbo: Array) -> Array:
    """MBO records (n,) as EVENT rows (n,), F and N as rows that change nothing; `instrument` is the position in `np.unique` of the ids."""
    out = np.zeros(len(mbo), EVENT)
    for name in ("ts_event", "price", "order_id", "sequence", "action", "flags"):
        out[name] = mbo[name]
    out["ts_init"] = mbo["ts_recv"]
    out["size"] = mbo["size"].astype(np.int64) * SCALE
    out["side"] = np.where(mbo["side"] == ord("B"), 1, np.where(mbo["side"] == ord("A"), -1, 0))
    out["instrument"] = np.unique(mbo["instrument_id"], return_inverse=True)[1]
    return out


def derive(records: Array, schema: str) -> Iterator[tuple[Array, Array]]:
    """Records uint8 (n, 56) of MBO -> pieces of (records uint8 (m, size), rows int64 (m,) of the MBO records that each comes from)."""
    layout = LAYOUTS[schema]
    books: dict[int, Array] = {}
    before: dict[int, Array] = {}
    for start in range(0, len(records), BLOCK):
        mbo = np.ascontiguousarray(records[start : start + BLOCK]).view(MBO)[:, 0]
        if schema == "trades":
            rows = np.flatnonzero(mbo["action"] == ord("T"))
            yield _records(mbo[rows], layout.rtype, layout.size, 0), rows + start
            continue
        events, numbers = events_of(mbo), np.unique(mbo["instrument_id"])
        state = np.empty((len(mbo), 6 * layout.levels), np.int64)
        former = np.empty_like(state)
        for k, rows in by_instrument(events):
            number = int(numbers[k])
            mine = events[rows]
            mine["instrument"] = 0
            own = {0: books[number]} if number in books else {}
            state[rows] = depth(mine, layout.levels, own).view(np.int64).reshape(len(rows), -1)
            books[number] = own[0]
            former[rows] = np.concatenate([before.get(number, np.zeros((1, state.shape[1]), np.int64)), state[rows][:-1]])
            before[number] = state[rows][-1:].copy()
        trade, changed = mbo["action"] == ord("T"), (state != former).any(1)
        rows = np.flatnonzero(trade if schema == "tbbo" else trade | changed | (mbo["action"] == ord("R")))
        out = _records(mbo[rows], layout.rtype, layout.size, _depths(mbo[rows], former[rows], state[rows], layout.levels))
        out[:, HEAD.itemsize :] = _pairs(np.where(trade[rows, None], former[rows], state[rows]), layout.levels)
        yield out, rows + start


def _records(mbo: Array, rtype: int, size: int, depths: Any) -> Array:
    head = np.zeros(len(mbo), HEAD)
    for name in _SAME:
        head[name] = mbo[name]
    head["length"], head["rtype"], head["depth"] = size // 4, rtype, depths
    out = np.zeros((len(mbo), size), np.uint8)
    out[:, : HEAD.itemsize] = head.view(np.uint8).reshape(-1, HEAD.itemsize)
    return out


def _depths(mbo: Array, former: Array, state: Array, levels: int) -> Array:
    """The level (0 is the best) at which each record's price stands on its side, before or after it."""
    first = np.where(mbo["side"] == ord("B"), 0, 3 * levels)[:, None] + np.arange(levels)
    found = np.zeros(len(mbo), np.int64)
    for book in (former, state):
        here = np.take_along_axis(book, first, 1) == mbo["price"][:, None]
        found = np.where(here.any(1), here.argmax(1), found)
    return found


def _pairs(state: Array, levels: int) -> Array:
    out = np.zeros((len(state), levels), _PAIR)
    for k, side in enumerate(("bid", "ask")):
        px, sz, ct = (state[:, (3 * k + c) * levels : (3 * k + c + 1) * levels] for c in range(3))
        out[f"{side}_px"] = np.where(sz == 0, _NONE, px)
        out[f"{side}_sz"] = sz // SCALE
        out[f"{side}_ct"] = ct
    return out.view(np.uint8).reshape(len(state), 32 * levels)


def snapshot(records: Array, number: int, ts: int) -> Array:
    """The book of an instrument id after MBO `records` uint8 (n, 56) as MBO records (m, 56): R, then every resting order, bids then asks,
    best first, in order of priority, with the stamp and sequence at which it last gained or lost priority; the last one has F_LAST."""
    at = np.flatnonzero(records[:, 4:8].view("<u4")[:, 0] == number)
    clears = at[records[at, MBO.fields["action"][1]] == ord("R")]  # type: ignore[index]
    mbo = np.ascontiguousarray(records[at[at >= (clears[-1] if len(clears) else 0)]]).view(MBO)[:, 0]
    books: dict[int, Array] = {}
    for start in range(0, len(mbo), BLOCK):
        depth(events_of(mbo[start : start + BLOCK]), 1, books)
    live = _orders(books[0]) if books else {}
    origin: dict[int, Any] = {}
    for r in mbo[np.isin(mbo["order_id"], np.array(list(live), np.uint64)) & np.isin(mbo["action"], (ord("A"), ord("M")))]:
        was = origin.get(int(r["order_id"]))
        if was is not None and r["action"] == ord("M") and r["price"] == was["price"] and r["size"] <= was["size"]:
            was["size"] = r["size"]
        else:
            origin.pop(int(r["order_id"]), None)  # to the end of the queue
            origin[int(r["order_id"])] = r.copy()
    out = np.zeros(len(live) + 1, MBO)
    head = mbo[-1] if len(mbo) else np.zeros(1, MBO)[0]
    out[0] = (14, 0xA0, head["publisher_id"], number, ts, 0, _NONE, 0, 0, head["channel_id"], ord("R"), ord("N"), ts, 0, 0)

    def best_first(order: tuple[int, Any]) -> tuple[bool, int]:
        bid, price = bool(order[1]["side"] == ord("B")), int(order[1]["price"])
        return not bid, -price if bid else price

    for n, (identity, entry) in enumerate(sorted(origin.items(), key=best_first), 1):
        out[n] = entry
        out[n]["size"], out[n]["action"] = live[identity], ord("A")
    out["flags"], out["ts_recv"], out["ts_in_delta"] = F_SNAPSHOT | F_BAD_TS_RECV, ts, 0
    out["flags"][-1] |= F_LAST
    return out.view(np.uint8).reshape(-1, MBO.itemsize)


def _orders(book: Array) -> dict[int, int]:
    """The resting orders of a book of :mod:`catalog.book`: id -> size in units."""
    slots = book[book[BASE] + 6 * book[CAP] :][: 4 << int(book[BITS])].reshape(-1, 4)
    here = slots[np.abs(slots[:, 3]) == book[EPOCH]]
    return dict(zip(here[:, 0].view(np.uint64).tolist(), (here[:, 2] // SCALE).tolist()))
