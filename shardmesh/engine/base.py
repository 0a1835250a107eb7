"""What the rest of Shardmesh knows of an engine: one shard, several sequences, micro-batches.

An engine is used from one thread only and never from the trio loop.  Three exist: the one on
llama.cpp (`engine.llama`), the deterministic fake (`engine.fake`), and whatever a test writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from shardmesh.engine.watchdog import Watchdog
from shardmesh.errors import ShardmeshError

Hidden = npt.NDArray[np.float32]
"""Hidden states, (n_tokens, n_embd)."""

Cells = npt.NDArray[np.uint8]
"""The KV of positions that follow on each other, (number of positions, `cell_bytes`)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How to run a shard on this machine; 0 or None means: choose from model and machine."""

    n_ctx: int = 0  # tokens of one sequence
    n_parallel: int = 4  # sequences at once
    n_threads: int = 0
    n_gpu_layers: int = 0
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    flash_attention: bool | None = None
    vocabulary_path: str = ""  # a GGUF file with the vocabulary, for grammars on the last stage
    own_kernels: bool = True  # where they can be used: see `engine.kernels`
    large_pages: bool = True  # where they can be had: see `engine.large_pages`


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How the last stage turns logits into a token; llama.cpp's names and defaults."""

    temperature: float = 0.8  # 0 is greedy
    top_k: int = 40  # 0 is off
    top_p: float = 0.95  # 1 is off
    min_p: float = 0.05  # 0 is off
    typical_p: float = 1.0  # 1 is off
    repeat_penalty: float = 1.0  # 1 is off
    repeat_last_n: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    n_top_logprobs: int = 0
    grammar: str = ""  # GBNF that the text must follow; needs the vocabulary on the last stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What a loaded shard is."""

    architecture: str
    is_first: bool  # takes token ids
    is_last: bool  # gives tokens
    n_layer: int
    n_layer_model: int  # of all stages together
    n_embd: int  # of all hidden states of a token, if it has several side by side
    n_vocab: int  # 0 on stages that have no vocabulary
    n_ctx: int  # of one sequence
    n_parallel: int
    n_batch_tokens_max: int  # rows of one call of compute
    fingerprint: str  # engine and version; equal fingerprints give equal bits
    numbers_at_once: tuple[int, ...] = ()  # of sequences whose single rows are computed together
    adapters: tuple[str, ...] = ()  # names of the LoRA adapters that a sequence may use
    cell_bytes: int = 0  # of one position's KV; 0: it cannot be copied to another machine


class MicroBatch(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens of one sequence in one hop; exactly one of `tokens` and `hidden` is given.

    `hidden` must be finite, which is looked at where it comes in (`wire.hidden_states`).  A Struct,
    as it is made for each token on its way, in a twentieth of the time.
    """

    sequence: int
    position: int  # of the first token
    tokens: tuple[int, ...] | None = None
    hidden: Hidden | None = None
    sample: bool = False  # the last stage samples after the last row
    want_logits: bool = False  # the last stage gives the logits of the last row
    want_embedding: bool = False  # the last stage gives what stands for the text of these rows
    scored: tuple[int, ...] = ()  # tokens behind the first rows; the last stage says how likely

    @property
    def n_tokens(self) -> int:
        if self.tokens is not None:
            return len(self.tokens)
        if self.hidden is not None:
            return int(self.hidden.shape[0])
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledToken:
    """A token that the last stage chose; natural logarithms, taken before any filter."""

    token: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one micro-batch.

    `hidden` (n_tokens, n_embd) on stages before the last; `sampled` and `logits` (n_vocab,) on
    the last, as far as they were asked for; so is `embedding` (n_embd_out,), pooled from the rows
    as the model says, or its last row.  `scores` are of the tokens that the micro-batch asks about.
    """

    hidden: Hidden | None = None
    sampled: SampledToken | None = None
    logits: npt.NDArray[np.float32] | None = None
    embedding: npt.NDArray[np.float32] | None = None
    scores: tuple[SampledToken, ...] = ()
    failure: ShardmeshError | None = None  # instead of all that


TellToken = Callable[[int], None]
"""Takes a token that was sampled just now; must not raise, or use the engine."""


class Engine(Protocol):
    """One loaded shard.  Not thread-safe.  All errors are EngineError (ours) unless said."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def watchdog(self) -> Watchdog:
        """Knows what the engine is busy with."""
        ...

    def open_sequence(
        self,
        sequence: int,
        sampling: SamplingSettings | None = None,
        history: Sequence[int] = (),
        adapter: str = "",
        n_keep: int = 0,
    ) -> None:
        """Empties sequence 0..n_parallel-1 and, on the last stage, prepares its sampler.

        `history` are the tokens before the first sampled one, for penalties; `adapter` is one of
        `info.adapters`, or empty.  The first `n_keep` positions of what the sequence holds stay.
        """
        ...

    def compute(
        self, batch: Sequence[MicroBatch], tell_token: TellToken | None = None
    ) -> list[Output]:
        """Computes the micro-batches, one output each, in order; some at once (`engine.at_once`).

        What a micro-batch gives does not depend on the others or on other sequences, to the bit.
        `tell_token` may be called with what is sampled behind a single one, before it is known how
        likely that was.

        Positions must follow on what each sequence holds.  Raises InputError (theirs) for wrong
        shapes, positions or token ids, before anything is computed; EngineError when llama.cpp
        fails, after which the sequences concerned must be trimmed or closed.  So must a sequence
        for which nothing could be sampled: its output has the `failure`, and that of a single
        micro-batch is raised.
        """
        ...

    def n_held(self, sequence: int) -> int:
        """Tokens that the sequence holds: the position that must come next.

        May be asked from another thread, for a figure that is about right.
        """
        ...

    def trim_sequence(self, sequence: int, n_keep: int) -> None:
        """Removes all positions >= n_keep from the sequence."""
        ...

    def close_sequence(self, sequence: int, n_keep: int = 0) -> None:
        """Frees the sequence and its sampler; harmless if it is not open.

        The first `n_keep` positions stay, for `open_sequence` and `copy_sequence`.
        """
        ...

    def copy_sequence(self, source: int, target: int) -> None:
        """Has `target`, closed, hold what `source` holds, open or closed, to the bit."""
        ...

    def read_cells(self, sequence: int, start: int, end: int) -> Cells:
        """What the sequence holds at the positions [start, end), which it must have."""
        ...

    def write_cells(self, sequence: int, cells: Cells) -> None:
        """Has `sequence`, closed, hold these positions from 0 on, to the bit.

        They come from an engine with the same shard and fingerprint, and are not looked at.  Raises
        InputError (theirs) for another shape than (1 to n_ctx, `cell_bytes`).
        """
        ...

    def close(self) -> None:
        """Frees the model and all that belongs to it."""
        ...
