"""Lead-lag: the covariance is the double sum over overlapping intervals, planted lags are found, hedges and shocks are right by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catalog.errors import InputError
from catalog.events import SCALE
from cift_models.leadlag import (
    HALF_LIFE,
    LAGS,
    LEAST_TICKS,
    REFRESH,
    TICKS,
    Graph,
    Lead,
    contagion,
    end_cell,
    end_round,
    end_silence,
    hayashi_yoshida,
    hedge,
    lead_lag,
    new_links,
    see_tick,
    together,
)  # fmt: skip


def double_sum(tx, x, ty, y, lag=0):
    """Every pair of intervals, one by one."""
    total = 0.0
    for a in range(len(tx) - 1):
        for b in range(len(ty) - 1):
            if max(tx[a], ty[b] - lag) < min(tx[a + 1], ty[b + 1] - lag):
                total += (x[a + 1] - x[a]) * (y[b + 1] - y[b])
    return total


def market(seed: int, lag_ms: float, rates=(80.0, 60.0), seconds: float = 200.0, rho: float = 0.8):
    """Two correlated Brownian motions, the second `lag_ms` behind, each seen at Poisson times of its own."""
    rng, dt = np.random.default_rng(seed), 1e-3
    n = int((seconds + 3) / dt)
    z = rng.standard_normal((2, n))
    paths = np.cumsum(z[0]), np.cumsum(rho * z[0] + np.sqrt(1 - rho**2) * z[1])
    out = []
    for path, rate, behind in zip(paths, rates, (0.0, lag_ms / 1e3)):
        t = np.sort(rng.random(rng.poisson(rate * seconds)) * seconds) + 1.5
        out += [(t * SCALE).astype(np.int64), np.interp(t - behind, np.arange(n) * dt, path)]
    return out


ticks = st.lists(st.tuples(st.integers(0, 40), st.integers(-5, 5)), min_size=0, max_size=25)


@settings(max_examples=300, deadline=None)
@given(first=ticks, second=ticks, lag=st.integers(-45, 45))
def test_the_covariance_is_the_double_sum_over_overlapping_intervals(first, second, lag):
    (tx, x), (ty, y) = (
        (np.array([t for t, _ in sorted(s)], np.int64), np.array([p for _, p in sorted(s)], float)) for s in (first, second)
    )
    assert hayashi_yoshida(tx, x, ty, y, lag) == double_sum(tx, x, ty, y, lag)
    assert hayashi_yoshida(tx, x, ty, y, lag) == hayashi_yoshida(ty, y, tx, x, -lag)


def test_of_synchronous_prices_it_is_the_realised_covariance():
    rng = np.random.default_rng(0)
    t, x, y = np.cumsum(rng.integers(1, 9, 500)), *np.cumsum(rng.normal(size=(2, 500)), axis=1)
    assert hayashi_yoshida(t, x, t, y) == pytest.approx(np.diff(x) @ np.diff(y))


def test_sampling_at_different_times_does_not_pull_it_to_zero():
    """The bias that interpolation on a grid has (Epps 1979): unsynchronised ticks give the covariance of the motions."""
    found = [hayashi_yoshida(*market(s, 0.0, (30.0, 20.0), 60.0)) / (0.8 * 60_000) for s in range(20)]
    assert np.mean(found) == pytest.approx(1.0, abs=0.05)


def test_planted_lags_are_recovered_within_a_millisecond_in_95_percent_of_markets():
    planted = np.random.default_rng(1).uniform(-400, 400, 40)
    found = [lead_lag(*market(s, lag)) for s, lag in enumerate(planted)]
    error = np.abs([f.lag_ns / 1e6 for f in found] - planted)
    assert (error < 1).mean() >= 0.95
    for f, lag in zip(found, planted):
        assert f.z > 10 and f.correlation == pytest.approx(0.8, abs=0.06)
        assert (f.ratio > 1) == (lag > 0) or abs(lag) < 20


def test_exchanging_the_prices_turns_the_lag_round_and_falling_together_is_no_less_than_rising():
    tx, x, ty, y = market(3, 120.0)
    there, back, against = lead_lag(tx, x, ty, y), lead_lag(ty, y, tx, x), lead_lag(tx, x, ty, -y)
    assert there.lag_ns == pytest.approx(120e6, abs=1e6) and back.lag_ns == pytest.approx(-there.lag_ns, abs=1e6)
    assert against.lag_ns == there.lag_ns and against.correlation == -there.correlation


def test_independent_prices_lead_nowhere_significantly():
    z = [abs(lead_lag(*market(s, 0.0, (20.0, 20.0), 60.0, rho=0.0)).z) for s in range(20)]
    assert np.quantile(z, 0.9) < 4.5


def test_prices_that_never_move_or_hardly_tick_have_no_lead():
    t, flat = np.arange(50) * SCALE, np.ones(50)
    none = np.empty(0, np.int64)
    assert lead_lag(t, flat, t, flat) == Lead(0, 0.0, 0.0, 1.0)
    assert lead_lag(none, none, t, flat) == lead_lag(t[:1], flat[:1], t, flat) == Lead(0, 0.0, 0.0, 1.0)
    assert hayashi_yoshida(none, none, t, flat) == 0.0
    assert abs(lead_lag(t[:3], np.array([1.0, 2, 1]), t[:3] + 1, np.array([1.0, 2, 1])).correlation) <= 1
    with pytest.raises(InputError, match="sort them by time"):
        hayashi_yoshida(t[::-1], flat, t, flat)
    with pytest.raises(InputError, match="one price each"):
        lead_lag(t, flat[1:], t, flat)


def test_the_running_estimate_is_that_of_the_latest_ticks():
    tx, x, ty, y = market(5, 80.0, (12.0, 25.0), 60.0)
    links = new_links(3)
    for t, k, p in sorted([(t, 0, p) for t, p in zip(tx, x)] + [(t, 1, p) for t, p in zip(ty, y)]):
        see_tick(links, k, t, p)
    end_round(links)
    assert len(tx) > TICKS and len(ty) > TICKS
    x, tx, y, ty = x[-TICKS:], tx[-TICKS:], y[-TICKS:], ty[-TICKS:]
    since = max(tx[0], ty[0])
    a, b = (max(0, np.searchsorted(t, since, "right") - 1) for t in (tx, ty))
    tx, x, ty, y = tx[a:], x[a:], ty[b:], y[b:]
    covariance = np.array([hayashi_yoshida(tx, x, ty, y, lag) for lag in LAGS])
    best = np.abs(covariance).argmax()
    rho, lag, z, cov, variance = links.lead[1, 0]
    assert lag == LAGS[best] and abs(np.log2(lag / 80e6)) < 0.6 and z > 4 and cov == pytest.approx(covariance[best])
    assert variance == pytest.approx(np.diff(x) @ np.diff(x))
    assert rho == pytest.approx(cov / np.sqrt(variance * (np.diff(y) @ np.diff(y))))
    assert links.lead[0, 1, 1] == -lag and links.lead[0, 1, 0] == rho
    assert (links.lead[2] == 0).all()


def test_of_several_changes_in_one_instant_the_last_counts():
    links = new_links(2)
    for t, p in ((1, 5.0), (2, 6.0), (2, 7.0), (3, 8.0)):
        see_tick(links, 0, t, p)
    assert links.ticks[0] == 3 and links.tick_ts[0, :3].tolist() == [1, 2, 3] and links.tick_mid[0, :3].tolist() == [5, 7, 8]


def test_every_pair_gets_its_turn():
    n = 20
    links, rng = new_links(n), np.random.default_rng(0)
    for t in range(3 * LEAST_TICKS):
        for k in range(n):
            see_tick(links, k, t * 10**7 + k, float(rng.normal()))
    for _ in range(REFRESH):
        end_round(links)
    assert ((links.lead[..., 4] > 0) | np.eye(n, dtype=bool)).all()


def test_rolling_correlation_is_the_decayed_one_and_outlasts_silence():
    rng = np.random.default_rng(0)
    moves = rng.normal(size=(3_000, 2)) @ np.array([[1.0, 0.6], [0.0, 0.8]])
    links = new_links(2)
    assert together(links, 0, 1) == (0.0, 0.0)
    for m in moves:
        end_cell(links, m)
    w = 0.5 ** (np.arange(len(moves))[::-1] / HALF_LIFE)
    c = (moves * w[:, None]).T @ moves
    rho, z = together(links, 0, 1)
    assert rho == pytest.approx(c[0, 1] / np.sqrt(c[0, 0] * c[1, 1])) == pytest.approx(0.6, abs=0.1)
    assert z == pytest.approx(c[0, 1] / np.sqrt((w**2 * (moves[:, 0] * moves[:, 1]) ** 2).sum()))
    end_silence(links, 10**9)
    assert together(links, 0, 1) == pytest.approx((rho, z))


def graph(correlation, lag_ms, z=9.0, same=None, beta=None) -> Graph:
    c = np.array(correlation, float)
    n = len(c)
    same = np.eye(n) if same is None else np.array(same, float)
    beta = c if beta is None else np.array(beta, float)
    significant = np.where(c != 0, z, 0.0)
    return Graph(tuple("ABCD"[:n]), same, c, (np.array(lag_ms) * 1_000_000).astype(np.int64), significant, beta, same, np.zeros((n, n)))


def test_a_shock_travels_along_leaders_and_not_back():
    """A leads B by 100 ms, B leads C: a shock of A reaches C through B, weakened twice; C's moves nobody."""
    c = [[0, 0.6, 0], [0.6, 0, 0.5], [0, 0.5, 0]]
    lag = [[0, -100, 0], [100, 0, -100], [0, 100, 0]]
    found = contagion(graph(c, lag), ridge=0.0)
    assert np.allclose(found.response, [[1, 0, 0], [0.6, 1, 0], [0.3, 0.5, 1]])
    assert np.allclose(found.risk, [0.45, 0.25, 0.0])


def test_what_one_leader_passes_on_is_not_counted_twice():
    """A and B move together; both are correlated with C's later move, but B only through A."""
    c = [[0, 0, 0.7], [0, 0, 0.63], [0.7, 0.63, 0]]
    lag = [[0, 0, -100], [0, 0, -100], [100, 100, 0]]
    same = [[1, 0.9, 0], [0.9, 1, 0], [0, 0, 1]]
    found = contagion(graph(c, lag, same=same), ridge=0.0)
    assert np.allclose(found.response[2], [0.7, 0.63, 1])


def test_weak_or_simultaneous_edges_carry_nothing_later():
    c, lag = [[0, 0.6], [0.6, 0]], [[0, -100], [100, 0]]
    assert np.allclose(contagion(graph(c, lag, z=3.0)).response, np.eye(2))
    assert np.allclose(contagion(graph(c, [[0, -10], [10, 0]])).response, np.eye(2))
    assert np.isfinite(contagion(graph([[0, 1], [1, 0]], lag, same=[[1, np.nan], [np.nan, 1]])).response).all()
    assert contagion(graph([[0]], [[0]])).risk.tolist() == [0.0]


def test_the_hedge_is_the_closest_other_at_the_ratio_of_least_variance():
    g = graph([[0, 0.5, -0.9], [0.5, 0, 0], [-0.9, 0, 0]], np.zeros((3, 3)), beta=[[0, 2, -3], [1, 0, 0], [1, 0, 0]])
    found = hedge(g, 0)
    assert found is not None and (found.instrument, found.by, found.ratio) == ("A", "C", 3.0)
    assert found.saved == pytest.approx(0.81)
    assert hedge(graph([[0, 0.5], [0.5, 0]], np.zeros((2, 2)), z=3.9), 0) is None
    assert hedge(graph([[0]], [[0]]), 0) is None
