"""When the markets of a catalog did not trade: halts, auctions and closes, rolls and expiries. No label may reach into one.

Takes the catalog's status records, its rolls and the expiries of the definitions; gives half-open spans of ns UTC by instrument. They are
told to the labels alone: a feature or a decision that saw a pause to come would look ahead.
"""

from __future__ import annotations

from pathlib import Path

from catalog import rolls, status

type Spans = tuple[tuple[int, int], ...]


def read(root: Path, expiries: dict[str, int]) -> dict[str, Spans]:
    """The pauses of each instrument id of `expiries` (ns UTC; `rolls.NEVER` where it has none), ascending: [from, to) while its market
    is in another state than open or unknown; [ts, ts) where a roll leaves it or comes to it, and at its expiry.

    Raises InputError for damaged files.
    """
    found: dict[str, list[tuple[int, int]]] = {id_: [(when, when)] for id_, when in expiries.items() if when < rolls.NEVER}
    for id_, steps in status.read(root, expiries).items():
        found.setdefault(id_, []).extend(status.shut(steps))
    for roll in rolls.rolls(root):
        for id_ in (roll["from"], roll["to"]):
            if id_ in expiries:
                found.setdefault(id_, []).append((roll["ts"], roll["ts"]))
    return {id_: tuple(sorted(spans)) for id_, spans in found.items()}
