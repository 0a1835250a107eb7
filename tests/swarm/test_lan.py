"""The LAN: what is read of an answer, and nodes that find each other on loopback."""

from __future__ import annotations

import pytest
import trio
from support.multicast import loopback_has_multicast
from zeroconf import ServiceInfo

from shardmesh.swarm.host import open_host
from shardmesh.swarm.identity import new_identity
from shardmesh.swarm.lan import (
    Lan,
    LanNode,
    cluster_tag,
    is_default,
    open_lan,
    open_lan_of,
    stay_joined,
)
from shardmesh.wire.limits import LAN_NODES_MAX

TYPE = "_shardmesh._tcp.local."
OTHER = new_identity().peer_id
LOOPBACK = ("127.0.0.1",)


def an_answer(
    peer_id: str = OTHER,
    cluster: str = "home",
    port: int = 51820,
    hosts: tuple[str, ...] = LOOPBACK,
) -> ServiceInfo:
    return ServiceInfo(
        TYPE,
        f"{peer_id}.{TYPE}",
        port=port,
        properties={"c": cluster_tag(cluster)},
        parsed_addresses=list(hosts),
    )


def test_an_answer_is_read() -> None:
    lan = Lan("home", new_identity().peer_id)
    read = lan.read(an_answer(hosts=("192.0.2.7", "2001:db8::7")))
    assert read == LanNode(
        OTHER,
        (f"/ip4/192.0.2.7/tcp/51820/p2p/{OTHER}", f"/ip6/2001:db8::7/tcp/51820/p2p/{OTHER}"),
    )


@pytest.mark.parametrize(
    "answer",
    [
        an_answer(cluster="another"),
        an_answer(peer_id="nobody"),
        an_answer(port=0),
        an_answer(hosts=()),
    ],
)
def test_an_answer_that_is_not_meant(answer: ServiceInfo) -> None:
    assert Lan("home", new_identity().peer_id).read(answer) is None


def test_the_own_answer_is_left_out() -> None:
    assert Lan("home", OTHER).read(an_answer()) is None


async def test_no_more_nodes_than_allowed() -> None:
    lan = Lan("home", "")
    for n in range(LAN_NODES_MAX + 5):
        lan.note(LanNode(f"node-{n}", ()))
    assert len(lan.nodes()) == LAN_NODES_MAX
    lan.note(LanNode("node-0", ("elsewhere",)))
    assert lan.nodes()[0].addresses == ("elsewhere",)


def test_only_the_default_bootstrap_means_that_nobody_said() -> None:
    assert is_default(("/ip4/127.0.0.1/tcp/51820",))
    assert not is_default(("/ip4/127.0.0.1/tcp/51821",))
    assert not is_default(("/ip4/127.0.0.1/tcp/51820", "/ip4/192.0.2.1/tcp/51820"))


@pytest.mark.processes
@pytest.mark.skipif(not loopback_has_multicast(), reason="no multicast on loopback here")
async def test_a_node_joins_whom_the_lan_shows() -> None:
    cluster = f"lan-{OTHER[-8:]}"  # nobody else on this machine has it
    joined = trio.Event()
    found: list[str] = []

    async def note(peer_id: str) -> None:
        found.append(peer_id)
        joined.set()

    async with (
        open_host(new_identity(), listen_host="127.0.0.1") as shown,
        open_host(new_identity(), listen_host="127.0.0.1") as searching,
        open_lan_of(shown, cluster, LOOPBACK),
        open_lan(cluster, searching.peer_id, LOOPBACK, searches=True) as lan,
        trio.open_nursery() as nursery,
    ):

        async def stay() -> None:
            await stay_joined(searching, lan, neighbours=searching.connected, joined=note)

        nursery.start_soon(stay)
        with trio.fail_after(30):
            await joined.wait()
        assert found == [shown.peer_id] == searching.connected()
        nursery.cancel_scope.cancel()
