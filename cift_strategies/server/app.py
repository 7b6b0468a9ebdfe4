"""The routes: what the node last told, one prediction on request, and the commands that go back to the node."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import Body, Depends, FastAPI, Query, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse
from fastapi.security import HTTPBearer

from cift_models.artifacts import code_version
from cift_strategies.server import requests as r
from cift_strategies.server import streams
from cift_strategies.server.link import Reader
from cift_strategies.server.metrics import Metrics
from cift_strategies.server.mirror import FRAME, Mirror, Told, encode
from cift_strategies.server.problems import Fault, FieldError, Problem, install, responses
from cift_strategies.server.schemas import Frame
from cift_strategies.server.window import Windows

HERE: Final = Path(__file__).resolve().parent
HEADERS: Final = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_bearer = HTTPBearer(auto_error=False, description="the token in the file `token` of the state folder")
type Symbol = Annotated[str | None, Query(max_length=64, description="of this instrument alone", examples=["AAPL.XNAS"])]


def page_folder() -> Path:
    """Where the page lies: the built dashboard, or the plain page where that was not built."""
    return HERE / "static" if (HERE / "static" / "index.html").is_file() else HERE / "plain"


def make_app(mirror: Mirror, reader: Reader, windows: Windows, metrics: Metrics, artifacts: Path | None = None) -> FastAPI:
    """The application without its guard. `artifacts`: models for windows, where the node's own are not to be used."""
    app = FastAPI(
        title="CIFT", version=code_version(), docs_url=None, redoc_url=None,
        description="What a running node thinks, holds and does, and the commands it takes. Errors are problem details (RFC 9457).",
    )  # fmt: skip
    install(app)
    app.include_router(streams.router(mirror))
    _reading(app, mirror)
    _commands(app, mirror, reader)
    _predict(app, mirror, windows, artifacts)
    _pages(app, mirror, metrics)
    _document(app)
    return app


def _json(text: str) -> Response:
    return Response(text, media_type="application/json")


def _reading(app: FastAPI, mirror: Mirror) -> None:
    def frame() -> Told:
        if mirror.frame is None:
            raise Fault(503, "the node has told nothing yet", {"Retry-After": "1"})
        return mirror.frame

    def told(**content: str) -> Response:
        """`content`: JSON by name."""
        head = encode({"ts": frame()["ts"], "age_ms": round(mirror.age_s * 1e3, 3), "connected": mirror.connected})
        return _json(f"{head[:-1]},{','.join(f'"{name}":{text}' for name, text in content.items())}}}")

    def now(name: str, make: Callable[[Told], Any]) -> str:
        """What `make` gives of the newest frame."""
        f = frame()
        return mirror.text(FRAME, name, lambda: make(f))

    def of(log: str, symbol: str | None, items: Callable[[], Iterable[Told]], working: bool = False) -> str:
        """The entries of `log`: those of `symbol`, those that still work, or all."""
        frame()
        if symbol is not None and symbol not in mirror.info:
            raise Fault(404, f"no instrument {symbol} here; there are {', '.join(mirror.info) or 'none yet'}")

        def mine(x: Told) -> bool:
            return (symbol is None or x["symbol"] == symbol) and (not working or x["open"])

        return mirror.text(log, (symbol, working), lambda: [x for x in items() if mine(x)])

    def route(path: str, model: Any, summary: str, *statuses: int) -> Callable[[Any], Any]:
        return app.get(f"/api/v1/{path}", response_model=model, summary=summary, tags=["state"], responses=responses(503, *statuses))

    @route("snapshot", Frame, "Everything the page shows, as a snapshot frame")
    async def snapshot() -> Response:
        return _json(now("snapshot", lambda _: mirror.snapshot()))

    @route("instruments", r.Instruments, "The instruments that are traded")
    async def instruments() -> Response:
        return told(items=now("instruments", lambda _: list(mirror.info.values())))

    @route("positions", r.Positions, "Net positions", 404, 422)
    async def positions(symbol: Symbol = None) -> Response:
        return told(items=of(FRAME, symbol, lambda: frame()["positions"]))

    @route("orders", r.Orders, "Orders, newest state of each", 404, 422)
    async def orders(symbol: Symbol = None, working: Annotated[bool, Query(description="only those that still work")] = False) -> Response:
        return told(items=of("orders", symbol, mirror.orders.values, working))

    @route("fills", r.Fills, "Fills", 404, 422)
    async def fills(symbol: Symbol = None) -> Response:
        return told(items=of("fills", symbol, lambda: mirror.logs["fills"]))

    @route("trades", r.Trades, "Closed trades, entry to exit", 404, 422)
    async def trades(symbol: Symbol = None) -> Response:
        return told(items=of("trades", symbol, lambda: mirror.logs["trades"]))

    @route("decisions", r.Decisions, "What was decided, and why", 404, 422)
    async def decisions(symbol: Symbol = None) -> Response:
        items = of("decisions", symbol, lambda: mirror.logs["decisions"])
        return told(declined=now("declined", lambda f: f["node"]["declined"]), items=items)

    @route("pnl", r.PnlNow, "Profit and loss, net of costs")
    async def pnl() -> Response:
        curve = now("curve", lambda _: {k: list(v) for k, v in mirror.pnl.items()})
        return told(items=now("pnl", lambda f: f["pnl"]), curve=curve)

    @route("regime", r.Regimes, "Market regimes")
    async def regime() -> Response:
        by_symbol = now("regime", lambda f: {x["symbol"]: x["regime"] for x in f["instruments"]})
        changes = mirror.text("regimes", None, lambda: list(mirror.logs["regimes"]))
        return told(names=now("regimes", lambda f: f["models"]["regimes"]), now=by_symbol, changes=changes)

    @route("weights", r.WeightsNow, "The ensemble's weights")
    async def weights() -> Response:
        history = mirror.text("weights", None, lambda: list(mirror.logs["weights"]))
        return told(weights=now("weights", lambda _: mirror.weights), history=history)

    @route("feeds", r.Feeds, "Health of the data feeds")
    async def feeds() -> Response:
        return told(items=now("feeds", lambda f: f["feeds"]))

    @route("latency", r.Latency, "How long each stage takes")
    async def latency() -> Response:
        return told(items=now("latency", lambda f: f["latency"]))

    @route("models/status", r.ModelsStatus, "The models that are in use")
    async def models() -> Response:
        return told(**{k: encode(v) for k, v in frame()["models"].items()})


def _commands(app: FastAPI, mirror: Mirror, reader: Reader) -> None:
    def route(path: str, model: Any, summary: str) -> Callable[[Any], Any]:
        told = responses(401, 409, 413, 422, 503, 504)
        return app.post(
            f"/api/v1/{path}", response_model=model, summary=summary, tags=["commands"], responses=told, dependencies=[Depends(_bearer)]
        )

    @route("pipeline/start", r.Commanded, "Take up entries again, after a pause or a kill")
    async def start() -> Told:
        return await reader.ask("resume", {})

    @route("pipeline/stop", r.Commanded, "Pause: no new entries; open positions are managed as before")
    async def stop() -> Told:
        return await reader.ask("pause", {})

    @route("kill", r.Commanded, "Cancel everything, close every position, and enter nothing until started by hand")
    async def kill(asked: Annotated[r.Kill, Body()] = r.Kill()) -> Told:  # noqa: B008 - immutable
        return await reader.ask("kill", {"reason": asked.reason})

    @route("models/reload", r.Reloaded, "Put other models in place of the running ones, between two predictions")
    async def reload(asked: Annotated[r.Reload, Body()] = r.Reload()) -> Told:  # noqa: B008 - immutable
        path = asked.path or (None if mirror.frame is None else mirror.frame["models"]["path"])
        if path is None:
            raise Fault(409, "the node has not told where its models lie: name a path")
        return await reader.ask("reload", {"path": path}, within=60.0)


def _predict(app: FastAPI, mirror: Mirror, windows: Windows, artifacts: Path | None) -> None:
    @app.post(
        "/api/v1/predict", response_model=r.PredictResponse, summary="One prediction from a window of events or features",
        tags=["predictions"], responses=responses(404, 409, 413, 422, 503),
    )  # fmt: skip
    async def predict(asked: r.PredictRequest) -> r.PredictResponse:
        models = {} if mirror.frame is None else mirror.frame["models"]
        path = models.get("path") if artifacts is None else str(artifacts)
        return await windows.predict(asked, path, models.get("version", ""), mirror.info)


def _pages(app: FastAPI, mirror: Mirror, metrics: Metrics) -> None:
    folder = page_folder()

    @app.get("/health", response_model=r.Health, summary="Whether this server lives", tags=["server"])
    async def health() -> r.Health:
        return r.Health(version=app.version)

    @app.get(
        "/ready", response_model=r.Ready, summary="Whether the node is there and tells what it does", tags=["server"],
        responses={503: {"model": r.Ready, "description": "Not yet, or not any more"}},
    )  # fmt: skip
    async def ready(response: Response) -> r.Ready:
        response.status_code = 200 if mirror.fresh else 503
        age = None if mirror.frame is None else mirror.age_s * 1e3
        return r.Ready(ready=mirror.fresh, connected=mirror.connected, age_ms=age, state=mirror.status()["state"])

    @app.get("/metrics", summary="Metrics for Prometheus", tags=["server"], response_class=Response)
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = file.relative_to(folder).as_posix()
        app.get("/" if name == "index.html" else f"/{name}", include_in_schema=False)(_file(file))


def _file(path: Path) -> Callable[[], Awaitable[FileResponse]]:
    async def send() -> FileResponse:
        return FileResponse(path, headers=HEADERS)

    return send


def _document(app: FastAPI) -> None:
    """Describe the routes now: at the first request, everybody would wait for it (0.1 s)."""
    told = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = told["components"]["schemas"]
    for model in (Problem, FieldError):
        schemas[model.__name__] = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas[model.__name__].pop("$defs", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    app.openapi = lambda: told  # type: ignore[method-assign]
