"""A grammar that llama.cpp does not come back from: the process ends itself, and is there again."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import msgspec
import pytest
import trio
from support.accepting import new_grants
from support.data_start import no_agreement, start_of_tiny_shard
from support.far_end import Recorder
from support.grammars import OPENS_FOR_EVER, SAMPLES_FOR_EVER
from support.link_messages import hidden_batch, open_session
from support.mesh import GREEDY

import shardmesh.listener.data_child as data_child_module
from shardmesh.links.dial import dial
from shardmesh.listener.local_messages import Start
from shardmesh.listener.supervisor import ShardStatus, Supervisor
from shardmesh.wire.link_agreement import Endpoint
from shardmesh.wire.messages import HiddenBatch, OpenSession, SessionFailed, SessionOpened

TIMEOUT_S = 60.0
N_EMBD = 64

IMPATIENT = """#!{python}
import sys
import shardmesh.engine.grammar_sampler as sampler
import shardmesh.listener.data_process as data_process
sampler.GRAMMAR_STEP_TIMEOUT_S = 0.3
data_process.LOOK_INTERVAL_S = 0.1
sys.exit(data_process.main())
"""


@pytest.fixture(scope="module")
def last(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """What serves the second of two shards of a tiny model, with its vocabulary."""
    directory = tmp_path_factory.mktemp("shards")
    start = start_of_tiny_shard(directory, 1, n_embd=N_EMBD)
    return msgspec.structs.replace(start, vocabulary_path=str(directory / "tokenizer.gguf"))


@pytest.fixture
def impatient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data processes that wait for a third of a second only."""
    program = tmp_path / "impatient"
    program.write_text(IMPATIENT.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr(data_child_module.sys, "executable", str(program))


def opening(start: Start, number: int, grammar: str) -> OpenSession:
    return open_session(
        session=bytes([number] * 16),
        manifest_digest=start.manifest_digest,
        layer_start=1,
        layer_end=2,
        previous_stage="near",
        sampling=msgspec.structs.replace(GREEDY, grammar=grammar),
    )


def one_row(number: int) -> HiddenBatch:
    return hidden_batch(session=bytes([number] * 16), epoch=1, n_embd=N_EMBD)


@pytest.mark.processes
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("grammar", [OPENS_FOR_EVER, SAMPLES_FOR_EVER], ids=["open", "sample"])
async def test_a_grammar_that_hangs_costs_its_own_session_and_one_life(
    last: Start, grammar: str
) -> None:
    send_told, told = trio.open_memory_channel[str](16)

    def tell(status: ShardStatus) -> None:
        send_told.send_nowait(status.error.code if status.error is not None else status.state)

    supervisor = Supervisor(no_agreement, tell)
    user = Recorder()
    with trio.fail_after(TIMEOUT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervisor.run)
            supervisor.serve(last)
            await supervisor.wait_loaded(TIMEOUT_S)
            first_pid = supervisor.pid
            grant, expected = new_grants()
            port = await supervisor.expect(expected)
            here = (Endpoint(host="127.0.0.1", port=port),)
            link = await dial(dataclasses.replace(grant, endpoints=here), user)
            nursery.start_soon(link.run)
            link.send(opening(last, 1, ""))
            link.send(opening(last, 2, grammar))
            link.send(one_row(2), bytes(4 * N_EMBD))
            await user.end()
            for state in ("ENGINE_HUNG", "loaded"):
                while await told.receive() != state:
                    pass
            assert supervisor.pid != first_pid
            nursery.cancel_scope.cancel()
    failed = [each for each in user.messages if isinstance(each, SessionFailed)]
    assert sum(isinstance(each, SessionOpened) for each in user.messages) == 2
    assert [(each.session[0], each.code, each.blame) for each in failed] == [
        (1, "ENGINE_HUNG", "ours"),
        (2, "BAD_GRAMMAR", "theirs"),
    ]
