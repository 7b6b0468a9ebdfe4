"""The report's sections about money: equity, shortfall, where it came from, costs, delay, execution, risk, statistics.

Takes a :class:`Finished`, gives HTML on a :class:`Page`; every section copes with no data and says what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from typing import Any, Final

import numpy as np

from cift_strategies import attribution, charts, money_charts, resampling
from cift_strategies.capacity import PREFACTOR, Capacity, capacity
from cift_strategies.finished import DELAYS_NS, HORIZONS, Finished
from cift_strategies.page import DASH, Page, count, money, number, percent, probability, real, side_by_side, small, table, words
from cift_strategies.shortfall import PARTS

HEADS: Final = {  # anchor -> link, title, what the reader looks at
    "shortfall": (
        "Shortfall",
        "Implementation shortfall",
        "From the money of a portfolio that trades at the mid its decision saw, at once and free, to what was made (Perold 1988). "
        "Entries that were never filled cost nothing here.",
    ),
    "groups": (
        "By group",
        "Where the money came from",
        "Round trips divided in seven ways; intervals are 95 %, by spans of time for money and Wilson's for hit rates. Member: how each "
        "stood at the decision's horizon when the trade was entered.",
    ),
    "risk": (
        "Risk",
        "Exposure, luck of the order, capacity",
        "What was held and for how long; how deep the same trades might have fallen in another order; how much more money they would bear.",
    ),
    "equity": (
        "Equity",
        "Equity and drawdown, beside the plain rule and buy-and-hold",
        "Money after fees, open positions at the mid. The rule trades on order flow imbalance alone, through the same execution: what lies "
        "between the two lines is what the models add. Buy-and-hold: every instrument in the mean size of a trade, from start to end.",
    ),
    "costs": (
        "Costs",
        "PnL against costs",
        "Costs are the fees and the distance of each fill from the mid of its moment. Left: all of them, or fees alone, charged 0 to 3 "
        "times. Right: a fixed cost per unit, there and back, in their place.",
    ),
    "delay": (
        "Delay",
        "PnL against decision delay",
        "Left: how far the mid moves in the forecast direction after a decision (mark-out). Right: what is left of that move for one who "
        "acts later, against the cost of a round trip. Bands are 95 % intervals.",
    ),
    "execution": (
        "Execution",
        "Latency and slippage",
        "Latency runs from the newest event a decision saw to its delivery. Slippage is what a fill paid: entries against the mid when "
        "they were decided (half the spread, what moved meanwhile, what size cost), exits against the mid of the moment; negative is "
        "better than the mid.",
    ),
    "sharpe": (
        "Sharpe",
        "Sharpe ratio: error, probabilistic, deflated",
        "The probability that the true Sharpe ratio is above zero, once the length and the shape of the sample and the number of "
        "strategies tried are counted in (Bailey and Lopez de Prado 2014). Not annualised: the sample is too short for that.",
    ),
}


STAGES: Final = {  # of live_session's `stages` -> in words
    "receipt": "receipt: from the event's stamp to its features",
    "queue": "queue: events wait for the models' process",
    "predict": "predict: the models compute",
    "return": "return: back to the strategy",
}


def money_rows(cur: str) -> list[tuple[str, str, Callable[[Any], str]]]:
    """What is told of a strategy's money: name, key of its summary, how it is written."""
    return [
        ("PnL net of fees", "pnl_net", lambda v: money(v, cur, sign=True)),
        ("maximum drawdown", "max_drawdown", lambda v: money(v, cur)),
        ("fees", "fees", lambda v: money(v, cur)),
        ("orders", "orders", count),
        ("fills", "fills", count),
        ("hit rate", "hit_rate", percent),
        ("break-even cost", "break_even_cost_ticks", lambda v: number(v, 2, "ticks")),
    ]


def equity(page: Page, done: Finished) -> None:
    held, bought = attribution.buy_and_hold(done)
    curves = {"ensemble": done.equity("ensemble"), "OFI rule": done.equity("rule"), "buy and hold": held}
    fig = charts.equity_figure(curves, done.currency)
    chart = page.figure(fig, "net PnL and drawdown over time", "No equity curve.")
    rule = done.rule
    sides: dict[str, Mapping[str, Any]] = {"ensemble": done.summary, "OFI rule": rule, "buy and hold": bought}
    rows = [(name, *(show(s.get(key)) for s in sides.values())) for name, key, show in money_rows(done.currency)]
    page.keep("performance", [{"strategy": n, **{k: s.get(k) for _, k, _ in money_rows("")}} for n, s in sides.items() if s])
    page.section("equity", HEADS["equity"], chart, table(["", *sides], rows, kind="fit"))


def against_decision(page: Page, done: Finished) -> None:
    """Implementation shortfall."""
    if not len(done.fills):
        page.section("shortfall", HEADS["shortfall"], page.figure(None, "", "No fills, so no shortfall."))
        return
    parts = {name: float(lost.sum()) for name, lost in done.execution.shortfall.items()}
    net = real(done.money(done.summary.get("pnl_net")))
    paper, units = net + sum(parts.values()), done.costs.units
    chart = page.figure(money_charts.shortfall_figure(paper, parts, net, done.currency), "implementation shortfall")
    values = {"at decision prices, at once and free": paper, **{p: -v for p, v in parts.items()}, "net PnL": net}
    rows = [(name, number(v, 2, sign=True), number(v / units if units else None, 3, sign=True)) for name, v in values.items()]
    page.keep("shortfall", [{"part": k, "money": v, "ticks_per_unit": v / units if units else None} for k, v in values.items()])
    role = done.fills.role
    by = []
    for r in dict.fromkeys(role.tolist()):
        lost = [float(done.execution.shortfall[p][role == r].sum()) for p in PARTS]
        by.append((r, count((role == r).sum()), *(number(v, 2) for v in lost), number(sum(lost), 2)))
    head = ["fills", "number", *PARTS, "together"]
    left = table(["", done.currency, "ticks per unit, there and back"], rows, [len(rows) - 1])
    note = "" if len(done.orders["ts"]) else '<p class="note">Order events were not kept: latencies and half spreads count as slippage.</p>'
    even = f"<p>Break-even: the run bears {number(done.costs.break_even_ticks, 2, 'ticks')} of cost per unit, there and back; it paid "
    even += f"{number(done.costs.paid_ticks, 2)}.</p>"
    page.section("shortfall", HEADS["shortfall"], chart, even, side_by_side(left, table(head, by)), note)


def by_group(page: Page, done: Finished) -> None:
    """Results by instrument, side, regime, horizon, hour, how it was closed, member."""
    if not len(done.positions["net"]):
        page.section("groups", HEADS["groups"], page.figure(None, "", "Nothing was traded, so there is nothing to divide."))
        return
    panels, cur = {}, done.currency
    for key, rows in attribution.groups(done).items():
        page.keep(f"by_{key.replace(' ', '_')}", rows)
        lines = []
        for r in rows:
            name = words(r[key]) + (f", {r['stance']}" if "stance" in r else "")
            low, high = r["mean_interval"]
            hit = f"{percent(r['hit_rate'])} [{percent(r['hit_interval'][0], 0)}, {percent(r['hit_interval'][1], 0)}]"
            mean = f"{number(r['mean_net'], 3, sign=True)} [{number(low, 3, sign=True)}, {number(high, 3, sign=True)}]"
            lines.append((name, count(r["round_trips"]), hit, *(number(r[k], 2, sign=k != "fees") for k in ("gross", "fees", "net")), mean))
        head = [key, "round trips", "hit rate [95 %]", "gross", "fees", f"net, {cur}", "mean net [95 %]"]
        chart = page.figure(money_charts.group_figure(rows, key), f"mean net by {key}", "No member had a say in an entry that is known.")
        panels[key] = chart + table(head, lines)
    page.section("groups", HEADS["groups"], page.choice("groups", "by", panels))


def against_costs(page: Page, done: Finished) -> None:
    cost = done.costs
    if not len(done.fills):
        page.section("costs", HEADS["costs"], page.figure(None, "", "No fills, so no costs."))
        return
    scaled, fixed = charts.cost_figures(cost, done.rule_costs, done.currency)
    parts = {"PnL at the mids of the fills": cost.at_mid, "distance from the mid": -cost.spread, "fees": -cost.fees, "net": cost.net}
    rows = [(name, number(v, 2, sign=True), number(v / cost.units if cost.units else None, 3, sign=True)) for name, v in parts.items()]
    pair = side_by_side(page.figure(scaled, "net PnL against scaled costs"), page.figure(fixed, "net PnL against ticks of cost"))
    page.section("costs", HEADS["costs"], pair, table(["", done.currency, "ticks per unit, there and back"], rows, [3], "fit"))


def against_delay(page: Page, done: Finished) -> None:
    kinds, left = done.marked
    p50 = (done.summary.get("decision_latency_ms") or {}).get("p50")
    named = {f"forecasts of {k}" if k in HORIZONS else "entries, from the fill": v for k, v in kinds.items()}
    absent = "No decision had a direction, or the mids at the decisions were not stored."
    marks = page.figure(charts.delay_figure(DELAYS_NS, named), "mark-outs", absent)
    late = page.figure(charts.late_figure(DELAYS_NS, left, done.costs.paid_ticks, 1e6 * real(p50)), "move left after a delay", absent)
    rerun = [*(done.facts["latency_curve"] or ()), *done.reruns]
    estimated = {k: [(v, p) for v, p in told if np.isfinite(p)] for k, told in done.execution.repriced.items()}
    page.keep("latency", [{"of": k, "latency_ms": v, "pnl_net": p, "how": "estimate"} for k, told in estimated.items() for v, p in told]
              + [{**r, "how": "run again"} for r in rerun])  # fmt: skip
    none = "No fills, so nothing to price again." if not len(done.fills) else "Order events were not kept, so fills cannot be priced again."
    chart = page.figure(money_charts.latency_cost_figure(estimated, rerun, done.currency), "net PnL against latency", none)
    note = "Estimate (dashed): every fill that crossed the spread is moved by what the mid did between its time and the time at which it "
    note += "would have come; the same orders fill, stops and targets stay. The mids are those at decisions. "
    note += (
        "Diamonds: whole backtests run again at that latency. "
        if rerun
        else ("Whole backtests at these latencies are run by python -m cift_strategies.report OUT --latencies 0,0.1,1,10. ")
    )
    whole = f"<h3>PnL against the latency of decisions and of orders</h3>{chart}<p class=note>{escape(note)}</p>"
    page.section("delay", HEADS["delay"], side_by_side(marks, late), whole)


def execution(page: Page, done: Finished) -> None:
    latency = done.summary.get("decision_latency_ms") or {}
    fig = charts.latency_figure(done.curve("latency")[1], real(latency.get("p50")), real(latency.get("p99")))
    left = page.figure(fig, "histogram of decision latency", "No decisions, so no latencies.")
    right = page.figure(charts.slippage_figure(done.fills), "histogram of slippage", "No fills, so no slippage.")
    cur = done.currency
    paid = [(r, count(n), number(mean, 3, "ticks", sign=True), number(sum_, 2, cur, sign=True)) for r, n, mean, sum_ in done.slippage]
    orders = done.summary.get("order_latency_ms")
    waits = {"decision, p50": latency.get("p50"), "decision, p99": latency.get("p99"), "order to market": orders}
    times = [(name, small(v, "ms")) for name, v in waits.items()]
    slip = table(["fills", "number", "mean slippage", "paid"], paid, [len(paid) - 1])
    tables = side_by_side(table(["latency charged", ""], times), slip)
    page.keep("slippage", [{"role": r, "fills": n, "mean_ticks": mean, "money": sum_} for r, n, mean, sum_ in done.slippage])
    page.section("execution", HEADS["execution"], side_by_side(left, right), tables, _orders(page, done), _stages(page, done))


def _stages(page: Page, done: Finished) -> str:
    """Where the time of a live session went, by the wall, and how long the models' queue was."""
    live = done.summary.get("live") or {}
    measured = [s for s in live.get("stages") or () if s["count"]]
    head = "<h3>Where the time went, measured</h3>"
    if not measured:
        why = "No stage was measured: no prediction came." if live else (
            "A backtest draws its latencies from those stored with the models; stages are measured in live sessions (run_live.py)."
        )  # fmt: skip
        return head + page.figure(None, "", why)
    named = ("p50_ms", "p99_ms", "p999_ms", "max_ms")
    page.keep("stages", [{k: s[k] for k in ("stage", "count", *named)} for s in measured])
    rows = [(STAGES.get(s["stage"], s["stage"]), count(s["count"]), *(small(s[k]) for k in named)) for s in measured]
    queue, deep = live.get("queue") or {}, ("p50", "p99", "p999", "max")
    page.keep("queue", [{"of": "events waiting", **queue}, *({"of": k, "count": live.get(k)} for k in ("skipped", "lost"))])
    if queue.get("count"):
        rows.append(("events waiting when the models took the next ones (number)", count(queue["count"]), *(count(queue[k]) for k in deep)))
    told = f"{count(live.get('skipped'))} predictions were skipped because a newer one of the same instrument was there already; "
    told += f"{count(live.get('lost'))} events found no room in the queue."
    heads = ["stage, ms", "number", "median", "99 %", "99.9 %", "most"]
    return f'{head}{table(heads, rows)}<p class="note">{escape(told)}</p>'


def _orders(page: Page, done: Finished) -> str:
    """Time in the queue of entries that rested, and what became of orders."""
    got = done.execution.legs
    waited = (got.fills.ts - got.accepted)[got.maker & (got.fills.role == "entry") & (got.accepted >= 0)] / 1e9
    maker = got.maker & (got.fills.role != "entry") & (got.accepted >= 0)
    if not len(done.orders["ts"]):
        why = "Order events were not kept, so the time in the queue is not known."
    elif not len(done.fills):
        why = "No fills, so nothing waited."
    else:
        why = "No entry rested in the queue: all crossed the spread (settings: entry = cross)."
    queue = page.figure(money_charts.duration_figure(waited, "time in the queue (ms)", 1e-3, "ms"), "time in the queue", why)
    rest = (got.fills.ts - got.accepted)[maker] / 1e9
    if len(rest):
        queue += f'<p class="note">{count(len(rest))} fills of targets rested {number(float(np.median(rest)), 1, "s")} in the median.</p>'
    role, event = done.orders["role"], done.orders["event"]
    kinds = [k for k in ("Submitted", "Accepted", "Filled", "Canceled", "Rejected", "Denied", "Expired") if np.any(event == k)]
    rows = [(str(r), *(count(((role == r) & (event == k)).sum()) for k in kinds)) for r in dict.fromkeys(role.tolist())]
    page.keep(
        "orders", [{"role": r, **{k.lower(): int(((role == r) & (event == k)).sum()) for k in kinds}} for r in dict.fromkeys(role.tolist())]
    )
    refused = [k for k, v in (done.summary.get("order_events") or {}).items() if k in ("OrderRejected", "OrderDenied") and v]
    told = {k: done.summary["order_events"][k] for k in refused}
    said = (
        "No order was rejected or denied."
        if not refused
        else f"Refused: {', '.join(f'{words(k[5:].lower())} {count(v)}' for k, v in told.items())}."
    )
    table_ = table(["order events", *[k.lower() for k in kinds]], rows) if kinds else page.figure(None, "", "No order events were kept.")
    return side_by_side(f"<h3>Time in the queue of entries</h3>{queue}", f"<h3>What became of orders</h3>{table_}<p>{escape(said)}</p>")


def risk(page: Page, done: Finished) -> None:
    """Exposure, holding times, the order of trades, capacity."""
    if not len(done.positions["net"]):
        page.section("risk", HEADS["risk"], page.figure(None, "", "Nothing was traded, so nothing was at risk."))
        return
    cur, e, p = done.currency, attribution.exposure(done), done.positions
    held = page.figure(
        money_charts.exposure_figure(e.curve, done.traded_span, cur), "exposure over time", "Nothing was held in this currency."
    )
    seconds = (np.asarray(p["closed"], np.int64) - np.asarray(p["opened"], np.int64)) / 1e9
    times = page.figure(money_charts.duration_figure(seconds, "holding time (s)"), "holding times", "No holding time is known.")
    shuffled = resampling.shuffled_drawdowns(np.asarray(p["net"], np.float64))
    luck = page.figure(
        money_charts.shuffle_figure(shuffled, cur), "drawdowns of other orders of the same trades", "No order of the trades has a drawdown."
    )
    room, known = _capacity(done)
    lacks = (
        "The volume of the market was not recorded for this run."
        if not known
        else "Nothing is earned at any size, so there is no capacity."
    )
    bears = page.figure(money_charts.capacity_figure(room, cur), "net PnL against size", lacks)
    hit, n = done.summary.get("hit_rate"), len(p["net"])
    low, high = attribution.wilson(round((hit or 0) * n), n)
    rows = [
        ("time in the market", percent(e.in_market)),
        ("gross notional, mean and peak", f"{money(e.mean, cur, digits=0)}, {money(e.peak, cur, digits=0)}"),
        ("of it long", percent(e.long)),
        (
            "turnover",
            f"{money(e.traded, cur, digits=0)}, {number(e.turnover, 2)} times the capital an hour",
        ),
        ("hit rate, 95 % interval", f"{percent(hit)}, {percent(low)} to {percent(high)}"),
        ("holding time, 5 / 25 / 50 / 75 / 95 %", " / ".join(small(v) for v in e.holding_s) + " s"),
    ]
    quantiles = np.quantile(shuffled.draws, [0.05, 0.5, 0.95])
    other = [
        ("largest drawdown of closed trades", money(shuffled.actual, cur)),
        ("in other orders: 5 / 50 / 95 %", " / ".join(number(v, 2) for v in quantiles)),
        ("orders that are as bad or worse", percent(shuffled.worse)),
        ("impact at the size traded, by the model", money(room.impact, cur) if known else DASH),
        ("most is earned at", f"{small(room.best)} times the size" if np.isfinite(room.best) else DASH),
        ("nothing is earned from", f"{small(room.zero)} times the size on" if np.isfinite(room.zero) else DASH),
        ("its gross notional at the peak", money(room.zero * e.peak, cur, digits=0) if np.isfinite(room.zero) else DASH),
    ]  # fmt: skip
    page.keep("exposure", [{**{k: v for k, v in e._asdict().items() if k not in ("curve", "holding_s")}, "holding_s": e.holding_s}])
    page.keep(
        "trade_order", [{"actual": shuffled.actual, "q05": quantiles[0], "q50": quantiles[1], "q95": quantiles[2], "worse": shuffled.worse}]
    )
    page.keep("capacity", [{"impact": room.impact, "best": room.best, "zero": room.zero, "prefactor": PREFACTOR}])
    law = f"Capacity by the square-root law: a fill of Q units costs Y sigma sqrt(Q / V) a unit, Y = {PREFACTOR:g}, sigma and V the "
    law += "volatility of the mid and the volume traded over the run. The fills made bear the impact of their size already; larger ones "
    law += "pay the difference."
    first = side_by_side(f"<h3>Exposure</h3>{held}", f"<h3>Holding times</h3>{times}")
    shuffles = f"<h3>The same trades in {count(len(shuffled.draws))} other orders</h3>{luck}"
    second = side_by_side(shuffles, f"<h3>Capacity</h3>{bears}")
    page.section(
        "risk",
        HEADS["risk"],
        first,
        second,
        side_by_side(table([], rows, kind="plain"), table([], other, kind="plain")),
        f'<p class="note">{escape(law)}</p>',
    )


def _capacity(done: Finished) -> tuple[Capacity, bool]:
    """The estimate, and whether the market's volume is known."""
    f, told = done.fills, (done.summary.get("diagnostics") or {}).get("market") or {}
    sigma, volume = np.full(len(f), np.nan), np.zeros(len(f))
    for name in dict.fromkeys(f.instrument.tolist()):
        own, (ts, mid) = f.instrument == name, done.curve("mid", name)
        start, end = done.traded_span
        inside = mid[(ts >= start) & (ts <= end) & np.isfinite(mid)]
        if done.facts["instruments"][name]["currency"] == done.currency and len(inside) > 2:
            sigma[own] = float(np.sqrt(np.sum(np.diff(inside[:: max(1, len(inside) // 500)]) ** 2))) / f.tick[own]
            volume[own] = float((told.get(name) or {}).get("volume") or 0.0)
    net = float(np.nan_to_num(done.money(done.summary.get("pnl_net"))))
    return capacity(net, f.size, f.tick_value, sigma, volume), bool((volume > 0).any())


def sharpe(page: Page, done: Finished) -> None:
    """Sharpe ratio, its errors, and what resampling says of the money."""
    step, d = done.sharpe
    if not d.defined:
        page.section(
            "sharpe",
            HEADS["sharpe"],
            page.figure(None, "", f"Not defined: {count(d.observations)} changes of equity, or all of them equal."),
        )
        return
    one = "1: this run was not chosen among others" if d.trials == 1 else count(d.trials)
    never = "never: the ratio is not above zero"
    rows = [
        (f"Sharpe ratio per {step}", number(d.ratio, 4, sign=True)),
        ("standard error (Mertens 2002)", number(d.error, 4)),
        ("standard error were returns normal (Lo 2002)", number(d.error_normal, 4)),
        ("observations", count(d.observations)),
        ("skew", number(d.skew, 2)),
        ("kurtosis (normal: 3)", number(d.kurtosis, 2)),
        ("probabilistic Sharpe ratio", probability(d.probabilistic)),
        ("observations for 0.95 of it", count(d.least) if np.isfinite(d.least) else never),
        ("trials", one),
        ("best ratio expected of so many trials without skill", number(d.expected_best, 4)),
        ("deflated Sharpe ratio", f"{probability(d.deflated)}{'' if d.deflated >= 0.95 else ', below 0.95: skill is not shown'}"),
    ]
    page.keep("sharpe", [{"step": step, **d._asdict()}])
    changes = done.steps[1]
    told = resampling.bootstrap(changes, {
        "net PnL": lambda v: np.asarray(v.sum(axis=-1)), f"Sharpe ratio per {step}": resampling.ratio,
        "largest drawdown": lambda v: resampling.deepest(np.cumsum(v, axis=-1)),
        f"share of steps that gain, of those that move (a {step})": resampling.gaining,
    })  # fmt: skip
    page.keep("bootstrap", [{"statistic": k, "value": v, "low": low, "high": high} for k, (v, low, high) in told.items()])
    drawn = [(k, small(v), f"{small(low)} to {small(high)}") for k, (v, low, high) in told.items()]
    mean, low, high = done.per_position
    drawn.append(("mean net per round trip (batch means)", small(mean), f"{small(low)} to {small(high)}"))
    right = "<h3>Block-bootstrap intervals</h3>" + table(["", "value", "95 % interval"], drawn)
    right += f'<p class="note">Stationary bootstrap (Politis and Romano 1994) of the equity\'s change per {escape(step)}, blocks of '
    right += f"{number(len(changes) ** (1 / 3), 0)} steps in the mean, {count(resampling.DRAWS)} draws.</p>"
    page.section("sharpe", HEADS["sharpe"], side_by_side(table([], rows, [10], "plain"), right))
