"""The API beside a node: what it answers, whom it obeys, and what becomes of it when either side goes away. A real process, a real link."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from nodes import GUARD_S, Collector, Served, serving, watch
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from catalog.events import read_catalog
from cift_strategies.server import requests as r
from cift_strategies.server.__main__ import NICE, listen
from cift_strategies.server.app import make_app
from cift_strategies.server.guard import ADDRESSES, Guard, Rates
from cift_strategies.server.link import Reader
from cift_strategies.server.metrics import Metrics
from cift_strategies.server.mirror import Mirror
from cift_strategies.server.schemas import Frame
from cift_strategies.server.window import WAITING, Windows

ROOT = Path(__file__).resolve().parents[2]
LISTS = {
    "instruments": r.Instruments, "positions": r.Positions, "orders": r.Orders, "fills": r.Fills, "trades": r.Trades,
    "decisions": r.Decisions, "pnl": r.PnlNow, "regime": r.Regimes, "weights": r.WeightsNow,
    "feeds": r.Feeds, "latency": r.Latency, "models/status": r.ModelsStatus,
}  # fmt: skip


@pytest.fixture(scope="session")
def messages(small: Any) -> list[dict[str, Any]]:
    """What a monitor tells of half a minute of the small market, with models that were trained on it."""
    from cift_models.hmm import REGIMES
    from cift_models.inference import Engine, stream
    from cift_models.windows import HORIZONS_NS
    from cift_strategies.inference_actor import Delay, LookAhead

    table, _ = read_catalog(small.catalog)
    span = small.result.start_ns, small.result.start_ns + 30 * 10**9
    engine = Engine.load(small.artifact, table)
    blocks = stream(table, read_catalog(small.catalog, [x.id for x in table], *span)[1])
    link = Collector()
    ahead = LookAhead(blocks, engine, Delay(len(table), 1, fixed_ns=10**6), HORIZONS_NS, len(table))
    watched = watch(small.catalog, ahead, link, regimes=REGIMES, instruments=table, span=span, strategy="own_strategies:Eager")
    assert watched.strategy.fills
    frames = [m for m in link.messages if "kind" in m]
    for m in frames:
        m["models"]["path"] = str(small.artifact)
    return frames


@pytest.fixture(scope="module")
def served(messages: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served"), messages) as found:
        found.node.tell(120)
        found.until(lambda: found.http.get("/api/v1/snapshot").json()["seq"] == 121)
        yield found


def test_frames_of_models_have_the_published_form(messages: list[dict[str, Any]]) -> None:
    frames = [Frame.model_validate(m) for m in messages]
    assert len(frames) > 250 and {x.symbol for x in frames[-1].instruments} == {x.symbol for x in frames[0].info or []}
    assert frames[-1].weights is None or frames[-1].weights.members == ["hawkes", "transformer", "hmm", "gnn", "fusion"]
    said = [x.prediction for x in frames[-1].instruments if x.prediction is not None]
    assert said and all(len(p.horizons) == 4 and list(p.horizons[0].votes) == [m.member for m in frames[-1].models.members] for p in said)
    assert any(v is not None for p in said for v in p.horizons[0].votes.values())


@pytest.mark.parametrize("path", LISTS)
def test_every_list_has_the_published_form(served: Served, path: str) -> None:
    answer = served.http.get(f"/api/v1/{path}")
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    told = LISTS[path].model_validate(answer.json())
    assert told.connected and told.ts == served.node.messages[120]["ts"]


def test_the_lists_are_what_the_node_told(served: Served, messages: list[dict[str, Any]]) -> None:
    told = messages[:121]
    fills = [x for m in told for x in m["logs"].get("fills", [])]
    assert fills and served.http.get("/api/v1/fills").json()["items"] == fills
    assert served.http.get("/api/v1/positions").json()["items"] == told[-1]["positions"]
    assert served.http.get("/api/v1/pnl").json()["items"] == told[-1]["pnl"]
    orders = {x["id"]: x for m in told for x in m["logs"].get("orders", [])}
    assert {x["id"]: x for x in served.http.get("/api/v1/orders").json()["items"]} == orders
    working = served.http.get("/api/v1/orders", params={"working": True}).json()["items"]
    assert working == [x for x in served.http.get("/api/v1/orders").json()["items"] if x["open"]]
    symbol = fills[0]["symbol"]
    mine = served.http.get("/api/v1/fills", params={"symbol": symbol}).json()["items"]
    assert mine == [x for x in fills if x["symbol"] == symbol]
    assert Frame.model_validate(served.http.get("/api/v1/snapshot").json()).kind == "snapshot"


def test_a_list_that_was_asked_for_before_is_told_anew_when_it_has_changed(messages: list[dict[str, Any]]) -> None:
    mirror = Mirror()
    app = make_app(mirror, Reader(Path("none"), mirror.take), Windows(), Metrics(mirror))

    async def ask() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://node") as http:
            for n, message in enumerate(messages[:80]):
                mirror.take(json.loads(json.dumps(message)))
                logs = {k: [x for m in messages[: n + 1] for x in m["logs"].get(k, [])] for k in ("fills", "trades", "decisions", "orders")}
                symbol = message["instruments"][n % 2]["symbol"]
                newest = {x["id"]: x for x in logs["orders"]}
                working = {k for k, x in newest.items() if x["open"]}
                assert (await http.get("/api/v1/fills")).json()["items"] == logs["fills"]
                trades = (await http.get(f"/api/v1/trades?symbol={symbol}")).json()["items"]
                assert trades == [x for x in logs["trades"] if x["symbol"] == symbol]
                assert {x["id"] for x in (await http.get("/api/v1/orders?working=true")).json()["items"]} == working
                told = (await http.get("/api/v1/decisions")).json()
                assert told["items"] == logs["decisions"] and told["declined"] == message["node"]["declined"]
                assert (await http.get(f"/api/v1/positions?symbol={symbol}")).json()["items"] == [message["positions"][n % 2]]
                assert (await http.get("/api/v1/snapshot")).json()["seq"] == message["seq"] == n + 1

    asyncio.run(ask())


def test_an_unknown_instrument_is_a_problem_that_names_the_known_ones(served: Served) -> None:
    answer = served.http.get("/api/v1/fills", params={"symbol": "NONE.XNAS"})
    assert answer.status_code == 404 and answer.headers["content-type"] == "application/problem+json"
    assert served.node.messages[0]["info"][0]["symbol"] in answer.json()["detail"] and answer.json()["title"] == "Not Found"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("GET", "/nothing", None, 404, "there is no /nothing"),
        ("GET", "/api/v1/nothing", None, 404, "/openapi.json"),
        ("DELETE", "/api/v1/fills", None, 405, "/api/v1/fills takes GET"),
        ("POST", "/api/v1/predict", b"{", 400, "JSON"),
        ("POST", "/api/v1/predict", b"{}", 422, "symbol"),
        ("GET", "/api/v1/orders?working=perhaps", None, 422, "query.working"),
    ],
)
def test_what_is_wrong_is_told_as_problem_details(
    served: Served, method: str, path: str, body: bytes | None, status: int, says: str
) -> None:
    answer = served.http.request(method, path, content=body, headers={**served.bearer, "Content-Type": "application/json"})
    told = answer.json()
    assert answer.status_code == told["status"] == status and answer.headers["content-type"] == "application/problem+json"
    assert told["type"] == "about:blank" and says in told["detail"]
    assert status != 405 or answer.headers["allow"]


# --- who may ask ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["kill", "pipeline/start", "pipeline/stop", "models/reload"])
def test_what_changes_anything_needs_the_token(served: Served, path: str) -> None:
    before = len(served.node.commands)
    wrong = [{"Authorization": f"Bearer {served.token}x"}, {"Authorization": f"Basic {served.token}"}]
    for headers in ({}, *wrong, {"Cookie": f"cift_token={served.token}"}):
        answer = served.http.post(f"/api/v1/{path}", headers=headers)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["content-type"] == "application/problem+json"
    assert len(served.node.commands) == before


def test_the_token_is_made_once_and_only_its_owner_may_read_it(served: Served) -> None:
    file = served.node.folder / "token"
    assert file.stat().st_mode & 0o777 == 0o600 and len(served.token) >= 32
    assert served.node.link.path.stat().st_mode & 0o077 == 0


def test_a_token_that_others_could_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("x" * 40)
    (tmp_path / "token").chmod(0o644)
    done = _start(tmp_path)
    assert done.returncode == 2 and "has mode 644" in done.stderr and "Traceback" not in done.stderr


def test_the_server_yields_to_the_node(served: Served) -> None:
    assert served.supervisor.process is not None
    pid = served.supervisor.process.pid
    assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICE)
    group = Path(f"/proc/{pid}/autogroup")
    if group.exists() and Path("/proc/sys/kernel/sched_autogroup_enabled").read_text().strip() == "1":
        assert group.read_text().split()[-2:] == ["nice", str(NICE)]


def test_a_taken_port_is_told_in_one_line(served: Served, tmp_path: Path) -> None:
    done = _start(tmp_path, "--port", served.url.rsplit(":", 1)[1])
    assert done.returncode == 2
    assert re.fullmatch(r"error: cannot listen at 127.0.0.1:\d+ \(.+\): choose another --port or --host\n", done.stderr)


def test_no_answer_is_held_back_for_the_one_before_it() -> None:
    async def accepted() -> int:
        loop = asyncio.get_running_loop()
        met: asyncio.Future[int] = loop.create_future()

        class Greeter(asyncio.Protocol):
            def connection_made(self, transport: Any) -> None:
                met.set_result(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
                transport.close()

        listener = listen("127.0.0.1", 0)
        async with await loop.create_server(Greeter, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            writer.close()
            return await met

    assert asyncio.run(accepted()) == 1


def test_another_host_name_is_not_answered(served: Served) -> None:
    """A page elsewhere that has its name resolve to this machine gets nothing."""
    answer = served.http.get("/api/v1/positions", headers={"Host": "evil.example"})
    assert answer.status_code == 421
    assert served.http.get("/health", headers={"Host": "localhost:1"}).status_code == 200


def test_a_request_that_is_too_long_is_refused(served: Served) -> None:
    whole = served.http.post("/api/v1/predict", content=b"[" + b" " * (9 << 20), headers={"Content-Type": "application/json"})
    assert whole.status_code == 413
    pieces = served.http.post("/api/v1/predict", content=(b" " * 65_536 for _ in range(200)), headers={"Content-Type": "application/json"})
    assert pieces.status_code == 413


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 20_000, 431),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: " + b"b" * 100_000, 431),
        (b"GET /" + b"a" * 100_000, 431),
        (b"NOTHING AT ALL\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    ],
)  # fmt: skip
def test_what_is_no_request_or_never_becomes_one_is_answered_and_ended(served: Served, sent: bytes, status: int) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), GUARD_S) as line:
        line.sendall(sent)
        answer = b"".join(iter(lambda: line.recv(65_536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status) and b"content-type: application/problem+json" in head
    assert json.loads(body)["status"] == status
    assert served.http.get("/health").status_code == 200


def test_head_tells_what_get_would_send_and_sends_nothing(served: Served) -> None:
    for path in ("/", "/health", "/ready", "/api/v1/instruments", "/api/v1/fills?symbol=NONE", "/nothing"):
        whole, head = served.http.get(path), served.http.head(path)
        assert head.status_code == whole.status_code and head.content == b"" and len(whole.content) > 10
        same = [{k: v for k, v in x.headers.items() if k not in ("date", "content-length")} for x in (head, whole)]
        assert same[0] == same[1] and "content-length" in head.headers
    instruments = served.http.head("/api/v1/instruments")
    assert abs(int(instruments.headers["content-length"]) - len(served.http.get("/api/v1/instruments").content)) < 10  # its age_ms
    assert served.http.head("/api/v1/kill").status_code == 405
    told = served.http.get("/metrics").text
    assert 'cift_server_requests_total{method="HEAD",route="/api/v1/instruments",status="200"}' in told


def test_nobody_without_the_token_can_use_up_what_a_kill_needs() -> None:
    """Against a stopped clock, so that nothing is granted anew: 50 commands with the token pass, however many came without it."""

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def ask() -> None:
        guard = Guard(app, "right", ("node",), (), False, Rates(clock=lambda: 0.0))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://node") as http:
            right = {"Authorization": "Bearer right"}
            assert {(await http.post("/api/v1/kill", headers={"Authorization": "Bearer wrong"})).status_code for _ in range(200)} == {401}
            assert {(await http.post("/health")).status_code for _ in range(200)} == {401}  # what is open is open for reading
            while (await http.get("/api/v1/positions")).status_code != 429:
                pass
            assert [(await http.post("/api/v1/kill", headers=right)).status_code for _ in range(50)] == [200] * 50
            late = await http.post("/api/v1/kill", headers=right)
            assert late.status_code == 429 and late.headers["retry-after"] == "1"
            assert late.headers["content-type"] == "application/problem+json"

    asyncio.run(ask())


def test_rates_are_granted_anew_as_time_passes_and_forgotten_for_the_oldest_address() -> None:
    now = [0.0]
    rates = Rates({"any": (2.0, 4.0)}, lambda: now[0])
    assert [rates.wait("a", "any") for _ in range(5)] == [0, 0, 0, 0, 0.5]
    assert rates.wait("b", "any") == 0
    now[0] = 0.5
    assert rates.wait("a", "any") == 0 and rates.wait("a", "any") == 0.5
    for n in range(ADDRESSES):
        rates.wait(f"x{n}", "any")
    assert rates.wait("a", "any") == 0 and len(rates._left) == ADDRESSES


def test_at_another_address_everything_needs_the_token(messages: list[dict[str, Any]], tmp_path: Path) -> None:
    with serving(tmp_path, messages, "--host", "0.0.0.0") as s:
        for path in ("/", "/metrics", "/api/v1/positions", "/openapi.json"):
            assert s.http.get(path).status_code == 401
            assert s.http.get(path, headers=s.bearer).status_code == 200
        assert s.http.get("/health").status_code == s.http.get("/ready").status_code == 200
        with httpx.Client(base_url=s.url) as browser:
            assert browser.get("/", params={"token": "wrong"}).status_code == 401
            entered = browser.get("/", params={"token": s.token})
            assert entered.status_code == 303 and "HttpOnly" in entered.headers["set-cookie"] and entered.headers["location"] == "/"
            assert browser.get("/api/v1/positions").status_code == 200
            assert browser.post("/api/v1/kill").status_code == 401  # reading, not commanding

        async def sockets() -> None:
            at = s.url.replace("http", "ws") + "/api/v1/frames"
            with pytest.raises(InvalidStatus, match="401") as refused:
                await connect(at)
            assert refused.value.response.headers["content-type"] == "application/problem+json"
            async with connect(at, subprotocols=["cift", f"cift.bearer.{s.token}"]) as ws:  # type: ignore[list-item]
                assert ws.subprotocol == "cift" and json.loads(await ws.recv())["kind"] == "snapshot"

        asyncio.run(sockets())


def test_pages_of_other_hosts_may_not_open_the_stream(served: Served) -> None:
    at = served.url.replace("http", "ws") + "/api/v1/predict/stream"

    said = [*served.supervisor._errors]

    async def sockets() -> None:
        for other in ("http://evil.example", "null", "http://[", served.url.replace("http", "https") + "0"):
            with pytest.raises(InvalidStatus, match="403") as refused:
                await connect(at, origin=other)  # type: ignore[arg-type]
            assert "--origin" in json.loads(refused.value.response.body)["detail"]
        assert [*served.supervisor._errors] == said  # a refusal is no fault of the server's
        async with connect(at, origin=served.url) as ws:  # type: ignore[arg-type]
            assert json.loads(await ws.recv())["type"] == "snapshot"

    asyncio.run(sockets())


# --- commands -------------------------------------------------------------------------------------------------------------------------


def test_commands_reach_the_node_and_its_answer_comes_back(served: Served) -> None:
    del served.node.commands[:]
    assert served.http.post("/api/v1/pipeline/stop", headers=served.bearer).json() == {"state": "paused"}
    assert served.http.get("/ready").json()["state"] == "paused"  # no frame has come since
    assert served.http.post("/api/v1/kill", headers=served.bearer, json={"reason": "smoke"}).json() == {"state": "killed"}
    assert served.http.post("/api/v1/pipeline/start", headers=served.bearer).json() == {"state": "running"}
    told = served.http.post("/api/v1/models/reload", headers=served.bearer, json={"path": "out/next"})
    assert told.json() == {"version": "v2", "path": "out/next", "members": {"hmm": "kept"}}
    assert served.node.commands == [("pause", {}), ("kill", {"reason": "smoke"}), ("resume", {}), ("reload", {"path": "out/next"})]


def test_an_artifact_that_the_node_refuses_is_a_conflict(served: Served) -> None:
    told = served.http.post("/api/v1/models/reload", headers=served.bearer, json={"path": "out/bad"})
    assert told.status_code == 409 and told.json()["detail"] == "out/bad/manifest.json is missing"


def test_a_node_that_fails_at_a_command_says_so(messages: list[dict[str, Any]], tmp_path: Path) -> None:
    def fails(_name: str, _args: dict[str, Any]) -> Any:
        raise KeyError("lost")

    with serving(tmp_path, messages) as s:
        s.node.answer = fails
        told = s.http.post("/api/v1/kill", headers=s.bearer)
        assert told.status_code == 500 and "lost" in told.json()["detail"]


# --- windows --------------------------------------------------------------------------------------------------------------------------


def test_a_window_of_the_market_gets_the_prediction_that_a_fresh_engine_makes_of_it(served: Served, small: Any) -> None:
    from cift_models.inference import Engine, stream
    from cift_models.windows import Block

    table, _ = read_catalog(small.catalog)
    x, start = table[0], small.result.start_ns
    events = next(iter(read_catalog(small.catalog, [x.id], start, start + 200 * 10**9)[1]))[:2_000]
    window = [
        {"ts": int(e["ts_init"]), "ts_event": int(e["ts_event"]), "action": chr(e["action"]), "side": int(e["side"]),
         "price": None if e["action"] == ord("R") else int(e["price"]) / 1e9, "size": int(e["size"]) / 1e9, "order_id": int(e["order_id"])}
        for e in events
    ]  # fmt: skip
    told = r.PredictResponse.model_validate(served.http.post("/api/v1/predict", json={"symbol": x.id, "events": window}).json())
    engine = Engine.load(small.artifact, [x])
    (block,) = stream([x], [events])
    closes = block.closes if block.closes[-1] == len(events) - 1 else [*block.closes, len(events) - 1]
    p = engine.predict(Block(block.events, block.rows, closes))  # type: ignore[arg-type]
    assert told.events == len(events) > 500 and told.model_version == engine.model_version and told.prediction.ts == events["ts_init"][-1]
    for h, horizon in enumerate(told.prediction.horizons):
        assert horizon.proba == pytest.approx(p.proba[-1, h], abs=1e-4) and horizon.direction == p.direction[-1, h]
    again = served.http.post("/api/v1/predict", json={"symbol": x.id, "events": window}).json()
    assert again["prediction"]["horizons"] == told.model_dump(mode="json")["prediction"]["horizons"]  # nothing is left of the first


def test_features_by_name_are_enough_for_those_members_that_live_on_them(served: Served) -> None:
    symbol = served.node.messages[0]["info"][0]["symbol"]
    row = {"ts": 1_741_614_600_000_000_000, "values": {"mid": 100.005, "spread": 1.0}}
    late = {"ts": row["ts"] + 1, "values": {"mid": 100.015, "spread": 3.0}}
    told, again = (
        r.PredictResponse.model_validate(served.http.post("/api/v1/predict", json={"symbol": symbol, "features": rows}).json())
        for rows in ([row, late], [late, row])
    )
    assert told.prediction.horizons == again.prediction.horizons and told.prediction.ts == late["ts"]  # in whatever order they came
    assert told.prediction.horizons[0].votes["fusion"] is not None and told.prediction.horizons[0].votes["hawkes"] is None
    if told.recommendation.should_trade:
        assert told.recommendation.stop_loss is not None and told.recommendation.take_profit is not None
        assert (told.recommendation.take_profit - told.recommendation.stop_loss) * told.recommendation.direction > 0


def test_who_asks_before_the_models_are_loaded_is_told_to_ask_again_and_then_answered(messages: list[dict[str, Any]], small: Any) -> None:
    from cift_strategies.server.compute import Computer

    loading = threading.Event()

    class Slow(Computer):
        def predict(self, *how: Any) -> r.PredictResponse:
            assert loading.wait(GUARD_S)
            return super().predict(*how)

    mirror, windows = Mirror(), Windows(patience_s=0.0)
    mirror.take(json.loads(json.dumps(messages[0])))
    windows._computer = Slow(())
    app = make_app(mirror, Reader(Path("none"), mirror.take), windows, Metrics(mirror))
    row = {"ts": 1_741_614_600_000_000_000, "values": {"mid": 100.005, "spread": 1.0}}
    body = {"symbol": messages[0]["info"][0]["symbol"], "features": [row]}

    async def ask() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://node") as http:
            for n in range(WAITING + 1):
                early = await http.post("/api/v1/predict", json=body)
                assert early.status_code == 503 and early.headers["retry-after"] == "1"
                assert early.headers["content-type"] == "application/problem+json"
                assert ("the models are being loaded" if n < WAITING else "waiting already") in early.json()["detail"]
            loading.set()
            windows.patience_s = GUARD_S
            while windows._waiting:
                await asyncio.sleep(0.01)
            told = await http.post("/api/v1/predict", json=body)
            assert told.status_code == 200 and r.PredictResponse.model_validate(told.json()).events == 1

    asyncio.run(ask())


def test_a_server_that_nobody_asks_to_predict_loads_no_models(messages: list[dict[str, Any]], tmp_path: Path) -> None:
    with serving(tmp_path, messages) as s:
        assert s.supervisor.process is not None
        libraries = Path(f"/proc/{s.supervisor.process.pid}/maps")
        s.node.tell(3)
        for path in ("/", "/metrics", "/openapi.json", *(f"/api/v1/{name}" for name in LISTS)):
            assert s.http.get(path).status_code == 200
        assert "llvmlite" not in libraries.read_text()
        row = {"ts": 1, "values": {"mid": 1.0}}
        asked = {"symbol": messages[0]["info"][0]["symbol"], "features": [row]}
        s.until(lambda: s.http.post("/api/v1/predict", json=asked).status_code == 200)
        assert "llvmlite" in libraries.read_text() and "libtorch" not in libraries.read_text()


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"symbol": "NONE.XNAS", "events": [{"ts": 1, "action": "R"}]}, 404, "no instrument NONE"),
        ({"symbol": "S"}, 422, "body.events.events: Field required"),
        ({"symbol": "S", "events": [{"ts": 1, "action": "R"}], "features": [{"ts": 1, "values": {"mid": 1}}]}, 422, "not permitted"),
        ({"symbol": "", "features": [{"ts": 2, "values": {"warmth": 1}}]}, 422, "body.features.features.0.values.warmth"),
        ({"symbol": "S", "events": [{"ts": 1, "action": "X"}]}, 422, "events.0.action"),
        ({"symbol": "S", "events": [{"ts": 1, "action": "R"}] * 20_001}, 422, "at most 20000"),
    ],
)
def test_a_window_that_cannot_be_is_refused(served: Served, body: dict[str, Any], status: int, says: str) -> None:
    body = {**body, "symbol": body["symbol"] or served.node.messages[0]["info"][0]["symbol"]}
    answer = served.http.post("/api/v1/predict", json=body)
    assert answer.status_code == status and says in answer.json()["detail"]
    assert answer.headers["content-type"] == "application/problem+json"


# --- when one of them goes away -------------------------------------------------------------------------------------------------------


def test_a_server_that_was_killed_is_started_again_and_knows_all(messages: list[dict[str, Any]], tmp_path: Path) -> None:
    with serving(tmp_path, messages) as s:
        s.node.tell(60)
        s.until(lambda: s.http.get("/api/v1/snapshot").json()["seq"] == 61)
        before = s.http.get("/api/v1/fills").json()["items"]
        assert s.supervisor.process is not None
        s.supervisor.process.send_signal(signal.SIGKILL)
        s.until(lambda: s.supervisor.restarts == 1)
        s.ready()
        assert before and s.http.get("/api/v1/fills").json()["items"] == before
        assert s.http.post("/api/v1/kill", headers=s.bearer).status_code == 200  # the token is the same


def test_a_server_that_hangs_is_started_again(messages: list[dict[str, Any]], tmp_path: Path) -> None:
    with serving(tmp_path, messages, silent_s=3.0) as s:
        assert s.supervisor.process is not None
        s.supervisor.process.send_signal(signal.SIGSTOP)
        s.node.tell(0)
        s.until(lambda: s.supervisor.restarts == 1)
        s.ready()


def test_a_node_that_went_away_is_told_and_a_new_run_begins_anew(messages: list[dict[str, Any]], tmp_path: Path) -> None:
    with serving(tmp_path, messages) as s:
        s.node.tell(60)
        s.until(lambda: s.http.get("/api/v1/snapshot").json()["seq"] == 61)
        s.node.close()
        s.until(lambda: s.http.get("/ready").status_code == 503)
        old = s.http.get("/api/v1/fills").json()
        assert not old["connected"] and old["items"]
        gone = s.http.post("/api/v1/kill", headers=s.bearer)
        assert gone.status_code == 503 and gone.json()["detail"] == "the node is not connected"
        s.node.__init__(tmp_path, messages, "second")  # type: ignore[misc]
        s.ready()
        s.until(lambda: s.http.get("/api/v1/snapshot").json()["run"] == "second")
        new = s.http.get("/api/v1/fills").json()["items"]
        assert new == messages[0]["logs"].get("fills", []) and len(new) < len(old["items"])


def test_the_server_ends_with_its_node(messages: list[dict[str, Any]], tmp_path: Path) -> None:
    with serving(tmp_path, messages) as s:
        process = s.supervisor.process
        assert process is not None and process.stdin is not None
        s.supervisor._stop.set()
        process.stdin.close()
        assert process.wait(GUARD_S) == 0


# --- the page and the metrics ---------------------------------------------------------------------------------------------------------


def test_the_page_is_served_with_a_policy_and_all_it_needs(served: Served) -> None:
    page = served.http.get("/")
    assert "<html" in page.text and page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for asset in re.findall(r'(?:src|href)="(/[^"]+)"', page.text):
        assert served.http.get(asset).status_code == 200, asset
    assert served.http.get("/assets/../../schemas.py").status_code == served.http.get("/%2e%2e/schemas.py").status_code == 404


def test_metrics_name_their_units_and_agree_with_the_api(served: Served) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    text = served.http.get("/metrics").text
    families = {f.name: f for f in text_string_to_metric_families(text)}
    assert families and all(name.startswith("cift_") for name in families)
    node = served.http.get("/api/v1/snapshot").json()["node"]
    assert families["cift_events"].samples[0].value == node["counts"]["events"]
    assert {s.labels["reason"]: s.value for s in families["cift_decisions_declined"].samples} == node["declined"]
    stages = {s.labels["stage"]: s.value for s in families["cift_stage_latency_seconds"].samples if s.name.endswith("_count")}
    assert stages == {x["stage"]: x["count"] for x in served.http.get("/api/v1/latency").json()["items"]}
    pnl = {s.labels["currency"]: s.value for s in families["cift_pnl_net_currency"].samples}
    assert pnl == {x["currency"]: x["net"] for x in served.http.get("/api/v1/pnl").json()["items"]}
    routes = {s.labels["route"]: s.value for s in families["cift_server_requests"].samples if s.labels.get("status") == "200"}
    assert routes["/api/v1/snapshot"] >= 1 and not any("?" in route for route in routes)
    units = (
        "_seconds", "_total", "_currency", "_ratio", "_units", "_events", "_connected", "_state", "_clients", "_info", "_created",
        "_bucket", "_count", "_sum",
    )  # fmt: skip
    assert not [s.name for f in families.values() for s in f.samples if not s.name.endswith(units)]


def test_no_request_that_the_schema_allows_or_forbids_finds_a_fault(messages: list[dict[str, Any]], tmp_path: Path) -> None:
    """Schemathesis with all its checks; commands included, with the token."""
    with serving(tmp_path, messages) as s:
        for window in ({"features": [{"ts": 1, "values": {"mid": 1.0}}]}, {"events": [{"ts": 1, "action": "R"}]}):  # the models are loaded
            asked = {"symbol": messages[0]["info"][0]["symbol"], **window}
            s.until(lambda asked=asked: s.http.post("/api/v1/predict", json=asked).status_code == 200)
        done = threading.Event()
        telling = threading.Thread(target=lambda: [s.node.tell() for _ in iter(lambda: done.wait(0.2), True)], daemon=True)
        telling.start()
        command = [
            sys.executable, "-m", "schemathesis.cli", "run", f"{s.url}/openapi.json", "-H", f"Authorization: Bearer {s.token}", "--checks",
            "all", "-n", "5", "--seed", "1", "--request-timeout", "60", "--no-color",
        ]  # fmt: skip
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        done.set()
        telling.join()
        assert run.returncode == 0, run.stdout[-6_000:] + run.stderr[-2_000:]
        assert "21/21" in run.stdout and "WARNINGS" not in run.stdout, run.stdout[:6_000]
        assert not [line for line in s.supervisor._errors if "Traceback" in line]


def _start(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cift_strategies.server", "--link", str(folder / "none"), "--state", str(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=GUARD_S, env={**os.environ})
