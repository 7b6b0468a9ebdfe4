"""A market that a test writes by hand, and a run over it through a real BacktestNode."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from nautilus_trader.persistence import ParquetDataCatalog

from catalog.databento import nautilus_instrument
from catalog.definitions import Definition
from catalog.events import ADD, CANCEL, CLEAR, EVENT, F_LAST, F_MBP, SCALE, TRADE, Instrument
from catalog.parquet import DELTAS, TRADES
from catalog.writer import Writer
from cift_models.windows import HORIZONS_NS
from cift_strategies.faults import Faults
from cift_strategies.messages import FeatureVector, Prediction
from cift_strategies.risk import Limits
from cift_strategies.settings import Settings
from cift_strategies.strategy import Terms
from cift_strategies.stream import Span
from cift_strategies.system import Replay, System, assemble, run_backtest

OPEN = 1_700_000_000 * SCALE
MS = 1_000_000
SHARE = Instrument("SHARE.XTST", SCALE // 100, SCALE, 1.0, "USD", kind="equity", level=2)


@dataclass
class Tape:
    """Level updates and trades of one instrument; times in ms after the open, prices in ticks, sizes in units."""

    instrument: Instrument = SHARE
    index: int = 0
    rows: list[tuple[Any, ...]] = field(default_factory=list)

    def _add(self, ms: float, action: int, side: int, price: float, size: float, flags: int) -> None:
        ts = OPEN + round(ms * MS)
        at = (round(price * self.instrument.tick), round(size * SCALE))
        self.rows.append((ts, ts, *at, 0, 0, action, side, flags, self.index))

    def level(self, ms: float, side: int, price: float, size: float) -> Tape:
        self._add(ms, ADD if size else CANCEL, side, price, size, F_MBP | F_LAST)
        return self

    def clear(self, ms: float) -> Tape:
        self._add(ms, CLEAR, 0, 0, 0, F_LAST)
        return self

    def trade(self, ms: float, side: int, price: float, size: float) -> Tape:
        self._add(ms, TRADE, side, price, size, 0)
        return self

    def book(self, ms: float, bid: int, ask: int, size: float = 10_000) -> Tape:
        """A new book: `size` at the touch, ten times as much on each of four levels behind it."""
        self.clear(ms)
        for k in range(5):
            self.level(ms, 1, bid - k, size * (10 if k else 1))
            self.level(ms, -1, ask + k, size * (10 if k else 1))
        return self

    def quiet(self, start: float, end: float, bid: int, ask: int, step: float = 5) -> Tape:
        """Nothing happens but small changes far from the touch."""
        ms, n = start, 0
        while ms < end:
            self.level(ms, 1 if n % 2 else -1, bid - 4 if n % 2 else ask + 4, 100_000 + n % 7)
            ms, n = ms + step, n + 1
        return self

    @property
    def events(self) -> np.ndarray[Any, Any]:
        return np.array(self.rows, EVENT)


def write(root: Path, tapes: Iterable[Tape]) -> Path:
    """A NautilusTrader catalog of `tapes`."""
    tapes = list(tapes)
    for tape in tapes:
        events = tape.events
        for kind, mine in ((DELTAS, events["action"] != TRADE), (TRADES, events["action"] == TRADE)):
            writer = Writer(root, kind, tape.instrument)
            writer.add(events[mine])
            writer.close()
    objects = [nautilus_instrument(Definition(t.instrument, t.instrument.id.split(".")[0])) for t in tapes]
    ParquetDataCatalog(str(root.resolve())).write_instruments(objects)
    return root


@dataclass
class Script:
    """Answers the first batch that closes at or after each time (ms) with the side, expected ticks and horizon written for it."""

    calls: Mapping[float, tuple[int, float, int]]  # ms -> side, ticks, index of the horizon
    latency_ms: float = 2.0
    regime: int = -1
    made: list[Prediction] = field(default_factory=list)
    _done: set[float] = field(default_factory=set)

    def predict(self, vector: FeatureVector) -> list[Prediction]:
        found = []
        for i in vector.closes:
            ts = int(vector.events["ts_init"][i])
            side, ticks, at = 0, 0.0, 0
            for ms, call in self.calls.items():
                if ms not in self._done and ts >= OPEN + round(ms * MS):
                    self._done.add(ms)
                    side, ticks, at = call
            direction = tuple(side if h == at else 0 for h in range(4))
            proba = np.tile([0.0, 0.2, 0.8] if side >= 0 else [0.8, 0.2, 0.0], (4, 1))
            found.append(
                Prediction(
                    vector.instrument, ts, round(self.latency_ms * MS), HORIZONS_NS, proba, np.full(4, ticks), np.full(4, 0.8), direction,
                    self.regime, np.zeros((0, 4, 3), np.float32), "script",
                )
            )
        self.made += [p for p in found if any(p.direction)]
        return found


@dataclass
class Played:
    system: System
    root: Path
    faults: Faults

    @property
    def strategy(self) -> Any:
        return self.system.strategy

    @property
    def fills(self) -> list[dict[str, Any]]:
        from cift_strategies.results import FILLS

        return [dict(zip(FILLS.names, f)) for f in self.strategy.fills]

    @property
    def positions(self) -> list[dict[str, Any]]:
        from cift_strategies.results import POSITIONS

        return [dict(zip(POSITIONS.names, p)) for p in self.strategy.positions]

    @property
    def decisions(self) -> dict[str, int]:
        return dict(self.strategy.decisions)


def play(
    root: Path, instruments: Sequence[Instrument], predictor: Any, *, settings: Settings | None = None, limits: Limits | None = None,
    order_latency_ms: float = 1.0, act_from: int = 0, chunk_size: int | None = 100_000, strategy: str | None = None, ends: bool = True,
    regimes: Sequence[str] = (), states: Mapping[int, Any] | None = None, behind: Mapping[int, Any] | None = None,
) -> Played:  # fmt: skip
    span, faults = Span(root, instruments), Faults()
    latency = round(order_latency_ms * MS)
    terms = Terms(
        instruments, settings or Settings(flat_before_close_s=0.0), limits or Limits(), regimes, act_from, span.ends() if ends else {},
        states or {}, latency, faults, behind=behind or {},
    )
    system = assemble(terms, predictor, strategy)
    _, node, _ = run_backtest(system, Replay(root, instruments, span.first, span.last, 1_000_000.0, latency, chunk_size), faults)
    node.dispose()
    return Played(system, root, faults)


def ms_of(ts: int) -> float:
    """ns -> ms after the open."""
    return (ts - OPEN) / MS


def nan_equal(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))
