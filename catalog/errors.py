"""How the user's mistakes and ours are told apart, for every command line.

An :class:`InputError` is the user's to mend: one line on standard error, exit code 2. Ctrl-C is 130. Anything else is our
fault: a traceback and exit code 1.
"""

from __future__ import annotations

import errno
import sys
import tomllib
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class InputError(Exception):
    """The input is wrong. The message says what, where (file and place) and how to mend it; it may carry a block to paste."""


def continued(text: str) -> str:
    """A sentence as the rest of another one."""
    return f"{text[:1].lower()}{text[1:]}"


def toml(path: Path, option: str = "") -> dict[str, Any]:
    """What a TOML file holds, which was named by `option`. Raises InputError where it cannot be read."""
    named = f"{option} {path}".lstrip()
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"cannot read {named}: {e.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise InputError(f"{named} is not valid TOML: {e}") from None


def exit_code(main: Callable[[], object]) -> int:
    """Run `main` and turn how it ends into an exit code: 0 done, 2 wrong input, 130 Ctrl-C, 1 our fault."""
    try:
        main()
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing unfinished was kept as finished; run the same command again", file=sys.stderr)
        return 130
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            print(f"error: the disk is full while writing {e.filename or 'a file'}: free some space and run again", file=sys.stderr)
            return 2
        if e.errno in (errno.EACCES, errno.EROFS, errno.EPERM) and e.filename:
            print(f"error: no permission for {e.filename}: choose another folder or change its rights", file=sys.stderr)
            return 2
        traceback.print_exc()
        return 1
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run_typer(app: Callable[..., object]) -> None:
    """Run a Typer app for :func:`exit_code`: one line for what is no command line, and Ctrl-C raised again."""
    try:
        code = app(standalone_mode=False)
    except Exception as e:
        if not hasattr(e, "format_message"):
            raise
        said = str(e.format_message())
        if "\n" not in said:
            raise InputError(f"{said.rstrip('.')}; see --help") from None
        print(said, file=sys.stderr)  # nothing was typed: the help itself
        code = 2
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise SystemExit(code)
