"""Fusion: gradient-boosted trees over everything that is known about the decision, one booster for each horizon.

XGBoost (Chen and Guestrin 2016) fits; isotonic regression (Zadrozny and Elkan 2002) calibrates on a later slice; our own walk over
the trees predicts, equal to XGBoost to the last float32 bit, at a fraction of its cost for one row. Takes the model-input columns of
decision rows (any further named column joins by name) and, where alternative data are given (:class:`catalog.asof.Lookup`), the values and
ages of the 27 features as of the time they were known; gives class probabilities and the expected size of the move. Missing values are
NaN and the trees cope; so does a feed that lacks whole columns. A column that went up and down only a few times in the fit slice is left
out, an age with its value: from so few independent values trees would learn the clock of that slice.

An artifact names its columns and does not hold the data: without them, or past their end, the columns are NaN or what was known last.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray
from pydantic import Field

from catalog import altdata
from catalog.asof import Lookup
from cift_models.labels import F64, I64, LABELS, H, Study
from cift_models.trees import interpolate, read_trees, softmax, walk
from cift_models.windows import HORIZONS_NS, Block, Votes

LEAST_CALIBRATION = 200  # labels; with fewer, scores stay as they are
ALTERNATIVE = tuple(f"alt_{n}" for n in altdata.NAMES)  # columns of values; those of their ages, seconds, end in AGE
AGE = "_age"
TRAVELS, LEAST_TRAVELS = 10, 30  # that a column has to make in the fit slice, on average of the instruments and over all of them
BLENDS, PARTS = (0.0, 0.25, 0.5, 0.75, 1.0), 4  # shares of the isotonic curve that are tried, and parts of time that try them
CURVES = 200.0  # curves from n independent labels count n / (n + CURVES) at most: a short slice has class shares of its own
SLICES, EXPLAINED = 4, 250  # slices of time over which SHAP values are taken, and decisions of each
FLOOR = 1e-3  # no calibrated probability is nearer to 0 or 1


@dataclass(frozen=True, slots=True)
class Config:
    rounds: int = 100  # at most; x 3 classes x 4 horizons = 1,200 trees
    patience: Annotated[int, Field(ge=0)] = 20  # stops where the calibration slice gained nothing for so long, keeps the best; 0: all
    depth: int = 4
    eta: float = 0.1
    bins: int = 64
    columns: float = 0.5  # share of the columns that a tree sees
    child_weight: float = 5.0  # in independent labels: rows weigh what their overlapping labels are worth
    l2: float = 5.0
    max_rows: int = 40_000  # a horizon learns from no more; overlapping labels add little
    threads: int = 2  # horizons fitted at once, each on one core: boosters that share cores wait for one another


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
                q = min(max(interpolate(p[0, c], xs[h, c], ys[h, c], n[h, c]), FLOOR), 1.0 - FLOOR)
                proba[r, h, c] = q
                s += q
            for c in range(3):
                proba[r, h, c] /= s
            magnitude[r, h] = scale[inst[r], h] * interpolate(1.0 - p[0, 1], xs[h, 3], ys[h, 3], n[h, 3])


class Fusion:
    """The member. `columns`: names of its inputs in order (the last is the instrument's index); `knots`: calibration curves.

    `knots` holds xs, ys (H, 4, K) and n (H, 4): three curves raw probability -> probability, and one raw probability of
    a move -> |move| in units of `scale` (I, H), the instrument's mean |move| in ticks. `ids` of the instruments. `shap`
    (S, C, H): share of each column in the mean |SHAP value| of a slice of the training range; `slices` (S + 1,) their bounds, ns.
    """

    name = "fusion"

    def __init__(
        self, names: tuple[str, ...], columns: tuple[str, ...], models: dict[int, dict[str, Any]], knots: tuple[F64, F64, I64], scale: F64,
        ids: tuple[str, ...] = (), known: Lookup | None = None, shap: tuple[F64, I64] | None = None,
    ) -> None:  # fmt: skip
        self.ids = ids
        self.shap, self.slices = shap or (np.zeros((SLICES, len(columns), H)), np.zeros(SLICES + 1, np.int64))
        bare = [c.removesuffix(AGE) for c in columns]
        self.alternative = np.array([k for k, c in enumerate(ALTERNATIVE) if c in bare], np.int64)  # which of the 27
        at = {ALTERNATIVE[k]: j for j, k in enumerate(self.alternative)}
        joined = [(i, at[b], b != c) for i, (b, c) in enumerate(zip(bare, columns)) if b in at]
        self._values, self._ages = (np.array([j[:2] for j in joined if j[2] == age], np.int64).reshape(-1, 2).T for age in (False, True))
        self.join(known)
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

        config, known, table = config or Config(), study.altdata, study.table
        columns = (*study.inputs, *ALTERNATIVE, *(c + AGE for c in ALTERNATIVE), "instrument")
        ids, scale = tuple(i.id for i in study.instruments), np.ones((len(study.instruments), H))
        me = cls(study.names, columns, {}, _plain_knots(), scale, ids, known)
        rows = np.flatnonzero((table.ts >= study.split.start) & (table.ts < study.split.calibrate))
        rows = rows[:: max(1, -(-len(rows) // config.max_rows))]
        moves = travels(me.inputs(table.rows[rows], table.instrument[rows], table.ts[rows])[:, :-1], table.instrument[rows], len(ids))
        learnable = (moves.mean(axis=0) >= TRAVELS) & (moves.sum(axis=0) >= LEAST_TRAVELS)
        good = {c for c, use in zip(columns, learnable) if use}
        columns = (*([c for c in columns if c in good and c.removesuffix(AGE) in good] or study.inputs), "instrument")
        me = cls(study.names, columns, {}, _plain_knots(), scale, ids, known)
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
            raw = np.empty((len(later), 3))
            softmax(raised.scores(table.rows[later], table.instrument[later], table.ts[later])[:, 3 * h : 3 * h + 3], raw)
            n = study.independent(later, h)
            blend = n / (n + CURVES) * _blend(raw, y[later], table.ts[later], table.known_at[later, h])
            iso = IsotonicRegression(out_of_bounds="clip")
            for c in range(3):
                iso.fit(raw[:, c], y[later] == c)
                xs = iso.X_thresholds_.astype(np.float64)
                curves[h, c] = xs, blend * iso.y_thresholds_ + (1 - blend) * xs
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
        with np.errstate(over="ignore"):  # beyond float32 becomes infinite, then NaN
            x[:, :-1][:, there] = rows[:, self._index[there]]
        if self.known is not None and ts is not None:
            for found, (place, which) in zip(self.known.at(instrument, ts, self.alternative), (self._values, self._ages)):
                x[:, place] = found[:, which]
        x[np.isinf(x)] = np.nan
        x[:, -1] = instrument
        return x

    def scores(self, rows: NDArray[np.floating[Any]], instrument: I64, ts: I64 | None = None) -> NDArray[np.float32]:
        """(m, 3 H) raw scores: XGBoost's `predict(output_margin=True)` of every horizon side by side."""
        out = np.empty((len(rows), 3 * H), np.float32)
        walk(self.inputs(rows, instrument, ts), *self.trees, out)
        return out

    def join(self, known: Lookup | None) -> None:
        """Look alternative data up in `known` from now on; None: they are missing."""
        if known is not None and known.ids != self.ids:
            known = known.of(self.ids)
        self.known = known if len(self.alternative) else None

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

    def shares(self, least: int = 8) -> dict[str, list[dict[str, Any]]]:
        """Per horizon, by mean |SHAP|: the leading columns and all alternative data, with their share of the gain and, over time, of SHAP.

        A column of alternative data stands for its value and its age.
        """
        gain, out = np.array(list(self.importance().values())), {}
        for h in sorted(self.models):
            g, s = gain[:, h].copy(), self.shap[:, :, h].copy()
            for age, which in self._ages.T:
                for value in self._values[0, self._values[1] == which]:
                    g[value], s[:, value] = g[value] + g[age], s[:, value] + s[:, age]
                    g[age] = -1.0
            order = [int(c) for c in np.argsort(-s.mean(axis=0), kind="stable") if g[c] >= 0]
            kept = [c for k, c in enumerate(order) if k < least or self.columns[c].removesuffix(AGE) in ALTERNATIVE]
            out[LABELS[h]] = [{"column": self.columns[c], "gain": float(g[c]), "shap": s[:, c].tolist()} for c in kept]
        return out

    def leading(self, n: int = 5) -> list[str]:
        """Each horizon's `n` leading columns and all alternative data, in words: share of the gain, and of SHAP in each slice of time."""
        out = []
        for label, columns in self.shares(n).items():
            told = [f"{c['column']} {c['gain']:.0%} ({' '.join(f'{v:.0%}' for v in c['shap'])})" for c in columns]
            out.append(f"{label}: {', '.join(told)}")
        return out

    def report(self) -> list[str]:
        """What the trees look at, in words, and which alternative data they use."""
        used = [c.removeprefix("alt_") for c in self.columns if c in ALTERNATIVE]
        head = f"looks at (share of the gain; share of SHAP in {SLICES} slices of the training range)"
        return [head, *self.leading(), f"{len(used)} of the {len(ALTERNATIVE)} alternative features{': ' * bool(used)}{', '.join(used)}"]

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


def travels(x: NDArray[np.floating[Any]], instrument: I64, instruments: int) -> I64:
    """How often each column of `x` (m, C), in order of time, went from its lower to its upper quartile or back, by instrument (I, C).

    Missing values are passed over. Where both quartiles are the same value, from it or below to above it, or back.
    """
    out = np.zeros((instruments, x.shape[1]), np.int64)
    for k in range(instruments):
        mine = x[instrument == k]
        for c in range(x.shape[1]):
            v = mine[:, c][np.isfinite(mine[:, c])]
            if len(v) > 1:
                low, high = np.quantile(v, (0.25, 0.75))
                side = np.where(v >= high, 1, np.where(v <= low, -1, 0)) if high > low else np.where(v > high, 1, -1)
                out[k, c] = np.count_nonzero(np.diff(side[side != 0]))
    return out


def _blend(raw: F64, y: NDArray[np.int8], ts: I64, known_at: I64) -> float:
    """The share of the isotonic curves that serves best where they were not fitted: each part of the slice by those of the others."""
    from sklearn.isotonic import IsotonicRegression

    loss = np.zeros(len(BLENDS))
    for part in np.array_split(np.arange(len(y)), PARTS):
        others = (known_at <= ts[part[0]]) | (ts >= known_at[part].max())
        if len(part) < LEAST_CALIBRATION // PARTS or np.count_nonzero(others) < LEAST_CALIBRATION:
            return 0.0
        iso = IsotonicRegression(out_of_bounds="clip")
        curve = np.stack([iso.fit(raw[others, c], y[others] == c).predict(raw[part, c]) for c in range(3)], axis=1)
        for b, share in enumerate(BLENDS):
            p = np.clip(share * curve + (1 - share) * raw[part], FLOOR, 1 - FLOOR)
            loss[b] -= np.log(p[np.arange(len(part)), y[part]] / p.sum(axis=1)).sum()
    return BLENDS[int(np.argmin(loss))]


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


