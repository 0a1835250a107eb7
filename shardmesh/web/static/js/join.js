// The line for the next machine, with the shard that is needed most.

import { byId, copyLine, h, hide, text } from "./dom.js";
import { count, range } from "./format.js";

/** The line to copy, and why it names the shard that it names. */
export function joining(state) {
  const { needed } = state;
  const base = state.gateway.join ?? "shardmesh listen";
  if (!needed) return [base, "Any machine with Python 3.11 that reaches this mesh can join."];
  const layers = needed.layer_end ? `, layers ${range(needed.layer_start, needed.layer_end)},` : "";
  const model = state.models[needed.model]?.name ?? "";
  const why = {
    0: `Nobody serves shard ${needed.shard_id}${layers} of ${model} now: this is the one that is missing.`,
    1: `Shard ${needed.shard_id}${layers} of ${model} is on one machine only. With a second one, its loss would not stop an answer.`,
  }[needed.n_serving] ?? `Every shard of ${model} is on ${count(needed.n_serving, "machine")} or more. Shard ${needed.shard_id} is served least.`;
  const link = state.models[needed.model]?.link;
  const shard = `--shard-id ${needed.shard_id}`; // before the link, which is long
  const line = link ? `${state.gateway.join_by_link ?? base} ${shard} --model '${link}'` : `${base} ${shard}`;
  return [line, why];
}

export class JoinView {
  constructor() {
    this.line = copyLine("");
    this.why = h("p", { class: "join-text" });
    this.files = h("p", { class: "join-more" }, "Run it in the folder that holds the shard’s files, or add ", h("code", {}, "--shards-dir"), ". Where the model is published (", h("code", {}, "shardmesh publish"), "), the line fetches them.");
    this.fetched = h("p", { class: "join-more", hidden: true }, "The machine fetches its shard from the others and checks it. Nothing has to be copied.");
    this.secret = h("p", { class: "join-more", hidden: true }, "This mesh is private. ", h("code", {}, "cluster.secret"), " is a file with the secret that the bootstrap printed when it was first started.");
    byId("join-body").append(this.why, this.line, this.fetched, this.files, this.secret);
  }

  render(state) {
    const [line, why] = joining(state);
    this.line.setLine(line);
    const isFetched = state.models[state.needed?.model]?.link !== undefined;
    hide(this.fetched, !isFetched);
    hide(this.files, isFetched);
    hide(this.secret, !state.gateway.private);
    text(this.why, why);
  }
}
