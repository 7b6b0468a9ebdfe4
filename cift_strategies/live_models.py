"""What a live session runs on: its instruments, the files of a replay, and trained models, made where the demo has none yet."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from catalog.errors import InputError
from catalog.events import Instrument
from cift_strategies import source as sources
from cift_strategies.live_config import KEYS, LiveConfig

if TYPE_CHECKING:
    from cift_strategies.backtest import RunConfig

ROOT: Final = Path(__file__).resolve().parents[1]


@dataclass(slots=True)
class Prepared:
    """What a session runs on."""

    instruments: Sequence[Instrument]
    artifact: Path
    name: str
    altdata: Path | None = None
    files: Sequence[Path] = ()  # of a replay


def prepare(config: LiveConfig) -> Prepared:
    """Instruments, models and files; makes the demo market and trains its models where they are not there yet."""
    from cift_models.artifacts import read

    if config.feed != "replay":
        assert config.artifacts is not None
        from catalog.events import read_instruments_toml

        if config.feed == "polygon":
            from cift_strategies.feeds import polygon_instruments

            table = polygon_instruments.instruments(config.symbols, key=os.environ[KEYS[config.feed]])
            return Prepared(table, config.artifacts, config.feed, config.altdata)
        assert config.instruments is not None
        return Prepared(_chosen(read_instruments_toml(config.instruments), config), config.artifacts, config.feed, config.altdata)
    if config.dbn:
        assert config.artifacts is not None
        found = sources.dbn(config.dbn, config.instruments, None, None, None)
        return Prepared(_chosen(found.instruments, config), config.artifacts, found.name, config.altdata, config.dbn)
    found = sources.demo(config.seed)
    market = sources.demo_market(config.seed)
    files = [sorted(market.glob(f"*.{kind}.dbn.zst"))[-1] for kind in ("mbo", "definition")]
    altdata = config.altdata or found.altdata
    artifact = config.artifacts if config.artifacts is not None else demo_models(config, found)
    read(artifact)
    return Prepared(_chosen(found.instruments, config), artifact, "demo", altdata, files)


def _chosen(table: Sequence[Instrument], config: LiveConfig) -> Sequence[Instrument]:
    if unknown := [s for s in config.symbols if s not in {x.id for x in table}]:
        raise InputError(f"symbols: {unknown[0]} is not among {', '.join(x.id for x in table)}")
    return [x for x in table if not config.symbols or x.id in config.symbols]


def demo_models(config: LiveConfig, found: sources.Source) -> Path:
    """The models of the demo market's earlier sessions, in the state folder; trained once per seed and choice of members."""
    from cift_models.artifacts import read
    from cift_models.train import train
    from cift_strategies.backtest import RunConfig, alternative, plan

    run = RunConfig.model_validate({k: getattr(config, k) for k in ("seed", "train", "members", "altdata")})
    kept, own = sources.STORE / f"demo-models-{config.seed}-{_key(run, found)}", config.state / "artifact"
    for place in (own, kept):
        with contextlib.suppress(InputError, OSError):
            if (place / "manifest.json").is_file() and read(place, _names()) and (place == kept or _same(own, kept)):
                break
    else:
        place = kept
        shutil.rmtree(kept, ignore_errors=True)
        table = alternative(run, found)
        train(plan(run, found).training, out=kept, seed=config.seed, members=config.train, own=config.members, altdata=table)
    if place != own:
        from catalog.whole import replacing

        with replacing(own) as part:
            shutil.copytree(place, part, dirs_exist_ok=True)
    return own


def _same(a: Path, b: Path) -> bool:
    return (b / "manifest.json").is_file() and (a / "manifest.json").read_bytes() == (b / "manifest.json").read_bytes()


def _names() -> Sequence[str]:
    from cift_models.features import NAMES

    return NAMES


def _key(run: RunConfig, found: sources.Source) -> str:
    """Short name of what the demo's models follow from: the market, the members, and the code that fits them."""
    import hashlib

    from catalog.whole import sha256_of

    told = [run.train, run.members, (found.root / "cift.json").read_text(), sha256_of(sorted((ROOT / "cift_models").glob("*.py")))]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:10]
