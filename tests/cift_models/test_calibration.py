"""Calibration error: what chance alone makes of a true forecast is told apart from what is wrong with a false one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from catalog.events import SCALE
from cift_models.calibration import calibration, calibration_error

HORIZON, STEP = 5 * SCALE, SCALE // 5


def forecasts(seed: int, n: int = 6_000, off: float = 0.0):
    """A forecaster who knows a drift that changes every ten seconds and the law of the noise; `off` is what he adds to the drift wrongly.

    Labels overlap: 25 decisions fall into one horizon.
    """
    rng = np.random.default_rng(seed)
    k = HORIZON // STEP
    drift = np.repeat(rng.normal(size=n // 50 + 1), 50)[:n]
    path = np.concatenate([[0.0], np.cumsum(rng.normal(size=n + k))])
    move = drift + (path[k : k + n] - path[:n]) / math.sqrt(k)
    up, down = (np.array([0.5 * math.erfc((0.6 - s * (d + off)) / math.sqrt(2)) for d in drift]) for s in (1, -1))
    y = (1 + (move > 0.6).astype(int) - (move < -0.6)).astype(np.int8)
    return np.stack([down, 1 - up - down, up], axis=1), y, np.arange(n, dtype=np.int64) * STEP


def test_the_error_of_a_true_forecast_is_what_chance_makes_and_its_p_is_no_discovery():
    found = np.array([calibration(*forecasts(s), HORIZON) for s in range(40)])
    ece, expected, p, _ = found.T
    assert ece.mean() == pytest.approx(expected.mean(), rel=0.15) and expected.mean() > 0.02, "few independent labels make much of nothing"
    assert (p < 0.05).sum() <= 6 and 0.3 < np.mean(p) < 0.7  # 5 % of 40 are 2; more than 6 has probability 0.3 %


def test_the_error_of_a_false_forecast_is_found_and_its_size_without_what_chance_adds():
    true = [calibration(*forecasts(s, 20_000), HORIZON) for s in range(4)]
    false = [calibration(*forecasts(s, 20_000, off=0.3), HORIZON) for s in range(4)]
    assert max(c.p for c in false) < 0.02
    p, _, _ = forecasts(0, 20_000)
    q, _, _ = forecasts(0, 20_000, off=0.3)
    assert np.mean([c.debiased for c in false]) == pytest.approx(math.sqrt(((p - q) ** 2).mean()), rel=0.25)
    assert np.mean([c.debiased for c in true]) < 0.3 * np.mean([c.debiased for c in false])


def test_the_error_is_the_plain_one_and_needs_blocks_for_the_rest():
    p, y, ts = forecasts(0, 300)
    c = calibration(p, y, ts, HORIZON)
    assert c.ece == calibration_error(p, y) and math.isnan(c.p) and math.isnan(c.expected) and math.isnan(c.debiased)
    assert all(math.isnan(v) for v in calibration(p[:0], y[:0], ts[:0], HORIZON))
    again = calibration(*forecasts(1), HORIZON)
    assert again == calibration(*forecasts(1), HORIZON) and 0 < again.p <= 1


def test_however_the_decisions_are_thinned_chance_is_seen_as_large():
    """Fewer decisions of the same labels are no fewer labels."""
    whole, thin = calibration(*forecasts(2, 20_000), HORIZON), calibration(*(a[::5] for a in forecasts(2, 20_000)), HORIZON)
    assert thin.expected == pytest.approx(whole.expected, rel=0.25)
