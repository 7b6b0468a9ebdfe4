"""A yardstick that knows nothing of CIFT: answers GETs with 1 KB and tells each WebSocket 20 messages of 500 bytes a second.

    python tests/bench/plain_server.py        # prints its URL

Its work is about that of the node's server under the same load, but it shares neither data nor a socket with the node: what it costs the
node is what any program of that size costs on the same cores.
"""

from __future__ import annotations

import asyncio
import os
import socket

import uvicorn
from fastapi import FastAPI, Response, WebSocket, WebSocketDisconnect

RATE, BYTES, ANSWER = 20.0, 500, b"x" * 1_000

app = FastAPI()
clients: set[WebSocket] = set()


@app.websocket("/{path:path}")
async def stream(client: WebSocket) -> None:
    await client.accept()
    clients.add(client)
    try:
        while True:
            await client.receive_text()
    except WebSocketDisconnect:
        clients.discard(client)


@app.get("/{path:path}")
async def get() -> Response:
    return Response(ANSWER)


async def tell() -> None:
    while True:
        for client in list(clients):
            try:
                await client.send_bytes(b"x" * BYTES)
            except (WebSocketDisconnect, RuntimeError):
                clients.discard(client)
        await asyncio.sleep(1 / RATE)


async def main() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    telling = asyncio.create_task(tell())
    await uvicorn.Server(uvicorn.Config(app, log_level="error", ws_per_message_deflate=False)).serve([listener])
    telling.cancel()


if __name__ == "__main__":
    os.nice(5)
    asyncio.run(main())
