"""Fast mode beside the engine without a strategy, all cores beside one, and the memory of a worker, on the Binance recording.

CPU seconds, in turns; models of the default members are trained on the first part of the recording.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cift_models.inference import Engine
from cift_models.train import train
from cift_strategies import fast
from cift_strategies.backtest import Plan, RunConfig, give_back, plan, resolve
from cift_strategies.faults import Faults
from cift_strategies.settings import Settings
from cift_strategies.sweep import Job, _Keys, execute, prepare
from cift_strategies.system import run_backtest
from cift_strategies.workers import LIFE, Processes

ROUNDS = 5
EACH = 10  # runs that several processes share
RUNS = 200


@pytest.fixture(scope="module")
def artifact(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = RunConfig(catalog=data / "catalogs/binance-2024-08-08")
    p = plan(config, resolve(config))
    return train(p.training, out=tmp_path_factory.mktemp("models") / "artifact", seed=7, members=config.train)


def recorded(data: Path, artifact: Path, out: Path, **more: Any) -> tuple[Plan, fast.Recorded]:
    config = RunConfig(catalog=data / "catalogs/binance-2024-08-08", artifacts=artifact, rule=False, **more)
    p = plan(config, resolve(config))
    return p, fast.Recorded(fast.record(p, Engine.load(artifact, p.instruments), out))


class Nobody:
    def add_to(self, _actor: Any, _strategy: Any) -> None:
        pass


def engine_alone(p: Plan) -> float:
    began = time.process_time()
    _, node, _ = run_backtest(Nobody(), fast._replay(p), Faults())
    took = time.process_time() - began
    node.dispose()
    return took


def played(p: Plan, r: fast.Recorded) -> float:
    began = time.process_time()
    traded = fast.trade(p, r)
    took = time.process_time() - began
    assert traded.summary["fills"] > 100
    return took


def test_a_run_of_a_sweep_costs_little_more_than_the_engine(benchmark: Any, data: Path, artifact: Path, tmp_path: Path) -> None:
    p, r = recorded(data, artifact, tmp_path / "recorded")
    took: dict[str, list[float]] = {"engine": [], "fast": []}

    def turn() -> None:
        took["engine"].append(engine_alone(p))
        took["fast"].append(played(p, r))

    benchmark.pedantic(turn, rounds=ROUNDS, iterations=1)
    best = {name: min(v) for name, v in took.items()}
    benchmark.extra_info |= {f"{name} events/s": round(p.streamed / v) for name, v in best.items()}
    benchmark.extra_info["ratio"] = round(best["engine"] / best["fast"], 3)
    print(benchmark.extra_info)
    assert benchmark.extra_info["ratio"] >= 0.5


def several(folder: Path, data: Path, artifact: Path, shared: Path) -> list[Job]:
    """Runs that change only how they trade, as a sweep into `folder` has them; predictions are in `shared`."""
    (folder / "runs").mkdir(parents=True)
    (folder / "shared").symlink_to(shared)
    keys, catalog = _Keys(folder, True), data / "catalogs/binance-2024-08-08"
    edges = [0.1 + 0.01 * k for k in range(EACH)]
    return [keys.job(RunConfig(catalog=catalog, artifacts=artifact, settings=Settings(min_edge_ticks=e))) for e in edges]


def seconds(n: int, jobs: list[Job]) -> float:
    """Wall time of `n` processes, held to as many cores, for all of `jobs` but the first `n`, with which they begin. One that is not held
    uses more than its core: NautilusTrader reads ahead in another thread, 8 % of a run's CPU time."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:n])
    workers = Processes(n)
    try:
        assert [d[1:] for d in workers.run(execute, jobs[:n])] == [(None, None)] * n
        began = time.perf_counter()
        assert all(d[1:] == (None, None) for d in workers.run(execute, jobs[n:]))
        return (time.perf_counter() - began) / (len(jobs) - n)
    finally:
        workers.close()
        os.sched_setaffinity(0, cores)


def test_all_cores_do_as_many_times_the_work_of_one(benchmark: Any, data: Path, artifact: Path, tmp_path: Path) -> None:
    """On an idle machine: wall time, in turns."""
    cores, shared = len(os.sched_getaffinity(0)), tmp_path / "shared"
    shared.mkdir()
    prepare(several(tmp_path / "first", data, artifact, shared)[0])
    took: dict[int, list[float]] = {1: [], cores: []}

    def turn() -> None:
        for n, found in took.items():
            found.append(seconds(n, several(tmp_path / f"{n}-{len(found)}", data, artifact, shared)))

    benchmark.pedantic(turn, rounds=2, iterations=1)
    best = {n: min(v) for n, v in took.items()}
    benchmark.extra_info |= {f"s a run, {n} processes": round(v, 3) for n, v in best.items()}
    benchmark.extra_info["efficiency"] = round(best[1] / (cores * best[cores]), 3)
    print(benchmark.extra_info)
    assert cores == 1 or benchmark.extra_info["efficiency"] >= 0.9


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def test_a_thousand_runs_in_one_worker_grow_it_by_less_than_50_mb(benchmark: Any, data: Path, artifact: Path, tmp_path: Path) -> None:
    """The slope over the later three quarters of the runs, of a short part of the recording, times the runs that a process lives for."""
    first = 1_723_161_254_152_322_667
    p, r = recorded(data, artifact, tmp_path / "recorded", end=first + 330 * 10**9, start=first + 200 * 10**9)
    size = []

    def runs() -> None:
        for _ in range(RUNS):
            fast.trade(p, r)
            give_back()
            size.append(resident_mb())

    benchmark.pedantic(runs, rounds=1, iterations=1)
    later = np.array(size[RUNS // 4 :])
    slope = float(np.polyfit(np.arange(len(later)), later, 1)[0])
    told = {"runs": RUNS, "MB at first": size[0], "MB at last": size[-1], "MB in a process's life": LIFE * slope}
    benchmark.extra_info |= {k: round(v, 1) for k, v in told.items()}
    print(benchmark.extra_info)
    assert LIFE * slope < 50
