"""The sections of the report's page: what is said about a finished run, in which order, and how numbers are written.

Takes a :class:`Finished`, gives HTML on a :class:`Page`. Every text that comes from data is escaped; every section copes with no data and
says what is missing. When a result is not significant, the page says so first.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, Final, NamedTuple

import numpy as np

from cift_strategies import charts
from cift_strategies.finished import DELAYS_NS, HORIZONS, Finished, instant
from cift_strategies.page import DASH, Page, count, exact, money, number, percent, probability, side_by_side, small, table, words
from cift_strategies.tearsheet import tearsheet

NOT_SHOWN: Final = "no skill beyond the baseline is shown"
NAN: Final = float("nan")

HEADS: Final = {  # anchor -> link, title, what the reader looks at
    "equity": (
        "Equity",
        "Equity and drawdown, beside the plain rule",
        "Money after fees, open positions at the mid. The rule trades on order flow imbalance alone, through the same execution: what lies "
        "between the two lines is what the models add.",
    ),
    "scores": (
        "Scores",
        "Forecasts beside baselines",
        "Out of sample. Gain is the log-loss saved against the best baseline (persistence, time of day, level-1 logistic regression), with "
        "block-bootstrap intervals: one that reaches zero shows nothing. Pays: moves larger than the spread. Net ticks: mean signed move "
        "of the decisions with a direction, less the spread.",
    ),
    "price": (
        "Price",
        "Price, fills and regimes",
        "The mid with every fill and round trip; the ribbon below is the regime timeline. Drag to zoom, double-click to go back.",
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
    "calibration": (
        "Calibration",
        "Calibration",
        "The ensemble's probabilities of up and of down moves, all instruments together, against how often these came: on the diagonal a "
        "forecast means what it says. ECE is the expected calibration error; bins with fewer than 20 forecasts are not drawn.",
    ),
    "execution": (
        "Execution",
        "Latency and slippage",
        "Latency runs from the newest event a decision saw to its delivery. Slippage is what a fill paid: entries against the mid when "
        "they were decided (half the spread, what moved meanwhile, what size cost), exits against the mid of the moment; negative is "
        "better than the mid.",
    ),
    "ensemble": (
        "Ensemble",
        "Ensemble weights and regret",
        "Left: the weight at the end of each member that voted, in each regime that was seen. Right: regret, the log-loss that the mixture "
        "lost against each single member over the same decisions (below zero: it did better), with the proven bound.",
    ),
    "sharpe": (
        "Sharpe",
        "Deflated Sharpe ratio",
        "The probability that the true Sharpe ratio is above zero, once the length and the shape of the sample and the number of "
        "strategies tried are counted in (Bailey and Lopez de Prado 2014). Not annualised: the sample is too short for that.",
    ),
    "quality": (
        "Quality",
        "Data quality, decisions, and what was left out",
        "Records are counted while they are read; none is dropped in silence.",
    ),
    "tearsheet": ("Tearsheet", "NautilusTrader tearsheet", "Nautilus's own statistics and charts of the same run."),
    "again": (
        "Digest",
        "How to make this run again",
        "The digest is the SHA-256 over all order events in order; the same input, seed and device give the same digest.",
    ),
}


# What the run shows, in words.


class Gain(NamedTuple):
    """How far the ensemble is ahead of the best baseline out of sample, in log-loss, with its 95 % interval."""

    label: str  # instrument and horizon
    over: str  # the baseline that leaves the least gain
    mean: float
    low: float
    high: float
    enough: bool  # 100 effective labels or more


def gains(summary: Mapping[str, Any]) -> list[Gain]:
    """One :class:`Gain` for each row of `summary["scores"]["table"]` (see cift_models.validate.evaluate) that has baselines."""
    out = []
    for r in (summary.get("scores") or {}).get("table") or ():
        over = {name: g for name, g in (r.get("gain") or {}).items() if g.get("mean") is not None}
        if over:
            name = min(over, key=lambda n: over[n]["mean"])
            low, high = over[name]["interval"]
            enough = r.get("verdict") == "sufficient"
            out.append(Gain(f"{r['instrument']} {r['horizon']}", name, over[name]["mean"], _float(low), _float(high), enough))
    return out


def claims(summary: Mapping[str, Any]) -> list[str]:
    """Instrument and horizon of each case in which the scores allow to say that the ensemble beats every baseline."""
    return [str(c).partition(":")[0] for c in (summary.get("scores") or {}).get("claims") or ()]


def _float(value: Any) -> float:
    return NAN if value is None else float(value)


def verdict(done: Finished) -> tuple[str, list[str]]:
    """Tone (good, bad or empty) and the sentences that say what the run shows and what it does not."""
    s, cur = done.summary, done.currency
    found, shown = gains(s), claims(s)
    if not found:
        first = f"Nothing could be scored out of sample: {NOT_SHOWN}."
    elif not shown:
        first = f"Out of sample {NOT_SHOWN}: in no case do all gains in log-loss lie above zero by Holm-adjusted tests."
    else:
        named = ", ".join(shown[:6]) + (" and more" if len(shown) > 6 else "")
        first = f"Out of sample the ensemble beats every baseline in {len(shown)} of {sum(g.enough for g in found)} cases: {named}."
    mean, low, high = done.per_position
    if math.isfinite(low):
        around = f"{number(low, 4, sign=True)} to {number(high, 4, sign=True)}"
        interval = f"{number(mean, 4, cur, sign=True)} a round trip, 95 % interval {around}"
        if low > 0:
            second = f"It earned money after costs: {interval}."
        elif high < 0:
            second = f"It lost money after costs: {interval}."
        else:
            second = f"A profit after costs is not shown: {interval}."
    elif len(done.positions["net"]):
        second = "There are too few round trips to tell skill in trading from luck."
    else:
        second = "Nothing was traded, so nothing is shown about money."
    lines = [first, second]
    rule = done.rule
    if rule:
        made, plain = (money(told.get("pnl_net"), cur, sign=True) for told in (s, rule))
        lines.append(f"The plain rule on order flow imbalance, through the same execution, made {plain}; the ensemble {made}.")
    left = done.left_out
    if left:
        lines.append(f"Left out: {'; '.join(left[:3])}{'; and more, see below' if len(left) > 3 else ''}.")
    if done.unsure:
        lines.append(f"Nothing is claimed where independent labels are too few: {len(done.unsure)} cases, named below.")
    return ("good" if shown and low > 0 else "bad" if high < 0 else ""), lines


# The sections, in the order of the page.


def headline(page: Page, done: Finished) -> None:
    s, cur = done.summary, done.currency
    tone, lines = verdict(done)
    page.add(f'<section class="verdict {tone}" id="verdict">' + "".join(f"<p>{escape(t)}</p>" for t in lines) + "</section>")
    trips, hit = len(done.positions["net"]), s.get("hit_rate")
    cost, (_, sharpe) = done.costs, done.sharpe
    half = 196 * math.sqrt(hit * (1 - hit) / trips) if trips and hit is not None else None
    pnl, worth, latency = s.get("pnl_net"), done.money(s.get("pnl_net")), s.get("decision_latency_ms") or {}
    p50, p99 = latency.get("p50"), latency.get("p99")
    colour = "up" if worth > 0 else "down" if worth < 0 else ""
    cells: list[tuple[str, str, Any, str, str]] = [
        ("PnL net of fees", "pnl_net", pnl, money(pnl, cur, sign=True), f"fees {money(s.get('fees'), cur)}"),
        ("Maximum drawdown", "max_drawdown", s.get("max_drawdown"), money(s.get("max_drawdown"), cur), "open positions at the mid"),
        ("Fills", "fills", s.get("fills"), count(s.get("fills")), f"{count(s.get('orders'))} orders, {count(trips)} round trips"),
        ("Hit rate", "hit_rate", hit, percent(hit), f"of round trips{'' if half is None else f', \u00b1 {number(half, 1)} points'}"),
        ("Break-even cost", "break_even_cost_ticks", s.get("break_even_cost_ticks"), number(s.get("break_even_cost_ticks"), 2, "ticks"),
         f"per unit, there and back; paid {number(cost.paid_ticks, 2)}"),
        ("Decision latency", "decision_latency_p50", p50, f"{small(p50)} / {small(p99)} ms", "p50 / p99, event to delivery"),
        ("Deflated Sharpe ratio", "deflated_sharpe", sharpe.deflated if sharpe.defined else None, probability(sharpe.deflated),
         f"probability of skill, {sharpe.trials} trial{'s' if sharpe.trials > 1 else ''}"),
        ("Events streamed", "events_streamed", s.get("events_streamed"), count(s.get("events_streamed")),
         f"{count(s.get('events_per_second'))} a second; {count(s.get('predictions'))} predictions"),
    ]  # fmt: skip
    html = []
    for name, key, value, shown, below in cells:
        look = colour if key == "pnl_net" else ""
        html.append(f'<div class="card {look}"><b>{name}</b>{exact(key, value, shown)}<small>{escape(below)}</small></div>')
    page.add('<div class="cards">' + "".join(html) + "</div>")


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
    curves = {"ensemble": done.equity("ensemble"), "OFI rule": done.equity("rule")}
    fig = charts.equity_figure(curves, done.currency)
    chart = page.figure(fig, "net PnL and drawdown over time", "No equity curve.")
    rule = done.rule
    rows = [(name, show(done.summary.get(key)), show(rule.get(key))) for name, key, show in money_rows(done.currency)]
    page.section("equity", HEADS["equity"], chart, table(["", "ensemble", "OFI rule"], rows, kind="fit"))


def scores(page: Page, done: Finished) -> None:
    rows = (done.summary.get("scores") or {}).get("table") or []
    found = gains(done.summary)
    chart = page.figure(charts.gain_figure(found), "gain in log-loss over the best baseline", "No gain over a baseline could be computed.")
    best = {g.label: g for g in found}
    short: list[tuple[str, ...]] = []
    full: list[tuple[str, ...]] = []
    lead: list[int] = []
    for r in rows:
        case = (str(r["instrument"]), str(r["horizon"]))
        g, e, d = best.get(" ".join(case)), r.get("ensemble") or {}, r.get("decided") or {}
        gain = f"{number(g.mean, 4, sign=True)} [{number(g.low, 4, sign=True)}, {number(g.high, 4, sign=True)}]" if g else DASH
        labels = f"{count(r.get('effective'))}{'' if r.get('verdict') == 'sufficient' else ', insufficient'}"
        skill = (number(e.get("log_loss"), 4), gain, g.over if g else DASH)
        money = (percent(r.get("pays")), percent(d.get("cover")), percent(d.get("hit_rate")), number(d.get("net_ticks"), 2, sign=True))
        short.append((*case, *skill, *money, labels))
        for kind in ("ensemble", "members", "baselines"):
            part = {"ensemble": r.get(kind)} if kind == "ensemble" else r.get(kind) or {}
            for name, m in part.items():
                lead += [len(full)] if kind == "ensemble" else []
                m = m or {}
                f1 = (number(m.get("macro_f1"), 3), number(m.get("weighted_f1"), 3))
                figures = (number(m.get("log_loss"), 4), *f1, percent(m.get("ece"), 2))
                full.append((*case, words(name), *figures, percent(m.get("cover", 1.0) if m else None), count(r.get("n"))))
    head = ["instrument", "horizon", "log-loss", "gain [95 %]", "best baseline", "pays", "decided", "hit rate", "net ticks", "eff. labels"]
    heads = ["instrument", "horizon", "model", "log-loss", "macro F1", "weighted F1", "ECE", "votes", "labels"]
    every = f"<details><summary>every model and baseline</summary>{table(heads, full, lead)}</details>" if full else ""
    page.section("scores", HEADS["scores"], chart, table(head, short), every)


def prices(page: Page, done: Finished) -> None:
    regimes, p = [words(r) for r in done.facts["regime_names"]], done.positions
    panels = {}
    for name, facts in done.facts["instruments"].items():
        own = np.flatnonzero(p["instrument"] == name)
        trips = np.column_stack([np.asarray(p[k], np.float64)[own] for k in ("opened", "closed", "entry", "exit", "net")])
        ribbon = done.curve("regime", name)
        mid, fills, decimals = done.curve("mid", name), done.fills.of(name), int(facts["decimals"])
        marks = [(int(r["ts"]), f"roll from {r['from']} to {r['to']}") for r in done.rolls if name in (r["from"], r["to"])]
        fig = charts.price_figure(mid, fills, trips, ribbon, regimes, done.traded_span, decimals, marks)
        panels[name] = page.figure(fig, f"price of {name} with fills and regimes", f"{name}: no price was seen in the traded range.")
    named = [(-1, "unknown"), *enumerate(regimes)]
    colours = "".join(f'<span><i style="background:{charts.regime_colour(i, n)}"></i>{escape(n)}</span>' for i, n in named)
    key = f'<div class="key">{colours}</div>' if regimes else ""
    rolls = table(["roll of", "at", "from", "to"], [(r["underlying"], f"{instant(r['ts'])} UTC", r["from"], r["to"]) for r in done.rolls])
    page.section("price", HEADS["price"], page.choice("price", "instrument", panels), key, rolls, _by_regime(done, regimes))


def _by_regime(done: Finished, names: Sequence[str]) -> str:
    """Time, round trips and money by regime, and how round trips ended."""
    cur, p, net, time = done.currency, done.positions, np.asarray(done.positions["net"], np.float64), done.regime_seconds
    at = np.asarray(p["regime"], np.int64)

    def line(label: str, own: Any, *before: str) -> tuple[str, ...]:
        hit = float((net[own] > 0).mean()) if own.any() else None
        mean = float(net[own].mean()) if own.any() else None
        return (label, *before, count(own.sum()), percent(hit), number(mean, 4, sign=True), number(net[own].sum(), 2, cur, sign=True))

    kinds = [i for i in (*range(len(names)), -1) if time[i] or (at == i).any()]
    rows = [line(names[i] if i >= 0 else "unknown", at == i, percent(time[i] / time.sum() if time.sum() else None)) for i in kinds]
    left = table(["regime at entry", "time", "round trips", "hit rate", "mean net", "net PnL"], rows)
    ends = [line(words(how), p["closed_by"] == how) for how in dict.fromkeys(p["closed_by"].tolist())]
    return side_by_side(left, table(["closed by", "round trips", "hit rate", "mean net", "net PnL"], ends))


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
    late = page.figure(charts.late_figure(DELAYS_NS, left, done.costs.paid_ticks, 1e6 * _float(p50)), "move left after a delay", absent)
    reruns = charts.rerun_figure(done.facts["latency_curve"], done.currency)
    whole = f"<h3>Whole backtests, run again at other latencies</h3>{page.figure(reruns, 'net PnL against latency')}" if reruns else ""
    page.section("delay", HEADS["delay"], side_by_side(marks, late), whole)


def calibration(page: Page, done: Finished) -> None:
    chart = page.figure(charts.calibration_figure(done.reliability), "reliability diagram", "No forecast with a known outcome.")
    rows = []
    for h, r in done.reliability.items():
        n = r.number.sum()
        rows.append((h, percent(r.ece, 2), count(n), percent(r.forecast @ r.number / n), percent(r.frequency @ r.number / n)))
    head = ["horizon", "ECE", "forecasts", "mean forecast", "frequency"]
    page.section("calibration", HEADS["calibration"], chart, table(head, rows, kind="fit"))


def execution(page: Page, done: Finished) -> None:
    latency = done.summary.get("decision_latency_ms") or {}
    fig = charts.latency_figure(done.curve("latency")[1], _float(latency.get("p50")), _float(latency.get("p99")))
    left = page.figure(fig, "histogram of decision latency", "No decisions, so no latencies.")
    right = page.figure(charts.slippage_figure(done.fills), "histogram of slippage", "No fills, so no slippage.")
    cur = done.currency
    paid = [(r, count(n), number(mean, 3, "ticks", sign=True), number(sum_, 2, cur, sign=True)) for r, n, mean, sum_ in done.slippage]
    orders = done.summary.get("order_latency_ms")
    waits = {"decision, p50": latency.get("p50"), "decision, p99": latency.get("p99"), "order to market": orders}
    times = [(name, small(v, "ms")) for name, v in waits.items()]
    slip = table(["fills", "number", "mean slippage", "paid"], paid, [len(paid) - 1])
    tables = side_by_side(table(["latency charged", ""], times), slip)
    page.section("execution", HEADS["execution"], side_by_side(left, right), tables)


def ensemble(page: Page, done: Finished) -> None:
    e = done.summary.get("regret") or {}
    names, members = [words(r) for r in e.get("regimes", ())], [str(m) for m in e.get("members", ())]
    horizons = [str(h) for h in e.get("horizons", HORIZONS)]
    shape = (len(names), len(horizons), len(members))
    told = {k: np.asarray(e.get(k) or np.zeros(shape), np.float64) for k in ("weights", "regret", "bound", "awake")}
    voted, seen = told["awake"].sum(axis=(0, 1)) > 0, told["awake"].sum(axis=(1, 2)) > 0  # members, regimes
    members, names = [m for m, v in zip(members, voted) if v], [r for r, v in zip(names, seen) if v]
    weights, regret, bound = (told[k][seen][:, :, voted] for k in ("weights", "regret", "bound"))
    weights = weights / np.maximum(weights.sum(axis=2, keepdims=True), 1e-300)  # members that are not there hold weight too
    panels = {}
    for j, h in enumerate(horizons) if weights.size else ():
        panels[h] = page.figure(charts.weight_figure(names, members, weights[:, j]), f"weights by regime and member, {h}")
    left = page.choice("weights", "horizon", panels) if panels else page.figure(None, "", "No weights were recorded for this run.")
    fig, said = None, ""
    if regret.size:
        total, limit = regret.sum(axis=0), bound.sum(axis=0)
        fig = charts.regret_figure([f"{h}, {m}" for h in horizons for m in members], total.ravel(), limit.ravel())
        held, worst = int((total <= limit + 1e-9).sum()), number(float(total.max()), 2)
        said = f'<p class="note">Regret lies within its bound in {held} of {total.size} cases; the largest is {worst} nats.</p>'
    right = page.figure(fig, "regret against each member", "No regret was recorded for this run.")
    page.section("ensemble", HEADS["ensemble"], side_by_side(left, right + said))


def sharpe(page: Page, done: Finished) -> None:
    step, d = done.sharpe
    if not d.defined:
        body = page.figure(None, "", f"Not defined: {count(d.observations)} changes of equity, or all of them equal.")
    else:
        rows = [
            (f"Sharpe ratio per {step}", number(d.ratio, 4, sign=True)),
            ("observations", count(d.observations)),
            ("skew", number(d.skew, 2)),
            ("kurtosis (normal: 3)", number(d.kurtosis, 2)),
            ("trials", count(d.trials)),
            ("best ratio expected of so many trials without skill", number(d.expected_best, 4)),
            ("deflated Sharpe ratio", f"{probability(d.deflated)}{'' if d.deflated >= 0.95 else ', below 0.95: skill is not shown'}"),
        ]
        body = table([], rows, [6], "plain")
    page.section("sharpe", HEADS["sharpe"], body)


def quality(page: Page, done: Finished) -> None:
    s = done.summary
    kinds = [(words(k), count(v)) for k, v in (s.get("data_quality") or {}).items() if isinstance(v, int | float)]
    data = table(["kind", "records"], kinds) or '<p class="note">no fault was found</p>'
    reasons = sorted((s.get("decisions") or {}).items(), key=lambda r: -float(r[1]))
    why = table(["decision", "number"], [(words(k), count(v)) for k, v in reasons]) or '<p class="note">not recorded</p>'
    few = f"claims about {', '.join(done.unsure)}: fewer than 100 labels that do not overlap"
    left = "".join(f"<li>{escape(t)}</li>" for t in [*done.left_out, *([few] if done.unsure else [])] or ["nothing"])
    right = f"<h3>Why decisions became trades or did not</h3>{why}<h3>Left out, and why</h3><ul>{left}</ul>"
    page.section("quality", HEADS["quality"], side_by_side(f"<h3>Data quality</h3>{data}", right))


def nautilus(page: Page, done: Finished) -> None:
    if not done.facts.get("nautilus"):
        return
    chart = page.figure(tearsheet(done, "nautilus"), "NautilusTrader tearsheet", dark=tearsheet(done, "nautilus_dark"), wide=True)
    page.section("tearsheet", HEADS["tearsheet"], f'<div class="scroll">{chart}</div>')


def command_of(config: Mapping[str, Any]) -> str:
    """The command line that asks for a run with this configuration; what is not given or at its default is not said."""
    said = ["python", "-m", "uv", "run", "run_backtest.py"]
    for path in config.get("dbn") or ():
        said += ["--dbn", str(path)]
    if config.get("symbols"):
        said += ["--symbols", ",".join(config["symbols"])]
    for name in ("catalog", "instruments", "start", "end", "train_fraction", "artifacts", "latency_ms", "device", "seed"):
        if config.get(name) not in (None, "auto"):
            said += [f"--{name.replace('_', '-')}", str(config[name])]
    return shlex.join(said)


def again(page: Page, done: Finished) -> None:
    s, config = done.summary, done.facts["config"]
    rows = [
        ("digest", str(s.get("digest") or DASH)),
        ("seed", str(s.get("seed", config.get("seed", DASH)))),
        ("versions", ", ".join(f"{k} {v}" for k, v in (s.get("versions") or {}).items())),
        ("wall time", number(s.get("wall_seconds"), 1, "s")),
        ("events read", count(s.get("events"))),
        ("feature vectors", count(s.get("feature_vectors"))),
        ("errors in callbacks", count(s.get("callback_errors"))),
    ]
    command = f"<pre>{escape(command_of(config))}</pre>"
    settings = f"<details><summary>configuration</summary><pre>{escape(json.dumps(config, indent=2))}</pre></details>"
    page.section("again", HEADS["again"], command, table([], rows, kind="plain"), settings)


SECTIONS: Final = (
    headline, equity, scores, prices, against_costs, against_delay, calibration, execution, ensemble, sharpe, quality, nautilus, again,
)  # fmt: skip
