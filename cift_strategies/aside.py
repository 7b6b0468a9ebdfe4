"""The second process of a run: counts the data's faults where nobody has, fits the plain rule and trades it meanwhile."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from catalog.errors import InputError
from catalog.events import read_catalog
from cift_strategies.backtest import Plan, blocks, delay, stream
from cift_strategies.outcome import Traded
from cift_strategies.priority import behind
from cift_strategies.workers import no_main


@dataclass(frozen=True, slots=True)
class Aside:
    """What the second process brings: data quality where nobody has counted, and the rule with what it traded."""

    quality: dict[str, int] | None
    traded: Traded | None
    rule: dict[str, Any]


def aside(p: Plan, count_quality: bool, q: Sequence[float], ns: Sequence[float]) -> Aside:
    """Count the data's faults, fit the rule on the training range and trade it over the rest."""
    from cift_strategies.faults import Faults
    from cift_strategies.rule import RulePredictor, fit

    instruments = p.instruments
    quality = None
    if count_quality:
        from catalog.quality import check

        quality = {k: n for k, n in check(read_catalog(p.root, p.ids, p.first, p.last)[1], list(instruments)).counts.items() if n}
    if not p.config.rule or p.split <= p.first:
        return Aside(quality, None, {})
    mids: dict[int, float] = {}
    for events in read_catalog(p.root, p.ids, p.first, p.split)[1]:
        for k in np.unique(events["instrument"]):
            priced = events["price"][(events["instrument"] == k) & (events["price"] > 0)]
            if len(priced) and int(k) not in mids:
                mids[int(k)] = float(np.median(priced)) / 1e9
        if len(mids) == len(instruments):
            break
    costs = [2 * (x.taker_fee * mids.get(k, 0.0) + x.fee_per_unit / x.multiplier) / (x.tick / 1e9) for k, x in enumerate(instruments)]
    rule = fit(instruments, blocks(p, p.first, p.split), costs)
    terms = p.terms((), Faults())
    traded, _, _ = stream(p, RulePredictor(rule, delay(p, len(instruments), q, ns)), terms)
    return Aside(quality, traded, {"rules": {x.id: r.told() for x, r in zip(instruments, rule)}})


def _aside_process(pipe: Any, *arguments: Any) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    behind(5)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    try:
        pipe.send((aside(*arguments), None))
    except InputError as error:
        pipe.send((None, error))
    except BaseException:
        import traceback

        pipe.send((None, traceback.format_exc()))


class Second:
    """The second process: :meth:`result` waits for it, :meth:`stop` ends it."""

    def __init__(self, *arguments: Any) -> None:
        from multiprocessing import get_context

        context = get_context("spawn")
        self._pipe, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_aside_process, args=(theirs, *arguments), daemon=True)
        with no_main():
            self._process.start()
        theirs.close()

    def result(self) -> Aside:
        try:
            found: Aside | None
            found, fault = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"the rule's process ended with exit code {self._process.exitcode}; out of memory?") from None
        self._process.join()
        if isinstance(fault, InputError):
            raise fault
        if found is None:
            raise RuntimeError(f"the rule's process failed:\n{fault}")
        return found

    def stop(self) -> None:
        if self._process.is_alive():
            self._process.kill()
