"""A node for the server's tests: frames of a real backtest, told over a real link, and a server process on the other end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tapes import MS, SHARE

from catalog.errors import InputError
from catalog.events import Instrument
from cift_strategies.faults import Faults
from cift_strategies.monitor import Monitor
from cift_strategies.risk import Limits
from cift_strategies.server.link import Link
from cift_strategies.server.supervisor import Supervisor
from cift_strategies.settings import Settings
from cift_strategies.strategy import Terms
from cift_strategies.stream import Span
from cift_strategies.system import Replay, System, assemble, run_backtest

GUARD_S = 60.0  # against hanging, nothing more


@dataclass
class Collector:
    """Takes what a link takes; `deaf` frames are numbers of polls at which it is not ready."""

    deaf: Callable[[int], bool] = lambda _: False
    messages: list[dict[str, Any]] = field(default_factory=list)
    command: Any = None
    fresh: bool = True
    dropped: int = 0
    commands: int = 0
    connected: bool = True
    polls: int = 0

    @property
    def ready(self) -> bool:
        return not self.deaf(self.polls)

    def poll(self) -> None:
        self.polls += 1

    def close(self) -> None:
        self.connected = False

    def attach(self, loop: Any) -> None:
        raise AssertionError("a backtest has no loop")

    def send(self, message: dict[str, Any]) -> bool:
        if not self.ready:
            return False
        self.messages.append(json.loads(json.dumps(message, allow_nan=False)))
        return True


@dataclass(frozen=True, slots=True)
class Watched(System):
    monitor: Monitor

    def add_to(self, add_actor: Callable[[Any], object], add_strategy: Callable[[Any], object]) -> None:
        System.add_to(self, add_actor, add_strategy)
        add_actor(self.monitor)


def watch(
    root: Path, predictor: Any, link: Any, settings: Settings | None = None, regimes: tuple[str, ...] = (),
    instruments: Sequence[Instrument] = (SHARE,), span: tuple[int, int] | None = None, strategy: str | None = None,
    trail: Path | None = None,
) -> Watched:  # fmt: skip
    """A backtest with a monitor on it."""
    faults = Faults()
    first, last = span or (Span(root, instruments).first, Span(root, instruments).last)
    terms = Terms(instruments, settings or Settings(flat_before_close_s=0), Limits(), regimes, order_latency_ns=MS, faults=faults)
    system = assemble(terms, predictor, strategy)
    watched = Watched(system.features, system.inference, system.strategy, Monitor(system, None, link, trail=trail))
    _, node, _ = run_backtest(watched, Replay(root, instruments, first, last, 1_000_000.0, MS), faults)
    node.dispose()
    if watched.monitor.first_error is not None:
        raise watched.monitor.first_error
    return watched


class Node:
    """Tells `messages` of a backtest over a link, one after the other, whenever :meth:`tell` is called; polls in a thread meanwhile."""

    def __init__(self, folder: Path, messages: list[dict[str, Any]], run: str = "first") -> None:
        self.folder, self.run = folder, run
        self.messages = messages
        self.at = 0
        self.commands: list[tuple[str, dict[str, Any]]] = []
        self.state = messages[0]["node"]["state"]
        self.answer: Callable[[str, dict[str, Any]], Any] = self._obey
        self.link = Link(folder / "link.sock", self._command)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def _poll(self) -> None:
        while not self._stop.wait(0.02):
            with self._lock:
                self.link.poll()
                if self.link.ready and self.link.fresh:
                    self._send(self.whole())

    def _send(self, frame: dict[str, Any]) -> None:
        if self.link.send({**frame, "run": self.run, "node": {**frame["node"], "state": self.state}}):
            self.link.fresh = False

    def whole(self) -> dict[str, Any]:
        """A snapshot with all the logs up to the present frame."""
        told = self.messages[: self.at + 1]
        logs: dict[str, Any] = {"prices": {}, "pnl": {}}
        for frame in told:
            for name, new in frame["logs"].items():
                if isinstance(new, dict):
                    for key, points in new.items():
                        logs[name].setdefault(key, []).extend(points)
                elif name == "orders":
                    logs[name] = list({o["id"]: o for o in [*logs.get(name, []), *new]}.values())
                else:
                    logs.setdefault(name, []).extend(new)
        weights = next((f["weights"] for f in reversed(told) if f["weights"]), None)
        return {**told[-1], "kind": "snapshot", "info": self.messages[0]["info"], "weights": weights, "logs": logs}

    def tell(self, frames: int = 1) -> None:
        """Send the next frames, each as soon as the one before has been read."""
        for _ in range(frames):
            self.at += 1
            until = time.monotonic() + GUARD_S
            while time.monotonic() < until:
                with self._lock:
                    if self.link.ready and not self.link.fresh:
                        self._send(self.messages[self.at % len(self.messages)] | {"seq": self.at + 1})
                        break
                self._stop.wait(0.001)

    def _command(self, name: str, args: dict[str, Any]) -> Any:
        self.commands.append((name, args))
        return self.answer(name, args)

    def _obey(self, name: str, args: dict[str, Any]) -> Any:
        if name == "reload":
            told: Future[dict[str, Any]] = Future()
            if "bad" in args["path"]:
                told.set_exception(InputError(f"{args['path']}/manifest.json is missing"))
            else:
                told.set_result({"version": "v2", "path": args["path"], "members": {"hmm": "kept"}})
            return told
        self.state = {"pause": "paused", "resume": "running", "kill": "killed"}[name]
        return {"state": self.state}

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.link.close()


@dataclass
class Served:
    """A server process beside a node."""

    node: Node
    supervisor: Supervisor
    token: str
    http: httpx.Client

    @property
    def url(self) -> str:
        return self.supervisor.url

    @property
    def bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def until(self, true: Callable[[], Any]) -> Any:
        """The first true answer of `true`, asked again and again; fails when that takes too long."""
        until = time.monotonic() + GUARD_S
        pause = threading.Event()
        while time.monotonic() < until:
            try:
                if found := true():
                    return found
            except httpx.TransportError:
                pass
            pause.wait(0.02)
        raise AssertionError("it did not happen")

    def ready(self) -> None:
        self.until(lambda: self.http.get("/ready").status_code == 200)


@contextmanager
def serving(folder: Path, messages: list[dict[str, Any]], *arguments: str, silent_s: float = 10.0) -> Iterator[Served]:
    """A node with a server, ready."""
    node = Node(folder, messages)
    supervisor = Supervisor(node.link, folder, 0, arguments, silent_s=silent_s)
    try:
        told = supervisor.start()
        with httpx.Client(base_url=told["url"], timeout=GUARD_S) as http:
            served = Served(node, supervisor, Path(told["token_file"]).read_text().strip(), http)
            served.ready()
            yield served
    finally:
        supervisor.stop()
        node.close()
