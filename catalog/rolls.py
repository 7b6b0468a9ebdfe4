"""Which futures contract is the one to trade, day by day: rolled at volume, decided with what was known the day before.

Takes a catalog that holds several contracts of one underlying, gives the rolls. The contracts stay separate instruments.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from catalog import parquet
from catalog.errors import InputError
from catalog.events import session_bounds


def schedule(root: str | Path) -> list[dict[str, Any]]:
    """The rolls of every underlying with two or more contracts in the catalog, in order of time: {"underlying", "from", "to", "ts"}.

    On the first session the front contract is the nearest to expire of those that trade. At the open of each later session (`ts`, ns UTC)
    it becomes the contract with the most volume in the session before, if that expires later; it never goes back to a nearer one. Volume
    is the sum of trade sizes. Raises InputError as :func:`catalog.parquet.contents` does.
    """
    root = Path(root)
    found: list[dict[str, Any]] = []
    for underlying, contracts in sorted(_contracts(root).items()):
        volume = _volumes(root, contracts)
        sessions = sorted({s for by in volume.values() for s in by})
        expiry = dict(contracts)
        front = min((c for c in volume if sessions and sessions[0] in volume[c]), key=lambda c: (expiry[c], c), default="")
        for before, now in itertools.pairwise(sessions):
            later = [c for c in volume if expiry[c] > expiry[front]]
            best = max(later, key=lambda c: (volume[c].get(before, 0), -expiry[c]), default=None)
            if best is not None and volume[best].get(before, 0) > volume[front].get(before, 0):
                found.append({"underlying": underlying, "from": front, "to": best, "ts": now})
                front = best
    return sorted(found, key=lambda r: (r["ts"], r["underlying"]))


def front(root: str | Path, underlying: str, ts: int) -> str:
    """The contract of `underlying` to trade at `ts` (ns UTC). Raises InputError where the catalog has none."""
    contracts = _contracts(Path(root), 1).get(underlying)
    if not contracts:
        raise InputError(f"{root} holds no futures of {underlying}")
    rolls = [r for r in schedule(root) if r["underlying"] == underlying]
    done = [r for r in rolls if r["ts"] <= ts]
    if done:
        return str(done[-1]["to"])
    return str(rolls[0]["from"]) if rolls else _first(Path(root), contracts)


def _first(root: Path, contracts: list[tuple[str, int]]) -> str:
    traded = {c for c, by in _volumes(root, contracts).items() if by}
    return min((e, c) for c, e in contracts if c in traded or not traded)[1]


def _contracts(root: Path, least: int = 2) -> dict[str, list[tuple[str, int]]]:
    """(instrument id, expiration) by underlying, of those with at least `least` contracts."""
    held: dict[str, dict[str, int]] = {}
    for path in sorted((root / "data" / "futures_contract").glob("*/*.parquet")):
        table = pq.read_table(path)
        expiry = table["expiration_ns"]
        stamps = (expiry.cast(pa.int64()) if pa.types.is_timestamp(expiry.type) else expiry).to_pylist()
        for name, underlying, when in zip(table["id"].to_pylist(), table["underlying"].to_pylist(), stamps):
            held.setdefault(underlying, {})[name] = int(when)
    return {u: sorted(c.items()) for u, c in held.items() if len(c) >= least}


def _volumes(root: Path, contracts: list[tuple[str, int]]) -> dict[str, dict[int, int]]:
    """Traded size (1e-9 units) by contract and opening of the session."""
    sessions = {i.id: i.session for i in parquet.read_instruments(root).values()}
    volume: dict[str, dict[int, int]] = {c: {} for c, _ in contracts}
    for part in parquet.contents(root):
        if part.type != parquet.TRADES or part.id not in volume:
            continue
        with pq.ParquetFile(part.path) as file:
            for batch in file.iter_batches(columns=["size", "ts_init"]):
                ts = batch.column("ts_init").cast(pa.int64()).to_numpy()
                size = batch.column("size").cast(pa.float64()).to_numpy()
                lo = 0
                while lo < len(ts):
                    opens, closes = session_bounds(sessions[part.id], int(ts[lo]))
                    hi = max(lo + 1, int(np.searchsorted(ts, closes)))
                    volume[part.id][opens] = volume[part.id].get(opens, 0) + round(float(size[lo:hi].sum()))
                    lo = hi
    return volume
