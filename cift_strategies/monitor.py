"""The monitor: an actor that tells what the others do, ten frames a second, and passes commands on to the node's controls.

It reads the state of features, inference and strategy when a frame is due and adds nothing to their work but a call per prediction and
signal. A frame is a plain dict of the form `server.schemas.Frame`; it goes to a link that takes it at once or drops it. What goes wrong
here is counted and logged once, and costs trading nothing. Add it last: it looks at what the strategy made of a prediction.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from nautilus_trader.common import DataActor, DataActorConfig
from nautilus_trader.model import ActorId, ClientOrderId

from catalog.errors import InputError
from catalog.events import SCALE
from cift_strategies.frames import MID, MS, Present, leading_horizon, number
from cift_strategies.messages import PREDICTIONS, SIGNALS, Prediction, Signal
from cift_strategies.server.schemas import EVERY_MS, KEPT, SCHEMA
from cift_strategies.timings import Timing
from cift_strategies.trail import Trail

if TYPE_CHECKING:
    from cift_strategies.system import System

SLOW: Final = 10  # frames from one point of the slow things (weights, PnL, kept prices) to the next


class Controls(Protocol):
    """What may be asked of a node, on its own loop."""

    def pause(self) -> Any: ...
    def resume(self) -> Any: ...
    def kill(self, reason: str) -> Any: ...
    def reload(self, path: Any) -> dict[str, Any] | Future[dict[str, Any]]: ...
    def status(self) -> dict[str, Any]: ...


class Sink(Protocol):
    """Where frames go: `server.link.Link`, or what a test puts in its place."""

    command: Callable[[str, dict[str, Any]], Any] | None
    fresh: bool
    dropped: int
    commands: int

    @property
    def connected(self) -> bool: ...
    @property
    def ready(self) -> bool: ...
    def send(self, message: dict[str, Any]) -> bool: ...
    def poll(self) -> None: ...
    def attach(self, loop: asyncio.AbstractEventLoop) -> None: ...
    def close(self) -> None: ...


def _harmless(callback: Callable[..., None]) -> Callable[..., None]:
    @wraps(callback)
    def call(self: Monitor, *args: Any) -> None:
        try:
            callback(self, *args)
        except Exception as error:
            self.errors += 1
            if self.first_error is None:
                self.first_error = error
                self.log.error(f"the monitor failed, trading goes on: {error!r} (said once)")

    return call


class Monitor(DataActor):
    """Tells of `system` through `link`; `controls` may be None, where nothing can be commanded (a backtest). `trail`: file of the
    structured log that follows events to orders; None: there is none."""

    def __new__(cls, *_args: Any, **_named: Any) -> Monitor:
        return super().__new__(cls)

    def __init__(
        self, system: System, controls: Controls | None, link: Sink, mode: str = "backtest", trail: Path | None = None
    ) -> None:  # fmt: skip
        super().__init__(DataActorConfig(actor_id=ActorId("CIFT-MONITOR")))
        self.system, self.controls, self.link = system, controls, link
        self.errors, self.first_error = 0, cast(Exception | None, None)
        self.run = f"{os.getpid():x}-{time.time_ns():x}"
        self.present = Present(system, mode)
        n = len(self.present.table)
        self.trail = None if trail is None else Trail(trail, n)
        self._at = {x.id: k for k, x in enumerate(self.present.table)}
        self._reasons: list[str] = [""] * n  # of the newest prediction
        self._times = [0] * n  # predictions since the last decision that was logged
        self._logged: list[str] = [""] * n
        self._regime: list[int] = [-2] * n
        self._price_ts = [0] * n
        self._kept_ts = [0] * n
        self._kept: dict[str, deque[Any]] = {name: deque(maxlen=size) for name, size in KEPT.items() if name not in ("prices", "pnl")}
        self._prices = [deque[tuple[int, float]](maxlen=KEPT["prices"]) for _ in range(n)]
        self._pnl = {c: deque[tuple[int, float]](maxlen=KEPT["pnl"]) for c in system.strategy.ledger.currencies}
        self._new: dict[str, list[Any]] = {name: [] for name in self._kept}
        self._new_pnl: dict[str, list[tuple[int, float]]] = {}
        self._serial: Counter[str] = Counter()
        self._open: dict[ClientOrderId, tuple[int, str, int, Any]] = {}
        self._orders: dict[str, dict[str, Any]] = {}  # id -> newest state, of the kept ones
        self._seen = {"orders": 0, "fills": 0, "trades": 0}
        self._timings = {stage: Timing() for stage in ("receipt", "prediction", "decision", "fill", "frame")}
        self._decided: dict[int, int] = {}  # trade -> when, until its first fill
        self._ticks = self._seq = 0  # frames that were due, and that were taken
        self._started = 0

    # --- what comes in ----------------------------------------------------------------------------------------------------------------

    def on_start(self) -> None:
        self.subscribe_topic(PREDICTIONS, self.on_prediction)
        self.subscribe_topic(SIGNALS, self.on_signal_message)
        self._started = self.now()
        self.link.command = self.on_command
        with contextlib.suppress(RuntimeError):  # no loop in a backtest
            self.link.attach(asyncio.get_running_loop())
        self.clock.set_timer_ns("monitor", EVERY_MS * MS, callback=self.on_frame)

    def now(self) -> int:
        """The stream's time, ns."""
        return self.system.strategy.now()

    @_harmless
    def on_prediction(self, message: object) -> None:
        p = cast(Prediction, message)
        k = p.instrument
        self.present.newest[k] = p
        self._reasons[k] = self.system.strategy.reason
        self._times[k] += 1
        self._timings["prediction"].add(p.latency_ns)
        if p.regime != self._regime[k]:
            self._regime[k] = p.regime
            self._log("regimes", {"ts": p.ts, "symbol": self.present.table[k].id, "regime": self.present.regime(p.regime)})
        if self._reasons[k] == "entered":
            self._decision(k)

    @_harmless
    def on_signal_message(self, message: object) -> None:
        s = cast(Signal, message)
        trade = self.system.strategy.signals - 1
        self._decided[trade] = s.ts
        self._timings["decision"].add(s.ts - s.predicted_at)
        told = self._log("signals", {
            "seq": self._next("signals"), "ts": s.ts, "symbol": self.present.table[s.instrument].id, "trade": trade,
            "predicted_at": s.predicted_at, "latency_ms": (s.ts - s.predicted_at) / MS, "side": s.side, "size": s.size / SCALE,
            "horizon_ms": s.horizon_ns // MS, "expected_ticks": number(s.expected_ticks), "cost_ticks": number(s.cost_ticks),
            "confidence": number(s.confidence), "regime": self.present.regime(s.regime), "limit": s.limit / SCALE,
            "stop": s.stop / SCALE, "target": s.target / SCALE,
        })  # fmt: skip
        self.link.send({"signal": told})
        under_way = self.system.strategy.trades[s.instrument]
        if self.trail is not None and under_way is not None:  # its orders are the newest
            self.trail.signal(s.instrument, told, len(self.system.strategy.orders) - len(under_way.ids))

    def on_command(self, name: str, args: Mapping[str, Any]) -> Any:
        """Run a command of the server on the node's controls. Raises InputError for one that there is not."""
        if self.controls is None:
            raise InputError("this run takes no commands: it is no live node")
        if name == "pause":
            self.controls.pause()
        elif name == "resume":
            self.controls.resume()
        elif name == "kill":
            self.controls.kill(str(args.get("reason") or "by command"))
        elif name == "reload":
            return self.controls.reload(args["path"])
        else:
            raise InputError(f'there is no command "{name}"')
        return {"state": self.controls.status().get("state", "running")}

    def on_stop(self) -> None:
        """The last frame; nobody answers commands from here on."""
        self.on_frame(None)
        self.link.close()

    # --- frames -----------------------------------------------------------------------------------------------------------------------

    @_harmless
    def on_frame(self, _event: Any) -> None:
        began = time.perf_counter_ns()
        self._ticks += 1
        self._collect()
        self.link.poll()
        if self.link.ready:
            whole = self.link.fresh or any(len(new) > KEPT[name] for name, new in self._new.items())
            if self.link.send(self.frame(whole)):
                self.link.fresh = False
                self._seq += 1
                self._told()
        elif self.link.connected:
            self.link.dropped += 1
        self._timings["frame"].add(time.perf_counter_ns() - began)

    def frame(self, whole: bool) -> dict[str, Any]:
        """The present state with what is new in the logs; `whole`: a snapshot, with all that is kept."""
        now, status, present = self.now(), {} if self.controls is None else self.controls.status(), self.present
        every = range(len(present.table))
        positions, instruments = [present.position(k) for k in every], [present.instrument(k, now) for k in every]
        counts = {"frames_dropped": self.link.dropped, "commands": self.link.commands, "monitor_errors": self.errors}
        timings = {**self._timings, **getattr(self.system.inference.predictor, "timings", {}), **status.get("timings", {})}
        return {
            "kind": "snapshot" if whole else "frame", "schema_version": SCHEMA, "run": self.run, "seq": self._seq + 1, "ts": now,
            "node": present.node(status, self._started, counts), "instruments": instruments, "positions": positions,
            "pnl": present.sums(positions), "latency": [t.told(stage) for stage, t in timings.items() if t.count],
            "feeds": present.feeds(status, now), "models": present.models(status),
            "info": [present.info(k) for k in every] if whole else None,
            "weights": present.weights() if whole or self._ticks % SLOW == 0 else None,
            "logs": self._kept_logs() if whole else self._new_logs(instruments),
        }  # fmt: skip

    def _kept_logs(self) -> dict[str, Any]:
        return {
            **{name: list(kept) for name, kept in self._kept.items()}, "orders": list(self._orders.values()),
            "prices": {x.id: list(p) for x, p in zip(self.present.table, self._prices) if p},
            "pnl": {c: list(p) for c, p in self._pnl.items()},
        }  # fmt: skip

    def _new_logs(self, instruments: list[dict[str, Any]]) -> dict[str, Any]:
        logs: dict[str, Any] = {name: new for name, new in self._new.items() if new}
        if "orders" in logs:
            logs["orders"] = list({o["id"]: o for o in logs["orders"]}.values())
        return logs | {"prices": self._moved(instruments), "pnl": self._new_pnl}

    def _log(self, name: str, entry: dict[str, Any]) -> dict[str, Any]:
        self._kept[name].append(entry)
        if len(self._new[name]) <= KEPT[name]:  # beyond that the next frame is a snapshot
            self._new[name].append(entry)
        return entry

    def _next(self, name: str) -> int:
        self._serial[name] += 1
        return self._serial[name]

    def _told(self) -> None:
        for new in self._new.values():
            new.clear()
        self._new_pnl = {}

    def _collect(self) -> None:
        """Bring the logs up to date."""
        strategy = self.system.strategy
        for k, p in enumerate(self.present.newest):
            if p is not None and self._times[k] and self._reasons[k] != self._logged[k]:
                self._decision(k)
        self._collect_orders()
        for row in strategy.fills[self._seen["fills"] :]:
            ts, symbol, order, trade, role, side, price, size, fee, currency, liquidity, mid = row[:12]
            if (decided := self._decided.pop(trade, None)) is not None:
                self._timings["fill"].add(ts - decided)
            told = self._log("fills", {
                "seq": self._next("fills"), "ts": ts, "symbol": symbol, "order": order, "trade": trade if trade >= 0 else None,
                "role": role, "side": side, "price": price, "size": size, "fee": fee, "currency": currency, "liquidity": liquidity,
                "mid": number(mid),
            })  # fmt: skip
            if self.trail is not None:
                self.trail.fill(self._at[symbol], told)
        for row in strategy.positions[self._seen["trades"] :]:
            n, symbol, opened, closed, side, size, entry, leaving, gross, fees, net, currency, horizon, regime = row[:14]
            told = self._log("trades", {
                "seq": self._next("trades"), "number": n, "symbol": symbol, "opened": opened, "closed": closed, "side": side, "size": size,
                "entry": entry, "exit": leaving, "gross": gross, "fees": fees, "net": net, "currency": currency,
                "horizon_ms": horizon // MS, "regime": self.present.regime(regime), "closed_by": row[17],
            })  # fmt: skip
            if self.trail is not None:
                self.trail.closed(self._at[symbol], told)
        self._seen["fills"], self._seen["trades"] = len(strategy.fills), len(strategy.positions)
        for k, vector in enumerate(strategy.last):
            if vector is not None and vector.ts - self._kept_ts[k] >= SLOW * EVERY_MS * MS:
                mid = float(vector.rows[-1, MID])
                if mid == mid:
                    self._kept_ts[k] = vector.ts
                    self._prices[k].append((vector.ts, mid))
        if (newest := self.present.leading()) is not None:
            self._timings["receipt"].add(max(0, newest.ts - int(newest.events["ts_event"][-1])))
        if self.trail is not None:
            self.trail.flush()
        if self._ticks % SLOW == 0:
            self._collect_slow()

    def _collect_slow(self) -> None:
        now = self.now()
        for sums in self.present.sums([self.present.position(k) for k in range(len(self.present.table))]):
            point = (now, sums["net"])
            self._pnl[sums["currency"]].append(point)
            self._new_pnl.setdefault(sums["currency"], []).append(point)
            del self._new_pnl[sums["currency"]][: -KEPT["pnl"]]
        weights = self.present.weights_now()
        if weights is not None:
            regime = Counter(r for r in self._regime if r >= 0).most_common(1)
            at = regime[0][0] if regime else len(weights) - 1
            name = self.present.regime(at) or "unknown"
            self._log("weights", {"ts": now, "regime": name, "values": weights[at].mean(axis=0).round(5).tolist()})

    def _collect_orders(self) -> None:
        orders = self.system.strategy.orders
        more = len(orders) - self._seen["orders"]
        for (order_id, (k, role, n)), _ in zip(reversed(orders.items()), range(more)):
            self._open[order_id] = (k, role, n, None)
        self._seen["orders"] = len(orders)
        for order_id, (k, role, n, was) in sorted(self._open.items(), key=lambda item: item[1][2]):
            order = self.cache.order(order_id)
            if order is None:
                continue
            state = (order.status, order.filled_qty, order.ts_last)
            if state == was:
                continue
            self._open[order_id] = (k, role, n, state)
            price, trigger = getattr(order, "price", None), getattr(order, "trigger_price", None)
            told = self._log("orders", {
                "id": str(order_id), "number": n, "symbol": self.present.table[k].id, "role": role, "side": 1 if order.is_buy else -1,
                "type": _plain(order.order_type), "status": _plain(order.status), "size": order.quantity.as_double(),
                "filled": order.filled_qty.as_double(), "price": None if price is None else price.as_double(),
                "trigger": None if trigger is None else trigger.as_double(), "ts": self.system.strategy.stamp(order.ts_last),
                "open": not order.is_closed,
            })  # fmt: skip
            if self.trail is not None:
                self.trail.order(k, told)
            self._orders.pop(told["id"], None)
            self._orders[told["id"]] = told
            if order.is_closed:
                del self._open[order_id]
        while len(self._orders) > KEPT["orders"]:
            del self._orders[next(iter(self._orders))]

    def _decision(self, k: int) -> None:
        p, reason = cast(Prediction, self.present.newest[k]), self._reasons[k] or "declined"
        h = leading_horizon(p)
        action = {"entered": "enter", "in a position": "hold"}.get(reason, "none")
        if h is None:
            text = "nobody votes: no trade"
        else:
            up, down, voting = (int(v[h]) for v in self.present.tilts(p))
            side = p.direction[h] or (1 if p.proba[h, 2] >= p.proba[h, 0] else -1)
            agree, way = (up, "up") if side > 0 else (down, "down")
            why = {"enter": f"enter {'long' if side > 0 else 'short'}", "hold": "in a position: hold"}.get(action, f"{reason}: no trade")
            text = f"{agree} of {voting} {way}, confidence {p.confidence[h]:.2f}, {why}"
        self.present.words[k], self._logged[k] = text, self._reasons[k]
        self._log("decisions", {
            "seq": self._next("decisions"), "ts": p.due, "symbol": self.present.table[k].id, "action": action, "reason": reason,
            "text": text, "horizon_ms": None if h is None else p.horizons_ns[h] // MS,
            "confidence": None if h is None else number(p.confidence[h]),
            "times": self._times[k],
        })  # fmt: skip
        self._times[k] = 0

    def _moved(self, instruments: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
        found = {}
        for k, x in enumerate(instruments):
            if x["ts"] is not None and x["ts"] > self._price_ts[k] and x["mid"] is not None:
                self._price_ts[k] = x["ts"]
                found[x["symbol"]] = [(x["ts"], x["mid"])]
        return found


def _plain(value: Any) -> str:
    """A name of one of Nautilus's enums, without its type."""
    return str(value).rsplit(".", 1)[-1]


__all__ = ["Controls", "Monitor", "Sink"]
