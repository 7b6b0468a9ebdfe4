"""Artifacts: every byte is vouched for, what is wrong is refused by name, and nothing half-written is taken for whole."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from test_inference import INSTRUMENTS, artifact  # noqa: F401

from catalog.errors import InputError
from cift_models import artifacts
from cift_models.features import NAMES
from cift_models.inference import Engine


def manifest(**more):
    return {
        "features": ["a", "b"], "instruments": ["A.X"], "horizons_ns": [1], "range": {"start": 0, "end": 1, "decisions": 2}, "seed": 0,
        "members": {}, "latency": {"source": "default-1", "q": [0.0, 1.0], "ns": [1, 2]}, **more,
    }  # fmt: skip


def save(folder):
    np.savez(folder / "x.npz", a=np.arange(3.0))
    (folder / "model.json").write_text("{}")
    (folder / "weights.safetensors").write_bytes(b"\x08" + bytes(64))


@pytest.fixture
def small(tmp_path):
    return artifacts.write(tmp_path / "models", manifest(), save).path


def test_what_was_written_is_read(small):
    found = artifacts.read(small, ["a", "b"])
    assert found.manifest["files"].keys() == {"x.npz", "model.json", "weights.safetensors"}
    assert found.manifest["code"] == artifacts.code_version() and len(found.version) == 12


@pytest.mark.parametrize("name", ["x.npz", "model.json", "weights.safetensors", "manifest.json"])
def test_a_changed_byte_in_any_file_is_refused_by_name(small, name):
    whole = (small / name).read_bytes()
    for at in sorted({0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 2, len(whole) - 1}):
        (small / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(InputError, match=name):
            artifacts.read(small)
    for other in (whole + b"\n", whole[:-1], b""):
        (small / name).write_bytes(other)
        with pytest.raises(InputError, match=name):
            artifacts.read(small)
    (small / name).write_bytes(whole)
    artifacts.read(small)


def test_every_byte_of_the_manifest_counts(small):
    place = small / "manifest.json"
    whole = place.read_bytes()
    for at in range(len(whole)):
        place.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(InputError, match=r"manifest\.json"):
            artifacts.read(small)


@pytest.mark.parametrize("name", ["x.npz", "model.json", "manifest.json"])
def test_a_missing_file_is_refused_by_name(small, name):
    (small / name).unlink()
    with pytest.raises(InputError, match=f"{name}.*missing"):
        artifacts.read(small)


def test_a_file_that_does_not_belong_is_refused(small):
    (small / "more.npz").write_bytes(b"x")
    with pytest.raises(InputError, match=r"more\.npz does not belong"):
        artifacts.read(small)


def rewrite(folder, **changes):
    place = folder / "manifest.json"
    m = {**json.loads(place.read_text()), **changes}
    m["sha256"] = artifacts._own_sha256(m)
    place.write_text(artifacts._text(m))


def test_another_feature_list_format_or_version_is_refused(small):
    with pytest.raises(InputError, match=r"manifest\.json.*feature list \(c\)"):
        artifacts.read(small, ["a", "b", "c"])
    with pytest.raises(InputError, match="another order"):
        artifacts.read(small, ["b", "a"])
    rewrite(small, code="99.0.0")
    with pytest.raises(InputError, match=r"version 99\.0\.0"):
        artifacts.read(small)
    rewrite(small, format=99)
    with pytest.raises(InputError, match="format 99"):
        artifacts.read(small)


def test_a_folder_without_models_or_with_something_else_is_told_apart(tmp_path):
    with pytest.raises(InputError, match=r"manifest\.json is missing"):
        artifacts.read(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"cannot be read as trained models \(File name too long\)"):
        artifacts.read(tmp_path / ("0" * 300))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no trained models"):
        artifacts.write(tmp_path, manifest(), save)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_what_was_there(small, error):
    before = artifacts.read(small).version

    def fails(folder):
        save(folder)
        raise error

    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        artifacts.write(small, manifest(seed=1), fails)
    assert artifacts.read(small).version == before
    assert [p.name for p in small.parent.iterdir()] == [small.name]


def test_writing_again_replaces_the_whole(small):
    before = artifacts.read(small).version
    again = artifacts.write(small, manifest(seed=1), lambda f: (f / "one.json").write_text("{}"))
    assert artifacts.read(small).manifest["files"].keys() == {"one.json"} and again.version != before
    assert [p.name for p in small.parent.iterdir()] == [small.name]


def test_the_same_content_has_the_same_version(tmp_path):
    a, b = (artifacts.write(tmp_path / n, manifest(), lambda f: (f / "one.json").write_text("{}")) for n in "ab")
    assert a.version == b.version


def test_a_trained_artifact_holds_no_pickle_and_every_file_of_it_is_guarded(artifact, tmp_path):  # noqa: F811
    names = sorted(p.name for p in artifact.iterdir())
    assert {p.suffix for p in artifact.iterdir()} <= {".json", ".npz", ".safetensors"}
    assert {"manifest.json", "ensemble.npz", "hmm.npz", "fusion.npz", "labels.npz", "baselines.npz"} <= set(names)
    for p in artifact.glob("*.npz"):
        with np.load(p, allow_pickle=False) as z:
            assert all(z[k].dtype != object for k in z.files)
    for name in names:
        copy = tmp_path / name
        shutil.copytree(artifact, copy)
        raw = bytearray((copy / name).read_bytes())
        raw[len(raw) // 2] ^= 1
        (copy / name).write_bytes(raw)
        with pytest.raises(InputError, match=name):
            Engine.load(copy, INSTRUMENTS)


def test_an_artifact_never_decides_what_code_is_imported(artifact, tmp_path):  # noqa: F811
    copy = tmp_path / "a"
    shutil.copytree(artifact, copy)
    rewrite(copy, members={"hmm": "os:system"})
    with pytest.raises(InputError, match="os:system: allow it by name"):
        Engine.load(copy, INSTRUMENTS)
    assert list(NAMES) == artifacts.read(artifact).manifest["features"]
