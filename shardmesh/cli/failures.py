"""What a person is told when a command fails: a code, a sentence and the next step."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path

import click

from shardmesh.errors import InputError, ShardmeshError, StorageError, TheirError

_OF_THE_MACHINE = frozenset(
    {
        errno.EACCES,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ENOSPC,
        errno.EPERM,
        errno.EROFS,
    }
)
"""What the system refuses for reasons of its own; any other number is a defect of ours."""

_SETTINGS = re.compile("(LLAMA|NODE)_")


def explain(error: ShardmeshError) -> str:
    """One sentence and the next step, for a person."""
    step = f"\n  next step: {error.next_step}" if error.next_step else ""
    return f"Error [{error.code}]: {error}{step}"


def is_bad_input(error: ShardmeshError) -> bool:
    """Whether the person has to change something; a node's word of it is the base class."""
    return isinstance(error, InputError) or type(error) is TheirError


def of_command_line(error: click.ClickException) -> InputError:
    """A flag or argument that click did not take, as one of our errors."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "shardmesh"
    return InputError(
        error.format_message().rstrip("."), next_step=f"`{path} --help` shows what can be given"
    )


def of_machine(error: BaseException) -> StorageError | None:
    """What the system refused, out of whatever groups it is in; None if it is something else.

    A file that has no name is our output: the person sent it to a disk that is full.
    """
    if isinstance(error, BaseExceptionGroup):
        found = [of_machine(e) for e in error.exceptions]
        return found[0] if found and all(found) else None
    if not isinstance(error, OSError) or error.errno not in _OF_THE_MACHINE:
        return None
    return StorageError(
        f"{error.filename or 'the output'}: {os.strerror(error.errno)}",
        next_step="look at the disk, the permissions and the limits (ulimit) of this machine",
    )


def require_folder() -> None:
    """Raises InputError (theirs) where the current folder has been removed."""
    try:
        Path.cwd()
    except OSError as error:
        raise InputError(
            "the current folder cannot be used: it was removed, or is closed to you",
            next_step="cd to another one",
        ) from error


def require_text(arguments: Iterable[str], environment: Iterable[tuple[str, str]]) -> None:
    """Raises InputError (theirs) for an argument, or a variable of ours, that is not UTF-8."""
    given = [("an argument", word) for word in arguments]
    given += [(name, value) for name, value in environment if _SETTINGS.match(name)]
    for what, word in given:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{what} is not UTF-8 text: {word!a:.100}",
                next_step="write it in UTF-8; give a file with an odd name another one",
            ) from error
