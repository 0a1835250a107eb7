"""llama.cpp's own log lines, as debug lines of Python's logging instead of on standard error."""

from __future__ import annotations

import ctypes
import logging
from typing import Any

from llama_cpp import llama_cpp as api

_logger = logging.getLogger("shardmesh.llama_cpp")


def _on_line(level: int, text: bytes, user_data: ctypes.c_void_p | None) -> None:
    # llama.cpp logs sizes, names and timings; prompts and tokens do not appear in these lines.
    _logger.debug("%s", text.decode("utf-8", "replace").rstrip())


# llama.cpp keeps only the address: the object must live as long as the process.
_callback: Any = api.llama_log_callback(_on_line)


def route_log() -> None:
    """Sends what llama.cpp logs from now on to the logger `shardmesh.llama_cpp`."""
    api.llama_log_set(_callback, ctypes.c_void_p(0))
