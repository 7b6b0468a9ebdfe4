"""Catalogs that NautilusTrader wrote elsewhere: any venue, any instrument, levels 1 to 3, in however many files."""

from __future__ import annotations

import os
import shutil
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nautilus_trader import model as m
from nautilus_trader.persistence import ParquetDataCatalog

from catalog import status
from catalog.errors import InputError
from catalog.events import F_TOB, SCALE, catalog_counts, read_catalog, trading_state
from catalog.parquet import read_instruments

P, Q, SYMBOL, ID, CURRENCY = m.Price.from_str, m.Quantity.from_str, m.Symbol, m.InstrumentId.from_str, m.Currency.from_str
EXPIRY = 2_000_000_000 * SCALE
MS = 10**6


def instruments():
    usd, usdt, btc = (CURRENCY(c) for c in ("USD", "USDT", "BTC"))
    pair = btc, usdt, usdt, False
    return [
        m.CryptoPerpetual(ID("BTCUSDT-PERP.BINANCE"), SYMBOL("BTCUSDT"), *pair, 1, 3, P("0.1"), Q("0.001"), 0, 0),
        m.CryptoPerpetual(ID("XBTUSD.BITMEX"), SYMBOL("XBTUSD"), btc, usd, btc, True, 1, 0, P("0.5"), Q("1"), 0, 0),
        m.CryptoFuture(ID("BTCUSDT_330325.BINANCE"), SYMBOL("BTCUSDT_330325"), *pair, 0, EXPIRY, 2, 6, P("0.01"), Q("0.000001"), 0, 0),
        m.CurrencyPair(ID("AUD/USD.SIM"), SYMBOL("AUD/USD"), CURRENCY("AUD"), usd, 5, 0, P("0.00001"), Q("1"), 0, 0),
        m.CurrencyPair(ID("DOGEUSDT.BINANCE"), SYMBOL("DOGEUSDT"), CURRENCY("DOGE"), usdt, 8, 2, P("0.00000001"), Q("0.01"), 0, 0),
        m.OptionContract(
            ID("AAPL211217C00150000.OPRA"), SYMBOL("AAPL211217C00150000"), m.AssetClass.EQUITY, "AAPL", m.OptionKind.CALL, P("149.00"), usd,
            0, EXPIRY, 2, P("0.01"), Q("100"), Q("1"), 0, 0,
        ),
        m.FuturesContract(ID("ESZ5.XCME"), SYMBOL("ESZ5"), m.AssetClass.INDEX, "ES", 0, EXPIRY, usd, 2, P("0.25"), Q("50"), Q("1"), 0, 0),
        m.Equity(ID("ABC.XNAS"), SYMBOL("ABC"), usd, 2, P("0.01"), 0, 0),
    ]  # fmt: skip


WEI = m.CurrencyPair(
    ID("AAVEETH.UNI"), SYMBOL("AAVEETH"), CURRENCY("AAVE"), CURRENCY("ETH"), 16, 16, P(f"{1e-16:.16f}"), Q(f"{1e-16:.16f}"), 0, 0
)  # fmt: skip


def quotes(x, first_ms, n, step_ms=10, bid=100.0):
    tick = float(str(x.price_increment))
    prices = [(m.Price(bid + k % 3 * tick, x.price_precision), m.Price(bid + (3 + k % 3) * tick, x.price_precision)) for k in range(n)]
    sizes = m.Quantity(5.0, x.size_precision), m.Quantity(6.0, x.size_precision)
    return [m.QuoteTick(x.id, *p, *sizes, t, t) for k, p in enumerate(prices) for t in [(first_ms + k * step_ms) * MS]]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Eight instruments of five venues, quotes only, each in two files; one more whose increments no 64 bits hold."""
    root = tmp_path_factory.mktemp("foreign")
    catalog, made = ParquetDataCatalog(str(root)), instruments()
    catalog.write_instruments([*made, WEI])
    for x in [*made, WEI]:
        for part in range(2):
            catalog.write_quote_ticks(quotes(x, 1_000 * part + 5, 60))
    return root


def test_every_kind_of_instrument_is_read_as_nautilus_defines_it(foreign):
    ids = [str(x.id) for x in instruments()]
    found, blocks = read_catalog(foreign, ids)
    events = np.concatenate(list(blocks))
    assert np.bincount(events["instrument"]).tolist() == [240] * 8 and (events["flags"] & F_TOB).all()
    for i, x in zip(found, instruments()):
        assert (i.id, i.level, i.price_precision, i.size_precision) == (str(x.id), 1, x.price_precision, x.size_precision)
        assert i.tick == round(float(str(x.price_increment)) * SCALE) and i.lot == round(float(str(x.size_increment)) * SCALE)
        assert i.multiplier == float(str(x.multiplier)) and i.currency
        mine = events[events["instrument"] == ids.index(i.id)]
        assert (mine["price"] % i.tick == 0).all() and (mine["size"] > 0).all() and (np.diff(mine["ts_init"]) >= 0).all()
    kinds = {i.id: i.kind for i in found}
    assert kinds["XBTUSD.BITMEX"] == "inverse_crypto_perpetual" and kinds["ESZ5.XCME"] == "future"
    assert kinds["AAPL211217C00150000.OPRA"] == "option_contract" and kinds["BTCUSDT_330325.BINANCE"] == "crypto_future"
    assert {i.id for i in found if i.pauses == ((EXPIRY, EXPIRY),)} == {
        "BTCUSDT_330325.BINANCE", "AAPL211217C00150000.OPRA", "ESZ5.XCME"
    }, "labels end where it expires"  # fmt: skip


def test_an_instrument_that_no_64_bits_hold_is_refused_by_name_and_harms_no_other(foreign):
    with pytest.raises(InputError, match=r"AAVEETH\.UNI cannot be read .*more than 9 decimals"):
        read_catalog(foreign, ["AAVEETH.UNI"])
    assert "AAVEETH.UNI" not in read_instruments(foreign) and len(read_catalog(foreign, ["ABC"])[0]) == 1


def test_files_that_overlap_are_merged_in_order_of_time(foreign, tmp_path):
    root = tmp_path / "c"
    shutil.copytree(foreign, root)
    folder = root / "data/quotes/ABC.XNAS"
    source = sorted(folder.glob("*.parquet"))[0]
    late = pq.read_table(source).slice(20, 30)
    pq.write_table(late, folder / "other.parquet")
    (only,), blocks = read_catalog(root, ["ABC.XNAS"])
    events = np.concatenate(list(blocks))
    assert len(events) == 240 + 60 and (np.diff(events["ts_init"]) >= 0).all() and catalog_counts(root)[only.id]["quotes"] == 150


def test_trading_states_that_nautilus_recorded_are_read(foreign, tmp_path):
    root = tmp_path / "c"
    shutil.copytree(foreign, root)
    a = m.MarketStatusAction
    steps = [(a.PRE_OPEN, 10), (a.TRADING, 100), (a.SHORT_SELL_RESTRICTION_CHANGE, 150), (a.HALT, 200), (a.TRADING, 300)]
    catalog = ParquetDataCatalog(str(root))
    for part in (steps[:2], steps[2:]):
        catalog.write_instrument_statuses([m.InstrumentStatus(ID("ABC.XNAS"), what, t * MS, t * MS) for what, t in part])
    when, state = trading_state(root, "ABC.XNAS")
    assert state.tolist() == [status.AUCTION, status.OPEN, status.HALTED, status.OPEN] and (when // MS).tolist() == [10, 100, 200, 300]
    (abc,), _ = read_catalog(root, ["ABC.XNAS"])
    assert abc.pauses == ((10 * MS, 100 * MS), (200 * MS, 300 * MS))


@pytest.mark.parametrize("width", [8, 16])
def test_the_fixed_size_prices_of_earlier_versions_are_refused_with_the_way_to_convert_them(foreign, tmp_path, width):
    """Nautilus 1.x wrote 8 bytes in its standard-precision build and 16 in its high-precision one."""
    root = tmp_path / "c"
    shutil.copytree(foreign, root)
    (file, *_) = sorted((root / "data/quotes/ABC.XNAS").glob("*.parquet"))
    table = pq.read_table(file)
    at = table.schema.get_field_index("bid_price")
    pq.write_table(table.set_column(at, "bid_price", pa.array([b"\0" * width] * len(table), pa.binary(width))), file)
    with pytest.raises(InputError, match=rf"bid_price.* is fixed_size_binary\[{width}\].*migrate_from_legacy_parquet_path") as e:
        read_catalog(root, ["ABC.XNAS"])
    assert str(file) in str(e.value) and "\n" not in str(e.value)
    assert hasattr(ParquetDataCatalog, "migrate_from_legacy_parquet_path")


def test_decimals_of_another_scale_are_read_exactly(foreign, tmp_path):
    root = tmp_path / "c"
    shutil.copytree(foreign, root)
    before = np.concatenate(list(read_catalog(root, ["ABC.XNAS"])[1]))
    for file in (root / "data/quotes/ABC.XNAS").glob("*.parquet"):
        table = pq.read_table(file)
        for name in ("bid_price", "ask_size"):
            table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(pa.decimal128(20, 4)))
        pq.write_table(table, file)
    assert np.array_equal(before, np.concatenate(list(read_catalog(root, ["ABC.XNAS"])[1])))


def test_memory_does_not_grow_with_the_number_of_files(tmp_path):
    """The same quotes in 2 and in 200 files that follow each other: a file is open while its rows are read, and no longer."""
    made, held = instruments()[0], []
    for n in (2, 200):
        root = tmp_path / str(n)
        root.mkdir()
        catalog = ParquetDataCatalog(str(root))
        catalog.write_instruments([made])
        for part in range(n):
            catalog.write_quote_ticks(quotes(made, 10 * part * (4_000 // n), 4_000 // n))
        pa.default_memory_pool().release_unused()
        tracemalloc.start()
        before = pa.total_allocated_bytes()
        most, rows, files = 0, 0, 0
        for block in read_catalog(root)[1]:
            rows += len(block)
            files = max(files, sum(os.path.realpath(f"/proc/self/fd/{fd}").startswith(str(root)) for fd in os.listdir("/proc/self/fd")))
            most = max(most, tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - before)
        tracemalloc.stop()
        assert rows == 8_000 and files <= 1
        held.append(most)
    assert held[1] < 1.5 * held[0]
