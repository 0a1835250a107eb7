"""Replicas that compute something else than they say: they are found out and left."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from support.mesh import memory_mesh
from support.repaired import session_of, whole_tokens, write
from support.replicated import (
    assert_nothing_left,
    engines,
    loop_worker,
    replicated_mesh,
    wrong_last_stage,
)

from shardmesh.errors import UnreachableError


@pytest.mark.parametrize("n_tokens", [1, 2, 40])
async def test_a_replacement_that_gives_other_tokens_than_there_were_is_set_aside(
    n_tokens: int, autojump_clock: trio.testing.MockClock
) -> None:
    """With 40 tokens there are more results than are sent again without a word from here."""
    spares = [[], [], [wrong_last_stage(), engines()[2]]]
    async with memory_mesh(engines(), spares, loop_worker) as mesh:
        async with session_of(mesh) as session:
            kill = {n_tokens: lambda: mesh.kill("stage-2")}
            tokens = await write(session, n_tokens + 5, kill)
            replaced = {repair.lost_peer_id: repair.code for repair in session.repairs}
        await trio.sleep(1)
        assert_nothing_left(mesh)
    assert tokens == whole_tokens(n_tokens=n_tokens + 5)
    assert replaced["stage-2"] == "STAGE_LOST"
    assert replaced.get("stage-2-1", "OTHER_TOKEN") == "OTHER_TOKEN"
    assert session.chain.stages[2].peer_id == "stage-2-2"


async def test_with_nobody_but_a_wrong_replica_the_text_ends_with_an_error(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with memory_mesh(engines(), [[], [], [wrong_last_stage()]], loop_worker) as mesh:
        with pytest.raises(UnreachableError, match="got another token") as caught:
            async with session_of(mesh, timeout_s=5.0) as session:
                await write(session, 20, {9: lambda: mesh.kill("stage-2")})
    assert caught.value.code == "STAGE_LOST"


async def test_what_was_compared_in_one_repair_goes_on_in_the_next(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The stage before the new last one dies while that computes again."""
    async with replicated_mesh(2) as mesh:
        async with session_of(mesh) as session:

            async def kill_both() -> None:
                mesh.kill("stage-2")
                await trio.sleep(0.2)
                mesh.kill("stage-1")

            def begin() -> None:
                mesh.nursery.start_soon(kill_both)

            assert await write(session, 60, {50: begin}) == whole_tokens(n_tokens=60)
            assert len(session.repairs) == 2
