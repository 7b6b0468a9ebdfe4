"""The planted level-1 market of test_inference.py as a catalog on disk."""

from __future__ import annotations

from pathlib import Path

from test_inference import INSTRUMENTS, quotes

from catalog.definitions import Definition
from catalog.importer import nautilus_instrument
from catalog.parquet import QUOTES
from catalog.writer import Writer


def quote_catalog(root: Path, seed: int = 7, updates: int = 5_000, gap_ms: float = 110.0, signal: float = 1.0) -> Path:
    """Writes the catalog; its events are those of `quotes` but that each quote is stamped as a pair."""
    from nautilus_trader.persistence import ParquetDataCatalog

    root.mkdir(parents=True)
    events = quotes(seed, updates, signal, gap_ms)
    for k, instrument in enumerate(INSTRUMENTS):
        writer = Writer(root, QUOTES, instrument)
        writer.add(events[events["instrument"] == k])
        writer.close()
    ParquetDataCatalog(str(root)).write_instruments([nautilus_instrument(Definition(i, i.id.split(".")[0])) for i in INSTRUMENTS])
    return root
