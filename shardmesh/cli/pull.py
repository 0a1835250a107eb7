"""`shardmesh pull`: fetch a published model, or some of its shards, without serving it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardmesh.cli.admission import listener_admission
from shardmesh.cli.config_file import config_option
from shardmesh.cli.file_options import (
    LinkType,
    bootstraps_of,
    is_given,
    models_dir_option,
    torrent_options,
)
from shardmesh.cli.numbers import SECONDS_MAX, FiniteRange
from shardmesh.cli.options import (
    bootstrap_option,
    cluster_option,
    listen_addr_option,
    shards_dir_option,
    state_dir_option,
)
from shardmesh.errors import InputError, UnreachableError

if TYPE_CHECKING:
    from shardmesh.shards.model_link import ModelLink
    from shardmesh.shards.publication import OpenPublication
    from shardmesh.swarm.admission import Admission
    from shardmesh.swarm.torrents.options import TorrentOptions


@click.command("pull")
@click.argument("link", type=LinkType())
@click.option(
    "--shard",
    "shard_ids",
    type=click.IntRange(0),
    multiple=True,
    help="Shard to fetch; may be given several times.",
)
@click.option("--all", "everything", is_flag=True, help="All shards; so it is without --shard.")
@click.option(
    "--timeout",
    "timeout_s",
    type=FiniteRange(0.1, SECONDS_MAX),
    help="Seconds after which it gives up.  [default: never]",
)
@listen_addr_option
@shards_dir_option
@models_dir_option
@torrent_options
@bootstrap_option
@cluster_option
@listener_admission
@state_dir_option
@config_option
def command(
    link: ModelLink,
    shard_ids: tuple[int, ...],
    everything: bool,
    timeout_s: float | None,
    listen_addr: tuple[str, ...],
    shards_dir: Path,
    models_dir: Path,
    torrents: TorrentOptions,
    bootstrap: tuple[str, ...],
    cluster: str,
    admission: Admission,
    state_dir: Path,
) -> None:
    """Fetch the files of the model behind LINK; what is here and right is not fetched again.

    They go to a folder of their own in --models-dir, or into --shards-dir if that is given.
    """
    from shardmesh.logs import configure_logging

    configure_logging("pretty", verbosity=-1, stream=sys.stderr)
    import math

    import trio

    from shardmesh.cli.downloads import watcher
    from shardmesh.listener.published import (
        fetch_files,
        keep_publication,
        wait_for_publication,
    )
    from shardmesh.listener.seeder import SeederOptions, open_seeder
    from shardmesh.shards.library import Library
    from shardmesh.swarm.torrents.progress import PROGRESS_LOGGER

    logging.getLogger(PROGRESS_LOGGER).setLevel(logging.INFO)
    if shard_ids and everything:
        raise InputError("--shard and --all exclude each other", next_step="give one of them")
    own_dir = None if is_given("shards_dir") else models_dir
    folder = Library(shards_dir, own_dir).folder_for(link.model_name, link.manifest_digest)
    options = SeederOptions(
        bootstraps=bootstraps_of(link, bootstrap),
        cluster=cluster,
        admission=admission,
        listen_hosts=listen_addr,
        port=0,
        state_dir=state_dir,
        shards_dir=folder,
        models_dir=models_dir,
        torrents=torrents,
    )

    async def run() -> OpenPublication:
        async with open_seeder(options) as seeder, trio.open_nursery() as nursery:
            nursery.start_soon(watcher(sys.stderr, stays=True), seeder.files)
            opened = await wait_for_publication(seeder.files.find_publication, link)
            await trio.to_thread.run_sync(keep_publication, folder, opened)
            wanted = list(shard_ids) or list(range(len(opened.manifest.shards)))
            await fetch_files(seeder.files, opened, folder, wanted)
            nursery.cancel_scope.cancel()
        return opened

    async def run_in_time() -> OpenPublication:
        try:
            with trio.fail_after(math.inf if timeout_s is None else timeout_s):
                return await run()
        except trio.TooSlowError:
            raise UnreachableError(
                f"{link.model_name} was not here whole after {timeout_s:g} s",
                code="NO_SOURCE",
                next_step="is a node up that has the missing files?  What was fetched is kept, so "
                "the next try goes on from there",
            ) from None

    opened = trio.run(run_in_time)
    n_shards = len(set(shard_ids)) or len(opened.manifest.shards)
    shards = "1 shard" if n_shards == 1 else f"{n_shards} shards"
    click.echo(f"{shards} of {opened.manifest.model_name} in {folder}")
