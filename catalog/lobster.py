"""LOBSTER message files as EVENT arrays: reconstructed Nasdaq order flow, one equity and one day a file.

Takes a message file, plain or zstd, and where there is one the order book file beside it, whose first row seeds the orders that were
there before. Message types: 1 new order, 2 partial cancel, 3 deletion, 4 execution, 5 execution of a hidden order, 6 cross trade, 7
halt. Prices are dollars times 10,000, times are seconds after midnight in New York (https://lobsterdata.com/info/DataStructure.php).
"""

from __future__ import annotations

import datetime as dt
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from catalog.dbn import MBO, Block, Span
from catalog.definitions import Definition
from catalog.errors import InputError
from catalog.events import ADD, CANCEL, CLEAR, EVENT, F_LAST, F_SNAPSHOT, SCALE, TRADE, Instrument, move, read_instruments_toml
from catalog.levels import HEAD, LEVELS, QUOTES, STATE, convert
from catalog.status import AUCTION, HALTED, OPEN, Status

PRICE: Final = SCALE // 10_000
NO_LEVEL: Final = 9_999_999_999  # with either sign, the price of a level that is not there
NAME: Final = re.compile(r"(?P<symbol>[A-Z.]+)_(?P<date>\d{4}-\d\d-\d\d)_\d+_\d+_(message|orderbook)_\d+\.csv(\.zst)?")
_TYPES: Final = pa.schema(
    {
        "time": pa.decimal128(19, 14), "type": pa.int8(), "id": pa.uint64(), "size": pa.int64(), "price": pa.int64(), "side": pa.int8(),
    }
)


def _table(path: Path, names: list[str] | None, types: Any) -> pa.Table:
    compression = "zstd" if path.suffix == ".zst" else None
    read = pa.csv.ReadOptions(column_names=names, autogenerate_column_names=names is None)
    try:
        with pa.input_stream(str(path), compression=compression) as f:
            return pa.csv.read_csv(f, read, convert_options=pa.csv.ConvertOptions(column_types=types))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: check the path") from None
    except (pa.ArrowInvalid, OSError) as e:
        raise InputError(f"{path} is not a LOBSTER file ({str(e).splitlines()[0]}): download it again") from None


def _messages(path: Path, symbol: str | None = None, date: str | None = None) -> tuple[Any, ...]:
    """(path, symbol, ts ns UTC, type, id, size, price 1e-4 dollars, side), the last six arrays of one value a message."""
    m = NAME.fullmatch(path.name)
    symbol, date = symbol or (m["symbol"] if m else None), date or (m["date"] if m else None)
    if not symbol or not date:
        like = "AAPL_2012-06-21_34200000_57600000_message_10.csv"
        raise InputError(f"{path.name} does not tell symbol and date: give them, or name it like {like}")
    table = _table(path, _TYPES.names, _TYPES)
    midnight = int(dt.datetime.combine(dt.date.fromisoformat(date), dt.time(), ZoneInfo("America/New_York")).timestamp()) * SCALE
    time = np.frombuffer(table["time"].combine_chunks().buffers()[1], np.int64)[::2]  # in 1e-14 s; beyond 1e-9 s it is binary noise
    ts = midnight + (time + 50_000) // 100_000
    kind, ids, size, price, side = (table[c].to_numpy() for c in _TYPES.names[1:])
    unknown = ~np.isin(kind, range(1, 8)) | ~np.isin(side, (-1, 1)) & (kind < 6)
    if unknown.any():
        raise InputError(f"{path}, line {int(unknown.argmax()) + 1}: not a LOBSTER message (type {kind[unknown.argmax()]}): check the file")
    return path, symbol, ts, kind, ids, size, price, side


def read_lobster(
    message_path: str | Path, orderbook_path: str | Path | None = None, *, symbol: str | None = None, date: str | None = None
) -> tuple[NDArray[Any], list[Instrument]]:
    """The events of a message file, EVENT (n,) in canonical order, and its one instrument.

    An execution gives a T (the aggressor is the other side's) and the C that it causes; a hidden one or a cross only a T; halts are
    left out. With the order book file its first row, the book after the first message, becomes a snapshot, one order a level, and later
    messages about orders that were there before work on these; without it they work on nothing. `symbol` and `date` (2012-06-21) are
    taken from the file's name where not given. Raises InputError for a file or a name of another form.
    """
    _, symbol, ts, kind, ids, size, price, side = _messages(Path(message_path), symbol, date)
    seed = _seed(Path(orderbook_path), ts[0]) if orderbook_path is not None and len(ts) else np.empty(0, EVENT)
    skip = len(seed) > 0  # the seed is the book after the first message
    _, first, which = np.unique(ids, return_index=True, return_inverse=True)
    opened = (kind[first] == 1) & (first >= skip)  # ids that the messages to come introduce; the others were in the book before
    owner = np.where(opened[which], ids, _level_id(price, side))
    book, traded = np.isin(kind, (1, 2, 3, 4)), np.isin(kind, (4, 5, 6)) & (size > 0)
    book[:skip] = traded[:skip] = False
    count = book.astype(np.int64) + traded
    start = np.cumsum(count) - count
    out = np.zeros(int(count.sum()), EVENT)
    trades = out[start[traded]]
    trades["action"], trades["side"] = TRADE, np.where(kind[traded] == 6, 0, -side[traded])
    out[start[traded]] = trades
    changes = out[(start + traded)[book]]
    changes["action"] = np.where(kind[book] == 1, ADD, CANCEL)
    changes["side"], changes["order_id"], changes["flags"] = side[book], owner[book], F_LAST
    out[(start + traded)[book]] = changes
    row = np.repeat(np.arange(len(kind)), count)
    out["ts_event"], out["price"], out["size"], out["sequence"] = ts[row], price[row] * PRICE, size[row] * SCALE, row + 1
    out["ts_init"] = out["ts_event"]
    out = np.concatenate([seed, out])
    move(out, np.full(1, -(2**63)), np.full(1, -(2**63)))
    return out, [equity(symbol)]


def equity(symbol: str) -> Instrument:
    """A Nasdaq equity as LOBSTER has it."""
    return Instrument(f"{symbol}.XNAS", SCALE // 100, SCALE, 1.0, "USD", "09:30-16:00 America/New_York", price_precision=2, kind="equity")


def _level_id(price: NDArray[Any], side: NDArray[Any]) -> NDArray[np.uint64]:
    """The id of the order that stands for all orders at a price that were there before; venues count from 1, so the top bit is free."""
    return (1 << 63 | price.astype(np.uint64) << np.uint64(1) | (side < 0)).astype(np.uint64)


def _book(path: Path) -> NDArray[np.int64]:
    """An order book file as int64 (rows, levels, 2 (ask, bid), 2 (price, size))."""
    table = _table(path, None, None)
    if table.num_columns % 4 or not all(pa.types.is_integer(t) for t in table.schema.types):
        raise InputError(f"{path} is not a LOBSTER order book file ({table.num_columns} columns): download it again")
    return np.stack([c.to_numpy() for c in table.columns], 1).astype(np.int64).reshape(len(table), -1, 2, 2)


def _seed(path: Path, ts: int) -> NDArray[Any]:
    """The first row of an order book file (ask price, ask size, bid price, bid size, ...) as a snapshot at `ts`."""
    levels = _book(path)[0].reshape(-1, 2)
    side = np.tile(np.array([-1, 1], np.int8), len(levels) // 2)
    there = (abs(levels[:, 0]) != NO_LEVEL) & (levels[:, 1] > 0)
    levels, side = levels[there], side[there]
    out = np.zeros(len(levels) + 1, EVENT)
    out["ts_event"] = out["ts_init"] = ts
    out["action"], out["flags"] = ADD, F_SNAPSHOT
    out["action"][0] = CLEAR
    out["price"][1:], out["size"][1:], out["side"][1:] = levels[:, 0] * PRICE, levels[:, 1] * SCALE, side
    out["order_id"][1:] = _level_id(levels[:, 0], side)
    return out


def read_levels(message_path: Path, orderbook_path: Path, symbol: str | None = None, date: str | None = None) -> NDArray[Any] | None:
    """The events of a day as its order book file has them row by row: level updates (F_MBP; of the best ten), or quotes (F_TOB) where the
    file has one level, and the trades of the messages; EVENT (n,) in file order. None where the files do not have a row for each other.

    Messages of a file of n levels tell nothing of orders deeper than n, not even that they are gone, so that a book built from them goes
    stale as it moves; this does not. Order ids are 0. Raises InputError as :func:`read_lobster`.
    """
    ts, kind, _, size, price, side = _messages(message_path, symbol, date)[2:]
    book = _book(orderbook_path)
    if len(book) != len(ts):
        return None
    levels = min(book.shape[1], 10)
    prices, sizes = book[:, :levels, ::-1, 0] * PRICE, book[:, :levels, ::-1, 1]  # ask, bid -> bid, ask
    sizes = np.where(abs(book[:, :levels, ::-1, 0]) == NO_LEVEL, 0, sizes)
    heads = np.zeros(len(ts), HEAD)
    heads["ts_event"] = heads["ts_recv"] = ts
    heads["action"] = np.where(np.isin(kind, (4, 5, 6)) & (size > 0), TRADE, ADD)
    heads["side"] = np.where(kind > 5, ord("N"), np.where(side < 0, ord("B"), ord("A")))
    heads["price"], heads["size"], heads["sequence"], heads["flags"] = price * PRICE, size, np.arange(len(ts)) + 1, F_LAST
    spans = np.zeros(1, np.int64), np.full(1, -(2**63)), np.full(1, 2**63 - 1), np.zeros(1, np.int64)
    states, out = np.zeros((1, STATE), np.int64), []
    for at in range(0, len(ts), 16_384):
        cut = slice(at, at + 16_384)
        rows = np.empty((2 + 4 * levels) * len(ts[cut]), EVENT)
        where = np.empty(len(rows), np.int64)
        mode = QUOTES if levels == 1 else LEVELS
        arrays = heads[cut], np.ascontiguousarray(prices[cut]), np.ascontiguousarray(sizes[cut])
        n, _, _ = convert(*arrays, mode, *spans, states, rows, where)
        out.append(rows[:n].copy())
    return np.concatenate(out)


# --- import -----------------------------------------------------------------------------------------------------------------------------

_HALTS: Final = {-1: ("HALT", HALTED), 0: ("QUOTING", AUCTION), 1: ("TRADING", OPEN)}  # by the price of a message of type 7


def is_lobster(path: Path) -> bool:
    """Whether a file's name is that of a LOBSTER file."""
    return re.search(r"_(message|orderbook)_\d+\.csv(\.zst)?$", path.name) is not None


def _day_of(path: Path) -> tuple[str, str]:
    m = NAME.fullmatch(path.name)
    return (m["symbol"], m["date"]) if m else (path.name, "")


class Day:
    """One message file as a source of :func:`catalog.importer.make`; `seed` is its order book file or None."""

    dataset, raw_symbols, empty = "XNAS", True, True

    def __init__(self, path: Path, seed: Path | None) -> None:
        m = NAME.fullmatch(path.name)
        if m is None or m[3] != "message":
            like = "AAPL_2012-06-21_34200000_57600000_message_10.csv"
            raise InputError(f"{path.name} does not tell symbol and date: name it like {like}")
        if not path.is_file():
            raise InputError(f"{path} does not exist: check the path")
        self.path, self.seed, self.symbol, self.date = path, seed, m["symbol"], m["date"]
        self.size, self.read, self.spans = path.stat().st_size, 0, [Span(0, m["symbol"])]

    def blocks(self, resolve: Callable[[str, int, NDArray[Any]], int]) -> Iterator[Block]:
        index = resolve(self.symbol, 0, np.empty(0, MBO))
        if index < 0:
            return
        events = read_levels(self.path, self.seed, self.symbol, self.date) if self.seed else None
        if events is None:
            events, _ = read_lobster(self.path, self.seed)
        events["instrument"] = index
        for at in range(0, len(events), 65_536):
            rows = events[at : at + 65_536]
            self.read = self.size * (at + len(rows)) // len(events)
            yield Block(rows, np.maximum(rows["sequence"].astype(np.int64) - 1, 0))

    def states(self) -> list[Status]:
        """Trading halts and resumptions (messages of type 7)."""
        ts, kind, _, _, price, _ = _messages(self.path)[2:]
        found = np.flatnonzero((kind == 7) & np.isin(price, list(_HALTS)))
        return [Status(self.symbol, int(ts[n]), int(ts[n]), *_HALTS[int(price[n])]) for n in found]


def import_lobster(
    files: Sequence[str | Path],
    out: str | Path | None = None,
    instruments_toml: str | Path | None = None,
    symbols: Sequence[str] | None = None,
    start: int | None = None,
    end: int | None = None,
) -> Any:
    """Import LOBSTER days (message files; any number of symbols) into one catalog: :class:`catalog.importer.CatalogInfo`.

    With the order book file of a day (one among `files`, or beside the message file) its levels are imported (:func:`read_levels`), or,
    where it has another number of rows, the orders of the messages after its first row; without one, the orders of the messages.
    Halts (messages of type 7) become Nautilus's InstrumentStatus. Without a TOML file an instrument is an equity of XNAS with the tick
    0.01 and the session 09:30-16:00 in New York. Other parameters and errors as :func:`catalog.databento.import_dbn`.
    """
    from catalog import importer

    paths = [Path(f).resolve() for f in files]
    if other := [p for p in paths if not is_lobster(p)]:
        raise InputError(f"{other[0]} is no LOBSTER file, others are: import them apart")
    books = {_day_of(p): p for p in paths if "_orderbook_" in p.name}
    days = []
    for p in paths:
        if "_message_" in p.name:
            near = p.with_name(p.name.replace("_message_", "_orderbook_"))
            days.append(Day(p, books.get(_day_of(p)) or (near if near.is_file() else None)))
    if not days:
        raise InputError(f"{paths[0]} holds order books alone: name the message file too")
    days.sort(key=lambda d: (d.date, d.symbol))
    plain = {d.symbol: equity(d.symbol) for d in days}
    described = {i.id.rsplit(".", 1)[0]: i for i in read_instruments_toml(instruments_toml, plain.values())} if instruments_toml else {}
    known = {symbol: Definition(described.get(symbol, i), symbol) for symbol, i in plain.items()}
    hashes = importer.hash_files([d.path for d in days], [d.seed for d in days if d.seed])
    key = {
        "importer": importer.VERSION,
        "sources": [hashes[d.path] for d in days],
        "seeds": [hashes[d.seed] if d.seed else None for d in days],
        "described": hashlib.sha256(repr(sorted(described.items())).encode()).hexdigest() if described else None,
        "symbols": sorted(symbols) if symbols is not None else None,
        "start": start,
        "end": end,
    }
    root = Path(out) if out else importer.STORE / importer.name_of(days[0].path, key)
    if (found := importer.finished(root, key)) is not None:
        return found
    states = [s for d in days for s in d.states()]
    return importer.make(root, key, days, hashes, known, symbols, start, end, states, {"schema": "lobster"})
