"""What a window that a program sent is worth to the models: the engine of one artifact, and a prediction after the window's last row.

Apart from :mod:`cift_strategies.server.window`, so that a server starts without numba and the models.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

from catalog.errors import InputError
from catalog.events import ADD, EVENT, F_LAST, F_MBP, F_TOB, SCALE, Instrument
from cift_models.features import NAMES
from cift_models.hmm import REGIMES
from cift_models.inference import Engine, stream
from cift_models.windows import HORIZONS_NS, Block
from cift_strategies.recommendation import recommendation
from cift_strategies.server.problems import Fault
from cift_strategies.server.requests import EventsWindow, FeaturesWindow, PredictResponse
from cift_strategies.server.schemas import Horizon, InstrumentInfo, Prediction, Side

DEPTH: Final = {1: F_TOB, 2: F_MBP, 3: 0}
FROM_EVENTS: Final = ("hawkes",)  # members that a window of features tells nothing


def instrument(info: dict[str, Any]) -> Instrument:
    x = InstrumentInfo.model_validate(info)
    return Instrument(
        x.symbol, round(x.tick * SCALE), round(x.lot * SCALE), x.multiplier, x.currency, x.session, x.price_precision, x.size_precision,
        x.kind, x.maker_fee, x.taker_fee, x.fee_per_unit, x.level,
    )  # fmt: skip


class Computer:
    """`own`: import paths of members that artifacts may hold besides ours. One call at a time."""

    def __init__(self, own: tuple[str, ...]) -> None:
        self._own = own
        self._loaded: tuple[Any, dict[str, Engine]] | None = None

    def predict(
        self, asked: EventsWindow | FeaturesWindow, artifact: str, version: str, info: dict[str, dict[str, Any]]
    ) -> PredictResponse:
        table = [instrument(info[asked.symbol])]
        engine = self._engine("events" if isinstance(asked, EventsWindow) else "features", artifact, version, table[0])
        began = time.perf_counter_ns()
        engine.reset()
        if isinstance(asked, EventsWindow):
            events = _events(asked, table[0])
            (block,) = stream(table, [events])
            rows, closes = block.rows, block.closes
        else:
            events, rows = _rows(asked, NAMES)
            closes = np.zeros(0, np.int64)
        if not len(closes) or closes[-1] != len(events) - 1:
            closes = np.append(closes, len(events) - 1)
        p = engine.predict(Block(events, rows, closes))
        took = (time.perf_counter_ns() - began) / 1e6
        i = len(closes) - 1
        one = _One(p, i)
        mid, spread = float(rows[-1, NAMES.index("mid")]), float(rows[-1, NAMES.index("spread")])
        regime = REGIMES[one.regime] if one.regime >= 0 else None
        said = recommendation(one, table[0], mid, spread, engine.members, REGIMES, HORIZONS_NS, config=engine.ensemble.config)
        lead = one.votes[:, :, 2] - one.votes[:, :, 0]
        tilt = engine.ensemble.config.tilt
        horizons = [
            Horizon(
                horizon_ms=ns // 1_000_000, direction=cast(Side, int(one.direction[h])), proba=_vote(one.proba[h]),
                confidence=_number(one.confidence[h]), magnitude_ticks=_number(one.magnitude[h]),
                up=int((lead[:, h] > tilt).sum()), down=int((lead[:, h] < -tilt).sum()), voting=int(np.isfinite(lead[:, h]).sum()),
                votes={m: _vote(one.votes[a, h]) for a, m in enumerate(engine.members)},
            )
            for h, ns in enumerate(HORIZONS_NS)
        ]  # fmt: skip
        prediction = Prediction(
            symbol=asked.symbol, ts=int(p.ts[i]), latency_ms=took, regime=regime, model_version=engine.model_version, horizons=horizons
        )
        return PredictResponse(
            symbol=asked.symbol, model_version=engine.model_version, events=len(events), compute_ms=took, prediction=prediction,
            recommendation=said,
        )  # fmt: skip

    def _engine(self, kind: str, artifact: str, version: str, x: Instrument) -> Engine:
        key = (artifact, version, Path(artifact, "manifest.json").stat().st_mtime_ns if Path(artifact, "manifest.json").exists() else 0)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = (key, {})
        engines = self._loaded[1]
        name = f"{kind} {x}"
        if name not in engines:
            try:
                engine = Engine.load(artifact, [x], self._own)
            except InputError as e:
                raise Fault(409 if "trained on" in str(e) else 503, str(e)) from None
            if kind == "features":
                engine.leave_out(FROM_EVENTS)
            engines[name] = engine
        return engines[name]


class _One:
    """Row `i` of predictions."""

    def __init__(self, p: Any, i: int) -> None:
        self.proba, self.magnitude, self.confidence, self.direction = p.proba[i], p.magnitude[i], p.confidence[i], p.direction[i]
        self.regime, self.votes = int(p.regime[i]), p.votes[i]


def _events(asked: EventsWindow, x: Instrument) -> np.ndarray[Any, Any]:
    out = np.zeros(len(asked.events), EVENT)
    for row, e in zip(out, sorted(asked.events, key=lambda e: e.ts)):
        flags = DEPTH[x.level] if e.action in "ACM" else 0
        row["ts_init"], row["ts_event"] = e.ts, e.ts if e.ts_event is None else e.ts_event
        row["action"], row["side"], row["order_id"], row["flags"] = ord(e.action), e.side, e.order_id, flags | F_LAST
        row["price"], row["size"] = round((e.price or 0.0) * SCALE), round(e.size * SCALE)
    return out


def _rows(asked: FeaturesWindow, names: tuple[str, ...]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Feature rows; the events beside them carry their stamps and tell nothing."""
    given = sorted(asked.features, key=lambda row: row.ts)
    place = {name: i for i, name in enumerate(names)}
    events, rows = np.zeros(len(given), EVENT), np.full((len(given), len(names)), np.nan)
    events["action"] = ADD
    for i, row in enumerate(given):
        events["ts_init"][i] = events["ts_event"][i] = row.ts
        for name, value in row.values.items():
            rows[i, place[name]] = np.nan if value is None else value
    return events, rows


def _vote(v: Any) -> Any:
    return None if v[0] != v[0] else tuple(round(float(x), 4) for x in v)


def _number(v: Any) -> float | None:
    return round(float(v), 4) if np.isfinite(v) else None
