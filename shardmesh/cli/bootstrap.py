"""`shardmesh bootstrap`: run the entry point of a mesh."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardmesh.cli.admission import bootstrap_admission
from shardmesh.cli.config_file import config_option
from shardmesh.cli.numbers import PORT
from shardmesh.cli.options import (
    AddressType,
    cluster_option,
    listen_addr_option,
    log_options,
    start_logging,
    state_dir_option,
)
from shardmesh.cli.reach import bootstrap_reach
from shardmesh.confinement import allow_files

if TYPE_CHECKING:
    from shardmesh.swarm.admission import Admission
    from shardmesh.swarm.reach import ReachOptions


@click.command("bootstrap")
@listen_addr_option
@bootstrap_reach
@click.option(
    "--port",
    type=PORT,
    default=51820,
    show_default=True,
    envvar="LLAMA_PORT",
    help="TCP port to listen on; 0 picks one.",
)
@click.option(
    "--identity-file",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar="LLAMA_IDENTITY_FILE",
    help="Key of this node, made if missing.  [default: bootstrap/identity.pem in --state-dir]",
)
@click.option(
    "--join",
    type=AddressType(),
    multiple=True,
    envvar="LLAMA_JOIN",
    help="Multiaddress of another bootstrap of the same mesh; may be given several times.",
)
@cluster_option
@bootstrap_admission
@state_dir_option
@config_option
@log_options
def command(
    listen_addr: tuple[str, ...],
    reach: ReachOptions,
    port: int,
    identity_file: Path | None,
    join: tuple[str, ...],
    cluster: str,
    admission: Admission,
    state_dir: Path,
    log_format: str,
    verbose: int,
    quiet: bool,
) -> None:
    """Run the entry point of a mesh: it holds no model, and listeners find each other through it.

    Its identity is kept, so the line that it prints for listeners stays valid.
    """
    start_logging(log_format, verbose, quiet)
    allow_files()
    import logging

    import trio

    from shardmesh.swarm.bootstrap import BootstrapSettings, run_bootstrap
    from shardmesh.swarm.cluster_files import ClusterFiles

    own_dir = state_dir / "bootstrap"
    settings = BootstrapSettings(
        listen_hosts=listen_addr,
        reach=reach,
        port=port,
        cluster=cluster,
        admission=admission,
        secret_path=ClusterFiles(state_dir, cluster).secret_path,
        shows_secret=log_format == "pretty" and not quiet,
        identity_file=identity_file or own_dir / "identity.pem",
        state_dir=own_dir,
        join=join,
    )
    trio.run(run_bootstrap, settings, logging.getLogger("shardmesh.bootstrap"))
