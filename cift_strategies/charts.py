"""The panels of the report as plotly figures: plain dicts, ready for JSON, drawn by the page's own plotly.js.

Takes the columns and statistics of a run, gives one dict (`data`, `layout`) a panel. Colours are the names of the page's CSS variables,
``var(--up)``, which the page resolves when it draws, so one figure serves light and dark. Arrays travel as base64 (plotly's typed arrays).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike

from cift_strategies.performance import I64, Costs, F, Fills, Reliability, drawdown, thin

Figure = dict[str, Any]
FONT: Final = "Inter, system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
MOST_MARKERS: Final = 3000  # of one kind; beyond, every k-th is drawn and the panel says so
LEAST_FORECASTS: Final = 20  # in a bin of the reliability diagram
RIBBON: Final = 600  # cells of the regime ribbon
SERIES: Final = ("var(--s0)", "var(--s1)", "var(--s2)", "var(--s3)", "var(--s4)")


def packed(values: ArrayLike) -> dict[str, str]:
    """A numeric array as plotly reads it from JSON: little-endian bytes in base64."""
    a = np.ascontiguousarray(values, dtype="<f8")
    return {"dtype": "f8", "bdata": base64.b64encode(a.tobytes()).decode()}


def when(ts: I64) -> dict[str, str]:
    """Times (ns) for a date axis: ms since 1970."""
    return packed(np.asarray(ts) / 1e6)


def axis(title: str = "", **more: Any) -> dict[str, Any]:
    """A quiet axis; `more` overrides."""
    quiet = {"gridcolor": "var(--line)", "zerolinecolor": "var(--line2)", "linecolor": "var(--line2)", "ticks": "", "automargin": True}
    return {**quiet, "title": {"text": title, "standoff": 8, "font": {"size": 12, "color": "var(--muted)"}}, **more}


def layout(height: int, **more: Any) -> dict[str, Any]:
    """The common look; `more` adds axes and overrides."""
    return {
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 30, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 12, "color": "var(--muted)"},
        "hoverlabel": {"bgcolor": "var(--card)", "bordercolor": "var(--line2)", "font": {"color": "var(--ink)", "family": FONT}},
        "hovermode": "x unified",
        "legend": {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "font": {"color": "var(--ink)"}},
        **more,
    }


def line(x: Any, y: ArrayLike, name: str, colour: str, **more: Any) -> dict[str, Any]:
    style = {"color": colour, "width": more.pop("width", 1.8), "dash": more.pop("dash", "solid"), "shape": more.pop("shape", "linear")}
    return {"type": "scatter", "mode": "lines", "x": x, "y": packed(y), "name": escape(name), "line": style, **more}


def band(x: F, low: F, high: F, colour: str) -> dict[str, Any]:
    """The area between `low` and `high`, where both are known."""
    ok = np.isfinite(low) & np.isfinite(high)
    around = np.concatenate([x[ok], x[ok][::-1]]), np.concatenate([low[ok], high[ok][::-1]])
    return {
        "type": "scatter", "mode": "lines", "x": packed(around[0]), "y": packed(around[1]), "fill": "toself", "fillcolor": colour,
        "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False,
    }  # fmt: skip


def upright(x: float, text: str, colour: str, xref: str = "x", side: str = "left") -> tuple[dict[str, Any], dict[str, Any]]:
    """A dashed upright at `x` and its label, as a shape and an annotation."""
    stroke = {"color": colour, "width": 1.5, "dash": "dot"}
    shape = {"type": "line", "xref": xref, "yref": "paper", "x0": x, "x1": x, "y0": 0, "y1": 1, "line": stroke}
    label = {
        "xref": xref, "yref": "paper", "x": x, "y": 0.98, "text": text, "showarrow": False, "xanchor": side, "yanchor": "top",
        "xshift": 4 if side == "left" else -4, "font": {"color": colour, "size": 12}, "bgcolor": "var(--card)",
    }  # fmt: skip
    return shape, label


def equity_figure(curves: Mapping[str, tuple[I64, F]], currency: str) -> Figure | None:
    """Net PnL of each strategy over time and, below, the drawdown of each; the first curve leads. None without a curve."""
    drawn = {name: thin(ts, pnl) for name, (ts, pnl) in curves.items() if len(ts)}
    if not drawn:
        return None
    data = []
    for i, (name, (ts, pnl)) in enumerate(drawn.items()):
        look = {"width": 2.2 if i == 0 else 1.5, "dash": ("solid", "dash", "dot")[i % 3], "shape": "hv"}
        data.append(line(when(ts), pnl, name, SERIES[i], hovertemplate="%{y:,.2f}", **look))
        under = {"fill": "tozeroy", "fillcolor": "var(--down-soft)"} if i == 0 else {}
        colour = "var(--down)" if i == 0 else SERIES[i]
        dd = line(when(ts), drawdown(pnl), f"{name}, drawdown", colour, hovertemplate="%{y:,.2f}", **{**look, "width": 1.2})
        data.append({**dd, **under, "yaxis": "y2", "showlegend": False})
    return {
        "data": data,
        "layout": layout(
            440,
            xaxis=axis("UTC", type="date", anchor="y2"),
            yaxis=axis(f"net PnL ({escape(currency)})", domain=[0.36, 1], zeroline=True, tickformat=",~r"),
            yaxis2=axis("drawdown", domain=[0, 0.28], tickformat=",~r"),
        ),
    }


MARKS: Final = {  # role, side -> name, symbol, colour
    ("entry", 1): ("entry, buy", "triangle-up", "var(--up)"),
    ("entry", -1): ("entry, sell", "triangle-down", "var(--down)"),
    ("target", 0): ("target", "star", "var(--s3)"),
    ("stop", 0): ("stop", "x", "var(--warn)"),
    ("exit", 0): ("exit", "circle-open", "var(--ink)"),
}


def price_figure(
    mid: tuple[I64, F], fills: Fills, trips: F, ribbon: tuple[I64, F], names: Sequence[str], span: tuple[int, int], decimals: int,
    rolls: Sequence[tuple[int, str]] = (),
) -> Figure | None:
    """The mid of one instrument with its fills, round trips and regimes, over `span` (ns). None without a mid and without fills.

    `trips` (n, 5): opened ns, closed ns, entry, exit, net PnL. `ribbon`: times of change and the regime (index of `names`) from there on.
    `rolls`: when and between which contracts, drawn as upright lines.
    """
    ts, px = thin(*mid)
    if not len(ts) and not len(fills):
        return None
    form = f",.{decimals}f"
    data = [line(when(ts), px, "mid", "var(--muted)", width=1.2, hovertemplate=f"%{{y:{form}}}")]
    for name, kept, colour in (("won", trips[trips[:, 4] > 0], "var(--up)"), ("lost", trips[trips[:, 4] <= 0], "var(--down)")):
        if len(kept):
            gap = np.full(len(kept), np.nan)
            x, y = np.column_stack([kept[:, :2] / 1e6, gap]).ravel(), np.column_stack([kept[:, 2:4], gap]).ravel()
            data.append(line(packed(x), y, f"round trip, {name}", colour, width=1.6, hoverinfo="skip", opacity=0.75))
    grow = 1.0 if len(fills) <= 100 else 0.7
    known = dict.fromkeys(role for role, _ in MARKS)
    for (role, side), (name, symbol, colour) in MARKS.items():
        own = (fills.role == role) | ((role == "exit") & ~np.isin(fills.role, list(known)))
        at = np.flatnonzero(own & ((fills.side == side) | (side == 0)))
        every = -(-len(at) // MOST_MARKERS) or 1
        at = at[::every]
        if len(at):
            note = [f"{name} {s:g} at {p:{form}}, fee {f:,.2f}" for s, p, f in zip(fills.size[at], fills.price[at], fills.fee[at])]
            edge = {} if symbol in ("x", "circle-open") else {"line": {"color": "var(--card)", "width": 1}}
            marker = {"symbol": symbol, "size": (11 if side else 8) * grow, "color": colour, **edge}
            data.append({
                "type": "scatter", "mode": "markers", "x": when(fills.ts[at]), "y": packed(fills.price[at]), "text": note, "marker": marker,
                "name": name if every == 1 else f"{name} (1 of {every})", "hovertemplate": "%{text}<extra></extra>",
            })  # fmt: skip
    change, regime = ribbon
    if len(change):
        data.append(ribbon_of(change, regime, names, span))
    drawn = [(t / 1e6, text) for t, text in rolls if span[0] <= t <= span[1]]
    upright = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "line": {"color": "var(--muted)", "width": 1, "dash": "dot"}}
    label = {"yref": "paper", "y": 1, "xanchor": "left", "yanchor": "top", "showarrow": False}
    shapes = [upright | {"x0": x, "x1": x} for x, _ in drawn]
    drawn_on: dict[str, Any] = {"shapes": shapes, "annotations": [label | {"x": x, "text": escape(t)} for x, t in drawn]} if drawn else {}
    return {
        "data": data,
        "layout": layout(
            480,
            hovermode="closest",
            xaxis=axis("UTC", type="date", anchor="y2" if len(change) else "y", range=[span[0] / 1e6, span[1] / 1e6]),
            yaxis=axis("price", domain=[0.1 if len(change) else 0, 1], tickformat=form),
            yaxis2=axis(domain=[0, 0.055], showticklabels=False, showgrid=False, fixedrange=True),
            **drawn_on,
        ),
    }


def regime_colour(i: int, name: str) -> str:
    """Colours by the meaning in the name (low volatility, trending up, ...), else by number; -1 is unknown."""
    words = {"low": "--r-low", "up": "--r-up", "down": "--r-down", "high": "--r-high", "crisis": "--r-crisis"}
    if i < 0:
        return "var(--line2)"
    return next((f"var({css})" for word, css in words.items() if word in name.lower()), SERIES[i % len(SERIES)])


def ribbon_of(change: I64, regime: F, names: Sequence[str], span: tuple[int, int]) -> dict[str, Any]:
    """The regimes over `span` (ns) as coloured cells, from the times of change and the regimes from there on."""
    edges = np.linspace(span[0], span[1], RIBBON + 1)
    i = np.searchsorted(change, (edges[:-1] + edges[1:]) / 2, side="right") - 1
    cell = np.where(i >= 0, regime[np.maximum(i, 0)], -1).astype(int)
    label = ["unknown", *(escape(n) for n in names)]
    n = len(label)
    cell = np.clip(cell, -1, n - 2)
    colours = [regime_colour(k - 1, label[k]) for k in range(n)]
    scale = [[at, colours[k]] for k in range(n) for at in (k / n, (k + 1) / n)]
    return {
        "type": "heatmap", "x": packed(edges / 1e6), "y": [0, 1], "z": [cell.tolist()], "zmin": -1.5, "zmax": n - 1.5, "yaxis": "y2",
        "colorscale": scale, "showscale": False, "text": [[label[c + 1] for c in cell]], "hovertemplate": "%{text}<extra></extra>",
    }  # fmt: skip


def cost_figures(cost: Costs, rule: Costs | None, currency: str) -> tuple[Figure, Figure]:
    """Net PnL against costs scaled 0 to 3 times, and against a fixed number of ticks per unit; break-even marked in both."""
    k = np.linspace(0, 3, 61)
    data = [line(packed(k), cost.scaled(k), "ensemble, all costs", SERIES[0], width=2.2, hovertemplate="%{y:,.2f}")]
    data.append(line(packed(k), cost.fees_scaled(k), "ensemble, fees alone", SERIES[2], hovertemplate="%{y:,.2f}"))
    if rule is not None:
        data.append(line(packed(k), rule.scaled(k), "OFI rule, all costs", SERIES[1], dash="dash", hovertemplate="%{y:,.2f}"))
    zero = cost.at_mid / cost.paid if cost.paid > 0 else np.nan
    marks = [upright(1.0, "as charged", "var(--muted)")]
    if 0 <= zero <= 3:
        marks.append(upright(zero, f"break-even {zero:.2f}x", "var(--accent)", side="right" if zero > 2 or 0.6 < zero < 1 else "left"))
        marks[-1][1]["y"] = 0.86
    pnl = axis(f"net PnL ({escape(currency)})", tickformat=",~r", zeroline=True)
    scaled = marked(data, marks, xaxis=axis("costs charged, multiple", ticksuffix="x", range=[0, 3]), yaxis=pnl)
    spent = cost.paid_ticks if cost.units > 0 else 1.0
    even = [c.break_even_ticks for c in (cost, rule) if c is not None and np.isfinite(c.break_even_ticks)]
    c = np.linspace(0, 1.15 * max([1.0, 2 * abs(spent), *even]), 61)
    data = [line(packed(c), cost.fixed(c), "ensemble", SERIES[0], width=2.2)]
    if rule is not None:
        data.append(line(packed(c), rule.fixed(c), "OFI rule", SERIES[1], dash="dash"))
    marks = [upright(spent, f"paid {spent:.2f}", "var(--muted)", side="left" if spent < c[-1] / 2 else "right")] if spent > 0 else []
    if 0 <= cost.break_even_ticks <= c[-1]:
        b = cost.break_even_ticks
        marks.append(upright(b, f"break-even {b:.2f}", "var(--accent)", side="right" if b > c[-1] * 0.6 or b < spent else "left"))
        marks[-1][1]["y"] = 0.86
    return scaled, marked(data, marks, xaxis=axis("cost per unit, there and back (ticks)", range=[0, c[-1]]), yaxis=pnl)


def marked(data: list[Any], marks: Sequence[tuple[dict[str, Any], dict[str, Any]]], height: int = 330, **axes: Any) -> Figure:
    """A figure with uprights and their labels, and axes."""
    shapes, labels = [m[0] for m in marks], [m[1] for m in marks]
    return {"data": data, "layout": layout(height, shapes=shapes, annotations=labels, **axes)}


def delay_figure(delays: I64, curves: Mapping[str, tuple[F, F, F]]) -> Figure | None:
    """Mark-outs: mean signed move of the mid in ticks against the time since the decision, with 95 % intervals; log time."""
    data: list[Any] = []
    x = delays / 1e6
    for i, (name, (mean, low, high)) in enumerate(curves.items()):
        if np.isfinite(mean).any():
            data.append(band(x, low, high, f"var(--s{i % 5}-soft)"))
            data.append(line(packed(x), mean, name, SERIES[i % 5], hovertemplate="%{y:.3f} ticks", mode="lines+markers"))
    if not data:
        return None
    return marked(data, [], xaxis=_time_axis(x, "time since the decision"), yaxis=axis("signed mid move (ticks)", zeroline=True))


def late_figure(delays: I64, horizons: Mapping[str, tuple[F, F, F]], paid: float, typical_ns: float) -> Figure | None:
    """What is left of the move until each horizon when one acts late, in ticks; the cost paid per round trip as a line."""
    x = delays / 1e6
    data: list[Any] = []
    for i, (name, (mean, low, high)) in enumerate(horizons.items()):
        ok = np.isfinite(mean)
        if ok.any():
            data.append(band(x[ok], low[ok], high[ok], f"var(--s{i % 5}-soft)"))
            data.append(line(packed(x[ok]), mean[ok], f"until {name}", SERIES[i % 5], hovertemplate="%{y:.3f} ticks"))
    if not data:
        return None
    if np.isfinite(paid):
        cost = line(packed(x[[0, -1]]), [paid, paid], "cost of a round trip", "var(--down)", dash="dot", hovertemplate="%{y:.3f} ticks")
        data.append(cost)
    marks = []
    if np.isfinite(typical_ns) and x[0] <= typical_ns / 1e6 <= x[-1]:
        shape, label = upright(typical_ns / 1e6, "p50 latency", "var(--muted)")
        marks = [(shape, {**label, "x": float(np.log10(typical_ns / 1e6))})]  # annotations take the logarithm, shapes do not
    return marked(data, marks, xaxis=_time_axis(x, "delay of the decision"), yaxis=axis("move left (ticks)", zeroline=True))


def _time_axis(ms: F, title: str) -> dict[str, Any]:
    ticks = np.array([0.1, 1, 10, 100, 1e3, 1e4, 1e5])
    text = ["0.1 ms", "1 ms", "10 ms", "100 ms", "1 s", "10 s", "100 s"]
    keep = [i for i, v in enumerate(ticks) if ms[0] * 0.99 <= v <= ms[-1] * 1.01]
    return axis(title, type="log", tickvals=[float(ticks[i]) for i in keep], ticktext=[text[i] for i in keep], hoverformat=",.4~r")


def calibration_figure(curves: Mapping[str, Reliability]) -> Figure | None:
    """Reliability diagram, one line a horizon, and below how often each probability was given (share, log scale).

    Bins with fewer than LEAST_FORECASTS are not drawn.
    """
    data: list[Any] = [line(packed([0, 1]), [0, 1], "perfect", "var(--line2)", dash="dash", width=1.2, hoverinfo="skip", showlegend=False)]
    for i, (name, r) in enumerate(curves.items()):
        drawn = r.number >= LEAST_FORECASTS
        if not drawn.any():
            continue
        share = (r.number / r.number.sum())[drawn]
        r = r._replace(forecast=r.forecast[drawn], frequency=r.frequency[drawn], number=r.number[drawn])
        note = [f"{name}: said {p:.1%}, happened {q:.1%} of {n:,}" for p, q, n in zip(r.forecast, r.frequency, r.number)]
        common = {"text": note, "hovertemplate": "%{text}<extra></extra>", "legendgroup": name}
        marker = {"size": packed(5 + 11 * np.sqrt(share)), "color": SERIES[i % 5]}
        label = f"{name} (ECE {r.ece:.2%})"
        trace = line(packed(r.forecast), r.frequency, label, SERIES[i % 5], mode="lines+markers", marker=marker, **common)
        stroke = {"color": SERIES[i % 5], "width": 1.4, "shape": "hvh"}
        under = {"type": "scatter", "mode": "lines", "x": packed(r.forecast), "y": packed(share), "line": stroke, "yaxis": "y2"}
        data += [trace, {**under, "showlegend": False, **common}]
    if len(data) == 1:
        return None
    p = {"tickformat": ".0%", "range": [-0.02, 1.02]}
    return {
        "data": data,
        "layout": layout(
            470,
            hovermode="closest",
            xaxis=axis("probability forecast", anchor="y2", **p),
            yaxis=axis("frequency observed", domain=[0.3, 1], **p),
            yaxis2=axis("share", domain=[0, 0.2], type="log", range=[-3.3, 0.15], tickvals=[0.001, 0.01, 0.1, 1], tickformat=".1~%"),
        ),
    }


def latency_figure(ms: F, p50: float, p99: float) -> Figure | None:
    """Histogram of decision latencies on a log axis with p50 and p99 marked."""
    ms = ms[np.isfinite(ms) & (ms > 0)]
    if not len(ms):
        return None
    low, high = float(ms.min()), float(ms.max())
    if high / low < 1.2:
        low, high = low / 1.5, high * 1.5
    edges = np.geomspace(low, high, 61)
    n, _ = np.histogram(ms, edges)
    centre = np.sqrt(edges[1:] * edges[:-1])
    bars = {
        "type": "bar", "x": packed(centre), "y": packed(n / len(ms)), "width": packed(np.diff(edges)), "showlegend": False,
        "marker": {"color": "var(--s0)", "opacity": 0.75}, "hovertemplate": "%{x:.3~r} ms: %{y:.2%}<extra></extra>",
    }  # fmt: skip
    marks = []
    for v, text, colour, side in ((p50, f"p50 {p50:.3g} ms", "var(--accent)", "right"), (p99, f"p99 {p99:.3g} ms", "var(--warn)", "left")):
        if np.isfinite(v) and v > 0:
            shape, label = upright(v, text, colour, side="right" if v > np.sqrt(low * high) and side == "left" else side)
            marks.append((shape, {**label, "x": float(np.log10(v)), "y": 0.98 if side == "right" else 0.86}))
    ticks = [m * 10.0**e for e in range(-4, 6) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    x = axis("event to decision (ms)", type="log", tickvals=ticks, ticktext=[f"{v:g}" for v in ticks])
    return marked([bars], marks, hovermode="closest", bargap=0, xaxis=x, yaxis=axis("share of decisions", tickformat=".0~%"))


def slippage_figure(fills: Fills) -> Figure | None:
    """Histogram of what fills paid against the mid, in ticks, by role (see Fills.slippage); positive is worse than the mid."""
    paid = fills.slippage
    ok = np.isfinite(paid)
    if not ok.any():
        return None
    low, high = np.percentile(paid[ok], [0.5, 99.5])
    edges = np.linspace(low - 0.25, high + 0.25, 41)
    data = []
    for i, role in enumerate(dict.fromkeys(fills.role[ok].tolist())):
        n, _ = np.histogram(np.clip(paid[ok & (fills.role == role)], low, high), edges)
        bars = {"type": "bar", "x": packed((edges[1:] + edges[:-1]) / 2), "y": packed(n), "marker": {"color": SERIES[i % 5]}}
        data.append({**bars, "name": escape(str(role)), "hovertemplate": "%{x:.2f} ticks: %{y} fills"})
    mean = float(paid[ok].mean())
    marks = [upright(mean, f"mean {mean:.2f}", "var(--accent)")]
    x = axis("slippage against the mid (ticks)", zeroline=True)
    return marked(data, marks, xaxis=x, yaxis=axis("fills"), barmode="stack", bargap=0.06, hovermode="closest")


def gain_figure(rows: Sequence[tuple[str, str, float, float, float, bool]]) -> Figure | None:
    """Forest plot of gains in log-loss over the best baseline: (label, baseline, gain, low, high, enough labels) each; zero marked."""
    if not rows:
        return None
    gain, low, high = (np.array([r[i] for r in rows], np.float64) for i in (2, 3, 4))
    sure = [r[5] for r in rows]
    sign = ["var(--up)" if a > 0 else "var(--down)" if b < 0 else "var(--s4)" for a, b in zip(low, high)]
    colour = [c if enough else "var(--muted)" for c, enough in zip(sign, sure)]
    note = [f"{escape(r[0])}: {r[2]:+.5f} over {escape(r[1])}{'' if r[5] else ', too few labels'}" for r in rows]
    error = {"type": "data", "symmetric": False, "array": packed(high - gain), "arrayminus": packed(gain - low)}
    trace = {
        "type": "scatter", "mode": "markers", "x": packed(gain), "y": [escape(r[0]) for r in rows], "text": note, "showlegend": False,
        "marker": {"color": colour, "size": 9, "symbol": ["circle" if s else "circle-open" for s in sure]},
        "error_x": {**error, "color": "var(--muted)", "thickness": 1.5, "width": 4}, "hovertemplate": "%{text}<extra></extra>",
    }  # fmt: skip
    x = axis("log-loss gained (nats)", zeroline=False)
    y = axis(autorange="reversed", type="category")
    zero, _ = upright(0, "", "var(--muted)")
    more = layout(70 + 28 * max(2, len(rows)), hovermode="closest", xaxis=x, yaxis=y, shapes=[zero])
    return {"data": [trace], "layout": {**more, "margin": {"l": 8, "r": 12, "t": 6, "b": 8}}}


def weight_figure(regimes: Sequence[str], members: Sequence[str], weights: F) -> Figure | None:
    """Weight of each member (columns) in each regime (rows): a heat map of `weights` (R, N) in [0, 1]."""
    if not weights.size:
        return None
    trace = {
        "type": "heatmap", "x": [escape(m) for m in members], "y": [escape(r) for r in regimes], "z": weights.tolist(),
        "zmin": 0, "zmax": 1, "colorscale": [[0, "var(--heat0)"], [1, "var(--heat1)"]], "showscale": False, "xgap": 3, "ygap": 3,
        "texttemplate": "%{z:.2f}", "textfont": {"color": "var(--ink)"}, "hovertemplate": "%{y}, %{x}: %{z:.3f}<extra></extra>",
    }  # fmt: skip
    x, y = axis(side="top", showgrid=False, zeroline=False), axis(autorange="reversed", showgrid=False, zeroline=False)
    fig = marked([trace], [], 60 + 40 * len(weights), hovermode="closest", xaxis=x, yaxis=y)
    fig["layout"]["margin"]["t"] = 6
    return fig


def regret_figure(labels: Sequence[str], regret: F, bound: F) -> Figure | None:
    """Regret (n,) and its bound (n,) in nats, one row each: bars and ticks; left of zero the mixture did better than the member."""
    if not len(regret):
        return None
    y = [escape(t) for t in labels]
    bars = {"type": "bar", "orientation": "h", "y": y, "x": packed(regret), "name": "regret", "marker": {"color": "var(--s0)"}}
    mark = {"symbol": "line-ns", "size": 14, "line": {"color": "var(--warn)", "width": 2.5}}
    ends = {"type": "scatter", "mode": "markers", "y": y, "x": packed(bound), "name": "bound", "marker": mark}
    data = [{**trace, "hovertemplate": "%{x:,.2f} nats"} for trace in (bars, ends)]
    rows = axis(autorange="reversed", type="category")
    return marked(data, [], 90 + 26 * len(y), xaxis=axis("nats", zeroline=True), yaxis=rows, hovermode="closest", bargap=0.35)
