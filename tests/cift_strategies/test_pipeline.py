"""The Python API: predictions of the live system in a program's own loop, and what it recommends to do about them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from catalog.errors import InputError
from catalog.events import SCALE, Instrument
from cift_models.windows import HORIZONS_NS
from cift_strategies import InferencePipeline, PipelineConfig
from cift_strategies.messages import Prediction
from cift_strategies.pipeline import PredictionResult
from cift_strategies.recommendation import recommendation

ROOT = Path(__file__).resolve().parents[2]
SHARE = Instrument("SHARE.XTST", SCALE // 100, SCALE, 1.0, "USD", kind="equity")
FIVE = ("hawkes", "transformer", "hmm", "gnn", "fusion")


def said(p: float, side: int, agree: int, magnitude: float = 8.0) -> Prediction:
    """A prediction of `side` with probability `p` at the third horizon, for which `agree` of the five tilt."""
    proba = np.full((4, 3), np.nan)
    proba[2] = [p, 1 - p, 0] if side < 0 else [0, 1 - p, p]
    votes = np.full((5, 4, 3), np.nan, np.float32)
    votes[:, 2] = [0.3, 0.4, 0.3]
    votes[:agree, 2] = [0.6, 0.3, 0.1] if side < 0 else [0.1, 0.3, 0.6]
    confidence = np.where(np.isnan(proba[:, 0]), np.nan, p)
    direction = tuple(side if h == 2 else 0 for h in range(4))
    return Prediction(0, 10**18, 10**6, HORIZONS_NS, proba, np.full(4, magnitude), confidence, direction, 1, votes, "v1")


def told(p: Prediction, mid: float = 100.005, spread: float = 1.0, **limits: Any) -> Any:
    return recommendation(p, SHARE, mid, spread, FIVE, ("calm", "rising"), HORIZONS_NS, **limits)


def test_a_clear_move_is_recommended_with_a_stop_behind_and_a_target_ahead() -> None:
    up, down = told(said(0.8, 1, 4)), told(said(0.8, -1, 4))
    assert up.should_trade and up.direction == 1 and up.horizon_ms == 5_000 and up.regime == "rising" and not up.reason
    assert up.stop_loss < 100.005 < up.take_profit and down.take_profit < 100.005 < down.stop_loss
    assert 0 < up.position_size <= 1 and up.risk_reward > 0 and up.agreement == 4
    assert up.votes == {"hawkes": 1, "transformer": 1, "hmm": 1, "gnn": 1, "fusion": 0}
    assert all(round(v * 100, 6) == round(v * 100) for v in (up.stop_loss, up.take_profit))  # on the tick


def test_too_few_members_or_too_little_confidence_is_no_trade() -> None:
    few = told(said(0.8, 1, 2), min_agreement=3)
    assert not few.should_trade and few.direction == 1 and few.reason == "2 members agree, 3 are asked for"
    unsure = told(said(0.6, 1, 4), confidence_threshold=0.65)
    assert not unsure.should_trade and unsure.reason == "confidence 0.60, 0.65 is asked for" and unsure.position_size == 0
    assert told(said(0.65, 1, 3), min_agreement=3, confidence_threshold=0.65).should_trade


def test_nothing_is_recommended_without_two_sides_of_the_book_or_when_costs_eat_the_move() -> None:
    assert told(said(0.8, 1, 5), mid=float("nan")).reason == "the book has no two sides"
    dear = told(said(0.8, 1, 5), spread=20.0)
    assert not dear.should_trade and dear.reason == "does not pay for spread and cost" and dear.stop_loss is None


def test_the_key_chooses_the_feed_and_is_never_shown() -> None:
    config = PipelineConfig(polygon_api_key="secret-key", symbols=["AAPL"], min_agreement=3, confidence_threshold=0.65)  # type: ignore[arg-type]
    assert config.source == "polygon" and "secret-key" not in repr(config) + config.model_dump_json()
    assert PipelineConfig().source == "replay" and PipelineConfig(databento_api_key="k").source == "databento"  # type: ignore[arg-type]


async def _start(config: PipelineConfig) -> None:
    await InferencePipeline(config).start()


def test_what_the_user_can_mend_is_told_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYGON_API_KEY", "")
    with pytest.raises(InputError, match="trained models"):
        asyncio.run(_start(PipelineConfig(polygon_api_key="k", symbols=("AAPL",))))  # type: ignore[arg-type]


def test_a_program_gets_predictions_without_a_key_in_its_own_loop(small: Any) -> None:
    files = sorted((small.catalog.parent / "market").glob("*.dbn.zst"))[-2:]
    config = PipelineConfig(dbn=tuple(files), artifacts=small.artifact, speed=50, min_agreement=2, confidence_threshold=0.4)
    results: list[PredictionResult] = []
    plain: list[PredictionResult] = []

    async def predict() -> InferencePipeline:
        pipeline = InferencePipeline(config)

        @pipeline.on_prediction
        async def told(result: PredictionResult) -> None:
            await asyncio.sleep(0)
            results.append(result)
            if len(results) == 200:
                pipeline.stop()

        pipeline.on_prediction(plain.append)
        await pipeline.start()
        return pipeline

    assert asyncio.run(predict()).delivered == 200 and plain == results  # and nothing after it was stopped
    for r in results:
        p = r.prediction
        assert r.total_latency_ms > 0 and set(p.votes) == set(FIVE)
        assert not p.should_trade or (p.agreement >= 2 and p.confidence >= 0.4 and p.position_size > 0)
    for x in small.result.instruments:
        stamps = [r.ts for r in results if r.symbol == x.id]
        assert stamps and stamps == sorted(stamps)


def test_the_example_prints_what_the_ensemble_says(small: Any, tmp_path: Path) -> None:
    files = sorted((small.catalog.parent / "market").glob("*.dbn.zst"))[-2:]
    settings = {"dbn": [str(f) for f in files], "artifacts": str(small.artifact), "speed": 50}
    command = [sys.executable, str(ROOT / "docs" / "examples" / "predictions.py"), json.dumps(settings)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3_000:]
    lines = run.stdout.splitlines()
    assert len(lines) == 20 and all(re.fullmatch(r"\w+\.\w+: (buy|sell|nothing to do) .+, \d+\.\d ms", line) for line in lines)


PLAIN = """
import asyncio, json, sys
from cift_strategies import InferencePipeline, PipelineConfig

pipeline = InferencePipeline(PipelineConfig(**json.loads(sys.argv[1])))

@pipeline.on_prediction
def told(result):
    print(result.symbol, result.prediction.direction)
    if pipeline.delivered + 1 >= 5:
        pipeline.stop()

asyncio.run(pipeline.start())
"""


def test_a_script_that_does_not_ask_for_its_name_is_not_run_again_by_the_models_process(small: Any, tmp_path: Path) -> None:
    files = sorted((small.catalog.parent / "market").glob("*.dbn.zst"))[-2:]
    settings = {"dbn": [str(f) for f in files], "artifacts": str(small.artifact), "speed": 50}
    (tmp_path / "plain.py").write_text(PLAIN)
    command = [sys.executable, str(tmp_path / "plain.py"), json.dumps(settings)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3_000:]
    assert len(run.stdout.splitlines()) == 5
