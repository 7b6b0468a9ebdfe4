"""Whether a market trades, is in an auction, is halted or closed: Databento's status records, kept as NautilusTrader keeps them.

:func:`read_status` reads a DBN file of schema status, :func:`write` keeps what a catalog's instruments need as Nautilus's InstrumentStatus
(data/instrument_status/<id>/), :func:`trading_state` reads it from any catalog as a step function, and :func:`at` evaluates it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from catalog.dbn import Dbn, Numbers
from catalog.errors import InputError
from catalog.parquet import TIME, WORD
from catalog.writer import stamp

type Steps = tuple[NDArray[np.int64], NDArray[np.int8]]  # from each `ts_init` on, ascending, the market is in this state
KIND: Final = "instrument_status"
STATUS: Final = np.dtype(
    [("head", "V4"), ("instrument_id", "<u4"), ("ts_event", "<u8"), ("ts_recv", "<u8"), ("action", "<u2"), ("reason", "<u2"),
     ("trading_event", "<u2"), ("is_trading", "S1"), ("is_quoting", "S1"), ("is_short_sell_restricted", "S1"), ("reserved", "V7")]
)  # fmt: skip
UNKNOWN, CLOSED, OPEN, AUCTION, HALTED = -1, 0, 1, 2, 3
STATES: Final = {CLOSED: "closed", OPEN: "open", AUCTION: "auction", HALTED: "halted"}
ACTIONS: Final = {  # Databento's StatusAction: Nautilus's name of it, and the state it begins (None: the state goes on)
    0: ("NONE", None), 1: ("PRE_OPEN", AUCTION), 2: ("PRE_CROSS", AUCTION), 3: ("QUOTING", AUCTION), 4: ("CROSS", AUCTION),
    5: ("ROTATION", AUCTION), 6: ("NEW_PRICE_INDICATION", None), 7: ("TRADING", OPEN), 8: ("HALT", HALTED), 9: ("PAUSE", HALTED),
    10: ("SUSPEND", HALTED), 11: ("PRE_CLOSE", AUCTION), 12: ("CLOSE", CLOSED), 13: ("POST_CLOSE", CLOSED),
    14: ("SHORT_SELL_RESTRICTION_CHANGE", None), 15: ("NOT_AVAILABLE_FOR_TRADING", CLOSED),
}  # fmt: skip
_NAMED: Final = dict(ACTIONS.values())
_SCHEMA: Final = pa.schema(
    [pa.field("action", WORD, False), pa.field("ts_event", TIME, False), pa.field("ts_init", TIME, False), pa.field("reason", pa.string()),
     pa.field("trading_event", pa.string()), *(pa.field(f"is_{f}", pa.bool_()) for f in ("trading", "quoting", "short_sell_restricted"))]
)  # fmt: skip


def state_of(action: str, trades: bool | None) -> int | None:
    """The state that `action` (a name of :data:`ACTIONS`) begins, or, where it is NONE, that `trades` tells of; None: the state goes on."""
    return _NAMED[action] if action != "NONE" or trades is None else OPEN if trades else HALTED


class Status(NamedTuple):
    """From `ts_init` on the market of `symbol` is in `state`, because of `action` (a name of :data:`ACTIONS`) at `ts_event`; ns UTC."""

    symbol: str
    ts_event: int
    ts_init: int
    action: str
    state: int


def read_status(path: Path, symbols: Mapping[int, str] | None = None) -> list[Status]:
    """The changes of state that a DBN file of schema status tells, in file order; records that change nothing are left out.

    `symbols`: names of instrument ids where the file's own symbols are not the venue's. Raises InputError for another schema or damage.
    """
    file = Dbn(path)
    if file.schema != "status":
        raise InputError(f"{path} holds {file.schema}, not status")
    numbers = Numbers(file.spans)
    out = []
    for first, data, spans in file.records(0x12, STATUS.itemsize):
        if spans:
            numbers.learn(spans)
        for n, r in enumerate(np.ascontiguousarray(data[:, : STATUS.itemsize]).view(STATUS)[:, 0]):
            if int(r["action"]) not in ACTIONS or int(r["ts_recv"]) >= 2**63:
                raise InputError(f"{path} is damaged at record {first + n:,}: it has no known action or time; download it again")
            name, _ = ACTIONS[int(r["action"])]
            state = state_of(name, {b"Y": True, b"N": False}.get(bytes(r["is_trading"])))
            if state is None:
                continue
            number, ts = int(r["instrument_id"]), int(r["ts_recv"])
            ts_event = int(r["ts_event"]) if int(r["ts_event"]) < 2**63 else ts
            named = [symbols[number]] if symbols and not file.raw_symbols and number in symbols else numbers.at(number, ts)
            out += [Status(symbol, ts_event, ts, name, state) for symbol in named]
    return out


def write(root: Path, states: Iterable[Status], ids: Mapping[str, str], start: int, end: int) -> int:
    """Keep the states of the instruments `ids` (symbol -> instrument id) in the catalog `root`: those within [start, end] and of each
    instrument the last before. Returns the rows written; no file where there are none."""
    rows = sorted((s for s in states if s.symbol in ids and s.ts_init <= end), key=lambda s: (ids[s.symbol], s.ts_init))
    total = 0
    for symbol, group in itertools.groupby(rows, key=lambda s: s.symbol):
        mine = list(group)
        kept = mine[max(0, sum(s.ts_init <= start for s in mine) - 1) :]
        folder = root / "data" / KIND / ids[symbol].replace("/", "")
        folder.mkdir(parents=True, exist_ok=True)
        told = [{"action": s.action, "ts_event": s.ts_event, "ts_init": s.ts_init, "is_trading": s.state == OPEN} for s in kept]
        table = pa.Table.from_pylist(told, _SCHEMA.with_metadata({"instrument_id": ids[symbol], "type_name": "InstrumentStatus"}))
        pq.write_table(table, folder / f"{stamp(kept[0].ts_init)}_{stamp(kept[-1].ts_init)}.parquet")
        total += len(kept)
    return total


def read(root: Path, ids: Iterable[str]) -> dict[str, Steps]:
    """(`ts_init`, state) of those instruments `ids` whose states a catalog knows, ascending. Raises InputError for a damaged file."""
    found: dict[str, list[Steps]] = {}
    for path in (p for i in ids for p in sorted((root / "data" / KIND / i.replace("/", "")).glob("*.parquet"))):
        try:
            table = pq.read_table(path, columns=["action", "is_trading", "ts_init"])
            id_ = (pq.read_schema(path).metadata or {}).get(b"instrument_id", path.parent.name.encode()).decode()
            ts, told = table["ts_init"].cast(pa.int64()).to_numpy(), zip(table["action"].to_pylist(), table["is_trading"].to_pylist())
            states = [state_of(a, t) for a, t in told]
        except (pa.ArrowException, OSError, KeyError, ValueError) as e:
            raise InputError(f"{path} is damaged ({str(e).splitlines()[0][:120]}): write or import the catalog again") from None
        known = np.array([s is not None for s in states], np.bool_)
        found.setdefault(id_, []).append((ts[known], np.array([s for s in states if s is not None], np.int8)))
    steps = {}
    for id_, parts in found.items():
        ts, state = (np.concatenate(c) for c in zip(*parts))
        order = np.argsort(ts, kind="stable")
        steps[id_] = ts[order], state[order]
    return steps


def by_symbol(states: Iterable[Status]) -> dict[str, Steps]:
    """(`ts_init`, state) of each symbol, ascending."""
    ordered = sorted(states, key=lambda s: (s.symbol, s.ts_init))
    groups = ((symbol, list(g)) for symbol, g in itertools.groupby(ordered, key=lambda s: s.symbol))
    return {symbol: (np.array([s.ts_init for s in g]), np.array([s.state for s in g], np.int8)) for symbol, g in groups}


def trading_state(root: Path, instrument: str) -> Steps:
    """See :func:`catalog.events.trading_state`."""
    return read(root, [instrument]).get(instrument, (np.empty(0, np.int64), np.empty(0, np.int8)))


def at(steps: Steps, ts: Any) -> Any:
    """The state at each time of `ts` (ns UTC, int64 array): that of the last step at or before it, UNKNOWN before the first."""
    when, state = steps
    return np.append(state, np.int8(UNKNOWN))[np.searchsorted(when, ts, "right") - 1]


def shut(steps: Steps) -> list[tuple[int, int]]:
    """When the market is in another state than open or unknown: half-open spans, ns UTC, ascending, the last perhaps for ever."""
    when, state = steps
    closed = (state != OPEN) & (state != UNKNOWN)
    ends = np.append(when[1:], np.int64(2**63 - 1))
    begins, stops = closed & ~np.append(False, closed[:-1]), closed & ~np.append(closed[1:], False)
    return list(zip(when[begins].tolist(), ends[stops].tolist()))


def close_after(steps: Steps, ts: int) -> int:
    """When the market closes next after `ts` (ns UTC), half-days and holidays included; the end of time where the records tell of no close.

    Over history this is the calendar, which exchanges publish long before; no halt or auction is looked up that way.
    """
    when, state = steps
    ahead = np.flatnonzero((when > ts) & (state == CLOSED))
    return int(when[ahead[0]]) if len(ahead) else 2**63 - 1
