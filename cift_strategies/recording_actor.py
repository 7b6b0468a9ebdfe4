"""The actor that feeds a :class:`cift_strategies.recording.Recorder` on the node's loop."""

from __future__ import annotations

from typing import Any, Final

from nautilus_trader.common import DataActor, DataActorConfig
from nautilus_trader.model import ActorId

from cift_strategies.faults import Faults, guarded
from cift_strategies.recording import Recorder

FLUSH_NS: Final = 500_000_000


@guarded
class RecordingActor(DataActor):
    """Tells `recorder` twice a second to hand on what it has."""

    def __new__(cls, *_args: Any) -> RecordingActor:
        return super().__new__(cls)

    def __init__(self, recorder: Recorder, faults: Faults) -> None:
        super().__init__(DataActorConfig(actor_id=ActorId("CIFT-RECORDER")))
        self.recorder, self.faults = recorder, faults

    def on_start(self) -> None:
        self.clock.set_timer_ns("recording", FLUSH_NS, callback=self.on_flush)

    def on_flush(self, _event: Any) -> None:
        self.recorder.flush()
