"""Panels about the models: confusion, agreement, drift, importance, weights and regret over time, regimes, lead-lag, Hawkes residuals.

As in charts.py: plain dicts for plotly, colours as the page's variables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from cift_strategies.charts import SERIES, Figure, axis, layout, line, marked, packed, ribbon_of, upright, when
from cift_strategies.forecasts import CLASSES, Agreed, Edge
from cift_strategies.performance import I64, F

HEAT = [[0, "var(--heat0)"], [1, "var(--heat1)"]]


def _top(fig: Figure, t: int = 10) -> Figure:
    fig["layout"]["margin"]["t"] = t
    return fig


def confusion_figure(n: np.ndarray[Any, Any]) -> Figure:
    """What came (rows) against the likeliest forecast (columns), (3, 3) counts: shares of each row."""
    share = n / np.maximum(n.sum(axis=1, keepdims=True), 1)
    note = [[f"{CLASSES[i]} came, {CLASSES[j]} forecast: {n[i, j]:,}" for j in range(3)] for i in range(3)]
    trace = {
        "type": "heatmap", "x": [f"{c} forecast" for c in CLASSES], "y": [f"{c} came" for c in CLASSES], "z": share.tolist(), "zmin": 0,
        "zmax": 1, "colorscale": HEAT, "showscale": False, "xgap": 3, "ygap": 3, "texttemplate": "%{z:.0%}", "text": note,
        "textfont": {"color": "var(--ink)"}, "hovertemplate": "%{text}<extra></extra>",
    }  # fmt: skip
    x, y = axis(side="top", showgrid=False, zeroline=False), axis(autorange="reversed", showgrid=False, zeroline=False)
    return _top(marked([trace], [], 220, hovermode="closest", xaxis=x, yaxis=y), 6)


def agreement_figure(found: Mapping[str, Sequence[Agreed]]) -> Figure | None:
    """Mean move in the members' direction against how many more lean that way than the other, with 95 % intervals; a line a horizon."""
    data: list[Any] = []
    for i, (h, rows) in enumerate(found.items()):
        mean, low, high = (np.array([getattr(r, k) for r in rows], np.float64) for k in ("mean", "low", "high"))
        error = {
            "type": "data",
            "symmetric": False,
            "array": packed(high - mean),
            "arrayminus": packed(mean - low),
            "width": 4,
            "thickness": 1.3,
        }
        note = [f"{h}: {r.number:,} decisions, right {r.right:.1%}" for r in rows]
        at = [r.members + 0.05 * (i - len(found) / 2) for r in rows]
        trace = line(
            packed(at), mean, h, SERIES[i % 5], mode="lines+markers", text=note, hovertemplate="%{y:.3f} ticks, %{text}<extra></extra>"
        )
        data.append({**trace, "error_y": {**error, "color": SERIES[i % 5]}})
    if not data:
        return None
    most = max(r.members for rows in found.values() for r in rows)
    x = axis("members on one side, net", tickvals=list(range(1, most + 1)), range=[0.6, most + 0.4])
    return marked(data, [], 300, hovermode="closest", xaxis=x, yaxis=axis("move in their direction (ticks)", zeroline=True))


def drift_figure(names: Sequence[str], ids: Sequence[str], found: F) -> Figure:
    """Population stability index (F, I) of features by instrument, log scale; the customary limits of 0.1 and 0.25 marked."""
    least = 1e-3
    data = [
        {
            "type": "scatter", "mode": "markers", "x": packed(np.maximum(found[:, k], least)), "y": [escape(n) for n in names],
            "name": escape(i), "marker": {"color": SERIES[k % 5], "size": 9, "symbol": k % 5}, "hovertemplate": "%{y}: %{x:.3f}",
        } for k, i in enumerate(ids)
    ]  # fmt: skip
    marks = []
    for v, text, side in ((0.1, "0.1", "right"), (0.25, "0.25", "left")):
        shape, label = upright(v, text, "var(--warn)", side=side)
        marks.append((shape, {**label, "x": float(np.log10(v)), "y": 1.0, "yanchor": "bottom", "xshift": 0}))
    high = float(np.nanmax(found))
    ticks = [t for t in (0.001, 0.01, 0.1, 1.0, 10.0) if t <= max(1.0, high * 1.5)]
    x = axis("population stability index", type="log", tickvals=ticks, ticktext=[f"{t:g}" for t in ticks],
             range=[-3.1, float(np.log10(max(1.0, high))) + 0.1])  # fmt: skip
    fig = marked(data, marks, 110 + 24 * len(names), hovermode="closest", xaxis=x, yaxis=axis(autorange="reversed", type="category"))
    fig["layout"]["legend"] |= {"y": 1.06}
    return _top(fig, 50)


def importance_figure(columns: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Share of mean |SHAP| of the leading columns over slices of the training range: rows columns, cells slices."""
    if not columns:
        return None
    z = np.array([c["shap"] for c in columns], np.float64)
    slices = [f"slice {k + 1}" for k in range(z.shape[1])]
    trace = {
        "type": "heatmap", "x": slices, "y": [escape(str(c["column"]).replace("_", " ")) for c in columns], "z": z.tolist(), "zmin": 0,
        "colorscale": HEAT, "showscale": False, "xgap": 2, "ygap": 2, "texttemplate": "%{z:.1%}", "textfont": {"color": "var(--ink)"},
        "hovertemplate": "%{y}, %{x}: %{z:.2%}<extra></extra>",
    }  # fmt: skip
    x, y = axis(side="top", showgrid=False, zeroline=False), axis(autorange="reversed", showgrid=False, zeroline=False)
    return _top(marked([trace], [], 40 + 24 * len(z), hovermode="closest", xaxis=x, yaxis=y), 6)


def over_time_figure(ts: I64, curves: Mapping[str, F], title: str, bounds: Mapping[str, F] | None = None, **more: Any) -> Figure | None:
    """One line a name over time, and its bound dotted in the same colour."""
    if not len(ts) or not curves:
        return None
    data: list[Any] = []
    for i, (name, values) in enumerate(curves.items()):
        data.append(
            line(when(ts), values, name, SERIES[i % 5], mode="lines+markers" if len(ts) < 40 else "lines", hovertemplate="%{y:,.3f}")
        )
        if bounds and name in bounds:
            data.append(line(when(ts), bounds[name], f"{name}, bound", SERIES[i % 5], dash="dot", width=1.2, hovertemplate="%{y:,.3f}"))
    return _top(
        marked(data, [], 300, xaxis=axis("UTC", type="date"), yaxis=axis(title, zeroline=True, **more)), 50 if len(data) > 4 else 30
    )


def regimes_figure(ribbons: Mapping[str, tuple[I64, F]], names: Sequence[str], span: tuple[int, int]) -> Figure | None:
    """The regimes of all instruments over time, a row each."""
    shown = {i: r for i, r in ribbons.items() if len(r[0])}
    if not shown:
        return None
    rows = [ribbon_of(ts, regime, names, span) for ts, regime in shown.values()]
    one = {**rows[0], "y": [escape(i) for i in shown], "z": [r["z"][0] for r in rows], "text": [r["text"][0] for r in rows], "ygap": 4}
    one.pop("yaxis")
    x = axis("UTC", type="date", range=[span[0] / 1e6, span[1] / 1e6])
    y = axis(autorange="reversed", showgrid=False, type="category")
    return _top(marked([one], [], 60 + 34 * len(shown), hovermode="closest", xaxis=x, yaxis=y), 6)


def lead_figure(edges: Sequence[Edge], least: float = 3.0) -> Figure | None:
    """Instruments on a circle; an arrow from whom moves first to whom follows, with the lag, where |z| is `least` or more."""
    names = list(dict.fromkeys([n for e in edges for n in (e.leader, e.follower)]))
    if not names:
        return None
    angle = np.pi / 2 + 2 * np.pi * np.arange(len(names)) / len(names)
    place = dict(zip(names, zip(np.cos(angle), np.sin(angle))))
    arrows: list[Any] = []
    for e in edges:
        if not abs(e.z) >= least:
            continue
        (x0, y0), (x1, y1) = place[e.leader], place[e.follower]
        gap = 0.2 / max(float(np.hypot(x1 - x0, y1 - y0)), 1e-9)
        sx, sy, tx, ty = x0 + gap * (x1 - x0), y0 + gap * (y1 - y0), x1 - gap * (x1 - x0), y1 - gap * (y1 - y0)
        colour = "var(--s0)" if e.correlation > 0 else "var(--s1)"
        arrows.append({
            "x": tx, "y": ty, "ax": sx, "ay": sy, "xref": "x", "yref": "y", "axref": "x", "ayref": "y", "text": "", "showarrow": True,
            "arrowhead": 2, "arrowsize": 1.2, "arrowwidth": 1 + 4 * min(1.0, abs(e.correlation)), "arrowcolor": colour,
        })  # fmt: skip
        arrows.append({
            "x": sx + 0.42 * (tx - sx), "y": sy + 0.42 * (ty - sy), "text": f"{e.lag_ms:.3g} ms", "showarrow": False,
            "bgcolor": "var(--card)", "font": {"color": "var(--ink)", "size": 12}, "borderpad": 2,
        })  # fmt: skip
    points = {
        "type": "scatter", "mode": "markers+text", "x": packed([place[n][0] for n in names]), "y": packed([place[n][1] for n in names]),
        "text": [escape(n) for n in names], "textposition": ["top center" if place[n][1] > -0.2 else "bottom center" for n in names],
        "textfont": {"color": "var(--ink)", "size": 13}, "marker": {"size": 15, "color": "var(--accent)"}, "hoverinfo": "skip",
    }  # fmt: skip
    quiet = {"visible": False, "fixedrange": True}
    fig = layout(
        330, hovermode="closest", xaxis={**quiet, "range": [-1.7, 1.7]}, yaxis={**quiet, "range": [-1.3, 1.35]}, annotations=arrows
    )
    return _top({"data": [points], "layout": {**fig, "showlegend": False}}, 6)


def residual_figure(types: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    """Quantiles of the rescaled waiting times against those of Exp(1), a line a type: on the diagonal the process fits."""
    data: list[Any] = []
    end = 0.0
    for i, (name, g) in enumerate(types.items()):
        qq = np.asarray(g["qq"], np.float64)
        end = max(end, float(qq.max()))
        label = f"{name.replace('_', ' ')} (KS {g['ks']:.3f})"
        data.append(
            line(
                packed(qq[:, 0]),
                qq[:, 1],
                label,
                SERIES[i % 5],
                dash="solid" if i < 5 else "dot",
                mode="lines+markers",
                hovertemplate="%{y:.2f}",
            )
        )
    if not data:
        return None
    data.insert(0, line(packed([0, end]), [0, end], "Exp(1)", "var(--line2)", dash="dash", width=1.2, showlegend=False, hoverinfo="skip"))
    return _top(marked(data, [], 360, hovermode="closest", xaxis=axis("quantile of Exp(1)"), yaxis=axis("of the residuals")), 70)
