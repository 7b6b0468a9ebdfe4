"""The present state of a system in the form of `server.schemas.Frame`: plain dicts, ready for JSON.

Reads features, inference, strategy and cache, and changes none of them; used by the monitor when a frame is due.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from catalog.book import BASE, CAP, EVENTS, LEVELS, new_book
from catalog.events import SCALE
from cift_models.ensemble import Config
from cift_models.features import NAMES
from cift_strategies.messages import FeatureVector, Prediction
from cift_strategies.server.schemas import LEVELS as DEEP

if TYPE_CHECKING:
    from cift_strategies.system import System

MID: Final = NAMES.index("mid")
SPREAD: Final = NAMES.index("spread")
MS: Final = 1_000_000
TILT: Final = Config().tilt


@njit(cache=True)
def _ladder(s, prices, sizes, counts):  # type: ignore[no-untyped-def]
    """The best levels of book `s` into (2, levels) arrays, bids in row 0; returns how many there are of each."""
    found = (0, 0)
    for k in range(2):
        p, m = s[BASE] + 3 * k * s[CAP], 0
        entry = p + 3 * s[LEVELS + k] - 3
        while entry >= p and m < prices.shape[1]:
            if s[entry + 1] != 0 or s[entry + 2] != 0:
                prices[k, m] = (s[entry] if k == 0 else -s[entry]) / 1e9
                sizes[k, m] = s[entry + 1] / 1e9
                counts[k, m] = s[entry + 2]
                m += 1
            entry -= 3
        found = (m, found[1]) if k == 0 else (found[0], m)
    return found


def number(value: float) -> float | None:
    return None if value != value or value in (np.inf, -np.inf) else float(value)


def _vote(proba: list[float]) -> list[float] | None:
    return None if proba[0] != proba[0] else proba


def leading_horizon(p: Prediction) -> int | None:
    """The horizon to speak of: the most confident of those with a direction, or of all; None where nobody votes."""
    known = [h for h in range(len(p.direction)) if p.confidence[h] == p.confidence[h]]
    return max([h for h in known if p.direction[h]] or known, key=lambda h: float(p.confidence[h]), default=None)


class Present:
    """Tells of `system` as it is now; `mode` names the kind of run."""

    def __init__(self, system: System, mode: str) -> None:
        self.system, self.mode = system, mode
        self.table, self.regimes = list(system.strategy.terms.instruments), list(system.strategy.terms.regimes)
        self.newest: list[Prediction | None] = [None] * len(self.table)  # of each instrument
        self.words = [""] * len(self.table)  # the newest decision on it
        self._ladders = np.zeros((2, DEEP)), np.zeros((2, DEEP)), np.zeros((2, DEEP), np.int64)
        _ladder(new_book(), *self._ladders)

    @property
    def engine(self) -> Any:
        """The engine of whoever predicts, or what is told of it; None where there is none."""
        return getattr(self.system.inference.predictor, "engine", None)

    def regime(self, index: int) -> str | None:
        return self.regimes[index] if 0 <= index < len(self.regimes) else None

    def leading(self) -> FeatureVector | None:
        """The newest of all instruments."""
        return max((v for v in self.system.strategy.last if v is not None), key=lambda v: v.ts, default=None)

    def tilts(self, p: Prediction) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Members that tilt up, tilt down, vote; (H,) each."""
        ensemble = getattr(self.engine, "ensemble", None)
        tilt = TILT if ensemble is None else ensemble.config.tilt
        lead = p.votes[:, :, 2] - p.votes[:, :, 0]
        return (lead > tilt).sum(0), (lead < -tilt).sum(0), (lead == lead).sum(0)

    def info(self, k: int) -> dict[str, Any]:
        x = self.table[k]
        return {
            "symbol": x.id, "kind": x.kind, "currency": x.currency, "tick": x.tick / SCALE, "lot": x.lot / SCALE,
            "multiplier": x.multiplier, "price_precision": x.price_precision, "size_precision": x.size_precision, "level": x.level,
            "session": x.session, "maker_fee": x.maker_fee, "taker_fee": x.taker_fee, "fee_per_unit": x.fee_per_unit,
        }  # fmt: skip

    def instrument(self, k: int, now: int) -> dict[str, Any]:
        words, vector, p = self.system.features.states[k].words, self.system.strategy.last[k], self.newest[k]
        prices, sizes, counts = self._ladders
        m, n = _ladder(words, prices, sizes, counts)
        mid, spread = (None, None) if vector is None else (number(vector.rows[-1, MID]), number(vector.rows[-1, SPREAD]))
        return {
            "symbol": self.table[k].id, "ts": None if vector is None else vector.ts,
            "age_ms": None if vector is None else (now - vector.ts) / MS, "events": int(words[EVENTS]), "mid": mid, "spread_ticks": spread,
            "bids": list(zip(prices[0, :m].tolist(), sizes[0, :m].tolist(), counts[0, :m].tolist())),
            "asks": list(zip(prices[1, :n].tolist(), sizes[1, :n].tolist(), counts[1, :n].tolist())),
            "regime": None if p is None else self.regime(p.regime), "prediction": None if p is None else self.prediction(p),
            "decision": self.words[k],
        }  # fmt: skip

    def prediction(self, p: Prediction) -> dict[str, Any]:
        proba, confidence, magnitude = p.proba.round(4).tolist(), p.confidence.round(4).tolist(), p.magnitude.round(3).tolist()
        votes, (up, down, voting) = p.votes.astype(np.float64).round(4).tolist(), self.tilts(p)
        members = self.members()
        return {
            "symbol": self.table[p.instrument].id, "ts": p.ts, "latency_ms": p.latency_ns / MS, "regime": self.regime(p.regime),
            "model_version": p.model_version,
            "horizons": [
                {
                    "horizon_ms": ns // MS, "direction": p.direction[h], "proba": _vote(proba[h]), "confidence": number(confidence[h]),
                    "magnitude_ticks": number(magnitude[h]), "up": int(up[h]), "down": int(down[h]), "voting": int(voting[h]),
                    "votes": {name: _vote(vote[h]) for name, vote in zip(members, votes)},
                }
                for h, ns in enumerate(p.horizons_ns)
            ],
        }  # fmt: skip

    def members(self) -> list[str]:
        """Their names, in the order of the votes; empty while nobody has told."""
        return [] if self.engine is None else list(self.engine.members)

    def weights_now(self) -> NDArray[np.float64] | None:
        """(regimes + 1, H, members), or None where nobody has told of any."""
        weights = None if self.engine is None else self.engine.learned.weights
        return None if weights is None or not weights.size else weights

    def position(self, k: int) -> dict[str, Any]:
        strategy, x = self.system.strategy, self.table[k]
        position, trade, vector = strategy.ledger.positions[k], strategy.trades[k], strategy.last[k]
        mid = strategy.ledger.mids[k] if vector is None else float(vector.rows[-1, MID])
        mid = mid if mid == mid else strategy.ledger.mids[k]
        open_ = (mid - position.average) * position.size / SCALE * x.multiplier if position.size and mid == mid else 0.0
        told: dict[str, Any] = {
            "symbol": x.id, "size": position.size / SCALE, "average": position.average if position.size else None, "unrealised": open_,
            "realised": position.realised, "fees": position.fees, "net": position.realised + open_ - position.fees, "currency": x.currency,
            "trade": None, "entry_side": 0, "limit": None, "stop": None, "target": None, "until": None, "leaving": "",
        }  # fmt: skip
        if trade is not None:
            s = trade.signal
            told |= {
                "trade": trade.number, "entry_side": s.side, "limit": s.limit / SCALE, "stop": s.stop / SCALE, "target": s.target / SCALE,
                "until": trade.until or None, "leaving": trade.leaving,
            }  # fmt: skip
        return told

    def sums(self, positions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        ledger, found = self.system.strategy.ledger, []
        for currency in ledger.currencies:
            mine = [p for p in positions if p["currency"] == currency]
            realised, open_, fees = (sum(p[name] for p in mine) for name in ("realised", "unrealised", "fees"))
            net = realised + open_ - fees
            drawdown = max(0.0, ledger.highest[currency] - net)
            found.append({
                "currency": currency, "net": net, "realised": realised, "unrealised": open_, "fees": fees, "drawdown": drawdown,
                "max_drawdown": max(ledger.drawdown[currency], drawdown), "capital": ledger.limits.capital,
            })  # fmt: skip
        return found

    def node(self, status: Mapping[str, Any], started: int, counts: Mapping[str, int]) -> dict[str, Any]:
        s, types = self.system, self.system.strategy.order_types
        predictor = s.inference.predictor
        ring = getattr(predictor, "ring", None)
        told = {
            "events": self.events(), "vectors": s.features.vectors, "predictions": s.inference.published,
            "skipped": getattr(predictor, "skipped", 0), "lost": getattr(predictor, "lost", 0),
            "queue": 0 if ring is None else ring.waiting, "signals": s.strategy.signals, "orders": len(s.strategy.orders),
            "fills": len(s.strategy.fills),
            "rejects": types["OrderRejected"] + types["OrderDenied"], "callback_errors": s.strategy.faults.count,
        }  # fmt: skip
        return {
            "state": status.get("state", "running"), "reason": status.get("reason") or "", "mode": status.get("mode", self.mode),
            "venue": status.get("venue", ""), "speed": status.get("speed", 1.0), "started": started,
            "counts": {**told, **counts, **status.get("counts", {})},
            "declined": {k: v for k, v in s.strategy.decisions.items() if k != "entered"},
        }  # fmt: skip

    def events(self) -> int:
        return sum(int(state.words[EVENTS]) for state in self.system.features.states.values())

    def feeds(self, status: Mapping[str, Any], now: int) -> list[dict[str, Any]]:
        """As the node tells, or the run's source where nobody does."""
        none = {"reconnects": 0, "gaps": 0, "errors": 0, "note": ""}
        if told := status.get("feeds"):
            return [none | feed for feed in told]
        newest = self.leading()
        return [{
            "name": self.mode, "connected": True, "age_ms": None if newest is None else (now - newest.ts) / MS,
            "lag_ms": None if newest is None else (newest.ts - int(newest.events["ts_event"][-1])) / MS, "events": self.events(), **none,
        }]  # fmt: skip

    def horizons_ms(self) -> list[int]:
        p = next((p for p in self.newest if p is not None), None)
        return [] if p is None else [n // MS for n in p.horizons_ns]

    def models(self, status: Mapping[str, Any]) -> dict[str, Any]:
        engine, newest = self.engine, next((p for p in self.newest if p is not None), None)
        failures, late = ({}, {}) if engine is None else (engine.failures, engine.late)
        version = engine.model_version if engine is not None else "" if newest is None else newest.model_version
        told: dict[str, Any] = {
            "version": version, "regimes": self.regimes, "horizons_ms": self.horizons_ms(),
            "members": [
                {"member": name, "present": name in failures, "failures": failures.get(name, 0), "late": late.get(name, 0)}
                for name in self.members()
            ],
            "path": None, "reloads": 0, "reload_error": "",
        }  # fmt: skip
        return {**told, **status.get("models", {})}

    def weights(self) -> dict[str, Any] | None:
        values = self.weights_now()
        if values is None:
            return None
        return {
            "regimes": [*self.regimes, "unknown"], "horizons_ms": self.horizons_ms(), "members": self.members(),
            "values": values.round(5).tolist(),
        }  # fmt: skip
