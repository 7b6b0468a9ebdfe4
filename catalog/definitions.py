"""What an instrument is, as far as Databento's files tell: from definition records, or guessed from the prices themselves.

Takes decoded records, gives :class:`Definition` and :class:`catalog.events.Instrument`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from catalog.events import SCALE, Instrument, decimals, text

Array = NDArray[Any]
UNDEFINED_PRICE: Final = 2**63 - 1
UNDEFINED_TIME: Final = 2**64 - 1
US_EQUITIES: Final = (
    "XNAS", "XNYS", "XBOS", "XPSX", "XCHI", "XASE", "ARCX", "BATS", "BATY", "EDGA", "EDGX", "IEXG", "MEMX", "EPRL", "DBEQ", "EQUS",
)  # fmt: skip
SESSIONS: Final = {  # of a dataset's first word, where nothing better is said; a TOML file overrides
    "GLBX": "17:00-16:00 America/Chicago",
    **dict.fromkeys(US_EQUITIES, "09:30-16:00 America/New_York"),
}


@dataclass(frozen=True, slots=True)
class Definition:
    """An instrument and what Nautilus wants to know of it besides; times in ns UTC, None where unknown."""

    instrument: Instrument
    symbol: str  # raw symbol
    number: int = 0  # the venue's instrument id, 0 when described by hand
    underlying: str = ""
    exchange: str = ""
    activation: int | None = None
    expiration: int | None = None


def beside(path: Path) -> Path | None:
    """The definition file that belongs to a data file: the same name with `definition` for the schema, in the same folder."""
    return companion(path, "definition")


def companion(path: Path, schema: str) -> Path | None:
    """The file of another schema that belongs to a data file."""
    for own in ("mbo", "mbp-10", "mbp-1", "cmbp-1", "tbbo", "tcbbo", "bbo-1s", "bbo-1m", "cbbo-1s", "cbbo-1m", "trades"):
        if f".{own}." in path.name:
            other = path.with_name(path.name.replace(f".{own}.", f".{schema}."))
            return other if other.is_file() else None
    return None


_KIND: Final = {"F": "future", "K": "equity", "X": "currency_pair"}


def definition(r: Any, dataset: str) -> Definition | None:
    """From an InstrumentDefMsg; None for spreads and options."""
    kind = _KIND.get(str(getattr(r.instrument_class, "value", r.instrument_class)))
    if kind is None:
        return None
    tick = int(r.min_price_increment)
    if not 0 < tick < UNDEFINED_PRICE:
        tick = SCALE // 100
    multiplier = 1.0
    if kind == "future":
        if 0 < r.unit_of_measure_qty < UNDEFINED_PRICE:
            multiplier = r.unit_of_measure_qty / SCALE
        elif 0 < r.contract_multiplier < 2**31 - 1:
            multiplier = float(r.contract_multiplier)
    times = [None if t in (0, UNDEFINED_TIME) else int(t) for t in (r.activation, r.expiration)]
    symbol = str(r.raw_symbol)
    instrument = Instrument(
        f"{symbol}.{venue(dataset, int(r.publisher_id))}", tick, SCALE, multiplier, str(r.currency) or "USD",
        SESSIONS.get(dataset.split(".")[0]), decimals(tick), 0, kind,
    )  # fmt: skip
    return Definition(instrument, symbol, int(r.instrument_id), str(r.asset), str(r.exchange), *times)


def venue(dataset: str, publisher: int = 0) -> str:
    """The venue of a dataset: "XNAS" of XNAS.ITCH; of a consolidated one, that of the publisher."""
    first, _, last = dataset.partition(".")
    if first not in ("DBEQ", "EQUS", "OPRA") and last != "BASIC":
        return first
    from databento.common.publishers import Publisher  # takes seconds

    try:
        return str(Publisher.from_int(publisher).venue)
    except (ValueError, KeyError, AttributeError):
        return first


# --- guesses --------------------------------------------------------------------------------------------------------------------------


def inferred(symbol: str, raw: Array, dataset: str) -> Instrument:
    """An instrument guessed from its MBO records: the tick is the greatest common divisor of its price differences, currency "" marks
    it as a guess (:func:`catalog.events.is_inferred`)."""
    tick = tick_of(raw["price"][raw["action"] != ord("R")])
    kind = "future" if dataset.split(".")[0] in ("GLBX", "IFEU", "IFUS", "NDEX", "XEUR", "XEEE", "IFLL") else "equity"
    publisher = int(raw[0]["publisher_id"]) if len(raw) else 0
    return Instrument(f"{symbol}.{venue(dataset, publisher)}", tick, SCALE, 1.0, "", None, decimals(tick), 0, kind)


def tick_of(prices: Array) -> int:
    """The largest price increment (1e-9 units) that explains `prices`; 0.01 where they tell nothing."""
    prices = np.unique(prices[prices != UNDEFINED_PRICE])
    return int(np.gcd.reduce(np.diff(prices, append=0))) if len(prices) > 1 else SCALE // 100


def toml(guess: Instrument) -> str:
    """The line of an instruments file for a guessed instrument."""
    symbol, where = guess.id.rsplit(".", 1)
    return (
        f'{{ symbol = "{symbol}", venue = "{where}", kind = "{guess.kind}", tick = "{text(guess.tick)}", lot = "1", '
        f'multiplier = {guess.multiplier}, currency = "USD", fee_per_unit = 0.0 }}'
    )


