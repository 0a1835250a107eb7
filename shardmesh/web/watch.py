"""The mesh as the gateway sees it: from one look to the next, and what happened between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import trio

from shardmesh.swarm.directory import Directory
from shardmesh.web.events import EventHub
from shardmesh.web.roster import Node, Report, changes_between, look

LOOK_INTERVAL_S = 5.0
"""An announcement that expires changes nothing in the directory, so look by the clock too."""

LOOK_PAUSE_S = 0.03
"""Changes of so long are seen together: a mesh of 200 nodes that reports is looked at once."""


class MeshWatch:
    """Keeps `nodes` up to date and publishes what changes."""

    def __init__(
        self,
        directory: Directory,
        hub: EventHub,
        *,
        reports: Mapping[str, Report],
        is_busy: Callable[[str], bool],
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.nodes: dict[str, Node] = {}
        self._directory = directory
        self._hub = hub
        self._reports = reports
        self._is_busy = is_busy
        self._wall_clock = wall_clock
        self._touched = trio.Event()
        self._on_change: list[Callable[[], None]] = []

    def tell(self, on_change: Callable[[], None]) -> None:
        """Calls this after every look."""
        self._on_change.append(on_change)

    def touch(self) -> None:
        """A report or a session is new: look again soon."""
        self._touched.set()

    def look(self, *, is_first: bool = False) -> None:
        """Looks now; the first look publishes nothing, for nothing has happened."""
        announcements = self._directory.all()
        left = {p for p in self.nodes if self._directory.has_left(p)}
        before, now_s = self.nodes, self._wall_clock()
        busy = {a.peer_id for a in announcements if self._is_busy(a.peer_id)}
        self.nodes = look(before, announcements, self._reports, now_s=now_s, left=left, busy=busy)
        if not is_first:
            for change in changes_between(before, self.nodes, left=left):
                self._hub.publish(change.kind, cause=change.cause, data=change.data)
        for tell in self._on_change:
            tell()

    async def run(self) -> None:
        """Looks whenever something may have changed, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow_directory)
            self.look(is_first=True)
            while True:
                with trio.move_on_after(LOOK_INTERVAL_S):
                    await self._touched.wait()
                self._touched = trio.Event()
                self.look()
                await trio.sleep(LOOK_PAUSE_S)

    async def _follow_directory(self) -> None:
        version = -1
        while True:
            version = await self._directory.wait_changed(version)
            self.touch()
