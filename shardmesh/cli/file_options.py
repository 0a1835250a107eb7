"""Options of the commands that give and fetch model files."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from shardmesh.cli.numbers import PORT, bytes_of
from shardmesh.cli.options import Command

if TYPE_CHECKING:
    from shardmesh.shards.model_link import ModelLink


class SizeType(click.ParamType):  # type: ignore[type-arg]
    """Bytes; K, M, G and T are powers of 1024."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        n_bytes = bytes_of(str(value))
        if n_bytes is None:
            self.fail(f"{str(value)[:50]!r} is no size; write it like 500M or 2G", param, ctx)
        return n_bytes


class LinkType(click.ParamType):  # type: ignore[type-arg]
    """A model link, as `shardmesh publish` prints it."""

    name = "link"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> ModelLink:
        from shardmesh.shards.model_link import parse_model_link

        return parse_model_link(str(value))


def models_dir_option(command: Command) -> Command:
    """--models-dir as `models_dir`: a Path that may not exist yet."""
    return click.option(
        "--models-dir",
        type=click.Path(file_okay=False, path_type=Path),
        default=Path("models_cache"),
        show_default=True,
        envvar="LLAMA_MODELS_DIR",
        help="Folder of further models, one folder each; they are given to others too.",
    )(command)


def torrent_options(command: Command) -> Command:
    """--torrent-port, --upload-rate, --download-rate and --max-disk as `torrents`.

    The command has --listen-addr too, since files are given on the same addresses.
    """

    @functools.wraps(command)
    def taking_part(
        *,
        listen_addr: tuple[str, ...],
        torrent_port: int,
        upload_rate: int,
        download_rate: int,
        max_disk_bytes: int,
        **others: Any,
    ) -> Any:
        from shardmesh.swarm.torrents.options import TorrentOptions

        torrents = TorrentOptions(
            listen_hosts=listen_addr,
            port=torrent_port,
            upload_rate_bytes_per_s=upload_rate,
            download_rate_bytes_per_s=download_rate,
            max_disk_bytes=max_disk_bytes,
        )
        return command(listen_addr=listen_addr, torrents=torrents, **others)

    for option in _TORRENT_OPTIONS:
        taking_part = option(taking_part)
    return taking_part  # type: ignore[return-value]


_TORRENT_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--max-disk",
        "max_disk_bytes",
        type=SizeType(),
        default=0,
        envvar="LLAMA_MAX_DISK",
        help="Bytes that all models of this node may take, as in 200G.  [default: no limit]",
    ),
    click.option(
        "--download-rate",
        type=SizeType(),
        default=0,
        envvar="LLAMA_DOWNLOAD_RATE",
        help="Bytes per second that are fetched at most, as in 10M.  [default: no limit]",
    ),
    click.option(
        "--upload-rate",
        type=SizeType(),
        default=0,
        envvar="LLAMA_UPLOAD_RATE",
        help="Bytes per second that are given at most, as in 10M.  [default: no limit]",
    ),
    click.option(
        "--torrent-port",
        type=PORT,
        default=0,
        envvar="LLAMA_TORRENT_PORT",
        help="TCP port that gives files to others.  [default: any]",
    ),
)


def is_given(name: str) -> bool:
    """Whether an option of the running command was given by flag, variable or file."""
    source = click.get_current_context().get_parameter_source(name)
    return source not in (None, ParameterSource.DEFAULT)


def bootstraps_of(link: ModelLink, bootstrap: tuple[str, ...]) -> tuple[str, ...]:
    """The bootstraps to use with a link: those that were given, and those of the link."""
    own = bootstrap if is_given("bootstrap") or not link.bootstraps else ()
    by_place = {address.partition("/p2p/")[0]: address for address in own}
    return tuple({**by_place, **{a.partition("/p2p/")[0]: a for a in link.bootstraps}}.values())
