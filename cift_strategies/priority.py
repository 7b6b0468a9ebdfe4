"""Who goes first where several processes want the same core: the node and its models before what only shows or stores.

Linux lets a process that runs keep its core for 0.7 ms or more before one that wakes may have it, whatever their priorities. A process that
asks for a short turn is let in at once, since Linux 6.12 (EEVDF: Stoica and Abdel-Wahab 1995, "Earliest eligible virtual deadline first").
No rights are needed for any of this; where the system knows none of it, nothing happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

TURN_NS: Final = 100_000  # the shortest that Linux grants
SET_ATTRIBUTES: Final = {"x86_64": 314, "aarch64": 274}  # number of the system call sched_setattr(2)


class _Attributes(ctypes.Structure):
    """struct sched_attr, first version."""

    _fields_ = [
        ("size", ctypes.c_uint32), ("policy", ctypes.c_uint32), ("flags", ctypes.c_uint64), ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32), ("runtime", ctypes.c_uint64), ("deadline", ctypes.c_uint64), ("period", ctypes.c_uint64),
    ]  # fmt: skip


@contextlib.contextmanager
def ahead() -> Iterator[None]:
    """Within, this thread, and the threads and processes that it starts, run as soon as they wake."""
    _turn(TURN_NS)
    try:
        yield
    finally:
        _turn(0)


def behind(nice: int) -> None:
    """Let this thread, and those that it starts, yield to the node. A process's own priority counts within its session only,
    where Linux gives each session the same share (autogroups, sched(7)), so where it leads one that session's is lowered too."""
    _turn(0)
    os.nice(nice)
    if os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError):  # there are none here
            Path("/proc/self/autogroup").write_text(str(nice))


def _turn(ns: int) -> None:
    """Ask for turns of `ns`, 0 being the usual ones."""
    number = SET_ATTRIBUTES.get(platform.machine())
    if number is None or not sys.platform.startswith("linux"):
        return
    how = _Attributes(ctypes.sizeof(_Attributes), os.sched_getscheduler(0), 0, os.getpriority(os.PRIO_PROCESS, 0), 0, ns, 0, 0)
    ctypes.CDLL(None).syscall(number, 0, ctypes.byref(how), 0)
