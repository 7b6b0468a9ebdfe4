"""How a sweep goes on, on standard error: a live table on a terminal, a line for each finished run elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from cift_strategies.sweep import Trial

SHOWN: Final = 12  # best runs of the table


class Board:
    """``with Board(total, names, objective, direction) as b: b.tell(trial)``."""

    def __init__(self, total: int, names: Sequence[str], objective: str, direction: str) -> None:
        self._total, self._names, self._objective, self._sign = total, list(names), objective, -1 if direction == "maximize" else 1
        self._told: list[Trial] = []
        self._stage = ""
        self._live: Any = None

    def __enter__(self) -> Board:
        self._began = time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(self._table(), console=Console(stderr=True), refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.update(self._table())
            self._live.stop()

    def stage(self, what: str) -> None:
        """What is being done for several runs at once."""
        self._stage = what
        if self._live is not None:
            self._live.update(self._table())
        elif what:
            print(what, file=sys.stderr, flush=True)

    def tell(self, t: Trial) -> None:
        """One run is there."""
        self._told.append(t)
        if self._live is not None:
            self._live.update(self._table())
            return
        values = ", ".join(f"{k} = {short(t.point[k])}" for k in self._names)
        came = f"refused: {t.error}" if t.error else f"{self._objective} {short(t.score)}" + (" (kept from before)" if t.before else "")
        print(f"{len(self._told)} of {self._total}: run {t.number}, {values}: {came}", file=sys.stderr, flush=True)

    def _table(self) -> Any:
        from rich.table import Table

        done, refused = len(self._told), sum(bool(t.error) for t in self._told)
        state = f"{done} of {self._total} runs, {time.monotonic() - self._began:.0f} s"
        state += f", {refused} refused" if refused else ""
        table = Table(title=f"{state}; {self._stage}" if self._stage else state, title_justify="left")
        for name in ("run", *self._names, self._objective, "fills", "net"):
            table.add_column(name.replace(".", " ").replace("_", " "), justify="right")  # in several lines where the terminal is narrow
        scored = sorted((t for t in self._told if t.score is not None), key=lambda t: self._sign * (t.score or 0.0))
        for t in scored[:SHOWN]:
            assert t.result is not None
            s = t.result["summary"]
            table.add_row(
                str(t.number), *(short(t.point[k]) for k in self._names), short(t.score), f"{s['fills']:,}", short(s["pnl_net"])
            )  # fmt: skip
        return table


def short(value: Any) -> str:
    """Four figures of a number; of several currencies each."""
    if isinstance(value, dict):
        return ", ".join(f"{short(v)} {c}" for c, v in value.items())
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
