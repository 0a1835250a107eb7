// One sentence on how things stand, and the figures beside it.

import { byId, h, text } from "./dom.js";
import { count, gib, list, range } from "./format.js";

export const isServing = (node) => ["online", "busy", "suspect"].includes(node.state) && node.layer_end > node.layer_start;

/** What the headline says: [sentence, more, tone]. */
export function verdict(state) {
  const models = Object.values(state.models);
  const nodes = Object.values(state.nodes);
  if (models.length === 0) {
    const waiting = nodes.filter((node) => node.state !== "offline").length;
    if (waiting) return ["Listeners are here, but no shard is loaded yet.", `${count(waiting, "listener")} without a shard.`, ""];
    return ["Nobody serves a model yet.", "Start a listener on any machine that reaches this one.", ""];
  }
  const complete = models.filter((model) => model.complete);
  if (complete.length === 0) {
    const model = models[0];
    const ranges = list(model.missing.map(([start, end]) => range(start, end)));
    return [`${model.name} cannot answer now.`, `Nobody serves the layers ${ranges}. Prompts wait for a listener with them.`, "bad"];
  }
  const others = models.filter((model) => !model.complete);
  const names = list(complete.map((model) => model.name));
  const [model] = complete;
  const serving = nodes.filter(isServing).length;
  const sentence = `${names} ${complete.length === 1 ? "is ready" : "are ready"}.`;
  const single = Object.values(model.shards).filter((shard) => shard.n_serving === 1).length;
  const parts = [`${count(serving, "listener")} ${serving === 1 ? "serves" : "serve"} ${complete.length === 1 ? `all ${model.n_layer} layers in ${count(model.total_shards, "shard")}` : `${complete.length} models`}.`];
  if (!model.exact) parts.push("They compute differently (another llama.cpp, processor or option), so the last bits may differ.");
  else if (single === Object.keys(model.shards).length) parts.push("Each shard is on one machine only.");
  else if (single) parts.push(`${count(single, "shard")} ${single === 1 ? "has" : "have"} no spare.`);
  if (others.length) parts.push(`${list(others.map((other) => other.name))} cannot answer now.`);
  return [sentence, parts.join(" "), ""];
}

/** Tokens per second of the whole mesh: of this gateway's sessions, else what the nodes count. */
export function totalRate(state) {
  const running = Object.values(state.sessions).filter((session) => session.state === "running");
  if (running.length) return running.reduce((sum, session) => sum + (session.tokens_per_s ?? 0), 0);
  let total = 0;
  for (const [digest, model] of Object.entries(state.models)) {
    const last = Object.values(state.nodes).filter((node) => node.model === digest && node.layer_end === model.n_layer);
    total += last.reduce((sum, node) => sum + (node.tokens_per_s ?? 0), 0);
  }
  return total;
}

export class SummaryView {
  constructor() {
    this.figures = new Map();
  }

  render(state) {
    const [sentence, more, tone] = verdict(state);
    const headline = byId("headline");
    text(headline, sentence);
    headline.dataset.tone = tone;
    text(byId("headline-more"), more);
    text(byId("cluster"), state.gateway.cluster ?? "");
    this.renderFigures(state);
  }

  renderFigures(state) {
    const nodes = Object.values(state.nodes);
    byId("figures").hidden = nodes.length === 0;
    const there = nodes.filter((node) => node.state !== "offline");
    const running = Object.values(state.sessions).filter((session) => session.state === "running").length;
    const memory = there.reduce((sum, node) => sum + node.memory_mb, 0);
    const used = there.reduce((sum, node) => sum + node.memory_mb - node.memory_available_mb, 0);
    this.figure("Tokens per second", totalRate(state).toFixed(1), "");
    this.figure("Sessions", String(running), "");
    this.figure("Listeners online", String(there.filter(isServing).length), `of ${nodes.length}`);
    this.figure("Memory used", gib(used), `of ${gib(memory)} GiB`);
  }

  figure(name, value, unit) {
    if (!this.figures.has(name)) {
      const number = h("span");
      const small = h("small");
      byId("figures").append(h("div", {}, h("dt", {}, name), h("dd", {}, number, " ", small)));
      this.figures.set(name, [number, small]);
    }
    const [number, small] = this.figures.get(name);
    text(number, value);
    text(small, unit);
  }
}
