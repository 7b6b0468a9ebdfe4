"""The report's sections about the models: scores, calibration, agreement, drift, importance, regimes, lead-lag, residuals, the ensemble.

Takes a :class:`Finished`, gives HTML on a :class:`Page`; every section copes with no data and says what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any, Final, NamedTuple

import numpy as np

from cift_models.pooling import BOTH
from cift_strategies import charts, forecasts, model_charts
from cift_strategies.finished import HORIZONS, Finished
from cift_strategies.page import DASH, Page, count, number, percent, probability, real, side_by_side, small, table, words

HEADS: Final = {  # anchor -> link, title, what the reader looks at
    "members": (
        "Members",
        "What the members say and look at",
        "Agreement: how many more members lean one way than the other, against what the mid then did in that direction.",
    ),
    "market": (
        "Market",
        "Regimes, lead and lag, drift",
        "What the market was like while the models traded it, and how far that was from what they had learnt.",
    ),
    "scores": (
        "Scores",
        "Forecasts beside baselines",
        "Out of sample. Gain is the log-loss saved against the best baseline (persistence, time of day, level-1 logistic regression), with "
        "block-bootstrap intervals: one that reaches zero shows nothing. Pays: moves larger than the spread. Net ticks: mean signed move "
        "of the decisions with a direction, less the spread. Eff. labels: those that do not overlap.",
    ),
    "calibration": (
        "Calibration",
        "Calibration",
        "The ensemble's probabilities of up and of down moves, all instruments together, against how often these came: on the diagonal a "
        "forecast means what it says. ECE is the expected calibration error; bins with fewer than 20 forecasts are not drawn.",
    ),
    "ensemble": (
        "Ensemble",
        "Ensemble weights and regret",
        "Left: the weight at the end of each member that voted, in each regime that was seen. Right: regret, the log-loss that the mixture "
        "lost against each single member over the same decisions (below zero: it did better), with the proven bound.",
    ),
}


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
            out.append(Gain(f"{r['instrument']} {r['horizon']}", name, over[name]["mean"], real(low), real(high), enough))
    return out


def claims(summary: Mapping[str, Any]) -> list[str]:
    """Instrument and horizon of each case in which the scores allow to say that the ensemble beats every baseline."""
    return [str(c).partition(":")[0] for c in (summary.get("scores") or {}).get("claims") or ()]


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
    page.keep("scores", [_figures(r) for r in rows])
    page.section("scores", HEADS["scores"], chart, table(head, short), every)


def _figures(r: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table of scores without what is nested."""
    out = {k: r.get(k) for k in ("instrument", "horizon", "n", "effective", "verdict", "pays")}
    out |= {f"ensemble_{k}": v for k, v in (r.get("ensemble") or {}).items() if not isinstance(v, list)}
    return out | {f"gain_over_{n}": g.get("mean") for n, g in (r.get("gain") or {}).items()}


def calibration(page: Page, done: Finished) -> None:
    chart = page.figure(charts.calibration_figure(done.reliability), "reliability diagram", "No forecast with a known outcome.")
    rows = []
    for h, r in done.reliability.items():
        n = r.number.sum()
        rows.append((h, percent(r.ece, 2), count(n), percent(r.forecast @ r.number / n), percent(r.frequency @ r.number / n)))
    head = ["horizon", "ECE", "forecasts", "mean forecast", "frequency"]
    left = table(head, rows)
    told = (done.summary.get("scores") or {}).get("calibration") or []
    page.keep("calibration", told)
    lines: list[tuple[str, ...]] = []
    lead: list[int] = []
    for r in told:
        lead += [len(lines)] if r["model"] == "ensemble" else []
        lines.append(
            (str(r["horizon"]), words(r["model"]), *(percent(r.get(k), 2) for k in ("ece", "expected", "debiased")), small(r.get("p")))
        )
    tests = table(["horizon", "model", "ECE", "by chance", "debiased", "p"], lines, lead)
    note = "Over all three classes in equally filled bins: the error, how much of it a perfectly calibrated forecast would show on so few "
    note += "independent labels, what is left, and the probability of as large an error by chance."
    right = f"<h3>How much of the error is chance</h3>{tests}<p class=note>{note}</p>" if tests else ""
    counts = forecasts.confusion(done)
    page.keep(
        "confusion",
        [{"horizon": h, "came": forecasts.CLASSES[i], **dict(zip(forecasts.CLASSES, n[i]))} for h, n in counts.items() for i in range(3)],
    )
    panels = {h: page.figure(model_charts.confusion_figure(n), f"confusion, {h}") for h, n in counts.items()}
    absent = page.figure(None, "", "No forecast with a known outcome, so no confusion.")
    matrix = "<h3>Confusion: what came when each class was the likeliest</h3>"
    matrix += page.choice("confusion", "horizon", panels) if panels else absent
    page.section("calibration", HEADS["calibration"], chart, side_by_side(left + matrix, right))


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
    page.section("ensemble", HEADS["ensemble"], side_by_side(left, right + said), _over_time(page, done, horizons), _pool(e, horizons))


def _over_time(page: Page, done: Finished, horizons: list[str]) -> str:
    """Weights and regret along the stream, by horizon."""
    told = (done.summary.get("diagnostics") or {}).get("weights") or {}
    ts = np.asarray(told.get("ts") or [], np.int64)
    if not len(ts):
        return "<h3>Over time</h3>" + page.figure(None, "", "Weights were not recorded along this run.")
    weights, pool, regret, bound, both, limit = (
        np.asarray(told[k], np.float64) for k in ("weights", "pool", "regret", "bound", "pool_regret", "pool_bound")
    )
    there = [a for a in range(weights.shape[2]) if np.any(bound[-1, :, a] > 0)]
    panels = {}
    for j, h in enumerate(horizons):
        total = np.maximum(weights[:, j, there].sum(axis=1), 1e-300)
        w = {str(told["members"][a]): weights[:, j, a] / total for a in there}
        r = {str(told["members"][a]): regret[:, j, a] for a in there} | {name: both[:, j, b] for b, name in enumerate(BOTH)}
        b = {str(told["members"][a]): bound[:, j, a] for a in there} | {name: limit[:, j, b] for b, name in enumerate(BOTH)}
        label = f"weights over time, {h}"
        left = model_charts.over_time_figure(ts, w | {"pool, in the ensemble": pool[:, j]}, "weight", range=[-0.02, 1.02])
        right = model_charts.over_time_figure(ts, r, "regret (nats)", {k: v for k, v in b.items() if k in BOTH})
        panels[h] = side_by_side(page.figure(left, label, "No weights."), page.figure(right, f"regret over time, {h}", "No regret."))
    note = "Left: weights among the members that are there, mean over regimes, and the weight of the log-linear pool beside their mixture. "
    note += "Right: regret against each; the dotted lines are the bounds of the second Hedge, of mixture, pool and sharper pool."
    return f"<h3>Over time</h3><p class=note>{note}</p>" + page.choice("over", "horizon", panels)


def _pool(e: Mapping[str, Any], horizons: list[str]) -> str:
    """Regret of the ensemble against its mixture and its pools, with the bound."""
    told = e.get("pool") or {}
    if not told:
        return ""
    regret, bound = (np.asarray(told[k], np.float64).sum(axis=0) for k in ("regret", "bound"))
    rows = []
    for j, h in enumerate(horizons):
        for k, a in enumerate(told["against"]):
            within = "yes" if regret[j, k] <= bound[j, k] + 1e-9 else "no"
            rows.append((h, a, number(regret[j, k], 2, "nats", sign=True), number(bound[j, k], 2, "nats"), within))
    return "<h3>The ensemble against its mixture and its pools</h3>" + table(
        ["horizon", "against", "regret", "bound", "within"], rows, kind="fit"
    )


def members(page: Page, done: Finished) -> None:
    """Agreement against outcome, importance and Hawkes residuals: what the members do, and whether they fit."""
    agreed = forecasts.agreement(done)
    page.keep("agreement", [{"horizon": h, **r._asdict()} for h, rows in agreed.items() for r in rows])
    absent = "No votes with a known outcome were stored."
    chart = page.figure(model_charts.agreement_figure(agreed), "move in the members' direction against their agreement", absent)
    rows = [
        (h, str(r.members), count(r.number), percent(r.right), number(r.mean, 3, "ticks", sign=True))
        for h, told in agreed.items()
        for r in told
    ]
    left = "<h3>Agreement against outcome</h3>" + chart + table(["horizon", "members", "decisions", "right", "mean move"], rows)
    told = done.summary.get("importance") or {}
    page.keep("importance", [{"member": m, "horizon": h, **c} for m, by in told.items() for h, columns in by.items() for c in columns])
    panels = {}
    for member, by in told.items():
        for h, columns in by.items():
            fig = model_charts.importance_figure(sorted(columns, key=lambda c: -float(np.mean(c["shap"])))[:15])
            panels[f"{member}, {h}"] = page.figure(fig, f"importance of {member}, {h}", "It looks at nothing.")
    none = page.figure(None, "", "No member that took part can say what it looks at (only the trees can).")
    right = "<h3>Importance over time: share of mean |SHAP| in slices of the training range</h3>"
    right += page.choice("importance", "member and horizon", panels) if panels else none
    page.section("members", HEADS["members"], side_by_side(left, right), _hawkes(page, done))


def _hawkes(page: Page, done: Finished) -> str:
    told = (done.summary.get("diagnostics") or {}).get("hawkes")
    head = "<h3>Hawkes process: residual tests out of sample</h3>"
    if not told:
        why = (
            'No Hawkes process was trained for this run: name it with train = ["hawkes", ...] in --config.'
            if told is None
            else ("No instrument had a fitted Hawkes process and events enough to test it.")
        )
        return head + page.figure(None, "", why)
    rows, panels, kept = [], {}, []
    for name, types in told.items():
        panels[name] = page.figure(model_charts.residual_figure(types), f"residuals of {name}", f"{name}: too few events to test.")
        for kind, g in types.items():
            kept.append({"instrument": name, "type": kind, **{k: v for k, v in g.items() if k != "qq"}})
            tests = (number(g["ks"], 4), probability(real(g["ks_p"])), number(g["ljung_box"], 1), probability(real(g["ljung_box_p"])))
            rows.append((name, words(kind), count(g["events"]), *tests))
    page.keep("hawkes", kept)
    heads = ["instrument", "type", "events", "KS distance", "p", "Ljung-Box (20)", "p"]
    note = "Waiting times rescaled by the trained process are independent and Exp(1) where it is right (Ogata 1988). Small p: it is not."
    return head + f"<p class=note>{note}</p>" + side_by_side(page.choice("hawkes", "instrument", panels), table(heads, rows))


def market(page: Page, done: Finished) -> None:
    """What the market was like: regimes, who leads whom, and how far features have drifted from the training range."""
    names, span = [words(r) for r in done.facts["regime_names"]], done.traded_span
    ribbons = {i: done.curve("regime", i) for i in done.facts["instruments"]}
    timeline = page.figure(
        model_charts.regimes_figure(ribbons, names, span), "regimes over time", "No regime was told: no member knows of regimes."
    )
    colours = "".join(
        f'<span><i style="background:{charts.regime_colour(i, n)}"></i>{escape(n)}</span>' for i, n in [(-1, "unknown"), *enumerate(names)]
    )
    edges = forecasts.leads(done)
    page.keep("lead_lag", [e._asdict() for e in edges])
    few = "One instrument leads nobody." if len(done.facts["instruments"]) == 1 else "Too few prices to tell who leads."
    graph = page.figure(model_charts.lead_figure(edges), "lead-lag graph", few)
    rows = [
        (e.leader, e.follower, number(e.lag_ms, 1, "ms"), number(e.correlation, 3, sign=True), number(e.z, 1), small(e.ratio))
        for e in edges
    ]
    head = ["moves first", "follows", "by", "correlation", "z", "LLR"]
    note = (
        "Hayashi-Yoshida correlation at the lag where it is greatest, from the mids at decisions; arrows where |z| is 3 or more. LLR above "
    )
    note += "1: the first leads on the whole."
    left = f"<h3>Who moves first</h3>{graph}{table(head, rows)}<p class=note>{note}</p>"
    found = forecasts.drifted(done)
    why = (
        "The artifact holds no reference of its training range: train it again."
        if done.summary.get("diagnostics")
        else "Drift was not recorded for this run."
    )
    chart = page.figure(model_charts.drift_figure(*found) if found else None, "feature drift", why)
    told = (done.summary.get("diagnostics") or {}).get("drift") or {}
    page.keep("drift", [{"instrument": i, "feature": f, "psi": v} for i, by in told.items() for f, v in by.items()])
    said = ""
    if found:
        every = [real(v) for by in told.values() for v in by.values()]
        known = np.array([v for v in every if np.isfinite(v)])
        said = f"<p class=note>{count((known > 0.25).sum())} of {count(len(known))} features have shifted (above 0.25), "
        said += f"{count(((known > 0.1) & (known <= 0.25)).sum())} moved a little (0.1 to 0.25). The most moved are drawn.</p>"
    right = f"<h3>Feature drift between training and trading</h3>{chart}{said}"
    page.section("market", HEADS["market"], "<h3>Regimes</h3>" + timeline + f'<div class="key">{colours}</div>', side_by_side(left, right))
