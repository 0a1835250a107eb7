"""The data process while it is being started, which takes most of a second of imports."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

END_TIMEOUT_S = 30.0


@pytest.mark.processes
def test_ctrl_c_leaves_its_end_to_the_control_process() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "shardmesh.listener.data_process"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        for line in process.stderr:
            if line.rstrip().endswith(b" psutil"):  # many more are to come
                break
        process.send_signal(signal.SIGINT)
        process.stdin.close()
        rest = process.stderr.read()
        assert process.wait(END_TIMEOUT_S) == 0, rest[-2000:]
