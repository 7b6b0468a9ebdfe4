"""Databento's DBN files (versions 1, 2, 3; plain or zstd) as EVENT blocks, in bounded memory.

:class:`Dbn` is one file: its metadata, its symbols, its records; :func:`stream` gives its events, of orders (mbo) or of what
:mod:`catalog.levels` reads. A file that is cut short,
damaged or no DBN is refused by an InputError that names the record or the byte.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Final

import numba
import numpy as np
from numpy.typing import NDArray

from catalog import orders
from catalog.definitions import UNDEFINED_PRICE, UNDEFINED_TIME, Definition, beside, definition, inferred, tick_of
from catalog.errors import InputError
from catalog.events import EVENT, Instrument, canonical, decimals
from catalog.levels import LAYOUTS, SAMPLED, STATE, Layout, convert, parts, room, unassigned
from catalog.numbers import Numbers as Numbers
from catalog.numbers import Span as Span
from catalog.orders import MBO as MBO

Array = NDArray[Any]
CHUNK: Final = 1 << 16  # bytes of the file read at a time
PIECE: Final = 1 << 21  # bytes handed on at a time, once unpacked: about 37,000 records
MBO_TYPE, MAPPING_TYPE, DEFINITION_TYPE = 0xA0, 0x16, 0x13
_TYPES: Final = (0, 1, 10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18, *range(0x20, 0x25), 0xA0, 0xB1, 0xC0, 0xC1, 0xC2, 0xC3, 0xC4)


# --- bytes ----------------------------------------------------------------------------------------------------------------------------


def _unzipped(file: IO[bytes], path: Path) -> Iterator[tuple[bytes, int]]:
    """(bytes, compressed bytes that they took), all frames, with the proof that the last one is complete."""
    import zstandard

    frame, taken = None, 0
    while data := file.read(CHUNK):
        size = len(data)
        while data:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
            try:
                out = frame.decompress(data)
            except (zstandard.ZstdError, MemoryError) as e:
                raise InputError(f"{path} is damaged near byte {taken:,} ({e}): download it again") from None
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
            yield out, 0
        taken += size
        yield b"", size
    if frame is not None:
        raise InputError(f"{path} is cut short: its zstd frame does not end at byte {taken:,}: download it again")


def _plain(file: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    while data := file.read(PIECE):
        yield data, len(data)


@numba.njit(cache=True)
def _walk(data: Array, kind: Any, size: Any, known: Array, at: Array, others: Array) -> tuple[Any, Any, Any, Any, bool]:
    """Offsets of the records of type `kind` into `at`, of symbol mappings into `others`. Returns (kept, mappings, records, end, ok)."""
    n = m = records = 0
    pos: Any = 0
    while pos + 2 <= data.shape[0]:
        length = np.int64(data[pos]) * 4
        rtype = data[pos + 1]
        if length < 16 or not known[rtype] or (rtype == kind and length != size):
            return n, m, records, pos, False
        if pos + length > data.shape[0]:
            break
        if rtype == kind:
            at[n] = pos
            n += 1
        elif rtype == 0x16:
            others[m] = pos
            m += 1
        records += 1
        pos += length
    return n, m, records, pos, True


# --- one file -------------------------------------------------------------------------------------------------------------------------


class Dbn:
    """One DBN file. `schema` is "mbo", "definition", ... or None for a mixed file; `spans` the symbols of its metadata."""

    empty = False  # a day of a market that never sleeps goes on where the one before ended

    def __init__(self, path: Path) -> None:
        self.path = path
        self.read = 0  # bytes of the file taken so far
        try:
            self.size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(4)
        except OSError as e:
            raise InputError(f"cannot read {path}: {(e.strerror or str(e)).lower()}") from None
        if not self.size:
            raise InputError(f"{path} is empty: download it again")
        self._zipped = head[1:] == b"\xb5\x2f\xfd" or head[1:] == b"\x2a\x4d\x18"
        if not self._zipped and head[:3] != b"DBN":
            raise InputError(f"{path} is no DBN file (it begins with {head!r}): ask Databento for encoding dbn, not csv or json")
        self.metadata, self._skip = self._header()
        m = self.metadata
        self.schema: str | None = None if m.schema is None else str(m.schema)
        self.dataset = str(m.dataset)
        self.spans = self._spans()

    def _bytes(self) -> Iterator[bytes]:
        self.read = 0
        with self.path.open("rb") as file:
            for data, taken in _unzipped(file, self.path) if self._zipped else _plain(file):
                self.read += taken
                for at in range(0, len(data), PIECE):
                    yield data[at : at + PIECE]

    def _header(self) -> tuple[Any, int]:
        databento_dbn = importlib.import_module("databento_dbn")  # its stubs take an enum for an int

        data = b""
        for part in self._bytes():
            data += part
            if len(data) >= 8:
                if data[:3] != b"DBN":
                    raise InputError(f"{self.path} is compressed, but holds no DBN: ask Databento for encoding dbn")
                if not 1 <= data[3] <= 3:
                    raise InputError(f"{self.path} is DBN version {data[3]}; versions 1, 2 and 3 are read: convert the file")
                size = 8 + int.from_bytes(data[4:8], "little")
                if len(data) >= size:
                    try:
                        return databento_dbn.Metadata.decode(data[:size], databento_dbn.VersionUpgradePolicy.AS_IS), size
                    except BaseException as e:
                        if isinstance(e, (KeyboardInterrupt, SystemExit)):
                            raise
                        raise InputError(f"{self.path} has damaged metadata ({str(e)[:120]}): download it again") from None
        raise InputError(f"{self.path} is cut short within its metadata, at byte {len(data):,}: download it again")

    def _spans(self) -> list[Span]:
        spans = []
        try:
            for symbol, intervals in self.metadata.mappings.items():
                for i in intervals:
                    if i["symbol"]:
                        start, end = (int(np.datetime64(i[k], "ns").astype(np.int64)) for k in ("start_date", "end_date"))
                        spans.append(Span(int(i["symbol"]), symbol, start, end))
        except (ValueError, KeyError, TypeError, OverflowError) as e:
            if str(self.metadata.stype_out) != "instrument_id":
                raise InputError(f"{self.path} maps to {self.metadata.stype_out}: ask Databento for stype_out instrument_id") from None
            raise InputError(f"{self.path} has a damaged symbol table ({str(e)[:120]}): download it again") from None
        return spans

    @property
    def raw_symbols(self) -> bool:
        """Whether the metadata's symbols are the venue's own (and not numbers, roots or continuous contracts)."""
        return str(self.metadata.stype_in) == "raw_symbol"

    def begins(self) -> int:
        """`ts_init` of its first event (ns UTC); where its metadata begins, if it has none. Raises InputError as :meth:`blocks`."""
        first = next((int(b.events[0]["ts_init"]) for b in self.blocks(lambda *_: 0) if len(b.events)), None)
        return int(self.metadata.start or 0) if first is None else first

    def blocks(self, resolve: Callable[[str, int, Array], int]) -> Iterator[Block]:
        """Its events (see :class:`Events`)."""
        return iter(Events(self, resolve))

    def records(self, kind: int = MBO_TYPE, size: int = MBO.itemsize) -> Iterator[tuple[int, Array, list[Span]]]:
        """(number of its first record, records of type `kind` as bytes (n, size), symbol mappings met before them), piece by piece.

        Records of other types are passed over. Raises InputError for a record that is none and for a file that ends within one.
        """
        size += 8 * bool(self.metadata.ts_out)
        known = np.zeros(256, np.bool_)
        known[list(_TYPES)] = True
        left, number, skip = b"", 0, self._skip
        for part in self._bytes():
            if skip:
                part, skip = part[skip:], max(0, skip - len(part))
            data = np.frombuffer(left + part if left else part, np.uint8)
            if not len(data):
                continue
            at, others = np.empty(len(data) // 16 + 1, np.int64), np.empty(len(data) // 16 + 1, np.int64)
            n, m, count, end, ok = _walk(data, kind, size, known, at, others)
            if n or m:
                whole = n and at[n - 1] - at[0] == (n - 1) * size
                rows = data[at[0] :][: n * size].reshape(n, size) if whole else data[at[:n, None] + np.arange(size)]
                yield number, rows, [s for o in others[:m] if (s := _mapping(data[o:].tobytes())) is not None]
            if not ok:
                raise InputError(f"{self.path} is damaged at record {number + count:,}: download it again")
            number, left = number + count, data[end:].tobytes()
        if left:
            raise InputError(f"{self.path} is cut short within record {number:,}: download it again")
        if not number:
            raise InputError(f"{self.path} holds no records: choose a longer range")


def _mapping(record: bytes) -> Span | None:
    """A SymbolMappingMsg of DBN 1 (80 bytes) or of 2 and 3 (176 bytes)."""
    length = record[0] * 4
    number = int.from_bytes(record[4:8], "little")
    name = record[38:60] if length == 80 else record[89:160] if length == 176 else b""
    symbol = name.split(b"\0")[0].decode("ascii", "replace")
    return Span(number, symbol) if symbol else None


# --- events ---------------------------------------------------------------------------------------------------------------------------

SCHEMAS: Final = ("mbo", *LAYOUTS)
_WHY: Final = {1: "has no known action", 2: "has no known side", 3: "has no time"}


@dataclass(frozen=True, slots=True)
class Block:
    """EVENT rows in file order, and the number of the record that each came from."""

    events: Array
    records: Array


class Events:
    """The events of one file of a schema that is read (:data:`SCHEMAS`), block by block. `resolve(symbol, number, rows) -> index` names the
    instrument of a symbol met for the first time (`rows`: records at hand): an index into the caller's table, or -2 to pass it over.
    `bad(record, ts, sequence)` is told of each record that is no event, which is left out; without it such a record is an InputError.

    Raises InputError for a file of a schema that is not read.
    """

    def __init__(self, file: Dbn, resolve: Callable[[str, int, Array], int], bad: Callable[[int, int, int], None] | None = None) -> None:
        self.file, self._resolve, self._numbers, self._bad = file, resolve, Numbers(file.spans), bad
        self.schema = file.schema or _first_schema(file)
        if self.schema not in SCHEMAS:
            raise refused(file)

    def __iter__(self) -> Iterator[Block]:
        layout = LAYOUTS.get(self.schema)
        return self._orders() if layout is None else self._levels(layout)

    def _name(self, raw: Array, record: int) -> None:
        number = int(raw[record]["instrument_id"])
        for symbol in self._numbers.symbols(number):
            self._numbers.assign(symbol, number, self._resolve(symbol, number, raw))

    def _faulty(self, heads: Array, first: int, bad: int, why: int, any_action: bool = False) -> Array:
        """Which of the records `heads`, the first of them number `first`, are events; record `bad` is not, because of `why`."""
        if self._bad is None:
            raise InputError(f"{self.file.path} is damaged at record {first + bad:,}: it {_WHY[why]}; download it again")
        none, stamps = np.uint64(UNDEFINED_TIME), (heads["ts_recv"], heads["ts_event"])
        recv, event = (np.where(t == none, other, t) for t, other in zip(stamps, stamps[::-1]))
        sound = (any_action | np.isin(heads["action"], list(b"ACMTRFN"))) & np.isin(heads["side"], list(b"BAN"))
        sound &= (recv <= np.uint64(UNDEFINED_PRICE)) & (event <= np.uint64(UNDEFINED_PRICE))
        for i in np.flatnonzero(~sound):
            self._bad(first + int(i), min(int(recv[i]), UNDEFINED_PRICE), int(heads[i]["sequence"]))
        return sound

    def _orders(self) -> Iterator[Block]:
        for first, data, spans in self.file.records():
            if spans:
                self._numbers.learn(spans)
            raw = np.ascontiguousarray(data[:, : MBO.itemsize]).view(MBO)[:, 0]
            if not len(raw):
                continue
            out, where, record = np.empty(len(raw), EVENT), np.empty(len(raw), np.int64), np.arange(first, first + len(raw))
            while True:
                n, bad, why = orders.convert(raw, *self._numbers.arrays(), out, where)
                if bad < 0:
                    break
                if why == 4:
                    self._name(raw, bad)
                else:
                    sound = self._faulty(raw, first, bad, why)
                    raw, record = raw[sound], record[sound]
            yield Block(out[:n], record[where[:n]])

    def _levels(self, layout: Layout) -> Iterator[Block]:
        states = np.zeros((0, STATE), np.int64)
        for first, data, spans in self.file.records(layout.rtype, layout.size):
            if spans:
                self._numbers.learn(spans)
            if not len(data):
                continue
            heads, prices, sizes = parts(layout, data)
            record = np.arange(first, first + len(heads))
            while (unknown := unassigned(heads, *self._numbers.arrays())) >= 0:
                self._name(heads, unknown)
            arrays = self._numbers.arrays()
            more = max(0, int(arrays[3].max()) + 1 - len(states))
            states = np.concatenate([states, np.zeros((more, STATE), np.int64)])
            rows = len(heads) * room(layout)
            out, where = np.empty(rows, EVENT), np.empty(rows, np.int64)
            before = states.copy()
            n, bad, why = convert(heads, prices, sizes, layout.mode, *arrays, states, out, where)
            if bad >= 0:
                sound, states = self._faulty(heads, first, bad, why, layout.mode == SAMPLED), before
                heads, prices, sizes, record = heads[sound], prices[sound], sizes[sound], record[sound]
                n, _, _ = convert(heads, prices, sizes, layout.mode, *arrays, states, out, where)
            yield Block(out[:n].copy(), record[where[:n]])


def _first_schema(file: Dbn) -> str:
    """The schema of a mixed file (a live recording): that of its first record that tells events."""
    kinds = {MBO_TYPE: "mbo"} | {layout.rtype: name for name, layout in reversed(LAYOUTS.items())}
    skip = file._skip
    left = b""
    for part in file._bytes():
        part, skip = part[skip:], max(0, skip - len(part))
        data, pos = left + part, 0
        while pos + 2 <= len(data) and data[pos]:
            if data[pos + 1] in kinds:
                return kinds[data[pos + 1]]
            pos += 4 * data[pos]
        left = data[pos:]
    return "mbo"


# --- whole files ----------------------------------------------------------------------------------------------------------------------


def read_definitions(path: Path, passed: dict[str, int] | None = None) -> list[Definition]:
    """The instruments of one definition file, the newest record of each. Spreads and options are passed over; `passed` gets their
    instrument ids by symbol. Raises InputError for another schema or damage."""
    databento_dbn = importlib.import_module("databento_dbn")
    file = Dbn(path)
    if file.schema != "definition":
        raise InputError(f"{path} holds {file.schema}, not definitions")
    decoder = databento_dbn.DBNDecoder(upgrade_policy=databento_dbn.VersionUpgradePolicy.UPGRADE_TO_V3)
    found: dict[str, Definition] = {}
    try:
        for part in file._bytes():
            for record in decoder.write_and_decode(part):
                if isinstance(record, databento_dbn.InstrumentDefMsg):
                    if (d := definition(record, file.dataset)) is not None:
                        found[d.symbol] = d
                    elif passed is not None:
                        passed[str(record.raw_symbol)] = int(record.instrument_id)
    except (InputError, KeyboardInterrupt):
        raise
    except BaseException as e:
        raise InputError(f"{path} is damaged ({str(e)[:120]}): download it again") from None
    if decoder.buffer():
        raise InputError(f"{path} is cut short: download it again")
    return list(found.values())


def stream(
    path: Path, symbol: str | None = None, described: Sequence[Instrument] = (), bad: Callable[[int, int, int], None] | None = None
) -> tuple[list[Instrument], Iterator[Block]]:
    """The events of a file in file order, beside the instrument table, which grows as instruments are met.

    Instruments come from `described`, from the definition file beside `path`, or are guessed from the records at hand. `bad`: as of
    :class:`Events`.
    """
    file = Dbn(path)
    if file.schema not in (None, *SCHEMAS):
        raise refused(file)
    near = beside(path)
    defined = read_definitions(near) if near else []
    known = {d.symbol: d.instrument for d in defined}
    by_number = {d.number: d.instrument for d in defined}
    known |= {i.id.rsplit(".", 1)[0]: i for i in described}
    table: list[Instrument] = []
    seen: list[str] = []

    def resolve(name: str, number: int, raw: Array) -> int:
        seen.append(name)
        numbered = by_number.get(number) if not file.raw_symbols or name == str(number) else None
        found = known.get(name) or numbered or inferred(name, raw[raw["instrument_id"] == number], file.dataset)
        if symbol is not None and symbol not in (name, found.id):
            return -2
        if (index := next((k for k, i in enumerate(table) if i.id == found.id), None)) is not None:
            return index
        table.append(replace(found, level=LAYOUTS[events.schema].level if events.schema in LAYOUTS else 3))
        return len(table) - 1

    events = Events(file, resolve, bad)

    def blocks() -> Iterator[Block]:
        rows = 0
        for block in events:
            rows += len(block.events)
            yield block
        if not rows:
            names, kind = ", ".join(sorted(seen)[:12]), events.schema.upper()
            missing = f"has no events of {symbol}; it holds {names}" if symbol and seen else f"holds no {kind} records"
            raise InputError(f"{path} {missing}")

    return table, blocks()


def read_all(path: Path, symbol: str | None) -> tuple[Array, list[Instrument]]:
    """See :func:`catalog.events.read_dbn`."""
    table, blocks = stream(path, symbol)
    events = np.concatenate([b.events for b in blocks])
    for i, instrument in enumerate(table):
        if not instrument.currency:
            tick = tick_of(events["price"][(events["instrument"] == i) & (events["action"] != ord("R"))])
            table[i] = replace(instrument, tick=tick, price_precision=decimals(tick))
    return canonical(events), table


def refused(file: Dbn) -> InputError:
    """The error for a schema that tells no events."""
    if file.schema in ("definition", "status"):
        return InputError(f"{file.path} holds {file.schema} records and no market data: name a data file (mbo, mbp-10, mbp-1, ...) too")
    return InputError(f"{file.path} holds {file.schema}, which is not read (docs/data.md): ask Databento for schema mbo, mbp-10 or mbp-1")
