// Conversations, kept in this browser and nowhere else.

const KEY = "shardmesh.conversations";
const CONVERSATIONS_MAX = 100;
const LETTERS_MAX = 4_000_000; // browsers give about five million

export const DEFAULTS = { system: "", mode: "chat", temperature: 0.7, top_p: 0.95, top_k: 40, min_p: 0.05, repeat_penalty: 1, max_tokens: 256, seed: null };

const newId = () => crypto.getRandomValues(new Uint32Array(2)).join("-");

export function newConversation(settings = {}) {
  return { id: newId(), title: "", changedAt: Date.now(), settings: { ...DEFAULTS, ...settings }, model: "", messages: [] };
}

/** What is kept, the last used first; what does not look like a conversation is left out. */
export function loadAll() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEY) ?? "[]");
    return kept
      .filter((c) => c && typeof c.id === "string" && Array.isArray(c.messages))
      .map((c) => ({ ...newConversation(), ...c, settings: { ...DEFAULTS, ...c.settings } }));
  } catch {
    return [];
  }
}

/** Keeps them; the oldest go first where there is no room. */
export function saveAll(conversations) {
  let kept = conversations.filter((c) => c.messages.length).sort((a, b) => b.changedAt - a.changedAt).slice(0, CONVERSATIONS_MAX);
  while (kept.length) {
    const data = JSON.stringify(kept);
    try {
      if (data.length <= LETTERS_MAX) {
        localStorage.setItem(KEY, data);
        return true;
      }
    } catch {
      // No room, or storage is forbidden: try with fewer.
    }
    kept = kept.slice(0, Math.floor(kept.length / 2));
  }
  try {
    localStorage.removeItem(KEY);
    return true;
  } catch {
    return false;
  }
}

/** A few words that name a conversation. */
export function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const first = conversation.messages.find((message) => message.role === "user")?.content.trim() ?? "";
  const line = first.split("\n")[0];
  return line.length > 60 ? `${line.slice(0, 57)}…` : line || "New conversation";
}
