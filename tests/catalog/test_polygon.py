"""Polygon's history: what the service holds is what the catalog holds, whatever happens on the way.

The service here is a real HTTP server that answers by the published schemas and fails on command.
"""

from __future__ import annotations

import base64
import datetime as dt
import gzip
import json
import os
import random
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlparse

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog import polygon, tape
from catalog.errors import InputError, exit_code
from catalog.events import CANCEL, F_TOB, TRADE, read_catalog
from catalog.polygon import Refused, Request, Rest, download, history, nanos, wants

KEY = "a-secret-key-of-32-characters-00"
NY = polygon.NEW_YORK


def ns(*when: int, zone: dt.tzinfo = NY) -> int:
    return int(dt.datetime(*when, tzinfo=zone).timestamp()) * 1_000_000_000  # type: ignore[misc,arg-type]


class Service:
    """Answers as the REST API does. `held`: path -> results. `faults`: (part of the URL, fault, argument), each used once, in order."""

    def __init__(self) -> None:
        self.held: dict[str, Any] = {}
        self.faults: list[tuple[str, str, Any]] = []
        self.asked: list[str] = []
        self.reached, self.release = threading.Event(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_: object) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.base = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self.release.set()
        self.http.shutdown()
        self.http.server_close()

    def rest(self, **kw: Any) -> Rest:
        self.waits: list[float] = []
        return Rest(KEY, base=self.base, sleep=self.waits.append, **kw)

    def answer(self, h: BaseHTTPRequestHandler) -> None:
        url = urlparse(h.path)
        query = dict(parse_qsl(url.query))
        self.asked.append(h.path)
        if h.headers["Authorization"] != f"Bearer {KEY}":
            self.send(h, 401, {"status": "ERROR", "request_id": "r", "error": f"Unknown API Key {h.headers['Authorization']}"})
            return
        for k, (part, fault, arg) in enumerate(self.faults):
            if part in h.path:
                del self.faults[k]
                if self.fail(h, fault, arg, unquote(url.path), query):
                    return
                break
        self.send(h, *self.result(unquote(url.path), query))

    def fail(self, h: BaseHTTPRequestHandler, fault: str, arg: Any, path: str, query: dict[str, str]) -> bool:
        whole = json.dumps(self.result(path, query)[1]).encode()
        if fault == "status":
            code, headers = arg if isinstance(arg, tuple) else (arg, {})
            names = {403: "NOT_AUTHORIZED", 404: "NOT_FOUND"}
            said = {403: "You are not entitled to this data. Please upgrade your plan", 404: "Ticker not found."}.get(code, "try again")
            self.send(h, code, {"status": names.get(code, "ERROR"), "request_id": "r", "message": said}, headers)
            return True
        elif fault == "drop":  # the connection breaks in mid-page
            h.send_response(200)
            h.send_header("Content-Length", str(len(whole)))
            h.end_headers()
            h.wfile.write(whole[: len(whole) // 2])
            h.wfile.flush()
            h.connection.shutdown(socket.SHUT_RDWR)
            h.close_connection = True
            return True
        elif fault == "cut":  # a proxy ends the page early and says that it is whole
            h.send_response(200)
            h.send_header("Content-Length", str(len(whole) // 2))
            h.end_headers()
            h.wfile.write(whole[: len(whole) // 2])
            return True
        elif fault == "garbage":
            h.send_response(200)
            h.send_header("Content-Length", "25")
            h.end_headers()
            h.wfile.write(b"<html>Bad gateway</html>\xff")
            return True
        elif fault == "hang":
            self.release.wait(120)
        return False

    def result(self, path: str, query: dict[str, str]) -> tuple[int, dict[str, Any]]:
        if "cursor" in query:
            query = json.loads(base64.urlsafe_b64decode(query["cursor"]))
        rows = self.held.get(path)
        if rows is None and path.startswith("/v2/aggs/"):
            stem, first, last = path.rsplit("/", 2)
            rows = [b for b in self.held.get(stem, []) if int(first) <= b["t"] <= int(last)]
        if rows is None:
            if path.startswith("/v3/reference/tickers/"):
                return 404, {"status": "NOT_FOUND", "request_id": "r", "message": "Ticker not found."}
            return 200, {"status": "OK", "request_id": "r", "results": []}
        if callable(rows):
            rows = rows(query)
        if isinstance(rows, dict):
            return 200, {"status": "OK", "request_id": "r", "results": rows}
        if "timestamp.gte" in query:
            stamp = "participant_timestamp" if "X:" in path else "sip_timestamp"
            rows = [r for r in rows if int(query["timestamp.gte"]) <= r.get(stamp, 0) < int(query["timestamp.lt"])]
            assert query["order"] == "asc"
        at, many = int(query.get("at", 0)), int(query.get("limit", 10))
        reply: dict[str, Any] = {"status": "OK", "request_id": "r", "results": rows[at : at + many]}
        if at + many < len(rows):
            cursor = base64.urlsafe_b64encode(json.dumps({**query, "at": at + many}).encode()).decode()
            reply["next_url"] = f"https://another.host.invalid{path}?cursor={cursor}&apiKey=leaked"
        return 200, reply

    def send(self, h: BaseHTTPRequestHandler, code: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        data = gzip.compress(json.dumps(body).encode(), 1)
        h.send_response(code)
        h.send_header("Content-Type", "application/json")
        h.send_header("Content-Encoding", "gzip")
        h.send_header("Content-Length", str(len(data)))
        for k, v in (headers or {}).items():
            h.send_header(k, v)
        h.end_headers()
        h.wfile.write(data)


@pytest.fixture
def service() -> Iterator[Service]:
    s = Service()
    yield s
    s.close()


def market(seed: int, symbol: str = "AAPL", days: tuple[tuple[int, int, int], ...] = ((2024, 1, 3),), n: int = 400) -> dict[str, Any]:
    """A day of quotes and trades with everything the tape has: odd lots, sub-penny prints, auctions, TRF prints, corrections, late rows."""
    r = random.Random(seed)
    quotes, trades = [], []
    mid = 18_420
    for day in days:
        at = ns(*day, 9, 30)
        for k in range(n):
            at += r.choice([0, 1, 1000, 250_000, 40_000_000])
            mid += r.choice([-1, 0, 0, 1])
            spread = r.choice([1, 1, 2, 3, 0, -1]) if k % 37 == 0 else r.choice([1, 1, 2, 3])
            bid = 0 if k % 101 == 50 else mid
            quotes.append(
                {"sip_timestamp": at, "participant_timestamp": at - r.randrange(1000), "sequence_number": 10 * k + 1, "tape": 3,
                 "bid_price": bid / 100, "bid_size": 0 if not bid else r.randrange(1, 9), "bid_exchange": 12,
                 "ask_price": (mid + spread) / 100, "ask_size": r.randrange(1, 9), "ask_exchange": 11, "conditions": [1]}
            )  # fmt: skip
            if r.random() < 0.6:
                at += r.choice([0, 1, 500])
                price = r.choice([mid, mid + spread, mid + spread / 2, mid + 0.01 * r.randrange(100)])
                codes = r.choice([[], [], [37], [14, 41], [14], [12, 37], [2], [53], [25], [8], [15], [10, 41]])
                dark = r.random() < 0.4
                trades.append(
                    {"sip_timestamp": at, "participant_timestamp": at - r.randrange(5000), "sequence_number": 10 * k + 2, "tape": 3,
                     "id": str(k), "price": round(price / 100, 4), "size": r.choice([1, 7, 100, 200, 12_000]),
                     "exchange": 4 if dark else r.choice([10, 11, 12])}
                    | ({"trf_id": 202, "trf_timestamp": at} if dark else {}) | ({"conditions": codes} if codes else {})
                    | ({"correction": r.choice([1, 8, 10, 12])} if k % 29 == 5 else {})
                )  # fmt: skip
    for rows in (quotes, trades):  # the service's order is that of the stamps but for a few late ones
        for k in range(5, len(rows) - 6, 61):
            rows[k], rows[k + 3] = rows[k + 3], rows[k]
    details = {"ticker": symbol, "name": symbol, "market": "stocks", "type": "CS", "primary_exchange": "XNAS", "currency_name": "usd"}
    return {
        f"/v3/reference/tickers/{symbol}": {**details, "round_lot": 100},
        f"/v3/quotes/{symbol}": quotes,
        f"/v3/trades/{symbol}": trades,
    }


DAY = (ns(2024, 1, 3), ns(2024, 1, 4) - 1)


def request(*symbols: str, span: tuple[int, int] = DAY, **kw: Any) -> Request:
    return Request(symbols or ("AAPL",), *span, **kw)


# --- slow and obvious twins ---


def true_quotes(held: dict[str, Any], symbol: str = "AAPL") -> list[tuple[Any, ...]]:
    rows = sorted(held[f"/v3/quotes/{symbol}"], key=lambda q: (q["sip_timestamp"], q["sequence_number"]))
    return [
        (Decimal(str(q["bid_price"])), Decimal(str(q["ask_price"])), q["bid_size"] * 100, q["ask_size"] * 100,
         q["participant_timestamp"], q["sip_timestamp"])
        for q in rows if q["bid_price"] and q["bid_size"]
    ]  # fmt: skip


def true_trades(held: dict[str, Any], symbol: str = "AAPL") -> list[tuple[Any, ...]]:
    out = []
    quotes = true_quotes(held, symbol)
    last, tick = None, 0
    for t in sorted(held[f"/v3/trades/{symbol}"], key=lambda t: (t["sip_timestamp"], t["sequence_number"])):
        codes = set(t.get("conditions", []))
        if codes & {2, 53, 15, 10} or t.get("correction") in (10, 11, 12):
            continue
        price = Decimal(str(t["price"]))
        if last is not None and price != last:
            tick = 1 if price > last else -1
        last = price
        before = [q for q in quotes if q[5] < t["sip_timestamp"]]
        side = 0
        if before and not codes & {8, 25}:
            bid, ask = before[-1][:2]
            middle = (bid + ask) / 2
            side = tick if bid >= ask or price == middle else (1 if price > middle else -1)
        out.append((price, t["size"], side, t["id"], t["participant_timestamp"], t["sip_timestamp"]))
    return out


def read_quotes(out: Path, name: str = "AAPL.POLYGON") -> list[tuple[Any, ...]]:
    from nautilus_trader.persistence import ParquetDataCatalog

    found = ParquetDataCatalog(str(out)).query_quote_ticks([name])
    assert all(q.instrument_id.value == name and q.bid_price.precision == 4 and q.bid_size.precision == 0 for q in found)
    prices = ((q.bid_price.as_decimal(), q.ask_price.as_decimal()) for q in found)
    return [(*p, int(q.bid_size.as_double()), int(q.ask_size.as_double()), q.ts_event, q.ts_init) for p, q in zip(prices, found)]


def read_trades(out: Path, name: str = "AAPL.POLYGON") -> list[tuple[Any, ...]]:
    from nautilus_trader.persistence import ParquetDataCatalog

    side = {"NO_AGGRESSOR": 0, "BUY": 1, "SELL": -1}
    return [
        (t.price.as_decimal(), int(t.size.as_double()), side[t.aggressor_side.name], str(t.trade_id), t.ts_event, t.ts_init)
        for t in ParquetDataCatalog(str(out)).query_trade_ticks([name])
    ]


# --- the whole way ---


@pytest.mark.parametrize("page", [17, 64, 50_000])
def test_the_catalog_holds_what_the_service_holds(service: Service, tmp_path: Path, page: int) -> None:
    service.held = market(1)
    report = history(request(), tmp_path / "cat", rest=service.rest(), page=page)
    assert read_quotes(tmp_path / "cat") == true_quotes(service.held)
    assert read_trades(tmp_path / "cat") == true_trades(service.held)
    assert report["counts"] == {"quotes": len(true_quotes(service.held)), "trades": len(true_trades(service.held))}
    assert {s for *_, s, _, _, _ in true_trades(service.held)} == {-1, 0, 1}
    assert report["moved"] == 0
    assert report["quality"]["out_of_order"] > 0


def test_quality_tells_what_was_left_out(service: Service, tmp_path: Path) -> None:
    service.held = held = market(2)
    quality = history(request(), tmp_path / "cat", rest=service.rest())["quality"]
    quotes, trades = held["/v3/quotes/AAPL"], held["/v3/trades/AAPL"]
    fixes = [t for t in trades if t.get("correction") in (10, 11, 12)]
    void = [t for t in trades if {2, 53, 15, 10} & set(t.get("conditions", [])) and t not in fixes]
    assert quality["quotes_read"] == len(quotes) and quality["trades_read"] == len(trades)
    assert quality["one_sided_quotes"] == sum(not q["bid_price"] for q in quotes)
    assert quality["crossed_quotes"] == sum(q["bid_price"] > q["ask_price"] for q in quotes if q["bid_price"])
    assert quality["locked_quotes"] == sum(q["bid_price"] == q["ask_price"] for q in quotes)
    assert quality["corrections"] == len(fixes)
    assert quality["not_trades"] == len(void)
    assert quality["condition 2: average price"] == sum(2 in t.get("conditions", []) for t in trades)
    kept = [t for t in trades if t not in fixes and t not in void]
    assert quality["aggressor_none"] + quality["aggressor_buy"] + quality["aggressor_sell"] == len(kept)


def test_the_reader_of_every_room_sees_best_bids_and_offers(service: Service, tmp_path: Path) -> None:
    service.held = market(3)
    history(request(fees=(("*", "taker_fee", 0.001), ("AAPL", "fee_per_unit", 0.003))), tmp_path / "cat", rest=service.rest())
    (aapl,), blocks = read_catalog(tmp_path / "cat")
    e = np.concatenate(list(blocks))
    assert (aapl.id, aapl.kind, aapl.tick, aapl.price_precision, aapl.session) == (
        "AAPL.POLYGON", "equity", 10_000_000, 4, "09:30-16:00 America/New_York"
    )  # fmt: skip
    assert (aapl.taker_fee, aapl.fee_per_unit, aapl.currency, aapl.lot) == (0.001, 0.003, "USD", 1_000_000_000)
    traded = e["action"] == TRADE
    assert traded.sum() == len(true_trades(service.held))
    assert (e["flags"][~traded] & F_TOB).all() and not (e["action"] == CANCEL).any()
    assert (~traded).sum() == 2 * len(true_quotes(service.held))
    assert (np.diff(e["ts_init"]) >= 0).all()
    same = np.diff(e["ts_init"]) == 0
    assert not (traded[1:] & ~traded[:-1] & same).any()  # trades before quotes at one stamp


def test_a_range_cuts_by_the_time_the_record_was_known(service: Service, tmp_path: Path) -> None:
    service.held = market(4)
    stamps = sorted(q["sip_timestamp"] for q in service.held["/v3/quotes/AAPL"])
    span = stamps[100], stamps[250]
    history(request(span=span), tmp_path / "cat", rest=service.rest())
    assert read_quotes(tmp_path / "cat") == [q for q in true_quotes(service.held) if span[0] <= q[5] <= span[1]]
    assert read_trades(tmp_path / "cat") == [t for t in true_trades(service.held) if span[0] <= t[5] <= span[1]]


def test_days_are_new_yorks_without_weekends_and_symbols_with_dots_work(service: Service, tmp_path: Path) -> None:
    service.held = market(5, "BRK.B", ((2024, 1, 5), (2024, 1, 8))) | market(6, "AAPL", ((2024, 1, 5), (2024, 1, 8)))
    span = ns(2024, 1, 5), ns(2024, 1, 9) - 1
    report = history(request("BRK.B", "AAPL", span=span), tmp_path / "cat", rest=service.rest(), page=100)
    assert sorted(report["instruments"]) == ["AAPL.POLYGON", "BRK.B.POLYGON"]
    assert read_trades(tmp_path / "cat", "BRK.B.POLYGON") == true_trades(service.held, "BRK.B")
    days = {dict(parse_qsl(urlparse(u).query)).get("timestamp.gte") for u in service.asked} - {None}
    assert days == {str(ns(2024, 1, 5)), str(ns(2024, 1, 8))}


def test_quote_sizes_are_lots_before_the_rule_of_november_2025_and_shares_after(service: Service, tmp_path: Path) -> None:
    service.held = market(7, days=((2025, 10, 31), (2025, 11, 3)))
    history(request(span=(ns(2025, 10, 31), ns(2025, 11, 4))), tmp_path / "cat", rest=service.rest())
    new = ns(2025, 11, 3)
    found = read_quotes(tmp_path / "cat")
    assert {q[2] % 100 for q in found if q[5] < new} == {0}
    assert max(q[2] for q in found if q[5] >= new) < 10
    assert any(q[5] < new for q in found) and any(q[5] >= new for q in found)


@pytest.mark.parametrize(("grid", "tick"), [(1, 10_000_000), (0.5, 5_000_000), (0.01, 100_000)])
def test_the_tick_is_the_grid_of_the_quotes(service: Service, tmp_path: Path, grid: float, tick: int) -> None:
    service.held = market(8)
    for k, q in enumerate(service.held["/v3/quotes/AAPL"]):
        q["ask_price"] = round(q["ask_price"] + (k % 2) * grid / 100, 6)
    history(request(), tmp_path / "cat", rest=service.rest())
    (aapl,), _ = read_catalog(tmp_path / "cat")
    assert aapl.tick == tick
    history(request(ticks=(("AAPL", "0.05"),)), tmp_path / "known", rest=service.rest())
    (aapl,), _ = read_catalog(tmp_path / "known")
    assert aapl.tick == 50_000_000


def test_crypto_tells_the_aggressor_itself_and_keeps_its_own_precision(service: Service, tmp_path: Path) -> None:
    at = ns(2024, 1, 6, 12, zone=dt.UTC)  # a Saturday
    rows = [
        {"exchange": 1, "id": f"i{k}", "participant_timestamp": at + k, "price": 43_000.5 + k / 8, "size": 0.00012345 * (k + 1),
         **({"conditions": [c]} if c else {})}
        for k, c in enumerate([1, 2, 2, 0, 1])
    ]  # fmt: skip
    bars = [{"t": at // 10**6 + 60_000 * k, "o": 1.5, "h": 2.25, "l": 1.25, "c": 2, "v": 3.125, "n": 4, "vw": 1.7} for k in range(3)]
    details = {"ticker": "X:BTCUSD", "market": "crypto", "currency_name": "usd", "name": "Bitcoin"}
    service.held = {"/v3/reference/tickers/X:BTCUSD": details, "/v3/trades/X:BTC-USD": rows}
    span = at, at + 120 * 10**9
    service.held["/v2/aggs/ticker/X:BTCUSD/range/1/minute"] = bars
    wanted = request("X:BTC-USD", span=span, kinds=("trades", "1-minute"))
    report = history(wanted, tmp_path / "cat", rest=service.rest())
    (btc,), blocks = read_catalog(tmp_path / "cat")
    e = np.concatenate(list(blocks))
    assert btc.id == "BTCUSD.POLYGON" and btc.kind == "currency_pair" and btc.session is None
    assert e["side"].tolist() == [-1, 1, 1, 0, -1]
    assert e["size"].tolist() == [123_450 * (k + 1) for k in range(5)]
    assert e["price"].tolist() == [43_000_500_000_000 + 125_000_000 * k for k in range(5)]
    assert report["counts"] == {"trades": 5, "bars_1-minute": 2}  # the third is known after the range

    from nautilus_trader.persistence import ParquetDataCatalog

    found = ParquetDataCatalog(str(tmp_path / "cat")).query_bars(["BTCUSD.POLYGON-1-MINUTE-LAST-EXTERNAL"])
    assert [(b.ts_event, b.ts_init, str(b.close.as_decimal()).rstrip("0")) for b in found] == [
        (at + 60 * 10**9 * k, at + 60 * 10**9 * k, "2.") for k in (1, 2)
    ]


def test_the_files_are_those_that_nautilus_would_write(service: Service, tmp_path: Path) -> None:
    from nautilus_trader.persistence import ParquetDataCatalog

    service.held = market(9)
    history(request(), tmp_path / "cat", rest=service.rest())
    cat = ParquetDataCatalog(str(tmp_path / "cat"))
    (tmp_path / "theirs").mkdir()
    theirs = ParquetDataCatalog(str(tmp_path / "theirs"))
    theirs.write_quote_ticks(cat.query_quote_ticks(["AAPL.POLYGON"]))
    theirs.write_trade_ticks(cat.query_trade_ticks(["AAPL.POLYGON"]))
    for kind in ("quotes", "trades"):
        mine, other = (next((tmp_path / of / "data" / kind / "AAPL.POLYGON").iterdir()) for of in ("cat", "theirs"))
        assert mine.name == other.name
        assert pq.read_schema(mine).equals(pq.read_schema(other), check_metadata=True)
        assert pq.read_table(mine).to_pylist() == pq.read_table(other).to_pylist()


def test_level_1_history_runs_through_the_engine(service: Service, tmp_path: Path) -> None:
    """A market order is filled at the offer, inside-the-cent prints and a tick of a cent notwithstanding."""
    from nautilus_trader.backtest import BacktestDataConfig, BacktestEngineConfig, BacktestNode, BacktestRunConfig, BacktestVenueConfig
    from nautilus_trader.common import LoggerConfig, LogLevel
    from nautilus_trader.execution import FixedFeeModel
    from nautilus_trader.model import BookType, InstrumentId, Money, NautilusDataType, OrderSide, Quantity
    from nautilus_trader.trading import Strategy

    service.held = market(9)
    history(request(), tmp_path / "cat", rest=service.rest())
    aapl = InstrumentId.from_str("AAPL.POLYGON")
    seen = Counter[str]()
    fills: list[tuple[Decimal, Decimal]] = []

    class Buyer(Strategy):
        def on_start(self) -> None:
            self.subscribe_quotes(aapl)
            self.subscribe_trades(aapl)

        def on_quote(self, quote: Any) -> None:
            seen["quotes"] += 1
            self.ask = quote.ask_price.as_decimal()
            if seen["quotes"] == 7:
                self.submit_order(self.order_factory.market(aapl, OrderSide.BUY, Quantity.from_int(100)))

        def on_trade(self, trade: Any) -> None:
            seen["trades"] += 1

        def on_order_filled(self, event: Any) -> None:
            fills.append((event.last_px.as_decimal(), self.ask))

    root = str((tmp_path / "cat").resolve())
    run = BacktestRunConfig(
        venues=[
            BacktestVenueConfig(
                name="POLYGON", oms_type="NETTING", account_type="MARGIN", starting_balances=["1000000 USD"], book_type=BookType.L1_MBP,
                fee_model=FixedFeeModel(Money.from_str("1 USD")),
            )
        ],
        data=[BacktestDataConfig(k, root, instrument_ids=[aapl]) for k in (NautilusDataType.TradeTick, NautilusDataType.QuoteTick)],
        engine=BacktestEngineConfig(logging=LoggerConfig(stdout_level=LogLevel.ERROR)), raise_exception=True,
    )  # fmt: skip
    node = BacktestNode([run])
    node.build()
    node.add_strategy(run.id, Buyer())
    node.run()
    assert seen == {"quotes": len(true_quotes(service.held)), "trades": len(true_trades(service.held))}
    assert len(fills) == 1 and fills[0][0] == fills[0][1]


# --- the service fails ---


@pytest.mark.parametrize(
    ("fault", "arg"),
    [("status", 429), ("status", 500), ("status", 502), ("status", 503), ("drop", None), ("cut", None), ("garbage", None)],
)
def test_passing_faults_change_nothing(service: Service, tmp_path: Path, fault: str, arg: Any) -> None:
    service.held = market(1)
    service.faults = [("/v3/reference", fault, arg), ("/v3/quotes", fault, arg), ("cursor", fault, arg), ("cursor", fault, arg)]
    history(request(), tmp_path / "cat", rest=service.rest(), page=50)
    assert not service.faults
    assert service.waits[:2] == [0.5, 0.5]
    assert read_quotes(tmp_path / "cat") == true_quotes(service.held)
    assert read_trades(tmp_path / "cat") == true_trades(service.held)


def test_a_rate_limit_is_waited_for_as_the_service_says(service: Service, tmp_path: Path) -> None:
    service.held = market(1)
    service.faults = [("/v3/quotes", "status", (429, {"Retry-After": "12"})), ("/v3/quotes", "status", 429), ("/v3/quotes", "status", 429)]
    download(service.rest(), wants(("AAPL",), *DAY, ("quotes",)), tmp_path)
    assert service.waits == [12.0, 1.0, 2.0]


def test_a_service_that_hangs_is_left_and_asked_again(service: Service, tmp_path: Path) -> None:
    service.held = market(1)
    service.faults = [("/v3/trades", "hang", None)]
    files = download(service.rest(timeout_s=0.3), wants(("AAPL",), *DAY, ("trades",)), tmp_path)
    assert service.waits == [0.5]
    assert sum(pq.read_metadata(f).num_rows for f in files) == len(service.held["/v3/trades/AAPL"])


def test_a_service_that_stays_away_is_one_line_and_the_parts_are_kept(service: Service, tmp_path: Path, capsys: Any) -> None:
    service.held = market(1)
    service.faults = [("cursor", "status", 503)] * 99
    todo = wants(("AAPL",), *DAY, ("quotes",))
    assert exit_code(lambda: download(service.rest(), todo, tmp_path, page=100)) == 2
    said = capsys.readouterr().err
    assert "run the same command again, finished parts are kept" in said and "Traceback" not in said
    assert len(service.waits) == 9
    service.faults, service.asked = [], []
    download(service.rest(), todo, tmp_path, page=100)
    assert service.asked and all("cursor" in u for u in service.asked)  # the first page was kept


@pytest.mark.parametrize(
    ("fault", "part", "words"),
    [
        (403, "/v3/quotes", "this Polygon plan does not include /v3/quotes/AAPL (You are not entitled"),
        (404, "/v3/reference", "Polygon does not know the symbol AAPL"),
        (400, "/v3/trades", "Polygon refused /v3/trades/AAPL (try again)"),
        (301, "/v3/trades", "Polygon refused /v3/trades/AAPL"),
    ],
)
def test_refusals_are_one_line_and_not_repeated(service: Service, tmp_path: Path, fault: int, part: str, words: str) -> None:
    service.held = market(1)
    service.faults = [(part, "status", fault)]
    with pytest.raises(Refused) as e:
        history(request(), tmp_path / "cat", rest=service.rest())
    assert words in str(e.value) and "\n" not in str(e.value)
    assert service.waits == [] and not (tmp_path / "cat").exists()


def test_a_refused_key_is_said_and_never_shown(service: Service, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = "wrong-key-0123456789"
    assert exit_code(lambda: history(request(), tmp_path / "cat", rest=Rest(wrong, base=service.base))) == 2
    said = capsys.readouterr()
    assert "Polygon refused the key in POLYGON_API_KEY" in said.err
    assert wrong not in said.out + said.err and KEY not in said.out + said.err
    monkeypatch.delenv("POLYGON_API_KEY", raising=False)
    with pytest.raises(InputError, match="no Polygon key: set the environment variable POLYGON_API_KEY"):
        Rest()


def test_the_key_stays_with_the_host_that_was_named(service: Service, tmp_path: Path) -> None:
    """The next pages' addresses name another host and carry a key: neither is followed nor kept."""
    service.held = market(1)
    files = download(service.rest(), wants(("AAPL",), *DAY), tmp_path, page=50)
    assert sum("cursor" in u for u in service.asked) > 8
    assert not any("apiKey" in u for u in service.asked)
    for f in files:
        assert b"leaked" not in f.read_bytes() and b"another.host" not in f.read_bytes() and KEY.encode() not in f.read_bytes()


def test_an_unreachable_service_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{s.getsockname()[1]}"
    waits: list[float] = []
    with pytest.raises(InputError, match="Polygon gave no usable answer for /v3/reference/tickers/AAPL"):
        history(request(), tmp_path / "cat", rest=Rest(KEY, base=base, sleep=waits.append))
    assert waits == [0.5, 1.0, 2.0]


# --- killed and resumed ---


def test_a_killed_download_goes_on_where_it_stopped(service: Service, tmp_path: Path) -> None:
    service.held = market(1)
    rows = service.held["/v3/quotes/AAPL"]
    gate = {"at": 200}

    def held(query: dict[str, str]) -> list[dict[str, Any]]:
        if int(query.get("at", 0)) == gate["at"]:
            service.reached.set()
            service.release.wait(120)
        return rows

    service.held["/v3/quotes/AAPL"] = held
    code = (
        "import sys; from pathlib import Path; from catalog.polygon import Rest, download, wants\n"
        f"download(Rest(base=sys.argv[1]), wants(('AAPL',), {DAY[0]}, {DAY[1]}, ('quotes',)), Path(sys.argv[2]), page=50)"
    )
    env = {**os.environ, "POLYGON_API_KEY": KEY}
    call = [sys.executable, "-c", code, service.base, str(tmp_path / "parts")]
    child = subprocess.Popen(call, env=env, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
    try:
        assert service.reached.wait(60)
    finally:
        child.kill()
        child.wait()
    done = sorted(p.name for p in (tmp_path / "parts").rglob("*.parquet"))
    assert len(done) == 4
    gate["at"] = -1
    service.release.set()
    service.asked = []
    todo = wants(("AAPL",), *DAY, ("quotes",))
    files = download(service.rest(), todo, tmp_path / "parts", page=50)
    assert [f.name for f in files[:4]] == done
    assert len(service.asked) == len(files) - 4 == -(-len(rows) // 50) - 4
    service.asked = []
    assert download(service.rest(), todo, tmp_path / "parts", page=50) == files
    assert service.asked == []  # all there: the service is not asked at all
    service.held["/v3/quotes/AAPL"] = rows
    history(request(), tmp_path / "cat", rest=service.rest(), parts=tmp_path / "parts", page=50)
    assert read_quotes(tmp_path / "cat") == true_quotes(service.held)


@pytest.mark.parametrize("damage", ["byte", "truncate", "delete", "rubbish"])
def test_a_damaged_part_is_fetched_again_with_all_after_it(service: Service, tmp_path: Path, damage: str) -> None:
    service.held = market(1)
    todo = wants(("AAPL",), *DAY, ("quotes",))
    files = download(service.rest(), todo, tmp_path, page=50)
    data = files[3].read_bytes()
    if damage == "delete":
        files[3].unlink()
    else:
        files[3].write_bytes({"byte": data[:99] + bytes([data[99] ^ 1]) + data[100:], "truncate": data[:50], "rubbish": b""}[damage])
    service.asked = []
    assert download(service.rest(), todo, tmp_path, page=50) == files
    assert len(service.asked) == len(files) - 3
    assert files[3].read_bytes() == data


def test_the_last_page_of_a_day_that_was_not_over_is_fetched_again(service: Service, tmp_path: Path) -> None:
    service.held = market(1)
    whole = service.held["/v3/quotes/AAPL"]
    service.held["/v3/quotes/AAPL"] = whole[:120]
    todo = wants(("AAPL",), *DAY, ("quotes",))
    download(service.rest(), todo, tmp_path, page=50, now=lambda: whole[119]["sip_timestamp"])
    service.held["/v3/quotes/AAPL"], service.asked = whole, []
    files = download(service.rest(), todo, tmp_path, page=50, now=lambda: DAY[1] + 1)
    assert sum(pq.read_metadata(f).num_rows for f in files) == len(whole)
    assert len(service.asked) == len(files) - 2
    service.asked = []
    download(service.rest(), todo, tmp_path, page=50)
    assert service.asked == []


def test_an_import_leaves_nothing_half_written(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service.held = market(1)
    real = tape._Ticks.write
    calls = Counter[str]()

    def full(self: Any, *args: Any) -> None:
        calls["n"] += 1
        if calls["n"] == 3:
            raise OSError(28, "No space left on device", "x")
        real(self, *args)

    monkeypatch.setattr(tape._Ticks, "write", full)
    assert exit_code(lambda: history(request(), tmp_path / "cat", rest=service.rest(), page=50)) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["cat.parts"]
    monkeypatch.undo()
    service.asked = []
    history(request(), tmp_path / "cat", rest=service.rest(), page=50)
    assert service.asked == []
    assert read_trades(tmp_path / "cat") == true_trades(service.held)


def test_a_finished_catalog_is_used_and_another_folder_is_not_touched(service: Service, tmp_path: Path) -> None:
    service.held = market(1)
    first = history(request(), tmp_path / "cat", rest=service.rest())
    service.asked = []
    assert history(request(), tmp_path / "cat", rest=service.rest()) == first
    assert service.asked == []
    with pytest.raises(InputError, match="holds something else than this request"):
        history(request(span=(DAY[0], DAY[1] - 1)), tmp_path / "cat", rest=service.rest())
    assert json.loads((tmp_path / "cat/cift.json").read_text()) == first
    parts = tmp_path / "cat.parts"
    assert sorted(first["sources"]) == sorted(str(f.relative_to(parts)) for f in parts.rglob("*.parquet"))
    assert all(sha in name and len(sha) == 64 for name, sha in first["sources"].items())


def test_each_request_has_a_place_of_its_own_and_all_share_the_parts() -> None:
    one, two = (polygon.store(request(span=(DAY[0], DAY[1] - k))) for k in (0, 1))
    assert one[0] != two[0] and one[1] == two[1] and one == polygon.store(request())
    assert one[0].parent == Path(polygon.__file__).parent / "data"


# --- what the user may get wrong ---


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: wants(("AAPL",), 10, 5), "empty range: --start 1970"),
        (lambda: wants(("AAPL",), ns(2024, 1, 6, 12), ns(2024, 1, 7, 12)), "no trading day"),
        (lambda: wants(("../etc",), *DAY), "'../etc' is no Polygon symbol"),
        (lambda: wants(("AAPL",), *DAY, ("quotes", "1-week")), "'1-week' is no kind"),
        (lambda: wants(("X:BTC-USD",), *DAY, ("quotes",)), "no history of crypto quotes"),
        (lambda: request(fees=(("*", "fee", 1.0),)), "'fee' is no fee"),
        (lambda: request(ticks=(("AAPL", "penny"),)), "tick of AAPL is 'penny'"),
    ],
)
def test_wrong_requests_are_named(make: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError) as e:
        make()
    assert words in str(e.value)


def test_a_range_without_records_is_an_error_and_makes_no_catalog(service: Service, tmp_path: Path) -> None:
    service.held = market(1)
    with pytest.raises(InputError, match="Polygon has no quotes or trades of AAPL between 2024-01-05T05:00:00Z"):
        history(request(span=(ns(2024, 1, 5), ns(2024, 1, 6) - 1)), tmp_path / "cat", rest=service.rest())
    assert not (tmp_path / "cat").exists()


def test_an_unknown_symbol_is_named(service: Service, tmp_path: Path) -> None:
    service.held = market(1)
    with pytest.raises(Refused, match="Polygon does not know the symbol APPL"):
        history(request("APPL"), tmp_path / "cat", rest=service.rest())


def test_rows_that_miss_what_they_need_are_counted(service: Service, tmp_path: Path) -> None:
    service.held = market(1)
    at = DAY[0] + 10**13
    service.held["/v3/trades/AAPL"] += [
        {"sip_timestamp": at, "size": 5, "id": "a"},
        {"sip_timestamp": at, "price": 5.0, "id": "b"},
        {"sip_timestamp": at, "price": 184.123456, "size": 0.25, "id": "c"},
        {"sip_timestamp": at, "price": 184.12345, "size": 3.5, "id": "d"},
    ]  # fmt: skip
    report = history(request(), tmp_path / "cat", rest=service.rest())
    assert report["quality"]["bad_trades"] == 2
    assert report["quality"]["fractional_sizes"] == 2
    assert report["quality"]["rounded_prices"] == 1  # what was dropped needs no rounding
    found = {t[3]: t for t in read_trades(tmp_path / "cat")}
    assert "c" not in found and found["d"][:2] == (Decimal("184.1234"), 3)  # half to even; whole shares


# --- properties ---


@given(st.decimals(0, 9_000_000_000, places=9))
def test_prices_are_exact(price: Decimal) -> None:
    """Whatever decimal of 9 places a double can tell from its neighbours comes out as itself."""
    x = float(price)
    want = int(Decimal(repr(x)).quantize(Decimal("1e-9")).scaleb(9))
    assert nanos([x])[0] == want
    if price <= 1_000_000:
        assert nanos([x])[0] == int(price.scaleb(9))


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 9)), max_size=60), st.integers(1, 12), st.integers(0, 2**32))
def test_order_comes_out_whole_and_never_backwards(rows: list[tuple[int, int]], page: int, seed: int) -> None:
    a = np.zeros(len(rows), tape.QUOTE)
    a["ts_init"], a["sequence"] = zip(*rows) if rows else ((), ())
    a["bid"] = np.arange(len(a))
    a = a[np.argsort(a["ts_init"] + np.random.default_rng(seed).integers(0, 5, len(a)), kind="stable")]
    counts = Counter[str]()
    got = list(tape._ordered((a[k : k + page].copy() for k in range(0, len(a), page)), counts, "quotes"))
    out = np.concatenate(got) if got else a[:0]
    assert sorted(out["bid"].tolist()) == list(range(len(a)))
    assert (np.diff(out["ts_init"]) >= 0).all()
    if not counts["moved"]:
        assert out["ts_init"].tolist() == sorted(a["ts_init"].tolist())


def test_no_side_knows_the_future(tmp_path: Path) -> None:
    """Quotes and trades after a trade do not change its side."""
    held = market(11)
    cut = true_trades(held)[120][5]
    sides = []
    for name, until in (("whole", 2**62), ("cut", cut)):
        (tmp_path / name).mkdir()
        known = {k: [r for r in held[f"/v3/{k}/AAPL"] if r["sip_timestamp"] <= until] for k in ("quotes", "trades")}
        q, t = (polygon._write_part(tmp_path / name, n, polygon._table(k, rows), {}) for n, (k, rows) in enumerate(known.items()))
        got = np.concatenate(list(tape.trades([t], Counter(), tape.quotes([q], Counter()))))
        sides.append(got["side"][got["ts_init"] <= cut])
    assert sides[0].tolist() == sides[1].tolist()
    assert len(sides[1]) > 100 and {-1, 1} <= set(sides[1].tolist())
