"""llama.cpp's own samplers as one chain per sequence, in the order of llama.cpp's tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as api

from shardmesh.engine.base import SamplingSettings
from shardmesh.engine.grammar_sampler import GrammarSampler
from shardmesh.engine.sampling import check_sampling
from shardmesh.engine.vocabulary import SideVocabulary
from shardmesh.engine.watchdog import Watchdog
from shardmesh.errors import EngineError, InputError

_MIN_KEEP = 1
"""Tokens that a filter leaves at least."""


class SamplerChain:
    """The sampler of one sequence; it remembers its tokens and the state of its random numbers."""

    def __init__(
        self,
        settings: SamplingSettings,
        n_vocab: int,
        history: Sequence[int],
        vocabulary: SideVocabulary | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        """Raises InputError (theirs) for settings or a history that cannot be used.

        `vocabulary` is needed for a grammar only; `watchdog` is told how long that may take.
        """
        check_sampling(settings, n_vocab)
        if history and not (min(history) >= 0 and max(history) < n_vocab):
            raise InputError(f"the history has a token outside the vocabulary of {n_vocab}")
        self.settings = settings
        self._n_vocab = n_vocab
        self._grammar: GrammarSampler | None = None
        if settings.grammar:
            if vocabulary is None:
                raise InputError("this engine knows no vocabulary, which a grammar needs")
            self._grammar = GrammarSampler(settings.grammar, vocabulary.open(), watchdog)
        self._is_highest = takes_highest(settings)
        self._chain: Any = _build_chain(settings, n_vocab)
        if settings.repeat_last_n:
            for token in history[-settings.repeat_last_n :]:
                api.llama_sampler_accept(self._chain, token)

    def sample(self, context: Any, row: int, logits: npt.NDArray[np.float32]) -> int:
        """Chooses from the `logits` of `row` of the last computation and remembers the choice."""
        if self._is_highest:
            return int(logits.argmax())  # of equals the first, as llama.cpp does; 3 us, not 60
        if self._grammar is not None:
            token = self._grammar.sample(self._chain, logits)
        else:
            token = int(api.llama_sampler_sample(self._chain, context, row))
        if not 0 <= token < self._n_vocab:
            raise EngineError("no token was left to choose from")
        return token

    def close(self) -> None:
        if self._chain is not None:
            api.llama_sampler_free(self._chain)
            self._chain = None
        if self._grammar is not None:
            self._grammar.close()


def takes_highest(settings: SamplingSettings) -> bool:
    """Whether the choice is the highest of the untouched logits, whatever came before.  Pure."""
    penalties = settings.repeat_penalty, settings.frequency_penalty, settings.presence_penalty
    is_changed = bool(settings.logit_bias or settings.grammar)
    return settings.temperature == 0 and penalties == (1.0, 0.0, 0.0) and not is_changed


def _build_chain(settings: SamplingSettings, n_vocab: int) -> Any:
    params = api.llama_sampler_chain_default_params()
    params.no_perf = True
    chain = api.llama_sampler_chain_init(params)
    for sampler in _samplers(settings, n_vocab):
        api.llama_sampler_chain_add(chain, sampler)  # the chain frees it
    return chain


def _samplers(settings: SamplingSettings, n_vocab: int) -> list[Any]:
    """Logit bias, penalties, top-k, typical, top-p, min-p, temperature, choice."""
    samplers = []
    if settings.logit_bias:
        entries = [api.llama_logit_bias(token, bias) for token, bias in settings.logit_bias]
        biases = (api.llama_logit_bias * len(entries))(*entries)
        samplers.append(api.llama_sampler_init_logit_bias(n_vocab, len(biases), biases))
    samplers.append(
        api.llama_sampler_init_penalties(
            n_vocab,
            settings.repeat_last_n,
            settings.repeat_penalty,
            settings.frequency_penalty,
            settings.presence_penalty,
        )
    )
    if settings.temperature == 0:
        return [*samplers, api.llama_sampler_init_greedy()]
    return [
        *samplers,
        api.llama_sampler_init_top_k(settings.top_k),
        api.llama_sampler_init_typical(settings.typical_p, _MIN_KEEP),
        api.llama_sampler_init_top_p(settings.top_p, _MIN_KEEP),
        api.llama_sampler_init_min_p(settings.min_p, _MIN_KEEP),
        api.llama_sampler_init_temp(settings.temperature),
        api.llama_sampler_init_dist(settings.seed),
    ]
