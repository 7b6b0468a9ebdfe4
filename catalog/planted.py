"""What is planted in the synthetic market: regimes, efficient prices, order flow, and what an oracle would make of them.

Takes a :class:`Plan` and a random generator; gives the hidden state of a session, the arrivals that :mod:`catalog.exchange`
matches, and the oracle's distribution of every move. Shares no code and no formula with any model.

Hidden state. A semi-Markov chain of five regimes (gamma dwell times) sets volatility, drift, activity and depth for all
instruments. Instrument 0 has the efficient price dU = (drift + sigma sum_k alpha_k gain_k x_k) dt + sigma dW, in ticks, where the four
signals x_k are independent unit Ornstein-Uhlenbeck processes with memory tau_k, each driven by noise correlated with dW by
-alpha_k gain_k sqrt(tau_k / 2), so that (drift apart) returns do not predict returns: only those who see where a signal is told learn it.
gain_k is the regime's. Instrument i > 0 follows: V_i(t) = beta U_0(t - lag_i) + sqrt(1 - beta^2) U_i(t).

Where each signal is told: "flow" by takers, who are right in some regimes and a herd that is wrong in others; "book" by
adders and cancellers of one side alike, so that quotes flicker there and depth tells nothing; "news" by no order, only by alternative data
(:mod:`catalog.planted_altdata`); "echo" by the price itself `echo` seconds before, for some come back to a move after a fixed pause: its
noise at t + echo is correlated with dW at t by `heard`.

Order flow. Immigrants of six types (take, add, cancel, on each side) are Poisson given the hidden state: informed takers lean
to the flow's signal, adders and cancellers to the book's. Each arrival begets others
(branching matrix, log-normal delays, generation by generation: the cluster representation of Hawkes and Oakes 1974); takers in instrument 0
beget takers in the others after the lag.

The null market: the mid is a random walk of half ticks at Poisson times, independent of flow, sizes and regimes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from catalog.exchange import MAKER, STEP_UP

Floats = NDArray[np.float64]

REGIMES: Final = ("calm", "trending up", "trending down", "volatile", "crisis")
SIGNALS: Final = ("flow", "book", "news", "echo")
ECHO: Final = SIGNALS.index("echo")
FLOW: Final = ("buy", "sell", "add bid", "add ask", "cancel bid", "cancel ask")  # takers by their own side
HORIZONS_NS: Final = (500_000_000, 1_000_000_000, 5_000_000_000, 30_000_000_000)
FUTURES: Final = 32  # courses of the regime chain over which the oracle averages
UNSURE: Final = 0.01  # share of the oracle's probability spread evenly: trades empty a level for a moment, which its normal law ignores
GRID_S: Final = 0.005  # step of the hidden state
RATE_EVERY: Final = 10  # grid steps between new rates of immigrants


@dataclass(frozen=True, slots=True)
class Plan:
    """What is planted. Per-regime tuples are in the order of REGIMES, per-type ones in that of FLOW."""

    sigma: tuple[float, ...] = (0.50, 0.90, 0.90, 1.70, 2.80)  # ticks per sqrt(s)
    drift: tuple[float, ...] = (0.0, 0.10, -0.10, 0.0, 0.0)  # ticks per s
    activity: tuple[float, ...] = (0.65, 1.1, 1.1, 1.6, 2.4)  # times the base rates
    half: tuple[float, ...] = (0.30, 0.35, 0.35, 0.45, 1.00)  # ticks, makers quote at least this far from the efficient price
    stale: tuple[float, ...] = (0.05, 0.06, 0.06, 0.10, 0.30)  # ticks, and withdraw quotes nearer than this
    depth: tuple[int, ...] = (34, 28, 28, 20, 14)  # orders of a side
    dwell: tuple[float, ...] = (0.028, 0.018, 0.018, 0.018, 0.009)  # mean, share of a session
    switch: tuple[tuple[float, ...], ...] = (
        (0.0, 0.30, 0.30, 0.40, 0.0),
        (0.45, 0.0, 0.15, 0.40, 0.0),
        (0.45, 0.15, 0.0, 0.40, 0.0),
        (0.30, 0.175, 0.175, 0.0, 0.35),
        (0.20, 0.0, 0.20, 0.60, 0.0),
    )
    alpha: tuple[float, ...] = (0.24, 0.80, 0.17, 0.66)  # expected return of each of SIGNALS at 1, in sigma per s
    tau: tuple[float, ...] = (6.0, 0.6, 8.0, 1.1)  # s, memory of each
    gain: tuple[tuple[float, ...], ...] = (  # of each signal but the echo, which always counts 1, by regime
        (1.0, 1.0, 1.0, 0.0, -0.5),
        (1.0, 1.0, 1.0, 1.0, 1.0),
        (1.0, 1.0, 1.0, 1.0, 1.0),
    )
    echo: float = 12.0  # s from a move to its echo
    heard: float = 0.51  # correlation of the echo with that move
    beta: float = 0.6  # share of instrument 0 in the others
    lags: tuple[float, ...] = (0.0, 0.06, 0.24, 0.12, 0.40, 0.18, 0.30, 0.09)  # s behind instrument 0
    informed: float = 0.95  # share of takers who know the flow's signal
    lean: float = 1.0  # share of adders and cancellers who know the book's signal
    heed: float = 0.4  # weight of the flow's signal beside the book's, by which they add on its side and cancel on the other
    picked: float = 0.25  # stale quotes that informed traders take before the maker withdraws them
    look: float = 70.0  # per s, how often a maker looks at the efficient price
    base: tuple[float, ...] = (1.0, 1.0, 2.8, 2.8, 2.0, 2.0)  # immigrants per s
    branching: tuple[tuple[float, ...], ...] = (  # mean children by type of one parent
        (0.25, 0.03, 0.15, 0.05, 0.02, 0.20),
        (0.03, 0.25, 0.05, 0.15, 0.20, 0.02),
        (0.02, 0.01, 0.15, 0.03, 0.25, 0.02),
        (0.01, 0.02, 0.03, 0.15, 0.02, 0.25),
        (0.01, 0.03, 0.20, 0.03, 0.20, 0.03),
        (0.03, 0.01, 0.03, 0.20, 0.03, 0.20),
    )
    follow: float = 0.12  # takers in each follower begot by one in instrument 0, same side
    delay: tuple[float, float] = (0.04, 1.1)  # s, median and log-sd of the delay to a child
    density: tuple[float, ...] = (32.5, 57.5, 57.5, 90.5, 132.0)  # records per s and instrument, measured; sets the length of a session
    null: bool = False  # True: informed, lean and everything else that ties price to flow is off
    null_steps: float = 4.0  # half-tick moves per s of the null market

    def mean_density(self) -> float:
        """Records per s and instrument over the regimes' shares of the time."""
        values, vectors = np.linalg.eig(np.array(self.switch).T)
        visits = np.abs(vectors[:, np.argmax(values.real)].real)
        time = visits * np.array(self.dwell)
        return float(time @ np.array(self.density) / time.sum())


@njit(cache=True)
def _ou(noise: Floats, keep: float) -> Floats:
    """A stationary unit Ornstein-Uhlenbeck path (n,) from standard normals (n,), `keep` its autocorrelation of one step."""
    x = np.empty(len(noise))
    x[0] = noise[0]
    for n in range(1, len(noise)):
        x[n] = keep * x[n - 1] + np.sqrt(1 - keep * keep) * noise[n]
    return x


def regime_path(rng: np.random.Generator, plan: Plan, mean_s: float, length_s: float) -> tuple[Floats, NDArray[np.int8]]:
    """Semi-Markov switches: times (k,) in s from 0 and states (k,); `mean_s` is the session length to which `plan.dwell` refers."""
    times, states, t, state = [], [], 0.0, 0
    while t < length_s:
        times.append(t)
        states.append(state)
        t += rng.gamma(2.0, plan.dwell[state] * mean_s / 2.0)
        state = int(rng.choice(len(REGIMES), p=plan.switch[state]))
    return np.array(times), np.array(states, np.int8)


@dataclass(slots=True)
class Hidden:
    """The hidden state of one session on the grid of GRID_S, n points; prices in ticks from the open.

    `switches` (k,) are the times in s at which the regime became `states` (k,); `regime` (n,); `x` (S, I, n) of SIGNALS; `own` and
    `value` (I, n) prices U and V. `early` (I, n) is the echo `echo` seconds on; `sure` (I, n + lead) is the integral of what the price
    owes to it, in sigma: of alpha x dt and of dW as far as x drives that, known as far ahead as the echo is.
    """

    switches: Floats
    states: NDArray[np.int8]
    regime: NDArray[np.int8]
    x: Floats
    own: Floats
    value: Floats
    early: Floats
    sure: Floats


def strength(plan: Plan) -> Floats:
    """(S, 5): expected return of each signal at 1, in sigma per s, by regime."""
    return np.array(plan.alpha)[:, None] * np.array([*plan.gain, [1.0] * len(REGIMES)])


def rho(plan: Plan) -> Floats:
    """(S, 5): correlation of each signal's noise with the price's, by regime."""
    return -strength(plan) * np.sqrt(np.array(plan.tau) / 2)[:, None]


def hidden_state(rng: np.random.Generator, plan: Plan, instruments: int, mean_s: float, target: int) -> Hidden:
    """The hidden state of a session long enough for `target` records of all instruments together."""
    switches, states = regime_path(rng, plan, mean_s, 4 * mean_s + 1)
    n = int(4 * mean_s / GRID_S) + RATE_EVERY
    regime = states[np.searchsorted(switches, np.arange(n) * GRID_S, side="right") - 1]
    written = np.cumsum(np.array(plan.density)[regime]) * GRID_S * instruments
    n = (int(np.searchsorted(written, (2.0 if plan.null else 1.25) * target)) // RATE_EVERY + 1) * RATE_EVERY
    regime = regime[:n]
    sigma, drift = np.array(plan.sigma)[regime], np.array(plan.drift)[regime]
    lead, tied, count = round(plan.echo / GRID_S), rho(plan), len(SIGNALS)
    alpha = strength(plan)
    free = np.sqrt(1 - plan.heard**2 - (tied**2).sum(axis=0))[regime]
    x, sure = np.empty((count, instruments, n)), np.zeros((instruments, n + lead))
    early, own, value = (np.empty((instruments, n)) for _ in range(3))
    for i in range(instruments):
        step = free * np.sqrt(GRID_S) * rng.standard_normal(n)
        for k in range(count):
            z = rng.standard_normal(n + lead + 1)
            path = _ou(z[:-1], float(np.exp(-GRID_S / plan.tau[k])))
            x[k, i] = path[:n]
            if k == ECHO:
                early[i] = path[lead:]
                owed = plan.alpha[k] * GRID_S * path + np.sqrt(GRID_S) * tied[k, 0] * z[1:]
                sure[i, 1:] = np.cumsum(owed)[:-1]
                step += owed[:n] + np.sqrt(GRID_S) * plan.heard * z[lead + 1 :]
            else:
                step += alpha[k, regime] * GRID_S * x[k, i] + np.sqrt(GRID_S) * tied[k, regime] * z[1 : n + 1]
        own[i] = np.append(0.0, np.cumsum(drift * GRID_S + sigma * step)[:-1])
        lag = round(plan.lags[i] / GRID_S)
        led = np.append(np.zeros(min(lag, n)), own[0, : n - lag])[:n]
        value[i] = own[0] if i == 0 else plan.beta * led + np.sqrt(1 - plan.beta**2) * own[i]
    return Hidden(switches, states, regime, x, own, value, early, sure)


def shared(plan: Plan, of: Floats, i: int) -> Floats:
    """What of a signal (I, n) concerns instrument i: its own and the leader's, (n,) of deviation 1."""
    return of[0] if i == 0 else plan.beta * of[0] + np.sqrt(1 - plan.beta**2) * of[i]


def flow(rng: np.random.Generator, plan: Plan, hidden: Hidden) -> tuple[Floats, NDArray[np.int64], NDArray[np.int64]]:
    """Arrivals of all types and instruments in time order: times (m,) in s, kind (m,), instrument (m,)."""
    instruments, n = hidden.value.shape
    end, every = n * GRID_S, RATE_EVERY
    activity = np.array(plan.activity)[hidden.regime[::every]]
    sign = np.array([1, -1, 1, -1, 1, -1])
    share = np.array([plan.informed] * 2 + [plan.lean] * 4)
    times, kinds, whose = [], [], []
    for i in range(instruments):
        known, seen = (shared(plan, of, i)[::every] for of in hidden.x[:2])
        if plan.null:
            known, seen = np.zeros((2, len(activity)))
        leaning = np.tanh(np.stack([known] * 2 + [seen + plan.heed * known] * 2 + [seen - plan.heed * known] * 2))
        rate = np.array(plan.base)[:, None] * activity * (1 + (sign * share)[:, None] * leaning)
        counts = rng.poisson(rate * every * GRID_S)
        kind, cell = np.nonzero(counts)
        repeat = counts[kind, cell]
        kind, cell = np.repeat(kind, repeat), np.repeat(cell, repeat)
        times.append((cell + rng.random(len(cell))) * every * GRID_S)
        kinds.append(kind)
        whose.append(np.full(len(cell), i))
    t, k, w = np.concatenate(times), np.concatenate(kinds), np.concatenate(whose)
    out = [(t, k, w)]
    mean, (median, spread) = np.array(plan.branching), plan.delay
    while len(t):
        children = rng.poisson(mean[k])
        parent, kind = np.nonzero(children)
        repeat = children[parent, kind]
        parent, kind = np.repeat(parent, repeat), np.repeat(kind, repeat)
        born, of, child = t[parent], w[parent], kind
        leaders = np.flatnonzero((w == 0) & (k <= 1))
        for i in range(1, instruments):
            told = leaders[rng.random(len(leaders)) < plan.follow]
            born = np.append(born, t[told] + plan.lags[i])
            of, child = np.append(of, np.full(len(told), i)), np.append(child, k[told])
        t = born + median * np.exp(spread * rng.standard_normal(len(born)))
        t, k, w = t[t < end], child[t < end], of[t < end]
        out.append((t, k, w))
    for i in range(instruments):
        looks = rng.poisson((plan.null_steps if plan.null else plan.look) * end)
        kind = STEP_UP + (rng.random(looks) < 0.5) if plan.null else np.full(looks, MAKER)
        out.append((rng.random(looks) * end, kind, np.full(looks, i)))
    t, k, w = (np.concatenate(parts) for parts in zip(*out))
    order = np.argsort(t, kind="stable")
    return t[order], k[order], w[order]


def thresholds(plan: Plan, regime: NDArray[np.int8], spread: NDArray[np.int64], band: float) -> tuple[Floats, Floats]:
    """How far above the mid, ticks, the efficient price takes the mid up by more than `band`, and how much lower it lets it back, (m,).

    Follows the makers' rule from the present `spread` (m,): the mid steps up half a tick when the ask is stale or the bid can be
    improved, whichever comes first. A spread so wide that both sides can be improved closes by two ticks at once: the mid stays.
    Down is the mirror.
    """
    half, stale = np.array(plan.half)[regime], np.array(plan.stale)[regime]

    def step(s: Floats) -> tuple[Floats, Floats]:
        ask_goes, bid_comes = s / 2 - stale, 1 + half - s / 2
        return np.minimum(ask_goes, bid_comes), np.where(ask_goes <= bid_comes, s + 1, s - 1)

    widest = 2 + 2 * half
    s = np.where(spread > widest, spread - 2 * np.ceil((spread - widest) / 2), spread)
    for _ in range(int(2 * band)):
        s = step(s)[1]
    forth, after = step(s)
    return int(2 * band) / 2 + forth, forth + step(after)[0] - 0.5


@njit(cache=True)
def _beyond(entry: float, width: float, sd: float) -> float:
    """P that a switch is on after a Brownian path of deviation `sd`; it goes on `entry` above the start and off `width` below that.

    Passages back and forth add up to one passage of the total distance, so P = 2 sum_k (-1)^k P(N > (entry + k width) / sd), by the
    reflection principle; for a narrow switch its limit, P(N > (entry - width / 2) / sd).
    """
    if width < 0.2 * sd:
        return 0.5 * math.erfc((entry - width / 2) / (sd * math.sqrt(2.0)))
    at, sign, total = entry if entry >= 0 else width - entry, 1.0, 0.0
    while at < 6 * sd:
        total += sign * math.erfc(at / (sd * math.sqrt(2.0)))
        at, sign = at + width, -sign
    return total if entry >= 0 else 1 - total


@njit(cache=True)
def class_probability(mean: Floats, variance: Floats, entry: Floats, width: Floats) -> Floats:
    """P(down, flat, up) (n, 3) of the mid given each of k futures of the efficient price, whose `mean` is measured from the mid (n, k).

    `entry` and `width` (n,) are what :func:`thresholds` gave, ticks; UNSURE is mixed in.
    """
    p = np.zeros((len(mean), 3))
    k = mean.shape[1]
    for n in range(len(mean)):
        for f in range(k):
            sd = math.sqrt(variance[n, f])
            p[n, 0] += _beyond(entry[n] + mean[n, f], width[n], sd) / k
            p[n, 2] += _beyond(entry[n] - mean[n, f], width[n], sd) / k
        sure = max(1.0, p[n, 0] + p[n, 2])
        p[n, 0], p[n, 2] = p[n, 0] / sure, p[n, 2] / sure
        p[n, 1] = 1.0 - p[n, 0] - p[n, 2]
    return (1 - UNSURE) * p + UNSURE / 3


def outlook(rng: np.random.Generator, plan: Plan, mean_s: float) -> tuple[Floats, NDArray[np.int8]]:
    """What the regime now says of the time ahead: steps u (k,) in s up to the last horizon, and regimes (5, FUTURES, k) there.

    For each regime at 0, FUTURES courses of the regime chain, drawn from one path of about 2,000 switches.
    """
    length = 2_000 * float(np.mean(plan.dwell)) * mean_s
    switches, states = regime_path(rng, plan, mean_s, length)
    u = np.linspace(0.0, HORIZONS_NS[-1] / 1e9, 241)
    start = rng.random(4_000) * (length - u[-1])
    now = states[np.searchsorted(switches, start, side="right") - 1]
    start = np.stack([rng.choice(start[now == r], FUTURES) for r in range(len(REGIMES))])
    return u, states[np.searchsorted(switches, start[..., None] + u, side="right") - 1]


def forecast(
    plan: Plan, hidden: Hidden, chain: tuple[Floats, NDArray[np.int8]], i: int, at: NDArray[np.int64], ahead: float
) -> tuple[Floats, Floats]:
    """Mean and variance (m, FUTURES), ticks, of V_i(t + ahead) - V_i(t) given a future and the hidden state at grid points `at` (m,).

    `chain` is what :func:`outlook` gave; `ahead` is in s. In closed form: the Ornstein-Uhlenbeck signals decay, noise and what they take
    from it add up to sigma^2 per s; of the echo the next `echo` seconds are known, and of instrument 0 the last `lag`.
    """
    regime, tied = hidden.regime[at], rho(plan)

    def own(j: int, h: float) -> tuple[Floats, Floats]:
        if h <= 0:
            return np.zeros((len(at), 1)), np.zeros((len(at), 1))
        u, path = chain
        edges = np.unique(np.concatenate([u[u < h], [h], [plan.echo] * (plan.echo < h)]))
        step, middle = np.diff(edges), (edges[1:] + edges[:-1]) / 2
        path = path[..., np.searchsorted(u, middle, side="right") - 1]
        sigma = np.array(plan.sigma)[path]
        mean = (np.array(plan.drift)[path] @ step)[regime]
        variance = (sigma**2 @ step)[regime]
        for k in range(len(SIGNALS) - 1):
            tells = plan.alpha[k] * ((np.array(plan.gain[k])[path] * sigma) @ (step * np.exp(-middle / plan.tau[k])))[regime]
            mean, variance = mean + hidden.x[k, j, at, None] * tells, variance - tells**2
        soon = middle < plan.echo
        later = np.where(soon, 0.0, step * np.exp(-np.maximum(middle - plan.echo, 0.0) / plan.tau[ECHO]))
        mean = mean + hidden.early[j, at, None] * plan.alpha[ECHO] * (sigma @ later)[regime]
        told = np.diff(hidden.sure[j][at[:, None] + np.rint(np.minimum(edges, plan.echo) / GRID_S).astype(np.int64)], axis=1)
        for r in range(len(REGIMES)):
            mine = regime == r
            mean[mine] += told[mine] @ sigma[r].T
        return mean, variance + heard(u, chain[1], h)[regime]

    def heard(u: Floats, path: NDArray[np.int8], h: float) -> Floats:
        """(5, FUTURES): what the echo's noise from t + echo on adds to the variance, beyond the sigma^2 per s that it is part of."""
        step = u[1]
        cells = min(len(u) - 1, max(1, round(h / step)))
        step, lead = h / cells, round(plan.echo / (h / cells))
        sigma = np.array(plan.sigma)[path[..., :cells]]
        keep, pull = np.exp(-step / plan.tau[ECHO]), plan.alpha[ECHO] * np.sqrt(2 / plan.tau[ECHO])
        owed, later = np.zeros(sigma.shape), np.zeros(sigma.shape[:2])
        for c in range(cells - 1, -1, -1):  # of noise in cell c: what follows up to h
            later = later * keep + sigma[..., c] * step
            owed[..., c] = tied[ECHO, 0] * sigma[..., c] + pull * (later - sigma[..., c] * step / 2)
        weight = np.zeros((*sigma.shape[:2], cells + lead))
        weight[..., lead:] += plan.heard * sigma
        weight[..., lead:cells] += owed[..., lead:]
        return (weight**2).sum(axis=2) * step - (plan.heard**2 + tied[ECHO, 0] ** 2) * (sigma**2).sum(axis=2) * step

    mean, variance = own(i, ahead)
    if i == 0:
        return mean, variance
    lag, gamma = plan.lags[i], np.sqrt(1 - plan.beta**2)
    back = round(lag / GRID_S)
    known = hidden.own[0, np.minimum(at, at - back + round(ahead / GRID_S))] - hidden.own[0, at - back]
    led, led_variance = own(0, max(ahead - lag, 0.0))
    return plan.beta * (known[:, None] + led) + gamma * mean, plan.beta**2 * led_variance + gamma**2 * variance
