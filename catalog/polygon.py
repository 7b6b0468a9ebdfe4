"""Polygon REST history, downloaded in resumable parts and imported as a NautilusTrader Parquet catalog (level 1).

Takes symbols and a range; :func:`history` gives a catalog of quotes, trades and bars, so that a backtest runs on it. The service is
asked through the `polygon-api-client` package. A part is one page of one symbol, kind and day; its file name carries its SHA-256 and
its Parquet metadata the address of the next page, so a killed download goes on where it stopped and a damaged part is fetched again.
What the parts mean, and how they become a catalog, is in :mod:`catalog.tape`.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode, urlparse
from zoneinfo import ZoneInfo

import certifi
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import urllib3
from polygon import RESTClient  # type: ignore[import-untyped]
from polygon.rest import BASE, ENV_KEY  # type: ignore[import-untyped]

from catalog.errors import InputError
from catalog.progress import Steps
from catalog.whole import STORE as STORE

VENUE: Final = "POLYGON"  # the consolidated tape is no exchange: instruments are AAPL.POLYGON
PAGE: Final = 50_000  # the service's largest page
NEW_YORK: Final = ZoneInfo("America/New_York")
ENV_BASE: Final = "POLYGON_BASE"  # another host that speaks the API, a local one in tests
FEES: Final = ("maker_fee", "taker_fee", "fee_per_unit")


class Refused(InputError):
    """The service said no for good. `status` is HTTP's: 400 bad request, 401 key, 403 plan, 404 unknown."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Rest(RESTClient):  # type: ignore[misc]
    """The package's client with what long downloads need: time-outs, back-off, whole answers, one-line errors.

    The package itself ends the paging silently on an answer that is not JSON, drops HTTP status and Retry-After, and never hands its
    time-out to urllib3. Here each answer is whole JSON or it is asked for again: 429, 5xx, time-outs, broken connections and broken
    JSON wait 0.5 s, 1 s, 2 s ... 60 s (or Retry-After), `tries` times. `base` and `sleep` are for tests.

    Raises InputError without a key; :class:`Refused` when the service refuses; InputError when it stays away.
    """

    def __init__(
        self, key: str | None = None, *, base: str | None = None, tries: int = 10, timeout_s: float = 60.0,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:  # fmt: skip
        key = (os.environ.get(ENV_KEY, "") if key is None else key).strip()
        if not key:
            raise InputError(f"no Polygon key: set the environment variable {ENV_KEY}")
        super().__init__(api_key=key, base=(base or os.environ.get(ENV_BASE) or BASE).rstrip("/"), retries=0, read_timeout=timeout_s)
        self.client = urllib3.PoolManager(
            headers=self.headers, timeout=self.timeout, retries=False, cert_reqs="CERT_REQUIRED", ca_certs=certifi.where()
        )
        self.tries, self.sleep, self.requests = tries, sleep, 0

    def _get(
        self, path: str, params: Any = None, result_key: Any = None, deserializer: Any = None, raw: bool = False, options: Any = None
    ) -> Any:
        reply = self._ask(path, params)
        if raw:
            return reply
        found = reply.get(result_key, []) if result_key else reply
        if deserializer is None:
            return found
        return [deserializer(o) for o in found] if isinstance(found, list) else deserializer(found)

    def _decode(self, resp: Any) -> Any:
        return resp

    def _ask(self, path: str, params: dict[str, Any] | None) -> dict[str, Any]:
        fault = ""
        for attempt in range(self.tries):
            pause = min(60.0, 0.5 * 2**attempt)
            self.requests += 1
            try:
                r = self.client.request("GET", self.BASE + path, fields=params or None, headers=self.headers)
            except urllib3.exceptions.HTTPError as e:
                fault = f"{type(e).__name__}: {self._clean(e)}"
                if isinstance(e, urllib3.exceptions.NewConnectionError) and attempt >= 3:
                    break
            else:
                if r.status == 200:
                    with contextlib.suppress(ValueError):  # also UnicodeDecodeError
                        reply = json.loads(r.data)
                        if isinstance(reply, dict):
                            self._check(200 if reply.get("status") not in ("ERROR", "NOT_AUTHORIZED") else 400, reply, path)
                            return reply
                    fault = f"an answer that is not whole JSON ({len(r.data):,} bytes)"
                elif r.status == 429 or r.status >= 500 or r.status == 408:
                    fault = f"HTTP {r.status}"
                    pause = _retry_after(r.headers.get("Retry-After"), pause)
                else:
                    with contextlib.suppress(ValueError):
                        body = json.loads(r.data)
                        self._check(r.status, body if isinstance(body, dict) else {}, path)
                    self._check(r.status, {}, path)
            if attempt + 1 < self.tries:
                if pause >= 5:
                    print(f"Polygon: {fault}; asking again in {pause:.0f} s", file=sys.stderr, flush=True)
                self.sleep(pause)
        where = urlparse(path).path
        raise InputError(f"Polygon gave no usable answer for {where} ({fault}): run the same command again, finished parts are kept")

    def _check(self, status: int, body: dict[str, Any], path: str) -> None:
        if status == 200:
            return
        said = self._clean(body.get("error") or body.get("message") or f"HTTP {status}")
        where = urlparse(path).path
        if status == 401 or (status == 400 and "api key" in said.lower()):
            raise Refused(401, f"Polygon refused the key in {ENV_KEY} ({said}): set the key of an active account")
        if status == 403 or body.get("status") == "NOT_AUTHORIZED":
            raise Refused(403, f"this Polygon plan does not include {where} ({said}): use a plan that does, or leave this data out")
        if status == 404:
            raise Refused(404, f"Polygon does not know {where} ({said}): check the symbol")
        raise Refused(status, f"Polygon refused {where} ({said}): check symbols and dates")

    def _clean(self, said: object) -> str:
        return " ".join(str(said).replace(self.API_KEY, "***").split())[:300]

    def page(self, call: str, *args: Any, **kw: Any) -> dict[str, Any]:
        """The first page of a `list_*` or `get_*` call of the package, as the service sent it."""
        return getattr(self, call)(*args, raw=True, **kw)

    def follow(self, path: str) -> dict[str, Any]:
        """The page at `path` (path and query, from :func:`next_path`), always asked from this client's own host."""
        return self._ask(path, None)

    def pages(self, call: str, *args: Any, **kw: Any) -> Iterator[list[dict[str, Any]]]:
        """The results of all pages of a `list_*` call of the package."""
        reply = self.page(call, *args, **kw)
        while True:
            yield reply.get("results") or []
            if not (path := next_path(reply)):
                return
            reply = self.follow(path)


def next_path(reply: dict[str, Any]) -> str:
    """Path and query of the next page ("" at the end), without host and key."""
    u = urlparse(str(reply.get("next_url") or ""))
    query = urlencode([(k, v) for k, v in parse_qsl(u.query, keep_blank_values=True) if k.lower() != "apikey"])
    return f"{u.path}?{query}" if query else u.path


def _retry_after(header: str | None, otherwise: float) -> float:
    if not header:
        return otherwise
    with contextlib.suppress(ValueError):
        return min(300.0, max(0.0, float(header)))
    with contextlib.suppress(ValueError, TypeError):
        return min(300.0, max(0.0, parsedate_to_datetime(header).timestamp() - time.time()))
    return otherwise


# --- download ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Want:
    """One unit of work: a symbol, a kind (trades, quotes, or bars such as 1-minute) and a day (bars: a month), [start, stop) in ns."""

    symbol: str
    kind: str
    label: str
    start: int
    stop: int

    def folder(self, parts: Path) -> Path:
        return parts / self.symbol.replace(":", "_") / self.kind / self.label


def wants(symbols: Sequence[str], start: int, end: int, kinds: Sequence[str] = ("quotes", "trades")) -> list[Want]:
    """What a request for [start, end] (ns) means: New York days without weekends for equities, UTC days for crypto, months for bars."""
    if end < start:
        raise InputError(f"empty range: --start {utc(start)} lies after --end {utc(end)}")
    out = []
    for symbol in symbols:
        if not re.fullmatch(r"(X:)?[A-Za-z0-9][A-Za-z0-9.\-]{0,30}", symbol):
            raise InputError(f"{symbol!r} is no Polygon symbol: write AAPL, BRK.B or X:BTC-USD")
        crypto = symbol.startswith("X:")
        zone = dt.UTC if crypto else NEW_YORK
        day, last = (dt.datetime.fromtimestamp(t // 1_000_000_000, zone).date() for t in (start, end))
        first = day
        while day <= last:
            if crypto or day.weekday() < 5:
                bounds = midnight(day, zone), midnight(day + dt.timedelta(1), zone)
                out += [Want(symbol, k, day.isoformat(), *bounds) for k in kinds if k == "trades" or (k == "quotes" and not crypto)]
            day += dt.timedelta(1)
        for kind in kinds:
            if kind in ("trades", "quotes"):
                continue
            if not re.fullmatch(r"[1-9]\d{0,2}-(second|minute|hour|day)", kind):
                raise InputError(f"{kind!r} is no kind of Polygon history: use trades, quotes, or bars such as 1-minute")
            month = first.replace(day=1)
            while month <= last:
                after = (month + dt.timedelta(32)).replace(day=1)
                out.append(Want(symbol, kind, month.isoformat()[:7], midnight(month, zone), midnight(after, zone)))
                month = after
    if not out and all(s.startswith("X:") for s in symbols):
        raise InputError("Polygon has no history of crypto quotes: ask for trades or bars")
    if not out:
        raise InputError(f"empty range: no trading day between {utc(start)} and {utc(end)}")
    return out


def midnight(day: dt.date, zone: dt.tzinfo) -> int:
    """The first moment of `day` there, ns UTC."""
    return int(dt.datetime(day.year, day.month, day.day, tzinfo=zone).timestamp()) * 1_000_000_000


def utc(ns: int) -> str:
    return dt.datetime.fromtimestamp(ns // 1_000_000_000, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def download(rest: Rest, todo: Sequence[Want], parts: Path, *, page: int = PAGE, now: Callable[[], int] = time.time_ns) -> list[Path]:
    """Fetch what is missing of `todo` into `parts`; the files of all of it, in order. Safe to kill and to repeat.

    The last page of a day that was not over (by `now`, ns) when it was fetched is fetched again. Raises InputError: unknown symbol,
    plan, key, or a service that stays away.
    """
    files = []
    for symbol in dict.fromkeys(w.symbol for w in todo):
        _details(rest, symbol, parts)
    with Steps("download from Polygon", len(todo), "parts") as s:
        for want in todo:
            try:
                files += _fetch(rest, want, parts, page, now, s)
            except Refused as e:
                raise Refused(e.status, f"{want.kind} of {want.symbol} on {want.label}: {e}") from None
            s.advance()
    return files


def _details(rest: Rest, symbol: str, parts: Path) -> dict[str, Any]:
    path = parts / symbol.replace(":", "_") / "ticker.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    try:
        found = rest.page("get_ticker_details", symbol.replace("-", "") if symbol.startswith("X:") else symbol).get("results") or {}
    except Refused as e:
        if e.status == 404:
            raise Refused(404, f"Polygon does not know the symbol {symbol}: check its spelling (it is case-sensitive)") from None
        raise
    path.parent.mkdir(parents=True, exist_ok=True)
    _atomically(path, lambda p: p.write_text(json.dumps(found)))
    return found


def _fetch(rest: Rest, want: Want, parts: Path, page: int, now: Callable[[], int], s: Steps) -> list[Path]:
    folder = want.folder(parts)
    folder.mkdir(parents=True, exist_ok=True)
    kept: list[Path] = []
    path: str | None = None  # of the next page; None: the first
    for f in sorted(folder.glob("*.parquet")):
        note = _verified(f)
        if note is None or int(f.name[:5]) != len(kept) or (path is not None and not path):
            continue
        if not note["next"] and not note["final"]:
            break
        kept.append(f)
        path = note["next"]
    for stray in set(folder.iterdir()) - set(kept):
        stray.unlink()
    while path is None or path:
        asked = now()
        reply = _first(rest, want, page) if path is None else rest.follow(path)
        after = next_path(reply)
        if after and after == path:
            raise InputError(f"Polygon's pages of {want.kind} of {want.symbol} on {want.label} do not advance: run the same command again")
        rows = reply.get("results") or []
        note = {"next": after, "final": bool(after) or asked >= want.stop, "rows": len(rows)}
        kept.append(_write_part(folder, len(kept), _table(want.kind, rows), note))
        path = after
        s.advance(0)
    return kept


def _first(rest: Rest, want: Want, page: int) -> dict[str, Any]:
    if want.kind in ("trades", "quotes"):
        return rest.page(
            f"list_{want.kind}", want.symbol, timestamp_gte=want.start, timestamp_lt=want.stop, order="asc", sort="timestamp", limit=page
        )
    many, span = want.kind.split("-")
    ticker = want.symbol.replace("-", "") if want.symbol.startswith("X:") else want.symbol
    ms = want.start // 1_000_000, want.stop // 1_000_000 - 1
    return rest.page("list_aggs", ticker, int(many), span, *ms, adjusted=False, sort="asc", limit=page)


_COLUMNS: Final[dict[str, list[tuple[str, str, str]]]] = {  # column of the part, key in the service's JSON, type
    "trades": [
        ("sip", "sip_timestamp", "i"), ("participant", "participant_timestamp", "i"), ("sequence", "sequence_number", "i"),
        ("price", "price", "n"), ("size", "size", "n"), ("exchange", "exchange", "i"), ("trf", "trf_id", "i"),
        ("correction", "correction", "i"), ("conditions", "conditions", "l"), ("id", "id", "s"),
    ],
    "quotes": [
        ("sip", "sip_timestamp", "i"), ("participant", "participant_timestamp", "i"), ("sequence", "sequence_number", "i"),
        ("bid", "bid_price", "n"), ("ask", "ask_price", "n"), ("bid_size", "bid_size", "n"), ("ask_size", "ask_size", "n"),
    ],
    "bars": [("start_ms", "t", "i"), ("open", "o", "n"), ("high", "h", "n"), ("low", "l", "n"), ("close", "c", "n"), ("volume", "v", "n")],
}  # fmt: skip


def nanos(values: Iterable[Any]) -> np.ndarray:
    """JSON numbers -> int64 in units of 1e-9, exact for up to 9 decimals; None -> 0.

    A double holds a decimal of magnitude up to 1e6 within 0.12e-9, and the product adds as much: rounding is exact. Larger ones go
    through their shortest decimal.
    """
    x = np.array([0.0 if v is None else v for v in values], np.float64)
    out = np.rint(np.where(np.abs(x) <= 1e6, x, 0.0) * 1e9).astype(np.int64)
    for i in np.flatnonzero(~(np.abs(x) <= 1e6)):
        if not abs(x[i]) < 9.2e9:
            raise InputError(f"Polygon sent the number {x[i]!r}, beyond what can be stored: leave this symbol out")
        out[i] = int((Decimal(repr(float(x[i]))) * 1_000_000_000).to_integral_value())
    return out


def _table(kind: str, rows: list[dict[str, Any]]) -> pa.Table:
    columns: dict[str, Any] = {}
    for name, key, form in _COLUMNS.get(kind, _COLUMNS["bars"]):
        values = [r.get(key) for r in rows]
        if form == "i":
            columns[name] = pa.array([v or 0 for v in values], pa.int64())
        elif form == "n":
            columns[name] = pa.array(nanos(values), pa.int64())
        elif form == "s":
            columns[name] = pa.array([str(v or "") for v in values], pa.string())
        else:
            columns[name] = pa.array([v or [] for v in values], pa.list_(pa.int32()))
    return pa.table(columns)


def _write_part(folder: Path, index: int, table: pa.Table, note: dict[str, Any]) -> Path:
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"cift": json.dumps(note)}), sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    path = folder / f"{index:05d}-{hashlib.sha256(data).hexdigest()}.parquet"
    _atomically(path, lambda p: p.write_bytes(data))
    return path


def _verified(path: Path) -> dict[str, Any] | None:
    if hashlib.sha256(path.read_bytes()).hexdigest() != path.stem[6:]:
        return None
    return json.loads(pq.read_schema(path).metadata[b"cift"])


def _atomically(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_suffix(".part")
    write(part)
    with part.open("rb") as f:
        os.fsync(f.fileno())
    part.replace(path)



# --- a history --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """A history to have: symbols, [start, end] in ns by SIP stamp, kinds (trades, quotes, bars such as 1-minute).

    `ticks`: price increments that are known better than the quotes tell, {"AAPL": "0.01"}. `fees`: per symbol or for all ("*"), any of
    maker_fee, taker_fee (shares of notional) and fee_per_unit (currency).
    """

    symbols: tuple[str, ...]
    start: int
    end: int
    kinds: tuple[str, ...] = ("quotes", "trades")
    ticks: tuple[tuple[str, str], ...] = ()
    fees: tuple[tuple[str, str, float], ...] = ()  # symbol or "*", name, value

    def __post_init__(self) -> None:
        if unknown := [name for _, name, _ in self.fees if name not in FEES]:
            raise InputError(f"{unknown[0]!r} is no fee: the fees are {', '.join(FEES)}")
        for symbol, tick in self.ticks:
            if not re.fullmatch(r"\d{0,6}\.?\d{1,9}", tick) or not float(tick) > 0:
                raise InputError(f"the tick of {symbol} is {tick!r}, no price increment: write 0.01")

    def as_json(self) -> dict[str, Any]:
        return json.loads(json.dumps({n: getattr(self, n) for n in self.__slots__}))


def store(request: Request) -> tuple[Path, Path]:
    """Where the project keeps the catalog of `request` and the parts of all requests: `out` and `parts` of :func:`history`."""
    key = hashlib.sha256(json.dumps(request.as_json(), sort_keys=True).encode()).hexdigest()[:12]
    names = "-".join(s.replace(":", "_") for s in request.symbols[:3])
    return STORE / f"polygon-{names}-{key}", STORE / "polygon.parts"


def history(request: Request, out: Path, *, rest: Rest | None = None, parts: Path | None = None, page: int = PAGE) -> dict[str, Any]:
    """Download and import: the catalog at `out` and the content of its `cift.json`. A catalog of the same request is used as it is.

    `parts`: where downloaded parts are kept for later requests (default: beside `out`). Raises InputError as :func:`download` and
    `import_parts` do, and where `out` holds anything else.
    """
    from catalog.tape import import_parts

    done = finished(request, out)
    if done is not None:
        return done
    parts = parts or out.with_name(out.name + ".parts")
    todo = wants(request.symbols, request.start, request.end, request.kinds)
    download(rest or Rest(), todo, parts, page=page)
    return import_parts(request, parts, out)


def finished(request: Request, out: Path) -> dict[str, Any] | None:
    """The `cift.json` of a finished import of this very request at `out`; None where nothing is. Raises InputError for anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    with contextlib.suppress(OSError, ValueError):
        report = json.loads((out / "cift.json").read_text())
        if report.get("request") == request.as_json():
            return report
    raise InputError(f"{out} holds something else than this request: choose another folder or remove it")
