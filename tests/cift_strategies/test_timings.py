"""Quantiles of a whole session in constant memory."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cift_strategies.timings import BOUNDS_MS, Histogram, Timing


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=300), st.floats(0, 1))
def test_a_quantile_is_within_one_per_cent_of_the_exact_one(values: list[int], q: float) -> None:
    histogram = Histogram()
    for v in values:
        histogram.add(v)
    exact = float(np.quantile(np.array(values), q, method="inverted_cdf"))
    assert abs(histogram.quantiles(q)[0] - exact) <= 0.01 * exact
    assert histogram.told()["max"] == max(values) and histogram.count == len(values) and histogram.sum == sum(values)


def test_the_first_value_of_a_long_session_counts_as_much_as_the_last() -> None:
    timing = Timing()
    for n in range(20_000):
        timing.add(8_000_000 if n < 300 else 40_000)
    told = timing.told("queue")
    assert told["count"] == 20_000 and told["max_ms"] == 8.0
    for name, exact in (("p50_ms", 0.04), ("p99_ms", 8.0), ("p999_ms", 8.0)):
        assert abs(told[name] / exact - 1) <= 0.01
    assert told["buckets"][BOUNDS_MS.index(0.05)] == 19_700 and told["buckets"][-1] == 20_000


def test_a_stage_that_was_never_timed_tells_nothing() -> None:
    told = Timing().told("queue")
    assert told["p50_ms"] is told["p999_ms"] is told["max_ms"] is None and told["count"] == 0
    assert len(Histogram()._buckets) == 58 * 64
