"""Features and labels as one Parquet file for notebooks, one row a decision, with the time at which each was known.

Takes a catalog, gives columns `ts` (ns UTC: the features were known then), `instrument`, `feed` (the deepest: 3, 2, 1), one float64 column
a feature (:data:`cift_models.features.NAMES`), and for each label "move <label>" (ticks; NaN where it does not exist) with
"known <label>" (ns UTC; null where the data end before it is known).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from catalog.errors import InputError
from catalog.events import Instrument, read_catalog
from catalog.progress import Steps
from cift_models.features import NAMES, replay
from cift_models.labels import LABELS, Labeller, Outcomes
from cift_models.windows import closes, new_batches

GROUP: Final = 65_536  # rows of a row group, at least
TIME: Final = pa.timestamp("ns", tz="UTC")


class _Waiting:
    """Decisions of one instrument, oldest first, until all their labels are known; `first` is the serial of the oldest."""

    def __init__(self) -> None:
        self.first = 0
        self.ts = np.empty(0, np.int64)
        self.rows = np.empty((0, len(NAMES)))
        self.move, self.known = np.empty((0, len(LABELS))), np.empty((0, len(LABELS)), np.int64)

    def add(self, ts: NDArray[np.int64], rows: NDArray[np.float64]) -> None:
        n = len(ts), len(LABELS)
        self.ts, self.rows = np.concatenate([self.ts, ts]), np.concatenate([self.rows, rows])
        self.move, self.known = np.concatenate([self.move, np.full(n, np.nan)]), np.concatenate([self.known, np.zeros(n, np.int64)])

    def learn(self, o: Outcomes, mine: NDArray[np.bool_]) -> None:
        at = o.serial[mine] - self.first, o.label[mine]
        self.move[at], self.known[at] = o.move[mine], o.known_at[mine]

    def take(self, whole: bool) -> tuple[NDArray[Any], ...]:
        """Remove the decisions before the first that still waits (`whole`: all)."""
        waits = np.flatnonzero((self.known == 0).any(axis=1))
        n = len(self.ts) if whole or not len(waits) else int(waits[0])
        out = self.ts[:n], self.rows[:n], self.move[:n], self.known[:n]
        self.ts, self.rows, self.move, self.known = self.ts[n:], self.rows[n:], self.move[n:], self.known[n:]
        self.first += n
        return out


def _table(instrument: Instrument, ts: Any, rows: Any, move: Any, known: Any) -> pa.Table:
    columns = {
        "ts": pa.array(ts).cast(TIME),
        "instrument": pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(ts), np.int8)), pa.array([instrument.id])),
        "feed": pa.array(np.full(len(ts), instrument.level, np.int8)),
    }
    columns |= {name: pa.array(np.ascontiguousarray(rows[:, j])) for j, name in enumerate(NAMES)}
    for j, label in enumerate(LABELS):
        columns[f"move {label}"] = pa.array(np.ascontiguousarray(move[:, j]))
        columns[f"known {label}"] = pa.array(known[:, j], mask=known[:, j] == 0).cast(TIME)
    return pa.table(columns)


def write(root: Path, out: Path, symbols: Sequence[str] | None = None, start: int | None = None, end: int | None = None) -> int:
    """Write `out`; returns its rows, which are in order of time within each instrument. A row waits in memory until its labels are known.

    `start`, `end`: ns UTC, both inclusive; features begin empty at `start`. Raises InputError as `read_catalog` does, and where `out`
    cannot be written.
    """
    instruments, blocks = read_catalog(root, symbols, start, end)
    labeller, batches, mid = Labeller(instruments), new_batches(len(instruments)), NAMES.index("mid")
    waiting, states = [_Waiting() for _ in instruments], {}  # type: ignore[var-annotated]
    held: list[pa.Table] = []
    total = 0
    part = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with Steps("export", 0, "events") as steps, pq.ParquetWriter(part, _schema(instruments), compression="zstd") as file:

            def settle(o: Outcomes, whole: bool) -> None:
                nonlocal total, held
                for k, w in enumerate(waiting):
                    w.learn(o, o.instrument == k)
                    taken = w.take(whole)
                    if len(taken[0]):
                        held.append(_table(instruments[k], *taken))
                        total += len(taken[0])
                if held and (whole or sum(map(len, held)) >= GROUP):
                    file.write_table(pa.concat_tables(t.cast(file.schema) for t in held))
                    held = []

            for events in blocks:
                rows = replay(events, instruments, states)
                at = closes(batches, events)
                for k, w in enumerate(waiting):
                    mine = at[events["instrument"][at] == k]
                    w.add(events["ts_init"][mine], rows[mine])
                settle(labeller.push(events, np.ascontiguousarray(rows[:, mid]), at), False)
                steps.advance(len(events))
            settle(labeller.finish(), True)
        part.replace(out)
    except OSError as e:
        raise InputError(f"cannot write {out} ({e.strerror or e}): choose another place") from None
    finally:
        part.unlink(missing_ok=True)
    return total


def _schema(instruments: Sequence[Instrument]) -> pa.Schema:
    none = np.empty((0, max(len(NAMES), len(LABELS))))
    schema = _table(instruments[0], np.empty(0, np.int64), none, none, none.astype(np.int64)).schema
    return schema.set(1, pa.field("instrument", pa.string()))
