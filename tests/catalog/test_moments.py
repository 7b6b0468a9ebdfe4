"""Times as they are typed: one reading for every command line, exact to the nanosecond, UTC unless a zone is told."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog.errors import InputError
from catalog.moments import nanoseconds
from catalog.parquet import iso

NOON = 1_715_169_600 * 10**9  # 2024-05-08T12:00 UTC


@pytest.mark.parametrize(
    ("typed", "ns"),
    [
        ("2024-05-08", NOON - 43_200 * 10**9), ("20240508", NOON - 43_200 * 10**9), ("2024-05-08T12:00", NOON),
        ("2024-05-08 12:00:00", NOON), ("2024-05-08T12:00:00Z", NOON), ("2024-05-08T07:00-05:00", NOON),
        ("2024-05-08T12:00:00.000000001", NOON + 1), ("2024-05-08T13:00:00.5+01:00", NOON + 5 * 10**8), ("17", 17), (str(NOON), NOON),
        ("1969-12-31T23:59:59.9", -(10**8)), (None, None), ("", None),
    ],
)  # fmt: skip
def test_a_time_is_read_as_it_is_written(typed, ns):
    assert nanoseconds(typed) == ns


@pytest.mark.parametrize(
    "typed", ["noon", "2024-13-01", "2024-05-08T25:00", "12:00", "1.5", "2024-05-08.5", "9" * 30, "3000-01-01", "NaN", "-"]
)
def test_what_is_no_time_is_refused_in_one_line(typed):
    with pytest.raises(InputError, match="is no time: write 2024-05-08") as e:
        nanoseconds(typed)
    assert "\n" not in str(e.value)


@given(st.integers(-(2**62), 2**63 - 2))
def test_what_is_printed_is_read_back(ns):
    assert nanoseconds(iso(ns)) == ns == nanoseconds(iso(ns).removesuffix("Z"))
    assert nanoseconds(str(np.datetime64(ns, "ns"))) == ns
