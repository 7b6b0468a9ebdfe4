"""Statistics of a run equal closed forms, published examples, enumeration, or a library that computes them another way."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, kurtosis, norm, skew

from cift_strategies.attribution import wilson
from cift_strategies.capacity import capacity
from cift_strategies.performance import Fills, deflated_sharpe, probabilistic_sharpe, sharpe_error
from cift_strategies.resampling import bootstrap, deepest, gaining, ratio, shuffled_drawdowns, stationary_draws
from cift_strategies.shortfall import PARTS, legs, repriced, shortfall

MS = 1_000_000

# The Sharpe ratio.


def test_the_probabilistic_ratio_equals_the_papers_hedge_fund() -> None:
    """Bailey and Lopez de Prado (2012): 24 months at 0.458 a month; taken as normal 98.2 %, with skew -2.448 and kurtosis 10.164 91.3 %."""
    assert probabilistic_sharpe(0.458, 24) == pytest.approx(0.982, abs=5e-4)
    assert probabilistic_sharpe(0.458, 24, -2.448, 10.164) == pytest.approx(0.913, abs=5e-4)


@pytest.mark.parametrize("draw", ["normal", "gamma"])
def test_the_standard_error_is_how_far_ratios_of_simulated_samples_spread(draw: str) -> None:
    rng, n = np.random.default_rng(7), 300
    sample = rng.normal(0.2, 1, (20_000, n)) if draw == "normal" else 0.2 + (rng.gamma(4.0, 1, (20_000, n)) - 4) / 2
    g3, g4 = (0.0, 3.0) if draw == "normal" else (1.0, 4.5)  # gamma of shape 4: skew 2 / sqrt 4, kurtosis 3 + 6 / 4
    spread = float((sample.mean(axis=1) / sample.std(axis=1, ddof=1)).std())
    assert sharpe_error(0.2, n, g3, g4) == pytest.approx(spread, rel=0.03)
    if draw == "normal":
        assert sharpe_error(0.2, n) == pytest.approx(np.sqrt((1 + 0.2**2 / 2) / (n - 1)), rel=1e-12)


def test_every_figure_of_a_ratio_follows_from_its_moments() -> None:
    r = np.random.default_rng(4).standard_t(5, 400) * 0.01 + 0.0008
    d = deflated_sharpe(r)
    g3, g4, n = float(skew(r)), float(kurtosis(r, fisher=False)), len(r)
    sr = float(r.mean() / r.std(ddof=1))
    assert (d.ratio, d.skew, d.kurtosis) == pytest.approx((sr, g3, g4))
    assert d.error == pytest.approx(np.sqrt((1 - g3 * sr + (g4 - 1) / 4 * sr**2) / (n - 1)))
    assert d.probabilistic == d.deflated == pytest.approx(norm.cdf(sr / d.error))
    assert d.error_normal == pytest.approx(np.sqrt((1 + sr**2 / 2) / (n - 1)))
    assert norm.cdf(sr / d.error * np.sqrt((d.least - 1) / (n - 1))) == pytest.approx(0.95), "after so many observations"
    assert np.isnan(deflated_sharpe(-r).least)


def test_a_sweep_may_tell_the_ratios_of_its_trials_or_their_variance() -> None:
    rng = np.random.default_rng(5)
    r, ratios = rng.normal(0.1, 1, 500), rng.normal(0, 0.06, 40).tolist()
    by_ratios = deflated_sharpe(r, 40, ratios)
    assert deflated_sharpe(r, 40, trial_variance=float(np.var(ratios, ddof=1))) == by_ratios
    assert by_ratios.deflated < by_ratios.probabilistic
    best = rng.normal(0, 0.06, (20_000, 40)).max(axis=1).mean()
    assert deflated_sharpe(r, 40, trial_variance=0.06**2).expected_best == pytest.approx(best, rel=0.02), "the best of 40 without skill"


# Resampling.


def test_the_deepest_fall_is_the_largest_of_all_pairs_of_moments() -> None:
    rng = np.random.default_rng(6)
    for _ in range(50):
        path = np.cumsum(rng.normal(size=12))
        whole = np.r_[0.0, path]
        assert deepest(path) == pytest.approx(max(whole[i] - whole[j] for i in range(13) for j in range(i, 13)))


def test_random_orders_of_trades_are_spread_as_all_orders_are() -> None:
    net = np.array([5.0, -3.0, 2.0, -4.0, 1.5, -0.5])
    every = np.sort([float(deepest(np.cumsum(p))) for p in permutations(net)])
    found = shuffled_drawdowns(net, 20_000, seed=1)
    assert found.actual == float(deepest(np.cumsum(net)))
    assert found.worse == pytest.approx((every >= found.actual - 1e-9).mean(), abs=0.015)
    for q in (0.05, 0.25, 0.5, 0.75, 0.95):
        at = np.quantile(every, q) + 1e-9
        assert (found.draws <= at).mean() == pytest.approx((every <= at).mean(), abs=0.015)
    assert np.array_equal(found.draws, shuffled_drawdowns(net, 20_000, seed=1).draws)
    assert shuffled_drawdowns(np.array([1.0, 2.0])).draws.max() == 0


def test_blocks_of_the_bootstrap_have_the_length_that_was_asked_for_and_go_round_the_end() -> None:
    at = stationary_draws(1_000, 7.0, 300, seed=2)
    follows = at[:, 1:] == (at[:, :-1] + 1) % 1_000
    assert at.min() == 0 and at.max() == 999
    assert 1 / (1 - follows.mean()) == pytest.approx(7.0, rel=0.03)
    assert np.bincount(at.ravel(), minlength=1_000).std() < 0.15 * 300, "no moment is favoured"


def test_bootstrap_intervals_are_those_of_arch() -> None:
    from arch.bootstrap import StationaryBootstrap

    rng = np.random.default_rng(8)
    e = rng.normal(0.05, 1, 1_000)
    x = np.array([e[0], *(e[i] + 0.5 * e[i - 1] for i in range(1, 1_000))])
    ours = bootstrap(x, {"mean": lambda v: np.asarray(v.mean(axis=-1)), "ratio": ratio}, draws=4_000)
    theirs = StationaryBootstrap(1_000 ** (1 / 3), x, seed=3).conf_int(
        lambda v: np.array([v.mean(), v.mean() / v.std(ddof=1)]), 4_000, method="percentile"
    )
    for k, name in enumerate(("mean", "ratio")):
        value, low, high = ours[name]
        width = high - low
        assert (low, high) == pytest.approx(tuple(theirs[:, k]), abs=0.06 * width)
        assert low < value < high
    shuffled = bootstrap(rng.permutation(x), {"mean": lambda v: np.asarray(v.mean(axis=-1))})["mean"]
    assert width > 0 and ours["mean"][2] - ours["mean"][1] > 1.1 * (shuffled[2] - shuffled[1]), "dependence widens the interval"


def test_too_few_steps_have_no_interval() -> None:
    assert np.isnan(bootstrap(np.ones(9), {"ratio": ratio})["ratio"]).all()
    assert np.isnan(bootstrap(np.ones(50), {"ratio": ratio})["ratio"]).all(), "what never varies has no ratio"
    assert gaining(np.array([[1.0, -1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]])).tolist() == [2 / 3, 0.0]


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (3, 5), (92, 148), (5, 5)])
def test_the_interval_of_a_hit_rate_is_wilsons(hits: int, n: int) -> None:
    theirs = binomtest(hits, n).proportion_ci(0.95, "wilson")
    assert wilson(hits, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


# Capacity.


def test_capacity_is_where_impact_eats_the_profit() -> None:
    rng = np.random.default_rng(9)
    size, worth, sigma, volume = rng.uniform(10, 200, 30), np.full(30, 0.01), rng.uniform(50, 150, 30), rng.uniform(1e6, 3e6, 30)
    found = capacity(40.0, size, worth, sigma, volume)

    def net(x: float) -> float:
        extra = sum(
            x * q * w * s * (np.sqrt(x * q / v) - np.sqrt(q / v)) for q, w, s, v in zip(size, worth, sigma, volume)
        )
        return float(x * 40.0 - extra)

    assert found.net == pytest.approx([net(float(x)) for x in found.multiples])
    assert net(found.zero) == pytest.approx(0, abs=1e-6)
    assert all(net(found.best) >= net(found.best * k) for k in (0.9, 0.99, 1.01, 1.1))
    assert net(1.0) == pytest.approx(40.0), "the size traded bears its impact already"
    assert 0 < found.best < found.zero


def test_a_loss_beyond_its_impact_and_an_unknown_market_have_no_capacity() -> None:
    one = np.ones(1)
    assert np.isnan(capacity(-1e9, one, one, one, one).zero)
    unknown = capacity(5.0, one, one, np.full(1, np.nan), np.zeros(1))
    assert np.isnan(unknown.best) and unknown.net == pytest.approx(5.0 * unknown.multiples)


# Implementation shortfall.


def _fills(rows: list[dict[str, Any]]) -> Fills:
    def column(name: str, kind: Any = np.float64) -> Any:
        return np.array([r[name] for r in rows], kind)

    return Fills(
        column("ts", np.int64), column("instrument", object), column("role", object), column("side", np.int8), column("price"),
        column("size"), column("fee"), column("mid"), column("decided"), np.full(len(rows), 0.01), np.full(len(rows), 0.01),
    )  # fmt: skip


def _one_trade() -> Any:
    """Bought on a decision that saw 100.00, when the mid was 100.01; the order arrived at 100.02 and paid 100.04 where the spread was two
    ticks. A market order to sell left at 100.10, arrived at 100.08, and got 100.07. 50 units, fees of 0.30 each."""
    common = {"instrument": "A", "size": 50.0, "fee": 0.3}
    fills = _fills([
        {**common, "ts": 12 * MS, "role": "entry", "side": 1, "price": 100.04, "mid": 100.02, "decided": 100.01},
        {**common, "ts": 502 * MS, "role": "exit", "side": -1, "price": 100.07, "mid": 100.08, "decided": 100.01},
    ])  # fmt: skip
    log = {
        "ts": np.array([11, 12, 12, 501, 502]) * MS, "order": np.array([0, 0, 0, 3, 3]),
        "event": np.array(["Submitted", "Accepted", "Filled", "Submitted", "Filled"], object),
        "mid": np.array([100.01, 100.02, 100.02, 100.10, 100.08]), "spread": np.array([2.0, 2.0, 2.0, 2.0, 2.0]),
    }  # fmt: skip
    seen = lambda _instrument, ts: (ts - 10 * MS, np.full(len(ts), 100.0))  # noqa: E731
    return legs(fills, np.array([0, 3]), np.zeros(2, bool), log, seen)


def test_a_trade_is_taken_apart_as_one_would_by_hand() -> None:
    parts = shortfall(_one_trade())
    entry, exit_ = ({p: float(v[i]) for p, v in parts.items()} for i in (0, 1))
    assert entry == pytest.approx(dict(zip(PARTS, (0.5, 0.5, 0.5, 0.5, 0.3))))
    assert exit_ == pytest.approx(dict(zip(PARTS, (0.0, 1.0, 0.5, 0.0, 0.3))))
    paper, net = 50 * (100.10 - 100.0), 50 * (100.07 - 100.04) - 0.6
    assert paper - sum(entry.values()) - sum(exit_.values()) == pytest.approx(net)


def test_a_resting_entry_earns_its_half_spread_and_what_is_not_known_counts_with_the_next_part() -> None:
    got = _one_trade()
    maker = shortfall(type(got)(got.fills, np.array([True, False]), *(getattr(got, n) for n in got.__slots__[2:])))
    assert maker["spread"][0] == pytest.approx(-0.5) and maker["slippage"][0] == pytest.approx(1.5)
    empty = {c: np.zeros(0) for c in ("ts", "order", "event", "mid", "spread")}
    bare = shortfall(legs(got.fills, np.array([0, 3]), np.zeros(2, bool), empty, lambda i, t: (t, np.zeros(len(t)))))
    assert bare["decision latency"].tolist() == [0, 0] and bare["spread"].tolist() == [0, 0]
    assert bare["order latency"] == pytest.approx([0.5, 0.0]), "the mid when the entry was decided stands beside its fill"
    assert bare["slippage"] == pytest.approx([1.0, 0.5])


def test_on_a_steady_drift_a_later_fill_costs_slope_times_delay() -> None:
    got = _one_trade()
    slope = 2e-9  # price units a ns
    mid_at = lambda _instrument, ts: 100 + slope * ts  # noqa: E731
    # orders: sent at 11 and 501 ms, both took 1 ms; the buy pays more, the sale gets more
    assert repriced(got, mid_at, [MS, 4 * MS], "order") == pytest.approx([0.0, 0.0], abs=1e-9)
    only = type(got)(got.fills, np.array([False, True]), *(getattr(got, n) for n in got.__slots__[2:]))  # the sale rested
    assert repriced(only, mid_at, [0, MS, 11 * MS], "order") == pytest.approx([50 * slope * MS, 0.0, -50 * slope * 10 * MS], abs=1e-9)
    # decisions: the entry's took 10 ms
    assert repriced(got, mid_at, [0, 10 * MS, 20 * MS], "decision") == pytest.approx(
        [50 * slope * 10 * MS, 0.0, -50 * slope * 10 * MS], abs=1e-9
    )
    nowhere = lambda _instrument, ts: np.full(len(ts), np.nan)  # noqa: E731
    assert repriced(got, nowhere, [0, MS], "order").tolist() == [0, 0]
