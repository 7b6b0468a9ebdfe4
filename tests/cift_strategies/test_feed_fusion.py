"""Several feeds as one view: nothing is known before it was, statistics are those of numpy, a silent feed is noticed in time."""

from __future__ import annotations

import asyncio
import gc
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nautilus_trader.common import Environment, LoggerConfig, LogLevel
from nautilus_trader.live import LiveNode
from nautilus_trader.model import TraderId
from polygon_node import AAPL, QUICK, T0, aside, quote, run, trade
from polygon_server import KEY, WAIT, Server
from tapes import OPEN, SHARE, Tape, write

from catalog import altdata
from catalog.asof import Lookup
from catalog.errors import InputError
from catalog.events import SCALE
from cift_models.features import FEATURES, NAMES
from cift_strategies.faults import Faults
from cift_strategies.feature_actor import FeatureActor
from cift_strategies.feeds import fusion, polygon
from cift_strategies.feeds.fusion import Fused, Fusion, Series, Silence, Tick
from cift_strategies.feeds.health import SILENT_NS, Health
from cift_strategies.feeds.running import Returns

MS = 1_000_000


# --- returns --------------------------------------------------------------------------------------------------------------------------


def by_numpy(ts: np.ndarray, price: np.ndarray, every: int, pause: int, half_life_s: float) -> tuple[np.ndarray, float]:
    """The last price of each whole interval, their log returns, and the weighted second moment, the slow way."""
    returns = []
    breaks = np.flatnonzero((np.diff(ts // every)) * every > pause) + 1
    for a, b in zip([0, *breaks], [*breaks, len(ts)]):
        cells = np.arange(ts[a] // every, ts[b - 1] // every + (b < len(ts)))
        last = price[a:b][np.searchsorted(ts[a:b], (cells + 1) * every, "left") - 1]
        returns.append(np.diff(np.log(last)))
    r = np.concatenate(returns)
    if not len(r):
        return r, math.nan
    decay = 0.5 ** (every / SCALE / half_life_s)
    weights = (1 - decay) * decay ** np.arange(len(r) - 1, -1, -1)
    weights[0] = decay ** (len(r) - 1)
    return r, math.sqrt((weights * r**2).sum() / (every / SCALE))


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.1, 1.0, 7.0]), st.sampled_from([3.0, 60.0]))
def test_returns_and_volatility_are_numpys(seed: int, every_s: float, half_life_s: float) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 200))
    steps = np.where(rng.random(n) < 0.1, rng.integers(1, 400, n) * SCALE, rng.integers(0, 2 * SCALE, n))
    ts = OPEN + np.cumsum(steps)
    price = 100 * np.exp(np.cumsum(rng.normal(0, 1e-3, n)))
    running = Returns(every_s, half_life_s, pause_s=300.0)
    for t, p in zip(ts.tolist(), price.tolist()):
        running.update(t, p)
    r, volatility = by_numpy(ts, price, round(every_s * SCALE), 300 * SCALE, half_life_s)
    s = running.summary()
    assert s.count == len(r) and s.last == price[-1]
    if len(r):
        assert s.mean == pytest.approx(r.mean(), abs=1e-15) and s.latest == pytest.approx(r[-1], abs=1e-15)
        assert s.volatility == pytest.approx(volatility, rel=1e-9, abs=1e-18)
    if len(r) > 1:
        assert s.std == pytest.approx(r.std(ddof=1), rel=1e-9, abs=1e-15)


def test_what_moved_overnight_is_no_return() -> None:
    running = Returns()
    for t, p in ((0, 100.0), (1, 101.0), (2, 102.0), (60_000, 200.0), (60_001, 202.0), (60_002, 202.0)):
        running.update(OPEN + t * SCALE, p)
    for wrong in (math.nan, 0.0, -1.0, math.inf):
        running.update(OPEN + 60_003 * SCALE, wrong)
    assert running.count == 3 and running.mean == pytest.approx((math.log(1.02) + math.log(1.01)) / 3)
    assert math.isnan(Returns().summary().volatility)
    with pytest.raises(ValueError, match="interval"):
        Returns(every_s=0.0)


# --- the time known -------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=30), st.integers(0, 25))
def test_a_series_tells_what_was_known(rows: list[tuple[int, int]], ts: int) -> None:
    """Of all that was known by then what is about the newest event; of several about the same event, the one known last."""
    series = Series()
    for n, (event, known) in enumerate(rows):
        series.put(event, known, float(n))
    by_then = [(e, k, n) for n, (e, k) in enumerate(rows) if k <= ts]
    value, age = series.at(ts)
    if not by_then:
        assert math.isnan(value) and math.isnan(age)
    else:
        event, _, n = max(by_then)
        assert (value, age) == (float(n), (ts - event) / SCALE)


def test_a_series_forgets_its_oldest_values_only() -> None:
    series = Series()
    for n in range(3 * fusion.KEPT):
        series.put(n, n, float(n))
    newest = 3 * fusion.KEPT - 1
    assert series.at(newest + 5)[0] == newest and series.at(newest - fusion.KEPT + 1)[0] == newest - fusion.KEPT + 1
    assert len(series._known) < 2 * fusion.KEPT


# --- silence --------------------------------------------------------------------------------------------------------------------------


class Desk:
    """Who wants to enter."""

    def __init__(self) -> None:
        self.halts: dict[str, str] = {}

    def halt(self, cause: str, why: str) -> None:
        self.halts[cause] = why

    def release(self, cause: str) -> None:
        del self.halts[cause]


def test_a_silent_feed_is_noticed_within_two_seconds() -> None:
    """Looked at every 100 ms: the first look after the silence has lasted too long is within 2 s of the last record."""
    depth, other = Health(["A", "B"]), Health(["I:SPX.POLYGON"])
    desk, said = Desk(), list[str]()
    silence = Silence({"depth": depth, "other": other}, desk, ["depth"], said.append)
    start = OPEN
    silence.start(start)
    noticed = {}
    for look in range(start, start + 10 * SCALE, fusion.LOOK_NS):
        if look <= start + 3 * SCALE or look >= start + 8 * SCALE:
            depth.seen(look // fusion.LOOK_NS % 2, look, look - 1)  # one of the two is enough: a thin market is no silence
        silence.look(look)
        for name in silence.silent:
            noticed.setdefault(name, look)
        assert bool(desk.halts) == ("depth" in silence.silent) == bool(silence.halted)
    assert SILENT_NS <= noticed["depth"] - (start + 3 * SCALE) <= 2 * SCALE
    assert SILENT_NS < noticed["other"] - start <= 2 * SCALE
    assert said == ["feed other is silent", "feed depth is silent: no entries", "feed depth is back after 3.2 s: entries again"]
    assert silence.silent.keys() == {"other"} and not desk.halts
    with pytest.raises(ValueError, match="no feed depht"):
        Silence({"depth": depth}, None, ["depht"])


def test_health_counts_what_is_missing() -> None:
    health = Health([AAPL, SHARE])
    health.seen(0, 5, 100, 3)
    health.seen(0, 4, 99)
    health.gap(1, 7)
    health.reconnected()
    told = health.counts()
    assert told["instruments"][AAPL.id] | {"ts_stream": 5, "records": 4, "gaps": 1} == told["instruments"][AAPL.id]
    assert told["instruments"][SHARE.id]["missing"] == 7 and told["reasons"] == {"sequence": 1, "reconnect": 2}
    assert health.silent(100 + SILENT_NS) == [1] and not health.quiet(100 + SILENT_NS)
    assert health.silent(101 + SILENT_NS) == [0, 1] and health.quiet(101 + SILENT_NS)
    assert health.row("NEW.X") == 2 and health.row(AAPL.id) == 0


# --- in a node ------------------------------------------------------------------------------------------------------------------------


def test_depth_of_one_feed_and_ticks_and_data_of_others_meet(tmp_path: Path) -> None:
    """In a backtest, where all times are known: each value appears with the first batch that closes after it was known, never before."""
    from tapes import Script

    from cift_strategies.risk import Limits
    from cift_strategies.settings import Settings
    from cift_strategies.strategy import Terms
    from cift_strategies.stream import Span
    from cift_strategies.system import Replay, assemble, run_backtest

    tape = Tape().book(0, 1000, 1002)
    for n in range(1, 400):
        tape.level(10 * n, 1, 996, 1000 + n)
        if n % 50 == 0:
            tape.trade(10 * n + 1, 1, 1002, 7)
    root = write(tmp_path, [tape])
    known = altdata.table([
        (SHARE.id, "news_count", 3.0, OPEN + 500 * MS, OPEN + 1_000 * MS),
        ("*", "vix", 17.0, OPEN, OPEN + 1_500 * MS),
    ])  # fmt: skip
    faults = Faults()
    span = Span(root, [SHARE])
    system = assemble(Terms([SHARE], Settings(), Limits(), faults=faults), Script({}))
    own = Fusion([SHARE], faults, altdata=Lookup(known, [SHARE.id]))
    seen: list[Fused] = []
    ticks: list[Tick] = []

    @own.hooks.on_features
    def keep(fused: Fused) -> None:
        seen.append(fused)
        if len(seen) == 100:
            own.put("spread elsewhere", fused.ts - MS, fused.ts + 250 * MS, 5.0)
            own.tell([(SHARE.id, "news_count", 4.0, OPEN + 2_000 * MS, OPEN + 3_000 * MS)])
            with pytest.raises(InputError, match="unknown feature"):
                own.tell([(SHARE.id, "newscount", 4.0, OPEN, OPEN)])

    own.hooks.on_tick(ticks.append)
    original = system.add_to
    replay = Replay(root, [SHARE], span.first, span.last, 1e6, MS)

    class Both:
        def add_to(self, add_actor: Any, add_strategy: Any) -> None:
            original(add_actor, add_strategy)
            add_actor(own)

        strategy = system.strategy

    _, node, _ = run_backtest(Both(), replay, faults)  # type: ignore[arg-type]
    node.dispose()
    assert len(seen) == 200 and own.fused == len(seen)
    assert [(t.price, t.size, t.side) for t in ticks] == [(10.02, 7.0, 1)] * 7
    put = seen[99].ts + 250 * MS
    for f in seen:
        ms = (f.ts - OPEN) / MS
        news = f.values[altdata.NAMES.index("news_count")]
        assert (math.isnan(news) if ms < 1_000 else news == (3.0 if ms < 3_000 else 4.0)), ms
        assert (f.values[altdata.NAMES.index("vix")] == 17.0) == (ms >= 1_500)
        value, age = f.beside.get("spread elsewhere", (math.nan, math.nan))
        assert (value == 5.0 and age == (f.ts - (seen[99].ts - MS)) / SCALE) if f.ts >= put else math.isnan(value)
        assert f.vector.ts >= f.ts and f.vector.rows.shape[1] == len(NAMES)
    assert seen[-1].returns.last == 10.01 and own.told()["returns"][SHARE.id]["count"] == 2


def test_a_feed_that_stops_halts_entries_in_a_live_node_and_says_so() -> None:
    """Polygon's client in a node, the server falls silent: the desk is halted, and released when it goes on."""
    server = Server()
    factory, config = polygon.client(["AAPL", "I:SPX"], KEY, instruments=[AAPL], feed=server.feed, patience=QUICK)
    faults, desk, said = Faults(), Desk(), list[str]()
    silence = Silence({"polygon": config.link.health}, desk, say=said.append)
    own = Fusion([AAPL], faults, beside=["I:SPX.POLYGON"], silence=silence)
    seen: list[Fused] = []
    ticks: list[Tick] = []
    own.hooks.on_features(seen.append)
    own.hooks.on_tick(ticks.append)
    node = (
        LiveNode.builder("TEST", TraderId("TEST-001"), Environment.SANDBOX)
        .with_logging(LoggerConfig(stdout_level=LogLevel.OFF))
        .with_delay_post_stop_secs(0)
        .with_reconciliation(False)
        .add_data_client(polygon.NAME, factory, config)
        .build()
    )
    features = FeatureActor([AAPL], faults)
    node.add_actor(features)
    node.add_actor(own)

    async def until(true: Any) -> None:
        async with asyncio.timeout(WAIT):
            while not true():
                await asyncio.sleep(0.01)

    told: list[int] = []

    async def body() -> None:
        await aside(server.until_subscribed, "stocks", "Q.AAPL", "T.AAPL")
        await aside(server.until_subscribed, "indices", "V.I:SPX")
        await aside(server.send, "indices", [{"ev": "V", "val": 3988.5, "T": "I:SPX", "t": T0}])
        await until(lambda: own.series)
        await aside(server.send, "stocks", [m for n in range(1, 101) for m in (quote(n), trade(n))])
        await until(lambda: len(seen) >= 2)
        last = max(p.wall for p in config.link.health.pulses)
        await until(lambda: desk.halts)
        noticed = own.clock.timestamp_ns()
        await aside(server.send, "stocks", [quote(200)])
        await until(lambda: not desk.halts)
        told.extend((last, noticed))

    asyncio.run(run(node, body()))
    del node
    gc.collect()
    server.close()
    faults.reraise()
    last, noticed = told
    assert silence.halted == "" and any("feed polygon is silent: no entries" in x for x in said) and "entries again" in said[-1]
    assert noticed - last > SILENT_NS  # that it is not later than 2 s is shown above, by a clock that no other program can hold up
    assert seen[-1].beside["I:SPX.POLYGON value"][0] == 3988.5
    assert {t.kind for t in ticks} == {"trade", "value"} and len([t for t in ticks if t.kind == "trade"]) == 100
    depth = [k for k, f in enumerate(FEATURES) if f.needs > 1]
    assert math.isfinite(seen[-1].vector.rows[-1, NAMES.index("mid")]) and np.isnan(seen[-1].vector.rows[-1, depth]).all()
