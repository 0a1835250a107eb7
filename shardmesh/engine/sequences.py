"""What every engine checks before it computes: shapes, tokens, and positions without a gap."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from shardmesh.engine.base import EngineInfo, Hidden, MicroBatch
from shardmesh.errors import EngineError, InputError

CONTEXT_FULL = "CONTEXT_FULL"
"""Code of the InputError for a micro-batch that would pass the end of the context."""


@dataclasses.dataclass
class _Held:
    can_sample: bool
    n_held: int = 0
    is_damaged: bool = False  # a computation failed: what the engine holds is not known


class SequenceTable:
    """The open sequences of one engine and how many tokens each holds."""

    def __init__(self, info: EngineInfo) -> None:
        self._info = info
        self._open: dict[int, _Held] = {}
        self._n_kept: dict[int, int] = {}  # tokens of sequences that are closed and not empty

    def open(self, sequence: int, *, can_sample: bool, n_keep: int = 0) -> None:
        """Starts `sequence` anew with its first `n_keep` tokens; raises as `check_keep`."""
        self.check_keep(sequence, n_keep)
        self._n_kept.pop(sequence, None)
        self._open[sequence] = _Held(can_sample, n_keep)

    def check_number(self, sequence: int) -> None:
        """Raises InputError (theirs) if there is no such sequence."""
        if not 0 <= sequence < self._info.n_parallel:
            raise InputError(
                f"sequence {sequence} does not exist: this stage has {self._info.n_parallel}"
            )

    def check_keep(self, sequence: int, n_keep: int) -> None:
        """Raises InputError (theirs) if there is no such sequence, EngineError if it holds less."""
        self.check_number(sequence)
        if n_keep > self.n_held(sequence):
            raise EngineError(f"sequence {sequence} does not hold {n_keep} tokens")

    def close(self, sequence: int, n_keep: int = 0) -> None:
        """Closes it if it is open; its first `n_keep` tokens stay."""
        n_kept = min(n_keep, self.n_held(sequence))
        self._open.pop(sequence, None)
        self._n_kept.pop(sequence, None)
        if n_kept > 0:
            self._n_kept[sequence] = n_kept

    def copy(self, source: int, target: int) -> None:
        """Notes that `target`, closed, holds what `source` does; raises InputError (theirs)."""
        self.check_number(source)
        self.check_number(target)
        if source == target or target in self._open:
            raise InputError(f"sequence {source} cannot be copied to sequence {target}")
        self._n_kept[target] = self.n_held(source)

    def check_cells(self, sequence: int, shape: tuple[int, ...], cell_bytes: int) -> None:
        """Raises InputError (theirs) unless a closed sequence can be given KV of this shape."""
        self.check_number(sequence)
        fits = len(shape) == 2 and 1 <= shape[0] <= self._info.n_ctx and shape[1] == cell_bytes
        if sequence in self._open or not fits:
            raise InputError(f"KV of shape {shape} cannot be given to sequence {sequence}")

    def write(self, sequence: int, n_held: int) -> None:
        """Notes that a closed sequence was given the KV of so many positions."""
        self._n_kept[sequence] = n_held

    def check_read(self, sequence: int, start: int, end: int) -> None:
        """Raises InputError (theirs) unless the sequence holds the positions [start, end)."""
        self.check_number(sequence)
        held = self._open.get(sequence)
        if not 0 <= start < end <= self.n_held(sequence) or (held and held.is_damaged):
            raise InputError(f"sequence {sequence} does not hold the positions [{start}, {end})")

    def n_held(self, sequence: int) -> int:
        """Tokens that the sequence holds; 0 for one that is closed and was not to keep any."""
        held = self._open.get(sequence)
        return held.n_held if held else self._n_kept.get(sequence, 0)

    def check_trim(self, sequence: int, n_keep: int) -> None:
        """Raises InputError (theirs) unless the sequence is open and the number makes sense."""
        self._opened(sequence)
        if n_keep < 0:
            raise InputError(f"a sequence cannot keep {n_keep} tokens")

    def trim(self, sequence: int, n_keep: int) -> None:
        """Forgets the positions from `n_keep` on; a damaged sequence is whole again after it."""
        self.check_trim(sequence, n_keep)
        held = self._opened(sequence)
        held.n_held = min(held.n_held, n_keep)
        held.is_damaged = False

    def check(self, batch: Sequence[MicroBatch]) -> None:
        """Raises InputError (theirs) unless the whole batch can be computed as it stands."""
        n_new: dict[int, int] = {}
        for micro in batch:
            self._check_rows(micro)
            n_before = n_new.get(micro.sequence, 0)
            self._check_sequence(micro, n_before)
            n_new[micro.sequence] = n_before + micro.n_tokens
        n_rows, n_rows_max = sum(n_new.values()), self._info.n_batch_tokens_max
        if n_rows > n_rows_max:
            raise InputError(f"{n_rows} rows in one batch; {n_rows_max} are allowed")

    def advance(self, batch: Sequence[MicroBatch]) -> None:
        """Notes that a checked batch has been computed."""
        for micro in batch:
            self._open[micro.sequence].n_held += micro.n_tokens

    def damage(self, batch: Sequence[MicroBatch]) -> None:
        """Notes that a batch failed: its sequences take nothing before a trim or a new start."""
        for micro in batch:
            self._open[micro.sequence].is_damaged = True

    def _opened(self, sequence: int) -> _Held:
        held = self._open.get(sequence)
        if held is None:
            raise InputError(f"sequence {sequence} is not open")
        return held

    def _check_rows(self, micro: MicroBatch) -> None:
        if (micro.tokens is None) == (micro.hidden is None):
            raise InputError("a micro-batch has either tokens or hidden states")
        if micro.tokens is not None:
            _check_tokens(micro.tokens, self._info)
        elif micro.hidden is not None:
            _check_hidden(micro.hidden, self._info)
        if micro.n_tokens == 0:
            raise InputError("a micro-batch has at least one token")
        _check_scored(micro, self._info)

    def _check_sequence(self, micro: MicroBatch, n_before: int) -> None:
        """`n_before`: rows of the same sequence earlier in this batch."""
        held = self._opened(micro.sequence)
        is_sampled = micro.sample or bool(micro.scored)
        if is_sampled and self._info.is_last and not held.can_sample:
            raise InputError(f"sequence {micro.sequence} was opened without sampling settings")
        if held.is_damaged:
            raise InputError(
                f"sequence {micro.sequence} failed before", next_step="trim it or close it"
            )
        expected = held.n_held + n_before
        if micro.position != expected:
            raise InputError(
                f"position {micro.position} does not follow: "
                f"sequence {micro.sequence} goes on at {expected}"
            )
        if expected + micro.n_tokens > self._info.n_ctx:
            raise InputError(
                f"the context of {self._info.n_ctx} tokens is full",
                code=CONTEXT_FULL,
                next_step="shorten the prompt, or start the stages with a larger --ctx-size",
            )


def _check_tokens(tokens: tuple[int, ...], info: EngineInfo) -> None:
    if not info.is_first:
        raise InputError("a stage after the first takes hidden states, not tokens")
    if tokens and not (min(tokens) >= 0 and max(tokens) < info.n_vocab):
        raise InputError(f"a token is not in the vocabulary of {info.n_vocab}")


def _check_scored(micro: MicroBatch, info: EngineInfo) -> None:
    if len(micro.scored) > micro.n_tokens:
        raise InputError(f"{len(micro.scored)} tokens cannot follow {micro.n_tokens} rows")
    if micro.scored and micro.want_embedding:
        raise InputError("a micro-batch gives either an embedding or log-probabilities")
    if info.is_last and micro.scored and max(micro.scored) >= info.n_vocab:
        raise InputError(f"a token is not in the vocabulary of {info.n_vocab}")


def _check_hidden(hidden: Hidden, info: EngineInfo) -> None:
    if info.is_first:
        raise InputError("the first stage takes tokens, not hidden states")
    if hidden.dtype != np.float32 or hidden.ndim != 2 or hidden.shape[1] != info.n_embd:
        raise InputError(
            f"hidden states must be float32 of shape (n_tokens, {info.n_embd}), "
            f"not {hidden.dtype} of {hidden.shape}"
        )
