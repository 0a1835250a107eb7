"""A session with a grammar does not take one replica of the last stage after the other along."""

from __future__ import annotations

import msgspec
import pytest
import trio.testing
from support.mesh import GREEDY, PIECE_TOKENS, MemoryMesh, memory_mesh, written_tokens
from support.replicated import CountingEngine, loop_worker, one_engine_tokens

from shardmesh.coordinator.grammar_losses import REPLICAS_LOST_MAX, GrammarLosses
from shardmesh.coordinator.openings import SessionSettings
from shardmesh.engine.fake import FakeEngine, fake_info
from shardmesh.errors import BusyError, InputError, UnreachableError

PROMPT = list(range(20))
N_TOKENS = 5
GRAMMAR = 'root ::= "a"*'


def lost() -> UnreachableError:
    return UnreachableError("gone", code="STAGE_LOST")


def test_two_in_a_row_are_enough_and_a_result_between_them_clears() -> None:
    losses = GrammarLosses(GRAMMAR)
    for _ in range(10):
        for _ in range(REPLICAS_LOST_MAX - 1):
            losses.note(lost())
        losses.note(BusyError("no room"))
        losses.clear()
    losses.note(lost())
    with pytest.raises(InputError) as caught:
        losses.note(lost())
    assert caught.value.code == "BAD_GRAMMAR"


def test_without_a_grammar_nothing_is_counted() -> None:
    losses = GrammarLosses("")
    for _ in range(10):
        losses.note(lost())


@pytest.mark.parametrize("grammar", ["", GRAMMAR], ids=["no grammar", "grammar"])
async def test_the_third_replica_is_tried_only_without_a_grammar(
    grammar: str, autojump_clock: trio.testing.MockClock
) -> None:
    """Two replicas of the last stage die at the first thing that they compute."""
    meshes: list[MemoryMesh] = []

    def ends(name: str):  # type: ignore[no-untyped-def]
        return lambda n_rows: meshes[0].kill(name)

    def last(name: str | None = None) -> CountingEngine:
        before = None if name is None else ends(name)
        info = fake_info(2, 4, 4, n_ctx=512)
        return CountingEngine(info, layer_start=2, before_compute=before)

    first = FakeEngine(fake_info(0, 2, 4, n_ctx=512))
    third = last()
    spares = [[], [last("stage-1-1"), third]]
    async with memory_mesh([first, last("stage-1")], spares, loop_worker) as mesh:
        meshes.append(mesh)
        sampling = msgspec.structs.replace(GREEDY, grammar=grammar)
        settings = SessionSettings(n_ctx=300, sampling=sampling, piece_tokens=PIECE_TOKENS)
        finder = mesh.replacements(10.0)
        if grammar:
            with pytest.raises(InputError, match="2 replicas"):
                async with mesh.router.session(mesh.chain, mesh.links, settings, finder) as session:
                    await written_tokens(session, PROMPT, N_TOKENS)
            assert third.n_computed == 0
            return
        async with mesh.router.session(mesh.chain, mesh.links, settings, finder) as session:
            tokens = await written_tokens(session, PROMPT, N_TOKENS)
            lost_ids = [repair.lost_peer_id for repair in session.repairs]
    assert tokens == one_engine_tokens(PROMPT, N_TOKENS, temperature=0.0, seed=0)
    assert lost_ids == ["stage-1", "stage-1-1"]
