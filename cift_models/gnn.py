"""Cross-asset graph: what the other instruments have just done says where this one goes.

Nodes are instruments. A temporal convolution reads the last 16 cells of 50 ms of each; two graph attention layers (GATv2: Brody, Alon and
Yahav 2022) pass that along edges drawn from rolling correlation and Hayashi-Yoshida lead-lag (`leadlag.py`); heads tell direction and
size of each node's move, and for each edge the correlation and the leader to come. Beside that deep part goes a wide one (Cheng et al.
2016), a sparse linear map of what all instruments did lately. torch and torch-geometric train; numba serves, one decision at a time in
single precision, so any cut of the stream gives the same bits. The graph has to earn its vote: out of sample it must beat a LASSO on the
lagged flows and returns of all instruments, horizon by horizon, or it abstains there.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from catalog.errors import InputError
from catalog.events import SCALE, Instrument
from cift_models.gnn_kernel import Weights, answer, edges_along, embed, outputs, remember, serve, vote, work_room
from cift_models.gnn_stream import F32, FLOWS, NOW, SPACING_NS, Gatherer, Inputs, Scales, State, T, draw, new_state, now_at, places
from cift_models.gnn_train import Config, Linear, Sample, Task, join, lagged, lasso, log_loss, rates, softmax, train
from cift_models.labels import F64, I64, LABELS, H, Study
from cift_models.leadlag import Graph, together
from cift_models.windows import HORIZONS_NS, Block, Votes

RIVALS: Final = ("lasso", "frequencies", "lasso on all", "without the others")  # the first two to be beaten beyond noise


class Gnn:
    """The member. `votes` (I, H): where it votes, for it has earned it; `sizes` (I, H) mean |move|, ticks; `tick` (I,) price units.

    `comparison`: what it was measured by, out of sample; :meth:`report` says it in words.
    """

    name = "gnn"

    def __init__(
        self, names: Sequence[str], ids: Sequence[str], multiplier: F64, tick: F64, weights: Weights, scales: Scales,
        votes: NDArray[np.bool_], sizes: F64, comparison: dict[str, Any],
    ) -> None:  # fmt: skip
        self.ids, self.multiplier, self.tick, self.weights, self.scales = tuple(ids), multiplier, tick, weights, scales
        self.votes, self.sizes, self.comparison = votes, sizes, comparison
        self._columns, self._mid = places(names), list(names).index("mid")

    @staticmethod
    def gatherer(instruments: Sequence[Instrument], names: Sequence[str]) -> Gatherer:
        return Gatherer(instruments, names)

    @classmethod
    def fit(cls, study: Study, gathered: Gatherer, config: Config | None = None, start: Self | None = None) -> Self:
        """The net on the fit slice, its comparison with the LASSO and with class frequencies on the calibration slice.

        From a `start`, an earlier fit of the same instruments and sizes, descent begins at its net, in its units. Deterministic for
        `study.seed`. Raises InputError with a single instrument, or where too few decisions of two of them have labels.
        """
        config, n = config or Config(), len(study.instruments)
        if n < 2:
            raise InputError("a cross-asset graph needs two instruments, there is one: it abstains; name more to have it vote")
        table, x = gathered.decisions()
        own = study._replace(table=table)
        classes = np.full((len(table.ts), H), -1, np.int8)
        tested = np.full((len(table.ts), H), -1, np.int8)
        for h in study.usable:
            y = own.classes(h)
            for to, rows in ((classes, own.fit_rows(h)), (tested, own.calibration_rows(h))):
                to[rows, h] = y[rows]
        rows = np.flatnonzero((classes >= 0).any(axis=1))
        active = np.bincount(table.instrument[rows], minlength=n)
        if len(rows) < config.least_rows or (active > 0).sum() < 2:
            raise InputError(
                f"a cross-asset graph needs {config.least_rows} decisions (0.1 s apart) with labels, of two instruments, in the fit slice; "
                f"there are {len(rows)} of {(active > 0).sum()}: give a longer range"
            )
        cut = int(table.ts[rows[int(len(rows) * (1 - config.validate))]])
        early = np.where(table.known_at <= cut, classes, -1)
        late = np.where(table.ts[:, None] >= cut, classes, -1)
        sizes = np.ones((n, H))
        prior = np.zeros((n, 4 * H), np.float32)
        for k in range(n):
            for h in range(H):
                mine = (table.instrument == k) & (early[:, h] >= 0)
                moved = np.abs(table.move[mine, h])
                sizes[k, h] = moved.mean() if moved.any() else 1.0
                prior[k, 3 * h : 3 * h + 3] = np.log(rates(early[mine, h]))
        if start is not None:
            w, same = start.weights, start.ids == tuple(i.id for i in study.instruments)
            if not same or (w.node.shape[1], w.conv_b.shape[1], w.attend.shape[1]) != (config.width, config.filters, config.heads):
                start = None
        scales = Scales.fit(x.where(rows)) if start is None else start.scales

        def sample(y: NDArray[np.int8], most: int) -> Sample:
            some = np.flatnonzero((y >= 0).any(axis=1))
            some = some[:: max(1, -(-len(some) // most))]
            size = np.nan_to_num(np.abs(table.move[some]) / sizes[table.instrument[some]])
            return Sample(x.where(some), table.instrument[some], y[some], size)

        fit, check, test = sample(early, config.max_rows), sample(late, config.max_rows // 3), sample(tested, len(table.ts))
        n_eff = np.array([own.independent(np.flatnonzero(early[:, h] >= 0), h) for h in range(H)], np.float64)
        task = Task(fit, check, *gathered.graphs(study.split.start, cut), scales, prior, n_eff / (n_eff + config.worth))
        views = [lagged(*scales.apply(s.x)) for s in (fit, check)]
        flows = np.tile(np.arange(FLOWS + len(NOW)) < FLOWS, n)

        def linear(job: tuple[int, int, bool]) -> Linear:
            k, h, all_ = job
            (a, b), columns = (np.flatnonzero((s.node == k) & (s.y[:, h] >= 0)) for s in (fit, check)), slice(None) if all_ else flows
            a = a[:: max(1, HORIZONS_NS[h] // (20 * SPACING_NS))]  # labels that overlap by more tell little more
            return lasso(views[0][a][:, columns], fit.y[a, h], views[1][b][:, columns], check.y[b, h])

        jobs = [(k, h, all_) for k in np.flatnonzero(active).tolist() for h in study.usable for all_ in (False, True)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a linear fit that is not quite there yet is judged like the others
            rivals = {job: linear(job) for job in jobs}  # one after the other: sums in threads that compete round as it happens
        deep = train(task, config, study.seed, None if start is None else start.weights)
        wide = {(k, h): m for (k, h, all_), m in rivals.items() if all_}
        weights, shares = join(deep, prior, wide, scales, check)
        ids, multiplier = [i.id for i in study.instruments], np.array([i.multiplier for i in study.instruments])
        tick = np.array([i.tick / SCALE for i in study.instruments])
        me = cls(study.names, ids, multiplier, tick, weights, scales, np.zeros((n, H), np.bool_), sizes, {})
        at = np.flatnonzero((tested >= 0).any(axis=1))
        me._compare(study, test, table.ts[at], prior, rivals, config)
        for row in me.comparison["horizons"]:
            row["shares"] = dict(zip(("graph", "lasso"), shares[LABELS.index(row["horizon"])].round(1).tolist()))
        later = gathered.graphs(study.split.calibrate, study.split.weigh)
        me.comparison["edges"] = me._edge_scores(*later)
        return me

    def _compare(
        self, study: Study, test: Sample, ts: I64, prior: F32, linear: Mapping[tuple[int, int, bool], Linear], config: Config
    ) -> None:
        """Fill `comparison` and `votes`. A horizon votes where over all instruments together its gain lies above zero beyond noise (block
        bootstrap) against the LASSO on lagged flows and returns and against class frequencies, and in the mean against a LASSO that is
        given every input of the graph and against itself blind to the others; of its instruments those vote that gain in the mean."""
        from cift_models.validate import block_bootstrap

        out = outputs(self.weights, self.scales, test.x, test.node)
        unlinked = test.x._replace(linked=np.broadcast_to(np.eye(len(self.ids), dtype=np.bool_), test.x.linked.shape))
        own = np.repeat(np.eye(len(self.ids), dtype=np.float32), FLOWS + len(NOW), axis=1)[:, :, None]
        alone = outputs(self.weights._replace(wide=self.weights.wide * own), self.scales, unlinked, test.node)
        x = lagged(*self.scales.apply(test.x))
        flows = np.tile(np.arange(FLOWS + len(NOW)) < FLOWS, len(self.ids))
        level = 1 - 2 * config.level / max(1, len(study.usable))
        table: list[dict[str, Any]] = []
        for h in study.usable:
            known = np.flatnonzero(test.y[:, h] >= 0)
            if not len(known):
                continue
            y, node, at = test.y[known, h], test.node[known], slice(3 * h, 3 * h + 3)
            rivals: dict[str, F64] = {name: softmax(prior[node, at]) for name in RIVALS}
            for k in np.unique(node):
                mine = node == k
                for name, columns, all_ in (("lasso", flows, False), ("lasso on all", slice(None), True)):
                    if (k, h, all_) in linear:
                        rivals[name][mine] = softmax(linear[k, h, all_].scores(x[known[mine]][:, columns]))
            ours = log_loss(softmax(out[known, at]), y)
            rivals["without the others"] = softmax(alone[known, at])
            losses = {"gnn": _mean(ours)}
            row: dict[str, Any] = {"horizon": LABELS[h], "n": len(y), "log_loss": losses, "gain": {}}
            table.append(row)
            mean, bounds, gains = np.zeros((len(rivals), len(self.ids))), [], row["gain"]
            for r, (name, p) in enumerate(rivals.items()):
                gain = log_loss(p, y) - ours
                interval = block_bootstrap(gain, ts[known], 2 * HORIZONS_NS[h], study.seed, level=level)
                losses[name] = _mean(log_loss(p, y))
                gains[name] = {"mean": _mean(gain), "interval": [None if np.isnan(v) else v for v in interval]}
                mean[r] = np.bincount(node, weights=gain, minlength=len(self.ids))
                bounds.append(interval)
            earned = len(np.unique(y)) > 1 and bounds[0].low > 0 and bounds[1].low > 0 and (mean.sum(axis=1) > 0).all()
            self.votes[:, h] = earned & (mean[:2] > 0).all(axis=0)
            row["votes"] = [id_ for id_, v in zip(self.ids, self.votes[:, h]) if v]
        self.comparison = {"level": level, "horizons": table}

    def _edge_scores(self, x: Inputs, target: F64) -> dict[str, Any]:
        """Mean squared errors on the snapshots of the calibration slice: of the heads, of rolling correlation as it stands, of zero."""
        heads = np.array([self._pair_heads(*x.where(r)) for r in range(len(target))]).reshape(target.shape)
        known = np.isfinite(target) & ~np.eye(target.shape[2], dtype=np.bool_)
        out: dict[str, Any] = {"snapshots": len(target)}
        rolling: list[Any] = [x.edges[..., 0], np.zeros(target[:, 1].shape)]
        for q, (name, still) in enumerate(zip(("correlation", "lead"), rolling)):
            k = known[:, q]
            if k.any():
                true = target[:, q][k]
                out[name] = {
                    "gnn": _mean((heads[:, q][k] - true) ** 2), "rolling": _mean((still[k] - true) ** 2), "zero": _mean(true**2),
                    "sign": _mean((np.sign(heads[:, q][k]) == np.sign(true))[true != 0]),
                }  # fmt: skip
        return out

    def _pair_heads(self, history: F32, now: F32, edges: F32, linked: NDArray[np.bool_]) -> F64:
        """(2, N, N): the correlation and the lead (> 0: j of i) to come, of one graph as gathered."""
        w, n = self.weights, len(self.ids)
        work, base, lags = work_room(w), np.empty((n, w.node.shape[1]), np.float32), np.empty((n, FLOWS), np.float32)
        along, out, y = np.empty((2, n, n, w.node.shape[1]), np.float32), np.empty(4 * H, np.float32), np.empty((n, w.node.shape[1]))
        embed(w, self.scales, history, 0, base, lags)
        edges_along(w, edges, along)
        for k in range(n):
            answer(w, self.scales, k, now, base, along, lags, linked, work, out)
            y[k] = work[4][k]
        lead = y @ w.lead
        both = np.einsum("id,jd,d->ij", y, y, w.pair) + edges[..., :2] @ w.pair_e + w.pair_b
        return np.tanh(np.stack([both, lead[None, :] - lead[:, None] + edges[..., 2] * w.lead_e]))

    def new_state(self) -> State:
        return new_state(len(self.tick), self.weights.node.shape[1])

    def predict(self, block: Block, state: State) -> Votes:
        """Votes at each close, `state` advanced in place. NaN where the horizon has not earned its vote for the instrument, before the
        instrument has a mid, and while it is the only one with a mid."""
        e, m = block.events, len(block.closes)
        rows = np.ascontiguousarray(block.rows, np.float64)
        votes = Votes(np.empty((m, H, 3)), np.empty((m, H)))
        serve(
            np.ascontiguousarray(e["ts_init"]), e["instrument"].astype(np.int64), np.ascontiguousarray(rows[:, self._mid]), rows,
            self._columns, self.tick, np.ascontiguousarray(e["action"]), np.ascontiguousarray(e["side"]), e["size"] / SCALE,
            np.asarray(block.closes, np.int64), self.weights, self.scales, self.votes, self.sizes, state, *votes,
        )  # fmt: skip
        return votes

    def graph(self, state: State) -> Graph:
        """How the instruments hang together as of the newest event: for :func:`leadlag.hedge`, :func:`leadlag.contagion` and the eye."""
        n, s = len(self.ids), state
        unit, lead = self.tick * self.multiplier, s.links.lead
        both = np.array([[together(s.links, i, j)[0] if i != j else 1.0 for j in range(n)] for i in range(n)])
        with np.errstate(divide="ignore", invalid="ignore"):
            beta = np.nan_to_num(lead[..., 3] / lead[..., 4]) * unit[:, None] / unit[None, :]
        draw(s)
        s.clock[1] = -1
        now = np.empty((n, len(NOW)))
        now_at(s, s.clock[2], now)
        history = np.roll(s.history, -int(s.clock[0] % T), axis=1)
        ahead, leads = self._pair_heads(history, now.astype(np.float32), s.edges, s.linked)
        return Graph(self.ids, both, lead[..., 0].copy(), lead[..., 1].astype(np.int64), lead[..., 2].copy(), beta, ahead, leads)

    def impulse(self, state: State, node: int, ticks: float) -> F64:
        """(N, H): by how many ticks the expected move of every instrument changes if the mid of `node` were `ticks` higher now.

        The net's own answer, P(up) - P(down) times the expected |move|, with and without the shock; all horizons, earned or not.
        """
        n, w, answers = len(self.ids), self.weights, []
        for shock in (0.0, ticks):
            s = copy.deepcopy(state)
            s.mid[node] += shock
            s.clock[1] = -1
            remember(w, self.scales, s)
            now, work, out = np.empty((n, len(NOW))), work_room(w), np.empty(4 * H, np.float32)
            now_at(s, s.clock[2], now)
            expected = np.zeros((n, H))
            for k in range(n):
                answer(w, self.scales, k, now, s.base, s.along, s.lags, s.linked, work, out)
                for h in range(H):
                    p = np.empty(3)
                    size = vote(out, h, self.sizes[k, h], p)
                    expected[k, h] = (p[2] - p[0]) * size
            answers.append(expected)
        return answers[1] - answers[0]

    def report(self) -> list[str]:
        """The comparison in lines of text: where the graph votes, and why it does not elsewhere."""
        lines = []
        for row in self.comparison["horizons"]:
            gain, losses = row["gain"], ", ".join(f"{name} {loss:.4f}" for name, loss in row["log_loss"].items())
            low = {name: gain[name]["interval"][0] for name in RIVALS[:2]}
            beaten = [f"beyond noise over {name} ({v:+.4f})" for name, v in low.items() if v is not None and v <= 0]
            beaten += [f"over {name}" for name in RIVALS[2:] if gain[name]["mean"] <= 0]
            if row["votes"]:
                verdict = f"votes for {', '.join(row['votes'])}"
            elif None in low.values():
                verdict = f"abstains: {row['n']} labels of the calibration slice span too little time to tell"
            else:
                verdict = f"abstains: no gain {', '.join(beaten) or 'for any instrument'}"
            lines.append(f"gnn {row['horizon']}: log-loss {losses}; {verdict}")
        return lines

    def save(self, folder: Path) -> None:
        from safetensors.numpy import save_file

        parts = {"multiplier": self.multiplier, "tick": self.tick, "votes": self.votes, "sizes": self.sizes}
        parts |= {f"scales.{k}": v for k, v in self.scales._asdict().items()} | {f"net.{k}": v for k, v in self.weights._asdict().items()}
        save_file({k: np.ascontiguousarray(v) for k, v in parts.items()}, folder / "gnn.safetensors")
        (folder / "gnn.json").write_text(json.dumps({"ids": self.ids, "comparison": self.comparison}, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, folder: Path, names: Sequence[str]) -> Self:
        """Raises InputError, naming the file, where one is absent or not what :meth:`save` writes."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = folder / "gnn.safetensors"
        try:
            told, z = json.loads((folder / "gnn.json").read_text()), load_file(path)
            weights = Weights(*(z[f"net.{f}"] for f in Weights._fields))
            scales = Scales(z["scales.cell"], z["scales.now"])
            rest = z["votes"], z["sizes"], told["comparison"]
            return cls(names, told["ids"], z["multiplier"], z["tick"], weights, scales, *rest)
        except (OSError, ValueError, KeyError, SafetensorError) as e:
            raise InputError(f"{path} or gnn.json beside it is no graph of this version ({e}): train again") from e


def _mean(v: NDArray[Any]) -> float | None:
    return float(v.mean()) if len(v) else None
