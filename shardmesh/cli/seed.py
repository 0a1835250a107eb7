"""`shardmesh seed`: give all model files of this machine, serve no shard."""

from __future__ import annotations

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
    shards_dir_option,
    start_logging,
    state_dir_option,
)

if TYPE_CHECKING:
    from shardmesh.swarm.admission import Admission
    from shardmesh.swarm.torrents.options import TorrentOptions


@click.command("seed")
@listen_addr_option
@click.option(
    "--port",
    type=PORT,
    default=0,
    envvar="LLAMA_PORT",
    help="TCP port for other nodes.  [default: any]",
)
@shards_dir_option
@models_dir_option
@torrent_options
@bootstrap_option
@cluster_option
@listener_admission
@state_dir_option
@config_option
@log_options
def command(
    listen_addr: tuple[str, ...],
    port: int,
    shards_dir: Path,
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
    """Give all model files of this machine to others, until Ctrl-C.

    A listener does that as well; this is for a machine that only keeps the files.
    """
    start_logging(log_format, verbose, quiet)
    import trio

    from shardmesh.listener.seeder import SeederOptions, open_seeder

    options = SeederOptions(
        bootstraps=bootstrap,
        cluster=cluster,
        admission=admission,
        listen_hosts=listen_addr,
        port=port,
        state_dir=state_dir,
        shards_dir=shards_dir,
        models_dir=models_dir,
        torrents=torrents,
    )

    async def run() -> None:
        async with open_seeder(options) as seeder:
            await seeder.files.wait_given()
            click.echo(f"Giving {seeder.files.seeding().n_files} files to others until Ctrl-C.")
            await trio.sleep_forever()

    trio.run(run)
