"""What a sweep came to: its table, the best and the median run, and how much of the best is luck.

Takes the trials with their results, writes `sweep.json`, `sweep.parquet`, `sweep.html` and `best.toml` into the sweep's folder.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cift_models import artifacts
from cift_models.validate import Fold, cpcv, expanding, groups, paths, within
from cift_strategies.overfitting import pbo, sharpe
from cift_strategies.performance import deflated_sharpe
from cift_strategies.results import write_json
from cift_strategies.sections import toml
from cift_strategies.sweep import I64, NOTE, Trial, artifact_of, hours_of, positions, returns
from cift_strategies.sweep_board import short
from cift_strategies.sweep_file import Asked, SweepConfig, Validation

type F64 = NDArray[np.float64]

METHODS: Final = {"walk-forward": "walk-forward", "cpcv": "combinatorial purged cross-validation"}
_CHOSEN: Final = {"walk-forward": "all earlier groups", "cpcv": "the other groups"}


def figures(t: Trial, s: SweepConfig) -> dict[str, Any]:
    """The numbers of a run: `sharpe` of a period and `return` (net, share of capital) over the time that runs are chosen on, and those of
    its summary, over all of it."""
    assert t.result is not None
    r = returns(t, hours_of(t, s.holdout)[0], s.periods)
    told = {k: v for k, v in t.result["summary"].items() if isinstance(v, int | float) or v is None}
    return {"sharpe": float(sharpe(r[:, None])[0]), "return": float(r.sum()), **told}


def conclude(asked: Asked, trials: Sequence[Trial], out: Path) -> dict[str, Any]:
    """Write the sweep's files; returns what sweep.json holds."""
    s, sign = asked.sweep, 1.0 if asked.sweep.direction == "maximize" else -1.0
    unique = list({t.job.key: t for t in reversed(trials) if t.result is not None}.values())[::-1]
    scored = sorted((t for t in unique if t.score is not None), key=lambda t: (-sign * (t.score or 0.0), t.number))
    best, median = (scored[0], scored[len(scored) // 2]) if scored else (unique[0], unique[0])
    times = [hours_of(t, s.holdout)[0] for t in unique]
    hours = within(max(times, key=lambda h: int(h[0, 0])), int(max(h[0, 0] for h in times)), int(min(h[-1, 1] for h in times)))
    together = len(hours) > 0
    matrix = np.stack([returns(t, hours, s.periods) for t in unique], axis=1) if together else np.zeros((0, len(unique)))
    over = pbo(matrix, s.blocks)
    ratios = sharpe(matrix) if together else np.zeros(len(unique))
    ever = len({json.dumps(json.loads(f.read_text())["config"], sort_keys=True) for f in (out / "runs").glob("*/run.json")})
    dsr = deflated_sharpe(matrix[:, unique.index(best)], ever, ratios.tolist())
    judged = None if s.validation is None or not together else _judged(s.validation, s.objective, sign, unique, hours, s.periods)
    result: dict[str, Any] = {
        "file": str(asked.path), "method": s.method, "objective": s.objective, "direction": s.direction, "seed": s.seed,
        "parameters": [a.key for a in asked.axes], "runs": len(trials), "distinct": len(unique), "trials": ever,
        "failed": sum(bool(t.error) for t in trials), "best": best.number, "median": median.number, "hours": hours.tolist(),
        "periods": s.periods,
        "pbo": None if over is None else {
            "probability": over.pbo, "loss": over.loss, "splits": len(over.logit), "blocks": s.blocks,
            "inside": float(over.inside.mean()), "outside": float(over.outside.mean()),
        },
        "deflated_sharpe": None if not dsr.defined else {
            "ratio": dsr.ratio, "expected": dsr.expected_best, "probability": dsr.deflated, "trials": dsr.trials,
            "variance": float(np.var(ratios)),
        },
        "reports": ["best", "median"][: len({best.number, median.number})] if s.reports else [],
        "validation": judged,
        "models": None if judged is None else _models(unique, int(hours[0, 0])),
        "holdout": _held_out(best, s) if s.holdout else None,
        "table": [_row(t, s) for t in trials],
    }  # fmt: skip
    result["told"] = _told(result, best, median, s.objective)
    _parquet(result["table"], out / "sweep.parquet")
    head = f"# the best of {len(unique)} runs by {s.objective}: run_backtest.py --config best.toml\n"
    _text(out / "best.toml", head + toml(_config(best)))
    from cift_strategies.sweep_page import render

    _text(out / "sweep.html", render(result, best, median, matrix, [t.number for t in unique], over))
    write_json(out / NOTE, result)
    for name in result["reports"]:
        if name == "best":
            _report(best, out / name, ever, [float(t.result["ratio"]) for t in unique if t.result])
        else:
            _report(median, out / name, 1, ())
    return result


def _report(t: Trial, place: Path, trials: int, ratios: Sequence[float]) -> None:
    """The run of `t` once more, into the folder `place`: with its forecasts, the plain rule beside it and the report, whose Sharpe ratio is
    deflated by what it was chosen from. What is there already stays."""
    from cift_strategies.backtest import run

    assert t.result is not None
    digest, note = t.result["digest"], place / "summary.json"
    if note.is_file():
        told = json.loads(note.read_text(encoding="utf-8"))
        if (told["digest"], told.get("trials", 1), told.get("trial_ratios", [])) == (digest, trials, list(ratios)):
            return
    print(f"report of run {t.number}: {place / 'report.html'}", file=sys.stderr, flush=True)
    config = t.job.config.model_copy(update={"out": place})
    if (made := run(config, trials=trials, ratios=ratios, trained=artifact_of(t.job)).digest) != digest:
        raise AssertionError(f"run {t.number} made again gives other orders: digest {made}, not {digest}")


def _held_out(best: Trial, s: SweepConfig) -> dict[str, Any]:
    """What the chosen run, which is one trial now, was worth in the time that nothing was chosen on; periods as long as the others."""
    hours = hours_of(best, s.holdout)[1]
    r = returns(best, hours, max(3, round(s.periods * s.holdout / (1 - s.holdout))))
    alone = deflated_sharpe(r)
    opened, _, _ = positions(best)
    return {
        "share": s.holdout, "hours": hours.tolist(), "positions": int((opened >= hours[0, 0]).sum()),
        "sharpe": float(sharpe(r[:, None])[0]), "return": float(r.sum()), "probability": alone.probabilistic if alone.defined else None,
    }  # fmt: skip


def _row(t: Trial, s: SweepConfig) -> dict[str, Any]:
    told: dict[str, Any] = {"run": t.number, "key": t.job.key, "parameters": t.point, "score": t.score, "error": t.error or None}
    if t.result is not None:
        told |= {"digest": t.result["digest"], "seconds": t.result["seconds"], "figures": figures(t, s)}
    return told


# --- validation -----------------------------------------------------------------------------------------------------------------------


def _judged(v: Validation, objective: str, sign: float, trials: Sequence[Trial], hours: I64, periods: int) -> dict[str, Any]:
    """In each fold the trial that is best by the positions it is chosen on, and what it was worth in the groups that are judged.

    A position's life is from its opening to its close, at which its outcome is known.
    """
    slots, embargo = max(1, periods // v.groups), round(v.embargo_s * 1e9)
    fine = groups(hours, v.groups * slots)
    edges = fine[::slots]
    held = []
    for opened, closed, earned in map(positions, trials):
        inside = (opened >= hours[0, 0]) & (closed <= hours[-1, 1])
        held.append((opened[inside], closed[inside], earned[inside]))
    cells = [np.searchsorted(fine[1:-1], opened, "right") for opened, _, _ in held]
    if v.method == "cpcv":
        folds = [cpcv(o, c, edges, v.test_groups, embargo) for o, c, _ in held]
    else:
        folds = [expanding(o, c, edges, embargo) for o, c, _ in held]

    def series(n: int, rows: NDArray[np.int64], of: Sequence[int]) -> F64:
        r = np.bincount(cells[n][rows], held[n][2][rows], len(fine) - 1).reshape(v.groups, slots)
        return r[list(of)].ravel()

    def score(r: F64) -> float:
        return float(sharpe(r[:, None])[0]) if objective == "sharpe" else float(r.sum())

    told: list[dict[str, Any]] = []
    chosen: list[tuple[int, Fold]] = []
    for i, fold in enumerate(folds[0]):
        rest = [g for g in range(v.groups) if (g not in fold.tested if v.method == "cpcv" else g < fold.tested[0])]
        scored = [score(series(n, folds[n][i].train, rest)) for n in range(len(trials))]
        n = int(np.argmax(sign * np.array(scored)))
        mine = folds[n][i]
        chosen.append((n, mine))
        dropped = int(np.isin(cells[n] // slots, rest).sum()) - len(mine.train)
        outside = score(series(n, mine.test, fold.tested))
        told.append({"tested": list(fold.tested), "run": trials[n].number, "inside": scored[n], "outside": outside, "purged": dropped})
    if v.method == "cpcv":
        ways = paths(v.groups, v.test_groups)
        lines = [np.concatenate([series(*_of(chosen[i]), [g]) for g, i in enumerate(way)]) for way in ways]
    else:
        lines = [np.concatenate([series(n, fold.test, fold.tested) for n, fold in chosen])]
    scores = [score(line) for line in lines]
    return {
        **v.model_dump(), "folds": told, "paths": scores,
        "mean": float(np.mean(scores)), "worst": float(min(sign * np.array(scores)) * sign),
        "return": float(np.mean([line.sum() for line in lines])), "runs_chosen": len({f["run"] for f in told}),
    }  # fmt: skip


def _models(trials: Sequence[Trial], since: int) -> dict[str, Any]:
    """On what the models of the runs were trained, [start, end] ns, and whether all of it was before `since`, the first judged group."""
    places = {t.job.config.artifacts or artifact_of(t.job) for t in trials}
    ranges = sorted((int(r["start"]), int(r["end"])) for r in (artifacts.read(p).manifest["range"] for p in places if p is not None))
    return {"ranges": [list(r) for r in ranges], "before": all(end < since for _, end in ranges)}


def _of(chosen: tuple[int, Fold]) -> tuple[int, NDArray[np.int64]]:
    return chosen[0], chosen[1].test


# --- words and files ------------------------------------------------------------------------------------------------------------------


def _told(r: Mapping[str, Any], best: Trial, median: Trial, objective: str) -> list[str]:
    def of(t: Trial) -> str:
        return f"{objective} {short(t.score)} with " + ", ".join(f"{k} = {short(v)}" for k, v in t.point.items())

    failed = f", {r['failed']} of {r['runs']} refused" if r["failed"] else ""
    lines = [f"{r['distinct']} distinct runs{failed}. Best: run {best.number}, {of(best)}. Median: run {median.number}, {of(median)}."]
    if (d := r["deflated_sharpe"]) is not None:
        lines.append(
            f"Deflated Sharpe ratio: with probability {d['probability']:.3f} the best run's ratio ({short(d['ratio'])} a period) is more "
            f"than luck; the best of {d['trials']} trials without skill is expected to show {short(d['expected'])}."
        )
    else:
        lines.append("Deflated Sharpe ratio: the best run's returns do not vary, there is nothing to test.")
    if (p := r["pbo"]) is not None:
        lines.append(
            f"Probability of backtest overfitting: {p['probability']:.2f} ({p['splits']:,} splits of {p['blocks']} blocks); the best of "
            f"one half has a Sharpe ratio of {short(p['inside'])} there and of {short(p['outside'])} in the other."
        )
    else:
        lines.append("Probability of backtest overfitting: two runs over the same time are needed.")
    if (v := r["validation"]) is not None:
        what = "path" if v["method"] == "walk-forward" else f"mean of {len(v['paths'])} paths"
        lines.append(
            f"{METHODS[v['method']].capitalize()}: chosen on {_CHOSEN[v['method']]}, {objective} {short(v['mean'])} ({what}), worst "
            f"{short(v['worst'])}; "
            f"{v['runs_chosen']} different runs were chosen in {len(v['folds'])} folds."
        )
        if r["models"]["before"]:
            lines.append(
                "Models were trained once, before the first of these groups, and not again from fold to fold: the folds judge which run "
                "was chosen, not how its models were trained."
            )
        else:
            lines.append("Models were trained on data later than the first of these groups: none of these figures is out of their sample.")
    if (h := r["holdout"]) is not None:
        p = h["probability"]
        sure = "nothing to test: the returns do not vary" if p is None else f"above zero with probability {p:.3f}"
        lines.append(
            f"Holdout, the last {h['share']:.0%} of the time, which nothing was chosen on: run {best.number} has a Sharpe ratio of "
            f"{short(h['sharpe'])} a period there ({sure}), return {short(100 * h['return'])} %, {h['positions']} positions."
        )
    return lines


def _parquet(table: Sequence[Mapping[str, Any]], path: Path) -> None:
    rows = [
        {k: v for k, v in row.items() if k not in ("parameters", "figures")}
        | {k: v if isinstance(v, int | float | str) else json.dumps(v) for k, v in row["parameters"].items()} | row.get("figures", {})
        for row in table
    ]  # fmt: skip
    columns = {}
    for name in dict.fromkeys(k for row in rows for k in row):
        values = [row.get(name) for row in rows]
        kinds = {type(v) for v in values if v is not None}
        if kinds <= {int, float} and float in kinds:
            values = [None if v is None else float(v) for v in values]
        elif len(kinds) > 1:
            values = [None if v is None else str(v) for v in values]
        columns[name] = pa.array(values)
    part = path.with_name(f".{path.name}.part")
    pq.write_table(pa.table(columns), part)
    os.replace(part, path)


def _text(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _config(t: Trial) -> dict[str, Any]:
    assert t.result is not None
    return {k: v for k, v in t.result["config"].items() if k != "out"}
