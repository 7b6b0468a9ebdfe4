"""The hidden Markov model behind the regimes (`hmm.py`): a chain of states with Gaussian emissions, fitted, filtered, decoded, named.

Takes scaled measures of one second after the other, (n, D), and gives a :class:`Chain` and the probability of each state given the
seconds so far (Hamilton 1989; Rabiner 1989, eqs. 19-20). hmmlearn fits; the causal filter is ours, in numba, one step a second. Viterbi
and forward-backward look ahead: they are for the past only and feed no model.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numba import njit

from cift_models.labels import F64, I64

REGIMES: Final = ("low_volatility", "trending_up", "trending_down", "high_volatility", "crisis")
MEASURES: Final = ("trend", "volatility", "intensity", "spread")
PROTOTYPES: Final = np.array(  # where the means of each regime's measures are looked for, in standard deviations
    [[0, -0.8, -0.5, -0.3], [1, 0.3, 0.3, 0], [-1, 0.3, 0.3, 0], [0, 1.2, 0.8, 0.5], [0, 2.5, 1.8, 2.0]], np.float64
)
K: Final = len(REGIMES)
D: Final = len(MEASURES)
CLIP: Final = 5.0  # standard deviations


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
    stay = np.full((K, K), 0.02 / (K - 1)) + np.eye(K) * (0.98 - 0.02 / (K - 1))
    even = Chain(np.full(K, 1 / K), stay / stay.sum(axis=1, keepdims=True), PROTOTYPES, np.ones((K, D)))
    first = even if start is None else _joined(start)
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
