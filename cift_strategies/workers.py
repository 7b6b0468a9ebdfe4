"""Who computes the jobs of a sweep: processes on this machine with one thread each, or a Ray cluster.

Both take jobs and give them back done, in whatever order; a job whose worker or machine died is given to another. Jobs leave their results
in a folder, whole or not at all, so that one computed twice counts once.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any, Final, Protocol

from catalog.errors import InputError

ATTEMPTS: Final = 3  # of a job that ends its process
LIFE: Final = 400  # jobs of a process, after which it is begun afresh: the engine keeps some 0.1 MB of each run
ANSWER_S: Final = 5.0  # within which a cluster's port has to answer
SETTINGS: Final = b"\4"  # the type of the frame with which both sides of HTTP/2, and so of gRPC, begin (RFC 9113, 3.4)
HELLO: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + SETTINGS + bytes(5)
ONE_THREAD: Final = {
    name: "1"
    for name in (
        "OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS",
        "TOKIO_WORKER_THREADS",  # NautilusTrader's, which read ahead: else one for each core in every process
    )
}  # fmt: skip

type Done = tuple[Any, str | None, str | None]  # the job; what the user can mend; the traceback of a fault of ours


@contextmanager
def no_main() -> Iterator[None]:
    """Processes started within do not run the user's script again, as multiprocessing's do that are spawned: one that starts a pipeline
    or a backtest without asking for its name would start another in each. What we spawn needs nothing of it."""
    main = sys.modules["__main__"]
    spec, file = main.__spec__, main.__dict__.pop("__file__", None)
    main.__spec__ = None
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


class Workers(Protocol):
    def run(self, work: Callable[[Any], object], jobs: Iterable[Any]) -> Iterator[Done]:
        """`work(job)` for all jobs, somewhere else; each job once, as it is done."""

    def close(self) -> None:
        """End all of them, at once."""


def attempt(work: Callable[[Any], object], job: Any) -> tuple[str | None, str | None]:
    """What went wrong in `work(job)`."""
    try:
        work(job)
    except InputError as e:
        return str(e), None
    except Exception:
        return None, traceback.format_exc()
    return None, None


# --- this machine ---------------------------------------------------------------------------------------------------------------------


def _serve(pipe: Any) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    while True:
        try:
            work, job = pipe.recv()
        except EOFError:  # the first process is gone
            return
        wrong = attempt(work, job)
        try:
            pipe.send(wrong)
        except OSError:
            return


class Processes:
    """`n` processes, begun afresh (spawn) with one thread each."""

    def __init__(self, n: int) -> None:
        self._n, self._context = n, get_context("spawn")
        self._free: list[tuple[Any, Any]] = []  # process, pipe
        self._busy: dict[Any, tuple[Any, Any]] = {}  # pipe -> process, job
        self._done: dict[Any, int] = {}  # pipe -> jobs of its process

    def _start(self) -> tuple[Any, Any]:
        ours, theirs = self._context.Pipe()
        before = {k: os.environ.get(k) for k in ONE_THREAD}
        os.environ.update(ONE_THREAD)
        try:
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            with no_main():
                process.start()
        finally:
            for k, v in before.items():
                if v is None:
                    del os.environ[k]
                else:
                    os.environ[k] = v
        theirs.close()
        return process, ours

    @property
    def pids(self) -> list[int]:
        return [p.pid for p, _ in (*self._free, *((p, None) for p, _ in self._busy.values()))]

    def run(self, work: Callable[[Any], object], jobs: Iterable[Any]) -> Iterator[Done]:
        waiting, tries = deque((job, 1) for job in jobs), dict[Any, int]()
        while waiting or self._busy:
            while waiting and len(self._busy) < self._n:
                process, pipe = self._free.pop() if self._free else self._start()
                job, tries[pipe] = waiting.popleft()
                try:
                    pipe.send((work, job))
                except OSError:  # it died while it was idle
                    waiting.appendleft((job, tries[pipe]))
                    continue
                self._busy[pipe] = process, job
            for pipe in connection.wait(list(self._busy)):
                process, job = self._busy.pop(pipe)
                end: Any = pipe
                try:
                    wrong = end.recv()
                except (EOFError, OSError):
                    process.join()
                    if tries[pipe] < ATTEMPTS:
                        waiting.append((job, tries[pipe] + 1))
                        continue
                    yield job, None, f"its process ended with exit code {process.exitcode}, {ATTEMPTS} times; out of memory?"
                    continue
                self._done[end] = self._done.get(end, 0) + 1
                if self._done[end] < LIFE:
                    self._free.append((process, pipe))
                else:
                    process.kill()
                    process.join()
                    del self._done[end]
                    end.close()
                yield job, *wrong

    def close(self) -> None:
        for process, _ in (*self._free, *((p, None) for p, _ in self._busy.values())):
            process.kill()
            process.join()
        self._free.clear()
        self._busy.clear()


# --- Ray ------------------------------------------------------------------------------------------------------------------------------


class Ray:
    """The machines of a Ray cluster; `address` as `ray.init` takes it. All of them must see the same folders.

    Raises InputError where Ray is not installed, or no cluster answers.
    """

    def __init__(self, address: str) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is told to anybody
        os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # workers run in this environment: a copy under `uv run` would find none
        named = os.environ.pop("RAY_ADDRESS", "")  # Ray would take it before ours
        at = named if named and address == "auto" else address
        if at.partition(":")[0] in ("127.0.0.1", "localhost"):  # Ray would look for it at this machine's address in the network
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        try:
            import ray
        except ImportError:
            raise InputError("--ray needs Ray: install it with `python -m uv sync --extra ray`") from None
        self._ray = ray
        root = str(Path(__file__).resolve().parents[1])
        paths = list(dict.fromkeys([root, os.getcwd(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]))
        told = {**ONE_THREAD, "PYTHONPATH": os.pathsep.join(paths), "RAY_USAGE_STATS_ENABLED": "0"}
        if not ray.is_initialized():
            try:
                _reach(at)
                ray.init(address=at, runtime_env={"env_vars": told}, log_to_driver=False, logging_level=logging.ERROR)
            except (RuntimeError, ValueError, OSError, OverflowError) as e:
                why = (str(e).splitlines() or [type(e).__name__])[0].partition(". ")[0].rstrip(".")
                where = "give HOST:PORT of one, or start it with `ray start --head`"
                raise InputError(f"--ray {address}: no Ray cluster answers ({why}): {where}") from None

    def run(self, work: Callable[[Any], object], jobs: Iterable[Any]) -> Iterator[Done]:
        ray = self._ray
        task = ray.remote(num_cpus=1, max_retries=20, max_calls=LIFE)(attempt)
        pending = {task.remote(work, job): job for job in jobs}
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=1.0)
            for ref in ready:
                job = pending.pop(ref)
                try:
                    yield job, *ray.get(ref)
                except ray.exceptions.RayError as e:
                    yield job, None, str(e)

    def close(self) -> None:
        self._ray.shutdown()


def _reach(address: str) -> None:
    """Raises OSError where nobody listens at HOST:PORT, or something that does not speak gRPC: Ray itself would wait for minutes, and then
    end the process."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():  # "auto", or what Ray refuses at once
        return
    with socket.create_connection((host.strip("[]"), int(port)), ANSWER_S) as line:
        if os.environ.get("RAY_USE_TLS", "0") not in ("0", "false", "False"):
            return
        line.sendall(HELLO)
        try:
            answer = line.recv(9, socket.MSG_WAITALL)
        except OSError:
            answer = b""
        if answer[3:4] != SETTINGS:
            raise OSError("something else listens there")
