"""A seeded market of several equities: genuine DBN files and the truth that was planted in them.

Takes a seed and sizes; gives a folder with one MBO and one definition file per session (dataset XNAS.ITCH), `truth.json`,
`truth.parquet` with the oracle's probabilities, and `alternative.parquet`, the table of :mod:`catalog.altdata`.
:mod:`catalog.planted` is what goes on behind the market, :mod:`catalog.planted_altdata` what is told of it, :mod:`catalog.exchange` the
venue.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from zoneinfo import ZoneInfo

import databento_dbn as dbn
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from numpy.typing import NDArray

from catalog import altdata, planted_altdata
from catalog.errors import InputError
from catalog.exchange import LEVELS, MID2, RECV, SPREAD, WHOSE, Exchange, new_exchange, records, run_session
from catalog.planted import (
    FLOW,
    FUTURES,
    GRID_S,
    HORIZONS_NS,
    REGIMES,
    SIGNALS,
    UNSURE,
    Floats,
    Hidden,
    Plan,
    class_probability,
    flow,
    forecast,
    hidden_state,
    outlook,
    thresholds,
)
from catalog.progress import Steps

FORMAT: Final = 4  # of a market on disk; one of another format is made anew
DATASET: Final = "XNAS.ITCH"
SESSION: Final = "09:30-16:00 America/New_York"  # the recorded part ends at the close
FIRST_DAY: Final = "2025-03-10"
SYMBOLS: Final = ("KESTR", "MARLN", "PLOVR", "OSPRI", "TARNS", "WRENX", "CURLW", "DUNLN")
OPENING: Final = (10_137, 6_742, 13_488, 8_815, 5_263, 11_904, 7_391, 14_526)  # ticks
TICK: Final = 10_000_000  # 0.01, in 1e-9 units
MIDDLE: Final = LEVELS // 2  # level of the opening price
BANDS: Final = (0.25, 0.25, 1.25, 2.75)  # ticks, per horizon: up is a move of the mid above the band, down below minus the band, flat else
FEE_PER_SHARE: Final = 0.0030  # USD, to which the market is tuned
LEAST: Final = 4_000  # records of a session and instrument: about a minute
SAMPLE_S: Final = 1.0  # between two decision times of the oracle


@dataclass(frozen=True, slots=True)
class MarketFiles:
    """A finished market on disk."""

    root: Path
    mbo: tuple[Path, ...]  # one a session
    definitions: tuple[Path, ...]  # one a session
    truth: Path  # truth.json
    truth_table: Path  # truth.parquet
    alternative: Path  # alternative.parquet
    symbols: tuple[str, ...]
    session: str  # "HH:MM-HH:MM Area/City"


def make_market(
    out: Path,
    seed: int = 7,
    sessions: int = 2,
    events: int = 1_200_000,
    instruments: int = 3,
    null: bool = False,
    plan: Plan | None = None,
) -> MarketFiles:
    """Make a market in the folder `out`, or find there the finished one of the same parameters.

    Args:
        events: MBO records of all sessions together (a few more are written); about 70 a second and instrument, so the default makes
            two sessions of about 50 minutes. One in seven is an F, which says again what its T and C say. The mean dwell times of the
            regimes are shares of a session's length.
        null: a market whose mid is a martingale, independent of book and flow.
        plan: what to plant instead of the default; its `null` is set by the argument.

    Raises:
        InputError: parameters out of range, or `out` holds something that is no market.
    """
    plan = Plan(**(asdict(plan or Plan()) | {"null": null}))
    most = int(6.5 * 3600 * plan.mean_density() * instruments)
    if not (1 <= instruments <= len(SYMBOLS) and sessions >= 1 and LEAST * instruments <= events / sessions <= most):
        raise InputError(
            f"synthetic market: {events:,} events in {sessions} sessions of {instruments} instruments cannot be made; take 1 to "
            f"{len(SYMBOLS)} instruments and {LEAST * instruments:,} to {most:,} events per session"
        )
    made = {"format": FORMAT, "seed": seed, "sessions": sessions, "events": events, "instruments": instruments, "plan": asdict(plan)}
    made = json.loads(json.dumps(made))
    out = Path(out)
    found = _read_truth(out)
    if not found and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"synthetic market: {out} exists and is no synthetic market: name another folder or remove it")
    if found.get("made") == made and all(_sha256(out / name) == digest for name, digest in found["sha256"].items()):
        return _files(out)
    building, former = (out.with_name(f".{out.name}.{what}-{os.getpid()}") for what in ("building", "former"))
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        _build(building, made, plan)
        if out.exists():
            out.rename(former)
        building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)
    return _files(out)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _read_truth(out: Path) -> dict[str, Any]:
    """`truth.json` of the market in `out`; empty where there is none."""
    try:
        truth = json.loads((out / "truth.json").read_text())
    except (OSError, ValueError):
        return {}
    return truth if isinstance(truth, dict) and "made" in truth else {}


def _files(out: Path) -> MarketFiles:
    truth = _read_truth(out)
    mbo, definitions = (tuple(out / s[kind] for s in truth["sessions"]) for kind in ("mbo", "definition"))
    tables = out / truth["table"], out / truth["alternative"]["table"]
    return MarketFiles(out, mbo, definitions, out / "truth.json", *tables, tuple(truth["symbols"]), truth["session"])


def _build(out: Path, made: dict[str, Any], plan: Plan) -> None:
    instruments, symbols = made["instruments"], SYMBOLS[: made["instruments"]]
    target = -(-made["events"] // made["sessions"])
    mean_s = target / (instruments * plan.mean_density())
    chain = outlook(np.random.default_rng([made["seed"], 0]), plan, mean_s)
    opening = np.array(OPENING[:instruments])
    sessions, tables = [], []
    told: list[planted_altdata.Row] = []
    with Steps("synthetic market", made["events"], "events") as steps:
        for k in range(made["sessions"]):
            rng = np.random.default_rng([made["seed"], k + 1])
            hidden = hidden_state(rng, plan, instruments, mean_s, target)
            x, written = _trade(rng, plan, hidden, target)
            day = dt.date.fromisoformat(str(np.busday_offset(np.datetime64(FIRST_DAY), k)))
            close = dt.datetime.combine(day, dt.time.fromisoformat(SESSION[6:11]), ZoneInfo(SESSION[12:]))
            shift = int(close.timestamp()) * 1_000_000_000 - 1_000 - int(x.out[written - 1, RECV])
            mids = x.out[:written, MID2] / 2 - MIDDLE  # ticks from the opening price
            table = _oracle(plan, hidden, chain, x.out[:written], mids)
            table |= {"session": np.full(len(table["ts"]), k), "origin": opening[table["instrument"]]}
            table["ts"] = table["ts"] + shift
            tables.append(table)
            names = _write(out, day, symbols, 6_001 + 37 * k, x, (opening - MIDDLE) * TICK, shift)
            ends = int(x.out[written - 1, RECV])
            told += planted_altdata.rows(np.random.default_rng([made["seed"], k + 1, 27]), plan, hidden, symbols, day, shift, shift + ends)
            seen = hidden.switches < ends / 1e9
            sessions.append(
                names
                | {
                    "day": day.isoformat(),
                    "start_ns": shift,
                    "end_ns": shift + ends,
                    "records": written,
                    "regime_ts": [shift + round(t * 1e9) for t in hidden.switches[seen]],
                    "regime": hidden.states[seen].tolist(),
                }
            )
            last = [mids[np.flatnonzero(x.out[:written, WHOSE] == i)[-1]] for i in range(instruments)]
            opening = opening + np.round(last + rng.normal(0, 25, instruments)).astype(int)
            steps.advance(written)
    table = {name: np.concatenate([t[name] for t in tables]) for name in tables[0]}
    pq.write_table(_truth_table(table), out / "truth.parquet", compression="zstd")
    altdata.write(altdata.table(told), out / "alternative.parquet")
    _write_truth(out, made, plan, symbols, sessions, _scores(table))


def _trade(rng: np.random.Generator, plan: Plan, hidden: Hidden, target: int) -> tuple[Exchange, int]:
    """One session on the exchange, in ns from its start; gives the exchange and the records written."""
    t, kind, instrument = flow(rng, plan, hidden)
    value = np.empty(len(t))
    grid = np.arange(hidden.value.shape[1]) * GRID_S
    for i in range(len(hidden.value)):
        mine = instrument == i
        value[mine] = np.interp(t[mine], grid, hidden.value[i])
    value = np.clip(value + MIDDLE + 0.5, 64, LEVELS - 64)
    x = new_exchange(len(hidden.value), target, int(rng.integers(2**63)))
    half, stale, depth = np.array(plan.half), np.array(plan.stale), np.array(plan.depth)
    ts = (t * 1e9).astype(np.int64) + 1_000_000
    regime = hidden.regime[(t / GRID_S).astype(np.int64)].astype(np.int64)
    used = run_session(x, 0, ts, kind, instrument, value, regime, half, stale, depth, plan.picked, plan.null, target)
    if used == len(t):
        raise RuntimeError(f"the flow ended after {x.counters[0]:,} of {target:,} records: the plan's density is too high")
    return x, int(x.counters[0])


def _write(
    out: Path, day: dt.date, symbols: tuple[str, ...], first_id: int, x: Exchange, origins: NDArray[np.int64], shift: int
) -> dict[str, str]:
    """The two DBN files of one session; gives their names."""
    ids = first_id + np.arange(len(symbols))
    r = records(x, ids, origins, TICK)
    r["ts_event"] += np.uint64(shift)
    r["ts_recv"] += np.uint64(shift)
    midnight = int(dt.datetime.combine(day, dt.time(), dt.UTC).timestamp()) * 1_000_000_000
    span = {"start_date": day, "end_date": day + dt.timedelta(days=1)}
    mappings = [SimpleNamespace(raw_symbol=s, intervals=[SimpleNamespace(symbol=str(n), **span)]) for s, n in zip(symbols, ids)]
    definitions = b"".join(
        bytes(
            dbn.InstrumentDefMsg(
                2,
                int(n),
                midnight + 7 * 3600 * 1_000_000_000 + int(n) * 1_000,
                midnight + 7 * 3600 * 1_000_000_000 + int(n) * 1_000 + 11_000,
                TICK,
                1_000_000_000,
                s,
                s,
                "CS",
                dbn.InstrumentClass("K"),
                dbn.SecurityUpdateAction("A"),
                min_lot_size_round_lot=100,
                currency="USD",
                exchange="XNAS",
                match_algorithm=dbn.MatchAlgorithm("F"),
            )
        )
        for s, n in zip(symbols, ids)
    )
    names = {}
    for kind, body in (("mbo", r.tobytes()), ("definition", definitions)):
        metadata = dbn.Metadata(
            DATASET,
            midnight,
            dbn.SType("raw_symbol"),
            dbn.SType("instrument_id"),
            dbn.Schema(kind),
            list(symbols),
            mappings=mappings,
            end=midnight + 86_400_000_000_000,
            version=dbn.DBN_VERSION,
        )
        names[kind] = f"xnas-itch-{day:%Y%m%d}.{kind}.dbn.zst"
        (out / names[kind]).write_bytes(zstandard.compress(metadata.encode() + body, 3))
    return names


def outcome(move: Floats, band: float) -> NDArray[np.int64]:
    """The class of a move of the mid (ticks): 0 down, 1 flat, 2 up."""
    return 1 + (move > band).astype(np.int64) - (move < -band)


def _walk_probability(steps: float, band: float) -> Floats:
    """P(down, flat, up) (3,) of a walk of half ticks with a Poisson number of `steps` on average, half of them up: exact."""
    n = np.arange(int(steps + 12 * np.sqrt(steps) + 30))
    one_way = np.exp(n * np.log(steps / 2) - steps / 2 - np.cumsum(np.log(np.maximum(n, 1))))
    move = np.arange(1 - len(n), len(n)) / 2
    return np.bincount(outcome(move, band), np.convolve(one_way, one_way[::-1]), 3)


def _oracle(
    plan: Plan, hidden: Hidden, chain: tuple[Floats, NDArray[np.int8]], out: NDArray[np.int64], mids: Floats
) -> dict[str, NDArray[Any]]:
    """Decision times x horizons of one session: what was, the oracle's view of the move ahead, and the move; prices in ticks."""
    parts: list[dict[str, NDArray[Any]]] = []
    for i in range(len(hidden.value)):
        mine = np.flatnonzero(out[:, WHOSE] == i)
        ts, mid = out[mine, RECV], mids[mine]
        for h, band in zip(HORIZONS_NS, BANDS):
            at = np.arange(int(2e9), out[-1, RECV] - h, int(SAMPLE_S * 1e9))
            grid = at // int(GRID_S * 1e9)
            now, then = (mid[np.searchsorted(ts, t, side="right") - 1] for t in (at, at + h))
            if plan.null:
                value, signals, mean = now, np.zeros((len(SIGNALS), len(at))), np.zeros((len(at), 1))
                variance = np.full(mean.shape, plan.null_steps * h / 4e9)
                p = np.tile(_walk_probability(plan.null_steps * h / 1e9, band), (len(at), 1))
            else:
                value, signals = hidden.value[i, grid] + 0.5, hidden.x[:, i, grid]
                mean, variance = forecast(plan, hidden, chain, i, grid, h / 1e9)
                mean = mean + (value - now)[:, None]
                spread = out[mine, SPREAD][np.searchsorted(ts, at, side="right") - 1]
                p = class_probability(mean, variance, *thresholds(plan, hidden.regime[grid], spread, band))
            view = {"mean": mean.mean(1), "sd": np.sqrt(variance.mean(1) + mean.var(1))} | dict(zip(("p_down", "p_flat", "p_up"), p.T))
            what = {"regime": hidden.regime[grid], **dict(zip(SIGNALS, signals)), "mid": now, "efficient": value}
            when = {"ts": at, "instrument": np.full(len(at), i), "horizon_ns": np.full(len(at), h)}
            parts.append(when | what | view | {"move": then - now, "outcome": outcome(then - now, band) - 1})
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def _log_loss(p: Floats, y: NDArray[np.int64]) -> Floats:
    return -np.log(p[np.arange(len(y)), y])


def _scores(table: dict[str, NDArray[Any]]) -> list[dict[str, Any]]:
    """The oracle's score per horizon beside that of the realised frequencies; the gain's standard error is over blocks of a minute."""
    scores = []
    for h, band in zip(HORIZONS_NS, BANDS):
        t = {name: column[table["horizon_ns"] == h] for name, column in table.items()}
        p, y = np.stack([t["p_down"], t["p_flat"], t["p_up"]], axis=1), t["outcome"] + 1
        share = np.bincount(y, minlength=3) / len(y)
        loss, plain = _log_loss(p, y), _log_loss(np.tile(share, (len(y), 1)), y)
        blocks = np.unique(t["ts"] // (60 * 10**9), return_inverse=True)[1]
        gain = np.bincount(blocks, plain - loss) / np.bincount(blocks)
        guess = p.argmax(1)
        f1 = [2 * np.sum((guess == c) & (y == c)) / max(np.sum(guess == c) + np.sum(y == c), 1) for c in range(3)]
        scores.append(
            {
                "horizon_ns": h,
                "band_ticks": band,
                "rows": len(y),
                "frequencies": share.tolist(),
                "log_loss": float(loss.mean()),
                "log_loss_frequencies": float(plain.mean()),
                "gain_standard_error": float(gain.std() / np.sqrt(len(gain))),
                "accuracy": float(np.mean(guess == y)),
                "macro_f1": float(np.mean(f1)),
            }
        )
    return scores


def _truth_table(t: dict[str, NDArray[Any]]) -> pa.Table:
    """The columns of `truth.parquet`: ts ns UTC; mid and efficient price in currency; mean, sd and move in ticks; outcome -1, 0, 1."""
    small = {"instrument": pa.uint16(), "session": pa.int16(), "regime": pa.int8(), "outcome": pa.int8()}
    prices = {name: (t["origin"] + t[name]) * TICK / 1e9 for name in ("mid", "efficient")}
    return pa.table({name: pa.array(prices.get(name, column), small.get(name)) for name, column in t.items() if name != "origin"})


def _write_truth(
    out: Path, made: dict[str, Any], plan: Plan, symbols: tuple[str, ...], sessions: list[dict[str, Any]], scores: list[dict[str, Any]]
) -> None:
    oracle = (
        "exact: the move is the difference of two Poisson counts of half ticks"
        if plan.null
        else "given the state at ts (efficient prices, signals, the echo on its way, regime, mid, spread) and one of "
        f"{FUTURES} sampled futures of the regime chain, V(ts + h) - mid(ts) is normal with mean and variance in closed form; the mid is "
        "beyond the band where the makers' rule has taken it there from the present spread and not back, by the reflection principle; "
        f"the probabilities are the mean over the futures, with {UNSURE:.0%} spread evenly. Nothing is fitted to this market"
    )
    names = [*(s[kind] for s in sessions for kind in ("mbo", "definition")), "truth.parquet", "alternative.parquet"]
    truth = {
        "made": made,
        "symbols": list(symbols),
        "session": SESSION,
        "tick": TICK / 1e9,
        "fee_per_share": FEE_PER_SHARE,
        "regimes": list(REGIMES),
        "flow": list(FLOW),
        "lags_ms": [1000 * lag for lag in plan.lags[: len(symbols)]] if not plan.null else None,
        "branching": plan.branching,
        "branching_radius": float(np.abs(np.linalg.eigvals(np.array(plan.branching))).max()),
        "informed_share": 0.0 if plan.null else plan.informed,
        "sessions": sessions,
        "table": "truth.parquet",
        "alternative": {
            "table": "alternative.parquet",
            "told": {name: {k: v for k, v in t._asdict().items() if k != "value"} for name, t in planted_altdata.PLANTED.items()},
            "moves": "nothing" if plan.null else "news and trend: the efficient price; volatility: the size of its moves",
            "noise": [name for name in altdata.NAMES if name not in planted_altdata.PLANTED],
        },
        "oracle": {"how": oracle, "classes": "up: move > band; down: move < -band; flat: else; ticks of the mid", "scores": scores},
        "sha256": {name: _sha256(out / name) for name in names},
    }
    (out / "truth.json").write_text(json.dumps(truth, indent=1))
