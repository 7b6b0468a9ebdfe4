"""Combinatorial purged cross-validation and walk-forward: every split against a walk over all pairs of rows."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest

from catalog.errors import InputError
from cift_models.validate import cpcv, expanding, groups, paths, within

DAY = np.array([[0, 9_999]])


@pytest.fixture(params=range(4))
def rows(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(request.param)
    ts = np.sort(rng.integers(0, 10_000, 300))
    return ts, ts + rng.integers(0, 900, 300)


@pytest.mark.parametrize(("n", "k", "embargo"), [(5, 1, 0), (6, 2, 0), (6, 2, 250), (4, 3, 40)])
def test_no_row_is_chosen_on_whose_life_meets_a_judged_one(rows: tuple[np.ndarray, np.ndarray], n: int, k: int, embargo: int) -> None:
    ts, known = rows
    edges = groups(DAY, n)
    found = cpcv(ts, known, edges, k, embargo)
    assert [f.tested for f in found] == list(combinations(range(n), k)) and len(found) == comb(n, k)
    group = [max(g for g in range(n) if edges[g] <= t) for t in ts]
    for f in found:
        assert f.test.tolist() == [i for i, g in enumerate(group) if g in f.tested]
        wanted = []
        for i in range(len(ts)):
            ok = group[i] not in f.tested
            for g in f.tested:
                last = max([int(edges[g + 1]) - 1, *(int(known[j]) for j in range(len(ts)) if group[j] == g)])
                ok = ok and (known[i] < edges[g] or ts[i] > last + embargo)
            if ok:
                wanted.append(i)
        assert f.train.tolist() == wanted
        assert 0 < len(f.train) < len(ts) - len(f.test) or k == n - 1


def test_walking_forward_only_what_was_known_is_chosen_on(rows: tuple[np.ndarray, np.ndarray]) -> None:
    ts, known = rows
    edges = groups(DAY, 5)
    for g, f in enumerate(expanding(ts, known, edges, 100), 1):
        assert f.tested == (g,) and (known[f.train] + 100 < edges[g]).all()
        assert f.test.tolist() == np.flatnonzero((ts >= edges[g]) & (ts < edges[g + 1])).tolist()
        left = np.setdiff1d(np.flatnonzero(ts < edges[g]), f.train)
        assert (known[left] + 100 >= edges[g]).all() and len(left)


@pytest.mark.parametrize(("n", "k"), [(4, 1), (6, 2), (5, 3)])
def test_each_path_walks_through_all_groups_and_each_judgement_is_in_one(n: int, k: int) -> None:
    splits, found = list(combinations(range(n), k)), paths(n, k)
    assert found.shape == (comb(n - 1, k - 1), n)
    used = [(int(i), g) for path in found for g, i in enumerate(path)]
    assert all(g in splits[i] for i, g in used) and len(set(used)) == len(used) == comb(n, k) * k


def test_groups_cover_all_of_the_time_even_of_a_year_in_nanoseconds() -> None:
    edges = groups(np.array([[1_700_000_000 * 10**9, 1_731_536_000 * 10**9]]), 320)
    assert edges[0] == 1_700_000_000 * 10**9 and edges[-1] == 1_731_536_000 * 10**9 + 1 and (np.ptp(np.diff(edges)) <= 1)


@pytest.mark.parametrize("seed", range(5))
def test_groups_have_equal_shares_of_the_hours_and_nights_count_nothing(seed: int) -> None:
    hours = np.sort(np.random.default_rng(seed).choice(3_000, 10, replace=False)).reshape(5, 2)
    open_ = np.concatenate([np.arange(a, b + 1) for a, b in hours])
    place = np.searchsorted(groups(hours, 7)[1:-1], open_, "right")
    assert np.ptp(np.bincount(place, minlength=7)) <= 1 and (np.diff(place) >= 0).all()
    part = within(hours, *sorted(np.random.default_rng(seed).choice(3_000, 2, replace=False)))
    low, high = (part[0, 0], part[-1, 1]) if len(part) else (0, -1)
    assert [t for a, b in part for t in range(a, b + 1)] == [t for t in open_ if low <= t <= high]
    assert not len(within(hours, 2_000, 1_000))


def test_there_must_be_a_group_to_choose_on() -> None:
    with pytest.raises(InputError, match="test groups of 4"):
        cpcv(np.arange(4), np.arange(4), groups(np.array([[0, 3]]), 4), 4)
