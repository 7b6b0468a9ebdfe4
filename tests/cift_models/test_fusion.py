"""Fusion: its own walk is XGBoost's prediction, its probabilities are calibrated, and it copes with what is missing."""

from __future__ import annotations

import json

import numpy as np
import pytest

from catalog import altdata
from catalog.asof import Lookup, asof
from catalog.events import EVENT, SCALE, Instrument
from cift_models import fusion as fusion_module
from cift_models.calibration import calibration_error
from cift_models.fusion import AGE, FLOOR, Config, Fusion, _blend, travels
from cift_models.labels import LABELS, Split, Study, Table, Thresholds, classify
from cift_models.trees import TILE, interpolate, softmax, walk
from cift_models.validate import log_loss
from cift_models.windows import HORIZONS_NS, Block

NAMES = ("mid", "spread", "a", "b", "c", "never")
INPUTS = NAMES[1:]
SMALL = Config(rounds=20, child_weight=5.0, threads=1)


def make_study(seed: int = 0, n: int = 6_000, instruments: int = 2, signal: float = 2.0, usable=(0, 1, 2, 3)) -> Study:
    """Moves in half ticks that `a` and the product of `b` and `c` drive; a tenth of all inputs is missing, one always."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, len(NAMES))).astype(np.float32)
    rows[:, 1] = rng.integers(1, 4, n)
    drive = signal * (rows[:, 2] + rows[:, 3] * rows[:, 4]).astype(np.float64)
    rows[:, 2:5][rng.random((n, 3)) < 0.1] = np.nan
    rows[:, -1] = np.nan
    ts = np.arange(n, dtype=np.int64) * 10 * SCALE
    move = np.round((drive[:, None] + rng.normal(size=(n, len(LABELS))) * 2) * 2) / 2
    known = ts[:, None] + np.array([*HORIZONS_NS, 1, 1, 1]) + 1
    inst = np.arange(n) % instruments
    table = Table(ts, inst, rows, rows[:, 1].astype(np.float64), move, known)
    split = Split(0, int(ts[n * 6 // 10]), int(ts[n * 8 // 10]), int(ts[-1]) + 1)
    table_of = [Instrument(f"I{k}.X", SCALE // 100, SCALE, 1.0, "USD") for k in range(instruments)]
    thresholds = Thresholds(np.full((instruments, len(LABELS)), 1.25), np.full(instruments, 2.0))
    return Study(tuple(table_of), NAMES, INPUTS, table, split, thresholds, tuple(usable), seed)


def as_block(study: Study, rows: np.ndarray) -> Block:
    events = np.zeros(len(rows), EVENT)
    events["ts_init"], events["instrument"] = study.table.ts[rows], study.table.instrument[rows]
    return Block(events, study.table.rows[rows].astype(np.float64), np.arange(len(rows)))


@pytest.fixture(scope="module")
def study() -> Study:
    return make_study()


@pytest.fixture(scope="module")
def fusion(study) -> Fusion:
    return Fusion.fit(study, None, SMALL)


def booster(model):
    import xgboost

    b = xgboost.Booster()
    b.load_model(bytearray(json.dumps(model).encode()))
    return b


def test_the_walk_is_xgboosts_prediction_to_the_last_bit(study, fusion):
    import xgboost

    x = fusion.inputs(study.table.rows, study.table.instrument)
    x[:50, :3] = np.float32(1e30)
    x[50:60] = np.nan
    ours = np.empty((len(x), 12), np.float32)
    walk(x, *fusion.trees, ours)
    for h, model in fusion.models.items():
        theirs = booster(model).predict(xgboost.DMatrix(x), output_margin=True)
        assert np.array_equal(ours[:, 3 * h : 3 * h + 3], theirs)
        p = np.empty((len(x), 3))
        softmax(ours[:, 3 * h : 3 * h + 3], p)
        assert np.allclose(p, booster(model).predict(xgboost.DMatrix(x)), atol=1e-6)


def naive_score(model, x):
    """Down every tree by its own JSON, one row at a time, sums in float32."""
    learner = model["learner"]
    total = np.array(json.loads(learner["learner_model_param"]["base_score"]), np.float32)
    booster_ = learner["gradient_booster"]["model"]
    for tree, group in zip(booster_["trees"], booster_["tree_info"]):
        node = 0
        while tree["left_children"][node] != -1:
            v = x[tree["split_indices"][node]]
            left = bool(tree["default_left"][node]) if np.isnan(v) else v < np.float32(tree["split_conditions"][node])
            node = tree["left_children"][node] if left else tree["right_children"][node]
        total[group] += np.float32(tree["split_conditions"][node])
    return total


def test_the_walk_equals_a_naive_descent(study, fusion):
    x = fusion.inputs(study.table.rows[:40], study.table.instrument[:40])
    z = fusion.scores(study.table.rows[:40], study.table.instrument[:40])
    for i in range(40):
        for h, model in fusion.models.items():
            assert np.array_equal(z[i, 3 * h : 3 * h + 3], naive_score(model, x[i]))


def test_one_row_and_a_block_give_the_same_votes_bit_for_bit(study, fusion):
    rows = np.arange(2 * TILE + 7)
    whole = fusion.predict(as_block(study, rows))
    for i in rows:
        one = fusion.predict(as_block(study, np.array([i])))
        assert np.array_equal(one.proba[0], whole.proba[i]) and np.array_equal(one.magnitude[0], whole.magnitude[i])


def test_votes_are_probabilities_and_sizes(study, fusion):
    votes = fusion.predict(as_block(study, np.arange(1_000)))
    assert np.allclose(votes.proba.sum(axis=2), 1) and (votes.proba > 0).all()
    assert (votes.magnitude >= 0).all() and np.isfinite(votes.magnitude).all()


def test_it_finds_the_planted_signal_out_of_sample(study, fusion):
    later = np.flatnonzero(study.table.ts >= study.split.weigh)
    votes = fusion.predict(as_block(study, later))
    for h in range(4):
        y = study.classes(h)[later]
        rates = np.bincount(y, minlength=3) / len(y)
        assert log_loss(votes.proba[:, h], y).mean() < -np.log(rates) @ rates - 0.1
        moved, size = np.abs(study.table.move[later, h]), votes.magnitude[:, h]
        assert size.mean() == pytest.approx(moved.mean(), rel=0.1)
        assert np.corrcoef(size, moved)[0, 1] > 0.15


def test_calibration_brings_out_of_sample_error_near_to_nothing():
    study = make_study(1, n=20_000)
    fusion = Fusion.fit(study, None, SMALL)
    later = np.flatnonzero(study.table.ts >= study.split.weigh)
    votes, z = fusion.predict(as_block(study, later)), fusion.scores(study.table.rows[later], study.table.instrument[later])
    y, raw = study.classes(0)[later], np.empty((len(later), 3))
    softmax(z[:, :3], raw)
    assert calibration_error(votes.proba[:, 0], y) < 0.03
    assert calibration_error(votes.proba[:, 0], y) < calibration_error(raw, y)


def test_the_same_seed_gives_the_same_model_and_another_seed_another(study, fusion):
    again, other = Fusion.fit(study, None, SMALL), Fusion.fit(study._replace(seed=5), None, SMALL)
    assert json.dumps(again.models) == json.dumps(fusion.models)
    assert all(np.array_equal(a, b) for a, b in zip(again.knots, fusion.knots))
    assert json.dumps(other.models) != json.dumps(fusion.models)


def test_what_happens_after_the_calibration_slice_changes_nothing(study, fusion):
    changed = study.table.move.copy()
    changed[study.table.known_at > study.split.weigh] *= -3
    again = Fusion.fit(study._replace(table=study.table._replace(move=changed)), None, SMALL)
    assert json.dumps(again.models) == json.dumps(fusion.models)
    assert all(np.array_equal(a, b) for a, b in zip(again.knots, fusion.knots))


def test_labels_known_only_after_the_fit_slice_grow_no_tree(study, fusion):
    """The calibration slice says where to stop, nothing more."""
    changed = study.table.move.copy()
    changed[study.table.known_at > study.split.calibrate] *= -1
    again = Fusion.fit(study._replace(table=study.table._replace(move=changed)), None, SMALL)
    for h, model in fusion.models.items():
        a, b = (m["learner"]["gradient_booster"]["model"]["trees"] for m in (model, again.models[h]))
        assert min(len(a), len(b)) >= 3 and len(a) != len(b)
        assert a[: min(len(a), len(b))] == b[: min(len(a), len(b))]


def test_a_feed_without_some_columns_still_gets_votes_and_one_without_any_gets_none(study, fusion):
    block = as_block(study, np.arange(100))
    assert np.isfinite(fusion.predict(block._replace(rows=block.rows[:, :3])).proba).all()
    blind = block.rows.copy()
    blind[:, 1:] = np.nan
    votes = fusion.predict(block._replace(rows=blind))
    assert np.isnan(votes.proba).all() and np.isnan(votes.magnitude).all()
    inf = block.rows.copy()
    inf[:, 2] = np.inf
    nan = block.rows.copy()
    nan[:, 2] = np.nan
    assert np.array_equal(fusion.predict(block._replace(rows=inf)).proba, fusion.predict(block._replace(rows=nan)).proba)


def test_further_named_columns_join_by_name():
    """Alternative data are columns like any other: 27 more of them change the list of names and nothing else."""
    study = make_study(2, n=3_000)
    rng = np.random.default_rng(0)
    alternative = tuple(f"alternative_{i}" for i in range(27))
    extra = np.full((len(study.table.ts), 27), np.nan, np.float32)
    extra[:, 3] = study.table.move[:, 0] + rng.normal(size=len(extra)) * 0.1
    wide = study._replace(
        names=study.names + alternative, inputs=study.inputs + alternative,
        table=study.table._replace(rows=np.concatenate([study.table.rows, extra], axis=1)),
    )  # fmt: skip
    fusion = Fusion.fit(wide, None, SMALL)
    gain = fusion.importance()
    assert max(gain, key=lambda n: gain[n][0]) == "alternative_3"
    assert np.isfinite(fusion.predict(as_block(study, np.arange(10))).proba).all()


def test_horizons_that_were_left_out_abstain():
    study = make_study(3, n=3_000, usable=(1,))
    votes = Fusion.fit(study, None, SMALL).predict(as_block(study, np.arange(20)))
    assert np.isnan(votes.proba[:, [0, 2, 3]]).all() and np.isfinite(votes.proba[:, 1]).all()


def test_one_class_only_and_constant_inputs_are_no_accident():
    study = make_study(4, n=2_000)
    flat = study._replace(table=study.table._replace(move=np.zeros_like(study.table.move), rows=np.ones_like(study.table.rows)))
    votes = Fusion.fit(flat, None, SMALL).predict(as_block(flat, np.arange(20)))
    assert np.isfinite(votes.proba).all() and (votes.proba[..., 1] > 0.95).all()


def test_it_is_saved_and_loaded_unchanged(study, fusion, tmp_path):
    fusion.save(tmp_path)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json"] * 4 + [".npz"]
    again = Fusion.load(tmp_path, NAMES)
    a, b = fusion.predict(as_block(study, np.arange(500))), again.predict(as_block(study, np.arange(500)))
    assert np.array_equal(a.proba, b.proba) and np.array_equal(a.magnitude, b.magnitude)


def test_calibration_curves_are_interpolated_like_numpys(study, fusion):
    xs, ys, n = fusion.knots
    x = np.linspace(-0.2, 1.2, 301)
    for c in range(4):
        m = n[0, c]
        want = np.interp(x, xs[0, c, :m], ys[0, c, :m])
        assert np.allclose([interpolate(v, xs[0, c], ys[0, c], m) for v in x], want, atol=1e-12)
    assert 0 < FLOOR < 0.01


def dated(study: Study, by: int = 1_700_000_000 * SCALE) -> Study:
    """The same in 2023, where alternative data may be."""
    t, s = study.table, study.split
    return study._replace(
        table=t._replace(ts=t.ts + by, known_at=t.known_at + by), split=Split(s.start + by, s.calibrate + by, s.weigh + by, s.end + by)
    )


def alternative(study: Study, delay_s: float, seed: int = 0) -> altdata.Table:
    """News sentiment of up to a second before each decision that tells the sign of its move, known `delay_s` after that second."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(len(study.table.ts) - 1):
        t = int(study.table.ts[i])
        value = float(np.clip(np.sign(study.table.move[i, 0]) * 0.8 + 0.05 * rng.normal(), -1, 1))
        id_ = study.instruments[int(study.table.instrument[i])].id
        rows.append((id_, "news_sentiment", value, t - SCALE + int(delay_s * rng.random() * 1e9), t - SCALE + int(delay_s * 1e9)))
    return altdata.table(rows)


def knowing(study: Study, table: altdata.Table) -> Study:
    return study._replace(altdata=Lookup(table, [i.id for i in study.instruments]))


def loss_of(study: Study, fusion: Fusion) -> float:
    later = np.flatnonzero(study.table.ts >= study.split.weigh)
    return float(log_loss(fusion.predict(as_block(study, later)).proba[:, 0], study.classes(0)[later]).mean())


def test_alternative_data_tell_what_was_known_in_time_and_nothing_once_they_come_too_late():
    study = dated(make_study(8, n=3_000, signal=0.0, usable=(0,)))
    in_time = Fusion.fit(knowing(study, alternative(study, 0.5)), None, SMALL)
    late = Fusion.fit(knowing(study, alternative(study, 1.5)), None, SMALL)  # half a second after the decision
    plain = Fusion.fit(study, None, SMALL)
    assert loss_of(study, in_time) < loss_of(study, plain) - 0.3
    assert abs(loss_of(study, late) - loss_of(study, plain)) < 0.05
    share = in_time.shap[:, in_time.columns.index("alt_news_sentiment"), 0]
    assert (share > 0.5).all(), "in every slice of time"
    assert in_time.leading(1)[0].startswith("500ms: alt_news_sentiment")
    (first, *_) = in_time.shares()["500ms"]
    assert first["column"] == "alt_news_sentiment" and first["gain"] > 0.5 and min(first["shap"]) > 0.5


def test_the_join_is_the_tables_own_and_a_decision_sees_nothing_that_is_known_later():
    study = dated(make_study(9, n=2_000, usable=(0,)))
    table = alternative(study, 0.5)
    fusion = Fusion.fit(knowing(study, table), None, SMALL)
    assert [c for c in fusion.columns if "alt_" in c] == ["alt_news_sentiment", "alt_news_sentiment" + AGE]
    rows = np.arange(300)
    x = fusion.inputs(study.table.rows[rows], study.table.instrument[rows], study.table.ts[rows])
    first, which = fusion.columns.index("alt_news_sentiment"), altdata.INDEX["news_sentiment"]
    for k in range(2):
        mine = study.table.instrument[rows] == k
        joined = np.stack([a[:, which] for a in asof(table, study.instruments[k].id, study.table.ts[rows][mine])], axis=1)
        assert np.array_equal(x[mine, first : first + 2], joined.astype(np.float32), equal_nan=True)
    cut = int(study.table.ts[150])
    past = altdata.table([r for r in table.rows() if r[4] <= cut])
    again = Fusion(study.names, fusion.columns, fusion.models, fusion.knots, fusion.scale, fusion.ids, Lookup(past, fusion.ids))
    a, b = fusion.predict(as_block(study, rows)), again.predict(as_block(study, rows))
    assert np.array_equal(a.proba[:151], b.proba[:151], equal_nan=True) and not np.array_equal(a.proba[200:], b.proba[200:], equal_nan=True)


def test_data_that_arrive_one_by_one_and_decisions_one_by_one_give_the_votes_of_history_to_the_last_bit():
    """Live: each row is pushed when it becomes known, each block holds one batch."""
    study = dated(make_study(12, n=2_000, usable=(0,)))
    table = alternative(study, 0.5)
    fusion = Fusion.fit(knowing(study, table), None, SMALL)
    rows = np.arange(400)
    whole = fusion.predict(as_block(study, rows))
    fusion.join(Lookup(altdata.table([]), fusion.ids))
    waiting = table.rows()
    for i in rows:
        while waiting and waiting[0][4] <= study.table.ts[i]:
            fusion.known.push(altdata.table([waiting.pop(0)]))
        one = fusion.predict(as_block(study, rows[i : i + 1]))
        assert np.array_equal(one.proba[0], whole.proba[i], equal_nan=True)
        assert np.array_equal(one.magnitude[0], whole.magnitude[i], equal_nan=True)
    assert len(waiting) > 1_000, "the rest is not known yet"


def test_a_column_is_learnt_from_when_it_went_up_and_down_often_enough():
    """A clock, a daily close and its age, a slow wave are left out; what is like them in the table of alternative data is, too."""
    study = dated(make_study(11, n=4_000, usable=(0,)))
    t = study.table
    hour = (t.ts - t.ts[0]) / 1e9 / 3_600
    rows = t.rows.copy()
    rows[:, NAMES.index("a")], rows[:, NAMES.index("b")] = hour, np.sin(2 * np.pi * hour)
    daily = [("*", "vix", 15.0, int(t.ts[0]) - SCALE, int(t.ts[0]) - SCALE)]
    few = [("*", "sweep_count", float(i % 2), int(t.ts[100 * i]), int(t.ts[100 * i])) for i in range(9)]
    known = altdata.table([*alternative(study, 0.5).rows(), *daily, *few])
    fitted = Fusion.fit(knowing(study._replace(table=t._replace(rows=rows)), known), None, SMALL)
    assert fitted.columns == ("spread", "c", "alt_news_sentiment", "alt_news_sentiment" + AGE, "instrument")
    flat = study._replace(table=t._replace(rows=np.ones_like(rows)))
    assert Fusion.fit(flat, None, SMALL).columns == (*INPUTS, "instrument"), "where nothing moves nothing is left out"


def test_travels_are_what_one_counts_by_hand():
    x = np.array([0, 1, 2, 3, 0, np.nan, 3, 1, 2, 0, 3, 9], np.float32)[:, None]
    both = np.concatenate([x, np.full_like(x, 7), np.isfinite(x) * (x == 9).astype(np.float32)], axis=1)
    who = np.repeat([0, 1], [11, 1])
    assert travels(both, who, 2).tolist() == [[5, 0, 0], [0, 0, 0]]
    assert travels(both, np.zeros(12, np.int64), 1).tolist() == [[5, 0, 1]]


def test_isotonic_curves_serve_where_they_hold_in_every_part_of_time_and_not_where_they_do_not():
    rng = np.random.default_rng(0)
    raw = rng.dirichlet(np.ones(3), 8_000)
    ts = np.arange(8_000, dtype=np.int64) * SCALE

    def drawn(truth):
        return (rng.random(8_000)[:, None] > truth.cumsum(axis=1)).sum(axis=1).astype(np.int8)

    flat = (raw + 1) / 4  # what is said is too sure, always
    assert _blend(raw, drawn(flat), ts, ts + SCALE) >= 0.75
    turns = np.where((np.arange(8_000) % 4_000 < 2_000)[:, None], np.roll(raw, 1, axis=1), raw)  # wrong in one part, right in the next
    assert _blend(raw, drawn(raw), ts, ts + SCALE) <= 0.5 and _blend(raw, drawn(turns), ts, ts + SCALE) > 0
    assert _blend(raw[:150], drawn(raw)[:150], ts[:150], ts[:150]) == 0, "too few"


def test_curves_from_few_independent_labels_count_little(study, monkeypatch):
    monkeypatch.setattr(fusion_module, "_blend", lambda *_: 1.0)
    xs, lowered, _ = Fusion.fit(study, None, SMALL).knots
    monkeypatch.setattr(fusion_module, "CURVES", 0.0)
    whole, count = Fusion.fit(study, None, SMALL).knots[1:]
    for h in study.usable:
        n = study.independent(study.calibration_rows(h), h)
        for c in range(3):
            k = slice(0, count[h, c])
            assert np.allclose(lowered[h, c, k] - xs[h, c, k], n / (n + 200) * (whole[h, c, k] - xs[h, c, k]), atol=1e-12)
    assert np.abs(whole - xs)[:, :3].max() > 0.05


def test_an_artifact_remembers_its_alternative_columns_and_copes_without_the_data(tmp_path):
    study = dated(make_study(10, n=2_000, usable=(0,)))
    known = Lookup(alternative(study, 0.5), [i.id for i in study.instruments])
    fitted = Fusion.fit(study._replace(altdata=known), None, SMALL)
    fitted.save(tmp_path)
    block = as_block(study, np.arange(200))
    again = Fusion.load(tmp_path, NAMES)
    assert again.columns == fitted.columns
    blind = again.predict(block).proba[:, 0]
    again.join(known.of(["I1.X", "I0.X"]))  # of instruments in another order
    assert np.array_equal(again.predict(block).proba, fitted.predict(block).proba, equal_nan=True)
    assert np.isfinite(blind).all() and not np.array_equal(blind, fitted.predict(block).proba[:, 0])
    again.join(None)
    assert np.array_equal(again.predict(block).proba[:, 0], blind)


def test_shap_shares_are_xgboosts_contributions_and_find_what_drives_the_moves(study, fusion):
    assert np.allclose(fusion.shap.sum(axis=1), 1) and (np.diff(fusion.slices) > 0).all()
    for h in range(4):
        top = np.argsort(-fusion.shap[:, :, h].mean(axis=0))[:3]
        assert {fusion.columns[i] for i in top} == {"a", "b", "c"}
    assert "never" not in fusion.columns


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A market of the synthetic exchange, two sessions: what is learnt from in the first, what is told of the second, and its table."""
    from catalog.events import read_dbn
    from catalog.planted import Plan
    from catalog.synthetic import make_market
    from cift_models.train import gather

    # news move prices more, and for longer, than in the demo market, whose sessions are longer
    loud = Plan(alpha=(0.2, 0.1, 0.2, 0.0), tau=(9.0, 12.0, 20.0, 1.2), heard=0.0)
    made = make_market(tmp_path_factory.mktemp("planted") / "market", seed=21, sessions=2, events=400_000, instruments=2, plan=loud)
    events, instruments = zip(*(read_dbn(f) for f in made.mbo))
    first, second = (gather(lambda e=e, i=i: (i, [e]), {}, 60_000) for e, i in zip(events, instruments))
    return first, second, altdata.read(made.alternative)


def test_alternative_data_of_the_synthetic_exchange_gain_in_time_and_nothing_past_the_decision(planted):
    """Trained and evaluated both ways: published in time, and so late that what is told of is over (its memory is 20 s)."""
    from cift_models.labels import walk_forward
    from cift_models.significance import mean_test
    from cift_models.train import study as prepared

    first, second, table = planted
    h = LABELS.index("5s")
    split = walk_forward(first.table.ts)[-1]
    losses = {}
    for name, known in (("plain", None), ("in time", table), ("late", altdata.delayed(table, 300))):
        lookup = None if known is None else Lookup(known, [i.id for i in first.instruments])
        what = prepared(first, split, 0, lookup)[0]._replace(usable=(h,))
        fitted = Fusion.fit(what, None, Config(rounds=40, threads=1, max_rows=12_000))
        t = second.table
        at = np.flatnonzero(np.isfinite(t.move[:, h]))[::3]
        events = np.zeros(len(at), EVENT)
        events["ts_init"], events["instrument"] = t.ts[at], t.instrument[at]
        votes = fitted.predict(Block(events, t.rows[at].astype(np.float64), np.arange(len(at))))
        y = classify(t.move[at, h], what.thresholds.balanced[t.instrument[at], h])
        losses[name] = log_loss(votes.proba[:, h], y)
        share = sum(c["gain"] for c in fitted.shares()["5s"] if c["column"] == "alt_social_sentiment")
        assert (share > 0.08) == (name == "in time"), (name, share)
    gain, late = (mean_test(losses["plain"] - losses[k], t.ts[at], HORIZONS_NS[h]) for k in ("in time", "late"))
    assert gain.t > 3 and late.t < 2
    assert (losses["plain"] - losses["in time"]).mean() > 0.01 > (losses["plain"] - losses["late"]).mean()
