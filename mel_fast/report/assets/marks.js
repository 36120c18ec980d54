// Texts with marked spans, which may overlap.
import { h } from "report/dom";

const MOST = 1000; // hits that are marked in a text: a letter may stand everywhere

/** `marks`: [{start, end, kind, title}] in UTF-16 units. A mark of no length is drawn as a caret. */
export function marked(text, marks) {
  const cuts = new Set([0, text.length]);
  for (const { start, end } of marks) cuts.add(start).add(end);
  const edges = [...cuts].sort((a, b) => a - b);
  const caret = (at) => marks.filter((mark) => mark.start === mark.end && mark.start === at)
    .map((mark) => h(`mark.${mark.kind}.caret`, { title: mark.title }, "‸"));
  const parts = [...caret(0)];
  for (let i = 0; i + 1 < edges.length; i += 1) {
    const [from, to] = [edges[i], edges[i + 1]];
    const on = marks.filter((mark) => mark.start <= from && to <= mark.end && mark.start < mark.end);
    const piece = text.slice(from, to);
    parts.push(on.length === 0 ? piece
      : h(`mark.${on.map((mark) => mark.kind).join(".")}`, { title: on.map((mark) => mark.title).join("; ") }, piece));
    parts.push(...caret(to));
  }
  return h("div.text", {}, parts);
}

/** The text with every occurrence of the searched words marked too. */
export function found(text, words, marks = []) {
  if (!words) return marked(text, marks);
  const low = text.toLowerCase();
  const hits = [];
  // Where lower-casing changes lengths the places would be off, so nothing is marked there.
  for (let at = low.length === text.length ? low.indexOf(words) : -1; at >= 0 && hits.length < MOST; at = low.indexOf(words, at + words.length)) {
    hits.push({ start: at, end: at + words.length, kind: "hit", title: "search" });
  }
  return marked(text, [...marks, ...hits]);
}
