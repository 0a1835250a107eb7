// The state of the mesh over a WebSocket: a snapshot, then merge patches (RFC 7396).

import { askForToken, socketProtocols } from "./api.js";

const SILENCE_MS = 25000; // the gateway says something every ten seconds
const PAUSE_MIN_MS = 250;
const PAUSE_MAX_MS = 8000;
const NOT_ALLOWED = { 4401: "This gateway wants an API token.", 4403: "This token may not look at the mesh; it takes one with the right “read”." };

/** Puts a merge patch into a document, in place. */
export function merge(document, patch) {
  for (const [key, value] of Object.entries(patch)) {
    if (value === null) {
      delete document[key];
    } else if (typeof value === "object" && !Array.isArray(value)) {
      const old = document[key];
      document[key] = merge(old && typeof old === "object" && !Array.isArray(old) ? old : {}, value);
    } else {
      document[key] = value;
    }
  }
  return document;
}

/** Keeps a connection up; tells of each new state, of events, and how the connection is. */
export class Feed {
  constructor({ onState, onEvents, onStatus, url = socketUrl() }) {
    this.state = null;
    this.tell = { onState, onEvents, onStatus };
    this.url = url;
    this.number = -1;
    this.pauseMs = PAUSE_MIN_MS;
    this.connect();
    // A laptop that wakes up or gets its network back should not wait for a pause to end.
    addEventListener("online", () => this.again());
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.again();
    });
  }

  again() {
    if (this.socket?.readyState === WebSocket.CLOSED) {
      clearTimeout(this.timer);
      this.connect();
    }
  }

  connect() {
    this.tell.onStatus(this.state ? "lost" : "connecting");
    const socket = new WebSocket(this.url, socketProtocols());
    this.socket = socket;
    this.expectSomething();
    socket.addEventListener("message", (event) => this.take(JSON.parse(event.data)));
    socket.addEventListener("close", (event) => this.closed(socket, event));
  }

  closed(socket, event) {
    if (socket !== this.socket) return;
    clearTimeout(this.silence);
    this.tell.onStatus(NOT_ALLOWED[event.code] ? "refused" : "lost");
    if (NOT_ALLOWED[event.code]) {
      askForToken(NOT_ALLOWED[event.code]);
      return;
    }
    const pauseMs = this.pauseMs * (0.75 + Math.random() / 2);
    this.pauseMs = Math.min(PAUSE_MAX_MS, this.pauseMs * 2);
    this.timer = setTimeout(() => this.connect(), pauseMs);
  }

  expectSomething() {
    clearTimeout(this.silence);
    this.silence = setTimeout(() => {
      const socket = this.socket;
      socket.close();
      this.closed(socket, { code: 0 });
      this.socket = { readyState: WebSocket.CLOSED };
    }, SILENCE_MS);
  }

  take(message) {
    this.expectSomething();
    if (message.type === "state") {
      this.pauseMs = PAUSE_MIN_MS;
      this.state = message.state;
      this.number = message.number;
      this.tell.onStatus("live");
      this.tell.onState(this.state);
    } else if (message.type === "patch" && this.state) {
      if (message.number !== this.number + 1) {
        this.socket.close(); // one was missed: a new connection brings a snapshot
        return;
      }
      this.number = message.number;
      merge(this.state, message.patch);
      this.tell.onState(this.state);
    } else if (message.type === "events") {
      this.tell.onEvents(message.events);
    }
  }
}

function socketUrl() {
  const url = new URL("ws", document.baseURI);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  return url.href;
}
