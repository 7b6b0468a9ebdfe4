"""What a client's symbols mean on a tape: raw symbols, instrument ids, parents.

Takes the symbols of a segment and those asked for; gives each with its :class:`catalog.dbn.Span`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from catalog.dbn import Span

if TYPE_CHECKING:
    from cift_strategies.feeds.tape import Segment, Tape

STYPES: Final = ("raw_symbol", "instrument_id", "parent")
CLASSES: Final = {"FUT": "FS", "OPT": "CPTM", "SPOT": "X"}  # instrument classes of a parent's suffix


@dataclass(frozen=True, slots=True)
class Unresolved:
    """Some symbols have no meaning here; `rest` have."""

    names: tuple[str, ...]
    rest: list[tuple[str, Span]]


def resolve(segment: Segment, names: Iterable[str] | None, stype: str, tape: Tape) -> list[tuple[str, Span]] | Unresolved:
    """(symbol asked for, its meaning) pairs; a parent has several. `names` None: all symbols of the segment."""
    if names is None:
        return [(s.symbol, s) for s in segment.spans]
    found: list[tuple[str, Span]] = []
    if stype == "parent":
        children = parents(tape)
        for name in names:
            found += [(name, s) for s in segment.spans if s.number in children.get(name, ())]
    else:
        for s in segment.spans:
            key = s.symbol if stype == "raw_symbol" else str(s.number)
            if key in names:
                found.append((key, s))
    missing = tuple(sorted(set(names) - {n for n, _ in found}))
    return Unresolved(missing, found) if missing else found


def parents(tape: Tape) -> dict[str, set[int]]:
    """Instrument ids by parent symbol ("ES.FUT"), from the definitions on the tape."""
    dbn: Any = importlib.import_module("databento_dbn")
    found: dict[str, set[int]] = {}
    decoder = dbn.DBNDecoder(has_metadata=False, input_version=3)
    for r in decoder.write_and_decode(tape.stream("definition").records.tobytes()):
        kind = str(getattr(r.instrument_class, "value", r.instrument_class))
        for suffix, classes in CLASSES.items():
            if kind in classes:
                found.setdefault(f"{r.asset}.{suffix}", set()).add(int(r.instrument_id))
    return found
