"""The plain rule that the ensemble is measured against: follow order flow imbalance when it is large.

Which imbalance (of the book's flow or of trades, over which memory), what is large and for how long to hold is what did best in the
training range. Traded by the same strategy through the same execution, costs and all: what the models add is the difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from catalog.events import Instrument
from cift_models.features import NAMES
from cift_models.labels import Labeller, Thinned, effective
from cift_models.windows import HORIZONS_NS, Block
from cift_strategies.inference_actor import Delay
from cift_strategies.messages import FeatureVector, Prediction

INPUTS: Final = ("ofi_fast", "ofi_1", "ofi_events", "ofi_slow", "trade_imbalance_1s", "trade_imbalance_8s", "trade_imbalance_64s")
KEPT: Final = 200_000  # decisions that the rule is fitted on; more are thinned evenly
COVER: Final = (0.2, 0.1, 0.05, 0.02, 0.01)  # shares of decisions at which it may act
LEAST: Final = 15  # labels that do not overlap


@dataclass(frozen=True, slots=True)
class OfiRule:
    """For one instrument: go along with `input` when its size exceeds `threshold`, for horizon number `horizon`.

    What came of it in the training range: `proba`, the shares of moves against, none and along; `magnitude`, the mean |move|;
    `expected`, the mean move along (ticks); `net`, the same less spread and fees; `labels` that do not overlap. Without a rule
    (nothing could be learnt) the threshold is infinite.
    """

    input: str = INPUTS[0]
    horizon: int = 0
    threshold: float = np.inf
    proba: tuple[float, float, float] = (np.nan, np.nan, np.nan)
    magnitude: float = np.nan
    expected: float = np.nan
    net: float = np.nan
    labels: int = 0

    def told(self) -> dict[str, Any]:
        """As a summary shows it."""
        return asdict(self) | {"horizon": HORIZONS_NS[self.horizon] / 1e9}


def fit(instruments: Sequence[Instrument], blocks: Iterable[Block], costs: Sequence[float]) -> list[OfiRule]:
    """A rule per instrument from the training blocks: of all inputs, thresholds (at `COVER`) and horizons the one whose moves paid
    best for the spread and `costs` (I,) (ticks, fees of both ways), in t statistic over labels that do not overlap."""
    columns, spread, mid = [NAMES.index(c) for c in INPUTS], NAMES.index("spread"), NAMES.index("mid")
    labeller = Labeller(instruments, HORIZONS_NS, ())
    held = Thinned(len(instruments), len(HORIZONS_NS), KEPT, x=((len(columns),), np.float64), spread=((), np.float64))
    for block in blocks:
        rows, at = block.rows[block.closes], block.events[block.closes]
        outcomes = labeller.push(block.events, np.ascontiguousarray(block.rows[:, mid]), block.closes)
        held.push(at["ts_init"], at["instrument"].astype(np.int64), outcomes, x=rows[:, columns], spread=rows[:, spread])
    held.learn(labeller.finish())
    z = held.result()
    return [_fit_one({n: a[z["instrument"] == k] for n, a in z.items()}, costs[k]) for k in range(len(instruments))]


def _fit_one(z: dict[str, NDArray[Any]], cost: float) -> OfiRule:
    best, found = -np.inf, OfiRule()
    for c, name in enumerate(INPUTS):
        x = z["x"][:, c]
        size = np.abs(x[np.isfinite(x)])
        for threshold in np.quantile(size, [1 - c for c in COVER]) if len(size) else ():
            for h in range(len(HORIZONS_NS)):
                acted = (np.abs(x) > threshold) & np.isfinite(z["move"][:, h]) & np.isfinite(z["spread"])
                n = effective(z["ts"][acted], z["known_at"][acted, h]) if acted.any() else 0
                if n < LEAST:
                    continue
                along = np.sign(x[acted]) * z["move"][acted, h]
                net = along - z["spread"][acted] - cost
                t = float(net.mean() / (net.std() + 1e-9) * np.sqrt(n))
                if t > best:
                    best, found = t, _rule(name, h, float(threshold), along, float(net.mean()), n)
    return found


def _rule(name: str, h: int, threshold: float, along: NDArray[np.float64], net: float, n: int) -> OfiRule:
    mean, absolute, flat = float(along.mean()), float(np.abs(along).mean()), float((along == 0).mean())
    lead = mean / absolute if absolute else 0.0
    proba = ((1 - flat) * (1 - lead) / 2, flat, (1 - flat) * (1 + lead) / 2)
    return OfiRule(name, h, threshold, proba, absolute, mean, net, n)


class RulePredictor:
    """Answers each closed batch from its own feature row; there are no members to vote."""

    def __init__(self, rules: Sequence[OfiRule], delay: Delay) -> None:
        self._rules, self._delay = rules, delay
        horizons = len(HORIZONS_NS)
        self._columns = [NAMES.index(r.input) for r in rules]
        self._votes = np.full((0, horizons, 3), np.nan, np.float32)
        self._answers = [{side: _answer(r, side, horizons) for side in (-1, 0, 1)} for r in rules]

    def predict(self, vector: FeatureVector) -> Iterable[Prediction]:
        found = []
        k = vector.instrument
        for i in vector.closes:
            ts, x = int(vector.events["ts_init"][i]), vector.rows[i, self._columns[k]]
            wait = int(self._delay.draw(np.array([ts]), np.array([k]))[0])
            side = 0 if not abs(x) > self._rules[k].threshold else (1 if x > 0 else -1)
            proba, magnitude, confidence, direction = self._answers[k][side]
            found.append(Prediction(k, ts, wait, HORIZONS_NS, proba, magnitude, confidence, direction, -1, self._votes, "rule"))
        return found


def _answer(rule: OfiRule, side: int, horizons: int) -> tuple[Any, Any, Any, tuple[int, ...]]:
    proba, magnitude = np.full((horizons, 3), np.nan), np.full(horizons, np.nan)
    if side:
        proba[rule.horizon], magnitude[rule.horizon] = rule.proba[::side], rule.magnitude
    return proba, magnitude, proba.max(axis=1), tuple(side if h == rule.horizon else 0 for h in range(horizons))
