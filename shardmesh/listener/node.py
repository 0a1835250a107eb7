"""The control process of a listener: joins the mesh, keeps its shard served, answers commands."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Literal

import trio

from shardmesh.coordinator.link_streams import LinkStreams, carry_to_data_port
from shardmesh.errors import InputError, RefusedError, ShardmeshError, UnreachableError
from shardmesh.links.dial import local_endpoints, own_endpoint
from shardmesh.listener.assignment import Assignment, WantedShard, assign
from shardmesh.listener.load import Load, load_of
from shardmesh.listener.local_messages import Start
from shardmesh.listener.machine import Machine, read_machine
from shardmesh.listener.node_options import NodeOptions
from shardmesh.listener.published import provide_shard
from shardmesh.listener.supervisor import ShardStatus, Supervisor
from shardmesh.shards.library import Library
from shardmesh.shards.manifest import MANIFEST_NAME
from shardmesh.shards.store import ShardStore
from shardmesh.swarm.announcing import Offer
from shardmesh.swarm.host import Host
from shardmesh.swarm.identity import Identity
from shardmesh.swarm.membership import Membership
from shardmesh.swarm.streams import ByteStream, receive_message, send_message
from shardmesh.swarm.torrents.service import FileService
from shardmesh.wire.announcement import Capabilities
from shardmesh.wire.limits import (
    HANDSHAKE_TIMEOUT_S,
    LINK_AGREEMENT_BYTES_MAX,
    LOAD_INTERVAL_S,
)
from shardmesh.wire.link_agreement import (
    LinkGrant,
    LinkRequester,
    answer_request,
    encode_refusal,
)
from shardmesh.wire.node_identity import NodeIdentity

logger = logging.getLogger("shardmesh")

FETCH_PAUSE_S = 15.0
"""Before a shard that could not be fetched is tried again."""

FIRST_LOAD_TIMEOUT_S = 600.0
"""For loading a shard of tens of GB from a slow disk before joining."""

LOAD_INTERVAL_AT_REST_S = 5.0
"""How often the data process is asked for its figures while they can hardly change."""


Intention = Literal["stays", "wants_to_leave", "leaves"]


class Node:
    """One listener between its start and its end; driven by `listener.run`."""

    def __init__(self, options: NodeOptions, identity: Identity, store: ShardStore) -> None:
        self.options = options
        self.store = store
        self.library = Library(options.shards_dir, options.models_dir)
        self.files: FileService | None = None
        self.identity = identity
        self.called = NodeIdentity()
        self.started_at_s = int(time.time())
        self.assignment: Assignment | None = None
        self.machine: Machine = read_machine()
        self._n_loads = 0  # asked for so far
        self._load_may_differ = trio.Event()
        self.supervisor = Supervisor(self.agree, self._on_shard, self._on_sessions)
        self.load = self._told_load = Load()
        self.is_draining = False
        self.intention: Intention = "stays"
        self.was_told = False
        """Somebody said which shard to serve, so the node does not choose another by itself."""
        self.drained = trio.Event()
        self._host: Host | None = None
        self._link_streams: LinkStreams | None = None
        self._membership: Membership | None = None

    def join(
        self, host: Host, membership: Membership, files: FileService, link_streams: LinkStreams
    ) -> None:
        """From now on the node is on the network, and its changes are announced."""
        self._host, self._membership, self.files = host, membership, files
        self._link_streams = link_streams
        files.back_off(self.is_computing)
        files.on_download = membership.announce_load  # whoever looks on asks how far it is

    def n_announcements_refused(self) -> dict[str, int]:
        """See Membership; nothing while the node is not on the network."""
        return self._membership.n_announcements_refused() if self._membership else {}

    def leave(self) -> None:
        """The node is off the network again."""
        self._host = self._membership = self.files = self._link_streams = None

    # -- the shard -----------------------------------------------------------------------------

    async def load_shard(self, shard_id: int, model: str | None = None) -> Assignment:
        """Serves a shard from now on; what was served before is served until it is here.

        Its file is taken from the disk, or else fetched from other nodes.  Raises InputError or
        GgufError (theirs) if it is neither there nor published, or cannot be kept, and RefusedError
        (theirs) if another one was asked for while this one was fetched: the last word counts.
        """
        self._n_loads += 1
        number = self._n_loads
        store, assignment = await self.provide_shard(shard_id, model)
        if number != self._n_loads:
            raise RefusedError(f"another shard than {shard_id} was asked for meanwhile")
        self.store, self.assignment = store, assignment
        self.supervisor.serve(self._start(assignment))
        await self.intend("stays")  # which the next data process hears at its start
        return assignment

    async def provide_shard(
        self, shard_id: int, model: str | None = None
    ) -> tuple[ShardStore, Assignment]:
        """Has a shard's file here, and changes nothing else; raises what `load_shard` raises."""
        store = self.store
        assigned = self.assignment
        if model is not None and (assigned is None or model != assigned.model_name):
            store = await trio.to_thread.run_sync(self.library.by_name, model)
        manifest = await trio.to_thread.run_sync(store.manifest)
        wanted = self.options.wanted if store is self.store else WantedShard()
        assignment = assign(wanted, shard_id, manifest)
        if manifest is None:
            raise InputError(
                f"{MANIFEST_NAME} is not in {store.directory}, so nobody can tell which model the "
                "shard belongs to",
                code="NO_MANIFEST",
                next_step="copy it there from the machine that split the model, or start the "
                "listener with `--model LINK`",
            )
        await provide_shard(store, manifest, shard_id, self.files, self.options.link)
        return store, assignment

    def unload_shard(self) -> None:
        """Stops serving; the node stays in the mesh."""
        self.supervisor.serve(None)

    async def load_first_shard(self, shard_id: int) -> None:
        """What the node does at its start: serve its shard, or say that it cannot yet."""
        self.assignment = assign(
            self.options.wanted, shard_id, await trio.to_thread.run_sync(self.store.manifest)
        )
        try:
            await self.load_shard(shard_id)
            await self.supervisor.wait_loaded(FIRST_LOAD_TIMEOUT_S)
        except ShardmeshError as error:
            if error.code == "SHARD_NOT_FOUND":
                logger.warning("[SHARD] ⚠️  ASSIGNED SHARD %d NOT FOUND LOCALLY ⚠️", shard_id)
            else:
                logger.error("[SHARD] ✗ Shard %d not loaded: %s", shard_id, error)
            if error.code == "SHARD_NOT_FOUND" and self.options.link is not None:
                logger.info("[SHARD] It is fetched from other nodes once the mesh is joined")
            elif error.next_step:
                logger.warning("[SHARD] Next step: %s", error.next_step)

    async def fetch_first_shard(self) -> None:
        """Gets and loads the shard that was not there at the start; tries for ever.

        Returns when a shard is served, be it another one that was asked for meanwhile.
        """
        assignment = self.assignment
        while assignment is not None and self.supervisor.status.state == "absent":
            try:
                await self.load_shard(assignment.shard_id)
            except ShardmeshError as error:
                if error.code not in ("SHARD_NOT_FOUND", "NO_MANIFEST"):
                    logger.error("[SHARD] ✗ Shard %d not fetched: %s", assignment.shard_id, error)
                await trio.sleep(FETCH_PAUSE_S)

    @property
    def is_computing(self) -> bool:
        """Whether the data process has sessions now."""
        return self.supervisor.n_sessions > 0

    def _start(self, assignment: Assignment) -> Start:
        engine = dataclasses.replace(
            self.options.engine, vocabulary_path=str(self.store.tokenizer_path())
        )
        return Start(
            shard_path=str(self.store.shard_path(assignment.shard_id)),
            manifest_digest=assignment.manifest_digest,
            layer_start=assignment.layer_start,
            layer_end=assignment.layer_end,
            listen_hosts=self.options.listen_hosts,
            data_port=self.options.data_port,
            sessions_per_node_max=self.options.sessions_per_node_max,
            nice=self.options.nice,
            log_format=self.options.log_format,
            log_verbosity=self.options.log_verbosity,
            **dataclasses.asdict(engine),
        )

    def _on_shard(self, status: ShardStatus) -> None:
        self._on_sessions()
        if status.state == "loaded" and self.assignment is not None:
            shard_id = self.assignment.shard_id
            if self._membership is None:
                logger.info("[SHARD] ✓✓✓ SHARD %d LOADED BEFORE JOINING NETWORK ✓✓✓", shard_id)
            else:
                logger.info("[SHARD] ✓ Shard %d loaded", shard_id)
        self._changed()

    def _changed(self) -> None:
        if self._membership is not None:
            self._membership.announce_changed()

    def offer(self) -> Offer:
        """What is announced now."""
        assignment = self.assignment
        if assignment is None:
            raise UnreachableError("the node has not chosen its shard yet")
        ready = self.supervisor.status.ready
        is_loaded = ready is not None
        return Offer(
            shard_id=assignment.shard_id,
            total_shards=assignment.total_shards,
            total_layers=assignment.total_layers,
            layer_start=assignment.layer_start,
            layer_end=assignment.layer_end,
            model_name=assignment.model_name,
            manifest_digest=assignment.manifest_digest,
            engine_fingerprint=ready.fingerprint if ready else "",
            capabilities=Capabilities(
                shard_loaded=is_loaded,
                memory_mb=self.machine.memory_mb,
                memory_available_mb=self.machine.memory_available_mb(),
                cpu_cores=self.machine.cpu_cores,
                gpu_available=self.machine.gpu_available,
                n_ctx=ready.n_ctx if ready else 0,
                n_parallel=ready.n_parallel if ready else 0,
                has_tokenizer=self.store.tokenizer_path().exists(),
                is_draining=self.takes_none,
                wants_to_leave=self.intention == "wants_to_leave",
                n_sessions=self.load.n_sessions,
                token_us=self.load.token_us,
                round_trips_us=self.load.round_trips_us,
            ),
            identity=self.called,
        )

    # -- load ----------------------------------------------------------------------------------

    @property
    def shard_state(self) -> str:
        """What is told of the shard: that of the supervisor, or `draining` while it is loaded."""
        state = self.supervisor.status.state
        return "draining" if self.takes_none and state == "loaded" else state

    async def drain(self) -> None:
        """Takes no further sessions; `drained` is set once the last one is over."""
        self.is_draining = True
        self._load_may_differ.set()
        await self.supervisor.drain()
        self._changed()

    @property
    def takes_none(self) -> bool:
        """Whether no further session is taken: the node is to end, or to serve another shard."""
        return self.is_draining or self.intention == "leaves"

    async def intend(self, intention: Intention) -> None:
        """Tells the mesh whether the node is about to serve another shard."""
        if intention != self.intention:
            self.intention = intention
            await self.supervisor.drain(self.takes_none)
            self._changed()

    async def watch_load(self, membership: Membership, n_coordinated: Callable[[], int]) -> None:
        """Tells the mesh how busy the node is, whenever that has changed; for ever."""
        while True:
            with contextlib.suppress(UnreachableError):
                self.load = load_of(await self.supervisor.metrics())
            if self.load.differs(self._told_load):
                self._told_load = self.load
                membership.announce_load()
            if self.is_draining and self.load.n_sessions == 0 and n_coordinated() == 0:
                self.drained.set()
            self._load_may_differ = trio.Event()
            await trio.sleep(LOAD_INTERVAL_S)
            if not (self.load.n_sessions or self.is_computing or self.is_draining):
                with trio.move_on_after(LOAD_INTERVAL_AT_REST_S):
                    await self._load_may_differ.wait()

    def _on_sessions(self) -> None:
        self._load_may_differ.set()
        if self.files is not None:
            self.files.back_off(self.is_computing)

    # -- links ---------------------------------------------------------------------------------

    async def serve_link(self, stream: ByteStream, peer_id: str) -> None:
        """Answers one request for a link to the data process."""
        with trio.fail_after(HANDSHAKE_TIMEOUT_S):
            request = await receive_message(stream, LINK_AGREEMENT_BYTES_MAX)
            try:
                answer = await self._offer_link(request, peer_id)
            except ShardmeshError as error:
                answer = encode_refusal(error)
            await send_message(stream, answer)

    async def serve_link_stream(self, stream: ByteStream, peer_id: str) -> None:
        """Carries a link that comes over a libp2p stream to the data process."""
        ready = self.supervisor.status.ready
        if ready is None:
            raise UnreachableError("no shard is loaded on this node now", code="NOT_LOADED")
        endpoint = own_endpoint(self.options.listen_hosts, ready.data_port)
        await carry_to_data_port(stream, endpoint)

    async def _offer_link(self, request: bytes, peer_id: str) -> bytes:
        host = self._joined_host()
        ready = self.supervisor.status.ready
        if ready is None:
            raise UnreachableError("no shard is loaded on this node now", code="NOT_LOADED")
        is_direct = self.options.reach.direct_links
        addresses = host.direct_addresses() if is_direct else []
        endpoints = local_endpoints(addresses, ready.data_port)
        answer, grant = answer_request(
            request, own_peer_id=host.peer_id, other_peer_id=peer_id, endpoints=endpoints
        )
        await self.supervisor.expect(grant)
        return answer

    async def agree(self, peer_id: str, addresses: tuple[str, ...]) -> LinkGrant:
        """Agrees on a link with another node, or with this node's own data process."""
        host = self._joined_host()
        if peer_id != host.peer_id and self._link_streams is not None:
            return await self._link_streams.agree(peer_id, addresses)
        requester = LinkRequester(host.peer_id, peer_id)
        grant = requester.grant(await self._offer_link(requester.request(), peer_id))
        ready = self.supervisor.status.ready
        if ready is not None and not grant.endpoints:  # no need to go out for one's own process
            here = own_endpoint(self.options.listen_hosts, ready.data_port)
            grant = dataclasses.replace(grant, endpoints=(here,))
        return grant

    def _joined_host(self) -> Host:
        if self._host is None:
            raise RefusedError("the node is not on the network yet", code="NOT_JOINED")
        return self._host
