"""One listener alone: each line of its start, its options, its identity, its end."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.asking import complete_with, wait_status
from support.processes import (
    START_TIMEOUT_S,
    Finished,
    Mesh,
    Node,
    Workspace,
    start_bootstrap,
    workspace,
)
from support.reference import N_TOKENS, PROMPT, Reference

pytestmark = pytest.mark.processes

LINES = (
    r"^Peer ID: 12D3Koo\w+$",
    r"^\[TORRENT\] Found 2 GGUF file\(s\)$",  # the shard and the tokenizer
    r"^\[SHARD\] ✓✓✓ SHARD 0 LOADED BEFORE JOINING NETWORK ✓✓✓$",
    r"^\[LISTEN\] Listening on: /ip4/127\.0\.0\.1/tcp/[1-9]\d*$",
    r"^🔗 Connecting to bootstrap node\.\.\.",
    r"^\[CONNECT\] ✓ Connection established! {bootstrap} \(outbound, ",
    r"^\[DHT\] ✓ Started Kademlia bootstrap$",
    r"^\[DHT\] Routing updated: {bootstrap}$",
    r"^\[DHT\] ✓ Announced shard 0 to DHT$",
    r"^✅ Shard listener started! Waiting for connections\.\.\.$",
)
N_REFRESHES = 3


@pytest.fixture(scope="module")
def alone(model: Path) -> Iterator[Mesh]:
    """A bootstrap and one listener of the whole model, told everything by variables."""
    with workspace() as space:
        shards_dir = space.folder / "shards"
        done = space.run("split", str(model), "--shards", "1", "--out", str(shards_dir))
        assert done.code == 0, done.err
        manifest = json.loads((shards_dir / "manifest.json").read_text())
        mesh = Mesh(space, "lonely", shards_dir, start_bootstrap(space, "lonely"))
        variables = {
            "LLAMA_SHARD_ID": "0",
            "LLAMA_TOTAL_SHARDS": "1",
            "LLAMA_TOTAL_LAYERS": "8",
            "LLAMA_MODEL_NAME": manifest["model_name"],
            "LLAMA_SHARDS_DIR": str(shards_dir),
            "LLAMA_CLUSTER": "lonely",
            "LLAMA_BOOTSTRAP": mesh.bootstrap.address,
            "LLAMA_REFRESH_INTERVAL": "1",
            "LLAMA_LISTEN_ADDR": "127.0.0.1",
            "LLAMA_STATE_DIR": str(space.folder / "state"),
            "LLAMA_THREADS": "1",
        }
        mesh.listeners = [Node(space.start("listen", variables=variables))]
        mesh.wait_ready()
        yield mesh


def test_each_line_of_joining_in_order(alone: Mesh) -> None:
    lines = iter(alone.listeners[0].running.lines)
    for pattern in LINES:
        expected = pattern.replace("{bootstrap}", alone.bootstrap.peer_id)
        assert any(re.search(expected, line) for line in lines), expected


def test_one_shard_writes_the_same(alone: Mesh, references: dict[str, Reference]) -> None:
    options = ("--temperature", "0", "--max-tokens", str(N_TOKENS), *alone.where)
    done = alone.space.run("run", PROMPT, *options)
    assert (done.code, done.out) == (0, references[PROMPT].text + "\n"), done.err


def test_announced_again_after_the_refresh_interval(alone: Mesh) -> None:
    since = 0
    for _ in range(N_REFRESHES):
        alone.listeners[0].running.wait_line("Announced shard 0", 5, since=since)
        lines = alone.listeners[0].running.lines
        since = 1 + next(i for i, ln in enumerate(lines) if i >= since and "Announced" in ln)


def test_the_key_is_the_owners_alone(alone: Mesh) -> None:
    key = alone.space.folder / "state" / "shard-0" / "node.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700


# -- what cannot be started --------------------------------------------------------------------


@pytest.fixture(scope="module")
def refused(alone: Mesh) -> dict[str, Finished]:
    """Starts that fail, all at the same time."""
    state = str(alone.space.folder / "state")
    others = (
        ("--state-dir", str(alone.space.folder / f"other-{n}"), "--listen-addr", "127.0.0.1")
        for n in itertools.count()
    )
    port = ("--port", str(alone.listeners[0].port))
    first = ("listen", "--shard-id", "0", *alone.where)
    commands = {
        "shards": (*first, *next(others), "--total-shards", "5"),
        "layers": (*first, *next(others), "--total-layers", "7"),
        "name": (*first, *next(others), "--model-name", "nix"),
        "port": (*first, *next(others), *port),
        "state": (*first, "--state-dir", state),
        "shard": ("listen", "--shard-id", "3", *alone.where, *next(others)),
    }
    return dict(zip(commands, alone.space.run_all(*commands.values()), strict=True))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("shards", ["CONTRADICTION", "--total-shards", "5", "1"]),
        ("layers", ["CONTRADICTION", "--total-layers", "7", "8"]),
        ("name", ["CONTRADICTION", "--model-name", "nix", "{model_name}"]),
        ("port", ["not free", "{port}"]),
        ("state", ["STATE_IN_USE", "--state-dir"]),
        ("shard", ["NO_SUCH_SHARD", "3", "1"]),
    ],
)
def test_refused_with_one_sentence(
    alone: Mesh, refused: dict[str, Finished], name: str, words: list[str]
) -> None:
    manifest = json.loads((alone.shards_dir / "manifest.json").read_text())
    known = {"model_name": manifest["model_name"], "port": alone.listeners[0].port}
    assert refused[name].code == 2
    assert refused[name].is_one_sentence, refused[name].err
    for word in words:
        assert word.format(**known) in refused[name].err


def test_a_flag_beats_a_variable_beats_the_file(alone: Mesh) -> None:
    """Each value contradicts the manifest, so that the refusal tells which one was taken."""
    config = alone.space.folder / "own.toml"
    config.write_text(
        f'cluster = "lonely"\n[listen]\nshard-id = 0\ntotal_shards = 7\n'
        f'shards_dir = "{alone.shards_dir}"\n'
    )
    from_file = (
        "listen",
        "--config",
        str(config),
        "--state-dir",
        str(alone.space.folder / "other"),
    )
    variable = {"LLAMA_TOTAL_SHARDS": "6"}
    taken = [
        alone.space.run(*from_file),
        alone.space.run(*from_file, variables=variable),
        alone.space.run(*from_file, "--total-shards", "5", variables=variable),
    ]
    assert [done.code for done in taken] == [2, 2, 2]
    for value, done in zip((7, 6, 5), taken, strict=True):
        assert f"--total-shards says {value}, the manifest says 1" in done.err


# -- other ways to join ------------------------------------------------------------------------


@pytest.mark.slow
def test_the_bootstrap_may_come_later(alone: Mesh) -> None:
    """Without its shard file, too: it joins and says that the shard is not loaded."""
    empty = alone.space.folder / "empty"
    empty.mkdir()
    shutil.copy(alone.shards_dir / "manifest.json", empty)
    port, peer_id = alone.bootstrap.port, alone.bootstrap.peer_id
    n_lines = len(alone.listeners[0].running.lines)
    alone.bootstrap.running.end()
    late = Mesh(alone.space, "lonely", empty, alone.bootstrap)
    node = late.listen(0, "--state-dir", str(alone.space.folder / "late"))
    node.running.wait_line(r"\[SHARD\] ⚠️  ASSIGNED SHARD 0 NOT FOUND LOCALLY ⚠️")
    pauses = [
        node.running.wait_line(rf"not reachable, trying again in ({n}) s")[1] for n in ("1", "[23]")
    ]
    assert len(pauses) == 2
    alone.bootstrap = start_bootstrap(alone.space, "lonely", port=port)
    assert alone.bootstrap.peer_id == peer_id
    node.running.wait_line(rf"Connection established! {peer_id}")
    node.wait_announced()
    alone.listeners[0].running.wait_line(rf"established! {peer_id}", since=n_lines)
    models = wait_status(alone, complete_with(node.peer_id, alone.listeners[0].peer_id))
    states = {replica.peer_id: replica.state for replica in models[0].replicas}
    assert states == {node.peer_id: "absent", alone.listeners[0].peer_id: "loaded"}


@pytest.mark.slow
def test_without_a_number_it_takes_the_shard_served_least(
    space: Workspace, shards_dir: Path
) -> None:
    mesh = Mesh(space, "four", shards_dir, start_bootstrap(space, "four"))
    for shard_id in range(2):
        node = mesh.listen(None)
        node.running.wait_line(rf"Chosen: shard {shard_id}, served by 0 so far", START_TIMEOUT_S)
        node.wait_announced()
