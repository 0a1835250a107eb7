// The conversation: what was said, what is being said, and how fast.

import { Answer, userMessage } from "./answer.js";
import { ChatSettings } from "./chat_settings.js";
import { complete } from "./completion.js";
import { loadAll, newConversation, saveAll, titleOf } from "./conversations.js";
import { announce, arrange, byId, h, icon, text } from "./dom.js";
import { count, dayOf } from "./format.js";

const NO_TEMPLATE = /no chat template/i;
const NEAR_END_PX = 80;
const STARTERS = ["Once upon a time there was a king who", "Far away, where the swallows fly when our winter comes on,", "Why is the sky blue?"];

export class Chat {
  constructor() {
    this.conversations = loadAll();
    this.current = newConversation();
    this.messages = byId("messages");
    this.prompt = byId("prompt");
    this.running = null;
    this.state = null;
    this.settings = new ChatSettings({ onChange: () => this.settingsChanged() });
    this.listen();
    this.show(this.current);
  }

  listen() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.send();
      }
    });
    this.prompt.addEventListener("input", () => this.renderComposer());
    byId("stop").addEventListener("click", () => this.stop());
    byId("chat").addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      if (this.running) this.stop();
      else this.closeDrawers();
    });
    byId("conversation-new").addEventListener("click", () => this.startNew());
    byId("model").addEventListener("change", (event) => { this.current.model = event.target.value; });
    this.drawer("conversations", "conversations-toggle", () => this.renderConversations());
    this.drawer("chat-settings", "chat-settings-toggle", () => this.settings.show(this.current));
    // The last words must not be lost when the page is closed in the middle of an answer.
    addEventListener("pagehide", () => this.save());
  }

  drawer(id, toggleId, show) {
    const toggle = byId(toggleId);
    toggle.addEventListener("click", () => {
      const isOpen = toggle.getAttribute("aria-expanded") === "true";
      this.closeDrawers();
      if (isOpen) return;
      toggle.setAttribute("aria-expanded", "true");
      byId(id).hidden = false;
      show();
    });
  }

  closeDrawers() {
    for (const name of ["conversations", "chat-settings"]) {
      byId(name).hidden = true;
      byId(`${name}-toggle`).setAttribute("aria-expanded", "false");
    }
  }

  // -- what the feed tells ---------------------------------------------------------------------

  render(state) {
    this.state = state;
    const names = [...new Set(Object.values(state.models).filter((model) => model.complete).map((model) => model.name))];
    const key = names.join("\n");
    if (key !== this.modelKey) {
      this.modelKey = key;
      const options = names.map((name) => h("option", { value: name }, name));
      byId("model").replaceChildren(...(options.length ? options : [h("option", { value: "" }, "no model is complete")]));
    }
    if (!names.includes(this.current.model)) this.current.model = names[0] ?? "";
    byId("model").value = this.current.model;
    this.showSession(this.running ?? this.ended, state);
    this.renderComposer();
  }

  /** The last figures of a session come a moment after its last word. */
  showSession(shown, state) {
    const session = shown && state.sessions[shown.id];
    if (!session) return;
    shown.answer.showSession(session, state);
    if (shown === this.ended && session.state !== "running") {
      this.ended = null;
      this.save();
    }
  }

  renderComposer() {
    const canSend = Boolean(this.current.model) && this.prompt.value.trim() !== "";
    byId("send").hidden = Boolean(this.running);
    byId("stop").hidden = !this.running;
    byId("send").disabled = !canSend;
    const isText = this.current.settings.mode === "text";
    this.prompt.placeholder = isText ? "Begin a text, the mesh continues it" : "Ask the mesh";
    text(byId("composer-hint"), this.state && !this.current.model ? "waiting for a complete chain" : "");
  }

  // -- conversations ---------------------------------------------------------------------------

  show(conversation) {
    this.current = conversation;
    text(byId("conversation-title"), titleOf(conversation));
    this.settings.show(conversation);
    this.drawMessages();
    this.renderComposer();
  }

  startNew() {
    this.stop();
    this.closeDrawers();
    const { settings, model } = this.current;
    this.show({ ...newConversation(settings), model });
    this.prompt.focus();
  }

  renderConversations() {
    const parts = this.conversations.sort((a, b) => b.changedAt - a.changedAt).map((conversation) => {
      const open = h("button", { type: "button" }, h("b", {}, titleOf(conversation)), h("span", {}, `${dayOf(conversation.changedAt / 1000)}, ${count(conversation.messages.length, "message")}`));
      open.addEventListener("click", () => {
        this.stop();
        this.closeDrawers();
        this.show(conversation);
      });
      const remove = h("button", { type: "button", class: "icon-button", "aria-label": `Delete “${titleOf(conversation)}”` }, icon("trash"));
      remove.addEventListener("click", () => this.remove(conversation));
      return h("div", { class: "conversation", "aria-current": conversation === this.current ? "true" : null }, open, remove);
    });
    const foot = h("p", { class: "drawer-foot" }, parts.length ? "Kept in this browser only." : "Conversations will be kept here, in this browser only.");
    byId("conversations").replaceChildren(...parts, foot);
  }

  remove(conversation) {
    this.conversations = this.conversations.filter((other) => other !== conversation);
    this.save();
    if (conversation === this.current) {
      this.stop();
      this.show(newConversation(conversation.settings));
    }
    this.renderConversations();
  }

  save() {
    if (this.current.messages.length && !this.conversations.includes(this.current)) this.conversations.push(this.current);
    saveAll(this.conversations);
  }

  settingsChanged() {
    this.renderComposer();
    this.save();
  }

  // -- messages --------------------------------------------------------------------------------

  drawMessages() {
    const parts = this.current.messages.map((message, number) => {
      if (message.role === "user") return userMessage(message, { onEdit: () => this.edit(number) });
      return new Answer(message, { onAgain: () => this.regenerate(number) }).element;
    });
    if (parts.length === 0) parts.push(this.welcome());
    arrange(this.messages, []);
    this.messages.replaceChildren(...parts);
    this.markLast();
    this.messages.scrollTop = this.messages.scrollHeight;
  }

  welcome() {
    const starters = STARTERS.map((words) => h("button", { type: "button", class: "button", on: { click: () => {
      this.prompt.value = words;
      this.renderComposer();
      this.prompt.focus();
    } } }, words));
    return h("div", { class: "welcome" }, h("h3", {}, "Ask the mesh"), h("p", {}, "Each token passes all stages. Watch it on its way while the answer is written."), starters);
  }

  markLast() {
    for (const element of this.messages.children) element.classList.toggle("last", element === this.messages.lastElementChild);
  }

  edit(number) {
    this.stop();
    this.prompt.value = this.current.messages[number].content;
    this.current.messages.length = number;
    this.drawMessages();
    this.renderComposer();
    this.prompt.focus();
  }

  regenerate(number) {
    this.stop();
    this.current.messages.length = number;
    this.drawMessages();
    this.answer();
  }

  send() {
    const content = this.prompt.value;
    if (!content.trim() || this.running || !this.current.model) return;
    this.prompt.value = "";
    this.closeDrawers();
    const isText = this.current.settings.mode === "text";
    this.current.messages.push({ role: "user", content: isText ? content : content.trim() });
    this.drawMessages();
    text(byId("conversation-title"), titleOf(this.current));
    this.answer();
  }

  stop() {
    this.running?.abort.abort();
  }

  // -- an answer -------------------------------------------------------------------------------

  async answer() {
    const conversation = this.current;
    const asked = [...conversation.messages];
    const message = { role: "assistant", content: "", meta: {} };
    conversation.messages.push(message);
    const number = conversation.messages.length - 1;
    const answer = new Answer(message, { onAgain: () => this.regenerate(number) });
    const abort = new AbortController();
    const running = { abort, answer, id: "", message };
    this.running = running;
    answer.begin();
    this.messages.append(answer.element);
    this.markLast();
    this.messages.scrollTop = this.messages.scrollHeight;
    this.renderComposer();
    try {
      await this.stream(conversation, asked, running);
    } catch (error) {
      if (error.name !== "AbortError") message.meta.error = error.message;
      else message.meta.reason = "stopped";
    }
    if (this.running === running) this.running = null;
    this.ended = running;
    this.stayAtEnd(() => answer.end(this.state?.sessions[running.id], this.state));
    conversation.changedAt = Date.now();
    if (this.current === conversation) {
      this.save();
      this.renderComposer();
    } else {
      saveAll(this.conversations);
    }
    announce(message.meta.error ? `No answer: ${message.meta.error}` : "The answer is complete.");
  }

  async stream(conversation, asked, running) {
    const { answer, abort, message } = running;
    const startedMs = performance.now();
    const handlers = {
      signal: abort.signal,
      onStart: (id) => { running.id = id; },
      onText: (piece) => {
        message.meta.first_token_ms ??= performance.now() - startedMs;
        this.stayAtEnd(() => answer.add(piece));
      },
    };
    let result;
    try {
      result = await complete(conversation, asked, handlers);
    } catch (error) {
      if (conversation.settings.mode !== "chat" || !NO_TEMPLATE.test(error.message)) throw error;
      // A model without a chat template can still go on with what was written.
      conversation.settings.mode = "text";
      message.meta.note = "This model has no chat template, so it continues your text.";
      this.settings.show(conversation);
      result = await complete(conversation, asked, handlers);
    }
    message.meta.reason = result.reason;
    message.meta.n_tokens = result.usage?.completion_tokens;
    message.meta.tokens_per_s = result.mesh?.tokens_per_s ?? undefined;
    const decodeMs = performance.now() - startedMs - (message.meta.first_token_ms ?? 0);
    if (message.meta.n_tokens > 1) message.meta.tokens_per_s ??= ((message.meta.n_tokens - 1) * 1000) / decodeMs;
  }

  /** Does something that may make the conversation longer, and stays at its end if it was there. */
  stayAtEnd(change) {
    const { messages } = this;
    const isAtEnd = messages.scrollHeight - messages.scrollTop - messages.clientHeight < NEAR_END_PX;
    change();
    if (isAtEnd) requestAnimationFrame(() => { messages.scrollTop = messages.scrollHeight; });
  }
}
