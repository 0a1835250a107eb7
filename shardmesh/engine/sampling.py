"""Sampling as far as it needs no llama.cpp: checked settings, and log-probabilities of a choice."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from shardmesh.engine.base import SampledToken, SamplingSettings
from shardmesh.errors import InputError
from shardmesh.wire.limits import (
    LOGIT_BIASES_MAX,
    SAMPLING_HISTORY_TOKENS_MAX,
    TOP_LOGPROBS_MAX,
)

SEED_MAX = 2**32 - 2
"""llama.cpp takes 2**32 - 1 to mean a seed of its own choice, which nobody could repeat."""

TOP_K_MAX = 2**31 - 1

_RANGES: tuple[tuple[str, float, float], ...] = (
    ("temperature", 0.0, 100.0),
    ("top_k", 0, TOP_K_MAX),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("typical_p", 0.0, 1.0),
    ("repeat_penalty", 0.01, 100.0),
    ("repeat_last_n", 0, SAMPLING_HISTORY_TOKENS_MAX),
    ("frequency_penalty", -100.0, 100.0),
    ("presence_penalty", -100.0, 100.0),
    ("seed", 0, SEED_MAX),
    ("n_top_logprobs", 0, TOP_LOGPROBS_MAX),
)


def check_sampling(settings: SamplingSettings, n_vocab: int) -> None:
    """Raises InputError (theirs) for a setting that llama.cpp's samplers could not take."""
    for name, low, high in _RANGES:
        value = getattr(settings, name)
        if not (math.isfinite(value) and low <= value <= high):
            raise InputError(f"{name} must be between {low} and {high}, not {value}")
    if len(settings.logit_bias) > LOGIT_BIASES_MAX:
        raise InputError(f"more than {LOGIT_BIASES_MAX} logit biases")
    for token, bias in settings.logit_bias:
        if not 0 <= token < n_vocab:
            raise InputError(f"a logit bias names token {token}; the vocabulary has {n_vocab}")
        if not math.isfinite(bias):  # -1e9 forbids a token as well, and can travel
            raise InputError("a logit bias must be a finite number")


def describe_choice(
    logits: npt.NDArray[np.float32], token: int, n_top_logprobs: int
) -> SampledToken:
    """The chosen token with natural log-probabilities of the untouched `logits` (n_vocab,)."""
    highest = logits.max()
    # Exponentials in f32, ten times faster over a large vocabulary; their sum in f64.
    normalizer = float(highest) + math.log(np.exp(logits - highest).sum(dtype=np.float64))
    n_top = min(n_top_logprobs, logits.size)
    best: list[int] = []
    if n_top:
        candidates = np.argpartition(-logits, n_top - 1)[:n_top]
        # Equal logits: the smaller token first, so that every replica reports the same order.
        best = candidates[np.lexsort((candidates, -logits[candidates]))].tolist()
    return SampledToken(
        token=token,
        logprob=float(logits[token]) - normalizer,
        top_logprobs=tuple((other, float(logits[other]) - normalizer) for other in best),
    )
