"""The supervisor with real data processes: loaded, killed, stopped, broken, orphaned."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import psutil
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from support.accepting import new_grants
from support.data_start import no_agreement, start_of_tiny_shard
from support.far_end import Recorder
from support.link_messages import open_session

import shardmesh.listener.data_child as data_child_module
import shardmesh.listener.supervisor as supervisor_module
from shardmesh.errors import EngineError, ShardmeshError, TheirError, UnreachableError
from shardmesh.links.dial import dial
from shardmesh.listener.data_child import DataChild
from shardmesh.listener.local_messages import Ready, Start
from shardmesh.listener.supervisor import (
    PAUSE_MAX_S,
    PAUSE_MIN_S,
    ShardStatus,
    Supervisor,
    restart_pause_s,
)
from shardmesh.memory import memory_bytes
from shardmesh.wire.limits import EXPECTED_LINKS_MAX, OPEN_FILES_MIN
from shardmesh.wire.link_agreement import Endpoint
from shardmesh.wire.messages import NextStage

LOAD_TIMEOUT_S = 30.0
EXIT_TIMEOUT_S = 10.0


@given(st.integers(0, 10_000))
def test_pauses_between_starts_grow_to_a_bound(n_short_lives: int) -> None:
    pause_s = restart_pause_s(n_short_lives)
    assert pause_s == 0 if n_short_lives == 0 else PAUSE_MIN_S <= pause_s <= PAUSE_MAX_S
    assert restart_pause_s(n_short_lives + 1) >= pause_s


def test_many_deaths_in_a_row_are_no_restart_storm() -> None:
    waited_s, n_starts = 0.0, 0
    while waited_s < 300:
        n_starts += 1
        waited_s += restart_pause_s(n_starts)
    assert n_starts < 20


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """What serves the first of two shards of a tiny model."""
    return start_of_tiny_shard(tmp_path_factory.mktemp("shards"), 0)


@pytest.fixture
def broken_shard(start: Start, tmp_path: Path) -> Path:
    broken = tmp_path / "shard-0.gguf"
    broken.write_bytes(Path(start.shard_path).read_bytes()[:1000])
    return broken


class Watched(Supervisor):
    """A supervisor that remembers every status it told."""

    def __init__(self) -> None:
        self.seen: list[ShardStatus] = []
        self._seen_one = trio.Event()
        super().__init__(no_agreement, self._on_status)

    def _on_status(self, status: ShardStatus) -> None:
        self.seen.append(status)
        self._seen_one.set()
        self._seen_one = trio.Event()

    async def reached(self, *states: str) -> None:
        """Waits until these states have been told in this order, others between them or not."""

        def is_reached() -> bool:
            told = iter(status.state for status in self.seen)
            return all(state in told for state in states)

        with trio.fail_after(LOAD_TIMEOUT_S):
            while not is_reached():
                await self._seen_one.wait()


@asynccontextmanager
async def supervised() -> AsyncIterator[Watched]:
    supervisor = Watched()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervisor.run)
        yield supervisor
        nursery.cancel_scope.cancel()


def pid_of(supervisor: Supervisor) -> int:
    assert supervisor.pid is not None
    return supervisor.pid


async def is_gone(pid: int) -> None:
    """Waits until there is no such process, or it is only not yet collected."""
    with trio.fail_after(EXIT_TIMEOUT_S):
        while psutil.pid_exists(pid):
            try:
                if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                    return
            except psutil.NoSuchProcess:
                return
            await trio.sleep(0.01)  # the kernel tells nobody but the parent


@pytest.mark.processes
async def test_a_shard_is_loaded_reached_and_unloaded(start: Start) -> None:
    async with supervised() as supervisor:
        supervisor.serve(start)
        ready = await supervisor.wait_loaded(LOAD_TIMEOUT_S)
        assert (ready.architecture, ready.n_ctx, ready.n_parallel) == ("llama", 64, 2)
        pid = pid_of(supervisor)
        metrics = await supervisor.metrics()
        assert metrics is not None
        assert metrics.memory_bytes > 0
        grant, expected = new_grants()
        port = await supervisor.expect(expected)
        here = (Endpoint(host="127.0.0.1", port=port),)
        user = Recorder()
        link = await dial(dataclasses.replace(grant, endpoints=here), user)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.run)
            supervisor.serve(None)
            assert (await user.end()).code == "LINK_LOST"
        await is_gone(pid)
        assert supervisor.status.state == "absent"
        with pytest.raises(UnreachableError):
            await supervisor.expect(expected)
        assert [status.state for status in supervisor.seen] == ["loading", "loaded", "absent"]


@pytest.mark.processes
async def test_the_process_tells_how_many_sessions_it_has(start: Start) -> None:
    last = Path(start.shard_path).with_name("shard-1.gguf")
    start = msgspec.structs.replace(start, shard_path=str(last), layer_start=1, layer_end=2)
    send_told, told = trio.open_memory_channel[int](8)
    supervisor = Supervisor(
        no_agreement, lambda status: None, lambda: send_told.send_nowait(supervisor.n_sessions)
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervisor.run)
        supervisor.serve(start)
        await supervisor.wait_loaded(LOAD_TIMEOUT_S)
        grant, expected = new_grants()
        here = Endpoint(host="127.0.0.1", port=await supervisor.expect(expected))
        link = await dial(dataclasses.replace(grant, endpoints=(here,)), Recorder())
        nursery.start_soon(link.run)
        for number in range(2):
            opening = open_session(
                session=bytes([number] * 16),
                manifest_digest=start.manifest_digest,
                layer_start=1,
                layer_end=2,
                previous_stage="somebody",
            )
            link.send(opening)
        with trio.fail_after(EXIT_TIMEOUT_S):
            while await told.receive() != 2:
                pass
            link.close()
            while await told.receive() != 0:
                pass
        nursery.cancel_scope.cancel()


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="reads limits and files of another process")
async def test_the_process_has_what_it_needs_and_no_more(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_SECRET", "not for the data process")
    with socket.create_server(("127.0.0.1", 0)) as ours:
        ours.set_inheritable(True)
        async with supervised() as supervisor:
            supervisor.serve(msgspec.structs.replace(start, nice=2))
            ready = await supervisor.wait_loaded(LOAD_TIMEOUT_S)
            process = psutil.Process(pid_of(supervisor))
            assert process.nice() == psutil.Process().nice() + 2
            ports = {c.laddr.port for c in process.net_connections() if c.laddr}
            assert ports == {ready.data_port}
            assert not [name for name in process.environ() if name.startswith("LLAMA_")]
            assert process.rlimit(psutil.RLIMIT_CORE) == (0, 0)
            assert process.rlimit(psutil.RLIMIT_DATA) == (memory_bytes(), memory_bytes())
            assert process.rlimit(psutil.RLIMIT_NOFILE)[0] >= OPEN_FILES_MIN
            status = await trio.Path(f"/proc/{process.pid}/status").read_text()
            assert "NoNewPrivs:\t1" in status


@pytest.mark.processes
async def test_more_offers_than_a_process_keeps_do_not_end_it(start: Start) -> None:
    async with supervised() as supervisor:
        supervisor.serve(start)
        await supervisor.wait_loaded(LOAD_TIMEOUT_S)
        pid = pid_of(supervisor)
        for _ in range(EXPECTED_LINKS_MAX + 5):
            await supervisor.expect(new_grants()[1])
        assert await supervisor.metrics() is not None
        assert pid_of(supervisor) == pid


@pytest.mark.processes
async def test_a_killed_process_is_noticed_and_started_again(start: Start) -> None:
    async with supervised() as supervisor:
        supervisor.serve(start)
        await supervisor.wait_loaded(LOAD_TIMEOUT_S)
        first = pid_of(supervisor)
        os.kill(first, signal.SIGKILL)
        await supervisor.reached("loaded", "failed")
        failure = next(s.error for s in supervisor.seen if s.state == "failed")
        assert isinstance(failure, EngineError)
        assert failure.code == "ENGINE_DIED"
        assert "SIGKILL" in str(failure)
        await supervisor.reached("loaded", "failed", "loading", "loaded")
        assert pid_of(supervisor) != first
        assert supervisor.n_restarts == 1


@pytest.mark.processes
async def test_another_shard_while_one_is_loading(start: Start) -> None:
    async with supervised() as supervisor:
        supervisor.serve(start)
        await trio.testing.wait_all_tasks_blocked()
        supervisor.serve(msgspec.structs.replace(start, n_ctx=32))
        ready = await supervisor.wait_loaded(LOAD_TIMEOUT_S)
        assert ready.n_ctx == 32
        assert "failed" not in [status.state for status in supervisor.seen]
        assert supervisor.n_restarts == 0


@pytest.mark.processes
async def test_a_shard_that_is_no_longer_wanted_while_it_loads(start: Start) -> None:
    async with supervised() as supervisor:
        supervisor.serve(start)
        while supervisor.pid is None:
            await trio.lowlevel.checkpoint()
        pid = supervisor.pid
        supervisor.serve(None)
        await is_gone(pid)
        assert [status.state for status in supervisor.seen] == ["loading", "absent"]


@pytest.mark.processes
@pytest.mark.parametrize("n_moments", [0, 1, 2, 5, 50])
async def test_a_cancellation_at_any_moment_leaves_no_process(start: Start, n_moments: int) -> None:
    before = {child.pid for child in psutil.Process().children()}
    async with trio.open_nursery() as nursery:
        child = DataChild(no_agreement, lambda ready: None)
        nursery.start_soon(child.run, start)
        for _ in range(n_moments):
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert {child.pid for child in psutil.Process().children()} <= before


@pytest.mark.processes
async def test_a_broken_file_is_a_typed_failure_and_tried_again_late(
    start: Start, broken_shard: Path
) -> None:
    async with supervised() as supervisor:
        supervisor.serve(msgspec.structs.replace(start, shard_path=str(broken_shard)))
        with pytest.raises(TheirError):
            await supervisor.wait_loaded(LOAD_TIMEOUT_S)
        with trio.move_on_after(3 * PAUSE_MIN_S):
            await supervisor.reached("failed", "loading")
        assert supervisor.n_restarts == 1
        assert supervisor.status.state == "failed"
        supervisor.serve(start)  # what mends it is not waited for
        await supervisor.wait_loaded(LOAD_TIMEOUT_S)


@pytest.mark.processes
async def test_a_process_that_hangs_is_killed(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_child_module, "STOP_TIMEOUT_S", 0.1)
    async with supervised() as supervisor:
        supervisor.serve(start)
        await supervisor.wait_loaded(LOAD_TIMEOUT_S)
        pid = pid_of(supervisor)
        os.kill(pid, signal.SIGSTOP)
        supervisor.serve(None)
        await is_gone(pid)


@pytest.mark.processes
async def test_the_process_ends_with_the_one_that_started_it(start: Start) -> None:
    program = f"""
import os, sys, trio, msgspec
from shardmesh.listener.local_messages import Start
from shardmesh.listener.supervisor import Supervisor
start = msgspec.json.decode({msgspec.json.encode(start)!r}, type=Start)
async def main():
    supervisor = Supervisor(None, lambda status: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervisor.run)
        supervisor.serve(start)
        await supervisor.wait_loaded(30)
        print(supervisor.pid, flush=True)
        await trio.sleep_forever()
trio.run(main)
"""
    parent = await trio.lowlevel.open_process(
        [sys.executable, "-c", program], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    with trio.fail_after(LOAD_TIMEOUT_S):
        pid = int(await parent.stdout.receive_some(100))
    parent.kill()
    await parent.wait()
    await parent.stdout.aclose()
    await is_gone(pid)


async def test_the_file_is_mended_while_the_supervisor_pauses(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock, start: Start
) -> None:
    """The same rules without a process: what is told, and when the next start is."""
    begun_s: list[float] = []

    class Short:
        def __init__(self, agree: object, on_ready: object, on_sessions: object) -> None:
            self.pid = 1

        async def run(self, start: Start) -> ShardmeshError | None:
            begun_s.append(trio.current_time())
            return EngineError("it died")

        def stop(self) -> None:
            raise AssertionError("nothing runs")

    monkeypatch.setattr(supervisor_module, "DataChild", Short)
    async with supervised() as supervisor:
        supervisor.serve(start)
        await trio.sleep(100)
    gaps_s = [b - a for a, b in itertools.pairwise(begun_s)]
    assert gaps_s == pytest.approx([restart_pause_s(n) for n in range(1, len(gaps_s) + 1)])
    assert len(begun_s) < 15


async def test_a_node_that_drains_goes_on_draining_with_the_next_process(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock, start: Start
) -> None:
    were_draining: list[bool] = []

    class Short:
        def __init__(self, agree: object, on_ready: object, on_sessions: object) -> None:
            self.pid = 1

        async def run(self, start: Start) -> ShardmeshError | None:
            were_draining.append(start.is_draining)
            return EngineError("it died")

    monkeypatch.setattr(supervisor_module, "DataChild", Short)
    async with supervised() as supervisor:
        supervisor.serve(start)
        await trio.sleep(100)
        n_before = len(were_draining)
        await supervisor.drain()
        await trio.sleep(100)
    assert not any(were_draining[:n_before])
    assert len(were_draining) > n_before
    assert all(were_draining[n_before:])


async def test_what_is_said_while_a_process_loads_is_told_once_it_can_hear(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_load, told = trio.Event(), list[object]()
    following = (NextStage(peer_id="next", addresses=()),)

    class Child:
        """Loads until it may end loading, and notes what it is told then."""

        n_sessions = 0

        def __init__(self, agree: object, on_ready: Callable[[Ready], None], *rest: object) -> None:
            self._on_ready = on_ready

        async def run(self, given: Start) -> None:
            assert (given.is_draining, given.following) == (True, ())
            await may_load.wait()
            self._on_ready(
                Ready(data_port=1, architecture="a", n_ctx=1, n_parallel=1, fingerprint="f")
            )
            await trio.sleep_forever()

        async def drain(self, is_draining: bool) -> None:
            told.append(is_draining)

        async def follow(self, nodes: tuple[NextStage, ...]) -> None:
            told.append(nodes)

    monkeypatch.setattr(supervisor_module, "DataChild", Child)
    supervisor = Supervisor(no_agreement, lambda status: None)
    await supervisor.drain()
    supervisor.serve(start)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervisor.run)
        await trio.testing.wait_all_tasks_blocked()
        await supervisor.drain(False)
        await supervisor.follow(following)
        assert told == []
        may_load.set()
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert told == [False, following]
