"""What the predictions of a run were worth, and the output folder made from it; backtests and live sessions alike.

:class:`Outcomes` follows a stream of blocks with their predictions where the models are; :class:`Scored`, plain values, goes to whoever
writes the summary and the report with :func:`write_run`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from catalog.events import Instrument
from catalog.progress import Steps

if TYPE_CHECKING:
    from nautilus_trader.backtest import BacktestResult

    from cift_models.inference import Engine, Predictions
    from cift_models.windows import Block
    from cift_strategies.strategy import EnsembleStrategy

type I64 = NDArray[np.int64]
type F64 = NDArray[np.float64]

HORIZON_LABELS: Final = ("500ms", "1s", "5s", "30s")
VERSIONS: Final = ("nautilus_trader", "numba", "numpy", "pyarrow", "scikit-learn", "xgboost", "databento", "torch")
EQUITY_POINTS: Final = 20_000


@dataclass(frozen=True, slots=True)
class Traded:
    """What one strategy did over the streamed part; the ensemble's run and the rule's have the same shape."""

    fills: pa.Table  # columns: results.FILLS
    positions: pa.Table  # columns: results.POSITIONS
    equity_ts: I64  # (n,) ns UTC
    equity: F64  # (n,) net PnL since the start in the first currency, open positions at mid
    summary: dict[str, Any]  # orders, fills, fees, pnl_net, max_drawdown, hit_rate, break_even_cost_ticks, decisions {reason: count}, ...
    digest: str
    orders: pa.Table | None = None  # columns: results.ORDERS

    @classmethod
    def by(cls, strategy: EnsembleStrategy) -> Traded:
        """What a strategy has done, once its engine or node has ended."""
        from cift_strategies.results import FILLS, ORDERS, POSITIONS, figures, table

        fills, positions = table(strategy.fills, FILLS), table(strategy.positions, POSITIONS)
        currency = strategy.ledger.currencies[0]
        marks, restored = strategy.equity, 0 if strategy.recovery is None else strategy.recovery.restored
        if 0 < restored < len(marks) and marks[restored][0] < marks[restored - 1][0]:
            marks = marks[restored:]  # a replay has begun anew after a restart: this time was there before
        equity = [(t, v) for t, c, v in marks if c == currency]
        equity = equity[:: max(1, -(-len(equity) // EQUITY_POINTS))] + equity[-1:]
        ts, value = np.array([t for t, _ in equity], np.int64), np.array([v for _, v in equity], np.float64)
        orders = table(strategy.order_log, ORDERS)
        return cls(fills, positions, ts, value, figures(strategy, fills, positions), strategy.digest, orders)


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
class Scored:
    """The predictions of a run and what came of them; picklable."""

    sample: Mapping[str, NDArray[Any]]  # see validate.Sample
    threshold: F64  # (I, H)
    scores: Mapping[str, Any]
    regret: Mapping[str, Any]
    altdata: Mapping[str, Any]
    importance: Mapping[str, Any]
    diagnostics: Mapping[str, Any]  # see cift_models.diagnostics
    left_out: Sequence[str]
    members: Sequence[str]
    model_version: str
    device: str
    predictions: int
    latency_ms: F64
    mids: Sequence[tuple[I64, F64]]
    regimes: Sequence[tuple[I64, NDArray[np.int8]]]
    first: int  # stamps of the first and last event, ns; 0 where none came
    last: int


class Outcomes:
    """Predictions written to `predictions.parquet` in `folder` with what came of them, and sampled for the scores; those made before
    `since` (ns) are left out."""

    def __init__(
        self, engine: Engine, artifact: Path, instruments: Sequence[Instrument], folder: Path, seed: int, since: int = 0
    ) -> None:
        from cift_models import artifacts
        from cift_models.baselines import Baselines
        from cift_models.diagnostics import Diagnostics
        from cift_models.features import NAMES
        from cift_models.validate import Sample
        from cift_models.windows import HORIZONS_NS
        from cift_strategies.results import MidPath, PredictionWriter

        self._instruments, self._seed, self._since, self._mid = list(instruments), seed, since, NAMES.index("mid")
        manifest = artifacts.read(artifact).manifest
        trained = [manifest["instruments"].index(x.id) for x in self._instruments]
        self._baselines, self._threshold = Baselines.load(artifact).only(trained), engine.ensemble.threshold[trained]
        self._left_out = manifest["folds"][-1]["left_out"] if manifest["folds"] else []
        self._sample = Sample(self._instruments, NAMES, len(engine.members), self._baselines.columns, since=since)
        self._members = list(engine.members)
        self._diagnostics = Diagnostics(engine, artifact, instruments, since)
        place = folder / "predictions.parquet"
        self._writer = PredictionWriter(place, self._instruments, HORIZON_LABELS, HORIZONS_NS, self._mid, seed, since)
        self._mids = MidPath(len(self._instruments))
        self._first = self._last = 0

    def push(self, block: Block, p: Predictions, latency: I64) -> None:
        """`latency` (m,) ns, of each prediction."""
        if p.votes.shape[1] != len(self._members):
            return  # another artifact with other members has been swapped in
        self._sample.push(block, p)
        self._writer.push(block, p, latency)
        self._diagnostics.push(block, p.ts)
        new = p.ts >= self._since
        self._mids.push(p.ts[new], p.instrument[new], block.rows[block.closes[new], self._mid])
        if len(block.events):
            self._first = self._first or int(block.events["ts_init"][0])
            self._last = int(block.events["ts_init"].max())

    def finish(self, engine: Engine) -> Scored:
        """The stream has ended."""
        from cift_models.validate import evaluate

        self._writer.close()
        got, ids = self._sample.finish(), [x.id for x in self._instruments]
        scores: dict[str, Any] = {"table": [], "decisions": 0}
        if len(got["ts"]):
            scores = evaluate(got, self._threshold, ids, self._members, self._baselines, self._seed)
        scores = {**scores, "model_version": engine.model_version, "failures": dict(engine.failures), "late": dict(engine.late)}
        regret = {**engine.regret(), "weights": engine.learned.weights.tolist(), "horizons": list(HORIZON_LABELS)}
        altdata = {} if engine.altdata is None else engine.altdata.told(self._first, self._last)
        return Scored(
            got, self._threshold, scores, regret, altdata, engine.importance(), self._diagnostics.told(), self._left_out, self._members,
            engine.model_version, engine.device, self._writer.count, self._writer.latencies / 1e6,
            [self._mids.result(k) for k in range(len(ids))], self._writer.regimes, self._first, self._last,
        )  # fmt: skip


def write_run(
    folder: Path, name: str, instruments: Sequence[Instrument], scored: Scored, traded: Traded, told: Mapping[str, Any],
    config: Mapping[str, Any], began: float, rule: Traded | None = None, result: BacktestResult | None = None,
) -> RunResult:  # fmt: skip
    """Write `summary.json`, `fills.parquet`, `positions.parquet` and the report of a run into `folder`, beside its predictions.

    `told`: what else the summary says, over the figures of trading; `began`: when the run did, by `time.monotonic`.
    """
    from cift_models.hmm import REGIMES
    from cift_strategies.report import write_report
    from cift_strategies.results import write_json

    ids, waits = [x.id for x in instruments], scored.latency_ms
    summary: dict[str, Any] = {
        "source": name,
        "instruments": ids,
        "predictions": scored.predictions,
        **traded.summary,
        "decision_latency_ms": {f"p{v}": float(np.percentile(waits, v)) if len(waits) else None for v in (50, 99)},
        "order_latency_ms": config["order_latency_ms"],
        "baseline_rule": None,
        "scores": scored.scores,
        "thresholds": {x: dict(zip(HORIZON_LABELS, scored.threshold[k].tolist())) for k, x in enumerate(ids)},
        "regret": scored.regret,
        "altdata": scored.altdata,
        "importance": scored.importance,
        "diagnostics": scored.diagnostics,
        "left_out": scored.left_out,
        "data_quality": {},
        "digest": traded.digest,
        "model_version": scored.model_version,
        "split": scored.first - 1,
        "start": scored.first,
        "end": scored.last,
        "seed": config["seed"],
        "device": scored.device,
        "versions": {v: version(v) for v in VERSIONS},
        **told,
        "wall_seconds": time.monotonic() - began,
    }
    for what, rows in (("fills", traded.fills), ("positions", traded.positions)):
        pq.write_table(rows, folder / f"{what}.parquet", compression="zstd")
    outcome = RunResult(
        name, instruments, summary, scored.scores, scored.sample, scored.threshold, summary["data_quality"], summary["split"],
        summary["start"], summary["end"], traded, rule, folder / "predictions.parquet", dict(zip(ids, scored.mids)),
        dict(zip(ids, scored.regimes)), REGIMES, scored.members, waits, config["order_latency_ms"], (), scored.regret, config,
        summary["versions"], traded.digest, result,
    )  # fmt: skip
    write_json(folder / "summary.json", summary)
    with Steps("report"):
        write_report(outcome, folder)
    summary["wall_seconds"] = time.monotonic() - began
    write_json(folder / "summary.json", summary)
    return outcome
