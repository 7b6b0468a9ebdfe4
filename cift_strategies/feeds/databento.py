"""Databento's live data for a node: our client of its protocol, or Nautilus's own.

:func:`client` takes instruments, dataset and key; gives what a node is built with. Ours (:mod:`.direct`) gives a node the rows of history:
the venue's stamps, a snapshot of the book at every start and reconnection, trades in their place, partial executions as such. Nautilus's
is faster, but gives the capture time for the venue's, asks for no snapshot, and its books lose orders that were executed in part.
"""

from __future__ import annotations

import atexit
import json
import os
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

from catalog.errors import InputError
from catalog.events import Instrument
from cift_strategies.feeds.health import Health
from cift_strategies.system import Client

NAME: Final = "DATABENTO"
ENV_KEY: Final = "DATABENTO_API_KEY"
PORT: Final = 13_000
KEY_LENGTH: Final = 32


def client(
    instruments: Sequence[Instrument], dataset: str, key: str | None = None, *, live: str | None = None, historical: str | None = None,
    reader: Literal["direct", "nautilus"] = "direct", health: Health | None = None,
) -> Client:  # fmt: skip
    """The data client of `instruments` (their ids' venue is where they trade) from one dataset.

    `key`: None takes DATABENTO_API_KEY. `live` ("host:port") and `historical` (an URL) name another gateway than Databento's.
    `reader`: "direct" is ours, "nautilus" is Nautilus's own; its trades come with the order book deltas, so that they must not be asked
    of it (see :attr:`Client.restamp` for its stamps). `health` is told of gaps and reconnections (ours only).
    Raises InputError where there is no key, or none of a key's form.
    """
    key = (os.environ.get(ENV_KEY, "") if key is None else key).strip()
    if not key:
        raise InputError(f"no Databento key: set the environment variable {ENV_KEY}")
    if len(key) != KEY_LENGTH or not key.startswith("db-") or not key.isascii():
        raise InputError(f"the Databento key in {ENV_KEY} has another form: it has {KEY_LENGTH} characters and begins with db-")
    if reader == "direct":
        from cift_strategies.feeds import direct

        host, port = address(dataset, live)
        own = direct.DirectConfig(instruments=instruments, dataset=dataset, host=host, port=port, health=health or Health(instruments))
        return Client(NAME, direct.DirectFactory(key), own)
    from nautilus_trader.adapters.databento import DatabentoDataClientConfig, DatabentoDataClientFactory

    venues = {x.id.rsplit(".", 1)[1] for x in instruments}
    config = DatabentoDataClientConfig(
        key, publishers_file(), venue_dataset_map=dict.fromkeys(venues, dataset), live_gateway_addr=live, historical_base_url=historical
    )
    return Client(NAME, DatabentoDataClientFactory(), config, restamp=True)


def address(dataset: str, live: str | None = None) -> tuple[str, int]:
    """(host, port) of a dataset's live gateway; `live` "host:port" overrides. Raises InputError."""
    if live is None:
        return f"{dataset.lower().replace('.', '-')}.lsg.databento.com", PORT
    host, _, port = live.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f'live gateway "{live}" is no address: write host:port')
    return host, int(port)


def publishers() -> list[dict[str, Any]]:
    """Databento's publishers (number, dataset, venue) as Nautilus wants them, from databento's own tables."""
    from databento.common.publishers import Publisher

    return [
        {"publisher_id": p.to_int(), "dataset": str(p.dataset), "venue": str(p.venue), "description": p.description} for p in Publisher
    ]


@cache
def publishers_file() -> Path:
    """A file of :func:`publishers` that lies in the temporary folder as long as this process lives."""
    with tempfile.NamedTemporaryFile("w", prefix="publishers-", suffix=".json", delete=False) as file:
        json.dump(publishers(), file)
    path = Path(file.name)
    atexit.register(path.unlink, missing_ok=True)
    return path
