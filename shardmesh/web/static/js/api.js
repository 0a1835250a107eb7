// Requests to the gateway, with the token that a person gave, if one is needed.

import { byId, h, icon } from "./dom.js";

const KEY = "shardmesh.token";

export function token() {
  try {
    return sessionStorage.getItem(KEY) || localStorage.getItem(KEY) || "";
  } catch {
    return "";
  }
}

/** What a WebSocket can carry of it: a subprotocol, because it has no headers. */
export function socketProtocols() {
  const kept = token();
  if (!kept) return ["shardmesh"];
  const bytes = new TextEncoder().encode(kept);
  const encoded = btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  return ["shardmesh", `bearer.${encoded}`];
}

/** An error in OpenAI's shape, or whatever came instead; the message says what to do next too. */
export class ApiError extends Error {
  constructor(status, body) {
    const error = body?.error ?? {};
    super(sentence(error.message || body?.detail || `the gateway answered ${status}`));
    this.status = status;
    this.code = String(error.code ?? "");
  }
}

const sentence = (words) => words.charAt(0).toUpperCase() + words.slice(1);

export async function request(path, { method = "GET", body, signal } = {}) {
  const headers = { Accept: "application/json" };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (token()) headers.Authorization = `Bearer ${token()}`;
  const answer = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  if (answer.ok) return answer;
  let reported = null;
  try {
    reported = await answer.json();
  } catch {
    // Not JSON: the status alone must do.
  }
  if (answer.status === 401) askForToken();
  throw new ApiError(answer.status, reported);
}

export const requestJson = async (path, options) => (await request(path, options)).json();

/** Asks once for the gateway's token; the page starts anew with it. */
export function askForToken(why = "This gateway wants an API token.") {
  const dialog = byId("token-dialog");
  if (dialog.open) return;
  const input = h("input", { type: "password", autocomplete: "current-password", required: true, id: "token-input" });
  const keep = h("input", { type: "checkbox" });
  const form = h(
    "form",
    { class: "dialog-body", method: "dialog" },
    h("p", { class: "muted" }, `${why} It stays in this browser.`),
    h("label", { class: "field" }, "Token", input),
    h("label", { class: "inline-field" }, keep, "Keep it when the browser is closed"),
    h("div", { class: "actions" }, h("button", { class: "button primary", type: "submit" }, "Use this token")),
  );
  form.addEventListener("submit", () => {
    (keep.checked ? localStorage : sessionStorage).setItem(KEY, input.value.trim());
    location.reload();
  });
  const close = h("button", { class: "icon-button", type: "button", "aria-label": "Close", on: { click: () => dialog.close() } }, icon("close"));
  dialog.replaceChildren(h("div", { class: "dialog-head" }, h("h2", { id: "token-dialog-title" }, "Token needed"), close), form);
  dialog.showModal();
  input.focus();
}
