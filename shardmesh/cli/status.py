"""`shardmesh status`: what the mesh looks like."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from shardmesh.cli.options import count, shards_dir_option
from shardmesh.cli.visit import Visit, visit_options

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from shardmesh.coordinator.client import Client
    from shardmesh.coordinator.overview import ModelView

WATCH_INTERVAL_S = 1.0
EXIT_INCOMPLETE = 1
SHORT_PEER_ID_LETTERS = 8
NARROW_COLUMNS = 80
"""Below that the details of replicas are left out; `--json` has them."""


@click.command("status")
@click.option("--watch", is_flag=True, help="Show again every second, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@shards_dir_option
@visit_options
def command(watch: bool, as_json: bool, visit: Visit) -> int:
    """Show shards and replicas, and whether all layers are served.

    Exit code 0: at least one model is complete; 1: none is.
    """

    async def show(client: Client) -> int:
        if watch:
            await _watch(client, as_json=as_json)
        models = await _look(client)
        click.echo(models_as_json(models)) if as_json else show_models(models)
        return 0 if any(model.is_complete for model in models) else EXIT_INCOMPLETE

    return visit.run(show)


async def _look(client: Client) -> tuple[ModelView, ...]:
    from shardmesh.coordinator.overview import look_at_mesh

    return await look_at_mesh(client.host, await client.membership.find_listeners())


async def _watch(client: Client, *, as_json: bool) -> None:
    """Shows the mesh again and again; ends only by an interruption."""
    import trio
    from rich.console import Console
    from rich.live import Live

    console = Console(markup=False)  # a name may hold brackets
    if as_json or not console.is_terminal:  # a Live shows nothing there until it ends
        while True:
            models = await _look(client)
            click.echo(models_as_json(models)) if as_json else show_models(models)
            await trio.sleep(WATCH_INTERVAL_S)
    with Live(console=console, auto_refresh=False, screen=False) as live:
        while True:
            live.update(models_as_table(await _look(client), console.width), refresh=True)
            await trio.sleep(WATCH_INTERVAL_S)


def show_models(models: tuple[ModelView, ...]) -> None:
    """Tables on standard output."""
    from rich.console import Console

    console = Console(markup=False)  # a name may hold brackets
    console.print(models_as_table(models, console.width))


def models_as_json(models: tuple[ModelView, ...]) -> str:
    """One line of JSON: a list of models with their replicas."""
    import dataclasses
    import json

    return json.dumps(
        [
            {
                **dataclasses.asdict(model),
                "complete": model.is_complete,
                "exact": model.is_exact,
            }
            for model in models
        ],
        ensure_ascii=False,
    )


def models_as_table(models: tuple[ModelView, ...], width: int) -> RenderableType:
    """A table for each model, with a verdict under it, for a terminal of `width` columns."""
    from rich.console import Group
    from rich.text import Text

    if not models:
        return Text("Nobody in this mesh serves a shard.")
    parts: list[RenderableType] = []
    for model in models:
        heading = f"{model.model_name or 'unknown model'}: {count(model.n_layer, 'layer')} "
        parts.append(Text(f"{heading}in {count(model.total_shards, 'shard')}", style="italic"))
        parts.append(_replicas(model, is_narrow=width < NARROW_COLUMNS))
        parts += _links(model)
        parts.append(_verdict(model))
    return Group(*parts)


def _replicas(model: ModelView, *, is_narrow: bool) -> Table:
    """A line for each replica; in a narrow terminal only what tells whether all is served."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("shard", justify="right", no_wrap=True)
    table.add_column("layers", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in () if is_narrow else ("free GiB", "context", "reached", "round trip"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("node", no_wrap=True)
    for replica in model.replicas:
        trip = replica.round_trip_ms
        details = (
            f"{replica.memory_available_mb / 1024:.1f}/{replica.memory_mb / 1024:.1f}",
            str(replica.n_ctx or "-"),
            replica.path or "-",
            f"{trip:.0f} ms" if trip is not None else "-",
        )
        table.add_row(
            str(replica.shard_id),
            f"[{replica.layer_start}, {replica.layer_end})",
            Text(replica.state, style="green" if replica.state == "loaded" else "yellow"),
            *(() if is_narrow else details),
            short_peer_id(replica.peer_id),
        )
    return table


def _links(model: ModelView) -> list[RenderableType]:
    """A line for each link between two stages: what it goes over, and what that costs."""
    from rich.text import Text

    shards = {replica.peer_id: str(replica.shard_id) for replica in model.replicas}
    return [
        Text(
            f"link {replica.shard_id} -> {shards.get(link.peer_id, '?')}: {link.kind}, "
            f"round trip {link.round_trip_ms:.1f} ms",
            style="yellow" if link.kind != "direct" else "",
        )
        for replica in model.replicas
        for link in replica.links
    ]


def short_peer_id(peer_id: str) -> str:
    """The end of a peer id, which `shardmesh command` takes too; its beginning is always alike."""
    return peer_id[-SHORT_PEER_ID_LETTERS:]


def _verdict(model: ModelView) -> RenderableType:
    from rich.text import Text

    if model.is_complete and model.is_exact:
        return Text("✓ pipeline complete", style="green")
    if model.is_complete:
        return Text(
            "✓ pipeline complete, but its nodes compute differently (another llama.cpp, processor "
            "or option): the last bits may differ from one process",
            style="yellow",
        )
    ranges = ", ".join(f"[{start}, {end})" for start, end in model.missing) or "all"
    return Text(f"✗ pipeline incomplete: nobody serves the layers {ranges}", style="red")
