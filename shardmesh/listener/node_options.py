"""What a listener is started with."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from shardmesh.engine.base import EngineOptions
from shardmesh.listener.assignment import WantedShard
from shardmesh.logs import LogFormat
from shardmesh.shards.model_link import ModelLink
from shardmesh.swarm.admission import Admission
from shardmesh.swarm.directory import Directory
from shardmesh.swarm.host import Host
from shardmesh.swarm.node_identity import Naming
from shardmesh.swarm.reach import ReachOptions
from shardmesh.swarm.rights import Rights
from shardmesh.swarm.torrents.options import TorrentOptions
from shardmesh.swarm.torrents.service import FileService
from shardmesh.wire.defaults import NICE_DEFAULT
from shardmesh.wire.limits import SESSIONS_PER_NODE_MAX

if TYPE_CHECKING:
    from shardmesh.listener.node import Node


class ServeHttp(Protocol):
    """What a listener serves over HTTP; this package knows nothing of it."""

    async def __call__(self, node: Node, host: Host, directory: Directory) -> None: ...


WatchFiles = Callable[[FileService], Awaitable[None]]
"""Tells somebody of downloads, beside everything else; ends or is cancelled with the node."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """What its flags say, before they are held against a model."""

    wanted: WantedShard
    cluster: str
    admission: Admission
    rights: Rights
    shards_dir: Path
    state_dir: Path
    cache_dir: Path
    bootstraps: tuple[str, ...]
    listen_hosts: tuple[str, ...]
    reach: ReachOptions
    port: int
    data_port: int
    refresh_interval_s: float
    engine: EngineOptions
    log_format: LogFormat
    log_verbosity: int
    models_dir: Path | None
    """Folders of further models, whose files are given to others too."""
    torrents: TorrentOptions
    fetch_into_shards_dir: bool
    """Where a link's model goes that is not here yet; else into a folder of its own."""
    link: ModelLink | None
    """The published model to serve; its manifest lies in `shards_dir` once the node starts."""
    nice: int = NICE_DEFAULT
    """How far the data process stands back behind the machine's other work, 0 to 19."""
    sessions_per_node_max: int = SESSIONS_PER_NODE_MAX
    """Sequences that one coordinator may use at once."""
    rebalance_interval_s: float = 0.0
    """How often the node looks whether another shard needs it more; 0: never."""
    naming: Naming = dataclasses.field(default_factory=Naming)
    serve_http: ServeHttp | None = None
    """Runs beside everything else once the node is on the network, until it leaves."""
    watch_files: WatchFiles | None = None
