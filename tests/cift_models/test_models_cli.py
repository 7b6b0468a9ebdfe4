"""The command line: train, inspect, evaluate and ablate follow on one another, print what they found, and refuse what is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from quote_catalog import quote_catalog
from test_inference import START
from typer.testing import CliRunner

from catalog.errors import InputError
from catalog.events import SCALE
from cift_models import artifacts
from cift_models.__main__ import app
from cift_models.describe import describe


def run(*words) -> str:
    got = CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
    assert got.exit_code == 0
    return got.stdout


def test_help_shows_tables_by_name():
    """Rich would take [train] for its markup."""
    assert "TOML with [train], [ensemble]" in " ".join(run("train", "--help").split())


@pytest.fixture(scope="module")
def market(tmp_path_factory) -> Path:
    return quote_catalog(tmp_path_factory.mktemp("cli") / "quotes", updates=9_000, gap_ms=60.0)


@pytest.fixture(scope="module")
def trained(market) -> Path:
    out, how = market.parent / "models", market.parent / "how.toml"
    how.write_text("[train]\ncap = 6000\nseeds = 2\n[fusion]\nrounds = 15\nthreads = 1\n")
    words = "train", "--catalog", market, "--end", START + 400 * SCALE, "--only", "hmm,fusion", "--config", how, "--seed", 3, "--out", out
    assert run(*words).splitlines()[-1] == str(out)
    return out


def test_settings_come_from_the_file_unless_they_are_typed(trained):
    m = artifacts.read(trained).manifest
    assert m["settings"]["train"] | {"cap": 6000, "seeds": 2, "folds": 2} == m["settings"]["train"] and m["seed"] == 3
    assert m["settings"]["fusion"]["rounds"] == 15 and m["folds"][-1]["seeds"]["values"] == [3, 4]


def test_inspect_tells_all_that_lies_in_an_artifact(trained):
    m, text = artifacts.read(trained).manifest, run("inspect", trained)
    for name, path in m["members"].items():
        assert f"member {name} ({path})" in text
    assert "looks at (share of the gain" in text and "low_volatility: trend" in text and "[fusion] " in text and "rounds=15" in text
    for k, fold in enumerate(m["folds"]):
        assert f"fold {k + 1} of 2" in text and f"kept {fold['seeds']['kept']}" in text
    losses = m["folds"][-1]["seeds"]["log_loss"]["500ms"]["fusion"]
    assert f"fusion {sum(losses) / 2:.4f} ({min(losses):.4f} to {max(losses):.4f})" in text
    assert "on what follows the fold:" in text and "level-1 logistic" in text and "ensemble: weights of hmm, fusion" in text
    assert all(name in text for name in m["files"])


def test_a_member_that_is_not_allowed_by_name_is_listed_and_not_asked(trained):
    found = artifacts.read(trained)
    other = found._replace(manifest=found.manifest | {"members": {"fusion": "os:system"}})
    text = list(describe(other))
    assert "member fusion (os:system)" in text and not any("looks at" in line for line in text)


def test_evaluate_prints_a_table_and_writes_it(market, trained, tmp_path):
    text = run("evaluate", "--catalog", market, "--artifacts", trained, "--out", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    row = next(r for r in scores["table"] if r["horizon"] == "500ms")
    assert f"{row['instrument']} 500ms: {row['n']:,} decisions, {row['effective']:,} independent labels, sufficient" in text
    models = {"ensemble": row["ensemble"], **row["members"], **row["baselines"]}
    assert models.keys() == {"ensemble", "hmm", "fusion", "persistence", "time of day", "level-1 logistic"}
    for name, s in models.items():
        line = next(x for x in text.splitlines() if x.startswith(f"  {name:<18}") and f"{s['log_loss']:.4f}" in x)
        for figure in (f"{s['macro_f1']:.3f}", f"{s['weighted_f1']:.3f}", f"{s['ece']:.3f}", *(f"{v:.4f}" for v in s["log_loss_interval"])):
            assert figure in line
        if name in row["gain"]:
            assert f"{row['gain'][name]['mean']:+.4f}" in line and f"{row['gain'][name]['p_holm']:.3f}" in line
        assert line.endswith("yes" if name in row["mcs"]["included"] else "no")
    assert "beats every baseline: " in text and json.loads(run("evaluate", "--catalog", market, "--artifacts", trained, "--json")) == scores


def test_ablate_prints_a_line_for_each_member_and_horizon(market, trained):
    found = json.loads(run("ablate", "--catalog", market, "--artifacts", trained, "--json"))
    text = run("ablate", "--catalog", market, "--artifacts", trained)
    for name in ("hmm", "fusion"):
        assert f"{found['members'][name]['500ms']['cost']['mean']:+.5f}" in text and f"{name}: votes in " in text


def test_too_little_data_and_one_instrument_are_told_as_a_user_reads_it(market, tmp_path):
    """A process of its own: exit code 2, one line without a traceback. And the member that needs two instruments says so, whole."""
    few = quote_catalog(tmp_path / "few", updates=300)
    words = [sys.executable, "-m", "cift_models", "train", "--catalog", str(few), "--out", str(tmp_path / "a")]
    got = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    said = [line for line in got.stderr.splitlines() if not line.startswith("features and labels")]
    assert got.returncode == 2 and not got.stdout and len(said) == 1 and not (tmp_path / "a").exists()
    assert re.fullmatch(r"error: \d+ decisions in the training range, 1000 are needed \(.*\): give a longer range", said[0])
    with pytest.raises(InputError) as told:
        run("train", "--catalog", market, "--symbols", "A.X", "--only", "gnn", "--folds", 1, "--out", tmp_path / "b")
    assert str(told.value).endswith("a cross-asset graph needs two instruments, there is one: it abstains; name more to have it vote")


def test_what_ends_before_any_outcome_is_refused_and_what_ends_before_some_says_which(market, trained):
    """The data end 0.4 s and 3 s after what was trained on: labels of 500 ms, and of 5 s, run past the end."""
    end = artifacts.read(trained).manifest["range"]["end"]
    there = "--catalog", market, "--artifacts", trained, "--end"
    for command in ("evaluate", "ablate"):
        with pytest.raises(InputError) as told:
            run(command, *there, end + 400_000_000)
        said = f" decisions in {market} after the training range of {trained}, and the data end before any of them has an outcome"
        assert re.fullmatch(r"\d+" + re.escape(said) + r" \(500ms at the least\): choose a later --end or other data", str(told.value))
    text, scores = (run("evaluate", *there, end + 3 * SCALE, *more) for more in ((), ("--json",)))
    for row in json.loads(scores)["table"]:
        line = next(x for x in text.splitlines() if x.startswith(f"{row['instrument']} {row['horizon']}: "))
        if row["horizon"] == "5s":
            assert line.endswith(f"{row['forecasts']} decisions, none with an outcome: the data end before 5s are over") and not row["n"]
        elif row["horizon"] == "30s":
            assert line.endswith("30s: no forecast") and not row["forecasts"]
        else:
            assert 0 < row["n"] < row["forecasts"] and line.endswith("of the moves pay for the spread")
    assert text.splitlines()[-1] == "nothing is claimed: no instrument has 100 independent labels at any horizon"
    assert "- by chance" not in text and "too few labels to tell it from chance" in text
    assert run("ablate", *there, end + 3 * SCALE).count("too few labels to test what it adds: choose a later --end") == 2


def test_sessions_shorter_than_a_horizon_leave_it_out(tmp_path):
    """Three sessions of 24 s: no label of 30 s ends within one, and none runs on into the next."""
    catalog, out = quote_catalog(tmp_path / "short", updates=8_000, gap_ms=3.0, then=(1.0, 1.0)), tmp_path / "a"
    how = tmp_path / "how.toml"
    how.write_text("[fusion]\nrounds = 5\nthreads = 1\n")
    end = START + 2 * 86_400 * SCALE - 1
    got = CliRunner().invoke(
        app, ["train", "--catalog", str(catalog), "--end", str(end), "--only", "fusion", "--folds", "1", "--seeds", "1",
              "--config", str(how), "--out", str(out)], catch_exceptions=False,
    )  # fmt: skip
    assert got.exit_code == 0 and re.search(r"left out: horizon 30s: \d independent labels in the fit slice, 30 are needed", got.stderr)
    assert artifacts.read(out).manifest["horizons_trained"] == ["500ms", "1s"]
    text = run("evaluate", "--catalog", catalog, "--artifacts", out)
    assert text.count(" 5s: no forecast\n") == text.count(" 30s: no forecast\n") == 2 and "500ms: 1," in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--out", "a", "--config", "none.toml"], r"cannot read none\.toml"),
        (["train", "--out", "a", "--only", "lstm"], "no member named lstm: choose among"),
        (["evaluate", "--artifacts", "nothing"], "manifest.json is missing"),
        (["evaluate", "--artifacts", "nothing", "--out", "no/such/file"], "no place for a file"),
        (["ablate", "--artifacts", "nothing"], "manifest.json is missing"),
    ],
)
def test_what_is_wrong_is_said(market, words, said):
    with pytest.raises(InputError, match=said):
        run(words[0], "--catalog", market, *words[1:])
