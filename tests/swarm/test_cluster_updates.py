"""Removing a member: who is left has the new secret, who was removed stands outside."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing
from support.announcements import CLUSTER

from shardmesh.errors import ProtocolError, RefusedError
from shardmesh.swarm.admission import PUBLIC, Admission
from shardmesh.swarm.cluster import ClusterUpdates, hand_over
from shardmesh.swarm.cluster_files import ClusterFiles
from shardmesh.swarm.directory import Directory
from shardmesh.swarm.host import Host, open_host
from shardmesh.swarm.identity import Identity, new_identity
from shardmesh.wire.cluster_secret import new_secret
from shardmesh.wire.cluster_update import ClusterUpdate, sign_update

OWNER = new_identity()
OLD, NEW = new_secret(OWNER.public_key), new_secret(OWNER.public_key)
LOG = logging.getLogger("shardmesh.test")


def change(*removed: str, sequence: int = 1) -> bytes:
    update = ClusterUpdate(
        cluster=CLUSTER, sequence=sequence, secret=NEW.text(), removed=tuple(removed)
    )
    return sign_update(update, OWNER)


class Member:
    """A host that takes updates in and hands them on."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.directory = Directory(CLUSTER)
        self.updates = ClusterUpdates(
            host, self.directory, LOG, is_node=lambda peer_id: peer_id not in self.clients
        )
        self.cut_off: list[frozenset[str]] = []
        self.clients: set[str] = set()  # peer ids that nothing is known of
        self.changed = trio.Event()
        self.updates.on_removed(self._note)

    async def _note(self, removed: frozenset[str]) -> None:
        self.cut_off.append(removed)
        self.changed.set()
        await trio.lowlevel.checkpoint()


@contextlib.asynccontextmanager
async def member(
    folder: Path | None = None, identity: Identity | None = None
) -> AsyncIterator[Member]:
    files = ClusterFiles(folder, CLUSTER) if folder else None
    admission = Admission(OLD, files=files)
    async with open_host(
        identity or new_identity(), listen_host="127.0.0.1", admission=admission
    ) as host:
        made = Member(host)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.updates.run)
            yield made
            nursery.cancel_scope.cancel()


async def test_it_goes_from_member_to_member_and_past_the_removed(tmp_path: Path) -> None:
    async with (
        member() as owner,
        member(tmp_path) as near,
        member() as far,
        member() as removed,
    ):
        await owner.host.connect(near.host.addresses(), 5)
        await near.host.connect(far.host.addresses(), 5)
        await removed.host.connect(near.host.addresses(), 5)
        closed = trio.Event()
        removed.host.on_connection(lambda e: closed.set() if e.kind == "closed" else None)
        signed = change(removed.host.peer_id)
        assert await hand_over(owner.host, [near.host.peer_id], signed) == {}
        with trio.fail_after(5):
            await far.changed.wait()
        assert (near.host.admission.secret, far.host.admission.secret) == (NEW, NEW)
        assert near.cut_off == far.cut_off == [frozenset({removed.host.peer_id})]
        assert ClusterFiles(tmp_path, CLUSTER).secret() == NEW
        with trio.fail_after(5):
            await closed.wait()
        assert removed.host.admission.secret == OLD
        for member_left in (near, far):
            with pytest.raises(RefusedError) as caught:
                await removed.host.connect(member_left.host.addresses(), 5)
            assert caught.value.code == "WRONG_SECRET"
        await near.host.disconnect(far.host.peer_id, "to see whether they find back")
        assert await far.host.connect(near.host.addresses(), 5) == near.host.peer_id


async def test_the_removed_do_not_come_back_with_another_key(tmp_path: Path) -> None:
    async with member() as owner, member() as near:
        await owner.host.connect(near.host.addresses(), 5)
        await hand_over(owner.host, [near.host.peer_id], change(new_identity().peer_id))
        async with member() as returned:  # the old secret, a new peer id
            with pytest.raises(RefusedError):
                await returned.host.connect(near.host.addresses(), 5)


async def test_a_client_gets_no_secret_since_nobody_knows_whose_it_is() -> None:
    async with member() as owner, member() as near, member() as client:
        await owner.host.connect(near.host.addresses(), 5)
        await client.host.connect(near.host.addresses(), 5)
        near.clients.add(client.host.peer_id)
        await hand_over(owner.host, [near.host.peer_id], change())
        with trio.fail_after(5):
            await near.changed.wait()
        await trio.testing.wait_all_tasks_blocked(0.2)
        assert near.host.admission.secret == NEW
        assert client.host.admission.secret == OLD


async def test_who_finds_a_newer_secret_kept_takes_it_the_next_time(tmp_path: Path) -> None:
    files = ClusterFiles(tmp_path, CLUSTER)
    files.keep(NEW)  # by another process of the same user
    async with (
        open_host(
            new_identity(), listen_host="127.0.0.1", admission=Admission(OLD, files=files)
        ) as late,
        open_host(new_identity(), listen_host="127.0.0.1", admission=Admission(NEW)) as member,
    ):
        with pytest.raises(RefusedError):
            await late.connect(member.addresses(), 5)
        assert await late.connect(member.addresses(), 5) == member.peer_id


async def test_forged_and_old_changes_change_nothing(tmp_path: Path) -> None:
    forged = sign_update(
        ClusterUpdate(cluster=CLUSTER, sequence=9, secret=NEW.text(), removed=()), new_identity()
    )
    async with member() as sender, member() as near:
        await sender.host.connect(near.host.addresses(), 5)
        failures = await hand_over(sender.host, [near.host.peer_id], forged)
        assert set(failures) == {near.host.peer_id}
        assert near.host.admission.secret == OLD
    admission = Admission(OLD, files=ClusterFiles(tmp_path, CLUSTER))
    assert admission.take_update(change(sequence=5), CLUSTER) is not None
    for again in (admission, Admission(NEW, files=ClusterFiles(tmp_path, CLUSTER))):
        for sequence in (5, 4):
            assert again.take_update(change(sequence=sequence), CLUSTER) is None
        with pytest.raises(ProtocolError):
            again.take_update(forged, CLUSTER)


def test_a_change_whose_secret_could_not_be_kept_is_taken_again(tmp_path: Path) -> None:
    """After a restart with the old secret: the disk was full, or the power went between the two."""
    files = ClusterFiles(tmp_path, CLUSTER)
    files.secret_path.mkdir(parents=True)  # no file can take its place
    assert Admission(OLD, files=files).take_update(change(sequence=5), CLUSTER) is not None
    files.secret_path.rmdir()
    again = Admission(OLD, files=files)
    assert again.take_update(change(sequence=5), CLUSTER) is not None
    assert files.secret() == NEW


def test_a_public_mesh_has_nothing_to_change() -> None:
    with pytest.raises(ProtocolError, match="a public mesh has no secret"):
        PUBLIC.take_update(change(), CLUSTER)


async def test_who_does_not_answer_is_named() -> None:
    gone = new_identity().peer_id
    async with member() as owner:
        failures = await hand_over(owner.host, [gone], change())
    assert set(failures) == {gone}
