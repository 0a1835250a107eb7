"""Stages that die, fall silent or send nonsense in the middle of a generation: the same tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import trio
import trio.testing
from support.link_messages import hidden_batch
from support.mesh import COORDINATOR, memory_mesh
from support.repaired import N_TOKENS, session_of, whole_tokens, write
from support.replicated import assert_nothing_left, engines, loop_worker, replicated_mesh

from shardmesh.coordinator.replacements import ASIDE_MIN_S, HEAD_START_S
from shardmesh.coordinator.session import REPAIR_ANSWER_TIMEOUT_S
from shardmesh.engine.base import MicroBatch, Output, TellToken
from shardmesh.engine.fake import FakeEngine, fake_info
from shardmesh.errors import EngineError, ShardmeshError, UnreachableError
from shardmesh.links.link import Link


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("n_tokens", [1, 5])
async def test_a_stage_killed_while_tokens_come(
    number: int, n_tokens: int, autojump_clock: trio.testing.MockClock
) -> None:
    async with replicated_mesh() as mesh:
        async with session_of(mesh) as session:
            kill = {n_tokens: lambda: mesh.kill(f"stage-{number}")}
            assert await write(session, before=kill) == whole_tokens()
            (repair,) = session.repairs
            assert (repair.lost_peer_id, repair.new_peer_id) == (
                f"stage-{number}",
                f"stage-{number}-1",
            )
            assert session.epoch >= 1
        await trio.testing.wait_all_tasks_blocked()
        assert_nothing_left(mesh)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("after_s", [0.001, 0.05, 0.1, 0.15, 0.2])
async def test_a_stage_killed_while_the_prompt_is_under_way(
    number: int, after_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    async with replicated_mesh() as mesh:
        async with session_of(mesh) as session:

            async def kill() -> None:
                await trio.sleep(after_s)
                mesh.kill(f"stage-{number}")

            mesh.nursery.start_soon(kill)
            assert await write(session) == whole_tokens()
            assert len(session.repairs) == 1


@pytest.mark.parametrize("number", [0, 1, 2])
async def test_a_frozen_stage_is_left_within_two_seconds_and_its_late_answers_count_for_nothing(
    number: int, autojump_clock: trio.testing.MockClock
) -> None:
    async with replicated_mesh() as mesh:
        async with session_of(mesh) as session:
            name = f"stage-{number}"
            assert await write(session, before={4: lambda: mesh.freeze(name)}) == whole_tokens()
            (repair,) = session.repairs
            assert repair.pause_s < 2.0
            assert (repair.lost_peer_id, repair.new_peer_id) == (name, f"{name}-1")
            mesh.thaw(name)
            done = whole_tokens(n_tokens=N_TOKENS + 1)
            session.send([done[N_TOKENS - 1]], sample=True)
            late = await session.receive()
            assert late.sampled is not None
            assert late.sampled.token == done[-1]
        await trio.sleep(1)
        assert_nothing_left(mesh)


async def test_all_stages_killed_one_after_the_other(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with replicated_mesh(n_spares=2) as mesh:
        async with session_of(mesh) as session:
            kills = {
                2: lambda: mesh.kill("stage-1"),
                4: lambda: mesh.kill("stage-0"),
                5: lambda: mesh.kill("stage-1-1"),
                8: lambda: mesh.kill("stage-2"),
            }
            assert await write(session, before=kills) == whole_tokens()
            assert len(session.repairs) == 4


async def test_two_stages_killed_at_once(autojump_clock: trio.testing.MockClock) -> None:
    async with replicated_mesh() as mesh:
        async with session_of(mesh) as session:

            def kill_two() -> None:
                mesh.kill("stage-0")
                mesh.kill("stage-1")

            assert await write(session, before={3: kill_two}) == whole_tokens()


@pytest.mark.parametrize("delay_s", [0.0, 0.001, 0.01, 0.02, 0.05, 0.1, 0.3])
@pytest.mark.parametrize("second", ["stage-0", "stage-2", "stage-1-1"])
async def test_a_kill_during_a_recovery(
    second: str, delay_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    async with replicated_mesh(n_spares=2) as mesh:
        async with session_of(mesh) as session:

            async def kill_later() -> None:
                await trio.sleep(delay_s)
                mesh.kill(second)

            def kill() -> None:
                mesh.kill("stage-1")
                mesh.nursery.start_soon(kill_later)

            assert await write(session, before={3: kill}) == whole_tokens()


async def test_without_another_replica_the_error_names_the_layers_in_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with replicated_mesh(n_spares=0) as mesh:
        async with session_of(mesh, timeout_s=2.0) as session:
            begun_s: list[float] = []

            def kill() -> None:
                begun_s.append(trio.current_time())
                mesh.kill("stage-1")

            with pytest.raises(UnreachableError, match=r"\[1, 3\)") as caught:
                await write(session, before={3: kill})
            assert caught.value.code == "STAGE_LOST"
            assert 1.9 < trio.current_time() - begun_s[0] < 3.0
        await trio.testing.wait_all_tasks_blocked()
        assert_nothing_left(mesh)


async def test_a_replica_that_joins_in_time_is_taken(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with replicated_mesh(n_spares=0) as mesh:
        async with session_of(mesh) as session:

            async def join() -> None:
                await trio.sleep(4)
                mesh.add("stage-1-9", engines()[1], 1, 1)
                mesh.start("stage-1-9")

            def kill() -> None:
                mesh.kill("stage-1")
                mesh.nursery.start_soon(join)

            assert await write(session, before={3: kill}) == whole_tokens()
            assert session.repairs[0].new_peer_id == "stage-1-9"


async def test_an_engine_that_fails_is_left(autojump_clock: trio.testing.MockClock) -> None:
    failures = [EngineError("llama.cpp said no")]
    bad = engines()

    def fail_late(n_rows: int) -> None:
        if n_rows == 1 and failures:
            raise failures.pop()

    bad[1] = FakeEngine(fake_info(1, 3, 4, n_ctx=512), layer_start=1, before_compute=fail_late)
    spares = [[engine] for engine in engines()]
    async with memory_mesh(bad, spares, loop_worker) as mesh:
        async with session_of(mesh) as session:
            assert await write(session) == whole_tokens()
            assert [repair.code for repair in session.repairs] == ["ENGINE_FAILED"]


class Spoiler(FakeEngine):
    """Gives hidden states that cannot be right, from one call on."""

    def __init__(self, spoil, n_good: int) -> None:  # type: ignore[no-untyped-def]
        super().__init__(fake_info(1, 3, 4, n_ctx=512), layer_start=1)
        self._spoil = spoil
        self._n_good = n_good

    def compute(
        self, batch: Sequence[MicroBatch], tell_token: TellToken | None = None
    ) -> list[Output]:
        outputs = super().compute(batch, tell_token)
        self._n_good -= 1
        if self._n_good < 0:
            self._spoil(outputs[0].hidden)
        return outputs


async def test_a_stage_whose_hidden_states_are_not_finite_is_left(
    autojump_clock: trio.testing.MockClock,
) -> None:
    def spoil(hidden: np.ndarray) -> None:  # type: ignore[type-arg]
        hidden[0, 0] = np.nan

    bad = engines()
    bad[1] = Spoiler(spoil, 6)
    async with memory_mesh(bad, [[engine] for engine in engines()], loop_worker) as mesh:
        async with session_of(mesh) as session:
            assert await write(session) == whole_tokens()
            (repair,) = session.repairs
            assert (repair.lost_peer_id, repair.code) == ("stage-1", "NOT_FINITE")


@pytest.mark.parametrize("how", ["doubled", "early", "wide"])
async def test_frames_that_cannot_be_right_do_not_change_the_text(
    how: str, autojump_clock: trio.testing.MockClock
) -> None:
    async with replicated_mesh() as mesh:
        async with session_of(mesh) as session:

            def forge() -> None:
                n_embd = 9 if how == "wide" else 8
                forged = hidden_batch(
                    session=session.session_id,
                    epoch=session.epoch,
                    position=session.n_sent + (5 if how == "early" else -1),
                    n_embd=n_embd,
                )
                mesh.link_between(0).send(forged, bytes(4 * n_embd))

            assert await write(session, before={3: forge}) == whole_tokens()
            assert [repair.lost_peer_id for repair in session.repairs] == ["stage-0"]


async def test_a_lost_link_between_two_good_stages_is_mended(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with replicated_mesh() as mesh:
        async with session_of(mesh) as session:
            cut = {3: lambda: mesh.link_between(1).close()}
            assert await write(session, before=cut) == whole_tokens()
            assert session.repairs == []
            assert session.epoch == 1


async def test_replicas_that_are_killed_in_turn_are_not_left_alone_for_ever_longer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Each has brought results since it failed the last time."""
    async with replicated_mesh() as mesh:
        names = itertools.cycle(["stage-1", "stage-1-1"])
        async with session_of(mesh, timeout_s=3 * ASIDE_MIN_S) as session:
            before = {n: lambda: mesh.drop(next(names)) for n in range(2, 30, 2)}
            assert await write(session, 30, before) == whole_tokens(n_tokens=30)
            assert len(session.repairs) == len(before)


@pytest.mark.parametrize("for_s", [3.0, 8.5])
async def test_a_replica_that_was_cut_off_is_taken_again_as_soon_as_it_is_back(
    for_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    """It was found silent again and again, and the other one stays away."""
    joined_s, went_on_s = 0.0, 0.0

    async with replicated_mesh() as mesh:

        async def cut_off() -> None:
            nonlocal joined_s
            mesh.freeze("stage-1-1")
            mesh.freeze("stage-1")
            await trio.sleep(for_s)
            mesh.thaw("stage-1")
            joined_s = trio.current_time()

        def note() -> None:
            nonlocal went_on_s
            went_on_s = trio.current_time()

        async with session_of(mesh, timeout_s=60.0) as session:
            cut = {4: lambda: mesh.nursery.start_soon(cut_off), 6: note}
            assert await write(session, before=cut) == whole_tokens()
            assert 0 < went_on_s - joined_s < 1.0


async def test_a_replica_whose_dial_hangs_does_not_hold_up_another(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with replicated_mesh(n_spares=2) as mesh:
        dial = mesh.dial

        async def dial_or_hang(name: str, other: str) -> Link:
            if other == "stage-1-1":
                await trio.sleep(60)
            return await dial(name, other)

        mesh.dial = dial_or_hang  # type: ignore[method-assign]
        async with session_of(mesh, timeout_s=30.0) as session:
            kill = {3: lambda: mesh.kill("stage-1")}
            assert await write(session, before=kill) == whole_tokens()
            (repair,) = session.repairs
            assert repair.new_peer_id == "stage-1-2"
            assert HEAD_START_S < repair.pause_s < HEAD_START_S + 1.0


async def test_a_coordinator_may_open_a_session_again_over_a_new_link(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link before is silent, and what was said over it to close the session is on its way."""
    async with replicated_mesh(n_spares=0) as mesh:

        def lose_the_link() -> None:
            old = mesh.forget_link(COORDINATOR, "stage-1")
            monkeypatch.setattr(old, "send", lambda message, body=b"": None)
            mesh.router.on_closed(old, UnreachableError("it is silent", code="LINK_SILENT"))

        async with session_of(mesh) as session:
            assert await write(session, before={4: lose_the_link}) == whole_tokens()
            (repair,) = session.repairs
            assert repair.new_peer_id == "stage-1"
            assert all(link.is_open for link in session.links)
        await trio.testing.wait_all_tasks_blocked()
        assert_nothing_left(mesh)


async def test_a_bad_line_between_two_stages_is_given_more_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with replicated_mesh() as mesh:
        dial = mesh.dial

        async def dial_slowly(name: str, other: str) -> Link:
            if other == "stage-1-1" and name != COORDINATOR:
                await trio.sleep(1.5 * REPAIR_ANSWER_TIMEOUT_S)
            return await dial(name, other)

        mesh.dial = dial_slowly  # type: ignore[method-assign]
        async with session_of(mesh, timeout_s=30.0) as session:
            kill = {3: lambda: mesh.kill("stage-1")}
            assert await write(session, before=kill) == whole_tokens()
            assert session.chain.stages[1].peer_id == "stage-1-1"


async def test_what_is_no_longer_kept_is_computed_again(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Room for some forty rows of 8 numbers: the beginning of the prompt is soon forgotten.
    monkeypatch.setattr("shardmesh.listener.stage_session.REPLAY_KEPT_BYTES_MAX", 4 * 4000)
    async with replicated_mesh() as mesh:
        async with session_of(mesh) as session:
            kill = {5: lambda: mesh.kill("stage-2")}
            assert await write(session, before=kill) == whole_tokens()
            assert mesh.nodes["stage-0"].stage.counters.n_sessions_opened == 2


async def test_a_stage_that_does_not_get_on_is_left(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """It answers heartbeats and computes nothing."""
    async with replicated_mesh() as mesh:
        async with session_of(mesh) as session:

            def hang() -> None:
                mesh.nodes["stage-1"].scope.cancel()

            assert await write(session, before={3: hang}) == whole_tokens()
            assert [repair.code for repair in session.repairs] == ["STAGE_LATE"]


async def test_whoever_cannot_be_opened_is_exchanged_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with replicated_mesh() as mesh:
        mesh.kill("stage-1")
        async with session_of(mesh) as session:
            assert await write(session) == whole_tokens()


async def test_a_request_at_fault_is_not_tried_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with replicated_mesh() as mesh:
        async with session_of(mesh) as session:
            session.send([1000], sample=True)
            with pytest.raises(ShardmeshError) as caught:
                await session.receive()
            assert caught.value.blame == "theirs"
            assert session.epoch == 0


async def test_many_sessions_that_tell_of_one_failure_set_a_replica_aside_once() -> None:
    async with replicated_mesh() as mesh:
        replica, gone = mesh.chain.stages[0], UnreachableError("gone", code="STAGE_LOST")
        for session in range(8):
            mesh.health.failed(replica, gone, 100.0 + session / 100)
        assert mesh.health.is_aside(replica, 100.1)
        assert not mesh.health.is_aside(replica, 100.0 + ASIDE_MIN_S)
