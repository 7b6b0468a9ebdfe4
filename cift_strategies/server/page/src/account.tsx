// The account: profit, positions, orders at work and closed trades.

import { For, Show, createMemo, type JSX } from "solid-js";
import type uPlot from "uplot";
import { Chart } from "./chart";
import { MEMBER, number, time, words } from "./format";
import { Money, Panel, Scroll, Table, held, over, price, side, units, type Column } from "./parts";
import { orders, series, slow, state, trades } from "./store";
import type { Order, Position, Trade } from "./types";

const CLOSED = 50; // trades that are shown

export function Profit(): JSX.Element {
  const lines = createMemo(() => state.pnl.map((p, i) => ({ label: p.currency, colour: MEMBER[i % MEMBER.length]! })), [], {
    equals: (a, b) => a.map((l) => l.label).join() === b.map((l) => l.label).join(),
  });
  const data = (): uPlot.AlignedData => {
    const all = lines().map((l) => series.pnl.get(l.label) ?? []);
    if (all.length === 1) return [all[0]!.map((p) => p[0] / 1e6), all[0]!.map((p) => p[1])];
    const stamps = [...new Set(all.flatMap((points) => points.map((p) => p[0])))].sort((a, b) => a - b);
    const of = (points: readonly (readonly [number, number])[]): (number | null)[] => {
      const at = new Map(points);
      let last: number | null = null;
      return stamps.map((ts) => (last = at.get(ts) ?? last));
    };
    return [stamps.map((ts) => ts / 1e6), ...all.map(of)];
  };
  return (
    <Panel
      title="Profit net of costs"
      area="profit"
      aside={
        <ul class="key">
          <For each={state.pnl}>
            {(p) => (
              <li data-test={`pnl-${p.currency}`}>
                <b>
                  <Money value={p.net} /> {p.currency}
                </b>
                , fees {number(p.fees)}, largest drawdown {number(p.max_drawdown)}
              </li>
            )}
          </For>
        </ul>
      }
    >
      <Chart label="Profit and loss net of costs over time" unit={lines().map((l) => l.label).join(", ")} lines={lines()} data={data} due={slow} />
    </Panel>
  );
}

const POSITIONS: Column<Position>[] = [
  { head: "instrument", cell: (p) => p.symbol },
  { head: "size", n: true, cell: held },
  { head: "average", n: true, wide: true, cell: (p) => price(p.symbol, p.average) },
  { head: "stop", n: true, cell: (p) => price(p.symbol, p.stop) },
  { head: "target", n: true, cell: (p) => price(p.symbol, p.target) },
  { head: "open", n: true, cell: (p) => <Money value={p.unrealised} /> },
  { head: "fees", n: true, wide: true, cell: (p) => number(p.fees) },
  { head: "net", n: true, cell: (p) => <Money value={p.net} /> },
];

export function Positions(): JSX.Element {
  const traded = createMemo(() => state.positions.filter((p) => p.size || p.realised || p.fees));
  return (
    <Panel title="Positions" area="positions">
      <Table
        caption="Positions with their stops, targets and profit after costs"
        columns={POSITIONS}
        rows={traded()}
        empty={over() ? "nothing was traded" : "nothing was traded yet"}
        test={(p) => `position-${p.symbol}`}
      />
    </Panel>
  );
}

const ORDERS: Column<Order>[] = [
  { head: "order", cell: (o) => o.role },
  { head: "instrument", cell: (o) => o.symbol },
  { head: "side", cell: (o) => side(o.side) },
  { head: "size", n: true, cell: (o) => units(o.symbol, o.size) },
  { head: "price", n: true, cell: (o) => price(o.symbol, o.price ?? o.trigger) },
  { head: "status", cell: (o) => words(o.status.toLowerCase()) },
];

const TRADES: Column<Trade>[] = [
  { head: "closed", cell: (t) => time(t.closed) },
  { head: "instrument", cell: (t) => t.symbol },
  { head: "side", cell: (t) => side(t.side) },
  { head: "size", n: true, cell: (t) => units(t.symbol, t.size) },
  { head: "by", cell: (t) => t.closed_by },
  { head: "net", n: true, cell: (t) => <Money value={t.net} /> },
];

export function Orders(): JSX.Element {
  const working = createMemo(() => orders().filter((o) => o.open));
  return (
    <Panel title={over() ? "Trades" : "Orders and trades"} area="orders">
      <Show when={!over()}>
        <Show when={working().length} fallback={<p class="empty">no order works</p>}>
          <Scroll label="Working orders">
            <Table caption={`Working orders: ${working().length}`} titled columns={ORDERS} rows={working()} empty="" />
          </Scroll>
        </Show>
      </Show>
      <Scroll label="Closed trades">
        <Table titled caption="Closed trades, newest first" columns={TRADES} rows={trades().slice(0, CLOSED)} empty="no trade was closed" />
      </Scroll>
    </Panel>
  );
}
