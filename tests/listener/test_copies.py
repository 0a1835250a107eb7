"""What a stage keeps as a standby: only from whom it was told, only so much, and only for one."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
import trio
import trio.testing
from support.far_end import Recorder
from support.link_messages import open_session
from support.loop_worker import LoopWorker
from support.mesh import (
    DIGEST,
    GREEDY,
    PIECE_TOKENS,
    MemoryMesh,
    linked_pair,
    memory_mesh,
    written_tokens,
)

from shardmesh.coordinator.openings import SessionSettings
from shardmesh.engine.base import Cells, MicroBatch
from shardmesh.engine.fake import FakeEngine, fake_info
from shardmesh.errors import BusyError, EngineError
from shardmesh.links.link import Link
from shardmesh.listener.copies import Copies
from shardmesh.listener.copying import (
    FRAME_BYTES,
    N_UNCERTAIN_MAX,
    STEP_SHARE,
    STEP_TOKENS_MIN,
    is_due,
    n_final,
)
from shardmesh.listener.stage_session import Work
from shardmesh.listener.worker import Calculation
from shardmesh.wire.limits import (
    COPIES_BYTES_MAX,
    COPIES_MAX,
    KV_COPY_BYTES_MAX,
    KV_COPY_WINDOW_BYTES,
)
from shardmesh.wire.messages import (
    CloseSession,
    KvCopy,
    KvTaken,
    Message,
    SessionFailed,
    SessionOpened,
    StandBy,
    StandingBy,
)

N_CTX = 200
INFO = fake_info(0, 4, 4, n_ctx=N_CTX)
SESSION = bytes(16)
STAND_BY = StandBy(
    session=SESSION,
    manifest_digest=DIGEST,
    layer_start=0,
    layer_end=4,
    n_ctx=N_CTX,
    fingerprint=INFO.fingerprint,
    source="source",
)
OPEN = open_session(session=SESSION, n_ctx=N_CTX, take_over=True)


def kv(position: int, n_tokens: int, session: bytes = SESSION) -> tuple[KvCopy, bytes]:
    """The KV of a text of the same token, and its frame."""
    engine = FakeEngine(INFO)
    engine.open_sequence(0)
    for start in range(0, position + n_tokens, 32):
        tokens = (1,) * min(32, position + n_tokens - start)
        engine.compute([MicroBatch(sequence=0, position=start, tokens=tokens)])
    body = engine.read_cells(0, position, position + n_tokens).tobytes()
    message = KvCopy(session=session, position=position, n_tokens=n_tokens, n_bytes=len(body))
    return message, body


class Asker:
    """A node with a link to the stage."""

    def __init__(self) -> None:
        self.user = Recorder()
        self.link: Link

    async def ask(self, message: Message, body: bytes = b"") -> Message:
        """What is answered."""
        n_before = len(self.user.messages)
        self.link.send(message, body)
        await self.user.heard(n_before + 1)
        return self.user.messages[-1]

    async def refused(self, message: Message, body: bytes = b"") -> None:
        """The link is closed over it."""
        self.link.send(message, body)
        await self.user.closed.wait()


async def asker(mesh: MemoryMesh, name: str) -> Asker:
    made = Asker()
    stage = mesh.stages[0]
    made.link, _ = await linked_pair(mesh.nursery, made.user, stage, names=(name, "stage-0"))
    return made


def n_copies(mesh: MemoryMesh) -> int:
    return mesh.stages[0].copy_figures["n_copies"]


async def test_a_copy_is_kept_and_taken_over() -> None:
    async with memory_mesh([FakeEngine(INFO)]) as mesh:
        coordinator, source = await asker(mesh, "coordinator"), await asker(mesh, "source")
        assert isinstance(await coordinator.ask(STAND_BY), StandingBy)
        for position, n_tokens in ((0, 40), (40, 24)):
            answer = await source.ask(*kv(position, n_tokens))
            assert answer == KvTaken(session=SESSION, n_taken=position + n_tokens)
        assert mesh.stages[0].copy_figures["copy_bytes"] == 64 * INFO.cell_bytes
        opened = await coordinator.ask(OPEN)
        assert opened == SessionOpened(session=SESSION, epoch=1, n_held=64)
        coordinator.link.send(CloseSession(session=SESSION))
        coordinator.link.close()
        await coordinator.user.closed.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert n_copies(mesh) == 0


async def test_only_the_node_that_was_named_may_send() -> None:
    async with memory_mesh([FakeEngine(INFO)]) as mesh:
        coordinator, stranger = await asker(mesh, "coordinator"), await asker(mesh, "stranger")
        await coordinator.ask(STAND_BY)
        assert await stranger.ask(*kv(0, 32)) == KvTaken(session=SESSION, n_taken=0)
        source = await asker(mesh, "source")
        unknown = bytes(15) + b"\x01"
        answer = await source.ask(*kv(0, 32, unknown))
        assert answer == KvTaken(session=unknown, n_taken=0)
        assert mesh.stages[0].copy_figures["copy_bytes"] == 0


async def test_only_the_coordinator_that_asked_can_take_over() -> None:
    async with memory_mesh([FakeEngine(INFO)]) as mesh:
        coordinator, source = await asker(mesh, "coordinator"), await asker(mesh, "source")
        await coordinator.ask(STAND_BY)
        await source.ask(*kv(0, 64))
        other = await asker(mesh, "other")
        assert await other.ask(OPEN) == SessionOpened(session=SESSION, epoch=1, n_held=0)
        other.link.send(CloseSession(session=SESSION))
        await other.refused(STAND_BY)  # and nobody can take its place
        assert n_copies(mesh) == 1


async def test_a_coordinator_may_ask_again_over_a_new_link() -> None:
    """The one before has fallen silent, and the stage has not noticed yet."""
    async with memory_mesh([FakeEngine(INFO)]) as mesh:
        before, now = [await asker(mesh, "coordinator") for _ in range(2)]
        assert isinstance(await before.ask(STAND_BY), StandingBy)
        assert isinstance(await now.ask(STAND_BY), StandingBy)
        before.link.close(EngineError("silent"))
        await trio.testing.wait_all_tasks_blocked()
        assert n_copies(mesh) == 1
        await (await asker(mesh, "another")).refused(STAND_BY)


async def test_nothing_is_taken_over_that_was_not_asked_for() -> None:
    async with memory_mesh([FakeEngine(INFO)]) as mesh:
        coordinator, source = await asker(mesh, "coordinator"), await asker(mesh, "source")
        await coordinator.ask(STAND_BY)
        await source.ask(*kv(0, 64))
        plain = await coordinator.ask(msgspec.structs.replace(OPEN, take_over=False))
        assert plain == SessionOpened(session=SESSION, epoch=1, n_held=0)


@pytest.mark.parametrize(
    ("position", "n_tokens", "n_bytes"),
    [
        (0, 32, 32 * INFO.cell_bytes - 1),
        (0, 33, 32 * INFO.cell_bytes),
        (0, N_CTX + 1, (N_CTX + 1) * INFO.cell_bytes),
        (N_CTX, 1, INFO.cell_bytes),
    ],
)
async def test_kv_that_cannot_be_right_ends_the_link(
    position: int, n_tokens: int, n_bytes: int
) -> None:
    async with memory_mesh([FakeEngine(INFO)]) as mesh:
        coordinator, source = await asker(mesh, "coordinator"), await asker(mesh, "source")
        await coordinator.ask(STAND_BY)
        wrong = KvCopy(session=SESSION, position=position, n_tokens=n_tokens, n_bytes=n_bytes)
        await source.refused(wrong, bytes(n_bytes))
        assert mesh.stages[0].copy_figures["copy_bytes"] == 0


async def test_what_is_late_is_passed_over() -> None:
    """The copy was begun anew while more of the old one was on its way."""
    async with memory_mesh([FakeEngine(INFO)]) as mesh:
        coordinator, source = await asker(mesh, "coordinator"), await asker(mesh, "source")
        await coordinator.ask(STAND_BY)
        await source.ask(*kv(0, 32))
        await coordinator.ask(STAND_BY)
        source.link.send(*kv(32, 32))
        assert await source.ask(*kv(0, 40)) == KvTaken(session=SESSION, n_taken=40)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"layer_end": 3}, "WRONG_SHARD"),
        ({"manifest_digest": "e" * 64}, "WRONG_SHARD"),
        ({"fingerprint": "another"}, "OTHER_ENGINE"),
    ],
)
async def test_a_copy_that_would_be_of_no_use_is_refused(
    change: dict[str, object], code: str
) -> None:
    async with memory_mesh([FakeEngine(INFO)]) as mesh:
        coordinator = await asker(mesh, "coordinator")
        answer = await coordinator.ask(msgspec.structs.replace(STAND_BY, **change))
        assert isinstance(answer, SessionFailed)
        assert answer.code == code
        assert n_copies(mesh) == 0


async def test_an_engine_that_cannot_copy_stands_by_for_nobody() -> None:
    engine = FakeEngine(dataclasses.replace(INFO, cell_bytes=0))
    async with memory_mesh([engine]) as mesh:
        coordinator = await asker(mesh, "coordinator")
        answer = await coordinator.ask(STAND_BY)
        assert isinstance(answer, SessionFailed)
        assert answer.code == "OTHER_ENGINE"


async def test_one_more_session_than_a_stage_stands_by_for() -> None:
    async with memory_mesh([FakeEngine(INFO)]) as mesh:
        coordinator = await asker(mesh, "coordinator")
        for number in range(COPIES_MAX + 1):
            answer = await coordinator.ask(
                msgspec.structs.replace(STAND_BY, session=number.to_bytes(16, "big"))
            )
            assert isinstance(answer, StandingBy) == (number < COPIES_MAX)
        assert isinstance(answer, SessionFailed)
        assert answer.code == BusyError.default_code
        coordinator.link.close()
        await coordinator.user.closed.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert n_copies(mesh) == 0


async def test_one_coordinator_gets_no_more_copies_than_its_share() -> None:
    async with memory_mesh([FakeEngine(INFO)]) as mesh:
        mesh.stages[0].sessions_per_node_max = 1
        coordinator = await asker(mesh, "coordinator")
        await coordinator.ask(STAND_BY)
        answer = await coordinator.ask(msgspec.structs.replace(STAND_BY, session=b"\x01" * 16))
        assert isinstance(answer, SessionFailed)


async def test_the_memory_for_copies_has_an_end() -> None:
    """What is beyond it is not taken, and what was taken stays."""
    info = dataclasses.replace(INFO, cell_bytes=KV_COPY_BYTES_MAX, n_ctx=2**20)
    async with memory_mesh([FakeEngine(INFO)]) as mesh:
        (link,) = mesh.links
        copies = Copies(info)
        copies.begin(link, msgspec.structs.replace(STAND_BY, n_ctx=2**20))
        body = memoryview(bytes(KV_COPY_BYTES_MAX))
        n_most = COPIES_BYTES_MAX // KV_COPY_BYTES_MAX
        for position in range(n_most + 1):
            message = KvCopy(
                session=SESSION, position=position, n_tokens=1, n_bytes=KV_COPY_BYTES_MAX
            )
            n_taken = copies.add("source", message, body)
            assert n_taken == (position + 1 if position < n_most else 0)
        assert copies.n_bytes == COPIES_BYTES_MAX
        assert copies.find(SESSION, link) is not None


def loop_worker(calculation: Calculation[Work]) -> LoopWorker:
    return LoopWorker(calculation, lambda n_tokens: 0.01 if n_tokens == 1 else 0.04)


def wide() -> FakeEngine:
    """An engine with a lot of KV for each position."""
    return FakeEngine(fake_info(0, 4, 4, n_embd=8192, n_ctx=N_CTX))


async def test_a_standby_that_does_not_read_gets_a_window_and_delays_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    settings = SessionSettings(
        n_ctx=N_CTX, sampling=GREEDY, piece_tokens=PIECE_TOKENS, standby=True
    )
    prompt = [i % 60 for i in range(150)]
    async with memory_mesh([wide()], [[wide()]], loop_worker) as mesh:
        async with mesh.router.session(mesh.chain, mesh.links, settings) as session:
            tokens = await written_tokens(session, prompt, 20)
        async with mesh.router.session(
            mesh.chain, mesh.links, settings, mesh.replacements()
        ) as session:
            assert session.standbys is not None
            mesh.nursery.start_soon(session.standbys.run)
            await trio.sleep(0.1)
            assert 0 in session.standbys.ready()
            mesh.freeze("stage-0-1")
            since_s = trio.current_time()
            assert await written_tokens(session, prompt, 20) == tokens
            assert trio.current_time() - since_s < 1.0
        n_sent = mesh.stages[0].copy_figures["copy_bytes_sent"]
        assert 0 < n_sent <= KV_COPY_WINDOW_BYTES + FRAME_BYTES


class UnreadableEngine(FakeEngine):
    """Its KV cannot be had."""

    def read_cells(self, sequence: int, start: int, end: int) -> Cells:
        raise EngineError("the state is too large")


async def test_an_engine_that_gives_no_kv_fails_no_session(
    autojump_clock: trio.testing.MockClock,
) -> None:
    settings = SessionSettings(
        n_ctx=N_CTX, sampling=GREEDY, piece_tokens=PIECE_TOKENS, standby=True
    )
    async with memory_mesh([UnreadableEngine(INFO)], [[FakeEngine(INFO)]], loop_worker) as mesh:
        async with mesh.router.session(
            mesh.chain, mesh.links, settings, mesh.replacements()
        ) as session:
            assert session.standbys is not None
            mesh.nursery.start_soon(session.standbys.run)
            await trio.sleep(0.1)
            assert len(await written_tokens(session, [1] * 100, 10)) == 10
        assert mesh.stages[0].copy_figures["copy_bytes_sent"] == 0
        assert mesh.stages[0].counters.n_sessions_failed == 0


def test_what_may_be_a_guess_is_not_copied() -> None:
    assert n_final(N_UNCERTAIN_MAX, None) == 0
    assert n_final(N_UNCERTAIN_MAX + 5, None) == 5
    assert n_final(200, 96) == 96  # a last stage samples the rest again
    assert n_final(100, 96) == 100 - N_UNCERTAIN_MAX


def test_copying_costs_a_bounded_share() -> None:
    """All that is read from the engine, for a text of so many tokens, which come one by one."""
    n_looked_at = n_read = 0
    for n_copyable in range(1, 20_000):
        if is_due(n_copyable, n_read):
            n_read = n_copyable
            n_looked_at += n_copyable
    assert 19_999 - n_read <= max(STEP_TOKENS_MIN, 19_999 * STEP_SHARE)
    assert n_looked_at <= (1 / STEP_SHARE + 2) * 20_000 + 2000 * STEP_TOKENS_MIN
