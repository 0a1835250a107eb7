from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

from support.roster import announced

from shardmesh.web.events import EventHub
from shardmesh.web.node_facts import HostView, NodeFacts
from shardmesh.wire.announcement import Announcement
from shardmesh.wire.node_identity import NodeIdentity


def named(number: int, name: str) -> Announcement:
    return announced(number, identity=NodeIdentity(uuid="", name=name))


def clashes(own_name: str, own_peer_id: str, *nodes: Announcement) -> list[bool]:
    host = SimpleNamespace(peer_id=own_peer_id, addresses=list, connected=list)
    facts = NodeFacts(
        kind="gateway",
        identity=NodeIdentity(uuid="", name=own_name),
        cluster="demo",
        host=cast(HostView, host),
        announcements=lambda: list(nodes),
        events=EventHub(),
        disk=Path(),
        own_status=dict,
    )
    return [peer["name_clash"] for peer in facts.peers()]


def test_names_that_several_have() -> None:
    nodes = [named(0, "attic"), named(1, "cellar"), named(2, "attic"), named(3, "")]
    assert clashes("gate", "me", *nodes) == [True, False, True, False]


def test_the_name_of_the_gateway_counts() -> None:
    assert clashes("attic", "me", named(0, "attic")) == [True]


def test_a_listener_does_not_clash_with_itself() -> None:
    own = named(0, "attic")
    assert clashes("attic", own.peer_id, own) == [False]
