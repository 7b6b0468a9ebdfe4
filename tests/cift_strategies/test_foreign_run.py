"""Catalogs of quotes alone, of several venues and kinds of instrument, trade through the same strategy; inverse contracts are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from nautilus_trader import model as m
from nautilus_trader.persistence import ParquetDataCatalog
from tapes import OPEN, Script, play

from catalog.errors import InputError
from catalog.events import read_catalog
from cift_strategies import source

P, Q, SYMBOL, ID, CURRENCY = m.Price.from_str, m.Quantity.from_str, m.Symbol, m.InstrumentId.from_str, m.Currency.from_str
MS = 1_000_000
OPTION = (m.AssetClass.EQUITY, "AAPL", m.OptionKind.CALL, P("149.00"), CURRENCY("USD"), 0, 2_000_000_000 * 10**9)
BTC, USD, USDT = (CURRENCY(c) for c in ("BTC", "USD", "USDT"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An option, a perpetual and an inverse perpetual of three venues: quotes in files of a second."""
    root = tmp_path_factory.mktemp("foreign")
    catalog = ParquetDataCatalog(str(root))
    made = [
        m.OptionContract(ID("AAPL211217C00150000.OPRA"), SYMBOL("AAPL211217C00150000"), *OPTION, 2, P("0.01"), Q("1"), Q("1"), 0, 0),
        m.CryptoPerpetual(ID("BTCUSDT-PERP.BINANCE"), SYMBOL("BTCUSDT"), BTC, USDT, USDT, False, 1, 3, P("0.1"), Q("0.001"), 0, 0),
        m.CryptoPerpetual(ID("XBTUSD.BITMEX"), SYMBOL("XBTUSD"), BTC, USD, BTC, True, 1, 0, P("0.5"), Q("1"), 0, 0),
    ]
    catalog.write_instruments(made)
    for n, x in enumerate(made):
        tick, sizes = float(str(x.price_increment)), (m.Quantity(50, x.size_precision), m.Quantity(60, x.size_precision))
        for second in range(3):
            ticks = []
            for k in range(100):
                ts, price = OPEN + (1_000 * second + 10 * k + 3 * n) * MS, 100 + k % 3 * tick
                ticks.append(m.QuoteTick(x.id, *(m.Price(v, x.price_precision) for v in (price, price + 2 * tick)), *sizes, ts, ts))
            catalog.write_quote_ticks(ticks)
    return root


def test_quotes_of_several_venues_are_traded(foreign: Path) -> None:
    ids = ["AAPL211217C00150000.OPRA", "BTCUSDT-PERP.BINANCE"]
    for id_ in ids:
        played = play(foreign, read_catalog(foreign, [id_])[0], Script({300: (1, 50.0, 0)}), ends=False)
        assert [f["role"] for f in played.fills] == ["entry", "exit"] and played.faults.first is None, id_
    both = play(foreign, read_catalog(foreign, ids)[0], Script({300: (1, 50.0, 0), 302: (1, 50.0, 0)}), ends=False)
    assert both.system.features.vectors == 2 * 2 * 300 and {f["instrument"] for f in both.fills} == set(ids)


def test_an_inverse_contract_is_refused_by_name(foreign: Path) -> None:
    with pytest.raises(InputError, match=r"XBTUSD\.BITMEX is an inverse contract"):
        source.catalog(foreign, None)
    assert len(source.catalog(foreign, ["BTCUSDT-PERP.BINANCE"]).instruments) == 1
