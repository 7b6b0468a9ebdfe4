"""What is known of order books, looked for in a catalog: does the flow explain the mid, is the micro-price nearer to the mid to come?

Takes the stream of a catalog, samples each instrument once a second, gives per instrument R^2 of order flow imbalance against the mid
change of the same second (Cont, Kukanov, Stoikov 2014), the squared error of micro-price (Stoikov 2018) and mid as forecasts, and the level
of VPIN and of Kyle's lambda. A check of the features on any data, and the command behind the figures in docs/measurements.md.

The micro-price is a limit: it tells where the mid goes, not by when. Where a mid stands still for seconds (a spread of one tick on ES) most
of what it tells is still to come after one second, and the mid as it is looks like the better forecast. So the share that has come is told
too, and the error of the micro-price with the share of the past, which looks ahead nowhere.
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
    micro_error_5s: float  # and five seconds ahead
    micro_share: float  # of the move that the micro-price tells, how much has come one second later: slope through the origin
    micro_scaled: float  # squared error one second ahead of mid + share of the past x micro-price, in that of the mid
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
        return Facts(instrument.id, len(rows), *(float("nan"),) * 8)
    known = np.isfinite(flow + move)
    r2 = np.corrcoef(flow[known], move[known])[0, 1] ** 2 if known.sum() >= LEAST and flow[known].std() and move[known].std() else np.nan
    told = micro * instrument.tick / SCALE
    errors = (*(_error(second, mid, told, s) for s in (1, 5)), *_scaled(second, mid, told))
    mean = (float(np.nanmean(v)) if np.isfinite(v).any() else float("nan") for v in (vpin, slope, slope / np.where(se > 0, se, np.nan)))
    return Facts(instrument.id, len(rows), float(r2), *errors, *mean)


type Values = NDArray[np.float64]


def _moves(second: Values, mid: Values, micro: Values, ahead_s: int) -> tuple[NDArray[np.bool_], Values]:
    """Which of the seconds count, and the mid change that follows; a second without events leaves the mid."""
    move = mid[np.searchsorted(second, second + ahead_s, "right") - 1] - mid
    return np.isfinite(move + micro) & (second + ahead_s <= second[-1]), move


def _error(second: Values, mid: Values, micro: Values, ahead_s: int) -> float:
    """Squared error of mid + `micro` in that of the mid, `ahead_s` later."""
    ok, move = _moves(second, mid, micro, ahead_s)
    return float(((move - micro)[ok] ** 2).sum() / (move[ok] ** 2).sum()) if ok.sum() >= LEAST and move[ok].any() else float("nan")


def _scaled(second: Values, mid: Values, micro: Values) -> tuple[float, float]:
    """The share of `micro` that has come a second later, and the error with the share of those seconds whose outcome was known by then."""
    ok, move = _moves(second, mid, micro, 1)
    if ok.sum() < 2 * LEAST or not micro[ok].any() or not move[ok].any():
        return float("nan"), float("nan")
    xy, xx = (np.append(0.0, np.cumsum(np.where(ok, v, 0.0))) for v in (move * micro, micro * micro))
    known = np.searchsorted(second, second - 1, "right")
    share = np.where(known >= LEAST, xy[known] / np.maximum(xx[known], 1e-300), 0.0)
    return float(xy[-1] / xx[-1]), float(((move - share * micro)[ok] ** 2).sum() / (move[ok] ** 2).sum())


def lines(found: Sequence[Facts]) -> list[str]:
    """As a table."""
    head = ("instrument", "seconds", "OFI R2", "micro error 1s", "5s", "come in 1s", "error with it", "VPIN", "Kyle lambda", "its t")
    rows = [(f.instrument, f"{f.seconds:,}", *(f"{v:.3f}" for v in f[2:])) for f in found]
    return [f"{r[0]:<24}" + "".join(f"{c:>16}" for c in r[1:]) for r in (head, *rows)]
