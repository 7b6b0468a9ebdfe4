"""Features against what is known: on planted markets with more and less informed flow, and on real ones."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import page_trend_test

from catalog.events import read_catalog, read_dbn
from catalog.planted import Plan
from catalog.synthetic import make_market
from cift_models.facts import Facts, _error, _scaled, facts, lines
from cift_models.inference import stream

SHARES, SEEDS = (0.0, 0.35, 0.65, 0.95), range(1, 6)


def planted(place: Path, seed: int, share: float) -> Facts:
    """A market in which `share` of the takers know where the price goes, and take stale quotes in proportion."""
    right = {"alpha": (0.37, 0.0, 0.0, 0.0), "gain": ((1.0,) * 5,) * 3, "heard": 0.0, "heed": 2.0}  # takers are no herd, makers see it
    plan = replace(Plan(), informed=share, picked=0.25 * share / 0.95, **right)
    events, instruments = read_dbn(make_market(place, seed, sessions=1, events=60_000, instruments=1, plan=plan).mbo[0])
    return facts(stream(instruments, [events]), instruments)[0]


@pytest.fixture(scope="module")
def by_share(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """(seeds, shares) of each figure; every market of a row has the same seed."""
    root = tmp_path_factory.mktemp("informed")
    found = [[planted(root / f"{seed}-{share}", seed, share) for share in SHARES] for seed in SEEDS]
    return {name: np.array([[getattr(f, name) for f in row] for row in found]) for name in Facts._fields if name != "instrument"}


@pytest.mark.parametrize("name", ["vpin", "kyle_lambda"])
def test_toxicity_and_impact_rise_with_the_share_of_informed_flow(by_share: dict[str, np.ndarray], name: str) -> None:
    """Page's (1963) trend test over markets of equal seeds: the order of the shares is the order of the figure."""
    values = by_share[name]
    assert page_trend_test(values).pvalue < 0.001
    assert values[:, -1].mean() > 1.05 * values[:, 0].mean()


def test_in_a_planted_market_flow_explains_the_mid_of_its_second_and_the_micro_price_that_of_seconds_ahead(
    by_share: dict[str, np.ndarray],
) -> None:
    assert by_share["ofi_r2"][:, -1].min() > 0.2
    assert by_share["micro_error_5s"][:, -1].mean() < 1
    assert by_share["micro_share"].min() > 0


def test_on_real_data_flow_explains_the_mid_and_the_micro_price_is_nearer_to_the_mid_to_come(data: Path) -> None:
    instruments, chunks = read_catalog(data / "catalogs" / "binance-2024-08-08")
    found = facts(stream(instruments, chunks), instruments)
    assert len(found) == 4
    es, instrument = read_dbn(data / "databento" / "esh4-glbx-mdp3-20231225.mbo.dbn.zst")
    (future,) = facts(stream(instrument, [es]), instrument)
    assert future.ofi_r2 > 0.3 and future.micro_scaled < 1 and 0 < future.micro_share < 0.5, "a mid that stands still for seconds"
    for f in found:
        assert f.micro_scaled < 1
        assert f.seconds > 300 and f.ofi_r2 > 0.1 and f.micro_error < 1 and 0 < f.vpin < 1 and f.kyle_lambda > 0
    assert all(f.instrument in line for f, line in zip(found, lines(found)[1:]))


def test_seconds_are_those_of_the_stream_however_it_is_cut(tmp_path: Path) -> None:
    events, instruments = read_dbn(make_market(tmp_path / "m", 3, sessions=1, events=24_000, instruments=2).mbo[0])
    whole, cut = (facts(stream(instruments, np.array_split(events, n)), instruments) for n in (1, 7))
    assert whole == cut
    for k, f in enumerate(whole):
        assert f.seconds == len(np.unique(events["ts_init"][events["instrument"] == k] // 10**9))
    short = facts(stream(instruments, [events[:50]]), instruments)
    assert np.isnan(short[0].ofi_r2) and short[0].seconds >= 1


def test_the_command_prints_them(tmp_path: Path) -> None:
    from catalog.databento import import_dbn

    made = make_market(tmp_path / "m", 3, sessions=1, events=24_000, instruments=1)
    root = import_dbn([*made.mbo, *made.definitions], tmp_path / "c").root
    done = subprocess.run(
        [sys.executable, "-m", "cift_models", "facts", "--catalog", str(root)], capture_output=True, text=True, timeout=200, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert "OFI R2" in done.stdout and "KESTR.XNAS" in done.stdout


def test_a_share_of_the_past_is_all_that_a_forecast_is_scaled_by() -> None:
    """A mid of which a quarter of what is told comes in the next second; of the last second nothing can be known."""
    rng = np.random.default_rng(0)
    second, told = np.arange(2_000.0), rng.normal(0, 1, 2_000)
    mid = np.append(0.0, np.cumsum(0.25 * told + rng.normal(0, 0.1, 2_000))[:-1])
    share, error = _scaled(second, mid, told)
    assert abs(share - 0.25) < 0.01 and abs(error - 0.01 / (0.25**2 + 0.01)) < 0.03
    assert _error(second, mid, told, 1) > 5
    changed = mid.copy()
    changed[-1] += 1_000.0
    first, later = (_scaled(second[:-1], m[:-1], told[:-1]) for m in (mid, changed))
    assert first == later
