"""What a sweep is asked to do: the TOML file, its search space over any key of a run's configuration, and who proposes the next runs.

:func:`read` gives an :class:`Asked`; :func:`proposals` yields batches of parameters and takes their scores. The same file and seed propose
the same runs, whoever computes them: a search learns from whole batches, in order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from catalog.errors import InputError, continued, toml
from catalog.moments import nanoseconds
from cift_strategies.backtest import RunConfig

type Point = dict[str, Any]  # dotted key -> value

MOST: Final = 100_000  # runs of a grid
SPLITTABLE: Final = ("sharpe", "return")  # objectives that a part of the periods has


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Range(_Strict):
    """Values from `low` to `high`, both included; whole numbers where both are (and `step`)."""

    low: int | float
    high: int | float
    step: Annotated[int | float | None, Field(gt=0)] = None
    log: bool = False  # evenly in the logarithm


class Validation(_Strict):
    """How the choice of the best run is judged on periods that it was not chosen on."""

    method: Literal["walk-forward", "cpcv"]
    groups: Annotated[int, Field(ge=2, le=20)] = 6  # of equal time
    test_groups: Annotated[int, Field(ge=1)] = 2  # judged at once by cpcv
    embargo_s: Annotated[float, Field(ge=0)] = 0.0  # after a judged group


class SweepConfig(_Strict):
    """The file's own keys."""

    base: dict[str, Any] | Path = {}  # any keys of run_backtest's --config, or such a file
    parameters: dict[str, Any]  # key -> [values] or {low, high, step, log}; keys may be dotted or nested
    method: Literal["grid", "random", "optuna"] = "grid"
    trials: Annotated[int | None, Field(ge=1)] = None  # runs of random and optuna; 50 if not told
    objective: str = "sharpe"  # or return, or any number of a run's summary
    direction: Literal["maximize", "minimize"] = "maximize"
    seed: Annotated[int, Field(ge=0)] = 7  # of random and optuna
    batch: Annotated[int, Field(ge=1)] = 8  # runs that optuna proposes before it learns from their results
    fast: bool = True  # predictions once for all runs that have the same models and data
    periods: Annotated[int, Field(ge=4)] = 320  # of equal time, whose returns are compared
    blocks: Annotated[int, Field(ge=2, le=20, multiple_of=2)] = 16  # of periods, for the probability of backtest overfitting
    workers: Annotated[int | None, Field(ge=1)] = None  # processes on this machine; all cores if not told
    holdout: Annotated[float, Field(ge=0, le=0.9)] = 0.0  # last share of the traded time, on which the chosen run is judged once
    validation: Validation | None = None
    reports: bool = True  # of the best and the median run, each run once more with all that a report tells


@dataclass(frozen=True, slots=True)
class Axis:
    """One parameter: the `values` it may take, or a `span`."""

    key: str
    values: tuple[Any, ...] = ()
    span: Range | None = None

    @property
    def whole(self) -> bool:
        s = self.span
        return s is not None and all(isinstance(v, int) for v in (s.low, s.high, *(() if s.step is None else (s.step,))))

    @property
    def listed(self) -> tuple[Any, ...]:
        """All values; of a span those a `step` apart. Raises InputError for a span without one."""
        if self.span is None:
            return self.values
        s = self.span
        if s.step is None:
            raise InputError(f"parameters.{self.key}: a grid needs a list of values, or a step")
        n = math.floor((s.high - s.low) / s.step + 1e-9)
        return tuple(s.low + i * s.step if self.whole else round(s.low + i * s.step, 12) for i in range(n + 1))

    def draw(self, rng: np.random.Generator) -> Any:
        s = self.span
        if s is None:
            return self.values[rng.integers(len(self.values))]
        if s.step is not None:
            return self.listed[rng.integers(len(self.listed))]
        if s.log:
            v = math.exp(rng.uniform(math.log(s.low), math.log(s.high + self.whole)))
            return min(int(v), s.high) if self.whole else min(max(v, s.low), s.high)
        return int(rng.integers(int(s.low), int(s.high) + 1)) if self.whole else float(rng.uniform(s.low, s.high))


@dataclass(frozen=True, slots=True)
class Asked:
    """A sweep file that was read and found right."""

    path: Path
    sweep: SweepConfig
    base: Mapping[str, Any]  # keys of RunConfig
    axes: tuple[Axis, ...]

    def config(self, point: Point) -> RunConfig:
        """The configuration of the run with these parameters. Raises InputError that names a wrong one."""
        values = dict(self.base)
        for key, value in point.items():
            values = _with(values, key.split("."), value)
        try:
            return RunConfig.model_validate(values)
        except ValidationError as e:
            first = e.errors()[0]
            where = [str(x) for x in first["loc"] if not isinstance(x, int)]
            named = next((k for k in point if k == ".".join(where)), next((k for k in point if where[:1] == k.split(".")[:1]), None))
            told = f"parameters.{named} = {point[named]!r}" if named is not None else f"base.{'.'.join(where)}"
            more = f" ({'.'.join(where)})" if named is not None and named != ".".join(where) else ""
            raise InputError(f"{self.path}: {told}: {continued(first['msg'])}{more}") from None


def read(path: Path, given: Mapping[str, Any]) -> Asked:
    """The sweep file at `path`; `given` by the command line goes before its base. Raises InputError, one line, for whatever is wrong."""
    try:
        found = SweepConfig.model_validate(toml(path, "--sweep"))
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(x) for x in first["loc"] if not isinstance(x, int) and not str(x).startswith(("dict[", "function", "lax")))
        raise InputError(f"{path}: {where}: {continued(first['msg'])}") from None
    base = dict(found.base) if isinstance(found.base, dict) else toml(found.base, f"{path}: base")
    for key in ("start", "end"):
        if key in base:
            base[key] = nanoseconds(str(base[key]))
    base |= given
    axes = tuple(_axes(found.parameters, path))
    if not axes:
        raise InputError(f"{path}: [parameters] is empty: name a key of the configuration and its values")
    if taken := [a.key for a in axes if a.key in given]:
        raise InputError(f"{path}: parameters.{taken[0]} is given on the command line too: leave one of them out")
    asked = Asked(path, found, base, axes)
    asked.config({})
    for axis in axes:
        for value in axis.values if axis.span is None else (axis.span.low, axis.span.high):
            config = asked.config({axis.key: value})
            if config.models and config.artifacts is None:
                from cift_models.train import check

                check(config.models, config.train, config.members)
    if found.method == "grid":
        total = math.prod(len(_listed(a, path)) for a in axes)
        if total > MOST:
            raise InputError(f"{path}: the grid has {total:,} runs, more than {MOST:,}: shorten a list, or choose method = \"random\"")
        if found.trials is not None:
            raise InputError(f"{path}: trials: a grid runs all of its {total:,} points: leave it out, or choose method = \"random\"")
    for judged in ("validation", "holdout"):
        if getattr(found, judged) and found.objective not in SPLITTABLE:
            raise InputError(f"{path}: {judged} needs the objective {' or '.join(SPLITTABLE)}, not {found.objective}")
    v = found.validation
    if v is not None and v.method == "cpcv" and v.test_groups >= v.groups:
        raise InputError(f"{path}: validation.test_groups must be fewer than its {v.groups} groups")
    if found.periods < 2 * found.blocks:
        raise InputError(f"{path}: periods = {found.periods} are too few for {found.blocks} blocks: give {2 * found.blocks} or more")
    return asked


def _listed(axis: Axis, path: Path) -> tuple[Any, ...]:
    try:
        return axis.listed
    except InputError as e:
        raise InputError(f"{path}: {e}") from None


def _axes(table: Mapping[str, Any], path: Path, before: str = "") -> list[Axis]:
    found: list[Axis] = []
    for name, told in table.items():
        key = f"{before}{name}"
        if key.partition(".")[0] == "out":
            raise InputError(f"{path}: parameters.{key}: where runs are kept is --out, and no parameter")
        if isinstance(told, list):
            if not told:
                raise InputError(f"{path}: parameters.{key}: the list is empty: give at least one value")
            found.append(Axis(key, tuple(told)))
        elif isinstance(told, dict) and {"low", "high"} & told.keys():
            try:
                span = Range.model_validate(told)
            except ValidationError as e:
                first = e.errors()[0]
                raise InputError(f"{path}: parameters.{key}.{first['loc'][0]}: {continued(first['msg'])}") from None
            if not span.low < span.high or (span.log and span.low <= 0):
                least = "0 < low < high" if span.log else "low < high"
                raise InputError(f"{path}: parameters.{key}: from {span.low} to {span.high} there is nothing to try: {least} is needed")
            found.append(Axis(key, span=span))
        elif isinstance(told, dict):
            found += _axes(told, path, f"{key}.")
        else:
            raise InputError(f"{path}: parameters.{key} = {told!r}: give a list of values or {{low = .., high = ..}}; one is base's")
    return found


def _with(values: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    inner = values.get(path[0], {})
    if len(path) == 1:
        return {**values, path[0]: value}
    return {**values, path[0]: _with(inner if isinstance(inner, Mapping) else {}, path[1:], value)}


# --- who proposes ---------------------------------------------------------------------------------------------------------------------


def proposals(asked: Asked) -> Generator[list[Point], list[float | None]]:
    """Batches of points; send the scores of each (None: it failed)."""
    s, axes = asked.sweep, asked.axes
    if s.method == "grid":
        yield [dict(zip((a.key for a in axes), values)) for values in itertools.product(*(a.listed for a in axes))]
    elif s.method == "random":
        rng, points = np.random.default_rng(s.seed), dict[str, Point]()
        for _ in range(20 * (s.trials or 50)):  # fewer points than trials may be there
            point = {a.key: a.draw(rng) for a in axes}
            points.setdefault(repr(point), point)
            if len(points) == (s.trials or 50):
                break
        yield list(points.values())
    else:
        yield from _search(asked)


def _search(asked: Asked) -> Generator[list[Point], list[float | None]]:
    """Tree-structured Parzen estimator (Bergstra et al. 2011), as Optuna has it."""
    import optuna

    s, left = asked.sweep, asked.sweep.trials or 50
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=s.seed, constant_liar=True, n_startup_trials=min(10, max(1, left // 4)))
    study = optuna.create_study(direction=s.direction, sampler=sampler)
    space: dict[str, Any] = {}
    for a in asked.axes:
        if a.span is None:
            space[a.key] = optuna.distributions.CategoricalDistribution(tuple(range(len(a.values))))
        elif a.whole:
            low, high = int(a.span.low), int(a.span.high)
            space[a.key] = optuna.distributions.IntDistribution(low, high, a.span.log, int(a.span.step or 1))
        else:
            space[a.key] = optuna.distributions.FloatDistribution(a.span.low, a.span.high, a.span.log, a.span.step)
    listed = {a.key: a.values for a in asked.axes if a.span is None}
    while left > 0:
        trials = [study.ask(space) for _ in range(min(s.batch, left))]
        left -= len(trials)
        scores = yield [{k: listed[k][v] if k in listed else v for k, v in t.params.items()} for t in trials]
        for trial, score in zip(trials, scores):
            if score is None or not math.isfinite(score):
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, score)
