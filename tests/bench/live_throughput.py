"""A live session on an unthrottled gateway with all five members on: records a second, what was lost and skipped, and the CPU it took.

`python -m uv run python tests/bench/live_throughput.py [--seconds 60] [--speed 0]` makes a market that is long enough and trains the models
on the demo market, both once (minutes; they are kept in the store), runs `run_live.py` on them and prints a line every five seconds and one
of JSON; at another speed than 0 (unthrottled) its stages tell how long each takes where nothing waits. A record is one that the gateway
sends; the node makes an event of most. CPU is that of the session's processes and their threads while it streams, the node's start left
out. Needs Linux. On a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
A_SESSION = 600_000  # records
MOST_A_SECOND = 150_000  # records that the market is made for
BEGINS, ENDS = "Ctrl-C ends it", "stopping: "


def market(seconds: float) -> tuple[list[Path], float]:
    """MBO and definition files with records enough, and records for each event of the first of them."""
    from catalog.events import read_dbn
    from catalog.synthetic import make_market
    from cift_strategies.feeds.tape import Tape
    from cift_strategies.source import STORE

    sessions = max(1, round(seconds * MOST_A_SECOND / A_SESSION))
    made = make_market(STORE / f"bench-market-{sessions}", 7, sessions, sessions * A_SESSION)
    tape = Tape([made.mbo[0], made.definitions[0]])
    ratio = len(tape.base.records) / len(read_dbn(made.mbo[0])[0])
    tape.close()
    return [*made.mbo, *made.definitions], ratio


def models(state: Path) -> Path:
    """All five, trained on the demo market's first session."""
    from cift_strategies import source
    from cift_strategies.live_config import LiveConfig
    from cift_strategies.live_models import demo_models

    return demo_models(LiveConfig(train=None, state=state), source.demo(7))


def below(pid: int) -> list[int]:
    """A process and all that it started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(p for child in children for p in below(int(child)))]


def spent(pid: int) -> Counter[str]:
    """CPU seconds by process and thread name."""
    out: Counter[str] = Counter()
    for p in below(pid):
        line = Path(f"/proc/{p}/cmdline").read_text()
        what = next((name for name in ("gateway", "server", "spawn_main", "run_live") if name in line), "other")
        what = {"spawn_main": "models", "run_live": "node"}.get(what, what)
        for task in Path(f"/proc/{p}/task").iterdir():
            try:
                name = what if task.name == str(p) else f"{what}'s threads"
                out[name] += int((task / "schedstat").read_text().split()[0]) / 1e9
            except OSError:
                pass
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--speed", type=float, default=0.0, help="times the market's own pace; 0: as fast as it is read")
    parser.add_argument("--artifacts", type=Path, help="trained models instead of those of the demo market")
    asked = parser.parse_args()
    files, ratio = market(asked.seconds)
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        state.mkdir()
        artifacts = asked.artifacts or models(state)
        config = Path(folder) / "live.toml"
        config.write_text(f"dbn = {json.dumps([str(p) for p in files])}\nartifacts = {json.dumps(str(artifacts))}\n")
        command = [sys.executable, "run_live.py", "--config", str(config), "--speed", str(asked.speed), "--duration", str(asked.seconds)]
        command += ["--state", str(state)]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        began, over = threading.Event(), threading.Event()

        def read() -> None:
            for line in process.stderr or ():
                if BEGINS in line:
                    began.set()
                if line.startswith(ENDS):
                    over.set()
                print(line.rstrip()[:200], file=sys.stderr)
            began.set()
            over.set()

        threading.Thread(target=read, daemon=True).start()
        began.wait()
        first, wall, last = spent(process.pid), time.monotonic(), Counter[str]()
        while not over.wait(0.2):
            last, took = spent(process.pid), time.monotonic() - wall
        if process.wait() or not (state / "summary.json").exists():
            raise SystemExit("the session failed")
        summary: dict[str, Any] = json.loads((state / "summary.json").read_text())
    records = round(summary["feature_vectors"] * ratio)
    told = {k: summary["live"][k] for k in ("lost", "skipped", "passed", "queue", "node_queue")}
    cpu = {name: round((s - first[name]) / records * 1e6, 2) for name, s in last.most_common() if s - first[name] > 0.01 * took}
    print(json.dumps({
        "records": records, "seconds": round(took, 1), "records_per_second": round(records / took), "events": summary["feature_vectors"],
        "predictions": summary["predictions"], "orders": summary["orders"], **told, "cpu_us_per_record": cpu,
        "stages_ms": {s["stage"]: {q: s[f"{q}_ms"] for q in ("p50", "p99", "p999", "max")} for s in summary["live"]["stages"]},
        "cores": round(sum(s - first[name] for name, s in last.items()) / took, 2),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
