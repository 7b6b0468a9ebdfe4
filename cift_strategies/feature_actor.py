"""The feature actor: each callback's records through the translator and the features kernel, published before the next callback.

The same kernel as `cift_models.features.replay` uses for training, on the same EVENT rows: what it publishes is equal to the last bit,
however Nautilus groups the deltas.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from nautilus_trader.common import DataActor, DataActorConfig
from nautilus_trader.model import ActorId, BookType, OrderBookDeltas, QuoteTick, TradeTick
from numpy.typing import NDArray

from catalog.book import BASE, CAP, LEVELS
from catalog.events import EVENT, Instrument
from cift_models.features import NAMES, State, new_state
from cift_models.windows import closes, new_batches
from cift_strategies.faults import Faults, guarded
from cift_strategies.messages import FEATURES, FeatureVector
from cift_strategies.translate import Translator

ROWS = 4_096  # feature rows of a block of memory; written once


def _touch(book: NDArray[np.int64]) -> tuple[int, int]:
    """Sizes at the best bid and ask of a book of `catalog.book` (the last entry of each side); 0 where a side is empty."""
    base, asks = int(book[BASE]), int(book[BASE] + 3 * book[CAP])
    m, n = int(book[LEVELS]), int(book[LEVELS + 1])
    return int(book[base + 3 * m - 2]) if m else 0, int(book[asks + 3 * n - 2]) if n else 0


@guarded
class FeatureActor(DataActor):
    """Subscribes the deepest feed of each instrument and its trades; publishes a FeatureVector for every callback."""

    def __new__(cls, *_args: Any) -> FeatureActor:
        return super().__new__(cls)

    def __init__(self, instruments: Sequence[Instrument], faults: Faults) -> None:
        super().__init__(DataActorConfig(actor_id=ActorId("CIFT-FEATURES")))
        self.instruments, self.faults = list(instruments), faults
        self.translator = Translator(instruments)
        self.states = {k: new_state(x) for k, x in enumerate(instruments)}
        self.batches = new_batches(len(self.instruments))
        self.vectors = 0  # feature rows published
        self._rows: NDArray[np.float64] = np.empty((ROWS, len(NAMES)))
        self._used = 0

    def on_start(self) -> None:
        new_state(self.instruments[0]).advance(np.zeros(1, EVENT), np.empty((1, len(NAMES))))  # compiles before the first event
        closes(new_batches(1), np.zeros(1, EVENT))
        for id_, k in self.translator.index.items():
            level = self.instruments[k].level
            if level == 1:
                self.subscribe_quotes(id_)
            else:
                self.subscribe_book_deltas(id_, BookType.L3_MBO if level == 3 else BookType.L2_MBP)
            self.subscribe_trades(id_)

    def on_book_deltas(self, deltas: OrderBookDeltas) -> None:
        self._publish(self.translator.deltas(deltas))

    def on_trade(self, trade: TradeTick) -> None:
        self._publish(self.translator.trade(trade))

    def on_quote(self, quote: QuoteTick) -> None:
        self._publish(self.translator.quote(quote))

    def _publish(self, events: NDArray[Any]) -> None:
        n, k = len(events), int(events["instrument"][0])
        if self._used + n > len(self._rows):
            self._rows, self._used = np.empty((max(ROWS, n), len(NAMES))), 0
        rows = self._rows[self._used : self._used + n]
        self._used += n
        self.states[k].advance(events, rows)
        self.vectors += n
        ends = tuple(closes(self.batches, events).tolist())
        touch = _touch(self.states[k].words) if ends else (0, 0)
        self.publish_message(FEATURES, FeatureVector(k, int(events["ts_init"][-1]), events, rows, ends, touch))

    def on_save(self) -> dict[str, bytes]:
        """Books, features and open batches, so that a stream can be cut here and gone on with by another actor."""
        file = io.BytesIO()
        words = {f"state-{k}": s.words for k, s in self.states.items()}
        np.savez(file, allow_pickle=False, batches=self.batches, ids=np.array([x.id for x in self.instruments]), **words)
        return {"features": file.getvalue()}

    def on_load(self, state: dict[str, bytes]) -> None:
        with np.load(io.BytesIO(state["features"]), allow_pickle=False) as z:
            if z["ids"].tolist() != [x.id for x in self.instruments]:
                raise ValueError(f"the state is of {', '.join(z['ids'].tolist())}, not of {', '.join(x.id for x in self.instruments)}")
            self.batches = z["batches"]
            self.states = {k: State(x, z[f"state-{k}"]) for k, x in enumerate(self.instruments)}
