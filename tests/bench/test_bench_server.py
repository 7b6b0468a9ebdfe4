"""What 200 WebSocket clients and 500 requests a second cost a node that trades beside them, and how soon they are answered.

A paper session of the demo market at its own pace (CIFT_SPEED: so many times as fast). Turns with and without load alternate: a busy
machine meets both alike; the load's programs run before, and a turn begins when all are connected. Shown as extra_info: p50 and p99 of the
time from an event to the strategy's decision on the prediction made of it (wall-clock ms, every prediction), calm and under load, the ratio
of the p99s with a 90 % interval (pairs of turns drawn anew), p50 and p99 of GETs, CPU seconds per second of server and load.
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
TURNS, SECONDS, SETTLE, SPEED = 14, 4.0, 0.5, float(os.environ.get("CIFT_SPEED", "1"))
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
            if told and any(s["stage"] == "prediction" and s["count"] > 200 * SPEED for s in told):
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


class Load:
    """Listeners and requests, each a process that was started before and takes turns."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, "tests/bench/server_load.py", url]
        pipes: dict[str, Any] = {"cwd": ROOT, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
        self._started = [subprocess.Popen([*command, *how], **pipes) for how in (["--clients", str(CLIENTS)], ["--rate", str(RATE)])]

    def begin(self) -> None:
        for x in self._started:
            self._tell(x)
            assert self._line(x) == "ready\n"

    def end(self) -> dict[str, Any]:
        for x in self._started:
            self._tell(x)
        heard, asked = (json.loads(self._line(x)) for x in self._started)
        return {**heard, **asked, "cpu_s": heard["cpu_s"] + asked["cpu_s"]}

    def _tell(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()

    def _line(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline()

    def close(self) -> None:
        for x in self._started:
            x.communicate()


def ratio(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float, float]:
    """p99 under load over p99 without of all turns together, and the 90 % interval of it when pairs of turns are drawn anew."""

    def of(some: Any) -> float:
        calm, load = (np.concatenate([pairs[k][side] for k in some]) for side in (0, 1))
        return float(np.quantile(load, 0.99) / np.quantile(calm, 0.99))

    rng = np.random.default_rng(1)
    drawn = [of(rng.integers(len(pairs), size=len(pairs))) for _ in range(2_000)]
    low, high = np.quantile(drawn, (0.05, 0.95))
    return of(range(len(pairs))), float(low), float(high)


def test_load_on_the_server_and_the_nodes_latency(benchmark: Any, session: Session) -> None:
    spans: dict[str, list[tuple[int, int]]] = {"calm": [], "load": []}
    cpu: dict[str, float] = {"calm": 0.0, "load": 0.0}
    loads: list[dict[str, Any]] = []
    load = Load(session.url)

    def turn(when: str) -> None:
        if when == "load":
            load.begin()
        time.sleep(SETTLE)
        began, before = time.monotonic_ns(), session.server_cpu_s()
        time.sleep(SECONDS)
        cpu[when] += session.server_cpu_s() - before
        spans[when].append((began, time.monotonic_ns()))
        if when == "load":
            loads.append(load.end())

    def turns() -> None:
        for n in range(TURNS):  # either goes first as often, so that what drifts meets both alike
            for when in ("calm", "load") if n % 2 else ("load", "calm"):
                turn(when)

    benchmark.pedantic(turns, rounds=1)
    load.close()
    at, took = session.end()
    told = {when: [took[(at >= a) & (at < b)] for a, b in these] for when, these in spans.items()}
    info: dict[str, float] = {}
    for when, parts in told.items():
        p50, p99 = np.quantile(np.concatenate(parts), (0.5, 0.99))
        seconds = sum(b - a for a, b in spans[when]) / 1e9
        info |= {f"{when}_p50_ms": p50, f"{when}_p99_ms": p99, f"{when}_decisions": sum(map(len, parts))}
        info[f"{when}_server_cpu"] = cpu[when] / seconds
    info["load_cpu"] = sum(x["cpu_s"] for x in loads) / (TURNS * (SECONDS + SETTLE))
    info |= dict(zip(("p99_ratio", "p99_ratio_low", "p99_ratio_high"), ratio(list(zip(told["calm"], told["load"])))))
    info |= dict(zip(("get_p50_ms", "get_p99_ms"), np.quantile(np.concatenate([x["took_ms"] for x in loads]), (0.5, 0.99))))
    info |= {name: sum(x[name] for x in loads) for name in ("messages", "requests")}
    benchmark.extra_info.update({k: round(float(v), 3) for k, v in info.items()})
    print(json.dumps(benchmark.extra_info))
    assert not sum(x["failed"] + x["cut"] for x in loads) and all(x["joined"] == CLIENTS for x in loads)
    assert info["requests"] > 0.9 * TURNS * SECONDS * RATE and info["messages"] > 5 * CLIENTS * TURNS * SECONDS
