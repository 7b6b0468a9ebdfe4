"""The process that holds one connection to one of Polygon's clusters: whatever the node does, the socket is read.

Run by :mod:`cift_strategies.feeds.polygon` as `python -m cift_strategies.feeds.polygon_reader`. One thread only takes frames off the
socket into a bounded backlog; another parses them (:mod:`cift_strategies.feeds.polygon_wire`) and writes rows to standard output, where a
slow node makes it wait. When the backlog is full the oldest frames are dropped, counted and told. It takes orders as lines of JSON on
standard input and ends when that ends. What it writes: a header (:data:`HEAD`: kind, length, length of the ids), then rows and the ids of
trades, or a note.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import ssl
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from struct import Struct
from typing import Any, Final

import certifi
from polygon.exceptions import AuthError  # type: ignore[import-untyped]
from polygon.websocket import WebSocketClient  # type: ignore[import-untyped]
from websockets.asyncio.client import connect

from cift_strategies.feeds.polygon_wire import Listing, Wire

HEAD: Final = Struct("<BII")
ROWS, NOTE = 1, 2
TOPICS: Final = 200  # of one subscription message
LARGEST_FRAME: Final = 64 << 20
PIECE: Final = 1 << 18  # bytes that are parsed before rows are handed on
REFUSED: Final = 3  # exit status: the service refused the key


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds. A connection that lasts `steady` is a good one: the next back-off begins anew."""

    first: float = 0.5  # before the first attempt after a loss; doubled for each further one
    most: float = 30.0
    crowded: float = 60.0  # when the account has no connection left: asking fast would only take turns with whoever has it
    steady: float = 10.0
    answer: float = 10.0  # to a handshake and to the key


class Backoff:
    """How long to wait before the next attempt."""

    def __init__(self, patience: Patience) -> None:
        self.patience, self.attempts = patience, 0

    def wait(self, lasted: float, crowded: bool) -> float:
        """After a connection that was good for `lasted` seconds (0: there was none); `crowded`: the account had no place for it.

        A connection that is lost at once is no success: it does not begin the back-off anew.
        """
        p = self.patience
        if lasted >= p.steady:
            self.attempts = 0
        wait = min(p.most, p.first * 2.0**self.attempts) * random.uniform(0.8, 1.2)
        self.attempts = min(self.attempts + 1, 60)
        return max(wait, p.crowded) if crowded else wait


class Crowded(Exception):
    """The account has no connection left."""


class Backlog:
    """What the socket gave and the parser has not taken: frames up to `limit` bytes in all, and notes, in order."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes, self.frames, self.received = limit, 0, 0, 0
        self.dropped_frames = self.dropped_bytes = 0
        self._items: deque[tuple[int, bytes | dict[str, Any]]] = deque()
        self._kept: list[tuple[int, bytes | dict[str, Any]]] = []
        self._lost = [0, 0]
        self._ready = threading.Condition()

    def put(self, stamp: int, data: bytes) -> None:
        with self._ready:
            self._items.append((stamp, data))
            self.bytes += len(data)
            self.received += len(data)
            self.frames += 1
            while self.bytes > self.limit:
                oldest = self._items.popleft()
                if isinstance(oldest[1], dict):
                    self._kept.append(oldest)
                else:
                    self.bytes -= len(oldest[1])
                    self._lost[0] += 1
                    self._lost[1] += len(oldest[1])
            self._ready.notify()

    def note(self, **note: Any) -> None:
        with self._ready:
            self._items.append((0, note))
            self._ready.notify()

    def take(self, wait: float) -> list[tuple[int, bytes | dict[str, Any]]]:
        """The oldest items, about :data:`PIECE` bytes of them; what was dropped before them is told first. Empty after `wait` seconds."""
        with self._ready:
            if not self._items and not self._kept and not self._lost[0]:
                self._ready.wait(wait)
            found, self._kept = self._kept, []
            if self._lost[0]:
                self.dropped_frames += self._lost[0]
                self.dropped_bytes += self._lost[1]
                found.append((0, {"event": "dropped", "frames": self._lost[0], "bytes": self._lost[1]}))
                self._lost = [0, 0]
            size = 0
            while self._items and size < PIECE:
                found.append(item := self._items.popleft())
                size += len(item[1]) if isinstance(item[1], bytes) else 0
            self.bytes -= size
            return found


def statuses(data: bytes | str) -> list[tuple[str, str]]:
    """The status messages of a frame as (status, message)."""
    try:
        messages = json.loads(data)
    except (ValueError, RecursionError):
        return []
    if not isinstance(messages, list):
        messages = [messages]
    return [(str(m.get("status")), str(m.get("message"))) for m in messages if isinstance(m, dict) and m.get("ev") == "status"]


class Socket(WebSocketClient):  # type: ignore[misc]
    """The package's client, one connection a call of `connect`.

    The package reconnects by itself, but without back-off where the service closes a connection that it has just accepted (which is how
    it says that the account has none left), not at all after a regular close, and it forgets subscriptions when two losses follow each
    other; it also waits a second before it subscribes. So here the caller decides when to connect again, and `scheduled_subs` is his.
    """

    def __init__(self, *args: Any, patience: Patience, **kw: Any) -> None:
        super().__init__(*args, raw=True, max_reconnects=0, **kw)
        self.patience = patience
        self.changed = asyncio.Event()
        self.authenticated = False

    async def connect(
        self, processor: Callable[[bytes], Awaitable[None]], close_timeout: int = 1, *, ready: Callable[[], None] = lambda: None, **kw: Any
    ) -> None:
        """Connect, show the key, call `ready`, keep the subscriptions up and hand each frame on, until the connection ends, which raises.

        Raises AuthError when the service refuses the key, :class:`Crowded` when the account has no connection left.
        """
        trust = None
        if self.url.startswith("wss://"):
            trust = ssl.create_default_context(cafile=certifi.where())
            trust.load_default_certs()
        self.authenticated, crowded = False, False
        self.subs = set[str]()
        async with asyncio.timeout(self.patience.answer):
            socket = await connect(self.url, ssl=trust, close_timeout=close_timeout, max_size=LARGEST_FRAME, **kw)
        try:
            self.websocket = socket
            async with asyncio.timeout(self.patience.answer):
                await self._login(socket)
            self.authenticated = True
            ready()
            self.changed.set()
            keeper = asyncio.create_task(self._keep())
            try:
                while True:
                    data = await socket.recv(decode=False)
                    if b'"status"' in data:
                        crowded |= any(status == "max_connections" for status, _ in statuses(data))
                    await processor(data)
            finally:
                keeper.cancel()
        except Exception:
            if crowded:
                raise Crowded from None
            raise
        finally:
            await socket.close()

    async def _login(self, socket: Any) -> None:
        asked = False
        while True:
            for status, message in statuses(await socket.recv(decode=False)):
                if status == "auth_timeout":
                    raise TimeoutError(message)
                if status in ("auth_failed", "auth_required", "error"):
                    raise AuthError(message)
                if status == "max_connections":
                    raise Crowded
                if status == "auth_success":
                    return
                if not asked:
                    asked = True
                    await socket.send(json.dumps({"action": "auth", "params": self.api_key}))

    async def _keep(self) -> None:
        while True:
            await self.changed.wait()
            self.changed.clear()
            want = set(self.scheduled_subs)
            for topics, send in ((sorted(self.subs - want), self._unsubscribe), (sorted(want - self.subs), self._subscribe)):
                for n in range(0, len(topics), TOPICS):
                    await send(topics[n : n + TOPICS])
            self.subs = want

    def want(self, add: Iterable[str] = (), remove: Iterable[str] = ()) -> None:
        self.scheduled_subs |= set(add)
        self.scheduled_subs -= set(remove)
        self.changed.set()


class Reader:
    """One cluster's connection, kept alive; its backlog; its parser. `write` gets what goes to the node and may wait."""

    def __init__(self, terms: dict[str, Any], write: Callable[[bytes], object]) -> None:
        self.market, self.write = terms["market"], write
        self.patience = Patience(**terms.get("patience", {}))
        self.backlog = Backlog(int(terms["backlog"]))
        self.wire = Wire(self.market)
        feed, _, rest = terms["feed"].partition("://")
        host, secure = (rest, feed != "ws") if rest else (feed, True)
        self.socket = Socket(terms["key"], host.rstrip("/"), self.market, secure=secure, patience=self.patience)
        self.reconnects = 0

    async def run(self) -> None:
        """Connect again and again. Returns when the service refuses the key."""
        backoff = Backoff(self.patience)
        while True:
            began, crowded = time.monotonic(), False
            try:
                await self.socket.connect(self._frame, ready=lambda: self.backlog.note(event="connected", time=self.reconnects))
                why = "the connection ended"
            except AuthError as e:
                self.backlog.note(event="refused", why=str(e).replace(self.socket.api_key, "***")[:300])
                return
            except Crowded:
                self.backlog.note(event="crowded", wait=self.patience.crowded)
                why, crowded = "max_connections", True
            except Exception as e:  # whatever ends a connection: the system's, the websocket library's
                why = self._clean(e)
            was = self.socket.authenticated
            self.reconnects += was
            wait = backoff.wait((time.monotonic() - began) * was, crowded)
            self.backlog.note(event="lost", why=why, wait=round(wait, 3), was=was)
            await asyncio.sleep(wait)

    def _clean(self, said: BaseException) -> str:
        return " ".join(f"{type(said).__name__}: {said}".replace(self.socket.api_key, "***").split())[:300]

    async def _frame(self, data: bytes) -> None:
        self.backlog.put(time.time_ns(), data)
        if b'"status"' in data:
            for status, message in statuses(data):
                if status not in ("success", "connected", "auth_success"):
                    self.backlog.note(event="status", status=status, message=message.replace(self.socket.api_key, "***")[:300])
                elif message.startswith("subscribed to"):
                    self.backlog.note(event="subscribed", topic=message.rpartition(" ")[2])

    def order(self, line: str) -> None:
        """An order of the node: {"add": [[channel, symbol, *listing], ...]} or {"remove": [[channel, symbol], ...]}."""
        said = json.loads(line)
        self.backlog.note(order=said)  # the parser must know a symbol before its records come
        self.socket.want([f"{c}.{s}" for c, s, *_ in said.get("add", ())], [f"{c}.{s}" for c, s in said.get("remove", ())])

    def parse(self) -> None:
        """Take, parse, write, until the note {"end": True} or until writing fails. For a thread of its own."""
        told = 0.0
        with contextlib.suppress(BrokenPipeError):
            while True:
                for stamp, item in self.backlog.take(0.25):
                    if isinstance(item, bytes):
                        self.wire.frame(item, stamp)
                    elif item.get("end"):
                        self._flush()
                        self._note({"event": "counts", **self.counts()})
                        return
                    elif (order := item.get("order")) is not None:
                        for channel, symbol, *listing in order.get("add", ()):
                            self.wire.add(channel, symbol, Listing(*listing))
                        for channel, symbol in order.get("remove", ()):
                            self.wire.remove(channel, symbol)
                    else:
                        self._flush()
                        self._note(item)
                self._flush()
                if (now := time.monotonic()) - told >= 0.25:
                    told = now
                    self._note({"event": "counts", **self.counts()})

    def counts(self) -> dict[str, Any]:
        b = self.backlog
        return {
            "bytes": b.received, "frames": b.frames, "waiting_bytes": b.bytes, "dropped_frames": b.dropped_frames,
            "dropped_bytes": b.dropped_bytes, "lag_ns": self.wire.lag_ns, "reconnects": self.reconnects, "kinds": dict(self.wire.counts),
        }  # fmt: skip

    def _flush(self) -> None:
        if self.wire.rows:
            rows, ids = self.wire.take()
            self.write(HEAD.pack(ROWS, len(rows), len(ids)) + rows + ids)

    def _note(self, note: dict[str, Any]) -> None:
        text = json.dumps(note).encode()
        self.write(HEAD.pack(NOTE, len(text), 0) + text)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


async def _main(out: int) -> int:
    orders = asyncio.StreamReader(limit=1 << 24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    if not (first := await orders.readline()):
        return 0
    reader = Reader(json.loads(first), lambda data: _write_all(out, data))
    parser = threading.Thread(target=reader.parse, daemon=True)
    parser.start()
    connection = asyncio.create_task(reader.run())
    while True:
        line = asyncio.create_task(orders.readline())
        await asyncio.wait((line, connection), return_when=asyncio.FIRST_COMPLETED)
        if connection.done() or not line.result():
            line.cancel()
            refused = connection.done()
            connection.cancel()
            await asyncio.wait((connection,), timeout=2)
            reader.backlog.note(end=True)
            await asyncio.to_thread(parser.join, 2)
            return REFUSED if refused and connection.exception() is None else int(refused)
        reader.order(line.result().decode())


if __name__ == "__main__":
    pipe = os.dup(1)
    os.dup2(2, 1)  # a stray print must not get among the rows
    sys.setswitchinterval(0.001)  # the socket's thread gets its turn
    code = 1
    with contextlib.suppress(KeyboardInterrupt):
        code = asyncio.run(_main(pipe))
    os._exit(code)
