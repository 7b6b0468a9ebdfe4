"""Panels about money: shortfall, results by group, risk, capacity, latency, the queue. As in charts.py: plain dicts for plotly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from cift_strategies.capacity import Capacity
from cift_strategies.charts import SERIES, Figure, axis, layout, line, marked, packed, upright, when
from cift_strategies.performance import I64, F, thin
from cift_strategies.resampling import Shuffled


def shortfall_figure(paper: float, parts: Mapping[str, float], net: float, currency: str) -> Figure:
    """From the money of a portfolio without costs, by what each part took away, to what was made."""
    labels, values = ["at decision prices", *parts, "net PnL"], [paper, *(-v for v in parts.values()), net]
    trace = {
        "type": "waterfall", "x": [escape(t) for t in labels], "y": packed(values),
        "measure": ["absolute", *["relative"] * len(parts), "total"], "text": [f"{v:+,.2f}" for v in values], "textposition": "outside",
        "cliponaxis": False, "textfont": {"color": "var(--ink)"}, "connector": {"line": {"color": "var(--line2)", "width": 1}},
        "increasing": {"marker": {"color": "var(--up)"}}, "decreasing": {"marker": {"color": "var(--down)"}},
        "totals": {"marker": {"color": "var(--s0)"}}, "hovertemplate": "%{x}: %{y:+,.2f}<extra></extra>",
    }  # fmt: skip
    levels = np.cumsum(values[:-1])
    low, high = min(0.0, float(levels.min()), net), max(0.0, float(levels.max()), net)
    room = 0.14 * max(high - low, 1e-9)
    y = axis(escape(currency), zeroline=True, tickformat=",~r", range=[low - (room if low < 0 else 0), high + room])
    fig = marked([trace], [], 330, hovermode="closest", xaxis=axis(), yaxis=y, showlegend=False)
    fig["layout"]["margin"]["t"] = 10
    return fig


def group_figure(rows: Sequence[Mapping[str, Any]], key: str) -> Figure | None:
    """Mean net money of a round trip of each group with its 95 % interval; how many round trips stand in its label."""
    shown = [r for r in rows if r["round_trips"]]
    if not shown:
        return None
    mean, low, high = (np.array([v for v in a], np.float64) for a in zip(*((r["mean_net"], *r["mean_interval"]) for r in shown)))
    name = [f"{r[key]}{', ' + r['stance'] if 'stance' in r else ''} ({r['round_trips']})".replace("_", " ") for r in shown]
    colour = ["var(--up)" if a > 0 else "var(--down)" if b < 0 else "var(--s4)" for a, b in zip(low, high)]
    error = {"type": "data", "symmetric": False, "array": packed(high - mean), "arrayminus": packed(mean - low)}
    trace = {
        "type": "scatter", "mode": "markers", "x": packed(mean), "y": [escape(n) for n in name], "marker": {"color": colour, "size": 9},
        "error_x": {**error, "color": "var(--muted)", "thickness": 1.5, "width": 4}, "hovertemplate": "%{y}: %{x:+,.3f}<extra></extra>",
    }  # fmt: skip
    zero, _ = upright(0, "", "var(--muted)")
    y = axis(autorange="reversed", type="category")
    fig = layout(64 + 26 * max(2, len(shown)), hovermode="closest", xaxis=axis("mean net per round trip"), yaxis=y, shapes=[zero])
    return {"data": [trace], "layout": {**fig, "margin": {"l": 8, "r": 12, "t": 6, "b": 8}, "showlegend": False}}


def exposure_figure(curve: tuple[I64, F], span: tuple[int, int], currency: str) -> Figure | None:
    """Gross notional held over time."""
    ts, held = curve
    if not len(ts):
        return None
    ts, held = thin(np.r_[span[0], ts, span[1]], np.r_[0.0, held, held[-1]])
    trace = line(when(ts), held, "gross notional", SERIES[0], shape="hv", width=1.2, fill="tozeroy", fillcolor="var(--s0-soft)")
    x = axis("UTC", type="date", range=[span[0] / 1e6, span[1] / 1e6])
    fig = marked([trace], [], 280, xaxis=x, yaxis=axis(f"held ({escape(currency)})", tickformat=",~s"), showlegend=False)
    fig["layout"]["margin"]["t"] = 10
    return fig


def duration_figure(seconds: F, title: str, unit: float = 1.0, suffix: str = "s") -> Figure | None:
    """Histogram of durations (n,) on a log axis, median marked; `unit` seconds are one `suffix`."""
    v = seconds[np.isfinite(seconds) & (seconds > 0)] / unit
    if not len(v):
        return None
    low, high = float(v.min()), float(v.max())
    if high / low < 1.2:
        low, high = low / 1.5, high * 1.5
    edges = np.geomspace(low, high * 1.0001, 31)
    n, _ = np.histogram(v, edges)
    bars = {
        "type": "bar", "x": packed(np.sqrt(edges[1:] * edges[:-1])), "y": packed(n), "width": packed(np.diff(edges)), "showlegend": False,
        "marker": {"color": "var(--s2)", "opacity": 0.8}, "hovertemplate": "%{x:.3~r} " + suffix + ": %{y}<extra></extra>",
    }  # fmt: skip
    mid = float(np.median(v))
    shape, label = upright(mid, f"median {mid:.3g} {suffix}", "var(--accent)", side="right" if mid > np.sqrt(low * high) else "left")
    ticks = [m * 10.0**e for e in range(-6, 8) for m in ((1, 3) if high / low < 1000 else (1,)) if low <= m * 10.0**e <= high] or [mid]
    x = axis(title, type="log", tickvals=ticks, ticktext=[f"{t:g}" for t in ticks])
    mark = [(shape, {**label, "x": float(np.log10(mid))})]
    fig = marked([bars], mark, 280, hovermode="closest", bargap=0, xaxis=x, yaxis=axis("number"))
    fig["layout"]["margin"]["t"] = 10
    return fig


def shuffle_figure(found: Shuffled, currency: str) -> Figure | None:
    """Histogram of the largest drawdowns of the same trades in other orders; the actual one and the 95 % quantile are marked."""
    if not len(found.draws) or not found.draws[-1] > 0:
        return None
    q95 = float(np.quantile(found.draws, 0.95))
    high = max(float(np.quantile(found.draws, 0.999)), found.actual, q95) * 1.02
    n, edges = np.histogram(np.minimum(found.draws, high), 40, (0.0, high))
    bars = {
        "type": "bar", "x": packed((edges[1:] + edges[:-1]) / 2), "y": packed(n / len(found.draws)), "showlegend": False,
        "marker": {"color": "var(--s0)", "opacity": 0.75}, "hovertemplate": "%{x:,.2f}: %{y:.1%}<extra></extra>",
    }  # fmt: skip
    left = found.actual < q95
    marks = [upright(found.actual, f"as it came {found.actual:,.2f}", "var(--accent)", side="right" if found.actual > high / 2 else "left")]
    marks.append(upright(q95, f"95 % {q95:,.2f}", "var(--warn)", side="left" if q95 < high / 2 or (left and q95 < 0.7 * high) else "right"))
    marks[1][1]["y"] = 0.86
    fig = marked(
        [bars], marks, 280, hovermode="closest", bargap=0.04, xaxis=axis(f"largest drawdown ({escape(currency)})", tickformat=",~r"),
        yaxis=axis("share of orders", tickformat=".0~%"),
    )  # fmt: skip
    fig["layout"]["margin"]["t"] = 10
    return fig


def capacity_figure(found: Capacity, currency: str) -> Figure | None:
    """Net PnL against the size traded, as a multiple of what was traded."""
    if not np.isfinite(found.zero) or found.zero <= 0:
        return None
    k = found.multiples
    end = min(float(k[-1]), 1.15 * max(found.zero, 1.2))
    keep = k <= end
    trace = line(packed(k[keep]), found.net[keep], "net PnL", SERIES[0], width=2.2, hovertemplate="%{x:.2f}x: %{y:,.2f}<extra></extra>")
    marks = [upright(found.best, f"most at {found.best:.3g}x", "var(--accent)", side="left")]
    marks[0][1].update(y=0.02, yanchor="bottom")  # the curve is at its top there
    if found.zero <= end:
        marks.append(upright(found.zero, f"nothing at {found.zero:.3g}x", "var(--down)", side="right"))
        marks[-1][1]["y"] = 0.86
    x = axis("size, multiple of what was traded", ticksuffix="x", range=[0, end])
    y = axis(f"net PnL ({escape(currency)})", tickformat=",~r", zeroline=True)
    fig = marked([trace], marks, 280, hovermode="closest", xaxis=x, yaxis=y, showlegend=False)
    fig["layout"]["margin"]["t"] = 10
    return fig


def latency_cost_figure(
    estimated: Mapping[str, Sequence[tuple[float, float]]], rerun: Sequence[Mapping[str, Any]], currency: str
) -> Figure | None:
    """Net PnL against the latency of decisions and of orders: estimated by pricing the fills again (lines), and run again (markers)."""
    ms = sorted({v for points in estimated.values() for v, _ in points} | {float(p["latency_ms"]) for p in rerun})
    if not ms:
        return None
    names = [f"{v:g} ms" for v in ms]
    data: list[Any] = []
    for i, kind in enumerate(("decision", "order")):
        points = sorted(estimated.get(kind, ()))
        if points:
            at = [names[ms.index(v)] for v, _ in points]
            data.append(
                line(
                    at, [p for _, p in points], f"{kind}, estimate", SERIES[i], dash="dash", mode="lines+markers", hovertemplate="%{y:,.2f}"
                )
            )
        again = sorted((float(p["latency_ms"]), float(p["pnl_net"])) for p in rerun if p.get("of", "decision") == kind)
        if again:
            at = [names[ms.index(v)] for v, _ in again]
            marker = {"symbol": "diamond", "size": 10, "color": SERIES[i]}
            data.append(
                line(
                    at,
                    [p for _, p in again],
                    f"{kind}, run again",
                    SERIES[i],
                    mode="lines+markers",
                    marker=marker,
                    hovertemplate="%{y:,.2f}",
                )
            )
    x = axis("latency", type="category", categoryorder="array", categoryarray=names)
    return marked(data, [], 330, xaxis=x, yaxis=axis(f"net PnL ({escape(currency)})", tickformat=",~r", zeroline=True))
