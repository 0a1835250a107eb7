"""The `shardmesh` command: a group that imports a subcommand only when it is used."""

from __future__ import annotations

import importlib
import io
import os
import sys
from typing import NoReturn

import click

from shardmesh import __version__
from shardmesh.cli.endings import Endings
from shardmesh.cli.failures import (
    explain,
    is_bad_input,
    of_command_line,
    of_machine,
    require_folder,
    require_text,
)
from shardmesh.errors import ShardmeshError, known_error

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2

COMMANDS: dict[str, str] = {
    "demo": "Run a whole mesh on this machine and let it write a fairy tale.",
    "split": "Cut a GGUF model into shard files.",
    "verify": "Prove that a model computes the same bits cut as whole.",
    "publish": "Sign a split model, give it to others, print its link.",
    "pull": "Fetch a published model without serving it.",
    "seed": "Give all model files of this machine to others.",
    "ls": "Show the models on this machine.",
    "rm": "Remove a model from this machine.",
    "bootstrap": "Run the entry point of a mesh.",
    "listen": "Serve one shard.",
    "web": "Run the gateway: an OpenAI-compatible API over a mesh.",
    "run": "Answer a prompt with a running mesh.",
    "status": "Show shards, replicas and what is missing.",
    "drain": "End a listener once its sessions are over.",
    "command": "Send one JSON command to a node.",
    "cluster": "Show the members of a mesh, and remove some.",
    "bench": "Measure a mesh on this machine against llama.cpp.",
}
"""Subcommand -> its line in --help; the code is `command` in shardmesh.cli.<subcommand>."""


class LazyGroup(click.Group):
    """Lists all subcommands without importing any: --help stays under 0.3 s."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"shardmesh.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="shardmesh")
def group() -> None:
    """One large language model on several ordinary machines."""


def is_interruption(error: BaseException) -> bool:
    """Whether it is Ctrl-C, or a group that holds one: the rest came of cleaning up after it."""
    if isinstance(error, BaseExceptionGroup):
        return any(is_interruption(e) for e in error.exceptions)
    return isinstance(error, KeyboardInterrupt)


def is_unread(error: BaseException) -> bool:
    """Whether the reader of our output has gone, as `head` does; other pipes are our own affair."""
    if isinstance(error, BaseExceptionGroup):
        return all(is_unread(e) for e in error.exceptions)
    return isinstance(error, BrokenPipeError | SystemExit)  # rich turns the one into the other


def main() -> NoReturn:
    """Runs the command line; exit codes 0, 1 failed, 2 bad input, 128 + a signal that ended it."""
    endings = Endings()
    endings.heed()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where it was closed
            stream.reconfigure(errors="replace")  # a terminal that has no ✓ shows something else
    try:
        require_folder()
        require_text(sys.argv[1:], os.environ.items())
        status = group.main(prog_name="shardmesh", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(EXIT_BAD_INPUT)
    except click.ClickException as error:
        _fail(of_command_line(error))
    except (click.Abort, KeyboardInterrupt):
        sys.exit(endings.exit_code)
    except (ShardmeshError, OSError, BaseExceptionGroup) as error:
        if is_interruption(error):
            sys.exit(endings.exit_code)
        if is_unread(error):
            _give_up_output()
            sys.exit(EXIT_FAILED)
        known = known_error(error) or of_machine(error)
        if known is None:
            raise
        _fail(known)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(error: ShardmeshError) -> NoReturn:
    click.echo(explain(error), err=True)
    _give_up_output()
    sys.exit(EXIT_BAD_INPUT if is_bad_input(error) else EXIT_FAILED)


def _give_up_output() -> None:
    """Where standard output cannot be written, Python would complain once more when it ends."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
