"""`python -m catalog altdata fill | merge | describe`: the table of alternative data, from Polygon and from the user's own files.

`fill` asks Polygon's REST history for what it has of the 27 features and adds it to a Parquet table, which may be recorded day by day;
`merge` makes one table of several; `describe` checks a table and says what is in it. What a table is, docs/altdata.md tells.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table as Printed

from catalog import altdata
from catalog.altdata import FEATURES, NAMES, Table
from catalog.errors import InputError
from catalog.parquet import iso

app = typer.Typer(no_args_is_help=True, help=__doc__, rich_markup_mode=None)
Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")]


@app.command()
def fill(
    symbols: Annotated[str, typer.Argument(help="symbols, separated by commas: AAPL,MSFT")],
    start: Annotated[str, typer.Option(help="first time known, UTC")],
    end: Annotated[str, typer.Option(help="last time known, UTC; the future too: snapshots are taken now")],
    out: Annotated[Path, typer.Option(help="the table, .parquet; what it holds already stays")],
    groups: Annotated[str | None, typer.Option(help="options, news, earnings, large trades, macro; default: all")] = None,
    sector: Annotated[list[str] | None, typer.Option(help="fund of a symbol's sector, AAPL=XLK; may be repeated")] = None,
    as_json: Json = False,
) -> None:
    """Alternative data from Polygon (key in POLYGON_API_KEY); interrupted, the same command goes on where it stopped."""
    from catalog import altfill
    from catalog.moments import nanoseconds
    from catalog.polygon import STORE, Rest

    first, last = nanoseconds(start) or 0, nanoseconds(end) or 0
    wanted = [s.strip() for s in symbols.split(",") if s.strip()]
    if not wanted or last <= first:
        raise InputError(f"nothing to fill: {len(wanted)} symbols from {start} to {end}")
    _writable(out)
    funds = dict(_pair(s) for s in sector or ())
    if unknown := sorted(set(funds) - set(wanted)):
        raise InputError(f"--sector {unknown[0]}: {unknown[0]} is not among the symbols {', '.join(wanted)}")
    chosen = altfill.GROUPS if groups is None else [g.strip() for g in groups.split(",") if g.strip()]
    past = altdata.read(out) if out.is_file() else altdata.stack()
    new, left = altfill.fill(Rest(), wanted, first, last, groups=chosen, parts=STORE / "polygon.parts", sectors=funds, past=past)
    whole, changed = altdata.extended(past, new)
    altdata.write(whole, out)
    if as_json:
        print(json.dumps({"file": str(out), "new": len(whole) - len(past), "changed": changed, "left_out": left} | _described(whole)))
        return
    print(f"{len(whole) - len(past):,} new rows, {len(whole):,} in all: {out}")
    if changed:
        print(f"{changed:,} rows have another value at Polygon now: what was recorded is kept")
    for group, why in left.items():
        print(f"left out: {group}: {why}")
    _print(whole)


@app.command()
def merge(
    files: Annotated[list[Path], typer.Argument(help="tables, .parquet or .csv")],
    out: Annotated[Path, typer.Option(help="the one table, .parquet")],
) -> None:
    """Check several tables and write them as one."""
    _writable(out)
    whole = altdata.merge(*map(altdata.read, files))
    altdata.write(whole, out)
    print(f"{len(whole):,} rows of {len(files)} files: {out}")


@app.command()
def describe(file: Annotated[Path, typer.Argument(help="a table, .parquet or .csv")], as_json: Json = False) -> None:
    """Check a table, row by row, and say what is in it."""
    data = altdata.read(file)
    if as_json:
        print(json.dumps({"file": str(file)} | _described(data)))
    else:
        _print(data)


def _pair(text: str) -> tuple[str, str]:
    symbol, _, fund = text.partition("=")
    if not symbol or not fund:
        raise InputError(f"--sector {text}: write SYMBOL=FUND, such as AAPL=XLK")
    return symbol, fund


def _writable(out: Path) -> None:
    if out.suffix != ".parquet":
        raise InputError(f"--out {out}: the table is written as .parquet, name it so")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: the folder {out.parent} does not exist: make it first")


def _described(data: Table) -> dict[str, Any]:
    """Counts, ranges and delays; "early" rows were known sooner than their source can tell (docs/altdata.md)."""
    told: dict[str, Any] = {}
    for f, name in enumerate(NAMES):
        mine = np.flatnonzero(data.feature == f)
        if len(mine):
            delay = (data.ts_known[mine] - data.ts_event[mine]) / 1e9
            told[name] = {
                "rows": len(mine), "instruments": sorted({data.names[k] for k in data.instrument[mine]}),
                "first": int(data.ts_known[mine].min()), "last": int(data.ts_known[mine].max()), "delay_s": float(np.median(delay)),
                "early": int((delay < FEATURES[f].delay_s - 1e-9).sum()), "low": float(data.value[mine].min()),
                "high": float(data.value[mine].max()),
            }  # fmt: skip
    return {"rows": len(data), "instruments": list(data.names), "features": told, "missing": [n for n in NAMES if n not in told]}


def _print(data: Table) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160)
    said = _described(data)
    printed = Printed("feature", "rows", "of", "from", "to", "delay, s", "lowest", "highest")
    for name, t in said["features"].items():
        who = ", ".join(t["instruments"][:4]) + (", ..." if len(t["instruments"]) > 4 else "")
        span = (iso(t[k])[:19] for k in ("first", "last"))
        printed.add_row(name, f"{t['rows']:,}", who, *span, f"{t['delay_s']:g}", f"{t['low']:.4g}", f"{t['high']:.4g}")
    console.print(printed)
    if early := {name: t["early"] for name, t in said["features"].items() if t["early"]}:
        counts = ", ".join(f"{n:,} of {name}" for name, n in early.items())
        console.print(f"known sooner than their source can tell (column delay of docs/altdata.md): {counts}")
    if said["missing"]:
        console.print(f"not there: {', '.join(said['missing'])}")
