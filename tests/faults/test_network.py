"""A network that loses and delays packets, and one that falls apart, between real machines.

Both replicas of the second stage are at the far end of a cable between two network namespaces, so
every hop of a chain crosses it.  The cable is our own (`support.cable`), since many kernels lack
`tc netem`.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import support.peers_seen
from faults.conftest import Measured
from support.cable import FAR_HOST, NEAR_HOST, Cable, cable
from support.models import write_model
from support.processes import START_TIMEOUT_S, Node, Running, Workspace, workspace

from shardmesh.demo_model import DEMO_MODEL

pytestmark = [
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.faults,
    pytest.mark.timeout(1200),
]

WEATHER_S = float(os.environ.get("SHARDMESH_NETWORK_S", "600"))
DELAY_S, LOSS = 0.05, 0.1  # in each direction: 100 ms round trip
RUN_WITHIN_S = 120.0
N_TOKENS = 30
CUT_S = 8.0
RIGHT_WITHIN_S = 10.0
GOES_ON_WITHIN_S = 30.0
STEADY_S = 5.0
N_LISTENERS = 4
WEB_PORT, HTTP_PORT = 8080, 8090  # of a network namespace of our own


class Split:
    """A mesh on both sides of a cable."""

    def __init__(self, space: Workspace, line: Cable, model: Path) -> None:
        self.space = space
        self.line = line
        self._shards_dir = space.folder / "shards"
        done = space.run("split", str(model), "--shards", "2", "--out", str(self._shards_dir))
        assert done.code == 0, done.err
        state = ("--state-dir", str(space.folder / "state"))
        words = ("bootstrap", "--listen-addr", NEAR_HOST, "--port", "0", *state)
        self._bootstrap = Node(space.start(*words, inside=line.inside(line.near)))
        self._bootstrap.wait_started()
        self.listeners = [self._listen(number) for number in range(N_LISTENERS)]
        for listener in self.listeners:
            listener.wait_announced()

    @property
    def _where(self) -> tuple[str, ...]:
        return ("--bootstrap", self._bootstrap.address, "--shards-dir", str(self._shards_dir))

    def _listen(self, number: int) -> Node:
        is_far = number >= 2
        words = (
            *("listen", "--shard-id", str(number // 2), "--threads", "1", *self._where),
            *("--listen-addr", FAR_HOST if is_far else NEAR_HOST),
            *("--state-dir", str(self.space.folder / f"state-{number}"), "--ctx-size", "512"),
            *("--http", str(HTTP_PORT + number)),
        )
        end = self.line.far if is_far else self.line.near
        return Node(self.space.start(*words, inside=self.line.inside(end)))

    def start_run(self, *options: str) -> Running:
        words = ("run", "Once upon a time", "--ignore-end", "--seed", "1")
        size = ("--max-tokens", str(N_TOKENS))
        inside = self.line.inside(self.line.near)
        return self.space.start(*words, *size, *self._where, *options, inside=inside)

    def run(self, *options: str) -> dict:  # type: ignore[type-arg]
        return answer_of(self.start_run("--json", *options))

    def watch_all(self) -> list[View]:
        """What a listener at each end and a gateway at the near end know, from now on."""
        near, far = self.line.near, self.line.far
        state = ("--state-dir", str(self.space.folder / "state-web"))
        ports = ("--port", str(WEB_PORT), "--ws-port", "0")
        gateway = self.space.start(
            "web", *ports, *self._where, *state, inside=self.line.inside(near)
        )
        gateway.wait_line(str(WEB_PORT), START_TIMEOUT_S)
        places = ((near, WEB_PORT), (near, HTTP_PORT), (far, HTTP_PORT + 2))
        return [self._watch(end, port) for end, port in places]

    def _watch(self, end: str, port: int) -> View:
        command = (sys.executable, support.peers_seen.__file__)
        inside = self.line.inside(end)
        view = View(self.space.start(str(port), inside=inside, command=command))
        view.running.wait_line(f" {N_LISTENERS}$", START_TIMEOUT_S)
        return view


class View:
    """The replicas that one node knows."""

    def __init__(self, running: Running) -> None:
        self.running = running

    def changes(self) -> list[tuple[float, int]]:
        """When it knew how many."""
        words = [line.split() for line in self.running.lines]
        return [(float(at_s), int(n_known)) for at_s, n_known in words]

    def right_s(self) -> float:
        """Since when it knows all of them."""
        at_s, n_known = self.changes()[-1]
        assert n_known == N_LISTENERS, self.changes()
        return at_s

    def n_least(self) -> int:
        """How few it knew at some time since it had known all."""
        known = [n_known for _, n_known in self.changes()]
        return min(known[known.index(N_LISTENERS) :])


def answer_of(running: Running) -> dict:  # type: ignore[type-arg]
    code = running.wait_end(RUN_WITHIN_S)
    assert code == 0, "\n".join(running.lines)
    return json.loads(next(line for line in running.lines if line.startswith("{")))


@pytest.fixture
def split(tmp_path: Path) -> Iterator[Split]:
    model = DEMO_MODEL if DEMO_MODEL.exists() else write_model(tmp_path / "m.gguf", n_layer=8)
    with cable(delay_s=DELAY_S, loss=LOSS) as line, workspace() as space:
        space.environment = {**space.environment, "OMP_WAIT_POLICY": "passive"}
        yield Split(space, line, Path(model))


def test_a_lossy_and_slow_network(split: Split, measured: Measured) -> None:
    text, n_runs, slowest_s = "", 0, 0.0
    repairs: list[str] = []
    until_s = time.monotonic() + WEATHER_S
    while time.monotonic() < until_s:
        begun_s = time.monotonic()
        answer = split.run()
        slowest_s = max(slowest_s, time.monotonic() - begun_s)
        assert answer["text"] == (text or answer["text"])
        text, n_runs = answer["text"], n_runs + 1
        repairs += [
            f"({r['code']}: {r['reason']}; a pause of {r['pause_s']:.1f} s)"
            for r in answer["repairs"]
        ]
    measured(
        f"{n_runs} texts in {WEATHER_S:.0f} s, all complete and the same, {len(repairs)} "
        f"failovers{' ' if repairs else ''}{' '.join(repairs)}, slowest {slowest_s:.1f} s for "
        f"{N_TOKENS} tokens with the start of the command"
    )
    assert not repairs


def test_a_partition(split: Split, measured: Measured) -> None:
    """The far end is cut off in the middle of a text, and comes back."""
    text = split.run()["text"]
    views = split.watch_all()
    running = split.start_run("--wait", "60")
    running.wait_line(re.escape(text.split()[0]), RUN_WITHIN_S)
    split.line.cut()
    time.sleep(CUT_S)
    assert running.process.poll() is None, "it was over before the cut"
    n_printed = running.n_printed
    split.line.join()
    joined_s = time.monotonic()
    running.wait_more(n_printed, GOES_ON_WITHIN_S)
    went_on_s = time.monotonic() - joined_s
    assert running.wait_end(RUN_WITHIN_S) == 0, "\n".join(running.lines)
    done_s = time.monotonic() - joined_s
    assert "\n".join(running.lines) == text
    # Who is right must stay so.
    time.sleep(max(0.0, RIGHT_WITHIN_S + STEADY_S - done_s))
    right_s = max(0.0, *(view.right_s() - joined_s for view in views))
    measured(
        f"cut for {CUT_S:.0f} s: the text went on {went_on_s:.1f} s after the end of it and was "
        f"done, the same, after {done_s:.1f} s; of {N_LISTENERS} replicas "
        f"{[view.n_least() for view in views]} were known, all of them again after {right_s:.1f} s"
    )
    assert right_s < RIGHT_WITHIN_S
