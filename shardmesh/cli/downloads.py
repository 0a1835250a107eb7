"""Downloads on a terminal: a bar for each while there are any.  Elsewhere lines of the log tell."""

from __future__ import annotations

import logging
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from shardmesh.swarm.torrents.progress import DownloadProgress
    from shardmesh.swarm.torrents.service import FileService

REFRESH_INTERVAL_S = 0.25

Key = tuple[str, str]


def watcher(
    stream: TextIO, *, stays: bool, draws: bool = True
) -> Callable[[FileService], Awaitable[None]]:
    """What tells of the downloads of a file service on `stream`, which the log uses too.

    On a terminal it `draws`, and the log does not tell how far they are.  The last picture
    `stays`, or is wiped away where the log tells of the end.
    """
    if not draws or not stream.isatty():
        return _nothing
    from shardmesh.swarm.torrents.progress import PROGRESS_LOGGER

    logging.getLogger(PROGRESS_LOGGER).setLevel(logging.WARNING)

    async def show(files: FileService) -> None:
        from rich.console import Console

        await show_downloads(files, Console(file=stream), stays=stays)

    return show


async def _nothing(files: FileService) -> None:
    import trio

    await trio.lowlevel.checkpoint()


async def show_downloads(files: FileService, console: Console, *, stays: bool) -> None:
    """Draws all downloads, whenever there are some, until cancelled."""
    import trio

    over: set[Key] = set()
    while True:
        if to_draw(files.downloads(), over):
            over |= await _show_until_over(files, console, over, stays=stays)
        await trio.sleep(REFRESH_INTERVAL_S)


def to_draw(downloads: list[DownloadProgress], over: set[Key]) -> list[DownloadProgress]:
    """Those under way, and those that have ended since they were last drawn as over."""
    return [d for d in downloads if is_under_way(d) or _key(d) not in over]


def is_under_way(download: DownloadProgress) -> bool:
    return download.state not in ("done", "failed")


def _key(download: DownloadProgress) -> Key:
    return download.model_name, download.file_name


async def _show_until_over(
    files: FileService, console: Console, over: set[Key], *, stays: bool
) -> set[Key]:
    """Draws until no download is under way; which ones were drawn."""
    import trio

    bars: dict[Key, TaskID] = {}
    with _progress(console, stays=stays) as progress:
        try:
            while any(is_under_way(download) for download in files.downloads()):
                _draw(progress, bars, to_draw(files.downloads(), over - bars.keys()))
                await trio.sleep(REFRESH_INTERVAL_S)
        finally:
            _draw(progress, bars, to_draw(files.downloads(), over - bars.keys()))
    return set(bars)


def _progress(console: Console, *, stays: bool) -> Progress:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    is_standard_output = console.file is sys.stdout
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TextColumn("{task.fields[told]}", markup=False),
        console=console,
        auto_refresh=False,
        transient=not stays,
        expand=True,
        # The log goes there too, above the bars.
        redirect_stdout=is_standard_output,
        redirect_stderr=not is_standard_output,
    )


def _draw(progress: Progress, bars: dict[Key, TaskID], downloads: list[DownloadProgress]) -> None:
    from shardmesh.swarm.torrents.progress import readable_rest, readable_size

    for download in downloads:
        key = _key(download)
        if key not in bars:
            bars[key] = progress.add_task(download.file_name, total=None, told="")
        progress.update(
            bars[key],
            total=download.n_bytes_total,
            completed=download.n_bytes_done,
            told=f"{readable_size(download.n_bytes_total)}, {readable_rest(download)}",
        )
    progress.refresh()
