"""Keeps a server beside the node: started, watched, and started again when it has died or hangs.

Lives in the node's process, in a thread of its own, and touches nothing of the node but the link's stamps.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from catalog.errors import InputError
from cift_strategies.server.link import Link

ROOT: Final = Path(__file__).resolve().parents[2]
READY_S: Final = 60.0  # for the first start
SILENT_S: Final = 10.0  # without a sign of life while the node was listening
LIVED_S: Final = 60.0  # from then on a start counts as a success
WAITS_S: Final = (0.5, 30.0)  # before a new start, at first and at most; doubled in between


class Supervisor:
    """`arguments` go to `python -m cift_strategies.server` after the link, the state folder and the port (0: any free one, then the same
    again). `say` gets a line for every restart.
    """

    def __init__(
        self, link: Link, state: Path, port: int = 0, arguments: Sequence[str] = (), say: Callable[[str], object] = lambda _line: None,
        silent_s: float = SILENT_S,
    ) -> None:  # fmt: skip
        self._link, self._state, self._port, self._arguments, self.say, self._silent_s = link, state, port, arguments, say, silent_s
        self.restarts = 0
        self.url = ""
        self.process: subprocess.Popen[str] | None = None
        self._errors: deque[str] = deque(maxlen=50)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.started = threading.Condition()  # notified at every start

    def start(self) -> dict[str, Any]:
        """Start the server, if it has not begun, and wait until it answers; what it tells: `url`, `token_file`. Raises InputError with its
        own last line."""
        if self.process is None:
            self.begin()
        told = self._answer()
        if told is None:
            self.stop()
            why = self._errors[-1] if self._errors else "the server did not start"
            raise InputError(why.removeprefix("error: "))
        self._thread = threading.Thread(target=self._watch, name="cift-server-watch", daemon=True)
        self._thread.start()
        return told

    def stop(self) -> None:
        """End the server; it is not started again."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._end()

    def begin(self) -> None:
        """Start the server, and do not wait for it."""
        command = [
            sys.executable, "-m", "cift_strategies.server", "--link", str(self._link.path), "--state", str(self._state.resolve()),
            "--port", str(self._port), "--with-parent", *self._arguments,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def _answer(self) -> dict[str, Any] | None:
        assert self.process is not None and self.process.stdout is not None and self.process.stderr is not None
        self._errors.clear()
        errors = threading.Thread(target=self._keep, args=(self.process.stderr,), daemon=True)
        errors.start()
        waiting = threading.Timer(READY_S, self.process.kill)
        waiting.start()
        line = self.process.stdout.readline()
        waiting.cancel()
        if not line.startswith("{"):
            self.process.wait()
            errors.join()
            return None
        told: dict[str, Any] = json.loads(line)
        self.url = told["url"]
        self._port = int(self.url.rsplit(":", 1)[1])
        with self.started:
            self.started.notify_all()
        return told

    def _keep(self, stream: Any) -> None:
        for line in stream:
            self._errors.append(line.rstrip())

    def _watch(self) -> None:
        wait, since = WAITS_S[0], time.monotonic()
        while not self._stop.is_set():
            process = self.process
            assert process is not None
            try:
                process.wait(0.25)
            except subprocess.TimeoutExpired:
                if self._link.silent_s > self._silent_s:
                    self.say(f"the server has not said anything for {self._link.silent_s:.0f} s: it is started again")
                    process.kill()
                    process.wait()
                else:
                    continue
            if self._stop.is_set():
                return
            if time.monotonic() - since > LIVED_S:
                wait = WAITS_S[0]
            last = f" ({self._errors[-1]})" if self._errors else ""
            self.say(f"the server ended with exit code {process.returncode}{last}: it is started again in {wait:g} s")
            if self._stop.wait(wait):
                return
            wait, since = min(2 * wait, WAITS_S[1]), time.monotonic()
            self._close(process)
            self.restarts += 1
            self.begin()
            self._answer()

    def _end(self) -> None:
        process = self.process
        if process is None:
            return
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._close(process)

    def _close(self, process: subprocess.Popen[str]) -> None:
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
