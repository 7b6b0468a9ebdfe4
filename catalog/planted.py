"""What is planted in the synthetic market: regimes, efficient prices, order flow, and what an oracle would make of them.

Takes a :class:`Plan` and a random generator; gives the hidden state of a session, the arrivals that :mod:`catalog.exchange`
matches, and the oracle's distribution of every move. Shares no code and no formula with any model.

Hidden state. A semi-Markov chain of five regimes (gamma dwell times) sets volatility, drift, activity and depth for all
instruments. Instrument 0 has the efficient price dU = (drift + alpha sigma x) dt + sigma dW, in ticks, where x is a unit
Ornstein-Uhlenbeck process with memory tau, driven by noise correlated with dW by -alpha sqrt(tau / 2), so that (drift apart)
returns do not predict returns: only those who see the flow learn x. Instrument i > 0 follows:
V_i(t) = beta U_0(t - lag_i) + sqrt(1 - beta^2) U_i(t).

Order flow. Immigrants of six types (take, add, cancel, on each side) are Poisson given the hidden state: informed takers lean to where the
price is expected to go; adders and cancellers lean less, and to a crowd's mood that knows nothing. Each arrival begets others
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
    alpha: float = 0.37  # expected return of x = 1, in sigma per s
    tau: float = 9.0  # s, memory of x
    beta: float = 0.6  # share of instrument 0 in the others
    lags: tuple[float, ...] = (0.0, 0.06, 0.24, 0.12, 0.40, 0.18, 0.30, 0.09)  # s behind instrument 0
    informed: float = 0.95  # share of takers who know x
    lean: float = 0.9  # the same for adders and cancellers, who follow the crowd as well
    crowd: float = 0.7  # weight of the crowd's mood, which knows nothing, beside x
    mood: float = 5.0  # s, memory of that mood
    picked: float = 0.25  # stale quotes that informed traders take before the maker withdraws them
    look: float = 70.0  # per s, how often a maker looks at the efficient price
    base: tuple[float, ...] = (0.6, 0.6, 2.8, 2.8, 2.0, 2.0)  # immigrants per s
    branching: tuple[tuple[float, ...], ...] = (  # mean children by type of one parent
        (0.35, 0.03, 0.25, 0.10, 0.02, 0.30),
        (0.03, 0.35, 0.10, 0.25, 0.30, 0.02),
        (0.03, 0.02, 0.20, 0.05, 0.25, 0.02),
        (0.02, 0.03, 0.05, 0.20, 0.02, 0.25),
        (0.01, 0.05, 0.15, 0.05, 0.25, 0.05),
        (0.05, 0.01, 0.05, 0.15, 0.05, 0.25),
    )
    follow: float = 0.12  # takers in each follower begot by one in instrument 0, same side
    delay: tuple[float, float] = (0.04, 1.1)  # s, median and log-sd of the delay to a child
    density: tuple[float, ...] = (37.5, 66.0, 66.0, 103.0, 148.0)  # records per s and instrument, measured; sets the length of a session
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
    """The hidden state of one session on the grid of GRID_S: regime (n,), x, own prices U, efficient prices V (I, n), ticks from the open.

    `switches` (k,) are the times in s at which the regime became `states` (k,).
    """

    switches: Floats
    states: NDArray[np.int8]
    regime: NDArray[np.int8]
    x: Floats
    own: Floats
    value: Floats


def hidden_state(rng: np.random.Generator, plan: Plan, instruments: int, mean_s: float, target: int) -> Hidden:
    """The hidden state of a session long enough for `target` records of all instruments together."""
    switches, states = regime_path(rng, plan, mean_s, 4 * mean_s + 1)
    n = int(4 * mean_s / GRID_S) + RATE_EVERY
    regime = states[np.searchsorted(switches, np.arange(n) * GRID_S, side="right") - 1]
    written = np.cumsum(np.array(plan.density)[regime]) * GRID_S * instruments
    n = (int(np.searchsorted(written, (2.0 if plan.null else 1.25) * target)) // RATE_EVERY + 1) * RATE_EVERY
    regime = regime[:n]
    sigma, drift = np.array(plan.sigma)[regime], np.array(plan.drift)[regime]
    rho = -plan.alpha * np.sqrt(plan.tau / 2)
    x, own, value = (np.empty((instruments, n)) for _ in range(3))
    for i in range(instruments):
        z = rng.standard_normal((2, n))
        x[i] = _ou(z[0], float(np.exp(-GRID_S / plan.tau)))
        dw = np.sqrt(GRID_S) * (rho * np.append(z[0, 1:], 0.0) + np.sqrt(1 - rho**2) * z[1])
        own[i] = np.append(0.0, np.cumsum((drift + plan.alpha * sigma * x[i]) * GRID_S + sigma * dw)[:-1])
        lag = round(plan.lags[i] / GRID_S)
        led = np.append(np.zeros(min(lag, n)), own[0, : n - lag])[:n]
        value[i] = own[0] if i == 0 else plan.beta * led + np.sqrt(1 - plan.beta**2) * own[i]
    return Hidden(switches, states, regime, x, own, value)


def expected_return(plan: Plan, hidden: Hidden, i: int) -> Floats:
    """What informed traders know of instrument i: its expected return in units that are of order 1 in every regime, (n,)."""
    drift, sigma = np.array(plan.drift)[hidden.regime], np.array(plan.sigma)[hidden.regime]
    x = hidden.x[0] if i == 0 else plan.beta * hidden.x[0] + np.sqrt(1 - plan.beta**2) * hidden.x[i]
    return x + drift / (plan.alpha * sigma)


def flow(rng: np.random.Generator, plan: Plan, hidden: Hidden) -> tuple[Floats, NDArray[np.int64], NDArray[np.int64]]:
    """Arrivals of all types and instruments in time order: times (m,) in s, kind (m,), instrument (m,)."""
    instruments, n = hidden.value.shape
    end, every = n * GRID_S, RATE_EVERY
    activity = np.array(plan.activity)[hidden.regime[::every]]
    sign = np.array([1, -1, 1, -1, -1, 1])
    share = np.array([plan.informed] * 2 + [plan.lean] * 4)
    times, kinds, whose = [], [], []
    for i in range(instruments):
        mood = _ou(rng.standard_normal(len(activity)), float(np.exp(-every * GRID_S / plan.mood)))
        known = np.zeros(len(activity)) if plan.null else expected_return(plan, hidden, i)[::every]
        felt = (known + plan.crowd * mood) / np.hypot(1.0, plan.crowd)
        leaning = np.tanh(np.stack([known] * 2 + [felt] * 4))
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


def outlook(rng: np.random.Generator, plan: Plan, mean_s: float) -> tuple[Floats, Floats]:
    """What the regime now says of the time ahead: steps u (k,) in s up to the last horizon, and integrals (3, 5, FUTURES, k).

    For each regime at 0, FUTURES courses of the regime chain, drawn from one path of about 2,000 switches, each with its integrals
    from 0 to u of drift, of sigma exp(-v / tau) and of sigma^2.
    """
    length = 2_000 * float(np.mean(plan.dwell)) * mean_s
    switches, states = regime_path(rng, plan, mean_s, length)
    u = np.linspace(0.0, HORIZONS_NS[-1] / 1e9, 241)
    start = rng.random(4_000) * (length - u[-1])
    now = states[np.searchsorted(switches, start, side="right") - 1]
    start = np.stack([rng.choice(start[now == r], FUTURES) for r in range(len(REGIMES))])
    path = states[np.searchsorted(switches, start[..., None] + u, side="right") - 1]
    sigma, drift = np.array(plan.sigma)[path], np.array(plan.drift)[path]
    values = np.stack([drift, sigma * np.exp(-u / plan.tau), sigma**2])
    areas = (values[..., 1:] + values[..., :-1]) / 2 * np.diff(u)
    return u, np.concatenate([np.zeros((*values.shape[:3], 1)), np.cumsum(areas, axis=3)], axis=3)


def forecast(
    plan: Plan, hidden: Hidden, chain: tuple[Floats, Floats], i: int, at: NDArray[np.int64], ahead: float
) -> tuple[Floats, Floats]:
    """Mean and variance (m, FUTURES), ticks, of V_i(t + ahead) - V_i(t) given a future and the hidden state at grid points `at` (m,).

    `chain` is what :func:`outlook` gave; `ahead` is in s. In closed form: the Ornstein-Uhlenbeck signal decays, noise and what x takes
    from it add up to sigma^2 per s, and of instrument 0 the last `lag` seconds are known already.
    """

    def own(j: int, h: float) -> tuple[Floats, Floats]:
        u, integrals = chain
        k = int(np.clip(np.searchsorted(u, h), 1, len(u) - 1))
        part = (h - u[k - 1]) / (u[k] - u[k - 1])
        drift, signal, variance = ((1 - part) * integrals[..., k - 1] + part * integrals[..., k])[:, hidden.regime[at]]
        return drift + plan.alpha * hidden.x[j, at, None] * signal, variance - (plan.alpha * signal) ** 2

    mean, variance = own(i, ahead)
    if i == 0:
        return mean, variance
    lag, gamma = plan.lags[i], np.sqrt(1 - plan.beta**2)
    back = round(lag / GRID_S)
    known = hidden.own[0, np.minimum(at, at - back + round(ahead / GRID_S))] - hidden.own[0, at - back]
    led, led_variance = own(0, max(ahead - lag, 0.0))
    return plan.beta * (known[:, None] + led) + gamma * mean, plan.beta**2 * led_variance + gamma**2 * variance
