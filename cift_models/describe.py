"""An artifact in words: what it was trained on and how, its members and what each says of itself, its folds, seeds and scores.

Takes a verified artifact, gives lines of text for `python -m cift_models inspect`.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cift_models.artifacts import Artifact
from cift_models.ensemble import MEMBERS, Ensemble, member_class
from cift_models.hmm import REGIMES
from cift_models.labels import LABELS
from cift_models.scorecard import lines


def describe(found: Artifact, own: Sequence[str] = ()) -> Iterator[str]:
    """Lines; `own`: import paths of the user's members, whose classes are asked only if named here."""
    m = found.manifest
    yield f"{found.path}: version {found.version}, written by {m['code']}, seed {m['seed']}"
    yield f"trained on {', '.join(m['instruments'])}: {m['range']['decisions']:,} decisions, {_when(m['range'])}"
    if "retrained" in m:
        yield f"retrained from {m['retrained']['champion']} on what came since {_at(m['retrained']['since'])}"
    yield f"horizons {', '.join(m['horizons_trained'])}; {len(m['features'])} features"
    latency = m["latency"]
    quantiles = (f"p{100 * q:g} {ns / 1e6:.2f} ms" for q, ns in zip(latency["q"], latency["ns"]))
    yield f"latency ({latency['source']}) {', '.join(quantiles)}"
    if m.get("altdata"):
        yield "alternative data: " + ", ".join(f"{name} {n:,}" for name, n in m["altdata"].items())
    for name, told in m["settings"].items():
        yield f"[{name}] " + " ".join(f"{k}={v}" for k, v in told.items())
    for name, path in m["members"].items():
        yield f"member {name} ({path})"
        if MEMBERS.get(name) == path or path in own:
            member = member_class(path).load(found.path, tuple(m["features"]))
            yield from (f"  {line}" for line in getattr(member, "report", list)())
    yield from _weights(found)
    for k, fold in enumerate(m["folds"]):
        yield from _fold(k, len(m["folds"]), fold)
    for name, sha in m["files"].items():
        yield f"{sha[:12]}  {name}"


def _when(of: Mapping[str, int]) -> str:
    return " to ".join(dt.datetime.fromtimestamp(of[k] / 1e9, dt.UTC).isoformat(timespec="seconds") for k in ("start", "end"))


def _weights(found: Artifact) -> Iterator[str]:
    """What the ensemble begins with: least confidence and trust of each horizon, weights of each regime."""
    ensemble = Ensemble.load(found.path)
    there = [a for a, name in enumerate(ensemble.names) if name in found.manifest["members"]]
    yield "ensemble: weights of " + ", ".join(ensemble.names[a] for a in there)
    for h, label in enumerate(LABELS[: len(ensemble.confident)]):
        if label in found.manifest["horizons_trained"]:
            w = ensemble.weights[:, h, there]
            share = w / np.maximum(w.sum(axis=1, keepdims=True), 1e-300)
            told = "; ".join(f"{r} " + " ".join(f"{v:.2f}" for v in s) for r, s in zip((*REGIMES, "unknown"), share))
            yield f"  {label}: decides from P {ensemble.confident[h]:.3f} on, trust {ensemble.trust[h]:.2f}; {told}"


def _fold(k: int, n: int, fold: Mapping[str, Any]) -> Iterator[str]:
    yield f"fold {k + 1} of {n}: fit and calibrated to {_at(fold['split']['weigh'])}, weights to {_at(fold['split']['end'])}"
    yield from (f"  left out: {line}" for line in fold["left_out"])
    if not fold["scores"]:
        return
    seeds = fold["seeds"]
    yield f"  seeds {', '.join(str(s) for s in seeds['values'])}; kept {seeds['kept']}, the one in the middle"
    for what, losses in (("weight slice", seeds["log_loss"]), ("afterwards", seeds["log_loss_after"])):
        for h in (label for label in LABELS if label in (losses or {})):
            yield f"  log-loss {what} {h}: " + ", ".join(f"{name} {_spread(v)}" for name, v in losses[h].items())
    for what in ("scores", "after"):
        if fold[what]:
            yield f"  {'on the weight slice, each decision before its outcome' if what == 'scores' else 'on what follows the fold'}:"
            yield from (f"    {line}" for line in lines(fold[what]))


def _at(ns: int) -> str:
    return dt.datetime.fromtimestamp(ns / 1e9, dt.UTC).isoformat(timespec="seconds")


def _spread(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    mean = f"{np.mean(known):.4f}"
    return mean if len(known) == 1 or min(known) == max(known) else f"{mean} ({min(known):.4f} to {max(known):.4f})"
