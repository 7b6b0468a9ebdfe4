"""What is wrong with a market's data: counted by kind with the first of each, never silently dropped.

One numba pass over EVENT blocks with carried state, per instrument, on the order book of :mod:`catalog.book`. Takes the rows as they
came (before `ts_init` is moved, to see it run backwards) or in canonical order; gives :class:`Quality`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from catalog import book
from catalog.book import BASE, CAP, EPOCH, EVENTS, LEVELS, MAX
from catalog.events import (
    ADD,
    CANCEL,
    CLEAR,
    F_BAD_TS_RECV,
    F_LAST,
    F_MAYBE_BAD_BOOK,
    F_MBP,
    F_SNAPSHOT,
    F_TOB,
    MODIFY,
    TRADE,
    Instrument,
    session_bounds,
)

Array = NDArray[Any]

KINDS: Final = {
    "crossed": "best bid above best ask at the end of a venue event",
    "crossed_in_snapshot": "the same within a snapshot",
    "locked": "best bid equal to best ask at the end of a venue event",
    "locked_in_snapshot": "the same within a snapshot",
    "unknown_cancel": "cancel of an order that is not in the book",
    "unknown_modify": "change of an order that is not in the book",
    "duplicate_add": "new order whose id is in the book",
    "partial_cancel": "cancel of a part of an order (no fault: written as an update)",
    "ts_init_backwards": "known to us before the event above it",
    "ts_event_backwards": "venue's stamp before that of the event above it",
    "zero_size": "new order or trade without size",
    "negative_size": "size below 0",
    "off_tick": "order or level at a price that is no multiple of the tick",
    "trade_off_tick": "trade at a price that is no multiple of the tick (midpoint executions)",
    "undefined_price": "order, level or trade without a price",
    "no_side": "new order without a side",
    "sequence_backwards": "sequence number below the one above it",
    "sequence_gap": "sequence number skipped, where the feed numbers this instrument alone",
    "bad_ts_recv": "flagged F_BAD_TS_RECV outside a snapshot",
    "maybe_bad_book": "flagged F_MAYBE_BAD_BOOK",
    "silence": "half an hour or more of a session without an event or a status record",
    "missing_session": "session of a weekday without an event or a status record",
    "bad_record": "record of an unknown action or side, or without a time (left out)",
}
NAMES: Final = tuple(KINDS)
(
    _CROSSED, _CROSSED_SNAPSHOT, _LOCKED, _LOCKED_SNAPSHOT, _UNKNOWN_CANCEL, _UNKNOWN_MODIFY, _DUPLICATE, _PARTIAL, _INIT_BACK, _EVENT_BACK,
    _ZERO, _NEGATIVE, _OFF_TICK, _TRADE_OFF_TICK, _UNDEFINED, _NO_SIDE, _SEQUENCE_BACK, _SEQUENCE_GAP, _BAD_RECV, _MAYBE_BAD,
    _SILENCE, _MISSING, _BAD_RECORD,
) = range(len(NAMES))  # fmt: skip
_LAST_POINTS, _STEPS = len(NAMES), len(NAMES) + 1  # F_LAST points; sequence numbers that follow their predecessor
_DAY: Final = 86_400_000_000_000  # ns
_TS_INIT, _TS_EVENT, _SEQUENCE = range(3)  # words of the carried state
SILENCE: Final = 1_800_000_000_000  # ns
ROUND_THE_CLOCK: Final = ("crypto", "currency_pair")  # kinds that are open where no session is told; others may be closed for all we know
GAP_SHARE: Final = 0.05  # a feed that skips more of its numbers than this numbers several instruments together: no gap can be told


@njit(cache=True)
def _note(kind: Any, i: Any, event: Any, positions: Array, counts: Array, first: Array) -> None:
    if counts[kind] == 0:
        first[kind, 0] = positions[i]
        first[kind, 1] = event["ts_init"]
        first[kind, 2] = np.int64(event["sequence"])
        first[kind, 3] = event["action"]
    counts[kind] += 1


@njit(cache=True, inline="always")
def _best(s: Array, k: Any) -> Any:
    """Key of the best level of side `k`, which has levels: its last entry."""
    return s[s[BASE] + 3 * k * s[CAP] + 3 * (s[LEVELS + k] - 1)]


@njit(cache=True)
def _scan(
    s: Array, events: Array, rows: Array, start: Any, positions: Array, tick: Any, rewrite: Any, carried: Array, counts: Array, first: Array
) -> Any:
    """Check and apply events[rows[start:]]. Returns the first row not done: the book `s` wants room then.

    `rewrite`: change the rows so that a book that knows only whole cancels and positive sizes follows the same way: a C of a part
    becomes M to what is left, an A of an order that is there M, an A or M to nothing C; what must not reach it gets the action 0.
    """
    u = s.view(np.uint64)
    for j in range(start, len(rows)):
        if not book.room(s):
            return j
        i = rows[j]
        e = events[i]
        action, price, size, flags = e["action"], e["price"], e["size"], e["flags"]
        snapshot = flags & F_SNAPSHOT != 0
        if e["ts_init"] < carried[_TS_INIT]:
            _note(_INIT_BACK, i, e, positions, counts, first)
        carried[_TS_INIT] = e["ts_init"]
        if not snapshot:
            if e["ts_event"] < carried[_TS_EVENT]:
                _note(_EVENT_BACK, i, e, positions, counts, first)
            carried[_TS_EVENT] = e["ts_event"]
            sequence = np.int64(e["sequence"])
            if sequence != 0:
                before = carried[_SEQUENCE] if action != CLEAR else 0  # a new session may number anew
                if sequence < before:
                    _note(_SEQUENCE_BACK, i, e, positions, counts, first)
                elif before > 0 and sequence > before + 1:
                    _note(_SEQUENCE_GAP, i, e, positions, counts, first)
                else:
                    counts[_STEPS] += 1
                carried[_SEQUENCE] = sequence
            if flags & F_BAD_TS_RECV:
                _note(_BAD_RECV, i, e, positions, counts, first)
        if flags & F_MAYBE_BAD_BOOK:
            _note(_MAYBE_BAD, i, e, positions, counts, first)
        sound = True
        if action != CLEAR:
            if size < 0:
                _note(_NEGATIVE, i, e, positions, counts, first)
                sound = action == CANCEL
            elif size == 0 and (action == TRADE or (action == ADD and not flags & (F_MBP | F_TOB))):
                _note(_ZERO, i, e, positions, counts, first)
                sound = False
            if price == MAX:
                if action != CANCEL:
                    _note(_UNDEFINED, i, e, positions, counts, first)
                    sound = False
            elif price % tick != 0:
                _note(_TRADE_OFF_TICK if action == TRADE else _OFF_TICK, i, e, positions, counts, first)
            if action == ADD and e["side"] == 0:
                _note(_NO_SIDE, i, e, positions, counts, first)
                sound = False
        if not flags & (F_MBP | F_TOB) and action in (ADD, CANCEL, MODIFY):
            w = book._slot(s, u, e["order_id"])
            here = abs(s[w + 3]) == s[EPOCH]
            if action == ADD:
                if here:
                    _note(_DUPLICATE, i, e, positions, counts, first)
            elif not here:
                _note(_UNKNOWN_CANCEL if action == CANCEL else _UNKNOWN_MODIFY, i, e, positions, counts, first)
                if e["side"] == 0:
                    sound = False
            elif action == CANCEL and 0 < size < s[w + 2]:
                _note(_PARTIAL, i, e, positions, counts, first)
                if rewrite:
                    bid = s[w + 3] > 0
                    e["action"], e["side"] = MODIFY, 1 if bid else -1
                    e["price"], e["size"] = (s[w + 1] if bid else -s[w + 1]), s[w + 2] - size
            if rewrite and action != CANCEL and (size <= 0 or price == MAX):
                e["action"], e["size"] = CANCEL, 0
                sound = here
            elif rewrite and here and action == ADD:
                e["action"] = MODIFY
                sound = True
            if rewrite and here and e["side"] == 0:
                e["side"] = 1 if s[w + 3] > 0 else -1
            if rewrite and price == MAX and e["action"] == CANCEL:
                e["price"] = (s[w + 1] if s[w + 3] > 0 else -s[w + 1]) if here else 0
        book.apply(s, u, action, e["side"], price, size, e["order_id"], flags)
        s[EVENTS] += 1
        if flags & F_LAST and action != TRADE:
            counts[_LAST_POINTS] += 1
            if s[LEVELS] > 0 and s[LEVELS + 1] > 0:
                bid, ask = _best(s, 0), -_best(s, 1)
                if bid > ask:
                    _note(_CROSSED_SNAPSHOT if snapshot else _CROSSED, i, e, positions, counts, first)
                elif bid == ask:
                    _note(_LOCKED_SNAPSHOT if snapshot else _LOCKED, i, e, positions, counts, first)
        if rewrite and not sound:
            e["action"] = 0
    return len(rows)


def _silent(i: Instrument, a: int, b: int) -> list[int]:
    """The faults, one each, of a time from `a` to `b` (ns UTC) without an event of instrument `i`."""

    def quiet(lo: int, hi: int) -> bool:
        paused = sum(max(0, min(hi, to) - max(lo, since)) for since, to in i.pauses)
        return hi - lo - paused >= SILENCE

    if i.session is None:
        open_now = bool(i.currency) and any(k in i.kind for k in ROUND_THE_CLOCK)
        return [_SILENCE] if open_now and quiet(a, b) else []
    found: list[int] = []
    t = a
    while t < b and len(found) < 1_000:
        try:
            opens, closes = session_bounds(i.session, t)
        except (OverflowError, ValueError, OSError):  # a stamp outside the calendar
            break
        if not (opens < b and quiet(max(a, opens), min(b, closes))):
            pass
        elif opens < a or b < closes:
            found.append(_SILENCE)
        elif (closes // _DAY + 3) % 7 < 5:  # Monday to Friday: the first day of 1970 was a Thursday
            found.append(_MISSING)
        t = closes
    return found


class First(NamedTuple):
    """Where a fault was seen first: `position` in the stream or number of the record, `ts` (`ts_init`, ns), `sequence`, and the `file`."""

    position: int
    ts: int
    sequence: int
    file: str


@dataclass(frozen=True, slots=True)
class Quality:
    """What was found.

    `counts`: by kind (:data:`KINDS`), zeros included. `first`: the first of each kind found. `by_instrument`: counts by instrument id.
    `events` checked, and `last_points`: events that end a venue event.
    """

    counts: dict[str, int]
    first: dict[str, First]
    by_instrument: dict[str, dict[str, int]]
    events: int
    last_points: int


class Checker:
    """Checks a stream block by block: :meth:`update` for each, :meth:`result` at any time. The books of all instruments are held.

    `instruments` may grow while the stream runs; its entries give id and tick. `locate` (instrument id, ts_init, whether a trade) names
    the file of a row; without it, it is `file` as it stands at that update.
    """

    def __init__(self, instruments: list[Instrument], locate: Callable[[str, int, bool], str] | None = None) -> None:
        self.instruments, self.events, self.file = instruments, 0, ""
        self._locate, self._bad, self._first_bad = locate, 0, First(0, 0, 0, "")
        self._books: dict[int, Array] = {}
        self._state: dict[int, tuple[Array, Array, Array]] = {}
        self._files: dict[tuple[int, int], str] = {}
        self._seen: dict[int, int] = {}  # newest `ts_init` of each instrument outside snapshots

    def bad(self, position: int, ts: int, sequence: int) -> None:
        """A record of `file` that is no event."""
        self._first_bad = self._first_bad if self._bad else First(position, ts, sequence, self.file)
        self._bad += 1

    def update(self, events: Array, positions: Array | None = None, rewrite: bool = False) -> None:
        """Check the next rows (EVENT). `positions`: int64 number of each row for `first`; None: its position in the stream.

        `rewrite` changes `events` for a book that knows whole cancels only (see :func:`_scan`); rows to leave out get the action 0.
        """
        if positions is None:
            positions = np.arange(self.events, self.events + len(events))
        for k, rows in book.by_instrument(events):
            if k not in self._state:
                carried = np.array([-(2**63), -(2**63), 0])
                self._state[k] = carried, np.zeros(len(NAMES) + 2, np.int64), np.zeros((len(NAMES), 4), np.int64)
                self._books[k] = book.new_book()
            done, tick, counts = 0, max(self.instruments[k].tick, 1), self._state[k][1]
            none = np.flatnonzero(counts[: len(NAMES)] == 0)
            while (done := _scan(self._books[k], events, rows, done, positions, tick, rewrite, *self._state[k])) < len(rows):
                self._books[k] = book.mended(self._books[k])
            self._listen(k, events, rows, positions)
            self._files |= {(k, int(kind)): self.file for kind in none[counts[none] > 0]}
        self.events += len(events)

    def _listen(self, k: int, events: Array, rows: Array, positions: Array) -> None:
        """Look for times without an event of instrument `k`."""
        rows = rows[events["flags"][rows] & F_SNAPSHOT == 0]
        if not len(rows):
            return
        ts = events["ts_init"][rows]
        ts = np.maximum.accumulate(np.append(self._seen.get(k, ts[0]), ts))
        self._seen[k] = int(ts[-1])
        _, counts, first = self._state[k]
        for n in np.flatnonzero(np.diff(ts) >= SILENCE):
            e = events[rows[n]]
            for kind in _silent(self.instruments[k], int(ts[n]), int(ts[n + 1])):
                if not counts[kind]:
                    first[kind] = positions[rows[n]], e["ts_init"], np.int64(e["sequence"]), e["action"]
                counts[kind] += 1

    def found(self, kind: str) -> tuple[int, int, int] | None:
        """(instrument index, position, `ts_init`) of the first of this kind, or None."""
        k = NAMES.index(kind)
        hits = [(i, int(first[k, 0]), int(first[k, 1])) for i, (_, counts, first) in self._state.items() if counts[k]]
        return min(hits, key=lambda h: (h[2], h[1])) if hits else None

    def _first(self, kind: str) -> First:
        hit = self.found(kind)
        if hit is None:
            return self._first_bad
        i, position, ts = hit
        _, _, sequence, action = self._state[i][2][NAMES.index(kind)]
        file = self._locate(self.instruments[i].id, ts, action == TRADE) if self._locate else self._files[i, NAMES.index(kind)]
        return First(position, ts, int(sequence) & (1 << 64) - 1, file)

    def result(self) -> Quality:
        counts, by_instrument = dict.fromkeys(NAMES, 0), {}
        last_points = 0
        for i in sorted(self._state):
            c = self._state[i][1].copy()
            if c[_SEQUENCE_GAP] > GAP_SHARE * c[_STEPS]:
                c[_SEQUENCE_GAP] = 0
            by_instrument[self.instruments[i].id] = {name: int(n) for name, n in zip(NAMES, c)}
            last_points += int(c[_LAST_POINTS])
            for name, n in zip(NAMES, c):
                counts[name] += int(n)
        counts["bad_record"] = self._bad
        first = {n: self._first(n) for n in NAMES if counts[n]}
        return Quality(counts, first, by_instrument, self.events, last_points)


def check(blocks: Iterable[Array], instruments: list[Instrument]) -> Quality:
    """Check a whole stream of EVENT blocks (as `read_catalog` yields them) against its instrument table."""
    checker = Checker(instruments)
    for events in blocks:
        checker.update(events)
    return checker.result()
