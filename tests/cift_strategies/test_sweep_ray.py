"""Sweeps on a real Ray cluster of several nodes, of which a worker and a node are killed."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Small
from test_sweep import begun, of_small, runs

from catalog.errors import InputError
from cift_strategies.sweep import sweep
from cift_strategies.workers import Ray

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


def test_a_killed_worker_and_a_killed_node_lose_and_double_nothing(
    cluster: Any, small: Small, predicted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worker").mkdir()
    (tmp_path / "node").mkdir()
    path, out = of_small(small, tmp_path, "", "settings.min_edge_ticks = [0.1, 1.0, 2.0]", "own_strategies:Mortal"), tmp_path / "out"
    found = sweep(path, {"out": begun(out, predicted)}, ray=cluster.address)
    assert not (tmp_path / "worker").exists() and not (tmp_path / "node").exists()  # both were filled
    assert len(runs(out)) == len({r["key"] for r in found["table"]}) == len(found["table"]) == 3 and not found["failed"]
    assert found["table"][0]["digest"] == small.result.digest
    kept = runs(out)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)  # what auto means on a machine with several clusters
    assert sweep(path, {"out": out}, ray="auto")["table"] == found["table"] and runs(out) == kept


@pytest.mark.parametrize("address", ["HOST:1", "auto", "localhost:x", "nobody"])
def test_one_line_says_that_no_cluster_answers(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` where the environment names a cluster that is gone; HOST:PORT where another one runs, whose name stands there too."""
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    asked = address.replace("HOST:1", f"127.0.0.1:{port}")
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}" if address == "auto" else "127.0.0.1:6379")
    with pytest.raises(InputError, match="no Ray cluster answers") as caught:
        Ray(asked)
    assert asked in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("answer", [None, b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_one_line_says_that_a_port_is_not_of_ray(answer: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that says nothing, hangs up or answers in another protocol."""
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("cift_strategies.workers.ANSWER_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as other:

        def serve() -> None:
            line, _ = other.accept()
            lines.append(line)
            if answer is not None:
                line.recv(100)
                line.sendall(answer)
                line.close()

        lines: list[socket.socket] = []
        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(InputError, match=r"no Ray cluster answers.*something else listens there") as caught:
            Ray(f"127.0.0.1:{other.getsockname()[1]}")
        thread.join()
        for line in lines:
            line.close()
    assert "\n" not in str(caught.value)
