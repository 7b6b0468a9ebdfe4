"""What the predictions of a run were worth, and the output folder made from it; live runs use it as backtests do.

:class:`Outcomes` follows a stream of blocks with their predictions where the models are; :class:`Scored`, plain values, goes to whoever
writes the summary and the report with :func:`write_run`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from catalog.events import Instrument
from cift_strategies.backtest import HORIZON_LABELS, VERSIONS, RunResult, Traded

if TYPE_CHECKING:
    from cift_models.inference import Engine, Predictions
    from cift_models.windows import Block
    from cift_strategies.serving import Models


@dataclass(frozen=True, slots=True)
class Scored:
    """The predictions of a run and what came of them; picklable."""

    sample: Mapping[str, NDArray[Any]]  # see validate.Sample
    threshold: NDArray[np.float64]  # (I, H)
    scores: Mapping[str, Any]
    regret: Mapping[str, Any]
    altdata: Mapping[str, Any]
    importance: Mapping[str, Any]
    left_out: Sequence[str]
    members: Sequence[str]
    model_version: str
    predictions: int
    latency_ms: NDArray[np.float64]
    mids: Sequence[tuple[NDArray[np.int64], NDArray[np.float64]]]
    regimes: Sequence[tuple[NDArray[np.int64], NDArray[np.int8]]]
    first: int  # stamps of the first and last event, ns
    last: int


class Outcomes:
    """Predictions written to `predictions.parquet` with what came of them, and sampled for the scores."""

    def __init__(self, models: Models, engine: Engine) -> None:
        from cift_models import artifacts
        from cift_models.baselines import Baselines
        from cift_models.features import NAMES
        from cift_models.validate import Sample
        from cift_models.windows import HORIZONS_NS
        from cift_strategies.results import MidPath, PredictionWriter

        assert models.results is not None
        self._instruments, self._seed, self._mid = list(models.instruments), models.seed, NAMES.index("mid")
        manifest = artifacts.read(models.artifact).manifest
        trained = [manifest["instruments"].index(x.id) for x in self._instruments]
        self._baselines, self._threshold = Baselines.load(models.artifact).only(trained), engine.ensemble.threshold[trained]
        self._left_out = manifest["folds"][-1]["left_out"] if manifest["folds"] else []
        self._sample = Sample(self._instruments, NAMES, len(engine.members), self._baselines.columns)
        self._members = list(engine.members)
        place = models.results / "predictions.parquet"
        self._writer = PredictionWriter(place, self._instruments, HORIZON_LABELS, HORIZONS_NS, self._mid, self._seed, 0)
        self._mids = MidPath(len(self._instruments))
        self._first = self._last = 0

    def push(self, block: Block, p: Predictions, latency: NDArray[np.int64]) -> None:
        """`latency` (m,) ns, of each prediction."""
        if p.votes.shape[1] != len(self._members):
            return  # another artifact with other members has been swapped in
        self._sample.push(block, p)
        self._writer.push(block, p, latency)
        self._mids.push(p.ts, p.instrument, block.rows[block.closes, self._mid])
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
        n = len(ids)
        return Scored(
            got, self._threshold, scores, regret, altdata, engine.importance(), self._left_out, self._members, engine.model_version,
            self._writer.count, self._writer.latencies / 1e6, [self._mids.result(k) for k in range(n)], self._writer.regimes,
            self._first, self._last,
        )  # fmt: skip


def write_run(
    folder: Path, name: str, instruments: Sequence[Instrument], scored: Scored, traded: Traded, told: Mapping[str, Any],
    config: Mapping[str, Any], order_latency_ms: float,
) -> RunResult:  # fmt: skip
    """Write `summary.json`, `fills.parquet`, `positions.parquet` and the report of a live run into `folder`, beside its predictions.

    `told`: what else the summary says, over the figures of trading.
    """
    from cift_models.hmm import REGIMES
    from cift_strategies.report import write_report
    from cift_strategies.results import write_json

    ids, waits = [x.id for x in instruments], scored.latency_ms
    versions = {v: version(v) for v in VERSIONS}
    summary: dict[str, Any] = {
        "source": name,
        "instruments": ids,
        "predictions": scored.predictions,
        **traded.summary,
        "decision_latency_ms": {f"p{v}": float(np.percentile(waits, v)) if len(waits) else None for v in (50, 99)},
        "order_latency_ms": order_latency_ms,
        "baseline_rule": None,
        "scores": scored.scores,
        "thresholds": {x: dict(zip(HORIZON_LABELS, scored.threshold[k].tolist())) for k, x in enumerate(ids)},
        "regret": scored.regret,
        "altdata": scored.altdata,
        "importance": scored.importance,
        "left_out": scored.left_out,
        "digest": traded.digest,
        "model_version": scored.model_version,
        "split": scored.first - 1,
        "start": scored.first,
        "end": scored.last,
        "versions": versions,
        **told,
    }
    for what, rows in (("fills", traded.fills), ("positions", traded.positions)):
        pq.write_table(rows, folder / f"{what}.parquet", compression="zstd")
    outcome = RunResult(
        name, instruments, summary, scored.scores, scored.sample, scored.threshold, {}, scored.first - 1, scored.first, scored.last, traded,
        None, folder / "predictions.parquet", dict(zip(ids, scored.mids)), dict(zip(ids, scored.regimes)), REGIMES, scored.members, waits,
        order_latency_ms, (), scored.regret, config, versions, traded.digest, None,
    )  # fmt: skip
    write_json(folder / "summary.json", summary)
    write_report(outcome, folder)
    return outcome
