"""Progress of long work on standard error: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY_S = 5.0


class Steps:
    """One long step: ``with Steps("import", total) as s: s.advance(n)``. `total` 0 means unknown.

    A closed step prints one line with its name and duration, so that a log tells where the time went.
    """

    def __init__(self, label: str, total: int = 0, unit: str = "") -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, 0
        self._bar: Progress | None = None

    def __enter__(self) -> Steps:
        self._start = self._printed = time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self.label, total=self.total or None)
            self._bar.start()
        return self

    def advance(self, n: int = 1) -> None:
        self.done += n
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
        elif time.monotonic() - self._printed >= PLAIN_EVERY_S:
            self._printed = time.monotonic()
            part = f" {100 * self.done // self.total} %" if 0 < self.done <= self.total else ""  # a total may be an estimate
            print(f"{self.label}{part} ({self.done:,}{' ' + self.unit if self.unit else ''})", file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None:
            amount = f"{self.done:,} {self.unit}, " if self.done and self.unit else ""
            print(f"{self.label}: {amount}{time.monotonic() - self._start:.1f} s", file=sys.stderr, flush=True)
