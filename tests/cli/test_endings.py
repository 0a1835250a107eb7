"""Signals that end a command: it cleans up first, and its exit code says which one it was."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest
from support.processes import Running, Workspace, workspace

from shardmesh.demo_model import DEMO_MODEL

TIMEOUT_S = 30.0
GONE_TIMEOUT_S = 2.0
CODE = """
import os, signal, sys
from shardmesh.cli.endings import Endings
{before}
endings = Endings()
endings.heed()
try:
    os.kill(os.getpid(), signal.{name})
except KeyboardInterrupt:
    sys.exit(endings.exit_code)
"""


def exit_code(name: str, before: str = "") -> int:
    code = CODE.format(name=name, before=before)
    return subprocess.run([sys.executable, "-c", code], timeout=TIMEOUT_S, check=False).returncode


AS_IN_A_TERMINAL = """
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
"""
"""The tests themselves may run behind nohup, whose children ignore what it ignores."""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_each_signal_interrupts_and_has_its_code(name: str, code: int) -> None:
    assert exit_code(name, AS_IN_A_TERMINAL) == code


def test_where_ctrl_c_is_ignored_a_signal_still_ends_it() -> None:
    ignored = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    assert exit_code("SIGTERM", ignored) == -signal.SIGTERM


def test_what_nohup_ignores_stays_ignored() -> None:
    assert exit_code("SIGHUP", "signal.signal(signal.SIGHUP, signal.SIG_IGN)") == 0


def wait_temporary_folder(space: Workspace, running: Running) -> None:
    """Until the command has begun to write what it must not leave behind."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not any((space.folder / "tmp").iterdir()):
        assert running.process.poll() is None
        assert time.monotonic() < deadline_s


@pytest.mark.processes
@pytest.mark.skipif(not DEMO_MODEL.exists(), reason="the demo model is not here")
def test_a_terminated_verify_leaves_no_copy_of_the_model() -> None:
    with workspace() as space:
        terminate_verify(space)


def terminate_verify(space: Workspace) -> None:
    running = space.start("verify", str(DEMO_MODEL))
    wait_temporary_folder(space, running)
    children = running.children()
    running.process.send_signal(signal.SIGTERM)
    assert running.wait_end() == 143, running.lines
    assert list((space.folder / "tmp").iterdir()) == []
    _, left = psutil.wait_procs(children, GONE_TIMEOUT_S)
    assert left == []
