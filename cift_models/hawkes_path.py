"""Along the path of a fitted Hawkes process: intensities now and ahead, the next event, online learning, simulation, goodness of fit.

Takes a :class:`hawkes_process.Params` and typed event times of one instrument; the state of the process is S (K, D) of its equation.
"""

from __future__ import annotations

from functools import lru_cache
from math import exp
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit
from scipy.linalg import expm

from cift_models.hawkes_process import DAY_NS, NS, Config, Floats, Ints, Params, observe


@njit(cache=True, nogil=True)
def decay_to(S, pending, last, t, kind, beta):  # type: ignore[no-untyped-def]
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
def state_at(S, pending, last, t, beta, out):  # type: ignore[no-untyped-def]
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
            state_at(S, pending, last, t[n], beta, now)
        b = t[n] % DAY_NS // (DAY_NS // mu.shape[1])
        for i in range(D):
            out[n, i] = mu[i, b]
            for k in range(K):
                for j in range(D):
                    out[n, i] += alpha[k, i, j] * beta[k] * now[k, j]
        last = decay_to(S, pending, last, t[n], kind[n], beta)


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
def _learn(t, kind, lr, low, high, cap, gap, ks, ds, mu, alpha, beta, S, R, pending, last, v, G):  # type: ignore[no-untyped-def]
    """One event: stochastic gradient of its log-likelihood in log mu, log alpha, log beta; -> the newest stamp. `ks`, `ds`: see `_pass`."""
    K, D = len(ks), len(ds)
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
def _learn_all(t, kind, lr, low, high, cap, gap, ks, ds, mu, alpha, beta, S, R, pending, last, v, G):  # type: ignore[no-untyped-def]
    for n in range(len(t)):
        last = _learn(t[n], kind[n], lr, low, high, cap, gap, ks, ds, mu, alpha, beta, S, R, pending, last, v, G)
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
        self._fixed = (*config.decay_range, config.max_radius, config.gap_s, (0,) * K, (0,) * D)
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
    from scipy import stats  # half a second, which serving does without

    ks = stats.kstest(res, "expon")
    x = res - res.mean()
    power = float(x @ x)
    rho = np.array([float(x[k:] @ x[:-k]) for k in range(1, lags + 1)]) / power if power > 0 else np.zeros(lags)
    box = n * (n + 2) * float((rho**2 / (n - np.arange(1, lags + 1))).sum())
    p = (np.arange(points) + 0.5) / points
    qq = np.stack([-np.log1p(-p), np.quantile(res, p)], 1)
    return Goodness(n, float(ks.statistic), float(ks.pvalue), box, float(stats.chi2.sf(box, lags)), qq)
