"""A chain of shards gives the bits of the whole model, for architectures, weights and cuts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support.chains import OPTIONS, compute, micro, open_sequences, opened, opened_chain
from support.models import write_model

from shardmesh.engine.base import Engine, EngineOptions

PROMPT = [(7 * i + 3) % 250 for i in range(20)]
N_STEPS = 3

CASES = [
    ("llama", "f32", (4,)),
    ("llama", "f16", (1, 3)),
    ("llama", "q8_0", (2, 1, 1)),
    ("llama", "q4_k", (1, 1, 1, 1)),
    ("qwen2", "f32", (3, 1)),
    ("qwen2", "q8_0", (1, 1, 2)),
    ("qwen2", "q4_k", (2, 2)),
    ("qwen3", "f16", (1, 2, 1)),
    ("qwen3", "q8_0", (3, 1)),
    ("qwen3", "q4_k", (1, 1, 1, 1)),
    ("mixtral", "f32", (1, 1, 1, 1)),
    ("mixtral", "f16", (3, 1)),
    ("mixtral", "q4_k", (1, 2, 1)),
    ("phi3", "f32", (2, 1, 1)),
    ("phi3", "q8_0", (1, 3)),
    ("phi3", "q4_k", (2, 2)),
]


def greedy_steps(chain: Sequence[Engine], prompt: Sequence[int] = PROMPT) -> list[bytes]:
    """The logits of each step as bytes: a prefill, then single greedy tokens."""
    open_sequences(chain)
    tokens, steps = list(prompt), []
    for _ in range(1 + N_STEPS):
        (output,) = compute(chain, [micro(chain, tokens)])
        assert output.logits is not None
        assert output.logits.std() > 0.1, "logits that are all alike prove nothing"
        steps.append(output.logits.tobytes())
        tokens = [int(output.logits.argmax())]
    return steps


@pytest.mark.parametrize(("architecture", "weights", "cut"), CASES)
def test_cut_equals_whole(
    architecture: str, weights: str, cut: tuple[int, ...], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model.gguf", architecture, weights=weights, n_embd=256)
    with opened(model) as whole:
        expected = greedy_steps([whole])
    with opened_chain(model, cut, tmp_path / "shards") as chain:
        assert [engine.info.is_first for engine in chain] == [True] + [False] * (len(cut) - 1)
        assert [engine.info.is_last for engine in chain] == [False] * (len(cut) - 1) + [True]
        assert all(engine.info.n_vocab == 0 for engine in chain[1:-1])
        assert [engine.info.n_layer for engine in chain] == list(cut)
        assert len({engine.info.fingerprint for engine in chain}) == 1
        assert greedy_steps(chain) == expected


@pytest.mark.parametrize(
    ("architecture", "extras"),
    [
        ("llama", {"rope_tensors": True, "tied": True}),
        ("mistral", {"sliding_window": 8}),
        ("phi3", {"rope_tensors": True}),
    ],
)
@pytest.mark.parametrize("flash_attention", [False, True])
def test_cut_equals_whole_with_extras(
    architecture: str, extras: dict[str, int], flash_attention: bool, tmp_path: Path
) -> None:
    options = EngineOptions(
        n_ctx=256, n_parallel=3, n_threads=1, flash_attention=flash_attention, cache_type_k="q8_0"
    )
    model = write_model(tmp_path / "model.gguf", architecture, n_embd=256, **extras)
    with opened(model, options) as whole:
        expected = greedy_steps([whole])
    with opened_chain(model, (1, 2, 1), tmp_path / "shards", options) as chain:
        assert greedy_steps(chain) == expected


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("identity") / "model.gguf", "llama", weights="q8_0")


def interleaved(chain: Sequence[Engine]) -> list[list[bytes]]:
    """Three sequences of different length in every batch, one of them late and in two pieces."""
    open_sequences(chain, (0, 1, 2))
    batches = [
        [micro(chain, PROMPT[:9], 0), micro(chain, PROMPT[4:6], 2)],
        [micro(chain, PROMPT[:5], 1, want_logits=False)],
    ]
    logits = []
    for batch in batches:
        logits.append(compute(chain, batch))
    logits.append(
        compute(chain, [micro(chain, [8], 2), micro(chain, PROMPT[5:17], 1), micro(chain, [9], 0)])
    )
    return [[o.logits.tobytes() for o in step if o.logits is not None] for step in logits]


def test_interleaved_sequences_equal_the_whole_model(model: Path, tmp_path: Path) -> None:
    with opened(model) as whole:
        expected = interleaved([whole])
    assert [len(step) for step in expected] == [2, 0, 3]
    with opened_chain(model, (1, 1, 2), tmp_path / "shards") as chain:
        assert interleaved(chain) == expected


def test_each_sequence_gets_its_own_rows(model: Path, tmp_path: Path) -> None:
    """Together with others a sequence gives what it gives alone, but for rounding."""
    prompts = {0: PROMPT[:9], 1: PROMPT[3:8], 2: PROMPT[8:20]}
    with opened_chain(model, (2, 2), tmp_path / "shards") as chain:
        alone = {}
        for sequence, prompt in prompts.items():
            open_sequences(chain, (0, 1, 2))
            (output,) = compute(chain, [micro(chain, prompt, sequence)])
            alone[sequence] = output.logits
        open_sequences(chain, (0, 1, 2))
        together = compute(chain, [micro(chain, prompts[s], s) for s in (2, 0, 1)])
    for sequence, output in zip((2, 0, 1), together, strict=True):
        np.testing.assert_allclose(output.logits, alone[sequence], atol=1e-2)


def test_trim_and_go_on(model: Path, tmp_path: Path) -> None:
    with opened_chain(model, (2, 2), tmp_path / "shards") as chain:
        expected = greedy_steps(chain)
        for engine in chain:
            engine.trim_sequence(0, 0)
            assert engine.n_held(0) == 0
        (output,) = compute(chain, [micro(chain, PROMPT)])
        assert output.logits is not None
        assert output.logits.tobytes() == expected[0]
        compute(chain, [micro(chain, [1, 2, 3, 4])])
        for engine in chain:
            engine.trim_sequence(0, len(PROMPT))
        token = int(output.logits.argmax())
        (output,) = compute(chain, [micro(chain, [token])])
        assert output.logits is not None
        assert output.logits.tobytes() == expected[1]


def test_a_large_batch_stays_in_order(model: Path, tmp_path: Path) -> None:
    options = EngineOptions(n_ctx=600, n_parallel=1, n_threads=1)
    prompt = [(7 * i + 3) % 250 for i in range(512)]
    with opened(model, options) as whole:
        assert whole.info.n_batch_tokens_max == len(prompt)
        expected = greedy_steps([whole], prompt)
    with opened_chain(model, (2, 2), tmp_path / "shards", options) as chain:
        assert greedy_steps(chain, prompt) == expected


def test_the_number_of_sequences_does_not_stretch_positions(tmp_path: Path) -> None:
    """phi3 has factors for long contexts, which llama.cpp would choose by the whole cache."""
    model = write_model(
        tmp_path / "model.gguf", "phi3", rope_tensors=True, n_ctx_train=OPTIONS.n_ctx
    )
    steps = []
    for n_parallel in (1, 3):
        options = EngineOptions(n_ctx=OPTIONS.n_ctx, n_parallel=n_parallel, n_threads=1)
        with opened(model, options) as engine:
            steps.append(greedy_steps([engine]))
    assert steps[0] == steps[1]
