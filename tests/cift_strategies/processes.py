"""Processes that end with the test that they were started for, however that ends; conftest.py sees to it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

_STARTED: list[subprocess.Popen[Any]] = []


def started(command: Sequence[str], **how: Any) -> subprocess.Popen[Any]:
    """`subprocess.Popen` of a process group of its own."""
    process = subprocess.Popen(command, start_new_session=True, **how)
    _STARTED.append(process)
    return process


def end() -> None:
    """Kill the groups of those that still run. What a node has started in other groups ends with the node."""
    while _STARTED:
        process = _STARTED.pop()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
