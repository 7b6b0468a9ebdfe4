"""Which futures contract is the one to trade, day by day: rolled at volume, decided with what was known the day before.

Takes a catalog that holds several contracts of one underlying, made here or elsewhere, gives the rolls and when a contract is not the
one to trade. The contracts stay separate instruments.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from catalog import parquet
from catalog.errors import InputError
from catalog.events import session_bounds

NEVER, LOWEST = 2**63 - 1, -(2**63)


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


def rolls(root: Path) -> list[dict[str, Any]]:
    """As :func:`schedule`: as the import noted it, computed once a process for catalogs made elsewhere. Raises InputError for damage."""
    note = root / "cift.json"
    if note.is_file():
        try:
            told = json.loads(note.read_text()).get("rolls")
            if told is not None:
                return [{k: str(r[k]) for k in ("underlying", "from", "to")} | {"ts": int(r["ts"])} for r in told]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(f"{note} is damaged ({e}): import the catalog again") from None
    return list(_schedule(root, _state(root)))


def _state(root: Path) -> tuple[tuple[str, int, int], ...]:
    """What the rolls are computed from, as names, sizes and times of the files; empty where nothing can roll."""
    contracts = {c.replace("/", "") for group in _contracts(root).values() for c, _ in group}
    files = [p for c in sorted(contracts) for p in sorted((root / "data" / parquet.TRADES / c).glob("*.parquet"))]
    return tuple((p.name, (stat := p.stat()).st_size, stat.st_mtime_ns) for p in files)


@lru_cache(maxsize=16)
def _schedule(root: Path, state: tuple[tuple[str, int, int], ...]) -> tuple[dict[str, Any], ...]:
    return tuple(schedule(root)) if state else ()


def front(root: str | Path, underlying: str, ts: int) -> str:
    """The contract of `underlying` to trade at `ts` (ns UTC). Raises InputError where the catalog has none."""
    root = Path(root)
    if underlying not in (contracts := _contracts(root, 1)):
        raise InputError(f"{root} holds no futures of {underlying}")
    return next(c for c, until in _fronts(root, underlying, contracts[underlying]) if ts < until)


def behind(root: Path, ids: Sequence[str]) -> dict[str, tuple[tuple[int, int], ...]]:
    """When another of `ids` was the contract to trade: half-open spans of ns UTC by instrument id, of those of which it ever was."""
    found: dict[str, list[tuple[int, int]]] = {}
    for underlying, contracts in _contracts(root).items():
        mine = [c for c, _ in contracts if c in ids]
        start = LOWEST
        for c, until in _fronts(root, underlying, contracts) if len(mine) > 1 else ():
            for other in mine if c in mine else ():
                if other != c:
                    found.setdefault(other, []).append((start, until))
            start = until
    return {c: tuple(spans) for c, spans in found.items()}


def _fronts(root: Path, underlying: str, contracts: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """(contract, until when it is the one to trade), ascending; the last for ever."""
    mine = [r for r in rolls(root) if r["underlying"] == underlying]
    if not mine:
        return [(_first(root, contracts), NEVER)]
    return [*((r["from"], r["ts"]) for r in mine), (mine[-1]["to"], NEVER)]


def _first(root: Path, contracts: list[tuple[str, int]]) -> str:
    traded = {c for c, by in _volumes(root, contracts).items() if by}
    return min((e, c) for c, e in contracts if c in traded or not traded)[1]


def _contracts(root: Path, least: int = 2) -> dict[str, list[tuple[str, int]]]:
    """(instrument id, expiration) by underlying, of those with at least `least` contracts."""
    held: dict[str, dict[str, int]] = {}
    for path in sorted((root / "data" / "futures_contract").glob("*/*.parquet")):
        try:
            table = pq.read_table(path, columns=["id", "underlying", "expiration_ns"])
        except (pa.ArrowException, OSError, ValueError) as e:
            raise InputError(f"{path} is damaged ({str(e).splitlines()[0][:120]}): write the catalog again") from None
        expiry = table["expiration_ns"]
        stamps = (expiry.cast(pa.int64()) if pa.types.is_timestamp(expiry.type) else expiry).to_pylist()
        for name, underlying, when in zip(table["id"].to_pylist(), table["underlying"].to_pylist(), stamps):
            held.setdefault(underlying, {})[name] = int(when)
    return {u: sorted(c.items()) for u, c in held.items() if len(c) >= least}


def _volumes(root: Path, contracts: list[tuple[str, int]]) -> dict[str, dict[int, int]]:
    """Traded size (1e-9 units) by contract and opening of the session."""
    sessions = {i.id: i.session for i, _ in parquet.definitions(root).values()}
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
