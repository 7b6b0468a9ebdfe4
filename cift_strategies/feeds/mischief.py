"""What a gateway can be told to do wrong, so that it can be seen how its clients take it.

A :class:`Fault` happens once, in the session that has been sent `after` market records; `refuse` happens to the next authentications.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from catalog.errors import InputError

KINDS: Final = {
    "drop": "cut the line, losing `amount` records",
    "stall": "send nothing, not even heartbeats, for `amount` seconds",
    "skip": "leave out `amount` records",
    "reorder": "send `amount` records in the reverse order",
    "garbage": "send `amount` bytes that are no record",
    "refuse": "refuse the key `amount` times",
}
_TEXT: Final = re.compile(r"(\w+)(?:@(\d+))?(?::(\d+(?:\.\d+)?))?")


@dataclass(frozen=True, slots=True)
class Fault:
    """`kind` of :data:`KINDS`, after that many market records of a session, with its amount."""

    kind: str
    after: int = 0
    amount: float = 1

    @classmethod
    def parse(cls, text: str, kinds: Collection[str] = tuple(KINDS)) -> Fault:
        """From "kind@after:amount", the last two optional: "drop@5000", "stall@5000:3", "refuse:2". Raises InputError."""
        m = _TEXT.fullmatch(text)
        if m is None or m[1] not in kinds:
            raise InputError(f'fault "{text}" is none of {", ".join(kinds)}: write it as kind@after:amount, like {next(iter(kinds))}@5:3')
        return cls(m[1], int(m[2] or 0), float(m[3] or 1))

    @property
    def records(self) -> int:
        """How many records in a row it takes at once; of more than the gateway sends at once (8,192), so many."""
        return int(self.amount) if self.kind in ("skip", "reorder") else 1

    def change(self, data: bytes, offsets: NDArray[np.int64]) -> bytes:
        """What is sent in place of the whole records `data`, whose record i lies at offsets[i] to offsets[i + 1]."""
        n = min(int(self.amount), len(offsets) - 1)
        if self.kind == "skip":
            return data[offsets[n] :]
        if self.kind == "reorder":
            return b"".join(data[offsets[i] : offsets[i + 1]] for i in reversed(range(n))) + data[offsets[n] :]
        if self.kind == "garbage":
            return np.random.default_rng(0).integers(0, 4, int(self.amount), np.uint8).tobytes() + data  # lengths that no record has
        return data
