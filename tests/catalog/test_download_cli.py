"""`python -m catalog download`: the price first, then the data, then a catalog; and `export`, which hands over."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_catalog_cli import ROOT, run
from test_historical import service  # noqa: F401  the fixture

from catalog import importer, status
from catalog.events import read_catalog, trading_state

ASK = ("XNAS.ITCH", "--symbols", "AAA", "--start", "2024-01-04", "--end", "2024-01-06")


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(importer, "STORE", tmp_path / "store")
    return tmp_path / "store"


def test_without_a_terminal_and_without_yes_the_price_is_told_and_nothing_bought(service, store, monkeypatch, capsys):  # noqa: F811
    code, _, err = run(monkeypatch, capsys, "download", *ASK)
    assert code == 2 and "the download costs $0.54 and there is no terminal to ask on: add --yes" in err
    assert not any("get_range " in a for a in service.asked) and not store.exists()


def test_what_is_paid_for_is_downloaded_and_imported_and_not_paid_again(service, store, tmp_path, monkeypatch, capsys):  # noqa: F811
    code, out, err = run(monkeypatch, capsys, "download", *ASK, "--yes", "--out", tmp_path / "c", "--json")
    assert code == 0 and "1,006 records in 6 files" in err and "cost $0.54" in err
    found = json.loads(out.splitlines()[-1])
    assert found["counts"] == {"order_book_deltas": 1_000, "trades": 0} and found["root"] == str(tmp_path / "c")
    assert [i["id"] for i in found["instruments"]] == ["AAA.XNAS"] and len(list((store / "databento").glob("*.zst"))) == 6
    when, state = trading_state(tmp_path / "c", "AAA.XNAS")
    assert list(state) == [status.OPEN, status.HALTED] * 2 and np.all(np.diff(when) > 0), "halts work without further action"
    halts = read_catalog(tmp_path / "c")[0][0].pauses
    assert [b - a for a, b in halts[:1]] == [(86_400 - 3_600) * 10**9] and len(halts) == 2
    service.asked.clear()
    code, out, _ = run(monkeypatch, capsys, "download", *ASK, "--out", tmp_path / "c", "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["reused"]
    assert not any("get_range " in a or "get_cost" in a for a in service.asked)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("n", 2), ("", 2)])
def test_on_a_terminal_the_user_is_asked(service, store, tmp_path, monkeypatch, capsys, answer, code):  # noqa: F811
    monkeypatch.setattr(sys, "stdin", Terminal(answer + "\n"))
    got, _, err = run(monkeypatch, capsys, "download", *ASK, "--out", tmp_path / "c")
    assert got == code and (tmp_path / "c").exists() == (code == 0)
    assert code == 0 or "declined: nothing was downloaded" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a Databento dataset"),
        (("XNAS.ITCH", "--polygon", "AAPL", "--start", "2024-01-04", "--end", "2024-01-05"), "one of them"),
        (("XNAS.ITCH", "--symbols", "AAA"), "give --start and --end"),
        (("--polygon", "AAPL", "--start", "2024-01-05", "--end", "2024-01-04"), "nothing to download"),
        (("--polygon", "AAPL", "--start", "2024-01-04", "--end", "2024-01-05"), "POLYGON_API_KEY"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_in_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.delenv("POLYGON_API_KEY", raising=False)
    code, _, err = run(monkeypatch, capsys, "download", *arguments)
    assert code == 2 and message in err and len(err.splitlines()) == 1


def test_export_writes_features_and_labels_with_the_time_each_was_known(data, tmp_path):
    root = Path(data) / "catalogs/binance-2024-08-08"
    out = tmp_path / "f.parquet"
    arguments = ["export", str(root), "--symbols", "BTCUSDT-PERP", "--end", "2024-08-08T23:55:00", "--out", str(out)]
    done = subprocess.run([sys.executable, "-m", "catalog", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = pq.read_table(out)
    assert f"{len(table):,} decisions" in done.stdout and len(table) > 100
    assert {"ts", "instrument", "feed", "mid", "spread", "move 1s", "known 1s"} <= set(table.column_names)
    for label in (c[5:] for c in table.column_names if c.startswith("move ")):
        known = table[f"known {label}"].combine_chunks()
        waits = known.drop_null().cast("int64").to_numpy() - table["ts"].combine_chunks().filter(known.is_valid()).cast("int64").to_numpy()
        assert (waits > 0).all() or label.endswith("events")
        assert (waits >= 0).all()
    done = subprocess.run([sys.executable, "-m", "catalog", "export", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2


def test_a_backtest_resolves_its_data_through_the_api(service, store, monkeypatch):  # noqa: F811
    from catalog.errors import InputError
    from cift_strategies.backtest import RunConfig, resolve

    monkeypatch.setattr(sys, "stdin", io.StringIO())
    day = 86_400 * 10**9
    start = 19_726 * day  # 2024-01-04
    asked = RunConfig(databento="XNAS.ITCH", symbols=("AAA",), start=start, end=start + 2 * day)
    with pytest.raises(InputError, match="add --yes"):
        resolve(asked)
    found = resolve(asked.model_copy(update={"pay": True}))
    assert [x.id for x in found.instruments] == ["AAA.XNAS"] and found.name == "AAA-XNAS.ITCH" and found.quality is not None
    for change, message in [({"start": None}, "needs a range"), ({"end": start}, "is empty"), ({"polygon": ("AAA",)}, "choose one source")]:
        with pytest.raises(InputError, match=message):
            resolve(asked.model_copy(update=change))
