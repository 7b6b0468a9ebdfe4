"""Entries that rest in the book: when they are chosen, how they are filled, and what follows when they are not."""

from __future__ import annotations

from pathlib import Path

import pytest
from tapes import MS, SHARE, Script, Tape, play, write

from cift_strategies.entries import best, ways
from cift_strategies.settings import Settings

ALONE = {"flat_before_close_s": 0.0, "renew": False}


def market(tmp_path: Path, sold: float = 0, bid: int = 10_000, ask: int = 10_002, at: float = 1_100) -> Path:
    """Bid and ask for three seconds; at `at` ms so many units are sold into the bid."""
    tape = Tape().book(0, bid, ask).trade(1, 1, ask, 5).quiet(5, at, bid, ask)
    if sold:
        tape.trade(at, -1, bid, sold)
    return write(tmp_path, [tape.quiet(at + 1, 3_000, bid, ask)])


def test_a_joining_order_is_filled_at_the_touch_as_a_maker_once_the_queue_before_it_has_traded(tmp_path: Path) -> None:
    script = Script({1_000: (1, 8.0, 1)})
    played = play(market(tmp_path, sold=30_000), [SHARE], script, settings=Settings(entry="join", **ALONE))
    first = played.fills[0]
    assert first["role"] == "entry" and first["liquidity"] == "maker" and first["price"] == pytest.approx(100.00)
    assert first["ts"] >= script.made[0].ts + 3 * MS
    assert played.positions[0]["closed_by"] == "horizon" and not played.strategy.ledger.positions[0].size


def test_an_improving_order_rests_a_tick_inside_and_needs_room_for_it(tmp_path: Path) -> None:
    played = play(market(tmp_path / "a", sold=30_000), [SHARE], Script({1_000: (1, 8.0, 1)}), settings=Settings(entry="improve", **ALONE))
    assert played.fills[0]["price"] == pytest.approx(100.01) and played.fills[0]["liquidity"] == "maker"
    narrow = market(tmp_path / "b", sold=30_000, ask=10_001)
    refused = play(narrow, [SHARE], Script({1_000: (1, 8.0, 1)}), settings=Settings(entry="improve", **ALONE))
    assert refused.decisions["move does not pay the costs"] == 1 and not refused.fills


def test_an_order_that_rests_in_vain_crosses_when_the_move_still_pays(tmp_path: Path) -> None:
    calls = {1_000: (1, 8.0, 1), 1_495: (1, 8.0, 1)}
    script = Script(calls)
    played = play(market(tmp_path), [SHARE], script, settings=Settings(entry="join", entry_wait_ms=500, **ALONE))
    entry = played.fills[0]
    decided = script.made[0].ts + 2 * MS
    assert entry["role"] == "entry" and entry["price"] == pytest.approx(100.02) and entry["liquidity"] == "taker"
    assert entry["ts"] >= decided + 500 * MS
    assert played.decisions["entry not filled"] == 1 and played.decisions["entered"] == 2


def test_an_order_that_rests_in_vain_is_given_up_when_the_move_is_over(tmp_path: Path) -> None:
    """The newest prediction has no direction any more; or crossing was not asked for."""
    played = play(market(tmp_path / "a"), [SHARE], Script({1_000: (1, 8.0, 1)}), settings=Settings(entry="join", **ALONE))
    assert not played.fills and played.decisions["entered"] == 1 and played.decisions["entry not filled"] == 1
    calls = {1_000: (1, 8.0, 1), 1_495: (1, 8.0, 1)}
    given_up = play(market(tmp_path / "b"), [SHARE], Script(calls), settings=Settings(entry="join", then="cancel", **ALONE))
    assert not given_up.fills and given_up.strategy.order_types["OrderCanceled"] == 3  # the entry, its stop and its target


def test_what_is_filled_while_it_rests_is_kept_and_the_rest_is_cancelled(tmp_path: Path) -> None:
    """The queue of 10,000 and 100 more are traded: 100 of the order, whose stop and target are of that size."""
    played = play(market(tmp_path, sold=10_100), [SHARE], Script({1_000: (1, 8.0, 1)}), settings=Settings(entry="join", **ALONE))
    (position,) = played.positions
    assert position["size"] == pytest.approx(100) and position["closed_by"] == "horizon"
    assert sum(f["side"] * f["size"] for f in played.fills) == 0


def test_what_pays_most_is_chosen_by_edge_and_by_how_often_it_is_filled() -> None:
    s = Settings(entry="best", adverse_ticks=0.5, join_fills=0.4, improve_fills=0.6)
    wide = ways(5.0, 4.0, 0.2, 0.0, s)
    assert {e.way: round(e.edge, 9) for e in wide} == {"cross": 0.6, "join": 4.3, "improve": 3.3}
    chosen = best(wide, 0.1)
    assert chosen is not None and chosen.way == "improve" and chosen.worth == pytest.approx(0.6 * 3.3)
    sure = best(ways(20.0, 1.0, 0.2, 0.0, s), 0.1)
    assert sure is not None and sure.way == "cross"
    assert best(ways(0.5, 1.0, 0.2, 0.0, s), 0.1) is None
    assert [e.way for e in ways(5.0, 1.0, 0.2, 0.0, Settings())] == ["cross"]
