"""The features by name: what each means, its unit, where it comes from, and the feed it needs.

The kernel in :mod:`cift_models.features` fills the columns in this order; `docs/features.md` is made from this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Feature:
    """One column of the feature rows."""

    name: str
    unit: str
    group: str
    definition: str
    citation: str  # keys of PAPERS
    needs: int = 1  # feed: 1 best bid and offer (and trades), 2 price levels, 3 orders; NaN on a lesser feed
    model_input: bool = True  # free of the instrument's scale and place, so that a model may learn from it


PAPERS: Final = {
    "huang1997": "Huang & Stoll 1997, The components of the bid-ask spread: a general approach",
    "gould2016": "Gould & Bonart 2016, Queue imbalance as a one-tick-ahead price predictor in a limit order book",
    "cao2009": "Cao, Hansch & Wang 2009, The information content of an open limit-order book",
    "naes2006": "Naes & Skjeltorp 2006, Order book characteristics and the volume-volatility relation",
    "cont2010": "Cont, Stoikov & Talreja 2010, A stochastic model for order book dynamics",
    "biais1995": "Biais, Hillion & Spatt 1995, An empirical analysis of the limit order book and the order flow in the Paris Bourse",
    "stoikov2018": "Stoikov 2018, The micro-price: a high-frequency estimator of future prices",
    "cont2014": "Cont, Kukanov & Stoikov 2014, The price impact of order book events",
    "xu2018": "Xu, Gould & Howison 2018, Multi-level order-flow imbalance in a limit order book",
    "cont2023": "Cont, Cucuringu & Zhang 2023, Cross-impact of order flow imbalance in equity markets (scaling by mean depth)",
    "cartea2015": "Cartea, Jaimungal & Penalva 2015, Algorithmic and high-frequency trading, ch. 12",
    "bacry2015": "Bacry, Mastromatteo & Muzy 2015, Hawkes processes in finance (exponential kernels)",
    "toke2020": "Muni Toke & Yoshida 2020, Analyzing order flows in limit order books with ratios of Cox-type intensities",
    "admati1988": "Admati & Pfleiderer 1988, A theory of intraday patterns: volume and price variability",
    "chakravarty2012": "Chakravarty, Jain, Upson & Wood 2012, Clean sweep: informed trading through intermarket sweep orders",
    "easley2012": "Easley, Lopez de Prado & O'Hara 2012, Flow toxicity and liquidity in a high-frequency world",
    "kyle1985": "Kyle 1985, Continuous auctions and insider trading",
    "hasbrouck2009": "Hasbrouck 2009, Trading costs and returns for U.S. equities (lambda as a regression slope)",
    "amihud2002": "Amihud 2002, Illiquidity and stock returns: cross-section and time-series effects",
    "dacorogna2001": "Dacorogna, Gencay, Muller, Olsen & Pictet 2001, An introduction to high-frequency finance, ch. 3",
    "andersen2003": "Andersen, Bollerslev, Diebold & Labys 2003, Modeling and forecasting realized volatility",
    "zhou1996": "Zhou 1996, High-frequency data and volatility in foreign-exchange rates",
    "hansen2006": "Hansen & Lunde 2006, Realized variance and market microstructure noise",
    "barndorff2010": "Barndorff-Nielsen, Kinnebrock & Shephard 2010, Measuring downside risk: realised semivariance",
    "patton2015": "Patton & Sheppard 2015, Good volatility, bad volatility: signed jumps and the persistence of volatility",
    "george2004": "George & Hwang 2004, The 52-week high and momentum investing",
    "engle1998": "Engle & Russell 1998, Autoregressive conditional duration: a new model for irregularly spaced transaction data",
}

_SHAPE, _FLOW, _TOXICITY, _PRICE, _TIME = "book shape", "flow", "toxicity and impact", "price", "time"

FEATURES: Final = (
    Feature("mid", "price", _SHAPE, "(best bid + best ask) / 2; a reference, not a model input", "huang1997", 1, False),
    Feature("spread", "ticks", _SHAPE, "best ask - best bid", "huang1997"),
    Feature(
        "spread_percentile", "share", _SHAPE,
        "mid-rank of the spread, in whole ticks from 0 to 127, among those of the latest 1,024 settled books",
        "huang1997",
    ),
    Feature("imbalance_1", "-1..1", _SHAPE, "(b - a) / (b + a) of the sizes at the best bid and ask", "gould2016"),
    Feature(
        "imbalance_2", "-1..1", _SHAPE,
        "(b - a) / (b + a) of the sizes at level 2 of each side; NaN where either has fewer",
        "cao2009", 2,
    ),
    Feature(
        "imbalance_3", "-1..1", _SHAPE,
        "(b - a) / (b + a) of the sizes at level 3 of each side; NaN where either has fewer",
        "cao2009", 2,
    ),
    Feature(
        "imbalance_4", "-1..1", _SHAPE,
        "(b - a) / (b + a) of the sizes at level 4 of each side; NaN where either has fewer",
        "cao2009", 2,
    ),
    Feature(
        "imbalance_5", "-1..1", _SHAPE,
        "(b - a) / (b + a) of the sizes at level 5 of each side; NaN where either has fewer",
        "cao2009", 2,
    ),
    Feature(
        "imbalance_top5", "-1..1", _SHAPE,
        "(B - A) / (B + A) of the sizes summed over the best 5 levels (fewer where there are fewer)",
        "cao2009", 2,
    ),
    Feature(
        "imbalance_top10", "-1..1", _SHAPE,
        "(B - A) / (B + A) of the sizes summed over the best 10 levels (fewer where there are fewer)",
        "cao2009", 2,
    ),
    Feature(
        "slope_bid", "1/tick", _SHAPE,
        "bid side: mean over k = 1..4 of size(k + 1) / (size(1) + ... + size(k)) / (ticks between levels k and k + 1); over those that "
        "exist, NaN below two",
        "naes2006", 2,
    ),
    Feature(
        "slope_ask", "1/tick", _SHAPE,
        "ask side: mean over k = 1..4 of size(k + 1) / (size(1) + ... + size(k)) / (ticks between levels k and k + 1); over those that "
        "exist, NaN below two",
        "naes2006", 2,
    ),
    Feature(
        "queue_bid", "0..1", _SHAPE,
        "q / (q + D) of the size q at the best bid; D is the mean best size of both sides over settled books, half-life 64",
        "cont2010",
    ),
    Feature(
        "queue_ask", "0..1", _SHAPE,
        "q / (q + D) of the size q at the best ask; D is the mean best size of both sides over settled books, half-life 64",
        "cont2010",
    ),
    Feature("orders_bid", "orders", _SHAPE, "number of orders at the best bid", "biais1995", 3),
    Feature("orders_ask", "orders", _SHAPE, "number of orders at the best ask", "biais1995", 3),
    Feature("order_imbalance", "-1..1", _SHAPE, "(b - a) / (b + a) of the numbers of orders at the best bid and ask", "biais1995", 3),
    Feature("weighted_mid", "ticks", _SHAPE, "mid weighted by the opposite sizes, minus mid: imbalance_1 * spread / 2", "stoikov2018"),
    Feature(
        "microprice", "ticks", _SHAPE,
        "limit of the expected mid given imbalance and spread, minus mid: G = (R + D G) / (n + 10) over 15 states (5 buckets of "
        "|imbalance|, spread of 1, 2, more ticks; bid and ask pooled by symmetry) of the changes of settled quotes so far, one row of G "
        "solved again at each (asynchronous value iteration); mid moves beyond 100 ticks count as 100; NaN while bid >= ask",
        "stoikov2018",
    ),
    Feature("gap_bid", "ticks", _SHAPE, "distance between the best and the second bid level", "biais1995", 2),
    Feature("gap_ask", "ticks", _SHAPE, "distance between the best and the second ask level", "biais1995", 2),
    Feature(
        "ofi_1", "depths", _FLOW,
        "order flow imbalance at level 1: e = flow of bids - flow of asks, summed with half-life 1 s; in units of the mean size at the "
        "best, as in queue_bid",
        "cont2014",
    ),
    Feature(
        "ofi_2", "depths", _FLOW,
        "order flow imbalance at level 2: e = flow of bids - flow of asks, summed with half-life 1 s; in units of the mean size of the "
        "best 5 levels, decayed likewise",
        "xu2018 cont2023", 2,
    ),
    Feature(
        "ofi_3", "depths", _FLOW,
        "order flow imbalance at level 3: e = flow of bids - flow of asks, summed with half-life 1 s; in units of the mean size of the "
        "best 5 levels, decayed likewise",
        "xu2018 cont2023", 2,
    ),
    Feature(
        "ofi_4", "depths", _FLOW,
        "order flow imbalance at level 4: e = flow of bids - flow of asks, summed with half-life 1 s; in units of the mean size of the "
        "best 5 levels, decayed likewise",
        "xu2018 cont2023", 2,
    ),
    Feature(
        "ofi_5", "depths", _FLOW,
        "order flow imbalance at level 5: e = flow of bids - flow of asks, summed with half-life 1 s; in units of the mean size of the "
        "best 5 levels, decayed likewise",
        "xu2018 cont2023", 2,
    ),
    Feature("ofi_fast", "depths", _FLOW, "as ofi_1, half-life 125 ms", "cont2014"),
    Feature("ofi_slow", "depths", _FLOW, "as ofi_1, half-life 64 s", "cont2014"),
    Feature("ofi_events", "depths", _FLOW, "as ofi_1, half-life 64 events", "cont2014"),
    Feature(
        "trade_imbalance_1s", "-1..1", _FLOW,
        "(B - S) / (B + S) of bought and sold volume by aggressor, half-life 1 s; NaN before the first trade",
        "cartea2015",
    ),
    Feature(
        "trade_imbalance_8s", "-1..1", _FLOW,
        "(B - S) / (B + S) of bought and sold volume by aggressor, half-life 8 s; NaN before the first trade",
        "cartea2015",
    ),
    Feature(
        "trade_imbalance_64s", "-1..1", _FLOW,
        "(B - S) / (B + S) of bought and sold volume by aggressor, half-life 64 s; NaN before the first trade",
        "cartea2015",
    ),
    Feature("rate_buy", "1/s", _FLOW, "trades that lift the ask, per second, half-life 8 s", "bacry2015"),
    Feature("rate_sell", "1/s", _FLOW, "trades that hit the bid, per second, half-life 8 s", "bacry2015"),
    Feature("rate_add", "1/s", _FLOW, "events that add size to the book, per second, half-life 8 s", "bacry2015", 2),
    Feature(
        "rate_cancel", "1/s", _FLOW,
        "events that take size away other than for a trade of the same ts_event and side, per second, half-life 8 s",
        "bacry2015", 2,
    ),
    Feature("share_buy", "0..1", _FLOW, "share of the events counted by rate_buy among all, half-life 64 events", "toke2020"),
    Feature("share_sell", "0..1", _FLOW, "share of the events counted by rate_sell among all, half-life 64 events", "toke2020"),
    Feature("share_add", "0..1", _FLOW, "share of the events counted by rate_add among all, half-life 64 events", "toke2020", 2),
    Feature("share_cancel", "0..1", _FLOW, "share of the events counted by rate_cancel among all, half-life 64 events", "toke2020", 2),
    Feature("add_imbalance", "-1..1", _FLOW, "(b - a) / (b + a) of the sizes added to bids and asks, half-life 1 s", "xu2018 cont2023", 2),
    Feature(
        "cancel_imbalance", "-1..1", _FLOW,
        "(b - a) / (b + a) of the sizes cancelled from bids and asks, half-life 1 s",
        "xu2018 cont2023", 2,
    ),
    Feature("volume_ratio", "0..1", _FLOW, "v / (v + V) of the traded volume per second with half-lives 1 s and 64 s", "admati1988"),
    Feature("trade_through", "trades", _FLOW, "trades beyond the best opposite price shown (a sweep), half-life 8 s", "chakravarty2012"),
    Feature(
        "vpin", "0..1", _TOXICITY,
        "sum of |B - S| over sum of volume of the latest 50 full buckets, by true aggressor; a bucket holds 32 mean trade sizes "
        "(decayed over trades, half-life 256) as of its opening",
        "easley2012",
    ),
    Feature(
        "kyle_lambda", "ticks/trade", _TOXICITY,
        "slope of mid change on signed volume over the latest 128 groups of 8 trades, times the mean trade size there; NaN below 8 "
        "groups",
        "kyle1985 hasbrouck2009",
    ),
    Feature("kyle_lambda_se", "ticks/trade", _TOXICITY, "its standard error (ordinary least squares)", "kyle1985 hasbrouck2009"),
    Feature(
        "amihud", "ticks/trade", _TOXICITY,
        "mean of |mid change| / volume over the same groups, times the mean trade size there",
        "amihud2002",
    ),
    Feature("return_16e", "ticks", _PRICE, "mid minus that of the settled book 16 before", "dacorogna2001"),
    Feature("return_128e", "ticks", _PRICE, "mid minus that of the settled book 128 before", "dacorogna2001"),
    Feature(
        "return_1s", "ticks", _PRICE,
        "mid minus the last mid before a point of the 125 ms grid, 1 s before the end of the current cell",
        "dacorogna2001",
    ),
    Feature(
        "return_8s", "ticks", _PRICE,
        "mid minus the last mid before a point of the 125 ms grid, 8 s before the end of the current cell",
        "dacorogna2001",
    ),
    Feature(
        "return_64s", "ticks", _PRICE,
        "mid minus the last mid before a point of the 125 ms grid, 64 s before the end of the current cell",
        "dacorogna2001",
    ),
    Feature(
        "volatility_8s", "ticks/sqrt(s)", _PRICE,
        "square root of the sum of squared mid changes per second, half-life 8 s",
        "andersen2003",
    ),
    Feature(
        "volatility_64s", "ticks/sqrt(s)", _PRICE,
        "square root of the sum of squared mid changes per second, half-life 64 s",
        "andersen2003",
    ),
    Feature(
        "volatility_robust", "ticks/sqrt(s)", _PRICE,
        "the same with half-life 8 s and twice each product of successive mid changes added (cancels bounce); 0 where that sum is "
        "negative",
        "zhou1996 hansen2006",
    ),
    Feature(
        "signed_jump", "-1..1", _PRICE,
        "(P - N) / (P + N) of squared mid changes up and down, half-life 64 s",
        "barndorff2010 patton2015",
    ),
    Feature("high_distance", "ticks", _PRICE, "session high of the mid minus mid", "george2004"),
    Feature("low_distance", "ticks", _PRICE, "mid minus session low of the mid", "george2004"),
    Feature("seconds_since_open", "s", _TIME, "time since the session's open; negative before it", "admati1988"),
    Feature("time_since_trade", "s", _TIME, "time since the last trade; NaN before the first", "engle1998"),
    Feature("intensity", "1/s", _TIME, "events per second, half-life 1 s", "engle1998"),
    Feature("intensity_ratio", "0..1", _TIME, "r / (r + R) of the event rates with half-lives 1 s and 64 s", "engle1998"),
)

NAMES: Final = tuple(f.name for f in FEATURES)
INPUTS: Final = tuple(i for i, f in enumerate(FEATURES) if f.model_input)  # the columns a model may learn from


_NOTES: Final = """\
{} columns of float64. Needs: 1 best bid and offer with trades, 2 price levels, 3 individual orders. On a lesser feed, and where
book or history cannot tell, a value is NaN; none is ever infinite. Columns in italics are references, not model inputs.

Half-lives in seconds run by `ts_init`, those in events by records, those in trades by trades with an aggressor. The records of
one `ts_event` are one event of the venue; a feed of levels sends many records for it, and the book between them never was. So all
that rolls or decays takes *settled* books: those that changed in their best ten levels, once the next venue event has begun, with
two sides and not crossed; the row itself compares the book as it is now with these. Mid changes, returns and ranges run over
settled mids, order flow from settled book to settled book and on to the present one. Records of a snapshot change the book and
are no flow. Prices are in ticks, sizes relative: no model input knows the instrument's price, tick or lot."""


def features_markdown() -> str:
    """`docs/features.md`, less the newline at its end."""
    lines = [
        "# Features",
        "",
        "One row after each event, from the past alone. Made by `python -m cift_models features`; do not edit.",
        "",
        _NOTES.format(len(FEATURES)),
    ]
    for group in dict.fromkeys(f.group for f in FEATURES):
        lines += ["", f"## {group.capitalize()}", "", "| name | unit | needs | definition | source |", "|---|---|---|---|---|"]
        for f in (f for f in FEATURES if f.group == group):
            name = f"`{f.name}`" if f.model_input else f"*`{f.name}`*"
            definition = f.definition.replace("|", "\\|")
            lines.append(f"| {name} | {f.unit} | {f.needs} | {definition} | {f.citation.replace(' ', ', ')} |")
    lines += ["", "## Sources", ""]
    lines += [f"- {key}: {paper}" for key, paper in PAPERS.items()]
    return "\n".join(lines)
