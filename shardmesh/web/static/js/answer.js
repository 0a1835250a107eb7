// One message of the conversation: what a person wrote, or what the mesh answers.

import { copy, h, icon, text } from "./dom.js";
import { ms, nodeName, range, rate } from "./format.js";
import { render } from "./markdown.js";

const LONG_LETTERS = 20000; // beyond, the text is drawn a few times a second, not each frame
const LONG_PAUSE_MS = 300;

function tool(name, label, run) {
  return h("button", { type: "button", class: "icon-button", "aria-label": label, title: label, on: { click: run } }, icon(name));
}

export function userMessage(message, { onEdit }) {
  const element = h("div", { class: "user" }, message.content);
  const tools = h("div", { class: "message-tools" }, tool("edit", "Edit and ask again", onEdit));
  return h("div", { class: "message asked" }, element, tools);
}

export class Answer {
  constructor(message, { onAgain }) {
    this.message = message;
    this.body = h("div", { class: "text" });
    this.meta = h("div", { class: "answer-meta" });
    this.note = h("div", { class: "answer-note", hidden: true });
    this.moved = h("div", { class: "answer-note moved", hidden: true });
    this.tools = h("div", { class: "message-tools" }, tool("copy", "Copy the answer", () => copy(message.content)), tool("again", "Answer again", onAgain));
    this.element = h("div", { class: "message answer" }, this.body, this.moved, this.note, this.meta, this.tools);
    this.draw();
    this.drawMeta();
  }

  begin() {
    this.isRunning = true;
    this.tools.hidden = true;
    this.element.setAttribute("aria-busy", "true");
    this.draw();
    this.drawMeta();
  }

  add(piece) {
    this.message.content += piece;
    if (this.isDue) return;
    this.isDue = true;
    const drawSoon = () => {
      this.isDue = false;
      this.draw();
    };
    if (this.message.content.length > LONG_LETTERS) setTimeout(drawSoon, LONG_PAUSE_MS);
    else requestAnimationFrame(drawSoon);
  }

  draw() {
    this.body.replaceChildren(render(this.message.content));
    if (!this.isRunning) return;
    let last = this.body;
    while (last.lastElementChild && !["CODE", "BUTTON", "BR", "HR", "A"].includes(last.lastElementChild.tagName)) last = last.lastElementChild;
    last.append(h("span", { class: "caret", "aria-hidden": "true" }));
  }

  /** What the gateway tells of the session: how fast, over which replicas, what was repaired. */
  showSession(session, state) {
    if (!session) return;
    const { meta } = this.message;
    meta.tokens_per_s = session.tokens_per_s ?? meta.tokens_per_s;
    meta.n_tokens = Math.max(meta.n_tokens ?? 0, session.n_tokens);
    meta.server_first_ms = session.first_token_ms;
    meta.route = session.chain.map((peer) => nodeName(peer, state.nodes[peer]));
    meta.repairs = session.repairs.map((repair) => ({
      layers: range(repair.layer_start, repair.layer_end),
      lost: nodeName(repair.lost_peer_id, state.nodes[repair.lost_peer_id]),
      next: nodeName(repair.new_peer_id, state.nodes[repair.new_peer_id]),
      pause_ms: repair.pause_ms,
    }));
    this.drawMeta();
  }

  end(session, state) {
    this.isRunning = false;
    this.isDue = false;
    this.tools.hidden = false;
    this.element.removeAttribute("aria-busy");
    this.showSession(session, state);
    this.draw();
    this.drawMeta();
  }

  drawMeta() {
    const { meta } = this.message;
    const parts = [];
    if (meta.tokens_per_s) parts.push(h("span", {}, h("b", {}, rate(meta.tokens_per_s)), " tokens/s"));
    if (meta.first_token_ms) parts.push(h("span", {}, h("b", {}, ms(meta.first_token_ms)), " to the first token"));
    if (meta.n_tokens) parts.push(h("span", {}, h("b", {}, String(meta.n_tokens)), meta.n_tokens === 1 ? " token" : " tokens"));
    if (!this.isRunning && meta.reason === "length") parts.push(h("span", {}, "ended at the limit of tokens"));
    if (!this.isRunning && meta.reason === "stopped") parts.push(h("span", {}, "stopped by you"));
    if (meta.route?.length) parts.push(route(meta.route));
    this.meta.replaceChildren(...parts);
    this.meta.hidden = parts.length === 0;
    const said = meta.error ?? meta.note ?? "";
    this.note.classList.toggle("bad", Boolean(meta.error));
    text(this.note, said);
    this.note.hidden = !said;
    this.moved.hidden = !meta.repairs?.length;
    text(this.moved, (meta.repairs ?? []).map((repair) => `${repair.lost} was lost with layers ${repair.layers}; ${repair.next} took over after ${ms(repair.pause_ms)}.`).join(" "));
  }
}

function route(names) {
  const shown = names.length > 8 ? [...names.slice(0, 3), `${names.length - 6} more`, ...names.slice(-3)] : names;
  const parts = shown.flatMap((name, i) => (i ? [h("i"), name] : [name]));
  return h("span", { class: "route", title: names.join(", ") }, "over ", parts);
}
