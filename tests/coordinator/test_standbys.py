"""A stage that stood by takes over: the same tokens, and only the tail is computed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from support.mesh import PIECE_TOKENS, MemoryMesh, memory_mesh, written_tokens
from support.replicated import (
    SAMPLED,
    CountingEngine,
    assert_nothing_left,
    engines,
    loop_worker,
    one_engine_tokens,
    replicated_mesh,
)

from shardmesh.coordinator.openings import SessionSettings
from shardmesh.coordinator.recovery import Held, begin_behind_copies, plan_replay
from shardmesh.coordinator.session import Session
from shardmesh.listener.copying import N_UNCERTAIN_MAX
from shardmesh.wire.messages import Sampling

PROMPT = [i % 60 for i in range(10 * PIECE_TOKENS + 5)]
N_CTX = 512
N_TOKENS = 60
LAST_PIECE = len(PROMPT) // PIECE_TOKENS * PIECE_TOKENS


def whole_tokens(sampling: Sampling = SAMPLED, n_tokens: int = N_TOKENS) -> list[int]:
    """What one engine with all layers gives."""
    return one_engine_tokens(PROMPT, n_tokens, temperature=sampling.temperature, seed=sampling.seed)


@asynccontextmanager
async def session_of(mesh: MemoryMesh) -> AsyncIterator[Session]:
    """A session whose standbys are found before it goes on."""
    settings = SessionSettings(
        n_ctx=N_CTX, sampling=SAMPLED, piece_tokens=PIECE_TOKENS, standby=True
    )
    async with mesh.router.session(
        mesh.chain, mesh.links, settings, replacements=mesh.replacements()
    ) as session:
        assert session.standbys is not None
        mesh.nursery.start_soon(session.standbys.run)
        await trio.sleep(0.1)
        yield session


def engine_of(mesh: MemoryMesh, name: str) -> CountingEngine:
    engine = mesh.nodes[name].stage._engine
    assert isinstance(engine, CountingEngine)
    return engine


@pytest.mark.parametrize("number", [0, 1, 2])
async def test_a_standby_computes_the_tail_only(
    number: int, autojump_clock: trio.testing.MockClock
) -> None:
    async with replicated_mesh() as mesh:
        async with session_of(mesh) as session:
            assert session.standbys is not None
            assert {n: r.peer_id for n, r in session.standbys.ready().items()} == {
                n: f"stage-{n}-1" for n in range(3)
            }
            kill = {N_TOKENS // 2: lambda: mesh.kill(f"stage-{number}")}
            assert await written_tokens(session, PROMPT, N_TOKENS, kill) == whole_tokens()
            (repair,) = session.repairs
            assert repair.new_peer_id == f"stage-{number}-1"
            n_all = len(PROMPT) + N_TOKENS - 1
            # The last stage samples again all that was sampled; the others lack very little.
            assert repair.n_copied >= LAST_PIECE - 2 * PIECE_TOKENS
            if number < 2:
                assert (
                    repair.n_copied >= len(PROMPT) + N_TOKENS // 2 - N_UNCERTAIN_MAX - PIECE_TOKENS
                )
            spare = engine_of(mesh, f"stage-{number}-1")
            assert spare.n_computed == n_all - repair.n_copied
            for other in {0, 1, 2} - {number}:  # nobody else computes anything again
                assert engine_of(mesh, f"stage-{other}").n_computed == n_all
            stage = mesh.nodes[f"stage-{number}-1"].stage
            assert stage.counters.n_copies_used == 1
        await trio.testing.wait_all_tasks_blocked()
        assert_nothing_left(mesh)


@pytest.mark.parametrize("number", [0, 1, 2])
async def test_a_second_standby_follows_the_first(
    number: int, autojump_clock: trio.testing.MockClock
) -> None:
    async with replicated_mesh(n_spares=2) as mesh:
        async with session_of(mesh) as session:
            kills = {
                5: lambda: mesh.kill(f"stage-{number}"),
                50: lambda: mesh.kill(session.chain.stages[number].peer_id),
            }
            assert await written_tokens(session, PROMPT, N_TOKENS, kills) == whole_tokens()
            assert [repair.lost_peer_id for repair in session.repairs] == [
                f"stage-{number}",
                f"stage-{number}-1",
            ]
            assert all(r.n_copied >= LAST_PIECE - 2 * PIECE_TOKENS for r in session.repairs)
        await trio.testing.wait_all_tasks_blocked()
        assert_nothing_left(mesh)


async def test_all_stages_at_once(autojump_clock: trio.testing.MockClock) -> None:
    async with replicated_mesh() as mesh:
        async with session_of(mesh) as session:

            def kill_all() -> None:
                for number in range(3):
                    mesh.kill(f"stage-{number}")

            assert await written_tokens(session, PROMPT, N_TOKENS, {20: kill_all}) == whole_tokens()
            assert len(session.repairs) == 3
        await trio.testing.wait_all_tasks_blocked()
        assert_nothing_left(mesh)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("after_s", [0.05, 0.21, 0.33])
async def test_a_stage_killed_in_the_prompt(
    number: int, after_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    """What is under way behind it lies before what was copied, sometimes."""
    async with replicated_mesh() as mesh:
        async with session_of(mesh) as session:

            async def kill() -> None:
                await trio.sleep(after_s)
                mesh.kill(f"stage-{number}")

            mesh.nursery.start_soon(kill)
            assert await written_tokens(session, PROMPT, N_TOKENS, {}) == whole_tokens()
            assert len(session.repairs) == 1
        await trio.testing.wait_all_tasks_blocked()
        assert_nothing_left(mesh)


async def test_a_standby_that_dies_is_replaced_by_another(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with replicated_mesh(n_spares=2) as mesh:
        async with session_of(mesh) as session:
            assert session.standbys is not None
            kills = {
                3: lambda: mesh.kill("stage-1-1"),
                40: lambda: mesh.kill("stage-1"),
            }
            assert await written_tokens(session, PROMPT, N_TOKENS, kills) == whole_tokens()
            (repair,) = session.repairs
            assert repair.new_peer_id == "stage-1-2"
            assert repair.n_copied > LAST_PIECE - N_UNCERTAIN_MAX
        await trio.testing.wait_all_tasks_blocked()
        assert_nothing_left(mesh)


async def test_without_a_replica_nobody_stands_by(autojump_clock: trio.testing.MockClock) -> None:
    async with memory_mesh(engines(), (), loop_worker) as mesh, session_of(mesh) as session:
        assert session.standbys is not None
        assert await written_tokens(session, PROMPT, N_TOKENS, {}) == whole_tokens()
        assert session.standbys.ready() == {}


async def test_a_replica_that_computes_otherwise_gets_no_copy(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with replicated_mesh() as mesh:
        node = mesh.nodes["stage-1-1"]
        object.__setattr__(node.replica, "fingerprint", "another")
        async with session_of(mesh) as session:
            assert session.standbys is not None
            kill = {10: lambda: mesh.kill("stage-1")}
            assert await written_tokens(session, PROMPT, N_TOKENS, kill) == whole_tokens()
            assert set(session.standbys.ready()) == {0, 2}
            (repair,) = session.repairs
            assert repair.n_copied == 0


async def test_a_draining_replica_takes_no_copy(autojump_clock: trio.testing.MockClock) -> None:
    async with replicated_mesh() as mesh:
        mesh.nodes["stage-0-1"].stage.is_draining = True
        async with session_of(mesh) as session:
            assert session.standbys is not None
            assert set(session.standbys.ready()) == {1, 2}
            assert await written_tokens(session, PROMPT, N_TOKENS, {}) == whole_tokens()


@st.composite
def failures(draw: st.DrawFn) -> tuple[list[Held], set[int], list[int], int, int]:
    """What the stages of a chain hold when some were replaced by their standbys."""
    n_prompt = draw(st.integers(1, 200))
    starts = [*range(0, n_prompt, 32)]
    n_unsampled = starts[-1]
    starts += range(n_prompt, n_prompt + draw(st.integers(0, 60)) + 1)
    n_stages = draw(st.integers(1, 4))
    fresh = draw(st.sets(st.integers(0, n_stages - 1), min_size=1))
    received = sorted(draw(st.lists(st.sampled_from(starts), min_size=n_stages, max_size=n_stages)))
    n_done = draw(st.sampled_from([s for s in starts if s <= received[0]]))
    held = []
    for number in range(n_stages):
        n_received = received[n_stages - 1 - number]
        if number in fresh:
            n_copied = draw(st.integers(0, starts[-1]))
            held.append(Held(n_copied, n_copied, n_copied))
        else:
            held.append(Held(n_received, n_received, 0))
    return held, fresh, starts, n_done, n_unsampled


@given(failures())
def test_nobody_begins_behind_what_others_lack(
    failure: tuple[list[Held], set[int], list[int], int, int],
) -> None:
    held, fresh, starts, n_done, n_unsampled = failure
    begun = begin_behind_copies(held, fresh, starts, n_done=n_done, n_unsampled=n_unsampled)
    for number, (has, begins) in enumerate(zip(held, begun, strict=True)):
        if number not in fresh:
            assert begins == has
            continue
        assert begins.n_received in starts
        assert begins.n_received <= has.n_received
        assert begins.n_received == begins.n_computed == begins.kept_from
    if len(held) - 1 in fresh:
        assert begun[-1].n_received <= min(n_unsampled, n_done)
    assert not plan_replay(begun, n_done).restart  # everybody can send what is lacking


@given(failures())
def test_a_copy_is_used_as_far_as_it_helps(
    failure: tuple[list[Held], set[int], list[int], int, int],
) -> None:
    held, fresh, starts, n_done, n_unsampled = failure
    begun = begin_behind_copies(held, fresh, starts, n_done=n_done, n_unsampled=n_unsampled)
    needed = [*(each.n_received for each in begun[1:]), min(n_done, n_unsampled)]
    for number in fresh:
        n_most = min(held[number].n_received, needed[number])
        assert begun[number].n_received == max(s for s in starts if s <= n_most)
