// Where a token's time goes: the mean decode step of one request, stage after stage.

import { arrange, byId, h, hide, text, variable } from "./dom.js";
import { count, ms, nodeName, range, rate, timeOfDay } from "./format.js";

const ENDS = { running: "running", stop: "finished", length: "finished", cancelled: "stopped", failed: "failed" };

/** The request that is shown unless one is chosen: the newest that has figures. */
export function newest(sessions) {
  const known = Object.entries(sessions).sort(([, a], [, b]) => b.started_at_s - a.started_at_s);
  return (known.find(([, s]) => s.state === "running" && s.stages.length) ?? known.find(([, s]) => s.stages.length) ?? known[0])?.[0];
}

/** Rows of the waterfall: label, detail, queue, compute, wire, start, all in milliseconds. */
export function rowsOf(session, nodes) {
  const rows = [{ label: "Gateway to stage 1", detail: "", queue: 0, compute: 0, wire: session.first_hop_ms, start: 0 }];
  let at = session.first_hop_ms;
  session.stages.forEach((stage, number) => {
    const peer = session.chain[number];
    rows.push({
      label: `Stage ${number + 1}`,
      detail: `${range(stage.layer_start, stage.layer_end)} ${peer ? nodeName(peer, nodes[peer]) : ""}`,
      queue: stage.queue_ms, compute: stage.compute_ms, wire: stage.wire_ms, start: at,
    });
    at += stage.queue_ms + stage.compute_ms + stage.wire_ms;
  });
  return rows;
}

export class WaterfallView {
  constructor({ onChoice }) {
    this.chosen = "";
    this.choice = byId("time-session");
    this.choice.addEventListener("change", () => {
      this.chosen = this.choice.value;
      onChoice();
    });
    this.facts = h("p", { class: "waterfall-facts" });
    this.quiet = h("p", { class: "quiet" }, "Send a prompt, and each millisecond of its tokens shows up here.");
    this.rows = [];
    this.table = this.makeTable();
    byId("waterfall").append(this.quiet, this.facts, this.table);
  }

  makeTable() {
    const head = (name, kind) => h("th", { class: "num", scope: "col" }, h("i", { class: `swatch ${kind}` }), name);
    this.total = { queue: h("td", { class: "num" }), compute: h("td", { class: "num" }), wire: h("td", { class: "num" }), all: h("td", { class: "num", data: { big: "" } }) };
    this.body = h("tbody");
    return h(
      "table",
      { class: "waterfall" },
      h("caption", { class: "visually-hidden" }, "Mean of one token, by stage"),
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "One token, on average"), h("td", { class: "lane" }), head("waits", "wait"), head("computes", "go"), head("wire", "way"), h("th", { class: "num", scope: "col", data: { big: "" } }, "all"))),
      this.body,
      h("tfoot", {}, h("tr", {}, h("th", { scope: "row" }, "Whole chain"), h("td", { class: "lane" }), this.total.queue, this.total.compute, this.total.wire, this.total.all)),
    );
  }

  render(state) {
    const { sessions, nodes } = state;
    if (!(this.chosen in sessions)) this.chosen = "";
    this.renderChoice(sessions);
    const id = this.chosen || newest(sessions);
    const session = id ? sessions[id] : null;
    const hasRows = Boolean(session?.stages.length);
    this.table.hidden = !hasRows;
    this.quiet.hidden = Boolean(session);
    this.facts.hidden = !session;
    this.choice.closest("label").hidden = Object.keys(sessions).length === 0;
    if (session) this.renderFacts(session);
    if (hasRows) this.renderRows(rowsOf(session, nodes));
  }

  renderChoice(sessions) {
    const known = Object.entries(sessions).sort(([, a], [, b]) => b.started_at_s - a.started_at_s);
    const key = known.map(([id, s]) => id + s.state).join();
    if (key === this.known) return;
    this.known = key;
    const options = known.map(([id, s]) => h("option", { value: id }, `${timeOfDay(s.started_at_s)}, ${ENDS[s.state] ?? s.state}`));
    this.choice.replaceChildren(h("option", { value: "" }, "the latest"), ...options);
    this.choice.value = this.chosen;
  }

  renderFacts(session) {
    const facts = [
      [ENDS[session.state] ?? session.state, ""],
      [String(session.n_tokens), session.n_tokens === 1 ? "token" : "tokens"],
      [rate(session.tokens_per_s), "tokens/s"],
      [ms(session.first_token_ms), `to the first token, after ${count(session.n_prompt_tokens, "prompt token")}`],
    ];
    if (session.n_repairs) facts.push([String(session.n_repairs), session.n_repairs === 1 ? "stage replaced" : "stages replaced"]);
    if (session.error) facts.push([session.error, ""]);
    while (this.facts.children.length > facts.length) this.facts.lastElementChild.remove();
    facts.forEach(([value, unit], i) => {
      if (!this.facts.children[i]) this.facts.append(h("span", {}, h("b"), h("span")));
      text(this.facts.children[i].firstElementChild, value);
      text(this.facts.children[i].lastElementChild, unit ? ` ${unit}` : "");
    });
  }

  renderRows(rows) {
    const whole = rows.reduce((sum, row) => sum + row.queue + row.compute + row.wire, 0) || 1;
    while (this.rows.length < rows.length) this.rows.push(this.makeRow());
    rows.forEach((row, i) => this.renderRow(this.rows[i], row, whole));
    arrange(this.body, this.rows.slice(0, rows.length).map((row) => row.element));
    const sum = (name) => rows.reduce((total, row) => total + row[name], 0);
    text(this.total.queue, ms(sum("queue")));
    text(this.total.compute, ms(sum("compute")));
    text(this.total.wire, ms(sum("wire")));
    text(this.total.all, ms(whole));
  }

  makeRow() {
    const cells = { name: h("span"), detail: h("span"), queue: h("td", { class: "num" }), compute: h("td", { class: "num" }), wire: h("td", { class: "num" }), all: h("td", { class: "num", data: { big: "" } }) };
    cells.name.className = "plain";
    const bars = { queue: h("i", { class: "wait" }), compute: h("i", { class: "go" }), wire: h("i", { class: "way" }) };
    const lane = h("td", { class: "lane", "aria-hidden": "true" }, h("div", {}, bars.queue, bars.compute, bars.wire));
    const element = h("tr", {}, h("th", { scope: "row" }, cells.name, cells.detail), lane, cells.queue, cells.compute, cells.wire, cells.all);
    return { element, cells, bars };
  }

  renderRow({ cells, bars }, row, whole) {
    text(cells.name, row.label);
    text(cells.detail, row.detail);
    let at = row.start;
    for (const part of ["queue", "compute", "wire"]) {
      const value = row[part];
      text(cells[part], value ? ms(value) : "");
      hide(bars[part], value <= 0);
      variable(bars[part], "left", `${((100 * at) / whole).toFixed(1)}%`);
      variable(bars[part], "width", `${((100 * value) / whole).toFixed(1)}%`);
      at += value;
    }
    text(cells.all, ms(row.queue + row.compute + row.wire));
  }
}
