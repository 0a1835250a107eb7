"""`shardmesh publish`: sign a split model, give it to others, print its link."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardmesh.cli.admission import listener_admission
from shardmesh.cli.config_file import config_option
from shardmesh.cli.file_options import models_dir_option, torrent_options
from shardmesh.cli.numbers import PORT
from shardmesh.cli.options import (
    bootstrap_option,
    cluster_option,
    listen_addr_option,
    log_options,
    start_logging,
    state_dir_option,
)

if TYPE_CHECKING:
    from shardmesh.swarm.admission import Admission
    from shardmesh.swarm.torrents.options import TorrentOptions


@click.command("publish")
@click.argument(
    "folder",
    metavar="[DIR]",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("models_cache/shards"),
)
@click.option("--name", help="Another name for the model; makes it another model to the mesh.")
@click.option("--no-seed", is_flag=True, help="Only sign and print the link.")
@listen_addr_option
@click.option(
    "--port",
    type=PORT,
    default=0,
    envvar="LLAMA_PORT",
    help="TCP port for other nodes.  [default: any]",
)
@models_dir_option
@torrent_options
@bootstrap_option
@cluster_option
@listener_admission
@state_dir_option
@config_option
@log_options
def command(
    folder: Path,
    name: str | None,
    no_seed: bool,
    listen_addr: tuple[str, ...],
    port: int,
    models_dir: Path,
    torrents: TorrentOptions,
    bootstrap: tuple[str, ...],
    cluster: str,
    admission: Admission,
    state_dir: Path,
    log_format: str,
    verbose: int,
    quiet: bool,
) -> None:
    """Sign the split in DIR, print its model link, and give its files until Ctrl-C.

    The link is all that another machine needs: `shardmesh listen --model LINK`.
    """
    start_logging(log_format, verbose, quiet, sys.stderr)  # standard output has the link alone
    import trio
    from rich.console import Console

    from shardmesh.listener.seeder import (
        SeederOptions,
        bootstraps_for_others,
        link_to,
        load_publisher,
        open_seeder,
        publish_model,
    )

    with Console(stderr=True).status("") as status:
        opened = publish_model(
            folder,
            load_publisher(state_dir),
            name=name,
            on_file=lambda file: status.update(f"reading {file}"),
        )
    options = SeederOptions(
        bootstraps=bootstrap,
        cluster=cluster,
        admission=admission,
        listen_hosts=listen_addr,
        port=port,
        state_dir=state_dir,
        shards_dir=folder,
        models_dir=models_dir,
        torrents=torrents,
    )

    async def run() -> None:
        async with open_seeder(options) as seeder:
            link = link_to(opened, await bootstraps_for_others(seeder.host, bootstrap))
            click.echo(str(link))
            sys.stdout.flush()
            secret = "" if admission.is_public else " --secret <the mesh's>"
            click.echo(f"Elsewhere: shardmesh listen --model '<link>'{secret}", err=True)
            if not no_seed:
                click.echo(f"Giving {opened.manifest.model_name} to others until Ctrl-C.", err=True)
                await trio.sleep_forever()

    trio.run(run)
