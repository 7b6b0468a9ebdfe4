// What all panels are made of, and which instrument they show.

import { For, createSignal, type JSX } from "solid-js";
import { REGIME, number, signed, size, words } from "./format";
import { info, state } from "./store";
import type { Instrument, Position } from "./types";

export const [chosen, setChosen] = createSignal("");
export const symbol = (): string => (chosen() && info().has(chosen()) ? chosen() : (state.instruments[0]?.symbol ?? ""));
export const instrument = (): Instrument | undefined => state.instruments.find((x) => x.symbol === symbol());
export const position = (): Position | undefined => state.positions.find((x) => x.symbol === symbol());
export const over = (): boolean => state.node.state === "finished";

/** A price of an instrument with as many digits as it is quoted in, and `more` for a mid. */
export const price = (name: string, value: number | null | undefined, more = 0): string =>
  number(value, (info().get(name)?.price_precision ?? 2) + more);

/** A size of an instrument in units. */
export const units = (name: string, value: number): string => size(value, info().get(name)?.size_precision ?? 0);

/** A position: its size with a sign, or that there is none. */
export const held = (at: Position | undefined): string => (at?.size ? (at.size > 0 ? "+" : "−") + units(at.symbol, Math.abs(at.size)) : "flat");

export const side = (s: number): string => (s > 0 ? "buy" : "sell");

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

/** A list that shares its panel with others and scrolls by itself, with the keyboard too. */
export const Scroll = (props: { label: string; children: JSX.Element }): JSX.Element => (
  <div class="scroll" role="region" tabindex="0" aria-label={props.label}>
    {props.children}
  </div>
);

export const Empty = (props: { children: JSX.Element }): JSX.Element => <p class="empty">{props.children}</p>;

export interface Column<T> {
  head: string;
  cell: (row: T) => JSX.Element;
  n?: boolean; // a number: to the right
  wide?: boolean; // left out on a phone
}

interface TableProps<T> {
  caption: string; // what a screen reader says; seen where `titled`
  titled?: boolean;
  columns: Column<T>[];
  rows: readonly T[];
  empty: string; // said where there is no row
  test?: (row: T) => string;
}

export function Table<T>(props: TableProps<T>): JSX.Element {
  return (
    <table>
      <caption classList={{ hidden: !props.titled }}>{props.caption}</caption>
      <thead>
        <tr>
          <For each={props.columns}>{(c) => <th classList={{ n: c.n, wide: c.wide }}>{c.head}</th>}</For>
        </tr>
      </thead>
      <tbody>
        <For
          each={props.rows}
          fallback={
            <tr>
              <td colspan={props.columns.length} class="empty">
                {props.empty}
              </td>
            </tr>
          }
        >
          {(row) => (
            <tr data-test={props.test?.(row)}>
              <For each={props.columns}>{(c) => <td classList={{ n: c.n, wide: c.wide }}>{c.cell(row)}</td>}</For>
            </tr>
          )}
        </For>
      </tbody>
    </table>
  );
}

export const Regime = (props: { name: string | null }): JSX.Element => (
  <span class="regime" title={words(props.name ?? "unknown")}>
    <i style={{ background: REGIME[props.name ?? "unknown"] ?? REGIME.unknown }} />
    <span>{words(props.name ?? "unknown")}</span>
  </span>
);

export const Money = (props: { value: number }): JSX.Element => (
  <span classList={{ gain: props.value >= 0.005, loss: props.value <= -0.005 }}>{signed(props.value)}</span>
);
