"""The DHT over several hosts on loopback."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
from support.announcements import CLUSTER, an_announcement

from shardmesh.errors import ProtocolError, UnreachableError
from shardmesh.swarm.dht import (
    AnnouncementValidator,
    Dht,
    announcement_key,
    open_dht,
    shard_key,
)
from shardmesh.swarm.host import Host, open_host
from shardmesh.swarm.identity import Identity, new_identity
from shardmesh.wire.announcement import encode_signed, open_signed


@asynccontextmanager
async def dhts(identities: Sequence[Identity]) -> AsyncIterator[list[tuple[Host, Dht]]]:
    """The first is the bootstrap of the others."""
    async with AsyncExitStack() as stack:
        nodes: list[tuple[Host, Dht]] = []
        for identity in identities:
            host = await stack.enter_async_context(open_host(identity, listen_host="127.0.0.1"))
            dht = await stack.enter_async_context(open_dht(host, cluster=CLUSTER))
            if nodes:
                bootstrap_host, bootstrap_dht = nodes[0]
                await dht.add(await host.connect(bootstrap_host.addresses(), 5))
                bootstrap_host.learn(host.peer_id, host.addresses())
                await bootstrap_dht.add(host.peer_id)
                await dht.refresh()
            nodes.append((host, dht))
        yield nodes


async def test_four_nodes_find_each_other() -> None:
    identities = [new_identity() for _ in range(5)]
    async with dhts(identities) as nodes:
        for shard_id, identity in enumerate(identities[1:]):
            signed = encode_signed(an_announcement(identity, shard_id=shard_id), identity)
            await nodes[shard_id + 1][1].announce(shard_id, signed)
        for _, dht in nodes:
            for shard_id, identity in enumerate(identities[1:]):
                found = [open_signed(data) for data in await dht.find_announcements(shard_id)]
                assert [(a.peer_id, a.shard_id) for a in found] == [(identity.peer_id, shard_id)]
        assert await nodes[1][1].find_announcements(9) == []


async def test_two_replicas_an_update_and_a_withdrawal() -> None:
    identities = [new_identity() for _ in range(4)]
    async with dhts(identities) as nodes:
        seeker = nodes[3][1]
        for identity, (_, dht) in list(zip(identities, nodes, strict=True))[1:3]:
            await dht.announce(0, encode_signed(an_announcement(identity), identity))
        found = {open_signed(data).peer_id for data in await seeker.find_announcements(0)}
        assert found == {identities[1].peer_id, identities[2].peer_id}

        changed = an_announcement(identities[1], sequence=2, model_name="changed")
        await nodes[1][1].announce(0, encode_signed(changed, identities[1]))
        found_names = {
            open_signed(data).peer_id: open_signed(data).model_name
            for data in await seeker.find_announcements(0)
        }
        assert found_names[identities[1].peer_id] == "changed"

        now_s = int(time.time())
        gone = an_announcement(identities[1], sequence=3, issued_at_s=now_s, expires_at_s=now_s)
        await nodes[1][1].withdraw(encode_signed(gone, identities[1]))
        found = {open_signed(data).peer_id for data in await seeker.find_announcements(0)}
        assert found == {identities[2].peer_id}


async def test_routing_updates_are_told() -> None:
    told: list[str] = []
    async with (
        open_host(new_identity(), listen_host="127.0.0.1") as first,
        open_host(new_identity(), listen_host="127.0.0.1") as second,
        open_dht(first, cluster=CLUSTER),
        open_dht(second, cluster=CLUSTER) as dht,
    ):
        dht.on_routing_updated(told.append)
        await dht.add(await second.connect(first.addresses(), 5))
        await dht.refresh()
        assert told == [first.peer_id]
        assert dht.known_nodes() == [first.peer_id]


async def test_visitors_that_left_are_no_part_of_the_dht() -> None:
    """A command is a client that asks and leaves; once 20 of them kept nodes from announcing."""
    identities = [new_identity() for _ in range(3)]
    async with dhts(identities) as nodes:
        (bootstrap, bootstrap_dht), (_, dht), _ = nodes
        for _ in range(21):
            async with (
                open_host(new_identity(), listen_host="127.0.0.1") as visitor,
                open_dht(visitor, cluster=CLUSTER, server=False) as visitor_dht,
            ):
                await visitor_dht.add(await visitor.connect(bootstrap.addresses(), 5))
                await visitor_dht.refresh()
        assert set(bootstrap_dht.known_nodes()) == {i.peer_id for i in identities[1:]}
        assert set(dht.known_nodes()) <= {i.peer_id for i in identities}
        known = {str(peer_id) for peer_id in bootstrap.libp2p.get_peerstore().peer_ids()}
        while len(known) > len(identities):  # the last one's connection may still be closing
            await trio.lowlevel.checkpoint()
            known = {str(peer_id) for peer_id in bootstrap.libp2p.get_peerstore().peer_ids()}
        await dht.announce(0, encode_signed(an_announcement(identities[1]), identities[1]))
        (found,) = await nodes[2][1].find_announcements(0)
        assert open_signed(found).peer_id == identities[1].peer_id


async def test_a_node_that_cannot_be_reached_leaves_the_routing_table() -> None:
    async with (
        open_host(new_identity(), listen_host="127.0.0.1") as first,
        open_dht(first, cluster=CLUSTER) as dht,
    ):
        async with open_host(new_identity(), listen_host="127.0.0.1") as second:
            first.keep_connections(lambda peer_id: True)  # known as a member, so not a stranger
            await dht.add(await first.connect(second.addresses(), 5))
        assert dht.known_nodes() == [second.peer_id]
        with pytest.raises(UnreachableError):
            await first.open_stream(second.peer_id, "/none/1.0")
        assert dht.known_nodes() == []


def test_validator_refuses_the_forged_the_foreign_and_the_old() -> None:
    alice, mallory = new_identity(), new_identity()
    now_s = time.time()
    validator = AnnouncementValidator(lambda: now_s)
    signed = encode_signed(an_announcement(alice), alice)
    key = announcement_key(CLUSTER, alice.peer_id)
    validator.validate(key, signed)
    with pytest.raises(ProtocolError):
        validator.validate(key, signed[:-1] + b"x")
    with pytest.raises(ProtocolError, match="another node"):
        validator.validate(key, encode_signed(an_announcement(mallory), mallory))
    with pytest.raises(ProtocolError, match="expired"):
        AnnouncementValidator(lambda: now_s + 601).validate(key, signed)
    at_s = int(now_s)
    for ahead in (signed, encode_signed(an_announcement(alice, expires_at_s=at_s), alice)):
        with pytest.raises(ProtocolError) as caught:
            AnnouncementValidator(lambda: now_s - 130).validate(key, ahead)
        assert caught.value.code == "WRONG_CLOCK"


def test_validator_prefers_the_newer_and_of_equals_the_later() -> None:
    alice = new_identity()
    old, new = (
        encode_signed(an_announcement(alice, sequence=sequence), alice) for sequence in (1, 2)
    )
    select = AnnouncementValidator().select
    assert select("", [old, new]) == 1
    assert select("", [new, old]) == 0
    assert select("", [old, old]) == 1


def test_keys_are_short_enough() -> None:
    for cluster in ("llama-cluster", "c" * 128):
        assert len(announcement_key(cluster, new_identity().peer_id).encode()) <= 50
        assert len(shard_key(cluster, 10_000).encode()) <= 50
    assert shard_key("llama-cluster", 0) == "llama-cluster/shard/0"
