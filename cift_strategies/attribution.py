"""Where the money came from, and how much was at risk for it: results by group, exposure, turnover, holding times, buy-and-hold.

Takes a :class:`Finished`, gives plain rows and curves. Money is in the currency of the panels; positions in other currencies are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from cift_models.windows import HORIZONS_NS
from cift_strategies.finished import HORIZONS, Curve, Finished
from cift_strategies.performance import F, MidPath, block_mean, drawdown

HOUR_NS = 3_600 * 10**9
Row = dict[str, Any]


def wilson(hits: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Interval of a share of `hits` in `n` (Wilson 1927); (0, 1) for none."""
    if not n:
        return 0.0, 1.0
    p, d = hits / n, 1 + z * z / n
    mid, half = (p + z * z / (2 * n)) / d, z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    return float(max(0.0, mid - half)), float(min(1.0, mid + half))


def line(done: Finished, own: Any) -> Row:
    """Round trips of the mask `own` in figures: number, hit rate, gross, fees, net, mean net with its interval, ticks a unit."""
    p = done.positions
    net = np.asarray(p["net"], np.float64)[own]
    mean, low, high = (float(v[0]) for v in block_mean(net[:, None], np.asarray(p["closed"], np.int64)[own]))
    hits = int((net > 0).sum())
    return {
        "round_trips": len(net), "hit_rate": hits / len(net) if len(net) else None, "hit_interval": list(wilson(hits, len(net))),
        "gross": float(np.asarray(p["gross"], np.float64)[own].sum()), "fees": float(np.asarray(p["fees"], np.float64)[own].sum()),
        "net": float(net.sum()), "mean_net": mean, "mean_interval": [low, high],
    }  # fmt: skip


def groups(done: Finished) -> dict[str, list[Row]]:
    """Round trips by instrument, side, regime at entry, horizon, hour of the day (UTC), how they were closed, and how members stood."""
    p, names = done.positions, list(done.facts["regime_names"])
    money = np.array([done.facts["instruments"].get(i, {}).get("currency") == done.currency for i in p["instrument"]], bool)
    labels = dict(zip(HORIZONS_NS, HORIZONS))
    hours = np.asarray(p["opened"], np.int64) // HOUR_NS % 24
    keys: Mapping[str, tuple[Any, Callable[[Any], str]]] = {
        "instrument": (p["instrument"], str),
        "side": (np.asarray(p["side"], np.int64), lambda v: "long" if v > 0 else "short"),
        "regime": (np.asarray(p["regime"], np.int64), lambda v: names[v] if 0 <= v < len(names) else "unknown"),
        "horizon": (np.asarray(p["horizon_ns"], np.int64), lambda v: labels.get(int(v), f"{int(v) / 1e9:g} s")),
        "hour": (hours, lambda v: f"{int(v):02d}:00"),
        "closed by": (p["closed_by"], str),
    }
    out: dict[str, list[Row]] = {}
    for name, (values, say) in keys.items():
        kinds = (
            sorted(set(values[money].tolist())) if name not in ("instrument", "closed by") else list(dict.fromkeys(values[money].tolist()))
        )
        out[name] = [{name: say(v), **line(done, money & (values == v))} for v in kinds]
    out["member"] = by_member(done, money)
    return out


def by_member(done: Finished, money: Any) -> list[Row]:
    """How round trips went that each member was for, against, or had no say in, at the decision's horizon."""
    votes, p = done.execution.entry_votes, done.positions
    rows = []
    for a, name in enumerate(done.members):
        lead = votes[:, a] * np.asarray(p["side"], np.float64)
        for stance, own in (("for", lead > 0), ("against", lead < 0), ("even", lead == 0)):
            if (own & money).any():
                rows.append({"member": name, "stance": stance, **line(done, own & money)})
    return rows


class Exposure(NamedTuple):
    """Money at risk. Notionals in currency; shares in [0, 1]; `curve`: gross notional (held at entry prices) over time."""

    curve: Curve
    in_market: float  # share of the time with any position
    mean: float
    peak: float
    long: float  # share of the notional-time that was long
    traded: float  # notional bought and sold
    turnover: float  # of the capital, an hour; NaN where the capital is not told
    holding_s: F  # quantiles 0.05, 0.25, 0.5, 0.75, 0.95 of the holding times; NaN without round trips


def exposure(done: Finished) -> Exposure:
    """Of the round trips in the currency of the panels, over the time traded, nights left out."""
    p, (_, end) = done.positions, done.traded_span
    own = np.array([done.facts["instruments"].get(i, {}).get("currency") == done.currency for i in p["instrument"]], bool)
    opened, closed = (np.asarray(p[k], np.int64)[own] for k in ("opened", "closed"))
    size, entry, exit_ = (np.asarray(p[k], np.float64)[own] for k in ("size", "entry", "exit"))
    per = np.array([done.multiplier(i) for i in p["instrument"]], np.float64)[own]
    held = size * entry * per
    ts = np.concatenate([opened, closed])
    order = np.argsort(ts, kind="stable")
    level = np.cumsum(np.concatenate([held, -held])[order])
    level[np.abs(level) < 1e-6 * (held.max() if len(held) else 1.0)] = 0.0
    ts = ts[order]
    wide = np.diff(done.traded_ns(np.append(ts, max(end, ts[-1])))) if len(ts) else np.zeros(0)
    span = max(float(done.traded_ns(np.array([end]))[0]), 1.0)
    traded = float((size * (entry + exit_) * per).sum())
    capital = ((done.facts["config"] or {}).get("limits") or {}).get("capital")
    times = (closed - opened) / 1e9
    sides = np.asarray(p["side"], np.float64)[own]
    weight = held * times
    return Exposure(
        (ts, level), float(wide[level > 0].sum() / span), float((level * wide).sum() / span), float(level.max(initial=0.0)),
        float(weight[sides > 0].sum() / weight.sum()) if weight.sum() > 0 else float("nan"), traded,
        traded / float(capital) / (span / HOUR_NS) if capital else float("nan"),
        np.quantile(times, [0.05, 0.25, 0.5, 0.75, 0.95]) if len(times) else np.full(5, np.nan),
    )  # fmt: skip


def buy_and_hold(done: Finished) -> tuple[Curve, Row]:
    """Each instrument bought when trading begins and sold at the end, in the mean size of the run's round trips (one lot of 1.0 where
    there were none); it pays, in and out, what the run's fills paid in the mean against the mid, and its fees. Money over time and in
    figures."""
    start, end = done.traded_span
    paths, total, fees = [], 0.0, 0.0
    for name, facts in done.facts["instruments"].items():
        ts, mid = done.curve("mid", name)
        own = (ts >= start) & (ts <= end)
        if facts["currency"] != done.currency or not own.any():
            continue
        f, p = done.fills.of(name), done.positions
        sizes = np.asarray(p["size"], np.float64)[p["instrument"] == name]
        size = float(sizes.mean()) if len(sizes) else 1.0
        per, units = done.multiplier(name), float(f.size.sum())
        fee = float(f.fee.sum()) / units if units else 0.0
        spread = float(np.nansum(f.from_mid * f.per_tick)) / units if units else 0.0
        path = size * per * (mid[own] - mid[own][0]) - size * (fee + spread)
        paths.append(MidPath(ts[own], path))
        total, fees = total + float(path[-1]) - size * (fee + spread), fees + 2 * size * fee
    if not paths:
        return (np.zeros(0, np.int64), np.zeros(0)), {}
    ts = np.unique(np.concatenate([p.ts for p in paths]))
    ts = ts[:: max(1, len(ts) // 4000)]
    pnl = np.zeros(len(ts))
    for held in paths:
        i = np.searchsorted(held.ts, ts, side="right") - 1
        pnl += np.where(i >= 0, held.mid[np.maximum(i, 0)], 0.0)
    ts, pnl = np.append(ts, end), np.append(pnl, total)
    figures = {
        "pnl_net": total,
        "max_drawdown": float(-drawdown(pnl).min()),
        "fees": fees,
        "orders": 2 * len(paths),
        "fills": 2 * len(paths),
    }
    return (ts, pnl), figures
