"""Alternative data on their way through training, engine and command line: as of the time known, live as in history, never required."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_inference import INSTRUMENTS, join, pieces, quotes, run, same, source

from catalog import altdata
from catalog.errors import InputError
from catalog.events import SCALE
from cift_models import artifacts
from cift_models.describe import describe
from cift_models.fusion import Fusion
from cift_models.inference import Engine, stream
from cift_models.train import Config, train

SMALL = Config(cap=8_000)


def mood(events: np.ndarray, seed: int = 3) -> altdata.Table:
    """Every second a mood of each instrument, known a third of a second later: where its price goes within the next two, through noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for k, instrument in enumerate(INSTRUMENTS):
        e = events[events["instrument"] == k]
        price = e["price"][::2]
        ts = np.arange(int(e["ts_init"][0]), int(e["ts_init"][-1]) - 2 * SCALE, SCALE)
        now, then = (price[np.searchsorted(e["ts_init"][::2], t, "right") - 1] for t in (ts, ts + 2 * SCALE))
        value = np.tanh((then - now) / instrument.tick / 3 + rng.normal(size=len(ts)))
        rows += [(instrument.id, "social_sentiment", float(v), int(t), int(t + SCALE // 3)) for v, t in zip(value, ts)]
    return altdata.table(rows)


EVENTS = quotes(seed=2, updates=12_000, signal=0.3)


@pytest.fixture(scope="module")
def table() -> altdata.Table:
    return mood(EVENTS)


@pytest.fixture(scope="module")
def informed(table: altdata.Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(source(EVENTS), out=tmp_path_factory.mktemp("informed") / "artifact", members=["fusion"], config=SMALL, altdata=table)


def test_an_artifact_tells_what_it_learnt_from(informed: Path, table: altdata.Table) -> None:
    assert 0 < artifacts.read(informed).manifest["altdata"]["social_sentiment"] <= len(table)
    engine = Engine.load(informed, INSTRUMENTS)
    leading = engine.importance()["fusion"]["1s"]
    (told,) = (c for c in leading if c["column"] == "alt_social_sentiment")
    assert told["gain"] > 0.1 and min(told["shap"]) > 0.05 and len(told["shap"]) == 4


def test_rows_and_batches_that_come_one_by_one_give_the_decisions_of_history_to_the_last_bit(informed: Path, table: altdata.Table) -> None:
    whole = join(list(stream(INSTRUMENTS, [EVENTS[:6_000]])))
    history = Engine.load(informed, INSTRUMENTS)
    history.tell(table)
    want = run(history, [whole])
    live, waiting = Engine.load(informed, INSTRUMENTS), table.rows()
    live.tell(altdata.table(waiting[:2]))
    waiting, got = waiting[2:], []
    for batch in pieces(whole, whole.closes + 1):
        now = int(batch.events["ts_init"][-1])
        known = [r for r in waiting if r[4] <= now]
        if known:
            live.tell(altdata.table(known))
            waiting = waiting[len(known) :]
        got.append(batch)
        got[-1] = live.predict(batch)
    assert same(want, [np.concatenate(f) for f in zip(*got)])
    without = Engine.load(informed, INSTRUMENTS)
    blind = run(without, [whole])
    assert not same(want, blind) and np.isfinite(blind[2]).any(), "without the table it goes on, and says something else"


def test_a_swap_keeps_what_was_told(informed: Path, table: altdata.Table) -> None:
    blocks = list(stream(INSTRUMENTS, np.array_split(EVENTS[:6_000], 4)))
    straight, swapped = (Engine.load(informed, INSTRUMENTS) for _ in range(2))
    for e in (straight, swapped):
        e.tell(table)
    want = run(straight, blocks)
    got = [swapped.predict(b) for b in blocks[:2]]
    swapped.swap(informed)
    got += [swapped.predict(b) for b in blocks[2:]]
    assert np.array_equal(want[7], np.concatenate([p.votes for p in got]), equal_nan=True)


def test_a_table_about_others_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    foreign = altdata.table([("ELSE.X", "vix", 15.0, 1_700_000_000 * SCALE, 1_700_000_000 * SCALE)])
    with pytest.raises(InputError, match=r"tell of ELSE.X, not of A.X, B.X"):
        train(source(EVENTS), out=tmp_path / "a", members=["fusion"], config=SMALL, altdata=foreign)
    assert not list(tmp_path.iterdir())


def test_the_command_line_trains_evaluates_and_inspects_with_a_table(tmp_path: Path) -> None:
    from catalog.databento import import_dbn
    from catalog.synthetic import make_market

    made = make_market(tmp_path / "market", seed=4, sessions=2, events=120_000, instruments=2)
    root = import_dbn([*made.mbo, *made.definitions], tmp_path / "catalog").root
    split = json.loads(made.truth.read_text())["sessions"][1]["start_ns"]

    def models(*arguments: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "cift_models", *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, timeout=300, check=False, cwd=Path(__file__).parents[2])

    shared = ["--catalog", root, "--altdata", made.alternative]
    more = ["--end", split - 1, "--only", "fusion", "--folds", 1, "--seeds", 1, "--out", tmp_path / "a"]
    done = models("train", *shared, *more)
    assert done.returncode == 0, done.stderr
    told = "\n".join(describe(artifacts.read(tmp_path / "a")))
    assert "alternative features: " in told and " alt_" in told and "alternative data: " in told
    scores = []
    for known in (shared, shared[:2]):
        done = models("evaluate", *known, "--artifacts", tmp_path / "a", "--start", split, "--json")
        assert done.returncode == 0, done.stderr
        scores.append(json.loads(done.stdout.splitlines()[-1]))
    losses = [[r["ensemble"]["log_loss"] for r in s["table"] if "ensemble" in r] for s in scores]
    assert losses[0] != losses[1]
    assert {"horizon", "model", "ece", "expected", "p", "debiased"} == set(scores[0]["calibration"][0])
    done = models("train", "--catalog", root, "--altdata", tmp_path / "nowhere.csv", *more)
    assert done.returncode == 2 and "nowhere.csv does not exist" in done.stderr
    assert Fusion.load(tmp_path / "a", tuple(artifacts.read(tmp_path / "a").manifest["features"])).alternative.size
