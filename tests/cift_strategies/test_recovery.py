"""An account goes on where SIGKILL cut it off: real processes, a real node, the sandbox, and the journal between them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from lives import DIED, Lives, Nursery
from mortal import POINTS

from cift_strategies.journal import Journal

RESTS = {"entry": "join", "entry_wait_ms": 60_000, "then": "cancel"}


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as found:
        yield found


@pytest.fixture
def lives(nursery: Nursery, tmp_path: Path) -> Lives:
    return Lives(nursery, tmp_path / "state")


def test_an_account_goes_on_wherever_it_is_killed(lives: Lives) -> None:
    """Killed at each of the named points in turn, on one account: nothing lost, nothing doubled, and flat in the end."""
    trades = 0
    for n, point in enumerate((*POINTS[:-1], "the stop is accepted", POINTS[-1])):
        (began, *_), code = lives.live(point=point)
        assert code == DIED, f"{point} was not reached"
        trades = max(trades, began["signals"])
        assert began["session"] == n + 1 and began["account"] == 1
    (began, venue, ended), code = lives.live(point="end", count=2)
    assert code == 0
    lives.sound(ended, lives.sums())
    assert venue == {"venue": {}, "flat": True} and ended["size"] == [0, 0] and ended["signals"] > trades
    assert lives.rows("select number from signals where number not in (select trade from closed)") == []
    net = sum(json.loads(row)[10] for (row,) in lives.rows("select row from closed where row is not null"))
    assert abs(net - ended["pnl"]) < 0.005 and abs(sum(ended["realised"]) - sum(ended["fees"]) - net) < 0.005
    no_end = """select s.number from sent s where role != 'seed' and not exists (select 1 from orders o where o.client_order_id =
        s.client_order_id and o.event in ('OrderFilled', 'OrderCanceled', 'OrderRejected', 'OrderDenied', 'OrderExpired'))"""
    assert lives.rows(no_end) == []
    (began, *_), code = lives.live(point="a signal is decided")
    assert code == DIED and began["account"] == began["session"] and began["fills"] == 0  # the last one had ended in order


def test_a_signal_whose_order_was_never_submitted_is_closed_as_not_sent(lives: Lives) -> None:
    lives.live(point="signal and orders are written")
    lives.live(point="a signal is decided")
    assert lives.rows("select trade, by from closed") == [(0, "not sent")]
    assert set(lives.rows("select event, reason from orders")) == {("OrderCanceled", "it was never sent")}
    assert lives.rows("select * from fills") == []


def test_a_position_keeps_its_stop_and_target_under_new_order_numbers(lives: Lives) -> None:
    lives.live(point="the stop is accepted", horizon=3)
    (began, *_), _ = lives.live(point="the stop is accepted", horizon=3)
    trade, stop, target, until = next(o for o in began["open"] if o is not None)
    sent = f"select role, price, size, number from sent where trade = {trade} and role in ('stop', 'target') and session = "
    first, again = (lives.rows(f"{sent} {session} order by number") for session in (1, 2))
    assert [r[:3] for r in again] == [r[:3] for r in first] and again[0][3] > first[-1][3]
    assert [r[1] for r in again] == [stop / 1e9, target / 1e9]
    assert until > 0 and lives.rows("select count(*) from sent where session = 2 and role = 'seed'") == [(1,)]


@pytest.mark.parametrize("resting", ["resend", "cancel"])
def test_a_resting_entry_is_sent_again_or_reported_cancelled(lives: Lives, resting: str) -> None:
    lives.live(point="the entry is accepted", settings=RESTS)
    lives.live(point="the entry is accepted", settings=RESTS, resting=resting)
    assert lives.rows("select trade, by from closed where trade = 0") == [(0, "lost at a restart")]
    assert lives.rows("select event from orders where session = 2 and number = 0") == [("OrderCanceled",)]
    told = lives.rows('select instrument, side, "limit", horizon_ns, size from signals where number < 2 order by number')
    (*first, size), (*second, again) = told
    fresh = lives.rows("select predicted_at from signals where number < 2 group by predicted_at")
    if resting == "resend":  # as large as the limits allow at the price there is now
        assert first == second and len(fresh) == 1 and 0.99 * size < again <= size
    else:
        assert len(fresh) == 2


def test_a_position_is_left_when_its_orders_are_not_to_be_sent_again(lives: Lives) -> None:
    lives.live(point="the stop is accepted", horizon=3)
    (began, _, ended), code = lives.live(point="end", count=1, resting="cancel", horizon=0)
    trade = next(o[0] for o in began["open"] if o is not None)
    assert code == 0 and ended["size"] == [0, 0]
    assert lives.rows(f"select by from closed where trade = {trade}")[0][0] == "unprotected"


def test_a_kill_switch_outlives_the_process_and_closes_what_it_left(lives: Lives) -> None:
    lives.live(point="the stop is accepted", horizon=3)
    journal = Journal(lives.state)
    journal.switch(1, "killed", "by hand")
    journal.close()
    (began, venue, ended), code = lives.live(point="end", count=0)
    trade = next(o[0] for o in began["open"] if o is not None)
    assert code == 0 and venue["flat"] and ended["signals"] == began["signals"]
    assert lives.rows(f"select by from closed where trade = {trade}") == [("killed",)]


def test_two_processes_do_not_share_an_account(lives: Lives, tmp_path: Path) -> None:
    from cift_strategies.live_config import locked

    with locked(lives.state):
        told, code = lives.live(point="end")
    assert told == [] and code == 1
    told, code = lives.live(point="a signal is decided")
    assert code == DIED and told[0]["session"] == 1

