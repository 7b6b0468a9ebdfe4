"""Transformer speed beside torch in the same run: four instruments at once as in live trading, a block of history, and gathering."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from timing import best

from catalog.events import EVENT, SCALE, Instrument
from cift_models import transformer_train as tf
from cift_models.labels import H
from cift_models.transformer import COLUMNS, Config, Transformer, windows
from cift_models.windows import SECOND, Block, History, closes, new_batches

NAMES = ("mid", *COLUMNS)
N = 4
INSTRUMENTS = [Instrument(f"I{k}.X", SCALE // 100, SCALE, 1.0, "USD") for k in range(N)]


@pytest.fixture(scope="module")
def member() -> Transformer:
    """As large as a trained one."""
    config, rng = Config(), np.random.default_rng(0)
    w = tf.initial(len(COLUMNS), N, config, 0)
    w["join.out"] = rng.normal(size=w["join.out"].shape).astype(np.float32)
    zero, one = np.zeros((N, len(COLUMNS))), np.ones((N, len(COLUMNS)))
    return Transformer(NAMES, tuple(COLUMNS), config, w, zero, one, np.ones(H, np.bool_), np.ones(H), np.zeros((H, 3)), np.ones((N, H)))


@pytest.fixture(scope="module")
def block() -> Block:
    """Twenty minutes, so that every window is full at its end; 40,000 events."""
    rng = np.random.default_rng(1)
    e = np.zeros(40_000, EVENT)
    e["ts_init"], e["instrument"] = 1_709_303_400 * SECOND + np.sort(rng.integers(0, 1_200 * SECOND, len(e))), rng.integers(0, N, len(e))
    return Block(e, rng.normal(size=(len(e), len(NAMES))), closes(new_batches(N), e))


def last_windows(block: Block, last: int) -> tf.Batch:
    """What torch needs for the same decisions, the last of the block."""
    import torch

    h = History(N, range(len(COLUMNS)))
    wanted = np.zeros(len(block.closes), np.bool_)
    wanted[-last:] = True
    v = h.push(Block(block.events, block.rows[:, 1:], block.closes), wanted)
    k = block.events["instrument"][block.closes][-last:].astype(np.int64)
    x = [torch.from_numpy(a) for a in (*windows(v), k)]
    return tf.Batch(tuple(x[:3]), tuple(x[3:6]), x[6], x[7])


def rounds(block: Block, state: Any, member: Transformer) -> list[tuple[Block, Any]]:
    """One event of each instrument at one instant, each closing a batch, again and again; every fourth time a second has turned."""
    out, t = [], int(block.events["ts_init"][-1])
    rng = np.random.default_rng(2)
    for n in range(400):
        t += SECOND if n % 4 == 0 else 20_000_000
        e = np.zeros(N, EVENT)
        e["ts_init"], e["instrument"] = t, np.arange(N)
        out.append((Block(e, rng.normal(size=(N, len(NAMES))), np.arange(N)), state))
    return out


def test_four_instruments_at_once_cost_less_than_torch(benchmark, member, block) -> None:
    import torch

    state = member.new_state()
    member.predict(block, state)
    took = []
    for piece, s in rounds(block, state, member):
        wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
        member.predict(piece, s)
        took.append((time.perf_counter_ns() - wall, time.thread_time_ns() - cpu))
    w, batch = {k: torch.from_numpy(v) for k, v in member.weights.items()}, last_windows(block, N)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            again = rounds(block, state, member)[0][0]
            ours, yardstick = best(lambda: member.predict(again, state), lambda: tf.network(w, batch, member.config.heads), times=30)
    finally:
        torch.set_num_threads(threads)
    benchmark.pedantic(member.predict, (again, state), rounds=30)
    (p50, cpu50), (p99, cpu99), (p999, cpu999) = np.quantile(took, (0.5, 0.99, 0.999), axis=0) / 1e6
    benchmark.extra_info |= {"p50 ms": p50, "p99 ms": p99, "p99.9 ms": p999, "p99 ms of CPU": cpu99, "ratio": yardstick / ours}
    print(f"\nfour instruments at once: p50 {p50:.3f} ms, p99 {p99:.3f} ms, p99.9 {p999:.3f} ms on the clock;")
    print(f"p50 {cpu50:.3f} ms, p99 {cpu99:.3f} ms, p99.9 {cpu999:.3f} ms of CPU; torch {yardstick * 1e3:.2f} ms of CPU at best")
    assert yardstick / ours > 1


def test_a_block_of_history_costs_less_than_torch_in_its_best_batches(benchmark, member, block) -> None:
    import torch

    w, batch = {k: torch.from_numpy(v) for k, v in member.weights.items()}, last_windows(block, 256)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            ours, yardstick = best(
                lambda: member.predict(block, member.new_state()), lambda: tf.network(w, batch, member.config.heads), times=3
            )
    finally:
        torch.set_num_threads(threads)
    benchmark.pedantic(lambda: member.predict(block, member.new_state()), rounds=3)
    each, torches = ours / len(block.closes), yardstick / 256
    benchmark.extra_info |= {"decisions/s": 1 / each, "torch": 1 / torches, "ratio": torches / each, "parameters": member.parameters()}
    print(f"\nblock: {1 / each:,.0f} decisions/s a core; torch {1 / torches:,.0f}")
    assert torches / each > 1


def test_gathering_costs_less_than_serving(benchmark, member, block) -> None:
    def gather() -> None:
        Transformer.gatherer(INSTRUMENTS, NAMES).push(block)

    ours, yardstick = best(gather, lambda: member.predict(block, member.new_state()), times=3)
    benchmark.pedantic(gather, rounds=3)
    benchmark.extra_info |= {"decisions/s": len(block.closes) / ours, "ratio": yardstick / ours}
    assert yardstick / ours > 1
