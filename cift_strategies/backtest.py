"""One backtest from source to results: data -> catalog -> training -> streaming through a BacktestNode -> output folder.

:func:`run` takes a :class:`RunConfig` and gives a :class:`RunResult`; the output folder is filled beside its place and moved there when
it is whole. The plain rule is traded in a second process meanwhile, through the same strategy and execution.
"""

from __future__ import annotations

import ctypes
import gc
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from catalog.errors import InputError
from catalog.estimate import estimate as estimated
from catalog.events import Instrument, read_catalog, trading_state
from catalog.progress import Steps
from catalog.whole import replacing
from cift_strategies import source as sources
from cift_strategies.risk import Limits
from cift_strategies.settings import Settings
from cift_strategies.stream import Span

if TYPE_CHECKING:
    from nautilus_trader.backtest import BacktestResult

    from catalog.altdata import Table
    from cift_models.inference import Predictions
    from cift_models.windows import Block
    from cift_strategies.inference_actor import Delay, Predictor
    from cift_strategies.strategy import EnsembleStrategy, Terms

type I64 = NDArray[np.int64]
type F64 = NDArray[np.float64]

HORIZON_LABELS: Final = ("500ms", "1s", "5s", "30s")
VERSIONS: Final = ("nautilus_trader", "numba", "numpy", "pyarrow", "scikit-learn", "xgboost", "databento", "torch")
EQUITY_POINTS: Final = 20_000


class RunConfig(BaseModel):
    """What a run is asked to do. Without a source it makes and trades the embedded demo market."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dbn: tuple[Path, ...] = ()
    catalog: Path | None = None
    databento: str | None = None  # a dataset, whose history is downloaded
    record_schema: str = Field("mbo", alias="schema")  # of that history
    pay: bool = False  # what that history costs, without being asked
    polygon: tuple[str, ...] = ()  # symbols whose history is downloaded
    symbols: tuple[str, ...] = ()
    start: int | None = None  # ns UTC, inclusive
    end: int | None = None
    instruments: Path | None = None  # TOML with definitions where the data has none
    train_fraction: Annotated[float | None, Field(gt=0, lt=1)] = None  # of the events; None: 0.6, or all sessions but the last of the demo
    artifacts: Path | None = None  # trained models to use instead of training
    train: tuple[str, ...] | None = ("hmm", "fusion")  # members to train, by name; None: all there are
    members: tuple[str, ...] = ()  # and of the user's own, "package.module:Class"
    models: dict[str, dict[str, Any]] = {}  # [models.transformer], [models.ensemble]: their settings, see cift_models.settings
    strategy: str | None = None  # the user's own, "package.module:Class"
    altdata: Path | None = None  # table of alternative data, docs/altdata.md; None: the demo's own, none elsewhere
    latency_ms: float | Literal["auto"] = "auto"  # of a decision; auto: drawn from the artifact's distribution
    order_latency_ms: Annotated[float, Field(ge=0)] = 1.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: Annotated[int, Field(ge=0)] = 7
    out: Path | None = None
    rule: bool = True  # trade the plain rule beside the ensemble
    chunk_size: Annotated[int | None, Field(gt=0)] = 20_000  # records of a kind and instrument that the engine holds
    settings: Settings = Settings()
    limits: Limits = Limits()


@dataclass(frozen=True, slots=True)
class Traded:
    """What one strategy did over the streamed part; the ensemble's run and the rule's have the same shape."""

    fills: pa.Table  # columns: results.FILLS
    positions: pa.Table  # columns: results.POSITIONS
    equity_ts: I64  # (n,) ns UTC
    equity: F64  # (n,) net PnL since the start in the first currency, open positions at mid
    summary: dict[str, Any]  # orders, fills, fees, pnl_net, max_drawdown, hit_rate, break_even_cost_ticks, decisions {reason: count}, ...
    digest: str


@dataclass(frozen=True, slots=True)
class RunResult:
    """Everything a report needs about one finished run; `summary` is what `summary.json` holds."""

    source: str
    instruments: Sequence[Instrument]
    summary: Mapping[str, Any]
    scores: Mapping[str, Any]  # as cift_models.validate.evaluate returns it: model and baselines, out of sample
    sample: Mapping[str, NDArray[Any]]  # thinned decisions with labels (validate.Sample): ts, instrument, move, known_at, proba, ...
    threshold: F64  # (I, H) ticks: what counts as a move
    quality: Mapping[str, int]
    split_ns: int  # nothing before it, or at it, is acted upon
    start_ns: int  # first event streamed
    end_ns: int  # last event streamed
    traded: Traded
    rule: Traded | None  # the plain rule on order flow imbalance through the same execution
    predictions: Path  # predictions.parquet, see results.PredictionWriter
    mids: Mapping[str, tuple[I64, F64]]  # instrument id -> ts (n,), mid (n,): at most some thousand points each
    regimes: Mapping[str, tuple[I64, NDArray[np.int8]]]  # instrument id -> ts of each change, regime from there on
    regime_names: Sequence[str]
    members: Sequence[str]  # in the order of the votes
    decision_latency_ms: F64  # (n,) event to delivery, a seeded sample of at most 100,000
    order_latency_ms: float
    latency_curve: Sequence[Mapping[str, float]]  # {latency_ms, pnl_net, fills} of reruns at other latencies, where they were asked for
    regret: Mapping[str, Any]  # Ensemble.regret: per regime, horizon and member, with its bound
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    digest: str
    result: BacktestResult | None  # for Nautilus's create_tearsheet


@dataclass(frozen=True, slots=True)
class Plan:
    """Which events are for training, streaming and trading. Picklable: the second process gets it too."""

    root: Path
    instruments: tuple[Instrument, ...]
    first: int
    split: int  # the last stamp of the training range
    start: int  # the stream's first
    last: int
    ends: Mapping[int, int]
    events: int
    streamed: int
    config: RunConfig

    @property
    def ids(self) -> list[str]:
        return [x.id for x in self.instruments]

    def training(self) -> tuple[list[Instrument], Iterator[NDArray[Any]]]:
        """The training range, as `cift_models.train.train` reads it: once for each pass."""
        return list(self.instruments), read_catalog(self.root, self.ids, self.first, self.split)[1]

    def terms(self, regimes: Sequence[str], faults: Any) -> Terms:
        from cift_strategies.strategy import Terms

        c = self.config
        return Terms(
            self.instruments, c.settings, c.limits, regimes, self.split + 1, self.ends, self.states(), round(c.order_latency_ms * 1e6),
            faults,
        )  # fmt: skip

    def rolls(self) -> list[dict[str, Any]]:
        """Rolls from one of the contracts to another within the range: {"underlying", "from", "to", "ts"}."""
        from catalog.pauses import rolls

        return [r for r in rolls(self.root) if r["from"] in self.ids and r["to"] in self.ids and self.first <= r["ts"] <= self.last]

    def states(self) -> dict[int, tuple[NDArray[np.int64], NDArray[np.int8]]]:
        """When each market was open, in an auction, halted or closed, for those of which the catalog tells."""
        steps = {k: trading_state(self.root, x.id) for k, x in enumerate(self.instruments)}
        return {k: s for k, s in steps.items() if len(s[0])}


def plan(config: RunConfig, found: sources.Source) -> Plan:
    """Cut the source into training and trading. Raises InputError where one of them would be empty."""
    bounded = not config.dbn  # an import has cut its range already
    span = Span(found.root, found.instruments, config.start if bounded else None, config.end if bounded else None)
    events = span.count()
    if not events:
        names = ", ".join(x.id for x in found.instruments)
        raise InputError(f"{found.root} has no events of {names} in the range that was asked for: choose another --start and --end")
    if config.artifacts is not None:
        from cift_models.artifacts import read

        trained = read(config.artifacts).manifest["range"]
        split = max(int(trained["end"]), span.first - 1) if trained["start"] <= span.last else span.first - 1
    elif found.split is not None and config.train_fraction is None:
        split = found.split - 1
    else:
        split = span.split_at(0.6 if config.train_fraction is None else config.train_fraction)
    if span.count(split) >= events:
        raise InputError(f"nothing is left to trade after the training range, {events:,} events in all: choose a smaller --train-fraction")
    start = span.fresh_start(span.after(split))
    streamed = events - span.count(start - 1)
    return Plan(found.root, tuple(found.instruments), span.first, split, start, span.last, span.ends(), events, streamed, config)


def notes(p: Plan, altdata: Table | None = None) -> list[str]:
    """What the user should know before believing the figures."""
    free = [x.id for x in p.instruments if not (x.maker_fee or x.taker_fee or x.fee_per_unit)]
    out = [f"no fees are known for {', '.join(free)}: none are charged; tell them with --instruments"] if free else []
    if p.config.artifacts is not None:
        from cift_models.artifacts import read

        learnt = bool(read(p.config.artifacts).manifest.get("altdata"))
        if learnt and altdata is None:
            out.append("the models were trained with alternative data and go without them here: give them with --altdata")
        if altdata is not None and not learnt:
            out.append("the models were trained without alternative data: what was given changes nothing")
    return out


def alternative(config: RunConfig, found: sources.Source) -> Table | None:
    """The table of alternative data. Raises InputError for a wrong one, and where it speaks of none of the instruments."""
    path = config.altdata or found.altdata
    if path is None:
        return None
    from catalog.altdata import read
    from catalog.asof import lookup

    table = read(path)
    lookup(table, [x.id for x in found.instruments])
    return table


def estimate(p: Plan) -> str:
    """Time and memory that the run will take, in words."""
    told = estimated(p.events, len(p.ids), p.config.artifacts is None).told
    return f"{p.events:,} events of {len(p.ids)} instruments: {told}"


# --- streaming ------------------------------------------------------------------------------------------------------------------------


def stream(p: Plan, predictor: Predictor, terms: Terms) -> tuple[Traded, BacktestResult, Mapping[str, float]]:
    """Stream the plan's part through a BacktestNode; returns what was traded, Nautilus's result, and counts with the wall time."""
    from cift_strategies.system import Replay, assemble, run_backtest

    c = p.config
    system = assemble(terms, predictor, c.strategy)
    replay = Replay(p.root, p.instruments, p.start, p.last, c.limits.capital, terms.order_latency_ns, c.chunk_size)
    began = time.perf_counter()
    result, node, _ = run_backtest(system, replay, terms.faults)
    seconds = time.perf_counter() - began
    traded = _traded(system.strategy)
    node.dispose()
    counts = {"feature_vectors": system.features.vectors, "predictions": system.inference.published, "seconds": seconds}
    return traded, result, counts


def _traded(strategy: EnsembleStrategy) -> Traded:
    from cift_strategies.results import FILLS, POSITIONS, figures, table

    fills, positions = table(strategy.fills, FILLS), table(strategy.positions, POSITIONS)
    currency = strategy.ledger.currencies[0]
    equity = [(t, v) for t, c, v in strategy.equity if c == currency]
    equity = equity[:: max(1, -(-len(equity) // EQUITY_POINTS))] + equity[-1:]
    ts, value = np.array([t for t, _ in equity], np.int64), np.array([v for _, v in equity], np.float64)
    return Traded(fills, positions, ts, value, figures(strategy, fills, positions), strategy.digest)


def blocks(p: Plan, start: int, end: int) -> Iterator[Block]:
    """The stream from `start` to `end` with its features and batches; training and look-ahead read the same."""
    from cift_models.inference import stream as featured

    return featured(p.instruments, read_catalog(p.root, p.ids, start, end)[1])


def delay(p: Plan, instruments: int, q: Sequence[float], ns: Sequence[float]) -> Delay:
    from cift_strategies.inference_actor import Delay

    fixed = None if p.config.latency_ms == "auto" else round(p.config.latency_ms * 1e6)
    return Delay(instruments, p.config.seed, fixed, q, ns)


# --- a run ----------------------------------------------------------------------------------------------------------------------------


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """As :func:`catalog.whole.replacing`. Raises InputError where `out` holds anything but the results of a run."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / "summary.json").is_file()):
        raise InputError(f"{out} exists and holds no results of a run: choose another --out, or remove it")
    with replacing(out) as part:
        yield part


def resolve(config: RunConfig) -> sources.Source:
    """The catalog of the run, made where there is none yet."""
    given = {"--dbn": config.dbn, "--catalog": config.catalog, "--databento": config.databento, "--polygon": config.polygon}
    named = [name for name, value in given.items() if value]
    if len(named) > 1:
        raise InputError(f"both {named[0]} and {named[1]} were given: choose one source")
    if config.instruments is not None and named in ([], ["--polygon"]):
        raise InputError("--instruments describes the instruments of --dbn, --catalog or --databento: name one of them too")
    if config.databento or config.polygon:
        if config.start is None or config.end is None:
            raise InputError(f"{named[0]} needs a range: add --start and --end")
        if config.end <= config.start:
            raise InputError("the range is empty: --end must be later than --start")
    if config.databento:
        return sources.databento(
            config.databento, config.record_schema, config.symbols, config.start or 0, config.end or 0, config.instruments, config.pay
        )
    if config.polygon:
        return sources.polygon(config.polygon, config.start or 0, config.end or 0)
    if config.dbn:
        return sources.dbn(config.dbn, config.instruments, config.symbols or None, config.start, config.end)
    if config.catalog is not None:
        return sources.catalog(config.catalog, config.symbols or None, config.instruments)
    if config.symbols:
        raise InputError("--symbols chooses among the instruments of --dbn, --catalog or --databento")
    return sources.demo(config.seed)


def run(config: RunConfig, leave: Callable[[BaseException], object] | None = None) -> RunResult:
    """The whole run. `leave` is called with the first failure inside the engine, which cannot be left by raising: it may end the
    process after :func:`clean_up`; without it the failure is raised once the stream has ended.

    Raises InputError for what the user can mend.
    """
    began = time.monotonic()
    if config.device == "cuda":
        _need_cuda()
    if config.models:
        from cift_models.train import check

        check(config.models, config.train, config.members)
    if config.strategy is not None:
        from cift_strategies.system import strategy_class

        strategy_class(config.strategy)
    found = resolve(config)
    altdata = alternative(config, found)
    p = plan(config, found)
    print(estimate(p), file=sys.stderr)
    for note in notes(p, altdata):
        print(note, file=sys.stderr)
    out = config.out or Path("out") / found.name
    with unfinished(out) as part:
        _Open.part = part
        try:
            return _run(config, found, p, altdata, out, part, began, leave)
        finally:
            clean_up(keep=part)


class _Open:
    """What has to be put away when the process is left from within the engine."""

    part: Path | None = None
    second: Any = None  # aside.Second


def clean_up(keep: Path | None = None) -> None:
    """End the second process and remove the unfinished output, `keep` excepted."""
    if _Open.second is not None:
        _Open.second.stop()
        _Open.second = None
    if _Open.part is not None and _Open.part != keep:
        shutil.rmtree(_Open.part, ignore_errors=True)
    _Open.part = None


def _run(
    config: RunConfig, found: sources.Source, p: Plan, altdata: Table | None, out: Path, part: Path, began: float,
    leave: Callable[[BaseException], object] | None,
) -> RunResult:  # fmt: skip
    from cift_models.inference import DEFAULT_LATENCY
    from cift_strategies.aside import Aside, Second

    q, ns = DEFAULT_LATENCY.q, DEFAULT_LATENCY.ns
    if config.artifacts is not None:
        from cift_models.artifacts import read

        told = read(config.artifacts).manifest["latency"]
        q, ns = tuple(told["q"]), tuple(told["ns"])
    if config.rule or found.quality is None:
        _Open.second = Second(p, found.quality is None, q, ns)
    artifact = config.artifacts
    if artifact is None:
        from cift_models.train import train

        artifact = train(
            p.training, out=part / "artifact", seed=config.seed, members=config.train, own=config.members, altdata=altdata,
            tables=config.models,
        )  # fmt: skip

    from cift_models import artifacts
    from cift_models.baselines import Baselines
    from cift_models.features import NAMES
    from cift_models.hmm import REGIMES
    from cift_models.inference import Engine
    from cift_models.validate import Sample, evaluate
    from cift_models.windows import HORIZONS_NS
    from cift_strategies.faults import Faults
    from cift_strategies.inference_actor import LookAhead
    from cift_strategies.report import write_report
    from cift_strategies.results import MidPath, PredictionWriter, write_json

    instruments = p.instruments
    n, since = len(instruments), p.split + 1
    engine = Engine.load(artifact, instruments, config.members, device=config.device)
    if altdata is not None:
        engine.tell(altdata)
    manifest = artifacts.read(artifact).manifest
    trained = [manifest["instruments"].index(x.id) for x in instruments]
    baselines, threshold = Baselines.load(artifact).only(trained), engine.ensemble.threshold[trained]
    sample = Sample(instruments, NAMES, len(engine.members), baselines.columns, since=since)
    mid = NAMES.index("mid")
    writer = PredictionWriter(part / "predictions.parquet", instruments, HORIZON_LABELS, HORIZONS_NS, mid, config.seed, since)
    mids = MidPath(n)

    with Steps("stream", p.streamed, "events") as steps:

        def sink(block: Block, predictions: Predictions, latency: I64) -> None:
            sample.push(block, predictions)
            writer.push(block, predictions, latency)
            new = predictions.ts >= since
            mids.push(predictions.ts[new], predictions.instrument[new], block.rows[block.closes[new], mid])
            steps.advance(len(block.events))

        ahead = LookAhead(
            blocks(p, p.start, p.last), engine, delay(p, n, engine.latency.q, engine.latency.ns), HORIZONS_NS, n, sink
        )
        traded, result, counts = stream(p, ahead, p.terms(REGIMES, Faults(leave)))
        ahead.finish()
    writer.close()
    got = sample.finish()
    ids = [x.id for x in instruments]
    scores = evaluate(got, threshold, ids, engine.members, baselines, config.seed) if len(got["ts"]) else {"table": [], "decisions": 0}
    scores = {**scores, "model_version": engine.model_version, "failures": engine.failures}
    regret = {**engine.regret(), "weights": engine.learned.weights.tolist(), "horizons": list(HORIZON_LABELS)}
    other = _Open.second.result() if _Open.second is not None else Aside(None, None, {})
    quality = {k: v for k, v in (found.quality if found.quality is not None else other.quality or {}).items() if v}
    waits = writer.latencies / 1e6
    versions = {v: version(v) for v in VERSIONS}
    summary: dict[str, Any] = {
        "source": found.name,
        "instruments": ids,
        "events": p.events,
        "events_streamed": p.streamed,
        "events_per_second": p.streamed / counts["seconds"],
        "wall_seconds": 0.0,
        "feature_vectors": counts["feature_vectors"],
        "predictions": writer.count,
        **traded.summary,
        "decision_latency_ms": {f"p{v}": float(np.percentile(waits, v)) if len(waits) else None for v in (50, 99)},
        "order_latency_ms": config.order_latency_ms,
        "baseline_rule": None if other.traded is None else {**other.traded.summary, **other.rule},
        "scores": scores,
        "thresholds": {x: dict(zip(HORIZON_LABELS, threshold[k].tolist())) for k, x in enumerate(ids)},
        "regret": regret,
        "altdata": {} if engine.altdata is None else engine.altdata.told(p.start, p.last),
        "importance": engine.importance(),
        "rolls": p.rolls(),
        "notes": notes(p, altdata),
        "left_out": manifest["folds"][-1]["left_out"] if manifest["folds"] else [],
        "data_quality": quality,
        "callback_errors": 0,
        "digest": traded.digest,
        "model_version": engine.model_version,
        "split": p.split,
        "start": p.start,
        "end": p.last,
        "seed": config.seed,
        "device": engine.device,
        "versions": versions,
    }
    for name, rows in (("fills", traded.fills), ("positions", traded.positions)):
        pq.write_table(rows, part / f"{name}.parquet", compression="zstd")
    summary["wall_seconds"] = time.monotonic() - began
    outcome = RunResult(
        found.name, instruments, summary, scores, got, threshold, quality, p.split, p.start, p.last, traded, other.traded,
        part / "predictions.parquet", {i: mids.result(k) for k, i in enumerate(ids)}, dict(zip(ids, writer.regimes)), REGIMES,
        engine.members, waits, config.order_latency_ms, (), regret, config.model_dump(mode="json"), versions, traded.digest, result,
    )  # fmt: skip
    write_json(part / "summary.json", summary)
    with Steps("report"):
        write_report(outcome, part)
    summary["wall_seconds"] = time.monotonic() - began
    write_json(part / "summary.json", summary)
    return outcome


def _give_back() -> None:
    """What training has freed goes back to the system, where its C library can do so: the stream would come on top of it."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _need_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise InputError("--device cuda: there is no GPU that torch can use here; leave it out or choose cpu")
