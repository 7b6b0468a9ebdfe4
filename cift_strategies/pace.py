"""Which time it is in the stream. A real feed's time is the wall's; a replay's runs `speed` times as fast, or as fast as it comes.

:class:`Pace` maps between the two; :class:`Paced` is a clock in the stream's time with the calls of Nautilus's clock that actors use, so
that neither actors nor strategy know which they have.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from typing import Any, Protocol


class Clock(Protocol):
    """What actors and strategy use of a clock; Nautilus's own fits."""

    def timestamp_ns(self) -> int: ...

    def set_time_alert_ns(self, name: str, alert_time_ns: int, callback: Callable[[Any], Any] | None = None) -> None: ...


class Pace:
    """`first_ns` of the stream is at `wall_ns`; from there its time runs `speed` times the wall's. `speed` 0: an unthrottled stream, whose
    time is the newest stamp :meth:`see` was told of. `wall_ns` 0: the stream begins with the first stamp that is seen. No stamp is of the
    future: one that seems so sets the clock.
    """

    __slots__ = ("_clock", "_due", "_newest", "_set", "first_ns", "speed", "wall_ns")

    def __init__(self, first_ns: int, wall_ns: int, speed: float, clock: Callable[[], int] = time.time_ns) -> None:
        self.first_ns, self.wall_ns, self.speed, self._clock, self._newest = first_ns, wall_ns, speed, clock, first_ns
        self._due: list[tuple[int, int, Callable[[Any], Any]]] = []  # alerts
        self._set = 0

    def see(self, ts: int) -> None:
        """An event of stamp `ts` has come: what is due by then and has not run yet, as on a loop that was held up, runs now."""
        if not self.wall_ns:
            self.first_ns, self.wall_ns, self._newest = ts, self._clock(), ts
        elif ts > self._newest:
            self._newest = ts
            if self.speed and ts > self.now():  # what was seen before it was held up on its way
                self.first_ns, self.wall_ns = ts, self._clock()
        while self._due and self._due[0][0] <= ts:
            heapq.heappop(self._due)[2](None)

    def alert(self, ts: int, callback: Callable[[Any], Any]) -> None:
        """Run `callback` when a stamp at or after `ts` is seen, if not before."""
        self._set += 1
        heapq.heappush(self._due, (ts, self._set, callback))

    def now(self) -> int:
        """The stream's time, ns."""
        if not self.wall_ns:
            return self.first_ns
        if not self.speed:
            return self._newest
        return self.first_ns + round((self._clock() - self.wall_ns) * self.speed)

    def stream(self, wall_ns: int) -> int:
        """The stream's time when the wall's was `wall_ns`, ns; of an unthrottled stream, its newest."""
        if not self.wall_ns or not self.speed:
            return self._newest
        return self.first_ns + round((wall_ns - self.wall_ns) * self.speed)

    def wall(self, ts: int) -> int:
        """When the stream's time is `ts` by the wall, ns; of an unthrottled stream, the soonest it can be: now."""
        if not self.wall_ns or not self.speed:
            return self._clock()
        return self.wall_ns + round((ts - self.first_ns) / self.speed)


class Paced:
    """`clock` as a clock in the stream's time."""

    __slots__ = ("_clock", "_pace")

    def __init__(self, clock: Clock, pace: Pace) -> None:
        self._clock, self._pace = clock, pace

    def timestamp_ns(self) -> int:
        return self._pace.now()

    def set_time_alert_ns(self, name: str, alert_time_ns: int, callback: Callable[[Any], Any] | None = None) -> None:
        once = _Once(callback or _nothing)
        self._pace.alert(alert_time_ns, once)
        if self._pace.speed:
            self._clock.set_time_alert_ns(name, self._pace.wall(alert_time_ns), once)


class _Once:
    """Calls what it is given the first time that it is called."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[[Any], Any]) -> None:
        self._call = call

    def __call__(self, event: Any) -> None:
        call, self._call = self._call, _nothing
        call(event)


def _nothing(_event: Any) -> None:
    pass


def timed(clock: Clock, pace: Pace | None) -> Clock:
    """`clock` itself where the stream's time is the clock's, else a clock in the time of `pace`."""
    return clock if pace is None else Paced(clock, pace)
