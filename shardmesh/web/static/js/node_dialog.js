// One node in full, and what can be done with it.

import { requestJson } from "./api.js";
import { stateWord } from "./chain.js";
import { byId, copy, h, icon, text, toast } from "./dom.js";
import { duration, gib, ms, nodeName, range, rate } from "./format.js";

export class NodeDialog {
  constructor() {
    this.dialog = byId("node-dialog");
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close();
    });
    this.title = h("h2", { id: "node-dialog-title" });
    this.dot = h("i", { class: "dot" });
    this.facts = h("dl", { class: "facts-list" });
    this.values = new Map();
    this.shard = h("select", { "aria-label": "Shard to load" });
    this.load = h("button", { class: "button", type: "button" }, "Load");
    this.unload = h("button", { class: "button danger", type: "button" }, "Unload its shard");
    this.fault = h("p", { class: "fault", role: "alert" });
    this.load.addEventListener("click", () => this.ask("POST", { shard_id: Number(this.shard.value) }, `loads shard ${this.shard.value}`));
    this.unload.addEventListener("click", () => {
      if (this.unload.dataset.sure) this.ask("DELETE", undefined, "unloads its shard");
      else this.askTwice();
    });
    this.actions = h("div", { class: "actions" }, h("label", {}, "Shard", this.shard), this.load, this.unload);
    const close = h("button", { class: "icon-button", type: "button", "aria-label": "Close" }, icon("close"));
    close.addEventListener("click", () => this.dialog.close());
    this.dialog.append(h("div", { class: "dialog-head" }, this.dot, this.title, close), h("div", { class: "dialog-body" }, this.facts, this.fault, this.actions));
  }

  open(peerId) {
    this.peerId = peerId;
    text(this.fault, "");
    this.calm();
    this.shards = "";
    this.render(window.shardmesh.state);
    if (!this.dialog.open) this.dialog.showModal();
  }

  render(state) {
    const node = state?.nodes[this.peerId];
    if (!node) {
      if (this.dialog.open && this.peerId) this.dialog.close();
      return;
    }
    if (!this.dialog.open && this.shownFor === this.peerId && this.shards) return;
    this.shownFor = this.peerId;
    text(this.title, nodeName(this.peerId, node));
    this.dot.dataset.state = node.state;
    const model = state.models[node.model];
    const download = Object.entries(node.downloads ?? {})[0];
    this.show("State", `${stateWord(node)}, for ${duration(Date.now() / 1000 - node.since_s)}`);
    this.show("Trouble", node.error);
    this.show("Model", model?.name);
    this.show("Shard", node.layer_end > node.layer_start ? `${node.shard_id}, layers ${range(node.layer_start, node.layer_end)}` : `${node.shard_id}`);
    this.show("Download", download && `${download[0]}, ${Math.floor((100 * download[1].n_bytes_done) / (download[1].n_bytes || 1))} %`);
    this.show("Round trip", node.round_trip_ms !== undefined ? ms(node.round_trip_ms) : undefined);
    this.show("Tokens per second", node.tokens_per_s !== undefined ? rate(node.tokens_per_s) : undefined);
    this.show("Sessions", node.n_parallel ? `${node.n_sessions ?? 0} of ${node.n_parallel}, ${node.n_ctx} tokens each` : undefined);
    this.show("Memory", `${gib(node.memory_mb - node.memory_available_mb)} of ${gib(node.memory_mb)} GiB used${node.process_memory_mb ? `, ${node.process_memory_mb} MiB by the shard` : ""}`);
    this.show("Machine", `${node.cpu_cores} cores${node.gpu ? ", GPU" : ""}${node.location ? `, ${node.location}` : ""}`);
    this.show("Tags", node.tags?.join(", "));
    this.show("Trouble with its name", node.name_clash ? "another node has the same one" : undefined);
    this.show("Computes with", node.fingerprint);
    this.show("Addresses", node.addresses.join("\n"), "mono");
    this.show("Peer id", this.peerId, "mono");
    this.renderActions(node, model);
  }

  show(name, value, kind = "") {
    if (!this.values.has(name)) {
      const row = [h("dt", {}, name), h("dd", { class: kind })];
      if (name === "Peer id") row[1].addEventListener("dblclick", () => copy(row[1].textContent));
      this.facts.append(...row);
      this.values.set(name, row);
    }
    const [term, detail] = this.values.get(name);
    term.hidden = detail.hidden = value === undefined || value === "";
    text(detail, value ?? "");
  }

  renderActions(node, model) {
    const nShards = model?.total_shards ?? 0;
    this.actions.hidden = node.state === "offline";
    this.unload.hidden = !["online", "busy", "failed", "loading"].includes(node.state);
    const key = `${nShards} ${Object.values(model?.shards ?? {}).map((shard) => shard.n_serving)}`;
    if (key === this.shards) return;
    this.shards = key;
    this.shard.replaceChildren(...Array.from({ length: nShards }, (_, id) => {
      const serving = model.shards[id]?.n_serving ?? 0;
      return h("option", { value: id }, `${id}${serving ? `, served ${serving} ×` : ", served by nobody"}`);
    }));
    this.shard.value = String(node.shard_id);
    this.shard.disabled = this.load.disabled = nShards === 0;
  }

  askTwice() {
    this.unload.dataset.sure = "yes";
    text(this.unload, "Its sessions end. Unload?");
    this.timer = setTimeout(() => this.calm(), 4000);
  }

  calm() {
    clearTimeout(this.timer);
    delete this.unload.dataset.sure;
    text(this.unload, "Unload its shard");
  }

  async ask(method, body, what) {
    const peerId = this.peerId;
    const name = this.title.textContent;
    this.calm();
    text(this.fault, "");
    this.load.disabled = this.unload.disabled = true;
    toast(`${name} ${what}`);
    try {
      await requestJson(`v1/nodes/${peerId}/shard`, { method, body });
    } catch (error) {
      if (this.peerId === peerId && this.dialog.open) text(this.fault, error.message);
      else toast(`${name}: ${error.message}`, { bad: true });
    } finally {
      this.load.disabled = this.unload.disabled = false;
    }
  }
}
