"""The TOML file behind the options of all commands.

A flag is stronger than its LLAMA_* variable, which is stronger than the file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from shardmesh.cli.options import Command

DEFAULT_CONFIG: Final = "shardmesh.toml"
SHARED_KEYS: Final = frozenset(
    {"cluster", "bootstrap", "state_dir", "log_format", "secret_file", "public"}
)
"""Keys that may stand at the top of the file; all others stand in the table of their command."""

CONFIG_BYTES_MAX: Final = 1024 * 1024


def config_option(command: Command) -> Command:
    """--config: defaults from a TOML file; without it from ./shardmesh.toml if there is one."""
    return click.option(
        "--config",
        type=click.Path(dir_okay=False, path_type=Path),
        envvar="LLAMA_CONFIG",
        is_eager=True,
        expose_value=False,
        callback=_load_config,
        help=f"TOML file with defaults.  [default: {DEFAULT_CONFIG} if it exists]",
    )(command)


def _load_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    if path is None:
        path = Path(DEFAULT_CONFIG)
        if not path.exists():
            return
    try:
        with path.open("rb") as file:
            values = tomllib.loads(file.read(CONFIG_BYTES_MAX).decode())
    except OSError as error:
        raise click.BadParameter(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise click.BadParameter(f"{path} is not valid TOML: {error}") from error
    defaults = read_config(values, ctx.info_name or "", _keys(ctx.command.params), str(path))
    for option in ctx.command.params:
        if option.name in defaults:
            defaults[option.name] = _value(option, defaults[option.name], path)
    ctx.default_map = defaults


def _keys(options: Sequence[click.Parameter]) -> dict[str, str]:
    """What may stand in the file -> the option's name: that name itself, or the flag's."""
    keys = {
        flag.removeprefix("--").replace("-", "_"): option.name
        for option in options
        for flag in option.opts
        if option.name and flag.startswith("--")
    }
    return keys | {option.name: option.name for option in options if option.name}


def _value(option: click.Parameter, value: Any, path: Path) -> Any:
    """A value of the file as the option takes it: one word is a list of one where several fit."""
    if not option.multiple:
        if isinstance(value, list | dict):
            raise click.BadParameter(f"{path}: {option.name!r} takes one value")
        return value
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str) for each in values):
        raise click.BadParameter(f"{path}: {option.name!r} takes a text or a list of texts")
    return tuple(values)


def read_config(
    values: dict[str, Any], command: str, keys: Mapping[str, str], file_name: str
) -> dict[str, Any]:
    """The defaults for one command out of a file for all; click's BadParameter names the key."""
    from shardmesh.cli.main import COMMANDS

    defaults: dict[str, Any] = {}
    tables: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if key == "node" and isinstance(value, dict):
            defaults |= _node_defaults(value, file_name)
        elif isinstance(value, dict) and key in COMMANDS:
            tables[key] = value
        elif name in SHARED_KEYS:
            defaults[name] = value
        else:
            raise click.BadParameter(f"{file_name}: unknown key {key!r}")
    for key, value in tables.get(command, {}).items():
        own = keys.get(key.replace("-", "_"))
        if own is None:
            raise click.BadParameter(f"{file_name}: unknown key {key!r} in [{command}]")
        defaults[own] = value
    return {name: value for name, value in defaults.items() if name in keys.values()}


def _node_defaults(table: dict[str, Any], file_name: str) -> dict[str, Any]:
    """What [node.identity] says, by the names of `naming_options`."""
    identity = table.get("identity", {})
    if set(table) - {"identity"} or not isinstance(identity, dict):
        raise click.BadParameter(f"{file_name}: [node] has the table [node.identity] only")
    for key in identity:
        if key not in ("name", "location", "tags"):
            raise click.BadParameter(f"{file_name}: unknown key {key!r} in [node.identity]")
    return {f"node_{key}": value for key, value in identity.items()}
