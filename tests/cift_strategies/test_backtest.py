"""A whole run: what it reads, what it leaves behind, that it repeats, and that its figures are those of its own files."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import EAGER, Small
from tapes import MS, OPEN, SHARE, Tape, write

from catalog.errors import InputError
from catalog.events import PAUSE_NS, SCALE, read_catalog
from catalog.parquet import iso
from cift_models import artifacts
from cift_models.labels import Labeller
from cift_models.windows import HORIZONS_NS
from cift_strategies.backtest import RunConfig, estimate, notes, plan, resolve, run, unfinished
from cift_strategies.outcome import HORIZON_LABELS
from cift_strategies.settings import Settings
from cift_strategies.stream import Span

ROOT = Path(__file__).resolve().parents[2]

KEYS = {
    "source", "instruments", "events", "events_streamed", "events_per_second", "wall_seconds", "feature_vectors", "predictions", "orders",
    "fills", "fees", "pnl_net", "max_drawdown", "decision_latency_ms", "scores", "data_quality", "callback_errors", "digest", "versions",
    "break_even_cost_ticks", "hit_rate", "baseline_rule",
}  # fmt: skip

MANIFEST = {
    "features": [], "instruments": [SHARE.id], "horizons_ns": [1], "seed": 0, "members": {}, "latency": {"source": "x", "q": [], "ns": []},
}  # fmt: skip


@pytest.fixture(scope="module")
def summary(small: Small) -> dict[str, Any]:
    return json.loads((small.out / "summary.json").read_text())


def test_the_output_folder_is_whole(small: Small, summary: dict[str, Any]) -> None:
    there = {p.name for p in small.out.iterdir()}
    assert {"report.html", "summary.json", "fills.parquet", "positions.parquet", "predictions.parquet", "artifact"} <= there
    assert set(summary) >= KEYS and summary["callback_errors"] == 0
    assert not [p for p in small.out.parent.iterdir() if p.name.startswith(".out")]


def test_events_are_those_of_the_catalog(small: Small, summary: dict[str, Any]) -> None:
    events = np.concatenate(list(read_catalog(small.catalog)[1]))
    assert summary["events"] == len(events)
    streamed = events[(events["ts_init"] >= summary["start"]) & (events["ts_init"] <= summary["end"])]
    assert summary["events_streamed"] == len(streamed) == summary["feature_vectors"]
    assert (events["ts_init"] <= summary["split"]).mean() == pytest.approx(0.5, abs=0.001)


def test_the_stream_starts_where_every_book_is_empty(small: Small, summary: dict[str, Any]) -> None:
    """The second session opens after the split of one half: its clears are the last before anything can be traded."""
    events = np.concatenate(list(read_catalog(small.catalog)[1]))
    clears = events[events["action"] == ord("R")]["ts_init"]
    assert summary["start"] in clears
    assert all(c < summary["start"] + SCALE or c > summary["split"] for c in clears)  # the instruments open within a second


def test_money_adds_up_over_the_files(small: Small, summary: dict[str, Any]) -> None:
    fills, positions = pq.read_table(small.out / "fills.parquet"), pq.read_table(small.out / "positions.parquet")
    cash = sum(-s * z * p - f for s, z, p, f in zip(*(fills[c].to_pylist() for c in ("side", "size", "price", "fee"))))
    assert summary["fills"] == len(fills) > 100 and summary["open_at_end"] == 0
    assert summary["pnl_net"] == pytest.approx(cash) == pytest.approx(sum(positions["net"].to_pylist()))
    assert summary["max_drawdown"] >= max(0.0, -summary["pnl_net"])
    net = np.asarray(positions["net"])
    assert summary["hit_rate"] == pytest.approx((net > 0).mean())
    assert small.result.traded.equity[-1] == pytest.approx(summary["pnl_net"])


def test_the_cost_at_which_nothing_is_left_is_what_mids_would_have_earned(small: Small, summary: dict[str, Any]) -> None:
    f = {c: np.asarray(v) for c, v in pq.read_table(small.out / "fills.parquet").to_pydict().items()}
    at_mid = -(f["side"] * f["size"] * f["mid"]).sum()
    turned = (f["size"] * f["tick_value"])[f["role"] == "entry"].sum()
    assert summary["break_even_cost_ticks"] == pytest.approx(at_mid / turned)
    assert summary["break_even_cost_ticks"] - summary["paid_cost_ticks"] == pytest.approx(summary["pnl_net"] / turned)


def test_no_order_before_its_prediction_could_be_there(small: Small, summary: dict[str, Any]) -> None:
    """Each entry is filled one order latency after the delivery of a prediction that leans its way, made after the split."""
    p = pq.read_table(small.out / "predictions.parquet").to_pydict()
    sides = np.sign(np.array(p["p_up_1s"]) - np.array(p["p_down_1s"]))
    delivered: dict[tuple[str, int], set[float]] = {}
    for i, (ts, name) in enumerate(zip(p["delivered"], p["instrument"])):
        delivered.setdefault((name, ts.value), set()).add(float(sides[i]))
    assert min(t.value for t in p["ts"]) > summary["split"]
    fills = pq.read_table(small.out / "fills.parquet").to_pylist()
    entries = [f for f in fills if f["role"] == "entry"]
    for f in entries:
        assert f["side"] in delivered[f["instrument"], f["ts"].value - round(summary["order_latency_ms"] * MS)]


def test_latencies_are_drawn_from_the_artifact(small: Small, summary: dict[str, Any]) -> None:
    took = np.asarray(pq.read_table(small.out / "predictions.parquet")["latency_ns"])
    manifest = json.loads((small.artifact / "manifest.json").read_text())["latency"]
    assert took.min() >= manifest["ns"][0]
    for q in (0.25, 0.5, 0.75):
        assert np.quantile(took, q) == pytest.approx(np.interp(q, manifest["q"], manifest["ns"]), rel=0.2)
    assert summary["decision_latency_ms"]["p50"] == pytest.approx(np.median(took) / 1e6)


def test_what_came_of_each_prediction_is_beside_it(small: Small, summary: dict[str, Any]) -> None:
    """The moves in predictions.parquet are those of an independent walk over the mids of the stream."""
    from cift_models.features import NAMES
    from cift_models.inference import stream

    instruments = small.result.instruments
    labeller, moves = Labeller(instruments, HORIZONS_NS, ()), {}
    serial = dict.fromkeys(range(len(instruments)), 0)
    for block in stream(instruments, read_catalog(small.catalog, None, summary["start"], summary["end"])[1]):
        o = labeller.push(block.events, np.ascontiguousarray(block.rows[:, NAMES.index("mid")]), block.closes)
        moves |= {key[:3]: key[3] for key in zip(*(a.tolist() for a in (o.instrument, o.serial, o.label, o.move)))}
        early = block.events[block.closes]
        for k in early["instrument"][early["ts_init"] <= summary["split"]].tolist():
            serial[k] += 1
    before, checked = sum(serial.values()), 0
    o = labeller.finish()
    moves |= {key[:3]: key[3] for key in zip(*(a.tolist() for a in (o.instrument, o.serial, o.label, o.move)))}
    table = pq.read_table(small.out / "predictions.parquet").to_pydict()
    index = {x.id: k for k, x in enumerate(instruments)}
    for i, name in enumerate(table["instrument"]):
        k = index[name]
        for h, label in enumerate(HORIZON_LABELS):
            want, got = moves.get((k, serial[k], h), np.nan), table[f"move_{label}"][i]
            assert got == np.float32(want) or (np.isnan(got) and np.isnan(want))
            checked += not np.isnan(want)
        serial[k] += 1
    assert summary["predictions"] == sum(serial.values()) - before and checked > 3 * summary["predictions"]


@pytest.mark.parametrize("chunk_size", [None, 777])
def test_the_digest_repeats_for_every_chunk_size(small: Small, tmp_path: Path, chunk_size: int | None) -> None:
    config = RunConfig(
        catalog=small.catalog, out=tmp_path / "o", artifacts=small.artifact, chunk_size=chunk_size, rule=False, strategy=EAGER
    )
    again = run(config)
    assert again.digest == small.result.digest
    for name in ("fills", "positions", "predictions"):
        assert (tmp_path / "o" / f"{name}.parquet").read_bytes() == (small.out / f"{name}.parquet").read_bytes(), name
    assert again.rule is None and again.summary["baseline_rule"] is None


def test_models_trade_nothing_that_they_have_seen(small: Small, summary: dict[str, Any], tmp_path: Path) -> None:
    """Not even where trading is asked to start earlier; and what they have seen is told."""
    seen = json.loads((small.artifact / "manifest.json").read_text())["range"]
    assert summary["trained_on"] == {"start": seen["start"], "end": seen["end"]} and seen["end"] <= summary["split"]
    middle = (seen["start"] + seen["end"]) // 2
    again = run(RunConfig(catalog=small.catalog, out=tmp_path / "o", artifacts=small.artifact, start=middle, rule=False, strategy=EAGER))
    assert min(again.traded.fills["ts"].cast("int64").to_pylist()) > seen["end"] and again.summary["fills"] > 0
    told = f"the models were trained on {iso(seen['start'])} to {iso(seen['end'])}: trading begins after that"
    assert again.summary["notes"].count(told) == 1
    assert "trading begins after that." in (tmp_path / "o" / "report.html").read_text()
    with pytest.raises(InputError, match="has nothing to trade after it: choose a later"):
        run(RunConfig(catalog=small.catalog, out=tmp_path / "p", artifacts=small.artifact, end=seen["end"], rule=False))


@pytest.mark.parametrize(("before_s", "shut_s", "again"), [(5, 3_600, False), (40, 3_600, True), (5, 60, True)])
def test_a_session_is_not_streamed_again_for_its_last_seconds(tmp_path: Path, before_s: int, shut_s: int, again: bool) -> None:
    """Models that have seen the first session but for its last seconds: it is streamed for its books only where it can be traded."""
    first = Tape().book(0, 10_000, 10_001).quiet(5, 100_000, 10_000, 10_001)
    opens = 100_000 + shut_s * 1_000
    root = write(tmp_path / "c", [first.book(opens, 10_000, 10_001).quiet(opens + 5, opens + 50_000, 10_000, 10_001)])
    seen = {"start": OPEN, "end": OPEN + (100 - before_s) * SCALE, "decisions": 1}
    artifact = artifacts.write(tmp_path / "a", MANIFEST | {"range": seen}, lambda _: None).path
    config = RunConfig(catalog=root, artifacts=artifact)
    p = plan(config, resolve(config))
    assert p.start == (OPEN if again else OPEN + opens * MS) and p.split >= seen["end"]
    assert again == (p.split == seen["end"]) and p.split < OPEN + opens * MS


def test_models_that_learnt_from_what_came_later_are_told(tmp_path: Path) -> None:
    root = write(tmp_path / "c", [Tape().book(0, 10_000, 10_001).quiet(5, 100_000, 10_000, 10_001)])
    later = {"start": OPEN + 200 * SCALE, "end": OPEN + 300 * SCALE, "decisions": 1}
    config = RunConfig(catalog=root, artifacts=artifacts.write(tmp_path / "a", MANIFEST | {"range": later}, lambda _: None).path)
    p = plan(config, resolve(config))
    assert p.split < p.first == p.start and "nobody could have had them then" in notes(p)[-1]


def test_a_slower_decision_is_another_run(small: Small, tmp_path: Path) -> None:
    slow = run(RunConfig(catalog=small.catalog, out=tmp_path / "o", artifacts=small.artifact, latency_ms=80.0, rule=False, strategy=EAGER))
    assert slow.digest != small.result.digest
    took = np.asarray(pq.read_table(tmp_path / "o" / "predictions.parquet")["latency_ns"])
    assert took.min() == 80 * MS and slow.summary["decision_latency_ms"]["p50"] == pytest.approx(80.0)


def test_training_and_streaming_leave_the_source_alone(small: Small) -> None:
    digest = hashlib.sha256()
    for p in sorted(small.catalog.rglob("*.parquet")):
        digest.update(p.read_bytes())
    run(RunConfig(catalog=small.catalog, out=small.out.parent / "third", artifacts=small.artifact, rule=False))
    after = hashlib.sha256()
    for p in sorted(small.catalog.rglob("*.parquet")):
        after.update(p.read_bytes())
    assert after.digest() == digest.digest()


def test_the_rule_is_traded_through_the_same_execution(small: Small, summary: dict[str, Any]) -> None:
    rule = summary["baseline_rule"]
    assert rule["fills"] == len(small.result.rule.fills) and rule["open_at_end"] == 0
    assert sum(rule["decisions"].values()) >= summary["predictions"]
    for told in rule["rules"].values():
        assert told["labels"] >= 15 and sum(told["proba"]) == pytest.approx(1.0)
        lead = (told["proba"][2] - told["proba"][0]) / (told["proba"][2] + told["proba"][0])
        assert told["expected"] == pytest.approx(told["magnitude"] * lead)


def test_a_foreign_catalog_is_checked_by_the_run_itself(small: Small, tmp_path: Path) -> None:
    """A catalog without our note has nobody's counts of its faults: the run counts them, and finds what the import found."""
    import shutil

    foreign = tmp_path / "foreign"
    shutil.copytree(small.catalog, foreign, ignore=shutil.ignore_patterns("cift.json"))
    got = run(RunConfig(catalog=foreign, out=tmp_path / "o", artifacts=small.artifact, rule=False)).quality
    for kind in ("crossed", "locked", "unknown_cancel", "duplicate_add"):
        assert got.get(kind, 0) == small.result.quality.get(kind, 0)
    assert small.result.quality["partial_cancel"] > 1_000 and "partial_cancel" not in got  # the import wrote them as updates


def test_sessions_and_fees_may_be_told_beside_a_catalog(small: Small, tmp_path: Path) -> None:
    toml = tmp_path / "i.toml"
    text = "\n".join(
        f'[[instrument]]\nsymbol = "{x.id.split(".")[0]}"\nvenue = "XNAS"\nkind = "equity"\ntick = "0.01"\ncurrency = "USD"\n'
        "fee_per_unit = 0.5\n"
        for x in small.result.instruments
    )
    toml.write_text(text)
    dear = run(
        RunConfig(catalog=small.catalog, instruments=toml, out=tmp_path / "o", artifacts=small.artifact, rule=False, strategy=EAGER)
    )
    assert dear.summary["fills"] == 0 and dear.summary["decisions"]["move does not pay the costs"] > 0
    free, told = (any(n.startswith("no fees are known") for n in s["notes"]) for s in (small.result.summary, dear.summary))
    assert free and not told
    toml.write_text(text.replace("0.01", "0.02"))
    with pytest.raises(InputError, match="tick of"):
        run(RunConfig(catalog=small.catalog, instruments=toml, out=tmp_path / "p", artifacts=small.artifact))


def test_a_finished_output_is_replaced_only_by_a_finished_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "summary.json").write_text("old")

    def fail() -> None:
        with unfinished(out) as part:
            (part / "summary.json").write_text("new")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert (out / "summary.json").read_text() == "old" and list(tmp_path.iterdir()) == [out]
    with unfinished(out) as part:
        (part / "summary.json").write_text("new")
    assert (out / "summary.json").read_text() == "new" and list(tmp_path.iterdir()) == [out]


def test_a_folder_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_text("x")
    with pytest.raises(InputError, match="holds no results"), unfinished(tmp_path):
        pass


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train_fraction": 0.999999}, "nothing is left to trade"),
        ({"symbols": ("NOPE",)}, "NOPE is not there"),
        ({"start": OPEN + 10**18}, "no events"),
        ({"strategy": "nowhere:Nothing"}, "cannot be imported"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    root = write(tmp_path / "c", [Tape().book(0, 10_000, 10_001).trade(1, 1, 10_001, 5).quiet(5, 2_000, 10_000, 10_001)])
    with pytest.raises(InputError, match=message):
        run(RunConfig(catalog=root, out=tmp_path / "o", rule=False, **config))
    assert not (tmp_path / "o").exists()


def test_too_little_data_says_how_much_is_needed(tmp_path: Path) -> None:
    root = write(tmp_path / "c", [Tape().book(0, 10_000, 10_001).trade(1, 1, 10_001, 5).quiet(5, 20_000, 10_000, 10_001)])
    with pytest.raises(InputError, match=r"are needed"):
        run(RunConfig(catalog=root, out=tmp_path / "o", rule=False))
    assert list(tmp_path.iterdir()) == [root]


def test_spans_of_a_catalog_count_and_split_exactly(small: Small) -> None:
    instruments, chunks = read_catalog(small.catalog)
    ts = np.concatenate([c["ts_init"] for c in chunks])
    span = Span(small.catalog, instruments)
    assert span.count() == len(ts) and (span.first, span.last) == (ts[0], ts[-1])
    for share in (0.001, 0.3, 0.5, 0.77, 0.999):
        at = span.split_at(share)
        assert (ts < at).sum() < share * len(ts) <= (ts <= at).sum()
        assert span.count(at) == (ts <= at).sum()
        assert span.after(at) == ts[np.searchsorted(ts, at, "right")]
    part = Span(small.catalog, instruments, int(ts[1_000]), int(ts[-1_000]))
    assert part.count() == ((ts >= ts[1_000]) & (ts <= ts[-1_000])).sum()
    assert (part.first, part.last) == (ts[1_000], ts[-1_000])
    (night,) = np.flatnonzero(np.diff(ts) > PAUSE_NS)
    assert part.hours().tolist() == [[ts[1_000], ts[night]], [ts[night + 1], ts[-1_000]]]


def test_a_book_starts_fresh_only_where_all_do(tmp_path: Path) -> None:
    """A clears at 0 and 4 s, B at 0 and 5 s with changes between: from 4 s on B would lack its book, from 5 s on A would."""
    from dataclasses import replace

    a, b = Tape(), Tape(replace(SHARE, id="OTHER.XTST"), 1)
    a.book(0, 10_000, 10_001).quiet(5, 4_000, 10_000, 10_001).book(4_000, 10_000, 10_001).quiet(4_005, 9_000, 10_000, 10_001)
    b.book(1, 10_000, 10_001).quiet(6, 5_000, 10_000, 10_001).book(5_000, 10_000, 10_001).quiet(5_005, 8_000, 10_000, 10_001)
    for t in (a, b):
        t.trade(8_500, 1, 10_001, 1)
        t.book(9_500 + t.index, 10_000, 10_001).quiet(9_510, 10_000, 10_000, 10_001)
    for t in (a, b):
        t.rows.sort(key=lambda r: r[1])
    root = write(tmp_path, [a, b])
    instruments = read_catalog(root)[0]
    span = Span(root, instruments)
    at = {s: (span.fresh_start(OPEN + round(s * 1e9)) - OPEN) / MS for s in (0.5, 4.5, 6.0, 9.4, 9.5005, 9.502, 20.0)}
    assert at == {0.5: 0.0, 4.5: 0.0, 6.0: 0.0, 9.4: 0.0, 9.5005: 9_500.0, 9.502: 9_500.0, 20.0: 9_500.0}


def test_an_estimate_is_told_before_the_work(small: Small) -> None:
    config = RunConfig(catalog=small.catalog)
    text = estimate(plan(config, resolve(config)))
    assert f"{small.result.summary['events']:,} events of 2 instruments" in text and " s " in text and "GB of memory" in text


def test_unknown_settings_are_errors() -> None:
    with pytest.raises(ValueError, match="extra"):
        RunConfig.model_validate({"settings": {"min_egde": 1}})
    assert RunConfig(settings=Settings(min_edge_ticks=2)).settings.min_edge_ticks == 2


PLAIN = """
import json, sys
from pathlib import Path
from cift_strategies.backtest import RunConfig, run

print(run(RunConfig(**{name: Path(told) for name, told in json.loads(sys.argv[1]).items()})).digest)
"""


def test_a_script_that_does_not_ask_for_its_name_is_not_run_again_by_the_second_process(small: Small, tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(PLAIN)
    told = json.dumps({"catalog": str(small.catalog), "artifacts": str(small.artifact), "out": str(tmp_path / "o")})
    command = [sys.executable, str(tmp_path / "plain.py"), told]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1, done.stderr[-3_000:]
    assert json.loads((tmp_path / "o" / "summary.json").read_text())["baseline_rule"] is not None
