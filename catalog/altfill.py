"""What Polygon offers of the 27 alternative features, fetched and turned into rows of the table of :mod:`catalog.altdata`.

Takes symbols and a range (ns UTC), gives a Table and, per group that the plan does not include, why it was left out. No row is known
before its source could have told it: windows at their end, articles a minute after publication, closes a quarter of an hour after,
treasury yields the next morning, chain snapshots when they were received.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import math
import re
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from catalog import altdata
from catalog.altdata import ALL, FEATURES, INDEX, Table
from catalog.errors import InputError
from catalog.polygon import NEW_YORK, PAGE, Refused, Rest, download, midnight, wants
from catalog.progress import Steps
from catalog.tape import quotes, trades

Row = tuple[str, str, float, int, int]  # instrument, feature, value, ts_event, ts_known
S: Final = 1_000_000_000
DAY: Final = 86_400 * S
GROUPS: Final = ("options", "news", "earnings", "large trades", "macro")
WINDOW: Final = 300 * S
BLOCK_SHARES, BLOCK_CURRENCY, LARGE_CURRENCY = 10_000, 200_000, 50_000
SWEEP_GAP: Final = 1_000_000  # ns
STRIKES, EXPIRY_DAYS, USUAL_DAYS = 0.3, 60, 20
DOLLAR: Final = {"EURUSD": -0.576, "USDJPY": 0.136, "GBPUSD": -0.119, "USDCAD": 0.091, "USDSEK": 0.042, "USDCHF": 0.036}  # ICE's weights


def fill(
    rest: Rest, symbols: Sequence[str], start: int, end: int, *, groups: Sequence[str] = GROUPS, parts: Path | None = None,
    sectors: Mapping[str, str] | None = None, past: Table | None = None, now: int | None = None,
) -> tuple[Table, dict[str, str]]:  # fmt: skip
    """Rows known in [start, end], and {group: why} for what the plan leaves out.

    `parts`: folder of downloaded quotes and trades (:func:`catalog.polygon.download`; needed for "large trades", filled where something
    is missing) and of what each finished request of a past range gave, so that an interrupted filling goes on where it stopped.
    `sectors`: fund of each symbol's sector, {"AAPL": "XLK"}. `past`: rows recorded before, for iv_rank. `now`: ns UTC, the time of asking;
    snapshots are taken when it lies in the range. Raises InputError as the client does, except for plans.
    """
    if unknown := [g for g in groups if g not in GROUPS]:
        raise InputError(f"{unknown[0]!r} is no group of alternative data: the groups are {', '.join(GROUPS)}")
    if "large trades" in groups and parts is None:
        raise InputError("large trades need a folder for the downloaded trades: give parts")
    at = time.time_ns() if now is None else now
    until = min(end, at)
    work: list[tuple[str, str, Callable[[], Iterable[Row]]]] = []
    for s in symbols:
        work.append(("options", f"option volume of {s}", partial(option_volume, rest, s, start, until)))
        if start <= at <= end:
            work.append(("options", f"option chain of {s}", partial(option_chain, rest, s, at, past)))
        work.append(("news", f"news of {s}", partial(news, rest, s, start, until)))
        work.append(("earnings", f"earnings of {s}", partial(earnings, rest, s, start, end, at)))
        if parts is not None:
            work.append(("large trades", f"large trades of {s}", partial(_tape, rest, s, start, until, parts)))
    work.append(("macro", "macro", partial(macro, rest, start, until)))
    if sectors:
        work.append(("macro", f"sectors {sorted(sectors.items())}", partial(sector_returns, rest, sectors, start, until)))
    kept = parts / "alternative" if parts is not None and end < at else None
    rows: list[Row] = []
    left: dict[str, str] = {}
    for group, what, rows_of in work:
        if group in groups:
            try:
                rows += _once(kept, f"{what} from {start} to {end}", lambda: (r for r in rows_of() if start <= r[4] <= end))  # noqa: B023
            except Refused as e:
                if e.status != 403:
                    raise
                left[group] = str(e)
    return altdata.table(rows, "Polygon's rows"), left


def _once(kept: Path | None, what: str, rows_of: Callable[[], Iterable[Row]]) -> list[Row]:
    """The rows, asked for with progress, or found in `kept` from an earlier asking."""
    place = None if kept is None else kept / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}.parquet"
    if place is not None and place.is_file():
        return altdata.read(place).rows()
    print(f"Polygon: {what.partition(' from ')[0]}", file=sys.stderr, flush=True)
    rows = list(rows_of())
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        altdata.write(altdata.table(rows), place)
    return rows


def _delay(feature: str) -> int:
    return int(FEATURES[INDEX[feature]].delay_s) * S


def _at(day: dt.date, hour: int, minute: int = 0) -> int:
    return int(dt.datetime(day.year, day.month, day.day, hour, minute, tzinfo=NEW_YORK).timestamp()) * S


def _day(ns: int, zone: dt.tzinfo = NEW_YORK) -> dt.date:
    return dt.datetime.fromtimestamp(ns // S, zone).date()


# --- large trades ---------------------------------------------------------------------------------------------------------------------


def large_trades(symbol: str, blocks: Iterable[NDArray[Any]], window: int = WINDOW) -> Iterator[Row]:
    """The six features of large trades per window of `window` ns, from blocks of :data:`catalog.tape.TRADE` in order of `ts_init`.

    A window is [k, k + 1) windows since 1970 by SIP stamp and known at its end. Windows without trades give no row.
    """
    held: list[NDArray[Any]] = []
    for a in blocks:
        if not len(a):
            continue
        held.append(a)
        if held[0]["ts_init"][0] // window != a["ts_init"][-1] // window:
            both = np.concatenate(held)
            of = both["ts_init"] // window
            cuts = np.flatnonzero(np.diff(of)) + 1
            for part in np.split(both, cuts)[:-1]:
                yield from _window(symbol, part, window)
            held = [both[cuts[-1] :]]
    if held:
        yield from _window(symbol, np.concatenate(held), window)


def _window(symbol: str, a: NDArray[Any], window: int) -> Iterator[Row]:
    size, side = a["size"] / 1e9, a["side"].astype(np.float64)
    money = size * (a["price"] / 1e9)
    block = (size >= BLOCK_SHARES) | (money >= BLOCK_CURRENCY)
    large = (money >= LARGE_CURRENCY) & ~block

    def net(which: NDArray[np.bool_]) -> float:
        volume = size[which].sum()
        return float((side[which] * size[which]).sum() / volume) if volume > 0 else 0.0

    end = (int(a["ts_init"][0]) // window + 1) * window
    values = {
        "dark_pool_share": float(size[a["dark"]].sum() / size.sum()),
        "dark_pool_net_side": net(a["dark"]),
        "block_count": float(block.sum()),
        "block_imbalance": net(block),
        "large_order_imbalance": net(large),
        "sweep_count": float(_sweeps(a[a["sweep"] & (a["side"] != 0)])),
    }
    for name, value in values.items():
        yield symbol, name, value, end, end + _delay(name)


def _sweeps(a: NDArray[Any]) -> int:
    if len(a) < 2:
        return 0
    new = (np.diff(a["ts_init"]) > SWEEP_GAP) | (np.diff(a["side"]) != 0)
    run = np.concatenate([[0], np.cumsum(new)])
    venues = np.unique(np.stack([run, a["exchange"]]), axis=1)[0]
    return int((np.bincount(venues) >= 2).sum())


def _tape(rest: Rest, symbol: str, start: int, end: int, parts: Path) -> Iterator[Row]:
    todo = wants((symbol,), start - WINDOW, end, ("quotes", "trades"))
    try:
        files = {kind: download(rest, [w for w in todo if w.kind == kind], parts) for kind in ("trades", "quotes")}
    except Refused as e:
        if e.status != 403 or "quotes" not in str(e):
            raise
        files = {"trades": download(rest, [w for w in todo if w.kind == "trades"], parts), "quotes": []}  # sides by nothing: none
    equity = not symbol.startswith("X:")
    quoted = quotes(files["quotes"], Counter(), equity=equity)
    for row in large_trades(symbol, trades(files["trades"], Counter(), quoted, equity=equity)):
        if row[3] <= end and (files["quotes"] or not equity or row[1] in ("dark_pool_share", "block_count")):
            yield row


# --- options --------------------------------------------------------------------------------------------------------------------------


def option_chain(rest: Rest, symbol: str, now: int, past: Table | None = None) -> Iterator[Row]:
    """What the chain says at `now`: open interest, gamma, implied volatilities. The service keeps no past of it."""
    chain = [c for page in rest.pages("list_snapshot_options_chain", symbol, params={"limit": 250}) for c in page]
    today = _day(now)
    open_, gamma = {"put": 0.0, "call": 0.0}, 0.0
    smiles: dict[int, list[tuple[str, float, float, float]]] = defaultdict(list)  # days to expiry: type, strike, volatility, delta
    spot, newest = math.nan, 0
    for c in chain:
        what, greeks, under = c.get("details") or {}, c.get("greeks") or {}, c.get("underlying_asset") or {}
        kind, interest = str(what.get("contract_type")), float(c.get("open_interest") or 0)
        if kind not in open_:
            continue
        spot = float(under.get("price") or under.get("value") or spot)
        newest = max(newest, min(now, int(under.get("last_updated") or 0)))
        open_[kind] += interest
        gamma += (1 if kind == "call" else -1) * float(greeks.get("gamma") or 0) * interest * float(what.get("shares_per_contract") or 100)
        if c.get("implied_volatility"):
            days = (dt.date.fromisoformat(what["expiration_date"]) - today).days
            smiles[days].append((kind, float(what["strike_price"]), float(c["implied_volatility"]), float(greeks.get("delta") or math.nan)))
    event = newest or now
    if open_["call"]:
        session = today - dt.timedelta(1)
        while session.weekday() > 4:
            session -= dt.timedelta(1)
        yield symbol, "put_call_open_interest", open_["put"] / open_["call"], min(_at(session, 16), now), now
    if not spot > 0:
        return
    yield symbol, "net_gamma_exposure", gamma * spot * spot * 0.01, event, now
    atm = {days: v for days, smile in smiles.items() if days > 0 and (v := _at_the_money(smile, spot)) > 0}
    near, far = _at_days(atm, 30), _at_days(atm, 90)
    if near > 0:
        yield symbol, "atm_iv", near, event, now
        history = _daily(past, symbol, "atm_iv", now - 365 * DAY, now)
        if len(history) >= 20:
            low, high = min(*history, near), max(*history, near)
            yield symbol, "iv_rank", (near - low) / (high - low) if high > low else 0.5, event, now
        if far > 0:
            yield symbol, "iv_term_slope", far - near, event, now
    if smiles and (skew := _skew(smiles[min(smiles, key=lambda d: (abs(d - 30), d))])) is not None:
        yield symbol, "skew_25d", skew, event, now


def _at_the_money(smile: list[tuple[str, float, float, float]], spot: float) -> float:
    """Implied volatility at `spot`, linear in strike; puts and calls of a strike averaged. NaN where the strikes do not surround it."""
    by_strike: dict[float, list[float]] = defaultdict(list)
    for _, strike, iv, _ in smile:
        by_strike[strike].append(iv)
    strikes = sorted(by_strike)
    if not strikes or not strikes[0] <= spot <= strikes[-1]:
        return math.nan
    return float(np.interp(spot, strikes, [float(np.mean(by_strike[k])) for k in strikes]))


def _at_days(atm: dict[int, float], days: int) -> float:
    """Linear in total variance between the expiries around `days`; the nearest alone where it is within a third of it; else NaN."""
    terms = sorted(atm)
    if terms and terms[0] <= days <= terms[-1]:
        return math.sqrt(float(np.interp(days, terms, [atm[t] ** 2 * t for t in terms])) / days)
    nearest = min(terms, key=lambda t: abs(t - days), default=0)
    return atm[nearest] if nearest and abs(nearest - days) <= days / 3 else math.nan


def _skew(smile: list[tuple[str, float, float, float]]) -> float | None:
    found = {}
    for kind, at in (("put", -0.25), ("call", 0.25)):
        points = sorted((d, iv) for k, _, iv, d in smile if k == kind and not math.isnan(d))
        if not points or not points[0][0] <= at <= points[-1][0]:
            return None
        found[kind] = float(np.interp(at, [d for d, _ in points], [iv for _, iv in points]))
    return found["put"] - found["call"]


def _daily(past: Table | None, symbol: str, feature: str, start: int, end: int) -> list[float]:
    """The last value known of each New York day in [start, end)."""
    days = {}
    if past is not None and symbol in past.names:
        of = (past.instrument == past.names.index(symbol)) & (past.feature == INDEX[feature])
        for known, value in zip(past.ts_known[of].tolist(), past.value[of].tolist()):
            if start <= known < end:
                days[_day(known)] = value
    return list(days.values())


def option_volume(rest: Rest, symbol: str, start: int, end: int) -> Iterator[Row]:
    """put_call_volume and unusual_volume of each day, from the daily bars of the contracts: one request per contract.

    A contract counts on a day by what was known then: expiry within 60 days, strike within 30 % of the close of the day before.
    """
    first, last = _day(start) - dt.timedelta(USUAL_DAYS * 7 // 5 + 12), _day(end)
    closes = {_day(b["t"] * 1_000_000): float(b["c"]) for b in _bars(rest, symbol, first - dt.timedelta(7), last)}
    if not closes:
        return
    band = {"strike_price_gte": min(closes.values()) * (1 - STRIKES), "strike_price_lte": max(closes.values()) * (1 + STRIKES)}
    expiries = {"expiration_date_gte": first.isoformat(), "expiration_date_lte": (last + dt.timedelta(EXPIRY_DAYS)).isoformat()}
    contracts: dict[str, dict[str, Any]] = {}
    for expired in (True, False):
        for page in rest.pages("list_options_contracts", underlying_ticker=symbol, expired=expired, limit=1000, **band, **expiries):
            contracts |= {c["ticker"]: c for c in page}
    before = dict(zip(sorted(closes)[1:], (closes[d] for d in sorted(closes))))
    volume: dict[dt.date, Counter[str]] = defaultdict(Counter)
    with Steps(f"option contracts of {symbol}", len(contracts), "contracts") as s:
        for c in contracts.values():
            expiry = dt.date.fromisoformat(c["expiration_date"])
            for b in _bars(rest, c["ticker"], max(first, expiry - dt.timedelta(EXPIRY_DAYS)), min(last, expiry)):
                day = _day(b["t"] * 1_000_000)
                if day in before and abs(float(c["strike_price"]) / before[day] - 1) <= STRIKES and 0 <= (expiry - day).days <= EXPIRY_DAYS:
                    volume[day][c["contract_type"]] += b["v"]
            s.advance()
    usual: deque[float] = deque(maxlen=USUAL_DAYS)
    for day in sorted(volume):
        event = _at(day, 16, 15)
        if event > end:
            break
        total = float(volume[day]["put"] + volume[day]["call"])
        if volume[day]["call"]:
            yield symbol, "put_call_volume", volume[day]["put"] / volume[day]["call"], event, event + _delay("put_call_volume")
        if len(usual) == USUAL_DAYS and sum(usual) > 0:
            yield symbol, "unusual_volume", total * USUAL_DAYS / sum(usual), event, event + _delay("unusual_volume")
        usual.append(total)


# --- news and earnings ----------------------------------------------------------------------------------------------------------------


def news(rest: Rest, symbol: str, start: int, end: int) -> Iterator[Row]:
    """Sentiment, count and novelty at each article and when one leaves the window of 24 hours.

    The service's sentiments of old articles were added later by a model that may know what followed: history flatters them.
    """
    asked = {"published_utc_gte": _iso(start - 4 * DAY), "published_utc_lte": _iso(end), "order": "asc", "sort": "published_utc"}
    articles = []
    for page in rest.pages("list_ticker_news", symbol, limit=1000, **asked):
        for a in page:
            mood = next((i.get("sentiment") for i in a.get("insights") or [] if i.get("ticker") == symbol), None)
            score = {"positive": 1.0, "neutral": 0.0, "negative": -1.0}.get(str(mood))
            articles.append((_parse(a["published_utc"]), score, frozenset(re.findall(r"[a-z0-9]+", str(a.get("title")).lower()))))
    articles.sort(key=lambda a: a[0])
    marks = sorted({a[0] for a in articles} | {a[0] + DAY for a in articles})
    oldest = new = 0
    for ts in marks:
        if ts > end:
            break
        while new < len(articles) and articles[new][0] <= ts:
            new += 1
        while oldest < new and articles[oldest][0] <= ts - DAY:
            oldest += 1
        scores = [s for _, s, _ in articles[oldest:new] if s is not None]
        known = ts + _delay("news_count")
        yield symbol, "news_count", float(new - oldest), ts, known
        if scores or new == oldest:
            yield symbol, "news_sentiment", float(np.mean(scores)) if scores else 0.0, ts, known
        if new and articles[new - 1][0] == ts:
            words = articles[new - 1][2]
            before = [w for t, _, w in articles[: new - 1] if t > ts - 3 * DAY]
            alike = max((len(words & w) / len(words | w) for w in before if words | w), default=0.0)
            yield symbol, "news_novelty", 1.0 - alike, ts, known


def earnings(rest: Rest, symbol: str, start: int, end: int, now: int) -> Iterator[Row]:
    """earnings_surprise of reports in the range, and days_to_earnings as of `now`, from the earnings calendar (an add-on of the plan).

    The calendar's clock is taken as UTC; a surprise is known when its record was last changed, which may be late but is never early.
    """
    span = {"date_gte": _day(start - 120 * DAY).isoformat(), "date_lte": (_day(max(end, now)) + dt.timedelta(370)).isoformat()}
    ahead = []
    for page in rest.pages("list_benzinga_earnings", ticker=symbol, limit=1000, **span):
        for e in page:
            day = dt.date.fromisoformat(e["date"])
            clock = dt.time.fromisoformat(e["time"]) if e.get("time") else dt.time(23, 59)
            event = _parse(f"{day}T{clock}")
            if e.get("actual_eps") is None:
                if day >= _day(now):
                    ahead.append((day - _day(now)).days)
            elif e.get("estimated_eps") and event <= now and e.get("last_updated"):
                surprise = (float(e["actual_eps"]) - float(e["estimated_eps"])) / abs(float(e["estimated_eps"]))
                yield symbol, "earnings_surprise", surprise, event, max(event, _parse(e["last_updated"]))
    if ahead and min(ahead) <= 400:
        yield symbol, "days_to_earnings", float(min(ahead)), now, now


# --- macro ----------------------------------------------------------------------------------------------------------------------------


def macro(rest: Rest, start: int, end: int) -> Iterator[Row]:
    """VIX, treasury yields and the dollar, for all instruments."""
    first, last = _day(start) - dt.timedelta(10), _day(end)
    previous = math.nan
    for b in _bars(rest, "I:VIX", first, last):
        event = _at(_day(b["t"] * 1_000_000), 16, 15)
        if event <= end:
            yield ALL, "vix", float(b["c"]), event, event + _delay("vix")
            if previous > 0:
                yield ALL, "vix_change", float(b["c"]) - previous, event, event + _delay("vix_change")
            previous = float(b["c"])
    previous = math.nan
    yields = rest.pages("list_treasury_yields", date_gte=first.isoformat(), date_lte=last.isoformat(), sort="date.asc", limit=50_000)
    for y in sorted((y for page in yields for y in page), key=lambda y: str(y["date"])):
        day = dt.date.fromisoformat(y["date"])
        event, known = _at(day, 15, 30), _at(day + dt.timedelta(1), 8)
        ten, two = y.get("yield_10_year"), y.get("yield_2_year")
        if ten is not None and event <= end:
            if not math.isnan(previous):
                yield ALL, "us10y_change", ten - previous, event, known
            previous = float(ten)
            if two is not None:
                yield ALL, "yield_slope", ten - two, event, known
    logs = {
        pair: {_day(b["t"] * 1_000_000, dt.UTC): math.log(b["c"]) for b in _bars(rest, f"C:{pair}", first, last, dt.UTC) if b["c"] > 0}
        for pair in DOLLAR
    }
    days = sorted(set.intersection(*(set(v) for v in logs.values())))
    for before, day in pairwise(days):
        event = midnight(day + dt.timedelta(1), dt.UTC)
        if event <= end:
            change = sum(w * (logs[pair][day] - logs[pair][before]) for pair, w in DOLLAR.items())
            yield ALL, "dollar_change", change, event, event + _delay("dollar_change")


def sector_returns(rest: Rest, sectors: Mapping[str, str], start: int, end: int) -> Iterator[Row]:
    """sector_return of each symbol of `sectors` ({symbol: fund})."""
    for fund in sorted(set(sectors.values())):
        previous = math.nan
        for b in _bars(rest, fund, _day(start) - dt.timedelta(10), _day(end)):
            event = _at(_day(b["t"] * 1_000_000), 16)
            if event <= end and b["c"] > 0:
                for symbol in (s for s, f in sectors.items() if f == fund and previous > 0):
                    yield symbol, "sector_return", math.log(b["c"] / previous), event, event + _delay("sector_return")
                previous = float(b["c"])


def _bars(rest: Rest, ticker: str, first: dt.date, last: dt.date, zone: dt.tzinfo = NEW_YORK) -> list[dict[str, Any]]:
    """Unadjusted daily bars of [first, last], oldest first."""
    if first > last:
        return []
    ms = midnight(first, zone) // 1_000_000, midnight(last + dt.timedelta(1), zone) // 1_000_000 - 1
    pages = rest.pages("list_aggs", ticker, 1, "day", *ms, adjusted=False, sort="asc", limit=PAGE)
    return sorted((b for page in pages for b in page if b.get("c") is not None), key=lambda b: int(b["t"]))


def _parse(text: str) -> int:
    """ISO 8601, UTC where it has no zone -> ns, cut to whole seconds."""
    t = dt.datetime.fromisoformat(text)
    return int((t if t.tzinfo else t.replace(tzinfo=dt.UTC)).timestamp()) * S


def _iso(ns: int) -> str:
    return dt.datetime.fromtimestamp(ns // S, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
