"""A finished run in the dashboard: what is shown is what the run's files hold, and nothing can be commanded."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import Small
from nodes import GUARD_S, serving
from playwright.sync_api import Browser
from processes import started
from test_dashboard import browser  # noqa: F401 - a fixture

from catalog.errors import InputError
from cift_strategies.server.schemas import Frame
from cift_strategies.show import frame

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_shown_is_what_the_files_hold(small: Small) -> None:
    told, summary = Frame.model_validate(frame(small.out)), json.loads((small.out / "summary.json").read_text())
    positions = pq.read_table(small.out / "positions.parquet").to_pydict()
    assert told.node.state == "finished" and told.node.counts["fills"] == summary["fills"]
    assert told.pnl[0].net == pytest.approx(summary["pnl_net"]) and told.pnl[0].fees == pytest.approx(summary["fees"])
    for p in told.positions:
        mine = [n for n, name in zip(positions["net"], positions["instrument"]) if name == p.symbol]
        assert p.net == pytest.approx(sum(mine)) and p.size == 0
    assert told.logs.trades[-1].net == positions["net"][-1]
    last = pq.read_table(small.out / "predictions.parquet").to_pylist()[-1]
    said = next(x.prediction for x in told.instruments if x.symbol == last["instrument"])
    assert said is not None and said.ts == last["ts"].value
    assert said.horizons[1].proba == pytest.approx([last[f"p_{w}_1s"] for w in ("down", "flat", "up")], abs=1e-4)
    assert list(said.horizons[0].votes) == list(summary["regret"]["members"])
    along = summary["diagnostics"]["weights"]
    assert [p.ts for p in told.logs.weights] == along["ts"] and len(along["ts"]) > 3 and along["members"] == list(said.horizons[0].votes)
    assert told.logs.weights[-1].values == pytest.approx(np.mean(along["weights"][-1], axis=0), abs=1e-5)


def test_the_page_shows_all_of_it(small: Small, browser: Browser, tmp_path: Path) -> None:  # noqa: F811
    whole = json.loads(json.dumps(frame(small.out)))
    with serving(tmp_path, [whole]) as s:
        page, wrong = browser.new_page(), list[str]()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(s.url)
        page.get_by_text("finished", exact=True).wait_for()
        for name in ("Mid price", "Profit and loss", "Share of each member"):
            page.get_by_role("img", name=name).locator("canvas").wait_for()
        assert page.locator(".empty").all_inner_texts() == []
        assert len(page.locator(".log li").all()) == min(100, len(whole["logs"]["trades"]))
        assert {b.inner_text() for b in page.locator(".head button").all()} == {"\N{CIRCLE WITH LEFT HALF BLACK}"}  # nothing to command
        page.close()
        assert not wrong


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        frame(tmp_path)


def test_it_is_served_until_it_is_ended_and_takes_no_command(small: Small) -> None:
    command = [sys.executable, str(ROOT / "run_backtest.py"), "--out", str(small.out), "--show", "--port", "0"]
    process = started(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.search(r"http://\S+?(?=;)", line)
    assert found, line
    with httpx.Client(base_url=found[0], timeout=GUARD_S) as http:
        while http.get("/ready").status_code != 200:
            pass
        assert http.get("/api/v1/snapshot").json()["node"]["state"] == "finished"
        assert http.post("/api/v1/kill").status_code == 401
    process.send_signal(signal.SIGINT)
    assert process.wait(GUARD_S) == 0
