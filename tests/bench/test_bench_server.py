"""What 200 WebSocket clients and 500 requests a second cost a node that trades beside them, and how soon they are answered.

A whole paper session of the demo market at a speed of 5; calm and load take turns, so that a busy machine meets both alike. Shown as
extra_info: the 99th percentiles of event to prediction and of event to signal (newest 1,024 of each), calm and under load, and of GETs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
TURNS, SECONDS = 3, 20.0
READY_S = 300.0


def stages(http: httpx.Client) -> dict[str, dict[str, float]]:
    return {s["stage"]: s for s in http.get("/api/v1/latency").json()["items"]}


@pytest.fixture
def session(tmp_path: Path) -> Any:
    command = [sys.executable, "run_live.py", "--speed", "5", "--state", str(tmp_path / "s")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    url = next(line.split("page and API: ")[1].strip() for line in process.stderr if "page and API: " in line)
    threading.Thread(target=lambda: [None for _ in process.stderr or ()], daemon=True).start()
    with httpx.Client(base_url=url, timeout=30) as http:
        until = time.monotonic() + READY_S
        while time.monotonic() < until:
            if http.get("/ready").status_code == 200 and stages(http).get("prediction", {}).get("count", 0) > 2_000:
                break
            time.sleep(0.5)
        yield http
    process.terminate()
    process.wait(120)


def test_load_on_the_server_and_the_nodes_latency(benchmark: Any, session: httpx.Client) -> None:
    told: dict[str, list[float]] = {f"{s}_{when}": [] for s in ("prediction", "decision") for when in ("calm", "load")}
    loads: list[dict[str, float]] = []

    def turn(when: str) -> None:
        if when == "load":
            command = [sys.executable, "tests/bench/server_load.py", str(session.base_url).rstrip("/"), "--seconds", str(SECONDS)]
            loads.append(json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout))
        else:
            time.sleep(SECONDS)
        after = stages(session)
        for stage in ("prediction", "decision"):
            if stage in after:
                told[f"{stage}_{when}"].append(after[stage]["p99_ms"])

    def turns() -> None:
        for _ in range(TURNS):
            turn("calm")
            turn("load")

    benchmark.pedantic(turns, rounds=1)
    info = {f"{name}_p99_ms": float(np.median(values)) for name, values in told.items() if values}
    info["ratio"] = info["prediction_load_p99_ms"] / info["prediction_calm_p99_ms"]
    info |= {f"get_{q}": float(np.median([x[q] for x in loads])) for q in ("p50_ms", "p99_ms")}
    benchmark.extra_info.update(info, messages=sum(x["messages"] for x in loads), requests=sum(x["requests"] for x in loads))
    print(json.dumps(benchmark.extra_info))
    assert not sum(x["failed"] + x["cut"] for x in loads)
    assert sum(x["requests"] for x in loads) > 0.9 * TURNS * SECONDS * 500
