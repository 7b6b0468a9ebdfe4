"""What programs send and get besides frames: the window to predict from, what to do about it, and the lists of the GET routes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from cift_models.feature_table import NAMES
from cift_strategies.server.schemas import (
    Decision,
    Feed,
    Fill,
    InstrumentInfo,
    MemberState,
    Order,
    Pnl,
    Point,
    Position,
    Prediction,
    RegimeChange,
    Side,
    Stage,
    Told,
    Trade,
    Weights,
    WeightsPoint,
)

EVENTS: Final = 20_000  # of one request
MOST: Final = 9_007_199_254_740_991  # the largest integer that JSON carries exactly everywhere
LATEST: Final = 4_000_000_000_000_000_000  # ns, in 2096; exact as a float too, which is what OpenAPI makes of it
NOW: Final = 1_741_614_600_000_000_000


if TYPE_CHECKING:
    type FeatureName = str
else:
    FeatureName = Literal[NAMES]


class BookEvent(BaseModel):
    """One market-data record, in Databento's terms. Prices in currency, sizes in units."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ts: Annotated[int, Field(ge=0, lt=LATEST, description="when it was known, ns UTC", examples=[NOW])]
    ts_event: Annotated[int | None, Field(ge=0, lt=LATEST, description="the venue's stamp, ns UTC; null: the same")] = None
    action: Annotated[Literal["A", "C", "M", "R", "T"], Field(description="add, cancel, modify, clear, trade")]
    side: Annotated[Side, Field(description="+1 bid or buy aggressor, -1 ask or sell aggressor, 0 none")] = 0
    price: Annotated[float | None, Field(gt=-9e9, lt=9e9, description="null: none (clear)")] = None
    size: Annotated[float, Field(ge=0, lt=9e9)] = 0.0
    order_id: Annotated[int, Field(ge=0, le=MOST, description="0 where the feed has none")] = 0


class FeatureRow(BaseModel):
    """The features of one moment by name; those that are left out are unknown."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ts: Annotated[int, Field(ge=0, lt=LATEST, description="ns UTC", examples=[NOW])]
    values: Annotated[dict[FeatureName, float | None], Field(min_length=1, examples=[{"mid": 100.005, "spread": 1.0}])]


class _Window(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    symbol: Annotated[str, Field(min_length=1, max_length=64, examples=["AAPL.XNAS"])]


class EventsWindow(_Window):
    """Market-data records of one instrument, taken in the order of `ts`, equal ones as given; the prediction is made after the last.

    The book is empty before the first, so let the window begin with what is in it.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "symbol": "AAPL.XNAS",
                    "events": [
                        {"ts": NOW, "action": "A", "side": 1, "price": 100.00, "size": 300, "order_id": 1},
                        {"ts": NOW, "action": "A", "side": -1, "price": 100.01, "size": 200, "order_id": 2},
                        {"ts": NOW + 2_000_000, "action": "T", "side": 1, "price": 100.01, "size": 100},
                        {"ts": NOW + 2_000_001, "action": "C", "side": -1, "price": 100.01, "size": 100, "order_id": 2},
                    ],
                }
            ]
        }
    )

    events: Annotated[list[BookEvent], Field(min_length=1, max_length=EVENTS)]


class FeaturesWindow(_Window):
    """Feature rows of one instrument, taken in the order of `ts`; the prediction is made after the last.

    Members that need events abstain.
    """

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"symbol": "AAPL.XNAS", "features": [{"ts": NOW, "values": {"mid": 100.005, "spread": 1.0}}]}]}
    )

    features: Annotated[list[FeatureRow], Field(min_length=1, max_length=EVENTS)]


def _kind(asked: Any) -> str:
    return "features" if isinstance(asked, FeaturesWindow) or (isinstance(asked, dict) and "features" in asked) else "events"


type PredictRequest = Annotated[
    Annotated[EventsWindow, Tag("events")] | Annotated[FeaturesWindow, Tag("features")], Discriminator(_kind)
]


class Recommendation(Told):
    """What to do about a prediction, after spread and fees. Nothing is ordered by it."""

    should_trade: bool
    direction: Side
    magnitude: Annotated[float, Field(description="expected absolute move of the mid, ticks")]
    confidence: Annotated[float | None, Field(description="probability of the direction; null: nobody voted")]
    position_size: Annotated[float, Field(description="share of the full position, 0 to 1")]
    stop_loss: Annotated[float | None, Field(description="price")]
    take_profit: Annotated[float | None, Field(description="price")]
    risk_reward: float
    horizon_ms: int | None
    regime: str | None
    votes: Annotated[dict[str, Side | None], Field(description="by member: the way it tilts; null: abstains")]
    agreement: Annotated[int, Field(description="members that tilt with the direction")]
    reason: Annotated[str, Field(description="why not to trade; empty: trade")]


class PredictResponse(Told):
    symbol: str
    model_version: str
    events: Annotated[int, Field(description="rows of the window")]
    compute_ms: float
    prediction: Prediction
    recommendation: Recommendation


class Listing(Told):
    """What every GET tells besides its content."""

    ts: Annotated[int, Field(description="time of the stream at the newest frame, ns UTC")]
    age_ms: Annotated[float, Field(description="since that frame came, by the wall")]
    connected: Annotated[bool, Field(description="whether the node is there")]


class Instruments(Listing):
    items: list[InstrumentInfo]


class Positions(Listing):
    items: list[Position]


class Orders(Listing):
    items: Annotated[list[Order], Field(description="the newest 500, oldest first")]


class Fills(Listing):
    items: Annotated[list[Fill], Field(description="the newest 1,000, oldest first")]


class Trades(Listing):
    items: Annotated[list[Trade], Field(description="the newest 1,000, oldest first")]


class Decisions(Listing):
    items: Annotated[list[Decision], Field(description="the newest 500, oldest first")]
    declined: Annotated[dict[str, int], Field(description="all decisions so far by reason")]


class PnlNow(Listing):
    items: list[Pnl]
    curve: Annotated[dict[str, list[Point]], Field(description="net PnL by currency, once a second")]


class Regimes(Listing):
    names: list[str]
    now: dict[str, str | None]
    changes: Annotated[list[RegimeChange], Field(description="the newest 500, oldest first")]


class WeightsNow(Listing):
    weights: Annotated[Weights | None, Field(description="null: nobody has told of any yet")]
    history: list[WeightsPoint]


class Feeds(Listing):
    items: list[Feed]


class Latency(Listing):
    items: list[Stage]


class ModelsStatus(Listing):
    version: str
    path: str | None
    members: list[MemberState]
    horizons_ms: list[int]
    regimes: list[str]
    reloads: int
    reload_error: str


class Reload(BaseModel):
    """A folder of trained models on the node's machine; null: the running one again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Annotated[str | None, Field(min_length=1, max_length=4_096, examples=["out/models"])] = None


class Reloaded(BaseModel):
    """What came of it; a refused artifact is a 409, and the old one goes on."""

    version: str
    path: str
    members: Annotated[dict[str, str], Field(description="kept: its memory of the stream goes on; fresh: it begins anew")]


class Kill(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    reason: Annotated[str, Field(min_length=1, max_length=200, examples=["by hand"])] = "by command"


class Commanded(BaseModel):
    state: Annotated[str, Field(examples=["running"])]


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    version: str


class Ready(BaseModel):
    ready: bool
    connected: bool
    age_ms: Annotated[float | None, Field(description="since the newest frame")]
    state: Annotated[str | None, Field(examples=["running"])]


