"""How fast book and features go: in replay, one event at a time, and against hftbacktest's replay of the same recording.

`python -m uv run pytest tests/bench/test_bench_features.py --benchmark-only`; the ratios stand in `extra_info`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from nautilus_trader.model import BookAction, BookOrder, InstrumentId, OrderBookDelta, OrderBookDeltas, OrderSide, Price, Quantity

from catalog.book import depth
from catalog.events import EVENT, SCALE, Instrument, read_catalog, read_dbn
from cift_models.features import NAMES, new_state, replay
from cift_strategies.intake import Intake
from cift_strategies.translate import UNIT

pytestmark = pytest.mark.benchmark(timer=time.process_time)  # CPU time, so that a busy machine distorts ratios less
HERE = Path(__file__).parent
ROW = np.dtype(
    [("ev", "u8"), ("exch_ts", "i8"), ("local_ts", "i8"), ("px", "f8"), ("qty", "f8"), ("order_id", "u8"), ("ival", "i8"), ("fval", "f8")],
    align=True,
)
BUY, SELL, EXCHANGE, LOCAL, CHANGE, TRADE, CLEAR = 1 << 29, 1 << 28, 1 << 31, 1 << 30, 1, 2, 3  # hftbacktest's flags


@pytest.fixture(scope="module")
def binance(data):
    instruments, blocks = read_catalog(data / "catalogs/binance-2024-08-08")
    return np.concatenate(list(blocks)), instruments


@pytest.fixture(scope="module")
def es(data):
    events, (instrument,) = read_dbn(data / "databento/esh4-glbx-mdp3-20231225.mbo.dbn.zst", "ESH4")
    return events, instrument


def their_rows(events):  # type: ignore[no-untyped-def]
    kinds = {ord("T"): TRADE, ord("R"): CLEAR}
    out = np.zeros(len(events), ROW)
    out["ev"] = [kinds.get(a, CHANGE) | EXCHANGE | LOCAL for a in events["action"].tolist()]
    out["ev"] |= np.where(events["side"] > 0, BUY, np.where(events["side"] < 0, SELL, 0)).astype(np.uint64)
    out["exch_ts"], out["local_ts"] = events["ts_event"], events["ts_init"]
    out["px"] = events["price"] / SCALE
    out["qty"] = np.where(events["action"] == ord("C"), 0, events["size"]) / SCALE
    return out


def hftbacktest(events, instrument, folder):  # type: ignore[no-untyped-def]
    """Its rows per second, or None where it cannot be had."""
    np.savez(folder / "rows.npz", data=their_rows(events))
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        return None
    own = ["--isolated", "--no-project", "--with", "hftbacktest==2.4.4", "--with", "numpy<2.3"]
    numbers = [str(folder / "rows.npz"), str(instrument.tick / SCALE), str(instrument.lot / SCALE)]
    run = subprocess.run([uv, "run", *own, HERE / "hftbacktest_replay.py", *numbers], capture_output=True, text=True, check=False)
    return float(run.stdout) if run.returncode == 0 else None


def replay_by_blocks(events, instruments, out):  # type: ignore[no-untyped-def]
    states = {}
    for start in range(0, len(events), len(out)):
        piece = events[start : start + len(out)]
        replay(piece, instruments, states, out[: len(piece)])


def test_replay_of_the_binance_perpetual_against_hftbacktest(benchmark, binance, tmp_path):
    events, instruments = binance
    k = next(k for k, i in enumerate(instruments) if i.id == "BTCUSDT-PERP.BINANCE")
    own = np.ascontiguousarray(events[events["instrument"] == k])
    out = np.empty((65_536, len(NAMES)))
    replay_by_blocks(own, instruments, out)
    theirs = hftbacktest(own, instruments[k], tmp_path)
    benchmark.pedantic(replay_by_blocks, (own, instruments, out), rounds=10)
    ours = len(own) / benchmark.stats.stats.min
    benchmark.extra_info |= {"events_per_second": ours, "hftbacktest_rows_per_second": theirs, "ratio": ours / theirs if theirs else None}
    if theirs is None:
        pytest.skip("hftbacktest cannot be installed here; our own figure is in extra_info")


@pytest.mark.parametrize("market", ["binance", "es"])
def test_replay_with_all_features(benchmark, request, market):
    events, instruments = request.getfixturevalue(market)
    instruments = [instruments] if isinstance(instruments, Instrument) else instruments
    out = np.empty((65_536, len(NAMES)))
    replay_by_blocks(events, instruments, out)
    benchmark.pedantic(replay_by_blocks, (events, instruments, out), rounds=max(8, 3_000_000 // len(events)))
    benchmark.extra_info |= {"events_per_second": len(events) / benchmark.stats.stats.min, "features": len(NAMES)}


def test_depth_alone(benchmark, es):
    benchmark.pedantic(depth, (es[0], 1), rounds=8, warmup_rounds=1)
    benchmark.extra_info["events_per_second"] = len(es[0]) / benchmark.stats.stats.min


def test_one_event_from_python(benchmark, es):
    """The cost of a call with one event, beside what an event costs in replay."""
    events, instrument = es
    single = [events[i : i + 1] for i in range(len(events))]
    row = np.empty((1, len(NAMES)))

    def stream():  # type: ignore[no-untyped-def]
        advance = new_state(instrument).advance
        for e in single:
            advance(e, row)

    benchmark.pedantic(stream, rounds=5, warmup_rounds=1)
    start = time.process_time()
    replay(events, [instrument])
    benchmark.extra_info |= {
        "microseconds_per_event": 1e6 * benchmark.stats.stats.min / len(events),
        "ratio_to_replay": benchmark.stats.stats.min / (time.process_time() - start),
    }


def test_one_message_of_nautilus(benchmark, es):
    """Live, each delta comes in a message of its own: from there to its vector, closes and all."""
    events, instrument = es
    id_, count = InstrumentId.from_str(instrument.id), 20_000
    actions = {ord("A"): BookAction.ADD, ord("M"): BookAction.UPDATE, ord("C"): BookAction.DELETE, ord("R"): BookAction.CLEAR}
    messages = []
    for e in events[events["action"] != ord("T")][:count].tolist():
        price, size = Price.from_raw(e[2] * UNIT, 2), Quantity.from_raw(max(e[3], SCALE) * UNIT, 0)
        order = BookOrder(OrderSide.BUY if e[7] > 0 else OrderSide.SELL, price, size, e[4])
        messages.append(OrderBookDeltas(id_, [OrderBookDelta(id_, actions[e[6]], order, e[8], e[5], e[0], e[1])]))

    def stream():  # type: ignore[no-untyped-def]
        take = Intake([instrument]).deltas
        for message in messages:
            take(message)

    benchmark.pedantic(stream, rounds=5, warmup_rounds=1)
    benchmark.extra_info["microseconds_per_message"] = 1e6 * benchmark.stats.stats.min / count


def test_a_crowd_of_orders(benchmark):
    """A million live orders, so that the table of orders is far larger than the caches."""
    n = 1_000_000
    events = np.zeros(n, EVENT)
    events["order_id"], events["action"], events["side"], events["size"] = np.arange(1, n + 1), ord("A"), 1, SCALE
    events["price"] = np.random.default_rng(0).integers(1, 2_000, n) * SCALE
    depth(events[:10], 1)
    benchmark.pedantic(depth, (events, 1), rounds=3)
    benchmark.extra_info["events_per_second"] = n / benchmark.stats.stats.min
