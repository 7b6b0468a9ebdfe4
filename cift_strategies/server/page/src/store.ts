// The newest state of the node, kept up by the frames of /api/v1/frames; the connection comes back by itself.

import { createSignal } from "solid-js";
import { createStore, reconcile } from "solid-js/store";
import type { Decision, Fill, Frame, InstrumentInfo, Order, Point, Trade, Weights } from "./types";

export const SCHEMA = 1;
const KEPT = { prices: 3_000, pnl: 7_200, weights: 3_600, regimes: 2_000, decisions: 500, fills: 2_000, trades: 1_000, orders: 500 };
const OLD_MS = 1_500; // without a frame for so long, what is shown is called old
const RETRY_MS = [250, 500, 1_000, 2_000, 5_000];

export type Link = "connecting" | "live" | "lost" | "refused";
type State = Pick<Frame, "node" | "instruments" | "positions" | "pnl" | "latency" | "feeds" | "models" | "ts" | "run">;

const EMPTY: State = {
  ts: 0,
  run: "",
  node: { state: "starting", reason: "", mode: "", venue: "", speed: 1, started: 0, counts: {}, declined: {} },
  instruments: [],
  positions: [],
  pnl: [],
  latency: [],
  feeds: [],
  models: { version: "", members: [], horizons_ms: [], regimes: [], path: null, reloads: 0, reload_error: "" },
};

export const [state, setState] = createStore<State>(EMPTY);
export const [info, setInfo] = createSignal<Map<string, InstrumentInfo>>(new Map());
export const [weights, setWeights] = createSignal<Weights | null>(null);
export const [decisions, setDecisions] = createSignal<Decision[]>([]);
export const [orders, setOrders] = createSignal<Order[]>([]);
export const [trades, setTrades] = createSignal<Trade[]>([]);
export const [link, setLink] = createSignal<Link>("connecting");
export const [age, setAge] = createSignal(0); // ms since the newest frame
export const [beat, setBeat] = createSignal(0); // rises with each frame: charts, whose data lie outside of the store, follow it
export const [slow, setSlow] = createSignal(0); // rises with each frame that has a point of the slow things: PnL and weights
export const [trouble, setTrouble] = createSignal("");

/** What charts draw: long and only ever appended to, hence not reactive by itself. */
export const series = {
  prices: new Map<string, Point[]>(),
  pnl: new Map<string, Point[]>(),
  regimes: new Map<string, { ts: number; regime: string | null }[]>(),
  fills: [] as Fill[],
  weights: [] as { ts: number; regime: string; values: number[] }[],
};

let seq = -1;
let run = "";
let newest = 0;

function append<T>(to: T[], more: readonly T[] | undefined, most: number): T[] {
  if (more?.length) {
    to.push(...more);
    if (to.length > most * 1.2) to.splice(0, to.length - most);
  }
  return to;
}

function appendAll(to: Map<string, Point[]>, more: Record<string, Point[]> | undefined, most: number): void {
  for (const [key, points] of Object.entries(more ?? {})) to.set(key, append(to.get(key) ?? [], points, most));
}

/** Take in a frame; false where one was missed and a snapshot is needed. */
export function take(frame: Frame): boolean {
  const whole = frame.kind === "snapshot";
  if (frame.schema_version !== SCHEMA) {
    setTrouble(`the server speaks version ${frame.schema_version} of the frames, this page version ${SCHEMA}: load the page again`);
    return true;
  }
  if (!whole && (frame.run !== run || frame.seq !== seq + 1)) return false;
  run = frame.run;
  seq = frame.seq;
  newest = performance.now();
  const logs = frame.logs;
  if (whole) {
    for (const key of ["prices", "pnl", "regimes"] as const) series[key].clear();
    series.fills.length = series.weights.length = 0;
    setInfo(new Map((frame.info ?? []).map((x) => [x.symbol, x])));
    setDecisions([]);
    setOrders([]);
    setTrades([]);
  }
  appendAll(series.prices, logs.prices, KEPT.prices);
  appendAll(series.pnl, logs.pnl, KEPT.pnl);
  for (const change of logs.regimes ?? []) {
    series.regimes.set(change.symbol, append(series.regimes.get(change.symbol) ?? [], [change], KEPT.regimes));
  }
  append(series.fills, logs.fills, KEPT.fills);
  append(series.weights, logs.weights, KEPT.weights);
  if (logs.decisions?.length) setDecisions((old) => [...logs.decisions!.toReversed(), ...old].slice(0, KEPT.decisions));
  if (logs.trades?.length) setTrades((old) => [...logs.trades!.toReversed(), ...old].slice(0, KEPT.trades));
  if (logs.orders?.length) {
    const changed = new Map(logs.orders.map((o) => [o.id, o]));
    setOrders((old) => [...[...changed.values()].toReversed(), ...old.filter((o) => !changed.has(o.id))].slice(0, KEPT.orders));
  }
  if (frame.weights) setWeights(frame.weights);
  setState("ts", frame.ts);
  setState("run", frame.run);
  setState("node", reconcile(frame.node));
  setState("instruments", reconcile(frame.instruments, { key: "symbol" }));
  setState("positions", reconcile(frame.positions, { key: "symbol" }));
  setState("pnl", reconcile(frame.pnl, { key: "currency" }));
  setState("latency", reconcile(frame.latency, { key: "stage" }));
  setState("feeds", reconcile(frame.feeds, { key: "name" }));
  setState("models", reconcile(frame.models));
  setBeat((n) => n + 1);
  if (whole || logs.weights?.length || Object.keys(logs.pnl ?? {}).length) setSlow((n) => n + 1);
  return true;
}

/** Keep a WebSocket open for good. */
export function connect(): void {
  let attempt = 0;
  const open = (): void => {
    const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/api/v1/frames`);
    let heard = false;
    socket.onmessage = (message) => {
      heard = true;
      attempt = 0;
      if (!take(JSON.parse(message.data as string) as Frame)) socket.close(4_000, "a frame was missed");
      else setLink("live");
    };
    socket.onclose = (event) => {
      if (event.code === 4_000) return open();
      setLink(!heard && attempt > 2 && event.code === 1_006 && newest === 0 ? "refused" : "lost");
      setTimeout(open, RETRY_MS[Math.min(attempt++, RETRY_MS.length - 1)]);
    };
  };
  if (location.hash === "#still") {
    // for a picture: what there is, before the page counts as loaded
    const asked = new XMLHttpRequest();
    asked.open("GET", "/api/v1/snapshot", false);
    asked.send();
    if (asked.status === 200 && take(JSON.parse(asked.responseText) as Frame)) setLink("live");
  }
  open();
  setInterval(() => setAge(newest ? performance.now() - newest : 0), 250);
}

export const old = (): boolean => state.node.state !== "finished" && newest > 0 && (age() > OLD_MS || link() !== "live");

// --- commands -------------------------------------------------------------------------------------------------------------------------

const TOKEN = "cift-token";
export const [asking, setAsking] = createSignal<((token: string | null) => void) | null>(null);

async function token(again: boolean): Promise<string | null> {
  const kept = sessionStorage.getItem(TOKEN);
  if (kept && !again) return kept;
  const given = await new Promise<string | null>((done) => setAsking(() => done));
  setAsking(null);
  if (given) sessionStorage.setItem(TOKEN, given);
  return given;
}

/** POST to the node; asks for the token where there is none or a wrong one. Returns what went wrong, or "". */
export async function command(path: string, body: unknown = {}): Promise<string> {
  for (let again = false; ; again = true) {
    const secret = await token(again);
    if (secret === null) return "nothing was sent: no token was given";
    try {
      const answer = await fetch(`/api/v1/${path}`, {
        method: "POST",
        headers: { "Content-Type": "application/json", Authorization: `Bearer ${secret}` },
        body: JSON.stringify(body),
      });
      if (answer.ok) return "";
      if (answer.status === 401) continue;
      const problem = (await answer.json().catch(() => ({}))) as { detail?: string; title?: string };
      return problem.detail ?? problem.title ?? `the server answered ${answer.status}`;
    } catch {
      return "the server cannot be reached";
    }
  }
}
