"""Sessions that begin behind the prompts of others: the same tokens, fewer of them computed."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
import trio
import trio.testing
from sim.run import undisturbed
from support.loop_worker import LoopWorker
from support.mesh import GREEDY, PIECE_TOKENS, MemoryMesh, memory_mesh, written_tokens

from shardmesh.coordinator.chain import Chain
from shardmesh.coordinator.generate import prefill
from shardmesh.coordinator.openings import SessionSettings
from shardmesh.coordinator.prefixes import PromptPrefix
from shardmesh.coordinator.session import Session
from shardmesh.engine.fake import FakeEngine, fake_chain, fake_info
from shardmesh.errors import EngineError, ShardmeshError
from shardmesh.listener.kept_sequences import KeptSequences
from shardmesh.wire.messages import Message, OpenSession, PrefixPiece, Sampling, TrimSession

N_TOKENS = 6
SAMPLED = msgspec.structs.replace(GREEDY, temperature=0.9, seed=N_TOKENS)
KEY = bytes(32)
COMMON = tuple(i % 61 for i in range(2 * PIECE_TOKENS))


def session_of(
    mesh: MemoryMesh,
    prompt: tuple[int, ...],
    *,
    key: bytes = KEY,
    sampling: Sampling = SAMPLED,
    piece_tokens: int = PIECE_TOKENS,
):  # type: ignore[no-untyped-def]
    settings = SessionSettings(
        n_ctx=200, sampling=sampling, piece_tokens=piece_tokens, prefix=PromptPrefix(prompt, key)
    )
    return mesh.router.session(mesh.chain, mesh.links, settings, mesh.replacements())


async def write(session: Session, prompt: tuple[int, ...]) -> list[int]:
    return await written_tokens(session, prompt, N_TOKENS)


async def answer(
    mesh: MemoryMesh,
    prompt: tuple[int, ...],
    *,
    key: bytes = KEY,
    piece_tokens: int = PIECE_TOKENS,
) -> int:
    """Writes, holds the tokens against those of one engine, and tells how many were reused."""
    async with session_of(mesh, prompt, key=key, piece_tokens=piece_tokens) as session:
        assert await write(session, prompt) == undisturbed(prompt, N_TOKENS, 0.9)
        n_reused = session.n_reused
    await until_free(mesh)
    return n_reused


async def until_free(mesh: MemoryMesh) -> None:
    while any(node.stage.n_sessions for node in mesh.nodes.values() if node.is_alive):
        await trio.lowlevel.checkpoint()


def free(mesh: MemoryMesh) -> list[int]:
    return [stage.sessions.sequences.n_free for stage in mesh.stages]


async def test_a_second_prompt_begins_behind_what_it_shares(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with memory_mesh(fake_chain((0, 2, 4)), make_worker=LoopWorker) as mesh:
        assert await answer(mesh, (*COMMON, 1, 2, 3)) == 0
        n_before = mesh.stages[0].counters.n_tokens
        assert await answer(mesh, (*COMMON, 4, 5)) == len(COMMON)
        assert mesh.stages[0].counters.n_tokens - n_before == 2 + N_TOKENS - 1
        assert mesh.stages[1].counters.n_tokens_reused == len(COMMON)
        assert mesh.stages[1].counters.n_sequences_kept == 1
        assert free(mesh) == [4, 4], "a kept sequence is a free one"


async def test_pieces_of_another_length_share_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Their bits are others: each length finds only what was computed in pieces of its own."""
    async with memory_mesh(fake_chain((0, 2, 4)), make_worker=LoopWorker) as mesh:
        assert await answer(mesh, (*COMMON, 1)) == 0
        assert await answer(mesh, (*COMMON, 2), piece_tokens=64) == 0
        assert await answer(mesh, (*COMMON, 3), piece_tokens=64) == 64
        assert await answer(mesh, (*COMMON, 4), piece_tokens=16) == 0
        assert await answer(mesh, (*COMMON[:48], 5), piece_tokens=16) == 48
        assert await answer(mesh, (*COMMON, 6)) == len(COMMON)


async def test_the_same_prompt_again_computes_its_last_piece(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with memory_mesh(fake_chain((0, 2, 4)), make_worker=LoopWorker) as mesh:
        assert await answer(mesh, COMMON) == 0
        assert await answer(mesh, COMMON) == len(COMMON) - PIECE_TOKENS
        assert await answer(mesh, (*COMMON, 1)) == len(COMMON)


async def test_two_running_sessions_share(autojump_clock: trio.testing.MockClock) -> None:
    async with memory_mesh(fake_chain((0, 1, 4)), make_worker=LoopWorker) as mesh:
        first, second = (*COMMON, 1), (*COMMON, 2, 3)
        async with session_of(mesh, first) as one:
            done = await prefill(one, first)
            async with session_of(mesh, second) as other:
                assert other.n_reused == len(COMMON)
                assert await write(other, second) == undisturbed(second, N_TOKENS, 0.9)
            assert done.sampled is not None
            one.send([done.sampled.token], sample=True)
            following = (await one.receive()).sampled
        assert following is not None
        both = [done.sampled.token, following.token]
        assert both == undisturbed(first, N_TOKENS, 0.9)[:2]


async def test_who_is_another_asker_shares_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async with memory_mesh(fake_chain((0, 2, 4)), make_worker=LoopWorker) as mesh:
        await answer(mesh, (*COMMON, 1), key=bytes(32))
        assert await answer(mesh, (*COMMON, 1), key=bytes(31) + b"1") == 0


async def test_no_answer_is_reused_only_prompts(autojump_clock: trio.testing.MockClock) -> None:
    """A generated token was computed by itself, so the next prompt computes it again."""
    prompt = COMMON[: PIECE_TOKENS + 30]
    async with memory_mesh(fake_chain((0, 2, 4)), make_worker=LoopWorker) as mesh:
        await answer(mesh, prompt)
        longer = prompt + tuple(undisturbed(prompt, N_TOKENS, 0.9)) + (1, 2)
        assert await answer(mesh, longer) == PIECE_TOKENS


async def test_the_least_recently_used_goes_first(autojump_clock: trio.testing.MockClock) -> None:
    prompts = [tuple((7 * i + n) % 61 for i in range(40)) for n in range(3)]
    engines = [FakeEngine(fake_info(0, 4, 4, n_parallel=2))]
    async with memory_mesh(engines, make_worker=LoopWorker) as mesh:
        await answer(mesh, prompts[0])
        await answer(mesh, prompts[1])
        assert await answer(mesh, prompts[0]) == PIECE_TOKENS
        await answer(mesh, prompts[2])
        assert await answer(mesh, prompts[0]) == PIECE_TOKENS
        assert await answer(mesh, prompts[1]) == 0


async def test_stages_that_hold_different_parts_begin_together(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The second stage has lost all of it, then a part."""
    engines = fake_chain((0, 2, 4))
    async with memory_mesh(engines, make_worker=LoopWorker) as mesh:
        await answer(mesh, (*COMMON, 1))
        mesh.stages[1].sessions.sequences = KeptSequences(4, 256)
        assert await answer(mesh, (*COMMON, 2)) == 0
        mesh.stages[1].sessions.sequences = KeptSequences(4, 256)
        await answer(mesh, (*COMMON[:PIECE_TOKENS], 60, 60))
        assert await answer(mesh, (*COMMON, 3)) == PIECE_TOKENS


async def test_a_stage_that_hears_late_what_to_forget_is_waited_for(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Hidden states come another way, and must not be there before."""
    async with memory_mesh(fake_chain((0, 2, 4)), make_worker=LoopWorker) as mesh:
        await answer(mesh, (*COMMON, 1))
        mesh.stages[0].sessions.sequences = KeptSequences(4, 256)
        send = mesh.links[1].send

        async def send_later(message: Message) -> None:
            await trio.sleep(1.0)
            send(message)

        def send_slowly(message: Message, body: bytes | memoryview = b"") -> None:
            if isinstance(message, TrimSession):
                mesh.nursery.start_soon(send_later, message)
            else:
                send(message, body)

        mesh.links[1].send = send_slowly  # type: ignore[method-assign]
        async with session_of(mesh, COMMON) as session:
            assert await write(session, COMMON) == undisturbed(COMMON, N_TOKENS, 0.9)
            assert session.repairs == []


async def test_a_prefill_that_was_cancelled_leaves_what_was_computed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    def slow(calculation):  # type: ignore[no-untyped-def]
        return LoopWorker(calculation, lambda n_tokens: 1.0)

    async with memory_mesh(fake_chain((0, 4)), make_worker=slow) as mesh:
        with trio.move_on_after(1.5):
            await answer(mesh, (*COMMON, 1))
        await until_free(mesh)
        assert await answer(mesh, (*COMMON, 2)) == PIECE_TOKENS


async def test_what_a_lost_coordinator_leaves_is_kept(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with memory_mesh(fake_chain((0, 4)), make_worker=LoopWorker) as mesh:
        async with session_of(mesh, (*COMMON, 1)) as session:
            await prefill(session, (*COMMON, 1))
            mesh.links[0].close()
            await until_free(mesh)
        mesh.links[:] = [await mesh.link("coordinator", "stage-0")]
        assert await answer(mesh, (*COMMON, 2)) == len(COMMON)


async def test_a_failed_session_leaves_nothing(autojump_clock: trio.testing.MockClock) -> None:
    fails = False

    def maybe_fail(n_rows: int) -> None:
        if fails:
            raise EngineError("no")

    engine = FakeEngine(fake_info(0, 4, 4), before_compute=maybe_fail)
    async with memory_mesh([engine], make_worker=LoopWorker) as mesh:
        prefix = PromptPrefix((*COMMON, 1), KEY)
        settings = SessionSettings(
            n_ctx=200, sampling=SAMPLED, piece_tokens=PIECE_TOKENS, prefix=prefix
        )
        async with mesh.router.session(mesh.chain, mesh.links, settings) as session:
            await prefill(session, (*COMMON, 1))
            fails = True
            session.send([1], sample=True)
            with pytest.raises(EngineError):
                await session.receive()
        fails = False
        assert await answer(mesh, (*COMMON, 1)) == 0


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("in_prefill", [True, False])
async def test_a_stage_that_dies_in_a_session_that_began_behind_a_prefix(
    number: int, in_prefill: bool, autojump_clock: trio.testing.MockClock
) -> None:
    def worker(calculation):  # type: ignore[no-untyped-def]
        return LoopWorker(calculation, lambda n_tokens: 0.01 * n_tokens)

    spares = [[engine] for engine in fake_chain((0, 1, 3, 4))]
    async with memory_mesh(fake_chain((0, 1, 3, 4)), spares, worker) as mesh:
        await answer(mesh, (*COMMON, 1))
        prompt = COMMON + tuple(i % 50 for i in range(2 * PIECE_TOKENS + 5))
        async with trio.open_nursery() as nursery:

            async def kill() -> None:
                await trio.sleep(0.4)
                mesh.kill(f"stage-{number}")

            async with session_of(mesh, prompt) as session:
                assert session.n_reused == len(COMMON)
                if in_prefill:
                    nursery.start_soon(kill)
                done = await prefill(session, prompt)
                if not in_prefill:
                    mesh.kill(f"stage-{number}")
                assert done.sampled is not None
                tokens = [done.sampled.token]
                while len(tokens) < N_TOKENS:
                    session.send([tokens[-1]], sample=True)
                    done = await session.receive()
                    assert done.sampled is not None
                    tokens.append(done.sampled.token)
                assert tokens == undisturbed(prompt, N_TOKENS, 0.9)
                assert len(session.repairs) == 1
        await until_free(mesh)


async def test_behind_another_stage_nothing_is_reused(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """What the first replica may have sent wrongly is not used in a chain without it."""
    spares = [[engine] for engine in fake_chain((0, 2, 4))]
    async with memory_mesh(fake_chain((0, 2, 4)), spares, LoopWorker) as mesh:
        await answer(mesh, (*COMMON, 1))
        other = mesh.nodes["stage-0-1"].replica
        mesh.links[0] = await mesh.link("coordinator", other.peer_id)
        mesh.chain = Chain((other, mesh.chain.stages[1]))
        assert await answer(mesh, (*COMMON, 2)) == 0
        assert await answer(mesh, (*COMMON, 3)) == len(COMMON)


async def test_what_came_from_a_replacement_is_not_kept(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Its names would be those of the stage that was there when the session was opened."""

    def worker(calculation):  # type: ignore[no-untyped-def]
        return LoopWorker(calculation, lambda n_tokens: 0.01 * n_tokens)

    spares = [[engine] for engine in fake_chain((0, 2, 4))]
    async with memory_mesh(fake_chain((0, 2, 4)), spares, worker) as mesh:
        async with session_of(mesh, (*COMMON, 1)) as session, trio.open_nursery() as nursery:

            async def kill() -> None:
                await trio.sleep(0.1)
                mesh.kill("stage-0")

            nursery.start_soon(kill)
            await prefill(session, (*COMMON, 1))
            assert len(session.repairs) == 1
        await until_free(mesh)
        assert mesh.stages[1].counters.n_sequences_kept == 0


async def test_a_stage_that_claims_too_much_is_told_to_forget_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """One that holds a whole prompt is asked for its last token all the same."""
    async with memory_mesh(fake_chain((0, 4)), make_worker=LoopWorker) as mesh:
        await answer(mesh, COMMON)
        async with session_of(mesh, COMMON) as session:
            assert session.n_sent == session.n_reused == PIECE_TOKENS
            (held,) = mesh.stages[0].sessions
            while held.n_received != PIECE_TOKENS:
                await trio.lowlevel.checkpoint()


async def test_pieces_out_of_order_are_refused(autojump_clock: trio.testing.MockClock) -> None:
    async with memory_mesh(fake_chain((0, 4)), make_worker=LoopWorker) as mesh:

        class Twisted(PromptPrefix):
            def pieces_for(
                self, stages: Sequence[str], piece_tokens: int
            ) -> tuple[PrefixPiece, ...]:
                return tuple(reversed(super().pieces_for(stages, piece_tokens)))

        settings = SessionSettings(
            n_ctx=200, sampling=SAMPLED, piece_tokens=PIECE_TOKENS, prefix=Twisted(COMMON, KEY)
        )
        with pytest.raises(ShardmeshError) as caught:
            async with mesh.router.session(mesh.chain, mesh.links, settings):
                pass
    assert caught.value.code == "OUT_OF_ORDER"


async def test_without_a_prefix_nothing_is_named(autojump_clock: trio.testing.MockClock) -> None:
    async with memory_mesh(fake_chain((0, 4)), make_worker=LoopWorker) as mesh:
        settings = SessionSettings(n_ctx=200, sampling=SAMPLED, piece_tokens=PIECE_TOKENS)
        for _ in range(2):
            async with mesh.router.session(mesh.chain, mesh.links, settings) as session:
                assert session.n_reused == 0
                await write(session, (*COMMON, 1))
                (opened,) = (s.opened_by for s in mesh.stages[0].sessions)
                assert isinstance(opened, OpenSession)
                assert opened.prefix == ()
            await until_free(mesh)
        assert mesh.stages[0].counters.n_sequences_kept == 0
