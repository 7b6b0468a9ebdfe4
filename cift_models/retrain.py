"""Daily retraining: a challenger that starts from the champion meets it on data that neither has seen, and replaces it only with evidence.

Takes an artifact (the champion) and a catalog that goes on after its training range. The challenger's members start from the champion's
and are fitted on what is new, with as much of the old as is wanted; classes, instruments and members stay the champion's, so that both
are asked the same. The last part of what is new is kept from the challenger's training (labels purged by their known time, then an
embargo), and there both predict as they would live. Gives the verdict, and with it the new artifact in the place of `out`, at once.
The rule stands in :func:`judge` and in docs/tutorial.md.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from catalog.altdata import Table as AltData
from catalog.asof import lookup
from catalog.errors import InputError
from catalog.events import catalog_range
from catalog.moments import nanoseconds
from catalog.progress import Steps
from cift_models import artifacts, settings
from cift_models.calibration import calibration, worsening
from cift_models.ensemble import Config as EnsembleConfig
from cift_models.inference import Engine, Latency, stream
from cift_models.labels import F64, LABELS, H, Split, Thresholds, classify, effective, walk_forward
from cift_models.scorecard import plain
from cift_models.significance import ALPHA, holm, mean_test
from cift_models.train import LEAST_DECISIONS, Fold, catalog_source, digest, events_in, gathered_in
from cift_models.train import Config as TrainConfig
from cift_models.validate import ENOUGH, Sample, block_bootstrap, log_loss
from cift_models.weigh import WARM_NS, Source, one_thread
from cift_models.windows import HORIZONS_NS
from cift_models.work import code_key, data_key, unfinished

COMPARED: Final = "compared"
SILENT: Final = 0.01  # share of the champion's decisions on which the challenger may have nothing to say


@dataclass(frozen=True, slots=True)
class Config:
    """`test`: share of the decisions after the champion's training range on which both meet. `embargo_ns`: so long after the challenger's
    training nothing is compared, at least the longest horizon."""

    test: float = 0.3
    embargo_ns: int = HORIZONS_NS[-1]

    def __post_init__(self) -> None:
        if not (0 < self.test < 1 and self.embargo_ns >= HORIZONS_NS[-1]):
            raise InputError(f"test lies between 0 and 1, embargo_ns is {HORIZONS_NS[-1]} or more")


def retrain(
    champion: str | Path, catalog: str | Path, out: str | Path, since: int | None = None, start: int | None = None, end: int | None = None,
    seed: int = 0, own: Sequence[str] = (), altdata: AltData | None = None, tables: settings.Tables | None = None,
    ids: Sequence[str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train a challenger of `champion`, compare them, and put it in the place of `out` where it is better; returns the verdict.

    `since` (ns UTC): the challenger learns from there on; None: from the end of the champion's training range. `start`: where reading
    begins (None: with the catalog), for books fill from there. `tables`: settings that differ from the champion's, and "retrain"
    (:class:`Config`). `ids`: None, or the champion's instruments. The verdict, as JSON, is also written to `<out>.verdict.json`. Killed
    at any moment, the same call goes on. Raises InputError for wrong input, for a champion that was changed, and where too little is new.
    """
    from cift_models.features import NAMES

    champion, catalog, out = Path(champion), Path(catalog), Path(out)
    artifacts.writable(out)
    if done := _promoted_already(out):
        return done
    found = artifacts.read(champion, NAMES)
    m = found.manifest
    if ids is not None and sorted(ids) != sorted(m["instruments"]):
        raise InputError(f"{champion} was trained on {', '.join(m['instruments'])}: name these or none; others need their own training")
    ids, trained = m["instruments"], int(m["range"]["end"])
    tables, last = dict(tables or {}), catalog_range(catalog, ids)[1]
    how = settings.checked(Config, tables.pop("retrain", {}), "[retrain]")
    if min(last, end if end is not None else last) <= trained:
        raise InputError(
            f"no event in {catalog} after {_iso(trained)}, up to which {champion} was trained: import newer data, or choose a later --end"
        )
    since = max(since if since is not None else trained + 1, start or 0)
    chosen = dict(m["members"])
    before = {name: told for name, told in m["settings"].items() if name in {"train", "ensemble", *chosen}}  # not of members left out
    given = {name: {**before.get(name, {}), **tables.get(name, {})} for name in {*before, *tables}}
    train = settings.checked(TrainConfig, {**given.pop("train"), "folds": 1}, "[train]")
    mixing = settings.checked(EnsembleConfig, given.pop("ensemble"), "[ensemble]")
    source = catalog_source(catalog, ids, start, end)
    instruments = source()[0]
    old = Engine.load(champion, instruments, own)
    configs = settings.of_members(given, chosen)
    told = {name: settings.plain(c) for name, c in {"retrain": how, "train": train, "ensemble": mixing, **configs}.items()}
    command = {"catalog": str(catalog.resolve()), "champion": str(champion.resolve()), "start": start, "end": end, "seed": seed, **told}
    data = data_key(catalog) | {"altdata": digest(altdata), "champion": found.version, "since": since}
    total = events_in(catalog, ids, start, end)
    known = lookup(altdata, ids) if altdata is not None else None
    with unfinished(out, {"command": command, "data": data, "code": code_key(list(chosen.values()))}) as work, one_thread():
        gathered = gathered_in(work, source, chosen, train, configs, total, keep=True, since=since)
        split = _split(gathered.table.ts, trained, since, train, how, catalog)
        with np.load(found.path / "labels.npz", allow_pickle=False) as z:
            thresholds = Thresholds(z["balanced"], z["spread"])
        members = dict(old._named())
        fold = Fold(
            work, 0, source, split, split.end, gathered, chosen, train, configs, mixing, known, altdata, total, members, thresholds
        )  # fmt: skip
        folds = [fold.run(seed)]
        if lost := [h for h in m["horizons_trained"] if h not in folds[0]["artifact"]["horizons_trained"]]:
            why = next((line for line in folds[0]["left_out"] if lost[0] in line), lost[0])
            raise InputError(f"too little to learn from since {_iso(since)}: {why}; wait for more data, or name an earlier --since")
        latency = Latency(m["latency"]["source"], tuple(m["latency"]["q"]), tuple(m["latency"]["ns"]))
        if train.measure_latency:
            latency = fold.latency(folds[0]["seeds"]["kept"])
        more = {"retrained": {"champion": found.version, "since": since}}
        challenger = work.step("challenger", lambda part: fold.write(part / "artifact", folds, seed, latency, more)) / "artifact"

        def meet(part: Path) -> None:
            begin = min(since, trained) - WARM_NS
            samples = compare([champion, challenger], source, split.end + how.embargo_ns, begin, own, altdata, total)
            table = thresholds.balanced[:, :H]
            told = judge(samples[0], samples[1], table, ids, m["horizons_trained"], seed)
            versions = {"champion": found.version, "challenger": artifacts.read(challenger).version}
            (part / "verdict.json").write_text(json.dumps(plain({**told, **versions, "since": since}), indent=1, allow_nan=False) + "\n")

        verdict: dict[str, Any] = json.loads((work.step(COMPARED, meet) / "verdict.json").read_text())
        if artifacts.read(champion, NAMES).version != found.version:
            raise InputError(f"{champion} was replaced while its challenger was trained: run the command again")
        _tell(out, verdict)
        if verdict["promoted"]:
            artifacts.put(challenger, out)
        return verdict


def since(text: str, out: Path) -> tuple[Path, int | None]:
    """What `--since` means: (champion, first time to learn from, None: after its range). Raises InputError for neither folder nor time."""
    if Path(text).exists():
        return Path(text), None
    try:
        return out, nanoseconds(text)
    except InputError:
        raise InputError(f"--since {text} is neither a folder of trained models nor a time (2024-05-08, 2024-05-08T14:30:00)") from None


def _promoted_already(out: Path) -> dict[str, Any] | None:
    """The verdict of a run that was killed when its challenger had just taken its place; what is left of its work is removed."""
    folder = out.resolve().with_name(out.resolve().name + ".work")
    try:
        verdict: dict[str, Any] = json.loads((folder / COMPARED / "verdict.json").read_text())
        if artifacts.read(out).version != verdict["challenger"]:
            return None
    except (OSError, ValueError, KeyError, InputError):
        return None
    shutil.rmtree(folder)
    return verdict


def _tell(out: Path, verdict: Mapping[str, Any]) -> None:
    part = out.with_name(f".{out.name}.verdict.part")
    part.write_text(json.dumps(verdict, indent=1) + "\n")
    part.replace(out.with_name(f"{out.name}.verdict.json"))


def _split(ts: NDArray[np.int64], trained: int, since: int, train: TrainConfig, how: Config, catalog: Path) -> Split:
    """The challenger's slices, up to where the last share of the new decisions begins. Raises InputError where there are too few."""
    new = ts[ts > trained]
    if len(new) < 2 * LEAST_DECISIONS:
        raise InputError(
            f"{len(new)} decisions in {catalog} after {_iso(max(trained, since))}, {2 * LEAST_DECISIONS} are needed to train a challenger "
            "and to compare it: wait for more data"
        )
    cut = int(new[int(len(new) * (1 - how.test))])
    split = walk_forward(ts[ts < cut], 1, train.shares, train.embargo_ns)[0]
    return split._replace(end=cut)


def compare(
    paths: Sequence[Path], source: Source, test: int, begin: int = 0, own: Sequence[str] = (), altdata: AltData | None = None,
    total: int = 0,
) -> list[dict[str, NDArray[Any]]]:  # fmt: skip
    """One pass of all artifacts, as they would run live; their decisions from `test` (ns) on. They see the stream from `begin` on."""
    from cift_models.features import NAMES

    instruments, chunks = source()
    engines = [Engine.load(p, instruments, own) for p in paths]
    if altdata is not None:
        for e in engines:
            e.tell(altdata)
    samples = [Sample(instruments, NAMES, len(e.members), since=test) for e in engines]
    with Steps("champion and challenger", total, "events") as steps:
        for block in stream(instruments, chunks):
            if len(block.events) and block.events["ts_init"][-1] >= begin:
                for engine, sample in zip(engines, samples):
                    sample.push(block, engine.predict(block))
            steps.advance(len(block.events))
    return [s.finish() for s in samples]


def judge(
    champion: Mapping[str, NDArray[Any]], challenger: Mapping[str, NDArray[Any]], threshold: F64, ids: Sequence[str],
    horizons: Sequence[str], seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Is the challenger better? Both samples (:meth:`validate.Sample.finish`) hold the same decisions; `threshold` (I, H) ticks.

    A row of `table` for each instrument and horizon: `gain`, what the champion's log-loss exceeds the challenger's by, its block-bootstrap
    interval, `p` of Diebold-Mariano that it is above zero and `p_loss` that it is below, both also Holm-adjusted over the rows with 100
    independent labels or more. `calibration`: by horizon, over all instruments, both errors and the interval of their difference.
    `promoted` where
    1. somewhere the gain is shown: adjusted p below :data:`significance.ALPHA`, interval above zero;
    2. nowhere a loss is shown: adjusted p_loss below the same;
    3. nowhere a larger calibration error is shown: the interval, of joint level 1 - ALPHA one-sided over the horizons, above zero;
    4. the challenger has a say in all but :data:`SILENT` of the champion's decisions.
    """
    assert np.array_equal(champion["ts"], challenger["ts"]) and np.array_equal(champion["instrument"], challenger["instrument"])
    ts, of, table, curves = champion["ts"], champion["instrument"], list[dict[str, Any]](), list[dict[str, Any]]()
    said = [np.isfinite(s["proba"]).all(axis=2) for s in (champion, challenger)]
    for h in (LABELS.index(name) for name in horizons):
        y = classify(champion["move"][:, h], threshold[of, h])
        p, q = (s["proba"][:, h].astype(np.float64) for s in (champion, challenger))
        both = (y >= 0) & said[0][:, h] & said[1][:, h]
        for k, id_ in enumerate(ids):
            at = np.flatnonzero(both & (of == k))
            row: dict[str, Any] = {"instrument": id_, "horizon": LABELS[h], "n": len(at)}
            row["effective"] = effective(ts[at], champion["known_at"][at, h])
            table.append(row)
            if len(at):
                losses = [log_loss(v[at], y[at]) for v in (p, q)]
                d = losses[0] - losses[1]
                test, interval = mean_test(d, ts[at], HORIZONS_NS[h]), block_bootstrap(d, ts[at], 2 * HORIZONS_NS[h], seed)
                row |= {"champion": float(losses[0].mean()), "challenger": float(losses[1].mean()), "gain": test.mean}
                row |= {"interval": list(interval), "p": test.p, "p_loss": mean_test(-d, ts[at], HORIZONS_NS[h]).p}
        if both.any():
            errors = [calibration(v[both], y[both], ts[both], HORIZONS_NS[h], seed=seed).ece for v in (p, q)]
            _, low, high = worsening(q[both], p[both], y[both], ts[both], HORIZONS_NS[h], 1 - 2 * ALPHA / len(horizons), seed=seed)
            curves.append({"horizon": LABELS[h], "champion": errors[0], "challenger": errors[1], "interval": [low, high]})
    family = [r for r in table if r["effective"] >= ENOUGH]
    for name in ("p", "p_loss"):
        for r, adjusted in zip(family, holm([r[name] for r in family])):
            r[f"{name}_holm"] = float(adjusted)
    gained = [r for r in family if r["p_holm"] < ALPHA and r["interval"][0] > 0]
    lost = [r for r in family if r["p_loss_holm"] < ALPHA]
    blurred = [c for c in curves if c["interval"][0] > 0]
    silent = float((said[0] & ~said[1]).any(axis=1).mean()) if len(ts) else 0.0
    if not family:
        why = f"fewer than {ENOUGH} independent labels of every instrument and horizon tell nothing"
    elif lost:
        why = f"worse at {_where(lost)}"
    elif blurred:
        why = f"worse calibrated at {', '.join(c['horizon'] for c in blurred)}"
    elif silent > SILENT:
        why = f"nothing to say in {silent:.0%} of the decisions"
    elif not gained:
        best = min(family, key=lambda r: r["p_holm"])
        most = f"{best['gain']:+.4f} at {best['instrument']} {best['horizon']}, Holm-adjusted p {best['p_holm']:.3f}"
        why = f"no gain in log-loss is shown at any of {len(family)} instruments x horizons (most: {most})"
    else:
        why = f"better log-loss at {_where(gained)}, nowhere worse, no worse calibrated"
    promoted = bool(gained) and not lost and not blurred and silent <= SILENT
    span = {"start": int(ts[0]), "end": int(ts[-1])} if len(ts) else {"start": None, "end": None}
    return {"promoted": promoted, "why": why, "test": {**span, "decisions": len(ts)}, "table": table, "calibration": curves}


def _where(rows: Sequence[Mapping[str, Any]], most: int = 4) -> str:
    told = [f"{r['instrument']} {r['horizon']} ({r['gain']:+.4f})" for r in rows]
    return ", ".join(told[:most]) + f" and {len(told) - most} more" * (len(told) > most)


def line(verdict: Mapping[str, Any], out: str | Path) -> str:
    """The verdict in one line."""
    if verdict["promoted"]:
        return f"promoted: {out} is now {verdict['challenger']}, in the place of {verdict['champion']}: {verdict['why']}"
    return f"not promoted: the champion {verdict['champion']} stays: {verdict['why']}"


def lines(verdict: Mapping[str, Any]) -> Iterator[str]:
    """The comparison as a table, for people."""
    for r in verdict["table"]:
        if "gain" in r:
            p = "insufficient" if "p_holm" not in r else f"Holm p {r['p_holm']:.3f}, of a loss {r['p_loss_holm']:.3f}"
            told = f"champion {r['champion']:.4f}, challenger {r['challenger']:.4f}, gain {r['gain']:+.4f}"
            yield f"{r['instrument']} {r['horizon']}: {r['effective']:,} independent labels; log-loss {told}, {p}"
    for c in verdict["calibration"]:
        yield f"all instruments {c['horizon']}: ECE champion {c['champion']:.4f}, challenger {c['challenger']:.4f}"


def _iso(ns: int) -> str:
    return str(np.datetime64(ns, "ns"))[:19] + "Z"
