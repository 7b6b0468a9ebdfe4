"""A gateway on this machine that plays DBN files over Databento's live protocol, for clients that cannot tell it from the service.

`python -m cift_strategies.feeds.gateway --dbn FILE...` prints one line of JSON when it is ready. Takes files (:mod:`.tape`), a key and a
speed; answers live sessions (:mod:`.session`) and the historical requests that clients make beside them (:mod:`.history`). The records that
it sends are those of the files, byte by byte; at speed X the stream's time runs X times the wall's.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from aiohttp import web

from catalog.errors import InputError, exit_code, run_typer
from cift_strategies.feeds import history
from cift_strategies.feeds.mischief import Fault
from cift_strategies.feeds.session import Session
from cift_strategies.feeds.tape import STEP, Tape

DEMO_KEY: Final = "db-DemoMarketOfCiftNeedsNoSecret"  # of the form of a real one: 32 characters, "db-" first
SETTLE_S: Final = 0.25  # a client makes its first subscriptions one by one, the session being open: time starts when they are made
BUCKET: Final = 5


class Clock:
    """Where the market stands: a place on the tape that moves with the wall's clock, or, unthrottled, as fast as it is read.

    It starts when `clients` sessions have started and made their subscriptions.
    """

    def __init__(self, tape: Tape, speed: float, clients: int) -> None:
        self.tape, self.speed, self.clients = tape, speed, clients
        self.started = asyncio.Event()
        self.wall_ns, self.from_ns = 0, tape.first  # the stream's time was `from_ns` when the wall's was `wall_ns`
        self._reached, self._joined, self._busy = -STEP, 0, 0
        self._timer: asyncio.TimerHandle | None = None

    def join(self) -> None:
        self._joined += 1
        self.touch()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While a subscription is looked after, and shortly thereafter, time does not start."""
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1
            self.touch()

    def touch(self) -> None:
        if self.started.is_set() or self._joined < self.clients:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(SETTLE_S, self._start)

    def _start(self) -> None:
        if self._busy:
            return
        self.wall_ns = time.time_ns()
        self.started.set()

    def now(self) -> int:
        """The stream's time, ns: that of the newest record that was reached."""
        if not self.started.is_set():
            return self.tape.first
        if not self.speed:
            return self.tape.time(self._reached)
        return self.from_ns + int((time.time_ns() - self.wall_ns) * self.speed)

    def go(self, ts: int, speed: float) -> None:
        """From now on the stream's time is `ts` and runs at `speed`."""
        self.from_ns, self.wall_ns, self.speed = ts, time.time_ns(), speed
        self.reached(self.tape.at(ts))
        self.started.set()

    def limit(self) -> int:
        """The place up to which records may be sent."""
        return self.tape.passed(self.now()) if self.speed else self.tape.end

    def place(self) -> int:
        """The place at which a session begins that asks for no other."""
        if not self.started.is_set():
            return -STEP
        return self.limit() if self.speed else self._reached

    def reached(self, place: int) -> None:
        self._reached = max(self._reached, place)

    def wait(self, place: int) -> float:
        """Seconds until the first record at or after a place is due; infinite behind the last one."""
        row = self.tape.base.before(place)
        if row >= len(self.tape.base.ts):
            return float("inf")
        return (int(self.tape.base.ts[row]) - self.now()) / 1e9 / self.speed if self.speed else 0.0


class Gateway:
    """Plays `files` to any number of clients that know `key`; `speed` 0 is unthrottled.

    `clients`: sessions that must have started before time does. `hold`: keep the line open, with heartbeats, when the files are at their
    end; else it is closed. `patience_s`: for a client that takes nothing, as while its models compile kernels. `faults` are added to
    by :meth:`misbehave`. Raises InputError for files that cannot be played.
    """

    def __init__(
        self, files: Sequence[Path], *, host: str = "127.0.0.1", port: int = 0, http_port: int = 0, key: str = DEMO_KEY, speed: float = 1.0,
        faults: Sequence[Fault] = (), clients: int = 1, hold: bool = True, patience_s: float = 300.0,
    ) -> None:  # fmt: skip
        if not (len(key) == 32 and key.startswith("db-") and key.isascii()):
            raise InputError("the gateway's key has not the form of Databento's: 32 characters, the first of them db-")
        if not 0 <= speed < float("inf"):
            raise InputError(f"speed {speed} is none: write 0 for unthrottled, 1 for the market's own pace")
        self.tape = Tape(files)
        self.host, self.port, self.http_port = host, port, http_port
        self.hold, self.patience_s = hold, patience_s
        self.faults = list(faults)
        self.counts = {"sessions": 0, "records": 0, "refused": 0}
        self._key, self._speed, self._clients = key, speed, clients
        self._sessions: set[Session] = set()
        self._server: asyncio.Server | None = None
        self._http: web.AppRunner | None = None

    async def start(self) -> None:
        self.clock = Clock(self.tape, self._speed, self._clients)
        try:
            self._server = await asyncio.start_server(self._serve, self.host, self.port, limit=1 << 16)
            self.port = self._server.sockets[0].getsockname()[1]
            self._http = web.AppRunner(history.application(self), access_log=None)
            await self._http.setup()
            site = web.TCPSite(self._http, self.host, self.http_port)
            await site.start()
            self.http_port = self._http.addresses[0][1]
        except OSError as e:
            await self.stop()
            raise InputError(f"the gateway cannot listen on {self.host} ({e.strerror}): choose other ports") from None

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for session in list(self._sessions):
            session.abort()
        if self._server is not None:
            await self._server.wait_closed()
        if self._http is not None:
            await self._http.cleanup()
        self.tape.close()

    def misbehave(self, fault: Fault) -> None:
        """Do one thing wrong, soon; `after` counts from now, in the session that comes there first."""
        most = max((s.sent for s in self._sessions), default=0)
        self.faults.append(Fault(fault.kind, fault.after + most * (fault.kind != "refuse"), fault.amount))

    def go(self, ts: int, speed: float) -> None:
        """Let the stream's time be `ts` (ns) and run at `speed` from now on, started or not."""
        self.clock.go(ts, speed)
        for session in self._sessions:
            session.wake()

    def describe(self) -> dict[str, Any]:
        """What a client has to know."""
        t = self.tape
        return {
            "live": f"{self.host}:{self.port}", "historical": f"http://{self.host}:{self.http_port}", "dataset": t.dataset,
            "schemas": list(t.schemas), "symbols": list(t.symbols), "start": t.first, "end": t.last,
        }  # fmt: skip

    def knows(self, challenge: str, answer: str) -> bool:
        """Whether `answer` ("digest-bucket") was made of the challenge and our key."""
        digest = hashlib.sha256(f"{challenge}|{self._key}".encode()).hexdigest()
        return hmac.compare_digest(answer.encode(), f"{digest}-{self._key[-BUCKET:]}".encode())

    def owns(self, key: str) -> bool:
        return hmac.compare_digest(key.encode(), self._key.encode())

    def refuses(self) -> bool:
        """Whether the next authentication is refused whatever its key."""
        for n, f in enumerate(self.faults):
            if f.kind == "refuse":
                self.faults[n : n + 1] = [Fault(f.kind, 0, f.amount - 1)] if f.amount > 1 else []
                return True
        return False

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session = Session(self, reader, writer, secrets.token_hex(16))
        self._sessions.add(session)
        try:
            await session.run()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, asyncio.CancelledError):
            pass  # the client is gone, or speaks another language
        finally:
            self._sessions.discard(session)
            session.abort()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()


async def _run(gateway: Gateway, with_parent: bool) -> None:
    await gateway.start()
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    if with_parent:
        threading.Thread(target=lambda: (sys.stdin.buffer.read(), loop.call_soon_threadsafe(stopped.set)), daemon=True).start()
    for s in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(s, stopped.set)
    print(json.dumps(gateway.describe()), flush=True)
    await stopped.wait()
    await gateway.stop()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    dbn: Annotated[list[Path], typer.Option(help="DBN files of one dataset: market data, definitions, status (also found beside them).")],
    more: Annotated[list[Path] | None, typer.Argument(help="More of them.", metavar="FILE...")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the live protocol; 0 takes a free one.")] = 0,
    http_port: Annotated[int, typer.Option(help="Port of the historical requests; 0 takes a free one.")] = 0,
    speed: Annotated[float, typer.Option(help="How fast the stream's time runs; 0 is as fast as it is read.")] = 1.0,
    key: Annotated[str | None, typer.Option(help="Key that clients must know; else DATABENTO_API_KEY, else a demo key.")] = None,
    clients: Annotated[int, typer.Option(help="Sessions that must have started before time does.")] = 1,
    fault: Annotated[list[str] | None, typer.Option(help="What to do wrong: kind@after:amount, like drop@5000 or stall@5000:3.")] = None,
    close_at_end: Annotated[bool, typer.Option(help="Close the line when the files are at their end.")] = False,
    with_parent: Annotated[bool, typer.Option("--with-parent", hidden=True, help="End when standard input ends.")] = False,
) -> None:
    """Play DBN files over Databento's live protocol. Prints one line of JSON when it is ready; ends on Ctrl-C."""
    key = key or os.environ.get("DATABENTO_API_KEY") or DEMO_KEY
    faults = [Fault.parse(f) for f in fault or ()]
    files, hold = [*dbn, *(more or ())], not close_at_end
    made = Gateway(files, host=host, port=port, http_port=http_port, key=key, speed=speed, faults=faults, clients=clients, hold=hold)
    asyncio.run(_run(made, with_parent))


if __name__ == "__main__":
    raise SystemExit(exit_code(lambda: run_typer(app)))
