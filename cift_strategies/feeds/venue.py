"""A test venue on this machine: orders by a line protocol, filled against the market that a gateway plays.

`python -m cift_strategies.feeds.venue --gateway HOST:PORT --dataset D --instruments FILE` prints one line of JSON when it is ready. It
listens to the gateway as any client of it does, so that its market is that of everybody else, at the same pace. One account, any number of
lines. With `--books FILE` the account outlives the process too. The protocol is told in docs/live.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import importlib
import itertools
import json
import os
import secrets
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Annotated, Any, Final

import numpy as np
import typer

from catalog.dbn import MBO
from catalog.errors import InputError, exit_code, run_typer
from catalog.events import Instrument, read_instruments_toml
from cift_strategies.feeds.mischief import Fault
from cift_strategies.feeds.rows import Rows
from cift_strategies.feeds.venue_matching import Matching, Order, Report
from cift_strategies.feeds.wire import BrokenError, RefusedError, Wire, connect

VERSION: Final = 1
ENV_KEY: Final = "CIFT_VENUE_KEY"
DEMO_KEY: Final = "cift-test-venue-needs-no-secret"
LINE: Final = 1 << 20  # bytes of a line at most
BUFFER: Final = 1 << 24  # bytes that wait for a client who does not read, before its line is cut
AGAIN_S: Final = 0.5  # before the gateway is tried again
FAULTS: Final = {
    "drop": "after so many more reports cut every line, and the next `amount` that come",
    "delay": "after so many more reports hold what follows back for `amount` seconds",
    "duplicate": "after so many more reports send `amount` of them twice",
    "reject": "after so many more orders reject `amount` of them",
    "race": "after so many more cancels let `amount` of them lose against a fill",
}
MBO_TYPE, DEFINITION_TYPE, MAPPING_TYPE = 0xA0, 0x13, 0x16
LEVELS: Final = {0x00: "trades", 0x01: "mbp-1", 0x0A: "mbp-10"}
_dbn: Any = importlib.import_module("databento_dbn")
SCHEMAS: Final = {3: "mbo", 2: "mbp-10", 1: "mbp-1", 0: "trades"}


def answer(challenge: str, key: str) -> str:
    """What a client says to a challenge."""
    return hmac.new(key.encode(), challenge.encode(), hashlib.sha256).hexdigest()


class Market:
    """The market of `instruments`, as a gateway at `address` plays it, told to `matching`."""

    def __init__(self, instruments: Sequence[Instrument], dataset: str, address: tuple[str, int], key: str, matching: Matching) -> None:
        self.instruments, self.dataset, self.address, self.key, self.matching = list(instruments), dataset, address, key, matching
        self._symbols = [x.id.rsplit(".", 1)[0] for x in instruments]

    async def run(self) -> None:
        """Listen until cancelled; a line that is lost is made anew, with a snapshot. Raises InputError where the key is refused."""
        while True:
            try:
                await self._session(await connect(*self.address, self.key, self.dataset))
            except RefusedError as e:
                raise InputError(f"the gateway at {self.address[0]}:{self.address[1]} does not let the venue in: {e}") from None
            except (BrokenError, OSError, TimeoutError):
                await asyncio.sleep(AGAIN_S)

    async def _session(self, wire: Wire) -> None:
        rows, event = Rows(self.instruments), self.matching.event
        try:
            for level, schema in SCHEMAS.items():
                if mine := [s for s, x in zip(self._symbols, self.instruments) if x.level == level]:
                    wire.subscribe(schema, mine, snapshot=schema == "mbo")
            wire.start()
            async for data, at in wire.pieces():
                types, ends = data[at + 1], np.append(at[1:], len(data))
                cuts = [0, *(np.flatnonzero(np.diff(types)) + 1).tolist(), len(at)]
                for a, b in itertools.pairwise(cuts):
                    events = self._events(rows, int(types[a]), data[int(at[a]) : int(ends[b - 1])], b - a)
                    fields = (events[n].tolist() for n in ("instrument", "action", "side", "price", "size", "order_id", "flags"))
                    for n, row in enumerate(zip(*fields)):
                        event(*row)
                        if n % 512 == 511:
                            await asyncio.sleep(0)  # orders go first
                    if len(events):
                        self.matching.newest = int(events["ts_init"][-1])
                await asyncio.sleep(0)
        finally:
            wire.close()

    def _events(self, rows: Rows, kind: int, data: Any, n: int) -> Any:
        if kind == MBO_TYPE:
            return rows.finish(rows.orders(np.ascontiguousarray(data).view(MBO)))
        if kind in LEVELS:
            return rows.finish(rows.levels(data.reshape(n, -1), LEVELS[kind]))
        if kind == MAPPING_TYPE:
            decoder = _dbn.DBNDecoder(has_metadata=False, input_version=3)
            for told in decoder.write_and_decode(data.tobytes()):
                if (symbol := str(told.stype_out_symbol)) in self._symbols:
                    rows.learn(int(told.instrument_id), self._symbols.index(symbol))
        return rows.orders(np.empty(0, MBO))


class Venue:
    """Takes orders on a port, from clients that know `key`. `books`: a file that keeps the account; None: it lives with the process."""

    def __init__(
        self, instruments: Sequence[Instrument], *, host: str = "127.0.0.1", port: int = 0, key: str = DEMO_KEY, books: Path | None = None,
        faults: Sequence[Fault] = (), capital: float = 1_000_000.0,
    ) -> None:  # fmt: skip
        self.host, self.port, self.faults, self.capital = host, port, list(faults), capital
        self._key, self._shut = key, 0
        self._sessions: set[_Line] = set()
        self._server: asyncio.Server | None = None
        self._file: IO[str] | None = None
        self.log: list[str] = []  # the line of each report: that of sequence number n is log[n - 1]
        past = [] if books is None else self._read(books)
        self.matching = Matching(instruments, self._told, past)

    def _read(self, books: Path) -> list[Report]:
        """The reports of before; a last line that was cut off was told to nobody."""
        try:
            books.parent.mkdir(parents=True, exist_ok=True)
            self._file = books.open("a+", encoding="utf-8")
            self._file.seek(0)
            text = self._file.read()
            whole = text[: text.rfind("\n") + 1]
            self._file.truncate(len(whole.encode()))
            self.log = whole.splitlines(keepends=True)
            return [Report.parse(json.loads(line)["report"]) for line in self.log]
        except OSError as e:
            raise InputError(f"--books {books} cannot be used ({e.strerror}): choose another file") from None
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"--books {books} is damaged ({e}): restore it, or choose another file") from None

    def _told(self, report: Report) -> None:
        """Keep a report, then tell it to everybody."""
        line = json.dumps({"report": report.told()}, separators=(",", ":")) + "\n"
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
        self.log.append(line)
        copies = 2 if self.wrong("duplicate") else 1
        held = self.wrong("delay")
        for session in list(self._sessions):
            if held is not None:
                session.hold(held.amount)
            session.report(line * copies)
        if (fault := self.wrong("drop")) is not None:
            self._shut = int(fault.amount)
            for session in list(self._sessions):
                session.cut()

    def wrong(self, kind: str) -> Fault | None:
        """The fault of that kind that happens now, if one does; each call counts as one of what its `after` counts."""
        for n, f in enumerate(self.faults):
            if f.kind == kind:
                if f.after > 0:
                    self.faults[n] = Fault(kind, f.after - 1, f.amount)
                    return None
                repeats = kind in ("duplicate", "reject", "race") and f.amount > 1
                self.faults[n : n + 1] = [Fault(kind, 0, f.amount - 1)] if repeats else []
                return f
        return None

    async def start(self) -> None:
        try:
            self._server = await asyncio.start_server(self._serve, self.host, self.port, limit=LINE)
        except OSError as e:
            raise InputError(f"the venue cannot listen on {self.host}:{self.port} ({e.strerror}): choose another port") from None
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for session in list(self._sessions):
            session.cut()
        if self._server is not None:
            await self._server.wait_closed()
        if self._file is not None:
            self._file.close()

    def knows(self, challenge: str, said: Any) -> bool:
        return isinstance(said, str) and hmac.compare_digest(said.encode(), answer(challenge, self._key).encode())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = _Line(self, reader, writer)
        if self._shut:
            self._shut -= 1
            line.cut()
            return
        self._sessions.add(line)
        try:
            await line.run()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, asyncio.CancelledError):
            pass  # the client is gone, or speaks another language
        finally:
            self._sessions.discard(line)
            line.cut()

    def told(self) -> dict[str, Any]:
        """What a client has to know."""
        return {"venue": f"{self.host}:{self.port}", "instruments": self.matching.ids, "seq": self.matching.seq}


class _Line:
    """One client's connection."""

    def __init__(self, venue: Venue, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.venue, self._reader, self._writer = venue, reader, writer
        self._listens = False
        self._held: deque[str] | None = None

    def cut(self) -> None:
        self._writer.transport.abort()

    def say(self, **what: Any) -> None:
        self._write(json.dumps(what, separators=(",", ":")) + "\n")

    def _write(self, text: str) -> None:
        if self._writer.transport.get_write_buffer_size() > BUFFER:
            self.cut()
        elif self._held is not None:
            self._held.append(text)
        else:
            self._writer.write(text.encode())

    def report(self, text: str) -> None:
        if self._listens:
            self._write(text)

    def hold(self, seconds: float) -> None:
        """Keep back what is told from now on."""
        if self._held is None:
            self._held = deque()
            asyncio.get_running_loop().call_later(seconds, self._release)

    def _release(self) -> None:
        held, self._held = self._held or (), None
        for text in held:
            self._write(text)

    async def run(self) -> None:
        challenge = secrets.token_urlsafe(24)
        self.say(venue="cift-test", version=VERSION, challenge=challenge)
        asked = json.loads(await self._reader.readuntil(b"\n"))
        if not (isinstance(asked, dict) and asked.get("do") == "login" and self.venue.knows(challenge, asked.get("answer"))):
            self.say(error="the key is wrong")
            await self._writer.drain()
            return
        seen, newest = asked.get("seen"), self.venue.matching.seq
        if seen is not None and (type(seen) is not int or not 0 <= seen <= newest):
            self.say(error=f"report {seen} was never told: the newest is {newest}")
            await self._writer.drain()
            return
        self.say(welcome=self.venue.told(), seq=newest, capital=self.venue.capital)
        for text in self.venue.log[newest if seen is None else seen :]:
            self._write(text)
        self._listens = True
        while True:
            self._do(await self._reader.readuntil(b"\n"))
            await self._writer.drain()

    def _do(self, line: bytes) -> None:
        """Obey one command; what is none is told, and nothing else happens."""
        number: Any = None
        try:
            asked = json.loads(line)
            if not isinstance(asked, dict):
                raise InputError("a command is a table")
            number, venue, m = asked.get("id"), self.venue, self.venue.matching
            match asked.get("do"):
                case "submit":
                    orders = [Order.parse(o) for o in asked["orders"]]
                    m.submit(orders, "by chance" if venue.wrong("reject") else "")
                case "cancel":
                    m.cancel(asked["order"], venue.wrong("race") is not None)
                case "modify":
                    m.modify(asked["order"], *(asked.get(n) for n in ("size", "price", "trigger")))
                case "status":
                    self.say(answer=number, status=m.status())
                    return
                case "account":
                    self.say(answer=number, ts=time.time_ns(), equity=m.equity(venue.capital))
                    return
                case "fault":
                    venue.faults.append(Fault.parse(asked["fault"], FAULTS))
                case other:
                    raise InputError(f"{other} is none of submit, cancel, modify, status, account, fault")
            self.say(answer=number)
        except InputError as e:
            self.say(answer=number, error=str(e))
        except KeyError as e:
            self.say(answer=number, error=f"{e.args[0]} is not known, or missing")
        except (ValueError, TypeError) as e:
            self.say(answer=number, error=f"no command: {e}")


# --- the process ----------------------------------------------------------------------------------------------------------------------


def table(path: Path) -> list[Instrument]:
    """Instruments of a TOML by hand, or of a JSON that a node has written. Raises InputError."""
    if path.suffix != ".json":
        return read_instruments_toml(path)
    try:
        return [Instrument(**{**x, "pauses": ()}) for x in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as e:
        raise InputError(f"{path} holds no instruments ({e})") from None


async def _run(venue: Venue, market: Market, with_parent: bool) -> None:
    await venue.start()
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    if with_parent:
        threading.Thread(target=lambda: (sys.stdin.buffer.read(), loop.call_soon_threadsafe(stopped.set)), daemon=True).start()
    for s in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(s, stopped.set)
    listening = asyncio.create_task(market.run())
    listening.add_done_callback(lambda _: stopped.set())
    print(json.dumps(venue.told()), flush=True)
    await stopped.wait()
    await venue.stop()
    listening.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await listening


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    gateway: Annotated[str, typer.Option(help="host:port of the live gateway that plays the market.")],
    dataset: Annotated[str, typer.Option(help="Its dataset.")],
    instruments: Annotated[Path, typer.Option(help="What is traded, with ticks, lots and fees: TOML as in docs/instruments.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port for orders; 0 takes a free one.")] = 0,
    books: Annotated[Path | None, typer.Option(help="File that keeps the account when the venue ends.")] = None,
    fault: Annotated[list[str] | None, typer.Option(help="What to do wrong: kind@after:amount, like drop@5 or race:2.")] = None,
    capital: Annotated[float, typer.Option(help="Starting balance of each currency.")] = 1_000_000.0,
    gateway_key: Annotated[str | None, typer.Option(help="Key of the gateway; else DATABENTO_API_KEY, else its demo key.")] = None,
    with_parent: Annotated[bool, typer.Option("--with-parent", hidden=True, help="End when standard input ends.")] = False,
) -> None:
    """Take orders and fill them against a gateway's market. Clients must know CIFT_VENUE_KEY, or else the demo key."""
    from cift_strategies.feeds.databento import address
    from cift_strategies.feeds.gateway import DEMO_KEY as GATEWAY_KEY

    key, faults, traded = os.environ.get(ENV_KEY) or DEMO_KEY, [Fault.parse(f, FAULTS) for f in fault or ()], table(instruments)
    made = Venue(traded, host=host, port=port, key=key, books=books, faults=faults, capital=capital)
    knows = gateway_key or os.environ.get("DATABENTO_API_KEY") or GATEWAY_KEY
    market = Market(traded, dataset, address(dataset, gateway), knows, made.matching)
    asyncio.run(_run(made, market, with_parent))


if __name__ == "__main__":
    raise SystemExit(exit_code(lambda: run_typer(app)))
