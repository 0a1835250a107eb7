"""`shardmesh cluster`: the members of a private mesh, and who is one no more."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardmesh.cli.admission import missing_secret
from shardmesh.cli.config_file import config_option
from shardmesh.cli.options import cluster_option, state_dir_option
from shardmesh.cli.visit import Visit, visit_options
from shardmesh.errors import InputError, RefusedError, ShardmeshError, UnreachableError
from shardmesh.wire.limits import COMMAND_TIMEOUT_S

if TYPE_CHECKING:
    from shardmesh.coordinator.client import Client
    from shardmesh.swarm.cluster_files import ClusterFiles
    from shardmesh.wire.cluster_update import ClusterUpdate


@click.group("cluster")
def command() -> None:
    """Show the members of a mesh, show its secret, or remove members."""


@command.command("secret", short_help="Print the secret that is kept here.")
@cluster_option
@state_dir_option
@config_option
def secret_command(cluster: str, state_dir: Path) -> None:
    """Print the secret that is kept for the cluster."""
    from shardmesh.swarm.cluster_files import ClusterFiles

    secret = ClusterFiles(state_dir, cluster).secret() or missing_secret(cluster)
    click.echo(secret.text())


@command.command("members", short_help="Show who is there.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@visit_options
def members_command(as_json: bool, visit: Visit) -> None:
    """Show the listeners of the mesh and the bootstraps that were reached."""
    found = visit.run(_members)
    if as_json:
        click.echo(json.dumps(found))
        return
    from rich.console import Console

    console = Console(markup=False, highlight=False, soft_wrap=True)  # a node may say brackets
    for member in found:  # no table: it would cut off what is there to be copied
        address = member["addresses"][0].partition("/p2p/")[0] if member["addresses"] else ""
        version = f"version {member['version']}" if member["version"] else ""
        words = ", ".join(word for word in (member["role"], version, address) if word)
        console.print(f"{member['peer_id']}\n  {words}")


@command.command("remove", short_help="Change the secret, for all but some.")
@click.argument("peers", nargs=-1, metavar="[PEER]...")
@visit_options
def remove_command(peers: tuple[str, ...], visit: Visit) -> None:
    """Change the secret of the cluster and give the new one to all members but PEER...

    To be run where the cluster was made, since it takes the key of its owner.  Without PEER the
    secret is changed and nobody removed.
    """
    cluster, files = visit.cluster, visit.admission.files
    if files is None or visit.admission.is_public or not files.owner_path.exists():
        raise InputError(
            f"the key of the owner of {cluster!r} is not here",
            code="NOT_OWNER",
            next_step="run this where `shardmesh bootstrap` made the cluster, as the same user",
        )

    async def remove(client: Client) -> tuple[ClusterUpdate, dict[str, str]]:
        return await _remove(client, files, cluster, peers)

    update, failures = visit.run(remove)
    for peer_id in update.removed:
        click.echo(f"removed: {peer_id}")
    for peer_id, reason in failures.items():
        click.echo(f"not reached, needs the new secret by hand: {peer_id} ({reason})", err=True)
    click.echo(f"The secret is another one now, kept in {files.secret_path}.")
    click.echo("Who was offline needs it; `shardmesh cluster secret` prints it.")


async def _members(client: Client) -> list[dict[str, Any]]:
    """What each node that can be found says about itself, or that it does not answer."""
    import trio

    from shardmesh.swarm.commands import get_capabilities

    peer_ids = {a.peer_id for a in await client.membership.find_listeners()}
    peer_ids |= set(client.host.connected())
    found: list[dict[str, Any]] = []

    async def ask(peer_id: str) -> None:
        try:
            said = await get_capabilities(client.host, peer_id)
            role = said.role or f"listener of shard {said.shard_id}"
            version, addresses = said.version, list(said.addresses)
        except ShardmeshError as error:
            role, version, addresses = f"no answer: {error.code}", "", []
        found.append({"peer_id": peer_id, "role": role, "version": version, "addresses": addresses})

    async with trio.open_nursery() as nursery:
        for peer_id in peer_ids:
            nursery.start_soon(ask, peer_id)
    return sorted(found, key=lambda member: (member["role"], member["peer_id"]))


async def _remove(
    client: Client, files: ClusterFiles, cluster: str, peers: tuple[str, ...]
) -> tuple[ClusterUpdate, dict[str, str]]:
    """Signs the change, hands it to all members that can be reached, and keeps the new secret."""
    from shardmesh.swarm.cluster import hand_over
    from shardmesh.wire.cluster_secret import new_secret, owner_of
    from shardmesh.wire.cluster_update import ClusterUpdate, sign_update
    from shardmesh.wire.peer_id import is_peer_id, matching_peer

    owner = files.owner()
    old = client.host.admission.secret
    if old is None or old.owner != owner_of(owner.public_key):
        raise RefusedError(
            f"the cluster {cluster!r} has another owner than the key that is kept here",
            code="NOT_OWNER",
            next_step="run this where the cluster was made",
        )
    listeners = {a.peer_id: a.addresses for a in await client.membership.find_listeners()}
    known = {*listeners, *client.host.connected()}
    removed = {p if is_peer_id(p) else matching_peer(p, sorted(known)) for p in peers}
    secret = new_secret(owner.public_key)
    update = ClusterUpdate(
        cluster=cluster,
        sequence=int(time.time() * 1000),
        secret=secret.text(),
        removed=tuple(sorted(removed)),
    )
    signed = sign_update(update, owner)
    told = known - removed
    for peer_id in told & listeners.keys():  # before the first one has changed its secret
        with contextlib.suppress(ShardmeshError):  # which is said below
            await client.host.connect(listeners[peer_id], COMMAND_TIMEOUT_S)
    failures = await hand_over(client.host, told, signed)
    if told and len(failures) == len(told):
        raise UnreachableError(
            "no member took the new secret; the old one stays",
            next_step=f"try again; the first one says: {next(iter(failures.values()))}",
        )
    files.keep_update(signed, secret)
    return update, failures
