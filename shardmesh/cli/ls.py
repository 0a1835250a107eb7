"""`shardmesh ls`: the models on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardmesh.cli.config_file import config_option
from shardmesh.cli.file_options import models_dir_option
from shardmesh.cli.options import shards_dir_option

if TYPE_CHECKING:
    from shardmesh.shards.store import ShardStore

WIDTH_OF_PIPES = 10_000


@click.command("ls")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")
@shards_dir_option
@models_dir_option
@config_option
def command(as_json: bool, shards_dir: Path, models_dir: Path) -> None:
    """Show the models on this machine: which shards are here, and how large they are."""
    from rich.console import Console
    from rich.table import Table

    from shardmesh.shards.library import Library

    stores = Library(shards_dir, models_dir).stores()
    models = [model for store in stores if (model := describe(store))]
    if as_json:
        click.echo(json.dumps(models, indent=2, ensure_ascii=False))
        return
    if not models:
        click.echo(f"No model in {shards_dir} or {models_dir}.", err=True)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("model", "digest", "shards here", "size", "published", "folder"):
        table.add_column(heading, overflow="fold")  # a folder that is cut off is of no use
    console = Console(markup=False)  # a name may hold brackets
    if not console.is_terminal:
        console = Console(markup=False, width=WIDTH_OF_PIPES)  # a line for each model
    for model in models:
        table.add_row(
            model["model_name"],
            model["manifest_digest"][:8],
            _shards(model["shards_here"], model["n_shards"]),
            _sizes(model["n_bytes"], model["n_bytes_set_aside"]),
            "yes" if model["publisher"] else "no",
            model["folder"],
        )
    console.print(table)


def describe(store: ShardStore) -> dict[str, Any] | None:
    """What a model folder holds, as plain values; None if it has no good manifest."""
    from shardmesh.errors import ShardmeshError
    from shardmesh.shards.library import manifest_or_none, set_aside_in
    from shardmesh.shards.partial import PARTIAL_NAME
    from shardmesh.shards.publication import read_publication

    manifest = manifest_or_none(store)
    if manifest is None:
        return None
    try:
        opened = read_publication(store.directory, manifest)
    except ShardmeshError:
        opened = None
    aside = set_aside_in(store.directory)
    return {
        "model_name": manifest.model_name,
        "manifest_digest": manifest.digest(),
        "n_shards": len(manifest.shards),
        "shards_here": [
            s.shard_id for s in manifest.shards if store.shard_path(s.shard_id).exists()
        ],
        "n_bytes": sum(file.n_bytes for file in store.scan()),
        "unfinished": sorted(
            path.name for path in (store.directory / PARTIAL_NAME).glob("*/*.gguf")
        ),
        "set_aside": [path.name for path in aside],
        "n_bytes_set_aside": sum(path.stat().st_size for path in aside),
        "publisher": opened.publisher.hex() if opened else None,
        "folder": str(store.directory),
    }


def _sizes(n_bytes: int, n_bytes_set_aside: int) -> str:
    """The size of what is here, and of wrong files that only take room."""
    from shardmesh.shards.plan import readable_size

    aside = f" + {readable_size(n_bytes_set_aside)} set aside" if n_bytes_set_aside else ""
    return readable_size(n_bytes) + aside


def _shards(here: list[int], n_shards: int) -> str:
    """All of them, or which by number: "1 of 3" would be read as how many."""
    if len(here) == n_shards:
        return f"all {n_shards}" if n_shards > 1 else "all"
    return f"{_ranges(here)} (of 0-{n_shards - 1})"


def _ranges(numbers: list[int]) -> str:
    """Numbers for a person: 0-3, 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(str(number) for number in part) for part in parts) or "none"
