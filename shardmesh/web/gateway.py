"""What the routes of the gateway share: the mesh, the coordinator, the events."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from shardmesh.coordinator.client import Client, open_client
from shardmesh.coordinator.coordinator import Coordinator
from shardmesh.swarm.admission import Admission
from shardmesh.swarm.directory import Directory
from shardmesh.web.events import EventHub
from shardmesh.web.watch import watch_directory


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

    def __init__(self, options: GatewayOptions, client: Client) -> None:
        self.options = options
        self.client = client
        self.events = EventHub()

    @property
    def directory(self) -> Directory:
        return self.client.directory

    @property
    def coordinator(self) -> Coordinator:
        return self.client.coordinator


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
        gateway = Gateway(options, client)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_directory, gateway.directory, gateway.events)
            yield gateway
            nursery.cancel_scope.cancel()
