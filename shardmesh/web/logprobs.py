"""Log-probabilities of tokens in the two forms that OpenAI's answers have."""

from __future__ import annotations

from typing import Any

from shardmesh.engine.tokenizer import Tokenizer
from shardmesh.wire.messages import Sampled


def chat_entry(token: Sampled, n_top: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """One token of `choices[].logprobs.content` of a chat."""
    best = token.top_logprobs[:n_top]
    return {
        **_described(token.token, token.logprob, tokenizer),
        "top_logprobs": [_described(other, logprob, tokenizer) for other, logprob in best],
    }


def _described(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    data = tokenizer.piece(token, show_special=True)
    return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}


class CompletionLogprobs:
    """The four parallel lists of a completion's `logprobs`; `offset` counts characters."""

    def __init__(self, n_top: int, offset: int = 0) -> None:
        self._n_top = n_top
        self._offset = offset
        self._lists = _empty()

    def add(self, token: Sampled, tokenizer: Tokenizer) -> None:
        """Notes one more token."""
        text = tokenizer.piece(token.token, show_special=True).decode("utf-8", "replace")
        self._lists["tokens"].append(text)
        self._lists["token_logprobs"].append(token.logprob)
        self._lists["top_logprobs"].append(
            {
                tokenizer.piece(other, show_special=True).decode("utf-8", "replace"): logprob
                for other, logprob in token.top_logprobs[: self._n_top]
            }
        )
        self._lists["text_offset"].append(self._offset)
        self._offset += len(text)

    def take(self) -> dict[str, list[Any]]:
        """What was noted since the last time."""
        taken, self._lists = self._lists, _empty()
        return taken


def _empty() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
