"""What 200 WebSocket clients and 500 requests a second cost a node that trades beside them, and how soon they are answered.

A whole paper session of the demo market at a speed of 5; calm and load take turns, so that a busy machine meets both alike. Shown as
extra_info: p50 and p99 of the time from an event to the strategy's decision on the prediction made of it (wall-clock ms, every prediction),
calm and under load, the ratio of the p99s with its spread over pairs of turns, the same of GETs, and CPU seconds per second of the server.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
TURNS, SECONDS, SPEED = 5, 11.0, 5.0
CLIENTS, RATE = 200, 500.0
READY_S = 300.0


@dataclass(frozen=True, slots=True)
class Session:
    url: str
    timed: Path  # of live_strategies.Timed
    server: int  # process id
    node: subprocess.Popen[str]

    def end(self) -> Any:
        """(n, 2): when each prediction was decided on, monotonic ns, and how long after its event, wall-clock ms."""
        self.node.terminate()
        self.node.wait(120)
        at, took = np.load(self.timed).T
        return at, took / SPEED / 1e6

    def server_cpu_s(self) -> float:
        fields = Path(f"/proc/{self.server}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    config = tmp_path / "live.toml"
    config.write_text('strategy = "live_strategies:Timed"\n')
    timed = tmp_path / "timed.npy"
    command = [sys.executable, "run_live.py", "--speed", f"{SPEED:g}", "--config", str(config), "--state", str(tmp_path / "s")]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "cift_strategies"), "CIFT_TIMED": str(timed)}
    node = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert node.stderr is not None
    url = next(line.split("page and API: ")[1].strip() for line in node.stderr if "page and API: " in line)
    threading.Thread(target=lambda: [None for _ in node.stderr or ()], daemon=True).start()
    with httpx.Client(base_url=url, timeout=30) as http:
        until = time.monotonic() + READY_S
        while time.monotonic() < until:
            told = http.get("/ready").status_code == 200 and http.get("/api/v1/latency").json()["items"]
            if told and any(s["stage"] == "prediction" and s["count"] > 2_000 for s in told):
                break
            time.sleep(0.5)
    try:
        yield Session(url, timed, _server(node.pid), node)
    finally:
        node.kill()
        node.wait()


def _server(node: int) -> int:
    """The process id of the node's server."""
    for child in Path(f"/proc/{node}/task").glob("*/children"):
        for pid in child.read_text().split():
            if b"cift_strategies.server" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
    raise AssertionError("the node has no server")


def load(url: str) -> dict[str, float]:
    """Listeners and requests together, each a process."""
    command = [sys.executable, "tests/bench/server_load.py", url, "--seconds"]
    listening = [*command, str(SECONDS), "--clients", str(CLIENTS)]
    asking = [*command, str(SECONDS - 1.0), "--rate", str(RATE)]
    with subprocess.Popen(listening, cwd=ROOT, stdout=subprocess.PIPE, text=True) as listeners:
        asked = json.loads(subprocess.run(asking, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        heard, _ = listeners.communicate()
    return {**asked, **json.loads(heard)}


def test_load_on_the_server_and_the_nodes_latency(benchmark: Any, session: Session) -> None:
    spans: dict[str, list[tuple[int, int]]] = {"calm": [], "load": []}
    cpu: dict[str, float] = {"calm": 0.0, "load": 0.0}
    loads: list[dict[str, float]] = []

    def turn(when: str) -> None:
        began, before = time.monotonic_ns(), session.server_cpu_s()
        if when == "load":
            loads.append(load(session.url))
        else:
            time.sleep(SECONDS)
        cpu[when] += session.server_cpu_s() - before
        spans[when].append((began, time.monotonic_ns()))

    benchmark.pedantic(lambda: [turn(when) for _ in range(TURNS) for when in ("calm", "load")], rounds=1)
    at, took = session.end()
    told = {when: [took[(at >= a) & (at < b)] for a, b in these] for when, these in spans.items()}
    info: dict[str, float] = {}
    for when, parts in told.items():
        p50, p99 = np.quantile(np.concatenate(parts), (0.5, 0.99))
        seconds = sum(b - a for a, b in spans[when]) / 1e9
        info |= {f"{when}_p50_ms": p50, f"{when}_p99_ms": p99, f"{when}_decisions": sum(map(len, parts))}
        info[f"{when}_server_cpu"] = cpu[when] / seconds
    ratios = [np.quantile(b, 0.99) / np.quantile(a, 0.99) for a, b in zip(told["calm"], told["load"])]
    info |= {"p99_ratio": info["load_p99_ms"] / info["calm_p99_ms"], "p99_ratio_least": min(ratios), "p99_ratio_most": max(ratios)}
    info |= {f"get_{q}": float(np.median([x[q] for x in loads])) for q in ("p50_ms", "p99_ms")}
    info |= {name: sum(x[name] for x in loads) for name in ("messages", "requests")}
    benchmark.extra_info.update({k: round(float(v), 3) for k, v in info.items()})
    print(json.dumps(benchmark.extra_info))
    assert not sum(x["failed"] + x["cut"] for x in loads) and all(x["joined"] == CLIENTS for x in loads)
    assert info["requests"] > 0.9 * TURNS * (SECONDS - 1.0) * RATE and info["messages"] > 5 * CLIENTS * TURNS * SECONDS
