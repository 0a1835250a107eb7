from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest

from shardmesh.errors import InputError
from shardmesh.swarm.node_identity import FILE_NAME, Naming, load_node_identity
from shardmesh.wire.node_identity import NodeIdentity, check_identity

PEER_ID = "12D3KooWAbCd"


def test_a_uuid_is_made_once_and_a_name_is_kept(tmp_path: Path) -> None:
    first = load_node_identity(tmp_path, PEER_ID, Naming(name="cellar", tags=("gpu",)))
    again = load_node_identity(tmp_path, PEER_ID, Naming())
    assert uuid.UUID(first.uuid)
    assert (again.uuid, again.name) == (first.uuid, "cellar")
    assert again.tags == (), "tags say how it was started"
    assert (tmp_path / FILE_NAME).stat().st_mode & 0o077 == 0


def test_without_a_name_nodes_of_one_machine_differ(tmp_path: Path) -> None:
    one = load_node_identity(tmp_path / "1", PEER_ID, Naming())
    other = load_node_identity(tmp_path / "2", "12D3KooWXyZw", Naming())
    assert one.name.endswith("-AbCd")
    assert one.name != other.name
    assert one.uuid != other.uuid


def test_an_old_node_id_is_taken_over(tmp_path: Path) -> None:
    old = str(uuid.uuid4())
    assert load_node_identity(tmp_path / "1", PEER_ID, Naming(old_id=old.upper())).uuid == old
    named = [load_node_identity(tmp_path / f, PEER_ID, Naming(old_id="node-7")) for f in "23"]
    assert named[0] == named[1]
    assert named[0].name == "node-7"
    kept = load_node_identity(tmp_path / "2", PEER_ID, Naming(old_id=old))
    assert kept.uuid == named[0].uuid, "only a node without a UUID takes one over"


@pytest.mark.parametrize(
    ("name", "location", "tags"),
    [
        ("x" * 65, "", ()),
        ("two\nlines", "", ()),
        (" blank", "", ()),
        ("", "y" * 129, ()),
        ("", "", ("two words",)),
        ("", "", ("same", "same")),
        ("", "", tuple(f"t{i}" for i in range(17))),
    ],
)
def test_what_cannot_be_is_refused(name: str, location: str, tags: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        check_identity("", name, location, tags)
    assert caught.value.code == "BAD_NODE_IDENTITY"
    assert caught.value.next_step


def test_words_of_other_nodes_are_held_to_the_same_rules() -> None:
    with pytest.raises(ValueError, match="printable"):
        NodeIdentity(name="a\x1b[2J")


@pytest.mark.parametrize("text", ["", "[]", '{"uuid": "nix"}'])
def test_a_damaged_file_is_said(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(InputError, match="node's identity"):
        load_node_identity(tmp_path, PEER_ID, Naming())


def test_the_file_holds_what_must_last(tmp_path: Path) -> None:
    made = load_node_identity(tmp_path, PEER_ID, Naming(name="cellar"))
    assert json.loads((tmp_path / FILE_NAME).read_text()) == {"uuid": made.uuid, "name": "cellar"}
