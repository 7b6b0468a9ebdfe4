"""Hawkes: exact, stationary, recovers what was planted by another code, sees no future, and votes with it."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numba import njit
from pydantic import ValidationError
from scipy import stats

from catalog.errors import InputError
from catalog.events import ADD, CANCEL, EVENT, F_SNAPSHOT, F_TOB, MODIFY, SCALE, TRADE, Instrument
from cift_models import hawkes, hawkes_path
from cift_models.hawkes import Config, Gatherer, Hawkes
from cift_models.hawkes_path import Online
from cift_models.hawkes_process import TYPES, Coordinates, Params, fit_process, loglik, observe
from cift_models.labels import NEVER, Labeller, Study, Table, classify, fit_thresholds, walk_forward
from cift_models.windows import HORIZONS_NS, Block, closes, new_batches

SECOND = 1_000_000_000
DAY = 86_400 * SECOND
THREE = ("buy", "sell", "cancel")
ONE = Params(
    np.array([[0.2], [0.15], [0.3]]), np.array([[[0.30, 0.15, 0.15], [0.15, 0.35, 0.18], [0.25, 0.15, 0.20]]]), np.array([20.0])
)
TWO = Params(np.array([[0.02], [0.03]]), np.array([[[0.20, 0.15], [0.12, 0.22]], [[0.22, 0.15], [0.18, 0.20]]]), np.array([2.0, 200.0]))


# --- twins that share no code with the model ---


def brute(p: Params, t: np.ndarray, kind: np.ndarray, start: int, end: int) -> float:
    """Log-likelihood by the definition, every pair of events, every piece of the baseline."""
    decays, types, width = len(p.beta), len(p.mu), DAY // p.mu.shape[1]
    s = (t - t[0]) / SECOND
    value = 0.0
    for n in range(len(t)):
        if t[n] > start:
            past = t < t[n]
            lam = p.mu[kind[n], t[n] % DAY // width]
            for k in range(decays):
                lam += (p.alpha[k, kind[n], kind[past]] * p.beta[k] * np.exp(-p.beta[k] * (s[n] - s[past]))).sum()
            value += np.log(lam)
        for k in range(decays):
            for i in range(types):
                value -= p.alpha[k, i, kind[n]] * (1 - np.exp(-p.beta[k] * (end - t[n]) / SECOND))
    at = start
    while at < end:
        upto = min(end, (at // width + 1) * width)
        value -= p.mu[:, at // width % p.mu.shape[1]].sum() * (upto - at) / SECOND
        at = upto
    return float(value)


@njit
def thinning(seed, most, horizon, mu, alpha, beta, x):
    """Ogata's thinning with one excitation x (D, D, K), in events/s, for each pair and decay; constant baseline (D,)."""
    np.random.seed(seed)  # noqa: NPY002 (numba's own generator)
    D, K = len(mu), len(beta)
    times, kinds, n, now = np.empty(most), np.empty(most, np.int64), 0, 0.0
    while n < most:
        ceiling = mu.sum() + x.sum()
        gap = -np.log(1.0 - np.random.random()) / ceiling  # noqa: NPY002
        now += gap
        if now > horizon:
            break
        for k in range(K):
            x[:, :, k] *= np.exp(-beta[k] * gap)
        mark, i = np.random.random() * ceiling, 0  # noqa: NPY002
        while i < D:
            mark -= mu[i] + x[i].sum()
            if mark < 0:
                break
            i += 1
        if i < D:
            times[n], kinds[n] = now, i
            n += 1
            for k in range(K):
                for to in range(D):
                    x[to, i, k] += alpha[k, to, i] * beta[k]
    return times[:n], kinds[:n]


def planted(p: Params, seed: int, events: int = 200_000) -> tuple[np.ndarray, np.ndarray]:
    D, K = len(p.mu), len(p.beta)
    t, kind = thinning(seed, events, np.inf, p.mu[:, 0], p.alpha, p.beta, np.zeros((D, D, K)))
    return np.round(t * SECOND).astype(np.int64), kind


def messy(rng: np.random.Generator, n: int = 300, types: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Events over most of a day, many of them simultaneous."""
    t = np.sort(rng.integers(0, 20 * 3600, n)) * SECOND
    t[40:60] = t[40]
    return np.sort(np.where(rng.random(n) < 0.3, t // (600 * SECOND) * (600 * SECOND), t)), rng.integers(0, types, n)


def some(rng: np.random.Generator, types: int = 3, decays: int = 3, bins: int = 24) -> Params:
    alpha = rng.uniform(0, 0.8 / (types * decays), (decays, types, types))
    return Params(rng.uniform(0.001, 0.01, (types, bins)), alpha, np.array([1e-4, 1e-2, 1.0])[:decays])


# --- the likelihood ---


@pytest.mark.parametrize("seed", range(4))
def test_the_likelihood_is_that_of_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    t, kind = messy(rng)
    p = some(rng, bins=24 if seed % 2 else 1)
    for start, end in ((None, None), (int(t[0]) - 7 * SECOND, int(t[-1]) + 5_000 * SECOND)):
        value, _ = loglik(p, observe(t, kind, 3, p.mu.shape[1], start=start, end=end))
        truth = brute(p, t, kind, t[0] if start is None else start, t[-1] if end is None else end)
        assert value == pytest.approx(truth, rel=1e-10)


def test_windows_apart_add_up() -> None:
    rng = np.random.default_rng(5)
    t, kind = messy(rng)
    later = t + 40 * DAY
    p = some(rng)
    both = observe(np.r_[t, later], np.r_[kind, kind], 3, 24, gap_s=2 * 86_400)
    assert len(both.windows) == 2
    assert loglik(p, both)[0] == pytest.approx(2 * brute(p, t, kind, t[0], t[-1]), rel=1e-10)
    cut = observe(t, kind, 3, 24, holes=[150])
    apart = sum(brute(p, t[a], kind[a], t[a][0], t[a][-1]) for a in (slice(None, 150), slice(150, None)))
    assert loglik(p, cut)[0] == pytest.approx(apart, rel=1e-10)


def test_the_order_within_a_stamp_does_not_matter() -> None:
    rng = np.random.default_rng(6)
    t, kind = messy(rng)
    p = some(rng)
    shuffled = np.lexsort((rng.random(len(t)), t))
    assert (kind != kind[shuffled]).any()
    assert loglik(p, observe(t, kind, 3, 24))[0] == pytest.approx(loglik(p, observe(t, kind[shuffled], 3, 24))[0], rel=1e-12)


@pytest.mark.parametrize(("types", "decays"), [(3, 3), (2, 1), (4, 2)])
def test_the_gradient_is_that_of_finite_differences(types: int, decays: int) -> None:
    rng = np.random.default_rng(types)
    t, kind = messy(rng, types=types)
    space = Coordinates(types, 24, decays, (1e-5, 1e2), 0.95)
    seen = observe(t, kind, types, 24, gap_s=1_500.0, end=int(t[-1]) + 9 * SECOND)
    x = space.of(some(rng, types, decays)) + rng.normal(0, 0.3, types * 24 + decays * types * types + decays)
    params, pull = space.params(x)
    g = pull(loglik(params, seen)[1])
    step = 1e-5 * np.eye(len(x))
    numeric = np.array([loglik(space.params(x + e)[0], seen)[0] - loglik(space.params(x - e)[0], seen)[0] for e in step]) / 2e-5
    np.testing.assert_allclose(g, numeric, rtol=1e-5, atol=1e-6 * np.abs(g).max())


def test_every_point_of_the_coordinates_is_stationary() -> None:
    rng = np.random.default_rng(7)
    space = Coordinates(4, 1, 2, (0.1, 1e3), 0.98)
    radii = []
    for scale in np.geomspace(1e-3, 1e2, 200):
        params, _ = space.params(rng.normal(0, scale, 4 + 32 + 2))
        radii.append(params.radius)
        assert (params.alpha > 0).all() and (params.beta >= 0.1).all() and (params.beta <= 1e3).all()
    assert max(radii) < 0.98 + 1e-9 and max(radii) > 0.97 and min(radii) < 0.01


def test_coordinates_reach_processes_whose_trades_draw_more_than_one_cancel() -> None:
    alpha = np.array([[[0.3, 0.1, 0.02], [0.1, 0.3, 0.02], [2.5, 2.5, 0.1]]])
    p = Params(np.array([[0.1], [0.2], [0.3]]), alpha, np.array([3.0]))
    again = Coordinates(3, 1, 1, (0.1, 100.0), 0.99)
    assert p.radius < 0.99 and alpha.sum(1).max() > 2
    for a, b in zip(again.params(again.of(p))[0], p):
        np.testing.assert_allclose(a, b, rtol=1e-6)


# --- the fit ---


@pytest.mark.parametrize(("p", "seed"), [(ONE, 1), (TWO, 1)], ids=["exponential", "sum of exponentials"])
def test_planted_parameters_come_back_within_5_percent(p: Params, seed: int) -> None:
    t, kind = planted(p, seed)
    names = THREE[: len(p.mu)]
    fit = fit_process(t, kind, Config(types=names, decays=len(p.beta), bins=1), start=0)
    assert fit.converged and fit.events == 200_000
    for found, truth in zip(fit.params, p):
        assert np.abs(found / truth - 1).max() < 0.05
    assert fit.loglik > fit.poisson + 0.5


def test_errors_of_the_fit_are_those_that_the_information_allows() -> None:
    t, kind = planted(ONE, 2, 50_000)
    seen = observe(t, kind, 3, start=0)
    found = fit_process(t, kind, Config(types=THREE, decays=1, bins=1), start=0).params
    flat = np.concatenate([x.ravel() for x in found])

    def slope(theta: np.ndarray) -> np.ndarray:
        g = loglik(Params(theta[:3, None], theta[3:12].reshape(1, 3, 3), theta[12:]), seen)[1]
        return np.concatenate([x.ravel() for x in g])

    steps = np.diag(1e-4 * flat)
    information = -np.array([(slope(flat + s) - slope(flat - s)) / (2 * s.max()) for s in steps])
    error = flat - np.concatenate([x.ravel() for x in ONE])
    assert 1e-3 < stats.chi2.cdf(error @ information @ error, len(flat)) < 0.999


def test_a_baseline_that_varies_over_the_day_is_found() -> None:
    mu = np.full((2, 6), 0.05)
    mu[:, 2:4] = 0.4
    p = Params(mu, np.array([[[0.3, 0.1], [0.1, 0.3]]]), np.array([1.0]))
    t, kind = hawkes_path.simulate(p, 3 * 86_400.0, seed=3)
    fit = fit_process(t, kind, Config(types=("buy", "sell"), decays=1, bins=6), start=0)
    np.testing.assert_allclose(fit.params.mu, mu, rtol=0.12)
    half = fit_process(t[t < DAY // 2], kind[t < DAY // 2], Config(types=("buy", "sell"), decays=1, bins=6), start=0)
    unseen, mean = np.log(half.params.mu[:, 3:]), np.log(half.params.mu[:, :3]).mean(1, keepdims=True)
    np.testing.assert_allclose(unseen, np.broadcast_to(mean, unseen.shape))


def test_a_type_that_hardly_occurs_stays_a_trickle() -> None:
    t, kind = planted(TWO, 4, 3_000)
    fit = fit_process(t, kind, Config(decays=1, bins=1), start=0)
    assert fit.params.mu[2, 0] == pytest.approx(0.5 / (t[-1] / SECOND))
    assert (fit.params.alpha[:, 2] == 0).all() and (fit.params.alpha[:, :, 2] == 0).all()
    assert fit.params.alpha[:, :2, :2].sum() > 0.5


@pytest.mark.parametrize(
    ("t", "kind", "says"),
    [
        (np.arange(50) * SECOND, np.zeros(50, int), "50 events .* at least 200"),
        (np.full(500, 7 * SECOND), np.arange(500) % 3, "one stamp"),
        (np.arange(500)[::-1] * SECOND, np.arange(500) % 3, "backwards"),
        (np.arange(500) * SECOND, np.arange(500), r"0\.\.5"),
        (np.arange(500) * SECOND, np.zeros(499, int), "one length"),
        (np.arange(500) * 7_200 * SECOND, np.arange(500) % 3, "stamp"),
    ],
)
def test_data_that_cannot_be_fitted_is_refused_in_words(t: np.ndarray, kind: np.ndarray, says: str) -> None:
    with pytest.raises(InputError, match=says):
        fit_process(t, kind)


@pytest.mark.parametrize("seed", range(8))
def test_odd_data_never_gives_nan(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 400
    gaps = [
        np.full(n, 1_000_000),
        np.zeros(n, np.int64) + (np.arange(n) % 100 == 0) * SECOND,
        (rng.pareto(0.3, n) * 1_000).clip(0, 1e15).astype(np.int64),
        rng.integers(0, 2, n),
    ][seed % 4]
    t, kind = np.cumsum(gaps).astype(np.int64), (rng.random(n) * (1 + seed // 4)).astype(int)
    p = fit_process(t, kind, Config(decays=2, max_iterations=60)).params
    assert all(np.isfinite(x).all() for x in p) and p.radius < 1
    S = hawkes_path.state_after(p, t, kind)
    for h in (1e-9, 1.0, 1e4):
        w = hawkes_path.ahead(p, h)
        assert np.isfinite(w.intensity(S, p.mu[:, 0])).all() and (w.counts(S, p.mu[:, 0]) >= 0).all()
        chance = hawkes_path.next_event(p, S, h)
        assert (chance >= 0).all() and chance.sum() <= 1 + 1e-9
    assert all(np.isfinite(r).all() for r in hawkes_path.residuals(p, t, kind))


# --- what follows from it ---


def test_intensities_see_no_future() -> None:
    t, kind = messy(np.random.default_rng(8))
    p = some(np.random.default_rng(8))
    whole = hawkes_path.intensities(p, t, kind)
    other = kind.copy()
    other[200:] = 2 - other[200:]
    np.testing.assert_array_equal(hawkes_path.intensities(p, t[:200], kind[:200]), whole[:200])
    np.testing.assert_array_equal(hawkes_path.intensities(p, t, other)[:201], whole[:201])
    n = 150
    past = t < t[n]
    S = hawkes_path.state_after(p, t[past], kind[past], int(t[n]))
    np.testing.assert_allclose(whole[n], hawkes_path.intensity(p, S, int(t[n] % DAY // (DAY // 24))), rtol=1e-12)


def test_forecasts_are_the_means_of_simulated_futures() -> None:
    p = Params(np.array([[1.0], [0.5]]), np.array([[[0.2, 0.3], [0.1, 0.25]], [[0.3, 0.05], [0.15, 0.2]]]), np.array([1.0, 10.0]))
    S = np.array([[3.0, 0.5], [2.0, 0.0]])
    h, paths = 0.7, 40_000
    x = np.einsum("kij,k,kj->ijk", p.alpha, p.beta, S)
    counts, lam, first = np.zeros((paths, 2)), np.zeros((paths, 2)), np.zeros((paths, 3))
    for seed in range(paths):
        end = x.copy()
        t, kind = thinning(seed, 10_000, h, p.mu[:, 0], p.alpha, p.beta, end)
        counts[seed] = np.bincount(kind, minlength=2)
        lam[seed] = p.mu[:, 0] + (x * np.exp(-p.beta * h)).sum((1, 2))
        for s, c in zip(t, kind):
            lam[seed] += (p.alpha[:, :, c] * (p.beta * np.exp(-p.beta * (h - s)))[:, None]).sum(0)
        first[seed, kind[0] if len(kind) else 2] = 1
    w = hawkes_path.ahead(p, h)
    chance = hawkes_path.next_event(p, S, h)
    for seen, said in (
        (counts, w.counts(S, p.mu[:, 0])),
        (lam, w.intensity(S, p.mu[:, 0])),
        (first, np.append(chance, 1 - chance.sum())),
    ):
        z = (seen.mean(0) - said) / (seen.std(0) / np.sqrt(paths))
        assert np.abs(z).max() < 4


def test_forecasts_agree_with_one_another() -> None:
    p = Params(np.array([[1.0], [0.5], [2.0]]), np.full((3, 3, 3), 0.09), np.array([0.5, 50.0, 5_000.0]))
    S, mu = np.array([[4.0, 1.0, 0.0], [1.0, 0.0, 2.0], [0.0, 1.0, 0.0]]), np.array([1.0, 0.5, 2.0])
    np.testing.assert_allclose(hawkes_path.ahead(p, 1e-12).intensity(S, mu), hawkes_path.intensity(p, S), rtol=1e-6)
    np.testing.assert_allclose(hawkes_path.ahead(p, 1e3).intensity(S, mu), p.rates(), rtol=1e-6)
    grid = np.linspace(0, 0.02, 2_001)
    lam = np.array([hawkes_path.ahead(p, h).intensity(S, mu) for h in grid])
    np.testing.assert_allclose(hawkes_path.ahead(p, 0.02).counts(S, mu), np.trapezoid(lam, grid, axis=0), rtol=1e-4)
    pulse = (p.alpha * p.beta[:, None, None] * S[:, None, :]).sum((1, 2))
    for h in (1e-5, 1e-2, 1.0, 30.0):
        none = np.exp(-mu.sum() * h - (pulse / p.beta * -np.expm1(-p.beta * h)).sum())
        assert hawkes_path.next_event(p, S, h).sum() == pytest.approx(1 - none, rel=1e-9)


def test_residuals_of_the_true_process_are_exponential_and_of_a_wrong_one_are_not() -> None:
    t, kind = planted(ONE, 9, 60_000)
    right = [hawkes_path.goodness(r) for r in hawkes_path.residuals(ONE, t, kind, start=0)]
    poisson = Params(np.bincount(kind)[:, None] / (t[-1] / SECOND), np.zeros((1, 3, 3)), np.array([1.0]))
    wrong = [hawkes_path.goodness(r) for r in hawkes_path.residuals(poisson, t, kind, start=0)]
    assert sum(g.events for g in right if g) == 60_000
    for good, bad in zip(right, wrong):
        assert good and bad
        assert good.ks_p > 1e-3 and good.ljung_box_p > 1e-3
        assert bad.ks_p < 1e-9 and bad.ljung_box_p < 1e-9
        np.testing.assert_allclose(good.qq[:, 1], good.qq[:, 0], rtol=0.1, atol=0.02)
    assert hawkes_path.goodness(np.ones(5)) is None
    assert hawkes_path.goodness(np.zeros(100)).ljung_box == 0  # type: ignore[union-attr]


def test_residuals_cross_the_day_and_its_gaps() -> None:
    p = Params(np.array([[0.02, 0.2, 0.02, 0.1]]), np.array([[[0.5]]]), np.array([0.5]))
    t, kind = hawkes_path.simulate(p, 4 * 86_400.0, seed=1)
    whole = hawkes_path.goodness(hawkes_path.residuals(p, t, kind, start=0)[0])
    shut = (t % DAY > 8 * 3600 * SECOND) & (t % DAY < 16 * 3600 * SECOND)
    open_ = hawkes_path.residuals(p, t[~shut], kind[~shut], gap_s=3600.0)[0]
    cut = hawkes_path.goodness(open_)
    assert whole and cut and whole.ks_p > 1e-3 and cut.ks_p > 1e-3


def test_simulated_paths_pass_the_other_codes_likelihood() -> None:
    """Two simulators, one law: fitted values of either lie within the noise of the other."""
    a = fit_process(*hawkes_path.simulate(ONE, 1e9, seed=4, max_events=60_000), Config(types=THREE, decays=1, bins=1), start=0).params
    b = fit_process(*planted(ONE, 5, 60_000), Config(types=THREE, decays=1, bins=1), start=0).params
    for x, y in zip(a, b):
        np.testing.assert_allclose(x, y, rtol=0.12)


# --- online ---


def test_online_steps_climb_from_a_wrong_start_to_the_best_likelihood() -> None:
    t, kind = planted(ONE, 6)
    rate = np.bincount(kind)[:, None] / (t[-1] / SECOND)
    start = Params(0.5 * rate, np.full((1, 3, 3), 0.1), np.array([4.0]))
    online = Online(start, lr=1e-3)
    online.learn(t[:150_000], kind[:150_000])
    later = observe(t[150_000:], kind[150_000:], 3)
    n = later.scored.sum()
    worst, learnt, best = (loglik(p, later)[0] / n for p in (start, online.params, ONE))
    assert worst < best - 0.05 and learnt > best - 0.005
    assert online.params.beta[0] == pytest.approx(20, rel=0.1)


def test_online_steps_stay_stationary_and_finite_whatever_comes() -> None:
    rng = np.random.default_rng(1)
    for lr in (1e-3, 0.5, 50.0):
        online = Online(Params(np.full((3, 2), 0.1), np.full((2, 3, 3), 0.1), np.array([1.0, 100.0])), lr=lr)
        t = np.cumsum(np.where(rng.random(4_000) < 0.5, 0, rng.pareto(0.4, 4_000) * 1e6).clip(0, 1e13)).astype(np.int64)
        for a in range(0, 4_000, 100):
            online.learn(t[a : a + 100], rng.integers(0, 3, 100))
            assert online.params.radius <= 0.999 + 1e-9
            assert all(np.isfinite(x).all() and (x >= 0).all() for x in online.params)


def test_online_learning_does_not_depend_on_how_the_stream_is_cut() -> None:
    t, kind = planted(ONE, 7, 3_000)
    whole, pieces = Online(ONE), Online(ONE)
    whole.learn(t, kind)
    for a in (0, 1, 2, 700, 2_999):
        b = {0: 1, 1: 2, 2: 700, 700: 2_999, 2_999: 3_000}[a]
        pieces.learn(t[a:b], kind[a:b])
    for x, y in zip(whole.params, pieces.params):
        np.testing.assert_array_equal(x, y)


# --- the ensemble member ---

INSTRUMENTS = tuple(Instrument(f"{s}.TEST", 10_000_000, SCALE, 1.0, "USD") for s in ("AAA", "BBB"))
FLOW = Params(
    np.array([[0.25], [0.25], [0.3]]), np.array([[[0.75, 0.02, 0.05], [0.02, 0.75, 0.05], [0.1, 0.1, 0.3]]]), np.array([1.0])
)


def market(seed: int, seconds: float = 2_400.0) -> tuple[np.ndarray, np.ndarray]:
    """Two instruments whose buys and sells excite themselves and move the mid by a tick each: EVENT (n,), mid (n,)."""
    events, mids = [], []
    for k in range(2):
        t, kind = hawkes_path.simulate(FLOW, seconds, seed=10 * seed + k, start=19_000 * DAY)
        e = np.zeros(len(t), EVENT)
        e["ts_init"], e["ts_event"], e["instrument"], e["size"] = t, t, k, SCALE
        e["action"] = np.where(kind == 2, CANCEL, TRADE)
        e["side"] = np.where(kind == 0, 1, -1)
        e["ts_event"][kind == 2] += 1  # a cancel of somebody's own, not the trade's
        events.append(e)
        mids.append(100 + 0.01 * np.cumsum((kind == 0).astype(int) - (kind == 1)))
    both, mid = np.concatenate(events), np.concatenate(mids)
    order = np.argsort(both["ts_init"], kind="stable")
    return both[order], mid[order]


def study_of(events: np.ndarray, mid: np.ndarray) -> tuple[Study, Block]:
    """Decisions with their labels, as training joins them."""
    at = closes(new_batches(2), events)
    labels = Labeller(INSTRUMENTS, HORIZONS_NS, ())
    known = [labels.push(events, mid, at), labels.finish()]
    ts, inst = events["ts_init"][at], events["instrument"][at].astype(np.int64)
    move, known_at = np.full((len(at), 4), np.nan), np.full((len(at), 4), NEVER)
    for o in known:
        for k in range(2):
            mine = np.flatnonzero(inst == k)
            hit = o.instrument == k
            move[mine[o.serial[hit]], o.label[hit]] = o.move[hit]
            known_at[mine[o.serial[hit]], o.label[hit]] = o.known_at[hit]
    table = Table(ts, inst, np.zeros((len(at), 1), np.float32), np.ones(len(at)), move, known_at)
    study = Study(INSTRUMENTS, ("x",), (), table, walk_forward(ts)[0], fit_thresholds(table, 2, np.ones(len(at), bool)), (0, 1, 2, 3), 0)
    return study, Block(events, np.zeros((len(events), 1)), at)


def learn(events: np.ndarray, mid: np.ndarray) -> tuple[Hawkes, Study, Block]:
    study, block = study_of(events, mid)
    gathered = Hawkes.gatherer(INSTRUMENTS, ("x",))
    for a in range(0, len(events), 1_000):
        gathered.push(Block(events[a : a + 1_000], block.rows[a : a + 1_000], np.empty(0, np.int64)))
    return Hawkes.fit(study, gathered, Config(decays=2, bins=1)), study, block


@pytest.fixture(scope="module")
def fitted() -> tuple[Hawkes, Study, Block]:
    return learn(*market(1))


def test_the_map_has_memories_of_its_own_that_excite_nothing(fitted: tuple[Hawkes, Study, Block]) -> None:
    member, _, block = fitted
    state = member.new_state()
    member.predict(block, state)
    z, k = member.arrays, member.config.decays
    assert member.config.memories == (2.0,) and len(member.process(0).beta) == k and not z["alpha"][:, k:].any()
    e = block.events[block.events["instrument"] == 0]
    last = int(e["ts_init"][-1])
    for j, name in enumerate(member.config.types):
        action, side, _ = TYPES[name]
        mine = (e["action"] == action) & ((e["side"] == side) | (side is None)) & (e["ts_init"] < last)
        want = np.exp(-2.0 * (last - e["ts_init"][mine]) * 1e-9).sum()
        np.testing.assert_allclose(state.S[0, k, j], want, rtol=1e-9)
    one = hawkes_path.ahead(member.process(0), 1.0)
    np.testing.assert_allclose(z["count_S"][0, 1][:, : k * len(member.config.types)], one.count_S, rtol=1e-6, atol=1e-12)
    assert np.abs(z["count_S"][0, 1][:, k * len(member.config.types) :]).max() < 1e-12, "so they foretell no event either"
    with pytest.raises(ValueError, match="memories must be positive"):
        Config(memories=(2.0, -1.0))


def test_a_refit_climbs_from_the_old_parameters_and_keeps_an_instrument_that_has_gone_quiet(fitted):
    old, study, block = fitted
    gathered = Hawkes.gatherer(INSTRUMENTS, ("x",))
    mine = block.events[block.events["instrument"] == 0]
    gathered.push(Block(mine, np.zeros((len(mine), 1)), np.empty(0, np.int64)))
    new = Hawkes.fit(study, gathered, old.config, start=old)
    assert new.arrays["report"][0, 1] >= old.arrays["report"][0, 1] - 1e-6, "the same events are no less likely"
    assert np.allclose(new.process(0).alpha.sum(axis=0), old.process(0).alpha.sum(axis=0), atol=0.02)
    for name in ("mu", "alpha", "beta", "coef", "fitted"):
        assert np.array_equal(new.arrays[name][1], old.arrays[name][1], equal_nan=True)
    assert list(new.skipped) == [INSTRUMENTS[1].id]


def test_votes_are_probabilities_and_beat_the_base_rate_on_later_data(fitted: tuple[Hawkes, Study, Block]) -> None:
    member, study, _ = fitted
    assert not member.skipped and member.arrays["fitted"].all()
    later, block = study_of(*market(2))
    votes = member.predict(block, member.new_state())
    seen = np.isfinite(votes.proba[..., 0])
    assert seen.mean() > 0.99
    np.testing.assert_allclose(votes.proba[seen].sum(-1), 1, rtol=1e-12)
    assert (votes.proba[seen] > 0).all() and (votes.magnitude[seen] > 0).all()
    for h in range(3):
        for k in range(2):
            past = study.classes(h)[(study.table.instrument == k) & (study.classes(h) >= 0)]
            base = np.bincount(past, minlength=3) / len(past)
            y = classify(later.table.move[:, h], study.thresholds.balanced[k, h])
            test = (later.table.instrument == k) & (y >= 0) & seen[:, h]
            gain = np.log(votes.proba[test, h][np.arange(test.sum()), y[test]]) - np.log(base[y[test]])
            blocks = np.array([g.mean() for g in np.array_split(gain, 20)])
            assert blocks.mean() > 2 * blocks.std() / np.sqrt(20) and gain.mean() > 0.02
            size = np.abs(later.table.move[test, h])
            assert np.corrcoef(size, votes.magnitude[test, h])[0, 1] > 0.1
            assert votes.magnitude[test, h].mean() == pytest.approx(size.mean(), rel=0.3)


def test_bursts_of_buys_vote_up_and_their_mirror_votes_down(fitted: tuple[Hawkes, Study, Block]) -> None:
    member, _, _ = fitted
    e = np.zeros(61, EVENT)
    e["ts_init"] = e["ts_event"] = 20_000 * DAY + np.arange(61) * SECOND // 20
    e["action"], e["side"], e["size"] = TRADE, 1, SCALE
    last = np.array([60], np.int64)
    up = member.predict(Block(e, np.zeros((61, 1)), last), member.new_state()).proba[0, 1]
    e["side"] = -1
    down = member.predict(Block(e, np.zeros((61, 1)), last), member.new_state()).proba[0, 1]
    assert up[2] > 0.6 > 0.2 > up[0] and down[0] > 0.6 > 0.2 > down[2]


def test_any_cut_of_the_stream_gives_the_same_votes(fitted: tuple[Hawkes, Study, Block]) -> None:
    member, _, block = fitted
    events, rows, at = block.events[:6_000], block.rows[:6_000], block.closes[block.closes < 6_000]
    whole = member.predict(Block(events, rows, at), member.new_state())
    rng = np.random.default_rng(3)
    for edges in (np.append(at + 1, 6_000), np.sort(np.append(rng.integers(0, 6_000, 50), 6_000))):
        state, parts, a = member.new_state(), [], 0
        for b in edges:
            inside = at[(at >= a) & (at < b)] - a
            parts.append(member.predict(Block(events[a:b], rows[a:b], inside), state))
            state = copy.deepcopy(state)
            a = b
        np.testing.assert_array_equal(np.concatenate([p.proba for p in parts]), whole.proba)
        np.testing.assert_array_equal(np.concatenate([p.magnitude for p in parts]), whole.magnitude)


def test_later_events_do_not_change_earlier_votes(fitted: tuple[Hawkes, Study, Block]) -> None:
    member, _, block = fitted
    events = block.events[:4_000].copy()
    at = block.closes[block.closes < 4_000]
    before = member.predict(Block(events, block.rows[:4_000], at), member.new_state()).proba
    events["side"][2_000:] *= -1
    after = member.predict(Block(events, block.rows[:4_000], at), member.new_state()).proba
    early = at < 2_000
    np.testing.assert_array_equal(before[early], after[early])
    assert (before[~early] != after[~early]).any()


def test_what_is_learnt_from_is_what_is_served(fitted: tuple[Hawkes, Study, Block]) -> None:
    member, study, block = fitted
    gathered = Hawkes.gatherer(INSTRUMENTS)
    gathered.push(block)
    x, trades, known = member._buffers(len(block.closes))
    state = member.new_state()
    z = member.arrays
    hawkes._replay(
        block.events, block.closes, z["fitted"], hawkes._codes(member.config.types), state.trade, state.S, state.pending, state.last,
        *member._model(), member._pairs, z["usual"], member._seconds, x, trades, known,
    )  # fmt: skip
    for k in range(2):
        mine = study.table.instrument == k
        x2, trades2, known2 = member._buffers(int(mine.sum()))
        t, kind, holes = gathered.events(k, 0, NEVER)
        hawkes._replay_typed(
            t, kind, holes, study.table.ts[mine], *member._model(k), member._pairs, z["usual"][k], member._seconds, x2, trades2, known2
        )
        np.testing.assert_array_equal(known2, known[mine])
        np.testing.assert_array_equal(x2, x[mine])


def test_an_instrument_without_events_abstains_and_the_rest_vote() -> None:
    events, mid = market(3, 900.0)
    rare = (events["instrument"] == 1) & (np.arange(len(events)) % 50 > 0)
    member, study, block = learn(events[~rare], mid[~rare])
    votes = member.predict(block, member.new_state()).proba
    assert "at least 200" in member.skipped["BBB.TEST"]
    assert np.isnan(votes[study.table.instrument == 1]).all() and np.isfinite(votes[study.table.instrument == 0, 0]).all()
    assert np.isnan(votes[study.table.instrument == 0, 3]).all() == np.isnan(member.arrays["coef"][0, 3]).all()
    with pytest.raises(InputError, match="at least 200"):
        learn(events[:100], mid[:100])


def test_events_of_instruments_unknown_to_the_model_change_nothing(fitted: tuple[Hawkes, Study, Block]) -> None:
    member, _, block = fitted
    e = block.events[:500].copy()
    e["instrument"] += 2
    assert np.isnan(member.predict(Block(e, block.rows[:500], np.arange(500)), member.new_state()).proba).all()


def test_only_true_cancels_and_aggressors_have_a_type() -> None:
    kinds = ("buy", "sell", "cancel_bid", "cancel_ask", "add_bid")
    rows = [
        (TRADE, 1, 5, 10, 0, 0), (CANCEL, -1, 5, 10, 0, -1),  # its execution leaves the book
        (CANCEL, -1, 5, 10, 0, 3),  # nothing of the trade is left: somebody's cancel
        (TRADE, -1, 5, 20, 0, 1), (CANCEL, 1, 3, 20, 0, -1), (CANCEL, -1, 1, 20, 0, 3), (CANCEL, 1, 2, 20, 0, -1), (CANCEL, 1, 1, 20, 0, 2),
        (TRADE, 1, 5, 30, 0, 0), (CANCEL, -1, 5, 31, 0, 3),
        (TRADE, 0, 5, 40, 0, -1), (MODIFY, 1, 5, 41, 0, -1), (ADD, 1, 5, 42, 0, 4), (ADD, -1, 5, 42, 0, -1),
        (ADD, 1, 5, 43, F_SNAPSHOT, -1), (CANCEL, 1, 5, 44, F_TOB, -1), (ord("R"), 0, 0, 45, 0, -1),
    ]  # fmt: skip
    e = np.zeros(len(rows), EVENT)
    for name, column in zip(("action", "side", "size", "ts_event", "flags"), list(zip(*rows))[:5]):
        e[name] = column
    found = np.empty(len(rows), np.int8)
    hawkes._classify_all(e, hawkes._codes(kinds), np.zeros((1, 3), np.int64), found)
    assert found.tolist() == [r[5] for r in rows]


def test_a_long_history_is_gathered_in_bounded_memory() -> None:
    gathered = Gatherer(1, ("buy", "sell"), run=100, room=8)
    e = np.zeros(30, EVENT)
    e["action"], e["side"] = TRADE, 1
    for n in range(200):
        e["ts_init"] = np.arange(n * 30, n * 30 + 30)
        gathered.push(Block(e.copy(), np.zeros((30, 1)), np.empty(0, np.int64)))
    t, kind, holes = gathered.events(0, 0, NEVER)
    assert len(t) == len(kind) <= 9 * 100 and t[0] == 0 and t[-1] >= 5_200
    jumps = np.flatnonzero(np.diff(t) > 1) + 1
    np.testing.assert_array_equal(jumps, holes)
    assert len(holes) >= 5
    a, _, inner = gathered.events(0, int(t[50]), int(t[holes[1]] + 5))
    assert a[0] == t[50] and len(inner) == 2 and (np.diff(a)[inner - 1] > 1).all()


def test_a_saved_model_votes_the_same_and_a_torn_file_is_refused(fitted: tuple[Hawkes, Study, Block], tmp_path: Path) -> None:
    member, _, block = fitted
    (path,) = member.save(tmp_path)
    first = path.read_bytes()
    again = Hawkes.load(tmp_path, ("x",))
    part = Block(block.events[:3_000], block.rows[:3_000], block.closes[block.closes < 3_000])
    np.testing.assert_array_equal(again.predict(part, again.new_state()).proba, member.predict(part, member.new_state()).proba)
    assert again.config == member.config and again.ids == ("AAA.TEST", "BBB.TEST")
    again.save(tmp_path)
    assert path.read_bytes() == first
    for torn in (first[: len(first) // 2], b"", b"no archive"):
        path.write_bytes(torn)
        with pytest.raises(InputError, match=r"hawkes\.npz"):
            Hawkes.load(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=r"hawkes\.npz"):
        Hawkes.load(tmp_path)
    wrong = {**member.arrays, "beta": np.ones((2, 7))}
    Hawkes(member.config, member.ids, wrong).save(tmp_path)
    with pytest.raises(InputError, match="configuration"):
        Hawkes.load(tmp_path)
    np.savez(path, config=np.array([object()], object), allow_pickle=True)
    with pytest.raises(InputError, match=r"hawkes\.npz"):
        Hawkes.load(tmp_path)


def test_with_one_class_or_few_labels_the_map_says_the_base_rate() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5_000, 6))
    ones = hawkes.fit_map(x, np.full(5_000, 1, np.int8), 40.0, 1.0)
    assert np.isfinite(ones).all() and np.abs(ones[:, :6]).max() < 0.05
    p = np.exp(ones[:, 6]) / np.exp(ones[:, 6]).sum()
    assert p[1] > 0.9 and p.min() > 0.001
    y = (1 + (x[:, 0] > 0.5).astype(int) - (x[:, 0] < -0.5)).astype(np.int8)
    few, many = (hawkes.fit_map(x, y, n, 1.0) for n in (5.0, 5_000.0))
    assert np.abs(few[:, 0]).max() < 0.3 * np.abs(many[:, 0]).max()
    assert np.argmax(many[:, 0]) == 2 and np.argmin(many[:, 0]) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"types": ("buy", "cancel")}, {"types": ("buy", "sell", "cancel", "cancel_bid")}, {"types": ("buy", "sell", "hold")},
        {"types": ("buy", "sell", "sell")}, {"bins": 7}, {"decay_range": (5.0, 1.0)}, {"max_radius": 1.0}, {"decay": 2},
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Config(**wrong)  # type: ignore[arg-type]


def test_the_gatherer_takes_instruments_it_does_not_know_for_nothing() -> None:
    gathered = Hawkes.gatherer((SimpleNamespace(id="A"),))
    assert [len(a) for a in gathered.events(0, 0, NEVER)] == [0, 0, 0]
    e = np.zeros(3, EVENT)
    e["action"], e["side"], e["instrument"] = TRADE, 1, [0, 1, 0]
    gathered.push(Block(e, np.zeros((3, 1)), np.empty(0, np.int64)))
    assert len(gathered.events(0, 0, NEVER)[0]) == 2
