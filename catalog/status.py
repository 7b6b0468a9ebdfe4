"""Whether a market trades, is in an auction, is halted or closed: from Databento's status records, kept beside a catalog.

:func:`read_status` reads a DBN file of schema status, :func:`write` keeps what a catalog's instruments need as `status.parquet` at its
root, :func:`trading_state` reads it as a step function, and :func:`at` evaluates it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from catalog.dbn import Dbn, Numbers
from catalog.errors import InputError

FILE: Final = "status.parquet"
STATUS: Final = np.dtype(
    [("head", "V4"), ("instrument_id", "<u4"), ("ts_event", "<u8"), ("ts_recv", "<u8"), ("action", "<u2"), ("reason", "<u2"),
     ("trading_event", "<u2"), ("is_trading", "S1"), ("is_quoting", "S1"), ("is_short_sell_restricted", "S1"), ("reserved", "V7")]
)  # fmt: skip
UNKNOWN, CLOSED, OPEN, AUCTION, HALTED = -1, 0, 1, 2, 3
STATES: Final = {CLOSED: "closed", OPEN: "open", AUCTION: "auction", HALTED: "halted"}
ACTIONS: Final = {  # Databento's StatusAction: its name, and the state it begins (None: the state goes on)
    0: ("none", None), 1: ("pre_open", AUCTION), 2: ("pre_cross", AUCTION), 3: ("quoting", AUCTION), 4: ("cross", AUCTION),
    5: ("rotation", AUCTION), 6: ("new_price_indication", None), 7: ("trading", OPEN), 8: ("halt", HALTED), 9: ("pause", HALTED),
    10: ("suspend", HALTED), 11: ("pre_close", AUCTION), 12: ("close", CLOSED), 13: ("post_close", CLOSED), 14: ("ssr_change", None),
    15: ("not_available_for_trading", CLOSED),
}  # fmt: skip


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
            name, state = ACTIONS[int(r["action"])]
            if state is None:
                if name != "none" or bytes(r["is_trading"]) not in (b"Y", b"N"):
                    continue
                state = OPEN if bytes(r["is_trading"]) == b"Y" else HALTED
            number, ts = int(r["instrument_id"]), int(r["ts_recv"])
            ts_event = int(r["ts_event"]) if int(r["ts_event"]) < 2**63 else ts
            named = [symbols[number]] if symbols and not file.raw_symbols and number in symbols else numbers.at(number, ts)
            out += [Status(symbol, ts_event, ts, name, state) for symbol in named]
    return out


def write(root: Path, states: Iterable[Status], ids: Mapping[str, str], start: int, end: int) -> int:
    """Keep the states of the instruments `ids` (symbol -> instrument id) as `root`/status.parquet: those within [start, end] and of each
    instrument the last before. Returns the rows written; no file where there are none."""
    rows = sorted((s for s in states if s.symbol in ids and s.ts_init <= end), key=lambda s: (ids[s.symbol], s.ts_init))
    follow = [(s.symbol, s.ts_init) for s in rows[1:]] + [("", 0)]
    kept = [s for s, (symbol, ts) in zip(rows, follow) if s.ts_init >= start or symbol != s.symbol or ts > start]
    if kept:
        stamp = pa.timestamp("ns", tz="UTC")
        table = pa.table(
            {
                "instrument_id": [ids[s.symbol] for s in kept],
                "state": [STATES[s.state] for s in kept],
                "action": [s.action for s in kept],
                "ts_event": pa.array([s.ts_event for s in kept], pa.int64()).cast(stamp),
                "ts_init": pa.array([s.ts_init for s in kept], pa.int64()).cast(stamp),
            }
        )
        pq.write_table(table, root / FILE)
    return len(kept)


def trading_state(root: Path, instrument: str) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """See :func:`catalog.events.trading_state`."""
    path = root / FILE
    if not path.is_file():
        return np.empty(0, np.int64), np.empty(0, np.int8)
    try:
        table = pq.read_table(path, filters=[("instrument_id", "==", instrument)])
        codes = {name: code for code, name in STATES.items()}
        return table["ts_init"].cast(pa.int64()).to_numpy(), np.array([codes[s] for s in table["state"].to_pylist()], np.int8)
    except (pa.ArrowException, OSError, KeyError, ValueError) as e:
        raise InputError(f"{path} is damaged ({str(e).splitlines()[0][:120]}): import the catalog again") from None


def at(steps: tuple[NDArray[np.int64], NDArray[np.int8]], ts: Any) -> Any:
    """The state at each time of `ts` (ns UTC, int64 array): that of the last step at or before it, UNKNOWN before the first."""
    when, state = steps
    return np.append(state, np.int8(UNKNOWN))[np.searchsorted(when, ts, "right") - 1]
