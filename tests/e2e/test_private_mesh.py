"""A private mesh as its users and strangers see it: real processes."""

from __future__ import annotations

import json
import re
import stat
import time
from collections.abc import Iterator

import pytest
from support.processes import Finished, Node, Workspace, workspace

from shardmesh.swarm.cluster_files import ClusterFiles
from shardmesh.swarm.identity import new_identity
from shardmesh.wire.cluster_secret import new_secret

pytestmark = pytest.mark.processes

NO_SECRET = {"LLAMA_SECRET": ""}
SECRET_IN_A_LINE = r"shardmesh listen --cluster home --bootstrap (\S+) --secret (sm1_[\w-]+)$"


class Home:
    """The bootstrap of a mesh of its own making, with nothing else in it."""

    def __init__(self, space: Workspace) -> None:
        self.space = space
        self.state = space.folder / "state"
        self.node = self.start("home")
        found = self.node.running.wait_line(SECRET_IN_A_LINE)
        self.address, self.secret = found[1], found[2]
        self.where = ("--cluster", "home", "--bootstrap", self.address)

    def start(self, cluster: str, *options: str) -> Node:
        common = ("--listen-addr", "127.0.0.1", "--port", "0", "--cluster", cluster)
        state = ("--state-dir", str(self.state))
        node = Node(self.space.start("bootstrap", *common, *state, *options, variables=NO_SECRET))
        node.wait_started()
        return node

    def status(self, state: str, *options: str) -> Finished:
        """`shardmesh status` of a user with this state folder."""
        folder = ("--state-dir", str(self.space.folder / state))
        return self.space.run("status", *self.where, *folder, *options, variables=NO_SECRET)


@pytest.fixture(scope="module")
def home() -> Iterator[Home]:
    with workspace() as space:
        yield Home(space)


def test_the_secret_is_its_makers_alone(home: Home) -> None:
    path = ClusterFiles(home.state, "home").secret_path
    assert path.read_text().strip() == home.secret
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_on_the_machine_of_the_bootstrap_nothing_is_to_be_given(home: Home) -> None:
    done = home.status("state")
    assert (done.code, done.err) == (1, "")
    assert "Nobody in this mesh serves a shard" in done.out


def test_elsewhere_it_is_to_be_given_once(home: Home) -> None:
    assert "NO_SECRET" in home.status("elsewhere").err
    assert "Nobody" in home.status("elsewhere", "--secret", home.secret).out
    assert "Nobody" in home.status("elsewhere").out


@pytest.mark.parametrize("code", ["PRIVATE_MESH", "WRONG_SECRET"])
def test_a_stranger_gets_nowhere_quickly(home: Home, code: str) -> None:
    wrong = new_secret(new_identity().public_key).text()
    options = ("--public",) if code == "PRIVATE_MESH" else ("--secret", wrong)
    start_s = time.monotonic()
    home.status("state")
    member_s = time.monotonic() - start_s
    done = home.status("nowhere", *options)
    stranger_s = time.monotonic() - start_s - member_s
    assert done.code == 1
    assert f"Error [{code}]" in done.err
    assert "--secret" in done.err
    assert stranger_s < 2 * member_s + 5, "it does not wait for anything"
    assert "NO_SECRET" in home.status("nowhere").err, "a wrong secret is not kept"


def test_a_listener_with_a_wrong_secret_ends(home: Home) -> None:
    wrong = new_secret(new_identity().public_key).text()
    node = home.space.start(
        *("listen", "--shard-id", "0", "--listen-addr", "127.0.0.1", *home.where),
        *("--state-dir", str(home.space.folder / "stranger")),
        variables={"LLAMA_SECRET": wrong},
    )
    node.wait_line(r"Error \[WRONG_SECRET\]")
    assert node.wait_end() == 1


def test_logs_for_machines_hold_no_secret(home: Home) -> None:
    node = home.start("logged", "--log-format", "json")
    text = "\n".join(node.running.lines)
    assert "sm1_" not in text
    assert f"--secret-file {ClusterFiles(home.state, 'logged').secret_path}" in text


def test_a_public_mesh_says_what_that_means(home: Home) -> None:
    node = home.start("open", "--public")
    node.running.wait_line("whoever reaches it can join")
    line = next(line for line in node.running.lines if "shardmesh listen" in line)
    assert re.search(r"--public$", line)
    where = ("--cluster", "open", "--bootstrap", node.address)
    done = home.space.run("status", *where, "--public", variables=NO_SECRET)
    assert "Nobody in this mesh serves a shard" in done.out
    refused = home.space.run("status", *where, "--secret", home.secret, variables=NO_SECRET)
    assert "Error [PUBLIC_MESH]" in refused.err


def test_a_removed_member_stays_outside_and_the_others_inside(home: Home) -> None:
    """The last one: it changes the secret of the mesh that all share."""
    assert home.status("leaver", "--secret", home.secret).code == 1  # keeps it
    leaver = new_identity().peer_id
    where = (*home.where, "--state-dir", str(home.state))
    members = home.space.run("cluster", "members", "--json", *where, variables=NO_SECRET)
    assert [m["peer_id"] for m in json.loads(members.out)] == [home.node.peer_id]
    folder = ("--state-dir", str(home.space.folder / "leaver"))
    refused = home.space.run("cluster", "remove", leaver, *home.where, *folder, variables=NO_SECRET)
    assert "Error [NOT_OWNER]" in refused.err
    done = home.space.run("cluster", "remove", leaver, *where, variables=NO_SECRET)
    assert done.code == 0, done.err
    assert f"removed: {leaver}" in done.out
    home.node.running.wait_line("The cluster's owner has changed its secret")
    assert "Error [WRONG_SECRET]" in home.status("leaver").err
    assert "Nobody in this mesh" in home.status("state").out
    kept = home.space.run(
        "cluster", "secret", "--cluster", "home", "--state-dir", str(home.state)
    ).out.strip()
    assert kept != home.secret
    assert "Nobody in this mesh" in home.status("late", "--secret", kept).out
    assert kept not in "\n".join(home.node.running.lines)
