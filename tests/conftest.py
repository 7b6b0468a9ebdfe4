"""Fixtures that every room uses."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Compilation makes first examples slow, and time tells nothing about being right.
settings.register_profile("cift", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("cift")

DATA = (Path(__file__).resolve().parents[2] / "shared" / "data").resolve()


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder with real market data; tests that need it skip where it is absent."""
    if not DATA.is_dir():
        pytest.skip("real market data absent: ../shared/data")
    return DATA
