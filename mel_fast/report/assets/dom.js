// Elements. Text only ever becomes a text node: what a model wrote cannot become markup.

/** h("p.note", {onclick: f, title: "..."}, "text", child, null) -> an element. */
export function h(what, properties = {}, ...children) {
  const [tag, ...classes] = what.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on") || key in element) element[key] = value;
    else element.setAttribute(key, value);
  }
  element.append(...children.flat(3).filter((child) => child !== null && child !== undefined));
  return element;
}

/** Digits enough to read, not more. */
export function figure(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e15) return value.toLocaleString("en");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return size !== 0 && size < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(digits)));
}

/** A labelled <select> over strings, of which one may be empty; `on` gets the chosen one, or null for all. */
export function choice(label, values, on, names = { __proto__: null }) {
  const options = values.map((value, i) => h("option", { value: String(i) }, names[value] ?? (value || "(none)")));
  const change = (event) => on(event.target.value === "" ? null : values[Number(event.target.value)]);
  return h("label.choice", {}, label, h("select", { onchange: change }, h("option", { value: "" }, "all"), options));
}

/** What there is of the parts, with dots between them. A part that turns the direction of writing turns no other. */
export function dotted(parts) {
  return parts.filter(Boolean).flatMap((part, i) => [i ? " · " : null, h("bdi", {}, part)]);
}

export function plural(count, word) {
  return `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
}
