"""Memory in pages of 2 MB instead of 4 KB, where the system has them.

A token reads all weights and all of its KV once.  With small pages the processor looks up a
thousand places for 4 MB, and fetches ahead no further than to the end of each page.  So a process
that is to compute is started with a setting of glibc that asks for large pages for all larger
pieces of memory (`environment_for`).  KV lies in such memory anyway.  Weights do not: they are a
mapped file, so they are copied where there is plenty of memory (`is_room_for_copy`).  Copied
weights cannot be dropped and read again when memory becomes scarce, and processes that serve the
same file do not share them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

COPY_SHARE_OF_MEMORY: Final = 0.25
"""Part of the free memory that a copy of the weights may take: KV and others need some as well."""

_VARIABLE: Final = "GLIBC_TUNABLES"
_NAME: Final = "glibc.malloc.hugetlb"  # glibc 2.35; unknown to others, which ignore it
_SETTING: Final = f"{_NAME}=1"
_OF_SYSTEM: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def environment_for(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables for a process that is to have large pages; what a user has set stays.  Pure."""
    set_before = environment.get(_VARIABLE, "")
    if _NAME in set_before:
        return dict(environment)
    settings = f"{set_before}:{_SETTING}" if set_before else _SETTING
    return {**environment, _VARIABLE: settings}


def has_large_pages() -> bool:
    """Whether this process was started with the setting, on a system that follows it."""
    return _SETTING in os.environ.get(_VARIABLE, "") and _are_given()


def is_room_for_copy(n_bytes: int, n_bytes_free: int) -> bool:
    """Whether weights of this size may be copied.  Pure."""
    return n_bytes <= COPY_SHARE_OF_MEMORY * n_bytes_free


def _are_given() -> bool:
    """Whether the system has large pages for those who ask."""
    if sys.platform != "linux":
        return False
    try:
        return "[never]" not in _OF_SYSTEM.read_text("ascii")
    except OSError:
        return False
