"""Small random models of nearly every architecture, written by llama.cpp's own test program.

Takes the source distribution of the llama-cpp-python that is installed, builds `test-llama-archs`
of the llama.cpp in it with CMake against the installed libraries (so that models are written and
run by the same code, and a build takes seconds), and lets it write its models.  All of it stays in
a cache folder, and nothing is done again that is there already.

    .venv/bin/python scripts/build_arch_fixture.py --layers 4 --seed 1
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import platformdirs

N_LAYERS_DEFAULT = 4
"""So that there are stages in the middle; the program's own models mostly have two layers."""

N_LAYERS_ORIGINAL = 2

MODEL_TIMEOUT_S = 120
BUILD_TIMEOUT_S = 900

CMAKE_LISTS = """\
cmake_minimum_required(VERSION 3.14)
project(archs CXX)
set(CMAKE_CXX_STANDARD 17)
set(common ${SOURCE}/common)
add_executable(test-llama-archs ${PROGRAM} ${common}/log.cpp ${common}/common.cpp
  ${common}/json.cpp ${common}/json-schema.cpp ${common}/json-schema-to-grammar.cpp)
target_include_directories(test-llama-archs PRIVATE ${SOURCE}/include ${SOURCE}/ggml/include
  ${SOURCE}/common ${SOURCE}/src ${SOURCE}/vendor)
# `common` is taken in parts: what is never called, and the libraries it needs, is left out.
target_compile_options(test-llama-archs PRIVATE -ffunction-sections -fdata-sections)
target_link_options(test-llama-archs PRIVATE -Wl,--gc-sections -Wl,-rpath,${LIBRARIES})
target_link_directories(test-llama-archs PRIVATE ${LIBRARIES})
target_link_libraries(test-llama-archs llama ggml ggml-base ggml-cpu)
"""

CHANGES = (
    ("uint32_t n_layer = 2;", "uint32_t n_layer = {n_layers};"),
    # Hybrids have one recurrent layer at 1; with more layers they shall alternate.
    ("il == 1 ? 0 : n_head", "il % 2 == 1 ? 0 : n_head"),
    ("il <= 1 ? 0 : n_ff", "il / 2 % 2 == 0 ? 0 : n_ff"),
    ("std::vector<float>({0.0f, 4.0f})", "std::vector<float>(n_layer, 4.0f)"),
    ("std::vector<float>({0.0f, 5.0f})", "std::vector<float>(n_layer, 5.0f)"),
    ("n_layer = 3;", "n_layer = {n_layers} < 3 ? 3 : {n_layers};"),
    ("n_layer = 4; // hparams.n_no", "n_layer = {n_layers} < 4 ? 4 : {n_layers}; // hparams.n_no"),
)
"""What the program has and what it gets; each once."""


def cache_folder() -> Path:
    version = importlib.metadata.version("llama-cpp-python")
    return Path(platformdirs.user_cache_dir("shardmesh")) / "archs" / version


def models_folder(n_layers: int, seed: int) -> Path:
    return cache_folder() / f"layers-{n_layers}-seed-{seed}"


def build_models(n_layers: int, seed: int) -> Path:
    """The folder with all models, which are made if they are not there yet."""
    folder = models_folder(n_layers, seed)
    complete = folder / "complete"
    if not complete.exists():
        for architecture in architectures(source_folder()):
            build_architecture(architecture, n_layers, seed)
        complete.touch()
    return folder


def build_architecture(architecture: str, n_layers: int, seed: int) -> None:
    """The models of one architecture, with and without experts, in the folder of all."""
    folder = models_folder(n_layers, seed)
    folder.mkdir(parents=True, exist_ok=True)
    if any((folder / f"{architecture}-{kind}.gguf").exists() for kind in ("dense", "moe")):
        return
    # In a process of its own: some cannot be made with so many layers.
    options = ["-a", architecture, "-s", str(seed), "-o", folder]
    if not is_written(build_program(n_layers), options):
        is_written(build_program(N_LAYERS_ORIGINAL), options)


def build_program(n_layers: int) -> Path:
    """The program that writes models of so many layers."""
    folder = cache_folder() / f"build-{n_layers}"
    program = folder / "test-llama-archs"
    if program.exists():
        return program
    source = source_folder()
    text = (source / "tests" / "test-llama-archs.cpp").read_text()
    for before, after in CHANGES:
        if text.count(before) != 1:
            sys.exit(f"this version of llama.cpp writes its models in another way: no {before}")
        text = text.replace(before, after.replace("{n_layers}", str(n_layers)))
    # Beside the original, which names headers by relative paths.
    cpp = source / "tests" / f"test-llama-archs-{n_layers}.cpp"
    cpp.write_text(text)
    folder.mkdir(exist_ok=True)
    (folder / "CMakeLists.txt").write_text(CMAKE_LISTS)
    libraries = Path(llama_cpp.__file__).parent / "lib"
    values = {"SOURCE": source, "PROGRAM": cpp, "LIBRARIES": libraries}
    defines = [f"-D{name}={value}" for name, value in values.items()]
    run(["cmake", "-S", folder, "-B", folder, *defines], BUILD_TIMEOUT_S)
    run(["cmake", "--build", folder, "-j2"], BUILD_TIMEOUT_S)
    return program


def source_folder() -> Path:
    """llama.cpp's source, downloaded and unpacked on the first call."""
    version = importlib.metadata.version("llama-cpp-python")
    folder = cache_folder()
    source = folder / f"llama_cpp_python-{version}" / "vendor" / "llama.cpp"
    if not source.exists():
        folder.mkdir(parents=True, exist_ok=True)
        what = [f"llama-cpp-python=={version}", "--no-deps", "--no-binary", "llama-cpp-python"]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder]
        run([*pip, *what], BUILD_TIMEOUT_S)
        (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
        archive.unlink()
    return source


def architectures(source: Path) -> list[str]:
    """The names in llama.cpp's table; those it cannot write are skipped by the program."""
    text = (source / "src" / "llama-arch.cpp").read_text()
    names = re.findall(r'\{ LLM_ARCH_\w+, *"([^"]+)" *\}', text)
    return sorted(set(names) - {"(unknown)"})


def is_written(program: Path, options: Sequence[str | Path]) -> bool:
    """Whether the program ended well, which it does too for what it knows it cannot write."""
    quiet = subprocess.DEVNULL
    command = [program, *options]
    ended = subprocess.run(
        command, timeout=MODEL_TIMEOUT_S, check=False, stdout=quiet, stderr=quiet
    )
    return ended.returncode == 0


def run(command: Sequence[str | Path], timeout_s: int) -> None:
    ended = subprocess.run(command, timeout=timeout_s, check=False)
    if ended.returncode != 0:
        sys.exit(f"{command[0]} failed with exit code {ended.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=N_LAYERS_DEFAULT)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    folder = build_models(arguments.layers, arguments.seed)
    print(f"{len(list(folder.glob('*.gguf')))} models in {folder}")


if __name__ == "__main__":
    main()
