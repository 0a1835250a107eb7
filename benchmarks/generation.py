"""What both sides of a comparison are asked, and what they answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Final

from shardmesh.engine.base import SamplingSettings
from shardmesh.engine.tokenizer import Tokenizer

GREEDY: Final = SamplingSettings(temperature=0.0)
"""The same tokens on both sides, which is checked."""

N_THREADS: Final = 1
"""Of each process: the baseline's, and each stage's."""

LONG_TEXT: Final = "The old king went into the deep forest, and the wind was very cold there. "
DECODE_PROMPT: Final = "Once upon a time there was a king who"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """One finished generation and its clock."""

    n_prompt_tokens: int
    tokens: tuple[int, ...]
    total_s: float  # from the request to the last token
    decode_tokens_per_s: float | None  # (n - 1) / (last - first); None for fewer than two tokens
    first_token_s: float = 0.0  # as who asked saw it; 0: not measured
    text_s: tuple[float, ...] = ()  # when pieces of text came, since the request

    @classmethod
    def of(cls, values: dict[str, Any]) -> Generation:
        """Out of the JSON of `dataclasses.asdict`."""
        tuples = {name: tuple(values[name]) for name in ("tokens", "text_s")}
        return cls(**{**values, **tuples})

    @property
    def pieces_per_s(self) -> float:
        """Of the text: a token without text of its own, as half a character is, does not show."""
        return (len(self.text_s) - 1) / (self.text_s[-1] - self.text_s[0])

    @property
    def prefill_tokens_per_s(self) -> float:
        """Of a generation of one token: the prompt's tokens by the time to it."""
        return self.n_prompt_tokens / self.total_s


def long_prompt(tokenizer_path: Path, n_tokens: int, beginning: str = "") -> str:
    """A text of at most so many tokens, and nearly as many."""
    with Tokenizer.open(tokenizer_path) as tokenizer:
        words = (beginning + LONG_TEXT * n_tokens).split()
        n_words = n_tokens
        while len(tokenizer.encode(" ".join(words[:n_words]))) > n_tokens:
            n_words -= 1
        return " ".join(words[:n_words])
