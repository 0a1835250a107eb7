"""`shardmesh drain`: end a listener without ending its sessions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardmesh.cli.admission import identity_option
from shardmesh.cli.options import shards_dir_option
from shardmesh.cli.visit import Visit, visit_options

if TYPE_CHECKING:
    from shardmesh.coordinator.client import Client


@click.command("drain")
@click.argument("peer")
@shards_dir_option
@visit_options
@identity_option
def command(peer: str, visit: Visit, identity_file: Path | None) -> None:
    """Have PEER take no new sessions, and leave when the last one is over.

    PEER is a peer id, its end, or an address.
    """
    from shardmesh.cli.command import peer_of
    from shardmesh.swarm.commands import send_command
    from shardmesh.wire.limits import COMMAND_TIMEOUT_S

    async def drain(client: Client) -> None:
        peer_id = await peer_of(client, peer, COMMAND_TIMEOUT_S)
        answer = await send_command(client.host, peer_id, "DRAIN")
        n_sessions = answer["n_sessions"]
        click.echo(f"{peer_id} takes no new sessions; {n_sessions} under way")

    visit.run(drain, identity_file=identity_file)
