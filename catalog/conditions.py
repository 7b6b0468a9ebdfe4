"""What the consolidated tape's codes of trades mean, and since when quotes are in shares; for history and live data alike."""

from __future__ import annotations

import datetime as dt
from typing import Final
from zoneinfo import ZoneInfo

# NBBO sizes are shares from here on (SEC Release 34-101070), ns UTC
SHARES_SINCE: Final = int(dt.datetime(2025, 11, 3, tzinfo=ZoneInfo("America/New_York")).timestamp()) * 1_000_000_000

# Sale conditions of prints that say nothing about the market now: by the consolidated rules of CTA and UTP none sets the last price.
NOT_TRADES: Final = {
    2: "average price", 5: "bunched sold", 7: "cash sale", 10: "derivatively priced", 13: "extended hours, sold out of sequence",
    15: "market center official close", 16: "market center official open", 20: "next day", 21: "price variation",
    22: "prior reference price", 29: "seller", 32: "sold, out of sequence", 33: "sold, out of sequence, stopped stock",
    38: "corrected consolidated close", 52: "contingent", 53: "qualified contingent",
}  # fmt: skip
AUCTIONS: Final = {
    8: "closing prints", 9: "cross", 17: "opening", 18: "reopening", 19: "closing", 25: "opening prints", 28: "reopening prints"
}  # fmt: skip
SWEEP: Final = 14  # intermarket sweep order
# Correction indicators of messages about an earlier print. The print itself (1 corrected, 7 and 8 cancelled later) stays: it was seen.
CORRECTIONS: Final = (10, 11, 12)
TRF_EXCHANGE: Final = 4  # FINRA's trade reporting facilities; with a TRF id: executed off exchange
