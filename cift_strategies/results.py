"""What a run leaves: tables of fills and positions, the stream of predictions, equity, and the summary's figures."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from catalog.events import SCALE, Instrument

if TYPE_CHECKING:
    from cift_models.inference import Predictions
    from cift_models.windows import Block
    from cift_strategies.strategy import EnsembleStrategy

_NS = pa.timestamp("ns", tz="UTC")
FILLS: Final = pa.schema([
    ("ts", _NS), ("instrument", pa.string()),
    ("order", pa.int32()),  # running number of the order
    ("position", pa.int32()),  # running number of the trade, as in positions
    ("role", pa.string()),  # entry, stop, target, exit
    ("side", pa.int8()),  # +1 bought, -1 sold
    ("price", pa.float64()), ("size", pa.float64()),
    ("fee", pa.float64()), ("currency", pa.string()),
    ("liquidity", pa.string()),  # maker, taker
    ("mid", pa.float64()),  # when it was filled
    ("decided_mid", pa.float64()),  # when the entry was decided
    ("tick_value", pa.float64()),  # currency per tick and unit
])  # fmt: skip
POSITIONS: Final = pa.schema([
    ("position", pa.int32()), ("instrument", pa.string()), ("opened", _NS), ("closed", _NS),
    ("side", pa.int8()), ("size", pa.float64()), ("entry", pa.float64()), ("exit", pa.float64()),  # size in units, mean prices
    ("gross", pa.float64()), ("fees", pa.float64()), ("net", pa.float64()), ("currency", pa.string()),
    ("horizon_ns", pa.int64()), ("regime", pa.int8()), ("confidence", pa.float64()),
    ("expected_ticks", pa.float64()), ("cost_ticks", pa.float64()),  # at the decision
    ("closed_by", pa.string()),  # stop, target, horizon, unprotected, ...
])  # fmt: skip
ORDERS: Final = pa.schema([  # an order event each
    ("ts", _NS), ("instrument", pa.string()), ("order", pa.int32()), ("position", pa.int32()), ("role", pa.string()),
    ("event", pa.string()),  # Submitted, Accepted, Filled, Rejected, ...: Nautilus's names without "Order"
    ("mid", pa.float64()), ("spread", pa.float64()),  # when it happened; the spread in ticks
])  # fmt: skip
KEPT_LATENCIES: Final = 100_000
ROW_GROUP: Final = 1_000  # predictions that are written at once, or more
REGIME_CHANGES: Final = 20_000


def table(rows: Sequence[Sequence[Any]], schema: pa.Schema) -> pa.Table:
    columns: Sequence[Sequence[Any]] = list(zip(*rows)) if rows else [[] for _ in schema]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, schema)], schema=schema)


def columns_of(table: pa.Table) -> dict[str, Any]:
    """Columns as numpy: text as object arrays, times as ns, nulls of numbers as NaN."""
    plain_text = [c.cast(c.type.value_type) if pa.types.is_dictionary(c.type) else c for c in table.columns]
    stamps = [c.cast(pa.int64()) if pa.types.is_timestamp(c.type) else c for c in plain_text]
    return dict(zip(table.column_names, (c.to_numpy() for c in stamps)))


@dataclass(slots=True)
class _Waiting:
    """Predictions of one block whose outcomes are not known yet; `first` is the number of the first of them."""

    first: int
    p: Predictions
    latency: NDArray[np.int64]
    mid: NDArray[np.float64]
    move: NDArray[np.float32]
    resolved: int = 0


class PredictionWriter:
    """Streams predictions made at `since` (ns) or later to a Parquet file, a row per batch, with what came of them; keeps a sample of
    latencies and the changes of regime. Rows wait until their longest horizon is known, so memory is bounded by that.

    Columns: ts, delivered, instrument, mid, regime, latency_ns; for each horizon p_down_*, p_flat_*, p_up_*, magnitude_* (ticks),
    confidence_*, direction_*, move_* (ticks, NaN where it never became known); votes: float32 lists of members x horizons x 3.
    """

    def __init__(
        self, path: Path, instruments: Sequence[Instrument], labels: Sequence[str], horizons_ns: Sequence[int], mid: int, seed: int,
        since: int,
    ) -> None:  # fmt: skip
        from cift_models.labels import Labeller

        self.path, self.count, self.made = path, 0, 0
        self._ids = pa.array([x.id for x in instruments])
        self._labels, self._mid, self._since = labels, mid, since
        self._labeller = Labeller(instruments, horizons_ns, ())
        self._place: list[NDArray[np.int64]] = [np.empty(0, np.int64) for _ in instruments]  # serial - offset -> number of the decision
        self._offset = [0] * len(instruments)
        self._waiting: deque[_Waiting] = deque()
        self._writer: pq.ParquetWriter | None = None
        self._held: list[pa.Table] = []  # fewer rows than a row group has: the blocks of a live session are of one or two
        self._rng = np.random.default_rng(seed)
        self._latency: NDArray[np.int64] = np.empty(KEPT_LATENCIES, np.int64)
        self._regimes: list[list[tuple[int, int]]] = [[] for _ in instruments]

    def push(self, block: Block, p: Predictions, latency: NDArray[np.int64]) -> None:
        mid = np.ascontiguousarray(block.rows[:, self._mid])
        m = len(p.ts)
        self._waiting.append(_Waiting(self.made, p, latency, mid[block.closes], np.full((m, len(self._labels)), np.nan, np.float32)))
        for k in np.unique(p.instrument):
            self._place[k] = np.append(self._place[k], self.made + np.flatnonzero(p.instrument == k))
        self.made += m
        self._learn(self._labeller.push(block.events, mid, block.closes))
        while self._waiting and self._waiting[0].resolved >= len(self._waiting[0].latency):
            self._write(self._waiting.popleft())

    def _learn(self, outcomes: Any) -> None:
        longest = len(self._labels) - 1
        for k in np.unique(outcomes.instrument):
            mine = outcomes.instrument == k
            label, move = outcomes.label[mine], outcomes.move[mine]
            number = self._place[k][outcomes.serial[mine] - self._offset[k]]
            for w in self._waiting:
                inside = (number >= w.first) & (number < w.first + len(w.latency))
                if inside.any():
                    w.move[number[inside] - w.first, label[inside]] = move[inside]
                    w.resolved += int((label[inside] == longest).sum())
            done = outcomes.serial[mine][label == longest]
            if len(done):
                self._place[k] = self._place[k][int(done[-1]) + 1 - self._offset[k] :]
                self._offset[k] = int(done[-1]) + 1

    def _write(self, w: _Waiting) -> None:
        new = w.p.ts >= self._since
        if not new.any():
            return
        p: Predictions = type(w.p)._make(a[new] for a in w.p)
        latency = w.latency[new]
        columns: dict[str, Any] = {
            "ts": pa.array(p.ts, _NS),
            "delivered": pa.array(p.ts + latency, _NS),
            "instrument": pa.DictionaryArray.from_arrays(pa.array(p.instrument, pa.int32()), self._ids),
            "mid": w.mid[new],
            "regime": pa.array(p.regime, pa.int8()),
            "latency_ns": pa.array(latency),
        }
        for h, label in enumerate(self._labels):
            for c, name in enumerate(("p_down", "p_flat", "p_up")):
                columns[f"{name}_{label}"] = p.proba[:, h, c].astype(np.float32)
            columns[f"magnitude_{label}"] = p.magnitude[:, h].astype(np.float32)
            columns[f"confidence_{label}"] = p.confidence[:, h].astype(np.float32)
            columns[f"direction_{label}"] = p.direction[:, h].astype(np.int8)
            columns[f"move_{label}"] = w.move[new, h]
        each = int(np.prod(p.votes.shape[1:]))
        columns["votes"] = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(p.votes, np.float32).ravel()), each)
        self._held.append(pa.table(columns))
        if sum(map(len, self._held)) >= ROW_GROUP:
            self._flush()
        self._sample(latency)
        for k in np.unique(p.instrument):
            mine = p.instrument == k
            ts, regime = p.ts[mine], p.regime[mine]
            kept = self._regimes[k]
            change = np.flatnonzero(np.diff(regime, prepend=np.int8(kept[-1][1] if kept else 127)))
            kept += zip(ts[change].tolist(), regime[change].tolist())
            del kept[REGIME_CHANGES:]

    def _flush(self) -> None:
        if self._held:
            rows = pa.concat_tables(self._held).combine_chunks()
            if self._writer is None:
                self._writer = pq.ParquetWriter(self.path, rows.schema, compression="zstd")
            self._writer.write_table(rows)
            self._held.clear()

    def _sample(self, latency: NDArray[np.int64]) -> None:
        """Reservoir of a fixed size (Vitter 1985, algorithm R), drawn from its own seeded stream."""
        at = np.arange(self.count, self.count + len(latency))
        self.count += len(latency)
        slot = np.where(at < KEPT_LATENCIES, at, (self._rng.random(len(at)) * (at + 1)).astype(np.int64))
        inside = slot < KEPT_LATENCIES
        self._latency[slot[inside]] = latency[inside]

    @property
    def latencies(self) -> NDArray[np.int64]:
        """ns, at most 100,000 of them."""
        return self._latency[: min(self.count, KEPT_LATENCIES)]

    @property
    def regimes(self) -> list[tuple[NDArray[np.int64], NDArray[np.int8]]]:
        """Per instrument: when its regime changed, and to which."""
        return [(np.array([t for t, _ in r], np.int64), np.array([v for _, v in r], np.int8)) for r in self._regimes]

    def close(self) -> None:
        """The stream has ended: what is known by now is all there will be."""
        self._learn(self._labeller.finish())
        while self._waiting:
            self._write(self._waiting.popleft())
        self._flush()
        if self._writer is None:
            pq.write_table(pa.table({"ts": pa.array([], _NS), "instrument": pa.array([], pa.string())}), self.path)
        else:
            self._writer.close()


class MidPath:
    """The mid of each instrument at no more than `points` moments, evenly thinned; and of all of them the stamp of the last event."""

    def __init__(self, instruments: int, points: int = 4_000) -> None:
        self._points = points
        self._ts: list[list[int]] = [[] for _ in range(instruments)]
        self._mid: list[list[float]] = [[] for _ in range(instruments)]
        self._stride, self._seen = [1] * instruments, [0] * instruments

    def push(self, ts: NDArray[np.int64], instrument: NDArray[Any], mid: NDArray[np.float64]) -> None:
        for k in np.unique(instrument):
            mine = np.flatnonzero((instrument == k) & np.isfinite(mid))
            first = -self._seen[k] % self._stride[k]
            self._seen[k] += len(mine)
            chosen = mine[first :: self._stride[k]]
            self._ts[k] += ts[chosen].tolist()
            self._mid[k] += mid[chosen].tolist()
            while len(self._ts[k]) > 2 * self._points:
                del self._ts[k][1::2], self._mid[k][1::2]
                self._stride[k] *= 2

    def result(self, k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        return np.array(self._ts[k], np.int64), np.array(self._mid[k], np.float64)


def figures(strategy: EnsembleStrategy, fills: pa.Table, positions: pa.Table) -> dict[str, Any]:
    """What one strategy's trading came to. Money is in the run's currency, or a dict by currency where there are several."""
    currencies = strategy.ledger.currencies
    net = np.asarray(positions["net"])
    entries = np.asarray(fills["role"]) == "entry" if len(fills) else np.zeros(0, bool)
    size, price, mid, side, value = (np.asarray(fills[c], np.float64) for c in ("size", "price", "mid", "side", "tick_value"))
    ticks = {x.id: (x.tick / SCALE, x.multiplier) for x in strategy.terms.instruments}
    multiplier = np.array([ticks[i][1] for i in fills["instrument"].to_pylist()])
    at_mid = float(np.nansum(-side * size * mid * multiplier)) if len(fills) else 0.0
    turned = float(np.sum((size * value)[entries]))
    by, fees = {c: strategy.ledger.pnl(c) for c in currencies}, dict.fromkeys(currencies, 0.0)
    for x, p in zip(strategy.terms.instruments, strategy.ledger.positions):
        fees[x.currency] += p.fees
    open_now = sum(p.size != 0 for p in strategy.ledger.positions)
    return {
        "orders": len(strategy.orders),
        "fills": len(fills),
        "positions": len(positions),
        "fees": _money(fees),
        "pnl_net": _money(by),
        "max_drawdown": _money(dict(strategy.ledger.drawdown)),
        "currency": currencies[0] if len(currencies) == 1 else currencies,
        "hit_rate": float((net > 0).mean()) if len(net) else None,
        "break_even_cost_ticks": at_mid / turned if turned else None,
        "paid_cost_ticks": (at_mid - sum(by.values())) / turned if turned else None,
        "open_at_end": open_now,
        "decisions": dict(sorted(strategy.decisions.items(), key=lambda d: (-d[1], d[0]))),
        "closed_by": _counted(positions["closed_by"].to_pylist()),
        "order_events": dict(sorted(strategy.order_types.items())),
        "slippage_ticks": float(np.nansum(side * (price - mid) * size * multiplier) / np.sum(size * value)) if len(fills) else None,
    }  # fmt: skip


def _money(by: Mapping[str, float]) -> Any:
    return next(iter(by.values())) if len(by) == 1 else dict(by)


def _counted(words: Sequence[str]) -> dict[str, int]:
    return {w: words.count(w) for w in sorted(set(words))}


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numpy scalars and arrays unwrapped, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that the file is there whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(plain(value), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)
