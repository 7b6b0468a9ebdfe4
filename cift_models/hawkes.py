"""The Hawkes member: how buys, sells and cancels of an instrument excite one another says how its mid will move.

Takes EVENT blocks of many instruments, gives direction votes at every batch close. One process (`hawkes_process.py`, `hawkes_path.py`) and
one multinomial logistic map per instrument and horizon: P(down, flat, up) from the imbalances of intensity now, of recent events per
decay and of the events expected over the horizon, and from how busy the market is (Bacry, Mastromatteo, Muzy 2015, sec. 4). Where the
likelihood puts its decays (one on the events of a single message, often) need not be where the mid is told, so the map has memories of
its own beside them: decays that excite nothing.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp, log
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
from numba import njit

from catalog.errors import InputError
from catalog.events import CANCEL, F_MBP, F_SNAPSHOT, F_TOB, TRADE
from cift_models.hawkes_path import ahead, decay_to, state_at
from cift_models.hawkes_process import DAY_NS, NS, PAIRS, TYPES, Config, Floats, Ints, Params, fit_process
from cift_models.labels import Study, effective
from cift_models.logit import fit_logit
from cift_models.windows import HORIZONS_NS, Block, Votes


@lru_cache
def _codes(types: tuple[str, ...]) -> npt.NDArray[np.int8]:
    """(256, 3) type of an event by action and side + 1, -1 where it has none."""
    table = np.full((256, 3), -1, np.int8)
    for i, name in enumerate(types):
        action, side, _ = TYPES[name]
        table[action, slice(None) if side is None else side + 1] = i
    return table


@njit(cache=True, nogil=True)
def _classify(e, codes, trade):  # type: ignore[no-untyped-def]
    """Type of one EVENT record or -1. `trade` (3,) carries ts_event, side and unclaimed size of the last trade of the instrument.

    Left out: snapshots, updates of an L1 feed, and the C that takes executed size off the book (the venue stamps it as the trade).
    """
    action, side, size, stamp = e["action"], np.int64(e["side"]), e["size"], e["ts_event"]
    if e["flags"] & (F_SNAPSHOT | F_TOB) and action != TRADE:
        return -1
    if action == TRADE:
        trade[2] = size + (trade[2] if stamp == trade[0] and side == trade[1] else 0)
        trade[0], trade[1] = stamp, side
    elif action == CANCEL and not e["flags"] & F_MBP and trade[2] > 0 and stamp == trade[0] and side == -trade[1]:
        trade[2] = trade[2] - size if size > 0 else 0
        return -1
    return codes[action, side + 1]


@njit(cache=True, nogil=True)
def _features(S, mu, alpha, beta, count_S, count_mu, pairs, usual, seconds, lam, x, trades):  # type: ignore[no-untyped-def]
    """Inputs x (H, F) of the direction map in state S (K, D), and the trades (H,) expected over each horizon.

    Per mirrored pair: imbalance of intensity now, of recent events per decay, of events expected over the horizon; then how busy the market
    is and will be, as log ratio to its `usual` rates (D,).
    """
    K, D, H = len(beta), len(mu), len(seconds)
    total, base = 0.0, 0.0
    for i in range(D):
        lam[i] = mu[i]
        for k in range(K):
            for j in range(D):
                lam[i] += alpha[k, i, j] * beta[k] * S[k, j]
        total += lam[i]
        base += usual[i]
    for h in range(H):
        f = 0
        for q in range(len(pairs)):
            a, b = pairs[q]
            x[h, f] = (lam[a] - lam[b]) / (lam[a] + lam[b])
            f += 1
            for k in range(K):
                x[h, f] = (S[k, a] - S[k, b]) / (1.0 + S[k, a] + S[k, b])
                f += 1
            n_a, n_b = 0.0, 0.0
            for j in range(D):
                n_a += count_mu[h, a, j] * mu[j]
                n_b += count_mu[h, b, j] * mu[j]
                for k in range(K):
                    n_a += count_S[h, a, k * D + j] * S[k, j]
                    n_b += count_S[h, b, k * D + j] * S[k, j]
            x[h, f] = (n_a - n_b) / (n_a + n_b)
            f += 1
            if q == 0:
                trades[h] = n_a + n_b
        a, b = pairs[0]
        x[h, f] = log(total / base)
        x[h, f + 1] = log(trades[h] / ((usual[a] + usual[b]) * seconds[h]))


@njit(cache=True, nogil=True)
def _replay(  # type: ignore[no-untyped-def]
    events, closes, rows, codes, trade, S, pending, last, mu, alpha, beta, count_S, count_mu, pairs, usual, seconds, x, trades, known
):  # fmt: skip
    """Advance every instrument through the block; inputs of the map at each close."""
    now, lam = np.empty(S.shape[1:]), np.empty(S.shape[2])
    c = 0
    for n in range(len(events)):
        e = events[n]
        r, t = np.int64(e["instrument"]), e["ts_init"]
        if r < len(rows) and rows[r]:
            kind = _classify(e, codes, trade[r])
            if kind >= 0:
                last[r] = decay_to(S[r], pending[r], last[r], t, kind, beta[r])
        if c < len(closes) and closes[c] == n:
            known[c] = r < len(rows) and rows[r] and last[r] >= 0
            if known[c]:
                state_at(S[r], pending[r], last[r], t, beta[r], now)
                b = t % DAY_NS // (DAY_NS // mu.shape[2])
                _features(now, mu[r, :, b], alpha[r], beta[r], count_S[r], count_mu[r], pairs, usual[r], seconds, lam, x[c], trades[c])
            c += 1


@njit(cache=True, nogil=True)
def _replay_typed(  # type: ignore[no-untyped-def]
    t, kind, holes, at, mu, alpha, beta, count_S, count_mu, pairs, usual, seconds, x, trades, known
):  # fmt: skip
    """The same for one instrument's typed events and the times `at` of its decisions, for fitting the map only.

    Where a stamp goes on after the decision's event, the whole stamp counts. After a hole nothing is known until the next event.
    """
    K, D, _ = alpha.shape
    S, pending, now, lam = np.zeros((K, D)), np.zeros(D, np.int64), np.empty((K, D)), np.empty(D)
    last, n, g = -1, 0, 0
    for c in range(len(at)):
        while n < len(t) and t[n] <= at[c]:
            if g < len(holes) and holes[g] == n:
                S[:], pending[:], last = 0.0, 0, -1
                g += 1
            last = decay_to(S, pending, last, t[n], kind[n], beta)
            n += 1
        known[c] = last >= 0 and not (g < len(holes) and holes[g] == n)
        if known[c]:
            state_at(S, pending, last, at[c], beta, now)
            b = at[c] % DAY_NS // (DAY_NS // mu.shape[1])
            _features(now, mu[:, b], alpha, beta, count_S, count_mu, pairs, usual, seconds, lam, x[c], trades[c])


@njit(cache=True, nogil=True)
def _vote(x, trades, known, row, center, scale, coef, size, proba, magnitude):  # type: ignore[no-untyped-def]
    """Multinomial logistic map of inputs x (m, H, F), row by row; NaN where unknown or not fitted."""
    z = np.empty(3)
    for n in range(len(x)):
        for h in range(x.shape[1]):
            proba[n, h, :], magnitude[n, h] = np.nan, np.nan
            if not known[n] or np.isnan(coef[row[n], h, 0, 0]):
                continue
            for c in range(3):
                z[c] = coef[row[n], h, c, x.shape[2]]
            for f in range(x.shape[2]):
                v = min(max((x[n, h, f] - center[row[n], h, f]) / scale[row[n], h, f], -3.0), 3.0)
                for c in range(3):
                    z[c] += coef[row[n], h, c, f] * v
            top = max(z[0], z[1], z[2])
            a, b, d = exp(z[0] - top), exp(z[1] - top), exp(z[2] - top)
            proba[n, h, 0], proba[n, h, 1], proba[n, h, 2] = a / (a + b + d), b / (a + b + d), d / (a + b + d)
            magnitude[n, h] = size[row[n], h] * np.sqrt(trades[n, h])


def fit_map(x: Floats, y: npt.NDArray[np.int8], independent: float, ridge: float) -> Floats:
    """Coefficients (3, F + 1) of P(down, flat, up | x), the constant last; x (m, F) standardised, y (m,) in 0..2.

    The m labels overlap and weigh together what `independent` ones would. Slopes are drawn to 0 by a ridge of F `ridge`, constants to the
    logarithm of the classes' smoothed shares: with one class only, or hardly any labels, the map says the base rate.
    """
    m, F = x.shape
    weight = independent / m
    prior = np.log((np.eye(3)[y].sum(0) * weight + 1.0) / (independent + 3.0))
    return fit_logit(x, y, weight, np.column_stack([np.zeros((3, F)), prior]), np.array([ridge * F] * F + [1.0]))


class Gatherer:
    """Collects typed events of each instrument while a history streams by; memory stays bounded however long that is.

    Runs of `run` events are kept whole. When an instrument has `room` of them every second one is dropped, so that what stays covers all
    of the time; where a run is missing the likelihood starts a new window.
    """

    def __init__(self, instruments: int, types: tuple[str, ...], run: int = 16_384, room: int = 256) -> None:
        self.types = types
        self._codes, self._trade = _codes(types), np.zeros((instruments, 3), np.int64)
        self._run, self._room = run, room
        self._open: list[list[tuple[Ints, npt.NDArray[np.uint8]]]] = [[] for _ in range(instruments)]
        self._runs: list[list[tuple[int, Ints, npt.NDArray[np.uint8]]]] = [[] for _ in range(instruments)]
        self._serial = [0] * instruments
        self._every = [1] * instruments

    def push(self, block: Block) -> None:
        """Take in the events of the next block."""
        kind = np.empty(len(block.events), np.int8)
        _classify_all(block.events, self._codes, self._trade, kind)
        typed = np.flatnonzero(kind >= 0)
        t, kind, inst = block.events["ts_init"][typed], kind[typed].astype(np.uint8), block.events["instrument"][typed]
        for r in np.unique(inst):
            mine = inst == r
            self._open[r].append((t[mine], kind[mine]))
            if sum(len(a) for a, _ in self._open[r]) >= self._run:
                self._close(int(r))

    def _close(self, r: int) -> None:
        t, kind = np.concatenate([t for t, _ in self._open[r]]), np.concatenate([k for _, k in self._open[r]])
        whole = len(t) // self._run * self._run
        self._open[r] = [(t[whole:], kind[whole:])]
        for a in range(0, whole, self._run):
            if self._serial[r] % self._every[r] == 0:
                self._runs[r].append((self._serial[r], t[a : a + self._run].copy(), kind[a : a + self._run].copy()))
            self._serial[r] += 1
            if len(self._runs[r]) > self._room:
                self._every[r] *= 2
                self._runs[r] = [x for x in self._runs[r] if x[0] % self._every[r] == 0]

    def events(self, r: int, start: int, end: int) -> tuple[Ints, npt.NDArray[np.uint8], Ints]:
        """Times, kinds and the indices before which events are missing, of instrument `r` in [start, end) ns."""
        runs = list(self._runs[r])
        if self._open[r]:
            runs.append((self._serial[r], np.concatenate([t for t, _ in self._open[r]]), np.concatenate([k for _, k in self._open[r]])))
        if not runs:
            return np.empty(0, np.int64), np.empty(0, np.uint8), np.empty(0, np.int64)
        serial = np.concatenate([np.full(len(t), s) for s, t, _ in runs])
        t, kind = np.concatenate([t for _, t, _ in runs]), np.concatenate([k for _, _, k in runs])
        a, b = np.searchsorted(t, (start, end))
        return t[a:b], kind[a:b], np.flatnonzero(np.diff(serial[a:b]) > 1) + 1


@njit(cache=True, nogil=True)
def _classify_all(events, codes, trade, out):  # type: ignore[no-untyped-def]
    for n in range(len(events)):
        r = events[n]["instrument"]
        out[n] = _classify(events[n], codes, trade[r]) if r < len(trade) else -1


@dataclass(slots=True)
class State:
    """What the member carries along the stream, per instrument: S (I, K, D), events of the newest stamp, that stamp, the last trade."""

    S: Floats
    pending: Ints
    last: Ints
    trade: Ints

    def copy(self) -> State:
        return State(self.S.copy(), self.pending.copy(), self.last.copy(), self.trade.copy())


ARRAYS: Final = ("mu", "alpha", "beta", "count_S", "count_mu", "usual", "center", "scale", "coef", "size", "fitted", "report")


class Hawkes:
    """The member: one process and one direction map per instrument of the training table; an instrument without them abstains.

    At each close the votes follow from the state just after the closing event, so they depend on no later event, and on no cut of the
    stream into blocks. Arrays by instrument I, horizon H and decay K (the process's, then the map's own memories, whose `alpha` is 0):
    `mu` (I, D, B), `alpha` (I, K, D, D), `beta` (I, K), `count_S` (I, H, D, KD), `count_mu` (I, H, D, D), `usual` (I, D), `center`,
    `scale` (I, H, F), `coef` (I, H, 3, F + 1), `size` (I, H) ticks, `fitted` (I,), `report` (I, 4): events, nats per event over Poisson,
    spectral radius, converged.
    """

    name = "hawkes"
    seeded = False

    def __init__(self, config: Config, ids: tuple[str, ...], arrays: dict[str, npt.NDArray[Any]]) -> None:
        self.config, self.ids, self.arrays = config, ids, arrays
        self.skipped: dict[str, str] = {}
        self._pairs = _pairs(config.types)
        self._seconds = np.array(HORIZONS_NS) * NS

    @classmethod
    def untrained(cls, ids: tuple[str, ...], config: Config | None = None) -> Self:
        """A member that abstains throughout."""
        config = config or Config()
        N, H, D, K = len(ids), len(HORIZONS_NS), len(config.types), config.decays + len(config.memories)
        F = len(_pairs(config.types)) * (2 + K) + 2
        shapes = {
            "mu": (N, D, config.bins), "alpha": (N, K, D, D), "beta": (N, K), "count_S": (N, H, D, K * D), "count_mu": (N, H, D, D),
            "usual": (N, D), "center": (N, H, F), "scale": (N, H, F), "coef": (N, H, 3, F + 1), "size": (N, H), "report": (N, 4),
        }  # fmt: skip
        z: dict[str, npt.NDArray[Any]] = {name: np.zeros(shape) for name, shape in shapes.items()} | {"fitted": np.zeros(N, np.bool_)}
        z["coef"][:], z["size"][:] = np.nan, np.nan
        for name in ("mu", "beta", "usual", "scale"):
            z[name][:] = 1.0
        z["beta"][:, config.decays :] = config.memories
        return cls(config, ids, z)

    @staticmethod
    def gatherer(instruments: Sequence[Any], names: Sequence[str] = (), config: Config | None = None) -> Gatherer:
        """Learns from the stream itself: push every block of the training range, then hand it to :meth:`fit`."""
        return Gatherer(len(instruments), (config or Config()).types)

    @classmethod
    def fit(cls, study: Study, gathered: Gatherer, config: Config | None = None, start: Self | None = None) -> Self:
        """Processes on the fit slice, direction maps on fit and calibration slices (labels purged by their known time).

        Needs of `study`: `instruments`, `split`, `usable`, `classes`, `fit_rows`, `calibration_rows` and the table's ts, instrument,
        move and known_at. Raises InputError where no instrument has events enough; single ones that have not are named in `skipped`
        and abstain. From a `start`, an earlier fit of the same instruments and types, the likelihood is climbed from its parameters, and an
        instrument without events enough stays as it was.
        """
        config = config or Config(types=gathered.types)
        if config.types != gathered.types:
            raise InputError(f"hawkes: events were gathered as {gathered.types}, not as {config.types}: give both one configuration")
        me = cls.untrained(tuple(i.id for i in study.instruments), config)
        z = me.arrays
        if start is not None and start.config != config:
            start = None
        for r, id_ in enumerate(me.ids):
            t, kind, holes = gathered.events(r, study.split.start, study.split.weigh)
            upto = int(np.searchsorted(t, study.split.calibrate))
            since = max(0, upto - config.max_events)
            guess = start.process(r) if start is not None and start.arrays["fitted"][r] else None
            missing = holes[(holes > since) & (holes < upto)] - since
            try:
                fit = fit_process(t[since:upto], kind[since:upto], config, holes=missing, guess=guess)
            except InputError as e:
                me.skipped[id_] = str(e)
                if start is not None:
                    for name in ARRAYS:
                        z[name][r] = start.arrays[name][r]
                continue
            z["mu"][r], z["alpha"][r, : config.decays], z["beta"][r, : config.decays] = fit.params
            params = Params(*(z[name][r] for name in Params._fields))
            maps = [ahead(params, s) for s in me._seconds]
            z["count_S"][r], z["count_mu"][r] = [m.count_S for m in maps], [m.count_mu for m in maps]
            z["usual"][r] = fit.rate
            z["report"][r] = fit.events, fit.loglik - fit.poisson, fit.params.radius, fit.converged
            z["fitted"][r] = True
            me._fit_maps(r, study, t, kind, holes)
        if not z["fitted"].any():
            raise InputError(next(iter(me.skipped.values()), "hawkes: there is no instrument to learn from: choose at least one"))
        return me

    def _fit_maps(self, r: int, study: Study, t: Ints, kind: npt.NDArray[np.uint8], holes: Ints) -> None:
        z, table = self.arrays, study.table
        for h in study.usable:
            y = study.classes(h)
            rows = np.union1d(study.fit_rows(h), study.calibration_rows(h))
            rows = rows[(table.instrument[rows] == r) & (y[rows] >= 0)]
            if (independent := float(effective(table.ts[rows], table.known_at[rows, h]))) < self.config.min_labels:
                continue
            rows = rows[:: -(-len(rows) // self.config.max_labels)]
            x, trades, known = self._buffers(len(rows))
            _replay_typed(t, kind, holes, table.ts[rows], *self._model(r), self._pairs, z["usual"][r], self._seconds, x, trades, known)
            if not known.any():
                continue
            rows, x, trades = rows[known], x[known, h], trades[known, h]
            z["center"][r, h], spread = x.mean(0), x.std(0)
            z["scale"][r, h] = np.where(spread > 1e-9, spread, 1.0)
            inputs = np.clip((x - z["center"][r, h]) / z["scale"][r, h], -3.0, 3.0)
            z["coef"][r, h] = fit_map(inputs, y[rows], min(independent, float(len(rows))), self.config.ridge)
            root = np.sqrt(trades)
            z["size"][r, h] = float(np.abs(table.move[rows, h]) @ root) / float(root @ root)

    def _model(self, r: int | slice = slice(None)) -> tuple[Floats, Floats, Floats, Floats, Floats]:
        z = self.arrays
        return z["mu"][r], z["alpha"][r], z["beta"][r], z["count_S"][r], z["count_mu"][r]

    def _buffers(self, m: int) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
        H, F = self.arrays["center"].shape[1:]
        return np.zeros((m, H, F)), np.zeros((m, H)), np.zeros(m, np.bool_)

    def process(self, instrument: int) -> Params:
        """The fitted process of an instrument: to forecast, simulate or test it."""
        z, k = self.arrays, self.config.decays
        return Params(z["mu"][instrument], z["alpha"][instrument, :k], z["beta"][instrument, :k])

    def new_state(self) -> State:
        """Empty histories; instruments are those of the training table, in its order."""
        N, K, D, _ = self.arrays["alpha"].shape
        return State(np.zeros((N, K, D)), np.zeros((N, D), np.int64), np.full(N, -1, np.int64), np.zeros((N, 3), np.int64))

    def predict(self, block: Block, state: State) -> Votes:
        """Votes at each close; `state` moves on. NaN where the instrument was not fitted or has had no typed event yet."""
        x, trades, known = self._buffers(len(block.closes))
        closes = np.ascontiguousarray(block.closes, np.int64)
        z, carried = self.arrays, (state.trade, state.S, state.pending, state.last)
        _replay(
            block.events, closes, z["fitted"], _codes(self.config.types), *carried, *self._model(), self._pairs, z["usual"], self._seconds,
            x, trades, known,
        )  # fmt: skip
        row = block.events["instrument"][closes].astype(np.int64)
        votes = Votes(np.empty((*trades.shape, 3)), np.empty(trades.shape))
        _vote(x, trades, known, row, z["center"], z["scale"], z["coef"], z["size"], *votes)
        return votes

    def report(self) -> list[str]:
        """What was fitted, in words, an instrument a line."""
        lines = []
        for id_, fitted, (events, gain, radius, converged) in zip(self.ids, self.arrays["fitted"], self.arrays["report"]):
            told = f"{events:,.0f} events, {gain:+.3f} nats an event over Poisson, spectral radius {radius:.3f}"
            lines.append(f"{id_}: {told if fitted else 'not fitted, abstains'}" + ", not converged" * bool(fitted and not converged))
        return lines

    def save(self, folder: Path) -> list[Path]:
        """Write `hawkes.npz` (no objects); the same model gives the same bytes. -> the files written."""
        path = folder / "hawkes.npz"
        texts = {"config": np.array(self.config.model_dump_json()), "ids": np.array(self.ids)}
        np.savez(path, allow_pickle=False, **texts, **{name: self.arrays[name] for name in ARRAYS})
        return [path]

    @classmethod
    def load(cls, folder: Path, names: Sequence[str] = ()) -> Self:
        """Raises InputError, naming the file, where it is absent, torn, of another version or holds what no fit writes."""
        path = folder / "hawkes.npz"
        try:
            with np.load(path, allow_pickle=False) as z:
                config = Config(**json.loads(str(z["config"])))
                me = cls(config, tuple(str(i) for i in z["ids"]), {name: z[name] for name in ARRAYS})
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as e:
            raise InputError(f"{path}: not a Hawkes model of this version ({e}): train again") from e
        want = cls.untrained(me.ids, config).arrays
        if any(me.arrays[name].shape != want[name].shape or me.arrays[name].dtype != want[name].dtype for name in ARRAYS):
            raise InputError(f"{path}: its arrays do not fit its configuration: train again")
        return me


def _pairs(types: tuple[str, ...]) -> Ints:
    return np.array([(types.index(a), types.index(b)) for a, b in PAIRS if a in types and b in types], np.int64)
