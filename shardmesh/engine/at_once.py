"""How many sequences a shard may advance in one computation, found by trying when it is loaded.

Reading the weights once for several rows saves time, but llama.cpp picks its kernels by the number
of rows, and some sum in another order.  Which ones do depends on the type of the weights, the
instruction set and the device.  (Tried on AVX2: Q8_0 gives the same bits for any number of
sequences, Q4_K up to 3, F16 and F32 for one only; but Q8_0 gains nothing before 5 rows.)  So rows
that mean nothing are computed together and one by one: the order of a sum depends on shapes alone,
and among thousands of random numbers a different order shows in some last bit.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from shardmesh.engine.base import Engine, MicroBatch, Output
from shardmesh.errors import EngineError

TRIAL_TIMEOUT_S = 2.0
"""For all trials; what was not tried by then is not done.  A shard of 50 MB needs 0.3 s; a
large one shall not be missing for long when it is started again."""

_NUMBERS_TRIED = (2, 3, 4, 6, 8, 12, 16, 24, 32)
_PREFIX_ROWS = 1  # so that attention has something to look at
_SUMS_COMPARED = 8192  # rows times layers times width: fewer come out the same by chance, sometimes
_ROWS_COMPARED_MIN, _ROWS_COMPARED_MAX = 4, 64
_STEPS_MIN = 2
_SEED = 2024


class JoiningEngine(Engine, Protocol):
    """An engine that can be told how much to compute at once."""

    def join_sequences(self, numbers: Sequence[int]) -> None:
        """From now on, single rows of as many sequences as are given here are one computation."""
        ...


def find_numbers_at_once(
    engine: JoiningEngine, clock: Callable[[], float] = time.monotonic
) -> tuple[int, ...]:
    """The numbers of sequences that change no bit and save time, rising; the engine is set to them.

    Takes TRIAL_TIMEOUT_S or one trial longer, and leaves a freshly loaded engine empty and warm.
    """
    trial = _Trial(engine, clock)
    found: tuple[int, ...] = ()
    try:
        found = trial.run()
    except EngineError:
        pass  # random hidden states can be too much for a model; then each row goes by itself
    finally:
        for sequence in range(engine.info.n_parallel):
            engine.close_sequence(sequence)
        engine.join_sequences(found)
    return found


class _Trial:
    def __init__(self, engine: JoiningEngine, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock
        sums_per_row = engine.info.n_layer * engine.info.n_embd
        n_rows = max(_ROWS_COMPARED_MIN, _SUMS_COMPARED // sums_per_row)
        self._n_rows = min(n_rows, _ROWS_COMPARED_MAX, engine.info.n_ctx - _PREFIX_ROWS)

    def run(self) -> tuple[int, ...]:
        ends_s = self._clock() + TRIAL_TIMEOUT_S
        self._advance(range(1), 1)  # the first computation of all warms up
        found: list[int] = []
        alone: list[list[bytes]] = []  # of each sequence, the digests of its rows
        best_s = float("inf")
        for number in _NUMBERS_TRIED:
            if number > self._engine.info.n_parallel or self._clock() > ends_s:
                break
            while len(alone) < number:
                sequence = len(alone)
                (digests,), row_s = self._advance(
                    range(sequence, sequence + 1), self._n_steps(max(2, sequence + 1))
                )
                alone.append(digests)
                best_s = min(best_s, row_s)
            n_steps = self._n_steps(number)
            together, row_s = self._advance(range(number), n_steps)
            if together != [digests[:n_steps] for digests in alone]:
                break
            if row_s < best_s:
                best_s = row_s
                found.append(number)
        return tuple(found)

    def _n_steps(self, n_sequences: int) -> int:
        return max(_STEPS_MIN, -(-self._n_rows // n_sequences))

    def _advance(self, sequences: range, n_steps: int) -> tuple[list[list[bytes]], float]:
        """The digests of `n_steps` rows of each sequence, computed together; seconds for a row."""
        self._engine.join_sequences([len(sequences)])
        generators = [np.random.default_rng((_SEED, sequence)) for sequence in sequences]
        for sequence, generator in zip(sequences, generators, strict=True):
            self._engine.open_sequence(sequence)
            self._engine.compute([self._random_rows(generator, sequence, 0, _PREFIX_ROWS)])
        digests: list[list[bytes]] = [[] for _ in sequences]
        step_s = []
        for step in range(n_steps):
            rows = [
                self._random_rows(generator, sequence, _PREFIX_ROWS + step, 1)
                for sequence, generator in zip(sequences, generators, strict=True)
            ]
            since_s = self._clock()
            outputs = self._engine.compute(rows)
            step_s.append(self._clock() - since_s)
            for of_sequence, output in zip(digests, outputs, strict=True):
                of_sequence.append(_digest(output))
        return digests, min(step_s) / len(sequences)

    def _random_rows(
        self, generator: np.random.Generator, sequence: int, position: int, n_rows: int
    ) -> MicroBatch:
        info = self._engine.info
        tokens = hidden = None
        if info.is_first:
            tokens = tuple(generator.integers(0, info.n_vocab, n_rows).tolist())
        else:
            hidden = generator.standard_normal((n_rows, info.n_embd), dtype=np.float32)
        return MicroBatch(
            sequence=sequence,
            position=position,
            tokens=tokens,
            hidden=hidden,
            want_logits=info.is_last,
        )


def computations(
    batch: Sequence[MicroBatch], numbers_at_once: Sequence[int]
) -> Iterator[Sequence[MicroBatch]]:
    """Cuts a batch into what is computed at once, in order.

    Single rows of neighbouring sequences go together, as many as one of the rising
    `numbers_at_once` says.  llama.cpp would cut sequences that are no neighbours apart by itself,
    and the rows of the parts could not be told apart.
    """
    start = 0
    while start < len(batch):
        end = start + 1
        while end < len(batch) and _follows(batch[end - 1], batch[end]):
            end += 1
        n_together = max((n for n in numbers_at_once if n <= end - start), default=1)
        yield batch[start : start + n_together]
        start += n_together


def _follows(micro: MicroBatch, following: MicroBatch) -> bool:
    single = micro.n_tokens == following.n_tokens == 1
    alone = micro.want_embedding or following.want_embedding
    return single and not alone and following.sequence == micro.sequence + 1


def _digest(output: Output) -> bytes:
    """Of what came out; raises the failure if nothing did."""
    if output.failure is not None:
        raise output.failure
    rows = output.hidden if output.hidden is not None else output.logits
    return hashlib.sha256(b"" if rows is None else rows.tobytes()).digest()
