"""What 200 WebSocket clients and 500 requests a second cost a node that trades beside them, and how soon they are answered.

Paper sessions of the same stretch of the demo market at its own pace (CIFT_SPEED: so many times as fast), by turns with and without load
(CIFT_PAIRS of each): the market's bursts meet both alike, and every prediction is compared with itself. Shown as extra_info: p50 and p99
of the time from an event's coming to the node to the strategy's decision on the prediction made of it (wall-clock ms; `stamp`: from when
the event happened, so with the replaying gateway's delays), calm and under load, the ratio of the p99s with a 90 % interval (pairs of
sessions, and pieces of the stretch, drawn anew), p50 and p99 of GETs, CPU seconds per second of server and load.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
PAIRS, SPEED = int(os.environ.get("CIFT_PAIRS", "5")), float(os.environ.get("CIFT_SPEED", "1"))
SETTLE, SECONDS, PIECE = 10.0, 45.0, 5.0  # s after the models are there, s that count, s of the stretch that are drawn together
CLIENTS, RATE = 200, 500.0
READY_S = 300.0


@dataclass(frozen=True, slots=True)
class Session:
    url: str
    timed: Path  # of live_strategies.Timed
    server: int  # process id
    node: subprocess.Popen[str]

    def end(self) -> Any:
        """As :class:`live_strategies.Timed` writes it."""
        self.node.terminate()
        self.node.wait(120)
        return np.load(self.timed)

    def server_cpu_s(self) -> float:
        fields = Path(f"/proc/{self.server}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def session(folder: Path) -> Iterator[Session]:
    """A session whose models are there."""
    folder.mkdir()
    config, timed = folder / "live.toml", folder / "timed.npy"
    config.write_text('strategy = "live_strategies:Timed"\n')
    command = [sys.executable, "run_live.py", "--speed", f"{SPEED:g}", "--config", str(config), "--state", str(folder / "s")]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "cift_strategies"), "CIFT_TIMED": str(timed)}
    node = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert node.stderr is not None
        url = next(line.split("page and API: ")[1].strip() for line in node.stderr if "page and API: " in line)
        threading.Thread(target=lambda: [None for _ in node.stderr or ()], daemon=True).start()
        with httpx.Client(base_url=url, timeout=30) as http:
            until = time.monotonic() + READY_S
            while http.get("/ready").status_code != 200:
                assert time.monotonic() < until, "the models did not load"
                time.sleep(0.1)
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


@contextmanager
def load(url: str) -> Iterator[dict[str, Any]]:
    """Listeners and requests, each a process; what they met is there at the end. All are connected within."""
    told: dict[str, Any] = {"cpu_s": 0.0}
    command = [sys.executable, "tests/bench/server_load.py", url]
    pipes: dict[str, Any] = {"cwd": ROOT, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    started = [subprocess.Popen([*command, *how], **pipes) for how in (["--clients", str(CLIENTS)], ["--rate", str(RATE)])]
    for x in started:
        x.stdin.write("\n")  # type: ignore[union-attr]
        x.stdin.flush()  # type: ignore[union-attr]
        assert x.stdout.readline() == "ready\n"  # type: ignore[union-attr]
    try:
        yield told
        for x in started:
            found = json.loads(x.communicate("\n")[0])
            told |= found | {"cpu_s": told["cpu_s"] + found["cpu_s"]}
    finally:
        for x in started:
            x.kill()
            x.wait()


def ratio(took: Any, piece: Any) -> tuple[float, float, float]:
    """p99 under load over p99 without of `took` (PAIRS, 2, n), calm and load, and its 90 % interval: pairs and pieces (n,) drawn anew."""

    def of(some: Any) -> float:
        calm, load = (np.quantile(some[:, k], 0.99) for k in (0, 1))
        return float(load / calm)

    rng, pieces = np.random.default_rng(1), [np.flatnonzero(piece == x) for x in np.unique(piece)]
    drawn = []
    for _ in range(2_000):
        at = np.concatenate([pieces[x] for x in rng.integers(len(pieces), size=len(pieces))])
        drawn.append(of(took[rng.integers(len(took), size=len(took))][:, :, at]))
    low, high = np.quantile(drawn, (0.05, 0.95))
    return of(took), float(low), float(high)


def together(sessions: list[Any]) -> tuple[Any, Any]:
    """Keys (n, 2) of the predictions that all sessions made, in order, and what each says of them, (sessions, n, 2) ms."""
    keys = sorted(set.intersection(*({(int(k), int(ts)) for k, ts in s[:, :2]} for s in sessions)), key=lambda key: key[1])
    of = [{(int(k), int(ts)): took for k, ts, *took in s} for s in sessions]
    return np.array(keys), np.array([[x[key] for key in keys] for x in of]) / 1e6


def test_load_on_the_server_and_the_nodes_latency(benchmark: Any, tmp_path: Path) -> None:
    found: dict[str, list[Any]] = {"calm": [], "load": []}
    cpu: dict[str, float] = {"calm": 0.0, "load": 0.0}
    loads: list[dict[str, Any]] = []

    def run(when: str) -> None:
        with session(tmp_path / f"{when}-{len(found[when])}") as s:
            with load(s.url) if when == "load" else nullcontext() as told:
                time.sleep(SETTLE)
                before = s.server_cpu_s()
                time.sleep(SECONDS)
                cpu[when] += s.server_cpu_s() - before
            loads.extend([told] if told else [])
            found[when].append(s.end())

    def runs() -> None:
        for n in range(PAIRS):  # either goes first as often, so that what drifts meets both alike
            for when in ("calm", "load") if n % 2 else ("load", "calm"):
                run(when)

    benchmark.pedantic(runs, rounds=1)
    keys, took = together(found["calm"] + found["load"])
    first = keys[-1, 1] - int((SECONDS - 1) * SPEED * 1e9)
    inside = keys[:, 1] >= first
    keys, took = keys[inside], took[:, inside]
    info: dict[str, float] = {"predictions": len(keys)}
    for what, of in (("", 0), ("stamp_", 1)):
        paired = np.stack([took[:PAIRS, :, of], took[PAIRS:, :, of]], axis=1)
        for when, x in (("calm", paired[:, 0]), ("load", paired[:, 1])):
            info |= dict(zip((f"{what}{when}_p50_ms", f"{what}{when}_p99_ms"), np.quantile(x, (0.5, 0.99))))
        told = ratio(paired, (keys[:, 1] - first) // int(PIECE * SPEED * 1e9))
        info |= dict(zip((f"{what}p99_ratio", f"{what}p99_ratio_low", f"{what}p99_ratio_high"), told))
    info |= {f"{when}_server_cpu": x / (PAIRS * SECONDS) for when, x in cpu.items()}
    info["load_cpu"] = sum(x["cpu_s"] for x in loads) / (PAIRS * (SECONDS + SETTLE))
    info |= dict(zip(("get_p50_ms", "get_p99_ms"), np.quantile(np.concatenate([x["took_ms"] for x in loads]), (0.5, 0.99))))
    info |= {name: sum(x[name] for x in loads) for name in ("messages", "requests")}
    benchmark.extra_info.update({k: round(float(v), 3) for k, v in info.items()})
    print(json.dumps(benchmark.extra_info))
    assert not sum(x["failed"] + x["cut"] for x in loads) and all(x["joined"] == CLIENTS for x in loads)
    assert info["requests"] > 0.9 * PAIRS * SECONDS * RATE and info["messages"] > 5 * CLIENTS * PAIRS * SECONDS
