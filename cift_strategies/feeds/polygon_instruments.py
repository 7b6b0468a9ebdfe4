"""Polygon's symbols: to which cluster they belong, what their instruments are, how they are called in Nautilus.

Takes symbols as Polygon writes them (AAPL, BRK.B, X:BTC-USD, O:SPY261218C00650000, I:SPX); :func:`instruments` asks the REST API what
it has to know of stocks and pairs. Option contracts say all about themselves in their symbol.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Sequence
from typing import Any, Final

from nautilus_trader.model import (
    AssetClass,
    Currency,
    IndexInstrument,
    InstrumentId,
    OptionContract,
    OptionKind,
    Price,
    Quantity,
    Symbol,
)

from catalog.definitions import Definition
from catalog.errors import InputError
from catalog.events import SCALE, Instrument, units
from catalog.importer import nautilus_instrument
from catalog.polygon import NEW_YORK, VENUE, Refused, Rest, nanos
from catalog.tape import EQUITY_PRECISION, equity_tick, nautilus_name

COINBASE: Final = 1  # Polygon's numbers of crypto exchanges: 1 Coinbase, 2 Bitfinex, 6 Bitstamp, 23 Kraken
SAMPLE: Final = 1_000  # newest quotes or trades from which increments are found
CONTRACT: Final = 100  # shares of a standard option
_OPTION: Final = re.compile(r"O:([A-Z]{1,6}\d?)(\d{6})([CP])(\d{8})")
_SHAPES: Final = {
    "options": _OPTION, "indices": re.compile(r"I:[A-Za-z0-9._]{1,30}"), "crypto": re.compile(r"X:[A-Z0-9]{1,15}-[A-Z]{3,5}"),
    "stocks": re.compile(r"[A-Za-z][A-Za-z0-9.\-]{0,14}"),
}  # fmt: skip


def market(symbol: str) -> str:
    """The cluster of a symbol: stocks, options, crypto or indices. Raises InputError for what is no symbol."""
    for name, shape in _SHAPES.items():
        if shape.fullmatch(symbol):
            return name
    raise InputError(f"{symbol!r} is no Polygon symbol: write AAPL, X:BTC-USD, O:SPY261218C00650000 or I:SPX")


def topic(symbol: str) -> str:
    """The symbol as the WebSocket's channels and messages write it."""
    return symbol.removeprefix("X:")


def id_of(symbol: str) -> str:
    """The Nautilus instrument id: AAPL.POLYGON, BTCUSD.POLYGON."""
    return f"{nautilus_name(symbol)}.{VENUE}"


def instruments(symbols: Sequence[str], *, key: str | None = None, rest: Rest | None = None) -> list[Instrument]:
    """The instruments of stocks and crypto pairs, in order, with the REST API's help.

    Stocks have one level of depth, pairs two. A stock's tick is found from its newest quotes (0.01 where the plan has none), a pair's
    decimals from its newest trades (eight where the plan has none). Raises InputError: no or a refused key, an unknown symbol, an option
    or an index, which cannot be traded on its prices alone.
    """
    rest = rest or Rest(key)
    return [_instrument(s, rest) for s in dict.fromkeys(symbols)]


def _instrument(symbol: str, rest: Rest) -> Instrument:
    kind = market(symbol)
    if kind not in ("stocks", "crypto"):
        raise InputError(f"{symbol} cannot be traded here, its prices may only be looked at: name stocks and crypto pairs")
    try:
        details = rest.page("get_ticker_details", symbol.replace("-", "") if kind == "crypto" else symbol).get("results") or {}
    except Refused as e:
        if e.status == 404:
            raise InputError(f"Polygon does not know the symbol {symbol}: check its spelling (it is case-sensitive)") from None
        raise
    if kind == "stocks":
        tick = units(equity_tick(_grid(symbol, rest)))
        money = str(details.get("currency_name") or "usd").upper()
        return Instrument(
            id_of(symbol), tick, SCALE, 1.0, money, "09:30-16:00 America/New_York", EQUITY_PRECISION, 0, "equity", level=1
        )  # fmt: skip
    digits = _decimals(symbol, rest)
    tick, lot = (10 ** (9 - d) for d in digits)
    return Instrument(id_of(symbol), tick, lot, 1.0, symbol.partition("-")[2], None, *digits, "currency_pair", level=2)


def _sample(rest: Rest, call: str, symbol: str) -> list[dict[str, Any]]:
    try:
        return rest.page(call, symbol, order="desc", sort="timestamp", limit=SAMPLE).get("results") or []
    except Refused as e:
        if e.status in (403, 404):
            return []
        raise


def _grid(symbol: str, rest: Rest) -> Any:
    """How many of the newest quoted prices there are, lie on half cents, lie on cents."""
    prices = nanos(q.get(side) for q in _sample(rest, "list_quotes", symbol) for side in ("bid_price", "ask_price"))
    prices = prices[prices > 0]
    return [len(prices), int((prices % 5_000_000 == 0).sum()), int((prices % 10_000_000 == 0).sum())]


def _decimals(symbol: str, rest: Rest) -> tuple[int, int]:
    trades = _sample(rest, "list_trades", symbol)
    if not trades:
        return 8, 8
    found = []
    for name in ("price", "size"):
        v = nanos(t.get(name) for t in trades)
        found.append(next(d for d in range(10) if not (v % 10 ** (9 - d)).any()))
    return found[0], found[1]


def nautilus_object(symbol: str, instrument: Instrument | None) -> Any:
    """The Nautilus instrument of a symbol; options and indices need no `instrument`."""
    kind = market(symbol)
    if instrument is not None:
        return nautilus_instrument(Definition(instrument, topic(symbol)))
    id_, raw = InstrumentId.from_str(id_of(symbol)), Symbol(symbol)
    dollar = Currency.from_str("USD")
    if kind == "indices":
        return IndexInstrument(id_, raw, dollar, 4, 0, Price.from_str("0.0001"), Quantity.from_int(1), 0, 0)
    if (m := _OPTION.fullmatch(symbol)) is None:
        raise InputError(f"{symbol} has no definition: pass it in `instruments`")
    root, day, right, strike = m.groups()
    try:
        date = dt.datetime.strptime(day, "%y%m%d").replace(hour=16, tzinfo=NEW_YORK)
    except ValueError:
        raise InputError(f"{symbol} has no such day of expiry: write O:SPY261218C00650000") from None
    return OptionContract(
        id_, raw, AssetClass.EQUITY, root, OptionKind.CALL if right == "C" else OptionKind.PUT, Price.from_str(f"{int(strike) / 1000:.3f}"),
        dollar, 0, int(date.timestamp()) * SCALE, 4, Price.from_str("0.0100"), Quantity.from_int(CONTRACT), Quantity.from_int(1), 0, 0,
    )  # fmt: skip


def digits_of(symbol: str, instrument: Instrument | None) -> tuple[int, int]:
    """Decimals of prices and sizes."""
    return (4, 0) if instrument is None else (instrument.price_precision, instrument.size_precision)
