"""The event array that everything else reads, and its readers for DBN files and NautilusTrader Parquet catalogs.

Takes files, gives :data:`EVENT` arrays in canonical order beside the table of :class:`Instrument`. Reads with databento and
pyarrow; never imports nautilus_trader.
"""

from __future__ import annotations

import datetime as dt
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Final
from zoneinfo import ZoneInfo

import numba
import numpy as np
from numpy.typing import NDArray

from catalog.errors import InputError

SCALE: Final = 1_000_000_000  # prices and sizes are integers in units of 1e-9
PAUSE_NS: Final = 600 * SCALE  # without any event: the market is shut

EVENT: Final = np.dtype(
    [
        ("ts_event", np.int64),  # ns UTC, the venue's
        ("ts_init", np.int64),  # ns UTC, when it was known to us
        ("price", np.int64),  # 1e-9 units
        ("size", np.int64),  # 1e-9 units
        ("order_id", np.uint64),  # 0 where the venue has none
        ("sequence", np.uint64),  # 0 where unknown
        ("action", np.uint8),  # ASCII of A C M R T
        ("side", np.int8),  # +1 bid or buy aggressor, -1 ask or sell aggressor, 0 none
        ("flags", np.uint8),  # Databento's bits, below
        ("instrument", np.uint16),  # index into the instrument table
    ]
)

ADD: Final = ord("A")  # a new order; with F_MBP: the level now has this size; with F_TOB: the best level of this side is now this
CANCEL: Final = ord("C")  # reduces the order by `size` (0, or what is left or more: removes it); with F_MBP or F_TOB: removes the level
MODIFY: Final = ord("M")  # the order now has this price and size; with F_MBP and F_TOB as ADD
CLEAR: Final = ord("R")  # empties the book
TRADE: Final = ord("T")  # an execution; does not change the book

F_LAST: Final = 128  # last record of the venue's event
F_TOB: Final = 64  # an update of the best bid or offer (L1 feed), not an individual order
F_SNAPSHOT: Final = 32  # part of a snapshot
F_MBP: Final = 16  # an update of an aggregated price level (L2 feed), not an individual order
F_BAD_TS_RECV: Final = 8
F_MAYBE_BAD_BOOK: Final = 4


@dataclass(frozen=True, slots=True)
class Instrument:
    """One row of the instrument table; `EVENT["instrument"]` indexes the list of these."""

    id: str  # Nautilus instrument id, "ESH4.GLBX"
    tick: int  # price increment, 1e-9 units
    lot: int  # size increment, 1e-9 units
    multiplier: float  # currency per 1.0 of price and 1.0 of size
    currency: str  # of PnL and fees
    session: str | None = None  # "09:30-16:00 America/New_York"; None: trades around the clock
    price_precision: int = 2
    size_precision: int = 0
    kind: str = "future"  # future, equity, currency_pair, crypto_perpetual; of catalogs made elsewhere also others, "inverse_..."
    maker_fee: float = 0.0  # share of notional
    taker_fee: float = 0.0  # share of notional
    fee_per_unit: float = 0.0  # currency per 1.0 of size, on top
    level: int = 3  # deepest feed: 3 orders, 2 levels, 1 best bid and offer
    pauses: tuple[tuple[int, int], ...] = field(default=(), repr=False, compare=False)  # ns UTC, half open: see catalog.pauses


KINDS: Final = ("future", "equity", "currency_pair", "crypto_perpetual")
_DAY: Final = 86_400 * SCALE


@numba.njit(cache=True)
def move(events: NDArray[Any], last: NDArray[np.int64], book: NDArray[np.int64]) -> tuple[int, int]:
    """Move `ts_init` forward so that canonical order keeps the order of the rows. Changes `events` in place.

    Per instrument, with `p` the stamp of its previous row: ts_init = max(ts_init, p), and 1 ns more for a trade whose stamp
    a book change of the same instrument has taken before. `ts_event` is not touched.

    Parameters: `last` int64 (instruments,), newest stamp so far (start with the lowest int64); `book` int64 (instruments,), stamp
    of the newest book change. Both are advanced, so that a stream may be fed in pieces.
    Returns (rows moved, trades moved because of a book change of the same stamp).
    """
    moved = trades = 0
    for i in range(events.shape[0]):
        k = events[i]["instrument"]
        ts = events[i]["ts_init"]
        to = max(ts, last[k])
        if events[i]["action"] == TRADE:
            if book[k] == to:
                to += 1
                trades += 1
        else:
            book[k] = to
        last[k] = to
        if to != ts:
            events[i]["ts_init"] = to
            moved += 1
    return moved, trades


def canonical(events: NDArray[Any]) -> NDArray[Any]:
    """A copy of `events` (EVENT, rows in the venue's order within each instrument) in canonical order: by `ts_init`, at equal
    stamps trades first, then the order given. :func:`move` keeps each instrument's own order through that."""
    out = events.copy()
    n = int(out["instrument"].max()) + 1 if len(out) else 0
    lowest = np.full(n, np.iinfo(np.int64).min)
    move(out, lowest, lowest.copy())
    out = out[np.argsort(out["action"] != TRADE, kind="stable")]
    return out[np.argsort(out["ts_init"], kind="stable")]


def session_bounds(session: str | None, ts_ns: int) -> tuple[int, int]:
    """(open, close) in ns UTC of the session that holds `ts_ns` (open <= ts < close) or, outside of all, of the next one.

    `session` is "HH:MM-HH:MM Area/City", local time; a close at or before the open is on the following day; None is the UTC day.
    Raises InputError for a text of another form or an unknown time zone.
    """
    if session is None:
        start = ts_ns // _DAY * _DAY
        return start, start + _DAY
    opens, closes, zone = _session(session)
    seconds, ns = divmod(ts_ns, SCALE)
    day = dt.datetime.fromtimestamp(seconds, zone).date()
    for offset in (-1, 0, 1, 2):
        date = day + dt.timedelta(offset)
        a = int(dt.datetime.combine(date, opens, zone).timestamp()) * SCALE
        b = int(dt.datetime.combine(date + dt.timedelta(closes <= opens), closes, zone).timestamp()) * SCALE
        if b > seconds * SCALE + ns and b > a:
            return a, b
    raise AssertionError("no session within three days")


def _session(text: str) -> tuple[dt.time, dt.time, ZoneInfo]:
    m = re.fullmatch(r"(\d\d:\d\d)-(\d\d:\d\d) (\S+)", text)
    try:
        if m is None:
            raise ValueError
        return dt.time.fromisoformat(m[1]), dt.time.fromisoformat(m[2]), ZoneInfo(m[3])
    except (ValueError, OSError, KeyError):
        raise InputError(f'session "{text}" is not of the form "09:30-16:00 America/New_York"') from None


_TOML: Final = {  # key: (type, needed)
    "symbol": (str, True),
    "venue": (str, True),
    "kind": (str, True),
    "tick": (str, True),
    "lot": (str, False),
    "multiplier": (float, False),
    "currency": (str, True),
    "session": (str, False),
    "maker_fee": (float, False),
    "taker_fee": (float, False),
    "fee_per_unit": (float, False),
}


_SAME: Final = ("kind", "multiplier", "currency", "session", "maker_fee", "taker_fee", "fee_per_unit")  # of an Instrument too


def units(text: str) -> int:
    """A decimal text as an integer in units of 1e-9. Raises ValueError when it is no number or has more than 9 decimals."""
    try:
        scaled = Decimal(text) * SCALE
    except InvalidOperation:
        raise ValueError(f"{text} is no number") from None
    if not scaled.is_finite() or abs(scaled) >= 2**63:
        raise ValueError(f"{text} is no number of 64 bits in units of 1e-9")
    if scaled != int(scaled):
        raise ValueError(f"{text} has more than 9 decimals")
    return int(scaled)


def decimals(value: int) -> int:
    """Decimals needed to write `value` (1e-9 units) exactly: 250_000_000 -> 2."""
    return next(p for p in range(10) if value % 10 ** (9 - p) == 0)


def text(value: int) -> str:
    """`value` (1e-9 units) as the shortest exact decimal: 250_000_000 -> "0.25"."""
    return f"{Decimal(value) / SCALE:.{decimals(value)}f}"


def read_instruments_toml(path: str | Path, known: Iterable[Instrument] = ()) -> list[Instrument]:
    """Instruments described by hand, one `[[instrument]]` table each (example: docs/instruments/esh4.toml).

    symbol, venue, kind, tick and currency are needed; lot ("1"), multiplier (1.0), session (none), maker_fee, taker_fee (shares of
    notional) and fee_per_unit (currency per unit) are optional. tick and lot are texts, so that they are exact. Of an instrument in `known`
    symbol, venue and what is to be another are enough; a session "" is none.
    Raises InputError naming the file, the table and the key; unknown keys are errors.
    """
    path = Path(path)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"cannot read the instrument definitions {path}: {e.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise InputError(f"{path} is not valid TOML: {e}") from None
    tables = document.pop("instrument", None)
    if document or not isinstance(tables, list) or not tables:
        stray = f'unknown key "{next(iter(document))}"' if document else "no [[instrument]] table"
        raise InputError(f"{path}: {stray}; write one [[instrument]] table per instrument")
    defined = {i.id: i for i in known}
    found = [_from_toml(t, f"{path}, [[instrument]] {n}", defined) for n, t in enumerate(tables, 1)]
    ids = [i.id for i in found]
    if len(set(ids)) < len(ids):
        raise InputError(f"{path} describes {next(i for i in ids if ids.count(i) > 1)} twice: keep one")
    return found


def _from_toml(table: Any, where: str, known: Mapping[str, Instrument]) -> Instrument:
    if not isinstance(table, dict):
        raise InputError(f"{where} is no table")
    for key, value in table.items():
        if key not in _TOML:
            raise InputError(f'{where}: unknown key "{key}"; the keys are {", ".join(_TOML)}')
        kind = _TOML[key][0]
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise InputError(f"{where}: {key} must be a {'number' if kind is float else 'text in quotes'}")
    there = known.get(f"{table.get('symbol')}.{table.get('venue')}")
    if there is not None:
        table = {k: getattr(there, k) for k in _SAME} | {"tick": text(there.tick), "lot": text(there.lot)} | table
    if missing := [k for k, (_, needed) in _TOML.items() if needed and not table.get(k)]:
        raise InputError(f"{where}: {missing[0]} is missing")
    if table["kind"] not in KINDS and (there is None or table["kind"] != there.kind):
        raise InputError(f'{where}: kind "{table["kind"]}" is none of {", ".join(KINDS)}')
    try:
        tick, lot = units(table["tick"]), units(table.get("lot", "1"))
    except ValueError as e:
        raise InputError(f"{where}: {e}") from None
    multiplier = float(table.get("multiplier", 1.0))
    fees = {k: float(table.get(k, 0.0)) for k in ("maker_fee", "taker_fee", "fee_per_unit")}
    if tick <= 0 or lot <= 0 or not 0 < multiplier < float("inf"):
        raise InputError(f"{where}: tick, lot and multiplier must be above 0")
    if not all(abs(f) < float("inf") for f in fees.values()):
        raise InputError(f"{where}: fees must be finite numbers")
    session = table.get("session") or None
    if session is not None:
        _session(session)
    name = f"{table['symbol']}.{table['venue']}"
    return Instrument(
        name, tick, lot, multiplier, table["currency"], session, decimals(tick), decimals(lot), table["kind"],
        fees["maker_fee"], fees["taker_fee"], fees["fee_per_unit"],
    )  # fmt: skip


def read_dbn(path: str | Path, symbol: str | None = None) -> tuple[NDArray[Any], list[Instrument]]:
    """All events of one DBN file (plain or zstd; DBN 1, 2, 3) in canonical order, beside the table of its instruments.

    mbo gives orders; mbp-10 level updates (F_MBP: C, A, M by which the ten levels differ from the former ten, after an R at the first
    record) and trades; mbp-1, cmbp-1, tbbo, tcbbo quotes (F_TOB: bid, then ask, where one of them changed; C where a side is gone) and
    trades; bbo and cbbo quotes alone, stamped with the end of their interval; trades trades. In tbbo a quote comes before its trade,
    elsewhere after it.

    `symbol` (raw symbol or instrument id) picks one instrument. Definitions come from the file `*.definition.dbn*` beside it; an
    instrument without definition gets a tick inferred from its prices (greatest common divisor of their differences) and is marked by
    the empty `currency` (:func:`is_inferred`).
    The rows are the venue's: F and N records are left out, `flags` are as published, a C that takes a part of an order is a C.
    Raises InputError for a file that is damaged, incomplete or of a schema that is not read.
    """
    from catalog.dbn import read_all

    return read_all(Path(path), symbol)


def is_inferred(instrument: Instrument) -> bool:
    """Whether the instrument was guessed from its prices: then currency, multiplier, kind and session are unknown."""
    return not instrument.currency


def read_catalog(
    root: str | Path, instrument_ids: Sequence[str] | None = None, start: int | None = None, end: int | None = None
) -> tuple[list[Instrument], Iterator[NDArray[Any]]]:
    """The events of a NautilusTrader Parquet catalog in canonical order, as EVENT blocks of at most 65,536 rows, in bounded memory.

    `instrument_ids` (ids, or symbols where they are unambiguous; None: all, sorted) gives the table and the order at equal stamps:
    trades of all instruments, then their book changes. `start`, `end`: ns UTC, both inclusive, on `ts_init`.
    ADD, UPDATE, DELETE, CLEAR become A, M, C, R; order id 0 on A, M, C sets F_MBP (level feed). A trade carries order id, sequence and
    flags 0. Without deltas a quote becomes two rows, bid then ask: A with F_TOB (C where the size is 0), the ask with F_LAST too.
    Raises InputError for unknown ids, an empty range, a folder that is no catalog, a file that is damaged or of another version; damage
    inside a file shows when its part is read.
    """
    from catalog.parquet import read

    return read(Path(root), instrument_ids, start, end)


def trading_state(root: str | Path, instrument: str) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """When the market of an instrument id opened, closed, went into an auction or was halted: (`ts_init`, state), both (n,), ascending.

    A state (:mod:`catalog.status`: CLOSED 0, OPEN 1, AUCTION 2, HALTED 3) holds from its stamp (ns UTC) to the next; before the first, and
    in catalogs without status records (both arrays empty), it is not known. `catalog.status.at(steps, ts)` evaluates it.
    """
    from catalog.status import trading_state as read

    return read(Path(root), instrument)


def catalog_range(root: str | Path, instrument_ids: Sequence[str] | None = None) -> tuple[int, int]:
    """(first, last) `ts_init` in ns UTC of the catalog's deltas, trades and quotes, from Parquet metadata."""
    from catalog.parquet import contents

    parts = contents(Path(root), instrument_ids)
    return min(p.start for p in parts), max(p.end for p in parts)


def catalog_counts(root: str | Path, instrument_ids: Sequence[str] | None = None) -> dict[str, dict[str, int]]:
    """Rows by instrument id and data type ("order_book_deltas", "trades", "quotes"), from Parquet metadata."""
    from catalog.parquet import contents

    counts: dict[str, dict[str, int]] = {}
    for p in contents(Path(root), instrument_ids):
        counts.setdefault(p.id, {})[p.type] = counts.get(p.id, {}).get(p.type, 0) + p.rows
    return counts
