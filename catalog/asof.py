"""As-of joins of alternative data: what was known of each instrument at each decision, for a block of them or for one alone.

Takes a table of :mod:`catalog.altdata` and the instruments' ids; a :class:`Lookup` gives values and ages at any times, and rows that
arrive while it is in use are pushed into it. One kernel serves history and live data, so both see the same numbers to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from catalog.altdata import ALL, FEATURES, NAMES, Floats, Ints, Table, stack
from catalog.errors import InputError

F: Final = len(FEATURES)
FOLD: Final = 1_000  # pushed rows that wait beside the others before all are sorted anew


class _Rows(NamedTuple):
    """Rows by series (instrument x feature), then `known`, `event`, `rank`; `best` is the row that counts from this one on."""

    start: Ints  # (series + 1,)
    known: Ints
    event: Ints
    rank: NDArray[np.int8]  # 2 written for the id, 1 for the symbol, 0 for all
    value: Floats
    best: Ints


def _ranks(names: Iterable[str], instrument: str) -> dict[int, int]:
    """Which of `names` speak about `instrument`: 0 all instruments, 1 its symbol, 2 its id."""
    mine = {ALL: 0, instrument.rsplit(".", 1)[0]: 1, instrument: 2}
    return {k: mine[name] for k, name in enumerate(names) if name in mine}


@njit(cache=True, nogil=True)
def _best(start, event, best):  # type: ignore[no-untyped-def]
    for s in range(len(start) - 1):
        b = start[s]
        for r in range(start[s], start[s + 1]):
            if event[r] >= event[b]:
                b = r
            best[r] = b


def _sorted(data: Table, ids: Sequence[str]) -> _Rows:
    parts: list[list[NDArray[Any]]] = []
    for k, id_ in enumerate(ids):
        rank = np.full(len(data.names) + 1, -1, np.int8)
        for name, r in _ranks(data.names, id_).items():
            rank[name] = r
        of = rank[data.instrument]
        mine = np.flatnonzero(of >= 0)
        parts.append([k * F + data.feature[mine].astype(np.int64), data.ts_known[mine], data.ts_event[mine], of[mine], data.value[mine]])
    series, known, event, rank_, value = (np.concatenate(c) for c in zip(*parts))
    order = np.lexsort((rank_, event, known, series))
    start = np.searchsorted(series[order], np.arange(len(ids) * F + 1))
    rows = _Rows(start, known[order], event[order], rank_[order], value[order], np.empty(len(order), np.int64))
    _best(rows.start, rows.event, rows.best)
    return rows


@njit(cache=True, nogil=True)
def _newest(rows, s, t):  # type: ignore[no-untyped-def]
    """The row of series `s` that counts at `t`; -1 where nothing was known."""
    a, b = rows.start[s], rows.start[s + 1]
    first = a
    while a < b:
        c = (a + b) // 2
        if rows.known[c] <= t:
            a = c + 1
        else:
            b = c
    return rows.best[a - 1] if a > first else -1


@njit(cache=True, nogil=True)
def _join(old, new, ts, instrument, wanted, features, values, ages):  # type: ignore[no-untyped-def]
    for i in range(len(ts)):
        for j in range(len(wanted)):
            s = instrument[i] * features + wanted[j]
            a, b = _newest(old, s, ts[i]), _newest(new, s, ts[i])
            if a < 0 and b < 0:
                values[i, j] = ages[i, j] = np.nan
                continue
            late = a < 0
            if a >= 0 and b >= 0:
                late = new.event[b] > old.event[a]
                if new.event[b] == old.event[a]:
                    late = new.known[b] > old.known[a] or (new.known[b] == old.known[a] and new.rank[b] >= old.rank[a])
            values[i, j] = new.value[b] if late else old.value[a]
            ages[i, j] = (ts[i] - (new.event[b] if late else old.event[a])) / 1e9


class Lookup:
    """What was known of the instruments `ids` at any time.

    Of all rows with `ts_known` <= t the one about the newest event counts; of several about the same event the one known last (a
    revision); at the same stamps a row of the id goes before one of the symbol, and that before one for all.
    """

    def __init__(self, data: Table, ids: Sequence[str]) -> None:
        self.ids, self._data, self._pushed = tuple(ids), data, stack()
        self._old, self._new = _sorted(data, self.ids), _sorted(self._pushed, self.ids)

    def __len__(self) -> int:
        return len(self._old.known) + len(self._new.known)

    def counts(self, start: int, end: int) -> NDArray[np.int64]:
        """How many rows became known in [start, end) ns, by feature (27,): a row for all counts once for each instrument."""
        count = np.zeros(F, np.int64)
        for part in (self._old, self._new):
            series = np.repeat(np.arange(len(part.start) - 1), np.diff(part.start))
            count += np.bincount(series[(part.known >= start) & (part.known < end)] % F, minlength=F)
        return count

    def told(self, start: int, end: int) -> dict[str, int]:
        """:meth:`counts` by name, of the features that have any."""
        return {name: int(n) for name, n in zip(NAMES, self.counts(start, end)) if n}

    @property
    def data(self) -> Table:
        """All rows, the pushed ones included."""
        return stack(self._data, self._pushed)

    def of(self, ids: Sequence[str]) -> Self:
        """The same rows for other instruments."""
        return type(self)(self.data, ids)

    def push(self, data: Table) -> None:
        """New rows; those known already count from the next question on."""
        self._pushed = stack(self._pushed, data)
        if len(self._pushed) > FOLD:
            self._data, self._pushed = self.data, stack()
            self._old = _sorted(self._data, self.ids)
        self._new = _sorted(self._pushed, self.ids)

    def at(self, instrument: Ints, ts: Ints, features: Ints | None = None) -> tuple[Floats, Floats]:
        """Values and ages (m, 27), or those of some `features` (indices), at `ts` (m,) ns UTC of `instrument` (m,) as in `ids`.

        Ages are seconds since `ts_event`; NaN where nothing was known.
        """
        wanted = np.arange(F) if features is None else features
        values, ages = np.empty((len(ts), len(wanted))), np.empty((len(ts), len(wanted)))
        _join(self._old, self._new, ts, instrument, wanted, F, values, ages)
        return values, ages


def lookup(data: Table, ids: Sequence[str]) -> Lookup:
    """As :class:`Lookup`. Raises InputError where no row is about any of `ids`."""
    made = Lookup(data, ids)
    if not len(made):
        held = ", ".join(data.names[:5]) or "nothing"
        raise InputError(
            f"the alternative data tell of {held}, not of {', '.join(ids[:5])}: name ids (AAPL.XNAS), symbols (AAPL) or * for all"
        )
    return made


def asof(data: Table, instrument: str, ts: Ints) -> tuple[Floats, Floats]:
    """:meth:`Lookup.at` for one instrument (id): values and ages (n, 27) at `ts` (n,)."""
    ts = np.asarray(ts, np.int64)
    return Lookup(data, [instrument]).at(np.zeros(len(ts), np.int64), ts)
