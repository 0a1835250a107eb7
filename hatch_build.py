"""Builds the C of Shardmesh along with the package, where there is a compiler.

Without one the package does without: Python does the same (`shardmesh/engine/native_tap.py`), or
llama.cpp does (`shardmesh/engine/kernels.py`).
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = "shardmesh/engine"
COMPILE_TIMEOUT_S = 60


class Library(NamedTuple):  # hatchling runs this file in a way that dataclasses do not survive
    """C files, what they become, and the compiler's options for them."""

    sources: tuple[str, ...]
    target: str
    options: tuple[str, ...]
    machines: tuple[str, ...] = ()  # as Python names them; none: all


_AVX2 = ("-O3", "-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512bw", "-mavx512vl", "-mavx512vnni")
_MATMUL = ("matmul.c", "q8_matmul.c", "f16_matmul.c")
_X86 = ("x86_64", "AMD64")

LIBRARIES = (
    Library(("tap_callback.c",), "_tap_callback.so", ("-O2",)),
    Library(_MATMUL, "_matmul_avx2.so", _AVX2, _X86),
    Library(_MATMUL, "_matmul_avxvnni.so", (*_AVX2, "-mavxvnni"), _X86),
    Library(_MATMUL, "_matmul_avx512.so", (*_AVX2, *_AVX512), _X86),
)


class CustomBuildHook(BuildHookInterface[Any]):
    """Called by hatchling for wheels and for editable installations."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles what suits this machine; a failure is told and nothing more."""
        folder = Path(self.root, FOLDER)
        for library in LIBRARIES:
            suits = not library.machines or platform.machine() in library.machines
            if not suits or not self._compile(folder, library):
                (folder / library.target).unlink(missing_ok=True)
                continue
            build_data["artifacts"].append(f"{FOLDER}/{library.target}")
            build_data["pure_python"] = False
            build_data["infer_tag"] = True

    def _compile(self, folder: Path, library: Library) -> bool:
        target = folder / library.target
        unfinished = target.with_suffix(".unfinished")
        failures = []
        for compiler in compilers():
            files = ["-o", unfinished, *(folder / source for source in library.sources)]
            command = [*compiler, *library.options, "-shared", "-fPIC", *files]
            try:
                subprocess.run(command, check=True, timeout=COMPILE_TIMEOUT_S, capture_output=True)
                unfinished.replace(target)
            except (OSError, subprocess.SubprocessError) as error:
                unfinished.unlink(missing_ok=True)
                failures.append(str(error))
            else:
                return True
        why = "; ".join(failures)
        self.app.display_warning(f"{library.target} was not compiled, it goes without: {why}")
        return False


def compilers() -> list[list[str]]:
    """What to try, in order; the C++ compiler that llama-cpp-python needs is there mostly."""
    if "CC" in os.environ:
        return [shlex.split(os.environ["CC"])]
    return [["cc"], ["gcc"], ["clang"], ["c++", "-x", "c"]]
