"""What the ensemble learns of members that are fitted already: weights, least confidence and trust, on a slice nobody was fitted on.

Takes a source of events and several sets of members (of other seeds, or with one taken away); all run along one pass of the stream. Gives
for each its :class:`Weighed`: the ensemble, the account of its learning, and the decisions of the weight slice and of what follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from catalog.altdata import Table as AltData
from catalog.events import Instrument
from catalog.progress import Steps
from cift_models.ensemble import Config, Ensemble, Member, R, confidence_threshold, expected_move, learning_rates, roster, trust_in
from cift_models.inference import Engine, stream
from cift_models.labels import F64, LABELS, H, Split, classify, effective, purged
from cift_models.pooling import blend, fit_pool
from cift_models.validate import Sample, log_loss
from cift_models.windows import HORIZONS_NS, Block, Votes

Source = Callable[[], tuple[list[Instrument], Iterable[NDArray[np.void]]]]
WARM_NS: Final = 20 * 60 * 1_000_000_000


class Weighed(NamedTuple):
    """`sample` holds the decisions of the weight slice with their labels, `after` those that follow it (:meth:`validate.Sample.finish`)."""

    ensemble: Ensemble
    regret: dict[str, Any]
    sample: dict[str, NDArray[Any]]
    after: dict[str, NDArray[Any]] | None


class Shared:
    """One member for several engines along one stream: it answers a block, known by its very rows, once."""

    def __init__(self, member: Member) -> None:
        self.member, self.name = member, member.name
        self.proven = getattr(member, "proven", None)
        self._rows: NDArray[np.float64] | None = None
        self._state = member.new_state()
        if hasattr(member, "regimes"):
            self.regimes = lambda state: self.member.regimes(self._state)  # type: ignore[attr-defined]
        if hasattr(member, "join"):
            self.join = member.join

    def new_state(self) -> None:
        self._rows, self._state = None, self.member.new_state()

    def predict(self, block: Block, state: None) -> Votes:
        if self._rows is not block.rows:
            self._votes, self._rows = self.member.predict(block, self._state), block.rows
        return self._votes


@contextmanager
def one_thread() -> Iterator[None]:
    """Linear algebra on one core: the systems here are so small that more threads only wait for one another."""
    import scipy.optimize  # noqa: F401  its library has to be there to be told
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(1, "blas"):
        yield


def cut(block: Block, ts: int) -> tuple[Block, Block]:
    """What of a block comes before `ts` (ns), and the rest."""
    i = int(np.searchsorted(block.events["ts_init"], ts))
    c = int(np.searchsorted(block.closes, i))
    events, rows, closes = block[:3]
    return Block(events[:i], rows[:i], closes[:c]), Block(events[i:], rows[i:], closes[c:] - i)


def weigh(
    source: Source, ids: Sequence[str], names: Sequence[str], sets: Sequence[Sequence[Member]], split: Split, threshold: F64, eta: F64,
    config: Config | None = None, upto: int | None = None, columns: Sequence[str] = (), altdata: AltData | None = None, total: int = 0,
) -> list[Weighed]:  # fmt: skip
    """One pass up to `upto` (ns; None: the end of the weight slice) with every set of members; a member in several is asked once.

    `ids` of the instruments as trained, `threshold` (I, H) ticks, `eta` (H,) of :func:`ensemble.learning_rates`, `columns` what
    `after` tells of level 1. It starts :data:`WARM_NS` before the weight slice: what members carry along reaches no further back.
    """
    instruments, chunks = source()
    upto = max(split.end, upto if upto is not None else split.end)
    shared = {id(m): Shared(m) for members in sets for m in members}
    runs = [_Run(instruments, ids, names, [shared[id(m)] for m in s], split, threshold, eta, config, columns, altdata) for s in sets]
    with Steps("weights", total, "events") as steps, one_thread():
        for block in stream(instruments, chunks):
            if len(block.events) and block.events["ts_init"][0] >= upto:
                break
            if len(block.events) and block.events["ts_init"][-1] >= split.weigh - WARM_NS:
                before, after = cut(block, split.end)
                for part, push in ((before, _Run.push), (cut(after, upto)[0], _Run.push_after)):
                    if len(part.events):
                        for r in runs:
                            push(r, part)
            steps.advance(len(block.events))
        return [r.result() for r in runs]


class _Run:
    """One set of members along the stream."""

    def __init__(
        self, instruments: Sequence[Instrument], ids: Sequence[str], names: Sequence[str], members: Sequence[Any], split: Split,
        threshold: F64, eta: F64, config: Config | None, columns: Sequence[str], altdata: AltData | None,
    ) -> None:  # fmt: skip
        self.even = Ensemble.even(roster([m.name for m in members]), threshold, eta, config, members)
        self.engine = Engine(instruments, ids, names, members, self.even, learn_from=split.weigh)
        if altdata is not None:
            self.engine.tell(altdata)
        self.split = split
        self._sample = Sample(instruments, names, len(self.even.names), since=split.weigh)
        self._later = Sample(instruments, names, len(self.even.names), columns, since=split.end + split.embargo)
        self._begun = False
        self._learnt: tuple[Ensemble, dict[str, Any], dict[str, NDArray[Any]]] | None = None

    def push(self, block: Block) -> None:
        self._sample.push(block, self.engine.predict(block))

    def push_after(self, block: Block) -> None:
        self._begun = True
        self._learn()
        self._later.push(block, self.engine.predict(block))

    def _learn(self) -> tuple[Ensemble, dict[str, Any], dict[str, NDArray[Any]]]:
        """The weight slice is over: what was learnt, and the engine decides by it from now on."""
        if self._learnt is None:
            got = self._sample.finish()
            learnt = learn(self.even, self.engine.learned.weights, got, self.split)
            self._learnt = learnt, self.even.regret(self.engine.learned), got
            self.engine.ensemble, self.engine.learned.between = learnt, learnt.between.copy()
        return self._learnt

    def result(self) -> Weighed:
        return Weighed(*self._learn(), self._later.finish() if self._begun else None)


def learn(even: Ensemble, weights: F64, got: Mapping[str, NDArray[Any]], split: Split) -> Ensemble:
    """The ensemble after the weight slice, of which `got` is the sample: its `weights`, the pool of its members and how far that is
    followed, the least confidence and the trust of each horizon, from labels known by the slice's end.

    Confidence and trust are those of forecasts with a pool that was fitted on other stretches of the slice.
    """
    move = np.where(purged(got["known_at"], split.end, split.embargo) & (got["ts"] < split.end)[:, None], got["move"], np.nan)
    ts, known_at, instrument, instruments = got["ts"], got["known_at"], got["instrument"], len(even.threshold)
    worth = np.zeros(H)
    for h in range(H):
        for k in range(instruments):
            mine = np.flatnonzero(np.isfinite(move[:, h]) & (instrument == k))
            worth[h] += effective(ts[mine], known_at[mine, h])
    y, regime = classify(move, even.threshold[instrument]), np.where(got["regime"] < 0, R, got["regime"]).astype(np.int64)
    pool, apart = fit_pool(got["votes"], y, regime, ts, known_at, instrument, worth, instruments, R + 1, even.weights[0])
    eta = learning_rates(ts, instrument, HORIZONS_NS)
    mix, share = got["proba"].astype(np.float64), even.config.share
    proba, between = blend(ts, known_at, regime, y, mix, apart, pool.rate[instrument], eta, share, R + 1)
    cover = even.config.least_cover
    confident = np.array([confidence_threshold(proba[:, h], move[:, h], got["spread"], cover) for h in range(H)])
    expected = expected_move(proba, got["magnitude"].astype(np.float64))
    trust = np.array([trust_in(expected[:, h], move[:, h], int(worth[h])) for h in range(H)])
    return Ensemble(even.names, even.threshold, weights.copy(), confident, even.eta, even.config, trust, pool, between)


def pooled_losses(
    sample: Mapping[str, NDArray[Any]], threshold: F64, names: Sequence[str], usable: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Horizon -> mean log-loss of "ensemble" and of each member that voted, over all instruments; members where they had a say."""
    out: dict[str, dict[str, float]] = {}
    for h in usable:
        y = classify(sample["move"][:, h], threshold[sample["instrument"], h])
        told = {"ensemble": sample["proba"][:, h], **{name: sample["votes"][:, a, h] for a, name in enumerate(names)}}
        for name, p in told.items():
            ok = (y >= 0) & np.isfinite(p).all(axis=1)
            if ok.any():
                out.setdefault(LABELS[h], {})[name] = float(log_loss(p[ok].astype(np.float64), y[ok]).mean())
    return out
