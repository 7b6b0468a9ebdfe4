"""Compile the kernels of a run on the other core while the demo market is being made: `python -m cift_strategies.warm`.

What is compiled lies in numba's cache, where the run finds it. Nothing depends on it: without it the run compiles for itself.
"""

from __future__ import annotations

import numpy as np

from catalog.events import ADD, EVENT, F_LAST, SCALE, TRADE, Instrument


def main() -> None:
    from catalog.quality import check
    from cift_models.ensemble import MEMBERS, Ensemble
    from cift_models.features import NAMES
    from cift_models.hmm import Measures
    from cift_models.inference import Engine, stream
    from cift_models.labels import H, Labeller
    from cift_strategies import intake

    table = [Instrument("WARM.UP", SCALE // 100, SCALE, 1.0, "USD")]
    events = np.zeros(400, EVENT)
    n = np.arange(len(events))
    events["ts_event"] = events["ts_init"] = 1_700_000_000 * SCALE + n * 20_000_000
    events["order_id"], events["sequence"], events["size"], events["flags"] = n + 1, n + 1, SCALE, F_LAST
    events["side"] = np.where(n % 2, 1, -1)
    events["price"] = 100 * SCALE - events["side"].astype(np.int64) * (1 + n % 5) * (SCALE // 100)
    events["action"] = np.where(n % 9 == 8, TRADE, ADD)
    check([events], table)
    intake.warm(table[0])
    engine = Engine(table, ["WARM.UP"], NAMES, [], Ensemble.even(tuple(MEMBERS), np.ones((1, H)), np.ones(H)))
    labeller, measures = Labeller(table), Measures(table, NAMES)
    for block in stream(table, [events]):
        labeller.push(block.events, np.ascontiguousarray(block.rows[:, NAMES.index("mid")]), block.closes)
        measures.push(block)
        engine.predict(block)


if __name__ == "__main__":
    main()
