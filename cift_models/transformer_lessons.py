"""What the Transformer learns from: windows gathered along the stream, evenly thinned, and the labels that belong to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from catalog.errors import InputError
from catalog.events import SCALE, Instrument
from cift_models.labels import F64, I8, I64, H, Labeller, Study, Table, Thinned
from cift_models.transformer_kernel import F32, FRAMES, STEPS, WIDTH_NS
from cift_models.windows import Block, History, Views

# the columns it looks at, and what each becomes when bid and ask change places: "-" its negative, "" itself, else another column
COLUMNS: Final[Mapping[str, str]] = {
    "spread": "", "imbalance_1": "-", "imbalance_2": "-", "imbalance_top5": "-", "queue_bid": "queue_ask", "queue_ask": "queue_bid",
    "microprice": "-", "ofi_1": "-", "ofi_2": "-", "ofi_fast": "-", "ofi_slow": "-", "ofi_events": "-", "trade_imbalance_1s": "-",
    "trade_imbalance_8s": "-", "trade_imbalance_64s": "-", "add_imbalance": "-", "cancel_imbalance": "-", "volume_ratio": "",
    "return_16e": "-", "return_128e": "-", "return_1s": "-", "return_8s": "-", "volatility_8s": "", "intensity_ratio": "",
}  # fmt: skip
LAGGED: Final = ("return_1s",)  # of these the lines see every step of the second window
AHEAD: Final = "imbalance_1"  # what the imbalance head foretells
PIECE: Final = 512  # decisions whose windows are held at once
F16_MAX: Final = 6e4


def pieces(block: Block) -> Iterator[tuple[int, int, Block]]:
    """The block in pieces of at most PIECE closes [a, b); together they hold every event."""
    m, begin = len(block.closes), 0
    for a in range(0, max(m, 1), PIECE):
        b = min(a + PIECE, m)
        end = len(block.events) if b == m else int(block.closes[b - 1]) + 1
        piece = Block(block.events[begin:end], block.rows[begin:end], block.closes[a:b] - begin)
        if block.batches is not None:
            inside = slice(*np.searchsorted(block.batches, (begin, end)))
            piece = piece._replace(batches=block.batches[inside] - begin)
        yield a, b, piece
        begin = end


Sample = dict[str, NDArray[Any]]


class Windows:
    """Gathers windows with labels of their own while the stream passes, evenly thinned so that no more than `cap` are held.

    Labels are the moves over the horizons (ticks) and, H further on, the changes of AHEAD.
    """

    def __init__(self, instruments: Sequence[Instrument], names: Sequence[str], cap: int) -> None:
        self.columns = tuple(c for c in COLUMNS if c in names)
        if not self.columns:
            raise InputError(f"the transformer finds none of its columns among the features: it needs some of {', '.join(COLUMNS)}")
        n, c = len(instruments), len(self.columns)
        self._mid, self._ahead = list(names).index("mid"), list(names).index(AHEAD) if AHEAD in names else -1
        self._history = History(n, [list(names).index(c) for c in self.columns])
        self._labellers = (
            Labeller(instruments, counts=()), Labeller([replace(i, tick=SCALE) for i in instruments], counts=())
        )  # fmt: skip
        self._seen, self._step, self._cap = np.zeros(n, np.int64), 1, cap
        shapes: dict[str, tuple[tuple[int, ...], type]] = {"ahead": ((), np.float32)}
        for name, s in zip(FRAMES, STEPS):
            shapes |= {name: ((s, c), np.float16), f"{name}_gap": ((s,), np.float32)}
        self._held = Thinned(n, 2 * H, cap, **shapes)

    def push(self, block: Block) -> None:
        for _, _, piece in pieces(block):
            self._push(piece)

    def _push(self, block: Block) -> None:
        e, at = block.events, block.closes
        ts, inst, m = e["ts_init"][at], e["instrument"][at].astype(np.int64), len(at)
        serial = np.empty(m, np.int64)
        for k in np.unique(inst):
            mine = np.flatnonzero(inst == k)
            serial[mine] = self._seen[k] + np.arange(len(mine))
            self._seen[k] += len(mine)
        while (-(-self._seen // self._step)).sum() > self._cap:
            self._step *= 2
        wanted = serial % self._step == 0
        with np.errstate(over="ignore", invalid="ignore"):
            columns = flatten(self._history.push(block, wanted), ts[wanted])
        whole = {k: np.empty((m, *v.shape[1:]), v.dtype) for k, v in columns.items()}
        for name, v in columns.items():
            whole[name][wanted] = v
        mid = np.ascontiguousarray(block.rows[:, self._mid])
        ahead = np.ascontiguousarray(block.rows[:, self._ahead]) if self._ahead >= 0 else np.full(len(e), np.nan)
        moves, changes = (by.push(e, v, at) for by, v in zip(self._labellers, (mid, ahead)))
        self._held.push(ts, inst, moves, wanted, ahead=ahead[at].astype(np.float32), **whole)
        self._held.learn(changes._replace(label=changes.label + H))

    def sample(self) -> Sample:
        """What was gathered, the stream having ended: `ts`, `instrument`, `move`, `known_at` (n, 2 H), `ahead` (n,), for each timeframe
        raw values (n, S, C) float16, NaN missing, and `_gap` (n, S) seconds from the step to the end of the window, -1 absent."""
        moves, changes = (by.finish() for by in self._labellers)
        self._held.learn(moves)
        self._held.learn(changes._replace(label=changes.label + H))
        z = self._held.result()
        keep = z["serial"] % self._step == 0
        return z if keep.all() else {k: v[keep] for k, v in z.items()}


def flatten(views: Views, ts: I64) -> Sample:
    out: Sample = {}
    for name, x, stamps, width in zip(FRAMES, views[:3], views[3:], WIDTH_NS):
        x = np.where(np.isfinite(x), x, np.nan)
        out[name] = np.clip(x, -F16_MAX, F16_MAX).astype(np.float16)
        out[f"{name}_gap"] = np.where(stamps != 0, ((ts // width * width)[:, None] - stamps) * 1e-9, -1).astype(np.float32)
    return out


class Lessons(NamedTuple):
    """What the windows teach: `y` (n, H) classes, -1 none; `move` (n, H) ticks; `later` (n, H) imbalance at the horizon, NaN none;
    `fit`, `calibration` rows; `worth` (2, H) independent labels of both; `size` (I, H) mean |move|; `rates` (H, 3) class shares."""

    y: I8
    move: F64
    later: F32
    fit: I64
    calibration: I64
    in_fit: NDArray[np.bool_]
    worth: F64
    size: F64
    rates: F64
    usable: NDArray[np.bool_]

    @classmethod
    def of(cls, study: Study, sample: Sample) -> Self:
        n, i = len(sample["ts"]), len(study.instruments)
        empty = np.empty((n, 0), np.float32)
        own = study._replace(table=Table(sample["ts"], sample["instrument"], empty, np.zeros(n), sample["move"], sample["known_at"]))
        y, later = np.full((n, H), -1, np.int8), np.full((n, H), np.nan, np.float32)
        worth, size, rates, usable = np.zeros((2, H)), np.ones((i, H)), np.full((H, 3), 1 / 3), np.zeros(H, np.bool_)
        parts: tuple[list[I64], list[I64]] = ([], [])
        for h in study.usable:
            rows = own.fit_rows(h), own.calibration_rows(h)
            classes = own.classes(h)
            for mine, r, to in zip(parts, rows, worth):
                y[r, h], to[h] = classes[r], own.independent(r, h)
                mine.append(r)
            for r in (own.fit_rows(H + h), own.calibration_rows(H + h)):
                later[r, h] = np.clip(sample["ahead"][r] + sample["move"][r, H + h], -1, 1)
            moved = np.abs(sample["move"][rows[0], h])
            size[:, h] = moved.mean() if moved.any() else 1.0
            for k in range(i):
                mine = moved[sample["instrument"][rows[0]] == k]
                size[k, h] = mine.mean() if mine.any() else size[k, h]
            rates[h] = (np.bincount(y[np.concatenate(rows), h], minlength=3) + 1) / (sum(map(len, rows)) + 3)
            usable[h] = len(rows[0]) > 0
        fit, calibration = (np.unique(np.concatenate([*p, np.empty(0, np.int64)])) for p in parts)
        in_fit = (sample["ts"] >= study.split.start) & (sample["ts"] < study.split.calibrate)
        return cls(y, sample["move"][:, :H], later, fit, calibration, in_fit, worth, size, rates, usable)

    def scalers(self, sample: Sample) -> tuple[F64, F64]:
        """Centre and scale (I, C) of the newest rows in the fit slice: median and interquartile range / 1.349, 1 where nothing varies."""
        i, c = len(self.size), sample["tick"].shape[2]
        centre, scale = np.zeros((i, c)), np.ones((i, c))
        for k in range(i):
            x = sample["tick"][self.in_fit & (sample["instrument"] == k), -1].astype(np.float64)
            for j in range(c):
                v = x[np.isfinite(x[:, j]), j]
                if len(v):
                    low, centre[k, j], high = np.quantile(v, (0.25, 0.5, 0.75))
                    spread = (high - low) / 1.349 or v.std()
                    scale[k, j] = spread if spread > 1e-9 else 1.0
        return centre, scale
