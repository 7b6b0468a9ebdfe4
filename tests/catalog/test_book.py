"""The order book: equal to dictionaries at every event, to what venues published, and within its memory."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import INT64_MAX, Book

from catalog.book import HEAD, LEVELS, LIVE, by_instrument, depth, new_book
from catalog.errors import InputError
from catalog.events import EVENT, F_LAST, F_MBP, F_SNAPSHOT, F_TOB, SCALE, read_dbn
from catalog.lobster import read_lobster

TICK = 25 * SCALE // 100
LEVEL_FLAGS = {3: 0, 2: F_MBP, 1: F_TOB}


def stream(rows, flags=0):  # type: ignore[no-untyped-def]
    """EVENT array of (action, side, price, size, order id[, flags]) rows, 1 ns apart."""
    out = np.zeros(len(rows), EVENT)
    for i, (action, side, price, size, order_id, *own) in enumerate(rows):
        out[i] = (i, i, price, size, order_id, i, ord(action), side, own[0] if own else flags, 0)
    return out


def levels_of(book, levels):  # type: ignore[no-untyped-def]
    """The oracle's row: what :func:`depth` shows of it."""
    row = []
    for side in (1, -1):
        best = book.side(side, levels) + [(0, 0, 0)] * levels
        row += [tuple(x[c] for x in best[:levels]) for c in range(3)]
    return row


def follow(events, levels=10):  # type: ignore[no-untyped-def]
    """The oracle's rows for every event."""
    book = Book()
    for e in events:
        book.apply(chr(e["action"]), *(int(e[c]) for c in ("side", "price", "size", "order_id", "flags")))
        yield levels_of(book, levels)


def assert_follows(events, levels=10):  # type: ignore[no-untyped-def]
    shown = depth(events, levels)
    for i, wanted in enumerate(follow(events, levels)):
        assert [tuple(x) for x in shown[i].tolist()] == wanted, i


prices = st.integers(90, 110).map(lambda p: p * TICK)
order = st.tuples(st.sampled_from("AAACMMTR"), st.sampled_from([1, -1, 1, -1, 0]), prices, st.integers(-1, 9), st.integers(0, 12))


@settings(max_examples=400, deadline=None)
@given(st.lists(order, max_size=80))
def test_individual_orders_make_the_book_of_the_dictionaries(rows):  # type: ignore[no-untyped-def]
    assert_follows(stream(rows))


@settings(max_examples=300, deadline=None)
@given(st.lists(order, max_size=80))
def test_level_updates_make_the_book_of_the_dictionaries(rows):  # type: ignore[no-untyped-def]
    assert_follows(stream(rows, F_MBP))


@settings(max_examples=100, deadline=None)
@given(st.lists(order, max_size=40))
def test_top_of_book_updates_make_the_book_of_the_dictionaries(rows):  # type: ignore[no-untyped-def]
    assert_follows(stream(rows, F_TOB))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(order, st.sampled_from([0, 0, F_MBP, F_TOB])), max_size=60))
def test_another_depth_of_feed_starts_the_book_anew(rows):  # type: ignore[no-untyped-def]
    assert_follows(stream([(*row, flags) for row, flags in rows]))


extreme = st.sampled_from([0, 1, -1, INT64_MAX, INT64_MAX - 1, -INT64_MAX, -(2**63), 2**62, -(2**62)])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("AAACMR"), st.sampled_from([1, -1]), extreme, extreme, st.integers(0, 2**64 - 1)), max_size=40))
def test_prices_and_sizes_at_the_ends_of_int64_leave_nothing_negative(rows):  # type: ignore[no-untyped-def]
    events = stream(rows)
    assert_follows(events)
    shown = depth(events)
    for name in ("bid_sz", "ask_sz", "bid_ct", "ask_ct"):
        assert (shown[name] >= 0).all()


@pytest.mark.parametrize("feed", [3, 2])
def test_a_book_of_thousands_of_levels_equals_the_dictionaries(feed):  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(7)
    n = 40_000
    events = np.zeros(n, EVENT)
    events["ts_init"] = events["ts_event"] = np.arange(n)
    walk = 10_000 + np.cumsum(rng.choice([-1, 0, 1], n))
    events["side"] = rng.choice([-1, 1], n)
    away = np.where(rng.random(n) < 0.5, rng.integers(0, 30, n), rng.integers(0, 4_000, n))
    events["price"] = (walk - events["side"] * away) * TICK
    events["size"] = rng.integers(1, 50, n) * SCALE
    events["action"] = rng.choice([ord(c) for c in "AAMC"], n)
    events["order_id"] = rng.integers(1, 6_000, n) if feed == 3 else 0
    events["flags"] = LEVEL_FLAGS[feed]
    book, books = Book(), {}
    for start in range(0, n, 1_000):
        piece = events[start : start + 1_000]
        for e in piece:
            arguments = (int(e[c]) for c in ("side", "price", "size", "order_id", "flags"))
            if feed == 2 or chr(e["action"]) != "T":
                quick_apply(book, chr(e["action"]), *arguments)
        shown = depth(piece, 5_000, books)[-1]
        assert [tuple(x) for x in shown.tolist()] == levels_of(book, 5_000)


def quick_apply(book, action, side, price, size, order_id, flags):  # type: ignore[no-untyped-def]
    """As Book.apply, but with the levels of an L3 book kept beside the orders and not summed anew at every event."""
    if flags & F_MBP:
        book.apply(action, side, price, size, order_id, flags)
        return

    def take(s, p, q, whole):  # type: ignore[no-untyped-def]
        level = book.levels[s][p]
        level[0] -= q
        level[1] -= whole
        if not level[1]:
            del book.levels[s][p]

    old = book.orders.pop(order_id, None)
    if action == "C":
        if old and old[2] > size:
            book.orders[order_id] = (*old[:2], old[2] - size)
            take(old[0], old[1], size, 0)
        elif old:
            take(*old, 1)
        return
    if old:
        take(*old, 1)
    book.orders[order_id] = (side, price, size)
    level = book.levels[side].setdefault(price, [0, 0])
    level[0] += size
    level[1] += 1


@settings(max_examples=50, deadline=None)
@given(st.lists(order, min_size=2, max_size=60), st.data())
def test_a_stream_in_pieces_gives_the_rows_of_the_whole(rows, data):  # type: ignore[no-untyped-def]
    events = stream(rows)
    cut = data.draw(st.integers(1, len(events) - 1))
    books: dict[int, object] = {}
    pieces = [depth(events[:cut], 5, books), depth(events[cut:], 5, books)]
    assert np.array_equal(np.concatenate(pieces), depth(events, 5))


def test_each_row_shows_the_book_of_its_own_instrument():
    rng = np.random.default_rng(1)
    one = stream([("A", s, (100 - s * d) * TICK, 5, k) for k, (s, d) in enumerate(zip(rng.choice([1, -1], 300), rng.integers(1, 9, 300)))])
    both = np.repeat(one, 2)
    both["instrument"][1::2] = 7
    both["price"][1::2] += 3 * TICK
    shown, alone = depth(both), depth(one)
    assert np.array_equal(shown[::2], alone)
    assert np.array_equal(shown["bid_sz"][1::2], alone["bid_sz"])
    assert [k for k, _ in by_instrument(both)] == [0, 7]


def test_an_order_id_of_zero_or_beyond_int64_is_an_id_like_others():
    shown = depth(stream([("A", 1, TICK, 5, 0), ("A", 1, TICK, 7, 2**64 - 1), ("C", 1, TICK, 0, 0)]))
    assert shown["bid_sz"][:, 0].tolist() == [5, 12, 7]
    assert shown["bid_ct"][:, 0].tolist() == [1, 2, 1]


def test_an_empty_stream_and_a_silly_number_of_levels():
    assert len(depth(np.zeros(0, EVENT))) == 0
    with pytest.raises(ValueError, match="at least 1"):
        depth(np.zeros(0, EVENT), 0)


def crowd(n, first=1):  # type: ignore[no-untyped-def]
    """`n` bids with ids from `first` on, over 1,000 prices."""
    events = np.zeros(n, EVENT)
    events["order_id"] = np.arange(first, first + n)
    events["action"], events["side"], events["size"] = ord("A"), 1, SCALE
    events["price"] = (events["order_id"] % 1_000 + 1).astype(np.int64) * TICK
    return events


def test_memory_for_orders_returns_after_they_are_gone():
    books = {0: new_book()}
    small = len(books[0])
    events = crowd(300_000)
    depth(events, 1, books)
    assert books[0][LIVE] == 300_000
    large = len(books[0])
    events["action"] = ord("C")
    depth(events, 1, books)
    assert books[0][LIVE] == 0
    few = crowd(70_000)
    few["order_id"] = 1
    depth(few, 1, books)
    assert large > 300_000 and len(books[0]) < 20 * small


@pytest.mark.slow
def test_ten_million_live_orders_do_not_break_the_book():
    books = {0: new_book()}
    for first in range(1, 10_000_001, 1_000_000):
        events = crowd(1_000_000, first)
        shown = depth(events, 1, books)
    assert books[0][LIVE] == 10_000_000
    assert books[0][LEVELS] == 1_000
    assert shown["bid_ct"][-1, 0] == 10_000
    events = crowd(1_000_000)
    events["action"] = ord("C")
    depth(events, 1, books)
    assert books[0][LIVE] == 9_000_000


def test_the_state_is_one_array_that_can_be_stored(tmp_path):
    books = {0: new_book()}
    depth(crowd(100), 1, books)
    np.save(tmp_path / "book.npy", books[0])
    again = {0: np.load(tmp_path / "book.npy")}
    assert books[0].dtype == np.int64 and len(books[0]) > HEAD
    assert np.array_equal(depth(crowd(100, 101), 3, again), depth(crowd(100, 101), 3, books))


# --- what venues published


@pytest.fixture(scope="module")
def es(data):
    return read_dbn(data / "databento/esh4-glbx-mdp3-20231225.mbo.dbn.zst", "ESH4")[0]


def test_es_is_crossed_at_891_venue_events_all_before_the_open(es):
    shown = depth(es, 1)
    bid, ask = shown["bid_px"][:, 0], shown["ask_px"][:, 0]
    last = (es["flags"] & F_LAST) > 0
    crossed = last & (bid >= ask) & (ask > 0)
    assert last.sum() == 47_022
    assert crossed.sum() == 891
    assert es["ts_event"][crossed].max() < np.datetime64("2023-12-25T23:00:00.0001", "ns").astype(np.int64)
    assert np.median((ask - bid)[last & (bid > 0) & (ask > 0)]) == TICK


def test_es_changes_and_cancels_only_orders_that_are_there(es):
    live: set[int] = set()
    book = Book()
    for e in es[["action", "order_id"]].tolist():
        if chr(e[0]) in "CM":
            assert e[1] in live
        elif chr(e[0]) == "A":
            live.add(e[1])
    for e in es[:3_000]:
        book.apply(chr(e["action"]), *(int(e[c]) for c in ("side", "price", "size", "order_id", "flags")))
    shown = depth(es[:3_000], 20)[-1]
    assert [tuple(x) for x in shown.tolist()] == levels_of(book, 20)


def test_es_counts_and_sizes_are_never_negative_and_levels_are_in_order(es):
    shown = depth(es, 10)
    for side, sign in (("bid", -1), ("ask", 1)):
        px, sz, ct = shown[f"{side}_px"], shown[f"{side}_sz"], shown[f"{side}_ct"]
        assert (sz >= 0).all() and (ct >= 0).all()
        assert ((sz > 0) == (ct > 0)).all() and ((sz > 0) == (px > 0)).all()
        there = sz[:, 1:] > 0
        assert (sign * np.diff(px)[there] > 0).all()


def test_esm4_begins_with_a_clear_and_fills_from_its_snapshot(data):
    events, _ = read_dbn(data / "databento/esm4-glbx-mdp3-20240508.mbo.dbn.zst", "ESM4")
    assert chr(events["action"][0]) == "R"
    shown = depth(events, 1)
    assert ((events["flags"] & F_SNAPSHOT) > 0).sum() > 13_000
    assert 0 < shown["bid_px"][-1, 0] < shown["ask_px"][-1, 0]


def lobster_book(path):  # type: ignore[no-untyped-def]
    with pa.input_stream(str(path), compression="zstd" if path.suffix == ".zst" else None) as f:
        return np.loadtxt(f.read().decode().splitlines(), np.int64, delimiter=",")


def quotes(shown):  # type: ignore[no-untyped-def]
    """Depth rows as LOBSTER rows: (n, levels, 4) of ask, size, bid, size."""
    columns = (("ask_px", SCALE // 10_000), ("ask_sz", SCALE), ("bid_px", SCALE // 10_000), ("bid_sz", SCALE))
    return np.stack([shown[name] // unit for name, unit in columns], -1)


@pytest.mark.parametrize(
    ("name", "levels", "transitions"),
    [("AMZN_2012-06-21_34200000_57600000_{}_1.csv.zst", 1, 57_514), ("AAPL_head_{}_10.csv", 10, 998)],
)
def test_every_published_book_follows_from_the_one_before_and_its_message(data, name, levels, transitions):
    """All levels are those published; what moves up from behind the last level that was known is only known to be worse."""
    published = lobster_book(data / "lobster" / name.format("orderbook")).reshape(-1, levels, 4)
    events, _ = read_lobster(data / "lobster" / name.format("message"), symbol="X", date="2012-06-21")
    changes = events[events["action"] != ord("T")]
    message = dict(zip(changes["sequence"].tolist(), changes[["action", "side", "price", "size"]].tolist()))
    rows, checks = [], []
    for i in range(1, len(published)):
        rows.append(("R", 0, 0, 0, 0))
        ids = {}
        for n, (ask, ask_size, bid, bid_size) in enumerate(published[i - 1].tolist()):
            ids[-1, ask * 100_000], ids[1, bid * 100_000] = 2 * n + 1, 2 * n + 2
            rows.append(("A", -1, ask * 100_000, ask_size * SCALE, 2 * n + 1))
            rows.append(("A", 1, bid * 100_000, bid_size * SCALE, 2 * n + 2))
        if (e := message.get(i + 1)) is not None:
            rows.append((chr(e[0]), *e[1:], 99 if e[0] == ord("A") else ids.get((e[1], e[2]), 99)))
        checks.append(len(rows) - 1)
    ours, after = quotes(depth(stream(rows), levels)[checks]), published[1:]
    assert len(ours) == transitions
    for price, size, worse in ((0, 1, 1), (2, 3, -1)):
        known = ours[:, :, size] > 0
        assert (ours[:, :, price] == after[:, :, price])[known].all()
        assert (ours[:, :, size] == after[:, :, size])[known].all()
        assert known[:, :-1].all() or levels == 1
        behind = worse * (after[:, -1, price] - published[:-1, -1, price])
        assert (behind > 0)[~known[:, -1]].all()


def test_the_first_hour_of_aapl_gives_the_first_15999_best_quotes(data):
    published = lobster_book(data / "lobster/AAPL_2012-06-21_34200000_57600000_orderbook_1.csv.zst")
    events, instruments = read_lobster(
        data / "lobster/AAPL_2012-06-21_34200000_37800000_message_50.csv.zst", data / "lobster/AAPL_head_orderbook_10.csv"
    )
    shown = quotes(depth(events, 1))[:, 0]
    seeded = np.flatnonzero(events["sequence"] == 0)[-1]

    def distinct(x):  # type: ignore[no-untyped-def]
        return x[np.r_[True, (np.diff(x, axis=0) != 0).any(1)]]

    assert instruments[0].id == "AAPL.XNAS"
    assert np.array_equal(distinct(shown[seeded:])[:15_999], distinct(published)[:15_999])


def test_a_file_that_is_no_lobster_file_is_refused(tmp_path):
    path = tmp_path / "AAPL_2012-06-21_34200000_57600000_message_10.csv"
    with pytest.raises(InputError, match="does not exist"):
        read_lobster(path)
    path.write_text("hello\n")
    with pytest.raises(InputError, match="not a LOBSTER file"):
        read_lobster(path)
    path.write_text("34200.1,9,1,10,5853300,1\n")
    with pytest.raises(InputError, match="line 1"):
        read_lobster(path)
    with pytest.raises(InputError, match="symbol and date"):
        read_lobster(tmp_path / "x.csv")
