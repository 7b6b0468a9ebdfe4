"""The Historical API's client against a local TLS server that answers as the service does."""

from __future__ import annotations

import base64
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import databento
import databento_dbn
import numpy as np
import pytest
import trustme
import zstandard
from databento_dbn import Metadata, Schema, SType

from catalog.errors import InputError
from catalog.historical import Historical, Quote, download, parse_time, stype_of
from catalog.status import STATUS

KEY = "db-0123456789abcdefghijklmnopqrs"
ROOT = Path(__file__).resolve().parents[2]
MBO = np.dtype(
    [("length", "u1"), ("rtype", "u1"), ("publisher_id", "<u2"), ("instrument_id", "<u4"), ("ts_event", "<u8"), ("order_id", "<u8"),
     ("price", "<i8"), ("size", "<u4"), ("flags", "u1"), ("channel_id", "u1"), ("action", "S1"), ("side", "S1"), ("ts_recv", "<u8"),
     ("ts_in_delta", "<i4"), ("sequence", "<u4")]
)  # fmt: skip


DATES = SimpleNamespace(start_date=date(2024, 1, 1), end_date=date(2025, 1, 1), symbol="7")
MAPPED = [SimpleNamespace(raw_symbol="AAA", intervals=[DATES])]


def dbn(start: int, n: int) -> bytes:
    """A day's file: `n` adds, a second apart."""
    a = np.zeros(n, MBO)
    a["length"], a["rtype"], a["publisher_id"], a["instrument_id"] = 14, 160, 2, 7
    a["ts_event"] = a["ts_recv"] = start + np.arange(n, dtype=np.uint64) * 1_000_000_000
    a["order_id"] = np.arange(n) + 1
    a["price"], a["size"], a["flags"], a["action"], a["side"] = 100 * 10**9, 1, 128, b"A", b"B"
    meta = Metadata(
        dataset="XNAS.ITCH", start=start, stype_out=SType.INSTRUMENT_ID, symbols=["AAA"], partial=[], not_found=[], mappings=MAPPED,
        schema=Schema.MBO, stype_in=SType.RAW_SYMBOL,
    )  # fmt: skip
    return zstandard.compress(meta.encode() + a.tobytes())


def definitions(start: int) -> bytes:
    """A day's definition file: the one instrument."""
    kinds = databento_dbn.InstrumentClass.STOCK, databento_dbn.SecurityUpdateAction.ADD
    aaa = databento_dbn.InstrumentDefMsg(2, 7, start, start, 10**7, 10**9, "AAA", "", "", *kinds, exchange="XNAS", currency="USD")
    meta = Metadata(
        dataset="XNAS.ITCH", start=start, stype_out=SType.INSTRUMENT_ID, symbols=["AAA"], partial=[], not_found=[], mappings=[],
        schema=Schema.DEFINITION, stype_in=SType.RAW_SYMBOL,
    )  # fmt: skip
    return zstandard.compress(meta.encode() + bytes(aaa))


def statuses(start: int) -> bytes:
    """A day's status file: it opens a minute after the day begins, and an hour later it is halted."""
    head = bytes([STATUS.itemsize // 4, 0x12, 2, 0])
    rows = [(head, 7, t, t, action, 1, 0, "~", "~", "~", b"") for t, action in ((start + 60 * 10**9, 7), (start + 3_660 * 10**9, 8))]
    meta = Metadata(
        dataset="XNAS.ITCH", start=start, stype_out=SType.INSTRUMENT_ID, symbols=["AAA"], partial=[], not_found=[], mappings=MAPPED,
        schema=Schema.STATUS, stype_in=SType.RAW_SYMBOL,
    )  # fmt: skip
    return zstandard.compress(meta.encode() + np.array(rows, STATUS).tobytes())


@dataclass
class Service:
    """What the server holds, and the faults it has been told to make: path -> the answers to give before the right one."""

    url: str = ""
    faults: dict[str, list[str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    per_day: int = 500
    schemas: tuple[str, ...] = ("mbo", "mbp-1", "definition", "status", "statistics")
    empty_days: tuple[str, ...] = ("2024-01-06",)

    def records(self, form: dict[str, str]) -> int:
        return 0 if form["start"][:10] in self.empty_days else {"definition": 1, "status": 2}.get(form["schema"], self.per_day)


class Handler(BaseHTTPRequestHandler):
    service: Service

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer({k: v[0] for k, v in parse_qs(urlsplit(self.path).query).items()})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.answer({k: v[0] for k, v in parse_qs(body).items()})

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        self.send_response(status)
        for k, v in (headers or {}).items():
            self.send_header(k, v)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def error(self, status: int, case: str, message: str, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps({"detail": {"case": case, "message": message, "docs": ""}}).encode(), headers)

    def answer(self, form: dict[str, str]) -> None:
        s, call = self.service, urlsplit(self.path).path.rsplit("/", 1)[1]
        s.asked.append(call if "schema" not in form else f"{call} {form['schema']} {form['start'][:10]}")
        if self.headers["Authorization"] != "Basic " + base64.b64encode(f"{KEY}:".encode()).decode():
            return self.error(401, "auth_authentication_failed", "Authentication failed.")
        fault = s.faults[call].pop(0) if s.faults.get(call) else ""
        if fault == "429":
            return self.error(429, "rate_limit", "Too many requests.", {"Retry-After": "3"})
        if fault == "500":
            return self.send(500, b"oops")
        if form["dataset"] != "XNAS.ITCH":
            return self.error(422, "data_unknown_dataset", f"Unknown dataset {form['dataset']}.")
        if form.get("symbols") == "NOPE":
            return self.error(422, "symbology_invalid_symbol", "None of the symbols could be resolved")
        if call == "metadata.get_dataset_range":
            return self.send(200, b'{"start": "2018-05-01T00:00:00.000000000Z", "end": "2024-06-01T00:00:00.000000000Z"}')
        if call == "metadata.list_schemas":
            return self.send(200, json.dumps(s.schemas).encode())
        n = s.records(form)
        if call == "metadata.get_record_count":
            return self.send(200, str(n).encode())
        if call == "metadata.get_billable_size":
            return self.send(200, str(56 * n).encode())
        if call == "metadata.get_cost":
            return self.send(200, str(0.25 if form["schema"] == "mbo" else 0.01).encode())
        assert call == "timeseries.get_range"
        begin = int(datetime.fromisoformat(form["start"]).replace(tzinfo=UTC).timestamp()) * 10**9
        body = {"definition": definitions, "status": statuses}.get(form["schema"], lambda t: dbn(t, n))(begin)
        if fault == "drop":
            self.send(200, body[: len(body) // 2], length=len(body))
            return self.connection.close()
        if fault == "cut":
            return self.send(200, body[: len(body) // 2])
        if fault == "short":
            return self.send(200, dbn(0, n - 1))
        if fault == "hang":
            self.send(200, body[:20], length=len(body))
            return threading.Event().wait() and None
        return self.send(200, body)


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    ca, state = trustme.CA(), Service()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost").configure_cert(context)
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    monkeypatch.setenv("DATABENTO_API_KEY", KEY)
    server = ThreadingHTTPServer(("localhost", 0), type("H", (Handler,), {"service": state}))
    server.daemon_threads = True
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"https://localhost:{server.server_address[1]}"
    monkeypatch.setenv("DATABENTO_GATEWAY", state.url)
    yield state
    server.shutdown()
    server.server_close()


pauses: list[float] = []


def get(out: Path, start: str = "2024-01-04", end: str = "2024-01-07", symbols: Sequence[str] = ("AAA",), accept: int = 1,
        schema: str = "mbo") -> list[Path]:  # fmt: skip
    pauses.clear()
    return download("XNAS.ITCH", schema, symbols, start, end, out, lambda _: bool(accept), pause=pauses.append)


def test_the_price_is_shown_before_anything_is_bought(service: Service, tmp_path: Path) -> None:
    seen: list[Quote] = []
    with pytest.raises(InputError, match="declined: nothing was downloaded"):
        download("XNAS.ITCH", "mbo", ["AAA"], "2024-01-04", "2024-01-07", tmp_path / "o", lambda q: bool(seen.append(q)))
    assert seen[0].cost == pytest.approx(2 * 0.25 + 4 * 0.01) and seen[0].records == 2 * 503 and seen[0].bytes == 56 * 1006
    assert not any("get_range " in a for a in service.asked) and not (tmp_path / "o").exists()


def test_days_arrive_whole_with_definitions_and_status_first_and_empty_days_are_left_out(service: Service, tmp_path: Path) -> None:
    files = get(tmp_path / "o")
    assert [f.name.split(".")[-3] for f in files] == ["definition"] * 2 + ["status"] * 2 + ["mbo"] * 2
    assert [len(databento.DBNStore.from_file(f).to_ndarray()) for f in files[4:]] == [500, 500]


def test_what_is_here_is_not_bought_again(service: Service, tmp_path: Path) -> None:
    files = get(tmp_path / "o")
    service.asked.clear()
    assert get(tmp_path / "o", accept=0) == files, "nothing is missing: no question"
    assert not any("get_range " in a for a in service.asked)
    files[5].write_bytes(b"damaged")
    assert get(tmp_path / "o") == files
    assert [a for a in service.asked if "get_range " in a] == ["timeseries.get_range mbo 2024-01-05"]


@pytest.mark.parametrize("fault", ["429", "500", "drop", "cut", "short"])
def test_faults_of_the_line_are_tried_again(service: Service, tmp_path: Path, fault: str) -> None:
    service.faults["timeseries.get_range"] = [fault, fault]
    files = get(tmp_path / "o")
    assert len(files) == 6 and len(pauses) == 2
    assert pauses == ([3.0, 3.0] if fault == "429" else [1.0, 2.0]), "the service's own Retry-After is kept"


def test_a_service_that_stays_down_is_named_and_finished_parts_are_kept(service: Service, tmp_path: Path) -> None:
    service.faults["timeseries.get_range"] = [""] * 5 + ["500"] * 99
    with pytest.raises(InputError, match=r"did not answer .* finished parts are kept"):
        get(tmp_path / "o")
    assert len(list((tmp_path / "o").glob("*.zst"))) == 5 and not list((tmp_path / "o").glob(".*zst"))
    service.faults.clear()
    service.asked.clear()
    get(tmp_path / "o")
    assert sum("get_range " in a for a in service.asked) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"symbols": ("NOPE",)}, "None of the symbols"),
        ({"symbols": ()}, "no symbols"),
        ({"symbols": ("AAA", "ES.v.0")}, "different kinds"),
        ({"start": "2024-01-07"}, "is empty"),
        ({"end": "2025-01-01"}, "has data from 2018-05-01"),
        ({"start": "yesterday"}, "no date or time"),
        ({"start": "2024-01-06"}, "has no mbo records"),
        ({"schema": "mbp-10"}, "has no schema mbp-10; it has mbo, mbp-1"),
    ],
)
def test_wrong_requests_are_refused_in_one_line(service: Service, tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as e:
        get(tmp_path / "o", **change)  # type: ignore[arg-type]
    assert "\n" not in str(e.value) and KEY not in str(e.value)


def test_a_refused_key_is_never_printed(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABENTO_API_KEY", "db-wrong-wrong-wrong-wrong-wrong")
    with pytest.raises(InputError, match=r"refused the schemas of XNAS.ITCH .401.: check DATABENTO_API_KEY") as e:
        get(tmp_path / "o")
    assert "wrong-wrong" not in str(e.value)
    monkeypatch.delenv("DATABENTO_API_KEY")
    with pytest.raises(InputError, match="no Databento key"):
        Historical()


def test_an_untrusted_certificate_is_refused(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "other.pem"))
    with pytest.raises(InputError, match="SSLError"):
        get(tmp_path / "o")


def test_a_dataset_without_status_records_is_downloaded_without_them(service: Service, tmp_path: Path) -> None:
    service.schemas = ("mbo", "definition")
    assert [f.name.split(".")[-3] for f in get(tmp_path / "o", end="2024-01-05")] == ["definition", "mbo"]
    service.schemas = ("mbo",)
    assert [f.name.split(".")[-3] for f in get(tmp_path / "p", end="2024-01-05")] == ["mbo"]


def test_definitions_and_status_of_a_part_of_a_day_are_those_of_the_day_so_far(service: Service, tmp_path: Path) -> None:
    get(tmp_path / "o", start="2024-01-04T14:00", end="2024-01-04T15:00")
    begun = {a for a in service.asked if "get_cost" in a}
    assert begun == {f"metadata.get_cost {s} 2024-01-04" for s in ("definition", "status", "mbo")}
    assert sorted(f.name.split(".")[0][-22:] for f in (tmp_path / "o").glob("*.zst")) == [
        "20240104T000000-150000", "20240104T000000-150000", "20240104T140000-150000"
    ]  # fmt: skip


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_goes_on_where_it_stopped(service: Service, tmp_path: Path, kill: signal.Signals) -> None:
    service.faults["timeseries.get_range"] = [""] * 5 + ["hang"]
    code = f"""
from pathlib import Path
from catalog.historical import download
download("XNAS.ITCH", "mbo", ["AAA"], "2024-01-04", "2024-01-07", Path({str(tmp_path / "o")!r}), lambda q: True)"""
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    while sum("get_range " in a for a in service.asked) < 6:
        assert child.poll() is None
    child.send_signal(kill)
    child.wait()
    assert len(list((tmp_path / "o").glob("[!.]*.zst"))) == 5
    service.asked.clear()
    assert len(get(tmp_path / "o")) == 6
    assert [a for a in service.asked if "get_range " in a] == ["timeseries.get_range mbo 2024-01-05"]


def test_symbols_tell_their_own_kind() -> None:
    assert [stype_of([s]) for s in ("ESH4", "ES.v.0", "ES.FUT", "BRK.B")] == ["raw_symbol", "continuous", "parent", "raw_symbol"]
    assert parse_time("2024-01-02T09:30-05:00", "x") == datetime(2024, 1, 2, 14, 30, tzinfo=UTC)
