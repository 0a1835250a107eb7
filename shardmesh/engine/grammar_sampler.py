"""Sampling that follows a grammar: llama.cpp's own, with the checks that keep it from aborting."""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as api

from shardmesh.engine.grammar import BAD_GRAMMAR, check_grammar
from shardmesh.engine.tokenizer import Tokenizer
from shardmesh.engine.watchdog import Watchdog
from shardmesh.errors import InputError
from shardmesh.wire.limits import GRAMMAR_STEP_TIMEOUT_S

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""llama_token_data"""


class GrammarSampler:
    """What one sequence may go on with; refuses instead of taking a token that does not fit.

    llama.cpp ends the process when a grammar is given such a token.
    """

    def __init__(
        self, grammar: str, vocabulary: Tokenizer, watchdog: Watchdog | None = None
    ) -> None:
        """`vocabulary` must stay open.  Raises InputError (theirs) for a grammar that is none.

        llama.cpp may take for ever, here and in `sample`; `watchdog` is told when that is too long.
        """
        check_grammar(grammar)
        self._grammar = grammar
        self._vocabulary = vocabulary
        self._watchdog = watchdog or Watchdog()
        with self._bounded():
            self._sampler: Any = api.llama_sampler_init_grammar(
                vocabulary.handle, grammar.encode(), b"root"
            )
        if not self._sampler:
            raise InputError(
                "the grammar is not valid GBNF",
                code=BAD_GRAMMAR,
                next_step="the log of the last stage has llama.cpp's own words",
            )

    def sample(self, chain: Any, logits: npt.NDArray[np.float32]) -> int:
        """Chooses with the samplers of `chain` from what the grammar allows, and remembers it.

        First without the grammar: it looks at every candidate's text, and mostly the choice fits.
        `logits` (n_vocab,).  Raises InputError (theirs) if the grammar leaves nothing.
        """
        with self._bounded():
            return self._sample(chain, logits)

    def _sample(self, chain: Any, logits: npt.NDArray[np.float32]) -> int:
        token = _choose(chain, _candidates(logits))
        if not self._allows(token):
            candidates = _candidates(logits)
            self._apply(candidates)
            if not np.isfinite(candidates["logit"].max()):
                raise InputError("the grammar leaves no token to go on with", code=BAD_GRAMMAR)
            token = _choose(chain, candidates)
        api.llama_sampler_accept(chain, token)
        api.llama_sampler_accept(self._sampler, token)
        return token

    def allowed(self) -> npt.NDArray[np.int32]:
        """The tokens that the text may go on with, in order."""
        candidates = _candidates(np.zeros(self._vocabulary.n_vocab, dtype=np.float32))
        self._apply(candidates)
        allowed: npt.NDArray[np.int32] = candidates["id"][np.isfinite(candidates["logit"])]
        return allowed

    def accept(self, token: int) -> None:
        """Goes on behind a token, which must be one of those that are `allowed`."""
        api.llama_sampler_accept(self._sampler, token)

    def _bounded(self) -> AbstractContextManager[None]:
        return self._watchdog.within(GRAMMAR_STEP_TIMEOUT_S, grammar=self._grammar)

    def close(self) -> None:
        if self._sampler is not None:
            api.llama_sampler_free(self._sampler)
            self._sampler = None

    def _allows(self, token: int) -> bool:
        candidate = np.array([(token, 0.0, 0.0)], dtype=_CANDIDATE)
        self._apply(candidate)
        return bool(np.isfinite(candidate["logit"][0]))

    def _apply(self, candidates: npt.NDArray[np.void]) -> None:
        api.llama_sampler_apply(self._sampler, ctypes.byref(_as_array(candidates)))


def _candidates(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.void]:
    candidates = np.zeros(logits.size, dtype=_CANDIDATE)
    candidates["id"] = np.arange(logits.size)
    candidates["logit"] = logits
    return candidates


def _choose(chain: Any, candidates: npt.NDArray[np.void]) -> int:
    array = _as_array(candidates)
    api.llama_sampler_apply(chain, ctypes.byref(array))
    if not 0 <= array.selected < array.size:
        return -1
    return int(array.data[array.selected].id)


def _as_array(candidates: npt.NDArray[np.void]) -> Any:
    """A llama_token_data_array over the candidates, which must live as long."""
    pointer = ctypes.cast(candidates.ctypes.data, api.llama_token_data_p)
    return api.llama_token_data_array(pointer, candidates.size, -1, False)
