"""Prometheus metrics of the node, as last told, and of this server. Names begin with cift_ and end in their unit; counters in _total."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily, Metric

from cift_strategies.server.guard import App, Receive, Scope, Send
from cift_strategies.server.mirror import Mirror
from cift_strategies.timings import BOUNDS_MS

STATES: Final = ("starting", "running", "paused", "killed", "stopping", "finished")
COUNTS: Final = {  # of the node's counts: metric, help
    "events": ("cift_events", "Market events processed"),
    "vectors": ("cift_feature_vectors", "Feature rows computed"),
    "predictions": ("cift_predictions", "Predictions delivered"),
    "skipped": ("cift_predictions_skipped", "Predictions superseded before they were delivered"),
    "lost": ("cift_events_lost", "Events that found no room on the way to the models"),
    "signals": ("cift_signals", "Entries decided on"),
    "orders": ("cift_orders", "Orders made"),
    "fills": ("cift_fills", "Fills"),
    "rejects": ("cift_order_rejects", "Orders rejected or denied"),
    "callback_errors": ("cift_callback_errors", "Exceptions in callbacks"),
    "frames_dropped": ("cift_frames_dropped", "Frames that the server did not take in time"),
    "commands": ("cift_commands", "Commands received"),
    "kills": ("cift_kills", "Times the kill switch was used"),
    "monitor_errors": ("cift_monitor_errors", "Failures of the monitor"),
}
REQUESTS_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0)


class Metrics:
    """Collects from `mirror` when it is scraped; :meth:`meter` wraps the app to count requests."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._requests = Counter("cift_server_requests", "Requests answered", ("method", "route", "status"), registry=self._registry)
        self._took = Histogram(
            "cift_server_request_duration_seconds", "Time to answer", ("route",), buckets=REQUESTS_S, registry=self._registry
        )

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)

    def meter(self, app: App) -> App:
        async def metered(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            began, status = time.perf_counter(), 0

            async def watch(message: dict[str, Any]) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await app(scope, receive, watch)
            finally:
                route = getattr(scope.get("route"), "path", "other")
                self._requests.labels(scope["method"] if route != "other" else "", route, str(status)).inc()
                self._took.labels(route).observe(time.perf_counter() - began)

        return metered

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        m = self._mirror
        yield _gauge("cift_node_connected", "Whether the node is there", 1.0 if m.connected else 0.0)
        yield _gauge("cift_server_stream_clients", "WebSocket clients", len(m.frame_clients) + len(m.prediction_clients))
        yield _counter("cift_server_stream_clients_cut", "WebSocket clients cut off because they were too slow", m.cut)
        yield _counter("cift_server_frames", "Frames received", m.frames)
        yield _counter("cift_server_frames_faulty", "Frames that could not be passed on", m.faulty)
        if m.frame is None:
            return
        yield _gauge("cift_frame_age_seconds", "Since the newest frame came", m.age_s)
        yield from self._node(m.frame)
        yield from self._inference(m.frame)
        yield from self._money(m.frame)
        yield from self._feeds(m.frame)

    def _node(self, frame: dict[str, Any]) -> Iterator[Metric]:
        node = frame["node"]
        for name, value in node["counts"].items():
            if name in COUNTS:
                yield _counter(*COUNTS[name], value)
        yield _gauge("cift_inference_queue_events", "Events that wait for the models", node["counts"].get("queue", 0))
        yield _labelled(
            GaugeMetricFamily("cift_node_state", "1 for the state that the node is in", labels=["state"]),
            {(s,): float(s == node["state"]) for s in STATES},
        )
        yield _labelled(
            CounterMetricFamily("cift_decisions_declined", "Predictions not traded", labels=["reason"]),
            {(reason,): n for reason, n in node["declined"].items()},
        )
        stages = HistogramMetricFamily("cift_stage_latency_seconds", "How long each stage takes", labels=["stage"])
        for s in frame["latency"]:
            buckets = [(repr(b / 1e3), float(n)) for b, n in zip(BOUNDS_MS, s["buckets"])]
            stages.add_metric([s["stage"]], [*buckets, ("+Inf", float(s["count"]))], s["sum_ms"] / 1e3)
        yield stages

    def _inference(self, frame: dict[str, Any]) -> Iterator[Metric]:
        models = frame["models"]
        info = InfoMetricFamily("cift_model", "The models that are in use")
        info.add_metric([], {"version": models["version"]})
        yield info
        for name, what, key in (
            ("cift_inference_failures", "Decisions from which a member abstained because it failed", "failures"),
            ("cift_inference_late", "Decisions from which a member abstained because it was late", "late"),
        ):
            yield _labelled(CounterMetricFamily(name, what, labels=["member"]), {(x["member"],): x[key] for x in models["members"]})
        yield _counter("cift_model_reloads", "Times that models were swapped", models["reloads"])

    def _money(self, frame: dict[str, Any]) -> Iterator[Metric]:
        for name, what, key in (
            ("cift_pnl_net_currency", "Net profit since the start, in the currency's units", "net"),
            ("cift_fees_currency", "Fees since the start, in the currency's units", "fees"),
            ("cift_drawdown_currency", "From the highest net profit, in the currency's units", "drawdown"),
        ):
            yield _labelled(GaugeMetricFamily(name, what, labels=["currency"]), {(p["currency"],): p[key] for p in frame["pnl"]})
        yield _labelled(
            GaugeMetricFamily("cift_drawdown_ratio", "Drawdown as a share of the capital", labels=["currency"]),
            {(p["currency"],): p["drawdown"] / p["capital"] for p in frame["pnl"]},
        )
        yield _labelled(
            GaugeMetricFamily("cift_position_units", "Net position, signed", labels=["symbol"]),
            {(p["symbol"],): p["size"] for p in frame["positions"]},
        )

    def _feeds(self, frame: dict[str, Any]) -> Iterator[Metric]:
        feeds = frame["feeds"]
        yield _labelled(
            GaugeMetricFamily("cift_feed_connected", "Whether the feed is there", labels=["feed"]),
            {(f["name"],): float(f["connected"]) for f in feeds},
        )
        for name, what, key in (
            ("cift_feed_staleness_seconds", "Since the feed's newest event", "age_ms"),
            ("cift_feed_lag_seconds", "From the venue's stamp to ours", "lag_ms"),
        ):
            told = {(f["name"],): f[key] / 1e3 for f in feeds if f[key] is not None}
            yield _labelled(GaugeMetricFamily(name, what, labels=["feed"]), told)
        for name, what, key in (
            ("cift_feed_reconnects", "Times that the feed was connected again", "reconnects"),
            ("cift_feed_gaps", "Gaps in the feed's sequence", "gaps"),
        ):
            yield _labelled(CounterMetricFamily(name, what, labels=["feed"]), {(f["name"],): f[key] for f in feeds})
        yield _labelled(
            GaugeMetricFamily("cift_instrument_staleness_seconds", "Since the instrument's newest event", labels=["symbol"]),
            {(x["symbol"],): x["age_ms"] / 1e3 for x in frame["instruments"] if x["age_ms"] is not None},
        )


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(name, what, value=value)


def _counter(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(name, what, value=value)


def _labelled[T: (GaugeMetricFamily, CounterMetricFamily)](family: T, values: Mapping[tuple[str], float]) -> T:
    for labels, value in values.items():
        family.add_metric(list(labels), value)
    return family
