"""Hawkes processes of order flow: how buys, sells and cancels excite themselves and one another, and what that says of the next move.

Takes typed event times of one instrument, gives exact likelihood, fit, forecast, simulation and goodness of fit (:class:`Params`);
takes EVENT blocks of many instruments, gives direction votes at every batch close (:class:`Hawkes`, the ensemble member).

The model, for target type i of D at time t, with K decays shared by all pairs (Hawkes 1971; Bacry, Mastromatteo, Muzy 2015):

    lambda_i(t) = mu_i(time of day) + sum_kj alpha_kij beta_k S_kj(t),    S_kj(t) = sum_{t_n < t, c_n = j} exp(-beta_k (t - t_n))

alpha_kij is the expected number of type-i children that a type-j event has through decay k; the branching matrix is G = sum_k alpha_k,
and the process is stationary where its spectral radius is below 1 (Bremaud, Massoulie 1996). Simultaneous events do not excite one
another: each sees the left limit t-. So the likelihood does not depend on the order within a stamp and stays bounded where decays grow.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp, log
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from numba import njit
from pydantic import BaseModel, ConfigDict, Field, field_validator
from scipy import optimize, stats
from scipy.linalg import expm

from catalog.errors import InputError
from catalog.events import ADD, CANCEL, F_MBP, F_SNAPSHOT, F_TOB, TRADE
from cift_models.labels import Study, effective
from cift_models.windows import HORIZONS_NS, Block, Votes

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

DAY_NS: Final = 86_400_000_000_000
NS: Final = 1e-9
TINY: Final = 1e-12  # keeps branching matrices positive

# name -> action, side (None: any), direction in which it pushes the price; the pairs mirror each other
TYPES: Final[dict[str, tuple[int, int | None, int]]] = {
    "buy": (TRADE, 1, 1),
    "sell": (TRADE, -1, -1),
    "cancel": (CANCEL, None, 0),
    "cancel_ask": (CANCEL, -1, 1),
    "cancel_bid": (CANCEL, 1, -1),
    "add": (ADD, None, 0),
    "add_bid": (ADD, 1, 1),
    "add_ask": (ADD, -1, -1),
}
PAIRS: Final = (("buy", "sell"), ("cancel_ask", "cancel_bid"), ("add_bid", "add_ask"))


class Config(BaseModel):
    """What is modelled and how it is fitted. Decays in 1/s. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    types: tuple[str, ...] = ("buy", "sell", "cancel")
    decays: int = Field(default=3, ge=1, le=8)  # K: 1 is the exponential kernel, more a sum of exponentials
    decay_range: tuple[float, float] = (0.02, 10_000.0)
    max_radius: float = Field(default=0.999, gt=0, lt=1)  # the spectral radius of G stays below this
    bins: int = Field(default=24, ge=1)  # pieces of the UTC day in which the baseline is constant
    smooth: float = Field(default=1.0, gt=0)  # pulls log mu of each bin towards their mean; a bin never seen gets the mean
    gap_s: float = Field(default=1800.0, gt=0)  # a longer silence (night, halt) is not observed: it ends a window of the likelihood
    max_events: int = Field(default=200_000, ge=1_000)  # the latest so many of an instrument are fitted
    max_labels: int = Field(default=40_000, ge=100)  # per instrument and horizon, thinned evenly
    min_events: int = 200  # of an instrument, fewer: no fit
    min_type_events: int = 20  # of a type, fewer: it neither excites nor is excited
    min_labels: float = 5.0  # independent ones (span over horizon), fewer: the horizon abstains
    ridge: float = Field(default=1.0, gt=0)  # before any label the map's slopes spread a log-odds by 1 / sqrt(ridge) in all
    max_iterations: int = 300

    @field_validator("types")
    @classmethod
    def _known(cls, v: tuple[str, ...]) -> tuple[str, ...]:
        cells = [(TYPES[n][0], s) for n in v if n in TYPES for s in ([TYPES[n][1]] if TYPES[n][1] else [1, -1])]
        if set(v) - set(TYPES) or len(cells) != len(set(cells)) or not {"buy", "sell"} <= set(v):
            raise ValueError(f"types must hold buy and sell and be disjoint, out of {', '.join(TYPES)}")
        return v

    @field_validator("decay_range")
    @classmethod
    def _range(cls, v: tuple[float, float]) -> tuple[float, float]:
        if not 0 < v[0] < v[1]:
            raise ValueError("decay_range must be two positive decays, the smaller first")
        return v

    @field_validator("bins")
    @classmethod
    def _divides(cls, v: int) -> int:
        if 86_400 % v:
            raise ValueError("bins must divide the 86,400 seconds of a day")
        return v


class Params(NamedTuple):
    """A process: baseline `mu` (D, B) events/s per bin of the UTC day, `alpha` (K, D, D) children, `beta` (K,) 1/s ascending."""

    mu: Floats
    alpha: Floats
    beta: Floats

    @property
    def radius(self) -> float:
        """Spectral radius of the branching matrix."""
        return float(np.abs(np.linalg.eigvals(self.alpha.sum(0))).max())

    def rates(self) -> Floats:
        """Stationary intensities (D,), events/s, under the mean baseline: (I - G)^-1 mu."""
        return np.linalg.solve(np.eye(len(self.mu)) - self.alpha.sum(0), self.mu.mean(1))


# --- likelihood -------------------------------------------------------------------------------------------------------------------


class Observed(NamedTuple):
    """Typed times cut into windows. Windows open on an empty history; an event at the very opening is history, not scored."""

    dt: Floats  # (n,) s since the previous event, or since the window opened
    kind: npt.NDArray[np.uint8]  # (n,)
    bin: npt.NDArray[np.uint16]  # (n,) of the UTC day
    windows: Ints  # (w, 3): first event, first scored event, end
    tail: Floats  # (w,) s from the last event to where the window closes
    exposure: Floats  # (B,) s observed per bin
    scored: Ints  # (D,) scored events per type


def observe(
    t: Ints,
    kind: npt.NDArray[np.integer[Any]],
    types: int,
    bins: int = 1,
    gap_s: float = np.inf,
    start: int | None = None,
    end: int | None = None,
    holes: Sequence[int] | Ints = (),
) -> Observed:
    """Prepare ascending times `t` (n,) int64 ns with `kind` (n,) in [0, types) for :func:`loglik`.

    The first window opens at `start` (default: the first event) and the last one closes at `end` (default: the last event). A silence
    beyond `gap_s` ends a window, and so do events left out before any of the indices `holes`.
    Raises InputError where times run backwards, kinds are out of range or nothing is left to score.
    """
    t, kind = np.ascontiguousarray(t, np.int64), np.asarray(kind)
    if t.ndim != 1 or t.shape != kind.shape or not len(t):
        raise InputError(f"hawkes: times and types must be two lists of one length, at least 1; got {t.shape} and {kind.shape}")
    if (np.diff(t) < 0).any() or (start is not None and start > t[0]) or (end is not None and end < t[-1]):
        raise InputError("hawkes: times run backwards or lie outside start and end: sort the events by time")
    if kind.min() < 0 or kind.max() >= types:
        raise InputError(f"hawkes: event types must lie in 0..{types - 1}, got {kind.min()}..{kind.max()}")
    cut = np.union1d(np.flatnonzero(np.diff(t) * NS > gap_s) + 1, np.asarray(holes, np.int64)).astype(np.int64)
    lo, hi = np.r_[0, cut], np.r_[cut, len(t)]
    opens, closes = t[lo].copy(), t[hi - 1].copy()
    opens[0], closes[-1] = t[0] if start is None else start, t[-1] if end is None else end
    dt = np.diff(t, prepend=t[0])
    dt[lo] = t[lo] - opens
    first = np.searchsorted(t, opens, "right")
    exposure = (_seconds_in_bins(closes, bins) - _seconds_in_bins(opens, bins)).sum(0)
    mask = np.concatenate([np.arange(a, b) for a, b in zip(first, hi)])
    if not len(mask):
        raise InputError(f"hawkes: all {len(t):,} events fall on one stamp: nothing can be learned from their times")
    bin_ = (t % DAY_NS // (DAY_NS // bins)).astype(np.uint16)
    scored = np.bincount(kind[mask], minlength=types).astype(np.int64)
    return Observed(dt * NS, kind.astype(np.uint8), bin_, np.stack([lo, first, hi], 1), (closes - t[hi - 1]) * NS, exposure, scored)


def _seconds_in_bins(t: Ints, bins: int) -> Floats:
    """Seconds spent in each bin of the day from the epoch to each t: (n, bins)."""
    width = DAY_NS // bins
    return ((t // DAY_NS)[:, None] * width + np.clip((t % DAY_NS)[:, None] - np.arange(bins) * width, 0, width)) * NS


@lru_cache
def _kernel(K: int, D: int) -> Callable[..., float]:
    """The likelihood pass for K decays and D types: sizes known when compiled let the inner loops unroll (2 times the speed)."""

    @njit(nogil=True)
    def run(dt, kind, bin_, windows, tail, mu, alpha, beta, g_mu, g_alpha, g_beta):  # type: ignore[no-untyped-def]
        S, R = np.zeros((K, D)), np.zeros((K, D))  # R = dS/dbeta
        a, ab, W, g_b = np.empty((D, K, D)), np.empty((D, K, D)), np.zeros((D, K, D)), np.zeros(K)
        for i in range(D):
            for k in range(K):
                for j in range(D):
                    a[i, k, j] = alpha[k, i, j]
                    ab[i, k, j] = alpha[k, i, j] * beta[k]
        ll, product, count = 0.0, 1.0, np.empty(D)
        for w in range(len(windows)):
            lo, first, hi = windows[w]
            S[:], R[:] = 0.0, 0.0
            p = lo  # events from p on are not in S yet: they share the newest stamp
            for n in range(lo, hi + 1):
                d = dt[n] if n < hi else tail[w]
                if d > 0.0 or n == hi:
                    for m in range(p, n):
                        for k in range(K):
                            S[k, kind[m]] += 1.0
                    p = n
                    for k in range(K):
                        e = exp(-beta[k] * d)
                        for j in range(D):
                            s = S[k, j]
                            R[k, j] = e * (R[k, j] - d * s)
                            S[k, j] = e * s
                if first <= n < hi:
                    i, b = kind[n], bin_[n]
                    lam = mu[i, b]
                    for k in range(K):
                        for j in range(D):
                            lam += ab[i, k, j] * S[k, j]
                    inv = 1.0 / lam
                    product *= lam
                    if not 1e-200 < product < 1e200:  # one logarithm for many events
                        ll += log(product)
                        product = 1.0
                    g_mu[i, b] += inv
                    for k in range(K):
                        g = 0.0
                        for j in range(D):
                            W[i, k, j] += S[k, j] * inv
                            g += a[i, k, j] * R[k, j]
                        g_b[k] += g * inv
            # the compensator of a kernel from all events to the window's close is (their number - S there), with dS/dbeta = R
            count[:] = 0.0
            for m in range(lo, hi):
                count[kind[m]] += 1.0
            for k in range(K):
                for i in range(D):
                    for j in range(D):
                        g_alpha[k, i, j] -= count[j] - S[k, j]
                        g_beta[k] += alpha[k, i, j] * R[k, j]
        for k in range(K):
            g_beta[k] += beta[k] * g_b[k]
            for i in range(D):
                for j in range(D):
                    ll += alpha[k, i, j] * g_alpha[k, i, j]
                    g_alpha[k, i, j] += beta[k] * W[i, k, j]
                    g_beta[k] += alpha[k, i, j] * W[i, k, j]
        return ll + log(product)

    return run


def loglik(params: Params, seen: Observed) -> tuple[float, Params]:
    """Exact log-likelihood sum_n log lambda_{c_n}(t_n-) - sum_i int lambda_i and its gradient in mu, alpha and beta, in O(n).

    Daley, Vere-Jones 2003, Prop. 7.2.III; the recursion of S is Ogata 1981's, its derivative in beta is carried beside it.
    """
    K, D, _ = params.alpha.shape
    g = Params(np.zeros_like(params.mu), np.zeros((K, D, D)), np.zeros(K))
    value = _kernel(K, D)(seen.dt, seen.kind, seen.bin, seen.windows, seen.tail, *params, *g)
    g.mu[:] -= seen.exposure
    return value - float((params.mu * seen.exposure).sum()), g


# --- fit --------------------------------------------------------------------------------------------------------------------------


class Coordinates(NamedTuple):
    """Free coordinates x of a stationary process: log mu, the root of a, and decays on a logistic scale within their range.

    With A = sum_k a_k > 0 and its Perron root r, alpha = a / (1 + r / c): the spectral radius r / (1 + r / c) is below c for every x,
    every positive alpha below c is reached (column sums may exceed 1: a trade draws several cancels), and r is smooth, dr/dA =
    u v' / (u . v) with its left and right vectors u, v. The root of a, not its logarithm: that of an absent excitation runs away for ever.
    """

    types: int
    bins: int
    decays: int
    decay_range: tuple[float, float]
    max_radius: float

    def params(self, x: Floats) -> tuple[Params, Callable[[Params], Floats]]:
        """The process at x, and the map that pulls a gradient in its parameters back to x."""
        D, B, K = self.types, self.bins, self.decays
        mu, root = np.exp(x[: D * B]).reshape(D, B), x[D * B : -K].reshape(K, D, D)
        a = root * root + TINY
        low, high = np.log(self.decay_range)
        z = 1.0 / (1.0 + np.exp(-x[-K:]))
        beta = np.exp(low + (high - low) * z)
        A = a.sum(0)
        r, v = _perron(A)
        _, u = _perron(A.T)
        h = 1.0 / (1.0 + r / self.max_radius)

        def pull(g: Params) -> Floats:
            g_r = -(h * h) / self.max_radius * float((g.alpha * a).sum())
            g_a = 2.0 * root * (h * g.alpha + g_r * np.outer(u, v) / (u @ v))
            return np.concatenate([(mu * g.mu).ravel(), g_a.ravel(), g.beta * beta * (high - low) * z * (1.0 - z)])

        return Params(mu, a * h, beta), pull

    def of(self, p: Params) -> Floats:
        """The coordinates of a process (zeros become tiny, decays at the ends of the range move inside)."""
        alpha = np.maximum(p.alpha, 1e-8)
        rho = min(_perron(alpha.sum(0))[0], self.max_radius * (1.0 - 1e-6))
        low, high = np.log(self.decay_range)
        z = np.clip((np.log(p.beta) - low) / (high - low), 1e-3, 1.0 - 1e-3)
        return np.concatenate([np.log(p.mu).ravel(), np.sqrt(alpha / (1.0 - rho / self.max_radius)).ravel(), np.log(z / (1.0 - z))])


def _perron(A: Floats) -> tuple[float, Floats]:
    values, vectors = np.linalg.eig(A)
    i = int(np.argmax(values.real))
    v = np.abs(vectors[:, i].real)
    return float(values[i].real), v / v.sum()


class Fit(NamedTuple):
    params: Params
    loglik: float  # per scored event, nats
    poisson: float  # the same of independent Poisson processes with one rate per type: what the fit has to beat
    rate: Floats  # (D,) seen, events/s
    events: int  # scored
    iterations: int
    converged: bool


def fit_process(
    t: Ints,
    kind: npt.NDArray[np.integer[Any]],
    config: Config | None = None,
    start: int | None = None,
    end: int | None = None,
    holes: Sequence[int] | Ints = (),
    guess: Params | None = None,
) -> Fit:
    """Maximum likelihood by L-BFGS over :class:`Coordinates`, from `guess` or from the data's own time scales.

    `t` (n,) int64 ns ascending, `kind` (n,) indices into `config.types`. Types with fewer than `min_type_events` keep a Poisson rate
    of half an event more than seen, and no excitation. Raises InputError with too few events or all of them on one stamp.
    """
    config = config or Config()
    D, B, K = len(config.types), config.bins, config.decays
    t, kind = np.asarray(t, np.int64), np.asarray(kind)
    if len(t) < config.min_events:
        what = f"{len(t):,} events of {', '.join(config.types)}, at least {config.min_events} are needed"
        raise InputError(f"hawkes: {what}: take a longer range")
    whole = observe(t, kind, D, B, config.gap_s, start, end, holes)
    seconds = whole.exposure.sum()
    live = np.flatnonzero(whole.scored >= config.min_type_events)
    if not len(live):
        raise InputError(f"hawkes: no type has {config.min_type_events} events within windows of {config.gap_s:g} s: take a longer range")
    keep = np.isin(kind, live)
    holes = np.searchsorted(np.flatnonzero(keep), holes)
    seen = observe(t[keep], np.searchsorted(live, kind[keep]), len(live), B, config.gap_s, start, end, holes)
    n, d = int(seen.scored.sum()), len(live)
    space = Coordinates(d, B, K, config.decay_range, config.max_radius)
    rate = seen.scored / seen.exposure.sum()
    if guess is None:
        steps = seen.dt[seen.dt > 0]
        fast, slow = 1.0 / np.quantile(steps, 0.2), 0.1 / np.quantile(steps, 0.8)
        beta = np.geomspace(slow, fast, K) if K > 1 else np.array([1.0 / np.median(steps)])
        first = Params(np.repeat(0.5 * rate[:, None], B, 1), np.full((K, d, d), 0.5 / (K * d)), np.clip(beta, *config.decay_range))
    else:
        first = Params(np.maximum(guess.mu[live], 1e-12), guess.alpha[:, live][:, :, live], guess.beta)

    lit = seen.exposure > 0

    def objective(x: Floats) -> tuple[float, Floats]:
        params, pull = space.params(x)
        value, g = loglik(params, seen)
        grad = pull(g)
        log_mu = x[: d * B].reshape(d, B)
        off = np.where(lit, log_mu - log_mu[:, lit].mean(1, keepdims=True), 0.0)
        grad[: d * B] -= config.smooth * off.ravel()
        return -(value - 0.5 * config.smooth * float((off * off).sum())) / n, -grad / n

    bounds = [(-30.0, 30.0)] * (d * B) + [(-1e3, 1e3)] * (K * d * d) + [(-12.0, 12.0)] * K
    options = {"maxiter": config.max_iterations, "maxfun": 2 * config.max_iterations, "maxcor": 10, "ftol": 1e-9, "gtol": 1e-6}
    found = optimize.minimize(objective, space.of(first), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    params, _ = space.params(found.x)
    order = np.argsort(params.beta)
    usual = (whole.scored + 0.5) / seconds
    mu, alpha = np.repeat(usual[:, None], B, 1), np.zeros((K, D, D))
    mu[live] = np.where(lit, params.mu, np.exp(np.log(params.mu[:, lit]).mean(1, keepdims=True)))
    alpha[np.ix_(range(K), live, live)] = params.alpha[order]
    value, _ = loglik(params, seen)
    poisson = float((seen.scored * (np.log(rate) - 1.0)).sum())
    return Fit(Params(mu, alpha, params.beta[order]), value / n, poisson / n, usual, n, int(found.nit), bool(found.success))


# --- the state after each event, and what follows from it ---------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def _advance(S, pending, last, t, kind, beta):  # type: ignore[no-untyped-def]
    """Move S (K, D) to time t and let an event of `kind` wait in `pending` (D,); -> the newest stamp. Earlier stamps count as ties."""
    if last >= 0 and t > last:
        d = (t - last) * NS
        for k in range(len(beta)):
            e = exp(-beta[k] * d)
            for j in range(len(pending)):
                S[k, j] = (S[k, j] + pending[j]) * e
        pending[:] = 0
    pending[kind] += 1
    return max(t, last)


@njit(cache=True, nogil=True)
def _state_at(S, pending, last, t, beta, out):  # type: ignore[no-untyped-def]
    """The state just after t, all events up to t included, without moving it."""
    d = max(t - last, 0) * NS
    for k in range(len(beta)):
        e = exp(-beta[k] * d)
        for j in range(len(pending)):
            out[k, j] = (S[k, j] + pending[j]) * e


@njit(cache=True, nogil=True)
def _intensities(t, kind, mu, alpha, beta, out):  # type: ignore[no-untyped-def]
    K, D, _ = alpha.shape
    S, pending, now, last = np.zeros((K, D)), np.zeros(D, np.int64), np.zeros((K, D)), t[0]
    for n in range(len(t)):
        if t[n] > last:
            _state_at(S, pending, last, t[n], beta, now)
        b = t[n] % DAY_NS // (DAY_NS // mu.shape[1])
        for i in range(D):
            out[n, i] = mu[i, b]
            for k in range(K):
                for j in range(D):
                    out[n, i] += alpha[k, i, j] * beta[k] * now[k, j]
        last = _advance(S, pending, last, t[n], kind[n], beta)


def intensities(params: Params, t: Ints, kind: npt.NDArray[np.integer[Any]]) -> Floats:
    """lambda(t_n-) of every type just before each event, events/s, (n, D); row n depends on events before t_n only."""
    out = np.empty((len(t), len(params.mu)))
    _intensities(np.ascontiguousarray(t, np.int64), np.ascontiguousarray(kind, np.uint8), *params, out)
    return out


def state_after(params: Params, t: Ints, kind: npt.NDArray[np.integer[Any]], at: int | None = None) -> Floats:
    """S (K, D) just after time `at` (default: the last event), all given events included."""
    K, D, _ = params.alpha.shape
    d = (((t[-1] if at is None else at) - np.asarray(t, np.int64)) * NS)[:, None]
    return np.stack([np.exp(-params.beta * d)[np.asarray(kind) == j].sum(0) for j in range(D)], 1).reshape(K, D)


def intensity(params: Params, S: Floats, bin_: int = 0) -> Floats:
    """lambda (D,), events/s, in state S (K, D) and bin of the day."""
    return params.mu[:, bin_] + np.einsum("kij,k,kj->i", params.alpha, params.beta, S)


class Ahead(NamedTuple):
    """What is expected h from now is linear in state and baseline: lambda = `now_S` @ S.ravel() + `now_mu` @ mu, counts likewise."""

    now_S: Floats  # (D, K*D), 1/s
    now_mu: Floats  # (D, D)
    count_S: Floats  # (D, K*D)
    count_mu: Floats  # (D, D), s

    def intensity(self, S: Floats, mu: Floats) -> Floats:
        """E[lambda(t + h) | t] (D,), events/s."""
        return self.now_S @ S.ravel() + self.now_mu @ mu

    def counts(self, S: Floats, mu: Floats) -> Floats:
        """E[events of each type in (t, t + h] | t] (D,)."""
        return self.count_S @ S.ravel() + self.count_mu @ mu


def ahead(params: Params, h_s: float) -> Ahead:
    """The maps for horizon `h_s` seconds, the baseline held at its present bin.

    S is Markov with dE[S_kj]/dt = -beta_k E[S_kj] + E[lambda_j] (Bacry, Mastromatteo, Muzy 2015; Dassios, Zhao 2011): with the
    counts and the constant mu beside it the system is linear and its solution one matrix exponential.
    """
    K, D, _ = params.alpha.shape
    P = K * D
    lam = np.einsum("kij,k->ikj", params.alpha, params.beta).reshape(D, P)  # lambda = lam @ S + mu
    M = np.zeros((P + 2 * D, P + 2 * D))  # S, counts, mu
    M[:P, :P] = np.tile(lam, (K, 1)) - np.diag(np.repeat(params.beta, D))
    M[:P, P + D :] = np.tile(np.eye(D), (K, 1))
    M[P : P + D, :P], M[P : P + D, P + D :] = lam, np.eye(D)
    E = expm(M * h_s)
    return Ahead(lam @ E[:P, :P], lam @ E[:P, P + D :] + np.eye(D), E[P : P + D, :P], E[P : P + D, P + D :])


@lru_cache
def _gauss() -> tuple[Floats, Floats]:
    x, w = np.polynomial.legendre.leggauss(12)
    return 0.5 * (x + 1.0), 0.5 * w


def next_event(params: Params, S: Floats, h_s: float, bin_: int = 0) -> Floats:
    """Probability (D,) that the next event comes within `h_s` seconds and is of each type; one minus their sum: none comes.

    int_0^h lambda_i(s) exp(-int_0^s lambda_total) ds with no event in between, where lambda decays freely; Gauss-Legendre on panels that
    double from the fastest time scale on.
    """
    w = np.einsum("kij,k,kj->ki", params.alpha, params.beta, S)
    mu = params.mu[:, bin_]
    fastest = 0.25 / (params.beta.max() + mu.sum() + w.sum())
    edges = np.minimum(fastest * 2.0 ** np.arange(-1, max(2.0, np.ceil(np.log2(h_s / fastest)) + 1)), h_s)
    edges[0] = 0.0
    x, weight = _gauss()
    s = (edges[:-1, None] + np.diff(edges)[:, None] * x).ravel()
    ds = (np.diff(edges)[:, None] * weight).ravel()
    decay = np.exp(-params.beta * s[:, None])
    total = mu.sum() * s + ((1.0 - decay) / params.beta) @ w.sum(1)
    return (ds * np.exp(-total)) @ (mu + decay @ w)


# --- online learning ----------------------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def _learn(t, kind, lr, low, high, cap, gap, mu, alpha, beta, S, R, pending, last, v, G):  # type: ignore[no-untyped-def]
    """One event: stochastic gradient of its log-likelihood in log mu, log alpha, log beta; -> the newest stamp."""
    K, D, _ = alpha.shape
    d = (t - last) * NS if t > last else 0.0
    if last >= 0 and d <= gap:
        b = t % DAY_NS // (DAY_NS // mu.shape[1])
        for j in range(D):
            if d > 0.0 and pending[j]:
                for k in range(K):
                    S[k, j] += pending[j]
                pending[j] = 0
        lam = mu[kind, b]
        for k in range(K):
            e = exp(-beta[k] * d) if d > 0.0 else 1.0
            g_b = 0.0
            for j in range(D):
                s, r = S[k, j], R[k, j]
                slope = r * (1.0 - e) + s * d * e  # of the compensator s (1 - e) in beta
                for i in range(D):
                    g_b -= alpha[k, i, j] * slope
                    G[k, i, j] = -alpha[k, i, j] * s * (1.0 - e)
                S[k, j], R[k, j] = s * e, e * (r - d * s)
                lam += alpha[k, kind, j] * beta[k] * S[k, j]
            G[k, D, 0] = g_b
        inv = 1.0 / lam
        for i in range(D):
            g = (mu[i, b] * inv if i == kind else 0.0) - mu[i, b] * d
            mu[i, b] = min(max(mu[i, b] * (1.0 + min(max(lr * g, -0.5), 0.5)), 1e-12), 1e12)
        for k in range(K):
            g_b = G[k, D, 0]
            for j in range(D):
                a = alpha[k, kind, j]
                G[k, kind, j] += a * beta[k] * S[k, j] * inv
                g_b += a * (S[k, j] + beta[k] * R[k, j]) * inv
                for i in range(D):
                    alpha[k, i, j] = min(alpha[k, i, j] * (1.0 + min(max(lr * G[k, i, j], -0.5), 0.5)), 1e3)
            beta[k] = min(max(beta[k] * (1.0 + min(max(lr * beta[k] * g_b, -0.5), 0.5)), low), high)
        # Collatz-Wielandt: for every v > 0 the largest (Gv)_i / v_i bounds the spectral radius; v follows the Perron vector
        bound, total = 0.0, 0.0
        for i in range(D):
            x = 0.0
            for k in range(K):
                for j in range(D):
                    x += alpha[k, i, j] * v[j]
            G[0, D, i] = x
            total += x
            bound = max(bound, x / v[i])
        for i in range(D):
            v[i] = max(G[0, D, i] / total, 1e-6) if total > 0.0 else 1.0
        if bound > cap:
            alpha *= cap / bound
    elif last >= 0:
        S[:], R[:], pending[:] = 0.0, 0.0, 0
    pending[kind] += 1
    return max(t, last)


@njit(cache=True, nogil=True)
def _learn_all(t, kind, lr, low, high, cap, gap, mu, alpha, beta, S, R, pending, last, v, G):  # type: ignore[no-untyped-def]
    for n in range(len(t)):
        last = _learn(t[n], kind[n], lr, low, high, cap, gap, mu, alpha, beta, S, R, pending, last, v, G)
    return last


class Online:
    """A process that goes on learning: one stochastic gradient step of the log-likelihood per event, stationary after every one.

    Steps are multiplicative, so parameters stay positive: theta <- theta (1 + lr dl/dlog theta), each change at most a half. The
    gradient in log mu or log alpha is the probability that the event was such an immigrant or child, minus how many were expected
    since the last one.
    """

    def __init__(self, params: Params, lr: float = 2e-4, config: Config | None = None) -> None:
        config = config or Config()
        K, D, _ = params.alpha.shape
        self._theta = Params(*(x.copy() for x in params))
        self._fixed = (*config.decay_range, config.max_radius, config.gap_s)
        self._state = (np.zeros((K, D)), np.zeros((K, D)), np.zeros(D, np.int64))
        self._work = (np.full(D, 1.0 / D), np.zeros((K, D + 1, D)))
        self.lr, self.last = lr, -1

    @property
    def params(self) -> Params:
        return Params(*(x.copy() for x in self._theta))

    def learn(self, t: Ints, kind: npt.NDArray[np.integer[Any]]) -> None:
        """Learn from events in their order; times (n,) int64 ns, kinds (n,). Stamps that run back count as ties."""
        t, kind = np.ascontiguousarray(t, np.int64), np.ascontiguousarray(kind, np.uint8)
        self.last = _learn_all(t, kind, self.lr, *self._fixed, *self._theta, *self._state, self.last, *self._work)


# --- simulation and goodness of fit -------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def _simulate(rng, start, end, mu, alpha, beta, t, kind):  # type: ignore[no-untyped-def]
    """Thinning (Ogata 1981): between events every excitation decays, so its present value and the day's highest baseline bound it."""
    K, D, _ = alpha.shape
    S, lam, n, now, span = np.zeros((K, D)), np.empty(D), 0, 0.0, (end - start) * NS
    top = 0.0
    for b in range(mu.shape[1]):
        top = max(top, mu[:, b].sum())
    while True:
        bound = top
        for k in range(K):
            for i in range(D):
                for j in range(D):
                    bound += alpha[k, i, j] * beta[k] * S[k, j]
        wait = rng.exponential() / bound
        now += wait
        if now >= span or n == len(t):
            return n
        for k in range(K):
            S[k] *= exp(-beta[k] * wait)
        stamp = start + np.int64(now / NS)
        b = stamp % DAY_NS // (DAY_NS // mu.shape[1])
        for i in range(D):
            lam[i] = mu[i, b]
            for k in range(K):
                for j in range(D):
                    lam[i] += alpha[k, i, j] * beta[k] * S[k, j]
        u = rng.random() * bound
        for i in range(D):
            u -= lam[i]
            if u < 0.0:
                t[n], kind[n] = stamp, i
                n += 1
                S[:, i] += 1.0
                break


def simulate(params: Params, seconds: float, seed: int, start: int = 0, max_events: int = 10_000_000) -> tuple[Ints, npt.NDArray[np.uint8]]:
    """Times (n,) int64 ns and kinds (n,) of a path from an empty history at `start` ns. Stops at `seconds` or `max_events`."""
    t, kind = np.empty(max_events, np.int64), np.empty(max_events, np.uint8)
    n = _simulate(np.random.default_rng(seed), start, start + int(seconds / NS), *params, t, kind)
    return t[:n].copy(), kind[:n].copy()


@njit(cache=True, nogil=True)
def _compensators(t, kind, windows, start, mu, alpha, beta, out):  # type: ignore[no-untyped-def]
    """out[n]: the integral of lambda_{c_n} since the previous event of that type in its window (or since the window opened)."""
    K, D, _ = alpha.shape
    B = mu.shape[1]
    width = DAY_NS // B
    S, pending, since = np.zeros((K, D)), np.zeros(D), np.zeros(D)
    for w in range(len(windows)):
        lo, first, hi = windows[w]
        S[:], pending[:], since[:] = 0.0, 0.0, 0.0
        last = start if w == 0 else t[lo]
        for n in range(lo, hi):
            if t[n] > last:
                d = (t[n] - last) * NS
                for j in range(D):
                    for k in range(K):
                        S[k, j] += pending[j]
                    pending[j] = 0.0
                for k in range(K):
                    e = exp(-beta[k] * d)
                    for i in range(D):
                        for j in range(D):
                            since[i] += alpha[k, i, j] * S[k, j] * (1.0 - e)
                    S[k] *= e
                while last < t[n]:
                    stop = min(t[n], (last // width + 1) * width)
                    for i in range(D):
                        since[i] += mu[i, last // width % B] * (stop - last) * NS
                    last = stop
            if n >= first:
                out[n] = since[kind[n]]
                since[kind[n]] = 0.0
            pending[kind[n]] += 1.0


def residuals(
    params: Params, t: Ints, kind: npt.NDArray[np.integer[Any]], gap_s: float = np.inf, start: int | None = None
) -> list[Floats]:
    """Per type the rescaled waiting times, independent Exp(1) where the model is right (Ogata 1988; Daley, Vere-Jones 2003, Thm 7.4.I)."""
    t, kind = np.ascontiguousarray(t, np.int64), np.ascontiguousarray(kind, np.uint8)
    seen = observe(t, kind, len(params.mu), params.mu.shape[1], gap_s, start)
    out = np.full(len(t), np.nan)
    _compensators(t, kind, seen.windows, t[0] if start is None else start, *params, out)
    return [out[(kind == i) & ~np.isnan(out)] for i in range(len(params.mu))]


class Goodness(NamedTuple):
    """How far one type's residuals are from independent Exp(1)."""

    events: int
    ks: float  # Kolmogorov-Smirnov distance
    ks_p: float
    ljung_box: float  # of the residuals' autocorrelation over `lags`
    ljung_box_p: float
    qq: Floats  # (q, 2): quantile of Exp(1), of the residuals


def goodness(res: Floats, lags: int = 20, points: int = 99) -> Goodness | None:
    """KS, Ljung-Box (1978) and QQ data of one type's residuals; None with fewer than lags + 2 of them."""
    n = len(res)
    if n < lags + 2:
        return None
    ks = stats.kstest(res, "expon")
    x = res - res.mean()
    power = float(x @ x)
    rho = np.array([float(x[k:] @ x[:-k]) for k in range(1, lags + 1)]) / power if power > 0 else np.zeros(lags)
    box = n * (n + 2) * float((rho**2 / (n - np.arange(1, lags + 1))).sum())
    p = (np.arange(points) + 0.5) / points
    qq = np.stack([-np.log1p(-p), np.quantile(res, p)], 1)
    return Goodness(n, float(ks.statistic), float(ks.pvalue), box, float(stats.chi2.sf(box, lags)), qq)


# --- the ensemble member ------------------------------------------------------------------------------------------------------------


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
                last[r] = _advance(S[r], pending[r], last[r], t, kind, beta[r])
        if c < len(closes) and closes[c] == n:
            known[c] = r < len(rows) and rows[r] and last[r] >= 0
            if known[c]:
                _state_at(S[r], pending[r], last[r], t, beta[r], now)
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
            last = _advance(S, pending, last, t[n], kind[n], beta)
            n += 1
        known[c] = last >= 0 and not (g < len(holes) and holes[g] == n)
        if known[c]:
            _state_at(S, pending, last, at[c], beta, now)
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
    X, hot = np.column_stack([x, np.ones(m)]), np.eye(3)[y]
    weight, ridge = independent / m, ridge * F
    prior = np.log((hot.sum(0) * weight + 1.0) / (independent + 3.0))

    def loss(w: Floats) -> tuple[float, Floats]:
        W = w.reshape(3, F + 1)
        z = X @ W.T
        z -= z.max(1, keepdims=True)
        p = np.exp(z)
        total = p.sum(1)
        pull = W * np.array([ridge] * F + [1.0])
        pull[:, F] -= prior
        value = weight * float((np.log(total) - z[np.arange(m), y]).sum())
        value += 0.5 * ridge * float((W[:, :F] ** 2).sum()) + 0.5 * float(((W[:, F] - prior) ** 2).sum())
        return value, (weight * ((p / total[:, None] - hot).T @ X) + pull).ravel()

    first = np.column_stack([np.zeros((3, F)), prior])
    return optimize.minimize(loss, first.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x.reshape(3, F + 1)


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
    stream into blocks. Arrays by instrument I and horizon H: `mu` (I, D, B), `alpha` (I, K, D, D), `beta` (I, K), `count_S` (I, H, D, KD),
    `count_mu` (I, H, D, D), `usual` (I, D), `center`, `scale` (I, H, F), `coef` (I, H, 3, F + 1), `size` (I, H) ticks, `fitted` (I,),
    `report` (I, 4): events, nats per event over Poisson, spectral radius, converged.
    """

    name = "hawkes"

    def __init__(self, config: Config, ids: tuple[str, ...], arrays: dict[str, npt.NDArray[Any]]) -> None:
        self.config, self.ids, self.arrays = config, ids, arrays
        self.skipped: dict[str, str] = {}
        self._pairs = _pairs(config.types)
        self._seconds = np.array(HORIZONS_NS) * NS

    @classmethod
    def untrained(cls, ids: tuple[str, ...], config: Config | None = None) -> Self:
        """A member that abstains throughout."""
        config = config or Config()
        N, H, D, K = len(ids), len(HORIZONS_NS), len(config.types), config.decays
        F = len(_pairs(config.types)) * (2 + K) + 2
        shapes = {
            "mu": (N, D, config.bins), "alpha": (N, K, D, D), "beta": (N, K), "count_S": (N, H, D, K * D), "count_mu": (N, H, D, D),
            "usual": (N, D), "center": (N, H, F), "scale": (N, H, F), "coef": (N, H, 3, F + 1), "size": (N, H), "report": (N, 4),
        }  # fmt: skip
        z: dict[str, npt.NDArray[Any]] = {name: np.zeros(shape) for name, shape in shapes.items()} | {"fitted": np.zeros(N, np.bool_)}
        z["coef"][:], z["size"][:] = np.nan, np.nan
        for name in ("mu", "beta", "usual", "scale"):
            z[name][:] = 1.0
        return cls(config, ids, z)

    @staticmethod
    def gatherer(instruments: Sequence[Any], names: Sequence[str] = (), config: Config | None = None) -> Gatherer:
        """Learns from the stream itself: push every block of the training range, then hand it to :meth:`fit`."""
        return Gatherer(len(instruments), (config or Config()).types)

    @classmethod
    def fit(cls, study: Study, gathered: Gatherer, config: Config | None = None) -> Self:
        """Processes on the fit slice, direction maps on fit and calibration slices (labels purged by their known time).

        Needs of `study`: `instruments`, `split`, `usable`, `classes`, `fit_rows`, `calibration_rows` and the table's ts, instrument,
        move and known_at. Raises InputError where no instrument has events enough; single ones that have not are named in `skipped`
        and abstain.
        """
        config = config or Config(types=gathered.types)
        if config.types != gathered.types:
            raise InputError(f"hawkes: events were gathered as {gathered.types}, not as {config.types}: give both one configuration")
        me = cls.untrained(tuple(i.id for i in study.instruments), config)
        z = me.arrays
        for r, id_ in enumerate(me.ids):
            t, kind, holes = gathered.events(r, study.split.start, study.split.weigh)
            upto = int(np.searchsorted(t, study.split.calibrate))
            since = max(0, upto - config.max_events)
            try:
                fit = fit_process(t[since:upto], kind[since:upto], config, holes=holes[(holes > since) & (holes < upto)] - since)
            except InputError as e:
                me.skipped[id_] = str(e)
                continue
            params, maps = fit.params, [ahead(fit.params, s) for s in me._seconds]
            z["mu"][r], z["alpha"][r], z["beta"][r] = params
            z["count_S"][r], z["count_mu"][r] = [m.count_S for m in maps], [m.count_mu for m in maps]
            z["usual"][r] = fit.rate
            z["report"][r] = fit.events, fit.loglik - fit.poisson, params.radius, fit.converged
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
        return Params(*(self.arrays[name][instrument] for name in ("mu", "alpha", "beta")))

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
