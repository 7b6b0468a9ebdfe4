"""The report of a finished run: one offline HTML page, a picture of it, and the short table for the terminal.

:func:`write_report` is called once a run has written its output folder; :func:`render` makes the page again from the folder alone, and so
does ``python -m cift_strategies.report OUT [--png FILE] [--pdf FILE]``. finished.py reads the folder; performance.py, shortfall.py,
attribution.py, resampling.py, capacity.py and forecasts.py have the statistics, the charts the panels, the sections the text, page.html the
look. The figures of all tables go to `statistics.json`, and in long form to `statistics.parquet`, the configuration to `config.toml`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from catalog.errors import InputError, exit_code
from cift_strategies.finished import Finished, instant, store
from cift_strategies.model_sections import claims, gains
from cift_strategies.money_sections import money_rows
from cift_strategies.page import DASH, Page, count, number, small
from cift_strategies.results import plain, write_json
from cift_strategies.sections import NOT_SHOWN, SECTIONS

if TYPE_CHECKING:
    from cift_strategies.outcome import RunResult

PAGE: Final = Path(__file__).with_name("page.html")
BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")


def write_report(run: RunResult, out: Path) -> Path:
    """Store what the report needs on top of the run's four files in the output folder `out`, and write its `report.html`."""
    store(run, out)
    return render(out)


def render(out: Path) -> Path:
    """Write `report.html` from the output folder alone. Raises InputError where it lacks a file."""
    from plotly.offline import get_plotlyjs

    done, page = Finished.read(out), Page()
    for section in SECTIONS:
        section(page, done)
    names = list(done.facts["instruments"])
    kind = "Live session" if done.summary.get("live") else "Backtest"
    title = escape(f"{kind} of {', '.join(names) if len(names) <= 4 else f'{len(names)} instruments'}")
    start, end = done.traded_span
    traded = f"traded {instant(start)} to {instant(end)} UTC \u00b7 source: {done.summary.get('source', DASH)}"
    text = Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=title,
        subtitle=escape(traded),
        links="".join(f'<a href="#{anchor}">{escape(link)}</a>' for anchor, link in page.links),
        body="\n".join(page.parts),
        plotly=str(get_plotlyjs()).replace("</script", "<\\/script"),
    )
    _keep(page, out)
    path = out / "report.html"
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
    return path


def _keep(page: Page, out: Path) -> None:
    """The tables as JSON, and as one Parquet table: table, row, column, and the value as a number or as text; the configuration."""
    for name, text in page.files.items():
        (out / name).write_text(text, encoding="utf-8")
    tables = plain(page.tables)
    write_json(out / "statistics.json", tables)
    cells = [(name, i, column, value) for name, rows in tables.items() for i, row in enumerate(rows) for column, value in row.items()]
    numeric = [isinstance(v, int | float) and not isinstance(v, bool) for *_, v in cells]
    words = [None if ok or v is None else v if isinstance(v, str) else json.dumps(v) for (*_, v), ok in zip(cells, numeric)]
    columns = {
        "table": pa.array([c[0] for c in cells], pa.string()), "row": pa.array([c[1] for c in cells], pa.int32()),
        "column": pa.array([c[2] for c in cells], pa.string()), "text": pa.array(words, pa.string()),
        "value": pa.array([float(v) if ok else None for (*_, v), ok in zip(cells, numeric)], pa.float64()),
    }  # fmt: skip
    part = out / ".statistics.parquet.part"
    pq.write_table(pa.table(columns), part, compression="zstd")
    part.replace(out / "statistics.parquet")


def picture(page: str, png: Path, width: int = 1200, height: int = 1620, dark: bool = False) -> Path:
    """The upper part of the page at the address `page` as a PNG, taken by the Chromium of this machine: a report (file:) once it is drawn,
    a running node's as it is now. Raises InputError where there is no browser or no such page.
    """
    more = [f"--window-size={width},{height}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    return _browse(page, png, "--screenshot", more)


def print_out(page: str, pdf: Path) -> Path:
    """The whole page at the address `page` (file:) as a PDF, in light colours, by the Chromium of this machine. Raises InputError as
    :func:`picture`."""
    more = ["--no-pdf-header-footer", "--window-size=1000,1400", "--blink-settings=preferredColorScheme=1"]
    return _browse(f"{page}#print", pdf, "--print-to-pdf", more)


def _browse(page: str, png: Path, what: str, more: Sequence[str]) -> Path:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise InputError(f"no Chromium or Chrome on this machine to take {png} with: install one (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory() as scratch:
        shot = Path(scratch) / f"shot{png.suffix or '.png'}"
        command = [browser, "--headless", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--hide-scrollbars"]
        command += [f"--user-data-dir={scratch}/profile", f"{what}={shot}", *more]
        command += ["--virtual-time-budget=15000" if page.startswith("file:") else "--timeout=6000"]
        command += ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        try:
            said = subprocess.run([*command, page], capture_output=True, text=True, timeout=180, check=False).stderr
        except subprocess.TimeoutExpired:
            said = "it took longer than three minutes"
        if not shot.is_file():
            last = (said.strip().splitlines() or ["no message"])[-1]
            raise InputError(f"{browser} took no picture of {page} ({last}): open the page by hand")
        png.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(shot, png)
    return png


def print_summary(summary: Mapping[str, Any]) -> None:
    """The short table of a run on standard output: money and execution beside the rule, forecasts beside the baselines."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    s, rule, cur = summary, summary.get("baseline_rule") or {}, str(summary.get("currency") or "")
    latency = s.get("decision_latency_ms") or {}
    console = Console(highlight=False)

    def grid(*heads: str) -> Table:
        t = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
        for i, head in enumerate(heads):
            t.add_column(head, justify="right" if i else "left", no_wrap=i > 0)
        return t

    money = grid("traded", "ensemble", *(["OFI rule"] if rule else []))
    for name, key, show in money_rows(cur):
        money.add_row(name, show(s.get(key)), *([show(rule.get(key))] if rule else []))
    money.add_row("decision latency p50 / p99", f"{small(latency.get('p50'))} / {small(latency.get('p99'))} ms")
    console.print(money)
    rows = [r for r in (s.get("scores") or {}).get("table") or () if r.get("ensemble")]
    best = {g.label: g for g in gains(s)}
    if rows:
        t = grid("out of sample", "horizon", "log-loss", "baseline", "gain, 95 %", "labels")
        for r in rows:
            loss, g = r["ensemble"].get("log_loss"), best.get(f"{r['instrument']} {r['horizon']}")
            base = number(loss + g.mean, 4) if g else DASH
            known = g is not None and math.isfinite(g.low)  # too few labels have no interval
            interval = f"{number(g.low, 3, sign=True)} to {number(g.high, 3, sign=True)}" if g and known else DASH
            t.add_row(str(r["instrument"]), str(r["horizon"]), number(loss, 4), base, interval, count(r.get("effective")))
        console.print(t)
    for r in s.get("rolls") or ():
        console.print(f"rolled from {r['from']} to {r['to']} at {instant(r['ts'])} UTC", markup=False)
    shown = claims(s)
    console.print(f"better than every baseline: {', '.join(shown)}" if shown else f"{NOT_SHOWN[0].upper()}{NOT_SHOWN[1:]}.", markup=False)


def main() -> None:
    """``python -m cift_strategies.report OUT|URL [--png FILE] [--dark] [--pdf FILE] [--latencies 0,0.1,1,10]``."""
    import argparse

    about = "Make report.html again from the output folder of a run; take a picture of it, or of the page of a running node."
    a = argparse.ArgumentParser(prog="python -m cift_strategies.report", description=about)
    a.add_argument("out", help="the --out folder of run_backtest.py, or the address at which a node shows its page")
    a.add_argument("--png", type=Path, help="also write a picture of the upper part of the page; needs Chromium or Chrome")
    a.add_argument("--dark", action="store_true", help="the picture in dark colours")
    a.add_argument("--pdf", type=Path, help="also write the whole page as a PDF; needs Chromium or Chrome")
    told = "run the whole backtest again with decisions, then with orders, at each of these latencies in ms, such as 0,0.1,1,10"
    a.add_argument("--latencies", help=told)
    args = a.parse_args()
    if args.out.startswith(("http://", "https://")):
        if args.png is None:
            raise InputError(f"{args.out} is the page of a node: say where its picture goes with --png FILE")
        if args.pdf or args.latencies:
            raise InputError(f"{args.out} is the page of a node: --pdf and --latencies take the folder of a finished run")
        print(picture(f"{args.out}#still", args.png, 1600, 1100, args.dark))
        return
    if args.latencies:
        from cift_strategies.latency import rerun

        rerun(Path(args.out), args.latencies)
    page = render(Path(args.out))
    print(page)
    if args.pdf:
        print(print_out(page.resolve().as_uri(), args.pdf))
    if args.png:
        print(picture(page.resolve().as_uri(), args.png, dark=args.dark))


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
