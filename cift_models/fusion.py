"""Fusion: gradient-boosted trees over everything that is known about the decision, one booster for each horizon.

XGBoost (Chen and Guestrin 2016) fits; isotonic regression (Zadrozny and Elkan 2002) calibrates on a later slice; our own walk over
the trees predicts, equal to XGBoost to the last float32 bit, at a fraction of its cost for one row. Takes the model-input columns of
decision rows (any further named column joins by name) and, where a table of alternative data is given, its 27 features and their ages as
of the time they were known; gives class probabilities and the expected size of the move. Missing values are NaN and the trees cope; so does
a feed that lacks whole columns.

The table (:class:`catalog.altdata.Table`) comes by `Config.alternative`, or from a subclass, which is a member of one's own with its name:

    class Informed(Fusion):
        name = "informed"
        alternative = altdata.read("alternative.parquet")

An artifact names the columns and does not hold the table: without one, or past its end, the columns are NaN or what was known last.
"""

from __future__ import annotations

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from catalog import altdata
from cift_models.labels import F64, I64, LABELS, H, Study
from cift_models.windows import HORIZONS_NS, Block, Votes

TILE, FEW = 32, 8  # rows walked together, so that a tree stays in the cache while they pass; fewer go one by one
LEAST_CALIBRATION = 200  # labels; with fewer, scores stay as they are
ALTERNATIVE = (*(f"alt_{n}" for n in altdata.NAMES), *(f"alt_{n}_age" for n in altdata.NAMES))  # values, ages in seconds
SLICES, EXPLAINED = 4, 250  # slices of time over which SHAP values are taken, and decisions of each
FLOOR = 1e-3  # no calibrated probability is nearer to 0 or 1


@dataclass(frozen=True, slots=True)
class Config:
    rounds: int = 100  # at most; x 3 classes x 4 horizons = 1,200 trees
    patience: int = 20  # stops where the calibration slice has not gained for so many rounds, and keeps the best; 0: all
    depth: int = 4
    eta: float = 0.1
    bins: int = 64
    columns: float = 0.5  # share of the columns that a tree sees
    child_weight: float = 5.0  # in independent labels: rows weigh what their overlapping labels are worth
    l2: float = 5.0
    identity: float = 100.0  # independent labels' worth of belief that scores are calibrated as they are
    max_rows: int = 40_000  # a horizon learns from no more; overlapping labels add little
    alternative: altdata.Table | None = None  # joined to each decision as of the time known; None: the class's own, if any
    threads: int = 2  # horizons fitted at once, each on one core: boosters that share cores wait for one another


class Trees(NamedTuple):
    """T trees as perfect binary trees of one depth: inner nodes (T, 2^d - 1), leaves (T, 2^d), all float32 as in XGBoost."""

    feature: NDArray[np.int16]
    cut: NDArray[np.float32]
    nan_right: NDArray[np.bool_]
    leaf: NDArray[np.float32]
    group: I64  # (T,) which sum the tree adds to: 3 * horizon + class
    base: NDArray[np.float32]  # (3 H,) where each sum starts


def read_trees(models: dict[int, dict[str, Any]]) -> Trees:
    """XGBoost's own JSON of each horizon's booster -> the layout that the walk uses; horizons without a booster have no tree."""
    flat: list[tuple[int, dict[str, Any]]] = []
    base = np.zeros(3 * H, np.float32)
    for h, model in sorted(models.items()):
        learner = model["learner"]
        booster = learner["gradient_booster"]["model"]
        base[3 * h : 3 * h + 3] = np.array(json.loads(learner["learner_model_param"]["base_score"]), np.float32)
        flat += [(3 * h + g, t) for g, t in zip(booster["tree_info"], booster["trees"])]
    depth = max((_depth(t) for _, t in flat), default=1)
    inner, n = 2**depth - 1, len(flat)
    trees = Trees(
        np.zeros((n, inner), np.int16), np.zeros((n, inner), np.float32), np.zeros((n, inner), np.bool_),
        np.zeros((n, inner + 1), np.float32), np.array([g for g, _ in flat], np.int64), base,
    )  # fmt: skip
    for i, (_, tree) in enumerate(flat):
        _lay(tree, trees, i, 0, 0, inner)
    return trees


def _depth(tree: dict[str, Any], node: int = 0) -> int:
    left = tree["left_children"][node]
    return 0 if left == -1 else 1 + max(_depth(tree, left), _depth(tree, tree["right_children"][node]))


def _lay(tree: dict[str, Any], to: Trees, i: int, node: int, place: int, inner: int) -> None:
    """Copy the subtree at `node` to `place`; a leaf above the lowest level is repeated below itself."""
    if place >= inner:
        to.leaf[i, place - inner] = tree["split_conditions"][node]
        return
    left, right = tree["left_children"][node], tree["right_children"][node]
    if left == -1:
        left = right = node
    else:
        to.feature[i, place], to.cut[i, place] = tree["split_indices"][node], tree["split_conditions"][node]
        to.nan_right[i, place] = not tree["default_left"][node]
    _lay(tree, to, i, left, 2 * place + 1, inner)
    _lay(tree, to, i, right, 2 * place + 2, inner)


@njit(cache=True, nogil=True)
def _alone(x, feature, cut, nan_right, leaf, group, depth, out):  # type: ignore[no-untyped-def]
    inner = feature.shape[1]
    for t in range(len(group)):
        for r in range(len(x)):
            node = 0
            for _ in range(depth):
                v = x[r, feature[t, node]]
                right = nan_right[t, node] if v != v else v >= cut[t, node]
                node = 2 * node + 1 + (1 if right else 0)
            out[r, group[t]] += leaf[t, node - inner]


@njit(cache=True, nogil=True)
def _together(x, feature, cut, nan_right, leaf, group, depth, out):  # type: ignore[no-untyped-def]
    """As :func:`_alone`, level by level, so that the rows do not wait for one another."""
    inner, n = feature.shape[1], len(x)
    nodes = np.empty(n, np.int64)
    for t in range(len(group)):
        for r in range(n):
            nodes[r] = 0
        for _ in range(depth):
            for r in range(n):
                node = nodes[r]
                v = x[r, feature[t, node]]
                nodes[r] = 2 * node + 1 + ((v >= cut[t, node]) | ((v != v) & nan_right[t, node]))
        g = group[t]
        for r in range(n):
            out[r, g] += leaf[t, nodes[r] - inner]


@njit(cache=True, nogil=True)
def walk(x, feature, cut, nan_right, leaf, group, base, out):  # type: ignore[no-untyped-def]
    """Raw scores `out` (m, G) float32 of rows `x` (m, C) float32; adds tree by tree in XGBoost's order, so the sums are its own."""
    depth = 0
    while (1 << depth) - 1 < feature.shape[1]:
        depth += 1
    for a in range(0, len(x), TILE):
        b = min(a + TILE, len(x))
        for r in range(a, b):
            out[r] = base
        if b - a < FEW:
            _alone(x[a:b], feature, cut, nan_right, leaf, group, depth, out[a:b])
        else:
            _together(x[a:b], feature, cut, nan_right, leaf, group, depth, out[a:b])


@njit(cache=True, nogil=True)
def _interpolate(x, xs, ys, n):  # type: ignore[no-untyped-def]
    if x <= xs[0]:
        return ys[0]
    if x >= xs[n - 1]:
        return ys[n - 1]
    a, b = 0, n - 1
    while b - a > 1:
        c = (a + b) // 2
        if xs[c] <= x:
            a = c
        else:
            b = c
    return ys[a] + (ys[b] - ys[a]) * ((x - xs[a]) / (xs[b] - xs[a]))


@njit(cache=True, nogil=True)
def softmax(z, out):  # type: ignore[no-untyped-def]
    """(m, 3) float32 scores -> (m, 3) float64 probabilities."""
    for r in range(len(z)):
        top = max(z[r, 0], max(z[r, 1], z[r, 2]))
        a, b, c = np.exp(np.float64(z[r, 0] - top)), np.exp(np.float64(z[r, 1] - top)), np.exp(np.float64(z[r, 2] - top))
        s = a + b + c
        out[r, 0], out[r, 1], out[r, 2] = a / s, b / s, c / s


@njit(cache=True, nogil=True)
def _votes(z, x, inst, known, xs, ys, n, scale, proba, magnitude):  # type: ignore[no-untyped-def]
    p = np.empty((1, 3))
    for r in range(len(z)):
        some = False
        for c in range(x.shape[1] - 1):
            some |= x[r, c] == x[r, c]
        for h in range(len(known)):
            if not (known[h] and some):
                proba[r, h] = np.nan
                magnitude[r, h] = np.nan
                continue
            softmax(z[r : r + 1, 3 * h : 3 * h + 3], p)
            s = 0.0
            for c in range(3):
                q = min(max(_interpolate(p[0, c], xs[h, c], ys[h, c], n[h, c]), FLOOR), 1.0 - FLOOR)
                proba[r, h, c] = q
                s += q
            for c in range(3):
                proba[r, h, c] /= s
            magnitude[r, h] = scale[inst[r], h] * _interpolate(1.0 - p[0, 1], xs[h, 3], ys[h, 3], n[h, 3])


class Fusion:
    """The member. `columns`: names of its inputs in order (the last is the instrument's index); `knots`: calibration curves.

    `knots` holds xs, ys (H, 4, K) and n (H, 4): three curves raw probability -> probability, and one raw probability of
    a move -> |move| in units of `scale` (I, H), the instrument's mean |move| in ticks. `ids` of the instruments. `shap`
    (S, C, H): share of each column in the mean |SHAP value| of a slice of the training range; `slices` (S + 1,) their bounds, ns.
    """

    name = "fusion"
    alternative: ClassVar[altdata.Table | None] = None

    def __init__(
        self, names: tuple[str, ...], columns: tuple[str, ...], models: dict[int, dict[str, Any]], knots: tuple[F64, F64, I64], scale: F64,
        ids: tuple[str, ...] = (), table: altdata.Table | None = None, shap: tuple[F64, I64] | None = None,
    ) -> None:  # fmt: skip
        self.ids, self.table = ids, table if table is not None else self.alternative
        self.shap, self.slices = shap or (np.zeros((SLICES, len(columns), H)), np.zeros(SLICES + 1, np.int64))
        self._joined = ALTERNATIVE[0] in columns
        self.columns, self.models, self.knots, self.scale = columns, models, knots, scale
        place = {name: i for i, name in enumerate(names)}
        self._index = np.array([place.get(c, len(names)) for c in columns[:-1]], np.int64)
        self._known = np.array([h in models for h in range(H)])
        self.trees = read_trees(models)

    @staticmethod
    def gatherer(study_instruments: Any, names: Any) -> None:
        """Learns from the decision table alone."""
        return

    @classmethod
    def fit(cls, study: Study, gathered: None = None, config: Config | None = None) -> Self:
        """Boosters on the fit slice, their length and calibration on the later one; deterministic for `study.seed`."""
        import xgboost  # heavy, and only fitting needs it
        from sklearn.isotonic import IsotonicRegression

        config = config or Config()
        known = config.alternative if config.alternative is not None else cls.alternative
        columns = (*study.inputs, *(ALTERNATIVE if known is not None else ()), "instrument")
        ids = tuple(i.id for i in study.instruments)
        me = cls(study.names, columns, {}, _plain_knots(), np.ones((len(study.instruments), H)), ids, known)
        table = study.table
        curves: dict[tuple[int, int], tuple[F64, F64]] = {}
        rows_of: dict[int, I64] = {}
        for h in study.usable:
            rows = study.fit_rows(h)
            rows_of[h] = rows[:: max(1, -(-len(rows) // config.max_rows))]
            for k in range(len(me.scale)):
                mine = np.abs(table.move[rows_of[h][table.instrument[rows_of[h]] == k], h])
                me.scale[k, h] = mine.mean() if mine.any() else 1.0

        def boost(h: int) -> dict[str, Any]:
            rows = rows_of[h]
            data = xgboost.QuantileDMatrix(
                me.inputs(table.rows[rows], table.instrument[rows], table.ts[rows]), label=study.classes(h)[rows],
                max_bin=config.bins, nthread=1,
                weight=np.full(len(rows), study.independent(rows, h) / len(rows)),
            )  # fmt: skip
            later, check = study.calibration_rows(h), None
            if config.patience and len(later) >= LEAST_CALIBRATION:
                later = later[:: max(1, -(-len(later) // (config.max_rows // 2)))]
                x = me.inputs(table.rows[later], table.instrument[later], table.ts[later])
                check = xgboost.QuantileDMatrix(x, label=study.classes(h)[later], max_bin=config.bins, nthread=1, ref=data)
            booster = xgboost.train(
                {
                    "objective": "multi:softprob", "num_class": 3, "tree_method": "hist", "max_bin": config.bins, "max_depth": config.depth,
                    "eta": config.eta, "colsample_bytree": config.columns, "min_child_weight": config.child_weight, "lambda": config.l2,
                    "nthread": 1, "seed": study.seed, "verbosity": 0, "eval_metric": "mlogloss",
                },
                data, config.rounds, evals=[(check, "later")] if check else [], verbose_eval=False,
                callbacks=[xgboost.callback.EarlyStopping(rounds=config.patience, save_best=True)] if check else [],
            )  # fmt: skip
            return json.loads(bytes(booster.save_raw("json")))

        with ThreadPoolExecutor(config.threads) as pool:
            models = dict(zip(rows_of, pool.map(boost, rows_of)))
        raised = cls(study.names, columns, models, _plain_knots(), me.scale, ids, known)
        for h in study.usable:
            y, later = study.classes(h), study.calibration_rows(h)
            if len(later) < LEAST_CALIBRATION:
                continue
            raw, n = np.empty((len(later), 3)), study.independent(later, h)
            softmax(raised.scores(table.rows[later], table.instrument[later], table.ts[later])[:, 3 * h : 3 * h + 3], raw)
            iso = IsotonicRegression(out_of_bounds="clip")
            for c in range(3):
                iso.fit(raw[:, c], y[later] == c)
                xs = iso.X_thresholds_.astype(np.float64)
                curves[h, c] = xs, (n * iso.y_thresholds_ + config.identity * xs) / (n + config.identity)
            iso.fit(1 - raw[:, 1], np.abs(table.move[later, h]) / me.scale[table.instrument[later], h])
            curves[h, 3] = iso.X_thresholds_.astype(np.float64), iso.y_thresholds_.astype(np.float64)
        return cls(study.names, columns, models, _pack(curves), me.scale, ids, known, raised._explain(study))

    def _explain(self, study: Study) -> tuple[F64, I64]:
        """Mean |SHAP value| (Lundberg and Lee 2017; exact for trees) over classes and decisions, in slices of the range learnt from."""
        import xgboost

        t = study.table
        seen = np.flatnonzero((t.ts >= study.split.start) & (t.ts < study.split.weigh))
        parts = np.array_split(seen, SLICES)
        bounds = np.array([*(t.ts[p[0]] if len(p) else study.split.weigh for p in parts), study.split.weigh], np.int64)
        out = np.zeros((SLICES, len(self.columns), H))
        for h, model in self.models.items():
            booster = xgboost.Booster({"nthread": 1})
            booster.load_model(bytearray(json.dumps(model).encode()))
            for i, part in enumerate(parts):
                rows = part[:: max(1, -(-len(part) // EXPLAINED))]
                if len(rows):
                    x = xgboost.DMatrix(self.inputs(t.rows[rows], t.instrument[rows], t.ts[rows]), nthread=1)
                    out[i, :, h] = np.abs(booster.predict(x, pred_contribs=True))[:, :, :-1].mean(axis=(0, 1))
        return out / np.maximum(out.sum(axis=1, keepdims=True), 1e-300), bounds

    def inputs(self, rows: NDArray[np.floating[Any]], instrument: I64, ts: I64 | None = None) -> NDArray[np.float32]:
        """(m, C) float32 as the trees see them: absent columns and infinities are NaN; the last column is the instrument's index.

        `ts` (m,) ns: the times of the decisions, at which alternative data are looked up.
        """
        x = np.full((len(rows), len(self.columns)), np.nan, np.float32)
        there = self._index < rows.shape[1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # beyond float32 becomes infinite, then NaN
            x[:, :-1][:, there] = rows[:, self._index[there]]
        if self._joined and self.table is not None and ts is not None:
            first = self.columns.index(ALTERNATIVE[0])
            for k in np.unique(instrument):
                mine = np.flatnonzero(instrument == k)
                x[mine, first : first + len(ALTERNATIVE)] = np.concatenate(altdata.asof(self.table, self.ids[k], ts[mine]), axis=1)
        x[np.isinf(x)] = np.nan
        x[:, -1] = instrument
        return x

    def scores(self, rows: NDArray[np.floating[Any]], instrument: I64, ts: I64 | None = None) -> NDArray[np.float32]:
        """(m, 3 H) raw scores: XGBoost's `predict(output_margin=True)` of every horizon side by side."""
        out = np.empty((len(rows), 3 * H), np.float32)
        walk(self.inputs(rows, instrument, ts), *self.trees, out)
        return out

    def new_state(self) -> None:
        """Each decision stands alone: nothing is carried."""
        return

    def predict(self, block: Block, state: None = None) -> Votes:
        """Votes at each close; rows without a single known input abstain."""
        inst = block.events["instrument"][block.closes].astype(np.int64)
        m = len(block.closes)
        x = self.inputs(block.rows[block.closes], inst, block.events["ts_init"][block.closes])
        z = np.empty((m, 3 * H), np.float32)
        walk(x, *self.trees, z)
        votes = Votes(np.empty((m, H, 3)), np.empty((m, H)))
        _votes(z, x, inst, self._known, *self.knots, self.scale, votes.proba, votes.magnitude)
        return votes

    def importance(self) -> dict[str, list[float]]:
        """Gain by column: its share of the loss that the splits of each horizon took away; 0 where a horizon was left out."""
        gain = np.zeros((len(self.columns), H))
        for h, model in self.models.items():
            for tree in model["learner"]["gradient_booster"]["model"]["trees"]:
                inner = np.array(tree["left_children"]) != -1
                np.add.at(gain[:, h], np.array(tree["split_indices"])[inner], np.array(tree["loss_changes"])[inner])
        gain /= np.maximum(gain.sum(axis=0), 1e-300)
        return {name: [round(float(g), 6) for g in gain[i]] for i, name in enumerate(self.columns)}

    def leading(self, n: int = 5) -> list[str]:
        """Each horizon's `n` leading columns, in words: share of the gain, and share of SHAP in each slice of time."""
        gain, out = self.importance(), []
        for h in sorted(self.models):
            top = np.argsort(-self.shap[:, :, h].mean(axis=0), kind="stable")[:n]
            told = (f"{c} {gain[c][h]:.0%} ({' '.join(f'{v:.0%}' for v in self.shap[:, i, h])})" for i in top for c in (self.columns[i],))
            out.append(f"{LABELS[h]}: {', '.join(told)}")
        return out

    def save(self, folder: Path) -> None:
        for h, model in self.models.items():
            (folder / f"{self.name}-{HORIZONS_NS[h] // 1_000_000}ms.json").write_text(json.dumps(model, separators=(",", ":")))
        xs, ys, n = self.knots
        np.savez(
            folder / f"{self.name}.npz", columns=np.array(self.columns), xs=xs, ys=ys, n=n, scale=self.scale, shap=self.shap,
            slices=self.slices, ids=np.array(self.ids, np.str_),
        )  # fmt: skip

    @classmethod
    def load(cls, folder: Path, names: tuple[str, ...]) -> Self:
        files = {h: folder / f"{cls.name}-{ns // 1_000_000}ms.json" for h, ns in enumerate(HORIZONS_NS)}
        models = {h: json.loads(f.read_text()) for h, f in files.items() if f.exists()}
        with np.load(folder / f"{cls.name}.npz", allow_pickle=False) as z:
            columns = tuple(str(c) for c in z["columns"])
            ids, shap = tuple(str(i) for i in z["ids"]), (z["shap"], z["slices"])
            return cls(names, columns, models, (z["xs"], z["ys"], z["n"]), z["scale"], ids, shap=shap)


def _plain_knots() -> tuple[F64, F64, I64]:
    """Curves that change nothing; the expected move is the mean one."""
    line = np.tile(np.array([0.0, 1.0]), (H, 4, 1))
    ys = line.copy()
    ys[:, 3] = 1.0
    return line, ys, np.full((H, 4), 2, np.int64)


def _pack(curves: dict[tuple[int, int], tuple[F64, F64]]) -> tuple[F64, F64, I64]:
    xs, ys, n = _plain_knots()
    room = max([2, *(len(x) for x, _ in curves.values())])
    xs, ys = (np.pad(a, ((0, 0), (0, 0), (0, room - 2))) for a in (xs, ys))
    for (h, c), (x, y) in curves.items():
        n[h, c] = len(x)
        xs[h, c, : len(x)], ys[h, c, : len(x)] = x, y
    return xs, ys, n


