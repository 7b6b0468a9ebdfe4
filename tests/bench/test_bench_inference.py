"""Event to signal with all five members, batch by batch as live, on the Binance recording: quantiles and each stage's share."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nautilus_trader.model import InstrumentId, OrderBookDeltas
from nautilus_trader.persistence import ParquetDataCatalog

from catalog.events import EVENT, SCALE, read_catalog
from cift_models.ensemble import MEMBERS, recommend
from cift_models.inference import Engine, stream
from cift_models.train import Config, train
from cift_models.windows import Block
from cift_strategies.intake import Intake
from cift_strategies.stream import Span

TRAIN_S, LIVE_S = 240, 25
STAGES = ("features", *MEMBERS, "ensemble", "decision")


class Clock:
    """CPU and wall time by stage, of the batch that is under way."""

    def __init__(self) -> None:
        self.batches: list[dict[str, tuple[int, int]]] = []
        self.now: dict[str, tuple[int, int]] = {}

    def add(self, stage: str, wall: int, cpu: int) -> None:
        a, b = self.now.get(stage, (0, 0))
        self.now[stage] = a + time.perf_counter_ns() - wall, b + time.thread_time_ns() - cpu


class Timed:
    """A member, or the ensemble, whose answer is timed."""

    def __init__(self, inner: Any, stage: str, clock: Clock, method: str) -> None:
        self._inner, self._stage, self._clock = inner, stage, clock
        setattr(self, method, self._timed(getattr(inner, method)))

    def _timed(self, f: Any) -> Any:
        def run(*args: Any) -> Any:
            wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
            try:
                return f(*args)
            finally:
                self._clock.add(self._stage, wall, cpu)

        return run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.fixture(scope="module")
def recording(data: Path) -> tuple[Path, list[Any], int]:
    root = data / "catalogs" / "binance-2024-08-08"
    instruments = read_catalog(root)[0]
    return root, instruments, Span(root, instruments).first


@pytest.fixture(scope="module")
def artifact(recording: tuple[Path, list[Any], int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, _, first = recording
    return train(root, end=first + TRAIN_S * SCALE, out=tmp_path_factory.mktemp("five") / "artifact", config=Config(cap=40_000))


def messages(root: Path, instruments: list[Any], start: int, end: int) -> list[Any]:
    """Deltas as Nautilus groups them, and trades, in the order in which they are delivered."""
    catalog, found = ParquetDataCatalog(str(root.resolve())), []
    for x in instruments:
        deltas = [d for d in catalog.query_order_book_deltas([x.id], start=start, end=end) if start < d.ts_init <= end]
        for ts, group in itertools.groupby(deltas, lambda d: d.ts_init):
            found.append((ts, 1, OrderBookDeltas(InstrumentId.from_str(x.id), list(group))))
        found += [(t.ts_init, 0, t) for t in catalog.query_trade_ticks([x.id], start=start, end=end) if start < t.ts_init <= end]
    return [m for _, _, m in sorted(found, key=lambda f: f[:2])]


def test_event_to_signal_of_four_instruments_with_all_five_members(benchmark: Any, recording: Any, artifact: Path) -> None:
    root, instruments, first = recording
    start, clock = first + TRAIN_S * SCALE, Clock()
    engine = Engine.load(artifact, instruments)
    for block in stream(instruments, read_catalog(root, None, start - 60 * SCALE, start)[1]):
        engine.predict(block)
    assert len(engine._present) == 5
    engine._present = [(a, Timed(m, m.name, clock, "predict")) for a, m in engine._present]
    engine.ensemble = Timed(engine.ensemble, "ensemble", clock, "decide")
    intake = Intake(instruments)
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    told = 0

    def run() -> None:
        nonlocal told
        for message in messages(root, instruments, start, start + LIVE_S * SCALE):
            clock.now = {}
            wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
            v = intake.deltas(message) if isinstance(message, OrderBookDeltas) else intake.trade(message)
            clock.add("features", wall, cpu)
            waiting.append((v.events, v.rows))
            if not v.closes:
                continue
            before = sum(len(e) for e, _ in waiting[:-1])
            events, rows = (np.concatenate(part) for part in zip(*waiting))
            block = Block(events.astype(EVENT), rows, before + np.array(v.closes))
            waiting.clear()
            p = engine.predict(block)
            wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
            for i in range(len(p.ts)):
                recommend(p.proba[i], p.magnitude[i], p.direction[i], int(p.regime[i]), 1.0)
            clock.add("decision", wall, cpu)
            clock.batches.append(clock.now)
            told += len(p.ts)

    benchmark.pedantic(run, rounds=1)
    spent = np.array([[b.get(s, (0, 0)) for s in STAGES] for b in clock.batches[200:]]) / 1e6  # (batches, stages, wall and CPU) ms
    wall, cpu = (np.quantile(spent[..., k].sum(axis=1), (0.5, 0.99, 0.999)) for k in (0, 1))
    slow = spent[..., 1].sum(axis=1) >= cpu[1]
    print(f"\nevent to signal, {len(spent):,} batches: p50 {wall[0]:.3f}, p99 {wall[1]:.3f}, p99.9 {wall[2]:.3f} ms on the clock;")
    print(f"p50 {cpu[0]:.3f}, p99 {cpu[1]:.3f}, p99.9 {cpu[2]:.3f} ms of CPU. Share of the stages, in all and in the slowest hundredth:")
    for s, name in enumerate(STAGES):
        share = [100 * spent[rows, s, 1].sum() / spent[rows, :, 1].sum() for rows in (slice(None), slow)]
        print(f"  {name:<12}{share[0]:5.1f} %  {share[1]:5.1f} %   p50 {np.median(spent[:, s, 1]):.3f} ms")
    benchmark.extra_info |= {f"{k} ms": v for k, v in zip(("p50", "p99", "p99.9", "p50 CPU", "p99 CPU", "p99.9 CPU"), (*wall, *cpu))}
    assert len(spent) > 500 and told >= len(clock.batches) and cpu[1] < 5


def test_blocks_of_history_with_all_five_members_keep_up_with_a_hundred_thousand_events_a_second(
    benchmark: Any, recording: Any, artifact: Path
) -> None:
    """Features, members and ensemble, CPU time of one core; what BacktestNode adds is test_bench_backtest's affair."""
    root, instruments, first = recording

    def run() -> int:
        engine, n = Engine.load(artifact, instruments), 0
        for block in stream(instruments, read_catalog(root, None, first, first + TRAIN_S * SCALE)[1]):
            engine.predict(block)
            n += len(block.events)
        return n

    run()
    began = time.process_time()
    n = benchmark.pedantic(run, rounds=1)
    speed = n / (time.process_time() - began)
    print(f"\nblocks: {speed:,.0f} events/s of CPU time with features and all five")
    benchmark.extra_info["events/s"] = speed
    assert speed > 100_000
