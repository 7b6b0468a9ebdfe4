"""What Polygon's parts mean: the consolidated tape of quotes and trades, in order and with aggressors, and the catalog made of it.

Takes the files of :func:`catalog.polygon.download`; :func:`quotes` and :func:`trades` give arrays, :func:`import_parts` a catalog.

Times. `ts_event` is the participant's stamp where there is one, `ts_init` the SIP's: nobody could know the record earlier. Crypto has
no SIP: both are the exchange's stamp. Order is by SIP stamp, then the SIP's sequence number, at equal stamps trades before quotes.

Prices are floats in JSON and become integers of 1e-9 exactly. Equities keep four decimals (trades print inside the cent) with a tick
of their own, found from the quotes (Regulation NMS, Rule 612); what has more decimals is rounded half to even and counted. NBBO sizes
before 2025-11-03 are round lots and become shares (SEC Release 34-101070); sizes are cut to whole shares, and what was cut is counted.

Aggressor. Equities do not tell: a trade is a buy above the middle of the newest quote with an earlier SIP stamp, a sell below it; in
the middle, or while the quote is locked or crossed, the tick test decides (Lee and Ready 1991, without their delay, as stamps are
now exact). Without a quote before it, and in auctions, the side is none. Crypto tells the side itself (conditions 1 sell, 2 buy).
"""

from __future__ import annotations

import datetime as dt
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from catalog.conditions import AUCTIONS, CORRECTIONS, NOT_TRADES, SHARES_SINCE, SWEEP, TRF_EXCHANGE
from catalog.errors import InputError
from catalog.polygon import NEW_YORK, PAGE, VENUE, Request, Want, midnight, utc, wants
from catalog.progress import Steps

EQUITY_PRECISION: Final = 4

TRADE: Final = np.dtype(
    [
        ("ts_init", np.int64), ("ts_event", np.int64), ("sequence", np.int64),
        ("price", np.int64), ("size", np.int64),  # 1e-9 units
        ("exchange", np.int32), ("side", np.int8),  # +1 buy aggressor, -1 sell, 0 none
        ("dark", np.bool_), ("sweep", np.bool_), ("auction", np.bool_), ("void", np.bool_), ("corrects", np.bool_), ("id", "U36"),
    ]
)  # fmt: skip
QUOTE: Final = np.dtype(
    [(n, np.int64) for n in ("ts_init", "ts_event", "sequence", "bid", "ask", "bid_size", "ask_size")]
)  # prices and sizes in 1e-9 units

# --- parts -> arrays --------------------------------------------------------------------------------------------------------------


def quotes(files: Iterable[Path], counts: Counter[str], *, lot: int = 100, equity: bool = True) -> Iterator[np.ndarray]:
    """The quotes of one symbol as blocks of :data:`QUOTE`, in order of `ts_init`, two-sided ones only. `counts` is added to.

    `lot`: shares of a round lot, by which sizes before 2025-11-03 are multiplied.
    """

    def load(t: pa.Table) -> np.ndarray:
        q = np.zeros(len(t), QUOTE)
        for name in ("bid", "ask", "bid_size", "ask_size", "sequence"):
            q[name] = t[name].to_numpy()
        _stamps(q, t)
        if equity:
            old = q["ts_init"] < SHARES_SINCE
            q["bid_size"][old] *= lot
            q["ask_size"][old] *= lot
        return q

    for q in _ordered((load(t) for t in _tables(files)), counts, "quotes"):
        two = (q["bid"] > 0) & (q["ask"] > 0) & (q["bid_size"] > 0) & (q["ask_size"] > 0)
        counts["one_sided_quotes"] += int((~two).sum())
        counts["crossed_quotes"] += int((q["bid"] > q["ask"])[two].sum())
        counts["locked_quotes"] += int((q["bid"] == q["ask"])[two].sum())
        yield q[two]


def trades(
    files: Iterable[Path], counts: Counter[str], quoted: Iterator[np.ndarray] | None = None, *, equity: bool = True
) -> Iterator[np.ndarray]:
    """The real trades of one symbol as blocks of :data:`TRADE`, in order of `ts_init`, with their aggressor.

    `quoted`: the symbol's quotes from :func:`quotes`, for the quote rule. What is no trade at the market (:data:`NOT_TRADES`) or
    corrects an earlier print is left out and counted, by condition.
    """
    void, auction = np.array(sorted(NOT_TRADES)), np.array(sorted(AUCTIONS))

    def load(t: pa.Table) -> np.ndarray:
        a = np.zeros(len(t), TRADE)
        for name in ("price", "size", "sequence", "exchange"):
            a[name] = t[name].to_numpy()
        a["id"] = t["id"].to_numpy(zero_copy_only=False).astype("U36") if len(t) else ""
        _stamps(a, t)
        lists = t["conditions"].combine_chunks()
        codes = lists.flatten().to_numpy()
        row = np.repeat(np.arange(len(t)), lists.value_lengths().to_numpy(zero_copy_only=False))

        def has(hit: np.ndarray) -> np.ndarray:
            return np.bincount(row[hit], minlength=len(t))[: len(t)] > 0

        if equity:
            a["void"], a["auction"], a["sweep"] = has(np.isin(codes, void)), has(np.isin(codes, auction)), has(codes == SWEEP)
            a["dark"] = (a["exchange"] == TRF_EXCHANGE) & (t["trf"].to_numpy() != 0)
            a["corrects"] = np.isin(t["correction"].to_numpy(), CORRECTIONS)
            for code, n in zip(*np.unique(codes[np.isin(codes, void)], return_counts=True)):
                counts[f"condition {code}: {NOT_TRADES[int(code)]}"] += int(n)
        else:
            a["side"] = has(codes == 2).astype(np.int8) - has(codes == 1).astype(np.int8)
        return a

    aggressor = _Aggressor(quoted)
    for a in _ordered((load(t) for t in _tables(files)), counts, "trades"):
        bad = (a["price"] <= 0) | (a["size"] <= 0)
        counts["bad_trades"] += int((bad & ~a["corrects"]).sum())
        counts["corrections"] += int(a["corrects"].sum())
        counts["not_trades"] += int((a["void"] & ~a["corrects"] & ~bad).sum())
        kept = a[~bad & ~a["corrects"] & ~a["void"]]
        if equity and len(kept):
            kept["side"] = aggressor.of(kept)
        yield kept


class _Aggressor:
    """Lee and Ready (1991), causal and in pieces: the newest quote before the trade, else the last change of the trade price."""

    def __init__(self, quoted: Iterator[np.ndarray] | None) -> None:
        self.more = iter(()) if quoted is None else quoted
        self.quotes = np.empty(0, QUOTE)
        self.price, self.tick = 0, 0

    def of(self, a: np.ndarray) -> np.ndarray:
        blocks = [self.quotes]
        while not len(blocks[-1]) or blocks[-1]["ts_init"][-1] < a["ts_init"][-1]:
            if (block := next(self.more, None)) is None:
                break
            blocks.append(block)
        q = np.concatenate(blocks)
        at = np.searchsorted(q["ts_init"], a["ts_init"], "left") - 1
        self.quotes = q[max(0, at[-1]) :]
        price = np.concatenate([[self.price], a["price"]])
        moved = np.sign(np.diff(price)) * (price[:-1] != 0)
        last = np.maximum.accumulate(np.where(moved != 0, np.arange(len(a)), -1))
        tick = np.where(last >= 0, moved[last], self.tick)
        self.price, self.tick = int(a["price"][-1]), int(tick[-1])
        if not len(q):
            return np.zeros(len(a), np.int8)
        bid, ask = q["bid"][at], q["ask"][at]
        rule = np.where(bid < ask, np.sign(2 * a["price"] - bid - ask), 0)
        side = np.where(rule != 0, rule, tick)
        return np.where((at < 0) | a["auction"], 0, side).astype(np.int8)


def _tables(files: Iterable[Path]) -> Iterator[pa.Table]:
    for f in files:
        table = pq.read_table(f)
        if len(table):
            yield table


def _stamps(rows: np.ndarray, t: pa.Table) -> None:
    sip, participant = t["sip"].to_numpy(), t["participant"].to_numpy()
    rows["ts_init"] = np.where(sip > 0, sip, participant)
    rows["ts_event"] = np.where(participant > 0, participant, sip)


def _ordered(pages: Iterable[np.ndarray], counts: Counter[str], kind: str) -> Iterator[np.ndarray]:
    """Sort across the page before: a record may come up to a page late; a later one is moved to the newest stamp and counted."""
    held: np.ndarray | None = None
    newest = 0

    def settle(rows: np.ndarray) -> np.ndarray:
        nonlocal newest
        late = rows["ts_init"] < newest
        counts["moved"] += int(late.sum())
        rows["ts_init"][late] = newest
        newest = int(rows["ts_init"][-1]) if len(rows) else newest
        return rows

    for page in pages:
        counts[f"{kind}_read"] += len(page)
        good = page["ts_init"] > 0
        counts["bad_stamps"] += int((~good).sum())
        page = page[good]
        counts["out_of_order"] += int((np.diff(page["ts_init"]) < 0).sum())
        both = page if held is None else np.concatenate([held, page])
        both = both[np.lexsort((both["sequence"], both["ts_init"]))]
        again = np.zeros(len(both), np.bool_)
        again[1:] = both[1:] == both[:-1]
        counts["duplicates"] += int(again.sum())
        both = both[~again]
        cut = max(0, len(both) - len(page)) if held is not None else 0
        if cut:
            yield settle(both[:cut])
        held = both[cut:]
    if held is not None and len(held):
        yield settle(held)


# --- arrays -> catalog ------------------------------------------------------------------------------------------------------------


class _Ticks:
    """One Parquet file of a catalog in Nautilus's schema, written in row groups and named by its first and last `ts_init` when closed."""

    def __init__(self, root: Path, kind: str, name: str, schema: pa.Schema, about: dict[str, str]) -> None:
        self.folder = root / "data" / kind / name
        self.schema = schema.with_metadata(about)
        self.writer: pq.ParquetWriter | None = None
        self.rows, self.first, self.last = 0, 0, 0

    def write(self, ts_init: np.ndarray, columns: list[pa.Array]) -> None:
        if not len(ts_init):
            return
        if self.writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.writer = pq.ParquetWriter(self.folder / "unfinished", self.schema, compression="zstd", use_dictionary=["aggressor_side"])
            self.first = int(ts_init[0])
        self.writer.write_table(pa.table(columns, self.schema), row_group_size=PAGE)
        self.rows, self.last = self.rows + len(ts_init), int(ts_init[-1])

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            (self.folder / "unfinished").replace(self.folder / f"{_iso(self.first)}_{_iso(self.last)}.parquet")


def _iso(ns: int) -> str:
    return f"{dt.datetime.fromtimestamp(ns // 1_000_000_000, dt.UTC):%Y-%m-%dT%H-%M-%S}-{ns % 1_000_000_000:09d}Z"


_NUMBER, _STAMP = pa.decimal128(38, 16), pa.timestamp("ns", "UTC")


def _schema(*names: str) -> pa.Schema:
    kinds = {"aggressor_side": pa.dictionary(pa.int8(), pa.string()), "trade_id": pa.string(), "ts_event": _STAMP, "ts_init": _STAMP}
    return pa.schema([pa.field(n, kinds.get(n, _NUMBER), nullable=False) for n in (*names, "ts_event", "ts_init")])


_SCHEMAS: Final = {
    "quotes": _schema("bid_price", "ask_price", "bid_size", "ask_size"),
    "trades": _schema("price", "size", "aggressor_side", "trade_id"),
    "bars": _schema("open", "high", "low", "close", "volume"),
}


def _decimals(v: np.ndarray) -> pa.Array:
    wide = np.empty((len(v), 2), np.int64)
    wide[:, 0], wide[:, 1] = v, v >> 63
    return pa.Array.from_buffers(pa.decimal128(38, 9), len(v), [None, pa.py_buffer(wide)]).cast(_NUMBER)


def _when(v: np.ndarray) -> pa.Array:
    return pa.array(np.ascontiguousarray(v), pa.int64()).cast(_STAMP)

def import_parts(request: Request, parts: Path, out: Path) -> dict[str, Any]:
    """Make the catalog at `out` from downloaded `parts`, in bounded memory; gives the content of its `cift.json`.

    Raises InputError where a symbol has no record in the range.
    """
    import_to = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(import_to, ignore_errors=True)
    import_to.mkdir(parents=True)
    todo = wants(request.symbols, request.start, request.end, request.kinds)
    report: dict[str, Any] = {"source": "polygon", "request": request.as_json(), "sources": {}, "instruments": {}}
    quality: Counter[str] = Counter()
    try:
        with Steps("import from Polygon", len(request.symbols), "symbols") as s:
            for symbol in request.symbols:
                found = _import_symbol(request, symbol, todo, parts, import_to, quality, report)
                report["instruments"][f"{nautilus_name(symbol)}.{VENUE}"] = found
                s.advance()
        report["counts"] = dict(sum((Counter(c) for c in report["instruments"].values()), Counter()))
        report["moved"] = quality.pop("moved", 0)
        report["quality"] = {k: v for k, v in sorted(quality.items()) if v}
        report["versions"] = {p: version(p) for p in ("nautilus_trader", "polygon-api-client", "pyarrow")}
        (import_to / "cift.json").write_text(json.dumps(report, indent=1))
        if out.exists():
            out.rmdir()  # an empty folder; anything else was refused or is an error
        import_to.replace(out)
    except BaseException:
        shutil.rmtree(import_to, ignore_errors=True)
        raise
    return report


def nautilus_name(symbol: str) -> str:
    return symbol.removeprefix("X:").replace("-", "") if symbol.startswith("X:") else symbol


def _import_symbol(
    request: Request, symbol: str, todo: list[Want], parts: Path, root: Path, quality: Counter[str], report: dict[str, Any]
) -> dict[str, int]:
    equity = not symbol.startswith("X:")
    files: dict[str, list[Path]] = {}
    for w in todo:
        if w.symbol == symbol:
            found = sorted(w.folder(parts).glob("*.parquet"))
            files.setdefault(w.kind, []).extend(found)
            report["sources"] |= {str(f.relative_to(parts)): f.stem[6:] for f in found}
    details = json.loads((parts / symbol.replace(":", "_") / "ticker.json").read_text())
    name = f"{nautilus_name(symbol)}.{VENUE}"
    digits = (EQUITY_PRECISION, 0) if equity else _precisions(files)
    about = {"instrument_id": name, "price_precision": str(digits[0]), "size_precision": str(digits[1])}
    q_out = _Ticks(root, "quotes", name, _SCHEMAS["quotes"], {**about, "type_name": "QuoteTick"})
    t_out = _Ticks(root, "trades", name, _SCHEMAS["trades"], {**about, "type_name": "TradeTick"})
    price_unit, size_unit = 10 ** (9 - digits[0]), 10 ** (9 - digits[1])
    lot = int(details.get("round_lot") or 100)
    grid = np.zeros(3, np.int64)  # quoted prices: all, on half cents, on cents

    for q in quotes(files.get("quotes", ()), quality, lot=lot, equity=equity):
        q = _within(q, request)
        bid, ask = (_rounded(q[c], price_unit, quality) for c in ("bid", "ask"))
        for p in (bid, ask):
            grid += len(p), int((p % 5_000_000 == 0).sum()), int((p % 10_000_000 == 0).sum())
        sizes = [_decimals(q[c] // size_unit * size_unit) for c in ("bid_size", "ask_size")]
        q_out.write(q["ts_init"], [_decimals(bid), _decimals(ask), *sizes, _when(q["ts_event"]), _when(q["ts_init"])])
    q_out.close()

    quoted = quotes(files.get("quotes", ()), Counter(), lot=lot, equity=equity) if equity else None
    words = pa.array(["NO_AGGRESSOR", "BUY", "SELL"])
    for a in trades(files.get("trades", ()), quality, quoted, equity=equity):
        a = _within(a, request)
        size = a["size"] // size_unit * size_unit
        quality["fractional_sizes"] += int((size != a["size"]).sum())
        a, size = a[size > 0], size[size > 0]
        side = pa.DictionaryArray.from_arrays(pa.array(np.where(a["side"] < 0, 2, a["side"]).astype(np.int8)), words)
        for word, n in zip(("none", "buy", "sell"), np.bincount(a["side"] % 3, minlength=3)):
            quality[f"aggressor_{word}"] += int(n)
        ids = pa.array([f"{i or k}" for k, i in enumerate(a["id"].tolist(), t_out.rows)], pa.string())
        columns = [_decimals(_rounded(a["price"], price_unit, quality)), _decimals(size), side, ids]
        t_out.write(a["ts_init"], [*columns, _when(a["ts_event"]), _when(a["ts_init"])])
    t_out.close()

    counts = {"quotes": q_out.rows, "trades": t_out.rows}
    for kind in sorted(set(files) - {"quotes", "trades"}):
        counts[f"bars_{kind}"] = _import_bars(request, kind, files[kind], root, name, about, (price_unit, size_unit), equity)
    if not any(counts.values()):
        span = f"between {utc(request.start)} and {utc(request.end)}"
        raise InputError(f"Polygon has no {' or '.join(request.kinds)} of {symbol} {span}: change the range")
    tick = dict(request.ticks).get(symbol) or (equity_tick(grid) if equity else str(Decimal(1).scaleb(-digits[0])))
    _write_instrument(root, symbol, details, digits, tick, [f for f in request.fees if f[0] in (symbol, "*")])
    return counts


def _within(rows: np.ndarray, request: Request) -> np.ndarray:
    return rows[(rows["ts_init"] >= request.start) & (rows["ts_init"] <= request.end)]


def _rounded(v: np.ndarray, unit: int, quality: Counter[str]) -> np.ndarray:
    whole, rest = np.divmod(v, unit)
    quality["rounded_prices"] += int((rest != 0).sum())
    return (whole + ((2 * rest > unit) | ((2 * rest == unit) & (whole % 2 == 1)))) * unit


def equity_tick(grid: Sequence[int] | np.ndarray) -> str:
    """A cent, half a cent or a hundredth of one: the coarsest on which 99.9 % of the quoted prices lie (0.01 where nothing was quoted)."""
    if grid[2] >= 0.999 * grid[0]:
        return "0.01"
    return "0.005" if grid[1] >= 0.999 * grid[0] else "0.0001"


def _precisions(files: dict[str, list[Path]]) -> tuple[int, int]:
    worst = [0, 0]
    for kind, paths in files.items():
        names = (("price",), ("size",)) if kind == "trades" else (("open", "high", "low", "close"), ("volume",))
        for f in paths:
            table = pq.read_table(f, columns=[*names[0], *names[1]])
            for k, columns in enumerate(names):
                for c in columns:
                    v = table[c].to_numpy()
                    while worst[k] < 9 and (v % 10 ** (9 - worst[k])).any():
                        worst[k] += 1
    return worst[0], worst[1]


def _import_bars(
    request: Request, kind: str, files: list[Path], root: Path, name: str, about: dict[str, str], units: tuple[int, int], equity: bool
) -> int:
    """Bars are known when their window ends: both stamps are its end (days: the next midnight)."""
    many, span = kind.split("-")
    bar_type = f"{name}-{many}-{span.upper()}-LAST-EXTERNAL"
    out = _Ticks(root, "bars", bar_type, _SCHEMAS["bars"], {"bar_type": bar_type, **about, "type_name": "Bar"})
    width = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}[span] * int(many) * 1_000_000_000
    newest = 0
    for t in _tables(files):
        start = t["start_ms"].to_numpy() * 1_000_000
        end = start + width
        if span == "day" and equity:
            days = [dt.datetime.fromtimestamp(s // 1_000_000_000, NEW_YORK).date() + dt.timedelta(int(many)) for s in start.tolist()]
            end = np.array([midnight(d, NEW_YORK) for d in days], np.int64)
        order = np.argsort(end, kind="stable")
        keep = order[(end[order] >= request.start) & (end[order] <= request.end) & (end[order] > newest)]
        keep = keep[np.concatenate([[True], np.diff(end[keep]) > 0])] if len(keep) else keep
        prices = [_decimals(_rounded(t[c].to_numpy()[keep], units[0], Counter())) for c in ("open", "high", "low", "close")]
        volume = t["volume"].to_numpy()[keep] // units[1] * units[1]
        out.write(end[keep], [*prices, _decimals(volume), _when(end[keep]), _when(end[keep])])
        newest = int(end[keep][-1]) if len(keep) else newest
    out.close()
    return out.rows


def _write_instrument(
    root: Path, symbol: str, details: dict[str, Any], digits: tuple[int, int], tick: str, fees: list[tuple[str, str, float]]
) -> None:
    from nautilus_trader.model import Currency, CurrencyPair, Equity, InstrumentId, Price, Quantity, Symbol
    from nautilus_trader.persistence import ParquetDataCatalog

    equity = not symbol.startswith("X:")
    extras: dict[str, Any] = {
        "kind": "equity" if equity else "currency_pair",
        "session": "09:30-16:00 America/New_York" if equity else None,
        **{name: value for of, name, value in sorted(fees, key=lambda f: f[0] != "*")},
    }
    info = {"cift": extras, "polygon": {k: details[k] for k in ("name", "primary_exchange", "type", "sic_code") if details.get(k)}}
    ids = InstrumentId.from_str(f"{nautilus_name(symbol)}.{VENUE}"), Symbol(symbol)
    increment = Price.from_str(f"{Decimal(tick):.{digits[0]}f}")
    made: Any
    if equity:
        money = Currency.from_str(str(details.get("currency_name") or "usd").upper())
        made = Equity(*ids, money, digits[0], increment, 0, 0, lot_size=Quantity.from_int(1), info=info)
    else:
        base, _, quote = symbol[2:].partition("-")
        if not quote:
            raise InputError(f"{symbol}: write the pair with a dash, as in X:BTC-USD")
        step = Quantity.from_str(f"{Decimal(1).scaleb(-digits[1]):.{digits[1]}f}")
        made = CurrencyPair(*ids, Currency.from_str(base), Currency.from_str(quote), *digits, increment, step, 0, 0, info=info)
    ParquetDataCatalog(str(root.resolve())).write_instruments([made])
