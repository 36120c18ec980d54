// The first view: scores, settings, and every figure.
import { load } from "report/data";
import { bars, legend, lines } from "report/charts";
import { figure as format, h, plural } from "report/dom";

const CALLED = { __proto__: null, cache: "Prefix cache", saved: "Saved work", balance: "Balance", data: "Data", perf: "Throughput" };

export async function overview() {
  const data = await load("overview");
  const state = { hidden: new Set(), smoothing: 0, bands: true };
  const charts = new Map(); // the element of a figure -> what draws it
  const titles = new Map();
  const redraw = () => { for (const chart of charts.values()) chart.stale = true; visible(); };
  const visible = () => { for (const chart of charts.values()) if (chart.near && chart.stale) draw(chart, data, state); };
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) charts.get(entry.target).near = entry.isIntersecting;
    visible();
  }, { rootMargin: "400px" });
  const resize = new ResizeObserver((entries) => {
    for (const { target, contentRect } of entries) {
      for (const plot of charts.get(target).plots) plot.setSize({ width: contentRect.width, height: plot.height });
    }
  });
  document.addEventListener("theme", () => { for (const { plots } of charts.values()) plots.forEach((plot) => plot.redraw(false)); });

  const sections = [...new Set(data.figures.map(({ section }) => section))].map((section) => {
    const cards = data.figures.filter((one) => one.section === section).map((one) => {
      const body = h("div.plot");
      charts.set(body, { figure: one, body, plots: [], stale: true, near: false });
      const link = h("a", { href: `#charts=${encodeURIComponent(one.title)}`, title: "link to this chart" }, one.title);
      const card = h("figure", {}, h("figcaption", {}, h("strong", {}, link), " ", one.note), body, broken(one, data));
      titles.set(one.title, card);
      return card;
    });
    return h("section", {}, h("h2", {}, CALLED[section] ?? section), h("div.grid", {}, cards));
  });
  const element = h("div.overview", {},
    status(data), scores(data), settings(data),
    h("div.controls", {}, legend(data, state, redraw), controls(data, state, redraw)),
    sections,
    h("footer", {}, "Drag in a chart to zoom, double-click to go back. Click a name in a chart's legend to hide a line."),
  );
  for (const body of charts.keys()) { watch.observe(body); resize.observe(body); }
  addEventListener("beforeprint", () => { for (const chart of charts.values()) if (chart.stale) draw(chart, data, state); });
  const follow = async (title) => {
    titles.get(title)?.scrollIntoView();
    return true;
  };
  return { element, follow };
}

function draw(chart, data, state) {
  for (const plot of chart.plots) plot.destroy();
  chart.body.replaceChildren();
  chart.stale = false;
  if (chart.figure.kind === "lines") {
    chart.plots = [lines(chart.body, chart.figure, data, state)];
  } else {
    chart.plots = data.groups.map((group, g) => {
      if (state.hidden.has(g)) return null;
      if (data.groups.length > 1) chart.body.append(h("div.caption", {}, group.label));
      return bars(chart.body, chart.figure, data, g);
    });
  }
  chart.plots = chart.plots.filter(Boolean);
}

function broken(figure, data) {
  const steps = data.runs.flatMap((run) => figure.metrics.flatMap((metric) => run.table.broken[metric] ?? []));
  if (!steps.length) return null;
  const some = [...new Set(steps)].slice(0, 8).join(", ");
  return h("p.warning", {}, `${plural(steps.length, "value")} not finite, and not drawn (step ${some}${steps.length > 8 ? ", …" : ""}).`);
}

function controls(data, state, redraw) {
  const smoothing = h("input", { type: "range", min: 0, max: 0.95, step: 0.05, value: 0,
    oninput: (event) => { state.smoothing = Number(event.target.value); redraw(); } });
  const seeds = data.groups.some((group) => group.runs.length > 1)
    ? h("label.choice", {}, h("input", { type: "checkbox", checked: true,
      onchange: (event) => { state.bands = event.target.checked; redraw(); } }), "seeds as mean, with a band from lowest to highest")
    : null;
  return [h("label.choice", {}, "smoothing", smoothing), seeds];
}

/** Where the runs stand: tiles for one, a table for several. */
function status(data) {
  const sum = (run, metric) => (run.table.columns[metric] ?? []).reduce((total, value) => total + (value ?? 0), 0);
  const facts = data.runs.map((run) => {
    const going = run.steps !== null && run.steps_done < run.steps;
    const last = (run.table.columns["reward/correct"] ?? []).findLast((value) => value !== null);
    const produced = sum(run, "mel/pairs");
    return {
      [going ? "steps: not finished when this was written" : "steps"]: run.steps === null ? format(run.steps_done) : `${run.steps_done} / ${run.steps}`,
      "right responses, last step": format(last),
      "meta-experiences kept": produced ? `${format(sum(run, "mel/kept"))} / ${format(produced)}` : "–",
      "time in steps": span(sum(run, "time/step")),
    };
  });
  if (facts.length === 1) {
    return h("div", {}, h("p.meta", {}, told(data.runs[0].settings)), h("div.tiles", {}, Object.entries(facts[0]).filter(([, value]) => value !== "–")
      .map(([what, value]) => h("div.tile", {}, h("b", {}, value), h("span", {}, what)))));
  }
  return h("table.status", {},
    h("thead", {}, h("tr", {}, ["run", "steps done", "right responses, last step", "meta-experiences kept", "time in steps"].map((title) => h("th", {}, title)))),
    h("tbody", {}, facts.map((fact, i) => h("tr", {}, h("td", {}, data.runs[i].name),
      Object.entries(fact).map(([what, value]) => h("td", { title: what }, value))))));
}

const span = (seconds) => (seconds === 0 ? "–" : seconds < 120 ? `${format(seconds)} s` : seconds < 7200 ? `${format(seconds / 60)} min` : `${format(seconds / 3600)} h`);

/** A run's main settings in one line. */
function told(settings) {
  const get = (key) => (key in settings ? JSON.parse(settings[key]) : null);
  const each = (key, words) => (get(key) === null ? null : words(get(key)));
  return [
    each("objective.algorithm", (name) => name + (get("mel.enabled") ? " with meta-experience" : get("mel.enabled") === false ? " without meta-experience" : "")),
    each("model.path", (path) => path),
    each("rollout.group_size", (size) => `${get("rollout.prompts_per_step") ?? "?"} prompts × ${size} responses per step`),
    each("optim.lr", (rate) => `learning rate ${format(rate)}`),
    each("run.seed", (seed) => `seed ${seed}`),
  ].filter(Boolean).join(" · ");
}

/** First and last evaluation of each benchmark; over seeds the mean and the range. */
function scores(data) {
  const sets = [...new Set(data.runs.flatMap((run) => run.sets))];
  if (!sets.length) return null;
  const k = data.k ?? "k";
  const names = { pass_at_1: "Pass@1", avg_at_k: `Avg@${k}`, pass_at_k: `Pass@${k}` };
  const ends = (run, metrics) => {
    const rows = metrics.map((metric) => run.table.columns[metric]).filter(Boolean);
    const at = run.table.steps.flatMap((step, i) => (rows.length === metrics.length && rows.every((row) => row[i] !== null) ? [i] : []));
    const mean = (i) => rows.reduce((sum, row) => sum + row[i], 0) / rows.length;
    return at.length ? [mean(at[0]), mean(at.at(-1))] : null;
  };
  const cell = (group, metrics) => {
    const found = group.runs.map((index) => ends(data.runs[index], metrics)).filter(Boolean);
    if (!found.length) return h("td", {}, "–");
    const mean = (end) => found.reduce((sum, pair) => sum + pair[end], 0) / found.length;
    const last = found.map((pair) => pair[1]);
    const range = found.length > 1 ? ` (${Math.min(...last).toFixed(3)} to ${Math.max(...last).toFixed(3)})` : "";
    return h("td", {}, h("span.before", {}, `${mean(0).toFixed(3)} → `), h("b", {}, mean(1).toFixed(3)), range);
  };
  const lines = sets.map((set) => [set, [set]]);
  if (sets.length > 1) lines.push(["mean over sets", sets]);
  return h("table.scores", {},
    h("thead", {}, h("tr", {}, h("th", {}, "validation, first → last"), data.groups.length > 1 ? h("th", {}, "run") : null,
      Object.values(names).map((name) => h("th", {}, name)))),
    h("tbody", {}, lines.flatMap(([title, members]) => data.groups.map((group, g) => h("tr", {},
      h("td", {}, g === 0 ? title : ""), data.groups.length > 1 ? h(`td.hue${g % 8}`, {}, group.label) : null,
      Object.keys(names).map((score) => cell(group, members.map((set) => `eval/${set}/${score}`))))))));
}

/** What tells the runs apart, and everything they were told. */
function settings(data) {
  const differing = Object.keys(data.groups[0].differs);
  const keys = [...new Set(data.runs.flatMap((run) => Object.keys(run.settings)))];
  const table = (names, columns, value) => h("div.wide", {}, h("table", {},
    h("thead", {}, h("tr", {}, h("th", {}, "setting"), columns.map((column) => h("th", {}, column)))),
    h("tbody", {}, names.map((key) => h("tr", {}, h("td", {}, h("code", {}, key)), columns.map((_, i) => h("td", {}, h("code", {}, value(i, key)))))))));
  const apart = differing.length === 0 ? null : h("details", { open: differing.length <= 6 }, h("summary", {}, differing.length === 1 ? "1 setting that differs" : `${differing.length} settings that differ`),
    table(differing, data.groups.map((group) => group.label), (i, key) => data.groups[i].differs[key]));
  const all = keys.length === 0 ? null : h("details", {}, h("summary", {}, "All settings"),
    table(keys, data.runs.map((run) => run.name), (i, key) => data.runs[i].settings[key] ?? "–"));
  return h("div", {}, apart, all);
}
