"""Unfinished work on disk: the steps of a long computation that are done, so that the same command goes on where it was cut short.

:func:`unfinished` gives the :class:`Work` folder `<out>.work` beside an output. A step is a folder made beside its place and renamed when
whole, so a process may be killed at any moment. The folder tells which command, data and code it belongs to. Objects are packed as JSON
and raw arrays and are made again only from classes of this project or of named modules: nothing is unpickled.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import importlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np

from catalog.errors import InputError
from catalog.whole import replacing, sha256_of

PACKAGES: Final = ("catalog", "cift_models")
LIBRARIES: Final = ("numpy", "numba", "torch", "xgboost", "scikit-learn", "scipy", "hmmlearn")
KEY: Final = "work.json"


class Work:
    """A folder of finished steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def step(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder of step `name`; `make` fills it unless it is there."""
        place = self.folder / name
        if not place.is_dir():
            with replacing(place) as part:
                make(part)
        return place

    def done(self) -> list[str]:
        return sorted(p.name for p in self.folder.iterdir() if p.is_dir() and not p.name.startswith(".") and not p.name.endswith(".open"))


@contextmanager
def unfinished(out: Path, key: Mapping[str, Mapping[str, Any]] | None) -> Iterator[Work]:
    """The work folder of `out`, removed once all went well or the input proved wrong; kept where the process was interrupted.

    `key` has the parts "command", "data" and "code". Work of another command is refused (InputError), as is a folder in which another
    process is at work; work on other data or by other code cannot be finished any more and is begun anew, which is said. `key` None: the
    work cannot be recognised again, and lies in a temporary folder.
    """
    if key is None:
        with tempfile.TemporaryDirectory(prefix="cift-") as temporary:
            yield Work(Path(temporary))
        return
    out = out.resolve()
    folder = out.with_name(out.name + ".work")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / KEY).is_file()):
        raise InputError(f"{folder} is where unfinished work is kept, and holds something else: remove it, or choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is at work in {folder}: wait for it, or choose another --out") from None
        work = Work(folder)
        _recognise(work, json.loads(json.dumps(key)))
        try:
            yield work
        except KeyboardInterrupt:
            print(f"what is done is kept in {folder}; the same command goes on from there", file=sys.stderr)
            raise
        except InputError:
            shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def _recognise(work: Work, key: Mapping[str, Mapping[str, Any]]) -> None:
    place = work.folder / KEY
    try:
        found = json.loads(place.read_text()) if place.is_file() else {}
        was, now = found.get("command", {}), key["command"]
    except (ValueError, AttributeError):
        raise InputError(f"{place} is damaged: remove {work.folder}; the work then begins anew") from None
    if found and was != now:
        told = "; ".join(_differences(was, now))
        raise InputError(f"{work.folder} holds unfinished work of another command ({told}): finish that one first, or remove the folder")
    if found == key:
        if done := work.done():
            print(f"going on in {work.folder}: {len(done)} steps are done, up to {max(done, key=lambda d: _age(work, d))}", file=sys.stderr)
        return
    if found:
        other = " and ".join(what for what in ("data", "code") if found.get(what) != key[what])
        print(f"{work.folder} holds work on other {other}, which cannot be finished any more: it is begun anew", file=sys.stderr)
    for p in work.folder.iterdir():
        if p.is_dir():
            shutil.rmtree(p)
    part = place.with_suffix(".part")
    part.write_text(json.dumps(key, indent=1) + "\n")
    part.replace(place)


def _differences(was: Any, now: Any, name: str = "") -> Iterator[str]:
    if isinstance(was, dict) and isinstance(now, dict):
        for k in sorted({*was, *now}):
            if was.get(k) != now.get(k):
                yield from _differences(was.get(k), now.get(k), f"{name} {k}".lstrip())
    else:
        yield f"{name} was {was} and is now {now}"


def _age(work: Work, step: str) -> int:
    return (work.folder / step).stat().st_mtime_ns


def code_key(paths: Sequence[str] = ()) -> dict[str, str]:
    """What computes: a digest of this project's sources, of the modules of "module:Class" `paths`, and the versions of libraries."""
    root = Path(__file__).resolve().parents[1]
    files = [f for package in PACKAGES for f in sorted((root / package).glob("*.py"))]
    for path in paths:
        found = getattr(importlib.import_module(path.partition(":")[0]), "__file__", None)
        files += [Path(found)] if found else []
    return {"sources": sha256_of(files), "python": sys.version.split()[0], **{name: version(name) for name in LIBRARIES}}


def sources_of(module: str, apart: Collection[str] = ()) -> list[Path]:
    """Files of the package of `module` that it runs on: its own and those that it imports, anywhere in the code and at any depth. Modules
    `apart` are left out, and with them what they alone import."""
    package, root = module.partition(".")[0], Path(__file__).resolve().parents[1]
    found, todo = set[Path](), [module]
    while todo:
        name = todo.pop()
        path = root.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_name(f"{path.name}.py")
        if name in apart or path in found or not path.is_file():  # the last: a name within a module
            continue
        found.add(path)
        todo += filter(None, [name.rpartition(".")[0]])  # the package is run before its module
        nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
        while nodes:
            node = nodes.pop()
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                continue
            if isinstance(node, ast.ImportFrom) and node.module:
                todo += [x for x in (node.module, *(f"{node.module}.{a.name}" for a in node.names)) if x.partition(".")[0] == package]
            elif isinstance(node, ast.Import):
                todo += [a.name for a in node.names if a.name.partition(".")[0] == package]
            nodes += ast.iter_child_nodes(node)
    return sorted(found)


def data_key(root: str | Path) -> dict[str, Any]:
    """What is read: a digest of names, sizes and times of change of the files of a catalog."""
    files = [(f.relative_to(root).as_posix(), f.stat()) for f in sorted(Path(root).rglob("*")) if f.is_file()]
    listed = [(name, s.st_size, s.st_mtime_ns) for name, s in files]
    return {"files": len(files), "digest": hashlib.sha256(json.dumps(listed).encode()).hexdigest()}


def pack(value: Any, folder: Path, modules: Sequence[str] = ()) -> None:
    """Write numbers, texts, arrays, lists, dicts and objects made of these into `folder`. Raises TypeError where something else is in it.

    An object, of a class of this project or of the named `modules`, is taken for what its class and its fields say; one that is there
    twice is written, and read, twice.
    """
    arrays: list[list[Any]] = []
    with (folder / "arrays.bin").open("wb") as f:

        def tell(x: Any) -> Any:
            if x is None or type(x) in (bool, int, float, str):
                return x
            if isinstance(x, np.ndarray | np.generic):
                a = np.asarray(x)
                if a.dtype.hasobject:
                    raise TypeError("an array of objects")
                arrays.append([np.lib.format.dtype_to_descr(a.dtype), list(a.shape), f.tell()])
                f.write(np.ascontiguousarray(a).tobytes())
                return {"scalar" if isinstance(x, np.generic) else "array": len(arrays) - 1}
            if type(x) in (list, tuple, set):
                return {type(x).__name__: [tell(v) for v in x]}
            if type(x) is dict:
                return {"dict": [[tell(k), tell(v)] for k, v in x.items()]}
            if isinstance(x, type) and issubclass(x, np.generic):
                return {"kind": np.dtype(x).str}
            kind = type(x)
            if isinstance(x, type) or "<locals>" in kind.__qualname__ or not _ours(kind.__module__, modules):
                raise TypeError(f"a {kind.__qualname__}")
            fields = dict(zip(getattr(kind, "_fields", ()), x)) if isinstance(x, tuple) else _fields(x)
            return {"object": f"{kind.__module__}:{kind.__qualname__}", "of": [[k, tell(v)] for k, v in fields.items()]}

        tree = tell(value)
    (folder / "tree.json").write_text(json.dumps({"arrays": arrays, "tree": tree}))


def _fields(x: Any) -> dict[str, Any]:
    names = [n for c in type(x).__mro__ for n in getattr(c, "__slots__", ()) if hasattr(x, n)]
    return {**{n: getattr(x, n) for n in names}, **getattr(x, "__dict__", {})}


def unpack(folder: Path, modules: Sequence[str] = ()) -> Any:
    """What :func:`pack` wrote. Raises ValueError for an object of a class that is neither of this project nor of the named `modules`."""
    told = json.loads((folder / "tree.json").read_text())
    data = np.fromfile(folder / "arrays.bin", np.uint8)

    def array(i: int) -> Any:
        descr, shape, at = told["arrays"][i]
        dtype = np.dtype(descr if isinstance(descr, str) else [tuple(d) for d in descr])
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return data[at : at + size].copy().view(dtype).reshape(shape)

    def make(x: Any) -> Any:
        if not isinstance(x, dict):
            return x
        if "object" in x:
            return _object(x["object"], {k: make(v) for k, v in x["of"]}, modules)
        (kind, of), = x.items()
        if kind == "array":
            return array(of)
        if kind == "scalar":
            return array(of)[()]
        if kind == "kind":
            return np.dtype(of).type
        if kind == "dict":
            return {make(k): make(v) for k, v in of}
        return {"list": list, "tuple": tuple, "set": set}[kind](make(v) for v in of)

    return make(told["tree"])


def _ours(module: str, modules: Sequence[str]) -> bool:
    return module.partition(".")[0] in PACKAGES or module in modules


def _object(path: str, fields: dict[str, Any], modules: Sequence[str]) -> Any:
    module, _, name = path.partition(":")
    if not _ours(module, modules):
        raise ValueError(f"{path} is no class of this project")
    kind: Any = importlib.import_module(module)
    for part in name.split("."):
        kind = getattr(kind, part)
    if not isinstance(kind, type):
        raise ValueError(f"{path} is no class")
    if issubclass(kind, tuple):
        return kind(**fields)
    made = object.__new__(kind)
    for k, v in fields.items():
        object.__setattr__(made, k, v)
    return made


__all__ = ["Work", "code_key", "data_key", "pack", "sources_of", "unfinished", "unpack"]
