"""`shardmesh rm`: remove a model, or one of its shards, from this machine."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from shardmesh.cli.config_file import config_option
from shardmesh.cli.file_options import models_dir_option
from shardmesh.cli.options import shards_dir_option
from shardmesh.errors import InputError

EXIT_NOT_REMOVED = 1


@click.command("rm")
@click.argument("model")
@click.option(
    "--shard",
    "shard_ids",
    type=click.IntRange(0),
    multiple=True,
    help="Only this shard; may be given several times.",
)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@shards_dir_option
@models_dir_option
@config_option
def command(
    model: str, shard_ids: tuple[int, ...], yes: bool, shards_dir: Path, models_dir: Path
) -> int:
    """Remove MODEL: its name, its folder's name, or at least 8 letters of its digest.

    Only what Shardmesh has put there is removed: shards, tokenizer, manifest, and files that are
    unfinished or were set aside.  Exit code 1: the answer was no.
    """
    from shardmesh.shards.library import (
        Library,
        remove_model,
        remove_shards,
        require_shards,
    )
    from shardmesh.shards.plan import readable_size

    library = Library(shards_dir, models_dir)
    store = library.by_name(model)
    require_shards(store, shard_ids)
    what = ", ".join(f"shard {i}" for i in shard_ids) if shard_ids else "all files"
    if not yes and not _is_wanted(f"Remove {what} of {model} in {store.directory}?"):
        click.echo("Nothing was removed.", err=True)
        return EXIT_NOT_REMOVED
    n_bytes = remove_shards(store, shard_ids) if shard_ids else remove_model(store)
    click.echo(f"Removed {what} of {model}: {readable_size(n_bytes)}")
    return 0


def _is_wanted(question: str) -> bool:
    """Asks; raises InputError (theirs) where nobody can answer, Abort for Ctrl-C."""
    try:
        return click.confirm(question)
    except click.Abort:
        if sys.stdin is not None and sys.stdin.isatty():
            raise
        click.echo()
        raise InputError(
            "the question was not answered; nothing was removed",
            next_step="give -y to remove without being asked",
        ) from None
