// A line chart over time (uPlot) that follows the frames; what else is drawn on it comes as a function.

import { createEffect, onCleanup, onMount, type JSX } from "solid-js";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import { number } from "./format";

export interface Line {
  label: string;
  colour: string;
}

interface Props {
  label: string; // what a screen reader says of the picture
  unit: string; // of the values, written above their axis
  lines: Line[];
  data: () => uPlot.AlignedData;
  draw?: (u: uPlot) => void;
  step?: boolean;
  range?: [number, number]; // of the values, where it is known beforehand
  due: () => unknown; // changes when there is something new to draw
  reach?: (from: number) => (number | null)[]; // values since then, ms, that have to be within sight beside the data
}

const DAY_MS = 86_400_000;
const FONT = "11px system-ui, sans-serif";
const GLYPH = 6.4; // px of a digit in FONT

export const css = (name: string): string => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Times of one day as such, of several with their date. */
const times = (at: number[]): string[] => {
  const [from, to] = at.at(-1)! - at[0]! > DAY_MS ? [5, 16] : [11, 19];
  return at.map((x) => new Date(x).toISOString().slice(from, to).replace("T", " "));
};

/** Values with as many digits as tell them apart. */
const values = (at: number[]): string[] => {
  const whole = (digits: number): boolean => at.every((x) => Math.abs(x * 10 ** digits - Math.round(x * 10 ** digits)) < 1e-6);
  const digits = [0, 1, 2, 3, 4, 5, 6, 7].find(whole) ?? 8;
  return at.map((x) => number(x, digits).replace("-", "−"));
};

/** Say above the axes what they measure. */
function name(u: uPlot, unit: string): void {
  const { ctx } = u;
  const ratio = devicePixelRatio;
  ctx.save();
  ctx.font = FONT.replace("11px", `${11 * ratio}px`);
  ctx.fillStyle = css("--soft");
  ctx.textBaseline = "bottom";
  ctx.textAlign = "left";
  ctx.fillText(unit, 4 * ratio, u.bbox.top - 9 * ratio);
  ctx.textAlign = "right";
  ctx.fillText("UTC", u.bbox.left + u.bbox.width, u.bbox.top - 9 * ratio);
  ctx.restore();
}

export function Chart(props: Props): JSX.Element {
  let box!: HTMLDivElement;
  let plot: uPlot | undefined;
  const make = (): void => {
    plot?.destroy();
    const line = { stroke: css("--line"), width: 1 };
    const axis = { stroke: css("--soft"), grid: line, ticks: { ...line, size: 4 }, gap: 4, font: FONT };
    const wide = (said: string[] | null): number => 14 + GLYPH * Math.max(4, ...(said ?? []).map((x) => x.length));
    const bounds: uPlot.Range.Function = (u, low, high) => {
      if (props.range) return props.range;
      const seen = [low, high, ...(props.reach?.(u.data[0][0] ?? 0) ?? [])].filter((v) => v != null && Number.isFinite(v)) as number[];
      const [a, b] = seen.length ? [Math.min(...seen), Math.max(...seen)] : [0, 1];
      const room = (b - a || Math.abs(a) || 1) * 0.08;
      return [a - room, b + room];
    };
    plot = new uPlot(
      {
        width: Math.max(box.clientWidth, 50),
        height: Math.max(box.clientHeight, 50),
        ms: 1,
        tzDate: (ts) => uPlot.tzDate(new Date(ts), "UTC"),
        padding: [24, 8, 0, 0],
        legend: { show: false },
        cursor: { drag: { x: true, y: false }, points: { size: 5 } },
        scales: { y: { range: bounds } },
        axes: [
          { ...axis, space: 76, size: 24, values: (_, v) => times(v) },
          { ...axis, space: 26, size: (_, said) => wide(said), values: (_, v) => values(v) },
        ],
        series: [
          {},
          ...props.lines.map((line) => ({
            label: line.label,
            stroke: line.colour,
            width: 1.5,
            points: { show: false },
            ...(props.step ? { paths: uPlot.paths.stepped!({ align: 1 }) } : {}),
          })),
        ],
        hooks: { draw: [(u) => (props.draw?.(u), name(u, props.unit))] },
      },
      props.data(),
      box,
    );
  };
  onMount(() => {
    const resize = new ResizeObserver(() => plot?.setSize({ width: Math.max(box.clientWidth, 50), height: Math.max(box.clientHeight, 50) }));
    const scheme = new MutationObserver(make);
    createEffect(() => (void props.lines.length, make()));
    resize.observe(box);
    scheme.observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
    let due = 0;
    createEffect(() => {
      props.due();
      if (document.hidden) return;
      cancelAnimationFrame(due);
      due = requestAnimationFrame(() => plot?.setData(props.data()));
    });
    onCleanup(() => {
      cancelAnimationFrame(due);
      resize.disconnect();
      scheme.disconnect();
      plot?.destroy();
    });
  });
  return <div class="chart" ref={box} role="img" aria-label={props.label} />;
}

export function Key(props: { lines: Line[] }): JSX.Element {
  return (
    <ul class="key">
      {props.lines.map((line) => (
        <li>
          <i style={{ background: line.colour }} />
          {line.label}
        </li>
      ))}
    </ul>
  );
}
