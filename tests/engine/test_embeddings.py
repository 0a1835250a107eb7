"""Embeddings of a chain against llama.cpp's own, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from llama_cpp import llama_cpp as api
from support.chains import OPTIONS, compute, open_sequences, opened_chain
from support.models import BUILT_IN, u32_value, write_model
from support.rule_models import with_values

from shardmesh.engine.base import Engine, MicroBatch
from shardmesh.errors import InputError

TOKENS = [(7 * i + 3) % 250 for i in range(24)]
NONE, MEAN, FIRST, LAST, RANK = range(5)


def model_with(path: Path, pooling: int) -> Path:
    write_model(path, "qwen3", vocabulary=BUILT_IN, tied=True)
    return with_values(path, pooling_type=u32_value(pooling))


def llama_embedding(model: Path, tokens: Sequence[int], pooling: int) -> bytes:
    """What a context that is made for embeddings gives for all tokens at once."""
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 256
    params.n_threads = params.n_threads_batch = 1
    params.embeddings, params.pooling_type, params.flash_attn_type = True, pooling, 0
    handle = api.llama_model_load_from_file(bytes(model), api.llama_model_default_params())
    context = api.llama_init_from_model(handle, params)
    try:
        array = (api.llama_token * len(tokens))(*tokens)
        assert api.llama_decode(context, api.llama_batch_get_one(array, len(tokens))) == 0
        pointer = api.llama_get_embeddings_seq(context, 0)
        n_embd = api.llama_model_n_embd_out(handle)
        return bytes(np.ctypeslib.as_array(pointer, shape=(n_embd,)).tobytes())
    finally:
        api.llama_free(context)
        api.llama_model_free(handle)


def wanted(chain: Sequence[Engine], tokens: Sequence[int]) -> MicroBatch:
    position = chain[0].n_held(0)
    return MicroBatch(sequence=0, position=position, tokens=tuple(tokens), want_embedding=True)


def embedding_of(chain: Sequence[Engine], tokens: Sequence[int]) -> bytes:
    (output,) = compute(chain, [wanted(chain, tokens)])
    assert output.embedding is not None
    assert output.sampled is None
    assert output.logits is None
    return output.embedding.tobytes()


@pytest.mark.parametrize(
    ("in_file", "expected"), [(NONE, LAST), (MEAN, MEAN), (FIRST, FIRST), (LAST, LAST)]
)
def test_embedding_equals_llama_cpp(in_file: int, expected: int, tmp_path: Path) -> None:
    model = model_with(tmp_path / "model.gguf", in_file)
    with opened_chain(model, (1, 2, 1), tmp_path / "shards") as chain:
        open_sequences(chain)
        assert embedding_of(chain, TOKENS) == llama_embedding(model, TOKENS, expected)


def test_tokens_and_embeddings_do_not_disturb_each_other(tmp_path: Path) -> None:
    model = model_with(tmp_path / "model.gguf", LAST)
    with opened_chain(model, (2, 2), tmp_path / "shards") as chain:
        open_sequences(chain, (0, 1))
        prompt = MicroBatch(sequence=1, position=0, tokens=tuple(TOKENS), want_logits=True)
        before = compute(chain, [prompt])[0].logits
        embedding = embedding_of(chain, TOKENS)
        open_sequences(chain, (0, 1))
        after = compute(chain, [prompt])[0].logits
        assert before is not None
        assert after is not None
        assert before.tobytes() == after.tobytes()
        assert embedding_of(chain, TOKENS) == embedding


def test_the_last_token_stands_for_a_text_in_several_pieces(tmp_path: Path) -> None:
    model = model_with(tmp_path / "model.gguf", LAST)
    with opened_chain(model, (2, 2), tmp_path / "shards") as chain:
        open_sequences(chain)
        piece = MicroBatch(sequence=0, position=0, tokens=tuple(TOKENS[:20]))
        compute(chain, [piece])
        values = np.frombuffer(embedding_of(chain, TOKENS[20:]), dtype=np.float32)
    whole = np.frombuffer(llama_embedding(model, TOKENS, LAST), dtype=np.float32)
    np.testing.assert_allclose(values, whole, rtol=1e-4, atol=1e-4)  # other rows, other last bits


def test_a_mean_over_several_pieces_is_refused(tmp_path: Path) -> None:
    model = model_with(tmp_path / "model.gguf", MEAN)
    with opened_chain(model, (4,), tmp_path / "shards", OPTIONS) as chain:
        open_sequences(chain)
        chain[0].compute([MicroBatch(sequence=0, position=0, tokens=tuple(TOKENS))])
        with pytest.raises(InputError) as caught:
            embedding_of(chain, TOKENS)
    assert caught.value.code == "PROMPT_TOO_LONG"


def test_a_model_that_ranks_has_no_embeddings(tmp_path: Path) -> None:
    model = model_with(tmp_path / "model.gguf", RANK)
    with opened_chain(model, (4,), tmp_path / "shards") as chain:
        open_sequences(chain)
        with pytest.raises(InputError) as caught:
            embedding_of(chain, TOKENS)
    assert caught.value.code == "NO_EMBEDDINGS"
