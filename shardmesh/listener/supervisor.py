"""Keeps the data process of a listener running, whatever happens to it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Collection
from typing import Literal

import msgspec
import trio

from shardmesh.errors import ShardmeshError, TheirError, UnreachableError
from shardmesh.links.dial import Agree
from shardmesh.listener.data_child import DataChild
from shardmesh.listener.local_messages import Metrics, Ready, Start
from shardmesh.wire.link_agreement import LinkGrant
from shardmesh.wire.messages import NextStage

logger = logging.getLogger(__name__)

ShardState = Literal["absent", "loading", "loaded", "failed"]

LONG_LIFE_S = 10.0
"""A data process that lived so long is started again at once after its death."""

PAUSE_MIN_S = 0.1
PAUSE_MAX_S = 30.0


def restart_pause_s(n_short_lives: int) -> float:
    """Pause before the next start; doubles with each life in a row that was short."""
    if n_short_lives == 0:
        return 0.0
    return min(PAUSE_MIN_S * 2.0 ** min(n_short_lives - 1, 20), PAUSE_MAX_S)


@dataclasses.dataclass(frozen=True)
class ShardStatus:
    """The shard's state as it is announced."""

    state: ShardState
    ready: Ready | None = None
    error: ShardmeshError | None = None


class Supervisor:
    """Runs the data process for whatever shard is to be served, one at a time."""

    def __init__(
        self,
        agree: Agree,
        on_change: Callable[[ShardStatus], None],
        on_sessions: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_sessions` is called when `n_sessions` has changed."""
        self.status = ShardStatus("absent")
        self._agree = agree
        self._on_change = on_change
        self._on_sessions = on_sessions
        self._start: Start | None = None
        self._child: DataChild | None = None
        self._is_draining = False
        self._following: tuple[NextStage, ...] = ()
        self._start_changed = trio.Event()
        self._status_changed = trio.Event()
        self.n_restarts = 0

    @property
    def pid(self) -> int | None:
        """Process id of the data process, None while there is none."""
        return self._child.pid if self._child is not None else None

    @property
    def n_sessions(self) -> int:
        """Sessions of the data process, which tells of them within a tenth of a second."""
        return self._child.n_sessions if self._child is not None else 0

    def serve(self, start: Start | None) -> None:
        """Serves this shard from now on, None for none; what is served now is stopped."""
        self._start = start
        self._start_changed.set()
        self._start_changed = trio.Event()
        if self._child is not None:
            self._child.stop()
        self._set_status(ShardStatus("loading" if start is not None else "absent"))

    async def wait_loaded(self, timeout_s: float) -> Ready:
        """The state of the loaded shard.

        Raises what its loading failed with, or UnreachableError (the moment's) after the timeout.
        """
        with trio.move_on_after(timeout_s):
            while True:
                status = self.status
                if status.ready is not None:
                    return status.ready
                if status.state == "failed" and status.error is not None:
                    raise status.error
                await self._status_changed.wait()
        raise UnreachableError(f"the shard was not loaded within {timeout_s:.0f} s")

    async def expect(self, grant: LinkGrant) -> int:
        """Lets the other side of a grant dial; the data port.  Raises UnreachableError."""
        child, ready = self._child, self.status.ready
        if child is None or ready is None:
            raise UnreachableError("no shard is loaded on this node now", code="NOT_LOADED")
        await child.expect(grant)
        return ready.data_port

    async def cut_off(self, peer_ids: Collection[str]) -> None:
        """Ends the data process's links with these nodes, if there is a data process."""
        if self._child is not None and self.status.ready is not None:
            with contextlib.suppress(UnreachableError):  # it is gone, and its links with it
                await self._child.cut_off(peer_ids)

    async def follow(self, nodes: tuple[NextStage, ...]) -> None:
        """Has the data process keep links to these nodes, and any later one as well."""
        if nodes == self._following:
            return
        self._following = nodes
        if self._child is not None and self.status.ready is not None:
            with contextlib.suppress(UnreachableError):  # it is gone; the next one is told
                await self._child.follow(nodes)

    async def drain(self, is_draining: bool = True) -> None:
        """Has the data process take no further sessions, or take them again; the next one, too."""
        self._is_draining = is_draining
        if self._child is not None and self.status.ready is not None:
            with contextlib.suppress(UnreachableError):  # it is gone, and its sessions with it
                await self._child.drain(is_draining)

    async def metrics(self) -> Metrics | None:
        """The data process's figures, None while there is none to ask."""
        if self._child is None or self.status.ready is None:
            return None
        return await self._child.metrics()

    async def run(self) -> None:
        """Serves until cancelled; the data process is gone then."""
        n_short_lives = 0
        while True:
            start = self._start
            if start is None:
                n_short_lives = 0
                await self._start_changed.wait()
                continue
            begun_s = trio.current_time()
            self._child = child = DataChild(self._agree, self._on_ready, self._on_sessions)
            try:
                given = msgspec.structs.replace(
                    start, is_draining=self._is_draining, following=self._following
                )
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._tell_what_is_new, child, given)
                    failure = await child.run(given)
                    nursery.cancel_scope.cancel()
            finally:
                self._child = None
            if failure is None or self._start is not start:
                continue
            lived_long = trio.current_time() - begun_s > LONG_LIFE_S
            n_short_lives = 0 if lived_long else n_short_lives + 1
            await self._pause(failure, restart_pause_s(n_short_lives))

    async def _tell_what_is_new(self, child: DataChild, given: Start) -> None:
        """Once the process has loaded, tells it what was said meanwhile, when it could not hear."""
        while self.status.ready is None:
            await self._status_changed.wait()
        with contextlib.suppress(UnreachableError):  # it is gone; the next one is told
            if self._is_draining != given.is_draining:
                await child.drain(self._is_draining)
            if self._following != given.following:
                await child.follow(self._following)

    async def _pause(self, failure: ShardmeshError, pause_s: float) -> None:
        """Says what happened and waits, unless another shard is to be served meanwhile."""
        if isinstance(failure, TheirError):
            pause_s = PAUSE_MAX_S  # a broken file does not mend itself
        self.n_restarts += 1
        logger.error("[SHARD] %s; starting it again in %.1f s", failure, pause_s)
        self._set_status(ShardStatus("failed", error=failure))
        with trio.move_on_after(pause_s):
            await self._start_changed.wait()
        if self._start is not None:
            self._set_status(ShardStatus("loading"))

    def _on_ready(self, ready: Ready) -> None:
        self._set_status(ShardStatus("loaded", ready=ready))

    def _set_status(self, status: ShardStatus) -> None:
        self.status = status
        self._status_changed.set()
        self._status_changed = trio.Event()
        self._on_change(status)
