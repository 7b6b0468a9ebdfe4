"""What to do about one prediction, in prices and for people: the ensemble's recommendation with what it rests on.

The same for a window that a program sends to the API and for the Python API's results; it orders nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from catalog.events import SCALE, Instrument
from cift_models.ensemble import Config, recommend
from cift_strategies.server.requests import Recommendation

_TILT: Final = Config().tilt


class Said(Protocol):
    """A prediction, live or computed for a window."""

    @property
    def proba(self) -> NDArray[np.float64]: ...  # (H, 3)
    @property
    def magnitude(self) -> NDArray[np.float64]: ...  # (H,)
    @property
    def confidence(self) -> NDArray[np.float64]: ...  # (H,)
    @property
    def direction(self) -> Any: ...  # (H,)
    @property
    def regime(self) -> int: ...
    @property
    def votes(self) -> NDArray[np.float32]: ...  # (members, H, 3)


def recommendation(
    p: Said, instrument: Instrument, mid: float, spread_ticks: float, members: Sequence[str], regimes: Sequence[str],
    horizons_ns: Sequence[int], min_agreement: int = 0, confidence_threshold: float = 0.0, config: Config | None = None,
) -> Recommendation:  # fmt: skip
    """`mid` in currency and `spread_ticks`, both as at the prediction; NaN: nothing is traded. See `ensemble.recommend`."""
    tick = instrument.tick / SCALE
    regime = regimes[p.regime] if 0 <= p.regime < len(regimes) else None
    priced = bool(np.isfinite(mid) and np.isfinite(spread_ticks))
    cost = 2 * (instrument.taker_fee * mid + instrument.fee_per_unit / instrument.multiplier) / tick if priced else 0.0
    direction = np.asarray(p.direction, np.int8)
    r = recommend(p.proba, p.magnitude, direction, p.regime, spread_ticks if priced else 0.0, cost, config)
    h = r.horizon
    if h < 0:
        known = np.flatnonzero(np.isfinite(p.confidence))
        h = int(known[np.argmax(p.confidence[known])]) if len(known) else -1
    lead = (p.votes[:, h, 2] - p.votes[:, h, 0]).tolist() if h >= 0 else []
    tilts: dict[str, Any] = {m: None if v != v else 1 if v > _TILT else -1 if v < -_TILT else 0 for m, v in zip(members, lead)}
    side = int(direction[h]) if h >= 0 else 0
    agreement = sum(v == side for v in tilts.values()) if side else 0
    confidence = float(p.confidence[h]) if h >= 0 else None
    reason = r.reason
    if not priced:
        reason = "the book has no two sides"
    elif not reason and agreement < min_agreement:
        reason = f"{agreement} members agree, {min_agreement} are asked for"
    elif not reason and confidence is not None and confidence < confidence_threshold:
        reason = f"confidence {confidence:.2f}, {confidence_threshold:.2f} is asked for"
    go = not reason and r.direction != 0
    return Recommendation(
        should_trade=go, direction=r.direction if go else side, magnitude=r.magnitude, confidence=confidence,  # type: ignore[arg-type]
        position_size=r.size if go else 0.0, stop_loss=_on_tick(mid - side * r.stop * tick, tick) if go else None,
        take_profit=_on_tick(mid + side * r.target * tick, tick) if go else None, risk_reward=r.risk_reward,
        horizon_ms=horizons_ns[h] // 1_000_000 if h >= 0 else None, regime=regime, votes=tilts, agreement=agreement, reason=reason,
    )  # fmt: skip


def _on_tick(price: float, tick: float) -> float:
    return round(round(price / tick) * tick, 9)
