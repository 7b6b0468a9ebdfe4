"""Honest scores: the ensemble and its members out of sample, beside baselines, with intervals.

Takes predictions and labels of decisions that nothing was fitted on (:class:`Sample`), gives a plain dict for `summary["scores"]`: a
table of instrument x horizon with log-loss, F1, accuracy, calibration error, the share of moves that pay for the spread and the effective
number of labels. Intervals are from a block bootstrap (Künsch 1989), blocks longer than the horizon. The baselines (persistence, time of
day, logistic regression on the best bid and offer) are fitted on the training range and travel with the artifact.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from catalog.errors import InputError
from catalog.events import Instrument, read_catalog
from catalog.progress import Steps
from cift_models import artifacts
from cift_models.inference import Engine, Predictions, stream
from cift_models.labels import F64, I8, I64, LABELS, H, Labeller, Study, Thinned, classify, effective, last_known, macro_f1, pays
from cift_models.significance import ALPHA, agreement, confidence_set, holm, mean_test
from cift_models.windows import HORIZONS_NS, Block

CAP: Final = 200_000  # decisions that a sample holds
ENOUGH: Final = 100  # effective labels below which a score says "insufficient"
DAY_PARTS: Final = 48
RESAMPLES: Final = 1_000
_DAY_NS: Final = 86_400_000_000_000
_TINY: Final = 1e-6


def level1_columns() -> list[str]:
    """The shape of the book as far as a feed of best bid and offer tells it: what the logistic baseline looks at."""
    from cift_models.features import FEATURES

    return [f.name for f in FEATURES if f.group == "book shape" and f.needs == 1 and f.model_input]


class Baselines:
    """Three forecasts any model has to beat, each giving (n, 3) probabilities.

    `persistence` (I, H, 4, 3): P(class | newest known class, or none yet). `day` (I, 48, H, 3): P(class | half hour of the UTC
    day). `coef` (I, H, 3, F + 1): multinomial logistic regression on the standardised columns `columns`, which a level-1 feed has.
    """

    names = ("persistence", "time of day", "level-1 logistic")

    def __init__(self, columns: Sequence[str], persistence: F64, day: F64, coef: F64, centre: F64, scale: F64) -> None:
        self.columns = tuple(columns)
        self.persistence, self.day, self.coef, self.centre, self.scale = persistence, day, coef, centre, scale

    @classmethod
    def fit(cls, study: Study, columns: Sequence[str], most: int = 20_000) -> Self:
        """On everything up to the weight slice: the same rows that members learn and calibrate from."""
        from sklearn.linear_model import LogisticRegression

        t, n = study.table, len(study.instruments)
        place = [study.names.index(c) for c in columns]
        me = cls(columns, np.full((n, H, 4, 3), 1 / 3), np.full((n, DAY_PARTS, H, 3), 1 / 3), np.zeros((n, H, 3, len(place) + 1)),
                 np.zeros((n, len(place))), np.ones((n, len(place))))  # fmt: skip
        for k in range(n):
            mine = np.flatnonzero((t.instrument == k) & (t.ts < study.split.weigh))
            if not len(mine):
                continue
            x = np.where(np.isfinite(t.rows[mine][:, place]), t.rows[mine][:, place], np.nan).astype(np.float64)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # columns that the feed does not have
                centre, scale = np.nanmean(x, axis=0), np.nanstd(x, axis=0)
            me.centre[k], me.scale[k] = np.nan_to_num(centre), np.where(np.nan_to_num(scale) > 1e-9, np.nan_to_num(scale), 1.0)
            z = me._inputs(x, np.full(len(x), k))
            for h in range(H):
                y = study.classes(h)[mine]
                ok = (y >= 0) & (t.known_at[mine, h] <= study.split.weigh)
                if not ok.any():
                    continue
                rates = (np.bincount(y[ok], minlength=3) + 1.0) / (ok.sum() + 3.0)
                before = last_known(t.ts[mine], t.known_at[mine, h], y)
                worth = effective(t.ts[mine][ok], t.known_at[mine, h][ok]) / ok.sum()
                for last in range(-1, 3):
                    me.persistence[k, h, last + 1] = _rates(y[ok & (before == last)], rates, worth)
                part = (t.ts[mine] % _DAY_NS) * DAY_PARTS // _DAY_NS
                for p in range(DAY_PARTS):
                    me.day[k, p, h] = _rates(y[ok & (part == p)], rates, worth)
                me.coef[k, h, :, -1] = np.log(rates)
                some = np.flatnonzero(ok)[:: max(1, -(-int(ok.sum()) // most))]
                if len(np.unique(y[some])) > 1 and len(place):
                    fitted = LogisticRegression(C=1.0, max_iter=200).fit(z[some], y[some])
                    coef, bias = fitted.coef_, fitted.intercept_
                    if len(fitted.classes_) == 2:
                        coef, bias = np.stack([-coef[0] / 2, coef[0] / 2]), np.array([-bias[0] / 2, bias[0] / 2])
                    me.coef[k, h, :, :-1], me.coef[k, h, :, -1] = 0.0, np.log(_TINY)
                    me.coef[k, h, fitted.classes_, :-1], me.coef[k, h, fitted.classes_, -1] = coef, bias
        return me

    def _inputs(self, x: F64, instrument: I64) -> F64:
        z = (x - self.centre[instrument]) / self.scale[instrument]
        return np.clip(np.nan_to_num(z, nan=0.0, posinf=5.0, neginf=-5.0), -5.0, 5.0)

    def predict(self, h: int, ts: I64, instrument: I64, before: I8, x: F64) -> dict[str, F64]:
        """Name -> (n, 3), for horizon `h`; `before` the newest known class (-1: none), `x` (n, F) the level-1 columns."""
        part = (ts % _DAY_NS) * DAY_PARTS // _DAY_NS
        z = self._inputs(x, instrument)
        score = np.einsum("nf,ncf->nc", z, self.coef[instrument, h, :, :-1]) + self.coef[instrument, h, :, -1]
        e = np.exp(score - score.max(axis=1, keepdims=True))
        return {
            "persistence": self.persistence[instrument, h, before.astype(np.int64) + 1],
            "time of day": self.day[instrument, part, h],
            "level-1 logistic": e / e.sum(axis=1, keepdims=True),
        }

    def only(self, rows: Sequence[int]) -> Baselines:
        """Those of some of the trained instruments, in another order."""
        return Baselines(self.columns, *(a[list(rows)] for a in (self.persistence, self.day, self.coef, self.centre, self.scale)))

    def save(self, folder: Path) -> None:
        np.savez(
            folder / "baselines.npz", columns=np.array(self.columns, dtype=np.str_), persistence=self.persistence, day=self.day,
            coef=self.coef, centre=self.centre, scale=self.scale,
        )  # fmt: skip

    @classmethod
    def load(cls, folder: Path) -> Self:
        with np.load(folder / "baselines.npz", allow_pickle=False) as z:
            return cls([str(c) for c in z["columns"]], z["persistence"], z["day"], z["coef"], z["centre"], z["scale"])


def _rates(y: I8, prior: F64, worth: float) -> F64:
    """Class rates, shrunk towards `prior` by ten independent labels' worth of it; each label here is `worth` an independent one."""
    return (worth * np.bincount(y, minlength=3) + 10 * prior) / (worth * len(y) + 10)


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
            votes=((members, H, 3), f32), level1=((len(self._columns),), f32),
        )  # fmt: skip

    def push(self, block: Block, p: Predictions) -> None:
        """`p` as the engine answered to `block`."""
        rows = block.rows[block.closes]
        outcomes = self._labeller.push(block.events, np.ascontiguousarray(block.rows[:, self._mid]), block.closes)
        self._held.push(
            p.ts, p.instrument, outcomes, p.ts >= self._since, spread=rows[:, self._spread], proba=p.proba, magnitude=p.magnitude,
            direction=p.direction, votes=p.votes, level1=rows[:, self._columns],
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

    Non-overlapping blocks of equal time, 200 at most; NaN where there are fewer than 8.
    """
    if len(values) < 2:
        return Interval(float("nan"), float("nan"))
    span = int(ts[-1] - ts[0]) + 1
    width = max(block_ns, -(-span // 200))
    group = (ts - ts[0]) // width
    used, group = np.unique(group, return_inverse=True)
    if len(used) < 8:
        return Interval(float("nan"), float("nan"))
    total, count = np.bincount(group, weights=values), np.bincount(group)
    draw = np.random.default_rng(seed).integers(0, len(used), (resamples, len(used)))
    means = total[draw].sum(axis=1) / count[draw].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def log_loss(proba: F64, y: I8) -> F64:
    """(n,) negative log probability of what happened."""
    return -np.log(np.clip(proba[np.arange(len(y)), y], _TINY, 1.0))


def calibration_error(proba: F64, y: I8, bins: int = 15) -> float:
    """Expected calibration error (Naeini et al. 2015) over all three classes, in equally filled bins of the predicted probability."""
    error, n = 0.0, len(y)
    for c in range(3):
        order = np.argsort(proba[:, c], kind="stable")
        for part in np.array_split(order, bins):
            if len(part):
                error += abs(float(proba[part, c].mean()) - float((y[part] == c).mean())) * len(part) / (3 * n)
    return error


def weighted_f1(truth: I8, guess: I8) -> float:
    """F1 of the three classes, weighted by how often each is true."""
    total = 0.0
    for c in range(3):
        hit, true, guessed = int(((truth == c) & (guess == c)).sum()), int((truth == c).sum()), int((guess == c).sum())
        total += 2 * hit / max(1, true + guessed) * true / max(1, len(truth))
    return total


def _scores(proba: F64, y: I8, ts: I64, horizon_ns: int, seed: int) -> dict[str, Any]:
    guess, loss = proba.argmax(axis=1).astype(np.int8), log_loss(proba, y)
    return {
        "log_loss": float(loss.mean()),
        "log_loss_interval": list(block_bootstrap(loss, ts, 2 * horizon_ns, seed)),
        "macro_f1": macro_f1(y, guess),
        "weighted_f1": weighted_f1(y, guess),
        "accuracy": float((guess == y).mean()),
        "ece": calibration_error(proba, y),
    }


def evaluate(
    sample: Mapping[str, NDArray[Any]], threshold: F64, instruments: Sequence[str], members: Sequence[str],
    baselines: Baselines | None = None, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """The table of scores, JSON-able. `threshold` (I, H) ticks; `sample` from :meth:`Sample.finish`; `members` name its votes' columns.

    Each row of `table` has instrument, horizon, n, `effective` labels, `verdict` ("insufficient" below 100), `pays` (share of moves
    beyond the spread), `ensemble`, `members`, `baselines` (scores each; members over the decisions they voted in, with their `cover`),
    `decided` (the decisions with a direction: cover, hit rate, mean signed move less spread, ticks), and `gain` of the ensemble over
    each baseline in log-loss with its interval. All models are compared on the decisions that have a prediction.

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
    return {"table": table, "decisions": len(sample["ts"]), "claims": claims(table), "member_claims": claims(table, "member_gain")}


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


def lines(scores: Mapping[str, Any]) -> list[str]:
    """The scores as text: a line for each instrument and horizon, then, where there are baselines, one with the tests of each."""
    head = ("labels", 8), ("log-loss", 10), ("best baseline", 15), ("macro-F1", 10), ("ECE", 7), ("pays", 7)
    out = [f"{'instrument':<22}{'horizon':<9}" + "".join(f"{name:>{w}}" for name, w in head) + "  verdict"]
    for r in scores["table"]:
        cells = [str(r["effective"]), "-", "-", "-", "-", "-"]
        if e := r.get("ensemble"):
            best = min((b["log_loss"] for b in r.get("baselines", {}).values()), default=float("nan"))
            cells[1:] = f"{e['log_loss']:.4f}", f"{best:.4f}", f"{e['macro_f1']:.3f}", f"{e['ece']:.3f}", f"{r['pays']:.2f}"
        out.append(f"{r['instrument']:<22}{r['horizon']:<9}" + "".join(f"{c:>{w}}" for c, (_, w) in zip(cells, head)) + f"  {r['verdict']}")
    tested = [r for r in scores["table"] if r.get("gain")]
    if tested:
        out.append(f"{'instrument':<22}{'horizon':<9}{'least gain, Holm p':<35}{'over members':<30}  3 of 5 less plain, p")
    for r in tested:
        a, gains = r["agreement"], []
        for kind in ("gain", "member_gain"):
            name, g = min(r[kind].items(), key=lambda x: x[1]["mean"], default=("", None))
            gains.append(f"{g['mean']:+.4f} {g['p_holm']:.3f} {name[:18]}" if g else "-")
        rule = f"{a['difference']:+.3f} {a['p']:.3f}" if "p" in a else "-"
        out.append(f"{r['instrument']:<22}{r['horizon']:<9}{gains[0]:<35}{gains[1]:<30}  {rule}")
    sets = [r for r in tested if r["mcs"]["p"]]
    out += [f"{r['instrument']:<22}{r['horizon']:<9}may be the best: {', '.join(r['mcs']['included'])}" for r in sets]
    for kind, rivals in (("claims", "baseline"), ("member_claims", "member")):
        shown = [c.partition(":")[0] for c in scores.get(kind, ())]
        if tested:
            out.append(f"beats every {rivals}: " + (", ".join(shown) if shown else "nowhere, by Holm-adjusted tests"))
    return out


def score_catalog(
    artifact: str | Path, root: str | Path, ids: Sequence[str] | None = None, start: int | None = None, end: int | None = None,
    seed: int = 0, own: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Score an artifact on a catalog: the stream runs from `start` (None: the catalog's first event), scored are decisions after the
    artifact's training range. Raises InputError where there are none."""
    from cift_models.features import NAMES

    found = artifacts.read(artifact, NAMES)
    instruments, chunks = read_catalog(root, ids or found.manifest["instruments"], start, end)
    engine = Engine.load(artifact, instruments, own)
    baselines = Baselines.load(found.path)
    since = max(found.manifest["range"]["end"] + 1, start or 0)
    sample = Sample(instruments, NAMES, len(engine.members), baselines.columns, since=since)
    with Steps("evaluate", 0, "events") as steps:
        for block in stream(instruments, chunks):
            sample.push(block, engine.predict(block))
            steps.advance(len(block.events))
    got = sample.finish()
    if not len(got["ts"]):
        raise InputError(f"no decision in {root} after the training range of {found.path}: choose a later --end or other data")
    trained = [found.manifest["instruments"].index(i.id) for i in instruments]
    scores = evaluate(got, engine.ensemble.threshold[trained], [i.id for i in instruments], engine.members, baselines.only(trained), seed)
    return {**scores, "model_version": engine.model_version, "failures": engine.failures}
