"""What the server knows of the node: the newest frame, its logs merged over time, and who is to be told of news.

:class:`Mirror` takes the link's messages; :class:`Client` is one listener, for which a bounded number of bytes may wait: who does not
keep up is cut off, and nobody waits for anybody. What many ask for is encoded once: a frame and a message for all clients, a list for all
requests until it changes.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

from cift_strategies.server.schemas import KEPT

WAITING: Final = 1 << 20  # bytes that may wait for one client, beside what the system holds for it
TOGETHER: Final = 20  # clients of a stream that are told in one go, and the next APART_S later: all at once, 200 hold a core for 2 ms
APART_S: Final = 0.001
FRESH_S: Final = 5.0  # a frame older than this is no sign of a living node
FRAME: Final = "frame"
NUMBERED: Final = ("decisions", "signals", "fills", "trades")  # logs whose entries have a seq

type Told = dict[str, Any]


def encode(value: Any) -> str:
    """JSON. Raises ValueError for NaN."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def framed(payload: bytes) -> bytes:
    """`payload` as a text message on a server's WebSocket (RFC 6455, 5.2: final, not masked)."""
    n = len(payload)
    if n < 126:
        return b"\x81%c" % n + payload
    return (b"\x81\x7e" + n.to_bytes(2) if n < 1 << 16 else b"\x81\x7f" + n.to_bytes(8)) + payload


class Client:
    """A listener of `wanted` symbols (None: all). `write` puts bytes on its connection at once, `waiting` tells how many it has not taken;
    where that are more than WAITING, `cut` is called, once, and nothing is written any more.
    """

    __slots__ = ("_cut", "_new", "_waiting", "_write", "seq", "slow", "wanted")

    def __init__(
        self, write: Callable[[bytes], object], waiting: Callable[[], int], cut: Callable[[], object], wanted: frozenset[str] | None = None
    ) -> None:
        self._write, self._waiting, self._cut, self.wanted = write, waiting, cut, wanted
        self._new: list[bytes] = []
        self.slow = False
        self.seq = 0

    def put(self, data: bytes) -> None:
        """Write framed messages. The first may be as long as it likes: what waited before it counts."""
        if self.slow:
            return
        if self._waiting() > WAITING:
            self.slow = True
            self._cut()
        else:
            self._write(data)

    def number(self, body: bytes) -> None:
        """Keep `body` (the members of a JSON object, without braces), with the next number of this client, until :meth:`flush`."""
        self.seq += 1
        self._new.append(framed(b'{"seq":%d,%b}' % (self.seq, body)))

    def flush(self) -> None:
        """Write what was numbered, in one piece."""
        if self._new:
            self.put(b"".join(self._new))
            self._new.clear()


class Mirror:
    """The node as last told. `frame` is the newest frame without its logs; None until there is one. `later(s, f)` calls `f` in `s` s."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, later: Callable[[float, Callable[[], None]], object] = lambda _, f: f()
    ) -> None:
        self._clock, self._later = clock, later
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
        self._texts: dict[str, dict[Any, str]] = {}  # name of a log, or FRAME -> what was asked of it -> JSON, until it changes
        self.frame_clients: set[Client] = set()
        self.prediction_clients: set[Client] = set()
        self._forget()

    def _forget(self) -> None:
        self.logs = {name: deque(maxlen=KEPT[name]) for name in ("regimes", "decisions", "signals", "fills", "trades", "weights")}
        self.orders, self.prices, self.pnl = {}, {}, {}
        self._texts.clear()
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
        self._flush()

    def done(self, result: Told) -> None:
        """The node has carried out a command; who asks next need not wait for the next frame to be told."""
        if self.frame is not None and "state" in result:
            self.frame["node"]["state"] = result["state"]
            self._texts.pop(FRAME, None)

    # --- what comes from the node -----------------------------------------------------------------------------------------------------

    def take(self, message: Told) -> None:
        """A frame, or a signal ahead of its frame."""
        if "signal" in message:
            if self.frame is not None:
                self._signals([message["signal"]])
                self._flush()
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
        self._texts.pop(FRAME, None)
        if message["info"] is not None:
            self.info = {x["symbol"]: x for x in message["info"]}
        self.weights = message["weights"] or self.weights
        self._merge(logs, message["kind"] == "snapshot")
        data = framed(text.encode())
        for client in self.frame_clients:
            client.put(data)
        if back:
            self._status()
        self._signals(logs.get("signals", ()))
        self._predictions(message["instruments"])
        self._flush()

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
            if new:
                self._texts.pop(name, None)
        if logs.get("orders"):
            self._texts.pop("orders", None)
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
        told = body.encode()
        for client in self.prediction_clients:
            if client.wanted is None or symbol in client.wanted:
                client.number(told)

    def _status(self) -> None:
        body = f'"type":"status","status":{encode(self.status())}'.encode()
        for client in self.prediction_clients:
            client.number(body)

    def _flush(self) -> None:
        self._some(list(self.prediction_clients))

    def _some(self, clients: list[Client]) -> None:
        """Tell a group, and leave the core to the node before the next."""
        for client in clients[:TOGETHER]:
            client.flush()
        if rest := clients[TOGETHER:]:
            self._later(APART_S, lambda: self._some(rest))

    # --- what is told -----------------------------------------------------------------------------------------------------------------

    def status(self) -> Told:
        """Whether the node is there, and what it does."""
        node = {} if self.frame is None else self.frame["node"]
        return {"connected": self.connected, "state": node.get("state"), "reason": node.get("reason", "")}

    def text(self, name: str, asked: Any, make: Callable[[], Any]) -> str:
        """JSON of what `make` gives, made once for each `asked` until the log `name`, or for FRAME the frame, has changed."""
        texts = self._texts.setdefault(name, {})
        if asked not in texts:
            texts[asked] = encode(make())
        return texts[asked]

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
