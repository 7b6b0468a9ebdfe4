"""Predictions for programs: the live system's feed, features and models in the caller's asyncio loop, with nothing that trades.

    pipeline = InferencePipeline(PipelineConfig(symbols=["AAPL.XNAS"]))

    @pipeline.on_prediction
    async def told(result): ...

    await pipeline.start()

The same actors, models and feeds as `run_live.py`; without a key the demo market is replayed. An example: docs/examples/predictions.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from catalog.errors import InputError

if TYPE_CHECKING:
    from cift_strategies.live_config import LiveConfig
    from cift_strategies.messages import Prediction
    from cift_strategies.server.requests import Recommendation
    from cift_strategies.serving import Serving
    from cift_strategies.system import System

WAITING: Final = 1_024  # results that may wait for callbacks; beyond that the oldest are dropped and counted
READY_S: Final = 120.0  # for the models to be loaded
LOOK_S: Final = 0.05  # between two looks whether the replay has ended
STOP_S: Final = 30.0


class PipelineConfig(BaseModel):
    """What is predicted, from which feed. A key chooses its feed; without one a replay runs: of `dbn` files, or of the demo market."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    polygon_api_key: SecretStr | None = None
    databento_api_key: SecretStr | None = None
    feed: Literal["replay", "databento", "polygon"] | None = None  # None: by the key
    symbols: tuple[str, ...] = ()  # instruments; empty: all that the replay and the models know
    min_agreement: Annotated[int, Field(ge=0)] = 3  # members that have to tilt the predicted way for `should_trade`
    confidence_threshold: Annotated[float, Field(ge=0, le=1)] = 0.65  # least probability of the direction for `should_trade`
    artifacts: Path | None = None  # trained models; None: those of the demo, trained at the first start
    train: tuple[str, ...] | None = ("hmm", "fusion")  # members of the demo's models; None: all
    members: tuple[str, ...] = ()  # the user's own, "package.module:Class"
    dbn: tuple[Path, ...] = ()  # what is replayed
    dataset: str | None = None  # of Databento
    instruments: Path | None = None  # TOML with definitions
    speed: Annotated[float, Field(ge=0, le=1e6)] = 1.0  # of a replay; 0: as fast as it is read
    state: Path | None = None  # folder of the demo's models; None: a temporary one
    seed: Annotated[int, Field(ge=0)] = 7

    @property
    def source(self) -> Literal["replay", "databento", "polygon"]:
        """The feed."""
        by_key: Literal["replay", "databento", "polygon"] = (
            "polygon" if self.polygon_api_key else "databento" if self.databento_api_key else "replay"
        )
        return self.feed or by_key

    def live(self, state: Path) -> LiveConfig:
        """As a live session has it."""
        from cift_strategies.live_config import LiveConfig

        names = ("symbols", "artifacts", "train", "members", "dbn", "dataset", "instruments", "speed", "seed")
        return LiveConfig(feed=self.source, state=state, **{name: getattr(self, name) for name in names})


@dataclass(frozen=True, slots=True)
class PredictionResult:
    """One prediction, and what to do about it."""

    symbol: str
    ts: int  # of the newest event it saw, ns UTC
    total_latency_ms: float  # from that event to the callback, by the wall
    prediction: Recommendation  # should_trade, direction, magnitude, confidence, position_size, stop_loss, take_profit, risk_reward, ...
    model_version: str


type Callback = Callable[[PredictionResult], Awaitable[object] | object]


class InferencePipeline:
    """`start` runs until `stop`, or until a replay has ended. `delivered`: results that callbacks got; `dropped`: that came too fast."""

    def __init__(self, config: PipelineConfig | None = None) -> None:
        self.config = config or PipelineConfig()
        self.delivered = self.dropped = 0
        self._callbacks: list[Callback] = []
        self._results: asyncio.Queue[PredictionResult] = asyncio.Queue(WAITING)
        self._stopping = asyncio.Event()
        self._running = False

    def on_prediction[C: Callback](self, callback: C) -> C:
        """Decorator: `callback`, a function or a coroutine function, gets every result, one after the other."""
        self._callbacks.append(callback)
        return callback

    def stop(self) -> None:
        """End :meth:`start`, which returns once everything is put away; no callback gets anything more."""
        self._stopping.set()

    async def start(self) -> None:
        """Predict until :meth:`stop` or the replay's end. Raises InputError for what the user can mend, and what a callback raises."""
        if self._running:
            raise InputError("this pipeline runs already: make another one")
        self._running = True
        self._stopping.clear()
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(setattr, self, "_running", False)
            await self._run(stack)

    async def _run(self, stack: contextlib.AsyncExitStack) -> None:
        from cift_strategies import live
        from cift_strategies.faults import Faults
        from cift_strategies.feeds.health import Health
        from cift_strategies.live_config import KEYS, check
        from cift_strategies.live_models import prepare
        from cift_strategies.pace import Pace
        from cift_strategies.serving import Models, Serving

        for feed, key in (("polygon", self.config.polygon_api_key), ("databento", self.config.databento_api_key)):
            if key is not None:
                os.environ[KEYS[feed]] = key.get_secret_value()  # where the clients look for it
        state = self.config.state or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cift-")))
        config = self.config.live(state)
        check(config)
        ready = await asyncio.to_thread(prepare, config)
        beside, health, pace, last = live.Beside(), Health(ready.instruments), None, None
        stack.callback(beside.stop)
        if config.feed == "replay":
            client, told = await asyncio.to_thread(live.replay, config, ready, beside, health)
            pace, last = Pace(int(told["start"]), 0, config.speed), int(told["end"])
        else:
            client = live.real(config, ready, health)
        models = Models(ready.artifact.resolve(), tuple(ready.instruments), config.members, None, ready.altdata, config.seed)
        serving = Serving(models, time.time_ns if pace is None else pace.now)
        stack.callback(serving.close)
        await asyncio.to_thread(serving.ready.wait, READY_S)
        if serving.fault is not None:
            raise InputError(serving.fault)
        await self._predict(config, ready.instruments, client, serving, Faults(), pace, last)

    async def _predict(
        self, config: LiveConfig, table: Any, client: Any, serving: Serving, faults: Any, pace: Any, last: int | None
    ) -> None:
        from cift_models.hmm import REGIMES
        from cift_strategies.strategy import Terms
        from cift_strategies.system import assemble, live_node

        loop = asyncio.get_running_loop()
        terms = Terms(tuple(table), config.settings, config.limits, REGIMES, faults=faults, pace=pace)
        system = assemble(terms, serving, "cift_strategies.quiet:Quiet", client.restamp)
        system.strategy.heard = lambda p: self._heard(p, system, serving, config.speed)  # type: ignore[attr-defined]
        node = live_node(system, [client], [], True)
        serving.connect(loop.call_soon_threadsafe, faults.guard(system.inference.accept))
        running = loop.create_task(node.run_async(), name="node")
        tasks = [running, *(loop.create_task(t) for t in (self._stopping.wait(), self._call(), self._ended(system, faults, last)))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            node.handle().stop()
            await asyncio.wait([running], timeout=STOP_S)
            for task in tasks:
                task.cancel()
        faults.reraise()
        for task in tasks:
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error

    def _heard(self, p: Prediction, system: System, serving: Serving, speed: float) -> None:
        from cift_strategies.messages import MID, SPREAD
        from cift_strategies.recommendation import recommendation

        s, k = system.strategy, p.instrument
        vector = s.last[k]
        mid, spread = (float("nan"), float("nan")) if vector is None else vector.rows[-1, [MID, SPREAD]].tolist()
        x = s.terms.instruments[k]
        said = recommendation(
            p, x, mid, spread, serving.engine.members, s.terms.regimes, p.horizons_ns, self.config.min_agreement,
            self.config.confidence_threshold,
        )  # fmt: skip
        if self._results.full():
            self._results.get_nowait()
            self.dropped += 1
        self._results.put_nowait(PredictionResult(x.id, p.ts, p.latency_ns / 1e6 / (speed or 1.0), said, p.model_version))

    async def _call(self) -> None:
        while not self._stopping.is_set():
            result = await self._results.get()
            for callback in self._callbacks:
                answer = callback(result)
                if inspect.isawaitable(answer):
                    await answer
            self.delivered += 1

    async def _ended(self, system: System, faults: Any, last: int | None) -> None:
        while faults.first is None:
            newest = max((v.ts for v in system.strategy.last if v is not None), default=0)
            if last is not None and newest >= last and self._results.empty():
                return
            await asyncio.sleep(LOOK_S)
