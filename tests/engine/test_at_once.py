"""Rows of several sequences are computed together only where that changes no bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support.models import write_model

from shardmesh.engine.at_once import (
    TRIAL_TIMEOUT_S,
    computations,
    find_numbers_at_once,
    with_neighbours,
    worth_joining,
)
from shardmesh.engine.base import EngineOptions, MicroBatch, Output, SamplingSettings
from shardmesh.engine.fake import FakeEngine, fake_info
from shardmesh.engine.llama import load_engine
from shardmesh.errors import EngineError


class JoiningFake(FakeEngine):
    """Gives other bits when more than `n_exact` sequences are computed at once."""

    def __init__(
        self, n_exact: int, clock: Clock, *, n_parallel: int = 16, n_embd: int = 8
    ) -> None:
        super().__init__(fake_info(0, 2, 4, n_parallel=n_parallel, n_embd=n_embd))
        self.numbers: tuple[int, ...] = ()
        self._n_exact = n_exact
        self._clock = clock

    def join_sequences(self, numbers: Sequence[int]) -> None:
        self.numbers = tuple(numbers)

    def compute(self, batch: Sequence[MicroBatch]) -> list[Output]:
        outputs: list[Output] = []
        for part in computations(batch, self.numbers):
            self._clock.now_s += 1e-3 + 1e-4 * len(part)
            given = super().compute(part)
            if len(part) > self._n_exact:
                hidden = given[0].hidden
                assert hidden is not None
                given[0] = Output(hidden=np.nextafter(hidden, np.float32(0)))
            outputs += given
        return outputs


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize(
    ("n_exact", "found"), [(1, ()), (3, (2, 3)), (7, (2, 3, 4, 6)), (99, (2, 3, 4, 6, 8, 12, 16))]
)
def test_finds_the_numbers_that_change_nothing(n_exact: int, found: tuple[int, ...]) -> None:
    clock = Clock()
    engine = JoiningFake(n_exact, clock)
    assert find_numbers_at_once(engine, clock) == found == engine.numbers
    assert all(engine.n_held(sequence) == 0 for sequence in range(16))


def test_few_that_save_no_time_are_left_out() -> None:
    class Slow(JoiningFake):
        def compute(self, batch: Sequence[MicroBatch]) -> list[Output]:
            outputs = super().compute(batch)
            if self.numbers and self.numbers[0] > 1:
                self._clock.now_s += 0.1
            return outputs

    clock = Clock()
    assert find_numbers_at_once(Slow(99, clock, n_parallel=8, n_embd=2048), clock) == (4, 6, 8)


@pytest.mark.parametrize(
    ("row_s", "found", "takes_s"),
    [
        (0.06, (2, 3, 4, 6, 8, 12, 16), TRIAL_TIMEOUT_S),  # a quarter of a model of 8 B
        (0.15, (2, 3, 4, 8, 16), TRIAL_TIMEOUT_S),
        (0.6, (8,), 8 * 0.6),  # a quarter of one of 70 B
    ],
)
def test_what_saves_most_is_tried_in_any_case_and_the_rest_in_time(
    row_s: float, found: tuple[int, ...], takes_s: float
) -> None:
    clock = Clock()

    class Heavy(JoiningFake):
        def compute(self, batch: Sequence[MicroBatch]) -> list[Output]:
            self._clock.now_s += row_s  # that of any number of rows
            return super().compute(batch)

    assert find_numbers_at_once(Heavy(99, clock, n_embd=2048), clock) == found
    assert clock.now_s < 1.2 * takes_s


def test_what_is_hardly_faster_is_left_out_unless_it_is_known_to_be() -> None:
    assert worth_joining({1: 10.0, 2: 9.9, 3: 9.0, 4: 12.0, 8: 6.0}) == (3, 4, 8)
    assert worth_joining({1: 10.0, 2: 12.0}) == ()
    assert worth_joining({}) == ()


def test_a_failing_trial_leaves_rows_alone() -> None:
    class Failing(JoiningFake):
        def compute(self, batch: Sequence[MicroBatch]) -> list[Output]:
            raise EngineError("no")

    engine = Failing(99, Clock())
    assert find_numbers_at_once(engine) == () == engine.numbers


def test_computations_join_single_rows_of_neighbours() -> None:
    batch = [_row(0), _row(1), _row(2), _row(4), _row(5), _row(6, 3), _row(7), _row(8)]
    parts = [[micro.sequence for micro in part] for part in computations(batch, (2, 3))]
    assert parts == [[0, 1, 2], [4, 5], [6], [7, 8]]
    assert [len(part) for part in computations([_row(s) for s in range(5)], (2,))] == [2, 2, 1]
    assert [len(part) for part in computations([_row(s) for s in range(3)], ())] == [1, 1, 1]


def test_whoever_waits_longest_goes_with_its_neighbours() -> None:
    def sequences(waiting: Sequence[int], numbers: Sequence[int]) -> list[int]:
        return [waiting[index] for index in with_neighbours(waiting, numbers)]

    assert sequences([5, 1, 6, 2, 4], (2, 3)) == [4, 5, 6]
    assert sequences([5, 1, 6, 2, 4], ()) == [5]
    assert sequences([1, 5, 6, 2, 4], (3,)) == [1]
    # Rows are cut from their beginning, whoever is the first.
    for first in range(7):
        waiting = [first, *(s for s in range(7) if s != first)]
        part = first // 3 * 3 if first < 6 else 4
        assert sequences(waiting, (3,)) == [part, part + 1, part + 2]


def _row(sequence: int, n_tokens: int = 1) -> MicroBatch:
    return MicroBatch(sequence=sequence, position=0, tokens=(1,) * n_tokens)


@pytest.mark.parametrize("flash_attention", [False, True])
@pytest.mark.parametrize("weights", ["f32", "f16", "q8_0", "q4_k"])
def test_what_is_found_holds_for_llama_cpp(
    tmp_path: Path, weights: str, flash_attention: bool
) -> None:
    """Longer texts of different lengths than were tried; each number that was found."""
    path = write_model(
        tmp_path / "m.gguf", "llama", n_layer=2, weights=weights, vocabulary="built-in", n_embd=256
    )
    options = EngineOptions(n_ctx=512, n_parallel=8, n_threads=1, flash_attention=flash_attention)
    engine = load_engine(path, options)
    generator = np.random.default_rng(7)
    tokens = generator.integers(0, 200, (8, 400)).tolist()
    lengths = [5, 280, 33, 64, 1, 130, 17, 255]

    def logits(numbers: Sequence[int]) -> list[bytes]:
        engine.join_sequences(numbers)
        for sequence, length in enumerate(lengths):
            engine.open_sequence(sequence, SamplingSettings(temperature=0.0))
            first = tuple(tokens[sequence][:length])
            engine.compute([MicroBatch(sequence=sequence, position=0, tokens=first)])
        given = []
        for step in range(8):
            rows = [
                MicroBatch(
                    sequence=sequence,
                    position=length + step,
                    tokens=(tokens[sequence][length + step],),
                    want_logits=True,
                )
                for sequence, length in enumerate(lengths)
            ]
            for output in engine.compute(rows):
                assert output.logits is not None
                given.append(output.logits.tobytes())
        return given

    try:
        found = find_numbers_at_once(engine)
        alone = logits(())
        for number in found:
            assert logits((number,)) == alone
    finally:
        engine.close()
