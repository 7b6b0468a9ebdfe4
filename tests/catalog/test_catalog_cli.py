"""The command line: what it prints, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from catalog import __main__ as cli
from catalog.errors import InputError, exit_code

ROOT = Path(__file__).parents[2]
ES = "databento/esh4-glbx-mdp3-20231225.mbo.dbn.zst"
BINANCE = "catalogs/binance-2024-08-08"


def run(monkeypatch, capsys, *arguments):
    """(exit code, standard output, standard error) of `python -m catalog ...`, within this process."""
    monkeypatch.setattr(sys, "argv", ["catalog", *map(str, arguments)])
    code = exit_code(cli.main)
    out = capsys.readouterr()
    return code, out.out, out.err


def test_import_tells_what_came_in_and_where_it_lies(data, tmp_path, monkeypatch, capsys):
    arguments = "import", data / ES, "--out", tmp_path / "c", "--instruments", ROOT / "docs/instruments/esh4.toml"
    code, out, _ = run(monkeypatch, capsys, *arguments)
    assert code == 0
    for words in ("59,448 order book deltas, 2,973 trades of ESH4.GLBX", "97 trades", "crossed", "891", str(tmp_path / "c")):
        assert words in out
    code, out, _ = run(monkeypatch, capsys, *arguments, "--json")
    found = json.loads(out)
    assert code == 0 and found["reused"] and found["counts"]["trades"] == 2_973 and found["quality"]["crossed"] == 891


def test_describe_tells_what_a_catalog_holds_and_what_a_backtest_takes(data, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "describe", data / BINANCE)
    assert code == 0
    for words in ("BTCUSDT-PERP.BINANCE", "427,516", "2024-08-08T23:54", "a backtest of all 1,456,836 events: about"):
        assert words in out
    code, out, _ = run(monkeypatch, capsys, "describe", data / BINANCE, "--json")
    found = json.loads(out)
    assert code == 0 and sum(f["rows"] for f in found["files"]) == 1_456_836 == found["estimate"]["events"]


def test_describe_tells_what_a_file_holds(data, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "describe", data / ES, "--json")
    found = json.loads(out)
    assert code == 0 and found["events"] == {"ESH4.GLBX": {"A": 29_216, "C": 17_999, "M": 12_233, "T": 2_973}}
    code, out, _ = run(monkeypatch, capsys, "describe", data / "databento/esu4-glbx-mdp3-20240701.definition.dbn.zst")
    assert code == 0 and "ESU4.GLBX" in out and "NQU4.GLBX" in out


def test_each_schema_of_databento_is_described_or_refused_in_one_line(data, monkeypatch, capsys):
    refused = set()
    for file in sorted((data / "databento/schemas").iterdir()):
        schema = file.name.removeprefix("test_data.").removesuffix(".dbn.zst")
        code, out, err = run(monkeypatch, capsys, "describe", file)
        if code:
            refused.add(schema)
            assert (code, out, len(err.splitlines())) == (2, "", 1) and f"holds {schema}, which is not read" in err
        else:
            assert {"status": "pre open", "definition.option": "2 spreads or options, which are not read"}.get(schema, "") in out and out
    assert refused == {"statistics", "imbalance", *(f"ohlcv-1{unit}" for unit in "dhms")}


@pytest.mark.parametrize("place", [ES, BINANCE])
def test_check_counts_faults_of_files_and_catalogs(data, monkeypatch, capsys, place):
    code, out, _ = run(monkeypatch, capsys, "check", data / place, "--json")
    found = json.loads(out)
    assert code == 0 and found["counts"]["crossed"] == (891 if place == ES else 0)
    code, out, _ = run(monkeypatch, capsys, "check", data / place)
    assert code == 0 and ("crossed" if place == ES else "nothing wrong was found") in out


@pytest.mark.parametrize("command", ["import", "describe", "check"])
def test_wrong_input_ends_with_2_and_one_line(tmp_path, monkeypatch, capsys, command):
    (tmp_path / "x.dbn").write_text("a,b,c")
    for name in ("x.dbn", "absent"):
        code, out, err = run(monkeypatch, capsys, command, tmp_path / name)
        assert (code, out, len(err.splitlines())) == (2, "", 1) and str(tmp_path / name) in err


def test_wrong_arguments_end_with_2(monkeypatch, capsys):
    assert run(monkeypatch, capsys, "import")[0] == 2
    assert run(monkeypatch, capsys, "describe", "x", "--colour")[0] == 2
    assert run(monkeypatch, capsys, "import", "x", "--start", "yesterday")[0] == 2


def test_ctrl_c_ends_with_130(monkeypatch, capsys, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "Dbn", interrupt)
    (tmp_path / "x.dbn").write_bytes(b"DBN")
    code, _, err = run(monkeypatch, capsys, "describe", tmp_path / "x.dbn")
    assert code == 130 and "interrupted" in err


@pytest.mark.parametrize(("typed", "ns"), [("1970-01-02", 86_400 * 10**9), ("1970-01-01T00:00:01Z", 10**9), ("17", 17), (None, None)])
def test_a_time_is_read_as_utc(typed, ns):
    assert cli.nanoseconds(typed) == ns


def test_what_is_no_time_is_refused():
    with pytest.raises(InputError, match="is no time"):
        cli.nanoseconds("noon")


def test_the_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "catalog", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and all(c in done.stdout for c in ("import", "describe", "check"))
