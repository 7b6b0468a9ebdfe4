"""Inference in a process of its own: it says what the engine says, skips predictions but no event, and cannot hold up whoever asks."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import Small
from hypothesis import given, settings
from hypothesis import strategies as st

from catalog.errors import InputError
from catalog.events import EVENT, read_catalog
from cift_models.features import NAMES
from cift_models.inference import Engine, Predictions, stream
from cift_models.windows import Block
from cift_strategies.messages import FeatureVector, Prediction
from cift_strategies.results import ROW_GROUP, columns_of
from cift_strategies.serving import CAPACITY, HEAD, LOST, Models, Ring, Serving

WAIT_S = 120


def vectors(instrument: int, events: Any, rows: Any, closes: Any) -> FeatureVector:
    return FeatureVector(instrument, int(events["ts_init"][-1]), events, rows, tuple(int(c) for c in closes))


@pytest.fixture(scope="module")
def session(small: Small) -> tuple[list[FeatureVector], list[Block], Any]:
    """The first 12,000 events after the split, one vector each, and the blocks that they make up."""
    start = small.result.split_ns + 1
    table, chunks = read_catalog(small.catalog, None, start, None)
    blocks, made = [], []
    for block in stream(table, chunks):
        blocks.append(block)
        closing = set(block.closes.tolist())
        for i in range(len(block.events)):
            one = block.events[i : i + 1]
            made.append(vectors(int(one["instrument"][0]), one, block.rows[i : i + 1], (0,) if i in closing else ()))
        if len(made) >= 12_000:
            break
    return made, blocks, table


class Asked(Serving):
    """With what it answered, in order, and an event for whoever waits."""

    def __init__(self, small: Small, table: Any, results: Path | None = None, capacity: int = CAPACITY) -> None:
        self.got: list[Prediction] = []
        self.more = threading.Event()
        super().__init__(Models(small.artifact, tuple(table), results=results), lambda: 2**62, capacity)
        self.connect(lambda call, *a: call(*a), self._take)
        assert self.ready.wait(WAIT_S) and self.fault is None

    def _take(self, predictions: Sequence[Prediction]) -> None:
        self.got += predictions
        self.more.set()

    def until(self, batches: int) -> None:
        while self.batches < batches:
            self.more.clear()
            if self.batches < batches:
                assert self.more.wait(WAIT_S), f"{self.batches} of {batches} batches, {self.fault}"


@pytest.fixture
def serving(small: Small, session: Any, tmp_path: Path) -> Iterator[Asked]:
    made = Asked(small, session[2], tmp_path)
    yield made
    made.close()


def test_what_is_answered_is_what_the_engine_says_of_the_whole_history(small: Small, session: Any, serving: Asked, tmp_path: Path) -> None:
    """To the last bit, however the process cut the stream; each batch is either answered or counted as skipped."""
    made, _, table = session
    batches = 0
    for n, v in enumerate(made):
        assert serving.predict(v) == ()
        batches += len(v.closes)
        if n % 500 == 0:
            serving.until(batches)
    serving.until(batches)
    whole = history(small, session)
    assert len(serving.got) == serving.delivered > 20
    assert serving.batches == batches and serving.skipped == batches - serving.delivered and serving.lost == serving.passed == 0
    for p in serving.got:
        told = p.proba.tobytes(), p.magnitude.tobytes(), p.direction, p.regime, p.votes.tobytes()
        assert told == whole[p.instrument, p.ts]
    order = {k: [p.ts for p in serving.got if p.instrument == k] for k in range(len(table))}
    assert all(ts == sorted(ts) for ts in order.values())
    scored = serving.finish(WAIT_S)
    kept = pq.read_metadata(tmp_path / "predictions.parquet")
    assert scored is not None and scored.predictions == batches == kept.num_rows
    assert kept.num_row_groups <= 1 + batches // ROW_GROUP  # however few there are in a block
    rows = columns_of(pq.read_table(tmp_path / "predictions.parquet"))
    places = {x.id: k for k, x in enumerate(table)}
    for k, ts, up in zip(rows["instrument"], rows["ts"], rows["p_up_1s"]):
        assert np.float32(np.frombuffer(whole[places[k], ts][0]).reshape(-1, 3)[1, 2]).tobytes() == up.tobytes()
    assert scored.first == made[0].ts and scored.last == made[-1].ts and scored.model_version == serving.engine.model_version


def history(small: Small, session: Any) -> dict[tuple[int, int], tuple[Any, ...]]:
    """What the engine says of the whole history: by instrument and time what it makes of the votes, the regime, and the votes."""
    engine, whole = Engine.load(small.artifact, session[2]), {}
    for block in session[1]:
        p: Predictions = engine.predict(block)
        whole |= {(int(p.instrument[i]), int(p.ts[i])): i_row(p, i) for i in range(len(p.ts))}
    return whole


def i_row(p: Predictions, i: int) -> tuple[Any, ...]:
    direction = tuple(p.direction[i].tolist())
    return p.proba[i].tobytes(), p.magnitude[i].tobytes(), direction, int(p.regime[i]), p.votes[i].tobytes()


def test_a_process_that_hangs_holds_nobody_up_and_catches_up_with_the_newest(small: Small, session: Any, serving: Asked) -> None:
    """It passes over what newer batches have overtaken, not over their events: votes on the others are those of the whole history."""
    made = session[0]
    for v in made[:2_000]:
        serving.predict(v)
    serving.until(sum(len(v.closes) for v in made[:2_000]))
    os.kill(serving.process.pid or 0, signal.SIGSTOP)
    try:
        for v in made[2_000:]:
            serving.predict(v)
        assert serving.ring.words[HEAD] + serving.held == len(made) and serving.silent_ns() > 0
    finally:
        os.kill(serving.process.pid or 0, signal.SIGCONT)
    serving.until(sum(len(v.closes) for v in made))
    assert serving.skipped >= serving.passed > 100 and serving.lost == 0 and serving.silent_ns() == 0
    whole = history(small, session)
    for p in serving.got:
        assert (p.regime, p.votes.tobytes()) == whole[p.instrument, p.ts][3:]


def test_a_process_that_dies_leaves_no_model_and_no_exception(session: Any, serving: Asked) -> None:
    os.kill(serving.process.pid or 0, signal.SIGKILL)
    assert serving.finished.wait(WAIT_S)
    assert serving.fault == "the models' process has ended"
    for v in session[0][:200]:
        assert serving.predict(v) == ()
    assert serving.finish(WAIT_S) is None


def test_events_that_find_no_room_are_counted_and_the_stream_begins_anew(small: Small, session: Any) -> None:
    """A gap inside what the members remember would be worse than none: they forget, and answer again."""
    made, _, table = session
    serving = Asked(small, table, capacity=512)
    try:
        os.kill(serving.process.pid or 0, signal.SIGSTOP)
        for v in made[:1_000]:
            serving.predict(v)
        assert serving.lost == 1_000 - serving.held - 512
        os.kill(serving.process.pid or 0, signal.SIGCONT)
        serving.until(sum(len(v.closes) for v in made[:512]))
        before = serving.batches
        for v in made[1_000:1_400]:
            serving.predict(v)
        serving.until(before + sum(len(v.closes) for v in made[1_000:1_400]))
    finally:
        serving.close()


async def feed(serving: Serving, made: list[FeatureVector]) -> None:
    """A stream that waits for room."""
    for n, v in enumerate(made):
        serving.predict(v)
        if n % 256 == 0:
            await serving.room()


def stopped(serving: Asked, made: list[FeatureVector], held_up: bool) -> int:
    """Feed a stream that waits for room to a process that stands still, which goes on once the stream is `held_up`. Events lost."""

    async def both() -> None:
        feeding = asyncio.ensure_future(feed(serving, made))
        while held_up and serving.ring.waiting <= serving.ring.capacity // 2 and not feeding.done():
            await asyncio.sleep(0)
        if held_up:
            os.kill(serving.process.pid or 0, signal.SIGCONT)
        await asyncio.wait_for(feeding, WAIT_S)

    os.kill(serving.process.pid or 0, signal.SIGSTOP)
    asyncio.run(both())
    os.kill(serving.process.pid or 0, signal.SIGCONT)
    return serving.lost


def test_a_stream_that_can_wait_loses_nothing_to_models_that_are_late(small: Small, session: Any) -> None:
    made, _, table = session
    serving = Asked(small, table, capacity=2_048)
    try:
        assert stopped(serving, made, True) == 0
        serving.until(sum(len(v.closes) for v in made))
    finally:
        serving.close()


def test_a_stream_that_can_wait_waits_for_models_that_load(small: Small, session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long that takes: only models that were there and stand still are given up."""
    made, _, table = session
    serving, looks = Serving(Models(small.artifact, tuple(table)), lambda: 2**62, 2_048), 0
    os.kill(serving.process.pid or 0, signal.SIGSTOP)
    is_set = serving.ready.is_set

    def looked() -> bool:
        nonlocal looks
        looks += 1
        return is_set()

    async def both() -> None:
        feeding = asyncio.ensure_future(feed(serving, made))
        with monkeypatch.context() as m:
            m.setattr("cift_strategies.serving.STUCK_S", 0.0)
            m.setattr(serving.ready, "is_set", looked)
            while looks < 20 and not feeding.done():
                await asyncio.sleep(0)
        assert not is_set() and not feeding.done()
        os.kill(serving.process.pid or 0, signal.SIGCONT)
        await asyncio.wait_for(feeding, WAIT_S)

    try:
        asyncio.run(both())
        assert serving.lost == 0 and serving.ready.is_set() and serving.fault is None
    finally:
        serving.close()


def test_a_stream_does_not_wait_for_models_that_do_nothing(small: Small, session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cift_strategies.serving.STUCK_S", 0.0)
    made, _, table = session
    serving = Asked(small, table, capacity=2_048)
    try:
        assert stopped(serving, made, False) > 0
    finally:
        serving.close()


def test_models_are_swapped_between_two_batches_and_kept_where_the_new_ones_are_damaged(
    small: Small, session: Any, serving: Asked, tmp_path: Path
) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    shutil.copytree(small.artifact, good)
    shutil.copytree(small.artifact, bad)
    (bad / "manifest.json").write_text("{}")
    for v in session[0][:1_000]:
        serving.predict(v)
    told = serving.reload(good).result(WAIT_S)
    assert told["version"] == serving.engine.model_version and set(told["members"].values()) == {"kept"}
    with pytest.raises(InputError, match="manifest"):
        serving.reload(bad).result(WAIT_S)
    for never in ("0" * 300, str(tmp_path / ("0" * 5_000))):  # schemathesis sends such; no file can have the name
        with pytest.raises(InputError, match=r"cannot be read as trained models \(File name too long\)"):
            serving.reload(Path(never)).result(WAIT_S)
    assert serving.reloads == 1 and serving.fault is None
    for v in session[0][1_000:2_000]:
        serving.predict(v)
    serving.until(sum(len(v.closes) for v in session[0][:2_000]))


def test_a_full_disk_costs_the_report_and_not_the_models(small: Small, session: Any, tmp_path: Path) -> None:
    (tmp_path / "predictions.parquet").symlink_to("/dev/full")
    made, _, table = session
    serving, said = Asked(small, table, tmp_path), list[str]()
    serving.on_unkept = said.append
    try:
        for n, v in enumerate(made):
            serving.predict(v)
            if n % 500 == 0:
                serving.until(sum(len(v.closes) for v in made[: n + 1]))
        serving.until(sum(len(v.closes) for v in made))
        assert serving.fault is None and serving.finish(WAIT_S) is None
        assert said == [serving.unkept] and "No space left on device" in said[0]
    finally:
        serving.close()


def test_a_session_that_ends_while_models_load_does_not_wait_for_them(
    small: Small, session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = Serving(Models(small.artifact, tuple(session[2])), lambda: 0)
    try:
        os.kill(serving.process.pid or 0, signal.SIGSTOP)
        monkeypatch.setattr(serving.finished, "wait", lambda _seconds: pytest.fail("it is waited for"))
        assert serving.finish(WAIT_S) is None
    finally:
        serving.close()


def test_damaged_models_are_told_of_in_one_line(small: Small, session: Any, tmp_path: Path) -> None:
    shutil.copytree(small.artifact, tmp_path / "a")
    (tmp_path / "a" / "manifest.json").unlink()
    serving = Serving(Models(tmp_path / "a", tuple(session[2])), lambda: 0)
    try:
        assert serving.ready.wait(WAIT_S)
        assert serving.fault is not None and "manifest.json is missing" in serving.fault
    finally:
        serving.close()


@pytest.mark.skipif(not os.path.isdir("/dev/shm") or not os.statvfs("/dev/shm").f_blocks, reason="shared memory without a limit")
def test_shared_memory_that_the_machine_does_not_have_is_said_at_the_start_in_one_line_and_nothing_is_left_of_it() -> None:
    there = os.statvfs("/dev/shm")
    size = there.f_blocks * there.f_frsize
    with pytest.raises(InputError, match=r"^/dev/shm: No space left on device; .* MiB of shared memory .*--shm-size 256m\)$"):
        Ring(size // EVENT.itemsize)
    assert not [f for f in os.scandir("/dev/shm") if f.stat().st_size > size]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60))
def test_a_ring_gives_back_what_was_put_in_order_or_refuses_it_whole(steps: list[tuple[bool, int]]) -> None:
    ring = Ring(64)
    try:
        put: list[int] = []
        taken: list[int] = []
        lost = number = 0
        for putting, n in steps:
            if putting:
                events = np.zeros(n, EVENT)
                events["ts_init"] = np.arange(number, number + n)
                rows = np.repeat(events["ts_init"].astype(float)[:, None], len(NAMES), axis=1)
                room = 64 - (len(put) - len(taken))
                assert ring.put(events, rows, 0, n, (n - 1,), number) == (n <= room)
                if n <= room:
                    put += events["ts_init"].tolist()
                else:
                    lost += n
                number += n
            else:
                got, features, _, closing = ring.take(n)
                assert (features == got["ts_init"][:, None]).all()
                taken += got["ts_init"].tolist()
                assert len(closing) == len(got) <= n
        assert taken == put[: len(taken)] and ring.waiting == len(put) - len(taken) and ring.words[LOST] == lost
    finally:
        ring.close()
        ring.memory.unlink()
