"""The meta-model: weighs the members' votes by regime, learns the weights online, decides, and says what it would do.

The only file that names all five members. Takes votes at decisions and outcomes as they become known, gives one forecast, a direction or
an abstention, and a :class:`Recommendation`. Two forecasts are made of the votes: their mixture, whose weights are Hedge on the log-loss
with fixed share (Herbster and Warmuth 1998) and sleeping experts (Freund, Schapire, Singer, Warmuth 1997), so that it stays close to the
best member whatever comes, and a log-linear pool fitted on the past (`pooling.py`), which can be better than all of them. A third is that
pool with bolder log-odds: each member is drawn towards class rates by how little it has seen, and together they are too careful. A second
Hedge of the three is the ensemble. A member that has nothing to say neither counts nor pays. Whichever members are there take part; so does
one of the user's own, named "package.module:Class".

A member is any class with (no base class; see `fusion.py` and `hmm.py`):

    name: str                                          its name in artifacts and reports
    gatherer(instruments, names) -> object | None      static; `.push(block)` sees the training stream block by block
    fit(study, gathered) -> member                     classmethod; `study`: labels.Study; `gathered`: that object; InputError: left out
    new_state() -> state                               what a stream carries; deep-copyable
    predict(block, state) -> windows.Votes             state advanced in place; the same numbers however the stream is cut into blocks
    save(folder), load(folder, names) -> member        files begin with its name; nothing is pickled
    regimes(state) -> (m, 5)                           optional: P(regime) at the closes predicted last
    proven: (H,) bool                                  optional: where its votes showed skill; elsewhere it begins with hardly any weight
    seeded = False                                     optional: its fit depends on no seed, and is done once
    report() -> list[str]                              optional: what was learnt, in words, for `inspect`
    join(known)                                        optional: take alternative data (asof.Lookup of the trained instruments, or None)
    fit(study, gathered, start=old)                    optional: go on from an earlier fit of the same instruments, when retrained
    to(device)                                         optional: serve on "cpu" or "cuda" from now on

A `Config` (frozen dataclass or pydantic model) in the member's module is what a user may set of it, see `settings.py`: `fit`, and
`gatherer` where it takes one, get it as `config`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from catalog.errors import InputError
from catalog.events import Instrument
from cift_models.hmm import POSITION, REGIMES
from cift_models.labels import F64, I8, I64, H, Outcomes, Study
from cift_models.pooling import BOTH, SOFT, Pool, blended, pooled, settle, sharpened
from cift_models.windows import Block, Votes

MEMBERS: Final[Mapping[str, str]] = {
    "hawkes": "cift_models.hawkes:Hawkes",
    "transformer": "cift_models.transformer:Transformer",
    "hmm": "cift_models.hmm:Hmm",
    "gnn": "cift_models.gnn:Gnn",
    "fusion": "cift_models.fusion:Fusion",
}
R: Final = len(REGIMES)
UNPROVEN: Final = 0.01  # of an even share: what a member begins with where it says itself that its votes have shown nothing


class Member(Protocol):
    name: str

    @staticmethod
    def gatherer(instruments: Sequence[Instrument], names: Sequence[str]) -> Any: ...
    @classmethod
    def fit(cls, study: Study, gathered: Any) -> Self: ...
    def new_state(self) -> Any: ...
    def predict(self, block: Block, state: Any) -> Votes: ...
    def save(self, folder: Path) -> None: ...
    @classmethod
    def load(cls, folder: Path, names: Sequence[str]) -> Self: ...


def member_class(path: str) -> type[Member]:
    """The class at "package.module:Class". Raises InputError where there is none."""
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise InputError(f"no ensemble member at {path!r} ({e}): name it package.module:Class, importable from here") from None
    missing = [a for a in ("name", "gatherer", "fit", "new_state", "predict", "save", "load") if not hasattr(found, a)]
    if missing:
        raise InputError(f"{path!r} is no ensemble member, it lacks {', '.join(missing)}: see the list in cift_models/ensemble.py")
    return found


def available() -> dict[str, str]:
    """Name -> path of the members of this project that are there."""
    return {name: path for name, path in MEMBERS.items() if importlib.util.find_spec(path.partition(":")[0])}


def roster(names: Sequence[str]) -> tuple[str, ...]:
    """The order in which votes stand: the five, there or not, then the user's own."""
    return (*MEMBERS, *(n for n in names if n not in MEMBERS))


@dataclass(frozen=True, slots=True)
class Config:
    """`agree`: at least 3 of 5 members tilt the same way, and more than tilt against; with n votes present round(3 n / 5), at least 1."""

    agree: float = 0.6
    tilt: float = 0.02  # a member sides with a direction when its probability leads the other's by this
    share: float = 1e-3  # fixed share: how much of the awake members' weight is dealt out evenly for each independent label
    least_cover: float = 0.005  # the confidence threshold lets through this share of decisions or more
    stop: float = 1.0  # stop-loss distance, in expected |moves|
    kelly: float = 0.5  # share of the Kelly fraction


class Recommendation(NamedTuple):
    """What to do about one decision. Distances in ticks from the mid. `direction` 0: nothing, and why stands in `reason`."""

    direction: int
    horizon: int
    magnitude: float  # expected |move|
    size: float  # share of the full position, in [0, 1]
    stop: float
    target: float
    risk_reward: float  # (target - cost) / (stop + cost)
    reason: str


@njit(cache=True, nogil=True)
def _learn(p, regime, h, y, eta, share, w, mix_then, loss, member_loss, awake_rounds, rounds):  # type: ignore[no-untyped-def]
    """One Hedge update of w (N,) from votes p (N, 3) of a decision in `regime` and its class y; returns what the mixture gave y."""
    n, total, mixed, powered, awake = len(w), 0.0, 0.0, 0.0, 0
    for a in range(n):
        if p[a, 0] == p[a, 0]:
            total += w[a]
            awake += 1
    if awake == 0 or not total > 0:
        return np.nan
    for a in range(n):
        if p[a, 0] == p[a, 0]:
            mixed += w[a] / total * p[a, y]
            powered += w[a] / total * p[a, y] ** eta
    loss[regime, h, 0] -= np.log(mixed)
    loss[regime, h, 1] -= np.log(mix_then)
    rounds[regime, h] += 1
    for a in range(n):
        if p[a, 0] == p[a, 0]:
            member_loss[regime, h, a, 0] -= np.log(p[a, y])
            member_loss[regime, h, a, 1] -= np.log(mixed)
            awake_rounds[regime, h, a] += 1
            w[a] = (1 - share) * w[a] * p[a, y] ** eta / powered + share * total / awake
    return mixed


@njit(cache=True, nogil=True)
def _decide(  # type: ignore[no-untyped-def]
    closes, inst, mids, regimes, votes, sizes, o_inst, o_serial, o_label, o_move, o_at, serial0, threshold, confident, trust, eta, needs,
    tilt, share, learn_from, ts, pool_weight, pool_bias, pool_rate, weights, between, loss, both_loss, member_loss, awake_rounds, rounds,
    r_votes, r_mix, r_pool, r_regime, r_ts, proba, magnitude, confidence, direction,
):  # fmt: skip
    """Outcomes and decisions of one block in the order of the stream. Shapes: votes (m, N, H, 3), weights (R + 1, H, N)."""
    n, n_h, room, o, given, sharp = votes.shape[1], votes.shape[2], r_ts.shape[1], 0, np.empty(len(BOTH)), np.empty(3)
    for c in range(len(closes) + 1):
        while o < len(o_at) and (c == len(closes) or o_at[o] <= closes[c]):
            k, h, s = o_inst[o], o_label[o], o_serial[o] % room
            if h < n_h and o_move[o] == o_move[o] and r_ts[k, s] >= learn_from:
                y = 1 + (1 if o_move[o] > threshold[k, h] else 0) - (1 if o_move[o] < -threshold[k, h] else 0)
                r = r_regime[k, s]
                if r_mix[k, s, h, y] == r_mix[k, s, h, y]:
                    given[0] = _learn(
                        r_votes[k, s, :, h], r, h, y, eta[h], share * eta[h], weights[r, h], r_mix[k, s, h, y], loss, member_loss,
                        awake_rounds, rounds,
                    )  # fmt: skip
                    given[1] = r_pool[k, s, h, y]
                    if given[0] == given[0] and given[1] == given[1]:
                        sharpened(r_pool[k, s, h], pool_rate[k, h], sharp)
                        given[2] = sharp[y]
                        for b in range(len(BOTH)):
                            both_loss[r, h, 1 + b] -= np.log(given[b])
                        both_loss[r, h, 0] += settle(between[r, h], given, eta[h], share * eta[h])
            o += 1
        if c == len(closes):
            break
        k, r = inst[c], regimes[c]
        s = serial0[k] % room
        serial0[k] += 1
        r_ts[k, s], r_regime[k, s] = ts[c], r
        for h in range(n_h):
            total, size, sized, awake = 0.0, 0.0, 0.0, 0
            for a in range(n):
                for y in range(3):
                    votes[c, a, h, y] = (votes[c, a, h, y] + SOFT) / (1 + 3 * SOFT)
                    r_votes[k, s, a, h, y] = votes[c, a, h, y]
                if votes[c, a, h, 0] == votes[c, a, h, 0]:
                    total += weights[r, h, a]
                    awake += 1
                    if sizes[c, a, h] == sizes[c, a, h]:
                        sized += weights[r, h, a]
                        size += weights[r, h, a] * sizes[c, a, h]
            magnitude[c, h] = trust[h] * size / sized if sized > 0 else np.nan
            direction[c, h] = 0
            for y in range(3):
                p = 0.0
                for a in range(n):
                    if votes[c, a, h, 0] == votes[c, a, h, 0]:
                        p += weights[r, h, a] * votes[c, a, h, y]
                proba[c, h, y] = p / total if awake > 0 and total > 0 else np.nan
                r_mix[k, s, h, y], r_pool[k, s, h, y] = proba[c, h, y], np.nan
            if len(pool_rate) > 0:
                pooled(votes[c, :, h], pool_weight[r, h], pool_bias[h], pool_rate[k, h], r_pool[k, s, h])
                if r_pool[k, s, h, 0] == r_pool[k, s, h, 0] and proba[c, h, 0] == proba[c, h, 0]:
                    blended(between[r, h], r_mix[k, s, h], r_pool[k, s, h], pool_rate[k, h], sharp, proba[c, h])
            if proba[c, h, 0] != proba[c, h, 0]:
                confidence[c, h] = np.nan
                continue
            d = 1 if proba[c, h, 2] >= proba[c, h, 0] else -1
            confidence[c, h] = proba[c, h, 1 + d]
            for_, against = 0, 0
            for a in range(n):
                lead = votes[c, a, h, 1 + d] - votes[c, a, h, 1 - d]
                for_ += 1 if lead > tilt else 0
                against += 1 if lead < -tilt else 0
            if confidence[c, h] >= confident[h] and for_ >= needs[awake] and for_ > against and mids[c] == mids[c]:
                direction[c, h] = d


@dataclass(slots=True)
class Learned:
    """What the ensemble carries along a stream: weights (R + 1, H, N), the last row for an unknown regime, and the account of its losses.

    `between` (R + 1, H, B): weights of the forecasts in :data:`pooling.BOTH`. `loss` (R + 1, H, 2): of the mixture with the weights at the
    time the outcome arrives, and with those at the decision. `both_loss` (R + 1, H, 1 + B): of all of these together and of each, where all
    were there. `member_loss` (R + 1, H, N, 2): of each member over the rounds in which it was awake, and of the mixture over the same.
    """

    weights: F64
    between: F64
    loss: F64
    both_loss: F64
    member_loss: F64
    awake: I64
    rounds: I64
    serial: I64
    ring: tuple[F64, F64, F64, I64, I64] = field(repr=False)  # votes, mixture, pool, regime, ts of decisions with outcomes to come


class Ensemble:
    """Fitted part: `threshold` (I, H) ticks, `weights` (R + 1, H, N), `confident` (H,) least confidence, `eta` (H,) learning rates <= 1.

    `trust` (H,) in [0, 1] scales the expected |move| by how much of the expected signed move has come true (:func:`trust_in`). `pool`:
    None before it is fitted; `between` (R + 1, H, B) the weights of the forecasts in :data:`pooling.BOTH`.
    """

    def __init__(
        self, names: Sequence[str], threshold: F64, weights: F64, confident: F64, eta: F64, config: Config | None = None,
        trust: F64 | None = None, pool: Pool | None = None, between: F64 | None = None,
    ) -> None:  # fmt: skip
        self.names, self.config, self.pool = tuple(names), config or Config(), pool
        self.between = np.full((R + 1, H, len(BOTH)), 1 / len(BOTH)) if between is None else between
        self.trust = np.ones(H) if trust is None else trust
        self.threshold, self.weights, self.confident, self.eta = threshold, weights, confident, eta
        n = len(self.names)
        self.needs = np.array([0] + [max(1, int(self.config.agree * k + 0.5)) for k in range(1, n + 1)], np.int64)

    @classmethod
    def even(cls, names: Sequence[str], threshold: F64, eta: F64, config: Config | None = None, members: Sequence[Any] = ()) -> Self:
        """Before anything was learnt: even weights but for those of `members` that are not `proven`; everything is confident enough."""
        first = np.ones((H, len(names)))
        for member in members:
            if (proven := getattr(member, "proven", None)) is not None:
                first[~proven, list(names).index(member.name)] = UNPROVEN
        first /= first.sum(axis=1, keepdims=True)
        return cls(names, threshold, np.tile(first, (R + 1, 1, 1)), np.zeros(H), eta, config)

    def new_state(self, room: int = 1024) -> Learned:
        i, n, b = len(self.threshold), len(self.names), len(BOTH)
        return Learned(
            self.weights.copy(), self.between.copy(), np.zeros((R + 1, H, 2)), np.zeros((R + 1, H, 1 + b)), np.zeros((R + 1, H, n, 2)),
            np.zeros((R + 1, H, n), np.int64), np.zeros((R + 1, H), np.int64), np.zeros(i, np.int64), self._ring(room),
        )  # fmt: skip

    def _ring(self, room: int) -> tuple[F64, F64, F64, I64, I64]:
        i, n = len(self.threshold), len(self.names)
        none = np.zeros((2, i, room), np.int64)
        return np.zeros((i, room, n, H, 3)), np.full((i, room, H, 3), np.nan), np.full((i, room, H, 3), np.nan), none[0], none[1]

    def decide(
        self, ts: I64, instrument: I64, mid: F64, closes: I64, votes: F64, sizes: F64, regimes: I64, outcomes: Outcomes, room: int,
        learned: Learned, learn_from: int = 0,
    ) -> tuple[F64, F64, F64, I8]:  # fmt: skip
        """Learn from `outcomes` and decide, interleaved as in the stream; `learned` advances in place.

        `ts`, `instrument`, `mid`, `regimes` (m,) at the `closes`; `votes` (m, N, H, 3), softened in place; `sizes` (m, N, H) ticks;
        `room` the labeller's. Votes on decisions before `learn_from` (ns) teach nothing: they were given in sample.
        Returns proba (m, H, 3), magnitude (m, H), confidence (m, H), direction (m, H).
        """
        if room > learned.ring[1].shape[1]:
            old, new = learned.ring, self._ring(room)
            for k, end in enumerate(learned.serial):
                kept = np.arange(max(0, end - old[1].shape[1]), end)
                for a, b in zip(old, new):
                    b[k, kept % room] = a[k, kept % a.shape[1]]
            learned.ring = new
        m = len(closes)
        out = (np.empty((m, H, 3)), np.empty((m, H)), np.empty((m, H)), np.zeros((m, H), np.int8))
        o, pool = outcomes, self.pool or Pool(np.empty((0, H, 0, 2)), np.empty((0, 3)), np.empty((0, H, 3)))
        _decide(
            closes, instrument, mid, np.where(regimes < 0, R, regimes), votes, sizes, o.instrument, o.serial, o.label, o.move, o.at,
            learned.serial, self.threshold, self.confident, self.trust, self.eta, self.needs, self.config.tilt, self.config.share,
            learn_from, ts, *pool, learned.weights, learned.between, learned.loss, learned.both_loss, learned.member_loss, learned.awake,
            learned.rounds, *learned.ring, *out,
        )  # fmt: skip
        return out

    def regret(self, learned: Learned) -> dict[str, Any]:
        """Cumulative log-loss regret of the mixture against every member, with its bound; nested lists over (regime, horizon, member).

        Over the n rounds in which member i was awake, in the order in which outcomes arrive, the mixture's loss exceeds i's by at most
        (ln(1 / w_i) + n ln(1 / (1 - eta share))) / eta, w_i its weight in the artifact (Freund et al. 1997, th. 1, with eta <= 1 by
        Jensen). Decisions are taken before their outcomes arrive, with older weights: `delay` is what that cost, and no bound covers it.
        `pool` tells the same of the second Hedge: regret of the ensemble against mixture, pool and sharper pool, (regime, horizon, 3).
        """
        regret, eta = learned.member_loss[..., 1] - learned.member_loss[..., 0], self.eta[None, :, None]
        bound = (-np.log(self.weights) - learned.awake * np.log1p(-self.config.share * eta)) / eta
        delay = learned.loss[..., 1] - learned.loss[..., 0]
        return {
            "members": list(self.names), "regimes": [*REGIMES, "unknown"], "rounds": learned.rounds.tolist(),
            "awake": learned.awake.tolist(), "regret": regret.tolist(), "bound": bound.tolist(), "delay": delay.tolist(),
            "pool": self._both(learned),
        }  # fmt: skip

    def _both(self, learned: Learned) -> dict[str, Any]:
        loss, eta = learned.both_loss, self.eta[None, :, None]
        start = -np.log(self.between) - learned.rounds[..., None] * np.log1p(-self.config.share * eta)
        return {
            "against": list(BOTH), "weight": learned.between.tolist(), "regret": (loss[..., :1] - loss[..., 1:]).tolist(),
            "bound": (start / eta).tolist(),
        }  # fmt: skip

    def save(self, folder: Path) -> None:
        c = self.config
        np.savez(
            folder / "ensemble.npz", names=np.array(self.names), threshold=self.threshold, weights=self.weights, confident=self.confident,
            eta=self.eta, trust=self.trust, config=np.array([c.agree, c.tilt, c.share, c.least_cover, c.stop, c.kelly]),
            between=self.between, **({} if self.pool is None else {f"pool_{k}": v for k, v in self.pool._asdict().items()}),
        )  # fmt: skip

    @classmethod
    def load(cls, folder: Path) -> Self:
        with np.load(folder / "ensemble.npz", allow_pickle=False) as z:
            config = Config(*(float(v) for v in z["config"]))
            pool = Pool(*(z[f"pool_{k}"] for k in Pool._fields)) if "pool_rate" in z else None
            names = [str(n) for n in z["names"]]
            return cls(names, z["threshold"], z["weights"], z["confident"], z["eta"], config, z["trust"], pool, z["between"])


def learning_rates(ts: I64, instrument: I64, horizons_ns: Sequence[int], step: int = 1) -> F64:
    """(H,) one over the decisions of an instrument that fall within a horizon: labels that overlap share what they tell, and count once.

    `ts` (n,) holds every `step`-th decision of each instrument.
    """
    within, n = np.zeros(len(horizons_ns)), max(1, len(ts))
    for k in np.unique(instrument):
        t = ts[instrument == k]
        for h, ns in enumerate(horizons_ns):
            within[h] += (np.arange(1, len(t) + 1) - np.searchsorted(t, t - ns, side="right")).sum()
    return 1 / np.maximum(1.0, step * within / n)


def confidence_threshold(proba: F64, move: F64, spread: F64, least_cover: float) -> float:
    """The confidence from which on the past paid best: the largest t statistic of signed move less spread, in ticks.

    `proba` (n, 3), `move` (n,), `spread` (n,), all of the past. Among thresholds that let through `least_cover` of the decisions or
    more. The statistic takes decisions as independent; it ranks thresholds and tests nothing.
    """
    ok = np.isfinite(move) & np.isfinite(proba[:, 0]) & np.isfinite(spread)
    if not ok.any():
        return 1.0
    p, move, spread = proba[ok], move[ok], spread[ok]
    side = np.where(p[:, 2] >= p[:, 0], 1, -1)
    confidence = np.maximum(p[:, 0], p[:, 2])
    order = np.argsort(-confidence, kind="stable")
    net = (side * move - spread)[order]
    n = np.arange(1, len(net) + 1)
    mean, square = np.cumsum(net) / n, np.cumsum(net**2) / n
    t = mean * np.sqrt(n) / np.sqrt(np.maximum(square - mean**2, 1e-12) + 1e-3 * square[-1] + 1e-12)
    first = max(1, int(least_cover * len(net)), min(30, len(net))) - 1
    c = confidence[order]
    ends = np.append(c[1:] < c[:-1], True)  # equal confidence passes together
    usable = np.flatnonzero(ends & (np.arange(len(c)) >= first))
    return float(c[usable[np.argmax(t[usable])]])


def expected_move(proba: F64, magnitude: F64) -> F64:
    """Expected signed move of the mid (...,) in ticks: E|move| x (P(up) - P(down)) / (P(up) + P(down)); proba (..., 3)."""
    moves = proba[..., 2] + proba[..., 0]
    return np.where(moves > 0, magnitude * (proba[..., 2] - proba[..., 0]) / np.where(moves > 0, moves, 1.0), 0.0)


def trust_in(expected: F64, move: F64, independent: int) -> float:
    """How much of the expected signed moves (n,) the past moves (n,) bear out: their slope through the origin less one standard error.

    In [0, 1]. The standard error takes the n decisions for `independent` ones, which is what their overlapping labels are worth; so a
    horizon with too few of them, or one whose forecasts have not come true, expects nothing and is not traded.
    """
    ok = np.isfinite(expected) & np.isfinite(move)
    e, m = expected[ok], move[ok]
    power = float(e @ e)
    if power <= 0 or independent < 2:
        return 0.0
    slope = float(e @ m) / power
    error = np.sqrt(float(np.mean((m - slope * e) ** 2)) / power * len(e) / min(independent, len(e)))
    return float(np.clip(slope - error, 0.0, 1.0))


def recommend(
    proba: F64, magnitude: F64, direction: NDArray[np.int8], regime: int, spread: float, cost: float = 0.0, config: Config | None = None
) -> Recommendation:
    """From one decision (proba (H, 3), magnitude (H,) ticks, direction (H,)) to what one would do.

    Of the horizons with a direction, that with the most expected gain: (P(d) - P(-d)) / (P(d) + P(-d)) x E|move| less `spread` and
    `cost` (ticks: fees both ways, slippage). Target: the expected |move| given that it moves; stop: `config.stop` expected |moves|, one
    spread at least. Size: a share of the Kelly fraction of that bet, times the regime's position scale.
    """
    config = config or Config()
    best, gain = -1, -np.inf
    for h in range(len(direction)):
        if direction[h] and np.isfinite(magnitude[h]):
            d = int(direction[h])
            lead = (proba[h, 1 + d] - proba[h, 1 - d]) / max(proba[h, 0] + proba[h, 2], 1e-12)
            if lead * magnitude[h] - spread - cost > gain:
                best, gain = h, float(lead * magnitude[h] - spread - cost)
    if best < 0:
        return Recommendation(0, -1, 0.0, 0.0, 0.0, 0.0, 0.0, "no direction")
    d, move = int(direction[best]), float(magnitude[best])
    target = move / max(1 - float(proba[best, 1]), 0.05)
    stop = max(config.stop * move, spread)
    reward, risk = target - spread - cost, stop + spread + cost
    p = float(proba[best, 1 + d] / max(proba[best, 0] + proba[best, 2], 1e-12))
    kelly = max(0.0, p - (1 - p) * risk / reward) if reward > 0 else 0.0
    size = config.kelly * kelly * (POSITION[regime] if regime >= 0 else 1.0)
    ratio = max(0.0, reward / risk) if risk > 0 else 0.0
    reason = "" if size > 0 else "does not pay for spread and cost" if kelly == 0 else f"regime {REGIMES[regime]}"
    return Recommendation(d if size > 0 else 0, best, move, min(1.0, size), stop, target, ratio, reason)
