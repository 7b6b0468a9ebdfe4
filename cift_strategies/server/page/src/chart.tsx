// A line chart over time (uPlot) that follows the frames; what else is drawn on it comes as a function.

import { createEffect, onCleanup, onMount, type JSX } from "solid-js";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import { beat } from "./store";

export interface Line {
  label: string;
  colour: string;
}

interface Props {
  label: string; // what a screen reader says of the picture
  lines: Line[];
  data: () => uPlot.AlignedData;
  draw?: (u: uPlot) => void;
  step?: boolean;
  digits?: number;
  padding?: number; // px below the lines, for ribbons
  watch?: () => unknown; // beside the frames, what the data depend on
  reach?: () => number[]; // values that have to be within sight, beside the data
}

const css = (name: string): string => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export function Chart(props: Props): JSX.Element {
  let box!: HTMLDivElement;
  let plot: uPlot | undefined;
  const make = (): void => {
    plot?.destroy();
    const axis = { stroke: css("--soft"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1 }, font: "11px system-ui" };
    plot = new uPlot(
      {
        width: Math.max(box.clientWidth, 50),
        height: Math.max(box.clientHeight, 50),
        ms: 1,
        tzDate: (ts) => uPlot.tzDate(new Date(ts), "UTC"),
        padding: [8, 8, props.padding ?? 0, 0],
        legend: { show: false },
        cursor: { drag: { x: true, y: false }, points: { size: 5 } },
        scales: {
          y: {
            range: (_, low, high) => {
              const seen = [low, high, ...(props.reach?.() ?? [])].filter(Number.isFinite);
              const [a, b] = seen.length ? [Math.min(...seen), Math.max(...seen)] : [0, 1];
              const room = (b - a || Math.abs(a) || 1) * 0.08;
              return [a - room, b + room];
            },
          },
        },
        axes: [{ ...axis, space: 70, values: (_, v) => v.map((x) => new Date(x).toISOString().slice(11, 19)) }, { ...axis, size: 64, values: (_, v) => v.map((x) => x.toFixed(props.digits ?? 2)) }],
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
        hooks: { draw: [(u) => props.draw?.(u)] },
      },
      props.data(),
      box,
    );
  };
  onMount(() => {
    const resize = new ResizeObserver(() => plot?.setSize({ width: Math.max(box.clientWidth, 50), height: Math.max(box.clientHeight, 50) }));
    const scheme = new MutationObserver(make);
    const system = matchMedia("(prefers-color-scheme: dark)");
    createEffect(() => (void props.lines.length, make()));
    resize.observe(box);
    scheme.observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
    system.addEventListener("change", make);
    let due = 0;
    createEffect(() => {
      beat();
      props.watch?.();
      if (document.hidden) return;
      cancelAnimationFrame(due);
      due = requestAnimationFrame(() => plot?.setData(props.data()));
    });
    onCleanup(() => {
      cancelAnimationFrame(due);
      resize.disconnect();
      scheme.disconnect();
      system.removeEventListener("change", make);
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
