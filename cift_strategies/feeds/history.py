"""The historical requests that live clients make beside their sessions: definitions above all, and any schema of the tape.

Databento's historical HTTP API as far as its clients use it: `metadata.*` and `timeseries.get_range`, with the key as the user of basic
authentication. Two paths are our own: `GET /clock` tells how the stream's time runs, `POST /fault` makes the gateway misbehave.
"""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import importlib
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from aiohttp import web
from numpy.typing import NDArray

from catalog.dbn import Span
from catalog.errors import InputError
from catalog.moments import nanoseconds
from catalog.parquet import iso
from cift_strategies.feeds.mischief import Fault
from cift_strategies.feeds.symbols import STYPES, Unresolved, resolve

if TYPE_CHECKING:
    from cift_strategies.feeds.gateway import Gateway

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
DAY: Final = 86_400_000_000_000
PIECE: Final = 1 << 20
_dbn: Any = importlib.import_module("databento_dbn")


def application(gateway: Gateway) -> web.Application:
    @web.middleware
    async def known(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.startswith("/v0/") and not gateway.owns(_user(request)):
            return _wrong("auth_authentication_failed", "Authentication failed.", 401)
        try:
            return await handler(request)
        except InputError as e:
            return _wrong("bad_request", str(e), 422)

    app = web.Application(middlewares=[known])
    app.add_routes([
        web.get("/clock", _clock(gateway)),
        web.post("/fault", _fault(gateway)),
        web.get("/v0/metadata.get_dataset_range", _dataset_range(gateway)),
        web.get("/v0/metadata.list_datasets", _list(gateway, lambda g: [g.tape.dataset])),
        web.get("/v0/metadata.list_schemas", _list(gateway, lambda g: list(g.tape.schemas))),
        web.post("/v0/metadata.get_cost", _figure(gateway, lambda n, size: 0.0)),
        web.post("/v0/metadata.get_record_count", _figure(gateway, lambda n, size: n)),
        web.post("/v0/metadata.get_billable_size", _figure(gateway, lambda n, size: n * size)),
        web.post("/v0/timeseries.get_range", _range(gateway)),
    ])  # fmt: skip
    return app


def _user(request: web.Request) -> str:
    kind, _, code = request.headers.get("Authorization", "").partition(" ")
    try:
        return base64.b64decode(code).decode().partition(":")[0] if kind == "Basic" else ""
    except ValueError:
        return ""


def _wrong(case: str, message: str, status: int) -> web.Response:
    """An error in the form of Databento's API."""
    detail = {"case": case, "message": message, "status_code": status, "docs": "docs/live.md", "payload": None}
    return web.json_response({"detail": detail}, status=status)


def _list(gateway: Gateway, of: Callable[[Gateway], list[str]]) -> Handler:
    async def handler(_: web.Request) -> web.Response:
        return web.json_response(of(gateway))

    return handler


def _clock(gateway: Gateway) -> Handler:
    async def handler(_: web.Request) -> web.Response:
        c = gateway.clock
        told = {"started": c.started.is_set(), "first_ns": c.from_ns, "wall_ns": c.wall_ns, "speed": c.speed, "now_ns": c.now()}
        return web.json_response(gateway.describe() | told | {"counts": gateway.counts})

    return handler


def _fault(gateway: Gateway) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        gateway.misbehave(Fault.parse((await request.text()).strip()))
        return web.json_response({"faults": [f"{f.kind}@{f.after}:{f.amount:g}" for f in gateway.faults]})

    return handler


def _dataset_range(gateway: Gateway) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        _dataset(gateway, request.query.get("dataset", ""))
        first, last = iso(gateway.tape.first), iso(gateway.tape.last + 1)
        whole = {"start": first, "end": last}
        return web.json_response(whole | {"schema": dict.fromkeys(gateway.tape.schemas, whole)})

    return handler


def _dataset(gateway: Gateway, name: str) -> None:
    if name != gateway.tape.dataset:
        raise InputError(f"dataset {name or '(none)'} is not played here; {gateway.tape.dataset} is")


class _Query:
    """A request for records, checked."""

    def __init__(self, gateway: Gateway, form: Any) -> None:
        def get(name: str, default: str = "") -> str:
            return str(form.get(name) or default)

        _dataset(gateway, get("dataset"))
        self.gateway, self.tape = gateway, gateway.tape
        self.schema, self.stype = get("schema", "trades"), get("stype_in", "raw_symbol")
        if self.schema not in self.tape.schemas:
            raise InputError(f"schema {self.schema} is not available; {', '.join(self.tape.schemas)} are")
        if self.stype not in STYPES:
            raise InputError(f"stype_in {self.stype} is not supported; {', '.join(STYPES)} are")
        if get("encoding", "dbn") != "dbn":
            raise InputError(f"encoding {get('encoding')} is not given here; dbn is")
        self.zipped = get("compression", "none") == "zstd"
        self.names = None if get("symbols", "ALL_SYMBOLS") == "ALL_SYMBOLS" else sorted(set(get("symbols").split(",")))
        self.start, self.end = nanoseconds(get("start", "0")), nanoseconds(get("end", str(2**63 - 1)))
        self.limit = int(get("limit", "0")) or None

    def records(self) -> NDArray[Any]:
        """uint8 (n, size): the records asked for. Takes a while: call it in a thread."""
        stream = self.tape.stream(self.schema)
        a, b = np.searchsorted(stream.ts, [self.start, self.end])
        if self.schema == "definition" and a == b:  # those that hold at `start`
            a = 0 if self.start > self.tape.first - DAY else a
        numbers, place = stream.numbers[a:b], stream.place[a:b]
        keep = np.zeros(b - a, np.bool_)
        for n, segment in enumerate(self.tape.segments):
            end = self.tape.segments[n + 1].first if n + 1 < len(self.tape.segments) else self.tape.end + 1
            inside = (place < end) & ((place >= segment.first) | (n == 0))
            ids = np.array([s.number for s in self._spans(segment)], np.uint32)
            keep |= inside & np.isin(numbers, ids)
        return stream.records[a:b][keep][: self.limit]

    def _spans(self, segment: Any) -> list[Span]:
        found = resolve(segment, self.names, self.stype, self.tape)
        return [s for _, s in (found.rest if isinstance(found, Unresolved) else found)]

    def metadata(self) -> bytes:
        """DBN metadata with the symbols' mappings."""
        mappings: dict[str, list[Any]] = {}
        for segment in self.tape.segments:
            found = resolve(segment, self.names, self.stype, self.tape)
            for asked, span in found.rest if isinstance(found, Unresolved) else found:
                first, last = (_day(max(t, 0)) for t in (max(span.start, self.tape.first), min(span.end, self.tape.last + DAY)))
                mappings.setdefault(asked, []).append(SimpleNamespace(start_date=first, end_date=last, symbol=str(span.number)))
        names = self.names if self.names is not None else sorted(mappings)
        return bytes(
            _dbn.Metadata(
                self.tape.dataset, max(self.start, 0), _dbn.SType(self.stype), _dbn.SType.INSTRUMENT_ID, _dbn.Schema(self.schema),
                symbols=list(names), not_found=[n for n in names if n not in mappings],
                mappings=[SimpleNamespace(raw_symbol=k, intervals=v) for k, v in mappings.items()], end=self.end, limit=self.limit,
                ts_out=False, version=3,
            ).encode()
        )  # fmt: skip


def _day(ts: int) -> dt.date:
    return dt.datetime.fromtimestamp(ts // 1_000_000_000, dt.UTC).date()


def _figure(gateway: Gateway, of: Callable[[int, int], float]) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        records = await asyncio.to_thread(_Query(gateway, await request.post()).records)
        return web.json_response(of(*records.shape))

    return handler


def _range(gateway: Gateway) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        query = _Query(gateway, await request.post())
        records = await asyncio.to_thread(query.records)
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream", "X-Request-Id": "gateway"})
        await response.prepare(request)
        pack = _packer(query.zipped)
        await response.write(pack(query.metadata(), False))
        step = max(1, PIECE // records.shape[1])
        for at in range(0, len(records), step):
            await response.write(pack(records[at : at + step].tobytes(), False))
        await response.write(pack(b"", True))
        await response.write_eof()
        return response

    return handler


def _packer(zipped: bool) -> Callable[[bytes, bool], bytes]:
    if not zipped:
        return lambda data, last: data
    import zstandard

    z = zstandard.ZstdCompressor(1).compressobj()
    return lambda data, last: z.compress(data) + (z.flush() if last else b"")

