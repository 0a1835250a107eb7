"""Real processes of a mesh with two replicas of each stage, killed and stopped: the same text.

Each test leaves the mesh complete.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import psutil
import pytest
import trio
from support.asking import (
    ANSWER_TIMEOUT_S,
    as_client,
    ask,
    complete_with,
    wait_no_sessions,
    wait_status,
)
from support.processes import Mesh, Node, start_bootstrap, workspace

from shardmesh.coordinator.client import Client
from shardmesh.coordinator.coordinator import Completion
from shardmesh.coordinator.generate import Piece
from shardmesh.coordinator.repairs import Repair
from shardmesh.coordinator.request import CompletionRequest
from shardmesh.engine.base import SamplingSettings
from shardmesh.swarm.commands import send_command

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.recovery]

N_STAGES = 3
N_CTX = 1024
N_TOKENS = 60
PROMPT = "Once upon a time there was a king who went to the river and said: " * 15
STATUS_WITHIN_S = 30.0
LINKED_WITHIN_S = 10.0
SAMPLING = SamplingSettings(temperature=0.9, repeat_penalty=1.2, seed=5)
REQUEST = CompletionRequest(
    prompt=PROMPT, n_tokens_max=N_TOKENS, sampling=SAMPLING, ignore_end=True, wait_s=30.0
)
IN_PREFILL, IN_DECODE = "prefill", "decode"


@dataclasses.dataclass
class Replicated:
    """A mesh of three stages with two replicas each, and what an undisturbed run writes."""

    mesh: Mesh
    text: str = ""

    def node(self, peer_id: str) -> Node:
        return next(node for node in self.mesh.listeners if node.peer_id == peer_id)

    def start(self, number: int) -> Node:
        """Listener `number`: replica `number // N_STAGES` of stage `number % N_STAGES`."""
        state = str(self.mesh.space.folder / f"state-{number}")
        options = ("--ctx-size", str(N_CTX), "--parallel", "2", "--state-dir", state)
        return self.mesh.listen(number % N_STAGES, *options)

    def start_again(self, peer_id: str) -> None:
        number = self.mesh.listeners.index(self.node(peer_id))
        self.mesh.listeners[number] = self.start(number)
        self.mesh.listeners[number].wait_announced()

    def wait_linked(self) -> None:
        """Waits until each stage has links to both replicas behind it, without any session."""
        with_next = {
            node.peer_id: {
                other.peer_id
                for number, other in enumerate(self.mesh.listeners)
                if number % N_STAGES == (own + 1) % N_STAGES
            }
            for own, node in enumerate(self.mesh.listeners)
        }

        async def use(client: Client) -> None:
            await client.membership.find_listeners()
            for peer_id, wanted in with_next.items():
                linked = set[str]()
                with trio.fail_after(LINKED_WITHIN_S):
                    while linked != wanted:
                        answer = await send_command(
                            client.host, peer_id, "GET_METRICS", None, ANSWER_TIMEOUT_S
                        )
                        linked = {link["peer_id"] for link in answer["links"]}

        as_client(self.mesh, use)

    def wait_complete(self) -> None:
        peer_ids = [node.peer_id for node in self.mesh.listeners]
        wait_status(self.mesh, complete_with(*peer_ids), STATUS_WITHIN_S)
        wait_no_sessions(self.mesh, STATUS_WITHIN_S)


@pytest.fixture(scope="module")
def replicated(model: Path) -> Iterator[Replicated]:
    with workspace() as space:
        shards_dir = space.folder / "shards"
        done = space.run("split", str(model), "--shards", str(N_STAGES), "--out", str(shards_dir))
        assert done.code == 0, done.err
        mesh = Mesh(space, "test", shards_dir, start_bootstrap(space, "test"))
        found = Replicated(mesh)
        mesh.listeners = [found.start(number) for number in range(2 * N_STAGES)]
        mesh.wait_ready()
        found.wait_linked()
        found.text, repairs = write(found)
        assert found.text
        assert not repairs
        yield found


Disturb = Callable[[Completion], Awaitable[None]]


def write(
    mesh: Replicated, when: str = "", disturb: Disturb | None = None
) -> tuple[str, list[Repair]]:
    """The text of a run that is disturbed in the middle of its prompt or of its answer."""

    async def use(client: Client) -> tuple[str, list[Repair]]:
        text, n_pieces = "", 0
        async with (
            client.coordinator.complete(REQUEST) as completion,
            trio.open_nursery() as nursery,
        ):
            if disturb is not None and when == IN_PREFILL:
                nursery.start_soon(_in_prefill, completion, disturb)
            async for item in completion.items:
                if isinstance(item, Piece):
                    text, n_pieces = text + item.text, n_pieces + 1
                    if disturb is not None and when == IN_DECODE and n_pieces == N_TOKENS // 2:
                        await disturb(completion)
            assert completion.session.n_handed > N_TOKENS // 2
            return text, list(completion.repairs)

    return as_client(mesh.mesh, use)


async def _in_prefill(completion: Completion, disturb: Disturb) -> None:
    # One piece is through, eight are under way.
    while completion.session.n_sent < 9 * 32:  # noqa: ASYNC110 - nobody tells of it
        await trio.sleep(0.001)
    await disturb(completion)


@pytest.mark.parametrize("when", [IN_PREFILL, IN_DECODE])
@pytest.mark.parametrize("stage", range(N_STAGES))
def test_a_killed_data_process(replicated: Replicated, stage: int, when: str) -> None:
    killed: list[str] = []

    async def kill(completion: Completion) -> None:
        killed.append(completion.chain.stages[stage].peer_id)
        replicated.node(killed[0]).running.data_process().kill()

    text, repairs = write(replicated, when, kill)
    assert text == replicated.text
    assert [repair.lost_peer_id for repair in repairs] == killed
    replicated.wait_complete()


@pytest.mark.parametrize("when", [IN_PREFILL, IN_DECODE])
def test_a_killed_listener(replicated: Replicated, when: str) -> None:
    killed: list[str] = []

    async def kill(completion: Completion) -> None:
        killed.append(completion.chain.stages[1].peer_id)
        replicated.node(killed[0]).running.process.kill()

    text, repairs = write(replicated, when, kill)
    assert text == replicated.text
    assert [repair.lost_peer_id for repair in repairs] == killed
    replicated.start_again(killed[0])
    replicated.wait_complete()


@pytest.mark.parametrize("when", [IN_PREFILL, IN_DECODE])
def test_a_stopped_listener(replicated: Replicated, when: str) -> None:
    stopped: list[psutil.Process] = []

    async def stop(completion: Completion) -> None:
        node = replicated.node(completion.chain.stages[0].peer_id)
        stopped.extend([psutil.Process(node.running.process.pid), *node.running.children()])
        for process in stopped:
            process.suspend()

    try:
        text, repairs = write(replicated, when, stop)
    finally:
        for process in stopped:
            process.resume()
    assert text == replicated.text
    assert [repair.code for repair in repairs] == ["STAGE_LOST"]
    replicated.wait_complete()


@pytest.mark.parametrize("stage", range(N_STAGES))
def test_a_killed_stage_of_a_text_that_began_behind_a_reused_prompt(
    replicated: Replicated, stage: int
) -> None:
    """The one that comes in its place never had the prompt, and nobody kept its hidden states."""

    async def use(client: Client) -> tuple[str, list[Repair], int, str]:
        async with client.coordinator.complete(REQUEST) as first:
            async for _ in first.items:
                pass
        peer_ids = tuple(each.peer_id for each in first.chain.stages)
        request = dataclasses.replace(REQUEST, via=peer_ids)
        text, n_pieces = "", 0
        async with client.coordinator.complete(request) as completion:
            async for item in completion.items:
                if isinstance(item, Piece):
                    text, n_pieces = text + item.text, n_pieces + 1
                    if n_pieces == N_TOKENS // 2:
                        replicated.node(peer_ids[stage]).running.data_process().kill()
            n_reused = completion.session.n_reused
            return text, list(completion.repairs), n_reused, peer_ids[stage]

    text, repairs, n_reused, killed = as_client(replicated.mesh, use)
    assert n_reused > 100
    assert text == replicated.text
    assert [repair.lost_peer_id for repair in repairs] == [killed]
    replicated.wait_complete()


@pytest.mark.parametrize("stage", [0, 1])
def test_a_killed_stage_whose_standby_has_the_prompt(replicated: Replicated, stage: int) -> None:
    """Same text, and of the long prompt it computes only the tail."""

    async def use(client: Client) -> tuple[str, list[Repair], int]:
        request = dataclasses.replace(REQUEST, standby=True, reuse_prefix=False)
        text, n_pieces = "", 0
        async with client.coordinator.complete(request) as completion:
            async for item in completion.items:
                if isinstance(item, Piece):
                    text, n_pieces = text + item.text, n_pieces + 1
                    if n_pieces == N_TOKENS // 2:
                        standby = completion.standbys[stage].peer_id
                        n_before = (await metrics_of(client, standby))["n_tokens"]
                        lost = completion.chain.stages[stage].peer_id
                        replicated.node(lost).running.data_process().kill()
            (repair,) = completion.repairs
            assert (repair.lost_peer_id, repair.new_peer_id) == (lost, standby)
            found = await metrics_of(client, standby)
            n_all = completion.n_prompt_tokens + N_TOKENS - 1
            assert found["n_tokens"] - n_before == n_all - repair.n_copied
            assert found["n_copies_used"] > 0
            return text, list(completion.repairs), completion.n_prompt_tokens

    text, repairs, n_prompt = as_client(replicated.mesh, use)
    assert text == replicated.text
    assert n_prompt > 200
    assert repairs[0].n_copied > n_prompt - 100
    replicated.wait_complete()
    assert all(answer["stage"]["n_copies"] == 0 for answer in ask(replicated.mesh, "GET_METRICS"))


def test_run_says_who_stood_by(replicated: Replicated) -> None:
    arguments = ("--standby", "--max-tokens", "60", "--ignore-end", *replicated.mesh.where)
    done = replicated.mesh.space.run("run", PROMPT, "--explain", *arguments)
    assert done.code == 0, done.err
    assert done.err.count("stands by") == len(replicated.mesh.listeners) // 2
    done = replicated.mesh.space.run("run", PROMPT, "--json", *arguments)
    found = json.loads(done.out)
    peer_ids = {node.peer_id for node in replicated.mesh.listeners}
    assert set(found["standbys"]) == set(found["chain"])
    assert set(found["standbys"].values()) == peer_ids - set(found["chain"])
    replicated.wait_complete()


async def metrics_of(client: Client, peer_id: str) -> dict[str, int]:
    answer = await send_command(client.host, peer_id, "GET_METRICS", None, ANSWER_TIMEOUT_S)
    return dict(answer["stage"])


def test_a_drained_listener_leaves_when_its_last_session_is_over(replicated: Replicated) -> None:
    drained: list[Node] = []

    async def drain(completion: Completion) -> None:
        drained.append(replicated.node(completion.chain.stages[0].peer_id))
        command = ("drain", drained[0].peer_id, *replicated.mesh.where)
        done = await trio.to_thread.run_sync(lambda: replicated.mesh.space.run(*command))
        assert (done.code, "takes no new sessions" in done.out) == (0, True), done.err
        assert drained[0].running.process.poll() is None

    text, repairs = write(replicated, IN_DECODE, drain)
    assert (text, repairs) == (replicated.text, [])
    drained[0].running.wait_line("drained: leaving")
    assert drained[0].running.wait_end() == 0
    assert write(replicated) == (replicated.text, [])
    replicated.start_again(drained[0].peer_id)
    replicated.wait_complete()
