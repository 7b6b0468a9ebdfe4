"""One live session from feed to report: paper trading on a replay without keys, or a node on a real feed and venue.

:func:`run` takes a :class:`LiveConfig`; the state folder gets the journal, and at the end the report that a backtest writes. The actors and
the strategy are the backtest's; what differs are values: the feed and the venue, a pace, and a predictor that answers later.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import json
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import uvloop

from catalog.errors import InputError
from catalog.events import Instrument
from catalog.progress import Steps
from cift_strategies.live_config import LiveConfig, check, confirm, imported, locked
from cift_strategies.live_models import ROOT, Prepared, prepare
from cift_strategies.live_session import Session
from cift_strategies.priority import ahead

if TYPE_CHECKING:
    from cift_strategies.feeds.health import Health
    from cift_strategies.journal import Journal
    from cift_strategies.outcome import Scored
    from cift_strategies.recording import Recorder
    from cift_strategies.server.link import Early, Link
    from cift_strategies.server.supervisor import Supervisor
    from cift_strategies.serving import Models, Serving
    from cift_strategies.system import Client, System

READY_S: Final = 60  # for the gateway to answer
MODELS_S: Final = 300  # for a replay to wait for the models, whose kernels the first start of a clone compiles
SCORED_S: Final = 120


def run(config: LiveConfig, ask: Callable[[str], str] = input) -> Path:
    """The whole session; returns the folder with the report. Raises InputError for what the user can mend."""
    check(config)
    confirm(config, ask)
    kills: list[str] = []  # asked for by signal or API before there is a node; by itself the signal would end the process
    before = {n: signal.signal(n, how) for n, how in ((signal.SIGTERM, _interrupt), (signal.SIGUSR1, lambda *_: kills.append("SIGUSR1")))}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # run_live.py held it back
    try:
        with ahead(), locked(config.state), contextlib.ExitStack() as stack:
            return _run(config, stack, kills)
    finally:
        for number, how in before.items():
            signal.signal(number, how)


def _interrupt(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def _run(config: LiveConfig, stack: contextlib.ExitStack, kills: list[str]) -> Path:
    began = time.monotonic()
    state = config.state.resolve()
    from cift_strategies.journal import Journal

    journal = Journal(state, config.model_dump_json(), "normal" if config.paper else "full", not config.simulated)
    stack.callback(journal.close)
    link, server, early = beside(config, stack, kills)
    ready = prepare(config)
    from cift_models.hmm import REGIMES
    from cift_strategies.controls import Switches, Watch
    from cift_strategies.display import Display
    from cift_strategies.faults import Faults
    from cift_strategies.feeds.health import Health
    from cift_strategies.monitor import Monitor
    from cift_strategies.pace import Pace
    from cift_strategies.recording import Recording, set_aside, to_catalog
    from cift_strategies.recording_actor import RecordingActor
    from cift_strategies.recovery import recover
    from cift_strategies.serving import Models, Serving
    from cift_strategies.strategy import Terms
    from cift_strategies.system import assemble, live_node

    faults, others, health = Faults(), Beside(), Health(ready.instruments)
    stack.callback(others.stop)
    pace: Pace | None = None
    ends: dict[int, int] = {}
    told: dict[str, Any] = {}
    if config.feed == "replay":
        feed, told = replay(config, ready, others, health)
        pace, last = Pace(int(told["start"]), 0, float(told.get("speed", config.speed))), int(told["end"])
        ends = dict.fromkeys(range(len(ready.instruments)), last)
    else:
        feed, last = real(config, ready, health), None
    results = state / "predictions"
    results.mkdir(exist_ok=True)
    budget = None if config.budget_ms is None else round(config.budget_ms * 1e6)
    learned = journal.weights() if journal.goes_on or config.feed != "replay" else {}
    table = tuple(ready.instruments)
    kept = state / "session" if config.record else None
    if kept is not None:
        set_aside(kept)
    models = Models(
        ready.artifact.resolve(), table, config.members, budget, ready.altdata, config.seed, config.device, results, learned, kept,
        config.skip_from,
    )  # fmt: skip
    serving = Serving(models, time.time_ns if pace is None else pace.now)
    stack.callback(serving.close)
    serving.on_learned = journal.learned
    latency = round(config.order_latency_ms * 1e6) if config.simulated else 0
    terms = Terms(
        tuple(ready.instruments), config.settings, config.limits, REGIMES, 0, ends, {}, latency, faults, pace=pace, journal=journal
    )
    system = assemble(terms, serving, config.strategy, feed.restamp)
    line: Any = getattr(feed.config, "link", None)
    if hasattr(line, "taken"):
        line.taken = lambda: system.features.vectors
        line.room = serving.room if config.feed == "replay" else None
    display = Display(system, serving)
    stack.callback(display.close)
    journal.say = serving.on_unkept = display.say
    recovered = recover(system.strategy, journal, config.simulated, config.resting, display.say)
    brokers = venues(config, ready, latency, faults, others, told)
    broker = getattr(brokers[0].config, "link", None)
    patience = config.late_ms, config.ahead_ms, config.model_ms
    watch = Watch(system.strategy, serving, health, config.feed, display.say, *patience, feed.restamp, broker)
    about = {"mode": config.feed, "venue": config.venue, "speed": config.speed}
    switches = Switches(system.strategy, serving, watch, display.say, about)
    if recovered is not None and recovered.switch[0] in ("killed", "paused"):
        switches.state, switches.reason = recovered.switch
    display.tell(switches.status)
    recorder = None if kept is None else record(config, ready, models, system, journal, display.say)
    recording = []
    if recorder is not None:
        stack.callback(recorder.close)
        serving.on_reload, recording = recorder.reloaded, [RecordingActor(recorder, faults)]
    server.say = display.say
    display.say(f"page and API: {server.start()['url']}")
    actors = [watch, *recording, Monitor(system, switches, link, config.feed, state / "trail.jsonl")]
    node = live_node(
        system, [feed], brokers, config.simulated, actors, engine_limits(config, ready.instruments)
    )
    if (config.state / "kill").exists():
        switches.kill(f"the file {config.state / 'kill'} is there: remove it and resume")
    if pace is not None and (recovered is None or recovered.idle):
        with Steps("models"):
            serving.ready.wait(MODELS_S)
    if serving.fault is not None and serving.ready.is_set():
        raise InputError(serving.fault)
    session = Session(config, system, serving, switches, watch, node, last, display, kills)
    switches.run()
    display.say(f"{config.feed} of {', '.join(x.id for x in ready.instruments)} on {config.venue}; Ctrl-C ends it")
    early.stop()
    gc.collect()
    gc.freeze()  # what is there stays: no collection on the loop has to look through it
    asyncio.run(session.run(), loop_factory=uvloop.new_event_loop)  # a turn of the loop costs half of asyncio's own
    serving.disconnect()
    if recorder is not None:
        recorder.close(lost=serving.lost, passed=serving.passed)
    signal.signal(signal.SIGTERM, _interrupt)  # the loop has put the system's own in their place
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if held := system.strategy.ledger.told():  # what was on its way has been filled by now
        display.say(f"kept: {held}; the next start on this --state goes on with that")
    display.close()
    faults.reraise()
    if broker is not None and broker.fault is not None:
        raise broker.fault
    journal.close(system.strategy.flat)
    with Steps("scores"):
        scored = serving.finish(SCORED_S)
    if kept is not None:
        with Steps("recording"):
            to_catalog(Recording(kept))
    return finish(config, ready, system, serving, switches, scored, began, node, getattr(line, "ahead", 0))


def beside(config: LiveConfig, stack: contextlib.ExitStack, kills: list[str]) -> tuple[Link, Supervisor, Early]:
    """The link to the server, the server as a process that is started again when it dies, and who takes kills meanwhile: it starts up
    while the node is made."""
    from cift_strategies.server.link import Early, Link
    from cift_strategies.server.supervisor import Supervisor

    link = Link(config.state / "link.sock")
    stack.callback(link.close)
    server = Supervisor(link, config.state, config.port, [word for m in config.members for word in ("--member", m)])
    stack.callback(server.stop)
    server.begin()
    early = Early(link, kills.append)
    stack.callback(early.stop)
    return link, server, early


def record(
    config: LiveConfig, ready: Prepared, models: Models, system: System, journal: Journal, say: Callable[[str], object]
) -> Recorder:
    """Begin to record the session, with all that a replay needs to know of it; of an account that goes on, the journal as it is now."""
    from cift_strategies.recording import BEGAN, Recorder

    assert models.session is not None
    terms = system.strategy.terms
    about = {
        "name": ready.name, "instruments": [asdict(x) for x in ready.instruments], "artifact": str(models.artifact),
        "altdata": None if ready.altdata is None else str(ready.altdata.resolve()), "goes_on": journal.goes_on,
        "starts": 0 if terms.pace is None else terms.pace.first_ns, "ends": dict(terms.ends),
        "learned": {version: base64.b64encode(weights).decode() for version, weights in models.learned.items()},
        "order_latency_ms": config.order_latency_ms if config.speed else 0.0, "speed": config.speed,
        "config": config.model_dump(mode="json"),
    }  # fmt: skip
    recorder = Recorder(models.session, system, about, say)
    if journal.goes_on:
        try:
            journal.copy(models.session / BEGAN)
        except (OSError, sqlite3.Error) as e:
            say(f"what the session began with is not recorded: {e}")
    return recorder


def replay(config: LiveConfig, ready: Prepared, beside: Beside, health: Health) -> tuple[Client, dict[str, Any]]:
    """Start the gateway on the files, or find the one that plays already; the Databento client of it, and what the gateway told."""
    from cift_strategies.feeds import databento
    from cift_strategies.feeds.gateway import DEMO_KEY

    if config.gateway is None:
        faults = [word for f in config.faults for word in ("--fault", f)]
        listeners = 2 if config.venue == "test" and "address" not in config.venue_config else 1
        asked = ("--speed", repr(config.speed), "--key", DEMO_KEY, "--clients", str(listeners), "--with-parent", *faults)
        told = beside.start("cift_strategies.feeds.gateway", "--dbn", *map(str, ready.files), *asked)
    else:
        told = playing(config.gateway)
    live, historical = told["live"], told["historical"]
    return databento.client(ready.instruments, told["dataset"], DEMO_KEY, live=live, historical=historical, health=health), told


def playing(gateway: str) -> dict[str, Any]:
    """What a gateway that runs tells of itself. Raises InputError where there is none."""
    import urllib.request

    try:
        with urllib.request.urlopen(f"{gateway.rstrip('/')}/clock", timeout=READY_S) as answer:
            return dict(json.load(answer))
    except (OSError, ValueError) as e:
        raise InputError(f"gateway: nobody plays at {gateway} ({e}): start one, or leave it out") from None


def test_venue(config: LiveConfig, ready: Prepared, beside: Beside, told: dict[str, Any]) -> Client:
    """The test venue's client; the venue itself is started beside, with its books in the state folder, unless one runs already."""
    from dataclasses import asdict, replace

    from cift_strategies.feeds import databento, venue_client
    from cift_strategies.feeds.gateway import DEMO_KEY

    if "address" in config.venue_config:
        return venue_client.client(ready.instruments, str(config.venue_config["address"]))
    folder = config.state / "venue"
    folder.mkdir(exist_ok=True)
    table = folder / "instruments.json"
    table.write_text(json.dumps([asdict(replace(x, pauses=())) for x in ready.instruments]))
    market: tuple[str, ...]
    if config.feed == "replay":
        market = ("--gateway", told["live"], "--dataset", told["dataset"], "--gateway-key", DEMO_KEY)
    else:
        assert config.dataset is not None
        market = ("--gateway", "{}:{}".format(*databento.address(config.dataset)), "--dataset", config.dataset)
    faults = [word for f in config.venue_config.get("faults", ()) for word in ("--fault", f)]
    account = ("--books", str(folder / "books.jsonl"), "--capital", repr(config.limits.capital))
    found = beside.start("cift_strategies.feeds.venue", *market, "--instruments", str(table), *account, "--with-parent", *faults)
    return venue_client.client(ready.instruments, found["venue"])


def real(config: LiveConfig, ready: Prepared, health: Health) -> Client:
    """The client of a feed with a key."""
    from cift_strategies.system import Client

    if config.feed == "databento":
        from cift_strategies.feeds import databento

        assert config.dataset is not None
        return databento.client(ready.instruments, config.dataset, health=health)
    from cift_strategies.feeds import polygon

    return Client(polygon.NAME, *polygon.client(config.symbols, instruments=list(ready.instruments), health=health))


def _built(value: Any, where: str) -> Any:
    """A value of `venue_config` as the client wants it: "@package.module:Name.attribute" is what it names, a table with `class` is an
    object of that class, of the table's other keys or its `value`."""
    if isinstance(value, str) and value.startswith("@"):
        return imported(value[1:], where)
    if isinstance(value, dict) and "class" in value:
        kind, arguments = imported(value["class"], where), {k: _built(v, where) for k, v in value.items() if k not in ("class", "value")}
        return kind(value["value"]) if "value" in value else kind(**arguments)
    return value


def venues(
    config: LiveConfig, ready: Prepared, latency_ns: int, faults: Any, beside: Beside | None = None, told: dict[str, Any] | None = None
) -> list[Client]:
    """The sandbox with the backtest's fees, latency and queue position, the test venue, or the adapter that the config names."""
    from cift_strategies.system import Client, sandbox

    if config.simulated:
        wall_ns = round(latency_ns / config.speed) if config.speed else 0
        return sandbox(ready.instruments, config.limits.capital, wall_ns, faults)
    if config.venue == "test":
        return [test_venue(config, ready, beside or Beside(), told or {})]
    arguments = dict(config.venue_config)
    name = arguments.pop("name", None)
    if "class" not in arguments or name is None:
        raise InputError("venue_config needs `class` (the client's configuration, package.module:Config) and `name` (of the client)")
    factory = imported(config.venue, "--venue")
    try:
        return [Client(str(name), factory if hasattr(factory, "create") else factory(), _built(arguments, "venue_config"))]
    except (TypeError, ValueError, AttributeError) as e:
        raise InputError(f"venue_config does not fit {arguments['class']}: {e}") from None


def engine_limits(config: LiveConfig, instruments: Sequence[Instrument]) -> dict[str, Any]:
    """Nautilus's own checks behind ours: no order above the largest position, and a ceiling on the rate."""
    most = config.limits.max_notional * config.limits.capital * 1.5  # prices move while an exit is worked
    rate = 20 * (config.limits.max_order_rate or 50)
    return {"max_order_submit_rate": f"{rate}/00:00:01", "max_notional_per_order": {x.id: f"{most:.0f}" for x in instruments}}


def finish(
    config: LiveConfig, ready: Prepared, system: System, serving: Serving, switches: Any, scored: Scored | None, began: float, node: Any,
    ahead: int = 0,
) -> Path:  # fmt: skip
    """Write the report into the state folder; `ahead`: most events that waited in the node, where that is known."""
    from cift_strategies.outcome import Traded, write_run

    traded = Traded.by(system.strategy)
    node.dispose()
    if scored is None or not scored.first:
        why = "no event came" if scored is not None else serving.unkept or serving.fault or "the models did not answer"
        print(f"no report: {why}", file=sys.stderr)
        return config.state
    (config.state / "predictions" / "predictions.parquet").replace(config.state / "predictions.parquet")
    with contextlib.suppress(OSError):
        (config.state / "predictions").rmdir()
    events = system.features.vectors
    told = {
        "events": events, "events_streamed": events, "feature_vectors": events, "events_per_second": events / (time.monotonic() - began),
        "callback_errors": system.strategy.faults.count, "notes": [],
        "live": {
            "feed": config.feed, "venue": config.venue, "speed": config.speed, "skipped": serving.skipped, "passed": serving.passed,
            "lost": serving.lost,
            "queue": serving.depth.told(), "node_queue": ahead,
            "stages": [t.told(s) for s, t in {**serving.timings, **switches.status()["timings"]}.items()],
        },
    }  # fmt: skip
    write_run(config.state, ready.name, ready.instruments, scored, traded, told, config.model_dump(mode="json"), began)
    return config.state


# --- the processes beside the node ----------------------------------------------------------------------------------------------------


class Beside:
    """Processes that live as long as the session."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[str]] = []

    def start(self, module: str, *arguments: str, wait: bool = True) -> dict[str, Any]:
        """Start `python -m module`; what its first line of JSON says. Raises InputError with its own last line where it ends first."""
        errors = subprocess.PIPE if wait else None
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        self._started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("{"):
            process.wait(READY_S)
            said = (process.stderr.read() if process.stderr is not None else "").strip().splitlines()
            raise InputError((said[-1] if said else f"{module} ended with exit code {process.returncode}").removeprefix("error: "))
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                _drain(pipe)
        return dict(json.loads(line))

    def stop(self) -> None:
        for process in self._started:
            process.terminate()
        for process in self._started:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._started.clear()


def _drain(pipe: Any) -> None:
    """Read on, so that the process never waits for us."""
    threading.Thread(target=lambda: [None for _ in pipe], daemon=True).start()
