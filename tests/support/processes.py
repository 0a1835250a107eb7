"""Real processes of Shardmesh on loopback, started as a user starts them and always seen out."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from shardmesh.swarm.identity import new_identity
from shardmesh.wire.cluster_secret import new_secret

COMMAND = (sys.executable, "-m", "shardmesh")
START_TIMEOUT_S = 60.0  # a machine with little to spare imports libp2p five times at once
LINE_TIMEOUT_S = 30.0
COMMAND_TIMEOUT_S = 60.0
END_TIMEOUT_S = 10.0


@dataclasses.dataclass(frozen=True)
class Finished:
    """What a command has left behind."""

    code: int
    out: str
    err: str

    @property
    def is_one_sentence(self) -> bool:
        """Whether it failed as it should: a sentence with a code, and perhaps a next step.

        Lines before it may tell what was tried on the network meanwhile.
        """
        tried = r"(\[(CONNECT|DHT|SHARD)\] ✗ .+\n)*"
        failed = r"Error \[[A-Z_]+\]: \S.*\n(  next step: .+\n)?"
        return bool(re.fullmatch(tried + failed, self.err))


class Running:
    """A started process and the lines that it has printed so far."""

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        inside: Sequence[str] = (),
        command: Sequence[str] = COMMAND,
    ) -> None:
        """`inside` stands before the command, to run it in a network namespace."""
        self.arguments = arguments
        # A session of its own, so that a signal to its group is Ctrl-C in its terminal.
        self.process = subprocess.Popen(
            [*inside, *command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        self._text = b""
        self._is_over = False
        self._changed = threading.Condition()  # reentrant
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def lines(self) -> list[str]:
        """What it has printed, without escape codes; the last line may not be whole."""
        with self._changed:
            text = self._text.decode("utf-8", "replace")
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).splitlines()

    def wait_line(
        self, pattern: str, timeout_s: float = LINE_TIMEOUT_S, *, since: int = 0
    ) -> re.Match[str]:
        """The first match in a line, now or to come, be it still without an end.

        `since` leaves out that many lines.
        """
        match = self.line_within(pattern, timeout_s, since=since)
        assert match is not None, f"no {pattern!r} in {self.arguments}:\n" + "\n".join(self.lines)
        return match

    def line_within(
        self, pattern: str, timeout_s: float, *, since: int = 0
    ) -> re.Match[str] | None:
        """As `wait_line`, but None after the timeout or at the end of the process."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while True:
                for line in self.lines[since:]:
                    if match := re.search(pattern, line):
                        return match
                remaining_s = deadline_s - time.monotonic()
                if self._is_over or remaining_s <= 0:
                    return None
                self._changed.wait(remaining_s)

    @property
    def n_printed(self) -> int:
        """Bytes that it has printed so far."""
        with self._changed:
            return len(self._text)

    def wait_more(self, n_printed: int, timeout_s: float) -> None:
        """Waits until it has printed more than so many bytes."""
        with self._changed:
            has_more = self._changed.wait_for(lambda: len(self._text) > n_printed, timeout_s)
        assert has_more, f"nothing more from {self.arguments}:\n" + "\n".join(self.lines)

    def children(self) -> list[psutil.Process]:
        """All its living descendants."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def data_process(self) -> psutil.Process:
        """The one child of a listener."""
        (child,) = self.children()
        return child

    def interrupt(self) -> None:
        """Ctrl-C: SIGINT to it and to all that it has started."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait_end(self, timeout_s: float = END_TIMEOUT_S) -> int:
        """Its exit code, after all its output is read."""
        code = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        if self.process.stdout is not None and not self._reader.is_alive():
            self.process.stdout.close()
        return code

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, float]:
        """Exit code and how long it took to go."""
        start_s = time.monotonic()
        self.process.send_signal(number)
        code = self.process.wait(END_TIMEOUT_S)
        took_s = time.monotonic() - start_s
        self._reader.join(END_TIMEOUT_S)
        return code, took_s

    def close(self) -> None:
        """Whatever happened: it and its descendants are gone."""
        children = self.children()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(END_TIMEOUT_S)
        for child in children:
            if child.is_running():
                child.kill()
        psutil.wait_procs(children, END_TIMEOUT_S)
        self._reader.join(END_TIMEOUT_S)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def _read(self) -> None:
        if self.process.stdout is None:
            return
        while data := os.read(self.process.stdout.fileno(), 65536):
            with self._changed:
                self._text += data
                self._changed.notify_all()
        with self._changed:
            self._is_over = True
            self._changed.notify_all()


class Workspace:
    """A folder with homes and one secret for all that is started in it; made by `workspace`."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.started: list[Running] = []
        self.secret = new_secret(new_identity().public_key)
        self._stack = stack
        for name in ("home", "cache", "data", "tmp"):
            (folder / name).mkdir()
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("LLAMA_", "XDG_"))}
        self.environment = {
            **kept,
            "HOME": str(folder / "home"),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "XDG_DATA_HOME": str(folder / "data"),
            "TMPDIR": str(folder / "tmp"),
            "COLUMNS": "200",
            "LLAMA_SECRET": self.secret.text(),
            "LLAMA_NO_MDNS": "1",  # the tests of others on this network are not concerned
        }

    def start(
        self,
        *arguments: str,
        variables: Mapping[str, str] | None = None,
        inside: Sequence[str] = (),
        command: Sequence[str] = COMMAND,
    ) -> Running:
        """Starts a command that stays; it is ended with the workspace at the latest."""
        environment = {**self.environment, **(variables or {})}
        running = Running(arguments, self.folder, environment, inside, command)
        self.started.append(running)
        self._stack.callback(running.close)
        return running

    def run(
        self,
        *arguments: str,
        input_text: str = "",
        variables: Mapping[str, str] | None = None,
        timeout_s: float = COMMAND_TIMEOUT_S,
        inside: Sequence[str] = (),
    ) -> Finished:
        """Runs a command to its end; a traceback is never right."""
        done = subprocess.run(
            [*inside, *COMMAND, *arguments],
            input=input_text.encode(),
            capture_output=True,
            timeout=timeout_s,
            cwd=self.folder,
            env={**self.environment, **(variables or {})},
            check=False,
        )
        finished = Finished(done.returncode, done.stdout.decode(), done.stderr.decode())
        assert "Traceback" not in finished.err, finished.err
        return finished

    def run_unread(self, *arguments: str) -> Finished:
        """Runs a command whose output nobody takes, as in `| head -c 0`."""
        reading, writing = os.pipe()
        os.close(reading)
        try:
            done = subprocess.run(
                [*COMMAND, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=subprocess.PIPE,
                timeout=COMMAND_TIMEOUT_S,
                cwd=self.folder,
                env=self.environment,
                check=False,
            )
        finally:
            os.close(writing)
        return Finished(done.returncode, "", done.stderr.decode())

    def run_all(self, *commands: Sequence[str]) -> list[Finished]:
        """Several commands at the same time."""
        results: dict[int, Finished] = {}

        def run(number: int, arguments: Sequence[str]) -> None:
            results[number] = self.run(*arguments)

        threads = [threading.Thread(target=run, args=item) for item in enumerate(commands)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(COMMAND_TIMEOUT_S + END_TIMEOUT_S)
        return [results[number] for number in range(len(commands))]


@contextmanager
def workspace() -> Iterator[Workspace]:
    """A workspace in a folder of its own; at the end its processes and the folder are gone."""
    with tempfile.TemporaryDirectory(prefix="shardmesh-test-") as folder, ExitStack() as stack:
        space = Workspace(Path(folder), stack)
        yield space
        stack.close()
        for running in space.started:
            assert not any("Traceback" in line for line in running.lines), "\n".join(running.lines)


class Node:
    """A bootstrap or a listener in a process of its own."""

    def __init__(self, running: Running) -> None:
        self.running = running

    @property
    def peer_id(self) -> str:
        return self.running.wait_line(r"Peer ID: (\w+)", START_TIMEOUT_S)[1]

    @property
    def address(self) -> str:
        """Where it listens, with its peer id."""
        found = self.running.wait_line(r"Listening on: (/ip4/[\d.]+/tcp/\d+)", START_TIMEOUT_S)[1]
        return f"{found}/p2p/{self.peer_id}"

    @property
    def port(self) -> int:
        return int(self.address.split("/")[4])

    def wait_started(self) -> None:
        self.running.wait_line("✅", START_TIMEOUT_S)

    def wait_announced(self) -> None:
        self.running.wait_line("Announced shard", START_TIMEOUT_S)


@dataclasses.dataclass
class Mesh:
    """A bootstrap and listeners on loopback."""

    space: Workspace
    cluster: str
    shards_dir: Path
    bootstrap: Node
    listeners: list[Node] = dataclasses.field(default_factory=list)

    @property
    def where(self) -> tuple[str, ...]:
        """The options of a client of this mesh that runs on the machine of the shards."""
        return (*self.member, "--shards-dir", str(self.shards_dir))

    @property
    def member(self) -> tuple[str, ...]:
        return ("--cluster", self.cluster, "--bootstrap", self.bootstrap.address)

    def listen(self, shard_id: int | None, *options: str) -> Node:
        """Starts one more listener, for the shard that is served least if none is named."""
        chosen = () if shard_id is None else ("--shard-id", str(shard_id))
        state = ("--state-dir", str(self.space.folder / "state"), "--listen-addr", "127.0.0.1")
        running = self.space.start(
            "listen", *chosen, *self.where, *state, "--threads", "1", *options
        )
        return Node(running)

    def wait_ready(self) -> None:
        for listener in self.listeners:
            listener.wait_started()
            listener.wait_announced()


def start_bootstrap(space: Workspace, cluster: str, *, port: int = 0) -> Node:
    """A bootstrap that is up; with a port it is the one of an earlier start, identity and all."""
    state = ("--state-dir", str(space.folder / "state"), "--cluster", cluster)
    node = Node(space.start("bootstrap", "--listen-addr", "127.0.0.1", "--port", str(port), *state))
    node.wait_started()
    return node


def start_mesh(space: Workspace, shards_dir: Path, n_shards: int, *options: str) -> Mesh:
    """A mesh of one listener for each shard, all of them announced."""
    mesh = Mesh(space, "test", shards_dir, start_bootstrap(space, "test"))
    mesh.listeners = [mesh.listen(shard_id, *options) for shard_id in range(n_shards)]
    mesh.wait_ready()
    return mesh
