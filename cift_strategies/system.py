"""Wires actors and strategy once, for every runner; builds engines and nodes, of history and live. The only file that constructs them.

A moved or renamed constructor of NautilusTrader touches this place alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nautilus_trader.adapters.sandbox import SandboxExecutionClientConfig, SandboxExecutionClientFactory
from nautilus_trader.backtest import (
    BacktestDataConfig,
    BacktestEngineConfig,
    BacktestNode,
    BacktestRunConfig,
    BacktestVenueConfig,
)
from nautilus_trader.common import Environment, LoggerConfig, LogLevel
from nautilus_trader.execution import FeeModel, StaticLatencyModel
from nautilus_trader.live import LiveDataEngineConfig, LiveExecutionEngineConfig, LiveNode, LiveRiskEngineConfig, RoutingConfig
from nautilus_trader.model import (
    AccountType,
    BookType,
    Currency,
    InstrumentId,
    LiquiditySide,
    Money,
    NautilusDataType,
    OmsType,
    TraderId,
    Venue,
)

from catalog.errors import InputError
from catalog.events import Instrument, catalog_counts
from cift_strategies.faults import Faults
from cift_strategies.feature_actor import FeatureActor
from cift_strategies.inference_actor import InferenceActor, Predictor
from cift_strategies.strategy import EnsembleStrategy, Terms

if TYPE_CHECKING:
    from nautilus_trader.backtest import BacktestResult

BOOKS = {3: BookType.L3_MBO, 2: BookType.L2_MBP, 1: BookType.L1_MBP}


@dataclass(frozen=True, slots=True)
class System:
    """The actors and the strategy of one run, in the order in which they are added."""

    features: FeatureActor
    inference: InferenceActor
    strategy: EnsembleStrategy

    def add_to(self, add_actor: Callable[[Any], object], add_strategy: Callable[[Any], object]) -> None:
        add_actor(self.features)
        add_actor(self.inference)
        add_strategy(self.strategy)


class Part(Protocol):
    """What adds its actors and its strategy to a node: a :class:`System`, or some of one."""

    def add_to(self, add_actor: Callable[[Any], object], add_strategy: Callable[[Any], object]) -> None: ...


def assemble(terms: Terms, predictor: Predictor, strategy: str | None = None, restamp: bool = False) -> System:
    """The system for `terms`: `predictor` answers each batch, `strategy` ("package.module:Class") replaces ours; `restamp`: see Intake.

    Raises InputError when there is no such class or it does not extend EnsembleStrategy.
    """
    kind = EnsembleStrategy if strategy is None else strategy_class(strategy)
    features = FeatureActor(terms.instruments, terms.faults, terms.pace, restamp)
    return System(features, InferenceActor(predictor, terms.faults, terms.pace), kind(terms))


def strategy_class(path: str) -> type[EnsembleStrategy]:
    """The strategy named "package.module:Class". Raises InputError, saying what is wrong with the name."""
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f'strategy "{path}" cannot be imported ({error}): write it as package.module:Class') from None
    if not (isinstance(found, type) and issubclass(found, EnsembleStrategy)):
        raise InputError(f'strategy "{path}" does not extend cift_strategies.strategy.EnsembleStrategy')
    return found


class Fees(FeeModel):
    """Share of notional by maker and taker, plus an amount per unit; each instrument its own."""

    def __new__(cls, *_args: Any) -> Fees:
        return super().__new__(cls)

    def __init__(self, instruments: Sequence[Instrument], faults: Faults) -> None:
        self._of = {x.id: (x, Currency.from_str(x.currency)) for x in instruments}
        self._faults = faults

    def get_commission(self, order: Any, quantity: Any, price: Any, instrument: Any) -> Money:
        x, currency = self._of[str(instrument.id)]
        units = quantity.as_double()
        share = x.maker_fee if order.liquidity_side == LiquiditySide.MAKER else x.taker_fee
        return Money(share * units * price.as_double() * x.multiplier + x.fee_per_unit * units, currency)


@dataclass(frozen=True, slots=True)
class Replay:
    """Which part of a catalog is streamed, and how the simulated venue answers."""

    root: Path
    instruments: Sequence[Instrument]
    start: int  # ns, inclusive
    end: int  # ns, inclusive
    capital: float
    order_latency_ns: int
    chunk_size: int | None = 20_000


def venues(replay: Replay, faults: Faults) -> list[BacktestVenueConfig]:
    """One simulated venue per venue of the instruments: their depth of book, fees, latency, and a balance per currency."""
    configs = []
    for name, traded in sorted(by_venue(replay.instruments).items()):
        if len({x.level for x in traded}) > 1:
            depths = ", ".join(f"{x.id} L{x.level}" for x in traded)
            raise InputError(f"venue {name} has feeds of different depth ({depths}): run them apart with --symbols")
        configs.append(
            BacktestVenueConfig(
                name=name,
                oms_type="NETTING",
                account_type="MARGIN",
                starting_balances=[f"{replay.capital:.2f} {c}" for c in _currencies(traded)],
                book_type=BOOKS[traded[0].level],
                fee_model=Fees(traded, faults),
                latency_model=StaticLatencyModel(base_latency_nanos=replay.order_latency_ns),
                liquidity_consumption=True,
                queue_position=traded[0].level > 1,
                bar_execution=False,
            )
        )
    return configs


def data(replay: Replay) -> list[BacktestDataConfig]:
    """What is streamed, in the order that decides at equal stamps: trades before book changes."""
    counts = catalog_counts(replay.root, [x.id for x in replay.instruments])
    root, configs = str(replay.root.resolve()), []
    for kind, name in (
        (NautilusDataType.TradeTick, "trades"),
        (NautilusDataType.OrderBookDelta, "order_book_deltas"),
        (NautilusDataType.QuoteTick, "quotes"),
    ):
        ids = [x.id for x in replay.instruments if counts.get(x.id, {}).get(name) and (x.level == 1 or name != "quotes")]
        if ids:
            configs.append(
                BacktestDataConfig(
                    kind, root, instrument_ids=[InstrumentId.from_str(i) for i in ids], start_time=replay.start, end_time=replay.end
                )
            )
    return configs


def run_backtest(system: Part, replay: Replay, faults: Faults) -> tuple[BacktestResult, BacktestNode, str]:
    """Stream `replay` through a BacktestNode with `system`; returns its result, the node (undisposed) and the run's id.

    The first exception of any callback, Ctrl-C included, ends the run's callbacks and is raised here.
    """
    config = BacktestRunConfig(
        venues=venues(replay, faults),
        data=data(replay),
        engine=BacktestEngineConfig(logging=LoggerConfig(stdout_level=LogLevel.ERROR)),
        chunk_size=replay.chunk_size,
        raise_exception=True,
        dispose_on_completion=False,
    )
    node = BacktestNode([config])
    with faults.interrupts():
        node.build()
        system.add_to(lambda a: node.add_actor(config.id, a), lambda s: node.add_strategy(config.id, s))
        results = node.run()
    faults.reraise()
    return results[0], node, config.id


def by_venue(instruments: Sequence[Instrument]) -> dict[str, list[Instrument]]:
    found: dict[str, list[Instrument]] = {}
    for x in instruments:
        found.setdefault(str(InstrumentId.from_str(x.id).venue), []).append(x)
    return found


def starting(traded: Sequence[Instrument], capital: float) -> list[Money]:
    """What an account for `traded` begins with."""
    return [Money(capital, Currency.from_str(c)) for c in _currencies(traded)]


def _currencies(traded: Sequence[Instrument]) -> list[str]:
    return sorted({x.currency for x in traded})


# --- live -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Client:
    """A data or execution client of Nautilus's: its name, factory and configuration. `restamp`: see Intake."""

    name: str
    factory: Any
    config: Any
    restamp: bool = False


def sandbox(instruments: Sequence[Instrument], capital: float, order_latency_ns: int, faults: Faults) -> list[Client]:
    """The backtest's simulated venues for a live node: the same fees, latency, queue position and balances."""
    clients = []
    for name, traded in sorted(by_venue(instruments).items()):
        config = SandboxExecutionClientConfig(
            venue=Venue(name),
            starting_balances=starting(traded, capital),
            oms_type=OmsType.NETTING,
            account_type=AccountType.MARGIN,
            book_type=BOOKS[traded[0].level],
            bar_execution=False,
            reject_stop_orders=False,
            fee_model=Fees(traded, faults),
            latency_model=StaticLatencyModel(base_latency_nanos=order_latency_ns),
            liquidity_consumption=True,
            queue_position=traded[0].level > 1,
        )
        clients.append(Client(name, SandboxExecutionClientFactory(), config))
    return clients


def live_node(
    system: System, feeds: Sequence[Client], venues: Sequence[Client], simulated: bool, actors: Sequence[Any] = (),
    limits: Mapping[str, Any] | None = None, trader: str = "CIFT-001", retold: bool = False,
) -> LiveNode:  # fmt: skip
    """A node with `feeds` and `venues` (`simulated`: sandboxes), `system` and then `actors`. `limits`: of LiveRiskEngineConfig. `retold`:
    its venues are nobody's: they are not asked what they hold, nor what became of an order."""
    from cift_strategies.definitions import NAME, DefinitionsConfig, DefinitionsFactory

    builder = LiveNode.builder("CIFT", TraderId(trader), Environment.SANDBOX if simulated else Environment.LIVE)
    reconciles = not (simulated or retold)
    if retold:
        builder = builder.with_exec_engine_config(LiveExecutionEngineConfig(inflight_check_interval_ms=0))
    known = DefinitionsConfig(system.strategy.terms.instruments)
    builder = builder.add_data_client(NAME, DefinitionsFactory, known, RoutingConfig(default=False))
    for n, feed in enumerate(feeds):
        builder = builder.add_data_client(feed.name, feed.factory, feed.config, RoutingConfig(default=n == 0))
    for venue in venues:
        add = builder.add_simulated_exec_client if simulated else builder.add_exec_client
        builder = add(venue.name, venue.factory, venue.config)
    node = (
        builder.with_reconciliation(reconciles)
        .with_logging(LoggerConfig(stdout_level=LogLevel.ERROR))
        .with_delay_post_stop_secs(1)
        .with_data_engine_config(LiveDataEngineConfig(emit_quotes_from_book=True))
        .with_risk_engine_config(LiveRiskEngineConfig(**(limits or {})))
        .build()
    )
    system.add_to(node.add_actor, node.add_strategy)
    if reconciles:  # orders and positions that the venue reports are the strategy's, those of before a restart too
        system.strategy.set_external_order_instrument_ids(system.strategy.ids)
    for actor in actors:
        node.add_actor(actor)
    return node
