"""Scores as text: what :func:`validate.evaluate` found, for each instrument and horizon a table of the ensemble, members and baselines.

Takes the dict of scores, also as read back from JSON, where what is no number is None; gives lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np

HEAD: Final = (
    ("votes", 7), ("log-loss", 10), ("95 % interval", 20), ("macro-F1", 10), ("weighted-F1", 13), ("ECE", 8), ("by chance", 11),
    ("behind by", 11), ("Holm p", 8), ("best?", 7),
)  # fmt: skip


def lines(scores: Mapping[str, Any]) -> Iterator[str]:
    """A table for each instrument and horizon, then calibration over all instruments, then what may be claimed.

    "behind by": how much more log-loss than the ensemble's, over the same decisions, with its Holm-adjusted one-sided p. "best?": whether
    the model confidence set holds it. Rows with fewer than 100 independent labels are told in one line, for they prove nothing.
    """
    for r in scores["table"]:
        yield from _row(r)
    for c in scores.get("calibration", ()):
        ece, chance, p, debiased = (figure(c[k], n) for k, n in (("ece", 4), ("expected", 4), ("p", 2), ("debiased", 4)))
        told = f"{chance} by chance (p {p}), debiased {debiased}" if chance != "-" else "too few labels to tell it from chance"
        yield f"{'all instruments':<22}{c['horizon']:<9}{c['model']:<18}ECE {ece}, {told}"
    if any(r.get("gain") for r in scores["table"]):
        if not any(r["verdict"] == "sufficient" for r in scores["table"]):
            yield "nothing is claimed: no instrument has 100 independent labels at any horizon"
            return
        for kind, rivals in (("claims", "baseline"), ("member_claims", "member")):
            shown = [c.partition(":")[0] for c in scores.get(kind, ())]
            yield f"beats every {rivals}: " + (", ".join(shown) if shown else "nowhere, by Holm-adjusted tests")


def _row(r: Mapping[str, Any]) -> Iterator[str]:
    e = r.get("ensemble")
    if not r["n"]:
        ends = f"{r['forecasts']:,} decisions, none with an outcome: the data end before {r['horizon']} are over"
        yield f"{r['instrument']} {r['horizon']}: {ends if r.get('forecasts') else 'no forecast'}"
        return
    share = f"; {r['pays']:.1%} of the moves pay for the spread" if e else ""
    yield f"{r['instrument']} {r['horizon']}: {r['n']:,} decisions, {r['effective']:,} independent labels, {r['verdict']}{share}"
    if not e or r["verdict"] != "sufficient":
        return
    yield f"  {'':<18}" + "".join(f"{name:>{w}}" for name, w in HEAD)
    best = r.get("mcs", {}).get("included", ())
    tests = {**r.get("gain", {}), **r.get("member_gain", {})}
    for name, s in {"ensemble": e, **r.get("members", {}), **r.get("baselines", {})}.items():
        low, high = (figure(v, 4) for v in s["log_loss_interval"])
        behind, p = (tests[name]["mean"], tests[name]["p_holm"]) if name in tests else (None, None)
        cells = (
            f"{s.get('cover', 1.0):.0%}", figure(s["log_loss"], 4), f"{low} to {high}", figure(s["macro_f1"], 3),
            figure(s["weighted_f1"], 3), figure(s.get("ece"), 3), figure(s.get("ece_expected"), 3),
            "-" if behind is None else f"{behind:+.4f}", figure(p, 3), "yes" if name in best else "no" if best else "-",
        )  # fmt: skip
        yield f"  {name:<18}" + "".join(f"{c:>{w}}" for c, (_, w) in zip(cells, HEAD))
    d = r["decided"]
    if "hit_rate" in d:
        low, high = (figure(v, 3) for v in d["net_interval"])
        yield f"  decides {d['cover']:.1%}: hit rate {d['hit_rate']:.3f}, move less spread {d['net_ticks']:+.3f} ticks ({low} to {high})"
    a = r.get("agreement", {})
    if a.get("p") is not None:
        yield f"  3 of 5 less plain confidence at the same cover: {a['difference']:+.3f} ticks a decision, one-sided p {a['p']:.3f}"


def figure(value: float | None, places: int) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None or value != value else f"{value:.{places}f}"


def plain(value: Any) -> Any:
    """JSON knows no NaN and no infinity: None instead."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
