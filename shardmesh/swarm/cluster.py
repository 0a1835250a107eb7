"""Members and their removal: handing the owner's changes of the secret from node to node."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable

import trio

from shardmesh.errors import ShardmeshError
from shardmesh.swarm.directory import Directory
from shardmesh.swarm.host import Host
from shardmesh.swarm.streams import ByteStream, receive_message, send_message
from shardmesh.wire.cluster_update import CLUSTER_PROTOCOL, ClusterAnswer, ClusterUpdate
from shardmesh.wire.codec import decode_cbor, encode_cbor
from shardmesh.wire.limits import (
    CLUSTER_UPDATE_BYTES_MAX,
    COMMAND_TIMEOUT_S,
    REQUEST_READ_TIMEOUT_S,
)

_ANSWER_BYTES_MAX = 1024
_HANDED_ON_AT_ONCE = 16
_UPDATES_WAITING_MAX = 4

Removed = Callable[[frozenset[str]], Awaitable[None]]
"""Told of peer ids that are no members any more; must not raise."""


class ClusterUpdates:
    """Takes changes of the secret in, hands them on, and shows the removed the door."""

    def __init__(
        self,
        host: Host,
        directory: Directory,
        logger: logging.Logger,
        *,
        is_node: Callable[[str], bool],
    ) -> None:
        """`is_node` says of a peer id whether it is a listener or a bootstrap that is known.

        Others get no secret from here: a client has a new peer id each time, and may be run by
        somebody who was just removed.
        """
        self._host = host
        self._is_node = is_node
        self._directory = directory
        self._log = logger
        self._listeners: list[Removed] = []
        self._to_hand_on, self._taken = trio.open_memory_channel[tuple[bytes, ClusterUpdate]](
            _UPDATES_WAITING_MAX
        )
        directory.admits = host.admission.admits
        host.serve(CLUSTER_PROTOCOL, self._serve)

    def on_removed(self, listener: Removed) -> None:
        """Calls the listener with those that an update removes."""
        self._listeners.append(listener)

    async def run(self) -> None:
        """Hands on what was news, for ever."""
        async for signed, update in self._taken:
            for listener in self._listeners:
                await listener(frozenset(update.removed))
            for peer_id in update.removed:
                self._directory.withdraw(peer_id)
                await self._host.disconnect(peer_id, "removed from the cluster")
            left = set(self._host.connected()) - set(update.removed)
            await hand_over(self._host, filter(self._is_node, left), signed)

    async def _serve(self, stream: ByteStream, peer_id: str) -> None:
        with trio.fail_after(REQUEST_READ_TIMEOUT_S):
            signed = await receive_message(stream, CLUSTER_UPDATE_BYTES_MAX)
        update = self._host.admission.take_update(signed, self._directory.cluster)
        if update is not None:
            self._log.warning(
                "[CONNECT] The cluster's owner has changed its secret; removed: %s",
                ", ".join(update.removed) or "nobody",
            )
            try:
                self._to_hand_on.send_nowait((signed, update))
            except trio.WouldBlock:  # the owner is quicker than the network: only he can do this
                self._log.error("a change of the secret was not handed on: too many at once")
        await send_message(stream, encode_cbor(ClusterAnswer(is_news=update is not None)))


async def hand_over(host: Host, peer_ids: Iterable[str], signed: bytes) -> dict[str, str]:
    """Hands a signed update to nodes, several at once; the reasons of those that did not take it.

    Never raises a ShardmeshError.
    """
    limiter = trio.CapacityLimiter(_HANDED_ON_AT_ONCE)
    failures: dict[str, str] = {}

    async def hand(peer_id: str) -> None:
        async with limiter:
            try:
                answer = await host.request(
                    peer_id,
                    CLUSTER_PROTOCOL,
                    signed,
                    timeout_s=COMMAND_TIMEOUT_S,
                    response_bytes_max=_ANSWER_BYTES_MAX,
                )
                decode_cbor(answer, ClusterAnswer)
            except ShardmeshError as error:
                failures[peer_id] = str(error)

    async with trio.open_nursery() as nursery:
        for peer_id in peer_ids:
            nursery.start_soon(hand, peer_id)
    return failures
