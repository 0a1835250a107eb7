"""What a sequence keeps or is given a copy of has the bits that it would compute itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from support.chains import opened
from support.models import write_model

from shardmesh.engine.base import Engine, EngineOptions, MicroBatch, SamplingSettings
from shardmesh.engine.fake import FakeEngine, fake_info
from shardmesh.errors import EngineError, InputError

GREEDY = SamplingSettings(temperature=0.0)
PIECE = 32
N_SHARED = 4 * PIECE
N_SINGLE = 12
_CHANCE = np.random.default_rng(3)
PROMPTS = _CHANCE.integers(0, 200, (3, 200)).tolist()
WANTED = PROMPTS[0][:N_SHARED] + PROMPTS[1][: 40 + N_SINGLE]
"""Begins as the first prompt and goes on otherwise; its last tokens go one by one."""


@pytest.fixture(
    scope="module",
    params=[
        ("llama", "f32", 0, "f16"),
        ("llama", "q4_k", 0, "f16"),
        ("llama", "q8_0", 0, "q8_0"),
        ("qwen3", "f16", 0, "f16"),
        ("phi3", "f16", 64, "f16"),
    ],
    ids=lambda param: "-".join(map(str, param)),
)
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """Several architectures and types; one with a sliding window, one with a quantized cache."""
    architecture, weights, window, cache_type = request.param
    path: Path = tmp_path_factory.mktemp("model") / "m.gguf"
    write_model(
        path,
        architecture,
        n_layer=2,
        weights=weights,
        vocabulary="built-in",
        n_embd=256,
        sliding_window=window,
    )
    options = EngineOptions(
        n_ctx=512,
        n_parallel=4,
        n_threads=1,
        cache_type_k=cache_type,
        cache_type_v=cache_type,
        flash_attention=cache_type == "q8_0",
    )
    with opened(path, options) as engine:
        yield engine


def feed(engine: Engine, sequence: int, tokens: Sequence[int], start: int = 0) -> None:
    for position in range(start, len(tokens), PIECE):
        piece = tuple(tokens[position : position + PIECE])
        engine.compute([MicroBatch(sequence=sequence, position=position, tokens=piece)])


def rest(engine: Engine, sequence: int, start: int) -> list[bytes]:
    """The logits of WANTED's last tokens, after what lies between `start` and them."""
    n_pieces = len(WANTED) - N_SINGLE
    feed(engine, sequence, WANTED[:n_pieces], start)
    logits = []
    for position in range(n_pieces, len(WANTED)):
        micro = MicroBatch(
            sequence=sequence, position=position, tokens=(WANTED[position],), want_logits=True
        )
        (output,) = engine.compute([micro])
        assert output.logits is not None
        logits.append(output.logits.tobytes())
    return logits


@pytest.fixture
def fresh(engine: Engine) -> Iterator[list[bytes]]:
    """What a sequence gives that computes everything itself; all are empty before and after."""
    engine.open_sequence(3, GREEDY)
    yield rest(engine, 3, 0)
    for sequence in range(4):
        engine.close_sequence(sequence)
        assert engine.n_held(sequence) == 0


def test_a_sequence_that_was_taken_over(engine: Engine, fresh: list[bytes]) -> None:
    engine.open_sequence(0, GREEDY)
    feed(engine, 0, PROMPTS[0])
    engine.close_sequence(0, n_keep=N_SHARED + PIECE)
    assert engine.n_held(0) == N_SHARED + PIECE
    engine.open_sequence(0, GREEDY, n_keep=N_SHARED)
    assert engine.n_held(0) == N_SHARED
    assert rest(engine, 0, N_SHARED) == fresh


def test_a_copy_of_a_sequence_that_is_kept(engine: Engine, fresh: list[bytes]) -> None:
    """Into one that held something longer; and the source can still be copied and taken over."""
    for sequence, prompt in enumerate(PROMPTS[:2]):
        engine.open_sequence(sequence, GREEDY)
        feed(engine, sequence, prompt)
        engine.close_sequence(sequence, n_keep=6 * PIECE)
    for target in (1, 2):
        engine.copy_sequence(0, target)
        engine.open_sequence(target, GREEDY, n_keep=N_SHARED)
        assert rest(engine, target, N_SHARED) == fresh
    engine.open_sequence(0, GREEDY, n_keep=N_SHARED)
    assert rest(engine, 0, N_SHARED) == fresh


def test_a_copy_of_a_copy_before_anything_is_computed(engine: Engine, fresh: list[bytes]) -> None:
    engine.open_sequence(0, GREEDY)
    feed(engine, 0, PROMPTS[0])
    engine.copy_sequence(0, 1)
    engine.copy_sequence(1, 2)
    engine.close_sequence(0)
    engine.close_sequence(1)
    engine.open_sequence(2, GREEDY, n_keep=N_SHARED)
    engine.open_sequence(0, GREEDY)
    feed(engine, 0, PROMPTS[2])
    assert rest(engine, 2, N_SHARED) == fresh


def test_two_running_sessions_share(engine: Engine, fresh: list[bytes]) -> None:
    """Both go on in turns after the copy, and neither sees the other."""
    engine.open_sequence(0, GREEDY)
    feed(engine, 0, WANTED[:N_SHARED])
    engine.copy_sequence(0, 1)
    engine.open_sequence(1, GREEDY, n_keep=N_SHARED)
    feed(engine, 1, PROMPTS[0], N_SHARED)
    assert rest(engine, 0, N_SHARED) == fresh
    engine.close_sequence(1, n_keep=N_SHARED)
    engine.open_sequence(1, GREEDY, n_keep=N_SHARED)
    assert rest(engine, 1, N_SHARED) == fresh


def test_a_kept_sequence_whose_place_is_needed(engine: Engine, fresh: list[bytes]) -> None:
    engine.open_sequence(0, GREEDY)
    feed(engine, 0, PROMPTS[2])
    engine.close_sequence(0, n_keep=6 * PIECE)
    engine.open_sequence(0, GREEDY)
    assert engine.n_held(0) == 0
    assert rest(engine, 0, 0) == fresh


@pytest.mark.parametrize("kind", ["llama", "fake"])
def test_what_is_not_there_cannot_be_kept_or_copied(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if kind == "fake":
        check_refusals(FakeEngine(fake_info(0, 4, 4)))
        return
    path = write_model(tmp_path / "m.gguf", n_layer=1, vocabulary="built-in")
    with opened(path) as engine:
        check_refusals(engine)


def check_refusals(engine: Engine) -> None:
    with pytest.raises(EngineError):
        engine.open_sequence(0, GREEDY, n_keep=1)
    engine.open_sequence(0, GREEDY)
    engine.compute([MicroBatch(sequence=0, position=0, tokens=(1, 2, 3))])
    with pytest.raises(EngineError):
        engine.open_sequence(0, GREEDY, n_keep=4)
    for source, target in ((0, 0), (1, 0), (0, 99), (99, 1)):
        with pytest.raises(InputError):
            engine.copy_sequence(source, target)
    engine.close_sequence(0, n_keep=2)
    assert engine.n_held(0) == 2
    with pytest.raises(InputError):
        engine.compute([MicroBatch(sequence=0, position=2, tokens=(1,))])
    engine.close_sequence(0)
    assert engine.n_held(0) == 0
