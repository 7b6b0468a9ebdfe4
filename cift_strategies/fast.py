"""Fast mode: predictions made once, ahead, and traded by any number of runs that change only how they are traded.

:func:`record` streams a plan's part once, checks features against training to the last bit and writes what a strategy hears (each message's
mid, spread and touch) and the predictions into a folder; :class:`Recorded` maps it into memory, shared by all processes; :func:`trade`
runs the engine and the strategy on it. Orders are those of the streaming way: the same callbacks at the same stamps, the same draws of
latency, in the same order. What is left out is what changes nothing: messages and abstentions heard while nothing is open.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
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
from cift_strategies.backtest import Plan, blocks, delay
from cift_strategies.faults import Faults, guarded
from cift_strategies.feature_actor import FeatureActor, subscribe
from cift_strategies.inference_actor import Delay, InferenceActor, LookAhead
from cift_strategies.messages import FEATURES, FeatureVector, Prediction
from cift_strategies.outcome import Traded
from cift_strategies.strategy import EnsembleStrategy
from cift_strategies.system import Replay, run_backtest, strategy_class

type I64 = NDArray[np.int64]

MESSAGE: Final = np.dtype([
    ("ts", "i8"), ("mid", "f8"), ("spread", "f8"),
    ("bid", "i8"), ("ask", "i8"),  # sizes at the touch when a batch of the instrument closed last
    ("before", "i8"), ("closes", "i4"),  # batches of the instrument closed before this message, and in it
    ("instrument", "i4"),
])  # fmt: skip
FLUSH: Final = 100_000  # messages held while recording


class Glance(NamedTuple):
    """What a strategy hears of a message in fast mode: a :class:`FeatureVector` without its events and rows."""

    instrument: int
    ts: int
    mid: float
    spread: float
    closes: int  # how many batches close in it
    touch: tuple[int, int]  # as of the last close
    before: int  # batches of the instrument closed before it

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
        self._held: list[tuple[int, float, float, int, int, int, int, int]] = []
        self._before, self._touch = Counter[int](), dict[int, tuple[int, int]]()

    def on_start(self) -> None:
        self.subscribe_topic(FEATURES, self.on_features)

    def on_features(self, message: object) -> None:
        v = cast(FeatureVector, message)
        self._ahead.predict(v)
        k, closes = v.instrument, len(v.closes)
        if closes:
            self._touch[k] = v.touch
        self._held.append((v.ts, v.mid, v.spread, *self._touch.get(k, (0, 0)), self._before[k], closes, k))
        self._before[k] += closes
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
            for name, rows in predictions._asdict().items():
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
        instrument, closes = np.fromfile(part / "instrument.bin", np.int64), messages["closes"]
        message = np.empty(len(instrument), np.int64)
        for k in range(n):
            heard = np.flatnonzero(messages["instrument"] == k)
            np.save(part / f"heard-{k}.npy", heard)
            np.save(part / f"of-{k}.npy", np.flatnonzero(instrument == k))
            message[instrument == k] = np.repeat(heard, closes[heard])
        np.save(part / "message.npy", message)
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
        self.ts, self.closes, self.instrument = (memoryview(self.messages[name]) for name in ("ts", "closes", "instrument"))
        self.predictions = Predictions(**arrays)
        n = len(told["instruments"])
        self.heard: list[I64] = [_loaded(folder / f"heard-{k}.npy") for k in range(n)]  # messages of each instrument
        self.of: list[I64] = [_loaded(folder / f"of-{k}.npy") for k in range(n)]  # its predictions
        self.message: I64 = _loaded(folder / "message.npy")  # (m,) in which each prediction's batch closed
        self.model_version: str = told["model_version"]
        self.q, self.ns = tuple(told["latency"]["q"]), tuple(told["latency"]["ns"])

    def glance(self, n: int) -> Glance:
        ts, mid, spread, bid, ask, before, closes, instrument = self.messages[n].item()
        return Glance(instrument, ts, mid, spread, closes, (bid, ask), before)


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
        self._found: list[tuple[int, Glance | None]] = [(-1, None)] * len(recorded.heard)  # `at` when it was looked up last, and the answer

    def __getitem__(self, k: int) -> Glance | None:
        at, found = self._found[k]
        if at != self.at:
            heard = self._recorded.heard[k]
            i = int(heard.searchsorted(self.at, "right"))
            found = self._recorded.glance(int(heard[i - 1])) if i else None
            self._found[k] = self.at, found
        return found

    def __setitem__(self, k: int, heard: Glance) -> None:
        """The strategy has got the message that was published."""
        self.at = self.coming


class _Touch:
    """Stands for `EnsembleStrategy.touch`."""

    def __init__(self, last: _Last) -> None:
        self._last = last

    def __getitem__(self, k: int) -> int:
        heard = self._last[k]
        return 0 if heard is None else min(heard.touch)

    def __setitem__(self, k: int, size: int) -> None:
        """It is that of the message heard."""


class _Answers:
    """Answers each closed batch with the prediction that was recorded for it, and a latency drawn for this run."""

    def __init__(self, recorded: Recorded, wait: Delay) -> None:
        p = self.p = recorded.predictions
        self._version, self._of = recorded.model_version, recorded.of
        self.latency = wait.draw(p.ts, p.instrument)
        self.told = np.zeros(len(p.ts), np.bool_)

    def predict(self, vector: FeatureVector) -> Iterable[Prediction]:
        heard = cast(Glance, vector)
        return self.between(heard.instrument, heard.before, heard.before + heard.closes) if heard.closes else ()

    def open(self, heard: Glance, now: int) -> Iterable[Prediction]:
        """Those of the instrument of `heard`, its newest message, that are due after `now` and have not been told."""
        k, stop = heard.instrument, heard.before + heard.closes
        first = stop
        while first:
            i = self._of[k][first - 1]
            if self.told[i] or self.p.ts[i] + self.latency[i] <= now:
                break
            first -= 1
        return self.between(k, first, stop)

    def between(self, k: int, first: int, stop: int) -> list[Prediction]:
        return [self._one(k, i) for i in self._of[k][first:stop].tolist()]

    def _one(self, k: int, i: int) -> Prediction:
        p, self.told[i] = self.p, True
        return Prediction(
            k, int(p.ts[i]), int(self.latency[i]), HORIZONS_NS, p.proba[i], p.magnitude[i], p.confidence[i],
            tuple(p.direction[i].tolist()), int(p.regime[i]), p.votes[i], self._version,
        )  # fmt: skip


@guarded
class _Playback(DataActor):
    """Counts the messages that come and publishes what was recorded of those at `stops` (ascending); besides, while something is open, of
    those in which a batch closes and those at which it is marked to market."""

    def __new__(cls, *_args: Any) -> _Playback:
        return super().__new__(cls)

    def __init__(
        self, instruments: Sequence[Instrument], recorded: Recorded, strategy: EnsembleStrategy, stops: I64, faults: Faults
    ) -> None:
        super().__init__(DataActorConfig(actor_id=ActorId("CIFT-FEATURES")))
        self.faults, self._instruments, self._recorded = faults, instruments, recorded
        self._strategy, self._trades = strategy, strategy.trades
        self._n, self._stop, self._stops = -1, -1, iter(stops.tolist())
        self.last = _Last(recorded)
        strategy.last, strategy.touch = self.last, _Touch(self.last)  # type: ignore[assignment]

    def on_start(self) -> None:
        self._stop = next(self._stops, -1)
        subscribe(self, self._instruments)

    def on_book_deltas(self, message: Any) -> None:
        n, r = self._n + 1, self._recorded
        self._n = n
        if n == self._stop:
            self._stop = next(self._stops, -1)
        elif not any(self._trades) or (
            not r.closes[n] and (self._trades[r.instrument[n]] is None or r.ts[n] < self._strategy.next_mark)
        ):  # fmt: skip
            self.last.at = n
            return
        heard = r.glance(n)
        if heard.ts != message.ts_init:
            raise AssertionError(f"the stream is not the one that was recorded: message {n} is of {message.ts_init}, not {heard.ts}")
        self.last.coming = n
        self.publish_message(FEATURES, heard)

    on_trade = on_quote = on_book_deltas  # type: ignore[assignment]

    @property
    def heard(self) -> int:
        """Messages that came."""
        return self._n + 1


@guarded
class _Batched(InferenceActor):
    """Holds the predictions that the strategy acts upon and, while something is open, all of them. The others change nothing: they are
    counted at the end."""

    def __init__(self, answers: _Answers, last: _Last, faults: Faults, strategy: EnsembleStrategy) -> None:
        super().__init__(answers, faults)
        self._answers, self._last, self._strategy, self._open = answers, last, strategy, False

    def _deliver(self, now: int) -> None:
        super()._deliver(now)
        if self._open != (opened := any(self._strategy.trades)):
            self._open = opened
            if opened:  # what was left out and is still under way is held from now on: the venue is woken when it is due
                for heard in map(self._last.__getitem__, range(len(self._strategy.trades))):
                    for p in self._answers.open(heard, now) if heard is not None else ():
                        heapq.heappush(self._held, (p.due, self._arrived, p))
                        self._arrived += 1
                super()._deliver(now)

    def finish(self, end: int) -> None:
        """The stream has ended at `end` (ns): count what was due and left out."""
        a, s = self._answers, self._strategy
        rest = ~a.told & (a.p.ts + a.latency <= end)
        early = int((a.p.ts[rest] < s.terms.act_from).sum())
        for why, n in (("before the split", early), ("abstains", int(rest.sum()) - early)):
            if n:
                s.decisions[why] += n
        self.published += int(rest.sum())


def trade(p: Plan, recorded: Recorded, faults: Faults | None = None) -> Traded:
    """Trade `p.config`'s settings on what was recorded of the same plan; what the streaming way would have traded, to the last order.

    Raises what a callback of the strategy raised. A strategy of the user's own that overrides callbacks gets all that they would get.
    """
    c, terms = p.config, p.terms(REGIMES, faults or Faults())
    kind = EnsembleStrategy if c.strategy is None else strategy_class(c.strategy)
    strategy = kind(terms)
    answers = _Answers(recorded, delay(p, len(p.instruments), recorded.q, recorded.ns))
    batched = _ours(kind, "on_prediction", "decide", "renew")
    if not _ours(kind, "on_features"):
        stops = np.arange(len(recorded.messages))
    elif batched:
        predictions = recorded.predictions
        stops = np.unique(recorded.message[predictions.direction.any(axis=1) & (predictions.ts >= terms.act_from)])
    else:
        stops = np.unique(recorded.message)
    playback = _Playback(p.instruments, recorded, strategy, stops, terms.faults)
    inference = _Batched(answers, playback.last, terms.faults, strategy) if batched else InferenceActor(answers, terms.faults)
    _, node, _ = run_backtest(_Actors((playback, inference), strategy), _replay(p, terms.order_latency_ns), terms.faults)
    if playback.heard != len(recorded.messages):
        raise AssertionError(f"{playback.heard} messages came of {len(recorded.messages)} that were recorded")
    if isinstance(inference, _Batched):
        inference.finish(p.last)
    traded = Traded.by(strategy)
    node.dispose()
    return traded


def _ours(kind: type, *names: str) -> bool:
    return all(getattr(kind, n) is getattr(EnsembleStrategy, n) for n in names)
