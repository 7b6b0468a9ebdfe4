"""`python -m catalog import | download | describe | check | export | altdata`: get data in, see what is there and what is wrong with it."""

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

from catalog import altcommands, importer, parquet, quality
from catalog.databento import import_dbn
from catalog.dbn import SCHEMAS, Dbn, read_definitions, stream
from catalog.definitions import beside
from catalog.errors import InputError, exit_code, run_typer
from catalog.estimate import count_events, estimate
from catalog.events import Instrument, is_inferred, read_catalog, read_instruments_toml, text
from catalog.importer import CatalogInfo
from catalog.lobster import import_lobster, is_lobster
from catalog.moments import nanoseconds
from catalog.parquet import iso
from catalog.progress import Steps
from catalog.status import STATES, read_status

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None, pretty_exceptions_enable=False)
app.add_typer(altcommands.app, name="altdata")
console = Console(width=None if sys.stdout.isatty() else 160)

Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")]
Where = Annotated[Path, typer.Argument(help="the root of a catalog, or a DBN file")]
Definitions = Annotated[Path | None, typer.Option("--instruments", help="TOML with definitions where the data has none, or with your fees")]


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
        print(json.dumps(asdict(info) | {"root": str(info.root), "first": _places(info.first)}))
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
    total = estimate(count_events(parts), len({p.id for p in parts}))
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
    console.print(f"a backtest of all {total.events:,} events: {total.told}")


def _describe_dbn(path: Path, as_json: bool) -> None:
    file = Dbn(path)
    if file.schema == "definition":
        passed: dict[str, int] = {}
        found = read_definitions(path, passed)
        if as_json:
            told = [asdict(d) for d in found]
            print(json.dumps({"dataset": file.dataset, "schema": file.schema, "definitions": told, "passed_over": list(passed)}))
            return
        table = Table("instrument", "kind", "tick", "multiplier", "currency", title=f"{path.name}: definitions of {file.dataset}")
        for i in (d.instrument for d in found):
            table.add_row(i.id, i.kind, text(i.tick), f"{i.multiplier:g}", i.currency)
        if found:
            console.print(table)
        if passed:
            console.print(f"{len(passed):,} spreads or options, which are not read: {', '.join([*passed][:8])}")
        return
    if file.schema == "status":
        states = read_status(path)
        if as_json:
            print(json.dumps({"dataset": file.dataset, "schema": file.schema, "states": [s._asdict() for s in states]}))
            return
        table = Table("symbol", "from", "action", "the market is", title=f"{path.name}: status of {file.dataset}")
        for s in states[:40]:
            table.add_row(s.symbol, iso(s.ts_init), s.action.lower().replace("_", " "), STATES[s.state])
        console.print(table)
        console.print(f"{len(states):,} changes of state{', of which the first 40 are shown' if len(states) > 40 else ''}")
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
    near = beside(where)
    defined = [d.instrument for d in read_definitions(near)] if near else []
    described = read_instruments_toml(instruments, defined) if instruments else []
    if is_lobster(where):
        raise InputError(f"{where} is a LOBSTER file: import it first (python -m catalog import {where}) and check the catalog")
    checker = _catalog_checker(where) if where.is_dir() else quality.Checker([])
    damage: InputError | None = None
    with Steps("check", sum(p.rows for p in parquet.contents(where)) if where.is_dir() else 0, "events") as steps:
        try:
            for events, records in _catalog_rows(where) if where.is_dir() else _dbn_rows(where, described, checker):
                checker.update(events, records)
                steps.advance(len(events))
        except InputError as e:
            if not checker.events:
                raise
            damage = e
    q = checker.result()
    if as_json:
        print(json.dumps(asdict(q) | {"first": _places(q.first), "damage": None if damage is None else str(damage)}))
    else:
        console.print(f"{q.events:,} events{' before the damage' if damage else ''}, {q.last_points:,} of them end a venue event")
        _faults({k: n for k, n in q.counts.items() if n}, q.first, "position" if where.is_dir() else "record")
    if damage is not None:
        raise damage


def _catalog_checker(root: Path) -> quality.Checker:
    parts = parquet.contents(root)

    def locate(id_: str, ts: int, trade: bool) -> str:
        mine = [p for p in parts if p.id == id_ and (p.type == parquet.TRADES) == trade and p.start <= ts <= p.end]
        return str(mine[0].path.relative_to(root)) if mine else ""

    return quality.Checker(read_catalog(root)[0], locate)


def _catalog_rows(root: Path) -> Iterator[tuple[NDArray[Any], None]]:
    return ((events, None) for events in read_catalog(root)[1])


def _dbn_rows(path: Path, described: list[Instrument], checker: quality.Checker) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    checker.file = path.name
    found, blocks = stream(path, None, described, checker.bad)
    for b in blocks:
        known = len(checker.instruments)
        checker.instruments += [replace(i, tick=1) if is_inferred(i) else i for i in found[known:]]
        yield b.events, b.records


def _places(first: dict[str, quality.First]) -> dict[str, Any]:
    return {kind: place._asdict() | {"time": iso(place.ts)} for kind, place in first.items()}


def _faults(counts: dict[str, int], first: dict[str, quality.First], what: str) -> None:
    if not counts:
        console.print("nothing wrong was found")
        return
    table = Table("found", "count", f"first {what}", "first time", "sequence", "meaning")
    for kind, n in counts.items():
        at = first[kind]
        table.add_row(kind, f"{n:,}", f"{at.position:,}", iso(at.ts), str(at.sequence), quality.KINDS[kind])
    console.print(table)
    for file in dict.fromkeys(first[kind].file for kind in counts):
        console.print(f"first {', '.join(k for k in counts if first[k].file == file)}: in {file}", soft_wrap=True)


def main() -> None:
    """The command line; how it ends is told by exceptions (:func:`catalog.errors.exit_code`)."""
    run_typer(app)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
