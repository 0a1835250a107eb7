"""`shardmesh verify`: the same bits cut as whole?"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardmesh.cli.numbers import SECONDS_MAX, FiniteRange
from shardmesh.cli.options import piece_tokens_option
from shardmesh.errors import InputError, ShardmeshError

if TYPE_CHECKING:
    from rich.table import Table

    from shardmesh.engine.verify import VerifyReport

N_SHARDS_DEFAULT = 2
EXIT_IDENTICAL = 0
EXIT_DIFFERENT = 1
EXIT_NOT_RUN = 2


@click.command(name="verify")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--shards", "n_shards", type=int, help="So many shards of even size.  [default: 2]")
@click.option("--layers", "layer_list", help="Layers of each shard, as in 8,8,10,6.")
@click.option(
    "--tokens",
    "n_single",
    type=int,
    default=8,
    show_default=True,
    help="Single steps after the prefill.",
)
@click.option("--prompt", default="", help="Text of the prefill.  [default: made-up tokens]")
@piece_tokens_option
@click.option(
    "--timeout",
    "timeout_s",
    type=FiniteRange(1, SECONDS_MAX),
    default=3600.0,
    show_default=True,
    help="Seconds for each process.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")
@click.pass_context
def command(
    context: click.Context,
    model: Path,
    n_shards: int | None,
    layer_list: str | None,
    n_single: int,
    prompt: str,
    piece_tokens: int | None,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Compute MODEL.gguf whole and cut, and compare all logits of each step bit for bit.

    Exit code 0: identical; 1: different; 2: could not be run.
    """
    try:
        report = _verify(model, n_shards, layer_list, n_single, prompt, piece_tokens, timeout_s)
    except ShardmeshError as error:
        _show_error(error, as_json)
        context.exit(EXIT_NOT_RUN)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
    else:
        _show(report)
    context.exit(EXIT_IDENTICAL if report.identical else EXIT_DIFFERENT)


def _verify(
    model: Path,
    n_shards: int | None,
    layer_list: str | None,
    n_single: int,
    prompt: str,
    piece_tokens: int | None,
    timeout_s: float,
) -> VerifyReport:
    from rich.console import Console

    from shardmesh.cli.split import parse_counts
    from shardmesh.engine.verify import verify_model
    from shardmesh.shards.costs import costs_of
    from shardmesh.shards.gguf_check import read_gguf
    from shardmesh.shards.plan import plan_layers, plan_shards

    if n_shards is not None and layer_list is not None:
        raise InputError("--shards and --layers exclude each other", next_step="give one of them")
    source = read_gguf(model)
    if layer_list is not None:
        ranges = plan_layers(source.n_layer, parse_counts(layer_list))
    else:
        ranges = plan_shards(costs_of(source), N_SHARDS_DEFAULT if n_shards is None else n_shards)
    with Console(stderr=True).status("reading the model") as status:
        return verify_model(
            model,
            ranges,
            n_single=n_single,
            prompt=prompt,
            piece_tokens=piece_tokens,
            timeout_s=timeout_s,
            progress=status.update,
        )


def _show_error(error: ShardmeshError, as_json: bool) -> None:
    from shardmesh.cli.failures import explain

    if as_json:
        told = {"error": str(error), "code": error.code, "next_step": error.next_step}
        click.echo(json.dumps(told, ensure_ascii=False))
    else:
        click.echo(explain(error), err=True)


def _show(report: VerifyReport) -> None:
    from rich.console import Console

    console = Console()
    console.print(_table(report))
    if report.identical:
        console.print(f"[green]identical[/green]: all logits of {report.n_steps} steps, to the bit")
    else:
        console.print(
            f"[red]different[/red]: largest difference {report.max_abs_diff:g}; greedy choices "
            + ("are the same" if report.greedy_equal else "differ")
        )


def _table(report: VerifyReport) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{report.architecture}, {report.n_layers} layers"))
    table.add_column("shard", justify="right")
    table.add_column("layers", justify="right")
    for shard_id, (layer_start, layer_end) in enumerate(report.layer_ranges):
        table.add_row(str(shard_id), f"[{layer_start}, {layer_end})")
    return table
