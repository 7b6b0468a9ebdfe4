"""Scores: what they say of known forecasts, intervals that cover, baselines from the training range, nothing claimed of nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_fusion import INPUTS, NAMES, make_study
from test_inference import INSTRUMENTS, artifact, join, quotes, source  # noqa: F401

from catalog.events import SCALE
from cift_models import artifacts
from cift_models.baselines import Baselines, _choose, level1_columns
from cift_models.calibration import calibration_error
from cift_models.features import NAMES as FEATURE_NAMES
from cift_models.inference import Engine, stream
from cift_models.labels import NEVER, H, Labeller, classify, last_known
from cift_models.scorecard import lines
from cift_models.validate import (
    ENOUGH,
    Sample,
    adjust,
    block_bootstrap,
    claims,
    evaluate,
    log_loss,
    weighted_f1,
)  # fmt: skip
from cift_models.windows import HORIZONS_NS


def sample(seed: int = 0, n: int = 4_000, skill: float = 1.0, members: int = 2, spacing: int = 1_000_000_000):
    """Moves drawn from the probabilities p themselves (`skill` 1) or from even ones (0): p is what is scored."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(3) * 1.5, (n, H))
    truth = skill * p + (1 - skill) / 3
    y = (rng.random((n, H))[..., None] > truth.cumsum(axis=2)).sum(axis=2)
    ts = np.arange(n, dtype=np.int64) * spacing
    return {
        "ts": ts, "instrument": np.arange(n) % 2, "move": (y - 1.0) * 3, "known_at": ts[:, None] + np.array(HORIZONS_NS) + 1,
        "spread": np.ones(n), "proba": p.astype(np.float32), "direction": np.where(p[..., 2] > p[..., 0], 1, -1).astype(np.int8),
        "votes": np.where(np.arange(n)[:, None, None, None] % 4 == 0, np.nan, np.repeat(p[:, None], members, axis=1)).astype(np.float32),
        "level1": np.zeros((n, 1), np.float32), "serial": np.arange(n) // 2,
    }  # fmt: skip


THRESHOLD = np.ones((2, H))


def test_scores_of_a_forecaster_who_tells_the_truth():
    got = evaluate(sample(n=40_000), THRESHOLD, ["A", "B"], ["x", "y"])
    json.dumps(got)
    assert len(got["table"]) == 2 * H
    for row in got["table"]:
        e = row["ensemble"]
        assert e["ece"] < 0.02 and e["log_loss"] < np.log(3) - 0.1
        assert e["log_loss_interval"][0] < e["log_loss"] < e["log_loss_interval"][1]
        assert e["accuracy"] == pytest.approx(e["weighted_f1"], abs=0.05)
        assert row["members"]["x"]["cover"] == pytest.approx(0.75, abs=0.3)
        assert 0.6 < row["pays"] < 0.72
        assert row["decided"]["cover"] == 1.0 and row["decided"]["hit_rate"] > 0.6 and row["decided"]["net_ticks"] > -0.2


def test_scores_equal_scikit_learns():
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.metrics import log_loss as sk_log_loss

    s = sample(3)
    row = evaluate(s, THRESHOLD, ["A", "B"], ["x"])["table"][0]
    mine = s["instrument"] == 0
    y, p = classify(s["move"][mine, 0], 1.0), s["proba"][mine, 0].astype(float)
    guess = p.argmax(axis=1)
    assert row["ensemble"]["log_loss"] == pytest.approx(sk_log_loss(y, p), rel=1e-5)
    assert row["ensemble"]["macro_f1"] == pytest.approx(f1_score(y, guess, average="macro"))
    assert row["ensemble"]["weighted_f1"] == pytest.approx(f1_score(y, guess, average="weighted"))
    assert row["ensemble"]["accuracy"] == pytest.approx(accuracy_score(y, guess))


def test_calibration_error_is_what_was_planted():
    rng = np.random.default_rng(0)
    p = np.full((60_000, 3), 1 / 3) + np.array([0.1, 0.0, -0.1])
    y = rng.integers(0, 3, 60_000).astype(np.int8)
    assert calibration_error(p, y) == pytest.approx(0.2 / 3, abs=0.006)
    assert weighted_f1(y, y) == 1.0


def test_few_independent_labels_are_called_insufficient_however_many_rows_there_are():
    got = evaluate(sample(n=4_000, spacing=10_000_000), THRESHOLD, ["A", "B"], ["x"])["table"]
    by = {(r["instrument"], r["horizon"]): r for r in got}
    assert by["A", "30s"]["n"] == 2_000 and by["A", "30s"]["effective"] == 2 and by["A", "30s"]["verdict"] == "insufficient"
    assert by["A", "500ms"]["effective"] < ENOUGH
    assert evaluate(sample(n=4_000), THRESHOLD, ["A", "B"], ["x"])["table"][0]["verdict"] == "sufficient"


def test_bootstrap_intervals_cover_the_mean_of_a_series_that_depends_on_itself():
    covered, naive = 0, 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        x = np.repeat(rng.normal(size=200), 20) + 0.3 * rng.normal(size=4_000)
        ts = np.arange(4_000)
        low, high = block_bootstrap(x, ts, 80, seed, 300)
        covered += low <= 0 <= high
        naive += abs(x.mean()) <= 1.96 * x.std() / np.sqrt(len(x))
    assert covered / 200 > 0.88 > 0.5 > naive / 200


def test_too_short_a_series_has_no_interval():
    assert np.isnan(block_bootstrap(np.ones(100), np.arange(100), 50)).all()
    assert np.isnan(block_bootstrap(np.ones(1), np.arange(1), 50)).all()


@pytest.fixture(scope="module")
def study():
    return make_study(5, n=6_000)


@pytest.fixture(scope="module")
def baselines(study):
    return Baselines.fit(study, ["spread", "a", "never"])


def test_persistence_and_time_of_day_are_the_rates_of_the_training_range_where_they_tell_anything(study):
    t, rng = study.table, np.random.default_rng(9)
    for h, planted in ((0, "last class"), (1, "half hour"), (2, "nothing")):
        move = t.move.copy()
        for k in range(2):
            mine = np.flatnonzero(t.instrument == k)
            part = (t.ts[mine] // (1_800 * SCALE)) % 3
            last = np.cumsum(rng.random(len(mine)) < 0.002) % 3  # a class that stays for long
            cause = {"last class": last, "half hour": part, "nothing": np.zeros(len(mine), np.int64)}[planted]
            odds = np.where(np.eye(3)[cause] > 0, 0.8, 0.1) if planted != "nothing" else np.full((len(mine), 3), 1 / 3)
            y = (rng.random(len(mine))[:, None] > odds.cumsum(axis=1)).sum(axis=1)
            move[mine, h] = np.where(np.isfinite(move[mine, h]), (y - 1) * 99.0, np.nan)
        made = study._replace(table=t._replace(move=move))
        b = Baselines.fit(made, ["a"])
        for k in range(2):
            mine = np.flatnonzero((t.instrument == k) & (t.ts < study.split.weigh))
            y, known = made.classes(h)[mine], t.known_at[mine, h]
            before, ok = last_known(t.ts[mine], known, y), (known <= study.split.weigh) & (y >= 0)
            for cells, of in ((b.persistence[k, h, 1:], before), (b.day[k, :3, h], (t.ts[mine] // (1_800 * SCALE)) % 48)):
                for c in range(3):
                    there = ok & (of == c)
                    rates = np.bincount(y[there], minlength=3) / max(1, there.sum())
                    if planted == "nothing":
                        assert np.allclose(cells[c], 1 / 3, atol=0.06), "what tells nothing is not followed"
                    elif (planted == "last class") == (cells.shape[0] == 3 and of is before) and there.sum() > 500:
                        assert np.allclose(cells[c], rates, atol=0.06)
    p = b.predict(0, t.ts[:50], t.instrument[:50], np.full(50, -1, np.int8), np.full((50, 1), np.nan))
    assert all(np.allclose(v.sum(axis=1), 1) for v in p.values()) and set(p) == set(Baselines.names)


def test_in_doubt_a_baseline_says_less():
    rng = np.random.default_rng(0)
    base = rng.random(1_000)
    far, near = base + 0.2 + 0.1 * rng.normal(size=1_000), base + 0.001 + 0.1 * rng.normal(size=1_000)
    assert _choose((1.0, 10.0, 100.0), [base, near, far], 1.0) == 10.0 and _choose((1.0, 10.0), [base, far], 1.0) == 1.0
    assert _choose((1.0, 10.0), [base, base + 0.2 * rng.choice([-1, 1.2], 1_000)], 0.02) == 10.0, "few independent labels prove nothing"


def test_the_logistic_baseline_is_as_good_as_scikit_learns_best(study, baselines):
    from sklearn.linear_model import LogisticRegression

    t = study.table
    mine = np.flatnonzero((t.instrument == 1) & (t.ts < study.split.weigh) & (t.known_at[:, 2] <= study.split.weigh))
    place = [NAMES.index(c) for c in ("spread", "a")]
    everything = t.rows[(t.instrument == 1) & (t.ts < study.split.weigh)][:, place].astype(float)
    z = np.nan_to_num((t.rows[mine][:, place].astype(float) - np.nanmean(everything, axis=0)) / np.nanstd(everything, axis=0)).clip(-5, 5)
    y = study.classes(2)[mine]
    x = t.rows[mine][:, [NAMES.index(c) for c in ("spread", "a", "never")]].astype(float)
    got = baselines.predict(2, t.ts[mine], t.instrument[mine], np.zeros(len(mine), np.int8), x)["level-1 logistic"]
    best = min(log_loss(LogisticRegression(C=c, max_iter=200).fit(z, y).predict_proba(z), y).mean() for c in (1.0, 0.1, 0.01, 0.001))
    assert log_loss(got, y).mean() == pytest.approx(best, abs=0.01), "as good as the best ridge in the sample, but for what choosing costs"
    assert log_loss(got, y).mean() < np.log(3) - 0.05
    assert INPUTS[0] == "spread"


def test_baselines_see_nothing_after_the_weight_slice_begins(study, baselines):
    late = study.table.known_at > study.split.weigh
    other = study._replace(table=study.table._replace(move=np.where(late, -study.table.move, study.table.move)))
    again = Baselines.fit(other, ["spread", "a", "never"])
    assert all(np.array_equal(getattr(again, n), getattr(baselines, n)) for n in ("persistence", "day", "coef", "centre", "scale"))


@pytest.mark.parametrize("classes", [(1,), (0, 1), (0, 2)])
def test_baselines_of_a_market_that_lacks_classes(classes):
    study = make_study(6, n=2_000)
    move = np.random.default_rng(0).choice(np.array(classes) - 1.0, study.table.move.shape) * 3
    b = Baselines.fit(study._replace(table=study.table._replace(move=move)), ["a"])
    p = b.predict(0, study.table.ts, study.table.instrument, np.ones(2_000, np.int8), study.table.rows[:, [2]].astype(float))
    for v in p.values():
        assert np.isfinite(v).all() and np.allclose(v.sum(axis=1), 1)
        assert v[:, list(classes)].sum(axis=1).min() > 0.9


def test_baselines_are_saved_and_loaded_unchanged(baselines, tmp_path):
    baselines.save(tmp_path)
    again = Baselines.load(tmp_path)
    assert again.columns == baselines.columns
    assert all(np.array_equal(getattr(again, n), getattr(baselines, n)) for n in ("persistence", "day", "coef", "centre", "scale"))
    assert np.array_equal(again.only([1]).coef[0], baselines.coef[1])


def test_claims_need_enough_labels_and_every_gain_above_zero():
    def row(low, verdict="sufficient", p=0.001):
        gain = {"p": {"interval": [low, 1], "p": p}, "d": {"interval": [0.1, 1], "p": 0.001}}
        return {"instrument": "A", "horizon": "1s", "verdict": verdict, "gain": gain}

    def told(*rows):
        adjust(rows)
        return claims(rows)

    assert len(told(row(0.01))) == 1
    assert told(row(-0.01)) == told(row(0.01, "insufficient")) == told(row(0.01, p=0.03)) == claims([{"verdict": "sufficient"}]) == []
    assert told(row(0.01, p=0.02)) and not told(row(0.01, p=0.02), row(0.01, p=0.02)), "what passes alone need not pass among others"


def scored(engine, artifact, events, since=0, cap=10_000):  # noqa: F811
    baselines = Baselines.load(artifact)
    s = Sample(INSTRUMENTS, FEATURE_NAMES, len(engine.members), baselines.columns, cap, since)
    for block in stream(INSTRUMENTS, source(events)()[1]):
        s.push(block, engine.predict(block))
    got = s.finish()
    return got, evaluate(got, engine.ensemble.threshold, ["A.X", "B.X"], engine.members, baselines)


def test_in_a_planted_market_the_models_beat_what_knows_no_book_and_in_a_null_market_nothing_is_claimed(artifact):  # noqa: F811
    engine = Engine.load(artifact, INSTRUMENTS)
    _, planted = scored(engine, artifact, quotes(11, 12_000))
    for row in (r for r in planted["table"] if r["horizon"] == "500ms"):
        assert row["verdict"] == "sufficient" and row["leak_gap"] > 2, "persistence of the label stays behind: nothing leaks"
        assert all(row["gain"][name]["interval"][0] > 0 for name in ("persistence", "time of day"))
        assert row["gain"]["level-1 logistic"]["interval"][1] > 0, "the planted effect is in level 1, where the logistic sees it too"
    engine.reset()
    _, null = scored(engine, artifact, quotes(12, 12_000, signal=0.0))
    assert null["claims"] == []
    assert list(lines(null))[-2] == "beats every baseline: nowhere, by Holm-adjusted tests"
    for row in (r for r in planted["table"] if r["horizon"] == "500ms"):
        assert set(row["member_gain"]) == {"hmm", "fusion"} and "ensemble" in row["mcs"]["p"]
        assert "persistence" not in row["mcs"]["included"] and row["gain"]["persistence"]["p_holm"] < 0.01
        assert 0 < row["agreement"]["cover"] <= 1 and row["agreement"]["rule"]["hit_rate"] > 0.5
    json.dumps(planted)


def test_the_sample_holds_the_labels_of_its_decisions(artifact):  # noqa: F811
    engine, events = Engine.load(artifact, INSTRUMENTS), quotes(13, 3_000)
    got, _ = scored(engine, artifact, events, since=int(events["ts_init"][2_000]), cap=400)
    assert len(got["ts"]) <= 400 and (got["ts"] >= events["ts_init"][2_000]).all()
    block = join(list(stream(INSTRUMENTS, [events])))
    labeller = Labeller(INSTRUMENTS, HORIZONS_NS, ())
    want = {}
    for o in (labeller.push(block.events, block.rows[:, 0].copy(), block.closes), labeller.finish()):
        want |= {(k, s, j): (m, t) for k, s, j, m, t in zip(o.instrument, o.serial, o.label, o.move, o.known_at)}
    for i in range(len(got["ts"])):
        for j in range(H):
            move, known = want.get((got["instrument"][i], got["serial"][i], j), (np.nan, NEVER))
            assert np.array_equal(got["move"][i, j], move, equal_nan=True) and got["known_at"][i, j] == known


def test_level_one_columns_are_there_on_any_feed():
    assert {"spread", "imbalance_1"} <= set(level1_columns()) <= set(FEATURE_NAMES)
    assert "mid" not in level1_columns()
    assert artifacts.FORMAT == 6
