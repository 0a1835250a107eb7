"""`shardmesh command`: one JSON command by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardmesh.cli.admission import identity_option
from shardmesh.cli.numbers import SECONDS_MAX, FiniteRange
from shardmesh.cli.options import shards_dir_option
from shardmesh.cli.visit import Visit, visit_options
from shardmesh.errors import InputError, ProtocolError
from shardmesh.wire.peer_id import matching_peer

if TYPE_CHECKING:
    from shardmesh.coordinator.client import Client

_SAY_PARAMETERS = (
    "give them as one JSON object in quotes; docs/protocol.md lists those of each command"
)


@click.command("command")
@click.argument("peer")
@click.argument("name", metavar="COMMAND")
@click.argument("params", metavar="[JSON]", default="{}")
@click.option(
    "--timeout",
    "timeout_s",
    type=FiniteRange(0.1, SECONDS_MAX),
    default=600.0,
    show_default=True,
    help="Seconds to wait for the answer.",
)
@shards_dir_option
@visit_options
@identity_option
def command(
    peer: str,
    name: str,
    params: str,
    timeout_s: float,
    visit: Visit,
    identity_file: Path | None,
) -> None:
    """Send COMMAND with its parameters to PEER: a peer id, its end, or an address.

    `shardmesh status` shows the ends.

    \b
    shardmesh command 12D3Koo... GET_CAPABILITIES
    shardmesh command 12D3Koo... INFERENCE '{"prompt": "Once", "max_tokens": 20}'
    """
    from shardmesh.swarm.commands import send_command
    from shardmesh.wire.codec import parse_json
    from shardmesh.wire.commands import encode_command

    try:
        values = parse_json(params.encode())
        encode_command(name, values)
    except ProtocolError as error:
        next_step = error.next_step or _SAY_PARAMETERS
        raise InputError(str(error), code=error.code, next_step=next_step) from error

    async def send(client: Client) -> object:
        peer_id = await peer_of(client, peer, timeout_s)
        return await send_command(client.host, peer_id, name, values, timeout_s)

    answer = visit.run(send, identity_file=identity_file)
    click.echo(json.dumps(answer, indent=2, ensure_ascii=False))


async def peer_of(client: Client, text: str, timeout_s: float) -> str:
    """The peer id of a node that is named by it, by its end or by an address."""
    if text.startswith("/"):
        return await client.host.connect([text], timeout_s)
    found = await client.membership.find_listeners()
    return matching_peer(text, [a.peer_id for a in found])
