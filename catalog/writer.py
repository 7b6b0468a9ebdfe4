"""Writes EVENT rows as the Parquet files of a NautilusTrader 2.0 catalog, with pyarrow alone and in bounded memory.

:func:`table` makes the Arrow table, schema and metadata exactly as Nautilus writes them; :class:`Writer` appends one instrument's rows of
one type in row groups.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from catalog.events import EVENT, F_MBP, F_TOB, Instrument
from catalog.parquet import ACTION, BLOCK, NANO, PRICE, QUOTES, SCHEMA, TIME, TRADES, TYPE_NAME, iso

Events = NDArray[Any]
_CODES: Final = {ord("A"): 0, ord("M"): 1, ord("C"): 2, ord("R"): 3}


def _decimals(values: NDArray[np.int64]) -> pa.Array:
    words = np.empty((len(values), 2), np.int64)
    words[:, 0] = values
    words[:, 1] = values >> 63
    return pa.Array.from_buffers(NANO, len(values), [None, pa.py_buffer(words)]).cast(PRICE)


def _coded(codes: NDArray[np.int8], words: list[str]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int8()), pa.array(words, pa.string()))


def _times(values: NDArray[np.int64]) -> pa.Array:
    return pa.array(np.ascontiguousarray(values)).cast(TIME)


def table(events: Events, kind: str, instrument: Instrument) -> pa.Table:
    """EVENT rows of one instrument and type as the Arrow table that NautilusTrader 2.0 writes for them.

    A, M, C, R become ADD, UPDATE, DELETE, CLEAR; F_MBP and F_TOB are ours and are not written. A trade's id is its sequence. Quotes are
    pairs of rows with F_TOB, bid then ask, of one stamp; a side that is not there has the size 0.
    """
    names = {
        b"instrument_id": instrument.id.encode(),
        b"price_precision": str(instrument.price_precision).encode(),
        b"size_precision": str(instrument.size_precision).encode(),
        b"type_name": TYPE_NAME[kind].encode(),
    }
    if kind == QUOTES:
        columns = [_decimals(events[what][side::2]) for what in ("price", "size") for side in (0, 1)]
        events = events[::2]
    elif kind == TRADES:
        columns = [
            _decimals(events["price"]),
            _decimals(events["size"]),
            _coded(events["side"] % 3, ["NO_AGGRESSOR", "BUY", "SELL"]),
            pa.array(np.ascontiguousarray(events["sequence"])).cast(pa.string()),
        ]
    else:
        action = np.full(256, -1, np.int8)
        action[list(_CODES)] = list(_CODES.values())
        columns = [
            _coded(action[events["action"]], list(ACTION)),
            _coded(events["side"] % 3, ["NO_ORDER_SIDE", "BUY", "SELL"]),
            _decimals(events["price"]),
            _decimals(events["size"]),
            pa.array(np.ascontiguousarray(events["order_id"])),
            pa.array(np.ascontiguousarray(events["flags"] & np.uint8(0xFF ^ F_MBP ^ F_TOB))),
            pa.array(np.ascontiguousarray(events["sequence"])),
        ]
    columns += [_times(events["ts_event"]), _times(events["ts_init"])]
    return pa.Table.from_arrays(columns, schema=pa.schema(SCHEMA[kind], names))


class Writer:
    """Appends one instrument's rows of one type (deltas, trades or quotes) in row groups; the file gets its name when it is closed.

    Rows must come in order of `ts_init`. At most BLOCK rows are held. `close` leaves no trace when there were no rows.
    """

    def __init__(self, root: Path, kind: str, instrument: Instrument) -> None:
        self.kind, self.instrument, self.rows = kind, instrument, 0
        self._folder = root / "data" / kind / instrument.id.replace("/", "")
        self._held: list[Events] = []
        self.held = 0
        self._file: pq.ParquetWriter | None = None
        self._first = self._last = 0

    def add(self, events: Events) -> None:
        if not len(events):
            return
        if not self.rows:
            self._first = int(events[0]["ts_init"])
        self._last = int(events[-1]["ts_init"])
        self.rows += len(events)
        self._held.append(events)
        self.held += len(events)
        if self.held >= BLOCK:
            self.flush(all_rows=False)

    def flush(self, all_rows: bool = True) -> None:
        """Write what is held, in whole row groups or (`all_rows`) to the last row."""
        events = np.concatenate(self._held) if self._held else np.empty(0, EVENT)
        n = len(events) if all_rows else len(events) // BLOCK * BLOCK
        if n:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                schema = table(events[:0], self.kind, self.instrument).schema
                self._file = pq.ParquetWriter(
                    self._folder / "open",
                    schema,
                    compression="zstd",
                    use_dictionary=[n for n in ("action", "side", "aggressor_side", "flags") if n in schema.names],
                    column_encoding={"ts_event": "DELTA_BINARY_PACKED", "ts_init": "DELTA_BINARY_PACKED"},
                )
            self._file.write_table(table(events[:n], self.kind, self.instrument), row_group_size=BLOCK)
        self._held = [events[n:].copy()] if n < len(events) else []
        self.held = len(events) - n

    def close(self) -> Path | None:
        self.flush()
        if self._file is None:
            return None
        self._file.close()
        self._file = None
        return (self._folder / "open").rename(self._folder / f"{stamp(self._first)}_{stamp(self._last)}.parquet")

    def abandon(self) -> None:
        """Let go of the file without finishing it."""
        if self._file is not None:
            with contextlib.suppress(OSError, pa.ArrowException):
                self._file.close()
            self._file = None


def stamp(ns: int) -> str:
    """ns UTC as Nautilus spells it in file names: 2024-08-08T23-54-15-319702566Z."""
    return iso(ns).replace(":", "-").replace(".", "-")
