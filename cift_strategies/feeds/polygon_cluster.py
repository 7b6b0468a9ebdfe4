"""The node's end of one Polygon cluster: its reader process, started again when it dies, and the subscriptions that it is to keep.

Takes topics (channel and symbol); hands rows and notes of :mod:`cift_strategies.feeds.polygon_reader` to its owner, in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from cift_strategies.feeds.polygon_reader import HEAD, REFUSED, ROWS, Patience
from cift_strategies.feeds.polygon_wire import Listing


class Owner(Protocol):
    """Who gets what a reader writes."""

    async def rows(self, rows: bytes, ids: bytes) -> None: ...

    def note(self, cluster: Cluster, note: dict[str, Any]) -> None: ...


class Cluster:
    """A reader process and the subscriptions it is to keep. Started again when it dies; not when the key was refused."""

    def __init__(self, market: str, key: str, feed: str, backlog: int, patience: Patience, owner: Owner) -> None:
        self.market, self.owner = market, owner
        self.topics: dict[tuple[str, str], Listing] = {}
        self.up = asyncio.Event()
        self.why = "no answer"
        self.crashes = 0
        self._closing = self._reading = False
        self._terms = {"feed": feed, "market": market, "key": key, "backlog": backlog, "patience": asdict(patience)}
        self._process: asyncio.subprocess.Process | None = None

    async def run(self) -> None:
        """Read until closed. For a task of its own."""
        self._reading = True
        try:
            while not self._closing and await self._session() != REFUSED and not self._closing:
                self.crashes += 1
                wait = min(30.0, 0.5 * 2 ** min(self.crashes, 10))
                self.owner.note(self, {"event": "lost", "why": "the reader process ended", "wait": wait})
                await asyncio.sleep(wait)
        finally:
            self._reading = False

    async def _session(self) -> int:
        """One process, from start to end; its exit status."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "cift_strategies.feeds.polygon_reader", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            limit=1 << 22, start_new_session=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        self._process = process
        self._say(self._terms)
        self._order("add", self.topics)
        await self._read(process)
        self._process = None
        return await process.wait()

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """What the process writes, to its end; rows no more once it is being closed."""
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                kind, n, m = HEAD.unpack(await process.stdout.readexactly(HEAD.size))
                data = await process.stdout.readexactly(n + m)
                if kind != ROWS:
                    self.owner.note(self, json.loads(data))
                elif not self._closing:
                    await self.owner.rows(data[:n], data[n:])
        process.stdin.close()

    async def close(self) -> None:
        """End the process: it goes when its standard input does."""
        self._closing = True
        if (process := self._process) is not None and process.stdin is not None:
            process.stdin.close()
            try:
                await asyncio.wait_for(process.wait() if self._reading else self._read(process), 5)
            except TimeoutError:
                process.kill()
            await process.wait()

    def add(self, channel: str, symbol: str, listing: Listing) -> None:
        if (channel, symbol) not in self.topics:
            self.topics[channel, symbol] = listing
            self._order("add", {(channel, symbol): listing})

    def remove(self, channel: str, symbol: str) -> None:
        if self.topics.pop((channel, symbol), None) is not None:
            self._order("remove", {(channel, symbol): None})

    def _order(self, what: str, topics: Mapping[tuple[str, str], Listing | None]) -> None:
        if topics:
            self._say({what: [[c, s, *(() if x is None else asdict(x).values())] for (c, s), x in topics.items()]})

    def _say(self, order: dict[str, Any]) -> None:
        if self._process is not None and self._process.stdin is not None and not self._process.stdin.is_closing():
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
