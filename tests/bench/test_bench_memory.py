"""Peak memory of a whole run (training, streaming, report) on ten times as much data: the Binance recording, repeated in time.

A ratio of two runs of `run_backtest.py`, each a process of its own; takes some minutes. As every benchmark it is skipped without
``--benchmark-only`` or ``--benchmark-enable``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
STAMPS = ("ts_event", "ts_init")


def repeated(source: Path, out: Path, times: int, period_ns: int) -> Path:
    """The catalog `source`, `times` times in a row, each `period_ns` after the one before."""
    for file in sorted(source.rglob("*.parquet")):
        target = out / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        table = pq.read_table(file)
        if file.parent.parent.name not in ("order_book_deltas", "trades"):
            pq.write_table(table, target)
            continue
        with pq.ParquetWriter(target, table.schema) as writer:
            for i in range(times):
                part = table
                for name in STAMPS:
                    k, field = table.schema.get_field_index(name), table.schema.field(name)
                    later = pc.add(pc.cast(table[name], pa.int64()), i * period_ns)
                    part = part.set_column(k, field, pc.cast(later, field.type))
                writer.write_table(part, row_group_size=65_536)
    return out


def peak_mb(catalog: Path, out: Path) -> float:
    """Of the main process; the plain rule's process is left out by the setting."""
    out.mkdir()
    settings = out / "settings.toml"
    settings.write_text("rule = false\n")
    asked = ["--catalog", str(catalog), "--config", str(settings), "--out", str(out / "run")]
    command = [sys.executable, str(ROOT / "run_backtest.py"), *asked]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    told = process.stderr.read()
    _, code, used = os.wait4(process.pid, 0)
    process.returncode = code
    assert code == 0, told[-2_000:]
    return used.ru_maxrss / 1024


def test_a_run_over_ten_times_the_data_needs_less_than_a_fifth_more_memory(benchmark, data: Path, tmp_path: Path) -> None:
    source, period = data / "catalogs/binance-2024-08-08", 652_000_000_000
    peaks = {n: peak_mb(repeated(source, tmp_path / f"catalog-{n}", n, period), tmp_path / f"run-{n}") for n in (1, 10)}
    benchmark.extra_info.update({f"peak_mb_{n}": round(v) for n, v in peaks.items()} | {"ratio": peaks[10] / peaks[1]})
    benchmark.pedantic(lambda: None)
    print(f"peak memory: {peaks[1]:.0f} MB on 1,456,836 events, {peaks[10]:.0f} MB on ten times as many")
    assert peaks[10] / peaks[1] < 1.2
