"""Several feeds as one view: the depth of one, what others say beside it joined by the time it was known, and whether all of them live.

:class:`Fusion` is an actor beside the feature actor. It takes the feature vectors of the instruments and ticks of further instruments, from
whatever feed; gives a :class:`Fused` at each close of a batch and a :class:`Tick` for each trade or quote to whoever asked by
:meth:`Hooks.on_features` and :meth:`Hooks.on_tick`. :class:`Silence` notices within 2 s that a feed has gone silent, says so, and halts
entries where that feed is needed.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol, cast

import numpy as np
from nautilus_trader.common import DataActor, DataActorConfig
from nautilus_trader.model import ActorId, IndexPriceUpdate, InstrumentId, QuoteTick, TradeTick
from numpy.typing import NDArray

from catalog.altdata import FEATURES as ALTERNATIVE
from catalog.altdata import table
from catalog.asof import Lookup
from catalog.events import SCALE, TRADE, Instrument
from cift_models.features import NAMES
from cift_strategies.faults import Faults, guarded
from cift_strategies.feeds.health import Health
from cift_strategies.feeds.running import Returns, Summary
from cift_strategies.messages import FEATURES, FeatureVector

LOOK_NS: Final = 100_000_000  # between two looks at the feeds
KEPT: Final = 4_096  # values of a series that can still be asked for
MID: Final = NAMES.index("mid")


class Tick(NamedTuple):
    """A trade, a quote (price: its middle) or an index value, of any feed."""

    instrument: str
    kind: str  # trade, quote, value
    ts: int  # when it was known, ns
    price: float
    size: float  # of a trade
    side: int  # of a trade: +1 buy aggressor, -1 sell, 0 none


@dataclass(frozen=True, slots=True)
class Fused:
    """What is known of one instrument at the close of a batch; nothing in it was known later than `ts`."""

    instrument: str
    ts: int
    vector: FeatureVector
    values: NDArray[np.float64]  # (27,) alternative data, as in catalog.altdata.NAMES; NaN where nothing was known
    ages: NDArray[np.float64]  # (27,) seconds
    beside: Mapping[str, tuple[float, float]]  # further series by name: value, age in seconds
    returns: Summary


class Series:
    """One number that changes, each value with the time it is about and the time it was known; the newest :data:`KEPT`."""

    def __init__(self) -> None:
        self._known: list[int] = []
        self._rows: list[tuple[int, float]] = []  # event, value; in order of `known`, then of arrival
        self._best: list[tuple[int, float]] = []  # of the rows so far the one about the newest event

    def put(self, ts_event: int, ts_known: int, value: float) -> None:
        at = bisect_right(self._known, ts_known)
        self._known.insert(at, ts_known)
        self._rows.insert(at, (ts_event, value))
        del self._best[at:]
        for row in self._rows[at:]:
            self._best.append(row if not self._best or row[0] >= self._best[-1][0] else self._best[-1])
        if len(self._known) >= 2 * KEPT:
            for kept in (self._known, self._rows, self._best):
                del kept[:KEPT]

    def at(self, ts: int) -> tuple[float, float]:
        """Value and age (s) at `ts`: of all that was known by then what is about the newest event. NaN where nothing was."""
        n = bisect_right(self._known, ts)
        if not n:
            return math.nan, math.nan
        event, value = self._best[n - 1]
        return value, (ts - event) / SCALE


class Entries(Protocol):
    """Who can be kept from entering; the strategy is one."""

    def halt(self, cause: str, why: str) -> None: ...

    def release(self, cause: str) -> None: ...


class Silence:
    """Which feeds are silent. Asked every :data:`LOOK_NS`, it knows within 2 s.

    `needed`: feeds without which there are no entries (None: all); of the others silence is only said. `halted` says why there are none,
    "" where there may be. `say` gets one line for each change.
    """

    def __init__(
        self, feeds: Mapping[str, Health], entries: Entries | None = None, needed: Iterable[str] | None = None,
        say: Callable[[str], object] = lambda _line: None,
    ) -> None:  # fmt: skip
        self.feeds, self.entries, self._say = dict(feeds), entries, say
        self.needed = set(self.feeds if needed is None else needed)
        if unknown := self.needed - set(self.feeds):
            raise ValueError(f"no feed {', '.join(sorted(unknown))}")
        self.silent: dict[str, int] = {}  # feed -> since when, ns by the wall

    @property
    def halted(self) -> str:
        return ", ".join(f"feed {name} is silent" for name in self.silent if name in self.needed)

    def start(self, wall_ns: int) -> None:
        """Silence counts from here on where nothing has come yet."""
        for health in self.feeds.values():
            for pulse in health.pulses:
                pulse.wall = pulse.wall or wall_ns

    def look(self, wall_ns: int) -> None:
        for name, health in self.feeds.items():
            quiet = health.quiet(wall_ns)
            if quiet and name not in self.silent:
                self.silent[name] = wall_ns
                if self.entries is not None and name in self.needed:
                    self.entries.halt(f"feed {name}", f"feed {name} is silent")
                self._say(f"feed {name} is silent{': no entries' if name in self.needed else ''}")
            elif not quiet and name in self.silent:
                took = (wall_ns - self.silent.pop(name)) / SCALE
                if self.entries is not None and name in self.needed:
                    self.entries.release(f"feed {name}")
                self._say(f"feed {name} is back after {took:.1f} s{': entries again' if name in self.needed else ''}")


@dataclass(slots=True)
class Hooks:
    """Callbacks of a user's own; each may be used as a decorator. They run on the node's loop: what takes long belongs elsewhere."""

    ticks: list[Callable[[Tick], object]] = field(default_factory=list)
    features: list[Callable[[Fused], object]] = field(default_factory=list)

    def on_tick[F: Callable[[Tick], object]](self, callback: F) -> F:
        self.ticks.append(callback)
        return callback

    def on_features[F: Callable[[Fused], object]](self, callback: F) -> F:
        self.features.append(callback)
        return callback


@guarded
class Fusion(DataActor):
    """See the module. `instruments`: those whose features are made, in their order. `beside`: ids of further instruments, of any feed
    that the node has; their quotes, trades or index values become the series "ID mid", "ID last", "ID value". `altdata`: of the same
    instruments; :meth:`tell` adds what becomes known. `silence`: looked at on the node's clock. `seen`: health of the feed of `beside`,
    where its client does not tell it itself.
    """

    def __new__(cls, *_args: Any, **_named: Any) -> Fusion:
        return super().__new__(cls)

    def __init__(
        self, instruments: Sequence[Instrument], faults: Faults, *, beside: Sequence[str] = (), altdata: Lookup | None = None,
        silence: Silence | None = None, seen: Health | None = None, every_s: float = 1.0, half_life_s: float = 60.0,
    ) -> None:  # fmt: skip
        super().__init__(DataActorConfig(actor_id=ActorId("CIFT-FUSION")))
        self.ids, self.faults = [x.id for x in instruments], faults
        if altdata is not None and list(altdata.ids) != self.ids:
            raise ValueError("the alternative data are of other instruments, or in another order")
        self.beside, self.altdata, self.silence, self.seen = list(beside), altdata, silence, seen
        self.hooks = Hooks()
        self.series: dict[str, Series] = {}
        self.returns = {id_: Returns(every_s, half_life_s) for id_ in (*self.ids, *self.beside)}
        self.fused = 0
        self._nothing = np.full(len(ALTERNATIVE), np.nan)

    def on_start(self) -> None:
        self.subscribe_topic(FEATURES, self.on_features)
        for text in self.beside:
            id_ = InstrumentId.from_str(text)
            if text.startswith("I:"):
                self.subscribe_index_prices(id_)
            else:
                self.subscribe_quotes(id_)
                self.subscribe_trades(id_)
        if self.silence is not None:
            self.silence.start(self.clock.timestamp_ns())
            self.clock.set_timer_ns("silence", LOOK_NS, callback=self.on_look)

    def on_look(self, _event: Any) -> None:
        assert self.silence is not None
        self.silence.look(self.clock.timestamp_ns())

    # --- what comes in ----------------------------------------------------------------------------------------------------------------

    def tell(self, rows: Iterable[tuple[str, str, float, int, int]]) -> None:
        """Alternative data that have come: (instrument or *, feature, value, ts_event, ts_known). Raises InputError for what cannot be."""
        found = table(rows)
        if self.altdata is None:
            self.altdata = Lookup(found, self.ids)
        else:
            self.altdata.push(found)

    def put(self, name: str, ts_event: int, ts_known: int, value: float) -> None:
        """A value of the further series `name`."""
        if (series := self.series.get(name)) is None:
            series = self.series[name] = Series()
        series.put(ts_event, ts_known, value)

    def on_features(self, message: object) -> None:
        vector = cast(FeatureVector, message)
        id_ = self.ids[vector.instrument]
        if self.hooks.ticks:
            for e in vector.events[vector.events["action"] == TRADE]:
                self._tick(Tick(id_, "trade", int(e["ts_init"]), int(e["price"]) / SCALE, int(e["size"]) / SCALE, int(e["side"])))
        returns = self.returns[id_]
        returns.update(vector.ts, float(vector.rows[-1, MID]))
        if not vector.closes:
            return
        self.fused += 1
        if self.hooks.features:
            fused = self.at(vector, int(vector.events["ts_init"][vector.closes[-1]]))
            for callback in self.hooks.features:
                callback(fused)

    def at(self, vector: FeatureVector, ts: int) -> Fused:
        """What was known at `ts` of the instrument of `vector`."""
        values = ages = self._nothing
        if self.altdata is not None:
            value, age = self.altdata.at(np.array([vector.instrument]), np.array([ts]))
            values, ages = value[0], age[0]
        beside = {name: series.at(ts) for name, series in self.series.items()}
        id_ = self.ids[vector.instrument]
        return Fused(id_, ts, vector, values, ages, beside, self.returns[id_].summary())

    def on_quote(self, quote: QuoteTick) -> None:
        price = (quote.bid_price.as_double() + quote.ask_price.as_double()) / 2
        self._other(quote, "quote", "mid", price)

    def on_trade(self, trade: TradeTick) -> None:
        side = {"BUY": 1, "SELL": -1}.get(trade.aggressor_side.name, 0)
        self._other(trade, "trade", "last", trade.price.as_double(), trade.size.as_double(), side)

    def on_index_price(self, value: IndexPriceUpdate) -> None:
        self._other(value, "value", "value", value.value.as_double())

    def _other(self, what: Any, kind: str, series: str, price: float, size: float = 0.0, side: int = 0) -> None:
        id_ = str(what.instrument_id)
        if id_ not in self.returns:
            return
        self.put(f"{id_} {series}", what.ts_event, what.ts_init, price)
        if kind != "trade":
            self.returns[id_].update(what.ts_init, price)
        if self.seen is not None:
            self.seen.seen(self.seen.row(id_), what.ts_event, self.clock.timestamp_ns())
        if self.hooks.ticks:
            self._tick(Tick(id_, kind, what.ts_init, price, size, side))

    def _tick(self, tick: Tick) -> None:
        for callback in self.hooks.ticks:
            callback(tick)

    def told(self) -> dict[str, Any]:
        """Plain numbers for status lines: silent feeds, and returns by instrument."""
        summaries = {id_: r.summary() for id_, r in self.returns.items()}
        return {
            "halted": self.silence.halted if self.silence is not None else "",
            "silent": sorted(self.silence.silent) if self.silence is not None else [],
            "fused": self.fused,
            "returns": {id_: {n: getattr(s, n) for n in Summary.__slots__} for id_, s in summaries.items()},
        }
