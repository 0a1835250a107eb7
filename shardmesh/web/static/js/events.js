// Events that last: the newest first, by day, filtered by kind and by words.

import { requestJson } from "./api.js";
import { byId, h, icon } from "./dom.js";
import { bytes, dayOf, ms, range, timeOfDay } from "./format.js";

const PAGE = 100;
const SHOWN_MAX = 600;
const BAD = new Set(["node.lost", "node.silent", "shard.failed", "model.incomplete", "model.gone", "request.failed"]);
const RECOVERED = new Set(["node.returned", "node.answers", "session.recovered"]);

const KINDS = [
  ["all", "All"], ["nodes", "Joins and leaves"], ["loads", "Loads"], ["downloads", "Downloads"], ["failures", "Failures"], ["recoveries", "Recoveries"],
];

export function kindOf(event) {
  if (BAD.has(event.kind) || event.kind.endsWith(".failed")) return "failures";
  if (RECOVERED.has(event.kind)) return "recoveries";
  const [noun] = event.kind.split(".");
  return { node: "nodes", shard: "loads", download: "downloads" }[noun] ?? "other";
}

const ICONS = { nodes: "enter", loads: "load", downloads: "download", failures: "failure", recoveries: "recovery", other: "mesh" };

/** The event as [who, what]; `who` is the node or model that it is about. */
export function sentence(event) {
  const { data } = event;
  const who = data.name || (data.peer_id ? data.peer_id.slice(-8) : data.model_name || "");
  const held = data.layer_end > data.layer_start ? ` layers ${range(data.layer_start, data.layer_end)}` : "";
  const file = data.file ?? "a file";
  const said = {
    "node.joined": `joined${held ? ` with${held}` : ""}`,
    "node.left": "left",
    "node.lost": `was lost${held ? ` with${held}` : ""}`,
    "node.returned": "is back",
    "node.silent": "does not answer",
    "node.answers": "answers again",
    "shard.loading": `loads${held || " its shard"}`,
    "shard.loaded": `serves${held || " its shard"}`,
    "shard.unloaded": "unloaded its shard",
    "shard.failed": "cannot serve its shard",
    "download.started": `fetches ${file}${data.n_bytes ? `, ${bytes(data.n_bytes)}` : ""}`,
    "download.finished": `has fetched ${file}${data.n_bytes ? `, ${bytes(data.n_bytes)}` : ""}`,
    "download.failed": `could not fetch ${file}`,
    "download.ended": `no longer fetches ${file}`,
    "model.complete": "is complete",
    "model.incomplete": `is incomplete${data.missing_layers ? `: nobody serves ${data.missing_layers.map(([a, b]) => range(a, b)).join(", ")}` : ""}`,
    "model.gone": "is gone: nobody serves any of it",
    "gateway.started": "",
  }[event.kind];
  if (event.kind === "session.recovered") {
    const [lost, next] = [data.lost_peer_id, data.new_peer_id].map((peer) => peer.slice(-8));
    return [next, `took over layers ${range(data.layer_start, data.layer_end)} from ${lost} in a running answer, after ${ms(data.pause_ms)}`];
  }
  if (event.kind === "request.failed") return [data.model_name ?? data.model ?? "", "a request failed"];
  if (event.kind === "gateway.started") return ["", "This gateway started"];
  if (said !== undefined) return [who, said];
  return [who, event.kind.replaceAll(".", " ").replaceAll("_", " ")];
}

export class EventsView {
  constructor({ openNode }) {
    this.openNode = openNode;
    this.events = new Map();
    this.kind = "all";
    this.words = "";
    this.hasOlder = true;
    this.chips = KINDS.map(([kind, name]) => {
      const chip = h("button", { type: "button", class: "chip", "aria-pressed": String(kind === "all") }, name);
      chip.addEventListener("click", () => this.filter(kind));
      chip.kind = kind;
      return chip;
    });
    byId("event-kinds").append(...this.chips);
    byId("event-search").addEventListener("input", (event) => {
      this.words = event.target.value.trim().toLowerCase();
      this.draw();
    });
    this.older = h("button", { type: "button", class: "button" }, "Show older events");
    this.older.addEventListener("click", () => this.loadOlder());
    this.list = byId("event-list");
    this.draw();
  }

  render() {
    // Events come by themselves; nothing of the state is shown here.
  }

  filter(kind) {
    this.kind = kind;
    for (const chip of this.chips) chip.setAttribute("aria-pressed", String(chip.kind === kind));
    this.draw();
  }

  add(events, { isFresh = true } = {}) {
    for (const event of events) {
      if (isFresh && !this.events.has(event.id)) event.isFresh = true;
      this.events.set(event.id, event);
    }
    this.draw();
  }

  async loadNewest() {
    try {
      const events = await requestJson(`v1/events/history?limit=${PAGE}`);
      if (events.length < PAGE) this.hasOlder = false;
      this.add(events, { isFresh: false });
    } catch (error) {
      this.failed(error);
    }
  }

  async loadOlder() {
    try {
      const oldest = Math.min(...this.events.keys());
      const events = await requestJson(`v1/events/history?limit=${PAGE}&before=${oldest}`);
      this.hasOlder = events.length === PAGE;
      this.add(events, { isFresh: false });
    } catch (error) {
      this.failed(error);
    }
  }

  failed(error) {
    this.list.querySelector(".fault")?.remove();
    this.list.append(h("p", { class: "fault" }, `The events could not be fetched: ${error.message}`));
  }

  isShown(event) {
    if (this.kind !== "all" && kindOf(event) !== this.kind) return false;
    if (!this.words) return true;
    return `${sentence(event).join(" ")} ${event.cause} ${event.data.peer_id ?? ""}`.toLowerCase().includes(this.words);
  }

  draw() {
    if (this.isDue) return;
    this.isDue = true;
    requestAnimationFrame(() => {
      this.isDue = false;
      this.drawNow();
    });
  }

  drawNow() {
    const newest = [...this.events.values()].sort((a, b) => b.id - a.id);
    const shown = newest.filter((event) => this.isShown(event)).slice(0, SHOWN_MAX);
    const parts = [];
    let day = "";
    for (const event of shown) {
      const its = dayOf(event.at_s);
      if (its !== day) {
        day = its;
        parts.push(h("h3", { class: "event-day" }, day));
      }
      parts.push(this.row(event));
    }
    if (shown.length === 0) parts.push(h("p", { class: "quiet" }, this.events.size ? "No such event among those shown." : "Nothing has happened yet. Joins, leaves, loads and failures will be kept here."));
    if (this.hasOlder && this.events.size) parts.push(this.older);
    this.list.replaceChildren(...parts);
  }

  row(event) {
    if (event.row) {
      event.row.classList.remove("fresh");
      return event.row;
    }
    const [who, what] = sentence(event);
    const kind = kindOf(event);
    const name = event.data.peer_id && !event.data.gone ? h("b", {}, who) : h("b", {}, who);
    const cause = event.cause && h("span", {}, event.cause);
    event.row = h(
      "div",
      { class: event.isFresh ? "event fresh" : "event", data: kind === "failures" ? { bad: "", kind: event.kind } : { kind: event.kind } },
      h("time", { dateTime: new Date(event.at_s * 1000).toISOString() }, timeOfDay(event.at_s)),
      icon(event.kind === "node.left" ? "leave" : ICONS[kind]),
      h("p", {}, who ? name : "", who ? " " : "", what, cause),
    );
    return event.row;
  }
}
