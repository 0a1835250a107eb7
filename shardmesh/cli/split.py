"""`shardmesh split`: cut a model, or show how it would be cut."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardmesh.cli.numbers import bytes_of
from shardmesh.cli.options import count, piece_tokens_option
from shardmesh.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from shardmesh.shards.costs import ModelCosts
    from shardmesh.shards.gguf_file import GgufFile
    from shardmesh.shards.layers import LayerRange
    from shardmesh.shards.manifest import Manifest

N_SHARDS_DEFAULT = 2


@click.command(name="split")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--shards", "n_shards", type=int, help="So many shards of even size.  [default: 2]")
@click.option("--layers", "layer_list", help="Layers of each shard, as in 8,8,10,6.")
@click.option("--memory", "memory_list", help="Memory of each machine, as in 8G,4G,16G.")
@click.option(
    "--ctx-size",
    "n_ctx",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    help="Tokens of one sequence that memory is counted for.",
)
@click.option(
    "--parallel",
    "n_parallel",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Sequences at once that memory is counted for.",
)
@click.option("--name", help="Name of the model in the mesh.  [default: its own]")
@click.option(
    "--out",
    "out_dir",
    type=click.Path(path_type=Path),
    envvar="LLAMA_SHARDS_DIR",
    default=Path("models_cache/shards"),
    show_default=True,
    help="Folder to write to.",
)
@click.option(
    "--lora",
    "lora_paths",
    type=click.Path(path_type=Path),
    multiple=True,
    help="LoRA adapter in GGUF to cut along, named as its file; may be given several times.",
)
@piece_tokens_option
@click.option("--dry-run", is_flag=True, help="Only show the plan.")
def command(
    model: Path,
    n_shards: int | None,
    layer_list: str | None,
    memory_list: str | None,
    n_ctx: int,
    n_parallel: int,
    name: str | None,
    out_dir: Path,
    lora_paths: tuple[Path, ...],
    piece_tokens: int | None,
    dry_run: bool,
) -> None:
    """Cut MODEL.gguf into shard files, with tokenizer.gguf and manifest.json beside them."""
    from rich.console import Console

    from shardmesh.shards.architectures import rules_for
    from shardmesh.shards.costs import costs_of
    from shardmesh.shards.gguf_check import read_gguf
    from shardmesh.shards.split import default_name, piece_tokens_for

    if sum(each is not None for each in (n_shards, layer_list, memory_list)) > 1:
        raise InputError(
            "--shards, --layers and --memory exclude each other", next_step="give one of them"
        )
    adapters = adapters_by_name(lora_paths)
    console = Console(stderr=True)
    source = read_gguf(model)
    costs = costs_of(source)
    n_ctx_train = source.get_int(f"{source.architecture}.context_length")
    n_cached = min(n_ctx, n_ctx_train) * n_parallel
    ranges = _planned(costs, n_shards, layer_list, memory_list, n_cached)
    piece_tokens = piece_tokens_for(source, len(ranges), piece_tokens)
    if dry_run:
        Console().print(plan_table(costs, ranges, n_cached, piece_tokens))
        return
    if rules_for(source).is_unknown:
        _prove(console, source, ranges, piece_tokens)
    name = name or default_name(source)
    manifest = _split(console, source, ranges, out_dir, name, adapters, piece_tokens)
    console.print(plan_table(costs, ranges, n_cached, piece_tokens))
    console.print(
        f"{count(len(manifest.shards), 'shard')} of {manifest.model_name!r} in {out_dir}",
        markup=False,
    )


def _planned(
    costs: ModelCosts,
    n_shards: int | None,
    layer_list: str | None,
    memory_list: str | None,
    n_cached: int,
) -> tuple[LayerRange, ...]:
    """The layer ranges that were asked for, in one of three ways; raises InputError (theirs)."""
    from shardmesh.shards.legal_cuts import check_legal
    from shardmesh.shards.plan import plan_layers, plan_memory, plan_shards

    if layer_list is not None:
        ranges = plan_layers(costs.n_layer, parse_counts(layer_list))
        check_legal(costs.legal, ranges)
        return ranges
    if memory_list is not None:
        return plan_memory(costs, parse_sizes(memory_list), n_cached)
    return plan_shards(costs, N_SHARDS_DEFAULT if n_shards is None else n_shards)


def parse_counts(text: str) -> tuple[int, ...]:
    """Numbers between commas; raises InputError (theirs)."""
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,4}", word) for word in words):
        raise InputError(
            f"{text[:100]!r} is not a list of layer counts", next_step="write it as in 8,8,10,6"
        )
    return tuple(int(word) for word in words)


def adapters_by_name(paths: Sequence[Path]) -> dict[str, Path]:
    """LoRA adapters by the names of their files; raises InputError (theirs) for two of one name."""
    adapters = {re.sub(r"[^A-Za-z0-9._+-]", "_", path.stem)[:64]: path for path in paths}
    if len(adapters) < len(paths):
        raise InputError("two LoRA adapters have one name", next_step="rename one of their files")
    return adapters


def parse_sizes(text: str) -> tuple[int, ...]:
    """Sizes between commas in bytes; K, M, G, T are powers of 1024.  Raises InputError (theirs)."""
    sizes = [bytes_of(word) for word in text.split(",")]
    if not all(sizes):
        raise InputError(
            f"{text[:100]!r} is not a list of memory sizes", next_step="write it as in 8G,4G,16G"
        )
    return tuple(size for size in sizes if size)


def plan_table(
    costs: ModelCosts, ranges: Sequence[LayerRange], n_cached: int, piece_tokens: int
) -> Table:
    """A table of the shards: layers, size of the file, memory with so many cached tokens."""
    from rich.table import Table

    from shardmesh.shards.plan import memory_needed, readable_size

    table = Table(
        title=f"{count(costs.n_layer, 'layer')} in {count(len(ranges), 'shard')}",
        caption=f"memory with {n_cached} tokens cached\n"
        f"prompts go in pieces of {piece_tokens} tokens",
    )
    for heading in ("shard", "layers", "number", "file", "memory"):
        table.add_column(heading, justify="right")
    for shard_id, needed in enumerate(memory_needed(costs, ranges, n_cached)):
        layers = ranges[shard_id]
        table.add_row(
            str(shard_id),
            str(layers),
            str(layers.n_layer),
            readable_size(costs.file_bytes(layers)),
            readable_size(needed),
        )
    return table


def _prove(
    console: Console, source: GgufFile, ranges: Sequence[LayerRange], piece_tokens: int
) -> None:
    """Tries whether a model of an unknown architecture stays exact; raises GgufError if not."""
    from shardmesh.engine.prove import prove_exact

    console.print(
        f"architecture {source.architecture!r} is not in the list of those that stay exact when"
        " cut: trying it out first",
        markup=False,
    )
    with console.status("reading the model") as status:
        prove_exact(source, ranges, progress=status.update, piece_tokens=piece_tokens)
    console.print("[green]identical[/green]: whole and cut give the same bits")


def _split(
    console: Console,
    source: GgufFile,
    ranges: Sequence[LayerRange],
    out_dir: Path,
    name: str,
    adapters: Mapping[str, Path],
    piece_tokens: int,
) -> Manifest:
    """Splits under a progress bar with rate and remaining time."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from shardmesh.shards.split import plan_n_bytes, split_model

    n_bytes = plan_n_bytes(source, ranges, name, adapters)
    bar = Progress(
        TextColumn("splitting"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task("splitting", total=n_bytes)
        return split_model(
            source.path,
            ranges,
            out_dir,
            name=name,
            progress=lambda n: bar.advance(task, n),
            is_proven=True,
            adapters=adapters,
            piece_tokens=piece_tokens,
        )
