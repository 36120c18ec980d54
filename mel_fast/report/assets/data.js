// Embedded data: gzipped JSON in base64, in elements that the browser does not run. Decoded when asked for, once.

const loaded = new Map();

export function load(name) {
  if (!loaded.has(name)) loaded.set(name, decode(name));
  return loaded.get(name);
}

async function decode(name) {
  const element = document.getElementById(`data-${name}`);
  const bytes = Uint8Array.from(atob(element.textContent), (character) => character.charCodeAt(0));
  element.remove(); // from here on the decoded value stands for it
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text(), name === "overview" ? bare : undefined);
}

/** Without what every object inherits: metrics and settings are looked up by names that may be "constructor". */
function bare(_, value) {
  return value === null || typeof value !== "object" || Array.isArray(value) ? value : Object.setPrototypeOf(value, null);
}
