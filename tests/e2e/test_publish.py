"""A model with an adapter goes from machine to machine: publish, pull, seed, and nobody left."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.models import BUILT_IN, write_lora, write_model
from support.processes import START_TIMEOUT_S, Mesh, Running, Workspace, start_bootstrap, workspace

pytestmark = [pytest.mark.processes, pytest.mark.slow]

N_EMBD = 64
N_SHARDS = 2
PULL_TIMEOUT_S = 120.0


class Machines:
    """Machines with folders of their own, all told of one bootstrap."""

    def __init__(self, space: Workspace) -> None:
        self.space = space
        mesh = Mesh(space, "travel", space.folder, start_bootstrap(space, "travel"))
        self.member = (*mesh.member, "--listen-addr", "127.0.0.1")
        model = write_model(space.folder / "m.gguf", n_layer=4, vocabulary=BUILT_IN)
        weights = [(f"blk.{layer}.attn_output.weight", N_EMBD, N_EMBD) for layer in range(4)]
        lora = write_lora(space.folder / "pirate.gguf", "llama", weights, deviation=0.4)
        self.split = space.folder / "a" / "shards"
        done = space.run(
            *("split", str(model), "--shards", str(N_SHARDS), "--lora", str(lora)),
            *("--out", str(self.split)),
        )
        assert done.code == 0, done.err
        self.publisher = self.start("a", "publish", str(self.split))
        self.link = self.publisher.wait_line(r"^shardmesh:\S+", START_TIMEOUT_S)[0]

    def options(self, name: str) -> tuple[str, ...]:
        folder = self.space.folder / name
        return (
            *("--state-dir", str(folder / "state"), "--models-dir", str(folder / "models")),
            *self.member,
        )

    def start(self, name: str, *command: str) -> Running:
        return self.space.start(*command, *self.options(name))

    def pull(self, name: str, *more: str, expected: int = 0) -> str:
        """What a machine's `pull` says on standard error."""
        command = ("pull", self.link, *more, *self.options(name))
        done = self.space.run(*command, timeout_s=PULL_TIMEOUT_S)
        assert done.code == expected, done.err
        return done.err

    def files(self, name: str) -> dict[str, str]:
        """Names and digests of the model's files on a machine that has pulled it."""
        return digests(self.space.folder / name / "models")


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.gguf")}


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    with workspace() as space:
        yield Machines(space)


def test_a_publisher_gives_all_files_adapters_too(machines: Machines) -> None:
    machines.publisher.wait_line("Elsewhere: shardmesh listen --model '<link>' --secret")
    machines.publisher.wait_line("Giving .* to others until Ctrl-C", START_TIMEOUT_S)
    machines.pull("b", "--all")
    expected = digests(machines.split)
    assert {"adapter-0-0.gguf", "adapter-0-1.gguf", "tokenizer.gguf"} < set(expected)
    assert machines.files("b") == expected


def test_one_shard_comes_with_its_adapters_and_no_others(machines: Machines) -> None:
    machines.pull("c", "--shard", "1")
    names = {"shard-1.gguf", "adapter-0-1.gguf", "tokenizer.gguf"}
    assert machines.files("c") == {
        name: digest for name, digest in digests(machines.split).items() if name in names
    }


def test_from_a_seed_once_the_publisher_is_gone(machines: Machines) -> None:
    machines.publisher.end()
    seed = machines.start("b", "seed")
    seed.wait_line(r"Giving 5 files to others until Ctrl-C", START_TIMEOUT_S)
    machines.pull("d")
    assert machines.files("d") == digests(machines.split)
    seed.end()


def test_nobody_has_the_shard_any_more(machines: Machines) -> None:
    """It says which one, gives up when told to, and goes on from there."""
    where = ("--models-dir", str(machines.space.folder / "c" / "models"))
    (model,) = json.loads(machines.space.run("ls", "--json", *where).out)
    assert model["shards_here"] == [1]
    seed = machines.start("c", "seed")
    seed.wait_line("Giving 3 files", START_TIMEOUT_S)
    said = machines.pull("e", "--timeout", "8", expected=1)
    assert "No node has shard-0.gguf of" in said
    assert "[NO_SOURCE]" in said
    assert {"shard-1.gguf", "adapter-0-1.gguf", "tokenizer.gguf"} <= set(machines.files("e"))
    second = machines.start("d", "seed")
    second.wait_line("Giving 5 files", START_TIMEOUT_S)
    machines.pull("e")
    assert machines.files("e") == digests(machines.split)
