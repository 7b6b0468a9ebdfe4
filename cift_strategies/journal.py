"""The journal of a live account: signals, orders, their events, fills, marks and weights in SQLite, each written before it is acted upon.

One file, `journal.sqlite`, in write-ahead mode: a reader never waits for us nor we for it. An account goes on from session to session until
one ends in order with nothing held. Times are ns of the stream, prices and sizes as in `fills.parquet`.
"""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from catalog.errors import InputError
from catalog.events import SCALE
from cift_strategies.messages import Signal

if TYPE_CHECKING:
    from cift_strategies.risk import Position

VERSION: Final = 2
APPLICATION: Final = 0x43494654  # "CIFT"
LOCKED_MS: Final = 10  # how long a write waits for whoever holds the file; then it is kept in memory and written later
RETRY_S: Final = 1.0
FILL: Final = (
    "ts", "instrument", '"order"', "trade", "role", "side", "price", "size", "fee", "currency", "liquidity", "mid", "decided_mid",
    "tick_value",
)  # fmt: skip
SCHEMA: Final = f"""
create table if not exists sessions(id integer primary key, account, began, ended, flat, config text);
create table if not exists signals(account, session, number, ts, instrument, side, size real, horizon_ns, predicted_at, expected_ticks real,
    cost_ticks real, confidence real, regime, "limit" real, stop real, target real, decided_mid real, exact text,
    primary key(account, number)) without rowid;
create table if not exists sent(account, session, number, ts, trade, role, client_order_id unique, instrument, side, size real, price real,
    primary key(account, number)) without rowid;
create table if not exists orders(account, session, number, ts, trade, role, event, client_order_id, venue_order_id, reason);
create table if not exists fills(seq integer primary key, account, session, {",".join(FILL)}, raw, client_order_id, trade_id,
    unique(client_order_id, trade_id));
create table if not exists marks(seq integer primary key, account, session, ts, instrument, mid real, pnl real, size, average real,
    realised real, fees real);
create table if not exists renewals(account, trade, until, primary key(account, trade)) without rowid;
create table if not exists closed(account, session, trade, ts, by, row text, primary key(account, trade)) without rowid;
create table if not exists switches(account, session, ts, state, reason);
create table if not exists models(session, ts, version);
create table if not exists learned(version primary key, ts, weights blob) without rowid;
create index if not exists orders_of on orders(account);
create index if not exists fills_of on fills(account);
create index if not exists marks_of on marks(account);
create view if not exists positions as select m.* from marks m where seq in (select max(seq) from marks group by account, instrument);
"""


class Sent(NamedTuple):
    """An order as it is written before it is submitted; `size` in units, `price` its limit or trigger, None at the market."""

    number: int
    role: str
    client_order_id: str
    side: int
    size: float
    price: float | None


@dataclass(slots=True)
class Past:
    """What the journal holds of the account that goes on."""

    sessions: int  # before this one
    signals: list[tuple[int, Signal, str, float]]  # number, signal, instrument, decided_mid
    sent: list[tuple[int, int, str, str, str]]  # number, trade, role, client_order_id, instrument
    told: dict[str, list[str]]  # client_order_id -> its events, in order
    steps: list[tuple[Any, ...]]  # fills and marks in the order in which they were written, see Journal.past
    renewals: dict[int, int]
    closed: list[tuple[int, str, list[Any] | None]]  # trade, by, row of positions.parquet
    switch: tuple[str, str] = ("", "")
    counts: dict[str, int] = field(default_factory=dict)  # of order events
    filled: dict[str, dict[str, int]] = field(default_factory=dict)  # client_order_id -> trade_id -> size, 1e-9 units


class Journal:
    """`synchronous` normal: what was written survives the process in any case, and a power failure up to the last checkpoint; full: all of
    it survives that too, for an fsync at each write. `goes_on`: with the last account, even if its session ended in order and flat.

    Raises InputError where the file cannot be opened, is locked by another, of another version, or is no journal.

    A write that fails while the session runs (full disk, a lock) is told once through `say`, kept in memory, and tried again: exits go on.
    Only :meth:`signal` says no, and without it nothing is entered.
    """

    def __init__(
        self, folder: Path, config: str = "", synchronous: Literal["normal", "full"] = "normal", goes_on: bool = False,
        say: Callable[[str], object] = lambda _: None,
    ) -> None:  # fmt: skip
        self.path, self.say, self._version = folder / "journal.sqlite", say, ""
        self.fault: str | None = None  # why nothing can be written now
        self._waiting: list[tuple[str, Sequence[Any]]] = []
        self._retry, self._closed = 0.0, False
        try:
            self._db = sqlite3.connect(self.path, isolation_level=None, timeout=1.0, check_same_thread=False)
            self._open(synchronous)
            self.session, self.account = self._begin(config, goes_on)
            newest = "select max((select coalesce(max(seq), 0) from fills), (select coalesce(max(seq), 0) from marks))"
            self._seq = int(self._db.execute(newest).fetchone()[0])
            self._db.execute(f"pragma busy_timeout={LOCKED_MS}")
        except sqlite3.Error as e:
            raise InputError(f"{self.path} cannot be used ({e}): free it or choose another --state") from None

    def _open(self, synchronous: str) -> None:
        found, version = (self._db.execute(f"pragma {n}").fetchone()[0] for n in ("application_id", "user_version"))
        tables = self._db.execute("select count(*) from sqlite_master").fetchone()[0]
        if tables and (found, version) != (APPLICATION, VERSION):
            what = f"of version {version}, this is {VERSION}" if found == APPLICATION else "of another kind"
            raise InputError(f"{self.path} is a journal {what}: choose another --state, or move it away to begin anew")
        if tables and (wrong := self._db.execute("pragma quick_check(1)").fetchone()[0]) != "ok":
            raise InputError(f"{self.path} is damaged ({wrong.splitlines()[-1]}): restore it, or choose another --state")
        self._db.execute("pragma journal_mode=wal")
        self._db.execute(f"pragma synchronous={synchronous}")
        if not tables:
            self._db.executescript(f"begin; {SCHEMA} pragma application_id={APPLICATION}; pragma user_version={VERSION}; commit;")

    def _begin(self, config: str, goes_on: bool) -> tuple[int, int]:
        self._db.execute("begin immediate")
        last = self._db.execute("select id, account, ended, flat from sessions order by id desc limit 1").fetchone()
        number = 1 if last is None else int(last[0]) + 1
        account = number if last is None or (last[2] and last[3] and not goes_on) else int(last[1])
        self._db.execute("insert into sessions values (?, ?, ?, null, null, ?)", (number, account, time.time_ns(), config))
        self._db.execute("commit")
        return number, account

    # --- what is written --------------------------------------------------------------------------------------------------------------

    def signal(self, number: int, signal: Signal, instrument: str, decided_mid: float, orders: Sequence[Sent]) -> bool:
        """Write a signal with its orders, all or nothing. False: it could not be written, and must not be acted upon."""
        s = signal
        rows: list[tuple[str, Sequence[Any]]] = [("signals", (
            self.account, self.session, number, s.ts, instrument, s.side, s.size / SCALE, s.horizon_ns, s.predicted_at, s.expected_ticks,
            s.cost_ticks, s.confidence, s.regime, s.limit / SCALE, s.stop / SCALE, s.target / SCALE, decided_mid, json.dumps(asdict(s)),
        ))]  # fmt: skip
        rows += [self._sent(number, instrument, s.ts, order) for order in orders]
        return self._flush() and self._write(rows)

    def sent(self, trade: int, instrument: str, ts: int, order: Sent) -> None:
        self._put([self._sent(trade, instrument, ts, order)])

    def _sent(self, trade: int, instrument: str, ts: int, o: Sent) -> tuple[str, Sequence[Any]]:
        return "sent", (
            self.account, self.session, o.number, ts, trade, o.role, o.client_order_id, instrument, o.side, o.size, o.price,
        )  # fmt: skip

    def order(self, number: int, role: str, trade: int, event: Any, ts: int) -> None:
        """An order event other than a fill."""
        self._put([self._order(number, role, trade, event, ts)])

    def cancelled(self, number: int, role: str, trade: int, client_order_id: str, ts: int, reason: str) -> None:
        """An order that the venue no longer has."""
        self._put([("orders", (self.account, self.session, number, ts, trade, role, "OrderCanceled", client_order_id, None, reason))])

    def _order(self, number: int, role: str, trade: int, event: Any, ts: int) -> tuple[str, Sequence[Any]]:
        venue = getattr(event, "venue_order_id", None)
        told = (type(event).__name__, str(event.client_order_id), None if venue is None else str(venue), getattr(event, "reason", None))
        return "orders", (self.account, self.session, number, ts, trade, role, *told)

    def fill(self, row: Sequence[Any], raw: int, event: Any) -> bool:
        """A fill (`row` as in `fills.parquet`, `raw` its size in 1e-9 units) with its event. False: it is known already."""
        own, execution = str(event.client_order_id), str(event.trade_id)
        known = "select 1 from fills where client_order_id = ? and trade_id = ?"
        try:
            if self._db.execute(known, (own, execution)).fetchone():
                return False
        except sqlite3.Error:
            pass
        if any(t == "fills" and r[-2:] == (own, execution) for t, r in self._waiting):
            return False
        self._seq += 1
        one = ("fills", (self._seq, self.account, self.session, *row, raw, own, execution))
        self._put([self._order(row[2], row[4], row[3], event, row[0]), one])
        return True

    def mark(self, ts: int, instrument: str, mid: float, pnl: float, p: Position) -> None:
        self._seq += 1
        self._put([("marks", (self._seq, self.account, self.session, ts, instrument, mid, pnl, p.size, p.average, p.realised, p.fees))])

    def renewed(self, trade: int, until: int) -> None:
        """The position of `trade` is kept until then."""
        self._put([("renewals", (self.account, trade, until))])

    def closed(self, trade: int, ts: int, by: str, row: Sequence[Any] | None) -> None:
        """A trade is over; `row` as in `positions.parquet`, None where nothing was filled."""
        self._put([("closed", (self.account, self.session, trade, ts, by, None if row is None else json.dumps(list(row))))])

    def switch(self, ts: int, state: str, reason: str) -> None:
        """The node was paused, killed or resumed."""
        self._put([("switches", (self.account, self.session, ts, state, reason))])

    def learned(self, version: str, weights: bytes) -> None:
        """What the ensemble of the models `version` has learned so far; the newest of each version is kept."""
        if self._closed:  # models that were loaded as the session ended
            return
        rows: list[tuple[str, Sequence[Any]]] = [("learned", (version, time.time_ns(), weights))]
        if version != self._version:
            rows.append(("models", (self.session, time.time_ns(), version)))
            self._version = version
        self._put(rows)

    def _put(self, rows: list[tuple[str, Sequence[Any]]]) -> None:
        if not self._flush() or not self._write(rows):
            self._waiting += rows

    def _flush(self) -> bool:
        """Write what waits, at most once in RETRY_S; whether nothing waits any more."""
        if not self._waiting:
            return True
        if time.monotonic() < self._retry or not self._write(self._waiting):
            return False
        self._waiting = []
        return True

    def _write(self, rows: Sequence[tuple[str, Sequence[Any]]]) -> bool:
        try:
            if len(rows) == 1:
                self._db.execute(*_insert(*rows[0]))
            else:
                self._db.execute("begin immediate")
                for row in rows:
                    self._db.execute(*_insert(*row))
                self._db.execute("commit")
        except sqlite3.OperationalError as e:
            if self._db.in_transaction:
                self._db.execute("rollback")
            self._retry = time.monotonic() + RETRY_S
            if self.fault is None:
                self.say(f"no entries: {self.path} cannot be written ({e}); exits go on, and it is tried again")
            self.fault = str(e)
            return False
        if self.fault is not None:
            self.say("entries again: the journal is written")
        self.fault = None
        return True

    # --- what is read -----------------------------------------------------------------------------------------------------------------

    @property
    def goes_on(self) -> bool:
        """Whether this session goes on with the account of an earlier one."""
        return self.account != self.session

    def past(self) -> Past:
        """What the account holds. `steps`: (seq, "fill", row of fills.parquet, raw) and
        (seq, "mark", (ts, instrument, mid, pnl, size, average, realised, fees))."""
        a = (self.account,)
        ask = self._db.execute
        signals = [
            (int(n), Signal(**json.loads(exact)), str(x), _nan(mid))
            for n, exact, x, mid in ask("select number, exact, instrument, decided_mid from signals where account = ? order by number", a)
        ]
        sent = ask("select number, trade, role, client_order_id, instrument from sent where account = ? order by number", a).fetchall()
        told: dict[str, list[str]] = {}
        counts: dict[str, int] = {}
        for own, event in ask("select client_order_id, event from orders where account = ? order by rowid", a):
            told.setdefault(own, []).append(event)
            counts[event] = counts.get(event, 0) + 1
        steps: list[tuple[Any, ...]] = [
            (seq, "fill", (*row[:11], _nan(row[11]), _nan(row[12]), row[13]), raw)
            for seq, *row, raw in ask(f"select seq, {', '.join(FILL)}, raw from fills where account = ?", a)
        ]
        steps += [
            (seq, "mark", (ts, x, _nan(mid), _nan(pnl), *position))
            for seq, ts, x, mid, pnl, *position in ask(
                "select seq, ts, instrument, mid, pnl, size, average, realised, fees from marks where account = ?", a
            )
        ]
        steps.sort(key=lambda s: s[0])
        closed = [
            (int(t), str(by), None if row is None else json.loads(row))
            for t, by, row in ask("select trade, by, row from closed where account = ? order by ts, trade", a)
        ]
        switch = ask("select state, reason from switches where account = ? order by rowid desc limit 1", a).fetchone() or ("", "")
        renewals = dict(ask("select trade, until from renewals where account = ?", a).fetchall())
        sessions = ask("select count(*) - 1 from sessions where account = ?", a).fetchone()[0]
        filled: dict[str, dict[str, int]] = {}
        for own, execution, raw in ask("select client_order_id, trade_id, raw from fills where account = ?", a):
            filled.setdefault(own, {})[execution] = raw
        return Past(int(sessions), signals, sent, told, steps, renewals, closed, switch, counts, filled)

    def weights(self) -> dict[str, bytes]:
        """What was learned last, by version of the models."""
        return dict(self._db.execute("select version, weights from learned").fetchall())

    def copy(self, folder: Path) -> None:
        """Write what is there now as a journal of its own into `folder`. Raises sqlite3.Error or OSError where it cannot."""
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(folder / self.path.name)) as db:
            self._db.backup(db)

    def close(self, flat: bool | None = None) -> None:
        """`flat`: the session ends in order, holding nothing or something; None: it does not end in order. A second call does nothing.

        Raises InputError where rows could not be written until now."""
        if self._closed:
            return
        self._closed = True
        self._retry = 0.0
        lost = 0 if self._flush() else len(self._waiting)
        try:
            if flat is not None and not lost:
                ended = "update sessions set ended = ?, flat = ? where id = ?"
                self._db.execute(ended, (time.time_ns(), flat, self.session))
            self._db.execute("pragma wal_checkpoint(truncate)")
        except sqlite3.Error:
            pass
        self._db.close()
        if lost:
            raise InputError(f"{self.path} lacks {lost} rows that could not be written ({self.fault}): make room; the next start tells")


def _insert(table: str, row: Sequence[Any]) -> tuple[str, Sequence[Any]]:
    how = "insert or replace" if table in ("renewals", "learned") else "insert"
    return f"{how} into {table} values ({','.join('?' * len(row))})", row


def _nan(value: float | None) -> float:
    return math.nan if value is None else float(value)
