"""How downloads are told of: bars on a terminal, lines in a log."""

from __future__ import annotations

import dataclasses
import io
import logging
import sys
from functools import partial
from pathlib import Path

import pytest
import trio
from rich.console import Console
from support.torrents import MB, FileMesh, make_model

from shardmesh.cli.downloads import show_downloads, to_draw, watcher
from shardmesh.logs import configure_logging
from shardmesh.swarm.torrents.progress import (
    PROGRESS_LOGGER,
    RATE_WINDOW_S,
    DownloadProgress,
    RateMeter,
    readable_progress,
    readable_size,
)

PROGRESS = DownloadProgress(
    model_name="tale",
    file_name="shard-1.gguf",
    state="downloading",
    n_bytes_done=50 * MB,
    n_bytes_total=200 * MB,
    rate_bytes_per_s=2 * MB,
    eta_s=75.4,
    n_sources=3,
)


class Terminal(io.StringIO):
    """Takes what is written, and says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def logging_as_before():  # type: ignore[no-untyped-def]
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers = handlers
    root.setLevel(level)
    logging.getLogger(PROGRESS_LOGGER).setLevel(logging.NOTSET)
    logging.getLogger("shardmesh").setLevel(logging.NOTSET)


# -- words -----------------------------------------------------------------------------------------


def test_a_line_of_the_log() -> None:
    assert readable_progress(PROGRESS) == (
        "shard-1.gguf 25% of 200.0 MB, 2.0 MB/s, 1:15 left, 3 sources"
    )
    stuck = dataclasses.replace(PROGRESS, rate_bytes_per_s=0, eta_s=None, n_sources=1)
    assert readable_progress(stuck) == "shard-1.gguf 25% of 200.0 MB, 0.0 kB/s, 1 source"
    long = dataclasses.replace(PROGRESS, eta_s=3 * 3600 + 62.0)
    assert "3:01:02 left" in readable_progress(long)
    looking = dataclasses.replace(PROGRESS, state="looking")
    assert readable_progress(looking).endswith("200.0 MB, looking for a node that has it")


@pytest.mark.parametrize(
    ("n_bytes", "expected"),
    [(0, "0.0 kB"), (999_900, "999.9 kB"), (10**6, "1.0 MB"), (42 * 10**9, "42.0 GB")],
)
def test_a_size(n_bytes: int, expected: str) -> None:
    assert readable_size(n_bytes) == expected


def test_the_rate_is_that_of_the_last_seconds() -> None:
    meter = RateMeter()
    assert meter.note(100.0, 500) == 0
    for step in range(1, 20):  # half a second each, 1000 bytes a second
        assert meter.note(100 + step / 2, 500 + 500 * step) == 1000
    n_bytes = 500 + 500 * 19
    rates = [meter.note(109.5 + step / 2, n_bytes) for step in range(1, 12)]
    assert rates == sorted(rates, reverse=True)
    assert rates[int(RATE_WINDOW_S * 2)] == 0  # it does not move any more


def test_which_downloads_are_drawn() -> None:
    done = dataclasses.replace(PROGRESS, file_name="shard-0.gguf", state="done")
    assert to_draw([done, PROGRESS], set()) == [done, PROGRESS]
    assert to_draw([done, PROGRESS], {("tale", "shard-0.gguf")}) == [PROGRESS]
    again = dataclasses.replace(done, state="looking")
    assert to_draw([again], {("tale", "shard-0.gguf")}) == [again]


# -- where ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "draws", "expected"),
    [
        (Terminal(), True, logging.WARNING),
        (Terminal(), False, logging.NOTSET),
        (io.StringIO(), True, logging.NOTSET),
    ],
)
def test_the_log_is_quiet_where_bars_are_drawn(
    stream: io.StringIO, draws: bool, expected: int
) -> None:
    watcher(stream, stays=True, draws=draws)
    assert logging.getLogger(PROGRESS_LOGGER).level == expected


def test_the_log_follows_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """As while bars are drawn, which takes its place."""
    before, meanwhile = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", before)
    configure_logging()
    logger = logging.getLogger("shardmesh")
    logger.info("first")
    monkeypatch.setattr(sys, "stdout", meanwhile)
    logger.info("second")
    monkeypatch.setattr(sys, "stdout", before)
    logger.info("third")
    assert (before.getvalue(), meanwhile.getvalue()) == ("first\nthird\n", "second\n")


@pytest.mark.processes
async def test_a_download_is_drawn(tmp_path: Path) -> None:
    model = make_model(tmp_path / "a", 6 * MB)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    mesh = FileMesh(tmp_path)
    async with mesh.node("a", upload_rate_bytes_per_s=3 * MB), mesh.node("b") as node:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(show_downloads, node.files, console, stays=True))
            with trio.fail_after(60):
                await node.files.fetch(model, model.publication.shard(0), node.folder)
                while "done" not in screen.getvalue():  # noqa: ASYNC110 - a screen tells nobody
                    await trio.sleep(0.02)
            nursery.cancel_scope.cancel()
    drawn = screen.getvalue()
    for piece in ("shard-0.gguf", "6.0 MB, ", "MB/s", "1 source", "100%"):
        assert piece in drawn
