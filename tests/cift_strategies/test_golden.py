"""Whole runs on real data, exact to the event, the order, the cent and the digest.

No model is in them: the bigger queue says where the price goes, by a rule that any processor computes alike, so that a changed number
means changed reading, features, execution or accounting. A deliberate change of execution changes them, and its commit says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from catalog.book import depth
from catalog.databento import import_dbn
from catalog.events import SCALE, Instrument, catalog_range, read_catalog
from cift_models.features import NAMES
from cift_strategies.faults import Faults
from cift_strategies.messages import FeatureVector, Prediction
from cift_strategies.risk import Limits
from cift_strategies.settings import Settings
from cift_strategies.strategy import EnsembleStrategy, Terms
from cift_strategies.system import Replay, assemble, run_backtest

ES = "esh4-glbx-mdp3-20231225.mbo.dbn.zst"
TOML = Path(__file__).parents[2] / "docs/instruments/esh4.toml"
LATENCY_NS = 1_000_000  # of a decision, and of an order


class BiggerQueue:
    """Four ticks in five seconds towards the bigger of the two best queues, where it has three times the other's size."""

    imbalance = NAMES.index("imbalance_1")

    def predict(self, vector: FeatureVector) -> Iterable[Prediction]:
        for i in vector.closes:
            lean = float(vector.rows[i, self.imbalance])
            if math.isfinite(lean) and abs(lean) >= 0.5:
                proba = np.array([[0.0, 0.1, 0.9]] if lean > 0 else [[0.9, 0.1, 0.0]])
                yield Prediction(
                    vector.instrument, int(vector.events["ts_init"][i]), LATENCY_NS, (5 * SCALE,), proba, np.array([4.0]),
                    np.array([0.8]), (1 if lean > 0 else -1,), -1, np.full((1, 1, 3), np.nan, np.float32), "golden",
                )  # fmt: skip


def traded(root: Path, instruments: list[Instrument], start: int, end: int) -> tuple[dict[str, Any], EnsembleStrategy]:
    limits = Limits()
    system = assemble(Terms(instruments, Settings(), limits, order_latency_ns=LATENCY_NS), BiggerQueue())
    _, node, _ = run_backtest(system, Replay(root, instruments, start, end, limits.capital, LATENCY_NS), Faults())
    strategy = system.strategy
    node.dispose()
    told = {
        "vectors": system.features.vectors, "predictions": system.inference.published, "orders": len(strategy.orders),
        "fills": len(strategy.fills), "realised": round(sum(p.realised - p.fees for p in strategy.ledger.positions), 2),
        "digest": strategy.digest[:16],
    }  # fmt: skip
    return told, strategy


def test_the_es_session(data: Path, tmp_path: Path) -> None:
    root = import_dbn([data / "databento" / ES], tmp_path / "catalog", TOML).root
    told, strategy = traded(root, read_catalog(root)[0], *catalog_range(root))
    assert told == {
        "vectors": 62_421, "predictions": 3_100, "orders": 681, "fills": 342, "realised": -2_465.00, "digest": "6590de6886fb3805",
    }  # fmt: skip
    events = np.concatenate(list(read_catalog(root)[1]))
    book = depth(events, 10)
    assert any(f[10] == "taker" for f in strategy.fills)
    for ts, side, price, kind in ((f[0], f[5], f[6], f[10]) for f in strategy.fills):
        if kind == "taker":  # at a price that stood in the recorded book when the order arrived
            row = book[np.searchsorted(events["ts_init"], ts, "right") - 1]
            assert round(price * SCALE) in row["ask_px" if side > 0 else "bid_px"]


def test_a_minute_of_binance(data: Path) -> None:
    root = data / "catalogs/binance-2024-08-08"
    first, _ = catalog_range(root)
    told, _ = traded(root, read_catalog(root)[0], first, first + 60 * SCALE)
    assert told == {
        "vectors": 204_032, "predictions": 3_246, "orders": 1_047, "fills": 1_580, "realised": -79.71, "digest": "48ca5fe922c50dcb",
    }  # fmt: skip
