"""What the user may set about the strategy, and how settings are read; apart from it, so that a command line starts without Nautilus."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from catalog.errors import InputError, continued, toml


class Settings(BaseModel):
    """What the strategy asks of a prediction before it trades, and how it leaves."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_edge_ticks: Annotated[float, Field(ge=0)] = 0.1  # expected move beyond all costs
    min_confidence: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_spread_ticks: Annotated[float, Field(gt=0)] = 5.0
    entry: Literal["cross", "join", "improve", "best"] = "cross"  # across the spread, at the touch, a tick inside it, or what pays most
    entry_wait_ms: Annotated[float, Field(gt=0)] = 500.0  # how long a resting entry waits for its fill
    then: Literal["cross", "cancel"] = "cross"  # what follows, while the newest prediction still pays for it
    join_fills: Annotated[float, Field(gt=0, le=1)] = 0.4  # share of entries that are filled while they rest at the touch; for "best"
    improve_fills: Annotated[float, Field(gt=0, le=1)] = 0.6  # and a tick inside it
    adverse_ticks: Annotated[float, Field(ge=0)] = 0.5  # by which a resting entry's fills are worse than its price says
    stale_ms: Annotated[float, Field(gt=0)] = 2_000.0  # a book older than this is not traded on
    stop_multiple: Annotated[float, Field(gt=0)] = 2.0  # of the expected |move|
    target_multiple: Annotated[float, Field(gt=0)] = 2.0
    min_stop_ticks: Annotated[int, Field(ge=1)] = 3  # beyond the spread
    renew: bool = True  # keep a position for another horizon while `renew_ticks` are still expected along it
    renew_ticks: Annotated[float, Field(ge=0)] = 0.25
    max_hold_s: Annotated[float, Field(gt=0)] = 300.0
    flat_before_close_s: Annotated[float, Field(ge=0)] = 10.0  # the session's, or the data's end


def configured[M: BaseModel](
    kind: type[M], path: Path | None, given: Mapping[str, Any], read: Mapping[str, Callable[[str], Any]] | None = None
) -> M:
    """The settings of a TOML file with those `given` on the command line before them; `read`: how some of the file's are understood.

    Raises InputError with the file or the option, and the name of the setting that is wrong.
    """
    values = {} if path is None else toml(path, "--config")
    values |= {k: f(str(values[k])) for k, f in (read or {}).items() if k in values}
    try:
        return kind.model_validate(values | dict(given))
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(x) for x in first["loc"] if not isinstance(x, int))
        named = f"{path}: {where}" if path is not None and first["loc"][0] not in given else "--" + where.replace("_", "-")
        raise InputError(f"{named}: {continued(first['msg'])}") from None
