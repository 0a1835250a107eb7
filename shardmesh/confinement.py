"""What a process may have and use: no more than its work needs.

The data process and the helpers beside it run code that a model file or a template may get hold of,
so they get no secret, nothing to write their memory into, and no more of the machine than there is.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Mapping

from shardmesh.wire.limits import OPEN_FILES_MIN

_PR_SET_NO_NEW_PRIVS = 38  # linux/prctl.h


def without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables for a process that is told everything by other means: none of LLAMA_*.

    The secret of the cluster may be among them.
    """
    return {name: value for name, value in environment.items() if not name.startswith("LLAMA_")}


def allow_files() -> None:
    """Raises this process's limit of open files to what the limits of connections need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES_MIN if hard == resource.RLIM_INFINITY else min(OPEN_FILES_MIN, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        _limit(resource.RLIMIT_NOFILE, wanted, hard)


def confine(memory_bytes: int) -> None:
    """Bounds this process for good: no core file, no rights to gain, so much memory of its own.

    Memory beyond that is refused to the process instead of being taken from others.  Files that
    are only mapped, as weights are, do not count.  What the system cannot do is left out.
    """
    _limit(resource.RLIMIT_CORE, 0, 0)
    _limit(resource.RLIMIT_DATA, memory_bytes, memory_bytes)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def confine_time(n_seconds: int) -> None:
    """Has the system end this process once it has computed for so long."""
    _limit(resource.RLIMIT_CPU, n_seconds, n_seconds)


def _limit(kind: int, soft: int, hard: int) -> None:
    with contextlib.suppress(OSError, ValueError):  # a stricter one holds already
        resource.setrlimit(kind, (soft, hard))
