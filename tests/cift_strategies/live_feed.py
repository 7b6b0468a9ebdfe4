"""A live node that listens to a gateway: what its feature actor publishes, until a test has heard enough."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import zstandard
from nautilus_trader.common import DataActor, DataActorConfig, Environment, LoggerConfig, LogLevel
from nautilus_trader.live import LiveNode
from nautilus_trader.model import ActorId, TraderId

from catalog.dbn import Dbn
from catalog.events import Instrument
from catalog.status import STATUS
from cift_strategies.faults import Faults
from cift_strategies.feature_actor import FeatureActor
from cift_strategies.feeds import databento
from cift_strategies.feeds.gateway import DEMO_KEY, Gateway
from cift_strategies.messages import FEATURES, FeatureVector

GUARD_S = 60


class Listener(DataActor):
    """Keeps every FeatureVector; `enough` is asked after each."""

    def __new__(cls, *_args: Any) -> Listener:
        return super().__new__(cls)

    def __init__(self, enough: Callable[[Heard], bool], heard: Heard) -> None:
        super().__init__(DataActorConfig(actor_id=ActorId("LISTENER")))
        self.enough, self.heard = enough, heard

    def on_start(self) -> None:
        self.subscribe_topic(FEATURES, self._hear)

    def _hear(self, vector: Any) -> None:
        self.heard.vectors.append(vector)
        self.heard.n += len(vector.events)
        if not self.heard.done.is_set() and self.enough(self.heard):
            self.heard.done.set()


@dataclass
class Heard:
    link: Any = None
    actor: Any = None
    n: int = 0  # events
    vectors: list[FeatureVector] = field(default_factory=list)
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def last(self) -> int:
        return self.vectors[-1].ts if self.vectors else 0

    @property
    def events(self) -> np.ndarray[Any, Any]:
        return np.concatenate([v.events for v in self.vectors])

    @property
    def rows(self) -> np.ndarray[Any, Any]:
        return np.concatenate([v.rows for v in self.vectors])


def statuses(file: Path, at: Sequence[int]) -> bytes:
    """A status file for the MBO file `file`: all its instruments are halted and open again in turn, at the stamps `at`."""
    import databento_dbn as dbn

    spans = {s.symbol: s.number for s in Dbn(file).spans}
    day = dt.date(2000, 1, 1), dt.date(2100, 1, 1)
    maps = [
        SimpleNamespace(raw_symbol=n, intervals=[SimpleNamespace(start_date=day[0], end_date=day[1], symbol=str(k))])
        for n, k in spans.items()
    ]
    head = dbn.Metadata(
        Dbn(file).metadata.dataset, at[0], dbn.SType.RAW_SYMBOL, dbn.SType.INSTRUMENT_ID, dbn.Schema.STATUS, symbols=list(spans),
        mappings=maps, version=3,
    ).encode()  # fmt: skip
    kind = bytes([STATUS.itemsize // 4, 0x12, 1, 0])
    rows = [(kind, k, t, t, 7 if n % 2 else 8, 1, 0, "~", "~", "~", b"") for n, t in enumerate(at) for k in spans.values()]
    return zstandard.compress(head + np.array(rows, STATUS).tobytes())


@contextlib.asynccontextmanager
async def playing(files: Sequence[Path], **how: Any) -> AsyncIterator[Gateway]:
    gateway = Gateway(files, **{"speed": 0.0, **how})
    await gateway.start()
    try:
        yield gateway
    finally:
        await gateway.stop()


async def listen(
    gateway: Gateway, instruments: Sequence[Instrument], enough: Callable[[Heard], bool], reader: Any = "direct", key: str = DEMO_KEY,
    actors: Sequence[Any] = (), done: asyncio.Event | None = None,
) -> Heard:  # fmt: skip
    """Run a node on the gateway until `enough`, or until `done` is set: with a FeatureActor, or with `actors` alone (`done`)."""
    feed = databento.client(
        instruments, gateway.tape.dataset, key, live=f"127.0.0.1:{gateway.port}", historical=f"http://127.0.0.1:{gateway.http_port}",
        reader=reader,
    )  # fmt: skip
    heard, faults = Heard(getattr(feed.config, "link", None), done=done or asyncio.Event()), Faults()
    node = (
        LiveNode.builder("TEST", TraderId("TEST-001"), Environment.SANDBOX)
        .add_data_client(feed.name, feed.factory, feed.config)
        .with_logging(LoggerConfig(stdout_level=LogLevel.ERROR, print_config=False))
        .with_reconciliation(False)
        .with_delay_post_stop_secs(0)
        .build()
    )
    heard.actor = FeatureActor(instruments, faults, None, feed.restamp)
    if heard.link is not None and not done:
        heard.link.taken = lambda: heard.actor.vectors
    for actor in actors if done else (heard.actor, Listener(enough, heard), *actors):
        node.add_actor(actor)
    running = asyncio.ensure_future(node.run_async())
    waiting = asyncio.ensure_future(heard.done.wait())
    try:
        for _ in range(GUARD_S * 10):
            await asyncio.wait((running, waiting), timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
            if heard.link is not None and heard.link.fault is not None:
                raise heard.link.fault
            if running.done() or waiting.done():
                break
        faults.reraise()
        assert heard.done.is_set(), f"heard {heard.n} events in {GUARD_S} s; {heard.link and heard.link.said}"
    finally:
        waiting.cancel()
        node.handle().stop()
        await asyncio.wait((running,), timeout=GUARD_S)
        del node, running  # one node at a time
    return heard
