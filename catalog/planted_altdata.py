"""Alternative data of the synthetic market: four features tell, late and through noise, what is behind the market; 23 tell nothing.

Takes the hidden state of a session (:mod:`catalog.planted`), which is there without them, so that they change no event of the market;
gives rows of :mod:`catalog.altdata`. News are told by no order. What they tell of moves the efficient price or its volatility from the time
it is about on; a delay that outlasts the memory of what is told leaves nothing to learn. In the null market the hidden state moves no
price: nothing can be learnt.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple
from zoneinfo import ZoneInfo

import numpy as np
from numpy.typing import NDArray

from catalog.altdata import ALL, FEATURES, INDEX
from catalog.planted import GRID_S, RATE_EVERY, SIGNALS, Floats, Hidden, Plan, shared

Row = tuple[str, str, float, int, int]
S: Final = 1_000_000_000
NEW_YORK: Final = ZoneInfo("America/New_York")


class Told(NamedTuple):
    """One informative feature: what it tells of, how well, how often, how late; both in seconds."""

    of: str
    weight: float  # of it beside noise: the value follows weight x it + sqrt(1 - weight^2) x a standard normal
    every_s: float
    delay_s: float  # median; log-normal with a log-deviation of 0.3
    value: Callable[[Floats], Floats]  # of a standard score to the feature's unit


PLANTED: Final = {
    "social_sentiment": Told("news", 0.95, 1.0, 0.3, lambda z: np.tanh(z / 2)),
    "social_volume": Told("volatility", 0.7, 3.0, 0.5, lambda z: np.round(40 * np.exp(0.5 * z))),
    "atm_iv": Told("volatility", 0.8, 5.0, 1.0, lambda z: 0.30 * np.exp(0.15 * z)),
    "skew_25d": Told("trend", 0.9, 5.0, 1.0, lambda z: 0.05 - 0.02 * z),
}
_WINDOW, _CHAIN_S, _NEWS_S = 300 * S, 10.0, 90.0
_DAILY: Final[dict[str, Callable[[float], float]]] = {  # about the close of the day before, for all or for each
    "put_call_volume": lambda n: 0.8 * np.exp(0.2 * n), "put_call_open_interest": lambda n: 0.9 * np.exp(0.1 * n),
    "unusual_volume": lambda n: np.exp(0.3 * n), "days_to_earnings": lambda n: float(round(45 + 20 * np.tanh(n))),
    "earnings_surprise": lambda n: 0.05 * n, "vix": lambda n: 18 * np.exp(0.1 * n), "vix_change": lambda n: 0.8 * n,
    "us10y_change": lambda n: 0.05 * n, "yield_slope": lambda n: 0.4 + 0.1 * n, "dollar_change": lambda n: 0.004 * n,
    "sector_return": lambda n: 0.01 * n,
}  # fmt: skip
_CHAIN: Final = {"net_gamma_exposure": (0.0, 5e7), "iv_term_slope": (0.01, 0.01), "iv_rank": (0.5, 0.15)}
_WINDOWS: Final[dict[str, Callable[[Floats], Floats]]] = {
    "dark_pool_share": lambda n: 0.4 + 0.08 * np.tanh(n), "dark_pool_net_side": np.tanh,
    "block_count": lambda n: np.round(3 * np.exp(0.5 * n)), "block_imbalance": np.tanh,
    "large_order_imbalance": np.tanh, "sweep_count": lambda n: np.round(8 * np.exp(0.4 * n)),
}  # fmt: skip


def _latent(plan: Plan, hidden: Hidden, i: int) -> dict[str, Floats]:
    """What can be told of instrument i, on the grid of RATE_EVERY hidden steps, each of deviation 1 or so."""
    regime = hidden.regime[::RATE_EVERY]
    sigma, drift = np.log(plan.sigma), np.array(plan.drift)
    scale = max(float(np.abs(drift).max()), 1e-9)
    return {
        "news": shared(plan, hidden.x[SIGNALS.index("news")], i)[::RATE_EVERY],
        "volatility": ((sigma - sigma.mean()) / (sigma.std() or 1.0))[regime],
        "trend": (drift / scale)[regime],
    }


def rows(
    rng: np.random.Generator, plan: Plan, hidden: Hidden, symbols: tuple[str, ...], day: dt.date, start: int, end: int
) -> Iterator[Row]:
    """The rows of one session: `start` is the stamp (ns UTC) of the hidden state's first grid point; none is about a time after `end`."""
    step, length = GRID_S * RATE_EVERY, (end - start) / 1e9
    for i, symbol in enumerate(symbols):
        latent = _latent(plan, hidden, i)
        for name, told in PLANTED.items():
            t = _arrivals(rng, told.every_s, length)
            z = told.weight * latent[told.of][(t / step).astype(np.int64)]
            z = z + np.sqrt(1 - told.weight**2) * rng.standard_normal(len(t))
            late = told.delay_s * np.exp(0.3 * rng.standard_normal(len(t)))
            yield from _stamped(symbol, name, told.value(z), start + _ns(t), late)
        for name, (mean, sd) in _CHAIN.items():
            t = _arrivals(rng, _CHAIN_S, length)
            yield from _stamped(symbol, name, mean + sd * _noise(rng, len(t), 0.97), start + _ns(t), np.full(len(t), 1.5))
        t = _arrivals(rng, _NEWS_S, length)
        for name, values in {
            "news_count": np.round(6 + 3 * np.tanh(_noise(rng, len(t), 0.9))),
            "news_sentiment": np.tanh(_noise(rng, len(t), 0.8)),
            "news_novelty": rng.random(len(t)),
        }.items():
            yield from _stamped(symbol, name, values, start + _ns(t), np.full(len(t), FEATURES[INDEX[name]].delay_s))
        ends = np.arange(start // _WINDOW + 1, end // _WINDOW + 1) * _WINDOW
        for name, shape in _WINDOWS.items():
            yield from _stamped(symbol, name, shape(rng.standard_normal(len(ends))), ends, np.zeros(len(ends)))
    before = day - dt.timedelta(3 if day.weekday() == 0 else 1)
    close = int(dt.datetime.combine(before, dt.time(16), NEW_YORK).timestamp()) * S
    for name, of in _DAILY.items():
        known = close + int(FEATURES[INDEX[name]].delay_s) * S
        for who in (ALL,) if FEATURES[INDEX[name]].group == "macro" and name != "sector_return" else symbols:
            yield who, name, float(of(rng.standard_normal())), close, known


def _arrivals(rng: np.random.Generator, every_s: float, length_s: float) -> Floats:
    t = np.cumsum(rng.gamma(4.0, every_s / 4.0, int(1.5 * length_s / every_s) + 20))
    return t[t < length_s]


def _noise(rng: np.random.Generator, n: int, keep: float) -> Floats:
    out = rng.standard_normal(n)
    for k in range(1, n):
        out[k] = keep * out[k - 1] + np.sqrt(1 - keep**2) * out[k]
    return out


def _ns(t: Floats) -> NDArray[np.int64]:
    return np.rint(t * 1e9).astype(np.int64)


def _stamped(symbol: str, name: str, values: NDArray[Any], event: NDArray[np.int64], late_s: Floats) -> Iterator[Row]:
    values = np.clip(values, FEATURES[INDEX[name]].low, FEATURES[INDEX[name]].high)
    known = event + _ns(late_s)
    return ((symbol, name, float(v), int(e), int(k)) for v, e, k in zip(values, event, known))
