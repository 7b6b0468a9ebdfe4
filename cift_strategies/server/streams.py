"""The two WebSockets: predictions and signals for programs, frames for the page. A snapshot first, then news; who is slow is cut off.

News are written to the connection where they arise, in :mod:`cift_strategies.server.mirror`: a queue and tasks for each client would cost
several times as much as the messages. What is left to do here is to let clients in and to notice that they leave.
"""

from __future__ import annotations

import contextlib
from collections import deque
from typing import Annotated, Any, Final, cast

from fastapi import APIRouter, Query, WebSocket, WebSocketDisconnect
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from cift_strategies.server.mirror import FRAME, Client, Mirror, encode, framed
from cift_strategies.server.problems import problem

MOST: Final = 500  # clients at once
TELL_S: Final = 30.0  # in which a client that is cut off may still read that it is
TOO_SLOW: Final = 1013  # close codes: try again later, and policy violation
UNKNOWN: Final = 1008


class Protocol(WebSocketsSansIOProtocol):
    """uvicorn's, which the application gets as `cift.connection`: to write without waiting, and to be rid of a client that reads nothing.

    The transport is given one piece at a time, the next when the system has taken it. So what waits can be thrown away for a client that is
    cut off, and the close frame stands behind the piece that is under way, however much the client left unread.
    """

    _later: deque[bytes]
    _bytes = 0  # in _later

    async def run_asgi(self) -> None:
        self._later = deque()
        self.transport.set_write_buffer_limits(high=0)  # resume_writing: everything has been taken
        cast(dict[str, Any], self.scope)["cift.connection"] = self
        await super().run_asgi()

    async def send(self, message: Any) -> None:
        await super().send(message)
        if self.initial_response is not None and self.close_sent:
            self.handshake_complete = True  # it was refused with an answer of ours; uvicorn would log that there was none

    def write(self, data: bytes) -> None:
        """Send framed messages; what the system does not take waits in memory."""
        if not self.close_sent and not self.transport.is_closing():
            self._write(data)

    def waiting(self) -> int:
        """Bytes that the system has not taken."""
        return self.transport.get_write_buffer_size() + self._bytes

    def cut(self) -> None:
        """Throw away what waits, tell the client, and end the connection when it has read that; at the latest after TELL_S."""
        if self.close_sent or self.transport.is_closing():
            return
        self._later.clear()
        self._bytes = 0
        self.conn.send_close(TOO_SLOW, "too slow: messages were not read in time")
        self._write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        # The client's close frame or the end of its line ends the connection: to close it while there is something of the client's to be
        # read would reset it, and throw away what is under way.
        self.close_timer = self.loop.call_later(TELL_S, self.transport.abort)

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()  # its own close waits for a client that reads nothing, for ever
        self.loop.call_later(TELL_S, self.transport.abort)

    def _write(self, data: bytes) -> None:
        if self._later or self.transport.get_write_buffer_size():
            self._later.append(data)
            self._bytes += len(data)
        else:
            self.transport.write(data)

    def resume_writing(self) -> None:
        super().resume_writing()
        while self._later and not self.transport.get_write_buffer_size():
            data = self._later.popleft()
            self._bytes -= len(data)
            self.transport.write(data)


def router(mirror: Mirror) -> APIRouter:
    routes = APIRouter()

    @routes.websocket("/api/v1/predict/stream")
    async def predictions(socket: WebSocket, symbols: Annotated[str, Query()] = "") -> None:
        wanted = frozenset(s.strip() for s in symbols.split(",") if s.strip()) or None
        if not await _enter(socket, mirror):
            return
        if wanted and mirror.info and (unknown := sorted(wanted - mirror.info.keys())):
            await socket.close(UNKNOWN, f"no instrument {unknown[0]}"[:100])
            return
        client = _client(socket, mirror, wanted)
        client.number(f'"type":"snapshot",{encode(mirror.predictions(wanted))[1:-1]}'.encode())
        client.flush()
        await _stay(socket, client, mirror.prediction_clients)

    @routes.websocket("/api/v1/frames")
    async def frames(socket: WebSocket) -> None:
        if not await _enter(socket, mirror):
            return
        client = _client(socket, mirror)
        if mirror.frame is not None:
            client.put(framed(mirror.text(FRAME, "snapshot", mirror.snapshot).encode()))
        await _stay(socket, client, mirror.frame_clients)

    return routes


async def _enter(socket: WebSocket, mirror: Mirror) -> bool:
    if len(mirror.frame_clients) + len(mirror.prediction_clients) >= MOST:
        await socket.send_denial_response(problem(503, f"{MOST} streams are open already", headers={"Retry-After": "1"}))
        return False
    await socket.accept(subprotocol=socket.scope.get("cift.protocol"))
    return True


def _client(socket: WebSocket, mirror: Mirror, wanted: frozenset[str] | None = None) -> Client:
    connection = socket.scope["cift.connection"]

    def cut() -> None:
        mirror.cut += 1
        connection.cut()

    return Client(connection.write, connection.waiting, cut, wanted)


async def _stay(socket: WebSocket, client: Client, clients: set[Client]) -> None:
    """News for `client` until it has left. Nothing is expected of it."""
    clients.add(client)
    try:
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            while (await socket.receive())["type"] != "websocket.disconnect":
                pass
    finally:
        clients.discard(client)
