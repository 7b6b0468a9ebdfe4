"""The planted level-1 market of test_inference.py as a catalog on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from test_inference import INSTRUMENTS, quotes

from catalog.definitions import Definition
from catalog.events import SCALE
from catalog.importer import nautilus_instrument
from catalog.parquet import QUOTES
from catalog.writer import Writer


def quote_catalog(
    root: Path, seed: int = 7, updates: int = 5_000, gap_ms: float = 110.0, signal: float = 1.0, then: Sequence[float] = ()
) -> Path:
    """Writes the catalog; its events are those of `quotes` but that each quote is stamped as a pair; `then`: signals of later days."""
    from nautilus_trader.persistence import ParquetDataCatalog

    root.mkdir(parents=True)
    days = [quotes(seed + 100 * d, updates, s, gap_ms) for d, s in enumerate((signal, *then))]
    for d, day in enumerate(days):
        for stamp in ("ts_event", "ts_init"):
            day[stamp] += d * 86_400 * SCALE
    events = np.concatenate(days)
    for k, instrument in enumerate(INSTRUMENTS):
        writer = Writer(root, QUOTES, instrument)
        writer.add(events[events["instrument"] == k])
        writer.close()
    ParquetDataCatalog(str(root)).write_instruments([nautilus_instrument(Definition(i, i.id.split(".")[0])) for i in INSTRUMENTS])
    return root
