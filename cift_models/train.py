"""From a stream of events to an artifact folder: features, labels, members, calibration, weights, scores.

Takes a catalog (or any source of EVENT blocks that can be read more than once), reads it in bounded memory, and gives the path of the
artifact. One fold in time: members fit on the first part, calibrate on the next, the ensemble learns weights and confidence on the last,
each purged by the time at which its labels are known. Several folds walk forward; the last one is kept. Too little data leaves out
horizons and members, and says so; where nothing remains, an InputError says how much is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from catalog.errors import InputError
from catalog.events import Instrument, catalog_counts, catalog_range, read_catalog
from catalog.progress import Steps
from cift_models import artifacts
from cift_models.ensemble import (
    Ensemble,
    Learned,
    Member,
    available,
    confidence_threshold,
    expected_move,
    learning_rates,
    member_class,
    roster,
    trust_in,
)
from cift_models.inference import DEFAULT_LATENCY, Engine, Latency, measure_latency, stream
from cift_models.labels import LABELS, H, Labeller, Split, Study, Table, Thinned, Thresholds, effective, fit_thresholds, walk_forward
from cift_models.validate import Baselines, Sample, evaluate, level1_columns
from cift_models.windows import HORIZONS_NS

Events = NDArray[np.void]
Source = Callable[[], tuple[list[Instrument], Iterable[Events]]]
LEAST_EFFECTIVE: Final = 30  # independent labels of all instruments together that a horizon needs in the fit slice
LEAST_ROWS: Final = 200
WARM_NS: Final = 20 * 60 * 1_000_000_000
LEAST_DECISIONS: Final = 1_000


@dataclass(frozen=True, slots=True)
class Config:
    """`cap`: decision rows held for fitting, thinned evenly beyond. `shares`: of fit, calibration and weight slice."""

    cap: int = 200_000
    shares: tuple[float, float, float] = (0.6, 0.2, 0.2)
    embargo_ns: int = 0
    folds: int = 1
    measure_latency: bool = False


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


def gather(source: Source, members: dict[str, str], cap: int, total: int = 0) -> Gathered:
    """One pass: features, labels and what members gather themselves; memory bounded by `cap` decision rows."""
    from cift_models.features import NAMES

    instruments, chunks = source()
    own = {name: member_class(path).gatherer(instruments, NAMES) for name, path in members.items()}
    labeller = Labeller(instruments)
    held = Thinned(len(instruments), len(LABELS), cap, rows=((len(NAMES),), np.float32), spread=((), np.float64))
    mid, spread = NAMES.index("mid"), NAMES.index("spread")
    with Steps("features and labels", total, "events") as steps, np.errstate(over="ignore"):
        for block in stream(instruments, chunks):
            at, rows = block.events[block.closes], block.rows[block.closes]
            outcomes = labeller.push(block.events, np.ascontiguousarray(block.rows[:, mid]), block.closes)
            held.push(at["ts_init"], at["instrument"].astype(np.int64), outcomes, rows=rows, spread=rows[:, spread])
            for g in own.values():
                if g is not None:
                    g.push(block)
            steps.advance(len(block.events))
    held.learn(labeller.finish())
    z = held.result()
    return Gathered(tuple(instruments), NAMES, Table(*(z[f] for f in Table._fields)), own, held.step)


def study(gathered: Gathered, split: Split, seed: int) -> tuple[Study, list[str]]:
    """Thresholds of the fit slice and the horizons that can be learnt; and what was left out, in words."""
    from cift_models.features import FEATURES

    table, left = gathered.table, []
    inputs = tuple(f.name for f in FEATURES if f.model_input)
    in_fit = (table.ts >= split.start) & (table.ts < split.calibrate)
    known = Table(*table)._replace(move=np.where(table.known_at <= split.calibrate, table.move, np.nan))
    thresholds = fit_thresholds(known, len(gathered.instruments), in_fit)
    all_ = Study(gathered.instruments, gathered.names, inputs, table, split, thresholds, tuple(range(H)), seed)
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


def fit_members(what: Study, gathered: Gathered, members: dict[str, str]) -> tuple[list[Member], list[str]]:
    """Fit each; a member that cannot learn from so little is left out, and why is told."""
    fitted: list[Member] = []
    left: list[str] = []
    for name, path in members.items():
        with Steps(f"fit {name}"):
            try:
                fitted.append(member_class(path).fit(what, gathered.own[name]))
            except InputError as e:
                left.append(f"member {name}: {e}")
    return fitted, left


def weigh(
    source: Source, gathered: Gathered, members: Sequence[Member], split: Split, thresholds: Thresholds, total: int = 0
) -> tuple[Ensemble, Learned, dict[str, NDArray[Any]]]:
    """Second pass: the engine runs up to the end of the range; weights learn, and confidence is chosen, on the weight slice alone.

    It starts :data:`WARM_NS` before that slice: what members carry along a stream reaches no further back.

    Returns the ensemble with what it learnt, the account of its learning, and the sample of the weight slice.
    """
    table, ids = gathered.table, [i.id for i in gathered.instruments]
    names = roster([m.name for m in members])
    eta = learning_rates(table.ts, table.instrument, HORIZONS_NS, gathered.step)
    threshold = np.ascontiguousarray(thresholds.balanced[:, :H])
    even = Ensemble.even(names, threshold, eta)
    engine = Engine(gathered.instruments, ids, gathered.names, members, even, learn_from=split.weigh)
    sample = Sample(gathered.instruments, gathered.names, len(names), since=split.weigh)
    instruments, chunks = source()
    with Steps("weights", total, "events") as steps:
        for block in stream(instruments, chunks):
            if len(block.events) and block.events["ts_init"][0] >= split.end:
                break
            if len(block.events) and block.events["ts_init"][-1] >= split.weigh - WARM_NS:
                sample.push(block, engine.predict(block))
            steps.advance(len(block.events))
    got = sample.finish()
    within = (got["ts"] < split.end)[:, None] & (got["known_at"] <= split.end)
    move = np.where(within, got["move"], np.nan)
    confident = np.array(
        [confidence_threshold(got["proba"][:, h].astype(np.float64), move[:, h], got["spread"], even.config.least_cover) for h in range(H)]
    )
    expected = expected_move(got["proba"].astype(np.float64), got["magnitude"].astype(np.float64))
    worth = [
        sum(
            effective(got["ts"][mine], got["known_at"][mine, h])
            for k in range(len(ids))
            if len(mine := np.flatnonzero(np.isfinite(move[:, h]) & (got["instrument"] == k)))
        )
        for h in range(H)
    ]
    trust = np.array([trust_in(expected[:, h], move[:, h], worth[h]) for h in range(H)])
    learnt = Ensemble(names, threshold, engine.learned.weights.copy(), confident, eta, even.config, trust)
    return learnt, engine.learned, got


def train(
    source: str | Path | Source, instrument_ids: Sequence[str] | None = None, start: int | None = None, end: int | None = None,
    out: str | Path = "artifact", seed: int = 0, members: Sequence[str] | None = None, own: Sequence[str] = (),
    config: Config | None = None,
) -> Path:  # fmt: skip
    """Train on a catalog folder (or a :data:`Source`) and write the artifact `out`; returns its path.

    `start`, `end`: ns UTC, both inclusive. `members`: names among ensemble.MEMBERS (None: all there are); `own`: import paths
    "package.module:Class" of the user's. The same source, seed and settings give the same artifact. Interrupted, it leaves nothing behind.
    Raises InputError for wrong input, and where the range is too short for any member at any horizon.
    """
    config, out = config or Config(), Path(out)
    artifacts.writable(out)
    chosen = choose(members, own)
    total = 0
    if not callable(source):
        total = events_in(source, instrument_ids, start, end)
        source = catalog_source(source, instrument_ids, start, end)
    gathered = gather(source, chosen, config.cap, total)
    table = gathered.table
    if len(table.ts) < LEAST_DECISIONS:
        raise InputError(
            f"{len(table.ts)} decisions in the training range, {LEAST_DECISIONS} are needed (a decision is 100 events or 10 ms of an "
            "instrument): give a longer range"
        )
    folds: list[dict[str, Any]] = []
    for split in walk_forward(table.ts, config.folds, config.shares, config.embargo_ns):
        what, left = study(gathered, split, seed)
        if not what.usable:
            raise InputError("too little data to train on: " + "; ".join(left) + ": give a longer range")
        fitted, left_members = fit_members(what, gathered, chosen)
        left += left_members
        if not fitted:
            raise InputError("too little data to train on: " + "; ".join(left) + ": give a longer range")
        ensemble, learned, sample = weigh(source, gathered, fitted, split, what.thresholds, total)
        baselines = Baselines.fit(what, level1_columns())
        scores = evaluate(_before(sample, split.end), ensemble.threshold, [i.id for i in gathered.instruments], ensemble.names, seed=seed)
        folds.append({"split": split._asdict(), "left_out": left, "scores": scores})
    for line in left:
        print(f"left out: {line}", file=sys.stderr)
    latency = DEFAULT_LATENCY
    if config.measure_latency:
        ids = [i.id for i in gathered.instruments]
        engine = Engine(gathered.instruments, ids, gathered.names, fitted, ensemble)
        instruments, chunks = source()
        latency = measure_latency(engine, stream(instruments, chunks))
    manifest = _manifest(gathered, what, fitted, chosen, ensemble, learned, latency, folds)

    def save(folder: Path) -> None:
        for member in fitted:
            member.save(folder)
        ensemble.save(folder)
        baselines.save(folder)
        np.savez(folder / "labels.npz", balanced=what.thresholds.balanced, spread=what.thresholds.spread)

    with Steps("save"):
        return artifacts.write(out, manifest, save).path


def _before(sample: dict[str, NDArray[Any]], end: int) -> dict[str, NDArray[Any]]:
    keep = sample["ts"] < end
    return {name: a[keep] for name, a in sample.items()}


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
    """About how many events a part of a catalog holds, from its metadata: for progress only."""
    count = sum(sum(c.values()) for c in catalog_counts(root, ids).values())
    first, last = catalog_range(root, ids)
    a, b = max(first, start if start is not None else first), min(last, end if end is not None else last)
    return int(count * max(0, b - a) / max(1, last - first))


def _manifest(
    gathered: Gathered, what: Study, fitted: Sequence[Member], chosen: dict[str, str], ensemble: Ensemble, learned: Learned,
    latency: Latency, folds: list[dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    return {
        "features": list(gathered.names),
        "instruments": [i.id for i in gathered.instruments],
        "horizons_ns": list(HORIZONS_NS),
        "horizons_trained": [LABELS[h] for h in what.usable],
        "range": {"start": int(gathered.table.ts[0]), "end": int(gathered.table.ts[-1]), "decisions": len(gathered.table.ts)},
        "seed": what.seed,
        "members": {m.name: chosen[m.name] for m in fitted},
        "latency": {"source": latency.source, "q": list(latency.q), "ns": list(latency.ns)},
        "folds": _plain(folds),
        "confident": _plain(ensemble.confident.tolist()),
        "trust": ensemble.trust.tolist(),
        "regret": _plain(Ensemble.even(ensemble.names, ensemble.threshold, ensemble.eta, ensemble.config).regret(learned)),
    }


def _plain(value: Any) -> Any:
    """JSON knows no NaN and no infinity: None instead."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
