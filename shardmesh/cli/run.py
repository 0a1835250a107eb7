"""`shardmesh run`: answer a prompt with a running mesh."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardmesh.cli.numbers import COUNT_MAX, FiniteRange
from shardmesh.cli.options import (
    audit_option,
    count,
    drafts_option,
    shards_dir_option,
    standby_option,
    wire_option,
)
from shardmesh.cli.visit import Visit, visit_options
from shardmesh.errors import InputError, ShardmeshError
from shardmesh.wire.limits import PROMPT_BYTES_MAX

if TYPE_CHECKING:
    from shardmesh.coordinator.auditor import Auditor
    from shardmesh.coordinator.client import Client
    from shardmesh.coordinator.coordinator import Completion
    from shardmesh.coordinator.generate import Finished
    from shardmesh.coordinator.request import CompletionRequest
    from shardmesh.coordinator.timings import Timings
    from shardmesh.wire.hidden_states import WireType


@click.command("run")
@click.argument("prompt")
@click.option("--model", help="Name of the model, if the mesh serves several.")
@click.option("--lora", "adapter", default="", help="Name of a LoRA adapter of the model.")
@click.option(
    "--max-tokens", "n_tokens_max", type=click.IntRange(1), default=256, show_default=True
)
@click.option("--temperature", type=FiniteRange(0, 100), default=0.8, show_default=True)
@click.option("--top-k", type=click.IntRange(0, COUNT_MAX), default=40, show_default=True)
@click.option("--top-p", type=FiniteRange(0, 1), default=0.95, show_default=True)
@click.option("--min-p", type=FiniteRange(0, 1), default=0.05, show_default=True)
@click.option(
    "--repeat-penalty", type=FiniteRange(0, 100, min_open=True), default=1.0, show_default=True
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="[default: a new one each time]")
@click.option("--stop", multiple=True, help="Ends the text; may be given several times.")
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@click.option("--system", help="System message, with --chat.")
@click.option("--ignore-end", is_flag=True, help="Go on behind the model's end of text.")
@click.option(
    "--via",
    multiple=True,
    metavar="PEER[,PEER...]",
    help="Nodes that the chain must begin with, by peer id or its end.",
)
@click.option(
    "--avoid", multiple=True, metavar="PEER[,PEER...]", help="Nodes that must not take part."
)
@click.option("--explain", is_flag=True, help="Show why the chain was chosen, with numbers.")
@click.option(
    "--wait",
    "wait_s",
    type=FiniteRange(0, 3600),
    default=20.0,
    show_default=True,
    help="Seconds to wait for another replica when a stage is lost.",
)
@wire_option
@click.option(
    "--no-prefix-reuse",
    is_flag=True,
    help="Compute the whole prompt, whatever the stages hold of it, and leave nothing there.",
)
@standby_option
@drafts_option
@click.option(
    "--draft-model",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Small GGUF model with the same vocabulary, which guesses on this machine where the text "
    "does not repeat itself.",
)
@audit_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@click.option("--timings", is_flag=True, help="Show where the time went.")
@shards_dir_option
@visit_options
def command(
    prompt: str,
    model: str | None,
    adapter: str,
    n_tokens_max: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repeat_penalty: float,
    seed: int | None,
    stop: tuple[str, ...],
    chat: bool,
    system: str | None,
    ignore_end: bool,
    via: tuple[str, ...],
    avoid: tuple[str, ...],
    explain: bool,
    wait_s: float,
    wire: WireType,
    no_prefix_reuse: bool,
    standby: bool,
    drafts: int | None,
    draft_model: Path | None,
    audit_rate: float,
    as_json: bool,
    timings: bool,
    visit: Visit,
) -> None:
    """Write the text that follows PROMPT; `-` reads it from standard input."""
    from shardmesh.coordinator.request import CompletionRequest
    from shardmesh.engine.base import SamplingSettings

    text = _read_standard_input() if prompt == "-" else prompt
    if system is not None and not chat:
        raise InputError("--system needs --chat", next_step="give --chat, too")
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": text})
    request = CompletionRequest(
        prompt=None if chat else text,
        messages=tuple(messages) if chat else (),
        model=model,
        adapter=adapter,
        n_tokens_max=n_tokens_max,
        stop=stop,
        ignore_end=ignore_end,
        via=_names(via),
        avoid=_names(avoid),
        wait_s=wait_s,
        wire=wire,
        n_drafts=drafts,
        draft_model=draft_model,
        reuse_prefix=not no_prefix_reuse,
        standby=standby,
        sampling=SamplingSettings(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repeat_penalty=repeat_penalty,
            seed=secrets.randbits(32) if seed is None else seed,
        ),
    )

    async def answer(client: Client) -> None:
        auditor = client.coordinator.auditor
        auditor.tell(lambda report: click.echo(f"audit: {report.sentence}", err=True))
        await _answer(client, request, as_json=as_json, show_timings=timings, show_choice=explain)
        await _wait_audit(auditor)

    visit.run(answer, audit_rate=audit_rate)


async def _wait_audit(auditor: Auditor) -> None:
    """Waits until an audit of the answer is over, if there is one."""
    await auditor.wait_idle()
    if auditor.n_skipped:
        click.echo("audit: no other replica that computes alike had room for it", err=True)


def _names(given: tuple[str, ...]) -> tuple[str, ...]:
    """Names that stand in one option with commas between them, or in several."""
    return tuple(name for each in given for name in each.split(",") if name)


def _read_standard_input() -> str:
    data = sys.stdin.buffer.read(PROMPT_BYTES_MAX + 1)
    if len(data) > PROMPT_BYTES_MAX:
        raise InputError(
            f"the prompt has more than {PROMPT_BYTES_MAX} bytes",
            code="PROMPT_TOO_LONG",
            next_step="shorten it",
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            "the prompt on standard input is not UTF-8 text",
            next_step="convert it, for instance with `iconv -f LATIN1 -t UTF-8`",
        ) from error


async def _answer(
    client: Client,
    request: CompletionRequest,
    *,
    as_json: bool,
    show_timings: bool,
    show_choice: bool,
) -> None:
    from shardmesh.coordinator.generate import Piece

    texts: list[str] = []
    is_line_open = False
    try:
        async with client.coordinator.complete(request) as completion:
            if show_choice:
                _print_choice(completion)
            async for item in completion.items:
                if isinstance(item, Piece):
                    texts.append(item.text)
                    if not as_json:
                        click.echo(item.text, nl=False)
                        is_line_open = True
                elif as_json:
                    click.echo(_as_json("".join(texts), request, completion, item))
                else:
                    click.echo()
                    is_line_open = False
                    if show_choice and request.standby:
                        _print_standbys(completion)
                    if show_timings:
                        _print_timings(
                            item, can_roll_back=completion.can_roll_back, wire=request.wire
                        )
    except (ShardmeshError, KeyboardInterrupt):
        if is_line_open:
            click.echo()  # what comes next shall not stick to the text
        raise


def _as_json(
    text: str, request: CompletionRequest, completion: Completion, finished: Finished
) -> str:
    import dataclasses
    import json

    return json.dumps(
        {
            "text": text,
            "finish_reason": finished.reason,
            "model": completion.chain.stages[0].model_name,
            "seed": request.sampling.seed,
            "chain": [stage.peer_id for stage in completion.chain.stages],
            "wire": request.wire,
            "standbys": {
                stage.peer_id: completion.standbys[number].peer_id
                for number, stage in enumerate(completion.chain.stages)
                if number in completion.standbys
            },
            "repairs": [dataclasses.asdict(repair) for repair in completion.repairs],
            "timings": dataclasses.asdict(finished.timings),
        },
        ensure_ascii=False,
    )


def _print_choice(completion: Completion) -> None:
    """On standard error, before the text."""
    from rich.console import Console
    from rich.table import Table

    from shardmesh.cli.status import short_peer_id

    explanation = completion.explanation
    if explanation is None:
        return
    console = Console(stderr=True)
    table = Table(
        title=f"a token is expected to take {explanation.token_us / 1e3:.2f} ms "
        "(milliseconds; * is the chain)",
        title_justify="left",
    )
    table.add_column("layers")
    table.add_column("node")
    for name in ("compute", "sessions", "compute and wait", "hop to it"):
        table.add_column(name, justify="right")
    for each in explanation.considered:
        replica = each.replica
        table.add_row(
            f"[{replica.layer_start}, {replica.layer_end})",
            f"{short_peer_id(replica.peer_id)} {'*' if each.is_chosen else ''}",
            f"{each.compute_us / 1e3:.2f}",
            str(each.n_sessions),
            f"{each.stage_us / 1e3:.2f}",
            f"{each.hop_us / 1e3:.2f}",
        )
    console.print(table)
    console.print(
        f"The prompt has {completion.n_prompt_tokens} tokens and goes in pieces of "
        f"{completion.session.piece_tokens}.",
        highlight=False,
    )
    if not completion.can_roll_back:
        console.print(
            "This architecture cannot be rolled back: prompts that begin alike are computed anew, "
            "and no token is guessed ahead."
        )


def _print_standbys(completion: Completion) -> None:
    """On standard error, behind the text: standbys are found while it is written."""
    from shardmesh.cli.status import short_peer_id

    for number, stage in enumerate(completion.chain.stages):
        standby = completion.standbys.get(number)
        who = f"{short_peer_id(standby.peer_id)} stands by" if standby else "nobody stands by"
        click.echo(f"layers [{stage.layer_start}, {stage.layer_end}): {who}", err=True)


def _reuse_note(timings: Timings, *, can_roll_back: bool) -> str:
    if not can_roll_back:
        return " (none can be reused with this architecture)"
    return f" ({timings.n_reused_tokens} of them reused)" if timings.n_reused_tokens else ""


def _wire_note(wire: WireType) -> str:
    return "" if wire == "f32" else f"; hidden states as {wire}, which is not exact"


def _drafts_note(timings: Timings, *, can_roll_back: bool) -> str:
    if not can_roll_back:
        return "no token can be guessed ahead with this architecture"
    if not timings.n_drafts:
        return "no token was guessed ahead"
    return (
        f"{count(timings.n_drafts, 'token')} guessed ahead, {timings.n_drafts_right} right; "
        "steps overlap, so the parts below are more than the whole"
    )


def _print_timings(finished: Finished, *, can_roll_back: bool, wire: WireType) -> None:
    """On standard error, so that standard output holds the text alone."""
    from rich.console import Console
    from rich.table import Table

    timings = finished.timings
    console = Console(stderr=True)
    rate = timings.decode_tokens_per_s
    reused = _reuse_note(timings, can_roll_back=can_roll_back)
    console.print(
        f"{count(timings.n_prompt_tokens, 'prompt token')}{reused}, first token after "
        f"{timings.first_token_s * 1e3:.0f} ms; {count(timings.n_tokens, 'token')}"
        + (f" at {rate:.1f} tokens/s" if rate is not None else "")
        + _wire_note(wire)
    )
    console.print(_drafts_note(timings, can_roll_back=can_roll_back))
    if timings.n_handed:
        console.print(
            f"{count(timings.n_handed, 'token')} went straight from the last stage to the first"
        )
    n_steps = max(1, timings.n_tokens - 1)
    table = Table(title="milliseconds of one token", title_justify="left")
    table.add_column("stage")
    for name in ("compute", "queue", "wire"):
        table.add_column(name, justify="right")
    table.add_row("to the first stage", "", "", f"{timings.first_hop_ms / n_steps:.2f}")
    for stage in timings.stages:
        values = (stage.compute_ms, stage.queue_ms, stage.wire_ms)
        table.add_row(
            f"layers [{stage.layer_start}, {stage.layer_end})",
            *(f"{value / n_steps:.2f}" for value in values),
        )
    console.print(table)
