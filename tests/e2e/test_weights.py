"""Weights travel: one node has the model, the others have nothing but its link."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from support.asking import ask, complete_with, wait_status
from support.processes import (
    COMMAND,
    START_TIMEOUT_S,
    Mesh,
    Node,
    Running,
    Workspace,
    start_bootstrap,
    workspace,
)
from support.reference import N_CTX, N_TOKENS, PROMPT, Reference

from shardmesh.shards.manifest import read_manifest

pytestmark = [pytest.mark.processes, pytest.mark.slow]

FETCH_TIMEOUT_S = 90.0
GREEDY = ("--temperature", "0", "--max-tokens", str(N_TOKENS))


class Weights:
    """A published model, a mesh around it, and the link."""

    def __init__(self, space: Workspace, model: Path) -> None:
        self.space = space
        self.shards_dir = space.folder / "shards"
        done = space.run("split", str(model), "--shards", "4", "--out", str(self.shards_dir))
        assert done.code == 0, done.err
        self.manifest = read_manifest(self.shards_dir / "manifest.json")
        self.mesh = Mesh(space, "weights", self.shards_dir, start_bootstrap(space, "weights"))
        done = space.run("publish", str(self.shards_dir), "--no-seed", *self.options("publisher"))
        assert done.code == 0, done.err
        self.link = done.out.strip()

    def options(self, name: str) -> tuple[str, ...]:
        """Those of a machine of its own: state, models and the mesh."""
        folder = self.space.folder / name
        return (
            *("--state-dir", str(folder / "state"), "--models-dir", str(folder / "models")),
            *("--listen-addr", "127.0.0.1", *self.mesh.member),
        )

    def listen(self, name: str, *more: str) -> Node:
        """A listener on a machine of its own."""
        settings = ("--threads", "1", "--ctx-size", str(N_CTX))
        node = Node(self.space.start("listen", *self.options(name), *settings, *more))
        self.mesh.listeners.append(node)
        return node

    def folder(self, name: str) -> Path:
        """Where a machine that was given the link keeps the model."""
        (folder,) = (self.space.folder / name / "models").iterdir()
        return folder


@pytest.fixture(scope="module")
def weights(model: Path) -> Iterator[Weights]:
    """Four listeners: the first has all shards, the others got theirs by the link."""
    with workspace() as space:
        made = Weights(space, model)
        made.listen("m0", "--shard-id", "0", "--shards-dir", str(made.shards_dir))
        for shard_id in (1, 2, 3):
            made.listen(f"m{shard_id}", "--model", made.link, "--shard-id", str(shard_id))
        yield made


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_link_is_short_and_complete(weights: Weights) -> None:
    assert re.fullmatch(r"shardmesh:[\w%.-]+\?m=\w{64}&k=\w{64}(&b=/[\w./]+)+", weights.link)
    assert weights.manifest.digest() in weights.link
    assert weights.mesh.bootstrap.peer_id in weights.link
    key = weights.space.folder / "publisher" / "state" / "publisher.key"
    assert key.stat().st_mode & 0o077 == 0


def test_nodes_without_anything_come_to_a_complete_pipeline_and_answer_exactly(
    weights: Weights, references: dict[str, Reference]
) -> None:
    mesh = weights.mesh
    for node, shard_id in zip(mesh.listeners[1:], (1, 2, 3), strict=True):
        node.running.wait_line(rf"ASSIGNED SHARD {shard_id} NOT FOUND LOCALLY", START_TIMEOUT_S)
        node.running.wait_line(rf"✓ shard-{shard_id}\.gguf is here, whole", FETCH_TIMEOUT_S)
        node.running.wait_line(rf"✓ Shard {shard_id} loaded", FETCH_TIMEOUT_S)
    wait_status(mesh, complete_with(*(node.peer_id for node in mesh.listeners)), 60)
    done = mesh.space.run("run", PROMPT, *GREEDY, *mesh.where)
    assert (done.code, done.out) == (0, references[PROMPT].text + "\n"), done.err


def test_each_has_its_own_shard_and_no_other(weights: Weights) -> None:
    for shard_id in (1, 2, 3):
        folder = weights.folder(f"m{shard_id}")
        names = {path.name for path in folder.glob("*.gguf")}
        assert names == {f"shard-{shard_id}.gguf", "tokenizer.gguf"}
        expected = weights.manifest.shards[shard_id].sha256
        assert sha256(folder / f"shard-{shard_id}.gguf") == expected
        assert not (folder / ".partial").exists()


def test_list_files_tells_all_four_with_info_hash_and_size(weights: Weights) -> None:
    answers = ask(weights.mesh, "LIST_FILES")
    first = {file["name"]: file for file in answers[0]["files"]}
    assert set(first) == {f"shard-{i}.gguf" for i in range(4)} | {"tokenizer.gguf"}
    for shard in weights.manifest.shards:
        file = first[f"shard-{shard.shard_id}.gguf"]
        assert (file["n_bytes"], file["sha256"]) == (shard.n_bytes, shard.sha256)
        assert (len(file["info_hash"]), file["share_complete"]) == (64, 1.0)
    for shard_id, answer in enumerate(answers[1:], 1):
        theirs = {file["name"]: file["info_hash"] for file in answer["files"]}
        name = f"shard-{shard_id}.gguf"
        assert theirs[name] == first[name]["info_hash"]


def test_torrents_are_registered_in_the_dht(weights: Weights) -> None:
    for shard_id, node in enumerate(weights.mesh.listeners):
        node.running.wait_line(
            rf"\[TORRENT\] ✓ Registered torrent file in DHT: shard-{shard_id}\.gguf", 60
        )


def test_load_shard_of_one_that_is_not_there(weights: Weights) -> None:
    """NODE_JOIN's proof, and the file is then given to others, too."""
    node = weights.listen("m4", "--model", weights.link, "--shard-id", "2")
    node.running.wait_line("✓ Shard 2 loaded", FETCH_TIMEOUT_S)
    done = weights.space.run(
        "command", node.peer_id, "LOAD_SHARD", '{"shard_id": 0}', *weights.mesh.where
    )
    assert done.code == 0, done.err
    assert json.loads(done.out)["shard_loaded"] is True
    assert sha256(weights.folder("m4") / "shard-0.gguf") == weights.manifest.shards[0].sha256
    metrics = ask(weights.mesh, "GET_METRICS")[-1]
    states = {d["file_name"]: d["state"] for d in metrics["downloads"]}
    assert states["shard-0.gguf"] == "done"
    assert metrics["torrents"]["n_files"] >= 1


def test_another_key_in_the_link_is_refused(weights: Weights) -> None:
    forged = re.sub(r"&k=\w{64}", "&k=" + "ab" * 32, weights.link)
    done = weights.space.run("pull", forged, "--timeout", "6", *weights.options("forged"))
    assert done.code == 1
    assert "NO_SOURCE" in done.err
    assert "WRONG_PUBLISHER" in done.err
    assert not list((weights.space.folder / "forged").rglob("*.gguf"))


def test_pull_ls_and_rm(weights: Weights) -> None:
    options = weights.options("puller")
    done = weights.space.run("pull", weights.link, "--shard", "3", *options, timeout_s=120)
    assert done.code == 0, done.err
    where = ("--models-dir", str(weights.space.folder / "puller" / "models"))
    listed = json.loads(weights.space.run("ls", "--json", *where).out)
    assert [(m["shards_here"], m["n_shards"], m["unfinished"]) for m in listed] == [([3], 4, [])]
    name = weights.manifest.model_name
    assert name.split()[0] in weights.space.run("ls", *where).out
    absent = weights.space.run("rm", name, "--shard", "3", "--shard", "2", "-y", *where)
    assert absent.code == 2
    assert "does not have shard 2\n" in absent.err
    assert weights.space.run("rm", name, "-y", *where).code == 0
    assert list((weights.space.folder / "puller" / "models").iterdir()) == []
    assert weights.space.run("rm", name, "-y", *where).code == 2


def test_what_has_no_room_is_not_begun(weights: Weights) -> None:
    limit = ("--max-disk", "100000")
    done = weights.space.run("pull", weights.link, *limit, *weights.options("small"), timeout_s=60)
    assert done.code == 2
    n_bytes = sum(f.n_bytes for f in (*weights.manifest.shards, weights.manifest.tokenizer))
    assert f"{n_bytes:,} bytes are needed, --max-disk of 100,000 bytes leaves 100,000" in done.err
    assert not list((weights.space.folder / "small").rglob("*.gguf"))


def test_a_terminal_shows_bars_and_a_log_lines(weights: Weights) -> None:
    slow = ("--shard", "2", "--download-rate", "1M")
    command = ("pull", weights.link, *slow)
    piped = weights.space.start(*command, *weights.options("piped"))
    drawn = on_terminal(weights.space, *command, *weights.options("drawn"))
    assert re.search(r"shard-2\.gguf .*\d+% .*MB, .*/s, \d:\d\d left, \d+ sources?", drawn)
    assert "[TORRENT] ↓" not in drawn
    assert piped.wait_end(FETCH_TIMEOUT_S) == 0
    assert any("[TORRENT] ↓ Fetching shard-2.gguf of" in line for line in piped.lines)
    assert "━" not in "".join(piped.lines)


def on_terminal(space: Workspace, *arguments: str) -> str:
    """What a command writes on a terminal of 120 columns until its end, without escape codes."""
    reading, writing = pty.openpty()
    try:
        fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))
        process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=writing,
            stderr=writing,
            cwd=space.folder,
            env={**space.environment, "TERM": "xterm", "COLUMNS": "120"},
        )
    finally:
        os.close(writing)
    written = b""
    try:
        while data := os.read(reading, 65536):
            written += data
    except OSError:  # how a terminal says that nobody writes any more
        pass
    finally:
        os.close(reading)
        process.kill()
        process.wait()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode("utf-8", "replace"))


def test_killed_in_the_middle_it_goes_on(weights: Weights) -> None:
    """kill -9 of `pull`: what is there and right is not fetched again."""
    options = weights.options("killed")
    slow = (*options, "--download-rate", "500K")
    first = weights.space.start("pull", weights.link, "--shard", "1", *slow)
    partial_path = wait_for(lambda: partial_of(weights.space.folder / "killed"))
    wait_for(lambda: partial_path.stat().st_blocks * 512 > 1_000_000)
    first.process.send_signal(signal.SIGKILL)
    first.wait_end()
    kept = partial_path.stat().st_blocks * 512
    assert kept > 1_000_000
    done = weights.space.run("pull", weights.link, "--shard", "1", *options, timeout_s=120)
    assert done.code == 0, done.err
    expected = weights.manifest.shards[1].sha256
    assert sha256(weights.folder("killed") / "shard-1.gguf") == expected


def partial_of(folder: Path) -> Path | None:
    """The unfinished shard 1 of a machine, as soon as there is one."""
    return next(folder.glob("models/*/.partial/*/shard-1.gguf"), None)


def wait_for(condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """What the condition gives once it is true."""

    async def run() -> Any:
        with trio.fail_after(timeout_s):
            while not (found := condition()):  # noqa: ASYNC110 - nobody tells of a file
                await trio.sleep(0.05)
        return found

    return trio.run(run)


def test_a_flipped_bit_is_mended_before_the_shard_is_loaded(weights: Weights) -> None:
    node = weights.mesh.listeners[3]
    node.running.wait_line("✓ Shard 3 loaded", FETCH_TIMEOUT_S)
    folder = weights.folder("m3")
    node.running.end()
    data = bytearray((folder / "shard-3.gguf").read_bytes())
    data[len(data) // 2] ^= 4
    (folder / "shard-3.gguf").write_bytes(data)
    again: Running = weights.listen("m3", "--model", weights.link, "--shard-id", "3").running
    again.wait_line("does not have the SHA-256 of the manifest", START_TIMEOUT_S)
    again.wait_line("✓ Shard 3 loaded", FETCH_TIMEOUT_S)
    assert sha256(folder / "shard-3.gguf") == weights.manifest.shards[3].sha256
