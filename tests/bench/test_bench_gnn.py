"""Cross-asset graph speed beside yardsticks in the same run: a decision of four instruments, the torch net, one lag of a covariance."""

from __future__ import annotations

import numpy as np
import pytest
from timing import best

from catalog.events import EVENT, SCALE, Instrument
from cift_models.gnn import Gnn
from cift_models.gnn_stream import CELL, EDGE, NOW, Inputs, Scales, T
from cift_models.gnn_train import Config, torch_net, weights_of
from cift_models.labels import H
from cift_models.leadlag import contrast
from cift_models.windows import Block

NAMES = ("mid", "spread", "imbalance_1", "ofi_fast", "ofi_1", "trade_imbalance_1s")
N = 4


@pytest.fixture(scope="module")
def gnn() -> Gnn:
    import torch

    torch.manual_seed(0)
    scales = Scales(*(np.stack([np.zeros((N, n)), np.ones((N, n))]) for n in (len(CELL), len(NOW))))
    weights = weights_of(torch_net(N, Config()), np.zeros((N, 4 * H), np.float32))
    weights = weights._replace(wide=np.random.default_rng(0).normal(size=weights.wide.shape).astype(np.float32))
    ids = [Instrument(f"{k}.X", SCALE // 100, SCALE, 1.0, "USD").id for k in range(N)]
    return Gnn(NAMES, ids, np.ones(N), np.full(N, 0.01), weights, scales, np.ones((N, H), bool), np.ones((N, H)), {})


def stream(events: int = 60_000, gap_ns: int = 1_000_000) -> Block:
    """A thousand events a second of four instruments, a decision at every second one: busier than batches of 10 ms allow."""
    rng = np.random.default_rng(0)
    e = np.zeros(events, EVENT)
    e["ts_init"], e["instrument"] = 1_700_000_000 * SCALE + np.cumsum(rng.integers(1, 2 * gap_ns, events)), rng.integers(0, N, events)
    mid = 100 + 0.005 * np.cumsum(rng.choice([-1, 0, 0, 1], events))
    return Block(e, np.column_stack([mid, rng.normal(size=(events, len(NAMES) - 1))]), np.arange(1, events, 2))


def test_fifty_thousand_decisions_a_second_of_four_instruments(benchmark, gnn: Gnn) -> None:
    """The yardstick: passing over the same events without a vote to give; and the torch net, a graph at a time."""
    import torch

    block, silent = stream(), Gnn(NAMES, gnn.ids, gnn.multiplier, gnn.tick, gnn.weights, gnn.scales, gnn.votes & False, gnn.sizes, {})
    net, rng = torch_net(N, Config()), np.random.default_rng(0)
    x = Inputs(*(rng.normal(size=s).astype(np.float32) for s in ((1, N, T, len(CELL)), (1, N, len(NOW)), (1, N, N, len(EDGE)))),
               np.ones((1, N, N), bool))  # fmt: skip
    tensors = [torch.from_numpy(a) for a in x]

    def one() -> None:
        with torch.no_grad():
            net(*tensors)

    votes, passing, torch_net_once = best(
        lambda: gnn.predict(block, gnn.new_state()), lambda: silent.predict(block, silent.new_state()), one
    )  # fmt: skip
    benchmark.pedantic(lambda: gnn.predict(block, gnn.new_state()), rounds=3)
    each = (votes - passing) / len(block.closes)
    benchmark.extra_info |= {
        "decisions/s": len(block.closes) / votes, "us a vote": 1e6 * each, "events/s without votes": len(block.events) / passing,
        "votes in one torch forward": torch_net_once / each,
    }  # fmt: skip
    assert torch_net_once / each > 20


def test_a_lag_costs_one_walk_over_both_prices(benchmark) -> None:
    """The yardstick: merging the stamps by sorting them."""
    rng = np.random.default_rng(0)
    tx, ty = (np.cumsum(rng.integers(1, 10**7, 100_000)) for _ in range(2))
    dx, dy = rng.normal(size=(2, 99_999))
    lags, cov, square = np.arange(10) * 10**6, np.empty(10), np.empty(10)
    ours, sorting = best(
        lambda: contrast(tx, dx, ty, dy, lags, cov, square),
        lambda: [np.sort(np.concatenate([tx, ty - lag]), kind="stable") for lag in lags],
    )
    benchmark.pedantic(contrast, (tx, dx, ty, dy, lags, cov, square), rounds=3)
    benchmark.extra_info |= {"ns a tick and lag": 1e9 * ours / (10 * 200_000), "ratio to sorting": sorting / ours}
    assert sorting / ours > 0.2
