"""Yardstick, run in an environment of its own (its numpy pin is not ours): hftbacktest replays rows of its own format; prints rows/s.

python -m uv run --isolated --no-project --with hftbacktest==2.4.4 --with 'numpy<2.3' hftbacktest_replay.py ROWS.npz TICK LOT
"""

import sys
import time

import numpy as np
from hftbacktest import BacktestAsset, HashMapMarketDepthBacktest
from numba import njit


@njit
def follow(market):  # type: ignore[no-untyped-def]
    while market.elapse(100_000_000) == 0:
        pass


def seconds(rows, tick, lot):  # type: ignore[no-untyped-def]
    asset = (
        BacktestAsset()
        .data(rows)
        .linear_asset(1.0)
        .constant_order_latency(0, 0)
        .risk_adverse_queue_model()
        .no_partial_fill_exchange()
        .trading_value_fee_model(0.0, 0.0)
        .tick_size(tick)
        .lot_size(lot)
    )
    market = HashMapMarketDepthBacktest([asset])
    start = time.process_time()
    follow(market)
    taken = time.process_time() - start
    market.close()
    return taken


if __name__ == "__main__":
    rows, tick, lot = np.load(sys.argv[1])["data"], float(sys.argv[2]), float(sys.argv[3])
    seconds(rows[:1_000], tick, lot)
    print(len(rows) / min(seconds(rows, tick, lot) for _ in range(5)))
