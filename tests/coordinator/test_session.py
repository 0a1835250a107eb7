"""Sessions of a coordinator against stages that misbehave."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from support.far_end import Recorder
from support.mesh import GREEDY, PIECE_TOKENS, linked_pair
from support.replicas import replica

from shardmesh.coordinator.chain import Chain
from shardmesh.coordinator.openings import SessionSettings
from shardmesh.coordinator.router import SessionRouter
from shardmesh.coordinator.session import OPEN_TIMEOUT_S, STEP_TIMEOUT_S
from shardmesh.coordinator.stages import INBOX_MESSAGES_MAX
from shardmesh.errors import BusyError, ProtocolError, UnreachableError
from shardmesh.links.link import Link
from shardmesh.wire.messages import (
    BatchDone,
    CloseSession,
    OpenSession,
    SessionFailed,
    SessionOpened,
    TokenBatch,
    TrimSession,
)

SETTINGS = SessionSettings(n_ctx=64, sampling=GREEDY, piece_tokens=PIECE_TOKENS)


class PlayedStage:
    """A stage that a test plays: what it heard, and the stage's end of its link."""

    def __init__(self) -> None:
        self.heard = Recorder()
        self.near: Link
        self.far: Link

    async def opened(self, n: int = 1) -> OpenSession:
        await self.heard.heard(n)
        message = self.heard.messages[n - 1]
        assert isinstance(message, OpenSession)
        return message

    async def accept(self) -> OpenSession:
        message = await self.opened()
        self.far.send(SessionOpened(session=message.session, epoch=message.epoch, n_held=0))
        return message


class Played:
    """A router with links to two played stages."""

    def __init__(self) -> None:
        self.router = SessionRouter()
        self.stages = [PlayedStage(), PlayedStage()]
        self.chain = Chain(
            tuple(
                replica(f"stage-{number}", 2 * number, 2 * number + 2, shard_id=number)
                for number in range(2)
            )
        )

    @property
    def links(self) -> list[Link]:
        return [stage.near for stage in self.stages]

    def session(self):  # type: ignore[no-untyped-def]
        return self.router.session(self.chain, self.links, SETTINGS)

    async def accept_all(self) -> None:
        for stage in self.stages:
            await stage.accept()


@asynccontextmanager
async def played() -> AsyncIterator[tuple[Played, trio.Nursery]]:
    mesh = Played()
    async with trio.open_nursery() as nursery:
        for number, stage in enumerate(mesh.stages):
            stage.near, stage.far = await linked_pair(
                nursery, mesh.router, stage.heard, names=("coordinator", f"stage-{number}")
            )
        yield mesh, nursery
        nursery.cancel_scope.cancel()


def done(session_id: bytes, *, epoch: int = 0, position: int = 0) -> BatchDone:
    return BatchDone(
        session=session_id,
        epoch=epoch,
        position=position,
        n_tokens=1,
        sampled=None,
        timings=(),
        embedding=b"",
        scores=(),
        handed=False,
    )


def failed(session_id: bytes, *, epoch: int = 0) -> SessionFailed:
    return SessionFailed(
        session=session_id,
        epoch=epoch,
        layer_start=0,
        layer_end=2,
        code="BUSY",
        blame="moment",
        message="no room",
        next_step="wait",
    )


async def test_each_stage_is_told_its_place() -> None:
    async with played() as (mesh, nursery):
        nursery.start_soon(mesh.accept_all)
        async with mesh.session() as session:
            first, last = [await stage.opened() for stage in mesh.stages]
            assert (first.previous_stage, last.previous_stage) == (None, "stage-0")
            assert first.next_stage is not None
            assert first.next_stage.peer_id == "stage-1"
            assert first.next_stage.addresses == ("/ip4/192.0.2.1/tcp/1",)
            assert last.next_stage is None
            assert (first.sampling, last.sampling) == (None, GREEDY)
            assert (last.layer_start, last.layer_end, last.n_ctx) == (2, 4, 64)
            session.send([1, 2], sample=False)
            session.send([3], sample=True)
            await mesh.stages[0].heard.heard(4)
            batches = mesh.stages[0].heard.messages[1:]
            assert [(b.position, b.tokens) for b in batches if isinstance(b, TokenBatch)] == [
                (0, (1, 2)),
                (2, (3,)),
            ]
        for stage in mesh.stages:
            await stage.heard.heard(3 if stage is mesh.stages[1] else 5)
            assert isinstance(stage.heard.messages[-1], CloseSession)
        assert mesh.router.n_sessions == 0


async def test_a_refusal_closes_the_session_on_all_stages() -> None:
    async with played() as (mesh, nursery):

        async def refuse() -> None:
            await mesh.stages[0].accept()
            mesh.stages[1].far.send(failed((await mesh.stages[1].opened()).session))

        nursery.start_soon(refuse)
        with pytest.raises(BusyError) as caught:
            async with mesh.session():
                raise AssertionError("the session was opened")
        assert caught.value.next_step == "wait"
        for stage in mesh.stages:
            await stage.heard.heard(2)
            assert isinstance(stage.heard.messages[-1], CloseSession)


async def test_a_stage_that_does_not_answer(autojump_clock: trio.testing.MockClock) -> None:
    async with played() as (mesh, nursery):
        nursery.start_soon(mesh.stages[0].accept)
        begun_s = trio.current_time()
        with pytest.raises(UnreachableError) as caught:
            async with mesh.session():
                raise AssertionError("the session was opened")
        assert caught.value.code == "STAGE_TIMEOUT"
        assert trio.current_time() - begun_s == pytest.approx(OPEN_TIMEOUT_S)


async def test_a_chain_that_does_not_answer(autojump_clock: trio.testing.MockClock) -> None:
    async with played() as (mesh, nursery):
        nursery.start_soon(mesh.accept_all)
        async with mesh.session() as session:
            session.send([1], sample=True)
            begun_s = trio.current_time()
            with pytest.raises(UnreachableError) as caught:
                await session.receive()
            assert caught.value.code == "STAGE_TIMEOUT"
            assert trio.current_time() - begun_s == pytest.approx(STEP_TIMEOUT_S)


async def test_a_result_of_the_wrong_stage_is_refused_and_of_another_epoch_ignored() -> None:
    async with played() as (mesh, nursery):
        nursery.start_soon(mesh.accept_all)
        async with mesh.session() as session:
            first, last = mesh.stages
            session.send([1], sample=False)
            session.send([1], sample=False)
            last.far.send(done(session.session_id, epoch=1))
            last.far.send(failed(session.session_id, epoch=1))
            last.far.send(done(session.session_id))
            assert await session.receive() == done(session.session_id)
            first.far.send(done(session.session_id, position=1))
            with pytest.raises(ProtocolError):
                await session.receive()


@pytest.mark.parametrize("position", [0, 2])
async def test_a_result_twice_or_too_early_is_refused(position: int) -> None:
    async with played() as (mesh, nursery):
        nursery.start_soon(mesh.accept_all)
        async with mesh.session() as session:
            for _ in range(3):
                session.send([1], sample=False)
            mesh.stages[1].far.send(done(session.session_id))
            await session.receive()
            mesh.stages[1].far.send(done(session.session_id, position=position))
            with pytest.raises(ProtocolError):
                await session.receive()


async def test_a_lost_link_names_the_layers() -> None:
    async with played() as (mesh, nursery):
        nursery.start_soon(mesh.accept_all)
        async with mesh.session() as session:
            mesh.stages[1].far.close()
            with pytest.raises(UnreachableError, match=r"\[2, 4\)") as caught:
                await session.receive()
            assert caught.value.code == "STAGE_LOST"


async def test_a_stage_that_floods_loses_its_link_and_nothing_else() -> None:
    async with played() as (mesh, nursery):
        nursery.start_soon(mesh.accept_all)
        async with mesh.session() as session:
            for number in range(INBOX_MESSAGES_MAX + 10):
                session.send([1], sample=False)
                mesh.stages[1].far.send(done(session.session_id, position=number))
            await mesh.stages[1].heard.end()
            mesh.stages[0].far.close()  # its end finds room as well
            await mesh.stages[0].heard.end()
            for _ in range(INBOX_MESSAGES_MAX):
                await session.receive()
            with pytest.raises(UnreachableError):
                await session.receive()
        assert mesh.router.n_sessions == 0


async def test_a_stage_outside_the_chain_is_not_heard() -> None:
    stranger = Recorder()
    async with played() as (mesh, nursery):
        nursery.start_soon(mesh.accept_all)
        _, outside = await linked_pair(
            nursery, mesh.router, stranger, names=("coordinator", "stranger")
        )
        async with mesh.session() as session:
            session.send([1], sample=False)
            outside.send(failed(session.session_id))
            outside.send(done(session.session_id))
            outside.send(done(bytes(16)))
            await trio.testing.wait_all_tasks_blocked()
            mesh.stages[1].far.send(done(session.session_id))
            assert await session.receive() == done(session.session_id)


async def test_what_coordinators_do_not_get_closes_the_link() -> None:
    async with played() as (mesh, _):
        mesh.stages[0].far.send(TrimSession(session=bytes(16), epoch=0, n_keep=0))
        await mesh.stages[0].heard.end()
        assert not mesh.stages[0].near.is_open
