"""What 200 WebSocket clients and 500 requests a second cost a node that trades beside them, and how soon they are answered.

Paper sessions of the same stretch of the demo market at its own pace (CIFT_SPEED: so many times as fast), by turns (CIFT_TURNS of
each): calm, under load, and with the same load put on a server that has nothing to do with the node (`plain_server.py`, the yardstick: what
that costs is the sharing of cores and caches, not the node's doing). The market's bursts meet all alike, and every prediction is compared
with itself. Shown as extra_info: p50 and p99 of the time from an event's coming to the node to the strategy's decision on the prediction
made of it (wall-clock ms; `stamp`: from when the event happened, so with the replaying gateway's delays), the ratios of the p99s (load to
calm, plain to calm, load to plain), each with a 90 % interval (turns, and pieces of the stretch, drawn anew), p50 and p99 of GETs, CPU
seconds per second of either server and of the load.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
TURNS, SPEED = int(os.environ.get("CIFT_TURNS", "5")), float(os.environ.get("CIFT_SPEED", "1"))
WHEN = ("calm", "load", "plain")
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


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
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


@contextmanager
def plain() -> Iterator[tuple[str, int]]:
    """URL and process id of the server that is the yardstick."""
    command = [sys.executable, "tests/bench/plain_server.py"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip(), server.pid
        finally:
            server.kill()


def ratio(took: Any, piece: Any) -> tuple[float, float, float]:
    """The second's p99 over the first's of `took` (TURNS, 2, n), and its 90 % interval: turns and pieces (n,) drawn anew."""

    def of(some: Any) -> float:
        first, second = (np.quantile(some[:, k], 0.99) for k in (0, 1))
        return float(second / first)

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
    found: dict[str, list[Any]] = {when: [] for when in WHEN}
    cpu = dict.fromkeys(WHEN, 0.0)
    loads: dict[str, list[dict[str, Any]]] = {when: [] for when in WHEN}

    def run(when: str) -> None:
        with ExitStack() as stack:
            s = stack.enter_context(session(tmp_path / f"{when}-{len(found[when])}"))
            url, server = stack.enter_context(plain()) if when == "plain" else (s.url, s.server)
            with load(url) if when != "calm" else nullcontext() as told:
                time.sleep(SETTLE)
                before = cpu_s(server)
                time.sleep(SECONDS)
                cpu[when] += cpu_s(server) - before
            loads[when].extend([told] if told else [])
            found[when].append(s.end())

    def runs() -> None:
        for n in range(TURNS):  # each goes first as often, so that what drifts meets all alike
            for k in range(len(WHEN)):
                run(WHEN[(n + k) % len(WHEN)])

    benchmark.pedantic(runs, rounds=1)
    keys, took = together([x for when in WHEN for x in found[when]])
    first = keys[-1, 1] - int((SECONDS - 1) * SPEED * 1e9)
    inside = keys[:, 1] >= first
    keys, took = keys[inside], took[:, inside].reshape(len(WHEN), TURNS, -1, 2)
    piece = (keys[:, 1] - first) // int(PIECE * SPEED * 1e9)
    info: dict[str, float] = {"predictions": len(keys)}
    for what, of in (("", 0), ("stamp_", 1)):
        by = dict(zip(WHEN, took[..., of]))
        for when, x in by.items():
            info |= dict(zip((f"{what}{when}_p50_ms", f"{what}{when}_p99_ms"), np.quantile(x, (0.5, 0.99))))
        for high, low in (("load", "calm"), ("plain", "calm"), ("load", "plain")):
            name = f"{what}{high}_to_{low}"
            info |= dict(zip((name, f"{name}_low", f"{name}_high"), ratio(np.stack([by[low], by[high]], axis=1), piece)))
    info |= {f"{when}_server_cpu": x / (TURNS * SECONDS) for when, x in cpu.items()}
    for when in ("load", "plain"):
        info[f"{when}_cpu"] = sum(x["cpu_s"] for x in loads[when]) / (TURNS * (SECONDS + SETTLE))
        took_ms = np.concatenate([x["took_ms"] for x in loads[when]])
        info |= dict(zip((f"{when}_get_p50_ms", f"{when}_get_p99_ms"), np.quantile(took_ms, (0.5, 0.99))))
        info |= {f"{when}_{name}": sum(x[name] for x in loads[when]) for name in ("messages", "requests")}
    benchmark.extra_info.update({k: round(float(v), 3) for k, v in info.items()})
    print(json.dumps(benchmark.extra_info))
    for when in ("load", "plain"):
        assert not sum(x["failed"] + x["cut"] for x in loads[when]) and all(x["joined"] == CLIENTS for x in loads[when])
        assert info[f"{when}_requests"] > 0.9 * TURNS * SECONDS * RATE and info[f"{when}_messages"] > 5 * CLIENTS * TURNS * SECONDS
