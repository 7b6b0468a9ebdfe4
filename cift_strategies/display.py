"""What a person sees of a running session: a table that renews itself on a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, Final

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from catalog.events import SCALE
from cift_models.features import NAMES
from cift_strategies.messages import Prediction
from cift_strategies.serving import Serving
from cift_strategies.system import System

MID: Final = NAMES.index("mid")
PLAIN_S: Final = 10.0
LIVE_S: Final = 0.25
ARROWS: Final = {-1: "down", 0: "-", 1: "up"}


class Display:
    """Reads the state of `system` and `serving` when it is told to :meth:`show`; :meth:`say` prints a line of its own."""

    def __init__(self, system: System, serving: Serving, console: Console | None = None) -> None:
        self._system, self._serving = system, serving
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        self._status: Callable[[], dict[str, Any]] = dict
        self.every_s = LIVE_S if self._console.is_terminal else PLAIN_S

    def tell(self, status: Callable[[], dict[str, Any]]) -> None:
        """Where the state of the session is asked for; see Controls.status."""
        self._status = status

    def say(self, line: str) -> None:
        if self._live is not None:
            self._live.console.print(line)
        else:
            print(line, file=sys.stderr, flush=True)

    def show(self) -> None:
        if not self._console.is_terminal:
            self.say(self.line())
            return
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(self.table(), refresh=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    # --- what is shown ----------------------------------------------------------------------------------------------------------------

    def rows(self) -> list[tuple[str, str, str, str, str, str]]:
        """Of each instrument: id, mid, regime, the members' votes (of the shortest horizon with one), decision, position."""
        s, out = self._system.strategy, []
        for k, x in enumerate(s.terms.instruments):
            vector, p = s.last[k], self._system.inference.newest.get(k)
            mid = math.nan if vector is None else float(vector.rows[-1, MID])
            regime = s.terms.regimes[p.regime] if p is not None and 0 <= p.regime < len(s.terms.regimes) else "?"
            held = s.ledger.positions[k].size / SCALE
            digits = x.price_precision + 1
            said = "-" if p is None else ARROWS[next((d for d in p.direction if d), 0)]
            out.append((x.id, "-" if mid != mid else f"{mid:.{digits}f}", regime, self._votes(p), said, f"{held:+g}" if held else "0"))
        return out

    def _votes(self, p: Prediction | None) -> str:
        if p is None:
            return "-"
        told = []
        for name, vote in zip(self._serving.engine.members, p.votes):
            sound = [v for v in vote if v[0] == v[0]]
            if sound:
                told.append(f"{name} {sound[0][2] - sound[0][0]:+.2f}")
        return " ".join(told) or "none"

    def summary(self) -> str:
        s, status = self._system.strategy, self._status()
        pnl = " ".join(f"{s.ledger.pnl(c):+.2f} {c}" for c in s.ledger.currencies)
        stages = {name: t.told(name) for name, t in status.get("timings", {}).items()}
        names = ("p50_ms", "p99_ms", "p999_ms")
        waits = " ".join(f"{n} " + "/".join(f"{t[q]:.1f}" for q in names) for n, t in stages.items() if t["count"])
        feed = (status.get("feeds") or [{}])[0]
        counts = status.get("counts", {})
        health = "ok" if feed.get("connected") else "silent"
        state = f"{status.get('state', '')} {status.get('reason', '')}".strip()
        return (
            f"{state} | pnl {pnl} | fills {len(s.fills)} | p50/p99/p99.9 ms {waits or '-'}"
            f" | feed {health} {feed.get('events', 0):,} events"
            f" | queue {counts.get('queue', 0)} (p99 {counts.get('queue_p99', 0)}) skipped {counts.get('skipped', 0)}"
        )

    def line(self) -> str:
        each = "; ".join(f"{i} {mid} {regime} [{votes}] {said} {held}" for i, mid, regime, votes, said, held in self.rows())
        return f"{self.summary()} | {each}"

    def table(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for name in ("instrument", "mid", "regime", "votes (up - down)", "ensemble", "position"):
            table.add_column(name, no_wrap=True)
        for row in self.rows():
            table.add_row(*row)
        return Group(table, Text(self.summary()))


