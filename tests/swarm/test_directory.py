from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio
import trio.testing
from support.announcements import CLUSTER, an_announcement

from shardmesh.errors import InputError, ProtocolError, RefusedError
from shardmesh.swarm.directory import Directory, exchange, serve_directory
from shardmesh.swarm.host import open_host
from shardmesh.swarm.identity import Identity, load_identity, new_identity
from shardmesh.swarm.remembered import RememberedNodes
from shardmesh.wire import limits
from shardmesh.wire.announcement import Announcement, encode_signed

ALICE, BOB, CAROL = new_identity(), new_identity(), new_identity()


class Clock:
    """A wall clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = float(int(time.time()))

    def __call__(self) -> float:
        return self.now_s


def sign(identity: Identity, **changes: object) -> bytes:
    return encode_signed(an_announcement(identity, **changes), identity)


def withdrawal(identity: Identity, sequence: int, at_s: float) -> bytes:
    return sign(identity, sequence=sequence, issued_at_s=int(at_s), expires_at_s=int(at_s))


def peer_ids(announcements: list[Announcement]) -> list[str]:
    return [a.peer_id for a in announcements]


def test_newest_wins_and_old_ones_change_nothing() -> None:
    directory = Directory(CLUSTER)
    assert directory.update(sign(ALICE, sequence=2, model_name="new"))
    assert not directory.update(sign(ALICE, sequence=1, model_name="old"))
    assert not directory.update(sign(ALICE, sequence=2, model_name="other"))
    assert [a.model_name for a in directory.all()] == ["new"]


def test_ordered_by_shard() -> None:
    directory = Directory(CLUSTER)
    directory.update(sign(ALICE, shard_id=2))
    directory.update(sign(BOB, shard_id=1))
    assert peer_ids(directory.all()) == [BOB.peer_id, ALICE.peer_id]


def test_expired_go_by_themselves() -> None:
    clock = Clock()
    directory = Directory(CLUSTER, clock)
    start_s = int(clock.now_s)
    directory.update(sign(ALICE, issued_at_s=start_s, expires_at_s=start_s + 60))
    clock.now_s += 59
    assert directory.get(ALICE.peer_id)
    clock.now_s += 1
    assert directory.all() == []
    assert directory.all_signed() == []


def test_forged_and_foreign_are_refused() -> None:
    directory = Directory(CLUSTER)
    with pytest.raises(ProtocolError):
        directory.update(sign(ALICE)[:-1] + b"\0")
    with pytest.raises(ProtocolError):
        directory.update(sign(ALICE, cluster="another"))
    now_s = int(time.time())
    foreign_withdrawal = sign(ALICE, cluster="another", issued_at_s=now_s, expires_at_s=now_s)
    with pytest.raises(ProtocolError):
        directory.update(foreign_withdrawal)
    assert directory.version == 0


def test_withdrawn_does_not_come_back_by_an_older_word() -> None:
    clock = Clock()
    directory = Directory(CLUSTER, clock)
    directory.update(sign(ALICE, sequence=1))
    assert directory.update(withdrawal(ALICE, 2, clock.now_s))
    assert directory.all() == []
    assert len(directory.all_signed()) == 1  # so that neighbours hear of it
    assert not directory.update(sign(ALICE, sequence=1))
    assert directory.update(sign(ALICE, sequence=3))  # back again
    assert peer_ids(directory.all()) == [ALICE.peer_id]


def test_a_withdrawal_of_a_clock_that_is_ahead_is_not_believed() -> None:
    """It would be the newest word of its node until then, whatever that says meanwhile."""
    clock = Clock()
    directory = Directory(CLUSTER, clock)
    ahead_s = clock.now_s + 86400
    with pytest.raises(ProtocolError) as caught:
        directory.update(withdrawal(ALICE, int(ahead_s * 1000), ahead_s))
    assert caught.value.code == "WRONG_CLOCK"
    assert directory.update(sign(ALICE, sequence=int(clock.now_s * 1000)))
    assert peer_ids(directory.all()) == [ALICE.peer_id]


def test_unreachable_is_hidden_until_heard_of_again() -> None:
    directory = Directory(CLUSTER)
    directory.update(sign(ALICE, sequence=1))
    directory.mark_unreachable(ALICE.peer_id)
    assert directory.all() == []
    assert directory.all_signed() == []
    assert directory.get(ALICE.peer_id) is None
    assert not directory.update(sign(ALICE, sequence=1))
    assert directory.all() == []
    directory.update(sign(ALICE, sequence=2))
    assert peer_ids(directory.all()) == [ALICE.peer_id]


def test_full_directory_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardmesh.swarm.directory.DIRECTORY_ENTRIES_MAX", 2)
    directory = Directory(CLUSTER)
    assert directory.update(sign(ALICE))
    assert directory.update(sign(BOB))
    assert not directory.update(sign(CAROL))
    assert directory.update(sign(BOB, sequence=2))
    assert len(directory.all()) == 2


async def test_waiting_for_a_change(autojump_clock: trio.testing.MockClock) -> None:
    directory = Directory(CLUSTER)
    seen: list[int] = []

    async def wait() -> None:
        seen.append(await directory.wait_changed(0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert seen == []
        directory.update(sign(ALICE))
    assert seen == [1]
    assert await directory.wait_changed(0) == 1  # what happened before is not missed


async def test_neighbours_exchange() -> None:
    here, there = Directory(CLUSTER), Directory(CLUSTER)
    async with (
        open_host(ALICE, listen_host="127.0.0.1") as alice,
        open_host(BOB, listen_host="127.0.0.1") as bob,
    ):
        serve_directory(bob, there)
        there.update(sign(CAROL, shard_id=2))
        await alice.connect(bob.addresses(), 5)
        forged = sign(CAROL, shard_id=3)[:-1] + b"\0"
        await exchange(alice, here, BOB.peer_id, push=[sign(ALICE), forged])
        assert peer_ids(there.all()) == [ALICE.peer_id, CAROL.peer_id]
        assert peer_ids(here.all()) == [ALICE.peer_id, CAROL.peer_id]
        other = Directory("another")
        with pytest.raises(RefusedError, match="another") as caught:
            await exchange(alice, other, BOB.peer_id, push=[sign(CAROL, cluster="another")])
        assert caught.value.code == "OTHER_CLUSTER"
        assert other.all() == []
        assert peer_ids(there.all()) == [ALICE.peer_id, CAROL.peer_id]


def test_remembered_nodes_are_kept_newest_first(tmp_path: Path) -> None:
    path = tmp_path / "state" / "nodes.json"
    remembered = RememberedNodes(path)
    for number in range(limits.REMEMBERED_NODES_MAX + 1):
        remembered.note(f"node{number}", (f"/ip4/10.0.0.1/tcp/{number}",))
    remembered.note("node5", ("/ip4/10.0.0.9/tcp/5",))
    remembered.save()
    nodes = RememberedNodes(path).nodes()
    assert len(nodes) == limits.REMEMBERED_NODES_MAX
    assert [node.peer_id for node in nodes[:2]] == ["node5", "node64"]
    assert nodes[0].addresses == ("/ip4/10.0.0.9/tcp/5",)
    assert [file.name for file in path.parent.iterdir()] == ["nodes.json"]


def test_broken_file_of_remembered_nodes_is_as_good_as_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "nodes.json"
    path.write_text('{"nodes": 5}')
    assert RememberedNodes(path).nodes() == []
    assert "left aside" in caplog.text


def test_identity_is_made_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "state" / "identity.pem"
    first = load_identity(path)
    assert load_identity(path).peer_id == first.peer_id
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["identity.pem"]


@pytest.mark.parametrize("content", [b"", b"nonsense", b"-----BEGIN PRIVATE KEY-----\n"])
def test_broken_identity_is_said_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.pem"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(InputError, match="not a private key"):
        load_identity(path)
    assert path.read_bytes() == content


def test_identity_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    load_identity(path)
    path.chmod(0o644)
    with pytest.raises(InputError, match="other users"):
        load_identity(path)
