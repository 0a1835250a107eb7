"""From one look at the directory to the next: what joined, left, loaded or went away."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import trio

from shardmesh.coordinator.chain import missing_layers, models_of
from shardmesh.coordinator.coordinator import replica_of
from shardmesh.swarm.directory import Directory
from shardmesh.web.events import EventHub
from shardmesh.wire.announcement import Announcement

EXPIRY_LOOK_S = 5.0
"""An announcement that expires changes nothing in the directory, so look by the clock too."""

Change = tuple[str, dict[str, Any]]
"""Kind of an event, and its data."""


async def watch_directory(directory: Directory, hub: EventHub) -> None:
    """Publishes what changes until cancelled; what is there at the start counts as joining."""
    before: dict[str, Announcement] = {}
    version = -1
    while True:
        with trio.move_on_after(EXPIRY_LOOK_S):
            version = await directory.wait_changed(version)
        now = {announcement.peer_id: announcement for announcement in directory.all()}
        for kind, data in changes(before, now):
            hub.publish(kind, data=data)
        before = now


def changes(before: Mapping[str, Announcement], now: Mapping[str, Announcement]) -> list[Change]:
    """The events between two looks, both by peer id.  Pure."""
    return [
        *_node_changes(before, now),
        *_completeness_changes(list(before.values()), list(now.values())),
    ]


def _node_changes(
    before: Mapping[str, Announcement], now: Mapping[str, Announcement]
) -> Iterator[Change]:
    for peer_id in before.keys() - now.keys():
        yield "node.left", describe(before[peer_id])
    for peer_id, announcement in now.items():
        earlier = before.get(peer_id)
        if earlier is None:
            yield "node.joined", describe(announcement)
        was_loaded = earlier is not None and earlier.capabilities.shard_loaded
        is_loaded = announcement.capabilities.shard_loaded
        if is_loaded and not was_loaded:
            yield "shard.loaded", describe(announcement)
        elif was_loaded and not is_loaded:
            yield "shard.unloaded", describe(announcement)


def _completeness_changes(
    before: Sequence[Announcement], now: Sequence[Announcement]
) -> Iterator[Change]:
    missing_before, missing_now = _missing_by_model(before), _missing_by_model(now)
    for model_name, missing in missing_now.items():
        was_complete = missing_before.get(model_name) == []
        if not missing and not was_complete:
            yield "model.complete", {"model_name": model_name}
        elif missing and was_complete:
            yield "model.incomplete", {"model_name": model_name, "missing_layers": missing}
    for model_name in missing_before.keys() - missing_now.keys():
        yield "model.gone", {"model_name": model_name}


def _missing_by_model(announcements: Sequence[Announcement]) -> dict[str, list[tuple[int, int]]]:
    replicas = [replica_of(a) for a in announcements if a.total_layers]
    return {name: missing_layers(found) for (name, _), found in models_of(replicas).items()}


def describe(announcement: Announcement) -> dict[str, Any]:
    """What an event tells of a node."""
    return {
        "peer_id": announcement.peer_id,
        "model_name": announcement.model_name,
        "shard_id": announcement.shard_id,
        "layer_start": announcement.layer_start,
        "layer_end": announcement.layer_end,
        "shard_loaded": announcement.capabilities.shard_loaded,
    }
