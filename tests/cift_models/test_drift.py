"""Drift is none where nothing has changed, and as large as theory says where something has; what is watched live is what was trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import entropy, norm

from cift_models.drift import BINS, FLOOR, Counts, Reference, binned, psi


def test_the_index_is_the_divergence_in_both_directions() -> None:
    rng = np.random.default_rng(0)
    e, a = rng.dirichlet(np.full(11, 9.0), 50), rng.dirichlet(np.full(11, 9.0), 50)
    assert min(e.min(), a.min()) > FLOOR
    assert psi(e, a) == pytest.approx([entropy(p, q) + entropy(q, p) for p, q in zip(e, a)], rel=1e-12)
    assert psi(e, e) == pytest.approx(np.zeros(50))


@pytest.mark.parametrize("shift", [0.0, 0.2, 0.5, 1.0])
def test_a_shifted_normal_drifts_by_what_its_binned_distributions_say(shift: float) -> None:
    """Equal shares before; the shares after follow from the normal distribution. Unbinned the index would be the shift squared."""
    rng, n = np.random.default_rng(1), 200_000
    reference = Reference.of(rng.normal(size=(n, 1)), np.zeros(n, np.int64), 1)
    counts = Counts(reference)
    counts.push(rng.normal(shift, 1, (n, 1)), np.zeros(n, np.int64))
    after = np.diff(norm.cdf(np.r_[-np.inf, norm.ppf(np.arange(1, BINS) / BINS), np.inf] - shift))
    expected = float(((after - 0.1) * np.log(after / 0.1)).sum())
    assert counts.psi()[0, 0] == pytest.approx(expected, rel=0.05, abs=5e-4)
    assert counts.psi()[0, 0] <= shift**2 + 5e-4


def test_bins_are_counted_as_one_would_by_hand_and_in_pieces_as_in_the_whole() -> None:
    rng = np.random.default_rng(2)
    rows = np.round(rng.normal(size=(3_000, 4)), 1).astype(np.float32)  # many ties
    rows[rng.random(rows.shape) < 0.1] = np.nan
    rows[:, 3] = np.nan
    instrument = rng.integers(0, 2, 3_000)
    reference = Reference.of(rows, instrument, 2)
    for k in range(2):
        mine = rows[instrument == k]
        for c in range(3):
            known = np.sort(mine[:, c][np.isfinite(mine[:, c])])
            edges = [known[len(known) * j // BINS] for j in range(1, BINS)]
            assert reference.edges[k, c].tolist() == edges
            slow = [sum(1 for v in known if sum(v >= e for e in edges) == b) for b in range(BINS)]
            assert binned(mine, reference.edges[k])[c].tolist() == [*slow, len(mine) - len(known)]
    whole, pieces = Counts(reference), Counts(reference)
    whole.push(rows, instrument)
    for a in range(0, 3_000, 700):
        pieces.push(rows[a : a + 700], instrument[a : a + 700])
    assert np.array_equal(whole.counts, pieces.counts)
    assert whole.psi()[:, :3] == pytest.approx(np.zeros((2, 3)), abs=1e-12), "the training range itself does not drift"
    assert np.isnan(whole.psi()[:, 3]).all(), "of a feature that was never known nothing is said"


def test_a_feature_that_goes_missing_drifts_and_an_unseen_instrument_says_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    rows, instrument = rng.normal(size=(2_000, 1)), np.repeat([0, 1], 1_000)
    Reference.of(rows, instrument, 2).save(tmp_path)
    reference = Reference.load(tmp_path)
    assert reference is not None
    counts = Counts(reference)
    counts.push(np.full((500, 1), np.nan), np.zeros(500, np.int64))
    found = counts.psi()
    assert found[0, 0] > 5 and np.isnan(found[1, 0])
    assert Reference.load(tmp_path / "nowhere") is None
