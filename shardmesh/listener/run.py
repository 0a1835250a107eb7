"""A listener from its start to its end: shard, network, announcement, farewell."""

from __future__ import annotations

import dataclasses
import logging
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from shardmesh.coordinator.client import open_client
from shardmesh.coordinator.coordinator import Coordinator
from shardmesh.coordinator.link_streams import open_link_streams
from shardmesh.coordinator.model_files import ModelFiles, serve_model_info
from shardmesh.errors import UnreachableError
from shardmesh.listener.assignment import least_served
from shardmesh.listener.commands import NodeCommands
from shardmesh.listener.following import keep_following
from shardmesh.listener.moving import NodeMoves, keep_useful
from shardmesh.listener.node import Node
from shardmesh.listener.node_options import NodeOptions
from shardmesh.listener.published import with_manifest
from shardmesh.settling import settle_memory
from shardmesh.shards.library import Library
from shardmesh.shards.store import ShardStore
from shardmesh.swarm.addresses import check_port
from shardmesh.swarm.commands import serve_commands
from shardmesh.swarm.dht import open_dht
from shardmesh.swarm.directory import Directory
from shardmesh.swarm.host import Host, open_host
from shardmesh.swarm.identity import load_identity
from shardmesh.swarm.lan import is_default, open_lan_of, stay_joined
from shardmesh.swarm.membership import Membership
from shardmesh.swarm.node_identity import load_node_identity
from shardmesh.swarm.reach import Reach, ReachOptions, serve_dial_back
from shardmesh.swarm.relay import Relay
from shardmesh.swarm.state_file import locked_folder
from shardmesh.swarm.torrents.service import open_files
from shardmesh.wire.link_agreement import LINK_PROTOCOL, LINK_STREAM_PROTOCOL

logger = logging.getLogger("shardmesh")

ANNOUNCE_TIMEOUT_S = 10.0
"""For the first announcement; after it the node says that it has started in any case."""

IDENTITY_NAME = "node.key"


async def run_node(options: NodeOptions) -> None:
    """Runs a listener until SIGINT, SIGTERM or a cancellation; nothing of it is left then.

    Raises InputError (theirs) for options that contradict each other or the manifest, for a port
    that is taken, and for a state folder that another listener uses.
    """
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            leaving = _Leaving(nursery.cancel_scope, nursery.cancel_scope)
            nursery.start_soon(_serve_to_the_end, options, leaving)
            async for number in signals:
                logger.info("%s: leaving", signal.Signals(number).name)
                leaving.scope.cancel()
                break


async def _serve_to_the_end(options: NodeOptions, leaving: _Leaving) -> None:
    await _serve(options, leaving)
    leaving.everything.cancel()  # nobody waits for signals any more


@dataclasses.dataclass
class _Leaving:
    """What a signal cancels: everything, or once the node has joined what must end first."""

    scope: trio.CancelScope
    everything: trio.CancelScope


async def _serve(options: NodeOptions, leaving: _Leaving) -> None:
    await check_port(options.listen_hosts, options.port)  # now, not when a shard is loaded
    if options.link is not None:
        options = await with_manifest(options, options.link)
    store = ShardStore(options.shards_dir)
    library = Library(options.shards_dir, options.models_dir)
    n_files = await trio.to_thread.run_sync(library.n_files)
    shard_id = options.wanted.shard_id
    if shard_id is None:
        shard_id = await choose_shard(options, store)
    state_dir = options.state_dir / f"shard-{shard_id}"
    with locked_folder(state_dir):
        identity = load_identity(state_dir / IDENTITY_NAME)
        logger.info("Peer ID: %s", identity.peer_id)
        logger.info("[TORRENT] Found %d GGUF file(s)", n_files)
        node = Node(dataclasses.replace(options, state_dir=state_dir), identity, store)
        node.called = load_node_identity(state_dir, identity.peer_id, options.naming)
        logger.info("Name: %s (%s)", node.called.name, node.called.uuid)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.supervisor.run)
            await node.load_first_shard(shard_id)
            async with on_network(node, nursery, shard_id) as (membership, coordinator):
                await _take_part(node, membership, coordinator, leaving)
            nursery.cancel_scope.cancel()


async def _take_part(
    node: Node, membership: Membership, coordinator: Coordinator, leaving: _Leaving
) -> None:
    """Is a member of the mesh until a signal or until it is drained; both farewells are over then.

    Others hear of the withdrawal through libp2p, whose tasks therefore go on meanwhile.
    """
    async with trio.open_nursery() as nursery:
        leaving.scope = nursery.cancel_scope
        nursery.start_soon(membership.run)
        nursery.start_soon(node.fetch_first_shard)
        try:
            with trio.move_on_after(ANNOUNCE_TIMEOUT_S):
                await membership.announced.wait()
            settle_memory()
            logger.info("✅ Shard listener started! Waiting for connections...")
            nursery.start_soon(node.watch_load, membership, lambda: coordinator.n_sessions)
            if node.options.wanted.shard_id is None:
                nursery.start_soon(keep_useful, NodeMoves(node, membership))
            await node.drained.wait()
            logger.info("drained: leaving")
            nursery.cancel_scope.cancel()
        finally:
            node.unload_shard()  # the data process ends its sessions at the same time


@asynccontextmanager
async def on_network(
    node: Node, nursery: trio.Nursery, shard_id: int
) -> AsyncIterator[tuple[Membership, Coordinator]]:
    """Listens and serves all protocols until the block is left; the caller runs the result."""
    options = node.options
    agent = f"shard-listener/{options.cluster}/{shard_id}"
    directory = Directory(options.cluster)
    async with (
        open_host(
            node.identity,
            listen_host=options.listen_hosts,
            port=options.port,
            agent=agent,
            admission=options.admission,
        ) as host,
        open_dht(host, cluster=options.cluster) as dht,
        open_files(host, dht, directory, node.library, options.torrents) as files,
        open_link_streams(host, is_direct_allowed=options.reach.direct_links) as link_streams,
    ):
        _show_addresses(host, options.reach)
        membership = Membership(
            host,
            dht,
            directory,
            bootstraps=options.bootstraps,
            signer=node.identity,
            offer=node.offer,
            refresh_interval_s=options.refresh_interval_s,
            state_dir=options.state_dir,
            logger=logger,
        )
        node.join(host, membership, files, link_streams)
        membership.updates.on_removed(node.supervisor.cut_off)
        membership.updates.on_removed(files.cut_off)
        files.start()
        models = ModelFiles(host, node.library, options.cache_dir)
        coordinator = Coordinator(
            membership.find_listeners,
            node.agree,
            models,
            nursery,
            known=membership.known_listeners,
            refresh=membership.pull,
        )
        _serve_protocols(node, host, coordinator)
        _start_tasks(nursery, node, host, directory, membership)
        if options.watch_files is not None:
            nursery.start_soon(options.watch_files, files)
        try:
            yield membership, coordinator
        finally:
            models.close()
            node.leave()


def _show_addresses(host: Host, reach: ReachOptions) -> None:
    """Has the node announced at all its addresses, or at none but through relays."""
    host.announce_as(reach.announced)
    if reach.relay_only:
        host.hide()
    for address in host.direct_addresses():
        logger.info("[LISTEN] Listening on: %s", address.split("/p2p/")[0])


def _serve_protocols(node: Node, host: Host, coordinator: Coordinator) -> None:
    host.serve(LINK_PROTOCOL, node.serve_link)
    host.serve(LINK_STREAM_PROTOCOL, node.serve_link_stream, lasting=True)
    serve_dial_back(host)
    if node.options.reach.offers_relay:
        Relay(host).serve()
    serve_model_info(host, node.library)
    commands = NodeCommands(node, host, coordinator)
    serve_commands(host, commands.handlers(), node.options.rights)


def _start_tasks(
    nursery: trio.Nursery,
    node: Node,
    host: Host,
    directory: Directory,
    membership: Membership,
) -> None:
    """What runs as long as the node is on the network."""
    options = node.options
    reach = Reach(
        host,
        neighbours=membership.neighbours,
        changed=membership.announce_changed,
        logger=logger,
    )
    nursery.start_soon(reach.run)
    if options.reach.mdns:
        nursery.start_soon(_be_on_lan, host, membership, options)
    if options.serve_http is not None:
        nursery.start_soon(options.serve_http, node, host, directory)
    nursery.start_soon(keep_following, node, directory)
    nursery.start_soon(_warn_of_namesakes, node, directory)


async def _warn_of_namesakes(node: Node, directory: Directory) -> None:
    """Says once of each node that it has this one's name; which is for people alone."""
    version, told = -1, {node.identity.peer_id}
    while True:
        version = await directory.wait_changed(version)
        for other in directory.all():
            if other.identity.name == node.called.name and other.peer_id not in told:
                told.add(other.peer_id)
                logger.warning(
                    "[IDENTITY] %s is called %s too; give one of you another --name",
                    other.peer_id,
                    node.called.name,
                )


async def _be_on_lan(host: Host, membership: Membership, options: NodeOptions) -> None:
    """Shows the node on the LAN, and finds the mesh there if nobody said where it is."""
    searches = is_default(options.bootstraps)
    async with open_lan_of(host, options.cluster, options.listen_hosts, searches=searches) as lan:
        if searches:
            await stay_joined(
                host, lan, neighbours=membership.neighbours, joined=membership.join_through
            )
        await trio.sleep_forever()


async def choose_shard(options: NodeOptions, store: ShardStore) -> int:
    """The shard that the mesh serves least; without a mesh, the first that is here.

    Raises InputError (theirs) if neither the mesh nor a manifest says how many there are.
    """
    manifest = await trio.to_thread.run_sync(store.manifest)
    total_shards = options.wanted.total_shards or (len(manifest.shards) if manifest else 0)
    served: list[int] = []
    try:
        async with open_client(
            bootstraps=options.bootstraps,
            cluster=options.cluster,
            admission=options.admission,
            shards_dir=options.shards_dir,
            cache_dir=options.cache_dir,
        ) as client:
            found = await client.membership.find_listeners(total_shards or None)
            served = [a.shard_id for a in found]
            total_shards = total_shards or max((a.total_shards for a in found), default=0)
    except UnreachableError as error:
        logger.warning("[SHARD] The mesh could not be asked which shard it needs: %s", error)
    here = [i for i in range(total_shards) if store.shard_path(i).exists()]
    shard_id = least_served(total_shards, served, here)
    logger.info("[SHARD] Chosen: shard %d, served by %d so far", shard_id, served.count(shard_id))
    return shard_id
