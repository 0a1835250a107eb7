"""Who may send which command."""

from __future__ import annotations

import pytest

from shardmesh.errors import InputError, RefusedError, TheirError
from shardmesh.swarm.commands import send_command, serve_commands
from shardmesh.swarm.host import open_host
from shardmesh.swarm.identity import new_identity
from shardmesh.swarm.rights import MEMBERS, NOBODY, Rights, whom
from shardmesh.wire.commands import CHANGING_COMMANDS, PARAMS

FRIEND, OTHER = new_identity(), new_identity()


@pytest.mark.parametrize(
    ("entries", "friend", "other"),
    [
        ([], True, True),
        ([MEMBERS], True, True),
        ([NOBODY], False, False),
        ([FRIEND.peer_id], True, False),
        ([FRIEND.peer_id, MEMBERS], True, True),
    ],
)
def test_whom(entries: list[str], friend: bool, other: bool) -> None:
    allowed = whom(entries)
    assert (allowed.has(FRIEND.peer_id), allowed.has(OTHER.peer_id)) == (friend, other)


def test_the_default_is_the_callers() -> None:
    assert not whom([], NOBODY).has(FRIEND.peer_id)


@pytest.mark.parametrize("entries", [["somebody"], [NOBODY, MEMBERS], [FRIEND.peer_id[:-1]]])
def test_what_says_nothing_is_refused(entries: list[str]) -> None:
    with pytest.raises(InputError):
        whom(entries)


def test_reading_takes_no_right_and_changing_does() -> None:
    strict = Rights(changing=whom([NOBODY]), inference=whom([NOBODY]))
    for command in PARAMS:
        if command in CHANGING_COMMANDS | {"INFERENCE"}:
            with pytest.raises(RefusedError, match=f"does not take {command} from"):
                strict.check(command, FRIEND.peer_id)
        else:
            strict.check(command, FRIEND.peer_id)


async def test_a_node_takes_changes_from_those_it_names_only() -> None:
    n_unloaded = 0

    async def unload(params: object) -> object:
        nonlocal n_unloaded
        n_unloaded += 1
        return {}

    async with (
        open_host(new_identity(), listen_host="127.0.0.1") as node,
        open_host(FRIEND, listen_host="127.0.0.1") as friend,
        open_host(OTHER, listen_host="127.0.0.1") as other,
    ):
        rights = Rights(changing=whom([FRIEND.peer_id]))
        serve_commands(node, {"UNLOAD_SHARD": unload, "GET_METRICS": unload}, rights)
        for client in (friend, other):
            await client.connect(node.addresses(), 5)
            await send_command(client, node.peer_id, "GET_METRICS")
        assert await send_command(friend, node.peer_id, "UNLOAD_SHARD") == {}
        assert n_unloaded == 3
        with pytest.raises(TheirError) as caught:
            await send_command(other, node.peer_id, "UNLOAD_SHARD")
        assert (caught.value.code, n_unloaded) == ("NOT_ALLOWED", 3)
        assert OTHER.peer_id in caught.value.next_step
