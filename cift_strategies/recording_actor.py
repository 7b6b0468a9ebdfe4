"""The actor that feeds a :class:`cift_strategies.recording.Recorder` on the node's loop; and whom a replay listens with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from nautilus_trader.common import DataActor, DataActorConfig
from nautilus_trader.model import ActorId

from cift_strategies.faults import Faults, guarded
from cift_strategies.messages import FEATURES, PREDICTIONS, SIGNALS
from cift_strategies.recording import Recorder

FLUSH_NS: Final = 500_000_000


@guarded
class RecordingActor(DataActor):
    """Tells `recorder` of predictions as they are delivered and of signals, and twice a second to hand on what it has."""

    def __new__(cls, *_args: Any) -> RecordingActor:
        return super().__new__(cls)

    def __init__(self, recorder: Recorder, faults: Faults) -> None:
        super().__init__(DataActorConfig(actor_id=ActorId("CIFT-RECORDER")))
        self.recorder, self.faults = recorder, faults

    def on_start(self) -> None:
        self.subscribe_topic(PREDICTIONS, self.on_prediction)
        self.subscribe_topic(SIGNALS, self.on_decided)
        self.clock.set_timer_ns("recording", FLUSH_NS, callback=self.on_flush)

    def on_prediction(self, message: object) -> None:
        self.recorder.prediction(message)

    def on_decided(self, message: object) -> None:
        self.recorder.signal(message)

    def on_flush(self, _event: Any) -> None:
        self.recorder.flush()


@guarded
class ReplayActor(DataActor):
    """After each message that all others have seen, `turn(self)`; at the start too. `signal` gets each signal."""

    def __new__(cls, *_args: Any) -> ReplayActor:
        return super().__new__(cls)

    def __init__(self, turn: Callable[[Any], object], faults: Faults) -> None:
        super().__init__(DataActorConfig(actor_id=ActorId("CIFT-REPLAY")))
        self._turn, self.faults = turn, faults
        self.signal: Callable[[Any], object] = lambda _message: None

    def on_start(self) -> None:
        self.subscribe_topic(FEATURES, self.on_features)
        self.subscribe_topic(SIGNALS, self.on_decided)
        self._turn(self)

    def on_features(self, _message: object) -> None:
        self._turn(self)

    def on_decided(self, message: object) -> None:
        self.signal(message)

    def at(self, name: str, ts: int, action: Callable[[], object]) -> None:
        """Do `action` when the clock says `ts`."""
        self.clock.set_time_alert_ns(name, ts, callback=self.faults.guard(lambda _event: action()))
