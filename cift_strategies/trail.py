"""Structured logs that follow one event to its order: JSON lines, each with the `trail` of the event that everything began with.

The trail is the instrument and the `ts_init` of the newest event that the prediction saw: by these two the event is found in a recorded
session. `python -m cift_strategies.trail FILE` lists the trades, and with `--trade N` what led to one and became of it.
"""

from __future__ import annotations

import json
import sys
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from catalog.errors import InputError, exit_code, run_typer

MS: Final = 1_000_000


class Trail:
    """Appends to `file`, in batches; a disk that takes nothing is counted in `failed` and costs trading nothing."""

    def __init__(self, file: Path, instruments: int) -> None:
        self._file, self._waiting = file, list[str]()
        self._began: list[tuple[list[int], list[tuple[int, str]]]] = [([], []) for _ in range(instruments)]
        self.failed = 0

    def signal(self, k: int, told: dict[str, Any], first_order: int) -> None:
        """An entry of instrument `k`; its orders are numbered from `first_order` on."""
        trail = f"{told['symbol']}@{told['predicted_at']}"
        numbers, trades = self._began[k]
        numbers.append(first_order)
        trades.append((told["trade"], trail))
        self._write(trail, "signal", told)

    def order(self, k: int, told: dict[str, Any]) -> None:
        trade, trail = self._of(k, told["number"])
        self._write(trail, "order", {"trade": trade, **told})

    def fill(self, k: int, told: dict[str, Any]) -> None:
        self._write(self._of(k, told["order"])[1], "fill", told)

    def closed(self, k: int, told: dict[str, Any]) -> None:
        trail = next((trail for trade, trail in reversed(self._began[k][1]) if trade == told["number"]), "")
        self._write(trail, "closed", {"trade": told["number"], **told})

    def _of(self, k: int, order: int) -> tuple[int | None, str]:
        numbers, trades = self._began[k]
        at = bisect_right(numbers, order) - 1
        return trades[at] if at >= 0 else (None, "")

    def _write(self, trail: str, stage: str, told: dict[str, Any]) -> None:
        self._waiting.append(json.dumps({"ts": told.get("ts", told.get("closed")), "trail": trail, "stage": stage, **told}))

    def flush(self) -> None:
        if not self._waiting:
            return
        lines, self._waiting = self._waiting, []
        try:
            with self._file.open("a") as f:
                f.write("\n".join(lines) + "\n")
        except OSError:
            self.failed += len(lines)


def read(file: Path) -> Iterator[dict[str, Any]]:
    """The entries; a last line that was cut is left out. Raises InputError for a file that is none."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read the trail {file}: {e}") from None
    for n, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError:
            if n < len(lines):
                raise InputError(f"{file}, line {n}: this is no JSON; the file is no trail, or was changed") from None


def follow(entries: list[dict[str, Any]], trade: int) -> list[str]:
    """What led to `trade` and became of it, a line for each step with the time since its event. Raises InputError where there is none."""
    mine = [e for e in entries if e.get("trade") == trade]
    began = next((e for e in mine if e["stage"] == "signal"), None)
    if began is None:
        raise InputError(f"there is no trade {trade} in this trail")
    steps = [f"{(e['ts'] - began['predicted_at']) / MS:12.3f} ms  {_words(e)}" for e in sorted(mine, key=lambda e: e["ts"])]
    return [f"trade {trade}: event {began['trail']}", *steps]


def _words(e: dict[str, Any]) -> str:
    side = "buy" if e["side"] > 0 else "sell"
    if e["stage"] == "signal":
        return (
            f"decided: {side} {e['size']:g}, expects {e['expected_ticks']:.2f} ticks at costs of {e['cost_ticks']:.2f}, "
            f"confidence {e['confidence']:.2f}, regime {e['regime']}, limit {e['limit']:g}, stop {e['stop']:g}, target {e['target']:g}"
        )
    if e["stage"] == "order":
        at = "" if e["price"] is None else f" at {e['price']:g}"
        return f"order {e['id']} ({e['role']}): {side} {e['size']:g} {e['type']}{at}: {e['status']}, {e['filled']:g} filled"
    if e["stage"] == "fill":
        return f"fill ({e['role']}): {side} {e['size']:g} at {e['price']:g}, fee {e['fee']:g} {e['currency']}, {e['liquidity']}"
    return f"closed by {e['closed_by']}: net {e['net']:.2f} {e['currency']} (gross {e['gross']:.2f}, fees {e['fees']:.2f})"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help=__doc__)
def show(
    file: Annotated[Path, typer.Argument(help="trail.jsonl of a session's state folder")],
    trade: Annotated[int | None, typer.Option(help="number of the trade to follow")] = None,
) -> None:
    entries = list(read(file))
    if trade is not None:
        lines = follow(entries, trade)
    else:
        lines = [f"trade {e['trade']:>6}  {e['trail']}  {_words(e)}" for e in entries if e.get("stage") == "signal"]
    sys.stdout.write("\n".join([*lines, ""]))


if __name__ == "__main__":
    raise SystemExit(exit_code(lambda: run_typer(app)))
