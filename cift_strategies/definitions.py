"""A data client that gives the node the instruments it trades, whatever feed their prices come from.

Definitions are ours (tick, lot, multiplier, currency), known before anything connects, so that the execution side can match and size orders
from the first record on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nautilus_trader.config import DataClientConfig
from nautilus_trader.live.clients import DataClient, DataClientFactory
from nautilus_trader.model import Venue

from catalog.definitions import Definition
from catalog.events import Instrument
from catalog.importer import nautilus_instrument

NAME = "DEFINITIONS"


class DefinitionsConfig(DataClientConfig):
    """`instruments`: those of the session."""

    def __new__(cls, instruments: Sequence[Instrument]) -> DefinitionsConfig:
        return super().__new__(cls)

    def __init__(self, instruments: Sequence[Instrument]) -> None:
        self.instruments = tuple(instruments)


class DefinitionsClient(DataClient):
    async def _connect(self) -> None:
        assert isinstance(self.config, DefinitionsConfig)
        for x in self.config.instruments:
            self._handle_instrument(nautilus_instrument(Definition(x, x.id.rsplit(".", 1)[0])))

    async def _disconnect(self) -> None:
        pass


class DefinitionsFactory(DataClientFactory):
    @staticmethod
    def create(*, name: str, config: Any, cache: Any, clock: Any) -> DefinitionsClient:
        return DefinitionsClient(name=name, config=config, cache=cache, clock=clock, venue=Venue(name))
