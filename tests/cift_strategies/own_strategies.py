"""Strategies and members of a user's own, named by import path in the tests: one that trades often, some that fail."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from catalog import status
from cift_models.fusion import Fusion
from cift_strategies.strategy import EnsembleStrategy


class Eager(EnsembleStrategy):
    """Believes that whatever leans a little is worth ten ticks within the second: trades often, however good the models are."""

    def decide(self, p: Any) -> Any:
        lead = float(p.proba[1, 2] - p.proba[1, 0])
        side = int(np.sign(lead)) if abs(lead) > 0.01 else 0
        proba = np.tile([0.0, 0.2, 0.8] if side > 0 else [0.8, 0.2, 0.0], (4, 1))
        believed = replace(p, proba=proba, magnitude=np.full(4, 10.0), confidence=np.ones(4), direction=(0, side, 0, 0))
        return super().decide(believed)


class Halted(EnsembleStrategy):
    """Hears that the market is halted 1.2 to 9 s after its first event."""

    first = 0

    def on_features(self, message: Any) -> None:
        super().on_features(message)
        self.first = self.first or message.ts
        state = status.HALTED if 1_200 <= (message.ts - self.first) / 1e6 < 9_000 else status.OPEN
        if state != self.market.get(message.instrument):
            self.trading(message.instrument, state, message.ts)


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


class Curious(EnsembleStrategy):
    """Looks at a feature of its own choice."""

    def decide(self, p: Any) -> Any:
        vector = self.last[p.instrument]
        return super().decide(p) if vector is not None and vector.rows[-1, 0] > 0 else None


class Mortal(Eager):
    """Kills its process, and then the process that began it, the first time it decides: a grave for each in the folder GRAVES is why."""

    def decide(self, p: Any) -> Any:
        graves = Path(os.environ["GRAVES"])
        for grave, pid in (("worker", os.getpid()), ("node", os.getppid())):
            try:
                (graves / grave).rmdir()
            except FileNotFoundError:
                continue
            os.kill(pid, signal.SIGKILL)
        return super().decide(p)


def trade_and_tell(job: Any) -> None:
    """The work of a sweep's process, which then writes down what it has loaded for it."""
    from cift_strategies.sweep import execute

    execute(job)
    (job.folder / "loaded.json").write_text(json.dumps([m for m in sys.modules if m.partition(".")[0] == "cift_strategies"]))
