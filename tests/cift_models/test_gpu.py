"""Serving on a device, as far as a CPU can show it: the same answers in any number of rows, without a graph, and with less memory."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from test_transformer import OUT, H, equal, market, random_member, raw_of

from catalog.errors import InputError
from cift_models import transformer
from cift_models.gpu import LEAST, device_named
from cift_models.transformer import windows

torch = pytest.importorskip("torch")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="module")
def asked():
    """A member, the inputs of its network at each decision of a market, and what the numba kernel answers."""
    me = random_member(3)
    raw, views, _, k = raw_of(me, market(1, seconds=120, rate=6))
    assert len(raw) > 100
    return me, (*windows(views), k), raw.reshape(len(raw), H * OUT)


def close(a, b) -> bool:
    return np.abs(a - b).max() < 1e-5 * np.abs(b).max()


def test_the_network_on_a_device_is_the_kernel_that_serves_on_a_cpu(asked):
    me, inputs, want = asked
    assert close(me.served("cpu")(*inputs), want)


def test_how_many_are_asked_for_at_once_changes_no_more_than_the_last_digits(asked):
    me, inputs, _ = asked
    on = me.served("cpu", rows=16)
    whole = on(*inputs)
    single = np.concatenate([on(*(x[i : i + 1] for x in inputs)) for i in range(40)])
    assert close(whole[:40], single) and np.array_equal(whole, on(*inputs))


def test_a_member_moved_to_a_device_votes_the_same_in_any_cut(asked):
    me = random_member(3)
    block = market(2, seconds=100, rate=6)
    kernel = me.predict(block, me.new_state())
    me._served = me.served("cpu", rows=16)
    votes, state = me.predict(block, me.new_state()), me.new_state()
    assert np.allclose(votes.proba, kernel.proba, atol=1e-4, equal_nan=True)
    edge = int(block.closes[33]) + 1
    parts = [block._replace(events=block.events[:edge], rows=block.rows[:edge], closes=block.closes[:34]),
             block._replace(events=block.events[edge:], rows=block.rows[edge:], closes=block.closes[34:] - edge)]  # fmt: skip
    cut = [me.predict(p, state) for p in parts]
    assert all(np.allclose(a, np.concatenate(b), atol=1e-5, equal_nan=True) for a, b in zip(votes, zip(*cut)))
    me.to("cpu")
    assert equal(me.predict(block, me.new_state()), kernel)


def test_out_of_memory_it_takes_fewer_rows_says_so_and_answers_all_the_same(asked, monkeypatch, caplog):
    me, inputs, want = asked
    network, most = transformer.network, 16

    def small(w, batch, heads):
        if len(batch.instrument) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return network(w, batch, heads)

    monkeypatch.setattr(transformer, "network", small)
    on = me.served("cpu", rows=64)
    with caplog.at_level(logging.WARNING):
        assert close(on(*inputs), want)
    assert on.rows == 16 and [r.getMessage() for r in caplog.records] == [
        f"transformer: the device is out of memory, {n} decisions at once from now on" for n in (32, 16)
    ]
    most = LEAST - 1
    with pytest.raises(torch.OutOfMemoryError):
        on(*inputs)


@NO_GPU
def test_where_no_graph_can_be_captured_it_runs_without_one_and_says_so_once(asked, caplog):
    me, inputs, want = asked
    on = me.served("cpu")
    on.graphs = True
    with caplog.at_level(logging.WARNING):
        assert close(on(*inputs), want) and close(on(*inputs), want)
    assert on.graph is None and len([r for r in caplog.records if "no CUDA graph" in r.getMessage()]) == 1


@NO_GPU
def test_a_gpu_that_is_not_there_is_named_and_auto_does_without():
    assert device_named("cpu") == device_named("auto") == "cpu"
    with pytest.raises(InputError, match="no GPU"):
        device_named("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_graph_answers_as_the_kernel_does(asked):
    me, inputs, want = asked
    on = me.served("cuda", rows=16)
    whole = on(*inputs)
    assert on.graph is not None and np.abs(whole - want).max() < 1e-4 * np.abs(want).max()
    assert np.allclose(whole[:5], np.concatenate([on(*(x[i : i + 1] for x in inputs)) for i in range(5)]), atol=1e-5)
