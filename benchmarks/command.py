"""`shardmesh bench`: which measurements to make, and how to show them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from benchmarks.catalogue import Measure
    from benchmarks.results import Result

NAMES = (
    *("decode", "aggregate", "prefill", "pieces", "kernels", "large-pages"),
    *("prefix", "drafts", "latency"),
    *("hop", "idle", "recovery", "torrent", "swarm", "load-shard", "seeding"),
    *("gateway", "gateway-idle", "gateway-p99"),
)
"""Those of `catalogue`, which would take a second to import for --help."""


@click.command()
@click.argument("name", type=click.Choice([*NAMES, "all"]))
@click.option(
    "--model",
    default="big",
    show_default=True,
    help="A GGUF file; `big`: a random llama of 254 M parameters; `demo`: the fairy-tale model.",
)
@click.option("--shards", "n_shards", type=click.IntRange(1), default=4, show_default=True)
@click.option("--runs", type=click.IntRange(1), default=5, show_default=True)
@click.option("--tokens", "n_tokens", type=click.IntRange(2), default=128, show_default=True)
@click.option(
    "--rpc",
    is_flag=True,
    help="decode, prefill, aggregate: also by llama.cpp's RPC, if its programs are on the PATH.",
)
@click.option(
    "--n-gpu-layers",
    type=click.IntRange(-1),
    default=0,
    show_default=True,
    help="pieces: layers on graphics processors, as of `listen`; -1: all.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line, as they come.")
def command(
    name: str,
    model: str,
    n_shards: int,
    runs: int,
    n_tokens: int,
    rpc: bool,
    n_gpu_layers: int,
    as_json: bool,
) -> None:
    """Measure a mesh of real processes on this machine against llama.cpp in one process.

    Both sides are measured in turn, one thread in each process; the figures are medians.
    """
    import trio
    from rich.console import Console

    from benchmarks.catalogue import Setting
    from benchmarks.results import machine, table
    from shardmesh.logs import configure_logging

    configure_logging("pretty", verbosity=-1, stream=sys.stderr)
    facts = machine()
    names = NAMES if name == "all" else (name,)
    results: list[Result] = []

    def take(result: Result) -> None:
        results.append(result)
        if as_json:
            click.echo(result.to_json(facts))

    with Console(stderr=True).status("making the model") as status:

        def telling(name: str) -> Callable[[str], None]:
            return lambda what: status.update(f"{name}: {what}")

        async def measure() -> None:
            path = await trio.to_thread.run_sync(_model_path, model)
            for each, measuring in _chosen(names, rpc=rpc):
                setting = Setting(
                    model=path,
                    n_shards=n_shards,
                    n_tokens=n_tokens,
                    runs=runs,
                    n_gpu_layers=n_gpu_layers,
                    progress=telling(each),
                )
                for result in await measuring(setting):
                    take(result)

        trio.run(measure)
    if not as_json:
        console = Console()
        console.print(table(results))
        console.print(", ".join(f"{key} {value}" for key, value in facts.items()), style="dim")


def _chosen(names: Sequence[str], *, rpc: bool) -> Iterator[tuple[str, Measure]]:
    from benchmarks.catalogue import BENCHMARKS, BY_RPC

    for name in names:
        yield name, BENCHMARKS[name]
        if rpc and name in BY_RPC:
            yield f"{name} by RPC", BY_RPC[name]


def _model_path(model: str) -> Path:
    from benchmarks.models import big_model
    from shardmesh.demo_model import DEMO_MODEL

    if model == "big":
        return big_model()
    return DEMO_MODEL if model == "demo" else Path(model)
