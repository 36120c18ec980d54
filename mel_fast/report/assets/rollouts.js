// The groups of a step: rewards and advantages, and the tokens of a response coloured by what the policy thought of them.
import { load } from "report/data";
import { dotted, figure as format, h } from "report/dom";
import { viewer } from "report/viewer";

const MODES = {
  logp: "log-prob",
  weight: "gradient weight",
  plain: "plain",
};
const EXPLAINED = {
  logp: "Darker: less likely. Colour is full at −5 nats (p = 0.7%). Log-probs are the engine's, at the sampling temperature, rounded to 0.01.",
  weight: "w = |A| (1 − p): half the L1 norm of the gradient of A log p with respect to the token's logits, before clipping and the objective's 1/length. Blue pushes the token up, red down.",
  plain: "",
};
const SHADES = 20; // classes .s0 .. .s20 of the style sheet
let mode = "logp"; // stays while one goes through the groups

export async function rollouts() {
  const [{ runs }, table] = await Promise.all([load("overview"), load("rollouts")]);
  const names = table.run.map((run) => runs[run].name);
  const keys = table.step.map((step, i) => [names[i], step, table.place[i]].join("/"));
  const outcome = table.right.map((right, i) => (right === 0 ? "all wrong" : right === table.size[i] ? "all right" : "mixed"));
  const placeIn = new Map(); // how many groups of the same chunk come before
  const before = table.chunk.map((chunk) => { const n = placeIn.get(chunk) ?? 0; placeIn.set(chunk, n + 1); return n; });
  const record = async (row) => (await load(`rollouts-${table.chunk[row]}`))[before[row]];
  const said = (group, response) => response.ids.map((i) => token(table.vocabularies[group.run], i).text).join("");
  return viewer({
    name: "rollout",
    noun: "group",
    keys,
    steps: table.step,
    filters: [
      { label: "outcome", values: outcome },
      { label: "family", values: table.family },
      { label: "run", values: names },
    ],
    notes: table.notes,
    empty: "No rollouts were dumped (telemetry.dump_rollouts was false), or none are embedded (--rollout-steps).",
    line: (row) => [h(`i.${outcome[row] === "mixed" ? "mixed" : outcome[row].slice(4)}`, {}, `${table.right[row]}/${table.size[row]}`), h("span.where", {}, `step ${table.step[row]} · ${table.id[row]}`), h("span.snippet", {}, table.snippet[row])],
    texts: async (row) => {
      const group = await record(row);
      return [group.id, group.question, group.answer, ...group.responses.map((response) => said(group, response))];
    },
    detail: async (row) => detail(await record(row), table.vocabularies[table.run[row]], runs.length > 1 ? names[row] : ""),
  });
}

const token = ({ ids, texts }, place) => ({ id: ids[place], text: texts ? texts[place] : `${ids[place]} ` });

function detail(group, vocabulary, run) {
  const shown = h("div");
  const rows = group.responses.map((response, i) => h("tr", { tabIndex: 0, onclick: () => show(i), onkeydown: (event) => { if (event.key === "Enter") show(i); } },
    h("td", {}, `${i + 1}`),
    h("td", {}, h(`i.${response.correct ? "right" : "wrong"}`, {}, response.correct ? "right" : "wrong")),
    h("td", {}, format(response.reward)),
    h("td", {}, format(response.advantage)),
    h("td", {}, `${response.ids.length}`),
    h("td", {}, response.logp.length ? format(response.logp.reduce((a, b) => a + b, 0) / response.logp.length / 100) : "–"),
    h("td", {}, dotted([response.finish, response.reason, response.coefficient === 0 && response.advantage ? "masked: no gradient" : ""]))));
  let chosen = 0;
  const show = (i) => {
    chosen = i;
    rows.forEach((row, j) => { row.ariaSelected = String(i === j); });
    shown.replaceChildren(tokens(group.responses[i], vocabulary, i));
  };
  const buttons = Object.entries(MODES).map(([value, title]) => h("button", { type: "button", ariaPressed: String(mode === value), onclick: (event) => {
    mode = value;
    for (const button of buttons) button.ariaPressed = String(button === event.currentTarget);
    explained.textContent = EXPLAINED[mode];
    show(chosen);
  } }, title));
  const explained = h("p.meta", {}, EXPLAINED[mode]);
  const element = h("div.group", {},
    h("h2", {}, `step ${group.step} · ${group.id}`),
    h("p.meta", {}, dotted([run, group.family ? `family ${group.family}` : "", `${group.right} of ${group.responses.length} right`])),
    h("h3", {}, "Question"), h("div.text", {}, group.question), h("p.meta", {}, "gold answer: ", h("code", {}, group.answer)),
    h("table.responses", {}, h("thead", {}, h("tr", {}, ["", "verdict", "reward", "advantage A", "tokens", "mean log p", "end"].map((title) => h("th", {}, title)))), h("tbody", {}, rows)),
    h("div.modes", {}, "colour by", buttons), explained, vocabulary.note ? h("p.warning", {}, vocabulary.note) : null, shown,
    h("details", {}, h("summary", {}, `The prompt as the policy saw it (${group.prompt.length} tokens)`), h("div.text", {}, group.prompt.map((place) => token(vocabulary, place).text).join(""))));
  show(0);
  return element;
}

/** A response's tokens; the line above tells of the one under the pointer. */
function tokens(response, vocabulary, index) {
  const facts = h("p.token.meta", {}, `response ${index + 1}: point at a token`);
  const c = response.coefficient;
  const weights = response.logp.map((logp) => (c === null ? null : Math.abs(c) * (1 - Math.exp(logp / 100))));
  const largest = Math.max(...weights.map((weight) => weight ?? 0), 1e-9);
  const shade = (i) => {
    if (mode === "plain" || (mode === "weight" && !weights[i])) return "";
    const share = mode === "logp" ? Math.min(1, response.logp[i] / -500) : weights[i] / largest;
    return `${mode === "logp" ? "unlikely" : c > 0 ? "up" : "down"}.s${Math.round(share * SHADES)}`;
  };
  const spans = response.ids.map((place, i) => {
    const classes = shade(i);
    return h(classes ? `span.${classes}` : "span", { "data-i": i }, token(vocabulary, place).text);
  });
  const text = h("div.text.tokens", { onmouseover: (event) => {
    const i = event.target.dataset.i;
    if (i === undefined) return;
    const { id, text: said } = token(vocabulary, response.ids[i]);
    const logp = response.logp[i] / 100;
    facts.textContent = `token ${Number(i) + 1}: ${JSON.stringify(said)} (id ${id}) · log p ${logp.toFixed(2)}, p ${format(Math.exp(logp))} · ${weights[i] === null ? "no advantage known" : `w ${format(weights[i])}`}`;
  } }, spans.length ? spans : "(empty)");
  const none = mode !== "weight" ? null : c === null ? h("p.warning", {}, "No gradient weight: the run's objective settings are not known.")
    : c === 0 ? h("p.warning", {}, "This response has no gradient: its advantage is 0, or it is masked.") : null;
  return h("div", {}, facts, none, text);
}
