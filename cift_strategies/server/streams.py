"""The two WebSockets: predictions and signals for programs, frames for the page. A snapshot first, then news; who is slow is cut off."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated, Any, Final, cast

from fastapi import APIRouter, Query, WebSocket, WebSocketDisconnect
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from cift_strategies.server.mirror import Client, Mirror, encode

MOST: Final = 500  # clients at once
TELL_S: Final = 2.0  # to tell a client that it is cut off
TOO_SLOW: Final = 1013  # close codes: try again later, and policy violation
UNKNOWN: Final = 1008


class Protocol(WebSocketsSansIOProtocol):
    """uvicorn's, with a way to be rid of a client that reads nothing: its own close waits until there is room for it."""

    async def run_asgi(self) -> None:
        cast(dict[str, Any], self.scope)["cift.cut"] = self.cut
        await super().run_asgi()

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
        client = Client(wanted)
        client.number(f'"type":"snapshot",{encode(mirror.predictions(wanted))[1:-1]}')
        await _serve(socket, client, mirror.prediction_clients, mirror)

    @routes.websocket("/api/v1/frames")
    async def frames(socket: WebSocket) -> None:
        if not await _enter(socket, mirror):
            return
        client = Client()
        if (whole := mirror.snapshot()) is not None:
            client.put(encode(whole))
        await _serve(socket, client, mirror.frame_clients, mirror)

    return routes


async def _enter(socket: WebSocket, mirror: Mirror) -> bool:
    if len(mirror.frame_clients) + len(mirror.prediction_clients) >= MOST:
        await socket.close(TOO_SLOW)
        return False
    await socket.accept(subprotocol=socket.scope.get("cift.protocol"))
    return True


async def _serve(socket: WebSocket, client: Client, clients: set[Client], mirror: Mirror) -> None:
    """Send what comes into the client's queue until either side ends it."""
    clients.add(client)
    tasks = [asyncio.create_task(t) for t in (_send(socket, client), _listen(socket), _overrun(client))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        clients.discard(client)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if client.slow.is_set():
        mirror.cut += 1
        socket.scope["cift.cut"]()


async def _send(socket: WebSocket, client: Client) -> None:
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        while True:
            await socket.send_text(await client.queue.get())


async def _listen(socket: WebSocket) -> None:
    """Nothing is expected of a client; this notices that it has left."""
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        while True:
            message: Any = await socket.receive()
            if message["type"] == "websocket.disconnect":
                return


async def _overrun(client: Client) -> None:
    await client.slow.wait()
