"""Nodes that join, know each other, lose each other and come back: on loopback, one process."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from support.announcements import CLUSTER, capabilities

from shardmesh.errors import InputError
from shardmesh.swarm.announcing import Offer
from shardmesh.swarm.dht import Dht, open_dht
from shardmesh.swarm.directory import Directory
from shardmesh.swarm.host import Host, open_host
from shardmesh.swarm.identity import Identity, new_identity
from shardmesh.swarm.membership import Membership
from shardmesh.swarm.neighbours import pauses_s
from shardmesh.swarm.remembered import RememberedNodes


@dataclasses.dataclass(frozen=True)
class Node:
    host: Host
    dht: Dht
    directory: Directory
    membership: Membership
    die: Callable[[], None]  # without a farewell


def an_offer(shard_id: int, *, model_name: str = "fairy") -> Offer:
    return Offer(
        shard_id=shard_id,
        total_shards=3,
        total_layers=6,
        layer_start=2 * shard_id,
        layer_end=2 * shard_id + 2,
        model_name=model_name,
        manifest_digest="ab" * 32,
        engine_fingerprint="fake-1",
        capabilities=capabilities(),
    )


@asynccontextmanager
async def node(
    bootstraps: Sequence[str],
    offer: Callable[[], Offer] | None = None,
    *,
    identity: Identity | None = None,
    port: int = 0,
    state_dir: Path | None = None,
    logger: logging.Logger | None = None,
    refresh_interval_s: float = 300,
) -> AsyncIterator[Node]:
    identity = identity or new_identity()
    async with (
        open_host(identity, listen_host="127.0.0.1", port=port) as host,
        open_dht(host, cluster=CLUSTER) as dht,
        trio.open_nursery() as nursery,
    ):
        directory = Directory(CLUSTER)
        membership = Membership(
            host,
            dht,
            directory,
            bootstraps=bootstraps,
            signer=identity,
            offer=offer,
            refresh_interval_s=refresh_interval_s,
            state_dir=state_dir,
            logger=logger,
        )
        await nursery.start(membership.run)
        yield Node(host, dht, directory, membership, nursery.cancel_scope.cancel)
        nursery.cancel_scope.cancel()


async def wait_until_known(directory: Directory, shard_ids: Sequence[int]) -> None:
    with trio.fail_after(10):
        version = directory.version
        while [a.shard_id for a in directory.all()] != list(shard_ids):
            version = await directory.wait_changed(version)


async def test_three_listeners_know_each_other_and_are_found() -> None:
    async with node([]) as bootstrap:
        entry = bootstrap.host.addresses()
        async with (
            node(entry, lambda: an_offer(0)) as first,
            node(entry, lambda: an_offer(1)) as second,
            node(entry, lambda: an_offer(2)) as third,
        ):
            for listener in (bootstrap, first, second, third):
                await wait_until_known(listener.directory, [0, 1, 2])
            with trio.fail_after(10):
                while not {second.host.peer_id, third.host.peer_id} <= set(first.host.connected()):
                    await trio.testing.wait_all_tasks_blocked(0.05)
            async with node(entry) as client:
                with trio.fail_after(10):
                    await client.membership.joined.wait()
                found = await client.membership.find_listeners()
                assert [(a.shard_id, a.peer_id) for a in found] == [
                    (0, first.host.peer_id),
                    (1, second.host.peer_id),
                    (2, third.host.peer_id),
                ]
                assert found[0].addresses == tuple(first.host.addresses())
        await wait_until_known(bootstrap.directory, [])  # they took their leave


async def test_found_through_the_dht_alone() -> None:
    async with node([]) as bootstrap, node(bootstrap.host.addresses(), lambda: an_offer(0)) as one:
        with trio.fail_after(10):
            await one.membership.announced.wait()
        async with node(bootstrap.host.addresses()) as client:
            with trio.fail_after(10):
                await client.membership.joined.wait()
            client.directory.withdraw(one.host.peer_id)
            found = await client.membership.find_listeners()
            assert [a.peer_id for a in found] == [one.host.peer_id]


async def test_the_farewell_does_not_wait_for_a_slow_disk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    has_left = threading.Event()

    async def live() -> None:
        async with node(bootstrap.host.addresses(), lambda: an_offer(0)) as one:
            await one.membership.announced.wait()
            monkeypatch.setattr(RememberedNodes, "save", lambda nodes: has_left.wait(20))

    async with node([]) as bootstrap, trio.open_nursery() as nursery:
        nursery.start_soon(live)
        await wait_until_known(bootstrap.directory, [0])
        (peer_id,) = (announcement.peer_id for announcement in bootstrap.directory.all())
        try:
            with trio.fail_after(5):
                await wait_until_known(bootstrap.directory, [])
            assert bootstrap.directory.has_left(peer_id)
        finally:
            has_left.set()


async def test_a_change_is_announced_at_once() -> None:
    name = "before"
    async with node([]) as bootstrap:
        offer = lambda: an_offer(0, model_name=name)  # noqa: E731
        async with node(bootstrap.host.addresses(), offer) as listener:
            await wait_until_known(bootstrap.directory, [0])
            with trio.fail_after(10):
                await listener.membership.announced.wait()
            name = "after"
            listener.membership.announce_changed()
            with trio.fail_after(10):
                version = 0
                while bootstrap.directory.all()[0].model_name != "after":
                    version = await bootstrap.directory.wait_changed(version)


async def test_announced_again_after_the_refresh_interval() -> None:
    async with (
        node([]) as bootstrap,
        node(bootstrap.host.addresses(), lambda: an_offer(0), refresh_interval_s=0.3),
    ):
        await wait_until_known(bootstrap.directory, [0])
        first = bootstrap.directory.all()[0].sequence
        with trio.fail_after(10):
            version = 0
            while bootstrap.directory.all()[0].sequence == first:
                version = await bootstrap.directory.wait_changed(version)


async def test_bootstrap_that_comes_late_and_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    identity = new_identity()
    async with node([], identity=identity) as bootstrap:
        entry = bootstrap.host.addresses()
        port = int(entry[0].split("/")[4])
    async with node([entry[0].partition("/p2p/")[0]], lambda: an_offer(0)) as listener:
        with trio.fail_after(5):
            while "trying again" not in caplog.text:
                await trio.testing.wait_all_tasks_blocked(0.05)
        for _ in range(2):
            async with node([], identity=identity, port=port) as bootstrap:
                await wait_until_known(bootstrap.directory, [0])
        assert listener.membership.joined.is_set()


async def test_remembered_nodes_replace_the_bootstrap(tmp_path: Path) -> None:
    identity = new_identity()
    async with node([]) as bootstrap:
        entry = bootstrap.host.addresses()
        async with node(entry, lambda: an_offer(1)) as other:
            async with node(
                entry, lambda: an_offer(0), identity=identity, state_dir=tmp_path
            ) as first:
                await wait_until_known(first.directory, [0, 1])
                with trio.fail_after(10):
                    while other.host.peer_id not in first.host.connected():
                        await trio.testing.wait_all_tasks_blocked(0.05)
                    await first.membership.announced.wait()
            nobody = ["/ip4/127.0.0.1/tcp/9"]
            async with node(
                nobody, lambda: an_offer(0), identity=identity, state_dir=tmp_path
            ) as again:
                await wait_until_known(again.directory, [0, 1])
                await wait_until_known(other.directory, [0, 1])


async def test_lines_of_joining_come_in_order(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("test-of-lines")
    async with node([]) as bootstrap:
        with caplog.at_level(logging.INFO, "test-of-lines"):
            entry = bootstrap.host.addresses()
            async with node(entry, lambda: an_offer(2), logger=logger) as listener:
                with trio.fail_after(10):
                    await listener.membership.announced.wait()
        lines = [r.getMessage() for r in caplog.records if r.name == "test-of-lines"]
        expected = [
            "🔗 Connecting to bootstrap node...",
            f"[CONNECT] ✓ Connection established! {bootstrap.host.peer_id} (outbound",
            "[DHT] ✓ Started Kademlia bootstrap",
            f"[DHT] Routing updated: {bootstrap.host.peer_id}",
            "[DHT] ✓ Announced shard 2 to DHT",
        ]
        places = [
            next(i for i, line in enumerate(lines) if line.startswith(start)) for start in expected
        ]
        assert places == sorted(places)


def test_pauses_grow_and_are_bounded() -> None:
    pauses = iter(pauses_s(jitter=lambda: 0.5))
    assert [next(pauses) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert next(iter(pauses_s(jitter=lambda: 0.0))) == 0.75


async def test_what_is_no_bootstrap_is_said_at_once() -> None:
    with pytest.RaisesGroup(
        pytest.RaisesExc(InputError, match="no multiaddress"), flatten_subgroups=True
    ):
        async with node(["bootstrap.example:51820"]):
            pass
