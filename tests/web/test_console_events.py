from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from shardmesh.errors import StorageError
from shardmesh.web.event_store import EVENTS_ASKED_MAX, open_event_store
from shardmesh.web.events import Event


def event(number: int, kind: str = "node.joined", **members: object) -> Event:
    fields: dict[str, object] = {"at_s": 100.0 + number, "data": {"peer_id": f"p{number}"}}
    return Event(number=number, kind=kind, **(fields | members))  # type: ignore[arg-type]


async def test_events_outlive_the_gateway(tmp_path: Path) -> None:
    path = tmp_path / "state" / "events.sqlite3"
    store = await open_event_store(path)
    await store.add([event(1), event(2, "node.left", cause="it said goodbye")])
    await store.close()

    store = await open_event_store(path)
    (newest, oldest) = await store.recent()
    assert (newest.kind, newest.cause, newest.at_s) == ("node.left", "it said goodbye", 102.0)
    assert (oldest.kind, oldest.data) == ("node.joined", {"peer_id": "p1"})
    (third,) = await store.add([event(1)])
    assert third.id > newest.id > oldest.id
    await store.close()


async def test_only_lasting_events_are_kept() -> None:
    store = await open_event_store(None)
    assert await store.add([event(1, is_lasting=False)]) == []
    assert await store.recent() == []
    await store.close()


async def test_the_oldest_make_room() -> None:
    store = await open_event_store(None, n_events_max=10)
    for number in range(25):
        await store.add([event(number)])
    kept = await store.recent(n_max=EVENTS_ASKED_MAX)
    assert [e.data["peer_id"] for e in kept] == [f"p{n}" for n in range(24, 14, -1)]
    await store.close()


async def test_kinds_and_pages() -> None:
    store = await open_event_store(None)
    for number, kind in enumerate(["node.joined", "node.left", "shard.loaded", "model.gone"] * 3):
        await store.add([event(number, kind)])
    nodes = await store.recent(kinds=["node"])
    assert [e.kind for e in nodes] == ["node.left", "node.joined"] * 3
    assert len(await store.recent(kinds=["shard", "model"])) == 6
    assert len(await store.recent(kinds=["node.left"])) == 3
    older = await store.recent(before_id=nodes[1].id, kinds=["node"], n_max=2)
    assert older == nodes[2:4]
    assert len(await store.recent(kinds=["*"])) == 12, "no pattern of SQLite comes from outside"
    assert await store.recent(n_max=-1) == []
    await store.close()


async def test_too_long_is_cut(tmp_path: Path) -> None:
    store = await open_event_store(None)
    (kept,) = await store.add([event(1, cause="c" * 9999, data={"file": "f" * 9999})])
    assert len(kept.cause) == 1000
    assert kept.data == {}
    await store.close()


async def test_a_file_that_is_no_database_is_put_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "events.sqlite3"
    path.write_text("these are not the events " * 200)
    store = await open_event_store(path)
    await store.add([event(1)])
    assert len(await store.recent()) == 1
    assert (tmp_path / "events.sqlite3.broken").read_text().startswith("these are not")
    await store.close()


async def test_a_place_that_cannot_hold_it_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be opened"):
        await open_event_store(tmp_path / "file" / "events.sqlite3")


async def test_a_full_disk_is_a_storage_error(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite3"
    store = await open_event_store(path)
    with sqlite3.connect(path) as other:
        other.execute("DROP TABLE event")
    other.close()
    with pytest.raises(StorageError):
        await store.add([event(1)])
    await store.close()
