"""When the markets of a catalog did not trade: halts, auctions and closes, rolls and expiries. No label may reach into one.

Takes the catalog's status records, the rolls in `cift.json` and the expiries of the definitions; gives half-open spans of
ns UTC by instrument. They are told to the labels alone: a feature or a decision that saw a pause to come would look ahead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np

from catalog import status
from catalog.errors import InputError

type Spans = tuple[tuple[int, int], ...]
NEVER: Final = 2**63 - 1


def read(root: Path, expiries: dict[str, int]) -> dict[str, Spans]:
    """The pauses of each instrument id of `expiries` (ns UTC; NEVER where it has none), ascending: [from, to) while its market is in
    another state than open or unknown; [ts, ts) where a roll leaves it or comes to it, and at its expiry.

    Raises InputError for damaged files.
    """
    found: dict[str, list[tuple[int, int]]] = {id_: [(when, when)] for id_, when in expiries.items() if when < NEVER}
    for id_, (ts, state) in status.read(root, expiries).items():
        shut = (state != status.OPEN) & (state != status.UNKNOWN)
        ends = np.append(ts[1:], NEVER)
        begins = np.flatnonzero(shut & ~np.append(False, shut[:-1]))
        stops = np.flatnonzero(shut & ~np.append(shut[1:], False))
        found.setdefault(id_, []).extend(zip(ts[begins].tolist(), ends[stops].tolist()))
    for roll in rolls(root):
        for id_ in (roll["from"], roll["to"]):
            if id_ in expiries:
                found.setdefault(id_, []).append((roll["ts"], roll["ts"]))
    return {id_: tuple(sorted(spans)) for id_, spans in found.items()}


def rolls(root: Path) -> list[dict[str, Any]]:
    """The rolls that the import of a catalog found (:func:`catalog.rolls.schedule`), in order of time; none in catalogs made elsewhere."""
    note = root / "cift.json"
    if not note.is_file():
        return []
    try:
        told = json.loads(note.read_text()).get("rolls", [])
        return [{k: str(r[k]) for k in ("underlying", "from", "to")} | {"ts": int(r["ts"])} for r in told]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{note} is damaged ({e}): import the catalog again") from None
