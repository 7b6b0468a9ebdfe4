"""NautilusTrader 2.0 Parquet catalogs, read with pyarrow alone: decimal128 columns to EVENT integers.

A catalog is data/<type>/<instrument id>/<start>_<end>.parquet below its root. :func:`read` merges the row groups of many files in
canonical order and bounded memory; :func:`contents` tells what lies where from metadata alone; :mod:`catalog.writer` writes.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from catalog.errors import InputError
from catalog.events import ADD, CANCEL, CLEAR, EVENT, F_LAST, F_MBP, F_TOB, MODIFY, TRADE, Instrument, units

Events = NDArray[Any]
BLOCK: Final = 65_536  # most rows of a block that a reader yields, and of a row group that is written
FAR: Final = 4_102_444_800_000_000_000  # 2100-01-01, the expiry that stands for none
BUFFERED: Final = 1_000_000  # rows that all cursors of a reader may hold together

DELTAS, TRADES, QUOTES = "order_book_deltas", "trades", "quotes"
_KINDS: Final = {"futures_contract": "future", "equity": "equity", "currency_pair": "currency_pair", "crypto_perpetual": "crypto_perpetual"}
_OLD: Final = ("order_book_delta", "trade_tick", "quote_tick", "order_book_delta_data")

WORD = pa.dictionary(pa.int8(), pa.string())
PRICE = pa.decimal128(38, 16)
TIME = pa.timestamp("ns", tz="UTC")
SCHEMA: Final = {
    DELTAS: [
        pa.field("action", WORD, False),
        pa.field("side", WORD, False),
        pa.field("price", PRICE),
        pa.field("size", PRICE),
        pa.field("order_id", pa.uint64(), False),
        pa.field("flags", pa.uint8(), False),
        pa.field("sequence", pa.uint64(), False),
        pa.field("ts_event", TIME, False),
        pa.field("ts_init", TIME, False),
    ],
    TRADES: [
        pa.field("price", PRICE, False),
        pa.field("size", PRICE, False),
        pa.field("aggressor_side", WORD, False),
        pa.field("trade_id", pa.string(), False),
        pa.field("ts_event", TIME, False),
        pa.field("ts_init", TIME, False),
    ],
    QUOTES: [
        *(pa.field(f"{side}_{what}", PRICE, False) for what in ("price", "size") for side in ("bid", "ask")),
        pa.field("ts_event", TIME, False),
        pa.field("ts_init", TIME, False),
    ],
}
TYPE_NAME: Final = {DELTAS: "OrderBookDelta", TRADES: "TradeTick", QUOTES: "QuoteTick"}
ACTION: Final = {"ADD": ADD, "UPDATE": MODIFY, "DELETE": CANCEL, "CLEAR": CLEAR}
_SIDE: Final = {"BUY": 1, "SELL": -1, "NO_ORDER_SIDE": 0, "NO_AGGRESSOR": 0, "BUYER": 1, "SELLER": -1}


# --- columns --------------------------------------------------------------------------------------------------------------------------

NANO = pa.decimal128(38, 9)


def _decimal(column: pa.Array, name: str, file: Path) -> NDArray[np.int64]:
    """A decimal128 column as int64 in units of 1e-9, exactly or not at all."""
    try:
        nano = column.cast(NANO)
        words = np.frombuffer(nano.buffers()[1], np.int64).reshape(-1, 2)[nano.offset : nano.offset + len(nano)]
        if nano.null_count or np.any(words[:, 1] != words[:, 0] >> 63):
            raise ValueError("empty, or beyond 9.2e9")
    except (pa.ArrowException, ValueError) as e:
        raise InputError(f"{file}: a {name} cannot be held in 64 bits in units of 1e-9 ({_brief(e)}): write it rounded") from None
    return words[:, 0]


# --- what lies where ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """One Parquet file of a catalog: `rows`, bytes on disk, and its first and last `ts_init` (ns UTC)."""

    id: str
    type: str  # order_book_deltas, trades or quotes
    path: Path
    rows: int
    size: int
    start: int
    end: int
    level: int  # 3 orders, 2 levels, 1 quotes; 0 for trades


def _nanoseconds(stamp: Any) -> int:
    """A Parquet statistic of a timestamp column, whatever class pyarrow made of it, in ns."""
    return int(stamp.value) if hasattr(stamp, "value") else int(np.datetime64(stamp.replace(tzinfo=None), "ns").astype(np.int64))


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError, ValueError) as e:
        raise InputError(f"{path} is no readable Parquet file ({_brief(e)}): write or copy it again") from None


def _brief(e: BaseException) -> str:
    return str(e).split("\n")[0][:160]


def _check_schema(path: Path, schema: pa.Schema, kind: str) -> None:
    for field in SCHEMA[kind]:
        if field.name not in schema.names:
            raise InputError(
                f'{path} has no column "{field.name}": no {TYPE_NAME[kind]} file of NautilusTrader 2.0; write the catalog again'
            )
        found = schema.field(field.name).type
        same = (
            pa.types.is_decimal128(found) if pa.types.is_decimal128(field.type)
            else pa.types.is_string(getattr(found, "value_type", found)) if field.type == WORD
            else pa.types.is_timestamp(found) and found.unit == "ns" if field.type == TIME
            else found == field.type
        )  # fmt: skip
        if not same:
            raise InputError(
                f'{path}: column "{field.name}" is {found}, not {field.type}: a catalog of another NautilusTrader version; write it again '
                "with 2.0 (ParquetDataCatalog.migrate_from_legacy_parquet_path, or import the source anew)"
            )


def _part(path: Path, kind: str, name: str) -> Part | None:
    with _open(path) as file:
        _check_schema(path, file.schema_arrow, kind)
        meta = file.metadata
        if meta.num_rows == 0:
            return None
        bounds = [s for g in range(meta.num_row_groups) if (s := _bounds(file, g)) is not None]
        if len(bounds) < meta.num_row_groups:
            stamps = file.read(["ts_init"]).column(0).cast(pa.int64())
            bounds = [(stamps[0].as_py(), stamps[-1].as_py())]
        level = {TRADES: 0, QUOTES: 1, DELTAS: 2}[kind]
        if kind == DELTAS:
            level = 3 if _has_orders(file) else 2
        true_id = (file.schema_arrow.metadata or {}).get(b"instrument_id", name.encode()).decode()
    return Part(true_id, kind, path, meta.num_rows, path.stat().st_size, min(b[0] for b in bounds), max(b[1] for b in bounds), level)


def _column(file: pq.ParquetFile, name: str) -> int:
    return file.schema_arrow.names.index(name)


def _bounds(file: pq.ParquetFile, group: int) -> tuple[int, int] | None:
    s = file.metadata.row_group(group).column(_column(file, "ts_init")).statistics
    return None if s is None or not s.has_min_max else (_nanoseconds(s.min), _nanoseconds(s.max))


def _has_orders(file: pq.ParquetFile) -> bool:
    for g in range(file.metadata.num_row_groups):
        s = file.metadata.row_group(g).column(_column(file, "order_id")).statistics
        if s is not None and s.has_min_max:
            if s.max or s.min:
                return True
        elif np.any(file.read_row_group(g, ["order_id"]).column(0).to_numpy()):
            return True
    return False


def _folder(root: Path) -> Path:
    if not root.is_dir():
        raise InputError(f"{root} is no folder: give the root of a catalog (the folder that holds data/)")
    data = root / "data"
    if not data.is_dir() or not any(data.iterdir()):
        raise InputError(f"{root} is no catalog: it has no data/<type>/<instrument>/*.parquet; import files with python -m catalog import")
    if old := next((o for o in _OLD if (data / o).is_dir()), None):
        raise InputError(f"{data / old} belongs to a catalog of NautilusTrader 1.x: write it again with 2.0")
    return data


def _files(data: Path, kind: str) -> Iterator[tuple[str, list[Path]]]:
    if (data / kind).is_dir():
        for folder in sorted((data / kind).iterdir()):
            if folder.is_dir() and (files := sorted(folder.glob("*.parquet"))):
                yield folder.name, files


def contents(root: Path, instrument_ids: Sequence[str] | None = None) -> list[Part]:
    """Every file of deltas, trades and quotes with rows in it, from metadata. Raises InputError as `read_catalog` does."""
    data = _folder(root)
    found = [_part(f, kind, name) for kind in (TRADES, DELTAS, QUOTES) for name, files in _files(data, kind) for f in files]
    parts = [p for p in found if p is not None]
    if not parts:
        raise InputError(f"{root} holds no order book deltas, trades or quotes: import files with python -m catalog import")
    if instrument_ids is not None:
        wanted = set(_resolve(root, sorted({p.id for p in parts}), instrument_ids))
        parts = [p for p in parts if p.id in wanted]
    return parts


def _resolve(root: Path, known: list[str], wanted: Sequence[str]) -> list[str]:
    ids: list[str] = []
    for name in wanted:
        found = [name] if name in known else [k for k in known if k.rsplit(".", 1)[0] == name]
        if len(found) != 1:
            why = f"names several instruments: {', '.join(found)}" if found else f"is not there; it holds {', '.join(known[:12])}"
            raise InputError(f"{root}: {name} {why}{' and more' if not found and len(known) > 12 else ''}")
        if found[0] not in ids:
            ids.append(found[0])
    if not ids:
        raise InputError(f"{root}: no instrument was asked for; it holds {', '.join(known[:12])}")
    return ids


def read_instruments(root: Path, ids: Collection[str] | None = None) -> dict[str, Instrument]:
    """The instruments `ids` that a catalog defines, by id (the newest definition of each), with their pauses; `level` is left at 3.

    None: all of them, but for those whose ticks do not fit units of 1e-9. Raises InputError for one of `ids` that does not.
    """
    from catalog import pauses

    found = definitions(root, ids)
    spans = pauses.read(root, {id_: expiry for id_, (_, expiry) in found.items()})
    return {id_: replace(i, pauses=spans[id_]) if id_ in spans else i for id_, (i, _) in found.items()}


def definitions(root: Path, ids: Collection[str] | None = None) -> dict[str, tuple[Instrument, int]]:
    """As :func:`read_instruments`, without pauses, each with its expiry (ns UTC; the largest int64 where it has none)."""
    data, found = _folder(root), {}
    for folder in sorted(p for p in data.iterdir() if p.is_dir() and p.name not in SCHEMA):
        for path in sorted(folder.glob("*/*.parquet")):
            with _open(path) as file:
                if not {"id", "price_increment"} <= set(file.schema_arrow.names):
                    break
                try:
                    rows = file.read().to_pylist()
                except (pa.ArrowException, OSError, ValueError) as e:
                    raise InputError(f"{path} is damaged ({_brief(e)}): write the catalog again") from None
            for row in rows:
                if ids is None or row["id"] in ids:
                    try:
                        found[row["id"]] = _instrument(row, folder.name, path)
                    except InputError:
                        if ids is not None:
                            raise
    return found


def _expiry(row: dict[str, Any]) -> int:
    when = row.get("expiration_ns")
    ns = _nanoseconds(when) if isinstance(when, dt.datetime) else int(when or 0)
    return ns if 0 < ns < FAR else np.iinfo(np.int64).max


def _instrument(row: dict[str, Any], folder: str, path: Path) -> tuple[Instrument, int]:
    """An instrument, and when it expires (ns UTC)."""
    try:
        extra = json.loads(row.get("info") or "{}").get("cift") or {}
        size = row.get("size_increment") or "1"
        currency = row.get("settlement_currency") or row.get("quote_currency") or row.get("currency")
        found = Instrument(
            id=row["id"],
            tick=units(row["price_increment"]),
            lot=units(size),
            multiplier=float(row.get("multiplier") or 1.0),
            currency=currency or "",
            session=extra.get("session"),
            price_precision=int(row["price_precision"]),
            size_precision=int(row.get("size_precision") or 0),
            kind=extra.get("kind") or "inverse_" * bool(row.get("is_inverse")) + _KINDS.get(folder, folder),
            maker_fee=float(extra.get("maker_fee", row.get("maker_fee") or 0.0)),
            taker_fee=float(extra.get("taker_fee", row.get("taker_fee") or 0.0)),
            fee_per_unit=float(extra.get("fee_per_unit", 0.0)),
        )
        return found, _expiry(row)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise InputError(
            f"{path}: the definition of {row.get('id')} cannot be read ({_brief(e)}): write it again with 2.0, or name other "
            "symbols"
        ) from None


# --- reading --------------------------------------------------------------------------------------------------------------------------


def _codes(column: pa.Array, table: dict[str, int], dtype: Any, file: Path) -> NDArray[Any]:
    column = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    words = column.dictionary.to_pylist()
    if unknown := [w for w in words if w not in table]:
        raise InputError(f'{file}: "{unknown[0]}" is none of {", ".join(table)}')
    lut = np.array([table[w] for w in words] or [0], dtype)
    return lut[column.indices.to_numpy(zero_copy_only=False)]


def _decode(batch: pa.RecordBatch, kind: str, index: int, file: Path) -> Events:
    for field in SCHEMA[kind]:
        if batch.column(field.name).null_count:
            raise InputError(f'{file}: column "{field.name}" has empty values: write the catalog again')
    ts_event, ts_init = (batch.column(c).cast(pa.int64()).to_numpy() for c in ("ts_event", "ts_init"))
    if np.any(back := ts_init[1:] < ts_init[:-1]):
        raise InputError(f"{file}: ts_init runs backwards at {iso(int(ts_init[1:][back][0]))}: sort the file by ts_init and write it again")
    repeat = 2 if kind == QUOTES else 1
    out = np.zeros(repeat * batch.num_rows, EVENT)
    out["ts_event"], out["ts_init"], out["instrument"] = np.repeat(ts_event, repeat), np.repeat(ts_init, repeat), index
    if kind == QUOTES:
        for i, name in enumerate(("bid", "ask")):
            side = out[i::2]
            side["price"], side["size"] = (_decimal(batch.column(f"{name}_{w}"), f"{name}_{w}", file) for w in ("price", "size"))
            side["side"], side["flags"] = 1 - 2 * i, F_TOB | F_LAST * i
        out["action"] = np.where(out["size"] == 0, CANCEL, ADD)
        return out
    out["price"], out["size"] = (_decimal(batch.column(c), c, file) for c in ("price", "size"))
    if kind == TRADES:
        out["action"], out["side"] = TRADE, _codes(batch.column("aggressor_side"), _SIDE, np.int8, file)
        return out
    out["action"] = _codes(batch.column("action"), ACTION, np.uint8, file)
    out["side"] = _codes(batch.column("side"), _SIDE, np.int8, file)
    out["order_id"], out["sequence"] = batch.column("order_id").to_numpy(), batch.column("sequence").to_numpy()
    out["flags"] = batch.column("flags").to_numpy() | np.where((out["order_id"] == 0) & (out["action"] != CLEAR), F_MBP, 0).astype(np.uint8)
    return out


class _Cursor:
    """The rows of a chain of files that follow each other in time, decoded batch by batch."""

    def __init__(self, parts: list[Part], index: int, start: int, end: int, batch: int) -> None:
        self.rows: Events = np.empty(0, EVENT)
        self.ended = False
        self._batches = self._read(parts, index, start, end, batch)

    def _read(self, parts: list[Part], index: int, start: int, end: int, batch: int) -> Iterator[Events]:
        last = np.iinfo(np.int64).min
        for part in parts:
            with _open(part.path) as file:
                groups = [
                    g
                    for g in range(file.metadata.num_row_groups)
                    if (b := _bounds(file, g)) is None or (b[1] >= start and b[0] <= end)
                ]
                try:
                    for table in file.iter_batches(batch, groups, [f.name for f in SCHEMA[part.type]]):
                        rows = _decode(table, part.type, index, part.path)
                        del table  # a file waits here while others are read
                        if len(rows) and rows[0]["ts_init"] < last:
                            raise InputError(f"{part.path}: ts_init runs backwards at {rows[0]['ts_init']}: sort the file by it")
                        last = rows[-1]["ts_init"] if len(rows) else last
                        inside = slice(*np.searchsorted(rows["ts_init"], [start]), *np.searchsorted(rows["ts_init"], [end], "right"))
                        rows = rows[inside]
                        if len(rows):
                            yield rows
                except (pa.ArrowException, OSError) as e:
                    raise InputError(f"{part.path} is damaged ({_brief(e)}): write or copy it again") from None

    def more(self) -> None:
        """Append the next batch, or note that there is none."""
        rows = next(self._batches, None)
        if rows is None:
            self.ended = True
        else:
            self.rows = rows if not len(self.rows) else np.concatenate([self.rows, rows])

    def take(self, before: int | None) -> Events:
        """Remove and return the rows with ts_init < before (None: all)."""
        n = len(self.rows) if before is None else int(np.searchsorted(self.rows["ts_init"], before))
        head, self.rows = self.rows[:n], self.rows[n:]
        return head


def _chains(parts: list[Part]) -> list[list[Part]]:
    """Files in chains without overlap, so that each chain is one sorted stream."""
    chains: list[list[Part]] = []
    for part in sorted(parts, key=lambda p: (p.start, p.end)):
        chain = next((c for c in chains if c[-1].end <= part.start), None)
        if chain is None:
            chains.append([part])
        else:
            chain.append(part)
    return chains


def _merge(cursors: list[_Cursor]) -> Iterator[Events]:
    live = cursors
    while True:
        for c in live:
            while not c.ended and (not len(c.rows) or c.rows[0]["ts_init"] == c.rows[-1]["ts_init"]):
                c.more()
        live = [c for c in live if len(c.rows)]
        if not live:
            return
        horizon = min((int(c.rows[-1]["ts_init"]) for c in live if not c.ended), default=None)
        heads = [c.take(horizon) for c in live]
        rows = np.concatenate(heads) if len(heads) > 1 else heads[0]
        if len(heads) > 1:
            rows = rows[np.argsort(rows["ts_init"], kind="stable")]
        for i in range(0, len(rows), BLOCK):
            yield rows[i : i + BLOCK]


def read(root: Path, instrument_ids: Sequence[str] | None, start: int | None, end: int | None) -> tuple[list[Instrument], Iterator[Events]]:
    """See :func:`catalog.events.read_catalog`."""
    first, last = (np.iinfo(np.int64).min if start is None else start), (np.iinfo(np.int64).max if end is None else end)
    if first > last:
        raise InputError(f"the range is empty: it starts at {iso(first)} and ends at {iso(last)}")
    parts = contents(root)
    ids = sorted({p.id for p in parts}) if instrument_ids is None else _resolve(root, sorted({p.id for p in parts}), instrument_ids)
    if len(ids) > 65_535:
        raise InputError(f"{root} holds {len(ids):,} instruments, more than 65,535: name the ones that are wanted")
    known = read_instruments(root, ids)
    if missing := [i for i in ids if i not in known]:
        raise InputError(f"{root} has data of {missing[0]} but no definition of it: add one with ParquetDataCatalog.write_instruments")
    chosen = [p for p in parts if p.id in set(ids)]
    inside = [p for p in chosen if p.end >= first and p.start <= last]
    if not inside:
        a, b = min(p.start for p in chosen), max(p.end for p in chosen)
        raise InputError(f"{root} has nothing between {iso(first)} and {iso(last)}: its data runs from {iso(a)} to {iso(b)}")
    deep = {p.id for p in chosen if p.type == DELTAS}
    inside = [p for p in inside if p.type != QUOTES or p.id not in deep]
    streams = [
        (ids.index(i), chain)
        for types in ((TRADES,), (DELTAS, QUOTES))
        for i in ids
        for kind in types
        for chain in _chains([p for p in inside if p.id == i and p.type == kind])
    ]
    batch = max(1_024, min(BLOCK, BUFFERED // max(len(streams), 1)))
    cursors = [_Cursor(chain, index, first, last, batch) for index, chain in streams]
    levels = {i: max((p.level for p in chosen if p.id == i), default=0) for i in ids}
    return [_at_level(known[i], levels[i] or 1) for i in ids], _merge(cursors)


def _at_level(i: Instrument, level: int) -> Instrument:
    return i if i.level == level else replace(i, level=level)


def iso(ns: int) -> str:
    """ns UTC as text, to the nanosecond; the bounds of int64 as "the beginning" and "the end"."""
    if ns in (np.iinfo(np.int64).min, np.iinfo(np.int64).max):
        return "the beginning" if ns < 0 else "the end"
    seconds, rest = divmod(ns, 10**9)
    return f"{dt.datetime.fromtimestamp(seconds, dt.UTC):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"
