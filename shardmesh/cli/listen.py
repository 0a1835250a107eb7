"""`shardmesh listen`: serve one shard."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardmesh.cli.admission import command_rights, listener_admission
from shardmesh.cli.config_file import config_option
from shardmesh.cli.file_options import (
    LinkType,
    bootstraps_of,
    is_given,
    models_dir_option,
    torrent_options,
)
from shardmesh.cli.numbers import PORT, FiniteRange
from shardmesh.cli.options import (
    bootstrap_option,
    cache_dir,
    cluster_option,
    listen_addr_option,
    log_options,
    naming,
    naming_options,
    shards_dir_option,
    start_logging,
    state_dir_option,
)
from shardmesh.cli.reach import listener_reach
from shardmesh.confinement import allow_files
from shardmesh.wire.defaults import NICE_DEFAULT
from shardmesh.wire.limits import SESSIONS_PER_NODE_MAX

if TYPE_CHECKING:
    from shardmesh.shards.model_link import ModelLink
    from shardmesh.swarm.admission import Admission
    from shardmesh.swarm.reach import ReachOptions
    from shardmesh.swarm.rights import Rights
    from shardmesh.swarm.torrents.options import TorrentOptions

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


@click.command("listen")
@click.option(
    "--shard-id",
    type=click.IntRange(0),
    envvar="LLAMA_SHARD_ID",
    help="Shard to serve.  [default: the one that the mesh serves least]",
)
@click.option(
    "--total-shards",
    type=click.IntRange(1),
    envvar="LLAMA_TOTAL_SHARDS",
    help="Shards of the model.  [default: as the manifest says]",
)
@click.option(
    "--total-layers",
    type=click.IntRange(1),
    envvar="LLAMA_TOTAL_LAYERS",
    help="Layers of the model.  [default: as the manifest says]",
)
@click.option(
    "--model-name",
    envvar="LLAMA_MODEL_NAME",
    help="Name of the model.  [default: as the manifest says]",
)
@listen_addr_option
@listener_reach
@click.option(
    "--port",
    type=PORT,
    default=0,
    envvar="LLAMA_PORT",
    help="TCP port of the control process.  [default: any]",
)
@click.option(
    "--data-port",
    type=PORT,
    default=0,
    envvar="LLAMA_DATA_PORT",
    help="TCP port for hidden states.  [default: any]",
)
@click.option(
    "--refresh-interval",
    "refresh_interval_s",
    type=FiniteRange(1, 599),
    default=300.0,
    show_default=True,
    envvar="LLAMA_REFRESH_INTERVAL",
    help="Seconds between announcements.",
)
@click.option(
    "--rebalance-interval",
    "rebalance_interval_s",
    type=FiniteRange(0),
    default=60.0,
    show_default=True,
    envvar="LLAMA_REBALANCE_INTERVAL",
    help="Without --shard-id: seconds between looks whether another shard needs this node more; "
    "0 for never.",
)
@click.option(
    "--ctx-size",
    "n_ctx",
    type=click.IntRange(0),
    default=0,
    envvar="LLAMA_CTX_SIZE",
    help="Tokens of one sequence.  [default: by model and memory]",
)
@click.option(
    "--parallel",
    "n_parallel",
    type=click.IntRange(1, 256),
    default=4,
    show_default=True,
    envvar="LLAMA_PARALLEL",
    help="Sequences at once.",
)
@click.option(
    "--sessions-per-node",
    "sessions_per_node_max",
    type=click.IntRange(1, SESSIONS_PER_NODE_MAX),
    default=SESSIONS_PER_NODE_MAX,
    show_default=True,
    envvar="LLAMA_SESSIONS_PER_NODE",
    help="Sequences that one coordinator may use at once.",
)
@click.option(
    "--nice",
    type=click.IntRange(0, 19),
    default=NICE_DEFAULT,
    show_default=True,
    envvar="LLAMA_NICE",
    help="How far computing stands back behind the machine's other work.",
)
@click.option(
    "--threads",
    "n_threads",
    type=click.IntRange(0),
    default=0,
    envvar="LLAMA_THREADS",
    help="Threads that compute.  [default: cores less one]",
)
@click.option(
    "--n-gpu-layers",
    type=click.IntRange(-1),
    default=0,
    show_default=True,
    envvar="LLAMA_N_GPU_LAYERS",
    help="Layers of the shard on a GPU; -1 for all.",
)
@click.option(
    "--cache-type-k",
    type=click.Choice(CACHE_TYPES),
    default="f16",
    show_default=True,
    envvar="LLAMA_CACHE_TYPE_K",
    help="Type of cached keys.",
)
@click.option(
    "--cache-type-v",
    type=click.Choice(CACHE_TYPES),
    default="f16",
    show_default=True,
    envvar="LLAMA_CACHE_TYPE_V",
    help="Type of cached values; a quantized one turns flash attention on.",
)
@click.option(
    "--flash-attn/--no-flash-attn",
    "flash_attention",
    default=None,
    envvar="LLAMA_FLASH_ATTN",
    help="Must be the same on all stages.  [default: chosen alike everywhere]",
)
@click.option(
    "--own-kernels/--no-own-kernels",
    default=True,
    show_default=True,
    envvar="LLAMA_OWN_KERNELS",
    help="Compute by Shardmesh's kernels where they can be used: the same bits, sooner.",
)
@click.option(
    "--large-pages/--no-large-pages",
    default=True,
    show_default=True,
    envvar="LLAMA_LARGE_PAGES",
    help="Copy weights into memory with pages of 2 MB, where a quarter of what is free suffices.",
)
@click.option(
    "--model",
    "link",
    type=LinkType(),
    envvar="LLAMA_MODEL",
    help="Model link of a published model; its files are fetched.",
)
@click.option(
    "--http",
    "http_port",
    type=PORT,
    envvar="LLAMA_HTTP_PORT",
    help="Port on 127.0.0.1 for the operator's HTTP API; 0 picks one.  [default: none]",
)
@naming_options
@shards_dir_option
@models_dir_option
@torrent_options
@bootstrap_option
@cluster_option
@listener_admission
@command_rights
@state_dir_option
@config_option
@log_options
def command(
    shard_id: int | None,
    total_shards: int | None,
    total_layers: int | None,
    model_name: str | None,
    listen_addr: tuple[str, ...],
    reach: ReachOptions,
    port: int,
    data_port: int,
    refresh_interval_s: float,
    rebalance_interval_s: float,
    n_ctx: int,
    n_parallel: int,
    sessions_per_node_max: int,
    nice: int,
    n_threads: int,
    n_gpu_layers: int,
    cache_type_k: str,
    cache_type_v: str,
    flash_attention: bool | None,
    own_kernels: bool,
    large_pages: bool,
    link: ModelLink | None,
    http_port: int | None,
    node_name: str,
    node_location: str,
    node_tags: tuple[str, ...],
    shards_dir: Path,
    models_dir: Path,
    torrents: TorrentOptions,
    bootstrap: tuple[str, ...],
    cluster: str,
    admission: Admission,
    rights: Rights,
    state_dir: Path,
    log_format: str,
    verbose: int,
    quiet: bool,
) -> None:
    """Serve one shard of a model to the mesh, until Ctrl-C.

    With --model it needs no files: manifest and shard are fetched from other nodes, into a folder
    of their own in --models-dir, or into --shards-dir if that is given.

    What the manifest knows need not be given; a contradiction with it is an error.
    """
    start_logging(log_format, verbose, quiet)
    allow_files()
    import trio

    from shardmesh.cli.downloads import watcher
    from shardmesh.engine.base import EngineOptions
    from shardmesh.engine.options import check_options
    from shardmesh.listener.assignment import WantedShard
    from shardmesh.listener.node_options import NodeOptions
    from shardmesh.listener.run import run_node

    serve_http = None
    if http_port is not None:
        from shardmesh.web.node_server import node_server

        serve_http = node_server(http_port)
    engine = EngineOptions(
        n_ctx=n_ctx,
        n_parallel=n_parallel,
        n_threads=n_threads,
        n_gpu_layers=n_gpu_layers,
        cache_type_k=cache_type_k,
        cache_type_v=cache_type_v,
        flash_attention=flash_attention,
        own_kernels=own_kernels,
        large_pages=large_pages,
    )
    check_options(engine)  # a listener would try for ever to load its shard with it
    options = NodeOptions(
        naming=naming(node_name, node_location, node_tags),
        serve_http=serve_http,
        wanted=WantedShard(
            shard_id=shard_id,
            total_shards=total_shards,
            total_layers=total_layers,
            model_name=model_name,
        ),
        cluster=cluster,
        admission=admission,
        rights=rights,
        shards_dir=shards_dir,
        models_dir=models_dir,
        link=link,
        fetch_into_shards_dir=is_given("shards_dir"),
        torrents=torrents,
        state_dir=state_dir,
        cache_dir=cache_dir(),
        bootstraps=bootstrap if link is None else bootstraps_of(link, bootstrap),
        listen_hosts=listen_addr,
        reach=reach,
        port=port,
        data_port=data_port,
        refresh_interval_s=refresh_interval_s,
        sessions_per_node_max=sessions_per_node_max,
        nice=nice,
        rebalance_interval_s=rebalance_interval_s,
        engine=engine,
        log_format="json" if log_format == "json" else "pretty",
        log_verbosity=-1 if quiet else verbose,
        watch_files=watcher(sys.stdout, stays=False, draws=log_format == "pretty" and not quiet),
    )
    trio.run(run_node, options)
