"""Two contracts of one future from DBN files to a report: the roll is told, and nothing is labelled or entered where nobody trades."""

from __future__ import annotations

import json
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import databento_dbn as d
import numpy as np
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import EAGER, SEED, Small

from catalog.databento import import_dbn
from catalog.dbn import MBO, Dbn
from catalog.events import SCALE, read_catalog, session_bounds
from catalog.status import STATUS
from catalog.synthetic import make_market
from cift_models.export import write
from cift_models.labels import LABELS
from cift_models.windows import HORIZONS_NS
from cift_strategies.backtest import RunConfig, run
from cift_strategies.outcome import RunResult

HALT, AUCTION, TRADING, CLOSE = 8, 1, 7, 12
KEEP = d.VersionUpgradePolicy.AS_IS


@dataclass(frozen=True)
class Season:
    """Three sessions of two contracts; the second trades more from the second session on. The last session has a halt and an auction, and
    ends early: it is a half-day."""

    catalog: Path
    out: Path
    result: RunResult
    shut: tuple[int, int]  # of the second contract, ns
    opens: list[int]
    closes: int  # of the second contract in the last session, minutes before its regular close

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "summary.json").read_text())
        return found


def rewritten(path: Path, out: Path, busy: str) -> int:
    """The same day with trades of the symbol `busy` ten times as large; returns its first stamp."""
    file = Dbn(path)
    data = zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
    size = 8 + int.from_bytes(data[4:8], "little")
    records = np.frombuffer(data[size:], MBO).copy()
    mine = np.isin(records["instrument_id"], [s.number for s in file.spans if s.symbol == busy])
    records["size"][mine & (records["action"] == ord("T"))] *= 10
    out.write_bytes(zstandard.compress(data[:size] + records.tobytes()))
    return int(records["ts_recv"][records["ts_recv"] < 2**63].min())


def written(path: Path, schema: Any, start: int, symbols: dict[int, str], records: bytes) -> None:
    day = np.datetime64(start, "ns").astype("datetime64[D]")
    dates = {"start_date": day.item(), "end_date": (day + np.timedelta64(9, "D")).item()}
    named = types.SimpleNamespace
    maps = [named(raw_symbol=s, intervals=[named(**dates, symbol=str(n))]) for n, s in symbols.items()]
    meta = d.Metadata(
        "XNAS.ITCH", start, d.SType.RAW_SYMBOL, d.SType.INSTRUMENT_ID, schema, symbols=list(symbols.values()), mappings=maps, version=3
    )
    path.write_bytes(zstandard.compress(meta.encode() + records))


@pytest.fixture(scope="module")
def season(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Season:
    root = tmp_path_factory.mktemp("season")
    market = make_market(root / "market", SEED, sessions=3, events=120_000, instruments=2)
    folder = root / "dbn"
    folder.mkdir()
    symbols = {7000 + k: s for k, s in enumerate(sorted({s.symbol for s in Dbn(market.mbo[0]).spans}))}
    numbers = list(symbols)
    firsts = [rewritten(p, folder / f"day{k}.mbo.dbn.zst", symbols[7000 + min(k, 1)]) for k, p in enumerate(market.mbo)]
    made = [
        d.InstrumentDefMsg(
            2, n, firsts[0], firsts[0], 10**7, 10**9, symbols[n], "XX", "", d.InstrumentClass.FUTURE, d.SecurityUpdateAction.ADD,
            exchange="XNAS", currency="USD", expiration=firsts[-1] + (30 + 90 * k) * 86_400 * SCALE, unit_of_measure_qty=10**9,
        )
        for k, n in enumerate(numbers)
    ]  # fmt: skip
    written(folder / "all.definition.dbn.zst", d.Schema.DEFINITION, firsts[0], symbols, b"".join(map(bytes, made)))
    halt = firsts[-1] + 60 * SCALE
    closes = halt + 120 * SCALE
    steps = [(firsts[0], TRADING), (halt, HALT), (halt + 20 * SCALE, AUCTION), (halt + 40 * SCALE, TRADING), (closes, CLOSE)]
    told = np.zeros(len(steps), STATUS)
    for i, (ts, action) in enumerate(steps):
        told[i] = (bytes([STATUS.itemsize // 4, 0x12, 2, 0]), numbers[1], ts, ts, action, 1, 0, "~", "~", "~", b"")
    written(folder / "all.status.dbn.zst", d.Schema.STATUS, firsts[0], symbols, told.tobytes())
    catalog = import_dbn([folder], root / "catalog").root
    result = run(RunConfig(catalog=catalog, artifacts=small.artifact, out=root / "out", strategy=EAGER, rule=False))
    session = read_catalog(catalog)[0][0].session
    return Season(catalog, root / "out", result, (halt, halt + 40 * SCALE), [session_bounds(session, t)[0] for t in firsts], closes)


def test_the_roll_is_told_in_summary_report_and_catalog(season: Season) -> None:
    first, second = (x.id for x in season.result.instruments)
    roll = {"underlying": "XX", "from": first, "to": second, "ts": season.opens[2]}
    assert season.summary["rolls"] == [roll]
    page = (season.out / "report.html").read_text()
    assert "roll of" in page and f"roll from {first} to {second}" in page


def test_no_label_reaches_into_the_halt_the_auction_or_over_the_roll(season: Season, tmp_path: Path) -> None:
    write(season.catalog, tmp_path / "f.parquet")
    table = pq.read_table(tmp_path / "f.parquet").to_pandas()
    a, b = season.shut
    for label, h in zip(LABELS, HORIZONS_NS):
        ts, known = (table[c].astype("int64").to_numpy() for c in ("ts", f"known {label}"))
        move = table[f"move {label}"].to_numpy()
        second = (table["instrument"] == season.result.instruments[1].id).to_numpy()
        hit = (ts < b) & (ts + h >= a) & second
        assert hit.any() and np.isnan(move[hit]).all(), label
        assert np.isfinite(move[~second & (ts < b) & (ts + h >= a) & (known > 0)]).any(), "the other contract trades on"
        for opens in season.opens:
            assert np.isnan(move[(ts < opens) & (ts + h >= opens)]).all()
        free = second & (known > 0) & ~hit & (ts > a - 10 * SCALE - h) & (ts < b + 10 * SCALE)
        assert np.isfinite(move[free]).mean() > 0.9
    predicted = pq.read_table(season.out / "predictions.parquet").to_pandas()
    ts = predicted["ts"].astype("int64").to_numpy()
    mine = (predicted["instrument"] == season.result.instruments[1].id).to_numpy()
    assert predicted["move_1s"][mine & (ts < b) & (ts + SCALE >= a)].isna().all()


def test_nothing_is_entered_in_the_halt_or_the_auction(season: Season) -> None:
    decisions = season.summary["decisions"]
    assert decisions["market: halted"] > 0 and decisions["market: auction"] > 0
    fills = pq.read_table(season.out / "fills.parquet").to_pandas()
    mine = fills[(fills["instrument"] == season.result.instruments[1].id) & (fills["role"] == "entry")]
    ts = mine["ts"].astype("int64").to_numpy()
    assert len(ts) > 20
    assert not ((ts > season.shut[0] + 10**8) & (ts < season.shut[1])).any(), "but for the orders under way when it began"
    assert ((ts < season.shut[0]).any() and (ts > season.shut[1]).any())


def test_only_the_front_contract_is_entered(season: Season) -> None:
    fills = pq.read_table(season.out / "fills.parquet").to_pandas()
    first, second = ((fills["instrument"] == x.id) & (fills["role"] == "entry") for x in season.result.instruments)
    ts, roll = fills["ts"].astype("int64"), season.opens[2]
    assert (ts[first] < roll).all() and (ts[second] >= roll).all() and first.any() and second.any()
    assert season.summary["decisions"]["not the front contract"] > 0


def test_on_a_half_day_all_is_closed_before_the_market_is(season: Season) -> None:
    positions = pq.read_table(season.out / "positions.parquet").to_pandas()
    mine = positions[positions["instrument"] == season.result.instruments[1].id]
    opened, closed = (mine[c].astype("int64").to_numpy() for c in ("opened", "closed"))
    assert session_bounds(read_catalog(season.catalog)[0][1].session, season.closes)[1] > season.closes + 60 * SCALE
    assert (opened > season.closes - 60 * SCALE).any() and (closed < season.closes).all()
    last = pq.read_table(season.out / "predictions.parquet").to_pandas()
    late = (last["instrument"] == season.result.instruments[1].id) & (last["ts"].astype("int64") >= season.closes - SCALE)
    assert late.any() and last["move_1s"][late].isna().all()
