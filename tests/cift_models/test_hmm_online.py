"""Online EM: follows a market that drifts, keeps to one that does not, and nothing turns it into NaN; mixtures are chains too."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hmm import INSTRUMENTS, NAMES, PLANTED, chain, market, planted, predictions, sample, study_of

from cift_models.hmm import Hmm
from cift_models.hmm_chain import CLIP, Chain, Config, D, K, by_regime, filter_all, fit_chain, name_states, spread_out
from cift_models.hmm_online import OnlineEM


def naive(chain: Chain, x, gammas, floor):
    """The recursions with einsum, from the paper's equations, one array a statistic."""
    q, mean, var, alpha = chain.moves.copy(), chain.mean.copy(), chain.var.copy(), chain.start.copy()
    pi = np.linalg.matrix_power(q, 1 << 12)[0]
    k = len(pi)
    n_q, n_0 = np.repeat((pi[:, None] * q)[..., None], k, 2), np.repeat(pi[:, None], k, 1)
    n_1, n_2 = (np.repeat((pi[:, None] * v)[..., None], k, 2) for v in (mean, mean**2 + var))
    eye = np.eye(k)
    for t, (row, g) in enumerate(zip(x, gammas)):
        density = np.exp(-0.5 * ((row - mean) ** 2 / var + np.log(2 * np.pi * var)).sum(axis=1))
        if t == 0:
            alpha = alpha * density / (alpha @ density)
            continue
        r = alpha[:, None] * q / (alpha @ q)
        alpha = (alpha @ q) * density
        alpha /= alpha.sum()
        n_q = g * np.einsum("jl,il->ijl", eye, r) + (1 - g) * np.einsum("ijk,kl->ijl", n_q, r)
        n_0 = g * eye + (1 - g) * n_0 @ r
        n_1 = g * np.einsum("il,d->idl", eye, row) + (1 - g) * n_1 @ r
        n_2 = g * np.einsum("il,d->idl", eye, row**2) + (1 - g) * n_2 @ r
        s = n_q @ alpha
        q = (s / s.sum(axis=1, keepdims=True) + 1e-6) / (1 + k * 1e-6)
        w = (n_0 @ alpha)[:, None]
        mean = n_1 @ alpha / w
        var = np.maximum(n_2 @ alpha / w - mean**2, floor)
    return q, mean, var, alpha


def test_it_equals_the_recursions_of_the_paper():
    c = chain(3, 3, 2, 0.8)
    _, x = sample(c, 200, 4)
    x = np.clip(x, -CLIP, CLIP)
    em = OnlineEM(c, prior=50.0, power=0.6, floor=1e-3)
    em.run(x)
    want = naive(c, x, (50.0 + 1 + np.arange(200)) ** -0.6, 1e-3)
    for got, w in zip((em.moves, em.mean, em.var, em.alpha), want):
        assert np.allclose(got, w, rtol=1e-9, atol=1e-12)


def drifting(seed, n=6_000):
    state, x = planted(seed, n)
    return state, np.clip(x + np.linspace(0, 1.5, n)[:, None] * np.array([0, 1.0, 0, 0]), -CLIP, CLIP)


def planted_chain():
    moves = np.full((K, K), 0.01 / 4) + np.eye(K) * (0.99 - 0.01 / 4)
    return Chain(np.full(K, 0.2), moves, PLANTED.clip(-CLIP, CLIP), np.full((K, D), 0.25))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_market_that_drifts_is_followed_and_the_names_stay(seed):
    _, x = drifting(seed)
    first, em, out = planted_chain(), OnlineEM(planted_chain(), least=0.001), np.empty((len(x), K))
    filter_all(x, *first, out)
    scores = em.run(x)
    fixed = np.array([filter_all(x[:t], *first, out[:t]) for t in (3_000, 6_000)])
    assert scores[3_000:].sum() > fixed[1] - fixed[0] + 300, "the learnt chain tells the second half better than the fixed one"
    assert name_states(em.mean).tolist() == list(range(K))
    assert np.allclose(em.mean[:3, 1], PLANTED[:3, 1] + 1.5, atol=0.65)


def test_in_a_market_that_stays_little_is_lost():
    _, x = planted(5)
    x = np.clip(x, -CLIP, CLIP)
    out = np.empty((len(x), K))
    em = OnlineEM(planted_chain())
    assert em.run(x).sum() > filter_all(x, *planted_chain(), out) - 0.02 * len(x)
    assert np.allclose(em.mean[:4], PLANTED[:4], atol=0.15) and np.allclose(em.moves.sum(axis=1), 1)


def test_a_wrong_chain_is_put_right():
    _, x = planted(6)
    x = np.clip(x, -CLIP, CLIP)
    wrong = planted_chain()._replace(mean=PLANTED * 0.6, var=np.full((K, D), 1.0))
    em = OnlineEM(wrong, prior=500.0)
    scores = em.run(x)
    fixed, out = np.empty(2), np.empty((len(x), K))
    fixed[:] = [filter_all(x[:t], *wrong, out[:t]) for t in (3_000, 6_000)]
    assert scores[3_000:].sum() > fixed[1] - fixed[0] + 1_000
    assert np.abs(em.mean[:4] - PLANTED[:4]).mean() < 0.5 * np.abs(wrong.mean[:4] - PLANTED[:4]).mean()


def test_what_comes_later_changes_no_past_filter():
    _, x = drifting(2, 400)
    a, b = OnlineEM(planted_chain()), OnlineEM(planted_chain())
    first = a.run(x)[:200]
    assert np.array_equal(first, b.run(np.concatenate([x[:200], -x[200:]]))[:200])
    assert a.restart()._seen == 0 and np.array_equal(a.alpha, a.start)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([0.0, 1e-8, 1.0, 1e8, 1e200]), holes=st.floats(0, 1),
    prior=st.sampled_from([1.0, 10.0, 300.0]), power=st.sampled_from([0.51, 0.6, 1.0]), least=st.sampled_from([0.0, 0.1, 0.99]),
)  # fmt: skip
def test_no_input_makes_it_nan(seed, scale, holes, prior, power, least):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(40, D)) * scale
    x[rng.random(x.shape) < holes] = np.nan
    x[rng.random(x.shape) < 0.05] = np.inf * rng.choice([-1, 1])
    em = OnlineEM(chain(int(rng.integers(1_000)), K, D, float(rng.random())), prior, power, least)
    assert np.isfinite(em.run(x)).all()
    c = em.chain
    assert all(np.isfinite(a).all() for a in c) and (c.var >= 0.1).all() and (c.moves > 0).all()
    assert np.allclose(c.moves.sum(axis=1), 1) and np.allclose(em.alpha.sum(), 1)


def test_settings_that_make_no_sense_are_refused():
    for wrong in ({"power": 0.5}, {"prior": 0}, {"least": 1.0}, {"floor": 0.0}):
        with pytest.raises(ValueError, match="power"):
            OnlineEM(planted_chain(), **wrong)


def two_sided(seed):
    """Each regime emits from two Gaussians that lie apart in intensity."""
    state, x = planted(seed)
    rng = np.random.default_rng(seed + 100)
    x[:, 2] += np.where(rng.random(len(x)) < 0.5, 1.2, -1.2)
    return state, np.clip(x, -CLIP, CLIP)


def test_a_chain_with_mixtures_scores_like_hmmlearns():
    from hmmlearn.hmm import GMMHMM

    rng = np.random.default_rng(0)
    c = chain(1, 3, 2, 0.8)
    weight, mean, var = rng.dirichlet(np.ones(2), 3), rng.normal(size=(3, 2, 2)), rng.uniform(0.2, 1, (3, 2, 2))
    model = GMMHMM(3, 2, covariance_type="diag")
    model.startprob_, model.transmat_, model.weights_, model.means_, model.covars_ = c.start, c.moves, weight, mean, var
    _, x = sample(c, 300, 2)
    wide = spread_out(c.start, c.moves, weight, mean, var)
    out = np.empty((300, 6))
    assert filter_all(x, *wide, out) == pytest.approx(model.score(x), rel=1e-10)
    assert np.allclose(out.reshape(300, 3, 2).sum(axis=2)[-1], model.predict_proba(x)[-1], atol=1e-10)


def test_mixtures_tell_more_of_a_market_of_mixtures_and_name_the_same_regimes():
    state, x = two_sided(0)
    later_state, later = two_sided(1)
    one, two = fit_chain(x, [len(x)], 0), fit_chain(x, [len(x)], 0, Config(mixtures=2))
    seen_1, seen_2 = np.empty((len(x), K)), np.empty((len(x), 2 * K))
    assert filter_all(later, *two, seen_2) > filter_all(later, *one, seen_1) + 500
    assert (by_regime(seen_2).argmax(axis=1) == later_state).mean() > 0.95
    again = fit_chain(later, [len(later)], 7, Config(mixtures=2))
    a, b = (c.mean.reshape(K, 2, D).mean(axis=1)[:, 0] for c in (two, again))
    assert np.allclose(a, b, atol=0.4) and len(state) == len(x)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1_000), kind=st.sampled_from(["constant", "two values", "NaN", "huge"]))
def test_any_data_gives_a_sound_mixture(seed, kind):
    rng = np.random.default_rng(seed)
    x = {
        "constant": np.zeros((120, D)), "two values": rng.integers(0, 2, (120, D)).astype(float), "NaN": np.full((120, D), np.nan),
        "huge": rng.normal(size=(120, D)) * 1e6,
    }[kind]  # fmt: skip
    c = fit_chain(x, [60, 60], seed, Config(mixtures=2))
    assert all(np.isfinite(a).all() for a in c) and (c.var > 0).all() and np.allclose(c.moves.sum(axis=1), 1)


def test_the_member_with_mixtures_votes_by_five_regimes_however_the_stream_is_cut_and_is_saved(tmp_path):
    block, agitated = market(0, seconds=400)
    gathered = Hmm.gatherer(INSTRUMENTS, NAMES)
    gathered.push(block)
    member = Hmm.fit(study_of(block, agitated), gathered, Config(mixtures=2, min_seconds=100))
    whole = predictions(member, block)
    assert whole[2].shape[1] == K and member.chain.mean.shape == (2 * K, D)
    ok = np.isfinite(whole[2]).all(axis=1)
    assert ok.mean() > 0.8 and np.allclose(whole[2][ok].sum(axis=1), 1)
    member.save(tmp_path)
    for a, b, c in zip(whole, predictions(member, block, [100, 1_111]), predictions(Hmm.load(tmp_path, NAMES), block)):
        assert np.array_equal(a, b, equal_nan=True) and np.array_equal(a, c, equal_nan=True)
