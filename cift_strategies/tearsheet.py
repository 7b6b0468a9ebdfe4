"""NautilusTrader's own tearsheet of a finished run, as a figure that a page with one plotly.js can draw beside others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cift_strategies.charts import Figure
from cift_strategies.finished import Finished, instant

SHORT_DAYS = 3  # up to here the equity curve is drawn as it is, beyond from daily closes
LINE = 30  # pixels of a statistic, some in two lines where the page is narrow
CHART = 450
LONG_DAYS = 60  # from here on monthly and yearly returns and the rolling Sharpe ratio mean something


def tearsheet(done: Finished, theme: str = "nautilus") -> Figure:
    """The tearsheet of the run in one of Nautilus's themes: run, statistics, equity, drawdown; for long runs the calendar charts too.

    Statistics are those of Nautilus's BacktestResult; returns are made from the equity curve and the account's capital.
    """
    import pandas as pd
    from nautilus_trader.analysis import GridLayout, TearsheetConfig, create_tearsheet_from_stats
    from nautilus_trader.analysis import config as panels

    told = done.facts["nautilus"]
    ts, pnl = done.equity("ensemble")
    days = (done.facts["span"][1] - done.facts["span"][0]) / 86400e9
    money = pd.Series(pnl, index=pd.to_datetime(ts, unit="ns", utc=True)).groupby(level=0).last() + _capital(done)
    if days > SHORT_DAYS:
        money = money.resample("D").last().ffill()
    grid: list[panels.TearsheetChart] = [panels.TearsheetRunInfoChart(), panels.TearsheetStatsTableChart()]
    grid += [panels.TearsheetEquityChart(), panels.TearsheetDrawdownChart()]
    if days > LONG_DAYS:
        grid += [panels.TearsheetMonthlyReturnsChart(), panels.TearsheetDistributionChart()]
        grid += [panels.TearsheetRollingSharpeChart(), panels.TearsheetYearlyReturnsChart()]
    rows = len(grid) // 2
    stats = [_known(told[k]) for k in ("stats_pnls", "stats_returns", "stats_general")]
    first = LINE * (4 + sum(len(v) if isinstance(v, Mapping) else 1 for s in stats for v in s.values()))  # or the table is cut
    height = first + CHART * (rows - 1)
    heights = [first / height, *[CHART / height] * (rows - 1)]
    info = {k.replace("_", " "): f"{v:,}" for k, v in told["counts"].items() if v is not None}
    info |= {k.replace("_", " "): instant(v) for k, v in told["times"].items() if v is not None}
    html = create_tearsheet_from_stats(
        stats_pnls=stats[0],
        stats_returns=stats[1],
        stats_general=stats[2],
        returns=money.pct_change().dropna(),
        run_info=info,
        account_info={k.removeprefix("account."): v for k, v in told["account"].items()},
        title="",
        config=TearsheetConfig(
            charts=grid,
            theme=theme,
            height=height + 70,
            layout=GridLayout(rows=rows, cols=2, heights=heights, vertical_spacing=0.08),
        ),
        output_path=None,
    )
    return _figure(str(html))


def _capital(done: Finished) -> float:
    """What the accounts held before the run, in the currency of the totals; 1 where Nautilus told no balance."""
    ends = [str(v).replace("_", "").replace(",", "").split() for v in done.facts["nautilus"]["account"].values()]
    end = sum(float(amount) for amount, currency in ends if currency == done.currency)
    start = end - done.money(done.summary.get("pnl_net"))
    return start if start > 0 else 1.0


def _known(stats: Mapping[str, Any]) -> dict[str, Any]:
    """NaN where a figure is not defined; JSON had null. In order of name: Nautilus's own order changes from run to run."""
    return {k: _known(v) if isinstance(v, Mapping) else float("nan") if v is None else v for k, v in sorted(stats.items())}


def _figure(html: str) -> Figure:
    """The data and layout that a page of plotly's draws: the arguments of its last Plotly.newPlot call."""
    read = json.JSONDecoder().raw_decode
    data, end = read(html, html.index("[", html.rindex("Plotly.newPlot(")))
    layout, _ = read(html, html.index("{", end))
    layout |= {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "margin": {"t": 40, "b": 30, "l": 50, "r": 20}}
    layout.pop("title", None)
    return {"data": data, "layout": layout}
