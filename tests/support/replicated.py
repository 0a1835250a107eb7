"""Memory meshes whose stages have spare replicas, and what they must write."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec
from support.loop_worker import LoopWorker
from support.mesh import GREEDY, PIECE_TOKENS, MemoryMesh, memory_mesh

from shardmesh.coordinator.pieces import pieces_of
from shardmesh.engine.base import MicroBatch, Output, SamplingSettings, TellToken
from shardmesh.engine.fake import FakeEngine, fake_info
from shardmesh.listener.stage_session import Work
from shardmesh.listener.worker import Calculation

TOKEN_S, PIECE_S = 0.01, 0.04
BOUNDARIES = (0, 1, 3, 4)
"""Of the layers of three stages."""

SAMPLED = msgspec.structs.replace(GREEDY, temperature=0.9, seed=7)


class CountingEngine(FakeEngine):
    """Counts the positions that it computes, and those that come by themselves."""

    n_computed = 0
    n_rows = 0

    def compute(
        self, batch: Sequence[MicroBatch], tell_token: TellToken | None = None
    ) -> list[Output]:
        self.n_computed += sum(micro.n_tokens for micro in batch)
        self.n_rows += sum(micro.n_tokens == 1 for micro in batch)
        return super().compute(batch, tell_token)


class OtherTokens(CountingEngine):
    """Does not come to the same tokens: a wrong file, or other hardware."""

    def _sample(self, logits, state):  # type: ignore[no-untyped-def]
        return super()._sample(-logits, state)


def wrong_last_stage() -> OtherTokens:
    """One that says that it computes as the others do."""
    start, end = BOUNDARIES[-2:]
    return OtherTokens(fake_info(start, end, end, n_ctx=512), layer_start=start)


def other_last_stage() -> OtherTokens:
    """One that says that it computes otherwise, as another machine does."""
    start, end = BOUNDARIES[-2:]
    info = dataclasses.replace(fake_info(start, end, end, n_ctx=512), fingerprint="fake-2")
    return OtherTokens(info, layer_start=start)


def engines(boundaries: Sequence[int] = BOUNDARIES, **options: int) -> list[CountingEngine]:
    """One for each stage, with room for 512 tokens unless told otherwise."""
    return [
        CountingEngine(
            fake_info(start, end, boundaries[-1], **{"n_ctx": 512, **options}), layer_start=start
        )
        for start, end in itertools.pairwise(boundaries)
    ]


def loop_worker(calculation: Calculation[Work]) -> LoopWorker:
    """10 ms for a token, 40 ms for a piece of a prompt."""
    return LoopWorker(calculation, lambda n_tokens: TOKEN_S if n_tokens == 1 else PIECE_S)


@asynccontextmanager
async def replicated_mesh(
    n_spares: int = 1, stages: Sequence[FakeEngine] | None = None, **options: int
) -> AsyncIterator[MemoryMesh]:
    """A mesh of `stages`, or of `engines`, with as many spare replicas of each."""
    spares = [
        list(each) for each in zip(*(engines(**options) for _ in range(n_spares)), strict=True)
    ]
    async with memory_mesh(stages or engines(**options), spares, loop_worker) as mesh:
        yield mesh


def one_engine_tokens(
    prompt: Sequence[int],
    n_tokens: int,
    *,
    temperature: float,
    seed: int,
    n_ctx: int = 512,
    piece_tokens: int = PIECE_TOKENS,
) -> list[int]:
    """What one engine with all layers writes, fed the same micro-batches."""
    engine = FakeEngine(fake_info(n_ctx=n_ctx))
    engine.open_sequence(0, SamplingSettings(temperature=temperature, seed=seed))
    pieces = [tuple(piece) for piece in pieces_of(prompt, piece_tokens)]
    tokens: list[int] = []
    position = 0
    while len(tokens) < n_tokens:
        piece = pieces.pop(0)
        micro = MicroBatch(sequence=0, position=position, tokens=piece, sample=not pieces)
        (output,) = engine.compute([micro])
        position += len(piece)
        if output.sampled is not None:
            tokens.append(output.sampled.token)
            pieces.append((tokens[-1],))
    return tokens


def assert_nothing_left(mesh: MemoryMesh) -> None:
    """No session anywhere, and no copy of one."""
    assert mesh.router.n_sessions == 0
    for node in mesh.nodes.values():
        if node.is_alive:
            assert node.stage.n_sessions == 0
            assert node.stage.copy_figures["n_copies"] == 0
