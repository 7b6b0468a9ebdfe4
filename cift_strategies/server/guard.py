"""Who may ask what, and how much: the token, the Host and Origin checks, rate and size limits. One ASGI layer before everything else.

What changes anything needs the bearer token; with `everything` (any address but this machine's own) so does all the rest. A browser may
show the token once, as `/?token=...`, and gets a cookie that lets it read, not command.
"""

from __future__ import annotations

import hmac
import os
import secrets
import stat
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs

from fastapi import HTTPException, Response
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from catalog.errors import InputError
from cift_strategies.server.problems import problem

BODY: Final = 8 << 20  # bytes of a request
HEAD: Final = 64 << 10  # bytes of its first line and headers
OPEN: Final = frozenset({"/health", "/ready"})  # need no token to be read
READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})
COOKIE: Final = "cift_token"
PROTOCOL: Final = "cift"  # WebSocket subprotocol; beside it "cift.bearer.<token>" carries the token where headers cannot be set
LOCAL: Final = ("127.0.0.1", "localhost", "::1")
RATES: Final = {"command": (20.0, 50.0), "predict": (50.0, 100.0), "other": (2_000.0, 4_000.0)}  # requests a second, burst; of one address
ADDRESSES: Final = 1_024  # whose rates are remembered
UNKNOWN_HOST: Final = "this server does not answer to that host name: start it with --host-name to add one"

type Scope = dict[str, Any]
type Receive = Callable[[], Awaitable[dict[str, Any]]]
type Send = Callable[[dict[str, Any]], Awaitable[None]]
type App = Callable[[Scope, Receive, Send], Awaitable[None]]


def token(file: Path) -> str:
    """The token in `file`, made there (mode 600) at the first start. Raises InputError where others may read it."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        mode = stat.S_IMODE(file.stat().st_mode)
        if mode & 0o077:
            raise InputError(f"{file} has mode {mode:o}, so others may have read the token: remove it, and a new one is made") from None
        found = file.read_text().strip()
        if len(found) < 32:
            raise InputError(f"{file} holds no token of 32 characters or more: remove it, and a new one is made") from None
        return found
    with os.fdopen(handle, "w") as f:
        made = secrets.token_urlsafe(32)
        f.write(made + "\n")
    return made


class Rates:
    """Token buckets by address and kind; the least recently seen address is forgotten."""

    def __init__(self, rates: dict[str, tuple[float, float]] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._rates, self._clock = rates or RATES, clock
        self._left: dict[tuple[str, str], tuple[float, float]] = {}

    def wait(self, address: str, kind: str) -> float:
        """Take one; 0, or the seconds after which it would be granted."""
        rate, burst = self._rates[kind]
        now = self._clock()
        left, then = self._left.pop((address, kind), (burst, now))
        left = min(burst, left + (now - then) * rate)
        granted = left >= 1
        self._left[address, kind] = (left - 1 if granted else left, now)
        if len(self._left) > ADDRESSES:
            del self._left[next(iter(self._left))]
        return 0.0 if granted else (1 - left) / rate


class Requests(HttpToolsProtocol):
    """uvicorn's, with a bound on what it collects before the application is asked, and problem details where it never is."""

    _taken, _asked = 0, False  # bytes of the request that comes in; whether its headers are whole

    def data_received(self, data: bytes) -> None:
        self._taken += len(data)
        super().data_received(data)
        if not self._asked and self._taken > HEAD and not self.transport.is_closing():
            self._refuse(problem(431, f"the headers of a request may have {HEAD} bytes"))
        elif self._taken > HEAD + 2 * BODY:
            self.transport.close()  # it was answered at BODY, and does not end

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._asked = False

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._asked = True

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._taken, self._asked = 0, False

    def send_400_response(self, msg: str) -> None:
        self._refuse(problem(400, msg))

    def _refuse(self, answer: Response) -> None:
        """Say why, and end the connection."""
        headers = b"".join(b"%b: %b\r\n" % pair for pair in (*answer.raw_headers, (b"connection", b"close")))
        status = f"HTTP/1.1 {answer.status_code} {HTTPStatus(answer.status_code).phrase}\r\n".encode()
        self.transport.write(status + headers + b"\r\n" + bytes(answer.body))
        self.transport.close()


class Guard:
    """ASGI middleware. `hosts`: names by which the server may be called; `origins`: pages of other hosts that may open WebSockets."""

    def __init__(self, app: App, token: str, hosts: tuple[str, ...], origins: tuple[str, ...], everything: bool, rates: Rates) -> None:
        self._app, self._token, self._everything, self._rates = app, token.encode(), everything, rates
        self._hosts, self._origins = frozenset(h.lower() for h in hosts), frozenset(o.rstrip("/").lower() for o in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        taken = 0

        async def bounded() -> dict[str, Any]:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > BODY:
                raise HTTPException(413, f"a request may have {BODY} bytes")
            return message

        answer = self._refusal(scope)
        if answer is not None:
            await answer(scope, receive, send)  # type: ignore[arg-type]
        elif scope["method"] == "HEAD":  # as GET: uvicorn, whose scope goes on saying HEAD, sends the headers alone (RFC 9110, 9.3.2)
            as_get = scope | {"method": "GET"}
            await self._app(as_get, bounded, send)
            scope["route"] = as_get.get("route")
        else:
            await self._app(scope, bounded, send)

    def _refusal(self, scope: Scope) -> Response | None:
        """What is answered instead of asking the app, or None."""
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        path, method = scope["path"], scope["method"]
        reading = method in READING
        changes = not reading and path != "/api/v1/predict"
        if not self._host(headers):
            return problem(421, UNKNOWN_HOST)
        bearer = self._bearer(headers)
        if not (changes and bearer) and (wait := self._rates.wait(_address(scope), "other")):
            return _later(wait)  # nobody without the token can use up what a kill needs
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0] if path == "/" and method == "GET" else ""
        if given and self._right(given):
            return Response(None, 303, {"Location": "/", "Set-Cookie": f"{COOKIE}={given}; HttpOnly; SameSite=Strict; Path=/"})
        needed = changes or (self._everything and path not in OPEN)
        if needed and not (bearer or (not changes and self._cookie(headers))):
            return _unknown()
        if not reading and (wait := self._rates.wait(_address(scope), "command" if changes else "predict")):
            return _later(wait)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > BODY:
            return problem(413, f"a request may have {BODY} bytes")
        return None

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        offered = [p.strip() for p in headers.get("sec-websocket-protocol", "").split(",")]
        answer = self._refused_socket(scope, headers, offered)
        if answer is not None:
            await answer(scope, receive, send)  # type: ignore[arg-type]
            return
        scope["cift.protocol"] = PROTOCOL if PROTOCOL in offered else None
        await self._app(scope, receive, send)

    def _refused_socket(self, scope: Scope, headers: dict[str, str], offered: list[str]) -> Response | None:
        if not self._host(headers):
            return problem(421, UNKNOWN_HOST)
        if wait := self._rates.wait(_address(scope), "other"):
            return _later(wait)
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != headers.get("host", "").lower() and not self._origin(origin):
            return problem(403, f"pages of {origin} may not open streams here: start the server with --origin to allow them")
        bearer = next((p.removeprefix(f"{PROTOCOL}.bearer.") for p in offered if p.startswith(f"{PROTOCOL}.bearer.")), "")
        if self._everything and not (self._bearer(headers) or self._cookie(headers) or self._right(bearer)):
            return _unknown()
        return None

    def _host(self, headers: dict[str, str]) -> bool:
        host = headers.get("host", "").lower()
        name = host.rsplit(":", 1)[0] if not host.endswith("]") and ":" in host else host
        return name.strip("[]") in self._hosts or "*" in self._hosts

    def _origin(self, origin: str) -> bool:
        return origin.rstrip("/").lower() in self._origins

    def _right(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token)

    def _bearer(self, headers: dict[str, str]) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and self._right(given.strip())

    def _cookie(self, headers: dict[str, str]) -> bool:
        pairs = (c.strip().partition("=") for c in headers.get("cookie", "").split(";"))
        return any(name == COOKIE and self._right(value) for name, _, value in pairs)


def _unknown() -> Response:
    why = "this needs the token: send `Authorization: Bearer <token>`, with what the file `token` in the state folder holds"
    return problem(401, why, headers={"WWW-Authenticate": "Bearer"})


def _later(wait: float) -> Response:
    return problem(429, "too many requests", headers={"Retry-After": str(int(wait) + 1)})


def _address(scope: Scope) -> str:
    return str(scope["client"][0]) if scope.get("client") else ""
