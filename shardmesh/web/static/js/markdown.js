// Markdown as models write it, straight into DOM nodes: no HTML is ever parsed, no image fetched,
// and a link goes to http, https or mailto only.  Time is linear in the length of the text.

import { copy, h, icon } from "./dom.js";

const DEPTH_MAX = 8;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const TABLE_LINE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

/** The nodes of a text. */
export function render(source) {
  const fragment = document.createDocumentFragment();
  fragment.append(...blocks(source.replaceAll("\r\n", "\n").split("\n"), 0));
  return fragment;
}

function blocks(lines, depth) {
  const out = [];
  let at = 0;
  while (at < lines.length) {
    const [node, next] = block(lines, at, depth);
    if (node) out.push(node);
    at = next;
  }
  return out;
}

function block(lines, at, depth) {
  const line = lines[at];
  if (!line.trim()) return [null, at + 1];
  const fence = FENCE.exec(line);
  if (fence) return codeBlock(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) {
    // Below the page's own headings, whatever the model thinks of itself.
    const level = Math.min(4, heading[1].length + 2);
    return [h(`h${level}`, { class: `level-${heading[1].length}` }, inline(heading[2])), at + 1];
  }
  if (RULE.test(line)) return [h("hr"), at + 1];
  if (depth < DEPTH_MAX && QUOTE.test(line)) return quoteBlock(lines, at, depth);
  if (depth < DEPTH_MAX && ITEM.test(line)) return listBlock(lines, at, depth);
  if (line.includes("|") && at + 1 < lines.length && TABLE_LINE.test(lines[at + 1]) && lines[at + 1].includes("-")) return tableBlock(lines, at);
  return paragraph(lines, at, depth);
}

function codeBlock(lines, at, fence) {
  const body = [];
  let next = at + 1;
  for (; next < lines.length; next += 1) {
    const end = FENCE.exec(lines[next]);
    if (end && end[1][0] === fence[1][0] && end[1].length >= fence[1].length && !end[2]) break;
    body.push(lines[next]);
  }
  const code = body.join("\n");
  const button = h("button", { type: "button", class: "icon-button", "aria-label": "Copy this code", on: { click: () => copy(code) } }, icon("copy"));
  return [h("div", { class: "code" }, h("pre", { tabIndex: 0 }, h("code", fence[2] ? { data: { language: fence[2] } } : {}, code)), button), next + 1];
}

function quoteBlock(lines, at, depth) {
  const inner = [];
  let next = at;
  for (; next < lines.length; next += 1) {
    const quoted = QUOTE.exec(lines[next]);
    if (!quoted) break;
    inner.push(quoted[1]);
  }
  return [h("blockquote", {}, blocks(inner, depth + 1)), next];
}

function listBlock(lines, at, depth) {
  const [, indent, mark] = ITEM.exec(lines[at]);
  const isOrdered = /\d/.test(mark);
  const items = [];
  let next = at;
  while (next < lines.length) {
    const item = ITEM.exec(lines[next]);
    if (!item || item[1].length > indent.length + 1 || item[1].length < indent.length || /\d/.test(item[2]) !== isOrdered) break;
    const inner = [item[3]];
    const inset = item[1].length + item[2].length + 1;
    next += 1;
    while (next < lines.length && belongs(lines, next, indent.length)) {
      inner.push(lines[next].slice(Math.min(inset, leading(lines[next]))));
      next += 1;
    }
    items.push(h("li", {}, itemContent(inner, depth)));
  }
  const start = isOrdered ? Number.parseInt(mark, 10) : 1;
  return [isOrdered ? h("ol", start === 1 ? {} : { start }, items) : h("ul", {}, items), next];
}

const leading = (line) => line.length - line.trimStart().length;

/** Whether a line goes on with the list item above it. */
function belongs(lines, at, indent) {
  const line = lines[at];
  if (!line.trim()) {
    const after = lines[at + 1];
    return after !== undefined && after.trim() !== "" && leading(after) > indent;
  }
  if (leading(line) > indent) return true;
  return !ITEM.test(line) && !HEADING.test(line) && !FENCE.test(line) && !RULE.test(line) && lines[at - 1].trim() !== "";
}

/** One paragraph stands for itself in an item; more are blocks. */
function itemContent(lines, depth) {
  const nodes = blocks(lines, depth + 1);
  if (nodes[0]?.tagName === "P") nodes.splice(0, 1, ...nodes[0].childNodes);
  return nodes;
}

function cells(line) {
  return line.trim().replace(/^\|/, "").replace(/\|$/, "").split("|").map((cell) => cell.trim());
}

function tableBlock(lines, at) {
  const head = cells(lines[at]);
  const body = [];
  let next = at + 2;
  for (; next < lines.length && lines[next].includes("|"); next += 1) body.push(cells(lines[next]).slice(0, head.length));
  const row = (name, values) => h("tr", {}, values.map((value) => h(name, {}, inline(value))));
  const table = h("table", {}, h("thead", {}, row("th", head)), h("tbody", {}, body.map((values) => row("td", values))));
  return [h("div", { class: "wide", tabIndex: 0, role: "group", "aria-label": "Table" }, table), next];
}

function paragraph(lines, at, depth) {
  const parts = [];
  let next = at;
  for (; next < lines.length && lines[next].trim(); next += 1) {
    const line = lines[next];
    const isOther = FENCE.test(line) || HEADING.test(line) || RULE.test(line) || (depth < DEPTH_MAX && (QUOTE.test(line) || ITEM.test(line)));
    if (next > at && isOther) break;
    parts.push(line.trimStart());
  }
  return [h("p", {}, inline(parts.join("\n"))), Math.max(next, at + 1)];
}

const MARKS = [["**", "strong"], ["__", "strong"], ["~~", "s"], ["*", "em"], ["_", "em"]];

/** Nodes of a line of text. */
export function inline(source, depth = 0) {
  const out = [];
  let plain = "";
  const flush = () => {
    if (plain) out.push(plain);
    plain = "";
  };
  let at = 0;
  const noEnd = new Set(); // marks that have no end further on: not looked for again
  while (at < source.length) {
    const found = special(source, at, depth, noEnd);
    if (found) {
      flush();
      out.push(found[0]);
      at = found[1];
    } else {
      const isEscape = source[at] === "\\" && /[!-/:-@[-`{-~]/.test(source[at + 1] ?? "");
      plain += source[isEscape ? at + 1 : at];
      at += isEscape ? 2 : 1;
    }
  }
  flush();
  return out;
}

function special(source, at, depth, noEnd) {
  const c = source[at];
  if (c === "`") return codeSpan(source, at, noEnd);
  if (depth >= DEPTH_MAX) return null;
  if (c === "[" || (c === "!" && source[at + 1] === "[")) return link(source, at, depth, noEnd);
  if (c === "h" && /^https?:\/\//.test(source.slice(at, at + 8)) && !/\w/.test(source[at - 1] ?? "")) return bareLink(source, at);
  if (c === "\n" && source.slice(Math.max(0, at - 2), at) === "  ") return [h("br"), at + 1];
  return "*_~".includes(c) ? emphasis(source, at, depth, noEnd) : null;
}

function codeSpan(source, at, noEnd) {
  let n = 1;
  while (source[at + n] === "`") n += 1;
  const mark = "`".repeat(n);
  if (noEnd.has(mark)) return null;
  let end = source.indexOf(mark, at + n);
  while (end !== -1 && source[end + n] === "`") {
    while (source[end] === "`") end += 1;
    end = source.indexOf(mark, end);
  }
  if (end === -1) {
    noEnd.add(mark);
    return null;
  }
  return [h("code", {}, source.slice(at + n, end).trim()), end + n];
}

function emphasis(source, at, depth, noEnd) {
  for (const [mark, name] of MARKS) {
    if (!source.startsWith(mark, at) || noEnd.has(mark)) continue;
    const inner = at + mark.length;
    if (/\s/.test(source[inner] ?? " ")) continue;
    if (mark[0] === "_" && /\w/.test(source[at - 1] ?? "")) continue; // snake_case
    const end = endOf(source, inner, mark);
    if (end === -1) {
      noEnd.add(mark);
      continue;
    }
    return [h(name, {}, inline(source.slice(inner, end), depth + 1)), end + mark.length];
  }
  return null;
}

function endOf(source, from, mark) {
  let at = source.indexOf(mark, from + 1);
  while (at !== -1) {
    const isLonger = mark.length === 1 && source[at + 1] === mark;
    const isWord = mark[0] === "_" && /\w/.test(source[at + mark.length] ?? "");
    if (!isLonger && !isWord && !/\s/.test(source[at - 1])) return at;
    at = source.indexOf(mark, at + (isLonger ? 2 : 1));
  }
  return -1;
}

function link(source, at, depth, noEnd) {
  const isImage = source[at] === "!";
  const start = at + (isImage ? 2 : 1);
  if (noEnd.has("](")) return null;
  const middle = source.indexOf("](", start);
  if (middle === -1) {
    noEnd.add("](");
    return null;
  }
  const end = source.indexOf(")", middle);
  if (end === -1 || source.slice(start, middle).includes("\n\n") || middle - start > 500) return null;
  const target = source.slice(middle + 2, end).trim().split(/\s/)[0];
  const label = source.slice(start, middle);
  return [anchor(target, isImage ? [label || "image"] : inline(label, depth + 1)), end + 1];
}

function bareLink(source, at) {
  const [url] = /^[^\s<>"'`]+/.exec(source.slice(at, at + 2000));
  const target = url.replace(/[.,;:!?)\]]+$/, "");
  return [anchor(target, [target]), at + target.length];
}

function anchor(target, children) {
  let url = null;
  try {
    url = new URL(target);
  } catch {
    // Relative or no address at all: there is nothing here that it could mean.
  }
  if (!url || !["http:", "https:", "mailto:"].includes(url.protocol)) return h("span", {}, children);
  return h("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow" }, children);
}
