"""How a position is entered: across the spread at once, or by an order that rests at the touch or a tick inside it, whichever pays.

A resting entry saves the spread and pays the maker's fee, but is filled only sometimes, and then rather when the price comes against
it. What that is worth is told in the settings; :func:`best` compares the ways. Numbers alone, in ticks.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from cift_strategies.settings import Settings

type Way = Literal["cross", "join", "improve"]


class Entry(NamedTuple):
    """One way to enter. `edge`: what is expected of it once it is filled, net of all costs (ticks); `worth`: times how often that is."""

    way: Way
    cost: float  # spread, adverse selection and fees, both ways
    edge: float
    worth: float


def ways(expected: float, spread: float, taker: float, maker: float, s: Settings) -> list[Entry]:
    """The ways that `s.entry` allows, for a move of `expected` along the position; `taker` and `maker` fees of one side, per unit.

    One gets out across the spread, always. Joining the touch costs nothing of the spread; improving it a tick costs that tick, and needs
    a spread of two.
    """
    costs: dict[Way, tuple[float, float]] = {
        "cross": (spread + 2 * taker, 1.0),
        "join": (maker + taker + s.adverse_ticks, s.join_fills),
        "improve": (1.0 + maker + taker + s.adverse_ticks, s.improve_fills),
    }
    allowed: tuple[Way, ...] = tuple(costs) if s.entry == "best" else (s.entry,)
    found = []
    for way in allowed:
        if way == "improve" and spread < 2:
            continue
        cost, fills = costs[way]
        found.append(Entry(way, cost, expected - cost, (expected - cost) * fills))
    return found


def best(found: list[Entry], least: float) -> Entry | None:
    """The way of the greatest worth among those whose edge exceeds `least`."""
    return max((e for e in found if e.edge > least), key=lambda e: e.worth, default=None)


def price(way: Way, side: int, middle: int, half: int, tick: int, room: int) -> int:
    """Limit price in the units of its arguments: `room` ticks beyond the far touch, or at, or a tick inside, the near one."""
    if way == "cross":
        return middle + side * (half + room * tick)
    return middle - side * half + (side * tick if way == "improve" else 0)

