"""The alert rules and the Grafana dashboard ask for metrics that there are, in expressions that Prometheus reads."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cift_strategies.server.metrics import Metrics
from cift_strategies.server.mirror import Mirror

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "monitoring"
STAGE = {"stage": "predict", "count": 1, "sum_ms": 1.0, "p50_ms": 1.0, "p99_ms": 1.0, "p999_ms": 1.0, "max_ms": 1.0, "buckets": [1] * 19}


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "grafana.json").read_text())
    return found


def expressions() -> list[str]:
    return [t["expr"] for p in dashboard()["panels"] for t in p["targets"]]


def told() -> set[str]:
    """The names of all metrics that a node with one of everything has."""
    mirror = Mirror()
    counts = dict.fromkeys(("events", "vectors", "predictions", "skipped", "lost", "signals", "orders", "fills", "rejects"), 1)
    counts |= dict.fromkeys(("callback_errors", "frames_dropped", "commands", "kills", "monitor_errors", "queue"), 1)
    feed = {"name": "f", "connected": True, "age_ms": 1.0, "lag_ms": 1.0, "events": 1, "reconnects": 0, "gaps": 0, "errors": 0, "note": ""}
    mirror.frame = {
        "node": {"state": "running", "counts": counts, "declined": {"why": 1}}, "latency": [STAGE], "feeds": [feed],
        "models": {"version": "v", "members": [{"member": "m", "failures": 0, "late": 0}], "reloads": 0},
        "pnl": [{"currency": "USD", "net": 1.0, "fees": 1.0, "drawdown": 1.0, "capital": 1.0}],
        "positions": [{"symbol": "S", "size": 1.0}], "instruments": [{"symbol": "S", "age_ms": 1.0}],
    }  # fmt: skip
    metrics = Metrics(mirror)
    metrics._requests.labels("GET", "/", "200").inc()
    metrics._took.labels("/").observe(0.1)
    return set(re.findall(r"^(cift_\w+)", metrics.text().decode(), re.M))


def asked(expression: str) -> set[str]:
    return set(re.findall(r"\bcift_\w+", expression))


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    names = told()
    for expression in expressions():
        assert asked(expression) and asked(expression) <= names, expression


def test_the_dashboard_is_one_that_grafana_reads() -> None:
    d = dashboard()
    assert {"uid", "title", "schemaVersion", "panels", "templating", "time"} <= d.keys() and len(d["uid"]) <= 40
    ids, cells = [p["id"] for p in d["panels"]], set()
    assert len(set(ids)) == len(ids)
    for p in d["panels"]:
        g = p["gridPos"]
        assert p["type"] in ("timeseries", "stat", "gauge") and g["x"] + g["w"] <= 24 and p["fieldConfig"]["defaults"]["unit"]
        assert [t["refId"] for t in p["targets"]] == [chr(65 + n) for n in range(len(p["targets"]))]
        mine = {(x, y) for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])}
        assert not mine & cells, f"{p['title']} overlaps"
        cells |= mine


def test_the_alerts_ask_for_metrics_that_there_are() -> None:
    names = told()
    found = re.findall(r"^\s+expr: (.+)$", (FOLDER / "alerts.yml").read_text(), re.M)
    assert len(found) > 10
    for expression in found:
        assert asked(expression) and asked(expression) <= names, expression


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool absent: it is in the package prometheus")
    return found


def test_prometheus_reads_the_rules_and_each_alert_fires_when_it_should(promtool: str) -> None:
    for arguments in (("check", "rules", "alerts.yml"), ("check", "config", "prometheus.yml"), ("test", "rules", "alerts.test.yml")):
        run = subprocess.run([promtool, *arguments], cwd=FOLDER, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr


def test_prometheus_reads_the_dashboards_expressions(promtool: str, tmp_path: Path) -> None:
    rules = [{"record": f"dashboard:{n}", "expr": e} for n, e in enumerate(expressions())]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    run = subprocess.run([promtool, "check", "rules", "rules.yml"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
