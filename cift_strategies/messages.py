"""The messages that actors and strategies pass: FeatureVector -> Prediction -> Signal. Immutable; Python objects on Nautilus's bus.

Arrays inside are views of buffers that are not written again while anyone holds them: a subscriber may keep them, not write to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cift_models.features import NAMES

FEATURES: Final = "cift.features"  # topics
PREDICTIONS: Final = "cift.predictions"
SIGNALS: Final = "cift.signals"
MID: Final = NAMES.index("mid")
SPREAD: Final = NAMES.index("spread")


class _Fields(NamedTuple):
    instrument: int  # index into the instrument table
    ts: int  # ts_init of the newest event, ns
    block: NDArray[Any]  # EVENT (m,) and the rows of features (m, len(NAMES)) in which this vector's lie from `first` to before `stop`
    matrix: NDArray[np.float64]
    first: int
    stop: int
    closes: tuple[int, ...]  # rows of the vector at which a batch closes, ascending
    touch: tuple[int, int]  # size at the best bid and ask after the last event, 1e-9 units; told where a batch closes


class FeatureVector(_Fields):
    """What one callback brought: the events of one instrument and the book and features after each of them."""

    __slots__ = ()

    def __new__(
        cls, instrument: int, ts: int, events: NDArray[Any], rows: NDArray[np.float64], closes: tuple[int, ...],
        touch: tuple[int, int] = (0, 0),
    ) -> FeatureVector:  # fmt: skip
        return tuple.__new__(cls, (instrument, ts, events, rows, 0, len(events), closes, touch))

    @property
    def events(self) -> NDArray[Any]:
        """EVENT (n,)."""
        return self.block[self.first : self.stop]

    @property
    def rows(self) -> NDArray[np.float64]:
        """(n, len(NAMES))."""
        return self.matrix[self.first : self.stop]

    @property
    def mid(self) -> float:
        """After the last event, in currency; NaN where a side is empty."""
        return float(self.matrix[self.stop - 1, MID])

    @property
    def spread(self) -> float:
        """After the last event, in ticks."""
        return float(self.matrix[self.stop - 1, SPREAD])


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the ensemble says at the close of a batch, for each horizon; delivered at `ts + latency_ns`."""

    instrument: int
    ts: int  # ts_init of the newest event it saw, ns
    latency_ns: int  # from that event to delivery: computing and waiting for the predecessor
    horizons_ns: tuple[int, ...]  # H of them
    proba: NDArray[np.float64]  # (H, 3) down, flat, up; NaN: no opinion
    magnitude: NDArray[np.float64]  # (H,) expected |move| in ticks
    confidence: NDArray[np.float64]  # (H,)
    direction: tuple[int, ...]  # (H,) -1, +1 or, where it abstains, 0
    regime: int  # index of the regime's name, -1 unknown
    votes: NDArray[np.float32]  # (members, H, 3), NaN where a member abstains
    model_version: str

    @property
    def due(self) -> int:
        """When it is delivered, ns."""
        return self.ts + self.latency_ns


@dataclass(frozen=True, slots=True)
class Signal:
    """An entry that the strategy decided on, with what it rests upon."""

    instrument: int
    ts: int  # when it was decided, ns
    predicted_at: int  # ts of the prediction
    side: int  # +1 buy, -1 sell
    size: int  # 1e-9 units
    horizon_ns: int
    expected_ticks: float  # expected move in the direction of the trade
    cost_ticks: float  # spread and fees, both ways
    confidence: float
    regime: int
    limit: int  # price limits, 1e-9 units
    stop: int
    target: int
    entry: str = "cross"  # or a resting order: "join" at the touch, "improve" a tick inside it
