"""Which of a machine's addresses are told, and in which order."""

from __future__ import annotations

import socket

from multiaddr import Multiaddr

from shardmesh.swarm.addresses import (
    CIRCUITS_PER_RELAY_MAX,
    circuit_addresses,
    is_loopback,
    reachable_addresses,
    told_addresses,
    with_peer_id,
)
from shardmesh.swarm.identity import new_identity
from shardmesh.wire.limits import ANNOUNCEMENT_ADDRESSES_MAX

OWN, RELAY = new_identity().peer_id, new_identity().peer_id


def test_ways_through_relays_are_told_however_many_addresses_a_machine_has() -> None:
    """Networks of containers and short-lived IPv6 addresses: nobody would reach it else."""
    relay_at = [f"/ip4/192.0.2.{n}/tcp/4001" for n in range(1, 1 + CIRCUITS_PER_RELAY_MAX)]
    circuits = [with_peer_id(text, OWN) for text in circuit_addresses(RELAY, relay_at, ())]
    own = [f"/ip4/10.0.{n}.1/tcp/4001/p2p/{OWN}" for n in range(2 * ANNOUNCEMENT_ADDRESSES_MAX)]
    told = told_addresses([*own, *circuits])
    n_own = ANNOUNCEMENT_ADDRESSES_MAX - len(circuits)
    assert told == (*own[:n_own], *circuits)
    assert told_addresses(own[:3]) == tuple(own[:3])


def test_the_address_that_the_machine_goes_out_with_comes_first() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
            outward = probe.getsockname()[0]
        except OSError:
            outward = ""
    found = [str(a) for a in reachable_addresses([Multiaddr("/ip4/0.0.0.0/tcp/4001")])]
    assert outward in ("", found[0].split("/")[2])
    n_far = sum(not is_loopback(text) for text in found)
    assert not any(is_loopback(text) for text in found[:n_far])
