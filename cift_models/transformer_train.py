"""How the Transformer learns: the network in torch, and training that can be interrupted and goes on to the same result.

Takes :class:`transformer_lessons.Lessons` and their windows, gives the weights that `transformer_kernel.py` serves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from catalog.errors import InputError
from catalog.progress import Steps
from cift_models.labels import F64, I8, I64, H
from cift_models.logit import fit_logit
from cift_models.transformer_kernel import (
    BIN_EPS,
    EXTRA,
    F32,
    FRAMES,
    KNEE,
    OUT,
    PATCH,
    RMS_EPS,
    STEPS,
    WAVES,
    WIDTH_NS,
    Encoder,
    Join,
    Weights,
    part,
)
from cift_models.transformer_lessons import COLUMNS, LAGGED, Lessons, Sample
from cift_models.windows import SECONDS

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Config:
    """`cap` bounds memory: a window takes 5.9 kB. `checkpoint`: a folder; an interrupted training goes on from there, and ends alike."""

    cap: int = 40_000  # windows held for training, evenly thinned
    width: int = 32
    heads: int = 4
    hidden: int = 64
    layers: int = 1
    epochs: int = 2
    patience: int = 2  # epochs without a better calibration loss
    batch: int = 256
    rate: float = 1e-3  # AdamW's highest, after a tenth of the steps; then a cosine to nothing
    decay: float = 0.1
    dropout: float = 0.2  # of whole tokens in the encoders
    smoothing: float = 0.02  # of labels
    beside: float = 0.2  # weight of the magnitude and the imbalance loss
    mirror: bool = True  # in every epoch half of the windows are seen with bid and ask exchanged
    ridge: float = 10.0  # belief that the newest row tells nothing: the coefficients of its lines are N(0, 1 / ridge)
    alike: float = 30.0  # belief that instruments have the same class shares: departures of their constants are N(0, 1 / alike)
    prior: float = 1.0  # belief that windows add nothing to these: the share of it that counts is N(0, 1 / prior)
    steady: float = 30.0  # belief that class shares stay: departures of the constants are N(0, 1 / steady)
    doubt: float = 1.0  # standard errors by which the share is lowered; evidence counts independent labels of the calibration slice
    worth: float = 200.0  # a horizon with n independent labels weighs n / (n + worth)
    least: int = 200  # windows of the fit slice
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 1  # more wait for one another where cores are busy
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads) or self.hidden % 2:
            raise InputError(f"width {self.width} must be a multiple of twice the heads ({self.heads}), and hidden {self.hidden} even")


def shapes(columns: int, instruments: int, c: Config) -> dict[str, tuple[int, ...]]:
    """The name and shape of every weight."""
    d, n, f = c.width, c.layers, c.hidden
    out: dict[str, tuple[int, ...]] = {}
    for name, s in zip(FRAMES, STEPS):
        bin_ = ((3,), (s,), (s,), (columns,), (columns,), (WAVES,), (WAVES,), (PATCH * columns + EXTRA, d), (s // PATCH, d))
        layer = ((n, d), (n, d, 3 * d), (n, d, d), (n, d), (n, d, f), (n, f), (n, f, d), (d,), (d,))
        out |= {f"{name}.{k}": v for k, v in zip(Encoder._fields, (*bin_, *layer))}
    ask = ((columns, d), (columns, d), (2, d), (instruments, d), (d,), (d, d), (d, d), (d, d), (d, d))
    tell = ((d,), (d, f), (f,), (f, d), (d,), (d, f), (f,), (f, OUT * H), (OUT * H,))
    return out | {f"join.{k}": v for k, v in zip(Join._fields, (*ask, *tell))}


def initial(columns: int, instruments: int, c: Config, seed: int) -> Weights:
    """Gaussian with variance 1 / inputs; the heads' last layer is zero, so training begins at even odds."""
    rng = np.random.default_rng(seed)
    w: Weights = {}
    for name, shape in shapes(columns, instruments, c).items():
        part = name.partition(".")[2]
        if part.startswith(("norm", "gain")):
            a = np.ones(shape)
        elif part == "mix":
            a = np.array([0.5, 0.25, 0.25])
        elif part == "omega":
            a = np.geomspace(1, 32, WAVES)
        elif part == "phi":
            a = rng.uniform(0, 2 * np.pi, shape)
        elif part.startswith("shift") or part.endswith("_b") or part == "out":
            a = np.zeros(shape)
        elif part in ("place", "frame", "who", "phase", "missing"):
            a = 0.1 * rng.normal(size=shape)
        else:
            a = rng.normal(size=shape) / np.sqrt(shape[-2]) * (0.5 if part in ("merge", "down") else 1.0)
        w[name] = np.ascontiguousarray(a, np.float32)
    return w


@contextlib.contextmanager
def torch_settings(threads: int) -> Iterator[None]:
    """torch with so many threads, deterministic, and its random numbers afterwards as before."""
    import torch

    before, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with torch.random.fork_rng():
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.set_num_threads(before)
            torch.use_deterministic_algorithms(strict)


class Batch(NamedTuple):
    """Windows as the network takes them: values (B, S, C), NaN missing, and gaps (B, S) s, -1 absent, of the three timeframes; `phase`
    (B, 2) of the running second and minute; `instrument` (B,)."""

    values: tuple[Tensor, ...]
    gaps: tuple[Tensor, ...]
    phase: Tensor
    instrument: Tensor


def network(w: Mapping[str, Tensor], batch: Batch, heads: int, dropout: float = 0.0) -> Tensor:
    """The same function as the kernel that serves, for learning: raw outputs (B, H, OUT)."""
    import torch
    import torch.nn.functional as F

    def rms(x: Tensor, gain: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + float(RMS_EPS)) * gain

    def split(x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)

    def drop(x: Tensor) -> Tensor:  # of tokens whole ones
        return x * F.dropout(x.new_ones(x.shape if x.ndim == 2 else (*x.shape[:2], 1)), dropout) if dropout else x

    j: Any = part(Join, "join", w)
    memory, masks, newest = [], [], torch.empty(0)
    for f, (name, x, gap) in enumerate(zip(FRAMES, batch.values, batch.gaps)):
        e: Any = part(Encoder, name, w)
        there = gap >= 0
        known = (~x.isnan()).float() * there.float()[..., None]
        z = x.nan_to_num(0.0) * known

        def normal(dim: int, z: Tensor = z, known: Tensor = known) -> Tensor:
            n = known.sum(dim, keepdim=True).clamp(min=1)
            d = (z - z.sum(dim, keepdim=True) / n) * known
            return d * torch.rsqrt((d * d).sum(dim, keepdim=True) / n + float(BIN_EPS))

        y = e.mix[0] * z + e.mix[1] * (normal(2) * e.gain_s[:, None] + e.shift_s[:, None]) + e.mix[2] * (normal(1) * e.gain_c + e.shift_c)
        valid = there[:, PATCH - 1 :: PATCH]
        old, new = gap[:, ::PATCH], gap[:, PATCH - 1 :: PATCH]
        ago = torch.log1p(1e3 * new.clamp(min=0)) / 8
        within = torch.where(old >= 0, torch.log1p(1e3 * (old - new).clamp(min=0)) / 8, 0.0)
        clock = torch.cat([torch.stack([ago, within], -1), torch.sin(ago[..., None] * e.omega + e.phi)], -1) * valid[..., None]
        h = drop(torch.cat([(y * known).unflatten(1, (-1, PATCH)).flatten(2), clock], -1) @ e.embed + e.place)
        seen = (valid | ~valid.any(1, keepdim=True))[:, None, None]
        for a in range(len(e.qkv)):
            q, k, v = (split(t) for t in (rms(h, e.norm_a[a]) @ e.qkv[a]).chunk(3, -1))
            h = h + drop(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2) @ e.merge[a])
            h = h + drop(F.relu(rms(h, e.norm_f[a]) @ e.up[a] + e.up_b[a])) @ e.down[a]
        newest = h[:, -1] if f == 0 else newest
        memory.append(rms(h, e.norm_m) + e.frame)
        masks.append(valid)
    m, seen = torch.cat(memory, 1), torch.cat(masks, 1)[:, None, None]
    row = batch.values[0][:, -1]
    gone = row.isnan()
    x = newest + torch.where(gone, 0.0, row) @ j.row + gone.float() @ j.missing + batch.phase @ j.phase + j.who[batch.instrument]
    q, k, v = split((rms(x, j.norm_q) @ j.q)[:, None]), split(m @ j.k), split(m @ j.v)
    x = x + drop(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(1) @ j.merge)
    x = x + drop(F.relu(rms(x, j.norm_f) @ j.up + j.up_b)) @ j.down
    return (drop(F.relu(rms(x, j.norm_o) @ j.head + j.head_b)) @ j.out + j.out_b).float().unflatten(-1, (H, OUT))


class Mirror(NamedTuple):
    """Bid and ask exchanged: column c becomes sign[c] times column swap[c]."""

    swap: I64
    sign: F32

    @classmethod
    def of(cls, columns: Sequence[str]) -> Self:
        place = {c: i for i, c in enumerate(columns)}
        swap = [place.get(COLUMNS[c], i) for i, c in enumerate(columns)]
        return cls(np.array(swap), np.array([-1 if COLUMNS[c] == "-" else 1 for c in columns], np.float32))

    def straight(self, columns: Sequence[str]) -> Self:
        """The same of :meth:`Data.straight`; no column of LAGGED changes places with another."""
        signs = [np.full(SECONDS, self.sign[columns.index(c)]) for c in LAGGED if c in columns]
        sign = np.concatenate([self.sign, *signs])
        return self._replace(swap=np.concatenate([self.swap, np.arange(len(self.swap), len(sign))]), sign=sign)


def _scaled(x: NDArray[Any], centre: NDArray[Any], scale: NDArray[Any]) -> F64:
    """As `transformer_kernel.scale_rows` does it, 0 where missing."""
    z = (x.astype(np.float64) - centre) / scale
    return np.nan_to_num(z / (1 + np.abs(z) / float(KNEE)))


class Data(NamedTuple):
    """A sample with all that turns rows of it into batches."""

    sample: Sample
    centre: F64
    scale: F64
    columns: tuple[str, ...]

    def newest(self, rows: I64) -> F64:
        """(n, C) scaled values of the newest rows, 0 where missing."""
        k = self.sample["instrument"][rows]
        return _scaled(self.sample["tick"][rows, -1], self.centre[k], self.scale[k])

    def straight(self, rows: I64) -> F64:
        """(n, D): what the lines look at, the newest row and then LAGGED columns second by second, scaled, 0 where missing."""
        x, k = self.newest(rows), self.sample["instrument"][rows]
        for c in (self.columns.index(name) for name in LAGGED if name in self.columns):
            x = np.concatenate([x, _scaled(self.sample["second"][rows, :, c], self.centre[k, None, c], self.scale[k, None, c])], axis=1)
        return x

    def batch(self, rows: I64, device: str, mirrored: NDArray[np.bool_] | None = None) -> Batch:
        import torch

        def to(a: NDArray[Any]) -> Tensor:
            return torch.from_numpy(a).to(device)

        s, k = self.sample, self.sample["instrument"][rows]
        centre, scale = (to(a[k].astype(np.float32))[:, None] for a in (self.centre, self.scale))
        values = []
        for name in FRAMES:
            raw = to(s[name][rows]).float()
            if mirrored is not None:
                swap, sign = (to(a) for a in Mirror.of(self.columns))
                raw = torch.where(to(mirrored)[:, None, None], raw[..., swap] * sign, raw)
            z = (raw - centre) / scale
            values.append(z / (1 + z.abs() / float(KNEE)))
        phase = np.stack([s["ts"][rows] % n / n for n in WIDTH_NS[1:]], 1).astype(np.float32)
        return Batch(tuple(values), tuple(to(s[f"{name}_gap"][rows]) for name in FRAMES), to(phase), to(k))


class Lines(NamedTuple):
    """A multinomial logit of :meth:`Data.straight`: scores of down, flat and up are x @ slope + constant."""

    slope: F64  # (D, H, 3)
    constant: F64  # (I, H, 3)

    def scores(self, x: F64, instrument: NDArray[Any]) -> F64:
        """(n, H, 3) of inputs (n, D) of instruments (n,)."""
        return np.einsum("nc,chy->nhy", x, self.slope) + self.constant[instrument]

    @classmethod
    def fit(cls, lessons: Lessons, data: Data, config: Config, before: Self | None = None) -> Self:
        """Maximum a posteriori on the fit slice and its mirror image: departures of the slopes from `before` are N(0, 1 / config.ridge),
        the seconds of a column together weigh what another column does, and labels count as the independent ones that they are worth.
        Where ticks or thresholds make an instrument's classes other than those of the rest, its constants say so, as far as labels do.
        The network then learns what windows tell on top of this ("wide and deep": Cheng et al. 2016), of which there is too little
        evidence to learn it all at once."""
        swap, sign = Mirror.of(data.columns).straight(data.columns)
        c, once = len(sign), len(data.columns)
        each = np.eye(len(data.centre))
        ridge = np.array([config.ridge] * once + [config.ridge * SECONDS] * (c - once) + [config.alike] * len(each) + [0.0])
        slope = np.zeros((c, H, 3)) if before is None else before.slope.copy()
        constant = np.tile(np.log(lessons.rates), (len(each), 1, 1))
        for h in np.flatnonzero(lessons.usable):
            rows = lessons.fit[lessons.y[lessons.fit, h] >= 0]
            x, y, whose = data.straight(rows), lessons.y[rows, h].astype(np.int64), each[data.sample["instrument"][rows]]
            x = np.block([[x, whose], [x[:, swap] * sign, whose]])
            y = np.concatenate([y, 2 - y])
            mean = np.column_stack([slope[:, h].T, np.zeros((3, len(each))), np.log(lessons.rates[h])])
            found = fit_logit(x, y, lessons.worth[0, h] / len(y), mean, ridge)
            slope[:, h], constant[:, h] = found[:, :c].T, (found[:, c:-1] + found[:, -1:]).T
        return cls(slope, constant)


def outputs(w: Mapping[str, Tensor], data: Data, rows: I64, heads: int, device: str) -> F32:
    """Raw outputs (n, H, OUT) of the network on rows of a sample."""
    import torch

    out = np.empty((len(rows), H, OUT), np.float32)
    with torch.inference_mode():
        for a in range(0, len(rows), 512):
            out[a : a + 512] = network(w, data.batch(rows[a : a + 512], device), heads).cpu().numpy()
    return out


def _loss(out: Tensor, lines: F64, y: I8, moved: F64, later: F32, share: F64, config: Config) -> Tensor:
    """Sum over decisions and horizons of share (B, H) times: cross-entropy, logits being added to `lines` (B, H, 3), and `beside` of it the
    deviance of an exponential |move| (least at its mean) and the squared error of the imbalance."""
    import torch
    import torch.nn.functional as F

    def to(a: NDArray[Any], dtype: Any = torch.float32) -> Tensor:
        return torch.from_numpy(a).to(out.device, dtype)

    told = to(y, torch.int64)
    logits = (out[..., :3] + to(lines)).flatten(0, 1)
    entropy = F.cross_entropy(logits, told.flatten(), ignore_index=-1, reduction="none", label_smoothing=config.smoothing)
    mean = F.softplus(out[..., 3]).clamp(min=1e-3)
    size = torch.where(told >= 0, to(np.nan_to_num(moved)) / mean + mean.log(), 0.0)
    ahead = torch.where(to(np.isfinite(later), torch.bool), (torch.tanh(out[..., 4]) - to(np.nan_to_num(later))) ** 2, 0.0)
    return (to(share) * (entropy.view_as(size) + config.beside * (size + ahead))).sum()


def train(
    lessons: Lessons, data: Data, lines: Lines, seed: int, config: Config, start: Weights | None = None
) -> tuple[Weights, list[tuple[float, float]]]:
    """AdamW (Loshchilov and Hutter 2019) over the fit slice, on top of the lines; the weights with the least calibration loss, the first
    ones included, and both losses before and after each epoch. Every epoch begins with random numbers of its own, so one that was cut
    short is begun again and ends alike."""
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is there to train on: choose the device auto or cpu")
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    n, y = len(lessons.fit), lessons.y
    weigh = lessons.worth / (lessons.worth + config.worth)
    weigh /= np.maximum(weigh.sum(axis=1, keepdims=True), 1e-12)
    moved = np.abs(lessons.move) / lessons.size[data.sample["instrument"]]
    first = initial(len(data.columns), len(data.centre), config, seed) if start is None else start
    w = {k: torch.tensor(first[k], device=device, requires_grad=True) for k in first}
    groups = [{"params": [w[k] for k in w if (w[k].ndim > 1) is plain], "weight_decay": config.decay * plain} for plain in (True, False)]
    optimiser = torch.optim.AdamW(groups, lr=config.rate)
    key = _key(lessons, data, lines, seed, config, device, start)
    rest, mirror, plain = lessons.calibration, Mirror.of(data.columns).straight(data.columns), dataclasses.replace(config, smoothing=0.0)
    whose = data.sample["instrument"]
    straight, each = lines.scores(data.straight(rest), whose[rest]), weigh[1] / np.maximum((y[rest] >= 0).sum(axis=0), 1)

    def later() -> float:
        raw = torch.from_numpy(outputs(w, data, rest, config.heads, device))
        return float(_loss(raw, straight, y[rest], moved[rest], lessons.later[rest], np.tile(each, (len(rest), 1)), plain))

    so_far = later()
    begun = Run(0, 0, so_far, [(so_far, so_far)], first)
    run = _resume(config.checkpoint, key, w, optimiser) or begun
    total, micro = config.epochs * -(-n // config.batch), config.batch
    with Steps("transformer", config.epochs, "epochs") as steps:
        steps.advance(run.epoch)
        while run.epoch < config.epochs and run.epoch - run.best_epoch < config.patience:
            rng = np.random.default_rng([seed, run.epoch])
            torch.manual_seed(int(rng.integers(2**62)))
            order, sum_ = lessons.fit[rng.permutation(n)], 0.0
            for at in range(0, n, config.batch):
                rows = order[at : at + config.batch]
                flip = (rng.random(len(rows)) < 0.5) & config.mirror
                told = np.where((y[rows] >= 0) & flip[:, None], 2 - y[rows], y[rows]).astype(np.int8)
                ahead = np.where(flip[:, None], -lessons.later[rows], lessons.later[rows])
                known = (told >= 0).sum(axis=0)
                share = np.tile(weigh[0] / np.maximum(known, 1), (len(rows), 1))
                x = data.straight(rows)
                base = lines.scores(np.where(flip[:, None], x[:, mirror.swap] * mirror.sign, x), whose[rows])
                step = run.epoch * -(-n // config.batch) + at // config.batch
                for group in optimiser.param_groups:
                    group["lr"] = config.rate * min((step + 1) / (0.1 * total), 0.5 + 0.5 * np.cos(np.pi * step / total))
                while True:
                    try:
                        optimiser.zero_grad()
                        for part in (slice(a, a + micro) for a in range(0, len(rows), micro)):
                            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                                out = network(w, data.batch(rows[part], device, flip[part]), config.heads, config.dropout)
                            loss = _loss(out, base[part], told[part], moved[rows[part]], ahead[part], share[part], config)
                            loss.backward()  # type: ignore[no-untyped-call]
                            sum_ += float(loss.detach()) * len(rows) / n
                        break
                    except torch.OutOfMemoryError:
                        if micro <= 16:
                            raise
                        micro //= 2
                        print(f"transformer: the device is out of memory, training goes on with {micro} windows at once", file=sys.stderr)
                torch.nn.utils.clip_grad_norm_(list(w.values()), 1.0)
                optimiser.step()
            run = run.after(sum_, later(), w)
            _keep(config.checkpoint, key, run, w, optimiser)
            steps.advance()
    return run.best_weights, run.losses


class Run(NamedTuple):
    """Where training stands after `epoch` epochs; `losses` of the fit and the calibration slice in each."""

    epoch: int
    best_epoch: int
    best: float
    losses: list[tuple[float, float]]
    best_weights: Weights

    def after(self, fit: float, calibration: float, w: Mapping[str, Tensor]) -> Run:
        losses = [*self.losses, (fit, calibration)]
        if calibration < self.best:
            return Run(self.epoch + 1, self.epoch + 1, calibration, losses, {k: v.detach().cpu().numpy().copy() for k, v in w.items()})
        return self._replace(epoch=self.epoch + 1, losses=losses)


CHECKPOINT: Final = "transformer-checkpoint.safetensors"
MOMENTS: Final = ("exp_avg", "exp_avg_sq", "step")


def _key(lessons: Lessons, data: Data, lines: Lines, seed: int, config: Config, device: str, start: Weights | None) -> str:
    """What a checkpoint belongs to: the same windows, labels, lines, settings, seed and first weights."""
    told = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("checkpoint", "device")}
    digest = hashlib.sha256(json.dumps([told, device, seed, data.columns]).encode())
    seen = (data.sample[k] for f in FRAMES for k in (f, f"{f}_gap"))
    for a in (*lessons, *lines, data.centre, data.scale, *(start or {}).values(), *seen):
        digest.update(np.ascontiguousarray(a).data)
    return digest.hexdigest()


def _keep(folder: Path | None, key: str, run: Run, w: Mapping[str, Tensor], optimiser: Any) -> None:
    """Write the checkpoint under another name and then into its place: one that is there is whole."""
    if folder is None:
        return
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{CHECKPOINT}.{os.getpid()}.part"
    tensors = {f"best.{k}": v for k, v in run.best_weights.items()}
    for k, v in w.items():
        for name, t in (("now", v), *((m, optimiser.state[v][m]) for m in MOMENTS)):
            tensors[f"{name}.{k}"] = t.detach().cpu().numpy()
    save_file(tensors, part, {"run": json.dumps([key, run.epoch, run.best_epoch, run.best, run.losses])})
    os.replace(part, folder / CHECKPOINT)


def _resume(folder: Path | None, key: str, w: Mapping[str, Tensor], optimiser: Any) -> Run | None:
    """Weights and optimiser as they stood, if the folder holds a checkpoint of this very training."""
    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import load_file

    if folder is None or not (folder / CHECKPOINT).is_file():
        return None
    try:
        with safe_open(folder / CHECKPOINT, "numpy") as f:
            found, epoch, best_epoch, best, losses = json.loads(f.metadata()["run"])
        if found != key:
            return None
        held = load_file(folder / CHECKPOINT)
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise InputError(f"{folder / CHECKPOINT} is damaged: remove it, training then begins anew") from None
    with torch.no_grad():
        for k, v in w.items():
            v.copy_(torch.from_numpy(held[f"now.{k}"]))
            optimiser.state[v] = {m: torch.from_numpy(held[f"{m}.{k}"]).to("cpu" if m == "step" else v.device) for m in MOMENTS}
    print(f"transformer: going on after epoch {epoch} from {folder / CHECKPOINT}", file=sys.stderr)
    return Run(epoch, best_epoch, best, [(a, b) for a, b in losses], {k: held[f"best.{k}"] for k in w})
