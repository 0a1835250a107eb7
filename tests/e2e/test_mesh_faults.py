"""What users do to a mesh and what machines do to it: processes stopped, killed and back again.

The tests share a mesh of two listeners with an uneven cut, and each leaves it complete.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.asking import ask, complete_with, wait_no_sessions, wait_status
from support.processes import Finished, Mesh, Node, Running, start_bootstrap, start_mesh, workspace
from support.reference import N_TOKENS, PROMPT, Reference

pytestmark = [pytest.mark.processes, pytest.mark.slow]

GREEDY = ("--temperature", "0", "--max-tokens", str(N_TOKENS))
ERROR_WITHIN_S = 3.0
STATUS_WITHIN_S = 10.0
N_LAYERS = (5, 3)
N_CTX = 16384  # for runs that are still under way when something happens


@pytest.fixture(scope="module")
def pair(model: Path) -> Iterator[Mesh]:
    """Two listeners, layers [0, 5) and [5, 8), two sequences at once."""
    with workspace() as space:
        shards_dir = space.folder / "shards"
        layers = ",".join(str(n) for n in N_LAYERS)
        done = space.run("split", str(model), "--layers", layers, "--out", str(shards_dir))
        assert done.code == 0, done.err
        yield start_mesh(space, shards_dir, 2, "--ctx-size", str(N_CTX), "--parallel", "2")


@pytest.fixture
def long_run(pair: Mesh) -> Iterator[Running]:
    """A run that has begun to write and has much more to write."""
    running = start_long_run(pair)
    try:
        yield running
    finally:
        running.close()


def start_long_run(mesh: Mesh) -> Running:
    settings = ("--ignore-end", "--max-tokens", str(N_CTX), "--seed", "1", "--wait", "0.3")
    options = (*settings, *mesh.where)
    running = mesh.space.start("run", PROMPT, *options)
    running.wait_line(r"\w")
    return running


def assert_works(mesh: Mesh, references: dict[str, Reference]) -> None:
    done = mesh.space.run("run", PROMPT, *GREEDY, *mesh.where)
    assert (done.code, done.out) == (0, references[PROMPT].text + "\n"), done.err


def assert_fails_soon(running: Running, since_s: float, code: str) -> None:
    """The run ends with exit code 1 and an error with this code, and soon."""
    assert running.wait_end(ERROR_WITHIN_S + 2) == 1
    assert time.monotonic() - since_s < ERROR_WITHIN_S
    running.wait_line(rf"^Error \[{code}\]: \S", 1)
    running.wait_line("^  next step: run the prompt again", 1)


def wait_complete(mesh: Mesh) -> None:
    peer_ids = [node.peer_id for node in mesh.listeners]
    wait_status(mesh, complete_with(*peer_ids), STATUS_WITHIN_S)


def status(mesh: Mesh) -> Finished:
    return mesh.space.run("status", "--json", *mesh.where)


def start_again(mesh: Mesh, shard_id: int) -> Node:
    """Starts the listener of a shard that is gone, with the state it had."""
    node = mesh.listen(shard_id, "--ctx-size", str(N_CTX), "--parallel", "2")
    mesh.listeners[shard_id] = node
    return node


def test_an_uneven_cut_writes_the_same(pair: Mesh, references: dict[str, Reference]) -> None:
    assert_works(pair, references)


def test_more_runs_than_sequences_are_told_so(pair: Mesh) -> None:
    busy = [start_long_run(pair) for _ in range(2)]
    done = pair.space.run("run", PROMPT, *GREEDY, *pair.where)
    assert (done.code, done.out, done.is_one_sentence) == (1, "", True), done.err
    assert "[BUSY]" in done.err
    for running in busy:
        running.interrupt()
        assert running.wait_end(3) == 130, running.lines()
    wait_no_sessions(pair)


def test_a_reader_that_goes_away_is_no_failure_of_the_mesh(pair: Mesh) -> None:
    options = ("--ignore-end", "--max-tokens", str(N_CTX), *pair.where)
    for words in (("run", PROMPT, *options), ("status", *pair.where)):
        done = pair.space.run_unread(*words)
        assert (done.code, done.err) == (1, "")
    wait_no_sessions(pair)


def test_unloaded_and_loaded_again(pair: Mesh, references: dict[str, Reference]) -> None:
    peer = pair.listeners[1].address
    unloaded = pair.space.run("command", peer, "UNLOAD_SHARD", *pair.where)
    assert (unloaded.code, json.loads(unloaded.out)) == (0, {"shard_loaded": False})
    incomplete = status(pair)
    assert incomplete.code == 1
    assert json.loads(incomplete.out)[0]["missing"] == [[5, 8]]
    refused = pair.space.run("run", PROMPT, *GREEDY, *pair.where)
    assert (refused.code, refused.out, refused.is_one_sentence) == (1, "", True), refused.err
    assert "[INCOMPLETE_MESH]" in refused.err
    assert "[5, 8)" in refused.err
    loaded = pair.space.run("command", peer, "LOAD_SHARD", '{"shard_id": 1}', *pair.where)
    assert loaded.code == 0, loaded.err
    assert json.loads(loaded.out)["shard_loaded"] is True
    wait_complete(pair)
    assert_works(pair, references)


def test_a_killed_data_process_is_started_again(
    pair: Mesh, long_run: Running, references: dict[str, Reference]
) -> None:
    node = pair.listeners[1]
    n_lines = len(node.running.lines)
    killed = node.running.data_process()
    since_s = time.monotonic()
    killed.kill()
    assert_fails_soon(long_run, since_s, "STAGE_LOST")
    node.running.wait_line(r"ended by SIGKILL; starting it again", 3, since=n_lines)
    node.running.wait_line(r"Shard 1 loaded", since=n_lines)
    node.running.wait_line(r"Announced shard 1", since=n_lines)
    assert node.running.data_process().pid != killed.pid
    wait_complete(pair)
    wait_no_sessions(pair)
    assert_works(pair, references)
    assert ask(pair, "GET_METRICS")[1]["n_data_process_restarts"] == 1


def test_a_killed_listener_is_missed_and_comes_back(
    pair: Mesh, long_run: Running, references: dict[str, Reference]
) -> None:
    node = pair.listeners[0]
    peer_id, data_process = node.peer_id, node.running.data_process()
    since_s = time.monotonic()
    node.running.process.kill()
    assert_fails_soon(long_run, since_s, "(STAGE_LOST|NODE_LEAVING)")  # its data process may tell
    wait_status(
        pair,
        lambda models: bool(models) and models[0].missing == ((0, 5),),
        STATUS_WITHIN_S - (time.monotonic() - since_s),
    )
    assert data_process.wait(3) is not None or not data_process.is_running()
    incomplete = status(pair)
    assert (incomplete.code, json.loads(incomplete.out)[0]["missing"]) == (1, [[0, 5]])
    again = start_again(pair, 0)
    again.wait_announced()
    assert again.peer_id == peer_id
    wait_complete(pair)
    assert_works(pair, references)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_listener_that_leaves_says_so(
    pair: Mesh, long_run: Running, number: signal.Signals
) -> None:
    node = pair.listeners[1]
    peer_id, children = node.peer_id, node.running.children()
    since_s = time.monotonic()
    code, took_s = node.running.end(number)
    assert (code, took_s < ERROR_WITHIN_S) == (0, True)
    assert not any(psutil.pid_exists(child.pid) for child in children)
    assert_fails_soon(long_run, since_s, "(NODE_LEAVING|STAGE_LOST)")
    # The record was withdrawn: neither is the node listed as silent nor does it take time.
    left = json.loads(status(pair).out)
    assert [replica["peer_id"] for replica in left[0]["replicas"]] == [pair.listeners[0].peer_id]
    again = start_again(pair, 1)
    again.wait_announced()
    assert again.peer_id == peer_id
    wait_complete(pair)


def test_without_its_bootstrap_the_mesh_goes_on(
    pair: Mesh, long_run: Running, references: dict[str, Reference]
) -> None:
    bootstrap = pair.bootstrap
    port, peer_id = bootstrap.port, bootstrap.peer_id
    n_lines = [len(node.running.lines) for node in pair.listeners]
    bootstrap.running.process.kill()
    bootstrap.running.wait_end()
    for node, since in zip(pair.listeners, n_lines, strict=True):
        node.running.wait_line("Connection to the bootstrap node lost", since=since)
    assert long_run.process.poll() is None
    # Any node is an entry point.
    through_node = ("--cluster", pair.cluster, "--shards-dir", str(pair.shards_dir))
    entry = ("--bootstrap", pair.listeners[0].address)
    done = pair.space.run("run", PROMPT, *GREEDY, *through_node, *entry)
    assert (done.code, done.out) == (0, references[PROMPT].text + "\n"), done.err
    # A node that was here before finds its way back through those that it remembers.
    assert long_run.process.poll() is None
    long_run.interrupt()
    assert long_run.wait_end(3) == 130
    code, _ = pair.listeners[1].running.end()
    assert code == 0
    again = start_again(pair, 1)
    again.running.wait_line("Joined through a remembered node")
    again.wait_announced()
    # The bootstrap comes back with its identity, and all find it again.
    n_lines = [len(node.running.lines) for node in pair.listeners]
    pair.bootstrap = start_bootstrap(pair.space, pair.cluster, port=port)
    assert pair.bootstrap.peer_id == peer_id
    for node, since in zip(pair.listeners, n_lines, strict=True):
        node.running.wait_line(rf"Connection established! {peer_id}", since=since)
    wait_complete(pair)
    assert_works(pair, references)
