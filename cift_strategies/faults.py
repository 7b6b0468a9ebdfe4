"""Failures inside callbacks. Nautilus logs what a Python callback raises and goes on; a run must not.

:func:`guarded` wraps the callbacks of an actor or strategy: the first exception is kept, later callbacks do nothing, and
whoever ran the engine raises it again with :meth:`Faults.reraise`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import Any


class Faults:
    """The first failure of a run, shared by its actors and strategies."""

    def __init__(self, leave: Callable[[BaseException], object] | None = None) -> None:
        self.first: BaseException | None = None
        self.count = 0
        self._leave = leave  # called at the first failure: a command line may end the process there

    def record(self, error: BaseException) -> None:
        self.count += 1
        if self.first is None:
            self.first = error
            if self._leave is not None:
                self._leave(error)

    def reraise(self) -> None:
        """Raise the first failure, with its own traceback, if there was one."""
        if self.first is not None:
            raise self.first

    def guard(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        """`callback`, except that it records what it raises and does nothing after a failure."""

        @wraps(callback)
        def call(*args: Any) -> Any:
            if self.first is None:
                try:
                    return callback(*args)
                except BaseException as error:
                    self.record(error)
            return None

        return call

    @contextmanager
    def interrupts(self) -> Iterator[None]:
        """Ctrl-C becomes a failure of the run: raised inside a callback it would be logged and forgotten."""

        def interrupted(_number: int, _frame: FrameType | None) -> None:
            self.record(KeyboardInterrupt())

        try:
            before = signal.signal(signal.SIGINT, interrupted)
        except ValueError:  # not the main thread
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def guarded[T: type](cls: T) -> T:
    """Class decorator: every `on_*` method records what it raises in `self.faults` and does nothing after a failure."""
    for name, method in list(vars(cls).items()):
        if name.startswith("on_") and callable(method):
            setattr(cls, name, _guard_method(method))
    return cls


def _guard_method(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(self: Any, *args: Any) -> Any:
        faults: Faults = self.faults
        if faults.first is None:
            try:
                return method(self, *args)
            except BaseException as error:
                faults.record(error)
        return None

    return call
