"""Quotes at a given rate from a WebSocket server through the Polygon client to an actor of a node; what arrived, how late, at what cost.

`python -m uv run python tests/bench/polygon_throughput.py [--rate 100000] [--seconds 10]` prints one line of JSON. The server is a process
of its own; its frames are made before the first is sent. `lost` counts sequence numbers that never came.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import resource
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "cift_strategies")]

SYMBOLS = ("AAPL", "MSFT", "NVDA", "TSLA")
BATCH = 100  # messages of a frame
T0 = 1_790_000_000_000


def frames(n: int) -> list[bytes]:
    """`n` quotes by the published schema in frames of :data:`BATCH`; sequence numbers 1, 2, ... by symbol."""
    rng = np.random.default_rng(1)
    cents, sizes = rng.integers(10_000, 20_000, n), rng.integers(1, 900, (2, n))
    text = [
        f'{{"ev":"Q","sym":"{SYMBOLS[i % 4]}","bx":4,"bp":{c / 100},"bs":{a},"ax":7,"ap":{(c + 1) / 100},"as":{b},"c":0,"i":[604],'
        f'"t":{T0 + i // 100},"q":{i // 4 + 1},"z":3}}'
        for i, (c, a, b) in enumerate(zip(cents.tolist(), *sizes.tolist()))
    ]
    return [f"[{','.join(text[i : i + BATCH])}]".encode() for i in range(0, n, BATCH)]


def serve(n: int, rate: float, pipe: Connection) -> None:
    """A server that sends the frames when all symbols are subscribed to, `rate` messages a second (0: as fast as they are taken)."""
    from websockets.asyncio.server import serve as listen

    data = frames(n)

    async def one(socket: Any) -> None:
        await socket.send('[{"ev":"status","status":"connected","message":"Connected Successfully"}]')
        await socket.recv()
        await socket.send('[{"ev":"status","status":"auth_success","message":"authenticated"}]')
        topics: set[str] = set()
        while len(topics) < len(SYMBOLS):
            topics |= set(json.loads(await socket.recv())["params"].split(","))
        began = time.perf_counter()
        for k, frame in enumerate(data):
            if rate and (ahead := began + k * BATCH / rate - time.perf_counter()) > 0:
                await asyncio.sleep(ahead)
            await socket.send(frame, text=True)
        pipe.send(time.perf_counter() - began)
        await socket.wait_closed()

    async def main() -> None:
        async with listen(one, "127.0.0.1", 0, compression=None, write_limit=1 << 20) as server:
            pipe.send(server.sockets[0].getsockname()[1])
            await server.serve_forever()

    asyncio.run(main())


def measure(n: int, rate: float = 0.0) -> dict[str, Any]:
    """Send `n` quotes; seconds are of CPU where they are called so."""
    from nautilus_trader.common import DataActor, DataActorConfig, Environment, LoggerConfig, LogLevel
    from nautilus_trader.live import LiveNode
    from nautilus_trader.model import ActorId, InstrumentId, TraderId

    from catalog.events import SCALE, Instrument
    from cift_strategies.feeds import polygon

    class Counter(DataActor):
        def __new__(cls, *_args: Any) -> Counter:
            return super().__new__(cls)

        def __init__(self) -> None:
            super().__init__(DataActorConfig(actor_id=ActorId("COUNTER")))
            self.n, self.late, self.done = 0, [], asyncio.Event()

        def on_start(self) -> None:
            for x in instruments:
                self.subscribe_quotes(InstrumentId.from_str(x.id))

        def on_quote(self, quote: Any) -> None:
            self.n += 1
            if self.n % 97 == 0:
                self.late.append(time.time_ns() - quote.ts_init)
            if self.n == 1:
                self.began, self.cpu = time.perf_counter(), time.process_time()
            if self.n == n:
                self.took, self.spent = time.perf_counter() - self.began, time.process_time() - self.cpu
                self.done.set()

    near, far = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(n, rate, far), daemon=True)
    server.start()
    instruments = [Instrument(f"{s}.POLYGON", SCALE // 100, SCALE, 1.0, "USD", None, 4, 0, "equity", level=1) for s in SYMBOLS]
    factory, config = polygon.client(SYMBOLS, "k" * 32, instruments=instruments, feed=f"ws://127.0.0.1:{near.recv()}", backlog=1 << 30)
    node = (
        LiveNode.builder("BENCH", TraderId("BENCH-001"), Environment.SANDBOX)
        .with_logging(LoggerConfig(stdout_level=LogLevel.OFF))
        .with_delay_post_stop_secs(0)
        .with_reconciliation(False)
        .add_data_client(polygon.NAME, factory, config)
        .build()
    )
    counter = Counter()
    node.add_actor(counter)

    async def main(node: LiveNode) -> None:
        task = asyncio.ensure_future(node.run_async())
        done = asyncio.ensure_future(counter.done.wait())
        await asyncio.wait((done, task), timeout=60 + 10 * n / 100_000, return_when=asyncio.FIRST_COMPLETED)
        handle.stop()
        await asyncio.wait((task,), timeout=30)

    handle = node.handle()
    asyncio.run(main(node))
    sent_s = near.recv() if near.poll(1) else float("nan")
    server.terminate()
    server.join()
    told, pulses = config.link.statistics(), config.link.health.pulses
    reader = resource.getrusage(resource.RUSAGE_CHILDREN)
    late = np.array(counter.late) / 1e6
    return {
        "messages": n, "arrived": counter.n, "lost": sum(p.missing for p in pulses) + n - counter.n,
        "dropped_frames": told["dropped_frames"], "sent_per_s": n / sent_s, "arrived_per_s": n / counter.took if counter.n == n else 0.0,
        "node_us": counter.spent / n * 1e6 if counter.n == n else float("nan"),
        "others_us": (reader.ru_utime + reader.ru_stime) / n * 1e6,  # server and reader, their start included
        "late_ms": dict(zip(("p50", "p99", "max"), np.percentile(late, (50, 99, 100)).round(3).tolist())), "waits": told["waits"],
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=float, default=100_000.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    asked = parser.parse_args()
    many = int((asked.rate or 100_000) * asked.seconds) // BATCH * BATCH
    print(json.dumps(measure(many, asked.rate)))
