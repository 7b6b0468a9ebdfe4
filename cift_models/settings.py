"""What the user may set about training and the models: tables of a TOML file, each handed to the `Config` of the part it names.

`[train]` is :class:`train.Config`, `[ensemble]` is :class:`ensemble.Config`, `[transformer]` and so on is the `Config` in the member's
module; a member of the user's own may have one as well. Tables and keys that nothing reads, wrong types and numbers below zero
are InputErrors that name the place. A `Config` is a frozen dataclass or a pydantic model; its `fit`, and its `gatherer` where that
takes one, get it as `config`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from catalog.errors import InputError, continued, toml
from cift_models.ensemble import member_class

Tables = Mapping[str, Mapping[str, Any]]


def read(path: str | Path) -> dict[str, dict[str, Any]]:
    """The tables of a TOML file. Raises InputError where it cannot be read or holds anything but tables."""
    found = toml(Path(path))
    if loose := [k for k, v in found.items() if not isinstance(v, dict)]:
        raise InputError(f"{path}: {loose[0]} stands in no table: put it under [train], or under the name of a member")
    return found


def config_class(path: str) -> type[Any] | None:
    """The `Config` of the member at "package.module:Class", if its `fit` takes one."""
    member = member_class(path)
    takes = "config" in inspect.signature(member.fit).parameters
    return getattr(sys.modules[member.__module__], "Config", None) if takes else None


def of_members(tables: Tables, chosen: Mapping[str, str]) -> dict[str, Any]:
    """Name -> its `Config`, for each of the `chosen` (name -> import path) that takes one. Raises InputError for a table of none."""
    kinds = {name: config_class(path) for name, path in chosen.items()}
    if odd := [t for t in tables if kinds.get(t) is None]:
        there = ", ".join(name for name, kind in kinds.items() if kind is not None)
        raise InputError(f"[{odd[0]}] is for no member that is trained: choose among {there}")
    return {name: checked(kind, tables.get(name, {}), f"[{name}]") for name, kind in kinds.items() if kind is not None}


def checked(kind: type[Any], table: Mapping[str, Any], where: str) -> Any:
    """An instance of the config class `kind` from a table. Raises InputError naming `where` and the key."""
    model = kind if issubclass(kind, BaseModel) else _model(kind)
    try:
        given = model.model_validate_json(json.dumps(dict(table)), strict=True)
        return given if isinstance(given, kind) else kind(**{k.removesuffix("_"): getattr(given, k) for k in given.model_fields_set})
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(str(k) for k in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(f.alias or k for k, f in model.model_fields.items())
            raise InputError(f"{where} {key} is no setting: choose among {known}") from None
        raise InputError(f"{where} {key}: {continued(first['msg'])}") from None
    except TypeError as e:
        raise InputError(f"{where} holds what is neither text, number, truth value nor list: {e}") from None
    except InputError as e:
        raise InputError(f"{where} {e}") from None


def _model(kind: type[Any]) -> type[BaseModel]:
    """A pydantic model with the fields of a dataclass. Those that hold objects are left out; numbers are finite, none is below zero, and
    whole ones are above it, unless their annotation says otherwise."""
    hints, fields = get_type_hints(kind, include_extras=True), dict[str, Any]()
    for f in dataclasses.fields(kind):
        hint = hints[f.name]
        if hint in (int, float):
            least = 1 if hint is int and f.default != 0 else 0
            hint = Annotated[hint, Field(ge=least, allow_inf_nan=False)] if hint is float else Annotated[hint, Field(ge=least)]
        if f.default is not None:
            fields[f"{f.name}_"] = (hint, Field(f.default, alias=f.name))  # the bare name might be one of pydantic's own
    return create_model(kind.__name__, __config__=ConfigDict(extra="forbid"), **fields)


def takes_config(function: Any) -> bool:
    return "config" in inspect.signature(function).parameters


def plain(config: Any) -> dict[str, Any]:
    """What a config says, for a manifest: only JSON."""
    told = config.model_dump() if isinstance(config, BaseModel) else dataclasses.asdict(config)
    return json.loads(json.dumps({k: v for k, v in told.items() if v is not None}))
