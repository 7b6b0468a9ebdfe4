"""Markets with nothing to find, markets that stand still, and input that is not what one hopes for: nothing is claimed, nothing breaks."""

from __future__ import annotations

import numpy as np
import pytest
from test_inference import INSTRUMENTS, TICK, quotes, source

from catalog.errors import InputError
from catalog.events import SCALE, read_dbn
from catalog.synthetic import make_market
from cift_models import artifacts
from cift_models.baselines import Baselines, level1_columns
from cift_models.ensemble import member_class
from cift_models.features import NAMES
from cift_models.inference import Engine, stream
from cift_models.labels import FLAT, LABELS, walk_forward
from cift_models.scorecard import lines
from cift_models.significance import ALPHA
from cift_models.train import Config, choose, gather, study, train
from cift_models.validate import Sample, evaluate

SMALL = Config(cap=6_000)
PAIR = ["hmm", "fusion"]


def still(events, instrument=None):
    """The same quotes at prices that never move."""
    e = events.copy()
    mine = np.ones(len(e), np.bool_) if instrument is None else e["instrument"] == instrument
    e["price"][mine] = 100 * SCALE - e["side"][mine].astype(np.int64) * TICK
    return e


def scored(out, events, seed=0, instruments=INSTRUMENTS):
    engine, baselines = Engine.load(out, instruments), Baselines.load(out)
    sample = Sample(instruments, NAMES, len(engine.members), baselines.columns, 20_000)
    for block in stream(instruments, np.array_split(events, 4)):
        sample.push(block, engine.predict(block))
    got = sample.finish()
    return got, evaluate(got, engine.ensemble.threshold, [i.id for i in instruments], engine.members, baselines, seed)


@pytest.mark.parametrize("seed", range(3))
def test_in_a_null_market_no_gain_over_a_baseline_is_shown_and_nothing_is_claimed(seed, tmp_path):
    """The mid is a martingale that knows neither book nor flow: what is gained in the sample is chance, and is called so."""
    market = make_market(tmp_path / "market", 100 + seed, 2, 60_000, 2, null=True)
    (first, instruments), (second, _) = (read_dbn(f) for f in market.mbo)
    how = dict(members=["hawkes", *PAIR], config=SMALL, seed=seed)
    out = train(lambda: (instruments, iter(np.array_split(first, 4))), out=tmp_path / "a", **how)
    _, scores = scored(out, second, seed, instruments)
    tested = [g for r in scores["table"] for g in (r.get("gain") or {}).values()]
    assert len(tested) >= 9 and not scores["claims"]
    assert not any(g["interval"][0] > 0 and g["p_holm"] < ALPHA for g in tested)
    assert list(lines(scores))[-2] == "beats every baseline: nowhere, by Holm-adjusted tests"


@pytest.fixture(scope="module")
def half_still(tmp_path_factory):
    """Trained where the second instrument never moves."""
    return train(source(still(quotes(7, 8_000), 1)), out=tmp_path_factory.mktemp("still") / "a", members=PAIR, config=SMALL)


def test_where_nothing_moves_flat_is_what_is_foretold(half_still):
    got, scores = scored(half_still, still(quotes(8, 4_000), 1))
    h = LABELS.index("500ms")
    flat = got["proba"][:, h, FLAT]
    assert flat[got["instrument"] == 1].mean() > 0.9 > 0.7 > flat[got["instrument"] == 0].mean()
    row = next(r for r in scores["table"] if r["instrument"] == "B.X" and r["horizon"] == "500ms")
    assert row["pays"] == 0 and row["ensemble"]["accuracy"] > 0.99 and not (got["direction"][got["instrument"] == 1] != 0).any()


def test_a_market_of_which_only_one_way_is_known_is_learnt_and_calibrated(tmp_path):
    e = quotes(7, 8_000)
    for k in range(2):  # fold the walk upwards: down never happens
        mine = np.flatnonzero(e["instrument"] == k)
        mid = (e["price"][mine[::2]] + e["price"][mine[1::2]]) // 2
        e["price"][mine] += np.repeat(np.maximum.accumulate(mid) - mid, 2)
    out = train(source(e), out=tmp_path / "a", members=PAIR, config=SMALL)
    got, _ = scored(out, e)
    p = got["proba"][np.isfinite(got["proba"][:, 0, 0]), 0]
    assert np.allclose(p.sum(axis=1), 1, atol=1e-5) and p[:, 0].mean() < 0.05 < p[:, 2].mean()


def test_features_that_never_change_teach_nothing_and_break_nothing(tmp_path):
    e = quotes(7, 8_000)
    e["size"] = 100 * SCALE
    out = train(source(e), out=tmp_path / "a", members=PAIR, config=SMALL)
    got, _ = scored(out, e[:8_000])
    assert np.isfinite(got["proba"][-100:, 0]).all()


def test_holes_and_infinities_in_what_is_learnt_from_are_survived():
    chosen = choose(["fusion"])
    found = gather(source(quotes(7, 6_000)), chosen, 6_000)
    rng, rows = np.random.default_rng(0), found.table.rows.copy()
    for fill in (np.nan, np.inf, -np.inf, 3e38):
        rows[rng.random(rows.shape) < 0.1] = fill
    what, _ = study(found._replace(table=found.table._replace(rows=rows)), walk_forward(found.table.ts)[0], 0)
    fusion = member_class(chosen["fusion"]).fit(what, None)
    baselines = Baselines.fit(what, level1_columns())
    assert all(np.isfinite(a).all() for a in (baselines.persistence, baselines.day, baselines.coef))
    block = next(stream(INSTRUMENTS, source(quotes(8, 1_000))()[1]))
    assert np.isfinite(fusion.predict(block, None).proba[:, 0]).all()


def test_labels_that_would_end_after_the_data_are_none(tmp_path):
    found = gather(source(quotes(7, 6_000)), {}, 6_000).table
    for h, label in enumerate(LABELS[:4]):
        ends = found.ts + (500_000_000, 1_000_000_000, 5_000_000_000, 30_000_000_000)[h]
        late = ends > found.ts[-1] + 1_000_000_000
        assert np.isnan(found.move[late, h]).all() and np.isfinite(found.move[~late, h]).mean() > 0.99, label


def test_too_little_of_a_fold_leaves_it_out_and_too_little_of_all_says_what_is_needed(tmp_path):
    events = quotes(7, 1_800)
    out = train(source(events), out=tmp_path / "a", members=["fusion"], config=Config(cap=6_000, folds=4))
    folds = artifacts.read(out).manifest["folds"]
    assert folds[0]["scores"] is None and "give a longer range" in folds[0]["left_out"][0] and folds[-1]["scores"]
    with pytest.raises(InputError, match=r"decisions in the training range, 1000 are needed"):
        train(source(events[:600]), out=tmp_path / "b", members=["fusion"], config=SMALL)
