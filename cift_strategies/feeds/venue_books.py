"""The order book that a test venue is shown, and how far an order of its own would be from its turn in it.

Takes finished :data:`catalog.events.EVENT` rows of one instrument, one at a time; knows each level's orders in order of priority (of a
level feed: its size). Prices and sizes are ints in 1e-9 units; side 1 is the bid, -1 the ask.
"""

from __future__ import annotations

from typing import Final

from catalog.events import ADD, CANCEL, CLEAR, F_MBP, F_TOB, MODIFY, SCALE

LEVEL: Final = -1  # the one entry of a level whose orders are not told
UNDEFINED: Final = (2**63 - 1, -(2**63))


class Book:
    """`levels[side]`: price -> {order id: size}, oldest first. What was taken of a level counts until the level changes."""

    def __init__(self) -> None:
        self.levels: dict[int, dict[int, dict[int, int]]] = {1: {}, -1: {}}
        self.orders: dict[int, tuple[int, int]] = {}  # id -> side, price
        self.rebuilding = False  # after a clear, until the end of its event
        self._best: dict[int, int | None] = {1: None, -1: None}
        self._taken: dict[tuple[int, int], int] = {}

    def apply(self, action: int, side: int, price: int, size: int, order_id: int, flags: int) -> tuple[int, int] | None:
        """One record that is no trade; (side, price) of the level that was changed, None where none or all were."""
        if action == CLEAR:
            for kept in (self.levels[1], self.levels[-1], self.orders, self._taken):
                kept.clear()
            self._best = {1: None, -1: None}
            self.rebuilding = True
            return None
        if side == 0 or price in UNDEFINED:
            return None
        if flags & F_TOB:
            for other in list(self.levels[side]):
                self._level(side, other, 0)
            self._level(side, price, 0 if action == CANCEL else size)
            return side, price
        if flags & F_MBP:
            self._level(side, price, 0 if action == CANCEL else size)
            return side, price
        return self._order(action, side, price, size, order_id)

    def _order(self, action: int, side: int, price: int, size: int, order_id: int) -> tuple[int, int] | None:
        known = self.orders.get(order_id)
        if known is not None:
            was = self.levels[known[0]][known[1]][order_id]
            if action == MODIFY and known == (side, price) and 0 < size <= was:
                self.levels[side][price][order_id] = size  # it keeps its place
                self._taken.pop(known, None)
                return known
            if action == CANCEL and 0 < size < was:
                self.levels[known[0]][known[1]][order_id] = was - size
                self._taken.pop(known, None)
                return known
            self._remove(order_id, *known)
        if action in (ADD, MODIFY) and size > 0:
            self.levels[side].setdefault(price, {})[order_id] = size
            self.orders[order_id] = (side, price)
            self._taken.pop((side, price), None)
            self._better(side, price)
        return known or (side, price)

    def _remove(self, order_id: int, side: int, price: int) -> None:
        level = self.levels[side][price]
        del level[order_id], self.orders[order_id]
        self._taken.pop((side, price), None)
        if not level:
            self._empty(side, price)

    def _level(self, side: int, price: int, size: int) -> None:
        self._taken.pop((side, price), None)
        if size > 0:
            self.levels[side][price] = {LEVEL: size}
            self._better(side, price)
        elif price in self.levels[side]:
            self._empty(side, price)

    def _better(self, side: int, price: int) -> None:
        best = self._best[side]
        if best is None or (price - best) * side > 0:
            self._best[side] = price

    def _empty(self, side: int, price: int) -> None:
        del self.levels[side][price]
        if price == self._best[side]:
            left = self.levels[side]
            self._best[side] = (max(left) if side > 0 else min(left)) if left else None

    # --- what is asked of it ----------------------------------------------------------------------------------------------------------

    def best(self, side: int) -> int | None:
        return self._best[side]

    def shown(self, side: int, price: int) -> int:
        """Units displayed at a level."""
        return sum(self.levels[side].get(price, {}).values())

    def ahead(self, side: int, price: int, before: dict[int, None]) -> int:
        """Units of the orders `before` one of ours that are still there."""
        level = self.levels[side].get(price, {})
        return sum(level.get(i, 0) for i in before)

    def queue(self, side: int, price: int, most: int | None = None) -> dict[int, None]:
        """The orders at a level, oldest first; with `most`: as many of them as hold that many units."""
        found: dict[int, None] = {}
        for order_id, size in self.levels[side].get(price, {}).items():
            if most is not None and most <= 0:
                break
            found[order_id] = None
            most = None if most is None else most - size
        return found

    def crossing(self, side: int, limit: int | None) -> list[tuple[int, int]]:
        """(price, units) that an order of `side` would find up to its limit, best first; what was taken already is not there."""
        other = self.levels[-side]
        prices = sorted((p for p in other if limit is None or (limit - p) * side >= 0), reverse=side < 0)
        found = ((p, self.shown(-side, p) - self._taken.get((-side, p), 0)) for p in prices)
        return [(p, n) for p, n in found if n > 0]

    def crosses(self, side: int, limit: int) -> bool:
        best = self._best[-side]
        return best is not None and (limit - best) * side >= 0

    def take(self, side: int, price: int, size: int) -> None:
        """An order of `side` has taken that much."""
        self._taken[-side, price] = self._taken.get((-side, price), 0) + size

    def told(self) -> tuple[float | None, float | None]:
        """Best bid and ask."""
        return tuple(None if p is None else p / SCALE for p in (self._best[1], self._best[-1]))  # type: ignore[return-value]
