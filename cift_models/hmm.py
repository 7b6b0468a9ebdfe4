"""Regimes: a hidden Markov model over one-second measures of each instrument; five states named from what they emit.

Takes blocks of the stream; gives, at every batch close, the probability of each regime given the seconds that have ended (Hamilton 1989;
Rabiner 1989, eqs. 19-20), votes by P(move class | regime), and a position scale. hmmlearn fits; the causal filter is ours, in numba, one
step a second. Viterbi and forward-backward look ahead: they are for the past only and feed no model. `hmm_online.py` learns on;
the member does not use it, for it follows the measures better but votes no better (docs/measurements.md).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from catalog.errors import InputError
from catalog.events import SCALE, Instrument
from cift_models.labels import F64, I64, H, Study
from cift_models.windows import Block, Votes

REGIMES: Final = ("low_volatility", "trending_up", "trending_down", "high_volatility", "crisis")
POSITION: Final = (1.0, 1.0, 1.0, 0.5, 0.0)  # share of the full position in each regime
MEASURES: Final = ("trend", "volatility", "intensity", "spread")
K: Final = len(REGIMES)
D: Final = len(MEASURES)
CLIP: Final = 5.0  # standard deviations
MAX_SECONDS: Final = 24_000  # latest so many seconds, over all instruments, are learnt from
LONGEST_SILENCE: Final = 60  # seconds without an event that are filtered as such; after a longer one the regime is forgotten
_TREND, _VOL = 1 - 2 ** (-1 / 10), 1 - 2 ** (-1 / 5)  # half-lives of 10 s and 5 s


@dataclass(frozen=True, slots=True)
class Config:
    starts: int = 3  # the first from the regimes' prototypes, the others around them
    iterations: int = 30
    floor: float = 0.1  # least variance of a scaled measure within a state
    anchor: float = 0.05  # belief in the prototypes' means, as a share of the seconds seen
    sticky: float = 50.0  # seconds' worth of belief that a regime stays
    min_seconds: int = 300
    pseudo: float = 30.0  # independent labels' worth of belief that a regime moves like the whole
    mixtures: int = 1  # Gaussians that each regime emits from


class Chain(NamedTuple):
    """A Gaussian HMM with diagonal covariances: start (K,), moves (K, K) rows sum to 1, mean and var (K, D).

    A regime that emits from M Gaussians is M states here, side by side (:func:`spread_out`): the same process, with one filter for both.
    """

    start: F64
    moves: F64
    mean: F64
    var: F64


@njit(cache=True, nogil=True)
def emission(x, mean, precision, log_var, out):  # type: ignore[no-untyped-def]
    """Log density of x (D,) in each state; `precision` = 1 / var, `log_var` = log(2 pi var). A NaN measure is left out (marginalised)."""
    for k in range(len(mean)):
        s = 0.0
        for d in range(len(x)):
            if x[d] == x[d]:
                z = min(max(x[d] - mean[k, d], -1e100), 1e100)
                s += log_var[k, d] + z * z * precision[k, d]
        out[k] = -0.5 * s


@njit(cache=True, nogil=True)
def step(x, moves, mean, precision, log_var, alpha, prior, work):  # type: ignore[no-untyped-def]
    """One causal step: `alpha` (K,) P(state | past) becomes P(state | past, x); returns log p(x | past). `prior`: alpha is P(first state).

    Likelihoods are scaled by the largest among the states that can be reached, which so keeps its predicted weight: the sum is never 0,
    the result never NaN. `work` (2, K) is scratch.
    """
    n, top, total = len(alpha), -np.inf, 0.0
    emission(x, mean, precision, log_var, work[0])
    for j in range(n):
        p = alpha[j]
        if not prior:
            p = 0.0
            for k in range(n):
                p += alpha[k] * moves[k, j]
        work[1, j] = p
        if p > 0:
            top = max(top, work[0, j])
    if not top > -np.inf:
        alpha[:] = work[1]
        return -np.inf
    for j in range(n):
        alpha[j] = work[1, j] * np.exp(min(0.0, work[0, j] - top))
        total += alpha[j]
    for j in range(n):
        alpha[j] /= total
    return top + np.log(total)


@njit(cache=True, nogil=True)
def filter_all(x, start, moves, mean, var, out):  # type: ignore[no-untyped-def]
    """P(state_t | x_0..x_t) into `out` (n, K) for x (n, D); returns log p(x)."""
    alpha, work, score = start.copy(), np.empty((2, len(start))), 0.0
    precision, log_var = 1 / var, np.log(2 * np.pi * var)
    for t in range(len(x)):
        score += step(x[t], moves, mean, precision, log_var, alpha, t == 0, work)
        out[t] = alpha
    return score


def _log(p: F64) -> F64:
    with np.errstate(divide="ignore"):
        return np.log(p)


def _emissions(x: F64, chain: Chain) -> F64:
    out, log_var = np.empty((len(x), len(chain.start))), np.log(2 * np.pi * chain.var)
    for t in range(len(x)):
        emission(x[t], chain.mean, 1 / chain.var, log_var, out[t])
    return out


def viterbi(x: F64, chain: Chain) -> I64:
    """The likeliest path of states for x (n, D) as a whole (Viterbi 1967). Looks ahead: for the past only."""
    b, a = _emissions(x, chain), _log(chain.moves)
    back = np.zeros((len(x), len(chain.start)), np.int64)
    best = _log(chain.start) + b[0]
    for t in range(1, len(x)):
        reach = best[:, None] + a
        back[t] = reach.argmax(axis=0)
        best = reach.max(axis=0) + b[t]
    path = np.zeros(len(x), np.int64)
    path[-1] = best.argmax()
    for t in range(len(x) - 1, 0, -1):
        path[t - 1] = back[t, path[t]]
    return path


def smooth(x: F64, chain: Chain) -> F64:
    """P(state_t | all of x), (n, K), by forward-backward (Rabiner 1989, eq. 27). Looks ahead: for the past only."""
    b, a = _emissions(x, chain), _log(chain.moves)
    forward, backward = np.empty_like(b), np.zeros_like(b)
    forward[0] = _log(chain.start) + b[0]
    for t in range(1, len(x)):
        forward[t] = np.logaddexp.reduce(forward[t - 1][:, None] + a, axis=0) + b[t]
    for t in range(len(x) - 2, -1, -1):
        backward[t] = np.logaddexp.reduce(a + b[t + 1] + backward[t + 1], axis=1)
    both = forward + backward
    return np.exp(both - np.logaddexp.reduce(both, axis=1)[:, None])


def name_states(mean: F64) -> I64:
    """Which fitted state is which regime, by its mean scaled emissions (K, D): order (K,) so that state order[r] is REGIMES[r].

    Crisis is the most agitated (volatility, intensity and spread together), high volatility the next; of the others the
    strongest trend up and down, and what remains is calm.
    """
    restless = mean[:, 1] + 0.5 * mean[:, 2] + 0.5 * mean[:, 3]
    left = list(np.argsort(restless, kind="stable"))
    crisis, high = left.pop(), left.pop()
    left.sort(key=lambda k: mean[k, 0])
    down, low, up = left
    return np.array([low, up, down, high, crisis], np.int64)


def spread_out(start: F64, moves: F64, weight: F64, mean: F64, var: F64) -> Chain:
    """A chain of K states with M Gaussians each, `weight` (K, M), `mean` and `var` (K, M, D), as one of K M states with one each.

    P((j, n) | (k, m)) = moves[k, j] weight[j, n]: which Gaussian emits is drawn anew at every step.
    """
    k, m = weight.shape
    to = np.repeat(moves, m, axis=0)[:, :, None] * weight[None]
    return Chain((start[:, None] * weight).ravel(), to.reshape(k * m, k * m), mean.reshape(k * m, -1), var.reshape(k * m, -1))


def by_regime(states: F64) -> F64:
    """P(state) (n, K M) -> P(regime) (n, K)."""
    return states if states.shape[1] == K else states.reshape(len(states), K, -1).sum(axis=2)


def fit_chain(x: F64, lengths: Sequence[int], seed: int = 0, config: Config | None = None, start: Chain | None = None) -> Chain:
    """The likeliest of several Baum-Welch fits to scaled measures x (n, D) of sequences of `lengths`, states in the order of REGIMES.

    Means are drawn a little towards the regimes' prototypes, so that refits find the same ones; given a `start`, that chain's states stand
    in their place and are the only ones that are fitted on. A start that fails or diverges is dropped; where all do, the prototypes
    stand. Variances and transitions have floors. With `config.mixtures` M > 1 the Gaussians of each state are then split and fitted on;
    K M states come back, M side by side for each regime.
    """
    from hmmlearn.hmm import GaussianHMM

    config = config or Config()
    x = np.nan_to_num(x, nan=0.0, posinf=CLIP, neginf=-CLIP)
    mean = np.array([[0, -0.8, -0.5, -0.3], [1, 0.3, 0.3, 0], [-1, 0.3, 0.3, 0], [0, 1.2, 0.8, 0.5], [0, 2.5, 1.8, 2.0]], np.float64)
    stay = np.full((K, K), 0.02 / (K - 1)) + np.eye(K) * (0.98 - 0.02 / (K - 1))
    first = Chain(np.full(K, 1 / K), stay / stay.sum(axis=1, keepdims=True), mean, np.ones((K, D))) if start is None else _joined(start)
    best, best_score = first, -np.inf
    rng = np.random.default_rng(seed)
    logger = logging.getLogger("hmmlearn")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # a fit that does not converge is no matter: the best of several counts
    try:
        for a in range(config.starts if start is None else 1):
            model = GaussianHMM(
                K, covariance_type="diag", min_covar=config.floor, n_iter=config.iterations, tol=1e-3 * len(x) ** 0.5, random_state=seed,
                init_params="", transmat_prior=1 + config.sticky * np.eye(K), means_prior=first.mean, means_weight=config.anchor * len(x),
            )  # fmt: skip
            around = first.mean + (0.0 if a == 0 else 0.5) * rng.normal(size=(K, D))
            model.startprob_, model.transmat_, model.means_, model.covars_ = first.start, first.moves, around, first.var
            try:
                with warnings.catch_warnings(), np.errstate(all="ignore"):
                    warnings.simplefilter("ignore")
                    model.fit(x, list(lengths))
                chain = _sound(model, config.floor)
            except (ValueError, FloatingPointError, np.linalg.LinAlgError):
                continue
            score = _score(x, lengths, chain)
            if np.isfinite(score) and score > best_score + 1e-6 * abs(best_score if np.isfinite(best_score) else 0):
                best, best_score = chain, score
        order = name_states(best.mean)
        best = Chain(best.start[order], best.moves[np.ix_(order, order)], best.mean[order], best.var[order])
        return best if config.mixtures == 1 else _split(x, lengths, best, seed, config)
    finally:
        logger.setLevel(level)


def _joined(chain: Chain) -> Chain:
    """One Gaussian for each regime, of the same mean and variance, in place of the M that it emits from."""
    m = len(chain.start) // K
    if m == 1:
        return chain
    share = np.linalg.matrix_power(chain.moves, 1 << 12)[0].reshape(K, m)
    share /= share.sum(axis=1, keepdims=True)
    mean, var = (a.reshape(K, m, -1) for a in (chain.mean, chain.var))
    middle = (share[:, :, None] * mean).sum(axis=1)
    moves = (chain.moves.reshape(K, m, K, m).sum(axis=3) * share[:, :, None]).sum(axis=1)
    return Chain(by_regime(chain.start[None])[0], moves, middle, (share[:, :, None] * (var + (mean - middle[:, None]) ** 2)).sum(axis=1))


def _split(x: F64, lengths: Sequence[int], one: Chain, seed: int, config: Config) -> Chain:
    """Each state's Gaussian split in M and fitted on; the named `one` itself, spread out, where that gains nothing."""
    from hmmlearn.hmm import GMMHMM

    m = config.mixtures
    weight, var = np.full((K, m), 1 / m), np.repeat(one.var[:, None], m, axis=1)
    mean = np.repeat(one.mean[:, None], m, axis=1)
    best = spread_out(one.start, one.moves, weight, mean, var)
    model = GMMHMM(
        K, m, covariance_type="diag", min_covar=config.floor, n_iter=config.iterations, tol=1e-3 * len(x) ** 0.5, random_state=seed,
        init_params="", transmat_prior=1 + config.sticky * np.eye(K), means_prior=mean,
        means_weight=np.full((K, m), config.anchor * len(x) / K / m), weights_prior=np.full((K, m), 2.0),
    )  # fmt: skip
    apart = np.random.default_rng(seed).normal(size=mean.shape) * np.sqrt(var)
    model.startprob_, model.transmat_, model.weights_ = one.start, one.moves, weight
    model.means_, model.covars_ = mean + 0.5 * apart, var.copy()
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            model.fit(x, list(lengths))
        start, moves, weight, _ = _floors(model.startprob_, model.transmat_, model.weights_, model.means_)
    except (ValueError, FloatingPointError, np.linalg.LinAlgError):
        return best
    chain = spread_out(start, moves, weight, model.means_, np.maximum(np.nan_to_num(model.covars_, nan=1.0), config.floor))
    middle = (weight[:, :, None] * model.means_).sum(axis=1)
    named = np.array_equal(name_states(middle), np.arange(K))  # else the states have changed places: keep those that are named
    return chain if named and _score(x, lengths, chain) > _score(x, lengths, best) else best


def _sound(model: Any, floor: float) -> Chain:
    """The fit with its floors: every state can be reached and left, no variance vanishes. Raises ValueError where a mean is not finite."""
    start, moves, _, mean = _floors(model.startprob_, model.transmat_, np.ones((K, 1)), model.means_)
    var = np.maximum(np.nan_to_num(np.array([np.diag(c) for c in model.covars_]), nan=1.0), floor)
    return Chain(start, moves, mean, var)


def _floors(start: F64, moves: F64, weight: F64, mean: F64) -> tuple[F64, F64, F64, F64]:
    if not np.isfinite(mean).all():
        raise ValueError("diverged")
    start, moves, weight = np.nan_to_num(start) + 1e-4, np.nan_to_num(moves) + 1e-6, np.nan_to_num(weight) + 1e-6
    sums = moves.sum(axis=1, keepdims=True), weight.sum(axis=1, keepdims=True)
    return start / start.sum(), moves / sums[0], weight / sums[1], np.ascontiguousarray(mean)


def _score(x: F64, lengths: Sequence[int], chain: Chain) -> float:
    out, a, total = np.empty((len(x), len(chain.start))), 0, 0.0
    for n in lengths:
        total += filter_all(x[a : a + n], *chain, out[a : a + n])
        a += n
    return total


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


def _column(block: Block, i: int) -> F64:
    return np.ascontiguousarray(block.rows[:, i], np.float64)


class State(NamedTuple):
    """What a stream carries: the running seconds, the filter (I, K M), its steps (I,); `newest`: posteriors at the last block's closes."""

    seconds: Seconds
    alpha: F64
    steps: I64
    newest: list[F64]


class Hmm:
    """The member. `centre`, `scale` (I, D) standardise the measures; `table` (I, K, H, 3) is P(class | regime), `size` (I, K, H) ticks."""

    name = "hmm"

    def __init__(self, names: Sequence[str], tick: F64, chain: Chain, centre: F64, scale: F64, table: F64, size: F64) -> None:
        self._mid, self._spread = list(names).index("mid"), list(names).index("spread")
        self.tick, self.chain, self.centre, self.scale, self.table, self.size = tick, chain, centre, scale, table, size

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
        cuts = np.flatnonzero((np.diff(inst[order]) != 0) | (np.diff(end[order]) != SCALE)) + 1
        lengths = np.diff(np.concatenate([[0], cuts, [len(order)]]))
        chain = fit_chain(z[order], lengths.tolist(), study.seed, config, None if start is None else start.chain)
        tick = np.array([i.tick / SCALE for i in study.instruments])
        me = cls(study.names, tick, chain, centre, scale, np.full((n, K, H, 3), np.nan), np.full((n, K, H), np.nan))
        me._fit_votes(study, gathered, config, None if start is None else start.table)
        return me

    def _fit_votes(self, study: Study, gathered: Measures, config: Config, before: F64 | None) -> None:
        x, inst, end = gathered.seconds(study.split.weigh)
        table = study.table
        for k in range(len(self.tick)):
            mine = inst == k
            if not mine.any():
                continue
            z = np.clip((x[mine] - self.centre[k]) / self.scale[k], -CLIP, CLIP)
            states = np.empty((len(z), len(self.chain.start)))
            filter_all(z, *self.chain, states)
            seen = by_regime(states)
            for h in study.usable:
                y = study.classes(h)
                rows = np.concatenate([r[table.instrument[r] == k] for r in (study.fit_rows(h), study.calibration_rows(h))])
                at = np.searchsorted(end[mine], table.ts[rows], side="right") - 1
                rows, at = rows[at >= 0], at[at >= 0]
                if not len(rows):
                    continue
                # overlapping labels count as the independent ones that they are worth
                worth = study.independent(rows, h) / len(rows)
                rates = np.bincount(y[rows], minlength=3) / len(rows)
                rates = (rates + 0.01) / 1.03
                moved = np.abs(table.move[rows, h])
                for r in range(K):
                    w = worth * seen[at, r]
                    total = w.sum() + config.pseudo
                    belief = rates if before is None or np.isnan(before[k, r, h, 0]) else before[k, r, h]
                    self.table[k, r, h] = (np.bincount(y[rows], weights=w, minlength=3) + config.pseudo * belief) / total
                    self.size[k, r, h] = (w @ moved + config.pseudo * moved.mean()) / total

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
        return lines

    def save(self, folder: Path) -> None:
        chain = self.chain._asdict()
        np.savez(folder / "hmm.npz", tick=self.tick, centre=self.centre, scale=self.scale, table=self.table, size=self.size, **chain)

    @classmethod
    def load(cls, folder: Path, names: Sequence[str]) -> Self:
        with np.load(folder / "hmm.npz", allow_pickle=False) as z:
            chain = Chain(z["start"], z["moves"], z["mean"], z["var"])
            return cls(names, z["tick"], chain, z["centre"], z["scale"], z["table"], z["size"])


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
