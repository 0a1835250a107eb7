"""The vocabulary beside a shard: the last stage has none of its own, and a grammar needs one."""

from __future__ import annotations

from pathlib import Path

from shardmesh.engine.tokenizer import Tokenizer
from shardmesh.errors import GgufError, InputError


class SideVocabulary:
    """Loaded when it is first needed, which is seldom; freed by `close`."""

    def __init__(self, path: str, n_vocab: int) -> None:
        """`path` of a GGUF file with the vocabulary; empty if there is none."""
        self._path = path
        self._n_vocab = n_vocab
        self._tokenizer: Tokenizer | None = None

    def open(self) -> Tokenizer:
        """Raises InputError (theirs) if there is none, or one of another model."""
        if self._tokenizer is None:
            self._tokenizer = self._load()
        return self._tokenizer

    def close(self) -> None:
        if self._tokenizer is not None:
            self._tokenizer.close()
            self._tokenizer = None

    def _load(self) -> Tokenizer:
        if not self._path or not Path(self._path).exists():
            raise _missing("the last stage has no vocabulary, which a grammar needs")
        try:
            tokenizer = Tokenizer.open(Path(self._path))
        except GgufError as error:
            raise _missing(f"the vocabulary of the last stage cannot be read: {error}") from error
        if not tokenizer.has_text or tokenizer.n_vocab != self._n_vocab:
            tokenizer.close()
            raise _missing("the vocabulary of the last stage is of another model")
        return tokenizer


def _missing(sentence: str) -> InputError:
    return InputError(
        sentence,
        code="NO_VOCABULARY",
        next_step="copy tokenizer.gguf of the split into the last stage's --shards-dir",
    )
