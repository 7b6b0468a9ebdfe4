"""Training that is cut short, at whatever moment and however hard, goes on where it stood and ends as if nothing had happened."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from quote_catalog import quote_catalog

from catalog.errors import InputError
from cift_models import artifacts, settings
from cift_models.labels import H
from cift_models.train import Config, train
from cift_models.windows import Votes

FUSE, STILL = f"{__name__}:Fuse", f"{__name__}:Still"
HOW = Config(cap=4_000, folds=2, seeds=3)
ROOT = Path(__file__).parents[2]


class Fuse:
    """A member that depends on its seed, counts what is asked of it, and interrupts training at the asked for count."""

    name = "fuse"
    count, at, fits = 0, -1, list[int]()

    @staticmethod
    def strike():
        Fuse.count += 1
        if Fuse.count == Fuse.at:
            raise KeyboardInterrupt

    def __init__(self, proba):
        self.proba = proba

    class Seen:
        def __init__(self):
            self.events = 0

        def push(self, block):
            Fuse.strike()
            self.events += len(block.events)

    @staticmethod
    def gatherer(instruments, names):
        return Fuse.Seen()

    @classmethod
    def fit(cls, study, gathered):
        cls.strike()
        cls.fits.append(study.seed)
        assert gathered.events > 0
        y = study.classes(0)[study.fit_rows(0)]
        proba = np.bincount(y, minlength=3) / len(y)
        chance = np.random.default_rng(study.seed).dirichlet(np.ones(3)) if getattr(cls, "seeded", True) else 1 / 3
        return cls(0.9 * proba + 0.1 * chance)

    def new_state(self):
        return None

    def predict(self, block, state):
        self.strike()
        m = len(block.closes)
        return Votes(np.tile(self.proba, (m, H, 1)), np.ones((m, H)))

    def save(self, folder):
        np.savez(folder / f"{self.name}.npz", proba=self.proba)

    @classmethod
    def load(cls, folder, names):
        with np.load(folder / f"{cls.name}.npz", allow_pickle=False) as z:
            cls.strike()
            return cls(z["proba"])


class Still(Fuse):
    """One that depends on no seed."""

    name, seeded = "still", False


@pytest.fixture(scope="module")
def market(tmp_path_factory) -> Path:
    return quote_catalog(tmp_path_factory.mktemp("market") / "quotes", updates=2_500)


def learn(market, out, at=-1, **how):
    """Train; `at`: how many things may be asked of the fuse until it goes off."""
    Fuse.count, Fuse.at = 0, at
    return train(market, out=out, **({"members": [], "own": [FUSE, STILL], "config": HOW, "seed": 5} | how))


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(market, tmp_path_factory) -> tuple[dict, int]:
    """The files of a training that nothing interrupted, and how many times the fuse was asked."""
    out = learn(market, tmp_path_factory.mktemp("whole") / "a")
    assert [p.name for p in out.parent.iterdir()] == ["a"], "nothing unfinished is left"
    return content(out), Fuse.count


@pytest.mark.parametrize("part", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_interrupted_at_any_moment_it_ends_alike_to_the_last_byte(market, whole, tmp_path, part, capsys):
    files, strikes = whole
    with pytest.raises(KeyboardInterrupt):
        learn(market, tmp_path / "a", at=max(1, round(part * strikes)))
    assert not (tmp_path / "a").exists() and (tmp_path / "a.work").is_dir(), "nothing half-made is taken for whole"
    assert "the same command goes on" in capsys.readouterr().err
    learn(market, tmp_path / "a")
    assert content(tmp_path / "a") == files and [p.name for p in tmp_path.iterdir()] == ["a"]
    assert part == 0 or Fuse.count < strikes, "what was done is not done again"


def test_interrupted_again_and_again_it_still_comes_to_its_end_and_fits_nothing_twice(market, whole, tmp_path):
    Fuse.fits.clear()
    for rounds in range(100):
        try:
            learn(market, tmp_path / "a", at=4 + 2 * rounds)
            break
        except KeyboardInterrupt:
            continue
    assert content(tmp_path / "a") == whole[0] and rounds > 2
    assert sorted(Fuse.fits) == sorted([5, 6, 7, 5] * HOW.folds)


def test_work_of_another_command_is_refused_and_the_difference_named(market, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        learn(market, tmp_path / "a", at=3)
    with pytest.raises(InputError, match=r"a\.work holds unfinished work of another command \(seed was 5 and is now 6\)"):
        learn(market, tmp_path / "a", seed=6)
    with pytest.raises(InputError, match="train seeds was 3 and is now 2"):
        learn(market, tmp_path / "a", config=Config(cap=4_000, folds=2, seeds=2))
    learn(market, tmp_path / "a")


def test_work_on_other_data_or_by_other_code_is_begun_anew_and_said_so(market, whole, tmp_path, capsys):
    import os

    with pytest.raises(KeyboardInterrupt):
        learn(market, tmp_path / "a", at=whole[1] - 1)
    file = next(market.rglob("*.parquet"))
    os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns + 1))
    learn(market, tmp_path / "a")
    assert "holds work on other data" in capsys.readouterr().err and Fuse.count == whole[1]
    with pytest.raises(KeyboardInterrupt):
        learn(market, tmp_path / "b", at=whole[1] - 1)
    key = tmp_path / "b.work" / "work.json"
    told = json.loads(key.read_text())
    key.write_text(json.dumps(told | {"code": told["code"] | {"sources": "0"}}))
    learn(market, tmp_path / "b")
    assert "holds work on other code" in capsys.readouterr().err
    assert content(tmp_path / "a") == content(tmp_path / "b") == whole[0]


def test_too_little_data_leaves_no_work_behind(market, tmp_path):
    with pytest.raises(InputError, match="give a longer range"):
        learn(market, tmp_path / "a", end=1_709_303_440_000_000_000)
    assert not list(tmp_path.iterdir())


def test_killed_between_two_epochs_the_transformer_goes_on_from_its_checkpoint(market, tmp_path):
    how = "[train]\ncap = 3000\nfolds = 1\nseeds = 1\n[transformer]\nepochs = 3\nwidth = 16\nhidden = 16\ncap = 1500\n"
    (tmp_path / "how.toml").write_text(how)
    command = [sys.executable, "-m", "cift_models", "train", "--catalog", str(market), "--only", "transformer"]
    command += ["--config", str(tmp_path / "how.toml"), "--out"]
    killed = subprocess.Popen([*command, str(tmp_path / "a")], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "a.work" / "fold-0-transformer-seed-0.open" / "transformer-checkpoint.safetensors"
    while killed.poll() is None and not checkpoint.is_file():
        try:
            killed.wait(0.01)
        except subprocess.TimeoutExpired:
            continue
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL and not (tmp_path / "a").exists()
    again = subprocess.run([*command, str(tmp_path / "a")], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "transformer: going on after epoch" in again.stderr
    tables = settings.read(tmp_path / "how.toml")
    config = settings.checked(Config, tables.pop("train"), "[train]")
    train(market, out=tmp_path / "b", members=["transformer"], config=config, tables=tables)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "how.toml"]


def test_the_seed_in_the_middle_is_kept_and_the_spread_is_told(market, whole, tmp_path):
    m = json.loads(whole[0]["manifest.json"])
    assert m["seed"] == 5 and [f["seeds"]["values"] for f in m["folds"]] == [[5, 6, 7]] * 2
    told = m["folds"][-1]["seeds"]
    mean = np.mean([of["ensemble"] for of in told["log_loss"].values()], axis=0)
    assert told["kept"] == [5, 6, 7][int(np.argsort(mean)[1])] and mean.min() < mean.max()
    for of in told["log_loss"].values():
        assert len(set(of["fuse"])) == 3 and len(set(of["still"])) == 1, "what depends on no seed is fitted once"
    alone = learn(market, tmp_path / "one", seed=told["kept"], config=Config(cap=4_000, folds=2, seeds=1))
    for name in artifacts.read(alone).manifest["files"]:
        assert (alone / name).read_bytes() == whole[0][name], "the artifact is that of the kept seed"


def test_a_fold_is_scored_on_what_follows_it(whole):
    first, last = json.loads(whole[0]["manifest.json"])["folds"]
    assert last["after"] is None and last["split"]["end"] > first["split"]["end"]
    n = {what: first[what]["decisions"] for what in ("scores", "after")}
    assert n["after"] > 2 * n["scores"] > 0, "the weight slice is a fifth of the first half; what follows is as long as that half"
    assert all(set(r["gain"]) == {"persistence", "time of day", "level-1 logistic"} for r in first["after"]["table"] if r.get("gain"))
