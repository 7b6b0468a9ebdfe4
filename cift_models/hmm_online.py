"""Regimes that go on learning: online EM for a Gaussian hidden Markov model (Cappé 2011, "Online EM Algorithm for Hidden Markov Models").

Takes a fitted :class:`hmm_chain.Chain` and one second's scaled measures after the other; gives the causal filter and a chain that follows
the market. Each step moves the expected sufficient statistics by a step size, and the parameters to where these put them: no pass over the
past, no second look. States keep their index, hence their name, while what they emit drifts.
"""

from __future__ import annotations

from typing import Self

import numpy as np
from numba import njit

from cift_models.hmm_chain import CLIP, Chain, step
from cift_models.labels import F64

FLOOR = 1e-6  # least probability of a move


@njit(cache=True, nogil=True)
def learn(  # type: ignore[no-untyped-def]
    x, gamma, floor, moves, mean, var, alpha, first, pairs, held, sums, squares, back, work, old
):
    """One step of the recursions (sec. 3): filter x (D,), move the statistics by `gamma`, set `moves`, `mean` and `var`, in place.

    Returns log p(x | past). `pairs` (K, K, K), `held` (K, K), `sums`, `squares` (K, D, K): expected statistics of (i, j), i, (i, d) given
    that the newest state is the last index. `back` (K, K) P(state before = k | now b). A NaN measure is taken as its state expects it.
    """
    n, d_n = mean.shape
    for b in range(n):
        total = 0.0
        for k in range(n):
            back[k, b] = alpha[k] * moves[k, b]
            total += back[k, b]
        for k in range(n):
            back[k, b] = back[k, b] / total if total > 0 else alpha[k]
    score = step(x, moves, mean, 1 / var, np.log(2 * np.pi * var), alpha, first, work)
    if first:
        return score
    keep = 1 - gamma
    for i in range(n):
        for j in range(n):
            old[:] = pairs[i, j]
            for b in range(n):
                s = 0.0
                for k in range(n):
                    s += old[k] * back[k, b]
                pairs[i, j, b] = keep * s + (gamma * back[i, b] if j == b else 0.0)
        old[:] = held[i]
        for b in range(n):
            s = 0.0
            for k in range(n):
                s += old[k] * back[k, b]
            held[i, b] = keep * s + (gamma if i == b else 0.0)
        for d in range(d_n):
            v, w = x[d], x[d] * x[d]
            if v != v:
                v, w = mean[i, d], mean[i, d] ** 2 + var[i, d]
            for stat, add in ((sums, v), (squares, w)):
                old[:] = stat[i, d]
                for b in range(n):
                    s = 0.0
                    for k in range(n):
                        s += old[k] * back[k, b]
                    stat[i, d, b] = keep * s + (gamma * add if i == b else 0.0)
    for i in range(n):
        total = 0.0
        for j in range(n):
            s = 0.0
            for b in range(n):
                s += pairs[i, j, b] * alpha[b]
            moves[i, j] = max(s, 0.0) + 1e-300
            total += moves[i, j]
        for j in range(n):
            moves[i, j] = (moves[i, j] / total + FLOOR) / (1 + n * FLOOR)
        weight = 0.0
        for b in range(n):
            weight += held[i, b] * alpha[b]
        if not weight > 1e-8:
            continue  # a state that has not been seen for long stays as it was
        for d in range(d_n):
            s, w = 0.0, 0.0
            for b in range(n):
                s += sums[i, d, b] * alpha[b]
                w += squares[i, d, b] * alpha[b]
            mean[i, d] = s / weight
            var[i, d] = max(w / weight - mean[i, d] ** 2, floor)
    return score


class OnlineEM:
    """`step(x)` filters and learns. The fitted chain counts as `prior` seconds; step sizes fall as t ** -`power`, never below `least`.

    `power` in (0.5, 1]; with `least` > 0 the chain forgets, in about 1 / `least` seconds, and so follows a market that drifts. That must
    be long beside the time between two visits of a regime, or one visit is all that the chain knows of it. `floor`: least variance.
    The given chain is left as it is; :attr:`chain` is the learnt one.
    """

    def __init__(self, chain: Chain, prior: float = 3_000.0, power: float = 0.9, least: float = 0.0, floor: float = 0.1) -> None:
        if not (0.5 < power <= 1 and prior >= 1 and 0 <= least < 1 and floor > 0):
            raise ValueError(f"prior {prior} >= 1, power {power} in (0.5, 1], least {least} in [0, 1), floor {floor} > 0")
        k = len(chain.start)
        self.power, self.least, self.floor, self.start = power, least, floor, chain.start.copy()
        self._t, self._seen = prior, 0
        self.moves, self.mean, self.var = ((np.ascontiguousarray(a, np.float64)).copy() for a in (chain.moves, chain.mean, chain.var))
        share = np.linalg.matrix_power(self.moves, 1 << 12)[0]  # long-run share of each state
        self.alpha = self.start.copy()
        self._pairs = np.repeat((share[:, None] * self.moves)[:, :, None], k, axis=2)
        self._held = np.repeat(share[:, None], k, axis=1)
        self._sums = np.repeat((share[:, None] * self.mean)[:, :, None], k, axis=2)
        self._squares = np.repeat((share[:, None] * (self.mean**2 + self.var))[:, :, None], k, axis=2)
        self._back, self._work, self._old = np.empty((k, k)), np.empty((2, k)), np.empty(k)

    @property
    def chain(self) -> Chain:
        return Chain(self.start.copy(), self.moves.copy(), self.mean.copy(), self.var.copy())

    def step(self, x: F64) -> float:
        """log p(x | past) for the measures x (D,) of the next second, before they are learnt from; `alpha` (K,) is the filter."""
        x = np.clip(np.asarray(x, np.float64), -CLIP, CLIP)
        self._t += 1
        gamma = max(self._t**-self.power, self.least)
        score = learn(
            x, gamma, self.floor, self.moves, self.mean, self.var, self.alpha, self._seen == 0, self._pairs, self._held, self._sums,
            self._squares, self._back, self._work, self._old,
        )  # fmt: skip
        self._seen += 1
        return float(score)

    def run(self, x: F64) -> F64:
        """:meth:`step` over x (n, D): log densities (n,), each given the past alone."""
        return np.array([self.step(row) for row in x])

    def restart(self) -> Self:
        """The market has paused: the next second is a first one; what was learnt stays."""
        self.alpha[:], self._seen = self.start, 0
        return self
