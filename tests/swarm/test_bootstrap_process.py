"""`shardmesh bootstrap` as a user runs it: a process of its own."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path

import pytest
import trio

from shardmesh.swarm.admission import Admission
from shardmesh.swarm.cluster_files import ClusterFiles
from shardmesh.swarm.commands import get_metrics, send_command
from shardmesh.swarm.host import ConnectionEvent, Host, open_host
from shardmesh.swarm.identity import new_identity
from shardmesh.wire.cluster_secret import new_secret
from shardmesh.wire.limits import PING_INTERVAL_S

pytestmark = pytest.mark.processes

START_TIMEOUT_S = 30
SECRET = new_secret(new_identity().public_key)
COMMAND = (sys.executable, "-m", "shardmesh", "bootstrap", "--listen-addr", "127.0.0.1")
ADDRESS = re.compile(r"--bootstrap (/ip4/127\.0\.0\.1/tcp/(\d+)/p2p/(\w+))")


class Bootstrap:
    """A running process and the lines that it has printed up to being ready."""

    def __init__(self, process: subprocess.Popen[str], lines: list[str]) -> None:
        self.process = process
        self.lines = lines
        match = ADDRESS.search("\n".join(lines))
        assert match is not None, lines
        self.address, self.port, self.peer_id = match[1], int(match[2]), match[3]

    def end(self, number: signal.Signals) -> tuple[int, float]:
        """Exit code and how long it took."""
        start_s = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(10), time.monotonic() - start_s


@contextmanager
def bootstrap(state_dir: Path, *options: str) -> Iterator[Bootstrap]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_")}
    environment["LLAMA_SECRET"] = SECRET.text()
    process = subprocess.Popen(
        [*COMMAND, "--state-dir", str(state_dir), *(options or ("--port", "0"))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=state_dir,
    )
    assert process.stdout is not None
    try:
        lines: list[str] = []
        for line in process.stdout:  # ends with the process; pytest-timeout bounds the rest
            lines.append(line.rstrip())
            if "Bootstrap node started" in line:
                break
        yield Bootstrap(process, lines)
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


def a_member(ping_interval_s: float = PING_INTERVAL_S) -> AbstractAsyncContextManager[Host]:
    return open_host(
        new_identity(),
        listen_host="127.0.0.1",
        admission=Admission(SECRET),
        ping_interval_s=ping_interval_s,
    )


def closed_events(host: Host) -> trio.MemoryReceiveChannel[ConnectionEvent]:
    send, receive = trio.open_memory_channel[ConnectionEvent](10)

    def note(event: ConnectionEvent) -> None:
        if event.kind == "closed":
            send.send_nowait(event)

    host.on_connection(note)
    return receive


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_leaves_at_a_signal_within_three_seconds(
    tmp_path: Path, number: signal.Signals
) -> None:
    with bootstrap(tmp_path) as running:
        async with a_member() as host:
            assert await host.connect([running.address], 10) == running.peer_id
            code, took_s = await trio.to_thread.run_sync(running.end, number)
        assert (code, took_s < 3) == (0, True)


async def test_it_answers_commands(tmp_path: Path) -> None:
    with bootstrap(tmp_path) as running:
        async with a_member() as host:
            await host.connect([running.address.partition("/p2p/")[0]], 10)
            answer = await send_command(host, running.peer_id, "GET_CAPABILITIES")
            assert (answer["role"], answer["peer_id"]) == ("bootstrap", running.peer_id)
            assert (await get_metrics(host, running.peer_id))["n_connected_nodes"] == 1


def test_it_keeps_its_identity(tmp_path: Path) -> None:
    with bootstrap(tmp_path) as first:
        first.end(signal.SIGTERM)
    with bootstrap(tmp_path, "--port", str(first.port)) as second:
        assert second.address == first.address


def test_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    with bootstrap(tmp_path) as running:
        error = refusal("--state-dir", str(tmp_path / "other"), "--port", str(running.port))
    assert f"port {running.port} on 127.0.0.1 is not free" in error
    assert "--port" in error


def test_two_do_not_share_an_identity_nor_one_the_secret_of_the_other(tmp_path: Path) -> None:
    with bootstrap(tmp_path):
        options = ("--state-dir", str(tmp_path), "--port", "0")
        error = refusal(*options, "--secret", new_secret(new_identity().public_key).text())
        assert ClusterFiles(tmp_path, "llama-cluster").secret() == SECRET
    assert "STATE_IN_USE" in error
    assert "--identity-file or --state-dir" in error


def refusal(*options: str) -> str:
    """What a bootstrap says that cannot start."""
    other = subprocess.run(
        [*COMMAND, *options], capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False
    )
    assert other.returncode == 2
    assert "Traceback" not in other.stderr
    return other.stderr


def test_lines_for_others_can_be_pasted(tmp_path: Path) -> None:
    with bootstrap(tmp_path, "--port", "0", "--cluster", "at $HOME; 'all'") as running:
        (line,) = [line for line in running.lines if line.startswith("  shardmesh listen")]
    assert shlex.split(line)[:4] == ["shardmesh", "listen", "--cluster", "at $HOME; 'all'"]


def test_json_lines(tmp_path: Path) -> None:
    with bootstrap(tmp_path, "--port", "0", "--log-format", "json") as running:
        for line in running.lines:
            assert {"ts", "level", "logger", "message"} <= set(json.loads(line))


async def test_killed_neighbour_is_noticed_at_once(tmp_path: Path) -> None:
    with bootstrap(tmp_path) as running:
        async with a_member() as host:
            closed = closed_events(host)
            await host.connect([running.address], 10)
            running.process.kill()
            with trio.fail_after(2):
                event = await closed.receive()
            assert (event.peer_id, event.cause) == (
                running.peer_id,
                "closed by the other side or lost",
            )


async def test_stopped_neighbour_is_noticed_by_a_ping_and_dialed_again_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardmesh.swarm.connections.PING_TIMEOUT_S", 1)
    with bootstrap(tmp_path) as running:
        async with a_member(ping_interval_s=0.5) as host:
            closed = closed_events(host)
            await host.connect([running.address], 10)
            running.process.send_signal(signal.SIGSTOP)
            with trio.fail_after(10):
                event = await closed.receive()
            assert event.cause == "no answer to a ping within 1 s"
            assert host.connected() == []
            running.process.send_signal(signal.SIGCONT)
            host.learn(running.peer_id, [running.address])
            answer = await send_command(host, running.peer_id, "GET_CAPABILITIES")
            assert answer["role"] == "bootstrap"
