// Each meta-experience with the two solutions it contrasts.
import { load } from "report/data";
import { dotted, figure as format, h } from "report/dom";
import { found } from "report/marks";
import { viewer } from "report/viewer";

const VERDICTS = {
  kept: "kept: its replay verified",
  unproven: "kept, though no replay verified",
  failed: "dropped: its replay did not verify",
  malformed: "dropped: malformed",
  unreplayed: "dropped: no replay fitted into the context",
};

const NEAR = 10; // others on the same question that are listed before and after one

export async function experiences() {
  const [{ runs, figures }, table, rolled] = await Promise.all([load("overview"), load("experiences"), load("rollouts")]);
  const count = table.step.length;
  const names = table.run.map((run) => runs[run].name);
  const key = (i) => [names[i], table.step[i], table.place[i], table.number[i]].join("/");
  const groups = new Set(rolled.step.map((step, i) => [runs[rolled.run[i]].name, step, rolled.place[i]].join("/")));
  const curve = figures.find(({ metrics }) => metrics.some((metric) => metric.startsWith("nll/")))?.title;
  const question = (row) => JSON.stringify([table.run[row], table.id[row]]);
  const rows = Map.groupBy(table.id.keys(), question); // in the order of steps
  const others = (row) => {
    const all = rows.get(question(row));
    const from = Math.max(0, Math.min(all.indexOf(row) - NEAR, all.length - 2 * NEAR - 1));
    const near = all.slice(from, from + 2 * NEAR + 1);
    const told = near.map((i) => ({ step: table.step[i], status: table.status[i], nll: table.nll[i], key: key(i), current: i === row }));
    return { near: told, left: all.length - near.length };
  };
  const record = async (row) => (await load(`experiences-${Math.floor(row / table.per_chunk)}`))[row % table.per_chunk];
  return viewer({
    name: "experience",
    noun: "meta-experience",
    keys: Array.from({ length: count }, (_, i) => key(i)),
    steps: table.step,
    filters: [
      { label: "verdict", values: table.status },
      { label: "reason", values: table.reason, names: { __proto__: null, "": "well-formed" } },
      { label: "family", values: table.family },
      { label: "run", values: names },
    ],
    notes: table.notes,
    empty: "No meta-experience was dumped: MEL was off, telemetry.dump_rollouts was false, or no group had a contrast.",
    line: (row) => [h(`i.${table.status[row]}`, {}, table.status[row]), h("span.where", {}, `step ${table.step[row]} · ${table.id[row]}`), h("span.snippet", {}, table.snippet[row])],
    texts: async (row) => {
      const { id, question, answer, wrong, right, reflection, replay } = await record(row);
      return [id, question, answer, wrong.text, right.text, reflection.text, replay?.text ?? ""];
    },
    detail: async (row, words) => detail(await record(row), names[row], runs.length > 1, words, { groups, curve, others: others(row) }),
  });
}

function detail(x, run, several, words, { groups, curve, others }) {
  const group = [run, x.step, x.place].join("/");
  const marks = x.difference ? x.difference.map((span) => ({ ...span, kind: "difference", title: `the first difference: ${span.how}` })) : [null, null];
  const split = x.bifurcation ? { ...x.bifurcation, kind: "bifurcation", title: `bifurcation point: ${x.bifurcation.how}` } : null;
  return h("div.experience", {},
    h("h2", {}, h(`i.${x.status}`, {}, VERDICTS[x.status === "kept" && !x.replay?.correct ? "unproven" : x.status], x.reason ? ` (${x.reason})` : ""), ` step ${x.step} · ${x.id}`),
    h("p.meta", {}, dotted([several ? run : "", x.family ? `family ${x.family}` : "", `NLL of M when written ${format(x.nll)} nats per token, ${x.reflection.tokens} tokens`]),
      groups.has(group) ? [" · ", h("a", { href: `#rollout=${encodeURIComponent(group)}` }, "all responses of this group")] : null),
    h("h3", {}, "Question"), found(x.question, words),
    h("p.meta", {}, "gold answer: ", h("code", {}, x.answer)),
    h("div.pair", {},
      solution("Wrong solution", x.wrong, [split, marks[0]].filter(Boolean), words),
      solution("Right solution", x.right, [marks[1]].filter(Boolean), words)),
    h("p.legend", {}, located(x)),
    x.meta === null ? null : h("div.memo", {}, ["Bifurcation point s*", "Critique C", "Heuristics H"].map((title, i) => h("section", {}, h("h3", {}, title), found(x.meta[i], words)))),
    h("details", { open: x.meta === null }, h("summary", {}, "The reflection as it was written"), found(x.reflection.text, words)),
    h("h3", {}, "Replay, with M in its prompt"),
    x.replay === null ? h("p.meta", {}, x.status === "malformed" ? "None: a malformed M is not replayed." : "None was made.") : solution(null, x.replay, [], words),
    h("h3", {}, "NLL over the steps"), over(others),
    h("p.meta", {}, "Each M is measured once, as it is written. What the updates made of all of them together: ",
      curve ? h("a", { href: `#charts=${encodeURIComponent(curve)}` }, `chart "${curve}"`) : "not in this run's metrics", "."));
}

/** What was written about the same question, step by step. */
function over({ near, left }) {
  const most = Math.max(...near.map(({ nll }) => nll ?? 0), 1e-9);
  return [h("table.over", {},
    h("thead", {}, h("tr", {}, ["step", "verdict", "nats per token", ""].map((title) => h("th", {}, title)))),
    h("tbody", {}, near.map(({ step, status, nll, key, current }) => h("tr", { ariaCurrent: String(current) },
      h("td", {}, current ? `${step}, this one` : h("a", { href: `#experience=${encodeURIComponent(key)}` }, String(step))),
      h("td", {}, h(`i.${status}`, {}, status)), h("td", {}, format(nll)), h("td", {}, h("meter", { min: 0, max: most, value: nll ?? 0 })))))),
  left ? h("p.meta", {}, `${left} more on this question, further away, are in the list.`) : null];
}

function solution(title, s, marks, words) {
  const facts = [s.index === null ? "" : `response ${s.index + 1}`, `reward ${format(s.reward)}`, `${s.tokens} tokens`, s.finish === "stop" ? "" : `ended by ${s.finish}`, s.reason];
  return h("section.solution", {}, title ? h("h3", {}, title) : null,
    h("p.meta", {}, h(`i.${s.correct ? "right" : "wrong"}`, {}, s.correct ? "right" : "wrong"), " ", dotted(facts)), found(s.text, words, marks));
}

function located(x) {
  const first = x.difference ? [h("mark.difference", {}, "the first difference"), ` (${x.difference[0].how})`] : ["The two solutions do not differ"];
  if (x.meta === null) return [...first, "."];
  return x.bifurcation ? [h("mark.bifurcation", {}, "bifurcation point"), ` (${x.bifurcation.how}), `, ...first, "."]
    : ["The bifurcation point could not be located in the text. Marked: ", ...first, "."];
}
