"""A LoRA adapter, and embeddings, over real processes: the bits of one llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.asking import as_client
from support.models import BUILT_IN, u32_value, write_lora, write_model
from support.processes import Mesh, start_mesh, workspace
from support.rule_models import with_values

from shardmesh.coordinator.client import Client
from shardmesh.coordinator.embed import Embedding
from shardmesh.coordinator.generate import Piece
from shardmesh.coordinator.reference import reference_tokens
from shardmesh.coordinator.request import CompletionRequest
from shardmesh.engine.base import EngineOptions, MicroBatch, SamplingSettings
from shardmesh.engine.llama import load_engine
from shardmesh.engine.tokenizer import Tokenizer

pytestmark = [pytest.mark.processes, pytest.mark.slow]

PROMPT = "Once upon a time there was a king"
N_TOKENS = 12
PIECE_TOKENS = 64  # as `split` chooses for two shards
N_CTX = 256
N_EMBD = 64
MEAN = 1
GREEDY = SamplingSettings(temperature=0.0)
OPTIONS = EngineOptions(n_ctx=N_CTX, n_parallel=1, n_threads=1)


@pytest.fixture(scope="module")
def files() -> Iterator[tuple[Mesh, Path, Path]]:
    """A mesh of two stages, the whole model and the whole adapter, which changes only the first."""
    with workspace() as space:
        model = write_model(space.folder / "m.gguf", n_layer=4, vocabulary=BUILT_IN)
        with_values(model, pooling_type=u32_value(MEAN))
        weights = [(f"blk.{layer}.attn_output.weight", N_EMBD, N_EMBD) for layer in range(2)]
        weights += [(f"blk.{layer}.ffn_down.weight", 2 * N_EMBD, N_EMBD) for layer in range(2)]
        lora = write_lora(space.folder / "pirate.gguf", "llama", weights, deviation=0.4)
        folder = space.folder / "shards"
        done = space.run("split", str(model), "--lora", str(lora), "--out", str(folder))
        assert done.code == 0, done.err
        yield start_mesh(space, folder, 2, "--ctx-size", str(N_CTX)), model, lora


@pytest.fixture(scope="module")
def prompt(files: tuple[Mesh, Path, Path]) -> list[int]:
    with Tokenizer.open(files[1]) as tokenizer:
        return tokenizer.encode(PROMPT)


def test_a_request_chooses_its_adapter(files: tuple[Mesh, Path, Path], prompt: list[int]) -> None:
    mesh, model, lora = files
    engine = load_engine(model, OPTIONS, {"pirate": lora})
    expected = {
        name: list(
            reference_tokens(
                engine, prompt, GREEDY, N_TOKENS, piece_tokens=PIECE_TOKENS, adapter=name
            ).tokens
        )
        for name in ("pirate", "")
    }
    engine.close()
    assert expected["pirate"] != expected[""], "the adapter changes nothing"

    async def tokens(client: Client, name: str) -> list[int]:
        request = CompletionRequest(
            prompt=PROMPT, adapter=name, n_tokens_max=N_TOKENS, sampling=GREEDY, ignore_end=True
        )
        async with client.coordinator.complete(request) as completion:
            items = [item async for item in completion.items]
        return [item.token.token for item in items if isinstance(item, Piece) and item.token]

    async def use(client: Client) -> dict[str, list[int]]:
        return {name: await tokens(client, name) for name in expected}

    assert as_client(mesh, use) == expected


def test_an_adapter_that_nobody_has_is_one_sentence(files: tuple[Mesh, Path, Path]) -> None:
    mesh = files[0]
    done = mesh.space.run("run", PROMPT, "--lora", "parrot", *mesh.where)
    assert done.code != 0
    assert "no LoRA adapter named parrot" in done.err


def test_embeddings_are_those_of_one_process(
    files: tuple[Mesh, Path, Path], prompt: list[int]
) -> None:
    mesh, model, _ = files
    engine = load_engine(model, OPTIONS)
    engine.open_sequence(0)
    micro = MicroBatch(sequence=0, position=0, tokens=tuple(prompt), want_embedding=True)
    expected = engine.compute([micro])[0].embedding
    engine.close()
    assert expected is not None

    async def use(client: Client) -> list[Embedding]:
        return await client.coordinator.embed([PROMPT, prompt])

    for found in as_client(mesh, use):
        assert found.n_tokens == len(prompt)
        assert found.values.tobytes() == expected.tobytes()
