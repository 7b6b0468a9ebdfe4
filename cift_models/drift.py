"""Feature drift: how far the distribution of each feature while trading lies from that of the training range.

:class:`Reference` holds, for each instrument and feature, bins with equal shares of the training range; it travels with the artifact.
:class:`Counts` takes feature rows along a stream in bounded memory and gives the population stability index.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from cift_models.labels import F64, I64

BINS: Final = 10  # of equal shares in the training range; one more for what is missing
FLOOR: Final = 1e-4  # least share of a bin, so that an empty one does not make the index infinite
FILE: Final = "drift.npz"


def psi(expected: F64, actual: F64) -> F64:
    """Population stability index of shares (..., bins), each summing to one: sum (a - e) ln(a / e) (Siddiqi 2006; Yurdakul 2018, eq. 2).

    It is the symmetrised Kullback-Leibler divergence. By custom below 0.1 is stable, above 0.25 a shift. Shares count as FLOOR at least.
    """
    e, a = np.maximum(expected, FLOOR), np.maximum(actual, FLOOR)
    return np.asarray(((a - e) * np.log(a / e)).sum(axis=-1))


class Reference(NamedTuple):
    """`edges` (I, F, BINS - 1) between bins, NaN where a feature was never known; `shares` (I, F, BINS + 1), the last of missing values."""

    edges: F64
    shares: F64

    @classmethod
    def of(cls, rows: NDArray[np.floating[Any]], instrument: I64, instruments: int) -> Self:
        """From feature rows (n, F) of the training range and their instruments (n,)."""
        f = rows.shape[1]
        edges, shares = np.full((instruments, f, BINS - 1), np.nan), np.zeros((instruments, f, BINS + 1))
        at = np.arange(1, BINS) / BINS
        for k in range(instruments):
            mine = np.sort(rows[instrument == k], axis=0)  # missing values last
            known = np.isfinite(mine).sum(axis=0)
            for c in np.flatnonzero(known):
                own = mine[:, c][np.isfinite(mine[:, c])]
                edges[k, c] = own[np.minimum((at * len(own)).astype(np.int64), len(own) - 1)]
            if len(mine):
                shares[k] = binned(mine, edges[k]) / len(mine)
        return cls(edges, shares)

    def save(self, folder: Path) -> None:
        np.savez(folder / FILE, edges=self.edges, shares=self.shares)

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """None where the artifact is of a time before there were references."""
        if not (folder / FILE).is_file():
            return None
        with np.load(folder / FILE, allow_pickle=False) as z:
            return cls(z["edges"], z["shares"])


def binned(rows: NDArray[np.floating[Any]], edges: F64) -> F64:
    """How many of `rows` (n, F) fall into each bin of `edges` (F, BINS - 1): (F, BINS + 1); a value on an edge belongs to the bin above."""
    out = np.zeros((len(edges), BINS + 1))
    for c, edge in enumerate(edges):
        v = rows[:, c]
        lost = ~np.isfinite(v) | np.isnan(edge[0])
        out[c, :BINS] = np.bincount(np.searchsorted(edge, v[~lost], side="right"), minlength=BINS)[:BINS]
        out[c, BINS] = np.count_nonzero(lost)
    return out


class Counts:
    """Counts feature rows along a stream; :meth:`psi` compares them with the `reference`, whose instruments are those of the stream."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.counts = np.zeros_like(reference.shares)

    def push(self, rows: NDArray[np.floating[Any]], instrument: NDArray[np.integer[Any]]) -> None:
        with np.errstate(over="ignore"):
            small = np.asarray(rows, np.float32)  # as the reference saw them
        for k in np.unique(instrument):
            self.counts[k] += binned(small[instrument == k], self.reference.edges[k])

    def psi(self) -> F64:
        """(I, F), NaN where an instrument was not seen, or a feature neither here nor in the training range."""
        n = self.counts.sum(axis=2, keepdims=True)
        actual = self.counts / np.maximum(n, 1)
        found = psi(self.reference.shares, actual)
        absent = (self.reference.shares[..., BINS] == 1) & (actual[..., BINS] == 1)
        return np.where((n[..., 0] == 0) | absent, np.nan, found)
