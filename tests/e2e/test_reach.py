"""Nodes that cannot be dialed, as real processes: all that others may do, through a relay."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.asking import ask
from support.multicast import loopback_has_multicast
from support.namespaces import N_HOMES, PUBLIC_HOST, homes_behind_nat
from support.processes import START_TIMEOUT_S, Mesh, Node, Workspace, start_bootstrap
from support.reference import N_CTX, N_TOKENS, PROMPT, Reference

pytestmark = [pytest.mark.processes, pytest.mark.slow]

N_SHARDS = 3
FETCH_TIMEOUT_S = 90.0


@pytest.fixture
def mesh(space: Workspace, model: Path) -> Mesh:
    """Two stages that only a relay reaches, and one whose links go over libp2p streams."""
    shards_dir = space.folder / "three"
    done = space.run("split", str(model), "--shards", str(N_SHARDS), "--out", str(shards_dir))
    assert done.code == 0, done.err
    mesh = Mesh(space, "test", shards_dir, start_bootstrap(space, "test"))
    context = ("--ctx-size", str(N_CTX))
    mesh.listeners = [
        mesh.listen(0, "--relay-only", *context),
        mesh.listen(1, "--relay-only", *context),
        mesh.listen(2, "--no-direct", *context),
    ]
    mesh.wait_ready()
    for hidden in mesh.listeners[:2]:
        hidden.running.wait_line(r"\[REACH\] ✓ Reached through the relay")
    return mesh


def test_a_prompt_through_a_relay_gives_the_exact_text(
    mesh: Mesh, references: dict[str, Reference]
) -> None:
    greedy = ("--temperature", "0", "--max-tokens", str(N_TOKENS))
    done = mesh.space.run("run", PROMPT, *greedy, *mesh.where)
    assert done.code == 0, done.err
    assert done.out.rstrip("\n") == references[PROMPT].text

    status = mesh.space.run("status", "--json", *mesh.where)
    (shown,) = json.loads(status.out)
    assert shown["complete"]
    assert [r["path"] for r in shown["replicas"]] == ["relayed", "relayed", "direct"]
    assert all("p2p-circuit" in a for r in shown["replicas"][:2] for a in r["addresses"])
    # The links between the stages stay, the last one's to the first among them.
    first, second, last = ask(mesh, "GET_METRICS")
    assert [link["kind"] for link in first["links"]] == ["relayed"]
    assert [link["kind"] for link in second["links"]] == ["stream"]
    (turn,) = last["links"]
    assert turn["kind"] in ("relayed", "stream")  # over a connection of the first's, if it has one
    assert all(link["round_trip_ms"] > 0 for m in (first, second, last) for link in m["links"])


def test_two_homes_behind_nat_make_a_chain(
    space: Workspace, model: Path, references: dict[str, Reference]
) -> None:
    shards_dir = space.folder / "two"
    done = space.run("split", str(model), "--shards", str(N_HOMES), "--out", str(shards_dir))
    assert done.code == 0, done.err
    with homes_behind_nat() as network:
        in_public = network.inside(network.public)
        state = ("--state-dir", str(space.folder / "state"))
        bootstrap = Node(space.start("bootstrap", "--port", "0", *state, inside=in_public))
        bootstrap.wait_started()
        assert bootstrap.address.startswith(f"/ip4/{PUBLIC_HOST}/")
        where = ("--bootstrap", bootstrap.address, "--shards-dir", str(shards_dir))
        words = ("--threads", "1", "--ctx-size", str(N_CTX), *where, *state)
        homes = [
            Node(space.start("listen", "--shard-id", str(n), *words, inside=network.inside(home)))
            for n, home in enumerate(network.homes)
        ]
        for home in homes:
            home.running.wait_line(r"\[REACH\] ✓ Reached through the relay", START_TIMEOUT_S)
            home.wait_announced()
        greedy = ("--temperature", "0", "--max-tokens", str(N_TOKENS))
        done = space.run("run", PROMPT, *greedy, *where, inside=in_public)
        assert (done.code, done.out) == (0, references[PROMPT].text + "\n"), done.err
        status = space.run("status", "--json", *where, inside=in_public)
        (shown,) = json.loads(status.out)
        assert [r["path"] for r in shown["replicas"]] == ["relayed", "relayed"]
        assert [link["kind"] for r in shown["replicas"] for link in r["links"]] == ["relayed"] * 2
        for home in homes:  # they end before the networks that they are in
            home.running.end()
        bootstrap.running.end()


@pytest.mark.skipif(not loopback_has_multicast(), reason="no multicast on loopback here")
def test_a_node_without_a_bootstrap_finds_the_mesh_on_the_lan(
    space: Workspace, shards_dir: Path
) -> None:
    cluster = ("--cluster", f"lan-{os.getpid()}")  # nobody else on this machine has it
    state = ("--state-dir", str(space.folder / "state"), "--listen-addr", "127.0.0.1")
    shown = {"LLAMA_NO_MDNS": "0"}
    bootstrap = Node(space.start("bootstrap", "--port", "0", *cluster, *state, variables=shown))
    bootstrap.wait_started()
    words = ("--shards-dir", str(shards_dir), "--shard-id", "1", "--threads", "1")
    node = Node(space.start("listen", *words, *cluster, *state, variables=shown))
    node.running.wait_line(rf"Found on the LAN: {bootstrap.peer_id}", START_TIMEOUT_S)
    node.wait_announced()
    status = space.run("status", "--json", *cluster)
    (shown_model,) = json.loads(status.out)
    assert [r["peer_id"] for r in shown_model["replicas"]] == [node.peer_id]


def test_files_come_into_a_home_behind_nat_and_out_of_it(space: Workspace, model: Path) -> None:
    """BitTorrent goes directly: one of the two must be dialable, whichever gives."""
    shards_dir = space.folder / "two"
    done = space.run("split", str(model), "--shards", "2", "--out", str(shards_dir))
    assert done.code == 0, done.err
    with homes_behind_nat() as network:
        in_public, in_home = (network.inside(n) for n in (network.public, network.homes[0]))
        state = ("--state-dir", str(space.folder / "state"))
        bootstrap = Node(space.start("bootstrap", "--port", "0", *state, inside=in_public))
        bootstrap.wait_started()
        where = ("--bootstrap", bootstrap.address, "--threads", "1", "--ctx-size", str(N_CTX))
        publish = ("publish", str(shards_dir), "--no-seed", "--bootstrap", bootstrap.address)
        done = space.run(*publish, *state, inside=in_public)
        assert done.code == 0, done.err
        link = done.out.strip()

        def listen(name: str, inside: Sequence[str], *more: str) -> Node:
            folders = ("--models-dir", str(space.folder / name))
            own = ("--state-dir", str(space.folder / name / "state"))
            return Node(space.start("listen", *more, *where, *folders, *own, inside=inside))

        home = listen("home", in_home, "--shard-id", "0", "--shards-dir", str(shards_dir))
        home.running.wait_line(r"\[REACH\] ✓ Reached through the relay", START_TIMEOUT_S)
        outside = listen("outside", in_public, "--model", link, "--shard-id", "1")
        outside.running.wait_line("✓ Shard 1 loaded", FETCH_TIMEOUT_S)
        home.running.end()
        second = listen("second", in_home, "--model", link, "--shard-id", "1")
        second.running.wait_line("✓ Shard 1 loaded", FETCH_TIMEOUT_S)
        for node in (second, outside, bootstrap):
            node.running.end()
