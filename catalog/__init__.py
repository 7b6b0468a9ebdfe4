"""How market data gets in, and where it lies. Knows nothing of models; imports Nautilus only where it writes catalogs."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]


def _kernel_cache() -> None:
    """Let numba keep compiled kernels in a folder that is named by all their sources.

    By itself it looks at the file of a kernel alone and would go on with old code of what that kernel calls in another file. The folder is
    in NUMBA_CACHE_DIR, where that is set, else beside this file.
    """
    told = hashlib.sha256()
    for package in ("catalog", "cift_models", "cift_strategies"):
        for file in sorted((_ROOT / package).glob("*.py")):
            source = file.read_bytes()
            if b"njit" in source:
                told.update(source)
    base, name = os.environ.get("NUMBA_CACHE_DIR", str(_ROOT / "catalog" / "__pycache__")), f"kernels-{told.hexdigest()[:16]}"
    if os.path.basename(base) == name:  # a process of ours has set it
        return
    os.environ["NUMBA_CACHE_DIR"] = place = os.path.join(base, name)
    if "numba" in sys.modules:
        sys.modules["numba"].config.CACHE_DIR = place


_kernel_cache()
