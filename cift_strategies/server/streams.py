"""The two WebSockets: predictions and signals for programs, frames for the page. A snapshot first, then news; who is slow is cut off.

News are written to the connection where they arise, in :mod:`cift_strategies.server.mirror`: a queue and tasks for each client would cost
several times as much as the messages. What is left to do here is to let clients in and to notice that they leave.
"""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, Final, cast

from fastapi import APIRouter, Query, WebSocket, WebSocketDisconnect
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from cift_strategies.server.mirror import FRAME, Client, Mirror, encode, framed
from cift_strategies.server.problems import problem

MOST: Final = 500  # clients at once
TELL_S: Final = 2.0  # to tell a client that it is cut off
TOO_SLOW: Final = 1013  # close codes: try again later, and policy violation
UNKNOWN: Final = 1008


class Protocol(WebSocketsSansIOProtocol):
    """uvicorn's, which the application gets as `cift.connection`: to write without waiting, and to be rid of a client that reads nothing
    (its own close waits until there is room for it).
    """

    async def run_asgi(self) -> None:
        cast(dict[str, Any], self.scope)["cift.connection"] = self
        await super().run_asgi()

    async def send(self, message: Any) -> None:
        await super().send(message)
        if self.initial_response is not None and self.close_sent:
            self.handshake_complete = True  # it was refused with an answer of ours; uvicorn would log that there was none

    def write(self, data: bytes) -> None:
        """Send framed messages; what the system does not take waits in memory."""
        if not self.close_sent and not self.transport.is_closing():
            self.transport.write(data)

    def waiting(self) -> int:
        """Bytes that the system has not taken."""
        return self.transport.get_write_buffer_size()

    def cut(self) -> None:
        """Tell the client, behind what it has not read, and end the connection whether or not it reads that in time."""
        if not self.close_sent and not self.transport.is_closing():
            self.conn.send_close(TOO_SLOW, "too slow: messages were not read in time")
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.close_sent = True
        self.loop.call_later(TELL_S, self.transport.abort)


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
