"""The report tells what is in the output folder, needs no network, and claims nothing that the numbers do not show."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from catalog.errors import InputError
from catalog.events import SCALE, Instrument
from cift_strategies import report, sections
from cift_strategies.attribution import exposure
from cift_strategies.backtest import RunConfig
from cift_strategies.finished import Finished, instant
from cift_strategies.outcome import RunResult, Traded
from cift_strategies.page import DASH
from cift_strategies.performance import (
    Costs,
    Fills,
    MidPath,
    block_mean,
    costs,
    deflated_sharpe,
    drawdown,
    markouts,
    reliability,
    step_of,
    thin,
)
from cift_strategies.results import FILLS, POSITIONS, plain, table

HORIZONS = {"500ms": 500_000_000, "1s": 10**9, "5s": 5 * 10**9, "30s": 30 * 10**9}
T0 = 1_719_840_600 * 10**9
STEP = 20_000_000  # ns between decisions
TICK, FEE, SIZE = 0.01, 0.0008, 100.0
REGIMES = ("low_volatility", "trending_up", "trending_down", "high_volatility", "crisis")
MEMBERS = ("fusion", "hmm")


# A market small enough to recompute: random walks, forecasts that know the future with weight `skill`, trades that cross the spread.


def _walk(rng: Any, steps: int, start: float) -> tuple[Any, Any]:
    regime = (np.cumsum(rng.random(steps) < 1 / 500) % 5).astype(np.int8)
    move = rng.choice([-0.5, 0.0, 0.5], steps, p=[0.1, 0.8, 0.1]) * (1 + (regime >= 3))
    return regime, np.round(start + TICK * np.cumsum(move), 4)


def _forecasts(rng: Any, name: str, ts: Any, mid: Any, regime: Any, skill: float) -> tuple[dict[str, Any], dict[str, float]]:
    n = len(ts)
    delay = (1_000_000 * np.exp(rng.normal(0.5, 0.35, n))).astype(np.int64)
    row: dict[str, Any] = {"ts": ts, "delivered": ts + delay, "instrument": np.full(n, name), "mid": mid, "regime": regime}
    row["latency_ns"] = delay
    edges = {}
    for h, ns in HORIZONS.items():
        k = ns // STEP
        ahead = np.full(n, np.nan)
        ahead[: max(0, n - k)] = (mid[k:] - mid[: max(0, n - k)]) / TICK
        scale = max(float(np.nanstd(ahead)) if np.isfinite(ahead).any() else 0.0, 0.1)
        edges[h] = scale / 2
        z = skill * np.nan_to_num(ahead) / scale + rng.normal(size=n)
        logit = np.stack([-skill * z, np.full(n, 0.2), skill * z])
        p = np.exp(logit) / np.exp(logit).sum(0)
        row |= {f"p_down_{h}": p[0].astype(np.float32), f"p_flat_{h}": p[1].astype(np.float32), f"p_up_{h}": p[2].astype(np.float32)}
        row[f"direction_{h}"] = np.where(p[2] > 0.6, 1, np.where(p[0] > 0.6, -1, 0)).astype(np.int8)
        row[f"move_{h}"] = ahead.astype(np.float32)
    return row, edges


def _trade(rng: Any, name: str, ts: Any, mid: Any, regime: Any, direction: Any, currency: str) -> tuple[list[Any], list[Any]]:
    """Each decision with a direction, when flat, buys or sells `SIZE` two steps later and is out 100 to 250 steps after it."""
    fills: list[Any] = []
    trips: list[Any] = []
    free, wait = 0, 2
    for i in np.flatnonzero(direction):
        hold = int(rng.integers(100, 250))
        if i < free or i + hold >= len(ts):
            continue
        side, role, k = int(direction[i]), ("target", "stop", "exit")[int(rng.integers(3))], len(trips)
        prices = []
        for at, s, r in ((i + wait, side, "entry"), (i + hold, -side, role)):
            price = float(mid[at]) + s * TICK / 2
            prices.append(price)
            told = (name, 2 * k + (r != "entry"), k, r, s, price, SIZE, SIZE * FEE, currency, "taker", float(mid[at]), float(mid[i]), TICK)
            fills.append((int(ts[at]), *told))
        gross, fees = side * (prices[1] - prices[0]) * SIZE, 2 * SIZE * FEE
        ends = (int(ts[i + wait]), int(ts[i + hold]), side, SIZE, *prices)
        why = "horizon" if role == "exit" else role
        trips.append((k, name, *ends, gross, fees, gross - fees, currency, 5 * 10**9, int(regime[i]), 0.7, 2.0, 1.2, why))
        free = i + hold + int(rng.integers(50, 300))
    return fills, trips


def _traded(fills: list[Any], trips: list[Any], currency: str) -> Traded:
    fills, trips = sorted(fills), sorted(trips, key=lambda p: p[3])
    net, closed = np.array([p[10] for p in trips]), np.array([p[3] for p in trips], np.int64)
    level = np.cumsum(net)
    at_mid = sum(-f[5] * f[7] * f[11] for f in fills)
    turned = sum(f[7] * TICK for f in fills if f[4] == "entry")
    figures = {
        "orders": len(fills),
        "fills": len(fills),
        "positions": len(trips),
        "fees": float(sum(f[8] for f in fills)),
        "pnl_net": float(level[-1]) if len(net) else 0.0,
        "max_drawdown": float(-drawdown(level).min()) if len(net) else 0.0,
        "currency": currency,
        "hit_rate": float((net > 0).mean()) if len(net) else None,
        "break_even_cost_ticks": at_mid / turned if turned else None,
        "decisions": {"entered": len(trips), "does not pay": 31_000, "in position": 5_112},
    }
    return Traded(table(fills, FILLS), table(trips, POSITIONS), closed, level, figures, "ab" * 32)


def _scores(rng: Any, names: tuple[str, ...], skill: float) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for name in names:
        for j, h in enumerate(HORIZONS):
            one = {"log_loss": 1.02 - 0.02 * skill, "macro_f1": 0.41, "weighted_f1": 0.44, "ece": 0.008, "accuracy": 0.5}
            gain = 0.02 * skill - 0.004 * j + rng.normal(0, 0.001)
            means = {"persistence": gain, "time of day": gain + 0.01}
            over = {b: {"mean": g, "interval": [g - 0.006, g + 0.005]} for b, g in means.items()}
            effective = 1600 >> (2 * j)
            rows.append({
                "instrument": name, "horizon": h, "n": 12_345, "effective": effective,
                "verdict": "sufficient" if effective >= 100 else "insufficient", "pays": 0.31,
                "ensemble": one, "members": {m: {**one, "cover": 0.9} for m in MEMBERS}, "gain": over,
                "baselines": {b: {**one, "log_loss": 1.03} for b in over}, "decided": {"cover": 0.04, "hit_rate": 0.57, "net_ticks": -0.2},
            })  # fmt: skip
    says = [f"{r['instrument']} {r['horizon']}: better log-loss than persistence, time of day" for r in rows
            if r["verdict"] == "sufficient" and all(g["interval"][0] > 0 for g in r["gain"].values())]  # fmt: skip
    return {"table": rows, "decisions": 12_345, "claims": says, "failures": {m: 0 for m in MEMBERS}}


def simulate(
    seed: int = 0, steps: int = 6000, skill: float = 0.8, trade: bool = True, names: tuple[str, ...] = ("AAA.XNAS", "BBB.XNAS"),
    result: Any = None,
) -> tuple[RunResult, pa.Table]:  # fmt: skip
    rng, ts = np.random.default_rng(seed), T0 + np.arange(steps, dtype=np.int64) * STEP
    rows, fills, trips, mids, regimes, thresholds = [], [], [], {}, {}, {}
    for k, name in enumerate(names):
        regime, mid = _walk(rng, steps, 100.0 * (k + 1))
        row, thresholds[name] = _forecasts(rng, name, ts, mid, regime, skill)
        change = np.flatnonzero(np.r_[True, np.diff(regime) != 0])
        mids[name], regimes[name] = (ts, mid), (ts[change], regime[change])
        rows.append(row)
        if trade:
            f, p = _trade(rng, name, ts, mid, regime, row["direction_5s"], "USD")
            fills, trips = fills + f, trips + p
    order = np.argsort(np.concatenate([r["ts"] for r in rows]), kind="stable")
    columns = {c: pa.array(np.concatenate([r[c] for r in rows])[order]) for c in rows[0]}
    stamp = pa.timestamp("ns", tz="UTC")
    columns |= {c: columns[c].cast(stamp) for c in ("ts", "delivered")} | {"instrument": columns["instrument"].dictionary_encode()}
    traded = _traded(fills, trips, "USD")
    rule = _traded(fills[: len(trips) // 2 * 2], trips[: len(trips) // 2], "USD") if trade else None
    scores = _scores(rng, names, skill)
    ms = np.concatenate([r["latency_ns"] for r in rows]) / 1e6
    shape = (len(REGIMES) + 1, len(HORIZONS), len(MEMBERS))
    weights = np.broadcast_to(rng.dirichlet([2.0, 1.0], shape[:2]), shape)
    regret = {
        "members": MEMBERS, "regimes": [*REGIMES, "unknown"], "horizons": list(HORIZONS), "weights": weights,
        "regret": rng.normal(0, 1, shape), "bound": np.full(shape, 3.0), "awake": np.full(shape, 50),
    }  # fmt: skip
    summary = {
        "source": "simulation", "instruments": list(names), "events": 1_204_331, "events_streamed": 512_000, "events_per_second": 61_000.0,
        "wall_seconds": 71.3, "feature_vectors": 400_000, "predictions": len(order), **traded.summary,
        "decision_latency_ms": {"p50": float(np.percentile(ms, 50)), "p99": float(np.percentile(ms, 99))}, "order_latency_ms": 1.0,
        "baseline_rule": rule.summary if rule else None, "scores": scores, "thresholds": thresholds, "regret": regret, "left_out": [],
        "data_quality": {"crossed_books": 12, "moved_stamps": 97}, "callback_errors": 0, "digest": traded.digest, "seed": seed,
        "versions": {"nautilus_trader": "2.0.0rc7"},
    }  # fmt: skip
    instruments = [Instrument(n, 10_000_000, SCALE, 1.0, "USD", price_precision=2, kind="equity") for n in names]
    config = {"dbn": [], "catalog": None, "seed": seed, "train_fraction": None, "latency_ms": "auto", "device": "auto"}
    run = RunResult(
        source="simulation", instruments=instruments, summary=summary, scores=scores, sample={}, threshold=np.zeros((len(names), 4)),
        quality={}, split_ns=T0, start_ns=T0, end_ns=int(ts[-1]), traded=traded, rule=rule, predictions=Path("predictions.parquet"),
        mids=mids, regimes=regimes, regime_names=REGIMES, members=MEMBERS, decision_latency_ms=ms, order_latency_ms=1.0, latency_curve=[],
        regret=regret, config=config, versions={}, digest=traded.digest, result=result,
    )  # fmt: skip
    return run, pa.table(columns)


def write_run(made: tuple[RunResult, pa.Table], out: Path) -> Path:
    run, predictions = made
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps(plain(run.summary)))
    pq.write_table(run.traded.fills, out / "fills.parquet")
    pq.write_table(run.traded.positions, out / "positions.parquet")
    pq.write_table(predictions, out / "predictions.parquet", row_group_size=500)
    return report.write_report(run, out)


@pytest.fixture(scope="module")
def made() -> tuple[RunResult, pa.Table]:
    return simulate()


@pytest.fixture(scope="module")
def out(made: tuple[RunResult, pa.Table], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(made, folder)
    return folder


class Parsed(HTMLParser):
    """Figures, `<data>` values, tables and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: dict[str, Any] = {}
        self.values: dict[str, str] = {}
        self.shown: dict[str, str] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "data", "style"):
            self._open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1][0] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        tag, attrs = self._open[-1] if self._open else ("", {})
        if tag == "script" and attrs.get("type") == "application/json":
            self.figures[str(attrs["id"])] = json.loads(data)
        elif tag == "data":
            self.values[str(attrs["data-key"])], self.shown[str(attrs["data-key"])] = str(attrs["value"]), data
        if tag not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def parsed(folder: Path) -> Parsed:
    return Parsed((folder / "report.html").read_text(encoding="utf-8"))


def unpacked(a: Any) -> Any:
    return np.frombuffer(base64.b64decode(a["bdata"]), "<f8")


def test_the_page_shows_the_figures_of_the_summary(made: Any, out: Path) -> None:
    s, page = made[0].summary, parsed(out)
    for key in ("pnl_net", "max_drawdown", "fills", "hit_rate", "break_even_cost_ticks", "events_streamed"):
        assert float(page.values[key]) == pytest.approx(s[key], rel=1e-12), key
    assert page.shown["pnl_net"] == f"{s['pnl_net']:+,.2f} USD"
    assert page.shown["hit_rate"] == f"{100 * s['hit_rate']:.1f} %"
    assert page.shown["break_even_cost_ticks"] == f"{s['break_even_cost_ticks']:.2f} ticks"
    assert f"{s['baseline_rule']['pnl_net']:+,.2f} USD" in page.text
    assert s["digest"] in page.text


def test_the_page_needs_no_network_and_stays_small(out: Path) -> None:
    text = (out / "report.html").read_text(encoding="utf-8")
    assert len(text) < 8_000_000
    assert not re.search(r'<(script|link)[^>]+(src|href)="https?://', text)
    for tag, attrs in parsed(out).tags:
        for name in ("src", "href", "srcset", "data", "poster", "action"):
            value = attrs.get(name) or ""
            assert not value or value.startswith(("#", "data:")), (tag, name, value)
    head = text[: text.index("<script>")]
    assert "@import" not in head and "url(" not in head
    assert text.count("plotly.js v") == 1, "plotly.js is in the page once"


@pytest.mark.parametrize("word", ["deflated", "drawdown", "regret", "calibration", "slippage", "digest", "break-even", "latency", "regime"])
def test_the_page_speaks_of(word: str, out: Path) -> None:
    assert word in parsed(out).text.lower()


def test_every_figure_is_one_that_plotly_accepts(out: Path) -> None:
    import plotly.graph_objects as go

    page = parsed(out)
    assert len(page.figures) >= 12
    for fig in page.figures.values():
        text = re.sub(r'"var\(--[a-z0-9-]+\)"', '"#123456"', json.dumps(fig))
        assert "var(--" not in text
        go.Figure(json.loads(text))


def test_every_colour_that_a_figure_names_is_defined_for_light_and_dark(out: Path) -> None:
    text = (out / "report.html").read_text(encoding="utf-8")
    light, dark = re.findall(r":root[^{]*\{([^}]*)\}", text)[:2]
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", json.dumps(list(parsed(out).figures.values()))))
    assert used and used <= set(re.findall(r"(--[a-z0-9-]+):", light)) & set(re.findall(r"(--[a-z0-9-]+):", dark))


def test_a_page_is_made_again_from_the_folder_alone_and_is_the_same(out: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    (copy / "report.html").unlink()
    done = subprocess.run([sys.executable, "-m", "cift_strategies.report", str(copy)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (copy / "report.html").read_bytes() == (out / "report.html").read_bytes()


@pytest.mark.parametrize("name", ["summary.json", "fills.parquet", "positions.parquet", "predictions.parquet", "charts.parquet"])
def test_a_folder_that_lacks_a_file_is_refused_by_name(name: str, out: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    (copy / name).unlink()
    with pytest.raises(InputError, match=name):
        report.render(copy)


def test_a_damaged_file_is_the_users_to_mend_and_leaves_no_page(out: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    (copy / "report.html").unlink()
    (copy / "charts.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="cannot be read"):
        report.render(copy)
    assert not (copy / "report.html").exists()


HOSTILE = "<script>alert(1)</script>&\"'.XNAS"


def test_names_from_data_are_escaped_everywhere(tmp_path: Path) -> None:
    write_run(simulate(steps=3000, names=(HOSTILE, "</script><b>B.XNAS")), tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert(1)" not in text and "</script><b>" not in text
    page = parsed(tmp_path)
    assert not any(tag == "b" and not attrs for tag, attrs in page.tags if "B.XNAS" in attrs.values())
    assert HOSTILE in page.text
    for fig in page.figures.values():
        for trace in fig["data"]:
            assert "<script" not in json.dumps({k: v for k, v in trace.items() if k != "hovertemplate"})


def test_a_run_without_trades_says_so_and_claims_nothing(tmp_path: Path) -> None:
    write_run(simulate(steps=400, skill=0.0, trade=False, names=("ESH4.GLBX",)), tmp_path)
    page = parsed(tmp_path)
    assert sections.NOT_SHOWN in page.text
    for said in ("Nothing was traded", "No fills, so no costs", "No fills, so no slippage", "No decision had a direction"):
        assert said in page.text
    assert "nan" not in page.text.lower().split()


def test_a_run_without_any_decision_still_has_a_page(tmp_path: Path) -> None:
    run, predictions = simulate(steps=400, skill=0.0, trade=False, names=("ESH4.GLBX",))
    none = (np.zeros(0, np.int64), np.zeros(0))
    unknown = {"scores": {"table": [], "decisions": 0}, "thresholds": {}, "regret": {}, "decision_latency_ms": {"p50": None, "p99": None}}
    run = replace(run, summary={**run.summary, **unknown}, scores={}, mids={}, decision_latency_ms=none[1])
    run = replace(run, regimes={"ESH4.GLBX": (none[0], np.zeros(0, np.int8))})
    bare = pa.table({"ts": predictions["ts"][:0], "instrument": pa.array([], pa.string())})  # as a run without decisions leaves it
    write_run((run, bare), tmp_path)
    page = parsed(tmp_path)
    assert "No decisions, so no latencies." in page.text and "no price was seen" in page.text
    assert "Nothing could be scored out of sample" in page.text


def test_gains_whose_intervals_reach_zero_are_no_skill(made: Any, out: Path, tmp_path: Path) -> None:
    assert sections.claims(made[0].summary)
    assert sections.NOT_SHOWN not in parsed(out).text
    write_run(simulate(skill=0.1), tmp_path)
    page = parsed(tmp_path)
    assert f"Out of sample {sections.NOT_SHOWN}" in page.text
    assert "beats every baseline" not in page.text


def test_money_of_several_currencies_is_told_by_currency(made: Any, tmp_path: Path) -> None:
    run, predictions = made
    both = {"USD": 12.5, "EUR": -3.25}
    summary = {**run.summary, "currency": ["USD", "EUR"], "pnl_net": both, "fees": both, "max_drawdown": both, "baseline_rule": None}
    write_run((replace(run, summary=summary, rule=None), predictions), tmp_path)
    assert "+12.50 USD, -3.25 EUR" in parsed(tmp_path).text


def test_pnl_against_costs_is_what_the_fills_give_when_charged_again(made: Any, out: Path) -> None:
    run, done = made[0], Finished.read(out)
    fills, page = run.traded.fills.to_pylist(), parsed(out)
    lines = {t["name"]: t for f in page.figures.values() for t in f["data"] if t.get("name", "").startswith("ensemble, ")}
    for k in (0.0, 1.0, 2.5):
        everything = sum(-f["side"] * f["size"] * (f["mid"] + k * (f["price"] - f["mid"])) - k * f["fee"] for f in fills)
        fees = sum(-f["side"] * f["size"] * f["price"] - k * f["fee"] for f in fills)
        for name, expected in (("ensemble, all costs", everything), ("ensemble, fees alone", fees)):
            x, y = unpacked(lines[name]["x"]), unpacked(lines[name]["y"])
            assert np.interp(k, x, y) == pytest.approx(expected, abs=1e-6)
    for ticks in (0.0, 1.0, 3.0):
        free = sum(-f["side"] * f["size"] * f["mid"] for f in fills)
        entered = sum(f["size"] for f in fills if f["role"] == "entry")
        assert done.costs.fixed(np.array([ticks]))[0] == pytest.approx(free - ticks * TICK * entered, abs=1e-6)
    assert done.costs.net == pytest.approx(run.summary["pnl_net"])
    assert done.costs.break_even_ticks == pytest.approx(run.summary["break_even_cost_ticks"])
    assert done.costs.fixed(np.array([done.costs.break_even_ticks]))[0] == pytest.approx(0, abs=1e-6)


def test_slippage_of_entries_counts_from_the_decision_and_of_exits_from_the_moment(made: Any, out: Path) -> None:
    rows = {role: (n, mean) for role, n, mean, _ in Finished.read(out).slippage}
    fills = made[0].traded.fills.to_pylist()
    entries = [f["side"] * (f["price"] - f["decided_mid"]) / TICK for f in fills if f["role"] == "entry"]
    assert rows["entry"] == (len(entries), pytest.approx(np.mean(entries)))
    assert rows["stop"][1] == pytest.approx(0.5), "half a tick of spread"


def test_mark_outs_follow_the_mid_known_at_each_delay() -> None:
    path = MidPath(np.array([0, 10, 20, 40]), np.array([100.0, 100.5, np.nan, 99.0]))
    got = markouts(path, np.array([0, 12, 28]), np.array([1, -1, 1], np.int8), np.array([0, 9, 12, 30, 41]), tick=0.5)
    nan = math.nan
    assert np.array_equal(got, [[0, 0, 1, 1, nan], [0, 0, 0, nan, nan], [0, 0, -3, nan, nan]], equal_nan=True)


def test_mark_outs_of_the_page_equal_a_walk_through_the_predictions(made: Any, out: Path) -> None:
    run, predictions = made
    moves, steps = [], 200_000_000 // STEP
    for name in run.mids:
        rows = [r for r in predictions.select(["instrument", "mid", "direction_1s"]).to_pylist() if r["instrument"] == name]
        for now, then in zip(rows, rows[steps:]):
            if now["direction_1s"]:
                moves.append(now["direction_1s"] * (then["mid"] - now["mid"]) / TICK)
    from cift_strategies.finished import DELAYS_NS

    mean, low, high = Finished.read(out).marked[0]["1s"]
    at = int(np.flatnonzero(DELAYS_NS == 200_000_000)[0])
    assert mean[at] == pytest.approx(np.mean(moves), rel=1e-9)
    assert low[at] < mean[at] < high[at]


def test_what_is_left_of_a_move_shrinks_with_the_delay_and_ends_at_the_horizon(out: Path) -> None:
    mean, _, _ = Finished.read(out).marked[1]["5s"]
    known = mean[np.isfinite(mean)]
    assert len(known) == 11 and known[0] > known[-1] > 0


def test_thinned_reading_of_a_long_run_stays_bounded_and_near(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Finished.read(out)
    monkeypatch.setattr("cift_strategies.finished.MOST_DECISIONS", 6000)
    monkeypatch.setattr("cift_strategies.finished.STRETCHES", 3)
    part = Finished.read(out)
    n = whole.reliability["1s"].number.sum()
    assert 0.3 * n < part.reliability["1s"].number.sum() <= 2 * 6000
    assert part.reliability["1s"].ece == pytest.approx(whole.reliability["1s"].ece, abs=0.05)


def test_calibration_of_the_page_is_that_of_the_predictions(made: Any, out: Path) -> None:
    run, predictions = made
    rows = predictions.to_pylist()
    pairs = []
    for r in rows:
        edge = run.summary["thresholds"][r["instrument"]]["1s"]
        if math.isfinite(r["move_1s"]):
            pairs += [(r["p_up_1s"], r["move_1s"] > edge), (r["p_down_1s"], r["move_1s"] < -edge)]
    error = 0.0
    for b in range(15):
        inside = [(p, y) for p, y in pairs if min(int(p * 15), 14) == b]
        if inside:
            error += abs(sum(p for p, _ in inside) - sum(y for _, y in inside)) / len(pairs)
    got = Finished.read(out).reliability["1s"]
    assert got.number.sum() == len(pairs)
    assert got.ece == pytest.approx(error, rel=1e-6)


def test_honest_probabilities_lie_on_the_diagonal() -> None:
    rng = np.random.default_rng(1)
    p = rng.random(200_000)
    r = reliability(p, rng.random(200_000) < p)
    assert r.ece < 0.01 and np.abs(r.forecast - r.frequency).max() < 0.02
    assert reliability(np.full(4, np.nan), np.zeros(4, bool)).number.size == 0


def test_the_deflated_sharpe_ratio_equals_the_papers_worked_example() -> None:
    """Bailey and Lopez de Prado (2014), "A numerical example": annual ratio 2.5, 1250 days, skew -3, kurtosis 10, 100 trials.

    Kurtosis 10 is the least that skew -3 allows (1 + skew^2), which only two values give: the low one on 8.4 % of the days.
    """
    low = np.r_[np.ones(105), np.zeros(1145)]
    r = -(low - low.mean()) / low.std(ddof=1) + 2.5 / math.sqrt(250)
    z = np.linspace(-1, 1, 100)
    d = deflated_sharpe(r, trials=100, trial_ratios=list(z * math.sqrt(0.5 / 250) / z.std(ddof=1)))
    assert (d.skew, d.kurtosis, d.observations) == (pytest.approx(-3.0, abs=2e-3), pytest.approx(10.0, abs=1e-2), 1250)
    assert d.ratio == pytest.approx(2.5 / math.sqrt(250))
    assert d.expected_best == pytest.approx(0.1132, abs=1e-4)
    assert d.deflated == pytest.approx(0.9004, abs=3e-4)


def test_more_trials_deflate_more_and_one_trial_does_not() -> None:
    r = np.random.default_rng(3).normal(0.1, 1, 500)
    seen = [deflated_sharpe(r, trials=n).deflated for n in (1, 2, 10, 1000)]
    assert seen == sorted(seen, reverse=True) and seen[0] > 0.9
    assert deflated_sharpe(r).expected_best == 0
    assert not deflated_sharpe(np.zeros(50)).defined and not deflated_sharpe(np.array([1.0])).defined


def test_a_drawdown_counts_from_the_start_and_is_never_positive() -> None:
    assert drawdown(np.array([-1.0, 2.0, 0.5, 3.0, -1.0])).tolist() == [-1.0, 0.0, -1.5, 0.0, -4.0]
    assert drawdown(np.zeros(0)).size == 0


def test_the_interval_of_a_mean_covers_the_truth_though_decisions_overlap() -> None:
    rng, hits = np.random.default_rng(5), 0
    for _ in range(100):
        noise = np.convolve(rng.normal(size=6049), np.ones(50) / 7, "valid")
        _, low, high = block_mean(noise[:, None], np.arange(6000, dtype=np.int64))
        hits += bool(low[0] <= 0 <= high[0])
    assert hits >= 85
    assert np.isnan(block_mean(np.ones((2, 1)), np.array([0, 1]))[1][0])


def test_a_night_takes_nothing_from_the_interval_of_a_mean() -> None:
    values = np.random.default_rng(6).normal(size=(6_000, 1))
    found = []
    for night in (600 * 10**9, 86_400 * 10**9):
        ts = np.arange(6_000) * 10**9 + np.arange(6_000) // 3_000 * night
        found.append(np.stack(block_mean(values, ts)).tolist())
        back = np.random.default_rng(7).permutation(6_000)
        assert np.stack(block_mean(values[back], ts[back])) == pytest.approx(np.array(found[-1]))
    assert found[0] == found[1] and np.isfinite(found).all()


def test_a_thinned_path_keeps_its_ends_and_extremes() -> None:
    ts = np.arange(50_000, dtype=np.int64)
    px = np.cumsum(np.random.default_rng(2).normal(size=50_000))
    px[777] = np.nan
    t, v = thin(ts, px, 500)
    assert len(t) <= 502 and np.all(np.diff(t) > 0)
    assert (t[0], t[-1]) == (0, 49_999)
    assert v.max() == np.nanmax(px) and v.min() == np.nanmin(px)


def test_the_clocks_step_grows_with_the_span() -> None:
    assert step_of(0, 600 * 10**9)[0] == "second"
    assert step_of(0, 6 * 3600 * 10**9)[0] == "minute"
    assert step_of(0, 10**18) == ("day", 86400 * 10**9)


def test_the_night_before_the_first_price_is_not_drawn(made: Any, tmp_path: Path) -> None:
    run, predictions = made
    night = 8 * 3600 * 10**9
    write_run((replace(run, split_ns=T0 - night, start_ns=T0 - 2 * night), predictions), tmp_path)
    done = Finished.read(tmp_path)
    assert done.traded_span == (T0, run.end_ns)
    ts, pnl = done.equity("ensemble")
    assert (ts[0], pnl[0], ts[-1], pnl[-1]) == (T0, 0.0, run.end_ns, run.traded.equity[-1])
    assert done.sharpe[0] == "second"


def test_a_night_between_two_sessions_is_no_time_of_trading(made: Any, tmp_path: Path) -> None:
    run, predictions = made
    run = replace(run, config={**run.config, "limits": {"capital": 100_000.0}})
    night, cut = 17 * 3600 * 10**9, (T0 + run.end_ns) // 2

    def later(ts: Any) -> Any:
        return ts + night * (np.asarray(ts) > cut)

    moved = run.traded.positions
    for name in ("opened", "closed"):
        column = pa.array(later(np.asarray(moved[name], np.int64)), moved.schema.field(name).type)
        moved = moved.set_column(moved.schema.get_field_index(name), moved.schema.field(name), column)
    mids, regimes = ({k: (later(ts), v) for k, (ts, v) in of.items()} for of in (run.mids, run.regimes))
    two = replace(run, end_ns=run.end_ns + night, mids=mids, regimes=regimes, traded=replace(run.traded, positions=moved))
    done = []
    for name, x in (("one", run), ("two", two)):
        (tmp_path / name).mkdir()
        write_run((x, predictions), tmp_path / name)
        done.append(Finished.read(tmp_path / name))
    one, other = done
    assert other.regime_seconds == pytest.approx(one.regime_seconds, rel=0.01)
    assert one.traded_ns(np.array([T0, run.end_ns])).tolist() == [0.0, run.end_ns - T0]
    here, there = (exposure(x) for x in done)
    assert there.in_market == pytest.approx(here.in_market, rel=0.01)
    assert (there.mean, there.turnover) == pytest.approx((here.mean, here.turnover), rel=0.01)


def test_costs_without_fills_have_no_break_even() -> None:
    none = np.zeros(0)
    empty = Fills(np.zeros(0, np.int64), none.astype(object), none.astype(object), none.astype(np.int8), *([none] * 7))
    assert costs(empty, 0.0) == Costs(0.0, 0.0, 0.0, 0.0)
    assert math.isnan(costs(empty, 0.0).break_even_ticks)


def test_a_roll_is_marked_on_both_contracts_and_told_in_words(made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, predictions = made
    at = int(run.mids["AAA.XNAS"][0][3000])
    roll = {"underlying": "<ES>", "from": "AAA.XNAS", "to": "BBB.XNAS", "ts": at}
    other = {"underlying": "NQ", "from": "X.XNAS", "to": "Y.XNAS", "ts": 0}
    page = parsed(write_run((replace(run, summary={**run.summary, "rolls": [roll, other]}), predictions), tmp_path).parent)
    when = instant(at)
    assert f"<ES> {when} UTC AAA.XNAS BBB.XNAS" in " ".join(page.text.split())
    marked = [f["layout"] for f in page.figures.values() if any("roll" in a["text"] for a in f["layout"].get("annotations", ()))]
    assert len(marked) == 2, "once on each contract"
    assert all([s["x0"] for s in m["shapes"]] == [at / 1e6] for m in marked)
    report.print_summary({**run.summary, "rolls": [roll]})
    assert f"rolled from AAA.XNAS to BBB.XNAS at {when} UTC" in capsys.readouterr().out


def test_without_a_roll_the_report_says_nothing_of_rolls(out: Path, made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    report.print_summary(made[0].summary)
    assert "roll" not in parsed(out).text.lower().replace("scroll", "") and "rolled" not in capsys.readouterr().out


def test_the_command_line_of_a_run_is_spelt_out() -> None:
    config = {"dbn": ["a b.dbn.zst"], "instruments": "es.toml", "seed": 7, "latency_ms": 2.0, "device": "auto", "start": T0, "symbols": []}
    said = str(sections.command_of(config))
    assert "--dbn 'a b.dbn.zst'" in said and "--latency-ms 2.0" in said and "--seed 7" in said and "--device" not in said
    assert f"--start {T0}" in said and "--symbols" not in said
    assert "--symbols A,B" in str(sections.command_of({"symbols": ["A", "B"]}))


def test_a_command_line_that_would_make_another_run_is_not_told() -> None:
    """What has no option is in config.toml alone."""
    usual = RunConfig().model_dump(mode="json")
    assert sections.command_of(usual) == "python -m uv run run_backtest.py --seed 7"
    for more in ({"settings": {**usual["settings"], "stop_multiple": 1.0}}, {"train": ["hmm"]}, {"order_latency_ms": 5.0}, {"rule": False}):
        assert sections.command_of(usual | more) is None, more


def test_the_terminal_table_shows_the_summary(made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    s = made[0].summary
    report.print_summary(s)
    said = capsys.readouterr().out
    assert f"{s['pnl_net']:+,.2f} USD" in said and f"{s['baseline_rule']['pnl_net']:+,.2f} USD" in said
    assert "better than every baseline: AAA.XNAS 500ms" in said
    report.print_summary({**s, "scores": {"table": [], "claims": []}, "baseline_rule": None})
    assert "No skill beyond the baseline is shown." in capsys.readouterr().out
    unsure = json.loads(json.dumps(s["scores"]["table"][0]))
    for g in unsure["gain"].values():
        g["interval"] = [None, None]
    report.print_summary({**s, "scores": {"table": [unsure]}})
    said = next(line for line in capsys.readouterr().out.splitlines() if unsure["instrument"] in line)
    assert " to " not in said and DASH in said


def test_without_a_browser_the_picture_is_refused_in_one_line(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["report", str(out), "--png", str(tmp_path / "p.png")])
    from catalog.errors import exit_code

    assert exit_code(report.main) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no Chromium or Chrome") and said.count("\n") == 1
    assert not (tmp_path / "p.png").exists()


def test_the_picture_is_a_png_of_the_page(out: Path, tmp_path: Path) -> None:
    if not any(map(shutil.which, report.BROWSERS)):
        pytest.skip("no Chromium or Chrome on this machine")
    png = report.picture((out / "report.html").resolve().as_uri(), tmp_path / "p.png", 800, 900)
    head = png.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(head[16:20]), int.from_bytes(head[20:24])) == (800, 900)


def test_nautilus_tearsheet_of_a_real_engine_run_stands_in_the_page(tmp_path: Path) -> None:
    result = _nautilus_result()
    write_run(simulate(steps=3000, result=result), tmp_path)
    page = parsed(tmp_path)
    sheets = [f for f in page.figures.values() if any(t["type"] == "table" for t in f["data"])]
    assert len(sheets) == 2, "light and dark"
    cells = [str(c) for t in sheets[0]["data"] if t["type"] == "table" for column in t["cells"]["values"] for c in column]
    assert f"{result.total_orders:,}" in cells and f"{result.stats_pnls['USD']['Win Rate']:.4f}" in cells
    assert any(t.get("name") == "Strategy" or t["type"] == "scatter" for t in sheets[0]["data"])


def _nautilus_result() -> Any:
    """A BacktestResult of Nautilus's own engine: twenty market orders over a thousand quotes."""
    from nautilus_trader.backtest import BacktestEngine, BacktestEngineConfig
    from nautilus_trader.common import LoggerConfig, LogLevel
    from nautilus_trader.execution import FixedFeeModel
    from nautilus_trader.model import (
        AccountType,
        Currency,
        Equity,
        InstrumentId,
        Money,
        OmsType,
        OrderSide,
        Price,
        Quantity,
        QuoteTick,
        Symbol,
        Venue,
    )  # fmt: skip
    from nautilus_trader.trading import Strategy

    id_, usd = InstrumentId.from_str("AAA.XNAS"), Currency.from_str("USD")

    class Flip(Strategy):
        seen = 0

        def on_start(self) -> None:
            self.subscribe_quotes(id_)

        def on_quote(self, quote: Any) -> None:
            self.seen += 1
            if self.seen % 50 == 0:
                side = OrderSide.BUY if self.seen // 50 % 2 else OrderSide.SELL
                make = self.order_factory() if callable(self.order_factory) else self.order_factory
                self.submit_order(make.market(id_, side, Quantity.from_int(10)))

    engine = BacktestEngine(BacktestEngineConfig(logging=LoggerConfig(stdout_level=LogLevel.ERROR)))
    fee = FixedFeeModel(Money(0.1, usd))
    engine.add_venue(Venue("XNAS"), OmsType.NETTING, AccountType.MARGIN, [Money(100_000, usd)], fee_model=fee)
    engine.add_instrument(Equity(id_, Symbol("AAA"), usd, 2, Price.from_str("0.01"), 0, 0))
    size, quotes = Quantity.from_int(100), []
    for i in range(1000):
        bid, ask = (Price.from_str(f"{100 + px + i * 7919 % 13 / 100:.2f}") for px in (0.0, 0.01))
        quotes.append(QuoteTick(id_, bid, ask, size, size, T0 + i * STEP, T0 + i * STEP))
    engine.add_data(quotes)
    engine.add_strategy(Flip())
    engine.run()
    result = engine.get_result()
    assert result.total_orders == 20
    return result


def test_the_whole_page_is_printed_as_a_pdf_of_several_sheets(out: Path, tmp_path: Path) -> None:
    if not any(map(shutil.which, report.BROWSERS)):
        pytest.skip("no Chromium or Chrome on this machine")
    pdf = report.print_out((out / "report.html").resolve().as_uri(), tmp_path / "p.pdf").read_bytes()
    assert pdf[:5] == b"%PDF-" and len(re.findall(rb"/Type\s*/Page\b", pdf)) > 5


def test_no_panel_is_empty_without_saying_why(out: Path, tmp_path: Path) -> None:
    write_run(simulate(steps=400, skill=0.0, trade=False, names=("ESH4.GLBX",)), tmp_path)
    for folder in (out, tmp_path):
        text = (folder / "report.html").read_text(encoding="utf-8")
        boxes = re.findall(r'<div class="empty">(.*?)</div>', text)
        assert boxes and all(len(b) > 20 and b.endswith((".", ")")) for b in boxes), boxes
    for fig in parsed(out).figures.values():
        assert fig["data"], "a chart draws something"
