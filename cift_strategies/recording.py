"""A live session kept as it came: every event in the order received, beside what the node computed and did.

:class:`Recorder` hands events with digests of their features, deliveries of predictions, signals, orders and what was asked of the strategy
to threads that write them in parts. :class:`Votes`, in the models' process, keeps every prediction. :class:`Recording` reads such a folder
again; :func:`to_catalog` makes it a NautilusTrader catalog as well.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
from numba import njit
from numpy.typing import NDArray

from catalog.errors import InputError
from catalog.events import EVENT, F_TOB, TRADE, Instrument, move
from cift_strategies.parts import Parts, read

if TYPE_CHECKING:
    from cift_models.inference import Predictions

type Array = NDArray[Any]

MANIFEST: Final = "session.json"
BEGAN: Final = "began"  # folder with the journal that a session which goes on began with
VERSION: Final = 2  # since then a session can be told to the strategy again turn by turn
EVENTS: Final = pa.schema([
    *((name, pa.from_numpy_dtype(EVENT[name])) for name in EVENT.names or ()),
    ("came", pa.int64()),  # when the message that ends with the event came, ns by the wall; 0 within a message
    ("digest", pa.uint64()),  # of its feature row, see :func:`digests`
])  # fmt: skip
NOTES: Final = pa.schema([
    ("at", pa.int64()),  # events that had come by then
    ("wall", pa.int64()), ("now", pa.int64()),  # ns, by the wall and in the stream's time
    ("kind", pa.string()),  # prediction (delivered), alert, signal, order (an event of one), halt, release, flatten, status, reload; of an
    # account that goes on: begin (it is started), recover (an instrument is seen to)
    ("what", pa.string()),  # JSON
])  # fmt: skip


@njit(cache=True, nogil=True)
def digests(words: Array, out: Array) -> None:
    """Of each row of uint64 (n, m) a number that tells it from others: FNV-1a over words, mixed."""
    for i in range(words.shape[0]):
        h = np.uint64(14695981039346656037)
        for j in range(words.shape[1]):
            h = (h ^ words[i, j]) * np.uint64(1099511628211)
            h ^= h >> np.uint64(29)
        out[i] = h


def digested(rows: Array) -> NDArray[np.uint64]:
    """uint64 (n,) of rows (n, ...) of any numbers, by their bits."""
    flat = np.ascontiguousarray(rows).reshape(len(rows), -1).view(np.uint8)
    pad = -flat.shape[1] % 8
    words = (np.pad(flat, ((0, 0), (0, pad))) if pad else flat).view(np.uint64)
    out = np.empty(len(rows), np.uint64)
    digests(words, out)
    return out


def _events(events: Array, rows: Array, came: Array) -> pa.Table:
    columns = [pa.array(np.ascontiguousarray(events[name])) for name in EVENT.names or ()]
    return pa.Table.from_arrays([*columns, pa.array(came), pa.array(digested(rows))], schema=EVENTS)


def _notes(notes: Sequence[tuple[int, int, int, str, Any]]) -> pa.Table:
    at, wall, now, kind, what = zip(*notes)
    return pa.table([pa.array(c) for c in (at, wall, now, kind, map(json.dumps, what))], schema=NOTES)


class Witness:
    """Tells `note(kind, what)`, plain values, of what `system` decides and does: the same for a session and for its replay."""

    def __init__(self, system: Any, note: Callable[[str, Any], object]) -> None:
        self._strategy, self._note = system.strategy, note
        self._ids = [x.id for x in system.strategy.terms.instruments]
        system.strategy.witness = self.told

    def told(self, kind: str, what: Any) -> None:
        if kind == "order":
            what = self._order(*what)
        elif kind == "signal":
            what = {**asdict(what), "instrument": self._ids[what.instrument]}
        self._note(kind, what)

    def _order(self, kind: str, k: int, role: str, number: int, event: Any) -> dict[str, Any]:
        told: dict[str, Any] = {"event": kind, "instrument": self._ids[k], "role": role, "number": number}
        told["stamp"] = self._strategy.stamp(event.ts_event)
        trade = self._strategy.trades[k]
        told["signal"] = None if trade is None else trade.signal.predicted_at
        if kind == "OrderSubmitted" and (order := self._strategy.cache.order(event.client_order_id)) is not None:
            told |= {n: str(v) for n in ("side", "quantity", "price", "trigger_price") if (v := getattr(order, n, None)) is not None}
        told |= {n: str(v) for n in _TOLD.get(kind, ()) if (v := getattr(event, n, None)) is not None}
        return told


_TOLD: Final = {
    "OrderFilled": ("last_qty", "last_px", "liquidity_side", "commission"), "OrderUpdated": ("quantity", "price", "trigger_price"),
    **dict.fromkeys(("OrderRejected", "OrderDenied", "OrderCancelRejected", "OrderModifyRejected"), ("reason",)),
}  # fmt: skip


class Recorder:
    """Records `system` into `folder`, see :func:`set_aside`.

    `about` goes into the folder's manifest. Nothing here stops a session: where the disk is full recording ends, and `say` is told so.
    """

    def __init__(self, folder: Path, system: Any, about: Mapping[str, Any], say: Callable[[str], object]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._system, self._say = folder, system, say
        self._about = {**about, "version": VERSION, "began": time.time_ns()}
        self._stopped = self._closed = False
        _write(folder, self._about)
        digested(np.zeros((1, 1)))
        self._stream, self._log = Parts(folder / "events"), Parts(folder / "notes")
        self._noted: list[tuple[int, int, int, str, Any]] = []
        system.features.intake.keep(self._keep)
        self._now = system.strategy.now
        Witness(system, self.note)

    def note(self, kind: str, what: Any) -> None:
        self._noted.append((self._system.features.vectors, time.time_ns(), self._now(), kind, what))

    def reloaded(self, path: str, at: int) -> None:
        """New models decide from event number `at` on."""
        self.note("reload", (path, at))

    def _keep(self, events: Array, rows: Array, came: Array) -> None:
        self._check(self._stream.add(partial(_events, events, rows, came)))

    def flush(self) -> None:
        """Hand on what has come since; called twice a second, on the loop."""
        self._system.features.intake.hand_on()
        if self._noted:
            noted, self._noted = self._noted, []
            self._check(self._log.add(partial(_notes, noted)))

    def _check(self, kept: bool) -> None:
        if not kept and not self._stopped:
            self._stopped = True
            self._say(f"the session is not recorded any more: {self._stream.fault or self._log.fault}")

    def close(self, **told: Any) -> None:
        """The node has stopped: write the rest, and `told` into the manifest. Called again, it does nothing."""
        if self._closed:
            return
        self._closed = True
        self._system.features.intake.hand_on()
        self.flush()
        self._stream.close()
        self._log.close()
        fault = self._stream.fault or self._log.fault
        self._check(not fault)
        ended = {"ended": time.time_ns(), "events": self._system.features.vectors, "fault": fault}
        ended["recording_cpu_s"] = self._stream.cpu_s + self._log.cpu_s
        try:
            _write(self.folder, {**self._about, **ended, **told})
        except OSError as e:
            self._say(f"{self.folder / MANIFEST} cannot be written: {e.strerror}")


def set_aside(folder: Path) -> None:
    """Make room at `folder` for a new session: what an earlier one left there becomes `folder`-1, -2, ..."""
    if folder.exists():
        n = 1
        while (old := folder.with_name(f"{folder.name}-{n}")).exists():
            n += 1
        folder.rename(old)


def _write(folder: Path, manifest: Mapping[str, Any]) -> None:
    part = folder / f".{MANIFEST}.part"
    part.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    os.replace(part, folder / MANIFEST)


# --- in the models' process -----------------------------------------------------------------------------------------------------------


class Votes:
    """Keeps every prediction of a session: exact digests, and the numbers as float32."""

    def __init__(self, folder: Path) -> None:
        digested(np.zeros((1, 1)))
        self._parts = Parts(folder / "predictions")

    def push(self, first: int, closes: Array, p: Predictions, latency: Array, version: str) -> None:
        """Predictions of a block whose first event is number `first` of the stream; `latency` (m,) ns."""
        if len(p.ts):
            self._parts.add(partial(_votes, first, closes, p, latency, version))

    def close(self) -> None:
        self._parts.close()


def votes_digest(p: Predictions) -> NDArray[np.uint64]:
    """Of each prediction: what every member said, and the regime."""
    return digested(np.concatenate([p.votes.reshape(len(p.ts), -1), p.regime[:, None].astype(np.float32)], axis=1))


def mix_digest(p: Predictions) -> NDArray[np.uint64]:
    """Of each prediction: what the ensemble made of the votes."""
    parts = (p.proba, p.magnitude, p.confidence, p.direction.astype(np.float64))
    return digested(np.concatenate([a.reshape(len(p.ts), -1) for a in parts], axis=1))


def _votes(first: int, closes: Array, p: Predictions, latency: Array, version: str) -> pa.Table:
    m = len(p.ts)

    def lists(a: Array) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(a, np.float32).ravel()), a.size // m)

    return pa.table({
        "at": pa.array(first + closes), "instrument": pa.array(p.instrument), "ts": pa.array(p.ts), "latency_ns": pa.array(latency),
        "votes_digest": pa.array(votes_digest(p)), "mix_digest": pa.array(mix_digest(p)), "regime": pa.array(p.regime),
        "proba": lists(p.proba), "magnitude": lists(p.magnitude), "confidence": lists(p.confidence), "votes": lists(p.votes),
        "version": pa.array([version] * m).dictionary_encode(),
    })  # fmt: skip


# --- what was recorded ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chunk:
    """EVENT (n,) in the order received, whole messages; `ends` (k,) where each message ends (exclusive), `came` (k,) when each came, ns by
    the wall; digests (n,)."""

    events: Array
    ends: Array
    came: Array
    digests: NDArray[np.uint64]


class Recording:
    """A recorded session; `said` gets lines about what is missing. Raises InputError where `folder` holds none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder if (folder / MANIFEST).is_file() else folder / "session"
        try:
            self.manifest: dict[str, Any] = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            self.instruments = tuple(
                Instrument(**{**x, "pauses": tuple(map(tuple, x["pauses"]))}) for x in self.manifest["instruments"]
            )
        except OSError:
            raise InputError(f"{folder} holds no recorded session: name the --state of a live session, or its session folder") from None
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"{self.folder / MANIFEST} is damaged ({e})") from None
        self.said: list[str] = []
        if "ended" not in self.manifest:
            self.said.append("the session was cut off: what came in its last half second may be missing")
        elif self.manifest["fault"]:
            self.said.append(f"the recording is not whole: {self.manifest['fault']}")

    def stream(self) -> Iterator[Chunk]:
        """All events, a part at a time; events of a message that did not come whole are left out."""
        left = pa.table([pa.array([], f.type) for f in EVENTS], schema=EVENTS)
        for part in read(self.folder / "events", self.said):
            table = pa.concat_tables([left, part])
            came = table["came"].to_numpy()
            ends = np.flatnonzero(came) + 1
            whole = int(ends[-1]) if len(ends) else 0
            left = table.slice(whole)
            if whole:
                events = np.empty(whole, EVENT)
                for name in EVENT.names or ():
                    events[name] = table[name][:whole].to_numpy()
                yield Chunk(events, ends, came[ends - 1], table["digest"][:whole].to_numpy())

    def notes(self) -> list[tuple[int, int, str, Any]]:
        """(events that had come, stream's time, kind, what) of all that was noted."""
        found: list[tuple[int, int, str, Any]] = []
        for part in read(self.folder / "notes", self.said):
            found += zip(
                part["at"].to_pylist(), part["now"].to_pylist(), part["kind"].to_pylist(), map(json.loads, part["what"].to_pylist())
            )
        return found

    def predictions(self) -> pa.Table:
        """at, instrument, ts, latency_ns, votes_digest, mix_digest of every prediction, in their order."""
        columns = ["at", "instrument", "ts", "latency_ns", "votes_digest", "mix_digest"]
        parts = list(read(self.folder / "predictions", self.said, columns))
        return pa.concat_tables(parts) if parts else pa.table({c: pa.array([], pa.int64()) for c in columns})


def to_catalog(recording: Recording) -> Path:
    """Make the session's folder a NautilusTrader catalog too (`data/`), for `--catalog` and training; nothing is done where it is one."""
    from catalog.definitions import Definition
    from catalog.importer import _write_instruments
    from catalog.parquet import DELTAS, QUOTES, TRADES
    from catalog.whole import replacing
    from catalog.writer import Writer

    root = recording.folder
    if (root / "data").is_dir():
        return root
    n = len(recording.instruments)
    lowest = np.full(n, np.iinfo(np.int64).min)
    stamps = lowest, lowest.copy()
    with replacing(root / ".catalog") as part:
        writers = [{kind: Writer(part, kind, x) for kind in (DELTAS, TRADES, QUOTES)} for x in recording.instruments]
        try:
            for chunk in recording.stream():
                move(chunk.events, *stamps)
                for k in np.unique(chunk.events["instrument"]).tolist():
                    mine = chunk.events[chunk.events["instrument"] == k]
                    trade, quote = mine["action"] == TRADE, mine["flags"] & F_TOB != 0
                    for kind, rows in ((TRADES, trade), (QUOTES, quote & ~trade), (DELTAS, ~quote & ~trade)):
                        writers[k][kind].add(mine[rows])
            for by in writers:
                for w in by.values():
                    w.close()
        except BaseException:
            for by in writers:
                for w in by.values():
                    w.abandon()
            raise
        full = [x for x, by in zip(recording.instruments, writers) if any(w.rows for w in by.values())]
        if full:
            _write_instruments(part, [Definition(x, x.id.rsplit(".", 1)[0]) for x in full])
    if (root / ".catalog" / "data").is_dir():
        (root / ".catalog" / "data").rename(root / "data")
    shutil.rmtree(root / ".catalog")
    return root
