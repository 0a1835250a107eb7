"""Makes the virtual environment and installs Shardmesh in it: `set_up.py FOLDER REQUIREMENT`.

Runs on any Python 3 without any package; `make` calls it when pyproject.toml has changed.
"""

import subprocess
import sys
from pathlib import Path

from check_system import main as check_system

HINT = """\
Installing Shardmesh and what it needs into {folder}.
The first time, llama-cpp-python is compiled: about 8 minutes on two cores. It has not hung."""


def main() -> int:
    folder, requirement = sys.argv[1:]
    if check_system() != 0:
        return 1
    python = Path(folder, "bin", "python")
    if not python.exists():
        made = subprocess.run([sys.executable, "-m", "venv", folder], check=False)
        if made.returncode != 0:
            return made.returncode
    pip = [str(python), "-m", "pip", "install", "--editable", requirement]
    if has_llama_cpp(python):
        pip.append("--quiet")
    else:
        print(HINT.format(folder=folder), flush=True)
    return subprocess.run(pip, check=False).returncode


def has_llama_cpp(python: Path) -> bool:
    """Whether the slow part is done already."""
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('llama_cpp') is None)"
    return subprocess.run([str(python), "-c", code], check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
