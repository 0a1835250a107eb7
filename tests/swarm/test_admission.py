"""Private meshes on loopback: who gets in, and what those hear who do not."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from shardmesh.errors import InputError, RefusedError, UnreachableError
from shardmesh.swarm.admission import PUBLIC, Admission
from shardmesh.swarm.cluster_files import ClusterFiles
from shardmesh.swarm.host import ByteStream, Host, open_host
from shardmesh.swarm.identity import Identity, new_identity
from shardmesh.swarm.streams import receive_message, send_message
from shardmesh.wire.cluster_secret import ClusterSecret, new_secret

ECHO = "/shardmesh/test/echo/1.0"
OWNER_KEY = new_identity().public_key
REFUSED_LIMIT_S = 4.0  # less than any time-out; mostly it takes milliseconds
SECRET, OTHER = new_secret(OWNER_KEY), new_secret(OWNER_KEY)


async def echo(stream: ByteStream, peer_id: str) -> None:
    await send_message(stream, await receive_message(stream, 100))


@contextlib.asynccontextmanager
async def host(admission: Admission, identity: Identity | None = None) -> AsyncIterator[Host]:
    mine = identity or new_identity()
    async with open_host(mine, listen_host="127.0.0.1", admission=admission) as made:
        made.serve(ECHO, echo)
        yield made


def private(secret: ClusterSecret = SECRET) -> Admission:
    return Admission(secret)


async def refusal(asker: Host, answerer: Host) -> RefusedError:
    """What the asker hears; quickly, and with no connection left."""
    with trio.fail_after(REFUSED_LIMIT_S), pytest.raises(RefusedError) as caught:
        await asker.connect(answerer.addresses(), 5)
    assert asker.connected() == []
    assert answerer.connected() == []
    return caught.value


async def test_members_get_in_both_ways() -> None:
    async with host(private()) as one, host(private()) as other:
        assert await one.connect(other.addresses(), 5) == other.peer_id
        for asker, answerer in ((one, other), (other, one)):
            answer = await asker.request(
                answerer.peer_id, ECHO, b"hello", timeout_s=5, response_bytes_max=100
            )
            assert answer == b"hello"


async def test_a_member_learns_who_answers_at_a_bare_address() -> None:
    async with host(private()) as one, host(private()) as other:
        bare = other.addresses()[0].partition("/p2p/")[0]
        assert await one.connect([bare], 5) == other.peer_id


@pytest.mark.parametrize(
    ("asking", "answering", "code"),
    [
        (PUBLIC, private(), "PRIVATE_MESH"),
        (private(OTHER), private(), "WRONG_SECRET"),
        (private(), PUBLIC, "PUBLIC_MESH"),
    ],
    ids=["without a secret", "with another secret", "a secret where none is asked"],
)
async def test_a_stranger_is_told_at_once(
    asking: Admission, answering: Admission, code: str
) -> None:
    async with host(asking) as asker, host(answering) as answerer:
        error = await refusal(asker, answerer)
        assert error.code == code
        assert error.next_step


async def test_a_stranger_that_is_known_is_told_too_when_a_stream_is_opened() -> None:
    async with host(private(OTHER)) as asker, host(private()) as answerer:
        asker.learn(answerer.peer_id, answerer.addresses())
        with pytest.raises(RefusedError) as caught:
            await asker.open_stream(answerer.peer_id, ECHO)
        assert caught.value.code == "WRONG_SECRET"


async def test_who_was_not_let_in_is_counted() -> None:
    foe = new_identity()
    guarded = Admission(SECRET, denied=[foe.peer_id])
    async with (
        host(guarded) as answerer,
        host(private(OTHER)) as stranger,
        host(private(), foe) as unwelcome,
    ):
        for asker in (stranger, stranger, unwelcome):
            await refusal(asker, answerer)
    assert guarded.n_refused == {"WRONG_SECRET": 2, "NOT_ADMITTED": 1}


async def test_of_two_addresses_one_admits() -> None:
    async with (
        host(private()) as asker,
        host(private(OTHER)) as stranger,
        host(private()) as member,
    ):
        addresses = [*stranger.addresses(), *member.addresses()]
        assert await asker.connect(addresses, 5) == member.peer_id


async def test_the_denied_and_those_not_allowed_are_turned_away() -> None:
    friend, foe = new_identity(), new_identity()
    for admission in (
        Admission(SECRET, denied=[foe.peer_id]),
        Admission(SECRET, allowed=[friend.peer_id]),
    ):
        async with (
            host(admission) as guarded,
            host(private(), friend) as welcome,
            host(private(), foe) as unwelcome,
        ):
            assert await welcome.connect(guarded.addresses(), 5) == guarded.peer_id
            await welcome.disconnect(guarded.peer_id, "done")
            assert (await refusal(unwelcome, guarded)).code == "NOT_ADMITTED"
            assert (await refusal(guarded, unwelcome)).code == "NOT_ADMITTED"


async def test_the_denied_are_turned_away_from_a_public_mesh() -> None:
    foe = new_identity()
    async with (
        host(Admission(None, denied=[foe.peer_id])) as guarded,
        host(PUBLIC, foe) as unwelcome,
    ):
        assert (await refusal(guarded, unwelcome)).code == "NOT_ADMITTED"
        with pytest.raises(UnreachableError):  # the public handshake has no word for it
            await unwelcome.connect(guarded.addresses(), 5)
        assert (unwelcome.connected(), guarded.connected()) == ([], [])


async def test_the_secret_is_kept_once_it_has_proven_right(tmp_path: Path) -> None:
    files = ClusterFiles(tmp_path, "home")
    async with host(private()) as member:
        async with host(Admission(OTHER, files=files)) as wrong:
            await refusal(wrong, member)
        assert files.secret() is None
        async with host(Admission(SECRET, files=files)) as right:
            for _ in range(2):
                await right.connect(member.addresses(), 5)
                await right.disconnect(member.peer_id, "again")
        assert files.secret() == SECRET


async def test_a_full_disk_does_not_keep_a_member_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "clusters").write_text("no folder")
    newcomer_admission = Admission(SECRET, files=ClusterFiles(tmp_path, "home"))
    async with host(private()) as member, host(newcomer_admission) as newcomer:
        assert await newcomer.connect(member.addresses(), 5) == member.peer_id
    assert "could not be kept" in caplog.text


def test_lists_hold_peer_ids() -> None:
    with pytest.raises(InputError, match="is no peer id"):
        Admission(SECRET, denied=["12D3KooW"])
