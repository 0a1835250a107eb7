"""A last stage that samples what is no token of the vocabulary is wrong; nobody who asked is."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
import trio
import trio.testing
from support.link_messages import token_batch
from support.mesh import PIECE_TOKENS, MemoryMesh, memory_mesh
from support.replicated import (
    BOUNDARIES,
    SAMPLED,
    assert_nothing_left,
    engines,
    loop_worker,
    one_engine_tokens,
)

from shardmesh.coordinator.generate import prefill
from shardmesh.coordinator.openings import SessionSettings
from shardmesh.coordinator.session import Session
from shardmesh.engine.base import SampledToken
from shardmesh.engine.fake import FakeEngine, fake_info
from shardmesh.errors import UnreachableError

N_CTX = 200
N_VOCAB = 64
N_TOKENS = 12
PROMPT = [i % 60 for i in range(PIECE_TOKENS + 5)]
WITH_ALTERNATIVES = msgspec.structs.replace(SAMPLED, n_top_logprobs=2)
EXPECTED = one_engine_tokens(PROMPT, N_TOKENS, temperature=0.9, seed=7, n_ctx=N_CTX)


class OtherVocabulary(FakeEngine):
    """Behind the first few its tokens are of another vocabulary."""

    n_left = 4
    where = "token"

    def _sample(self, logits, state):  # type: ignore[no-untyped-def]
        sampled: SampledToken = super()._sample(logits, state)
        self.n_left -= 1
        if self.n_left > 0:
            return sampled
        if self.where == "token":
            return dataclasses.replace(sampled, token=N_VOCAB)
        first, (_, logprob) = sampled.top_logprobs
        return dataclasses.replace(sampled, top_logprobs=(first, (N_VOCAB, logprob)))


def with_wrong_last_stage(where: str = "token") -> list[FakeEngine]:
    start, end = BOUNDARIES[-2:]
    wrong = OtherVocabulary(fake_info(start, end, end, n_ctx=N_CTX), layer_start=start)
    wrong.where = where
    return [*engines(n_ctx=N_CTX)[:-1], wrong]


def session_of(mesh: MemoryMesh, *, hands_on: bool = False):  # type: ignore[no-untyped-def]
    settings = SessionSettings(
        n_ctx=N_CTX,
        n_vocab=N_VOCAB,
        sampling=WITH_ALTERNATIVES,
        piece_tokens=PIECE_TOKENS,
        hands_on=hands_on,
    )
    return mesh.router.session(
        mesh.chain, mesh.links, settings, replacements=mesh.replacements(timeout_s=5.0)
    )


async def write(session: Session) -> list[int]:
    done = await prefill(session, PROMPT, hand=True)
    tokens: list[int] = []
    while True:
        assert done.sampled is not None
        tokens.append(done.sampled.token)
        if len(tokens) == N_TOKENS:
            return tokens
        session.send([tokens[-1]], sample=True, hand=True)
        done = await session.receive()


@pytest.mark.parametrize("where", ["token", "alternatives"])
@pytest.mark.parametrize("hands_on", [True, False])
async def test_another_replica_takes_over_and_the_text_goes_on(
    where: str, hands_on: bool, autojump_clock: trio.testing.MockClock
) -> None:
    spares = [[engine] for engine in engines(n_ctx=N_CTX)]
    async with memory_mesh(with_wrong_last_stage(where), spares, loop_worker) as mesh:
        async with session_of(mesh, hands_on=hands_on) as session:
            assert await write(session) == EXPECTED
            (repair,) = session.repairs
            assert repair.lost_peer_id == "stage-2"
        await trio.sleep(1)
        assert_nothing_left(mesh)


async def test_without_another_replica_it_is_the_moments_fault(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with memory_mesh(with_wrong_last_stage(), (), loop_worker) as mesh:
        async with session_of(mesh) as session:
            with pytest.raises(UnreachableError) as caught:
                await write(session)
    assert caught.value.code == "STAGE_LOST"


async def test_one_that_is_only_handed_on_is_not_taken(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The first stage would refuse to compute it, which looks like a fault of whoever asked."""
    async with memory_mesh(engines(n_ctx=N_CTX), (), loop_worker) as mesh:
        async with session_of(mesh, hands_on=True) as session:
            (lying,) = mesh.nodes["stage-2"].stage.sessions
            lying.first_link = None
            done = await prefill(session, PROMPT, hand=True)
            assert done.sampled is not None
            handed = token_batch(
                session=session.session_id,
                epoch=session.epoch,
                position=len(PROMPT),
                tokens=(N_VOCAB,),
                hand=True,
            )
            (await mesh.link("stage-2", "stage-0")).send(handed)
            await trio.sleep(1)
            session.send([done.sampled.token], sample=True)
            done = await session.receive()
            assert done.sampled is not None
            assert done.sampled.token == EXPECTED[1]
