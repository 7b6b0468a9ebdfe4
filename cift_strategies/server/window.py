"""One prediction from a window that a program sent, computed here with an engine of the server's own; the node is not asked.

The artifact is loaded at the first request (what nobody asks for costs no memory), and again when the node goes over to another. One
prediction is computed at a time, in a thread; who finds too many waiting, or would wait for too long, is told when to ask again.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from cift_strategies.server.problems import Fault
from cift_strategies.server.requests import EventsWindow, FeaturesWindow, PredictResponse

if TYPE_CHECKING:
    from cift_strategies.server.compute import Computer

WAITING: Final = 16  # requests
PATIENCE_S: Final = 20.0  # for an answer: on a machine that is busy throughout the models take several seconds to be loaded
AGAIN: Final = {"Retry-After": "1"}


class Windows:
    """`own`: import paths of members that artifacts may hold besides ours."""

    def __init__(self, own: tuple[str, ...] = (), patience_s: float = PATIENCE_S) -> None:
        self._own, self.patience_s = own, patience_s
        self._computer: Computer | None = None
        self._lock = asyncio.Lock()
        self._waiting = 0

    async def predict(
        self, asked: EventsWindow | FeaturesWindow, artifact: str | None, version: str, info: dict[str, dict[str, Any]]
    ) -> PredictResponse:
        """Raises Fault: 404 for an unknown instrument, 409 where the models do not know it, 503 without models, when too many wait, or when
        it takes longer than `patience_s`: then the work goes on, so that who asks again finds the models loaded."""
        if artifact is None:
            raise Fault(503, "no models are known here: the node has not told where they lie, and none were named with --artifacts")
        if asked.symbol not in info:
            raise Fault(404, f"no instrument {asked.symbol} here; there are {', '.join(info) or 'none yet'}")
        if self._waiting >= WAITING:
            raise Fault(503, f"{WAITING} windows are waiting already: ask again later", AGAIN)
        self._waiting += 1
        work = asyncio.create_task(self._in_turn(asked, artifact, version, info))
        work.add_done_callback(self._done)
        if not (await asyncio.wait({work}, timeout=self.patience_s))[0]:
            raise Fault(503, "the models are being loaded, or other windows are before this one: ask again", AGAIN)
        return work.result()

    def _done(self, work: asyncio.Task[PredictResponse]) -> None:
        self._waiting -= 1
        if not work.cancelled():
            work.exception()  # who asked may have been sent away

    async def _in_turn(
        self, asked: EventsWindow | FeaturesWindow, artifact: str, version: str, info: dict[str, dict[str, Any]]
    ) -> PredictResponse:
        async with self._lock:
            return await asyncio.to_thread(self._compute, asked, artifact, version, info)

    def _compute(
        self, asked: EventsWindow | FeaturesWindow, artifact: str, version: str, info: dict[str, dict[str, Any]]
    ) -> PredictResponse:
        if self._computer is None:
            from cift_strategies.server.compute import Computer

            self._computer = Computer(self._own)
        return self._computer.predict(asked, artifact, version, info)
