"""One life of a data process, seen from the control process that started it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection

import trio

from shardmesh.confinement import without_settings
from shardmesh.engine.large_pages import environment_for
from shardmesh.errors import EngineError, ShardmeshError, UnreachableError, known_error
from shardmesh.links.dial import Agree
from shardmesh.listener.local_messages import (
    PROCESS_GONE,
    AskMetrics,
    CutOff,
    Drain,
    ExpectLink,
    Failed,
    Following,
    Grant,
    LinkAnswer,
    LocalChannel,
    Metrics,
    NeedLink,
    Ready,
    SessionsHeld,
    Start,
    Stop,
    failed_message,
    unexpected,
)
from shardmesh.wire.link_agreement import LinkGrant
from shardmesh.wire.messages import NextStage

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 2.0
"""Between asking a data process to stop and killing it; the whole node has three seconds."""

METRICS_TIMEOUT_S = 2.0


class DataChild:
    """A started data process: loading, then ready, then gone."""

    def __init__(
        self,
        agree: Agree,
        on_ready: Callable[[Ready], None],
        on_sessions: Callable[[], None] = lambda: None,
    ) -> None:
        self._agree = agree
        self._on_ready = on_ready
        self._on_sessions = on_sessions
        self.n_sessions = 0
        self._channel: LocalChannel | None = None
        self._asked: dict[int, trio.MemorySendChannel[Metrics]] = {}
        self._n_asked = 0
        self._stop_asked = trio.Event()
        self.pid: int | None = None
        self.ready: Ready | None = None

    async def run(self, start: Start) -> ShardmeshError | None:
        """Starts the process and serves it until it is gone; the cause, None if it was asked to.

        A cancellation stops the process first, which takes STOP_TIMEOUT_S at most.
        """
        command = [sys.executable, "-m", "shardmesh.listener.data_process"]
        environment = without_settings(os.environ)
        process = await trio.lowlevel.open_process(
            command,
            env=environment_for(environment) if start.large_pages else environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            close_fds=True,
        )
        if process.stdin is None or process.stdout is None:
            raise EngineError("the data process has no pipes")
        self.pid = process.pid
        self._channel = LocalChannel(process.stdout, process.stdin)
        failure: ShardmeshError | None = None
        ends_itself = False
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._stop_when_asked)
                await self._channel.send(start)
                failure = await self._converse(nursery)
                ends_itself = True
                nursery.cancel_scope.cancel()
        except (ShardmeshError, BaseExceptionGroup) as error:
            failure = known_error(error)
            if failure is None:
                raise
        finally:
            # One that loads does not look at its input, and has nobody to take leave of.
            has_leave_to_take, self.ready = self.ready is not None, None
            with trio.CancelScope(shield=True):
                await self._end(process, STOP_TIMEOUT_S if ends_itself or has_leave_to_take else 0)
        if self._stop_asked.is_set():
            return None
        if failure is None or failure.code == PROCESS_GONE:
            return _death(process.returncode)
        return failure

    def stop(self) -> None:
        """Asks the process to end its sessions and exit; `run` returns then."""
        self._stop_asked.set()

    async def expect(self, grant: LinkGrant) -> None:
        """Tells the process that somebody will dial this link; raises UnreachableError if gone."""
        await self._living_channel().send(ExpectLink(grant=Grant.of(grant)))

    async def cut_off(self, peer_ids: Collection[str]) -> None:
        """Has the process end its links with these nodes; raises UnreachableError if gone."""
        await self._living_channel().send(CutOff(peer_ids=tuple(sorted(peer_ids))))

    async def follow(self, nodes: tuple[NextStage, ...]) -> None:
        """Has the process keep links to these nodes; raises UnreachableError if it is gone."""
        await self._living_channel().send(Following(nodes=nodes))

    async def drain(self, is_draining: bool) -> None:
        """Has the process take no further sessions, or take them again; raises UnreachableError."""
        await self._living_channel().send(Drain(is_draining=is_draining))

    async def metrics(self) -> Metrics:
        """The process's own figures; raises UnreachableError (the moment's) if it is gone."""
        self._n_asked += 1
        number = self._n_asked
        answered, answer = trio.open_memory_channel[Metrics](1)
        self._asked[number] = answered
        try:
            with trio.fail_after(METRICS_TIMEOUT_S):
                await self._living_channel().send(AskMetrics(number=number))
                return await answer.receive()
        except trio.TooSlowError:
            raise UnreachableError("the data process did not answer in time") from None
        finally:
            del self._asked[number]

    def _living_channel(self) -> LocalChannel:
        if self._channel is None or self.ready is None:
            raise UnreachableError(
                "no shard is loaded on this node now",
                code="NOT_LOADED",
                next_step="try again shortly; `shardmesh status` shows the state of its shard",
            )
        return self._channel

    async def _converse(self, nursery: trio.Nursery) -> ShardmeshError | None:
        channel = self._channel
        while channel is not None and (message := await channel.receive()) is not None:
            match message:
                case Ready():
                    if not self._stop_asked.is_set():  # else another shard is to be served
                        self.ready = message
                        self._on_ready(message)
                case NeedLink():
                    nursery.start_soon(self._answer_need, channel, message)
                case Metrics():
                    asked = self._asked.get(message.number)
                    if asked is not None:
                        asked.send_nowait(message)
                case SessionsHeld():
                    self.n_sessions = message.n_sessions
                    self._on_sessions()
                case Failed():
                    return message.error()
                case _:
                    raise unexpected(message)
        return None

    async def _answer_need(self, channel: LocalChannel, need: NeedLink) -> None:
        grant: Grant | None = None
        failed: Failed | None = None
        try:
            grant = Grant.of(await self._agree(need.peer_id, need.addresses))
        except ShardmeshError as error:
            failed = failed_message(error)
        await channel.send(LinkAnswer(number=need.number, grant=grant, failed=failed))

    async def _stop_when_asked(self) -> None:
        await self._stop_asked.wait()
        if self._channel is not None and self.ready is not None:
            await self._channel.send(Stop())
            await trio.sleep(STOP_TIMEOUT_S)
        self.ready = None  # it has had its time
        raise UnreachableError("the data process did not stop in time")

    async def _end(self, process: trio.Process, timeout_s: float) -> None:
        """Sees the process out: closing its input asks it to exit, a kill makes it."""
        self._channel = None
        if process.stdin is not None:
            await process.stdin.aclose()
        with trio.move_on_after(timeout_s):
            await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()
        if process.stdout is not None:
            await process.stdout.aclose()


def _death(returncode: int | None) -> EngineError:
    if returncode is not None and returncode < 0:
        how = f"was ended by {signal.Signals(-returncode).name}"
    else:
        how = f"exited with status {returncode}"
    return EngineError(
        f"the data process {how}",
        code="ENGINE_DIED",
        next_step="it is started again by itself; the log of the node says more",
    )
