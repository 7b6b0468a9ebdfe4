"""Strategies and members that fail or are interrupted at a chosen moment; named by import path in test_cli.py."""

from __future__ import annotations

import os
import signal
from typing import Any

from cift_models.fusion import Fusion
from cift_strategies.strategy import EnsembleStrategy


class Interrupted(EnsembleStrategy):
    """Ctrl-C while predictions are streaming."""

    def decide(self, p: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return super().decide(p)


class Raising(EnsembleStrategy):
    def decide(self, p: Any) -> Any:
        raise ArithmeticError("a fault of the strategy")


class InterruptedMember(Fusion):
    """Ctrl-C while models are being trained."""

    name = "interrupted"

    @classmethod
    def fit(cls, study: Any, gathered: Any = None, config: Any = None) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return super().fit(study, gathered, config)
