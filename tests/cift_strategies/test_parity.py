"""What the actor publishes inside a backtest is what `replay` computes for training: equal to the last bit, on every feed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Small
from nautilus_trader.common import DataActor, DataActorConfig
from nautilus_trader.model import ActorId
from tapes import SHARE, Tape, write

from catalog.events import ADD, CANCEL, EVENT, F_LAST, F_TOB, MODIFY, SCALE, TRADE, Instrument, read_catalog
from catalog.parquet import DELTAS, TRADES
from catalog.writer import Writer
from cift_models.features import replay
from cift_models.windows import closes, new_batches
from cift_strategies.faults import Faults
from cift_strategies.feature_actor import FeatureActor
from cift_strategies.messages import FEATURES, FeatureVector
from cift_strategies.stream import Span
from cift_strategies.system import Replay, run_backtest

Array = np.ndarray[Any, Any]


class Keeper(DataActor):
    """Keeps every vector as it is published."""

    def __new__(cls, *_args: Any) -> Keeper:
        return super().__new__(cls)

    def __init__(self) -> None:
        super().__init__(DataActorConfig(actor_id=ActorId("KEEPER-1")))
        self.vectors: list[FeatureVector] = []

    def on_start(self) -> None:
        self.subscribe_topic(FEATURES, self.vectors.append)


class Published:
    """A feature actor, loaded from `state` where given, and what it published over a part of a catalog."""

    def __init__(
        self, root: Path, instruments: Sequence[Instrument], start: int | None = None, end: int | None = None,
        state: dict[str, bytes] | None = None, chunk_size: int | None = 100_000,
    ) -> None:  # fmt: skip
        faults, span = Faults(), Span(root, instruments, start, end)
        self.actor, self.keeper = FeatureActor(instruments, faults), Keeper()
        if state is not None:
            self.actor.on_load(state)
        run_backtest(self, Replay(root, instruments, span.first, span.last, 1e6, 0, chunk_size), faults)  # type: ignore[arg-type]

    def add_to(self, add_actor: Callable[[Any], object], _add_strategy: Callable[[Any], object]) -> None:
        add_actor(self.actor)
        add_actor(self.keeper)

    def of(self, k: int) -> tuple[Array, Array, Array]:
        """Events, feature rows and stamps of closes of instrument `k`."""
        mine = [v for v in self.keeper.vectors if v.instrument == k]
        ends = [v.events["ts_init"][i] for v in mine for i in v.closes]
        return np.concatenate([v.events for v in mine]), np.concatenate([v.rows for v in mine]), np.array(ends)


def replayed(root: Path, instruments: Sequence[Instrument], start: int | None = None, end: int | None = None) -> tuple[Array, Array, Array]:
    events = np.concatenate(list(read_catalog(root, [x.id for x in instruments], start, end)[1]))
    return events, replay(events, instruments), closes(new_batches(len(instruments)), events)


def assert_same(published: Published, root: Path, instruments: Sequence[Instrument], end: int | None = None) -> None:
    events, rows, ends = replayed(root, instruments, None, end)
    for k in range(len(instruments)):
        mine = events["instrument"] == k
        got_events, got_rows, got_ends = published.of(k)
        assert got_events.tobytes() == events[mine].tobytes()
        assert got_rows.tobytes() == rows[mine].tobytes()
        assert np.array_equal(got_ends, events["ts_init"][ends][mine[ends]])


@pytest.fixture(scope="module")
def binance(data: Path) -> tuple[Path, list[Instrument], int]:
    root = data / "catalogs" / "binance-2024-08-08"
    instruments = read_catalog(root)[0]
    return root, instruments, Span(root, instruments).first + 25 * SCALE


@pytest.fixture(scope="module")
def es(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Instrument]]:
    from catalog.databento import import_dbn

    file = data / "databento" / "esh4-glbx-mdp3-20231225.mbo.dbn.zst"
    toml = Path(__file__).parents[2] / "docs" / "instruments" / "esh4.toml"
    root = import_dbn([file], tmp_path_factory.mktemp("es") / "catalog", toml).root
    return root, read_catalog(root)[0]


def test_levels_of_four_instruments_on_binance(binance: tuple[Path, list[Instrument], int]) -> None:
    root, instruments, end = binance
    assert_same(Published(root, instruments, end=end), root, instruments, end)


def test_orders_of_the_es_session(es: tuple[Path, list[Instrument]]) -> None:
    assert_same(Published(*es), *es)


def test_orders_of_the_planted_market(small: Small) -> None:
    """Made as the demo is, only smaller: two instruments, two sessions, executions in parts as Nasdaq publishes them."""
    instruments = read_catalog(small.catalog)[0]
    assert_same(Published(small.catalog, instruments), small.catalog, instruments)


def test_best_quotes_alone(tmp_path: Path) -> None:
    from nautilus_trader.model import InstrumentId, Price, Quantity, QuoteTick
    from nautilus_trader.persistence import ParquetDataCatalog

    write(tmp_path, [Tape().trade(0, 1, 10_001, 5).trade(700, -1, 10_000, 3)])
    id_, rng = InstrumentId.from_str(SHARE.id), np.random.default_rng(3)
    quotes = []
    for n in range(500):
        bid, gap = 100 + 0.01 * int(rng.integers(-5, 6)), 0.01 * int(rng.integers(1, 4))
        ts = 1_700_000_000 * SCALE + int(2e6) * n
        sizes = [Quantity(int(rng.integers(0, 5)), 0) for _ in range(2)]
        quotes.append(QuoteTick(id_, Price(bid, 2), Price(bid + gap, 2), *sizes, ts, ts))
    ParquetDataCatalog(str(tmp_path)).write_quote_ticks(quotes)
    instruments = read_catalog(tmp_path)[0]
    assert instruments[0].level == 1
    published = Published(tmp_path, instruments)
    assert_same(published, tmp_path, instruments)
    events = published.of(0)[0]
    assert len(events) == 1_002 and set(events["flags"][events["action"] != TRADE]) == {F_TOB, F_TOB | F_LAST}


@pytest.mark.parametrize("share", [0.1, 0.5, 0.77])
def test_a_stream_cut_in_the_middle_goes_on_as_if_whole(es: tuple[Path, list[Instrument]], share: float) -> None:
    root, instruments = es
    span = Span(root, instruments)
    middle = span.split_at(share)
    first = Published(root, instruments, end=middle)
    second = Published(root, instruments, start=middle + 1, state=first.actor.on_save())
    events, rows, ends = replayed(root, instruments)
    parts = first.of(0), second.of(0)
    for whole, n in ((events, 0), (rows, 1), (events["ts_init"][ends], 2)):
        assert np.concatenate([p[n] for p in parts]).tobytes() == whole.tobytes()


@pytest.mark.parametrize("chunk_size", [None, 5_000, 333])
def test_chunks_change_nothing(es: tuple[Path, list[Instrument]], chunk_size: int | None) -> None:
    root, instruments = es
    end = Span(root, instruments).split_at(0.2)
    assert_same(Published(root, instruments, end=end, chunk_size=chunk_size), root, instruments, end)


def regroup(root: Path, out: Path, instrument: Instrument, end: int, last: Callable[[Array], Array]) -> Path:
    """A copy of the catalog whose F_LAST flags are set where `last(deltas)` says."""
    import shutil

    events = np.concatenate(list(read_catalog(root, [instrument.id], None, end)[1]))
    for kind, mine in ((DELTAS, events["action"] != TRADE), (TRADES, events["action"] == TRADE)):
        part = events[mine].copy()
        if kind == DELTAS:
            part["flags"] = np.where(last(part), part["flags"] | F_LAST, part["flags"] & np.uint8(255 - F_LAST))
        writer = Writer(out, kind, instrument)
        writer.add(part)
        writer.close()
    for folder in (root / "data").iterdir():
        if folder.name not in (DELTAS, TRADES):
            shutil.copytree(folder, out / "data" / folder.name)
    return out


def test_how_deltas_are_grouped_changes_nothing(es: tuple[Path, list[Instrument]], tmp_path: Path) -> None:
    root, instruments = es
    end = Span(root, instruments).split_at(0.4)
    events, rows, ends = replayed(root, instruments, None, end)
    rng = np.random.default_rng(1)

    def stamp_ends(d: Array) -> Array:
        return np.append(d["ts_init"][1:] != d["ts_init"][:-1], True)

    ways: dict[str, Callable[[Array], Array]] = {
        "each alone": lambda d: np.ones(len(d), bool),
        "by stamp": stamp_ends,
        "at random within a stamp": lambda d: stamp_ends(d) | (rng.random(len(d)) < 0.5),
    }
    callbacks = set()
    for name, last in ways.items():
        other = regroup(root, tmp_path / name, instruments[0], end, last)
        published = Published(other, instruments)
        got_events, got_rows, got_ends = published.of(0)
        callbacks.add(len(published.keeper.vectors))
        assert got_rows.tobytes() == rows.tobytes(), name
        assert np.array_equal(got_ends, events["ts_init"][ends]), name
        for field in set(EVENT.names or ()) - {"flags"}:
            assert np.array_equal(got_events[field], events[field]), (name, field)
    assert len(callbacks) == len(ways)  # they were grouped in three ways


def test_vectors_stay_as_they_were_published(es: tuple[Path, list[Instrument]]) -> None:
    """The buffers behind events and rows are never written twice, so whoever keeps a vector keeps the truth."""
    root, instruments = es
    end = Span(root, instruments).split_at(0.3)
    kept = Published(root, instruments, end=end).keeper.vectors
    assert sum(len(v.rows) for v in kept) > 4 * 4_096  # more than one buffer
    events, rows, _ = replayed(root, instruments, None, end)
    at = 0
    for v in kept:
        assert v.rows.tobytes() == rows[at : at + len(v.rows)].tobytes()
        assert v.ts == events["ts_init"][at + len(v.rows) - 1]
        at += len(v.rows)


def test_actions_are_those_of_the_feed(es: tuple[Path, list[Instrument]]) -> None:
    root, instruments = es
    events = Published(root, instruments).of(0)[0]
    count = {chr(a): int((events["action"] == a).sum()) for a in (ADD, CANCEL, MODIFY, TRADE)}
    assert count == {"A": 29_216, "C": 17_999, "M": 12_233, "T": 2_973}
