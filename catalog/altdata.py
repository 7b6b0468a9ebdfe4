"""The table of alternative data: 27 named features, each value with the time it is about and the time it was known.

Takes Parquet or CSV files of the schema in docs/altdata.md (made by :func:`markdown`), gives a :class:`Table`; :mod:`catalog.asof` joins
it to decisions by the time known. What Polygon offers of the 27 is fetched by :mod:`catalog.altfill`; the rest comes from the user's own
file; the synthetic exchange plants its own (:mod:`catalog.planted_altdata`).
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from catalog.errors import InputError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

ALL: Final = "*"  # the instrument of rows that hold for every one (macro)
_INF: Final = float("inf")


class Feature(NamedTuple):
    """One of the 27. `delay_s`: seconds from the time it is about (`ts_event`) to the earliest time it can be known."""

    name: str
    group: str
    unit: str
    low: float
    high: float
    delay_s: float
    source: str
    polygon: str  # history, from now on, with an add-on, no
    definition: str


_OPTIONS, _NEWS, _TRADES, _MACRO = "options flow", "sentiment", "large trades", "macro"
_BARS, _CHAIN, _TAPE = "daily bars of the contracts", "option chain snapshot", "trades of the tape"
_QUARTER: Final = 900.0

FEATURES: Final = (
    Feature("put_call_volume", _OPTIONS, "ratio", 0, _INF, _QUARTER, _BARS, "history",
            "Contracts traded that day, puts over calls: expiry within 60 days, strike within 30 % of the previous close."),
    Feature("put_call_open_interest", _OPTIONS, "ratio", 0, _INF, 0, _CHAIN, "from now on",
            "Open contracts at the end of the last trading day, puts over calls, all expiries."),
    Feature("net_gamma_exposure", _OPTIONS, "currency per 1 %", -_INF, _INF, 0, _CHAIN, "from now on",
            "Sum of gamma x open interest x contract size x spot^2 x 0.01, calls positive, puts negative."),
    Feature("atm_iv", _OPTIONS, "per sqrt(year)", 0, 20, 0, _CHAIN, "from now on",
            "Implied volatility at the money at 30 days: linear in strike around spot, then in total variance between expiries."),
    Feature("skew_25d", _OPTIONS, "per sqrt(year)", -20, 20, 0, _CHAIN, "from now on",
            "Implied volatility of the put of delta -0.25 minus that of the call of delta 0.25, at the expiry nearest 30 days."),
    Feature("iv_term_slope", _OPTIONS, "per sqrt(year)", -20, 20, 0, _CHAIN, "from now on",
            "At-the-money implied volatility at 90 days minus that at 30 days."),
    Feature("iv_rank", _OPTIONS, "share", 0, 1, 0, _CHAIN, "from now on",
            "Where atm_iv lies between its lowest and highest daily value of the past year (at least 20 days of it)."),
    Feature("unusual_volume", _OPTIONS, "ratio", 0, _INF, _QUARTER, _BARS, "history",
            "Contracts traded that day over their mean of the 20 trading days before; contracts as for put_call_volume."),
    Feature("news_sentiment", _NEWS, "score", -1, 1, 60, "news articles", "history",
            "Mean of +1, 0, -1 (positive, neutral, negative for this symbol) over the articles of the past 24 hours; 0 without any."),
    Feature("news_count", _NEWS, "articles", 0, _INF, 60, "news articles", "history",
            "Articles about the symbol in the past 24 hours."),
    Feature("news_novelty", _NEWS, "share", 0, 1, 60, "news articles", "history",
            "1 minus the largest Jaccard similarity of the newest title's words with those of the past 72 hours."),
    Feature("social_sentiment", _NEWS, "score", -1, 1, 0, "social media", "no",
            "Mean sentiment of posts about the symbol, by the provider of the user's file."),
    Feature("social_volume", _NEWS, "posts", 0, _INF, 0, "social media", "no",
            "Posts about the symbol in the provider's window."),
    Feature("days_to_earnings", _NEWS, "days", 0, 400, 0, "earnings calendar", "with an add-on, from now on",
            "Days to the next announced earnings report. Nobody records when past dates were announced: there is no history."),
    Feature("earnings_surprise", _NEWS, "share", -_INF, _INF, 0, "earnings reports", "with an add-on, history",
            "Earnings per share over their estimate, minus 1; known when the record was last changed."),
    Feature("dark_pool_share", _TRADES, "share", 0, 1, 0, _TAPE, "history",
            "Volume executed off exchange (trade reporting facilities) over all volume of a 5-minute window of SIP stamps."),
    Feature("dark_pool_net_side", _TRADES, "share", -1, 1, 0, _TAPE, "history",
            "Off-exchange volume bought minus sold (quote rule) over off-exchange volume of the window; 0 without any."),
    Feature("block_count", _TRADES, "trades", 0, _INF, 0, _TAPE, "history",
            "Trades of at least 10,000 shares or 200,000 in currency in the window."),
    Feature("block_imbalance", _TRADES, "share", -1, 1, 0, _TAPE, "history",
            "Block volume bought minus sold over block volume of the window; 0 without blocks."),
    Feature("large_order_imbalance", _TRADES, "share", -1, 1, 0, _TAPE, "history",
            "As block_imbalance, for the trades of 50,000 in currency and more that are no blocks."),
    Feature("sweep_count", _TRADES, "sweeps", 0, _INF, 0, _TAPE, "history",
            "Runs of intermarket sweep prints of one side, at most 1 ms apart, on two exchanges or more, in the window."),
    Feature("vix", _MACRO, "points", 0, 200, _QUARTER, "daily bars of I:VIX", "history",
            "Close of the CBOE volatility index, 16:15 New York."),
    Feature("vix_change", _MACRO, "points", -200, 200, _QUARTER, "daily bars of I:VIX", "history",
            "vix minus its close of the trading day before."),
    Feature("us10y_change", _MACRO, "percentage points", -20, 20, 59_400, "treasury yields", "history",
            "Change of the 10-year treasury par yield from the day before; taken as known at 08:00 New York of the next day."),
    Feature("yield_slope", _MACRO, "percentage points", -20, 20, 59_400, "treasury yields", "history",
            "10-year minus 2-year treasury par yield; known as us10y_change."),
    Feature("dollar_change", _MACRO, "log return", -1, 1, 60, "daily bars of six currency pairs", "history",
            "Day's change of the dollar against EUR, JPY, GBP, CAD, SEK and CHF with the weights of the US dollar index."),
    Feature("sector_return", _MACRO, "log return", -2, 2, _QUARTER, "daily bars of the sector's fund", "history",
            "Close over the close of the trading day before, of the fund that the user names for the symbol."),
)  # fmt: skip
NAMES: Final = tuple(f.name for f in FEATURES)
INDEX: Final = {name: k for k, name in enumerate(NAMES)}
_EARLIEST, _LATEST = 631_152_000 * 10**9, 4_102_444_800 * 10**9  # 1990 and 2100

SCHEMA: Final = pa.schema(
    [
        pa.field("instrument", pa.string(), False),
        pa.field("feature", pa.string(), False),
        pa.field("value", pa.float64(), False),
        pa.field("ts_event", pa.timestamp("ns", "UTC"), False),
        pa.field("ts_known", pa.timestamp("ns", "UTC"), False),
    ]
)
_COLUMNS: Final = {
    "instrument": "id (`AAPL.XNAS`), symbol (`AAPL`, whatever the venue) or `*` for all",
    "feature": "one of the names below",
    "value": "finite, within the bounds below",
    "ts_event": "the time that the value is about: end of the window, close of the day, publication",
    "ts_known": "the time from which it was known; never before `ts_event`",
}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of the table; :func:`table` and :func:`read` sort them by `ts_known`, then `ts_event`. Times in ns UTC."""

    names: tuple[str, ...]  # instruments
    instrument: NDArray[np.int32]  # (n,) index into names
    feature: NDArray[np.int8]  # (n,) index into FEATURES
    value: Floats  # (n,)
    ts_event: Ints  # (n,)
    ts_known: Ints  # (n,)

    def __len__(self) -> int:
        return len(self.value)

    def rows(self) -> list[tuple[str, str, float, int, int]]:
        """(instrument, feature, value, ts_event, ts_known) of every row."""
        columns = (self.instrument, self.feature, self.value, self.ts_event, self.ts_known)
        return [(self.names[i], NAMES[f], v, e, k) for i, f, v, e, k in zip(*(c.tolist() for c in columns))]


def table(rows: Iterable[tuple[str, str, float, int, int]], where: str = "the rows", first: int = 1) -> Table:
    """A checked table of (instrument, feature, value, ts_event, ts_known) rows; equal rows count once.

    Raises InputError that names the row (counted from `first`) and the fault: unknown feature, no instrument, value not finite or out of
    its bounds, stamps outside 1990 to 2100 or known before they happened, two values for the same feature and stamps.
    """
    columns = list(zip(*rows)) or [()] * 5
    instruments, features = ([str(s) for s in c] for c in columns[:2])
    return _checked(where, first, instruments, features, *(np.array(c) for c in columns[2:]))


def _checked(
    where: str, first: int, instruments: list[str], features: list[str], value: NDArray[Any], event: NDArray[Any], known: NDArray[Any]
) -> Table:
    def fail(bad: NDArray[np.bool_], said: str | Callable[[int], str]) -> None:
        if bad.any():
            k = int(np.argmax(bad))
            raise InputError(f"{where}, row {k + first}: {said if isinstance(said, str) else said(k)}")

    def unknown(k: int) -> str:
        near = difflib.get_close_matches(features[k], NAMES, 1)
        return f"unknown feature {features[k]!r}" + (f": {near[0]!r} is meant?" if near else ": docs/altdata.md has the 27 names")

    n = len(instruments)
    value, event, known = value.astype(np.float64), event.astype(np.int64), known.astype(np.int64)
    code = np.array([INDEX.get(f, -1) for f in features], np.int8)
    fail(code < 0, unknown)
    fail(np.array([not s.strip() for s in instruments], np.bool_), "no instrument: write an id, a symbol or * for all")
    for name, ts in (("ts_event", event), ("ts_known", known)):
        outside = (ts < _EARLIEST) | (ts >= _LATEST)
        fail(outside, f"{name} is outside 1990 to 2100: stamps are ns since 1970 UTC or ISO 8601 with a zone")
    late = "ts_known must be at or after ts_event"
    fail(known < event, lambda k: f"{features[k]} was known ({_when(known[k])}) before it happened ({_when(event[k])}): {late}")
    fail(~np.isfinite(value), lambda k: f"the value of {features[k]} is not finite: leave the row out where there is no value")
    low, high = (np.array([getattr(f, bound) for f in FEATURES])[code] for bound in ("low", "high"))
    fail((value < low) | (value > high), lambda k: f"{features[k]} is {value[k]:g}, not within {low[k]:g} to {high[k]:g} (docs/altdata.md)")

    names, of = np.unique(np.array(instruments, dtype=object), return_inverse=True) if n else (np.array([]), np.empty(0, np.int64))
    order = np.lexsort((value, code, of, event, known))
    of, code, value, event, known = of[order], code[order], value[order], event[order], known[order]
    same = np.zeros(n, np.bool_)
    same[1:] = (np.diff(known) == 0) & (np.diff(event) == 0) & (np.diff(of) == 0) & (np.diff(code) == 0)
    clash = same.copy()
    clash[1:] &= np.diff(value) != 0
    if clash.any():
        k = int(np.argmax(clash))
        raise InputError(
            f"{where}, row {int(order[k]) + first}: {NAMES[code[k]]} of {names[of[k]]} has two values, {value[k - 1]} and {value[k]}, "
            f"for {_when(event[k])} known at {_when(known[k])}: keep one"
        )
    keep = ~same
    return Table(
        tuple(str(s) for s in names), of[keep].astype(np.int32), code[keep].astype(np.int8), value[keep], event[keep], known[keep]
    )


def _when(ns: int) -> str:
    return str(np.datetime64(int(ns), "ns")) + "Z"


def merge(*tables: Table) -> Table:
    """One table of all rows. Raises InputError where they hold two values for the same feature and stamps."""
    return table((r for t in tables for r in t.rows()), "the merged tables")


def extended(recorded: Table, new: Table) -> tuple[Table, int]:
    """`recorded` and the rows of `new` that it lacks; and of how many rows the value differs: the recorded one is kept.

    What was recorded is what was known at the time; a service may have changed its past since.
    """
    held = {(i, f, e, k): v for i, f, v, e, k in recorded.rows()}
    rows = new.rows()
    fresh = [r for r in rows if (r[0], r[1], r[3], r[4]) not in held]
    changed = sum(held.get((i, f, e, k), v) != v for i, f, v, e, k in rows)
    return table([*recorded.rows(), *fresh], "the rows"), changed


def stack(*tables: Table) -> Table:
    """All rows of checked tables, unsorted and as they are."""
    names = tuple(sorted({n for t in tables for n in t.names}))
    place = {n: k for k, n in enumerate(names)}
    of = [np.array([place[n] for n in t.names], np.int32)[t.instrument] if len(t) else t.instrument for t in tables]
    kinds = (np.int32, np.int8, np.float64, np.int64, np.int64)
    columns = [[o, t.feature, t.value, t.ts_event, t.ts_known] for o, t in zip(of, tables)]
    return Table(names, *(np.concatenate([np.empty(0, kind), *(c[j] for c in columns)]).astype(kind) for j, kind in enumerate(kinds)))


def delayed(data: Table, by_s: float) -> Table:
    """The same rows, each known `by_s` seconds later: what a slower source is worth."""
    return replace(data, ts_known=data.ts_known + round(by_s * 1e9))


def read(path: str | Path) -> Table:
    """A table from a .parquet or .csv file. Raises InputError that names the file, the row and what to mend.

    Stamps: timestamps with a zone, or integers of ns since 1970 UTC; in CSV also ISO 8601 with a zone. Other columns are ignored.
    """
    path = Path(path)
    if path.suffix not in (".parquet", ".csv"):
        raise InputError(f"{path} is neither .parquet nor .csv: write the table as one of them")
    try:
        if path.suffix == ".csv":
            texts = dict.fromkeys(_COLUMNS, pa.string())
            options = pyarrow.csv.ConvertOptions(column_types=texts, strings_can_be_null=True, null_values=[""])
            found = pyarrow.csv.read_csv(path, convert_options=options)
        else:
            found = pq.read_table(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give the path of the alternative-data table") from None
    except (pa.ArrowException, OSError) as e:
        raise InputError(f"{path} cannot be read as {path.suffix[1:]} ({str(e).splitlines()[0]}): write it again") from None
    if missing := [c for c in _COLUMNS if c not in found.column_names]:
        raise InputError(f"{path} has no column {missing[0]!r}: the columns are {', '.join(_COLUMNS)}")
    first = 2 if path.suffix == ".csv" else 1
    columns = {c: _column(found[c].combine_chunks(), c, path, first) for c in _COLUMNS}
    instruments, features = (columns[c].to_pylist() for c in ("instrument", "feature"))
    return _checked(str(path), first, instruments, features, *(columns[c].to_numpy() for c in ("value", "ts_event", "ts_known")))


def _column(found: pa.Array, name: str, path: Path, first: int) -> pa.Array:
    if found.null_count:
        k = int(np.argmax(found.is_null().to_numpy(zero_copy_only=False)))
        raise InputError(f"{path}, row {k + first}: no {name}: every row needs {', '.join(_COLUMNS)}")
    if pa.types.is_dictionary(found.type):
        found = found.dictionary_decode()
    want, text = SCHEMA.field(name).type, pa.types.is_string(found.type) or pa.types.is_large_string(found.type)
    number = pa.types.is_integer(found.type) or pa.types.is_floating(found.type)
    if pa.types.is_timestamp(want):
        if pa.types.is_timestamp(found.type) and found.type.tz is None:
            raise InputError(f"{path}: column {name!r} has no time zone: write UTC stamps")
        if text:
            return pa.array([_stamp(s, name, path, k) for k, s in enumerate(found.to_pylist(), first)], pa.int64())
        if pa.types.is_timestamp(found.type) or pa.types.is_integer(found.type):
            return (found.cast(want) if pa.types.is_timestamp(found.type) else found).cast(pa.int64())
    elif (text if want == pa.string() else number or (text and path.suffix == ".csv")):
        try:
            return found.cast(want)
        except pa.ArrowException as e:
            raise InputError(f"{path}: column {name!r} is not all numbers ({str(e).splitlines()[0]})") from None
    raise InputError(f"{path}: column {name!r} holds {found.type}, not {want}: {_COLUMNS[name]}")


def _stamp(text: str, name: str, path: Path, row: int) -> int:
    if re.fullmatch(r"\s*\d{1,19}\s*", text):
        return int(text)
    try:
        return int(pa.array([text.strip().replace(" ", "T", 1)]).cast(pa.timestamp("ns", "UTC")).cast(pa.int64())[0].as_py())
    except pa.ArrowException:
        raise InputError(f"{path}, row {row}: {name} is {text!r}: write 2024-01-03T14:30:00Z or ns since 1970 UTC") from None


def write(data: Table, path: str | Path) -> None:
    """Write `data` to a Parquet file of :data:`SCHEMA`, whole or not at all."""
    path = Path(path)
    names = pa.array(data.names or [""], pa.string())
    columns = [
        names.take(pa.array(data.instrument)), pa.array(NAMES).take(pa.array(data.feature)), pa.array(data.value),
        *(pa.array(ts).cast(pa.timestamp("ns", "UTC")) for ts in (data.ts_event, data.ts_known)),
    ]  # fmt: skip
    part = path.with_name(path.name + ".part")
    pq.write_table(pa.table(columns, SCHEMA.with_metadata({"cift": json.dumps({"altdata": 1})})), part, compression="zstd")
    part.replace(path)


def markdown() -> str:
    """docs/altdata.md."""

    def number(x: float) -> str:
        return "" if abs(x) == _INF else f"{x:g}"

    columns = "\n".join(f"| `{c}` | {SCHEMA.field(c).type} | {_COLUMNS[c]} |" for c in _COLUMNS)
    cells = (
        (f"`{f.name}`", f.group, f.unit, f"{number(f.low)} .. {number(f.high)}", f.source, f"{f.delay_s:g}", f.polygon, f.definition)
        for f in FEATURES
    )
    rows = "\n".join(f"| {' | '.join(c)} |" for c in cells)
    return f"""# Alternative data

Made from the table in `catalog/altdata.py` (`python -c "from catalog.altdata import markdown; print(markdown(), end='')"`).

A table is a Parquet or CSV file with these columns, in any order; other columns are ignored. In Parquet the stamps may also be
integers, in CSV integers or ISO 8601 with a zone (`2024-01-03T14:30:00Z`); integers are ns since 1970 UTC.

| column | type | content |
|---|---|---|
{columns}

A decision at time t sees the rows with `ts_known` <= t only. Of those the one about the newest event counts, of several about the same
event the one known last, so a revision is a second row with the same `ts_event` and a later `ts_known`. What is not known is missing
(NaN), and the age of each value, t minus `ts_event`, stands beside it. Every row is checked; equal rows count once.

```
python -m uv run python -m catalog altdata fill AAPL,MSFT --start 2024-01-02 --end 2024-01-05 --sector AAPL=XLK --out alt.parquet
python -m uv run python -m catalog altdata merge alt.parquet mine.csv --out all.parquet    # one checked table of several
python -m uv run python -m catalog altdata describe all.parquet
python -m uv run python -m cift_models train --catalog DIR --altdata all.parquet --out ARTIFACT
python -m uv run run_backtest.py --catalog DIR --altdata all.parquet
```

`fill` needs POLYGON_API_KEY. It adds to the table that is there and never replaces what was recorded; interrupted, the same command goes on
where it stopped. Models use what is there: a feature that changes too seldom to learn from is left out, an artifact remembers its columns,
and without the table they are missing. The demo market has a table of its own (`alternative.parquet`): four of its features tell late and
through noise what is behind the market, the others are noise; `truth.json` says which.

The delay is in seconds, from `ts_event` to the earliest `ts_known`. The column "Polygon" says what `catalog.altfill` can fetch: history
for past ranges too; from now on only as of the moment of asking, because the service keeps no past of it (record it daily); with an
add-on only with a paid extension of the plan; no: from the user's file alone.

| feature | group | unit | bounds | source | delay | Polygon | definition |
|---|---|---|---|---|---|---|---|
{rows}
"""
