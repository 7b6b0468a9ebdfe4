"""The report of a real run: figures recomputed from its fills are Nautilus's own, and every table follows from the files beside it."""

from __future__ import annotations

import json
import shutil
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cift_strategies import attribution, forecasts, report, sections
from cift_strategies.finished import HORIZONS, Finished
from cift_strategies.timings import Histogram, Timing

TICK = 0.01


@pytest.fixture(scope="module")
def done(small: Any) -> Finished:
    return Finished.read(small.out)


def _rows(small: Any, name: str, columns: list[str] | None = None) -> list[dict[str, Any]]:
    return list(pq.read_table(small.out / f"{name}.parquet", columns=columns).to_pylist())


def _ns(v: Any) -> int:
    return int(v.value)


def test_what_the_fills_come_to_is_what_nautilus_counts(small: Any, done: Finished) -> None:
    fills, stats = _rows(small, "fills"), done.facts["nautilus"]["stats_pnls"]["USD"]
    net = sum(-f["side"] * f["size"] * f["price"] for f in fills) - sum(f["fee"] for f in fills)
    assert len(fills) > 100 and not small.result.summary["open_at_end"]
    assert net == pytest.approx(stats["PnL (total)"], rel=1e-9)
    (balance,) = done.facts["nautilus"]["account"].values()
    assert 1_000_000 + net == pytest.approx(float(balance.split()[0].replace("_", "")), rel=1e-9)
    assert done.money(small.result.summary["pnl_net"]) == pytest.approx(stats["PnL (total)"], rel=1e-9)
    by_trade: dict[int, float] = {}
    for f in fills:
        by_trade[f["position"]] = by_trade.get(f["position"], 0.0) - f["side"] * f["size"] * f["price"] - f["fee"]
    trips = np.array(list(by_trade.values()))
    assert (trips > 0).mean() == pytest.approx(stats["Win Rate"], abs=1e-9)
    assert trips[trips > 0].mean() == pytest.approx(stats["Avg Winner"], rel=1e-9)
    assert trips[trips < 0].mean() == pytest.approx(stats["Avg Loser"], rel=1e-9)
    assert len(trips) == done.facts["nautilus"]["counts"]["total_positions"]


def test_the_parts_of_the_shortfall_add_up_from_the_prices_decided_upon_to_the_money_made(small: Any, done: Finished) -> None:
    got, fills = done.execution.legs, _rows(small, "fills")
    sent = {r["order"]: r for r in _rows(small, "orders") if r["event"] == "Submitted"}
    delivered: dict[str, list[tuple[Any, float]]] = {}
    for p in _rows(small, "predictions", ["delivered", "instrument", "mid"]):
        delivered.setdefault(p["instrument"], []).append((p["delivered"], p["mid"]))
    for told in delivered.values():
        told.sort(key=lambda p: p[0])
    paper = 0.0
    for f in sorted(fills, key=lambda r: _ns(r["ts"])):
        decided = f["mid"]
        if f["role"] == "entry":
            told = delivered[f["instrument"]]
            decided = told[bisect_right(told, sent[f["order"]]["ts"], key=lambda p: p[0]) - 1][1]
        elif f["role"] == "exit":
            decided = sent[f["order"]]["mid"]
        paper -= f["side"] * f["size"] * decided
    lost = sum(float(v.sum()) for v in done.execution.shortfall.values())
    assert paper - lost == pytest.approx(done.money(small.result.summary["pnl_net"]), abs=1e-6)
    assert done.execution.shortfall["fees"].sum() == pytest.approx(small.result.summary["fees"], rel=1e-12)
    entries = got.fills.role == "entry"
    assert (got.sent[entries] > got.seen[entries]).all(), "a decision takes time"
    assert np.unique((got.fills.ts - got.sent)[entries & ~got.maker]).tolist() == [1_000_000], "orders take a millisecond"
    assert (got.half[np.isfinite(got.half)] > 0).mean() > 0.9


def test_every_order_has_a_beginning_and_every_fill_an_event(small: Any) -> None:
    log = _rows(small, "orders")
    count = {k: sum(r["event"] == k for r in log) for k in ("Submitted", "Filled", "Accepted", "Canceled")}
    told = small.result.summary["order_events"]
    assert count == {k: told.get(f"Order{k}", 0) for k in count}
    assert {r["order"] for r in log if r["event"] == "Submitted"} == set(range(small.result.summary["orders"]))


def test_groups_divide_all_of_the_money(small: Any, done: Finished) -> None:
    found, net = attribution.groups(done), done.money(small.result.summary["pnl_net"])
    for key in ("instrument", "side", "regime", "horizon", "hour", "closed by"):
        assert sum(r["net"] for r in found[key]) == pytest.approx(net, abs=1e-6), key
        assert sum(r["round_trips"] for r in found[key]) == len(done.positions["net"])
    trips = _rows(small, "positions")
    long = [p["net"] for p in trips if p["side"] > 0]
    (row,) = [r for r in found["side"] if r["side"] == "long"]
    assert (row["net"], row["hit_rate"]) == pytest.approx((sum(long), np.mean([v > 0 for v in long])))


def test_how_members_stood_is_what_they_voted_when_the_entry_was_decided(small: Any, done: Finished) -> None:
    sent = {r["position"]: r["ts"] for r in _rows(small, "orders") if r["role"] == "entry" and r["event"] == "Submitted"}
    rows = _rows(small, "predictions", ["delivered", "instrument", "votes"])
    trips = _rows(small, "positions")
    horizons = [500_000_000, 10**9, 5 * 10**9, 30 * 10**9]
    checked = 0
    for i in range(0, len(trips), 9):
        p = trips[i]
        before = [r for r in rows if r["instrument"] == p["instrument"] and r["delivered"] <= sent[p["position"]]]
        votes = np.reshape(max(before, key=lambda r: r["delivered"])["votes"], (len(done.members), 4, 3))
        votes = votes[:, horizons.index(p["horizon_ns"])]
        lead = votes[:, 2] - votes[:, 0]
        expected = np.where(np.abs(lead) <= 0.02, 0.0, lead)
        assert done.execution.entry_votes[i] == pytest.approx(expected, nan_ok=True, abs=1e-6)
        checked += int(np.isfinite(lead).any())
    assert checked > 5


def test_exposure_is_what_is_held_moment_by_moment(done: Finished) -> None:
    e, p, (start, end) = attribution.exposure(done), done.positions, done.traded_span
    opened, closed = np.asarray(p["opened"], np.int64), np.asarray(p["closed"], np.int64)
    held = np.asarray(p["size"]) * np.asarray(p["entry"])
    at = np.random.default_rng(0).integers(start, end, 20_000)
    level = np.array([held[(opened <= t) & (closed > t)].sum() for t in at])
    assert e.in_market == pytest.approx((level > 0).mean(), abs=0.02)
    assert e.mean == pytest.approx((held * (closed - opened)).sum() / (end - start), rel=0.001)
    assert e.peak == pytest.approx(max(held[(opened <= t) & (closed > t)].sum() for t in opened))
    assert e.traded == pytest.approx((np.asarray(p["size"]) * (np.asarray(p["entry"]) + np.asarray(p["exit"]))).sum())
    assert e.holding_s[2] == pytest.approx(np.median((closed - opened) / 1e9))


def test_buy_and_hold_earns_the_move_of_every_mid_less_what_the_run_pays(small: Any, done: Finished) -> None:
    (ts, pnl), told = attribution.buy_and_hold(done)
    start, end = done.traded_span
    expected = 0.0
    for name in done.facts["instruments"]:
        t, mid = done.curve("mid", name)
        inside = mid[(t >= start) & (t <= end)]
        fills = [f for f in _rows(small, "fills") if f["instrument"] == name]
        size = np.mean([p["size"] for p in _rows(small, "positions") if p["instrument"] == name])
        units = sum(f["size"] for f in fills)
        paid = sum(f["side"] * (f["price"] - f["mid"]) * f["size"] + f["fee"] for f in fills) / units
        expected += size * (inside[-1] - inside[0]) - 2 * size * paid
    assert told["pnl_net"] == pytest.approx(expected, abs=1e-6) and pnl[-1] == told["pnl_net"] and ts[-1] == end


def test_confusion_and_agreement_are_counted_from_the_predictions(small: Any, done: Finished) -> None:
    edges, h, j = small.result.summary["thresholds"], "1s", 1
    rows = _rows(small, "predictions", ["instrument", f"p_down_{h}", f"p_flat_{h}", f"p_up_{h}", f"move_{h}", "votes"])
    n = np.zeros((3, 3), int)
    agreed: dict[int, list[float]] = {}
    for r in rows:
        move, p = r[f"move_{h}"], [r[f"p_{k}_{h}"] for k in ("down", "flat", "up")]
        if move is None or not np.isfinite(move):
            continue
        if np.isfinite(p).all():
            edge = edges[r["instrument"]][h]
            n[1 + (move > edge) - (move < -edge), int(np.argmax(p))] += 1
        votes = np.reshape(r["votes"], (len(done.members), 4, 3))[:, j]
        lead = votes[:, 2] - votes[:, 0]
        net = int((lead > 0.02).sum() - (lead < -0.02).sum())
        if net:
            agreed.setdefault(abs(net), []).append(np.sign(net) * move)
    assert np.array_equal(forecasts.confusion(done)[h], n)
    found = {a.members: a for a in forecasts.agreement(done)[h]}
    assert found.keys() == agreed.keys()
    for k, moves in agreed.items():
        moved = [m for m in moves if m]
        assert (found[k].number, found[k].mean) == (len(moves), pytest.approx(np.mean(moves), rel=1e-5))
        assert found[k].right == pytest.approx(np.mean([m > 0 for m in moved]))


def test_drift_and_volume_are_those_of_the_events_that_were_traded(small: Any) -> None:
    from catalog.events import SCALE, read_catalog

    told, s = small.result.summary["diagnostics"], small.result.summary
    _, chunks = read_catalog(small.catalog, s["instruments"], s["split"] + 1, s["end"])
    volume = np.zeros(2)
    for events in chunks:
        trades = events[events["action"] == ord("T")]
        np.add.at(volume, trades["instrument"], trades["size"] / SCALE)
    assert [told["market"][i]["volume"] for i in s["instruments"]] == pytest.approx(volume.tolist())
    drift = told["drift"][s["instruments"][0]]
    assert len(drift) > 40 and 0 <= drift["spread"] < 5


def test_weights_and_regret_along_the_stream_end_where_the_summary_says(small: Any) -> None:
    told, end = small.result.summary["diagnostics"]["weights"], small.result.summary["regret"]
    assert told["ts"] == sorted(told["ts"]) and told["members"] == end["members"]
    share = np.array(end["rounds"]) / np.maximum(np.sum(end["rounds"], axis=0), 1)
    weights = np.einsum("rh,rhn->hn", share, np.array(end["weights"]))
    known = np.sum(end["rounds"], axis=0) > 0
    assert np.allclose(np.array(told["weights"][-1])[known], weights[known], atol=1e-5)
    assert np.allclose(told["regret"][-1], np.sum(end["regret"], axis=0), atol=1e-5)
    assert np.allclose(told["pool_regret"][-1], np.sum(end["pool"]["regret"], axis=0), atol=1e-5)


def test_the_tables_of_the_page_lie_beside_it_as_json_and_as_parquet(small: Any, done: Finished) -> None:
    told = json.loads((small.out / "statistics.json").read_text())
    performance = {r["strategy"]: r for r in told["performance"]}
    assert performance["ensemble"]["pnl_net"] == small.result.summary["pnl_net"]
    assert {"OFI rule", "buy and hold"} <= performance.keys()
    assert sum(r["money"] for r in told["shortfall"][:-1]) == pytest.approx(told["shortfall"][-1]["money"])
    assert told["sharpe"][0]["deflated"] == pytest.approx(done.sharpe[1].deflated, nan_ok=True)
    named = {"by_instrument", "by_regime", "by_hour", "by_horizon", "by_side", "by_member", "bootstrap", "trade_order", "capacity"}
    named |= {"exposure", "calibration", "confusion", "drift", "lead_lag", "agreement", "latency", "slippage", "orders", "scores"}
    assert named <= told.keys()
    long = pq.read_table(small.out / "statistics.parquet").to_pylist()
    assert len(long) == sum(len(row) for rows in told.values() for row in rows)
    for cell in long[:: max(1, len(long) // 300)]:
        value = told[cell["table"]][cell["row"]][cell["column"]]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        assert cell["value"] == value if number else cell["text"] == (value if isinstance(value, str) else cell["text"])


def told_again(small: Any, folder: Path, more: dict[str, Any]) -> Any:
    """A copy of the run with `more` in its summary, its page made again, and the statistics of that."""
    shutil.copytree(small.out, folder, ignore=shutil.ignore_patterns("artifact"))
    (folder / "summary.json").write_text(json.dumps(json.loads((folder / "summary.json").read_text()) | more))
    report.render(folder)
    return json.loads((folder / "statistics.json").read_text())


def test_trials_deflate_the_page_and_what_a_live_session_measured_is_on_it(small: Any, done: Finished, tmp_path: Path) -> None:
    assert "stages are measured in live sessions" in (small.out / "report.html").read_text()
    timing = Timing()
    for ns in (1_000_000, 2_000_000, 250_000_000):
        timing.add(ns)
    depth = Histogram()
    depth.add(40)
    live = {"skipped": 12, "lost": 3, "queue": depth.told(), "stages": [timing.told("predict"), Timing().told("return")]}
    chosen = {"trials": 50, "trial_ratios": [0.01 * k for k in range(-5, 6)]}
    told, before = told_again(small, tmp_path / "copy", {**chosen, "live": live}), done.sharpe[1]
    assert (before.trials, told["sharpe"][0]["trials"]) == (1, 50)
    assert told["sharpe"][0]["deflated"] < before.deflated and told["sharpe"][0]["probabilistic"] == before.probabilistic
    assert [(s["stage"], s["count"], s["max_ms"]) for s in told["stages"]] == [("predict", 3, 250.0)]
    assert [q["count"] for q in told["queue"]] == [1, 12, 3]
    page = (tmp_path / "copy" / "report.html").read_text()
    assert "12 predictions were skipped" in page and "stages are measured in live sessions" not in page


def test_a_run_again_at_its_own_latency_is_the_same_run(small: Any, tmp_path: Path) -> None:
    from cift_strategies.latency import rerun

    copy = tmp_path / "copy"
    shutil.copytree(small.out, copy)
    found = rerun(copy, "1")
    by = {r["of"]: r for r in found}
    assert by["order"]["digest"] == small.result.digest, "orders took a millisecond before"
    assert by["decision"]["digest"] != small.result.digest, "decisions did not"
    report.render(copy)
    rows = json.loads((copy / "statistics.json").read_text())["latency"]
    assert [r["pnl_net"] for r in rows if r["how"] == "run again"] == [r["pnl_net"] for r in found]


def test_the_settings_beside_the_page_are_those_of_the_run(small: Any, done: Finished) -> None:
    import tomllib

    from cift_strategies.backtest import RunConfig

    told = RunConfig.model_validate(tomllib.loads((small.out / "config.toml").read_text()))
    assert told.model_dump(mode="json") == {**done.facts["config"], "out": None}
    config = {"a": 'x"\n\\', "b": {"c.d": [1, 2.5, True], "e": {}, "f": None}, "g": -1e-9}
    assert tomllib.loads(sections.toml(config)) == {"a": 'x"\n\\', "b": {"c.d": [1, 2.5, True], "e": {}}, "g": -1e-9}


@pytest.mark.parametrize("text", ["", "1,x", "-1", "1e9"])
def test_latencies_that_are_none_are_refused(text: str) -> None:
    from catalog.errors import InputError
    from cift_strategies.latency import asked

    with pytest.raises(InputError, match="--latencies"):
        asked(text)


def test_horizons_are_named_once() -> None:
    from cift_strategies.outcome import HORIZON_LABELS

    assert HORIZONS == HORIZON_LABELS


def test_residuals_of_the_right_process_pass_and_those_of_a_wrong_one_do_not(small: Any) -> None:
    """Trades of two instruments come as a Poisson process at the rate that the first one's model expects and at thrice the second's."""
    from catalog.events import EVENT
    from cift_models.diagnostics import Diagnostics
    from cift_models.features import NAMES
    from cift_models.hawkes import Hawkes
    from cift_models.hawkes_process import Config
    from cift_models.inference import Engine
    from cift_models.windows import Block

    instruments, rng, rate, n = small.result.instruments, np.random.default_rng(11), 20.0, 4_000
    ids = [x.id for x in instruments]
    model = Hawkes.untrained(tuple(ids), Config(types=("buy", "sell"), decays=1, bins=1))
    model.arrays["mu"][0], model.arrays["mu"][1] = rate / 2, rate / 6
    model.arrays["beta"][:], model.arrays["fitted"][:] = 1.0, True
    members: list[Any] = [model]
    engine = Engine(instruments, ids, NAMES, members, Engine.load(small.artifact, instruments).ensemble)
    events = np.zeros(2 * n, EVENT)
    events["ts_init"] = events["ts_event"] = 10**18 + np.sort((rng.random(2 * n) * n / rate * 1e9).astype(np.int64))
    events["instrument"], events["side"] = rng.permutation(np.repeat([0, 1], n)), rng.choice(np.array([-1, 1], np.int8), 2 * n)
    events["action"], events["size"], events["price"] = ord("T"), 10**9, 10**11
    watched = Diagnostics(engine, small.artifact, instruments)
    for piece in np.array_split(events, 7):
        watched.push(Block(piece, np.zeros((len(piece), len(NAMES))), np.zeros(0, np.int64)), np.zeros(0, np.int64))
    told = watched.told()
    assert told["market"][ids[0]] == {"volume": n, "trades": n}
    right, wrong = (told["hawkes"][i]["buy"] for i in ids)
    assert right["ks_p"] > 0.001 and right["ljung_box_p"] > 0.001
    assert wrong["ks"] > 0.2 and wrong["ks_p"] < 1e-6
    assert right["events"] + told["hawkes"][ids[0]]["sell"]["events"] == pytest.approx(n, abs=4)
    waits = np.diff(events["ts_init"][(events["instrument"] == 0) & (events["side"] > 0)]) / 1e9 * rate / 2
    assert np.array(right["qq"])[:, 1] == pytest.approx(np.quantile(waits, 0.02 + 0.04 * np.arange(25)), rel=0.02), "rescaled by the rate"
