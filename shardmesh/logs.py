"""Logs on standard output: lines for people, or one JSON object per line for machines."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Final, Literal, TextIO

LogFormat = Literal["pretty", "json"]

_OUR_LOGGER: Final = "shardmesh"
_DIM, _YELLOW, _RED, _PLAIN = "\x1b[2m", "\x1b[33m", "\x1b[31m", "\x1b[0m"


def configure_logging(
    log_format: LogFormat = "pretty",
    *,
    verbosity: int = 0,
    stream: TextIO | None = None,
) -> None:
    """Sets up logging for this process.

    `verbosity` -1 shows warnings and errors, 0 the lines of a node, 1 details, 2 also what the
    libraries say.  Their words are for themselves below that: what matters, we report.
    """
    stream = stream or sys.stdout
    handler = _StandardHandler(stream)
    formatter: logging.Formatter
    formatter = JsonFormatter() if log_format == "json" else PrettyFormatter(stream.isatty())
    handler.setFormatter(formatter)
    shows_libraries = verbosity >= 2
    if not shows_libraries:
        handler.addFilter(_is_ours)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO if shows_libraries else logging.WARNING)
    our_level = logging.WARNING if verbosity < 0 else logging.DEBUG if verbosity else logging.INFO
    logging.getLogger(_OUR_LOGGER).setLevel(our_level)


class _StandardHandler(logging.StreamHandler[TextIO]):
    """Writes to what standard output or standard error is at the moment, if it is one of them.

    While something is drawn at the foot of a terminal, that is what keeps lines above it.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        names = {id(sys.stdout): "stdout", id(sys.stderr): "stderr"}
        self._name = names.get(id(stream))

    def emit(self, record: logging.LogRecord) -> None:
        if self._name is not None:
            self.stream = getattr(sys, self._name)
        super().emit(record)


class PrettyFormatter(logging.Formatter):
    """The message as it is; on a terminal with a dim time before it and colour for warnings."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        if not self._is_terminal:
            return text
        if record.levelno >= logging.WARNING:
            colour = _RED if record.levelno >= logging.ERROR else _YELLOW
            text = f"{colour}{text}{_PLAIN}"
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        return f"{_DIM}{time}{_PLAIN} {text}"


class JsonFormatter(logging.Formatter):
    """`ts` (UTC, ISO 8601), `level`, `logger`, `message`, and `exception` if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] == _OUR_LOGGER
