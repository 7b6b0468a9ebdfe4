"""Honest scores: the ensemble and its members out of sample, beside baselines, with intervals.

Takes predictions and labels of decisions that nothing was fitted on (:class:`Sample`), gives a plain dict for `summary["scores"]`: a
table of instrument x horizon with log-loss, F1, accuracy, calibration error, the share of moves that pay for the spread and the effective
number of labels. Intervals are from a block bootstrap (Künsch 1989), blocks longer than the horizon. The baselines (persistence, time of
day, logistic regression on the best bid and offer) are fitted on the training range and travel with the artifact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from catalog.altdata import Table as AltData
from catalog.errors import InputError
from catalog.events import Instrument, read_catalog
from catalog.progress import Steps
from cift_models import artifacts
from cift_models.baselines import Baselines
from cift_models.calibration import calibration
from cift_models.inference import Engine, Predictions, stream
from cift_models.labels import F64, I8, I64, LABELS, H, Labeller, Thinned, classify, effective, last_known, macro_f1, pays
from cift_models.significance import ALPHA, agreement, confidence_set, holm, mean_test, stretches
from cift_models.windows import HORIZONS_NS, Block

CAP: Final = 200_000  # decisions that a sample holds
BLOCKS: Final = 200  # of a bootstrap, at most
ENOUGH: Final = 100  # effective labels below which a score says "insufficient"
RESAMPLES: Final = 1_000
_TINY: Final = 1e-6


class Sample:
    """Gathers predictions and their labels along a stream, `cap` decisions at most, from `since` (ns) on."""

    def __init__(
        self, instruments: Sequence[Instrument], names: Sequence[str], members: int, columns: Sequence[str] = (), cap: int = CAP,
        since: int = 0,
    ) -> None:  # fmt: skip
        self._labeller = Labeller(instruments, HORIZONS_NS, ())
        self._mid, self._spread = names.index("mid"), names.index("spread")
        self._columns = [names.index(c) for c in columns]
        self._since = since
        f32 = np.float32
        self._held = Thinned(
            len(instruments), H, cap, spread=((), np.float64), proba=((H, 3), f32), magnitude=((H,), f32), direction=((H,), np.int8),
            votes=((members, H, 3), f32), level1=((len(self._columns),), f32), regime=((), np.int8),
        )  # fmt: skip

    def push(self, block: Block, p: Predictions) -> None:
        """`p` as the engine answered to `block`."""
        rows = block.rows[block.closes]
        outcomes = self._labeller.push(block.events, np.ascontiguousarray(block.rows[:, self._mid]), block.closes)
        self._held.push(
            p.ts, p.instrument, outcomes, p.ts >= self._since, spread=rows[:, self._spread], proba=p.proba, magnitude=p.magnitude,
            direction=p.direction, votes=p.votes, level1=rows[:, self._columns], regime=p.regime,
        )  # fmt: skip

    def finish(self) -> dict[str, NDArray[Any]]:
        """The stream has ended: the sample as arrays, see :class:`Thinned` for ts, instrument, move and known_at."""
        self._held.learn(self._labeller.finish())
        return self._held.result()


class Interval(NamedTuple):
    low: float
    high: float


def block_bootstrap(values: F64, ts: I64, block_ns: int, seed: int = 0, resamples: int = RESAMPLES, level: float = 0.95) -> Interval:
    """Percentile interval of the mean of `values` (n,): blocks of at least `block_ns`, drawn with replacement.

    Non-overlapping :func:`significance.stretches`, 201 at most; NaN where there are fewer than 8.
    """
    if len(values) < 2:
        return Interval(float("nan"), float("nan"))
    group = stretches(ts, block_ns, BLOCKS)
    blocks = int(group[-1]) + 1
    if blocks < 8:
        return Interval(float("nan"), float("nan"))
    total, count = np.bincount(group, weights=values), np.bincount(group)
    draw = np.random.default_rng(seed).integers(0, blocks, (resamples, blocks))
    means = total[draw].sum(axis=1) / count[draw].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def log_loss(proba: F64, y: I8) -> F64:
    """(n,) negative log probability of what happened."""
    return -np.log(np.clip(proba[np.arange(len(y)), y], _TINY, 1.0))


def weighted_f1(truth: I8, guess: I8) -> float:
    """F1 of the three classes, weighted by how often each is true."""
    total = 0.0
    for c in range(3):
        hit, true, guessed = int(((truth == c) & (guess == c)).sum()), int((truth == c).sum()), int((guess == c).sum())
        total += 2 * hit / max(1, true + guessed) * true / max(1, len(truth))
    return total


def _scores(proba: F64, y: I8, ts: I64, horizon_ns: int, seed: int) -> dict[str, Any]:
    guess, loss = proba.argmax(axis=1).astype(np.int8), log_loss(proba, y)
    c = calibration(proba, y, ts, horizon_ns)
    return {
        "log_loss": float(loss.mean()),
        "log_loss_interval": list(block_bootstrap(loss, ts, 2 * horizon_ns, seed)),
        "macro_f1": macro_f1(y, guess),
        "weighted_f1": weighted_f1(y, guess),
        "accuracy": float((guess == y).mean()),
        "ece": c.ece,
        "ece_expected": c.expected,
        "ece_p": c.p,
        "ece_debiased": c.debiased,
    }


def evaluate(
    sample: Mapping[str, NDArray[Any]], threshold: F64, instruments: Sequence[str], members: Sequence[str],
    baselines: Baselines | None = None, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """The table of scores, JSON-able. `threshold` (I, H) ticks; `sample` from :meth:`Sample.finish`; `members` name its votes' columns.

    Each row of `table` has instrument, horizon, n, `forecasts` (decisions with one, also those whose outcome is not known), `effective`
    labels, `verdict` ("insufficient" below 100), `pays` (share of moves beyond the spread), `ensemble`, `members`, `baselines` (scores
    each; members over the decisions they voted in, with their `cover`), `decided` (the decisions with a direction: cover, hit rate, mean
    signed move less spread, ticks), and `gain` of the ensemble over each baseline in log-loss with its interval. All models are compared
    on the decisions that have a prediction.

    With `baselines` also the tests of :mod:`cift_models.significance`: `gain` over baselines and `member_gain` over members carry t,
    p (one-sided) and `p_holm` of each, adjusted over all rows of the table with enough labels; `mcs` is the model confidence set on the
    decisions on which all had a say (members that vote in half of them or more); `agreement` the 3-of-5 rule against plain confidence
    at the same cover. `claims` tells where every gain over baselines is shown, `member_claims` where every gain over members is.
    """
    table: list[dict[str, Any]] = []
    for k, id_ in enumerate(instruments):
        mine = sample["instrument"] == k
        for h in range(H):
            y_all = classify(sample["move"][mine, h], threshold[k, h])
            ts_all, known = sample["ts"][mine], sample["known_at"][mine, h]
            proba = sample["proba"][mine, h].astype(np.float64)
            ok = (y_all >= 0) & np.isfinite(proba).all(axis=1)
            row: dict[str, Any] = {"instrument": id_, "horizon": LABELS[h], "n": int(ok.sum())}
            row["forecasts"] = int(np.isfinite(proba).all(axis=1).sum())
            row["effective"] = effective(ts_all[ok], known[ok])
            row["verdict"] = "sufficient" if row["effective"] >= ENOUGH else "insufficient"
            table.append(row)
            if not ok.any():
                continue
            y, ts, move, spread = y_all[ok], ts_all[ok], sample["move"][mine, h][ok], sample["spread"][mine][ok]
            row["pays"] = float(pays(move, spread).mean())
            row["ensemble"] = _scores(proba[ok], y, ts, HORIZONS_NS[h], seed)
            row["members"] = {}
            for a, name in enumerate(members):
                vote = sample["votes"][mine, a, h][ok].astype(np.float64)
                voted = np.isfinite(vote).all(axis=1)
                if voted.any():
                    cover = float(voted.mean())
                    row["members"][name] = {"cover": cover, **_scores(vote[voted], y[voted], ts[voted], HORIZONS_NS[h], seed)}
            side = sample["direction"][mine, h][ok].astype(np.float64)
            acted = side != 0
            row["decided"] = {"cover": float(acted.mean())}
            if acted.any():
                net = (side * move - spread)[acted]
                row["decided"] |= {
                    "hit_rate": float((side * move > 0)[acted].sum() / max(1, np.count_nonzero(move[acted]))),
                    "net_ticks": float(np.nanmean(net)),
                    "net_interval": list(block_bootstrap(np.nan_to_num(net), ts[acted], 2 * HORIZONS_NS[h], seed)),
                }
            if baselines is not None:
                before = last_known(ts_all, known, y_all)[ok]
                rivals = baselines.predict(h, ts, np.full(len(ts), k), before, sample["level1"][mine][ok].astype(np.float64))
                row["baselines"] = {name: _scores(p, y, ts, HORIZONS_NS[h], seed) for name, p in rivals.items()}
                lead = before >= 0
                if lead.any():  # persistence as a guess is the class itself
                    row["baselines"]["persistence"]["macro_f1"] = macro_f1(y[lead], before[lead])
                    ours_f1 = macro_f1(y[lead], proba[ok][lead].argmax(axis=1).astype(np.int8))
                    row["leak_gap"] = 100 * (ours_f1 - row["baselines"]["persistence"]["macro_f1"])
                _test(row, proba[ok], rivals, {n: sample["votes"][mine, a, h][ok] for a, n in enumerate(members)}, y, ts, h, seed)
                row["agreement"] = agreement(proba[ok], side.astype(np.int8), move, spread, ts, HORIZONS_NS[h])
    for gains in ("gain", "member_gain"):
        adjust(table, gains)
    return {
        "table": table, "calibration": calibrations(sample, threshold, members), "decisions": len(sample["ts"]), "claims": claims(table),
        "member_claims": claims(table, "member_gain"),
    }  # fmt: skip


def calibrations(sample: Mapping[str, NDArray[Any]], threshold: F64, members: Sequence[str]) -> list[dict[str, Any]]:
    """How well the ensemble and each member are calibrated over all instruments together; see :mod:`cift_models.calibration`."""
    out = []
    k, ts = sample["instrument"], sample["ts"]
    for h in range(H):
        y = classify(sample["move"][:, h], threshold[k, h])
        for name, p in (("ensemble", sample["proba"][:, h]), *((m, sample["votes"][:, a, h]) for a, m in enumerate(members))):
            ok = (y >= 0) & np.isfinite(p).all(axis=1)
            if ok.any():
                c = calibration(p[ok].astype(np.float64), y[ok], ts[ok], HORIZONS_NS[h])
                out.append({"horizon": LABELS[h], "model": name, **c._asdict()})
    return out


def _test(
    row: dict[str, Any], ours: F64, rivals: Mapping[str, F64], votes: Mapping[str, NDArray[Any]], y: I8, ts: I64, h: int, seed: int
) -> None:
    """Enter into `row` what is gained over each baseline and each member, with its test, and the model confidence set."""
    loss, width = log_loss(ours, y), HORIZONS_NS[h]
    losses, cover = {"ensemble": loss}, np.ones(len(y), np.bool_)
    row["gain"], row["member_gain"] = {}, {}
    for name, p in rivals.items():
        losses[name] = log_loss(p, y)
        row["gain"][name] = _gain(losses[name] - loss, ts, width, seed)
    for name, vote in votes.items():
        voted = np.isfinite(vote).all(axis=1)
        if not voted.any():
            continue
        other = np.full(len(y), np.nan)
        other[voted] = log_loss(vote[voted].astype(np.float64), y[voted])
        row["member_gain"][name] = _gain((other - loss)[voted], ts[voted], width, seed)
        if voted.mean() >= 0.5:
            losses[name], cover = other, cover & voted
    row["mcs"] = confidence_set(np.stack([v[cover] for v in losses.values()], axis=1), ts[cover], width, list(losses), seed=seed)


def _gain(d: F64, ts: I64, horizon_ns: int, seed: int) -> dict[str, Any]:
    test = mean_test(d, ts, horizon_ns)
    return {"mean": float(d.mean()), "interval": list(block_bootstrap(d, ts, 2 * horizon_ns, seed)), "t": test.t, "p": test.p}


def adjust(table: Sequence[dict[str, Any]], gains: str = "gain") -> None:
    """Set `p_holm` of every gain: adjusted over instruments x horizons x rivals, of the rows with enough labels; 1 in the others."""
    enough = [r["verdict"] == "sufficient" for r in table]
    family = [g for r, e in zip(table, enough) if e for g in (r.get(gains) or {}).values()]
    for g, p in zip(family, holm([g["p"] for g in family])):
        g["p_holm"] = float(p)
    for r, e in zip(table, enough):
        for g in (r.get(gains) or {}).values() if not e else ():
            g["p_holm"] = 1.0


def claims(table: Sequence[Mapping[str, Any]], gains: str = "gain") -> list[str]:
    """What may be said: instrument and horizon where the ensemble gains over every rival.

    Each gain's interval lies above zero and its Holm-adjusted p is below :data:`significance.ALPHA`, so that of all that is claimed of a
    market without anything to find, something is wrong in 2.5 % of the cases at most.
    """
    out = []
    for row in table:
        gain = row.get(gains) or {}
        shown = (g["interval"][0] > 0 and g.get("p_holm", 1.0) < ALPHA for g in gain.values())
        if row["verdict"] == "sufficient" and gain and all(shown):
            out.append(f"{row['instrument']} {row['horizon']}: better log-loss than {', '.join(gain)}")
    return out


def score_catalog(
    artifact: str | Path, root: str | Path, ids: Sequence[str] | None = None, start: int | None = None, end: int | None = None,
    seed: int = 0, own: Sequence[str] = (), altdata: AltData | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Score an artifact on a catalog: the stream runs from `start` (None: the catalog's first event), scored are decisions after the
    artifact's training range. `altdata`: alternative data for the members that look at them. Raises InputError where there are none."""
    from cift_models.features import NAMES

    found = artifacts.read(artifact, NAMES)
    instruments, chunks = read_catalog(root, ids or found.manifest["instruments"], start, end)
    engine = Engine.load(artifact, instruments, own)
    if altdata is not None:
        engine.tell(altdata)
    baselines = Baselines.load(found.path)
    since = max(found.manifest["range"]["end"] + 1, start or 0)
    sample = Sample(instruments, NAMES, len(engine.members), baselines.columns, since=since)
    with Steps("evaluate", 0, "events") as steps:
        for block in stream(instruments, chunks):
            sample.push(block, engine.predict(block))
            steps.advance(len(block.events))
    got = sample.finish()
    some_outcome(got, found, root)
    trained = [found.manifest["instruments"].index(i.id) for i in instruments]
    scores = evaluate(got, engine.ensemble.threshold[trained], [i.id for i in instruments], engine.members, baselines.only(trained), seed)
    return {**scores, "model_version": engine.model_version, "failures": engine.failures}


def some_outcome(
    sample: Mapping[str, NDArray[Any]] | None, found: artifacts.Artifact, root: str | Path
) -> Mapping[str, NDArray[Any]]:
    """`sample` itself. Raises InputError where no decision of it has an outcome at a horizon that `found` was trained for."""
    if sample is None or not len(sample["ts"]):
        raise InputError(f"no decision in {root} after the training range of {found.path}: choose a later --end or other data")
    horizons = [h for h in range(H) if LABELS[h] in found.manifest["horizons_trained"]]
    if not np.isfinite(sample["move"][:, horizons]).any():
        raise InputError(
            f"{len(sample['ts']):,} decisions in {root} after the training range of {found.path}, and the data end before any of them has "
            f"an outcome ({LABELS[horizons[0]]} at the least): choose a later --end or other data"
        )
    return sample


# --- splits ---------------------------------------------------------------------------------------------------------------------------


class Fold(NamedTuple):
    """Rows to choose on and rows to judge on; `tested`: the groups that are judged."""

    train: I64
    test: I64
    tested: tuple[int, ...]


def groups(hours: I64, n: int) -> I64:
    """Edges (n + 1,) of `n` groups of equal trading time; group g is edges[g] <= t < edges[g + 1]. `hours` (m, 2): when the market traded,
    [first, last] ns, ascending; the time between counts nothing."""
    ends = np.r_[0, np.cumsum(hours[:, 1] + 1 - hours[:, 0])]
    at = np.array([int(ends[-1]) * g // n for g in range(n + 1)], np.int64)
    i = np.minimum(np.searchsorted(ends, at, "right") - 1, len(hours) - 1)
    return np.asarray(hours[i, 0] + at - ends[i], np.int64)


def within(hours: I64, first: int, last: int) -> I64:
    """What of `hours` (m, 2) lies in [first, last] ns."""
    return np.clip(hours[(hours[:, 1] >= first) & (hours[:, 0] <= last) & (first <= last)], first, last)


def purged(ts: I64, known_at: I64, edges: I64, tested: Sequence[int], embargo_ns: int = 0) -> I64:
    """Rows outside the groups `tested` whose life [ts, known_at] (n,) meets none of theirs, nor begins within `embargo_ns` after it.

    A group's life runs from its first edge to its last, or until the last of its own rows is known. Lopez de Prado (2018), section 7.4.
    """
    keep = np.ones(len(ts), np.bool_)
    for g in tested:
        first, last = int(edges[g]), int(edges[g + 1]) - 1
        mine = (ts >= first) & (ts <= last)
        last = max(last, int(known_at[mine].max(initial=last)))
        keep &= (ts > last + embargo_ns) | (known_at < first)
    return np.flatnonzero(keep)


def cpcv(ts: I64, known_at: I64, edges: I64, test_groups: int = 2, embargo_ns: int = 0) -> list[Fold]:
    """Combinatorial purged cross-validation: every choice of `test_groups` among the groups of `edges` is judged once, what is left after
    :func:`purged` is chosen on. Lopez de Prado (2018), chapter 12. `ts` (n,) when each row was decided, `known_at` when its outcome was
    known, ns. Raises InputError unless 1 <= test_groups < groups."""
    n = len(edges) - 1
    if not 1 <= test_groups < n:
        raise InputError(f"{test_groups} test groups of {n}: choose from 1 to {n - 1}")
    place = np.searchsorted(edges[1:-1], ts, "right")
    return [
        Fold(purged(ts, known_at, edges, tested, embargo_ns), np.flatnonzero(np.isin(place, tested)), tested)
        for tested in combinations(range(n), test_groups)
    ]


def paths(n: int, test_groups: int) -> I64:
    """Which split of :func:`cpcv` judges each group in each of its whole paths through time: (C(n - 1, test_groups - 1), n)."""
    splits = list(combinations(range(n), test_groups))
    return np.array([[i for i, tested in enumerate(splits) if g in tested] for g in range(n)]).T


def expanding(ts: I64, known_at: I64, edges: I64, embargo_ns: int = 0) -> list[Fold]:
    """Walk-forward: each group but the first is judged, all that was known `embargo_ns` before it began is chosen on."""
    place = np.searchsorted(edges[1:-1], ts, "right")
    return [
        Fold(np.flatnonzero((place < g) & (known_at + embargo_ns < edges[g])), np.flatnonzero(place == g), (g,))
        for g in range(1, len(edges) - 1)
    ]
