// What is served and by whom, what is being fetched, and what could be loaded where.

import { arrange, attribute, byId, h, text, variable } from "./dom.js";
import { bytes, count, duration, list, nodeName, range } from "./format.js";

const NAMES_SHOWN = 6;
const STATES = { looking: "looking for a source", waiting: "another process fetches it", checking: "checking what is there", verifying: "verifying", failed: "failed" };

export class ModelsView {
  constructor({ openNode }) {
    this.openNode = openNode;
    this.parent = byId("model-list");
    this.models = new Map();
    this.downloads = new Map();
    this.downloadList = h("div", { class: "downloads", hidden: true });
    this.none = h("p", { class: "quiet" }, "No model is served yet.");
    this.waiting = h("div", { class: "waiting-row", hidden: true });
    this.body = h("div");
    this.parent.append(this.downloadList, this.none, this.body, this.waiting);
  }

  render(state) {
    this.renderDownloads(state);
    const digests = Object.keys(state.models);
    this.none.hidden = digests.length > 0;
    arrange(this.body, digests.map((digest) => this.renderModel(digest, state)));
    for (const digest of this.models.keys()) if (!(digest in state.models)) this.models.delete(digest);
    this.renderWaiting(state);
  }

  renderDownloads(state) {
    const rows = [];
    const seen = new Set();
    for (const [peerId, node] of Object.entries(state.nodes)) {
      for (const [file, download] of Object.entries(node.downloads ?? {})) {
        const key = `${peerId} ${file}`;
        seen.add(key);
        rows.push(this.renderDownload(key, nodeName(peerId, node), file, download));
      }
    }
    for (const key of this.downloads.keys()) if (!seen.has(key)) this.downloads.delete(key);
    this.downloadList.hidden = rows.length === 0;
    arrange(this.downloadList, rows);
  }

  renderDownload(key, who, file, download) {
    let row = this.downloads.get(key);
    if (!row) {
      const parts = { name: h("span", { class: "name" }), facts: h("span", { class: "facts" }) };
      parts.bar = h("span", { class: "bar way", role: "progressbar", "aria-valuemin": "0", "aria-valuemax": "100" }, h("i"));
      row = h("div", { class: "download" }, parts.name, parts.facts, parts.bar);
      row.parts = parts;
      this.downloads.set(key, row);
    }
    const share = download.n_bytes ? download.n_bytes_done / download.n_bytes : 0;
    const facts = [`${bytes(download.n_bytes_done)} of ${bytes(download.n_bytes)}`, `${bytes(download.bytes_per_s ?? 0)}/s`];
    if (download.remaining_s !== undefined) facts.push(`${duration(download.remaining_s)} left`);
    facts.push(STATES[download.state] ?? (download.n_sources ? `from ${count(download.n_sources, "source")}` : "no source yet"));
    if (download.error) facts.push(download.error);
    row.classList.toggle("failed", download.state === "failed");
    text(row.parts.name, `${who} fetches ${file}`);
    text(row.parts.facts, facts.join(" · "));
    variable(row.parts.bar, "--share", share.toFixed(4));
    attribute(row.parts.bar, "aria-label", `${who} fetches ${file}`);
    attribute(row.parts.bar, "aria-valuenow", String(Math.floor(100 * share)));
    return row;
  }

  renderModel(digest, state) {
    const model = state.models[digest];
    const shown = this.models.get(digest) ?? this.makeModel(digest);
    const nodes = Object.entries(state.nodes).filter(([, node]) => node.model === digest);
    text(shown.name, model.name);
    text(shown.facts, `${count(model.n_layer, "layer")} in ${count(model.total_shards, "shard")}`);
    const ranges = list(model.missing.map(([start, end]) => range(start, end)));
    text(shown.verdict, model.complete ? (model.exact ? "complete" : "complete, computed differently") : `layers ${ranges} missing`);
    attribute(shown.verdict, "data-tone", model.complete ? "good" : "bad");
    const key = JSON.stringify([model.shards, nodes.map(([p, n]) => [p, n.name, n.state, n.shard_id])]);
    if (shown.key !== key) {
      shown.key = key;
      shown.body.replaceChildren(...this.shardRows(model, nodes));
    }
    return shown.element;
  }

  makeModel(digest) {
    const shown = { name: h("h3"), facts: h("span"), verdict: h("span", { class: "verdict" }), body: h("tbody") };
    const head = (name, kind = "") => h("th", { scope: "col", class: kind }, name);
    shown.element = h(
      "div",
      { class: "model" },
      h("div", { class: "model-head" }, shown.name, shown.facts, shown.verdict, h("span", { class: "mono", title: "Digest of the manifest" }, digest.slice(0, 12))),
      h("div", { class: "table-scroll", tabIndex: 0, role: "group", "aria-label": "Shards" }, h("table", { class: "table" }, h("thead", {}, h("tr", {}, head("Shard"), head("Layers"), head("Served", "num"), head("On"))), shown.body)),
    );
    this.models.set(digest, shown);
    return shown;
  }

  shardRows(model, nodes) {
    return Array.from({ length: Math.min(model.total_shards, 1000) }, (_, shardId) => {
      const shard = model.shards[shardId] ?? { n_serving: 0 };
      const holders = nodes.filter(([, node]) => node.shard_id === shardId);
      const layers = shard.layer_end ? range(shard.layer_start, shard.layer_end) : "–";
      const names = holders.slice(0, NAMES_SHOWN).map(([peerId, node]) => this.nodeLink(peerId, node));
      if (holders.length > NAMES_SHOWN) names.push(h("span", { class: "muted" }, `and ${holders.length - NAMES_SHOWN} more`));
      return h(
        "tr",
        {},
        h("td", {}, String(shardId)),
        h("td", { class: "mono" }, layers),
        h("td", { class: "num" }, shard.n_serving ? `${shard.n_serving} ×` : "–"),
        h("td", {}, names.length ? h("span", { class: "who-list" }, names) : h("span", { class: "fault" }, "nobody")),
      );
    });
  }

  nodeLink(peerId, node) {
    return h(
      "span",
      { class: "who" },
      h("i", { class: "dot", data: { state: node.state } }),
      h("button", { type: "button", class: "link", on: { click: () => this.openNode(peerId) } }, nodeName(peerId, node)),
    );
  }

  renderWaiting(state) {
    const waiting = Object.entries(state.nodes).filter(([, node]) => node.state === "waiting");
    const key = waiting.map(([peerId, node]) => nodeName(peerId, node)).join();
    this.waiting.hidden = waiting.length === 0;
    if (key === this.waitingKey) return;
    this.waitingKey = key;
    this.waiting.replaceChildren("Without a loaded shard:", ...waiting.map(([peerId, node]) => this.nodeLink(peerId, node)));
  }
}
