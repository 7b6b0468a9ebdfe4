"""Training: what is learnt comes from the past, repeats for a seed, fits in bounded memory, and says what it left out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_inference import INSTRUMENTS, TICK, artifact, blocks, quotes, source  # noqa: F401

from catalog.errors import InputError
from catalog.events import SCALE
from cift_models import artifacts
from cift_models.ensemble import MEMBERS, member_class
from cift_models.fusion import Fusion
from cift_models.inference import Engine
from cift_models.labels import LABELS, H, walk_forward
from cift_models.train import Config, choose, gather, study, train
from cift_models.windows import Votes

SMALL = Config(cap=5_000)


COIN = f"{__name__}:Coin"  # a cheap member, where what is fitted does not matter


def short(updates=5_000, **kw):
    return source(quotes(7, updates, **kw))


class Coin:
    """A member of the user's own: P(up) is the share of ups in the fit slice, whatever happens."""

    name = "coin"

    def __init__(self, proba):
        self.proba = proba

    @staticmethod
    def gatherer(instruments, names):
        return Counter()

    @classmethod
    def fit(cls, what, gathered):
        assert gathered.events > 0
        if not what.usable:
            raise InputError("coin: nothing to learn")
        y = what.classes(0)[what.fit_rows(0)]
        return cls(np.bincount(y, minlength=3) / len(y))

    def new_state(self):
        return None

    def predict(self, block, state):
        m = len(block.closes)
        return Votes(np.tile(self.proba, (m, H, 1)), np.ones((m, H)))

    def save(self, folder):
        np.savez(folder / "coin.npz", proba=self.proba)

    @classmethod
    def load(cls, folder, names):
        with np.load(folder / "coin.npz", allow_pickle=False) as z:
            return cls(z["proba"])


class Counter:
    events = 0

    def push(self, block):
        self.events += len(block.events)


def test_the_same_seed_gives_the_same_artifact_to_the_last_bit(tmp_path):
    a, b, c = (train(short(), out=tmp_path / n, members=["hmm", "fusion"], seed=s, config=SMALL) for n, s in (("a", 3), ("b", 3), ("c", 4)))
    assert artifacts.read(a).version == artifacts.read(b).version != artifacts.read(c).version


def test_the_manifest_tells_what_was_done(artifact):  # noqa: F811
    m = artifacts.read(artifact).manifest
    assert m["instruments"] == ["A.X", "B.X"] and m["members"].keys() == {"hmm", "fusion"} and m["seed"] == 0
    assert m["latency"]["source"] == "default-1"
    assert m["range"]["start"] < m["range"]["end"] and m["range"]["decisions"] > 10_000
    (fold,) = m["folds"]
    assert fold["split"]["start"] < fold["split"]["calibrate"] < fold["split"]["weigh"] < fold["split"]["end"]
    rows = [r for r in fold["scores"]["table"] if r["horizon"] == "500ms"]
    assert all(r["ensemble"]["log_loss"] < np.log(3) and r["verdict"] == "sufficient" for r in rows)
    json.dumps(m, allow_nan=False)


def test_a_member_of_the_users_own_trains_votes_and_loads_like_the_others(tmp_path):
    out = train(short(gap_ms=150.0), out=tmp_path / "a", members=["hmm"], own=[COIN], config=SMALL)
    with pytest.raises(InputError, match=COIN):
        Engine.load(out, INSTRUMENTS)
    engine = Engine.load(out, INSTRUMENTS, own=[COIN])
    assert engine.members == (*MEMBERS, "coin")
    p = engine.predict(blocks()[0])
    assert np.isfinite(p.votes[:, 5]).all() and p.votes.shape[1] == 6
    assert np.isnan(p.votes[:, engine.members.index("fusion")]).all() and (p.regime >= 0).any()


def test_members_are_chosen_by_name():
    assert list(choose(["fusion", "hmm"])) == ["hmm", "fusion"]
    with pytest.raises(InputError, match="no member named oracle: choose among"):
        choose(["oracle"])
    with pytest.raises(InputError, match="name of its own"):
        choose(["fusion"], ["cift_models.fusion:Fusion"])
    with pytest.raises(InputError, match="no ensemble member"):
        choose([], ["nowhere:Thing"])


def test_what_comes_after_the_training_range_or_its_slices_changes_nothing():
    """The table's rows after the calibration slice are rewritten: members and thresholds stay what they were."""
    chosen = choose(["hmm", "fusion"])
    gathered = gather(short(gap_ms=110.0), chosen, 5_000)
    split = walk_forward(gathered.table.ts)[0]
    what, _ = study(gathered, split, 0)
    late = gathered.table.known_at > split.weigh
    other = gathered._replace(table=gathered.table._replace(move=np.where(late, 77.0, gathered.table.move)))
    what2, _ = study(other, split, 0)
    assert np.array_equal(what.thresholds.balanced, what2.thresholds.balanced)
    block = blocks()[0]
    for name, path in chosen.items():
        a, b = (member_class(path).fit(w, gathered.own[name]) for w in (what, what2))
        assert np.array_equal(a.predict(block, a.new_state()).proba, b.predict(block, b.new_state()).proba, equal_nan=True)


def test_memory_is_bounded_by_thinning_that_keeps_every_label_with_its_decision():
    few, many = (gather(short(), {}, cap).table for cap in (700, 100_000))
    assert 350 <= len(few.ts) <= 700 < len(many.ts)
    place = {(int(t), int(k)): i for i, (t, k) in enumerate(zip(many.ts, many.instrument))}
    at = [place[int(t), int(k)] for t, k in zip(few.ts, few.instrument)]
    for a, b in zip(few, many):
        assert np.array_equal(a, b[at], equal_nan=a.dtype.kind == "f")
    gaps = np.diff(np.sort(at))
    assert gaps.max() <= 4 * np.median(gaps)


def test_the_table_does_not_depend_on_how_the_source_cuts_its_blocks():
    events = quotes(7, 2_000)
    a = gather(lambda: (INSTRUMENTS, iter([events])), {}, 900).table
    b = gather(lambda: (INSTRUMENTS, iter(np.array_split(events, 23))), {}, 10_000).table
    assert np.isin(a.ts, b.ts).all() and a.move.shape[1] == len(LABELS)


def test_too_little_data_says_what_is_left_out_and_how_much_is_needed(tmp_path, capsys):
    train(short(), out=tmp_path / "a", members=[], own=[COIN], config=SMALL)
    assert "left out: horizon 30s" in capsys.readouterr().err
    assert "30s" not in artifacts.read(tmp_path / "a").manifest["horizons_trained"]
    with pytest.raises(InputError, match="decisions in the training range, 1000 are needed"):
        train(source(quotes(7, 300)), out=tmp_path / "b", members=[], own=[COIN], config=SMALL)
    with pytest.raises(InputError, match=r"no member can be trained.*independent labels.*s of data"):
        train(short(12_000, gap_ms=1.0), out=tmp_path / "b", members=[], own=[COIN], config=SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_member_that_cannot_learn_is_left_out_and_the_rest_goes_on(tmp_path, capsys):
    train(short(4_000, gap_ms=15.0), out=tmp_path / "a", members=["hmm"], own=[COIN], config=SMALL)
    assert "left out: member hmm: regimes need 300 seconds" in capsys.readouterr().err
    assert artifacts.read(tmp_path / "a").manifest["members"].keys() == {"coin"}


def test_a_market_that_never_moves_has_nothing_to_learn(tmp_path):
    still = quotes(7, 4_000)
    still["price"] = 100 * SCALE - still["side"].astype(np.int64) * TICK
    with pytest.raises(InputError, match="always does the same"):
        train(source(still), out=tmp_path / "a", members=[], own=[COIN], config=SMALL)


def test_one_instrument_and_a_one_sided_book_train(tmp_path):
    events = quotes(7, 5_000)
    alone = events[events["instrument"] == 0]
    alone = np.delete(alone, np.arange(101, 400, 2))  # asks that never came
    out = train(lambda: (INSTRUMENTS[:1], iter([alone])), out=tmp_path / "a", members=["fusion"], own=[COIN], config=SMALL)
    assert artifacts.read(out).manifest["members"].keys() == {"fusion", "coin"}


def test_folds_walk_forward_and_each_is_scored(tmp_path):
    out = train(short(6_000), out=tmp_path / "a", members=[], own=[COIN], config=Config(cap=5_000, folds=2))
    folds = artifacts.read(out).manifest["folds"]
    assert len(folds) == 2 and folds[0]["split"]["end"] < folds[1]["split"]["end"]
    assert all(f["scores"]["table"] for f in folds)


def test_interrupted_it_leaves_nothing(tmp_path):
    def stops():
        instruments, chunks = short()()

        def some():
            yield next(chunks)
            raise KeyboardInterrupt

        return instruments, some()

    with pytest.raises(KeyboardInterrupt):
        train(stops, out=tmp_path / "a", members=[], own=[COIN], config=SMALL)
    assert not list(tmp_path.iterdir())


def test_an_output_folder_with_other_things_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "thesis.tex").write_text("...")

    def never():
        raise AssertionError("read")

    with pytest.raises(InputError, match="holds no trained models"):
        train(never, out=tmp_path, members=[], own=[COIN])


def test_reading_models_costs_no_heavy_import():
    """run_backtest.py and the server's first prediction are quick: nothing that only training, statistics or trading need comes with the
    inference and any of the five."""
    code = (
        "import sys, cift_models.inference, cift_models.train, cift_models.validate;"
        "from cift_models.ensemble import MEMBERS, member_class;"
        "assert all(member_class(where) for where in MEMBERS.values()) and len(MEMBERS) == 5; print([m for m in "
        "('torch', 'xgboost', 'sklearn', 'hmmlearn', 'scipy.stats', 'scipy.optimize', 'nautilus_trader') if m in sys.modules])"
    )
    got = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert got.stdout.strip() == "[]"


def test_binance_trains_and_decides_from_a_catalog(data, tmp_path):
    root = data / "catalogs" / "binance-2024-08-08"
    out = train(root, ["BTCUSDT-PERP.BINANCE"], out=tmp_path / "a", members=["fusion"], config=Config(cap=4_000))
    m = artifacts.read(out).manifest
    assert m["instruments"] == ["BTCUSDT-PERP.BINANCE"] and m["members"] == {"fusion": MEMBERS["fusion"]}
    assert Fusion.load(out, tuple(m["features"])).importance()
