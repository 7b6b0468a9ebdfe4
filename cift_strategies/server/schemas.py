"""What the node tells the server ten times a second, and what the server passes on: one :class:`Frame`.

A frame holds the present state in full (instruments, positions, open orders, PnL, latency, feeds, models) and, in its `logs`, only what is
new since the frame before. A snapshot is a frame whose logs hold all that is kept: whoever joins, or has missed a frame, gets one first.
Times are ns UTC of the stream (a browser divides by 1e6), prices and PnL in the instrument's currency, sizes in units, NaN is null.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from cift_strategies.timings import BOUNDS_MS

SCHEMA: Final = 1  # of frames; a client that knows another one should say so
LEVELS: Final = 10  # of the book ladder, each side
EVERY_MS: Final = 100  # between two frames, of the node's clock
KEPT: Final = {  # entries of a log that a snapshot holds; of prices: for each instrument
    "prices": 600, "regimes": 500, "decisions": 500, "signals": 500, "orders": 500, "fills": 1_000, "trades": 1_000, "pnl": 1_000,
    "weights": 600,
}  # fmt: skip

type Ns = Annotated[int, Field(description="ns UTC", examples=[1_741_614_600_123_456_789])]
type Level = Annotated[
    tuple[float, float, int],
    Field(description="price, size in units, orders (0 where the feed has none)", examples=[[100.01, 300.0, 2]]),
]
type Vote = Annotated[tuple[float, float, float], Field(description="probabilities of down, flat, up", examples=[[0.2, 0.25, 0.55]])]
type Point = Annotated[tuple[int, float], Field(description="ns UTC, value", examples=[[1_741_614_600_123_456_789, 100.005]])]
type Side = Annotated[Literal[-1, 0, 1], Field(description="-1 sell or down, 0 none, +1 buy or up")]


class Told(BaseModel):
    """Whatever goes over a wire: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class InstrumentInfo(Told):
    """What does not change about an instrument."""

    symbol: Annotated[str, Field(examples=["AAPL.XNAS"])]
    kind: str
    currency: str
    tick: float
    lot: float
    multiplier: float
    price_precision: int
    size_precision: int
    level: Annotated[int, Field(description="depth of the feed: 3 orders, 2 levels, 1 best bid and offer")]
    session: str | None = None
    maker_fee: Annotated[float, Field(description="share of notional")] = 0.0
    taker_fee: Annotated[float, Field(description="share of notional")] = 0.0
    fee_per_unit: float = 0.0


class Horizon(Told):
    """The ensemble and its members about one horizon."""

    horizon_ms: int
    direction: Annotated[Side, Field(description="0: the ensemble abstains")]
    proba: Vote | None = Field(description="the ensemble's; null where nobody voted")
    confidence: float | None
    magnitude_ticks: Annotated[float | None, Field(description="expected absolute move of the mid")]
    up: Annotated[int, Field(description="members that tilt up")]
    down: Annotated[int, Field(description="members that tilt down")]
    voting: Annotated[int, Field(description="members that did not abstain")]
    votes: dict[str, Vote | None] = Field(description="by member; null: abstains")


class Prediction(Told):
    """What the ensemble said last about an instrument."""

    symbol: str
    ts: Annotated[int, Field(description="of the newest event it saw, ns UTC")]
    latency_ms: Annotated[float, Field(description="from that event to delivery")]
    regime: str | None
    model_version: str
    horizons: list[Horizon]


class Position(Told):
    """The net position in an instrument, and the entry it came from."""

    symbol: str
    size: Annotated[float, Field(description="signed, units; 0: flat")]
    average: Annotated[float | None, Field(description="average price")]
    unrealised: float
    realised: Annotated[float, Field(description="since the start, before fees")]
    fees: float
    net: Annotated[float, Field(description="realised + unrealised - fees")]
    currency: str
    trade: Annotated[int | None, Field(description="number of the trade under way")] = None
    entry_side: Side = 0
    limit: float | None = None
    stop: float | None = None
    target: float | None = None
    until: Annotated[int | None, Field(description="when it is closed at the latest unless renewed, ns UTC")] = None
    leaving: Annotated[str, Field(description="why it is being closed; empty: it is not")] = ""


class Instrument(Told):
    """One instrument now."""

    symbol: str
    ts: Annotated[int | None, Field(description="of its newest event, ns UTC; null: none yet")]
    age_ms: Annotated[float | None, Field(description="since then")]
    events: int
    mid: float | None
    spread_ticks: float | None
    bids: list[Level] = Field(description="best first, at most 10")
    asks: list[Level]
    regime: str | None
    prediction: Prediction | None
    decision: Annotated[str, Field(description="the newest decision in words")] = ""


class Decision(Told):
    """What was decided on predictions, and why; equal ones in a row are one entry whose `times` grew before it was told."""

    seq: int
    ts: Ns
    symbol: str
    action: Literal["enter", "hold", "none"]
    reason: Annotated[str, Field(examples=["spread too wide"])]
    text: Annotated[str, Field(examples=["3 of 5 up, confidence 0.71, spread too wide: no trade"])]
    horizon_ms: int | None
    confidence: float | None
    times: Annotated[int, Field(description="how many decisions in a row this reason stands for, the former ones of the instrument")] = 1


class Signal(Told):
    """An entry that the strategy decided on."""

    seq: int
    ts: Ns
    symbol: str
    trade: int
    predicted_at: Annotated[int, Field(description="of the newest event the prediction saw, ns UTC")]
    latency_ms: Annotated[float, Field(description="from that event to the decision")]
    side: Side
    size: float
    horizon_ms: int
    expected_ticks: float
    cost_ticks: float
    confidence: float
    regime: str | None
    limit: float
    stop: float
    target: float


class Order(Told):
    """An order; the same `id` comes again whenever its status or filled size has changed."""

    id: str
    number: int
    symbol: str
    role: Annotated[str, Field(examples=["entry", "stop", "target", "exit"])]
    side: Side
    type: Annotated[str, Field(examples=["LIMIT"])]
    status: Annotated[str, Field(examples=["ACCEPTED"])]
    size: float
    filled: float
    price: float | None
    trigger: float | None
    ts: Annotated[int, Field(description="of the newest change, ns UTC")]
    open: bool


class Fill(Told):
    seq: int
    ts: Ns
    symbol: str
    order: Annotated[int, Field(description="running number of the order")]
    trade: Annotated[int | None, Field(description="number of the trade; null: of none")]
    role: str
    side: Side
    price: float
    size: float
    fee: float
    currency: str
    liquidity: str
    mid: Annotated[float | None, Field(description="mid when it happened")]


class Trade(Told):
    """A closed trade, entry to exit."""

    seq: int
    number: int
    symbol: str
    opened: int
    closed: int
    side: Side
    size: float
    entry: float
    exit: float
    gross: float
    fees: float
    net: float
    currency: str
    horizon_ms: int
    regime: str | None
    closed_by: Annotated[str, Field(examples=["target", "stop", "horizon"])]


class Pnl(Told):
    """Profit and loss in one currency since the start, open positions at the mid."""

    currency: str
    net: Annotated[float, Field(description="realised + unrealised - fees")]
    realised: float
    unrealised: float
    fees: float
    drawdown: Annotated[float, Field(description="now, from the highest net")]
    max_drawdown: float
    capital: float


class Stage(Told):
    """How long one stage takes. Quantiles are of the whole session, within 1 %."""

    stage: Annotated[str, Field(examples=["inference"])]
    count: int
    sum_ms: float
    p50_ms: float | None
    p99_ms: float | None
    p999_ms: float | None
    max_ms: float | None
    buckets: Annotated[list[int], Field(description=f"how many took at most {', '.join(f'{b:g}' for b in BOUNDS_MS)} ms")]


class Feed(Told):
    """The health of one data client, or of the replay that stands for it."""

    name: Annotated[str, Field(examples=["databento"])]
    connected: bool
    age_ms: Annotated[float | None, Field(description="since its newest event")]
    lag_ms: Annotated[float | None, Field(description="from the venue's stamp to ours, newest event")]
    events: int
    reconnects: int = 0
    gaps: int = 0
    errors: int = 0
    note: str = ""


class MemberState(Told):
    member: Annotated[str, Field(examples=["fusion"])]
    present: bool
    failures: Annotated[int, Field(description="decisions from which it abstained because it failed")]
    late: Annotated[int, Field(description="decisions from which it abstained because it took too long")]


class Models(Told):
    version: str
    members: list[MemberState]
    horizons_ms: list[int]
    regimes: list[str]
    path: Annotated[str | None, Field(description="the artifact's folder")] = None
    reloads: int = 0
    reload_error: Annotated[str, Field(description="why the last reload was refused; empty: it was not")] = ""


class Weights(Told):
    """The ensemble's weights: `values[regime][horizon][member]`; the last regime is "unknown"."""

    regimes: list[str]
    horizons_ms: list[int]
    members: list[str]
    values: list[list[list[float]]]


class RegimeChange(Told):
    ts: Ns
    symbol: str
    regime: str | None


class WeightsPoint(Told):
    """The weights in the regime that most instruments are in now, mean over horizons; once a second. Absent members hold weight too."""

    ts: Ns
    regime: Annotated[str, Field(description='"all": the mean over regimes, as a finished run has it')]
    values: list[float] = Field(description="by member, in the order of `models.members`")


class Logs(Told):
    """What is new since the frame before; in a snapshot all that is kept (`KEPT`), oldest first."""

    prices: Annotated[dict[str, list[Point]], Field(description="mids by symbol: of a frame the newest, where there was an event")] = {}
    regimes: list[RegimeChange] = []
    decisions: list[Decision] = []
    signals: list[Signal] = []
    orders: Annotated[list[Order], Field(description="newest state of each order that changed")] = []
    fills: list[Fill] = []
    trades: list[Trade] = []
    pnl: Annotated[dict[str, list[Point]], Field(description="net PnL by currency, once a second")] = {}
    weights: list[WeightsPoint] = []


class Node(Told):
    """The node as a whole."""

    state: Literal["starting", "running", "paused", "killed", "stopping", "finished"]
    reason: Annotated[str, Field(description="why it is not running")] = ""
    mode: Annotated[str, Field(examples=["replay", "backtest", "databento", "polygon"])]
    venue: str = ""
    speed: Annotated[float, Field(description="of the stream against the wall clock")] = 1.0
    started: Annotated[int, Field(description="ns UTC of the stream")]
    counts: dict[str, int] = Field(
        description="running totals: events, vectors, predictions, skipped, queue, signals, orders, fills, rejects, callback_errors, "
        "frames_dropped, commands"
    )
    declined: dict[str, int] = Field(description="decisions so far by reason")


class Frame(Told):
    """All that the page shows. `seq` rises by one from frame to frame; after a gap, or with another `run`, wait for a snapshot."""

    kind: Literal["snapshot", "frame"]
    schema_version: int = SCHEMA
    run: Annotated[str, Field(description="of this start of the node")]
    seq: int
    ts: Annotated[int, Field(description="time of the stream, ns UTC")]
    node: Node
    instruments: list[Instrument]
    positions: list[Position]
    pnl: list[Pnl]
    latency: list[Stage]
    feeds: list[Feed]
    models: Models
    info: Annotated[list[InstrumentInfo] | None, Field(description="in snapshots")] = None
    weights: Annotated[Weights | None, Field(description="in snapshots, and once a second")] = None
    logs: Logs = Logs()
