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
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from catalog import rolls
from catalog.errors import InputError
from catalog.estimate import estimate as estimated
from catalog.events import PAUSE_NS, Instrument, read_catalog, trading_state
from catalog.parquet import iso
from catalog.progress import Steps
from catalog.whole import replacing
from cift_strategies import source as sources
from cift_strategies.outcome import I64, Outcomes, RunResult, Traded, write_run
from cift_strategies.risk import Limits
from cift_strategies.settings import Settings
from cift_strategies.stream import Span

if TYPE_CHECKING:
    from nautilus_trader.backtest import BacktestResult

    from catalog.altdata import Table
    from cift_models.inference import Predictions
    from cift_models.windows import Block
    from cift_strategies.inference_actor import Delay, Predictor
    from cift_strategies.strategy import Terms

class RunConfig(BaseModel):
    """What a run is asked to do. Without a source it makes and trades the embedded demo market."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dbn: tuple[Path, ...] = ()
    catalog: Path | None = None
    databento: str | None = None  # a dataset, whose history is downloaded
    record_schema: str = Field("mbo", alias="schema")  # of that history
    pay: bool = False  # what that history costs, without being asked
    polygon: tuple[str, ...] = ()  # symbols whose history is downloaded
    session: Path | None = None  # folder of a recorded live session
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
            faults, behind=self.behind(),
        )  # fmt: skip

    def behind(self) -> dict[int, tuple[tuple[int, int], ...]]:
        """When another of the contracts was the one to trade, by instrument: see :func:`catalog.rolls.behind`."""
        told = rolls.behind(self.root, self.ids)
        return {k: told[x.id] for k, x in enumerate(self.instruments) if x.id in told}

    def rolls(self) -> list[dict[str, Any]]:
        """Rolls from one of the contracts to another within the range: {"underlying", "from", "to", "ts"}."""
        return [r for r in rolls.rolls(self.root) if r["from"] in self.ids and r["to"] in self.ids and self.first <= r["ts"] <= self.last]

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
        split = _trained_until(trained_on(config.artifacts), span)
        if span.last <= split:
            raise InputError(
                f"{config.artifacts} was trained on data up to {iso(split)}, and {found.root} has nothing to trade after it: choose a "
                "later --end or other data, or train with an earlier --end"
            )
    elif found.split is not None and config.train_fraction is None:
        split = found.split - 1
    else:
        split = _whole_session(span.split_at(0.6 if config.train_fraction is None else config.train_fraction), span)
    if span.count(split) >= events:
        raise InputError(f"nothing is left to trade after the training range, {events:,} events in all: choose a smaller --train-fraction")
    start = span.fresh_start(span.after(split))
    streamed = events - span.count(start - 1)
    return Plan(found.root, tuple(found.instruments), span.first, split, start, span.last, span.ends(), events, streamed, config)


def trained_on(artifact: Path) -> tuple[int, int]:
    """First and last stamp of what the models have seen, ns."""
    from cift_models.artifacts import read

    seen = read(artifact).manifest["range"]
    return int(seen["start"]), int(seen["end"])


def _whole_session(ts: int, span: Span) -> int:
    """`ts`, or a stamp in the pause behind its session where that begins sooner than the longest horizon: books would have to be filled by
    streaming all of the session again, for next to nothing."""
    from cift_models.windows import HORIZONS_NS

    soon = ts + HORIZONS_NS[-1]
    return soon if span.after(soon) - soon > PAUSE_NS else ts


def _trained_until(seen: tuple[int, int], span: Span) -> int:
    """The last stamp of `span` that the models have `seen`, or count as having seen."""
    from cift_models.windows import HORIZONS_NS

    first, last = seen
    if first > span.last or last < span.first:
        return span.first - 1
    soon = last + HORIZONS_NS[-1]
    return soon if span.last <= soon else _whole_session(last, span)


def notes(p: Plan, altdata: Table | None = None) -> list[str]:
    """What the user should know before believing the figures."""
    free = [x.id for x in p.instruments if not (x.maker_fee or x.taker_fee or x.fee_per_unit)]
    out = [f"no fees are known for {', '.join(free)}: none are charged; tell them with --instruments"] if free else []
    if p.config.artifacts is not None:
        from cift_models.artifacts import read

        manifest = read(p.config.artifacts).manifest
        learnt, (first, last) = bool(manifest.get("altdata")), (manifest["range"][end] for end in ("start", "end"))
        if learnt and altdata is None:
            out.append("the models were trained with alternative data and go without them here: give them with --altdata")
        if altdata is not None and not learnt:
            out.append("the models were trained without alternative data: what was given changes nothing")
        if first > p.last:
            out.append(f"the models were trained on later data, {iso(first)} to {iso(last)}: nobody could have had them then")
        elif last >= p.first:
            out.append(f"the models were trained on {iso(first)} to {iso(last)}: trading begins after that")
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
    traded = Traded.by(system.strategy)
    node.dispose()
    counts = {"feature_vectors": system.features.vectors, "predictions": system.inference.published, "seconds": seconds}
    return traded, result, counts


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


def run(
    config: RunConfig, leave: Callable[[BaseException], object] | None = None, trials: int = 1, ratios: Sequence[float] = (),
    trained: Path | None = None,
) -> RunResult:  # fmt: skip
    """The whole run. `leave` is called with the first failure inside the engine, which cannot be left by raising: it may end the
    process after :func:`clean_up`; without it the failure is raised once the stream has ended. `trials`: from how many the run was chosen,
    with the `ratios` of their Sharpe per step of the report (`Finished.sharpe`): its Sharpe ratio is deflated by them. `trained`: the
    models of this very configuration, which are not trained again.

    Raises InputError for what the user can mend.
    """
    began = time.monotonic()
    if config.device == "cuda":
        need_cuda()
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
            chosen = {"trials": trials, "trial_ratios": [float(r) for r in ratios]} if trials > 1 else {}
            return _run(config, found, p, altdata, out, part, began, leave, chosen, trained)
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
    leave: Callable[[BaseException], object] | None, more: Mapping[str, Any], trained: Path | None,
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
    artifact = config.artifacts or trained
    if artifact is None:
        from cift_models.train import train

        artifact = train(
            p.training, out=part / "artifact", seed=config.seed, members=config.train, own=config.members, altdata=altdata,
            tables=config.models,
        )  # fmt: skip

    give_back()

    from cift_models.hmm import REGIMES
    from cift_models.inference import Engine
    from cift_models.windows import HORIZONS_NS
    from cift_strategies.faults import Faults
    from cift_strategies.inference_actor import LookAhead

    n = len(p.instruments)
    engine = Engine.load(artifact, p.instruments, config.members, device=config.device)
    if altdata is not None:
        engine.tell(altdata)
    outcomes = Outcomes(engine, artifact, p.instruments, part, config.seed, p.split + 1)

    with Steps("stream", p.streamed, "events") as steps:

        def sink(block: Block, predictions: Predictions, latency: I64) -> None:
            outcomes.push(block, predictions, latency)
            steps.advance(len(block.events))

        ahead = LookAhead(
            blocks(p, p.start, p.last), engine, delay(p, n, engine.latency.q, engine.latency.ns), HORIZONS_NS, n, sink
        )
        traded, result, counts = stream(p, ahead, p.terms(REGIMES, Faults(leave)))
        ahead.finish()
    scored = outcomes.finish(engine)
    other = _Open.second.result() if _Open.second is not None else Aside(None, None, {})
    quality = {k: v for k, v in (found.quality if found.quality is not None else other.quality or {}).items() if v}
    told = {
        "events": p.events,
        "events_streamed": p.streamed,
        "events_per_second": p.streamed / counts["seconds"],
        "feature_vectors": counts["feature_vectors"],
        "baseline_rule": None if other.traded is None else {**other.traded.summary, **other.rule},
        "rolls": p.rolls(),
        "notes": notes(p, altdata),
        "data_quality": quality,
        "callback_errors": 0,
        "trained_on": dict(zip(("start", "end"), trained_on(artifact))),
        "split": p.split,
        "start": p.start,
        "end": p.last,
        **more,
    }
    return write_run(
        part, found.name, p.instruments, scored, traded, told, config.model_dump(mode="json"), began, other.traded, result
    )


def give_back() -> None:
    """What training has freed goes back to the system, where its C library can do so: the stream would come on top of it."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def need_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise InputError("--device cuda: there is no GPU that torch can use here; leave it out or choose cpu")
