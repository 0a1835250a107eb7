// The chain: a ruler of layers, stages left to right, replicas under each.

import { arrange, attribute, byId, copyLine, h, hide, text, variable } from "./dom.js";
import { count, gib, ms, nodeName, range, rate } from "./format.js";
import { joining } from "./join.js";
import { Motion } from "./motion.js";

const DENSE_NODES = 40; // more than this, or
const DENSE_REPLICAS = 6; // more than this in one stage: a line each

const WORDS = {
  online: "online", busy: "busy", draining: "draining", loading: "loading", downloading: "downloading", waiting: "no shard",
  failed: "failed", suspect: "silent", offline: "offline",
};

/** Stages of a model by layer range, and ranges that nobody has ever served, in order. */
export function stagesOf(model, nodes) {
  const stages = new Map();
  for (const [peerId, node] of nodes) {
    if (node.layer_end === node.layer_start) continue;
    const key = `${node.layer_start}-${node.layer_end}`;
    if (!stages.has(key)) stages.set(key, { key, start: node.layer_start, end: node.layer_end, shardId: node.shard_id, replicas: [] });
    stages.get(key).replicas.push([peerId, node]);
  }
  const ordered = [...stages.values()];
  for (const [start, end] of model.missing) {
    let at = start;
    for (const stage of ordered.filter((s) => s.start < end && s.end > start).sort((a, b) => a.start - b.start)) {
      if (stage.start > at) stages.set(`gap-${at}`, { key: `gap-${at}`, start: at, end: stage.start, isGap: true, replicas: [] });
      at = Math.max(at, stage.end);
    }
    if (at < end) stages.set(`gap-${at}`, { key: `gap-${at}`, start: at, end, isGap: true, replicas: [] });
  }
  for (const stage of stages.values()) {
    stage.replicas.sort(([a, x], [b, y]) => (nodeName(a, x) < nodeName(b, y) ? -1 : 1));
    stage.nServing = stage.replicas.filter(([, node]) => ["online", "busy", "suspect"].includes(node.state)).length;
  }
  return [...stages.values()].sort((a, b) => a.start - b.start || a.end - b.end);
}

/** How many machines serve a stage, where that is not plain to see. */
function replicasTold({ replicas, nServing }) {
  if (replicas.length < 2) return "";
  return nServing === replicas.length ? count(nServing, "replica") : `${nServing} of ${replicas.length} serve it`;
}

export class ChainView {
  constructor({ openNode }) {
    this.openNode = openNode;
    this.body = byId("chain-body");
    this.ruler = byId("ruler");
    this.stages = new Map();
    this.cards = new Map();
    this.segments = new Map();
    this.chosen = null;
    this.gateway = this.makeGateway();
    this.motion = new Motion(byId("motion"), this.gateway.querySelector(".card"), this.cards);
    this.waiting = h("div", { class: "waiting-row", hidden: true });
    this.empty = h("div", { class: "empty", hidden: true });
    byId("chain").append(this.waiting, this.empty);
  }

  makeGateway() {
    const rate = h("span");
    const card = h("div", { class: "card" }, h("b", {}, "gateway"), rate);
    const element = h("div", { class: "stage gateway-port" }, h("header", {}, h("h3", {}, "from")), card);
    element.rate = rate;
    return element;
  }

  render(state) {
    const digest = this.choose(state);
    const model = state.models[digest];
    const all = Object.entries(state.nodes);
    byId("ruler").hidden = byId("chain-scroll").hidden = byId("legend").hidden = !model;
    this.empty.hidden = Boolean(model);
    if (!model) this.renderEmpty(all, state);
    const nodes = all.filter(([, node]) => node.model === digest);
    const stages = model ? stagesOf(model, nodes) : [];
    const isDense = nodes.length > DENSE_NODES || stages.some((stage) => stage.replicas.length > DENSE_REPLICAS);
    const layout = `${digest} ${isDense} ${stages.map((s) => `${s.key}:${s.replicas.map(([p]) => p.slice(-8))}`)}`;
    this.body.classList.toggle("dense", isDense);
    if (model) {
      this.renderRuler(model, stages);
      this.renderStages(stages, isDense);
    }
    this.renderWaiting(all);
    const sessions = Object.entries(state.sessions).filter(([, session]) => session.chain.every((peer) => this.cards.has(peer)));
    const running = sessions.filter(([, session]) => session.state === "running");
    text(this.gateway.rate, running.length ? count(running.length, "session") : "idle");
    const moving = running.filter(([, session]) => session.tokens_per_s !== 0); // 0: it waits for a stage
    this.motion.show(moving, { isNewLayout: layout !== this.layout });
    this.layout = layout;
  }

  choose(state) {
    const digests = Object.keys(state.models);
    if (!digests.includes(this.chosen)) this.chosen = null;
    const tabs = byId("model-tabs");
    tabs.hidden = digests.length < 2;
    const shown = this.chosen ?? digests.find((digest) => state.models[digest].complete) ?? digests[0];
    arrange(tabs, digests.map((digest) => {
      const tab = [...tabs.children].find((child) => child.digest === digest) ?? this.makeTab(digest);
      text(tab, state.models[digest].name);
      attribute(tab, "aria-pressed", String(digest === shown));
      return tab;
    }));
    return shown;
  }

  makeTab(digest) {
    const tab = h("button", { type: "button", class: "chip" });
    tab.digest = digest;
    tab.addEventListener("click", () => {
      this.chosen = digest;
      this.render(window.shardmesh.state);
    });
    return tab;
  }

  renderEmpty(all, state) {
    const nWaiting = all.filter(([, node]) => node.state !== "offline").length;
    const words = nWaiting
      ? ["No shard is loaded yet", "As soon as a listener has loaded its shard, its layers appear here."]
      : ["No listener yet", "Run this where the shards are. The chain appears here by itself."];
    if (this.empty.shown === words[0]) return;
    this.empty.shown = words[0];
    this.empty.replaceChildren(h("h3", {}, words[0]), h("p", {}, words[1]), nWaiting ? "" : copyLine(joining(state)[0]));
  }

  renderRuler(model, stages) {
    const segments = stages.map((stage) => {
      let segment = this.segments.get(stage.key);
      if (!segment) {
        segment = h("button", { type: "button" });
        segment.addEventListener("click", () => this.reveal(stage.key));
        segment.item = h("div", { role: "listitem" }, segment);
        this.segments.set(stage.key, segment);
      }
      const label = range(stage.start, stage.end);
      const told = stage.nServing ? `served by ${count(stage.nServing, "listener")}` : "served by nobody";
      text(segment, stages.length > 12 ? "" : label);
      attribute(segment, "aria-label", `Layers ${label}, ${told}`);
      attribute(segment, "title", `Layers ${label}, ${told}`);
      attribute(segment, "data-level", String(Math.min(3, stage.nServing)));
      variable(segment.item, "--layers", String(stage.end - stage.start));
      return segment.item;
    });
    arrange(this.ruler, segments);
  }

  reveal(key) {
    this.stages.get(key)?.scrollIntoView({ behavior: "smooth", block: "nearest", inline: "center" });
  }

  renderStages(stages, isDense) {
    const columns = stages.map((stage, number) => {
      const column = this.stages.get(stage.key) ?? this.makeStage(stage);
      text(column.parts.name, `Stage ${number + 1}`);
      text(column.parts.range, range(stage.start, stage.end));
      text(column.parts.count, stage.isGap ? "" : isDense ? String(stage.nServing) : replicasTold(stage));
      arrange(column, stage.isGap ? [column.parts.gap] : stage.replicas.map(([peerId, node]) => this.renderCard(peerId, node, isDense)), column.parts.header);
      return column;
    });
    arrange(this.body, [byId("motion"), this.gateway, ...columns]);
    const shown = new Set(stages.flatMap((stage) => stage.replicas.map(([peerId]) => peerId)));
    for (const peerId of this.cards.keys()) if (!shown.has(peerId)) this.cards.delete(peerId);
  }

  makeStage(stage) {
    const name = h("h3");
    const layers = h("span", { class: "mono" });
    const replicas = h("span");
    const header = h("header", {}, name, layers, replicas);
    const gap = h("div", { class: "gap" }, "Nobody serves these layers.", h("br"), h("a", { href: "#join" }, "Add a machine"));
    const column = h("section", { class: "stage", "aria-label": `Layers ${range(stage.start, stage.end)}` }, header);
    column.parts = { name, range: layers, count: replicas, header, gap };
    this.stages.set(stage.key, column);
    return column;
  }

  renderCard(peerId, node, isDense) {
    const card = this.cards.get(peerId) ?? this.makeCard(peerId);
    const { dot, name, word, cardRate } = card.parts;
    const own = nodeName(peerId, node);
    attribute(dot, "data-state", node.state);
    attribute(card, "data-state", node.state);
    text(name, own);
    text(word, stateWord(node));
    text(cardRate, node.tokens_per_s ? rate(node.tokens_per_s) : "");
    attribute(card, "aria-label", `${own}, ${stateWord(node)}, layers ${range(node.layer_start, node.layer_end)}. Details`);
    card.classList.toggle("loading-bar", node.state === "loading");
    if (!isDense) this.renderMeters(card, node); // with hundreds of nodes a line each must do
    return card;
  }

  renderMeters(card, node) {
    if (!card.parts.meters) this.makeMeters(card);
    const { progress, meters, memory, memoryText, kv, kvName, kvText, foot, speed, trip, note } = card.parts;
    const sessions = node.n_sessions ?? 0;
    const hasShard = ["online", "busy", "suspect", "draining"].includes(node.state);
    hide(meters, !hasShard);
    hide(foot, !hasShard);
    const [download] = Object.values(node.downloads ?? {});
    hide(progress, !download);
    if (download) share(progress, download.n_bytes_done / download.n_bytes);
    const usedMb = node.memory_mb - node.memory_available_mb;
    share(memory, usedMb / node.memory_mb);
    text(memoryText, `${gib(usedMb)} of ${gib(node.memory_mb)} GiB`);
    const room = node.n_ctx * node.n_parallel;
    const hasTokens = node.n_kv_tokens !== undefined && room > 0;
    share(kv, hasTokens ? node.n_kv_tokens / room : node.n_parallel ? sessions / node.n_parallel : 0);
    text(kvName, hasTokens ? "KV tokens" : "KV slots");
    text(kvText, hasTokens ? `${node.n_kv_tokens} of ${room}` : `${sessions} of ${node.n_parallel || "–"}`);
    text(speed, rate(node.tokens_per_s ?? 0));
    text(trip, ms(node.round_trip_ms));
    const said = noteOf(node);
    text(note, said);
    hide(note, !said);
  }

  makeCard(peerId) {
    const parts = { dot: h("i", { class: "dot" }), name: h("span"), word: h("span", { class: "card-state" }), cardRate: h("span", { class: "card-rate" }) };
    const card = h("button", { type: "button", class: "card", data: { peer: peerId } }, h("div", { class: "card-name" }, parts.dot, parts.name, parts.word, parts.cardRate));
    card.parts = parts;
    card.addEventListener("click", () => this.openNode(peerId));
    this.cards.set(peerId, card);
    return card;
  }

  makeMeters(card) {
    const bar = () => h("span", { class: "bar" }, h("i"));
    const parts = Object.assign(card.parts, {
      memory: bar(), memoryText: h("span", { class: "num" }), kv: bar(), kvName: h("span"), kvText: h("span", { class: "num" }),
      speed: h("b"), trip: h("b"), note: h("div", { class: "card-note" }),
    });
    parts.progress = h("span", { class: "bar way card-progress" }, h("i"));
    parts.meters = h("div", { class: "meters" }, h("span", {}, "Memory"), parts.memoryText, parts.memory, parts.kvName, parts.kvText, parts.kv);
    parts.foot = h("div", { class: "card-foot" }, h("span", {}, parts.speed, " tok/s"), h("span", { title: "Round trip from the gateway" }, parts.trip, " trip"));
    card.append(parts.progress, parts.meters, parts.foot, parts.note);
  }

  renderWaiting(all) {
    const waiting = all.filter(([, node]) => node.layer_end === node.layer_start);
    this.waiting.hidden = waiting.length === 0;
    const shown = waiting.map(([peerId, node]) => {
      const chip = [...this.waiting.children].find((child) => child.dataset.peer === peerId) ?? this.makeWaiting(peerId);
      attribute(chip.firstElementChild, "data-state", node.state);
      text(chip.lastElementChild, `${nodeName(peerId, node)}: ${stateWord(node)}`);
      return chip;
    });
    arrange(this.waiting, shown);
  }

  makeWaiting(peerId) {
    const chip = h("button", { type: "button", class: "button", data: { peer: peerId } }, h("i", { class: "dot" }), h("span"));
    chip.addEventListener("click", () => this.openNode(peerId));
    return chip;
  }
}

function share(bar, value) {
  const bounded = Math.max(0, Math.min(1, Number.isFinite(value) ? value : 0));
  variable(bar, "--share", bounded.toFixed(3));
  bar.classList.toggle("full", bounded > 0.92);
}

/** The state as a word, with progress where there is one. */
export function stateWord(node) {
  const [download] = Object.values(node.downloads ?? {});
  if (node.state === "downloading" && download?.n_bytes) {
    return `fetching ${Math.floor((100 * download.n_bytes_done) / download.n_bytes)} %`;
  }
  return WORDS[node.state] ?? node.state;
}

function noteOf(node) {
  if (node.state === "offline") return `Lost ${new Date(node.since_s * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hourCycle: "h23" })}. It counts again when it is back.`;
  return node.state === "failed" || node.state === "suspect" ? node.error ?? "" : "";
}
