"""`shardmesh drain`: end a listener without ending its sessions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardmesh.cli.admission import client_admission, identity_option
from shardmesh.cli.options import (
    bootstrap_option,
    cache_dir,
    cluster_option,
    config_option,
    shards_dir_option,
)

if TYPE_CHECKING:
    from shardmesh.swarm.admission import Admission


@click.command("drain")
@click.argument("peer")
@shards_dir_option
@bootstrap_option
@cluster_option
@client_admission
@identity_option
@config_option
def command(
    peer: str,
    shards_dir: Path,
    bootstrap: tuple[str, ...],
    cluster: str,
    admission: Admission,
    identity_file: Path | None,
) -> None:
    """Have PEER take no new sessions, and leave when the last one is over.

    PEER is a peer id, its end, or an address.
    """
    from shardmesh.logs import configure_logging

    configure_logging("pretty", verbosity=-1, stream=sys.stderr)
    import trio

    from shardmesh.cli.command import peer_of
    from shardmesh.coordinator.client import open_client
    from shardmesh.swarm.commands import send_command
    from shardmesh.swarm.identity import load_identity
    from shardmesh.wire.limits import COMMAND_TIMEOUT_S

    async def run() -> None:
        async with open_client(
            bootstraps=bootstrap,
            cluster=cluster,
            admission=admission,
            shards_dir=shards_dir,
            cache_dir=cache_dir(),
            identity=load_identity(identity_file) if identity_file else None,
        ) as client:
            peer_id = await peer_of(client, peer, COMMAND_TIMEOUT_S)
            answer = await send_command(client.host, peer_id, "DRAIN")
        n_sessions = answer["n_sessions"]
        click.echo(f"{peer_id} takes no new sessions; {n_sessions} under way")

    trio.run(run)
