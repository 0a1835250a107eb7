"""What the routes of the gateway share: the mesh, the coordinator, the events."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

import shardmesh
from shardmesh.coordinator.client import Client, open_client
from shardmesh.coordinator.coordinator import Coordinator
from shardmesh.swarm.admission import Admission
from shardmesh.swarm.directory import Directory
from shardmesh.web.console import Console
from shardmesh.web.event_store import EventStore, open_event_store
from shardmesh.web.events import EventHub
from shardmesh.web.metrics import Metrics
from shardmesh.web.node_reports import NodeReports
from shardmesh.web.queue import ModelQueue
from shardmesh.web.sessions import SessionBoard
from shardmesh.web.watch import MeshWatch

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


class Gateway:
    """A client of the mesh and what is known of it; `app.state.gateway` in the routes."""

    def __init__(self, options: GatewayOptions, client: Client, store: EventStore) -> None:
        self.options = options
        self.client = client
        self.started_at_s = int(time.time())
        self.events = EventHub()
        self.sessions = SessionBoard()
        self.node_reports = NodeReports(
            client.host,
            listed=lambda: [a.peer_id for a in client.directory.all()],
            is_seen=lambda: self.console.feed.n_subscribers > 0,
            on_change=lambda: self.watch.touch(),
        )
        self.watch = MeshWatch(
            client.directory,
            self.events,
            reports=self.node_reports.reports,
            is_busy=lambda peer_id: self.sessions.n_running_on(peer_id) > 0,
        )
        self.console = Console(self.watch, self.sessions, self.events, store, about=self._about())
        self.metrics = Metrics(client.host.peer_id)
        self.queues: dict[str, ModelQueue] = {}

    @property
    def directory(self) -> Directory:
        return self.client.directory

    @property
    def coordinator(self) -> Coordinator:
        return self.client.coordinator

    def queue_of(self, model_name: str) -> ModelQueue:
        """The queue of a model that is or was served; there are as many as models were."""
        return self.queues.setdefault(model_name, ModelQueue())

    def _about(self) -> dict[str, object]:
        """What the console shows of the gateway itself."""
        options = self.options
        where = " ".join(f"--bootstrap {address}" for address in options.bootstraps)
        return {
            "node_id": self.client.host.peer_id,
            "cluster": options.cluster,
            "version": shardmesh.__version__,
            "join": f"shardmesh listen --cluster {options.cluster} {where}",
        }


@asynccontextmanager
async def open_gateway(options: GatewayOptions) -> AsyncIterator[Gateway]:
    """A gateway that has reached the mesh; raises UnreachableError (the moment's) if it cannot."""
    async with open_client(
        bootstraps=options.bootstraps,
        cluster=options.cluster,
        admission=options.admission,
        shards_dir=options.shards_dir,
        cache_dir=options.cache_dir,
    ) as client:
        store = await open_event_store(options.state_dir / EVENTS_FILE)
        gateway = Gateway(options, client, store)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(gateway.node_reports.run)
                nursery.start_soon(gateway.console.run)
                yield gateway
                nursery.cancel_scope.cancel()
        finally:
            await store.close()
