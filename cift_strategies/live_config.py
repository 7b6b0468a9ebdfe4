"""What a live session is asked to do, and what it refuses to begin: keys, ports, folders in use, real orders without limits."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import operator
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from catalog.errors import InputError
from cift_strategies.risk import Limits
from cift_strategies.settings import Settings

KEYS: Final = {"databento": "DATABENTO_API_KEY", "polygon": "POLYGON_API_KEY"}
ORDERS_NEED: Final = ("capital", "max_order", "max_position", "max_notional", "max_order_rate", "max_daily_loss", "max_drawdown")


class LiveConfig(BaseModel):
    """What a session is asked to do. Without anything it paper-trades the demo market's last session."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    feed: Literal["replay", "databento", "polygon"] = "replay"
    venue: str = "sandbox"  # or "test" (feeds.venue), or "package.module:Factory" of a Nautilus execution client
    venue_config: dict[str, Any] = {}  # of such a client: `class` "package.module:Config", `name`, and the config's own arguments;
    # of the test venue: `address` "host:port" of one that runs already, or `faults` of the one that is started
    live: bool = False  # send orders to a real venue
    gateway: str | None = None  # "http://host:port" of a gateway that plays already: its historical address; None: one is started
    dbn: tuple[Path, ...] = ()  # what is replayed; empty: the demo's last session
    faults: tuple[str, ...] = ()  # what the replay's gateway does wrong, to rehearse it: "stall@5000:3", see feeds.mischief
    dataset: str | None = None  # of Databento
    symbols: tuple[str, ...] = ()  # instruments to trade, of those that the models know
    instruments: Path | None = None  # TOML with their definitions
    artifacts: Path | None = None  # trained models; None: those of the demo, trained at the first start
    train: tuple[str, ...] | None = ("hmm", "fusion")
    members: tuple[str, ...] = ()  # the user's own, "package.module:Class"
    strategy: str | None = None
    altdata: Path | None = None
    speed: Annotated[float, Field(ge=0, le=1e6)] = 1.0  # of a replay against the wall's clock; 0: as fast as it is read
    duration: Annotated[float | None, Field(gt=0)] = None  # seconds by the wall's clock; None: until the replay's end, or Ctrl-C
    state: Path = Path("out/live")
    record: bool = True  # keep the session as it came, for `run_backtest.py --session`
    port: Annotated[int, Field(ge=0, le=65_535)] = 0  # of the API and page; 0: any free one
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: Annotated[int, Field(ge=0)] = 7
    at_end: Literal["close", "keep"] = "close"  # what becomes of positions
    resting: Literal["resend", "cancel"] = "resend"  # what becomes of orders that the sandbox has forgotten after a restart
    order_latency_ms: Annotated[float, Field(ge=0)] = 1.0  # of the sandbox, in the stream's time
    budget_ms: Annotated[float | None, Field(gt=0)] = None  # of one member for a block; who takes longer abstains
    skip_from: Annotated[int, Field(ge=0)] = 1_024  # events that wait for the models, from which on old batches are passed over
    late_ms: Annotated[float, Field(gt=0)] = 2_000.0  # by how much the feed may lag before entries stop
    ahead_ms: Annotated[float, Field(gt=0)] = 500.0  # by how much its clock may be ahead of ours
    model_ms: Annotated[float, Field(gt=0)] = 2_000.0  # how long a prediction may take before entries stop
    settings: Settings = Settings()
    limits: Limits = Limits()

    @property
    def simulated(self) -> bool:
        """Whether the venue is in the node's process, and forgets with it."""
        return self.venue == "sandbox"

    @property
    def paper(self) -> bool:
        """Whether no real orders are sent."""
        return self.venue in ("sandbox", "test")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the state folder for this process. Raises InputError where it cannot be written or another session has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as e:
        raise InputError(f"--state {folder} cannot be written ({e.strerror}): choose another folder") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another session runs on --state {folder}: end it, or choose another folder") from None
        yield
    finally:
        os.close(handle)


def check(config: LiveConfig) -> None:
    """Refuse what cannot work before anything long is begun. Raises InputError."""
    if config.feed in KEYS and not os.environ.get(KEYS[config.feed]):
        raise InputError(f"--feed {config.feed} needs a key: export {KEYS[config.feed]}=..., or leave --feed out to play the replay")
    if config.feed == "replay":
        if config.dbn and config.artifacts is None:
            raise InputError("dbn: a replay of your own files needs trained models: add --artifacts DIR")
    else:
        if config.speed != 1.0:
            raise InputError(f"--speed is for the replay: --feed {config.feed} has the market's own")
        if config.artifacts is None:
            raise InputError(f"--feed {config.feed} needs trained models: add --artifacts DIR (python -m cift_models train makes them)")
        if config.feed == "polygon" and not config.symbols:
            raise InputError('--feed polygon needs symbols: write symbols = ["AAPL", "MSFT"] in --config')
        if config.feed == "databento" and config.instruments is None:
            raise InputError(f"--feed {config.feed} needs definitions: name a TOML as `instruments` in --config (see docs/instruments)")
        if config.feed == "databento" and config.dataset is None:
            raise InputError("--feed databento needs the dataset: write dataset = \"GLBX.MDP3\" or another in --config")
    if config.live and config.paper:
        raise InputError(f"--live sends real orders, and --venue {config.venue} takes none: leave --live out, or name a venue of your own")
    if config.venue == "test":
        _check_test_venue(config)
    elif not config.simulated:
        _check_venue(config)
    if config.gateway is not None and config.feed != "replay":
        raise InputError(f"gateway: names who plays the replay; --feed {config.feed} has its own")
    if config.device == "cuda":
        from cift_strategies.backtest import need_cuda

        need_cuda()
    if config.port:
        _check_port(config.port)


def _check_test_venue(config: LiveConfig) -> None:
    from cift_strategies.feeds.mischief import Fault
    from cift_strategies.feeds.venue import FAULTS

    if config.feed == "polygon":
        raise InputError("--venue test fills orders against a market in Databento's protocol: --feed polygon has none, use the sandbox")
    if unknown := sorted(config.venue_config.keys() - {"address", "faults"}):
        raise InputError(f"venue_config of the test venue knows address and faults, not {unknown[0]}")
    if "address" in config.venue_config and "faults" in config.venue_config:
        raise InputError("venue_config: a test venue that runs already (address) is told its faults over its line")
    for fault in config.venue_config.get("faults", ()):
        Fault.parse(fault, FAULTS)


def _check_venue(config: LiveConfig) -> None:
    if ":" not in config.venue:
        raise InputError(f'--venue {config.venue} is unknown: write sandbox, test, or a client\'s factory as "package.module:Factory"')
    imported(config.venue, "--venue")
    if not config.live:
        raise InputError(f"--venue {config.venue} takes real orders: add --live, or leave --venue out for the sandbox")
    if unset := [n for n in ORDERS_NEED if n not in config.limits.model_fields_set or getattr(config.limits, n) is None]:
        raise InputError(f"real orders need limits: set {', '.join(unset)} under [limits] in --config")
    if config.feed == "replay":
        raise InputError(f"--venue {config.venue} takes real orders, --feed replay plays the past: choose a real feed")


def imported(path: str, where: str) -> Any:
    """What "package.module:Name" or "package.module:Name.attribute" names. Raises InputError."""
    module, _, name = path.partition(":")
    try:
        return operator.attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as e:
        raise InputError(f'{where}: "{path}" cannot be imported ({e}): write it as package.module:Name') from None


def _check_port(port: int) -> None:
    import socket

    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
        except OSError as e:
            raise InputError(f"--port {port} cannot be used ({e.strerror}): choose another, or 0 for any free one") from None


def confirm(config: LiveConfig, ask: Callable[[str], str] = input) -> None:
    """Have the user type the venue's name before real orders are sent. Raises InputError where it is not typed."""
    if config.paper:
        return
    name = config.venue.partition(":")[2]
    limits = {n: getattr(config.limits, n) for n in ORDERS_NEED}
    print(f"Real orders will go to {config.venue}. Limits: {', '.join(f'{k} {v}' for k, v in limits.items())}.", file=sys.stderr)
    try:
        typed = ask(f"Type {name} to go on: ")
    except EOFError:
        typed = ""
    if typed.strip() != name:
        raise InputError("real orders were not confirmed: nothing was started")
