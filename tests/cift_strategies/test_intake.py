"""One call takes a message to its vector: the rows of `replay`, whatever the lengths of messages, and memory that is safe to keep."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from nautilus_trader.model import (
    AggressorSide,
    BookAction,
    BookOrder,
    InstrumentId,
    OrderBookDelta,
    OrderBookDeltas,
    OrderSide,
    Price,
    Quantity,
    QuoteTick,
    TradeId,
    TradeTick,
)
from numba.core.dispatcher import Dispatcher
from tapes import SHARE
from translator import Translator

import catalog
import cift_models
import cift_strategies
from catalog.events import F_LAST, SCALE, Instrument
from cift_models.features import BLOCK, replay
from cift_models.windows import closes, new_batches
from cift_strategies import intake
from cift_strategies.intake import AUDIT, ROWS, Intake
from cift_strategies.messages import FeatureVector

ID = InstrumentId.from_str(SHARE.id)
START = 1_700_000_000 * SCALE


def delta(rng: np.random.Generator, n: int, ts: int) -> OrderBookDelta:
    """An order added, or one of the last ones changed or taken away."""
    side = 1 if n % 2 else -1
    action = (BookAction.ADD, BookAction.ADD, BookAction.UPDATE, BookAction.DELETE)[int(rng.integers(4))]
    order_id = n + 1 if action == BookAction.ADD else int(rng.integers(max(1, n - 40), n + 2))
    price = Price(100 - side * 0.01 * int(rng.integers(1, 40)), 2)
    order = BookOrder(OrderSide.BUY if side > 0 else OrderSide.SELL, price, Quantity(int(rng.integers(1, 9)), 0), order_id)
    return OrderBookDelta(ID, action, order, F_LAST, n, ts, ts + 3)


def stream(seed: int, lengths: Iterator[int]) -> Iterator[Any]:
    """Messages of the given lengths, 100 us from one to the next, every seventh followed by a trade."""
    rng, n, ts = np.random.default_rng(seed), 0, START
    for m, length in enumerate(lengths):
        ts += int(rng.integers(1, 200_000))
        yield OrderBookDeltas(ID, [delta(rng, n + j, ts) for j in range(length)])
        n += length
        if m % 7 == 6:
            ts += 1_000
            price = Price(100 + 0.01 * int(rng.integers(-2, 3)), 2)
            yield TradeTick(ID, price, Quantity(2, 0), AggressorSide.BUY if m % 2 else AggressorSide.SELL, TradeId(str(m)), ts, ts + 3)


def fed(taker: Intake | Translator, messages: list[Any]) -> list[Any]:
    take: dict[type, Callable[[Any], Any]] = {OrderBookDeltas: taker.deltas, TradeTick: taker.trade, QuoteTick: taker.quote}
    return [take[type(m)](m) for m in messages]


def assert_replayed(vectors: list[FeatureVector], messages: list[Any], restamp: bool = False) -> None:
    events = np.concatenate(fed(Translator([SHARE], restamp), messages))
    assert np.concatenate([v.events for v in vectors]).tobytes() == events.tobytes()
    assert np.concatenate([v.rows for v in vectors]).tobytes() == replay(events, [SHARE]).tobytes()
    starts = np.cumsum([0] + [len(v.events) for v in vectors])
    assert [int(s) + i for s, v in zip(starts, vectors) for i in v.closes] == closes(new_batches(1), events).tolist()
    assert [v.ts for v in vectors] == [int(v.events["ts_init"][-1]) for v in vectors]


@pytest.mark.parametrize("bulk", [True, False], ids=["at once", "by attributes"])
@pytest.mark.parametrize("restamp", [False, True])
def test_messages_of_any_length_are_replayed(bulk: bool, restamp: bool) -> None:
    lengths = np.random.default_rng(1).choice([1, 1, 1, 2, 5, 30, 250], 2 * AUDIT).tolist()
    messages = list(stream(2, iter(lengths)))
    assert_replayed(fed(Intake([SHARE], restamp, bulk), messages), messages, restamp)


def test_a_message_longer_than_any_block_is_replayed() -> None:
    messages = list(stream(3, iter([5, ROWS + 1, 3, BLOCK + 70, 4])))
    assert_replayed(fed(Intake([SHARE]), messages), messages)


def test_touch_is_told_where_a_batch_closes() -> None:
    from catalog.book import depth

    messages = list(stream(4, iter([3] * 900)))
    vectors, events = fed(Intake([SHARE]), messages), np.concatenate(fed(Translator([SHARE]), messages))
    book, at, told = depth(events, 1), -1, 0
    for v in vectors:
        at += len(v.events)
        told += bool(v.closes)
        assert v.touch == ((int(book["bid_sz"][at, 0]), int(book["ask_sz"][at, 0])) if v.closes else (0, 0))
    assert told > 20


def test_memory_that_is_held_is_not_written_again_and_other_memory_is_used_again() -> None:
    taker, kept, blocks = Intake([SHARE]), [], set()
    for n, message in enumerate(stream(5, iter([16] * (20 * ROWS // 16)))):
        vector = fed(taker, [message])[0]
        blocks.add(vector.block.__array_interface__["data"][0])
        if n % 5 == 0 and n < 500:  # whether the vector is held or only what came of it
            row = (vector.rows[-1:], vector.events[-1:])[n % 2]
            kept.append((row, row.tobytes(), vector if n % 3 else None))
    assert all(row.tobytes() == was for row, was, _ in kept)
    assert len(blocks) < 12


def test_instruments_are_told_apart_and_a_stranger_is_an_error() -> None:
    two = [Instrument("OTHER.XTST", 1, 1, 1.0, "USD"), SHARE]
    message, *_ = stream(6, iter([2]))
    for bulk in (True, False):
        assert Intake(two, bulk=bulk).deltas(message).instrument == 1
        with pytest.raises(KeyError):
            Intake(two[:1], bulk=bulk).deltas(message)


def test_a_reading_that_goes_wrong_later_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "AUDIT", 8)
    taker, messages = Intake([SHARE]), list(stream(7, iter([3] * 6)))
    fed(taker, messages)
    taker._layout = moved = taker._layout.copy()  # type: ignore[union-attr]
    moved[intake.layout.AT + 3] = moved[intake.layout.AT + 5]  # the sequence is now read where ts_init lies
    taker._desk[intake.LAYOUT] = intake._address(moved)
    with pytest.raises(AssertionError, match="attributes"):
        fed(taker, list(stream(8, iter([3] * 8))))


def test_a_vector_is_a_value() -> None:
    (vector,) = fed(Intake([SHARE]), list(stream(9, iter([4]))))
    with pytest.raises(AttributeError):
        vector.ts = 0
    assert FeatureVector(0, vector.ts, vector.events, vector.rows, ()).touch == (0, 0)


@pytest.mark.parametrize("bulk", [True, False])
def test_who_keeps_events_gets_each_once_with_its_features_and_where_messages_end(bulk: bool) -> None:
    """Across blocks, and whenever it asks for what it does not have yet; nothing it holds is written again."""
    kept: list[tuple[Any, Any, Any]] = []
    taken, lengths = Intake([SHARE], bulk=bulk), []
    messages = list(stream(3, iter([1, 5, 2, 700, 1] * 12)))
    taken.trade(messages.pop(next(i for i, m in enumerate(messages) if isinstance(m, TradeTick))))  # before anybody keeps anything
    taken.keep(lambda *pieces: kept.append(pieces))
    copies = []
    for n, message in enumerate(messages):
        vector = taken.trade(message) if isinstance(message, TradeTick) else taken.deltas(message)
        lengths.append(len(vector.events))
        copies.append((vector.events.copy(), vector.rows.copy()))
        if n % 9 == 0:
            taken.hand_on()
    taken.hand_on()
    taken.hand_on()
    events, rows, came = (np.concatenate(pieces) for pieces in zip(*kept))
    assert events.tobytes() == np.concatenate([e for e, _ in copies]).tobytes()
    assert rows.tobytes() == np.concatenate([r for _, r in copies]).tobytes()
    assert np.diff(np.flatnonzero(came), prepend=-1).tolist() == lengths and (np.diff(came[came > 0]) >= 0).all()


def test_no_kernel_that_is_kept_on_disk_closes_over_a_compiled_function() -> None:
    """Such a function has another name in each process: the kernel would be compiled in each."""
    found = 0
    for folder in (catalog, cift_models, cift_strategies):
        for module in pkgutil.iter_modules(folder.__path__):
            if module.ispkg or b"njit" not in Path(folder.__path__[0], f"{module.name}.py").read_bytes():
                continue
            for kernel in vars(importlib.import_module(f"{folder.__name__}.{module.name}")).values():
                if isinstance(kernel, Dispatcher) and kernel.py_func.__closure__:
                    assert all(isinstance(cell.cell_contents, int) for cell in kernel.py_func.__closure__), kernel
                    found += 1
    assert found >= 4


def test_kernels_are_kept_by_their_sources_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = Path(os.environ["NUMBA_CACHE_DIR"]).name
    monkeypatch.setattr(numba.config, "CACHE_DIR", numba.config.CACHE_DIR)
    for told in (tmp_path, tmp_path / name):  # by a user, and by a process that has read it
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(told))
        catalog._kernel_cache()
        assert os.environ["NUMBA_CACHE_DIR"] == str(tmp_path / name)
    assert name.startswith("kernels-") and str(tmp_path / name) == numba.config.CACHE_DIR
