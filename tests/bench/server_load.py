"""Puts load on a server: WebSocket clients that read all they are sent, or requests at a steady rate. One line of JSON at the end.

    python tests/bench/server_load.py URL --clients 200 --seconds 20        # messages, clients that were cut
    python tests/bench/server_load.py URL --rate 500 --seconds 20           # requests, failures, p50 and p99 of the time to answer

Without --seconds it takes turns: at a line on standard input it connects and says "ready" when all are connected, at the next it stops,
tells what was, and waits for another. Two processes, so that reading messages does not delay the clock of the requests. Both stand for
other machines and have to take as little as they can of this one: bare sockets, no event loop, and both go behind everything else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import socket
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

PATHS = ("positions", "pnl", "regime", "latency", "feeds", "models/status", "fills", "weights")
CONNECTIONS = 25
CLOSE, PING, PONG = 0x88, 0x89, 0x8A  # first bytes of frames: an end, a question whether the client is there, its answer
UPGRADE = (
    "GET /api/v1/predict/stream HTTP/1.1\r\nHost: {}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


class Listener:
    """One stream, of which the frames (RFC 6455) are counted without looking into them."""

    def __init__(self, host: str, port: int) -> None:
        self.socket = socket.create_connection((host, port))
        self.socket.sendall(UPGRADE.format(host).encode())
        self.messages = self.cut = 0
        self._left, self._rest = 0, b""
        data = b""
        while b"\r\n\r\n" not in data and (more := self.socket.recv(65_536)):
            data += more
        head, _, data = data.partition(b"\r\n\r\n")
        self.joined = head.startswith(b"HTTP/1.1 101")
        self._take(data)
        self.socket.setblocking(False)

    def read(self) -> bool:
        """Take what has come; False: the stream has ended."""
        data = self.socket.recv(1 << 20)
        self._take(data)
        return bool(data)

    def _take(self, data: bytes) -> None:
        data, at = self._rest + data, self._left
        while len(data) >= at + 2:
            head, short = at, data[at + 1] & 0x7F
            more = {126: 2, 127: 8}.get(short, 0)
            if len(data) < at + 2 + more:
                break
            at += 2 + more + (int.from_bytes(data[at + 2 : at + 2 + more]) if more else short)
            if data[head] == CLOSE:
                self.cut += 1
            elif data[head] == PING:
                if len(data) < at:
                    at = head
                    break
                self.socket.sendall(bytes([PONG, 0x80 | short, 0, 0, 0, 0]) + data[at - short : at])
            else:
                self.messages += 1
        self._left, self._rest = max(0, at - len(data)), data[at:]


class Turns:
    """When to stop: after `seconds`, or at the next line of standard input."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds, self._until = seconds, float("inf")
        self.watched = [0] if seconds is None else []

    def ready(self) -> None:
        if self._seconds is None:
            print("ready", flush=True)
        else:
            self._until = time.perf_counter() + self._seconds

    def over(self, readable: Any) -> bool:
        return 0 in readable or time.perf_counter() > self._until


def listen(host: str, port: int, clients: int, turns: Turns) -> dict[str, float]:
    listeners = {x.socket.fileno(): x for x in (Listener(host, port) for _ in range(clients))}
    poll = select.epoll()
    for n in (*turns.watched, *listeners):
        poll.register(n, select.EPOLLIN)
    turns.ready()
    while not turns.over(found := [n for n, _ in poll.poll(0.2)]):
        for n in found:
            if n and not listeners[n].read():
                poll.unregister(n)
    poll.close()
    for x in listeners.values():
        x.socket.close()
    return {name: sum(getattr(x, name) for x in listeners.values()) for name in ("messages", "cut", "joined")}


def request(host: str, port: int, rate: float, turns: Turns) -> dict[str, Any]:
    """Each request has its time, whether or not those before were slow: to wait for a free connection counts."""
    took: list[float] = []
    failed = n = 0
    free = deque(socket.create_connection((host, port)) for _ in range(CONNECTIONS))
    sockets = [*free]
    for x in sockets:
        x.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    busy: dict[socket.socket, tuple[float, bytes]] = {}
    texts = [f"GET /api/v1/{path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode() for path in PATHS]
    turns.ready()
    due = time.perf_counter()
    readable: list[Any] = []
    while not turns.over(readable):
        while free and due <= time.perf_counter():
            asked = free.popleft()
            asked.sendall(texts[n % len(PATHS)])
            busy[asked] = due, b""
            due, n = due + 1 / rate, n + 1
        readable = select.select([*turns.watched, *busy], (), (), max(0.0, due - time.perf_counter()) if free else 1.0)[0]
        for x in readable:
            if x == 0:
                continue
            since, before = busy[x]
            data = before + (got := x.recv(1 << 20))
            head, _, body = data.partition(b"\r\n\r\n")
            at = head.find(b"content-length: ") + 16
            if got and len(body) < int(head[at:].split(b"\r\n", 1)[0] if at > 15 else 1):
                busy[x] = since, data
                continue
            took.append(time.perf_counter() - since)
            failed += not head.startswith(b"HTTP/1.1 200")
            del busy[x]
            free.append(x)
    for x in sockets:
        x.close()
    p50, p99 = np.quantile(took, (0.5, 0.99)) * 1e3
    told = {"requests": len(took), "failed": failed, "p50_ms": float(p50), "p99_ms": float(p99)}
    return told | {"took_ms": [round(x * 1e3, 3) for x in took]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--seconds", type=float)
    given = parser.parse_args()
    host, port = given.url.removeprefix("http://").split(":")
    os.nice(19)
    if os.getsid(0) == os.getpid():  # priority counts within a session only; ours, where we have one, goes behind the others (sched(7))
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text("19")
    turns = Turns(given.seconds)
    while given.seconds or os.read(0, 64):
        began = time.process_time()
        told = listen(host, int(port), given.clients, turns) if given.clients else request(host, int(port), given.rate, turns)
        if given.seconds is None:
            os.read(0, 64)  # the line that ended the turn
        else:
            told.pop("took_ms", None)
        print(json.dumps(told | {"cpu_s": time.process_time() - began}), flush=True)
        if given.seconds:
            break
    sys.exit()
