"""What the journal costs, as ratios of CPU time to SQLite in memory with the same rows, and 100 kills at random moments.

`python -m uv run pytest tests/bench/test_bench_journal.py --benchmark-only -s` prints microseconds a write and seconds a recovery too.
"""

from __future__ import annotations

import random
import sqlite3
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from timing import best

from catalog.events import SCALE
from cift_strategies.journal import Journal, Sent
from cift_strategies.messages import Signal
from cift_strategies.recovery import Recovery
from cift_strategies.risk import Limits, Position
from cift_strategies.settings import Settings
from cift_strategies.strategy import EnsembleStrategy, Terms

sys.path.append(str(Path(__file__).parents[1] / "cift_strategies"))
from lives import ENDED, Lives, Nursery
from mortal import SHARES

N = 2_000
KILLS = 100
SIGNAL = Signal(0, 17, 16, 1, 3 * SCALE, 500_000_000, 2.5, 1.25, 0.75, 2, 99_990_000_000, 100_030_000_000, 99_950_000_000)
Filled = type("OrderFilled", (SimpleNamespace,), {})


class Written:
    """Each call writes N signals with their three orders, N fills or N marks."""

    def __init__(self, journal: Any) -> None:
        self.journal, self.n = journal, 0

    def signals(self) -> None:
        for _ in range(N):
            n = self.n = self.n + 1
            orders = [Sent(3 * n + i, role, f"O-{3 * n + i}", 1, 3.0, 99.99) for i, role in enumerate(("entry", "stop", "target"))]
            assert self.journal.signal(n, SIGNAL, SHARES[0].id, 99.99, orders)

    def fills(self) -> None:
        x = SHARES[0]
        for _ in range(N):
            n = self.n = self.n + 1
            row = (n, x.id, n, n, "entry", 1, 99.99, 3.0, 0.01, x.currency, "taker", 99.985, 99.985, 0.01)
            assert self.journal.fill(row, 3 * SCALE, Filled(client_order_id=f"F-{n}", venue_order_id="V", trade_id="T"))

    def marks(self) -> None:
        position = Position()
        for _ in range(N):
            self.n += 1
            self.journal.mark(self.n, SHARES[0].id, 99.985, 0.0, position)


class Memory(Journal):
    """The same rows into SQLite in memory: what is left is the file's part."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        there = self._db
        self._db = sqlite3.connect(":memory:", isolation_level=None)
        there.backup(self._db)
        there.close()


@pytest.mark.parametrize("kind", ["signals", "fills", "marks"])
def test_writing_before_acting_costs_a_small_part_of_a_decision(benchmark: BenchmarkFixture, tmp_path: Path, kind: str) -> None:
    (tmp_path / "memory").mkdir()
    file, memory = Written(Journal(tmp_path)), Written(Memory(tmp_path / "memory"))
    took, yardstick = best(getattr(file, kind), getattr(memory, kind))
    print(f"\n{kind}: {took / N * 1e6:.1f} us each, in memory {yardstick / N * 1e6:.1f} us")
    benchmark.extra_info |= {"us": took / N * 1e6, "ratio": took / yardstick}
    benchmark.pedantic(getattr(file, kind), rounds=1)
    assert took < 6 * yardstick


def test_a_long_account_is_there_again_in_time(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """20,000 fills and 200,000 marks: more than a day of trading each second."""
    journal, ledger, ts = Journal(tmp_path), EnsembleStrategy(Terms(SHARES, Settings(), Limits())).ledger, 0
    for n in range(20_000):
        side, x = 1 if n % 2 else -1, SHARES[0]
        row = (ts, x.id, n, n, "entry", side, 100 + n % 7 / 100, 3.0, 0.01, x.currency, "taker", 100.0, 100.0, 0.01)
        ledger.positions[0].fill(side, 3 * SCALE, row[6], 0.01, 1.0)
        journal.fill(row, 3 * SCALE, Filled(client_order_id=f"F-{n}", venue_order_id="V", trade_id="T"))
        for _ in range(10):
            ts += SCALE
            journal.mark(ts, x.id, 100.0, ledger.mark(0, 100.0, ts), ledger.positions[0])
    journal.close()

    def again() -> float:
        began, found = time.process_time(), EnsembleStrategy(Terms(SHARES, Settings(), Limits()))
        opened = Journal(tmp_path)
        Recovery(found, opened, simulated=True).restore()
        opened.close()
        assert found.ledger.pnl("USD") == ledger.pnl("USD") and len(found.fills) == 20_000
        return time.process_time() - began

    def read() -> float:
        began = time.process_time()
        with sqlite3.connect(tmp_path / "journal.sqlite") as db:
            assert len(db.execute("select * from marks").fetchall()) == 200_000
        return time.process_time() - began

    yardstick, took = min(read() for _ in range(3)), benchmark.pedantic(again, rounds=1)
    print(f"\nrecovery {took:.2f} s, reading its marks alone {yardstick:.2f} s")
    assert took < 20 * yardstick


def test_an_account_goes_on_after_each_of_100_kills_at_random_moments(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """Each life asserts that it began with what the journal held, to the cent, and that nothing is doubled."""
    moments = random.Random(5)

    def all_of_them() -> tuple[int, int]:
        held, trades = 0, 0
        with Nursery() as nursery:
            lives = Lives(nursery, tmp_path / "state")
            for n in range(KILLS):
                told, code = lives.live(seconds=moments.uniform(0.01, 2.0), horizon=n % 4)
                assert code == ENDED
                held += bool(told) and any(told[0]["size"])
            (_, venue, ended), code = lives.live(point="end", count=2)
            assert code == 0 and venue == {"venue": {}, "flat": True}
            lives.sound(ended, lives.sums())
            trades = ended["positions"]
        return held, trades

    held, trades = benchmark.pedantic(all_of_them, rounds=1)
    print(f"\n{KILLS} kills, {held} of them with a position, {trades} trades")
    assert held > KILLS // 10 and trades > KILLS // 10
