from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from support.roster import announced, peer_id_of_number, roster_of

from shardmesh.web.roster import Download, Report
from shardmesh.web.state import changes, merged, needed_shard, state_document
from shardmesh.wire.node_identity import NodeIdentity

values = st.recursive(
    st.booleans() | st.integers(0, 9) | st.text("ab", max_size=2) | st.lists(st.integers(0, 3)),
    lambda inner: st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=4),
    max_leaves=12,
)
documents = st.dictionaries(st.text("abc", min_size=1, max_size=2), values, max_size=5)


@given(documents, documents)
def test_a_patch_makes_the_new_document_of_the_old(
    old: dict[str, Any], new: dict[str, Any]
) -> None:
    assert merged(old, changes(old, new)) == new


@given(documents)
def test_nothing_changes_between_equals(document: dict[str, Any]) -> None:
    assert changes(document, document) == {}


def test_a_patch_holds_only_what_changed() -> None:
    before = state_document(roster_of(*map(announced, range(4))), gateway={}, sessions={}, links={})
    report = {peer_id_of_number(2): Report(round_trip_ms=3.0)}
    roster = roster_of(*map(announced, range(4)), reports=report)
    patch = changes(before, state_document(roster, gateway={}, sessions={}, links={}))
    assert patch.keys() == {"nodes"}
    assert patch["nodes"].keys() == {peer_id_of_number(2)}
    assert patch["nodes"][peer_id_of_number(2)]["round_trip_ms"] == 3.0


def test_the_document_never_holds_null() -> None:
    def no_null(value: object) -> bool:
        if isinstance(value, dict):
            return all(map(no_null, value.values()))
        return value is not None

    reports = {
        peer_id_of_number(0): Report(
            downloads=(Download(name="shard-0.gguf", n_bytes=9, n_bytes_done=1),)
        )
    }
    roster = roster_of(*map(announced, range(3)), reports=reports)
    assert no_null(state_document(roster, gateway={}, sessions={}, links={}))


def test_models_tell_what_is_missing_and_how_often_each_shard_is_served() -> None:
    roster = roster_of(announced(0), announced(4), announced(1), announced(3, loaded=False))
    (model,) = state_document(roster, gateway={}, sessions={}, links={})["models"].values()
    assert (model["complete"], model["missing"]) == (False, [[4, 8]])
    served = {shard_id: shard["n_serving"] for shard_id, shard in model["shards"].items()}
    assert served == {"0": 2, "1": 1, "3": 0}


def test_the_shard_needed_most_is_one_that_nobody_has() -> None:
    def needed(*numbers: int) -> object:
        document = state_document(
            roster_of(*map(announced, numbers)), gateway={}, sessions={}, links={}
        )
        return document.get("needed", {}).get("shard_id")

    assert needed() is None
    assert needed(0, 1, 3) == 2
    assert needed(0, 1, 2, 3) == 0
    assert needed(0, 4, 1, 2, 6, 3) == 1
    assert needed_shard({}) is None


def test_layers_of_an_unserved_shard_come_from_who_waits_with_it() -> None:
    roster = roster_of(announced(0), announced(1, loaded=False))
    needed = state_document(roster, gateway={}, sessions={}, links={})["needed"]
    assert (needed["shard_id"], needed["layer_start"], needed["layer_end"]) == (1, 1, 4)


def test_nodes_with_one_name_are_told_apart() -> None:
    named = [announced(n, identity=NodeIdentity(name=name)) for n, name in enumerate("aab")]
    nodes = state_document(roster_of(*named), gateway={}, sessions={}, links={})["nodes"]
    assert [node.get("name_clash", False) for node in nodes.values()] == [True, True, False]
    assert [node["name"] for node in nodes.values()] == ["a", "a", "b"]


def test_a_published_model_has_its_link() -> None:
    roster = roster_of(*map(announced, range(4)))
    links = {"ab" * 32: "shardmesh:fairy%20tales?m=...", "cd" * 32: "of a model that is gone"}
    models = state_document(roster, gateway={}, sessions={}, links=links)["models"]
    assert [model["link"] for model in models.values()] == ["shardmesh:fairy%20tales?m=..."]
