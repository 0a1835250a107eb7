"""Builds the one small C function of Shardmesh along with the package, where there is a compiler.

Without one the package does the same in Python: see `shardmesh/engine/native_tap.py`.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = "shardmesh/engine/tap_callback.c"
TARGET = "shardmesh/engine/_tap_callback.so"
COMPILE_TIMEOUT_S = 60


class CustomBuildHook(BuildHookInterface[Any]):
    """Called by hatchling for wheels and for editable installations."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles SOURCE to TARGET; a failure is told and nothing more."""
        target = Path(self.root, TARGET)
        if not self._compile(Path(self.root, SOURCE), target):
            target.unlink(missing_ok=True)
            return
        build_data["artifacts"].append(TARGET)
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def _compile(self, source: Path, target: Path) -> bool:
        unfinished = target.with_suffix(".unfinished")
        failures = []
        for compiler in compilers():
            command = [*compiler, "-O2", "-shared", "-fPIC", "-o", unfinished, source]
            try:
                subprocess.run(command, check=True, timeout=COMPILE_TIMEOUT_S, capture_output=True)
                unfinished.replace(target)
            except (OSError, subprocess.SubprocessError) as error:
                unfinished.unlink(missing_ok=True)
                failures.append(str(error))
            else:
                return True
        why = "; ".join(failures)
        self.app.display_warning(f"{SOURCE} was not compiled, Python does its work: {why}")
        return False


def compilers() -> list[list[str]]:
    """What to try, in order; the C++ compiler that llama-cpp-python needs is there mostly."""
    if "CC" in os.environ:
        return [shlex.split(os.environ["CC"])]
    return [["cc"], ["gcc"], ["clang"], ["c++", "-x", "c"]]
