from __future__ import annotations

from contextlib import AsyncExitStack

import pytest
import trio

from shardmesh.errors import (
    BusyError,
    OurError,
    ProtocolError,
    TheirError,
    UnreachableError,
)
from shardmesh.swarm.commands import get_capabilities, get_metrics, send_command, serve_commands
from shardmesh.swarm.host import Host, open_host
from shardmesh.swarm.identity import new_identity
from shardmesh.wire.commands import JSON_PROTOCOL, InferenceParams, LoadShardParams, NoParams
from shardmesh.wire.limits import REQUESTS_PER_NODE_MAX


async def two_hosts(stack: AsyncExitStack) -> tuple[Host, Host]:
    asker = await stack.enter_async_context(open_host(new_identity(), listen_host="127.0.0.1"))
    node = await stack.enter_async_context(open_host(new_identity(), listen_host="127.0.0.1"))
    await asker.connect(node.addresses(), 5)
    return asker, node


async def test_commands_and_their_errors() -> None:
    async def load(params: LoadShardParams) -> object:
        return {"loaded": params.shard_id}

    async def fail(params: NoParams) -> object:
        raise RuntimeError("a secret detail")

    async def busy(params: InferenceParams) -> object:
        raise BusyError("no room", next_step="wait")

    async with AsyncExitStack() as stack:
        asker, node = await two_hosts(stack)
        handlers = {"LOAD_SHARD": load, "LIST_FILES": fail, "INFERENCE": busy}
        serve_commands(node, handlers)
        answer = await send_command(asker, node.peer_id, "LOAD_SHARD", LoadShardParams(shard_id=3))
        assert answer == {"loaded": 3}
        assert await send_command(asker, node.peer_id, "LOAD_SHARD", {"shard_id": 4}) == {
            "loaded": 4
        }
        with pytest.raises(OurError) as ours:
            await send_command(asker, node.peer_id, "LIST_FILES")
        assert ours.value.code == "INTERNAL"
        assert "secret" not in str(ours.value)
        with pytest.raises(BusyError, match="no room"):
            await send_command(asker, node.peer_id, "INFERENCE", {"prompt": "x"})
        with pytest.raises(TheirError, match="does not take GET_METRICS"):
            await send_command(asker, node.peer_id, "GET_METRICS")


@pytest.mark.parametrize(
    "answer",
    [
        [],
        "yes",
        {"version": 1},
        {"role": "\x1b[2J"},
        {"addresses": [["x"]]},
        {"shard_state": "x" * 999},
    ],
)
async def test_what_a_node_says_of_itself_is_no_garbage(answer: object) -> None:
    async def say(params: NoParams) -> object:
        return answer

    async with AsyncExitStack() as stack:
        asker, node = await two_hosts(stack)
        serve_commands(node, {"GET_CAPABILITIES": say})
        with pytest.raises(ProtocolError):
            await get_capabilities(asker, node.peer_id)


async def test_garbage_is_answered_with_an_error() -> None:
    async with AsyncExitStack() as stack:
        asker, node = await two_hosts(stack)
        serve_commands(node, {})
        answer = await asker.request(
            node.peer_id, JSON_PROTOCOL, b"{", timeout_s=5, response_bytes_max=1000
        )
        assert b'"BAD_JSON"' in answer


async def test_metrics_have_a_protocol_of_their_own() -> None:
    async def metrics(params: object) -> object:
        return {"n_requests": 5}

    async with AsyncExitStack() as stack:
        asker, node = await two_hosts(stack)
        serve_commands(node, {"GET_METRICS": metrics})
        assert await get_metrics(asker, node.peer_id) == {"n_requests": 5}
        assert await send_command(asker, node.peer_id, "GET_METRICS") == {"n_requests": 5}


async def test_too_long_a_wait() -> None:
    async def never(params: NoParams) -> object:
        await trio.sleep_forever()

    async with AsyncExitStack() as stack:
        asker, node = await two_hosts(stack)
        serve_commands(node, {"LIST_FILES": never})
        with pytest.raises(UnreachableError, match=r"no answer in 0\.3 s"):
            await send_command(asker, node.peer_id, "LIST_FILES", timeout_s=0.3)


async def test_one_too_many_is_told_that_the_node_is_busy() -> None:
    n_waiting = 0
    all_wait = trio.Event()

    async def wait(params: NoParams) -> object:
        nonlocal n_waiting
        n_waiting += 1
        if n_waiting == REQUESTS_PER_NODE_MAX:
            all_wait.set()
        await trio.sleep_forever()

    async with AsyncExitStack() as stack:
        asker, node = await two_hosts(stack)
        serve_commands(node, {"LIST_FILES": wait})
        async with trio.open_nursery() as nursery:
            for _ in range(REQUESTS_PER_NODE_MAX):
                nursery.start_soon(send_command, asker, node.peer_id, "LIST_FILES", None, 60.0)
            with trio.fail_after(20):
                await all_wait.wait()
            with pytest.raises(BusyError):
                await send_command(asker, node.peer_id, "LIST_FILES")
            nursery.cancel_scope.cancel()


async def test_wrong_params_are_refused_before_they_are_sent() -> None:
    async with AsyncExitStack() as stack:
        asker, node = await two_hosts(stack)
        with pytest.raises(ProtocolError):
            await send_command(asker, node.peer_id, "LOAD_SHARD", {"shard_id": "two"})
