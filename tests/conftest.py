"""Fixtures that every room uses."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Tests start a good hundred processes. Where Python is told to keep no bytecode, each of them compiles the sources of torch, scipy and
# Nautilus anew, which takes longer than most of what is then tested.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

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
