"""The compiled kernels (matmul.c and what it calls), loaded before llama.cpp.

They take the place of a function of ggml, so llama.cpp must find them first (`preload`, when this
package is imported, by small processes as well: so there is no numpy here).  That is done only on
Linux with glibc on x86, on a CPU with the instructions that they were built for, and with a ggml
whose function is known.  `kernels.py` says when they compute.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import sys
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any, Final

INSTRUCTION_SETS: Final = (
    ("avx512", ("avx2", "fma", "f16c", "avx512bw", "avx512vl", "avx512_vnni")),
    ("avxvnni", ("avx2", "fma", "f16c", "avx_vnni")),
    ("avx2", ("avx2", "fma", "f16c")),
)
"""What the C files are built for, the best first: its name, and the flags of a CPU that has it."""

GGML_VERSIONS: Final = ("0.25",)
"""Those whose `llamafile_sgemm` was read and takes what matmul.c takes: in front of that of
another one it could do harm."""


def choose_instruction_set(cpu_flags: Collection[str]) -> str | None:
    """The best that a CPU with these flags has; None if there is none.  Pure."""
    for name, needed in INSTRUCTION_SETS:
        if all(flag in cpu_flags for flag in needed):
            return name
    return None


@cache
def preload() -> Any | None:
    """The compiled library, found by llama.cpp before its own function; None where it is no use."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":  # others: stacks too small
        return None
    name = choose_instruction_set(_cpu_flags())
    if name is None or _ggml_version().rpartition(".")[0] not in GGML_VERSIONS:
        return None
    try:
        library = ctypes.CDLL(str(library_path(name)), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return None
    library.shardmesh_use.argtypes = (ctypes.c_bool, ctypes.c_int, ctypes.c_void_p)
    library.shardmesh_use.restype = library.shardmesh_count.restype = None
    library.shardmesh_q8_multiply.restype = library.shardmesh_f16_multiply.restype = ctypes.c_bool
    return library


def library_path(instruction_set: str) -> Path:
    """Where the package has what was built for an instruction set."""
    return Path(__file__).with_name(f"_matmul_{instruction_set}.so")


def _cpu_flags() -> frozenset[str]:
    """Of the first core: those of a hybrid CPU have the same."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as cpuinfo:
            line = next((line for line in cpuinfo if line.startswith("flags")), "")
    except OSError:
        return frozenset()
    return frozenset(line.partition(":")[2].split())


def _ggml_version() -> str:
    """Of the library that llama.cpp is going to load, which is not loaded by this; or nothing."""
    package = importlib.util.find_spec("llama_cpp")
    if package is None or package.origin is None or "LLAMA_CPP_LIB_PATH" in os.environ:
        return ""
    try:
        base = ctypes.CDLL(str(Path(package.origin).with_name("lib") / "libggml-base.so"))
        base.ggml_version.restype = ctypes.c_char_p
        version: bytes = base.ggml_version()
    except (OSError, AttributeError):
        return ""
    return version.decode("ascii", "replace")
