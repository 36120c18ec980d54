// Figures -> uPlot charts. One time axis for all: the cursor moves through every chart at once.
/* global uPlot */
import { figure as format, h } from "report/dom";

const HUES = 8; // colours --c0 .. --c7 of the style sheet
const DASHES = [[], [6, 4], [2, 3], [10, 3, 2, 3]];
const BINS = 80; // bars in a stack at most
const HEIGHT = 210;

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (index) => () => css(`--c${index % HUES}`);
const faint = (index) => () => `color-mix(in srgb, ${css(`--c${index % HUES}`)} 18%, transparent)`;

/** The mean over runs at every step that any of them has, with the lowest and the highest of them. */
export function band(runs, metric) {
  const points = new Map();
  for (const { table } of runs) {
    (table.columns[metric] ?? []).forEach((value, i) => {
      if (value !== null) points.set(table.steps[i], [...(points.get(table.steps[i]) ?? []), value]);
    });
  }
  const steps = [...points.keys()].sort((a, b) => a - b);
  const over = (f) => steps.map((step) => f(points.get(step)));
  return {
    steps,
    mean: over((values) => values.reduce((a, b) => a + b) / values.length),
    low: over((values) => Math.min(...values)),
    high: over((values) => Math.max(...values)),
  };
}

/** Exponential moving average, corrected for its start; gaps stay gaps. */
export function smooth(values, weight) {
  let sum = 0;
  let total = 0;
  return values.map((value) => {
    if (value === null || weight === 0) return value;
    sum = weight * sum + value;
    total = weight * total + 1;
    return sum / total;
  });
}

/** Every step of any run: all charts have the same axis, so that one can be read above the other. */
const extent = (runs) => [...new Set(runs.flatMap((run) => run.table.steps))].sort((a, b) => a - b);

/** What the lines of a chart are: [{label, steps, values, hue, dash, role}], for groups that are not hidden. */
export function curves(figure, overview, state) {
  const lines = [];
  const several = overview.groups.length > 1;
  overview.groups.forEach((group, g) => {
    if (state.hidden.has(g)) return;
    figure.metrics.forEach((metric, m) => {
      const runs = group.runs.map((index) => overview.runs[index]).filter((run) => metric in run.table.columns);
      const name = figure.metrics.length > 1 ? metric.slice(metric.indexOf("/") + 1) : "";
      const label = [several ? group.label : "", name].filter(Boolean).join(" · ") || metric;
      const style = { hue: several ? g : m, dash: several ? m : 0 };
      if (runs.length > 1 && state.bands) {
        const { steps, mean, low, high } = band(runs, metric);
        lines.push({ ...style, label: `${label} (mean of ${runs.length})`, steps, values: mean, role: "mean" });
        lines.push({ ...style, label: `${label} highest`, steps, values: high, role: "high" });
        lines.push({ ...style, label: `${label} lowest`, steps, values: low, role: "low" });
      } else {
        for (const run of runs) {
          const seed = runs.length > 1 ? ` (seed ${run.seed ?? run.name})` : "";
          lines.push({ ...style, label: label + seed, steps: run.table.steps, values: run.table.columns[metric], role: "run" });
        }
      }
    });
  });
  return lines.map((line) => ({ ...line, values: smooth(line.values, state.smoothing) }));
}

/** Draws into `host`; returns the chart, or null when every run with these metrics is hidden. */
export function lines(host, figure, overview, state) {
  const drawn = curves(figure, overview, state);
  if (!drawn.length) return null;
  const steps = extent(overview.runs);
  const place = new Map(steps.map((step, i) => [step, i]));
  const rows = drawn.map((line) => {
    const row = new Array(steps.length).fill(null);
    line.steps.forEach((step, i) => { row[place.get(step)] = line.values[i]; });
    return row;
  });
  const bands = drawn.flatMap((line, i) => (line.role === "high" ? [{ series: [i + 1, i + 2], fill: faint(line.hue) }] : []));
  const series = drawn.map((line, i) => ({
    label: line.label,
    stroke: line.role === "high" || line.role === "low" ? undefined : colour(line.hue),
    width: 1.75,
    dash: DASHES[line.dash % DASHES.length],
    spanGaps: true,
    // A lone value has no line to be seen by.
    points: { show: rows[i].filter((value) => value !== null).length <= 12 && line.role !== "high" && line.role !== "low", size: 5 },
    value: (_, value) => format(value),
  }));
  return plot(host, [steps, ...rows], series, { bands, range: figure.share ? [0, 1] : null });
}

/** One group's metrics stacked as bars over the steps; several steps share a bar, as their mean, when there are many. */
export function bars(host, figure, overview, group) {
  const runs = overview.groups[group].runs.map((index) => overview.runs[index]);
  const means = figure.metrics.map((metric) => band(runs, metric));
  if (means.every(({ steps }) => !steps.length)) return null;
  const all = extent(overview.runs).filter((step) => step > 0); // before the first there was only an evaluation
  const per = Math.ceil(all.length / BINS);
  const bins = Array.from({ length: Math.ceil(all.length / per) }, (_, i) => all.slice(i * per, (i + 1) * per));
  const heights = means.map(({ steps, mean }) => {
    const at = new Map(steps.map((step, i) => [step, mean[i]]));
    return bins.map((bin) => bin.reduce((sum, step) => sum + (at.get(step) ?? 0), 0) / bin.length);
  });
  const stacked = heights.map((_, m) => bins.map((_, b) => heights.slice(0, m + 1).reduce((sum, row) => sum + row[b], 0)));
  const series = figure.metrics.map((metric, m) => ({
    label: metric.slice(metric.indexOf("/") + 1),
    stroke: colour(m),
    fill: colour(m),
    width: 0,
    paths: uPlot.paths.bars({ size: [0.9, 40] }),
    points: { show: false },
    value: (_, __, ___, i) => format(i === null ? null : heights[m][i]),
  }));
  // The tallest first, so that each lower sum is painted over it.
  return plot(host, [bins.map((bin) => bin[0]), ...stacked.toReversed()], series.toReversed(), { range: "zero", room: per / 2 });
}

function plot(host, data, series, { bands = [], range = null, room = 0 }) {
  const axis = { stroke: () => css("--muted"), grid: { stroke: () => css("--line"), width: 1 }, ticks: { show: false }, font: "11px system-ui" };
  const edge = (_, low, high) => {
    if (range === "zero") return [0, high > 0 ? high * 1.05 : 1];
    if (range) return [Math.min(range[0], low ?? 0), Math.max(range[1], high ?? 1)];
    if (low === 0 && high === 0) return [0, 1];
    const margin = low === high ? Math.abs(low) * 0.1 : (high - low) * 0.06;
    return [low >= 0 ? Math.max(0, low - margin) : low - margin, high + margin]; // no negative lengths on an axis
  };
  const chart = new uPlot({
    width: host.clientWidth,
    height: HEIGHT,
    scales: { x: { time: false, range: (_, low, high) => [low - room, high + room] }, y: { range: edge } },
    axes: [{ ...axis, size: 28 }, { ...axis, size: 54, values: (_, ticks) => ticks.map((tick) => format(tick)) }],
    cursor: { sync: { key: "steps" }, points: { size: 6 }, y: false },
    series: [{ label: "step", value: (_, step) => format(step) }, ...series],
    bands,
    legend: { live: true },
  }, data, host);
  // Readers want lines in the legend, not the edges of bands.
  series.forEach((one, i) => { if (!one.stroke) chart.root.querySelectorAll(".u-legend tr.u-series")[i + 1].hidden = true; });
  return chart;
}

/** A legend of the groups that hides and shows them in all charts. */
export function legend(overview, state, redraw) {
  if (overview.groups.length < 2) return null;
  return h("div.legend", {}, overview.groups.map((group, g) => h(`button.run.hue${g % HUES}`, {
    type: "button",
    ariaPressed: String(!state.hidden.has(g)),
    title: group.runs.map((index) => overview.runs[index].name).join("\n"),
    onclick: (event) => {
      if (!state.hidden.delete(g)) state.hidden.add(g);
      event.currentTarget.ariaPressed = String(!state.hidden.has(g));
      redraw();
    },
  }, group.label, group.runs.length > 1 ? h("small", {}, ` ${group.runs.length} seeds`) : null)));
}
