"""The command line: what it answers, with which code, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from conftest import EAGER, Small
from tapes import Tape, write

from cift_strategies.serving import CAPACITY, Ring

ROOT = Path(__file__).resolve().parents[2]


def backtest(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join((str(ROOT), str(Path(__file__).parent)))
    return subprocess.run(
        [sys.executable, str(ROOT / "run_backtest.py"), *map(str, arguments)], capture_output=True, text=True, timeout=300, cwd=cwd or ROOT,
        env={**os.environ, "PYTHONPATH": paths}, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(small: Small, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("cli")
    path = config(folder, f'strategy = "{EAGER}"')
    return folder / "o" / "out", backtest(
        "--catalog", small.catalog, "--artifacts", small.artifact, "--config", path, "--out", folder / "o" / "out", "--json"
    )


def test_the_summary_is_the_last_line(finished: tuple[Path, subprocess.CompletedProcess[str]], small: Small) -> None:
    out, done = finished
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["digest"] == small.result.digest and told["callback_errors"] == 0
    assert told == json.loads((out / "summary.json").read_text())
    assert str(out / "report.html") in done.stdout and (out / "report.html").is_file()


def test_an_estimate_comes_first_and_nothing_is_left_beside_the_output(
    finished: tuple[Path, subprocess.CompletedProcess[str]], small: Small
) -> None:
    out, done = finished
    assert f"{small.result.summary['events']:,} events" in done.stderr.splitlines()[0]
    assert "Traceback" not in done.stderr and list(out.parent.iterdir()) == [out]


def config(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("when", ["streaming", "training"])
def test_ctrl_c_leaves_nothing_that_looks_finished(small: Small, tmp_path: Path, when: str) -> None:
    if when == "streaming":
        text, more = 'strategy = "own_strategies:Interrupted"\nrule = false', ["--artifacts", small.artifact]
    else:
        text, more = 'train = ["hmm"]\nmembers = ["own_strategies:InterruptedMember"]', ["--train-fraction", "0.5"]
    done = backtest("--catalog", small.catalog, "--config", config(tmp_path, text), "--out", tmp_path / "o" / "out", *more)
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not list((tmp_path / "o").iterdir())


def test_a_fault_in_a_callback_is_told_once_with_its_traceback(small: Small, tmp_path: Path) -> None:
    path = config(tmp_path, 'strategy = "own_strategies:Raising"\nrule = false')
    done = backtest("--catalog", small.catalog, "--artifacts", small.artifact, "--config", path, "--out", tmp_path / "o" / "out")
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1 and done.stderr.count("ArithmeticError: a fault of the strategy") == 1
    assert "own_strategies.py" in done.stderr and not list((tmp_path / "o").iterdir())


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--nope"], "--nope"),
        (["--catalog", "nowhere"], "nowhere"),
        (["--dbn", "nowhere.dbn.zst"], "nowhere.dbn.zst"),
        (["--dbn", "a.dbn", "--catalog", "b"], "both"),
        (["stray.dbn"], "stray.dbn"),
        (["--train-fraction", "1.5"], "--train-fraction"),
        (["--latency-ms", "soon"], "soon"),
        (["--latency-ms", "-1"], "-1"),
        (["--device", "abacus"], "--device"),
        (["--start", "yesterday", "--catalog", "b"], "yesterday"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
        (["--symbols", "A"], "--symbols"),
        (["--instruments", "x.toml"], "--instruments"),
    ],
)
def test_what_the_user_got_wrong_is_one_line(tmp_path: Path, arguments: list[str], names: str) -> None:
    done = backtest(*arguments, "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and names in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "names"),
    [("seeed = 1", "seeed"), ("[limits]\nmax_losses = 1", "limits.max_losses"), ("seed = ", "valid TOML"), ('seed = "x"', "seed")],
)
def test_an_unknown_key_of_the_configuration_is_named(tmp_path: Path, text: str, names: str) -> None:
    path = config(tmp_path, text)
    done = backtest("--config", path, cwd=tmp_path)
    assert done.returncode == 2 and names in done.stderr and str(path) in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_wrong_setting_of_a_model_is_named_before_any_data_are_made(tmp_path: Path) -> None:
    done = backtest("--config", config(tmp_path, "[models.hmm]\nstartz = 1"), cwd=tmp_path)
    assert done.returncode == 2 and "[hmm] startz is no setting: choose among starts" in done.stderr
    assert [f.name for f in tmp_path.iterdir()] == ["run.toml"]


def test_the_command_line_goes_before_the_configuration(tmp_path: Path) -> None:
    write(tmp_path / "c", [Tape().book(0, 10_000, 10_001).trade(1, 1, 10_001, 5).quiet(5, 500, 10_000, 10_001)])
    path = config(tmp_path, f'catalog = "{tmp_path / "other"}"\ntrain_fraction = 0.9999')
    done = backtest("--config", path, "--catalog", tmp_path / "c", "--out", tmp_path / "o")
    assert done.returncode == 2 and "nothing is left to trade" in done.stderr


def test_help_is_quick_to_import() -> None:
    heavy = ("torch", "numba", "nautilus_trader", "xgboost", "pandas")
    code = f"import sys, run_backtest; print(sorted(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_the_unit_and_the_container_start_a_session_as_its_command_line_stands() -> None:
    import run_live

    unit, container = ((ROOT / "docs" / "deploy" / name).read_text() for name in ("cift.service", "Containerfile"))
    started = shlex.split(re.search(r"^ExecStart=(.*)", unit, re.M)[1])  # type: ignore[index]
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)", container, re.M)[1])  # type: ignore[index]
    live = typer.main.get_command(run_live.app)
    for command, state in ((started, "/var/lib/cift"), (entry, "/state")):
        assert command[0].endswith(".venv/bin/python") and command[1] == "run_live.py"
        given = live.make_context("run_live.py", command[2:]).params
        assert (given["state"], given["port"]) == (Path(state), 8765)
    assert "http://127.0.0.1:8765/ready" in container and "NUMBA_CACHE_DIR=/state/" in container
    told = int(re.search(r"--shm-size (\d+)m", container)[1])  # type: ignore[index]
    ring = Ring(CAPACITY)
    try:
        assert ring.memory.size < told << 20
    finally:
        ring.close()
        ring.memory.unlink()


def test_the_kernels_of_a_run_compile_apart() -> None:
    done = subprocess.run([sys.executable, "-m", "cift_strategies.warm"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
