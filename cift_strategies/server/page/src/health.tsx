// How the system is: latency of each stage, feeds, models and counts.

import { For, Show, type JSX } from "solid-js";
import { ms, size, words } from "./format";
import { Panel, Table, over, type Column } from "./parts";
import { state } from "./store";
import type { Feed, Stage } from "./types";

const FRESH_MS = 2_000;

const MEANS: Record<string, string> = {
  receipt: "event to features",
  prediction: "event to prediction",
  decision: "event to entry",
  fill: "entry to first fill",
  frame: "telling this page",
  queue: "wait for the models",
  predict: "models compute",
  return: "back to the strategy",
};

const STAGES: Column<Stage>[] = [
  { head: "stage", cell: (s) => <>{words(s.stage)} <span class="soft wide">{MEANS[s.stage] ?? ""}</span></> },
  { head: "p50", n: true, cell: (s) => ms(s.p50_ms) },
  { head: "p99", n: true, cell: (s) => ms(s.p99_ms) },
  { head: "p99.9", n: true, cell: (s) => ms(s.p999_ms) },
  { head: "longest", n: true, cell: (s) => ms(s.max_ms) },
];

export function Latency(): JSX.Element {
  return (
    <Panel title="Latency" area="latency" aside={<span class="soft">since the start</span>}>
      <Table caption="Latency of each stage" columns={STAGES} rows={state.latency} empty="nothing was timed yet" />
    </Panel>
  );
}

function Light(props: { feed: Feed }): JSX.Element {
  const good = (): boolean => props.feed.connected && (props.feed.age_ms ?? 0) < FRESH_MS;
  const says = (): string => (over() ? "read to its end" : !props.feed.connected ? "not connected" : good() ? "connected" : "connected, but silent");
  return (
    <>
      <b class={good() ? "good" : "bad"} role="img" aria-label={says()} title={says()}>
        {props.feed.connected ? "●" : "○"}
      </b>{" "}
      {props.feed.name}
    </>
  );
}

const FEEDS: Column<Feed>[] = [
  { head: "feed", cell: (f) => <Light feed={f} /> },
  { head: "newest", n: true, cell: (f) => (f.age_ms == null ? "–" : `${ms(f.age_ms)} ago`) },
  { head: "lag", n: true, wide: true, cell: (f) => ms(f.lag_ms) },
  { head: "events", n: true, cell: (f) => size(f.events) },
  { head: "gaps", n: true, cell: (f) => size(f.gaps) },
  { head: "reconnects", n: true, wide: true, cell: (f) => size(f.reconnects) },
  { head: "errors", n: true, cell: (f) => size(f.errors) },
];

export function Health(): JSX.Element {
  return (
    <Panel title="Feeds and models" area="health">
      <Table caption="Feeds" columns={FEEDS} rows={state.feeds} empty="no feed yet" />
      <For each={state.feeds.filter((f) => f.note)}>{(f) => <p class="soft">{f.note}</p>}</For>
      <p class="models">
        Models <b>{state.models.version || "–"}</b>
        <Show when={state.models.reloads}>, reloaded {state.models.reloads === 1 ? "once" : `${state.models.reloads} times`}</Show>
        {": "}
        <For each={state.models.members}>
          {(m, i) => (
            <span classList={{ soft: !m.present, bad: m.failures > 0 }}>
              {i() ? ", " : ""}
              {m.member}
              {m.present ? (m.failures || m.late ? ` (${m.failures} failed, ${m.late} late)` : "") : " (absent)"}
            </span>
          )}
        </For>
        <Show when={state.models.reload_error}>
          <span class="bad"> The last reload was refused: {state.models.reload_error}</span>
        </Show>
      </p>
      <dl class="counts">
        <For each={Object.keys(state.node.counts)}>
          {(name) => (
            <div>
              <dt>{words(name)}</dt>
              <dd class="n">{size(state.node.counts[name] ?? 0)}</dd>
            </div>
          )}
        </For>
      </dl>
    </Panel>
  );
}
