"""Links that are brought up before anybody needs them.

Agreeing on a link and dialing it takes several exchanges, and half a second on a busy machine:
time that a first session would wait for, or one that has just lost a replica.  It also tells what
the way to a node costs before anything was sent there.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import trio

from shardmesh.links.dial import LinkPool
from shardmesh.wire.messages import NextStage

LOOK_AGAIN_S: Final = 15.0
"""Before a link that was lost, or could not be had, is tried again."""


class LinksAhead:
    """Keeps links to some nodes; whoever needs one takes it from the same pool."""

    def __init__(self, pool: LinkPool, dial_timeout_s: float) -> None:
        self._pool = pool
        self._dial_timeout_s = dial_timeout_s
        self._wanted: Collection[NextStage] = ()
        self._changed = trio.Event()

    def keep(self, wanted: Collection[NextStage]) -> None:
        """From now on these nodes; links to others stay as long as they last."""
        self._wanted = wanted
        self._changed.set()

    async def run(self) -> None:
        """Dials whoever is wanted and not linked; until cancelled."""
        while True:
            self._changed = trio.Event()
            for node in self._wanted:
                self._pool.dial_soon(node.peer_id, node.addresses, self._dial_timeout_s)
            with trio.move_on_after(LOOK_AGAIN_S):
                await self._changed.wait()
