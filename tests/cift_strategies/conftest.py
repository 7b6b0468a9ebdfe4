"""One small market, trained on and traded once for all tests of this folder."""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import processes
import pytest

SEED = 3
EAGER = "own_strategies:Eager"  # so that so short a market has trades enough to look at, whatever the models say


@dataclass(frozen=True)
class Small:
    """Two instruments, two sessions, 200,000 records; `result` is the run that trained on the first half."""

    catalog: Path
    out: Path
    result: Any

    @property
    def artifact(self) -> Path:
        return self.out / "artifact"


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    from catalog.databento import import_dbn
    from catalog.synthetic import make_market
    from cift_strategies.backtest import RunConfig, run

    root = tmp_path_factory.mktemp("small")
    market = make_market(root / "market", SEED, sessions=2, events=200_000, instruments=2)
    catalog = import_dbn([*market.mbo, *market.definitions], root / "catalog").root
    out = root / "out"
    return Small(catalog, out, run(RunConfig(catalog=catalog, out=out, train_fraction=0.5, strategy=EAGER)))


@pytest.fixture(scope="session")
def predicted(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `shared` of sweeps that trade with `small`'s models: what is predicted is recorded once for all tests."""
    from cift_strategies.backtest import RunConfig
    from cift_strategies.sweep import _Keys, prepare

    folder = tmp_path_factory.mktemp("predicted")
    prepare(_Keys(folder, True).job(RunConfig(catalog=small.catalog, artifacts=small.artifact)))
    return folder / "shared"


AT_PACE = {  # real processes that play a market at its pace: a busy machine can be late for it
    "test_dashboard", "test_databento_feed", "test_feed_fusion", "test_gateway", "test_gateway_faults", "test_live", "test_pipeline",
    "test_polygon_feed", "test_polygon_feed_faults", "test_recovery", "test_server", "test_serving", "test_show", "test_streams",
    "test_venue_live",
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before `-m at_pace` is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test at a market's pace fails when it fails three times; each failure is told."""
    for item in items:
        if item.path.stem in AT_PACE:
            item.add_marker(pytest.mark.at_pace)
            item.add_marker(pytest.mark.flaky(reruns=2))


@pytest.hookimpl(trylast=True)  # after the fixtures' own ends
def pytest_runtest_teardown() -> None:
    processes.end()


def pytest_sessionfinish() -> None:
    """Ctrl-C leaves no turn for the above."""
    processes.end()


@pytest.fixture(autouse=True)
def _one_node_at_a_time() -> None:
    """A thread can hold one LiveNode: one that the traceback of a failed test keeps is let go, so that no other test fails for it."""
    if getattr(sys, "last_exc", None) is not None:
        sys.last_exc = sys.last_value = sys.last_traceback = None
        gc.collect()
