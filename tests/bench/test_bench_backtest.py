"""How much of an empty strategy's speed is left when features, or features and predictions, go through BacktestNode.

Ratios of events per second of CPU time in one run on the Binance recording; the figures are printed as extra_info.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nautilus_trader.backtest import BacktestDataConfig, BacktestEngineConfig, BacktestNode, BacktestRunConfig, BacktestVenueConfig
from nautilus_trader.common import LoggerConfig, LogLevel
from nautilus_trader.execution import FixedFeeModel
from nautilus_trader.model import BookType, Currency, InstrumentId, Money, NautilusDataType
from nautilus_trader.trading import Strategy

from catalog.events import Instrument, read_catalog
from cift_strategies.faults import Faults
from cift_strategies.feature_actor import FeatureActor
from cift_strategies.stream import Span
from cift_strategies.system import Replay, run_backtest

ROUNDS = 3


class Empty(Strategy):
    """As ../shared/checks/empty_strategy.py: counts what it is given."""

    def __new__(cls, *_args: Any) -> Empty:
        return super().__new__(cls)

    def __init__(self, ids: list[InstrumentId]) -> None:
        super().__init__()
        self.ids, self.n = ids, 0

    def on_start(self) -> None:
        for i in self.ids:
            self.subscribe_book_deltas(i, book_type=BookType.L2_MBP)
            self.subscribe_trades(i)

    def on_book_deltas(self, d: Any) -> None:
        self.n += len(d.deltas)

    def on_trade(self, _t: Any) -> None:
        self.n += 1


def empty(root: Path, instruments: list[Instrument], chunk_size: int | None) -> tuple[int, float]:
    """Events and seconds of an empty strategy."""
    ids = [InstrumentId.from_str(x.id) for x in instruments]
    kinds = (NautilusDataType.TradeTick, NautilusDataType.OrderBookDelta)
    venue = BacktestVenueConfig(
        name="BINANCE", oms_type="NETTING", account_type="MARGIN", starting_balances=["1000000 USDT"], book_type="L2_MBP",
        fee_model=FixedFeeModel(Money(0, Currency.from_str("USDT"))),
    )  # fmt: skip
    config = BacktestRunConfig(
        venues=[venue], data=[BacktestDataConfig(k, str(root.resolve()), instrument_ids=ids) for k in kinds], chunk_size=chunk_size,
        engine=BacktestEngineConfig(logging=LoggerConfig(stdout_level=LogLevel.ERROR)), raise_exception=True, dispose_on_completion=False,
    )  # fmt: skip
    node, strategy = BacktestNode([config]), Empty(ids)
    node.build()
    node.add_strategy(config.id, strategy)
    began = time.process_time()
    node.run()
    took = time.process_time() - began
    node.dispose()
    return strategy.n, took


class Features:
    """The feature actor alone."""

    def __init__(self, instruments: list[Instrument]) -> None:
        self.faults = Faults()
        self.actor = FeatureActor(instruments, self.faults)

    def add_to(self, add_actor: Callable[[Any], object], _add_strategy: Callable[[Any], object]) -> None:
        add_actor(self.actor)

    def run(self, replay: Replay) -> tuple[int, float]:
        began = time.process_time()
        _, node, _ = run_backtest(self, replay, self.faults)  # type: ignore[arg-type]
        took = time.process_time() - began
        node.dispose()
        return self.actor.vectors, took


@pytest.fixture(scope="module")
def binance(data: Path) -> tuple[Path, list[Instrument], Replay]:
    root = data / "catalogs" / "binance-2024-08-08"
    instruments = read_catalog(root)[0]
    span = Span(root, instruments)
    Features(instruments).run(Replay(root, instruments, span.first, span.first + 10**9, 1e6, 0))  # compiles
    return root, instruments, Replay(root, instruments, span.first, span.last, 1e6, 0)


def test_features_through_the_node_beside_an_empty_strategy(benchmark: Any, binance: tuple[Path, list[Instrument], Replay]) -> None:
    root, instruments, replay = binance
    rates: dict[str, list[float]] = {"empty": [], "empty, chunked": [], "features": []}

    def rounds() -> None:
        for name, run in (
            ("empty", lambda: empty(root, instruments, None)),
            ("empty, chunked", lambda: empty(root, instruments, replay.chunk_size)),
            ("features", lambda: Features(instruments).run(replay)),
        ):
            events, seconds = run()
            assert events == 1_456_836
            rates[name].append(events / seconds)

    benchmark.pedantic(rounds, rounds=ROUNDS, iterations=1)
    best = {name: float(np.max(v)) for name, v in rates.items()}
    benchmark.extra_info |= {f"{name} events/s": round(v) for name, v in best.items()}
    benchmark.extra_info["ratio"] = round(best["features"] / best["empty"], 3)
    benchmark.extra_info["ratio to chunked"] = round(best["features"] / best["empty, chunked"], 3)
    print(benchmark.extra_info)
    assert benchmark.extra_info["ratio"] >= 0.5
