"""One prediction from a window that a program sent, computed here with an engine of the server's own; the node is not asked.

The artifact is loaded at the first request, and again when the node goes over to another. One prediction is computed at a time, in a
thread; who finds too many waiting is sent away.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from cift_strategies.server.problems import Fault
from cift_strategies.server.requests import EventsWindow, FeaturesWindow, PredictResponse

if TYPE_CHECKING:
    from cift_strategies.server.compute import Computer

WAITING: Final = 16  # requests


class Windows:
    """`own`: import paths of members that artifacts may hold besides ours."""

    def __init__(self, own: tuple[str, ...] = ()) -> None:
        self._own = own
        self._computer: Computer | None = None
        self._lock = asyncio.Lock()
        self._waiting = 0

    async def predict(
        self, asked: EventsWindow | FeaturesWindow, artifact: str | None, version: str, info: dict[str, dict[str, Any]]
    ) -> PredictResponse:
        """Raises Fault: 404 for an unknown instrument, 409 where the models do not know it, 503 without models or when too many wait."""
        if artifact is None:
            raise Fault(503, "no models are known here: the node has not told where they lie, and none were named with --artifacts")
        if asked.symbol not in info:
            raise Fault(404, f"no instrument {asked.symbol} here; there are {', '.join(info) or 'none yet'}")
        if self._waiting >= WAITING:
            raise Fault(503, f"{WAITING} windows are waiting already: ask again later", {"Retry-After": "1"})
        self._waiting += 1
        try:
            async with self._lock:
                return await asyncio.to_thread(self._compute, asked, artifact, version, info)
        finally:
            self._waiting -= 1

    def _compute(
        self, asked: EventsWindow | FeaturesWindow, artifact: str, version: str, info: dict[str, dict[str, Any]]
    ) -> PredictResponse:
        if self._computer is None:
            from cift_strategies.server.compute import Computer

            self._computer = Computer(self._own)
        return self._computer.predict(asked, artifact, version, info)
