"""A node on a stage's gateway and venue that does what it is told over a line, and tells what its strategy hears; a process for each life.

`python venue_node.py` forks a life for each line of its standard input: `state`, `live`, `venue`, `port` (of the test that directs it).
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from nautilus_trader.model import AccountId, Currency
from venue_stage import OPEN, SHARE, TICK

from catalog.events import SCALE
from cift_strategies.faults import Faults
from cift_strategies.feeds import databento, venue_client
from cift_strategies.feeds.gateway import DEMO_KEY
from cift_strategies.journal import Journal
from cift_strategies.live_config import locked
from cift_strategies.messages import Signal
from cift_strategies.pace import Pace
from cift_strategies.recovery import recover
from cift_strategies.risk import Limits
from cift_strategies.settings import Settings
from cift_strategies.strategy import EnsembleStrategy, Terms
from cift_strategies.system import assemble, live_node


class Blind:
    """Predicts nothing: the test decides."""

    def predict(self, _vector: Any) -> list[Any]:
        return []


class Directed(EnsembleStrategy):
    tell: Any = None

    def on_order_event(self, event: Any) -> None:
        super().on_order_event(event)
        role = self.orders.get(event.client_order_id, (0, "external", 0))[1]
        self.tell(event=type(event).__name__, role=role, order=str(event.client_order_id), reason=getattr(event, "reason", None))


class Director:
    """The test's end of the line: commands come in, what happened goes out."""

    def __init__(self, port: int, strategy: Any, journal: Journal, link: Any) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.strategy, self.journal, self.link, self.done = strategy, journal, link, asyncio.Event()
        self.said: list[str] = []

    def tell(self, **what: Any) -> None:
        self.socket.sendall(json.dumps(what).encode() + b"\n")

    async def obey(self) -> None:
        reader, _ = await asyncio.open_connection(sock=self.socket.dup())
        while line := await reader.readline():
            asked = json.loads(line)
            try:
                found = getattr(self, asked.pop("do"))(**asked)
            except Exception as e:
                traceback.print_exc()
                found = {"error": repr(e)}
            self.tell(answer=found)
        self.done.set()

    def enter(self, side: int, size: int, limit: int, entry: str = "join", stop: int = 20, target: int = 20, seconds: float = 1e6) -> Any:
        """A bracket; prices in ticks, stop and target so many of them away."""
        s = self.strategy
        now, h = s.now(), round(seconds * SCALE)
        signal = Signal(
            instrument=0, ts=now, predicted_at=now, side=side, size=size * SCALE, horizon_ns=h, expected_ticks=5.0, cost_ticks=1.0,
            confidence=1.0, regime=-1, limit=limit * TICK, stop=(limit - side * stop) * TICK, target=(limit + side * target) * TICK,
            entry=entry,
        )  # fmt: skip
        s.enter(signal)
        return {role: str(own) for role, own in s.trades[0].ids.items()} if s.trades[0] else s.reason

    def leave(self) -> None:
        self.strategy.leave(0, "by command")

    def unpriced(self) -> None:
        """As it is between a start and the first price."""
        self.strategy.recovery.waits.add(0)

    def give_up(self) -> None:
        self.strategy.cancel_order(self.strategy.trades[0].ids["entry"])

    def status(self) -> dict[str, Any]:
        s, (p,) = self.strategy, self.strategy.ledger.positions
        s.faults.reraise()
        cache = s.cache
        trade, account = s.trades[0], cache.account(AccountId(f"{venue_client.NAME}-001"))
        return {
            "size": p.size // SCALE, "average": p.average, "realised": p.realised, "fees": p.fees, "pnl": s.ledger.pnl("USD"),
            "fills": len(s.fills), "decisions": dict(s.decisions),
            "halts": dict(s.halts), "open": sorted(str(o.client_order_id) for o in cache.orders_open()), "link": dict(self.link.counts),
            "lost": self.link.lost, "trade": None if trade is None else {r: str(i) for r, i in trade.ids.items()},
            "held": sum(p.quantity.as_double() * (1 if p.is_long else -1) for p in cache.positions_open()),
            "said": self.said, "closed": [list(row) for row in s.positions], "waits": sorted(s.recovery.waits) if s.recovery else [],
            "equity": None if account is None else account.balance_total(Currency.from_str("USD")).as_double(),
            "seen": s.last[0].ts if s.last[0] else 0,
        }  # fmt: skip

    def stop(self) -> None:
        self.done.set()


async def run(node: Any, director: Director) -> None:
    running = asyncio.ensure_future(node.run_async())
    obeying, waiting = asyncio.ensure_future(director.obey()), asyncio.ensure_future(director.done.wait())
    await asyncio.wait((running, waiting), return_when=asyncio.FIRST_COMPLETED)
    obeying.cancel()
    node.handle().stop()
    await asyncio.wait((running,), timeout=30)
    director.strategy.faults.reraise()


def live(state: Path, live: str, venue: str, port: int, resting: Any = "resend", **settings: Any) -> None:
    with locked(state):
        journal, faults = Journal(state, goes_on=True), Faults()
        feed = databento.client([SHARE], "XNAS.ITCH", DEMO_KEY, live=live, historical="http://127.0.0.1:1")
        broker = venue_client.client([SHARE], venue)
        chosen = Settings(flat_before_close_s=0.0, renew=False, **settings)
        limits = Limits(max_daily_loss=1.0, max_drawdown=1.0)
        terms = Terms([SHARE], chosen, limits, faults=faults, journal=journal, pace=Pace(OPEN, 0, 0.0))
        system = assemble(terms, Blind(), "venue_node:Directed")
        said: list[str] = []
        recover(system.strategy, journal, False, resting, said.append)
        director = Director(port, system.strategy, journal, broker.config.link)
        system.strategy.tell, director.said = director.tell, said
        node = live_node(system, [feed], [broker], False)
        director.tell(said=said)
        asyncio.run(run(node, director))
        journal.close(system.strategy.flat)
        director.tell(ended=director.status())


def main() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            code = 1
            try:
                asked = json.loads(line)
                live(Path(asked.pop("state")), **asked)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    sys.modules["venue_node"] = sys.modules["__main__"]
    main()
