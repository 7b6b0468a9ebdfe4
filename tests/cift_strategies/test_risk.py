"""Positions, equity and limits, against arithmetic done by hand and by enumeration of fills."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tapes import OPEN, SHARE

from catalog.events import SCALE, Instrument
from cift_strategies.risk import DAY_NS, Ledger, Limits, Position

ES = Instrument("ES.GLBX", SCALE // 4, SCALE, 50.0, "USD")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1, -1]), st.integers(1, 50), st.integers(90, 110), st.integers(0, 3)), max_size=30))
def test_realised_and_open_profit_are_cash_and_inventory(fills: list[tuple[int, int, int, int]]) -> None:
    p, cash, size, fees = Position(), 0.0, 0, 0.0
    for side, units, price, fee in fills:
        p.fill(side, units * SCALE, float(price), float(fee), 2.0)
        cash -= side * units * price * 2.0
        size += side * units
        fees += fee
    assert p.size == size * SCALE and p.fees == pytest.approx(fees)
    for mark in (80.0, 100.0, 123.0):
        open_now = (mark - p.average) * p.size / SCALE * 2.0 if p.size else 0.0
        assert p.realised + open_now == pytest.approx(cash + size * mark * 2.0, abs=1e-6)


def test_a_position_that_turns_over_starts_at_the_new_price() -> None:
    p = Position()
    p.fill(1, 10 * SCALE, 100.0, 0.0, 1.0)
    p.fill(-1, 15 * SCALE, 102.0, 0.0, 1.0)
    assert (p.size, p.average, p.realised) == (-5 * SCALE, 102.0, 20.0)


def test_the_size_is_what_loses_the_allowed_share_at_the_stop() -> None:
    ledger = Ledger([ES], Limits(capital=1_000_000, risk_per_trade=0.002, max_notional=10.0))
    assert ledger.size(0, 4_800.0, 2.0, "calm") == 20 * SCALE  # 2,000 USD over 2 points of 50 USD
    assert ledger.size(0, 4_800.0, 2.1, "calm") == 19 * SCALE  # whole contracts, rounded down
    assert ledger.size(0, 4_800.0, 30.0, "calm") == 1 * SCALE
    assert ledger.size(0, 4_800.0, 50.0, "calm") == 0
    assert ledger.size(0, 4_800.0, 0.0, "calm") == 0


@pytest.mark.parametrize(
    ("limits", "shown", "units"),
    [
        ({"max_notional": 0.5}, math.inf, 2),  # of 240,000 USD each
        ({"max_position": 3.0}, math.inf, 3),
        ({"max_participation": 0.25}, 20.0, 5),
        ({"regime_scale": {"wild": 0.5}}, math.inf, 10),
    ],
)
def test_every_limit_binds(limits: dict[str, object], shown: float, units: int) -> None:
    ledger = Ledger([ES], Limits.model_validate({"capital": 1_000_000, "risk_per_trade": 0.002, "max_notional": 10.0} | limits))
    assert ledger.size(0, 4_800.0, 2.0, "wild", shown) == units * SCALE


def test_losses_shrink_the_next_size_and_gains_let_it_grow() -> None:
    ledger = Ledger([ES], Limits(capital=100_000, risk_per_trade=0.01, max_notional=100.0))
    before = ledger.size(0, 4_800.0, 1.0, "")
    ledger.positions[0].realised = -50_000.0
    assert ledger.size(0, 4_800.0, 1.0, "") == before // 2
    ledger.positions[0].realised = -100_000.0
    assert ledger.size(0, 4_800.0, 1.0, "") == 0


def test_lots_of_a_fraction_are_kept_whole() -> None:
    coin = Instrument("BTC.BINANCE", SCALE // 10, SCALE // 1000, 1.0, "USDT", kind="crypto_perpetual")
    ledger = Ledger([coin], Limits(capital=10_000, risk_per_trade=0.001, max_notional=10.0))
    size = ledger.size(0, 60_000.0, 30.0, "")
    assert size == 333 * (SCALE // 1000) and size % coin.lot == 0


def test_the_daily_loss_halts_until_the_next_day() -> None:
    ledger = Ledger([SHARE], Limits(capital=100_000, max_daily_loss=0.01, max_drawdown=0.5))
    day = OPEN // DAY_NS * DAY_NS
    ledger.mark(0, 100.0, day)
    ledger.positions[0].fill(1, 1_000 * SCALE, 100.0, 0.0, 1.0)
    ledger.mark(0, 99.01, day + 1)
    assert ledger.halted(0, day + 1) is None  # 990 of 1,000 lost
    ledger.mark(0, 99.0, day + 2)
    assert ledger.halted(0, day + 2) == "halted: daily loss"
    ledger.mark(0, 99.0, day + DAY_NS)
    assert ledger.halted(0, day + DAY_NS) is None


def test_the_drawdown_is_from_the_highest_equity_and_halts_for_good() -> None:
    ledger = Ledger([SHARE], Limits(capital=100_000, max_daily_loss=0.5, max_drawdown=0.02))
    ledger.positions[0].fill(1, 1_000 * SCALE, 100.0, 0.0, 1.0)
    for ts, mid in enumerate((100.0, 103.0, 101.5, 101.01)):
        ledger.mark(0, mid, ts)
    assert ledger.drawdown["USD"] == pytest.approx(1_990.0) and ledger.halted(0, 4) is None
    ledger.mark(0, 101.0, 5)
    assert ledger.halted(0, 5) == ledger.halted(0, 5 + 3 * DAY_NS) == "halted: drawdown"


def test_currencies_are_kept_apart() -> None:
    euro = replace(SHARE, id="AKTIE.XETR", currency="EUR")
    ledger = Ledger([SHARE, euro], Limits(capital=10_000, max_daily_loss=0.01))
    ledger.mark(0, 100.0, 1), ledger.mark(1, 50.0, 1)
    ledger.positions[1].fill(1, 100 * SCALE, 50.0, 1.0, 1.0)
    ledger.mark(1, 48.0, 2)
    assert ledger.pnl("EUR") == -201.0 and ledger.pnl("USD") == 0.0
    assert ledger.halted(1, 2) == "halted: daily loss" and ledger.halted(0, 2) is None


def test_an_unknown_mid_leaves_the_value_as_it_was() -> None:
    ledger = Ledger([SHARE], Limits())
    ledger.positions[0].fill(1, 10 * SCALE, 100.0, 0.0, 1.0)
    assert ledger.mark(0, 101.0, 1) == ledger.mark(0, math.nan, 2) == 10.0


@pytest.mark.parametrize("wrong", [{"capital": 0}, {"risk_per_trade": 2}, {"max_drawdown": -1}, {"unheard_of": 1}])
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Limits.model_validate(wrong)
