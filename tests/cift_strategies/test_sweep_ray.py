"""Sweeps on a real Ray cluster of several nodes, of which a worker and a node are killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Small
from test_sweep import of_small, runs

from cift_strategies.sweep import sweep

HERE = Path(__file__).parent
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # before Ray is imported: a node of 127.0.0.1 is looked for there
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A head without workers and two nodes with one each, on this machine alone, that tell nobody of themselves."""
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0", "GRAVES": str(tmp_path),
        "PYTHONPATH": os.pathsep.join((str(HERE.parents[1]), str(HERE))),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "node_ip_address": "127.0.0.1", "include_dashboard": False}
    )  # fmt: skip
    for _ in range(2):
        made.add_node(num_cpus=1, node_ip_address="127.0.0.1", include_dashboard=False)
    yield made
    ray.shutdown()
    made.shutdown()


def test_a_killed_worker_and_a_killed_node_lose_and_double_nothing(cluster: Any, small: Small, tmp_path: Path) -> None:
    (tmp_path / "worker").mkdir()
    (tmp_path / "node").mkdir()
    path = of_small(small, tmp_path, "", "settings.min_edge_ticks = [0.1, 1.0, 2.0, 4.0]", "own_strategies:Mortal")
    found = sweep(path, {"out": tmp_path / "out"}, ray=cluster.address)
    assert not (tmp_path / "worker").exists() and not (tmp_path / "node").exists()  # both were filled
    assert len(runs(tmp_path / "out")) == len({r["key"] for r in found["table"]}) == len(found["table"]) == 4 and not found["failed"]
    assert found["table"][0]["digest"] == small.result.digest
    kept = runs(tmp_path / "out")
    assert sweep(path, {"out": tmp_path / "out"})["table"] == found["table"] and runs(tmp_path / "out") == kept
