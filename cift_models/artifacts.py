"""Trained models on disk: a folder that is whole or refused, and from which nothing is unpickled.

`manifest.json` names the format, the feature list, the horizons, the training range, the code version, the seed, the members and the
SHA-256 of every other file; it is written in one canonical form and carries its own SHA-256, so a changed byte anywhere is noticed.
The other files are XGBoost's own JSON, npz without objects, and safetensors. Written in a sibling folder and renamed when whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from catalog.errors import InputError
from catalog.whole import replacing, sha256

FORMAT: Final = 6
KEYS: Final = ("format", "code", "features", "instruments", "horizons_ns", "range", "seed", "members", "latency", "files", "sha256")


class Artifact(NamedTuple):
    """A verified folder. `version` is short and follows from every byte in it."""

    path: Path
    manifest: dict[str, Any]
    version: str


def code_version() -> str:
    """The project's version, as in pyproject.toml."""
    with (Path(__file__).parents[1] / "pyproject.toml").open("rb") as f:
        return str(tomllib.load(f)["project"]["version"])


def _text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=1, sort_keys=True) + "\n"


def _own_sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(_text({k: v for k, v in manifest.items() if k != "sha256"}).encode()).hexdigest()


def writable(out: Path) -> None:
    """Raises InputError where `out` is something other than an artifact, an empty folder or nothing: it would be replaced."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / "manifest.json").is_file()):
        raise InputError(f"{out} exists and holds no trained models: choose another --out, or remove it")


def write(out: str | Path, manifest: dict[str, Any], save: Callable[[Path], None]) -> Artifact:
    """Let `save` fill a fresh folder, complete the manifest with format, code version and hashes, and put it in the place of `out`."""
    out = Path(out)
    writable(out)
    with replacing(out) as part:
        save(part)
        files = {f.relative_to(part).as_posix(): sha256(f) for f in sorted(part.rglob("*")) if f.is_file()}
        whole = {**manifest, "format": FORMAT, "code": code_version(), "files": files}
        whole["sha256"] = _own_sha256(json.loads(_text(whole)))
        (part / "manifest.json").write_text(_text(whole))
    return Artifact(out, json.loads(_text(whole)), whole["sha256"][:12])


def put(made: Path, out: Path) -> None:
    """The artifact folder `made`, byte for byte, in the place of `out`: whoever loads that gets the old one or the new one, whole."""
    writable(out)
    with replacing(out) as part:
        shutil.copytree(made, part, dirs_exist_ok=True)


def steady[T](path: str | Path, load: Callable[[], T]) -> T:
    """What `load` makes of the artifact folder `path`; where another artifact has taken its place meanwhile, it is loaded again.

    So that whoever loads while a training ends gets the old one or the new one, and never a part of each. Raises what `load` raises.
    """
    place = Path(path) / "manifest.json"

    def which() -> tuple[int, int] | None:
        try:
            told = place.stat()
        except OSError:
            return None
        return told.st_ino, told.st_ctime_ns

    while True:
        before = which()
        try:
            made = load()
        except (InputError, OSError, ValueError, KeyError):
            if which() == before:
                raise
            continue
        if which() == before:
            return made


def read(path: str | Path, features: Sequence[str] | None = None) -> Artifact:
    """Verify every byte of an artifact folder. Raises InputError that names the file and the fault.

    `features`: the names of the running code; another list in the manifest is refused.
    """
    try:
        return _verified(Path(path), features)
    except OSError as e:  # a name that no file can have, a folder that may not be read
        raise InputError(f"{str(path)[:200]} cannot be read as trained models ({e.strerror}): name another folder, or its rights") from None


def _verified(path: Path, features: Sequence[str] | None) -> Artifact:
    place = path / "manifest.json"
    if not place.is_file():
        raise InputError(f"{place} is missing: {path} holds no trained models; train with `python -m cift_models train --out {path}`")
    try:
        raw = place.read_text()
        manifest = json.loads(raw)
        version = manifest["format"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{place} is damaged: train again, or fetch an unchanged copy") from None
    if version != FORMAT:
        raise InputError(f"{place} is of format {version}, this code reads format {FORMAT}: train again with this code")
    if [k for k in KEYS if k not in manifest] or raw != _text(manifest) or manifest["sha256"] != _own_sha256(manifest):
        raise InputError(f"{place} was changed after it was written: train again, or fetch an unchanged copy")
    if manifest["code"].split(".")[:2] != code_version().split(".")[:2]:
        raise InputError(f"{place} was written by version {manifest['code']}, this is {code_version()}: train again")
    for name, sha in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise InputError(f"{file} is missing: train again, or fetch a whole copy")
        if sha256(file) != sha:
            raise InputError(f"{file} was changed after it was written: train again, or fetch an unchanged copy")
    extra = sorted(f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file() and f.name != "manifest.json")
    if unknown := [f for f in extra if f not in manifest["files"]]:
        raise InputError(f"{path / unknown[0]} does not belong to the trained models (not in manifest.json): remove it")
    if features is not None and list(features) != manifest["features"]:
        odd = sorted(set(features) ^ set(manifest["features"])) or ["another order"]
        raise InputError(f"{place} was trained on another feature list ({', '.join(odd[:5])}): train again with this code")
    return Artifact(path, manifest, manifest["sha256"][:12])
