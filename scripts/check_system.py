"""Can this machine build what Shardmesh needs?  Says in one message what is missing.

Two dependencies are compiled when they are installed: llama-cpp-python needs a C++ compiler, and
fastecdsa, which comes with libp2p, needs a C compiler, Python's headers and those of libgmp.  pip
would say so somewhere in hundreds of lines, after minutes.

Runs on any Python 3 without any package.  Exit code 0: all is there; 1: something is missing.
"""

import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

PYTHON_MIN = (3, 11)
COMPILE_TIMEOUT_S = 60

CXX_PROGRAM = "#include <vector>\nint main() { return std::vector<int>(1)[0]; }\n"
PYTHON_PROGRAM = "#include <Python.h>\nint main(void) { return 0; }\n"
GMP_PROGRAM = "#include <gmp.h>\nint main(void) { mpz_t n; mpz_init(n); return 0; }\n"

HOW_TO_INSTALL = """\
Install what is missing, then run the same command again:
  Debian, Ubuntu:  sudo apt-get install build-essential python3-dev python3-venv libgmp-dev
  Fedora:          sudo dnf install gcc gcc-c++ python3-devel gmp-devel
  macOS:           xcode-select --install && brew install gmp"""


def missing_parts() -> list[str]:
    """What this machine lacks, one line each."""
    if sys.version_info < PYTHON_MIN:
        found = ".".join(map(str, sys.version_info[:3]))
        wanted = ".".join(map(str, PYTHON_MIN))
        return [
            f"Python {wanted} or newer; {sys.executable} is {found} "
            "(choose another one with `make PYTHON=python3.12 ...`)"
        ]
    missing = []
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        missing.append("Python's modules venv and ensurepip")
    if not compiles("CXX", "c++", CXX_PROGRAM, "program.cpp"):
        missing.append("a C++ compiler (tried $CXX, else c++)")
    if not compiles("CC", "cc", "int main(void) { return 0; }\n", "program.c"):
        return [*missing, "a C compiler (tried $CC, else cc)"]
    include = [f"-I{path}" for path in python_include_folders()]
    if not compiles("CC", "cc", PYTHON_PROGRAM, "program.c", include):
        missing.append(f"the headers of this Python, {sys.executable} (Python.h)")
    if not compiles("CC", "cc", GMP_PROGRAM, "program.c", [*gmp_flags(), "-lgmp"]):
        missing.append("the library GMP with its headers (gmp.h)")
    return missing


def compiles(
    variable: str, default: str, program: str, name: str, flags: Sequence[str] = ()
) -> bool:
    """Whether the compiler that the variable or the default names builds this program."""
    compiler = shlex.split(os.environ.get(variable, "")) or [default]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, name)
        source.write_text(program, encoding="ascii")
        command = [*compiler, str(source), "-o", str(Path(folder, "program")), *flags]
        try:
            done = subprocess.run(
                command, capture_output=True, timeout=COMPILE_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
    return done.returncode == 0


def python_include_folders() -> set[str]:
    """Where Python.h is, as setuptools looks for it."""
    return {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}


def gmp_flags() -> list[str]:
    """Where Homebrew and MacPorts keep their libraries; compilers look there unasked elsewhere."""
    flags = shlex.split(os.environ.get("CFLAGS", "")) + shlex.split(os.environ.get("LDFLAGS", ""))
    for prefix in ("/opt/homebrew", "/usr/local", "/opt/local"):
        if sys.platform == "darwin" and Path(prefix, "include", "gmp.h").exists():
            flags += [f"-I{prefix}/include", f"-L{prefix}/lib"]
    return flags


def main() -> int:
    missing = missing_parts()
    if not missing:
        return 0
    lines = [f"  - {part}" for part in missing]
    print("Shardmesh cannot be installed here yet. Missing:", *lines, "", sep="\n", file=sys.stderr)
    print(HOW_TO_INSTALL, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
