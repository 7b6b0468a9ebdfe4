// The models: what each member votes, how much it weighs, and what was decided.

import { For, Index, Show, createMemo, createSignal, type JSX } from "solid-js";
import type uPlot from "uplot";
import { Chart, Key } from "./chart";
import { MEMBER, horizon, number, percent, time } from "./format";
import { Empty, Panel, instrument, over, symbol } from "./parts";
import { decisions, series, slow, state } from "./store";
import type { Instrument, Vote } from "./types";

const [horizonShown, setHorizonShown] = createSignal<number | null>(null);
const SHOWN = 100; // decisions
const WAYS = ["down", "flat", "up"] as const;
const READABLE = 0.15; // of a bar; a smaller part has no room for its figure

const colour = (member: string): string => MEMBER[state.models.members.findIndex((m) => m.member === member) % MEMBER.length] ?? MEMBER[0]!;
const absent = (member: string): boolean => state.models.members.some((m) => m.member === member && !m.present);

function Bar(props: { vote: Vote | null; none?: string }): JSX.Element {
  return (
    <Show when={props.vote} fallback={<span class="bar none">{props.none ?? "abstains"}</span>}>
      {(v) => (
        <span class="bar" role="img" aria-label={`down ${percent(v()[0])}, flat ${percent(v()[1])}, up ${percent(v()[2])}`}>
          <For each={WAYS}>
            {(way, i) => (
              <i class={way} style={{ width: `${100 * v()[i()]!}%` }}>
                {v()[i()]! >= READABLE ? percent(v()[i()]) : ""}
              </i>
            )}
          </For>
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
      title={`Votes on ${symbol() || "–"}`}
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
            <ul class="key ways">
              <For each={WAYS}>
                {(way) => (
                  <li>
                    <i class={way} />
                    {way}
                  </li>
                )}
              </For>
            </ul>
            <dl class="votes">
              <For each={Object.keys(h().votes)}>
                {(name) => (
                  <>
                    <dt>
                      <i style={{ background: colour(name) }} />
                      {name}
                    </dt>
                    <dd>
                      <Bar vote={h().votes[name] ?? null} none={absent(name) ? "not in these models" : "abstains"} />
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
  const there = createMemo(
    () => state.models.members.flatMap((m, at) => (m.present ? [{ at, label: m.member, colour: colour(m.member) }] : [])),
    [],
    { equals: (a, b) => a.map((m) => m.label).join() === b.map((m) => m.label).join() },
  );
  const data = (): uPlot.AlignedData => {
    const points = series.weights;
    const sums = points.map((p) => there().reduce((sum, m) => sum + (p.values[m.at] ?? 0), 0)); // absent members hold weight too
    return [points.map((p) => p.ts / 1e6), ...there().map((m) => points.map((p, i) => (sums[i] ? p.values[m.at]! / sums[i] : null)))];
  };
  return (
    <Panel title="Weights over time" area="weights" aside={<Key lines={there()} />}>
      <Show when={there().length && (slow(), series.weights.length > 0)} fallback={<Empty>nobody has told of weights yet</Empty>}>
        <Chart
          label={`Share of each member in the ensemble over time, ${over() ? "mean over regimes" : "in the regime that holds"}`}
          unit={`share, ${over() ? "mean over regimes" : "in the regime that holds"}`}
          lines={there()}
          data={data}
          range={[0, 1]}
          due={slow}
        />
      </Show>
    </Panel>
  );
}

export function Log(): JSX.Element {
  const [mine, setMine] = createSignal(false);
  const [entered, setEntered] = createSignal(false);
  const shown = createMemo(() =>
    decisions()
      .filter((d) => (!mine() || d.symbol === symbol()) && (!entered() || d.action === "enter"))
      .slice(0, SHOWN),
  );
  const longest = (): number => Math.max(6, ...state.instruments.map((x) => x.symbol.length));
  const nothing = (): string => (decisions().length ? "none of the newest decisions is of that kind" : over() ? "nothing was traded" : "no decision yet");
  return (
    <Panel
      title={over() ? "Entries" : "Decisions"}
      area="log"
      aside={
        <div class="switch">
          <button aria-pressed={mine()} onClick={() => setMine(!mine())}>
            {symbol() || "this instrument"} only
          </button>
          <Show when={!over()}>
            <button aria-pressed={entered()} onClick={() => setEntered(!entered())}>
              entries only
            </button>
          </Show>
        </div>
      }
    >
      <ol class="log" tabindex="0" aria-label="decisions, newest first" style={{ "--symbol": `${1.2 * longest()}ch` }}>
        <For each={shown()} fallback={<Empty>{nothing()}</Empty>}>
          {(d) => (
            <li classList={{ enter: d.action === "enter" && !over() }}>
              <time>{time(d.ts)}</time>
              <b>{d.symbol}</b>
              <span>
                {d.text}
                {d.times > 1 ? <span class="soft" title={`stands for ${d.times} predictions`}> ×{d.times}</span> : ""}
              </span>
            </li>
          )}
        </For>
      </ol>
    </Panel>
  );
}
