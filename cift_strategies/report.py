"""The report of a finished run: one offline HTML page, a picture of it, and the short table for the terminal.

:func:`write_report` is called once a run has written its output folder; :func:`render` makes the page again from the folder alone, and so
does ``python -m cift_strategies.report OUT [--png FILE]``. finished.py reads the folder, performance.py has the statistics, charts.py
the panels, sections.py the text, page.html the look.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, Final

from catalog.errors import InputError, exit_code
from cift_strategies.finished import Finished, instant, store
from cift_strategies.page import DASH, Page, count, number, small
from cift_strategies.sections import NOT_SHOWN, SECTIONS, claims, gains, money_rows

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
    title = escape(f"Backtest of {', '.join(names) if len(names) <= 4 else f'{len(names)} instruments'}")
    start, end = done.traded_span
    traded = f"traded {instant(start)} to {instant(end)} UTC \u00b7 source: {done.summary.get('source', DASH)}"
    text = Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=title,
        subtitle=escape(traded),
        links="".join(f'<a href="#{anchor}">{escape(link)}</a>' for anchor, link in page.links),
        body="\n".join(page.parts),
        plotly=str(get_plotlyjs()).replace("</script", "<\\/script"),
    )
    path = out / "report.html"
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
    return path


def picture(page: str, png: Path, width: int = 1200, height: int = 1620, dark: bool = False) -> Path:
    """The upper part of the page at the address `page` as a PNG, taken by the Chromium of this machine: a report (file:) once it is drawn,
    a running node's after some seconds. Raises InputError where there is no browser or no such page.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise InputError(f"no Chromium or Chrome on this machine to take {png} with: install one (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory() as scratch:
        shot = Path(scratch) / "shot.png"
        command = [browser, "--headless", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--hide-scrollbars"]
        command += [f"--user-data-dir={scratch}/profile", f"--window-size={width},{height}", f"--screenshot={shot}"]
        command += ["--virtual-time-budget=15000" if page.startswith("file:") else "--timeout=6000"]
        command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
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
            interval = f"{number(g.low, 3, sign=True)} to {number(g.high, 3, sign=True)}" if g else DASH
            t.add_row(str(r["instrument"]), str(r["horizon"]), number(loss, 4), base, interval, count(r.get("effective")))
        console.print(t)
    for r in s.get("rolls") or ():
        console.print(f"rolled from {r['from']} to {r['to']} at {instant(r['ts'])} UTC", markup=False)
    shown = claims(s)
    console.print(f"better than every baseline: {', '.join(shown)}" if shown else f"{NOT_SHOWN[0].upper()}{NOT_SHOWN[1:]}.", markup=False)


def main() -> None:
    """``python -m cift_strategies.report OUT|URL [--png FILE] [--dark]``."""
    import argparse

    about = "Make report.html again from the output folder of a run; take a picture of it, or of the page of a running node."
    a = argparse.ArgumentParser(prog="python -m cift_strategies.report", description=about)
    a.add_argument("out", help="the --out folder of run_backtest.py, or the address at which a node shows its page")
    a.add_argument("--png", type=Path, help="also write a picture of the upper part of the page; needs Chromium or Chrome")
    a.add_argument("--dark", action="store_true", help="the picture in dark colours")
    args = a.parse_args()
    if args.out.startswith(("http://", "https://")):
        if args.png is None:
            raise InputError(f"{args.out} is the page of a node: say where its picture goes with --png FILE")
        print(picture(args.out, args.png, 1600, 1100, args.dark))
        return
    page = render(Path(args.out))
    print(page)
    if args.png:
        print(picture(page.resolve().as_uri(), args.png, dark=args.dark))


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
