"""The vocabulary of a model through llama.cpp: text to tokens and back."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from llama_cpp import llama_cpp as api

from shardmesh.engine.llama_log import route_log
from shardmesh.errors import EngineError, InputError
from shardmesh.shards.gguf_check import read_gguf
from shardmesh.wire.limits import DECODED_TOKENS_MAX, PROMPT_BYTES_MAX, TOKEN_PIECE_BYTES_MAX

_NO_VOCABULARY = 0
"""LLAMA_VOCAB_TYPE_NONE"""

_PIECE_BYTES_USUAL = 64
_SPECIAL_TOKENS_AT_MOST = 16
"""Tokens that a tokenizer adds at both ends of a text, generously."""


class Tokenizer:
    """A loaded vocabulary; safe to use from several threads until it is closed."""

    def __init__(self, handle: Any) -> None:
        """`handle` is a llama.cpp model; use `open`."""
        self._handle = handle
        self._vocabulary = api.llama_model_get_vocab(handle)

    @classmethod
    def open(cls, path: Path) -> Tokenizer:
        """Loads the vocabulary of a GGUF file, without its weights if it has any.

        Raises GgufError (theirs) for a broken file, EngineError (ours) if llama.cpp refuses.
        """
        read_gguf(path)
        route_log()
        api.llama_backend_init()
        params = api.llama_model_default_params()
        params.vocab_only = True
        handle = api.llama_model_load_from_file(os.fsencode(path), params)
        if not handle:
            raise EngineError(
                f"llama.cpp could not load the vocabulary in {path.name}",
                code="MODEL_NOT_LOADED",
                next_step="run with -v to see its own words",
            )
        return cls(handle)

    def close(self) -> None:
        """Frees the vocabulary; harmless if done twice."""
        if self._handle is not None:
            api.llama_model_free(self._handle)
            self._handle = self._vocabulary = None

    def __enter__(self) -> Tokenizer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def handle(self) -> Any:
        """llama.cpp's own vocabulary, valid until this is closed."""
        return self._vocabulary

    @functools.cached_property
    def n_vocab(self) -> int:
        return int(api.llama_vocab_n_tokens(self._vocabulary))

    @functools.cached_property
    def has_text(self) -> bool:
        """False if the file has numbers of tokens only; `encode` and `decode` are refused then."""
        return int(api.llama_vocab_type(self._vocabulary)) != _NO_VOCABULARY

    @functools.cached_property
    def chat_template(self) -> str | None:
        """The model's Jinja template, a program of whoever made the file."""
        text = api.llama_model_chat_template(self._handle, None)
        return text.decode("utf-8", "replace") if text else None

    @functools.cached_property
    def bos(self) -> int | None:
        """The beginning-of-text token, if the model has one."""
        token = int(api.llama_vocab_bos(self._vocabulary))
        return token if token >= 0 else None

    @functools.cached_property
    def bos_text(self) -> str:
        """The beginning-of-text token as text; empty if the model has none."""
        return self._token_text(self.bos)

    @functools.cached_property
    def eos_text(self) -> str:
        token = int(api.llama_vocab_eos(self._vocabulary))
        return self._token_text(token if token >= 0 else None)

    @functools.cached_property
    def adds_bos(self) -> bool:
        """Whether `encode(add_special=True)` puts the beginning-of-text token first."""
        return bool(api.llama_vocab_get_add_bos(self._vocabulary))

    @functools.cached_property
    def control_texts(self) -> tuple[str, ...]:
        """The texts that `encode(parse_special=True)` takes for control tokens, longest first."""
        texts = (
            self._token_text(token)
            for token in range(self.n_vocab)
            if api.llama_vocab_is_control(self._vocabulary, token)
        )
        return tuple(sorted(filter(None, texts), key=len, reverse=True))

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """The tokens of `text`.

        `add_special` adds what the model wants at the ends; `parse_special` takes the texts of
        control tokens for these, which text of a stranger must not be able to do.  Raises
        InputError (theirs) for a text that is too long or no text.
        """
        self._require_text()
        data = _utf8(text)
        n_max = len(data) + _SPECIAL_TOKENS_AT_MOST
        for _ in range(2):
            tokens = (api.llama_token * n_max)()
            n = api.llama_tokenize(
                self._vocabulary, data, len(data), tokens, n_max, add_special, parse_special
            )
            if n >= 0:
                return tokens[:n]
            n_max = -n
        raise EngineError("llama.cpp could not tokenize the text")

    def decode(self, tokens: Sequence[int], *, show_special: bool = False) -> bytes:
        """The text of all tokens, UTF-8 that may be cut at both ends.

        Unlike joined pieces, it lacks the space that some models put before the first word.
        """
        self._check_tokens(tokens)
        array = (api.llama_token * len(tokens))(*tokens)

        def fill(buffer: Any, size: int) -> int:
            return int(
                api.llama_detokenize(
                    self._vocabulary, array, len(tokens), buffer, size, False, show_special
                )
            )

        size = _PIECE_BYTES_USUAL + 8 * len(tokens)
        return _grow_until_it_fits(fill, size, TOKEN_PIECE_BYTES_MAX * max(1, len(tokens)))

    def piece(self, token: int, *, show_special: bool = False) -> bytes:
        """The bytes of one token; empty for control tokens unless `show_special`."""
        self._check_tokens((token,))

        def fill(buffer: Any, size: int) -> int:
            return int(
                api.llama_token_to_piece(self._vocabulary, token, buffer, size, 0, show_special)
            )

        return _grow_until_it_fits(fill, _PIECE_BYTES_USUAL, TOKEN_PIECE_BYTES_MAX)

    def is_end(self, token: int) -> bool:
        """Whether the model ends its text (or its turn) with this token."""
        self._check_tokens((token,))
        return bool(api.llama_vocab_is_eog(self._vocabulary, token))

    def _token_text(self, token: int | None) -> str:
        if token is None:
            return ""
        return self.piece(token, show_special=True).decode("utf-8", "replace")

    def _require_text(self) -> None:
        if not self.has_text:
            raise InputError("the model has no tokenizer")

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        """llama.cpp ends the process for a token that does not exist."""
        self._require_text()
        if len(tokens) > DECODED_TOKENS_MAX:
            raise InputError(f"more than {DECODED_TOKENS_MAX} tokens at once")
        if tokens and not (min(tokens) >= 0 and max(tokens) < self.n_vocab):
            raise InputError(f"a token is not in the vocabulary of {self.n_vocab}")


def _utf8(text: str) -> bytes:
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            "the text holds half of a surrogate pair", next_step="write it as whole characters"
        ) from error
    if len(data) > PROMPT_BYTES_MAX:
        raise InputError(
            f"the text has {len(data)} bytes; {PROMPT_BYTES_MAX} are allowed",
            code="PROMPT_TOO_LONG",
        )
    return data


def _grow_until_it_fits(fill: Callable[[Any, int], int], size: int, size_max: int) -> bytes:
    """Calls a function of llama.cpp that returns minus the needed size if a buffer is too small."""
    for _ in range(2):
        buffer = ctypes.create_string_buffer(size)
        n = fill(buffer, size)
        if n >= 0:
            return buffer.raw[:n]
        if -n > size_max:
            break
        size = -n
    raise EngineError("llama.cpp gave a token of impossible length")
