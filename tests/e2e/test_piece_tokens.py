"""A model whose prompts go in pieces of another length: the bits of one process with the same."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from support.asking import as_client
from support.processes import Mesh, start_bootstrap, workspace

from shardmesh.coordinator.client import Client
from shardmesh.coordinator.coordinator import Completion
from shardmesh.coordinator.generate import Piece
from shardmesh.coordinator.pieces import pieces_of
from shardmesh.coordinator.request import CompletionRequest
from shardmesh.engine.base import EngineOptions, MicroBatch, SamplingSettings
from shardmesh.engine.llama import load_engine
from shardmesh.engine.tokenizer import Tokenizer

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(300)]

PIECE_TOKENS = 64
N_SHARDS = 2
N_CTX = 512
N_TOKENS = 24
COMMON = "The old king went into the deep forest, and the wind was very cold there. " * 12
PROMPT = COMMON + "Then he said:"
OTHER = COMMON + "But nobody had seen the wolf"
SAMPLING = SamplingSettings(temperature=0.9, repeat_penalty=1.2, seed=5)

Written = list[tuple[int, float]]
"""Tokens with their log-probabilities, whose last bits show a difference anywhere before."""


@pytest.fixture(scope="module")
def mesh(model: Path) -> Iterator[Mesh]:
    """Two stages with two replicas each."""
    with workspace() as space:
        folder = space.folder / "shards"
        length = ("--piece-tokens", str(PIECE_TOKENS))
        done = space.run("split", str(model), *length, "--out", str(folder))
        assert done.code == 0, done.err
        mesh = Mesh(space, "test", folder, start_bootstrap(space, "test"))
        for number in range(2 * N_SHARDS):
            state = ("--state-dir", str(space.folder / f"state-{number}"))
            mesh.listeners.append(mesh.listen(number % N_SHARDS, "--ctx-size", str(N_CTX), *state))
        mesh.wait_ready()
        yield mesh


def undisturbed(model: Path, text: str, piece_tokens: int = PIECE_TOKENS) -> Written:
    """What one llama.cpp process writes that has the prompt in such pieces."""
    with Tokenizer.open(model) as tokenizer:
        prompt = tokenizer.encode(text)
    engine = load_engine(model, EngineOptions(n_ctx=N_CTX, n_parallel=4, n_threads=1))
    engine.open_sequence(0, SAMPLING, prompt[-SAMPLING.repeat_last_n :])
    waiting = [tuple(piece) for piece in pieces_of(prompt, piece_tokens)]
    written: Written = []
    while len(written) < N_TOKENS:
        piece = waiting.pop(0)
        micro = MicroBatch(sequence=0, position=engine.n_held(0), tokens=piece, sample=not waiting)
        (output,) = engine.compute([micro])
        if output.sampled is not None:
            written.append((output.sampled.token, output.sampled.logprob))
            waiting.append((output.sampled.token,))
    engine.close()
    return written


Disturb = Callable[[Completion], Awaitable[None]]


async def write(
    client: Client, prompt: str, *, via: tuple[str, ...] = (), disturb: Disturb | None = None
) -> tuple[Written, int, int]:
    """What the mesh writes, tokens that were reused, and how often the chain was repaired."""
    request = CompletionRequest(
        prompt=prompt,
        n_tokens_max=N_TOKENS,
        sampling=SAMPLING,
        ignore_end=True,
        wait_s=30.0,
        via=via,
    )
    written: Written = []
    async with client.coordinator.complete(request) as completion:
        assert completion.session.piece_tokens == PIECE_TOKENS
        async for item in completion.items:
            if isinstance(item, Piece) and item.token is not None:
                written.append((item.token.token, item.token.logprob))
                if disturb is not None and len(written) == N_TOKENS // 2:
                    await disturb(completion)
        return written, completion.session.n_reused, len(completion.repairs)


def test_the_bits_of_one_process_computed_and_reused(mesh: Mesh, model: Path) -> None:
    via = tuple(node.peer_id for node in mesh.listeners[:N_SHARDS])

    async def use(client: Client) -> list[tuple[Written, int, int]]:
        return [await write(client, prompt, via=via) for prompt in (PROMPT, OTHER, PROMPT)]

    first, other, again = as_client(mesh, use)
    assert first == (undisturbed(model, PROMPT), 0, 0)
    assert other[0] == undisturbed(model, OTHER)
    assert again[0] == first[0]
    assert 2 * PIECE_TOKENS < other[1] <= again[1]
    assert other[1] % PIECE_TOKENS == again[1] % PIECE_TOKENS == 0


def test_it_tells_a_person(mesh: Mesh) -> None:
    done = mesh.space.run("run", "Once", "--max-tokens", "1", "--explain", *mesh.where)
    assert done.code == 0, done.err
    assert f"goes in pieces of {PIECE_TOKENS}" in done.err


@pytest.mark.parametrize("stage", range(N_SHARDS))
def test_the_same_after_a_stage_is_lost(mesh: Mesh, model: Path, stage: int) -> None:
    async def kill(completion: Completion) -> None:
        peer_id = completion.chain.stages[stage].peer_id
        node = next(node for node in mesh.listeners if node.peer_id == peer_id)
        node.running.data_process().kill()

    written, _, n_repairs = as_client(mesh, lambda client: write(client, OTHER, disturb=kill))
    assert n_repairs == 1
    assert written == undisturbed(model, OTHER)
