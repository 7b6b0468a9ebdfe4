"""Features: equal to their definitions, causal, the same however the stream is cut, and without a memory of scale, place or side."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catalog.events import EVENT, F_MBP, F_SNAPSHOT, F_TOB, SCALE, Instrument, read_catalog, read_dbn
from cift_models.feature_table import PAPERS
from cift_models.features import FEATURES, INPUTS, NAMES, State, features_markdown, new_state, replay, step

ROOT = Path(__file__).resolve().parents[2]
TICK = 25 * SCALE // 100
OPEN = 1_703_545_200_000_000_000  # 2023-12-25 23:00 UTC
FLAGS = {3: 0, 2: F_MBP, 1: F_TOB}
COLUMN = {name: i for i, name in enumerate(NAMES)}
UNIT = {f.name: f.unit for f in FEATURES}


def an_instrument(level=3, tick=TICK, session=None):  # type: ignore[no-untyped-def]
    return Instrument("X", tick, SCALE, 1.0, "USD", session, level=level)


def market(seed, n, level=3, start=OPEN):  # type: ignore[no-untyped-def]
    """A random stream that tries everything: stamps shared and far apart, sweeps, hidden trades, snapshots, clears, unknown ids."""
    rng = np.random.default_rng(seed)
    e = np.zeros(n, EVENT)
    gap = np.where(rng.random(n) < 0.6, rng.choice([1_000, 10**6, 10**7, 10**8, 10**9, 3 * 10**9], n), 0)
    e["ts_event"] = start + np.cumsum(gap)
    e["ts_init"] = e["ts_event"] + rng.integers(0, 3, n)
    e["action"] = rng.choice([ord(c) for c in ("AAAACMMTT" if level > 1 else "AAMMCTT")], n)
    e["action"][rng.random(n) < 0.004] = ord("R")
    e["side"] = rng.choice([-1, 1], n)
    walk = 1_000 + np.cumsum(rng.choice([-1, 1], n) * (rng.random(n) < 0.06))
    e["price"] = (walk - e["side"] * np.where(rng.random(n) < 0.01, -1, rng.integers(1, 9, n))) * TICK
    e["size"] = np.where(rng.random(n) < 0.05, 500, rng.integers(0, 20, n)) * SCALE
    e["order_id"] = rng.integers(1, 40, n) if level == 3 else 0
    trade = e["action"] == ord("T")
    e["flags"] = np.where(trade, 0, FLAGS[level] | np.where(rng.random(n) < 0.02, F_SNAPSHOT, 0))
    e["side"][(rng.random(n) < 0.05) & trade] = 0
    return e


def assert_close(ours, wanted, where=""):  # type: ignore[no-untyped-def]
    """Within 1e-9, relative or (sums that cancel) absolute."""
    for name, a, b in zip(NAMES, ours, wanted):
        assert np.isclose(a, b, rtol=1e-9, atol=1e-8, equal_nan=True), (name, a, b, where)


def assert_defined(events, instrument, rows):  # type: ignore[no-untyped-def]
    """The kernel's rows equal the oracle's; returns which columns had a value."""
    ours, tape = replay(events, [instrument]), oracles.Tape(events, instrument)
    told = np.zeros(len(NAMES), bool)
    for i in rows:
        wanted = oracles.features(tape, i)
        assert set(wanted) == set(NAMES)
        assert_close(ours[i], [wanted[name] for name in NAMES], i)
        told |= ~np.isnan(ours[i])
    return told


# --- the table


def test_there_are_at_least_forty_features_each_with_its_source():
    assert len(set(NAMES)) == len(FEATURES) >= 40
    assert NAMES[0] == "mid" and COLUMN["mid"] not in INPUTS and COLUMN["spread"] in INPUTS
    for f in FEATURES:
        assert f.unit and f.definition and f.needs in (1, 2, 3)
        assert f.citation and set(f.citation.split()) <= set(PAPERS)
    assert {f.group for f in FEATURES} == {"book shape", "flow", "toxicity and impact", "price", "time"}


def test_the_page_of_features_is_made_from_the_table():
    assert (ROOT / "docs/features.md").read_text() == features_markdown() + "\n"


# --- definitions


@pytest.mark.parametrize("level", [3, 2, 1])
def test_every_feature_equals_its_definition_on_long_streams(level):
    told = np.zeros(len(NAMES), bool)
    for seed in range(2):
        told |= assert_defined(market(seed, 900, level), an_instrument(level), [*range(0, 900, 43), 899])
    assert [name for name, f, there in zip(NAMES, FEATURES, told) if (f.needs <= level) != there] == []


rows = st.lists(
    st.tuples(
        st.sampled_from([0, 0, 1, 10**6, 10**9, 10**11]),
        st.sampled_from("AAAAACMMTTTR"),
        st.sampled_from([1, -1, 1, -1, 1, -1, 0]),
        st.integers(95, 105),
        st.sampled_from([0, 1, 2, 3, 5, 8, 1000]),
        st.integers(1, 9),
        st.sampled_from([0, 0, 0, 0, 0, F_SNAPSHOT]),
    ),
    min_size=1,
    max_size=60,
)


def tiny(rows, level):  # type: ignore[no-untyped-def]
    e, t = np.zeros(len(rows), EVENT), OPEN
    for i, (gap, action, side, price, size, order_id, flags) in enumerate(rows):
        t += gap
        own = FLAGS[level] | flags if action != "T" else 0
        e[i] = (t, t, price * TICK, size * SCALE, order_id if level == 3 else 0, i, ord(action), side, own, 0)
    return e


@settings(max_examples=150, deadline=None)
@given(rows, st.sampled_from([3, 3, 2, 1]))
def test_every_feature_equals_its_definition_on_small_streams(rows, level):  # type: ignore[no-untyped-def]
    events = tiny(rows, level)
    assert_defined(events, an_instrument(level), range(0, len(events), 1 + len(events) // 8))


@pytest.fixture(scope="module")
def es(data):
    events, (instrument,) = read_dbn(data / "databento/esh4-glbx-mdp3-20231225.mbo.dbn.zst", "ESH4")
    session = "17:00-16:00 America/Chicago"
    return events, Instrument(instrument.id, TICK, SCALE, 50.0, "USD", session)


@pytest.fixture(scope="module")
def binance(data):
    instruments, blocks = read_catalog(data / "catalogs/binance-2024-08-08")
    pieces, n = [], 0
    for block in blocks:
        pieces.append(block)
        n += len(block)
        if n > 400_000:
            break
    return np.concatenate(pieces), instruments


def test_every_feature_equals_its_definition_on_es(es):
    events, instrument = es
    opening = int(np.searchsorted(events["ts_init"], OPEN))
    for start in (opening - 200, 40_000):
        assert_defined(events[start : start + 1_200], instrument, range(99, 1_200, 100))


def test_every_feature_equals_its_definition_on_binance(binance):
    events, instruments = binance
    for k in range(len(instruments)):
        own = np.ascontiguousarray(events[events["instrument"] == k][30_000:31_500])
        own["instrument"] = 0
        assert_defined(own, instruments[k], range(199, 1_500, 130))


# --- causal, and the same in pieces


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([3, 2, 1]), st.data())
def test_a_stream_in_pieces_gives_the_rows_of_the_whole_to_the_bit(seed, level, data):  # type: ignore[no-untyped-def]
    events, instrument = market(seed, 200, level), an_instrument(level)
    whole = replay(events, [instrument])
    cuts = sorted(data.draw(st.lists(st.integers(0, 200), max_size=5)))
    states: dict[int, State] = {}
    pieces = [replay(events[a:b], [instrument], states) for a, b in zip([0, *cuts], [*cuts, 200])]
    assert np.concatenate(pieces).tobytes() == whole.tobytes()


def test_events_one_by_one_give_the_rows_of_a_replay_to_the_bit(es):
    events, instrument = es[0][:12_000], es[1]
    whole = replay(events, [instrument])
    state, row = new_state(instrument), np.empty((1, len(NAMES)))
    for i in range(len(events)):
        state.advance(events[i : i + 1], row)
        assert row.tobytes() == whole[i].tobytes()


def test_no_row_depends_on_events_after_it():
    events, other = market(1, 500), market(2, 500)
    changed = np.concatenate([events[:300], other[300:]])
    changed["ts_event"] = changed["ts_init"] = np.maximum.accumulate(changed["ts_init"])
    events["ts_event"] = events["ts_init"] = np.maximum.accumulate(events["ts_init"])
    assert replay(events, [an_instrument()])[:300].tobytes() == replay(changed, [an_instrument()])[:300].tobytes()
    assert replay(events, [an_instrument()])[:300].tobytes() == replay(events[:300], [an_instrument()]).tobytes()


def test_instruments_in_one_stream_do_not_touch_each_other(binance):
    events, instruments = binance[0][:150_000], binance[1]
    together = replay(events, instruments)
    for k, instrument in enumerate(instruments):
        own = events["instrument"] == k
        alone = np.ascontiguousarray(events[own])
        alone["instrument"] = 0
        assert replay(alone, [instrument]).tobytes() == together[own].tobytes()


def test_step_writes_the_row_that_replay_writes():
    events, instrument = market(3, 40), an_instrument()
    state, out = new_state(instrument), np.empty((40, len(NAMES)))
    state.advance(events[:1], out[:1])
    for i in range(1, 40):
        step(state.words, events, i, out)
    assert out.tobytes() == replay(events, [instrument]).tobytes()


def test_rows_that_do_not_fit_and_instruments_that_are_not_there_are_refused():
    events, state = market(3, 40), new_state(an_instrument())
    for shape in ((39, len(NAMES)), (40, len(NAMES) - 1)):
        with pytest.raises(ValueError, match="a row for each event"):
            state.advance(events, np.empty(shape))
    with pytest.raises(IndexError):
        replay(events, [])
    crowd = np.repeat(events[:1], 1_000)
    crowd["order_id"], crowd["action"], crowd["size"] = np.arange(1_000), ord("A"), SCALE
    out = np.empty((1_000, len(NAMES)))
    state.advance(crowd[:1], out)

    def step_on_and_on():  # type: ignore[no-untyped-def]
        for i in range(1, 1_000):
            step(state.words, crowd, i, out)

    with pytest.raises(MemoryError, match="makes it"):
        step_on_and_on()


def test_a_stored_state_goes_on_as_if_nothing_had_happened(tmp_path):
    events, instrument = market(4, 400), an_instrument()
    states: dict[int, State] = {}
    replay(events[:250], [instrument], states)
    np.save(tmp_path / "words.npy", states[0].words)
    again = {0: State(instrument, np.load(tmp_path / "words.npy"))}
    copied = {0: states[0].copy()}
    wanted = replay(events, [instrument])[250:]
    for state in (again, copied, states):
        assert replay(events[250:], [instrument], state).tobytes() == wanted.tobytes()


def test_the_same_rows_without_the_jit():
    """The kernels are plain Python too: coverage and debugging run them so."""
    code = (
        "import sys; sys.path[:0] = ['tests', 'tests/cift_models']; import numpy as np; from test_features import *\n"
        "for level in (3, 2, 1): sys.stdout.buffer.write(replay(market(5, 150, level), [an_instrument(level)]).tobytes())"
    )
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    plain = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True).stdout
    ours = b"".join(replay(market(5, 150, level), [an_instrument(level)]).tobytes() for level in (3, 2, 1))
    assert np.allclose(np.frombuffer(plain), np.frombuffer(ours), rtol=1e-12, atol=1e-12, equal_nan=True)


def test_the_state_is_bounded_however_long_the_stream():
    state, out = {0: new_state(an_instrument())}, np.empty((50_000, len(NAMES)))
    events = market(6, 50_000)
    replay(events, [an_instrument()], state, out)
    size = len(state[0].words)
    for _ in range(4):
        events["ts_event"] += 10**15
        events["ts_init"] += 10**15
        replay(events, [an_instrument()], state, out)
    assert len(state[0].words) == size < 20_000


# --- bounds and symmetries


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([3, 2, 1]))
def test_shares_and_imbalances_stay_in_their_bounds(seed, level):  # type: ignore[no-untyped-def]
    out = replay(market(seed, 300, level), [an_instrument(level)])
    for name, unit in UNIT.items():
        values = out[:, COLUMN[name]]
        values = values[~np.isnan(values)]
        if unit in ("0..1", "share"):
            assert ((values >= 0) & (values <= 1)).all(), name
        elif unit == "-1..1":
            assert ((values >= -1) & (values <= 1)).all(), name
        if name in ("gap_bid", "gap_ask", "volatility_8s", "volatility_robust", "high_distance", "low_distance", "amihud", "rate_buy"):
            assert (values >= 0).all(), name


MIRROR = {f"{a}_{s}": f"{a}_{o}" for a in ("slope", "queue", "orders", "gap") for s, o in (("bid", "ask"), ("ask", "bid"))}
MIRROR |= {f"{a}_{s}": f"{a}_{o}" for a in ("rate", "share") for s, o in (("buy", "sell"), ("sell", "buy"))}
MIRROR |= {"high_distance": "low_distance", "low_distance": "high_distance"}
SIGNED = ("imbalance", "weighted_mid", "microprice", "ofi", "return", "signed_jump")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([3, 2, 1]))
def test_a_market_seen_in_the_mirror_has_the_mirrored_features(seed, level):  # type: ignore[no-untyped-def]
    events = market(seed, 300, level)
    mirrored = events.copy()
    mirrored["side"] = -events["side"]
    mirrored["price"] = 2_000 * TICK - events["price"]
    out, seen = replay(events, [an_instrument(level)]), replay(mirrored, [an_instrument(level)])
    for name, i in COLUMN.items():
        wanted = out[:, COLUMN[MIRROR.get(name, name)]]
        if name == "mid":
            wanted = 2_000 * 0.25 - wanted
        elif any(part in name for part in SIGNED):
            wanted = -wanted
        assert np.allclose(seen[:, i], wanted, rtol=1e-9, atol=1e-9, equal_nan=True), name


@pytest.mark.parametrize("level", [3, 2, 1])
def test_features_know_neither_the_unit_of_price_and_size_nor_the_price_itself(level):
    events = market(8, 400, level)
    out = replay(events, [an_instrument(level)])
    scaled, shifted = events.copy(), events.copy()
    scaled["price"] *= 3
    scaled["size"] *= 7
    shifted["price"] += 10_000 * TICK
    for other, tick, mid in ((scaled, 3 * TICK, out[:, 0] * 3), (shifted, TICK, out[:, 0] + 2_500)):
        seen = replay(other, [an_instrument(level, tick)])
        assert np.allclose(seen[:, 0], mid, rtol=1e-12, equal_nan=True)
        for i in INPUTS:
            assert np.allclose(seen[:, i], out[:, i], rtol=1e-8, atol=1e-8, equal_nan=True), NAMES[i]


def test_features_do_not_know_the_day():
    events = market(9, 400)
    later = events.copy()
    later["ts_event"] += 7 * 86_400 * SCALE
    later["ts_init"] += 7 * 86_400 * SCALE
    assert replay(events, [an_instrument()]).tobytes() == replay(later, [an_instrument()]).tobytes()


# --- what a feed cannot tell, and what no feed should send


@pytest.mark.parametrize("level", [3, 2, 1])
def test_features_that_the_feed_cannot_tell_are_nan_and_the_others_come_with_time(level):
    out = replay(market(10, 3_000, level), [an_instrument(level)])
    never = np.isnan(out).all(0)
    assert {NAMES[i] for i in np.flatnonzero(never)} == {f.name for f in FEATURES if f.needs > level}


def test_the_feed_that_sends_is_believed_more_than_the_instrument_table():
    out = replay(market(11, 500, 1), [an_instrument(3)])
    first = int(np.argmax(market(11, 500, 1)["action"] != ord("T")))
    assert np.isnan(out[first:, [i for i, f in enumerate(FEATURES) if f.needs > 1]]).all()


def test_a_book_without_two_sides_has_no_mid_and_no_shape():
    e = tiny([(1, "A", 1, 99, 5, 1, 0), (1, "A", -1, 101, 5, 2, 0), (1, "A", 1, 98, 5, 3, 0), (1, "C", -1, 0, 0, 2, 0)], 3)
    out = replay(e, [an_instrument()])
    assert np.isnan(out[[0, 3], COLUMN["mid"]]).all() and out[1, COLUMN["mid"]] == 25.0
    for name in ("spread", "imbalance_1", "imbalance_top5", "microprice", "return_1s", "queue_bid", "high_distance"):
        assert np.isnan(out[3, COLUMN[name]])
    assert out[3, COLUMN["gap_bid"]] == 1.0 and out[3, COLUMN["orders_bid"]] == 1.0


def test_a_crossed_book_has_a_negative_spread_and_does_not_enter_what_rolls():
    quotes = [(1, "A", 1, 99, 5, 1, 0), (1, "A", -1, 101, 5, 2, 0)]
    crossing = [(1, "A", 1, 103, 5, 3, 0), (1, "C", 1, 0, 0, 3, 0), (1, "T", 1, 101, 1, 0, 0)]
    out = replay(tiny(quotes + crossing, 3), [an_instrument()])
    assert out[2, COLUMN["spread"]] == -2.0 and np.isnan(out[2, COLUMN["microprice"]])
    assert out[2, COLUMN["ofi_1"]] == out[4, COLUMN["ofi_1"]] == 0.0
    assert out[4, COLUMN["volatility_8s"]] == 0.0 and out[4, COLUMN["high_distance"]] == 0.0


numbers = st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63), 2**63 - 2, -(2**63) + 1, 2**62, TICK, 10**18])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("AAAMCTTRF\0"), st.sampled_from([1, -1, 0]), numbers, numbers, st.integers(0, 5), numbers), max_size=60
    ),
    st.sampled_from([0, F_MBP, F_TOB]),
    st.sampled_from([1, TICK, 2**62]),
)
def test_nothing_that_an_event_may_hold_raises_or_makes_an_infinite_value(rows, flags, tick):  # type: ignore[no-untyped-def]
    e = np.zeros(len(rows), EVENT)
    for i, (action, side, price, size, order_id, ts) in enumerate(rows):
        e[i] = (ts, ts, price, size, order_id, 0, ord(action), side, flags, 0)
    for session in (None, "17:00-16:00 America/Chicago"):
        out = replay(e, [an_instrument(3, tick, session)])
        assert not np.isinf(out).any()


def test_clears_in_a_row_cost_nothing_and_break_nothing():
    e = market(12, 2_000)
    e["action"][::2] = ord("R")
    assert not np.isinf(replay(e, [an_instrument()])).any()


def test_a_snapshot_changes_the_book_but_is_no_flow():
    calm = [(1, "A", 1, 99, 5, 1, 0), (1, "A", -1, 101, 5, 2, 0), (1, "T", 1, 101, 1, 0, 0)]
    snapshot = [(1, "A", 1, 99, 500, 3, F_SNAPSHOT), (0, "A", -1, 101, 50, 4, F_SNAPSHOT)]
    with_it = replay(tiny([*calm, *snapshot], 3), [an_instrument()])
    assert with_it[4, COLUMN["imbalance_1"]] == (505 - 55) / 560
    for name in ("ofi_1", "ofi_slow", "ofi_events"):
        assert with_it[4, COLUMN[name]] == 0.0
    assert with_it[4, COLUMN["rate_add"]] < with_it[2, COLUMN["rate_add"]]


def test_what_a_trade_tick_does_not_carry_changes_nothing():
    events = market(13, 500)
    live = events.copy()
    trades = events["action"] == ord("T")
    events["flags"][trades], events["order_id"][trades], events["sequence"][trades] = 255, 77, 99
    live["order_id"][trades] = live["sequence"][trades] = live["flags"][trades] = 0
    assert replay(events, [an_instrument()]).tobytes() == replay(live, [an_instrument()]).tobytes()


# --- sessions


def test_the_session_of_es_opens_at_23_utc_and_its_range_starts_there(es):
    events, instrument = es
    out = replay(events, [instrument])
    since = out[:, COLUMN["seconds_since_open"]]
    live = events["ts_init"] >= OPEN - 3_600 * SCALE
    assert np.allclose(since[live], (events["ts_init"][live] - OPEN) * 1e-9, atol=1e-6)
    assert since[~live].max() == 3_600.0  # the snapshot bears the stamp of midnight, in the session before
    first = int(np.searchsorted(events["ts_init"], OPEN))
    before = max(out[first - 1, COLUMN["high_distance"]], out[first - 1, COLUMN["low_distance"]])
    assert before > 0.0
    assert max(out[first, COLUMN["high_distance"]], out[first, COLUMN["low_distance"]]) < before


def test_a_day_of_utc_is_the_session_of_a_market_that_never_closes():
    quotes = [(1, "A", 1, 99, 5, 1, 0), (1, "A", -1, 101, 5, 2, 0)]
    e = tiny([*quotes, (1, "A", 1, 100, 5, 3, 0), (1, "C", 1, 0, 0, 3, 0), (1, "A", 1, 98, 1, 4, 0)], 3)
    out = replay(e, [an_instrument()])
    assert out[4, COLUMN["high_distance"]] == 0.5 and out[4, COLUMN["seconds_since_open"]] == pytest.approx(23 * 3600)
    e["ts_event"][4:] += 3600 * SCALE
    e["ts_init"][4:] += 3600 * SCALE
    out = replay(e, [an_instrument()])
    assert out[4, COLUMN["high_distance"]] == 0.0 and out[4, COLUMN["seconds_since_open"]] == pytest.approx(0.0, abs=1e-6)


# --- what the features are for


def test_the_micro_price_tends_to_stoikovs_fixed_point():
    """A quote that walks over known states: the learnt table is the solution of G = r + P G."""
    rng = np.random.default_rng(0)
    n = 60_000
    e = np.zeros(n, EVENT)
    e["ts_event"] = e["ts_init"] = OPEN + np.arange(n) // 2 * 10**6
    e["flags"], e["action"], e["side"] = F_TOB, ord("A"), np.tile([1, -1], n // 2)
    drawn = rng.choice([-0.9, -0.5, -0.1, 0.1, 0.5, 0.9], n // 2)
    fresh = np.maximum.accumulate(np.where(rng.random(n // 2) < 0.5, np.arange(n // 2), 0))
    imbalance = drawn[fresh]  # every other quote keeps its imbalance
    up = rng.random(n // 2) < (1 + imbalance) / 2
    moves = rng.random(n // 2) < 0.2  # one quote in five moves the mid a tick, up with probability (1 + imbalance) / 2
    mid = 10_000 + np.concatenate([[0], np.cumsum(np.where(moves, np.where(up, 1, -1), 0))[:-1]])
    e["price"][::2], e["price"][1::2] = mid * TICK, (mid + 1) * TICK
    e["size"][::2], e["size"][1::2] = np.rint(1_000 * (1 + imbalance)), np.rint(1_000 * (1 - imbalance))
    out = replay(e, [an_instrument(1)])[1::2]
    for x in (-0.9, -0.5, 0.5, 0.9):  # G(x) = 0.2 x + G(x) / 2
        learnt = out[-2_000:, COLUMN["microprice"]][imbalance[-2_000:] == x]
        assert np.abs(learnt.mean() - 0.4 * x) < 0.04


def test_the_micro_price_is_nearer_to_the_mid_to_come_than_the_mid(binance):
    events, instruments = binance
    out = replay(events, instruments)
    for k, instrument in enumerate(instruments):
        own = np.flatnonzero(events["instrument"] == k)[30_000:]
        settled = own[np.flatnonzero(np.diff(events["ts_event"][own]))]
        mid, micro = out[settled, COLUMN["mid"]], out[settled, COLUMN["microprice"]] * (instrument.tick / SCALE)
        ahead = np.interp(np.searchsorted(events["ts_init"][settled], events["ts_init"][settled] + SCALE), np.arange(len(mid)), mid)
        ok = ~np.isnan(micro + mid + ahead)
        assert ((ahead - mid - micro)[ok] ** 2).mean() < ((ahead - mid)[ok] ** 2).mean()


def test_order_flow_imbalance_explains_mid_changes(binance):
    """Cont, Kukanov & Stoikov 2014 on this recording: the flow of the last second against its mid change, settled books."""
    events, instruments = binance
    out = replay(events, instruments)
    for k in range(len(instruments)):
        own = np.flatnonzero(events["instrument"] == k)[30_000:]
        settled = own[np.flatnonzero(np.diff(events["ts_event"][own]))]
        flow, move = out[settled, COLUMN["ofi_1"]], out[settled, COLUMN["return_1s"]]
        ok = ~np.isnan(flow + move)
        assert np.corrcoef(flow[ok], move[ok])[0, 1] > 0.3
