"""What any forecast has to beat: persistence, time of day, and logistic regression on the best bid and offer.

Takes a :class:`labels.Study`, gives :class:`Baselines`, fitted on the training range. A baseline that follows the chance of its sample is
beaten by anything that says less, also where there is nothing to find; so how far each is drawn towards class rates alone is chosen on
the calibration slice (as far as is not clearly worse), and class rates are drawn towards even odds of up and down.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from cift_models.labels import F64, I8, I64, H, Mask, Study, effective, last_known

DAY_PARTS: Final = 48
_DAY_NS: Final = 86_400_000_000_000
_TINY: Final = 1e-6
EVEN: Final = 100.0  # independent labels' worth of belief that an instrument's class rates are those of all, with up as likely as down
CELLS: Final = (10.0, 30.0, 100.0, 300.0, 1e9)  # the same that P(class | cell) are the class rates; the last says nothing of cells
RIDGE: Final = (1.0, 10.0, 100.0, 1_000.0, np.inf)  # precisions of a slope per independent label; the last has none
DOUBT: Final = 0.5  # 0 lets baselines follow chance, so that they can be beaten in null markets; 1 costs them what they know of real ones
ROWS: Final = 20_000  # that a logistic regression is fitted on, and a quarter of them where its ridge is chosen


def level1_columns() -> list[str]:
    """The shape of the book as far as a feed of best bid and offer tells it: what the logistic baseline looks at."""
    from cift_models.features import FEATURES

    return [f.name for f in FEATURES if f.group == "book shape" and f.needs == 1 and f.model_input]


class Baselines:
    """Three forecasts any model has to beat, each giving (n, 3) probabilities.

    `persistence` (I, H, 4, 3): P(class | newest known class, or none yet). `day` (I, 48, H, 3): P(class | half hour of the UTC
    day). `coef` (I, H, 3, F + 1): multinomial logistic regression on the standardised columns `columns`, which a level-1 feed has.
    """

    names = ("persistence", "time of day", "level-1 logistic")

    def __init__(self, columns: Sequence[str], persistence: F64, day: F64, coef: F64, centre: F64, scale: F64) -> None:
        self.columns = tuple(columns)
        self.persistence, self.day, self.coef, self.centre, self.scale = persistence, day, coef, centre, scale

    @classmethod
    def fit(cls, study: Study, columns: Sequence[str]) -> Self:
        """On everything up to the weight slice: the same rows that members learn and calibrate from."""
        t, n = study.table, len(study.instruments)
        place = [study.names.index(c) for c in columns]
        me = cls(columns, np.full((n, H, 4, 3), 1 / 3), np.full((n, DAY_PARTS, H, 3), 1 / 3), np.zeros((n, H, 3, len(place) + 1)),
                 np.zeros((n, len(place))), np.ones((n, len(place))))  # fmt: skip
        classes = [study.classes(h) for h in range(H)]
        known = [(classes[h] >= 0) & (t.ts < study.split.weigh) & (t.known_at[:, h] <= study.split.weigh) for h in range(H)]
        for k in range(n):
            mine = np.flatnonzero((t.instrument == k) & (t.ts < study.split.weigh))
            if not len(mine):
                continue
            ts = t.ts[mine]
            x = np.where(np.isfinite(t.rows[mine][:, place]), t.rows[mine][:, place], np.nan).astype(np.float64)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # columns that the feed does not have
                centre, scale = np.nanmean(x, axis=0), np.nanstd(x, axis=0)
            me.centre[k], me.scale[k] = np.nan_to_num(centre), np.where(np.nan_to_num(scale) > 1e-9, np.nan_to_num(scale), 1.0)
            z = me._inputs(x, np.full(len(x), k))
            for h in range(H):
                y, ok = classes[h][mine], known[h][mine]
                if not ok.any():
                    continue
                early = ok & (ts < study.split.calibrate) & (t.known_at[mine, h] <= study.split.calibrate)
                slices = early, ok & (ts >= study.split.calibrate)
                worth = effective(ts[ok], t.known_at[mine, h][ok]) / ok.sum()
                all_ = classes[h][known[h]]
                before = last_known(ts, t.known_at[mine, h], y)
                part = (ts % _DAY_NS) * DAY_PARTS // _DAY_NS
                me.persistence[k, h] = _cells(y, before + 1, 4, ok, slices, worth, all_)
                me.day[k, :, h] = _cells(y, part, DAY_PARTS, ok, slices, worth, all_)
                me.coef[k, h] = _logistic(z, y, ok, slices, worth, all_)
        return me

    def _inputs(self, x: F64, instrument: I64) -> F64:
        z = (x - self.centre[instrument]) / self.scale[instrument]
        return np.clip(np.nan_to_num(z, nan=0.0, posinf=5.0, neginf=-5.0), -5.0, 5.0)

    def predict(self, h: int, ts: I64, instrument: I64, before: I8, x: F64) -> dict[str, F64]:
        """Name -> (n, 3), for horizon `h`; `before` the newest known class (-1: none), `x` (n, F) the level-1 columns."""
        part = (ts % _DAY_NS) * DAY_PARTS // _DAY_NS
        z = self._inputs(x, instrument)
        score = np.einsum("nf,ncf->nc", z, self.coef[instrument, h, :, :-1]) + self.coef[instrument, h, :, -1]
        e = np.exp(score - score.max(axis=1, keepdims=True))
        return {
            "persistence": self.persistence[instrument, h, before.astype(np.int64) + 1],
            "time of day": self.day[instrument, part, h],
            "level-1 logistic": e / e.sum(axis=1, keepdims=True),
        }

    def only(self, rows: Sequence[int]) -> Baselines:
        """Those of some of the trained instruments, in another order."""
        return Baselines(self.columns, *(a[list(rows)] for a in (self.persistence, self.day, self.coef, self.centre, self.scale)))

    def save(self, folder: Path) -> None:
        np.savez(
            folder / "baselines.npz", columns=np.array(self.columns, dtype=np.str_), persistence=self.persistence, day=self.day,
            coef=self.coef, centre=self.centre, scale=self.scale,
        )  # fmt: skip

    @classmethod
    def load(cls, folder: Path) -> Self:
        with np.load(folder / "baselines.npz", allow_pickle=False) as z:
            return cls([str(c) for c in z["columns"]], z["persistence"], z["day"], z["coef"], z["centre"], z["scale"])


def _rates(y: I8, all_: I8, worth: float) -> F64:
    """Class rates (3,) of labels that count `worth` independent ones each, drawn towards those of `all_`, up as likely as down."""
    even = np.bincount(all_, minlength=3) + 1.0
    even[[0, 2]] = even[[0, 2]].mean()
    return np.asarray((worth * np.bincount(y, minlength=3) + EVEN * even / even.sum()) / (worth * len(y) + EVEN), np.float64)


def _choose(strengths: Sequence[float], losses: Sequence[F64], worth: float) -> float:
    """The greatest strength whose loss is within DOUBT standard errors of the least (as in Breiman et al. 1984, 3.4.3). `losses`: by
    strength, of the same decisions, each of which counts as `worth` an independent one."""
    best = min(losses, key=lambda x: float(x.mean()))
    for strength, loss in sorted(zip(strengths, losses), key=lambda x: -x[0]):
        d = loss - best
        if d.mean() <= DOUBT * d.std() / np.sqrt(max(1.0, worth * len(d))):
            return strength
    raise AssertionError("the least loss is as good as itself")


def _loss(p: F64, y: I8) -> F64:
    return -np.log(np.clip(p[np.arange(len(y)), y], _TINY, 1.0))


def _cells(
    y: I8, cell: NDArray[np.integer[Any]], n: int, ok: Mask, slices: tuple[Mask, Mask], worth: float, all_: I8
) -> F64:
    """P(class | cell) (n, 3), drawn towards the class rates as the later slice likes when the earlier one is learnt from."""

    def table(rows: Mask, strength: float) -> F64:
        count = np.zeros((n, 3))
        np.add.at(count, (cell[rows], y[rows]), worth)
        return (count + strength * _rates(y[rows], all_, worth)) / (count.sum(axis=1, keepdims=True) + strength)

    early, late = slices
    if not early.any() or not late.any():
        return table(ok, CELLS[2])
    return table(ok, _choose(CELLS, [_loss(table(early, s)[cell[late]], y[late]) for s in CELLS], worth))


def _logistic(z: F64, y: I8, ok: Mask, slices: tuple[Mask, Mask], worth: float, all_: I8) -> F64:
    """Coefficients (3, F + 1) of multinomial logistic regression, the bias last; the ridge is chosen as in :func:`_cells`."""
    from sklearn.linear_model import LogisticRegression

    def fitted(rows: Mask, ridge: float, most: int) -> F64:
        rates = _rates(y[rows], all_, worth)
        out = np.zeros((3, z.shape[1] + 1))
        out[:, -1] = np.log(rates)
        some = np.flatnonzero(rows)[:: max(1, -(-int(rows.sum()) // most))]
        if len(np.unique(y[some])) < 2 or not z.shape[1] or ridge == np.inf:
            return out
        weight = worth * rows.sum() / len(some)
        model = LogisticRegression(C=weight / ridge, max_iter=200).fit(z[some], y[some])
        coef, bias = model.coef_, model.intercept_
        if len(model.classes_) == 2:
            coef, bias = np.stack([-coef[0] / 2, coef[0] / 2]), np.array([-bias[0] / 2, bias[0] / 2])
        plain = np.bincount(y[some], minlength=3)[model.classes_] / len(some)
        out[model.classes_, :-1] = coef
        out[model.classes_, -1] = bias + np.log(rates[model.classes_]) - np.log(plain)  # from the sample's rates to the drawn ones
        gone = np.setdiff1d(np.arange(3), model.classes_)
        out[gone, -1] = np.log(_TINY) + out[model.classes_, -1].max()
        return out

    def odds(coef: F64, x: F64) -> F64:
        s = x @ coef[:, :-1].T + coef[:, -1]
        e = np.exp(s - s.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    early, late = slices
    if not early.any() or not late.any():
        return fitted(ok, RIDGE[2], ROWS)
    losses = [_loss(odds(fitted(early, r, ROWS // 4), z[late]), y[late]) for r in RIDGE]
    return fitted(ok, _choose(RIDGE, losses, worth), ROWS)
