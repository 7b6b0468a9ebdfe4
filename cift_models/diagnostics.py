"""What is watched while models serve, and cannot be told from their predictions afterwards: drift, weights over time, Hawkes residuals.

:class:`Diagnostics` is pushed every block of a stream with the engine that answers to it; :meth:`Diagnostics.told` gives plain values for
`summary["diagnostics"]`. It also counts what the market traded, from which capacity is estimated. Memory is bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from catalog.events import SCALE, Instrument
from cift_models import artifacts, drift
from cift_models.ensemble import Learned
from cift_models.features import FEATURES
from cift_models.hawkes import Gatherer, Hawkes
from cift_models.hawkes_path import goodness, residuals
from cift_models.inference import Engine
from cift_models.windows import Block

MOMENTS: Final = 120  # of the ensemble's weights that are kept; beyond, every second one is dropped
HAWKES_EVENTS: Final = 200_000  # of an instrument, the newest, whose residuals are tested
QUANTILES: Final = 25  # of the QQ data


class Diagnostics:
    """`since` (ns): what lies before teaches the engine but is not counted here."""

    def __init__(self, engine: Engine, artifact: str | Path, instruments: Sequence[Instrument], since: int = 0) -> None:
        self._engine, self._since, self._ids = engine, since, [x.id for x in instruments]
        trained = artifacts.read(artifact).manifest["instruments"]
        self._place = [trained.index(x) for x in self._ids]
        reference = drift.Reference.load(Path(artifact))
        self._drift = None if reference is None else drift.Counts(drift.Reference(*(a[self._place] for a in reference)))
        self._traded = np.zeros(len(instruments))
        self._trades = np.zeros(len(instruments), np.int64)
        self._moments: list[tuple[int, Learned]] = []
        self._every, self._seen = 1, 0
        self._first, self._last = 0, 0
        self._hawkes: Hawkes | None = next((m for m in engine.present if isinstance(m, Hawkes)), None)
        self._typed = None if self._hawkes is None else Gatherer(len(instruments), self._hawkes.config.types, 4096, HAWKES_EVENTS // 4096)

    def push(self, block: Block, ts: NDArray[np.int64]) -> None:
        """`ts` (m,) of the predictions at the closes of `block`."""
        new = block.events[block.events["ts_init"] >= self._since]
        if not len(new):
            return
        self._first, self._last = self._first or int(new["ts_init"][0]), int(new["ts_init"].max())
        trade = new[new["action"] == ord("T")]
        n = len(self._ids)
        self._traded += np.bincount(trade["instrument"], trade["size"] / SCALE, n)[:n]
        self._trades += np.bincount(trade["instrument"], minlength=n)[:n]
        if self._drift is not None:
            at = block.closes[ts >= self._since]
            self._drift.push(block.rows[at], block.events["instrument"][at])
        if self._typed is not None:
            self._typed.push(Block(new, block.rows[:0], block.closes[:0]))
        if self._seen % self._every == 0:
            w = self._engine.learned
            kept = {name: getattr(w, name).copy() for name in ("weights", "between", "member_loss", "both_loss", "awake", "rounds")}
            self._moments.append((self._last, Learned(**kept, loss=w.loss, serial=w.serial, ring=w.ring)))
            if len(self._moments) > MOMENTS:
                del self._moments[1::2]
                self._every *= 2
        self._seen += 1

    def told(self) -> dict[str, Any]:
        """market: id -> what was traded, in units, and how often; drift: id -> feature -> PSI; weights, hawkes: see there. JSON-able."""
        market = {x: {"volume": float(v), "trades": int(c)} for x, v, c in zip(self._ids, self._traded, self._trades)}
        out: dict[str, Any] = {"first": self._first, "last": self._last, "market": market, "weights": self._weights()}
        if self._drift is not None:
            found = self._drift.psi()
            names = [(c, f.name) for c, f in enumerate(FEATURES) if f.model_input]
            out["drift"] = {x: {name: float(found[k, c]) for c, name in names} for k, x in enumerate(self._ids)}
        if self._typed is not None:
            out["hawkes"] = self._residuals()
        return out

    def _weights(self) -> dict[str, Any]:
        """Over time, by horizon: weights of the members, `pool` that of both pools in the second Hedge, regret and its bound.

        Weights (T, H, N) and pool (T, H) are means over regimes, each counted by its decisions until then; `regret` (T, H, N), `bound`
        (T, H, N), and the same of mixture, pool and sharper pool as `pool_regret`, `pool_bound` (T, H, 3), are sums over regimes, in nats.
        """
        moments = [self._engine.ensemble.regret(w) | {"w": w} for _, w in self._moments]
        series: dict[str, list[Any]] = {k: [] for k in ("weights", "pool", "regret", "bound", "pool_regret", "pool_bound")}
        for m in moments:
            rounds = m["w"].rounds
            share = rounds / np.maximum(rounds.sum(axis=0), 1)
            even = rounds.sum(axis=0) == 0
            share[:, even] = 1 / len(share)
            awake = m["w"].awake.sum(axis=0) > 0
            series["weights"].append(np.einsum("rh,rhn->hn", share, m["w"].weights).tolist())
            series["pool"].append(np.einsum("rh,rh->h", share, m["w"].between[..., 1:].sum(axis=2)).tolist())
            series["regret"].append(np.asarray(m["regret"]).sum(axis=0).tolist())
            series["bound"].append(np.where(awake, np.asarray(m["bound"]).sum(axis=0), 0.0).tolist())
            for name in ("regret", "bound"):
                series[f"pool_{name}"].append(np.asarray(m["pool"][name]).sum(axis=0).tolist())
        rounded = {name: np.round(values, 6).tolist() for name, values in series.items()}
        return {"ts": [t for t, _ in self._moments], "members": list(self._engine.members), **rounded}

    def _residuals(self) -> dict[str, Any]:
        """Time rescaling of the trained processes on what came: id -> type -> events, KS and Ljung-Box with their p, QQ points."""
        assert self._hawkes is not None and self._typed is not None
        out: dict[str, Any] = {}
        for k, id_ in enumerate(self._ids):
            t, kind, holes = self._typed.events(k, self._since, self._last + 1)
            first = int(holes[-1]) if len(holes) else 0
            if not self._hawkes.arrays["fitted"][self._place[k]] or len(t) - first < 2:
                continue
            found = residuals(self._hawkes.process(self._place[k]), t[first:], kind[first:], self._hawkes.config.gap_s)
            tests = {name: goodness(r, points=QUANTILES) for name, r in zip(self._hawkes.config.types, found)}
            out[id_] = {name: {**g._asdict(), "qq": g.qq.tolist()} for name, g in tests.items() if g is not None}
        return out
