"""What is known of order books, looked for in a catalog: does the flow explain the mid, is the micro-price nearer to the mid to come?

Takes the stream of a catalog, samples each instrument once a second, gives per instrument R^2 of order flow imbalance against the mid
change of the same second (Cont, Kukanov, Stoikov 2014), the squared error of micro-price (Stoikov 2018) and mid as forecasts, and the level
of VPIN and of Kyle's lambda. A check of the features on any data, and the command behind the figures in docs/measurements.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from catalog.events import SCALE, Instrument
from cift_models.windows import Block

COLUMNS: Final = ("mid", "microprice", "ofi_1", "return_1s", "vpin", "kyle_lambda", "kyle_lambda_se")
LEAST: Final = 30  # seconds
WARM: Final = 0.1  # share of the seconds left out at the start: the micro-price learns from the stream


class Facts(NamedTuple):
    """Of one instrument. NaN where the feed cannot tell or there are fewer than 30 seconds."""

    instrument: str
    seconds: int  # with events
    ofi_r2: float  # of the mid change of a second on the order flow imbalance of that second
    micro_error: float  # squared error of the micro-price one second ahead, in that of the mid
    micro_error_5s: float  # and five seconds ahead; the micro-price is a limit, the mid that it tells of takes its time
    vpin: float  # mean, 0 to 1
    kyle_lambda: float  # mean, ticks per typical trade
    kyle_t: float  # mean of lambda over its standard error


def facts(blocks: Iterable[Block], instruments: Sequence[Instrument]) -> list[Facts]:
    """Of all `instruments` over a stream with its feature rows; one row a second and instrument is held."""
    from cift_models.features import NAMES

    place = [NAMES.index(c) for c in COLUMNS]
    held: list[list[NDArray[Any]]] = [[] for _ in instruments]
    last: list[NDArray[Any] | None] = [None] * len(instruments)
    for block in blocks:
        who, second = block.events["instrument"], block.events["ts_init"] // SCALE
        for k in range(len(instruments)):
            own = np.flatnonzero(who == k)
            if not len(own):
                continue
            ends = own[np.append(np.diff(second[own]) > 0, True)]
            rows = np.column_stack([second[ends].astype(np.float64), block.rows[ends][:, place]])
            if (before := last[k]) is not None and before[0] < rows[0, 0]:
                held[k].append(before[None])
            held[k].append(rows[:-1])
            last[k] = rows[-1]
    whole = ([*h, np.empty((0, 1 + len(COLUMNS))) if end is None else end[None]] for h, end in zip(held, last))
    return [_of(i, np.concatenate(rows)) for i, rows in zip(instruments, whole)]


def _of(instrument: Instrument, rows: NDArray[Any]) -> Facts:
    second, mid, micro, flow, move, vpin, slope, se = rows[int(WARM * len(rows)) :].T
    if len(second) < LEAST:
        return Facts(instrument.id, len(rows), *(float("nan"),) * 6)
    known = np.isfinite(flow + move)
    r2 = np.corrcoef(flow[known], move[known])[0, 1] ** 2 if known.sum() >= LEAST and flow[known].std() and move[known].std() else np.nan
    errors = (_error(second, mid, micro * instrument.tick / SCALE, s) for s in (1, 5))
    mean = (float(np.nanmean(v)) if np.isfinite(v).any() else float("nan") for v in (vpin, slope, slope / np.where(se > 0, se, np.nan)))
    return Facts(instrument.id, len(rows), float(r2), *errors, *mean)


def _error(second: NDArray[Any], mid: NDArray[Any], micro: NDArray[Any], ahead_s: int) -> float:
    """Squared error of mid + `micro` in that of the mid, `ahead_s` later; a second without events leaves the mid."""
    move = mid[np.searchsorted(second, second + ahead_s, "right") - 1] - mid
    ok = np.isfinite(move + micro) & (second + ahead_s <= second[-1])
    return float(((move - micro)[ok] ** 2).sum() / (move[ok] ** 2).sum()) if ok.sum() >= LEAST and move[ok].any() else float("nan")


def lines(found: Sequence[Facts]) -> list[str]:
    """As a table."""
    head = ("instrument", "seconds", "OFI R2", "micro error 1s", "5s", "VPIN", "Kyle lambda", "its t")
    rows = [(f.instrument, f"{f.seconds:,}", *(f"{v:.3f}" for v in f[2:])) for f in found]
    return [f"{r[0]:<24}" + "".join(f"{c:>16}" for c in r[1:]) for r in (head, *rows)]
