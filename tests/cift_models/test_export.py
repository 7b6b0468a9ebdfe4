"""Exported features and labels are those that training sees, whatever the cut of the stream."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from catalog.errors import InputError
from catalog.events import read_catalog
from cift_models import export
from cift_models.features import NAMES, replay
from cift_models.labels import LABELS, Labeller
from cift_models.windows import closes, new_batches

BINANCE, IDS = "catalogs/binance-2024-08-08", ["BTCUSDT-PERP.BINANCE", "ETHUSDT-PERP.BINANCE"]
END = int(np.datetime64("2024-08-08T23:55:30", "ns").astype(np.int64))


@pytest.fixture(scope="module")
def whole(data):
    instruments, blocks = read_catalog(data / BINANCE, IDS, None, END)
    events = np.concatenate(list(blocks))
    rows, at = replay(events, instruments), closes(new_batches(2), events)
    labeller = Labeller(instruments)
    outcomes = [labeller.push(events, np.ascontiguousarray(rows[:, NAMES.index("mid")]), at), labeller.finish()]
    return events, rows, at, outcomes


def test_each_row_is_the_feature_row_of_a_decision_with_its_labels(data, tmp_path, whole):
    events, rows, at, outcomes = whole
    n = export.write(data / BINANCE, tmp_path / "f.parquet", IDS, None, END)
    table = pq.read_table(tmp_path / "f.parquet")
    assert n == len(at) == len(table)
    for k, name in enumerate(IDS):
        mine = at[events["instrument"][at] == k]
        got = table.filter(np.array(table["instrument"].to_pylist()) == name)
        assert np.array_equal(got["ts"].cast("int64").to_numpy(), events["ts_init"][mine])
        for j, feature in enumerate(NAMES):
            assert np.array_equal(got[feature].to_numpy(), rows[mine, j], equal_nan=True)
        for j, label in enumerate(LABELS):
            move, known = np.full(len(mine), np.nan), np.zeros(len(mine), np.int64)
            for o in outcomes:
                hit = (o.instrument == k) & (o.label == j)
                move[o.serial[hit]], known[o.serial[hit]] = o.move[hit], o.known_at[hit]
            assert np.array_equal(got[f"move {label}"].to_numpy(), move, equal_nan=True)
            assert got[f"known {label}"].null_count == (known == 0).sum()
            assert np.array_equal(got[f"known {label}"].cast("int64").fill_null(0).to_numpy(), known)


def test_small_row_groups_give_the_same_rows(data, tmp_path, monkeypatch):
    export.write(data / BINANCE, tmp_path / "a.parquet", IDS[:1], None, END)
    monkeypatch.setattr(export, "GROUP", 10)
    export.write(data / BINANCE, tmp_path / "b.parquet", IDS[:1], None, END)
    a, b = (pq.read_table(tmp_path / f"{x}.parquet") for x in "ab")
    assert a.equals(b) or np.array_equal(a["move 5s"].to_numpy(), b["move 5s"].to_numpy(), equal_nan=True)
    assert pq.ParquetFile(tmp_path / "b.parquet").metadata.num_row_groups >= 2


def test_a_place_that_cannot_be_written_is_refused_and_nothing_is_left(data, tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        export.write(data / BINANCE, tmp_path / "no/f.parquet", IDS[:1], None, END)
    with pytest.raises(InputError, match="is not there"):
        export.write(data / BINANCE, tmp_path / "f.parquet", ["NOPE"], None, END)
    assert list(tmp_path.iterdir()) == []
