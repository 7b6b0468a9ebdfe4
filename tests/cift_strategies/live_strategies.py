"""Strategies that do something to their own session, named by import path in the live tests."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from own_strategies import Eager


class Trips(Eager):
    """Makes the kill file appear, whose path is in CIFT_KILL, once it is in its fifth trade."""

    def decide(self, p: Any) -> Any:
        if self.signals >= 5 and any(self.trades):
            Path(os.environ["CIFT_KILL"]).touch()
        return super().decide(p)


class Timed(Eager):
    """Writes of each prediction its instrument, its event's stamp, and how long after the event had come to the node, and after it had
    happened, it was decided on (wall-clock ns) to the file in CIFT_TIMED, (n, 4) int64, when the session ends."""

    def __init__(self, terms: Any) -> None:
        super().__init__(terms)
        self.came: dict[tuple[int, int], int] = {}  # instrument and stamp of what closes a batch -> time.monotonic_ns
        self.timed: list[tuple[int, int, int, int]] = []
        self.decided = (0, 0)  # time.monotonic_ns and time.time_ns of the newest decision, before anything is done about it

    def decide(self, p: Any) -> Any:
        told = super().decide(p)
        self.decided = time.monotonic_ns(), time.time_ns()
        return told

    def on_features(self, message: Any) -> None:
        now = time.monotonic_ns()
        for i in message.closes:
            self.came[message.instrument, int(message.events["ts_init"][i])] = now
        super().on_features(message)

    def on_prediction(self, message: Any) -> None:
        self.decided = (0, 0)
        super().on_prediction(message)
        at, wall = self.decided if self.decided[0] else (time.monotonic_ns(), time.time_ns())  # not asked while it cannot enter
        key = message.instrument, message.ts
        self.timed.append((*key, at - self.came.pop(key), wall - self.terms.pace.wall(message.ts)))

    def on_stop(self) -> None:
        super().on_stop()
        np.save(os.environ["CIFT_TIMED"], np.array(self.timed, np.int64))


class Fails(Eager):
    """Raises at the first order that is accepted."""

    def on_order_event(self, event: Any) -> None:
        super().on_order_event(event)
        if type(event).__name__ == "OrderAccepted":
            raise ArithmeticError("a fault of the strategy")


class Tripped(Eager):
    """Trips the kill switch by its file again and again, while it has orders and the models' process is stopped; writes how long it took
    from the file's appearing to the last cancel's being sent (ns, a line each) to the file in CIFT_TRIPS, and goes on when it is flat."""

    def __init__(self, terms: Any) -> None:
        super().__init__(terms)
        self.kill, self.trips = Path(os.environ["CIFT_KILL"]), Path(os.environ["CIFT_TRIPS"])
        self.pid = 0
        self.touched = self.cancelled = 0

    def on_features(self, message: Any) -> None:
        super().on_features(message)
        if self.touched and "killed" in self.halts and self.flat:
            with self.trips.open("a") as file:
                file.write(f"{self.cancelled - self.touched}\n")
            self.kill.unlink()
            self.touched = 0
            os.kill(self.pid, signal.SIGCONT)
            threading.Timer(0.1, self.halts.pop, ("killed", None)).start()  # the file's going has to be seen
        elif not self.touched and not self.halts and all(self.trades):
            self.pid = next(p.pid or 0 for p in multiprocessing.active_children() if p.name == "cift-inference")
            os.kill(self.pid, signal.SIGSTOP)
            self.touched = -1
            threading.Timer(random.uniform(0.0, 0.02), self._touch).start()  # at any moment of the loop's turn

    def _touch(self) -> None:
        self.touched = time.perf_counter_ns()
        self.kill.touch()

    def cancel_order(self, *args: Any, **named: Any) -> None:
        super().cancel_order(*args, **named)
        self.cancelled = time.perf_counter_ns()
