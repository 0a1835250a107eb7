"""`shardmesh bench`: which measurements to make, and how to show them."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from benchmarks.results import Result

GATEWAY_NAMES = ("gateway", "gateway-idle", "gateway-p99")
FILE_NAMES = ("torrent", "swarm", "load-shard", "seeding")
FAR_NAMES = ("drafts", "latency")
MESH_NAMES = ("decode", "aggregate", "prefill", "prefix", "recovery", *FAR_NAMES)
NAMES = (*MESH_NAMES, "hop", *FILE_NAMES, *GATEWAY_NAMES)

MODEL_NAMES = (*MESH_NAMES, "seeding")
"""With the gateway's, those that need the model."""


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
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def command(
    name: str, model: str, n_shards: int, runs: int, n_tokens: int, rpc: bool, as_json: bool
) -> None:
    """Measure a mesh of real processes on this machine against llama.cpp in one process.

    Both sides are measured in turn, one thread in each process; the figures are medians.
    """
    import trio
    from rich.console import Console

    from benchmarks.results import machine, table
    from shardmesh.logs import configure_logging

    configure_logging("pretty", verbosity=-1, stream=sys.stderr)
    facts = machine()
    names = NAMES if name == "all" else (name,)
    run = functools.partial(
        _measure, names, model, n_shards=n_shards, runs=runs, n_tokens=n_tokens, rpc=rpc
    )
    results = trio.run(run)
    if as_json:
        for result in results:
            click.echo(result.to_json(facts))
    else:
        console = Console()
        console.print(table(results))
        console.print(", ".join(f"{key} {value}" for key, value in facts.items()), style="dim")


async def _measure(
    names: tuple[str, ...], model: str, *, n_shards: int, runs: int, n_tokens: int, rpc: bool
) -> list[Result]:
    import trio
    from rich.console import Console

    from benchmarks.against_llama import measure_decode, measure_prefill
    from benchmarks.far import measure_drafts, measure_latency
    from benchmarks.gateway import measure_answers, measure_idle, measure_overhead
    from benchmarks.hop import measure_hops
    from benchmarks.load_shard import measure_load_shard
    from benchmarks.many import measure_aggregate
    from benchmarks.prefix import measure_prefix
    from benchmarks.recovery import measure_recovery
    from benchmarks.rpc import WORKS, measure_rpc
    from benchmarks.seeding import measure_seeding
    from benchmarks.torrent import measure_swarm, measure_torrents

    results: list[Result] = []
    with Console(stderr=True).status("") as status:
        if set(names) & {*MODEL_NAMES, *GATEWAY_NAMES}:
            status.update("making the model")
            path = await trio.to_thread.run_sync(_model_path, model)
        if "decode" in names:
            results.append(
                await measure_decode(
                    path,
                    n_shards=n_shards,
                    n_tokens=n_tokens,
                    runs=runs,
                    progress=lambda what: status.update(f"decode: {what}"),
                )
            )
        if "aggregate" in names:
            results.append(
                await measure_aggregate(
                    path, runs=runs, progress=lambda what: status.update(f"aggregate: {what}")
                )
            )
        if "prefill" in names:
            results.append(
                await measure_prefill(
                    path, runs=runs, progress=lambda what: status.update(f"prefill: {what}")
                )
            )
        if "prefix" in names:
            results.append(
                await measure_prefix(
                    path, runs=runs, progress=lambda what: status.update(f"prefix: {what}")
                )
            )
        if "drafts" in names:
            results.append(
                await measure_drafts(
                    path,
                    n_shards=n_shards,
                    n_tokens=n_tokens,
                    runs=runs,
                    progress=lambda what: status.update(f"drafts: {what}"),
                )
            )
        if "latency" in names:
            results.append(
                await measure_latency(
                    path, runs=runs, progress=lambda what: status.update(f"latency: {what}")
                )
            )
        if "hop" in names:
            results += await measure_hops(runs=runs, progress=status.update)
        if "recovery" in names:
            results += await measure_recovery(path, runs=runs, progress=status.update)
        if "torrent" in names:
            results += await measure_torrents(runs=runs, progress=status.update)
        if "swarm" in names:
            results += await measure_swarm(runs=runs, progress=status.update)
        if "load-shard" in names:
            results.append(
                await measure_load_shard(
                    runs=runs, progress=lambda what: status.update(f"load-shard: {what}")
                )
            )
        if "seeding" in names:
            results.append(
                await measure_seeding(
                    path, runs=runs, progress=lambda what: status.update(f"seeding: {what}")
                )
            )
        if "gateway" in names:
            results += await measure_overhead(
                path, n_shards=n_shards, n_tokens=n_tokens, runs=runs, progress=status.update
            )
        if "gateway-idle" in names:
            results.append(await measure_idle(path, progress=status.update))
        if "gateway-p99" in names:
            results.append(await measure_answers(path, progress=status.update))
        for each in [each for each in names if rpc and each in WORKS]:
            results.append(await measure_rpc(each, path, runs=runs, progress=status.update))
    return results


def _model_path(model: str) -> Path:
    from benchmarks.models import big_model
    from shardmesh.demo_model import DEMO_MODEL

    if model == "big":
        return big_model()
    return DEMO_MODEL if model == "demo" else Path(model)
