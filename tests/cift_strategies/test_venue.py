"""Orders through a real venue process, from a real node that is killed, cut off and started again: what the venue's books say, ours say."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from venue_stage import ASK, BID, GUARD_S, ROOT, SHARE, Actors, Ear, Node, Stage, Tape, order, stage

from catalog.errors import InputError
from catalog.events import SCALE
from cift_strategies.feeds.venue import Venue


@pytest.fixture(scope="module")
def company() -> Iterator[Actors]:
    found = Actors()
    yield found
    found.close()


@pytest.fixture
def actors(company: Actors) -> Iterator[Actors]:
    yield company
    company.rest()


def tape() -> Tape:
    """By 10 ms 250 of the 300 at the touch are sold, at 20 ms 100 more; at 30 ms another 80; then the market goes up through the target."""
    t = Tape()
    for ms, size in ((6, 1), (10, 249), (20, 100), (30, 80)):  # the first gives the node a price for market orders
        t.trade(ms, -1, size)
    t.add(40, 1, BID - 1, 7)
    t.trade(50, 1, 300 + 40)
    t.trade(60, 1, 260 + 300)
    t.add(70, 1, BID, 500)
    t.add(80, -1, BID + 2, 500)
    return t


@pytest.fixture
def played(tmp_path: Path) -> Iterator[Stage]:
    with stage(tmp_path, tape()) as found:
        yield found


@pytest.fixture
def flickering(tmp_path: Path) -> Iterator[Stage]:
    t = Tape()
    for ms in range(1, 9):
        t.trade(ms, -1, 1)
    with stage(tmp_path, t) as found:
        yield found


def agree(node: Node, played: Stage) -> dict[str, Any]:
    """What the node has counted is what the venue has in its books: position, fees, PnL at mid, every fill, every open order."""
    ear = played.ear(None)
    books, equity = ear.ask(do="status")["status"], ear.ask(do="account")["equity"]["USD"]
    ear.close()
    open_ = sorted(o["client"] for o in books["orders"] if o["status"] in ("held", "accepted"))
    fees = sum(f["fill"]["fee"] for f in books["fills"])
    told = node.until(lambda s: s["fills"] == len(books["fills"]) and s["open"] == open_)
    assert told["size"] == told["held"] == books["positions"][SHARE.id] // SCALE
    assert told["fees"] == pytest.approx(fees) and told["pnl"] == pytest.approx(equity - 1e6, abs=0.005 * abs(told["size"]) + 1e-6)
    if not told["size"]:
        assert told["pnl"] == pytest.approx(equity - 1e6)
    return told


# --- a node in its ordinary life ------------------------------------------------------------------------------------------------------


def test_orders_are_acknowledged_filled_in_parts_refused_and_beaten_to_it(played: Stage, actors: Actors) -> None:
    node, ear = actors.node(played), played.ear()
    node.ready()
    ear.ask(do="fault", fault="reject")
    node.ask("enter", side=1, size=100, limit=BID)
    assert node.hear("OrderRejected", "entry")["reason"] == "by chance"
    assert node.until(lambda s: s["trade"] is None)["decisions"]["entry rejected"] == 1

    node.ask("enter", side=1, size=100, limit=BID)
    node.hear("OrderAccepted", "entry")
    played.to(20)
    node.hear("OrderAccepted", "target")
    told = agree(node, played)
    assert told["size"] == 50 and len(told["open"]) == 3

    ear.ask(do="fault", fault="race")
    node.ask("give_up")  # the rest of the entry; somebody is faster
    node.hear("OrderFilled", "entry", times=2)
    told = agree(node, played)
    assert told["size"] == 100 and len(told["open"]) == 2 and told["average"] == BID / 100

    ear.ask(do="fault", fault="duplicate:9")
    node.ask("leave")
    node.hear("OrderFilled", "exit")
    told = agree(node, played)
    assert told["size"] == 0 and told["closed"][0][-1] == "by command" and told["link"]["duplicates"] > 0
    assert node.stop()["halts"] == {}


def test_acknowledgements_may_come_after_the_cancel_was_sent(played: Stage, actors: Actors) -> None:
    node, ear = actors.node(played), played.ear()
    node.ready()
    ear.ask(do="fault", fault="delay:0.3")
    node.ask("enter", side=1, size=100, limit=BID)
    node.ask("give_up")
    node.hear("OrderCanceled", "entry")
    assert node.until(lambda s: s["trade"] is None)["decisions"] == {"entered": 1, "entry not filled": 1}
    agree(node, played)
    node.stop()


def test_a_line_that_drops_with_an_order_open_brings_what_was_missed_once(played: Stage, actors: Actors) -> None:
    """The line goes with the very report of the fill, and the next three attempts fail."""
    node = actors.node(played)
    node.ready()
    node.ask("enter", side=1, size=100, limit=BID)
    node.hear("OrderAccepted", "entry")
    ear = played.ear()
    ear.ask(do="fault", fault="drop:3")
    played.to(20)
    node.hear("OrderFilled", "entry")
    node.hear("OrderAccepted", "target")
    told = agree(node, played)
    assert told["size"] == 50 and told["link"]["reconnects"] >= 1 and "duplicates" not in told["link"]
    node.stop()


def test_a_venue_that_dies_keeps_its_books_and_gets_what_only_reduces_when_it_is_back(played: Stage, actors: Actors) -> None:
    node = actors.node(played)
    node.ready()
    played.to(6)
    node.ask("enter", side=1, size=100, limit=ASK, entry="cross")
    node.hear("OrderAccepted", "target")
    played.kill_venue()
    node.until(lambda s: s["lost"])
    node.ask("leave")
    assert node.ask("status")["size"] == 100
    played.open_venue()
    node.hear("OrderFilled", "exit")
    assert agree(node, played)["size"] == 0
    node.stop()


@pytest.mark.parametrize("noticed", [True, False], ids=["when that is known", "before that is known"])
def test_an_entry_that_is_sent_to_a_dead_venue_is_over_and_never_arrives(played: Stage, actors: Actors, noticed: bool) -> None:
    node, why = actors.node(played), "the line to the venue is lost" if noticed else "the line was lost before it arrived"
    node.ready()
    if noticed:
        played.kill_venue()
        node.until(lambda s: s["lost"])
    else:
        played.freeze_venue()
    node.ask("enter", side=1, size=100, limit=BID)
    if not noticed:
        played.kill_venue()
    played.open_venue()
    assert why in node.hear("OrderRejected", "entry")["reason"]
    node.until(lambda s: not s["lost"])
    told = agree(node, played)
    assert told["trade"] is None and told["decisions"]["entry rejected"] == 1 and told["open"] == []
    assert played.ear(None).ask(do="status")["status"]["orders"] == []
    node.ask("enter", side=1, size=100, limit=BID)
    node.hear("OrderAccepted", "entry")
    assert len(agree(node, played)["open"]) == 3
    node.stop()


def test_a_cancel_that_is_sent_to_a_dead_venue_is_sent_again_when_it_is_back(played: Stage, actors: Actors) -> None:
    node = actors.node(played)
    node.ready()
    node.ask("enter", side=1, size=100, limit=BID)
    node.hear("OrderAccepted", "entry")
    played.freeze_venue()
    node.ask("give_up")
    played.kill_venue()
    played.open_venue()
    node.hear("OrderCanceled", "entry")
    told = agree(node, played)
    assert told["trade"] is None and told["open"] == []
    node.stop()


# --- killed and started again ---------------------------------------------------------------------------------------------------------


def test_fills_made_while_nobody_was_here_are_ours_at_the_next_start(played: Stage, actors: Actors) -> None:
    node = actors.node(played)
    node.ready()
    ids = node.ask("enter", side=1, size=100, limit=BID, stop=30, target=2)
    node.hear("OrderAccepted", "entry")
    played.to(20)
    node.hear("OrderAccepted", "target")
    node.kill()
    played.to(30)  # the rest of the entry
    node = actors.node(played)
    node.ready()
    told = agree(node, played)
    assert "1 fills were made while nobody was here: they are ours now" in told["said"]
    assert told["size"] == 100 and told["trade"] == ids and told["halts"] == {}
    node.kill()
    played.to(60)  # the target: the position is gone, and its stop with it
    node = actors.node(played)
    node.ready()
    told = agree(node, played)
    (closed,) = told["closed"]
    assert told["size"] == 0 and told["trade"] is None and closed[-1] == "target" and closed[5:8] == [100.0, BID / 100, (BID + 2) / 100]
    assert closed[8] == pytest.approx(2.0) and told["realised"] == pytest.approx(2.0)
    node.stop()


@pytest.mark.parametrize("resting", ["resend", "cancel"])
def test_an_entry_that_rests_at_the_venue_is_the_same_order_after_a_restart(played: Stage, actors: Actors, resting: str) -> None:
    node = actors.node(played)
    node.ready()
    ids = node.ask("enter", side=1, size=100, limit=BID)
    node.hear("OrderAccepted", "entry")
    node.kill()
    node = actors.node(played, resting=resting)
    told = node.ready()
    assert told["trade"] == ids and len(told["open"]) == 3
    played.to(20)
    node.hear("OrderFilled", "entry")
    told = agree(node, played)
    assert told["size"] == 50
    ear = played.ear()
    assert len(ear.ask(do="status")["status"]["orders"]) == 3
    node.stop()


def test_cancels_go_out_at_once_though_after_a_restart_no_price_has_come(played: Stage, actors: Actors) -> None:
    node = actors.node(played)
    node.ready()
    played.to(6)
    node.ask("enter", side=1, size=100, limit=ASK, entry="cross")
    node.hear("OrderAccepted", "target")
    node.kill()
    node = actors.node(played)
    node.ready()
    node.ask("unpriced")
    node.ask("leave")
    node.hear("OrderCanceled", "stop")
    told = node.until(lambda s: not s["open"])
    assert told["size"] == 100 and told["waits"] == [0], "a market order waits for a price"
    node.stop()


def test_nothing_is_lost_or_doubled_wherever_it_is_killed(flickering: Stage, actors: Actors) -> None:
    """Killed with commands on their way, before anything was heard of them, after one report, after more: the books agree at each start."""
    rng, played = random.Random(3), flickering
    for n in range(6):
        node = actors.node(played)
        node.ready()
        played.to(n + 1)
        told = agree(node, played)
        if told["trade"] is None:
            node.ask("enter", side=1, size=10, limit=ASK, entry="cross")
        else:
            node.ask("leave")
        if n % 3:
            for _ in range(rng.randint(1, 4)):
                node.hear("OrderAccepted" if told["trade"] is None else "OrderCanceled")
        node.kill()
    node = actors.node(played)
    node.ready()
    told = agree(node, played)
    ear = played.ear()
    sent = [o["client"] for o in ear.ask(do="status")["status"]["orders"]]
    assert len(sent) == len(set(sent)) and told["fills"] >= 2
    node.stop()


def test_an_account_with_a_long_history_is_reconciled(played: Stage, actors: Actors) -> None:
    """All of its orders come as one line, of more than a mebibyte."""
    ear = played.ear(None)
    for n in range(8):
        ear.ask(do="submit", orders=[order(f"old {n} {i}", 1, 1, BID - 5, life="ioc") for i in range(500)])
    assert len(json.dumps(ear.ask(do="status"))) > 1 << 20
    ear.ask(do="submit", orders=[order("held", 1, 30)])
    node = actors.node(played)
    assert node.until(lambda s: s["halts"])["held"] == 30
    assert node.stop()["held"] == 30


# --- somebody else --------------------------------------------------------------------------------------------------------------------


def test_what_somebody_else_trades_on_our_account_stops_entries_until_it_is_undone(played: Stage, actors: Actors) -> None:
    node, ear = actors.node(played), played.ear()
    node.ready()
    ear.ask(do="submit", orders=[order("", 1, 30)])
    told = node.until(lambda s: s["halts"])
    assert told["halts"] == {"venue 0": "SHARE.XNAS: the venue holds 30, the journal 0"} and told["size"] == told["fills"] == 0
    ear.ask(do="submit", orders=[order("by hand", -1, 30)])
    assert node.until(lambda s: not s["halts"])["held"] == 0
    ear.ask(do="submit", orders=[order("by hand again", 1, 20)])
    node.until(lambda s: s["halts"])
    node.kill()
    node = actors.node(played)
    told = node.until(lambda s: s["halts"])
    assert told["halts"] == {"venue 0": "SHARE.XNAS: the venue holds 20, the journal 0"} and told["size"] == 0
    assert node.stop()["held"] == 20


# --- the line -------------------------------------------------------------------------------------------------------------------------


def test_a_line_begins_where_the_client_says_and_tells_each_report_once(played: Stage) -> None:
    ear = played.ear()
    for n in range(4):
        ear.ask(do="submit", orders=[order(f"o{n}", 1, 10, BID)])
    assert [r["seq"] for r in ear.heard] == [1, 2, 3, 4]
    late = played.ear(2)
    late.ask(do="cancel", order="o0")
    assert [(r["seq"], r["kind"]) for r in late.heard] == [(3, "accepted"), (4, "accepted"), (5, "canceled")]
    assert "never told" in played.ear(9).welcome["error"]
    assert Ear(played.venue, key="wrong").welcome == {"error": "the key is wrong"}


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"do": "dance"}, "none of submit"), ({"do": "cancel"}, "missing"), ({"do": "cancel", "order": "nobody"}, "nobody is not known"),
        ({"do": "submit", "orders": [{"client": "a"}]}, "no order"), ({"do": "fault", "fault": "flood"}, "none of"),
        ({"do": "submit", "orders": [order("a", 1, 1) | {"size": 1.5}]}, "whole"),
        ({"do": "submit", "orders": [order("a", 1, 1) | {"instrument": "NO.XNAS"}]}, "not traded here"),
    ],
)  # fmt: skip
def test_a_command_that_is_none_changes_nothing(line: Ear, asked: dict[str, Any], why: str) -> None:
    assert why in line.ask(**asked)["error"]
    assert line.ask(do="status")["status"]["seq"] == 0


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ear]:
    with stage(tmp_path_factory.mktemp("line"), tape()) as found:
        yield found.ear()


def test_books_that_were_cut_off_go_on_before_the_cut_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    import asyncio

    async def told(lines: str) -> int:
        (tmp_path / "books").write_text(lines)
        venue = Venue([SHARE], books=tmp_path / "books")
        await venue.start()
        await venue.stop()
        return venue.matching.seq

    whole = json.dumps({"report": {
        "seq": 1, "ts": 1, "kind": "accepted", "fill": None, "reason": "",
        "order": order("a", 1, 5, BID) | {"venue": "V-1", "linked": [], "status": "accepted"},
    }}) + "\n"  # fmt: skip
    assert asyncio.run(told(whole)) == asyncio.run(told(whole + whole[:50])) == 1
    assert (tmp_path / "books").read_text() == whole
    with pytest.raises(InputError, match="damaged"):
        asyncio.run(told("{}\n" + whole))


def test_a_wrong_command_line_costs_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cift_strategies.feeds.venue", "--gateway", "x:1", "--dataset", "D", "--instruments", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=GUARD_S)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "instrument" in done.stderr
