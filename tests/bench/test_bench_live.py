"""The live node: how soon the kill switch cancels while the models hang, and how many events a second it takes with all of them on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "cift_strategies"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path]:
    """Files of a small market's second session, and models of its first."""
    from catalog.databento import import_dbn
    from catalog.events import read_catalog
    from catalog.synthetic import make_market
    from cift_models.train import train

    root = tmp_path_factory.mktemp("live")
    market = make_market(root / "market", 3, sessions=2, events=200_000, instruments=2)
    first = import_dbn([market.mbo[0], market.definitions[0]], root / "first").root
    train(lambda: read_catalog(first), out=root / "models", seed=3, members=("hmm", "fusion"))
    return [market.mbo[1], market.definitions[1]], root / "models"


def session(trained: tuple[list[Path], Path], state: Path, strategy: str, *options: str, **environment: str) -> dict[str, Any]:
    files, artifact = trained
    config = state.with_suffix(".toml")
    config.write_text(f'dbn = {json.dumps([str(f) for f in files])}\nartifacts = "{artifact}"\nstrategy = "{strategy}"\n')
    command = [sys.executable, "run_live.py", "--config", str(config), "--state", str(state), *options]
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    told = os.environ | {"PYTHONPATH": paths} | environment
    done = subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2_000:]
    return json.loads((state / "summary.json").read_text())


def test_the_kill_switch_cancels_within_50_ms_while_the_models_hang(benchmark: Any, trained: Any, tmp_path: Path) -> None:
    """From the kill file's appearing, at any moment of the loop's turn, to the last cancel's being sent; the models' process is stopped."""
    state, trips = tmp_path / "state", tmp_path / "trips"
    told = {"CIFT_KILL": str(state / "kill"), "CIFT_TRIPS": str(trips)}
    options = ("--speed", "5", "--duration", "60")
    benchmark.pedantic(session, (trained, state, "live_strategies:Tripped", *options), told, rounds=1)
    took = np.array([int(line) for line in trips.read_text().split()]) / 1e6
    p50, p99 = (float(v) for v in np.percentile(took, (50, 99)))
    benchmark.extra_info |= {"trips": len(took), "p50_ms": p50, "p99_ms": p99, "max_ms": float(took.max())}
    assert len(took) >= 50 and p99 < 50


def test_no_event_is_skipped_by_an_unthrottled_stream(benchmark: Any, trained: Any, tmp_path: Path) -> None:
    summary = benchmark.pedantic(session, (trained, tmp_path / "state", "own_strategies:Eager", "--speed", "0"), rounds=1)
    stages = {s["stage"]: s["p99_ms"] for s in summary["live"]["stages"]}
    benchmark.extra_info |= {"events": summary["events"], "skipped": summary["live"]["skipped"], "p99_ms": stages}
    assert summary["live"]["lost"] == 0
