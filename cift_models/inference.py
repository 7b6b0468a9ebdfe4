"""Blocks of the stream in, predictions out: one code for a block of history and for the batch that has just closed.

:class:`Engine` holds the members of an artifact and what they carry along the stream. A block is any contiguous piece of the
stream, all instruments together; however the stream is cut, the decisions are the same to the last bit. A member that raises, gives no
sound number or, live, takes too long abstains, is counted and logged once, and the rest decide. Between two blocks :meth:`Engine.swap`
puts another artifact in place of the running one.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from catalog import altdata
from catalog.asof import Lookup, lookup
from catalog.errors import InputError
from catalog.events import Instrument
from cift_models import artifacts
from cift_models.ensemble import MEMBERS, Ensemble, Learned, Member, Recommendation, member_class, recommend, roster
from cift_models.gpu import Device, device_named
from cift_models.labels import F64, I8, I64, H, Labeller
from cift_models.windows import HORIZONS_NS, Block

LOG = logging.getLogger(__name__)


class Predictions(NamedTuple):
    """One row for each close of a block, m of them; H horizons; N members in the order of `Engine.members`."""

    ts: I64  # (m,) ns, ts_init of the newest event seen
    instrument: I64  # (m,) index into the instrument table
    proba: F64  # (m, H, 3) down, flat, up; NaN where nobody voted
    magnitude: F64  # (m, H) expected |move| in ticks
    confidence: F64  # (m, H) probability of the likelier direction
    direction: I8  # (m, H) -1, 0 (abstains), +1
    regime: I8  # (m,) index into hmm.REGIMES, -1 unknown
    votes: NDArray[np.float32]  # (m, N, H, 3) NaN abstains; N = 5 (hawkes, transformer, hmm, gnn, fusion) and the user's own after them


class Latency(NamedTuple):
    """How long a decision takes: quantiles `q` in [0, 1] and their `ns`. `source` names the table or says that it was measured."""

    source: str
    q: tuple[float, ...]
    ns: tuple[int, ...]

    def at(self, u: float) -> int:
        """The quantile function (ns), linear in between: at(U) of a uniform U draws from the distribution."""
        return int(np.interp(u, self.q, self.ns))


LEVELS: Final = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
DEFAULT_LATENCY: Final = Latency(
    "default-1", LEVELS, (150_000, 170_000, 190_000, 220_000, 260_000, 320_000, 420_000, 560_000, 1_100_000, 2_600_000, 5_000_000)
)


@njit(cache=True, nogil=True)
def _sound(proba, magnitude):  # type: ignore[no-untyped-def]
    """Votes that are no probabilities become NaN; returns how many were. Wholly NaN is an abstention and no fault."""
    faults = 0
    for r in range(proba.shape[0]):
        for h in range(proba.shape[1]):
            a, b, c = proba[r, h, 0], proba[r, h, 1], proba[r, h, 2]
            if a != a and b != b and c != c:
                continue
            if not (a >= 0 and b >= 0 and c >= 0 and abs(a + b + c - 1) < 1e-3):
                proba[r, h] = np.nan
                faults += 1
            if not (magnitude[r, h] >= 0 and magnitude[r, h] < np.inf):
                magnitude[r, h] = np.nan
    return faults


class Engine:
    """`predict(block) -> Predictions` along one stream; `model_version` and `latency` tell of the artifact.

    Parameters: `instruments` of the stream, in the order in which events index them; `trained` of the models; `names` of the feature
    columns; `members` as fitted; decisions before `learn_from` (ns), voted on in sample, teach the weights nothing. `budget_ns`: wall
    time that a member may take for each batch of a block; who takes longer abstains from the block (`late` counts the decisions). Only for
    live use: None, as in backtests, lets every member finish, so that the same stream gives the same decisions. A block may hold several
    batches of several instruments, as where serving has fallen behind: the decisions are those of one batch after the other. `device`:
    "cpu" or "cuda" for the members that can be served there.
    """

    def __init__(
        self, instruments: Sequence[Instrument], trained: Sequence[str], names: Sequence[str], members: Sequence[Member],
        ensemble: Ensemble, model_version: str = "", latency: Latency = DEFAULT_LATENCY, learn_from: int = 0,
        budget_ns: int | None = None, device: str = "cpu",
    ) -> None:  # fmt: skip
        if budget_ns is not None and budget_ns <= 0:
            raise InputError(f"a budget of {budget_ns} ns lets no member vote: give a positive time, or None for no limit")
        place = {id_: i for i, id_ in enumerate(trained)}
        if unknown := [i.id for i in instruments if i.id not in place]:
            known = ", ".join(trained)
            raise InputError(f"the models were not trained on {', '.join(unknown)} but on {known}: choose among these, or train again")
        self.instruments, self.model_version, self.latency = tuple(instruments), model_version, latency
        by_name = {m.name: m for m in members}
        self.members = roster(list(by_name))
        self._present = [(self.members.index(n), by_name[n]) for n in self.members if n in by_name]
        self.ensemble, self._learn_from = ensemble, learn_from
        self._mid, self._trained = list(names).index("mid"), len(trained)
        self._map = np.array([place[i.id] for i in instruments], np.uint16)
        self._same = bool((self._map == np.arange(len(self._map))).all())
        self._table = [next((i for i in instruments if i.id == id_), _absent(id_)) for id_ in trained]
        self.failures: dict[str, int] = {m.name: 0 for m in members}
        self.late: dict[str, int] = {m.name: 0 for m in members}
        self.budget_ns, self._own, self.device = budget_ns, tuple[str, ...](), device
        for member in members:
            if hasattr(member, "to"):
                member.to(device)
        self.altdata: Lookup | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the stream: as if no event had been seen. The weights are the artifact's again."""
        self._states: dict[str, Any] = {m.name: m.new_state() for _, m in self._present}
        self._labeller = Labeller(self._table, HORIZONS_NS, ())
        self.learned: Learned = self.ensemble.new_state()

    def tell(self, data: altdata.Table) -> None:
        """Alternative data for the members that look at them: all of it at first, then what became known since."""
        if self.altdata is None:
            self.altdata = lookup(data, [i.id for i in self._table])
            for _, member in self._present:
                if hasattr(member, "join"):
                    member.join(self.altdata)
        else:
            self.altdata.push(data)

    def state(self) -> Any:
        """A copy of what the stream has left behind; :meth:`resume` takes it."""
        return copy.deepcopy((self._states, self._labeller, self.learned))

    def resume(self, state: Any) -> None:
        self._states, self._labeller, self.learned = copy.deepcopy(state)

    def trading(self, instrument: int, ts: int, trades: bool) -> None:
        """From `ts` (ns) on the market of `instrument` trades, or does not: no outcome is taken across a halt. Told as it happens."""
        (self._labeller.resume if trades else self._labeller.pause)(int(self._map[instrument]), ts)

    @classmethod
    def load(
        cls, path: str | Path, instruments: Sequence[Instrument], own: Sequence[str] = (), budget_ns: int | None = None,
        device: Device = "cpu",
    ) -> Self:  # fmt: skip
        """The engine of an artifact folder; `own`: import paths of the user's own members that it holds; `device` auto: a GPU if there is.

        Raises InputError for a damaged or foreign artifact, for instruments it was not trained on, for a GPU that is not there, and for a
        member that is not named in `own`: an artifact never decides what code is imported. Decisions within the training range teach its
        weights nothing more.
        """
        return artifacts.steady(path, lambda: cls._load(path, instruments, own, budget_ns, device))

    @classmethod
    def _load(
        cls, path: str | Path, instruments: Sequence[Instrument], own: Sequence[str], budget_ns: int | None, device: Device
    ) -> Self:
        from cift_models.features import NAMES

        found = artifacts.read(path, NAMES)
        m = found.manifest
        members: list[Member] = []
        for name, where in m["members"].items():
            if MEMBERS.get(name) != where and where not in own:
                raise InputError(f"{found.path / 'manifest.json'} holds the member {where}: allow it by name to have it imported")
            members.append(member_class(where).load(found.path, NAMES))
        latency = Latency(m["latency"]["source"], tuple(m["latency"]["q"]), tuple(m["latency"]["ns"]))
        since = int(m["range"]["end"]) + 1
        ensemble, on = Ensemble.load(found.path), device_named(device)
        me = cls(instruments, m["instruments"], NAMES, members, ensemble, found.version, latency, since, budget_ns, on)
        me._own = tuple(own)
        return me

    def swap(self, path: str | Path) -> dict[str, str]:
        """Put the artifact `path` in place of the running one, between two blocks; name -> "kept" or "fresh" of each member's memory.

        All of it is read, verified and built before anything changes: an artifact that is damaged, foreign or lacks an instrument raises
        InputError and the old one goes on. What a member carries along the stream is kept where a member of that name and class was
        there and its memory has the same shape; else it begins anew and abstains as at a start. The labels under way and the
        ensemble's record of open decisions are kept where instruments and members agree; weights are the new artifact's. Counts go on.
        """
        new = type(self).load(path, self.instruments, self._own, self.budget_ns, "cuda" if self.device == "cuda" else "cpu")
        if self.altdata is not None:
            new.tell(self.altdata.data)
        old, told = dict(self._named()), {}
        for name, member in new._named():
            state, fits = self._states.get(name), new._trained == self._trained and bool((new._map == self._map).all())
            kept = fits and type(old.get(name)) is type(member) and _alike(state, new._states[name])
            told[name] = "kept" if kept else "fresh"
            if kept:
                new._states[name] = state
        if [i.id for i in new._table] == [i.id for i in self._table]:
            new._labeller = self._labeller
            if new.members == self.members:
                new.learned.serial, new.learned.ring = self.learned.serial, self.learned.ring
            else:
                new.learned.serial, new.learned.ring = self.learned.serial, new.ensemble._ring(self.learned.ring[1].shape[1])
        for counts, before in ((new.failures, self.failures), (new.late, self.late)):
            counts |= {name: before.get(name, 0) for name in counts}
        self.__dict__.update(new.__dict__)
        return told

    def leave_out(self, names: Sequence[str]) -> None:
        """The members of these names abstain from now on."""
        self._present = [(i, m) for i, m in self._present if m.name not in names]

    @property
    def present(self) -> list[Any]:
        """The members that take part."""
        return [m for _, m in self._present]

    def _named(self) -> list[tuple[str, Member]]:
        return [(m.name, m) for _, m in self._present]

    def predict(self, block: Block) -> Predictions:
        """Decisions at the closes of `block`, which must follow on the block before; what the stream carries moves on.

        Where some of the block's batches are passed over (`Block.batches`), members say of the others what they would have said, and the
        weights learn from the others alone.
        """
        closes, events = np.asarray(block.closes, np.int64), block.events
        own = events["instrument"][closes].astype(np.int64)
        if not self._same:
            events = events.copy()
            events["instrument"] = self._map[events["instrument"]]
        block = Block(events, block.rows, closes, block.batches)
        m, instrument = len(closes), events["instrument"][closes].astype(np.int64)
        votes, sizes = np.full((m, len(self.members), H, 3), np.nan), np.full((m, len(self.members), H), np.nan)
        regime = np.full(m, -1, np.int64)
        for a, member in self._present:
            seen = self._ask(member, block, votes[:, a], sizes[:, a])
            if seen is not None and len(seen) == m:
                known = np.isfinite(seen).all(axis=1)
                regime[known] = seen[known].argmax(axis=1)
        mid = np.ascontiguousarray(block.rows[:, self._mid], np.float64)
        outcomes = self._labeller.push(events, mid, closes)
        ts = events["ts_init"][closes]
        proba, magnitude, confidence, direction = self.ensemble.decide(
            ts, instrument, mid[closes], closes, votes, sizes, regime, outcomes, self._labeller.room, self.learned, self._learn_from
        )
        return Predictions(ts, own, proba, magnitude, confidence, direction, regime.astype(np.int8), votes.astype(np.float32))

    def _ask(self, member: Member, block: Block, votes: F64, sizes: F64) -> F64 | None:
        """One member's votes into `votes` and `sizes`; returns P(regime) where it tells of regimes."""
        m, began = len(block.closes), time.perf_counter_ns()
        try:
            proba, size = member.predict(block, self._states[member.name])
            proba, size = np.array(proba, np.float64), np.array(size, np.float64)
            if proba.shape != (m, H, 3) or size.shape != (m, H):
                raise ValueError(f"votes of shape {proba.shape} and {size.shape}, not {(m, H, 3)} and {(m, H)}")
            told = member.regimes(self._states[member.name]) if hasattr(member, "regimes") else None
        except Exception as e:
            self._states[member.name] = member.new_state()
            self._fail(member.name, max(1, m), repr(e))
            return None
        took = time.perf_counter_ns() - began
        if self.budget_ns is not None and took > self.budget_ns * max(1, m):
            if not self.late[member.name]:
                why = f"{took / 1e6 / max(1, m):.1f} ms for a batch, {self.budget_ns / 1e6:.1f} are allowed"
                LOG.warning("%s abstains: %s (said once; counted in Engine.late)", member.name, why)
            self.late[member.name] += m
            return None
        faults = _sound(proba, size)
        if faults:
            self._fail(member.name, faults, f"{faults} votes are no probabilities")
        votes[:], sizes[:] = proba, size
        return told

    def _fail(self, name: str, n: int, why: str) -> None:
        if not self.failures[name]:
            LOG.warning("%s abstains: %s (said once; counted in Engine.failures)", name, why)
        self.failures[name] += n

    def recommend(self, predictions: Predictions, i: int, spread: float, cost: float = 0.0) -> Recommendation:
        """What to do about decision `i` at this spread and cost (ticks); see :func:`ensemble.recommend`."""
        p = predictions
        return recommend(p.proba[i], p.magnitude[i], p.direction[i], int(p.regime[i]), spread, cost, self.ensemble.config)

    def importance(self) -> dict[str, Any]:
        """What the members that can say so look at: name -> horizon -> columns, see :meth:`cift_models.fusion.Fusion.shares`."""
        return {m.name: m.shares() for _, m in self._present if hasattr(m, "shares")}

    def regret(self) -> dict[str, Any]:
        """Cumulative regret and its bound since the artifact's weights; see :meth:`Ensemble.regret`."""
        return self.ensemble.regret(self.learned)


def _alike(a: Any, b: Any) -> bool:
    """Whether two memories are of one build: same types, fields, shapes and dtypes; how long a list or queue is does not matter."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape
    if isinstance(a, tuple):
        return len(a) == len(b) and all(_alike(x, y) for x, y in zip(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_alike(a[k], b[k]) for k in a)
    if hasattr(a, "__dict__") and not callable(a):
        return _alike(vars(a), vars(b))
    if hasattr(a, "__dataclass_fields__"):
        return all(_alike(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)
    return True


def _absent(id_: str) -> Instrument:
    """Stands for an instrument that the models know and the stream lacks."""
    return Instrument(id_, 1, 1, 1.0, "USD")


def stream(instruments: Sequence[Instrument], chunks: Iterable[NDArray[np.void]]) -> Iterator[Block]:
    """EVENT arrays in canonical order -> blocks with their feature rows and closes, as an engine and the training take them."""
    from cift_models.features import new_state, replay
    from cift_models.windows import closes, new_batches

    states, open_batches = {k: new_state(i) for k, i in enumerate(instruments)}, new_batches(len(instruments))
    for events in chunks:
        rows = replay(events, list(instruments), states)
        yield Block(events, rows, closes(open_batches, events))


def measure_latency(engine: Engine, blocks: Iterable[Block], most: int = 2_000) -> Latency:
    """Wall time of `predict` on one batch at a time, on this machine; changes the engine's state. For `train --measure-latency` alone."""
    took: list[int] = []
    for block in blocks:
        a = 0
        for c in block.closes:
            piece = Block(block.events[a : c + 1], block.rows[a : c + 1], np.array([c - a], np.int64))
            begin = time.perf_counter_ns()
            engine.predict(piece)
            took.append(time.perf_counter_ns() - begin)
            a = int(c) + 1
            if len(took) >= most + 100:
                break
        if len(took) >= most + 100:
            break
    kept = took[100:] or took or list(DEFAULT_LATENCY.ns)
    return Latency("measured", LEVELS, tuple(int(v) for v in np.quantile(kept, LEVELS)))


__all__ = ["DEFAULT_LATENCY", "Engine", "Latency", "Predictions", "measure_latency", "stream"]
