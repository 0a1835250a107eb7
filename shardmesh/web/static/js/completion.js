// One answer of the gateway, streamed: server-sent events as OpenAI sends them.

import { ApiError, request } from "./api.js";

/** The payloads of a stream of server-sent events, without the closing [DONE]. */
export async function* serverSent(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
        if (data === "[DONE]") return;
        if (data) yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repeat_penalty", "max_tokens", "seed"];

function bodyOf(conversation, messages) {
  const { settings } = conversation;
  const body = { model: conversation.model, stream: true, stream_options: { include_usage: true } };
  for (const name of NUMBERS) if (settings[name] !== null && settings[name] !== "") body[name] = Number(settings[name]);
  if (settings.mode === "text") {
    body.prompt = messages.map((message) => message.content).join("");
    return ["v1/completions", body];
  }
  body.messages = messages.map(({ role, content }) => ({ role, content }));
  if (settings.system.trim()) body.messages.unshift({ role: "system", content: settings.system });
  return ["v1/chat/completions", body];
}

/**
 * Streams an answer.  `onStart(id)` when its id is known, `onText(piece)` for each piece; gives
 * `{reason, usage, mesh}`, the last being what the gateway adds about nodes and times.  Throws an ApiError, also for an error in the middle of the stream.
 */
export async function complete(conversation, messages, { signal, onStart, onText }) {
  const [path, body] = bodyOf(conversation, messages);
  const answer = await request(path, { method: "POST", body, signal });
  const result = { reason: "", usage: null, mesh: null };
  let isStarted = false;
  for await (const chunk of serverSent(answer.body)) {
    if (chunk.error) throw new ApiError(500, chunk);
    if (!isStarted && chunk.id) {
      isStarted = true;
      onStart(chunk.id);
    }
    if (chunk.usage) result.usage = chunk.usage;
    if (chunk.shardmesh?.length) [result.mesh] = chunk.shardmesh;
    const [choice] = chunk.choices ?? [];
    const piece = choice?.delta?.content ?? choice?.text ?? "";
    if (piece) onText(piece);
    if (choice?.finish_reason) result.reason = choice.finish_reason;
  }
  return result;
}
