"""The sections of the report's page: what is said about a finished run, in which order, and how numbers are written.

Takes a :class:`Finished`, gives HTML on a :class:`Page`. Every text that comes from data is escaped; every section copes with no data and
says what is missing. When a result is not significant, the page says so first.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

import numpy as np

from cift_strategies import charts
from cift_strategies.finished import Finished, instant
from cift_strategies.model_sections import calibration, claims, ensemble, gains, market, members, scores
from cift_strategies.money_sections import against_costs, against_decision, against_delay, by_group, equity, execution, risk, sharpe
from cift_strategies.page import DASH, Page, count, exact, money, number, percent, probability, side_by_side, small, table, words
from cift_strategies.tearsheet import tearsheet

NOT_SHOWN: Final = "no skill beyond the baseline is shown"

HEADS: Final = {  # anchor -> link, title, what the reader looks at
    "price": (
        "Price",
        "Price, fills and regimes",
        "The mid with every fill and round trip; the ribbon below is the regime timeline. Drag to zoom, double-click to go back.",
    ),
    "quality": (
        "Quality",
        "Data quality, decisions, and what was left out",
        "Records are counted while they are read; none is dropped in silence.",
    ),
    "tearsheet": (
        "Tearsheet",
        "NautilusTrader tearsheet",
        "Nautilus's own statistics and charts of the same run. Nan: it takes returns by the day, of which there are too few.",
    ),
    "again": (
        "Digest",
        "How to make this run again",
        "The digest is the SHA-256 over all order events in order; the same input, seed and device give the same digest.",
    ),
}


# What the run shows, in words.


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
    lines += [f"{note[0].upper()}{note[1:]}." for note in s.get("notes") or ()]
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


TOLD: Final = (
    "catalog", "instruments", "start", "end", "train_fraction", "artifacts", "altdata", "latency_ms", "device", "seed",
)  # fmt: skip


def command_of(config: Mapping[str, Any]) -> str | None:
    """The command line that asks for a run with this configuration; what is not given or at its default is not said. None where it needs a
    setting for which there is no option."""
    from cift_strategies.backtest import RunConfig

    usual = RunConfig.model_validate({}).model_dump(mode="json")
    options = {*TOLD, "dbn", "polygon", "symbols", "databento", "record_schema", "out"}
    if any(config.get(k, v) != v for k, v in usual.items() if k not in options):
        return None
    said = ["python", "-m", "uv", "run", "run_backtest.py"]
    for path in config.get("dbn") or ():
        said += ["--dbn", str(path)]
    for name in ("polygon", "symbols"):
        if config.get(name):
            said += [f"--{name}", ",".join(config[name])]
    if config.get("databento"):
        said += ["--databento", str(config["databento"]), "--schema", str(config.get("record_schema", "mbo"))]
    for name in TOLD:
        if config.get(name) not in (None, "auto"):
            said += [f"--{name.replace('_', '-')}", str(config[name])]
    return shlex.join(said)


def toml(values: Mapping[str, Any], path: str = "") -> str:
    """Settings as TOML; what is None is left out. Strings, numbers and lists are written in JSON's way, which is TOML's too."""
    plain, tables = [], []
    for name, v in values.items():
        key = name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else json.dumps(name)
        if isinstance(v, Mapping):
            inner = f"{path}.{key}" if path else key
            tables.append(f"\n[{inner}]\n{toml(v, inner)}")
        elif v is not None:
            plain.append(f"{key} = {json.dumps(v)}\n")
    return "".join(plain + tables)


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
    if seen := s.get("trained_on"):
        rows.append(("models trained on", f"{instant(seen['start'])} to {instant(seen['end'])} UTC"))
    live = bool(s.get("live"))
    script = "run_live.py" if live else "run_backtest.py"
    page.files["config.toml"] = toml({("schema" if k == "record_schema" else k): v for k, v in config.items() if k not in ("out", "state")})
    every = f"python -m uv run {script} --config OUT/config.toml"
    short = None if live else command_of(config)
    command = f"<pre>{escape(short or every)}</pre>"
    command += "" if short is None else f"<p>or, with every setting as it was: <code>{every}</code></p>"
    settings = f"<details><summary>configuration</summary><pre>{escape(json.dumps(config, indent=2))}</pre></details>"
    page.section("again", HEADS["again"], command, table([], rows, kind="plain"), settings)


SECTIONS: Final = (
    headline, equity, against_decision, by_group, against_costs, against_delay, sharpe, risk, scores, calibration, members, ensemble,
    market, prices, execution, quality, nautilus, again,
)  # fmt: skip
