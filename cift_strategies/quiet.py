"""A strategy that trades nothing: it hands every prediction to whoever listens."""

from __future__ import annotations

from collections.abc import Callable

from cift_strategies.messages import Prediction, Signal
from cift_strategies.strategy import EnsembleStrategy


class Quiet(EnsembleStrategy):
    """`heard` gets every prediction, with the book as it is at its delivery in `last`."""

    heard: Callable[[Prediction], None] | None = None

    def decide(self, p: Prediction) -> Signal | None:
        if self.heard is not None:
            self.heard(p)
        return self._decline("watching only")
