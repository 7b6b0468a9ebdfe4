"""Nothing half-written is taken for whole: a folder is filled beside its place and renamed, a file is known by its SHA-256."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

STORE: Final = Path(__file__).resolve().parent / "data"  # what is made or downloaded without being told where; not in git

_HERE: Final = -100  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)
_EXCHANGE: Final = 2


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its place, at once, when all went well, and vanishes otherwise."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.parent / f".{out.name}.{os.getpid()}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        if not out.exists():
            part.rename(out)
        elif not _exchange(part, out):
            old = out.parent / f".{out.name}.{os.getpid()}.old"
            out.rename(old)
            part.rename(out)
            shutil.rmtree(old)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Let two paths change places in one step: whoever opens either finds a whole one. False where the system cannot (Linux can)."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return bool(renameat2(_HERE, os.fsencode(a.absolute()), _HERE, os.fsencode(b.absolute()), _EXCHANGE) == 0)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in pieces. Raises OSError."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_of(files: Iterable[Path]) -> str:
    """Hexadecimal SHA-256 over those of several files, in this order: what a result that some code has made is known by."""
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()
