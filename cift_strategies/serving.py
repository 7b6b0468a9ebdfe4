"""Inference beside the node: a process of its own holds the models, so that nothing they do can stop the trading loop.

:class:`Serving` is what the inference actor asks, as it asks :class:`LookAhead` in a backtest. It puts each feature vector into a ring of
shared memory and returns at once; the process (:mod:`cift_strategies.serving_process`) takes all that waits as one block, so that features
never skip an event and blocks grow when it is behind, and hands back the newest prediction of each instrument. A thread of the node
waits for those and passes them to the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from catalog.errors import InputError
from catalog.events import EVENT, Instrument
from cift_models.features import NAMES
from cift_strategies.messages import FeatureVector, Prediction
from cift_strategies.timings import Histogram, Timing
from cift_strategies.workers import no_main

if TYPE_CHECKING:
    from cift_models.gpu import Device
    from cift_strategies.outcome import Scored

CAPACITY: Final = 131_072  # events of the ring, 76 MB
HELD: Final = 256  # events that wait for the end of their batch before they are put there, at most
HEAD, TAIL, ASLEEP, LOST = range(4)  # words of the ring's header: events put, events taken, the process waits, events that found no room
NONE: Final = np.zeros(0, np.int64)
STUCK_S: Final = 10.0  # without progress, after which no stream waits for the models
STAGES: Final = ("queue", "predict", "return")  # of a prediction: waiting for the process, computing, the way back


@dataclass(frozen=True, slots=True)
class Models:
    """What the process loads: plain values, sent to it once."""

    artifact: Path
    instruments: Sequence[Instrument]
    own: tuple[str, ...] = ()  # import paths of the user's own members that the artifact may hold
    budget_ns: int | None = None  # of a member for a batch, see Engine
    altdata: Path | None = None
    seed: int = 7
    device: Device = "auto"  # see Engine.load
    results: Path | None = None  # folder for predictions.parquet; None: nothing is written
    learned: Mapping[str, bytes] = field(default_factory=dict)  # version of the models -> their weights of an earlier session, packed
    session: Path | None = None  # folder of the session's recording, which gets every prediction; None: they are not kept
    skip_from: int = 1_024  # where so many events wait, only the newest batch of each instrument is predicted


@njit(cache=True)
def _put(words, events, rows, came, closes, block, matrix, start, stop, now, end, more):  # type: ignore[no-untyped-def]
    """Rows `start` to `stop` of a block of events and the matrix of their features; `end`, `more`: which close a batch, -1 is none."""
    n, head, capacity = stop - start, words[HEAD], len(events)
    if head + n - words[TAIL] > capacity:
        words[LOST] += n
        return False
    for i in range(n):
        a = (head + i) % capacity
        events[a], came[a], closes[a] = block[start + i], now, i == end
        for j in range(matrix.shape[1]):
            rows[a, j] = matrix[start + i, j]
    for i in more:
        closes[(head + i) % capacity] = True
    words[HEAD] = head + n
    return True


def _shared(size: int) -> SharedMemory:
    """`size` bytes that are really there, else InputError. Pages are given as they are first written: unless all of them
    are asked for now, the node dies of SIGBUS within the session (in a container's default of 64 MB, after some 115,000 events)."""
    memory = SharedMemory(create=True, size=size)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(memory._fd, 0, size)  # type: ignore[attr-defined]
    except OSError as fault:
        memory.close()
        memory.unlink()
        raise InputError(
            f"/dev/shm: {fault.strerror}; events go to the models through {-(-size >> 20)} MiB of shared memory "
            "(give a container more: --shm-size 256m)"
        ) from None
    return memory


class Ring:
    """Events with their feature rows between one writer and one reader, in shared memory. A slot is written before HEAD passes it and read
    before TAIL does; both only grow, and a slot's place is its number modulo the capacity."""

    def __init__(self, capacity: int, name: str | None = None) -> None:
        f = len(NAMES)
        sizes = (64, capacity * EVENT.itemsize, capacity * 8 * f, capacity * 8, capacity)
        self.memory = _shared(sum(sizes)) if name is None else SharedMemory(name, track=False)
        starts, buffer = np.cumsum((0, *sizes)), self.memory.buf
        assert buffer is not None
        self.capacity = capacity
        self.words: NDArray[np.int64] = np.ndarray(8, np.int64, buffer)
        self.events: NDArray[Any] = np.ndarray(capacity, EVENT, buffer, int(starts[1]))
        self.rows: NDArray[np.float64] = np.ndarray((capacity, f), np.float64, buffer, int(starts[2]))
        self.came: NDArray[np.int64] = np.ndarray(capacity, np.int64, buffer, int(starts[3]))  # perf_counter of the node, ns
        self.closes: NDArray[np.bool_] = np.ndarray(capacity, np.bool_, buffer, int(starts[4]))
        if name is None:
            self.words[:] = 0
            _put(self.words, self.events, self.rows, self.came, self.closes, self.events, self.rows, 0, 0, 0, -1, NONE)  # compiles

    def put(self, block: NDArray[Any], matrix: NDArray[np.float64], first: int, stop: int, ends: Sequence[int], came: int) -> bool:
        """Append the events `first` to `stop` of `block` and their rows; `ends`: which of them close a batch, counted from `first`.

        False where they find no room, and then none of them is there.
        """
        return bool(_put(
            self.words, self.events, self.rows, self.came, self.closes, block, matrix, first, stop, came,
            ends[0] if ends else -1, np.array(ends[1:]) if len(ends) > 1 else NONE,
        ))  # fmt: skip

    def take(self, most: int) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_]]:
        """Copies of the oldest events that wait, at most `most`, up to the ring's end."""
        head, tail = int(self.words[HEAD]), int(self.words[TAIL])
        a = tail % self.capacity
        b = a + min(head - tail, most, self.capacity - a)
        taken = (self.events[a:b].copy(), self.rows[a:b].copy(), self.came[a:b].copy(), self.closes[a:b].copy())
        self.words[TAIL] = tail + b - a
        return taken

    @property
    def waiting(self) -> int:
        return int(self.words[HEAD] - self.words[TAIL])

    def close(self) -> None:
        del self.words, self.events, self.rows, self.came, self.closes
        self.memory.close()


@dataclass(frozen=True, slots=True)
class Answer:
    """What the process says of one block: the newest prediction of each instrument, and counts since it began."""

    predictions: tuple[Prediction, ...]  # latency_ns: 0, the node knows it
    came: tuple[int, ...]  # perf_counter at which the node put the event that closed the batch of each, ns
    taken: int  # perf_counter when the block was taken, and when it was predicted, ns
    done: int
    batches: int
    skipped: int  # batches whose prediction was superseded within its block, or not made because it would have been
    passed: int  # those of them whose prediction was not made
    failures: Mapping[str, int] = field(default_factory=dict)  # of each member
    late: Mapping[str, int] = field(default_factory=dict)
    waiting: int = 0  # events that waited when the block was taken, the block's among them


@dataclass(slots=True)
class Told:
    """What the process last told of its engine, under the engine's names."""

    model_version: str = ""
    members: tuple[str, ...] = ()
    failures: Mapping[str, int] = field(default_factory=dict)
    late: Mapping[str, int] = field(default_factory=dict)
    weights: NDArray[np.float64] | None = None  # (regimes + 1, H, members), once a second
    regret: Mapping[str, Any] = field(default_factory=dict)

    @property
    def learned(self) -> Told:
        return self


class Serving:
    """A predictor that answers later, on the node's loop, once :meth:`connect` has said how.

    `now` gives the stream's time. Attributes for whoever watches: `batches`, `skipped` and `passed` (see :class:`Answer`), `lost` (events
    that found no room: the members forget the stream and begin anew), `engine`, `timings` by stage, `fault` (why there is no model, None
    while there is), `reloads`.
    """

    def __init__(self, models: Models, now: Callable[[], int], capacity: int = CAPACITY) -> None:
        from cift_strategies.serving_process import serve

        self.models, self._now = models, now
        self._call_soon: Callable[..., object]
        self._accept: Callable[[Sequence[Prediction]], object]
        self.disconnect()
        self.ring = Ring(capacity)
        context = get_context("spawn")
        theirs, self._wake = context.Pipe(duplex=False)
        self._answers, replies = context.Pipe(duplex=False)
        orders, self._orders = context.Pipe(duplex=False)
        self.process = context.Process(
            target=serve, args=(models, self.ring.memory.name, capacity, theirs, orders, replies), name="cift-inference", daemon=True
        )
        with no_main():
            self.process.start()
        for end in (theirs, replies, orders):
            end.close()
        self.ready = threading.Event()
        self.finished = threading.Event()
        self.fault: str | None = "the models are being loaded"
        self.engine = Told()
        self.on_learned: Callable[[str, bytes], object] = lambda _version, _weights: None  # about once a second, on the loop
        self.on_reload: Callable[[str, int], object] = lambda _path, _at: None  # new models, and how many events the old ones had seen
        self.unkept = ""  # why there will be no report of the predictions
        self.on_unkept: Callable[[str], object] = lambda _why: None
        self.batches = self.skipped = self.passed = self.delivered = 0
        self.reloads = 0
        self._reloading: deque[Future[dict[str, Any]]] = deque()
        self.timings = {s: Timing() for s in STAGES}
        self.depth = Histogram()  # events that waited when a block with a prediction was taken
        self._scored: Scored | None = None
        self.newest = self.came = 0  # stamp of the newest event, and perf_counter when it came, ns
        self._stuck = -1  # events that had been taken when the models were given up waiting for
        self._since = 0  # perf_counter at which the oldest unanswered batch was put, 0: none
        self._block: Any = None  # events `_first` to `_stop` of it are not in the ring yet: they go with the batch that they belong to
        self._matrix: Any = None
        self._first = self._stop = 0
        self._thread = threading.Thread(target=self._listen, args=(self._answers,), name="cift-predictions", daemon=True)
        self._thread.start()

    def connect(self, call_soon: Callable[..., object], accept: Callable[[Sequence[Prediction]], object]) -> None:
        """From now on `accept` gets predictions, called through `call_soon` (asyncio's threadsafe one)."""
        self._call_soon, self._accept = call_soon, accept

    def disconnect(self) -> None:
        """Nobody waits for predictions: the loop is not there yet, or any more."""
        self._call_soon = lambda call, *arguments: call(*arguments)
        self._accept = lambda _predictions: None

    # --- on the loop ------------------------------------------------------------------------------------------------------------------

    def predict(self, vector: FeatureVector) -> Iterable[Prediction]:
        """Hand `vector` to the process; what it says comes through `accept`."""
        came = time.perf_counter_ns()
        self.came = came
        if vector.ts > self.newest:
            self.newest = vector.ts
        if vector.block is not self._block or vector.first != self._stop:
            self._hand_over((), came)
            self._block, self._matrix, self._first = vector.block, vector.matrix, vector.first
        before, self._stop = vector.first - self._first, vector.stop
        if vector.closes:
            ends = vector.closes if not before else tuple(before + i for i in vector.closes)
            if self._hand_over(ends, came) and self.fault is None:
                if not self._since:
                    self._since = came
                if self.ring.words[ASLEEP]:
                    self.ring.words[ASLEEP] = 0
                    self._wake.send_bytes(b".")
        elif self.held >= HELD:
            self._hand_over((), came)
        return ()

    def _hand_over(self, ends: Sequence[int], came: int) -> bool:
        """Put what is held into the ring; whether it found room."""
        first, self._first = self._first, self._stop
        return first == self._stop or self.ring.put(self._block, self._matrix, first, self._stop, ends, came)

    @property
    def held(self) -> int:
        """Events that wait for the end of their batch."""
        return self._stop - self._first

    @property
    def lost(self) -> int:
        return int(self.ring.words[LOST])

    async def room(self) -> None:
        """Wait while half of the ring is taken and the models load or work: for a stream that can wait, so that none of it is lost."""
        ring, taken, until = self.ring, -1, 0.0
        while ring.waiting > ring.capacity // 2 and (self.fault is None or not self.ready.is_set()):
            now = int(ring.words[TAIL])
            if now == self._stuck:
                return
            if now != taken or not self.ready.is_set():
                taken, until = now, time.monotonic() + STUCK_S
            elif time.monotonic() > until:
                self._stuck = now
            await asyncio.sleep(0.001)

    def silent_ns(self) -> int:
        """How long a batch has been waiting for an answer; 0 where none is."""
        return time.perf_counter_ns() - self._since if self._since else 0

    def reload(self, path: Path) -> Future[dict[str, Any]]:
        """Ask the process to swap the artifact `path` in; the future gets what came of it, or InputError."""
        asked: Future[dict[str, Any]] = Future()
        if self.fault is not None:
            asked.set_exception(InputError(f"nothing can be reloaded: {self.fault}"))
            return asked
        self._reloading.append(asked)
        self._orders.send(("reload", path))
        self._nudge()
        return asked

    def trading(self, instrument: int, ts: int, trades: bool) -> None:
        """See :meth:`cift_models.inference.Engine.trading`."""
        with contextlib.suppress(OSError):  # the process has ended: `fault` says so
            self._orders.send(("trading", (instrument, ts, trades)))

    def _nudge(self) -> None:
        self.ring.words[ASLEEP] = 0
        self._wake.send_bytes(b".")

    def _receive(self, answer: Answer) -> None:
        now, back = self._now(), time.perf_counter_ns()
        self.batches, self.skipped, self.passed = answer.batches, answer.skipped, answer.passed
        self.engine.failures, self.engine.late = answer.failures, answer.late
        self._since = 0 if not self.ring.waiting else back
        self.depth.add(answer.waiting)
        for came in answer.came:
            self.timings["queue"].add(answer.taken - came)
        self.timings["predict"].add(answer.done - answer.taken)
        self.timings["return"].add(back - answer.done)
        self.delivered += len(answer.predictions)
        self._accept([replace(p, latency_ns=max(0, now - p.ts)) for p in answer.predictions])

    def _told(self, what: str, value: Any) -> None:
        if what == "ready":
            self.engine.model_version, self.engine.members, self.engine.weights = value
            self.fault = None
            self.ready.set()
        elif what == "weights":
            self.engine.weights, self.engine.regret = value
        elif what == "learned":
            self.on_learned(*value)
        elif what == "reload":
            asked = self._reloading.popleft()
            if "error" in value:
                asked.set_exception(InputError(value["error"]))
            else:
                self.reloads += 1
                self.on_reload(str(value["path"]), value.pop("at"))
                self.engine.model_version, self.models = value["version"], replace(self.models, artifact=Path(value["path"]))
                asked.set_result(value)
        elif what == "unkept":
            self.unkept = value
            self.on_unkept(value)
        elif what == "fault":
            self.fault = value

    # --- the thread that listens ------------------------------------------------------------------------------------------------------

    def _listen(self, answers: Connection) -> None:
        try:
            while True:
                got = answers.recv()
                if isinstance(got, tuple) and got[0] == "scored":
                    self._scored = got[1]
                    self.finished.set()
                    continue
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for it any more
                    if isinstance(got, Answer):
                        self._call_soon(self._receive, got)
                    else:
                        self._call_soon(self._told, *got)
                if not isinstance(got, Answer) and got[0] == "fault":
                    self.ready.set()
        except (EOFError, OSError):
            if not self.finished.is_set() and (self.fault is None or not self.ready.is_set()):
                self.fault = "the models' process has ended"
            self.ready.set()
            self.finished.set()

    # --- the end ----------------------------------------------------------------------------------------------------------------------

    def finish(self, seconds: float) -> Scored | None:
        """Stop taking events; what the predictions were worth, or None where the process does not tell within `seconds`, or has not loaded
        its models yet."""
        if not self.ready.is_set():
            return None
        self._hand_over((), time.perf_counter_ns())
        try:
            self._orders.send(("finish", None))
            self._nudge()
        except (BrokenPipeError, OSError):
            return None
        self.finished.wait(seconds)
        return self._scored

    def close(self) -> None:
        """End the process, whatever it is doing, and give its memory back."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self._thread.join(5)
        self.ring.close()
        self.ring.memory.unlink()
