"""Alternative data of the synthetic exchange: some tell what is behind the market, late; the rest are noise; no event knows of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from catalog import altdata, planted_altdata
from catalog.altdata import FEATURES, INDEX, NAMES, Table
from catalog.asof import Lookup
from catalog.planted import Plan
from catalog.synthetic import MarketFiles, make_market

S = 10**9
SIZES = {"seed": 11, "sessions": 2, "events": 300_000, "instruments": 3}
DRIFT, SIGMA = np.array(Plan().drift), np.log(Plan().sigma)


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> MarketFiles:
    return make_market(tmp_path_factory.mktemp("told") / "market", **SIZES)


@pytest.fixture(scope="module")
def table(market: MarketFiles) -> Table:
    return altdata.read(market.alternative)


def t_value(x: np.ndarray, y: np.ndarray, ts: np.ndarray, block_s: float = 120) -> float:
    """Of the slope of y on x, standardised, with errors summed over blocks of time."""
    ok = np.isfinite(x + y)
    x, y, ts = x[ok] - x[ok].mean(), y[ok] - y[ok].mean(), ts[ok]
    slope = (x @ y) / (x @ x)
    sums = np.bincount(np.unique(ts // int(block_s * S), return_inverse=True)[1], x * (y - slope * x))
    return float(slope * (x @ x) / np.sqrt((sums**2).sum()))


def seen(market: MarketFiles, table: Table, horizon_s: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What a table shows (m, 27) at the oracle's decision times, and the truth there."""
    t = pq.read_table(market.truth_table)
    truth = {c: t[c].to_numpy()[t["horizon_ns"].to_numpy() == round(horizon_s * 1e9)] for c in t.column_names}
    known = Lookup(table, [f"{s}.XNAS" for s in market.symbols])
    return known.at(truth["instrument"].astype(np.int64), truth["ts"])[0], truth


def test_all_27_are_there_each_known_no_sooner_than_its_source_can_tell(market: MarketFiles, table: Table) -> None:
    assert {NAMES[f] for f in np.unique(table.feature)} == set(NAMES)
    delay = np.array([f.delay_s for f in FEATURES])[table.feature] * S
    assert (table.ts_known - table.ts_event >= delay).all()
    sessions = json.loads(market.truth.read_text())["sessions"]
    for name in planted_altdata.PLANTED:
        event = table.ts_event[table.feature == INDEX[name]]
        assert sum(((event >= s["start_ns"]) & (event <= s["end_ns"])).sum() for s in sessions) == len(event)
    ends = table.ts_event[table.feature == INDEX["block_count"]]
    assert len(ends) and (ends % (300 * S) == 0).all(), "windows of five minutes"


def test_truth_says_which_features_tell_what_and_the_rest_are_noise(market: MarketFiles, table: Table) -> None:
    told = json.loads(market.truth.read_text())["alternative"]
    assert set(told["told"]) | set(told["noise"]) == set(NAMES) and not set(told["told"]) & set(told["noise"])
    values, truth = seen(market, table, 0.5)
    first = truth["instrument"] == 0  # its own news are all that concern it
    behind = {
        "news": truth["news"],
        "volatility": SIGMA[truth["regime"]], "trend": DRIFT[truth["regime"]],
    }  # fmt: skip
    for name, t in told["told"].items():
        sign = -1 if name == "skew_25d" else 1
        x, y = values[first, INDEX[name]], behind[t["of"]][first]
        ok = np.isfinite(x)
        assert sign * np.corrcoef(x[ok], y[ok])[0, 1] > 0.45, name
        delays = (table.ts_known - table.ts_event)[table.feature == INDEX[name]] / 1e9
        assert np.median(delays) == pytest.approx(t["delay_s"], rel=0.05) and delays.std() > 0
    daily = [n for n in NAMES if len(np.unique(values[first, INDEX[n]][np.isfinite(values[first, INDEX[n]])])) <= 2]
    for name in set(told["noise"]) - set(daily):
        for what, y in behind.items():
            assert abs(t_value(values[first, INDEX[name]], y[first], truth["ts"][first])) < 5, (name, what)


def test_no_event_of_the_market_knows_of_the_table(market: MarketFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silence(*_: object) -> list[planted_altdata.Row]:
        return [("*", "vix", 15.0, 1_700_000_000 * S, 1_700_000_000 * S)]

    monkeypatch.setattr(planted_altdata, "rows", silence)
    silent = make_market(tmp_path / "silent", **SIZES)
    assert [f.read_bytes() for f in (*silent.mbo, silent.truth_table)] == [f.read_bytes() for f in (*market.mbo, market.truth_table)]
    assert len(altdata.read(silent.alternative)) == 1


@pytest.mark.parametrize(("name", "of"), [("social_sentiment", lambda move: move), ("atm_iv", np.abs)])
def test_what_is_known_in_time_tells_of_the_move_ahead_and_what_comes_too_late_does_not(
    market: MarketFiles, table: Table, name: str, of: Callable[[np.ndarray], np.ndarray]
) -> None:
    def t(by_s: float) -> float:
        values, truth = seen(market, altdata.delayed(table, by_s), 5.0)
        return t_value(values[:, INDEX[name]], of(truth["move"]), truth["ts"])

    assert t(0) > 2.5 and abs(t(600)) < 3, "ten minutes outlast the memory of signal and regime"


def test_in_the_null_market_the_table_tells_of_nothing_that_moves(tmp_path: Path) -> None:
    null = make_market(tmp_path / "null", seed=5, sessions=1, events=60_000, instruments=1, null=True)
    values, truth = seen(null, altdata.read(null.alternative), 5.0)
    assert json.loads(null.truth.read_text())["alternative"]["moves"] == "nothing"
    for name in planted_altdata.PLANTED:
        assert abs(t_value(values[:, INDEX[name]], truth["move"], truth["ts"], 60)) < 4, name
