"""Fast mode: predictions made once, ahead, and traded by any number of runs that change only how they are traded.

:func:`record` streams a plan's part once, checks features against training to the last bit and writes what a strategy hears (each message's
mid, spread and touch) and the predictions into a folder; :class:`Recorded` maps it into memory, shared by all processes; :func:`trade`
runs the engine and the strategy on it. Orders are those of the streaming way: the same callbacks at the same stamps, the same draws of
latency, in the same order. What is left out is what changes nothing: messages and abstentions heard while nothing is open.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import numpy as np
from nautilus_trader.common import DataActor, DataActorConfig
from nautilus_trader.model import ActorId
from numpy.typing import NDArray

from catalog.events import Instrument
from catalog.progress import Steps
from catalog.whole import replacing
from cift_models.hmm import REGIMES
from cift_models.inference import Engine, Predictions
from cift_models.windows import HORIZONS_NS, Block
from cift_strategies.backtest import Plan, Traded, _traded, blocks, delay
from cift_strategies.faults import Faults, guarded
from cift_strategies.feature_actor import FeatureActor, subscribe
from cift_strategies.inference_actor import Delay, InferenceActor, LookAhead
from cift_strategies.messages import FEATURES, PREDICTIONS, FeatureVector, Prediction
from cift_strategies.strategy import EnsembleStrategy
from cift_strategies.system import Replay, run_backtest, strategy_class

type I64 = NDArray[np.int64]

MESSAGE: Final = np.dtype([
    ("ts", "i8"), ("mid", "f8"), ("spread", "f8"), ("bid", "i8"), ("ask", "i8"),  # sizes at the touch: told where a batch closes
    ("closes", "i4"), ("instrument", "i4"),
])  # fmt: skip
FLUSH: Final = 100_000  # messages held while recording


class Glance(NamedTuple):
    """What a strategy hears of a message in fast mode: a :class:`FeatureVector` without its events and rows."""

    instrument: int
    ts: int
    mid: float
    spread: float
    closes: int  # how many batches close in it
    touch: tuple[int, int]

    @property
    def rows(self) -> NDArray[np.float64]:
        """Raises RuntimeError: a strategy that looks at features needs the streaming way."""
        raise RuntimeError("fast mode tells mid, spread and touch alone: a strategy that looks at features needs fast = false in the sweep")

    @property
    def events(self) -> NDArray[Any]:
        return self.rows


# --- recording ------------------------------------------------------------------------------------------------------------------------


class _Raw:
    """Arrays that grow in files of their bytes."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._files, self.told = folder, dict[str, Any](), dict[str, dict[str, Any]]()

    def push(self, name: str, rows: NDArray[Any]) -> None:
        if name not in self._files:
            self._files[name] = (self._folder / f"{name}.bin").open("wb")
            self.told[name] = {"dtype": np.lib.format.dtype_to_descr(rows.dtype), "each": list(rows.shape[1:]), "rows": 0}
        self._files[name].write(np.ascontiguousarray(rows).tobytes())
        self.told[name]["rows"] += len(rows)

    def close(self) -> None:
        for f in self._files.values():
            f.close()


@guarded
class _Recorder(DataActor):
    """Asks `ahead` about each vector, which checks its features, and keeps what a strategy would hear of it."""

    def __new__(cls, *_args: Any) -> _Recorder:
        return super().__new__(cls)

    def __init__(self, ahead: LookAhead, raw: _Raw, faults: Faults) -> None:
        super().__init__(DataActorConfig(actor_id=ActorId("CIFT-RECORDER")))
        self.faults, self._ahead, self._raw = faults, ahead, raw
        self._held: list[tuple[int, float, float, int, int, int, int]] = []

    def on_start(self) -> None:
        self.subscribe_topic(FEATURES, self.on_features)

    def on_features(self, message: object) -> None:
        v = cast(FeatureVector, message)
        self._ahead.predict(v)
        self._held.append((v.ts, v.mid, v.spread, *v.touch, len(v.closes), v.instrument))
        if len(self._held) == FLUSH:
            self.flush()

    def flush(self) -> None:
        self._raw.push("messages", np.array(self._held, MESSAGE))
        self._held.clear()


@dataclass(frozen=True, slots=True)
class _Actors:
    actors: Sequence[Any]
    strategy: Any = None

    def add_to(self, add_actor: Callable[[Any], object], add_strategy: Callable[[Any], object]) -> None:
        for a in self.actors:
            add_actor(a)
        if self.strategy is not None:
            add_strategy(self.strategy)


def record(p: Plan, engine: Engine, out: Path) -> Path:
    """Predict the plan's part and write what is heard of it into the folder `out`, whole or not at all."""
    with replacing(out) as part, Steps("predict", p.streamed, "events") as steps:
        raw, n, faults = _Raw(part), len(p.instruments), Faults()

        def sink(block: Block, predictions: Predictions, _latency: I64) -> None:
            for name, rows in zip(predictions._fields, predictions):
                raw.push(name, rows)
            steps.advance(len(block.events))

        ahead = LookAhead(blocks(p, p.start, p.last), engine, Delay(n, 0, 0), HORIZONS_NS, n, sink)
        recorder = _Recorder(ahead, raw, faults)
        actors = _Actors((FeatureActor(p.instruments, faults), recorder))
        _, node, _ = run_backtest(actors, _replay(p), faults)
        node.dispose()
        ahead.finish()
        recorder.flush()
        raw.close()
        told = {
            "arrays": raw.told, "instruments": [x.id for x in p.instruments], "model_version": engine.model_version,
            "members": list(engine.members), "latency": {"q": list(engine.latency.q), "ns": list(engine.latency.ns)},
        }  # fmt: skip
        messages = np.memmap(part / "messages.bin", MESSAGE, "r", shape=(raw.told["messages"]["rows"],))
        np.save(part / "stops.npy", np.flatnonzero(messages["closes"]))
        for k in range(n):
            np.save(part / f"heard-{k}.npy", np.flatnonzero(messages["instrument"] == k))
        (part / "manifest.json").write_text(json.dumps(told, indent=1) + "\n")
    return out


def _replay(p: Plan, order_latency_ns: int = 0) -> Replay:
    return Replay(p.root, p.instruments, p.start, p.last, p.config.limits.capital, order_latency_ns, p.config.chunk_size)


# --- playing ------------------------------------------------------------------------------------------------------------------------


class Recorded:
    """What :func:`record` has written, mapped into memory: processes that read it share its pages."""

    def __init__(self, folder: Path) -> None:
        told = json.loads((folder / "manifest.json").read_text())
        arrays = {name: _mapped(folder / f"{name}.bin", a) for name, a in told["arrays"].items()}
        self.messages: NDArray[Any] = arrays.pop("messages")
        self.predictions = Predictions(**arrays)
        self.stops: I64 = _loaded(folder / "stops.npy")  # messages in which batches close
        n = len(told["instruments"])
        self.heard: list[I64] = [_loaded(folder / f"heard-{k}.npy") for k in range(n)]  # messages of each instrument
        self.model_version: str = told["model_version"]
        self.q, self.ns = tuple(told["latency"]["q"]), tuple(told["latency"]["ns"])

    def glance(self, n: int) -> Glance:
        ts, mid, spread, bid, ask, closes, instrument = self.messages[n].item()
        return Glance(instrument, ts, mid, spread, closes, (bid, ask))


def _mapped(path: Path, told: dict[str, Any]) -> NDArray[Any]:
    d = told["dtype"]
    dtype, shape = np.dtype(d if isinstance(d, str) else [tuple(x) for x in d]), (told["rows"], *told["each"])
    return np.asarray(np.memmap(path, dtype, "r", shape=shape)) if told["rows"] else np.empty(shape, dtype)


def _loaded(path: Path) -> I64:
    return np.asarray(np.load(path, mmap_mode="r"))


class _Last:
    """Stands for `EnsembleStrategy.last`: the newest message of an instrument that the strategy has heard, looked up when it is asked."""

    def __init__(self, recorded: Recorded) -> None:
        self._recorded, self.at, self.coming = recorded, -1, -1

    def __getitem__(self, k: int) -> Glance | None:
        heard = self._recorded.heard[k]
        i = int(np.searchsorted(heard, self.at, "right"))
        return self._recorded.glance(int(heard[i - 1])) if i else None

    def __setitem__(self, k: int, heard: Glance) -> None:
        """The strategy has got the message that was published."""
        self.at = self.coming


class _Answers:
    """Answers each closed batch with the prediction that was recorded for it, and a latency drawn for this run."""

    def __init__(self, recorded: Recorded, wait: Delay) -> None:
        p = recorded.predictions
        self._p, self._version = p, recorded.model_version
        self._latency = wait.draw(p.ts, p.instrument)
        self._of = [np.flatnonzero(p.instrument == k) for k in range(len(recorded.heard))]
        self._next = [0] * len(self._of)

    def predict(self, vector: FeatureVector) -> Iterable[Prediction]:
        k, n = vector.instrument, cast(int, vector.closes)
        if not n:
            return ()
        first = self._next[k]
        self._next[k] += n
        return [self._one(k, int(i)) for i in self._of[k][first : first + n]]

    def _one(self, k: int, i: int) -> Prediction:
        p = self._p
        return Prediction(
            k, int(p.ts[i]), int(self._latency[i]), HORIZONS_NS, p.proba[i], p.magnitude[i], p.confidence[i],
            tuple(p.direction[i].tolist()), int(p.regime[i]), p.votes[i], self._version,
        )  # fmt: skip


@guarded
class _Playback(DataActor):
    """Counts the messages that come and publishes what was recorded of them: all of them, or (`quiet`) those in which a batch closes and
    those that come while something is open."""

    def __new__(cls, *_args: Any) -> _Playback:
        return super().__new__(cls)

    def __init__(self, instruments: Sequence[Instrument], recorded: Recorded, strategy: EnsembleStrategy, quiet: bool, faults: Faults) -> None:
        super().__init__(DataActorConfig(actor_id=ActorId("CIFT-FEATURES")))
        self.faults, self._instruments, self._recorded, self._trades = faults, instruments, recorded, strategy.trades
        self._quiet, self._n, self._stop, self._stops = quiet, -1, -1, iter(recorded.stops.tolist())
        self._last = _Last(recorded)
        strategy.last = self._last  # type: ignore[assignment]

    def on_start(self) -> None:
        self._stop = next(self._stops, -1)
        subscribe(self, self._instruments)

    def on_book_deltas(self, message: Any) -> None:
        n = self._n = self._n + 1
        if n == self._stop:
            self._stop = next(self._stops, -1)
        elif self._quiet and not any(self._trades):
            self._last.at = n
            return
        heard = self._recorded.glance(n)
        if heard.ts != message.ts_init:
            raise AssertionError(f"the stream is not the one that was recorded: message {n} is of {message.ts_init}, not {heard.ts}")
        self._last.coming = n
        self.publish_message(FEATURES, heard)

    on_trade = on_quote = on_book_deltas

    @property
    def heard(self) -> int:
        """Messages that came."""
        return self._n + 1


@guarded
class _Batched(InferenceActor):
    """Sets no alert for predictions that abstain while nothing is open: they change nothing, and go out with what comes next."""

    def __init__(self, predictor: Any, faults: Faults, strategy: EnsembleStrategy) -> None:
        super().__init__(predictor, faults)
        self._strategy, self._acting = strategy, list[int]()  # heap of the due times of those that do not abstain

    def accept(self, predictions: Iterable[Prediction]) -> None:
        for p in predictions:
            if any(p.direction):
                heapq.heappush(self._acting, p.due)
            heapq.heappush(self._held, (p.due, self._arrived, p))
            self._arrived += 1
        self._deliver(self.clock.timestamp_ns())

    def _deliver(self, now: int) -> None:
        held, acting = self._held, self._acting
        while held and held[0][0] <= now:
            self.published += 1
            self.publish_message(PREDICTIONS, heapq.heappop(held)[2])
        while acting and acting[0] <= now:
            heapq.heappop(acting)
        if due := held if any(self._strategy.trades) else acting:
            first = due[0] if due is acting else held[0][0]
            if first < self._alert:
                self._alert = first
                self._alerts += 1
                self.clock.set_time_alert_ns(f"due-{self._alerts}", first, callback=self.on_due)

    def finish(self, end: int) -> None:
        """The stream has ended at `end` (ns): count what was due."""
        while self._held and self._held[0][0] <= end:
            self.published += 1
            self._strategy.on_prediction(heapq.heappop(self._held)[2])


def trade(p: Plan, recorded: Recorded, faults: Faults | None = None) -> Traded:
    """Trade `p.config`'s settings on what was recorded of the same plan; what the streaming way would have traded, to the last order.

    Raises what a callback of the strategy raised. A strategy of the user's own that overrides callbacks gets all that they would get.
    """
    c, terms = p.config, p.terms(REGIMES, faults or Faults())
    kind = EnsembleStrategy if c.strategy is None else strategy_class(c.strategy)
    strategy = kind(terms)
    predictor = _Answers(recorded, delay(p, len(p.instruments), recorded.q, recorded.ns))
    playback = _Playback(p.instruments, recorded, strategy, _ours(kind, "on_features"), terms.faults)
    batched = _ours(kind, "on_prediction", "decide", "renew")
    inference = _Batched(predictor, terms.faults, strategy) if batched else InferenceActor(predictor, terms.faults)
    _, node, _ = run_backtest(_Actors((playback, inference), strategy), _replay(p, terms.order_latency_ns), terms.faults)
    if playback.heard != len(recorded.messages):
        raise AssertionError(f"{playback.heard} messages came of {len(recorded.messages)} that were recorded")
    if isinstance(inference, _Batched):
        inference.finish(p.last)
    traded = _traded(strategy)
    node.dispose()
    return traded


def _ours(kind: type, *names: str) -> bool:
    return all(getattr(kind, n) is getattr(EnsembleStrategy, n) for n in names)
