"""The process that holds the models: takes what waits in the ring as one block, predicts it, hands back the newest of each instrument.

Started by :mod:`cift_strategies.serving`; imports nothing of Nautilus. Between two blocks it does what it is ordered to: swaps an
artifact, or ends and tells what the predictions were worth.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from catalog.errors import InputError
from catalog.events import ADD, EVENT, F_LAST, SCALE, Instrument
from cift_models.inference import Engine, Predictions, stream
from cift_models.windows import HORIZONS_NS, Block
from cift_strategies.messages import Prediction
from cift_strategies.outcome import Outcomes
from cift_strategies.recording import Votes
from cift_strategies.serving import ASLEEP, LOST, TAIL, Answer, Models, Ring
from cift_strategies.weights import packed, unpacked

MOST: Final = 16_384  # events of a block
IDLE_S: Final = 0.05  # longest sleep
WEIGHTS_EVERY_S: Final = 1.0
KEEP_S: Final = 0.5  # what was predicted is kept so often, all of it together: block by block that took ten times as long as to predict it


def serve(models: Models, memory: str, capacity: int, wake: Connection, orders: Connection, replies: Connection) -> None:
    """The process: load, warm up, serve until "finish" or until the node is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the node ends this process
    ring = Ring(capacity, memory)
    try:
        engine = load(models)
        warm_up(engine, models.instruments)
        if engine.model_version in models.learned:
            unpacked(models.learned[engine.model_version], engine.learned)
        server = _Server(models, engine, ring, wake, orders, replies)
        replies.send(("ready", (engine.model_version, tuple(engine.members), engine.learned.weights.copy())))
        server.run()
    except InputError as e:
        replies.send(("fault", str(e)))
    except (BrokenPipeError, EOFError):
        pass
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        replies.send(("fault", "the models failed: " + traceback.format_exc().strip().splitlines()[-1]))


def load(models: Models) -> Engine:
    engine = Engine.load(models.artifact, models.instruments, models.own, models.budget_ns, device=models.device)
    if models.altdata is not None:
        from catalog.altdata import read

        engine.tell(read(models.altdata))
    return engine


def warm_up(engine: Engine, instruments: Any) -> None:
    """Run every kernel and model once on made-up events, then forget them: the first real event meets compiled code."""
    n = np.arange(240)
    events = np.zeros(len(n), EVENT)
    events["ts_event"] = events["ts_init"] = 1_700_000_000 * SCALE + n * 20_000_000
    events["order_id"], events["sequence"], events["size"], events["flags"], events["action"] = n + 1, n + 1, SCALE, F_LAST, ADD
    events["side"] = np.where(n % 2, 1, -1)
    events["price"] = 100 * SCALE - events["side"].astype(np.int64) * (1 + n % 5) * (SCALE // 100)
    events["instrument"] = n % len(instruments)
    for block in stream([Instrument(x.id, SCALE // 100, SCALE, 1.0, x.currency) for x in instruments], [events[:120], events[120:]]):
        engine.predict(block)
    engine.reset()
    for counts in (engine.failures, engine.late):
        counts.update(dict.fromkeys(counts, 0))


class _Server:
    def __init__(self, models: Models, engine: Engine, ring: Ring, wake: Connection, orders: Connection, replies: Connection) -> None:
        self.models, self.engine, self.ring = models, engine, ring
        self.wake, self.orders, self.replies = wake, orders, replies
        self.outcomes: Outcomes | None = None
        if models.results is not None:
            self.outcomes = Outcomes(engine, models.artifact, models.instruments, models.results, models.seed)
        self.votes = Votes(models.session) if models.session is not None else None
        self.batches = self.skipped = self.passed = self.lost = 0
        self._told = self._kept = time.monotonic()
        self._held: list[tuple[Block, Predictions, NDArray[np.int64]]] = []  # what is to be kept: the latest blocks, and how long each took
        self._first = self._events = 0  # number of the first event of these blocks, and how many they have
        self._parent = os.getppid()

    def run(self) -> None:
        try:
            self._run()
        finally:
            try:
                self._keep()
            finally:
                if self.votes is not None:
                    self.votes.close()

    def _run(self) -> None:
        ring = self.ring
        while True:
            if self.orders.poll() and self._obey(*self.orders.recv()):
                return
            if ring.waiting:
                self._block()
            elif self._held and time.monotonic() - self._kept >= KEEP_S:
                self._keep()
            else:
                ring.words[ASLEEP] = 1
                if not ring.waiting and self.wake.poll(IDLE_S):
                    self.wake.recv_bytes()
                ring.words[ASLEEP] = 0
                if os.getppid() != self._parent:
                    return

    def _block(self) -> None:
        first, waiting = int(self.ring.words[TAIL]), self.ring.waiting
        events, rows, came, closing = self.ring.take(MOST)
        if self.ring.words[LOST] != self.lost:
            self.lost = int(self.ring.words[LOST])
            self.engine.reset()
        taken = time.perf_counter_ns()
        batches = np.flatnonzero(closing).astype(np.int64)
        block = Block(events, rows, batches)
        if waiting >= self.models.skip_from:
            block = Block(events, rows, newest_of(events["instrument"], batches), batches)
        p = self.engine.predict(block)
        done = time.perf_counter_ns()
        self.passed += len(batches) - len(p.ts)
        if len(p.ts):
            newest = sorted({int(k): i for i, k in enumerate(p.instrument)}.values())
            self.batches += len(batches)
            self.skipped += len(batches) - len(newest)
            at = came[block.closes]
            predictions = tuple(_prediction(p, i, self.engine.model_version) for i in newest)
            counts, totals = (dict(self.engine.failures), dict(self.engine.late)), (self.batches, self.skipped, self.passed)
            self.replies.send(Answer(predictions, tuple(at[newest].tolist()), taken, done, *totals, *counts, waiting))
        if self.votes is not None or self.outcomes is not None:
            if not self._held:
                self._first = first
            self._held.append((block, p, done - came[block.closes]))
            self._events += len(events)
            if self._events >= MOST:
                self._keep()
        if time.monotonic() - self._told >= WEIGHTS_EVERY_S:
            self._told = time.monotonic()
            self.replies.send(("weights", (self.engine.learned.weights.copy(), self.engine.regret())))
            self.replies.send(("learned", (self.engine.model_version, packed(self.engine.learned))))

    def _keep(self) -> None:
        """Note what was predicted since this was done last."""
        self._kept = time.monotonic()
        if not self._held:
            return
        blocks, parts, took = zip(*self._held)
        self._held, self._events = [], 0
        starts = np.cumsum([0, *(len(b.events) for b in blocks)])
        closes = np.concatenate([b.closes + start for b, start in zip(blocks, starts)])
        block = Block(np.concatenate([b.events for b in blocks]), np.concatenate([b.rows for b in blocks]), closes)
        p, latency = Predictions(*map(np.concatenate, zip(*parts))), np.concatenate(took)
        if self.votes is not None:
            self.votes.push(self._first, closes, p, latency, self.engine.model_version)
        if self.outcomes is not None:
            try:
                self.outcomes.push(block, p, latency)
            except OSError as e:  # a full disk costs the report, and not the models
                self._unkept(e)

    def _obey(self, order: str, argument: Any) -> bool:
        if order == "reload":
            self.replies.send(("reload", self._reload(argument)))
            return False
        if order == "trading":
            self.engine.trading(*argument)
            return False
        while self.ring.waiting:
            self._block()
        self._keep()
        scored = None
        if self.outcomes is not None:
            try:
                scored = self.outcomes.finish(self.engine)
            except OSError as e:
                self._unkept(e)
        self.replies.send(("scored", scored))
        return True

    def _unkept(self, error: OSError) -> None:
        self.outcomes = None
        self.replies.send(("unkept", f"predictions cannot be kept ({error})"))

    def _reload(self, path: Any) -> dict[str, Any]:
        self._keep()
        try:
            kept = self.engine.swap(path)
        except InputError as e:
            return {"path": str(path), "error": str(e)}
        except Exception as e:  # a member of the user's own that cannot be loaded: nothing has changed yet, the old ones go on
            return {"path": str(path), "error": f"{str(path)[:200]} cannot be loaded: {type(e).__name__}: {str(e)[:200]}"}
        return {"path": str(path), "version": self.engine.model_version, "members": kept, "at": int(self.ring.words[TAIL])}


def newest_of(instrument: Any, batches: Any) -> Any:
    """Of the events that close `batches` (m,), ascending, the last of each instrument, ascending; `instrument` (n,) of all events."""
    back = batches[::-1]
    return np.sort(back[np.unique(instrument[back], return_index=True)[1]])


def _prediction(p: Predictions, i: int, version: str) -> Prediction:
    return Prediction(
        int(p.instrument[i]), int(p.ts[i]), 0, HORIZONS_NS, p.proba[i], p.magnitude[i], p.confidence[i],
        tuple(p.direction[i].tolist()), int(p.regime[i]), p.votes[i], version,
    )  # fmt: skip
