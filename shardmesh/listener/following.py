"""The nodes that a stage's results may go to: it has links to them before the first session."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import trio

from shardmesh.listener.assignment import Assignment
from shardmesh.listener.node import Node
from shardmesh.swarm.directory import Directory
from shardmesh.wire.announcement import Announcement
from shardmesh.wire.limits import FOLLOWING_LINKS_MAX
from shardmesh.wire.messages import NextStage

PAUSE_S = 1.0
"""Between two looks: nodes tell of their load as often, which changes nothing here."""


def following(
    own: Assignment, own_peer_id: str, known: Iterable[Announcement]
) -> tuple[NextStage, ...]:
    """Replicas of the layers behind one's own; behind the last ones those of the first.

    Of more than FOLLOWING_LINKS_MAX each node takes others, and the same again.  None if the node
    has all layers.  Pure.
    """
    if own.layer_start == 0 and own.layer_end == own.total_layers:
        return ()
    layer_start = own.layer_end % own.total_layers if own.total_layers else 0
    found = [
        NextStage(peer_id=other.peer_id, addresses=other.addresses)
        for other in known
        if other.manifest_digest == own.manifest_digest
        and other.layer_start == layer_start
        and other.peer_id != own_peer_id
        and other.capabilities.shard_loaded
        and not other.capabilities.is_draining
    ]
    found.sort(key=lambda node: hashlib.sha256((own_peer_id + node.peer_id).encode()).digest())
    return tuple(found[:FOLLOWING_LINKS_MAX])


async def keep_following(node: Node, directory: Directory) -> None:
    """Tells the data process whom its results may go to, whenever that changes; for ever."""
    version = -1
    while True:
        version = await directory.wait_changed(version)
        if node.assignment is not None:
            known = directory.all()
            await node.supervisor.follow(following(node.assignment, node.identity.peer_id, known))
        await trio.sleep(PAUSE_S)
