"""How much money a strategy bears: what its profit becomes when every trade is made larger and moves the market against itself.

The model is the square-root law of market impact: trading Q units costs Y sigma sqrt(Q / V) a unit, sigma and V being volatility and volume
over the same time (Torre 1997; Almgren, Thum, Hauptmann, Li 2005; Bouchaud, Bonart, Donier, Gould 2018, ch. 12), Y about 1. The fills of a
run bear the impact of their own size already; larger ones pay the difference.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from cift_strategies.performance import F

PREFACTOR: Final = 1.0  # Y
MULTIPLES: Final = np.unique(np.concatenate([np.linspace(0, 2, 41), np.geomspace(2, 1000, 120)]))


class Capacity(NamedTuple):
    """Net PnL (m,) at `multiples` (m,) of the size traded; the multiple that earns most, and that from which on nothing is earned.

    Both are NaN where nothing is earned at any size. `impact`: the cost of impact at the size traded, by the same law, in currency.
    """

    multiples: F
    net: F
    best: float
    zero: float
    impact: float


def capacity(net: float, size: F, money_per_tick: F, sigma: F, volume: F, prefactor: float = PREFACTOR) -> Capacity:
    """From a net PnL and the fills that made it.

    Of each fill (n,): `size` units, `money_per_tick` currency a tick and unit, and of its market over the time traded `sigma` (ticks) and
    `volume` (units). Fills whose market is not known (NaN, zero volume) have no impact.
    """
    ok = np.isfinite(sigma) & (volume > 0)
    # sum of x q (Y sigma sqrt(x q / V) - Y sigma sqrt(q / V)): the first is x^1.5 times the impact at the size traded
    impact = float(prefactor * np.sum(money_per_tick[ok] * sigma[ok] * size[ok] ** 1.5 / np.sqrt(volume[ok])))
    curve = MULTIPLES * net - impact * (MULTIPLES**1.5 - MULTIPLES)
    if impact <= 0 or net + impact <= 0:
        return Capacity(MULTIPLES, curve, float("nan"), float("nan"), impact)
    edge = (net + impact) / impact  # net(x) = x (net + impact) - impact x^1.5
    return Capacity(MULTIPLES, curve, float((edge * 2 / 3) ** 2), float(edge**2), impact)
