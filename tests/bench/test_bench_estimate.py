"""Whether the estimate that is told before a run comes true: memory and time of whole runs over ES and Binance. On idle cores.

As every benchmark it is skipped without ``--benchmark-only`` or ``--benchmark-enable``.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from catalog.estimate import estimate

ROOT = Path(__file__).parents[2]
ES = ("--dbn", "databento/esh4-glbx-mdp3-20231225.mbo.dbn.zst"), ("--instruments", ROOT / "docs/instruments/esh4.toml")
BINANCE = (("--catalog", "catalogs/binance-2024-08-08"),)


def resident(pid: int) -> int:
    """Bytes that a process and its children hold now."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            total += int(line.split()[1]) * 1024 if line.startswith("VmRSS") else 0
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(resident(int(child)) for child in (task / "children").read_text().split())
    except (OSError, ValueError):
        pass
    return total


@pytest.mark.parametrize(("name", "asked", "events", "instruments"), [("ES", ES, 62_421, 1), ("Binance", BINANCE, 1_456_836, 4)])
def test_a_run_takes_what_its_estimate_says(benchmark, data: Path, tmp_path: Path, name, asked, events, instruments) -> None:
    """Memory within a factor of 1.5; the ratio of times is told, and is that of idle cores only on idle cores."""
    options = [str(data / v) if isinstance(v, str) and not v.startswith("--") else str(v) for pair in asked for v in pair]
    command = [sys.executable, str(ROOT / "run_backtest.py"), *options]
    for warm in (True, False):
        began, peak = time.perf_counter(), 0
        quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([*command, "--out", str(tmp_path / f"{warm}")], **quiet)
        ended = threading.Event()
        threading.Thread(target=lambda p=process, e=ended: (p.wait(), e.set()), daemon=True).start()
        while not ended.wait(0.2):
            peak = max(peak, resident(process.pid))
        assert process.returncode == 0
        seconds = time.perf_counter() - began
    told = estimate(events, instruments)
    benchmark.extra_info.update({"seconds": seconds, "seconds_ratio": seconds / told.seconds, "memory_ratio": peak / told.memory})
    benchmark.pedantic(lambda: None)
    cores = os.cpu_count()
    print(f"{name}: {seconds:.0f} s ({told.seconds:.0f} s were told, {cores} cores), {peak / 2**30:.2f} GB ({told.memory / 2**30:.2f} GB)")
    assert 1 / 1.5 < peak / told.memory < 1.5
