"""What the strategy does in markets written by hand: when it enters, how it leaves, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tapes import MS, OPEN, SHARE, Script, Tape, ms_of, play, write

from catalog import status
from catalog.errors import InputError
from catalog.events import SCALE
from cift_strategies.risk import Limits
from cift_strategies.settings import Settings
from cift_strategies.strategy import EnsembleStrategy


@pytest.fixture
def calm(tmp_path: Path) -> Path:
    """Bid 10,000 and ask 10,001 ticks for ten seconds."""
    return write(tmp_path, [Tape().book(0, 10_000, 10_001).trade(1, 1, 10_001, 5).quiet(5, 10_000, 10_000, 10_001)])


def test_an_entry_reaches_the_venue_after_both_latencies_and_not_before(calm: Path) -> None:
    script = Script({1_000: (1, 6.0, 0)}, latency_ms=3.5)
    played = play(calm, [SHARE], script, order_latency_ms=1.25)
    first = played.fills[0]
    assert first["role"] == "entry" and first["side"] == 1
    assert first["ts"] == script.made[0].ts + round(4.75 * MS)
    assert first["price"] == pytest.approx(100.01) and first["liquidity"] == "taker"


def test_what_is_left_at_the_horizon_is_sold_at_the_market(calm: Path) -> None:
    script = Script({1_000: (1, 6.0, 0)})
    played = play(calm, [SHARE], script)
    (position,) = played.positions
    assert position["closed_by"] == "horizon"
    decided = script.made[0].ts + 2 * MS
    assert played.fills[-1]["ts"] == decided + 500 * MS + 1 * MS
    assert position["exit"] == pytest.approx(100.00) and position["net"] == pytest.approx(-0.01 * position["size"])
    assert played.strategy.ledger.positions[0].size == 0


def test_a_way_out_waits_for_a_halted_market_however_long(calm: Path) -> None:
    """Nothing is sent that would be rejected, and nothing given up."""
    played = play(calm, [SHARE], Script({1_000: (1, 6.0, 0)}), strategy="own_strategies:Halted")
    (position,) = played.positions
    assert position["closed_by"] == "horizon" and ms_of(position["closed"]) == pytest.approx(9_001, abs=5)
    assert played.strategy.order_types["OrderSubmitted"] == 4 and played.strategy.order_types["OrderRejected"] == 0


def test_a_position_is_kept_for_as_long_as_the_move_is_still_expected(calm: Path) -> None:
    """Every prediction along the position grants it another horizon; one against it, or one that expects too little, does not."""
    script = Script({1_000: (1, 6.0, 0), 1_300: (1, 6.0, 0), 1_600: (1, 6.0, 0), 1_900: (-1, 6.0, 0), 2_000: (1, 0.2, 0)})
    (position,) = play(calm, [SHARE], script, settings=Settings(flat_before_close_s=0)).positions
    assert position["closed_by"] == "horizon"
    assert position["closed"] == script.made[2].ts + 2 * MS + 500 * MS + 1 * MS
    short = play(calm, [SHARE], Script(script.calls), settings=Settings(flat_before_close_s=0, max_hold_s=0.7)).positions
    assert short[0]["closed"] == script.made[0].ts + 2 * MS + 700 * MS + 1 * MS
    once = play(calm, [SHARE], Script({1_000: (1, 6.0, 0), 1_300: (1, 6.0, 0)}), settings=Settings(flat_before_close_s=0, renew=False))
    assert once.positions[0]["closed"] == script.made[0].ts + 2 * MS + 500 * MS + 1 * MS


def test_the_target_rests_in_the_book_and_is_filled_as_a_maker(tmp_path: Path) -> None:
    tape = Tape().book(0, 10_000, 10_001).trade(1, 1, 10_001, 5).quiet(5, 1_200, 10_000, 10_001)
    tape.book(1_200, 10_014, 10_015).quiet(1_210, 3_000, 10_014, 10_015)
    played = play(write(tmp_path, [tape]), [SHARE], Script({1_000: (1, 6.0, 3)}), ends=False)
    (position,) = played.positions
    assert position["closed_by"] == "target"
    assert position["exit"] == pytest.approx(100.01 + 0.12) and played.fills[-1]["liquidity"] == "maker"
    assert position["gross"] == pytest.approx(0.12 * position["size"])


def test_the_stop_ends_a_loss(tmp_path: Path) -> None:
    tape = Tape().book(0, 10_000, 10_001).trade(1, 1, 10_001, 5).quiet(5, 1_200, 10_000, 10_001)
    tape.book(1_200, 9_970, 9_971).quiet(1_210, 3_000, 9_970, 9_971)
    played = play(write(tmp_path, [tape]), [SHARE], Script({1_000: (1, 6.0, 3)}), ends=False)
    (position,) = played.positions
    assert position["closed_by"] == "stop" and position["exit"] == pytest.approx(99.70)
    assert ms_of(played.fills[-1]["ts"]) == pytest.approx(1_200, abs=2)


def test_the_size_loses_the_share_of_equity_that_may_be_lost_at_the_stop(calm: Path) -> None:
    limits = Limits(risk_per_trade=0.00005)
    played = play(calm, [SHARE], Script({1_000: (-1, 6.0, 0)}), limits=limits)
    entry = played.fills[0]
    stop_distance = 0.12  # two expected moves of six ticks
    assert entry["side"] == -1 and entry["size"] == int(1_000_000 * 0.00005 / stop_distance)


def test_a_move_that_does_not_pay_spread_and_fees_is_not_traded(tmp_path: Path) -> None:
    dear = replace(SHARE, taker_fee=0.0002)  # two ticks of 100.00, each way
    root = write(tmp_path, [Tape(dear).book(0, 10_000, 10_001).trade(1, 1, 10_001, 5).quiet(5, 3_000, 10_000, 10_001)])
    played = play(root, [dear], Script({1_000: (1, 5.0, 0), 2_000: (1, 5.2, 0)}))
    assert played.decisions["move does not pay the costs"] == 1
    assert played.decisions["entered"] == 1  # 5.2 ticks pay for 1 + 2 x 2.0001 and the least edge


def test_fees_are_charged_on_each_fill_by_its_liquidity(tmp_path: Path) -> None:
    paying = replace(SHARE, taker_fee=0.0001, maker_fee=-0.00002, fee_per_unit=0.003)
    tape = Tape(paying).book(0, 10_000, 10_001).trade(1, 1, 10_001, 5).quiet(5, 1_200, 10_000, 10_001)
    tape.book(1_200, 10_030, 10_031).quiet(1_210, 3_000, 10_030, 10_031)
    played = play(write(tmp_path, [tape]), [paying], Script({1_000: (1, 8.0, 3)}), ends=False)
    entry, leaving = played.fills[0], played.fills[-1]
    assert entry["fee"] == pytest.approx(entry["size"] * (100.01 * 0.0001 + 0.003), abs=0.01)
    assert leaving["liquidity"] == "maker"
    assert leaving["fee"] == pytest.approx(leaving["size"] * (-leaving["price"] * 0.00002 + 0.003), abs=0.01)
    assert played.positions[0]["net"] == pytest.approx(played.positions[0]["gross"] - sum(f["fee"] for f in played.fills))


def test_one_position_per_instrument(calm: Path) -> None:
    played = play(calm, [SHARE], Script({1_000: (1, 6.0, 2), 1_500: (1, 6.0, 2), 2_000: (-1, 6.0, 2)}))
    assert played.decisions["entered"] == 1 and played.decisions["in a position"] == 2


def test_the_price_that_ran_away_is_not_chased(tmp_path: Path) -> None:
    tape = Tape().book(0, 10_000, 10_001).trade(1, 1, 10_001, 5).quiet(5, 1_000, 10_000, 10_001).level(1_000, 1, 9_996, 7)
    tape.book(1_001, 10_040, 10_041).quiet(1_010, 2_000, 10_040, 10_041)
    played = play(write(tmp_path, [tape]), [SHARE], Script({995: (1, 6.0, 0)}, latency_ms=0.5))
    assert played.decisions["entry not filled"] == 1 and not played.fills and not played.positions
    assert played.strategy.trades == [None]


def test_a_position_whose_stop_was_refused_is_left_at_once(tmp_path: Path) -> None:
    tape = Tape().book(0, 10_000, 10_001).trade(1, 1, 10_001, 5).quiet(5, 1_000, 10_000, 10_001).level(1_000, 1, 9_996, 7)
    tape.level(1_001, 1, 10_000, 0)
    for k in range(1, 20):
        tape.level(1_001, 1, 10_000 - k, 0)
    tape.level(1_001, 1, 9_900, 50_000).quiet(1_010, 2_000, 9_900, 10_001)
    played = play(write(tmp_path, [tape]), [SHARE], Script({995: (1, 6.0, 3)}, latency_ms=0.5), ends=False)
    assert played.decisions["stop rejected"] == 1
    (position,) = played.positions
    assert position["closed_by"] == "unprotected"
    assert ms_of(position["closed"]) - ms_of(position["opened"]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("bid", "ask", "reason"),
    [
        (10_003, 10_001, "book is crossed"), (10_001, 10_001, "book is crossed"), (10_000, 10_009, "spread too wide"),
        (None, 10_001, "book has one side"),
    ],
)
def test_no_entry_into_a_book_that_is_not_sound(tmp_path: Path, bid: int | None, ask: int, reason: str) -> None:
    tape = Tape().clear(0).level(0, -1, ask, 500).trade(1, 1, ask, 5)
    if bid is not None:
        tape.level(0, 1, bid, 500)
    tape.rows.sort(key=lambda r: r[1])
    tape.quiet(5, 2_000, -1_000_000 if bid is None else 9_000, 11_000)
    if bid is None:
        tape.rows = [r for r in tape.rows if r[7] != 1 or r[6] == ord("T")]
    played = play(write(tmp_path, [tape]), [SHARE], Script({1_000: (1, 30.0, 0)}))
    assert played.decisions[reason] == 1 and not played.fills


def test_no_entry_on_a_book_that_is_stale(tmp_path: Path) -> None:
    tape = Tape().book(0, 10_000, 10_001).trade(1, 1, 10_001, 5).quiet(5, 1_005, 10_000, 10_001).quiet(5_000, 6_000, 10_000, 10_001)
    played = play(write(tmp_path, [tape]), [SHARE], Script({990: (1, 6.0, 0)}, latency_ms=2_500))
    assert played.decisions["book is stale"] == 1 and not played.fills


def test_nothing_is_acted_upon_before_the_split(calm: Path) -> None:
    played = play(calm, [SHARE], Script({1_000: (1, 6.0, 0), 5_000: (1, 6.0, 0)}), act_from=OPEN + 4_000 * MS)
    assert [ms_of(p["opened"]) > 4_000 for p in played.positions] == [True]


def test_no_entry_in_an_auction_or_a_halt(calm: Path) -> None:
    times = OPEN + np.array([500, 2_000, 4_000, 6_000]) * MS
    states = {0: (times, np.array([status.AUCTION, status.OPEN, status.HALTED, status.CLOSED], np.int8))}
    calls = {at: (1, 6.0, 0) for at in (100, 1_000, 3_000, 5_000, 7_000)}
    played = play(calm, [SHARE], Script(calls), states=states)
    assert [int(ms_of(p["opened"])) // 1_000 for p in played.positions] == [0, 3], "where the state is not known one may trade"
    assert [played.decisions[f"market: {s}"] for s in ("auction", "halted", "closed")] == [1, 1, 1]


def test_a_contract_that_is_not_the_front_one_is_left_but_not_entered(calm: Path) -> None:
    """The roll comes to it at two seconds and leaves it at four, 300 ms after an entry."""
    spans = {0: [(-(2**63), OPEN + 2_000 * MS), (OPEN + 4_000 * MS, 2**63 - 1)]}
    played = play(calm, [SHARE], Script({at: (1, 6.0, 0) for at in (1_000, 3_700, 5_000)}), behind=spans)
    (position,) = played.positions
    assert position["closed_by"] == "horizon" and ms_of(position["opened"]) < 4_000 < ms_of(position["closed"])
    assert played.decisions["not the front contract"] == 2


def test_flat_when_the_session_ends(tmp_path: Path) -> None:
    """The session closes at 22:13:23 after the open of the tape at 22:13:20 UTC; it opens again a minute later."""
    hours = replace(SHARE, session="22:13-22:14 UTC")
    tape = Tape(hours).book(0, 10_000, 10_001).trade(1, 1, 10_001, 5).quiet(5, 60_000, 10_000, 10_001, step=20)
    played = play(
        write(tmp_path, [tape]), [hours], Script({1_000: (1, 6.0, 3), 36_000: (1, 6.0, 2), 39_000: (1, 6.0, 0), 41_000: (1, 6.0, 0)}),
        settings=Settings(flat_before_close_s=2.0), ends=False,
    )  # fmt: skip
    close = 40_000.0  # 22:14:00
    assert played.decisions["session ends"] == 3 and len(played.positions) == 1
    assert all(ms_of(p["closed"]) <= close - 2_000 for p in played.positions)


def test_flat_when_the_data_ends(calm: Path) -> None:
    played = play(calm, [SHARE], Script({1_000: (1, 6.0, 3), 4_000: (1, 6.0, 2), 9_700: (1, 6.0, 0)}))
    assert played.decisions["session ends"] == 2
    assert played.strategy.ledger.positions[0].size == 0 and played.strategy.trades == [None]


def test_a_regime_scales_the_size_down_to_nothing(calm: Path) -> None:
    sizes = {}
    for name in ("calm", "half", "never"):
        played = play(
            calm, [SHARE], Script({1_000: (1, 6.0, 0)}, regime=1), regimes=("other", name),
            limits=Limits(risk_per_trade=0.00005, regime_scale={"half": 0.5, "never": 0.0}),
        )  # fmt: skip
        sizes[name] = sum(f["size"] for f in played.fills if f["role"] == "entry")
        assert played.decisions.get("regime never", 0) == (name == "never")
    assert sizes["half"] == sizes["calm"] // 2 and sizes["never"] == 0


def test_the_daily_loss_ends_the_day(tmp_path: Path) -> None:
    tape = Tape().book(0, 10_000, 10_001).trade(1, 1, 10_001, 5).quiet(5, 1_200, 10_000, 10_001)
    tape.book(1_200, 9_970, 9_971).quiet(1_210, 4_000, 9_970, 9_971)
    limits = Limits(max_daily_loss=0.0002)
    played = play(write(tmp_path, [tape]), [SHARE], Script({1_000: (1, 6.0, 3), 2_000: (1, 6.0, 0)}), limits=limits, ends=False)
    assert played.decisions["halted: daily loss"] == 1 and len(played.positions) == 1


def test_the_same_run_has_the_same_digest_whatever_the_chunks(calm: Path) -> None:
    calls = {1_000: (1, 6.0, 0), 3_000: (-1, 6.0, 1), 6_000: (1, 6.0, 0)}
    digests = {play(calm, [SHARE], Script(calls), chunk_size=c).strategy.digest for c in (None, 100_000, 1_000, 97, None)}
    assert len(digests) == 1
    assert play(calm, [SHARE], Script(calls, latency_ms=2.1)).strategy.digest not in digests


class Contrary(EnsembleStrategy):
    """A user's own: does the opposite, at twice the distance."""

    def decide(self, p):  # type: ignore[no-untyped-def]
        signal = super().decide(p)
        if signal is None:
            return None
        far = 2 * abs(signal.stop - signal.limit)
        touch = signal.limit - signal.side * round(round(signal.expected_ticks - signal.cost_ticks) * self.terms.instruments[0].tick)
        return replace(
            signal, side=-signal.side, limit=touch - signal.side * 5 * 10_000_000, stop=signal.limit + signal.side * far,
            target=signal.limit - signal.side * far,
        )  # fmt: skip


class Broken(EnsembleStrategy):
    def decide(self, p):  # type: ignore[no-untyped-def]
        raise ZeroDivisionError("the user's own fault")


def test_a_strategy_of_the_users_own_is_traded(calm: Path) -> None:
    played = play(calm, [SHARE], Script({1_000: (1, 6.0, 0)}), strategy=f"{__name__}:Contrary")
    assert [f["side"] for f in played.fills if f["role"] == "entry"][:1] == [-1]
    assert played.strategy.ledger.positions[0].size == 0


@pytest.mark.parametrize("path", ["nowhere:Nothing", f"{__name__}:SHARE", f"{__name__}:Missing", "no colon"])
def test_a_strategy_that_is_none_is_named(path: str, calm: Path) -> None:
    with pytest.raises(InputError, match=path.split(":")[0]):
        play(calm, [SHARE], Script({}), strategy=path)


def test_what_a_callback_raises_ends_the_run_once(calm: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="the user's own fault") as caught:
        play(calm, [SHARE], Script({1_000: (1, 6.0, 0)}), strategy=f"{__name__}:Broken")
    assert caught.traceback[-1].name == "decide"


def test_sizes_and_prices_of_the_ledger_are_those_of_the_account(calm: Path) -> None:
    played = play(calm, [SHARE], Script({1_000: (1, 6.0, 0), 3_000: (-1, 6.0, 1), 6_000: (1, 6.0, 0)}))
    ledger = played.strategy.ledger
    by_fills = sum(-f["side"] * f["size"] * f["price"] - f["fee"] for f in played.fills)
    assert len(played.positions) == 3
    assert ledger.pnl("USD") == pytest.approx(by_fills) == pytest.approx(sum(p["net"] for p in played.positions))
    equity = np.array([v for _, _, v in played.strategy.equity])
    highest = np.maximum.accumulate(np.maximum(equity, 0))
    assert ledger.drawdown["USD"] == pytest.approx((highest - equity).max())
    assert SCALE == 10**9
