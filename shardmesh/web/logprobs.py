"""Log-probabilities of tokens in the two forms that OpenAI's answers have."""

from __future__ import annotations

from collections.abc import Sequence
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

    def add_prompt(
        self, text: str, tokens: Sequence[int], scores: Sequence[Sampled], tokenizer: Tokenizer
    ) -> None:
        """Notes a prompt before its answer; nothing comes before its first token, so that it has
        no log-probability."""
        pieces = [tokenizer.piece(token).decode("utf-8", "replace") for token in tokens]
        # Some tokenizers put a space before a text; some tokens have no text.
        offset = len(text) - sum(map(len, pieces))
        self._lists["tokens"].append(_shown(tokens[0], tokenizer))
        self._lists["token_logprobs"].append(None)
        self._lists["top_logprobs"].append(None)
        for score in scores:
            self._note(score, tokenizer)
        for piece in pieces:
            self._lists["text_offset"].append(max(0, offset))
            offset += len(piece)
        self._offset = len(text)

    def add(self, token: Sampled, tokenizer: Tokenizer) -> None:
        """Notes one more token."""
        self._note(token, tokenizer)
        self._lists["text_offset"].append(self._offset)
        self._offset += len(_shown(token.token, tokenizer))

    def _note(self, token: Sampled, tokenizer: Tokenizer) -> None:
        self._lists["tokens"].append(_shown(token.token, tokenizer))
        self._lists["token_logprobs"].append(token.logprob)
        best = token.top_logprobs[: self._n_top]
        self._lists["top_logprobs"].append(
            {_shown(other, tokenizer): logprob for other, logprob in best}
        )

    def take(self) -> dict[str, list[Any]]:
        """What was noted since the last time."""
        taken, self._lists = self._lists, _empty()
        return taken


def _shown(token: int, tokenizer: Tokenizer) -> str:
    return tokenizer.piece(token, show_special=True).decode("utf-8", "replace")


def _empty() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
