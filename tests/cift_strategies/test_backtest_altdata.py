"""A backtest with alternative data: it trains and trades on what was known in time, tells of it, and goes on without it."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Small

from catalog import altdata
from catalog.errors import InputError
from cift_models import artifacts
from cift_strategies.backtest import RunConfig, run
from cift_strategies.outcome import RunResult


@pytest.fixture(scope="module")
def table(small: Small) -> Path:
    return small.catalog.parent / "market" / "alternative.parquet"


@pytest.fixture(scope="module")
def informed(small: Small, table: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    out = tmp_path_factory.mktemp("informed") / "out"
    return run(RunConfig(catalog=small.catalog, out=out, train_fraction=0.5, train=("fusion",), altdata=table, rule=False))


def test_a_run_trains_and_trades_with_the_table_and_tells_what_it_looked_at(informed: RunResult) -> None:
    told = informed.summary["altdata"]
    assert set(told) <= set(altdata.NAMES) and told["social_sentiment"] > 100
    leading = informed.summary["importance"]["fusion"]["1s"]
    assert any(c["column"] == "alt_social_sentiment" and c["gain"] > 0.02 for c in leading)
    assert not [n for n in informed.summary["notes"] if "alternative" in n]
    assert artifacts.read(_out(informed)).manifest["altdata"]["social_sentiment"] > 100


def _out(r: RunResult) -> Path:
    return Path(r.config["out"]) / "artifact"


def test_without_the_table_the_same_models_go_on_and_it_is_said(small: Small, informed: RunResult, tmp_path: Path) -> None:
    without = run(RunConfig(catalog=small.catalog, artifacts=_out(informed), out=tmp_path / "out", rule=False))
    assert any("go without them here" in n for n in without.summary["notes"]) and without.summary["altdata"] == {}
    assert without.summary["model_version"] == informed.summary["model_version"]
    losses = [[r["members"]["fusion"]["log_loss"] for r in x.scores["table"] if r.get("members")] for x in (informed, without)]
    assert losses[0] and losses[0] != losses[1]


def test_a_table_that_is_wrong_or_about_others_stops_the_run_before_it_begins(small: Small, tmp_path: Path) -> None:
    (tmp_path / "wrong.csv").write_text("instrument,feature,value\n")
    with pytest.raises(InputError, match="no column 'ts_event'"):
        run(RunConfig(catalog=small.catalog, altdata=tmp_path / "wrong.csv", out=tmp_path / "out"))
    stamp = 1_741_000_000 * 10**9
    altdata.write(altdata.table([("AAPL", "news_count", 1.0, stamp, stamp)]), tmp_path / "others.parquet")
    with pytest.raises(InputError, match=r"tell of AAPL, not of KESTR\.XNAS"):
        run(RunConfig(catalog=small.catalog, altdata=tmp_path / "others.parquet", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
