// What the server sends: `Frame` of server/schemas.py, which tells the meaning and unit of each field.

export type Side = -1 | 0 | 1;
export type Level = [price: number, size: number, orders: number];
export type Vote = [down: number, flat: number, up: number];
export type Point = [ns: number, value: number];

export interface Horizon {
  horizon_ms: number;
  direction: Side;
  proba: Vote | null;
  confidence: number | null;
  magnitude_ticks: number | null;
  up: number;
  down: number;
  voting: number;
  votes: Record<string, Vote | null>;
}

export interface Prediction {
  symbol: string;
  ts: number;
  latency_ms: number;
  regime: string | null;
  model_version: string;
  horizons: Horizon[];
}

export interface Instrument {
  symbol: string;
  ts: number | null;
  age_ms: number | null;
  events: number;
  mid: number | null;
  spread_ticks: number | null;
  bids: Level[];
  asks: Level[];
  regime: string | null;
  prediction: Prediction | null;
  decision: string;
}

export interface InstrumentInfo {
  symbol: string;
  currency: string;
  tick: number;
  price_precision: number;
  size_precision: number;
  level: number;
}

export interface Position {
  symbol: string;
  size: number;
  average: number | null;
  unrealised: number;
  realised: number;
  fees: number;
  net: number;
  currency: string;
  trade: number | null;
  entry_side: Side;
  limit: number | null;
  stop: number | null;
  target: number | null;
  until: number | null;
  leaving: string;
}

export interface Decision {
  seq: number;
  ts: number;
  symbol: string;
  action: "enter" | "hold" | "none";
  reason: string;
  text: string;
  horizon_ms: number | null;
  confidence: number | null;
  times: number;
}

export interface Order {
  id: string;
  number: number;
  symbol: string;
  role: string;
  side: Side;
  type: string;
  status: string;
  size: number;
  filled: number;
  price: number | null;
  trigger: number | null;
  ts: number;
  open: boolean;
}

export interface Fill {
  seq: number;
  ts: number;
  symbol: string;
  role: string;
  side: Side;
  price: number;
  size: number;
  fee: number;
  currency: string;
  liquidity: string;
}

export interface Trade {
  seq: number;
  number: number;
  symbol: string;
  opened: number;
  closed: number;
  side: Side;
  size: number;
  entry: number;
  exit: number;
  net: number;
  currency: string;
  closed_by: string;
}

export interface Pnl {
  currency: string;
  net: number;
  realised: number;
  unrealised: number;
  fees: number;
  drawdown: number;
  max_drawdown: number;
  capital: number;
}

export interface Stage {
  stage: string;
  count: number;
  p50_ms: number | null;
  p99_ms: number | null;
  p999_ms: number | null;
  max_ms: number | null;
}

export interface Feed {
  name: string;
  connected: boolean;
  age_ms: number | null;
  lag_ms: number | null;
  events: number;
  reconnects: number;
  gaps: number;
  errors: number;
  note: string;
}

export interface Models {
  version: string;
  members: { member: string; present: boolean; failures: number; late: number }[];
  horizons_ms: number[];
  regimes: string[];
  path: string | null;
  reloads: number;
  reload_error: string;
}

export interface Weights {
  regimes: string[];
  horizons_ms: number[];
  members: string[];
  values: number[][][];
}

export interface Node {
  state: "starting" | "running" | "paused" | "killed" | "stopping" | "finished";
  reason: string;
  mode: string;
  venue: string;
  speed: number;
  started: number;
  counts: Record<string, number>;
  declined: Record<string, number>;
}

export interface Logs {
  prices: Record<string, Point[]>;
  regimes: { ts: number; symbol: string; regime: string | null }[];
  decisions: Decision[];
  orders: Order[];
  fills: Fill[];
  trades: Trade[];
  pnl: Record<string, Point[]>;
  weights: { ts: number; regime: string; values: number[] }[];
}

export interface Frame {
  kind: "snapshot" | "frame";
  schema_version: number;
  run: string;
  seq: number;
  ts: number;
  node: Node;
  instruments: Instrument[];
  positions: Position[];
  pnl: Pnl[];
  latency: Stage[];
  feeds: Feed[];
  models: Models;
  info: InstrumentInfo[] | null;
  weights: Weights | null;
  logs: Partial<Logs>;
}
