"""What a model may know of one instrument after each event: one numba kernel for history and for the live stream.

:func:`replay` takes EVENT arrays and gives float64 rows of :data:`NAMES`; :class:`State` carries one instrument from piece to piece,
in memory that does not grow with the stream. Row i depends on events 0..i only. Rolling windows are rings of fixed size; the rest
decays, by half-lives in events or in clock time (`ts_init`, never backwards). What each column means stands in `docs/features.md`.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Final

import numpy as np

from catalog.book import FAR, MAX, Array, by_instrument, mended, new_book
from catalog.events import Instrument, session_bounds
from cift_models.feature_kernel import CELLS, LATEST, MIDS, WORDS, F, S, run, step
from cift_models.feature_table import FEATURES, INPUTS, NAMES, features_markdown

__all__ = ["FEATURES", "INPUTS", "NAMES", "State", "features_markdown", "new_state", "replay", "step"]

BLOCK: Final = 65_536  # events in a call of the kernel
_ALL: Final = np.arange(BLOCK)


class State:
    """One instrument's book and features: `words` is an int64 array, all there is to store besides the instrument."""

    __slots__ = ("instrument", "words")

    def __init__(self, instrument: Instrument, words: Array) -> None:
        self.instrument, self.words = instrument, words

    def copy(self) -> State:
        return State(self.instrument, self.words.copy())

    def advance(self, events: Array, out: Array, rows: Array = _ALL, n: int | None = None) -> None:
        """Take the first `n` of the events at `rows` (by default all, in order; at most :data:`BLOCK`); their features go to the same rows.

        `events` EVENT (m,), C order; `out` float64 (m, len(NAMES)). The cost of a call is that of the events and about a microsecond.
        """
        stop = len(events) if n is None else n
        done = run(self.words, events, rows, 0, stop, out)
        while done < stop:
            self._mend(int(events[rows[done]]["ts_init"]))
            done = run(self.words, events, rows, done, stop, out)

    def _mend(self, ts: int) -> None:
        s = self.words
        if ts > s[S.until]:
            try:
                opens, closes = session_bounds(self.instrument.session, ts)
            except (OverflowError, ValueError, OSError):  # a stamp outside the calendar
                opens, closes = ts, MAX
            s[S.open] = min(max(opens, 0), LATEST)
            s[S.until] = min((opens if ts < opens else closes) - 1, MAX)
            f = s.view(np.float64)
            f[S.high], f[S.low], s[S.changed], s[S.fresh] = -np.inf, np.inf, 1, 1
        self.words = mended(s)


def new_state(instrument: Instrument) -> State:
    """The state before the first event of an instrument; features that its feed cannot tell (`instrument.level`) start as NaN."""
    s = new_book(instrument.level, WORDS)
    f = s.view(np.float64)
    s[S.feed] = instrument.level
    s[S.until] = s[S.trade_ts] = s[S.owed_ts] = -MAX
    s[S.quote] = s[S.was_quote] = -1
    s[S.dirty] = FAR
    f[S.tick] = max(instrument.tick, 1)
    for start, n in ((S.mid, 1), (S.settled_mid, 1), (S.depth1, 1), (S.depth5, 1), (S.row, F), (S.mids, MIDS), (S.cells, CELLS)):
        f[start : start + n] = np.nan
    f[S.keys : S.keys + 10] = f[S.settled_keys : S.settled_keys + 10] = -np.inf
    return State(instrument, s)


def replay(
    events: Array, instruments: Sequence[Instrument], state: MutableMapping[int, State] | None = None, out: Array | None = None
) -> Array:
    """Features of a stream of several instruments: float64 (n, len(NAMES)), row i after event i, from events 0..i of its instrument.

    `events`: EVENT (n,) in canonical order. `state`: states by instrument index, advanced in place and made where absent, so that the
    next piece of the stream goes on from them. `out` takes the rows if given. Raises IndexError for an instrument not in the table.
    """
    n = len(events)
    out = np.empty((n, F)) if out is None else out
    state = {} if state is None else state
    events = np.require(events, requirements=["C", "W"])
    for start in range(0, n, BLOCK):
        piece, rows_out = events[start : start + BLOCK], out[start : start + BLOCK]
        for k, rows in by_instrument(piece):
            if k not in state:
                state[k] = new_state(instruments[k])
            state[k].advance(piece, rows_out, rows, len(rows))
    return out
