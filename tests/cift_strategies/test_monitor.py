"""What the monitor tells of a market and its trading: frames of the published form, complete, and never in the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from nodes import Collector, watch
from tapes import MS, OPEN, Script, Tape, write

from catalog.errors import InputError
from cift_strategies.server.schemas import KEPT, Frame
from cift_strategies.settings import Settings
from cift_strategies.trail import follow, read


def frames_of(link: Collector) -> list[Frame]:
    return [Frame.model_validate(m) for m in link.messages if "kind" in m]


@pytest.fixture
def calm(tmp_path: Path) -> Path:
    """Bid 10,000 and ask 10,001 ticks for five seconds."""
    return write(tmp_path, [Tape().book(0, 10_000, 10_001).trade(1, 1, 10_001, 5).quiet(5, 5_000, 10_000, 10_001)])


def test_ten_frames_a_second_of_the_stream_the_first_a_snapshot(calm: Path) -> None:
    link = Collector()
    watch(calm, Script({}), link)
    frames = frames_of(link)
    assert [f.kind for f in frames] == ["snapshot"] + ["frame"] * (len(frames) - 1)
    assert [f.ts - OPEN for f in frames] == [*(100 * MS * (n + 1) for n in range(49)), 4_995 * MS]  # and one at the end
    assert [f.seq for f in frames] == list(range(1, len(frames) + 1)) and len({f.run for f in frames}) == 1
    assert frames[0].info is not None and frames[0].info[0].tick == 0.01 and frames[1].info is None
    assert frames[-1].node.counts["events"] == frames[-1].instruments[0].events == 11 + 1 + 999


def test_the_ladder_is_the_book_best_first(calm: Path) -> None:
    link = Collector()
    watch(calm, Script({}), link)
    now = frames_of(link)[5].instruments[0]
    assert now.bids[0] == (100.00, 10_000, 0) and now.asks[0] == (100.01, 10_000, 0)
    assert [p for p, _, _ in now.bids] == [100.00, 99.99, 99.98, 99.97, 99.96] and len(now.asks) == 5
    assert now.mid == pytest.approx(100.005) and now.spread_ticks == 1 and now.age_ms == pytest.approx(0, abs=5.1)


def test_a_trade_is_told_from_the_prediction_to_the_closed_position(calm: Path) -> None:
    link = Collector()
    watched = watch(calm, Script({1_000: (1, 6.0, 0)}, regime=1), link, regimes=("calm", "rising"))
    frames = frames_of(link)
    signal = next(m["signal"] for m in link.messages if "signal" in m)
    (told,) = [s for f in frames for s in f.logs.signals]
    assert told.model_dump() == signal and told.regime == "rising" and told.latency_ms == 2.0 and told.trade == 0
    held = next(f for f in frames if f.positions[0].size)
    assert held.positions[0].stop == signal["stop"] and held.positions[0].target == signal["target"]
    assert held.pnl[0].net == pytest.approx(-0.005 * signal["size"])  # bought at the ask, valued at the mid
    fills = [x for f in frames for x in f.logs.fills]
    assert [(x.role, x.price) for x in fills] == [("entry", 100.01), ("exit", 100.00)]
    (trade,) = [x for f in frames for x in f.logs.trades]
    assert trade.net == pytest.approx(-0.01 * trade.size) and trade.closed_by == "horizon" and trade.regime == "rising"
    last = {o.id: o for f in frames for o in f.logs.orders}
    assert {o.role: (o.status, o.open) for o in last.values()} == {
        "entry": ("FILLED", False), "stop": ("CANCELED", False), "target": ("CANCELED", False), "exit": ("FILLED", False),
    }  # fmt: skip
    end = frames[-1]
    assert end.positions[0].size == 0 and end.pnl[0].net == pytest.approx(watched.strategy.ledger.pnl("USD")) == pytest.approx(trade.net)
    assert end.pnl[0].max_drawdown == pytest.approx(0.01 * trade.size)
    stages = {s.stage: (s.count, s.p50_ms) for s in end.latency}
    assert stages["decision"] == (1, 2.0) and stages["fill"] == (1, 1.0)


def test_every_change_of_mind_is_logged_with_its_reason(calm: Path) -> None:
    link = Collector()
    watch(calm, Script({1_000: (1, 0.5, 0), 2_000: (1, 6.0, 0), **{2_010 + 10.0 * n: (1, 6.0, 0) for n in range(25)}}), link)
    log = [d for f in frames_of(link) for d in f.logs.decisions]
    assert [d.reason for d in log] == ["abstains", "entered", "in a position", "abstains"]
    assert [d.action for d in log] == ["none", "enter", "hold", "none"]
    assert log[1].text == "0 of 0 up, confidence 0.80, enter long" and log[1].horizon_ms == 500
    seen = sum(f.node.declined.get("move does not pay the costs", 0) for f in frames_of(link)[-1:])
    assert seen == 1  # it lasted for less than a frame, and is in the totals


def test_a_slow_reader_misses_frames_but_no_entry_of_the_log(calm: Path) -> None:
    link = Collector(deaf=lambda n: 5 <= n < 30)
    watched = watch(calm, Script({1_000: (1, 6.0, 0)}), link)
    frames = frames_of(link)
    before, after = frames[3], frames[4]
    assert (after.ts - before.ts) == 26 * 100 * MS and after.seq == before.seq + 1 and after.kind == "frame" and link.dropped == 25
    fills = [x.seq for f in frames for x in f.logs.fills]
    assert fills == list(range(1, len(watched.strategy.fills) + 1)) and len(fills) == 2
    assert len([s for f in frames for s in f.logs.signals]) == 1


def test_whoever_comes_late_gets_all_that_is_kept(calm: Path) -> None:
    link = Collector(deaf=lambda n: n < 40)
    watch(calm, Script({1_000: (1, 6.0, 0)}), link)
    first = frames_of(link)[0]
    assert first.kind == "snapshot" and len(first.logs.fills) == 2 and len(first.logs.orders) == 4 and len(first.logs.signals) == 1
    assert len(first.logs.prices["SHARE.XTST"]) == 4 and first.logs.pnl["USD"][-1][1] == pytest.approx(first.pnl[0].net)


def test_what_is_kept_is_bounded(tmp_path: Path) -> None:
    """A reader that is away while more happens than a frame may carry gets a snapshot, which is bounded too."""
    root = write(tmp_path, [Tape().book(0, 10_000, 10_001).trade(1, 1, 10_001, 5).quiet(5, 40_000, 10_000, 10_001, step=10)])
    calls = {1_000 + 60.0 * n: ((-1) ** (n // 8), 6.0, 0) for n in range(620)}
    link = Collector(deaf=lambda n: 2 < n < 399)
    watched = watch(root, Script(calls), link, Settings(flat_before_close_s=0, renew=False))
    assert len(watched.strategy.orders) > 0
    assert all(len(new) <= KEPT[name] + 1 for name, new in watched.monitor._new.items())
    assert len(watched.monitor._orders) <= KEPT["orders"]


def test_a_backtest_takes_no_commands(calm: Path) -> None:
    link = Collector()
    watch(calm, Script({}), link)
    with pytest.raises(InputError, match="no live node"):
        link.command("kill", {})


def test_a_monitor_that_fails_costs_trading_nothing(calm: Path) -> None:
    class Broken(Collector):
        def send(self, message: dict[str, Any]) -> bool:
            raise OSError("no such socket")

    script = Script({1_000: (1, 6.0, 0)})
    with pytest.raises(OSError, match="no such socket"):
        watch(calm, script, Broken())
    watched = watch(calm, Script({1_000: (1, 6.0, 0)}), Collector())
    assert script.made and len(watched.strategy.fills) == 2


def test_a_trail_leads_from_the_event_to_what_became_of_it(calm: Path, tmp_path: Path) -> None:
    file = tmp_path / "trail.jsonl"
    script = Script({1_000: (1, 6.0, 0), 3_000: (-1, 6.0, 0)}, regime=1)
    watch(calm, script, Collector(), regimes=("calm", "rising"), trail=file)
    entries = list(read(file))
    for n, made in enumerate(script.made):
        mine = [e for e in entries if e["trade"] == n]
        assert {e["trail"] for e in mine} == {f"SHARE.XTST@{made.ts}"}
        assert [e["stage"] for e in mine if e["stage"] != "order"] == ["signal", "fill", "fill", "closed"]
        assert {e["role"] for e in mine if e["stage"] == "order"} == {"entry", "stop", "target", "exit"}
    lines = follow(entries, 1)
    assert lines[0] == f"trade 1: event SHARE.XTST@{script.made[1].ts}"
    assert lines[1].split()[:3] == ["2.000", "ms", "decided:"] and "sell" in lines[1] and "closed by horizon" in lines[-1]
    assert any(line.split()[:3] == ["3.000", "ms", "fill"] for line in lines)
    with pytest.raises(InputError, match="no trade 9"):
        follow(entries, 9)


def test_a_full_disk_costs_trading_nothing(calm: Path, tmp_path: Path) -> None:
    (tmp_path / "trail.jsonl").mkdir()  # a file that cannot be written
    watched = watch(calm, Script({1_000: (1, 6.0, 0)}), Collector(), trail=tmp_path / "trail.jsonl")
    assert len(watched.strategy.fills) == 2 and watched.monitor.trail is not None and watched.monitor.trail.failed > 4
