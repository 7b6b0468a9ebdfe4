"""The page of a sweep, `sweep.html`: what it came to in words, parallel coordinates of all runs, the best beside the median, the table.

One file that opens offline, in light and dark.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cift_strategies.overfitting import Overfitting
from cift_strategies.sweep import Trial
from cift_strategies.sweep_board import short
from cift_strategies.sweep_result import METHODS

INK: Final = "#7a828c"  # reads on light and on dark
BEST: Final = "#2a7de1"
MEDIAN: Final = "#d9782d"
ROWS: Final = 500  # of the table
_LOOK: Final = """
:root{--bg:#f6f6f3;--card:#fff;--ink:#1b1f24;--muted:#646a73;--line:#e4e4de;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--bg:#0f1114;--card:#181b20;--ink:#e9ebee;--muted:#99a1ab;--line:#2b3038}}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 Inter,system-ui,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1160px;margin:0 auto;padding:24px 20px}h1{font-size:27px;margin:0;overflow-wrap:anywhere}h2{font-size:18px;margin:0 0 8px}
section{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:18px 22px;margin:16px 0;break-inside:avoid}
p{margin:6px 0;max-width:110ch}.note{color:var(--muted);font-size:13.5px}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13.5px;width:100%}
th,td{padding:5px 12px 5px 0;text-align:right;border-bottom:1px solid var(--line)}
th{color:var(--muted);font-weight:500}th:first-child,td:first-child{text-align:left}tr.lead td{font-weight:650}
.wide{min-width:720px}.parcoords text{text-shadow:none!important}a{color:#2a7de1}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:8px 26px}.two>*{min-width:0}
"""

_FIT: Final = """
const fit = () => document.querySelectorAll(".js-plotly-plot").forEach(d => Plotly.Plots.resize(d));
new ResizeObserver(fit).observe(document.querySelector("main")); addEventListener("beforeprint", fit);
"""  # charts are drawn before what stands beside them is there


def render(
    result: Mapping[str, Any], best: Trial, median: Trial, matrix: NDArray[np.float64], numbers: Sequence[int], over: Overfitting | None
) -> str:
    """HTML of `result` (sweep.json); `matrix` (T, N) the returns of the runs `numbers`."""
    from plotly.offline import get_plotlyjs

    rows = [r for r in result["table"] if r.get("figures")]
    parts = [f"<section>{''.join(f'<p>{escape(line)}</p>' for line in result['told'])}</section>"]
    drawn = _draw(_parallel(result, rows), margin={"l": 60, "r": 60, "t": 60, "b": 40})
    note = "One line a run, in the colour of its objective. Drag along an axis to choose a part of it."
    parts.append(_section("All runs", f'<div class="scroll"><div class="wide">{drawn}</div></div>', note))
    links = ", ".join(f'<a href="{name}/report.html">{name} run</a>' for name in result["reports"])
    more = f"<p>The whole report of each: {links}.</p>" if links else ""
    units = f"Net of fees. Periods: {result['periods']:,} of equal length over the hours in which runs are compared. Sharpe: of a period. "
    units += "Return: % of the capital. Fees, PnL and drawdown: money, over all of a run's time."
    parts.append(_section("Best and median run", more + _side_by_side(rows, best, median, matrix, numbers), units))
    parts.append(_section("Chosen in one half of the time, judged in the other", _overfitting(over)))
    if result["validation"] is not None:
        v = result["validation"]
        note = f"The time is cut into {v['groups']} equal groups. Each row: the run that was best by {result['objective']} in the "
        note += "groups it was chosen on, and what it was worth in the judged ones. Purged: positions left out of choosing because their "
        note += "life meets a judged group."
        parts.append(_section(f"Validation: {METHODS[v['method']]}", _folds(v), note))
    parts.append(_section("Table", _table(result, rows), "The best and the median run stand out."))
    title = escape(f"Sweep: {len(rows)} runs over {', '.join(result['parameters'])}")
    script = str(get_plotlyjs()).replace("</script", "<\\/script")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{title}</title><link rel="icon" href="data:,"><style>{_LOOK}</style><script>{script}</script></head>'
        f"<body><main><h1>{title}</h1>{''.join(parts)}</main><script>{_FIT}</script></body></html>\n"
    )


def _section(title: str, body: str, note: str = "") -> str:
    return f"<section><h2>{escape(title)}</h2>{f'<p class=note>{escape(note)}</p>' if note else ''}{body}</section>"


def _draw(figure: Any, **more: Any) -> str:
    clear, margin = "rgba(0,0,0,0)", {"l": 10, "r": 20, "t": 30, "b": 40}
    look = {"paper_bgcolor": clear, "plot_bgcolor": clear, "font": {"color": INK, "size": 12}, "margin": margin}
    figure.update_layout(look | more, legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"})
    figure.update_xaxes(gridcolor="rgba(128,128,128,.2)", zerolinecolor="rgba(128,128,128,.4)", automargin=True)
    figure.update_yaxes(gridcolor="rgba(128,128,128,.2)", zerolinecolor="rgba(128,128,128,.4)", automargin=True)
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True}))


def _parallel(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Any:
    import plotly.graph_objects as go

    objective = str(result["objective"])
    columns: list[tuple[str, list[Any]]] = [(k, [r["parameters"][k] for r in rows]) for k in result["parameters"]]
    figures = dict.fromkeys(("fills", "return", objective))
    columns += [(_named(k), [_shown(k, r["figures"].get(k)) for r in rows]) for k in figures]
    dimensions = []
    for name, values in columns:
        label = name.rpartition(".")[2].replace("_", " ")
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values if v is not None):
            ticks = sorted(set(values)) if name in result["parameters"] and len(set(values)) <= 8 else None
            dimensions.append({"label": label, "values": [np.nan if v is None else v for v in values], "tickvals": ticks})
        else:
            words = [str(v) for v in values]
            kinds = list(dict.fromkeys(words))
            dimensions.append({
                "label": label, "values": [kinds.index(w) for w in words], "tickvals": list(range(len(kinds))), "ticktext": kinds,
            })  # fmt: skip
    score = [np.nan if r["score"] is None else r["score"] for r in rows]
    line = {"color": score, "colorscale": [[0, MEDIAN], [0.5, "#8a9099"], [1, BEST]], "showscale": True, "colorbar": {"title": objective}}
    return go.Figure(go.Parcoords(line=line, dimensions=dimensions), layout={"height": 440})


def _shown(name: str, value: Any) -> Any:
    return 100 * value if name == "return" and value is not None else value


def _named(figure: str) -> str:
    return "return, %" if figure == "return" else figure.replace("pnl_net", "net PnL").replace("_", " ")


def _side_by_side(
    rows: Sequence[Mapping[str, Any]], best: Trial, median: Trial, matrix: NDArray[np.float64], numbers: Sequence[int]
) -> str:
    import plotly.graph_objects as go

    by = {r["run"]: r for r in rows}
    chosen = (("best", best, BEST, "solid"), ("median", median, MEDIAN, "dash"))
    body = ""
    if len(matrix):
        figure = go.Figure(layout={"height": 320, "yaxis": {"title": "net, % of capital"}, "xaxis": {"title": "period"}})
        for name, t, colour, dash in chosen:
            curve = 100 * np.cumsum(matrix[:, list(numbers).index(t.number)])
            figure.add_scatter(y=curve, name=f"{name}: run {t.number}", line={"color": colour, "dash": dash})
        body = _draw(figure)
    else:
        body = "<p class=note>The runs cover no common time: there are no curves to compare.</p>"
    lines: list[tuple[str, ...]] = [(k, *(short(t.point[k]) for _, t, _, _ in chosen)) for k in best.point]
    both = [by[t.number]["figures"] for _, t, _, _ in chosen]
    lines += [(_named(k), *(short(_shown(k, f.get(k))) for f in both)) for k in dict.fromkeys(k for f in both for k in f)]
    return body + _rows(("", f"best: run {best.number}", f"median: run {median.number}"), lines)


def _overfitting(over: Overfitting | None) -> str:
    import plotly.graph_objects as go

    if over is None:
        return "<p class=note>Two runs over the same time are needed.</p>"
    shown = slice(None, None, max(1, len(over.logit) // 3000))
    scatter = go.Figure(layout={"height": 340, "xaxis": {"title": "Sharpe, chosen half"}, "yaxis": {"title": "Sharpe, other half"}})
    scatter.add_scatter(x=over.inside[shown], y=over.outside[shown], mode="markers", marker={"color": BEST, "size": 4, "opacity": 0.35})
    across, up = {"title": "logit of its rank there (0: the median)"}, {"title": "ways of cutting"}
    logit = go.Figure(layout={"height": 340, "xaxis": across, "yaxis": up})
    logit.add_histogram(x=over.logit, marker={"color": MEDIAN})
    said = "Each dot is one way of cutting the time in two: the run that is best in one half, and what it is worth in the other. "
    said += f"Left of zero on the right, its rank there is below the median: {over.pbo:.0%} of the ways."
    return f'<p class="note">{said}</p><div class="two"><div>{_draw(scatter)}</div><div>{_draw(logit)}</div></div>'


def _folds(v: Mapping[str, Any]) -> str:
    rows = [
        (", ".join(str(g + 1) for g in f["tested"]), str(f["run"]), short(f["inside"]), short(f["outside"]), str(f["purged"]))
        for f in v["folds"]
    ]  # fmt: skip
    return _rows(("judged groups", "chosen run", "where chosen", "where judged", "positions purged"), rows)


def _table(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    sign = -1 if result["direction"] == "maximize" else 1
    ranked = sorted(rows, key=lambda r: float("inf") if r["score"] is None else sign * r["score"])
    shown = ("sharpe", "return", "fills", "fees", "pnl_net", "max_drawdown", "hit_rate")
    names = dict.fromkeys(k for k in (*shown, result["objective"]) if any(k in r["figures"] for r in rows))
    lines = [
        (str(r["run"]), *(short(r["parameters"][k]) for k in result["parameters"]), *(short(_shown(k, r["figures"].get(k))) for k in names))
        for r in ranked[:ROWS]
    ]  # fmt: skip
    lead = {i for i, r in enumerate(ranked[:ROWS]) if r["run"] in (result["best"], result["median"])}
    note = f'<p class="note">The {ROWS} best of {len(rows)}; all are in sweep.parquet.</p>' if len(rows) > ROWS else ""
    return note + _rows(("run", *result["parameters"], *map(_named, names)), lines, lead)


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]], lead: Collection[int] = ()) -> str:
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join(
        f"<tr{' class=lead' if i in lead else ''}>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for i, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
