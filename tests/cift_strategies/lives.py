"""Lives of one account, one process each, and what must hold between them: the journal's fills make the ledger, and nothing is doubled."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from mortal import SHARES

ROOT = Path(__file__).parents[2]
DIED = -signal.SIGKILL
ENDED = -signal.SIGALRM


class Nursery:
    """The process of `mortal.py`, that lives are forked from."""

    def __init__(self) -> None:
        paths = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
        alone = {f"{n}_NUM_THREADS": "1" for n in ("OMP", "OPENBLAS", "MKL", "NUMBA")}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(Path(__file__).parent / "mortal.py")], cwd=ROOT, text=True,
            env=os.environ | {"PYTHONPATH": paths} | alone, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _, said = self._process.communicate()
        if kind is not None:
            print(said, file=sys.stderr)

    def born(self, **how: Any) -> tuple[list[dict[str, Any]], int]:
        """A life: what it told, and its exit code."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps(how) + "\n")
        stdin.flush()
        told: list[dict[str, Any]] = []
        for line in stdout:
            told.append(json.loads(line))
            if "exit" in told[-1]:
                return told[:-1], int(told[-1]["exit"])
        raise AssertionError("the process that starts them has ended")


@dataclass(frozen=True)
class Lives:
    """Lives of one state folder, one after the other."""

    nursery: Nursery
    state: Path

    def live(self, **how: Any) -> tuple[list[dict[str, Any]], int]:
        """One life: what it told, and its exit code. Where it goes on, it begins with what the journal held after the one before."""
        sums = self.sums() if (self.state / "journal.sqlite").exists() else None
        told, code = self.nursery.born(state=str(self.state), **how)
        if sums is not None and told and told[0]["session"] != told[0]["account"]:
            self.sound(told[0], sums)
        return told, code

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with sqlite3.connect(self.state / "journal.sqlite") as db:
            return db.execute(query).fetchall()

    def sums(self) -> dict[str, Any]:
        """What the journal's rows add up to: PnL from cash paid and received and the last prices, without average costs or a ledger."""
        fills = self.rows("select instrument, side * raw, price, fee from fills order by seq")
        mids = {name: price for name, _, price, _ in fills}  # killed between its first fill and that one's mark
        mids |= dict(self.rows("select instrument, mid from marks where mid is not null order by seq"))
        size, fees, cash = Counter[str](), Counter[str](), 0.0
        for name, signed, price, fee in fills:
            size[name] += signed
            fees[name] += fee
            cash -= signed * price / 1e9 + fee
        numbers, signals = (self.rows(f"select count(*), max(number) from {t}")[0] for t in ("sent", "signals"))
        assert numbers[0] == (numbers[1] or -1) + 1 and signals[0] == (-1 if signals[1] is None else signals[1]) + 1
        return {
            "size": [size[x.id] for x in SHARES], "fees": [fees[x.id] for x in SHARES], "fills": len(fills),
            "pnl": cash + sum(n * mids[name] / 1e9 for name, n in size.items() if n), "numbers": numbers[0], "signals": signals[0],
            "equity": [list(m) for m in self.rows("select ts, pnl from marks order by seq desc limit 1")],
        }  # fmt: skip

    def sound(self, told: dict[str, Any], sums: dict[str, Any]) -> None:
        """What a life tells is what the journal adds up to, to the cent, and nothing in it is there twice."""
        for name, value in sums.items():
            assert told[name] == (pytest.approx(value, abs=0.005) if name in ("pnl", "fees") else value), name
        assert self.rows("select client_order_id from sent group by client_order_id having count(*) > 1") == []
        assert self.rows("select f.rowid from fills f left join sent s using (client_order_id) where s.number is null") == []
        more = "select number from fills f join sent s using (client_order_id) group by number having sum(f.raw) > s.size * 1e9 + 1"
        assert self.rows(more) == []
        assert self.rows("select trade from closed group by trade having count(*) > 1") == []
