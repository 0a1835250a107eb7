"""`shardmesh demo`: one command from nothing to a text with a proof, and nothing left behind."""

from __future__ import annotations

import re
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.processes import COMMAND, Running, Workspace

from shardmesh.demo_model import DEMO_MODEL

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not DEMO_MODEL.exists(), reason="the demo model is not here"),
]

START_S = 60.0
HELP_CPU_S = 0.3
SLOW_MACHINE = 3  # times slower than promised is still no heavy import


@contextmanager
def nothing_left(space: Workspace, running: Running) -> Iterator[None]:
    """Checks that all processes and folders of a demo that runs now are gone at the end."""
    children = running.children()
    assert children
    yield
    left = [child for child in children if child.is_running()]
    assert left == []
    assert list((space.folder / "tmp").iterdir()) == []


@pytest.mark.slow
def test_it_writes_and_proves(space: Workspace) -> None:
    running = space.start("demo", "--max-tokens", "20", "--seed", "1")
    running.wait_line("listener 3 .*ready", START_S)
    with nothing_left(space, running):
        assert running.wait_end(START_S) == 0
    running.wait_line(r"^Once upon a time there was a king who \w+")
    running.wait_line(r"tokens through 4 stages in processes of their own")
    running.wait_line(r"✓ llama.cpp in one process writes the same \d+ tokens")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ended_in_the_middle_it_leaves_nothing(space: Workspace, number: signal.Signals) -> None:
    options = ("--shards", "2" if number == signal.SIGINT else "1", "--max-tokens", "480")
    running = space.start("demo", *options, "--seed", "1")
    running.wait_line(r"^Once upon a time there was a king who \w+", START_S)
    with nothing_left(space, running):
        if number == signal.SIGINT:
            running.interrupt()
        else:
            running.process.send_signal(number)
        assert running.wait_end() == 130


@pytest.mark.slow
def test_ended_while_it_starts_it_leaves_nothing(space: Workspace) -> None:
    running = space.start("demo", "--shards", "2")
    running.wait_line("cut into 2 shards", START_S)
    while len(running.children()) < 3:
        assert running.process.poll() is None
    with nothing_left(space, running):
        running.interrupt()
        assert running.wait_end() == 130


@pytest.mark.slow
def test_kept_it_prints_lines_that_work(space: Workspace) -> None:
    running = space.start("demo", "--shards", "2", "--max-tokens", "5", "--keep")
    lines = [
        shlex.split(running.wait_line(rf"^  shardmesh ({name} .+)$", START_S)[1])
        for name in ("status", "run")
    ]
    with nothing_left(space, running):
        status, run = space.run_all(*lines)
        assert (status.code, run.code) == (0, 0), status.err + run.err
        assert "pipeline complete" in status.out
        assert re.search(r"\w", run.out)
        running.interrupt()
        assert running.wait_end() == 130


def test_more_shards_than_layers_is_one_sentence(space: Workspace) -> None:
    done = space.run("demo", "--shards", "9")
    assert (done.code, done.is_one_sentence) == (2, True), done.err
    assert "9" in done.err
    assert "8" in done.err
    assert list((space.folder / "tmp").iterdir()) == []


def test_help_is_quick_and_imports_nothing_heavy(space: Workspace) -> None:
    before_s = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([*COMMAND, "--help"], check=True, capture_output=True, timeout=30)
    took_s = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before_s
    assert took_s < SLOW_MACHINE * HELP_CPU_S
    code = "import sys; sys.argv[1:] = ['--help']; from shardmesh.cli.main import group\n"
    code += "group.main(standalone_mode=False); print('imported', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=30)
    imported = done.stdout.decode().partition("imported ")[2].split()
    assert "shardmesh.cli.main" in imported
    assert not {"libp2p", "llama_cpp", "numpy", "trio"} & set(imported)
