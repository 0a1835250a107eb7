"""Replicas without a free sequence: others take over, and nobody asks them again and again."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from support.mesh import GREEDY, PIECE_TOKENS
from support.repaired import PROMPT, session_of, whole_tokens, write
from support.replicated import TOKEN_S, replicated_mesh

from shardmesh.coordinator.generate import prefill
from shardmesh.coordinator.openings import SessionSettings
from shardmesh.coordinator.replacements import ASIDE_SHORT_S
from shardmesh.errors import BusyError

N_REQUESTS = 10


async def test_a_busy_replica_is_passed_over(autojump_clock: trio.testing.MockClock) -> None:
    async with replicated_mesh(n_spares=2, n_parallel=1) as mesh:
        busy = mesh.nodes["stage-1-1"]
        chain = mesh.chain
        names = ("stage-0-1", "stage-1-1", "stage-2-1")
        other = type(chain)(tuple(mesh.nodes[name].replica for name in names))
        links = [await mesh.link("coordinator", name) for name in names]
        settings = SessionSettings(n_ctx=300, sampling=GREEDY, piece_tokens=PIECE_TOKENS)
        async with mesh.router.session(other, links, settings):
            assert busy.stage.n_sessions == 1
            async with session_of(mesh) as session:
                kill = {3: lambda: mesh.kill("stage-1")}
                assert await write(session, before=kill) == whole_tokens()
                assert session.repairs[-1].new_peer_id == "stage-1-2"


async def test_all_that_are_full_are_exchanged_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with replicated_mesh(n_parallel=1) as mesh:
        async with session_of(mesh):
            async with session_of(mesh) as session:
                assert await write(session) == whole_tokens()
                assert session.epoch == 1
                assert {repair.code for repair in session.repairs} == {"BUSY"}
                names = [stage.peer_id for stage in session.chain.stages]
                assert names == ["stage-0-1", "stage-1-1", "stage-2-1"]


async def test_a_crowd_asks_a_full_mesh_once_and_takes_the_next_free_place(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Sessions that go on meanwhile do not make a full replica look as if it had room."""

    async def talk(until: trio.Event) -> None:
        async with session_of(mesh) as session:
            done = await prefill(session, PROMPT)
            while not until.is_set():
                assert done.sampled is not None
                session.send([done.sampled.token], sample=True)
                done = await session.receive()

    async with replicated_mesh(n_parallel=1) as mesh, trio.open_nursery() as nursery:
        enough = [trio.Event(), trio.Event()]
        for event in enough:
            nursery.start_soon(talk, event)
        await trio.sleep(0.5)
        stages = [node.stage for node in mesh.nodes.values()]
        assert [stage.n_sessions for stage in stages] == [1] * len(stages)
        n_before = sum(stage.counters.n_sessions_refused for stage in stages)
        for _ in range(N_REQUESTS):
            with pytest.raises(BusyError):
                async with session_of(mesh):
                    pass
            await trio.sleep(TOKEN_S)
        n_refused = sum(stage.counters.n_sessions_refused for stage in stages) - n_before
        # Each replica is found full once, which is one round more.
        assert n_refused <= (N_REQUESTS + len(stages)) * len(mesh.chain.stages)
        enough[0].set()
        await trio.sleep(ASIDE_SHORT_S / 5)
        async with session_of(mesh) as session:
            assert await write(session) == whole_tokens()
        enough[1].set()
