"""A recorded live session again: the same events in the same order and grouping through the backtest's actors, strategy and venue.

Features and predictions are computed anew and compared with what was recorded, each by itself; orders with predictions delivered where
they came. Gives a run's usual output and `session.json`, which lists everything that is not equal.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from catalog.errors import InputError
from catalog.events import CLEAR, F_MBP, F_TOB, TRADE, Instrument
from catalog.progress import Steps
from catalog.status import OPEN
from cift_strategies import intake
from cift_strategies.compared import Compared, Recorded, compare_orders, say
from cift_strategies.recording import Chunk, Recording, Witness, digested, to_catalog

if TYPE_CHECKING:
    from cift_models.inference import Predictions
    from cift_models.windows import Block
    from cift_strategies.backtest import RunConfig
    from cift_strategies.messages import FeatureVector, Prediction
    from cift_strategies.outcome import RunResult

type Array = NDArray[Any]

BLOCK: Final = 16_384  # events of a block, at most about


# --- events -> messages and blocks ----------------------------------------------------------------------------------------------------


class Messages:
    """The Nautilus messages of recorded events, as the node got them, stamped (`ts_init`) with the stream's time when they came.

    So the engine's clock is the session's: of a real feed the wall's, of a replay as :class:`Pace` of the session told it. `pace`: a pace
    as the session began with, whose clock is `wall`; None for a real feed.
    """

    def __init__(self, instruments: Sequence[Instrument], begins: int, speed: float | None) -> None:
        from nautilus_trader.model import InstrumentId

        from cift_strategies.pace import Pace

        self._instruments = instruments
        self._ids = [InstrumentId.from_str(x.id) for x in instruments]
        self._trades = self._came = self._newest = 0
        self._pace = None if speed is None else Pace(begins, 0, speed, lambda: self._came)

    def of(self, chunk: Chunk) -> list[Any]:
        rows, out, a = chunk.events.tolist(), [], 0
        for b, came in zip(chunk.ends.tolist(), chunk.came.tolist()):
            out.append(self._message(rows[a:b], self._arrival(rows[b - 1][1], came)))
            a = b
        return out

    def _arrival(self, ts: int, came: int) -> int:
        self._came = came
        if self._pace is not None:
            self._pace.see(ts)
            came = self._pace.now()
        self._newest = max(self._newest, came)
        return self._newest

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


class Turns:
    """Does, after each message, what was noted there in the session, at its time: predictions, and what was asked of the strategy."""

    def __init__(self, notes: Sequence[tuple[int, int, str, Any]], found: dict[tuple[int, int], Prediction], system: Any) -> None:
        self._notes = [n for n in notes if n[2] in ("prediction", "halt", "release", "flatten", "status")]
        self._found, self._system, self._next = found, system, 0
        self.missing = 0

    def __call__(self, actor: Any) -> None:
        notes = self._notes
        while self._next < len(notes) and notes[self._next][0] <= self._system.features.vectors:
            _, now, kind, what = notes[self._next]
            self._next += 1
            act = partial(self._deliver, *what) if kind == "prediction" else partial(self._say, kind, what)
            if now > actor.clock.timestamp_ns():
                actor.at(f"note-{self._next}", now, act)
            else:
                act()

    def _deliver(self, k: int, ts: int, latency: int) -> None:
        if (p := self._found.pop((k, ts), None)) is None:
            self.missing += 1
        else:
            self._system.inference.accept([replace(p, latency_ns=latency)])

    def _say(self, kind: str, what: Any) -> None:
        strategy = self._system.strategy
        if kind == "halt":
            strategy.halt(*what)
        elif kind == "status":
            strategy.market[what[0]] = what[1]
        else:
            (strategy.release if kind == "release" else strategy.flatten)(what)


# --- a run ----------------------------------------------------------------------------------------------------------------------------


def run(config: RunConfig) -> RunResult:
    """Replay `config.session`; the output folder holds `session.json` too. Raises InputError for what the user can mend."""
    from cift_strategies.backtest import unfinished

    assert config.session is not None
    if config.dbn or config.catalog or config.databento or config.polygon or config.symbols:
        raise InputError("--session replays what was recorded: leave out --dbn, --catalog, --databento, --polygon and --symbols")
    recording = Recording(config.session)
    out = config.out or Path("out") / f"session-{recording.manifest['name']}"
    with unfinished(out) as part:
        return _run(config, recording, part)


def _run(config: RunConfig, recording: Recording, out: Path) -> RunResult:
    from cift_models.hmm import REGIMES
    from cift_models.windows import HORIZONS_NS
    from cift_strategies.faults import Faults
    from cift_strategies.inference_actor import LookAhead
    from cift_strategies.live_config import LiveConfig
    from cift_strategies.outcome import Outcomes, Traded, write_run
    from cift_strategies.recording_actor import ReplayActor
    from cift_strategies.results import write_json
    from cift_strategies.serving import Models
    from cift_strategies.serving_process import load
    from cift_strategies.strategy import Terms
    from cift_strategies.system import assemble, run_messages
    from cift_strategies.weights import unpacked

    began, told = time.monotonic(), recording.manifest
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
        """Keeps what was delivered in the session, for :class:`Turns`."""

        def predict(self, vector: FeatureVector) -> Iterable[Prediction]:
            first = system.features.vectors - (vector.stop - vector.first)
            asked = tuple(i for i in vector.closes if recorded.asked(first + i))
            for p in super().predict(vector._replace(closes=asked)):
                if (p.instrument, p.ts) in wanted:
                    found[p.instrument, p.ts] = p
            return ()

    faults = Faults()
    ends = {int(k): end for k, end in told["ends"].items()}
    latency = round(told["order_latency_ms"] * 1e6)
    again: list[tuple[int, int, str, Any]] = []
    terms = Terms(instruments, live.settings, live.limits, REGIMES, 0, ends, {}, latency, faults)
    ahead = Ahead(recorded.asking(blocks), Swapping(), recorded, HORIZONS_NS, len(instruments), sink)  # type: ignore[arg-type]
    system = assemble(terms, ahead, live.strategy)
    system.features.intake = Intake(recording)
    turns = Turns(notes, found, system)
    actor = ReplayActor(turns, faults)
    witness = Witness(system, lambda kind, what: again.append((system.features.vectors, actor.clock.timestamp_ns(), kind, what)))
    actor.signal = witness.signal
    messages = Messages(instruments, told["starts"], told["speed"] if live.feed == "replay" else None)
    with Steps("stream", told.get("events") or 0, "events") as steps:

        def chunks() -> Iterator[list[Any]]:
            for chunk in recording.stream():
                steps.advance(len(chunk.events))
                yield messages.of(chunk)

        result, node = run_messages(system, [actor], chunks(), live.limits.capital, latency, faults)
        ahead.finish()
    seconds, traded = time.monotonic() - began, Traded.by(system.strategy)
    node.dispose()
    with Steps("scores"):
        scored = outcomes.finish(engine)
    if not scored.first:
        raise InputError(f"{recording.folder} holds no event: nothing can be replayed")
    sent = [n for n in notes if n[2] in ("signal", "order")]
    compared = {
        "features": features, "predictions": recorded.compare(instruments, state["last"]), "orders": compare_orders(sent, again)
    }  # fmt: skip
    lines = [*dict.fromkeys(recording.said), *reasons(told, live, compared["orders"], turns.missing, recorded.passed)]
    session = {"folder": str(recording.folder), **{k: c.told() for k, c in compared.items()}, "notes": lines}
    n = system.features.vectors
    summary = {
        "events": n, "events_streamed": n, "feature_vectors": n, "events_per_second": n / seconds, "callback_errors": 0, "notes": lines,
        "session": {k: {"recorded": c.recorded, "equal": c.equal, "cut_off": c.cut_off} for k, c in compared.items()},
    }  # fmt: skip
    settings = {**live.model_dump(mode="json"), "order_latency_ms": told["order_latency_ms"], "session": str(recording.folder)}
    done = write_run(out, f"session-{told['name']}", instruments, scored, traded, summary, settings, began, None, result)
    write_json(out / "session.json", session)
    say(session)
    return done


def reasons(told: dict[str, Any], live: Any, orders: Compared, missing: int, passed: int) -> list[str]:
    """What of the session cannot be the same again, in words."""
    out = []
    if passed:
        out.append(f"{passed:,} batches were not predicted, because newer ones of their instruments waited behind them: here neither")
    if passed != told.get("passed", passed) and not told.get("lost"):
        out.append(f"the session says that it passed over {told['passed']:,} batches: predictions are missing from its recording")
    if told["goes_on"]:
        out.append("the session went on from an earlier one: positions that it began with are not replayed")
    if told.get("lost"):
        out.append(f"{told['lost']} events found no room in the models' queue: what the models said after that cannot be said again")
    if live.budget_ms is not None:
        out.append("members that took longer than budget_ms abstained in the session: here they vote")
    if not live.simulated:
        out.append("orders went to a real venue: its fills are its own, here a simulated venue answers")
    if missing:
        out.append(f"{missing} predictions that were delivered were not made again")
    if orders.differ:
        out.append("when orders, cancels and alerts had their turn on the node's loop was not recorded: orders differ by that")
    return out
