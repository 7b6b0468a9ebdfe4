"""What the ensemble has learned along a stream, as bytes for the journal and back: weights and the account of their losses.

Decisions whose outcome is still to come are left out: they belong to a stream that a restart has cut.
"""

from __future__ import annotations

import io
from typing import Any, Final

import numpy as np

FIELDS: Final = ("weights", "between", "loss", "both_loss", "member_loss", "awake", "rounds")  # of ensemble.Learned


def packed(learned: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **{name: getattr(learned, name) for name in FIELDS})
    return file.getvalue()


def unpacked(data: bytes, learned: Any) -> bool:
    """Put `data` of :func:`packed` into `learned`; False, and nothing is changed, where it is of another build."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as z:
            found = {name: z[name] for name in FIELDS}
    except (ValueError, KeyError, OSError, EOFError):
        return False
    now = {name: getattr(learned, name) for name in FIELDS}
    if any(found[n].shape != now[n].shape or found[n].dtype != now[n].dtype for n in FIELDS):
        return False
    for name in FIELDS:
        now[name][...] = found[name]
    return True
