"""Hawkes speed beside yardsticks in the same run: likelihood with gradient, one online step, the member's pass over a stream."""

from __future__ import annotations

from math import exp, log

import numpy as np
import pytest
from numba import njit
from timing import best

from catalog.events import CANCEL, EVENT, SCALE, TRADE
from cift_models.hawkes import Gatherer, Hawkes, _classify_all, _codes
from cift_models.hawkes_path import Online
from cift_models.hawkes_process import Params, loglik, observe
from cift_models.windows import HORIZONS_NS, Block, closes, new_batches

EVENTS = 1_000_000
SIZES = [(3, 1), (3, 2), (3, 3), (4, 3), (6, 3)]  # types, decays


@njit
def plain(dt, kind, mu, alpha, beta, g_mu, g_alpha):
    """The recursion as published codes have it: value and gradient in mu and alpha, decays fixed."""
    K, D, _ = alpha.shape
    S, value = np.zeros((K, D)), 0.0
    for n in range(len(dt)):
        for k in range(K):
            e = exp(-beta[k] * dt[n])
            for j in range(D):
                S[k, j] *= e
        i = kind[n]
        lam = mu[i]
        for k in range(K):
            for j in range(D):
                lam += alpha[k, i, j] * beta[k] * S[k, j]
        value += log(lam)
        g_mu[i] += 1 / lam
        for k in range(K):
            for j in range(D):
                g_alpha[k, i, j] += beta[k] * S[k, j] / lam
            S[k, i] += 1.0
    return value


def stream(types: int, decays: int) -> tuple[np.ndarray, np.ndarray, Params]:
    rng = np.random.default_rng(0)
    t = np.cumsum(rng.exponential(0.01, EVENTS) / 1e-9).astype(np.int64)
    alpha = rng.uniform(0, 1 / (decays * types), (decays, types, types))
    return t, rng.integers(0, types, EVENTS).astype(np.uint8), Params(np.full((types, 24), 5.0), alpha, np.geomspace(1, 500, decays))


@pytest.mark.parametrize(("types", "decays"), SIZES)
def test_likelihood_with_learned_decays_keeps_up_with_a_plain_recursion_with_fixed_ones(benchmark, types: int, decays: int) -> None:
    t, kind, p = stream(types, decays)
    seen = observe(t, kind, types, 24)
    yardstick, ours = best(
        lambda: plain(seen.dt, kind, p.mu[:, 0], p.alpha, p.beta, np.zeros(types), np.zeros_like(p.alpha)),
        lambda: loglik(p, seen), times=7,
    )  # fmt: skip
    benchmark.pedantic(loglik, (p, seen), rounds=3)
    benchmark.extra_info |= {"million events/s": EVENTS / ours / 1e6, "plain": EVENTS / yardstick / 1e6, "ratio": yardstick / ours}
    assert yardstick / ours > 0.8


@pytest.mark.parametrize(("types", "decays"), SIZES)
def test_an_online_step_costs_less_than_ten_likelihood_events(benchmark, types: int, decays: int) -> None:
    t, kind, p = stream(types, decays)
    seen = observe(t, kind, types, 24)
    online = Online(p)
    ours, yardstick = best(lambda: online.learn(t, kind), lambda: loglik(p, seen), times=3)
    benchmark.pedantic(online.learn, (t, kind), rounds=3)
    benchmark.extra_info |= {"ns a step": ours / EVENTS * 1e9, "ratio": ours / yardstick}
    assert ours / yardstick < 10


def test_a_decision_at_every_third_event_costs_a_bounded_multiple_of_classifying_them(benchmark) -> None:
    t, kind, p = stream(3, 3)
    e = np.zeros(EVENTS, EVENT)
    e["ts_init"], e["ts_event"], e["size"] = t, t + np.arange(EVENTS), SCALE
    e["action"], e["side"] = np.where(kind == 2, CANCEL, TRADE), np.where(kind == 0, 1, -1)
    block = Block(e, np.zeros((EVENTS, 1)), closes(new_batches(1), e))
    member = Hawkes.untrained(("X",))
    member.arrays["mu"][:], member.arrays["alpha"][:], member.arrays["beta"][:] = 5.0, p.alpha, p.beta
    member.arrays["usual"][:], member.arrays["count_mu"][:], member.arrays["coef"][:], member.arrays["fitted"][:] = 30.0, 1.0, 0.1, True
    out, codes = np.empty(EVENTS, np.int8), _codes(member.config.types)
    yardstick, ours = best(
        lambda: _classify_all(e, codes, np.zeros((1, 3), np.int64), out), lambda: member.predict(block, member.new_state()), times=3
    )
    benchmark.pedantic(lambda: member.predict(block, member.new_state()), rounds=3)
    benchmark.extra_info |= {
        "million events/s": EVENTS / ours / 1e6, "decisions": len(block.closes), "horizons": len(HORIZONS_NS), "ratio": ours / yardstick,
    }  # fmt: skip
    assert ours / yardstick < 150


def test_gathering_loses_nothing_of_a_million_events(benchmark) -> None:
    t, kind, _ = stream(3, 1)
    e = np.zeros(EVENTS, EVENT)
    e["ts_init"], e["ts_event"], e["size"], e["action"] = t, t + np.arange(EVENTS), SCALE, np.where(kind == 2, CANCEL, TRADE)
    e["side"] = np.where(kind == 0, 1, -1)
    blocks = [Block(e[a : a + 65_536], np.zeros((0, 1)), np.empty(0, np.int64)) for a in range(0, EVENTS, 65_536)]

    def gather() -> Gatherer:
        g = Gatherer(1, ("buy", "sell", "cancel"))
        for block in blocks:
            g.push(block)
        return g

    benchmark.pedantic(gather, rounds=3)
    benchmark.extra_info["million events/s"] = EVENTS / best(gather, times=3)[0] / 1e6
    assert len(gather().events(0, 0, 2**62)[0]) == EVENTS
