"""How the graph network learns: the torch-geometric net and its descent, LASSOs on lagged flows, and the pool of both.

Takes the graphs and labels that :class:`gnn_stream.Gatherer` holds, gives the :class:`gnn_kernel.Weights` that serve.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cift_models.gnn_kernel import SLOPE, Weights, outputs
from cift_models.gnn_stream import BINS, CELL, EDGE, F32, FLOWS, NOW, Inputs, Scales
from cift_models.labels import F64, I64, H

ODD: Final = (  # what changes its sign when all prices are turned upside down
    "return", "ofi", "trades", "imbalance_1", "microprice", "ofi_fast", "ofi_1", "ofi_slow", "trade_imbalance_1s", "trade_imbalance_8s",
    "trade_imbalance_64s", "return_1s", "return_8s", "return since the last cell",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Config:
    width: int = 24  # of a node's embedding
    filters: int = 16  # of the temporal convolution
    heads: int = 2  # of each attention layer
    steps: int = 480
    every: int = 40  # steps between looks at the validation loss
    patience: int = 4  # looks without a better one
    batch: int = 256
    rate: float = 8e-3
    decay: float = 1e-3
    average: float = 0.98  # the net that is kept is the moving average of those along the way
    worth: float = 1_000.0  # a horizon with n independent labels weighs n / (n + worth)
    max_rows: int = 24_000  # decisions that the net learns from
    validate: float = 0.2  # last share of the fit slice: early stopping, shrinkage, the LASSO's penalty
    least_rows: int = 400
    level: float = 0.05  # of the one-sided test against both rivals, over all horizons together


def torch_net(n: int, config: Config) -> Any:
    """The same net as a torch module with torch-geometric's GATv2Conv: the one that is trained, and the twin of the serving code.

    `forward(history, now, edges, linked)`: standardised float32 tensors shaped as :class:`Inputs`; gives (y (m, N, D), out (m, N, 4 H)
    without the class frequencies). `pairs(y, edges)`: (correlation, lead) heads, (m, N, N) each.
    """
    import torch
    from torch import nn
    from torch_geometric.nn import GATv2Conv

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            d, f = config.width, config.filters
            self.convs = nn.ModuleList([nn.Linear(2 * (len(CELL) if a == 0 else f), f) for a in range(4)])  # two steps become one
            self.take, self.now = nn.Linear(f, d), nn.Linear(len(NOW), d, bias=False)
            self.node = nn.Parameter(torch.zeros(n, d))
            self.attention = nn.ModuleList(
                [
                    GATv2Conv(d, d // config.heads, config.heads, edge_dim=len(EDGE), add_self_loops=False, negative_slope=float(SLOPE))
                    for _ in range(2)
                ]
            )
            self.head = nn.Linear(d, 4 * H)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
            self.pair, self.pair_e, self.pair_b = (nn.Parameter(torch.zeros(size)) for size in (d, 2, 1))
            self.lead, self.lead_e = (nn.Parameter(torch.zeros(size)) for size in (d, 1))

        def forward(self, history: Any, now: Any, edges: Any, linked: Any) -> Any:
            leaky, m = nn.functional.leaky_relu, len(history)
            x = history
            for conv in self.convs:
                x = leaky(conv(x.reshape(m, n, x.shape[2] // 2, -1)), float(SLOPE))
            y = leaky(self.take(x[:, :, 0]) + self.node + self.now(now), float(SLOPE)).flatten(0, 1)
            b, i, j = linked.nonzero(as_tuple=True)
            index, attributes = torch.stack([b * n + j, b * n + i]), edges[b, i, j]
            for attention in self.attention:
                y = leaky(y + attention(y, index, attributes), float(SLOPE))
            y = y.view(m, n, -1)
            return y, self.head(y)

        def pairs(self, y: Any, edges: Any) -> Any:
            together = torch.einsum("bid,bjd,d->bij", y, y, self.pair) + edges[..., :2] @ self.pair_e + self.pair_b
            return together.tanh(), ((y @ self.lead)[:, None, :] - (y @ self.lead)[:, :, None] + edges[..., 2] * self.lead_e).tanh()

    return Net()


def weights_of(net: Any, prior: F32) -> Weights:
    def a(t: Any) -> F32:
        return np.ascontiguousarray(t.detach().numpy().astype(np.float32))

    n = len(prior)
    wide = np.zeros((n, n * (FLOWS + len(NOW)), 4 * H), np.float32)

    def pairs(layer: Any) -> F32:
        return a(layer.weight.T).reshape(2, -1, layer.out_features)

    convs = net.convs
    def both(name: str) -> F32:
        return np.stack([a(operator.attrgetter(name)(g)) for g in net.attention])

    return Weights(
        pairs(convs[0]), np.stack([pairs(c) for c in convs[1:]]), np.stack([a(c.bias) for c in convs]),
        a(net.take.weight.T), a(net.now.weight.T), a(net.node + net.take.bias), both("lin_l.weight.T"), both("lin_l.bias"),
        both("lin_r.weight.T"), both("lin_r.bias"), both("lin_edge.weight.T"), both("att")[:, 0], both("bias"), a(net.head.weight.T),
        a(net.head.bias) + prior, wide, a(net.pair), a(net.pair_e), a(net.pair_b), a(net.lead), a(net.lead_e),
    )  # fmt: skip


def begin_at(net: Any, w: Weights) -> None:
    """Give a fresh `net` the parameters that :func:`weights_of` read, but for the class frequencies, which are the task's."""
    import torch

    def to(p: Any, a: F32) -> None:
        p.copy_(torch.from_numpy(np.ascontiguousarray(a)))

    with torch.no_grad():
        for a, conv in enumerate(net.convs):
            to(conv.weight, (w.conv_1 if a == 0 else w.conv[a - 1]).reshape(-1, conv.out_features).T)
            to(conv.bias, w.conv_b[a])
        to(net.take.weight, w.take.T)
        net.take.bias.zero_()
        to(net.now.weight, w.now.T)
        to(net.node, w.node)
        for a, layer in enumerate(net.attention):
            for p, x in (
                (layer.lin_l.weight, w.source[a].T), (layer.lin_l.bias, w.source_b[a]), (layer.lin_r.weight, w.target[a].T),
                (layer.lin_r.bias, w.target_b[a]), (layer.lin_edge.weight, w.edge[a].T), (layer.att, w.attend[a][None]),
                (layer.bias, w.message_b[a]),
            ):  # fmt: skip
                to(p, x)
        to(net.head.weight, w.head.T)
        net.head.bias.zero_()
        to(net.head.bias[3 * H :], w.head_b[:, 3 * H :].mean(axis=0))
        for p, x in ((net.pair, w.pair), (net.pair_e, w.pair_e), (net.pair_b, w.pair_b), (net.lead, w.lead), (net.lead_e, w.lead_e)):
            to(p, x)


class Sample(NamedTuple):
    """Decisions to learn from: inputs, node (m,), class (m, H) -1 where there is none, |move| over its mean (m, H)."""

    x: Inputs
    node: I64
    y: NDArray[np.int8]
    size: F64


class Task(NamedTuple):
    """What the net learns from: decisions to fit, later ones to stop by, `graphs` and what came after each (p, 2, N, N); the log class
    frequencies `prior` (N, 4 H), the weight of each horizon (H,)."""

    fit: Sample
    check: Sample
    graphs: Inputs
    came: F64
    scales: Scales
    prior: F32
    weight: F64


def train(task: Task, config: Config, seed: int, start: Weights | None = None) -> Weights:
    """Fit the deep part, from `start` or anew, and stop by the log-loss on `check`.

    Every other graph is shown mirrored: all prices upside down, up and down exchanged. Deterministic for a seed.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums of another number of threads round otherwise
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _descend(torch, task, config, np.random.default_rng(seed), start)
    finally:
        torch.set_num_threads(threads)


def _descend(torch: Any, task: Task, config: Config, rng: np.random.Generator, start: Weights | None) -> Weights:
    fit, check, n = task.fit, task.check, len(task.prior)
    net, kept = torch_net(n, config), torch_net(n, config)
    if start is not None:
        begin_at(net, start)
    kept.load_state_dict(net.state_dict())
    adam = torch.optim.AdamW(net.parameters(), config.rate, weight_decay=config.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, config.rate, total_steps=config.steps)
    odd = [torch.tensor([float(c in ODD) for c in columns]) for columns in (CELL, NOW)]
    upright = task.prior[:, : 3 * H].reshape(n, H, 3)
    offset = torch.from_numpy(np.stack([upright, upright[:, :, ::-1]]))
    weight = torch.from_numpy(task.weight.astype(np.float32))

    def tensors(x: Inputs) -> list[Any]:
        return [torch.from_numpy(np.ascontiguousarray(a)) for a in (*task.scales.apply(x), x.edges, x.linked)]

    def losses(out: Any, sample: Sample, rows: Any, mirrored: NDArray[np.bool_]) -> tuple[Any, Any]:
        node, y = sample.node[rows], sample.y[rows].astype(np.int64)
        y = torch.from_numpy(np.where(mirrored[:, None] & (y >= 0), 2 - y, y).flatten())
        out, known = out[np.arange(len(node)), node], y >= 0
        logits = (out[:, : 3 * H].view(-1, H, 3) + offset[mirrored.astype(np.int64), node]).view(-1, 3)
        w = weight.repeat(len(node))[known]
        total = w.sum().clamp(min=1e-9)
        m = out[:, 3 * H :].clamp(-3, 3).flatten()[known]
        size = torch.from_numpy(sample.size[rows].astype(np.float32)).flatten()[known]
        cross = torch.nn.functional.cross_entropy(logits[known], y[known], reduction="none")
        return (w * cross).sum() / total, (w * (size * (-m).exp() + m)).sum() / total

    x_fit, x_check, x_graphs = tensors(fit.x), tensors(check.x), tensors(task.graphs)
    came = torch.from_numpy(task.came.astype(np.float32))
    best, best_loss, stale = {k: v.clone() for k, v in kept.state_dict().items()}, math.inf, 0
    order = rng.permutation(len(fit.node))
    for step in range(1, config.steps + 1):
        while len(order) < config.batch:
            order = np.concatenate([order, rng.permutation(len(fit.node))])
        rows, order = order[: config.batch], order[config.batch :]
        mirrored, some = rng.random(len(rows)) < 0.5, rng.integers(0, max(1, len(came)), min(32, len(came)))
        sign = torch.from_numpy(np.append(np.where(mirrored, -2.0, 0.0), np.zeros(len(some))).astype(np.float32))[:, None, None]
        x = [torch.cat([a[rows], b[some]]) for a, b in zip(x_fit, x_graphs)]
        y, out = net(x[0] * (1 + sign[..., None] * odd[0]), x[1] * (1 + sign * odd[1]), *x[2:])
        loss, size = losses(out, fit, rows, mirrored)
        loss = loss + 0.1 * size
        error = torch.stack(net.pairs(y[len(rows) :], x[2][len(rows) :]), 1) - came[some]
        known = ~(torch.isnan(error) | torch.eye(n, dtype=torch.bool))
        if known.any():
            loss = loss + 0.1 * (error[known] ** 2).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adam.step()
        schedule.step()
        with torch.no_grad():
            for old, new in zip(kept.parameters(), net.parameters()):
                old.lerp_(new, 1 - min(config.average, step / (step + 10)))
        if step % config.every and step < config.steps:
            continue
        with torch.no_grad():
            loss = float(losses(kept(*x_check)[1], check, slice(None), np.zeros(len(check.node), np.bool_))[0])
        if loss < best_loss - 1e-5:
            best, best_loss, stale = {k: v.clone() for k, v in kept.state_dict().items()}, loss, 0
        elif (stale := stale + 1) >= config.patience:
            break
    kept.load_state_dict(best)
    return weights_of(kept, task.prior)


def join(w: Weights, prior: F32, wide: Mapping[tuple[int, int], Linear], scales: Scales, check: Sample) -> tuple[Weights, F64]:
    """Net and linear maps (by node and horizon) as one, each tilting the log class frequencies by a share; and the shares (H, 2).

    The shares in [0, 1.2] are those with which `check` is likeliest; none leaves the class frequencies. This pools the two opinions
    (Genest and Zidek 1986, log-linear).
    """
    head, head_b, maps = w.head.copy(), w.head_b.copy(), w.wide.copy()
    out, x, shares = outputs(w, scales, check.x, check.node), lagged(*scales.apply(check.x)), np.zeros((H, 2))
    grid = sorted(itertools.product(np.arange(0, 1.3, 0.2), repeat=2), key=sum)
    for h in range(H):
        at, known = slice(3 * h, 3 * h + 3), np.flatnonzero(check.y[:, h] >= 0)
        base, y = prior[check.node[known], at], check.y[known, h]
        deep, straight = out[known, at] - base, np.zeros((len(known), 3))
        for k in range(len(prior)):
            mine = check.node[known] == k
            if (k, h) in wide:
                straight[mine] = wide[k, h].scores(x[known[mine]]) - base[mine]
        if len(y):
            shares[h] = min(grid, key=lambda g: float(log_loss(softmax(base + g[0] * deep + g[1] * straight), y).mean()))
        u, v = shares[h].astype(np.float32)
        head[:, at] *= u
        head_b[:, at] = prior[:, at] + u * (head_b[:, at] - prior[:, at])
        for k in range(len(prior)):
            if (k, h) in wide:
                head_b[k, at] += v * (wide[k, h].constant - prior[k, at])
                maps[k, :, at] = v * wide[k, h].slope
    return w._replace(head=head, head_b=head_b, wide=maps), shares


def softmax(z: NDArray[Any]) -> F64:
    e = np.exp(z - z.max(axis=1, keepdims=True), dtype=np.float64)
    return e / e.sum(axis=1, keepdims=True)


def rates(y: NDArray[np.int8]) -> F64:
    """Class frequencies, with a tenth of a decision of each class on top: none is impossible."""
    return (np.bincount(y, minlength=3).astype(np.float64) + 0.1) / (len(y) + 0.3)


def log_loss(p: F64, y: NDArray[np.int8]) -> F64:
    return -np.log(np.maximum(p[np.arange(len(y)), y], 1e-6))


def lagged(history: F32, now: F32) -> F64:
    """What linear maps see of every instrument, from standardised inputs: returns, order flow and trades summed over BINS (FLOWS columns),
    then all of `now`; (m, N (FLOWS + NOW))."""
    bins = [history[:, :, a:b, :3].sum(axis=2) for a, b in BINS]
    return np.concatenate([*bins, now], axis=2).reshape(len(now), -1).astype(np.float64)


class Linear(NamedTuple):
    """Scores of down, flat and up: x (m, K) -> constant + x slope, (m, 3)."""

    slope: F64  # (K, 3)
    constant: F64  # (3,)

    def scores(self, x: F64) -> F64:
        return x @ self.slope + self.constant


def lasso(x: F64, y: NDArray[np.int8], x_check: F64, y_check: NDArray[np.int8]) -> Linear:
    """Multinomial regression of y (m,) on x (m, K) with an l1 penalty (Tibshirani 1996).

    The penalty runs down from the one at which all slopes vanish, as long as the loss on `x_check`, `y_check` falls. The class frequencies,
    without slopes, where a class is missing.
    """
    from sklearn.linear_model import LogisticRegression

    n, found = len(y), Linear(np.zeros((x.shape[1], 3)), np.log(rates(y)))
    if len(np.unique(y)) < 3 or not len(y_check):
        return found
    centre, spread = x.mean(axis=0), x.std(axis=0)
    spread[~(spread > 1e-9)] = np.inf
    z, least = (x - centre) / spread, float(log_loss(softmax(found.scores(x_check)), y_check).mean())
    top = float(np.abs(z.T @ (np.eye(3)[y] - rates(y))).max()) / n
    model = LogisticRegression(l1_ratio=1.0, solver="saga", tol=1e-2, max_iter=200, random_state=0, warm_start=True)
    for share in (0.6, 0.35, 0.2, 0.12, 0.07, 0.04, 0.02) if top > 0 else ():
        model.set_params(C=1 / (share * top * n))
        model.fit(z, y)
        slope = (model.coef_ / spread).T
        tried = Linear(slope, model.intercept_ - centre @ slope)
        loss = float(log_loss(softmax(tried.scores(x_check)), y_check).mean())
        if loss > least + 1e-3:
            break
        if loss < least:
            least, found = loss, tried
    return found
