"""Memory in large pages: asked for at the start of a process, and weights copied into it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.models import write_model

from shardmesh.engine import large_pages
from shardmesh.engine.large_pages import environment_for, is_room_for_copy


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=3", "glibc.malloc.check=3:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_what_a_user_has_set_stays(before: str | None, after: str) -> None:
    environment = {"HOME": "/home/user"} | ({} if before is None else {"GLIBC_TUNABLES": before})
    assert environment_for(environment) == {"HOME": "/home/user", "GLIBC_TUNABLES": after}


def test_a_copy_needs_plenty_of_memory() -> None:
    assert is_room_for_copy(1000, 4000)
    assert not is_room_for_copy(1001, 4000)


COMPUTE = """
import json, sys
from pathlib import Path
from shardmesh.engine.base import EngineOptions, MicroBatch
from shardmesh.engine.llama import load_engine

path = Path(sys.argv[1])
options = EngineOptions(n_ctx=256, n_parallel=1, n_threads=1, large_pages=sys.argv[2] == "large")
engine = load_engine(path, options)
engine.open_sequence(0)
micro = MicroBatch(sequence=0, position=0, tokens=(1, 2, 3), want_logits=True)
[output] = engine.compute([micro])
is_mapped = str(path) in Path("/proc/self/maps").read_text()
print(json.dumps([is_mapped, output.logits.tobytes().hex()]))
engine.close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are for Linux")
def test_weights_are_copied_where_there_are_large_pages(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    write_model(model, n_layer=2)
    unset = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    results = []
    for environment, which in (
        (environment_for(unset), "large"),
        (environment_for(unset), "small"),
        (unset, "large"),  # not started for it
    ):
        command = [sys.executable, "-c", COMPUTE, str(model), which]
        done = subprocess.run(command, check=True, timeout=60, capture_output=True, env=environment)
        results.append(json.loads(done.stdout))
    are_mapped = [is_mapped for is_mapped, _ in results]
    assert len({logits for _, logits in results}) == 1
    assert are_mapped[1:] == [True, True]
    if not large_pages._are_given():
        pytest.skip("this system gives no large pages")
    assert not are_mapped[0]
