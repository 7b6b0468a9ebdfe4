"""From a stream of events to an artifact folder: features, labels, members, calibration, weights, scores.

Takes a catalog (or any source of EVENT blocks that can be read more than once), reads it in bounded memory, and gives the path of the
artifact. Folds walk forward: in each, members fit on the first part, calibrate on the next, the ensemble learns weights and confidence on
the last, each purged by the time at which its labels are known; what follows the fold scores it. The last fold, which has all of the
data, is kept. What depends on chance is fitted with several seeds: the artifact holds the seed whose ensemble came out in the middle, and
its manifest tells the spread. Too little data leaves out horizons and members, and says so; where nothing remains, an InputError says
how much is needed. Training a catalog that is cut short leaves its finished steps beside `out`; the same call goes on from there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from catalog.altdata import Table as AltData
from catalog.asof import Lookup, lookup
from catalog.errors import InputError
from catalog.events import Instrument, read_catalog
from catalog.parquet import contents
from catalog.progress import Steps
from cift_models import artifacts, drift, settings
from cift_models.baselines import Baselines, level1_columns
from cift_models.ensemble import Config as EnsembleConfig
from cift_models.ensemble import Ensemble, Member, available, learning_rates, member_class
from cift_models.inference import DEFAULT_LATENCY, Engine, Latency, measure_latency, stream
from cift_models.labels import LABELS, H, Labeller, Split, Study, Table, Thinned, Thresholds, fit_thresholds, walk_forward
from cift_models.scorecard import plain
from cift_models.validate import evaluate
from cift_models.weigh import Source, Weighed, cut, one_thread, pooled_losses, weigh
from cift_models.windows import HORIZONS_NS
from cift_models.work import Work, code_key, data_key, pack, unfinished, unpack

Events = NDArray[np.void]
LEAST_EFFECTIVE: Final = 30  # independent labels of all instruments together that a horizon needs in the fit slice
LEAST_ROWS: Final = 200
LEAST_DECISIONS: Final = 1_000
TOLD, REFUSED = "told.json", "left-out.txt"


@dataclass(frozen=True, slots=True)
class Config:
    """`cap`: decision rows held for fitting, thinned evenly beyond. `shares`: of fit, calibration and weight slice. `embargo_ns`: so long
    before the next slice labels must be known. `seeds`: so many from `seed` on, of all members that depend on one."""

    cap: int = 200_000
    shares: tuple[float, float, float] = (0.6, 0.2, 0.2)
    embargo_ns: int = 0
    folds: int = 1
    seeds: int = 1
    measure_latency: bool = False

    def __post_init__(self) -> None:
        if not (all(s > 0 for s in self.shares) and abs(sum(self.shares) - 1) < 1e-9):
            raise InputError(f"shares {list(self.shares)}: three positive numbers that add up to 1 are needed")
        if min(self.cap, self.folds, self.seeds) < 1 or self.embargo_ns < 0:
            raise InputError("cap, folds and seeds begin at 1, embargo_ns at 0")


class Gathered(NamedTuple):
    """What one pass over the training range leaves: every `step`-th decision, and each member's own gatherings."""

    instruments: tuple[Instrument, ...]
    names: tuple[str, ...]
    table: Table
    own: dict[str, Any]
    step: int


def catalog_source(root: str | Path, ids: Sequence[str] | None = None, start: int | None = None, end: int | None = None) -> Source:
    """Reads the catalog afresh at each call; `start`, `end` ns UTC, both inclusive."""
    return lambda: read_catalog(root, ids, start, end)


def gather(
    source: Source, members: Mapping[str, str], cap: int, total: int = 0, configs: Mapping[str, Any] | None = None, since: int = 0
) -> Gathered:
    """One pass: features, labels and what members gather themselves, from `since` (ns) on; memory bounded by `cap` decision rows."""
    from cift_models.features import NAMES

    instruments, chunks = source()
    own = {}
    for name, path in members.items():
        make = member_class(path).gatherer
        told = {"config": configs[name]} if configs and name in configs and settings.takes_config(make) else {}
        own[name] = make(instruments, NAMES, **told)
    labeller = Labeller(instruments)
    held = Thinned(len(instruments), len(LABELS), cap, rows=((len(NAMES),), np.float32), spread=((), np.float64))
    mid, spread = NAMES.index("mid"), NAMES.index("spread")
    with Steps("features and labels", total, "events") as steps, np.errstate(over="ignore"):
        for block in stream(instruments, chunks):
            at, rows = block.events[block.closes], block.rows[block.closes]
            outcomes = labeller.push(block.events, np.ascontiguousarray(block.rows[:, mid]), block.closes)
            ts, late = at["ts_init"], cut(block, since)[1]
            held.push(ts, at["instrument"].astype(np.int64), outcomes, ts >= since, rows=rows, spread=rows[:, spread])
            for g in own.values():
                if g is not None and len(late.events):
                    g.push(late)
            steps.advance(len(block.events))
    held.learn(labeller.finish())
    z = held.result()
    return Gathered(tuple(instruments), NAMES, Table(*(z[f] for f in Table._fields)), own, held.step)


def study(
    gathered: Gathered, split: Split, seed: int, altdata: Lookup | None = None, thresholds: Thresholds | None = None
) -> tuple[Study, list[str]]:
    """Thresholds of the fit slice, unless they are given, and the horizons that can be learnt; and what was left out, in words."""
    from cift_models.features import FEATURES

    table, left = gathered.table, []
    inputs = tuple(f.name for f in FEATURES if f.model_input)
    in_fit = (table.ts >= split.start) & (table.ts < split.calibrate)
    known = Table(*table)._replace(move=np.where(table.known_at <= split.calibrate, table.move, np.nan))
    thresholds = thresholds or fit_thresholds(known, len(gathered.instruments), in_fit)
    all_ = Study(gathered.instruments, gathered.names, inputs, table, split, thresholds, tuple(range(H)), seed, altdata)
    usable = []
    for h in range(H):
        rows = all_.fit_rows(h)
        n = all_.independent(rows, h)
        if n < LEAST_EFFECTIVE or len(rows) < LEAST_ROWS:
            left.append(
                f"horizon {LABELS[h]}: {n} independent labels in the fit slice, {LEAST_EFFECTIVE} are needed "
                f"(about {LEAST_EFFECTIVE * HORIZONS_NS[h] / 1e9 / 0.6 / max(1, len(gathered.instruments)):.0f} s of data)"
            )
        elif len(np.unique(all_.classes(h)[rows])) < 2:
            left.append(f"horizon {LABELS[h]}: the mid always does the same, there is nothing to tell apart")
        else:
            usable.append(h)
    return all_._replace(usable=tuple(usable)), left


def train(
    source: str | Path | Source, instrument_ids: Sequence[str] | None = None, start: int | None = None, end: int | None = None,
    out: str | Path = "artifact", seed: int = 0, members: Sequence[str] | None = None, own: Sequence[str] = (),
    config: Config | None = None, altdata: AltData | None = None, tables: settings.Tables | None = None,
) -> Path:  # fmt: skip
    """Train on a catalog folder (or a :data:`Source`) and write the artifact `out`; returns its path.

    `start`, `end`: ns UTC, both inclusive. `members`: names among ensemble.MEMBERS (None: all there are); `own`: import paths
    "package.module:Class" of the user's. `altdata`: alternative data for the members that look at them. `tables`: what is set of members
    and of the ensemble, by name (:mod:`settings`). The same source, seed and settings give the same artifact, to the last byte. Training
    on a catalog folder may be killed at any moment: called again it goes on (:mod:`work`). A Source leaves nothing behind.
    Raises InputError for wrong input, and where the range is too short for any member at any horizon.
    """
    config, out = config or Config(), Path(out)
    artifacts.writable(out)
    chosen, mixing, configs = check(tables or {}, members, own)
    total, key = 0, None
    if not callable(source):
        total, root = events_in(source, instrument_ids, start, end), Path(source)
        told = {name: settings.plain(c) for name, c in {"train": config, "ensemble": mixing, **configs}.items()}
        command = {
            "catalog": str(root.resolve()), "symbols": list(instrument_ids or []), "start": start, "end": end, "seed": seed,
            "members": chosen, **told,
        }  # fmt: skip
        data = data_key(root) | {"altdata": digest(altdata)}
        key = {"command": command, "data": data, "code": code_key(list(chosen.values()))}
        source = catalog_source(source, instrument_ids, start, end)
    known = lookup(altdata, [i.id for i in source()[0]]) if altdata is not None else None
    with unfinished(out, key) as work, one_thread():
        gathered = gathered_in(work, source, chosen, config, configs, total, keep=key is not None)
        table = gathered.table
        if len(table.ts) < LEAST_DECISIONS:
            raise InputError(
                f"{len(table.ts)} decisions in the training range, {LEAST_DECISIONS} are needed (a decision is 100 events or 10 ms of an "
                "instrument): give a longer range"
            )
        splits = walk_forward(table.ts, config.folds, config.shares, config.embargo_ns)
        folds: list[dict[str, Any]] = []
        for f, split in enumerate(splits):
            last = f == len(splits) - 1
            upto = split.end if last else splits[f + 1].end
            fold = Fold(work, f, source, split, upto, gathered, chosen, config, configs, mixing, known, altdata, total)
            try:
                folds.append(fold.run(seed))
            except InputError as e:
                if last:
                    raise
                folds.append({"split": split._asdict(), "left_out": [str(e)], "scores": None, "after": None, "seeds": None})
        for line in folds[-1]["left_out"]:
            print(f"left out: {line}", file=sys.stderr)
        latency = fold.latency(folds[-1]["seeds"]["kept"]) if config.measure_latency else DEFAULT_LATENCY
        with Steps("save"):
            return fold.write(out, folds, seed, latency).path


def digest(altdata: AltData | None) -> str | None:
    if altdata is None:
        return None
    columns = (altdata.instrument, altdata.feature, altdata.value, altdata.ts_event, altdata.ts_known)
    return hashlib.sha256(json.dumps(altdata.names).encode() + b"".join(c.tobytes() for c in columns)).hexdigest()


def gathered_in(
    work: Work, source: Source, chosen: Mapping[str, str], config: Config, configs: Mapping[str, Any], total: int, keep: bool,
    since: int = 0,
) -> Gathered:  # fmt: skip
    """What :func:`gather` gives, from the work folder where it is there already."""
    made: list[Gathered] = []
    modules = [path.partition(":")[0] for path in chosen.values()]

    def make(part: Path) -> None:
        made.append(gather(source, chosen, config.cap, total, configs, since))
        pack(made[0], part, modules)

    if not keep:
        return gather(source, chosen, config.cap, total, configs, since)
    try:
        place = work.step("gathered", make)
    except TypeError as e:
        if not made:
            raise
        print(f"what was gathered holds {e} and cannot be kept: interrupted, training begins anew", file=sys.stderr)
    if made:
        return made[0]
    found: Gathered = unpack(place, modules)
    return found


@dataclass(slots=True)
class Fold:
    """One fold: its fits, one folder for each member and seed, then its weights and scores.

    `old` are members of an earlier artifact, from which those of the same name start, and which stay where they cannot be fitted again;
    `thresholds` its classes.
    """

    work: Work
    number: int
    source: Source
    split: Split
    upto: int
    gathered: Gathered
    chosen: Mapping[str, str]
    config: Config
    configs: Mapping[str, Any]
    mixing: EnsembleConfig
    known: Lookup | None
    altdata: AltData | None
    total: int
    old: Mapping[str, Member] = field(default_factory=dict)
    thresholds: Thresholds | None = None
    fits: dict[str, list[Path]] = field(default_factory=dict)  # by member, a folder for each seed

    def run(self, seed: int) -> dict[str, Any]:
        """What the manifest tells of this fold, with "artifact" as what it tells of the models. Raises InputError for too little data."""
        what, left = study(self.gathered, self.split, seed, self.known, self.thresholds)
        seeds = list(range(seed, seed + self.config.seeds))
        if what.usable:
            for name in self.chosen:
                made = [self._fit(what, name, s) for s in (seeds if self._seeded(name) else seeds[:1])]
                if refused := [p for p in made if (p / REFUSED).is_file()]:
                    left.append(f"member {name}: {(refused[0] / REFUSED).read_text()}")
                else:
                    self.fits[name] = made
        if not self.fits:
            more = "" if what.usable else ": give a longer range"  # members say themselves what they lack
            raise InputError("no member can be trained on this range: " + "; ".join(left) + more)
        place = self.work.step(f"fold-{self.number}-weighed", lambda part: self._weigh(part, what, seeds, left))
        found: dict[str, Any] = json.loads((place / TOLD).read_text())
        return found

    def _seeded(self, name: str) -> bool:
        return getattr(member_class(self.chosen[name]), "seeded", True)

    def _fit(self, what: Study, name: str, seed: int) -> Path:
        cls, step = member_class(self.chosen[name]), self._step(name, seed)
        opened = self.work.folder / f"{step}.open"  # what a fit keeps for itself while it runs

        def make(part: Path) -> None:
            told: dict[str, Any] = {}
            if (config := self.configs.get(name)) is not None:
                if "checkpoint" in getattr(config, "__dataclass_fields__", {}):
                    config = dataclasses.replace(config, checkpoint=opened)
                told = {"config": config}
            if (old := self.old.get(name)) is not None and "start" in inspect.signature(cls.fit).parameters:
                told["start"] = old
            with Steps(f"fit {name}" + (f", seed {seed}" if self.config.seeds > 1 else "") + self._where()):
                try:
                    cls.fit(what._replace(seed=seed), self.gathered.own[name], **told).save(part)
                except InputError as e:
                    if old is None:
                        (part / REFUSED).write_text(str(e))
                    else:
                        print(f"kept as it was: member {name}: {e}", file=sys.stderr)
                        old.save(part)

        place = self.work.step(step, make)
        shutil.rmtree(opened, ignore_errors=True)
        return place

    def _step(self, name: str, seed: int) -> str:
        return f"fold-{self.number}-{name}-seed-{seed}"

    def _where(self) -> str:
        return f", fold {self.number + 1} of {self.config.folds}" if self.config.folds > 1 else ""

    def _load(self, name: str, place: Path) -> Member:
        return member_class(self.chosen[name]).load(place, self.gathered.names)

    def _weigh(self, part: Path, what: Study, seeds: list[int], left: list[str]) -> None:
        """Weights and scores of every seed; the ensemble of the one in the middle, the baselines and the thresholds into `part`."""
        g, split, ids = self.gathered, self.split, [i.id for i in self.gathered.instruments]
        loaded = {name: [self._load(name, p) for p in places] for name, places in self.fits.items()}
        sets = [[m[i % len(m)] for m in loaded.values()] for i in range(len(seeds))]
        threshold = np.ascontiguousarray(what.thresholds.balanced[:, :H])
        eta, columns = learning_rates(g.table.ts, g.table.instrument, HORIZONS_NS, g.step), level1_columns()
        found = weigh(
            self.source, ids, g.names, sets, split, threshold, eta, self.mixing, self.upto, columns, self.altdata, self.total
        )  # fmt: skip
        baselines = Baselines.fit(what, columns)
        spread = [pooled_losses(_before(w.sample, split.end), threshold, w.ensemble.names, what.usable) for w in found]
        rank = [np.mean([spread[i][h]["ensemble"] for h in spread[i]]) if spread[i] else np.inf for i in range(len(seeds))]
        middle = int(np.argsort(rank, kind="stable")[len(seeds) // 2])
        kept: Weighed = found[middle]
        names, s = kept.ensemble.names, seeds[middle]
        after, later = None, None
        if kept.after is not None and len(kept.after["ts"]):
            after = evaluate(kept.after, threshold, ids, names, baselines, s)
            later = _by_seed([pooled_losses(w.after or {}, threshold, names, what.usable) for w in found])
        told = {
            "split": split._asdict(),
            "left_out": left,
            "scores": evaluate(_before(kept.sample, split.end), threshold, ids, names, seed=s),
            "after": after,
            "seeds": {"values": seeds, "kept": s, "log_loss": _by_seed(spread), "log_loss_after": later},
            "artifact": {
                "horizons_trained": [LABELS[h] for h in what.usable],
                "members": {name: self.chosen[name] for name in self.fits},
                "confident": kept.ensemble.confident.tolist(),
                "trust": kept.ensemble.trust.tolist(),
                "regret": kept.regret,
            },
        }
        kept.ensemble.save(part)
        baselines.save(part)
        drift.Reference.of(g.table.rows, g.table.instrument, len(ids)).save(part)
        np.savez(part / "labels.npz", balanced=what.thresholds.balanced, spread=what.thresholds.spread)
        (part / TOLD).write_text(json.dumps(plain(told), allow_nan=False))

    def _kept(self, seed: int) -> dict[str, Path]:
        """Name -> folder of the fit with `seed`, or of the only one."""
        return {name: next((p for p in places if p.name == self._step(name, seed)), places[0]) for name, places in self.fits.items()}

    def write(
        self, out: Path, folds: Sequence[Mapping[str, Any]], seed: int, latency: Latency, more: Mapping[str, Any] | None = None
    ) -> artifacts.Artifact:
        """The artifact of this fold, the last of what :meth:`run` told of all `folds`."""
        g, table, known = self.gathered, self.gathered.table, self.known
        kept, upto = folds[-1]["seeds"]["kept"], int(np.searchsorted(table.ts, self.split.end))
        manifest = {
            "features": list(g.names),
            "instruments": [i.id for i in g.instruments],
            "horizons_ns": list(HORIZONS_NS),
            "range": {"start": int(table.ts[0]), "end": int(table.ts[upto - 1]), "decisions": upto},
            "seed": seed,
            "latency": {"source": latency.source, "q": list(latency.q), "ns": list(latency.ns)},
            "altdata": known.told(self.split.start, self.split.end) if known is not None else None,
            "settings": {name: settings.plain(c) for name, c in {"train": self.config, "ensemble": self.mixing, **self.configs}.items()},
            **folds[-1]["artifact"],
            "folds": [{k: v for k, v in told.items() if k != "artifact"} for told in folds],
            **(more or {}),
        }
        return artifacts.write(out, manifest, lambda part: self._copy(part, kept))

    def _copy(self, part: Path, seed: int) -> None:
        """The files of the artifact: the members of `seed` and what was learnt of them."""
        for place in (*self._kept(seed).values(), self.work.folder / f"fold-{self.number}-weighed"):
            for f in sorted(place.iterdir()):
                if f.name != TOLD:
                    shutil.copy(f, part / f.name)

    def latency(self, seed: int) -> Latency:
        """Measured on this machine, of the models that are kept."""
        members, ids = [self._load(name, p) for name, p in self._kept(seed).items()], [i.id for i in self.gathered.instruments]
        instruments, chunks = self.source()
        ensemble = Ensemble.load(self.work.folder / f"fold-{self.number}-weighed")
        engine = Engine(instruments, ids, self.gathered.names, members, ensemble)
        if self.altdata is not None:
            engine.tell(self.altdata)
        return measure_latency(engine, stream(instruments, chunks))


def _by_seed(losses: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, list[float | None]]]:
    """Horizon -> "ensemble" or member -> log-loss of each seed."""
    names = {h: list(dict.fromkeys(n for told in losses for n in told.get(h, {}))) for h in losses[0]}
    return {h: {n: [told.get(h, {}).get(n) for told in losses] for n in of} for h, of in names.items()}


def _before(sample: dict[str, NDArray[Any]], end: int) -> dict[str, NDArray[Any]]:
    keep = sample["ts"] < end
    return {name: a[keep] for name, a in sample.items()}


def check(
    tables: settings.Tables, members: Sequence[str] | None, own: Sequence[str] = ()
) -> tuple[dict[str, str], EnsembleConfig, dict[str, Any]]:
    """The members to train, and the settings of the ensemble and of each member. Raises InputError for what is wrong in `tables`."""
    chosen, rest = choose(members, own), dict(tables)
    mixing = settings.checked(EnsembleConfig, rest.pop("ensemble", {}), "[ensemble]")
    return chosen, mixing, settings.of_members(rest, chosen)


def choose(members: Sequence[str] | None, own: Sequence[str] = ()) -> dict[str, str]:
    """Name -> import path of the members to train. Raises InputError for a name that is not there, or twice there."""
    there = available()
    if unknown := [m for m in members or () if m not in there]:
        raise InputError(f"no member named {', '.join(unknown)}: choose among {', '.join(there)}")
    chosen = {name: path for name, path in there.items() if members is None or name in members}
    for path in own:
        name = member_class(path).name
        if name in chosen:
            raise InputError(f"{path} is named {name!r} like another member: give it a name of its own")
        chosen[name] = path
    return chosen


def events_in(root: str | Path, ids: Sequence[str] | None, start: int | None, end: int | None) -> int:
    """About how many events a part of a catalog holds, from the ranges of its files: for progress only."""
    count = 0.0
    for p in contents(Path(root), ids):
        a, b = p.start if start is None else max(p.start, start), p.end if end is None else min(p.end, end)
        count += p.rows * max(0, b + 1 - a) / (p.end + 1 - p.start)
    return int(count)
