"""Speed of the models as ratios within one run; absolute figures are printed by `pytest tests/bench --benchmark-only`."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from timing import best

sys.path.append(str(Path(__file__).parents[1] / "cift_models"))

from test_fusion import as_block, make_study
from test_hmm import chain, fuzzed_fit
from test_inference import INSTRUMENTS, artifact, join, pieces, quotes  # noqa: F401

from cift_models.fusion import Config, Fusion
from cift_models.hmm_chain import filter_all
from cift_models.inference import Engine, stream
from cift_models.labels import H, Labeller
from cift_models.trees import walk


def seconds(f, repeats: int = 15) -> float:
    """Median seconds of one call, after a first that compiles."""
    f()
    took = []
    for _ in range(repeats):
        begin = time.perf_counter()
        f()
        took.append(time.perf_counter() - begin)
    return statistics.median(took)


def undisturbed(call, calls: int) -> tuple[list[int], int]:
    """Wall ns of each call(i) in which the thread was not put aside for another, and how many calls were: they time the scheduler."""
    took, interrupted = [], 0
    for i in range(calls):
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
        begin = time.perf_counter_ns()
        call(i)
        spent = time.perf_counter_ns() - begin
        if resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw == before:
            took.append(spent)
        else:
            interrupted += 1
    return took, interrupted


@pytest.fixture(scope="module")
def fused():
    study = make_study(0, n=6_000)
    return study, Fusion.fit(study, None, Config(patience=0))


def test_one_row_of_all_horizons_against_xgboost(benchmark, fused):
    """1,200 trees: our walk, one row, at least 5 times as fast as XGBoost's own in-place prediction of the same boosters."""
    import xgboost

    study, fusion = fused
    assert len(fusion.trees.group) == 1_200
    boosters = []
    for model in fusion.models.values():
        b = xgboost.Booster({"nthread": 1})
        b.load_model(bytearray(json.dumps(model).encode()))
        boosters.append(b)
    blocks = [as_block(study, np.array([i])) for i in range(4_000, 4_200)]
    rows = [fusion.inputs(b.rows, np.zeros(1, np.int64)) for b in blocks]
    theirs = seconds(lambda: [[b.inplace_predict(x) for b in boosters] for x in rows], 5)
    def ours():
        for b in blocks:
            fusion.predict(b)

    benchmark.pedantic(ours, rounds=20, warmup_rounds=2)
    ratio = theirs / seconds(ours)
    took, interrupted = undisturbed(lambda i: fusion.predict(blocks[i % len(blocks)]), 10_000)
    told = {f"p{p}_us": float(np.percentile(took, p)) / 1e3 for p in (50, 99, 99.9)}
    print(f"one row, {len(took):,} calls, {interrupted} more that were interrupted: " + ", ".join(f"{k} {v:.0f}" for k, v in told.items()))
    benchmark.extra_info |= {"ratio": ratio, "interrupted": interrupted} | told
    assert fusion.predict(blocks[0]).proba.shape == (1, H, 3) and ratio > 5


def test_a_block_costs_less_a_row_than_one_row_alone(benchmark, fused):
    study, fusion = fused
    x = fusion.inputs(study.table.rows[:2_048], study.table.instrument[:2_048])
    out, one = np.empty((2_048, 3 * H), np.float32), np.empty((1, 3 * H), np.float32)
    benchmark(lambda: walk(x, *fusion.trees, out))
    def alone():
        for i in range(512):
            walk(x[i : i + 1], *fusion.trees, one)

    block, single = seconds(lambda: walk(x, *fusion.trees, out)) / 2_048, seconds(alone) / 512
    benchmark.extra_info |= {"block_ns_per_row": 1e9 * block, "alone_ns_per_row": 1e9 * single}
    assert block < single


def test_the_filter_against_decoding_the_window_again(benchmark):
    """One causal step of five states against hmmlearn's decoding of a window of 1,000: what a step costs there."""
    from hmmlearn.hmm import GaussianHMM

    c = chain(0, 5, 4, 0.9)
    x = np.random.default_rng(0).normal(size=(100_000, 4))
    model = GaussianHMM(5, covariance_type="diag")
    model.startprob_, model.transmat_, model.means_, model.covars_ = c
    out = np.empty((len(x), 5))
    benchmark.pedantic(lambda: filter_all(x, *c, out), rounds=5)
    ours, theirs = best(lambda: filter_all(x, *c, out), lambda: model.predict_proba(x[:1_000]))
    step = ours / len(x)
    benchmark.extra_info["ns_per_step"] = 1e9 * step
    assert theirs / step > 1_000


def test_ten_thousand_fits_to_odd_measures_are_never_nan(benchmark):
    def fits() -> None:
        for seed in range(300, 10_300):
            fuzzed_fit(seed)

    benchmark.pedantic(fits, rounds=1)


def test_labels_against_the_features_they_follow(benchmark):
    events = quotes(0, 50_000)
    blocks = list(stream(INSTRUMENTS, [events]))

    def label():
        labeller = Labeller(INSTRUMENTS)
        for b in blocks:
            labeller.push(b.events, b.rows[:, 0].copy(), b.closes)

    benchmark(label)
    assert seconds(label, 5) < seconds(lambda: list(stream(INSTRUMENTS, [events])), 5)


def test_a_decision_of_the_engine_batch_by_batch_against_blocks(benchmark, artifact):  # noqa: F811
    """Prints the latency of one live batch; a decision within a block costs a third of one alone, or less."""
    whole = join(list(stream(INSTRUMENTS, [quotes(5, 4_000)])))
    engine = Engine.load(artifact, INSTRUMENTS)
    batches = list(pieces(whole, whole.closes + 1))
    took = []

    def live():
        engine.reset()
        took.clear()
        for b in batches:
            begin = time.perf_counter_ns()
            engine.predict(b)
            took.append(time.perf_counter_ns() - begin)

    def block():
        engine.reset()
        engine.predict(whole)

    benchmark.pedantic(live, rounds=3, warmup_rounds=1)
    benchmark.extra_info |= {f"p{p}_us": float(np.percentile(took, p)) / 1e3 for p in (50, 99, 99.9)}
    assert seconds(block, 3) < sum(took) / 3e9
