"""A finished run as it lies in its output folder: what the report stores there and reads back.

:func:`store` adds `charts.parquet` (curves, sampled latencies and, as JSON in the schema, the facts that no other file holds) to the
`summary.json`, `fills.parquet`, `positions.parquet` and `predictions.parquet` of a run, and `orders.parquet`, the order events.
:class:`Finished` gives the columns of all and the statistics made from them; memory stays bounded however long the run was.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from catalog.errors import InputError
from catalog.events import PAUSE_NS, SCALE
from cift_models.windows import HORIZONS_NS
from cift_strategies.execution import Execution
from cift_strategies.performance import (
    I64,
    Costs,
    F,
    Fills,
    MidPath,
    Reliability,
    Sharpe,
    block_mean,
    changes,
    costs,
    deflated_sharpe,
    markouts,
    reliability,
)
from cift_strategies.results import ORDERS, columns_of, plain

if TYPE_CHECKING:
    from cift_strategies.outcome import RunResult

Columns = dict[str, Any]  # name -> numpy array
Curve = tuple[I64, F]
Interval = tuple[F, F, F]  # mean, low, high

CHARTS: Final = "charts.parquet"
ORDER_LOG: Final = "orders.parquet"
RERUNS: Final = "latency.json"
HORIZONS: Final = ("500ms", "1s", "5s", "30s")  # of HORIZONS_NS, as columns and scores name them
MOST_DECISIONS: Final = 400_000  # rows of predictions.parquet that are read; of more, STRETCHES evenly spaced parts
STRETCHES: Final = 20
MOST_MARKED: Final = 20_000  # decisions of one kind whose mark-outs are followed
DELAYS_NS: Final = np.array([1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 30_000, 60_000]) * 1_000_000


def store(run: RunResult, out: Path) -> None:
    """Write `charts.parquet` into the output folder `out` of `run`."""
    curves: list[tuple[str, str, Curve]] = [("equity", "ensemble", (run.traded.equity_ts, run.traded.equity))]
    if run.rule is not None:
        curves.append(("equity", "rule", (run.rule.equity_ts, run.rule.equity)))
    curves += [("mid", name, curve) for name, curve in run.mids.items()]
    curves += [("regime", name, (ts, regime.astype(np.float64))) for name, (ts, regime) in run.regimes.items()]
    latency = np.asarray(run.decision_latency_ms, np.float64)
    curves.append(("latency", "", (np.zeros(len(latency), np.int64), latency)))
    facts: dict[str, Any] = {
        "instruments": {i.id: {"tick": i.tick / SCALE, "decimals": i.price_precision, "currency": i.currency, "multiplier": i.multiplier}
                        for i in run.instruments},
        "span": [int(run.start_ns), int(run.end_ns)],
        "split": int(run.split_ns),
        "regime_names": list(run.regime_names),
        "config": dict(run.config),
        "latency_curve": list(run.latency_curve),
        "nautilus": _nautilus(run.result),
    }
    if run.rule is not None:
        pnl = run.rule.summary["pnl_net"]
        if not isinstance(pnl, Mapping):
            ticks = {i.id: i.tick / SCALE for i in run.instruments}
            facts["rule_costs"] = costs(_fills(columns_of(run.rule.fills), ticks), float(pnl))._asdict()
    table = pa.concat_tables([_part(chart, key, *curve) for chart, key, curve in curves])
    table = table.replace_schema_metadata({b"cift": json.dumps(plain(facts)).encode()})
    pq.write_table(table, out / CHARTS)
    if run.traded.orders is not None:
        pq.write_table(run.traded.orders, out / ORDER_LOG, compression="zstd")


def _part(chart: str, key: str, ts: I64, value: F) -> pa.Table:
    columns = {"chart": pa.repeat(chart, len(ts)), "key": pa.repeat(key, len(ts))}
    return pa.table({**columns, "ts": pa.array(np.asarray(ts, np.int64)), "value": pa.array(np.asarray(value, np.float64))})


def _nautilus(result: Any) -> dict[str, Any]:
    """What Nautilus's tearsheet wants of a BacktestResult, as plain values."""
    if result is None:
        return {}

    def told(*names: str) -> dict[str, Any]:
        return {name: getattr(result, name) for name in names}

    account = {k: v for k, v in sorted(result.summary.items()) if ".balance." in k and k.endswith(".total")}
    counts = told("iterations", "total_events", "total_orders", "total_positions")
    stats = told("stats_pnls", "stats_returns", "stats_general")
    return {**stats, "counts": counts, "times": told("backtest_start", "backtest_end"), "account": account}


def instant(ns: int) -> str:
    """A time to the second, UTC."""
    return str(np.datetime64(int(ns), "ns").astype("datetime64[s]")).replace("T", " ")


def _fills(c: Columns, ticks: Mapping[str, float]) -> Fills:
    order = np.argsort(c["ts"], kind="stable")
    tick = np.array([ticks.get(i, np.nan) for i in c["instrument"]], np.float64)
    number = {k: np.asarray(c[k], np.float64)[order] for k in ("price", "size", "fee", "mid", "decided_mid", "tick_value")}
    return Fills(
        ts=np.asarray(c["ts"], np.int64)[order],
        instrument=np.asarray(c["instrument"], object)[order],
        role=np.asarray(c["role"], object)[order],
        side=np.asarray(c["side"], np.int8)[order],
        price=number["price"],
        size=number["size"],
        fee=number["fee"],
        mid=number["mid"],
        decided=number["decided_mid"],
        tick=tick[order],
        tick_value=number["tick_value"],
    )


@dataclass(frozen=True)
class Finished:
    """An output folder read back. `summary` is `summary.json`, `facts` the JSON of `charts.parquet`; curves by (chart, key)."""

    folder: Path
    summary: Mapping[str, Any]
    facts: Mapping[str, Any]
    curves: Mapping[tuple[str, str], Curve]
    fills: Fills
    positions: Columns
    orders: Columns  # as results.ORDERS; no rows where they were not kept
    more: Columns  # of the fills, in their order: order (running number), maker

    @classmethod
    def read(cls, folder: Path) -> Finished:
        """Raises InputError that names the file that is missing or unreadable."""
        need = ("summary.json", "fills.parquet", "positions.parquet", "predictions.parquet", CHARTS)
        missing = [name for name in need if not (folder / name).is_file()]
        if missing:
            lacks = ", ".join(missing)
            raise InputError(f"{folder} is no output folder of a finished run, it lacks {lacks}: give the --out of run_backtest.py")
        try:
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            stored = pq.read_table(folder / CHARTS)
            facts = json.loads(stored.schema.metadata[b"cift"])
            fills, positions = (columns_of(pq.read_table(folder / name)) for name in need[1:3])
        except (ValueError, KeyError, TypeError, pa.ArrowException) as e:
            raise InputError(f"{folder}: a file of the finished run cannot be read ({e}); run the backtest again") from e
        c = columns_of(stored)
        new = (c["chart"][1:] != c["chart"][:-1]) | (c["key"][1:] != c["key"][:-1])
        cut = np.r_[0, np.flatnonzero(new) + 1, stored.num_rows]
        curves = {(c["chart"][a], c["key"][a]): (c["ts"][a:b], c["value"][a:b]) for a, b in pairwise(cut) if b > a}
        ticks = {name: i["tick"] for name, i in facts["instruments"].items()}
        order = np.argsort(fills["ts"], kind="stable")
        more = {"order": np.asarray(fills["order"], np.int64)[order], "maker": (fills["liquidity"] == "maker")[order]}
        log = columns_of(pq.read_table(folder / ORDER_LOG)) if (folder / ORDER_LOG).is_file() else {n: np.zeros(0) for n in ORDERS.names}
        return cls(folder, summary, facts, curves, _fills(fills, ticks), positions, log, more)

    def curve(self, chart: str, key: str = "") -> Curve:
        return self.curves.get((chart, key), (np.zeros(0, np.int64), np.zeros(0)))

    def equity(self, strategy: str) -> Curve:
        """Net PnL of "ensemble" or "rule" from the start of trading, at zero, to its end; empty where there was no such run."""
        if strategy == "rule" and not self.rule:
            return self.curve("equity", "rule")
        (ts, pnl), (start, end) = self.curve("equity", strategy), self.traded_span
        last = pnl[-1] if len(pnl) else 0.0
        before, after = [start] if not len(ts) or start < ts[0] else [], [end] if not len(ts) or end > ts[-1] else []
        when = np.concatenate([np.array(before, np.int64), ts, np.array(after, np.int64)])
        return when, np.concatenate([np.zeros(len(before)), pnl, np.full(len(after), last)])

    @cached_property
    def currency(self) -> str:
        """The currency of curves and panels; where a run has several, its first."""
        told = self.summary.get("currency") or [i["currency"] for i in self.facts["instruments"].values()]
        return str(told if isinstance(told, str) else told[0])

    def money(self, value: Any) -> float:
        """A figure of a summary in the currency of the panels: where a run has several it is told by currency. NaN where it is not told."""
        told = value.get(self.currency) if isinstance(value, Mapping) else value
        return float("nan") if told is None else float(told)

    @cached_property
    def costs(self) -> Costs:
        """Of the fills in the currency of the panels."""
        own = {name for name, i in self.facts["instruments"].items() if i["currency"] == self.currency}
        fills = self.fills.where(np.isin(self.fills.instrument, list(own)))
        return costs(fills, float(np.nan_to_num(self.money(self.summary.get("pnl_net")))))

    @property
    def rolls(self) -> Sequence[Mapping[str, Any]]:
        """From which contract to which of an underlying, and when (`ts`, ns); empty where none lies in the run."""
        told: Sequence[Mapping[str, Any]] = self.summary.get("rolls") or ()
        return told

    @property
    def rule(self) -> Mapping[str, Any]:
        """The summary of the plain rule's run; empty where there was none."""
        told: Mapping[str, Any] = self.summary.get("baseline_rule") or {}
        return told

    @cached_property
    def rule_costs(self) -> Costs | None:
        split = self.facts.get("rule_costs")
        return Costs(**split) if split else None

    @cached_property
    def traded_span(self) -> tuple[int, int]:
        """From the first price after the split to the end, ns: nothing is traded in the night between two sessions."""
        start, end = self.facts["span"]
        split = max(int(start), int(self.facts["split"]))
        priced = [ts[ts >= split] for (chart, _), (ts, _) in self.curves.items() if chart == "mid"]
        return min((int(ts[0]) for ts in priced if len(ts)), default=split), int(end)

    def traded_ns(self, ts: I64) -> F:
        """How long the market had traded at `ts` (n,) since :attr:`traded_span` began, ns: without pauses, nights say. That is where the
        mids that are kept, some thousands, lie further apart than PAUSE_NS and three times as far as usual."""
        start, end = self.traded_span
        priced = [at[(at > start) & (at < end)] for (chart, _), (at, _) in self.curves.items() if chart == "mid"]
        at = np.unique(np.concatenate([[start, max(start, end)], *priced])).astype(np.int64)
        step = np.diff(at)
        pause = step > max(PAUSE_NS, 3 * float(np.median(step))) if len(step) else step > 0
        return np.asarray(np.interp(ts - start, at - start, np.r_[0, np.cumsum(np.where(pause, 0, step))]))

    @cached_property
    def steps(self) -> tuple[str, F]:
        """Name of the clock's step and the equity's change per step."""
        return changes(*self.equity("ensemble"), *self.traded_span)

    @cached_property
    def sharpe(self) -> tuple[str, Sharpe]:
        """Name of the clock's step and the deflated Sharpe ratio of the equity's change per step. What a sweep knows of the trials
        stands in the summary (see `backtest.run`)."""
        name, moves = self.steps
        s = self.summary
        return name, deflated_sharpe(moves, int(s.get("trials") or 1), s.get("trial_ratios") or ())

    @cached_property
    def regime_seconds(self) -> F:
        """Seconds of trading spent in each regime, all instruments together; the last entry is the unknown regime. (R + 1,)"""
        start, end = self.traded_span
        r = len(self.facts["regime_names"])
        seconds = np.zeros(r + 1)
        for (chart, _), (ts, regime) in self.curves.items():
            if chart == "regime":
                bounds = np.clip(np.r_[ts, end], start, max(start, end))
                np.add.at(seconds, np.clip(regime.astype(np.int64), -1, r - 1), np.diff(self.traded_ns(bounds)) / 1e9)
        return seconds

    @cached_property
    def per_position(self) -> tuple[float, float, float]:
        """Mean net PnL of a round trip and its 95 % interval."""
        net = np.asarray(self.positions["net"], np.float64)
        mean, low, high = block_mean(net[:, None], np.asarray(self.positions["closed"], np.int64))
        return float(mean[0]), float(low[0]), float(high[0])

    @cached_property
    def slippage(self) -> list[tuple[str, int, float, float]]:
        """Role, fills, mean ticks against the mid (see Fills.slippage), and money, for each role and for all."""
        paid, money = self.fills.slippage, self.fills.slippage * self.fills.per_tick
        roles: list[Any] = [*dict.fromkeys(self.fills.role.tolist()), None]
        keep = [(r, np.isfinite(paid) & ((self.fills.role == r) if r is not None else True)) for r in roles]
        return [(r or "all", int(k.sum()), float(paid[k].mean()), float(money[k].sum())) for r, k in keep if k.any()]

    def multiplier(self, instrument: str) -> float:
        """Currency per price unit and 1.0 of size."""
        told = self.facts["instruments"].get(instrument, {}).get("multiplier")
        return 1.0 if told is None else float(told)

    @cached_property
    def members(self) -> list[str]:
        """In the order of the votes, those included that were not there."""
        return [str(m) for m in (self.summary.get("regret") or {}).get("members", ())]

    @cached_property
    def execution(self) -> Execution:
        """How decisions became fills."""
        return Execution(self)

    @cached_property
    def reruns(self) -> list[dict[str, Any]]:
        """Whole backtests at other latencies, where they were asked for; see latency.py."""
        place = self.folder / RERUNS
        return list(json.loads(place.read_text(encoding="utf-8"))) if place.is_file() else []

    @cached_property
    def stored(self) -> set[str]:
        """Names of the columns of predictions.parquet."""
        return set(pq.read_schema(self.folder / "predictions.parquet").names)

    def parts(self, f: pq.ParquetFile) -> list[list[int]]:
        """Row groups of predictions.parquet that are read together: all of them, or STRETCHES evenly spaced parts, MOST_DECISIONS rows."""
        rows = np.array([f.metadata.row_group(i).num_rows for i in range(f.metadata.num_row_groups)], np.int64)
        if rows.sum() <= MOST_DECISIONS:
            return [list(range(len(rows)))] if rows.sum() else []
        starts = np.unique(np.linspace(0, len(rows), STRETCHES, endpoint=False).astype(int))
        each, ends = MOST_DECISIONS // STRETCHES, np.append(starts[1:], len(rows))
        return [list(range(a, min(b, a + max(1, int(np.searchsorted(rows[a:b].cumsum(), each)))))) for a, b in zip(starts, ends)]

    def _stretches(self, columns: Sequence[str]) -> Iterator[Columns]:
        """Consecutive rows of predictions.parquet, see :meth:`parts`."""
        with pq.ParquetFile(self.folder / "predictions.parquet") as f:
            for part in self.parts(f):
                yield columns_of(f.read_row_groups(part, columns=list(columns)).slice(0, MOST_DECISIONS))

    @cached_property
    def unsure(self) -> list[str]:
        """Cases of instrument and horizon whose scores rest on too few labels, with how many there are."""
        table = (self.summary.get("scores") or {}).get("table") or ()
        return [f"{r['instrument']} {r['horizon']} ({r['effective']})" for r in table if r["verdict"] != "sufficient"]

    @cached_property
    def left_out(self) -> list[str]:
        """What training left out, and members that failed; each in words."""
        scores = self.summary.get("scores") or {}
        told = [str(t) for t in self.summary.get("left_out") or ()]
        return told + [f"member {name}: failed {n:,} times and abstained" for name, n in (scores.get("failures") or {}).items() if n]

    @cached_property
    def reliability(self) -> dict[str, Reliability]:
        """Per horizon: forecasts of up and of down against what came, instruments and both sides pooled.

        A move is up or down beyond the thresholds of `summary["thresholds"][instrument][horizon]`, in ticks, as labels.classify has it.
        """
        thresholds = self.summary.get("thresholds") or {}
        out: dict[str, Reliability] = {}
        for h in HORIZONS:
            proba, happened = [np.zeros(0)], [np.zeros(0, bool)]
            columns = ["instrument", f"p_down_{h}", f"p_up_{h}", f"move_{h}"]
            for c in self._stretches(columns) if thresholds and columns[-1] in self.stored else ():
                move = np.asarray(c[f"move_{h}"], np.float64)
                edge = np.full(len(move), np.nan)
                for name, by in thresholds.items():
                    edge[c["instrument"] == name] = by.get(h, np.nan)
                known = np.isfinite(move) & np.isfinite(edge)
                for side, came in (("up", move > edge), ("down", move < -edge)):
                    proba.append(np.asarray(c[f"p_{side}_{h}"], np.float64)[known])
                    happened.append(came[known])
            out[h] = reliability(np.concatenate(proba), np.concatenate(happened))
        return {h: r for h, r in out.items() if len(r.number)}

    @cached_property
    def marked(self) -> tuple[dict[str, Interval], dict[str, Interval]]:
        """Mark-outs at DELAYS_NS by kind of decision, and per horizon the part of the move that is left after each delay.

        Kinds: the directional decisions of each horizon, and entries (from the decision's fill on). Ticks, with 95 % intervals.
        """
        if "mid" not in self.stored:
            return {}, {}
        seen: dict[str, list[tuple[I64, F]]] = {}
        left: dict[str, list[tuple[I64, F]]] = {}
        rows = min(MOST_DECISIONS, pq.read_metadata(self.folder / "predictions.parquet").num_rows)
        for c in self._stretches(["ts", "instrument", "mid", *(f"direction_{h}" for h in HORIZONS)]):
            for name in dict.fromkeys(c["instrument"].tolist()):
                own = c["instrument"] == name
                ts, tick = np.asarray(c["ts"][own], np.int64), self.facts["instruments"][name]["tick"]
                path = MidPath(ts, np.asarray(c["mid"][own], np.float64))
                for h, ns in zip(HORIZONS, HORIZONS_NS):
                    d = np.nan_to_num(np.asarray(c[f"direction_{h}"][own], np.float64)).astype(np.int8)
                    at = np.flatnonzero(d)
                    at = at[:: max(1, len(at) * rows // (MOST_MARKED * len(ts)))]
                    if len(at):
                        moves = markouts(path, ts[at], d[at], np.r_[DELAYS_NS, ns], tick)
                        seen.setdefault(h, []).append((ts[at], moves[:, :-1]))
                        rest = np.where(ns > DELAYS_NS, moves[:, -1:] - moves[:, :-1], np.nan)
                        left.setdefault(h, []).append((ts[at], rest))
                f = self.fills.of(name)
                at = np.flatnonzero((f.role == "entry") & (f.ts >= ts[0]) & (f.ts <= ts[-1]))
                if len(at):
                    seen.setdefault("entries", []).append((f.ts[at], markouts(path, f.ts[at], f.side[at], DELAYS_NS, tick)))
        return _intervals(seen), _intervals(left)


def _intervals(found: Mapping[str, Iterable[tuple[I64, F]]]) -> dict[str, Interval]:
    out = {}
    for name, parts in found.items():
        ts, moves = zip(*parts)
        out[name] = block_mean(np.concatenate(moves), np.concatenate(ts))
    return out
