"""Whatever tells events of a market -> a NautilusTrader Parquet catalog, in bounded memory.

:func:`make` takes sources (DBN files, LOBSTER days) in order of time, keeps the venue's order through Nautilus's sorting, writes what
Nautilus's book can follow, and gives :class:`CatalogInfo`. The catalog is made in a temporary sibling folder and renamed when it is whole;
its `cift.json` tells the sources, so that the same import is found again instead of made twice.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from catalog import parquet, rolls, status
from catalog.dbn import Block, Span
from catalog.definitions import Definition, inferred, toml
from catalog.errors import InputError
from catalog.events import CLEAR, EVENT, F_LAST, F_MBP, F_SNAPSHOT, F_TOB, KINDS, TRADE, Instrument, move, text
from catalog.parquet import DELTAS, QUOTES, TRADES, iso
from catalog.progress import Steps
from catalog.quality import Checker, First
from catalog.whole import STORE as STORE
from catalog.writer import Writer

Array = NDArray[Any]
VERSION: Final = 5  # of what this module writes: a catalog of another version is not reused
HELD: Final = 2_000_000  # rows that all writers may hold together
_LOWEST: Final = -(2**63)


class Source(Protocol):
    """One file of events. `spans`: what its instrument ids mean; `read`: bytes taken so far; `raw_symbols`: symbols are the venue's own;
    `empty`: its books begin empty, whatever came before."""

    path: Path
    size: int
    read: int
    dataset: str
    spans: list[Span]
    empty: bool

    @property
    def raw_symbols(self) -> bool: ...

    def blocks(self, resolve: Callable[[str, int, Array], int]) -> Iterator[Block]: ...


@dataclass(frozen=True, slots=True)
class CatalogInfo:
    """A finished catalog: `counts` of rows by data type; `moved`: rows whose `ts_init` was moved to keep the venue's order, of which
    `moved_trades` because they follow a book change of the same stamp; `closed`: venue events cut because they span two stamps;
    `quality` as in :class:`catalog.quality.Quality`; `reused`: it was there already."""

    root: Path
    instruments: tuple[Instrument, ...]
    counts: dict[str, int]
    moved: int
    moved_trades: int
    closed: int
    quality: dict[str, int]
    first: dict[str, First]
    reused: bool = False


def make(
    root: Path,
    key: dict[str, Any],
    sources: Sequence[Source],
    hashes: Mapping[Path, str],
    known: dict[str, Definition],
    symbols: Sequence[str] | None = None,
    start: int | None = None,
    end: int | None = None,
    states: Iterable[status.Status] = (),
    notes: Mapping[str, Any] | None = None,
    spreads: Mapping[str, int] | None = None,
) -> CatalogInfo:
    """The catalog at `root` of `sources`, which are in order of time; `key` identifies it. `known`: definitions by symbol; `states`: what
    status records tell; `notes` go into `cift.json`; `spreads`: instrument ids by symbol of what is passed over (spreads and options).

    Raises InputError for sources without events, unknown symbols, missing definitions, prices off the tick, files that overlap in time,
    and a full disk.
    """
    states = list(states)
    with _temporary(root) as temporary:
        job = _Import(temporary, known, symbols, start, end, spreads or {}, status.by_symbol(states))
        job.early(sources)
        try:
            with Steps("import", sum(f.size for f in sources), "bytes") as steps:
                for file in sources:
                    job.read(file, steps)
            info = job.finish()
            if job.passed:
                print(f"spreads and options are not read, passed over: {', '.join([*job.passed][:8])}", file=sys.stderr)
        except BaseException:
            job.abandon()
            raise
        told = status.write(temporary, states, {d.symbol: d.instrument.id for d in job.definitions}, job.start, job.end)
        document = {
            "key": key,
            "sources": {str(f.path): hashes[f.path] for f in sources},
            "counts": info.counts,
            "moved": info.moved,
            "moved_trades": info.moved_trades,
            "closed": info.closed,
            "quality": info.quality,
            "first": info.first,
            "status_records": told,
            "rolls": rolls.schedule(temporary),
            "spreads": list(job.passed),
            **(notes or {}),
            "versions": {p: version(p) for p in ("databento", "nautilus_trader", "pyarrow", "numpy")},
        }
        with (temporary / "cift.json").open("w") as file_:
            json.dump(document, file_, indent=1)
    return finished(root, key, reused=False) or info


def hash_files(*groups: Sequence[Path]) -> dict[Path, str]:
    paths = [p for g in groups for p in g]
    found = {}
    with Steps("checksums", sum(p.stat().st_size for p in paths), "bytes") as steps:
        for path in paths:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while data := file.read(1 << 20):
                    digest.update(data)
                    steps.advance(len(data))
            found[path] = digest.hexdigest()
    return found


def name_of(path: Path, key: dict[str, Any]) -> str:
    return f"{path.name.split('.')[0]}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]}"


def finished(root: Path, key: dict[str, Any], reused: bool = True) -> CatalogInfo | None:
    """The import that lies at `root`, None when nothing does. Raises InputError when something else is there."""
    note = root / "cift.json"
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return None
    try:
        found = json.loads(note.read_text()) if note.is_file() else {}
        if not found or found["key"] != json.loads(json.dumps(key)):
            raise InputError(f"{root} holds {'another import' if found else 'something else'}: choose another folder or remove it")
        first = {k: First(*place) for k, place in found["first"].items()}
        parts = parquet.contents(root)
        levels = {p.id: 1 for p in parts} | {p.id: p.level for p in parts if p.type == DELTAS}
        return CatalogInfo(
            root,
            tuple(replace(i, level=levels.get(i.id, i.level)) for i in parquet.read_instruments(root).values()),
            found["counts"],
            found["moved"],
            found["moved_trades"],
            found["closed"],
            found["quality"],
            first,
            reused,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{note} is damaged ({e}): remove {root} and import again") from None


@contextlib.contextmanager
def _temporary(root: Path) -> Iterator[Path]:
    """A folder beside `root` that becomes `root` when all went well and vanishes otherwise."""
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        for old in root.parent.glob(f".{root.name}.partial-*"):
            if not _alive(old.name.rsplit("-", 1)[1]):
                shutil.rmtree(old, ignore_errors=True)
        folder = root.parent / f".{root.name}.partial-{os.getpid()}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    except OSError as e:
        raise _disk(e, root) from None
    try:
        yield folder
        _sync(folder)
        if root.is_dir():
            root.rmdir()
        folder.rename(root)
    except OSError as e:
        raise _disk(e, root) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync(folder: Path) -> None:
    """What lies below `folder` is on the disk, so that its new name never stands for less."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):
        return True
    return True


def _disk(e: OSError, root: Path) -> Exception:
    if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return InputError(f"the disk is full while writing {root}: free some space or choose another folder, and import again")
    if e.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR) or any(p.is_file() for p in root.parents):
        return InputError(f"cannot write {root} ({e.strerror}): choose another folder or change its rights")
    if e.errno in (errno.ENOTEMPTY, errno.EEXIST):
        return InputError(f"{root} appeared while it was being made: import again")
    return e


# --- the import -----------------------------------------------------------------------------------------------------------------------


class _Import:
    """State of one import: instrument table, order of stamps, quality and three writers per instrument."""

    def __init__(
        self, root: Path, known: dict[str, Definition], symbols: Sequence[str] | None, start: int | None, end: int | None,
        spreads: Mapping[str, int], steps: Mapping[str, status.Steps],
    ) -> None:  # fmt: skip
        self.root, self.known, self.spreads, self.passed, self.steps = root, known, spreads, dict[str, None](), steps
        self.wanted = set(symbols) if symbols is not None else None
        self.start, self.end = _LOWEST if start is None else start, 2**63 - 1 if end is None else end
        self.definitions: list[Definition] = []
        self.instruments: list[Instrument] = []
        self.index: dict[str, int] = {}
        self.seen: set[str] = set()
        self.checker = Checker(self.instruments)
        self.writers: list[tuple[Writer, Writer, Writer]] = []
        self.held: dict[int, Array] = {}  # the last delta of an instrument, until it is known whether its venue event goes on
        self.last, self.book, self.raw = (np.full(0, _LOWEST, np.int64) for _ in range(3))
        self.moved = self.moved_trades = self.closed = 0
        self.file: Source | None = None

    def early(self, sources: Sequence[Source]) -> None:
        """Refuse a symbol that no file can hold before any of them is read."""
        if self.wanted is None or not all(f.raw_symbols and f.spans for f in sources):
            return
        held = {s.symbol for f in sources for s in f.spans} | set(self.known) | {d.instrument.id for d in self.known.values()}
        if unknown := sorted(w for w in self.wanted if w not in held and w.rsplit(".", 1)[0] not in held):
            there = sorted({s.symbol for f in sources for s in f.spans})
            raise InputError(f"no file holds {unknown[0]}; they hold {', '.join(there[:12])}")

    def read(self, file: Source, steps: Steps) -> None:
        self.file, self.checker.file = file, file.path.name
        done, rows, before = 0, 0, self.raw.copy()
        self.met = np.zeros(len(before), np.bool_)
        for block in file.blocks(self._resolve):
            rows += len(block.events)
            self._add(block, before)
            steps.advance(file.read - done)
            done = file.read
        steps.advance(file.size - done)
        if not rows and self.wanted is None:
            raise InputError(f"{file.path} holds no events: choose a longer range")

    def _resolve(self, symbol: str, number: int, raw: Array) -> int:
        """Index of the symbol's instrument, made at its first record."""
        assert self.file is not None
        self.seen.add(symbol)
        d = self.known.get(symbol)
        if d is None and (not self.file.raw_symbols or symbol == str(number)):
            d = next((k for k in self.known.values() if k.number == number), None)
        mine = raw[raw["instrument_id"] == number]
        name = (d.instrument if d else inferred(symbol, mine, self.file.dataset)).id
        if self.wanted is not None and not self.wanted & {symbol, name}:
            return -2
        if d is None and (symbol in self.spreads or (symbol == str(number) and number in self.spreads.values())):
            if self.wanted is not None:
                raise InputError(f"{symbol} is a spread or an option, which is not read: name others with --symbols")
            self.passed[symbol] = None
            return -2
        if d is None:
            raise self._undefined(symbol, raw)
        if d.instrument.id not in self.index:
            if len(self.instruments) == 65_535:
                raise InputError(f"{self.file.path} has more than 65,535 instruments: name the ones that are wanted with --symbols")
            self.index[d.instrument.id] = len(self.instruments)
            self.definitions.append(d)
            shut = status.shut(self.steps[d.symbol]) if d.symbol in self.steps else ()
            self.instruments.append(replace(d.instrument, pauses=tuple(shut)))
            self.writers.append(tuple(Writer(self.root, kind, d.instrument) for kind in (DELTAS, TRADES, QUOTES)))  # type: ignore[arg-type]
            self.last, self.book, self.raw = (np.append(a, _LOWEST) for a in (self.last, self.book, self.raw))
        return self.index[d.instrument.id]

    def _undefined(self, symbol: str, raw: Array) -> InputError:
        assert self.file is not None
        present = {int(n) for n in np.unique(raw["instrument_id"])}
        spans = {s.symbol: s.number for s in self.file.spans if s.number in present}
        missing = {symbol: None} | {s: None for s in spans if s not in self.known and (self.wanted is None or s in self.wanted)}
        lines = [
            toml(inferred(s, raw[raw["instrument_id"] == spans[s]] if s in spans else raw, self.file.dataset)) for s in list(missing)[:20]
        ]
        return InputError(
            f"{self.file.path} has no definition of {', '.join(list(missing)[:5])}: put its definition file beside it, or write this to "
            "instruments.toml, check each value (tick is inferred, multiplier is not known), and add --instruments instruments.toml\n"
            f"instrument = [{', '.join(lines)}]"
        )

    def _add(self, block: Block, before: Array) -> None:
        assert self.file is not None
        events, records = block.events, block.records
        inside = (events["ts_init"] >= self.start) & (events["ts_init"] <= self.end)
        if not inside.all():
            events, records = events[inside], records[inside]
        if not len(events):
            return
        self._overlap(events, before)
        events, records = self._renewed(events, records)
        self.checker.update(events, records, rewrite=True)
        if (hit := self.checker.found("off_tick")) is not None:
            self._off_tick(hit, block)
        events = events[events["action"] != 0]
        trades = events["action"] == TRADE
        ticks = np.array([i.tick for i in self.instruments])[events["instrument"]]
        if np.any(rough := trades & (events["price"] % ticks != 0)):
            events["price"][rough] = (events["price"][rough] + ticks[rough] // 2) // ticks[rough] * ticks[rough]
        np.maximum.at(self.raw, events["instrument"], events["ts_init"])
        moved, moved_trades = move(events, self.last, self.book)
        self.moved += moved
        self.moved_trades += moved_trades
        quotes = ~trades & (events["flags"] & F_TOB > 0)
        for k in np.unique(events["instrument"]):
            mine = events["instrument"] == k
            self.writers[k][1].add(events[mine & trades])
            self.writers[k][2].add(events[mine & quotes])
            self._deltas(int(k), events[mine & ~trades & ~quotes])
        self._relieve()

    def _renewed(self, events: Array, records: Array) -> tuple[Array, Array]:
        """With a clear where a further file of an instrument begins with an empty book or a snapshot: what was there before is gone."""
        assert self.file is not None
        for k in np.flatnonzero(~self.met):
            mine = np.flatnonzero(events["instrument"] == k)
            if len(mine):
                self.met[k], first = True, events[mine[0]]
                orders = first["action"] != CLEAR and not first["flags"] & (F_MBP | F_TOB)
                if orders and (first["flags"] & F_SNAPSHOT or self.file.empty):
                    clear = np.zeros(1, EVENT)
                    for name in ("ts_event", "ts_init", "sequence", "instrument"):
                        clear[name] = first[name]
                    clear["action"], clear["flags"] = CLEAR, F_SNAPSHOT
                    events, records = np.insert(events, mine[0], clear), np.insert(records, mine[0], records[mine[0]])
        return events, records

    def _overlap(self, events: Array, before: Array) -> None:
        known = events["instrument"] < len(before)
        if np.any(late := events["ts_init"][known] < before[events["instrument"][known]]):
            row = events[known][np.argmax(late)]
            assert self.file is not None
            raise InputError(
                f"{self.file.path} has {self.instruments[row['instrument']].id} at {iso(int(row['ts_init']))}, but the file before it ends "
                f"at {iso(int(before[row['instrument']]))}: leave out one of the files that overlap"
            )

    def _off_tick(self, hit: tuple[int, int, int], block: Block) -> None:
        assert self.file is not None
        k, record, ts = hit
        price = int(block.events["price"][np.searchsorted(block.records, record)])
        i = self.instruments[k]
        raise InputError(
            f"{self.file.path}, record {record:,} ({iso(ts)}): the price {text(price)} of {i.id} is no multiple of its tick "
            f"{text(i.tick)}: correct the tick of the definition"
        )

    def _deltas(self, k: int, deltas: Array) -> None:
        """Hand deltas on, each group of one stamp ended by F_LAST; the last row waits until the next one tells."""
        rows = np.concatenate([self.held.pop(k), deltas]) if k in self.held else deltas
        if not len(rows):
            return
        cut = ((rows["flags"][:-1] & F_LAST) == 0) & (rows["ts_init"][1:] != rows["ts_init"][:-1])
        rows["flags"][:-1][cut] |= F_LAST
        self.closed += int(cut.sum())
        if not rows[-1]["flags"] & F_LAST:
            self.held[k] = rows[-1:].copy()
            rows = rows[:-1]
        self.writers[k][0].add(rows)

    def _relieve(self) -> None:
        pairs = [w for pair in self.writers for w in pair]
        total = sum(w.held for w in pairs)
        for w in sorted(pairs, key=lambda w: -w.held):
            if total <= HELD:
                break
            total -= w.held
            w.flush()

    def abandon(self) -> None:
        """Let go of all files."""
        for pair in self.writers:
            for w in pair:
                w.abandon()

    def finish(self) -> CatalogInfo:
        """Close all files, write the instruments."""
        if self.wanted is not None:
            ids = {i.id for i in self.instruments} | {i.id.rsplit(".", 1)[0] for i in self.instruments} | set(self.index) | self.seen
            if unknown := sorted(self.wanted - ids):
                raise InputError(f"no file holds {unknown[0]}; they hold {', '.join(sorted(self.seen)[:12])}")
        for k, rows in self.held.items():
            rows["flags"] |= F_LAST
            self.closed += 1
            self.writers[k][0].add(rows)
        counts = {kind: sum(w[n].rows for w in self.writers) for n, kind in enumerate((DELTAS, TRADES, QUOTES))}
        counts = {kind: n // (1 + (kind == QUOTES)) for kind, n in counts.items() if n or kind != QUOTES}
        if not any(counts.values()):
            raise InputError(f"no order or trade lies between {iso(self.start)} and {iso(self.end)}: choose another range or file")
        for pair in self.writers:
            for w in pair:
                w.close()
        full = [d for d, pair in zip(self.definitions, self.writers) if any(w.rows for w in pair)]
        _write_instruments(self.root, full)
        q = self.checker.result()
        instruments = tuple(d.instrument for d in full)
        return CatalogInfo(self.root, instruments, counts, self.moved, self.moved_trades, self.closed, q.counts, q.first)


# --- instruments for Nautilus ---------------------------------------------------------------------------------------------------------


def _write_instruments(root: Path, definitions: Sequence[Definition]) -> None:
    from nautilus_trader.persistence import ParquetDataCatalog

    objects = [nautilus_instrument(d) for d in definitions]
    try:
        ParquetDataCatalog(str(root.resolve())).write_instruments(objects)
    except Exception as e:
        if os.statvfs(root).f_bavail < 256 or "os error 28" in str(e) or "os error 27" in str(e):
            raise OSError(errno.ENOSPC, "no space left", str(root)) from None
        raise


def nautilus_instrument(d: Definition) -> Any:
    """The NautilusTrader instrument of a definition: FuturesContract, Equity, CurrencyPair or CryptoPerpetual by its kind.

    What Nautilus has no place for (session, fees, kind) lies in `info` under "cift". Raises InputError for what the type cannot hold.
    """
    from nautilus_trader import model as m

    i = d.instrument
    tick = m.Price.from_raw(i.tick * 10 ** (m.FIXED_PRECISION - 9), i.price_precision)
    info = {
        "cift": {
            "session": i.session, "kind": i.kind, "maker_fee": i.maker_fee, "taker_fee": i.taker_fee, "fee_per_unit": i.fee_per_unit
        }
    }  # fmt: skip

    def currency(code: str) -> Any:
        try:
            return m.Currency.from_str(code)
        except ValueError:
            raise InputError(f"{i.id}: {code} is no currency that NautilusTrader knows") from None

    common: dict[str, Any] = {
        "instrument_id": m.InstrumentId.from_str(i.id), "raw_symbol": m.Symbol(d.symbol), "price_precision": i.price_precision,
        "price_increment": tick, "ts_event": 0, "ts_init": 0, "info": info,
    }  # fmt: skip
    whole = f"{i.id}: a {i.kind} trades in whole units: lot must be 1, not {text(i.lot)}"
    if i.kind == "future":
        if i.size_precision:
            raise InputError(whole)
        return m.FuturesContract(
            **common, asset_class=m.AssetClass.INDEX, underlying=d.underlying or d.symbol, activation_ns=d.activation or 0,
            expiration_ns=d.expiration or parquet.FAR, currency=currency(i.currency), multiplier=m.Quantity.from_str(f"{i.multiplier:.9g}"),
            lot_size=m.Quantity.from_str(text(i.lot)), exchange=d.exchange or None,
        )  # fmt: skip
    if i.kind == "equity":
        if i.size_precision or i.multiplier != 1:
            raise InputError(whole if i.size_precision else f"{i.id}: an equity has the multiplier 1, not {i.multiplier}")
        return m.Equity(**common, currency=currency(i.currency))
    if i.kind not in KINDS:
        raise InputError(f"{i.id}: kind {i.kind} is none of {', '.join(KINDS)}")
    base = d.symbol.split("-")[0].removesuffix(i.currency).rstrip("/") or d.symbol
    pair: dict[str, Any] = common | {
        "base_currency": currency(base), "quote_currency": currency(i.currency), "size_precision": i.size_precision,
        "size_increment": m.Quantity.from_str(text(i.lot)), "multiplier": m.Quantity.from_str(f"{i.multiplier:.9g}"),
    }  # fmt: skip
    if i.kind == "currency_pair":
        return m.CurrencyPair(**pair)
    return m.CryptoPerpetual(**pair, settlement_currency=currency(i.currency), is_inverse=False)
