"""A short-lived member of the mesh that serves nothing: what `run`, `status` and `command` are."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from shardmesh.coordinator.coordinator import Coordinator
from shardmesh.coordinator.link_streams import open_link_streams
from shardmesh.coordinator.model_files import ModelFiles
from shardmesh.errors import ShardmeshError, UnreachableError, ungrouped
from shardmesh.shards.store import ShardStore
from shardmesh.swarm.admission import Admission
from shardmesh.swarm.dht import Dht, open_dht
from shardmesh.swarm.directory import Directory, exchange
from shardmesh.swarm.host import Host, open_host
from shardmesh.swarm.identity import Identity, new_identity
from shardmesh.swarm.lan import find_on_lan, is_default
from shardmesh.swarm.membership import Membership

logger = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 10.0
"""For reaching a first node; a person waits for it."""


@dataclasses.dataclass(frozen=True)
class Client:
    """Everything a command needs to talk with the mesh."""

    host: Host
    directory: Directory
    dht: Dht
    membership: Membership
    coordinator: Coordinator


@asynccontextmanager
async def open_client(
    *,
    bootstraps: Sequence[str],
    cluster: str,
    admission: Admission,
    shards_dir: Path,
    cache_dir: Path,
    identity: Identity | None = None,
    audit_rate: float = 0.0,
) -> AsyncIterator[Client]:
    """A client that has reached the mesh.

    Without an identity it has a new one.  Raises UnreachableError (the moment's) when no bootstrap
    answers within JOIN_TIMEOUT_S, and RefusedError (theirs) when one does not admit it.  All of it
    is gone when the block is left.
    """
    prefix_secret = _prefix_secret(identity, admission)
    identity = identity or new_identity()
    directory = Directory(cluster)
    # A client is never dialed: loopback keeps its port out of everybody's reach.
    with ungrouped():
        async with (
            open_host(identity, listen_host="127.0.0.1", admission=admission) as host,
            open_dht(host, cluster=cluster, server=False) as dht,
            open_link_streams(host) as link_streams,
        ):
            membership = Membership(host, dht, directory, bootstraps=bootstraps, signer=identity)
            models = ModelFiles(host, ShardStore(shards_dir, create=False), cache_dir)
            async with trio.open_nursery() as nursery:
                await _reach(host, directory, membership, bootstraps)
                nursery.start_soon(membership.run)
                with trio.move_on_after(JOIN_TIMEOUT_S):
                    await membership.joined.wait()

                coordinator = Coordinator(
                    membership.find_listeners,
                    link_streams.agree,
                    models,
                    nursery,
                    known=membership.known_listeners,
                    refresh=membership.pull,
                    prefix_secret=prefix_secret,
                    audit_rate=audit_rate,
                )
                try:
                    yield Client(host, directory, dht, membership, coordinator)
                finally:
                    models.close()
                    nursery.cancel_scope.cancel()


def _prefix_secret(identity: Identity | None, admission: Admission) -> bytes | None:
    """What all commands of one user have in common, or all runs of one gateway; None: nothing."""
    if identity is None and admission.files is not None:
        try:
            identity = admission.files.asker()
        except ShardmeshError as error:
            logger.warning("prompts of other runs are not reused: %s", error)
    return identity.derive_secret("prefix") if identity is not None else None


async def _reach(
    host: Host, directory: Directory, membership: Membership, bootstraps: Sequence[str]
) -> None:
    """Connects with the bootstrap that answers first and takes in what it knows.

    If none does, a node of earlier runs will do, or one on the LAN if no bootstrap was named.

    Done before joining, which would try again for ever where a person wants to know.
    """
    try:
        peer_id = await membership.reach(JOIN_TIMEOUT_S)
    except UnreachableError as error:
        found = await find_on_lan(directory.cluster) if is_default(bootstraps) else []
        for node in found:
            with contextlib.suppress(ShardmeshError):
                await host.connect(node.addresses, JOIN_TIMEOUT_S)
                await membership.join_through(node.peer_id)
                return
        raise UnreachableError(
            f"no bootstrap node answered: {', '.join(bootstraps)}",
            code="NO_BOOTSTRAP",
            next_step="start one with `shardmesh bootstrap`, or correct --bootstrap",
        ) from error
    await exchange(host, directory, peer_id)
