"""What a session's replay finds equal with its recording: features, predictions and orders, and every one that is not, in words."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from catalog.events import Instrument
from cift_strategies.recording import mix_digest, votes_digest

if TYPE_CHECKING:
    from cift_models.inference import Predictions
    from cift_models.windows import Block

type Array = NDArray[Any]


@dataclass(slots=True)
class Compared:
    """One kind of thing: how many were recorded, how many are equal, and each that is not, in words."""

    recorded: int = 0
    equal: int = 0
    differ: list[dict[str, Any]] = field(default_factory=list)
    cut_off: int = 0  # computed again of what was not recorded any more, or recorded of events that were not

    def told(self) -> dict[str, Any]:
        return {"recorded": self.recorded, "equal": self.equal, "cut_off": self.cut_off, "differ": self.differ}


# --- predictions ----------------------------------------------------------------------------------------------------------------------


def numbered(instrument: Array, ts: Array) -> Array:
    """A key of each prediction: (instrument, ts, how many of both came before)."""
    out = np.zeros(len(ts), [("instrument", np.int64), ("ts", np.int64), ("n", np.int64)])
    out["instrument"], out["ts"] = instrument, ts
    order = np.lexsort((np.arange(len(ts)), ts, instrument))
    new = np.ones(len(ts), bool)
    new[1:] = (out["instrument"][order][1:] != out["instrument"][order][:-1]) | (out["ts"][order][1:] != out["ts"][order][:-1])
    place = np.arange(len(ts))
    out["n"][order] = place - np.maximum.accumulate(np.where(new, place, 0))
    return out


class Recorded:
    """The recorded predictions: which there are and their latencies for the replay, their digests for the comparison.

    `numbered`: whether they have the numbers of the stream's events; if not, all batches are taken for predicted.
    """

    def __init__(self, table: pa.Table, numbered: bool = True) -> None:
        self.instrument, self.ts, self._latency, self._votes, self._mix = (
            table[c].to_numpy() for c in ("instrument", "ts", "latency_ns", "votes_digest", "mix_digest")
        )
        at = table["at"].to_pylist() if numbered else []
        self._asked, self._last = set(at), at[-1] if at else -1
        self.passed = 0  # batches of the session that were not predicted
        self._next = 0
        self._mine: list[tuple[Array, Array, Array, Array]] = []

    def asked(self, event: int) -> bool:
        """Whether the batch that closes at this event of the stream was predicted in the session or, after a cut, would have been."""
        return event in self._asked or event > self._last

    def asking(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The stream's blocks, whose votes are asked for where the session did."""
        first = 0
        for b in blocks:
            closes = b.closes[[self.asked(first + n) for n in b.closes.tolist()]]
            self.passed += len(b.closes) - len(closes)
            first += len(b.events)
            yield b._replace(closes=closes, batches=b.closes)

    def draw(self, ts: Array, instrument: Array) -> NDArray[np.int64]:
        """As Delay.draw: how long each took in the session; 0 where that was not recorded."""
        a, n = self._next, len(ts)
        self._next += n
        if (self.ts[a : a + n].tolist(), self.instrument[a : a + n].tolist()) == (ts.tolist(), instrument.tolist()):
            return self._latency[a : a + n].astype(np.int64)
        known = dict(zip(zip(self.instrument.tolist(), self.ts.tolist()), self._latency.tolist()))
        return np.array([known.get(key, 0) for key in zip(instrument.tolist(), ts.tolist())], np.int64)

    def push(self, p: Predictions) -> None:
        if not len(p.ts):  # all batches of the block were passed over
            return
        self._mine.append((p.instrument.astype(np.int64), p.ts, votes_digest(p), mix_digest(p)))

    def compare(self, instruments: Sequence[Instrument], newest: int) -> Compared:
        """`newest`: stamp of the last recorded event; predictions that only one side could make are counted as cut off."""
        out = Compared(recorded=len(self.ts))
        instrument, ts, votes, mix = (np.concatenate(c) if c else np.empty(0, np.int64) for c in zip(*self._mine)) if self._mine else (
            np.empty(0, np.int64),) * 4
        theirs, ours = numbered(self.instrument, self.ts), numbered(instrument, ts)
        _, a, b = np.intersect1d(theirs, ours, assume_unique=True, return_indices=True)
        same_votes, same_mix = self._votes[a] == votes[b], self._mix[a] == mix[b]
        out.equal = int((same_votes & same_mix).sum())
        wrong = np.flatnonzero(~(same_votes & same_mix)).tolist()
        found = [
            (int(ts[b[i]]), int(instrument[b[i]]), "what the ensemble makes of the votes" if same_votes[i] else "votes") for i in wrong
        ]
        last = int(self.ts[-1]) if len(self.ts) else 0
        for keys, mine, what, end in ((theirs, a, "not made again", newest), (ours, b, "was not made in the session", last)):
            other = np.ones(len(keys), bool)
            other[mine] = False
            for key in keys[other]:
                if int(key["ts"]) >= end:
                    out.cut_off += 1
                else:
                    found.append((int(key["ts"]), int(key["instrument"]), what))
        out.differ = [{"ts": t, "instrument": instruments[k].id, "what": what} for t, k, what in sorted(found)]
        return out


# --- orders ---------------------------------------------------------------------------------------------------------------------------


type Key = tuple[Any, ...]


class Places:
    """What each order of a stream of notes belongs to: (instrument, stamp of the prediction, role, how many of these came before), which
    is the same in a session and in its replay where their running numbers are not."""

    def __init__(self) -> None:
        self._many: Counter[Key] = Counter()
        self._keys: dict[int, Key] = {}  # of each order's number
        self.numbers: dict[Key, int] = {}

    def next(self, *key: Any) -> Key:
        self._many[key] += 1
        return (*key, self._many[key])

    def of(self, what: dict[str, Any]) -> Key:
        """Of the order that a note tells of; the first one of it counts."""
        number = what["number"]
        if number not in self._keys:
            key = self._keys[number] = self.next(what["instrument"], what["signal"], what["role"])
            self.numbers[key] = number
        return self._keys[number]

    def key(self, number: int) -> Key | None:
        return self._keys.get(number)


def orders(notes: Iterable[tuple[int, int, str, Any]]) -> dict[Key, dict[str, Any]]:
    """What was ordered: signals and orders, each by what it belongs to, with terms and what came of them."""
    out: dict[Key, dict[str, Any]] = {}
    places = Places()
    for _, now, kind, what in notes:
        if kind == "signal":
            out[places.next(what["instrument"], what["predicted_at"], "signal")] = {"ts": now, "terms": what, "ends": []}
        elif kind == "order":
            one = out.setdefault(places.of(what), {"ts": now, "terms": {}, "ends": []})
            if what["event"] == "OrderSubmitted":
                one["terms"] = {n: what.get(n) for n in ("side", "quantity", "price", "trigger_price")}
            else:
                one["ends"].append([what["event"], *(what[n] for n in ("last_qty", "last_px", "liquidity_side") if n in what)])
    return out


def compare_orders(recorded: Any, again: Any) -> Compared:
    out, theirs, ours = Compared(), orders(recorded), orders(again)
    out.recorded = len(theirs)
    for key in sorted(theirs.keys() | ours.keys(), key=lambda k: ((theirs.get(k) or ours[k])["ts"], str(k))):
        a, b = theirs.get(key), ours.get(key)
        instrument, signal, role, n = key
        told = {"instrument": instrument, "signal": signal, "role": role, "number": n, "ts": (a or b)["ts"]}  # type: ignore[index]
        if a is None or b is None:
            out.differ.append({**told, "what": "not sent again" if b is None else "was not sent in the session"})
        elif a["terms"] != b["terms"]:
            changed = [f"{n} {a['terms'].get(n)} / {b['terms'].get(n)}" for n in a["terms"].keys() | b["terms"].keys()
                       if a["terms"].get(n) != b["terms"].get(n)]  # fmt: skip
            out.differ.append({**told, "what": "terms: " + ", ".join(sorted(changed))})
        elif a["ends"] != b["ends"]:
            out.differ.append({**told, "what": f"what came of it: {_ends(a['ends'])} / {_ends(b['ends'])}"})
        else:
            out.equal += 1
    return out


def _ends(events: Sequence[Sequence[str]]) -> str:
    return "; ".join(" ".join(e).replace("Order", "", 1).lower() for e in events) or "nothing"


def say(session: dict[str, Any], most: int = 20) -> None:
    """A table of what is equal, and the first of each that is not."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout)
    table = Table(box=None, pad_edge=False)
    for name in ("", "recorded", "equal", "not equal", "cut off"):
        table.add_column(name, justify="left" if not name else "right")
    for kind in ("features", "predictions", "orders"):
        c = session[kind]
        table.add_row(kind, *(f"{n:,}" for n in (c["recorded"], c["equal"], len(c["differ"]), c["cut_off"])))
    console.print(table)
    for kind in ("features", "predictions", "orders"):
        for one in session[kind]["differ"][:most]:
            rest = " ".join(f"{k} {v}" for k, v in one.items() if k not in ("what",))
            print(f"{kind}: {rest}: {one['what']}")
        if (more := len(session[kind]["differ"]) - most) > 0:
            print(f"{kind}: {more:,} more in session.json")
    for line in session["notes"]:
        print(line)
