"""What a recording promises: files are whole or not there, a change shows, and what is missing is said."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from tapes import SHARE

from catalog.errors import InputError
from catalog.events import ADD, EVENT, F_LAST, SCALE
from cift_models.features import replay
from cift_models.windows import Block
from cift_strategies import parts
from cift_strategies.compared import Compared, Recorded, compare_orders
from cift_strategies.parts import Parts, read
from cift_strategies.recording import MANIFEST, Recording, _events, digested
from cift_strategies.session_replay import Blocks

ROOT = Path(__file__).parents[2]


def numbers(a: int, b: int) -> pa.Table:
    return pa.table({"n": pa.array(range(a, b), pa.int64())})


def kept(folder: Path) -> tuple[list[int], list[str]]:
    said: list[str] = []
    return [n for t in read(folder, said) for n in t["n"].to_pylist()], said


# --- parts ----------------------------------------------------------------------------------------------------------------------------


def test_parts_come_back_in_order_however_they_were_cut_and_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "EVERY_S", 0.0)  # a file for each piece
    monkeypatch.setattr(parts, "MANY", 7)
    writer = Parts(tmp_path / "numbers")
    for n in range(0, 400, 4):
        assert writer.add(partial(numbers, n, n + 4))
    writer.close()
    assert kept(tmp_path / "numbers") == (list(range(400)), []) and writer.rows == 400
    assert len(list((tmp_path / "numbers").iterdir())) < 100 / 7 + 7


def test_a_merge_that_was_cut_off_doubles_nothing(tmp_path: Path) -> None:
    for n in range(3):
        pq.write_table(numbers(n, n + 1), tmp_path / f"{n:08}.parquet")
    pq.write_table(numbers(0, 2), tmp_path / "00000000-00000001.parquet")
    (tmp_path / ".part").write_bytes(b"PAR1")
    assert kept(tmp_path) == ([0, 1, 2], [])


def test_a_torn_last_part_is_left_out_and_said_so_and_a_hole_is_an_error(tmp_path: Path) -> None:
    for n in range(3):
        pq.write_table(numbers(n, n + 1), tmp_path / f"{n:08}.parquet")
    last = tmp_path / "00000002.parquet"
    last.write_bytes(last.read_bytes()[:-20])
    found, said = kept(tmp_path)
    assert found == [0, 1] and len(said) == 1 and "torn" in said[0] and last.name in said[0]
    (tmp_path / "00000001.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"00000001\.parquet is damaged"):
        kept(tmp_path)
    (tmp_path / "00000001.parquet").unlink()
    with pytest.raises(InputError, match="lacks a part"):
        kept(tmp_path)


KILLED = """
import sys, time
from functools import partial
from pathlib import Path
import pyarrow as pa
from cift_strategies.parts import Parts
writer, n = Parts(Path(sys.argv[1])), 0
while True:
    writer.add(partial(lambda n: pa.table({"n": pa.array(range(n, n + 50), pa.int64())}), n))
    n += 50
    while writer._queue.qsize() > 20:
        time.sleep(0.001)
    if n % 2_000 == 0:
        print(n, writer.rows, flush=True)
"""


def test_a_killed_process_leaves_whole_parts_of_all_but_its_last_moments(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "numbers")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    written = 0
    for line in process.stdout:
        written = int(line.split()[1])
        if len(list((tmp_path / "numbers").glob("*.parquet"))) >= 3 and written:
            break
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    found, said = kept(tmp_path / "numbers")
    assert found == list(range(len(found))) and len(found) >= written > 0 and said == []


def test_a_disk_that_cannot_be_written_ends_the_recording_and_nothing_else(tmp_path: Path) -> None:
    writer = Parts(tmp_path / "numbers")
    (tmp_path / "numbers").rmdir()
    (tmp_path / "numbers").write_text("no folder any more")
    assert writer.add(partial(numbers, 0, 5))
    writer.close()
    assert "cannot be written" in writer.fault and not writer.add(partial(numbers, 5, 9))


# --- digests and comparisons ----------------------------------------------------------------------------------------------------------


def test_any_bit_of_any_row_changes_its_digest_alone() -> None:
    rows = np.random.default_rng(1).normal(size=(200, 63))
    before = digested(rows)
    assert len(set(before.tolist())) == 200
    words = rows.view(np.uint64)
    for i, j, bit in ((0, 0, 0), (7, 62, 63), (199, 31, 52), (100, 5, 1)):
        words[i, j] ^= np.uint64(1) << np.uint64(bit)
        assert np.flatnonzero(digested(rows) != before).tolist() == [i]
        words[i, j] ^= np.uint64(1) << np.uint64(bit)
    assert digested(np.full((2, 3), np.nan, np.float32))[0] == digested(np.full((2, 3), np.nan, np.float32))[1]


def events(n: int) -> NDArray[np.void]:
    out = np.zeros(n, EVENT)
    i = np.arange(n)
    out["ts_init"] = out["ts_event"] = 1_700_000_000 * SCALE + i * 1_000_000
    out["order_id"], out["action"], out["flags"], out["size"] = i + 1, ADD, F_LAST, SCALE
    out["side"] = np.where(i % 2, 1, -1)
    out["price"] = 100 * SCALE - out["side"].astype(np.int64) * (1 + i % 9) * (SCALE // 100)
    return out


def recorded(folder: Path, tape: NDArray[np.void], rows: NDArray[np.float64], came: NDArray[np.int64]) -> Recording:
    (folder / "events").mkdir(parents=True)
    for n, at in enumerate(range(0, len(tape), 100)):
        b = at + 100
        pq.write_table(_events(tape[at:b], rows[at:b], came[at:b]), folder / "events" / f"{n:08}.parquet")
    (folder / MANIFEST).write_text(json.dumps({"instruments": [asdict(SHARE)], "ended": 1, "fault": ""}))
    return Recording(folder)


def test_each_feature_row_that_is_not_equal_is_listed(tmp_path: Path) -> None:
    tape = events(350)
    rows = replay(tape, [SHARE])
    came = np.arange(1, 351)
    rows.view(np.uint64)[[41, 300], [3, 60]] ^= np.uint64(1)
    found = Compared()
    blocks = list(Blocks(recorded(tmp_path, tape, rows, came), found))
    assert found.recorded == 350 and found.equal == 348
    assert [(d["event"], d["ts"]) for d in found.differ] == [(i, int(tape["ts_init"][i])) for i in (41, 300)]
    assert np.concatenate([b.events for b in blocks]).tobytes() == tape.tobytes()


def test_a_message_that_did_not_come_whole_is_left_out_and_one_astride_two_parts_is_not(tmp_path: Path) -> None:
    tape = events(250)
    came = np.zeros(250, np.int64)
    came[[49, 129, 219]] = 5, 6, 7  # the second message lies in two parts
    chunks = list(recorded(tmp_path, tape, replay(tape, [SHARE]), came).stream())
    assert np.concatenate([c.events for c in chunks]).tobytes() == tape[:220].tobytes()
    assert [c.came.tolist() for c in chunks] == [[5], [6], [7]] and [c.ends.tolist() for c in chunks] == [[50], [80], [90]]


def predictions(
    ts: list[int], instrument: list[int], votes: list[int], mix: list[int], at: list[int] | None = None, numbered: bool = True
) -> Recorded:  # fmt: skip
    columns = {"at": at or ts, "instrument": instrument, "ts": ts, "latency_ns": [3] * len(ts), "votes_digest": votes, "mix_digest": mix}
    return Recorded(pa.table({k: pa.array(v, pa.int64()) for k, v in columns.items()}), numbered)


def test_predictions_are_compared_one_by_one_and_cut_ends_are_no_differences() -> None:
    one = predictions([1, 1, 2, 3, 9], [0, 0, 1, 0, 0], [5, 6, 7, 8, 9], [1, 1, 1, 1, 1])
    again = predictions([1, 1, 2, 5], [0, 0, 1, 0], [5, 0, 7, 1], [1, 1, 0, 1])
    one._mine = [(again.instrument, again.ts, again._votes, again._mix)]
    found = one.compare([SHARE, SHARE], newest=6)
    assert (found.recorded, found.equal, found.cut_off) == (5, 1, 1)  # the one of 9 saw events that were not recorded
    assert [(d["ts"], d["what"]) for d in found.differ] == [
        (1, "votes"), (2, "what the ensemble makes of the votes"), (3, "not made again"), (5, "was not made in the session")
    ]  # fmt: skip


def test_a_batch_that_was_passed_over_is_not_predicted_again_and_one_that_was_cut_off_is() -> None:
    kept = predictions([1, 2, 3], [0, 0, 0], [1, 2, 3], [1, 2, 3], at=[2, 7, 11])
    tape = events(20)
    parts = [Block(tape[:9], np.zeros((9, 1)), np.array([2, 4, 7])), Block(tape[9:], np.zeros((11, 1)), np.array([0, 2, 8]))]
    asked = [(b.closes.tolist(), None if b.batches is None else b.batches.tolist()) for b in kept.asking(parts)]
    assert asked == [([2, 7], [2, 4, 7]), ([2, 8], [0, 2, 8])] and kept.passed == 2
    assert [b.closes.tolist() for b in predictions([1], [0], [1], [1], at=[2], numbered=False).asking(parts)] == [[2, 4, 7], [0, 2, 8]]


def test_orders_are_compared_by_what_they_belong_to_in_terms_and_outcome() -> None:
    def order(number: int, role: str, signal: int, event: str, **more: str) -> tuple[int, int, str, object]:
        return 0, 0, "order", {"event": event, "instrument": "A.X", "role": role, "number": number, "signal": signal, **more}

    terms = {"side": "BUY", "quantity": "5", "price": "1.00"}
    live = [order(0, "entry", 10, "OrderSubmitted", **terms), order(0, "entry", 10, "OrderFilled", last_qty="5", last_px="1.00"),
            order(1, "entry", 20, "OrderSubmitted", **terms), order(2, "exit", 20, "OrderSubmitted", **terms)]  # fmt: skip
    again = [order(0, "entry", 20, "OrderSubmitted", **{**terms, "price": "2.00"}), order(1, "entry", 10, "OrderSubmitted", **terms),
             order(1, "entry", 10, "OrderFilled", last_qty="5", last_px="0.99")]  # fmt: skip
    assert compare_orders(live, live).told() == {"recorded": 3, "equal": 3, "cut_off": 0, "differ": []}
    found = compare_orders(live, again)
    said = {(d["signal"], d["role"]): d["what"] for d in found.differ}
    assert found.equal == 0 and said == {
        (10, "entry"): "what came of it: filled 5 1.00 / filled 5 0.99", (20, "entry"): "terms: price 1.00 / 2.00",
        (20, "exit"): "not sent again",
    }  # fmt: skip


def test_a_folder_without_a_session_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no recorded session"):
        Recording(tmp_path)
