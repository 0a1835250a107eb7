"""A draft model in its process: the tokens that it would write, as often as it is asked."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.models import write_model

from shardmesh.engine.base import EngineOptions, MicroBatch, SamplingSettings
from shardmesh.engine.draft_model import DraftModel, check_vocabulary
from shardmesh.engine.llama import load_engine
from shardmesh.engine.tokenizer import Tokenizer
from shardmesh.errors import InputError

pytestmark = pytest.mark.timeout(120)

ANSWER_TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("draft") / "small.gguf", n_layer=2)


@pytest.fixture
def model(path: Path) -> Iterator[DraftModel]:
    model = DraftModel(path, 1)
    yield model
    model.close()


def written(path: Path, tokens: list[int], n_tokens: int) -> list[int]:
    """What the model writes, token by token."""
    engine = load_engine(path, EngineOptions(n_ctx=256, n_parallel=1, n_threads=1))
    try:
        engine.open_sequence(0, SamplingSettings(temperature=0.0))
        found: list[int] = []
        given = tuple(tokens)
        while len(found) < n_tokens:
            batch = MicroBatch(sequence=0, position=engine.n_held(0), tokens=given, sample=True)
            (output,) = engine.compute([batch])
            assert output.sampled is not None
            found.append(output.sampled.token)
            given = (found[-1],)
        return found
    finally:
        engine.close()


def guessed(model: DraftModel, tokens: list[int], n_tokens: int) -> list[int]:
    answers: queue.Queue[int] = queue.Queue()
    model.guess(tokens, n_tokens, answers.put)
    return [answers.get(timeout=ANSWER_TIMEOUT_S) for _ in range(n_tokens)]


def test_it_guesses_what_it_would_write_wherever_the_text_goes_on(
    model: DraftModel, path: Path
) -> None:
    first, second = [1, 5, 9, 13], [1, 5, 9, 20, 21]
    assert guessed(model, first, 5) == written(path, first, 5)
    assert guessed(model, second, 3) == written(path, second, 3)  # another way from the third on
    assert guessed(model, first, 2) == written(path, first, 2)


def test_a_process_that_is_gone_guesses_nothing(model: DraftModel) -> None:
    model._process.kill()
    model._process.wait()
    model.guess([1, 2], 3, lambda token: pytest.fail("it guessed"))
    model._thread.join(ANSWER_TIMEOUT_S)
    assert not model._thread.is_alive()


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF and nothing else")
    with pytest.raises(InputError, match=r"broken\.gguf cannot be used"):
        DraftModel(broken, 1)


def test_the_vocabulary_must_be_the_same(path: Path, tmp_path: Path) -> None:
    from shardmesh.demo_model import DEMO_MODEL

    with Tokenizer.open(path) as tokenizer:
        check_vocabulary(path, tokenizer)
        with pytest.raises(InputError) as caught:
            check_vocabulary(DEMO_MODEL, tokenizer)
    assert caught.value.code == "OTHER_VOCABULARY"
