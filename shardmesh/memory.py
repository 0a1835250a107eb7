"""How much memory there is for this process: the machine's, or what its container may have.

A container has a control group (cgroup) with a limit, beyond which the system ends its processes,
however much the machine has.  Groups lie in each other, and each may have a limit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil

GROUPS: Final = Path("/sys/fs/cgroup")
OWN_GROUPS: Final = Path("/proc/self/cgroup")
GROUP_FILE_BYTES_MAX: Final = 64 * 1024


@dataclasses.dataclass(frozen=True)
class _Files:
    """Where a version of control groups has its figures."""

    limit: str
    used: str
    cached: str  # in memory.stat: the part of what is used that the system can drop


_VERSION_1: Final = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2: Final = _Files("memory.max", "memory.current", "inactive_file")


def memory_bytes() -> int:
    """What this process and those beside it may have together."""
    limits = [limit for limit, _ in _limits(GROUPS, OWN_GROUPS)]
    return min([int(psutil.virtual_memory().total), *limits])


def memory_free_bytes() -> int:
    """What can be taken now without swapping, or passing a limit."""
    rooms = [max(0, limit - used) for limit, used in _limits(GROUPS, OWN_GROUPS)]
    return min([int(psutil.virtual_memory().available), *rooms])


def _limits(groups: Path, own_groups: Path) -> Iterator[tuple[int, int]]:
    """The limit of each group that this process is in, and what is used of it for good."""
    for folder, files in _folders(groups, own_groups):
        limit, used = _number(_read(folder / files.limit)), _number(_read(folder / files.used))
        if limit is None or used is None:  # mostly there is none: "max"
            continue
        lines = _read(folder / "memory.stat").splitlines()
        statistics = dict(line.partition(" ")[::2] for line in lines)
        yield limit, max(0, used - (_number(statistics.get(files.cached, "")) or 0))


def _folders(groups: Path, own_groups: Path) -> Iterator[tuple[Path, _Files]]:
    """Of the groups of this process, from its own to the outermost.

    Inside of a container the names may be those outside of it: then only the outermost is there.
    """
    for line in _read(own_groups).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers not in ("", "memory"):
            continue
        root = groups / controllers
        own = root / path.strip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(root) and ".." not in folder.parts:
                yield folder, _VERSION_1 if controllers else _VERSION_2


def _read(path: Path) -> str:
    """The beginning of a file; nothing if it is not there."""
    try:
        with path.open(encoding="ascii", errors="replace") as file:
            return file.read(GROUP_FILE_BYTES_MAX)
    except OSError:
        return ""


def _number(text: str) -> int | None:
    return int(text) if text.strip().isdecimal() else None
