// A filtered, searched, paged list with one item opened beside it. Both viewers are one of these.
import { choice, h, plural } from "report/dom";

const PAGE = 50;
const BREATH = 400; // rows searched between two looks at the screen

/**
 * name      what an item is called, as in #experience=...
 * noun      what it is called in a sentence
 * keys      the key of every row, for links
 * filters   [{label, values: one string per row, names: {value: how it is shown}, if not as it is}]
 * steps     the step of every row
 * line      row -> the nodes of its entry in the list
 * texts     row -> promise of the texts to be searched
 * detail    (row, words) -> promise of the element that shows it
 */
export function viewer({ name, noun, keys, filters, steps, line, texts, detail, notes, empty }) {
  const state = { chosen: filters.map(() => null), from: -Infinity, to: Infinity, words: "", rows: [], at: -1, page: 0, search: 0 };
  const list = h("ol.items");
  const count = h("span.count");
  const pager = h("div.pager");
  const opened = h("article.opened");
  const search = h("input", { type: "search", placeholder: "search in all texts  ( / )", "aria-label": "Search" });
  const number = (label, on) => h("input", { type: "number", placeholder: label, "aria-label": `step ${label}`, min: 0, oninput: on });

  const passes = (row) => steps[row] >= state.from && steps[row] <= state.to
    && filters.every((filter, i) => state.chosen[i] === null || String(filter.values[row]) === state.chosen[i]);

  async function select() {
    const mine = state.search += 1; // a newer call ends this one
    const candidates = keys.map((_, row) => row).filter(passes);
    state.rows = state.words ? [] : candidates;
    state.page = 0;
    state.at = -1;
    for (let i = 0; state.words && i < candidates.length; i += 1) {
      const row = candidates[i];
      const hit = (await texts(row)).some((text) => text.toLowerCase().includes(state.words));
      if (mine !== state.search) return;
      if (hit) state.rows.push(row);
      if (i % BREATH === BREATH - 1) {
        show(`searched ${i + 1} of ${candidates.length} …`);
        await new Promise((resume) => { setTimeout(resume); });
        if (mine !== state.search) return;
      }
    }
    show();
    if (state.rows.length) await open(0);
    else opened.replaceChildren(h("p.empty", {}, keys.length ? "Nothing fits these filters." : empty));
  }

  function show(progress = "") {
    const first = state.page * PAGE;
    const last = Math.min(first + PAGE, state.rows.length);
    list.replaceChildren(...state.rows.slice(first, last).map((row, i) => h("li", { ariaCurrent: String(first + i === state.at) },
      h("button", { type: "button", onclick: () => open(first + i) }, line(row)))));
    count.textContent = progress || `${state.rows.length.toLocaleString("en")} of ${plural(keys.length, noun)}`;
    const turn = (by, text) => h("button", { type: "button", disabled: by < 0 ? first === 0 : last >= state.rows.length,
      onclick: () => { state.page += by; show(); list.scrollTop = 0; } }, text);
    pager.replaceChildren(turn(-1, "←"), state.rows.length ? `${first + 1}–${last}` : "–", turn(1, "→"));
  }

  /** Opens the item at this place of the filtered list. */
  async function open(at) {
    if (at < 0 || at >= state.rows.length) return;
    state.at = at;
    state.page = Math.floor(at / PAGE);
    show();
    list.querySelector('[aria-current="true"]')?.scrollIntoView({ block: "nearest" });
    const row = state.rows[at];
    const element = await detail(row, state.words);
    if (state.rows[state.at] !== row) return; // another one was opened meanwhile
    history.replaceState(null, "", `#${name}=${encodeURIComponent(keys[row])}`);
    const step = (by, text, key) => h("button", { type: "button", disabled: !(at + by in state.rows), title: `key ${key}`, onclick: () => open(at + by) }, text);
    opened.replaceChildren(h("div.steps", {}, step(-1, "← previous", "k"), step(1, "next →", "j")), element);
    opened.scrollTop = 0;
  }

  /** Follows a link; filters that hide the item are lifted. False when the page does not hold it. */
  async function follow(key) {
    const row = keys.indexOf(key);
    if (row < 0) return false;
    if (!state.rows.includes(row)) { clear(); await select(); }
    await open(state.rows.indexOf(row));
    return true;
  }

  function clear() {
    Object.assign(state, { chosen: filters.map(() => null), from: -Infinity, to: Infinity, words: "" });
    for (const field of bar.querySelectorAll("input, select")) field.value = "";
  }

  const bar = h("div.filters", {},
    filters.map((filter, i) => {
      const values = [...new Set(filter.values.map(String))].sort();
      return values.length < 2 ? null : choice(filter.label, values, (value) => { state.chosen[i] = value; select(); }, filter.names);
    }),
    h("label.choice", {}, "steps",
      number("from", (event) => { state.from = event.target.value === "" ? -Infinity : Number(event.target.value); select(); }),
      number("to", (event) => { state.to = event.target.value === "" ? Infinity : Number(event.target.value); select(); })),
    search, count);
  let typing;
  search.oninput = () => {
    clearTimeout(typing);
    typing = setTimeout(() => { state.words = search.value.trim().toLowerCase(); select(); }, 200);
  };
  const element = h(`div.viewer.${name}s`, {}, bar, h("aside", {}, pager, list), opened, h("footer", {}, notes.map((note) => h("p", {}, note))));

  function press(event) {
    if (!element.isConnected || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
    if (event.key === "j" || event.key === "ArrowRight") open(state.at + 1);
    else if (event.key === "k" || event.key === "ArrowLeft") open(state.at - 1);
    else if (event.key === "/") { event.preventDefault(); search.focus(); }
  }
  document.addEventListener("keydown", press);
  return { element, follow, start: select };
}
