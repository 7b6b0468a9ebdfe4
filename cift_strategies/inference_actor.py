"""The inference actor: feature vectors in, predictions out, each delivered when its computing would have been done.

Who predicts is a value: :class:`LookAhead` answers from blocks of the stream that is being replayed, predicted ahead of it; a rule
answers from the row itself; a live engine answers later through :meth:`InferenceActor.accept`. The actor does not know which.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from nautilus_trader.common import DataActor, DataActorConfig
from nautilus_trader.model import ActorId
from numpy.typing import NDArray

from cift_strategies.faults import Faults, guarded
from cift_strategies.messages import FEATURES, PREDICTIONS, FeatureVector, Prediction
from cift_strategies.pace import Clock, Pace, timed

if TYPE_CHECKING:
    from cift_models.inference import Predictions
    from cift_models.windows import Block


class Predictor(Protocol):
    def predict(self, vector: FeatureVector) -> Iterable[Prediction]:
        """The predictions of the batches that close in `vector`, if they are known already."""


class Delay:
    """How long inference takes: a fixed time, or drawn from a distribution `of quantiles `q` in [0, 1] with their `ns`.

    Each instrument has one queue: a prediction is not ready before its predecessor is. The draws depend on the seed and on the
    number of the batch within its instrument, so neither blocks nor grouping change them.
    """

    def __init__(self, instruments: int, seed: int, fixed_ns: int | None = None, q: Sequence[float] = (), ns: Sequence[float] = ()) -> None:
        if fixed_ns is None and (len(q) < 2 or len(q) != len(ns)):
            raise ValueError("a delay needs a fixed time, or at least two quantiles")
        self.fixed, self._q, self._ns = fixed_ns, np.asarray(q, np.float64), np.asarray(ns, np.float64)
        self._streams = [np.random.default_rng([seed, k]) for k in range(instruments)]
        self._ready = np.full(instruments, np.iinfo(np.int64).min)

    def draw(self, ts: NDArray[np.int64], instrument: NDArray[Any]) -> NDArray[np.int64]:
        """Latency (m,) of batches closed at `ts` (ascending), the wait for the predecessor included; ns."""
        out = np.empty(len(ts), np.int64)
        for k in np.unique(instrument):
            mine = np.flatnonzero(instrument == k)
            if self.fixed is None:
                took = np.interp(self._streams[k].random(len(mine)), self._q, self._ns).astype(np.int64)
            else:
                took = np.full(len(mine), self.fixed, np.int64)
            ready = np.maximum(np.maximum.accumulate(ts[mine] + took), self._ready[k])
            self._ready[k] = ready[-1]
            out[mine] = ready - ts[mine]
        return out


class LookAhead:
    """Predicts the stream block by block, ahead of its replay, and answers each closed batch with its prediction.

    `blocks` gives the same stream as the replay, with features; `engine.predict(block)` its predictions. An answer is given only if
    the batch's time and its feature row agree with the block's to the last bit: a difference means that the replayed features are not
    those of training, and raises. `sink` gets every block once, in order, with its predictions and their latency (m,) in ns.
    """

    def __init__(
        self,
        blocks: Iterator[Block],
        engine: Any,
        delay: Delay,
        horizons_ns: Sequence[int],
        instruments: int,
        sink: Callable[[Block, Predictions, NDArray[np.int64]], object] = lambda _block, _predictions, _latency: None,
    ) -> None:
        self._blocks, self.engine, self._delay, self._sink = blocks, engine, delay, sink
        self._horizons = tuple(horizons_ns)
        self._queues: list[deque[tuple[bytes, Prediction]]] = [deque() for _ in range(instruments)]

    def predict(self, vector: FeatureVector) -> Iterable[Prediction]:
        if not vector.closes:
            return ()
        queue = self._queues[vector.instrument]
        found = []
        for i in vector.closes:
            while not queue:
                self._more()
            row, prediction = queue.popleft()
            if prediction.ts != vector.events["ts_init"][i] or row != vector.rows[i].tobytes():
                raise AssertionError(_difference(vector, i, row, prediction))
            found.append(prediction)
        return found

    def finish(self) -> None:
        """Predict what is left of the stream, so that the sink has all of it."""
        while self._more(needed=False):
            pass

    def _more(self, needed: bool = True) -> bool:
        block = next(self._blocks, None)
        if block is None:
            if needed:
                raise AssertionError("a batch closed that the blocks of the stream do not have")
            return False
        p: Predictions = self.engine.predict(block)
        latency = self._delay.draw(p.ts, p.instrument)
        self._sink(block, p, latency)
        version, horizons = self.engine.model_version, self._horizons
        columns = zip(
            p.instrument.tolist(), p.ts.tolist(), latency.tolist(), p.proba, p.magnitude, p.confidence, map(tuple, p.direction.tolist()),
            p.regime.tolist(), p.votes, block.rows[block.closes],
        )  # fmt: skip
        for k, t, latency_ns, proba, magnitude, confidence, direction, regime, votes, row in columns:
            one = Prediction(k, t, latency_ns, horizons, proba, magnitude, confidence, direction, regime, votes, version)
            self._queues[k].append((row.tobytes(), one))
        return True


def _difference(vector: FeatureVector, i: int, row: bytes, prediction: Prediction) -> str:
    from cift_models.features import NAMES

    ahead, here = np.frombuffer(row), vector.rows[i]
    names = [n for n, a, b in zip(NAMES, ahead.view(np.int64), here.view(np.int64)) if a != b]
    return (
        f"parity is broken: instrument {vector.instrument}, batch at {vector.events['ts_init'][i]} (ahead: {prediction.ts}): "
        f"{', '.join(names[:5]) or 'the time'} differ between the replay and the actor"
    )


@guarded
class InferenceActor(DataActor):
    """Asks `predictor` about each feature vector and publishes each prediction at its due time."""

    def __new__(cls, *_args: Any) -> InferenceActor:
        return super().__new__(cls)

    def __init__(self, predictor: Predictor, faults: Faults, pace: Pace | None = None) -> None:
        super().__init__(DataActorConfig(actor_id=ActorId("CIFT-INFERENCE")))
        self.predictor, self.faults, self.pace = predictor, faults, pace
        self.published = 0
        self.newest: dict[int, Prediction] = {}  # by instrument
        self._held: list[tuple[int, int, Prediction]] = []  # heap by due time, then order of arrival
        self._arrived = 0
        self._alert = 2**63 - 1  # earliest one that is set
        self._alerts = 0

    @property
    def time(self) -> Clock:
        return timed(self.clock, self.pace)

    def on_start(self) -> None:
        self.subscribe_topic(FEATURES, self.on_features)

    def on_features(self, message: object) -> None:
        found = self.predictor.predict(cast(FeatureVector, message))
        if found:
            self.accept(found)

    def accept(self, predictions: Iterable[Prediction]) -> None:
        """Hold `predictions` until they are due; what is due already goes out at once."""
        now = self.time.timestamp_ns()
        for p in predictions:
            heapq.heappush(self._held, (p.due, self._arrived, p))
            self._arrived += 1
        self._deliver(now)

    def on_due(self, _event: Any) -> None:
        self._alert = 2**63 - 1
        self._deliver(self.time.timestamp_ns())

    def _deliver(self, now: int) -> None:
        held = self._held
        while held and held[0][0] <= now:
            self.published += 1
            p = heapq.heappop(held)[2]
            self.newest[p.instrument] = p
            self.publish_message(PREDICTIONS, p)
        if held and held[0][0] < self._alert:
            self._alert = held[0][0]
            self._alerts += 1
            self.time.set_time_alert_ns(f"due-{self._alerts}", self._alert, callback=self.on_due)
