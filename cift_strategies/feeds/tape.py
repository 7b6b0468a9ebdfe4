"""What the gateway plays: the records of DBN files as they lie there, in one order, with the definitions that belong to them.

Takes files, gives :class:`Tape`: a stream of records for each schema, beside the symbols and when they hold. Records stay on disk and are
mapped into memory, so a tape is as long as the disk allows and any point of it is reached at once.
"""

from __future__ import annotations

import importlib
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from catalog.dbn import MBO, MBO_TYPE, SCHEMAS, Dbn, Span
from catalog.definitions import UNDEFINED_TIME, companion
from catalog.errors import InputError
from catalog.levels import HEAD, LAYOUTS
from cift_strategies.feeds import levels

Array = NDArray[Any]
STEP: Final = 8  # places in the order of all records from one record of a file to the next; what derives from it goes between
RANK: Final = {"definition": -4, "status": -3, "trades": 0, "mbo": 1, "mbp-1": 2, "tbbo": 3, "mbp-10": 4}
ASIDE: Final = ("definition", "status")  # small files beside the data: decoded, so that their version is ours
MULTIPLE: Final = {"mbo": levels.DERIVED}  # what can be made of a schema


@dataclass(frozen=True, slots=True)
class Stream:
    """Records of one schema in order. `place`: where each stands among the records of all schemas, ascending."""

    schema: str
    records: Array  # uint8 (n, size)
    ts: Array  # int64 (n,) ns UTC, never descending: the receive time
    place: Array  # int64 (n,)

    @property
    def numbers(self) -> Array:
        """The venue's instrument ids, uint32 (n,)."""
        return self.records[:, 4:8].view("<u4")[:, 0] if len(self.records) else np.empty(0, np.uint32)

    def before(self, place: int) -> int:
        """How many records stand before a place."""
        return int(np.searchsorted(self.place, place))


@dataclass(frozen=True, slots=True)
class Segment:
    """One file of the tape: its symbols hold from its first place on."""

    first: int
    spans: tuple[Span, ...]


class Tape:
    """Files of one dataset and schema in order of time, with their definition and status files (named or beside them).

    Raises InputError for files that cannot be read, of several datasets or schemas, or that overlap in time.
    """

    def __init__(self, files: Sequence[str | Path]) -> None:
        opened = [Dbn(Path(p)) for p in dict.fromkeys(Path(p).resolve() for p in files)]
        data = [f for f in opened if f.schema not in ASIDE]
        if not data:
            raise InputError("no file holds market data: name a Databento file of schema mbo, mbp-10, mbp-1 or trades")
        for f in data:
            if f.schema not in SCHEMAS:
                raise InputError(f"{f.path} holds {f.schema or 'several schemas'}, which the gateway does not play: name an mbo file")
        for what in ("dataset", "schema"):
            if len(found := {getattr(f, what) for f in data}) > 1:
                raise InputError(f"the files are of several {what}s ({', '.join(sorted(found))}): name the files of one")
        data.sort(key=lambda f: int(f.metadata.start or 0))
        self.dataset, self.schema = data[0].dataset, str(data[0].schema)
        self._held: list[IO[bytes]] = []
        self._lock = threading.Lock()
        records, counts = self._unpacked(data)
        ts = _received(records, MBO if self.schema == "mbo" else HEAD)
        starts = np.cumsum([0, *counts])
        for f, at, n in zip(data[1:], starts[1:], counts[1:]):
            if n and ts[at] < ts[at - 1]:
                raise InputError(f"{f.path} begins before the file before it ends: leave out one of the files that overlap")
        ts = np.maximum.accumulate(ts)
        place = np.arange(len(ts)) * STEP + RANK.get(self.schema, 1)
        self.base = Stream(self.schema, records, ts, place)
        self.segments = [Segment(int(at) * STEP - STEP // 2, tuple(f.spans)) for f, at in zip(data, starts)]
        self._streams = {self.schema: self.base}
        for kind in ASIDE:
            named = [f.path for f in opened if f.schema == kind]
            near = [p for f in data if (p := companion(f.path, kind)) is not None]
            self._streams[kind] = self._aside(kind, list(dict.fromkeys(p.resolve() for p in (*named, *near))))

    @property
    def first(self) -> int:
        """Receive time of the first record, ns UTC."""
        return int(self.base.ts[0])

    @property
    def last(self) -> int:
        return int(self.base.ts[-1])

    @property
    def end(self) -> int:
        """The place behind all records."""
        return len(self.base.ts) * STEP

    @property
    def schemas(self) -> tuple[str, ...]:
        """What can be subscribed: what the files hold and what derives from it."""
        return tuple(dict.fromkeys((*self._streams, *MULTIPLE.get(self.schema, ()))))

    @property
    def symbols(self) -> tuple[str, ...]:
        return tuple(sorted({s.symbol for g in self.segments for s in g.spans}))

    def stream(self, schema: str) -> Stream:
        """The records of a schema; derived ones are made when first asked for (takes a while: call it in a thread). KeyError: unknown."""
        if schema not in self.schemas:
            raise KeyError(schema)
        with self._lock:
            if schema not in self._streams:
                self._streams[schema] = self._derived(schema)
            return self._streams[schema]

    def at(self, ts: int) -> int:
        """The place of the first record at or after a time."""
        return int(np.searchsorted(self.base.ts, ts)) * STEP - STEP // 2

    def passed(self, ts: int) -> int:
        """The place behind all records up to a time, itself included."""
        return int(np.searchsorted(self.base.ts, ts, "right")) * STEP - STEP // 2 if ts < self.last else self.end

    def time(self, place: int) -> int:
        """The receive time of the last record before a place."""
        return int(self.base.ts[max(0, min(self.base.before(place), len(self.base.ts)) - 1)])

    def segment(self, place: int) -> tuple[Segment, int]:
        """The file that a place is in, and the place where the next one begins."""
        n = max(0, sum(g.first <= place for g in self.segments) - 1)
        return self.segments[n], self.segments[n + 1].first if n + 1 < len(self.segments) else self.end

    def close(self) -> None:
        for file in self._held:
            file.close()

    # --- from disk ----------------------------------------------------------------------------------------------------------------

    def _unpacked(self, data: Sequence[Dbn]) -> tuple[Array, list[int]]:
        """The records of all files as one mapping, and how many each holds."""
        layout = LAYOUTS.get(self.schema)
        rtype, size = (MBO_TYPE, MBO.itemsize) if layout is None else (layout.rtype, layout.size)
        file, counts = self._room(), []
        for f in data:
            if f.metadata.ts_out:
                raise InputError(f"{f.path} carries ts_out: ask Databento for the file without it")
            counts.append(0)
            for _, rows, _ in f.records(rtype, size):
                file.write(rows.tobytes())
                counts[-1] += len(rows)
        if not sum(counts):
            raise InputError(f"{data[0].path} holds no {self.schema} records")
        return _mapped(file, size), counts

    def _room(self) -> IO[bytes]:
        file = tempfile.TemporaryFile()  # noqa: SIM115
        self._held.append(file)
        return file

    def _aside(self, kind: str, paths: Sequence[Path]) -> Stream:
        data = np.frombuffer(b"".join(bytes(r) for p in paths for r in _decoded(p, kind)), np.uint8)
        records = data.reshape(-1, 4 * int(data[0]) if len(data) else 24)
        ts = _received(records, np.dtype([("_", "V8"), ("ts_event", "<u8"), ("ts_recv", "<u8")]))
        order = np.argsort(ts, kind="stable")
        place = np.searchsorted(self.base.ts, ts[order]) * STEP + RANK[kind]
        return Stream(kind, records[order], ts[order], place)

    def _derived(self, schema: str) -> Stream:
        file, origins = self._room(), []
        size = LAYOUTS[schema].size
        for records, rows in levels.derive(self.base.records, schema):
            file.write(records.tobytes())
            origins.append(rows)
        rows = np.concatenate([np.empty(0, np.int64), *origins])
        return Stream(schema, _mapped(file, size), self.base.ts[rows], rows * STEP + RANK[schema])


def _mapped(file: IO[bytes], size: int) -> Array:
    file.flush()
    n = file.tell() // size
    return np.memmap(file, np.uint8, "r", shape=(n, size)) if n else np.empty((0, size), np.uint8)


def _received(records: Array, kind: np.dtype[Any]) -> Array:
    head = np.ascontiguousarray(records[:, : kind.itemsize]).view(kind)[:, 0]
    ts = head["ts_recv"].copy()
    unknown = ts == UNDEFINED_TIME
    ts[unknown] = head["ts_event"][unknown]
    return ts.astype(np.int64)


def _decoded(path: Path, kind: str) -> Iterator[Any]:
    dbn: Any = importlib.import_module("databento_dbn")
    decoder = dbn.DBNDecoder(upgrade_policy=dbn.VersionUpgradePolicy.UPGRADE_TO_V3)
    wanted = {"definition": dbn.InstrumentDefMsg, "status": dbn.StatusMsg}[kind]
    for part in Dbn(path)._bytes():
        yield from (r for r in decoder.write_and_decode(part) if isinstance(r, wanted))
