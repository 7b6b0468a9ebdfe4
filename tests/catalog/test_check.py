"""`python -m catalog check` on damaged files of every kind: what is wrong is counted, the first of each named."""

from __future__ import annotations

import json

import numpy as np
import pytest
import zstandard
from test_catalog_cli import run
from test_databento import DAY, SESSION, head, mbo, write

from catalog.databento import import_dbn
from catalog.dbn import MBO
from catalog.parquet import iso
from catalog.quality import KINDS


def found(monkeypatch, capsys, path, code=0):
    got, out, err = run(monkeypatch, capsys, "check", path, "--json")
    assert got == code, err
    report = json.loads(out)
    counts = {k: n for k, n in report["counts"].items() if n}
    assert set(counts) == set(report["first"]) and set(report["counts"]) == set(KINDS)
    return counts, report["first"], report["damage"], err


QUIET = [(10 * n, "A", "B", 1000 - n, 5, n + 1, 128) for n in range(50)]


def faulty(kind):
    """Sound records, of which number 40 (and for some kinds those that follow) is wrong in one way."""
    rows = mbo(*QUIET)
    r = rows[40]
    if kind == "unknown_cancel":
        r["action"], r["order_id"] = ord("C"), 999
    elif kind == "unknown_modify":
        r["action"], r["order_id"] = ord("M"), 999
    elif kind == "duplicate_add":
        r["order_id"] = 7
    elif kind == "ts_init_backwards":
        r["ts_recv"] -= np.uint64(300)
    elif kind == "ts_event_backwards":
        r["ts_event"] -= np.uint64(300)
    elif kind == "sequence_gap":
        rows["sequence"][40:] += 5
    elif kind == "sequence_backwards":
        r["sequence"] = 3
    elif kind == "crossed":
        r["side"], r["price"] = ord("A"), 990 * 10**7
    elif kind == "locked":
        r["side"], r["price"] = ord("A"), 1000 * 10**7
    elif kind == "zero_size":
        r["size"] = 0
    elif kind == "undefined_price":
        r["price"] = 2**63 - 1
    elif kind == "maybe_bad_book":
        r["flags"] |= 4
    elif kind == "bad_ts_recv":
        r["flags"] |= 8
    elif kind == "off_tick":
        r["price"] += 1
    elif kind == "no_side":
        r["side"] = ord("N")
    elif kind == "bad action":
        r["action"] = ord("Z")
    elif kind == "bad side":
        r["side"] = ord("?")
    elif kind == "no time":
        r["ts_recv"] = r["ts_event"] = 2**64 - 1
    return rows


@pytest.mark.parametrize(
    "kind",
    ["unknown_cancel", "unknown_modify", "duplicate_add", "ts_init_backwards", "ts_event_backwards", "sequence_gap", "sequence_backwards",
     "crossed", "locked", "zero_size", "undefined_price", "maybe_bad_book", "bad_ts_recv", "off_tick", "no_side",
     "bad action", "bad side", "no time"],
)  # fmt: skip
def test_the_first_of_each_fault_is_named_by_file_time_and_sequence(tmp_path, monkeypatch, capsys, kind):
    rows = faulty(kind)
    path = write(tmp_path, rows, name="market")
    counts, first, damage, _ = found(monkeypatch, capsys, path)
    name = "bad_record" if " " in kind else kind
    at, ts = first[name], int(rows["ts_recv"][40]) if kind != "no time" else 2**63 - 1
    assert (at["position"], at["ts"], at["sequence"], at["file"]) == (40, ts, rows["sequence"][40], "market.mbo.dbn.zst")
    assert damage is None and counts.pop(name) == (10 if kind in ("crossed", "locked") else 1)
    assert set(counts) <= {"sequence_gap", "unknown_cancel"}, "what follows from it, and nothing else"
    _, out, _ = run(monkeypatch, capsys, "check", path)
    assert name in out and f"{rows['sequence'][40]}" in out and "market.mbo.dbn.zst" in out


def test_bad_records_are_left_out_one_by_one_and_the_rest_is_checked(tmp_path, monkeypatch, capsys):
    rows = mbo(*QUIET)
    rows["action"][[10, 11, 30]], rows["side"][12] = ord("?"), ord("x")
    counts, first, _, _ = found(monkeypatch, capsys, write(tmp_path, rows))
    assert counts["bad_record"] == 4 and first["bad_record"]["position"] == 10
    with pytest.raises(Exception, match="damaged at record 10: it has no known action"):
        import_dbn([tmp_path / "x.mbo.dbn.zst"], tmp_path / "c")


@pytest.mark.parametrize("damage", ["cut within a record", "cut zstd frame", "record of length 0", "record of another length", "garbage"])
def test_what_lies_before_the_damage_is_checked_and_the_damage_told_in_one_line(tmp_path, monkeypatch, capsys, damage):
    rows = np.concatenate([faulty("unknown_cancel"), mbo(*((600 + n, "A", "B", 900 - n % 99, 5, 100 + n, 128) for n in range(60_000)))])
    path, content = write(tmp_path, rows, zipped=damage == "cut zstd frame"), head({"AAA": 1})
    at = len(content) + 50_000 * MBO.itemsize
    whole = bytearray(path.read_bytes())
    if damage == "cut within a record":
        whole = whole[: at + 20]
    elif damage == "cut zstd frame":
        whole = bytearray(zstandard.compress(content + rows.tobytes(), 0))
        whole = whole[: len(whole) * 9 // 10]
    elif damage == "record of length 0":
        whole[at] = 0
    elif damage == "record of another length":
        whole[at] = 20
    else:
        whole[at : at + 200] = b"\xff" * 200
    path.write_bytes(whole)
    counts, first, told, err = found(monkeypatch, capsys, path, code=2)
    assert counts["unknown_cancel"] == 1 and first["unknown_cancel"]["position"] == 40
    assert told is not None and str(path) in told and len([x for x in err.splitlines() if x.startswith("error")]) == 1
    assert "record 50,000" in told or damage == "cut zstd frame"


def test_the_first_fault_of_a_catalog_is_named_by_its_parquet_file(tmp_path, monkeypatch, capsys):
    root = import_dbn([write(tmp_path, np.concatenate([SESSION, mbo((60, "C", "B", 1000, 5, 77, 128))]))], tmp_path / "c").root
    counts, first, _, _ = found(monkeypatch, capsys, root)
    assert counts["unknown_cancel"] == 1 and first["unknown_cancel"]["ts"] == DAY + 60
    assert (root / first["unknown_cancel"]["file"]).is_file() and "order_book_deltas" in first["unknown_cancel"]["file"]


def test_an_import_names_the_file_of_the_first_of_each_fault(tmp_path, monkeypatch, capsys):
    second = mbo((0, "A", "B", 1000, 5, 50, 128), (1, "C", "B", 1000, 5, 51, 128))
    for stamp in ("ts_recv", "ts_event"):
        second[stamp] += np.uint64(10**9)
    files = [write(tmp_path, faulty("duplicate_add"), name="one"), write(tmp_path, second, name="two")]
    code, out, _ = run(monkeypatch, capsys, "import", *files, "--out", tmp_path / "c", "--json")
    first = json.loads(out)["first"]
    assert code == 0 and first["duplicate_add"]["file"] == "one.mbo.dbn.zst"
    assert (first["unknown_cancel"]["file"], first["unknown_cancel"]["position"]) == ("two.mbo.dbn.zst", 1)
    assert first["unknown_cancel"]["time"] == iso(DAY + 10**9 + 1)
    _, out, _ = run(monkeypatch, capsys, "import", *files, "--out", tmp_path / "c", "--json")
    assert json.loads(out)["first"] == first and json.loads(out)["reused"]
