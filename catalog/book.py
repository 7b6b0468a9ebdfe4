"""The order book of one instrument as a numba kernel: individual orders (L3), price levels (L2) or the best bid and offer (L1).

Takes :data:`catalog.events.EVENT` records in canonical order; :func:`depth` gives the levels after each of them. The state is one
int64 array (header, a caller's own words, levels, a hash table of orders), so it can be copied, stored and compared as bytes, and
the same code runs with NUMBA_DISABLE_JIT=1. Kernels never allocate: they return early, and :func:`mended` gives them more room. What each
event goes through is inlined: a call costs 5 to 10 ns, as it hands on every word that describes its arrays.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, Final

import numpy as np
from numba import njit

from catalog.events import ADD, CANCEL, CLEAR, F_MBP, F_TOB, MODIFY

type Array = np.ndarray[Any, Any]

# Header words. Side 0 is the bid, side 1 the ask; LEVELS and the words from TOUCH on have one for each.
LIVE: Final = 0  # individual orders in the book
EPOCH: Final = 1  # slots whose mark is not +-EPOCH are empty, so that clearing is O(1)
BITS: Final = 2  # log2 of the slots of the hash table
LEVELS: Final = 3  # entries in each side's levels
CAP: Final = 5  # room for levels on each side
FEED: Final = 6  # 3 orders, 2 levels, 1 best bid and offer: the feed that last changed the book
BASE: Final = 7  # where the levels begin; the orders follow
EVENTS: Final = 8  # events seen
DUE: Final = 9  # at this many events the room is looked at again, and given back if it is far too large
TOUCH: Final = 10  # depth (0 is the best) of the best level that the last event changed; FAR if none
ADDED: Final = 12  # size that the last event added to each side (L3, L2)
REMOVED: Final = 14  # size that it took away, other than by a clear
UNTIL: Final = 16  # the levels that changed lie before this depth; FAR if levels have come or gone
FINGER: Final = 18  # where the last search on each side ended
HEAD: Final = 20

FAR: Final = 1 << 40
NEAR: Final = 16  # this many best entries of each side are levels; deeper ones may be dead (size and count 0), to be used again
REACH: Final = 64  # how far an insertion looks for a dead entry
SPARE: Final = 16  # dead entries and one that an insertion makes where it finds none, deep in the book
REVIEW: Final = 65_536  # events between two looks at the room
MAX: Final = 2**63 - 1  # sizes sum modulo 2**64; what does not fit an int64 reads as this
UNDEFINED: Final = (MAX, -MAX - 1)  # prices that are none: such an order or level is not in the book
MIN_BITS: Final = 6
MIN_CAP: Final = 16
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)


@njit(cache=True, inline="always")
def _home(identity: Any, bits: Any) -> Any:
    return np.int64((identity * _GOLDEN) >> np.uint64(64 - bits))


@njit(cache=True, inline="always")
def _slot(s: Array, u: Array, identity: Any) -> Any:
    """The offset of the slot (id, key, size, mark) that holds the order, or of the empty one where it would go."""
    bits, epoch = s[BITS], s[EPOCH]
    mask = (1 << bits) - 1
    orders = s[BASE] + 6 * s[CAP]
    j = _home(identity, bits)
    while True:
        w = orders + 4 * j
        if abs(s[w + 3]) != epoch or u[w] == identity:
            return w
        j = (j + 1) & mask


@njit(cache=True)
def _forget(s: Array, u: Array, w: Any) -> None:
    """Empty the slot at `w` and shift back those that had probed past it."""
    bits, epoch = s[BITS], s[EPOCH]
    mask = (1 << bits) - 1
    orders = s[BASE] + 6 * s[CAP]
    hole = (w - orders) >> 2
    j = hole
    while True:
        j = (j + 1) & mask
        v = orders + 4 * j
        if abs(s[v + 3]) != epoch:
            break
        if ((j - _home(u[v], bits)) & mask) >= ((j - hole) & mask):
            h = orders + 4 * hole
            for c in range(4):
                s[h + c] = s[v + c]
            hole = j
    s[orders + 4 * hole + 3] = 0
    s[LIVE] -= 1


@njit(cache=True)
def _find(s: Array, k: Any, p: Any, n: Any, key: Any) -> Any:
    """The first of the `n` ascending entries at s[p:] that is not below `key`: among the best NEAR, else galloping from the last one."""
    if n == 0 or s[p + 3 * n - 3] < key:
        s[FINGER + k] = n
        return n
    if n >= NEAR and s[p + 3 * (n - NEAR)] < key:  # near the touch, without branches that nobody can predict
        above = 0
        for j in range(p + 3 * (n - NEAR), p + 3 * n, 3):
            above += s[j] >= key
        return n - above
    hi, step = min(s[FINGER + k], n - 1), 1
    if s[p + 3 * hi] >= key:
        lo = hi - 1
        while lo >= 0 and s[p + 3 * lo] >= key:
            hi = lo
            lo -= step
            step *= 2
        lo = max(lo, -1)
    else:
        lo = hi
        hi += 1
        while hi < n and s[p + 3 * hi] < key:
            lo = hi
            hi += step
            step *= 2
        hi = min(hi, n - 1)
    while hi - lo > 1:
        middle = (lo + hi) >> 1
        if s[p + 3 * middle] >= key:
            hi = middle
        else:
            lo = middle
    s[FINGER + k] = hi
    return hi


@njit(cache=True, inline="always")
def _dead(s: Array, entry: Any) -> Any:
    return s[entry + 1] == 0 and s[entry + 2] == 0


@njit(cache=True)
def _insert(s: Array, k: Any, p: Any, i: Any, key: Any, size: Any, count: Any) -> None:
    """Put a level before entry `i`: into a dead entry within reach, else by moving the better levels up."""
    n = s[LEVELS + k]
    s[TOUCH + k], s[UNTIL + k] = min(s[TOUCH + k], n - i), FAR
    if i == n or s[p + 3 * i] != key:
        free, deeper = n, False
        for j in range(min(n - i, REACH)):
            if _dead(s, p + 3 * (i + j)):
                free = i + j
                break
            if i - 1 - j >= 0 and _dead(s, p + 3 * (i - 1 - j)):
                free, deeper = i - 1 - j, True
                break
        if deeper:
            i -= 1
            for j in range(p + 3 * free, p + 3 * i):
                s[j] = s[j + 3]
        elif free == n and n - i >= REACH and n + SPARE <= s[CAP] and key < 1 << 62 and key + SPARE <= s[p + 3 * i]:
            for j in range(p + 3 * n - 1, p + 3 * i - 1, -1):
                s[j + 3 * SPARE] = s[j]
            for j in range(1, SPARE):
                entry = p + 3 * (i + j)
                s[entry], s[entry + 1], s[entry + 2] = key + j, 0, 0
            s[LEVELS + k] = n + SPARE
        else:
            for j in range(p + 3 * free + 2, p + 3 * i + 2, -1):
                s[j] = s[j - 3]
            s[LEVELS + k] = max(n, free + 1)
    entry = p + 3 * i
    s[entry], s[entry + 1], s[entry + 2] = key, size, count


@njit(cache=True)
def _remove(s: Array, k: Any, p: Any, i: Any) -> None:
    """Take away level `i`: deep in the book its entry only dies; the best NEAR entries are kept alive and dense."""
    n = s[LEVELS + k]
    s[TOUCH + k], s[UNTIL + k] = min(s[TOUCH + k], n - 1 - i), FAR
    s[p + 3 * i + 1] = s[p + 3 * i + 2] = 0
    while i > n - 1 - NEAR and i >= 0 and _dead(s, p + 3 * i):
        for j in range(p + 3 * i, p + 3 * n - 3):
            s[j] = s[j + 3]
        n -= 1
        i = n - NEAR
    s[LEVELS + k] = n


@njit(cache=True, inline="always")
def _change(s: Array, k: Any, key: Any, size: Any, count: Any) -> None:
    """Add `size` and `count` orders, either sign, to the level of side `k` at `key`."""
    p = s[BASE] + 3 * k * s[CAP]
    n = s[LEVELS + k]
    i = _find(s, k, p, n, key)
    entry = p + 3 * i
    if i == n or s[entry] != key or _dead(s, entry):
        if count > 0:
            _insert(s, k, p, i, key, size, count)
    elif s[entry + 2] + count <= 0:
        _remove(s, k, p, i)
    else:
        s[entry + 1] += size
        s[entry + 2] += count
        s[TOUCH + k], s[UNTIL + k] = min(s[TOUCH + k], n - 1 - i), max(s[UNTIL + k], n - i)


@njit(cache=True)
def _leave(s: Array, k: Any, key: Any, size: Any) -> None:
    """Take an order of `size` away from the level of side `k` at `key`."""
    _change(s, k, key, -size, np.int64(-1))


@njit(cache=True)
def _clear(s: Array) -> None:
    for k in range(2):
        if s[LEVELS + k]:
            s[LEVELS + k], s[TOUCH + k], s[UNTIL + k] = 0, 0, FAR
    s[LIVE] = 0
    s[EPOCH] += 1


@njit(cache=True, inline="always")
def applied(s: Array, u: Array, action: Any, side: Any, price: Any, size: Any, identity: Any, flags: Any) -> None:
    """Apply one event to the book `s` (`u` is its uint64 view); TOUCH, ADDED and REMOVED tell what changed.

    A adds an order (an id that is there is replaced), M sets price and size (an unknown id is added), C reduces by `size` (0, or what
    is left or more: removes), R clears, T does nothing. With F_MBP A and M set a level's size and C removes it; with F_TOB they set
    and remove the whole side. A size of 0 or less, or an undefined price, leaves nothing behind. The first update from another depth
    of feed starts the book anew.
    """
    s[TOUCH] = s[TOUCH + 1] = FAR
    s[ADDED] = s[ADDED + 1] = s[REMOVED] = s[REMOVED + 1] = s[UNTIL] = s[UNTIL + 1] = 0
    if action == CLEAR:
        _clear(s)
        return
    if action not in (ADD, CANCEL, MODIFY):
        return
    feed = 1 if flags & F_TOB else (2 if flags & F_MBP else 3)
    if feed != s[FEED]:
        _clear(s)
        s[FEED] = feed
    gone = size <= 0 or price == UNDEFINED[0] or price == UNDEFINED[1]
    k = 0 if side > 0 else 1
    key = price if side > 0 else -price  # ascending keys run from the worst to the best on both sides
    if feed == 3:
        _order(s, u, action, side, k, key, size, identity, gone)
    elif side != 0:
        p = s[BASE] + 3 * k * s[CAP]
        n = s[LEVELS + k]
        gone = gone or action == CANCEL
        if feed == 1:
            if n if gone else (n == 0 or s[p] != key or s[p + 1] != size):
                s[TOUCH + k], s[UNTIL + k] = 0, 1
            s[LEVELS + k] = 0 if gone else 1
            s[p], s[p + 1], s[p + 2] = key, size, 0
            return
        i = _find(s, k, p, n, key)
        entry = p + 3 * i
        old = s[entry + 1] if i < n and s[entry] == key else 0
        if gone:
            if old:
                s[REMOVED + k] = old
                _remove(s, k, p, i)
        else:
            s[ADDED + k] = max(size - old, 0)
            s[REMOVED + k] = max(old - size, 0)
            if old == size:
                return
            if old:
                s[entry + 1] = size
                s[TOUCH + k], s[UNTIL + k] = n - 1 - i, n - i
            else:
                _insert(s, k, p, i, key, size, np.int64(0))


@njit(cache=True, inline="always")
def _order(s: Array, u: Array, action: Any, side: Any, k: Any, key: Any, size: Any, identity: Any, gone: Any) -> None:
    """One call of `_change` at the end for all that may happen: it is inlined."""
    w = _slot(s, u, identity)
    if abs(s[w + 3]) == s[EPOCH]:
        was, at, old = 0 if s[w + 3] > 0 else 1, s[w + 1], s[w + 2]
        if action == CANCEL:
            size = old - size if 0 < size < old else 0
            k, key = was, at
        elif gone:
            size, k, key = 0, was, at
        elif side == 0:
            k, key = was, (key if was else -key)
        stays = was == k and at == key
        if stays and size == old:
            return
        if stays:
            s[ADDED + k], s[REMOVED + k] = max(size - old, 0), max(old - size, 0)
            more, count = size - old, np.int64(0)
        else:
            s[REMOVED + was] = old
            _leave(s, was, at, old)
            more, count = size, np.int64(1)
        if size == 0:
            count = np.int64(-1)
            _forget(s, u, w)
        else:
            s[w + 1], s[w + 2], s[w + 3] = key, size, (s[EPOCH] if k == 0 else -s[EPOCH])
        if not stays:
            s[ADDED + k] = size
    elif action == CANCEL or gone or side == 0:
        return
    else:
        u[w] = identity
        s[LIVE] += 1
        s[w + 1], s[w + 2], s[w + 3] = key, size, (s[EPOCH] if k == 0 else -s[EPOCH])
        s[ADDED + k] = size
        more, count = size, np.int64(1)
    _change(s, k, key, more, count)


@njit(cache=True)
def apply(s: Array, u: Array, action: Any, side: Any, price: Any, size: Any, identity: Any, flags: Any) -> None:
    """:func:`applied` as a call of its own."""
    applied(s, u, action, side, price, size, identity, flags)


@njit(cache=True, inline="always")
def room(s: Array) -> Any:
    """Whether the next event can be applied before :func:`mended` has to be called."""
    return 2 * s[LIVE] < (1 << s[BITS]) and max(s[LEVELS], s[LEVELS + 1]) < s[CAP] and s[EVENTS] < s[DUE]


@njit(cache=True)
def _alive(s: Array) -> Any:
    """Levels on the side that has more of them."""
    most = 0
    for k in range(2):
        p, n = s[BASE] + 3 * k * s[CAP], 0
        for entry in range(p, p + 3 * s[LEVELS + k], 3):
            n += not _dead(s, entry)
        most = max(most, n)
    return most


@njit(cache=True)
def _refill(s: Array, t: Array) -> None:
    """Copy the levels and the orders of book `s` into the empty book `t`."""
    for k in range(2):
        p, x = s[BASE] + 3 * k * s[CAP], t[BASE] + 3 * k * t[CAP]
        t[LEVELS + k] = 0
        for entry in range(p, p + 3 * s[LEVELS + k], 3):
            if not _dead(s, entry):
                for c in range(3):
                    t[x + 3 * t[LEVELS + k] + c] = s[entry + c]
                t[LEVELS + k] += 1
    v, u = s.view(np.uint64), t.view(np.uint64)
    orders = s[BASE] + 6 * s[CAP]
    for w in range(orders, orders + 4 * (1 << s[BITS]), 4):
        if abs(s[w + 3]) == s[EPOCH]:
            x = _slot(t, u, v[w])
            for c in range(4):
                t[x + c] = s[w + c]


def new_book(feed: int = 3, words: int = 0) -> Array:
    """An empty book whose header is followed by `words` zeros for the caller: int64, 1-D."""
    s = np.zeros(HEAD + words + 6 * MIN_CAP + 4 * (1 << MIN_BITS), np.int64)
    s[[EPOCH, BITS, CAP, FEED, BASE, DUE, TOUCH, TOUCH + 1]] = 1, MIN_BITS, MIN_CAP, feed, HEAD + words, REVIEW, FAR, FAR
    return s


def mended(s: Array) -> Array:
    """The book with room for at least one more event: `s` itself or a copy that is larger, or smaller once orders are gone."""
    live, bits, cap = int(s[LIVE]), int(s[BITS]), int(s[CAP])
    bits += 2 * live >= 1 << bits
    review = s[EVENTS] >= s[DUE]
    if review:
        s[DUE] = s[EVENTS] + REVIEW
        if 8 * live < 1 << bits:
            bits = max(MIN_BITS, (4 * live).bit_length())
    if review or max(s[LEVELS], s[LEVELS + 1]) >= cap:
        cap = max(MIN_CAP, 1 << int(2 * _alive(s)).bit_length())
    if (bits, cap) == (s[BITS], s[CAP]) and max(s[LEVELS], s[LEVELS + 1]) < cap:
        return s
    t = np.zeros(s[BASE] + 6 * cap + 4 * (1 << bits), np.int64)
    t[: s[BASE]] = s[: s[BASE]]
    t[BITS], t[CAP] = bits, cap
    _refill(s, t)
    return t


@njit(cache=True)
def _depth(s: Array, events: Array, rows: Array, start: Any, levels: Any, out: Array) -> Any:
    u = s.view(np.uint64)
    for i in range(start, len(rows)):
        if not room(s):
            return i
        e = events[rows[i]]
        apply(s, u, e["action"], e["side"], e["price"], e["size"], e["order_id"], e["flags"])
        s[EVENTS] += 1
        row = out[rows[i]]
        for k in range(2):
            p, m = s[BASE] + 3 * k * s[CAP], 3 * levels * k
            end, entry = m + levels, p + 3 * s[LEVELS + k] - 3
            while entry >= p and m < end:
                if not _dead(s, entry):
                    row[m] = s[entry] if k == 0 else -s[entry]
                    row[m + levels] = s[entry + 1] if s[entry + 1] >= 0 else MAX
                    row[m + 2 * levels] = s[entry + 2]
                    m += 1
                entry -= 3
    return len(rows)


def by_instrument(events: Array) -> list[tuple[int, Array]]:
    """The instruments in `events`, each with the ascending int64 positions of its events."""
    which = events["instrument"]
    if len(events) and (which == which[0]).all():
        return [(int(which[0]), np.arange(len(events)))]
    order = np.argsort(which, kind="stable")
    found, first = np.unique(which[order], return_index=True)
    return [(int(k), rows) for k, rows in zip(found, np.split(order, first[1:]))]


def depth(events: Array, levels: int = 10, books: MutableMapping[int, Array] | None = None) -> Array:
    """The best levels of the event's own instrument after each event, best first.

    `events`: EVENT (n,), any number of instruments. `books`: the books to start from, by instrument index, advanced in place (absent
    ones start empty), so that a stream may come in pieces. Returns (n,) of `bid_px`, `bid_sz`, `bid_ct`, `ask_px`, `ask_sz`, `ask_ct`,
    each int64 (levels,) in EVENT units; empty levels are 0, and so are the counts of L2 and L1 levels, which have none.
    """
    if levels < 1:
        raise ValueError(f"levels must be at least 1, not {levels}")
    kind = np.dtype([(f"{side}_{what}", np.int64, (levels,)) for side in ("bid", "ask") for what in ("px", "sz", "ct")])
    out = np.zeros(len(events), kind)
    flat = out.view(np.int64).reshape(len(events), 6 * levels)
    books = {} if books is None else books
    for instrument, rows in by_instrument(events):
        book = books.get(instrument, new_book())
        done = 0
        while (done := _depth(book, events, rows, done, levels, flat)) < len(rows):
            book = mended(book)
        books[instrument] = book
    return out
