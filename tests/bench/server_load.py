"""Puts load on a server: WebSocket clients that read all they are sent, or requests at a steady rate. One line of JSON at the end.

    python tests/bench/server_load.py URL --clients 200 --seconds 20        # messages, clients that were cut
    python tests/bench/server_load.py URL --rate 500 --seconds 20           # requests, failures, p50 and p99 of the time to answer

Two processes, so that reading messages does not delay the clock of the requests. Clients count messages without looking into them: they
stand for other machines and must take as little as they can of this one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from typing import Any

import numpy as np

PATHS = ("positions", "pnl", "regime", "latency", "feeds", "models/status", "fills", "weights")
CONNECTIONS = 25
CLOSE = 0x88  # first byte of a frame that ends a stream


class Listener(asyncio.Protocol):
    """Counts the frames (RFC 6455) of one stream into `counts`."""

    def __init__(self, host: str, counts: dict[str, int]) -> None:
        self._host, self._counts = host, counts
        self._left, self._rest, self._answered = 0, b"", False

    def connection_made(self, transport: Any) -> None:
        transport.write(
            f"GET /api/v1/predict/stream HTTP/1.1\r\nHost: {self._host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )

    def data_received(self, data: bytes) -> None:
        data, at = self._rest + data, self._left
        if not self._answered:
            head, end, data = data.partition(b"\r\n\r\n")
            if not end:
                self._rest = head
                return
            self._answered, self._counts["joined"] = True, self._counts["joined"] + head.startswith(b"HTTP/1.1 101")
        while len(data) >= at + 2:
            head, short = at, data[at + 1] & 0x7F
            more = {126: 2, 127: 8}.get(short, 0)
            if len(data) < at + 2 + more:
                break
            at += 2 + more + (int.from_bytes(data[at + 2 : at + 2 + more]) if more else short)
            self._counts["cut" if data[head] == CLOSE else "messages"] += 1
        self._left, self._rest = max(0, at - len(data)), data[at:]


async def listen(host: str, port: int, clients: int, seconds: float) -> dict[str, float]:
    counts = {"messages": 0, "cut": 0, "joined": 0}
    loop = asyncio.get_running_loop()
    transports = [(await loop.create_connection(lambda: Listener(host, counts), host, port))[0] for _ in range(clients)]
    await asyncio.sleep(seconds)
    for transport in transports:
        transport.abort()
    return {**counts}


async def ask(host: str, port: int, rate: float, took: list[float], failed: list[bytes], until: float, first: int) -> None:
    """Requests over one connection, each at its own time whether or not the one before was slow: waiting counts."""
    reader, writer = await asyncio.open_connection(host, port)
    due, n = time.perf_counter() + first / rate / CONNECTIONS, first
    while due < until:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        writer.write(f"GET /api/v1/{PATHS[n % len(PATHS)]} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")).split(b":")[1])
        await reader.readexactly(length)
        if not head.startswith(b"HTTP/1.1 200"):
            failed.append(head)
        took.append(time.perf_counter() - due)
        due, n = due + 1 / rate, n + 1
    writer.close()


async def request(host: str, port: int, rate: float, seconds: float) -> dict[str, float]:
    took: list[float] = []
    failed: list[bytes] = []
    until = time.perf_counter() + seconds
    await asyncio.gather(*(ask(host, port, rate / CONNECTIONS, took, failed, until, n) for n in range(CONNECTIONS)))
    p50, p99 = np.quantile(took, (0.5, 0.99)) * 1e3
    return {"requests": len(took), "failed": len(failed), "p50_ms": float(p50), "p99_ms": float(p99)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    given = parser.parse_args()
    host, port = given.url.removeprefix("http://").split(":")
    if given.clients:
        os.nice(10)
        print(json.dumps(asyncio.run(listen(host, int(port), given.clients, given.seconds))))
    else:
        print(json.dumps(asyncio.run(request(host, int(port), given.rate, given.seconds))))
