"""Databento files -> a NautilusTrader Parquet catalog, in bounded memory.

:func:`import_dbn` sorts out what the files are (events of one schema, definitions, status) and has :mod:`catalog.importer` make
the catalog.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from catalog import importer
from catalog.dbn import SCHEMAS, Dbn, Events, read_definitions, refused
from catalog.definitions import Definition, beside, companion
from catalog.errors import InputError
from catalog.events import read_instruments_toml
from catalog.importer import CatalogInfo, finished, hash_files, make, name_of, nautilus_instrument
from catalog.parquet import iso
from catalog.status import read_status

__all__ = ["CatalogInfo", "import_dbn", "nautilus_instrument"]


def import_dbn(
    files: Sequence[str | Path],
    out: str | Path | None = None,
    instruments_toml: str | Path | None = None,
    symbols: Sequence[str] | None = None,
    start: int | None = None,
    end: int | None = None,
) -> CatalogInfo:
    """Import DBN files (or folders of them) of one schema into one catalog: mbo (orders), mbp-10 (levels), mbp-1, tbbo, bbo and their
    consolidated kin (quotes and trades; no trades of bbo), or trades alone.

    Status files among `files` or beside them become Nautilus's InstrumentStatus (:func:`catalog.events.trading_state`).
    Definitions: the TOML file first, then definition files among `files` or beside them (`x.definition.dbn.zst` beside
    `x.mbo.dbn.zst`); where both tell of an instrument, the TOML need not repeat what is the same. `symbols`: raw symbols or instrument ids
    to keep. `start`, `end`: ns UTC, both inclusive, on the receive time.
    `out`: a folder that is absent, empty or holds this very import; None: a folder of the store named after files and content.
    Raises InputError for files that are damaged, incomplete, without records or of another schema, for unknown symbols, missing
    definitions (the message carries the TOML to write), prices off the tick, files that overlap in time, and a full disk.
    """
    if start is not None and end is not None and start > end:
        raise InputError(f"the range is empty: it starts at {iso(start)} and ends at {iso(end)}")
    sources, definitions, states, passed = _sorted(files)
    spreads: dict[str, int] = {}
    known = {d.symbol: d for p in definitions for d in read_definitions(p, spreads)}
    described = read_instruments_toml(instruments_toml, [d.instrument for d in known.values()]) if instruments_toml else []
    hashes = hash_files([f.path for f in sources], definitions, states)
    key = {
        "importer": importer.VERSION,
        "sources": [hashes[f.path] for f in sources],
        "definitions": sorted(hashes[p] for p in definitions),
        "status": sorted(hashes[p] for p in states),
        "described": hashlib.sha256(repr(described).encode()).hexdigest() if described else None,
        "symbols": sorted(symbols) if symbols is not None else None,
        "start": start,
        "end": end,
    }
    root = Path(out) if out else importer.STORE / name_of(sources[0].path, key)
    if (found := finished(root, key)) is not None:
        return found
    for path, schema in passed.items():
        print(f"{path} holds {schema}, which is not read: passed over", file=sys.stderr)
    known |= {i.id.rsplit(".", 1)[0]: Definition(i, i.id.rsplit(".", 1)[0], *_facts(known.get(i.id.rsplit(".", 1)[0]))) for i in described}
    numbers = {d.number: d.symbol for d in known.values() if d.number}
    told = [s for p in states for s in read_status(p, numbers)]
    notes = {"schema": Events(sources[0], lambda *_: -2).schema, "passed_over": {str(p): s for p, s in passed.items()}}
    return make(root, key, sources, hashes, known, symbols, start, end, told, notes, spreads)


def _facts(d: Definition | None) -> tuple[Any, ...]:
    return (d.number, d.underlying, d.exchange, d.activation, d.expiration) if d else ()


# --- what is to be read ---------------------------------------------------------------------------------------------------------------


def _sorted(files: Sequence[str | Path]) -> tuple[list[Dbn], list[Path], list[Path], dict[Path, str]]:
    """The files of events in order of time, the definition and status files among and beside them, and what a folder holds besides."""
    paths: dict[Path, bool] = {}  # whether it was named itself
    for name in map(Path, files):
        inside = sorted([*name.glob("*.dbn"), *name.glob("*.dbn.zst")]) if name.is_dir() else [name]
        if not inside:
            raise InputError(f"{name} holds no *.dbn or *.dbn.zst: name a folder of Databento files")
        for p in inside:
            paths[p.resolve()] = paths.get(p.resolve(), False) or not name.is_dir()
    if not paths:
        raise InputError("no files were named: give one or more DBN files")
    opened = [Dbn(p) for p in paths]
    definitions = {f.path: None for f in opened if f.schema == "definition"}
    states = {f.path: None for f in opened if f.schema == "status"}
    sources, passed = [], {}
    for f in opened:
        if f.schema is None or f.schema in SCHEMAS:
            sources.append(f)
        elif f.schema not in ("definition", "status"):
            if paths[f.path]:
                raise refused(f)
            passed[f.path] = f.schema
    for f in sources:
        if (near := beside(f.path)) is not None:
            definitions[near.resolve()] = None
        if (near := companion(f.path, "status")) is not None:
            states[near.resolve()] = None
    if not sources:
        raise refused(opened[0])
    schemas = {Events(f, lambda *_: -2).schema: f.path for f in sources}
    if len(schemas) > 1:
        held = ", ".join(f"{path.name} ({schema})" for schema, path in sorted(schemas.items()))
        raise InputError(f"the files are of several schemas, which tell the same market more than once: {held}; name the files of one")
    return sorted(sources, key=lambda f: (f.begins(), str(f.path))), list(definitions), list(states), passed
