"""Regimes: a hidden Markov model over one-second measures of each instrument; five states named from what they emit.

Takes blocks of the stream; gives, at every batch close, the probability of each regime given the seconds that have ended, votes by
P(move class | regime), and a position scale. `hmm_chain.py` fits and filters. `hmm_online.py` learns on; the member does not use it, for
it follows the measures better but votes no better (docs/measurements.md).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from catalog.errors import InputError
from catalog.events import SCALE, Instrument
from cift_models.hmm_chain import CLIP, MEASURES, Chain, D, K, by_regime, filter_all, fit_chain, step
from cift_models.hmm_chain import REGIMES as REGIMES
from cift_models.hmm_chain import Config as Config
from cift_models.labels import F64, I64, LABELS, H, Study
from cift_models.significance import mean_test
from cift_models.windows import HORIZONS_NS, Block, Votes

POSITION: Final = (1.0, 1.0, 1.0, 0.5, 0.0)  # share of the full position in each regime
MAX_SECONDS: Final = 24_000  # latest so many seconds, over all instruments, are learnt from
EVIDENCE: Final = 1.0  # standard errors that votes have to gain over class rates on the calibration slice to be called proven
LONGEST_SILENCE: Final = 60  # seconds without an event that are filtered as such; after a longer one the regime is forgotten
_TREND, _VOL = 1 - 2 ** (-1 / 10), 1 - 2 ** (-1 / 5)  # half-lives of 10 s and 5 s


class Seconds(NamedTuple):
    """Running second of each instrument (I,): its number, events, mid at its end and the one before,
    squared moves, last spread; and decayed from second to second: trend, log volatility, log spread."""

    second: I64
    n: I64
    mid: F64
    before: F64
    squares: F64
    spread: F64
    trend: F64
    agitation: F64
    width: F64


def new_seconds(instruments: int) -> Seconds:
    zero, nan = np.zeros(instruments), np.full(instruments, np.nan)
    return Seconds(
        np.full(instruments, -1), np.zeros(instruments, np.int64), nan, nan.copy(), zero, nan.copy(), zero.copy(), nan.copy(), nan.copy()
    )


@njit(cache=True, nogil=True)
def _end_second(k, tick, second, n, mid, before, squares, spread, trend, agitation, width, x):  # type: ignore[no-untyped-def]
    """Close the running second of instrument k: its measures into x (D,), and begin the next. Calm seconds without events count too."""
    r = (mid[k] - before[k]) / tick[k]
    if r != r:
        r = 0.0
    trend[k] += _TREND * (r - trend[k])
    rough = np.log(0.1 + np.sqrt(squares[k]) / tick[k])
    agitation[k] = rough if agitation[k] != agitation[k] else agitation[k] + _VOL * (rough - agitation[k])
    if spread[k] > 0:
        wide = np.log(spread[k])
        width[k] = wide if width[k] != width[k] else width[k] + _VOL * (wide - width[k])
    x[0] = trend[k]
    x[1] = agitation[k] if mid[k] == mid[k] else np.nan
    x[2] = np.log(1.0 + n[k])
    x[3] = width[k]
    second[k] += 1
    n[k], squares[k], before[k] = 0, 0.0, mid[k]


@njit(cache=True, nogil=True)
def _measure(  # type: ignore[no-untyped-def]
    ts, inst, mids, spreads, tick, second, n, mid, before, squares, spread, trend, agitation, width, out, out_inst, out_ts
):
    """Measures of all seconds that end within a block, raw: `out` (o, D), with instrument and end (ns). Returns o."""
    o, room = 0, len(out_ts)
    for i in range(len(ts)):
        k, now = inst[i], ts[i] // 1_000_000_000
        if second[k] < 0 or now - second[k] > LONGEST_SILENCE:
            second[k], n[k], squares[k], before[k], trend[k], agitation[k] = now, 0, 0.0, mids[i], 0.0, np.nan
            mid[k] = mids[i]
        while second[k] < now and o < room:
            _end_second(k, tick, second, n, mid, before, squares, spread, trend, agitation, width, out[o])
            out_inst[o], out_ts[o] = k, second[k] * 1_000_000_000
            o += 1
        _take(k, mids[i], spreads[i], n, mid, squares, spread)
    return o


@njit(cache=True, nogil=True)
def _take(k, m, s, n, mid, squares, spread):  # type: ignore[no-untyped-def]
    n[k] += 1
    if m == m:
        if mid[k] == mid[k]:
            squares[k] += (m - mid[k]) ** 2
        mid[k] = m
    if s == s:
        spread[k] = s


@njit(cache=True, nogil=True)
def _regimes(  # type: ignore[no-untyped-def]
    ts, inst, mids, spreads, closes, tick, centre, scale, start, moves, mean, var,
    second, n, mid, before, squares, spread, trend, agitation, width, alpha, steps, out,
):  # fmt: skip
    """As :func:`_measure`, with a filter step at each second's end; `out` (m, K M) the filter at each close, NaN before the first step."""
    x, work, c = np.empty(D), np.empty((2, len(start))), 0
    precision, log_var = 1 / var, np.log(2 * np.pi * var)
    for i in range(len(ts)):
        k, now = inst[i], ts[i] // 1_000_000_000
        if second[k] < 0 or now - second[k] > LONGEST_SILENCE:
            second[k], n[k], squares[k], before[k], trend[k], agitation[k] = now, 0, 0.0, mids[i], 0.0, np.nan
            mid[k], steps[k] = mids[i], 0
        while second[k] < now:
            _end_second(k, tick, second, n, mid, before, squares, spread, trend, agitation, width, x)
            for d in range(D):
                x[d] = min(max((x[d] - centre[k, d]) / scale[k, d], -CLIP), CLIP) if x[d] == x[d] else np.nan
            if steps[k] == 0:
                for j in range(len(start)):
                    alpha[k, j] = start[j]
            step(x, moves, mean, precision, log_var, alpha[k], steps[k] == 0, work)
            steps[k] += 1
        _take(k, mids[i], spreads[i], n, mid, squares, spread)
        if c < len(closes) and closes[c] == i:
            for j in range(len(start)):
                out[c, j] = alpha[k, j] if steps[k] > 0 else np.nan
            c += 1


class Measures:
    """Gathers the raw measures of every second while the stream passes, the latest MAX_SECONDS of all instruments together."""

    def __init__(self, instruments: Sequence[Instrument], names: Sequence[str], room: int = MAX_SECONDS) -> None:
        self._tick = np.array([i.tick / SCALE for i in instruments])
        self._mid, self._spread = names.index("mid"), names.index("spread")
        self._state, self._room = new_seconds(len(instruments)), room
        self._parts: list[tuple[F64, I64, I64]] = []

    def push(self, block: Block) -> None:
        e = block.events
        if not len(e):
            return
        span = int(e["ts_init"][-1] - e["ts_init"][0]) // SCALE + LONGEST_SILENCE + 2
        room = span * len(self._tick)
        out, inst, ts = np.empty((room, D)), np.empty(room, np.int64), np.empty(room, np.int64)
        seen_ts, seen = np.ascontiguousarray(e["ts_init"]), e["instrument"].astype(np.int64)
        mid, spread = _column(block, self._mid), _column(block, self._spread)
        o = _measure(seen_ts, seen, mid, spread, self._tick, *self._state, out, inst, ts)
        self._parts.append((out[:o].copy(), inst[:o].copy(), ts[:o].copy()))
        if sum(len(p[1]) for p in self._parts) > 2 * self._room:
            self._parts = [self.seconds(np.iinfo(np.int64).max)]

    def seconds(self, before: int) -> tuple[F64, I64, I64]:
        """The latest seconds that end at or before `before` (ns): measures (n, D), instrument (n,), end (n,) ns, in time order."""
        if not self._parts:
            return np.empty((0, D)), np.empty(0, np.int64), np.empty(0, np.int64)
        x, inst, ts = (np.concatenate(p) for p in zip(*self._parts))
        keep = np.flatnonzero(ts <= before)[-self._room :]
        return x[keep], inst[keep], ts[keep]


def _breaks(end: I64, inst: I64 | None = None) -> I64:
    """Where a sequence of seconds that end at `end` (n,) ns begins anew: after a silence, or with another instrument."""
    return np.flatnonzero((np.diff(end) != SCALE) | (False if inst is None else np.diff(inst) != 0)) + 1


def _column(block: Block, i: int) -> F64:
    return np.ascontiguousarray(block.rows[:, i], np.float64)


class State(NamedTuple):
    """What a stream carries: the running seconds, the filter (I, K M), its steps (I,); `newest`: posteriors at the last block's closes."""

    seconds: Seconds
    alpha: F64
    steps: I64
    newest: list[F64]


class Hmm:
    """The member. `centre`, `scale` (I, D) standardise the measures; `table` (I, K, H, 3) is P(class | regime), `size` (I, K, H) ticks.

    `proven` (H,): where votes learnt of the fit slice alone beat its class rates on the calibration slice.
    """

    name = "hmm"

    def __init__(
        self, names: Sequence[str], tick: F64, chain: Chain, centre: F64, scale: F64, table: F64, size: F64,
        proven: NDArray[np.bool_] | None = None,
    ) -> None:  # fmt: skip
        self._mid, self._spread = list(names).index("mid"), list(names).index("spread")
        self.tick, self.chain, self.centre, self.scale, self.table, self.size = tick, chain, centre, scale, table, size
        self.proven = np.zeros(H, np.bool_) if proven is None else proven

    @staticmethod
    def gatherer(instruments: Sequence[Instrument], names: Sequence[str]) -> Measures:
        return Measures(instruments, names)

    @classmethod
    def fit(cls, study: Study, gathered: Measures, config: Config | None = None, start: Self | None = None) -> Self:
        """Chain and scalers on the fit slice; P(class | regime) on the calibration slice, shrunk towards the instrument's own rates.

        From a `start`, an earlier fit of the same instruments, EM goes on where that ended, in its units, and P(class | regime) is shrunk
        towards what it was.
        Raises InputError where fewer seconds than `min_seconds` were seen.
        """
        config = config or Config()
        x, inst, end = gathered.seconds(study.split.calibrate)
        if len(x) < config.min_seconds:
            raise InputError(f"regimes need {config.min_seconds} seconds of data in the fit slice, there are {len(x)}: give a longer range")
        n = len(study.instruments)
        centre, scale = np.zeros((n, D)), np.ones((n, D))
        if start is not None:
            centre, scale = start.centre.copy(), start.scale.copy()
        for k in range(n) if start is None else ():
            if (inst == k).any():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)  # a measure that never was
                    centre[k], spread = np.nanmedian(x[inst == k], axis=0), np.nanstd(x[inst == k], axis=0)
                centre[k] = np.nan_to_num(centre[k])
                scale[k] = np.where(np.isfinite(spread) & (spread > 1e-6), spread, 1.0)
        z = np.clip((x - centre[inst]) / scale[inst], -CLIP, CLIP)
        order = np.lexsort((end, inst))
        cuts = _breaks(end[order], inst[order])
        lengths = np.diff(np.concatenate([[0], cuts, [len(order)]]))
        chain = fit_chain(z[order], lengths.tolist(), study.seed, config, None if start is None else start.chain)
        tick = np.array([i.tick / SCALE for i in study.instruments])
        me = cls(study.names, tick, chain, centre, scale, np.full((n, K, H, 3), np.nan), np.full((n, K, H), np.nan))
        me._fit_votes(study, gathered, config, None if start is None else start.table)
        return me

    def _fit_votes(self, study: Study, gathered: Measures, config: Config, before: F64 | None) -> None:
        seen = self._seen(study, gathered)
        for h in study.usable:
            fit, later = (rows[np.isfinite(seen[rows, 0])] for rows in (study.fit_rows(h), study.calibration_rows(h)))
            self.proven[h] = self._tells(study, seen, fit, later, h, config)
            self.table[:, :, h], self.size[:, :, h] = self._rates(study, seen, np.concatenate([fit, later]), h, config, before)

    def _seen(self, study: Study, gathered: Measures) -> F64:
        """(n, K) P(regime) at each decision of the table as `predict` would tell it, NaN before a first second has ended."""
        x, inst, end = gathered.seconds(study.split.weigh)
        table, out = study.table, np.full((len(study.table.ts), K), np.nan)
        for k in range(len(self.tick)):
            mine = inst == k
            if not mine.any():
                continue
            z, ends = np.clip((x[mine] - self.centre[k]) / self.scale[k], -CLIP, CLIP), end[mine]
            states = np.empty((len(z), len(self.chain.start)))
            for a, b in itertools.pairwise([0, *_breaks(ends), len(z)]):  # a long silence forgets the regime, here as in `predict`
                filter_all(z[a:b], *self.chain, states[a:b])
            rows = np.flatnonzero(table.instrument == k)
            at = np.searchsorted(ends, table.ts[rows], side="right") - 1
            known = (at >= 0) & (ends[at] == table.ts[rows] // SCALE * SCALE)
            out[rows[known]] = by_regime(states)[at[known]]
        return out

    def _rates(self, study: Study, seen: F64, rows: I64, h: int, config: Config, before: F64 | None) -> tuple[F64, F64]:
        """P(class | regime) (I, K, 3) and mean |move| (I, K) in ticks of the decisions `rows`; NaN for an instrument that has none."""
        table, y_all = study.table, study.classes(h)
        p, size = np.full((len(self.tick), K, 3), np.nan), np.full((len(self.tick), K), np.nan)
        for k in range(len(self.tick)):
            mine = rows[table.instrument[rows] == k]
            if not len(mine):
                continue
            # overlapping labels count as the independent ones that they are worth
            y, worth = y_all[mine], study.independent(mine, h) / len(mine)
            rates = np.bincount(y, minlength=3) / len(mine)
            rates = (rates + 0.01) / 1.03
            moved = np.abs(table.move[mine, h])
            for r in range(K):
                w = worth * seen[mine, r]
                total = w.sum() + config.pseudo
                belief = rates if before is None or np.isnan(before[k, r, h, 0]) else before[k, r, h]
                p[k, r] = (np.bincount(y, weights=w, minlength=3) + config.pseudo * belief) / total
                size[k, r] = (w @ moved + config.pseudo * moved.mean()) / total
        return p, size

    def _tells(self, study: Study, seen: F64, fit: I64, later: I64, h: int, config: Config) -> bool:
        """Do votes learnt of the fit slice alone beat its class rates on the calibration slice, by one standard error or more?

        Where they repeat class rates, or are too few to tell, an even share of the ensemble would be taken from those that know something.
        """
        k, y = study.table.instrument[later], study.classes(h)[later]
        regimes, _ = self._rates(study, seen, fit, h, config, None)
        plain, _ = self._rates(study, np.full_like(seen, 1 / K), fit, h, config, None)
        told = (seen[later, None] @ regimes[k])[:, 0]
        ok = np.isfinite(told[:, 0])
        d = np.log(told[ok, y[ok]] / plain[k[ok], 0, y[ok]])
        return mean_test(d, study.table.ts[later][ok], HORIZONS_NS[h]).t > EVIDENCE

    def new_state(self) -> State:
        n = len(self.tick)
        return State(new_seconds(n), np.zeros((n, len(self.chain.start))), np.zeros(n, np.int64), [np.empty((0, K))])

    def predict(self, block: Block, state: State) -> Votes:
        """Votes at each close, `state` advanced in place; NaN until an instrument's first second has ended."""
        e, m = block.events, len(block.closes)
        inst = e["instrument"].astype(np.int64)
        states = np.empty((m, len(self.chain.start)))
        _regimes(
            np.ascontiguousarray(e["ts_init"]), inst, _column(block, self._mid), _column(block, self._spread), block.closes, self.tick,
            self.centre, self.scale, *self.chain, *state.seconds, state.alpha, state.steps, states,
        )  # fmt: skip
        state.newest[0] = seen = by_regime(states)
        votes = Votes(np.empty((m, H, 3)), np.empty((m, H)))
        _mix(seen, inst[block.closes], self.table, self.size, votes.proba, votes.magnitude)
        return votes

    def regimes(self, state: State) -> F64:
        """(m, K) P(regime) at the closes of the block predicted last, NaN where unknown."""
        return state.newest[0]

    def report(self) -> list[str]:
        """The regimes in words: mean measures in standard deviations, and how likely a second is followed by another of the same."""
        n = len(self.chain.start) // K
        lines = []
        for r, name in enumerate(REGIMES):
            own = slice(r * n, (r + 1) * n)
            means = self.chain.mean[own].mean(axis=0)
            stays = float(self.chain.moves[own, own].sum(axis=1).mean())
            lines.append(f"{name}: " + ", ".join(f"{m} {v:+.2f}" for m, v in zip(MEASURES, means)) + f"; stays {stays:.3f}")
        voted, proven = np.isfinite(self.table).any(axis=(0, 1, 3)), self.proven
        told = {what: ", ".join(LABELS[h] for h in np.flatnonzero(voted & mask)) for what, mask in (("yes", proven), ("no", ~proven))}
        if told["yes"]:
            lines.append(f"votes at {told['yes']}, where they beat class rates on the calibration slice")
        if told["no"]:
            lines.append(f"begins with next to no weight at {told['no']}: there its votes did not beat class rates, or too few labels tell")
        return lines

    def save(self, folder: Path) -> None:
        chain = self.chain._asdict()
        np.savez(
            folder / "hmm.npz", tick=self.tick, centre=self.centre, scale=self.scale, table=self.table, size=self.size, proven=self.proven,
            **chain,
        )  # fmt: skip

    @classmethod
    def load(cls, folder: Path, names: Sequence[str]) -> Self:
        with np.load(folder / "hmm.npz", allow_pickle=False) as z:
            chain = Chain(z["start"], z["moves"], z["mean"], z["var"])
            return cls(names, z["tick"], chain, z["centre"], z["scale"], z["table"], z["size"], z["proven"])


@njit(cache=True, nogil=True)
def _mix(seen, inst, table, size, proba, magnitude):  # type: ignore[no-untyped-def]
    for r in range(len(seen)):
        for h in range(proba.shape[1]):
            magnitude[r, h] = 0.0
            for c in range(3):
                proba[r, h, c] = 0.0
                for k in range(seen.shape[1]):
                    proba[r, h, c] += seen[r, k] * table[inst[r], k, h, c]
            for k in range(seen.shape[1]):
                magnitude[r, h] += seen[r, k] * size[inst[r], k, h]


def share(regimes: NDArray[np.int8]) -> dict[str, float]:
    """How much of the decisions each regime holds, by name."""
    return {name: float((regimes == r).mean()) if len(regimes) else 0.0 for r, name in enumerate(REGIMES)}
