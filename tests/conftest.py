"""Fixtures that every room uses."""

from __future__ import annotations

from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder with real market data; tests that need it skip where it is absent."""
    if not DATA.is_dir():
        pytest.skip("real market data absent: ../shared/data")
    return DATA
