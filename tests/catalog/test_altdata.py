"""Alternative data: what a decision sees is what was known, and what Polygon tells becomes rows of known meaning."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_polygon import DAY, KEY, NY, Service, market, ns, true_trades
from test_polygon import service as service

from catalog import altfill, polygon, tape
from catalog import asof as joins
from catalog.__main__ import main
from catalog.altdata import FEATURES, INDEX, NAMES, Table, delayed, extended, markdown, merge, read, stack, table, write
from catalog.asof import Lookup, asof, lookup
from catalog.errors import InputError

T0 = 1_700_000_000 * 10**9
S = 10**9
VIX, COUNT, SHARE = "vix", "news_count", "dark_pool_share"


def test_the_27_features_are_those_asked_for() -> None:
    assert len(FEATURES) == len(set(NAMES)) == 27
    assert Counter(f.group for f in FEATURES) == {"options flow": 8, "sentiment": 7, "large trades": 6, "macro": 6}
    assert all(f.low < f.high and f.delay_s >= 0 and f.definition.endswith(".") for f in FEATURES)


def test_the_documentation_is_the_table_in_code() -> None:
    assert (Path(__file__).parents[2] / "docs/altdata.md").read_text() == markdown()


# --- as of ---


IDS = ["AAPL.XNAS", "MSFT.XNAS"]


def slow(rows: list[tuple[str, str, float, int, int]], instrument: str, ts: int) -> tuple[list[float], list[float]]:
    values, ages = [math.nan] * 27, [math.nan] * 27
    near = {"*": 0, instrument.split(".")[0]: 1, instrument: 2}
    for f, name in enumerate(NAMES):
        seen = [(event, known, near[i], v) for i, n, v, event, known in rows if n == name and i in near and known <= ts]
        if seen:
            values[f], ages[f] = max(seen)[3], (ts - max(seen)[0]) / 1e9
    return values, ages


ROW = st.tuples(
    st.sampled_from(["*", "AAPL", "AAPL.XNAS", "MSFT"]), st.sampled_from([COUNT, VIX, "block_count"]), st.integers(0, 50).map(float),
    st.integers(0, 20), st.integers(0, 20),
)  # fmt: skip


def stamped(rows: list[tuple[str, str, float, int, int]]) -> list[tuple[str, str, float, int, int]]:
    """One value for the same stamps, as a table demands; known at or after the event."""
    kept = {(i, n, e, e + k): v for i, n, v, e, k in rows}
    return [(i, n, v, T0 + e, T0 + k) for (i, n, e, k), v in kept.items()]


@given(st.lists(ROW, max_size=30), st.lists(st.integers(-3, 45), min_size=1, max_size=12))
def test_a_join_equals_a_search_and_one_decision_its_block(rows: list[Any], at: list[int]) -> None:
    rows = stamped(rows)
    known = Lookup(table(rows), IDS)
    ts, who = np.array([T0 + t for t in at]), np.arange(len(at)) % 2
    values, ages = known.at(who, ts)
    assert values.shape == ages.shape == (len(at), 27)
    for k, t in enumerate(ts.tolist()):
        want = slow(rows, IDS[who[k]], t)
        np.testing.assert_array_equal(values[k], want[0])
        np.testing.assert_array_equal(ages[k], want[1])
        one = known.at(who[k : k + 1], ts[k : k + 1])
        assert one[0].tobytes() == values[k].tobytes() and one[1].tobytes() == ages[k].tobytes()
        assert asof(table(rows), IDS[who[k]], ts[k : k + 1])[0].tobytes() == values[k].tobytes()
    some = np.array([INDEX[VIX], INDEX[COUNT]])
    np.testing.assert_array_equal(known.at(who, ts, some)[0], values[:, some])


@given(st.lists(ROW, max_size=25), st.lists(ROW, max_size=10), st.integers(0, 40))
def test_no_decision_sees_what_was_known_later(past: list[Any], later: list[Any], now: int) -> None:
    """Rows known after a decision, whatever they are about, and rows pushed past it, leave it as it was."""
    rows = stamped(past)
    ts = np.arange(T0, T0 + now + 1)

    def seen(known: list[Any]) -> bytes:
        return b"".join(a.tobytes() for a in asof(table(known), "AAPL.XNAS", ts))

    before = [r for r in rows if r[4] < T0 + now]
    after = [(i, n, v, e, k + now) for i, n, v, e, k in stamped(later) if e < k + now and k + now > ts[-1]]
    assert seen(before + after) == seen(before)
    pushed = {(i, n, e): (i, n, v, e, max(k, T0 + now + 1)) for i, n, v, e, k in rows}
    assert seen(list(pushed.values())) == seen([])


def test_a_value_counts_from_the_moment_it_is_known_and_grows_old() -> None:
    data = table([("AAPL", SHARE, 0.4, T0, T0 + 5 * S), ("*", VIX, 13.5, T0, T0)])
    values, ages = asof(data, "AAPL.XNAS", np.array([T0 - 1, T0, T0 + 5 * S - 1, T0 + 5 * S, T0 + 60 * S]))
    assert np.isnan(values[:3, INDEX[SHARE]]).all() and values[3:, INDEX[SHARE]].tolist() == [0.4, 0.4]
    assert ages[3:, INDEX[SHARE]].tolist() == [5.0, 60.0]
    assert values[1:, INDEX[VIX]].tolist() == [13.5] * 4 and np.isnan(values[0]).all()
    others = [k for k in range(27) if k not in (INDEX[SHARE], INDEX[VIX])]
    assert np.isnan(values[:, others]).all() and np.isnan(ages[:, others]).all()


def test_a_revision_replaces_and_old_news_that_comes_late_does_not() -> None:
    rows = [
        ("AAPL", SHARE, 0.1, T0, T0 + 1), ("AAPL", SHARE, 0.2, T0 + 10, T0 + 11),
        ("AAPL", SHARE, 0.3, T0, T0 + 20), ("AAPL", SHARE, 0.4, T0 + 10, T0 + 30),
    ]  # fmt: skip
    values, _ = asof(table(rows), "AAPL.XNAS", T0 + np.array([0, 1, 11, 20, 30]))
    np.testing.assert_array_equal(values[:, INDEX[SHARE]], [np.nan, 0.1, 0.2, 0.2, 0.4])


@given(
    st.lists(ROW, max_size=20), st.lists(st.tuples(ROW, st.integers(0, 45)), max_size=10),
    st.lists(st.integers(0, 45), min_size=1, max_size=8), st.integers(0, 4),
)  # fmt: skip
def test_rows_that_arrive_while_decisions_are_made_count_as_if_they_had_been_there(
    rows: list[Any], new: list[tuple[Any, int]], at: list[int], fold: int
) -> None:
    """Each new row comes in at some time, late or early, alone; from then on a decision sees what a table with it from the start shows."""
    whole = stamped(rows + [r for r, _ in new])
    late = [(r, t) for r, t in zip(whole, [t for _, t in new] + [0] * len(whole)) if r not in set(stamped(rows))]
    there = [r for r in whole if r not in {r for r, _ in late}]
    known, was = Lookup(table(there), IDS), joins.FOLD
    joins.FOLD = fold
    try:
        for t in sorted(at):
            for r in [r for r, when in late if when <= t and r not in there]:
                known.push(table([r]))
                there.append(r)
            got = known.at(np.zeros(1, np.int64), np.array([T0 + t]))
            want = slow(there, "AAPL.XNAS", T0 + t)
            np.testing.assert_array_equal(got[0][0], want[0])
            np.testing.assert_array_equal(got[1][0], want[1])
    finally:
        joins.FOLD = was
    assert sorted(known.data.rows()) == sorted(there) and len(known.of(["MSFT.XNAS"])) <= len(known)


def test_a_table_about_others_is_told() -> None:
    with pytest.raises(InputError, match=r"tell of AAPL, AAPL.XNAS, not of MSFT.XNAS"):
        lookup(table([r for r in ROWS if r[0] != "*"]), ["MSFT.XNAS"])
    assert lookup(table(ROWS), ["MSFT.XNAS"]).told(T0, T0 + 1000 * S) == {VIX: 1}


def test_rows_are_stacked_delayed_and_extended() -> None:
    one, other = table(ROWS), table([("MSFT", VIX, 1.0, T0, T0), ("AAPL", SHARE, 0.5, T0 + 1, T0 + 1)])
    assert sorted(stack(one, other).rows()) == sorted([*one.rows(), *other.rows()]) and len(stack()) == 0
    assert [(e, k - 2 * S) for *_, e, k in delayed(one, 2.0).rows()] == [(e, k) for *_, e, k in one.rows()]
    whole, changed = extended(one, other)
    assert changed == 1 and sorted(whole.rows()) == sorted([*one.rows(), other.rows()[0]])


# --- files ---

ROWS = [("*", VIX, 13.5, T0, T0 + 900 * S), ("AAPL", SHARE, 0.25, T0 + 1, T0 + 1), ("AAPL.XNAS", COUNT, 3.0, T0 + 123_456_789, T0 + S)]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    data = table(ROWS)
    write(data, tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet").rows() == data.rows() == sorted(ROWS, key=lambda r: (r[4], r[3]))
    assert pq.read_schema(tmp_path / "t.parquet").field("ts_known").type == pa.timestamp("ns", "UTC")
    write(table([]), tmp_path / "none.parquet")
    assert len(read(tmp_path / "none.parquet")) == 0
    assert [p.name for p in tmp_path.glob("*.part")] == []
    assert merge(data, data, table([("MSFT", VIX, 1.0, T0, T0)])).rows() == table([*ROWS, ("MSFT", VIX, 1.0, T0, T0)]).rows()


@pytest.mark.parametrize("stamps", ["ns", "iso", "offset"])
def test_a_csv_of_the_same_rows_is_the_same_table(tmp_path: Path, stamps: str) -> None:
    def spell(t: int) -> str:
        iso = f"{np.datetime64(t, 'ns')}"
        moved = f"{np.datetime64(t - 5 * 3600 * S, 'ns')}-05:00"
        return {"ns": str(t), "iso": iso.replace("T", " ") + "Z", "offset": moved}[stamps]

    lines = [f"{v},{spell(k)},{i},{spell(e)},{n},a remark" for i, n, v, e, k in ROWS]
    (tmp_path / "t.csv").write_text("\n".join(["value,ts_known,instrument,ts_event,feature,remark", *lines]))
    assert read(tmp_path / "t.csv").rows() == table(ROWS).rows()


def test_parquet_made_elsewhere_is_read(tmp_path: Path) -> None:
    """Dictionaries, other units, integer stamps, float32."""
    stamps = pa.array([T0 // 1000, T0 // 1000 + 1]).cast(pa.timestamp("us", "America/New_York"))
    words = pa.array(["AAPL", "AAPL"]).dictionary_encode(), pa.array([VIX, COUNT], pa.large_string())
    columns = {"instrument": words[0], "feature": words[1], "value": pa.array([1.5, 2.0], pa.float32()), "ts_event": stamps}
    pq.write_table(pa.table({**columns, "ts_known": pa.array([T0 + 5000, T0 + 6000])}), tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet").rows() == [("AAPL", VIX, 1.5, T0, T0 + 5000), ("AAPL", COUNT, 2.0, T0 + 1000, T0 + 6000)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"AAPL,dark_pool_shar,0.5,{T0},{T0}", "row 3: unknown feature 'dark_pool_shar': 'dark_pool_share' is meant?"),
        (f"AAPL,{{}},0.5,{T0},{T0}", "row 3: unknown feature '{}': docs/altdata.md has the 27 names"),
        (f"AAPL,vix,13,{T0},{T0 - 1}", "row 3: vix was known (2023-11-14T22:13:19.999999999Z) before it happened"),
        (f"AAPL,vix,nan,{T0},{T0}", "row 3: the value of vix is not finite"),
        (f"AAPL,dark_pool_share,40,{T0},{T0}", "row 3: dark_pool_share is 40, not within 0 to 1"),
        (f"AAPL,vix,13,{T0 // 10**6},{T0 // 10**6}", "row 3: ts_event is outside 1990 to 2100: stamps are ns"),
        (f"AAPL,vix,,{T0},{T0}", "row 3: no value: every row needs"),
        (f"  ,vix,1,{T0},{T0}", "row 3: no instrument"),
        (f"AAPL,vix,much,{T0},{T0}", "column 'value' is not all numbers"),
        (f"AAPL,vix,1,2024-01-03T10:00:00,{T0}", "row 3: ts_event is '2024-01-03T10:00:00': write 2024-01-03T14:30:00Z"),
        (f"AAPL,vix,1,yesterday,{T0}", "row 3: ts_event is 'yesterday'"),
        (f"AAPL,vix,2,{T0},{T0}", "vix of AAPL has two values, 1.0 and 2.0, for 2023-11-14T22:13:20.000000000Z"),
    ],
)
def test_each_fault_of_a_row_is_named(tmp_path: Path, line: str, words: str) -> None:
    first = f"AAPL,vix,1,{T0},{T0}" if ",2," in line else f"MSFT,vix,1,{T0},{T0}"
    (tmp_path / "t.csv").write_text(f"instrument,feature,value,ts_event,ts_known\n{first}\n{line}\n")
    with pytest.raises(InputError) as e:
        read(tmp_path / "t.csv")
    assert words in str(e.value) and str(tmp_path / "t.csv") in str(e.value) and "\n" not in str(e.value)


def test_each_fault_of_a_file_is_named(tmp_path: Path) -> None:
    def said(name: str, content: bytes | pa.Table | None) -> str:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            pq.write_table(content, path)
        with pytest.raises(InputError) as e:
            read(path)
        assert str(path) in str(e.value) and "\n" not in str(e.value)
        return str(e.value)

    assert "does not exist" in said("none.csv", None)
    assert "neither .parquet nor .csv" in said("t.xlsx", b"x")
    assert "cannot be read as parquet" in said("t.parquet", b"PAR1 no")
    assert "has no column 'ts_known'" in said("u.csv", b"instrument,feature,value,ts_event\nAAPL,vix,1,1\n")
    naive = pa.array([T0]).cast(pa.timestamp("ns"))
    good = {"instrument": pa.array(["A"]), "feature": pa.array([VIX]), "value": pa.array([1.0])}
    assert "has no time zone" in said("v.parquet", pa.table({**good, "ts_event": naive, "ts_known": naive}))
    good |= {"ts_event": pa.array([T0]), "ts_known": pa.array([T0])}
    assert "column 'value' holds string" in said("w.parquet", pa.table({**good, "value": pa.array(["1"])}))
    assert "column 'feature' holds int64" in said("x.parquet", pa.table({**good, "feature": pa.array([1])}))
    assert "column 'ts_event' holds double" in said("y.parquet", pa.table({**good, "ts_event": [1.5]}))


# --- filled from Polygon: large trades ---


def by_time(rows: list[altfill.Row], name: str, instrument: str = "AAPL") -> dict[int, float]:
    return {e: v for i, n, v, e, _ in rows if n == name and i == instrument}


def true_windows(held: dict[str, Any]) -> dict[int, dict[str, float]]:
    raw = {(t["id"], t["sip_timestamp"]): t for t in held["/v3/trades/AAPL"]}
    groups: dict[int, list[Any]] = {}
    for price, size, side, name, _, ts in true_trades(held):
        groups.setdefault(ts // altfill.WINDOW, []).append((float(price), size, side, raw[name, ts], ts))
    out = {}
    for w, g in groups.items():
        def net(which: list[Any]) -> float:
            return sum(s * z for _, z, s, _, _ in which) / sum(z for _, z, *_ in which) if which else 0.0

        dark = [t for t in g if t[3]["exchange"] == 4 and t[3].get("trf_id")]
        block = [t for t in g if t[1] >= 10_000 or t[0] * t[1] >= 200_000]
        large = [t for t in g if t not in block and t[0] * t[1] >= 50_000]
        sweeps, run = 0, []
        for t in [t for t in g if 14 in t[3].get("conditions", []) and t[2]] + [None]:
            if run and (t is None or t[4] - run[-1][4] > 1_000_000 or t[2] != run[-1][2]):
                sweeps += len({r[3]["exchange"] for r in run}) > 1
                run = []
            run.append(t)
        out[(w + 1) * altfill.WINDOW] = {
            "dark_pool_share": sum(t[1] for t in dark) / sum(t[1] for t in g), "dark_pool_net_side": net(dark), "block_count": len(block),
            "block_imbalance": net(block), "large_order_imbalance": net(large), "sweep_count": sweeps,
        }  # fmt: skip
    return out


def busy(seed: int) -> dict[str, Any]:
    """A day over several windows, with sweeps over two exchanges at once."""
    held = market(seed, n=900)
    trades, r = held["/v3/trades/AAPL"], random.Random(seed)
    start = DAY[0] + 34_200 * S
    for k, row in enumerate(held["/v3/quotes/AAPL"]):
        row["sip_timestamp"] = start + k * 1_500_000_000
    for k, t in enumerate(list(trades)):
        t["sip_timestamp"] = start + k * 2_500_000_000 + 7
        if k % 9 == 0:
            trades[k] = {**t, "conditions": [14], "exchange": 11, "size": r.choice([100, 300])}
            at = t["sip_timestamp"]
            trades.append({**trades[k], "id": f"s{k}", "exchange": 12, "sip_timestamp": at + 400_000})
            trades.append({**trades[k], "id": f"b{k}", "size": r.choice([400, 20_000]), "sip_timestamp": at + S, "conditions": []})
    trades.sort(key=lambda t: t["sip_timestamp"])
    return held


def test_large_trades_of_the_tape_are_what_a_slow_count_finds(service: Service, tmp_path: Path) -> None:
    service.held = busy(21)
    data, left = altfill.fill(service.rest(), ["AAPL"], *DAY, groups=["large trades"], parts=tmp_path)
    want = true_windows(service.held)
    assert left == {} and len(want) > 4
    for name in ("dark_pool_share", "dark_pool_net_side", "block_count", "block_imbalance", "large_order_imbalance", "sweep_count"):
        got = by_time(data.rows(), name)
        assert got.keys() == want.keys()
        np.testing.assert_allclose([got[w] for w in want], [want[w][name] for w in want], rtol=0, atol=1e-12)
        assert len({round(w[name], 6) for w in want.values()}) > 1, name  # not the same everywhere: the comparison tells something
    assert (data.ts_known == data.ts_event).all()


def test_windows_do_not_depend_on_how_trades_come_in(service: Service, tmp_path: Path) -> None:
    service.held = busy(22)
    found = []
    for page in (97, 500, 50_000):
        todo = polygon.wants(("AAPL",), *DAY)
        files = polygon.download(service.rest(), todo, tmp_path / str(page), page=page)
        kinds = [[f for f in files if k in f.parts] for k in ("quotes", "trades")]
        blocks = tape.trades(kinds[1], Counter(), tape.quotes(kinds[0], Counter()))
        found.append(list(altfill.large_trades("AAPL", blocks)))
    assert found[0] == found[1] == found[2]


# --- filled from Polygon: everything, and nothing before its time ---


def day_bars(days: list[dt.date], closes: list[float], volume: float = 1e6, zone: dt.tzinfo = NY) -> list[dict[str, Any]]:
    return [{"t": polygon.midnight(d, zone) // 10**6, "o": c, "h": c, "l": c, "c": c, "v": volume, "n": 9} for d, c in zip(days, closes)]


def ended(bar: dict[str, Any], zone: dt.tzinfo) -> int:
    return polygon.midnight(dt.datetime.fromtimestamp(bar["t"] // 1000, zone).date(), zone) + 58_500 * S  # 16:15


WEEKDAYS = [dt.date(2023, 11, 1) + dt.timedelta(k) for k in range(75) if (dt.date(2023, 11, 1) + dt.timedelta(k)).weekday() < 5]
SPAN = ns(2024, 1, 2), ns(2024, 1, 12)


def world(seed: int, now: int) -> dict[str, Any]:
    """What the service holds at `now`: nothing that had not happened."""
    r = random.Random(seed)
    held = {k: v for k, v in busy(seed).items() if "/v3/" in k}
    for kind in ("quotes", "trades"):
        held[f"/v3/{kind}/AAPL"] = [t for t in held[f"/v3/{kind}/AAPL"] if t["sip_timestamp"] <= now]

    def bars(ticker: str, closes: list[float], zone: dt.tzinfo = NY, volumes: list[float] | None = None) -> None:
        rows = day_bars(WEEKDAYS, closes, zone=zone)
        for b, v in zip(rows, volumes or [1e6] * len(rows)):
            b["v"] = v
        over = [ended(b, zone) + 27_900 * S * (zone is dt.UTC) <= now for b in rows]
        running = [{**b, "c": b["c"] * 1.1, "v": b["v"] // 2} for b, o in zip(rows, over) if not o and b["t"] * 10**6 <= now]
        held[f"/v2/aggs/ticker/{ticker}/range/1/day"] = [b for b, o in zip(rows, over) if o] + running

    def walk(start: float, step: float) -> list[float]:
        return [start := start * math.exp(r.gauss(0, step)) for _ in WEEKDAYS]

    spot = walk(185.0, 0.02)
    bars("AAPL", spot)
    bars("XLK", walk(190.0, 0.01))
    bars("I:VIX", walk(13.0, 0.05))
    for pair, at in zip(altfill.DOLLAR, (1.1, 145.0, 1.27, 1.34, 10.2, 0.85)):
        bars(f"C:{pair}", walk(at, 0.004), dt.UTC)
    contracts = []
    for expiry in (dt.date(2023, 12, 15), dt.date(2024, 1, 19), dt.date(2024, 2, 16), dt.date(2024, 6, 21)):
        for strike in (100, 130, 185, 200, 240):
            for kind in ("put", "call"):
                ticker = f"O:AAPL{expiry:%y%m%d}{kind[0].upper()}{strike * 1000:08d}"
                contracts.append({"ticker": ticker, "contract_type": kind, "expiration_date": expiry.isoformat(), "strike_price": strike})
                bars(ticker, [1.0] * len(WEEKDAYS), volumes=[float(r.randrange(1, 500)) for _ in WEEKDAYS])
    today = dt.datetime.fromtimestamp(now // S, NY).date()
    held["/v3/reference/options/contracts"] = lambda q: [
        c for c in contracts
        if (dt.date.fromisoformat(c["expiration_date"]) < today) == (q["expired"] == "true")
        and q["expiration_date.gte"] <= c["expiration_date"] <= q["expiration_date.lte"]
        and float(q["strike_price.gte"]) <= c["strike_price"] <= float(q["strike_price.lte"])
    ]  # fmt: skip
    articles = []
    at = ns(2023, 12, 29)
    for k in range(50):
        at += r.choice([600, 9_000, 30_000, 60_000, 100_000]) * S
        mood = r.choice(["positive", "negative", "neutral", None])
        insights = [{"ticker": "MSFT", "sentiment": "positive"}] + ([{"ticker": "AAPL", "sentiment": mood}] if mood else [])
        title = " ".join(r.choices(["Apple", "sells", "more", "phones", "chips", "law", "suit", "AI"], k=5))
        iso = dt.datetime.fromtimestamp(at // S, dt.UTC).isoformat().replace("+00:00", "Z")
        articles.append({"id": str(k), "title": title, "published_utc": iso, "tickers": ["AAPL"], "insights": insights})
    out = [a for a in articles if altfill._parse(a["published_utc"]) <= now]
    held["/v2/reference/news"] = lambda q: [a for a in out if q["published_utc.gte"] <= a["published_utc"] <= q["published_utc.lte"]]
    held["articles"] = articles
    held["/fed/v1/treasury-yields"] = [
        {"date": d.isoformat(), "yield_2_year": round(4.3 + r.gauss(0, 0.1), 2), "yield_10_year": round(4.0 + r.gauss(0, 0.1), 2)}
        for d in WEEKDAYS if altfill._at(d, 16) <= now
    ]  # fmt: skip
    common = {"ticker": "AAPL", "time": "21:30:00", "estimated_eps": 2.0}
    report = {**common, "date": "2024-01-04", "actual_eps": 2.2, "last_updated": "2024-01-04T21:47:00Z"}
    ahead = {**common, "date": "2024-02-01", "last_updated": "2024-01-01T00:00:00Z"}
    held["/benzinga/v1/earnings"] = [report, ahead] if now >= ns(2024, 1, 4, 17) else [ahead]
    return held


LATE = ns(2024, 3, 1)
HISTORY = {
    "put_call_volume", "unusual_volume", "news_sentiment", "news_count", "news_novelty", "earnings_surprise", "dark_pool_share",
    "dark_pool_net_side", "block_count", "block_imbalance", "large_order_imbalance", "sweep_count", "vix", "vix_change", "us10y_change",
    "yield_slope", "dollar_change", "sector_return",
}  # fmt: skip


def filled(service: Service, where: Path, now: int, span: tuple[int, int] = SPAN) -> Table:
    service.held = world(5, now)
    data, left = altfill.fill(service.rest(), ["AAPL"], *span, parts=where, sectors={"AAPL": "XLK"}, now=now)
    assert left == {}
    return data


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Table, dict[str, Any]]]:
    """Everything, asked for long after, and what the service held then."""
    service = Service()
    yield filled(service, tmp_path_factory.mktemp("late"), LATE), service.held
    service.close()


def test_history_fills_what_the_documentation_says(late: tuple[Table, dict[str, Any]]) -> None:
    data, _ = late
    assert {NAMES[f] for f in data.feature} == HISTORY == {f.name for f in FEATURES if f.polygon.endswith("history")}
    assert ((data.ts_known >= SPAN[0]) & (data.ts_known <= SPAN[1])).all()
    delay = np.array([f.delay_s for f in FEATURES])[data.feature] * S
    assert (data.ts_known - data.ts_event >= delay).all()


@pytest.mark.parametrize("now", [ns(2024, 1, 3, 9, 47), ns(2024, 1, 5, 8, 30), ns(2024, 1, 8, 16, 20)])
def test_no_row_of_history_needs_what_came_after_it_was_known(
    late: tuple[Table, dict[str, Any]], service: Service, tmp_path: Path, now: int
) -> None:
    """Asked at `now`, when the service holds no more than had happened, it gives the rows that a later asking gives as known by then."""
    whole = [r for r in late[0].rows() if r[4] <= now]
    then = filled(service, tmp_path, now, (SPAN[0], LATE)).rows()
    assert {r[1] for r in whole} >= HISTORY - {"earnings_surprise"}
    assert sorted(whole) == sorted(r for r in then if r[1] in HISTORY and r[4] <= now)
    assert all(event <= now for *_, event, _ in then)  # nothing about a window or a day that is not over


def test_option_volume_is_what_a_slow_count_finds(late: tuple[Table, dict[str, Any]]) -> None:
    data, held = late
    closes = {d: b["c"] for d, b in zip(WEEKDAYS, held["/v2/aggs/ticker/AAPL/range/1/day"])}
    totals: dict[dt.date, Counter[str]] = {}
    for before, day in pairwise(WEEKDAYS):
        totals[day] = Counter()
        for path, bars in held.items():
            if "/O:AAPL" in path:
                name = path.split("/")[4]
                expiry, strike = dt.datetime.strptime(name[6:12], "%y%m%d").date(), int(name[13:]) / 1000
                if 0 <= (expiry - day).days <= 60 and abs(strike / closes[before] - 1) <= 0.3:
                    totals[day][name[12]] += bars[WEEKDAYS.index(day)]["v"]
    ratio, unusual = (by_time(data.rows(), n) for n in ("put_call_volume", "unusual_volume"))
    assert len(ratio) == len(unusual) == 8
    for event, got in ratio.items():
        day = dt.datetime.fromtimestamp(event // S, NY).date()
        assert got == pytest.approx(totals[day]["P"] / totals[day]["C"], rel=1e-12)
        days = [d for d in WEEKDAYS if d < day][-20:]
        assert unusual[event] == pytest.approx(totals[day].total() / (sum(totals[d].total() for d in days) / 20), rel=1e-12)


def test_news_are_counted_over_a_day_and_judged_for_the_symbol_alone(late: tuple[Table, dict[str, Any]]) -> None:
    data, held = late
    articles = [(altfill._parse(a["published_utc"]), a) for a in held["articles"]]
    count, mood, novel = (by_time(data.rows(), n) for n in ("news_count", "news_sentiment", "news_novelty"))
    assert len(count) > 30 and set(novel) < set(count) and min(count.values()) == 0.0
    for t, got in count.items():
        day = [a for at, a in articles if t - 86_400 * S < at <= t]
        assert got == len(day)
        said = [i["sentiment"] for a in day for i in a["insights"] if i["ticker"] == "AAPL"]
        if said or not day:
            score = sum({"positive": 1, "negative": -1, "neutral": 0}[s] for s in said) / len(said) if said else 0.0
            assert mood[t] == pytest.approx(score, abs=1e-12)
        else:
            assert t not in mood
    for t, got in novel.items():
        words = next(set(a["title"].lower().split()) for at, a in articles if at == t)
        before = [set(a["title"].lower().split()) for at, a in articles if t - 3 * 86_400 * S < at < t]
        assert got == pytest.approx(1 - max((len(words & w) / len(words | w) for w in before), default=0.0), abs=1e-12)


def test_macro_rows_are_known_after_the_close_and_yields_the_next_morning(late: tuple[Table, dict[str, Any]]) -> None:
    data, held = late
    rows = data.rows()
    vix = dict(zip(WEEKDAYS, (b["c"] for b in held["/v2/aggs/ticker/I:VIX/range/1/day"])))
    close = ns(2024, 1, 3, 16, 15)
    assert by_time(rows, "vix", "*")[close] == vix[dt.date(2024, 1, 3)]
    assert by_time(rows, "vix_change", "*")[close] == vix[dt.date(2024, 1, 3)] - vix[dt.date(2024, 1, 2)]
    assert {k for _, n, _, e, k in rows if n == "vix" and e == close} == {ns(2024, 1, 3, 16, 30)}
    curve = {y["date"]: y for y in held["/fed/v1/treasury-yields"]}
    at = ns(2024, 1, 5, 15, 30)
    ten, two = ({d: y[f"yield_{n}_year"] for d, y in curve.items()} for n in (10, 2))
    assert by_time(rows, "us10y_change", "*")[at] == pytest.approx(ten["2024-01-05"] - ten["2024-01-04"])
    assert by_time(rows, "yield_slope", "*")[at] == pytest.approx(ten["2024-01-05"] - two["2024-01-05"])
    assert {k for _, n, _, e, k in rows if n == "yield_slope" and e == at} == {ns(2024, 1, 6, 8)}
    index = {}  # the dollar index by its own formula
    for k, day in enumerate(WEEKDAYS):
        c = {p: held[f"/v2/aggs/ticker/C:{p}/range/1/day"][k]["c"] for p in altfill.DOLLAR}
        index[day] = (
            50.14348112 * c["EURUSD"] ** -0.576 * c["USDJPY"] ** 0.136 * c["GBPUSD"] ** -0.119 * c["USDCAD"] ** 0.091
            * c["USDSEK"] ** 0.042 * c["USDCHF"] ** 0.036
        )  # fmt: skip
    end = ns(2024, 1, 5, zone=dt.UTC)
    assert by_time(rows, "dollar_change", "*")[end] == pytest.approx(math.log(index[dt.date(2024, 1, 4)] / index[dt.date(2024, 1, 3)]))
    fund = dict(zip(WEEKDAYS, (b["c"] for b in held["/v2/aggs/ticker/XLK/range/1/day"])))
    change = math.log(fund[dt.date(2024, 1, 4)] / fund[dt.date(2024, 1, 3)])
    assert by_time(rows, "sector_return")[ns(2024, 1, 4, 16)] == pytest.approx(change)


def test_earnings_are_known_when_recorded(late: tuple[Table, dict[str, Any]], service: Service) -> None:
    ((_, _, value, event, known),) = (r for r in late[0].rows() if r[1] == "earnings_surprise")
    assert (round(value, 9), event, known) == (0.1, ns(2024, 1, 4, 21, 30, zone=dt.UTC), ns(2024, 1, 4, 21, 47, zone=dt.UTC))
    now = ns(2024, 1, 10, 12)
    service.held = world(5, now)
    ((_, _, days, event, known),) = (r for r in altfill.earnings(service.rest(), "AAPL", *SPAN, now) if r[1] == "days_to_earnings")
    assert (days, event, known) == (22.0, now, now)


def chain(now: int, spot: float, level: float) -> list[dict[str, Any]]:
    """A chain whose volatility at the money is level * (1 + days / 1000) and falls with the strike; delta linear in the strike."""
    out = []
    today = dt.datetime.fromtimestamp(now // S, NY).date()
    for days in (9, 23, 37, 65, 121):
        for strike in range(150, 225, 5):
            for kind in ("put", "call"):
                delta = 0.5 - (strike - spot) / 100 - (kind == "put")
                iv = level * (1 + days / 1000) * (1 - 0.002 * (strike - spot))
                out.append(
                    {"details": {"contract_type": kind, "expiration_date": (today + dt.timedelta(days)).isoformat(), "strike_price": strike,
                                 "shares_per_contract": 100, "ticker": f"O:{kind}{days}{strike}"},
                     "greeks": {"delta": delta, "gamma": 0.01}, "implied_volatility": iv, "open_interest": 200 if kind == "put" else 100,
                     "day": {"volume": 5}, "underlying_asset": {"price": spot, "ticker": "AAPL", "last_updated": now - 3 * S}}
                )  # fmt: skip
    return out + [{"details": {"contract_type": "other"}}]


def test_a_chain_snapshot_tells_volatility_skew_gamma_and_open_interest(service: Service) -> None:
    now, spot = ns(2024, 1, 8, 11), 187.0  # a Monday
    service.held = {"/v3/snapshot/options/AAPL": chain(now, spot, 0.3)}
    past = table([("AAPL", "atm_iv", 0.2 + 0.01 * k, now - (25 - k) * 86_400 * S, now - (25 - k) * 86_400 * S) for k in range(21)])
    rows = list(altfill.option_chain(service.rest(), "AAPL", now, past))
    got = {n: v for _, n, v, _, _ in rows}

    def total_variance(days: int) -> float:
        return (0.3 * (1 + days / 1000)) ** 2 * days

    near = math.sqrt((total_variance(23) + total_variance(37)) / 2 / 30)
    far = math.sqrt((total_variance(65) * 31 + total_variance(121) * 25) / 56 / 90)
    assert got["atm_iv"] == pytest.approx(near, rel=1e-9)
    assert got["iv_term_slope"] == pytest.approx(far - near, rel=1e-9)
    assert got["iv_rank"] == pytest.approx((near - 0.2) / 0.2, rel=1e-9)
    level = 0.3 * 1.023  # the expiry nearest 30 days, the shorter of two as near
    put, call = spot - 25, spot + 25  # strikes of delta -0.25 and 0.25
    assert got["skew_25d"] == pytest.approx(level * (-0.002 * (put - spot) + 0.002 * (call - spot)), rel=1e-9)
    assert got["put_call_open_interest"] == 2.0
    assert got["net_gamma_exposure"] == pytest.approx(5 * 15 * 0.01 * (100 - 200) * 100 * spot**2 * 0.01)
    assert all(k == now for *_, k in rows)
    assert {n: e for _, n, _, e, _ in rows}["put_call_open_interest"] == ns(2024, 1, 5, 16)
    assert {e for _, n, _, e, _ in rows if n != "put_call_open_interest"} == {now - 3 * S}
    assert set(got) == {f.name for f in FEATURES if f.group == "options flow" and f.polygon == "from now on"}


def test_without_a_past_there_is_no_rank_and_without_strikes_no_volatility(service: Service) -> None:
    now = ns(2024, 1, 8, 11)
    service.held = {"/v3/snapshot/options/AAPL": chain(now, 187.0, 0.3)}
    assert "iv_rank" not in {n for _, n, *_ in altfill.option_chain(service.rest(), "AAPL", now)}
    service.held = {"/v3/snapshot/options/AAPL": [{**c, "underlying_asset": {"price": 300.0}} for c in chain(now, 187.0, 0.3)]}
    found = {n for _, n, *_ in altfill.option_chain(service.rest(), "AAPL", now)}
    assert found == {"put_call_open_interest", "net_gamma_exposure", "skew_25d"}
    service.held = {}
    assert list(altfill.option_chain(service.rest(), "AAPL", now)) == []


def test_what_a_plan_leaves_out_is_told_and_the_rest_is_filled(service: Service, tmp_path: Path) -> None:
    service.held = world(5, LATE)
    service.faults = [("/benzinga", "status", 403), ("/v3/quotes", "status", 403), ("I:VIX", "status", 403)]
    data, left = altfill.fill(service.rest(), ["AAPL"], *SPAN, parts=tmp_path, now=LATE)
    assert set(left) == {"earnings", "macro"} and all("this Polygon plan does not include" in why for why in left.values())
    names = {NAMES[f] for f in data.feature}
    assert {"dark_pool_share", "block_count", "news_count"} <= names
    assert not names & {"block_imbalance", "dark_pool_net_side"}  # no quotes, no sides
    with pytest.raises(InputError, match="'weather' is no group"):
        altfill.fill(service.rest(), ["AAPL"], *SPAN, groups=["weather"])
    with pytest.raises(InputError, match="give parts"):
        altfill.fill(service.rest(), ["AAPL"], *SPAN)


# --- the command line ---


def altdata(*arguments: object, monkeypatch: pytest.MonkeyPatch, service: Service | None = None, store: Path | None = None) -> None:
    monkeypatch.setattr("sys.argv", ["catalog", "altdata", *map(str, arguments)])
    if service is not None:
        monkeypatch.setenv("POLYGON_API_KEY", KEY)
        monkeypatch.setenv("POLYGON_BASE", service.base)
        monkeypatch.setattr(polygon, "STORE", store)
    with contextlib.suppress(SystemExit):  # how Typer ends
        main()


def test_a_table_is_filled_in_one_command_and_goes_on_where_it_was_interrupted(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    service.held = world(5, LATE)
    line = ["fill", "AAPL", "--start", SPAN[0], "--end", SPAN[1], "--sector", "AAPL=XLK", "--out", tmp_path / "a.parquet"]
    service.faults = [("I:VIX", "status", 401)]
    with pytest.raises(InputError, match="refused the key"):
        altdata(*line, monkeypatch=monkeypatch, service=service, store=tmp_path)
    assert not (tmp_path / "a.parquet").exists(), "nothing half-written"
    before = len(service.asked)
    altdata(*line, monkeypatch=monkeypatch, service=service, store=tmp_path)
    again = service.asked[before:]
    assert again and not [a for a in again if "news" in a or "trades" in a or "O:" in a], "what was there is not asked for again"
    got = read(tmp_path / "a.parquet")
    assert sorted(got.rows()) == sorted(filled(service, tmp_path / "other", LATE).rows())
    said = capsys.readouterr().out
    assert f"{len(got):,} new rows, {len(got):,} in all" in said and "not there: put_call_open_interest" in said
    altdata(*line, monkeypatch=monkeypatch, service=service, store=tmp_path)
    assert "0 new rows" in capsys.readouterr().out and read(tmp_path / "a.parquet").rows() == got.rows()


def test_what_a_service_changes_later_does_not_replace_what_was_recorded(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    service.held = world(5, LATE)
    line = ["fill", "AAPL", "--start", SPAN[0], "--end", SPAN[1], "--groups", "macro", "--out", tmp_path / "a.parquet", "--json"]
    altdata(*line, monkeypatch=monkeypatch, service=service, store=tmp_path / "1")
    first = read(tmp_path / "a.parquet").rows()
    for b in service.held["/v2/aggs/ticker/I:VIX/range/1/day"]:
        b["c"] += 1
    altdata(*line, monkeypatch=monkeypatch, service=service, store=tmp_path / "2")
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["new"] == 0 and told["changed"] == sum(r[1] == VIX for r in first) > 0
    assert read(tmp_path / "a.parquet").rows() == first and told["features"][VIX]["early"] == 0


def test_users_files_are_checked_described_and_made_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    write(table(ROWS), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("instrument,feature,value,ts_event,ts_known\nMSFT,vix,20,2024-01-03T14:00:00Z,2024-01-03T14:00:01Z\n")
    altdata("merge", tmp_path / "a.parquet", tmp_path / "b.csv", "--out", tmp_path / "c.parquet", monkeypatch=monkeypatch)
    assert len(read(tmp_path / "c.parquet")) == 4
    altdata("describe", tmp_path / "c.parquet", monkeypatch=monkeypatch)
    said = capsys.readouterr().out
    assert "known sooner than their source can tell" in said and "1 of vix" in said
    altdata("describe", tmp_path / "c.parquet", "--json", monkeypatch=monkeypatch)
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] == 4 and told["features"][SHARE]["instruments"] == ["AAPL"] and len(told["missing"]) == 24


DAYS = ["fill", "AAPL", "--start", "2024-01-03", "--end", "2024-01-04"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["describe", "nowhere.parquet"], "does not exist"),
        (["fill", "AAPL", "--start", "2024-01-03", "--end", "2024-01-02", "--out", "a.parquet"], "nothing to fill"),
        ([*DAYS, "--out", "a.csv"], "written as .parquet"),
        ([*DAYS, "--out", "no/a.parquet"], "the folder no does not exist"),
        ([*DAYS, "--out", "a.parquet", "--sector", "XLK"], "SYMBOL=FUND"),
        ([*DAYS, "--out", "a.parquet", "--sector", "B=XLK"], "not among the symbols"),
        ([*DAYS, "--out", "a.parquet"], "no Polygon key"),
        (["fill", "AAPL", "--start", "soon", "--end", "2024-01-04", "--out", "a.parquet"], "no time"),
    ],
)
def test_what_the_user_got_wrong_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("POLYGON_API_KEY", raising=False)
    with pytest.raises(InputError, match=words):
        altdata(*arguments, monkeypatch=monkeypatch)
    assert not list(tmp_path.iterdir())
