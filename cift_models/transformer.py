"""Transformer: three encoders over the tick, second and minute windows of each instrument, joined by cross-timeframe attention.

Takes blocks of the stream; gives at each close, for every horizon, the probabilities of down, flat and up, the expected |move|, and the
expected imbalance of the best queues at the horizon. Inputs are stationary columns of the feature rows, scaled by the instrument and
normalised within the window by learned bilinear normalisation (BiN: Tran, Kanniainen, Gabbouj and Iosifidis 2021, "Data normalization for
bilinear structures in high-frequency financial time-series", eqs. 3-9). Steps know how long ago they were by Time2Vec (Kazemi et al. 2019)
of the logarithm of the gap. Each encoder is a pre-norm transformer (Vaswani et al. 2017; RMS norm: Zhang and Sennrich 2019) over patches
of two steps; the newest tick token asks all tokens of the three.

torch trains (`transformer_train.py`); a numba kernel serves (`transformer_kernel.py`), the same bits however the stream is cut. Second and
minute windows, whose stamps count from the latest whole second and minute, are encoded once in each.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from catalog.errors import InputError
from catalog.events import Instrument
from cift_models.gpu import OnDevice
from cift_models.labels import F64, I8, I64, LABELS, H, Study
from cift_models.logit import fit_logit
from cift_models.transformer_kernel import (
    F32,
    FRAMES,
    OUT,
    PATCH,
    STEPS,
    WIDTH_NS,
    Encoder,
    Join,
    Weights,
    answer,
    encode,
    join,
    part,
    renew,
    scale_rows,
)  # fmt: skip
from cift_models.transformer_lessons import COLUMNS, LAGGED, Lessons, Windows, pieces
from cift_models.transformer_train import Batch, Config, Data, Lines, network, outputs, shapes, torch_settings, train
from cift_models.windows import MINUTES, SECONDS, TICKS, Block, History, Views, Votes

__all__ = ["COLUMNS", "Config", "State", "Transformer", "borne_out"]


class State(NamedTuple):
    """What a stream carries: the windows; the second and minute memories of each instrument with the cell, ts // width, they belong to."""

    history: History
    cells: tuple[I64, I64]  # (I,)
    kept: tuple[F32, F32]  # (I, T, D)
    counts: tuple[I64, I64]  # (I,)
    imbalance: list[F64]  # (m, H) at the closes predicted last


class Transformer:
    """The member. `centre`, `scale` (I, C) of the columns; logits are those of `lines` and `share` (H,) of the network's on top; `size`
    (I, H) ticks that a magnitude of 1 stands for; `usable` (H,) horizons that were learnt."""

    name = "transformer"

    def __init__(
        self, names: Sequence[str], columns: Sequence[str], config: Config, weights: Weights, centre: F64, scale: F64,
        usable: NDArray[np.bool_], lines: Lines, share: F64, size: F64, losses: Sequence[tuple[float, float]] = (),
    ) -> None:  # fmt: skip
        self.columns, self.config, self.weights, self.losses = tuple(columns), config, weights, [(float(a), float(b)) for a, b in losses]
        self.centre, self.scale, self.usable, self.lines, self.share, self.size = centre, scale, usable, lines, share, size
        place = {name: i for i, name in enumerate(names)}
        self._index = np.array([place.get(c, -1) for c in self.columns], np.int64)
        self._encoders = tuple(part(Encoder, f, weights) for f in FRAMES)
        self._join = part(Join, "join", weights)
        self._served: OnDevice | None = None

    @staticmethod
    def gatherer(instruments: Sequence[Instrument], names: Sequence[str], config: Config | None = None) -> Windows:
        return Windows(instruments, names, (config or Config()).cap)

    @classmethod
    def fit(cls, study: Study, gathered: Windows, config: Config | None = None, start: Self | None = None) -> Self:
        """Lines of the newest row and weights of the network on the fit slice, the latter stopped early, and its share, by the calibration
        slice; on a CPU deterministic for `study.seed`.

        From a `start`, an earlier fit of the same instruments, columns and sizes, descent begins at its weights, in its units, and what
        does not improve on them is not kept. Raises InputError where fewer than `config.least` windows of the fit slice have a label.
        """
        config = config or Config()
        sample = gathered.sample()
        lessons = Lessons.of(study, sample)
        if len(lessons.fit) < config.least:
            raise InputError(f"{len(lessons.fit)} windows with labels before calibration, {config.least} are needed: give a longer range")
        wanted = shapes(len(gathered.columns), len(lessons.size), config)
        if start is not None and (start.columns != gathered.columns or {k: v.shape for k, v in start.weights.items()} != wanted):
            start = None
        units = lessons.scalers(sample) if start is None else (start.centre, start.scale)
        data = Data(sample, *units, gathered.columns)
        lines = Lines.fit(lessons, data, config, None if start is None else start.lines)
        with torch_settings(config.threads):
            import torch

            weights, losses = train(lessons, data, lines, study.seed, config, None if start is None else start.weights)
            raw = outputs({k: torch.from_numpy(v) for k, v in weights.items()}, data, lessons.calibration, config.heads, "cpu")
        learnt = (weights, data.centre, data.scale, lessons.usable, lines, np.zeros(H), lessons.size.copy(), losses)
        me = cls(study.names, data.columns, config, *learnt)
        me._trust(raw, lessons, data)
        return me

    def _trust(self, raw: F32, lessons: Lessons, data: Data) -> None:
        """The share of the network's logits, the class shares and the size of moves that the calibration slice bears out."""
        for h in np.flatnonzero(self.usable):
            there = lessons.y[lessons.calibration, h] >= 0
            rows = lessons.calibration[there]
            if not len(rows):
                continue
            y, n = lessons.y[rows, h], lessons.worth[1, h]
            k = data.sample["instrument"][rows]
            z, straight = raw[there, h].astype(np.float64), self.lines.scores(data.straight(rows), k)[:, h]
            self.share[h] = borne_out(z[:, :3], straight, y, n / len(rows), self.config)
            self.lines.constant[:, h] += departure(straight + self.share[h] * z[:, :3], y, n / len(rows), self.config.steady)
            moved, said = np.abs(lessons.move[rows, h]) / self.size[k, h], np.logaddexp(0, z[:, 3])
            self.size[:, h] *= (n * moved.mean() + 30) / (n * said.mean() + 30)

    def new_state(self) -> State:
        i, d = self.centre.shape[0], self.config.width
        kept = np.zeros((i, SECONDS // PATCH, d), np.float32), np.zeros((i, MINUTES // PATCH, d), np.float32)
        cells, counts = (np.full(i, -1), np.full(i, -1)), (np.zeros(i, np.int64), np.zeros(i, np.int64))
        return State(History(i, range(len(self.columns))), cells, kept, counts, [np.empty((0, H))])

    def predict(self, block: Block, state: State) -> Votes:
        """Votes at each close, `state` advanced in place; a decision whose newest row has none of the columns abstains."""
        e, closes, m = block.events, block.closes, len(block.closes)
        inst = e["instrument"].astype(np.int64)
        values: Any = np.empty((len(e), len(self.columns)), np.float32)
        scale_rows(block.rows, inst, self._index, self.centre, self.scale, values)
        votes, imbalance = Votes(np.empty((m, H, 3)), np.empty((m, H))), np.empty((m, H))
        for a, b, piece in pieces(Block(e, values, closes, block.batches)):
            v = state.history.push(piece)
            k = inst[closes[a:b]]
            raw = self.raw(v, k, state)
            own = self.usable, self.share, self.lines.slope, self.lines.constant, self.size
            answer(raw, straight(v, self.columns), len(self.columns), k, *own, votes.proba[a:b], votes.magnitude[a:b], imbalance[a:b])
        state.imbalance[0] = imbalance
        return votes

    def to(self, device: str) -> None:
        """Serve on "cpu", by the numba kernel, or on "cuda", by the network in torch: the same function to five digits."""
        self._served = None if device == "cpu" else self.served(device)

    def served(self, device: str, rows: int = 64) -> OnDevice:
        """The network on a device: values of the three windows, gaps of their steps, phase, instrument -> raw outputs."""

        def make(device: str) -> Callable[..., Any]:
            import torch

            w = {k: torch.from_numpy(v).to(device) for k, v in self.weights.items()}
            return lambda *x: network(w, Batch(x[:3], x[3:6], x[6], x[7]), self.config.heads).flatten(1)

        import torch

        c = len(self.columns)
        values, gaps = [((n, c), torch.float32) for n in STEPS], [((n,), torch.float32) for n in STEPS]
        rest: Any = [((2,), torch.float32), ((), torch.int64)]
        return OnDevice(make, [*values, *gaps, *rest], (OUT * H,), device, rows, self.name)

    def raw(self, views: Views, instrument: I64, state: State) -> F32:
        """Raw outputs (m, OUT H) at m successive decisions from their windows of scaled columns; the memories in `state` advance."""
        if self._served is not None:
            return self._served(*windows(views), instrument)
        v, m, d = views, len(instrument), self.config.width
        ts, heads = np.ascontiguousarray(v.tick_ts[:, -1]), self.config.heads
        tick, n_tick, newest = np.empty((m, TICKS // PATCH, d), np.float32), np.empty(m, np.int64), np.empty((m, d), np.float32)
        encode(v.tick, v.tick_ts, ts, self._encoders[0], heads, tick, n_tick, newest)
        memories, counts, places = [tick], [n_tick], []
        for f, (x, stamps) in enumerate(((v.second, v.second_ts), (v.minute, v.minute_ts))):
            width, place, i = WIDTH_NS[f + 1], np.empty(m, np.int64), len(state.cells[f])
            fresh, latest = renew(ts, instrument, width, state.cells[f], place)
            memory = np.empty((i + len(fresh), *state.kept[f].shape[1:]), np.float32)
            count = np.empty(len(memory), np.int64)
            memory[:i], count[:i] = state.kept[f], state.counts[f]
            until = ts[fresh] // width * width
            none = np.empty((len(fresh), d), np.float32)
            encode(x[fresh], stamps[fresh], until, self._encoders[f + 1], heads, memory[i:], count[i:], none)
            state.kept[f][:], state.counts[f][:] = memory[latest], count[latest]
            memories.append(memory)
            counts.append(count)
            places.append(place)
        out = np.empty((m, OUT * H), np.float32)
        seen: Any = (*memories, *counts, *places)
        join(*seen, newest, np.ascontiguousarray(v.tick[:, -1]), ts, instrument, self._join, heads, out)  # type: ignore[call-arg]
        return out

    def imbalance(self, state: State) -> F64:
        """(m, H) expected imbalance_1 at the horizon, in [-1, 1], at the closes of the block predicted last; NaN where it abstains."""
        return state.imbalance[0]

    def parameters(self) -> int:
        return sum(a.size for a in self.weights.values())

    def report(self) -> list[str]:
        """How training went, and how much of the network's logits counts, in words."""
        told = [f"{self.parameters():,} parameters, {len(self.columns)} columns"]
        if self.losses:
            best = min(range(len(self.losses)), key=lambda i: self.losses[i][1])
            losses = " ".join(f"{b:.4f}" for _, b in self.losses)
            told.append(f"calibration loss before and after each epoch {losses}: the weights of number {best} are kept")
        shares = ", ".join(f"{LABELS[h]} {self.share[h]:.2f}" for h in np.flatnonzero(self.usable))
        return [*told, f"share of what windows add to the newest row {shares}"]

    def save(self, folder: Path) -> None:
        from safetensors.numpy import save_file

        own = {k: getattr(self, k) for k in ("centre", "scale", "usable", "share", "size")} | self.lines._asdict()
        save_file(self.weights | {f"_{k}": np.ascontiguousarray(v) for k, v in own.items()}, folder / "transformer.safetensors")
        config = {k: v for k, v in dataclasses.asdict(self.config).items() if k != "checkpoint"}
        told = {"columns": self.columns, "config": config, "parameters": self.parameters(), "losses": self.losses}
        (folder / "transformer.json").write_text(json.dumps(told, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path, names: Sequence[str]) -> Self:
        from safetensors.numpy import load_file

        told = json.loads((folder / "transformer.json").read_text())
        w = load_file(folder / "transformer.safetensors")
        own = {k[1:]: w.pop(k) for k in [k for k in w if k.startswith("_")]}
        lines = Lines(own.pop("slope"), own.pop("constant"))
        return cls(names, told["columns"], Config(**told["config"]), w, **own, lines=lines, losses=told["losses"])


def straight(views: Views, columns: Sequence[str]) -> F32:
    """What the lines take, (m, D): the newest row, then LAGGED columns second by second, NaN where there was none."""
    lagged = [views.second[:, :, columns.index(c)] for c in LAGGED if c in columns]
    return np.concatenate([views.tick[:, -1], *lagged], axis=1, dtype=np.float32)


def windows(views: Views) -> tuple[F32, ...]:
    """What the network takes beside the instruments: values, seconds since each step (-1: absent), share of second and minute passed."""
    ts = views.tick_ts[:, -1]
    gaps = [np.where(s != 0, ((ts // n * n)[:, None] - s) * 1e-9, -1.0).astype(np.float32) for s, n in zip(views[3:], WIDTH_NS)]
    phase = np.stack([ts % n / n for n in WIDTH_NS[1:]], 1).astype(np.float32)
    return (*views[:3], *gaps, phase)


def borne_out(z: F64, base: F64, y: I8, weight: float, c: Config) -> float:
    """The share a >= 0 of logits z (n, 3) that classes y (n,), each counted `weight`, bear out beside `base` (n, 3).

    Of softmax(base + a z + b) the most probable a, which is N(0, 1 / c.prior), with the constants b (3,) free; lowered by `c.doubt` of its
    standard errors. Without evidence that the logits tell anything it is 0.
    """
    from scipy.optimize import minimize

    z, n, prior = z - z.mean(axis=0), np.arange(len(z)), np.array([c.prior, 1e-3, 1e-3, 1e-3])

    def odds(x: F64) -> F64:
        s = x[0] * z + base + x[1:]
        p = np.exp(s - s.max(axis=1, keepdims=True))
        return p / p.sum(axis=1, keepdims=True)

    def loss(x: F64) -> tuple[float, F64]:
        p = odds(x)
        value = -weight * np.log(np.maximum(p[n, y], 1e-300)).sum() + prior @ (x * x) / 2
        p[n, y] -= 1
        return float(value), weight * np.concatenate([[(p * z).sum()], p.sum(axis=0)]) + prior * x

    x = minimize(loss, np.zeros(4), jac=True, method="L-BFGS-B", bounds=[(0.0, None)] + [(None, None)] * 3).x
    p = odds(x)
    j = np.concatenate([z[:, :, None], np.broadcast_to(np.eye(3), (len(z), 3, 3))], 2)
    mean = np.einsum("ny,nyk->nk", p, j)
    curvature = weight * (np.einsum("ny,nyk,nyl->kl", p, j, j) - mean.T @ mean) + np.diag(prior)
    return max(0.0, float(x[0]) - c.doubt * float(np.sqrt(np.linalg.inv(curvature)[0, 0])))


def departure(z: F64, y: I8, weight: float, steady: float) -> F64:
    """The most probable constants b (3,), N(0, 1 / steady), of softmax(z + b) given classes y (n,), each counted `weight`; z (n, 3)."""
    return fit_logit(np.empty((len(y), 0)), y, weight, np.zeros((3, 1)), np.array([steady]), z)[:, 0]
