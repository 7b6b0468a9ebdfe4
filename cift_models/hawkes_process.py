"""Hawkes processes of typed event times: parameters, exact likelihood with its gradient, and maximum-likelihood fit.

The model, for target type i of D at time t, with K decays shared by all pairs (Hawkes 1971; Bacry, Mastromatteo, Muzy 2015):

    lambda_i(t) = mu_i(time of day) + sum_kj alpha_kij beta_k S_kj(t),    S_kj(t) = sum_{t_n < t, c_n = j} exp(-beta_k (t - t_n))

alpha_kij is the expected number of type-i children that a type-j event has through decay k; the branching matrix is G = sum_k alpha_k,
and the process is stationary where its spectral radius is below 1 (Bremaud, Massoulie 1996). Simultaneous events do not excite one
another: each sees the left limit t-. So the likelihood does not depend on the order within a stamp and stays bounded where decays grow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, log
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit
from pydantic import BaseModel, ConfigDict, Field, field_validator

from catalog.errors import InputError
from catalog.events import ADD, CANCEL, TRADE

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

    types: tuple[str, ...] = ("buy", "sell", "cancel_ask", "cancel_bid", "add_bid", "add_ask")
    decays: int = Field(default=3, ge=1, le=8)  # K: 1 is the exponential kernel, more a sum of exponentials
    decay_range: tuple[float, float] = (0.02, 10_000.0)
    memories: tuple[float, ...] = (2.0,)  # 1/s: the direction map looks at recent events at these decays too, whatever the process's are
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

    @field_validator("memories")
    @classmethod
    def _positive(cls, v: tuple[float, ...]) -> tuple[float, ...]:
        if not all(b > 0 for b in v) or len(v) > 4:
            raise ValueError("memories must be positive decays, four at most")
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


@njit(cache=True, nogil=True)
def _pass(ks, ds, dt, kind, bin_, windows, tail, mu, alpha, beta, g_mu, g_alpha, g_beta):  # type: ignore[no-untyped-def]
    """Value without the baseline's compensator; gradients added in place. `ks`, `ds`: tuples as long as there are decays and types."""
    K, D = len(ks), len(ds)  # known when compiled: the inner loops unroll, 2 times the speed
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


def loglik(params: Params, seen: Observed) -> tuple[float, Params]:
    """Exact log-likelihood sum_n log lambda_{c_n}(t_n-) - sum_i int lambda_i and its gradient in mu, alpha and beta, in O(n).

    Daley, Vere-Jones 2003, Prop. 7.2.III; the recursion of S is Ogata 1981's, its derivative in beta is carried beside it.
    """
    K, D, _ = params.alpha.shape
    g = Params(np.zeros_like(params.mu), np.zeros((K, D, D)), np.zeros(K))
    value = _pass((0,) * K, (0,) * D, seen.dt, seen.kind, seen.bin, seen.windows, seen.tail, *params, *g)
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
        mend = "take a longer range" if len(t) else "quotes alone hold none, take trades or an order book"
        raise InputError(f"hawkes: {what}: {mend}")
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
    from scipy import optimize  # serving does without

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
