"""What the routes of the gateway share: the mesh, the coordinator, the events."""

from __future__ import annotations

import dataclasses
import logging
import shlex
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import trio

import shardmesh
from shardmesh.coordinator.audit import AuditReport
from shardmesh.coordinator.client import Client, open_client
from shardmesh.coordinator.coordinator import Coordinator
from shardmesh.errors import InputError, ungrouped
from shardmesh.listener.seeder import bootstraps_for_others
from shardmesh.swarm.admission import Admission
from shardmesh.swarm.directory import Directory
from shardmesh.swarm.identity import Identity, load_identity, new_identity
from shardmesh.swarm.node_identity import Naming, load_node_identity
from shardmesh.swarm.state_file import locked_folder
from shardmesh.web.console import Console
from shardmesh.web.event_store import EventStore, open_event_store
from shardmesh.web.events import EventHub
from shardmesh.web.mesh_figures import MeshFigures
from shardmesh.web.metrics import Metrics
from shardmesh.web.model_links import ModelLinks
from shardmesh.web.node_facts import NodeFacts
from shardmesh.web.node_reports import NodeReports
from shardmesh.web.queue import ModelQueue
from shardmesh.web.sessions import SessionBoard
from shardmesh.web.watch import MeshWatch
from shardmesh.wire.hidden_states import EXACT, WireType
from shardmesh.wire.node_identity import NO_IDENTITY, NodeIdentity

logger = logging.getLogger("shardmesh")

IDENTITY_FOLDER = "gateway"
"""In the state directory: the key and the name."""

EVENTS_FILE = "events.sqlite3"
"""In the state directory; several gateways may share it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatewayOptions:
    """How a gateway reaches its mesh."""

    bootstraps: Sequence[str]
    cluster: str
    admission: Admission
    shards_dir: Path
    cache_dir: Path
    state_dir: Path
    naming: Naming = dataclasses.field(default_factory=Naming)
    wire: WireType = EXACT  # how hidden states travel from stage to stage
    reuse_prefix: bool = True  # of prompts with the same API token
    standby: bool = False  # as in a CompletionRequest
    n_drafts: int | None = None  # as in a CompletionRequest
    audit_rate: float = 0.0  # share of answers that another replica computes again


class Gateway:
    """A client of the mesh and what is known of it; `app.state.gateway` in the routes."""

    def __init__(
        self,
        options: GatewayOptions,
        client: Client,
        store: EventStore,
        identity: NodeIdentity = NO_IDENTITY,
    ) -> None:
        self.options = options
        self.client = client
        self.started_at_s = int(time.time())
        self.metrics = Metrics(client.host.peer_id)
        self.queues: dict[str, ModelQueue] = {}
        self.events = EventHub()
        self.events.tell(self.metrics.event)
        client.coordinator.auditor.tell(self._audited)
        self.sessions = SessionBoard()
        self.sessions.tell_steps(self.metrics.step)
        self.node_reports = NodeReports(
            client.host,
            client.directory,
            is_seen=lambda: self.console.feed.n_subscribers > 0,
            on_change=lambda: self.watch.touch(),
            link_trips_ms=lambda: {
                peer_id: trip_us / 1e3
                for peer_id, trip_us in client.coordinator.round_trips_us().items()
            },
        )
        self.watch = MeshWatch(
            client.directory,
            self.events,
            reports=self.node_reports.reports,
            is_busy=lambda peer_id: self.sessions.n_running_on(peer_id) > 0,
        )
        self.node = NodeFacts(
            kind="gateway",
            identity=identity,
            cluster=options.cluster,
            host=client.host,
            announcements=client.directory.all,
            events=self.events,
            disk=options.state_dir,
            own_status=self._status,
            round_trips_ms=lambda: {
                peer_id: report.round_trip_ms
                for peer_id, report in self.node_reports.reports.items()
            },
        )
        self.model_links = ModelLinks(
            client.host,
            listed=client.directory.all,
            is_seen=lambda: self.console.feed.n_subscribers > 0,
            on_change=lambda: self.console.feed.touch(),
        )
        self.console = Console(
            self.watch,
            self.sessions,
            self.events,
            store,
            about=self._about(),
            links=self.model_links.links,
        )
        self.console.feed.tell_seen(self.node_reports.touch)
        self.metrics.add(
            MeshFigures(
                client.host.peer_id,
                identity,
                announcements=client.directory.all,
                reports=self.node_reports.reports,
                queues=self.queues,
            )
        )

    @property
    def directory(self) -> Directory:
        return self.client.directory

    @property
    def coordinator(self) -> Coordinator:
        return self.client.coordinator

    async def follow_mesh(self) -> None:
        """Hears of each change in the mesh as soon as a neighbour does, until cancelled."""
        found = await bootstraps_for_others(self.client.host, tuple(self.options.bootstraps))
        self.console.about["join"] = joining_line(self.options, found)
        self.model_links.bootstraps = found
        await self.client.membership.follow()

    def queue_of(self, model_name: str) -> ModelQueue:
        """The queue of a model that is or was served; there are as many as models were."""
        return self.queues.setdefault(model_name, ModelQueue())

    def _audited(self, report: AuditReport) -> None:
        self.events.publish(
            f"audit.{report.outcome}",
            cause=report.sentence,
            is_lasting=report.outcome != "same",
            data=dataclasses.asdict(report),
        )

    def _status(self) -> dict[str, object]:
        queues = self.queues.values()
        return {
            "n_sessions": self.coordinator.n_sessions,
            "n_requests_waiting": sum(queue.n_waiting for queue in queues),
            "n_tokens": self.sessions.n_tokens,
        }

    def _about(self) -> dict[str, object]:
        """What the console shows of the gateway itself."""
        options = self.options
        return {
            "node_id": self.client.host.peer_id,
            "name": self.node.identity.name,
            "uuid": self.node.identity.uuid,
            "cluster": options.cluster,
            "version": shardmesh.__version__,
            "private": options.admission.secret is not None,
            "join": joining_line(options, options.bootstraps),
            "join_by_link": joining_line(options, ()),  # a model's link names the bootstraps
        }


def joining_line(options: GatewayOptions, bootstraps: Sequence[str]) -> str:
    """What a person types on the next machine; never with the secret in it."""
    where = [f"--bootstrap {address}" for address in bootstraps]
    secret = "--public" if options.admission.secret is None else "--secret-file cluster.secret"
    return " ".join([f"shardmesh listen --cluster {shlex.quote(options.cluster)}", *where, secret])


@asynccontextmanager
async def open_gateway(options: GatewayOptions) -> AsyncIterator[Gateway]:
    """A gateway that has reached the mesh; raises UnreachableError (the moment's) if it cannot."""
    with _own_identity(options) as key, ungrouped():
        async with _opened(options, key) as gateway:
            yield gateway


@contextmanager
def _own_identity(options: GatewayOptions) -> Iterator[Identity]:
    """The key that is kept, for one gateway at a time; another one beside it has a new one."""
    folder = options.state_dir / IDENTITY_FOLDER
    with ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(folder))
        except InputError as error:
            if error.code != "STATE_IN_USE":
                raise
            logger.warning("another gateway has the kept identity; this one gets a new one")
            yield new_identity()
            return
        yield load_identity(folder / "node.key")


@asynccontextmanager
async def _opened(options: GatewayOptions, key: Identity) -> AsyncIterator[Gateway]:
    async with open_client(
        bootstraps=options.bootstraps,
        cluster=options.cluster,
        admission=options.admission,
        shards_dir=options.shards_dir,
        cache_dir=options.cache_dir,
        identity=key,
        audit_rate=options.audit_rate,
    ) as client:
        identity = load_node_identity(
            options.state_dir / IDENTITY_FOLDER, key.peer_id, options.naming
        )
        store = await open_event_store(options.state_dir / EVENTS_FILE)
        gateway = Gateway(options, client, store, identity)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(gateway.node_reports.run)
                nursery.start_soon(gateway.console.run)
                nursery.start_soon(gateway.follow_mesh)
                nursery.start_soon(gateway.model_links.run)
                yield gateway
                nursery.cancel_scope.cancel()
        finally:
            await store.close()
