"""Implementation shortfall: what lies between a portfolio that trades at the price it decided upon, at once and free, and what was got.

Takes the fills, the log of order events and the mids at predictions, gives the difference in five parts that add up (Perold 1988): latency
of the decision, latency of the order, spread, slippage, fees. Also the estimate of what other latencies would have cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cift_strategies.performance import I64, F, Fills

Mask = NDArray[np.bool_]

PARTS: Final = ("decision latency", "order latency", "spread", "slippage", "fees")
LATENCIES_MS: Final = (0.0, 0.1, 1.0, 10.0, 100.0, 1000.0)


@dataclass(frozen=True, slots=True)
class Legs:
    """The fills (n,) with what was known at each step before them; prices in currency, times in ns, NaN and -1 where it is not known."""

    fills: Fills
    maker: Mask
    seen: I64  # the newest event that the decision had seen; entries only
    seen_mid: F
    sent: I64  # when the order left; entries and exits at the market
    sent_mid: F
    accepted: I64  # when the venue had it
    half: F  # half the spread at the fill, price units

    @property
    def moves_late(self) -> Mask:
        """Fills whose price depends on when the order arrives: they cross the spread on our word, and do not wait at the venue."""
        return np.isin(self.fills.role, ("entry", "exit")) & ~self.maker & (self.sent >= 0)


def legs(fills: Fills, order: I64, maker: Mask, log: Mapping[str, Any], newest: Callable[[Any, I64], tuple[I64, F]]) -> Legs:
    """`order` (n,) the running numbers of the fills' orders; `log` the columns of results.ORDERS; `newest` tells of instruments (k,) and
    times (k,) the newest event that the last prediction delivered until then had seen (-1: none), and the mid then."""
    n = len(fills)
    nan, never = np.full(n, np.nan), np.full(n, -1, np.int64)
    seen, seen_mid, sent, sent_mid, accepted, half = never.copy(), nan.copy(), never.copy(), nan.copy(), never.copy(), nan.copy()
    first: dict[tuple[str, int], tuple[int, float]] = {}  # event, order -> when, and the mid
    spread: dict[tuple[int, int], float] = {}
    for ts, number, event, mid, wide in zip(*(log[c].tolist() for c in ("ts", "order", "event", "mid", "spread"))):
        first.setdefault((event, number), (ts, mid))
        if event == "Filled":
            spread[number, ts] = wide
    for i, (role, number, ts) in enumerate(zip(fills.role.tolist(), order.tolist(), fills.ts.tolist())):
        half[i] = spread.get((number, ts), np.nan) / 2 * fills.tick[i]
        if role in ("entry", "exit"):
            sent[i], sent_mid[i] = first.get(("Submitted", number), (-1, np.nan))
        accepted[i] = first.get(("Accepted", number), (-1, np.nan))[0]
    at = np.flatnonzero((fills.role == "entry") & (sent >= 0))
    if len(at):
        seen[at], seen_mid[at] = newest(fills.instrument[at], sent[at])
    return Legs(fills, maker, seen, seen_mid, sent, sent_mid, accepted, half)


def shortfall(got: Legs) -> dict[str, F]:
    """Money lost on each fill (n,) in each of PARTS; their sum is the shortfall against the mid that the decision saw.

    Entries: the mid moved while the models computed, then while the order travelled (or waited in the queue); exits at the market: while
    the order travelled; stops and targets wait at the venue and lose no time. Spread: half of it, paid by takers and earned by makers;
    slippage: the rest of the distance from the mid, from deeper levels and from a book that was newer than ours. What is not known counts
    with the part that follows it.
    """
    f = got.fills
    m = f.side * f.per_tick / f.tick  # money per unit of price
    mid = np.where(np.isfinite(f.mid), f.mid, f.price)
    decided = np.where((f.role == "entry") & np.isfinite(f.decided), f.decided, mid)
    start = np.where(np.isfinite(got.sent_mid), got.sent_mid, decided)
    seen = np.where(np.isfinite(got.seen_mid), got.seen_mid, start)
    half = np.where(np.isfinite(f.mid) & np.isfinite(got.half), f.side * got.half * np.where(got.maker, -1, 1), 0.0)
    parts = (m * (start - seen), m * (mid - start), m * half, m * (f.price - mid - half), f.fee)
    return dict(zip(PARTS, parts))


def repriced(got: Legs, mid_at: Callable[[Any, I64], F], ns: Sequence[int], of: str) -> F:
    """Change of the PnL (k,), in currency, had every decision (`of` "decision"), or every order ("order"), taken each of `ns`.

    An estimate: each fill that crosses the spread is moved by what the mid does between the time at which it was made and the time at which
    it would have been made. The same orders are filled in the same size; stops, targets and resting entries stay as they were. `mid_at`
    tells the mids of instruments (m,) at times (m,), NaN where there is none: such a fill stays where it is. Decisions concern entries.
    """
    f = got.fills
    late = got.moves_late & ((got.seen >= 0) & (f.role == "entry") if of == "decision" else True)
    at = np.flatnonzero(late)
    if not len(at):
        return np.zeros(len(ns))
    due = [(got.seen[at] + (f.ts[at] - got.sent[at]) if of == "decision" else got.sent[at]) + k for k in ns]
    mids = mid_at(np.tile(f.instrument[at], 1 + len(ns)), np.concatenate([f.ts[at], *due])).reshape(1 + len(ns), len(at))
    change = f.side[at] * (mids[1:] - mids[0]) * f.per_tick[at] / f.tick[at]
    return np.asarray(-np.nansum(change, axis=1))
