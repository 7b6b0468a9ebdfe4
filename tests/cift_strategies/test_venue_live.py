"""`run_live.py --venue test`: a whole session through the gateway and the venue, as processes, and its account at the next start."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from conftest import Small
from test_live import WITHIN_S, rows, session


def test_a_session_on_the_test_venue_has_the_venues_own_books(small: Small, tmp_path: Path) -> None:
    """Every fill of the venue is in the journal once, positions are equal, and a second session begins with what the first one left.

    What the first leaves at the venue may be filled after it has gone: the second has it too, and leaves nothing.
    """
    state, fills = tmp_path / "state", list[dict[str, object]]()
    for at_end in ("keep", "close"):
        faults = {"faults": ["drop@25:2", "duplicate@10:5", "race@3:1", "reject@4:1"]}
        process = session(small, state, "--speed", "40", "--duration", "10", venue="test", at_end=at_end, venue_config=faults)
        said, _ = process.communicate(timeout=WITHIN_S)
        assert process.returncode == 0 and "Traceback" not in said, said
        reports = [json.loads(line)["report"] for line in (state / "venue" / "books.jsonl").read_text().splitlines()]
        before, fills = len(fills), [r for r in reports if r["fill"] is not None]
        kept = rows(state, "select client_order_id, trade_id, raw, price, fee from fills order by seq")
        told = [(r["order"]["client"], r["fill"]["id"], r["fill"]["size"], r["fill"]["price"] / 1e9, r["fill"]["fee"]) for r in fills]
        assert len(set(kept)) == len(kept) and set(kept) <= set(told) and len(fills) > before
    assert sorted(kept) == sorted(told)
    ours, theirs = Counter[str](), Counter[str]()
    for name, signed in rows(state, "select instrument, side * raw from fills"):
        ours[name] += signed
    for r in fills:
        theirs[r["order"]["instrument"]] += r["order"]["side"] * r["fill"]["size"]
    assert ours == theirs
    assert rows(state, "select count(distinct account) from sessions") == [(1,)]
