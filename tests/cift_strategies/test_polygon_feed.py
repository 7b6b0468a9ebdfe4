"""The Polygon feed in a real node: what the service sends is what an actor gets, of every cluster.

The service is a real WebSocket server that answers by the published schemas; the client is the one that trades.
"""

from __future__ import annotations

import json
import os
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import pytest
import trustme
from nautilus_trader.model import BarType, BookType, InstrumentId
from polygon_node import AAPL, BTC, MSFT, T0, Watcher, aside, live, quote, trade, until
from polygon_server import KEY, Server
from translator import Translator

from catalog.book import depth
from catalog.errors import InputError
from catalog.polygon import Rest
from cift_strategies.feeds import polygon

ID = InstrumentId.from_str(AAPL.id)
COIN = InstrumentId.from_str(BTC.id)


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


def test_quotes_and_trades_come_as_sent_and_in_order(server: Server) -> None:
    sent = [m for n in range(1, 501) for m in (quote(n), trade(n, p=100.0 + n % 50 / 100))]

    def start(w: Watcher) -> None:
        w.subscribe_quotes(ID)
        w.subscribe_trades(ID)

    async def body(w: Watcher, link: polygon.Link) -> None:
        await aside(server.until_subscribed, "stocks", "Q.AAPL", "T.AAPL")
        for i in range(0, len(sent), 50):
            await aside(server.send, "stocks", sent[i : i + 50])
        await until(w, lambda: len(w.of("TradeTick")) == 500)

    got, link = live(server, ["AAPL"], [AAPL], start, body)
    assert [type(x).__name__ for x in got] == ["QuoteTick", "TradeTick"] * 500
    for m, x in zip(sent, got):
        assert x.ts_event == m["t"] * 1_000_000
        if m["ev"] == "Q":
            assert (float(x.bid_price), float(x.ask_price)) == (m["bp"], round(m["ap"], 4))
            assert (int(x.bid_size), int(x.ask_size)) == (m["bs"], m["as"])
        else:
            assert (float(x.price), int(x.size), str(x.trade_id)) == (m["p"], m["s"], m["i"])
    stamps = [x.ts_init for x in got]
    assert all(a < b for a, b in pairwise(stamps))
    pulse = link.statistics()["health"]["instruments"][AAPL.id]
    assert (pulse["records"], pulse["gaps"], pulse["late"], pulse["duplicates"]) == (1000, 0, 0, 0)


def test_the_books_of_a_pair_are_the_exchanges_books(server: Server) -> None:
    """Each message is a whole book; the changes that the node gets make the same book, level by level."""
    rng = np.random.default_rng(5)
    books = []
    for _ in range(60):
        mid = 60_000 + int(rng.integers(-20, 20))
        bids = {mid - 1 - int(k): int(s) for k, s in zip(rng.choice(40, 12, replace=False), rng.integers(1, 900, 12))}
        asks = {mid + 1 + int(k): int(s) for k, s in zip(rng.choice(40, 12, replace=False), rng.integers(1, 900, 12))}
        books.append((sorted(bids.items(), reverse=True), sorted(asks.items())))
    sent = [
        {"ev": "XL2", "pair": "BTC-USD", "t": T0 + n, "r": T0 + n + 9, "x": x,
         "b": [[p / 100, s / 1e8] for p, s in (books[n] if x == 1 else books[0])[0]],
         "a": [[p / 100, s / 1e8] for p, s in (books[n] if x == 1 else books[0])[1]]}
        for n in range(60) for x in (1, 23)
    ]  # fmt: skip
    aggressors = [
        {"ev": "XT", "pair": "BTC-USD", "p": 600.01, "t": T0 + n, "s": 0.01616617, "c": [c], "i": 14272084 + n, "x": 1, "r": T0 + n + 5}
        for n, c in enumerate((1, 2, 0))
    ]

    def start(w: Watcher) -> None:
        w.subscribe_book_deltas(COIN, BookType.L2_MBP)
        w.subscribe_trades(COIN)
        w.subscribe_quotes(COIN)

    async def body(w: Watcher, link: polygon.Link) -> None:
        await aside(server.until_subscribed, "crypto", "XL2.BTC-USD", "XT.BTC-USD", "XQ.BTC-USD")
        for m in sent:
            await aside(server.send, "crypto", [m])
        await aside(server.send, "crypto", aggressors)
        best = {"bp": 599.99, "bs": 0.48, "ap": 600.01, "as": 0.601}
        await aside(server.send, "crypto", [{"ev": "XQ", "pair": "BTC-USD", **best, "t": T0, "x": 1, "r": T0 + 1}])
        await until(w, lambda: w.of("QuoteTick"))

    got, link = live(server, ["X:BTC-USD"], [BTC], start, body)
    messages = [x for x in got if type(x).__name__ == "OrderBookDeltas"]
    assert len(messages) == 60 and link.statistics()["kinds"]["other exchanges"] == 60
    translator = Translator([BTC])
    events = [translator.deltas(m).copy() for m in messages]
    assert all(len(np.unique(e["ts_init"])) == 1 for e in events)
    after = np.cumsum([len(e) for e in events]) - 1
    found = depth(np.concatenate(events), levels=12)[after]
    for n, (bids, asks) in enumerate(books):
        for name, side in (("bid", bids), ("ask", asks)):
            assert found[f"{name}_px"][n].tolist() == [p * 10_000_000 for p, _ in side]
            assert found[f"{name}_sz"][n].tolist() == [s * 10 for _, s in side]
    trades = [x for x in got if type(x).__name__ == "TradeTick"]
    assert [x.aggressor_side.name for x in trades] == ["SELL", "BUY", "NO_AGGRESSOR"]
    assert [str(x.size) for x in trades] == ["0.01616617"] * 3
    [top] = [x for x in got if type(x).__name__ == "QuoteTick"]
    assert (float(top.bid_price), float(top.ask_size)) == (599.99, 0.601)


def test_options_indices_and_bars_have_a_connection_a_cluster(server: Server) -> None:
    contract, index = InstrumentId.from_str("O:SPY261218C00650000.POLYGON"), InstrumentId.from_str("I:SPX.POLYGON")
    minute = BarType.from_str("AAPL.POLYGON-1-MINUTE-LAST-EXTERNAL")
    second = BarType.from_str("AAPL.POLYGON-1-SECOND-LAST-EXTERNAL")

    def start(w: Watcher) -> None:
        w.subscribe_quotes(contract)
        w.subscribe_index_prices(index)
        w.subscribe_bars(minute)
        w.subscribe_bars(second)

    bar = {"sym": "AAPL", "v": 4110, "av": 9470157, "op": 0.43, "vw": 0.44, "o": 1.5, "c": 1.25, "h": 1.75, "l": 1.0, "a": 1.2, "z": 685}

    async def body(w: Watcher, link: polygon.Link) -> None:
        await aside(server.until_subscribed, "stocks", "AM.AAPL", "A.AAPL")
        await aside(server.until_subscribed, "options", "Q.O:SPY261218C00650000")
        await aside(server.until_subscribed, "indices", "V.I:SPX")
        await aside(server.send, "options", [quote(1, "O:SPY261218C00650000", bp=2.05, ap=2.1)])
        await aside(server.send, "indices", [{"ev": "V", "val": 3988.5, "T": "I:SPX", "t": T0}])
        await aside(server.send, "stocks", [{"ev": "AM", **bar, "s": T0, "e": T0 + 60_000}, {"ev": "A", **bar, "s": T0, "e": T0 + 1_000}])
        await aside(server.send, "stocks", [{"ev": "AM", **bar, "c": 9.0, "s": T0, "e": T0 + 60_000}])  # a revision
        await aside(server.send, "stocks", [{"ev": "AM", **bar, "s": T0 + 60_000, "e": T0 + 120_000}])
        await until(w, lambda: len(w.of("Bar")) == 3 and w.of("IndexPriceUpdate") and w.of("QuoteTick"))

    got, _ = live(server, ["O:SPY261218C00650000", "I:SPX", "AAPL"], [AAPL], start, body)
    assert server.connections == 3
    of = {type(x).__name__: x for x in reversed(got)}
    assert float(of["IndexPriceUpdate"].value) == 3988.5
    assert (of["QuoteTick"].instrument_id, float(of["QuoteTick"].bid_price)) == (contract, 2.05)
    bars = [x for x in got if type(x).__name__ == "Bar"]
    assert [(str(b.bar_type), b.ts_event, float(b.close)) for b in bars] == [
        (str(minute), (T0 + 60_000) * 1_000_000, 1.25), (str(second), (T0 + 1_000) * 1_000_000, 1.25),
        (str(minute), (T0 + 120_000) * 1_000_000, 1.25),
    ]  # fmt: skip
    b = bars[0]
    assert (float(b.open), float(b.high), float(b.low), int(b.volume)) == (1.5, 1.75, 1.0, 4110)


def test_symbols_come_and_go_while_it_runs(server: Server) -> None:
    other = InstrumentId.from_str(MSFT.id)

    async def body(w: Watcher, link: polygon.Link) -> None:
        await aside(server.until_subscribed, "stocks", "Q.AAPL")
        await aside(server.send, "stocks", [quote(1), quote(1, "MSFT")])
        await until(w, lambda: len(w.got) == 1)
        w.subscribe_quotes(other)
        await aside(server.until_subscribed, "stocks", "Q.AAPL", "Q.MSFT")
        await aside(server.send, "stocks", [quote(2), quote(2, "MSFT")])
        await until(w, lambda: len(w.got) == 3)
        w.unsubscribe_quotes(ID)
        await aside(server.until, lambda: server.topics("stocks") == {"Q.MSFT"})
        await aside(server.raw, "stocks", json.dumps([quote(3), quote(3, "MSFT")]))  # one of the old symbol may still be on its way
        await until(w, lambda: len(w.got) >= 4)

    got, _ = live(server, ["AAPL", "MSFT"], [AAPL, MSFT], lambda w: w.subscribe_quotes(ID), body)
    assert [(x.instrument_id, x.ts_event // 1_000_000 - T0) for x in got] == [(ID, 1), (ID, 2), (other, 2), (other, 3)]
    assert server.connections == 1


def test_a_symbol_that_was_not_named_is_asked_of_the_rest_api(server: Server, rest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYGON_BASE", rest)
    other = InstrumentId.from_str(MSFT.id)

    async def body(w: Watcher, link: polygon.Link) -> None:
        w.subscribe_quotes(other)
        await aside(server.until_subscribed, "stocks", "Q.MSFT")
        await aside(server.send, "stocks", [quote(1, "MSFT")])
        await until(w, lambda: w.of("QuoteTick"))

    got, link = live(server, ["AAPL"], [AAPL], lambda w: None, body)
    assert [x.instrument_id for x in got] == [other]
    assert link.health.counts()["instruments"][MSFT.id]["records"] == 1


def test_the_feed_is_read_through_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    server = Server(tls=context)

    async def body(w: Watcher, link: polygon.Link) -> None:
        await aside(server.until_subscribed, "stocks", "Q.AAPL")
        await aside(server.send, "stocks", [quote(1)])
        await until(w, lambda: w.got)

    async def stranger(w: Watcher, link: polygon.Link) -> None:
        await until(w, lambda: link.fault)

    start = lambda w: w.subscribe_quotes(ID)  # noqa: E731
    got, link = live(server, ["AAPL"], [AAPL], start, stranger, timeout_s=4.0)
    assert not got and link.fault is not None and "certificate" in str(link.fault).lower()  # a stranger's certificate is not believed
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    got, link = live(server, ["AAPL"], [AAPL], start, body)
    assert len(got) == 1
    server.close()


# --- instruments ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rest() -> Iterator[str]:
    """The REST API, as far as instruments need it; the plan has no quotes of TSLA."""
    held: dict[str, Any] = {
        "/v3/reference/tickers/AAPL": {"ticker": "AAPL", "currency_name": "usd", "round_lot": 100},
        "/v3/reference/tickers/MSFT": {"ticker": "MSFT", "currency_name": "usd"},
        "/v3/reference/tickers/TSLA": {"ticker": "TSLA", "currency_name": "usd"},
        "/v3/reference/tickers/PENNY": {"ticker": "PENNY", "currency_name": "usd"},
        "/v3/reference/tickers/X:BTCUSD": {"ticker": "X:BTCUSD", "currency_symbol": "USD"},
        "/v3/quotes/AAPL": [{"bid_price": 100 + k / 100, "ask_price": 100.02 + k / 100} for k in range(500)],
        "/v3/quotes/MSFT": [{"bid_price": 400.01, "ask_price": 400.02}],
        "/v3/quotes/PENNY": [{"bid_price": 0.1234, "ask_price": 0.1235}],
        "/v3/trades/X:BTC-USD": [{"price": 60000.5, "size": 0.0125}, {"price": 60000.25, "size": 0.00000001}],
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urlparse(self.path).path
            code, body = 200, {"status": "OK", "results": held.get(path)}
            if path == "/v3/quotes/TSLA":
                code, body = 403, {"status": "NOT_AUTHORIZED", "message": "You are not entitled to this data."}
            elif path not in held:
                code, body = 404, {"status": "NOT_FOUND", "message": "Ticker not found."}
            if self.headers["Authorization"] != f"Bearer {KEY}":
                code, body = 401, {"status": "ERROR", "error": "Unknown API Key"}
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


def test_instruments_come_from_the_rest_api(rest: str) -> None:
    found = polygon.instruments(["AAPL", "TSLA", "PENNY", "X:BTC-USD"], rest=Rest(KEY, base=rest))
    assert [(x.id, x.kind, x.level, x.tick, x.price_precision, x.lot, x.currency) for x in found] == [
        ("AAPL.POLYGON", "equity", 1, 10_000_000, 4, 1_000_000_000, "USD"),
        ("TSLA.POLYGON", "equity", 1, 10_000_000, 4, 1_000_000_000, "USD"),
        ("PENNY.POLYGON", "equity", 1, 100_000, 4, 1_000_000_000, "USD"),
        ("BTCUSD.POLYGON", "currency_pair", 2, 10_000_000, 2, 10, "USD"),
    ]
    for x, symbol in zip(found, ("AAPL", "TSLA", "PENNY", "X:BTC-USD")):
        made = polygon.listed.nautilus_object(symbol, x)
        assert (str(made.id), made.price_precision, made.price_increment.as_double()) == (x.id, x.price_precision, x.tick / 1e9)


@pytest.mark.parametrize(
    ("symbol", "said"),
    [("AAPLX", "does not know the symbol AAPLX"), ("A PL", "no Polygon symbol"), ("O:SPY261218C00650000", "cannot be traded here")],
)
def test_a_symbol_that_cannot_be_is_told(rest: str, symbol: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        polygon.instruments([symbol], rest=Rest(KEY, base=rest))


def test_without_a_key_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POLYGON_API_KEY", raising=False)
    with pytest.raises(InputError, match="POLYGON_API_KEY"):
        polygon.client(["AAPL"], instruments=[AAPL])
    with pytest.raises(InputError, match="do not belong"):
        polygon.client(["AAPL"], KEY, instruments=[MSFT])


def test_the_key_is_shown_nowhere(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []

    async def body(w: Watcher, link: polygon.Link) -> None:
        await aside(server.until_subscribed, "stocks", "Q.AAPL")
        for p in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                lines.append(p.read_text(errors="replace"))
                parent = (p.parent / "stat").read_text(errors="replace").rsplit(")", 1)[1].split()[1]
                if int(parent) == os.getpid():
                    lines.append((p.parent / "environ").read_text(errors="replace"))
            except OSError:
                continue  # it has ended meanwhile
        await aside(server.drop, "stocks")
        await aside(server.until_subscribed, "stocks", "Q.AAPL")

    _, link = live(server, ["AAPL"], [AAPL], lambda w: w.subscribe_quotes(ID), body)
    assert any("polygon_reader" in x for x in lines)
    _, config = polygon.client(["AAPL"], KEY, instruments=[AAPL])
    shown = [*lines, *link.said, str(link.statistics()), str(config.dict()), repr(config), *capfd.readouterr()]
    assert not any(KEY in x for x in shown)
