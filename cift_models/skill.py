"""What each member adds to the ensemble, and how much of what can be known the models know.

:func:`ablate` takes an artifact and a catalog that goes on after its training range: the ensemble learns its weights anew without each
member in turn, and the difference in log-loss is tested (Diebold-Mariano, Holm over members and horizons). :func:`oracle_share` takes a
synthetic market's `truth.json` beside: there the probabilities that the planted state allows are known.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from catalog.altdata import Table as AltData
from catalog.errors import InputError
from catalog.events import read_catalog
from cift_models import artifacts
from cift_models.inference import Engine
from cift_models.labels import F64, I8, I64, LABELS, H, Split, classify
from cift_models.significance import ALPHA, holm, mean_test
from cift_models.validate import block_bootstrap, log_loss, some_outcome
from cift_models.weigh import Weighed, weigh
from cift_models.windows import HORIZONS_NS

STALE_NS: Final = 5_000_000_000  # an oracle's time is compared with the newest decision, unless that is older than this


def ablate(
    artifact: str | Path, root: str | Path, ids: Sequence[str] | None = None, end: int | None = None, seed: int = 0,
    own: Sequence[str] = (), altdata: AltData | None = None, truth: str | Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Scores after the training range of the artifact's ensemble, of each member, and of the ensemble without each member.

    All ensembles start from even weights and learn them on the artifact's weight slice, which the catalog must hold, and from there on.
    Returns {"members": {name: {"cover", horizon: {...}}}, "ensemble": {horizon: ...}}, and "oracle" where a `truth` is given. A member's
    `cost` at a horizon is what the log-loss rises by without it, with its interval, `p` (one-sided) and `p_holm`; `gain` is what the
    ensemble gains over the member where that votes. Raises InputError where nothing comes after the training range.
    """
    from cift_models.features import NAMES

    found = artifacts.read(artifact, NAMES)
    m = found.manifest
    split, wanted = Split(**m["folds"][-1]["split"]), list(ids or m["instruments"])
    instruments, _ = read_catalog(root, wanted, None, end)
    members = [member for _, member in Engine.load(artifact, instruments, own)._present]
    if len(members) < 2:
        raise InputError(f"{found.path} holds {len(members)} member: there is nothing to take away")
    ensemble = Engine.load(artifact, instruments, own).ensemble
    sets = [members, *([o for o in members if o is not member] for member in members)]
    runs = weigh(
        lambda: read_catalog(root, wanted, None, end), m["instruments"], NAMES, sets, split, ensemble.threshold, ensemble.eta,
        ensemble.config, np.iinfo(np.int64).max, (), altdata,
    )  # fmt: skip
    whole = runs[0]
    after = some_outcome(whole.after, found, root)
    place = [m["instruments"].index(i.id) for i in instruments]
    threshold = ensemble.threshold[place]
    out: dict[str, Any] = {"decisions": len(after["ts"]), "ensemble": {}, "members": {}}
    for h in range(H):
        if LABELS[h] in m["horizons_trained"]:
            out["ensemble"][LABELS[h]] = _pooled(whole, threshold, h)
    for member, without in zip(members, runs[1:]):
        a = whole.ensemble.names.index(member.name)
        votes = after["votes"][:, a]
        told: dict[str, Any] = {"cover": float(np.isfinite(votes).all(axis=2).any(axis=1).mean())}
        for h in range(H):
            if LABELS[h] in m["horizons_trained"]:
                told[LABELS[h]] = _adds(after, without.after or {}, votes[:, h], threshold, h, seed)
        out["members"][member.name] = told
    for kind in ("cost", "gain"):
        family = [told[h][kind] for told in out["members"].values() for h in told if h != "cover" and kind in told[h]]
        for g, p in zip(family, holm([g["p"] for g in family])):
            g["p_holm"] = float(p)
    if truth is not None:
        out["oracle"] = oracle_share(after, [i.id for i in instruments], whole.ensemble.names, threshold, truth)
    return out


def _pooled(run: Weighed, threshold: F64, h: int) -> dict[str, Any]:
    y, p = _classes(run.after or {}, threshold, h), (run.after or {})["proba"][:, h].astype(np.float64)
    ok = (y >= 0) & np.isfinite(p).all(axis=1)
    return {"n": int(ok.sum()), "log_loss": float(log_loss(p[ok], y[ok]).mean()) if ok.any() else None}


def _classes(sample: Mapping[str, NDArray[Any]], threshold: F64, h: int) -> I8:
    return classify(sample["move"][:, h], threshold[sample["instrument"], h])


def _adds(
    whole: Mapping[str, NDArray[Any]], without: Mapping[str, NDArray[Any]], vote: NDArray[Any], threshold: F64, h: int, seed: int
) -> dict[str, Any]:
    """What the log-loss rises by without the member, and what the ensemble gains over it alone, over all instruments."""
    y, ts = _classes(whole, threshold, h), whole["ts"]
    ours, theirs = whole["proba"][:, h].astype(np.float64), without["proba"][:, h].astype(np.float64)
    voted = np.isfinite(vote).all(axis=1)
    out: dict[str, Any] = {"cover": float(voted.mean())}
    for kind, other in (("cost", theirs), ("gain", vote.astype(np.float64))):
        ok = (y >= 0) & np.isfinite(ours).all(axis=1) & np.isfinite(other).all(axis=1)
        if ok.any():
            d = log_loss(other[ok], y[ok]) - log_loss(ours[ok], y[ok])
            test = mean_test(d, ts[ok], HORIZONS_NS[h])
            interval = block_bootstrap(d, ts[ok], 2 * HORIZONS_NS[h], seed)
            out[kind] = {"mean": test.mean, "interval": list(interval), "t": test.t, "p": test.p}
    return out


def oracle_share(
    sample: Mapping[str, NDArray[Any]], ids: Sequence[str], names: Sequence[str], threshold: F64, truth: str | Path
) -> dict[str, Any]:
    """Horizon -> log-losses at the oracle's times and each one's share of its skill: (class frequencies - model) / (frequencies - oracle).

    At each time of the oracle's the newest decision at or before it is scored against the same outcome, which the oracle's band defines.
    A horizon whose classes, by the `threshold` (I, H) learnt from the training range, are not the oracle's is told apart with `same`
    False and not scored. Raises InputError where the truth is not of this market.
    """
    import pyarrow.parquet as pq

    place = Path(truth)
    try:
        told = json.loads(place.read_text())
        table = pq.read_table(place.parent / told["table"])
        bands = {s["horizon_ns"]: s["band_ticks"] for s in told["oracle"]["scores"]}
        symbols = told["symbols"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{place} is no truth of a synthetic market ({e}): name the truth.json that was made with the data") from None
    which = {k: ids.index(i) for k, s in enumerate(symbols) for i in ids if i.split(".")[0] == s}
    t = {name: table[name].to_numpy() for name in ("ts", "instrument", "horizon_ns", "outcome", "p_down", "p_flat", "p_up")}
    known = np.isin(t["instrument"], list(which)) & (t["ts"] >= sample["ts"][0]) & (t["ts"] <= sample["ts"][-1])
    if not known.any():
        raise InputError(f"{place} tells of {', '.join(symbols)} at other times: name the truth.json that was made with the data")
    out: dict[str, Any] = {}
    for h, ns in enumerate(HORIZONS_NS):
        of = np.unique(sample["instrument"])
        same = all(np.floor(2 * threshold[k, h] + 1e-9) == np.floor(2 * bands[ns] + 1e-9) for k in of)  # mids move by half ticks
        row: dict[str, Any] = {"same": bool(same), "band": bands[ns], "threshold": threshold[of, h].tolist()}
        out[LABELS[h]] = row
        mine = np.flatnonzero(known & (t["horizon_ns"] == ns))
        if same and len(mine):
            at = _newest(sample, np.array([which[int(k)] for k in t["instrument"][mine]]), t["ts"][mine])
            y, p = (t["outcome"][mine] + 1).astype(np.int8), np.stack([t[f"p_{c}"][mine] for c in ("down", "flat", "up")], axis=1)
            row |= _share(sample, names, h, at, y, p)
    return out


def _newest(sample: Mapping[str, NDArray[Any]], instrument: I64, ts: I64) -> I64:
    """Index of the newest decision of each instrument at or before `ts`, -1 where there is none or it is stale."""
    at = np.full(len(ts), -1, np.int64)
    for k in np.unique(instrument):
        mine, rows = np.flatnonzero(instrument == k), np.flatnonzero(sample["instrument"] == k)
        i = np.searchsorted(sample["ts"][rows], ts[mine], side="right") - 1
        fresh = (i >= 0) & (ts[mine] - sample["ts"][rows[np.maximum(i, 0)]] <= STALE_NS)
        at[mine[fresh]] = rows[i[fresh]]
    return at


def _share(sample: Mapping[str, NDArray[Any]], names: Sequence[str], h: int, at: I64, y: I8, oracle: F64) -> dict[str, Any]:
    ok = (at >= 0) & np.isfinite(sample["proba"][at, h]).all(axis=1)
    at, y, oracle = at[ok], y[ok], oracle[ok]
    if not len(y):
        return {"n": 0}
    rates = np.bincount(y, minlength=3) / len(y)
    plain, best = log_loss(np.tile(rates, (len(y), 1)), y), log_loss(oracle, y)
    told = {"ensemble": sample["proba"][at, h], **{name: sample["votes"][at, a, h] for a, name in enumerate(names)}}
    row: dict[str, Any] = {"n": len(y), "frequencies": float(plain.mean()), "oracle": float(best.mean()), "log_loss": {}, "share": {}}
    for name, p in told.items():
        voted = np.isfinite(p).all(axis=1)
        if voted.any():
            loss = log_loss(p[voted].astype(np.float64), y[voted])
            skill = float((plain - best)[voted].mean())
            row["log_loss"][name] = float(loss.mean())
            row["share"][name] = float((plain[voted] - loss).mean()) / skill if skill > 0 else None
    return row


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The account of :func:`ablate` as text."""
    yield f"{found['decisions']:,} decisions after the training range; log-loss, ensemble: " + ", ".join(
        f"{h} {e['log_loss']:.4f}" for h, e in found["ensemble"].items() if e["log_loss"] is not None
    )
    head = ("votes", 7), ("", 2), ("horizon", -9), ("votes", 7), ("without it", 12), ("Holm p", 9), ("over it alone", 15), ("Holm p", 9)
    yield f"{'member':<14}" + "".join(f"{name:>{w}}" if w > 0 else f"{name:<{-w}}" for name, w in head)
    for name, told in found["members"].items():
        for h, row in told.items():
            if h == "cover":
                continue
            cells = [f"{row[k]['mean']:+.5f}" if k in row else "-" for k in ("cost", "gain")]
            ps = [f"{row[k]['p_holm']:.3f}" if k in row else "-" for k in ("cost", "gain")]
            yield f"{name:<14}{told['cover']:>7.0%}  {h:<9}{row['cover']:>7.0%}{cells[0]:>12}{ps[0]:>9}{cells[1]:>15}{ps[1]:>9}"
    yield from verdicts(found)
    for h, row in found.get("oracle", {}).items():
        if not row["same"]:
            told = " ".join(f"{v:g}" for v in row["threshold"])
            yield f"oracle {h}: its classes are moves beyond {row['band']:g} ticks, those of the models {told}: not compared"
        elif row.get("n"):
            shares = ", ".join(f"{name} {s:.0%}" for name, s in row["share"].items() if s is not None)
            yield f"oracle {h}: log-loss {row['oracle']:.4f}, class frequencies {row['frequencies']:.4f}; share of its skill: {shares}"


def verdicts(found: Mapping[str, Any]) -> Iterator[str]:
    """For each member: does it vote in half of the batches, does taking it away cost significantly, does the ensemble beat it?"""
    for name, told in found["members"].items():
        rows = {h: row for h, row in told.items() if h != "cover"}
        costs = [h for h, r in rows.items() if "cost" in r and r["cost"]["mean"] > 0 and r["cost"]["p_holm"] < ALPHA]
        hurts = [h for h, r in rows.items() if "cost" in r and r["cost"]["mean"] < 0 and 1 - r["cost"]["p"] < ALPHA]
        p = [r[kind]["p"] for r in rows.values() for kind in ("cost", "gain") if kind in r]
        if p and not np.isfinite(p).any():
            yield f"{name}: votes in {told['cover']:.0%} of the batches; too few labels to test what it adds: choose a later --end"
            continue
        beaten = [h for h, r in rows.items() if "gain" in r and r["gain"]["mean"] > 0 and r["gain"]["p_holm"] < ALPHA]
        yield (
            f"{name}: votes in {told['cover']:.0%} of the batches{'' if told['cover'] >= 0.5 else ' (less than half)'}; without it the "
            f"ensemble is worse at {', '.join(costs) or 'no horizon'}{', better at ' * bool(hurts)}{', '.join(hurts)}; "
            f"the ensemble beats it at {', '.join(beaten) or 'no horizon'}"
        )
