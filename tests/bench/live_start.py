"""Seconds from the start of `run_live.py`, after `kill -9` with an open position, until positions and kill switch are there.

`python -m uv run python tests/bench/live_start.py` plays the demo until something is held, kills the session, and starts it again on copies
of its state folder, killed by a signal, the file and the API as soon as the API tells the position. A line of JSON for each: when the API
answered, told the position and told that it was closed again, and when the models were there. On a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def session(state: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "run_live.py", "--speed", "20", "--state", str(state)]
    with (state.parent / f"{state.name}.said").open("w") as said:
        return subprocess.Popen(command, cwd=ROOT, stderr=said, stdout=said, text=True)


def held(state: Path) -> list[tuple[str, int]]:
    with contextlib.suppress(sqlite3.OperationalError), sqlite3.connect(state / "journal.sqlite") as db:
        return db.execute("select instrument, size from positions where size != 0").fetchall()
    return []


def asked(url: str, path: str, token: str | None = None) -> Any:
    """What the API answers, None where it does not yet; with a `token` it is a command."""
    head = {} if token is None else {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/api/v1/{path}", None if token is None else b"{}", head)
    with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def start(state: Path, way: str) -> dict[str, Any]:
    began, process, url, found = time.monotonic(), session(state), "", dict[str, float]()

    def mark(name: str) -> None:
        found.setdefault(name, round(time.monotonic() - began, 2))

    killed = False
    while "models" not in found or "closed again" not in found:
        time.sleep(0.005)
        if process.poll() is not None:
            raise SystemExit((state.parent / f"{state.name}.said").read_text())
        if not url:
            said = (state.parent / f"{state.name}.said").read_text().splitlines()
            url = next((line.split()[-1] for line in said if line.startswith("page and API: ")), "")
            continue
        mark("API")
        if (told := asked(url, "snapshot")) is None:
            continue
        holds = any(p["size"] for p in told["positions"])
        if holds and not killed:
            mark("position")
            killed = True
            if way == "signal":
                process.send_signal(signal.SIGUSR1)
            elif way == "file":
                (state / "kill").touch()
            else:
                asked(url, "kill", (state / "token").read_text().strip())
        elif killed and told["node"]["state"] == "killed":
            mark("killed")
            if not holds:
                mark("closed again")
        if told["models"]["version"]:
            mark("models")
    process.terminate()
    process.wait()
    return {"way": way, **found}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # a second start has the bytecode of the first
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "killed"
        process = session(state)
        while not held(state):
            time.sleep(0.02)
        process.kill()
        process.wait()
        for way in ("signal", "file", "API"):
            copy = shutil.copytree(state, Path(folder) / way, ignore=shutil.ignore_patterns("*.sock"))
            print(json.dumps(start(copy, way)), flush=True)


if __name__ == "__main__":
    main()
