// The panels of the page, each of one subject; all of the selected instrument where they are of one.

import { For, Index, Show, createMemo, createSignal, type JSX } from "solid-js";
import type uPlot from "uplot";
import { Chart, Key } from "./chart";
import { MEMBER, REGIME, horizon, ms, number, percent, signed, size, time, words } from "./format";
import { beat, decisions, info, orders, series, state, trades, weights } from "./store";
import type { Instrument, Level, Position, Vote } from "./types";

export const [chosen, setChosen] = createSignal("");
export const symbol = (): string => (chosen() && info().has(chosen()) ? chosen() : (state.instruments[0]?.symbol ?? ""));
const instrument = (): Instrument | undefined => state.instruments.find((x) => x.symbol === symbol());
const position = (): Position | undefined => state.positions.find((x) => x.symbol === symbol());
const over = (): boolean => state.node.state === "finished";
const digits = (): number => info().get(symbol())?.price_precision ?? 2;

export function Panel(props: { title: string; area: string; children: JSX.Element; aside?: JSX.Element }): JSX.Element {
  return (
    <section class="panel" style={{ "grid-area": props.area }} aria-label={props.title}>
      <header>
        <h2>{props.title}</h2>
        {props.aside}
      </header>
      <div class="body">{props.children}</div>
    </section>
  );
}

const Empty = (props: { children: JSX.Element }): JSX.Element => <p class="empty">{props.children}</p>;

const Regime = (props: { name: string | null }): JSX.Element => (
  <span class="regime">
    <i style={{ background: REGIME[props.name ?? "unknown"] ?? REGIME.unknown }} />
    {words(props.name ?? "unknown")}
  </span>
);

const Money = (props: { value: number; digits?: number }): JSX.Element => (
  <span classList={{ gain: props.value > 0, loss: props.value < 0 }}>{signed(props.value, props.digits ?? 2)}</span>
);

export function Instruments(): JSX.Element {
  const move = (event: KeyboardEvent): void => {
    const step = event.key === "ArrowDown" ? 1 : event.key === "ArrowUp" ? -1 : 0;
    if (!step) return;
    event.preventDefault();
    const at = state.instruments.findIndex((x) => x.symbol === symbol()) + step;
    const next = state.instruments[(at + state.instruments.length) % state.instruments.length];
    if (next) setChosen(next.symbol);
    queueMicrotask(() => (document.querySelector("[role=option][aria-selected=true]") as HTMLElement | null)?.focus());
  };
  return (
    <Panel title="Instruments" area="instruments">
      <div role="listbox" aria-label="instrument shown" onKeyDown={move}>
        <For each={state.instruments} fallback={<Empty>no instrument yet</Empty>}>
          {(x) => {
            const held = createMemo(() => state.positions.find((p) => p.symbol === x.symbol));
            const mine = (): boolean => x.symbol === symbol();
            return (
              <button role="option" aria-selected={mine()} tabindex={mine() ? 0 : -1} class="row" onClick={() => setChosen(x.symbol)}>
                <b>{x.symbol}</b>
                <span class="n">{number(x.mid, (info().get(x.symbol)?.price_precision ?? 2) + 1)}</span>
                <Regime name={x.regime} />
                <span class="n">
                  <Show when={held()?.size} fallback="flat">
                    {signed(held()!.size, 0)}
                  </Show>
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
  const most = createMemo(() => Math.max(1, ...[...(instrument()?.bids ?? []), ...(instrument()?.asks ?? [])].map((l) => l[1])));
  const rows = (levels: Level[], side: "bid" | "ask"): JSX.Element => (
    <Index each={levels}>
      {(level) => (
        <tr class={side}>
          <td class="n">{level()[2] || ""}</td>
          <td class="n depth" style={{ "--share": `${(100 * level()[1]) / most()}%` }}>
            {size(level()[1], Math.min(info().get(symbol())?.size_precision ?? 0, 4))}
          </td>
          <td class="n price">{number(level()[0], digits())}</td>
        </tr>
      )}
    </Index>
  );
  return (
    <Panel title="Book" area="book" aside={<span class="soft">{number(instrument()?.spread_ticks, 1)} ticks wide</span>}>
      <Show when={instrument()?.bids.length || instrument()?.asks.length} fallback={<Empty>{over() ? "a finished run keeps no book" : "the book is empty"}</Empty>}>
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
              <td colspan="2" class="soft">
                mid
              </td>
              <td class="n" data-test="mid">
                {number(instrument()!.mid, digits() + 1)}
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

function paintPrice(u: uPlot, at: Position | undefined, name: string): void {
  const { ctx } = u;
  const { left, top, width, height } = u.bbox;
  const ratio = devicePixelRatio;
  const x = (ns: number): number => u.valToPos(ns / 1e6, "x", true);
  const y = (price: number): number => u.valToPos(price, "y", true);
  ctx.save();
  const changes = series.regimes.get(name) ?? [];
  const tall = 6 * ratio;
  changes.forEach((change, i) => {
    const from = Math.max(left, x(change.ts));
    const to = Math.min(left + width, i + 1 < changes.length ? x(changes[i + 1]!.ts) : left + width);
    if (to > from) {
      ctx.fillStyle = REGIME[change.regime ?? "unknown"] ?? REGIME.unknown!;
      ctx.fillRect(from, top + height - tall, to - from, tall);
    }
  });
  ctx.beginPath();
  ctx.rect(left, top, width, height);
  ctx.clip();
  if (at?.size) {
    ctx.setLineDash([6 * ratio, 4 * ratio]);
    ctx.lineWidth = ratio;
    ctx.font = `${11 * ratio}px system-ui`;
    ctx.textAlign = "left";
    for (const [label, price, colour] of [
      ["entry", at.average, "#888888"],
      ["stop", at.stop, DOWN],
      ["target", at.target, "#009e73"],
    ] as const) {
      if (price == null) continue;
      ctx.strokeStyle = ctx.fillStyle = colour;
      ctx.beginPath();
      ctx.moveTo(left, y(price));
      ctx.lineTo(left + width, y(price));
      ctx.stroke();
      ctx.fillText(label, left + 4 * ratio, y(price) - 3 * ratio);
    }
    ctx.setLineDash([]);
  }
  for (const fill of series.fills) {
    if (fill.symbol !== name) continue;
    const [px, py, r] = [x(fill.ts), y(fill.price), 5 * ratio];
    if (px < left || px > left + width) continue;
    ctx.fillStyle = ctx.strokeStyle = fill.side > 0 ? UP : DOWN;
    ctx.lineWidth = 1.5 * ratio;
    ctx.beginPath();
    ctx.moveTo(px, py - fill.side * r);
    ctx.lineTo(px - r, py + fill.side * r);
    ctx.lineTo(px + r, py + fill.side * r);
    ctx.closePath();
    if (fill.role === "entry") ctx.fill();
    else ctx.stroke();
  }
  ctx.restore();
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
          <li>▲ buy ▼ sell, filled: entry, hollow: exit</li>
          <Index each={state.models.regimes}>{(name) => <li><Regime name={name()} /></li>}</Index>
        </ul>
      }
    >
      <Chart
        label={`Mid price of ${symbol()} with entries, exits, stop and target, and the regime below`}
        lines={[{ label: "mid", colour: "#888888" }]}
        data={data}
        draw={(u) => paintPrice(u, position(), symbol())}
        digits={digits()}
        watch={symbol}
        reach={() => (position()?.size ? [position()!.average, position()!.stop, position()!.target].filter((v) => v != null) : [])}
        step
      />
    </Panel>
  );
}

const [horizonShown, setHorizonShown] = createSignal<number | null>(null);

function Bar(props: { vote: Vote | null }): JSX.Element {
  return (
    <Show when={props.vote} fallback={<span class="bar none">abstains</span>}>
      {(v) => (
        <span class="bar" role="img" aria-label={`down ${percent(v()[0])}, flat ${percent(v()[1])}, up ${percent(v()[2])}`}>
          <i class="down" style={{ width: `${100 * v()[0]}%` }}>{v()[0] >= 0.15 ? percent(v()[0]) : ""}</i>
          <i class="flat" style={{ width: `${100 * v()[1]}%` }}>{v()[1] >= 0.15 ? percent(v()[1]) : ""}</i>
          <i class="up" style={{ width: `${100 * v()[2]}%` }}>{v()[2] >= 0.15 ? percent(v()[2]) : ""}</i>
        </span>
      )}
    </Show>
  );
}

export function Votes(): JSX.Element {
  const all = (): NonNullable<Instrument["prediction"]>["horizons"] => instrument()?.prediction?.horizons ?? [];
  const shown = createMemo(() => {
    const sure = (h: { confidence: number | null }): number => h.confidence ?? -1;
    return all().find((h) => h.horizon_ms === horizonShown()) ?? [...all()].sort((a, b) => sure(b) - sure(a))[0];
  });
  const word = (d: number): string => (d > 0 ? "up" : d < 0 ? "down" : "abstains");
  return (
    <Panel
      title="Votes"
      area="votes"
      aside={
        <div class="switch" role="group" aria-label="horizon">
          <Index each={all()}>
            {(h) => (
              <button aria-pressed={shown()?.horizon_ms === h().horizon_ms} onClick={() => setHorizonShown(h().horizon_ms)}>
                {horizon(h().horizon_ms)}
              </button>
            )}
          </Index>
        </div>
      }
    >
      <Show when={shown()} fallback={<Empty>no prediction yet</Empty>}>
        {(h) => (
          <>
            <dl class="votes">
              <For each={Object.keys(h().votes)}>
                {(name, i) => (
                  <>
                    <dt>
                      <i style={{ background: MEMBER[i() % MEMBER.length] }} />
                      {name}
                    </dt>
                    <dd>
                      <Bar vote={h().votes[name] ?? null} />
                    </dd>
                  </>
                )}
              </For>
              <dt class="sum">ensemble</dt>
              <dd class="sum">
                <Bar vote={h().proba} />
              </dd>
            </dl>
            <p class="verdict">
              <b class={word(h().direction)}>{word(h().direction)}</b> over {horizon(h().horizon_ms)}: {h().up} up and {h().down} down of{" "}
              {h().voting} that vote, confidence {number(h().confidence)}, expected move {number(h().magnitude_ticks)} ticks
            </p>
          </>
        )}
      </Show>
    </Panel>
  );
}

export function Weights(): JSX.Element {
  const lines = createMemo(() => (weights()?.members ?? []).map((label, i) => ({ label, colour: MEMBER[i % MEMBER.length]! })), [], {
    equals: (a, b) => a.map((l) => l.label).join() === b.map((l) => l.label).join(),
  });
  const data = (): uPlot.AlignedData => [
    series.weights.map((p) => p.ts / 1e6),
    ...lines().map((_, m) => series.weights.map((p) => p.values[m] ?? null)),
  ];
  return (
    <Panel title="Weights over time" area="weights" aside={<Key lines={lines()} />}>
      <Show when={lines().length && (beat(), series.weights.length > 0)} fallback={<Empty>{over() ? "a finished run keeps the last weights only; the report has them" : "nobody has told of weights yet"}</Empty>}>
        <Chart label="Weight of each member over time, in the regime that holds" lines={lines()} data={data} />
      </Show>
    </Panel>
  );
}

export function Positions(): JSX.Element {
  const held = createMemo(() => state.positions.filter((p) => p.size || p.realised || p.fees));
  return (
    <Panel title="Positions" area="positions">
      <Show when={held().length} fallback={<Empty>nothing was traded yet</Empty>}>
        <table>
          <caption class="hidden">Positions with their stops, targets and profit after costs</caption>
          <thead>
            <tr>
              <th>instrument</th>
              <th class="n">size</th>
              <th class="n">average</th>
              <th class="n">stop</th>
              <th class="n">target</th>
              <th class="n">open</th>
              <th class="n">fees</th>
              <th class="n">net</th>
            </tr>
          </thead>
          <tbody>
            <For each={held()}>
              {(p) => {
                const d = (): number => info().get(p.symbol)?.price_precision ?? 2;
                return (
                  <tr data-test={`position-${p.symbol}`}>
                    <td>{p.symbol}</td>
                    <td class="n">{p.size ? signed(p.size, 0) : "flat"}</td>
                    <td class="n">{number(p.average, d())}</td>
                    <td class="n">{number(p.stop, d())}</td>
                    <td class="n">{number(p.target, d())}</td>
                    <td class="n">
                      <Money value={p.unrealised} />
                    </td>
                    <td class="n">{number(p.fees)}</td>
                    <td class="n">
                      <Money value={p.net} />
                    </td>
                  </tr>
                );
              }}
            </For>
          </tbody>
        </table>
      </Show>
    </Panel>
  );
}

export function Profit(): JSX.Element {
  const lines = createMemo(() => state.pnl.map((p, i) => ({ label: p.currency, colour: MEMBER[i % MEMBER.length]! })), [], {
    equals: (a, b) => a.map((l) => l.label).join() === b.map((l) => l.label).join(),
  });
  const data = (): uPlot.AlignedData => {
    const stamps = [...new Set(lines().flatMap((l) => (series.pnl.get(l.label) ?? []).map((p) => p[0])))].sort((a, b) => a - b);
    const of = (currency: string): (number | null)[] => {
      const points = new Map(series.pnl.get(currency));
      let last: number | null = null;
      return stamps.map((ts) => (last = points.get(ts) ?? last));
    };
    return [stamps.map((ts) => ts / 1e6), ...lines().map((l) => of(l.label))];
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
                <Money value={p.net} /> {p.currency}
                <span class="soft">
                  {" "}
                  fees {number(p.fees)}, drawdown {number(p.max_drawdown)}
                </span>
              </li>
            )}
          </For>
        </ul>
      }
    >
      <Chart label="Profit and loss net of costs over time" lines={lines()} data={data} />
    </Panel>
  );
}

export function Latency(): JSX.Element {
  return (
    <Panel title="Latency" area="latency">
      <Show when={state.latency.length} fallback={<Empty>nothing was timed yet</Empty>}>
        <table>
          <caption class="hidden">Latency of each stage</caption>
          <thead>
            <tr>
              <th>stage</th>
              <th class="n">p50</th>
              <th class="n">p99</th>
              <th class="n">p99.9</th>
              <th class="n">most</th>
            </tr>
          </thead>
          <tbody>
            <For each={state.latency}>
              {(s) => (
                <tr>
                  <td>{words(s.stage)}</td>
                  <td class="n">{ms(s.p50_ms)}</td>
                  <td class="n">{ms(s.p99_ms)}</td>
                  <td class="n">{ms(s.p999_ms)}</td>
                  <td class="n">{ms(s.max_ms)}</td>
                </tr>
              )}
            </For>
          </tbody>
        </table>
      </Show>
    </Panel>
  );
}

export function Health(): JSX.Element {
  const count = (name: string): string => size(state.node.counts[name] ?? 0);
  return (
    <Panel title="Feeds and models" area="health">
      <For each={state.feeds} fallback={<Empty>no feed yet</Empty>}>
        {(f) => (
          <p>
            <b class={f.connected && (f.age_ms ?? 0) < 2_000 ? "good" : "bad"}>{f.connected ? "●" : "○"}</b> <b>{f.name}</b>{" "}
            {over() ? "" : `${f.connected ? "connected" : "not connected"}, newest event ${ms(f.age_ms)} ago, `}
            {size(f.events)} events, {f.gaps} gaps, {f.reconnects} reconnects, {f.errors} errors
            <Show when={f.note}>: {f.note}</Show>
          </p>
        )}
      </For>
      <p>
        Models <b>{state.models.version || "–"}</b>
        <Show when={state.models.reloads}>, reloaded {state.models.reloads} times</Show>
        <Show when={state.models.reload_error}>
          <span class="bad"> the last reload was refused: {state.models.reload_error}</span>
        </Show>
      </p>
      <p class="members">
        <For each={state.models.members}>
          {(m) => (
            <span classList={{ soft: !m.present, bad: m.failures > 0 }}>
              {m.member}
              {m.present ? (m.failures || m.late ? ` (${m.failures} failed, ${m.late} late)` : "") : " (absent)"}
            </span>
          )}
        </For>
      </p>
      <p class="soft">
        {count("vectors")} feature rows, {count("predictions")} predictions, {count("skipped")} skipped, {count("signals")} signals,{" "}
        {count("orders")} orders, {count("fills")} fills, {count("rejects")} rejects, {count("callback_errors")} errors
      </p>
    </Panel>
  );
}

export function Log(): JSX.Element {
  const [mine, setMine] = createSignal(false);
  const [entered, setEntered] = createSignal(false);
  const shown = createMemo(() =>
    decisions()
      .filter((d) => (!mine() || d.symbol === symbol()) && (!entered() || d.action === "enter"))
      .slice(0, 200),
  );
  return (
    <Panel
      title="Decisions"
      area="log"
      aside={
        <div class="switch">
          <button aria-pressed={mine()} onClick={() => setMine(!mine())}>
            {symbol() || "this instrument"} only
          </button>
          <button aria-pressed={entered()} onClick={() => setEntered(!entered())}>
            entries only
          </button>
        </div>
      }
    >
      <ol class="log" tabindex="0" aria-label="decisions, newest first">
        <For each={shown()} fallback={<Empty>no decision yet</Empty>}>
          {(d) => (
            <li classList={{ enter: d.action === "enter" }}>
              <time>{time(d.ts)}</time>
              <b>{d.symbol}</b>
              <span>
                {d.text}
                {d.times > 1 ? <span class="soft"> ×{d.times}</span> : ""}
              </span>
            </li>
          )}
        </For>
      </ol>
    </Panel>
  );
}

export function Orders(): JSX.Element {
  const working = createMemo(() => orders().filter((o) => o.open));
  const side = (s: number): string => (s > 0 ? "buy" : "sell");
  return (
    <Panel title="Orders and trades" area="orders">
      <table>
        <caption class="hidden">Working orders</caption>
        <thead>
          <tr>
            <th>order</th>
            <th>instrument</th>
            <th>side</th>
            <th class="n">size</th>
            <th class="n">price</th>
            <th>status</th>
          </tr>
        </thead>
        <tbody>
          <For
            each={working()}
            fallback={
              <tr>
                <td colspan="6" class="empty">
                  no order works
                </td>
              </tr>
            }
          >
            {(o) => (
              <tr>
                <td>{o.role}</td>
                <td>{o.symbol}</td>
                <td>{side(o.side)}</td>
                <td class="n">{size(o.size, 4)}</td>
                <td class="n">{number(o.price ?? o.trigger, info().get(o.symbol)?.price_precision ?? 2)}</td>
                <td>{o.status.toLowerCase()}</td>
              </tr>
            )}
          </For>
        </tbody>
      </table>
      <table>
        <caption>Closed trades, newest first</caption>
        <thead>
          <tr>
            <th>closed</th>
            <th>instrument</th>
            <th>side</th>
            <th class="n">size</th>
            <th>by</th>
            <th class="n">net</th>
          </tr>
        </thead>
        <tbody>
          <For
            each={trades().slice(0, 50)}
            fallback={
              <tr>
                <td colspan="6" class="empty">
                  no trade was closed
                </td>
              </tr>
            }
          >
            {(t) => (
              <tr>
                <td>{time(t.closed)}</td>
                <td>{t.symbol}</td>
                <td>{side(t.side)}</td>
                <td class="n">{size(t.size, 4)}</td>
                <td>{t.closed_by}</td>
                <td class="n">
                  <Money value={t.net} />
                </td>
              </tr>
            )}
          </For>
        </tbody>
      </table>
    </Panel>
  );
}
