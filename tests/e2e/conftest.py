"""One mesh of a bootstrap and four listeners that all read-only tests share."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.models import write_model
from support.processes import Mesh, Workspace, start_mesh, workspace
from support.reference import N_CTX, PROMPTS, Reference, llama_references

from shardmesh.demo_model import DEMO_MODEL


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if DEMO_MODEL.exists():
        return DEMO_MODEL
    return write_model(tmp_path_factory.mktemp("model") / "synthetic.gguf", n_layer=8)


@pytest.fixture(scope="session")
def references(model: Path) -> dict[str, Reference]:
    """The greedy text of each of PROMPTS."""
    return llama_references(model, PROMPTS)


@pytest.fixture(scope="session")
def shared_space() -> Iterator[Workspace]:
    with workspace() as space:
        yield space


@pytest.fixture(scope="session")
def shards_dir(shared_space: Workspace, model: Path) -> Path:
    folder = shared_space.folder / "shards"
    done = shared_space.run("split", str(model), "--shards", "4", "--out", str(folder))
    assert done.code == 0, done.err
    return folder


@dataclasses.dataclass
class SharedMesh(Mesh):
    """The shared mesh, which remembers since when all of it is up."""

    ready_s: float = 0.0


@pytest.fixture(scope="session")
def mesh(shared_space: Workspace, shards_dir: Path) -> SharedMesh:
    started = start_mesh(shared_space, shards_dir, 4, "--ctx-size", str(N_CTX))
    fields = {field.name: getattr(started, field.name) for field in dataclasses.fields(started)}
    return SharedMesh(**fields, ready_s=time.monotonic())


@pytest.fixture
def space() -> Iterator[Workspace]:
    """A workspace for one test alone."""
    with workspace() as space:
        yield space
