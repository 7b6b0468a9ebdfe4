"""Unfinished work on disk: what was gathered comes back as it was, and nothing is made from it but what this project knows."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
from test_members import equal, gathered, unseen, votes

from catalog.errors import InputError
from catalog.events import EVENT
from cift_models.ensemble import available, member_class
from cift_models.labels import walk_forward
from cift_models.train import study
from cift_models.work import code_key, data_key, pack, sources_of, unfinished, unpack

KEY = {"command": {"seed": 1}, "data": {"digest": "a"}, "code": {"sources": "b"}}


class Pair(NamedTuple):
    left: object
    right: object


@dataclass(frozen=True, slots=True)
class Fixed:
    a: object
    b: object = None


class Loose:
    def __init__(self, x):
        self.x = x


def back(value, folder, modules=(__name__,)):
    pack(value, folder, modules)
    return unpack(folder, modules)


def test_arrays_texts_numbers_and_objects_come_back_as_they_were(tmp_path):
    events = np.zeros(3, EVENT)
    events["price"] = [1, -2, 3]
    value = {
        "events": events, 7: [1, 2.5, None, True, "x", float("inf")], "none": np.empty((0, 4), np.float32), "scalar": np.float32(0.1),
        "pair": Pair(np.arange(6).reshape(2, 3)[:, ::-1], (1, {2})), "fixed": Fixed(np.array([True, False]), np.datetime64(5, "ns")),
        "loose": Loose([np.int8]), "zero": np.array(3.0),
    }  # fmt: skip
    got = back(value, tmp_path)
    assert got.keys() == value.keys() and got["events"].dtype == EVENT and np.array_equal(got["events"], events) and got[7] == value[7]
    assert got["none"].shape == (0, 4) and type(got["scalar"]) is np.float32 and got["scalar"] == np.float32(0.1)
    assert type(got["pair"]) is Pair and np.array_equal(got["pair"].left, value["pair"].left) and got["pair"].right == (1, {2})
    assert type(got["fixed"]) is Fixed and got["fixed"].a.tolist() == [True, False] and got["fixed"].b == value["fixed"].b
    assert got["loose"].x == [np.int8] and got["zero"].shape == () and got["events"].flags.writeable
    assert np.isnan(back(float("nan"), tmp_path))


@pytest.mark.parametrize("odd", [len, lambda: 0, deque([1]), object(), np.array([None]), open], ids=str)
def test_what_cannot_be_kept_is_said(odd, tmp_path):
    with pytest.raises(TypeError):
        pack([1, {"x": Loose(odd)}], tmp_path, [__name__])


@pytest.mark.parametrize("path", ["os:system", "subprocess:Popen", "builtins:eval", "cift_models.work:pack", "numpy:ndarray"])
def test_nothing_foreign_is_made(path, tmp_path):
    pack(1, tmp_path)
    (tmp_path / "tree.json").write_text(json.dumps({"arrays": [], "tree": {"object": path, "of": [["args", "true"]]}}))
    with pytest.raises(ValueError, match="is no class"):
        unpack(tmp_path)


@pytest.mark.parametrize("name", available())
def test_what_a_member_gathered_is_kept_whole(name, tmp_path):
    found = gathered().own[name]
    one, two = tmp_path / "1", tmp_path / "2"
    for place in (one, two):
        place.mkdir()
    pack(back(found, one, ()), two)
    assert all((one / f).read_bytes() == (two / f).read_bytes() for f in ("tree.json", "arrays.bin"))


@pytest.mark.parametrize("name", ["hawkes", "hmm"])
def test_what_was_kept_teaches_the_same(name, tmp_path):
    found = gathered()
    again = back(found.own[name], tmp_path, ())
    what, _ = study(found, walk_forward(found.table.ts)[0], 0)
    cls = member_class(available()[name])
    a, b = (cls.fit(what, own) for own in (found.own[name], again))
    assert equal(votes(a, [unseen()]), votes(b, [unseen()]))


def test_steps_that_are_done_are_found_again(tmp_path):
    made = []

    def run(until):
        with unfinished(tmp_path / "a", KEY) as work:
            for k in range(5):
                if k == until:
                    raise KeyboardInterrupt
                place = work.step(f"step-{k}", lambda part, k=k: (made.append(k), (part / "x").write_text(str(k))))
                assert (place / "x").read_text() == str(k)

    for until in (2, 0, 4):
        with pytest.raises(KeyboardInterrupt):
            run(until)
    run(9)
    assert made == [0, 1, 2, 3, 4] and not list(tmp_path.iterdir())


def test_a_step_that_fails_leaves_nothing_that_looks_done(tmp_path):
    def fails(part):
        (part / "half").write_text("...")
        raise RuntimeError

    with pytest.raises(RuntimeError), unfinished(tmp_path / "a", KEY) as work:
        work.step("s", fails)
    with unfinished(tmp_path / "a", KEY) as work:
        assert work.done() == [] and list(work.step("s", lambda part: None).iterdir()) == []


def test_two_at_once_do_not_share_a_folder_and_other_things_are_not_touched(tmp_path):
    other = unfinished(tmp_path / "a", KEY)
    with unfinished(tmp_path / "a", KEY), pytest.raises(InputError, match="another process is at work"), other:
        pass
    (tmp_path / "b.work").mkdir()
    (tmp_path / "b.work" / "thesis.tex").write_text("...")
    with pytest.raises(InputError, match="holds something else"), unfinished(tmp_path / "b", KEY):
        pass
    assert (tmp_path / "b.work" / "thesis.tex").is_file()


def test_the_key_follows_what_is_read_and_what_computes(tmp_path):
    (tmp_path / "x").write_text("1")
    before = data_key(tmp_path)
    assert before == data_key(tmp_path)
    (tmp_path / "y").write_text("1")
    assert data_key(tmp_path) != before
    assert code_key() == code_key() != code_key([f"{__name__}:Pair"])


def test_sources_of_a_module_are_what_it_imports_anywhere_but_for_what_stands_apart():
    names = {p.stem for p in sources_of("cift_models.hmm")}
    assert {"hmm", "hmm_chain", "windows", "__init__"} <= names and not names & {"gnn", "transformer", "events"}
    assert "hmm" in {p.stem for p in sources_of("cift_models.train")}  # by way of functions that import it
    assert "hmm_chain" not in {p.stem for p in sources_of("cift_models.hmm", {"cift_models.hmm_chain"})}
