"""A live session on the replay: what it trades and leaves behind, what stops it, and what it refuses to begin."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import EAGER, Small
from live_feed import statuses
from processes import started

from catalog.errors import InputError
from catalog.events import SCALE, read_catalog
from cift_strategies import trail
from cift_strategies.backtest import RunConfig
from cift_strategies.live import venues
from cift_strategies.live_config import ORDERS_NEED, LiveConfig, check, confirm, locked
from cift_strategies.live_models import Prepared
from cift_strategies.outcome import HORIZON_LABELS
from cift_strategies.pace import Pace, Paced
from cift_strategies.parts import read
from cift_strategies.recording import NOTES
from cift_strategies.risk import Ledger, Limits
from cift_strategies.session_replay import run

ROOT = Path(__file__).parents[2]
WITHIN_S = 240  # guards against hanging, no more


def last_session(small: Small) -> list[Path]:
    market = small.catalog.parent / "market"
    return [sorted(market.glob(f"*.{kind}.dbn.zst"))[-1] for kind in ("mbo", "definition")]


def session(small: Small, state: Path, *options: str, strategy: str = EAGER, **more: Any) -> subprocess.Popen[str]:
    """`run_live.py` on the last session of the small market, as a process."""
    config = state.with_suffix(".toml")
    config.write_text(settings_of(small, strategy, **more))
    return launched(config, state, *options)


def settings_of(small: Small, strategy: str = EAGER, **more: Any) -> str:
    """The TOML for `--config`."""
    settings = {"dbn": [str(p) for p in last_session(small)], "artifacts": str(small.artifact), "strategy": strategy, **more}
    tables = {k: v for k, v in settings.items() if isinstance(v, dict)}
    lines = [f"{k} = {json.dumps(v)}" for k, v in settings.items() if k not in tables]
    lines += [line for k, t in tables.items() for line in (f"[{k}]", *(f"{n} = {json.dumps(v)}" for n, v in t.items()))]
    return "\n".join(lines)


def launched(config: Path, state: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "run_live.py", "--config", str(config), "--state", str(state), *options]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "CIFT_KILL": str(state / "kill")}
    return started(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def rows(state: Path, query: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(state / "journal.sqlite") as db:
        return db.execute(query).fetchall()


# --- whole sessions -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played(small: Small, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The whole session, no batch passed over, and what was printed. However late the node is for its market, it trades."""
    state = tmp_path_factory.mktemp("live") / "state"
    patient = {"skip_from": 1_000_000, "late_ms": 1e9, "model_ms": 1e9, "settings": {"stale_ms": 1e9}}
    process = session(small, state, "--speed", "60", **patient)
    said, _ = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 0, said
    return state, said


def test_a_session_leaves_what_a_backtest_leaves(played: tuple[Path, str]) -> None:
    state, said = played
    assert {"report.html", "summary.json", "fills.parquet", "positions.parquet", "predictions.parquet", "journal.sqlite"} <= {
        p.name for p in state.iterdir()
    }
    summary = json.loads((state / "summary.json").read_text())
    assert summary["fills"] > 0 and summary["callback_errors"] == 0
    assert summary["open_at_end"] == 0 or "could not be closed" in said  # an unthrottled market is over before its last order is filled
    assert "the replay has ended" in said and "Traceback" not in said
    assert (state / "token").stat().st_mode & 0o077 == 0 and not (state / "link.sock").exists()


def test_features_and_predictions_of_a_session_are_those_of_its_backtest(played: tuple[Path, str], small: Small) -> None:
    """However fast it comes, and however the stream was cut: no event is left out, and what every member says is equal to the last bit.

    The ensemble's weights learn from the outcomes of all instruments in the order in which these arrive; where a venue's event of one of
    them stands astride an event of another, that order is not the catalog's, and a later decision differs by what one outcome teaches.
    """
    state, _ = played
    summary, events = json.loads((state / "summary.json").read_text()), read_events(small)
    assert summary["feature_vectors"] == len(events) and summary["live"]["lost"] == 0
    assert summary["start"] == int(events["ts_init"][0])
    live, backtest = decisions(state), decisions(small.out)
    assert len(backtest) > 20_000 and backtest.keys() <= live.keys()
    assert all(live[key][0] == exact for key, (exact, _) in backtest.items())
    ours, theirs = (np.array([d[key][1] for key in backtest]) for d in (live, backtest))
    assert np.allclose(ours, theirs, atol=1e-3, equal_nan=True)


def decisions(folder: Path) -> dict[tuple[int, str], tuple[bytes, list[float]]]:
    """Of each batch and instrument: mid, regime, every member's votes and what came of it, as bytes; and what the ensemble made of them."""
    exact = ["mid", "regime", *(f"move_{h}" for h in HORIZON_LABELS)]
    mixed = [f"{c}_{h}" for h in HORIZON_LABELS for c in ("p_down", "p_up")]
    table = pq.read_table(folder / "predictions.parquet", columns=["ts", "instrument", "votes", *exact, *mixed])
    votes = table["votes"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    first, second = (np.stack([table[n].to_numpy() for n in names], axis=1) for names in (exact, mixed))
    keys = zip(table["ts"].cast("int64").to_pylist(), table["instrument"].to_pylist())
    both = zip(np.concatenate([votes, first], axis=1), second.tolist())
    return {key: (row.tobytes(), mix) for key, (row, mix) in zip(keys, both)}


def read_events(small: Small) -> Any:
    events = np.concatenate(list(read_catalog(small.catalog)[1]))
    clears = events[events["action"] == ord("R")]["ts_init"]
    return events[events["ts_init"] >= clears[-2]]  # two instruments open within a second


def test_a_recorded_session_is_computed_again_to_the_last_bit(played: tuple[Path, str], tmp_path: Path) -> None:
    """Every event's features, every prediction with all members' votes and what the ensemble makes of them, every signal and every order;
    and with them what the account did and earned."""
    state, out = played[0], tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "run_backtest.py", "--session", str(state), "--out", str(out)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)}, timeout=WITHIN_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    live, session = json.loads((state / "summary.json").read_text()), json.loads((out / "session.json").read_text())
    ordered = len(rows(state, "select * from signals")) + len(rows(state, "select * from sent"))
    for kind, n in (("features", live["feature_vectors"]), ("predictions", live["predictions"]), ("orders", ordered)):
        assert n > 0 and session[kind] == {"recorded": n, "equal": n, "cut_off": 0, "differ": []}
        assert any(line.split() == [kind, f"{n:,}", f"{n:,}", "0", "0"] for line in done.stdout.splitlines())
    assert session["notes"] == []
    again = json.loads((out / "summary.json").read_text())
    told = ("decisions", "order_events", "closed_by", "fees", "pnl_net", "max_drawdown")
    assert {n: again[n] for n in told} == {n: live[n] for n in told}
    for name in ("fills", "positions"):
        assert pq.read_table(out / f"{name}.parquet").equals(pq.read_table(state / f"{name}.parquet"))
    assert (out / "report.html").is_file()
    ours, theirs = ({key: exact for key, (exact, _) in decisions(f).items()} for f in (out, state))
    assert ours == theirs


# --- a session that is not what was recorded ------------------------------------------------------------------------------------------


type Notes = list[dict[str, Any]]


@pytest.fixture(scope="module")
def begun(played: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Notes, int]:
    """The session's folder with the events of its beginning alone and without notes; all notes; how many of them are of the beginning."""
    folder, whole = tmp_path_factory.mktemp("begun") / "session", played[0] / "session"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("data", "events", "notes"))
    notes: Notes = pa.concat_tables(read(whole / "notes", [])).to_pylist()
    for n in notes:
        n["what"] = json.loads(n["what"])
    at = [n["at"] for n in notes if n["kind"] == "order"]
    end = next(n for n in at[400:] if n > at[399])
    write(folder / "events", pa.concat_tables(read(whole / "events", [])).slice(0, end))
    return folder, notes, sum(n["at"] <= end for n in notes)


def write(folder: Path, table: pa.Table) -> None:
    folder.mkdir()
    pq.write_table(table, folder / "00000000.parquet")


def replayed(folder: Path, notes: Notes, tmp_path: Path) -> dict[str, Any]:
    """`session.json` of the session in `folder`, had these been its notes."""
    shutil.copytree(folder, tmp_path / "session")
    table = pa.Table.from_pylist([{**n, "what": json.dumps(n["what"])} for n in notes], schema=NOTES)
    write(tmp_path / "session" / "notes", table)
    run(RunConfig(session=tmp_path, out=tmp_path / "out"))
    told = json.loads((tmp_path / "out" / "session.json").read_text())
    assert told["features"]["differ"] == told["predictions"]["differ"] == []
    return dict(told)


def test_turns_after_the_last_event_that_was_recorded_are_cut_off(begun: tuple[Path, Notes, int], tmp_path: Path) -> None:
    folder, notes, _ = begun
    orders = replayed(folder, notes, tmp_path)["orders"]
    assert orders["recorded"] == orders["equal"] > 50 and orders["cut_off"] > 0 and orders["differ"] == []


def test_an_alert_has_its_turn_where_it_is_noted_and_nowhere_else(begun: tuple[Path, Notes, int], tmp_path: Path) -> None:
    folder, notes, n = begun
    pairs = [(a, b["what"]) for a, b in pairwise(notes[:n]) if (a["kind"], b["kind"]) == ("alert", "order")]
    sent = ("OrderInitialized", "OrderPendingCancel")
    alerts = [a for a, b in pairs if b["event"] in sent and b["signal"] == a["what"][2]]  # those that something followed from
    left_out = alerts[len(alerts) * 3 // 4]
    told = replayed(folder, [a for a in notes[:n] if a is not left_out], tmp_path)
    _, k, signal = left_out["what"]
    differ, name = told["orders"]["differ"], json.loads((folder / "session.json").read_text())["instruments"][k]["id"]
    assert any(d["signal"] == signal for d in differ)
    assert all(d["instrument"] == name and d["signal"] >= signal for d in differ)


def test_what_is_not_equal_is_listed_and_does_not_make_what_follows_unequal(begun: tuple[Path, Notes, int], tmp_path: Path) -> None:
    """An order of other terms, and a trade that the session has not made: the replay's is rejected, and so are those that it makes of later
    predictions while the session was in a position; then it goes on as the session did."""
    folder, notes, n = begun
    notes = copy.deepcopy(notes[:n])
    sent = [x["what"] for x in notes if x["kind"] == "order" and x["what"]["event"] == "OrderSubmitted"]
    sent[0]["quantity"] = "1"
    lost = sent[len(sent) // 2]
    trade = lost["instrument"], lost["signal"]

    def of(x: dict[str, Any]) -> tuple[str, int]:
        return x["what"]["instrument"], x["what"]["predicted_at" if x["kind"] == "signal" else "signal"]

    kept = [x for x in notes if x["kind"] not in ("signal", "order") or of(x) != trade]
    assert max(x["at"] for x in kept if x["kind"] == "order") > max(x["at"] for x in notes if x["kind"] == "order" and of(x) == trade)
    orders = replayed(folder, kept, tmp_path)["orders"]
    assert orders["equal"] == orders["recorded"] - 1
    terms = [d for d in orders["differ"] if d["what"].startswith("terms: quantity 1 / ")]
    assert [(d["instrument"], d["signal"], d["role"]) for d in terms] == [(sent[0]["instrument"], sent[0]["signal"], sent[0]["role"])]
    rest = [d for d in orders["differ"] if d not in terms]
    assert {d["what"] for d in rest} == {"was not sent in the session"} and {d["instrument"] for d in rest} == {trade[0]}
    assert trade[1] in {d["signal"] for d in rest}


def test_a_session_that_older_code_recorded_is_refused(begun: tuple[Path, Notes, int], tmp_path: Path) -> None:
    manifest = json.loads((begun[0] / "session.json").read_text())
    (tmp_path / "session.json").write_text(json.dumps(manifest | {"version": 1}))
    with pytest.raises(InputError, match="by an older version"):
        run(RunConfig(session=tmp_path, out=tmp_path / "out"))


def test_a_recorded_session_is_a_catalog(played: tuple[Path, str], small: Small) -> None:
    kept, events = np.concatenate(list(read_catalog(played[0] / "session")[1])), read_events(small)
    assert kept.tobytes() == events.tobytes()


def test_what_was_recorded_before_a_kill_is_computed_again(small: Small, tmp_path: Path) -> None:
    state, out = tmp_path / "state", tmp_path / "out"
    process = session(small, state, "--speed", "20", skip_from=0)
    events = state / "session" / "events"
    while len(list(events.glob("*.parquet"))) < 4:
        assert process.poll() is None
        select.select([], [], [], 0.05)
    process.kill()
    process.communicate()
    done = run(RunConfig(session=state, out=out))
    told = json.loads((out / "session.json").read_text())
    assert "cut off" in told["notes"][0] and told["features"]["recorded"] == done.summary["events"] > 500
    assert told["features"]["differ"] == [] and told["predictions"]["differ"] == [] and told["predictions"]["equal"] > 100
    assert told["orders"]["differ"] == [] and told["orders"]["equal"] == told["orders"]["recorded"]


@pytest.mark.parametrize("kill", [False, True], ids=["", "killed at its start"])
def test_a_session_that_goes_on_is_replayed_with_what_it_began_with(small: Small, killed: Path, tmp_path: Path, kill: bool) -> None:
    """Positions, what is under way of trades, PnL and all counts of the account; and what is done about them at the start."""
    state, out = gone_on(killed, tmp_path), tmp_path / "out"
    had, fills = held(state), len(rows(state, "select * from fills"))
    if kill:
        (state / "kill").touch()
    process = session(small, state, "--speed", "20", "--duration", "10")
    said, _ = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 0 and "the account goes on: " in said and had, said
    again, live = run(RunConfig(session=state, out=out)).summary, json.loads((state / "summary.json").read_text())
    same = json.loads((out / "session.json").read_text())
    for kind in ("features", "predictions", "orders"):
        assert same[kind]["recorded"] == same[kind]["equal"] > 0 and same[kind]["differ"] == []
    assert not rows(state, "select * from orders where session = 2 and role = 'seed' and event = 'OrderDenied'"), "there was a price"
    sent = set(rows(state, "select number from sent where session = 2"))
    told = set(rows(state, "select number from orders where session = 2 and event = 'OrderInitialized'"))
    signals = rows(state, "select * from signals where session = 2")
    assert sent == told and same["orders"]["recorded"] == len(sent) + len(signals) and bool(signals) != kill
    for n in ("decisions", "order_events", "closed_by", "fees", "pnl_net", "max_drawdown"):
        assert again[n] == live[n], n
    for name in ("fills", "positions"):
        assert pq.read_table(out / f"{name}.parquet").equals(pq.read_table(state / f"{name}.parquet")), name
    assert len(pq.read_table(out / "fills.parquet")) > fills > 0


def test_the_journal_holds_every_signal_order_event_and_fill(played: tuple[Path, str]) -> None:
    state, _ = played
    summary = json.loads((state / "summary.json").read_text())
    fills = pq.read_table(state / "fills.parquet").to_pylist()
    kept = rows(state, 'select instrument, "order", role, side, price, size, fee from fills')
    assert kept == [tuple(f[c] for c in ("instrument", "order", "role", "side", "price", "size", "fee")) for f in fills]
    assert len(rows(state, "select * from signals")) == summary["decisions"]["entered"]
    events = dict(rows(state, "select event, count(*) from orders group by event"))
    assert events == summary["order_events"]
    assert rows(state, "pragma journal_mode") == [("wal",)]


def test_each_step_of_a_trades_trail_is_in_the_streams_time(played: tuple[Path, str]) -> None:
    entries = list(trail.read(played[0] / "trail.jsonl"))
    closed = {e["trade"]: e for e in entries if e["stage"] == "closed"}
    assert closed
    for trade, end in closed.items():
        decided, *others = (e for e in entries if e["trade"] == trade)
        assert decided["stage"] == "signal" and {"order", "fill", "closed"} == {e["stage"] for e in others}
        assert all(decided["ts"] <= e["ts"] <= end["ts"] + 600 * 10**9 for e in others)  # brackets are taken away after the close


def test_the_kill_file_cancels_and_flattens_and_nothing_is_entered_after(small: Small, tmp_path: Path) -> None:
    state = tmp_path / "state"
    process = session(small, state, "--speed", "20", "--duration", "20", strategy="live_strategies:Trips")
    said, _ = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 0, said
    assert "killed: the file" in said
    summary = json.loads((state / "summary.json").read_text())
    assert summary["closed_by"].get("killed", 0) >= 1 and summary["open_at_end"] == 0
    assert summary["decisions"]["halted: kill switch"] > 10
    assert summary["decisions"]["entered"] <= 8  # two instruments, and what was decided before the file was seen
    last = dict(rows(state, "select client_order_id, event from orders order by rowid"))
    assert not set(last.values()) & {"OrderSubmitted", "OrderAccepted", "OrderPendingCancel", "OrderTriggered"}


def until(true: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """What is true at last, while the process lives."""
    while not (found := true()):
        assert process.poll() is None
        select.select([], [], [], 0.005)
    return found


def held(state: Path) -> dict[str, float]:
    """Positions as the journal has them."""
    with contextlib.suppress(sqlite3.OperationalError):  # not there yet
        return {name: size / SCALE for name, size in rows(state, "select instrument, size from positions where size != 0")}
    return {}


def asked(url: str, path: str, token: str | None = None) -> Any:
    """What the API answers; None where it has nothing to tell yet. With a `token` it is a command."""
    head = {} if token is None else {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/api/v1/{path}", None if token is None else b"{}", head)
    try:
        with urllib.request.urlopen(request, timeout=WITHIN_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as e:
        if e.code != 503:
            raise
        return None


def gone_on(killed: Path, tmp_path: Path) -> Path:
    """The state folder of a session that was killed, to be gone on with."""
    return Path(shutil.copytree(killed, tmp_path / "state", ignore=shutil.ignore_patterns("*.sock")))


@pytest.fixture(scope="module")
def killed(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state folder of a session that died by `kill -9` with a position."""
    state = tmp_path_factory.mktemp("killed") / "state"
    process = session(small, state, "--speed", "20")
    until(lambda: held(state), process)
    process.kill()
    process.communicate()
    return state


@pytest.mark.parametrize("way", ["a signal before there is a node", "a signal", "the file", "the API"])
def test_positions_and_kill_switch_are_there_before_the_models_are(small: Small, killed: Path, tmp_path: Path, way: str) -> None:
    """Beside a process of models that cannot load: their table of alternative data is a pipe that nobody writes."""
    state = gone_on(killed, tmp_path)
    had = held(state)
    os.mkfifo(tmp_path / "never.csv")
    process = session(small, state, "--speed", "20", altdata=str(tmp_path / "never.csv"))
    assert process.stdout is not None
    early = way == "a signal before there is a node"
    if early:
        until(lambda: len(rows(state, "select id from sessions")) == 2, process)
        process.send_signal(signal.SIGUSR1)
    said, url = [], ""
    for line in process.stdout:
        said.append(line)
        if line.startswith("page and API: "):
            url = line.split()[-1]
        if line.startswith("no entries: the models"):
            break
    assert any(line.startswith("the account goes on: ") and all(name in line for name in had) for line in said), said
    told = until(lambda: asked(url, "positions"), process)
    if not early:
        assert {p["symbol"]: p["size"] for p in told["items"] if p["size"]} == had
    if way == "a signal":
        process.send_signal(signal.SIGUSR1)
    elif way == "the file":
        (state / "kill").touch()
    elif way == "the API":
        until(lambda: asked(url, "kill", (state / "token").read_text().strip()), process)
    until(lambda: not held(state), process)
    by = dict(rows(state, "select trade, by from closed"))
    filled = {trade for (trade,) in rows(state, "select distinct trade from fills")}
    assert {by[trade] for trade in filled} == {"killed"}
    assert {by[trade] for trade in by.keys() - filled} <= {"lost at a restart", "not sent"}, "on their way when the process died"
    status = asked(url, "snapshot")
    assert status["node"]["state"] == "killed" and asked(url, "models/status")["version"] == ""
    process.send_signal(signal.SIGTERM)
    said.append(process.communicate(timeout=WITHIN_S)[0])
    assert process.returncode == 0 and "no report: the models are being loaded" in said[-1], said


def test_a_kill_is_taken_while_a_replay_that_holds_nothing_waits_for_its_models(small: Small, tmp_path: Path) -> None:
    """They wait for their table of alternative data, a pipe that nobody writes. A kill so taken goes the way of a signal's."""
    state = tmp_path / "state"
    os.mkfifo(tmp_path / "never.csv")
    process = session(small, state, "--speed", "20", altdata=str(tmp_path / "never.csv"))
    assert process.stdout is not None
    url = next(line for line in process.stdout if line.startswith("page and API: ")).split()[-1]
    token = (state / "token").read_text().strip()
    assert until(lambda: asked(url, "kill", token), process) == {"state": "killed"}
    with pytest.raises(urllib.error.HTTPError) as refused:
        asked(url, "pipeline/start", token)
    assert refused.value.code == 409 and "the node is starting" in json.load(refused.value)["detail"]
    assert asked(url, "snapshot") is None
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=WITHIN_S) and process.returncode == 130


def test_a_kill_by_signal_while_the_command_line_is_still_being_read_is_not_lost(small: Small, tmp_path: Path) -> None:
    state, pipe = tmp_path / "state", tmp_path / "live.toml"
    os.mkfifo(pipe)
    process = launched(pipe, state, "--speed", "20")
    with pipe.open("w") as config:  # from the other end: before anything of a session is there
        process.send_signal(signal.SIGUSR1)
        config.write(settings_of(small))
    assert process.stdout is not None
    said = next((line for line in process.stdout if line.startswith("killed")), f"ended with {process.wait(WITHIN_S)}")
    assert said == "killed: SIGUSR1\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=WITHIN_S)
    assert process.returncode == 0 and not rows(state, "select * from signals")


def test_a_signal_ends_the_session_with_its_positions_closed_and_its_report_written(small: Small, tmp_path: Path) -> None:
    state = tmp_path / "state"
    process = session(small, state, "--speed", "20")
    assert process.stdout is not None
    for line in process.stdout:
        if "fills " in line and "fills 0 " not in line:
            process.send_signal(signal.SIGTERM)
            break
    said, _ = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 0 and "stopping: SIGTERM" in said
    assert json.loads((state / "summary.json").read_text())["open_at_end"] == 0


def test_positions_that_are_kept_are_told(small: Small, tmp_path: Path) -> None:
    state = tmp_path / "state"
    process = session(small, state, "--speed", "20", at_end="keep")
    until(lambda: held(state), process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=WITHIN_S)
    kept = held(state)
    assert process.returncode == 0 and all(f"{size:+g} {name} at " in said for name, size in kept.items()), said
    assert bool(kept) == ("\nkept: " in said)


def test_a_silent_feed_halts_entries_and_says_so_until_it_speaks_again(small: Small, tmp_path: Path) -> None:
    state = tmp_path / "state"
    process = session(small, state, "--speed", "20", "--duration", "15", faults=["stall@3000:4"])
    said, _ = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 0, said
    silent, again = said.find("no entries: feed replay is silent"), said.find("entries again: feed is well")
    assert 0 < silent < again


@pytest.mark.parametrize("share", [(0.0,), (0.3, 0.6)])
def test_a_halted_market_is_not_entered_and_its_halt_is_told_and_replayed(small: Small, tmp_path: Path, share: tuple[float, ...]) -> None:
    """Halted throughout, and in the middle of the session."""
    files, ts = [Path(shutil.copy(p, tmp_path)) for p in last_session(small)], read_events(small)["ts_init"]
    at = [int(ts[0] + s * (ts[-1] - ts[0])) for s in share]
    (tmp_path / files[0].name.replace(".mbo.", ".status.")).write_bytes(statuses(files[0], at))
    state = tmp_path / "state"
    process = session(small, state, "--speed", "0", dbn=[str(p) for p in files])
    said, _ = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 0 and said.count(": halted") == 2, said
    told = json.loads((state / "summary.json").read_text())
    again = run(RunConfig(session=state, out=tmp_path / "out")).summary
    assert again["decisions"] == told["decisions"] and again["orders"] == told["orders"]
    same = json.loads((tmp_path / "out" / "session.json").read_text())
    assert all(same[kind]["differ"] == [] for kind in ("features", "predictions", "orders")) and same["predictions"]["equal"] > 100
    if len(at) == 1:
        assert told["decisions"]["market: halted"] > 0 and told["orders"] == 0
        return
    fills = pq.read_table(state / "fills.parquet")["ts"].cast("int64").to_pylist()
    assert min(fills) < at[0] < at[1] < max(fills) and not any(at[0] < t < at[1] for t in fills)
    assert told["order_events"].get("OrderRejected", 0) <= 4  # exits wait for the market, however long that is
    opened = pq.read_table(state / "positions.parquet")["opened"].cast("int64").to_pylist()
    assert min(opened) < at[0] and max(opened) > at[1]  # what was held is closed then, and others follow


def test_a_fault_in_a_callback_ends_the_session_with_its_traceback(small: Small, tmp_path: Path) -> None:
    process = session(small, tmp_path / "state", "--speed", "20", "--duration", "60", strategy="live_strategies:Fails")
    said, _ = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 1 and "ArithmeticError: a fault of the strategy" in said


# --- what is refused ------------------------------------------------------------------------------------------------------------------


def test_one_state_folder_is_for_one_session(tmp_path: Path) -> None:
    with locked(tmp_path / "s"), pytest.raises(InputError, match="another session runs on"), locked(tmp_path / "s"):
        pass
    with locked(tmp_path / "s"):
        pass


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"), locked(tmp_path / "file" / "s"):
        pass


@pytest.mark.parametrize("feed", ["databento", "polygon"])
def test_a_real_feed_needs_its_key(feed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(f"{feed.upper()}_API_KEY", raising=False)
    with pytest.raises(InputError, match=f"needs a key: export {feed.upper()}_API_KEY"):
        check(LiveConfig(feed=feed))


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        with pytest.raises(InputError, match="cannot be used"):
            check(LiveConfig(port=s.getsockname()[1]))


def real(**more: Any) -> LiveConfig:
    limits = {n: 1_000 for n in ORDERS_NEED} | {"max_notional": 0.1, "max_daily_loss": 0.01, "max_drawdown": 0.02}
    return LiveConfig(venue="nautilus_trader.adapters.sandbox:SandboxExecutionClientFactory", limits=Limits(**limits), **more)


def test_real_orders_need_the_option_the_limits_and_a_real_feed() -> None:
    with pytest.raises(InputError, match="add --live"):
        check(real())
    with pytest.raises(InputError, match="set capital, max_order, max_position"):
        check(real(live=True).model_copy(update={"limits": Limits()}))
    with pytest.raises(InputError, match="choose a real feed"):
        check(real(live=True))
    with pytest.raises(InputError, match="cannot be imported"):
        check(LiveConfig(venue="nowhere:Factory", live=True))
    with pytest.raises(InputError, match="is unknown"):
        check(LiveConfig(venue="nasdaq"))
    for paper in ("sandbox", "test"):
        with pytest.raises(InputError, match=f"--venue {paper} takes none"):
            check(LiveConfig(venue=paper, live=True))


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"feed": "polygon", "symbols": ("AAPL",), "artifacts": Path("a")}, "Databento's protocol"),
        ({"venue_config": {"port": 1}}, "knows address and faults, not port"),
        ({"venue_config": {"faults": ["flood"]}}, "is none of drop"),
        ({"venue_config": {"address": "x:1", "faults": ["drop"]}}, "over its line"),
    ],
)
def test_the_test_venue_says_what_it_cannot_be_asked(more: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYGON_API_KEY", "x")
    check(LiveConfig(venue="test", venue_config={"faults": ["race@3:2"]}))
    with pytest.raises(InputError, match=why):
        check(LiveConfig(venue="test", **more))


def test_real_orders_need_the_name_of_the_venue_typed() -> None:
    confirm(LiveConfig(), ask=lambda _: pytest.fail("the sandbox asks nothing"))
    confirm(LiveConfig(venue="test"), ask=lambda _: pytest.fail("nor does the test venue"))
    confirm(real(live=True), ask=lambda _: " SandboxExecutionClientFactory ")
    for typed in ("", "yes", "sandboxexecutionclientfactory"):
        with pytest.raises(InputError, match="not confirmed"):
            confirm(real(live=True), ask=lambda _, typed=typed: typed)

    def closed(_: str) -> str:
        raise EOFError

    with pytest.raises(InputError, match="not confirmed"):
        confirm(real(live=True), ask=closed)


@pytest.mark.parametrize("n", [1, 2])
def test_the_brokers_of_the_documentation_are_configured_as_it_says(n: int) -> None:
    """Their adapters take the configuration; nothing is connected."""
    text = (ROOT / "docs" / "live.md").read_text().split("A broker\n")[1].split("```toml")[n].split("```")[0]
    values = tomllib.loads(text)
    config = LiveConfig.model_validate(values | {"feed": "databento"})
    (client,) = venues(config, Prepared([], Path(), ""), 0, None)
    assert client.name == values["venue_config"]["name"] and type(client.factory).__name__ == config.venue.split(":")[1]
    broken = config.model_copy(update={"venue_config": values["venue_config"] | {"bogus": 1}})
    with pytest.raises(InputError, match="venue_config does not fit"):
        venues(broken, Prepared([], Path(), ""), 0, None)
    nameless = config.model_copy(update={"venue_config": {"class": values["venue_config"]["class"]}})
    with pytest.raises(InputError, match="needs `class`"):
        venues(nameless, Prepared([], Path(), ""), 0, None)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--feed", "bloomberg"], "--feed: input should be 'replay', 'databento' or 'polygon'"),
        (["--speed", "-1"], "--speed: input should be greater than or equal to 0"),
        (["--duration", "0"], "--duration: input should be greater than 0"),
        (["--port", "70000"], "--port: input should be less than or equal to 65535"),
        (["--artifacts", "/nowhere"], "/nowhere/manifest.json is missing"),
        (["--config", "/nowhere.toml"], "cannot read --config /nowhere.toml"),
        (["--bogus"], "No such option: --bogus"),
    ],
)
def test_a_wrong_command_line_costs_one_line_and_code_2(options: list[str], why: str, tmp_path: Path, small: Small) -> None:
    config = tmp_path / "c.toml"
    config.write_text(f"dbn = {json.dumps([str(p) for p in last_session(small)])}\n")
    source = [] if "--config" in options else ["--config", str(config)]
    command = [sys.executable, "run_live.py", "--state", str(tmp_path / "s"), *source, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WITHIN_S)
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and why in said[0] and "Traceback" not in done.stderr


# --- time and limits ------------------------------------------------------------------------------------------------------------------


class Wall:
    """A wall clock that a test turns."""

    def __init__(self) -> None:
        self.ns, self.alerts = 1_000 * SCALE, list[tuple[int, Any]]()

    def timestamp_ns(self) -> int:
        return self.ns

    def set_time_alert_ns(self, name: str, alert_time_ns: int, callback: Any = None) -> None:
        self.alerts.append((alert_time_ns, callback))


def test_a_replays_time_runs_at_its_speed_from_the_first_event_on() -> None:
    wall = Wall()
    pace = Pace(5 * SCALE, 0, 20.0, wall.timestamp_ns)
    assert pace.now() == 5 * SCALE
    pace.see(7 * SCALE)
    wall.ns += SCALE
    assert pace.now() == 27 * SCALE == pace.stream(wall.ns) and pace.wall(47 * SCALE) == wall.ns + SCALE
    pace.see(26 * SCALE)
    assert pace.now() == 27 * SCALE
    pace.see(30 * SCALE)  # the first one had been held up
    assert pace.now() == 30 * SCALE
    ran: list[str] = []
    Paced(wall, pace).set_time_alert_ns("a", 50 * SCALE, lambda _: ran.append("a"))
    ((at, alert),) = wall.alerts
    assert at == wall.ns + SCALE and ran == []
    pace.see(50 * SCALE)  # a later stamp has come before the clock's alert: the loop was held up
    assert ran == ["a"]
    alert(None)
    assert ran == ["a"]


def test_an_unthrottled_replays_time_is_its_newest_stamp_and_alerts_go_with_it() -> None:
    wall, ran = Wall(), list[int]()
    pace = Pace(0, 0, 0.0, wall.timestamp_ns)
    clock = Paced(wall, pace)
    for ts in (30, 10, 20):
        clock.set_time_alert_ns("x", ts, lambda _, ts=ts: ran.append(ts))
    pace.see(5)
    assert clock.timestamp_ns() == 5 and ran == []
    pace.see(20)
    pace.see(15)
    assert clock.timestamp_ns() == 20 and ran == [10, 20] and wall.alerts == []
    pace.see(30)
    assert ran == [10, 20, 30]


@pytest.mark.parametrize(
    ("limits", "size", "held", "why"),
    [
        ({"max_order": 7.0}, 8, 0, "order size"), ({"max_order": 7.0}, 7, 0, None), ({"max_position": 7.0}, 4, -4, "position"),
        ({"max_position": 8.0}, 4, -4, None), ({"max_notional": 0.1, "capital": 5_000.0}, 6, 0, "notional"),
        ({"max_notional": 0.1, "capital": 5_000.0}, 5, 0, None),
    ],
)  # fmt: skip
def test_an_entry_that_somebody_else_decided_on_is_held_to_the_limits(limits: Any, size: int, held: int, why: str | None) -> None:
    from tapes import SHARE

    ledger = Ledger([SHARE], Limits(**limits))
    ledger.positions[0].size = held * SCALE
    assert ledger.beyond(0, size * SCALE, 100.0) == (why and f"beyond the limit: {why}")


def test_entries_are_held_back_by_their_rate_and_their_size() -> None:
    from tapes import SHARE

    ledger = Ledger([SHARE], Limits(max_order_rate=3, max_order=7.0))
    assert ledger.size(0, 100.0, 0.05, "calm") == 7 * SCALE
    for n in range(3):
        assert ledger.halted(0, n) is None
        ledger.entered(n)
    assert ledger.halted(0, SCALE - 1) == "halted: order rate" and ledger.halted(0, SCALE) is None
