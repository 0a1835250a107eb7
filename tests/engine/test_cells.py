"""KV that was copied to another engine has the bits of the original; so has all that follows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from support.chains import opened
from support.models import write_model

from shardmesh.engine.base import Engine, EngineOptions, MicroBatch, SamplingSettings
from shardmesh.engine.llama import LlamaEngine

GREEDY = SamplingSettings(temperature=0.0)
PIECE = 32
_CHANCE = np.random.default_rng(11)
PROMPT = _CHANCE.integers(0, 200, 300).tolist()
OTHER = _CHANCE.integers(0, 200, 300).tolist()

CASES = [
    # architecture, weights, sliding window, type of K, type of V, flash attention
    ("llama", "f32", 0, "f16", "f16", False),
    ("llama", "f32", 0, "f16", "f16", True),
    ("llama", "q4_k", 0, "f32", "f32", False),
    ("llama", "q8_0", 0, "q8_0", "q8_0", True),
    ("llama", "f16", 0, "q4_0", "f16", False),
    ("llama", "f16", 0, "bf16", "q5_1", True),
    ("qwen3", "f16", 0, "f16", "f16", False),
    ("mixtral", "f16", 0, "f16", "f16", False),
    ("phi3", "f16", 64, "f16", "f16", False),
]


def options(type_k: str = "f16", type_v: str = "f16", flash: bool = False) -> EngineOptions:
    return EngineOptions(
        n_ctx=512,
        n_parallel=3,
        n_threads=1,
        cache_type_k=type_k,
        cache_type_v=type_v,
        flash_attention=flash,
    )


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LlamaEngine, LlamaEngine]]:
    """Two engines with the same model, as two machines would have them."""
    architecture, weights, window, type_k, type_v, flash = request.param
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
    with ExitStack() as stack:
        engines = [
            stack.enter_context(opened(path, options(type_k, type_v, flash))) for _ in range(2)
        ]
        one, other = engines
        assert isinstance(one, LlamaEngine)
        assert isinstance(other, LlamaEngine)
        for engine in (one, other):
            engine.learn_cells()
            assert engine.info.cell_bytes > 0
        yield one, other


def feed(engine: Engine, sequence: int, tokens: list[int], start: int, end: int) -> None:
    for position in range(start, end, PIECE):
        piece = tuple(tokens[position : min(position + PIECE, end)])
        engine.compute([MicroBatch(sequence=sequence, position=position, tokens=piece)])


def rest(engine: Engine, sequence: int, start: int) -> list[bytes]:
    """The logits of the prompt's last tokens, with what lies before them computed from `start`."""
    n_pieces = 8 * PIECE
    feed(engine, sequence, PROMPT, start, n_pieces)
    logits = []
    for position in range(n_pieces, n_pieces + 12):
        micro = MicroBatch(
            sequence=sequence, position=position, tokens=(PROMPT[position],), want_logits=True
        )
        (output,) = engine.compute([micro])
        assert output.logits is not None
        logits.append(output.logits.tobytes())
    return logits


@pytest.mark.parametrize("n_copied", [1, 31, 32, 96, 97, 256])
def test_a_copy_goes_on_with_the_same_bits(
    pair: tuple[LlamaEngine, LlamaEngine], n_copied: int
) -> None:
    """Read in parts while the source goes on, written into a sequence that held something else."""
    one, other = pair
    one.open_sequence(1, GREEDY)
    wanted = rest(one, 1, 0)
    middle = n_copied // 2
    bounds = [(0, middle), (middle, n_copied)] if middle else [(0, n_copied)]
    parts = [one.read_cells(1, start, end) for start, end in bounds]
    other.open_sequence(2, GREEDY)
    feed(other, 2, OTHER, 0, 5 * PIECE)
    other.close_sequence(2, n_keep=2 * PIECE)
    other.open_sequence(0, GREEDY)
    feed(other, 0, OTHER, 0, 3 * PIECE)
    other.write_cells(2, np.concatenate(parts))
    assert other.n_held(2) == n_copied
    n_keep = n_copied // PIECE * PIECE  # micro-batches keep their borders
    other.open_sequence(2, GREEDY, n_keep=n_keep)
    assert rest(other, 2, n_keep) == wanted
    again = one.read_cells(1, 0, 8 * PIECE)
    assert other.read_cells(2, 0, 8 * PIECE).tobytes() == again.tobytes()
    for engine in pair:
        for sequence in range(3):
            engine.close_sequence(sequence)
