"""Puts load on a server: WebSocket clients that read all they are sent, and requests at a steady rate. One line of JSON at the end.

    python tests/bench/server_load.py URL --clients 200 --rate 500 --seconds 20
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time

import numpy as np
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

PATHS = ("positions", "pnl", "regime", "latency", "feeds", "models/status", "fills", "weights")
CONNECTIONS = 25


async def listen(url: str, symbols: str, counts: dict[str, int], until: float) -> None:
    try:
        async with connect(f"{url.replace('http', 'ws')}/api/v1/predict/stream{symbols}", max_size=None) as ws:
            while (left := until - time.perf_counter()) > 0:
                try:
                    await asyncio.wait_for(ws.recv(), left)
                    counts["messages"] += 1
                except TimeoutError:
                    return
    except ConnectionClosed:
        counts["cut"] += 1


async def ask(host: str, port: int, rate: float, took: list[float], counts: dict[str, int], until: float, first: int) -> None:
    """Requests over one connection, each at its own time whether or not the one before was slow: waiting counts."""
    reader, writer = await asyncio.open_connection(host, port)
    due, n = time.perf_counter() + first / rate / CONNECTIONS, first
    while due < until:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        writer.write(f"GET /api/v1/{PATHS[n % len(PATHS)]} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")).split(b":")[1])
        await reader.readexactly(length)
        counts["failed"] += not head.startswith(b"HTTP/1.1 200")
        took.append(time.perf_counter() - due)
        due, n = due + 1 / rate, n + 1
    writer.close()


async def load(url: str, clients: int, rate: float, seconds: float) -> dict[str, float]:
    host, port = url.removeprefix("http://").split(":")
    took: list[float] = []
    counts = {"messages": 0, "cut": 0, "failed": 0}
    until = time.perf_counter() + seconds
    listeners = [listen(url, "", counts, until) for n in range(clients)]
    askers = [ask(host, int(port), rate / CONNECTIONS, took, counts, until, n) for n in range(CONNECTIONS)]
    await asyncio.gather(*listeners, *askers)
    p50, p99 = np.quantile(took, (0.5, 0.99)) * 1e3
    return {**counts, "requests": len(took), "p50_ms": float(p50), "p99_ms": float(p99)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--rate", type=float, default=500.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    given = parser.parse_args()
    os.nice(10)  # the load stands for other machines: it must not take the node's time
    print(json.dumps(asyncio.run(load(given.url, given.clients, given.rate, given.seconds))))
