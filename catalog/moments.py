"""Times as people type them, in ns since 1970 UTC: what every command line and configuration reads them with."""

from __future__ import annotations

import datetime as dt
import re
from typing import overload

from catalog.errors import InputError

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


@overload
def nanoseconds(moment: str) -> int: ...
@overload
def nanoseconds(moment: str | None) -> int | None: ...
def nanoseconds(moment: str | None) -> int | None:
    """ISO 8601 ("2024-05-08", "2024-05-08T14:30:00.123456789", "...-05:00"; UTC where no zone is told) or an integer of ns -> ns UTC.

    None and, for options that default to it, the empty text give None. Raises InputError for anything else, and beyond 1677 to 2262.
    """
    if not moment:
        return None
    found = re.fullmatch(r"([^.]+?)(?:(?<=:\d\d)\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)?", moment.strip())
    try:
        if found is None:
            raise ValueError
        if found[1].lstrip("-").isdigit() and found[2] is None and len(found[1]) != 8:
            ns = int(moment)
        else:
            t = dt.datetime.fromisoformat(found[1] + (found[3] or ""))
            since = (t if t.tzinfo else t.replace(tzinfo=dt.UTC)) - _EPOCH
            ns = (since.days * 86_400 + since.seconds) * 10**9 + int((found[2] or "").ljust(9, "0"))
        if not -(2**63) <= ns < 2**63:
            raise ValueError
        return ns
    except ValueError:
        raise InputError(f'"{moment}" is no time: write 2024-05-08, 2024-05-08T14:30:00 or ns since 1970, in UTC') from None
