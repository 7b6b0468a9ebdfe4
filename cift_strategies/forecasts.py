"""What the forecasts of a finished run were worth beside their scores: confusion, agreement of members, who leads whom, drift in order.

Takes a :class:`Finished`, of long runs evenly spaced parts, gives plain arrays and rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from cift_strategies.execution import TILT
from cift_strategies.finished import HORIZONS, Columns, Finished
from cift_strategies.performance import F, block_mean
from cift_strategies.results import columns_of

MOST_TICKS: Final = 20_000  # changes of the mid of an instrument that are searched for a lead; of more, the newest
MOST_INSTRUMENTS: Final = 6  # whose pairs are searched, the most active first
CLASSES: Final = ("down", "flat", "up")


def _read(done: Finished, columns: list[str]) -> Iterator[Columns]:
    """Parts of predictions.parquet; "votes" as (n, members, horizons, 3)."""
    if not set(columns) <= done.stored:
        return
    with pq.ParquetFile(done.folder / "predictions.parquet") as f:
        for part in done.parts(f):
            table = f.read_row_groups(part, columns=columns)
            got = columns_of(table.drop_columns(["votes"]) if "votes" in columns else table)
            if "votes" in columns:
                flat = table["votes"].combine_chunks().flatten().to_numpy()
                got["votes"] = flat.reshape(table.num_rows, len(done.members), len(HORIZONS), 3)
            yield got


def _classes(done: Finished, c: Columns, h: str) -> Any:
    """0 down, 1 flat, 2 up by the run's thresholds; -1 where nothing is known."""
    move, edge = np.asarray(c[f"move_{h}"], np.float64), np.full(len(c["instrument"]), np.nan)
    for name, by in (done.summary.get("thresholds") or {}).items():
        edge[c["instrument"] == name] = by.get(h, np.nan)
    out = 1 + (move > edge).astype(np.int8) - (move < -edge).astype(np.int8)
    return np.where(np.isfinite(move) & np.isfinite(edge), out, -1)


def confusion(done: Finished) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
    """Per horizon how often each class came (rows: down, flat, up) when each was the likeliest forecast (columns): (3, 3) counts."""
    out = {}
    for h in HORIZONS:
        n = np.zeros((3, 3), np.int64)
        for c in _read(done, ["instrument", f"p_down_{h}", f"p_flat_{h}", f"p_up_{h}", f"move_{h}"]):
            p = np.stack([c[f"p_{k}_{h}"] for k in CLASSES], axis=1)
            y = _classes(done, c, h)
            ok = (y >= 0) & np.isfinite(p).all(axis=1)
            n += np.bincount(3 * y[ok] + p[ok].argmax(axis=1), minlength=9).reshape(3, 3)
        if n.sum():
            out[h] = n
    return out


class Agreed(NamedTuple):
    """Decisions of which `members` lean one way more than the other: `number`, mean signed move (ticks) with its interval, share that went
    that way of those that moved."""

    members: int
    number: int
    mean: float
    low: float
    high: float
    right: float


def agreement(done: Finished) -> dict[str, list[Agreed]]:
    """Per horizon and net number of members on one side (0 where they cancel out): what became of the move in their direction."""
    found: dict[str, dict[int, list[tuple[Any, F]]]] = {h: {} for h in HORIZONS}
    if not done.members:
        return {}
    for c in _read(done, ["ts", "votes", *(f"move_{h}" for h in HORIZONS)]):
        for j, h in enumerate(HORIZONS):
            lead = c["votes"][:, :, j, 2] - c["votes"][:, :, j, 0]
            net = ((lead > TILT).astype(np.int8).sum(axis=1) - (lead < -TILT).astype(np.int8).sum(axis=1)).astype(np.int64)
            moved = np.sign(net) * np.asarray(c[f"move_{h}"], np.float64)
            for k in range(1, len(done.members) + 1):
                own = (np.abs(net) == k) & np.isfinite(moved)
                if own.any():
                    found[h].setdefault(k, []).append((c["ts"][own], moved[own]))
    out: dict[str, list[Agreed]] = {}
    for h, by in found.items():
        for k, parts in sorted(by.items()):
            ts, moved = (np.concatenate(a) for a in zip(*parts))
            mean, low, high = (float(v[0]) for v in block_mean(moved[:, None], np.asarray(ts, np.int64)))
            went = moved != 0
            right = float((moved[went] > 0).mean()) if went.any() else float("nan")
            out.setdefault(h, []).append(Agreed(k, len(moved), mean, low, high, right))
    return out


class Edge(NamedTuple):
    """`leader` moves first, by `lag_ms`; correlation of the moves at that lag, its z under independence, and the lead-lag ratio (> 1 where
    the leader leads)."""

    leader: str
    follower: str
    lag_ms: float
    correlation: float
    z: float
    ratio: float


def leads(done: Finished) -> list[Edge]:
    """Lead and lag of every pair of instruments, from the mids at decisions (Hoffmann, Rosenbaum, Yoshida 2013; Huth, Abergel 2014)."""
    from cift_models.leadlag import lead_lag

    parts: dict[str, list[tuple[Any, F]]] = {}
    for c in _read(done, ["ts", "instrument", "mid"]):
        for name in dict.fromkeys(c["instrument"].tolist()):
            own = (c["instrument"] == name) & np.isfinite(c["mid"])
            parts.setdefault(name, []).append((c["ts"][own], c["mid"][own]))
    ticks = {}
    for name, got in parts.items():
        ts, mid = (np.concatenate(a) for a in zip(*got))
        moved = np.r_[True, np.diff(mid) != 0][: len(mid)]
        last = np.r_[ts[moved][1:] != ts[moved][:-1], True][: int(moved.sum())]  # of several mids in an instant the last counts
        ticks[name] = (ts[moved][last].astype(np.int64)[-MOST_TICKS:], np.log(mid[moved][last])[-MOST_TICKS:])
    names = sorted((n for n, (ts, _) in ticks.items() if len(ts) > 2), key=lambda n: -len(ticks[n][0]))[:MOST_INSTRUMENTS]
    out = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            found = lead_lag(*ticks[a], *ticks[b])
            ahead = found.lag_ns >= 0
            ratio = found.ratio if ahead else 1 / max(found.ratio, 1e-300)
            out.append(Edge(a if ahead else b, b if ahead else a, abs(found.lag_ns) / 1e6, found.correlation, found.z, ratio))
    return out


def drifted(done: Finished, most: int = 15) -> tuple[list[str], list[str], F] | None:
    """Features (rows, those that moved most first) and instruments (columns) with their population stability index; None where it was not
    recorded."""
    told = (done.summary.get("diagnostics") or {}).get("drift") or {}
    if not told:
        return None
    names, ids = list(next(iter(told.values()))), list(told)
    found = np.array([[np.nan if told[i].get(n) is None else told[i][n] for i in ids] for n in names], np.float64)
    known = np.isfinite(found).any(axis=1)
    if not known.any():
        return None
    rows = np.flatnonzero(known)[np.argsort(-np.nanmax(found[known], axis=1), kind="stable")][:most]
    return [names[r] for r in rows], ids, found[rows]
