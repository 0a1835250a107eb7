"""Stages with fake engines behind real links: the tokens of one engine, and every refusal."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from contextlib import AsyncExitStack

import pytest
import trio
from support.link_messages import hidden_batch, token_batch
from support.mesh import GREEDY, PIECE_TOKENS, MemoryMesh, memory_mesh, written_tokens

from shardmesh.coordinator.generate import prefill
from shardmesh.coordinator.openings import SessionSettings
from shardmesh.engine.base import EngineInfo, MicroBatch, Output, SamplingSettings, TellToken
from shardmesh.engine.fake import FakeEngine, fake_chain, fake_info
from shardmesh.errors import BusyError, EngineError, ShardmeshError, UnreachableError
from shardmesh.wire.limits import SESSIONS_PER_NODE_MAX
from shardmesh.wire.messages import NextStage, RepairSession

SETTINGS = SessionSettings(n_ctx=200, sampling=GREEDY, piece_tokens=PIECE_TOKENS)


def whole_tokens(prompt: list[int], n_tokens: int) -> list[int]:
    """What one engine with all layers gives."""
    engine = FakeEngine(fake_info(n_batch_tokens_max=256))
    engine.open_sequence(0, SamplingSettings(temperature=0.0))
    tokens, position, given = [], 0, prompt
    for _ in range(n_tokens):
        batch = MicroBatch(sequence=0, position=position, tokens=tuple(given), sample=True)
        (output,) = engine.compute([batch])
        assert output.sampled is not None
        position += len(given)
        given = [output.sampled.token]
        tokens += given
    return tokens


async def until(condition) -> None:  # type: ignore[no-untyped-def]
    """Lets other tasks run until the condition holds; the test's time-out ends it otherwise."""
    while not condition():
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("boundaries", [(0, 4), (0, 2, 4), (0, 1, 2, 3, 4), (0, 3, 4)])
async def test_a_chain_gives_the_tokens_of_one_engine(boundaries: tuple[int, ...]) -> None:
    prompt = [3, 1, 4, 1, 5]
    async with memory_mesh(fake_chain(boundaries)) as mesh:
        async with mesh.router.session(mesh.chain, mesh.links, SETTINGS) as session:
            assert await written_tokens(session, prompt, 12) == whole_tokens(prompt, 12)


async def test_a_prompt_goes_through_in_pieces() -> None:
    prompt = [i % 60 for i in range(5 * PIECE_TOKENS + 3)]
    async with memory_mesh(fake_chain((0, 2, 4))) as mesh:
        async with mesh.router.session(mesh.chain, mesh.links, SETTINGS) as session:
            assert await written_tokens(session, prompt, 3) == whole_tokens(prompt, 3)
        assert mesh.stages[0].counters.n_batches == 6 + 2


async def test_sessions_at_once_do_not_mix() -> None:
    prompts = [[i, i + 1, i + 2] for i in range(4)]
    found: dict[int, list[int]] = {}

    async with memory_mesh(fake_chain((0, 2, 4))) as mesh:

        async def one(number: int) -> None:
            async with mesh.router.session(mesh.chain, mesh.links, SETTINGS) as session:
                found[number] = await written_tokens(session, prompts[number], 8)

        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(one, number)
    assert found == {number: whole_tokens(prompts[number], 8) for number in range(4)}


async def test_timings_name_every_stage() -> None:
    async with memory_mesh(fake_chain((0, 1, 4))) as mesh:
        async with mesh.router.session(mesh.chain, mesh.links, SETTINGS) as session:
            done = await prefill(session, [1, 2])
    assert [(t.layer_start, t.layer_end) for t in done.timings] == [(0, 1), (1, 4)]


async def test_busy_when_all_sequences_are_taken_and_free_again_after() -> None:
    async with memory_mesh([FakeEngine(fake_info(0, 4, 4, n_parallel=1))]) as mesh:
        async with mesh.router.session(mesh.chain, mesh.links, SETTINGS):
            with pytest.raises(BusyError):
                async with mesh.router.session(mesh.chain, mesh.links, SETTINGS):
                    pass
        await until(lambda: mesh.stages[0].n_sessions == 0)
        async with mesh.router.session(mesh.chain, mesh.links, SETTINGS) as session:
            assert await written_tokens(session, [7], 4) == whole_tokens([7], 4)


async def test_one_coordinator_gets_no_more_than_its_share() -> None:
    n_most = SESSIONS_PER_NODE_MAX
    async with memory_mesh([FakeEngine(fake_info(0, 4, 4, n_parallel=n_most + 1))]) as mesh:
        async with AsyncExitStack() as stack:
            for _ in range(n_most):
                await stack.enter_async_context(
                    mesh.router.session(mesh.chain, mesh.links, SETTINGS)
                )
            with pytest.raises(BusyError, match=str(n_most)):
                async with mesh.router.session(mesh.chain, mesh.links, SETTINGS):
                    pass
        await until(lambda: mesh.stages[0].n_sessions == 0)
        mesh.stages[0].sessions_per_node_max = 1
        async with mesh.router.session(mesh.chain, mesh.links, SETTINGS) as session:
            assert await written_tokens(session, [7], 4) == whole_tokens([7], 4)


async def test_a_context_too_long_is_refused_with_its_size() -> None:
    async with memory_mesh(fake_chain((0, 2, 4), n_ctx=64)) as mesh:
        with pytest.raises(ShardmeshError, match="64") as caught:
            async with mesh.router.session(mesh.chain, mesh.links, SETTINGS):
                pass
    assert caught.value.code == "CONTEXT_TOO_LONG"


async def test_another_shard_is_refused() -> None:
    async with memory_mesh(fake_chain((0, 2, 4))) as mesh:
        wrong = dataclasses.replace(mesh.chain.stages[1], layer_start=1)
        chain = dataclasses.replace(mesh.chain, stages=(mesh.chain.stages[0], wrong))
        with pytest.raises(ShardmeshError) as caught:
            async with mesh.router.session(chain, mesh.links, SETTINGS):
                pass
    assert caught.value.code == "WRONG_SHARD"


async def test_a_position_out_of_order_ends_the_session() -> None:
    async with memory_mesh(fake_chain((0, 2, 4))) as mesh:
        async with mesh.router.session(mesh.chain, mesh.links, SETTINGS) as session:
            await prefill(session, [1, 2, 3])
            late = token_batch(session=session.session_id, position=5, tokens=(4,))
            mesh.links[0].send(late)
            with pytest.raises(ShardmeshError) as caught:
                await session.receive()
    assert caught.value.code == "OUT_OF_ORDER"


async def test_a_token_that_does_not_exist_ends_only_its_session() -> None:
    async with memory_mesh(fake_chain((0, 2, 4))) as mesh:
        async with mesh.router.session(mesh.chain, mesh.links, SETTINGS) as good:
            async with mesh.router.session(mesh.chain, mesh.links, SETTINGS) as bad:
                bad.send([1000], sample=True)
                with pytest.raises(ShardmeshError):
                    await bad.receive()
            assert await written_tokens(good, [5], 3) == whole_tokens([5], 3)


async def test_frames_of_another_epoch_are_dropped_and_counted() -> None:
    async with memory_mesh(fake_chain((0, 4))) as mesh:
        async with mesh.router.session(mesh.chain, mesh.links, SETTINGS) as session:
            late = token_batch(session=session.session_id, epoch=7)
            mesh.links[0].send(late)
            assert await written_tokens(session, [5], 3) == whole_tokens([5], 3)
        assert mesh.stages[0].counters.n_late_frames == 1


async def test_two_repairs_that_are_read_at_once_leave_the_stage_well() -> None:
    async with memory_mesh(fake_chain((0, 2, 4))) as mesh:
        async with mesh.router.session(mesh.chain, mesh.links, SETTINGS) as session:
            following = NextStage(peer_id="stage-1", addresses=())
            for epoch in (1, 2):
                repair = RepairSession(
                    session=session.session_id,
                    epoch=epoch,
                    previous_stage=None,
                    next_stage=following,
                    first_stage=None,
                    last_stage=None,
                    branches=(),
                )
                mesh.links[0].send(repair)
            await until(lambda: mesh.stages[0].counters.n_sessions_repaired == 2)
        async with mesh.router.session(mesh.chain, mesh.links, SETTINGS) as session:
            assert await written_tokens(session, [7], 4) == whole_tokens([7], 4)


async def test_hidden_states_from_a_stranger_close_the_link() -> None:
    async with memory_mesh(fake_chain((0, 2, 4))) as mesh:
        async with mesh.router.session(mesh.chain, mesh.links, SETTINGS) as session:
            forged = hidden_batch(session=session.session_id)
            mesh.links[1].send(forged, bytes(4 * 8))
            with pytest.raises(UnreachableError) as caught:
                await session.receive()
    assert caught.value.code == "STAGE_LOST"


async def test_hidden_states_that_are_not_finite_end_the_session() -> None:
    import numpy as np

    async with memory_mesh(fake_chain((0, 2, 4))) as mesh:
        async with mesh.router.session(mesh.chain, mesh.links, SETTINGS) as session:
            poisoned = hidden_batch(session=session.session_id)
            body = np.full((1, 8), np.nan, dtype="<f4").tobytes()
            mesh.link_between(0).send(poisoned, body)
            with pytest.raises(ShardmeshError) as caught:
                await session.receive()
    assert caught.value.code == "NOT_FINITE"


async def test_an_engine_failure_is_reported_and_the_stage_goes_on() -> None:
    failures = [EngineError("llama.cpp said no")]

    def fail_once(n_rows: int) -> None:
        if failures:
            raise failures.pop()

    first, _ = fake_chain((0, 2, 4))
    second = FakeEngine(fake_info(2, 4, 4), layer_start=2, before_compute=fail_once)
    async with memory_mesh([first, second]) as mesh:
        async with mesh.router.session(mesh.chain, mesh.links, SETTINGS) as session:
            with pytest.raises(EngineError, match="said no"):
                await prefill(session, [1])
        async with mesh.router.session(mesh.chain, mesh.links, SETTINGS) as session:
            assert await written_tokens(session, [9], 3) == whole_tokens([9], 3)


async def test_a_lost_link_between_stages_is_told_and_mended_for_the_next_session() -> None:
    async with memory_mesh(fake_chain((0, 2, 4))) as mesh:
        async with mesh.router.session(mesh.chain, mesh.links, SETTINGS) as session:
            await prefill(session, [1])
            mesh.link_between(0).close()
            with pytest.raises(ShardmeshError) as caught:
                await session.receive()
        assert (caught.value.code, caught.value.blame) == ("STAGE_LOST", "moment")
        async with mesh.router.session(mesh.chain, mesh.links, SETTINGS) as session:
            assert await written_tokens(session, [9], 3) == whole_tokens([9], 3)


async def test_a_coordinator_that_goes_away_frees_its_sessions() -> None:
    async with memory_mesh(fake_chain((0, 2, 4))) as mesh:
        with pytest.raises(UnreachableError):
            await _lose_all_links(mesh)
        await until(lambda: all(stage.n_sessions == 0 for stage in mesh.stages))


async def _lose_all_links(mesh: MemoryMesh) -> None:
    async with mesh.router.session(mesh.chain, mesh.links, SETTINGS) as session:
        await prefill(session, [1])
        for link in mesh.links:
            link.close()
        await session.receive()


class RecordingFake(FakeEngine):
    """Waits at a gate before it computes, and notes how many micro-batches came at once."""

    def __init__(self, info: EngineInfo) -> None:
        super().__init__(info)
        self.gate = threading.Event()
        self.gate.set()
        self.numbers: list[int] = []

    def compute(
        self, batch: Sequence[MicroBatch], tell_token: TellToken | None = None
    ) -> list[Output]:
        self.gate.wait(10)
        self.numbers.append(len(batch))
        return super().compute(batch, tell_token)


async def test_a_stage_advances_its_share_of_the_sessions_at_once() -> None:
    prompt, n_sessions = [7, 8, 9], 4
    info = dataclasses.replace(fake_info(0, 2, 4), numbers_at_once=(2, 3, 4))
    first = RecordingFake(info)
    _, last = fake_chain((0, 2, 4))
    expected = whole_tokens(prompt, 2)
    async with memory_mesh([first, last]) as mesh, AsyncExitStack() as stack:
        sessions = [
            await stack.enter_async_context(mesh.router.session(mesh.chain, mesh.links, SETTINGS))
            for _ in range(n_sessions)
        ]
        for session in sessions:
            assert await written_tokens(session, prompt, 1) == expected[:1]
        first.gate.clear()
        first.numbers.clear()
        for session in sessions:
            session.send(expected[:1], sample=True)
        waiting = mesh.stages[0].sessions
        await until(lambda: all(s.n_received == len(prompt) + 1 for s in waiting))
        first.gate.set()
        for session in sessions:
            done = await session.receive()
            assert done.sampled is not None
            assert done.sampled.token == expected[1]
    # Half of them, for there are two stages; one or two may have been taken before the others came.
    assert sum(first.numbers) == n_sessions
    assert max(first.numbers) == n_sessions // 2
