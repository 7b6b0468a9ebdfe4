"""The socket between node and server: nothing that the other end does, or leaves undone, makes the node wait or fall."""

from __future__ import annotations

import asyncio
import contextlib
import json
import marshal
import os
import socket
import stat
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from catalog.errors import InputError
from cift_strategies.server.link import Early, Link, Reader, Refused, Unanswered

GUARD_S = 30.0


@pytest.fixture
def link(tmp_path: Path) -> Iterator[Link]:
    found = Link(tmp_path / "link.sock")
    yield found
    found.close()


def join(link: Link) -> socket.socket:
    """A server that has connected; it reads when the test says so."""
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(str(link.path))
    peer.settimeout(GUARD_S)
    link.poll()
    return peer


def receive(peer: socket.socket) -> Any:
    def exactly(n: int) -> bytes:
        got = b""
        while len(got) < n:
            got += peer.recv(n - len(got)) or pytest.fail("the link was closed")
        return got

    return marshal.loads(exactly(int.from_bytes(exactly(4), "little")))


def test_without_a_server_frames_go_nowhere_and_nothing_is_counted(link: Link) -> None:
    assert not link.ready and not link.send({"seq": 1}) and link.dropped == 0


def test_a_server_that_reads_nothing_costs_frames_and_no_time(link: Link) -> None:
    peer = join(link)
    frame = {"rows": [f"{n:0>1000}" for n in range(500)]}
    taken = sum(link.send(frame) for _ in range(200))
    assert 0 < taken < 20 and link.dropped == 200 - taken
    for _ in range(taken - 1):
        assert receive(peer) == frame
    while not link.ready:
        link.poll()
        peer.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            peer.recv(1 << 20)
    assert link.send({"seq": 1})  # as soon as it has read what it was sent
    peer.close()


def test_a_server_that_went_away_in_the_middle_of_a_frame_is_noticed(link: Link) -> None:
    peer = join(link)
    link.send({"rows": [f"{n:0>1000}" for n in range(5_000)]})
    assert not link.ready and link.connected
    peer.close()
    link.poll()
    assert not link.connected
    again = join(link)
    assert link.ready and link.fresh
    link.send({"seq": 2})
    assert receive(again) == {"seq": 2}
    again.close()


def test_a_new_server_takes_the_place_of_the_old_one(link: Link) -> None:
    old = join(link)
    link.fresh = False
    new = join(link)
    assert link.fresh and link.send({"seq": 1}) and receive(new) == {"seq": 1}
    assert old.recv(1) == b""
    old.close()
    new.close()


@pytest.mark.parametrize(
    "noise", [b"\n", b"{}\n", b"[1]\n", b"\xff\xfe\n", b'{"command":1}\n', b'{"id":1}\n', b"null\n", marshal.dumps({"a": 1}) + b"\n"]
)
def test_what_is_no_command_is_a_sign_of_life_and_nothing_more(link: Link, noise: bytes) -> None:
    link.command = lambda name, args: pytest.fail("that was no command")
    peer = join(link)
    peer.sendall(noise)
    link.poll()
    assert link.connected and link.commands == 0
    peer.close()


def test_a_flood_without_an_end_is_cut_off(link: Link) -> None:
    peer = join(link)
    peer.setblocking(False)
    for _ in range(100):
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            peer.sendall(b"x" * 65_536)
        link.poll()
    assert not link.connected
    peer.close()


def test_commands_are_answered_whatever_becomes_of_them(link: Link) -> None:
    later: Future[dict[str, Any]] = Future()

    def command(name: str, args: dict[str, Any]) -> Any:
        if name == "refuse":
            raise InputError("not today")
        if name == "fail":
            raise ZeroDivisionError("by zero")
        return later if name == "later" else {"got": args}

    link.command = command
    peer = join(link)
    for n, name in enumerate(("do", "refuse", "fail", "later")):
        peer.sendall(json.dumps({"id": n, "command": name, "args": {"a": 1}}).encode() + b"\n")
    link.poll()
    assert receive(peer) == {"reply": 0, "ok": True, "result": {"got": {"a": 1}}}
    assert receive(peer) == {"reply": 1, "ok": False, "refused": True, "error": "not today"}
    assert receive(peer) == {"reply": 2, "ok": False, "refused": False, "error": "ZeroDivisionError: by zero"}
    assert link.send({"seq": 1}) and receive(peer) == {"seq": 1}  # frames go on meanwhile
    later.set_result({"version": "v2"})
    link.poll()
    assert receive(peer) == {"reply": 3, "ok": True, "result": {"version": "v2"}}
    peer.close()


def test_only_the_owner_may_open_the_socket(link: Link) -> None:
    assert stat.S_IMODE(os.stat(link.path).st_mode) == 0o600


def test_a_folder_too_deep_for_a_socket_gets_one_elsewhere(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    link = Link(deep / "link.sock")
    assert len(str(link.path)) <= 100 and link.path.exists()
    peer = join(link)
    assert link.ready
    peer.close()
    link.close()
    link.close()
    assert not link.path.exists() and not link.path.parent.exists()


def test_a_reader_asks_and_is_told_when_nobody_answers(link: Link) -> None:
    link.command = lambda name, args: {"state": "paused"}

    async def ask() -> None:
        told: list[Any] = []
        reader = Reader(link.path, told.append)
        with pytest.raises(Unanswered, match="not connected"):
            await reader.ask("pause", {})
        reading = asyncio.create_task(reader.run())
        link.attach(asyncio.get_running_loop())  # from here on nobody has to poll
        while not reader.connected:
            await asyncio.sleep(0)
        assert await reader.ask("pause", {}) == {"state": "paused"}
        silent: Future[dict[str, Any]] = Future()
        link.command = lambda name, args: silent
        with pytest.raises(Unanswered, match="did not answer within"):
            await reader.ask("reload", {}, within=0.05)

        def refuse(_name: str, _args: dict[str, Any]) -> dict[str, Any]:
            raise InputError("no")

        link.command = refuse
        with pytest.raises(Refused, match="no"):
            await reader.ask("kill", {})
        asked = asyncio.create_task(reader.ask("reload", {}))
        link.command = lambda name, args: silent
        await asyncio.sleep(0)
        link.close()
        with pytest.raises((Unanswered, Refused)):
            await asked
        reading.cancel()

    asyncio.run(asyncio.wait_for(ask(), GUARD_S))


def test_before_there_is_a_node_a_kill_is_taken_and_all_else_refused(link: Link) -> None:
    """What comes once nobody listens for it any more waits for the node's loop."""
    kills = list[str]()
    early = Early(link, kills.append)

    async def ask() -> None:
        reader = Reader(link.path, lambda _: None)
        reading = asyncio.create_task(reader.run())
        while not reader.connected:
            await asyncio.sleep(0)
        assert await reader.ask("kill", {"reason": "it is wrong"}, GUARD_S) == {"state": "killed"}
        for command in ("pause", "resume", "reload"):
            with pytest.raises(Refused, match="the node is starting") as refused:
                await reader.ask(command, {"path": "models"}, GUARD_S)
            assert not refused.value.ours
        assert kills == ["it is wrong"]
        await asyncio.to_thread(early.stop)
        link.command = lambda name, args: {"state": f"{name} by the node"}
        link.attach(asyncio.get_running_loop())
        assert await reader.ask("kill", {}, GUARD_S) == {"state": "kill by the node"} and len(kills) == 1
        early.stop()
        reading.cancel()

    asyncio.run(ask())
