"""Databento's Historical API -> DBN files of one UTC day each, ready for the importer.

Takes a dataset, a schema, symbols and a range; asks what is missing and what that costs, downloads day by day, verifies every part and
keeps it. A part is written beside its final name and renamed when its record count is right, so that a download that was killed goes on
where it stopped and nothing is paid for twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

from catalog.dbn import SCHEMAS
from catalog.errors import InputError
from catalog.moments import nanoseconds
from catalog.progress import Steps
from catalog.whole import sha256

KEY_VARIABLE: Final = "DATABENTO_API_KEY"
GATEWAY_VARIABLE: Final = "DATABENTO_GATEWAY"  # another host that speaks the API, a local one in tests
RETRIES: Final = 6
DAY: Final = timedelta(days=1)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Part:
    """One schema on one UTC day, clipped to the range that was asked for."""

    schema: str
    start: datetime
    end: datetime
    path: Path


@dataclass(frozen=True, slots=True)
class Quote:
    """What the missing parts are and cost, in US dollars as the service states it; `here` are the finished ones."""

    parts: tuple[Part, ...]
    here: tuple[Part, ...]
    records: int
    bytes: int
    cost: float


def stype_of(symbols: Sequence[str]) -> str:
    """Databento's symbology type of `symbols`: "ES.v.0" continuous, "ES.FUT" parent, anything else raw. Mixed kinds raise InputError."""
    kinds = {
        "continuous" if re.fullmatch(r".+\.[cnv]\.\d+", s) else "parent" if re.fullmatch(r".+\.(FUT|OPT|SPOT)", s) else "raw_symbol"
        for s in symbols
    }
    if len(kinds) != 1:
        raise InputError(f"symbols {', '.join(symbols)} are of different kinds ({', '.join(sorted(kinds))}): ask for one kind at a time")
    return kinds.pop()


def parse_time(text: str, what: str) -> datetime:
    """`text` (see :func:`catalog.moments.nanoseconds`) as an aware UTC datetime, to the microsecond. Raises InputError."""
    try:
        return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=nanoseconds(text) // 1_000)
    except (InputError, TypeError, OverflowError):
        raise InputError(f"{what} {text!r} is no date or time: write it like 2024-01-02 or 2024-01-02T14:30") from None


class Historical:
    """The API for one user. `key` None takes DATABENTO_API_KEY; `pause` waits between tries (seconds)."""

    def __init__(self, key: str | None = None, gateway: str | None = None, pause: Callable[[float], None] = time.sleep) -> None:
        import databento

        key = key or os.environ.get(KEY_VARIABLE, "").strip()
        if not key:
            raise InputError(f"no Databento key: export {KEY_VARIABLE}=db-... (it is read from the environment only)")
        gateway = gateway or os.environ.get(GATEWAY_VARIABLE)
        self._client = databento.Historical(key, **({"gateway": gateway} if gateway else {}))
        self._pause = pause

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        """`call` with patience: rate limits, server faults and broken lines are tried again with growing pauses."""
        import requests
        from databento import BentoClientError, BentoError, BentoServerError
        from databento_dbn import DBNError

        for attempt in range(RETRIES):
            wait = 2.0**attempt
            try:
                return call()
            except BentoClientError as e:
                if e.http_status in (401, 403):
                    reason = f"check {KEY_VARIABLE} and what your plan includes"
                    raise InputError(f"Databento refused {what} ({e.http_status}): {reason}") from None
                if e.http_status == 402:
                    raise InputError(f"Databento asks for payment before {what}: add credit to your account, then run again") from None
                if e.http_status not in (408, 429):
                    raise InputError(f"Databento refused {what}: {' '.join(str(e.message or e.http_status).split())}") from None
                fault: Exception = e
                wait = max(wait, _seconds(e.headers.get("Retry-After")))
            except (BentoServerError, requests.RequestException) as e:
                fault = e
            except (BentoError, DBNError) as e:  # the stream broke or was cut
                fault = e
            if attempt + 1 < RETRIES:
                self._pause(min(wait, 120.0))
        tries = f"in {RETRIES} tries ({type(fault).__name__})"
        raise InputError(f"Databento did not answer {what} {tries}: try again later, finished parts are kept")

    def companions(self, dataset: str, schema: str) -> list[str]:
        """`schema` after what an import of it needs besides: definitions, and when the market was open, where the dataset tells.

        Raises InputError where the dataset has no such schema.
        """
        have = [str(s) for s in self._ask(f"the schemas of {dataset}", lambda: self._client.metadata.list_schemas(dataset))]
        if schema not in have:
            raise InputError(f"{dataset} has no schema {schema}; it has {', '.join(have)}: choose one with --schema")
        return [*(s for s in ("definition", "status") if s in have and schema in SCHEMAS), schema]

    def quote(self, dataset: str, schemas: Sequence[str], symbols: Sequence[str], start: datetime, end: datetime, out: Path) -> Quote:
        """What is missing under `out` for `schemas` x days of [start, end), and what it costs. Nothing is downloaded.

        Raises InputError for an empty range, one the dataset does not have, an unknown dataset or symbol, and a refused key.
        """
        if end <= start:
            raise InputError(f"the range {start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} is empty: --end must be later than --start")
        meta = self._client.metadata
        have = self._ask(f"the range of {dataset}", lambda: meta.get_dataset_range(dataset))
        first, last = parse_time(have["start"], "range start"), parse_time(have["end"], "range end")
        if start < first or end > last:
            there = f"{first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC"
            raise InputError(f"{dataset} has data from {there} for this key: choose --start and --end inside")
        parts: list[Part] = []
        here: list[Part] = []
        records = size = 0
        cost = 0.0
        for p in _parts(dataset, schemas, symbols, start, end, out):
            if _is_whole(p.path):
                here.append(p)
                continue
            ask = _request(dataset, symbols, p)
            n = int(self._ask("a record count", lambda ask=ask: meta.get_record_count(**ask)))  # type: ignore[misc]
            if n == 0:
                continue
            parts.append(p)
            records += n
            size += int(self._ask("a size", lambda ask=ask: meta.get_billable_size(**ask)))  # type: ignore[misc]
            cost += float(self._ask("a price", lambda ask=ask: meta.get_cost(**ask)))  # type: ignore[misc]
        return Quote(tuple(parts), tuple(here), records, size, cost)

    def fetch(self, dataset: str, symbols: Sequence[str], quote: Quote) -> list[Path]:
        """Download the parts of `quote`; returns the files in order of time. Each is verified against the record count of the service."""
        with Steps(f"download {dataset}", quote.records, "records") as steps:
            for p in quote.parts:
                steps.advance(self._fetch_part(dataset, symbols, p))
        return [p.path for p in quote.parts]

    def _fetch_part(self, dataset: str, symbols: Sequence[str], part: Part) -> int:
        ask = _request(dataset, symbols, part)
        expected = int(self._ask("a record count", lambda: self._client.metadata.get_record_count(**ask)))
        part.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = part.path.with_name(f".{os.getpid()}.{part.path.name}")

        def once() -> int:
            from databento import BentoError

            temporary.unlink(missing_ok=True)
            self._client.timeseries.get_range(**ask, path=temporary)
            got = _count_records(temporary)
            if got != expected:
                raise BentoError(f"{got} of {expected} records arrived")
            return got

        try:
            got = self._ask(f"{part.path.name}", once)
            seal = {"sha256": sha256(temporary), "records": got, "bytes": temporary.stat().st_size}
            _write_json(_seal(part.path), seal)
            os.replace(temporary, part.path)
            return got
        finally:
            temporary.unlink(missing_ok=True)


def download(
    dataset: str,
    schema: str,
    symbols: Sequence[str],
    start: str,
    end: str,
    out: Path,
    confirm: Callable[[Quote], bool],
    key: str | None = None,
    gateway: str | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> list[Path]:
    """Files of `schema`, with definitions and status beside events, for [start, end), under `out`: those at hand and those bought now.

    `confirm` is shown the price of what is missing and decides; where nothing is missing it is not asked. Returns the files in order of
    time, definitions and status first. Raises InputError when the user declines and for everything that :meth:`Historical.quote` names.
    """
    if not symbols:
        raise InputError("no symbols: name them with --symbols, e.g. ESH4 or ES.v.0")
    api = Historical(key, gateway, pause)
    t0, t1 = parse_time(start, "--start"), parse_time(end, "--end")
    schemas = api.companions(dataset, schema)
    quote = api.quote(dataset, schemas, symbols, t0, t1, out)
    if quote.parts:
        if not confirm(quote):
            raise InputError("declined: nothing was downloaded and nothing is charged")
        api.fetch(dataset, symbols, quote)
    whole = {p.path for p in (*quote.here, *quote.parts)}
    files = [p.path for p in _parts(dataset, schemas, symbols, t0, t1, out) if p.path in whole]
    if not any(p.schema == schema and p.path in whole for p in _parts(dataset, [schema], symbols, t0, t1, out)):
        raise InputError(f"{dataset} has no {schema} records of {', '.join(symbols)} in that range: choose another range or other symbols")
    return files


def payer(dataset: str, yes: bool) -> Callable[[Quote], bool]:
    """The `confirm` of a command line: states the price, and is told by --yes or asks on a terminal. Raises InputError without either."""

    def confirm(quote: Quote) -> bool:
        amount = f"{quote.records:,} records in {len(quote.parts)} files, {quote.bytes / 1e6:,.1f} MB, cost ${quote.cost:,.2f}"
        print(f"{dataset}: {amount}", file=sys.stderr, flush=True)
        if yes:
            return True
        if not sys.stdin.isatty():
            raise InputError(f"the download costs ${quote.cost:,.2f} and there is no terminal to ask on: add --yes to pay it")
        print("download it? [y/N] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    return confirm


def _parts(dataset: str, schemas: Sequence[str], symbols: Sequence[str], start: datetime, end: datetime, out: Path) -> Iterator[Part]:
    """Schema by schema, UTC day by UTC day. A part that is not a whole day says so in its name."""
    name = "-".join(symbols) if len(symbols) <= 3 else hashlib.sha256(",".join(sorted(symbols)).encode()).hexdigest()[:12]
    for schema in schemas:
        day = datetime.combine(start.date(), datetime.min.time(), UTC)
        while day < end:
            a, b = max(day, start), min(day + DAY, end)
            if schema in ("definition", "status"):  # what was told before the range counts within it
                a = day
            clip = "" if b - a == DAY else f"T{a:%H%M%S}-{b:%H%M%S}"
            stem = f"{dataset.lower().replace('.', '-')}-{_day(day.date())}{clip}.{name}.{schema}.dbn.zst"
            yield Part(schema, a, b, out / re.sub(r"[^\w.\-]", "_", stem))
            day += DAY


def _request(dataset: str, symbols: Sequence[str], part: Part) -> dict[str, Any]:
    stype = stype_of(symbols)
    return {"dataset": dataset, "symbols": list(symbols), "schema": part.schema, "stype_in": stype, "start": part.start, "end": part.end}


def _day(d: date) -> str:
    return d.strftime("%Y%m%d")


def _seal(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _is_whole(path: Path) -> bool:
    """Whether `path` is a finished part whose bytes are those that were sealed."""
    try:
        seal = json.loads(_seal(path).read_text())
        return bool(path.stat().st_size == seal["bytes"] and sha256(path) == seal["sha256"])
    except (OSError, ValueError, KeyError):
        return False


def _count_records(path: Path) -> int:
    """Records in a DBN file, all of them decoded. Raises BentoError where the file is cut or damaged."""
    import databento

    try:
        return sum(len(block) for block in databento.DBNStore.from_file(path).to_ndarray(count=1 << 18))
    except Exception as e:
        raise databento.BentoError(f"damaged file: {e}") from None


def _write_json(path: Path, content: object) -> None:
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)


def _seconds(retry_after: str | None) -> float:
    try:
        return float(retry_after or 0.0)
    except ValueError:
        return 0.0
