"""Who goes first: threads and processes that a node starts are let in at once, and what yields to it asks for the usual turns."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cift_strategies.priority import SET_ATTRIBUTES, TURN_NS, _Attributes, ahead, behind

ROOT = Path(__file__).parents[2]
KERNEL = tuple(int(x) for x in platform.release().split("-")[0].split(".")[:2]) if sys.platform == "linux" else (0, 0)


def turn() -> tuple[int, int]:
    """The length of this thread's turns in ns, and its nice value, as the kernel tells them (sched_getattr(2), the next system call)."""
    told = _Attributes()
    number = SET_ATTRIBUTES[platform.machine()] + 1
    assert ctypes.CDLL(None).syscall(number, 0, ctypes.byref(told), ctypes.sizeof(told), 0) == 0
    return told.runtime, told.nice


def main() -> None:
    usual = turn()
    with ahead():
        found = [usual, turn()]
        thread = threading.Thread(target=lambda: found.append(turn()))
        thread.start()
        thread.join()
        child = [sys.executable, "-c", "import test_priority as t; t.behind(3); print(*t.turn())"]
        told = subprocess.run(child, capture_output=True, text=True, check=True, env=os.environ).stdout.split()
    print(json.dumps([*found, [int(x) for x in told], turn()]))


@pytest.mark.skipif(KERNEL < (6, 12) or platform.machine() not in SET_ATTRIBUTES, reason="turns can be asked for since Linux 6.12")
def test_who_is_ahead_has_short_turns_with_all_its_threads_until_it_leaves_and_who_is_behind_has_not() -> None:
    path = os.pathsep.join((str(ROOT), str(Path(__file__).parent)))
    command = [sys.executable, "-c", "import test_priority; test_priority.main()"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path})
    (usual, nice), *rest = json.loads(done.stdout)
    assert usual > TURN_NS
    assert rest == [[TURN_NS, nice], [TURN_NS, nice], [usual, min(19, nice + 3)], [usual, nice]]


def test_a_machine_of_another_kind_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with ahead():
        behind(0)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
