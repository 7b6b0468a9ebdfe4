"""The WebSockets beside a node: what comes over them, in which order, and what becomes of who does not read."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from nodes import GUARD_S, Served, serving
from test_server import messages  # noqa: F401 - a fixture
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode
from websockets.streams import StreamReader

from cift_strategies.server import streams
from cift_strategies.server.__main__ import listen
from cift_strategies.server.mirror import TOGETHER, WAITING, Client, Mirror, framed


def test_a_stream_begins_with_a_snapshot_and_counts_what_follows(messages: list[dict[str, Any]], tmp_path: Path) -> None:  # noqa: F811
    symbol = messages[0]["info"][0]["symbol"]

    async def listen(s: Served) -> None:
        at = s.url.replace("http", "ws") + "/api/v1/predict/stream"
        async with connect(at) as everything, connect(f"{at}?symbols={symbol}") as one:
            first, only = json.loads(await everything.recv()), json.loads(await one.recv())
            assert first["type"] == only["type"] == "snapshot" and first["seq"] == only["seq"] == 1
            assert only["symbols"] == [symbol] and len(first["symbols"]) == 2
            await asyncio.to_thread(s.node.tell, 60)
            got: dict[Any, list[dict[str, Any]]] = {}
            for ws in (everything, one):
                got[ws] = []
                while not (got[ws] and got[ws][-1].get("prediction", {}).get("ts", 0) >= last(s, symbol)):
                    got[ws].append(json.loads(await ws.recv()))
                assert [m["seq"] for m in got[ws]] == list(range(2, len(got[ws]) + 2))
            assert {m[m["type"]]["symbol"] for m in got[one]} == {symbol}
            signals = [m["signal"] for m in got[one] if m["type"] == "signal"]
            told = [x for f in s.node.messages[1:61] for x in f["logs"].get("signals", []) if x["symbol"] == symbol]
            assert signals == told and signals

    def last(s: Served, symbol: str) -> int:
        return int(next(x["prediction"]["ts"] for x in s.node.messages[60]["instruments"] if x["symbol"] == symbol))

    with serving(tmp_path, messages) as s:
        asyncio.run(asyncio.wait_for(listen(s), GUARD_S))


@pytest.mark.parametrize("length", [0, 125, 126, 65_535, 65_536, 200_000])
def test_a_message_is_framed_as_the_protocol_wants_it(length: int) -> None:
    reader = StreamReader()
    reader.feed_data(framed(b"x" * length))
    with pytest.raises(StopIteration) as parsed:  # all was there: it never waited
        next(Frame.parse(reader.read_exact, mask=False))
    assert parsed.value.value == Frame(Opcode.TEXT, b"x" * length) and not reader.buffer


def test_a_client_is_cut_once_when_too_much_waits_however_long_its_first_message_was() -> None:
    written: list[bytes] = []
    cuts: list[None] = []
    waits = 0
    client = Client(written.append, lambda: waits, lambda: cuts.append(None))
    client.put(b"x" * 10 * WAITING)
    client.number(b'"a":1')
    client.number(b'"a":2')
    assert len(written) == 1
    client.flush()
    assert written[1:] == [framed(b'{"seq":1,"a":1}') + framed(b'{"seq":2,"a":2}')] and not cuts
    waits = WAITING + 1
    for _ in range(3):
        client.put(b"late")
    assert len(cuts) == 1 and len(written) == 2


def test_many_clients_are_told_in_groups_and_each_of_everything(messages: list[dict[str, Any]]) -> None:  # noqa: F811
    waits: list[Any] = []
    mirror = Mirror(later=lambda _, told: waits.append(told))
    written: list[list[bytes]] = [[] for _ in range(2 * TOGETHER + 1)]
    for lines in written:
        mirror.prediction_clients.add(Client(lines.append, lambda: 0, lambda: None))
    mirror.take(json.loads(json.dumps(messages[0])))
    assert sum(map(bool, written)) == TOGETHER and len(waits) == 1
    mirror.take(json.loads(json.dumps(messages[1])))  # more news before the others were told of the first
    while waits:
        waits.pop(0)()
    assert all(written) and len({b"".join(lines) for lines in written}) == 1


def test_frames_come_as_the_node_sent_them_and_an_unknown_instrument_ends_a_stream(messages: list[dict[str, Any]], tmp_path: Path) -> None:  # noqa: F811
    async def listen(s: Served) -> None:
        async with connect(s.url.replace("http", "ws") + "/api/v1/frames", max_size=None) as ws:
            whole = json.loads(await ws.recv())
            assert whole["kind"] == "snapshot" and whole["info"] == messages[0]["info"]
            await asyncio.to_thread(s.node.tell, 20)
            frames = [json.loads(await ws.recv()) for _ in range(20)]
            assert [f["seq"] for f in frames] == list(range(2, 22))
            assert [f["instruments"] for f in frames] == [m["instruments"] for m in s.node.messages[1:21]]
        async with connect(s.url.replace("http", "ws") + "/api/v1/predict/stream?symbols=NONE.XNAS") as ws:
            with pytest.raises(ConnectionClosed, match=r"no instrument NONE\.XNAS"):
                await ws.recv()

    with serving(tmp_path, messages) as s:
        asyncio.run(asyncio.wait_for(listen(s), GUARD_S))


def test_who_does_not_read_is_cut_off_and_told_so_and_others_lose_nothing(messages: list[dict[str, Any]], tmp_path: Path) -> None:  # noqa: F811
    async def until_cut(client: ClientConnection) -> AsyncIterator[Any]:
        with contextlib.suppress(ConnectionClosed):
            while True:
                yield await client.recv()

    async def listen(s: Served) -> None:
        at = s.url.replace("http", "ws") + "/api/v1/frames"
        async with connect(at, max_size=None) as keen, connect(at, max_size=None, max_queue=1) as lazy:
            assert json.loads(await keen.recv())["kind"] == "snapshot"
            seen = 1

            def cut() -> bool:
                return "cift_server_stream_clients_cut_total 1.0" in s.http.get("/metrics").text

            while not await asyncio.to_thread(cut):
                await asyncio.to_thread(s.node.tell, 50)
                for _ in range(50):
                    frame = json.loads(await keen.recv())
                    assert frame["seq"] == seen + 1
                    seen = frame["seq"]
            heard = [json.loads(text)["seq"] async for text in until_cut(lazy)]
            assert heard == list(range(1, len(heard) + 1))  # what was under way, whole and in order
            assert 1 < len(heard) < seen - WAITING / len(json.dumps(frame)) / 2  # what had waited here was thrown away
            assert (lazy.close_code, lazy.close_reason) == (1013, "too slow: messages were not read in time")

    with serving(tmp_path, messages) as s:
        asyncio.run(asyncio.wait_for(listen(s), GUARD_S))


def test_who_never_reads_is_gone_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "TELL_S", 0.01)

    async def serve() -> None:
        mirror, app = Mirror(), FastAPI()
        app.include_router(streams.router(mirror))
        server = uvicorn.Server(uvicorn.Config(app, ws=streams.Protocol, ws_per_message_deflate=False, lifespan="off", log_config=None))
        listener = listen("127.0.0.1", 0)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        port = listener.getsockname()[1]
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        head = f"GET /api/v1/frames HTTP/1.1\r\nHost: localhost:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        writer.write(f"{head}Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
        while not mirror.frame_clients:
            await asyncio.sleep(0)
        (client,) = mirror.frame_clients
        while not client.slow:
            client.put(framed(b"x" * WAITING))
            await asyncio.sleep(0)
        while mirror.frame_clients:
            await asyncio.sleep(0)
        assert mirror.cut == 1
        writer.transport.abort()
        server.should_exit = True
        await serving

    asyncio.run(asyncio.wait_for(serve(), GUARD_S))
