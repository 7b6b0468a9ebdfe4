"""A market of one share that a test moves by hand: a file of orders, a gateway that plays it as far as it is told, a venue beside it."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np

from catalog.dbn import MBO
from catalog.events import F_LAST, SCALE, Instrument
from cift_strategies.feeds.gateway import Gateway
from cift_strategies.feeds.venue import DEMO_KEY, answer

ROOT: Final = Path(__file__).parents[2]
DAY: Final = dt.date(2024, 1, 2)
OPEN: Final = int(dt.datetime(2024, 1, 2, 15, tzinfo=dt.UTC).timestamp()) * SCALE
TICK: Final = SCALE // 100
SHARE: Final = Instrument("SHARE.XNAS", TICK, SCALE, 1.0, "USD", kind="equity", maker_fee=1e-5, taker_fee=3e-5, fee_per_unit=0.001)
STILL: Final = 1e-9  # a speed at which nothing happens
GUARD_S: Final = 60.0  # against hanging, nothing more
BID, ASK = 10_000, 10_001  # ticks, at the start
_dbn: Any = importlib.import_module("databento_dbn")


@dataclass
class Tape:
    """Records in ms after the open, prices in ticks, sizes in shares; begins with a book of 300 shares in three orders at each price."""

    rows: list[tuple[Any, ...]] = field(default_factory=list)
    ids: int = 0

    def __post_init__(self) -> None:
        for n in range(5):
            for _ in range(3):
                self.add(0, 1, BID - n, 100)
                self.add(0, -1, ASK + n, 100)

    def _put(self, ms: float, action: str, side: int, price: int, size: int, order_id: int, flags: int = F_LAST) -> None:
        ts, letter = OPEN + round(ms * 1e6), {1: "B", -1: "A", 0: "N"}[side]
        head, numbers = (14, 0xA0, 2, 1, ts), (order_id, price * TICK, size, flags, 0, ord(action), ord(letter))
        self.rows.append((*head, *numbers, ts, 0, len(self.rows) + 1))

    def add(self, ms: float, side: int, price: int, size: int) -> int:
        self.ids += 1
        self._put(ms, "A", side, price, size, self.ids)
        return self.ids

    def cancel(self, ms: float, order_id: int, size: int | None = None) -> None:
        side, price, left = orders(self.rows)[order_id]
        self._put(ms, "C", side, price, left if size is None else size, order_id)

    def trade(self, ms: float, aggressor: int, size: int) -> None:
        """Somebody takes `size` from the best orders of the other side, oldest first."""
        while size:
            other = {i: o for i, o in orders(self.rows).items() if o[0] == -aggressor}
            best = min(p * aggressor for _, p, _ in other.values())
            order_id, (side, price, left) = next((i, o) for i, o in other.items() if o[1] * aggressor == best)
            taken = min(left, size)
            self._put(ms, "T", aggressor, price, taken, 0, 0)
            self._put(ms, "F", side, price, taken, order_id, 0)
            self._put(ms, "C", side, price, taken, order_id)
            size -= taken

    def write(self, path: Path) -> Path:
        span = SimpleNamespace(symbol="1", start_date=DAY, end_date=DAY + dt.timedelta(days=1))
        midnight = OPEN // (86_400 * SCALE) * 86_400 * SCALE
        metadata = _dbn.Metadata(
            "XNAS.ITCH", midnight, _dbn.SType("raw_symbol"), _dbn.SType("instrument_id"), _dbn.Schema("mbo"), ["SHARE"],
            mappings=[SimpleNamespace(raw_symbol="SHARE", intervals=[span])], end=midnight + 86_400 * SCALE, version=_dbn.DBN_VERSION,
        )  # fmt: skip
        path.write_bytes(metadata.encode() + np.array(self.rows, MBO).tobytes())
        return path


def orders(rows: Sequence[tuple[Any, ...]]) -> dict[int, tuple[int, int, int]]:
    """Side, price in ticks and size of each order that is there after `rows`, oldest first."""
    found: dict[int, tuple[int, int, int]] = {}
    for row in rows:
        order_id, price, size, action, letter = row[5], row[6], row[7], chr(row[10]), chr(row[11])
        if action == "A":
            found[order_id] = (1 if letter == "B" else -1, price // TICK, size)
        elif action == "C":
            side, at, left = found[order_id]
            found[order_id] = (side, at, left - size)
            if size >= left:
                del found[order_id]
    return found


class Ear:
    """A line to the venue, spoken by hand: hears every report of the account."""

    def __init__(self, address: str, seen: int | None = 0, key: str = DEMO_KEY) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), GUARD_S)
        self._file = self._socket.makefile("rw", encoding="utf-8")
        greeting = self.line()
        self.say(do="login", answer=answer(greeting["challenge"], key), seen=seen)
        self.welcome, self.heard, self._numbers = self.line(), list[dict[str, Any]](), 0

    def line(self) -> dict[str, Any]:
        text = self._file.readline()
        if not text:
            raise EOFError("the venue has cut the line")
        return dict(json.loads(text))

    def say(self, **what: Any) -> None:
        self._file.write(json.dumps(what) + "\n")
        self._file.flush()

    def ask(self, **what: Any) -> dict[str, Any]:
        """Send a command; its answer. Reports that come meanwhile are heard."""
        self._numbers += 1
        self.say(id=self._numbers, **what)
        while (told := self.line()).get("answer") != self._numbers:
            self.heard.append(told["report"])
        return told

    def hear(self, true: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first report of which that is true, heard already or yet to come."""
        n = 0
        while True:
            while n < len(self.heard):
                if true(self.heard[n]):
                    return self.heard[n]
                n += 1
            told = self.line()
            if "report" in told:
                self.heard.append(told["report"])

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def order(client: str, side: int, size: int, price: int | None = None, **more: Any) -> dict[str, Any]:
    """As the line tells it: size in shares, price in ticks."""
    kind = "limit" if price is not None else "stop" if "trigger" in more else "market"
    if "trigger" in more:
        more["trigger"] *= TICK
    at = None if price is None else price * TICK
    return {"client": client, "instrument": SHARE.id, "side": side, "kind": kind, "size": size * SCALE, "price": at, **more}


class Stage:
    """The gateway, moved by :meth:`to`, and venue processes beside it."""

    def __init__(self, folder: Path, tape: Tape) -> None:
        self.folder, self.tape = folder, tape
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.gateway = Gateway([tape.write(folder / "share.mbo.dbn")], speed=STILL)
        self._do(self.gateway.start())
        (folder / "instruments.json").write_text(json.dumps([asdict(SHARE)]))
        self.venue, self._process = "", None
        self.open_venue()

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(GUARD_S)

    @property
    def live(self) -> str:
        return f"127.0.0.1:{self.gateway.port}"

    def open_venue(self, *options: str) -> None:
        """Start the venue's process, on the port and the books of before, and wait until it sees the market."""
        port = self.venue.rpartition(":")[2] or "0"
        asked = ["--gateway", self.live, "--dataset", "XNAS.ITCH", "--instruments", str(self.folder / "instruments.json")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cift_strategies.feeds.venue", *asked, "--port", port, "--books", str(self.folder / "books"), *options],
            cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert self._process.stdout is not None
        self.venue = json.loads(self._process.stdout.readline())["venue"]
        self.seen()

    def freeze_venue(self) -> None:
        """From now on it hears nothing, and its lines stay open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def kill_venue(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def ear(self, seen: int | None = 0) -> Ear:
        """A line; a venue that does not let us in for a while is tried again."""
        until = time.monotonic() + GUARD_S
        while True:
            try:
                return Ear(self.venue, seen)
            except (EOFError, ConnectionError):
                assert time.monotonic() < until

    def to(self, ms: float) -> None:
        """Let the market happen up to then, and the venue see it."""
        self._do(self._go(ms))
        self.seen()

    async def _go(self, ms: float) -> None:
        self.gateway.go(OPEN + round(ms * 1e6), STILL)

    def seen(self) -> None:
        """Wait until the venue's book is the tape's up to now."""
        now = self.gateway.clock.now()
        shown = [r for r in self.tape.rows if r[4] <= now]
        left = orders(shown).values()
        touch = [f(p for s, p, _ in left if s == side) / 100 for side, f in ((1, max), (-1, min))]
        ear, until = self.ear(None), time.monotonic() + GUARD_S
        while (told := ear.ask(do="status")["status"])["market"][SHARE.id] != touch or told["newest"] < shown[-1][4]:
            assert time.monotonic() < until, told
            threading.Event().wait(0.005)
        ear.close()

    async def _end(self) -> None:
        await self.gateway.stop()
        await asyncio.wait_for(asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True), GUARD_S)

    def close(self) -> None:
        self.kill_venue()
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextlib.contextmanager
def stage(folder: Path, tape: Tape) -> Iterator[Stage]:
    made = Stage(folder, tape)
    try:
        yield made
    finally:
        made.close()


class Actors:
    """The process of `venue_node.py`, that nodes are forked from."""

    def __init__(self) -> None:
        paths = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
        alone = {f"{n}_NUM_THREADS": "1" for n in ("OMP", "OPENBLAS", "MKL", "NUMBA")}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(Path(__file__).parent / "venue_node.py")], cwd=ROOT, text=True,
            env=os.environ | {"PYTHONPATH": paths} | alone, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

        self._living: Node | None = None

    def close(self) -> None:
        self._process.communicate()

    def node(self, stage: Stage, **how: Any) -> Node:
        self._living = Node(self._process, stage, how)
        return self._living

    def rest(self) -> None:
        """End whoever a test that failed has left alive."""
        if self._living is not None and self._living.alive:
            self._living.kill()


class Node:
    """One life of a node: :meth:`ask` it, :meth:`hear` what its strategy heard, :meth:`kill` it or :meth:`stop` it in order."""

    def __init__(self, process: subprocess.Popen[str], stage: Stage, how: dict[str, Any]) -> None:
        self._process, self.stage, self.heard, self.alive = process, stage, list[dict[str, Any]](), True
        assert process.stdin is not None and process.stdout is not None
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(GUARD_S)
            asked = {"state": str(stage.folder / "state"), "live": stage.live, "venue": stage.venue, "port": server.getsockname()[1], **how}
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            self.pid = int(process.stdout.readline())
            self._socket, _ = server.accept()
        self._socket.settimeout(GUARD_S)
        self._file = self._socket.makefile("rw", encoding="utf-8")
        self.said = self._line()["said"]

    def _line(self) -> dict[str, Any]:
        text = self._file.readline()
        if not text:
            raise EOFError("the node is gone")
        return dict(json.loads(text))

    def ask(self, do: str, **how: Any) -> Any:
        self._file.write(json.dumps({"do": do, **how}) + "\n")
        self._file.flush()
        while "answer" not in (told := self._line()):
            self.heard.append(told)
        assert not isinstance(told["answer"], dict) or "error" not in told["answer"], told
        return told["answer"]

    def hear(self, event: str, role: str | None = None, times: int = 1) -> dict[str, Any]:
        """The event of that name and role, for the `times`-th time since the node began."""
        while True:
            found = [h for h in self.heard if h["event"] == event and role in (None, h["role"])]
            if len(found) >= times:
                return found[times - 1]
            self.heard.append(self._line())

    def until(self, true: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """Its status, once that is so."""
        until = time.monotonic() + GUARD_S
        while not true(status := self.ask("status")):
            assert time.monotonic() < until, status
            threading.Event().wait(0.005)
        return dict(status)

    def ready(self) -> dict[str, Any]:
        """Wait until it has seen the market, and what it goes on with is under its care."""
        return self.until(lambda s: s["seen"] and not s["waits"])

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self._ended() == -signal.SIGKILL

    def stop(self) -> dict[str, Any]:
        """End it in order; how it was then."""
        self._file.write('{"do": "stop"}\n')
        self._file.flush()
        while "ended" not in (told := self._line()):
            self.heard.append(told)
        assert self._ended() == 0
        return dict(told["ended"])

    def _ended(self) -> int:
        assert self._process.stdout is not None
        code, self.alive = int(self._process.stdout.readline()), False
        self._file.close()
        self._socket.close()
        return code
