"""How the decisions of a finished run became fills: what each had seen, when its order left, what it cost, how members stood.

Takes a :class:`Finished`, looks times up in its predictions one row group at a time, gives the legs of :mod:`shortfall` and what follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow.parquet as pq

from cift_models.windows import HORIZONS_NS
from cift_strategies.performance import I64, F
from cift_strategies.results import columns_of
from cift_strategies.shortfall import LATENCIES_MS, Legs, legs, repriced, shortfall

if TYPE_CHECKING:
    from cift_strategies.finished import Finished

TILT: Final = 0.02  # a lead smaller than this takes no side (cift_models.ensemble.Config.tilt)


@dataclass(frozen=True)
class Execution:
    """The fills and entries of `done`."""

    done: Finished

    def _scan(self, columns: Sequence[str], instrument: Any, ts: I64, clock: str) -> tuple[I64, dict[str, Any]]:
        """Of each asked instrument (n,) and time (n,) the row of predictions.parquet with the newest `clock` not after it (-1: none), and
        its `columns`; one row group in memory at a time."""
        best = np.full(len(ts), np.iinfo(np.int64).min)
        row, out = np.full(len(ts), -1, np.int64), {c: np.full(len(ts), -1 if c in ("ts", "delivered") else np.nan) for c in columns}
        out = {c: v.astype(np.int64) if c in ("ts", "delivered") else v for c, v in out.items()}
        if not len(ts) or not {clock, *columns} <= self.done.stored:
            return row, out
        with pq.ParquetFile(self.done.folder / "predictions.parquet") as f:
            first = 0
            for g in range(f.metadata.num_row_groups):
                c = columns_of(f.read_row_group(g, columns=list({"instrument", clock, *columns})))
                for name in dict.fromkeys(instrument.tolist()):
                    own = np.flatnonzero(c["instrument"] == name)
                    asked = np.flatnonzero(instrument == name)
                    if not len(own):
                        continue
                    own = own[np.argsort(c[clock][own], kind="stable")]
                    times = c[clock][own].astype(np.int64)
                    j = np.searchsorted(times, ts[asked], side="right") - 1
                    better = (j >= 0) & (times[np.maximum(j, 0)] >= best[asked])
                    at, source = asked[better], own[j[better]]
                    best[at], row[at] = c[clock][source], first + source
                    for name_ in columns:
                        out[name_][at] = c[name_][source]
                first += f.metadata.row_group(g).num_rows
        return row, out

    def mid_at(self, instrument: Any, ts: I64) -> F:
        """The mid (n,) of the newest prediction of each instrument (n,) at each time (n,); NaN before the first."""
        return np.asarray(self._scan(["mid"], instrument, ts, "ts")[1]["mid"])

    @cached_property
    def legs(self) -> Legs:
        """The fills with what was known before them."""

        def newest(instrument: Any, ts: I64) -> tuple[I64, F]:
            found = self._scan(["ts", "mid"], instrument, ts, "delivered")[1]
            return found["ts"], found["mid"]

        return legs(self.done.fills, self.done.more["order"], self.done.more["maker"], self.done.orders, newest)

    @cached_property
    def shortfall(self) -> dict[str, F]:
        """Money lost on each fill, by part; see :func:`shortfall.shortfall`. Fills in other currencies than the panels' count nothing."""
        own = np.array(
            [self.done.facts["instruments"].get(i, {}).get("currency") == self.done.currency for i in self.done.fills.instrument], bool
        )
        return {part: np.where(own, lost, 0.0) for part, lost in shortfall(self.legs).items()}

    @cached_property
    def repriced(self) -> dict[str, list[tuple[float, float]]]:
        """(latency in ms, estimated net PnL) for each of LATENCIES_MS, of decisions and of orders; empty where orders were not kept."""
        if not len(self.done.orders["ts"]) or not len(self.done.fills):
            return {}
        ns, net = [round(1e6 * v) for v in LATENCIES_MS], self.done.money(self.done.summary.get("pnl_net"))
        by = {kind: repriced(self.legs, self.mid_at, ns, kind) for kind in ("decision", "order")}
        return {kind: [(v, net + float(d)) for v, d in zip(LATENCIES_MS, change)] for kind, change in by.items()}

    @cached_property
    def entry_votes(self) -> F:
        """(P, N) each member's P(up) - P(down) at the horizon and decision of each round trip, 0 where it leans less than the ensemble
        counts as a side; NaN where it had no say."""
        p, n = self.done.positions, len(self.done.members)
        out = np.full((len(p["opened"]), n), np.nan)
        if not n or not len(out) or "votes" not in self.done.stored:
            return out
        sent = np.asarray(p["opened"], np.int64).copy()
        first = {int(k): int(t) for k, t, role, e in zip(*(self.done.orders[c][::-1] for c in ("position", "ts", "role", "event")))
                 if role == "entry" and e == "Submitted"}  # fmt: skip
        sent = np.array([first.get(int(k), int(t)) for k, t in zip(p["position"], sent)], np.int64)
        row, _ = self._scan([], p["instrument"], sent, "delivered")
        horizon = {ns: h for h, ns in enumerate(HORIZONS_NS)}
        at = np.array([horizon.get(int(ns), -1) for ns in p["horizon_ns"]])
        for i, votes in self._votes_of(row):
            if at[i] >= 0:
                lead = votes.reshape(n, len(HORIZONS_NS), 3)[:, at[i]]
                out[i] = lead[:, 2] - lead[:, 0]
        out[np.abs(out) <= TILT] = 0.0
        return out

    def _votes_of(self, row: I64) -> Iterator[tuple[int, F]]:
        """Index in `row` and the votes of that row of predictions.parquet."""
        with pq.ParquetFile(self.done.folder / "predictions.parquet") as f:
            first = 0
            for g in range(f.metadata.num_row_groups):
                n = f.metadata.row_group(g).num_rows
                inside = np.flatnonzero((row >= first) & (row < first + n))
                if len(inside):
                    votes = f.read_row_group(g, columns=["votes"])["votes"].combine_chunks()
                    flat = votes.flatten().to_numpy().reshape(n, -1)
                    yield from ((int(i), flat[row[i] - first]) for i in inside)
                first += n
