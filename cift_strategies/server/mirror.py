"""What the server knows of the node: the newest frame, its logs merged over time, and who is to be told of news.

:class:`Mirror` takes the link's messages; :class:`Client` is one listener with a bounded queue: who does not keep up is cut off, and nobody
waits for anybody.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

from cift_strategies.server.schemas import KEPT

QUEUE: Final = 128  # messages that may wait for one client
FRESH_S: Final = 5.0  # a frame older than this is no sign of a living node
NUMBERED: Final = ("decisions", "signals", "fills", "trades")  # logs whose entries have a seq

type Told = dict[str, Any]


def encode(value: Any) -> str:
    """JSON. Raises ValueError for NaN."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


class Client:
    """A listener of `wanted` symbols (None: all) with its queue; `slow` is set once it has been overrun."""

    __slots__ = ("queue", "seq", "slow", "wanted")

    def __init__(self, wanted: frozenset[str] | None = None) -> None:
        self.wanted = wanted
        self.queue: asyncio.Queue[str] = asyncio.Queue(QUEUE)
        self.slow = asyncio.Event()
        self.seq = 0

    def put(self, text: str) -> None:
        if self.slow.is_set():
            return
        try:
            self.queue.put_nowait(text)
        except asyncio.QueueFull:
            self.slow.set()

    def number(self, body: str) -> None:
        """Put `body` (the members of a JSON object, without braces) with the next number of this client."""
        self.seq += 1
        self.put(f'{{"seq":{self.seq},{body}}}')


class Mirror:
    """The node as last told. `frame` is the newest frame without its logs; None until there is one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.frame: Told | None = None
        self.info: dict[str, Told] = {}  # symbol -> InstrumentInfo
        self.weights: Told | None = None
        self.arrived = -float("inf")  # clock time of the newest frame
        self.connected = False
        self.frames = self.faulty = self.cut = 0
        self.logs: dict[str, deque[Told]] = {}
        self.orders: dict[str, Told] = {}
        self.prices: dict[str, deque[Any]] = {}
        self.pnl: dict[str, deque[Any]] = {}
        self.frame_clients: set[Client] = set()
        self.prediction_clients: set[Client] = set()
        self._forget()

    def _forget(self) -> None:
        self.logs = {name: deque(maxlen=KEPT[name]) for name in ("regimes", "decisions", "signals", "fills", "trades", "weights")}
        self.orders, self.prices, self.pnl = {}, {}, {}
        self._serial = dict.fromkeys(NUMBERED, 0)
        self._predicted: dict[str, int] = {}

    @property
    def age_s(self) -> float:
        """Since the newest frame came; infinite before the first."""
        return self._clock() - self.arrived

    @property
    def fresh(self) -> bool:
        return self.connected and self.age_s < FRESH_S

    def gone(self) -> None:
        """The link was lost."""
        self.connected = False
        self._status()

    # --- what comes from the node -----------------------------------------------------------------------------------------------------

    def take(self, message: Told) -> None:
        """A frame, or a signal ahead of its frame."""
        if "signal" in message:
            if self.frame is not None:
                self._signals([message["signal"]])
            return
        try:
            text = encode(message)
        except ValueError:
            self.faulty += 1
            return
        before = self.frame
        if before is not None and before["run"] != message["run"]:
            self._forget()
        if before is None and message["kind"] != "snapshot":
            return
        back = not self.fresh
        self.arrived, self.connected = self._clock(), True
        self.frames += 1
        logs = message.pop("logs")
        self.frame = message
        if message["info"] is not None:
            self.info = {x["symbol"]: x for x in message["info"]}
        self.weights = message["weights"] or self.weights
        self._merge(logs, message["kind"] == "snapshot")
        for client in self.frame_clients:
            client.put(text)
        if back:
            self._status()
        self._signals(logs.get("signals", ()))
        self._predictions(message["instruments"])

    def _merge(self, logs: Told, whole: bool) -> None:
        for name, kept in self.logs.items():
            new = logs.get(name, ())
            if name == "signals":
                continue
            if name in NUMBERED:
                new = [x for x in new if x["seq"] > self._serial[name]]
                self._serial[name] = new[-1]["seq"] if new else self._serial[name]
            elif whole and new:
                kept.clear()
            kept.extend(new)
        for order in logs.get("orders", ()):
            self.orders.pop(order["id"], None)
            self.orders[order["id"]] = order
        while len(self.orders) > KEPT["orders"]:
            del self.orders[next(iter(self.orders))]
        for held, new, most in ((self.prices, logs.get("prices", {}), KEPT["prices"]), (self.pnl, logs.get("pnl", {}), KEPT["pnl"])):
            for name, points in new.items():
                line = held.setdefault(name, deque(maxlen=most))
                last = line[-1][0] if line else 0
                line.extend(p for p in points if p[0] > last)

    def _signals(self, signals: Iterable[Told]) -> None:
        for signal in signals:
            if signal["seq"] > self._serial["signals"]:
                self._serial["signals"] = signal["seq"]
                self.logs["signals"].append(signal)
                self._tell(signal["symbol"], f'"type":"signal","signal":{encode(signal)}')

    def _predictions(self, instruments: list[Told]) -> None:
        for x in instruments:
            p = x["prediction"]
            if p is not None and p["ts"] != self._predicted.get(x["symbol"]):
                self._predicted[x["symbol"]] = p["ts"]
                if self.prediction_clients:
                    self._tell(x["symbol"], f'"type":"prediction","prediction":{encode(p)}')

    def _tell(self, symbol: str, body: str) -> None:
        for client in self.prediction_clients:
            if client.wanted is None or symbol in client.wanted:
                client.number(body)

    def _status(self) -> None:
        body = f'"type":"status","status":{encode(self.status())}'
        for client in self.prediction_clients:
            client.number(body)

    # --- what is told -----------------------------------------------------------------------------------------------------------------

    def status(self) -> Told:
        """Whether the node is there, and what it does."""
        node = {} if self.frame is None else self.frame["node"]
        return {"connected": self.connected, "state": node.get("state"), "reason": node.get("reason", "")}

    def snapshot(self) -> Told | None:
        """The newest frame as a snapshot, with all logs."""
        if self.frame is None:
            return None
        logs: Told = {name: list(kept) for name, kept in self.logs.items()}
        logs["orders"] = list(self.orders.values())
        logs["prices"] = {k: list(v) for k, v in self.prices.items()}
        logs["pnl"] = {k: list(v) for k, v in self.pnl.items()}
        return {**self.frame, "kind": "snapshot", "info": list(self.info.values()), "weights": self.weights, "logs": logs}

    def predictions(self, wanted: frozenset[str] | None) -> Told:
        """How a stream of predictions begins."""
        instruments = [] if self.frame is None else self.frame["instruments"]
        mine = [x for x in instruments if wanted is None or x["symbol"] in wanted]
        signals = [s for s in self.logs["signals"] if wanted is None or s["symbol"] in wanted]
        return {
            "run": None if self.frame is None else self.frame["run"], "ts": None if self.frame is None else self.frame["ts"],
            "symbols": [x["symbol"] for x in mine], "predictions": [x["prediction"] for x in mine if x["prediction"] is not None],
            "signals": signals[-100:], "status": self.status(),
        }  # fmt: skip
