// The page: three views, links to them, light and dark.
import { h } from "report/dom";
import { experiences } from "report/experiences";
import { overview } from "report/overview";
import { rollouts } from "report/rollouts";

const VIEWS = {
  __proto__: null,
  charts: { title: "Charts", make: overview },
  experience: { title: "Meta-experiences", make: experiences },
  rollout: { title: "Rollouts", make: rollouts },
};
const made = new Map();

export function start() {
  const tabs = Object.entries(VIEWS).map(([name, { title }]) => h("a", { href: `#${name}` }, title));
  document.getElementById("tabs").append(...tabs);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  theme(dark.matches);
  dark.addEventListener("change", () => theme(dark.matches));
  document.getElementById("theme").onclick = () => theme(document.documentElement.dataset.theme === "light");
  addEventListener("hashchange", route);
  route();
}

/** #charts, #charts=TITLE, #experience, #experience=RUN/STEP/PLACE/NUMBER, #rollout, #rollout=RUN/STEP/PLACE */
async function route() {
  const [wanted, encoded] = location.hash.slice(1).split("=", 2);
  const name = wanted in VIEWS ? wanted : "charts";
  if (!made.has(name)) made.set(name, VIEWS[name].make());
  const { element, follow, start: begin } = await made.get(name);
  const host = document.getElementById("view");
  if (host.firstElementChild !== element) host.replaceChildren(element);
  for (const tab of document.querySelectorAll("#tabs a")) tab.ariaCurrent = tab.hash === `#${name}` ? "page" : "false";
  if (encoded === undefined) {
    if (begin && !element.dataset.begun) await begin();
  } else if (!(await follow?.(decode(encoded)))) {
    await begin?.();
    element.querySelector(".opened")?.prepend(h("p.warning", {}, `This page does not hold ${decode(encoded)}.`));
  }
  element.dataset.begun = "true";
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function theme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  document.dispatchEvent(new Event("theme"));
}
