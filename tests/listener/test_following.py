"""Which nodes a stage has links to before anybody asks for one."""

from __future__ import annotations

import dataclasses
from collections import Counter

import msgspec
import pytest
from support.announcements import an_announcement, capabilities

from shardmesh.listener.assignment import Assignment
from shardmesh.listener.following import following
from shardmesh.swarm.identity import Identity, new_identity
from shardmesh.wire.announcement import Announcement
from shardmesh.wire.limits import FOLLOWING_LINKS_MAX

OWN = Assignment(
    shard_id=1,
    total_shards=3,
    total_layers=9,
    layer_start=3,
    layer_end=6,
    model_name="m",
    manifest_digest="d",
)
IDENTITIES = [new_identity() for _ in range(FOLLOWING_LINKS_MAX + 3)]
SELF = IDENTITIES[0].peer_id


def serving(identity: Identity, layers: tuple[int, int], **changes: object) -> Announcement:
    values = {"manifest_digest": "d", "capabilities": capabilities(shard_loaded=True), **changes}
    return an_announcement(
        identity, layer_start=layers[0], layer_end=layers[1], total_layers=9, **values
    )


def peer_ids(own: Assignment, known: list[Announcement], own_peer_id: str = SELF) -> list[str]:
    return [node.peer_id for node in following(own, own_peer_id, known)]


def test_those_behind_it_and_behind_the_last_those_of_the_first() -> None:
    own, first, second, third, other_third, *_ = IDENTITIES
    known = [
        serving(own, (3, 6)),
        serving(first, (0, 3)),
        serving(second, (3, 6)),
        serving(third, (6, 9)),
        serving(other_third, (6, 9)),
    ]
    assert set(peer_ids(OWN, known)) == {third.peer_id, other_third.peer_id}
    last = dataclasses.replace(OWN, shard_id=2, layer_start=6, layer_end=9)
    assert peer_ids(last, known) == [first.peer_id]
    (found,) = following(last, SELF, known)
    assert found.addresses == known[1].addresses


@pytest.mark.parametrize(
    "changes",
    [
        {"manifest_digest": "of another split"},
        {"capabilities": capabilities(shard_loaded=False)},
        {"capabilities": capabilities(shard_loaded=True, is_draining=True)},
    ],
)
def test_none_that_would_take_nothing(changes: dict[str, object]) -> None:
    assert peer_ids(OWN, [serving(IDENTITIES[1], (6, 9))])
    assert not peer_ids(OWN, [serving(IDENTITIES[1], (6, 9), **changes)])


def test_who_has_all_layers_or_does_not_know_his_own_follows_nobody() -> None:
    known = [serving(identity, (0, 9)) for identity in IDENTITIES]
    assert not peer_ids(dataclasses.replace(OWN, layer_start=0, layer_end=9), known)
    unknown = dataclasses.replace(
        OWN, layer_start=0, layer_end=0, total_layers=0, manifest_digest=""
    )
    assert not peer_ids(unknown, known)


def test_of_many_a_few_the_same_each_time_and_others_for_another_node() -> None:
    known = [serving(identity, (6, 9)) for identity in IDENTITIES[1:]]
    found = peer_ids(OWN, known)
    assert len(known) > len(found) == FOLLOWING_LINKS_MAX
    assert peer_ids(OWN, known[::-1]) == found
    n_chosen = Counter(p for i in range(200) for p in peer_ids(OWN, known, f"node {i}"))
    assert min(n_chosen.values()) > 200 * FOLLOWING_LINKS_MAX / len(known) / 2
    # One that goes is replaced, and the others stay.
    rest = [a for a in known if a.peer_id != found[0]]
    assert set(found[1:]) < set(peer_ids(OWN, rest))


def test_news_of_load_change_nothing() -> None:
    before = serving(IDENTITIES[1], (6, 9))
    busy = capabilities(shard_loaded=True, n_sessions=3, token_us=7)
    after = msgspec.structs.replace(before, sequence=2, capabilities=busy)
    assert following(OWN, SELF, [before]) == following(OWN, SELF, [after])
