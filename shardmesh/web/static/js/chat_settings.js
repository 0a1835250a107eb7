// How a conversation is sampled: a small form, whose values are the conversation's own.

import { byId, h } from "./dom.js";
import { DEFAULTS } from "./conversations.js";

const FIELDS = [
  ["temperature", "Temperature", { min: 0, max: 5, step: 0.05 }, "0 always takes the likeliest token"],
  ["top_p", "Top p", { min: 0, max: 1, step: 0.01 }, "Only the likeliest tokens that make up this share"],
  ["min_p", "Min p", { min: 0, max: 1, step: 0.01 }, "Only tokens at least this likely, compared with the likeliest"],
  ["top_k", "Top k", { min: 0, max: 1000, step: 1 }, "Only so many of the likeliest; 0 for all"],
  ["repeat_penalty", "Repetition", { min: 0.5, max: 2, step: 0.05 }, "Above 1 makes repeated tokens less likely"],
  ["max_tokens", "Tokens at most", { min: 1, max: 100000, step: 1 }, "Length of an answer"],
  ["seed", "Seed", { min: 0, max: 4294967295, step: 1, placeholder: "random" }, "The same seed gives the same text"],
];

export class ChatSettings {
  constructor({ onChange }) {
    this.onChange = onChange;
    this.form = byId("chat-settings");
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.inputs = new Map();
    this.modes = [["chat", "Chat"], ["text", "Continue a text"]].map(([mode, name]) => {
      const chip = h("button", { type: "button", class: "chip" }, name);
      chip.mode = mode;
      chip.addEventListener("click", () => this.set("mode", mode));
      return chip;
    });
    this.system = h("textarea", { rows: 3, placeholder: "You are …" });
    this.system.addEventListener("input", () => this.set("system", this.system.value));
    this.systemField = h("label", { class: "field" }, "System prompt", this.system);
    const fields = FIELDS.map(([name, label, limits, hint]) => this.field(name, label, limits, hint));
    const reset = h("button", { type: "button", class: "button" }, "Defaults");
    reset.addEventListener("click", () => {
      Object.assign(this.conversation.settings, DEFAULTS, { system: this.conversation.settings.system, mode: this.conversation.settings.mode });
      this.show(this.conversation);
      this.onChange();
    });
    this.form.append(
      h("div", { class: "choice", role: "group", "aria-label": "How the prompt is meant" }, this.modes),
      this.systemField,
      h("div", { class: "field-grid" }, fields),
      h("div", { class: "drawer-foot" }, h("span", {}, "For this conversation"), reset),
    );
  }

  field(name, label, limits, hint) {
    const input = h("input", { type: "number", inputMode: "decimal", title: hint, ...limits });
    input.addEventListener("change", () => {
      if (!input.checkValidity() || (input.value === "" && name !== "seed")) input.value = this.conversation.settings[name] ?? "";
      else this.set(name, input.value === "" ? null : Number(input.value));
    });
    this.inputs.set(name, input);
    return h("label", { class: "field" }, label, input);
  }

  set(name, value) {
    this.conversation.settings[name] = value;
    if (name === "mode") this.show(this.conversation);
    this.onChange();
  }

  show(conversation) {
    this.conversation = conversation;
    const { settings } = conversation;
    for (const [name, input] of this.inputs) input.value = settings[name] ?? "";
    if (this.system.value !== settings.system) this.system.value = settings.system;
    this.systemField.hidden = settings.mode === "text";
    for (const chip of this.modes) chip.setAttribute("aria-pressed", String(chip.mode === settings.mode));
  }
}
