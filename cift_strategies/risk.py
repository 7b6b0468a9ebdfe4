"""Positions, profit and limits: what has been traded, what it is worth, how much more may be risked.

Pure arithmetic on fills and mids, per currency; knows nothing of Nautilus. Prices are floats in currency, sizes ints in 1e-9 units.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from catalog.events import SCALE, Instrument

DAY_NS = 86_400 * SCALE


class Limits(BaseModel):
    """What may be risked, as shares of `capital` (per currency, also the starting balance)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    capital: Annotated[float, Field(gt=0)] = 1_000_000.0
    risk_per_trade: Annotated[float, Field(gt=0, le=1)] = 0.0005  # of equity, lost when the stop is hit
    max_notional: Annotated[float, Field(gt=0)] = 0.25  # of equity, one position
    max_position: Annotated[float | None, Field(gt=0)] = None  # units of the instrument
    max_order: Annotated[float | None, Field(gt=0)] = None  # units of one entry
    max_order_rate: Annotated[int | None, Field(gt=0)] = None  # entries of all instruments within a second; exits are never held back
    max_participation: Annotated[float, Field(gt=0)] = 0.5  # of the size at the touch, the smaller of bid and ask: one has to get out again
    max_daily_loss: Annotated[float, Field(gt=0)] = 0.02  # of capital, per UTC day: no entries until the next
    max_drawdown: Annotated[float, Field(gt=0)] = 0.05  # of capital, from the highest equity: no entries any more
    regime_scale: dict[str, float] = {"high_volatility": 0.5, "crisis": 0.0}  # by the regime's name; others trade at full size


class Position:
    """One instrument's net position by average cost."""

    __slots__ = ("average", "fees", "realised", "size")

    def __init__(self) -> None:
        self.size = 0  # signed, 1e-9 units
        self.average = 0.0  # price
        self.realised = 0.0  # currency, before fees
        self.fees = 0.0

    def fill(self, side: int, size: int, price: float, fee: float, multiplier: float) -> None:
        """Apply one fill: `side` +1 or -1, `size` > 0."""
        signed = side * size
        if self.size * signed >= 0:
            self.average = (self.average * abs(self.size) + price * size) / (abs(self.size) + size)
        else:
            closed = min(size, abs(self.size))
            self.realised += (price - self.average) * math.copysign(closed, self.size) / SCALE * multiplier
            if size > abs(self.size):
                self.average = price
        self.size += signed
        self.fees += fee


class Ledger:
    """Positions and equity of all instruments, net of fees, open positions at the last mid."""

    def __init__(self, instruments: Sequence[Instrument], limits: Limits) -> None:
        self.instruments, self.limits = instruments, limits
        self.positions = [Position() for _ in instruments]
        self.mids = [math.nan] * len(instruments)
        self._of = {c: [k for k, x in enumerate(instruments) if x.currency == c] for c in sorted({x.currency for x in instruments})}
        self.highest = dict.fromkeys(self._of, 0.0)
        self.drawdown = dict.fromkeys(self._of, 0.0)  # largest so far, currency
        self._day: dict[str, tuple[int, float]] = {}
        self._entries: deque[int] = deque(maxlen=limits.max_order_rate or 0)

    @property
    def currencies(self) -> list[str]:
        return list(self._of)

    def told(self) -> str:
        """What is held, in words; nothing: empty."""
        held = zip(self.instruments, self.positions)
        return "; ".join(f"{p.size / SCALE:+g} {x.id} at {p.average:.10g}" for x, p in held if p.size)

    def pnl(self, currency: str) -> float:
        """Net PnL since the start: realised and open, less fees."""
        total = 0.0
        for k in self._of[currency]:
            p = self.positions[k]
            total += p.realised - p.fees
            if p.size and self.mids[k] == self.mids[k]:
                total += (self.mids[k] - p.average) * p.size / SCALE * self.instruments[k].multiplier
        return total

    def mark(self, k: int, mid: float, ts: int) -> float:
        """Value instrument `k` at `mid` (NaN keeps the former); returns the net PnL in its currency."""
        if mid == mid:
            self.mids[k] = mid
        currency = self.instruments[k].currency
        value = self.pnl(currency)
        if value > self.highest[currency]:
            self.highest[currency] = value
        self.drawdown[currency] = max(self.drawdown[currency], self.highest[currency] - value)
        day = ts // DAY_NS
        if currency not in self._day or self._day[currency][0] != day:
            self._day[currency] = (day, value)
        return value

    def halted(self, k: int, ts: int) -> str | None:
        """Why no entry in instrument `k` is allowed now, or None."""
        currency = self.instruments[k].currency
        value = self.pnl(currency)
        if self.highest[currency] - value >= self.limits.max_drawdown * self.limits.capital:
            return "halted: drawdown"
        day, opened = self._day.get(currency, (ts // DAY_NS, value))
        if day == ts // DAY_NS and opened - value >= self.limits.max_daily_loss * self.limits.capital:
            return "halted: daily loss"
        if self.limits.max_order_rate is not None and len(self._entries) == self._entries.maxlen and ts - self._entries[0] < SCALE:
            return "halted: order rate"
        return None

    def beyond(self, k: int, size: int, price: float) -> str | None:
        """Which limit an entry of `size` (1e-9 units) at `price` would break, or None: whoever has decided on it."""
        x, limits, units = self.instruments[k], self.limits, size / SCALE * (1 - 1e-12)
        if limits.max_order is not None and units > limits.max_order:
            return "beyond the limit: order size"
        if limits.max_position is not None and units + abs(self.positions[k].size) / SCALE > limits.max_position:
            return "beyond the limit: position"
        if units * price * x.multiplier > limits.max_notional * (limits.capital + self.pnl(x.currency)):
            return "beyond the limit: notional"
        return None

    def entered(self, ts: int) -> None:
        """An entry was sent at `ts`."""
        self._entries.append(ts)

    def size(self, k: int, price: float, stop_distance: float, regime: str, shown: float = math.inf) -> int:
        """Units to trade (1e-9, a whole number of lots, 0: too small): what is lost at the stop is `risk_per_trade` of equity.

        `price` and `stop_distance` in currency; `shown`: units at the touch, of which `max_participation` may be taken.
        """
        x, limits = self.instruments[k], self.limits
        equity = limits.capital + self.pnl(x.currency)
        if equity <= 0 or stop_distance <= 0 or price <= 0:
            return 0
        units = limits.risk_per_trade * equity / (stop_distance * x.multiplier) * limits.regime_scale.get(regime, 1.0)
        units = min(units, limits.max_participation * shown)
        return min(int(units * SCALE * (1 + 1e-12)) // x.lot * x.lot, self.most(k, price))

    def most(self, k: int, price: float) -> int:
        """The largest entry that the limits allow at `price`: 1e-9 units, a whole number of lots."""
        x, limits = self.instruments[k], self.limits
        units = limits.max_notional * max(0.0, limits.capital + self.pnl(x.currency)) / (price * x.multiplier)
        for most in (limits.max_position, limits.max_order):
            if most is not None:
                units = min(units, most)
        return int(units * SCALE * (1 + 1e-12)) // x.lot * x.lot
