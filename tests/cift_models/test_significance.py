"""Tests of forecasts: right as often as they say on losses that overlap, and nothing is claimed of markets with nothing to find."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from catalog.events import PAUSE_NS
from cift_models.calibration import calibration
from cift_models.labels import H
from cift_models.significance import ALPHA, LEAST, agreement, confidence_set, holm, mean_test, stretched, stretches
from cift_models.validate import _gain, adjust, block_bootstrap, claims
from cift_models.windows import HORIZONS_NS, SECOND


def decisions(rng, n=3_000, per_second=5.0):
    return np.cumsum(rng.exponential(SECOND / per_second, n)).astype(np.int64)


def overlapping(rng, ts, horizon_ns):
    """What losses of labels over [t, t + horizon] do: the mean of white noise over that window, of variance about 1."""
    grid = np.arange(ts[0], ts[-1] + 2 * horizon_ns, horizon_ns // 8)
    walk = np.concatenate([[0.0], np.cumsum(rng.normal(size=len(grid)))])
    at = np.searchsorted(grid, ts)
    return (walk[at + 8] - walk[at]) / np.sqrt(8)


def test_stretches_sum_what_falls_in_them_and_leave_nights_out():
    ts = np.array([0, 3, 9, 10, 25, 1_000, 1_001], np.int64)
    sums, count = stretched(np.arange(7.0), ts, 10)
    assert sums.tolist() == [3, 3, 4, 11] and count.tolist() == [3, 1, 1, 2]
    assert len(stretched(np.ones(10_000), np.arange(10_000), 1, 50)[0]) == 50


def test_on_evenly_spaced_losses_it_is_the_published_formula():
    rng = np.random.default_rng(0)
    d = rng.normal(0.1, 1, 400)
    got = mean_test(d, np.arange(400) * 10, 10)
    e, size, h = d - d.mean(), 400, 2
    lags = int(4 * (size / 100) ** (2 / 9))
    gamma = [float((e[j:] * e[: size - j]).sum() / size) for j in range(lags + 1)]
    variance = (gamma[0] + 2 * sum((1 - j / (lags + 1)) * gamma[j] for j in range(1, lags + 1))) / size
    t = d.mean() / variance**0.5 * ((size + 1 - 2 * h + h * (h - 1) / size) / size) ** 0.5
    assert got.t == pytest.approx(t) and got.p == pytest.approx(stats.t.sf(t, size - 1)) and got.stretches == 400


@pytest.mark.parametrize("horizon", HORIZONS_NS[:3])
def test_among_equal_forecasts_one_in_forty_looks_better_however_labels_overlap(horizon):
    found = naive = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        ts = decisions(rng, 1_500)
        d = overlapping(rng, ts, horizon)
        found += mean_test(d, ts, horizon).p < ALPHA
        naive += d.mean() > 1.96 * d.std() / np.sqrt(len(d))
    assert found / 400 < 0.05
    assert horizon < SECOND or naive / 400 > 0.1, "a test that takes labels as independent is wrong four times as often or more"


def test_a_real_gain_is_seen():
    rng = np.random.default_rng(1)
    ts = decisions(rng)
    d = overlapping(rng, ts, SECOND)
    assert mean_test(d - d.mean() + 0.3, ts, SECOND).p < 0.001 < 0.999 < mean_test(d - d.mean() - 0.3, ts, SECOND).p


def test_too_little_and_constant_differences_are_no_accident():
    ts = np.arange(LEAST - 1) * SECOND
    assert np.isnan(mean_test(np.ones(len(ts)), ts, SECOND).p) and np.isnan(mean_test(np.empty(0), ts[:0], SECOND).mean)
    ts = np.arange(100) * SECOND
    assert [mean_test(np.full(100, v), ts, SECOND).p for v in (0.0, 1.0, -1.0)] == [1.0, 0.0, 1.0]


def test_holm_equals_the_published_example_and_counts_what_was_not_tested():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, np.nan]).tolist() == [0.02, 1.0] and not len(holm([]))


def table(seed, gain=0.0):
    """Three instruments x horizons x three baselines, whose losses differ from ours by overlapping noise around `gain`."""
    rng = np.random.default_rng(seed)
    rows = []
    for k in range(3):
        ts = decisions(rng, 1_000, 2.0)
        for h in range(H - 1):
            common = overlapping(rng, ts, HORIZONS_NS[h])
            d = (gain + 0.7 * common + 0.7 * overlapping(rng, ts, HORIZONS_NS[h]) for _ in range(3))
            over = {name: _gain(x, ts, HORIZONS_NS[h], seed) for name, x in zip("abc", d)}
            rows.append({"instrument": f"I{k}", "horizon": f"{h}", "verdict": "sufficient", "gain": over})
    adjust(rows)
    return rows


def test_in_null_markets_nothing_is_claimed_and_in_planted_ones_it_is():
    tables = [table(seed) for seed in range(12)]
    assert [claims(t) for t in tables] == [[]] * 12
    assert sum(any(g["p_holm"] < ALPHA for r in t for g in r["gain"].values()) for t in tables) <= 2
    raw = sum(all(g["interval"][0] > 0 for g in r["gain"].values()) for t in tables for r in t)
    assert raw >= 1, "without adjustment something would be claimed of nothing"
    assert len(claims(table(0, gain=0.5))) == 9


def test_a_row_with_too_few_labels_costs_the_others_nothing_and_claims_nothing():
    rows = table(0, gain=0.5)
    rows[0]["verdict"] = "insufficient"
    adjust(rows)
    assert len(claims(rows)) == 8 and all(g["p_holm"] == 1 for g in rows[0]["gain"].values())


def test_the_confidence_set_holds_the_best_and_what_cannot_be_told_from_it():
    rng = np.random.default_rng(2)
    ts = decisions(rng)
    noise = np.stack([overlapping(rng, ts, SECOND) for _ in range(4)], axis=1)
    losses = noise - noise.mean(axis=0) + np.array([1.0, 1.005, 1.6, 1.0])
    losses[:, 3] = losses[:, 0]
    got = confidence_set(losses, ts, SECOND, ["best", "near", "worse", "twin"], seed=3)
    assert got["included"] == ["best", "near", "twin"] and got["p"]["worse"] < 0.02
    assert got == confidence_set(losses, ts, SECOND, ["best", "near", "worse", "twin"], seed=3)
    assert confidence_set(losses[:, [0, 3]], ts, SECOND, ["best", "twin"])["included"] == ["best", "twin"]
    assert confidence_set(losses[:9], ts[:9], SECOND, list("abcd"))["included"] == []


def test_a_rule_that_knows_more_than_confidence_is_seen_and_one_that_knows_less_is_not():
    rng = np.random.default_rng(4)
    n = 4_000
    ts, up = decisions(rng, n), rng.random(n) * 0.6
    proba = np.stack([0.6 - up, np.full(n, 0.4), up], axis=1)
    side = np.where(up >= 0.3, 1, -1).astype(np.int8)
    move = np.where(rng.random(n) < 0.5, side, -side) * 2.0
    known = (move * side > 0) & (rng.random(n) < 0.3)
    good = agreement(proba, np.where(known, side, 0).astype(np.int8), move, np.full(n, 0.5), ts, SECOND)
    assert good["rule"]["net_ticks"] == pytest.approx(1.5) and good["rule"]["hit_rate"] == 1.0
    assert good["difference"] == pytest.approx(2.0, abs=0.2) and good["p"] < 1e-6
    blind = agreement(proba, np.where(rng.random(n) < 0.3, side, 0).astype(np.int8), move, np.full(n, 0.5), ts, SECOND)
    assert abs(blind["difference"]) < 0.25 and blind["p"] > 0.01
    assert agreement(proba, np.zeros(n, np.int8), move, np.full(n, 0.5), ts, SECOND) == {"cover": 0.0}


def test_nights_and_weekends_take_nothing_from_the_tests_of_several_sessions():
    """By the calendar a blocks' bootstrap of three sessions had three blocks, and no interval."""
    rng = np.random.default_rng(3)
    inside = decisions(rng, 9_000)
    session = np.arange(9_000) // 3_000
    d = 0.1 + overlapping(rng, inside, SECOND)
    proba, y = rng.dirichlet((3, 3, 3), 9_000), rng.integers(0, 3, 9_000).astype(np.int8)
    found = []
    for night in (PAUSE_NS, 86_400 * SECOND, 3 * 86_400 * SECOND):
        ts = inside + session * (night + SECOND)
        group = stretches(ts, SECOND, 200)
        assert 190 <= group[-1] <= 200 and (np.diff(group) >= 0).all()
        interval = block_bootstrap(d, ts, 2 * SECOND, 1)
        assert 0 < interval.low < d.mean() < interval.high
        models = confidence_set(np.stack([d, d + 1], axis=1), ts, SECOND, ("a", "b"))
        assert models["included"] == ["a"]
        found.append((interval, mean_test(d, ts, SECOND), calibration(proba, y, ts, SECOND), group.tolist()))
    assert found[0] == found[1] == found[2]
