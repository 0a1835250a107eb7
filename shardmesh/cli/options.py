"""Options that several commands share.

A flag is stronger than its LLAMA_* variable, which is stronger than the file of `config_file`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO, TypeVar

import click
import platformdirs

from shardmesh.cli.numbers import FiniteRange
from shardmesh.errors import InputError
from shardmesh.wire.defaults import DEFAULT_BOOTSTRAP

if TYPE_CHECKING:
    from shardmesh.swarm.node_identity import Naming

Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULT_CLUSTER: Final = "llama-cluster"
CLUSTER_LETTERS_MAX: Final = 128
"""As many as an announcement has room for."""

NODE_ID_LETTERS_MAX: Final = 64


class AddressType(click.types.StringParamType):
    """A multiaddress; several in one variable are divided by commas or spaces."""

    name = "multiaddr"

    def split_envvar_value(self, rv: str) -> list[str]:
        return [address for address in re.split(r"[,\s]+", rv) if address]


class WordsType(click.types.StringParamType):
    """A word; several in one variable are divided by commas."""

    name = "word"

    def split_envvar_value(self, rv: str) -> list[str]:
        return [word for part in rv.split(",") if (word := part.strip())]


def log_options(command: Command) -> Command:
    """--log-format, -v, -q as `log_format`, `verbose`, `quiet`; see `start_logging`."""
    for option in (
        click.option("-q", "--quiet", is_flag=True, help="Show warnings and errors only."),
        click.option("-v", "--verbose", count=True, help="Show more; twice: libraries too."),
        click.option(
            "--log-format",
            type=click.Choice(["pretty", "json"]),
            default="pretty",
            show_default=True,
            envvar="LLAMA_LOG_FORMAT",
            help="Lines for people, or one JSON object per line.",
        ),
    ):
        command = option(command)
    return command


def start_logging(log_format: str, verbose: int, quiet: bool, stream: TextIO | None = None) -> None:
    """Sets up logging as the options of `log_options` say; to standard output by default."""
    from shardmesh.logs import configure_logging

    configure_logging(
        "json" if log_format == "json" else "pretty",
        verbosity=-1 if quiet else verbose,
        stream=stream,
    )


def bootstrap_option(command: Command) -> Command:
    """--bootstrap, several times, as `bootstrap`: a tuple of multiaddresses."""
    return click.option(
        "--bootstrap",
        type=AddressType(),
        multiple=True,
        default=(DEFAULT_BOOTSTRAP,),
        show_default=True,
        envvar="LLAMA_BOOTSTRAP",
        help="Multiaddress of a bootstrap node; may be given several times. Without it, the LAN is "
        "searched too.",
    )(command)


def cluster_option(command: Command) -> Command:
    """--cluster as `cluster`."""
    return click.option(
        "--cluster",
        callback=_checked_cluster,
        default=DEFAULT_CLUSTER,
        show_default=True,
        envvar="LLAMA_CLUSTER",
        help="Name of the mesh; nodes of other names are not seen.",
    )(command)


def _checked_cluster(_context: click.Context, _option: click.Parameter, name: str) -> str:
    """The name of a mesh; raises InputError (theirs) for one that others could not read."""
    if not 1 <= len(name) <= CLUSTER_LETTERS_MAX or not name.isprintable() or name != name.strip():
        raise InputError(
            f"the name of a cluster has 1 to {CLUSTER_LETTERS_MAX} printable characters, no blanks "
            "around",
            next_step=f"give another one with --cluster, or none for {DEFAULT_CLUSTER}",
        )
    return name


def state_dir_option(command: Command) -> Command:
    """--state-dir as `state_dir`: a Path that may not exist yet."""
    return click.option(
        "--state-dir",
        type=click.Path(file_okay=False, path_type=Path),
        default=lambda: Path(platformdirs.user_data_dir("shardmesh")),
        show_default="the user's data folder",
        envvar="LLAMA_STATE_DIR",
        help="Where identity and known nodes are kept.",
    )(command)


def naming_options(command: Command) -> Command:
    """--name, --location, --tag as `node_name`, `node_location`, `node_tags`; see `naming`."""
    for option in (
        click.option(
            "--tag",
            "node_tags",
            type=WordsType(),
            multiple=True,
            envvar="NODE_TAGS",
            help="Word about this node, for people and tools; may be given several times.",
        ),
        click.option(
            "--location", "node_location", default="", envvar="NODE_LOCATION", help="Where it is."
        ),
        click.option(
            "--name",
            "node_name",
            default="",
            envvar="NODE_NAME",
            help="What this node is called.  [default: the machine's name and a few letters]",
        ),
    ):
        command = option(command)
    return command


def naming(node_name: str, node_location: str, node_tags: tuple[str, ...]) -> Naming:
    """The options of `naming_options`, and NODE_ID of a node that an older program ran."""
    from shardmesh.swarm.node_identity import Naming

    return Naming(
        name=node_name,
        location=node_location,
        tags=tuple(node_tags),
        old_id=os.environ.get("NODE_ID", "").strip()[:NODE_ID_LETTERS_MAX],
    )


def listen_addr_option(command: Command) -> Command:
    """--listen-addr, several times, as `listen_addr`: a tuple of IP addresses."""
    return click.option(
        "--listen-addr",
        type=AddressType(),
        multiple=True,
        default=_default_hosts,
        show_default="0.0.0.0, and :: where there is IPv6",
        envvar="LLAMA_LISTEN_ADDR",
        help="IP address to listen on; may be given several times.",
    )(command)


def _default_hosts() -> tuple[str, ...]:
    from shardmesh.swarm.addresses import default_hosts

    return default_hosts()


def wire_option(command: Command) -> Command:
    """--wire as `wire`: "f32" or "f16"."""
    return click.option(
        "--wire",
        type=click.Choice(["f32", "f16"]),
        default="f32",
        show_default=True,
        envvar="LLAMA_WIRE",
        help="How hidden states travel between nodes: exact, or half the bytes and not exact.",
    )(command)


def shards_dir_option(command: Command) -> Command:
    """--shards-dir as `shards_dir`: a Path that may not exist yet."""
    return click.option(
        "--shards-dir",
        type=click.Path(file_okay=False, path_type=Path),
        default=Path("models_cache/shards"),
        show_default=True,
        envvar="LLAMA_SHARDS_DIR",
        help="Folder with shard files, tokenizer.gguf and manifest.json.",
    )(command)


def count(number: int, noun: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def cache_dir() -> Path:
    """Where tokenizers that were fetched from the mesh are kept."""
    return Path(platformdirs.user_cache_dir("shardmesh"))


def _parse_drafts(context: click.Context, parameter: click.Parameter, text: str) -> int | None:
    from shardmesh.coordinator.drafts import parse_drafts

    return parse_drafts(text)


drafts_option = click.option(
    "--drafts",
    metavar="auto|off|N",
    default="auto",
    show_default=True,
    envvar="LLAMA_DRAFTS",
    callback=_parse_drafts,
    help="Tokens to guess ahead where the text repeats itself: as many as pay, none, or at most N.",
)


def _parse_piece_tokens(
    context: click.Context, parameter: click.Parameter, text: str
) -> int | None:
    from shardmesh.shards.piece_tokens import parse_piece_tokens

    return parse_piece_tokens(text)


piece_tokens_option = click.option(
    "--piece-tokens",
    metavar="auto|N",
    default="auto",
    show_default=True,
    callback=_parse_piece_tokens,
    help="Tokens of a prompt that are computed at once, a power of two from 16 to 512; auto: 64 "
    "with up to two shards, 32 with more.",
)

standby_option = click.option(
    "--standby",
    is_flag=True,
    envvar="LLAMA_STANDBY",
    help="Have other replicas keep copies of the KV, so that one of them can take over a long text "
    "without computing it again; takes their memory and some of the network.",
)

audit_option = click.option(
    "--audit",
    "audit_rate",
    type=FiniteRange(0, 1),
    default=0.0,
    show_default="none",
    envvar="LLAMA_AUDIT",
    help="Share of answers that another replica computes again, to find nodes that compute "
    "something else.",
)
