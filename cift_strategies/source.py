"""Where a backtest's data comes from: the embedded demo market, DBN files, or a catalog. Each becomes a catalog on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from catalog.errors import InputError
from catalog.events import Instrument, catalog_range, is_inferred, read_catalog, read_instruments_toml, session_bounds
from catalog.whole import STORE as STORE
from catalog.whole import sha256_of

DEMO_RECORDS: Final = 1_180_000  # of which a seventh are fill records, which repeat what trades and book changes tell


@dataclass(frozen=True, slots=True)
class Source:
    """A catalog to run on. `quality` is None where nobody has counted yet; `split` is where the demo's last session opens, ns.

    `altdata`: the source's own table of alternative data.
    """

    name: str
    root: Path
    instruments: Sequence[Instrument]
    quality: dict[str, int] | None = None
    split: int | None = None
    altdata: Path | None = None


def demo_market(seed: int) -> Path:
    """Where the demo market of `seed` lies, as the present code makes it: one that older code has made is another market."""
    code = sha256_of(sorted((Path(__file__).parents[1] / "catalog").glob("*.py")))
    return STORE / f"demo-market-{seed}-{code[:10]}"


def demo(seed: int) -> Source:
    """The embedded market: three equities, two sessions, made once per seed as genuine DBN files and imported from them."""
    from catalog.databento import import_dbn
    from catalog.synthetic import FEE_PER_SHARE, make_market

    place = demo_market(seed)
    first_time = not place.exists()
    warming = _in_background("cift_strategies.warm") if first_time else None
    try:
        market = make_market(place, seed, events=DEMO_RECORDS)
        info = import_dbn([*market.mbo, *market.definitions])
        if warming is not None:
            warming.wait()
    finally:
        if warming is not None:
            warming.kill()
    found = _catalog("demo", info.root, None, info.quality)
    traded = [replace(x, session=market.session, fee_per_unit=FEE_PER_SHARE) for x in found.instruments]
    return replace(found, instruments=traded, split=_last_open(info.root, traded), altdata=market.alternative)


def _in_background(module: str) -> subprocess.Popen[bytes]:
    quiet = subprocess.DEVNULL
    return subprocess.Popen([sys.executable, "-m", module], cwd=STORE.parents[1], stdin=quiet, stdout=quiet, stderr=quiet)


def dbn(files: Sequence[Path], instruments: Path | None, symbols: Sequence[str] | None, start: int | None, end: int | None) -> Source:
    """DBN files, imported into the store (or found there again)."""
    from catalog.databento import import_dbn

    info = import_dbn(files, None, instruments, symbols, start, end)
    return _catalog(Path(files[0]).name.split(".")[0], info.root, None, info.quality)


def databento(dataset: str, schema: str, symbols: Sequence[str], start: int, end: int, instruments: Path | None, pay: bool) -> Source:
    """Databento's history of [start, end) ns: the price first, then what is missing, imported. The key is in DATABENTO_API_KEY."""
    from catalog import historical, importer
    from catalog.parquet import iso

    kept, confirm = importer.STORE / "databento", historical.payer(dataset, pay)
    files = historical.download(dataset, schema, symbols, iso(start), iso(end), kept, confirm)
    return replace(dbn(files, instruments, None, start, end), name="-".join([*symbols[:3], dataset]))


def polygon(symbols: Sequence[str], start: int, end: int) -> Source:
    """Polygon's quotes and trades from `start` to `end` ns: a level-1 catalog. The key is in POLYGON_API_KEY."""
    from catalog.polygon import Request, history, store

    request = Request(tuple(symbols), start, end)
    root, parts = store(request)
    note = history(request, root, parts=parts)
    return _catalog("polygon-" + "-".join(symbols[:3]), root, None, {str(k): int(v) for k, v in note["quality"].items()})


def catalog(root: Path, symbols: Sequence[str] | None, described: Path | None = None) -> Source:
    """A NautilusTrader catalog, made here or elsewhere. `described`: TOML that tells sessions and fees, where the catalog does not."""
    note, quality = root / "cift.json", None
    if note.is_file():
        try:
            quality = {str(k): int(v) for k, v in json.loads(note.read_text())["quality"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(f"{note} is damaged ({e}): import the catalog again") from None
    found = _catalog(root.resolve().name, root, symbols, quality)
    if described is None:
        return found
    told = {x.id: x for x in read_instruments_toml(described, found.instruments)}
    if unknown := sorted(set(told) - {x.id for x in found.instruments}):
        held = ", ".join(x.id for x in found.instruments)
        raise InputError(f"{described} describes {unknown[0]}, which {root} does not hold; it holds {held}")
    table = [_described(x, told[x.id], described) if x.id in told else x for x in found.instruments]
    return replace(found, instruments=table)


def _described(x: Instrument, told: Instrument, path: Path) -> Instrument:
    for name in ("tick", "lot", "multiplier", "currency"):
        here, there = getattr(told, name), getattr(x, name)
        if here != there:
            raise InputError(f"{path}: {name} of {x.id} is {here}, but the catalog was written with {there}: correct it")
    return replace(x, session=told.session, maker_fee=told.maker_fee, taker_fee=told.taker_fee, fee_per_unit=told.fee_per_unit)


def _catalog(name: str, root: Path, symbols: Sequence[str] | None, quality: dict[str, int] | None) -> Source:
    instruments, _ = read_catalog(root, symbols)
    if unknown := [x.id for x in instruments if is_inferred(x)]:
        raise InputError(f"{root} has no currency for {', '.join(unknown)}: import it again with --instruments")
    if inverse := [x.id for x in instruments if x.kind.startswith("inverse")]:
        raise InputError(f"{inverse[0]} is an inverse contract: what it earns is not linear in its price; name others with --symbols")
    return Source(name, root.resolve(), instruments, quality)


def _last_open(root: Path, instruments: Sequence[Instrument]) -> int:
    _, last = catalog_range(root)
    return max(session_bounds(x.session, last)[0] for x in instruments)
