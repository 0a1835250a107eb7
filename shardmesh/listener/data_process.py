"""The data process of a listener: llama.cpp, the links and the scheduler.

Started by the control process as `python -m shardmesh.listener.data_process`, spoken to over its
standard input and output.  It ends when that input ends, so that it never outlives its listener.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    # Ctrl-C goes to the whole terminal, also while the rest is imported, which takes a while; the
    # control process decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import psutil
import trio

from shardmesh.confinement import allow_files, confine
from shardmesh.engine.at_once import find_numbers_at_once
from shardmesh.engine.base import Engine, EngineOptions
from shardmesh.engine.llama import load_engine
from shardmesh.engine.watchdog import Call
from shardmesh.errors import BusyError, OurError, ShardmeshError, StorageError, known_error
from shardmesh.links.ahead import LinksAhead
from shardmesh.links.dial import Acceptor, LinkPool
from shardmesh.links.link import Link
from shardmesh.listener.hung import engine_hung, why_hung
from shardmesh.listener.local_messages import (
    PROCESS_GONE,
    AskMetrics,
    CutOff,
    Drain,
    ExpectLink,
    Following,
    Grant,
    LinkAnswer,
    LinkState,
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
from shardmesh.listener.stage import Stage
from shardmesh.listener.stage_session import StageIdentity
from shardmesh.logs import configure_logging
from shardmesh.memory import memory_bytes, memory_free_bytes
from shardmesh.shards.gguf_check import read_gguf
from shardmesh.shards.store import ShardStore
from shardmesh.wire.limits import EXPECTED_LINKS_MAX
from shardmesh.wire.link_agreement import LinkGrant
from shardmesh.wire.messages import NextStage

logger = logging.getLogger(__name__)

NEXT_LINK_TIMEOUT_S = 12.0
"""For agreeing with the next stage and dialing it; shorter than a coordinator waits."""

SWITCH_INTERVAL_S = 0.0005
"""How long the thread that has the interpreter keeps it while the other one waits.

Python's own 5 ms would delay a finished result by as much when frames come in at that moment.
"""

COPIES_SHARE_OF_MEMORY = 0.25
"""Part of the memory that is free when the shard is loaded, which copies for others may take."""

SESSIONS_PAUSE_S = 0.1
"""Between two messages about the number of sessions: others are told every second at most."""

FAREWELL_TIMEOUT_S = 1.0
"""For telling the coordinators why their sessions end."""

LOOK_INTERVAL_S = 1.0
"""So often it is looked whether the engine still comes back from its calls."""


class DataProcess:
    """One loaded shard and everything around it, on one trio loop."""

    def __init__(self, channel: LocalChannel, start: Start, engine: Engine) -> None:
        self._channel = channel
        self._start = start
        self._engine = engine
        self._process = psutil.Process()
        self._asked: dict[int, trio.MemorySendChannel[LinkAnswer]] = {}
        self._n_asked = 0

    async def run(self) -> None:
        """Serves until the control process says stop or is gone."""
        async with trio.open_nursery() as nursery:
            identity = StageIdentity(
                self._start.manifest_digest, self._start.layer_start, self._start.layer_end
            )
            self.stage = Stage(self._engine, identity, nursery, self._link_to)
            self.stage.is_draining = self._start.is_draining
            self.stage.sessions_per_node_max = self._start.sessions_per_node_max
            self.stage.limit_copies(int(COPIES_SHARE_OF_MEMORY * memory_free_bytes()))
            self._acceptor = Acceptor(self.stage)
            self._pool = LinkPool(nursery, self._agree, self.stage)
            self._ahead = LinksAhead(self._pool, NEXT_LINK_TIMEOUT_S)
            self._ahead.keep(self._start.following)
            listeners = await _open_listeners(self._start.listen_hosts, self._start.data_port)
            nursery.start_soon(trio.serve_listeners, self._acceptor.handle, listeners)
            nursery.start_soon(self.stage.run)
            port = listeners[0].socket.getsockname()[1]
            await self._channel.send(self._ready(port))
            nursery.start_soon(self._tell_sessions)
            nursery.start_soon(self._ahead.run)
            nursery.start_soon(self._watch_engine)
            await self._obey(nursery)
            with trio.move_on_after(FAREWELL_TIMEOUT_S):
                await self.stage.farewell()
            nursery.cancel_scope.cancel()

    async def _obey(self, nursery: trio.Nursery) -> None:
        while (message := await self._channel.receive()) is not None:
            match message:
                case ExpectLink():
                    self._expect(message)
                case CutOff():
                    self._acceptor.cut_off(message.peer_ids)
                    self._pool.cut_off(message.peer_ids)
                case Following():
                    self._ahead.keep(message.nodes)
                case LinkAnswer():
                    asked = self._asked.pop(message.number, None)
                    if asked is not None:
                        asked.send_nowait(message)
                case AskMetrics():
                    nursery.start_soon(self._channel.send, self._metrics(message.number))
                case Drain():
                    self.stage.is_draining = message.is_draining
                case Stop():
                    return
                case _:
                    raise unexpected(message)

    async def _tell_sessions(self) -> None:
        """Tells the control process how many sessions there are, so that it needs not ask."""
        n_told = 0
        while True:
            await self.stage.sessions.wait_number_is_not(n_told)
            n_told = self.stage.n_sessions
            await self._channel.send(SessionsHeld(n_sessions=n_told))
            await trio.sleep(SESSIONS_PAUSE_S)

    async def _watch_engine(self) -> None:
        """Ends this process, whatever its threads do, once a call into the engine hangs."""
        call: Call | None = None
        while call is None:
            await trio.sleep(LOOK_INTERVAL_S)
            call = self._engine.watchdog.look(LOOK_INTERVAL_S)
        error = engine_hung(call)
        logger.error("%s; this process ends", error)
        with trio.move_on_after(FAREWELL_TIMEOUT_S):
            await self.stage.farewell(partial(why_hung, call))
        with trio.move_on_after(FAREWELL_TIMEOUT_S):
            await self._channel.send(failed_message(error))
        os._exit(1)  # llama.cpp cannot be interrupted, and a thread cannot be left

    def _expect(self, message: ExpectLink) -> None:
        try:
            self._acceptor.expect(message.grant.link_grant())
        except BusyError as error:
            # Whoever was offered the link finds it refused; the others are not concerned.
            logger.warning("a link was not taken: %s", error)

    def _ready(self, port: int) -> Ready:
        info = self._engine.info
        return Ready(
            data_port=port,
            architecture=info.architecture,
            n_ctx=info.n_ctx,
            n_parallel=info.n_parallel,
            fingerprint=info.fingerprint,
        )

    def _metrics(self, number: int) -> Metrics:
        n_kv_tokens = sum(map(self._engine.n_held, self.stage.sequences_in_use))
        return Metrics(
            number=number,
            n_sessions=self.stage.n_sessions,
            memory_bytes=self._process.memory_info().rss,
            counters={
                **dataclasses.asdict(self.stage.counters),
                **self.stage.copy_figures,
                "n_kv_tokens": n_kv_tokens,
            },
            links=tuple(
                LinkState(
                    peer_id=link.peer_id,
                    kind=link.kind,
                    round_trip_us=2 * link.half_round_trip_us,
                )
                for link in self._pool.links()
            ),
        )

    async def _link_to(self, target: NextStage) -> Link:
        return await self._pool.get(target.peer_id, target.addresses, NEXT_LINK_TIMEOUT_S)

    async def _agree(self, peer_id: str, addresses: tuple[str, ...]) -> LinkGrant:
        """Has the control process agree on a link, since it owns libp2p."""
        self._n_asked += 1
        number = self._n_asked
        answered, answer = trio.open_memory_channel[LinkAnswer](1)
        if len(self._asked) >= EXPECTED_LINKS_MAX:
            raise OurError("too many links are being set up", code="TOO_MANY_LINKS")
        self._asked[number] = answered
        try:
            await self._channel.send(NeedLink(number=number, peer_id=peer_id, addresses=addresses))
            message = await answer.receive()
        finally:
            self._asked.pop(number, None)
        if message.grant is None:
            raise (message.failed.error() if message.failed else OurError("no link was granted"))
        grant: Grant = message.grant
        return grant.link_grant()


async def _open_listeners(hosts: Sequence[str], port: int) -> list[trio.SocketListener]:
    """Listens on all addresses with the same port."""
    listeners: list[trio.SocketListener] = []
    for host in hosts:
        try:
            listeners += await trio.open_tcp_listeners(port, host=host)
        except OSError as error:
            raise StorageError(
                f"the data port {port} cannot be opened on {host}: {error.strerror}",
                code="PORT_IN_USE",
                next_step="choose another one with --data-port, or 0 for any",
            ) from error
        port = listeners[0].socket.getsockname()[1]
    return listeners


def _load(start: Start) -> Engine:
    names = [field.name for field in dataclasses.fields(EngineOptions)]
    options = EngineOptions(**{name: getattr(start, name) for name in names})
    path = Path(start.shard_path)
    shard_id = read_gguf(path).get_int("shardmesh.shard_id", 0)
    adapters = ShardStore(path.parent, create=False).adapters(shard_id)
    engine = load_engine(path, options, adapters)
    numbers = find_numbers_at_once(engine)
    engine.learn_cells()
    logger.info("numbers of sequences computed at once: %s", ", ".join(map(str, (1, *numbers))))
    return engine


async def _main(incoming: int, outgoing: int) -> int:
    channel = LocalChannel(trio.lowlevel.FdStream(incoming), trio.lowlevel.FdStream(outgoing))
    start = await channel.receive()
    if start is None:
        return 0
    if not isinstance(start, Start):
        raise unexpected(start)
    os.nice(start.nice)  # before there is a thread that computes: each inherits it
    configure_logging(start.log_format, verbosity=start.log_verbosity, stream=sys.stderr)
    engine: Engine | None = None
    try:
        engine = await trio.to_thread.run_sync(_load, start)
        await DataProcess(channel, start, engine).run()
    except (ShardmeshError, BaseExceptionGroup) as error:
        known = known_error(error)
        if known is None:
            raise
        if known.code != PROCESS_GONE:
            await channel.send(failed_message(known))
        return 1
    finally:
        if engine is not None:
            await trio.to_thread.run_sync(engine.close)
    return 0


def main() -> int:
    """Runs the data process on the pipes that it was started with."""
    # What llama.cpp prints on standard output must not end up among the messages.
    incoming, outgoing = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    allow_files()
    confine(memory_bytes())
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    return trio.run(_main, incoming, outgoing)


if __name__ == "__main__":
    sys.exit(main())
