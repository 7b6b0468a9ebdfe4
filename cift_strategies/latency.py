"""Whole backtests of a finished run again, at other latencies of its decisions and of its orders.

Takes the output folder of a backtest, streams its range anew with the models that it has, and leaves `latency.json` there for the report.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from catalog.errors import InputError
from cift_strategies.finished import RERUNS, Finished
from cift_strategies.results import write_json


def asked(text: str) -> list[float]:
    """Latencies in ms from "0,0.1,1,10". Raises InputError for what is none."""
    try:
        found = sorted({float(v) for v in text.split(",")})
    except ValueError:
        found = [-1.0]
    if not all(0 <= v < 60_000 for v in found):
        raise InputError(f"--latencies {text}: give milliseconds apart by commas, such as 0,0.1,1,10")
    return found


def rerun(folder: Path, text: str) -> list[dict[str, Any]]:
    """Run again with decisions, then with orders, at each latency of `text`; the other as it was. Raises InputError where `folder` is of no
    backtest, or lacks its models."""
    from cift_strategies.backtest import RunConfig, run

    latencies, done = asked(text), Finished.read(folder)
    told = dict(done.facts["config"])
    told["schema"] = told.pop("record_schema", "mbo")
    try:
        config = RunConfig.model_validate_json(json.dumps(told))
    except ValueError:
        raise InputError(f"{folder} is of no backtest: whole runs at other latencies need its data; the page estimates them") from None
    artifact = config.artifacts or folder / "artifact"
    if not (artifact / "manifest.json").is_file():
        raise InputError(f"{artifact} holds no models: run the backtest again")
    out = []
    for of, key in (("decision", "latency_ms"), ("order", "order_latency_ms")):
        for ms in latencies:
            with tempfile.TemporaryDirectory() as scratch:
                more = {"artifacts": artifact, "rule": False, "out": Path(scratch) / "out", key: ms}
                s = run(config.model_copy(update=more)).summary
            out.append({"of": of, "latency_ms": ms, **{k: s[k] for k in ("pnl_net", "fills", "orders", "digest")}})
            print(f"{of} latency {ms:g} ms: PnL {s['pnl_net']}, {s['fills']} fills", flush=True)
    write_json(folder / RERUNS, out)
    return out
