"""Bounds of a process, tried where they cannot hurt: in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from shardmesh.confinement import without_settings

TRY = """
import resource, sys
from shardmesh.confinement import allow_files, confine
{before}
allow_files(); confine(200 * 2**20)
try:
    data = bytearray(int(sys.argv[1]) * 2**20)
except MemoryError:
    sys.exit(3)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def tried(n_mib: int, before: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", TRY.format(before=before), str(n_mib)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not hold a process to this limit")
def test_memory_beyond_the_bound_is_refused() -> None:
    assert tried(50).returncode == 0
    assert tried(400).returncode == 3


def test_files_are_raised_as_far_as_the_system_lets() -> None:
    lower = "resource.setrlimit(resource.RLIMIT_NOFILE, (64, {hard}))"
    assert int(tried(1, lower.format(hard=512)).stdout) == 512
    assert int(tried(1, lower.format(hard=20000)).stdout) == 4096


def test_settings_are_left_behind() -> None:
    environment = {"PATH": "/bin", "LLAMA_SECRET": "x", "LLAMA_SECRET_FILE": "y", "GGML_X": "1"}
    assert without_settings(environment) == {"PATH": "/bin", "GGML_X": "1"}
