"""Retraining: a challenger takes the champion's place where the market has changed, and only with evidence; whatever goes wrong, one of the
two stands there whole."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from quote_catalog import quote_catalog
from test_inference import INSTRUMENTS, START
from test_resume import Fuse, content
from typer.testing import CliRunner

from catalog.errors import InputError
from catalog.events import SCALE
from cift_models import artifacts, retrain
from cift_models.__main__ import app
from cift_models.describe import describe
from cift_models.inference import Engine
from cift_models.labels import H
from cift_models.retrain import judge
from cift_models.train import Config, train

DAY = 86_400 * SCALE
HOW = {"fusion": {"rounds": 15, "threads": 1}, "hmm": {"min_seconds": 200}}
FUSE = "test_resume:Fuse"


def market(folder: Path, seed: int, then: list[float]) -> Path:
    return quote_catalog(folder / "catalog", seed, updates=9_000, gap_ms=60.0, then=then)


def champion(catalog: Path, members=("hmm", "fusion"), own=()) -> Path:
    """Trained on the first day."""
    tables = {k: v for k, v in HOW.items() if k in members}
    end = START + DAY // 2
    return train(catalog, end=end, out=catalog.parent / "champion", members=members, own=own, config=Config(cap=20_000), tables=tables)


@pytest.fixture(scope="module")
def turned(tmp_path_factory) -> Path:
    """A market whose queues tell the opposite from the second day on, and its champion of the first, whose Hawkes process was left out:
    quotes alone hold nothing for it."""
    catalog = market(tmp_path_factory.mktemp("turned"), 7, [-1.0])
    told = artifacts.read(champion(catalog, ("hawkes", "hmm", "fusion"))).manifest
    assert "hawkes" in told["settings"] and "hawkes" not in told["members"]
    return catalog


def run(*words) -> str:
    got = CliRunner().invoke(app, ["train", *(str(w) for w in words)], catch_exceptions=False)
    assert got.exit_code == 0
    return got.stdout


def test_where_the_market_has_changed_the_challenger_takes_the_champions_place(turned, tmp_path):
    out, before = tmp_path / "models", content(turned.parent / "champion")
    shutil.copytree(turned.parent / "champion", out)
    said = run("--since", out, "--catalog", turned, "--out", out)
    verdict, now = json.loads((tmp_path / "models.verdict.json").read_text()), artifacts.read(out)
    assert said.startswith("promoted: ") and said.count("\n") == 1 and verdict["promoted"]
    assert verdict["champion"] == artifacts.read(turned.parent / "champion").version != verdict["challenger"] == now.version
    assert sorted(p.name for p in tmp_path.iterdir()) == ["models", "models.verdict.json"]
    m, old = now.manifest, json.loads(before["manifest.json"])
    assert old["range"]["end"] < m["range"]["start"] < m["range"]["end"] < verdict["test"]["start"] - 30 * SCALE
    assert m["retrained"] == {"champion": verdict["champion"], "since": old["range"]["end"] + 1}
    assert m["members"] == old["members"] and m["instruments"] == old["instruments"] and (out / "labels.npz").exists()
    with np.load(out / "labels.npz") as z, np.load(turned.parent / "champion" / "labels.npz") as was:
        assert np.array_equal(z["balanced"], was["balanced"]), "both are asked the same"
    for r in verdict["table"]:
        if r["effective"] >= 100:
            assert r["gain"] == pytest.approx(r["champion"] - r["challenger"]) and r["p_loss_holm"] > 0.025
    assert max(r["gain"] for r in verdict["table"] if r["horizon"] == "500ms") > 0.1
    assert any(f"retrained from {verdict['champion']} on what came since 2024-03-01" in line for line in describe(now))
    with pytest.raises(InputError, match="too little to learn from since"):
        retrain.retrain(out, turned, out)


@pytest.mark.parametrize("seed", [7, 8])
def test_where_nothing_has_changed_the_champion_stays(tmp_path, seed):
    catalog = market(tmp_path, seed, [1.0])
    before = content(champion(catalog))
    said = run("--since", tmp_path / "champion", "--catalog", catalog, "--out", tmp_path / "champion")
    assert said.startswith("not promoted: the champion ") and said.count("\n") == 1
    assert content(tmp_path / "champion") == before
    verdict = json.loads((tmp_path / "champion.verdict.json").read_text())
    assert not verdict["promoted"] and not any(r.get("p_holm", 1) < 0.025 and r["interval"][0] > 0 for r in verdict["table"])


def test_since_a_time_the_old_is_learnt_from_as_well_and_the_champion_is_out(turned, tmp_path):
    out = tmp_path / "models"
    shutil.copytree(turned.parent / "champion", out)
    run("--since", START + 200 * SCALE, "--catalog", turned, "--out", out)
    verdict = json.loads((tmp_path / "models.verdict.json").read_text())
    old = artifacts.read(turned.parent / "champion").manifest
    assert verdict["since"] == START + 200 * SCALE and verdict["test"]["start"] > START + DAY > old["range"]["end"]
    if verdict["promoted"]:
        assert artifacts.read(out).manifest["range"]["start"] < old["range"]["end"]


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    """A champion with a member that interrupts when asked to; what its retraining gives, and how often that asks the member."""
    catalog = market(tmp_path_factory.mktemp("fused"), 7, [-1.0])
    Fuse.count, Fuse.at = 0, -1
    champion(catalog, ["fusion"], [FUSE])
    Fuse.count = 0
    out = catalog.parent / "whole"
    assert retrain.retrain(catalog.parent / "champion", catalog, out, own=[FUSE])["promoted"]
    return catalog, content(out), (catalog.parent / "whole.verdict.json").read_bytes(), Fuse.count


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
def test_interrupted_at_any_moment_it_ends_alike_to_the_last_byte(fused, tmp_path, part):
    catalog, files, verdict, strikes = fused
    Fuse.count, Fuse.at = 0, max(1, round(part * strikes))
    with pytest.raises(KeyboardInterrupt):
        retrain.retrain(catalog.parent / "champion", catalog, tmp_path / "a", own=[FUSE])
    assert [p.name for p in tmp_path.iterdir()] == ["a.work"]
    Fuse.count, Fuse.at = 0, -1
    retrain.retrain(catalog.parent / "champion", catalog, tmp_path / "a", own=[FUSE])
    assert content(tmp_path / "a") == files and (tmp_path / "a.verdict.json").read_bytes() == verdict
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.verdict.json"]


def test_killed_when_the_challenger_has_just_taken_its_place_the_same_verdict_is_told(fused, tmp_path, monkeypatch):
    catalog, files, verdict, _ = fused
    out, put = tmp_path / "a", artifacts.put
    shutil.copytree(catalog.parent / "champion", out)

    def dying(made, to):
        put(made, to)
        raise KeyboardInterrupt

    monkeypatch.setattr(artifacts, "put", dying)
    with pytest.raises(KeyboardInterrupt):
        retrain.retrain(out, catalog, out, own=[FUSE])
    monkeypatch.undo()
    assert content(out) == files and (tmp_path / "a.work").is_dir()
    assert retrain.retrain(out, catalog, out, own=[FUSE]) == json.loads(verdict)
    assert content(out) == files and not (tmp_path / "a.work").exists()


def rewritten(folder: Path, **entries) -> Path:
    """The artifact with other entries in its manifest, which says so."""
    m = json.loads((folder / "manifest.json").read_text()) | entries
    m["sha256"] = artifacts._own_sha256(m)
    (folder / "manifest.json").write_text(artifacts._text(m))
    return folder


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("byte", r"hmm\.npz was changed after it was written"),
        ("features", "was trained on another feature list"),
        ("symbols", r"was trained on A\.X, B\.X: name these or none"),
        ("old", r"no event in .* after 2024-03-01T.*, up to which .* was trained"),
        ("word", "yesterday is neither a folder of trained models nor a time"),
        ("time", r"manifest.json is missing: .* holds no trained models"),
        ("setting", r"\[retrain\] test"),
        ("folds", "do not go with --since"),
    ],
)
def test_what_is_wrong_is_said_in_a_line_and_nothing_changes(turned, tmp_path, fault, said):
    out = tmp_path / "models"
    shutil.copytree(turned.parent / "champion", out)
    since, words, how = out, [], tmp_path / "how.toml"
    if fault == "byte":
        raw = bytearray((out / "hmm.npz").read_bytes())
        raw[len(raw) // 2] ^= 1
        (out / "hmm.npz").write_bytes(raw)
    elif fault == "features":
        rewritten(out, features=["other"])
    elif fault == "setting":
        how.write_text("[retrain]\ntest = 1.5\n")
        words = ["--config", how]
    else:
        since = {"word": "yesterday", "time": START}.get(fault, out)
        words = {"symbols": ["--symbols", "A.X"], "old": ["--end", START + 300 * SCALE], "folds": ["--folds", 3]}.get(fault, [])
    to = tmp_path / "nothing" if fault == "time" else out
    before = content(tmp_path)
    with pytest.raises(InputError, match=said) as e:
        run("--since", since, "--catalog", turned, "--out", to, *words)
    assert "\n" not in str(e.value) and content(tmp_path) == before


def test_whoever_loads_while_models_are_exchanged_gets_one_of_them_whole(turned, fused, tmp_path):
    a, b, out = turned.parent / "champion", fused[0].parent / "champion", tmp_path / "models"
    versions, begun, loads = {artifacts.read(p).version for p in (a, b)}, threading.Semaphore(0), 20
    artifacts.put(a, out)

    def exchange():
        for _ in range(loads):
            begun.acquire()
            for made in (b, a, b) if artifacts.read(out).version == artifacts.read(a).version else (a, b, a):
                artifacts.put(made, out)

    writer = threading.Thread(target=exchange)
    writer.start()
    seen = []
    for _ in range(loads):
        begun.release()
        seen.append(Engine.load(out, INSTRUMENTS, [FUSE]).model_version)
    writer.join()
    assert set(seen) <= versions and [p.name for p in tmp_path.iterdir()] == ["models"]


def samples(rng, gains=(0.0, 0.0), n=4_000, skew=0.0, silent=0.0):
    """Two forecasters of two instruments, a decision of each in two seconds, horizon 1 s; `gains`: how much more of the truth the second
    knows of each instrument, `skew` how much too sure it is."""
    ts, of = np.arange(n) * SCALE, np.arange(n) % 2
    truth = rng.normal(size=(n, 3))
    y = (np.exp(truth) / np.exp(truth).sum(axis=1, keepdims=True)).cumsum(axis=1)
    y = (rng.random(n)[:, None] > y).sum(axis=1)
    out = []
    for know in (0.6, 0.6 + np.take(gains, of)[:, None]):
        z = know * truth + 0.2 * rng.normal(size=(n, 3))
        z = z * (1 + skew * len(out))
        p = np.full((n, H, 3), np.nan)
        p[:, 1] = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
        if out and silent:
            p[rng.random(n) < silent] = np.nan
        move, known = np.full((n, H), np.nan), np.zeros((n, H), np.int64)
        move[:, 1], known[:, 1] = 2.0 * (y - 1), ts + SCALE + 1
        out.append({"ts": ts, "instrument": of, "move": move, "known_at": known, "proba": p})
    return out


def judged(*pair, **kw):
    return judge(*pair, np.ones((2, H)), ["A", "B"], ["1s"], **kw)


def test_evidence_promotes_and_each_kind_of_harm_forbids_it():
    rng = np.random.default_rng(0)
    better = judged(*samples(rng, (0.3, 0.3)))
    assert better["promoted"] and better["why"].startswith("better log-loss at A 1s (+")
    assert not (v := judged(*samples(rng, (0.3, -0.5))))["promoted"] and v["why"].startswith("worse at B 1s (-")
    assert not (v := judged(*samples(rng, (0.4, 0.4), skew=0.6)))["promoted"] and "worse" in v["why"]
    assert not (v := judged(*samples(rng, (0.3, 0.3), silent=0.1)))["promoted"] and "nothing to say in" in v["why"]
    assert not (v := judged(*samples(rng, (0.3, 0.3), n=150)))["promoted"] and "fewer than 100" in v["why"]
    same = samples(rng)[0]
    assert not (v := judged(same, same))["promoted"] and "no gain in log-loss is shown" in v["why"]


def test_equals_are_seldom_promoted():
    promoted = [judged(*samples(np.random.default_rng(s), n=1_000), seed=s)["promoted"] for s in range(60)]
    assert sum(promoted) <= 5, "2.5 % of them would be 1.5"
