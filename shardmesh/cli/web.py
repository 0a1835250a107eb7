"""`shardmesh web`: run the gateway."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardmesh.cli.admission import gateway_admission
from shardmesh.cli.config_file import config_option
from shardmesh.cli.numbers import PORT
from shardmesh.cli.options import (
    audit_option,
    bootstrap_option,
    cache_dir,
    cluster_option,
    drafts_option,
    log_options,
    naming,
    naming_options,
    shards_dir_option,
    standby_option,
    start_logging,
    state_dir_option,
    wire_option,
)

if TYPE_CHECKING:
    from shardmesh.swarm.admission import Admission
    from shardmesh.wire.hidden_states import WireType


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
    type=PORT,
    default=8080,
    show_default=True,
    envvar="LLAMA_WEB_PORT",
    help="TCP port for HTTP; 0 picks one.",
)
@click.option(
    "--ws-port",
    type=PORT,
    default=8081,
    show_default=True,
    envvar="LLAMA_WS_PORT",
    help="TCP port for WebSockets, which /ws of the other one serves too; 0 picks one.",
)
@click.option(
    "--api-token",
    "api_tokens",
    multiple=True,
    envvar="LLAMA_API_TOKEN",
    help="TOKEN, NAME:TOKEN or NAME/RIGHT,RIGHT:TOKEN that may use the API, with the rights "
    "inference, read, operate; may be given several times.",
)
@click.option(
    "--api-token-file",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar="LLAMA_API_TOKEN_FILE",
    help="File with a token in each line, which only you may read.",
)
@click.option(
    "--rate-limit",
    "rate_per_minute",
    type=click.IntRange(0, 1_000_000),
    default=0,
    show_default="none",
    envvar="LLAMA_RATE_LIMIT",
    help="Requests a minute that each token may send.",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    envvar="LLAMA_CORS_ORIGIN",
    help="Origin whose pages may use the API, or *; may be given several times.",
)
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    envvar="LLAMA_ALLOWED_HOST",
    help="Name by which the gateway is reached, besides addresses; may be given several times.",
)
@wire_option
@click.option(
    "--no-prefix-reuse",
    is_flag=True,
    envvar="LLAMA_NO_PREFIX_REUSE",
    help="Compute every prompt as a whole, and leave none of them in the stages.",
)
@standby_option
@drafts_option
@audit_option
@naming_options
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
    api_tokens: tuple[str, ...],
    api_token_file: Path | None,
    rate_per_minute: int,
    cors_origins: tuple[str, ...],
    allowed_hosts: tuple[str, ...],
    wire: WireType,
    no_prefix_reuse: bool,
    standby: bool,
    drafts: int | None,
    audit_rate: float,
    node_name: str,
    node_location: str,
    node_tags: tuple[str, ...],
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
    from shardmesh.web.guard import GuardSettings
    from shardmesh.web.run import WebOptions, run_web
    from shardmesh.web.tokens import ApiTokens, read_tokens

    kept_tokens = read_tokens(api_token_file) if api_token_file else []
    options = WebOptions(
        host=host,
        port=port,
        ws_port=ws_port,
        guard=GuardSettings(
            tokens=ApiTokens([*api_tokens, *kept_tokens]),
            hosts=frozenset(name.lower() for name in allowed_hosts),
            origins=frozenset(origin.rstrip("/") for origin in cors_origins),
            rate_per_minute=rate_per_minute,
        ),
        gateway=GatewayOptions(
            bootstraps=bootstrap,
            cluster=cluster,
            admission=admission,
            shards_dir=shards_dir,
            cache_dir=cache_dir(),
            state_dir=state_dir,
            naming=naming(node_name, node_location, node_tags),
            wire=wire,
            reuse_prefix=not no_prefix_reuse,
            standby=standby,
            n_drafts=drafts,
            audit_rate=audit_rate,
        ),
    )
    trio.run(run_web, options)
