"""How the benchmarks take time: CPU seconds, what is compared in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np


def best(*runs: Callable[[], Any], times: int = 5) -> list[float]:
    """Least CPU seconds of each, taken in turns so that a busy machine meets them alike."""
    took = [[np.inf] for _ in runs]
    for n in range(times + 1):
        for run, mine in zip(runs, took):
            begin = time.thread_time()
            run()
            if n:
                mine.append(time.thread_time() - begin)
    return [min(mine) for mine in took]
