"""How fast the gateway plays, and how fast a node takes it, as ratios of CPU time to a yardstick run beside them.

`python -m uv run pytest tests/bench/test_bench_gateway.py --benchmark-only -s` prints records a second too.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import databento_dbn
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from catalog.dbn import Dbn
from catalog.synthetic import make_market
from cift_strategies.feeds.direct import Rows
from cift_strategies.feeds.gateway import DEMO_KEY, Gateway
from cift_strategies.feeds.wire import connect

RECORDS = 200_000


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_market(tmp_path_factory.mktemp("bench") / "market", 14, sessions=1, events=RECORDS, instruments=2).mbo[0]


async def played(file: Path, use: Any) -> float:
    """CPU seconds from the first record to the last, gateway and client together."""
    gateway = Gateway([file], speed=0.0)
    await gateway.start()
    wire = await connect("127.0.0.1", gateway.port, DEMO_KEY, gateway.tape.dataset)
    wire.subscribe("mbo", ["ALL_SYMBOLS"])
    wire.start()
    await gateway.clock.started.wait()
    began, n, want = time.process_time(), 0, len(gateway.tape.base.ts)
    async for data, at in wire.pieces():
        mbo = data[at + 1] == 0xA0
        n += int(mbo.sum())
        use(data, at, mbo)
        if n == want:
            break
    took = time.process_time() - began
    wire.close()
    await gateway.stop()
    return took


def decoded(file: Path) -> float:
    """The yardstick: databento's own decoder makes an object of each record."""
    data = b"".join(rows.tobytes() for _, rows, _ in Dbn(file).records())
    began = time.process_time()
    databento_dbn.DBNDecoder(has_metadata=False, input_version=3).write_and_decode(data)
    return time.process_time() - began


def test_gateway_sends_faster_than_a_client_decodes(benchmark: BenchmarkFixture, file: Path) -> None:
    def once() -> float:
        return asyncio.run(played(file, lambda *_: None)) / decoded(file)

    ratio = min(benchmark.pedantic(once, rounds=1, iterations=1), once(), once())
    print(f"\ngateway and line: {ratio:.2f} of databento's decoder")
    benchmark.extra_info["ratio"] = ratio
    assert ratio < 2.0


def test_rows_are_made_faster_than_databentos_objects(benchmark: BenchmarkFixture, file: Path) -> None:
    import numpy as np

    from catalog.dbn import MBO
    from catalog.events import read_dbn

    _, instruments = read_dbn(file)
    raw = np.concatenate([rows.reshape(-1).view(MBO) for _, rows, _ in Dbn(file).records()])

    def once() -> float:
        rows = Rows(instruments)
        for k, s in enumerate(Dbn(file).spans):
            rows.learn(s.number, k)
        began = time.process_time()
        for n in range(0, len(raw), 512):
            rows.finish(rows.orders(raw[n : n + 512]))
        return (time.process_time() - began) / decoded(file)

    once()
    ratio = min(benchmark.pedantic(once, rounds=1, iterations=1), once(), once())
    print(f"\nrows, checked and moved: {ratio:.2f} of databento's decoder")
    benchmark.extra_info["ratio"] = ratio
    assert ratio < 4.0
