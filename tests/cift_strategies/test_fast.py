"""Fast mode: predictions made once, orders to the last of them those of the streaming way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import EAGER, Small

from catalog.events import SCALE
from cift_models.features import NAMES
from cift_models.hmm import REGIMES
from cift_models.inference import DEFAULT_LATENCY, Engine, Predictions
from cift_models.windows import HORIZONS_NS, Block
from cift_strategies import fast
from cift_strategies.backtest import Plan, RunConfig, blocks, delay, plan, resolve, stream
from cift_strategies.faults import Faults
from cift_strategies.inference_actor import LookAhead
from cift_strategies.outcome import Traded


def streamed(p: Plan, engine: Any) -> Traded:
    n = len(p.instruments)
    ahead = LookAhead(blocks(p, p.start, p.last), engine, delay(p, n, engine.latency.q, engine.latency.ns), HORIZONS_NS, n)
    return stream(p, ahead, p.terms(REGIMES, Faults()))[0]


def same(a: Traded, b: Traded) -> bool:
    curves = np.array_equal(a.equity, b.equity) and np.array_equal(a.equity_ts, b.equity_ts)
    return a.digest == b.digest and a.summary == b.summary and a.fills.equals(b.fills) and a.positions.equals(b.positions) and curves


@pytest.fixture(scope="module")
def recorded(predicted: Path) -> fast.Recorded:
    return fast.Recorded(next(predicted.glob("*-predictions")))


def planned(small: Small, **settings: Any) -> Plan:
    config = RunConfig(catalog=small.catalog, artifacts=small.artifact, rule=False, **settings)
    return plan(config, resolve(config))


def test_the_run_that_was_streamed_is_traded_again(small: Small, recorded: fast.Recorded) -> None:
    assert same(fast.trade(planned(small, strategy=EAGER), recorded), small.result.traded)


@pytest.mark.parametrize(
    "settings",
    [
        {"latency_ms": 0.0, "settings": {"min_edge_ticks": 0.0}},
        {"strategy": EAGER, "latency_ms": 40.0, "order_latency_ms": 0.0, "settings": {"entry": "best", "entry_wait_ms": 50.0}},
        {"strategy": EAGER, "seed": 11, "settings": {"entry": "join", "then": "cancel", "stop_multiple": 1.0}},
    ],
)
def test_any_rules_of_trading_give_the_orders_of_the_streaming_way(
    small: Small, recorded: fast.Recorded, settings: dict[str, Any]
) -> None:
    p = planned(small, **settings)
    got = fast.trade(p, recorded)
    assert same(got, streamed(p, Engine.load(small.artifact, p.instruments)))
    assert settings.get("strategy") is None or got.summary["fills"] > 50


class Queues:
    """Four ticks in five seconds towards the bigger of the two best queues: exact on any processor."""

    model_version, members, latency = "queues", ("queues",), DEFAULT_LATENCY

    def predict(self, block: Block) -> Predictions:
        at, lean = block.events[block.closes], block.rows[block.closes, NAMES.index("imbalance_1")]
        m, h = len(at), len(HORIZONS_NS)
        side = np.where(np.abs(lean) >= 0.7, np.sign(lean), 0.0)
        proba, direction = np.full((m, h, 3), np.nan), np.zeros((m, h), np.int8)
        proba[:, 2] = np.where((side > 0)[:, None], [0.0, 0.1, 0.9], [0.9, 0.1, 0.0])
        direction[:, 2] = side
        votes = np.full((m, 1, h, 3), np.nan, np.float32)
        return Predictions(
            at["ts_init"], at["instrument"].astype(np.int64), proba, np.full((m, h), 40.0), proba.max(axis=2), direction,
            np.full(m, -1, np.int8), votes,
        )  # fmt: skip


def test_a_slice_of_binance_is_traded_alike(data: Path, tmp_path: Path) -> None:
    root = data / "catalogs/binance-2024-08-08"
    config = RunConfig(catalog=root, end=1_723_161_254_152_322_667 + 40 * SCALE, train_fraction=0.2, rule=False)
    p = plan(config, resolve(config))
    replayed = fast.Recorded(fast.record(p, Queues(), tmp_path / "recorded"))  # type: ignore[arg-type]
    got = fast.trade(p, replayed)
    assert got.summary["fills"] > 100 and same(got, streamed(p, Queues()))
    assert got.summary["decisions"]["abstains"] > 100 and got.summary["decisions"]["before the split"] > 100


def test_a_stream_that_is_not_the_recorded_one_is_refused(small: Small, recorded: fast.Recorded, tmp_path: Path) -> None:
    from dataclasses import replace

    p = planned(small)
    with pytest.raises(AssertionError, match="recorded"):
        fast.trade(replace(p, last=p.last - SCALE), recorded)


def test_a_strategy_that_looks_at_features_is_told_so(small: Small, recorded: fast.Recorded) -> None:
    with pytest.raises(RuntimeError, match="fast = false"):
        fast.trade(planned(small, strategy="own_strategies:Curious"), recorded)
