"""What is wrong with data is counted by kind, with the first of each; sound data counts nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catalog import quality
from catalog.events import EVENT, F_LAST, F_MBP, F_SNAPSHOT, F_TOB, TRADE, Instrument, read_catalog, read_dbn
from catalog.quality import KINDS, Checker, check

ONE = [Instrument("X.V", 10**7, 10**9, 1.0, "USD")]
UNDEFINED = 2**63 - 1


def rows(*items):
    """EVENT rows of (ts, action, side, price in cents, size, order id, flags, sequence), the last three optional."""
    out = np.zeros(len(items), EVENT)
    for n, (ts, action, side, cents, size, *rest) in enumerate(items):
        order, flags, sequence = (*rest, *(0, F_LAST, n + 1)[len(rest) :])
        price = UNDEFINED if cents is None else cents * 10**7
        out[n] = (ts, ts, price, size * 10**9, order, sequence, ord(action), {"B": 1, "A": -1, "N": 0}[side], flags, 0)
    return out


def found(*items):
    q = check([rows(*items)], ONE)
    return {k: n for k, n in q.counts.items() if n}, {k: place[:2] for k, place in q.first.items()}


# --- real markets -----------------------------------------------------------------------------------------------------------------------


def test_the_es_session_is_crossed_before_its_opening_and_otherwise_sound(data):
    events, instruments = read_dbn(data / "databento/esh4-glbx-mdp3-20231225.mbo.dbn.zst")
    q = check([events], instruments)
    assert {k: n for k, n in q.counts.items() if n} == {"crossed": 891}
    assert (q.events, q.last_points) == (62_421, 47_022)
    opening = int(np.datetime64("2023-12-25T23:00:00.0001", "ns").astype(np.int64))
    after = check([events[: int(np.searchsorted(events["ts_init"], opening))]], instruments)
    assert after.counts["crossed"] == 891, "all of them lie before the pre-open auction ends"
    assert q.first["crossed"][1] < opening and q.by_instrument["ESH4.GLBX"]["crossed"] == 891


def test_the_binance_recording_is_sound(data):
    instruments, blocks = read_catalog(data / "catalogs/binance-2024-08-08")
    q = check(blocks, instruments)
    assert not any(q.counts.values()) and q.last_points == 26_089 and q.events == 1_456_836
    assert set(q.counts) == set(KINDS), "kinds that were not found are told as zero"


# --- each kind --------------------------------------------------------------------------------------------------------------------------

BID, ASK = (1, "A", "B", 100, 5, 1), (2, "A", "A", 102, 5, 2)


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("crossed", (3, "A", "B", 103, 5, 3)),
        ("locked", (3, "A", "B", 102, 5, 3)),
        ("crossed_in_snapshot", (3, "A", "B", 103, 5, 3, F_LAST | F_SNAPSHOT)),
        ("locked_in_snapshot", (3, "A", "B", 102, 5, 3, F_LAST | F_SNAPSHOT)),
        ("unknown_cancel", (3, "C", "B", 100, 5, 9)),
        ("unknown_modify", (3, "M", "B", 100, 5, 9)),
        ("duplicate_add", (3, "A", "B", 99, 5, 1)),
        ("partial_cancel", (3, "C", "B", 100, 2, 1)),
        ("ts_init_backwards", (3, "T", "B", 102, 1, 0, 0, 3)),
        ("zero_size", (3, "A", "B", 100, 0, 3)),
        ("zero_size", (3, "T", "B", 100, 0, 0)),
        ("negative_size", (3, "M", "B", 100, -4, 1)),
        ("undefined_price", (3, "A", "B", None, 5, 3)),
        ("no_side", (3, "A", "N", 100, 5, 3)),
        ("sequence_backwards", (3, "A", "B", 99, 5, 3, F_LAST, 1)),
        ("bad_ts_recv", (3, "A", "B", 99, 5, 3, F_LAST | 8)),
        ("maybe_bad_book", (3, "A", "B", 99, 5, 3, F_LAST | 4)),
    ],
)
def test_a_fault_is_counted_once_with_its_place_and_no_other_is(kind, fault):
    events = rows(BID, ASK, fault)
    if kind == "ts_init_backwards":
        events[2]["ts_init"] = 1
    q = check([events], ONE)
    assert {k: n for k, n in q.counts.items() if n} == {kind: 1}
    assert q.first == {kind: (2, int(events[2]["ts_init"]), int(events[2]["sequence"]), "")}


def test_a_price_off_the_tick_is_told_apart_for_orders_and_trades():
    events = rows(BID, ASK, (3, "A", "B", 99, 5, 3), (4, "T", "B", 101, 5, 0))
    events["price"][2:] += 5 * 10**6
    q = check([events], ONE)
    assert {k: n for k, n in q.counts.items() if n} == {"off_tick": 1, "trade_off_tick": 1}
    assert (q.first["off_tick"][:2], q.first["trade_off_tick"][:2]) == ((2, 3), (3, 4))


def test_the_venues_stamp_may_run_backwards_in_a_snapshot_only():
    events = rows(BID, ASK, (3, "A", "B", 99, 5, 3))
    events["ts_event"][2] = 0
    assert check([events], ONE).counts["ts_event_backwards"] == 1
    events["flags"][2] |= F_SNAPSHOT
    assert check([events], ONE).counts["ts_event_backwards"] == 0


def test_a_gap_is_told_where_the_feed_numbers_one_instrument_alone():
    def stream(sequences):
        return check([rows(*((n + 1, "T", "B", 100, 1, 0, 0, s) for n, s in enumerate(sequences)))], ONE).counts["sequence_gap"]

    assert stream([*range(1, 50), *range(60, 100)]) == 1
    assert stream(range(1, 300, 3)) == 0, "the numbers between belong to other instruments"


NEW_YORK = Instrument("X.V", 10**7, 10**9, 1.0, "USD", "09:45-16:00 America/New_York", kind="equity")
EARLY = [f"2024-11-{d}T{h}:{m}" for d, last in ((26, 16), (27, 13)) for h in range(10, last) for m in (10, 30, 50)]


def silent(times, instrument):
    """Trades at `times` of New York in winter."""
    ts = (np.array(times, "M8[ns]") + np.timedelta64(5, "h")).astype(np.int64).tolist()
    events = rows(*((t, "T", "B", 100, 1) for t in ts))
    q = check([events], [instrument])
    assert check(np.array_split(events, 5), [instrument]) == q
    return {k: n for k, n in q.counts.items() if n}, {k: ts[place.position] for k, place in q.first.items()}


def test_an_early_close_or_holiday_of_which_nothing_tells_may_be_lost_data():
    """Thanksgiving of 2024 is Thursday the 28th: the 27th ends at 13:00 here, the 28th has no trade, the 29th opens as ever."""
    told, first = silent([*EARLY, "2024-11-29T09:30"], NEW_YORK)
    assert told == {"silence": 1, "missing_session": 1} and len(set(first.values())) == 1
    assert silent([*EARLY, "2024-11-27T13:31"], NEW_YORK)[0] == {"silence": 1}
    assert silent([*EARLY, "2024-11-27T13:05"], NEW_YORK)[0] == {}


def test_what_status_records_calendar_and_weekend_explain_is_no_silence():
    close, opening = (int(np.datetime64(t, "ns").astype(np.int64)) for t in ("2024-11-27T18:00", "2024-11-29T14:30"))
    assert silent([*EARLY, "2024-11-29T09:30"], replace(NEW_YORK, pauses=((close, opening),)))[0] == {}
    assert silent(["2024-11-22T15:59", "2024-11-25T09:31"], NEW_YORK)[0] == {}
    assert silent(["2024-11-22T15:59", "2024-11-26T09:31"], NEW_YORK)[0] == {"missing_session": 1}


def test_round_the_clock_every_silence_counts_but_not_where_the_session_is_not_known():
    days = ["2024-11-22T15:59", "2024-11-25T09:31"]
    assert silent(days, replace(NEW_YORK, session=None, kind="crypto_perpetual"))[0] == {"silence": 1}
    assert silent(days, replace(NEW_YORK, session=None))[0] == {}


def test_a_snapshot_is_no_sign_of_life():
    events = rows((1, "A", "B", 100, 5, 1, F_LAST | F_SNAPSHOT), (10**15, "T", "B", 100, 1))
    assert not any(check([events], [NEW_YORK]).counts.values())


def test_numbers_may_begin_anew_where_the_book_is_cleared():
    before, clear, after = (2, "A", "A", 102, 5, 2, F_LAST, 900), (3, "R", "N", 0, 0, 0, F_LAST, 1), (4, "A", "A", 102, 5, 3, F_LAST, 2)
    assert found(BID, before, clear, after) == ({}, {})
    assert found(BID, before, after)[0] == {"sequence_backwards": 1}


def test_a_book_is_crossed_only_where_a_venue_event_ends():
    crossing = (3, "A", "B", 103, 5, 3, 0)
    assert found(BID, ASK, crossing, (3, "C", "B", 103, 5, 3)) == ({}, {})
    assert found(BID, ASK, crossing, (3, "M", "B", 104, 5, 3))[0] == {"crossed": 1}


def test_levels_and_quotes_cross_too():
    level, quote = F_LAST | F_MBP, F_LAST | F_TOB
    assert found((1, "A", "B", 100, 5, 0, level), (2, "A", "A", 101, 5, 0, level), (3, "M", "A", 99, 5, 0, level))[0] == {"crossed": 1}
    assert found((1, "A", "B", 100, 5, 0, quote), (2, "A", "A", 101, 5, 0, quote), (3, "A", "A", 99, 5, 0, quote))[0] == {"crossed": 1}
    assert found((1, "A", "B", 100, 5, 0, level), (2, "C", "B", 100, 5, 0, level), (3, "A", "A", 99, 5, 0, level))[0] == {}


# --- against a slow twin, and in pieces -------------------------------------------------------------------------------------------------

step = st.tuples(
    st.integers(0, 4), st.sampled_from("AAACCMTR"), st.sampled_from("AB"), st.integers(97, 104), st.integers(0, 4), st.integers(1, 6),
    st.sampled_from([0, F_LAST, F_LAST | F_SNAPSHOT]), st.integers(0, 9),
)  # fmt: skip


def slow(events):
    """The same counts from plain dictionaries."""
    n = dict.fromkeys(("crossed", "locked", "unknown_cancel", "unknown_modify", "duplicate_add", "partial_cancel", "zero_size"), 0)
    orders = {}
    for e in events:
        action, key, side, price, size = chr(e["action"]), int(e["order_id"]), int(e["side"]), int(e["price"]), int(e["size"])
        if action == "R":
            orders = {}
        elif action == "T":
            n["zero_size"] += size == 0
        elif action == "C":
            n["unknown_cancel"] += key not in orders
            if key in orders:
                left = orders[key][2] - size
                n["partial_cancel"] += size > 0 and left > 0
                orders[key] = (*orders[key][:2], left if size else 0)
        else:
            n["duplicate_add"] += action == "A" and key in orders
            n["zero_size"] += action == "A" and size == 0
            n["unknown_modify"] += action == "M" and key not in orders
            orders[key] = side, price, size
        orders = {k: o for k, o in orders.items() if o[2] > 0}
        if e["flags"] & F_LAST and action != "T" and not e["flags"] & F_SNAPSHOT:
            bid = max((p for s, p, _ in orders.values() if s > 0), default=None)
            ask = min((p for s, p, _ in orders.values() if s < 0), default=None)
            if bid is not None and ask is not None:
                n["crossed"] += bid > ask
                n["locked"] += bid == ask
    return n


@settings(deadline=None)
@given(st.lists(step, max_size=60), st.integers(0, 60))
def test_counts_are_those_of_a_slow_twin_and_a_stream_in_pieces_counts_as_one(steps, cut):
    events = rows(*steps)
    before = events.copy()
    q = check([events], ONE)
    expected = slow(events)
    assert {k: q.counts[k] for k in expected} == expected
    assert check([events[:cut], events[cut:]], ONE) == q
    assert np.array_equal(events, before), "checking changes nothing"


def test_instruments_are_checked_apart():
    two = rows(BID, (2, "A", "A", 99, 5, 1))
    two["instrument"] = [0, 1]
    q = check([two], [*ONE, Instrument("Y.V", 10**7, 10**9, 1.0, "USD")])
    assert not any(q.counts.values()), "the bid of one and the offer of the other do not cross, nor are equal ids duplicates"
    assert list(q.by_instrument) == ["X.V", "Y.V"]


def test_the_record_number_of_the_file_is_told_where_it_is_given():
    checker = Checker(ONE)
    checker.update(rows(BID), np.array([40]))
    checker.update(rows(ASK, (3, "C", "B", 100, 5, 9)), np.array([50, 61]))
    assert checker.result().first == {"unknown_cancel": (61, 3, 2, "")}


def test_many_orders_need_no_more_room_than_they_take():
    n = 200_000
    events = np.zeros(n, EVENT)
    events["ts_init"] = events["ts_event"] = np.arange(n) + 1
    events["action"], events["side"], events["flags"] = ord("A"), 1, F_LAST
    events["order_id"], events["price"], events["size"] = np.arange(n) + 1, 10**9, 10**9
    gone = events.copy()
    gone["action"] = ord("C")
    gone["ts_init"] += n
    gone["ts_event"] += n
    q = check([events, gone], ONE)
    assert not any(q.counts.values()) and q.events == 2 * n


def test_every_kind_has_a_meaning_and_a_trade_alone_is_no_fault():
    assert all(KINDS.values()) and len(quality.NAMES) == len(KINDS)
    assert check([rows((1, "T", "B", 100, 1))], ONE).counts == dict.fromkeys(KINDS, 0)
    assert rows((1, "T", "B", 100, 1))["action"][0] == TRADE
