"""Sweeps: what is proposed, that nothing done is lost or done twice whatever dies, and what the files say at the end."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import EAGER, Small
from own_strategies import trade_and_tell

from catalog.errors import InputError
from cift_models import artifacts
from cift_models.work import sources_of
from cift_strategies.backtest import RunConfig
from cift_strategies.overfitting import sharpe
from cift_strategies.settings import configured
from cift_strategies.sweep import APART, Job, Trial, _Keys, sweep
from cift_strategies.sweep_file import Asked, proposals, read
from cift_strategies.sweep_result import _models, conclude, figures
from cift_strategies.workers import Processes

ROOT = Path(__file__).resolve().parents[2]
HEAD = 'parameters.seed = [1, 2]\n[base]\ncatalog = "c"\n'


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "s.toml"
    path.write_text(text)
    return path


def asked(tmp_path: Path, text: str) -> Asked:
    return read(written(tmp_path, text), {})


# --- the file ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("parameters = ", "valid TOML"),
        ("trails = 3\n" + HEAD, "trails"),
        ("[parameters]\n", "parameters"),
        ("[parameters]\nseeed = [1]\n", "parameters.seeed"),
        ("[parameters.settings]\nmin_egde = [1]\n", "settings.min_egde"),
        ("[parameters]\nsettings.min_edge_ticks = [0.1, -1]\n", "settings.min_edge_ticks = -1"),
        ("[parameters]\nsettings.min_edge_ticks = []\n", "empty"),
        ("[parameters]\nseed = 3\n", "parameters.seed = 3"),
        ("[parameters]\nlatency_ms = {low = 1, high = 5}\n", "step"),
        ("[parameters]\nlatency_ms = {low = 5, high = 1, step = 1}\n", "low < high"),
        ("[parameters]\nlatency_ms = {low = 0, high = 1, log = true}\n", "0 < low"),
        ("[parameters]\nlatency_ms = {low = 0, hihg = 1}\n", "parameters.latency_ms"),
        ('[parameters]\nout = ["a"]\n', "--out"),
        ('method = "grad"\n' + HEAD, "method"),
        ("trials = 5\n" + HEAD, "trials"),
        ("parameters.seed = [1]\n[base]\nsead = 1\n", "base.sead"),
        ('base = "nowhere.toml"\nparameters.seed = [1]\n', "nowhere.toml"),
        ('objective = "hit_rate"\nvalidation.method = "cpcv"\n' + HEAD, "objective"),
        ('objective = "hit_rate"\nholdout = 0.2\n' + HEAD, "holdout needs"),
        ("holdout = 1.0\n" + HEAD, "holdout"),
        ('validation = {method = "cpcv", groups = 3, test_groups = 3}\n' + HEAD, "test_groups"),
        ("periods = 8\n" + HEAD, "periods"),
        ('parameters.models.hmm.startz = [1]\n', "startz"),
    ],
)
def test_what_is_wrong_in_the_file_is_one_line_that_names_it(tmp_path: Path, text: str, names: str) -> None:
    with pytest.raises(InputError) as caught:
        asked(tmp_path, text)
    assert names in str(caught.value) and "\n" not in str(caught.value)


def test_a_grid_is_every_combination_of_dotted_and_nested_keys(tmp_path: Path) -> None:
    text = (
        '[parameters]\n"settings.min_edge_ticks" = [0.1, 2.0]\nsettings.entry = ["cross", "join"]\n'
        "seed = {low = 1, high = 5, step = 2}\n"
    )
    a = asked(tmp_path, text)
    (points,) = proposals(a)
    assert len(points) == 12 and {p["seed"] for p in points} == {1, 3, 5} and len({repr(p) for p in points}) == 12
    config = a.config(points[-1])
    assert (config.settings.min_edge_ticks, config.settings.entry, config.seed) == (2.0, "join", 5)


def test_random_points_repeat_with_their_seed_and_stay_within_their_ranges(tmp_path: Path) -> None:
    text = (
        'method = "random"\ntrials = 200\nseed = {}\n[parameters]\nlatency_ms = {{low = 0.01, high = 100.0, log = true}}\n'
        "seed = {{low = 1, high = 9}}\nrule = [true, false]\n"
    )
    (a,), (b,), (c,) = (proposals(asked(tmp_path, text.format(s))) for s in (3, 3, 4))
    assert a == b != c and len({repr(p) for p in a}) == 200
    assert all(0.01 <= p["latency_ms"] <= 100 and p["seed"] in range(1, 10) and isinstance(p["seed"], int) for p in a)
    assert np.median([p["latency_ms"] for p in a]) == pytest.approx(1.0, rel=0.6) and {p["seed"] for p in a} == set(range(1, 10))


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_a_search_finds_what_is_best_and_repeats(tmp_path: Path, direction: str) -> None:
    text = (
        f'method = "optuna"\ndirection = "{direction}"\ntrials = 60\n[parameters]\n'
        "latency_ms = {low = 0.0, high = 10.0}\nrule = [true, false]\n"
    )

    def searched() -> list[Any]:
        search, found = proposals(asked(tmp_path, text)), []
        points = next(search)
        while True:
            scores = [(p["latency_ms"] - 7) ** 2 + (0 if p["rule"] else 5) for p in points]
            found += list(zip(points, scores))
            try:
                points = search.send([-s for s in scores] if direction == "maximize" else list(scores))
            except StopIteration:
                return found

    found = searched()
    assert found == searched() and len(found) == 60
    assert min(s for _, s in found) < 0.1 and np.median([s for _, s in found[-16:]]) < np.median([s for _, s in found[:16]])


# --- what it comes to -------------------------------------------------------------------------------------------------------------------


def finished(a: Asked, number: int, hours: np.ndarray, opened: np.ndarray, held: np.ndarray, earned: np.ndarray) -> Trial:
    """A run as it lies in the folder of `a`'s file, that earned so much with positions opened then and held so long."""
    job = Job(str(number), RunConfig(), None, a.path.parent, "", True)  # type: ignore[arg-type]
    place = a.path.parent / "runs" / job.key
    place.mkdir(parents=True)
    np.savez(place / "positions.npz", allow_pickle=False, opened=opened, closed=opened + held, earned=earned)
    told = {"config": {"seed": number}, "digest": job.key, "seconds": 1.0, "summary": {"fills": 1}, "hours": hours.tolist(), "ratio": 0.1}
    (place / "run.json").write_text(json.dumps(told))
    t = Trial(number, {"seed": number}, job, told)
    t.score = figures(t, a.sweep)["return"]
    return t


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_what_is_held_out_is_not_chosen_on_and_judged_once(tmp_path: Path, share: float) -> None:
    """Two days with a night between; run 1 earns until three quarters of the hours are over, run 2 afterwards, and more."""
    a = asked(tmp_path, f'holdout = {share}\nreports = false\nobjective = "return"\n' + HEAD)
    day, night = 1_000_000, 50_000_000
    hours = np.array([[0, day - 1], [night, night + day - 1]])
    cut, rng = night + day // 2, np.random.default_rng(5)
    opened = np.sort(np.concatenate([first + rng.choice(day - 2_000, 400, replace=False) for first in (0, night)]))
    held = rng.integers(1, 20_000, len(opened)).clip(0, hours[1, 1] - opened)
    early = opened < cut
    luck = rng.normal(1, 0.5, len(opened))
    trials = [finished(a, n, hours, opened, held, luck * how) for n, how in ((1, np.where(early, 1, -1)), (2, np.where(early, -1, 9)))]
    found = conclude(a, trials, tmp_path)
    inside = opened + held < cut if share else np.ones(len(opened), bool)
    assert found["best"] == (1 if share else 2)
    assert found["table"][0]["figures"]["return"] == pytest.approx(float((luck * np.where(early, 1, -1))[inside].sum()))
    assert any("Holdout" in line for line in found["told"]) == bool(share) == bool(found["holdout"])
    if share:
        h, meets = found["holdout"], early & ~inside
        assert h["hours"] == [[cut, night + day - 1]] and h["positions"] == (~early).sum() and meets.any()
        assert h["return"] == pytest.approx(-float(luck[~early].sum())) and h["probability"] < 0.001 and h["sharpe"] < 0
        assert found["hours"] == [[0, day - 1], [night, cut - 1]] and 0 <= found["pbo"]["probability"] <= 1


# --- the runs ---------------------------------------------------------------------------------------------------------------------------


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "run_backtest.py"), *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(Path(__file__).parent))), **more}


def of_small(small: Small, tmp_path: Path, head: str, parameters: str, strategy: str = EAGER) -> Path:
    base = f'[base]\ncatalog = "{small.catalog}"\nartifacts = "{small.artifact}"\nstrategy = "{strategy}"\n'
    return written(tmp_path, f"reports = false\n{head}\n{base}[parameters]\n{parameters}\n")


def begun(out: Path, predicted: Path) -> Path:
    """The folder of a sweep that has its predictions and no run yet."""
    (out / "runs").mkdir(parents=True)
    shutil.copytree(predicted, out / "shared", copy_function=os.link)
    return out


def runs(out: Path) -> dict[str, bytes]:
    return {p.parent.name: p.read_bytes() for p in (out / "runs").glob("*/run.json")}


def test_a_sweep_that_is_interrupted_and_killed_goes_on_where_it_stopped(
    small: Small, predicted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = of_small(
        small, tmp_path, 'workers = 2\nvalidation = {method = "cpcv", groups = 4, embargo_s = 1}',
        'settings.min_edge_ticks = [0.1, 1.0, 3.0, 6.0]\nsettings.entry = ["cross", "join"]',
    )  # fmt: skip
    out, kept = begun(tmp_path / "out", predicted), dict[str, bytes]()
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        process = subprocess.Popen(command("--sweep", path, "--out", out), stderr=subprocess.PIPE, env=environment(), text=True)
        assert process.stderr is not None
        new = (line for line in process.stderr if ": run " in line and "kept from before" not in line)
        told = [next(new)]
        process.send_signal(number)
        told += list(process.stderr)
        assert process.wait() == code, told
        now = runs(out)
        assert kept.items() < now.items() and len(now) < 8  # what is done stays as it is, and more is done
        kept = now
        if number == signal.SIGINT:
            assert "kept" in "".join(told) and "goes on from there" in "".join(told) and "Traceback" not in "".join(told)
    capsys.readouterr()
    found = sweep(path, {"out": out})
    assert kept.items() < runs(out).items() and len(runs(out)) == 8
    assert capsys.readouterr().err.count("kept from before") == len(kept)
    assert json.loads(json.dumps(found)) == json.loads((out / "sweep.json").read_text())
    assert not [p for p in (out / "runs").iterdir() if p.name.startswith(".") and p.name.endswith(f".{process.pid}.part")]

    table = found["table"]
    assert len({r["key"] for r in table}) == found["distinct"] == found["trials"] == 8 and not found["failed"]
    as_default = next(r for r in table if r["parameters"] == {"settings.min_edge_ticks": 0.1, "settings.entry": "cross"})
    assert as_default["digest"] == small.result.digest  # a run of the sweep is that of run_backtest
    assert as_default["figures"]["pnl_net"] == small.result.summary["pnl_net"]
    assert as_default["figures"]["return"] == pytest.approx(small.result.summary["pnl_net"] / 1e6)
    ranked = sorted(table, key=lambda r: -r["score"])
    assert found["best"] == ranked[0]["run"] and found["median"] == ranked[4]["run"]
    again = pq.read_table(out / "sweep.parquet").to_pylist()
    assert [(r["run"], r["settings.entry"], r["sharpe"]) for r in again] == [
        (r["run"], r["parameters"]["settings.entry"], r["figures"]["sharpe"]) for r in table
    ]
    assert 0 <= found["pbo"]["probability"] <= 1 and 0 <= found["deflated_sharpe"]["probability"] <= 1
    v = found["validation"]
    assert len(v["folds"]) == 6 and len(v["paths"]) == 3 and all(f["purged"] >= 0 for f in v["folds"])
    first, last = (artifacts.read(small.artifact).manifest["range"][k] for k in ("start", "end"))
    assert found["models"] == {"ranges": [[first, last]], "before": True} and any("trained once, before" in line for line in found["told"])
    one = Trial(1, {}, Job("", RunConfig(artifacts=small.artifact), None, out, "", True))  # type: ignore[arg-type]
    assert _models([one], last) == {"ranges": [[first, last]], "before": False}
    page = (out / "sweep.html").read_text()
    assert "parcoords" in page and all(line.split(".")[0] in page for line in found["told"]) and "src=" not in page.split("<body>")[1]
    best = configured(RunConfig, out / "best.toml", {})
    assert best.model_dump(mode="json", by_alias=True) == kept_of(out, ranked[0]["key"])["config"]


def kept_of(out: Path, key: str) -> dict[str, Any]:
    return json.loads((out / "runs" / key / "run.json").read_text())


def test_a_worker_that_dies_loses_nothing_and_a_file_that_is_refused_runs_nothing(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAVES", str(tmp_path))
    (tmp_path / "worker").mkdir()
    path = of_small(small, tmp_path, "workers = 1\nfast = false", "settings.min_edge_ticks = [0.1]", "own_strategies:Mortal")
    found = sweep(path, {"out": tmp_path / "out"})
    assert not (tmp_path / "worker").exists()  # it was filled
    assert found["table"][0]["digest"] == small.result.digest and len(runs(tmp_path / "out")) == 1 and not found["failed"]
    wrong = of_small(small, tmp_path, 'objective = "sharp"\nfast = false', "settings.min_edge_ticks = [0.1]", "own_strategies:Mortal")
    with pytest.raises(InputError, match="choose among"):
        sweep(wrong, {"out": tmp_path / "out"})
    with pytest.raises(InputError, match="holds no sweep"):
        sweep(path, {"out": small.out})


def test_models_are_trained_once_for_all_runs_and_the_best_and_the_median_one_are_reported(small: Small, tmp_path: Path) -> None:
    """Two of the four cannot be run; the report of the best one knows that it was chosen from two."""
    text = (
        f'workers = 1\n[base]\ncatalog = "{small.catalog}"\nstrategy = "{EAGER}"\ntrain = ["hmm"]\nrule = false\n'
        "[parameters]\ntrain_fraction = [0.5, 0.9999999]\nlatency_ms = [0.0, 5.0]\n"
    )
    path, out = written(tmp_path, text), tmp_path / "out"
    found = sweep(path, {"out": out})
    errors = [r["error"] for r in found["table"] if r["error"]]
    assert len(errors) == found["failed"] == 2 and all("nothing is left to trade" in e for e in errors)
    assert len([p for p in (out / "shared").iterdir() if p.name.endswith("-artifact")]) == 1
    assert len({r["digest"] for r in found["table"] if not r["error"]}) == 2

    by, ratios = {r["run"]: r for r in found["table"]}, []
    for name, trials in (("best", 2), ("median", 1)):
        told = json.loads((out / name / "summary.json").read_text())
        of = by[found[name]]
        assert (told["digest"], told.get("trials", 1)) == (of["digest"], trials)
        assert f"{name}/report.html" in (out / "sweep.html").read_text()
        ratio = json.loads((out / name / "statistics.json").read_text())["sharpe"][0]
        assert ratio["trials"] == trials and (ratio["deflated"] < ratio["probabilistic"]) == (trials > 1)
        ratios.append(kept_of(out, of["key"])["ratio"])
        assert ratios[-1] == pytest.approx(ratio["ratio"], abs=0.02)  # but for where the first step begins
    assert sorted(json.loads((out / "best" / "summary.json").read_text())["trial_ratios"]) == sorted(ratios)
    before = {name: (out / name / "report.html").stat() for name in ("best", "median")}
    assert sweep(path, {"out": out}) == found
    assert all((out / name / "report.html").stat() == s for name, s in before.items())  # made once


@pytest.mark.parametrize("fast", [True, False])
def test_a_kept_run_is_that_of_all_sources_that_decide_it_and_of_no_others(
    small: Small, predicted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    """What a process has loaded that has traded; only what shows runs and hands them out is apart."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    job, workers = _Keys(begun(tmp_path, predicted), fast).job(RunConfig(catalog=small.catalog, artifacts=small.artifact)), Processes(1)
    try:
        assert [d[1:] for d in workers.run(trade_and_tell, [job])] == [(None, None)]
    finally:
        workers.close()
    took = {m.rpartition(".")[2] for m in json.loads((tmp_path / "loaded.json").read_text())} - {"cift_strategies"}
    counted = {p.stem for p in sources_of("cift_strategies.sweep", {f"cift_strategies.{name}" for name in APART})}
    assert took - {*APART} <= counted and {"strategy", "risk", "fast", "backtest", "intake"} <= counted
    assert not counted & {"report", "charts", "live", "page", "sweep_page", "sweep_board", "monitor", "venue"}


def test_a_process_is_begun_afresh_after_its_life_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cift_strategies.workers.LIFE", 2)
    workers = Processes(1)
    try:
        seen = [(job, "ValueError" in (fault or ""), workers.pids) for job, _, fault in workers.run(math.sqrt, [1, 4, -1, 9, 16])]
    finally:
        workers.close()
    assert [(job, fault) for job, fault, _ in seen] == [(1, False), (4, False), (-1, True), (9, False), (16, False)]
    assert [len(pids) for *_, pids in seen] == [1, 0, 1, 0, 1] and len({p for *_, pids in seen for p in pids}) == 3


def test_on_the_command_line_what_is_wrong_is_one_line_with_code_2(tmp_path: Path) -> None:
    path = written(tmp_path, "[parameters]\nseeed = [1]\n")
    for arguments in (["--sweep", path], ["--ray", "auto"], ["--sweep", path, "--config", path]):
        done = subprocess.run(command(*arguments), capture_output=True, text=True, cwd=tmp_path, env=environment())
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and list(tmp_path.iterdir()) == [path], done.stderr


def test_a_period_sharpe_is_that_of_its_positions(small: Small, predicted: Path, tmp_path: Path) -> None:
    out = begun(tmp_path / "out", predicted)
    found = sweep(of_small(small, tmp_path, "workers = 1\nperiods = 40\nblocks = 4", "seed = [7]"), {"out": out})
    (row,) = found["table"]
    p = pq.read_table(small.out / "positions.parquet").to_pydict()
    ((start, end),) = found["hours"]  # one session: the night before it counts nothing
    assert end - start < 7_000 * 10**9 and min(p["opened"]).value >= start
    r = np.zeros(40)
    for opened, net in zip(p["opened"], p["net"]):
        r[(opened.value - start) * 40 // (end + 1 - start)] += net / 1e6
    assert row["figures"]["return"] == pytest.approx(sum(p["net"]) / 1e6)
    assert row["figures"]["sharpe"] == pytest.approx(float(sharpe(r[:, None])[0])) and row["digest"] == small.result.digest
    assert found["pbo"] is None and found["deflated_sharpe"]["expected"] == 0.0
