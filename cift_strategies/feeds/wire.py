"""The client's side of Databento's live protocol: one connection, from the challenge to whole records.

Takes an address, a key and a dataset; gives pieces of bytes that hold whole DBN records. What control messages look like is databento's own
(:mod:`databento.live.gateway`).
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncIterator
from typing import Any, Final

import numba
import numpy as np
from numpy.typing import NDArray

READ: Final = 1 << 18  # bytes taken at a time
CONNECT_S: Final = 10.0
GRACE_S: Final = 5.0  # a heartbeat may be so late


class RefusedError(Exception):
    """The gateway does not let us in; the message is its own."""


class BrokenError(ConnectionError):
    """The line is lost, silent, or brings what is no record."""


@numba.njit(cache=True)
def _cuts(data: NDArray[Any], at: NDArray[Any]) -> tuple[Any, Any, bool]:
    """Offsets of the whole records in `data` into `at`. Returns (records, bytes that they take, whether all are records)."""
    n, pos = 0, np.int64(0)
    while pos + 2 <= data.shape[0]:
        length = np.int64(data[pos]) * 4
        if length < 16:
            return n, pos, False
        if pos + length > data.shape[0]:
            break
        at[n] = pos
        n += 1
        pos += length
    return n, pos, True


class Wire:
    """An authenticated connection. Made by :func:`connect`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heartbeat_s: int) -> None:
        self._reader, self._writer, self._heartbeat_s = reader, writer, heartbeat_s
        self.metadata: Any = None

    def subscribe(self, schema: str, symbols: list[str], snapshot: bool = False, start: int | None = None) -> None:
        g: Any = importlib.import_module("databento.live.gateway")
        for n in range(0, len(symbols), 500):
            batch, last = symbols[n : n + 500], int(n + 500 >= len(symbols))
            asked = g.SubscriptionRequest(schema, "raw_symbol", ",".join(batch), start=start, snapshot=int(snapshot), is_last=last)
            self._writer.write(bytes(asked))

    def start(self) -> None:
        g: Any = importlib.import_module("databento.live.gateway")
        self._writer.write(bytes(g.SessionStart()))

    async def pieces(self) -> AsyncIterator[tuple[NDArray[Any], NDArray[Any]]]:
        """(bytes, offsets of the records in them), after the metadata. Raises BrokenError when there is nothing more to be had."""
        left = await self._head()
        while True:
            data = np.frombuffer(left, np.uint8)
            at = np.empty(len(data) // 16 + 1, np.int64)
            n, end, sound = _cuts(data, at)
            if n:
                yield data[:end], at[:n]
            if not sound:
                raise BrokenError("what came is no record")
            left = left[end:] + await self._more()

    async def _head(self) -> bytes:
        dbn: Any = importlib.import_module("databento_dbn")
        data = b""
        while len(data) < 8 or len(data) < 8 + int.from_bytes(data[4:8], "little"):
            data += await self._more()
            if data[:3] != b"DBN"[: len(data)]:
                raise BrokenError("what came is no DBN")
        size = 8 + int.from_bytes(data[4:8], "little")
        self.metadata = dbn.Metadata.decode(data[:size])
        return data[size:]

    async def _more(self) -> bytes:
        try:
            data = await asyncio.wait_for(self._reader.read(READ), self._heartbeat_s + GRACE_S)
        except TimeoutError:
            raise BrokenError(f"nothing came for {self._heartbeat_s + GRACE_S:.0f} s") from None
        except OSError as e:
            raise BrokenError(e.strerror or str(e)) from None
        if not data:
            raise BrokenError("the gateway closed the line")
        return data

    def close(self) -> None:
        self._writer.close()


async def connect(
    host: str, port: int, key: str, dataset: str, heartbeat_s: int = 10, slow_reader_behavior: str | None = None
) -> Wire:  # fmt: skip
    """Connect and answer the challenge. Raises RefusedError, or OSError and its kin where nobody answers."""
    cram: Any = importlib.import_module("databento.common.cram")
    g: Any = importlib.import_module("databento.live.gateway")
    async with asyncio.timeout(CONNECT_S):
        reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
        try:
            challenge = ""
            while not challenge:
                line = (await reader.readline()).decode()
                if not line:
                    raise BrokenError("the gateway closed the line")
                challenge = line.strip().removeprefix("cram=") if line.startswith("cram=") else ""
            answer = cram.get_challenge_response(challenge, key)
            slow = slow_reader_behavior
            asked = g.AuthenticationRequest(answer, dataset, heartbeat_interval_s=heartbeat_s, slow_reader_behavior=slow)
            writer.write(bytes(asked))
            told = dict(pair.partition("=")[::2] for pair in (await reader.readline()).decode().strip().split("|"))
            if told.get("success") != "1":
                raise RefusedError(told.get("error", "no answer"))
        except BaseException:
            writer.close()
            raise
    return Wire(reader, writer, heartbeat_s)
