// Numbers and times as they are shown.

export const number = (value: number | null | undefined, digits = 2): string =>
  value == null ? "–" : value.toLocaleString("en-GB", { minimumFractionDigits: digits, maximumFractionDigits: digits });

export const signed = (value: number | null | undefined, digits = 2): string =>
  value == null ? "–" : `${value > 0 ? "+" : value < 0 ? "−" : ""}${number(Math.abs(value), digits)}`;

export const size = (value: number, digits = 0): string => value.toLocaleString("en-GB", { maximumFractionDigits: digits });

export const percent = (value: number | null | undefined): string => (value == null ? "–" : `${(100 * value).toFixed(0)} %`);

export const time = (ns: number | null | undefined): string => (ns ? new Date(ns / 1e6).toISOString().slice(11, 23) : "–");

export const clock = (ns: number): string => (ns ? new Date(ns / 1e6).toISOString().slice(0, 19).replace("T", " ") : "–");

export const horizon = (ms: number): string => (ms < 1_000 ? `${ms} ms` : `${ms / 1_000} s`);

export const ms = (value: number | null | undefined): string =>
  value == null ? "–" : value < 1 ? `${(value * 1_000).toFixed(0)} µs` : value < 1_000 ? `${value.toFixed(1)} ms` : `${(value / 1_000).toFixed(1)} s`;

export const words = (name: string): string => name.replaceAll("_", " ");

/** Okabe and Ito's palette, which the colour-blind can tell apart. */
export const MEMBER = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999933"];
export const REGIME: Record<string, string> = {
  low_volatility: "#009e73",
  trending_up: "#56b4e9",
  trending_down: "#e69f00",
  high_volatility: "#d55e00",
  crisis: "#882255",
  unknown: "#999999",
};
