"""`shardmesh bench`: the figures of a mesh on this machine."""

from __future__ import annotations

import importlib

import click

from shardmesh.errors import InputError


def _find_command() -> click.Command:
    """The benchmarks stand beside the package in a clone, and are not installed with it."""
    try:
        module = importlib.import_module("benchmarks.command")
    except ModuleNotFoundError as error:
        raise InputError(
            "the benchmarks are part of the source code, not of the installed package",
            code="NO_BENCHMARKS",
            next_step="run `make bench` in a clone of the repository",
        ) from error
    command: click.Command = module.command
    return command


command = _find_command()
