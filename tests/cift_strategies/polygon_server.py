"""A server that speaks Polygon's WebSocket protocol by its published schemas, and misbehaves on command; in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from websockets.asyncio.server import ServerConnection, serve

KEY = "a-secret-key-of-32-characters-00"
WAIT = 60.0  # guards against hanging only


def status(kind: str, message: str) -> dict[str, str]:
    return {"ev": "status", "status": kind, "message": message}


class Line:
    """One client's connection to one cluster."""

    def __init__(self, socket: ServerConnection, market: str) -> None:
        self.socket, self.market, self.topics, self.authenticated = socket, market, set[str](), False


class Server:
    """`places`: connections an account has per cluster. `denied`: topics that the plan does not include. `mute`: say nothing at all."""

    def __init__(
        self, *, key: str = KEY, places: int = 1, denied: Iterable[str] = (), mute: bool = False, tls: ssl.SSLContext | None = None
    ) -> None:
        self.key, self.places, self.denied, self.mute, self.tls = key, places, set(denied), mute, tls
        self.lines: list[Line] = []
        self.asked: list[tuple[str, str]] = []  # (cluster, what a client said), the key left out
        self.connections = 0
        self.refused = 0
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._call(self._open())
        self.port = self._server.sockets[0].getsockname()[1]

    @property
    def feed(self) -> str:
        return f"{'wss' if self.tls else 'ws'}://localhost:{self.port}" if self.tls else f"ws://127.0.0.1:{self.port}"

    async def _open(self, port: int = 0) -> Any:
        return await serve(self._serve, "127.0.0.1", port, ssl=self.tls, compression=None, close_timeout=1)

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT)

    def close(self) -> None:
        self.away()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT)

    def away(self) -> None:
        """No longer there: connections end and further ones are refused by the system."""

        async def stop() -> None:
            self._server.close()
            await self._server.wait_closed()

        self._call(stop())

    def back(self) -> None:
        self._server = self._call(self._open(self.port))

    # --- the protocol -----------------------------------------------------------------------------------------------------------------

    async def _serve(self, socket: ServerConnection) -> None:
        assert socket.request is not None
        line = Line(socket, socket.request.path.strip("/"))
        self.connections += 1
        if self.mute:
            await socket.wait_closed()
            return
        try:
            await self._say(line, status("connected", "Connected Successfully"))
            async for text in socket:
                said = json.loads(text)
                if said["action"] == "auth":
                    if said["params"] != self.key:
                        self.refused += 1
                        await self._say(line, status("auth_failed", "authentication failed"))
                        return
                    line.authenticated = True
                    await self._say(line, status("auth_success", "authenticated"))
                    self._note(lambda: self.lines.append(line))
                    continue
                self._note(lambda said=said: self.asked.append((line.market, f"{said['action']} {said['params']}")))
                if not line.authenticated:
                    await self._say(line, status("auth_required", "authentication required"))
                    continue
                replies = []
                for topic in said["params"].split(","):
                    if said["action"] == "unsubscribe":
                        line.topics.discard(topic)
                        replies.append(status("success", f"unsubscribed to: {topic}"))
                    elif topic in self.denied:
                        replies.append(status("error", f"You don't have access to {topic}: not authorized"))
                    else:
                        line.topics.add(topic)
                        replies.append(status("success", f"subscribed to: {topic}"))
                await self._say(line, *replies)
                if sum(x.market == line.market for x in self.lines) > self.places:  # only now, as the service does
                    self.refused += 1
                    await self._say(line, status("max_connections", "Maximum number of websocket connections exceeded."))
                    await socket.close(1008)
                self._note(lambda: None)
        finally:
            self._note(lambda: self.lines.remove(line) if line in self.lines else None)

    async def _say(self, line: Line, *messages: dict[str, Any]) -> None:
        await line.socket.send(json.dumps(messages))

    def _note(self, change: Callable[[], object]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()

    # --- what a test does with it -----------------------------------------------------------------------------------------------------

    def until(self, true: Callable[[], object]) -> None:
        """Wait until something a client did makes `true` true."""
        with self._changed:
            assert self._changed.wait_for(lambda: bool(true()), WAIT), "the client did not do it"

    def topics(self, market: str) -> set[str]:
        return set().union(*(x.topics for x in self.lines if x.market == market))

    def until_subscribed(self, market: str, *topics: str) -> None:
        self.until(lambda: set(topics) <= self.topics(market))

    def send(self, market: str, messages: Sequence[dict[str, Any]]) -> None:
        """One array of messages to whoever has subscribed to them."""

        def topic(m: dict[str, Any]) -> str:
            return f"{m['ev']}.{m.get('pair') or m.get('sym') or m.get('T')}"

        async def work() -> None:
            for line in list(self.lines):
                mine = [m for m in messages if topic(m) in line.topics]
                if line.market == market and mine:
                    await line.socket.send(json.dumps(mine, separators=(",", ":")))

        self._call(work())

    def raw(self, market: str, *frames: str | bytes) -> None:
        async def work() -> None:
            for line in [x for x in self.lines if x.market == market]:
                for frame in frames:
                    await line.socket.send(frame)

        self._call(work())

    def until_read(self) -> None:
        """Until every client has answered a ping, which it does after all it was sent before."""

        async def work() -> None:
            for line in list(self.lines):
                await (await line.socket.ping())

        self._call(work())

    def drop(self, market: str, code: int = 1011, *, rude: bool = False) -> None:
        """End the connections of a cluster: by a close frame, or (`rude`) as when a cable is pulled."""

        async def work() -> None:
            for line in [x for x in self.lines if x.market == market]:
                if rude:
                    line.socket.transport.abort()
                else:
                    await line.socket.close(code)

        self._call(work())
        self.until(lambda: not any(x.market == market for x in self.lines))
