"""A recorded live session again: the same events in the same order and grouping through the same actors and strategy, on a node.

Features and predictions are computed anew and compared with what was recorded, each by itself. The strategy then has the session's turns
once more, in their order and at their times: predictions, alerts, what was asked of it, and what the venue answered to its orders; what it
orders is compared with what it ordered. Gives a run's usual output and `session.json`, which lists everything that is not equal.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from catalog.errors import InputError
from catalog.events import CLEAR, F_MBP, F_TOB, SCALE, TRADE, Instrument
from catalog.progress import Steps
from catalog.status import OPEN
from cift_strategies import intake
from cift_strategies.compared import Compared, Places, Recorded, compare_orders, orders, say
from cift_strategies.pace import Pace
from cift_strategies.recording import BEGAN, VERSION, Chunk, Recording, Witness, digested, to_catalog
from cift_strategies.recovery import Recovery

if TYPE_CHECKING:
    from cift_models.inference import Predictions
    from cift_models.windows import Block
    from cift_strategies.backtest import RunConfig
    from cift_strategies.live_config import LiveConfig
    from cift_strategies.messages import FeatureVector, Prediction
    from cift_strategies.outcome import RunResult

type Array = NDArray[Any]

BLOCK: Final = 16_384  # events of a block, at most about
STEP: Final = 1_024  # messages that wait in the node, at most


# --- events -> messages and blocks ----------------------------------------------------------------------------------------------------


class Messages:
    """The Nautilus messages of recorded events, as the node got them, stamped (`ts_init`) with the time when they came."""

    def __init__(self, instruments: Sequence[Instrument]) -> None:
        from nautilus_trader.model import InstrumentId

        self._instruments = instruments
        self._ids = [InstrumentId.from_str(x.id) for x in instruments]
        self._trades = 0

    def of(self, chunk: Chunk) -> Iterator[tuple[Any, int]]:
        """Each message, and how many events it has."""
        rows, a = chunk.events.tolist(), 0
        for b, came in zip(chunk.ends.tolist(), chunk.came.tolist()):
            yield self._message(rows[a:b], came), b - a
            a = b

    def _message(self, rows: list[tuple[Any, ...]], ts_init: int) -> Any:
        from nautilus_trader.model import BookOrder, OrderBookDelta, OrderBookDeltas, Price, Quantity, QuoteTick, TradeId, TradeTick

        from cift_strategies.feeds.direct import _ACTION, _AGGRESSOR, _SIDE, UNIT

        k = rows[0][9]
        id_, x = self._ids[k], self._instruments[k]

        def price(value: int) -> Any:
            return Price.from_raw(value * UNIT, x.price_precision)

        def size(value: int) -> Any:
            return Quantity.from_raw(value * UNIT, x.size_precision)

        ts_event, _, p, q, _, _, action, side, flags, _ = rows[0]
        if action == TRADE:
            self._trades += 1
            return TradeTick(id_, price(p), size(q), _AGGRESSOR[side], TradeId(str(self._trades)), ts_event, ts_init)
        if flags & F_TOB:
            (_, _, bid, bid_size, *_), (_, _, ask, ask_size, *_) = rows
            return QuoteTick(id_, price(bid), price(ask), size(bid_size), size(ask_size), ts_event, ts_init)
        deltas = [
            OrderBookDelta(
                id_, _ACTION[action], BookOrder(_SIDE[side], price(p), size(q), order), flags if action == CLEAR else flags & ~F_MBP,
                sequence, ts_event, ts_init,
            )
            for ts_event, _, p, q, order, sequence, action, side, flags, _ in rows
        ]  # fmt: skip
        return OrderBookDeltas(id_, deltas)


class Intake(intake.Intake):
    """Takes the events that were recorded of each message, with their own stamps."""

    def __init__(self, recording: Recording) -> None:
        super().__init__(recording.instruments)
        self._recorded = (chunk.events[a:b] for chunk in recording.stream() for a, b in zip([0, *chunk.ends.tolist()], chunk.ends.tolist()))

    def _next(self, _message: Any) -> FeatureVector:
        events = next(self._recorded)
        _, first = self._room(len(events))
        self._events[first : first + len(events)] = events
        return self._packed(len(events))

    def deltas(self, message: Any) -> FeatureVector:
        return self._next(message)

    def trade(self, tick: Any) -> FeatureVector:
        return self._next(tick)

    def quote(self, tick: Any) -> FeatureVector:
        return self._next(tick)


class Blocks:
    """Recorded events as blocks with their features, each row compared with the recorded digest; `cuts`: no block goes across them."""

    def __init__(self, recording: Recording, compared: Compared, cuts: Sequence[int] = ()) -> None:
        self._recording, self._compared, self._cuts = recording, compared, sorted(cuts)
        self.seen = 0

    def _pieces(self) -> Iterator[tuple[Array, NDArray[np.uint64]]]:
        for chunk in self._recording.stream():
            n = len(chunk.events)
            inside = [c - self.seen for c in self._cuts if self.seen < c < self.seen + n]
            edges = sorted({0, n, *inside, *range(0, n, BLOCK)})
            for a, b in pairwise(edges):
                yield chunk.events[a:b], chunk.digests[a:b]
            self.seen += n

    def __iter__(self) -> Iterator[Block]:
        from cift_models.inference import stream

        kept: list[NDArray[np.uint64]] = []

        def events() -> Iterator[Array]:
            for piece, recorded in self._pieces():
                kept.append(recorded)
                yield piece

        at, c = 0, self._compared
        for block in stream(list(self._recording.instruments), events()):
            recorded = kept.pop(0)
            wrong = np.flatnonzero(digested(block.rows) != recorded)
            c.recorded += len(recorded)
            c.equal += len(recorded) - len(wrong)
            for i in wrong.tolist():
                e = block.events[i]
                name = self._recording.instruments[int(e["instrument"])].id
                c.differ.append({"event": at + i, "instrument": name, "ts": int(e["ts_init"]), "what": "features"})
            at += len(recorded)
            yield block


# --- what was noted ---------------------------------------------------------------------------------------------------------------------


class Told(Pace):
    """The time of a session that is told again: what its notes say it was. No alert runs by itself: each that ran then is a note."""

    __slots__ = ("at", "stamp")

    def __init__(self) -> None:
        super().__init__(0, 0, 0.0)
        self.at = self.stamp = 0  # of the turn, and of the order event in it; ns

    def see(self, ts: int) -> None:
        pass

    def alert(self, ts: int, callback: Callable[[Any], Any]) -> None:
        pass

    def now(self) -> int:
        return self.at

    def stream(self, wall_ns: int) -> int:
        return self.stamp


class Teller:
    """Tells a node's loop what a session was told: messages, and between them, after as many events as then, the noted turns.

    What the venues answered is told of the order that belongs to the same decision; an order that the session did not send is rejected.
    `found`: predictions by instrument and stamp. Afterwards `told` notes have had their turn, `missing` predictions were delivered that
    were not made again, and `untold` answers found no order that could take them.
    """

    def __init__(
        self, notes: Sequence[tuple[int, int, str, Any]], found: dict[tuple[int, int], Prediction], system: Any, clock: Told, link: Any
    ) -> None:
        self._notes, self._found, self._system, self._clock, self._link = notes, found, system, clock, link
        self._faults, self.strategy, self._venues = system.strategy.faults, system.strategy, [str(i.venue) for i in system.strategy.ids]
        self._places = {x.id: k for k, x in enumerate(system.strategy.terms.instruments)}
        places = Places()
        for _, _, kind, what in notes:
            if kind == "order":
                places.of(what)
        self._theirs, self._ours = places, Places()
        self._numbers: dict[int, Any] = {}  # client order ids of the strategy's orders, by their numbers
        self._known = self._heard = self._given = 0  # orders that are in it, events of orders, and events of the market, until now
        self._unpriced = {k for k, x in enumerate(system.strategy.terms.instruments) if x.level > 1}
        self._running: asyncio.Task[Any] | None = None
        self.told = self.missing = self.untold = 0
        Witness(system, self._note)
        self.again: list[tuple[int, int, str, Any]] = []

    def _note(self, kind: str, what: Any) -> None:
        self.again.append((self._system.features.vectors, self.strategy.now(), kind, what))
        if kind == "order":
            self._heard += 1
            self._ours.of(what)

    async def run(self, node: Any, messages: Iterator[tuple[Any, int]]) -> None:
        """Everything, on a node that is built; it is stopped at the end."""
        begin = next((n for n, (_, _, kind, _) in enumerate(self._notes) if kind == "begin"), 0)
        for _, now, kind, what in self._notes[:begin]:
            self._clock.at = now
            self._ask(kind, what)
        if self._notes:
            self._clock.at = self._notes[begin][1]
        running = self._running = asyncio.get_running_loop().create_task(node.run_async())
        self.told = begin
        try:
            await self._until(lambda: self._link.subscribed >= 2 * len(self._places), None)
            self._known = len(self.strategy.orders)
            for at, now, kind, what in self._notes[begin:]:
                await self._stream(messages, at)
                if self._given < at or self._faults.first is not None:  # events may be cut off before notes are
                    break
                self._clock.at = self._clock.stamp = now
                await self._turn(kind, what)
                self.told += 1
            await self._stream(messages, 2**63 - 1)
        finally:
            node.handle().stop()
            await running

    async def _until(self, true: Callable[[], bool], turns: int | None = 100_000) -> bool:
        """Let the node's loop turn until something is true, or a callback has failed; False after `turns` of it."""
        n = 0
        while not true() and self._faults.first is None:
            if n == turns:
                return False
            if self._running is not None and self._running.done():
                self._running.result()
                raise RuntimeError("the node has ended before the session was told")
            n += 1
            await asyncio.sleep(0)
        return True

    async def _stream(self, messages: Iterator[tuple[Any, int]], at: int) -> None:
        """Messages until `at` events have come, or all."""
        features = self._system.features
        while self._given < at and self._faults.first is None:
            for _ in range(STEP):
                if (got := next(messages, None)) is None:
                    at = self._given
                    break
                self._link.give(got[0])
                self._given += got[1]
                if self._given >= at:
                    break
            await self._until(lambda: features.vectors >= self._given, None)
            await self._price()

    async def _price(self) -> None:
        """Tell the node the best prices of each book once, as a feed does: from deltas alone it takes none before the first trade, and
        denies orders at the market."""
        from nautilus_trader.model import Price, Quantity, QuoteTick

        s = self.strategy
        for k in sorted(self._unpriced):
            id_, x, vector = s.ids[k], s.terms.instruments[k], s.last[k]
            if vector is not None and math.isfinite(vector.mid):
                self._unpriced.remove(k)
                half = vector.spread * x.tick / SCALE / 2
                bid, ask = (Price(vector.mid + side * half, x.price_precision) for side in (-1, 1))
                one = Quantity(1, x.size_precision)
                self._link.give(QuoteTick(id_, bid, ask, one, one, self._clock.at, self._clock.at))
                await self._until(lambda id_=id_: s.cache.has_quote_ticks(id_))  # type: ignore[misc]

    async def _turn(self, kind: str, what: Any) -> None:
        s = self.strategy
        if kind == "prediction":
            k, ts, latency = what
            if (p := self._found.pop((k, ts), None)) is None:
                self.missing += 1
            else:
                self._system.inference.accept([replace(p, latency_ns=latency)])
        elif kind == "alert":
            which, k, signal = what
            if (trade := s.trades[k]) is not None and trade.signal.predicted_at == signal:
                s.due(which, k, trade)
        elif kind == "order":
            await self._answer(what)
        elif kind == "status":
            s.trading(*what)
        elif kind == "recover":
            if s.recovery is not None:
                s.recover(what)
        else:
            self._ask(kind, what)
        await self._settle()

    def _ask(self, kind: str, what: Any) -> None:
        """What is asked of the strategy, before it is started too."""
        if kind == "halt":
            self.strategy.halt(*what)
        elif kind in ("release", "flatten"):
            (self.strategy.release if kind == "release" else self.strategy.flatten)(what)

    async def _settle(self) -> None:
        """Until what the strategy has sent is with the venue, or denied; orders of its own are rejected there."""
        s, cache = self.strategy, self.strategy.cache
        while self._known < len(s.orders):
            new = [(order_id, k, number) for order_id, (k, _, number) in islice(s.orders.items(), self._known, None)]
            self._known += len(new)
            self._numbers |= {number: order_id for order_id, _, number in new}
            for order_id, k, number in new:
                if not await self._until(lambda o=order_id: str(o) in self._link.arrived or cache.is_order_closed(o)):  # type: ignore[misc]
                    raise AssertionError(f"{order_id} has not come to the venue")
                if self._ours.key(number) not in self._theirs.numbers:
                    for event in ("OrderSubmitted", "OrderRejected"):
                        await self._tell(k, order_id, {"event": event, "stamp": self._clock.at, "reason": "the session has not sent it"})

    async def _answer(self, what: Any) -> None:
        from cift_strategies.feeds.retold import OURS

        if what["event"] in OURS:
            return
        number = self._ours.numbers.get(self._theirs.of(what))
        if number is None or number not in self._numbers:
            self.untold += 1
        else:
            await self._tell(self._places[what["instrument"]], self._numbers[number], what)

    async def _tell(self, k: int, order_id: Any, what: Any) -> None:
        order, heard = self.strategy.cache.order(order_id), self._heard
        if order is None or order.is_closed:
            self.untold += what["event"] != "OrderDenied"  # the node has denied it by itself
            return
        self._clock.stamp = what["stamp"]
        self._link.venues[self._venues[k]].tell(order, what, self.strategy.terms.instruments[k].currency)
        self.untold += not await self._until(lambda: self._heard > heard)


# --- a run ----------------------------------------------------------------------------------------------------------------------------


def run(config: RunConfig) -> RunResult:
    """Replay `config.session`; the output folder holds `session.json` too. Raises InputError for what the user can mend."""
    from cift_strategies.backtest import unfinished

    assert config.session is not None
    if config.dbn or config.catalog or config.databento or config.polygon or config.symbols:
        raise InputError("--session replays what was recorded: leave out --dbn, --catalog, --databento, --polygon and --symbols")
    recording = Recording(config.session)
    out = config.out or Path("out") / f"session-{recording.manifest['name']}"
    with unfinished(out) as part, contextlib.ExitStack() as stack:
        return _run(config, recording, part, stack)


class Retold(Recovery):
    """Sees to an instrument where that is noted, and not by itself."""

    def ready(self, _k: int) -> bool:
        return False


def go_on(strategy: Any, began: Path, live: LiveConfig, stack: contextlib.ExitStack) -> None:
    """Put into `strategy` what a session in the sandbox began with: its journal as it was, of which a copy is gone on with."""
    from cift_strategies.journal import Journal

    journal = Journal(Path(shutil.copytree(began, Path(stack.enter_context(tempfile.TemporaryDirectory())) / BEGAN)), goes_on=True)
    stack.callback(journal.close)
    strategy.recovery = Retold(strategy, journal, True, live.resting)
    strategy.recovery.restore()


def _run(config: RunConfig, recording: Recording, out: Path, stack: contextlib.ExitStack) -> RunResult:
    from cift_models.hmm import REGIMES
    from cift_models.windows import HORIZONS_NS
    from cift_strategies.faults import Faults
    from cift_strategies.feeds import retold
    from cift_strategies.inference_actor import LookAhead
    from cift_strategies.live import engine_limits
    from cift_strategies.live_config import LiveConfig
    from cift_strategies.outcome import Outcomes, Traded, write_run
    from cift_strategies.results import write_json
    from cift_strategies.serving import Models
    from cift_strategies.serving_process import load
    from cift_strategies.strategy import Terms
    from cift_strategies.system import assemble, by_venue, live_node, starting
    from cift_strategies.weights import unpacked

    began, told = time.monotonic(), recording.manifest
    if told["version"] < VERSION:
        raise InputError(f"{recording.folder} was recorded by an older version, which did not note all turns: replay it with that one")
    live, instruments = LiveConfig.model_validate(told["config"]), recording.instruments
    artifact = config.artifacts or Path(told["artifact"])
    if not (artifact / "manifest.json").is_file():
        raise InputError(f"the models of the session are not in {artifact} any more: name them with --artifacts")
    with Steps("catalog"):
        to_catalog(recording)
    notes = recording.notes()
    swaps = {at: path for _, _, kind, what in notes if kind == "reload" for path, at in [what]}
    altdata = config.altdata or (Path(told["altdata"]) if told["altdata"] else None)
    engine = load(Models(artifact, instruments, live.members, None, altdata, live.seed, config.device))
    if (weights := told["learned"].get(engine.model_version)) is not None:
        unpacked(base64.b64decode(weights), engine.learned)
    outcomes, features = Outcomes(engine, artifact, instruments, out, live.seed), Compared()
    recorded = Recorded(recording.predictions(), not told.get("lost"))
    pauses = [(at, what) for at, _, kind, what in notes if kind == "status"]
    blocks, state = Blocks(recording, features, [*swaps, *(at for at, _ in pauses)]), {"events": 0, "last": 0}

    class Swapping:
        """The engine, with the models of the session at each block."""

        model_version = engine.model_version

        def predict(self, block: Block) -> Predictions:
            if (path := swaps.pop(state["events"], None)) is not None:
                engine.swap(Path(path))
                self.model_version = engine.model_version
            while pauses and pauses[0][0] <= state["events"]:
                k, now, ts = pauses.pop(0)[1]
                engine.trading(k, ts, now == OPEN)
            state["events"] += len(block.events)
            return engine.predict(block)

    def sink(block: Block, p: Predictions, latency: NDArray[np.int64]) -> None:
        recorded.push(p)
        outcomes.push(block, p, latency)
        if len(block.events):
            state["last"] = int(block.events["ts_init"][-1])

    found: dict[tuple[int, int], Prediction] = {}
    wanted = {(what[0], what[1]) for _, _, kind, what in notes if kind == "prediction"}

    class Ahead(LookAhead):
        """Keeps what was delivered in the session, for :class:`Teller`."""

        def predict(self, vector: FeatureVector) -> Iterable[Prediction]:
            first = system.features.vectors - (vector.stop - vector.first)
            asked = tuple(i for i in vector.closes if recorded.asked(first + i))
            for p in super().predict(vector._replace(closes=asked)):
                if (p.instrument, p.ts) in wanted:
                    found[p.instrument, p.ts] = p
            return ()

    faults = Faults()
    ends = {int(k): end for k, end in told["ends"].items()}
    clock, link = Told(), retold.Link()
    terms = Terms(instruments, live.settings, live.limits, REGIMES, 0, ends, {}, 0, faults, pace=clock)
    ahead = Ahead(recorded.asking(blocks), Swapping(), recorded, HORIZONS_NS, len(instruments), sink)  # type: ignore[arg-type]
    system = assemble(terms, ahead, live.strategy)
    system.features.intake = Intake(recording)
    if live.simulated and (recording.folder / BEGAN).is_dir():
        go_on(system.strategy, recording.folder / BEGAN, live, stack)
    teller, messages = Teller(notes, found, system, clock, link), Messages(instruments)
    venues = [retold.venue(link, name, starting(traded, live.limits.capital)) for name, traded in sorted(by_venue(instruments).items())]
    limits = engine_limits(live, instruments) | {"max_order_submit_rate": "1000000/00:00:01"}  # it comes faster than it came
    node = live_node(system, [retold.feed(link)], venues, False, limits=limits, retold=True)
    with Steps("stream", told.get("events") or 0, "events") as steps, faults.interrupts():

        def stream() -> Iterator[tuple[Any, int]]:
            for chunk in recording.stream():
                steps.advance(len(chunk.events))
                yield from messages.of(chunk)

        asyncio.run(teller.run(node, stream()))
        ahead.finish()
    faults.reraise()
    seconds, traded = time.monotonic() - began, Traded.by(system.strategy)
    node.dispose()
    with Steps("scores"):
        scored = outcomes.finish(engine)
    if not scored.first:
        raise InputError(f"{recording.folder} holds no event: nothing can be replayed")
    compared = {
        "features": features, "predictions": recorded.compare(instruments, state["last"]),
        "orders": compare_orders(notes[: teller.told], teller.again),
    }  # fmt: skip
    compared["orders"].cut_off = len(orders(notes)) - compared["orders"].recorded
    lines = [*dict.fromkeys(recording.said), *reasons(told, live, teller, recorded.passed)]
    session = {"folder": str(recording.folder), **{k: c.told() for k, c in compared.items()}, "notes": lines}
    n = system.features.vectors
    summary = {
        "events": n, "events_streamed": n, "feature_vectors": n, "events_per_second": n / seconds, "callback_errors": 0, "notes": lines,
        "session": {k: {"recorded": c.recorded, "equal": c.equal, "cut_off": c.cut_off} for k, c in compared.items()},
    }  # fmt: skip
    settings = {**live.model_dump(mode="json"), "order_latency_ms": told["order_latency_ms"], "session": str(recording.folder)}
    done = write_run(out, f"session-{told['name']}", instruments, scored, traded, summary, settings, began)
    write_json(out / "session.json", session)
    say(session)
    return done


def reasons(told: dict[str, Any], live: Any, teller: Teller, passed: int) -> list[str]:
    """What of the session cannot be the same again, in words."""
    out = []
    if passed:
        out.append(f"{passed:,} batches were not predicted, because newer ones of their instruments waited behind them: here neither")
    if passed != told.get("passed", passed) and not told.get("lost"):
        out.append(f"the session says that it passed over {told['passed']:,} batches: predictions are missing from its recording")
    if told["goes_on"] and teller.strategy.recovery is None:
        why = "that was not recorded" if live.simulated else "its venue told part of that"
        out.append(f"the session went on from an earlier one: what it began with is not replayed, because {why}")
    if told.get("lost"):
        out.append(f"{told['lost']} events found no room in the models' queue: what the models said after that cannot be said again")
    if live.budget_ms is not None:
        out.append("members that took longer than budget_ms abstained in the session: here they vote")
    if teller.missing:
        out.append(f"{teller.missing} predictions that were delivered were not made again")
    if teller.untold:
        out.append(f"{teller.untold} answers of the venue belong to orders that were not sent again, or could not take them")
    return out
