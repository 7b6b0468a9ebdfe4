"""A finished run on the page of a live node: its output folder as one frame, told to a server for as long as somebody looks.

The page shows what the run left: prices with fills, regimes, the last votes, weights, positions, profit, latency, trades and the newest
decisions. A book and orders at work are of the moment, so there are none; commands are refused.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq

from catalog.errors import InputError
from cift_models.windows import HORIZONS_NS
from cift_strategies.finished import HORIZONS, Finished
from cift_strategies.server.schemas import KEPT, SCHEMA
from cift_strategies.timings import BOUNDS_MS, QUANTILES

MS: Final = 1_000_000
EVERY_S: Final = 1.0  # between two signs of life
DECISIONS: Final = 200  # newest predictions that are told as decisions


def frame(folder: Path) -> dict[str, Any]:
    """The run in the output folder `folder` as a snapshot of the form `server.schemas.Frame`. Raises InputError for an unfinished one."""
    done = Finished.read(folder)
    summary, ids = done.summary, list(done.facts["instruments"])
    last = _newest(folder, ids)
    positions = [_position(done, x) for x in ids]
    latency = done.curve("latency")[1]
    regret = summary.get("regret") or {}
    members = list(regret.get("members") or [])
    weights = np.array(regret.get("weights") or [], np.float64)
    names = list(done.facts["regime_names"])
    equity = done.equity("ensemble")
    net = float(equity[1][-1]) if len(equity[1]) else 0.0
    fees = sum(p["fees"] for p in positions)
    declined = {k: int(v) for k, v in (summary.get("decisions") or {}).items() if k != "entered"}
    return {
        "kind": "snapshot", "schema_version": SCHEMA, "run": str(summary["digest"])[:16], "seq": 1, "ts": int(summary["end"]),
        "node": {
            "state": "finished", "reason": f"backtest of {summary['source']}", "mode": "backtest", "venue": "", "speed": 1.0,
            "started": int(summary["start"]), "declined": declined,
            "counts": {
                "events": int(summary.get("events_streamed", 0)), "vectors": int(summary.get("feature_vectors", 0)),
                "predictions": int(summary["predictions"]), "signals": int((summary.get("decisions") or {}).get("entered", 0)),
                "orders": int(summary["orders"]), "fills": int(summary["fills"]),
                "callback_errors": int(summary.get("callback_errors", 0)),
            },
        },
        "instruments": [_instrument(done, x, last.get(x), names, members) for x in ids],
        "positions": positions,
        "pnl": [{
            "currency": done.currency, "net": net, "realised": net + fees, "unrealised": 0.0, "fees": fees,
            "drawdown": _drawdown(equity[1]),
            "max_drawdown": float(done.money(summary["max_drawdown"])), "capital": float(done.facts["config"]["limits"]["capital"]),
        }],
        "latency": [_stage("prediction", latency)] if len(latency) else [],
        "feeds": [{
            "name": str(summary["source"]), "connected": True, "age_ms": None, "lag_ms": None, "events": int(summary.get("events", 0)),
            "reconnects": 0, "gaps": 0, "errors": 0,
            "note": ", ".join(f"{n:,} {kind}" for kind, n in (summary.get("data_quality") or {}).items()),
        }],
        "models": {
            "version": str(summary["model_version"]), "horizons_ms": [n // MS for n in HORIZONS_NS], "regimes": names,
            "members": [{"member": m, "present": bool(np.any(_awake(regret, m))), "failures": 0, "late": 0} for m in members],
            "path": None, "reloads": 0, "reload_error": "",
        },
        "info": [_info(done, x) for x in ids],
        "weights": None if not weights.size else {
            "regimes": [*names, "unknown"], "horizons_ms": [n // MS for n in HORIZONS_NS], "members": members, "values": weights.tolist(),
        },
        "logs": _logs(done, ids, names),
    }  # fmt: skip


def serve(folder: Path, port: int = 8765) -> None:
    """Show `folder` at `port` until Ctrl-C. Raises InputError where the port is taken or the run unfinished."""
    from cift_strategies.server.link import Link
    from cift_strategies.server.supervisor import Supervisor

    whole = frame(folder)
    with tempfile.TemporaryDirectory(prefix="cift-show-") as place:
        link = Link(Path(place) / "link.sock", _refuse)
        server = Supervisor(link, Path(place), port, say=lambda line: print(line, file=sys.stderr))
        ended = threading.Event()
        telling = threading.Thread(target=_tell, args=(link, whole, ended), daemon=True)
        telling.start()
        try:
            print(f"{folder}: {server.start()['url']}; Ctrl-C ends it", file=sys.stderr)
            with contextlib.suppress(KeyboardInterrupt):
                ended.wait()
        finally:
            ended.set()
            telling.join()
            server.stop()
            link.close()


def _tell(link: Any, whole: dict[str, Any], ended: threading.Event) -> None:
    """The snapshot to every server that connects, then a sign of life from time to time."""
    alive = {**whole, "kind": "frame", "info": None, "weights": None, "logs": {}}
    seq, since = 1, 0.0
    while not ended.wait(0.05):
        link.poll()
        since += 0.05
        if link.ready and link.fresh:
            seq += 1
            link.fresh = not link.send({**whole, "seq": seq})
        elif link.ready and since >= EVERY_S:
            seq, since = seq + 1, 0.0
            link.send({**alive, "seq": seq})


def _refuse(_name: str, _args: dict[str, Any]) -> dict[str, Any]:
    raise InputError("this is a finished backtest: there is nothing to command")


def _info(done: Finished, name: str) -> dict[str, Any]:
    told = done.facts["instruments"][name]
    return {
        "symbol": name, "kind": str(told.get("kind", "")), "currency": told["currency"], "tick": told["tick"], "lot": 1.0,
        "multiplier": 1.0, "price_precision": int(told["decimals"]), "size_precision": 0, "level": 0,
    }  # fmt: skip


def _instrument(done: Finished, name: str, row: dict[str, Any] | None, regimes: list[str], members: list[str]) -> dict[str, Any]:
    ts, mid = done.curve("mid", name)
    told: dict[str, Any] = {
        "symbol": name, "ts": int(ts[-1]) if len(ts) else None, "age_ms": None, "events": 0,
        "mid": float(mid[-1]) if len(mid) else None, "spread_ticks": None, "bids": [], "asks": [], "regime": None, "prediction": None,
        "decision": "",
    }  # fmt: skip
    if row is not None:
        told["regime"] = regimes[row["regime"]] if 0 <= row["regime"] < len(regimes) else None
        told["prediction"] = {
            "symbol": name, "ts": row["ts"].value, "latency_ms": row["latency_ns"] / MS, "regime": told["regime"],
            "model_version": str(done.summary["model_version"]), "horizons": _horizons(row, members),
        }  # fmt: skip
    return told


def _horizons(row: dict[str, Any], members: list[str]) -> list[dict[str, Any]]:
    votes = np.array(row["votes"], np.float64).reshape(-1, len(HORIZONS), 3)
    found = []
    for h, label in enumerate(HORIZONS):
        proba = _vote([row[f"p_{way}_{label}"] for way in ("down", "flat", "up")])
        lead = votes[:, h, 2] - votes[:, h, 0]
        found.append({
            "horizon_ms": HORIZONS_NS[h] // MS, "direction": int(row[f"direction_{label}"]), "proba": proba,
            "confidence": _number(row[f"confidence_{label}"]), "magnitude_ticks": _number(row[f"magnitude_{label}"]),
            "up": int((lead > 0).sum()), "down": int((lead < 0).sum()), "voting": int(np.isfinite(lead).sum()),
            "votes": {name: _vote(v.tolist()) for name, v in zip(members, votes[:, h])},
        })  # fmt: skip
    return found


def _vote(proba: list[float]) -> list[float] | None:
    return [round(float(v), 4) for v in proba] if all(v == v for v in proba) else None


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _newest(folder: Path, ids: list[str]) -> dict[str, dict[str, Any]]:
    """The last prediction of each instrument."""
    found: dict[str, dict[str, Any]] = {}
    file = pq.ParquetFile(folder / "predictions.parquet")
    for group in reversed(range(file.num_row_groups)):
        rows = file.read_row_group(group)
        names = np.asarray(rows["instrument"].cast("string").to_pylist(), object)
        for name in ids:
            if name not in found and len(at := np.flatnonzero(names == name)):
                found[name] = rows.slice(int(at[-1]), 1).to_pylist()[0]
        if len(found) == len(ids):
            break
    return found


def _position(done: Finished, name: str) -> dict[str, Any]:
    c = done.positions
    mine = np.asarray(c["instrument"]) == name
    gross, fees = float(np.asarray(c["gross"])[mine].sum()), float(np.asarray(c["fees"])[mine].sum())
    currency = done.facts["instruments"][name]["currency"]
    return {
        "symbol": name, "size": 0.0, "average": None, "unrealised": 0.0, "realised": gross, "fees": fees, "net": gross - fees,
        "currency": currency, "trade": None, "entry_side": 0, "limit": None, "stop": None, "target": None, "until": None, "leaving": "",
    }  # fmt: skip


def _drawdown(pnl: Any) -> float:
    return float(max(0.0, pnl.max() - pnl[-1])) if len(pnl) else 0.0


def _stage(name: str, ms: Any) -> dict[str, Any]:
    return {
        "stage": name, "count": len(ms), "sum_ms": float(ms.sum()),
        **{f"{which}_ms": float(np.quantile(ms, q)) for which, q in QUANTILES}, "max_ms": float(ms.max()),
        "buckets": [int((ms <= b).sum()) for b in BOUNDS_MS],
    }  # fmt: skip


def _awake(regret: Any, member: str) -> Any:
    """How many decisions the member voted on, by regime and horizon."""
    awake = np.array(regret.get("awake") or [], np.float64)
    return awake[..., regret["members"].index(member)] if awake.size else np.zeros(1)


def _thin(ts: Any, value: Any, most: int) -> list[tuple[int, float]]:
    at = np.unique(np.linspace(0, len(ts) - 1, min(len(ts), most)).astype(np.int64)) if len(ts) else np.zeros(0, np.int64)
    return [(int(t), float(v)) for t, v in zip(ts[at], value[at]) if np.isfinite(v)]


def _logs(done: Finished, ids: list[str], names: list[str]) -> dict[str, Any]:
    fills = pq.read_table(done.folder / "fills.parquet").to_pylist()[-KEPT["fills"] :]
    trades = pq.read_table(done.folder / "positions.parquet").to_pylist()[-KEPT["trades"] :]
    changes = sorted((int(t), x, int(v)) for x in ids for t, v in zip(*done.curve("regime", x)))[-KEPT["regimes"] :]
    told = (done.summary.get("diagnostics") or {}).get("weights") or {}
    return {
        "prices": {x: _thin(*done.curve("mid", x), KEPT["prices"]) for x in ids},
        "pnl": {done.currency: _thin(*done.equity("ensemble"), KEPT["pnl"])},
        "weights": [
            {"ts": t, "regime": "all", "values": np.mean(w, axis=0).round(5).tolist()}
            for t, w in zip(told.get("ts") or (), told.get("weights") or ())
        ],
        "regimes": [{"ts": t, "symbol": x, "regime": names[v] if 0 <= v < len(names) else None} for t, x, v in changes],
        "fills": [
            {
                "seq": i + 1, "ts": f["ts"].value, "symbol": f["instrument"], "order": f["order"],
                "trade": f["position"] if f["position"] >= 0 else None, "role": f["role"], "side": f["side"], "price": f["price"],
                "size": f["size"], "fee": f["fee"], "currency": f["currency"], "liquidity": f["liquidity"], "mid": _number(f["mid"]),
            }
            for i, f in enumerate(fills)
        ],
        "trades": [
            {
                "seq": i + 1, "number": t["position"], "symbol": t["instrument"], "opened": t["opened"].value, "closed": t["closed"].value,
                "side": t["side"], "size": t["size"], "entry": t["entry"], "exit": t["exit"], "gross": t["gross"], "fees": t["fees"],
                "net": t["net"], "currency": t["currency"], "horizon_ms": t["horizon_ns"] // MS,
                "regime": names[t["regime"]] if 0 <= t["regime"] < len(names) else None, "closed_by": t["closed_by"],
            }
            for i, t in enumerate(trades)
        ],
        "decisions": [
            {
                "seq": i + 1, "ts": t["opened"].value, "symbol": t["instrument"], "action": "enter", "reason": "entered",
                "text": f"{'buy' if t['side'] > 0 else 'sell'} {t['size']:g}, expected {t['expected_ticks']:.2f} ticks at a cost of "
                f"{t['cost_ticks']:.2f}, confidence {t['confidence']:.2f}: closed by {t['closed_by']}, net {t['net']:+.2f}",
                "horizon_ms": t["horizon_ns"] // MS, "confidence": t["confidence"], "times": 1,
            }
            for i, t in enumerate(sorted(trades[-DECISIONS:], key=lambda t: t["opened"]))
        ],
    }  # fmt: skip
