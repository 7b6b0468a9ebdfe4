"""What goes wrong on Polygon's line, and that nothing is lost or made up by it without being told."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nautilus_trader.model import BookType, InstrumentId
from polygon_node import AAPL, MSFT, QUICK, T0, Watcher, aside, live, quote, trade, until
from polygon_server import KEY, WAIT, Server, status
from websockets.sync.client import connect

from catalog.errors import InputError
from cift_strategies.feeds import polygon
from cift_strategies.feeds.polygon_reader import Backlog, Backoff, Crowded, Patience, Socket, statuses

ID, OTHER = InstrumentId.from_str(AAPL.id), InstrumentId.from_str(MSFT.id)


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


def quotes_of(*ids: InstrumentId) -> Any:
    def start(w: Watcher) -> None:
        for i in ids:
            w.subscribe_quotes(i)

    return start


def readers() -> list[int]:
    """Reader processes that this process has started."""
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((p / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == os.getpid() and b"polygon_reader" in (p / "cmdline").read_bytes():
                found.append(int(p.name))
        except OSError:
            continue
    return found


def test_a_lost_line_comes_back_with_its_subscriptions(server: Server) -> None:
    """Closed by an error, closed in order, cut, refused for a while, the reader killed: each time all is subscribed again and told."""
    n = 0

    async def body(w: Watcher, link: polygon.Link) -> None:
        nonlocal n
        wanted = ["Q.AAPL"]

        async def shows_a_quote() -> None:
            nonlocal n
            n += 1
            await aside(server.until_subscribed, "stocks", *wanted)
            await aside(server.send, "stocks", [quote(n)])
            await until(w, lambda: len(w.got) == n)

        await shows_a_quote()
        for code, rude in ((1011, False), (1000, False), (1001, False), (1011, True)):
            await aside(lambda code=code, rude=rude: server.drop("stocks", code, rude=rude))
            await shows_a_quote()
        await aside(server.away)
        w.subscribe_quotes(OTHER)  # while there is no line
        wanted.append("Q.MSFT")
        await aside(server.back)
        await shows_a_quote()
        [reader] = readers()
        os.kill(reader, signal.SIGKILL)
        await aside(server.until, lambda: not server.lines)
        await shows_a_quote()
        await until(w, lambda: link.health.reconnects == 6)

    got, link = live(server, ["AAPL", "MSFT"], [AAPL, MSFT], quotes_of(ID), body)
    assert [x.ts_event // 1_000_000 - T0 for x in got] == list(range(1, 8))
    assert link.health.reasons == {"reconnect": 12}  # six times, of both symbols
    assert [p.gaps for p in link.health.pulses] == [6, 6]
    assert sum("is lost" in x for x in link.said) >= 6 and link.fault is None
    assert not readers()


def test_a_refused_key_is_the_users_to_mend(server: Server) -> None:
    async def body(w: Watcher, link: polygon.Link) -> None:
        await until(w, lambda: link.fault)

    got, link = live(server, ["AAPL"], [AAPL], quotes_of(ID), body, key="another")
    assert not got and "Polygon refused the key in POLYGON_API_KEY (authentication failed)" in str(link.fault)
    assert server.connections == server.refused == 1  # it was not tried again


def test_a_full_account_is_asked_again_after_a_while(server: Server) -> None:
    """The service takes key and subscriptions first and only then says that the account has no connection left."""
    line = ExitStack()
    other = line.enter_context(connect(f"{server.feed}/stocks"))
    for said in ({"action": "auth", "params": KEY}, {"action": "subscribe", "params": "T.TSLA"}):
        other.recv()
        other.send(json.dumps(said))
    other.recv()

    async def body(w: Watcher, link: polygon.Link) -> None:
        await until(w, lambda: server.refused >= 3)
        await aside(line.close)
        await aside(server.until, lambda: server.topics("stocks") == {"Q.AAPL"} and len(server.lines) == 1)
        await aside(server.send, "stocks", [quote(1)])
        await until(w, lambda: w.got)

    got, link = live(server, ["AAPL"], [AAPL], quotes_of(ID), body, patience=replace(QUICK, crowded=0.15))
    told = [x for x in link.said if "no further connection" in x]
    assert len(got) == 1 and len(told) >= 3 and all("stop the other program that holds it" in x for x in told)
    assert link.fault is None


def test_what_a_cluster_does_not_offer_is_told(server: Server) -> None:
    """Equities have no depth here."""

    async def body(w: Watcher, link: polygon.Link) -> None:
        await until(w, lambda: link.fault)

    _, link = live(server, ["AAPL"], [AAPL], lambda w: w.subscribe_book_deltas(ID, BookType.L2_MBP), body)
    assert "Polygon has no book of AAPL: its stocks feed offers quotes, trades" in str(link.fault)


def test_the_reader_goes_when_its_node_does(server: Server) -> None:
    """Killed or not: what the node leaves behind is an input that ends."""
    reader = subprocess.Popen(
        [sys.executable, "-m", "cift_strategies.feeds.polygon_reader"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert reader.stdin is not None
    terms = {"feed": server.feed, "market": "stocks", "key": KEY, "backlog": 1 << 20}
    reader.stdin.write(json.dumps(terms).encode() + b"\n" + json.dumps({"add": [["Q", "AAPL", 0, 4, 0, 0, 100]]}).encode() + b"\n")
    reader.stdin.flush()
    server.until_subscribed("stocks", "Q.AAPL")
    server.send("stocks", [quote(1)])
    server.until_read()
    out, _ = reader.communicate(timeout=WAIT)  # closes its input
    assert reader.returncode == 0 and b'"connected"' in out
    server.until(lambda: not server.lines)


def test_what_the_plan_does_not_include_is_told() -> None:
    server = Server(denied=["Q.AAPL"])

    async def body(w: Watcher, link: polygon.Link) -> None:
        await aside(server.until_subscribed, "stocks", "T.AAPL")
        await aside(server.send, "stocks", [trade(1)])
        await until(w, lambda: w.got and link.denied)

    def start(w: Watcher) -> None:
        w.subscribe_quotes(ID)
        w.subscribe_trades(ID)

    got, link = live(server, ["AAPL"], [AAPL], start, body)
    assert len(got) == 1 and isinstance(link.fault, InputError)
    assert "Q.AAPL: not authorized" in str(link.fault) and "use a plan that includes it" in str(link.fault)
    server.close()


def test_a_service_that_says_nothing_is_told_to_the_user() -> None:
    server = Server(mute=True)

    async def body(w: Watcher, link: polygon.Link) -> None:
        await until(w, lambda: link.fault)

    _, link = live(server, ["AAPL"], [AAPL], quotes_of(ID), body, patience=replace(QUICK, answer=0.2), timeout_s=3.0)
    assert server.feed in str(link.fault) and "TimeoutError" in str(link.fault)
    server.close()


def test_rubbish_on_the_line_harms_nothing_else(server: Server) -> None:
    good = iter(range(1, 100))
    rubbish = [
        "{", "[", "nonsense", b"\xff\xfe\x00", "[" * 100_000, "null", "7", '"text"', "[]", "[[]]", "[null, 3]", '[{"ev": null}]',
        '[{"ev": []}]', '[{"ev": "Q"}]', '[{"ev": "Q", "sym": "AAPL"}]', '[{"ev": "Q", "sym": ["AAPL"]}]',
        '[{"ev": "ZZ", "sym": "AAPL", "t": 1}]',
        *(json.dumps([{**quote(50), **broken}]) for broken in (
            {"bp": "100"}, {"bp": None}, {"bp": float("nan")}, {"ap": float("inf")}, {"bs": 10**30}, {"t": None}, {"t": -5},
            {"t": "now"}, {"q": "x"},
        )),
    ]  # fmt: skip

    async def body(w: Watcher, link: polygon.Link) -> None:
        await aside(server.until_subscribed, "stocks", "Q.AAPL")
        for text in rubbish:
            n = next(good)
            await aside(server.raw, "stocks", text, json.dumps([quote(n), {"ev": "Q"}]))
        await aside(server.send, "stocks", [quote(n), quote(n - 3), quote(n + 4), quote(n + 2), quote(n + 1, bp=0.0)])
        await until(w, lambda: w.got and w.got[-1].ts_event == (T0 + n + 4) * 1_000_000)

    got, link = live(server, ["AAPL"], [AAPL], quotes_of(ID), body)
    assert [x.ts_event // 1_000_000 - T0 for x in got] == [*range(1, len(rubbish) + 1), len(rubbish) + 4]
    told = link.statistics()
    assert told["kinds"]["malformed frames"] == 5 and told["kinds"]["unknown events"] == 1
    assert told["kinds"]["malformed messages"] >= len(rubbish) + 15
    pulse = told["health"]["instruments"][AAPL.id]
    assert (pulse["duplicates"], pulse["late"], pulse["gaps"], pulse["missing"]) == (2, 2, 1, 3)
    assert server.connections == 1


class Blocked:
    """An actor's callback that holds the node's loop until it is let go."""

    def __init__(self) -> None:
        self.begun, self.let = threading.Event(), threading.Event()

    def __call__(self, _: Any) -> None:
        if not self.begun.is_set():
            self.begun.set()
            assert self.let.wait(WAIT)


@pytest.mark.parametrize("backlog", [64 << 20, 1 << 20])
def test_a_slow_node_never_makes_the_service_wait(server: Server, backlog: int) -> None:
    """While the node's loop stands still the socket is read on. What fits the backlog arrives; what does not is counted and told."""
    many, padding = 12_000, "x" * 2_000  # 24 MB, more than any socket holds
    sent = [[quote(n, pad=padding) for n in range(i, i + 50)] for i in range(2, many + 2, 50)]
    block = Blocked()

    async def body(w: Watcher, link: polygon.Link) -> None:
        await aside(server.until_subscribed, "stocks", "Q.AAPL")
        w.on_one = block

        def flood() -> None:
            server.send("stocks", [quote(1)])
            assert block.begun.wait(WAIT)
            for messages in sent:  # this thread ends only when everything has been taken off the socket
                server.send("stocks", messages)
            server.send("stocks", [quote(many + 2)])
            server.until_read()
            block.let.set()

        flooding = threading.Thread(target=flood)
        flooding.start()
        await until(w, lambda: w.got and w.got[-1].ts_event == (T0 + many + 2) * 1_000_000)
        await aside(flooding.join)

    got, link = live(server, ["AAPL"], [AAPL], quotes_of(ID), body, backlog=backlog)
    numbers = [x.ts_event // 1_000_000 - T0 for x in got]
    pulse, told = link.health.pulses[0], link.statistics()
    assert numbers == sorted(set(numbers)) and server.connections == 1
    assert len(got) + pulse.missing == many + 2
    if backlog > 32 << 20:
        assert pulse.missing == told["dropped_frames"] == 0 and pulse.gaps == 0
    else:
        assert pulse.missing == 50 * told["dropped_frames"] > many // 2
        assert link.health.dropped == told["dropped_frames"] and "dropped" in link.health.reasons
        assert any("the node is too slow" in x for x in link.said)


@pytest.mark.parametrize("kind", ["Q", "T"])
def test_what_waits_in_the_node_stays_little(server: Server, kind: str) -> None:
    """Records are made no faster than the node takes them, whatever waits before it: its own queue has no end."""
    many = 30_000
    made = quote if kind == "Q" else trade
    sent = [[made(n) for n in range(i, i + 500)] for i in range(1, many + 1, 500)]
    ahead: list[int] = []

    async def body(w: Watcher, link: polygon.Link) -> None:
        await aside(server.until_subscribed, "stocks", f"{kind}.AAPL")
        w.on_one = lambda _: ahead.append(link.records - len(w.got))
        await aside(lambda: [server.send("stocks", m) for m in sent])
        await until(w, lambda: len(w.got) == many)

    def start(w: Watcher) -> None:
        (w.subscribe_quotes if kind == "Q" else w.subscribe_trades)(ID)

    live(server, ["AAPL"], [AAPL], start, body)
    assert len(ahead) == many
    if kind == "Q":  # of trades it cannot be seen how far the node is: they are given time
        assert max(ahead) <= polygon.AHEAD + 2 * polygon.STEP


def test_the_backlog_drops_the_oldest_frames_and_keeps_what_must_be_told() -> None:
    backlog = Backlog(100)
    backlog.put(1, b"a" * 40)
    backlog.note(event="connected")
    backlog.put(2, b"b" * 40)
    backlog.put(3, b"c" * 40)
    backlog.put(4, b"d" * 40)
    items = backlog.take(0.0)
    assert items == [
        (0, {"event": "connected"}), (0, {"event": "dropped", "frames": 2, "bytes": 80}), (3, b"c" * 40), (4, b"d" * 40)
    ]  # fmt: skip
    assert (backlog.bytes, backlog.frames, backlog.dropped_frames, backlog.dropped_bytes) == (0, 4, 2, 80)
    assert backlog.take(0.0) == []
    backlog.put(5, b"e" * 101)  # more than it may ever hold
    assert backlog.take(0.0) == [(0, {"event": "dropped", "frames": 1, "bytes": 101})]


def test_back_off_grows_until_a_connection_has_proved_itself() -> None:
    """A line that is accepted and lost at once, again and again, is asked for less and less often."""
    backoff = Backoff(Patience(first=1.0, most=8.0, crowded=60.0, steady=10.0))
    waits = [backoff.wait(lasted, False) for lasted in (0.0, 0.5, 0.0, 2.0, 9.9, 3_600.0, 0.0)]
    assert waits == pytest.approx([1, 2, 4, 8, 8, 1, 2], rel=0.21)
    assert backoff.wait(0.5, True) == 60.0


def test_the_services_words_are_understood() -> None:
    assert statuses(json.dumps([status("connected", "Connected Successfully"), quote(1)])) == [("connected", "Connected Successfully")]
    assert statuses(json.dumps(status("auth_failed", "no"))) == [("auth_failed", "no")]
    assert statuses(b"\xff") == statuses("[1, null]") == []

    async def login(*frames: list[dict[str, str]]) -> list[str]:
        class Wire:
            def __init__(self) -> None:
                self.frames, self.sent = [json.dumps(f).encode() for f in frames], list[str]()

            async def recv(self, decode: bool) -> bytes:
                return self.frames.pop(0)

            async def send(self, text: str) -> None:
                self.sent.append(text)

        wire = Wire()
        await Socket("k", "localhost", "stocks", patience=Patience())._login(wire)
        return wire.sent

    connected, accepted = status("connected", "Connected Successfully"), status("auth_success", "authenticated")
    assert asyncio.run(login([connected], [accepted])) == [json.dumps({"action": "auth", "params": "k"})]
    with pytest.raises(Exception, match="nobody"):
        asyncio.run(login([connected], [status("auth_failed", "nobody")]))
    with pytest.raises(TimeoutError):
        asyncio.run(login([connected], [status("auth_timeout", "late")]))
    with pytest.raises(Crowded):
        asyncio.run(login([connected], [status("max_connections", "full")]))
