"""A running node on its loop: what ends it, the kill switch's three ways in, and how it is wound down."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from cift_strategies.live_config import LiveConfig

if TYPE_CHECKING:
    from cift_strategies.serving import Serving
    from cift_strategies.system import System

FLAT_S: Final = 10  # for positions to be closed at the end
KILL_EVERY_S: Final = 0.01  # between two looks for the kill file


@dataclass(slots=True)
class Session:
    """A running node with all that belongs to it."""

    config: LiveConfig
    system: System
    serving: Serving
    switches: Any
    watch: Any
    node: Any
    ends: int | None  # when a replay's stream ends, ns
    display: Any = None
    kills: Sequence[str] = ()  # asked for by signal before it ran
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    why: str = ""

    def stop(self, why: str) -> None:
        self.why = self.why or why
        self.stopping.set()

    async def run(self) -> None:
        """Run the node until it is told to stop, the time is up, the replay ends, or a callback fails."""
        loop, faults = asyncio.get_running_loop(), self.system.strategy.faults
        self.serving.connect(loop.call_soon_threadsafe, faults.guard(self.system.inference.accept))
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled, signal.Signals(number).name)
        loop.add_signal_handler(signal.SIGUSR1, lambda: self.switches.kill("SIGUSR1"))
        for why in self.kills:
            self.switches.kill(why)
        running = loop.create_task(self.node.run_async(), name="node")
        running.add_done_callback(lambda _: self.stop("the node ended"))
        tasks = [loop.create_task(work) for work in (self._kill_file(), self._show(), self._end())]
        try:
            await self.stopping.wait()
            self.switches.stop(self.why)
            if not running.done():
                await self._wind_down()
        finally:
            for task in tasks:
                task.cancel()
            self.node.handle().stop()
            await asyncio.wait([running], timeout=30)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                loop.remove_signal_handler(number)
        if running.done() and running.exception() is not None:
            raise running.exception()  # type: ignore[misc]

    def _signalled(self, name: str) -> None:
        if self.stopping.is_set():
            self.node.handle().stop()
        self.stop(name)

    async def _wind_down(self) -> None:
        strategy = self.system.strategy
        if self.config.at_end == "keep" or strategy.faults.first is not None:
            return
        strategy.flatten("session ends")
        until = time.monotonic() + FLAT_S
        while not strategy.flat and time.monotonic() < until:
            await asyncio.sleep(0.05)
        if not strategy.flat:
            self.display.say("some positions could not be closed and are kept")

    async def _kill_file(self) -> None:
        path, seen = str(self.config.state / "kill"), False
        while True:
            there = os.path.exists(path)
            if there and not seen:
                self.switches.kill(f"the file {path} is there")
            seen = there
            await asyncio.sleep(KILL_EVERY_S)

    async def _show(self) -> None:
        while True:
            await asyncio.sleep(self.display.every_s)
            self.display.show()

    async def _end(self) -> None:
        began, faults = time.monotonic(), self.system.strategy.faults
        while True:
            await asyncio.sleep(0.05)
            if faults.first is not None:
                self.stop("a callback failed")
            elif self.config.duration is not None and time.monotonic() - began >= self.config.duration:
                self.stop(f"{self.config.duration:g} s have passed")
            elif self.ends is not None and self.watch.newest >= self.ends:
                self.stop("the replay has ended")
