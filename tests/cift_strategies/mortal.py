"""A node that trades a small market of its own in the sandbox, and dies by SIGKILL at a named point; started again, it goes on.

`python mortal.py` reads lives from its standard input, each a line of JSON with `state` and `point`: one of POINTS, reached for the
`count`-th time, or "end": `count` trades more, then an end in order; or with `seconds`: so long after its first prices the kernel ends it,
in whatever instruction; and with `settings`, `resting`, and the number of the `horizon` that is traded. Each life is a process, forked from
one that has everything imported; its lines of JSON tell how it began and, in order, ended; the last one its exit code.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Final

import numpy as np
from nautilus_trader.config import DataClientConfig
from nautilus_trader.live.clients import DataClientFactory, MarketDataClient
from nautilus_trader.model import InstrumentId, Price, Quantity, QuoteTick, Venue

from catalog.events import EVENT, SCALE, Instrument
from cift_models.features import NAMES, new_state
from cift_models.windows import HORIZONS_NS, closes, new_batches
from cift_strategies.faults import Faults
from cift_strategies.journal import Journal
from cift_strategies.live_config import locked
from cift_strategies.messages import Prediction
from cift_strategies.recovery import recover
from cift_strategies.risk import Limits
from cift_strategies.settings import Settings
from cift_strategies.strategy import EnsembleStrategy, Terms
from cift_strategies.system import Client, assemble, live_node, sandbox

POINTS: Final = (
    "a signal is decided", "signal and orders are written", "the entry is submitted", "the entry is accepted", "the entry is filled",
    "the entry's fill is written", "the stop is accepted", "the exit is written", "the exit is submitted", "the exit's fill is written",
    "the trade's end is written", "a forgotten position is told to the venue",
)  # fmt: skip
SHARES: Final = tuple(
    Instrument(f"{name}.XTST", SCALE // 100, SCALE, 1.0, "USD", kind="equity", level=1, taker_fee=1e-5) for name in ("ONE", "TWO")
)
EVERY_S: Final = 0.002

point, left = "end", 1


def reached(name: str) -> None:
    """Die here, if this is the point."""
    global left
    if point == name:
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)


class Quotes(MarketDataClient):
    """A random walk of one tick wide markets, stamped by the wall."""

    async def _connect(self) -> None:
        self.create_task(self._run(), "quotes")

    async def _disconnect(self) -> None:
        pass

    async def _subscribe_quotes(self, command: Any) -> None:
        pass

    async def _subscribe_trades(self, command: Any) -> None:
        pass

    async def _run(self) -> None:
        walk, size = random.Random(7), Quantity.from_int(100_000)
        ids, at = [InstrumentId.from_str(x.id) for x in SHARES], [10_000, 5_000]
        while True:
            for k, id_ in enumerate(ids):
                at[k] += walk.choice((-1, 0, 0, 1))
                ts = time.time_ns()
                self._handle_data(QuoteTick(id_, Price(at[k] / 100, 2), Price((at[k] + 1) / 100, 2), size, size, ts, ts))
            await asyncio.sleep(EVERY_S)


class QuotesFactory(DataClientFactory):
    @staticmethod
    def create(*, name: str, config: Any, cache: Any, clock: Any) -> Quotes:
        return Quotes(name=name, config=config, cache=cache, clock=clock, venue=Venue(name))


class Coins:
    """Every fifth batch has a view, by the toss of a coin."""

    def __init__(self, horizon: int, seconds: float) -> None:
        self.coin, self.n, self.horizon, self.seconds = random.Random(), 0, horizon, seconds

    def predict(self, vector: Any) -> list[Prediction]:
        found = []
        if not self.n and self.seconds:
            signal.setitimer(signal.ITIMER_REAL, self.seconds)  # SIGALRM, which nobody handles
        for i in vector.closes:
            self.n += 1
            side = self.coin.choice((-1, 1)) if self.n % 5 == 0 else 0
            proba = np.tile([0.0, 0.2, 0.8] if side >= 0 else [0.8, 0.2, 0.0], (4, 1))
            ts = int(vector.events["ts_init"][i])
            size, direction, votes = np.full(4, 4.0), tuple(side * (h == self.horizon) for h in range(4)), np.zeros((0, 4, 3), np.float32)
            found.append(Prediction(vector.instrument, ts, 0, HORIZONS_NS, proba, size, np.ones(4), direction, -1, votes, "coins"))
        return found


class Mortal(EnsembleStrategy):
    def enter(self, signal: Any) -> None:
        reached("a signal is decided")
        super().enter(signal)

    def submit_order_list(self, *args: Any, **named: Any) -> None:
        reached("signal and orders are written")
        super().submit_order_list(*args, **named)
        reached("the entry is submitted")

    def submit_order(self, order: Any, *args: Any, **named: Any) -> None:
        role = self.orders[order.client_order_id][1]
        if role == "exit":
            reached("the exit is written")
        super().submit_order(order, *args, **named)
        if role == "exit":
            reached("the exit is submitted")
        elif role == "seed":
            reached("a forgotten position is told to the venue")

    def on_order_event(self, event: Any) -> None:
        role, kind = self.orders[event.client_order_id][1], type(event).__name__
        if kind == "OrderAccepted" and role == "entry":
            reached("the entry is accepted")
        elif kind == "OrderFilled" and role == "entry":
            reached("the entry is filled")
        super().on_order_event(event)
        if kind == "OrderAccepted" and role == "stop":
            reached("the stop is accepted")


class Witness(Journal):
    def fill(self, row: Any, raw: int, event: Any) -> bool:
        known = super().fill(row, raw, event)
        reached("the entry's fill is written" if row[4] == "entry" else "the exit's fill is written")
        return known

    def closed(self, trade: int, ts: int, by: str, row: Any) -> None:
        super().closed(trade, ts, by, row)
        if row is not None:
            reached("the trade's end is written")


def told(strategy: Any, journal: Journal) -> dict[str, Any]:
    ledger = strategy.ledger
    return {
        "session": journal.session, "account": journal.account, "size": [p.size for p in ledger.positions], "pnl": ledger.pnl("USD"),
        "realised": [p.realised for p in ledger.positions], "fees": [p.fees for p in ledger.positions], "fills": len(strategy.fills),
        "equity": [[t, v] for t, _, v in strategy.equity[-1:]], "numbers": strategy.numbers, "signals": strategy.signals,
        "open": [None if t is None else [t.number, t.signal.stop, t.signal.target, t.until] for t in strategy.trades],
        "decisions": dict(strategy.decisions), "positions": len(strategy.positions),
    }  # fmt: skip


async def run(strategy: Any, node: Any, trades: int | None) -> None:
    running = asyncio.ensure_future(node.run_async())
    enough = len(strategy.positions) + (trades or 0)
    until = time.monotonic() + 60
    while strategy.faults.first is None and time.monotonic() < until and not running.done():
        await asyncio.sleep(0.02)
        if trades is not None and len(strategy.positions) >= enough and not (strategy.recovery and strategy.recovery.waits):
            strategy.halt("stopping", "stopping")
            strategy.flatten("session ends")
            if strategy.flat:
                break
    held = {str(p.instrument_id): p.quantity.as_double() for p in strategy.cache.positions_open()}
    strategy.faults.reraise()
    print(json.dumps({"venue": held, "flat": strategy.flat}), flush=True)
    node.handle().stop()
    await asyncio.wait([running], timeout=30)


def live(state: Path, settings: Settings, resting: Any, horizon: int, seconds: float) -> None:
    with locked(state):
        journal, faults = Witness(state), Faults()
        terms = Terms(SHARES, settings, Limits(max_daily_loss=1.0, max_drawdown=1.0), faults=faults, journal=journal)
        system = assemble(terms, Coins(horizon, seconds), "mortal:Mortal")
        strategy = system.strategy
        recover(strategy, journal, True, resting, lambda line: print(line, file=sys.stderr))
        print(json.dumps(told(strategy, journal)), flush=True)
        feed = Client("QUOTES", QuotesFactory, DataClientConfig())
        node = live_node(system, [feed], sandbox(SHARES, 1_000_000.0, 0, faults), True)
        asyncio.run(run(strategy, node, left if point == "end" else None))
        print(json.dumps(told(strategy, journal)), flush=True)
        journal.close(strategy.flat)


def main() -> None:
    global point, left
    warm = Instrument("WARM.XTST", SCALE, SCALE, 1.0, "USD")
    new_state(warm).advance(np.zeros(1, EVENT), np.empty((1, len(NAMES))))
    closes(new_batches(1), np.zeros(1, EVENT))
    for line in sys.stdin:
        life = json.loads(line)
        pid = os.fork()
        if not pid:
            point, left = life.get("point", ""), life.get("count", 1)
            code = 1
            try:
                settings = Settings(min_edge_ticks=0.0, flat_before_close_s=0.0, renew=False, **life.get("settings", {}))
                live(Path(life["state"]), settings, life.get("resting", "resend"), life.get("horizon", 0), life.get("seconds", 0.0))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        print(json.dumps({"exit": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}), flush=True)


if __name__ == "__main__":
    sys.modules["mortal"] = sys.modules["__main__"]
    main()
