"""How much of the best trial is luck: against brute force, and on trials of which the truth is known."""

from __future__ import annotations

from itertools import combinations
from math import e, log, sqrt
from statistics import NormalDist, mean, stdev

import numpy as np
import pytest

from cift_strategies.overfitting import pbo, sharpe
from cift_strategies.performance import EULER, deflated_sharpe


def ratio(x: list[float]) -> float:
    return mean(x) / stdev(x)


def slow_pbo(returns: np.ndarray, blocks: int) -> float:
    """Every half, every trial, from the returns themselves."""
    each, n, below, number = len(returns) // blocks, returns.shape[1], 0, 0
    for half in combinations(range(blocks), blocks // 2):
        inside = [b * each + i for b in half for i in range(each)]
        outside = [i for i in range(blocks * each) if i not in inside]
        here = [ratio([returns[i, t] for i in inside]) for t in range(n)]
        there = [ratio([returns[i, t] for i in outside]) for t in range(n)]
        best = here.index(max(here))
        rank = sum(x <= there[best] for x in there)
        below += log(rank / (n + 1) / (1 - rank / (n + 1))) <= 0
        number += 1
    return below / number


@pytest.mark.parametrize(("blocks", "trials"), [(4, 3), (6, 7), (8, 12)])
def test_pbo_is_that_of_brute_force(blocks: int, trials: int) -> None:
    returns = np.random.default_rng(blocks).normal(0.05, 1, (blocks * 6 + 1, trials)) * np.linspace(0.5, 2, trials)
    found = pbo(returns, blocks)
    assert found is not None and found.pbo == slow_pbo(returns, blocks)


def test_the_best_of_noise_is_as_often_below_the_median_as_above() -> None:
    found = [pbo(np.random.default_rng(seed).normal(size=(320, 20)), 10) for seed in range(60)]
    assert np.mean([f.pbo for f in found if f]) == pytest.approx(0.5, abs=0.06)


def test_a_trial_with_skill_is_not_overfitted() -> None:
    returns = np.random.default_rng(0).normal(size=(320, 20))
    returns[:, 7] += 0.5
    found = pbo(returns)
    assert found is not None and found.pbo < 0.01 and found.loss < 0.01


def test_there_is_nothing_to_tell_of_one_trial_or_of_few_periods() -> None:
    assert pbo(np.ones((320, 1))) is None and pbo(np.ones((20, 4))) is None
    with pytest.raises(ValueError, match="halves"):
        pbo(np.ones((320, 4)), 5)


def test_trials_that_never_traded_have_a_ratio_of_zero() -> None:
    returns = np.zeros((64, 3))
    returns[:, 1] = np.random.default_rng(0).normal(size=64)
    assert sharpe(returns)[[0, 2]].tolist() == [0.0, 0.0] and sharpe(returns)[1] == pytest.approx(ratio(returns[:, 1].tolist()))
    assert not deflated_sharpe(returns[:, 0], 3, sharpe(returns).tolist()).defined


def test_the_deflated_ratio_is_the_papers() -> None:
    """Bailey and Lopez de Prado (2014), equations 1 and 2, written out."""
    rng, z = np.random.default_rng(3), NormalDist()
    r, ratios = rng.gamma(2.0, 1.0, 250) - 1.8, rng.normal(0, 0.08, 30)
    n, m, s = 250, r.mean(), r.std()
    skew, kurtosis = ((r - m) ** 3).mean() / s**3, ((r - m) ** 4).mean() / s**4
    sr = ratio(r.tolist())
    expected = stdev(ratios.tolist()) * ((1 - EULER) * z.inv_cdf(1 - 1 / 40) + EULER * z.inv_cdf(1 - 1 / (40 * e)))
    wanted = z.cdf((sr - expected) * sqrt(n - 1) / sqrt(1 - skew * sr + (kurtosis - 1) / 4 * sr**2))
    found = deflated_sharpe(r, 40, ratios.tolist())
    assert found.deflated == pytest.approx(wanted) and found.expected_best == pytest.approx(expected)


def test_the_best_of_many_unskilled_trials_is_expected_where_it_is_found() -> None:
    rng = np.random.default_rng(5)
    best, told, sure = [], [], []
    for _ in range(200):
        returns = rng.normal(size=(200, 50))
        ratios = sharpe(returns)
        found = deflated_sharpe(returns[:, ratios.argmax()], 50, ratios.tolist())
        best.append(ratios.max())
        told.append(found.expected_best)
        sure.append(found.deflated > 0.95)
    assert np.mean(told) == pytest.approx(np.mean(best), rel=0.05) and np.mean(sure) < 0.08
