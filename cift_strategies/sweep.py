"""Many runs of one backtest: over a grid, at random or as a search proposes, on all cores or on Ray, gone on with wherever they stopped.

:func:`sweep` takes a file (`sweep_file.py`) and a folder. Models are trained and predictions made once for all runs that share them
(`fast.py`), each run's result is kept once under a digest of its configuration, data, models and code. What the best of so many is worth
is told by the deflated Sharpe ratio, the probability of backtest overfitting and a validation.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from catalog.errors import InputError
from catalog.whole import replacing, sha256, sha256_of
from cift_models.validate import groups, within
from cift_models.work import code_key, data_key, sources_of
from cift_strategies.backtest import Plan, RunConfig, alternative, delay, give_back, need_cuda, plan, resolve, stream
from cift_strategies.outcome import Traded
from cift_strategies.overfitting import sharpe
from cift_strategies.performance import changes
from cift_strategies.results import write_json
from cift_strategies.source import Source
from cift_strategies.stream import Span
from cift_strategies.sweep_board import Board
from cift_strategies.sweep_file import Asked, Point, proposals, read
from cift_strategies.workers import Processes, Ray, Workers

TRADING: Final = {"strategy", "latency_ms", "order_latency_ms", "settings", "limits", "rule", "out", "pay"}  # keys that no model depends on
NOTE: Final = "sweep.json"
RUN: Final = "run.json"
APART: Final = ("aside", "definitions", "pipeline", "report", "sweep_board", "sweep_result", "workers")  # sources that decide no run
FINE: Final = 100_000  # parts of the traded time, by which a holdout is cut

type I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Job:
    """One run, or the making of what several runs share."""

    key: str
    config: RunConfig
    found: Source
    folder: Path  # of the sweep
    shared: str
    fast: bool


@dataclass(slots=True)
class Trial:
    """One proposal and what came of it."""

    number: int
    point: Point
    job: Job
    result: dict[str, Any] | None = None  # what run.json holds
    error: str = ""
    score: float | None = None
    before: bool = False  # it was there already


# --- one job, in a worker ---------------------------------------------------------------------------------------------------------------


def prepare(job: Job) -> None:
    """Train what is to be trained and record its predictions, unless it is there."""
    artifact = artifact_of(job)
    if artifact is not None and not artifact.is_dir():
        from cift_models.train import train

        c, p = job.config, plan(job.config, job.found)
        train(
            p.training, out=artifact, seed=c.seed, members=c.train, own=c.members, altdata=alternative(c, job.found), tables=c.models,
        )  # fmt: skip
    place = _recorded(job)
    if job.fast and not place.is_dir():
        from cift_strategies.fast import record

        p = plan(job.config, job.found)
        record(p, _engine(job, p), place)


def execute(job: Job) -> None:
    """Trade one configuration and keep its result as `runs/KEY`, unless it is there."""
    out = job.folder / "runs" / job.key
    if (out / RUN).is_file():
        return
    began, cpu = time.monotonic(), time.process_time()
    p = replace(_plan(job), config=job.config)
    traded = _trade(job, p)
    give_back()  # a worker does not grow with its runs
    if not gc.get_freeze_count():
        gc.freeze()  # modules and what else stays: to look through them after each run was 6 % of its time
    positions = traded.positions
    with replacing(out) as part:
        stamps = {name: np.asarray(positions[name].cast("int64"), np.int64) for name in ("opened", "closed")}
        earned = np.asarray(positions["net"], np.float64) / job.config.limits.capital
        np.savez(part / "positions.npz", allow_pickle=False, earned=earned, **stamps)
        hours = Span(p.root, p.instruments, p.split + 1, p.last).hours()
        _, steps = changes(traded.equity_ts, traded.equity, int(hours[0, 0]), p.last)
        told = {
            "key": job.key, "config": job.config.model_dump(mode="json", by_alias=True), "digest": traded.digest, "summary": traded.summary,
            "hours": hours.tolist(), "ratio": float(sharpe(steps[:, None])[0]), "seconds": time.monotonic() - began,
            "cpu_seconds": time.process_time() - cpu,
        }  # fmt: skip
        write_json(part / RUN, told)


def _trade(job: Job, p: Plan) -> Traded:
    if job.fast:
        from cift_strategies.fast import trade

        return trade(p, _mapped(_recorded(job)))
    from cift_models.hmm import REGIMES
    from cift_models.windows import HORIZONS_NS
    from cift_strategies.backtest import blocks
    from cift_strategies.faults import Faults
    from cift_strategies.inference_actor import LookAhead

    engine, n = _engine(job, p), len(p.instruments)
    ahead = LookAhead(blocks(p, p.start, p.last), engine, delay(p, n, engine.latency.q, engine.latency.ns), HORIZONS_NS, n)
    return stream(p, ahead, p.terms(REGIMES, Faults()))[0]


def _engine(job: Job, p: Plan) -> Any:
    from cift_models.inference import Engine

    c = job.config
    artifact = c.artifacts or artifact_of(job)
    assert artifact is not None
    engine = Engine.load(artifact, p.instruments, c.members, device=c.device)
    if (altdata := alternative(c, job.found)) is not None:
        engine.tell(altdata)
    return engine


def _recorded(job: Job) -> Path:
    return job.folder / "shared" / f"{job.shared}-predictions"


def artifact_of(job: Job) -> Path | None:
    """Where the models are that the sweep trains itself."""
    return None if job.config.artifacts is not None else job.folder / "shared" / f"{job.shared}-artifact"


_plans: dict[str, Plan] = {}


def _plan(job: Job) -> Plan:
    if job.shared not in _plans:
        _plans.clear()
        _plans[job.shared] = plan(job.config, job.found)
    return _plans[job.shared]


@lru_cache(maxsize=1)
def _mapped(folder: Path) -> Any:
    from cift_strategies.fast import Recorded

    return Recorded(folder)


# --- keys -----------------------------------------------------------------------------------------------------------------------------


class _Keys:
    """Digests of what a run depends on, and the sources, each looked up once."""

    def __init__(self, folder: Path, fast: bool) -> None:
        self._folder, self._fast = folder, fast
        here = sources_of(__name__, {f"{__package__}.{name}" for name in APART})
        self._code = {**code_key(), "strategies": sha256_of(here), "nautilus_trader": version("nautilus_trader")}
        self._sources: dict[str, Source] = {}
        self._data: dict[Path, Any] = {}
        self._versions: dict[Path, str] = {}

    def job(self, config: RunConfig) -> Job:
        """The run of `config`. Raises InputError where its data, its models or its strategy are not there."""
        config = _absolute(config)
        found = self._source(config)
        told = config.model_dump(mode="json", exclude={"out", "rule", "pay"})
        models = {k: v for k, v in told.items() if k not in TRADING}
        demo = not (config.dbn or config.catalog or config.databento or config.polygon)
        if config.artifacts is not None:
            for k in ("train", "models", "train_fraction", *(() if demo else ("seed",))):
                models.pop(k)
            models["artifacts"] = self._version(config.artifacts)
        models |= {"code": self._code, "data": self._digest(found.root), "altdata": None}
        if (path := config.altdata or found.altdata) is not None:
            models["altdata"] = self._file(path)
        if config.instruments is not None:
            models["instruments"] = self._file(config.instruments)
        shared = _digest(models)
        own = None
        if config.strategy is not None:
            import importlib.util

            from cift_strategies.system import strategy_class

            strategy_class(config.strategy)
            spec = importlib.util.find_spec(config.strategy.partition(":")[0])
            own = sha256(Path(spec.origin)) if spec is not None and spec.origin else None
        return Job(_digest({"run": told, "models": shared, "strategy": own}), config, found, self._folder, shared, self._fast)

    def _source(self, config: RunConfig) -> Source:
        asked = config.model_dump(
            mode="json", include={"dbn", "catalog", "databento", "record_schema", "polygon", "symbols", "start", "end", "instruments"}
        )
        key = _digest(asked | {"seed": None if config.catalog or config.dbn else config.seed})
        if key not in self._sources:
            self._sources[key] = resolve(config)
        return self._sources[key]

    def _digest(self, root: Path) -> Any:
        if root not in self._data:
            self._data[root] = data_key(root)
        return self._data[root]

    @staticmethod
    def _file(path: Path) -> str:
        try:
            return sha256(path)
        except OSError as e:
            raise InputError(f"cannot read {path}: {e.strerror}") from None

    def _version(self, path: Path) -> str:
        if path not in self._versions:
            from cift_models.artifacts import read as verified

            self._versions[path] = verified(path).version
        return self._versions[path]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:20]


def _absolute(config: RunConfig) -> RunConfig:
    """With paths that another machine, or another working directory, finds too."""
    paths = {k: v.resolve() for k in ("catalog", "instruments", "artifacts", "altdata") if (v := getattr(config, k)) is not None}
    return config.model_copy(update=paths | {"dbn": tuple(p.resolve() for p in config.dbn)})


# --- the sweep ------------------------------------------------------------------------------------------------------------------------


def sweep(path: Path, given: Mapping[str, Any] | None = None, ray: str | None = None) -> dict[str, Any]:
    """All runs of the sweep file `path`; `given`: keys of RunConfig that go before its base, "out" the sweep's folder (else out/NAME).

    `ray`: the address of a cluster. Returns what sweep.json holds. A killed sweep goes on where it stopped when it is called again. Raises
    InputError for what the user can mend.
    """
    given = dict(given or {})
    out = Path(given.pop("out", None) or Path("out") / path.stem).resolve()
    asked = read(path, given)
    s = asked.sweep
    _claim(out)
    keys, workers, board = _Keys(out, s.fast), _workers(s.workers, ray), None
    trials: list[Trial] = []
    try:
        if asked.config({}).device == "cuda":
            need_cuda()
        search = proposals(asked)
        first = next(search)
        points: list[Point] | None = first
        total = len(first) if s.method != "optuna" else s.trials or 50
        with Board(total, [a.key for a in asked.axes], s.objective, s.direction) as board:
            while points:
                batch = [Trial(len(trials) + 1 + i, p, keys.job(asked.config(p))) for i, p in enumerate(points)]
                trials += batch
                _compute(batch, workers, asked, board)
                points = next(_sent(search, [t.score for t in batch]), None)
    except KeyboardInterrupt:
        done = sum(t.result is not None for t in trials)
        print(f"{done} of {len(trials)} runs are kept in {out}: the same command goes on from there", file=sys.stderr)
        raise
    finally:
        workers.close()
    from cift_strategies.sweep_result import conclude

    return conclude(asked, trials, out)


def _sent(search: Any, scores: list[float | None]) -> Iterator[list[Point]]:
    try:
        yield search.send(scores)
    except StopIteration:
        return


def _claim(out: Path) -> None:
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / "runs").is_dir()):
        raise InputError(f"{out} exists and holds no sweep: choose another --out, or remove it")
    (out / "runs").mkdir(parents=True, exist_ok=True)


def _workers(n: int | None, ray: str | None) -> Workers:
    return Processes(n or len(os.sched_getaffinity(0))) if ray is None else Ray(ray)


def _compute(batch: Sequence[Trial], workers: Workers, asked: Asked, board: Board) -> None:
    """Results of `batch`: those that are kept, and the others computed, what they share first."""
    waiting: dict[str, list[Trial]] = {}
    for t in batch:
        if not _load(t, asked, before=True):
            waiting.setdefault(t.job.key, []).append(t)
        else:
            board.tell(t)
    made: dict[str, Job] = {}
    for (t, *_) in waiting.values():
        if not _is_made(t.job):
            made.setdefault(t.job.shared, t.job)
    refused: dict[str, str] = {}
    board.stage(f"models and predictions of {len(made)}" if made else "")
    for job, error, fault in workers.run(prepare, list(made.values())):
        _raise(fault)
        if error is not None:
            refused[job.shared] = error
    board.stage("")
    ready = {k: of for k, of in waiting.items() if of[0].job.shared not in refused}
    for of in waiting.values():
        for t in of:
            if (why := refused.get(t.job.shared)) is not None:
                t.error = why
                board.tell(t)
    for job, error, fault in workers.run(execute, [of[0].job for of in ready.values()]):
        _raise(fault)
        for t in ready[job.key]:
            if error is not None:
                t.error = error
            else:
                _load(t, asked)
            board.tell(t)
    failed = [t for t in batch if t.error]
    if len(failed) == len(batch):
        raise InputError(f"{asked.path}: none of the runs could be made: {failed[0].error}")


def _is_made(job: Job) -> bool:
    artifact = artifact_of(job)
    return (artifact is None or artifact.is_dir()) and (not job.fast or _recorded(job).is_dir())


def _raise(fault: str | None) -> None:
    if fault is not None:
        raise RuntimeError(f"a run failed; what was done is kept, the same command goes on from there:\n{fault}")


def _load(t: Trial, asked: Asked, before: bool = False) -> bool:
    """Take the result of `t` and its score, if it is there."""
    place = t.job.folder / "runs" / t.job.key
    if not (place / RUN).is_file():
        return False
    t.result, t.before = json.loads((place / RUN).read_text()), before
    from cift_strategies.sweep_result import figures

    told = figures(t, asked.sweep)
    if asked.sweep.objective not in told:
        names = ", ".join(k for k, v in told.items() if v is None or isinstance(v, int | float))
        raise InputError(f'{asked.path}: objective "{asked.sweep.objective}" is no figure of a run: choose among {names}')
    t.score = told[asked.sweep.objective]
    return True


def hours_of(t: Trial, holdout: float = 0.0) -> tuple[I64, I64]:
    """When the market of `t` traded, (m, 2) ns as :meth:`Span.hours`: in the time that runs are chosen on, and in the share `holdout` after
    it, in which the choice is judged."""
    assert t.result is not None
    hours = np.array(t.result["hours"], np.int64)
    cut = int(groups(hours, FINE)[round((1 - holdout) * FINE)])
    return within(hours, int(hours[0, 0]), cut - 1), within(hours, cut, int(hours[-1, 1]))


def returns(t: Trial, hours: I64, periods: int) -> NDArray[np.float64]:
    """What was earned, net, as a share of capital, by the positions opened in each of `periods` equal parts of `hours` (m, 2) and closed
    within them."""
    opened, closed, earned = positions(t)
    inside = (opened >= hours[0, 0]) & (closed <= hours[-1, 1])
    place = np.searchsorted(groups(hours, periods)[1:-1], opened[inside], "right")
    return np.bincount(place, earned[inside], periods).astype(np.float64)


def positions(t: Trial) -> tuple[I64, I64, NDArray[np.float64]]:
    """When each position was opened and closed, ns, and what it earned, net, as a share of capital."""
    with np.load(t.job.folder / "runs" / t.job.key / "positions.npz", allow_pickle=False) as z:
        return z["opened"], z["closed"], z["earned"]

