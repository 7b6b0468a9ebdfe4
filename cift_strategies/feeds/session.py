"""One client's session with the gateway: challenge, subscriptions, and the records it is sent.

Databento's live protocol (its "raw API"): lines of key=value until the session starts, then DBN: metadata, symbol mappings, records of what
was subscribed, system and error messages. Takes its records from a :class:`~.tape.Tape` and its pace from the gateway's clock.
"""

from __future__ import annotations

import asyncio
import importlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from cift_strategies.feeds import levels
from cift_strategies.feeds.mischief import Fault
from cift_strategies.feeds.symbols import STYPES, Unresolved, resolve
from cift_strategies.feeds.tape import STEP, Segment, Stream

if TYPE_CHECKING:
    from cift_strategies.feeds.gateway import Gateway

Array = NDArray[Any]
VERSION: Final = "0.6.1"  # of the protocol
CHUNK: Final = 8_192  # records of a file looked at between two waits for the client
HEARTBEAT_S: Final = 30.0
BEHIND_S: Final = 2.0  # a client that is so far behind the clock is a slow reader
BUFFER: Final = 1 << 20  # bytes waiting for the client before we wait for it
_MAX_LINE: Final = 1 << 16
_dbn: Any = importlib.import_module("databento_dbn")


@dataclass(slots=True)
class Line:
    """What moves forward together: one schema's records of some symbols. `names` None: all."""

    stream: Stream
    names: frozenset[str] | None
    stype: str
    at: int  # place of the next record
    replay: bool = False  # it began in the past and has not caught up
    known: dict[int, tuple[int, ...]] = field(default_factory=dict)  # instrument ids by segment


class Refused(Exception):
    """The client's request cannot be met; it is told so and the line is closed."""


class Session:
    def __init__(self, gateway: Gateway, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: str) -> None:
        self.gateway, self.tape, self.clock = gateway, gateway.tape, gateway.clock
        self.sent = 0  # market records
        self._reader, self._writer, self._id = reader, writer, str(int(number[:12], 16))
        self._lines: list[Line] = []
        self._mapped: dict[str, tuple[int, str]] = {}  # symbol asked for -> id and raw symbol that the client was told
        self._kick = asyncio.Event()
        self._started = False
        self._requests = 0
        self._written = 0.0  # when something was last written
        self._zip: Any = None
        self._warned = 0.0
        writer.transport.set_write_buffer_limits(BUFFER)

    def abort(self) -> None:
        self._writer.transport.abort()

    def wake(self) -> None:
        """Look again what is due."""
        self._kick.set()

    async def run(self) -> None:
        """Serve the client until one of us closes the line."""
        if not await self._authenticate():
            return
        self.gateway.counts["sessions"] += 1
        try:
            await self._subscriptions()
        except Refused as e:
            self._error(str(e), "INVALID_SUBSCRIPTION")
            await self._drain()
            return
        player = asyncio.create_task(self._play())
        listener = asyncio.create_task(self._listen())
        try:
            done, _ = await asyncio.wait((player, listener), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (player, listener):
                task.cancel()
            await asyncio.gather(player, listener, return_exceptions=True)
        if self._zip is not None:
            self._writer.write(self._zip.flush())
        await self._drain()
        self._writer.close()

    # --- control messages ---------------------------------------------------------------------------------------------------------

    async def _authenticate(self) -> bool:
        challenge = secrets.token_urlsafe(24)
        self._writer.write(f"lsg_version={VERSION}\ncram={challenge}\n".encode())
        asked = await self._line()
        refused = self.gateway.refuses() or not self.gateway.knows(challenge, asked.get("auth", ""))
        if refused:
            self.gateway.counts["refused"] += 1
            why = "Authentication failed."
        elif asked.get("dataset") != self.tape.dataset:
            why = f"Dataset {asked.get('dataset')} is not played here; {self.tape.dataset} is."
        elif asked.get("encoding", "dbn") != "dbn" or asked.get("compression", "none") not in ("none", "zstd"):
            why = f"Encoding {asked.get('encoding')} with compression {asked.get('compression')} is not supported."
        elif not asked.get("heartbeat_interval_s", "30").isdigit() or int(asked.get("heartbeat_interval_s", "30")) < 5:
            why = "Invalid heartbeat_interval_s: at least 5."
        else:
            self._heartbeat = float(asked.get("heartbeat_interval_s", HEARTBEAT_S))
            self._ts_out = asked.get("ts_out", "0") == "1"
            self._skips = asked.get("slow_reader_behavior", "warn") == "skip"
            self._writer.write(f"success=1|session_id={self._id}\n".encode())
            if asked.get("compression") == "zstd":
                import zstandard

                self._zip = zstandard.ZstdCompressor(1).compressobj()
            await self._drain()
            return True
        self._writer.write(f"success=0|error={why}\n".encode())
        await self._drain()
        self._writer.close()
        return False

    async def _line(self) -> dict[str, str]:
        """The next control message. Raises IncompleteReadError when the client is gone."""
        text = (await self._reader.readuntil(b"\n")).decode().strip()
        return dict(pair.partition("=")[::2] for pair in text.split("|"))

    async def _subscriptions(self) -> None:
        """Take subscriptions until the session starts; begin the stream."""
        early: list[dict[str, str]] = []
        while "start_session" not in (asked := await self._line()):
            early.append(asked)
        meta = _dbn.Metadata(
            self.tape.dataset, self.clock.now(), None, _dbn.SType.INSTRUMENT_ID, None, end=None, ts_out=self._ts_out, version=3
        )
        self._write(meta.encode())
        self._started = True
        for asked in early:
            with self.clock.held():
                await self._subscribe(asked)
        self.clock.join()

    async def _listen(self) -> None:
        while True:
            asked = await self._line()
            if "start_session" in asked:
                continue
            with self.clock.held():
                await self._subscribe(asked)
            self._kick.set()

    async def _subscribe(self, asked: dict[str, str]) -> None:
        """Add what is asked for, from now, from `start`, or with a snapshot of the book; acknowledged when the request is whole."""
        self._requests += asked.get("is_last", "1") != "0"
        number = asked.get("id") or str(self._requests)
        schema, stype = asked.get("schema", ""), asked.get("stype_in", "raw_symbol")
        names = None if asked.get("symbols") == "ALL_SYMBOLS" else frozenset(filter(None, asked.get("symbols", "").split(",")))
        start, snapshot = asked.get("start", ""), asked.get("snapshot", "0") == "1"
        if schema not in self.tape.schemas:
            raise Refused(f"Schema {schema} is not available; {', '.join(self.tape.schemas)} are.")
        if stype not in STYPES:
            raise Refused(f"stype_in {stype} is not supported; {', '.join(STYPES)} are.")
        if names is not None and not names:
            raise Refused("No symbols were given.")
        if start and not start.isdigit():
            raise Refused(f"Invalid start {start}: nanoseconds since 1970.")
        if snapshot and (start or schema != "mbo" or self.tape.schema != "mbo"):
            raise Refused("A snapshot is only given of mbo, and without a start.")
        stream = await asyncio.to_thread(self.tape.stream, schema)
        same = [x for x in self._lines if x.stream is stream]
        if names is not None:
            names -= frozenset().union(*(x.names for x in same if x.names is not None and x.stype == stype))
        if any(x.names is None for x in same):
            names = frozenset()
        if names is None or names:
            at = self.clock.place()
            line = Line(stream, names, stype, self.tape.at(int(start)) if start else at, bool(start))
            if start and int(start) <= self.tape.first:
                line.at = -STEP
            self._map(line, max(line.at, 0))
            if snapshot:
                await self._snapshot(line, at)
            self._lines.append(line)
        if asked.get("is_last", "1") != "0":
            self._system(f"Subscription request {number} for {schema} data succeeded", "SUBSCRIPTION_ACK")
        await self._drain()

    def _map(self, line: Line, place: int) -> None:
        """Tell what the line's symbols mean at a place, where the client does not know yet."""
        segment, _ = self.tape.segment(place)
        found = resolve(segment, line.names, line.stype, self.tape)
        if isinstance(found, Unresolved):
            if found.names and not any(n in self._mapped for n in found.names):
                self._error(f"Failed to resolve symbols: {', '.join(found.names)}", "SYMBOL_RESOLUTION_FAILED")
            found = found.rest
        for asked, span in found:
            if self._mapped.get(f"{asked}/{span.number}") != (span.number, span.symbol):
                self._mapped[f"{asked}/{span.number}"] = (span.number, span.symbol)
                ends = (max(span.start, 0), span.end if span.end < 2**63 - 1 else _dbn.UNDEF_TIMESTAMP)
                stypes = _dbn.SType(line.stype), _dbn.SType.RAW_SYMBOL
                self._message(_dbn.SymbolMappingMsg(0, span.number, self.clock.now(), stypes[0], asked, stypes[1], span.symbol, *ends))
        line.known[segment.first] = tuple(sorted({s.number for _, s in found}))

    async def _snapshot(self, line: Line, at: int) -> None:
        base, now = self.tape.base, self.tape.time(at)
        for number in line.known[self.tape.segment(max(at, 0))[0].first]:
            records = await asyncio.to_thread(levels.snapshot, base.records[: base.before(at)], number, now)
            self._write(self._bytes(records))
            self.sent += len(records)
            await self._drain()

    # --- records ------------------------------------------------------------------------------------------------------------------

    async def _play(self) -> None:
        await self._until_started()
        while True:
            self._kick.clear()
            limit = self.clock.limit()
            at = min((x.at for x in self._lines), default=limit)
            if at >= limit:
                if at >= self.tape.end and not self.gateway.hold and self._lines:
                    return
                await self._idle(self.clock.wait(limit) if self._lines else float("inf"))
                continue
            self._behind(at)
            segment, ends = self.tape.segment(max(at, 0))
            upto = min(limit, at + CHUNK * STEP, ends if ends > at else limit)
            if not await self._send(segment, upto, upto == limit < self.tape.end):
                await self._idle(self.clock.wait(limit))
                continue
            self.clock.reached(upto)
            for line in self._lines:
                if line.replay and line.at >= limit:
                    line.replay = False
                    self._system(f"Finished {line.stream.schema} replay", "REPLAY_COMPLETED")

    async def _until_started(self) -> None:
        waiting = asyncio.create_task(self.clock.started.wait())
        try:
            while not waiting.done():
                await asyncio.wait((waiting,), timeout=self._heartbeat)
                self._beat()
        finally:
            waiting.cancel()

    async def _idle(self, seconds: float) -> None:
        """Wait until a record is due, a subscription comes or a heartbeat is."""
        rest = max(0.0, self._written + self._heartbeat - time.monotonic())
        try:
            await asyncio.wait_for(self._kick.wait(), max(0.0005, min(seconds, rest)))
        except TimeoutError:
            self._beat()

    def _beat(self) -> None:
        if time.monotonic() - self._written >= self._heartbeat:
            self._system("Heartbeat", "HEARTBEAT")

    async def _send(self, segment: Segment, upto: int, grows: bool) -> bool:
        """Send what stands before a place, of all lines, in order; or nothing, where a fault takes more records and more come (`grows`)."""
        parts, lines = [], [x for x in self._lines if x.at < upto]
        for line in lines:
            if segment.first not in line.known:
                self._map(line, max(segment.first, 0))
            a, b = line.stream.before(line.at), line.stream.before(upto)
            if a == b:
                continue
            records, place = line.stream.records[a:b], line.stream.place[a:b]
            mine = np.isin(line.stream.numbers[a:b], np.array(line.known[segment.first], np.uint32))
            if not mine.all():
                records, place = records[mine], place[mine]
            if len(records):
                parts.append((records, place))
        n = sum(len(r) for r, _ in parts)
        faults = [f for f in self.gateway.faults if f.kind != "refuse" and f.after < self.sent + n]
        fault = min(faults, key=lambda f: f.after, default=None)
        if fault is not None and grows and max(0, fault.after - self.sent) + fault.records > n:
            return False
        for line in lines:
            line.at = upto
        if not parts:
            await asyncio.sleep(0)
        elif fault is None:
            self._write(self._merged(parts)[0])
            self.sent += n
            self.gateway.counts["records"] += n
            await self._drain()
        else:
            data, sizes = self._merged(parts)
            places = np.sort(np.concatenate([p for _, p in parts]))
            await self._misbehave(data, np.concatenate([[0], np.cumsum(sizes)]), places, fault)
        return True

    async def _misbehave(self, data: bytes, offsets: Array, places: Array, fault: Fault) -> None:
        """Send the records with the fault among them."""
        cut = max(0, fault.after - self.sent)
        self.gateway.faults.remove(fault)
        self._write(data[: offsets[cut]])
        rest, n = data[offsets[cut] :], len(offsets) - 1
        if fault.kind == "drop":
            self.clock.reached(int(places[cut]) + int(fault.amount) * STEP)
            await self._drain()
            self._writer.close()
            raise ConnectionAbortedError
        if fault.kind == "stall":
            await self._drain()
            await asyncio.sleep(fault.amount)
        self._write(fault.change(rest, offsets[cut:] - offsets[cut]))
        self.sent += n
        self.gateway.counts["records"] += n
        await self._drain()

    def _merged(self, parts: Sequence[tuple[Array, Array]]) -> tuple[bytes, Array]:
        """The records of several lines in the order of their places, and the size of each."""
        if self._ts_out:
            parts = [(self._stamped(r), p) for r, p in parts]
        if len(parts) == 1:
            records = parts[0][0]
            return records.tobytes(), np.full(len(records), records.shape[1])
        places = np.concatenate([p for _, p in parts])
        order = np.argsort(places, kind="stable")
        sizes = np.concatenate([np.full(len(r), r.shape[1]) for r, _ in parts])
        starts = np.empty(len(sizes), np.int64)
        starts[order] = np.cumsum(sizes[order]) - sizes[order]
        out, first = np.empty(int(sizes.sum()), np.uint8), 0
        for records, _ in parts:
            where = starts[first : first + len(records)]
            out[where[:, None] + np.arange(records.shape[1])] = records
            first += len(records)
        return out.tobytes(), sizes[order]

    def _stamped(self, records: Array) -> Array:
        """Records with the time at which they are sent behind them."""
        out = np.empty((len(records), records.shape[1] + 8), np.uint8)
        out[:, :-8] = records
        out[:, 0] += 2
        out[:, -8:] = np.frombuffer(self.clock.now().to_bytes(8, "little"), np.uint8)
        return out

    def _behind(self, at: int) -> None:
        """Warn a client that does not keep up with the clock, or leave out what it would be late for, if it asked for that."""
        if not self.clock.speed or any(x.replay for x in self._lines) or time.monotonic() - self._warned < BEHIND_S:
            return
        late = (self.clock.now() - self.tape.time(at)) / 1e9 / self.clock.speed
        if -self.clock.wait(at) < BEHIND_S:
            return
        self._warned = time.monotonic()
        if self._skips:
            limit = self.clock.limit()
            n = sum(x.stream.before(limit) - x.stream.before(x.at) for x in self._lines)
            for line in self._lines:
                line.at = limit
            self._error(f"Skipped {n} records: the client reads too slowly", "SKIPPED_RECORDS_AFTER_SLOW_READING")
        else:
            self._system(f"Slow reading: {late:.1f} s behind", "SLOW_READER_WARNING")

    # --- the line -----------------------------------------------------------------------------------------------------------------

    def _bytes(self, records: Array) -> bytes:
        return (self._stamped(records) if self._ts_out else records).tobytes()

    def _system(self, text: str, code: str) -> None:
        self._message(_dbn.SystemMsg(self.clock.now(), text, getattr(_dbn.SystemCode, code)))

    def _error(self, text: str, code: str) -> None:
        self._message(_dbn.ErrorMsg(self.clock.now(), text, True, getattr(_dbn.ErrorCode, code)))

    def _message(self, record: Any) -> None:
        self._write(self._bytes(np.frombuffer(bytes(record), np.uint8)[None]))

    def _write(self, data: bytes) -> None:
        self._written = time.monotonic()
        self._writer.write(data if self._zip is None else self._zip.compress(data) + self._zip.flush(1))

    async def _drain(self) -> None:
        """Wait for the client to take what is waiting. Raises ConnectionAbortedError where it does not within the gateway's patience."""
        try:
            await asyncio.wait_for(self._writer.drain(), self.gateway.patience_s)
        except TimeoutError:
            raise ConnectionAbortedError from None
