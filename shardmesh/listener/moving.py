"""A listener that chose its shard itself goes where it is needed more, losing no session by it.

    looks now and then -> fetches the other shard's file -> announces that it wants to leave
    -> waits until all have heard it and looks again: another that leaves, or wants to and has the
       lower peer id, goes before
    -> takes no further sessions, waits for the end of the last -> serves the other shard

If its old shard would be without a replica, it stays, up to the last moment.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Collection
from typing import Protocol

import trio

from shardmesh.errors import RefusedError, ShardmeshError, UnreachableError
from shardmesh.listener.assignment import Serving, better_shard, staying
from shardmesh.listener.node import FIRST_LOAD_TIMEOUT_S, Intention, Node
from shardmesh.swarm.membership import Membership

logger = logging.getLogger("shardmesh")

JITTER = 0.25
"""Part of the interval by which looks come earlier or later, so that nodes do not look as one."""

SETTLE_S = 8.0
"""From saying that one wants to leave to leaving.  Twice as long as news travel, be it by pulling:
who has not heard this node's wish by then has left already, and this node has heard that."""

EMPTY_INTERVAL_S = 1.0
"""How often a node that leaves looks whether its last session is over and others still stay."""

NOT_AGAIN_S = 600.0
"""A shard that could not be had or loaded is not tried again for so long."""


class Movable(Protocol):
    """What moves: `NodeMoves` in a listener."""

    @property
    def interval_s(self) -> float: ...

    @property
    def total_shards(self) -> int: ...

    def own(self) -> Serving | None:
        """The node itself; None if it is not to move."""
        ...

    async def others(self) -> list[Serving]:
        """The other listeners of the split, as a neighbour knows them now."""
        ...

    async def n_sessions(self) -> int:
        """Raises UnreachableError (the moment's) if that cannot be told."""
        ...

    async def tell(self, intention: Intention) -> None:
        """Lets the mesh know; who leaves takes no further sessions."""
        ...

    async def provide(self, shard_id: int) -> None:
        """Has the shard's file here."""
        ...

    async def serve(self, shard_id: int) -> None:
        """Serves another shard and takes sessions again; returns when it is loaded."""
        ...


async def keep_useful(node: Movable) -> None:
    """Moves the node whenever that clearly helps; for ever, or never without an interval."""
    not_to: dict[int, float] = {}
    while node.interval_s:
        await trio.sleep(node.interval_s * _jitter())
        for shard_id in [i for i, until_s in not_to.items() if trio.current_time() > until_s]:
            del not_to[shard_id]
        target = await _chosen(node, not_to)
        if target is None:
            continue
        try:
            await node.provide(target)
            await _move(node, target, not_to)
        except ShardmeshError as error:
            logger.warning("[SHARD] ✗ Shard %d cannot be taken over: %s", target, error)
            not_to[target] = trio.current_time() + NOT_AGAIN_S


def _jitter() -> float:
    return random.uniform(1 - JITTER, 1 + JITTER)


async def _chosen(node: Movable, not_to: Collection[int]) -> int | None:
    own, others = node.own(), await node.others()
    return None if own is None else better_shard(own, others, node.total_shards, not_to)


async def _move(node: Movable, target: int, not_to: Collection[int]) -> None:
    """Raises what loading the shard raises; the old one is served again then."""
    own = node.own()
    if own is None or await _chosen(node, not_to) != target:
        return
    try:
        await node.tell("wants_to_leave")
        await trio.sleep(SETTLE_S * (_jitter() + JITTER))
        if await _chosen(node, not_to) != target:
            return
        logger.info("[SHARD] Shard %d needs this node more: leaving shard %d", target, own.shard_id)
        await node.tell("leaves")
        if not await _is_free(node):
            logger.info("[SHARD] Staying with shard %d", own.shard_id)
            return
        try:
            await node.serve(target)
        except ShardmeshError:
            await node.serve(own.shard_id)
            raise
        logger.info("[SHARD] ✓ Moved from shard %d to shard %d", own.shard_id, target)
    finally:
        with trio.CancelScope(shield=True):
            await node.tell("stays")


async def _is_free(node: Movable) -> bool:
    """Waits for the last session's end; False as soon as nobody else would be left."""
    while True:
        own, others = node.own(), await node.others()
        if own is None or not staying(own, others):
            return False
        try:
            if await node.n_sessions() == 0:
                return True
        except UnreachableError:
            return False  # it is being started again, and may be needed
        await trio.sleep(EMPTY_INTERVAL_S)


class NodeMoves:
    """A listener's node as what moves."""

    def __init__(self, node: Node, membership: Membership) -> None:
        self._node = node
        self._membership = membership

    @property
    def interval_s(self) -> float:
        return self._node.options.rebalance_interval_s

    @property
    def total_shards(self) -> int:
        assignment = self._node.assignment
        return assignment.total_shards if assignment is not None else 0

    def own(self) -> Serving | None:
        """None once it was told to leave or which shard to serve, or has not loaded one."""
        node = self._node
        ready = node.supervisor.status.ready
        if node.is_draining or node.was_told or node.assignment is None or ready is None:
            return None
        return Serving(
            peer_id=node.identity.peer_id,
            shard_id=node.assignment.shard_id,
            n_parallel=ready.n_parallel,
            is_loaded=True,
            is_draining=node.intention == "leaves",
            wants_to_leave=node.intention == "wants_to_leave",
        )

    async def others(self) -> list[Serving]:
        """Those of the same split that the directory has, after a neighbour was asked for news."""
        await self._membership.pull()
        assignment = self._node.assignment
        digest = assignment.manifest_digest if assignment is not None else ""
        return [
            Serving(
                peer_id=known.peer_id,
                shard_id=known.shard_id,
                n_parallel=known.capabilities.n_parallel,
                is_loaded=known.capabilities.shard_loaded,
                is_draining=known.capabilities.is_draining,
                wants_to_leave=known.capabilities.wants_to_leave,
            )
            for known in self._membership.known_listeners()
            if known.manifest_digest == digest and known.peer_id != self._node.identity.peer_id
        ]

    async def n_sessions(self) -> int:
        metrics = await self._node.supervisor.metrics()
        if metrics is None:
            raise UnreachableError("no shard is loaded on this node now", code="NOT_LOADED")
        return metrics.n_sessions

    async def tell(self, intention: Intention) -> None:
        await self._node.intend(intention)

    async def provide(self, shard_id: int) -> None:
        await self._node.provide_shard(shard_id)

    async def serve(self, shard_id: int) -> None:
        if self._node.was_told:
            raise RefusedError("somebody said meanwhile which shard to serve")
        await self._node.load_shard(shard_id)
        await self._node.supervisor.wait_loaded(FIRST_LOAD_TIMEOUT_S)
