"""`python -m catalog import | download | describe | check | export`: get market data in, see what is there and what is wrong with it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from catalog import importer, parquet, quality
from catalog.databento import import_dbn
from catalog.dbn import SCHEMAS, Dbn, read_definitions, stream
from catalog.errors import InputError, exit_code, run_typer
from catalog.events import Instrument, is_inferred, read_catalog, read_instruments_toml, text
from catalog.importer import CatalogInfo
from catalog.lobster import import_lobster, is_lobster
from catalog.parquet import iso
from catalog.progress import Steps

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None, pretty_exceptions_enable=False)
console = Console(width=None if sys.stdout.isatty() else 160)

Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")]
Where = Annotated[Path, typer.Argument(help="the root of a catalog, or a DBN file")]
Definitions = Annotated[Path | None, typer.Option("--instruments", help="TOML with definitions where the data has none")]


def nanoseconds(moment: str | None) -> int | None:
    """A time as typed ("2024-05-08", "2024-05-08T14:30", ns since 1970; UTC) in ns. Raises InputError."""
    if moment is None:
        return None
    try:
        return int(moment) if moment.isdigit() else int(np.datetime64(moment.removesuffix("Z"), "ns").astype(np.int64))
    except (ValueError, OverflowError):
        raise InputError(f'"{moment}" is no time: write 2024-05-08, 2024-05-08T14:30:00 or ns since 1970, in UTC') from None


def _names(symbols: str | None) -> list[str] | None:
    return [s for s in symbols.replace(",", " ").split()] if symbols is not None else None


@app.command("import")
def import_(
    files: Annotated[list[Path], typer.Argument(help="DBN files (events, definitions, status) or folders of them; or LOBSTER files")],
    out: Annotated[Path | None, typer.Option(help="where the catalog goes; default: a folder of the store, found again next time")] = None,
    instruments: Definitions = None,
    symbols: Annotated[str | None, typer.Option(help="the ones to keep, separated by commas")] = None,
    start: Annotated[str | None, typer.Option(help="first time to keep, UTC")] = None,
    end: Annotated[str | None, typer.Option(help="last time to keep, UTC")] = None,
    as_json: Json = False,
) -> None:
    """Databento or LOBSTER files into a NautilusTrader catalog."""
    read = import_lobster if any(is_lobster(f) for f in files) else import_dbn
    _imported(read(files, out, instruments, _names(symbols), nanoseconds(start), nanoseconds(end)), as_json)


def _imported(info: CatalogInfo, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(info) | {"root": str(info.root)}))
        return
    verb = "was imported before" if info.reused else "imported"
    counts = ", ".join(f"{n:,} {kind.replace('_', ' ')}" for kind, n in info.counts.items() if n)
    console.print(f"{verb}: {counts} of {', '.join(i.id for i in info.instruments[:8])}")
    console.print(f"order kept by moving {info.moved:,} stamps ({info.moved_trades:,} trades follow a book change of the same stamp)")
    _faults({k: n for k, n in info.quality.items() if n}, info.first, "record")
    for roll in json.loads((info.root / "cift.json").read_text())["rolls"]:
        console.print(f"roll at {iso(roll['ts'])[:16]}: {roll['from']} to {roll['to']}")
    console.print(f"catalog: {info.root}", soft_wrap=True)


@app.command()
def download(
    dataset: Annotated[str | None, typer.Argument(help="Databento dataset, such as GLBX.MDP3")] = None,
    schema: Annotated[str, typer.Option(help="mbo, mbp-10, mbp-1, tbbo, trades, ...")] = "mbo",
    symbols: Annotated[str | None, typer.Option(help="of one kind, with commas: ESH4, or ES.v.0, or ES.FUT")] = None,
    polygon: Annotated[str | None, typer.Option(help="symbols of Polygon's history instead, separated by commas")] = None,
    start: Annotated[str | None, typer.Option(help="first time, UTC")] = None,
    end: Annotated[str | None, typer.Option(help="the time to stop at, UTC")] = None,
    out: Annotated[Path | None, typer.Option(help="where the catalog goes; default: a folder of the store")] = None,
    instruments: Definitions = None,
    yes: Annotated[bool, typer.Option("--yes", help="pay what is asked without a question")] = False,
    as_json: Json = False,
) -> None:
    """Databento's data (key in DATABENTO_API_KEY) or Polygon's (POLYGON_API_KEY) into a catalog; what is here is not fetched again."""
    if (dataset is None) == (polygon is None):
        raise InputError("name a Databento dataset (python -m catalog download GLBX.MDP3 ...) or --polygon SYMBOLS, one of them")
    if start is None or end is None:
        raise InputError("no range: give --start and --end")
    if polygon is not None:
        _polygon(_names(polygon) or [], start, end, out, as_json)
        return
    from catalog import historical

    assert dataset is not None
    kept = importer.STORE / "databento"
    files = historical.download(dataset, schema, _names(symbols) or [], start, end, kept, historical.payer(dataset, yes))
    if schema not in SCHEMAS:
        print("\n".join(map(str, files)))
        return
    _imported(import_dbn(files, out, instruments), as_json)


def _polygon(symbols: list[str], start: str, end: str, out: Path | None, as_json: bool) -> None:
    from catalog.polygon import Request, history, store

    first, last = nanoseconds(start), nanoseconds(end)
    if not symbols or first is None or last is None or first > last:
        raise InputError(f"nothing to download: {len(symbols)} symbols from {start} to {end}")
    request = Request(tuple(symbols), first, last)
    root, parts = store(request)
    note = history(request, out or root, parts=parts)
    if as_json:
        print(json.dumps(note | {"root": str(out or root)}))
    else:
        console.print(f"catalog: {out or root}", soft_wrap=True)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def export(context: typer.Context) -> None:
    """Features and labels to Parquet: `python -m catalog export DIR --out FILE.parquet`, which is `python -m cift_models export`."""
    import runpy

    sys.argv = ["cift_models", "export", *context.args]
    runpy.run_module("cift_models", run_name="__main__")


@app.command()
def describe(where: Where, as_json: Json = False) -> None:
    """What is in a catalog or a DBN file, and what a backtest of it would take."""
    if is_lobster(where):
        raise InputError(f"{where} is a LOBSTER file: import it first (python -m catalog import {where}) and describe the catalog")
    if where.is_dir():
        _describe_catalog(where, as_json)
    else:
        _describe_dbn(where, as_json)


def _describe_catalog(root: Path, as_json: bool) -> None:
    parts, known = parquet.contents(root), parquet.read_instruments(root)
    total = parquet.estimate(parts)
    if as_json:
        files = [asdict(p) | {"path": str(p.path)} for p in parts]
        print(json.dumps({"files": files, "instruments": [asdict(i) for i in known.values()], "estimate": asdict(total)}))
        return
    table = Table("instrument", "tick", "data", "rows", "MB", "from", "to")
    for key in sorted({(p.id, p.type) for p in parts}):
        mine = [p for p in parts if (p.id, p.type) == key]
        tick = text(known[key[0]].tick) if key[0] in known else "no definition"
        size = f"{sum(p.size for p in mine) / 1e6:.1f}"
        span = iso(min(p.start for p in mine))[:23], iso(max(p.end for p in mine))[:23]
        table.add_row(key[0], tick, key[1], f"{sum(p.rows for p in mine):,}", size, *span)
    console.print(table)
    cost = f"about {_span(total.seconds)} and {total.memory / 2**30:.1f} GB"
    console.print(f"a backtest of all {total.events:,} events: {cost}, within a factor of two")


def _describe_dbn(path: Path, as_json: bool) -> None:
    file = Dbn(path)
    if file.schema == "definition":
        found = [asdict(d) for d in read_definitions(path)]
        if as_json:
            print(json.dumps({"dataset": file.dataset, "schema": file.schema, "definitions": found}))
            return
        table = Table("instrument", "kind", "tick", "multiplier", "currency", title=f"{path.name}: definitions of {file.dataset}")
        for d in read_definitions(path):
            i = d.instrument
            table.add_row(i.id, i.kind, text(i.tick), f"{i.multiplier:g}", i.currency)
        console.print(table)
        return
    instruments, blocks = stream(path)
    rows: dict[int, NDArray[Any]] = {}
    first, last = 2**63 - 1, -(2**63)
    with Steps("read"):
        for b in blocks:
            for k in np.unique(b.events["instrument"]):
                mine = b.events["action"][b.events["instrument"] == k]
                rows[int(k)] = rows.get(int(k), np.zeros(256, np.int64)) + np.bincount(mine, minlength=256)
            first, last = min(first, int(b.events["ts_init"].min())), max(last, int(b.events["ts_init"].max()))
    counts = {instruments[k].id: {chr(a): int(n) for a, n in enumerate(r) if n} for k, r in rows.items()}
    meta = {"dataset": file.dataset, "schema": file.schema, "version": int(file.metadata.version), "start": first, "end": last}
    if as_json:
        print(json.dumps(meta | {"events": counts}))
        return
    table = Table("instrument", "tick", *"ACMRT", title=f"{path.name}: DBN {meta['version']}, {file.dataset}, {file.schema}")
    for i in instruments:
        table.add_row(i.id, text(i.tick) + (" (inferred)" if is_inferred(i) else ""), *(f"{counts[i.id].get(a, 0):,}" for a in "ACMRT"))
    console.print(table)
    console.print(f"{iso(first)} to {iso(last)}")


@app.command()
def check(where: Where, instruments: Definitions = None, as_json: Json = False) -> None:
    """Count what is wrong with the data: crossed books, unknown orders, stamps that run backwards, gaps, prices off the tick."""
    described = read_instruments_toml(instruments) if instruments else []
    if is_lobster(where):
        raise InputError(f"{where} is a LOBSTER file: import it first (python -m catalog import {where}) and check the catalog")
    if where.is_dir():
        table, source = read_catalog(where)
        blocks: Iterator[NDArray[Any]] = source
        checker = quality.Checker(table)
        with Steps("check", sum(p.rows for p in parquet.contents(where)), "events") as steps:
            for events in blocks:
                checker.update(events)
                steps.advance(len(events))
    else:
        found, pieces = stream(where, None, described)
        ticks: list[Instrument] = []
        checker = quality.Checker(ticks)
        with Steps("check", 0, "events") as steps:
            for b in pieces:
                ticks += [replace(i, tick=1) if is_inferred(i) else i for i in found[len(ticks) :]]
                checker.update(b.events, b.records)
                steps.advance(len(b.events))
    q = checker.result()
    if as_json:
        print(json.dumps(asdict(q)))
        return
    console.print(f"{q.events:,} events, {q.last_points:,} of them end a venue event")
    _faults({k: n for k, n in q.counts.items() if n}, q.first, "position" if where.is_dir() else "record")


def _faults(counts: dict[str, int], first: dict[str, tuple[int, int]], what: str) -> None:
    if not counts:
        console.print("nothing wrong was found")
        return
    table = Table("found", "count", f"first {what}", "first time", "meaning")
    for kind, n in counts.items():
        position, ts = first[kind]
        table.add_row(kind, f"{n:,}", f"{position:,}", iso(ts)[:23], quality.KINDS[kind])
    console.print(table)


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main() -> None:
    """The command line; how it ends is told by exceptions (:func:`catalog.errors.exit_code`)."""
    run_typer(app)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
