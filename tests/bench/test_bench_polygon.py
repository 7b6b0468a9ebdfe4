"""What the Polygon feed costs: parsing in units of the standard library's JSON, and that nothing is lost on the way to an actor."""

from __future__ import annotations

import json
from typing import Any

from polygon_throughput import SYMBOLS, frames, measure
from timing import best

from cift_strategies.feeds.polygon_wire import ROW, Listing, Wire


def test_parsing_costs_little_more_than_reading_json(benchmark: Any) -> None:
    """Reading, order, duplicates, rounding, packing: together at most 3.5 times what `json.loads` alone takes of the same frames."""
    data = frames(20_000)

    def parse() -> int:
        wire, size = Wire("stocks"), 0
        for k, symbol in enumerate(SYMBOLS):
            wire.add("Q", symbol, Listing(k, 4, 0))
        for frame in data:
            wire.frame(frame, 1)
            size += len(wire.take()[0])
        return size // ROW.size

    def read() -> None:
        for frame in data:
            json.loads(frame)

    assert benchmark.pedantic(parse, rounds=1) == 20_000
    mine, yardstick = best(parse, read)
    benchmark.extra_info |= {"us_per_message": mine / 20_000 * 1e6, "json_us": yardstick / 20_000 * 1e6, "ratio": mine / yardstick}
    assert mine < 3.5 * yardstick


def test_nothing_is_lost_as_fast_as_the_service_can_send(benchmark: Any) -> None:
    """Server, reader, node and actor, each as fast as it can: all arrive; what each costs stands beside a reading of the JSON."""
    many = 100_000
    told = benchmark.pedantic(measure, (many,), rounds=1)
    data = frames(20_000)
    [yardstick] = best(lambda: [json.loads(frame) for frame in data])
    benchmark.extra_info |= told | {"json_us": yardstick / 20_000 * 1e6}
    assert (told["arrived"], told["lost"], told["dropped_frames"]) == (many, 0, 0)
