"""The synthetic exchange: its venue keeps price-time priority, what was planted can be found, and in the null market nothing can."""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist
from zoneinfo import ZoneInfo

import databento
import numpy as np
import pyarrow.parquet as pq
import pytest
from databento.common.publishers import Publisher

from catalog import synthetic
from catalog.errors import InputError
from catalog.exchange import MBO, STEP_UP
from catalog.planted import (
    GRID_S,
    HORIZONS_NS,
    REGIMES,
    SIGNALS,
    Plan,
    _beyond,
    flow,
    forecast,
    hidden_state,
    outlook,
)
from catalog.synthetic import BANDS, TICK, MarketFiles, make_market

A, C, F, M, R, T = (ord(c) for c in "ACFMRT")
BID, ASK, NONE = ord("B"), ord("A"), ord("N")


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> MarketFiles:
    return make_market(tmp_path_factory.mktemp("planted") / "market", seed=11, sessions=2, events=480_000)


@pytest.fixture(scope="module")
def null(tmp_path_factory: pytest.TempPathFactory) -> MarketFiles:
    return make_market(tmp_path_factory.mktemp("null") / "market", seed=12, sessions=1, events=100_000, instruments=1, null=True)


def read(path: Path) -> np.ndarray:
    return databento.DBNStore.from_file(path).to_ndarray().view(MBO)


@dataclass
class Seen:
    """What one instrument's records show after each of them: flow and traded add up from the start, depth counts levels."""

    ts: np.ndarray  # ts_recv, ns
    mid: np.ndarray  # ticks
    spread: np.ndarray  # ticks
    depth: np.ndarray
    imbalance: np.ndarray
    flow: np.ndarray
    traded: np.ndarray
    action: np.ndarray


def replay(records: np.ndarray) -> dict[int, Seen]:
    """A slow, obvious book of dictionaries that insists on every rule of the venue; one `Seen` per instrument id."""
    orders: dict[int, list[int]] = {}  # id: instrument, side, price, size, how many shares came
    levels: dict[tuple[int, int], dict[int, dict[int, None]]] = {}  # (instrument, side): price: ids, oldest first
    rows: dict[int, list[tuple[float, ...]]] = {}
    came, gone = 0, 0
    trade: tuple[int, ...] | None = None
    fill: tuple[int, ...] | None = None

    def best(i: int, side: int) -> int | None:
        prices = levels[i, side]
        return (max(prices) if side == BID else min(prices)) if prices else None

    def drop(i: int, side: int, price: int, n: int) -> None:
        del levels[i, side][price][n]
        if not levels[i, side][price]:
            del levels[i, side][price]

    names = ("ts_recv", "instrument_id", "action", "side", "price", "size", "order_id", "flags", "sequence")
    sequence = 0
    for ts, i, action, side, price, size, n, flags, seq in zip(*(records[name].tolist() for name in names)):
        assert size > 0 or action == R
        assert flags == (0 if action in (T, F) else 128)
        signed = 0
        same_message = action == F or (action == C and fill is not None)
        assert seq == sequence if same_message else seq == sequence + 1
        sequence = seq
        if action == R:
            assert side == NONE and n == 0 and i not in rows
            levels[i, BID], levels[i, ASK], rows[i] = {}, {}, []
        elif action == T:
            against = ASK if side == BID else BID
            assert n == 0 and trade is None and price == best(i, against), "a trade is at the best price"
            trade, signed = (i, against, price, size), size if side == BID else -size
        elif action == F:
            assert trade == (i, side, price, size) and orders[n][:3] == [i, side, price] and size <= orders[n][3]
            assert n == next(iter(levels[i, side][price])), "the oldest order of the price is filled first"
            fill, trade = (i, side, price, size, n), None
        elif action == A:
            assert n not in orders and n > 0
            orders[n] = [i, side, price, size]
            levels[i, side].setdefault(price, {})[n] = None
            came += size
        elif action == C:
            assert orders[n][:3] == [i, side, price] and size <= orders[n][3]
            assert fill in (None, (i, side, price, size, n)), "an execution is followed by a cancel of the executed size"
            fill, orders[n][3], gone = None, orders[n][3] - size, gone + size
            if orders[n][3] == 0:
                drop(i, side, price, n)
                del orders[n]
        else:
            assert action == M and orders[n][:2] == [i, side]
            was = orders[n]
            if price != was[2] or size > was[3]:
                drop(i, side, was[2], n)
                levels[i, side].setdefault(price, {})[n] = None
            came, orders[n] = came + size - was[3], [i, side, price, size]
        bid, ask = best(i, BID), best(i, ASK)
        if bid is None or ask is None:
            continue
        assert bid < ask, "the book is never crossed nor locked"
        sizes = [sum(orders[o][3] for o in levels[i, s][p]) for s, p in ((BID, bid), (ASK, ask))]
        rows[i].append((ts, bid / TICK, ask / TICK, min(len(levels[i, BID]), len(levels[i, ASK])), *sizes, signed, action))
    assert came - gone == sum(o[3] for o in orders.values()), "shares come with A and M, go with C, and the rest is in the book"
    seen = {}
    for i, r in rows.items():
        ts, bid, ask, depth, bid_size, ask_size, traded, action = np.array(r).T
        e = np.zeros(len(ts))  # Cont, Kukanov, Stoikov 2014, eq. 4
        e[1:] += (bid[1:] >= bid[:-1]) * bid_size[1:] - (bid[1:] <= bid[:-1]) * bid_size[:-1]
        e[1:] -= (ask[1:] <= ask[:-1]) * ask_size[1:] - (ask[1:] >= ask[:-1]) * ask_size[:-1]
        imbalance = (bid_size - ask_size) / (bid_size + ask_size)
        seen[i] = Seen(ts, (bid + ask) / 2, np.round(ask - bid), depth, imbalance, np.cumsum(e), np.cumsum(traded), action)
    return seen


@pytest.fixture(scope="module")
def seen(market: MarketFiles) -> list[list[Seen]]:
    """The planted market, by session and instrument; every record has passed the slow book."""
    return [list(replay(read(path)).values()) for path in market.mbo]


@pytest.fixture(scope="module")
def seen_null(null: MarketFiles) -> Seen:
    (one,) = replay(read(null.mbo[0])).values()
    return one


@pytest.fixture(scope="module")
def truth(market: MarketFiles) -> dict:
    return json.loads(market.truth.read_text())


@pytest.fixture(scope="module")
def table(market: MarketFiles) -> dict[str, np.ndarray]:
    t = pq.read_table(market.truth_table)
    return {name: t[name].to_numpy() for name in t.column_names}


def at(s: Seen, values: np.ndarray, ts: np.ndarray) -> np.ndarray:
    return values[np.maximum(np.searchsorted(s.ts, ts, side="right") - 1, 0)]


def t_values(x: np.ndarray, y: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """t of each column of x (n, k) in the regression of y (n,) on all of them, with errors that may depend on each other within a block."""
    z = (x - x.mean(0)) / x.std(0)
    e = y - y.mean()
    inverse = np.linalg.inv(z.T @ z)
    b = inverse @ z.T @ e
    scores = np.stack([np.bincount(blocks, c * (e - z @ b)) for c in z.T], axis=1)
    return b / np.sqrt(np.diag(inverse @ scores.T @ scores @ inverse))


# The venue


def test_trades_hit_the_best_price_and_the_oldest_order_and_shares_are_conserved(seen: list[list[Seen]], seen_null: Seen) -> None:
    actions = np.concatenate([s.action for session in seen for s in session])
    assert all(np.mean(actions == a) > 0.01 for a in (A, C, M, T, F)) and np.any(seen_null.action == T)


def test_partial_executions_leave_the_rest_of_the_order(market: MarketFiles) -> None:
    r = read(market.mbo[0])
    filled = np.flatnonzero(r["action"] == F)
    assert np.all(r["action"][filled - 1] == T) and np.all(r["action"][filled + 1] == C)
    for name in ("ts_event", "ts_recv", "sequence", "price", "size", "instrument_id"):
        assert np.array_equal(r[name][filled], r[name][filled - 1]) and np.array_equal(r[name][filled], r[name][filled + 1])
    ends = {(int(n)): int(k) for k, n in enumerate(r["order_id"])}
    assert np.mean([ends[int(r["order_id"][k])] > k + 1 for k in filled]) > 0.2, "many filled orders are heard of again"


def test_stamps_run_forward_and_records_come_after_their_event(market: MarketFiles) -> None:
    for path in market.mbo:
        r = read(path)
        for name in ("ts_event", "ts_recv", "sequence"):
            assert np.all(np.diff(r[name].astype(np.int64)) >= 0)
        latency = r["ts_recv"].astype(np.int64) - r["ts_event"].astype(np.int64)
        assert latency.min() >= 0 and 15_000 < np.median(latency) < 60_000
        assert np.array_equal(latency, r["ts_in_delta"])


def test_sessions_are_business_days_in_a_row_that_begin_empty_and_end_at_the_close(market: MarketFiles, truth: dict) -> None:
    zone = ZoneInfo("America/New_York")
    days = [dt.datetime.fromtimestamp(s["end_ns"] / 1e9, zone) for s in truth["sessions"]]
    assert [d.date() for d in days] == [dt.date(2025, 3, 10), dt.date(2025, 3, 11)]
    assert all(d.strftime("%H:%M:%S") == "15:59:59" for d in days) and market.session == "09:30-16:00 America/New_York"
    for path in market.mbo:
        r = read(path)
        assert np.sum(r["action"] == R) == 3 and r["action"][0] == R
        for i in np.unique(r["instrument_id"]):
            assert r["action"][r["instrument_id"] == i][0] == R


def test_prices_go_on_where_the_last_session_ended(seen: list[list[Seen]]) -> None:
    for before, after in zip(*seen):
        assert abs(after.mid[0] - before.mid[-1]) < 150


def test_the_spread_is_mostly_one_or_two_ticks_and_the_book_is_several_levels_deep(seen: list[list[Seen]]) -> None:
    spread = np.zeros(20)
    for session in seen:
        for s in session:
            each_second = np.arange(s.ts[0] + 1e9, s.ts[-1], 1e9)
            spread += np.bincount(at(s, s.spread, each_second).astype(int), minlength=20)
            assert np.median(at(s, s.depth, each_second)) >= 7
    assert spread[1] > 0.45 * spread.sum() and spread[1] + spread[2] > 0.95 * spread.sum()


# The files


def test_databento_reads_the_files(market: MarketFiles, truth: dict) -> None:
    for path, definition, session in zip(market.mbo, market.definitions, truth["sessions"]):
        store = databento.DBNStore.from_file(path)
        assert (store.dataset, str(store.schema), store.symbols) == ("XNAS.ITCH", "mbo", list(market.symbols))
        frame = store.to_df()
        assert len(frame) == session["records"] and set(frame["symbol"]) == set(market.symbols)
        assert int(store.metadata.start) <= session["start_ns"] < session["end_ns"] < int(store.metadata.end)
        definitions = list(databento.DBNStore.from_file(definition))
        assert [d.raw_symbol for d in definitions] == list(market.symbols)
        assert {d.min_price_increment for d in definitions} == {TICK}
        assert {d.instrument_id for d in definitions} == set(frame["instrument_id"])
    assert sum(s["records"] for s in truth["sessions"]) >= 480_000


def test_nautilus_reads_the_files(market: MarketFiles, tmp_path: Path) -> None:
    from nautilus_trader.adapters.databento import DatabentoDataLoader

    assert Publisher.XNAS_ITCH_XNAS.to_int() == 2
    publishers = tmp_path / "publishers.json"
    publishers.write_text(json.dumps([{"publisher_id": 2, "dataset": "XNAS.ITCH", "venue": "XNAS", "description": "Nasdaq"}]))
    loader = DatabentoDataLoader(publishers)
    equities = loader.load_instruments(market.definitions[0], use_exchange_as_venue=False)
    assert [str(e.id) for e in equities] == [f"{s}.XNAS" for s in market.symbols]
    assert {str(e.price_increment) for e in equities} == {"0.01"}
    deltas = loader.load_order_book_deltas(market.mbo[0])
    r = read(market.mbo[0])
    assert len(deltas) == np.sum(np.isin(r["action"], [A, C, M, R]))


def test_a_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    made = [make_market(tmp_path / name, seed=seed, sessions=2, events=24_000) for name, seed in zip(names, (3, 3, 4))]
    files = [{p.name: p.read_bytes() for p in m.root.iterdir()} for m in made]
    assert files[0] == files[1] and len(files[0]) == 7
    assert all(files[0][p.name] != files[2][p.name] for p in made[0].mbo)


def test_a_finished_market_is_used_again_and_a_damaged_or_different_one_is_not(tmp_path: Path) -> None:
    ask = {"out": tmp_path / "m", "sessions": 1, "events": 12_000}
    first = make_market(**ask)
    stamp = first.truth.stat().st_mtime_ns
    assert make_market(**ask) == first and first.truth.stat().st_mtime_ns == stamp
    whole = first.mbo[0].read_bytes()
    first.mbo[0].write_bytes(whole[:-1])
    assert make_market(**ask).mbo[0].read_bytes() == whole
    other = make_market(**ask, seed=8)
    assert other.mbo[0].read_bytes() != whole and json.loads(other.truth.read_text())["made"]["seed"] == 8
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_an_interrupt_leaves_nothing_that_looks_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic.Steps, "advance", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_market(tmp_path / "m", sessions=2, events=24_000)
    assert list(tmp_path.iterdir()) == []


def test_wrong_wishes_are_refused_and_no_foreign_folder_is_touched(tmp_path: Path) -> None:
    for wrong in ({"sessions": 0}, {"instruments": 0}, {"instruments": 9}, {"events": 100}, {"events": 10**9}):
        with pytest.raises(InputError, match="cannot be made"):
            make_market(tmp_path / "m", **wrong)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "mine" / "truth.json").write_text("[]")
    with pytest.raises(InputError, match="no synthetic market"):
        make_market(tmp_path / "mine", events=24_000)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["mine", "thesis.txt", "truth.json"]


# What was planted


def test_arrivals_excite_their_own_and_other_types() -> None:
    steady = replace(Plan(), activity=(1.0,) * 5, lean=0.0, null=True)

    def counts(plan: Plan) -> np.ndarray:
        rng = np.random.default_rng(5)
        hidden = hidden_state(rng, plan, 1, 1_500.0, 50_000)
        t, kind, _ = flow(rng, plan, hidden)
        return np.stack([np.bincount((t[kind == k] / 0.5).astype(int), minlength=int(1_500 / 0.5))[: int(1_500 / 0.5)] for k in range(6)])

    excited, poisson = counts(steady), counts(replace(steady, branching=((0.0,) * 6,) * 6))
    fano = excited.var(1) / excited.mean(1)
    assert fano.min() > 1.3 and np.all(abs(poisson.var(1) / poisson.mean(1) - 1) < 0.12)
    across, none = np.corrcoef(excited), np.corrcoef(poisson)
    assert across[0, 2] > 0.15 and across[0, 5] > 0.15 and across[2, 4] > 0.2, "buys beget bids and the withdrawal of asks"
    assert np.max(abs(none - np.eye(6))) < 0.08
    share = excited.sum() / poisson.sum()
    expected = np.linalg.solve(np.eye(6) - np.array(Plan().branching).T, Plan().base).sum() / sum(Plan().base)
    assert share == pytest.approx(expected, rel=0.05), "as many descendants as the branching matrix says"


def test_published_trades_cluster_beyond_poisson(market: MarketFiles) -> None:
    r = read(market.mbo[0])
    ts = r["ts_event"][(r["action"] == T) & (r["side"] == BID)].astype(np.int64)
    first_of_order = ts[np.append(True, np.diff(ts) > 0)]
    n = np.bincount((first_of_order - ts[0]) // 200_000_000)
    assert n.var() / n.mean() > 1.3 and np.corrcoef(n[1:], n[:-1])[0, 1] > 0.1


def test_the_followers_move_after_the_leader_by_the_planted_lags(seen: list[list[Seen]], truth: dict) -> None:
    lags = np.arange(-100, 101)  # of 5 ms
    for i in (1, 2):
        total = np.zeros(len(lags))
        for session in seen:
            grid = np.arange(session[0].ts[0] + 2e9, session[0].ts[-1] - 2e9, 5e6)
            leader, follower = (np.diff(at(s, s.mid, grid)) for s in (session[0], session[i]))
            smooth = np.ones(3)
            a, b = np.convolve(leader, smooth, "same"), np.convolve(follower, smooth, "same")
            total += [np.sum(a[200:-200] * np.roll(b, -k)[200:-200]) for k in lags]
        assert abs(5 * lags[np.argmax(total)] - truth["lags_ms"][i]) <= 15
        assert total.max() > 5 * np.abs(total[lags <= 0]).max() / 2, "nothing comparable the other way round"


def test_regimes_differ_in_volatility_and_direction(seen: list[list[Seen]], truth: dict) -> None:
    squares, moves, seconds = np.zeros(5), np.zeros(5), np.zeros(5)
    for session, told in zip(seen, truth["sessions"]):
        edges = np.array([*told["regime_ts"], told["end_ns"]], float)
        for s in session:
            ts = np.arange(s.ts[0], s.ts[-1], 2e8)
            step = np.diff(at(s, s.mid, ts))
            regime = np.array(told["regime"])[np.searchsorted(edges, ts[1:], side="right").clip(1, len(edges) - 1) - 1]
            squares += np.bincount(regime, step**2, 5)
            moves += np.bincount(regime, step, 5)
            seconds += np.bincount(regime, minlength=5) * 0.2
    assert np.all(seconds > 0), "every regime is visited"
    volatility = np.sqrt(squares / seconds)
    calm, up, down, volatile, crisis = volatility
    assert calm < min(up, down) and max(up, down) < volatile < crisis
    drift = moves / seconds
    assert drift[REGIMES.index("trending up")] > 0.02 > -0.02 > drift[REGIMES.index("trending down")]


def test_informed_flow_tells_of_the_signal_and_moves_the_price(seen: list[list[Seen]], table: dict[str, np.ndarray]) -> None:
    own, impact = [], []
    for k, session in enumerate(seen):
        for i, s in enumerate(session):
            rows = (table["session"] == k) & (table["instrument"] == i) & (table["horizon_ns"] == HORIZONS_NS[0])
            ts = table["ts"][rows]
            bought = at(s, s.traded, ts) - at(s, s.traded, ts - 5e9)
            if i == 0:
                own.append(np.corrcoef(bought, table["flow"][rows])[0, 1])
            impact.append(np.corrcoef(bought, at(s, s.mid, ts) - at(s, s.mid, ts - 5e9))[0, 1])
    assert np.mean(own) > 0.2 and min(own) > 0.1 and min(impact) > 0.1, "Kyle: the price follows signed volume"


def test_more_informed_takers_make_flow_more_toxic(tmp_path: Path) -> None:
    vpin, kyle = [], []
    for share in (0.0, 0.95):
        right = {"alpha": (0.37, 0.0, 0.0, 0.0), "gain": ((1.0,) * 5,) * 3, "heard": 0.0, "heed": 0.0}  # takers are no herd
        plan = replace(Plan(), informed=share, picked=0.25 * (share > 0), **right)
        r = read(make_market(tmp_path / str(share), sessions=1, events=120_000, instruments=1, plan=plan).mbo[0])
        r = r[r["action"] == T]
        signed = np.where(r["side"] == BID, 1.0, -1.0) * r["size"]
        bucket = np.cumsum(abs(signed)).astype(int) // 5_000
        net = np.bincount(bucket, signed)
        vpin.append(np.mean(abs(net) / np.bincount(bucket, abs(signed))))
        last = r["price"][np.append(np.diff(bucket) > 0, True)] / TICK
        kyle.append(np.polyfit(net[1:], np.diff(last), 1)[0])
    assert vpin[1] > 1.1 * vpin[0] and kyle[1] > kyle[0] + 0.0002, "VPIN and Kyle's lambda rise"


def test_truth_tells_what_the_files_show(seen: list[list[Seen]], table: dict[str, np.ndarray]) -> None:
    for k, session in enumerate(seen):
        for i, s in enumerate(session):
            for h, band in zip(HORIZONS_NS, BANDS):
                rows = (table["session"] == k) & (table["instrument"] == i) & (table["horizon_ns"] == h)
                ts = table["ts"][rows]
                assert np.allclose(table["mid"][rows] * 100, at(s, s.mid, ts))
                move = at(s, s.mid, ts + h) - at(s, s.mid, ts)
                assert np.allclose(table["move"][rows], move)
                assert np.array_equal(table["outcome"][rows], np.sign(move) * (abs(move) > band))
                assert np.std(table["efficient"][rows] * 100 - table["mid"][rows] * 100) < 0.7


def test_the_oracle_is_calibrated_and_beats_the_frequencies(table: dict[str, np.ndarray], truth: dict) -> None:
    for score in truth["oracle"]["scores"]:
        assert score["log_loss_frequencies"] - score["log_loss"] > 3 * score["gain_standard_error"] > 0
        rows = table["horizon_ns"] == score["horizon_ns"]
        p = np.stack([table[name][rows] for name in ("p_down", "p_flat", "p_up")], axis=1)
        y = table["outcome"][rows] + 1
        assert np.allclose(p.sum(1), 1) and p.min() >= 0
        assert score["log_loss"] == pytest.approx(-np.mean(np.log(p[np.arange(len(y)), y])))
        overlap = max(1.0, score["horizon_ns"] / 1e9)
        for c in range(3):
            for part in np.array_split(np.argsort(p[:, c], kind="stable"), 5):
                told, came = p[part, c].mean(), np.mean(y[part] == c)
                assert abs(told - came) < 4 * np.sqrt(told * (1 - told) * overlap / len(part)) + 0.02
    accuracy = [s["accuracy"] for s in truth["oracle"]["scores"]]
    assert min(accuracy) > 0.45 and max(accuracy) < 0.75


def test_the_hidden_returns_do_not_predict_themselves() -> None:
    plan = replace(Plan(), sigma=(1.0,) * 5, drift=(0.0,) * 5, gain=((1.0,) * 5,) * 3)
    hidden = hidden_state(np.random.default_rng(2), plan, 1, 10_000.0, 640_000)
    step = round(5 / GRID_S)
    r = np.diff(hidden.value[0, ::step])
    assert abs(np.corrcoef(r[1:], r[:-1])[0, 1]) < 3.5 / np.sqrt(len(r))
    assert r.var() == pytest.approx(5.0, rel=0.1), "sigma^2 a second, whatever the signals add"
    for k, (alpha, tau) in enumerate(zip(plan.alpha, plan.tau)):
        told = np.corrcoef(hidden.x[k, 0, ::step][: len(r)], r)[0, 1]
        assert told == pytest.approx(alpha * tau * (1 - np.exp(-5 / tau)) / np.sqrt(5), abs=3.5 / np.sqrt(len(r))), SIGNALS[k]
    second = np.diff(hidden.value[0, :: round(1 / GRID_S)])
    ago = [np.corrcoef(second[lag:], second[:-lag])[0, 1] for lag in range(1, 20)]
    assert np.argmax(ago) + 1 in (plan.echo, plan.echo + 1) and max(ago) > 5 / np.sqrt(len(second)), "but moves have an echo"


@pytest.mark.parametrize("i", [0, 1])
def test_the_oracle_knows_mean_and_variance_of_the_efficient_price(i: int) -> None:
    """With one regime there is one future, and what comes less what it says, in its deviations, is a standard normal."""
    plan = replace(Plan(), sigma=(1.3,) * 5, drift=(0.05,) * 5, gain=((1.0,) * 5, (-0.5,) * 5, (1.0,) * 5))
    rng = np.random.default_rng(7)
    hidden, chain = hidden_state(rng, plan, 2, 10_000.0, 640_000), outlook(rng, plan, 10_000.0)
    for h in HORIZONS_NS:
        ahead = round(h / 1e9 / GRID_S)
        at = np.arange(2_000, hidden.value.shape[1] - ahead, ahead)
        mean, variance = forecast(plan, hidden, chain, i, at, h / 1e9)
        z = (hidden.value[i, at + ahead] - hidden.value[i, at] - mean[:, 0]) / np.sqrt(variance[:, 0])
        assert np.allclose(variance, variance[:1, :1]) and abs(z.mean()) < 3.5 / np.sqrt(len(z))
        assert abs(z.var() - 1) < 3.5 * np.sqrt(2 / len(z)), h
        for told in (*hidden.x[:, 0], hidden.early[0]):  # nothing that it knows is left over
            assert abs(np.corrcoef(told[at], z)[0, 1]) < 4 / np.sqrt(len(z))


def test_the_oracle_of_a_switch_agrees_with_simulated_paths() -> None:
    rng = np.random.default_rng(4)
    steps = 4_000
    paths = np.cumsum(rng.standard_normal((4_000, steps)) / np.sqrt(steps), axis=1)
    for entry, width in ((0.5, 0.4), (1.2, 0.7), (0.1, 1.0), (-0.2, 0.6), (0.8, 0.25)):
        on = np.full(len(paths), entry < 0)
        for v in paths.T:
            on = np.where(v > entry, True, on & (v > entry - width))
        assert _beyond(entry, width, 1.0) == pytest.approx(on.mean(), abs=0.03)
    assert _beyond(0.5, 0.2001, 1.0) == pytest.approx(_beyond(0.5, 0.1999, 1.0), abs=0.002), "the limit of a narrow switch"


# Planted and null, asked the same questions


def bound(tests: int) -> float:
    """|t| that one of so many true nulls exceeds with probability 1 % at most (Bonferroni)."""
    return NormalDist().inv_cdf(1 - 0.01 / 2 / tests)


PREDICTORS = ("imbalance", "flow", "traded", "past")


def asked(s: Seen, horizon_ns: float) -> np.ndarray:
    """t of each of PREDICTORS (of the last 5 s) alone for the move of the mid over the horizon, then of all jointly: (2, 4)."""
    ts = np.arange(s.ts[0] + 6e9, s.ts[-1] - horizon_ns, 1e9)
    move = at(s, s.mid, ts + horizon_ns) - at(s, s.mid, ts)
    x = [at(s, s.imbalance, ts), *(at(s, v, ts) - at(s, v, ts - 5e9) for v in (s.flow, s.traded, s.mid))]
    blocks = ((ts - ts[0]) // (4 * max(horizon_ns, 5e9))).astype(int)
    alone = np.concatenate([t_values(v[:, None], move, blocks) for v in x])
    return np.stack([alone, t_values(np.stack(x, axis=1), move, blocks)])


def test_in_the_planted_market_book_and_flow_predict_the_mid(seen: list[list[Seen]]) -> None:
    def told(horizon_ns: float) -> list[dict[str, float]]:
        per = [asked(s, horizon_ns) for session in seen for s in session]
        return [dict(zip(PREDICTORS, t)) for t in np.sum(per, axis=0) / np.sqrt(len(per))]

    (alone, jointly), (soon_alone, soon_jointly) = told(5e9), told(1e9)
    assert soon_alone["imbalance"] > 4 and soon_jointly["imbalance"] > 4
    assert alone["traded"] > 2.5 and jointly["traded"] > 3, "takers, who are wrong where it is wild"
    assert abs(alone["past"]) < 3, "its own past says nothing of it"


def test_order_flow_imbalance_explains_the_mid_move_of_its_own_second(seen: list[list[Seen]]) -> None:
    def together(s: Seen) -> float:
        ts = np.arange(s.ts[0] + 6e9, s.ts[-1], 1e9)
        return float(np.corrcoef(np.diff(at(s, s.flow, ts)), np.diff(at(s, s.mid, ts)))[0, 1])

    assert min(together(s) for session in seen for s in session) > 0.5


def test_in_the_null_market_nothing_predicts_the_mid(seen_null: Seen) -> None:
    t = np.stack([asked(seen_null, horizon) for horizon in (5e8, 1e9, 5e9)])
    assert np.max(abs(t)) < bound(t.size), dict(zip(PREDICTORS, t.T))


def test_in_the_null_market_every_move_is_a_coin_that_knows_neither_book_nor_flow(seen_null: Seen) -> None:
    plan, target = replace(Plan(), null=True), 100_000
    rng = np.random.default_rng([12, 1])  # seed and session of the fixture
    hidden = hidden_state(rng, plan, 1, target / plan.mean_density(), target)
    _, kind, _ = flow(rng, plan, hidden)
    coins = np.where(kind[kind >= STEP_UP] == STEP_UP, 1, -1)
    moves = np.sign(np.diff(seen_null.mid))
    moves = moves[moves != 0]
    assert len(moves) > 1_000 and np.array_equal(moves, coins[: len(moves)])


def told_of_next_move(s: Seen, moved: np.ndarray) -> np.ndarray:
    """t of what one random record between two moves of the mid shows for the direction of the next move."""
    rng = np.random.default_rng(1)
    now = (moved[:-1] + 1 + rng.random(len(moved) - 1) * np.diff(moved)).astype(int)
    up, last = np.sign(np.diff(s.mid))[moved[1:]], np.sign(np.diff(s.mid))[moved[:-1]]
    before = np.maximum(now - 20, 0)
    x = [s.imbalance[now], s.flow[now] - s.flow[before], np.sign(s.traded[now] - s.traded[before]), last, s.spread[now]]
    x += [(s.action[now] == action) * np.sign(s.imbalance[now]) for action in (A, C, M)]
    return t_values(np.stack(x, axis=1), up, np.arange(len(up)))


def test_in_the_null_market_no_record_tells_of_the_next_move(seen_null: Seen) -> None:
    s = seen_null
    steps = np.diff(s.mid)
    moved = np.flatnonzero(steps)
    assert set(np.abs(steps[moved])) == {0.5}
    t = told_of_next_move(s, moved)
    assert max(abs(t)) < bound(len(t)), t
    waits = np.diff(s.ts[moved]) / 1e9
    rate = Plan().null_steps
    assert waits.mean() == pytest.approx(1 / rate, rel=0.1) and waits.std() == pytest.approx(1 / rate, rel=0.1), "Poisson times"
    assert abs(np.corrcoef(waits[1:], waits[:-1])[0, 1]) < 3.5 / np.sqrt(len(waits)), "no clusters of moves"
    directions = np.sign(steps[moved])
    assert abs(directions.sum()) < 3.5 * np.sqrt(len(moved))
    assert abs(np.corrcoef(directions[1:], directions[:-1])[0, 1]) < 3.5 / np.sqrt(len(moved))


def test_the_null_market_flow_is_as_lively_and_its_oracle_claims_no_direction(null: MarketFiles, seen_null: Seen) -> None:
    told = json.loads(null.truth.read_text())
    t = pq.read_table(null.truth_table)
    assert np.allclose(t["p_up"].to_numpy(), t["p_down"].to_numpy(), atol=1e-12) and told["lags_ms"] is None and told["informed_share"] == 0
    for h in HORIZONS_NS:
        assert len(np.unique(t["p_up"].to_numpy()[t["horizon_ns"].to_numpy() == h])) == 1
    n = np.bincount(((seen_null.ts - seen_null.ts[0]) // 2e8).astype(int))
    assert n.var() / n.mean() > 2, "regimes and excitation still move the activity"


def test_truth_holds_the_plan_it_was_made_from(truth: dict) -> None:
    plan = asdict(Plan())
    assert truth["made"]["plan"] == json.loads(json.dumps(plan)) and truth["branching"] == [list(row) for row in plan["branching"]]
    assert truth["branching_radius"] < 0.8 and truth["lags_ms"] == [0.0, 60.0, 240.0]
    assert truth["fee_per_share"] == 0.003 and truth["regimes"] == list(REGIMES)
