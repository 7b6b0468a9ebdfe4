"""The test venue's matching, on a market written by hand: price and time, the displayed queue, brackets, and books that add up."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from venue_stage import ASK, BID, SHARE, TICK, Tape, order

from catalog.errors import InputError
from catalog.events import ADD, CANCEL, CLEAR, F_LAST, F_MBP, SCALE
from cift_strategies.feeds.venue_matching import Matching, Order, Report

SIDES = {ord("B"): 1, ord("A"): -1, ord("N"): 0}


class Play:
    """A venue that has seen a tape; with `rows` 0 nothing of it yet."""

    def __init__(self, rows: int = 10**9) -> None:
        self.tape, self.heard, self.at = Tape(), list[Report](), 0
        self.m = Matching([SHARE], self.heard.append, [], iter(range(10**9)).__next__)
        if rows:
            self.go()

    def go(self) -> Play:
        """See what was written since."""
        for row in self.tape.rows[self.at :]:
            action = chr(row[10])
            if action != "F":
                self.m.event(0, row[10], SIDES[row[11]], row[6], row[7] * SCALE, row[5], row[8])
        self.at = len(self.tape.rows)
        return self

    def send(self, *told: dict[str, Any]) -> list[tuple[str, str]]:
        n = len(self.heard)
        self.m.submit([Order.parse(o) for o in told])
        return [(r.kind, r.order.client) for r in self.heard[n:]]

    def fills(self, client: str) -> list[tuple[int, int, bool]]:
        """(size, price in ticks, maker) of an order's fills."""
        return [
            (r.fill.size // SCALE, r.fill.price // TICK, r.fill.maker)
            for r in self.heard if r.fill is not None and r.order.client == client
        ]  # fmt: skip

    def order(self, client: str) -> Order:
        return self.m.orders[self.m.known[client]]

    @property
    def position(self) -> int:
        return self.m.positions[SHARE.id] // SCALE


# --- price and time -------------------------------------------------------------------------------------------------------------------


def test_an_order_that_rests_waits_for_what_was_displayed_before_it() -> None:
    p = Play()
    assert p.send(order("a", 1, 100, BID)) == [("accepted", "a")]
    late = p.tape.add(1, 1, BID, 500)
    p.tape.trade(2, -1, 299)
    assert p.go().fills("a") == []
    p.tape.trade(3, -1, 41)
    assert p.go().fills("a") == [(40, BID, True)]
    p.tape.trade(4, -1, 1000)
    assert p.go().fills("a") == [(40, BID, True), (60, BID, True)] and p.order("a").status == "filled" and late


def test_a_cancel_before_us_brings_us_forward_one_behind_us_does_not() -> None:
    p = Play()
    first = next(i for i, o in _orders(p).items() if o[:2] == (1, BID))
    p.send(order("a", 1, 100, BID))
    behind = p.tape.add(1, 1, BID, 700)
    p.tape.cancel(2, behind, 400)
    p.tape.cancel(3, first)
    p.tape.trade(4, -1, 210)
    assert p.go().fills("a") == [(10, BID, True)]


def test_an_order_reduced_in_place_keeps_its_place_before_us() -> None:
    p = Play()
    first = next(i for i, o in _orders(p).items() if o[:2] == (1, BID))
    p.send(order("a", 1, 100, BID))
    p.tape.cancel(1, first, 60)
    p.tape.trade(2, -1, 245)
    assert p.go().fills("a") == [(5, BID, True)]


def test_of_two_of_ours_the_older_is_first_and_no_share_is_sold_twice() -> None:
    p = Play()
    p.send(order("a", 1, 100, BID))
    p.send(order("b", 1, 100, BID))
    p.tape.trade(1, -1, 300)
    p.tape.add(2, 1, BID, 130)
    p.tape.trade(3, -1, 130)
    assert p.go().fills("a") == [(100, BID, True)] and p.fills("b") == [(30, BID, True)]


def test_a_market_that_trades_or_quotes_through_our_price_fills_us() -> None:
    p = Play()
    p.send(order("a", 1, 50, BID - 1), order("b", -1, 50, ASK + 1))
    p.tape.trade(1, -1, 300)  # the touch
    assert p.go().fills("a") == []
    p.tape.trade(2, -1, 301)  # all of the next level, one more beyond it
    assert p.go().fills("a") == [(1, BID - 1, True)]
    p.tape.add(3, -1, BID - 1, 20)  # an offer that would have met our bid
    assert p.go().fills("a") == [(1, BID - 1, True), (20, BID - 1, True)]
    p.tape.add(4, -1, BID - 2, 500)
    assert p.go().fills("a")[-1] == (29, BID - 1, True) and p.position == 50 and p.fills("b") == []


def test_an_order_that_crosses_takes_what_is_displayed_level_by_level_and_only_once() -> None:
    p = Play()
    assert p.send(order("a", 1, 700, ASK + 1)) == [("accepted", "a"), ("filled", "a"), ("filled", "a")]
    assert p.fills("a") == [(300, ASK, False), (300, ASK + 1, False)] and p.order("a").left == 100 * SCALE
    p.send(order("b", 1, 100, ASK + 1, life="ioc"))
    assert p.fills("b") == [] and p.order("b").status == "canceled"
    p.tape.add(1, -1, ASK + 1, 40)  # the level has changed: what is displayed is there again, for what rests before it
    p.go()
    p.send(order("c", 1, 300, ASK + 1, life="ioc"))
    assert p.fills("a")[2:] == [(100, ASK + 1, True)] and p.fills("c") == [(240, ASK + 1, False)]


@pytest.mark.parametrize(("size", "status"), [(300, "filled"), (301, "canceled")])
def test_fill_or_kill_is_all_or_nothing(size: int, status: str) -> None:
    p = Play()
    p.send(order("a", 1, size, ASK, life="fok"))
    assert p.order("a").status == status and bool(p.fills("a")) == (status == "filled")


def test_a_market_order_ends_with_the_market() -> None:
    p = Play()
    p.send(order("a", -1, 2_000))
    assert p.position == -1_500 and p.order("a").status == "canceled" and p.order("a").left == 500 * SCALE


def test_a_stop_sleeps_until_the_other_side_comes_to_its_trigger() -> None:
    p = Play()
    p.send(order("a", -1, 100, trigger=BID - 1))
    p.tape.trade(1, -1, 299)
    assert p.go().fills("a") == []
    p.tape.trade(2, -1, 1)
    assert p.go().fills("a") == [(100, BID - 1, False)]


def test_a_book_that_was_cleared_and_came_again_keeps_our_place_by_size() -> None:
    p = Play()
    p.send(order("a", 1, 100, BID))
    p.tape.trade(1, -1, 120)
    p.go()
    p.m.event(0, CLEAR, 0, 0, 0, 0, 32)
    for n, (side, price, size) in enumerate(((1, BID, 90), (1, BID, 95), (1, BID, 400), (-1, ASK, 100)), 900):
        p.m.event(0, ADD, side, price * TICK, size * SCALE, n, 32 | (F_LAST if n == 903 else 0))
    p.m.event(0, ord("T"), -1, BID * TICK, 185 * SCALE, 0, 0)
    assert p.fills("a") == [(5, BID, True)]


def test_on_a_feed_of_levels_what_leaves_a_level_is_taken_to_have_been_behind_us() -> None:
    m, heard = None, list[Report]()
    m = Matching([SHARE], heard.append)
    for side, price in ((1, BID), (-1, ASK)):
        m.event(0, ADD, side, price * TICK, 300 * SCALE, 0, F_MBP | F_LAST)
    m.submit([Order.parse(order("a", 1, 100, BID))])
    m.event(0, ADD, 1, BID * TICK, 1_000 * SCALE, 0, F_MBP | F_LAST)
    m.event(0, ADD, 1, BID * TICK, 400 * SCALE, 0, F_MBP | F_LAST)
    m.event(0, ord("T"), -1, BID * TICK, 300 * SCALE, 0, 0)
    assert [r.kind for r in heard] == ["accepted"]
    m.event(0, ADD, 1, BID * TICK, 50 * SCALE, 0, F_MBP | F_LAST)
    m.event(0, ord("T"), -1, BID * TICK, 25 * SCALE, 0, 0)
    assert heard[-1].fill is not None and heard[-1].fill.size == 25 * SCALE
    m.event(0, CANCEL, 1, BID * TICK, 0, 0, F_MBP | F_LAST)


# --- brackets, rejects, cancels -------------------------------------------------------------------------------------------------------


def bracket(size: int = 100) -> list[dict[str, Any]]:
    family = {"reduce_only": True, "parent": "in"}
    return [
        order("in", 1, size, BID), order("stop", -1, size, trigger=BID - 3, linked=["target"], **family),
        order("target", -1, size, ASK + 2, linked=["stop"], **family),
    ]  # fmt: skip


def test_a_bracket_sleeps_until_its_entry_fills_and_grows_with_it() -> None:
    p = Play()
    assert p.send(*bracket()) == [("accepted", "in"), ("held", "stop"), ("held", "target")]
    p.tape.trade(1, -1, 330)
    p.go()
    assert [(p.order(n).status, p.order(n).size // SCALE) for n in ("stop", "target")] == [("accepted", 30), ("accepted", 30)]
    p.tape.add(2, 1, BID, 70)
    p.tape.trade(3, -1, 70)
    p.go()
    assert p.position == 100 and p.order("stop").size == p.order("target").size == 100 * SCALE


def test_of_two_siblings_one_ends_the_other_and_a_part_shrinks_it() -> None:
    p = Play()
    p.send(*bracket())
    p.tape.trade(1, -1, 300)
    p.tape.add(1, 1, BID, 100)
    p.tape.trade(2, -1, 100)
    p.go()
    p.tape.trade(3, 1, 300 + 300 + 340)  # everything up to the target's price, and 40 of it
    p.go()
    assert p.fills("target") == [(40, ASK + 2, True)] and p.order("stop").left == 60 * SCALE
    p.tape.add(4, 1, ASK + 2, 1_000)
    p.go()
    assert p.position == 0 and p.order("stop").status == "canceled" and p.order("target").status == "filled"


def test_an_entry_that_ends_without_a_fill_takes_its_children_along() -> None:
    p = Play()
    p.send(*bracket())
    p.m.cancel("in")
    assert [(r.kind, r.order.client) for r in p.heard[3:]] == [("canceled", "in"), ("canceled", "stop"), ("canceled", "target")]
    assert p.m._working[SHARE.id] == {}


def test_reduce_only_never_opens() -> None:
    p = Play()
    assert p.send(order("a", -1, 10, reduce_only=True)) == [("rejected", "a")]
    p.send(order("b", 1, 10))
    p.send(order("c", -1, 25, reduce_only=True))
    assert p.position == 0 and p.fills("c") == [(10, BID, False)] and p.order("c").status == "canceled"


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (order("a", 1, 100, ASK, post_only=True), "post-only"),
        (order("a", 1, 0, BID), "multiple of the lot"),
        (order("a", 2, 100, BID), "either side"),
        (order("a", 1, 100, BID) | {"price": BID * TICK + 1}, "multiples of the tick"),
        (order("a", 1, 100) | {"kind": "limit"}, "has a price"),
        (order("a", 1, 100, BID, parent="nobody"), "not known"),
    ],
)
def test_an_order_that_cannot_be_is_rejected_with_its_reason(told: dict[str, Any], why: str) -> None:
    p = Play()
    assert p.send(told) == [("rejected", "a")] and why in p.heard[-1].reason and p.position == 0


def test_an_order_before_there_is_a_market_is_held_until_there_is_one() -> None:
    p = Play(rows=0)
    assert p.send(order("a", 1, 100), order("b", 1, 100)) == [("held", "a"), ("held", "b")]
    p.m.cancel("b")
    p.m.event(0, ADD, -1, ASK * TICK, 300 * SCALE, 7, F_LAST)
    assert p.fills("a") == [(100, ASK, False)] and p.position == 100


def test_an_order_is_not_taken_twice_nor_one_of_an_instrument_that_is_not_traded() -> None:
    p = Play()
    with pytest.raises(InputError, match="not traded here"):
        p.send(order("a", 1, 100), order("b", 1, 100) | {"instrument": "OTHER.XNAS"})
    p.send(order("a", 1, 100))
    with pytest.raises(InputError, match="known already"):
        p.send(order("b", 1, 100), order("a", 1, 100))
    assert p.position == 100 and "b" not in p.m.known


def test_a_cancel_may_come_too_late() -> None:
    p = Play()
    p.send(order("a", 1, 100, BID))
    p.m.cancel("a", races=True)
    p.m.cancel("a")
    assert [r.kind for r in p.heard] == ["accepted", "filled", "cancel_rejected", "cancel_rejected"] and p.position == 100
    with pytest.raises(KeyError):
        p.m.cancel("nobody")


def test_a_changed_price_goes_to_the_end_of_its_queue_a_smaller_size_does_not() -> None:
    p = Play()
    p.send(order("a", 1, 100, BID))
    p.send(order("b", 1, 100, BID - 1))
    p.tape.trade(1, -1, 250)
    p.go()
    p.m.modify("a", 60 * SCALE, None, None)
    p.m.modify("b", None, BID * TICK, None)
    p.tape.add(2, 1, BID, 500)
    p.tape.trade(3, -1, 60)
    assert p.go().fills("a") == [(10, BID, True)] and p.fills("b") == []
    p.tape.trade(4, -1, 55)
    assert p.go().fills("a")[1:] == [(50, BID, True)] and p.fills("b") == [(5, BID, True)]
    p.m.modify("a", 5 * SCALE, None, None)
    assert p.heard[-1].kind == "modify_rejected"


# --- books ----------------------------------------------------------------------------------------------------------------------------


def test_fees_are_the_makers_and_the_takers() -> None:
    p = Play()
    p.send(order("a", 1, 100, ASK))
    p.send(order("b", -1, 100, ASK))
    p.tape.trade(1, 1, 400)
    p.go()
    taker, maker = (round(share * 100 * ASK / 100 + 0.001 * 100, 2) for share in (3e-5, 1e-5))  # in cents, as Nautilus counts
    assert [r.fill.fee for r in p.heard if r.fill] == pytest.approx([taker, maker])
    assert p.m.cash["USD"] == pytest.approx(-taker - maker) and p.m.equity(1_000.0)["USD"] == pytest.approx(1_000 - taker - maker)


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_the_books_add_up_and_the_reports_alone_make_them_again(seed: int) -> None:
    """No fill is beyond its order, its price, or what traded or was displayed; positions and cash are the sums of the fills."""
    rng, p = random.Random(seed), Play()
    for n in range(120):
        what, side = rng.random(), rng.choice((1, -1))
        left = _orders(p)
        if what < 0.3:
            price = rng.randint(BID - 4, ASK + 4)
            asks, bids = ([q for s, q, _ in left.values() if s == own] for own in (-1, 1))
            best = min(asks, default=ASK), max(bids, default=BID)
            p.tape.add(n, side, min(price, best[0] - 1) if side > 0 else max(price, best[1] + 1), rng.randint(1, 200))
        elif what < 0.45:
            p.tape.cancel(n, rng.choice(list(left)), rng.choice((None, 1)))
        elif what < 0.65 and sum(s == -side for s, _, _ in left.values()) > 6:
            p.tape.trade(n, side, rng.randint(1, 250))
        elif what < 0.9:
            kind, life = rng.choice(("limit", "limit", "market", "stop")), rng.choice(("gtc", "gtc", "ioc", "fok"))
            price, more = rng.randint(BID - 4, ASK + 4), {"life": life, "reduce_only": rng.random() < 0.3, "post_only": rng.random() < 0.2}
            if kind == "stop":
                more["trigger"] = price
            p.send(order(f"o{n}", side, rng.randint(1, 300), price if kind == "limit" else None, **more))
        elif p.m.known:
            p.m.cancel(rng.choice(list(p.m.known)), rng.random() < 0.2)
        p.go()
    position, cash = 0, 0.0
    for r in p.heard:
        o, f = r.order, r.fill
        assert 0 <= o.filled <= o.size and o.open == (o.status not in ("filled", "canceled", "rejected"))
        if f is not None:
            assert f.size > 0 and (o.price is None or (o.price - f.price) * o.side >= 0)
            was, position = position, position + o.side * f.size
            cash -= o.side * f.size / SCALE * f.price / SCALE + f.fee
            assert not o.reduce_only or abs(position) < abs(was)
    assert p.m.positions[SHARE.id] == position and p.m.cash["USD"] == pytest.approx(cash)
    assert [r.seq for r in p.heard] == list(range(1, len(p.heard) + 1))
    again = Matching([SHARE], lambda _: None, [Report.parse(json.loads(json.dumps(r.told()))) for r in p.heard])
    ours, theirs = (m.status() | {"ts": 0, "market": 0, "newest": 0} for m in (p.m, again))
    assert ours == theirs


def _orders(p: Play) -> dict[int, tuple[int, int, int]]:
    from venue_stage import orders

    return orders(p.tape.rows)
