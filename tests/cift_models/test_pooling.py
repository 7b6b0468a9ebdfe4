"""The pool of votes: it finds who knows what, is sharper than each where they know different things, and believes little without labels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cift_models.pooling import (
    BOTH,
    RATES,
    SHARP,
    Pool,
    blend,
    class_rates,
    fit_horizon,
    fit_pool,
    pooled,
    pooled_all,
    settle,
    sharpened,
    soften,
)

N_I, R, H = 2, 3, 2
STILL, WAY = 0, 1  # what a vote says: whether the price moves, and which way


def knowledge(rng, n, strength=1.0):
    """Two signs, each known to one member alone, and a third member that guesses; classes follow from both: votes (n, 3, 3), y (n,)."""
    a, b = rng.choice([-1.0, 1.0], (2, n))
    odds = strength * np.outer(a + b, [-1, 0, 1])
    p = np.exp(odds) / np.exp(odds).sum(axis=1, keepdims=True)
    y = (p.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1).astype(np.int8)
    votes = np.empty((n, 3, 3))
    for m, known in enumerate((a, b)):
        for s in (-1, 1):
            mine = known == s
            votes[mine, m] = np.mean([np.exp(strength * (s + t) * np.array([-1, 0, 1])) for t in (-1, 1)], axis=0)
    votes[:, 2] = rng.dirichlet([8, 8, 8], n)
    return votes / votes.sum(axis=2, keepdims=True), y


def loss(p, y):
    return -np.log(p[np.arange(len(y)), y])


def test_two_members_that_know_different_things_are_worth_more_together_than_any_mean_of_them():
    rng = np.random.default_rng(0)
    votes, y = knowledge(rng, 4_000)
    rate, regime = np.full((len(y), 3), 1 / 3), np.zeros(len(y), np.int64)
    weight, bias = fit_horizon(votes[:2_000], y[:2_000], regime[:2_000], rate[:2_000], 2_000, R)
    out = np.empty((2_000, 3))
    pooled_all(votes[2_000:], regime[2_000:], regime[2_000:], weight, bias, np.full((N_I, 3), 1 / 3), out)
    later = y[2_000:]
    mixtures = [loss(np.tensordot(votes[2_000:], [w, 1 - w, 0], (1, 0)), later).mean() for w in np.linspace(0, 1, 11)]
    assert loss(out, later).mean() < min(mixtures) - 0.02
    assert (weight[0, :2, WAY] > 0.8).all() and weight[0, 2, WAY] < 0.15


def test_what_all_know_counts_once_and_what_each_knows_counts_in_full():
    """All know whether the price moves, as all see the same activity; which way, each knows a part of its own."""
    rng = np.random.default_rng(7)
    n, classes = 20_000, np.array([-1, 0, 1])
    still, signs = rng.choice([-1.5, 1.5], n), rng.choice([-1.0, 1.0], (3, n))

    def chances(total):
        odds = 0.6 * np.outer(total, classes) + np.outer(still, classes == 0)
        return np.exp(odds) / np.exp(odds).sum(axis=1, keepdims=True)

    p = chances(signs.sum(axis=0))
    y = (p.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1).astype(np.int8)
    others = (-2, 0, 0, 2)  # what the other two add up to, each as likely
    votes = np.stack([np.mean([chances(sign + other) for other in others], axis=0) for sign in signs], axis=1)
    rate, regime = np.full((n, 3), 1 / 3), np.zeros(n, np.int64)
    half = n // 2
    weight, bias = fit_horizon(votes[:half], y[:half], regime[:half], rate[:half], half, 1)
    assert weight[0, :, STILL].sum() == pytest.approx(1, abs=0.2) and (weight[0, :, WAY] > 0.9).all()

    def later(weight):
        out = np.empty((half, 3))
        pooled_all(votes[half:], regime[half:], regime[half:], weight, bias, np.full((1, 3), 1 / 3), out)
        return loss(out, y[half:]).mean()

    assert later(weight) < min(later(np.full((1, 3, 2), w)) for w in np.linspace(0.2, 1.4, 25)) - 0.02
    assert later(weight) < loss(p[half:], y[half:]).mean() + 0.005, "nearly as good as to know everything"


@given(seed=st.integers(0, 10_000))
def test_with_the_same_weight_for_both_a_vote_counts_as_a_whole(seed):
    rng = np.random.default_rng(seed)
    votes, rate = soften(rng.dirichlet(np.ones(3), 4)), rng.dirichlet(np.full(3, 5.0))
    weight, bias = rng.uniform(0, 2, 4), rng.normal(size=3)
    votes[seed % 4] = np.nan
    out = np.empty(3)
    pooled(votes, np.stack([weight, weight], axis=1), bias, rate, out)
    z = rate * np.exp(bias + np.nansum(weight[:, None] * np.log(votes / rate), axis=0))
    assert np.allclose(out, z / z.sum(), rtol=1e-12, atol=0)


def test_a_regime_of_its_own_gets_its_own_weights_where_there_are_labels_enough():
    rng = np.random.default_rng(1)
    votes, y = knowledge(rng, 6_000)
    regime = rng.integers(0, 2, len(y))
    votes[regime == 1, 0] = rng.dirichlet([8, 8, 8], int((regime == 1).sum()))
    weight, _ = fit_horizon(votes, y, regime, np.full((len(y), 3), 1 / 3), len(y), R)
    assert weight[0, 0, WAY] > weight[1, 0, WAY] + 0.4 and abs(weight[0, 1, WAY] - weight[1, 1, WAY]) < 0.4
    few, _ = fit_horizon(votes, y, regime, np.full((len(y), 3), 1 / 3), 2.0, R)
    assert np.ptp(few, axis=0).max() < 0.1 and np.abs(few - 1 / 3).max() < 0.1, "two labels hardly move equal shares"


def test_without_labels_it_is_the_geometric_mean_and_of_one_awake_the_vote_itself():
    votes = np.random.default_rng(2).dirichlet(np.ones(3), (5, 3))
    none = np.empty(0, np.int8)
    weight, bias = fit_horizon(votes[:0], none, none.astype(np.int64), np.empty((0, 3)), 0.0, R)
    assert not weight.any() and not bias.any(), "nobody has ever voted"
    votes[:, 1] = np.nan
    y = np.zeros(5, np.int8)
    weight, bias = fit_horizon(votes, y, y.astype(np.int64), np.full((5, 3), 1 / 3), 1e-9, R)
    assert np.allclose(weight, [[0.5], [0], [0.5]], atol=1e-4) and np.abs(bias).max() < 1e-4
    told, _ = fit_horizon(votes, y, y.astype(np.int64), np.full((5, 3), 1 / 3), 1e-9, R, np.array([3.0, 1.0, 1.0]))
    assert np.allclose(told, [[0.75], [0], [0.25]], atol=1e-4), "shares before any label are those given, of who is awake"
    out = np.empty(3)
    pooled(votes[0], weight[0], np.zeros(3), np.full(3, 1 / 3), out)
    want = np.sqrt(votes[0, 0] * votes[0, 2])
    assert np.allclose(out, want / want.sum(), atol=1e-4)
    one = np.where(np.arange(3)[:, None] == 2, votes[0], np.nan)
    pooled(one, np.ones((3, 2)), np.zeros(3), np.array([0.5, 0.3, 0.2]), out)
    assert np.allclose(out, votes[0, 2])
    pooled(np.full((3, 3), np.nan), np.ones((3, 2)), np.zeros(3), np.full(3, 1 / 3), out)
    assert np.isnan(out).all()


def study(seed, n=800, horizon=50):
    """n decisions of two instruments with labels that reach `horizon` decisions ahead, in two horizons of which the second has no votes."""
    rng = np.random.default_rng(seed)
    votes, y = knowledge(rng, n)
    both = np.stack([votes, np.full_like(votes, np.nan)], axis=2)
    ts = np.arange(n) * 10
    known_at = np.stack([ts + 10 * horizon + 1, ts + 10 * horizon + 1], axis=1)
    return both, np.stack([y, y], axis=1), rng.integers(0, R, n), ts, known_at, rng.integers(0, N_I, n), np.full(H, n / 2)


def test_a_decision_is_foretold_by_a_pool_that_saw_no_label_that_overlaps_with_its_own():
    args = study(3)
    pool, out = fit_pool(*args, N_I, R)
    assert pool.weight.shape == (R, H, 3, 2) and pool.rate.shape == (N_I, H, 3) and np.allclose(pool.rate.sum(axis=2), 1)
    assert np.allclose(out[:, 0].sum(axis=1), 1) and np.isnan(out[:, 1]).all()
    other = args[1].copy()
    near = slice(200 - 50, 400 + 50)  # the second stretch, and the labels that overlap with its own
    other[near] = (other[near] + 1) % 3
    _, changed = fit_pool(args[0], other, *args[2:], N_I, R)
    assert np.array_equal(out[200:400], changed[200:400], equal_nan=True)
    assert not np.allclose(out[:200, 0], changed[:200, 0])


def test_class_rates_are_even_until_independent_labels_tell_otherwise():
    y, k = np.full(10_000, 2, np.int8), np.zeros(10_000, np.int64)
    assert np.allclose(class_rates(y, k, N_I, 1e-6), 1 / 3, atol=1e-6)
    rates = class_rates(y, k, N_I, RATES)
    assert rates[0, 2] > 0.8 > rates[1, 2] > 0.6
    assert np.allclose(class_rates(y[:0], k[:0], N_I, 0.0), 1 / 3)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), eta=st.floats(0.02, 1.0), share=st.floats(1e-6, 0.2), lead=st.floats(0, 1))
def test_of_three_forecasts_the_best_is_followed_within_the_bound(seed, eta, share, lead):
    """Regret against each: ln 3 / eta and what the fixed share costs (Herbster and Warmuth 1998)."""
    rng = np.random.default_rng(seed)
    p = soften(rng.dirichlet(np.ones(3), (300, 3)))[:, :, 0]
    p[:, 1] = (1 - lead) * p[:, 1] + lead * rng.uniform(0.5, 1, 300)
    w = np.full(3, 1 / 3)
    ours = sum(settle(w, q, eta, share) for q in p)
    bound = (np.log(3) - 300 * np.log1p(-share)) / eta
    assert (ours + np.log(p).sum(axis=0) <= bound + 1e-9).all() and w.sum() == pytest.approx(1) and (w > 0).all()


def test_an_outcome_moves_the_blend_from_the_decision_at_which_it_is_known():
    _, y, regime, ts, known_at, _, _ = study(4)
    rng = np.random.default_rng(0)
    mix, pool, rate = rng.dirichlet(np.ones(3), (3, len(ts), H))
    eta = np.full(H, 0.5)
    out, weights = blend(ts, known_at, regime, y, mix, pool, rate, eta, 1e-4, R)
    even = (mix + pool + sharper(pool, rate)) / 3
    gap = np.abs(out - even).max(axis=2)
    assert np.allclose(gap[:51], 0) and gap[51:].max() > 0.1 and weights.shape == (R, H, len(BOTH))
    other = y.copy()
    other[300:] = (other[300:] + 1) % 3
    changed, _ = blend(ts, known_at, regime, other, mix, pool, rate, eta, 1e-4, R)
    assert np.array_equal(out[:351], changed[:351]) and not np.array_equal(out[352:], changed[352:])
    nobody, _ = blend(ts, known_at, regime, y, mix, np.full_like(pool, np.nan), rate, eta, 1e-4, R)
    assert np.array_equal(nobody, mix), "a pool of nobody says nothing"


def test_the_sharper_pool_leans_further_from_the_class_rates_to_the_same_side():
    rng = np.random.default_rng(0)
    for p, rate in rng.dirichlet(np.ones(3), (50, 2)):
        out = np.empty(3)
        sharpened(p, rate, out)
        assert np.allclose(out, sharper(p, rate)) and out.sum() == pytest.approx(1)
        lean, bolder = (np.subtract.outer(np.log(q / rate), np.log(q / rate)) for q in (p, out))
        assert np.allclose(bolder, SHARP * lean)
        sharpened(rate, rate, out)
        assert np.allclose(out, rate), "who knows nothing stays so"


def sharper(p, rate):
    z = np.exp(np.log(rate) + SHARP * np.log(p / rate))
    return z / z.sum(axis=-1, keepdims=True)


def test_the_pool_is_a_tuple_of_plain_arrays():
    pool, _ = fit_pool(*study(5), N_I, R)
    assert isinstance(pool, Pool) and all(a.dtype == np.float64 and np.isfinite(a).all() for a in pool)
