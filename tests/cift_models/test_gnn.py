"""Cross-asset graph: serving is the trained net to five digits, nothing looks ahead, and a vote has to be earned out of sample."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catalog.errors import InputError
from catalog.events import ADD, EVENT, SCALE, TRADE, Instrument
from cift_models.gnn import RIVALS, Gnn
from cift_models.gnn_kernel import outputs
from cift_models.gnn_stream import CELL, EDGE, FLOWS, MEMORY, NOW, SPACING_NS, Gatherer, Inputs, Scales, T
from cift_models.gnn_train import Config, Linear, Sample, begin_at, join, lagged, lasso, softmax, torch_net, weights_of
from cift_models.labels import LABELS, H, Labeller, Study, Table, Thinned, fit_thresholds, walk_forward
from cift_models.leadlag import hedge
from cift_models.windows import HORIZONS_NS, Block

NAMES = ("mid", "spread", "imbalance_1", "ofi_fast", "ofi_1", "trade_imbalance_1s")
TICK = SCALE // 100
LAG_S = 0.3
QUICK = Config(steps=40, every=20, width=8, filters=8, max_rows=2_000)


def instruments(n: int) -> tuple[Instrument, ...]:
    return tuple(Instrument(f"N{k}.X", TICK, SCALE, 1.0, "USD") for k in range(n))


def market(seed: int, seconds: float = 600.0, n: int = 2, rate: float = 25.0, follow: float = 0.95, rates=None) -> Block:
    """Instrument 0 leads: the others repeat its moves LAG_S later, beside moves of their own; features other than the mid tell nothing."""
    rng, dt = np.random.default_rng(seed), 0.01
    z = rng.standard_normal((n, int(seconds / dt))) * np.sqrt(dt) * 1.5
    own = np.cumsum(z, axis=1)
    late = np.concatenate([np.zeros(int(LAG_S / dt)), own[0]])[: own.shape[1]]
    value = np.concatenate([own[:1], follow * late + np.sqrt(1 - follow**2) * own[1:]])
    counts = [rng.poisson((rates[k] if rates else rate) * seconds) for k in range(n)]
    t, k = rng.integers(0, int(seconds * SCALE), sum(counts)), np.repeat(np.arange(n), counts)
    order = np.argsort(t, kind="stable")
    t, k = t[order], k[order]
    e = np.zeros(len(t), EVENT)
    e["ts_init"] = e["ts_event"] = t + 1_709_303_400 * SCALE
    e["instrument"], e["size"], e["side"] = k, SCALE, rng.choice([-1, 1], len(t))
    e["action"] = np.where(rng.random(len(t)) < 0.2, TRADE, ADD)
    mid = (10_000 + np.round(2 * value[k, t // 10_000_000]) / 2) * 0.01
    rest = rng.normal(size=(len(t), len(NAMES) - 2))
    return Block(e, np.column_stack([mid, rng.integers(1, 3, len(t)), rest]), np.flatnonzero(rng.random(len(t)) < 0.5))


def study_of(block: Block, n: int, usable=(0, 1), seed: int = 0) -> Study:
    labeller, c = Labeller(instruments(n)), block.closes
    held = Thinned(n, len(LABELS), 200_000, rows=((len(NAMES),), np.float32), spread=((), np.float64))
    at, outcomes = block.events[c], labeller.push(block.events, np.ascontiguousarray(block.rows[:, 0]), c)
    held.push(at["ts_init"], at["instrument"].astype(np.int64), outcomes, rows=block.rows[c], spread=block.rows[c, 1])
    held.learn(labeller.finish())
    z = held.result()
    table = Table(*(z[f] for f in Table._fields))
    split = walk_forward(table.ts)[0]
    thresholds = fit_thresholds(table, n, table.ts < split.calibrate)
    return Study(instruments(n), NAMES, NAMES[1:], table, split, thresholds, usable, seed)


def gathered(block: Block, n: int, cuts=()) -> Gatherer:
    g = Gnn.gatherer(instruments(n), NAMES)
    for piece in pieces(block, cuts):
        g.push(piece)
    return g


def fitted(block: Block, n: int, config: Config | None = None, **kw) -> Gnn:
    return Gnn.fit(study_of(block, n, **kw), gathered(block, n), config)


def pieces(block: Block, cuts):
    edges = sorted({0, *map(int, cuts), len(block.events)})
    for a, b in itertools.pairwise(edges):
        inside = (block.closes >= a) & (block.closes < b)
        yield Block(block.events[a:b], block.rows[a:b], block.closes[inside] - a)


def votes(gnn: Gnn, block: Block, cuts=()):
    state = gnn.new_state()
    return [np.concatenate(p) for p in zip(*(gnn.predict(piece, state) for piece in pieces(block, cuts)))]


def same(a, b) -> bool:
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


def head(block: Block, m: int) -> Block:
    return Block(block.events[:m], block.rows[:m], block.closes[block.closes < m])


@pytest.fixture(scope="module")
def led() -> tuple[Gnn, Block]:
    block = market(0, n=3)
    return fitted(block, 3), block


@pytest.fixture(scope="module")
def outspoken() -> Gnn:
    """Hardly trained, but made to vote everywhere."""
    gnn = fitted(market(2, 200.0, n=3, rate=15.0), 3, QUICK)
    gnn.votes[:] = True
    return gnn


def random_inputs(rng, m: int, n: int) -> Inputs:
    linked = (rng.random((m, n, n)) < 0.5) | np.eye(n, dtype=bool)
    f32 = np.float32
    return Inputs(
        rng.normal(size=(m, n, T, len(CELL))).astype(f32) * 3, rng.normal(size=(m, n, len(NOW))).astype(f32) * 3,
        rng.normal(size=(m, n, n, len(EDGE))).astype(f32), linked,
    )  # fmt: skip


@pytest.mark.parametrize(("n", "width", "heads"), [(2, 16, 2), (4, 24, 3), (20, 16, 4)])
def test_serving_equals_torch_geometric(n, width, heads):
    import torch

    torch.manual_seed(n)
    rng, m = np.random.default_rng(n), 12
    x = random_inputs(rng, m, n)
    x.now[0, 0, 3] = np.nan
    scales = Scales(np.stack([rng.normal(size=(n, len(CELL))), rng.uniform(1, 2, (n, len(CELL)))]),
                    np.stack([rng.normal(size=(n, len(NOW))), rng.uniform(1, 2, (n, len(NOW)))]))  # fmt: skip
    net = torch_net(n, Config(width=width, heads=heads))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
        y, out = net(*(torch.from_numpy(np.ascontiguousarray(a)) for a in (*scales.apply(x), x.edges, x.linked)))
        together, leads = net.pairs(y, torch.from_numpy(x.edges))
    prior = np.log(rng.dirichlet(np.ones(3), (n, H))).reshape(n, -1)
    prior = np.concatenate([prior, np.zeros((n, H))], axis=1).astype(np.float32)
    w = weights_of(net, prior)
    w = w._replace(wide=0.1 * rng.normal(size=w.wide.shape).astype(np.float32))
    want = out.numpy() + prior + np.einsum("mx,nxo->mno", lagged(*scales.apply(x)), w.wide)
    rows, nodes = np.repeat(np.arange(m), n), np.tile(np.arange(n), m)
    assert np.allclose(outputs(w, scales, x.where(rows), nodes), want.reshape(m * n, -1), rtol=1e-5, atol=1e-5)
    assert 1 < np.abs(out.numpy()).max() < 10
    gnn = Gnn(NAMES, [str(k) for k in range(n)], np.ones(n), np.ones(n), w, scales, np.ones((n, H), bool), np.ones((n, H)), {})
    for r in range(3):
        assert np.allclose(gnn._pair_heads(*x.where(r)), np.stack([together[r].numpy(), leads[r].numpy()]), atol=1e-4)


def test_a_followers_way_is_told_from_its_leader_and_the_vote_is_earned(led):
    gnn, _ = led
    row = gnn.comparison["horizons"][0]
    assert gnn.votes[1:, :2].all() and not gnn.votes[:, 2:].any()
    assert all(row["gain"][rival]["interval"][0] > 0 for rival in RIVALS[:3])
    assert row["log_loss"]["gnn"] < row["log_loss"]["without the others"] - 0.05
    assert "votes for" in gnn.report()[0] and "N1.X" in gnn.report()[0]
    later = market(7, 200.0, n=3)
    proba, magnitude = votes(gnn, later)
    study = study_of(later, 3)
    y = np.where(study.table.instrument > 0, study.classes(0), -1)
    tested = (y >= 0) & np.isfinite(proba[:, 0, 0])
    rates = np.bincount(y[tested], minlength=3) / tested.sum()
    loss = -np.log(proba[tested, 0][np.arange(tested.sum()), y[tested]])
    assert tested.sum() > 2_000 and loss.mean() < -(rates * np.log(rates)).sum() - 0.05
    assert 0.7 < np.nanmean(magnitude[tested, 0]) / np.abs(study.table.move[tested, 0]).mean() < 1.4


def test_in_a_null_market_it_says_nothing():
    gnn = fitted(market(1, n=3, follow=0.0), 3)
    assert not gnn.votes.any() and all("abstains: no gain beyond noise" in line for line in gnn.report())
    proba, magnitude = votes(gnn, market(1, 60.0, n=3, follow=0.0))
    assert np.isnan(proba).all() and np.isnan(magnitude).all()


def test_a_horizon_votes_exactly_where_the_stored_comparison_says_so(led):
    for gnn in (led[0], fitted(market(3, 300.0), 2, QUICK)):
        for h, row in enumerate(gnn.comparison["horizons"]):
            low = [row["gain"][rival]["interval"][0] for rival in RIVALS[:2]]
            earned = None not in low and min(low) > 0 and all(row["gain"][rival]["mean"] > 0 for rival in RIVALS)
            assert bool(row["votes"]) <= earned and row["votes"] == [i for i, v in zip(gnn.ids, gnn.votes[:, h]) if v]
            for rival in RIVALS:
                assert row["gain"][rival]["mean"] == pytest.approx(row["log_loss"][rival] - row["log_loss"]["gnn"])


def test_of_net_and_linear_map_each_gets_the_share_that_later_decisions_ask_for():
    """The net knows nothing; the linear map knows the class, or tells noise."""
    rng, m = np.random.default_rng(0), 900
    x = random_inputs(rng, m, 2)
    x.history[:] = 0
    y = rng.integers(0, 3, m)
    scales = Scales(*(np.stack([np.zeros((2, c)), np.ones((2, c))]) for c in (len(CELL), len(NOW))))
    x.now[:, :, 0], x.now[:, :, 1], x.now[:, :, 2:] = (y - 1)[:, None], rng.choice([-1, 1], (m, 2)), 0
    prior = np.tile(np.log(np.full(4 * H, 1 / 3)), (2, 1)).astype(np.float32)
    check = Sample(x, np.zeros(m, np.int64), np.column_stack([y, np.full((m, H - 1), -1)]).astype(np.int8), np.ones((m, H)))
    plain = weights_of(torch_net(2, Config()), prior)
    k = 2 * (FLOWS + len(NOW))
    knows, guesses = (Linear(np.zeros((k, 3)), np.log(np.full(3, 1 / 3))) for _ in range(2))
    knows.slope[FLOWS] = guesses.slope[FLOWS + 1] = [-2.0, 0.0, 2.0]
    _, shares = join(plain, prior, {(0, 0): knows}, scales, check)
    assert shares[0, 0] == 0 and shares[0, 1] >= 1 and not shares[1:].any()
    joined, shares = join(plain, prior, {(0, 0): guesses}, scales, check)
    assert shares[0].tolist() == [0, 0] and np.allclose(outputs(joined, scales, x, check.node)[:, :3], prior[0, :3])


def test_a_calibration_slice_too_short_to_tell_earns_no_vote():
    gnn = fitted(market(4, 100.0, rate=60.0), 2, QUICK, usable=(0, 2))
    assert not gnn.votes[:, 2].any() and "too little time to tell" in gnn.report()[1]


def test_the_lasso_finds_what_is_linear_and_stays_with_the_frequencies_where_nothing_is():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3_000, 30))
    signal = np.clip(np.round(x[:, 4] + 0.3 * rng.normal(size=3_000)), -1, 1).astype(np.int8) + 1
    noise = rng.choice(3, 3_000, p=[0.2, 0.5, 0.3]).astype(np.int8)
    for y, worst in ((signal, 0.55), (noise, None)):
        found = lasso(x[:1_500], y[:1_500], x[1_500:2_200], y[1_500:2_200])
        p = softmax(found.scores(x[2_200:]))
        loss = -np.log(p[np.arange(800), y[2_200:]]).mean()
        if worst is None:
            assert np.ptp(p, axis=0).max() < 0.15 and loss < 1.05
        else:
            assert loss < worst and np.abs(found.slope).sum(axis=1).argmax() == 4
    one = lasso(x[:9], np.ones(9, np.int8), x[:9], np.ones(9, np.int8))
    assert not one.slope.any() and np.exp(one.constant).sum() == pytest.approx(1) and one.constant.argmax() == 1


@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(0, 4_000), max_size=8))
def test_any_cut_of_the_stream_gives_the_same_bits(outspoken, cuts):
    block = head(market(5, 120.0, n=3, rate=15.0), 4_000)
    whole = votes(outspoken, block)
    assert np.isfinite(whole[0]).mean() > 0.99
    assert same(whole, votes(outspoken, block, cuts))


def test_batch_by_batch_as_live_the_votes_are_those_of_the_block(outspoken):
    block = head(market(5, 120.0, n=3, rate=15.0), 2_500)
    assert same(votes(outspoken, block), votes(outspoken, block, block.closes + 1))


def test_the_future_changes_no_past_vote(outspoken):
    block, cut = market(5, 120.0, n=3, rate=15.0), 3_000
    rows = block.rows.copy()
    rows[cut:] *= 1.5
    past = block.closes < cut
    for a, b in zip(votes(outspoken, block), votes(outspoken, block._replace(rows=rows))):
        assert np.array_equal(a[past], b[past], equal_nan=True) and not np.array_equal(a[~past], b[~past], equal_nan=True)
    assert same([a[past] for a in votes(outspoken, block)], votes(outspoken, head(block, cut)))


def test_what_is_learnt_from_is_what_serving_sees(outspoken):
    block = market(6, 100.0, n=3, rate=15.0)
    table, x = gathered(block, 3).decisions()
    out = outputs(outspoken.weights, outspoken.scales, x, table.instrument)
    proba, _ = votes(outspoken, block)
    at = {(t, k): r for r, (t, k) in enumerate(zip(block.events["ts_init"][block.closes], block.events["instrument"][block.closes]))}
    rows = np.array([at[t, k] for t, k in zip(table.ts, table.instrument)])
    known = np.isfinite(proba[rows, 0, 0])
    assert known.sum() > 1_000
    for h in range(H):
        assert np.allclose(proba[rows, h][known], softmax(out[known, 3 * h : 3 * h + 3]), atol=1e-5)


def test_what_is_gathered_does_not_depend_on_the_cut():
    block = market(6, 100.0, n=3, rate=15.0)
    a, b = gathered(block, 3), gathered(block, 3, (1, 500, 501, 2_222, 4_000))
    for one, other in zip((*a.decisions()[0], *a.decisions()[1], *a.graphs(0, 2**62)[0]), (*b.decisions()[0], *b.decisions()[1],
                          *b.graphs(0, 2**62)[0])):  # fmt: skip
        assert np.array_equal(one, other, equal_nan=True)
    table = a.decisions()[0]
    assert all((np.diff(table.ts[table.instrument == k]) >= SPACING_NS).all() for k in range(3))


def test_the_inputs_are_what_the_market_did():
    """Moves of the last cells, the edge from leader to follower, and what came after each snapshot, counted again from the events."""
    block = market(8, 400.0)
    g = gathered(block, 2)
    table, x = g.decisions()
    ts, k, ticks = block.events["ts_init"], block.events["instrument"], block.rows[:, 0] / 0.01
    for r in (1_000, 2_500, 4_001):
        now = table.ts[r] // 50_000_000
        for j in range(2):
            mine = k == j
            ends = [ticks[mine][ts[mine] // 50_000_000 < c][-1] for c in range(now - 16, now + 1)]
            assert np.allclose(x.history[r, j, :, 0], np.diff(ends), atol=1e-3)
            last = ticks[mine][ts[mine] <= table.ts[r]][-1]
            assert x.now[r, j, NOW.index("return since the last cell")] == pytest.approx(last - ends[-1], abs=1e-3)
            since = (table.ts[r] - ts[mine][ts[mine] <= table.ts[r]][-1]) / 1e6
            assert x.now[r, j, NOW.index("age")] == pytest.approx(np.log1p(since), rel=1e-5)
    late = slice(len(table.ts) // 2, None)
    assert x.linked[late, 1, 0].mean() > 0.9 and (x.edges[late, 1, 0, 2] > 0.5).mean() > 0.9  # 0 leads 1 by about 0.3 s
    assert np.allclose(x.edges[late, 0, 1, 2], -x.edges[late, 1, 0, 2])
    came = g.graphs(0, 2**62)[1]
    assert len(came) > 30 and (came[:, 1, 1, 0] > 0).mean() > 0.95 and np.allclose(came[:, 1], -came[:, 1].transpose(0, 2, 1))


def test_edge_heads_tell_the_leader_to_come(led):
    gnn, block = led
    told = gnn.comparison["edges"]["lead"]
    assert told["gnn"] < 0.6 * told["zero"] and told["sign"] > 0.75
    state = gnn.new_state()
    gnn.predict(block, state)
    before = copy.deepcopy(state)
    graph = gnn.graph(state)
    assert abs(np.log2(graph.lag_ns[1, 0] / (LAG_S * SCALE))) < 0.6 and graph.z[1, 0] > 5 and graph.leads[1, 0] > 0.2 > graph.leads[0, 1]
    assert np.allclose(graph.leads, -graph.leads.T) and np.allclose(graph.ahead, graph.ahead.T)
    found = hedge(graph, 1)
    assert found is not None and found.by in ("N0.X", "N2.X") and -1.3 < found.ratio < -0.6 and found.saved > 0.4
    later = market(9, 30.0, n=3)
    later.events["ts_init"] += 700 * SCALE
    assert same(gnn.predict(later, before), gnn.predict(later, state))


def test_a_jump_of_the_leader_raises_what_the_follower_is_expected_to_do(led):
    gnn, block = led
    state = gnn.new_state()
    gnn.predict(head(block, 20_000), state)
    up, down, back = gnn.impulse(state, 0, 2.0), gnn.impulse(state, 0, -2.0), gnn.impulse(state, 1, 2.0)
    assert up[1, 0] > 0.3 > -0.3 > down[1, 0] and abs(back[0, 0]) < 0.5 * up[1, 0]


def test_one_instrument_alone_is_told_plainly_and_nothing_fails():
    block = market(0, 120.0, n=1, rate=25.0)
    with pytest.raises(InputError, match="needs two instruments, there is one"):
        fitted(block, 1)


def test_alone_in_the_stream_it_abstains_until_another_has_a_price(outspoken):
    block = market(5, 60.0, n=3, rate=15.0)
    k = block.events["instrument"][block.closes]
    only = block.events["instrument"] == 1
    closes = np.flatnonzero(only[block.closes])
    alone = Block(block.events[only], block.rows[only], np.searchsorted(np.flatnonzero(only), block.closes[closes]))
    assert np.isnan(votes(outspoken, alone)[0]).all()
    rows = block.rows.copy()
    rows[(block.events["instrument"] != 1) & (np.arange(len(rows)) < 1_000), 0] = np.nan
    proba, _ = votes(outspoken, block._replace(rows=rows))
    early = block.closes < 1_000
    assert np.isnan(proba[early]).all() and np.isfinite(proba[~early & (k == 1)][5:]).all()


def test_an_instrument_that_never_trades_and_others_of_all_paces():
    block = market(3, 240.0, n=4, rates=(40.0, 10.0, 0.5, 0.0))
    gnn = fitted(block, 4, QUICK)
    assert not gnn.votes[3].any()
    gnn.votes[:] = True
    proba, magnitude = votes(gnn, block)
    slow = block.events["instrument"][block.closes] == 2
    assert np.isfinite(proba[10:]).all() and np.isfinite(magnitude[10:]).all() and slow.sum() > 20
    assert np.allclose(proba[10:].sum(axis=2), 1) and (magnitude[10:] > 0).all()
    with pytest.raises(InputError, match="of two instruments"):
        fitted(market(3, 240.0, n=2, rates=(40.0, 0.0)), 2, QUICK)


def test_prices_that_never_move_earn_no_vote_and_give_no_nan():
    block = market(3, 240.0)
    block.rows[:, 0] = 100.0
    gnn = fitted(block, 2, QUICK)
    assert not gnn.votes.any()
    gnn.votes[:] = True
    proba, magnitude = votes(gnn, block)
    assert np.isfinite(proba[10:]).all() and np.isfinite(magnitude[10:]).all()


def test_twenty_instruments():
    block = market(4, 120.0, n=20, rate=6.0)
    gnn = fitted(block, 20, QUICK)
    gnn.votes[:] = True
    whole = votes(gnn, block)
    assert np.isfinite(whole[0][300:]).all() and same(whole, votes(gnn, block, (777, 5_000, 5_001)))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), holes=st.floats(0, 1), wild=st.sampled_from([0.0, 0.01, 0.2]))
def test_whatever_the_features_a_vote_is_a_probability_or_absent(outspoken, seed, holes, wild):
    block = head(market(5, 60.0, n=3, rate=15.0), 1_500)
    rng, rows = np.random.default_rng(seed), block.rows.copy()
    rows[rng.random(rows.shape) < holes] = np.nan
    for value in (np.inf, -np.inf, 1e300, -1e300, 1e-300):
        rows[rng.random(rows.shape) < wild] = value
    block.events["ts_init"][700:] += int(rng.integers(0, 10**14))
    proba, magnitude = votes(outspoken, Block(block.events, rows, block.closes))
    known = np.isfinite(proba).all(axis=2)
    assert np.isnan(proba[~known]).all() and np.array_equal(known, np.isfinite(magnitude))
    assert np.allclose(proba[known].sum(axis=1), 1) and (proba[known] >= 0).all() and (magnitude[known] > 0).all()


def test_after_a_long_silence_a_move_is_no_return():
    block = market(5, 60.0, n=3, rate=15.0)
    block.events["ts_init"][1_000:] += 3_600 * SCALE
    block.rows[1_000:, 0] += 5.0
    g = gathered(block, 3)
    table, x = g.decisions()
    assert np.abs(x.history[..., 0]).max() < 20 and np.nanmax(np.abs(x.now[..., NOW.index("return since the last cell")])) < 20
    resumed = np.flatnonzero(table.ts >= block.events["ts_init"][1_000] + SCALE // 2)[0]
    assert (x.edges[resumed, :, :, 1] == 0).all() and (x.edges[resumed - 60, :, :, 1] != 0).any()  # lead-lag starts afresh


def test_the_same_seed_gives_the_same_net_and_another_another():
    block = market(2, 200.0)
    a, b, c = (fitted(block, 2, QUICK, seed=s) for s in (1, 1, 2))
    assert same(a.weights, b.weights) and a.comparison == b.comparison and not same(a.weights, c.weights)


def test_what_comes_after_its_slices_changes_nothing():
    block = market(2, 200.0)
    study = study_of(block, 2)
    late = block.events["ts_init"] > study.split.weigh
    rows = np.where(late[:, None], block.rows * 1.01, block.rows)
    a, b = (Gnn.fit(study, gathered(x, 2), QUICK) for x in (block, block._replace(rows=rows)))
    assert same(a.weights, b.weights) and a.comparison == b.comparison


def test_a_refit_begins_at_the_net_it_is_given(led):
    old, block = led
    w = old.weights
    n, d, f, q = len(old.ids), w.node.shape[1], w.conv_b.shape[1], w.attend.shape[1]
    net = torch_net(n, Config(width=d, filters=f, heads=q))
    begin_at(net, w)
    same_ = weights_of(net, np.zeros((n, 4 * H), np.float32))._asdict()
    for name, a in w._asdict().items():
        if name not in ("wide", "head_b"):
            assert np.array_equal(same_[name], a), name
    quick = Config(steps=40, every=20, rate=1e-5)
    new = Gnn.fit(study_of(block, 3), gathered(block, 3), quick, start=old)
    assert np.array_equal(new.scales.now, old.scales.now) and np.abs(new.weights.conv - w.conv).max() < 1e-2
    other = Gnn.fit(study_of(block, 3), gathered(block, 3), QUICK, start=old)
    assert other.weights.node.shape[1] == QUICK.width, "a net of another size is no start"


def test_gathering_stays_within_its_memory():
    for n, most in ((2, 500), (20, 24_000)):
        g = Gatherer(instruments(n), NAMES, most)
        for s in range(3):
            block = market(s, 200.0, n=n, rate=6.0)
            block.events["ts_init"] += s * 1_000 * SCALE
            g.push(block)
        table, x = g.decisions()
        assert most * 0.4 < len(table.ts) <= most or n == 20
        assert sum(a.nbytes for a in x) <= MEMORY
        assert len(g._pairs) <= g._room


def test_too_little_says_how_much_is_needed():
    with pytest.raises(InputError, match="needs 400 decisions"):
        fitted(market(0, 25.0, rate=10.0), 2)


def test_saved_and_loaded_unchanged_and_damage_is_named(led, tmp_path):
    gnn, block = led
    gnn.save(tmp_path)
    again = Gnn.load(tmp_path, NAMES)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["gnn.json", "gnn.safetensors"]
    assert same(votes(gnn, head(block, 5_000)), votes(again, head(block, 5_000)))
    assert again.comparison == gnn.comparison and again.report() == gnn.report()
    (tmp_path / "gnn.safetensors").write_bytes((tmp_path / "gnn.safetensors").read_bytes()[:-100])
    with pytest.raises(InputError, match=r"gnn.safetensors"):
        Gnn.load(tmp_path, NAMES)


def test_columns_that_a_feed_lacks_are_average(outspoken):
    fewer = Gnn(("mid", "spread"), outspoken.ids, outspoken.multiplier, outspoken.tick, outspoken.weights, outspoken.scales,
                outspoken.votes, outspoken.sizes, {})  # fmt: skip
    block = market(5, 30.0, n=3, rate=15.0)
    proba, _ = votes(fewer, block._replace(rows=block.rows[:, :2]))
    assert np.isfinite(proba[20:]).all() and len(HORIZONS_NS) == H
