// Elements without strings of HTML: nothing that comes from the network is ever parsed as markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element with properties and children; a string becomes text. `on` has listeners by name. */
export function h(name, props = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "class") element.className = value;
    else if (key === "on") for (const [type, run] of Object.entries(value)) element.addEventListener(type, run);
    else if (key === "data") Object.assign(element.dataset, value);
    else if (key === "style") for (const [name, v] of Object.entries(value)) element.style.setProperty(name, v);
    else if (key in element && !key.startsWith("aria") && key !== "list" && key !== "role") element[key] = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** One of the page's own symbols. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** Writes text only if it differs: cheap enough for hundreds of nodes at each message. */
export function text(element, value) {
  if (element.shownText !== value) {
    element.shownText = value;
    element.textContent = value;
  }
}

/** As `text`, for an attribute; null takes it away. */
export function attribute(element, name, value) {
  const shown = (element.shownAttributes ??= new Map());
  if (shown.get(name) === value) return;
  shown.set(name, value);
  if (value === null || value === false) element.removeAttribute(name);
  else element.setAttribute(name, value);
}

/** As `text`, for what is not to be seen. */
export const hide = (element, isHidden) => attribute(element, "hidden", isHidden ? "" : null);

/** As `text`, for a custom property of the style. */
export function variable(element, name, value) {
  const shown = (element.shownVariables ??= new Map());
  if (shown.get(name) === value) return;
  shown.set(name, value);
  element.style.setProperty(name, value);
}

/** Brings the children of a parent into this order, moving only what must move. */
export function arrange(parent, children, first = null) {
  const wanted = new Set(children);
  for (const child of [...parent.children]) {
    if (child !== first && !wanted.has(child)) child.remove();
  }
  let at = first ? first.nextElementSibling : parent.firstElementChild;
  for (const child of children) {
    if (child === at) at = at.nextElementSibling;
    else parent.insertBefore(child, at);
  }
}

export const byId = (id) => document.getElementById(id);

/** Says something to a screen reader, now. */
export function announce(sentence) {
  const region = byId("announcer");
  region.textContent = "";
  requestAnimationFrame(() => { region.textContent = sentence; });
}

/** A sentence that goes by itself. */
export function toast(sentence, { bad = false } = {}) {
  const shown = h("div", { class: bad ? "toast bad" : "toast" }, sentence);
  byId("toasts").append(shown);
  setTimeout(() => shown.remove(), bad ? 8000 : 3000);
}

/** A line to copy, with its button. */
export function copyLine(line, label = "Copy the line") {
  const code = h("code", { tabIndex: 0 }, line);
  const button = h("button", { type: "button", "aria-label": label }, icon("copy"), "Copy");
  button.addEventListener("click", () => copy(code.textContent));
  const element = h("div", { class: "copy-line" }, code, button);
  element.setLine = (next) => text(code, next);
  return element;
}

/** To the clipboard; pages without TLS on another machine must go the old way. */
export async function copy(value) {
  try {
    await navigator.clipboard.writeText(value);
  } catch {
    const area = h("textarea", { class: "visually-hidden", value });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast("Copied");
}
