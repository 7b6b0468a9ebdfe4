"""What members add, and how much of what can be known is known: equal to plain counting, and true where the answer is planted."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from quote_catalog import quote_catalog
from test_inference import START

from catalog.errors import InputError
from catalog.events import SCALE
from cift_models import artifacts, skill
from cift_models.labels import H
from cift_models.significance import ALPHA
from cift_models.train import Config, train
from cift_models.windows import HORIZONS_NS, Votes

NOISE = f"{__name__}:Noise"
IDS = ["B.X", "A.X"]  # the sample's order, which need not be the truth's
BANDS = (0.25, 0.25, 1.25, 2.75)


class Noise:
    """A member that knows nothing: it sways around the class shares."""

    name = "noise"

    def __init__(self, proba):
        self.proba = proba

    @staticmethod
    def gatherer(instruments, names):
        return None

    @classmethod
    def fit(cls, study, gathered):
        y = [study.classes(h)[study.fit_rows(h)] for h in range(H)]
        return cls(np.array([(np.bincount(v, minlength=3) + 1) / (len(v) + 3) for v in y]))

    def new_state(self):
        return None

    def predict(self, block, state):
        ts = block.events["ts_init"][block.closes]
        tilt = np.exp(0.5 * np.sin(ts[:, None, None] % 9_973 * np.arange(1, 4)))
        p = self.proba * tilt
        return Votes(p / p.sum(axis=2, keepdims=True), np.ones(p.shape[:2]))

    def save(self, folder):
        np.save(folder / "noise.npy", self.proba)

    @classmethod
    def load(cls, folder, names):
        return cls(np.load(folder / "noise.npy"))


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    return quote_catalog(tmp_path_factory.mktemp("skill") / "quotes", updates=12_000, gap_ms=60.0)


@pytest.fixture(scope="module")
def trained(market, tmp_path_factory):
    out = tmp_path_factory.mktemp("skill") / "a"
    return train(market, end=START + 430 * SCALE, out=out, members=["hmm", "fusion"], own=[NOISE], config=Config(cap=10_000))


@pytest.fixture(scope="module")
def found(market, trained):
    return skill.ablate(trained, market, own=[NOISE])


def test_taking_away_who_knows_costs_more_than_taking_away_noise(found):
    fusion, noise = found["members"]["fusion"]["500ms"], found["members"]["noise"]["500ms"]
    assert fusion["cost"]["mean"] > 0.01 and fusion["cost"]["interval"][0] > 0 and fusion["cost"]["p_holm"] < ALPHA
    assert abs(noise["cost"]["mean"]) < fusion["cost"]["mean"] / 3, "beyond its class shares, which steady the others, it adds nothing"
    assert noise["gain"]["mean"] > 0.02 and noise["gain"]["p_holm"] < ALPHA, "the ensemble is better than noise alone"
    assert all(0.9 < told["cover"] <= 1 for told in found["members"].values())


def test_the_account_is_printed(found):
    text = list(skill.lines(found))
    assert all(len(line) < 200 for line in text) and text[-3:] == list(skill.verdicts(found))
    json.dumps(found)


def test_each_member_gets_its_verdict():
    def row(cost, p, gain=1.0, q=0.001):
        return {"cover": 1.0, "cost": {"mean": cost, "p": p, "p_holm": p}, "gain": {"mean": gain, "p": q, "p_holm": q}}

    members = {
        "good": {"cover": 0.9, "500ms": row(0.1, 0.001), "1s": row(0.1, 0.2)}, "bad": {"cover": 1.0, "500ms": row(-0.1, 0.999, -1.0, 1.0)},
        "mute": {"cover": 0.3, "500ms": {"cover": 0.3}},
    }  # fmt: skip
    assert list(skill.verdicts({"members": members})) == [
        "good: votes in 90% of the batches; without it the ensemble is worse at 500ms; the ensemble beats it at 500ms, 1s",
        "bad: votes in 100% of the batches; without it the ensemble is worse at no horizon, better at 500ms; "
        "the ensemble beats it at no horizon",
        "mute: votes in 30% of the batches (less than half); without it the ensemble is worse at no horizon; "
        "the ensemble beats it at no horizon",
    ]


def test_costs_are_differences_of_plain_log_losses():
    rng = np.random.default_rng(0)
    n, h = 4_000, 1
    p, q, vote = (rng.dirichlet(np.ones(3), (n, H)).astype(np.float32) for _ in range(3))
    ts, inst = np.arange(n) * SCALE, np.arange(n) % 2
    whole = {"ts": ts, "instrument": inst, "move": rng.choice([-2.0, 0.0, 2.0, np.nan], (n, H)), "proba": p}
    vote[::7] = np.nan
    threshold = np.ones((2, H))
    got = skill._adds(whole, {"proba": q}, vote[:, h], threshold, h, 0)
    cost, gain = [], []
    for i in range(n):
        if not np.isnan(whole["move"][i, h]):
            y = 1 + int(np.sign(whole["move"][i, h]))
            cost.append(-np.log(q[i, h, y]) + np.log(p[i, h, y]))
            if i % 7:
                gain.append(-np.log(vote[i, h, y]) + np.log(p[i, h, y]))
    assert got["cost"]["mean"] == pytest.approx(np.mean(cost), rel=1e-4) and got["gain"]["mean"] == pytest.approx(np.mean(gain), rel=1e-4)
    assert got["cover"] == pytest.approx(6 / 7, abs=1e-3)


def truth(folder, rng, seconds=3_000):
    """A truth of two instruments, A and B, on whole seconds; outcomes drawn from the oracle's probabilities."""
    columns = {name: [] for name in ("ts", "instrument", "horizon_ns", "outcome", "p_down", "p_flat", "p_up")}
    for k in range(2):
        for ns in HORIZONS_NS:
            p = rng.dirichlet(np.ones(3), seconds)
            y = (rng.random(seconds)[:, None] > p.cumsum(axis=1)).sum(axis=1)
            for name, v in zip(columns, (np.arange(seconds) * SCALE, [k] * seconds, [ns] * seconds, y - 1, *p.T)):
                columns[name].extend(v)
    pq.write_table(pa.table(columns), folder / "truth.parquet")
    scores = [{"horizon_ns": ns, "band_ticks": band} for ns, band in zip(HORIZONS_NS, BANDS)]
    (folder / "truth.json").write_text(json.dumps({"table": "truth.parquet", "symbols": ["A", "B"], "oracle": {"scores": scores}}))
    return {name: np.array(v) for name, v in columns.items()}, folder / "truth.json"


def test_the_share_of_the_oracles_skill_is_what_plain_loops_count(tmp_path):
    rng = np.random.default_rng(1)
    t, file = truth(tmp_path, rng, 600)
    n = 1_200  # a decision of each instrument every half second, the first 20 s missing
    ts, inst = 20 * SCALE + np.sort(rng.integers(0, 570 * SCALE, n)), rng.integers(0, 2, n)
    proba = rng.dirichlet(np.ones(3) * 4, (n, H))
    for k in range(2):  # half of what the oracle knows, as of the second before
        for h, ns in enumerate(HORIZONS_NS):
            rows = (t["instrument"] == k) & (t["horizon_ns"] == ns)
            oracle = np.stack([t[f"p_{c}"][rows] for c in ("down", "flat", "up")], axis=1)
            mine = inst == 1 - k  # sample's order is B, A
            proba[mine, h] = 0.5 / 3 + 0.5 * oracle[np.minimum(ts[mine] // SCALE + 1, len(oracle) - 1)]
    sample = {"ts": ts, "instrument": inst, "proba": proba, "votes": np.full((n, 1, H, 3), np.nan)}
    threshold = np.tile([0.25, 0.3, 0.75, 2.9], (2, 1))
    got = skill.oracle_share(sample, IDS, ["mute"], threshold, file)
    assert [got[h]["same"] for h in got] == [True, True, False, True], "0.3 ticks make the same classes as 0.25, 0.75 others than 1.25"
    for h in (0, 3):
        ours, best, ys = [], [], []
        for i in np.flatnonzero(t["horizon_ns"] == HORIZONS_NS[h]):
            before = [d for d in np.flatnonzero(inst == 1 - t["instrument"][i]) if ts[d] <= t["ts"][i] <= ts[-1]]
            if before and t["ts"][i] - ts[before[-1]] <= skill.STALE_NS:
                y = t["outcome"][i] + 1
                ours.append(-np.log(proba[before[-1], h, y]))
                best.append(-np.log((t["p_down"][i], t["p_flat"][i], t["p_up"][i])[y]))
                ys.append(y)
        rates = np.bincount(ys) / len(ys)
        plain = -np.log(rates[ys]).mean()
        row = list(got.values())[h]
        assert row["n"] == len(ys) and row["frequencies"] == pytest.approx(plain) and row["oracle"] == pytest.approx(np.mean(best))
        assert row["share"]["ensemble"] == pytest.approx((plain - np.mean(ours)) / (plain - np.mean(best)))
        assert 0.3 < row["share"]["ensemble"] < 1 and "mute" not in row["share"]


@pytest.mark.parametrize("fault", ["none", "other", "times"])
def test_a_truth_of_another_market_is_refused(tmp_path, fault):
    _, file = truth(tmp_path, np.random.default_rng(2), 50)
    if fault == "other":
        file.write_text(json.dumps({"table": "truth.parquet"}))
    start = 10**6 * SCALE if fault == "times" else 0
    sample = {"ts": np.array([start, start + 1]), "instrument": np.zeros(2, np.int64)}
    with pytest.raises(InputError, match=r"\.json "):
        skill.oracle_share(sample, IDS, [], np.ones((2, H)), tmp_path / "no.json" if fault == "none" else file)


def test_nothing_after_the_training_range_is_said(market, trained):
    end = artifacts.read(trained).manifest["range"]["end"]
    with pytest.raises(InputError, match=r"no decision in .* after the training range"):
        skill.ablate(trained, market, end=end, own=[NOISE])
