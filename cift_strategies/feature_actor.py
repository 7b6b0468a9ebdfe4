"""The feature actor: each callback's records through :class:`cift_strategies.intake.Intake`, published before the next callback.

The same kernel as `cift_models.features.replay` uses for training, on the same EVENT rows: what it publishes is equal to the last bit,
however Nautilus groups the deltas.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from nautilus_trader.common import DataActor, DataActorConfig
from nautilus_trader.model import ActorId, BookType, InstrumentId, OrderBookDeltas, QuoteTick, TradeTick

from catalog.events import Instrument
from cift_models.features import State
from cift_strategies.faults import Faults, guarded
from cift_strategies.intake import Intake, warm
from cift_strategies.messages import FEATURES, FeatureVector
from cift_strategies.pace import Pace


def subscribe(actor: DataActor, instruments: Sequence[Instrument]) -> None:
    """The deepest feed of each of `instruments` and its trades."""
    for x in instruments:
        id_ = InstrumentId.from_str(x.id)
        if x.level == 1:
            actor.subscribe_quotes(id_)
        else:
            actor.subscribe_book_deltas(id_, BookType.L3_MBO if x.level == 3 else BookType.L2_MBP)
        actor.subscribe_trades(id_)


@guarded
class FeatureActor(DataActor):
    """Subscribes the deepest feed of each instrument and its trades; publishes a FeatureVector for every callback."""

    def __new__(cls, *_args: Any) -> FeatureActor:
        return super().__new__(cls)

    def __init__(self, instruments: Sequence[Instrument], faults: Faults, pace: Pace | None = None, restamp: bool = False) -> None:
        super().__init__(DataActorConfig(actor_id=ActorId("CIFT-FEATURES")))
        self.instruments, self.faults, self.pace = list(instruments), faults, pace
        self.intake = Intake(instruments, restamp)
        self.vectors = 0  # feature rows published

    @property
    def states(self) -> dict[int, State]:
        """Book and features by instrument."""
        return self.intake.states

    def on_start(self) -> None:
        warm(self.instruments[0])
        subscribe(self, self.instruments)

    def on_book_deltas(self, deltas: OrderBookDeltas) -> None:
        self._publish(self.intake.deltas(deltas))

    def on_trade(self, trade: TradeTick) -> None:
        self._publish(self.intake.trade(trade))

    def on_quote(self, quote: QuoteTick) -> None:
        self._publish(self.intake.quote(quote))

    def _publish(self, vector: FeatureVector) -> None:
        self.vectors += vector.stop - vector.first
        if self.pace is not None:
            self.pace.see(vector.ts)
        self.publish_message(FEATURES, vector)

    def on_save(self) -> dict[str, bytes]:
        """Books, features and open batches, so that a stream can be cut here and gone on with by another actor."""
        file = io.BytesIO()
        words = {f"state-{k}": s.words for k, s in self.states.items()}
        np.savez(file, allow_pickle=False, batches=self.intake.batches, ids=np.array([x.id for x in self.instruments]), **words)
        return {"features": file.getvalue()}

    def on_load(self, state: dict[str, bytes]) -> None:
        with np.load(io.BytesIO(state["features"]), allow_pickle=False) as z:
            if z["ids"].tolist() != [x.id for x in self.instruments]:
                raise ValueError(f"the state is of {', '.join(z['ids'].tolist())}, not of {', '.join(x.id for x in self.instruments)}")
            self.intake.restore({k: State(x, z[f"state-{k}"]) for k, x in enumerate(self.instruments)}, z["batches"])
