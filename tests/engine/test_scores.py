"""How likely known tokens are: the same numbers as llama.cpp gives in one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from llama_cpp import Llama
from support.chains import OPTIONS, compute, open_sequences, opened, opened_chain
from support.models import BUILT_IN, write_model

from shardmesh.engine.base import Engine, MicroBatch, SampledToken, SamplingSettings
from shardmesh.engine.sampling import describe_choice
from shardmesh.errors import InputError

TOKENS = tuple(range(5, 75))
PIECE = 32
N_TOP = 3
GREEDY = SamplingSettings(temperature=0.0, n_top_logprobs=N_TOP)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("scores") / "m.gguf", "llama", vocabulary=BUILT_IN)


@pytest.fixture
def whole(model: Path) -> Iterator[Engine]:
    with opened(model) as engine:
        open_sequences([engine], sampling=GREEDY)
        yield engine


def llama_scores(model: Path) -> list[SampledToken]:
    """Of all tokens behind the first, with everything in one process."""
    llama = Llama(
        str(model), n_ctx=OPTIONS.n_ctx, n_batch=PIECE, n_threads=1, logits_all=True, verbose=False
    )
    try:
        llama.eval(TOKENS)
        rows = np.array(llama.scores[: len(TOKENS)], dtype=np.float32)
    finally:
        llama.close()
    return [
        describe_choice(row, token, N_TOP) for row, token in zip(rows, TOKENS[1:], strict=False)
    ]


def test_a_chain_gives_what_llama_cpp_gives(model: Path, tmp_path: Path) -> None:
    found: list[SampledToken] = []
    with opened_chain(model, (1, 2, 1), tmp_path / "shards") as chain:
        open_sequences(chain, sampling=GREEDY)
        for start in range(0, len(TOKENS), PIECE):
            piece = TOKENS[start : start + PIECE]
            asked = MicroBatch(
                sequence=0,
                position=start,
                tokens=piece,
                sample=start + PIECE >= len(TOKENS),
                scored=TOKENS[start + 1 : start + 1 + len(piece)],
            )
            (output,) = compute(chain, [asked])
            found += output.scores
    expected = llama_scores(model)
    assert [score.token for score in found] == list(TOKENS[1:])
    assert all(len(score.top_logprobs) == N_TOP for score in found)
    np.testing.assert_allclose(
        [score.logprob for score in found], [score.logprob for score in expected], atol=1e-4
    )
    assert [s.top_logprobs[0][0] for s in found] == [s.top_logprobs[0][0] for s in expected]


def test_what_comes_behind_does_not_depend_on_it(whole: Engine) -> None:
    """Only the last layer sees how many rows are asked about, and nothing is kept of that."""
    plain = MicroBatch(sequence=0, position=0, tokens=TOKENS[:PIECE])
    following = MicroBatch(sequence=0, position=PIECE, tokens=TOKENS[PIECE:], want_logits=True)
    results = []
    for scored in ((), TOKENS[1 : PIECE + 1]):
        open_sequences([whole], sampling=GREEDY)
        whole.compute([msgspec.structs.replace(plain, scored=scored)])
        (output,) = whole.compute([following])
        assert output.logits is not None
        results.append(output.logits.tobytes())
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"scored": TOKENS[: PIECE + 1]},
        {"scored": (2**31 - 1,)},
        {"scored": TOKENS[:2], "want_embedding": True},
    ],
)
def test_what_cannot_be_asked(whole: Engine, changes: dict[str, object]) -> None:
    plain = MicroBatch(sequence=0, position=0, tokens=TOKENS[:PIECE])
    with pytest.raises(InputError):
        whole.compute([msgspec.structs.replace(plain, **changes)])
    assert whole.n_held(0) == 0


def test_without_settings_nothing_is_scored(whole: Engine) -> None:
    open_sequences([whole])
    with pytest.raises(InputError):
        whole.compute([MicroBatch(sequence=0, position=0, tokens=TOKENS[:2], scored=TOKENS[1:2])])
