"""How many sequences a shard may advance in one computation, found by trying when it is loaded.

Reading the weights once for several rows saves time, but llama.cpp picks its kernels by the number
of rows, and some sum in another order.  Which ones do depends on the type of the weights, the
instruction set and the device.  (Tried on AVX2: Q8_0 gives the same bits for any number of
sequences, Q4_K up to 3, F16 and F32 for one only.)  So rows
that mean nothing are computed together and one by one: the order of a sum depends on shapes alone,
and among thousands of random numbers a different order shows in some last bit.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from shardmesh.engine.base import Engine, MicroBatch, Output
from shardmesh.errors import EngineError

TRIAL_TIMEOUT_S = 2.0
"""For all trials but the first; what was not tried by then is not done.  A shard of 50 MB needs
0.3 s; a large one shall not be missing for long when it is started again."""

_NUMBERS_TRIED = (8, 4, 16, 2, 32, 3, 6, 12, 24)
"""What saves most comes first, for a large shard has no time for more."""

_N_TEXTS = 2  # sequences take turns at them, since each is also computed alone
_GAIN_MIN = 0.03  # less than that is noise

SURELY_FASTER = 4
"""So many rows have always been faster together: by 10 % with ggml's kernel for Q8_0 on an AVX-512
CPU, where two took 20 % longer than one by one, and by half with Shardmesh's."""

_SUMS_COMPARED = 8192  # rows times layers times width: fewer come out the same by chance, sometimes
_STEPS_MIN, _STEPS_MAX = 2, 32
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

    Takes TRIAL_TIMEOUT_S or one trial longer, and where a row takes longer than a tenth of that a
    dozen rows' time.  Leaves a freshly loaded engine empty and warm.
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
        self._n_rows = -(-_SUMS_COMPARED // sums_per_row)

    def run(self) -> tuple[int, ...]:
        ends_s = self._clock() + TRIAL_TIMEOUT_S
        self._advance(1, 1)  # the first computation of all warms up
        trials = [self._advance(1, self._n_steps(2), text) for text in range(_N_TEXTS)]
        alone = [digests for (digests,), _ in trials]
        row_s = {1: min(spent_s for _, spent_s in trials)}
        n_max = self._engine.info.n_parallel
        numbers = [number for number in _NUMBERS_TRIED if number <= n_max]
        for number in numbers:
            if number > n_max or (number != numbers[0] and self._clock() > ends_s):
                continue
            n_steps = self._n_steps(number)
            together, spent_s = self._advance(number, n_steps)
            if together == [alone[i % _N_TEXTS][:n_steps] for i in range(number)]:
                row_s[number] = spent_s
            else:
                n_max = number - 1  # more rows change bits as well
        return worth_joining({n: spent_s for n, spent_s in row_s.items() if n <= n_max})

    def _n_steps(self, n_sequences: int) -> int:
        wanted = -(-self._n_rows // n_sequences)
        return min(max(_STEPS_MIN, wanted), _STEPS_MAX, self._engine.info.n_ctx)

    def _advance(
        self, n_sequences: int, n_steps: int, first_text: int = 0
    ) -> tuple[list[list[bytes]], float]:
        """The digests of `n_steps` rows of each sequence, computed together; seconds for a row."""
        self._engine.join_sequences([n_sequences])
        sequences = range(n_sequences)
        texts = [(_SEED, (first_text + sequence) % _N_TEXTS) for sequence in sequences]
        generators = [np.random.default_rng(text) for text in texts]
        for sequence in sequences:
            self._engine.open_sequence(sequence)
        digests: list[list[bytes]] = [[] for _ in sequences]
        step_s = []
        for step in range(n_steps):
            rows = [self._random_row(generators[s], s, step) for s in sequences]
            since_s = self._clock()
            outputs = self._engine.compute(rows)
            step_s.append(self._clock() - since_s)
            for of_sequence, output in zip(digests, outputs, strict=True):
                of_sequence.append(_digest(output))
        return digests, min(step_s) / n_sequences

    def _random_row(
        self, generator: np.random.Generator, sequence: int, position: int
    ) -> MicroBatch:
        info = self._engine.info
        tokens = hidden = None
        if info.is_first:
            tokens = tuple(generator.integers(0, info.n_vocab, 1).tolist())
        else:
            hidden = generator.standard_normal((1, info.n_embd), dtype=np.float32)
        return MicroBatch(
            sequence=sequence,
            position=position,
            tokens=tokens,
            hidden=hidden,
            want_logits=info.is_last,
        )


def worth_joining(row_s: Mapping[int, float]) -> tuple[int, ...]:
    """The numbers, rising, whose rows take less time each than a single one.  Pure.

    From SURELY_FASTER on the times are not believed: they were measured while other nodes of the
    machine were starting too.
    """
    alone_s = row_s.get(1, 0.0)
    return tuple(
        number
        for number in sorted(row_s)
        if number >= SURELY_FASTER or row_s[number] < (1 - _GAIN_MIN) * alone_s
    )


def with_neighbours(sequences: Sequence[int], numbers_at_once: Sequence[int]) -> list[int]:
    """Indices of the first of some sequences and of neighbours that may go at once with it.  Pure.

    As many as one of `numbers_at_once` says.  A row of neighbours is cut into such parts from its
    beginning, so that the same go together the next time.
    """
    index_of = {sequence: index for index, sequence in enumerate(sequences)}
    first = start = end = sequences[0]
    while start - 1 in index_of:
        start -= 1
    while end + 1 in index_of:
        end += 1
    number = max((n for n in numbers_at_once if n <= end - start + 1), default=1)
    part = start + (first - start) // number * number
    part = min(part, end - number + 1)
    return [index_of[sequence] for sequence in range(part, part + number)]


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
