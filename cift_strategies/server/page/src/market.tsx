// The market: instruments, the book and the price of the one that is shown.

import { For, Index, Show, createMemo, type JSX } from "solid-js";
import type uPlot from "uplot";
import { Chart, css } from "./chart";
import { REGIME, number } from "./format";
import { Empty, Panel, Regime, held, instrument, position, price, setChosen, symbol, units } from "./parts";
import { beat, info, series, state } from "./store";
import type { Level, Position } from "./types";

const DENSE = 10; // instruments; beyond, each takes one line

export function Instruments(): JSX.Element {
  const move = (event: KeyboardEvent): void => {
    const [at, last] = [state.instruments.findIndex((x) => x.symbol === symbol()), state.instruments.length - 1];
    const to = { ArrowDown: at < last ? at + 1 : 0, ArrowUp: at > 0 ? at - 1 : last, Home: 0, End: last }[event.key];
    const next = to === undefined ? undefined : state.instruments[to];
    if (!next) return;
    event.preventDefault();
    setChosen(next.symbol);
    queueMicrotask(() => (document.querySelector("[role=option][aria-selected=true]") as HTMLElement | null)?.focus());
  };
  return (
    <Panel title="Instruments" area="instruments" aside={<span class="soft">mid, position</span>}>
      <div role="listbox" aria-label="instrument shown" onKeyDown={move} classList={{ dense: state.instruments.length > DENSE }}>
        <For each={state.instruments} fallback={<Empty>no instrument yet</Empty>}>
          {(x) => {
            const at = createMemo(() => state.positions.find((p) => p.symbol === x.symbol));
            const mine = (): boolean => x.symbol === symbol();
            return (
              <button role="option" aria-selected={mine()} tabindex={mine() ? 0 : -1} class="row" onClick={() => setChosen(x.symbol)}>
                <b title={x.symbol}>{x.symbol}</b>
                <span class="n">{price(x.symbol, x.mid, 1)}</span>
                <Regime name={x.regime} />
                <span class="n" classList={{ soft: !at()?.size }}>
                  {held(at())}
                </span>
              </button>
            );
          }}
        </For>
      </div>
    </Panel>
  );
}

export function Book(): JSX.Element {
  const most = createMemo(() => Math.max(1e-9, ...[...(instrument()?.bids ?? []), ...(instrument()?.asks ?? [])].map((l) => l[1])));
  const rows = (levels: Level[], side: "bid" | "ask"): JSX.Element => (
    <Index each={levels}>
      {(level) => (
        <tr class={side}>
          <td class="n soft">{level()[2] || ""}</td>
          <td class="n depth" style={{ "--share": `${(100 * level()[1]) / most()}%` }}>
            {units(symbol(), level()[1])}
          </td>
          <td class="n price">{price(symbol(), level()[0])}</td>
        </tr>
      )}
    </Index>
  );
  return (
    <Panel
      title="Book"
      area="book"
      aside={<Show when={instrument()?.spread_ticks != null}><span class="soft">spread {number(instrument()!.spread_ticks, 1)} ticks</span></Show>}
    >
      <Show
        when={instrument()?.bids.length || instrument()?.asks.length}
        fallback={<Empty>the book is empty</Empty>}
      >
        <table class="ladder">
          <caption class="hidden">Order book of {symbol()}, ten levels a side</caption>
          <thead>
            <tr>
              <th class="n">orders</th>
              <th class="n">size</th>
              <th class="n">price</th>
            </tr>
          </thead>
          <tbody>
            {rows(instrument()!.asks.toReversed(), "ask")}
            <tr class="mid">
              <td colspan="2">mid</td>
              <td class="n" data-test="mid">
                {price(symbol(), instrument()!.mid, 1)}
              </td>
            </tr>
            {rows(instrument()!.bids, "bid")}
          </tbody>
        </table>
      </Show>
    </Panel>
  );
}

const UP = "#0072b2";
const DOWN = "#d55e00";
const RIBBON = 6; // px
const APART = 13; // px between two labels

/** Where the regime held, below the line. */
function paintRegimes(u: uPlot, name: string): void {
  const { left, top, width, height } = u.bbox;
  const tall = RIBBON * devicePixelRatio;
  const changes = series.regimes.get(name) ?? [];
  changes.forEach((change, i) => {
    const from = Math.max(left, u.valToPos(change.ts / 1e6, "x", true));
    const to = Math.min(left + width, i + 1 < changes.length ? u.valToPos(changes[i + 1]!.ts / 1e6, "x", true) : left + width);
    if (to <= from) return;
    u.ctx.fillStyle = REGIME[change.regime ?? "unknown"] ?? REGIME.unknown!;
    u.ctx.fillRect(from, top + height - tall, to - from, tall);
  });
}

/** Entry, stop and target of the open position, each with its price. */
function paintLevels(u: uPlot, at: Position): void {
  const { ctx } = u;
  const { left, top, width, height } = u.bbox;
  const ratio = devicePixelRatio;
  const levels = ([["entry", at.average, css("--soft")], ["stop", at.stop, DOWN], ["target", at.target, css("--gain")]] as const)
    .flatMap(([label, value, colour]) => (value == null ? [] : [{ label: `${label} ${price(at.symbol, value)}`, y: u.valToPos(value, "y", true), colour }]))
    .sort((a, b) => a.y - b.y);
  ctx.lineWidth = ratio;
  ctx.font = `${11 * ratio}px system-ui, sans-serif`;
  ctx.textAlign = "left";
  ctx.textBaseline = "middle";
  let above = -Infinity;
  for (const { label, y, colour } of levels) {
    ctx.strokeStyle = colour;
    ctx.setLineDash([6 * ratio, 4 * ratio]);
    ctx.beginPath();
    ctx.moveTo(left, y);
    ctx.lineTo(left + width, y);
    ctx.stroke();
    const half = (APART * ratio) / 2;
    const middle = Math.min(Math.max(y, above + 2 * half, top + half), top + height - half);
    above = middle;
    ctx.fillStyle = css("--card");
    ctx.fillRect(left + 2 * ratio, middle - half, ctx.measureText(label).width + 6 * ratio, 2 * half);
    ctx.fillStyle = colour;
    ctx.fillText(label, left + 5 * ratio, middle);
  }
  ctx.setLineDash([]);
}

function paintFills(u: uPlot, name: string): void {
  const { ctx } = u;
  const { left, width } = u.bbox;
  const ratio = devicePixelRatio;
  const r = 5 * ratio;
  ctx.lineWidth = 1.5 * ratio;
  for (const fill of series.fills) {
    if (fill.symbol !== name) continue;
    const x = u.valToPos(fill.ts / 1e6, "x", true);
    if (x < left || x > left + width) continue;
    const y = u.valToPos(fill.price, "y", true);
    ctx.fillStyle = ctx.strokeStyle = fill.side > 0 ? UP : DOWN;
    ctx.beginPath();
    ctx.moveTo(x, y - fill.side * r);
    ctx.lineTo(x - r, y + fill.side * r);
    ctx.lineTo(x + r, y + fill.side * r);
    ctx.closePath();
    if (fill.role === "entry") ctx.fill();
    else ctx.stroke();
  }
}

/** Prices of the fills that are on the chart, which begins at `from` (ms). */
const marked = (name: string, from: number): number[] => series.fills.filter((f) => f.symbol === name && f.ts / 1e6 >= from).map((f) => f.price);

function paint(u: uPlot, at: Position | undefined, name: string): void {
  const { left, top, width, height } = u.bbox;
  u.ctx.save();
  u.ctx.beginPath();
  u.ctx.rect(left, top, width, height);
  u.ctx.clip();
  paintRegimes(u, name);
  paintFills(u, name);
  if (at?.size) paintLevels(u, at);
  u.ctx.restore();
}

export function Price(): JSX.Element {
  const data = (): uPlot.AlignedData => {
    const points = series.prices.get(symbol()) ?? [];
    return [points.map((p) => p[0] / 1e6), points.map((p) => p[1])];
  };
  return (
    <Panel
      title={`Price of ${symbol() || "–"}`}
      area="price"
      aside={
        <ul class="key">
          <li>▲ buy ▼ sell (hollow: exit)</li>
          <Index each={state.models.regimes}>{(name) => <li><Regime name={name()} /></li>}</Index>
        </ul>
      }
    >
      <Chart
        label={`Mid price of ${symbol()} with entries, exits, stop and target, and the regime below`}
        unit={info().get(symbol())?.currency ?? ""}
        lines={[{ label: "mid", colour: "#888888" }]}
        data={data}
        draw={(u) => paint(u, position(), symbol())}
        due={() => (beat(), symbol())}
        reach={(from) => [...marked(symbol(), from), ...(position()?.size ? [position()!.average, position()!.stop, position()!.target] : [])]}
        step
      />
    </Panel>
  );
}
