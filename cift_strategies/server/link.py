"""The local socket between the node and the server: frames one way, commands the other.

:class:`Link` is the node's end: it listens, does all its work in its caller's thread, and never waits: what the socket does not take at
once stays in a buffer of one message, and until that is gone further frames are dropped. :class:`Reader` is the server's end, in asyncio.
Only its owner may open the socket; whoever can may command. Commands are JSON lines. What the node says is a length (4 bytes, little
endian) and marshal, which costs the node's loop a twelfth of JSON (65 us instead of 840 for 20 instruments): both ends run the same
interpreter, and the node never unmarshals anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import marshal
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

from catalog.errors import InputError

LONGEST: Final = 32 << 20  # bytes of a message: a snapshot is the longest
COMMAND: Final = 64 << 10  # bytes that may wait to be read as commands
ROOM: Final = 1 << 20  # of the socket's buffer
EARLY_S: Final = 0.05  # between two looks for commands before there is a loop
PATH_MAX: Final = 100  # bytes of a Unix socket's path that every system takes

type Answer = dict[str, Any]


def encode(message: Answer) -> bytes:
    """A message of the node's. Raises ValueError for what is no plain value."""
    told = marshal.dumps(message)
    return len(told).to_bytes(4, "little") + told


class Link:
    """The node's end. `command(name, args) -> dict | Future` runs in the thread that calls :meth:`poll`; what it raises is told to the
    asker. One server at a time: a new one takes the place of the old.
    """

    def __init__(self, path: Path, command: Callable[[str, dict[str, Any]], Answer | Future[Answer]] | None = None) -> None:
        self.command = command
        self.dropped = self.sent = self.commands = 0
        self.fresh = True  # the server has not had a snapshot yet
        self._heard = self._polled = 0.0  # time.monotonic() when the server last said something, and when we last listened
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if len(os.fsencode(path.absolute())) > PATH_MAX:
            self._folder = tempfile.TemporaryDirectory(prefix="cift-")
            path = Path(self._folder.name) / path.name
        self.path = path.absolute()
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        before = os.umask(0o177)
        try:
            self._listener.bind(str(self.path))
        except OSError as e:
            raise InputError(f"cannot listen at {self.path} ({e.strerror}): choose another --state folder") from None
        finally:
            os.umask(before)
        self._listener.listen(1)
        self._peer: socket.socket | None = None
        self._in, self._out = bytearray(), bytearray()
        self._waiting: list[tuple[int, Future[Answer]]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Poll whenever something arrives, on `loop`'s thread; without it, commands wait for the next frame."""
        self._loop = loop
        loop.add_reader(self._listener, self.poll)
        if self._peer is not None:
            loop.add_reader(self._peer, self.poll)

    @property
    def connected(self) -> bool:
        return self._peer is not None

    @property
    def silent_s(self) -> float:
        """For how long a connected server has said nothing while we were listening."""
        return 0.0 if self._peer is None else max(0.0, self._polled - self._heard)

    @property
    def ready(self) -> bool:
        """Whether a frame would be taken now: there is a server, and it has read what it was sent before."""
        return self._peer is not None and not self._out

    def send(self, message: Answer) -> bool:
        """Hand over `message` if that is possible at once; False: it was dropped, and counted."""
        if not self.ready:
            self.dropped += self._peer is not None
            return False
        self._out += encode(message)
        self._flush()
        self.sent += 1
        return True

    def poll(self) -> None:
        """Take up a server that connects, run the commands that have come, send on what is left over."""
        if self._listener.fileno() < 0:
            return
        self._polled = time.monotonic()
        with contextlib.suppress(BlockingIOError):
            peer, _ = self._listener.accept()
            self._drop()
            peer.setblocking(False)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM)
            self._peer, self.fresh, self._heard = peer, True, time.monotonic()
            if self._loop is not None:
                self._loop.add_reader(peer, self.poll)
        self._read()
        for number, future in [w for w in self._waiting if w[1].done()]:
            self._waiting.remove((number, future))
            self._reply(number, future.result)
        self._flush()

    def _read(self) -> None:
        try:
            while self._peer is not None and (data := self._peer.recv(65_536)):
                self._heard = time.monotonic()
                self._in += data
                *lines, rest = self._in.split(b"\n")
                self._in = rest
                for line in lines:
                    self._take(bytes(line))
                if len(rest) > COMMAND:
                    break
        except BlockingIOError:
            return
        except OSError:
            pass
        self._drop()

    def _take(self, line: bytes) -> None:
        try:
            message = json.loads(line)
            name, number = message["command"], message["id"]
        except (ValueError, KeyError, TypeError):
            return  # a sign of life
        self.commands += 1
        self._reply(number, lambda: self._run(name, message.get("args") or {}))

    def _run(self, name: str, args: dict[str, Any]) -> Answer | Future[Answer]:
        if self.command is None:
            raise InputError("this run takes no commands")
        return self.command(name, args)

    def _reply(self, number: int, get: Callable[[], Answer | Future[Answer]]) -> None:
        try:
            answer = get()
            if isinstance(answer, Future):
                self._waiting.append((number, answer))
                if self._loop is not None:
                    loop = self._loop
                    answer.add_done_callback(lambda _: loop.call_soon_threadsafe(self.poll))
                return
            told = encode({"reply": number, "ok": True, "result": answer})
        except InputError as e:
            told = encode({"reply": number, "ok": False, "refused": True, "error": str(e)})
        except Exception as e:
            told = encode({"reply": number, "ok": False, "refused": False, "error": f"{type(e).__name__}: {e}"})
        self._out += told

    def _flush(self) -> None:
        if self._peer is None:
            return
        try:
            while self._out:
                del self._out[: self._peer.send(self._out)]
        except BlockingIOError:
            if self._loop is not None:
                self._loop.add_writer(self._peer, self._flush)
            return
        except OSError:
            self._drop()
            return
        if self._loop is not None:
            self._loop.remove_writer(self._peer)

    def _drop(self) -> None:
        if self._peer is not None:
            if self._loop is not None:
                self._loop.remove_reader(self._peer)
                self._loop.remove_writer(self._peer)
            self._peer.close()
        self._peer = None
        self._in.clear()
        self._out.clear()
        self._waiting.clear()

    def close(self) -> None:
        """End the link; the server notices. Twice does no harm."""
        if self._listener.fileno() < 0:
            return
        if self._loop is not None:
            self._loop.remove_reader(self._listener)
        self._drop()
        self._listener.close()
        self.path.unlink(missing_ok=True)
        if self._folder is not None:
            self._folder.cleanup()


class Early:
    """Listens at `link` in a thread of its own until :meth:`stop`, while the node is still being made: a kill is accepted, its reason goes
    to `kill`, and every other command is refused. No frame is sent."""

    def __init__(self, link: Link, kill: Callable[[str], object]) -> None:
        self._link, self._kill = link, kill
        link.command = self._command
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="cift-early-commands", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while not self._end.wait(EARLY_S):
            self._link.poll()

    def _command(self, name: str, args: dict[str, Any]) -> Answer:
        if name != "kill":
            raise InputError(f"the node is starting and takes a kill alone: ask for {name} again when it is ready")
        self._kill(str(args.get("reason") or "by command"))
        return {"state": "killed"}

    def stop(self) -> None:
        """What comes from now on waits for who polls next. Twice does no harm."""
        self._end.set()
        self._thread.join()


class Unanswered(Exception):
    """The node is not there (`gone`), or did not answer in time."""

    def __init__(self, message: str, gone: bool) -> None:
        super().__init__(message)
        self.gone = gone


class Refused(Exception):
    """The node answered that it will not (`ours` False), or that it failed (`ours` True)."""

    def __init__(self, message: str, ours: bool) -> None:
        super().__init__(message)
        self.ours = ours


class Reader:
    """The server's end: connects, and again whenever the node went away; gives every message to `take`, but results of commands, in their
    turn among the others, to `done`."""

    def __init__(
        self, path: Path, take: Callable[[Answer], None], left: Callable[[], None] = lambda: None,
        done: Callable[[Answer], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self._path, self._take, self._left, self._done = path, take, left, done
        self._asked: dict[int, asyncio.Future[Answer]] = {}
        self._number = 0
        self._writer: asyncio.StreamWriter | None = None

    @property
    def connected(self) -> bool:
        return self._writer is not None

    async def run(self) -> None:
        """Read until cancelled."""
        wait = 0.05
        while True:
            try:
                reader, self._writer = await asyncio.open_unix_connection(str(self._path), limit=1 << 20)
                wait = 0.05
                beat = asyncio.create_task(self._beat(self._writer))
                try:
                    while True:
                        size = int.from_bytes(await reader.readexactly(4), "little")
                        if size > LONGEST:
                            raise ValueError(f"a message of {size} bytes")
                        self._message(marshal.loads(await reader.readexactly(size)))
                finally:
                    beat.cancel()
            except (OSError, ValueError, EOFError):
                pass
            finally:
                self._gone()
            await asyncio.sleep(wait)
            wait = min(2 * wait, 1.0)

    async def ask(self, command: str, args: dict[str, Any], within: float = 10.0) -> Answer:
        """The node's answer to a command. Raises Unanswered or Refused."""
        if self._writer is None:
            raise Unanswered("the node is not connected", gone=True)
        self._number += 1
        number, answer = self._number, asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        self._writer.write(json.dumps({"id": number, "command": command, "args": args}).encode() + b"\n")
        try:
            told = await asyncio.wait_for(answer, within)
        except TimeoutError:
            raise Unanswered(f"the node did not answer within {within:g} s; it may still do what was asked", gone=False) from None
        finally:
            self._asked.pop(number, None)
        if not told["ok"]:
            raise Refused(told["error"], ours=not told["refused"])
        return dict(told["result"])

    def _message(self, told: Answer) -> None:
        if "reply" in told:
            if told["ok"]:
                self._done(told["result"])
            future = self._asked.get(told["reply"])
            if future is not None and not future.done():
                future.set_result(told)
        else:
            self._take(told)

    async def _beat(self, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"{}\n")
            await asyncio.sleep(1.0)

    def _gone(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._left()
        for future in self._asked.values():
            if not future.done():
                future.set_exception(Unanswered("the node went away before it answered", gone=True))
