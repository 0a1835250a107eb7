"""`shardmesh web`: run the gateway."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardmesh.cli.admission import gateway_admission
from shardmesh.cli.options import (
    bootstrap_option,
    cache_dir,
    cluster_option,
    config_option,
    log_options,
    shards_dir_option,
    start_logging,
    state_dir_option,
)

if TYPE_CHECKING:
    from shardmesh.swarm.admission import Admission


@click.command("web")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    envvar="LLAMA_WEB_HOST",
    help="Address to listen on.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    envvar="LLAMA_WEB_PORT",
    help="TCP port for HTTP; 0 picks one.",
)
@click.option(
    "--ws-port",
    type=click.IntRange(0, 65535),
    default=8081,
    show_default=True,
    envvar="LLAMA_WS_PORT",
    help="TCP port for WebSockets, which /ws of the other one serves too; 0 picks one.",
)
@shards_dir_option
@bootstrap_option
@cluster_option
@gateway_admission
@state_dir_option
@config_option
@log_options
def command(
    host: str,
    port: int,
    ws_port: int,
    shards_dir: Path,
    bootstrap: tuple[str, ...],
    cluster: str,
    admission: Admission,
    state_dir: Path,
    log_format: str,
    verbose: int,
    quiet: bool,
) -> None:
    """Run the gateway: an OpenAI-compatible API over a running mesh, until Ctrl-C."""
    start_logging(log_format, verbose, quiet)
    import trio

    from shardmesh.web.gateway import GatewayOptions
    from shardmesh.web.run import WebOptions, run_web

    options = WebOptions(
        host=host,
        port=port,
        ws_port=ws_port,
        gateway=GatewayOptions(
            bootstraps=bootstrap,
            cluster=cluster,
            admission=admission,
            shards_dir=shards_dir,
            cache_dir=cache_dir(),
            state_dir=state_dir,
        ),
    )
    trio.run(run_web, options)
