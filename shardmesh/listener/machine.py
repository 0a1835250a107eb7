"""What this machine has, as far as announcements tell of it."""

from __future__ import annotations

import dataclasses
import os

import psutil

from shardmesh.engine.hardware import gpu_available
from shardmesh.memory import memory_bytes, memory_free_bytes
from shardmesh.wire.limits import MIB


@dataclasses.dataclass(frozen=True)
class Machine:
    """Fixed properties of the machine."""

    memory_mb: int
    cpu_cores: int
    gpu_available: bool

    def memory_available_mb(self) -> int:
        """Memory that could be taken now."""
        return memory_free_bytes() // MIB


def read_machine() -> Machine:
    """This machine; cores are those that the process may use."""
    return Machine(
        memory_mb=memory_bytes() // MIB,
        cpu_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else _n_cores(),
        gpu_available=gpu_available(),
    )


def _n_cores() -> int:
    return psutil.cpu_count() or 1
