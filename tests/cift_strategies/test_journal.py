"""The journal: what is written comes back to the last bit, and whatever is wrong with its file costs one line and no harm."""

from __future__ import annotations

import math
import sqlite3
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mortal import SHARES

from catalog.errors import InputError
from catalog.events import SCALE
from cift_models.ensemble import Ensemble
from cift_strategies import journal as journals
from cift_strategies.journal import Journal, Sent
from cift_strategies.messages import Signal
from cift_strategies.outcome import Traded
from cift_strategies.recovery import Recovery, recover
from cift_strategies.risk import Ledger, Limits
from cift_strategies.settings import Settings
from cift_strategies.strategy import EnsembleStrategy, Terms
from cift_strategies.weights import packed, unpacked

SIGNAL = Signal(1, 17, 16, -1, 3 * SCALE, 500_000_000, 2.5, 1.25, 0.75, 2, 99_990_000_000, 100_030_000_000, 99_950_000_000, "join")
FOUR = 4


def event(n: int, kind: str = "OrderAccepted", **more: Any) -> Any:
    return type(kind, (SimpleNamespace,), {})(client_order_id=f"O-{n}", venue_order_id=f"V-{n}", **more)


def fill(journal: Journal, n: int, side: int, raw: int, price: float, fee: float, k: int = 0, mid: float = math.nan) -> bool:
    x = SHARES[k]
    row = (n, x.id, n, -1, "exit", side, price, raw / SCALE, fee, x.currency, "taker", mid, math.nan, 0.01)
    return journal.fill(row, raw, event(n, "OrderFilled", trade_id=f"T-{n}"))


def fresh() -> EnsembleStrategy:
    return EnsembleStrategy(Terms(SHARES, Settings(), Limits()))


def rows(folder: Path, query: str) -> list[Any]:
    with sqlite3.connect(folder / "journal.sqlite") as db:
        return db.execute(query).fetchall()


# --- what comes back ------------------------------------------------------------------------------------------------------------------

FILLS = st.lists(
    st.tuples(
        st.integers(0, 1), st.sampled_from((-1, 1)), st.integers(1, 10**13), st.floats(1, 1e5), st.floats(-5, 50),
        st.one_of(st.just(math.nan), st.floats(1, 1e5)), st.integers(0, 3 * 86_400),
    ),
    max_size=40,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(FILLS, st.integers(0, 40))
def test_a_ledger_comes_back_to_the_last_bit_wherever_the_process_died(tmp_path_factory: Any, fills: Any, cut: int) -> None:
    folder = tmp_path_factory.mktemp("journal")
    ledger, journal, ts, equity = Ledger(SHARES, Limits()), Journal(folder), 0, []
    for n, (k, side, raw, price, fee, mid, seconds) in enumerate(fills):
        ts += seconds * SCALE
        assert fill(journal, n, side, raw, price, fee, k, mid=mid)
        ledger.positions[k].fill(side, raw, price, fee, SHARES[k].multiplier)
        if n != cut:  # the process may die between the two
            equity.append(ledger.mark(k, mid, ts))
            journal.mark(ts, SHARES[k].id, mid, equity[-1], ledger.positions[k])
        else:
            break
    journal.close()
    found, again = fresh(), Journal(folder)
    Recovery(found, again, simulated=True).restore()
    for a, b in zip(ledger.positions, found.ledger.positions):
        assert (a.size, a.average, a.realised, a.fees) == (b.size, b.average, b.realised, b.fees)
    assert np.array_equal(ledger.mids, found.ledger.mids, equal_nan=True) and ledger.pnl("USD") == found.ledger.pnl("USD")
    assert (ledger.highest, ledger.drawdown, ledger._day) == (found.ledger.highest, found.ledger.drawdown, found.ledger._day)
    assert [v for _, _, v in found.equity] == equity
    assert ledger.halted(0, ts) == found.ledger.halted(0, ts)
    again.close()


def test_a_trade_comes_back_with_its_signal_its_fills_and_its_time(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    orders = [Sent(n, role, f"O-{n}", -1, 3.0, 99.99) for n, role in enumerate(("entry", "stop", "target"))]
    assert journal.signal(0, SIGNAL, SHARES[1].id, math.nan, orders)
    x = SHARES[1]
    row = (20, x.id, 0, 0, "entry", -1, 99.99, 2.0, 0.5, x.currency, "maker", 100.0, math.nan, 0.01)
    assert journal.fill(row, 2 * SCALE, event(0, "OrderFilled", trade_id="T-0"))
    journal.renewed(0, 900)
    journal.renewed(0, 1_000)
    journal.close()
    found = fresh()
    recovery = recover(found, Journal(tmp_path), simulated=True)
    trade = found.trades[1]
    assert recovery is not None and recovery.waits == {1} and trade is not None and found.trades[0] is None
    assert trade.signal == SIGNAL and trade.until == 1_000 and math.isnan(trade.decided_mid)
    assert (trade.opened, trade.units_in, trade.bought, trade.fees, trade.peak) == (20, 2.0, 199.98, 0.5, 2 * SCALE)
    assert (found.signals, found.numbers, found.ledger.positions[1].size) == (1, 3, -2 * SCALE)
    assert repr(found.fills) == repr([row])


def test_a_fill_that_is_told_twice_counts_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert fill(journal, 3, 1, SCALE, 10.0, 0.0)
    assert not fill(journal, 3, 1, SCALE, 10.0, 0.0)
    journal.close()
    again = Journal(tmp_path)
    assert not fill(again, 3, 1, SCALE, 10.0, 0.0) and fill(again, 4, 1, SCALE, 10.0, 0.0)


def test_a_session_that_ended_in_order_and_flat_ends_its_account(tmp_path: Path) -> None:
    accounts = []
    for flat, goes_on in ((None, False), (False, False), (True, False), (True, True), (True, False), (True, False)):
        journal = Journal(tmp_path, goes_on=goes_on)
        accounts.append(journal.account)
        journal.close(flat)
    assert accounts == [1, 1, 1, 1, 5, 6]


@pytest.mark.parametrize(("again", "drawn"), [(5, [5, 6]), (30, [10, 20, 30, 31])], ids=["a replay begun anew", "time went on"])
def test_the_equity_curve_of_an_account_that_goes_on_never_runs_backwards(tmp_path: Path, again: int, drawn: list[int]) -> None:
    journal, x, ledger = Journal(tmp_path), SHARES[0], Ledger(SHARES, Limits())
    for ts in (10, 20):
        journal.mark(ts, x.id, 100.0, ledger.mark(0, 100.0, ts), ledger.positions[0])
    journal.close()
    strategy = EnsembleStrategy(Terms(SHARES, Settings(), Limits()))
    assert recover(strategy, Journal(tmp_path), True) is not None
    strategy.equity += [(again, "USD", 0.0), (again + 1, "USD", 0.0)]
    assert Traded.by(strategy).equity_ts.tolist() == [*drawn, drawn[-1]]  # it ends with its last point, however thinned


def test_the_kill_switch_is_on_after_a_restart_until_it_is_taken_off(tmp_path: Path) -> None:
    for states, halted in ((["killed"], True), (["running"], False), (["paused"], True), (["killed", "running"], False)):
        journal = Journal(tmp_path)
        for state in states:
            journal.switch(1, state, "by hand")
        journal.close()
        found, again = fresh(), Journal(tmp_path)
        recover(found, again, simulated=True)
        again.close()
        assert bool(found.halts) == halted


def test_what_was_learned_comes_back_for_the_same_models_alone(tmp_path: Path) -> None:
    names, shape = ("a", "b"), np.full((2, FOUR), 0.5)
    ensemble = Ensemble.even(names, shape, np.ones(FOUR))
    one, other = ensemble.new_state(), ensemble.new_state()
    one.weights[...] = np.random.default_rng(3).random(one.weights.shape)
    one.rounds[...] = 7
    journal = Journal(tmp_path)
    for weights in (np.zeros(3), one):
        journal.learned("v1", packed(weights) if weights is one else b"torn")
    journal.close()
    kept = Journal(tmp_path).weights()
    assert kept.keys() == {"v1"} and unpacked(kept["v1"], other)
    assert np.array_equal(one.weights, other.weights) and (other.rounds == 7).all()
    three = Ensemble.even(("a", "b", "c"), shape, np.ones(FOUR)).new_state()
    before = three.weights.copy()
    assert not unpacked(kept["v1"], three) and not unpacked(b"torn", other) and np.array_equal(before, three.weights)
    assert rows(tmp_path, "select version from models") == [("v1",)]


# --- what is wrong with the file ------------------------------------------------------------------------------------------------------


def test_a_file_that_is_no_journal_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(InputError, match=r"journal\.sqlite cannot be used \(file is not a database\)"):
        Journal(tmp_path)
    assert path.read_bytes() == b"not a database at all" * 100
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("create table mine(x)")
    with pytest.raises(InputError, match="is a journal of another kind"):
        Journal(tmp_path)
    assert rows(tmp_path, "select name from sqlite_master") == [("mine",)]


def test_a_journal_of_another_version_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path).close()
    with sqlite3.connect(tmp_path / "journal.sqlite") as db:
        db.execute(f"pragma user_version={journals.VERSION + 1}")
    with pytest.raises(InputError, match=f"of version {journals.VERSION + 1}, this is {journals.VERSION}"):
        Journal(tmp_path)


def test_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for n in range(2_000):
        fill(journal, n, 1, SCALE, 10.0, 0.0)
    journal.close()
    path = tmp_path / "journal.sqlite"
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 8_192] = b"\xff" * 8_192
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"journal\.sqlite (is damaged|cannot be used)"):
        Journal(tmp_path)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").mkdir()
    with pytest.raises(InputError, match="cannot be used"):
        Journal(tmp_path)
    with pytest.raises(InputError, match="cannot be used"):
        Journal(tmp_path / "nowhere")


def test_a_journal_that_another_process_holds_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path).close()
    holder = sqlite3.connect(tmp_path / "journal.sqlite", isolation_level=None)
    holder.execute("begin immediate")
    with pytest.raises(InputError, match="database is locked"):
        Journal(tmp_path)
    holder.close()


def test_a_journal_that_contradicts_itself_or_knows_other_instruments_is_refused(tmp_path: Path) -> None:
    journal, ledger = Journal(tmp_path), Ledger(SHARES, Limits())
    fill(journal, 0, 1, 5 * SCALE, 10.0, 0.0)
    ledger.positions[0].fill(1, 5 * SCALE, 10.0, 0.0, 1.0)
    journal.mark(1, SHARES[0].id, 11.0, ledger.mark(0, 11.0, 1), ledger.positions[0])
    journal.close()
    alone = EnsembleStrategy(Terms(SHARES[1:], Settings(), Limits()))
    with pytest.raises(InputError, match=r"has traded ONE\.XTST, which is not traded now"):
        recover(alone, Journal(tmp_path), simulated=True)
    with sqlite3.connect(tmp_path / "journal.sqlite") as db:
        db.execute("update fills set raw = raw - 1")
    with pytest.raises(InputError, match="contradicts itself"):
        recover(fresh(), Journal(tmp_path), simulated=True)


def fails_and_recovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any, mend: Any) -> None:
    """Nothing is entered while nothing can be written, exits are kept in memory, and all is written in order afterwards."""
    monkeypatch.setattr(journals, "RETRY_S", 0.0)
    said: list[str] = []
    journal = Journal(tmp_path, say=said.append)
    assert fill(journal, 0, 1, SCALE, 10.0, 0.0)
    spoil(journal)
    n = 1
    while journal.fault is None:
        fill(journal, n, 1, SCALE, 10.0, 0.0)
        n += 1
    assert not journal.signal(0, SIGNAL, SHARES[1].id, 1.0, [])
    fill(journal, n, -1, SCALE, 10.0, 0.0)
    assert not fill(journal, n, -1, SCALE, 10.0, 0.0)
    mend(journal)
    assert journal.signal(0, SIGNAL, SHARES[1].id, 1.0, []) and journal.fault is None
    assert [line.split(":")[0] for line in said] == ["no entries", "entries again"]
    journal.close()
    assert [r[0] for r in rows(tmp_path, "select ts from fills order by seq")] == list(range(n + 1))


def test_a_full_disk_stops_entries_and_loses_no_exit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(journal: Journal) -> None:
        pages = journal._db.execute("pragma page_count").fetchone()[0]
        journal._db.execute(f"pragma max_page_count={pages + 1}")

    fails_and_recovers(tmp_path, monkeypatch, spoil, lambda journal: journal._db.execute("pragma max_page_count=1000000"))


def test_a_lock_taken_meanwhile_stops_entries_and_loses_no_exit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder: list[sqlite3.Connection] = []

    def spoil(_: Journal) -> None:
        holder.append(sqlite3.connect(tmp_path / "journal.sqlite", isolation_level=None))
        holder[0].execute("begin immediate")

    fails_and_recovers(tmp_path, monkeypatch, spoil, lambda _: holder[0].close())


def test_rows_that_could_never_be_written_are_told_at_the_end(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal._db.execute(f"pragma max_page_count={journal._db.execute('pragma page_count').fetchone()[0]}")
    while journal.fault is None:
        fill(journal, journal._seq, 1, SCALE, 10.0, 0.0)
    with pytest.raises(InputError, match=r"lacks \d+ rows that could not be written \(database or disk is full\)"):
        journal.close(flat=True)


def test_a_reader_sees_what_is_written_and_holds_nobody_up(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    fill(journal, 0, 1, SCALE, 10.0, 0.0)
    with sqlite3.connect(tmp_path / "journal.sqlite") as reader:
        reader.execute("begin")
        assert reader.execute("select count(*) from fills").fetchone() == (1,)
        assert fill(journal, 1, 1, SCALE, 10.0, 0.0) and journal.fault is None
        assert reader.execute("select count(*) from fills").fetchone() == (1,)
    assert rows(tmp_path, "select count(*) from fills") == [(2,)]
