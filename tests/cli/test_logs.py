from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from shardmesh.logs import LogFormat, configure_logging


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("shardmesh")
    before = root.handlers, root.level, ours.level
    yield
    root.handlers, _, _ = before
    root.setLevel(before[1])
    ours.setLevel(before[2])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def written(
    log_format: LogFormat = "pretty", verbosity: int = 0, stream: io.StringIO | None = None
) -> list[str]:
    stream = stream or io.StringIO()
    configure_logging(log_format, verbosity=verbosity, stream=stream)
    ours, theirs = logging.getLogger("shardmesh.test"), logging.getLogger("some_library")
    ours.debug("detail")
    ours.info("[DHT] ✓ line of %s", "a node")
    theirs.warning("noise")
    ours.warning("warning")
    return stream.getvalue().splitlines()


@pytest.mark.parametrize(
    ("verbosity", "lines"),
    [
        (-1, ["warning"]),
        (0, ["[DHT] ✓ line of a node", "warning"]),
        (1, ["detail", "[DHT] ✓ line of a node", "warning"]),
        (2, ["detail", "[DHT] ✓ line of a node", "noise", "warning"]),
    ],
)
def test_piped_lines_are_plain(verbosity: int, lines: list[str]) -> None:
    assert written(verbosity=verbosity) == lines


def test_terminal_shows_the_time() -> None:
    first = written(stream=Terminal())[0]
    assert first.startswith("\x1b[2m")
    assert first.endswith("[DHT] ✓ line of a node")


def test_json_has_one_object_per_line() -> None:
    first = json.loads(written("json")[0])
    assert (first["level"], first["logger"]) == ("info", "shardmesh.test")
    assert first["message"] == "[DHT] ✓ line of a node"
    assert first["ts"].endswith("+00:00")
