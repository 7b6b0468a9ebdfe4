"""What may be asked of a running node, and how it is: pause, resume, kill, reload, status; all on the node's loop.

:class:`Watch` is the actor that notices a silent feed, a late one, clocks that disagree and models that do not answer: each halts entries
for as long as it lasts, says so, and leaves exits alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

from nautilus_trader.common import DataActor, DataActorConfig
from nautilus_trader.model import ActorId, InstrumentId

from catalog import status
from cift_strategies.feeds.health import Health
from cift_strategies.serving import Serving
from cift_strategies.strategy import EnsembleStrategy
from cift_strategies.timings import Timing

EVERY_NS: Final = 100_000_000  # between two looks
MS: Final = 1_000_000


class Switches:
    """The controls of a live session, as :class:`monitor.Controls` wants them. `say` gets one line for every change of state."""

    def __init__(
        self, strategy: EnsembleStrategy, serving: Serving, watch: Watch, say: Callable[[str], object], about: Mapping[str, Any]
    ) -> None:  # fmt: skip
        self._strategy, self._serving, self._watch, self._say, self._about = strategy, serving, watch, say, about
        self.state, self.reason, self.kills = "starting", "", 0
        self._reload_error = ""

    def run(self) -> None:
        if self.state == "starting":
            self.state = "running"

    def pause(self) -> None:
        """No entries until resumed; positions are managed."""
        self._strategy.halt("paused", "paused")
        self._turn("paused", "by command")

    def resume(self) -> None:
        """Entries again, after a pause or a kill."""
        self._strategy.release("paused")
        self._strategy.release("killed")
        self._turn("running", "")

    def kill(self, reason: str) -> None:
        """Cancel everything, close every position, and no entries until resumed by hand."""
        self.kills += 1
        self._strategy.halt("killed", "kill switch")
        self._strategy.flatten("killed")
        self._turn("killed", reason)

    def stop(self, reason: str) -> None:
        """The session is ending: no entries any more."""
        self._strategy.halt("stopping", "stopping")
        self._turn("stopping", reason)

    def reload(self, path: Any) -> Future[dict[str, Any]]:
        """Swap the artifact at `path` in, between two batches; what came of it, or InputError, is in the future."""
        asked = self._serving.reload(Path(path))
        asked.add_done_callback(self._reloaded)
        return asked

    def _reloaded(self, asked: Future[dict[str, Any]]) -> None:
        error = asked.exception()
        self._reload_error = "" if error is None else str(error)
        self._say(f"models: {self._serving.engine.model_version}" if error is None else f"models kept: {error}")

    def _turn(self, state: str, reason: str) -> None:
        if self._strategy.terms.journal is not None and state != "stopping":
            self._strategy.terms.journal.switch(self._strategy.now(), state, reason)
        self.state, self.reason = state, reason
        self._say(f"{state}{': ' + reason if reason else ''}")

    def status(self) -> dict[str, Any]:
        """As :class:`server.schemas.Node`, `Feed`, `Models` and `Stage` have it, with what halts entries."""
        s, w = self._serving, self._watch
        depths = {f"queue_{name}": round(v) for name, v in s.depth.told().items() if name != "count" and v is not None}
        return {
            "state": self.state,
            "reason": self.reason or ", ".join(self._strategy.halts.values()),
            "halts": dict(self._strategy.halts),
            **self._about,
            "counts": {
                "skipped": s.skipped, "passed": s.passed, "queue": s.ring.waiting, "lost": s.lost, "batches": s.batches,
                "kills": self.kills, **depths,
            },
            "timings": {**s.timings, **w.timings},
            "feeds": [w.told()],
            "models": {"path": str(s.models.artifact), "reloads": s.reloads, "reload_error": self._reload_error or s.fault or ""},
        }


class Watch(DataActor):
    """Halts `strategy`'s entries while the feed is silent or late, clocks disagree, or the models do not answer.

    `late_ms`: by how much of the wall's time the newest event may lag; `ahead_ms`: by how much it may be early; `model_ms`: how long a
    batch may wait for its prediction. `silent` is told by Health. It passes on what the feed says of markets that open and halt;
    `restamp`: see Intake.
    """

    def __new__(cls, *_args: Any, **_named: Any) -> Watch:
        return super().__new__(cls)

    def __init__(
        self, strategy: EnsembleStrategy, serving: Serving, health: Health, name: str, say: Callable[[str], object],
        late_ms: float = 2_000.0, ahead_ms: float = 500.0, model_ms: float = 2_000.0, restamp: bool = False,
        venue: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(DataActorConfig(actor_id=ActorId("CIFT-WATCH")))
        self.strategy, self.serving, self.name, self._say = strategy, serving, name, say
        self.pace = strategy.terms.pace
        self.late_ms, self.ahead_ms, self.model_ms = late_ms, ahead_ms, model_ms
        self.health = health  # told by the feed's client
        self._places = {InstrumentId.from_str(x.id): k for k, x in enumerate(strategy.terms.instruments)}
        self._restamp = restamp
        self.venue = venue  # an execution client's link, that says since when its line is `lost`
        self.timings = {"receipt": Timing()}  # from the event's stamp to its features, by the wall; of the newest at each look
        self._lag_ns = self._seen = 0
        self.ends = 2**63 - 1  # when the stream ends, ns: silence after that is no fault

    def on_start(self) -> None:
        began = self.clock.timestamp_ns()
        for pulse in self.health.pulses:
            pulse.wall = pulse.wall or began
        self.clock.set_timer_ns("watch", EVERY_NS, callback=self.on_look)
        for id_ in self._places:
            self.subscribe_instrument_status(id_)

    def on_instrument_status(self, told: Any) -> None:
        """The market of an instrument opens, is in an auction, is halted or closes."""
        k, state = self._places[told.instrument_id], status.state_of(told.action.name, told.is_trading)
        if state is None or state == self.strategy.market.get(k, status.UNKNOWN):
            return
        ts = told.ts_event if self._restamp else told.ts_init
        if self.strategy.terms.pace is not None:
            self.strategy.terms.pace.see(ts)  # what is done about it is not done before it
        self.strategy.trading(k, state, ts)
        self.serving.trading(k, ts, state == status.OPEN)
        self._say(f"{told.instrument_id}: {status.STATES[state]}")

    @property
    def newest(self) -> int:
        """Stamp of the newest event, ns; 0 before the first."""
        return self.serving.newest

    def _lag(self, wall: int) -> int:
        """How late the newest event was when it came, by the wall; negative: it was early."""
        came, ts = wall - (time.perf_counter_ns() - self.serving.came), self.serving.newest
        if self.pace is None:
            return came - ts
        return round((self.pace.stream(came) - ts) / self.pace.speed) if self.pace.speed else 0

    def on_look(self, _event: Any) -> None:
        wall, s = self.clock.timestamp_ns(), self.serving
        if s.newest and s.came != self._seen:
            self._seen, self._lag_ns = s.came, self._lag(wall)
            self.timings["receipt"].add(max(0, self._lag_ns))
        quiet = self.health.quiet(wall) and self.newest < self.ends
        self._set("feed", quiet, f"feed {self.name} is silent")
        self._set("late", not quiet and self._lag_ns > self.late_ms * MS, f"feed {self.name} is late by {self._lag_ns / 1e9:.1f} s")
        self._set("clock", self._lag_ns < -self.ahead_ms * MS, f"the clock is behind the feed's by {-self._lag_ns / 1e9:.1f} s")
        self._set("venue", self.venue is not None and bool(self.venue.lost), getattr(self.venue, "lost", ""))
        hangs = s.silent_ns() > self.model_ms * MS
        self._set("model", s.fault is not None or hangs, s.fault or f"no prediction for {s.silent_ns() / 1e9:.1f} s")

    def _set(self, cause: str, wrong: bool, why: str) -> None:
        there = cause in self.strategy.halts
        if wrong:
            self.strategy.halt(cause, _plainly(why))
            if not there:
                self._say(f"no entries: {why}")
        elif there:
            self.strategy.release(cause)
            self._say(f"entries again: {cause} is well")

    def told(self) -> dict[str, Any]:
        """As :class:`server.schemas.Feed`."""
        h, wall = self.health, self.clock.timestamp_ns()
        pulses = h.pulses
        newest = max((p.wall for p in pulses), default=0)
        return {
            "name": self.name, "connected": not h.quiet(wall), "age_ms": (wall - newest) / MS if self.newest else None,
            "lag_ms": self._lag_ns / MS if self.newest else None, "events": sum(p.records for p in pulses),
            "reconnects": h.reconnects, "gaps": sum(p.gaps for p in pulses), "note": self.strategy.halts.get("feed", ""),
        }  # fmt: skip


def _plainly(why: str) -> str:
    """Without the number that changes from look to look: refusals are counted by their reason."""
    return why.split(" by ")[0].split(" for ")[0]
