"""Transformer: what serves is what was trained, decisions know only the past, and a killed training ends as if it had not been."""

from __future__ import annotations

import copy
import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from catalog.errors import InputError
from catalog.events import EVENT, SCALE, Instrument
from cift_models import transformer_lessons, transformer_train
from cift_models.labels import LABELS, H, Labeller, Study, Table, Thinned, fit_thresholds, walk_forward
from cift_models.transformer import COLUMNS, Config, Transformer, borne_out, departure, windows
from cift_models.transformer_kernel import FRAMES, OUT, PATCH, exp, scale_rows
from cift_models.transformer_train import Data, Lines, Mirror
from cift_models.validate import log_loss
from cift_models.windows import MINUTES, SECOND, SECONDS, TICKS, Block, closes, new_batches

NAMES = ("mid", "spread", "imbalance_1", "queue_bid", "queue_ask", "ofi_1", "return_1s", "volatility_8s")
START = 1_709_303_400 * SECOND + 123_456_789
SMALL = Config(rate=1e-2, beside=1.0, cap=3_000, width=16, heads=2, hidden=32, epochs=5, batch=128, threads=1)


def instruments(n: int) -> list[Instrument]:
    return [Instrument(f"I{k}.X", SCALE // 100, SCALE, 1.0, "USD") for k in range(n)]


def market(seed: int, seconds: int = 240, n: int = 2, rate: int = 30, pull: float = 0.8) -> Block:
    """The mid ticks towards the heavier queue, `pull` of the time more than away from it; the imbalance forgets itself within a second."""
    rng = np.random.default_rng(seed)
    size = seconds * rate * n
    events, rows = np.zeros(size, EVENT), rng.normal(size=(size, len(NAMES)))
    events["ts_init"] = START + np.sort(rng.integers(0, seconds * SECOND, size))
    events["instrument"] = rng.integers(0, n, size)
    for k in range(n):
        mine = np.flatnonzero(events["instrument"] == k)
        imbalance, x = np.empty(len(mine)), 0.0
        for i, e in enumerate(rng.normal(size=len(mine))):
            x = 0.97 * x + 0.25 * e
            imbalance[i] = np.tanh(x)
        step = (rng.random(len(mine)) < 0.3) * np.sign(pull * imbalance - rng.uniform(-1, 1, len(mine)))
        rows[mine, 0] = 100 + 0.01 * np.cumsum(step)
        rows[mine, 2] = imbalance
    rows[:, 1] = 1 + rng.integers(0, 2, size)
    rows[rng.random(size) < 0.02, 5:] = np.nan
    return Block(events, rows, closes(new_batches(n), events))


def cut(block: Block, ends) -> list[Block]:
    """The block in pieces that end before these events."""
    out, a = [], 0
    for b in (*ends, len(block.events)):
        mine = block.closes[(block.closes >= a) & (block.closes < b)] - a
        out.append(Block(block.events[a:b], block.rows[a:b], mine))
        a = b
    return out


def study_of(block: Block, seed: int = 0, n: int = 2, usable=(0, 1, 2)) -> Study:
    labeller, held = Labeller(instruments(n)), Thinned(n, len(LABELS), 100_000)
    at = block.closes
    ts, inst = block.events["ts_init"][at], block.events["instrument"][at].astype(np.int64)
    held.push(ts, inst, labeller.push(block.events, np.ascontiguousarray(block.rows[:, 0]), at))
    held.learn(labeller.finish())
    z = held.result()
    table = Table(z["ts"], z["instrument"], block.rows[at].astype(np.float32), np.ones(len(at)), z["move"], z["known_at"])
    (split,) = walk_forward(table.ts)
    thresholds = fit_thresholds(table, n, table.ts < split.calibrate)
    return Study(tuple(instruments(n)), NAMES, NAMES[1:], table, split, thresholds, tuple(usable), seed)


def gather(blocks, n: int = 2, config: Config = SMALL) -> transformer_lessons.Windows:
    g = Transformer.gatherer(instruments(n), NAMES, config)
    for b in blocks:
        g.push(b)
    return g


def fit(block: Block, config: Config = SMALL, seed: int = 0, n: int = 2, usable=(0, 1, 2)) -> Transformer:
    return Transformer.fit(study_of(block, seed, n, usable), gather([block], n, config), config)


def random_member(seed: int = 0, names=NAMES, n: int = 2, config: Config = SMALL) -> Transformer:
    """Untrained, with every weight drawn: nothing in it is zero."""
    rng = np.random.default_rng(seed)
    columns = [c for c in COLUMNS if c in names]
    w = {k: (0.3 * rng.normal(size=s) + k.split(".")[1].startswith(("norm", "gain"))).astype(np.float32)
         for k, s in transformer_train.shapes(len(columns), n, config).items()}  # fmt: skip
    own = rng.normal(size=(n, len(columns))), rng.uniform(0.5, 2, (n, len(columns)))
    lines = Lines(0.3 * rng.normal(size=(len(Mirror.of(columns).straight(columns).sign), H, 3)), rng.normal(size=(n, H, 3)))
    learnt = np.array([True, True, True, False]), lines, np.full(H, 0.7), np.ones((n, H))
    return Transformer(names, columns, config, w, *own, *learnt)


@pytest.fixture(scope="module")
def block() -> Block:
    return market(0)


@pytest.fixture(scope="module")
def member(block) -> Transformer:
    return fit(block)


def equal(a, b) -> bool:
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b))


def raw_of(me: Transformer, block: Block, spoil=None):
    """Raw outputs at every close, the windows they came from, and their stamps and instruments; `spoil(views)` may change the windows."""
    inst = block.events["instrument"].astype(np.int64)
    values = np.empty((len(block.events), len(me.columns)), np.float32)
    scale_rows(block.rows, inst, me._index, me.centre, me.scale, values)
    s = me.new_state()
    v = s.history.push(Block(block.events, values, block.closes))
    if spoil is not None:
        spoil(v)
    ts, k = v.tick_ts[:, -1].copy(), inst[block.closes]
    return me.raw(v, k, s).reshape(-1, H, OUT), v, ts, k


@pytest.mark.parametrize(("width", "heads", "layers"), [(16, 2, 1), (32, 4, 2)])
def test_what_serves_is_the_network_that_was_trained(width, heads, layers):
    me = random_member(3, config=dataclasses.replace(SMALL, width=width, heads=heads, layers=layers))
    raw, v, _, k = raw_of(me, market(1, seconds=150, rate=6))
    told = me.served("cpu")(*windows(v), k).reshape(raw.shape)
    assert v.minute_ts[:, -1].min() == 0 < v.minute_ts[:, -1].max()  # from no minute of history on
    assert np.abs(raw - told).max() < 1e-5 * np.abs(told).max()


def test_the_exponential_is_one():
    x = np.concatenate([-np.geomspace(1e-9, 87, 3_000), [0.0, -1e30, -np.inf]]).astype(np.float32)
    want = np.exp(np.maximum(x, -87).astype(np.float64))
    exp(x, np.empty(len(x), np.int32))
    assert np.abs(x / want - 1).max() < 3e-7


@pytest.mark.parametrize("seed", range(6))
def test_decisions_are_the_same_to_the_last_bit_however_the_stream_is_cut(block, seed):
    rng, me = np.random.default_rng(seed), random_member(seed)
    piece = cut(block, [4_000])[0]
    ends = np.sort(rng.choice(np.arange(1, 4_000), (0, 1, 7, 100, 1_500, 3_999)[seed], replace=False))
    whole, parts, a, b = me.predict(piece, s := me.new_state()), [], s, me.new_state()
    ahead = []
    for i, p in enumerate(cut(piece, ends)):
        if i % 50 == 3:
            b = copy.deepcopy(b)  # a state that was put away and taken out again
        parts.append(me.predict(p, b))
        ahead.append(me.imbalance(b))
    assert equal(whole, [np.concatenate(v) for v in zip(*parts)])
    assert np.array_equal(me.imbalance(a), np.concatenate(ahead), equal_nan=True)


def test_a_block_of_many_decisions_equals_its_pieces(block, monkeypatch):
    me = random_member(1)
    whole = me.predict(block, me.new_state())
    assert len(block.closes) > transformer_lessons.PIECE
    monkeypatch.setattr(transformer_lessons, "PIECE", 37)
    assert equal(whole, me.predict(block, me.new_state()))


def test_nothing_looks_ahead(block):
    me = random_member(2)
    whole = me.predict(block, me.new_state())
    for n in (1, 500, 3_000):
        prefix, rest = cut(block, [n])
        m = len(prefix.closes)
        assert equal(me.predict(prefix, me.new_state()), [v[:m] for v in whole])
        other = Block(block.events, np.concatenate([prefix.rows, -rest.rows]), block.closes)
        assert equal([v[:m] for v in me.predict(other, me.new_state())], [v[:m] for v in whole])


def test_what_lies_before_the_history_cannot_matter():
    me, short = random_member(4), market(2, seconds=130, rate=4)

    def spoil(v) -> None:
        rng = np.random.default_rng(0)
        for x, stamps in zip(v[:3], v[3:]):
            absent = stamps == 0
            assert absent.any() and not absent.all()
            x[absent] = rng.choice([1e9, -5.0, np.nan, np.inf], (absent.sum(), x.shape[2]))

    assert np.array_equal(raw_of(me, short)[0], raw_of(me, short, spoil)[0])


def test_a_column_that_the_feed_lacks_is_a_missing_value(block):
    piece = cut(block, [3_000])[0]
    at = NAMES.index("ofi_1")
    gone = piece.rows.copy()
    gone[:, at] = np.nan
    me = random_member(5)
    less = Transformer([n for n in NAMES if n != "ofi_1"], me.columns, me.config, me.weights, me.centre, me.scale, me.usable, me.lines,
                       me.share, me.size)  # fmt: skip
    missing = me.predict(piece._replace(rows=gone), me.new_state())
    assert equal(missing, less.predict(piece._replace(rows=np.delete(piece.rows, at, axis=1)), less.new_state()))
    assert not equal(missing, me.predict(piece, me.new_state()))
    gone[:, at] = np.inf
    assert equal(missing, me.predict(piece._replace(rows=gone), me.new_state()))


def test_holes_anywhere_leave_sound_votes_and_an_empty_row_abstains(block):
    rng, me = np.random.default_rng(0), random_member(6)
    piece = cut(block, [5_000])[0]
    rows = piece.rows.copy()
    rows[rng.random(rows.shape) < 0.4] = np.nan
    rows[1_000:2_000] = np.nan
    rows[3_000:, 3] *= 1e30
    votes = me.predict(piece._replace(rows=rows), me.new_state())
    empty = np.isnan(rows[piece.closes][:, 1:]).all(axis=1)
    assert empty.sum() > 100
    assert np.isnan(votes.proba[empty]).all() and np.isnan(votes.magnitude[empty]).all()
    proba, magnitude = votes.proba[~empty, :3], votes.magnitude[~empty, :3]
    assert np.allclose(proba.sum(axis=2), 1) and (proba >= 0).all() and (magnitude > 0).all()
    assert np.isnan(votes.proba[:, 3]).all()  # a horizon that was not learnt


def test_positions_are_real_times(block):
    me, piece = random_member(7), cut(block, [4_000])[0]
    usual = me.predict(piece, me.new_state())
    later = piece.events.copy()
    later["ts_init"] += 7 * 60 * SECOND
    assert equal(usual, me.predict(piece._replace(events=later), me.new_state()))
    slower = piece.events.copy()
    slower["ts_init"][: piece.closes[-40]] -= 200_000_000  # the same rows, the older of them a fifth of a second older
    a, b = usual.proba[-1, :3], me.predict(piece._replace(events=slower), me.new_state()).proba[-1, :3]
    assert np.abs(a - b).max() > 1e-5


def test_order_matters():
    me, piece = random_member(8), market(3, seconds=2, n=1)
    rows = piece.rows.copy()
    older = piece.closes[-20:-1]
    rows[older] = rows[older[::-1]]
    a, b = (me.predict(p, me.new_state()).proba[-1, :3] for p in (piece, piece._replace(rows=rows)))
    assert np.abs(a - b).max() > 1e-5


def test_it_is_small():
    for n, layers in ((1, 1), (4, 1), (50, 2)):
        size = sum(int(np.prod(s)) for s in transformer_train.shapes(len(COLUMNS), n, Config(layers=layers)).values())
        assert 40_000 < size < 100_000
    from cift_models.feature_table import FEATURES

    assert set(COLUMNS) < {f.name for f in FEATURES if f.model_input}


def test_saved_and_loaded_it_votes_the_same(member, block, tmp_path):
    member.save(tmp_path)
    assert {f.name.split(".")[0] for f in tmp_path.iterdir()} == {"transformer"}
    again = Transformer.load(tmp_path, NAMES)
    piece = cut(block, [3_000])[0]
    assert equal(member.predict(piece, member.new_state()), again.predict(piece, again.new_state()))
    assert again.config == member.config and again.losses == member.losses and again.parameters() == member.parameters()
    turned = Transformer.load(tmp_path, NAMES[::-1])
    assert equal(again.predict(piece, again.new_state()), turned.predict(piece._replace(rows=piece.rows[:, ::-1]), turned.new_state()))


def test_neither_import_nor_serving_needs_torch(member, tmp_path):
    member.save(tmp_path)
    code = f"""
import sys, numpy as np
from pathlib import Path
from cift_models.transformer import Transformer
from cift_models.windows import Block
from catalog.events import EVENT
me = Transformer.load(Path({str(tmp_path)!r}), {NAMES!r})
e = np.zeros(2, EVENT); e["ts_init"] = [1, 2]
assert np.isfinite(me.predict(Block(e, np.ones((2, {len(NAMES)})), np.array([1])), me.new_state()).proba[0, 0]).all()
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_the_same_seed_gives_the_same_member_and_leaves_torch_as_it_was(member, block):
    import torch

    torch.manual_seed(11)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    again = fit(block)
    assert torch.equal(before, torch.get_rng_state()) and torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert all(np.array_equal(member.weights[k], again.weights[k]) for k in member.weights)
    assert equal(member.lines, again.lines) and np.array_equal(member.share, again.share) and np.array_equal(member.size, again.size)
    other = fit(block, dataclasses.replace(SMALL, epochs=1), seed=1)
    assert not np.array_equal(other.weights["join.q"], fit(block, dataclasses.replace(SMALL, epochs=1)).weights["join.q"])


KILLED = """
import os, signal, sys
sys.path.insert(0, {here!r})
import test_transformer as t
from pathlib import Path
network, calls = t.transformer_train.network, []
def dying(w, batch, heads, dropout=0.0):
    calls.append(dropout)
    if sum(d > 0 for d in calls) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return network(w, batch, heads, dropout)
t.transformer_train.network = dying
t.fit(t.market(0), t.dataclasses.replace(t.SMALL, checkpoint=Path({folder!r})))
"""


def steps_of_an_epoch(block: Block) -> int:
    z, study = gather([block]).sample(), study_of(block)
    return -(-len(transformer_lessons.Lessons.of(study, z).fit) // SMALL.batch)


def test_killed_in_the_middle_of_an_epoch_it_goes_on_to_the_same_weights(member, block, tmp_path, capsys):
    at = 2 * steps_of_an_epoch(block) + 3
    code = KILLED.format(here=str(Path(__file__).parent), at=at, folder=str(tmp_path))
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2_000:]
    again = fit(block, dataclasses.replace(SMALL, checkpoint=tmp_path))
    assert "going on after epoch 2" in capsys.readouterr().err
    assert all(np.array_equal(member.weights[k], again.weights[k]) for k in member.weights)
    assert again.losses == member.losses and np.array_equal(again.share, member.share)


def test_an_interrupt_is_survived_and_a_checkpoint_serves_its_own_training_only(member, block, tmp_path, monkeypatch, capsys):
    network, calls, at = transformer_train.network, [], steps_of_an_epoch(block) + 2

    def interrupted(w, batch, heads, dropout=0.0):
        calls.append(dropout)
        if sum(d > 0 for d in calls) == at:
            raise KeyboardInterrupt
        return network(w, batch, heads, dropout)

    config = dataclasses.replace(SMALL, checkpoint=tmp_path)
    monkeypatch.setattr(transformer_train, "network", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(block, config)
    monkeypatch.undo()
    assert [f.name for f in tmp_path.iterdir()] == [transformer_train.CHECKPOINT]  # nothing half-written beside it
    kept = (tmp_path / transformer_train.CHECKPOINT).read_bytes()
    fit(block, dataclasses.replace(config, epochs=1), seed=5)
    assert "going on" not in capsys.readouterr().err
    (tmp_path / transformer_train.CHECKPOINT).write_bytes(kept)
    again = fit(block, config)
    assert "going on after epoch 1" in capsys.readouterr().err
    assert all(np.array_equal(member.weights[k], again.weights[k]) for k in member.weights)
    (tmp_path / transformer_train.CHECKPOINT).write_bytes(kept[: len(kept) // 2])
    with pytest.raises(InputError, match="damaged"):
        fit(block, config)


def test_a_refit_begins_at_the_weights_it_is_given_and_keeps_nothing_worse(member, block):
    later = market(5)
    study, windows = study_of(later), gather([later])
    again = Transformer.fit(study, windows, SMALL, start=member)
    assert np.array_equal(again.centre, member.centre) and np.array_equal(again.scale, member.scale)
    losses = [b for _, b in again.losses]
    assert len(losses) > 1 and min(losses) <= losses[0], "the first is that of the weights it began with"
    still = Transformer.fit(study, windows, dataclasses.replace(SMALL, rate=1e3, epochs=1, patience=1), start=member)
    assert all(np.array_equal(still.weights[k], member.weights[k]) for k in member.weights), "a step that ruins them is not kept"
    other = Transformer.fit(study, windows, dataclasses.replace(SMALL, width=8, epochs=1), start=member)
    assert other.weights["join.q"].shape == (8, 8)


def score(me: Transformer, block: Block, study: Study, h: int):
    """Out of sample, by horizon: log-loss of the votes and of the class shares; the truth and the votes."""
    truth = study_of(block)
    y = truth._replace(thresholds=study.thresholds).classes(h)
    votes = me.predict(block, me.new_state())
    known = y >= 0
    rows = np.concatenate([study.fit_rows(h), study.calibration_rows(h)])
    rates = np.bincount(study.classes(h)[rows], minlength=3) / len(rows)
    plain = log_loss(np.tile(rates, (known.sum(), 1)), y[known]).mean()
    return log_loss(votes.proba[known, h], y[known]).mean(), plain, truth.table.move[known, h], votes, known


def test_it_learns_what_was_planted_and_says_how_far_and_where_the_queues_go(member, block):
    study, fresh = study_of(block), market(9)
    for h in (0, 1):
        loss, plain, move, votes, known = score(member, fresh, study, h)
        assert loss < plain - 0.03
        assert votes.magnitude[known, h].mean() == pytest.approx(np.abs(move).mean(), rel=0.2)
    state = member.new_state()
    votes = member.predict(fresh, state)
    now = fresh.rows[fresh.closes, 2]
    said = member.imbalance(state)[:, 0]
    labeller = Labeller([dataclasses.replace(i, tick=SCALE) for i in instruments(2)], counts=())
    o = labeller.push(fresh.events, np.ascontiguousarray(fresh.rows[:, 2]), fresh.closes)
    inst = fresh.events["instrument"][fresh.closes]
    place = [np.flatnonzero(inst == k) for k in range(2)]
    mine = o.label == 0
    at = np.array([place[k][s] for k, s in zip(o.instrument[mine], o.serial[mine])])
    then = now[at] + o.move[mine]
    assert np.mean((said[at] - then) ** 2) < 0.95 * min(np.mean((now[at] - then) ** 2), np.var(then))
    assert np.mean(votes.proba[:, 0].argmax(axis=1) != 1) > 0.2


def test_where_nothing_is_planted_it_votes_the_class_shares():
    null = market(20, pull=0.0)
    me = fit(null)
    for h in (0, 1):
        loss, plain, *_ = score(me, market(21, pull=0.0), study_of(null), h)
        assert loss < plain + 0.01


def drawn(rng, z) -> np.ndarray:
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    return (p.cumsum(axis=1) < rng.random((len(z), 1))).sum(axis=1).astype(np.int8)


def test_a_share_needs_evidence():
    rng = np.random.default_rng(0)
    base, z = rng.normal(size=(2_000, 3)), rng.normal(size=(2_000, 3)) * 2
    y = drawn(rng, base + z)
    share = borne_out(z + 5, base, y, 1.0, SMALL)
    assert share == pytest.approx(1, abs=0.1)
    assert 0 < borne_out(z, base, y, 0.01, SMALL) < share - 0.1
    assert borne_out(z, base, y, 1e-6, SMALL) == 0 == borne_out(-z, base, y, 1.0, SMALL)
    told = drawn(rng, base)
    assert borne_out(base, base, told, 1.0, SMALL) < 0.1, "what the lines say already is no news"
    chance = [borne_out(rng.normal(size=(300, 3)), np.zeros(3), rng.integers(0, 3, 300).astype(np.int8), 0.2, SMALL) for _ in range(40)]
    assert np.median(chance) == 0 and np.mean(chance) < 0.05


def test_the_share_is_lowered_by_its_standard_error_over_many_samples():
    rng, found = np.random.default_rng(1), []
    for _ in range(60):
        z = rng.normal(size=(400, 3))
        y = drawn(rng, 0.8 * z)
        found.append([borne_out(z, np.zeros(3), y, 1.0, Config(doubt=d)) for d in (0.0, 1.0)])
    best, lowered = np.array(found).T
    assert (best - lowered).mean() == pytest.approx(best.std(), rel=0.35)


def test_class_shares_move_as_far_as_labels_are_worth():
    rng = np.random.default_rng(4)
    z = rng.normal(size=(4_000, 3))
    y = drawn(rng, z + [0.6, 0.0, -0.6])
    far, some, none = (departure(z, y, w, 30.0) for w in (1.0, 0.02, 1e-9))
    assert np.abs(far - far.mean() - [0.6, 0.0, -0.6]).max() < 0.1 and np.abs(none).max() < 1e-4
    assert 0.2 < some[0] - some[2] < far[0] - far[2] - 0.2
    assert np.abs(departure(z, drawn(rng, z), 1.0, 30.0)).max() < 0.1


def test_the_lines_are_the_most_probable_ones(block):
    from scipy.special import log_softmax

    study, sample, columns = study_of(block), gather([block]).sample(), [c for c in COLUMNS if c in NAMES]
    lessons = transformer_lessons.Lessons.of(study, sample)
    data = transformer_train.Data(sample, *lessons.scalers(sample), tuple(columns))
    lines = Lines.fit(lessons, data, SMALL)
    mirror = transformer_train.Mirror.of(columns).straight(columns)
    x, k = data.straight(lessons.fit), sample["instrument"][lessons.fit]
    y = lessons.y[lessons.fit, 0]
    x, k = np.concatenate([x[y >= 0], x[y >= 0][:, mirror.swap] * mirror.sign]), np.tile(k[y >= 0], 2)
    y = np.concatenate([y[y >= 0], 2 - y[y >= 0]])

    def lost(slope, constant):
        told = log_softmax(x @ slope + constant[k], axis=1)[np.arange(len(y)), y].sum()
        belief = (slope[: len(columns)] ** 2).sum() + SECONDS * (slope[len(columns) :] ** 2).sum()
        apart = SMALL.alike / 2 * ((constant - constant.mean(axis=0)) ** 2).sum()
        return SMALL.ridge / 2 * belief + apart - lessons.worth[0, 0] / len(y) * told

    rng, least = np.random.default_rng(0), lost(lines.slope[:, 0], lines.constant[:, 0])
    for _ in range(20):
        u, v = rng.normal(size=(x.shape[1], 3)), rng.normal(size=(2, 3))
        assert min(lost(lines.slope[:, 0] + e * u, lines.constant[:, 0] + e * v) for e in (-0.03, 0.03)) > least
    away = lines.scores(x[:, mirror.swap] * mirror.sign, k)[:, 0, ::-1] - lines.scores(x, k)[:, 0]
    assert np.abs(away - away.mean(axis=1, keepdims=True)).max() < 0.02, "bid and ask exchanged, up and down are"


def test_an_instrument_whose_classes_begin_at_another_move_has_constants_of_its_own(block):
    from scipy.special import softmax

    study, sample, columns = study_of(block), gather([block]).sample(), [c for c in COLUMNS if c in NAMES]
    lessons = transformer_lessons.Lessons.of(study, sample)
    data = transformer_train.Data(sample, *lessons.scalers(sample), tuple(columns))
    y, second = lessons.y.copy(), np.flatnonzero(sample["instrument"] == 1)
    y[second[::2]] = np.where(y[second[::2]] >= 0, 1, -1)  # half of its labels become flat
    own, none = (Lines.fit(lessons._replace(y=y), data, dataclasses.replace(SMALL, alike=a)) for a in (SMALL.alike, 1e6))
    flat = own.constant[:, 0, 1] - own.constant[:, 0, [0, 2]].mean(axis=1)
    assert flat[1] > flat[0] + 0.5 and np.ptp(none.constant, axis=0).max() < 0.01
    rows = lessons.fit[y[lessons.fit, 0] >= 0]

    def lost(lines):
        z = lines.scores(data.straight(rows), sample["instrument"][rows])[:, 0]
        return log_loss(softmax(z, axis=1), y[rows, 0]).mean()

    assert lost(own) < lost(none) - 0.01


def test_windows_and_labels_belong_together_and_do_not_depend_on_cuts(block):
    config = dataclasses.replace(SMALL, cap=500)
    a, b = gather([block], config=config).sample(), gather(cut(block, range(300, 14_000, 1_111)), config=config).sample()
    assert 250 <= len(a["ts"]) <= 500 and all(np.array_equal(a[k], b[k], equal_nan=a[k].dtype.kind == "f") for k in a)
    table = study_of(block).table
    at = {(t, k): i for i, (t, k) in enumerate(zip(table.ts, table.instrument))}
    rows = np.array([at[t, k] for t, k in zip(a["ts"], a["instrument"])])
    assert np.array_equal(a["move"][:, :H], table.move[rows, :H], equal_nan=True)
    assert np.array_equal(a["known_at"][:, :H], table.known_at[rows, :H])
    columns = [NAMES.index(c) for c in COLUMNS if c in NAMES]
    assert np.allclose(a["tick"][:, -1], table.rows[rows][:, columns], rtol=1e-3, atol=1e-6, equal_nan=True)
    assert (a["tick_gap"][:, -1] == 0).all() and (a["second_gap"] <= 0).any()
    for k in range(2):
        serial = np.flatnonzero(table.instrument == k)
        mine = rows[table.instrument[rows] == k]
        assert (np.diff(np.searchsorted(serial, mine)) == np.diff(np.searchsorted(serial, mine))[0]).all()  # evenly
    with_end = np.isfinite(a["move"][:, H])
    assert with_end.mean() > 0.9 and np.abs(a["ahead"][with_end] + a["move"][with_end, H]).max() <= 1 + 1e-3


def test_labels_known_too_late_teach_nothing(block):
    study = study_of(block)
    z = gather([block]).sample()
    split = study.split._replace(embargo=SECOND)
    lessons = transformer_lessons.Lessons.of(study._replace(split=split), z)
    for h in study.usable:
        fit_, calibration = (r[lessons.y[r, h] >= 0] for r in (lessons.fit, lessons.calibration))
        assert len(fit_) and len(calibration)
        assert (z["known_at"][fit_, h] <= split.calibrate - SECOND).all() and (z["known_at"][calibration, h] <= split.weigh - SECOND).all()
        assert (z["ts"][calibration] >= split.calibrate).all()
        assert np.isnan(lessons.later[z["known_at"][:, H + h] > split.weigh - SECOND, h]).all()
    assert (lessons.y[:, 3] == -1).all()  # not usable


def test_exchanging_bid_and_ask_twice_changes_nothing():
    swap, sign = Mirror.of(tuple(COLUMNS))
    x = np.arange(1.0, len(COLUMNS) + 1)
    once = x[swap] * sign
    assert not np.array_equal(once, x) and np.array_equal(once[swap] * sign, x)
    assert [c for c, to in COLUMNS.items() if to not in ("", "-")] == ["queue_bid", "queue_ask"]


def test_a_mirrored_window_is_the_window_of_the_mirrored_market(block):
    piece = cut(block, [3_000])[0]
    rows = piece.rows.copy()
    rows[:, 2], rows[:, 5], rows[:, 6] = -rows[:, 2], -rows[:, 5], -rows[:, 6]
    rows[:, [3, 4]] = rows[:, [4, 3]]
    a, b = gather([piece]).sample(), gather([piece._replace(rows=rows)]).sample()
    n, c = len(a["ts"]), 7
    rng = np.random.default_rng(0)
    own = rng.normal(size=(2, c)), rng.uniform(1, 2, (2, c)), tuple(c for c in COLUMNS if c in NAMES)
    one, two = Data(a, *own).batch(np.arange(n), "cpu", np.ones(n, np.bool_)), Data(b, *own).batch(np.arange(n), "cpu")
    assert all(np.array_equal(x, y, equal_nan=True) for x, y in zip(one.values, two.values))


@pytest.mark.parametrize("kind", ["one class", "constant inputs", "nothing but NaN", "a single instrument", "heavy tails"])
def test_poor_data_gives_sound_votes(kind):
    n = 1 if kind == "a single instrument" else 2
    block = market(4, seconds=90, n=n)
    rows = block.rows
    if kind == "one class":
        rows[:, 0] = 100.0
    elif kind == "constant inputs":
        rows[:, 1:] = 1.0
    elif kind == "nothing but NaN":
        rows[:, 1:] = np.nan
    elif kind == "heavy tails":
        rows[:, 1:] = np.random.default_rng(0).standard_cauchy(rows[:, 1:].shape) ** 5
    me = fit(block, dataclasses.replace(SMALL, epochs=2), n=n)
    votes = me.predict(block, me.new_state())
    assert all(np.isfinite(a).all() for a in me.weights.values()) and all(np.isfinite(a).all() for a in me.lines)
    if kind == "nothing but NaN":
        assert np.isnan(votes.proba).all()
        return
    assert np.allclose(votes.proba[:, :3].sum(axis=2), 1) and (votes.magnitude[:, :3] >= 0).all()
    if kind == "one class":
        assert votes.proba[:, :3, 1].min() > 0.9


def test_too_little_is_told(block):
    with pytest.raises(InputError, match="windows with labels"):
        fit(cut(block, [400])[0])
    with pytest.raises(InputError, match="none of its columns"):
        Transformer.gatherer(instruments(1), ("mid", "colour"))
    with pytest.raises(InputError, match="width"):
        Config(width=30)
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="CUDA"):
            fit(block, dataclasses.replace(SMALL, device="cuda"))


def test_a_device_out_of_memory_takes_fewer_windows_at_once_and_learns_the_same(block, monkeypatch, capsys):
    import torch

    config, network = dataclasses.replace(SMALL, epochs=1, dropout=0.0), transformer_train.network

    def small(w, batch, heads, dropout=0.0):
        if torch.is_grad_enabled() and len(batch.instrument) > 40:
            raise torch.OutOfMemoryError("a device of 40 windows")
        return network(w, batch, heads, dropout)

    usual = fit(block, config)
    monkeypatch.setattr(transformer_train, "network", small)
    cramped = fit(block, config)
    assert "32 windows at once" in capsys.readouterr().err
    assert np.allclose(cramped.losses, usual.losses, rtol=1e-4)


def test_windows_of_the_whole_stream_fit_in_their_bounds():
    for steps, name in zip((TICKS, SECONDS, MINUTES), FRAMES):
        assert steps % (4 * PATCH) == 0, name  # the kernel takes four tokens at a time
